"""Question 1: a convolutional autoencoder on MNIST-M, trained by least squares.

    python q1_cnn_autoencoder.py

An encoder of convolutions narrows a 28x28 colour image to a code of 128 numbers, and
a decoder of transposed convolutions restores the image from it. The loss is the mean
squared error: least squares but for a constant factor. The best linear autoencoder is
principal component analysis with a code of the same size; it is the baseline.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import utils  # first: it chooses Keras's backend

import keras
import numpy as np

import metrics
import plots
import report
from make_data import ensure_data
from read_MNIST_M import NUM_CLASSES, Split, find_file, load_mnist_m

DATA = "MNIST_M.npy"
CODE_DIM = 128
EPOCHS = 10
BATCH_SIZE = 128
LEARNING_RATE = 3e-3  # after the first epoch; then it decays along a cosine to 0
CLIP_NORM = 0.05  # of the gradient
WIDTHS = (32, 64)  # channels at 14x14 and at 7x7
ACTIVATION = "leaky_relu"  # of the hidden layers
LOOKED_UP = 2_500  # test images whose digits are named by their nearest neighbours
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


def compile_autoencoder(
    autoencoder: keras.Model, learning_rate: float, epochs: int, steps: int
) -> None:
    """Give an autoencoder the least-squares loss and Adam.

    Args:
        autoencoder: as `build_autoencoder` returns it.
        learning_rate: the highest, as in `utils.falling_rate`.
        epochs: of the whole run.
        steps: training steps in an epoch.
    """
    rate = utils.falling_rate(learning_rate, epochs, steps)
    autoencoder.compile(
        keras.optimizers.Adam(rate, global_clipnorm=CLIP_NORM),
        loss="mse",
        jit_compile=False,  # XLA's convolutions are slow on a CPU
    )
    autoencoder.optimizer.build(autoencoder.trainable_variables)


def build_model(
    options: argparse.Namespace, images: np.ndarray, activation: str = ACTIVATION
) -> keras.Model:
    """Build and compile an autoencoder for training images, (N, 28, 28, 3)."""
    keras.utils.set_random_seed(options.seed)
    autoencoder = build_autoencoder(options.code_dim, activation)
    steps = len(images) // options.batch_size
    compile_autoencoder(autoencoder, options.learning_rate, options.epochs, steps)
    return autoencoder


# Measures --------------------------------------------------------------------------


def evaluate(
    autoencoder: keras.Model,
    train: Split,
    test: Split,
    errors: np.ndarray,
) -> dict[str, Any]:
    """Compare the autoencoder with PCA of the same training images, on test images.

    Their squared errors are float32 (N, 28, 28, 3). What takes labels is None where
    there are none.
    """
    encoder = autoencoder.get_layer("encoder")
    code_dim = encoder.output_shape[-1]
    test_mse = float(np.mean(errors, dtype=np.float64))
    pca = metrics.fit_pca(train.images, code_dim)
    found = {
        "test_mse": test_mse,
        "test_psnr_db": report.psnr_db(test_mse),
        "pca_test_mse": metrics.pca_reconstruction_mse(pca, test.images),
        "mean_image_test_mse": metrics.mean_image_mse(train.images, test.images),
        "code_dim": code_dim,
        "parameters": autoencoder.count_params(),
        **dict.fromkeys(("digit_test_mse", "knn_accuracy")),
    }
    if train.labels is not None:
        by_image = errors.mean(axis=(1, 2, 3), dtype=np.float64)
        found["digit_test_mse"] = {
            str(digit): float(by_image[test.labels == digit].mean())
            for digit in range(NUM_CLASSES)
            if (test.labels == digit).any()
        }
        pixels = [
            split.images.reshape(len(split.images), -1) for split in (train, test)
        ]
        spaces = {
            "cnn_code": [utils.predict(encoder, s.images) for s in (train, test)],
            "pca_code": [pca.transform(each) for each in pixels],
            "pixels": pixels,
        }
        # In 2,352 pixels the neighbours of all 10,000 test images take minutes.
        some = np.random.default_rng(0).permutation(len(test.images))[:LOOKED_UP]
        found["knn_accuracy"] = {
            name: metrics.knn_accuracy(
                known, train.labels, asked[some], test.labels[some]
            )
            for name, (known, asked) in spaces.items()
        }
    return found


# Figures ---------------------------------------------------------------------------


def draw(
    figures: Path, test: np.ndarray, reconstructions: np.ndarray, found: dict, seed: int
) -> None:
    """Draw reconstructions, the best and worst of them, and where the error lies.

    Test images and their reconstructions are float32 (N, 28, 28, 3), `found` the
    metrics; `seed` chooses the images.
    """

    def grid(name: str, chosen: np.ndarray, title: str) -> None:
        rows = test[chosen], reconstructions[chosen]
        path = figures / f"q1_{name}.png"
        plots.image_grid(path, rows, title, ("input", "output"))

    chosen = np.random.default_rng(seed).permutation(len(test))[:SHOWN]
    title = f"{len(chosen)} random test images above their reconstructions"
    grid("reconstructions", chosen, title)

    errors = np.square(reconstructions - test)
    order = errors.mean(axis=(1, 2, 3)).argsort()
    each = min(4, len(order) // 3)
    middle = (len(order) - each) // 2
    chosen = np.concatenate([order[:each], order[middle:][:each], order[-each:]])
    title = f"The {each} best, {each} median and {each} worst test reconstructions"
    grid("extremes", chosen, title)

    by_digit, mse = found["digit_test_mse"], found["test_mse"]
    plots.q1_errors(figures / "q1_errors.png", errors.mean(axis=(0, 3)), by_digit, mse)


# Main ------------------------------------------------------------------------------


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = utils.argument_parser(
        "Train a CNN autoencoder on MNIST-M.",
        data=DATA,
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        code_dim=CODE_DIM,
    )
    return utils.complete_options(parser.parse_args(arguments), "q1")


def train_model(
    run: utils.RunFolder, images: np.ndarray, valid: np.ndarray
) -> keras.Model:
    """Build and train an autoencoder; draw its loss beside PCA's."""
    options = run.options
    autoencoder = build_model(options, images)
    pca = metrics.fit_pca(images, options.code_dim)
    draw_loss = functools.partial(
        plots.q1_loss,
        options.figures / "q1_loss.png",
        pca_mse=metrics.pca_reconstruction_mse(pca, valid),
        code_dim=options.code_dim,
    )
    run.fit(autoencoder, {"autoencoder": autoencoder}, images, valid, draw_loss)
    return autoencoder


def main() -> None:
    """Answer question 1."""
    options = parse_options()
    options.data = find_file(options.data or ensure_data(DATA))
    splits = utils.prepare_splits(load_mnist_m(options.data), options)
    train_split, valid, test = splits
    with utils.RunFolder(options) as run:
        autoencoder = train_model(run, train_split.images, valid.images)
        print("Measuring.", flush=True)
        reconstructions = utils.predict(autoencoder, test.images)
        errors = np.square(reconstructions - test.images)
        found = evaluate(autoencoder, train_split, test, errors)
        found["validation_mse"] = float(run.history["val_loss"][-1])
        draw(options.figures, test.images, reconstructions, found, options.seed)
        run.write_metrics(found)
    if options.updates_report:
        report.update()
    print(f"Test MSE {found['test_mse']:.5f}, PCA {found['pca_test_mse']:.5f}.")
    print(f"Figures and metrics are in {options.figures}.")


if __name__ == "__main__":
    utils.run_script(main)
