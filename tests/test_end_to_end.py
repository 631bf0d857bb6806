"""Both scripts from the command line to their outputs, on a tiny data set."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import utils

import keras
import matplotlib.image
import numpy as np
import pytest
from conftest import save_pairs

import q1_cnn_autoencoder as q1
import q2_aae as q2

HOME = Path(__file__).parents[1]
SCRIPTS = {"q1": "q1_cnn_autoencoder.py", "q2": "q2_aae.py"}
DATA = {"q1": "MNIST_M.npy", "q2": "data.npy"}
MODELS = {"q1": ["autoencoder"], "q2": ["encoder", "decoder", "discriminator"]}
FIGURES = {
    "q1": {"loss", "reconstructions"},
    "q2": {
        *("tsne", "losses", "samples", "latent_walk", "latent_slice"),
        *("reconstructions", "prior_match"),
    },
}
KEYS = {
    "q1": {"test_mse", "test_psnr_db", "pca_test_mse", "code_dim", "parameters"},
    "q2": {
        *("test_mse", "test_reconstruction_loss", "loss_discriminator"),
        *("loss_encoder", "prior_match", "frechet_distance", "knn_accuracy"),
    },
}
# Names as a user calls them: the interpreter of the PATH, the script from elsewhere.
PYTHON = Path(sys.executable).name
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",  # two tests at a time share two cores
}
# What a user's machine may have set, none of which a run may depend on.
ODD = {
    "MPLBACKEND": "module://no_such_package.backend",
    "PYTHONIOENCODING": "ascii",
    "KERAS_BACKEND": "jax",
}
ODD_KERAS = {"floatx": "float16", "image_data_format": "channels_first"}


def options(folder, data, *more):
    """Return the options of a run whose outputs are in a folder."""
    places = "--figures", folder / "figures", "--run-dir", folder / "run"
    few = "--batch-size", "42", "--epochs", "3"
    return [str(word) for word in ("--data", data, *places, *few, *more)]


def start(words, folder, **environment):
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=ENVIRONMENT | environment,
    )


def run(words, folder, code=0, **environment):
    """Run a program to an exit code; return what it printed, and its errors."""
    process = start(words, folder, **environment)
    told, error = process.communicate()
    assert process.returncode == code, error
    return told, error


def read_until(process, words):
    for line in process.stdout:
        if words in line:
            return
    pytest.fail(f"it ended before {words!r}: {process.stderr.read()}")


def read_losses(question, name, folder):
    path = folder / "figures" / f"{question}_{name}.csv"
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_metrics(question, folder):
    return json.loads((folder / "figures" / f"{question}_metrics.json").read_text())


def check_outputs(question, folder):
    paths = list((folder / "figures").glob("*.png"))
    assert {path.stem for path in paths} == {
        f"{question}_{figure}" for figure in FIGURES[question]
    }
    for path in paths:
        image = matplotlib.image.imread(path)
        assert min(image.shape[:2]) > 150
        assert image[..., :3].std() > 0.02
    found = read_metrics(question, folder)
    common = {"data", "seed", "versions", "settings", "training_seconds", "code"}
    assert KEYS[question] | common <= found.keys()
    assert (found["settings"]["epochs"], found["settings"]["batch_size"]) == (3, 42)
    history = read_losses(question, "history", folder)
    assert [float(row["epoch"]) for row in history] == [1, 2, 3]
    assert [float(row["step"]) for row in history] == [10, 20, 30]
    parts = read_losses(question, "steps", folder)
    assert [float(row["step"]) for row in parts] == list(range(1, 31))
    assert {name for name in history[0] if f"val_{name}" in history[0]} < set(parts[0])
    rows = history + parts
    assert all(np.isfinite(float(value)) for row in rows for value in row.values())


def check_same(question, whole, broken):
    """Compare two runs' numbers, and their figures byte for byte."""
    first, second = (read_metrics(question, folder) for folder in (whole, broken))
    for found in (first, second):
        del found["training_seconds"], found["data"]["file"]
    assert first == second
    histories = [read_losses(question, "history", each) for each in (whole, broken)]
    for row in sum(histories, []):
        del row["seconds"]
    assert histories[0] == histories[1]
    parts = [read_losses(question, "steps", each) for each in (whole, broken)]
    assert parts[0] == parts[1]
    for path in (whole / "figures").glob("*.png"):
        assert path.read_bytes() == (broken / "figures" / path.name).read_bytes(), path


def load(folder, name):
    return keras.saving.load_model(folder / "run" / f"{name}.keras")


def test_q1_interrupted_killed_or_in_an_odd_environment_ends_the_same(
    tiny_data, tmp_path, refused
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    broken.mkdir()
    data = tmp_path / "given.npy"
    data.write_bytes((tiny_data / DATA["q1"]).read_bytes())
    (tmp_path / "keras.json").write_text(json.dumps(ODD_KERAS))
    odd_name = tmp_path / os.fsdecode(b"donn\xe9es.npy")  # no UTF-8
    odd_name.symlink_to(data)
    script = HOME / SCRIPTS["q1"]
    words = [PYTHON, script, *options(whole, odd_name)]
    run(words, tmp_path, **ODD, KERAS_HOME=str(tmp_path))
    check_outputs("q1", whole)
    model = load(whole, "autoencoder")
    restored = model.predict(np.zeros((2, 28, 28, 3), np.float32), verbose=0)
    assert restored.dtype == np.float32
    assert restored.shape == (2, 28, 28, 3)
    assert 0 <= restored.min() <= restored.max() <= 1
    found = read_metrics("q1", whole)
    assert found["parameters"] == model.count_params()
    assert found["data"]["file"] == "donn\ufffdes.npy"
    assert found["data"]["source"] == "a file as given"

    # Nobody reads its output any more, as after `| head -1`.
    words = [PYTHON, os.path.relpath(script, broken), *options(broken, data)]
    process = start(words, broken)
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 130, error
    again = shlex.join([*words, "--resume"])
    hint = f"{script.name}: interrupted; continue with: {again}"
    assert error.splitlines()[-1] == hint
    assert (broken / "run" / "autoencoder.keras").exists()
    assert (broken / "figures" / "q1_loss.png").exists()

    process = start(shlex.split(again), broken)
    read_until(process, "epoch 2 of 3")
    process.kill()
    process.communicate()
    # Another run's history, in figures that both share.
    (broken / "figures" / "q1_history.csv").write_text("epoch,loss\n1,7\n2,7\n")
    run(["sh", "-c", f"exec {again} <&- >&- 2>&-"], broken)  # as under some daemons
    check_same("q1", whole, broken)

    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1  # a pixel
    data.write_bytes(content)
    assert "--data" in refused(q1.main, *shlex.split(again)[2:])


@pytest.fixture
def run_q2(monkeypatch, few_measurements):
    """Return a function that runs question 2 here, with small networks."""
    small = {"hidden": (48,), "discriminator_hidden": (48,)}
    for name in ("DEFAULT", "CONTROL"):
        monkeypatch.setattr(q2, name, getattr(q2, name)._replace(**small))

    def run_here(*arguments):
        monkeypatch.setattr(sys, "argv", ["q2_aae.py", *arguments])
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", sys.stdout)
            utils.run_script(q2.main)

    return run_here


def test_q2_interrupted_ends_the_same(tiny_data, tmp_path, monkeypatch, capsys, run_q2):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    data = tiny_data / DATA["q2"]
    run_q2(*options(whole, data))
    lines = [
        line for line in capsys.readouterr().out.splitlines() if "epoch" in line[:5]
    ]
    assert len(lines) == 3
    assert all(len(line) <= 80 and " left: " in line for line in lines)
    check_outputs("q2", whole)
    encoder, decoder, discriminator = (load(whole, name) for name in MODELS["q2"])
    codes = encoder.predict(np.zeros((2, 784), np.float32), verbose=0)
    assert codes.shape == (2, 100)
    images = decoder.predict(codes, verbose=0)
    assert images.dtype == np.float32
    assert images.shape == (2, 784)
    assert 0 <= images.min() <= images.max() <= 1
    assert discriminator.predict(codes, verbose=0).shape == (2, 1)

    save = utils.RunFolder.save_checkpoint
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:

        def save_and_end(self, *given):
            save(self, *given)
            signal.raise_signal(signal.SIGTERM)

        patched.setattr(utils.RunFolder, "save_checkpoint", save_and_end)
        run_q2(*options(broken, data))
    assert ended.value.code == 130
    assert capsys.readouterr().err.endswith(" --resume\n")
    assert (broken / "figures" / "q2_losses.png").exists()
    assert len(read_losses("q2", "history", broken)) == 1
    run_q2(*options(broken, data, "--resume"))
    check_same("q2", whole, broken)
    digests = [(each / "run" / "networks.json").read_text() for each in (whole, broken)]
    assert digests[0] == digests[1]


def test_control_on_a_plain_file_without_labels_refreshes_the_report(
    tmp_path, monkeypatch, run_q2
):
    monkeypatch.chdir(tmp_path)
    np.save("plain.npy", np.random.default_rng(0).random((210, 784), np.float32))
    report = tmp_path / "report.md"
    report.write_text("before <!-- begin q2.control --><!-- end q2.control -->")
    words = "--data plain.npy --control --code-dim 1 --epochs 1 --batch-size 42"
    run_q2(*words.split())
    found = json.loads(Path("figures/q2_control_metrics.json").read_text())
    assert found["code_dim"] == 1
    assert found["knn_accuracy"] is found["frechet_distance"] is None
    assert report.read_text().startswith("before ")
    assert f"| test MSE | {found['test_mse']:.5f} |" in report.read_text()
    for model in MODELS["q2"]:
        assert Path("runs", "q2_control", f"{model}.keras").exists()


class _Touch:
    def __reduce__(self):
        return os.system, ("touch it_ran",)


def test_hostile_data_is_one_line_and_nothing_is_run(tmp_path):
    save_pairs(tmp_path / "hostile.npy", [_Touch()] * 3)
    words = [PYTHON, HOME / SCRIPTS["q2"], *options(tmp_path, "hostile.npy")]
    error = run(words, tmp_path, code=2)[1]
    assert error.splitlines()[-1].startswith("q2_aae.py: hostile.npy: found ")
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.npy"]
