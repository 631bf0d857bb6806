"""The comparisons' variants, and runs of some rows."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import utils

import keras
import matplotlib.image
import numpy as np
import pytest
import tensorflow as tf
from conftest import save_pairs, tiny_digits

import metrics
import q2_aae as q2
from extras import comparisons
from read_MNIST_M import load_mnist_m

HOME = Path(__file__).parents[1]
RNG = np.random.default_rng(0)
BATCH = tf.constant(utils.unit_floats(tiny_digits()[0][:64].reshape(-1, 784)))


def build(kind, **changes):
    keras.utils.set_random_seed(0)
    model = kind(8, q2.DEFAULT._replace(hidden=(48, 48), **changes))
    model.images = BATCH
    model.compile(5e-3, epochs=10, steps=100)
    return model


def test_variational_autoencoder_minimises_the_evidence_bounds_formula():
    model = build(comparisons.VariationalAutoencoder)
    arrays = model.encoder.get_weights()
    model.encoder.set_weights([a + RNG.normal(0, 0.05, a.shape) for a in arrays])
    loss, restored = model.minus_bound(BATCH)
    x, y = BATCH.numpy(), restored.numpy().astype(np.float64)
    surprise = -(x * np.log(y) + (1 - x) * np.log(1 - y)).sum(axis=1)
    mean, deviation = (
        part.astype(np.float64) for part in metrics.posterior(model.encoder, x)
    )
    divergence = (mean**2 + deviation**2 - 1).sum(axis=1) / 2
    divergence -= np.log(deviation).sum(axis=1)
    assert divergence.std() > 0
    assert loss.numpy() == pytest.approx((surprise + divergence).mean(), rel=1e-4)


def test_variational_autoencoder_learns_and_leaves_the_discriminator_alone():
    model = build(comparisons.VariationalAutoencoder)
    before, judge = model.minus_bound(BATCH)[0], model.discriminator.get_weights()
    step = tf.function(model.train_step)
    for _ in range(60):
        step((BATCH, BATCH))
    assert model.minus_bound(BATCH)[0] < 0.7 * before
    for a, b in zip(judge, model.discriminator.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_tuned_variant_descends_the_norm_and_minus_log_d_at_once():
    rest = {"gaussian": False, "discriminator_rate": 0.0}
    model, other = (build(comparisons.TunedAutoencoder, **rest) for _ in range(2))
    model.optimizer = keras.optimizers.SGD(1.0)
    model.train_step((BATCH, BATCH))

    variables = other.encoder.trainable_variables + other.decoder.trainable_variables
    with tf.GradientTape() as tape:
        codes = other.encoder(BATCH)
        norm = tf.reduce_mean(tf.norm(BATCH - other.decoder(codes), axis=1))
        d = tf.sigmoid(other.discriminator(codes))
        loss = norm + 10 / 3 * tf.reduce_mean(-tf.math.log(d))
    gradients = tape.gradient(loss, variables)
    moved = model.encoder.trainable_variables + model.decoder.trainable_variables
    for after, before, gradient in zip(moved, variables, gradients, strict=True):
        np.testing.assert_allclose(before - after, gradient, rtol=1e-3, atol=1e-5)


def test_tuned_discriminator_takes_more_steps_as_training_goes_on(monkeypatch):
    monkeypatch.setattr(q2, "DISCRIMINATOR_HIDDEN", (40,))  # compiles sooner
    model = build(comparisons.TunedAutoencoder)
    step, taken = tf.function(model.train_step, jit_compile=True), []
    for done in (0, 249, 250, 500, 750, 999, 2000):
        model.optimizer.iterations.assign(done)
        before = int(model.discriminator_optimizer.iterations)
        losses = step((BATCH, BATCH))
        taken.append(int(model.discriminator_optimizer.iterations) - before)
        assert np.isfinite([float(loss) for loss in losses.values()]).all()
    assert taken == [1, 1, 2, 3, 4, 4, 4]


# Runs


def arguments(question, folder, data, rows, *others):
    return (  # a batch of more images than there are becomes one of all
        *(question, "--rows", rows, "--epochs", "1", "--batch-size", "500"),
        *("--data", str(data), "--figures", str(folder / "figures")),
        *("--run-dir", str(folder / "runs" / question), *others),
    )


def measured(question, folder):
    path = folder / "figures" / f"{question}_comparisons_metrics.json"
    return json.loads(path.read_text())["rows"]


def test_a_row_of_question_2_is_trained_and_measured(tiny_data, tmp_path, monkeypatch):
    for module, name, less in (
        *((q2, "SAMPLES", 300), (q2, "DISCRIMINATOR_HIDDEN", (40,))),
        *((metrics, "NULL_DRAWS", 1), (metrics, "FRESH_EPOCHS", 1)),
    ):
        monkeypatch.setattr(module, name, less)
    given = arguments("q2", tmp_path, tiny_data / "data.npy", "shallow")
    monkeypatch.setattr(sys, "argv", ["comparisons.py", *given])
    utils.run_script(comparisons.main)
    rows = measured("q2", tmp_path)
    (row,) = rows.values()
    assert row["epochs"] == 1
    assert not row["long"]
    assert row["loss_discriminator"] > 0
    assert 0 < row["test_mse"] < 0.5
    assert row["frechet_distance"] > 0
    figure = matplotlib.image.imread(tmp_path / "figures" / "q2_frontier.png")
    assert figure.std() > 0.02


def test_finished_rows_are_kept_but_not_beside_other_settings_or_data(
    tiny_data, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "MNIST_M.npy"
    shutil.copy(tiny_data / path.name, path)
    rows = "code-16,relu"
    given = arguments("q1", tmp_path, path, rows, "--workers", "2")
    command = [sys.executable, "-m", "extras.comparisons", *given]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HOME)
    assert done.returncode == 0, done.stderr
    before = measured("q1", tmp_path)
    assert before.keys() == {"code-16", "relu"}
    assert before["code-16"]["code_dim"] == 16
    assert before["code-16"]["test_mse"] != before["relu"]["test_mse"]

    def again(rows, *others):
        given = arguments("q1", tmp_path, path, rows, *others)
        monkeypatch.setattr(sys, "argv", ["comparisons.py", *given])
        utils.run_script(comparisons.main)
        return measured("q1", tmp_path), capsys.readouterr().out.count("Training:")

    # A row that is not there is trained, and comes to the same as beside another.
    (folder,) = (tmp_path / "runs" / "comparisons" / "q1").glob("relu-*")
    shutil.rmtree(folder)
    after, trained = again(rows)
    assert trained == 1
    assert after["code-16"] == before["code-16"]
    assert after["relu"]["test_mse"] == pytest.approx(before["relu"]["test_mse"], 1e-3)

    other_seed, trained = again("code-16", "--seed", "7")
    assert other_seed.keys() == {"code-16"}
    assert other_seed["code-16"]["seed"] == 7
    assert trained == 1

    splits = load_mnist_m(path)
    pairs = [(np.array(s.images), np.eye(10)[s.labels]) for s in splits]
    pairs[0][0][0] ^= 1
    save_pairs(path, pairs)
    other_data, trained = again("relu")
    assert other_data.keys() == {"relu"}
    assert trained == 1


def test_unknown_row_is_one_line_and_code_2(tiny_data, tmp_path, refused):
    given = arguments("q2", tmp_path, tiny_data / "data.npy", "vae,lateral")
    error = refused(comparisons.main, *given)
    assert "--rows: found lateral, expected seed-1, seed-2, " in error
    assert list(tmp_path.iterdir()) == []
