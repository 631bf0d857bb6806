"""The scripts in a notebook."""

import json

import numpy as np
import pytest
from test_end_to_end import DATA, ENVIRONMENT, HOME, MODELS


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
# The scripts, which %run runs, share this module.
FEW_MEASUREMENTS = f"""
import functools, sys
sys.path.insert(0, {str(HOME)!r})
import utils, metrics
metrics.NULL_SETS, metrics.FRESH_STEPS, metrics.FRESH_EPOCHS = 2, 1, 1
metrics.FRESH_ON_DRAWS = 1
metrics.TSNE = functools.partial(metrics.TSNE, n_iter=50, early_exaggeration_iter=50)
"""


def test_a_notebook_runs_both_scripts_and_interrupts_them(tiny_data, tmp_path):
    np.save(
        tmp_path / "plain.npy", np.random.default_rng(0).random((210, 784), np.float32)
    )
    report = tmp_path / "report.md"
    report.write_text("before <!-- begin q1 --><!-- end q1 -->")
    options = "--epochs 2 --batch-size 42"
    with Notebook(tmp_path) as notebook:
        assert "Error" not in notebook.run(FEW_MEASUREMENTS)
        before = notebook.run(HANDLERS)
        data = tiny_data / DATA["q1"]
        again = f"%run {HOME / 'q1_cnn_autoencoder.py'} --data {data} {options}"
        told = notebook.run(again, interrupt_after="epoch 1 of")
        assert f"continue with: {again} --resume" in told
        assert notebook.run(HANDLERS) == before
        waits = "print('waiting', flush=True)\nwhile True: pass"
        assert "KeyboardInterrupt" in notebook.run(waits, interrupt_after="waiting")
        told = notebook.run(f"{again} --resume")
        assert "Error" not in told
        assert "Figures and metrics are in figures" in told
        told = notebook.run(
            f"%run {HOME / 'q2_aae.py'} --data plain.npy --control --code-dim 1 "
            + options
        )
        assert "Error" not in told, told
        assert notebook.run(HANDLERS) == before
    figures = tmp_path / "figures"
    mse = json.loads((figures / "q1_metrics.json").read_text())["test_mse"]
    assert f"| {mse:.5f} |" in report.read_text()
    assert report.read_text().startswith("before ")
    metrics = json.loads((figures / "q2_control_metrics.json").read_text())
    assert metrics["code_dim"] == 1
    assert metrics["knn_accuracy"] is None
    assert metrics["frechet_distance"] is None
    for model in MODELS["q2"]:
        assert (tmp_path / "runs" / "q2_control" / f"{model}.keras").exists()
