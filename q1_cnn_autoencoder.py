"""Question 1: a convolutional autoencoder on MNIST-M, trained by least squares.

    python q1_cnn_autoencoder.py

An encoder of convolutions narrows a 28x28 colour image to a code of 128 numbers, and
a decoder of transposed convolutions restores the image from it. The loss is the mean
squared error. Principal component analysis with a code of the same size is the best
linear autoencoder, so it is the baseline.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import utils

import keras
import numpy as np
import tensorflow as tf

from metrics import pca_reconstruction_mse, psnr_db
from read_MNIST_M import Split, load_mnist_m

# Hyperparameters -------------------------------------------------------------------

CODE_DIM = 128
EPOCHS = 15
BATCH_SIZE = 128
LEARNING_RATE = 1e-3  # decays to zero along a cosine
WIDTHS = (32, 64)  # channels at 14x14 and at 7x7
SHOWN = 10  # images in the figure of reconstructions


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = utils.argument_parser(
        "Train a CNN autoencoder on MNIST-M.",
        name="q1",
        data="MNIST_M.npy",
        epochs=EPOCHS,
        quick_epochs=5,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        code_dim=CODE_DIM,
    )
    return utils.complete_options(parser.parse_args(arguments))


# Model -----------------------------------------------------------------------------


def build_autoencoder(code_dim: int = CODE_DIM) -> keras.Model:
    """Build the autoencoder, its halves the layers `encoder` and `decoder`.

    Args:
        code_dim: numbers in the code.

    Returns:
        A model from float32 images (N, 28, 28, 3) in [0, 1] to the same.
    """
    layers = keras.layers
    image = keras.Input((28, 28, 3))
    x = image
    for width in WIDTHS:
        x = layers.Conv2D(width, 4, strides=2, padding="same", activation="relu")(x)
    x = layers.Conv2D(WIDTHS[-1], 3, padding="same", activation="relu")(x)
    code = layers.Dense(code_dim)(layers.Flatten()(x))
    encoder = keras.Model(image, code, name="encoder")

    code = keras.Input((code_dim,))
    x = layers.Dense(7 * 7 * WIDTHS[-1], activation="relu")(code)
    x = layers.Reshape((7, 7, WIDTHS[-1]))(x)
    x = layers.Conv2DTranspose(WIDTHS[-1], 3, padding="same", activation="relu")(x)
    for width in reversed(WIDTHS[:-1]):
        x = layers.Conv2DTranspose(
            width, 4, strides=2, padding="same", activation="relu"
        )(x)
    restored = layers.Conv2DTranspose(
        3, 4, strides=2, padding="same", activation="sigmoid"
    )(x)
    decoder = keras.Model(code, restored, name="decoder")

    image = keras.Input((28, 28, 3))
    return keras.Model(image, decoder(encoder(image)), name="autoencoder")


# Training --------------------------------------------------------------------------


def as_pair(images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Make of uint8 images what an autoencoder learns from: input and target."""
    scaled = utils.unit_floats(images)
    return scaled, scaled


def train(
    autoencoder: keras.Model,
    train_images: np.ndarray,
    valid_images: np.ndarray,
    options: argparse.Namespace,
    folder: utils.RunFolder,
) -> dict[str, np.ndarray]:
    """Minimise the mean squared error; return the history.

    Args:
        autoencoder: as `build_autoencoder` returns it.
        train_images: uint8 (N, 28, 28, 3).
        valid_images: uint8 (M, 28, 28, 3).
        options: the completed command line.
        folder: keeps checkpoint and history.
    """
    steps = max(1, len(train_images) // options.batch_size)
    schedule = keras.optimizers.schedules.CosineDecay(
        options.learning_rate, options.epochs * steps
    )
    autoencoder.compile(keras.optimizers.Adam(schedule), "mse", jit_compile=False)
    autoencoder.optimizer.build(autoencoder.trainable_variables)
    validation = tf.data.Dataset.from_tensor_slices(valid_images).batch(250)
    return folder.fit(
        autoencoder,
        train_images,
        options,
        as_pair,
        validation.map(as_pair),
        autoencoder=autoencoder,
    )


# Evaluation ------------------------------------------------------------------------


def reconstruct(autoencoder: keras.Model, images: np.ndarray) -> np.ndarray:
    """Return the reconstructions, float32 in [0, 1], of uint8 images."""
    batches = tf.data.Dataset.from_tensor_slices(images).batch(250)
    return autoencoder.predict(batches.map(utils.unit_floats), verbose=0)


def evaluate(
    autoencoder: keras.Model, train_images: np.ndarray, test_images: np.ndarray
) -> dict[str, float]:
    """Compare the autoencoder with PCA on the test images; return the metrics."""
    code_dim = autoencoder.get_layer("encoder").output_shape[-1]
    errors = reconstruct(autoencoder, test_images) - test_images / np.float32(255)
    test_mse = float(np.mean(np.square(errors), dtype=np.float64))
    pca_mse = pca_reconstruction_mse(train_images, test_images, code_dim)
    return {
        "test_mse": test_mse,
        "test_psnr_db": psnr_db(test_mse),
        "pca_test_mse": pca_mse,
        "pca_test_psnr_db": psnr_db(pca_mse),
        "code_dim": code_dim,
        "parameters": autoencoder.count_params(),
    }


# Figures ---------------------------------------------------------------------------


def draw_loss(
    path: Path, history: Mapping[str, np.ndarray], metrics: Mapping[str, float]
) -> None:
    """Draw the reconstruction loss over training beside the PCA baseline."""
    ratio = metrics["test_mse"] / metrics["pca_test_mse"]
    with utils.figure(path) as (_, axes):
        axes.plot(history["epoch"], history["loss"], "o-", ms=4, label="train")
        axes.plot(
            history["epoch"], history["val_loss"], "s--", ms=4, label="validation"
        )
        axes.axhline(metrics["pca_test_mse"], color="black", ls=":")
        axes.annotate(
            f"PCA with {metrics['code_dim']} components (test)",
            (1, metrics["pca_test_mse"]),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
        )
        axes.set(
            yscale="log",
            xlabel="epoch",
            ylabel="mean squared error (pixels in 0..1)",
            title=f"The test error ends at {ratio:.2f} times that of PCA",
        )
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="minor", labelsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()


def draw_reconstructions(
    path: Path, autoencoder: keras.Model, test: Split, seed: int
) -> None:
    """Draw random test images above their reconstructions."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(test.images))[:SHOWN]
    images = test.images[chosen]
    restored = reconstruct(autoencoder, images)
    utils.image_grid(
        path,
        np.concatenate([images / 255, restored]),
        f"{len(chosen)} random test images above their reconstructions",
        ("input", "output"),
        columns=len(chosen),
    )


# Report ----------------------------------------------------------------------------


def report_blocks(metrics: Mapping) -> dict[str, str]:
    """Return the report's blocks of question 1, by name, in Markdown."""
    ratio = metrics["test_mse"] / metrics["pca_test_mse"]
    table = utils.markdown_table(
        ("autoencoder", "code", "parameters", "test MSE", "test PSNR (dB)"),
        [
            (
                "PCA, the best linear one",
                str(metrics["code_dim"]),
                "",
                f"{metrics['pca_test_mse']:.5f}",
                f"{metrics['pca_test_psnr_db']:.2f}",
            ),
            (
                "CNN",
                str(metrics["code_dim"]),
                f"{metrics['parameters']:,}",
                f"{metrics['test_mse']:.5f}",
                f"{metrics['test_psnr_db']:.2f}",
            ),
        ],
    )
    verdict = (
        f"The CNN's test error is {ratio:.2f} times that of PCA: it "
        f"{'beats' if ratio < 1 else 'does **not** beat'} the best linear code."
    )
    return {"q1": f"{table}\n\n{verdict}\n\n{utils.provenance(metrics)}"}


def main() -> None:
    """Answer question 1."""
    started = time.perf_counter()
    options = parse_options()
    train_split, valid, test = utils.limit_splits(
        load_mnist_m(options.data), options.quick
    )
    folder = utils.RunFolder(options)
    keras.utils.set_random_seed(options.seed)
    autoencoder = build_autoencoder(options.code_dim)

    history = train(autoencoder, train_split.images, valid.images, options, folder)

    metrics = evaluate(autoencoder, train_split.images, test.images)
    draw_loss(options.figures / "q1_loss.png", history, metrics)
    draw_reconstructions(
        options.figures / "q1_reconstructions.png", autoencoder, test, options.seed
    )
    metrics["training_seconds"] = float(history["seconds"].sum())
    metrics = utils.write_metrics(options, metrics, started)
    if options.updates_report:
        utils.update_report(report_blocks(metrics))
    print(f"Test MSE {metrics['test_mse']:.5f}, PCA {metrics['pca_test_mse']:.5f}.")
    print(f"Figures and metrics are in {options.figures}.")


if __name__ == "__main__":
    utils.run_script(main)
