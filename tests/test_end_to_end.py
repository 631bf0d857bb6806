"""Both scripts through the real command line, on a tiny data set."""

import csv
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import matplotlib.image
import numpy as np
import pytest
from conftest import save_pairs

import q1_cnn_autoencoder as q1
import q2_aae as q2

HOME = Path(__file__).parents[1]
MAINS = {"q1": q1.main, "q2": q2.main}
SCRIPTS = {"q1": "q1_cnn_autoencoder.py", "q2": "q2_aae.py"}
DATA = {"q1": "MNIST_M.npy", "q2": "data.npy"}
MODELS = {"q1": ["autoencoder"], "q2": ["encoder", "decoder", "discriminator"]}
FIGURES = {
    "q1": {"loss", "reconstructions", "extremes", "errors"},
    "q2": {
        *("tsne", "losses", "samples", "latent_walk", "reconstructions"),
        *("prior_match", "coordinates", "nearest"),
    },
}
KEYS = {
    "q1": {"test_mse", "test_psnr_db", "pca_test_mse", "code_dim", "parameters"},
    "q2": {
        *("test_mse", "test_reconstruction_loss", "loss_discriminator"),
        *("loss_encoder", "prior_match", "frechet_distance", "knn_accuracy"),
        *("frechet_distance_floor", "fresh_discriminator_accuracy"),
    },
}
PLACES = "--figures", "figures", "--run-dir", "run"
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


def command(question, folder, data, *arguments):
    """Return the words of a call in a folder, each name as short as it can be."""
    script = os.path.relpath(HOME / SCRIPTS[question], folder)
    data = os.path.relpath(data, folder)
    options = "--data", data, *PLACES, "--batch-size", "42", *arguments
    return [PYTHON, script, *options]


def run(words, folder, **environment):
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        cwd=folder,
        env=ENVIRONMENT | environment,
    )


def start(words, folder):
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=ENVIRONMENT,
    )


def read_until(process, words):
    for line in process.stdout:
        if words in line:
            return
    pytest.fail(f"it ended before {words!r}: {process.stderr.read()}")


def last_line(error):
    assert "Traceback" not in error
    return error.splitlines()[-1]


def history(question, folder):
    path = folder / "figures" / f"{question}_history.csv"
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def metrics(question, folder):
    return json.loads((folder / "figures" / f"{question}_metrics.json").read_text())


def check_outputs(question, folder, epochs):
    for path in (folder / "figures").glob("*.png"):
        image = matplotlib.image.imread(path)
        assert min(image.shape[:2]) > 150
        assert image[..., :3].std() > 0.02
    figures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert figures == {f"{question}_{figure}" for figure in FIGURES[question]}
    found = metrics(question, folder)
    common = {"data", "seed", "versions", "settings", "training_seconds"}
    assert KEYS[question] | common <= found.keys()
    assert found["settings"]["epochs"] == epochs
    assert found["settings"]["batch_size"] == 42
    rows = history(question, folder)
    assert [float(row["epoch"]) for row in rows] == [*range(1, epochs + 1)]
    assert all(np.isfinite(float(value)) for row in rows for value in row.values())


def check_same(question, whole, broken):
    """Compare two runs' numbers, and their figures byte for byte."""
    first, second = (metrics(question, folder) for folder in (whole, broken))
    for key in (first.keys() | second.keys()) - {"stage_seconds", "training_seconds"}:
        assert first[key] == second[key], key
    rows = zip(history(question, whole), history(question, broken), strict=True)
    for one, other in rows:
        assert one.keys() == other.keys()
        for key in one.keys() - {"seconds"}:
            assert float(one[key]) == float(other[key]), key
    for path in (whole / "figures").glob("*.png"):
        assert path.read_bytes() == (broken / "figures" / path.name).read_bytes(), path


def interrupt(question, folder, words, by):
    """Interrupt a run after its first epoch; return the hint that it ends with."""
    process = start(words, folder)
    if by == "a closed pipe":  # as of `| head -1`
        process.stdout.readline()
        process.stdout.close()
    else:
        read_until(process, "epoch 1 of")
        process.send_signal(by)
    process.wait(timeout=300)
    error = process.stderr.read()
    assert process.returncode == 130, error
    again = shlex.join([*words, "--resume"])
    assert last_line(error) == f"{SCRIPTS[question]}: interrupted; go on with: {again}"
    for model in MODELS[question]:
        assert (folder / "run" / f"{model}.keras").exists()
    assert list((folder / "figures").glob("*_loss*.png"))
    return again


def kill(folder, again):
    """Go on, for as long as chance will have it, and then be gone without a word."""
    process = start(shlex.split(again), folder)
    read_until(process, "Training:")
    time.sleep(random.Random(0).uniform(0, 2))
    process.kill()
    process.communicate()


def check_whole(question, folder, data, **environment):
    """Check a run that nothing interrupts."""
    folder.mkdir()
    words = command(question, folder, data, "--epochs", "3")
    done = run(words, folder, **environment)
    assert done.returncode == 0, done.stderr
    check_outputs(question, folder, 3)


def load(folder, name):
    return keras.saving.load_model(folder / "run" / f"{name}.keras")


def test_q1_interrupted_killed_or_in_an_odd_environment_ends_the_same(
    tiny_data, tmp_path, monkeypatch, refused
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    data = tmp_path / "given.npy"
    data.write_bytes((tiny_data / DATA["q1"]).read_bytes())
    (tmp_path / "keras.json").write_text(json.dumps(ODD_KERAS))
    check_whole("q1", whole, data, **ODD, KERAS_HOME=str(tmp_path))
    model = load(whole, "autoencoder")
    restored = model.predict(np.zeros((2, 28, 28, 3), np.float32), verbose=0)
    assert restored.dtype == np.float32
    assert restored.shape == (2, 28, 28, 3)
    assert 0 <= restored.min() <= restored.max() <= 1
    assert metrics("q1", whole)["parameters"] == model.count_params()
    assert metrics("q1", whole)["data"]["source"] == "a file as given"

    broken.mkdir()
    words = command("q1", broken, data, "--epochs", "3")
    again = interrupt("q1", broken, words, by="a closed pipe")
    kill(broken, again)
    done = run(["sh", "-c", f"exec {again} <&- >&- 2>&-"], broken)
    assert done.returncode == 0
    check_same("q1", whole, broken)

    monkeypatch.chdir(broken)
    words = shlex.split(again)[2:]
    for changed, told in (
        (("--code-dim", "7"), "--code-dim 7, expected 128"),
        (("--epochs", "2"), "--epochs 2, expected 3"),
        (("--seed", "5"), "--seed 5, expected 0"),
        (("--run-dir", "new"), "--resume: found no new/settings.json"),
    ):
        assert told in refused(q1.main, *words, *changed)
    settings = broken / "run" / "settings.json"
    before = settings.read_bytes()
    settings.write_bytes(b"{")
    assert "run/settings.json: found" in refused(q1.main, *words)
    settings.write_bytes(before)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1  # a pixel
    data.write_bytes(content)
    assert "--data" in refused(q1.main, *words)


def test_q2_interrupted_ends_the_same(tiny_data, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    data = tiny_data / DATA["q2"]
    check_whole("q2", whole, data)
    encoder, decoder, discriminator = (load(whole, name) for name in MODELS["q2"])
    codes = encoder.predict(np.zeros((2, 784), np.float32), verbose=0)
    assert codes.shape == (2, 100)
    images = decoder.predict(codes, verbose=0)
    assert images.dtype == np.float32
    assert images.shape == (2, 784)
    assert 0 <= images.min() <= images.max() <= 1
    assert discriminator.predict(codes, verbose=0).shape == (2, 1)

    broken.mkdir()
    words = command("q2", broken, data, "--epochs", "3")
    again = interrupt("q2", broken, words, by=signal.SIGTERM)
    done = run(shlex.split(again), broken)
    assert done.returncode == 0, done.stderr
    check_same("q2", whole, broken)
    resumed = load(broken, "decoder").predict(codes, verbose=0)
    np.testing.assert_allclose(images, resumed, atol=1e-4)


def test_data_is_found_in_another_spelling_of_its_name(
    tiny_data, tmp_path, monkeypatch, refused
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Mnist_M.npy").write_bytes((tiny_data / DATA["q1"]).read_bytes())
    words = command("q1", tmp_path, tmp_path / "MNIST_M.npy")[2:]
    # It gets as far as the run's folder, where there is no run to go on with.
    assert "found no run/settings.json" in refused(q1.main, *words, "--resume")


class _Touch:
    def __reduce__(self):
        return os.system, ("touch it_ran",)


@pytest.mark.parametrize("question", ["q1", "q2"])
def test_wrong_data_is_one_line_and_nothing_is_run(
    question, tiny_data, tmp_path, monkeypatch, refused
):
    monkeypatch.chdir(tmp_path)
    whole = (tiny_data / DATA[question]).read_bytes()
    (tmp_path / "truncated.npy").write_bytes(whole[: len(whole) // 2])
    hostile = np.empty(3, object)
    hostile[:] = [_Touch()] * 3
    save_pairs(tmp_path / "hostile.npy", list(hostile))
    black = np.zeros((210, 28, 28, 3) if question == "q1" else (210, 784), np.uint8)
    if question == "q1":
        pairs = [(black, np.arange(210) % 10)] * 3
        save_pairs(tmp_path / "black.npy", pairs)
    else:
        np.save(tmp_path / "black.npy", black)
    before = sorted(tmp_path.iterdir())
    for name in ("missing.npy", "truncated.npy", "hostile.npy"):
        words = command(question, tmp_path, tmp_path / name)
        error = refused(MAINS[question], *words[2:])
        assert f"{name}: found " in error
        assert ", expected " in error
    if question == "q2":  # once in earnest: a start takes long
        done = run(words, tmp_path)
        assert done.returncode == 2
        assert last_line(done.stderr).startswith("q2_aae.py: hostile.npy: found ")
    words = command(question, tmp_path, tmp_path / "black.npy")
    assert "all the same" in refused(MAINS[question], *words[2:])
    assert sorted(tmp_path.iterdir()) == before
