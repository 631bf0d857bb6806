"""Question 2's comparisons: the variational autoencoder, and a run of some rows."""

import json
import subprocess
import sys
from pathlib import Path

import utils

import keras
import matplotlib.pyplot as plt
import numpy as np
import pytest
import tensorflow as tf
from conftest import tiny_digits

import q2_aae as q2
import q2_comparisons as comparisons

HOME = Path(__file__).parents[1]


def build_vae(beta):
    keras.utils.set_random_seed(0)
    model = comparisons.VariationalAutoencoder(
        q2.build_encoder(8), q2.build_decoder(8), beta
    )
    model.compile(1e-3, epochs=2, steps=20)
    return model


def test_variational_autoencoder_minimises_the_evidence_bounds_formula():
    digits, _ = tiny_digits()
    images = digits[:64].reshape(64, 784)
    x = images / np.float32(255)
    model = build_vae(beta=0.5)
    layer = model.encoder.get_layer("log_variance")
    kernel, bias = layer.get_weights()
    layer.set_weights([kernel, bias - 1])
    loss, restored = model.minus_bound(tf.constant(x))
    y = restored.numpy().astype(np.float64)
    surprise = -(x * np.log(y) + (1 - x) * np.log(1 - y)).sum(axis=1)
    mean, deviation = (
        part.astype(np.float64) for part in q2.posterior(model.encoder, images)
    )
    divergence = (mean**2 + deviation**2 - 1).sum(axis=1) / 2
    divergence -= np.log(deviation).sum(axis=1)
    assert loss.numpy() == pytest.approx((surprise + 0.5 * divergence).mean(), rel=1e-4)


def test_variational_autoencoder_learns():
    digits, _ = tiny_digits()
    images = tf.constant(digits[:64].reshape(64, 784))
    model = build_vae(beta=1.0)
    before = model.minus_bound(utils.unit_floats(images))[0].numpy()
    for _ in range(20):
        model.train_step(images)
    assert model.minus_bound(utils.unit_floats(images))[0].numpy() < 0.7 * before


def run(folder, data, *arguments):
    return subprocess.run(
        [
            *(sys.executable, str(HOME / "q2_comparisons.py")),
            *("--data", str(data), "--figures", str(folder / "figures")),
            *("--run-dir", str(folder / "runs" / "q2"), *arguments),
        ],
        capture_output=True,
        text=True,
        cwd=folder,
    )


def test_rows_are_trained_once_and_drawn_beside_the_control(tiny_data, tmp_path):
    rows = ("literal", "default", "vae", "shallow")
    settings = ("--epochs", "1", "--batch-size", "60")
    data = tiny_data / "data.npy"
    done = run(tmp_path, data, "--rows", ",".join(rows), *settings)
    assert done.returncode == 0, done.stderr
    for name in ("control_samples", "control_prior_match", "frontier"):
        image = plt.imread(tmp_path / "figures" / f"q2_{name}.png")
        assert image.std() > 0.02
    path = tmp_path / "figures" / "q2_comparisons_metrics.json"
    first = json.loads(path.read_text())["rows"]
    assert first.keys() == set(rows)
    assert first["vae"]["loss_discriminator"] is None
    assert first["default"]["loss_discriminator"] > 0
    assert len({row["test_mse"] for row in first.values()}) == len(rows)

    done = run(tmp_path, data, "--rows", "shallow", *settings)
    assert done.returncode == 0, done.stderr
    assert "Going on after epoch 1" in done.stdout
    second = json.loads(path.read_text())["rows"]
    assert second["vae"] == first["vae"]
    assert second["shallow"]["training_seconds"] == first["shallow"]["training_seconds"]


def test_unknown_row_is_one_line_and_code_2(tiny_data, tmp_path):
    done = run(tmp_path, tiny_data / "data.npy", "--rows", "vae,lateral")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--rows: found lateral, expected literal, " in done.stderr
