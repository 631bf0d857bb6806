"""Question 1: a convolutional autoencoder on MNIST-M, trained by least squares.

    python q1_cnn_autoencoder.py

An encoder of convolutions narrows a 28x28 colour image to a code of 128 numbers, and
a decoder of transposed convolutions restores the image from it. The loss is the mean
squared error. Principal component analysis with a code of the same size is the best
linear autoencoder, so it is the baseline.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import utils

import keras
import numpy as np
import tensorflow as tf
from sklearn.decomposition import PCA

from make_data import describe_source
from metrics import (
    as_unit_floats,
    fit_pca,
    knn_accuracy,
    mean_image_mse,
    pca_reconstruction_mse,
    psnr_db,
)
from read_MNIST_M import NUM_CLASSES, DataError, Split, load_digits, load_mnist_m

# Hyperparameters -------------------------------------------------------------------

CODE_DIM = 128
EPOCHS = 10
BATCH_SIZE = 128
LEARNING_RATE = 3e-3  # reached in the first epoch, then decays along a cosine to 0
CLIP_NORM = 0.05  # of the gradient; without it some runs fall back in epoch 2
SLOPE = 0.2  # of the leaky rectifiers, where they are negative
WIDTHS = (32, 64)  # channels at 14x14 and at 7x7
SHOWN = 10  # images in the figure of reconstructions
SWEEP = (16, 32, 64, 128, 256)  # code sizes of --sweep
BASELINE_SEEDS = (0, 1, 2)
POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16"}  # by precision


def default_precision(processor: str | Path = "/proc/cpuinfo") -> str:
    """Return "bfloat16" if the processor multiplies matrices of it, else "float32".

    With AMX a training step takes three quarters of the time in bfloat16, at a loss
    that is less than seeds differ by; with AVX-512's bfloat16 alone it takes longer.

    Args:
        processor: what Linux tells of the processor.
    """
    try:
        flags = Path(processor).read_text(encoding="utf-8", errors="replace").split()
    except OSError:  # another system
        return "float32"
    return "bfloat16" if "amx_bf16" in flags else "float32"


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
    parser.add_argument(
        "--precision",
        choices=list(POLICIES),
        default=default_precision(),
        help="what the layers multiply in (default: bfloat16 where the processor has "
        "AMX, else float32; here %(default)s)",
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="instead: train at code sizes "
        f"{', '.join(map(str, SWEEP))} and compare with PCA (about 20 minutes)",
    )
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="instead: train the report's other designs and seeds (about 45 minutes)",
    )
    return utils.complete_options(parser.parse_args(arguments))


# Model -----------------------------------------------------------------------------


@keras.saving.register_keras_serializable("cnn_autoencoder")
def leaky_rectifier(x: tf.Tensor) -> tf.Tensor:
    """Return x where it is positive, else SLOPE times x (Maas et al. 2013).

    Its gradient looks at what comes out, which has the sign of what goes in. So nothing
    else needs that, and TensorFlow makes one operation of convolution, bias and this.
    """

    @tf.custom_gradient
    def rectify(x: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        y = tf.nn.leaky_relu(x, SLOPE)

        def gradient(above: tf.Tensor) -> tf.Tensor:
            return tf.raw_ops.LeakyReluGrad(gradients=above, features=y, alpha=SLOPE)

        return y, gradient

    return rectify(x)


def build_autoencoder(
    code_dim: int = CODE_DIM,
    activation: str | Callable = leaky_rectifier,
    with_mask: bool = False,
    pca: PCA | None = None,
    precision: str = "float32",
) -> keras.Model:
    """Build the autoencoder, its halves the layers `encoder` and `decoder`.

    `with_mask` and `pca` are for the baselines: two leads that look promising on
    MNIST-M and are measured in the report.

    Args:
        code_dim: numbers in the code.
        activation: of the hidden layers, or Keras's name of one. See the report's
            baselines for others.
        with_mask: the decoder makes a photograph b and a mask m apart and composes
            them as MNIST-M does, b + m (1 - 2 b).
        pca: a linear path from image to code and back runs beside the convolutions,
            and training starts at this PCA.
        precision: what the layers multiply in, "float32" or "bfloat16". Weights, code
            and image are float32 in either.

    Returns:
        A model from float32 images (N, 28, 28, 3) in [0, 1] to the same.
    """
    layers, ops = keras.layers, keras.ops
    policy = POLICIES[precision]
    hidden = {"padding": "same", "activation": activation, "dtype": policy}
    start = "zeros" if pca else "glorot_uniform"
    image = keras.Input((28, 28, 3))
    x = image
    for width in WIDTHS:
        x = layers.Conv2D(width, 4, strides=2, **hidden)(x)
    x = layers.Conv2D(WIDTHS[-1], 3, **hidden)(x)
    x = layers.Flatten(dtype=policy)(x)
    x = layers.Dense(code_dim, kernel_initializer=start, dtype=policy)(x)
    code = ops.cast(x, "float32")
    if pca:
        linear_code = layers.Dense(code_dim, name="linear")
        code = code + linear_code(layers.Flatten()(image))
    encoder = keras.Model(image, code, name="encoder")

    code = keras.Input((code_dim,))
    x = layers.Dense(7 * 7 * WIDTHS[-1], activation=activation, dtype=policy)(code)
    x = layers.Reshape((7, 7, WIDTHS[-1]), dtype=policy)(x)
    x = layers.Conv2DTranspose(WIDTHS[-1], 3, **hidden)(x)
    for width in reversed(WIDTHS[:-1]):
        x = layers.Conv2DTranspose(width, 4, strides=2, **hidden)(x)
    channels = 4 if with_mask else 3
    x = layers.Conv2DTranspose(
        channels, 4, strides=2, padding="same", kernel_initializer=start, dtype=policy
    )(x)
    x = ops.cast(x, "float32")
    restored = x[..., :3] if with_mask else x
    if pca:
        linear_image = layers.Dense(28 * 28 * 3, name="linear")
        restored = restored + layers.Reshape((28, 28, 3))(linear_image(code))
    else:
        restored = ops.sigmoid(restored)
    if with_mask:
        # From PCA, start with hardly any mask, so that training begins where PCA ends.
        mask = ops.sigmoid(x[..., 3:] - (3.0 if pca else 0.0))
        restored = restored + mask * (1.0 - 2.0 * restored)
    if pca:
        restored = ops.clip(restored, 0.0, 1.0)
    decoder = keras.Model(code, restored, name="decoder")
    if pca:
        # Codes of unit variance suit Adam, whose steps are of one size for all.
        scale = np.sqrt(pca.explained_variance_)[:, np.newaxis]
        projection = (pca.components_ / scale).T
        linear_code.set_weights([projection, -pca.mean_ @ projection])
        linear_image.set_weights([pca.components_ * scale, pca.mean_])

    image = keras.Input((28, 28, 3))
    return keras.Model(image, decoder(encoder(image)), name="autoencoder")


# Training --------------------------------------------------------------------------


def as_pairs(batches: tf.data.Dataset) -> tf.data.Dataset:
    """Make of batches of uint8 images what an autoencoder learns from: x and x."""

    def pair(images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        scaled = utils.unit_floats(images)
        return scaled, scaled

    return batches.map(pair)


def least_squares(images: tf.Tensor, restored: tf.Tensor) -> tf.Tensor:
    """Return each image's mean squared error over pixels and channels, (N,).

    Keras's "mse" has a number a pixel, and takes longer to average them.
    """
    return tf.reduce_mean(tf.square(images - restored), axis=(1, 2, 3))


def share_cores() -> None:
    """Let TensorFlow take two operations at once, each on half of the cores.

    To be called before TensorFlow computes anything.
    """
    own = getattr(os, "sched_getaffinity", None)  # on Linux
    cores = len(own(0)) if own else os.cpu_count() or 1
    tf.config.threading.set_inter_op_parallelism_threads(2)
    tf.config.threading.set_intra_op_parallelism_threads(max(1, cores // 2))


class SideBySide(keras.Model):
    """A model that takes the two halves of a batch side by side.

    As `share_cores` sets it, each half has cores of its own. They do not wait for each
    other, as all cores do at the end of each operation that they share.

    Args:
        model: from images (N, 28, 28, 3) to a tensor (N, ...).
    """

    def __init__(self, model: keras.Model) -> None:
        super().__init__()
        self.model = model
        self.built = True

    def call(self, images: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Return what the model makes of the images, in their order."""
        count = tf.shape(images)[0]
        half = (count + 1) // 2
        # An odd image is in both: convolutions fail on no image at all.
        first, second = images[:half], images[count - half :]
        first, second = (self.model(x, training=training) for x in (first, second))
        return tf.concat([first, second[2 * half - count :]], axis=0)


def compile_autoencoder(
    autoencoder: keras.Model, learning_rate: float, epochs: int, steps: int
) -> SideBySide:
    """Give an autoencoder its loss and its Adam.

    Args:
        autoencoder: as `build_autoencoder` returns it.
        learning_rate: as in `utils.falling_rate`.
        epochs: of the whole run.
        steps: training steps in an epoch.

    Returns:
        What `fit` trains it by.
    """
    rate = utils.falling_rate(learning_rate, epochs, steps)
    model = SideBySide(autoencoder)
    model.compile(
        utils.FusedAdam(rate, clip=CLIP_NORM),
        least_squares,
        jit_compile=False,  # XLA's convolutions are slow
        steps_per_execution=utils.steps_per_execution(steps),
    )
    model.optimizer.build(model.trainable_variables)
    return model


def train(
    autoencoder: keras.Model,
    train_images: np.ndarray,
    valid_images: np.ndarray,
    options: argparse.Namespace,
    folder: utils.RunFolder,
    draw: Callable[[dict[str, np.ndarray]], None] | None = None,
) -> dict[str, np.ndarray]:
    """Minimise the mean squared error; return the history.

    Args:
        autoencoder: as `build_autoencoder` returns it.
        train_images: uint8 (N, 28, 28, 3).
        valid_images: uint8 (M, 28, 28, 3).
        options: the completed command line.
        folder: keeps checkpoint and history.
        draw: as in `utils.RunFolder.fit`.
    """
    steps = utils.steps_per_epoch(train_images, options.batch_size)
    model = compile_autoencoder(
        autoencoder, options.learning_rate, options.epochs, steps
    )
    validation = tf.data.Dataset.from_tensor_slices(valid_images).batch(250)
    return folder.fit(
        model,
        train_images,
        options,
        as_pairs,
        as_pairs(validation),
        draw,
        autoencoder=autoencoder,
    )


# Evaluation ------------------------------------------------------------------------


def squared_errors(autoencoder: keras.Model, images: np.ndarray) -> np.ndarray:
    """Return the squared errors, float32 (N, 28, 28, 3), pixels in [0, 1]."""
    restored = utils.predict(SideBySide(autoencoder), images)
    return np.square(restored - images / np.float32(255))


def read_masks(data: Path, count: int) -> np.ndarray | None:
    """Find the digits' masks in the test images of the `data.npy` beside the data.

    Args:
        data: MNIST-M's file.
        count: how many test images it holds.

    Returns:
        bool (N, 28, 28), or None unless `make_data.py` built both files.
    """
    digits = data.with_name("data.npy")
    try:
        sources = {describe_source(path)["source"] for path in (data, digits)}
        masks = load_digits(digits)[2].images.reshape(-1, 28, 28) > 0
    except (DataError, OSError):
        return None
    built = sources == {"built by make_data.py"}
    return masks[:count] if built and len(masks) >= count else None


def evaluate(
    autoencoder: keras.Model,
    train: Split,
    test: Split,
    errors: np.ndarray,
    masks: np.ndarray | None = None,
) -> dict[str, Any]:
    """Compare the autoencoder with PCA on the test images.

    Args:
        autoencoder: trained.
        train: what it was trained on; PCA is fitted on the same.
        test: held out.
        errors: the test images' squared errors, as `squared_errors` returns them.
        masks: bool (N, 28, 28), where the test images' digits are, if known.

    Returns:
        The metrics; None where labels or masks are needed that aren't there.
    """
    encoder = autoencoder.get_layer("encoder")
    code_dim = encoder.output_shape[-1]
    test_mse = float(np.mean(errors, dtype=np.float64))
    pca = fit_pca(train.images, code_dim)
    pca_mse = pca_reconstruction_mse(pca, test.images)
    found = {
        "test_mse": test_mse,
        "test_psnr_db": psnr_db(test_mse),
        "pca_test_mse": pca_mse,
        "pca_test_psnr_db": psnr_db(pca_mse),
        "mean_image_test_mse": mean_image_mse(train.images, test.images),
        "code_dim": code_dim,
        "parameters": autoencoder.count_params(),
        "digit_test_mse": None,
        "mse_inside_digit": None,
        "mse_outside_digit": None,
        "knn_accuracy": None,
    }
    if masks is not None:
        found["mse_inside_digit"] = float(errors[masks].mean(dtype=np.float64))
        found["mse_outside_digit"] = float(errors[~masks].mean(dtype=np.float64))
    if train.labels is not None:
        by_image = errors.mean(axis=(1, 2, 3), dtype=np.float64)
        found["digit_test_mse"] = {
            str(digit): float(by_image[test.labels == digit].mean())
            for digit in range(NUM_CLASSES)
            if (test.labels == digit).any()
        }
        codes = {
            "cnn_code": lambda images: utils.predict(SideBySide(encoder), images),
            "pca_code": lambda images: pca.transform(as_unit_floats(images)),
            "pixels": as_unit_floats,
        }
        found["knn_accuracy"] = {
            name: knn_accuracy(
                encode(train.images), train.labels, encode(test.images), test.labels
            )
            for name, encode in codes.items()
        }
    return found


# Figures ---------------------------------------------------------------------------


def draw_loss(
    path: Path,
    history: Mapping[str, np.ndarray],
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Draw the reconstruction loss over training.

    Args:
        path: of the PNG.
        history: a value an epoch of "epoch", "loss" and "val_loss".
        metrics: as `evaluate` returns them, for the PCA baseline; None if training was
            interrupted.
    """
    with utils.figure(path) as (_, axes):
        axes.plot(history["epoch"], history["loss"], "o-", ms=4, label="train")
        axes.plot(
            history["epoch"], history["val_loss"], "s--", ms=4, label="validation"
        )
        title = "The reconstruction loss until training was interrupted"
        if metrics is not None:
            ratio = metrics["test_mse"] / metrics["pca_test_mse"]
            title = f"The test error ends at {ratio:.2f} times that of PCA"
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
            title=title,
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
    restored = utils.predict(autoencoder, images)
    utils.image_grid(
        path,
        np.concatenate([images / 255, restored]),
        f"{len(chosen)} random test images above their reconstructions",
        ("input", "output"),
        columns=len(chosen),
    )


def draw_extremes(
    path: Path, autoencoder: keras.Model, images: np.ndarray, errors: np.ndarray
) -> None:
    """Draw the best, median and worst test reconstructions.

    Args:
        path: of the PNG.
        autoencoder: trained.
        images: uint8 (N, 28, 28, 3), the test images.
        errors: float (N, 28, 28, 3), their squared errors.
    """
    each = min(4, len(images) // 3)
    order = errors.mean(axis=(1, 2, 3)).argsort()
    middle = (len(order) - each) // 2
    chosen = np.concatenate(
        [order[:each], order[middle : middle + each], order[len(order) - each :]]
    )
    restored = utils.predict(autoencoder, images[chosen])
    utils.image_grid(
        path,
        np.concatenate([images[chosen] / 255, restored]),
        f"The {each} best, {each} median and {each} worst test reconstructions",
        ("input", "output"),
        columns=3 * each,
    )


def draw_errors(path: Path, metrics: Mapping[str, Any], errors: np.ndarray) -> None:
    """Draw where the error lies: by place in the image and by digit.

    Args:
        path: of the PNG.
        metrics: as `evaluate` returns them.
        errors: float (N, 28, 28, 3), the test images' squared errors.
    """
    with utils.figure(path, 1, 2, (8, 3.4)) as (figure, (place, digits)):
        figure.suptitle("Where the test error lies", fontsize=11)
        shown = place.imshow(errors.mean(axis=(0, 3)), cmap="cividis", vmin=0)
        place.set(xticks=[], yticks=[], title="mean over images and channels")
        figure.colorbar(shown, ax=place, label="squared error (pixels in 0..1)")
        by_digit = metrics["digit_test_mse"]
        if by_digit is None:
            digits.set_axis_off()
            return
        digits.bar(list(by_digit), list(by_digit.values()), color=utils.INK)
        digits.axhline(metrics["test_mse"], color="black", ls=":")
        digits.set(title="by digit, and over all (dotted)", xlabel="digit")
        digits.set_ylabel("mean squared error (pixels in 0..1)")


# Report ----------------------------------------------------------------------------


def report_blocks(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return the report's blocks of question 1, by name, in Markdown."""
    ratio = metrics["test_mse"] / metrics["pca_test_mse"]
    code_dim = str(metrics["code_dim"])
    rows = [
        ("the mean image", "0", "", metrics["mean_image_test_mse"]),
        ("PCA, the best linear one", code_dim, "", metrics["pca_test_mse"]),
        ("CNN", code_dim, f"{metrics['parameters']:,}", metrics["test_mse"]),
    ]
    parts = [
        utils.markdown_table(
            ("autoencoder", "code", "parameters", "test MSE", "test PSNR (dB)"),
            [(*row, f"{mse:.5f}", f"{psnr_db(mse):.2f}") for *row, mse in rows],
        ),
        f"The CNN's test error is {ratio:.2f} times that of PCA: it "
        f"{'beats' if ratio < 1 else 'does **not** beat'} the best linear code.",
        utils.provenance(metrics),
    ]
    return {"q1": "\n\n".join(parts), "q1.error": _error_block(metrics)}


def _error_block(metrics: Mapping[str, Any]) -> str:
    parts = []
    if metrics["digit_test_mse"] is not None:
        by_digit = metrics["digit_test_mse"]
        hardest, easiest = (f(by_digit, key=by_digit.get) for f in (max, min))
        parts.append(
            f"The easiest digit is {easiest}, with a test MSE of "
            f"{by_digit[easiest]:.5f}, the hardest {hardest}, with "
            f"{by_digit[hardest]:.5f}."
        )
    if metrics["mse_inside_digit"] is None:
        parts.append("Where the digits are is not known for this data.")
    else:
        parts.append(
            f"Inside the digits the MSE is {metrics['mse_inside_digit']:.5f}, outside "
            f"them {metrics['mse_outside_digit']:.5f}."
        )
    if metrics["knn_accuracy"] is not None:
        accuracy = metrics["knn_accuracy"]
        rows = [
            (name, f"{100 * accuracy[key]:.1f} %")
            for name, key in (
                ("the CNN's code", "cnn_code"),
                ("PCA's code of the same size", "pca_code"),
                ("the pixels", "pixels"),
            )
        ]
        table = utils.markdown_table(("5 nearest neighbours in", "accuracy"), rows)
        return " ".join(parts) + "\n\n" + table
    return " ".join(parts)


# Comparisons -----------------------------------------------------------------------


def train_another(
    options: argparse.Namespace,
    splits: Sequence[Split],
    name: str,
    code_dim: int,
    seed: int,
    **choices: Any,
) -> dict[str, Any]:
    """Train an autoencoder in a folder of its own within the run folder.

    Args:
        options: the completed command line.
        splits: train, validation and test.
        name: of the folder.
        code_dim: numbers in the code.
        seed: of weights and order.
        **choices: of `build_autoencoder`.

    Returns:
        `code_dim`, `seed`, `precision`, `validation_mse`, `test_mse` and
        `training_seconds`.
    """
    train_split, valid, test = splits
    own = options.run_dir / name
    changes = {"code_dim": code_dim, "seed": seed, "run_dir": own, "figures": own}
    choices = {"precision": options.precision} | choices
    changes["precision"] = choices["precision"]
    own_options = argparse.Namespace(**vars(options) | changes)
    own_options.resume = options.resume and utils.RunFolder.holds_a_run(own)
    folder = utils.RunFolder(own_options)
    keras.utils.set_random_seed(seed)
    autoencoder = build_autoencoder(code_dim, **choices)
    print(f"Training {own}.")
    history = train(autoencoder, train_split.images, valid.images, own_options, folder)
    errors = squared_errors(autoencoder, test.images)
    return {
        "code_dim": code_dim,
        "seed": seed,
        "precision": choices["precision"],
        "validation_mse": float(history["val_loss"][-1]),
        "test_mse": float(np.mean(errors, dtype=np.float64)),
        "training_seconds": float(history["seconds"].sum()),
    }


def sweep(options: argparse.Namespace, splits: Sequence[Split]) -> dict[str, str]:
    """Train at each code size; draw the rates against the distortions.

    Returns:
        The report's block.
    """
    train_split, _, test = splits
    watch = utils.Stopwatch()
    rows = []
    for code_dim in SWEEP:
        name = f"sweep/{code_dim}"
        row = train_another(options, splits, name, code_dim, options.seed)
        pca = fit_pca(train_split.images, code_dim)
        row["pca_test_mse"] = pca_reconstruction_mse(pca, test.images)
        rows.append(row)
    seconds = sum(row["training_seconds"] for row in rows)
    metrics = {"sweep": rows, "training_seconds": seconds}
    metrics = utils.write_metrics(options, metrics, watch, "q1_sweep_metrics.json")
    draw_rate_distortion(options.figures / "q1_rate_distortion.png", rows)
    table = utils.markdown_table(
        ("code", "CNN test MSE", "PCA test MSE", "ratio", "CNN PSNR (dB)", "PCA PSNR"),
        [
            (
                str(row["code_dim"]),
                *(f"{row[key]:.5f}" for key in ("test_mse", "pca_test_mse")),
                f"{row['test_mse'] / row['pca_test_mse']:.2f}",
                *(f"{psnr_db(row[key]):.2f}" for key in ("test_mse", "pca_test_mse")),
            )
            for row in rows
        ],
    )
    return {"q1.sweep": f"{table}\n\n{utils.provenance(metrics)}"}


def draw_rate_distortion(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Draw test MSE and PSNR against the code's size, of the CNN and of PCA."""
    sizes = [row["code_dim"] for row in rows]
    ratios = [row["test_mse"] / row["pca_test_mse"] for row in rows]
    with utils.figure(path, 1, 2, (8, 3.4)) as (figure, (mse, psnr)):
        figure.suptitle(
            f"The CNN's test error is {min(ratios):.2f} to {max(ratios):.2f} times "
            "that of PCA with a code of the same size",
            fontsize=11,
        )
        for key, style, label in (
            ("test_mse", "o-", "CNN"),
            ("pca_test_mse", "s--", "PCA"),
        ):
            values = [row[key] for row in rows]
            mse.plot(sizes, values, style, ms=4, label=label)
            psnr.plot(sizes, [psnr_db(v) for v in values], style, ms=4, label=label)
        mse.set(yscale="log", ylabel="test mean squared error (pixels in 0..1)")
        psnr.set(ylabel="test PSNR (dB)")
        for axes in (mse, psnr):
            axes.set_xscale("log", base=2)
            axes.set(xlabel="numbers in the code", xticks=sizes)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.legend()


def baselines(options: argparse.Namespace, splits: Sequence[Split]) -> dict[str, str]:
    """Train the default under three seeds, and other designs of `build_autoencoder`.

    A default that multiplies in bfloat16 is trained in float32, too.

    Returns:
        The report's block.
    """
    watch = utils.Stopwatch()
    train_split, _, test = splits
    code_dim = options.code_dim
    pca = fit_pca(train_split.images, code_dim)
    rows = {}
    seeds = {"ours": {}}
    if options.precision != "float32":
        seeds["ours in float32"] = {"precision": "float32"}
    for name, seed, choices in (
        ("a plain CNN, with ReLU", options.seed, {"activation": "relu"}),
        ("ours with GELU", options.seed, {"activation": "gelu"}),
        ("ours with the mask", options.seed, {"with_mask": True}),
        ("ours with the PCA start", options.seed, {"pca": pca}),
        *(
            (f"{name}, seed {seed}", seed, choices)
            for name, choices in seeds.items()
            for seed in BASELINE_SEEDS
        ),
    ):
        folder = "baselines/" + re.sub(r"\W+", "_", name)
        rows[name] = train_another(options, splits, folder, code_dim, seed, **choices)
    by_seed = {
        name: [rows[f"{name}, seed {seed}"]["test_mse"] for seed in BASELINE_SEEDS]
        for name in seeds
    }
    metrics = {
        "mean_image_test_mse": mean_image_mse(train_split.images, test.images),
        "pca_test_mse": pca_reconstruction_mse(pca, test.images),
        "baselines": rows,
        "seed_mean": {name: np.mean(mses) for name, mses in by_seed.items()},
        "seed_spread": {
            name: (max(mses) - min(mses)) / np.mean(mses)
            for name, mses in by_seed.items()
        },
        "training_seconds": sum(row["training_seconds"] for row in rows.values()),
    }
    metrics = utils.write_metrics(options, metrics, watch, "q1_baselines_metrics.json")
    table = utils.markdown_table(
        ("autoencoder", "validation MSE", "test MSE"),
        [
            ("the mean image", "", f"{metrics['mean_image_test_mse']:.5f}"),
            ("PCA", "", f"{metrics['pca_test_mse']:.5f}"),
            *(
                (name, f"{row['validation_mse']:.5f}", f"{row['test_mse']:.5f}")
                for name, row in rows.items()
            ),
        ],
    )
    spread = " ".join(
        f"The {len(mses)} seeds of {name} have a mean test MSE of "
        f"{metrics['seed_mean'][name]:.5f}; the largest is "
        f"{100 * metrics['seed_spread'][name]:.1f} % of it above the smallest."
        for name, mses in by_seed.items()
    )
    return {"q1.baselines": f"{table}\n\n{spread}\n\n{utils.provenance(metrics)}"}


def main() -> None:
    """Answer question 1."""
    watch = utils.Stopwatch()
    options = parse_options()
    share_cores()
    splits = utils.limit_splits(load_mnist_m(options.data), options.quick)
    train_split, valid, test = splits
    if options.sweep or options.baselines:
        blocks = (sweep if options.sweep else baselines)(options, splits)
        if options.updates_report:
            utils.update_report(blocks)
        return
    folder = utils.RunFolder(options)
    watch.lap("data")
    keras.utils.set_random_seed(options.seed)
    autoencoder = build_autoencoder(options.code_dim, precision=options.precision)

    loss_path = options.figures / "q1_loss.png"
    history = train(
        autoencoder,
        train_split.images,
        valid.images,
        options,
        folder,
        lambda so_far: draw_loss(loss_path, so_far),
    )
    watch.lap("training")

    errors = squared_errors(autoencoder, test.images)
    masks = read_masks(Path(options.data), len(test.images))
    metrics = evaluate(autoencoder, train_split, test, errors, masks)
    watch.lap("metrics")
    figures = options.figures
    draw_loss(loss_path, history, metrics)
    draw_reconstructions(
        figures / "q1_reconstructions.png", autoencoder, test, options.seed
    )
    draw_extremes(figures / "q1_extremes.png", autoencoder, test.images, errors)
    draw_errors(figures / "q1_errors.png", metrics, errors)
    watch.lap("figures")
    watch.seconds["first step"] = folder.first_step_seconds
    metrics["training_seconds"] = float(history["seconds"].sum())
    metrics = utils.write_metrics(options, metrics, watch)
    if options.updates_report:
        utils.update_report(report_blocks(metrics))
    print(f"Test MSE {metrics['test_mse']:.5f}, PCA {metrics['pca_test_mse']:.5f}.")
    print(f"Figures and metrics are in {options.figures}.")


if __name__ == "__main__":
    utils.run_script(main)
