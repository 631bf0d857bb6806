"""One style, ten digits: the stages with the digit, and a run."""

import json
import sys

import utils

import keras
import matplotlib.image
import numpy as np
import pytest
import tensorflow as tf
from conftest import descend, tiny_digits

import q2_aae as q2
from extras import styles
from read_MNIST_M import Split

SMALL = q2.DEFAULT._replace(hidden=(48, 48), discriminator_hidden=(40,))
IMAGES, LABELS = tiny_digits()
SPLIT = Split(utils.unit_floats(IMAGES[:64].reshape(-1, 784)), LABELS[:64])


def build():
    keras.utils.set_random_seed(0)
    model = styles.StyleAutoencoder(8, SMALL._replace(informative=None))
    model.compile(1e-3, utils.Schedule(10, 100, 64))
    model.optimizer = keras.optimizers.SGD(0.01)
    model.discriminator_optimizer = keras.optimizers.SGD(0.3)
    model.encoder_optimizer = keras.optimizers.SGD(1.0)
    return model


def test_step_takes_the_three_stages_with_the_digit():
    batch = tf.constant(styles.with_digits(SPLIT))
    model, other = build(), build()
    found = model.train_step((batch, batch))

    x, y = batch[:, :784], batch[:, 784:]
    z = other.sample_prior(64)

    def stage_a():
        restored = other.decoder([other.encoder(x), y])
        return tf.reduce_sum(tf.norm(x - restored, axis=1))

    def probability(codes):
        return tf.sigmoid(other.discriminator([codes, y]))

    def stage_b():
        on_prior, on_codes = probability(z), probability(other.encoder(x))
        return -tf.reduce_mean(tf.math.log(on_prior) + tf.math.log(1 - on_codes))

    def stage_c():
        return tf.reduce_mean(tf.math.log(1 - probability(other.encoder(x))))

    expected = {
        "reconstruction_loss": descend(0.01, stage_a, other.encoder, other.decoder)
        / 64,
        "discriminator_loss": descend(0.3, stage_b, other.discriminator),
        "encoder_loss": descend(1.0, stage_c, other.encoder),
    }
    for name, value in expected.items():
        assert found[name].numpy() == pytest.approx(value, rel=1e-4)
    for name in ("encoder", "decoder", "discriminator"):
        weights = getattr(model, name).get_weights(), getattr(other, name).get_weights()
        for a, b in zip(*weights, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_a_run_leaves_figure_measures_and_networks(
    tiny_data, tmp_path, monkeypatch, few_measurements
):
    monkeypatch.setattr(styles, "RECIPE", SMALL)
    arguments = ["--data", tiny_data / "data.npy", "--epochs", 2, "--figures", tmp_path]
    arguments += ["--run-dir", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", ["styles.py", *map(str, arguments)])
    utils.run_script(styles.main)
    measures = json.loads((tmp_path / "styles_metrics.json").read_text())
    assert 0 < measures["test_mse"] < 0.5
    for name in ("obedience", "fresh_discriminator"):
        assert 0 <= measures[name] <= 1
    assert matplotlib.image.imread(tmp_path / "styles.png").std() > 0.02
    decoder = keras.saving.load_model(tmp_path / "run" / "decoder.keras")
    codes = np.random.default_rng(0).standard_normal((10, 100)).astype(np.float32)
    images = decoder.predict([codes, np.eye(10, dtype=np.float32)], verbose=0)
    assert images.shape == (10, 784)
    assert 0 <= images.min() <= images.max() <= 1


def test_data_without_labels_is_refused(tmp_path, refused):
    np.save(tmp_path / "data.npy", IMAGES[:500].reshape(-1, 784))
    error = refused(styles.main, "--data", tmp_path / "data.npy")
    assert "found no labels, expected labels (--labels)" in error
    assert [path.name for path in tmp_path.iterdir()] == ["data.npy"]
