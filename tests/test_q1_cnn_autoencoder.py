"""Question 1's autoencoder: its contract, and that it learns."""

import utils

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import tiny_digits

import make_data
import q1_cnn_autoencoder as q1
from read_MNIST_M import load_mnist_m


@pytest.mark.parametrize("code_dim", [3, 128])
def test_images_pass_through_a_code_of_the_asked_size(code_dim):
    autoencoder = q1.build_autoencoder(code_dim)
    images = np.random.default_rng(0).random((2, 28, 28, 3), np.float32)
    code = autoencoder.get_layer("encoder")(images)
    restored = autoencoder(images).numpy()
    assert code.shape == (2, code_dim)
    assert restored.shape == images.shape
    assert 0 <= restored.min() <= restored.max() <= 1
    kinds = {type(layer) for layer in autoencoder.get_layer("encoder").layers}
    assert keras.layers.Conv2D in kinds
    kinds = {type(layer) for layer in autoencoder.get_layer("decoder").layers}
    assert keras.layers.Conv2DTranspose in kinds


def test_leaky_rectifier_is_keras_own_and_so_is_its_gradient():
    x = tf.random.stateless_normal((50, 7), (0, 0))
    found = []
    for rectify in (q1.leaky_rectifier, keras.layers.LeakyReLU(q1.SLOPE)):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = rectify(x)
            total = tf.reduce_sum(tf.sin(y))
        found.append((y, tape.gradient(total, x)))
    np.testing.assert_allclose(*found, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7, 128])
def test_halves_side_by_side_are_the_whole(count):
    autoencoder = q1.build_autoencoder(16)
    halves = q1.SideBySide(autoencoder)
    images = tf.random.stateless_uniform((count, 28, 28, 3), (0, 0))
    found = []
    for model in (halves, autoencoder):
        with tf.GradientTape() as tape:
            restored = model(images, training=True)
            loss = keras.losses.MeanSquaredError()(images, restored)
        slopes = tape.gradient(loss, autoencoder.trainable_variables)
        found.append([restored, *slopes])
        np.testing.assert_allclose(
            tf.reduce_mean(q1.least_squares(images, restored)), loss, rtol=1e-5
        )
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_bfloat16_rounds_and_does_no_more():
    found = []
    images = tf.random.stateless_uniform((8, 28, 28, 3), (0, 0))
    for precision in q1.POLICIES:
        keras.utils.set_random_seed(0)
        autoencoder = q1.build_autoencoder(precision=precision)
        with tf.GradientTape() as tape:
            restored = autoencoder(images)
            loss = tf.reduce_mean(tf.square(restored - images))
        gradients = tape.gradient(loss, autoencoder.trainable_variables)
        code = autoencoder.get_layer("encoder")(images)
        kept = [restored, code, *gradients, *autoencoder.trainable_variables]
        assert {tensor.dtype for tensor in kept} <= {tf.float32, "float32"}
        found.append((restored, np.concatenate([np.ravel(g) for g in gradients])))
    (plain, plain_slopes), (rounded, slopes) = found
    assert 0 < np.abs(rounded - plain).max() < 0.005
    cosine = slopes @ plain_slopes / np.linalg.norm(slopes)
    assert cosine > 0.99 * np.linalg.norm(plain_slopes)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx512f avx512_bf16 amx_bf16 amx_tile", "bfloat16"),
        ("fpu avx512f avx512_bf16", "float32"),
        (None, "float32"),
    ],
)
def test_precision_is_what_the_processor_is_fast_in(tmp_path, flags, expected):
    path = tmp_path / "cpuinfo"
    if flags is not None:
        path.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert q1.default_precision(path) == expected


def test_training_beats_the_mean_image(tiny_data, tmp_path, monkeypatch):
    train, valid, test = load_mnist_m(tiny_data / "MNIST_M.npy")
    options = q1.parse_options(
        ["--data", str(tiny_data / "MNIST_M.npy"), "--epochs", "12"]
        + ["--batch-size", "30", "--figures", str(tmp_path), "--code-dim", "16"]
        + ["--run-dir", str(tmp_path), "--learning-rate", "0.003"]
    )
    keras.utils.set_random_seed(0)
    autoencoder = q1.build_autoencoder(16)
    folder = utils.RunFolder(options)
    trained, compiled = [], q1.compile_autoencoder
    monkeypatch.setattr(
        q1, "compile_autoencoder", lambda *a: trained.append(compiled(*a)) or trained[0]
    )
    history = q1.train(autoencoder, train.images, valid.images, options, folder)
    # Several steps at a time end where an epoch ends.
    assert trained[0].steps_per_execution > 1
    steps = 12 * utils.steps_per_epoch(train.images, 30)
    assert int(trained[0].optimizer.iterations.numpy()) == steps
    found = q1.squared_errors(autoencoder, test.images)
    masks = test.images[..., 0] > 128
    metrics = q1.evaluate(autoencoder, train, test, found, masks)
    restored = utils.predict(autoencoder, test.images)
    errors = restored.astype(np.float64) - test.images / 255
    assert metrics["test_mse"] == pytest.approx(np.mean(errors**2), rel=1e-4)
    mean_image = train.images.mean(axis=0) / 255
    assert metrics["test_mse"] < 0.8 * np.mean((test.images / 255 - mean_image) ** 2)
    assert metrics["pca_test_mse"] < metrics["test_mse"]  # it saw too few images
    inside = np.mean(errors[masks] ** 2)
    assert metrics["mse_inside_digit"] == pytest.approx(inside, rel=1e-4)
    weights = np.bincount(test.labels) / len(test.labels)
    by_digit = list(metrics["digit_test_mse"].values())
    assert weights @ by_digit == pytest.approx(metrics["test_mse"])
    assert all(0 < value <= 1 for value in metrics["knn_accuracy"].values())
    assert list(history["epoch"]) == list(range(1, 13))
    assert history["loss"][-1] < history["loss"][0]


def test_masks_are_those_that_inverted_the_photographs(tmp_path, monkeypatch):
    images, labels = tiny_digits()
    one_hot = np.eye(10, dtype=np.uint8)[labels]
    digits = (images[:1500], one_hot[:1500]), (images[1500:], one_hot[1500:])
    monkeypatch.setattr(make_data, "find_digits", lambda: (digits, "small digits"))
    white = [np.full((30, 30, 3), 255, np.uint8)]
    monkeypatch.setattr(make_data, "find_backgrounds", lambda _: (white, "white"))
    make_data.build(tmp_path)
    path = tmp_path / "MNIST_M.npy"
    test = load_mnist_m(path)[2]
    masks = q1.read_masks(path, len(test.images))
    np.testing.assert_array_equal(masks, test.images[..., 0] == 0)
    (tmp_path / "data_sources.json").unlink()
    assert q1.read_masks(path, len(test.images)) is None
