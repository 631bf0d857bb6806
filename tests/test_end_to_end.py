"""Both scripts through the real command line, on a tiny data set."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import save_pairs

import q1_cnn_autoencoder  # noqa: F401  registers what its saved models hold
import q2_aae  # noqa: F401  likewise

HOME = Path(__file__).parents[1]
SCRIPTS = {"q1": "q1_cnn_autoencoder.py", "q2": "q2_aae.py"}
FIGURES = {
    "q1": ["loss", "reconstructions", "extremes", "errors"],
    "q2": [
        "losses",
        "tsne",
        "reconstructions",
        "prior_match",
        "samples",
        "latent_walk",
        "principal_axes",
        "nearest",
    ],
}
KEYS = {
    "q1": {"test_mse", "test_psnr_db", "pca_test_mse", "code_dim", "parameters"},
    "q2": {
        "test_mse",
        "test_reconstruction_loss",
        "loss_discriminator",
        "loss_encoder",
        "prior_match",
        "frechet_distance",
        "frechet_distance_floor",
        "parzen_log_likelihood",
        "parzen_standard_error",
        "parzen_sigma",
        "fresh_discriminator_accuracy",
        "knn_accuracy",
        "nearest_training_image",
        "signal_dimensions",
        "tsne_trustworthiness",
    },
}
DATA = {"q1": "MNIST_M.npy", "q2": "data.npy"}


def command(question, folder, data, *arguments):
    return [
        *(sys.executable, str(HOME / SCRIPTS[question])),
        *("--data", str(data), "--figures", str(folder / "figures")),
        *("--run-dir", str(folder / "run"), "--batch-size", "42", *arguments),
    ]


def run(question, folder, data, *arguments):
    return subprocess.run(
        command(question, folder, data, *arguments),
        capture_output=True,
        text=True,
        cwd=folder,
    )


def history(question, folder):
    path = folder / "figures" / f"{question}_history.csv"
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_another_setting_or_a_damaged_run_under_resume_is_refused(tiny_data, tmp_path):
    data = tiny_data / "MNIST_M.npy"
    assert run("q1", tmp_path, data, "--epochs", "1").returncode == 0
    done = run("q1", tmp_path, data, "--resume", "--code-dim", "7")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--code-dim 7, expected 128" in done.stderr

    for name, content in (
        ("run/checkpoint.weights.h5", b"not a checkpoint"),
        ("figures/q1_history.csv", b"epoch,seconds\n1,soon\n"),
        ("run/settings.json", b"{"),
    ):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        done = run("q1", tmp_path, data, "--epochs", "1", "--resume")
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1, done.stderr
        assert name in done.stderr
        (tmp_path / name).write_bytes(whole)


def check_outputs(question, folder):
    for figure in FIGURES[question[:2]]:
        image = plt.imread(folder / "figures" / f"{question}_{figure}.png")
        assert image.shape[0] > 200
        assert image.std() > 0.02
    path = folder / "figures" / f"{question}_metrics.json"
    metrics = json.loads(path.read_text())
    common = {"data", "seed", "versions", "wall_seconds", "peak_memory_mib"}
    assert KEYS[question[:2]] | common <= metrics.keys()
    stages = metrics["stage_seconds"]
    assert {"data", "first step", "training", "metrics", "figures"} <= stages.keys()
    assert 0 <= stages["first step"] < stages["training"] < metrics["wall_seconds"]
    assert 100 < metrics["peak_memory_mib"] < 2560
    rows = history(question, folder)
    assert [int(float(row["epoch"])) for row in rows] == [1, 2, 3]
    return metrics


def same_but_for_time(a, b):
    for first, second in zip(a, b, strict=True):
        for key in first.keys() - {"seconds"}:
            assert float(first[key]) == pytest.approx(float(second[key]), rel=1e-4)


def same_figures(question, a, b):
    """Compare figures byte for byte: seed, machine and versions fix them."""
    for figure in FIGURES[question[:2]]:
        name = f"figures/{question}_{figure}.png"
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def same_metrics(a, b):
    changing = {"stage_seconds", "wall_seconds", "training_seconds", "peak_memory_mib"}
    for key in a.keys() - changing:
        assert a[key] == b[key], key


def stop_after_an_epoch(question, folder, data, *arguments):
    process = subprocess.Popen(
        command(question, folder, data, *arguments),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=folder,
    )
    deadline = time.monotonic() + 120
    while not (folder / "run" / "checkpoint.weights.h5").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in error.strip().splitlines()[-1]
    loss = "loss" if question == "q1" else "losses"
    assert list((folder / "figures").glob(f"*_{loss}.png"))


def kill_at_random(question, folder, data, *arguments):
    """Go on, for as long as chance will have it, and then be gone without a word."""
    process = subprocess.Popen(
        command(question, folder, data, *arguments, "--resume"),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        cwd=folder,
    )
    try:
        process.wait(timeout=random.uniform(3, 10))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def test_q1_survives_an_interruption_and_ends_as_if_there_was_none(tiny_data, tmp_path):
    data = tiny_data / "MNIST_M.npy"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    done = run("q1", whole, data, "--epochs", "3")
    assert done.returncode == 0, done.stderr
    metrics = check_outputs("q1", whole)

    stop_after_an_epoch("q1", broken, data, "--epochs", "3")
    assert (broken / "run" / "autoencoder.keras").exists()

    kill_at_random("q1", broken, data, "--epochs", "3")
    resumed = run("q1", broken, data, "--epochs", "3", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    same_metrics(metrics, check_outputs("q1", broken))
    same_but_for_time(history("q1", whole), history("q1", broken))
    same_figures("q1", whole, broken)

    model = keras.saving.load_model(whole / "run" / "autoencoder.keras")
    restored = model.predict(np.zeros((2, 28, 28, 3), np.float32), verbose=0)
    assert restored.shape == (2, 28, 28, 3)
    assert metrics["parameters"] == model.count_params()
    assert metrics["data"]["source"] == "a file as given"


@pytest.fixture
def plain_data(tmp_path):
    """Images alone, as a plain array without labels."""
    images = np.random.default_rng(0).random((210, 28, 28), np.float32)
    np.save(tmp_path / "plain.npy", images)
    return tmp_path / "plain.npy"


def q2_survives(name, data, folder, *kind):
    """Check that an interrupted run ends as one that was not; return its metrics."""
    whole, broken = folder / "whole", folder / "broken"
    for one in (whole, broken):
        one.mkdir()
    kind = ("--epochs", "3", *kind)
    done = run("q2", whole, data, *kind)
    assert done.returncode == 0, done.stderr
    metrics = check_outputs(name, whole)

    stop_after_an_epoch("q2", broken, data, *kind)
    if name == "q2":  # once is enough for the suite's ten minutes
        kill_at_random("q2", broken, data, *kind)
    done = run("q2", broken, data, *kind, "--resume")
    assert done.returncode == 0, done.stderr
    same_metrics(metrics, check_outputs(name, broken))
    same_but_for_time(history(name, whole), history(name, broken))
    same_figures(name, whole, broken)

    codes = np.zeros((2, 100), np.float32)
    decoder = keras.saving.load_model(whole / "run" / "decoder.keras")
    other = keras.saving.load_model(broken / "run" / "decoder.keras")
    images = decoder.predict(codes, verbose=0)
    assert images.shape == (2, 784)
    np.testing.assert_allclose(images, other.predict(codes, verbose=0), atol=1e-4)
    return metrics


def test_q2_resumes_with_all_optimizers_and_random_states(tiny_data, tmp_path):
    metrics = q2_survives("q2", tiny_data / "data.npy", tmp_path)
    assert metrics["frechet_distance"] > 0
    assert not metrics["literal"]


def test_q2_to_the_letter_resumes_and_takes_images_without_labels(plain_data, tmp_path):
    kind = ("--literal", "--encoder", "gaussian")
    metrics = q2_survives("q2_literal", plain_data, tmp_path, *kind)
    assert metrics["frechet_distance"] is None
    assert metrics["literal"]


class _Touch:
    def __reduce__(self):
        return os.system, ("touch it_ran",)


@pytest.mark.parametrize("question", ["q1", "q2"])
def test_wrong_data_is_one_line_and_code_2(question, tiny_data, tmp_path):
    hostile = np.empty(3, object)
    hostile[:] = [_Touch()] * 3
    whole = (tiny_data / DATA[question]).read_bytes()
    (tmp_path / "truncated.npy").write_bytes(whole[: len(whole) // 2])
    save_pairs(tmp_path / "hostile.npy", list(hostile))
    for name in ("missing.npy", "truncated.npy", "hostile.npy"):
        done = run(question, tmp_path, tmp_path / name)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1, done.stderr
        assert f"{name}: found " in done.stderr
        assert ", expected " in done.stderr
    assert not (tmp_path / "it_ran").exists()
    assert not (tmp_path / "run").exists()


def test_resume_without_a_run_is_one_line_and_code_2(tiny_data, tmp_path):
    done = run("q1", tmp_path, tiny_data / "MNIST_M.npy", "--resume")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--resume" in done.stderr


def test_loss_that_is_no_number_is_one_line_and_code_2(tiny_data, tmp_path):
    data = tiny_data / "data.npy"
    done = run("q2", tmp_path, data, "--learning-rate", "1e30", "--epochs", "2")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "expected a finite number" in done.stderr
    assert not (tmp_path / "run" / "encoder.keras").exists()
