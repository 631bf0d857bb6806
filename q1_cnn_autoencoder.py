"""Question 1: a convolutional autoencoder on MNIST-M, trained by least squares.

    python q1_cnn_autoencoder.py

An encoder of convolutions narrows a 28x28 colour image to a code of 128 numbers, and
a decoder of transposed convolutions restores the image from it. The loss is the mean
squared error: least squares but for a constant factor. The best linear autoencoder is
principal component analysis with a code of the same size; it is the baseline.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import utils  # first: it chooses Keras's backend

import keras
import numpy as np
from sklearn.decomposition import PCA

import metrics
import plots
import report
from files import describe_source, training_code
from make_data import ensure_data
from read_MNIST_M import Split, find_file, load_mnist_m

DATA = "MNIST_M.npy"
CODE_DIM = 128
EPOCHS = 10
BATCH_SIZE = 128
LEARNING_RATE = 3e-3  # after the first epoch; then it decays along a cosine to 0
CLIP_NORM = 0.05  # of the gradient
WIDTHS = (32, 64)  # channels at 14x14 and at 7x7
ACTIVATION = "leaky_relu"  # of the hidden layers
SHOWN = 10  # images in the figure of reconstructions

# Model -----------------------------------------------------------------------------


def build_encoder(code_dim: int, activation: str = ACTIVATION) -> keras.Model:
    """Build the encoder: images, float32 (N, 28, 28, 3), to codes (N, code_dim)."""
    hidden = {"padding": "same", "activation": activation}
    image = keras.Input((28, 28, 3))
    x = image
    for width in WIDTHS:
        x = keras.layers.Conv2D(width, 4, strides=2, **hidden)(x)
    x = keras.layers.Conv2D(WIDTHS[-1], 3, **hidden)(x)
    code = keras.layers.Dense(code_dim)(keras.layers.Flatten()(x))
    return keras.Model(image, code, name="encoder")


def build_decoder(code_dim: int, activation: str = ACTIVATION) -> keras.Model:
    """Build the decoder: codes (N, code_dim) to images (N, 28, 28, 3) in [0, 1]."""
    hidden = {"padding": "same", "activation": activation}
    code = keras.Input((code_dim,))
    x = keras.layers.Dense(7 * 7 * WIDTHS[-1], activation=activation)(code)
    x = keras.layers.Reshape((7, 7, WIDTHS[-1]))(x)
    x = keras.layers.Conv2DTranspose(WIDTHS[-1], 3, **hidden)(x)
    for width in reversed(WIDTHS[:-1]):
        x = keras.layers.Conv2DTranspose(width, 4, strides=2, **hidden)(x)
    image = keras.layers.Conv2DTranspose(
        3, 4, strides=2, padding="same", activation="sigmoid"
    )(x)
    return keras.Model(code, image, name="decoder")


def build_autoencoder(
    code_dim: int = CODE_DIM, activation: str = ACTIVATION
) -> keras.Model:
    """Build the autoencoder, its halves the layers `encoder` and `decoder`.

    It maps images, float32 (N, 28, 28, 3) in [0, 1], to the same.
    """
    image = keras.Input((28, 28, 3))
    code = build_encoder(code_dim, activation)(image)
    reconstruction = build_decoder(code_dim, activation)(code)
    return keras.Model(image, reconstruction, name="autoencoder")


def build_model(
    settings: utils.Settings, schedule: utils.Schedule, activation: str = ACTIVATION
) -> keras.Model:
    """Build an autoencoder and give it the least-squares loss and Adam."""
    keras.utils.set_random_seed(settings.seed)
    autoencoder = build_autoencoder(settings.code_dim, activation)
    rate = utils.falling_rate(settings.learning_rate, schedule)
    autoencoder.compile(
        keras.optimizers.Adam(rate, global_clipnorm=CLIP_NORM),
        loss="mse",
        jit_compile=False,  # XLA's convolutions are slow on a CPU
    )
    # Adam's variables are made now, so that a checkpoint can be loaded into them.
    autoencoder.optimizer.build(autoencoder.trainable_variables)
    return autoencoder


# Measures --------------------------------------------------------------------------


def evaluate(
    autoencoder: keras.Model,
    pca: PCA,
    train: Split,
    test: Split,
    reconstructions: np.ndarray,
) -> dict[str, Any]:
    """Compare the autoencoder with PCA of the same training images, on test images.

    `reconstructions` are those of the test images, float32 (N, 28, 28, 3).
    """
    errors = np.square(reconstructions - test.images)
    test_mse = float(np.mean(errors, dtype=np.float64))
    return {
        "test_mse": test_mse,
        "test_psnr_db": report.psnr_db(test_mse),
        "pca_test_mse": metrics.pca_reconstruction_mse(pca, test.images),
        "mean_image_test_mse": metrics.mean_image_mse(train.images, test.images),
        "code_dim": autoencoder.get_layer("encoder").output_shape[-1],
        "parameters": autoencoder.count_params(),
    }


# Figures ---------------------------------------------------------------------------


def draw_reconstructions(
    path: Path, test: np.ndarray, reconstructions: np.ndarray, seed: int
) -> None:
    """Draw random test images, float32 (N, 28, 28, 3), and their reconstructions."""
    chosen = np.random.default_rng(seed).permutation(len(test))[:SHOWN]
    images, restored = test[chosen], reconstructions[chosen]
    error = np.abs(restored - images).mean(axis=-1, keepdims=True)
    error = np.repeat(error, 3, axis=-1)  # in grey
    title = f"{len(chosen)} random test images, their reconstructions, absolute error"
    rows = images, restored, error
    plots.image_grid(path, rows, title, ("input", "output", "error"))


# Main ------------------------------------------------------------------------------


def parse_settings(arguments: Sequence[str] | None = None) -> utils.Settings:
    """Read the command line."""
    parser = utils.argument_parser(
        "Train a CNN autoencoder on MNIST-M.",
        data=DATA,
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        code_dim=CODE_DIM,
    )
    return utils.settings_from(parser.parse_args(arguments), "q1")


def train_model(
    run: utils.RunFolder,
    autoencoder: keras.Model,
    train: np.ndarray,
    valid: np.ndarray,
    pca: PCA,
) -> dict[str, np.ndarray]:
    """Train an autoencoder; draw its loss beside PCA's, and return the history."""
    draw_loss = functools.partial(
        plots.q1_loss,
        run.figures / "q1_loss.png",
        pca_mse=metrics.pca_reconstruction_mse(pca, valid),
        code_dim=run.settings.code_dim,
    )
    return utils.fit(
        run,
        autoencoder,
        optimizers=[autoencoder.optimizer],
        networks=[autoencoder],
        train=train,
        valid=valid,
        shown={"loss": "loss", "val_loss": "validation loss"},
        draw=draw_loss,
    )


def main() -> None:
    """Answer question 1."""
    settings = parse_settings()
    plots.check()
    data = find_file(settings.data or ensure_data(DATA))
    train, valid, test = utils.prepare_splits(load_mnist_m(data), data, settings.quick)
    schedule = utils.training_schedule(settings, len(train.images), EPOCHS)
    run = utils.RunFolder(settings, describe_source(data), schedule)
    with run.in_use():
        pca = metrics.fit_pca(train.images, settings.code_dim)
        autoencoder = build_model(settings, schedule)
        history = train_model(run, autoencoder, train.images, valid.images, pca)
        print("Measuring.", flush=True)
        reconstructions = utils.predict(autoencoder, test.images)
        measures = evaluate(autoencoder, pca, train, test, reconstructions)
        measures["validation_mse"] = float(history["val_loss"][-1])
        measures["code"] = training_code(__file__)
        path = run.figures / "q1_reconstructions.png"
        draw_reconstructions(path, test.images, reconstructions, settings.seed)
        run.write_metrics(measures, history)
    if settings.updates_report:
        report.update()
    print(f"Test MSE {measures['test_mse']:.5f}, PCA {measures['pca_test_mse']:.5f}.")
    print(f"Figures and metrics are in {run.figures}.")


if __name__ == "__main__":
    utils.run_script(main)
