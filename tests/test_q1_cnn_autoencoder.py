"""Question 1's autoencoder: it is convolutional, and it learns."""

import utils

import keras
import numpy as np
import pytest

import metrics
import q1_cnn_autoencoder as q1
from files import describe_source
from read_MNIST_M import load_mnist_m


def test_training_beats_the_mean_image(tiny_data, tmp_path):
    path = str(tiny_data / "MNIST_M.npy")
    settings = q1.parse_settings(
        ["--data", path, "--epochs", "6", "--batch-size", "30", "--code-dim", "16"]
        + ["--figures", str(tmp_path / "figures"), "--run-dir", str(tmp_path / "run")]
    )
    train, valid, test = utils.prepare_splits(load_mnist_m(path), path, quick=False)
    schedule = utils.training_schedule(settings, len(train.images), q1.EPOCHS)
    run = utils.RunFolder(settings, describe_source(path), schedule)
    pca = metrics.fit_pca(train.images, 16)
    with run.in_use():
        autoencoder = q1.build_model(settings, schedule)
        history = q1.train_model(run, autoencoder, train.images, valid.images, pca)
    assert list(history["epoch"]) == list(range(1, 7))
    assert history["loss"][-1] < history["loss"][0]
    assert history["val_loss"][-1] < history["val_loss"][0]
    assert (tmp_path / "figures" / "q1_loss.png").exists()

    for half, kind in (("encoder", "Conv2D"), ("decoder", "Conv2DTranspose")):
        layers = autoencoder.get_layer(half).layers
        assert kind in {type(layer).__name__ for layer in layers}
    restored = utils.predict(autoencoder, test.images)
    loaded = keras.saving.load_model(tmp_path / "run" / "autoencoder.keras")
    np.testing.assert_allclose(loaded(test.images), restored, atol=1e-5)
    found = q1.evaluate(autoencoder, pca, train, test, restored)
    exact = (restored.astype(np.float64) - test.images) ** 2
    assert found["test_mse"] == pytest.approx(exact.mean(), rel=1e-4)
    assert found["test_psnr_db"] == pytest.approx(10 * np.log10(1 / exact.mean()))
    mean_image = train.images.mean(axis=0)
    guessed = np.mean((test.images - mean_image) ** 2)
    assert found["mean_image_test_mse"] == pytest.approx(guessed, rel=1e-4)
    assert found["test_mse"] < 0.8 * guessed
    assert found["pca_test_mse"] < guessed
    assert found["code_dim"] == 16
    assert found["parameters"] == sum(v.numpy().size for v in autoencoder.weights)
