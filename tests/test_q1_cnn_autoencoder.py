"""Question 1's autoencoder: its contract, and that it learns."""

import utils

import keras
import numpy as np
import pytest

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


def test_training_beats_the_mean_image(tiny_data, tmp_path):
    train, valid, test = load_mnist_m(tiny_data / "MNIST_M.npy")
    options = q1.parse_options(
        ["--data", str(tiny_data / "MNIST_M.npy"), "--epochs", "12"]
        + ["--batch-size", "30", "--figures", str(tmp_path), "--code-dim", "16"]
        + ["--run-dir", str(tmp_path), "--learning-rate", "0.003"]
    )
    keras.utils.set_random_seed(0)
    autoencoder = q1.build_autoencoder(16)
    folder = utils.RunFolder(options)
    history = q1.train(autoencoder, train.images, valid.images, options, folder)
    metrics = q1.evaluate(autoencoder, train.images, test.images)
    restored = q1.reconstruct(autoencoder, test.images)
    errors = restored.astype(np.float64) - test.images / 255
    assert metrics["test_mse"] == pytest.approx(np.mean(errors**2), rel=1e-4)
    mean_image = train.images.mean(axis=0) / 255
    assert metrics["test_mse"] < 0.8 * np.mean((test.images / 255 - mean_image) ** 2)
    assert metrics["pca_test_mse"] < metrics["test_mse"]  # it saw too few images
    assert list(history["epoch"]) == list(range(1, 13))
    assert history["loss"][-1] < history["loss"][0]
