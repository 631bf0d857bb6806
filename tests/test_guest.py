"""The scripts as guests in another program and in a notebook."""

import json
import subprocess
import sys

import numpy as np
import pytest
from test_end_to_end import DATA, ENVIRONMENT, HOME, MODELS


def test_import_changes_nothing_and_leaves_ctrl_c_to_the_program():
    code = """
import os, signal, sys
import matplotlib
matplotlib.use("svg")
variables = dict(os.environ)
# A shell starts what runs in the background with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

def seen():
    numbers = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    return [
        {number: signal.getsignal(number) for number in numbers},
        [os.readlink(f"/proc/self/fd/{number}") for number in range(3)],
        [sys.stdin, sys.stdout, sys.stderr, sys.excepthook, os.getcwd()],
        dict(matplotlib.rcParams),
        {name: os.environ.get(name) for name in variables},
    ]

before = seen()
import q1_cnn_autoencoder, q2_aae
for one, other in zip(before, seen()):
    assert one == other, (one, other)
assert "TF_CPP_MIN_LOG_LEVEL" not in os.environ
assert q2_aae.keras.backend.backend() == "tensorflow"
try:
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    except KeyboardInterrupt:
        print("except")
finally:
    print("finally")
"""
    variables = ENVIRONMENT | {"KERAS_BACKEND": "jax"}
    variables.pop("TF_CPP_MIN_LOG_LEVEL", None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=HOME,
        env=variables,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "except\nfinally\n"


class Notebook:
    """A kernel, and what its cells print."""

    def __init__(self, folder):
        client = pytest.importorskip("jupyter_client")
        pytest.importorskip("ipykernel")
        self.manager = client.KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=folder, env=ENVIRONMENT)
        self.client = self.manager.blocking_client()
        self.client.start_channels()

    def __enter__(self):
        self.client.wait_for_ready(timeout=300)
        return self

    def __exit__(self, *_):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def run(self, code, interrupt_after=None):
        """Run a cell; return what it printed, and what its errors say."""
        printed = []

        def hear(message):
            content = message["content"]
            if message["msg_type"] == "stream":
                printed.append(content["text"])
                if interrupt_after and interrupt_after in content["text"]:
                    self.manager.interrupt_kernel()
            elif message["msg_type"] == "error":
                printed.append(f"{content['ename']}: {content['evalue']}\n")

        self.client.execute_interactive(
            code, output_hook=hear, allow_stdin=False, timeout=600
        )
        return "".join(printed)


HANDLERS = """
import signal, sys
print([signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], sys.stdout)
"""


def test_a_notebook_runs_both_scripts_and_interrupts_them(tiny_data, tmp_path):
    plain = tmp_path / "plain.npy"
    np.save(plain, np.random.default_rng(0).random((210, 28, 28), np.float32))
    options = "--epochs 2 --batch-size 42"
    with Notebook(tmp_path) as notebook:
        before = notebook.run(HANDLERS)
        data = tiny_data / DATA["q1"]
        again = f"%run {HOME / 'q1_cnn_autoencoder.py'} --data {data} {options}"
        told = notebook.run(again, interrupt_after="epoch 1 of")
        assert f"go on with: {again} --resume" in told
        assert notebook.run(HANDLERS) == before
        waits = "import time\nprint('waiting', flush=True)\ntime.sleep(60)"
        assert "KeyboardInterrupt" in notebook.run(waits, interrupt_after="waiting")

        told = notebook.run(again)
        assert "Error" not in told
        assert "There is no report.md here" in told
        assert "Figures and metrics are in figures" in told

        report = tmp_path / "report.md"
        report.write_text("before <!-- begin q2.control --><!-- end q2.control -->")
        told = notebook.run(
            f"%run {HOME / 'q2_aae.py'} --data plain.npy --control --code-dim 1 "
            + options
        )
        assert "Error" not in told, told
        assert notebook.run(HANDLERS) == before
    metrics = json.loads((tmp_path / "figures/q2_control_metrics.json").read_text())
    assert metrics["code_dim"] == 1
    assert metrics["knn_accuracy"] is None
    assert metrics["frechet_distance"] is None
    for model in MODELS["q2"]:
        assert (tmp_path / "runs" / "q2_control" / f"{model}.keras").exists()
    text = report.read_text(encoding="utf-8")
    assert f"| {metrics['test_mse']:.5f} |" in text
    assert text.startswith("before ")
