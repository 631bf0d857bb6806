"""Beyond the homework: seeds, references, and what each choice is worth.

    python -m extras.comparisons q1                  # question 1: all rows
    python -m extras.comparisons q2 --rows vae,tuned # these rows of question 2

Settings of the question's script, such as --quick or --data, hold for every row. A row
is trained in a folder of its own that its settings, its data and the code name. So an
interrupted row goes on after its last epoch, a finished one is not trained again, and
one of other code or data is never mixed in.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import utils

import keras
import numpy as np
import tensorflow as tf

import metrics
import plots
import q1_cnn_autoencoder as q1
import q2_aae as q2
import report
from make_data import ensure_data
from read_MNIST_M import Split, find_file, load_digits, load_mnist_m

SHORTER = 3  # times fewer epochs, in the short rows
FINISHED = "row.json"


class Row(NamedTuple):
    """A row of the report's tables."""

    title: str
    build: Callable  # of completed options and training images: a compiled model
    changes: Mapping[str, Any] = {}  # of the options
    short: bool = False  # trained for a part of the default's epochs


# Question 1 --------------------------------------------------------------------------


def q1_model(
    options: argparse.Namespace,
    images: np.ndarray,
    build: Callable[[int, np.ndarray], keras.Model] | None = None,
    **choices: Any,
) -> keras.Model:
    """Build and compile an autoencoder: question 1's, or what `build` returns."""
    keras.utils.set_random_seed(options.seed)
    if build is None:
        model = q1.build_autoencoder(options.code_dim, **choices)
    else:
        model = build(options.code_dim, images)
    steps = len(images) // options.batch_size
    q1.compile_autoencoder(model, options.learning_rate, options.epochs, steps)
    return model


def with_mask(code_dim: int, _: np.ndarray) -> keras.Model:
    """Build a decoder that composes b + m (1 - 2 b), as MNIST-M's images are made.

    It makes a photograph b, three channels, and a mask m, the fourth.
    """
    image = keras.Input((28, 28, 3))
    code = q1.build_encoder(code_dim)(image)
    parts = q1.build_decoder(code_dim, channels=4)(code)
    photograph, mask = parts[..., :3], parts[..., 3:]
    restored = photograph + mask * (1.0 - 2.0 * photograph)
    return keras.Model(image, restored, name="autoencoder")


def from_pca(code_dim: int, images: np.ndarray) -> keras.Model:
    """Build an autoencoder with a linear path beside it that starts at the images' PCA.

    The convolutions begin at nothing: their last layers have weights of 0.
    """
    pca = metrics.fit_pca(images, code_dim)
    # Codes of unit variance suit Adam, whose steps are of one size for all.
    scale = np.sqrt(pca.explained_variance_)[:, np.newaxis]
    projection = (pca.components_ / scale).T
    image = keras.Input((28, 28, 3))
    encoder = q1.build_encoder(code_dim)
    decoder = q1.build_decoder(code_dim, output=None)
    for network in (encoder, decoder):
        network.layers[-1].set_weights(
            [np.zeros_like(w) for w in network.layers[-1].get_weights()]
        )
    flat = keras.layers.Flatten()(image)
    to_code, to_image = keras.layers.Dense(code_dim), keras.layers.Dense(28 * 28 * 3)
    code = encoder(image) + to_code(flat)
    linear = keras.layers.Reshape((28, 28, 3))(to_image(code))
    restored = keras.ops.clip(decoder(code) + linear, 0.0, 1.0)
    to_code.set_weights([projection, -pca.mean_ @ projection])
    to_image.set_weights([pca.components_ * scale, pca.mean_])
    return keras.Model(image, restored, name="autoencoder")


SIZES = ("code-16", "code-32", "code-64", "default", "code-256")
Q1_ROWS = {
    **{f"code-{n}": Row(f"{n}", q1_model, {"code_dim": n}) for n in (16, 32, 64, 256)},
    "default": Row("ours", q1_model),
    "seed-1": Row("ours, seed 1", q1_model, {"seed": 1}),
    "seed-2": Row("ours, seed 2", q1_model, {"seed": 2}),
    "relu": Row("a plain CNN, with ReLU", partial(q1_model, activation="relu")),
    "gelu": Row("ours with GELU", partial(q1_model, activation="gelu")),
    "mask": Row("ours with the mask", partial(q1_model, build=with_mask)),
    "pca-start": Row("ours with the PCA start", partial(q1_model, build=from_pca)),
}


def measure_q1(
    model: keras.Model, splits: Sequence[Split], options: argparse.Namespace
) -> dict[str, Any]:
    """Measure a trained autoencoder beside PCA with a code of the same size."""
    train, valid, test = (split.images for split in splits)
    pca = metrics.fit_pca(train, options.code_dim)
    return {
        "code_dim": options.code_dim,
        "validation_mse": model.evaluate(valid, valid, verbose=0),
        "test_mse": model.evaluate(test, test, verbose=0),
        "pca_test_mse": metrics.pca_reconstruction_mse(pca, test),
    }


def draw_q1(rows: Mapping[str, dict], figures: Path) -> None:
    """Draw the error against the code's size."""
    sizes = [row for name, row in rows.items() if name in SIZES]
    if sizes:
        sizes.sort(key=lambda row: row["code_dim"])
        plots.q1_rate_distortion(figures / "q1_rate_distortion.png", sizes)


# Question 2 --------------------------------------------------------------------------


class TunedAutoencoder(q2.AdversarialAutoencoder):
    """One Adam for (a) and (c), -log D in (c), and up to four steps of (b).

    Not the assignment's formulas, but the best samples that we know of. The later steps
    of (b) have images of their own: on those of (a) and (c) again, the discriminator
    would learn them by heart. One step takes R1 for all of them (Karras et al. 2020,
    arXiv:1912.04958, appendix B).
    """

    WEIGHT, STEPS, CLIP_NORM = 10 / 3, 4, 8.0  # of (c); of (b); of the gradient

    def compile(self, learning_rate: float, epochs: int, steps: int) -> None:
        """Give autoencoder and discriminator their Adams; see the base class."""
        super().compile(learning_rate, epochs, steps)
        self.optimizer.global_clipnorm = self.CLIP_NORM
        self.training_steps = epochs * steps

    def train_step(self, data: tuple[tf.Tensor, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Take a step on a batch x, float32 (N, 784) in [0, 1]."""
        x, _ = data
        with tf.GradientTape() as tape:
            codes = self.encoder(x, training=True)
            restored = self.decoder(codes, training=True)
            norm = q2.reconstruction_loss(x, restored) / x.shape[0]
            with tape.stop_recording():
                loss_d = self.train_discriminator(codes)
            logits = self.discriminator(codes)
            loss = norm + self.WEIGHT * tf.reduce_mean(tf.nn.softplus(-logits))
        variables = self.encoder.trainable_variables + self.decoder.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return self.log(x, restored, loss_d, q2.encoder_loss(logits))

    def train_discriminator(self, codes: tf.Tensor) -> tf.Tensor:
        """Take one step of (b) at first, four at the end; return the last's L_D."""
        done = tf.cast(self.optimizer.iterations, tf.int32)
        steps = tf.minimum(1 + self.STEPS * done // self.training_steps, self.STEPS)
        count, variables = codes.shape[0], self.discriminator.trainable_variables

        def step(codes: tf.Tensor, weight: tf.Tensor | None) -> tf.Tensor:
            z = self.draw_prior(count)
            with tf.GradientTape() as tape:
                logits = self.discriminator(z), self.discriminator(codes)
                loss = objective = q2.discriminator_loss(*logits)
                if weight is not None:
                    objective += weight * q2.r1_penalty(self.discriminator, z)
            gradients = tape.gradient(objective, variables)
            self.discriminator_optimizer.apply(gradients, variables)
            return loss

        def further(number: tf.Tensor, _: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            index = keras.random.randint(
                (count,), 0, len(self.images), seed=self.seed_generator
            )
            x = tf.gather(self.images, index)
            return number + 1, step(self.encoder(x, training=True), None)

        weight = self.recipe.r1_weight * tf.cast(steps, tf.float32)
        first = 1, step(codes, weight)
        return tf.while_loop(lambda number, _: number < steps, further, first)[1]


class VariationalAutoencoder(q2.AdversarialAutoencoder):
    """Kingma & Welling 2014 (arXiv:1312.6114), with a Bernoulli likelihood.

    It has the default's encoder and decoder; its discriminator is left alone.
    """

    def train_step(self, data: tuple[tf.Tensor, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Take a step up the evidence bound on a batch x, float32 (N, 784)."""
        x, _ = data
        with tf.GradientTape() as tape:
            loss, restored = self.minus_bound(x)
        variables = self.encoder.trainable_variables + self.decoder.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return self.log(x, restored, 0.0, 0.0)

    def minus_bound(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return what training minimises, in nats, and the reconstructions (N, 784)."""
        parts = [self.encoder.get_layer(name) for name in ("mean", "log_variance")]
        posterior = keras.Model(
            self.encoder.inputs, [*self.encoder.outputs, *(p.output for p in parts)]
        )
        codes, mean, log_variance = posterior(x, training=True)
        restored = self.decoder(codes, training=True)
        surprise = q2.PIXELS * keras.losses.binary_crossentropy(x, restored)
        divergence = 0.5 * tf.reduce_sum(
            tf.square(mean) + tf.exp(log_variance) - 1.0 - log_variance, axis=-1
        )
        return tf.reduce_mean(surprise + divergence), restored


def q2_model(
    options: argparse.Namespace,
    images: np.ndarray,
    recipe: q2.Recipe = q2.DEFAULT,
    kind: type[q2.AdversarialAutoencoder] = q2.AdversarialAutoencoder,
) -> q2.AdversarialAutoencoder:
    """Build a model of question 2, with the images that the tuned one draws from."""
    model = q2.build_model(options, images, recipe, kind)
    if kind is TunedAutoencoder:
        model.images = tf.constant(images)
    return model


def recipe_row(
    title: str,
    kind: type[q2.AdversarialAutoencoder] = q2.AdversarialAutoencoder,
    changes: Mapping[str, Any] | None = None,
    short: bool = False,
    **recipe: Any,
) -> Row:
    """Return a row of the default's recipe with something changed."""
    build = partial(q2_model, recipe=q2.DEFAULT._replace(**recipe), kind=kind)
    return Row(title, build, changes or {}, short)


short_row = partial(recipe_row, short=True)
RANDOM = {"signal_dimensions": 0}  # a random start
TUNED = {"learning_rate": 1.5e-3, "epochs": 32}
VAE = {"learning_rate": 1e-3}
Q2_ROWS = {
    "control": Row("the control", partial(q2_model, recipe=q2.CONTROL)),
    "default": recipe_row("the default run"),
    "seed-1": recipe_row("the same, seed 1", changes={"seed": 1}),
    "seed-2": recipe_row("the same, seed 2", changes={"seed": 2}),
    "tuned": recipe_row(
        "one Adam, −log D, up to four steps of (b)",
        *(TunedAutoencoder, TUNED),
        discriminator_rate=2e-3,
    ),
    "vae": recipe_row("a variational one", VariationalAutoencoder, VAE, **RANDOM),
    "short": short_row("the default, shorter"),
    "no-start": short_row("with a random start", **RANDOM),
    "point": short_row("with a point for q(z|x)", gaussian=False, **RANDOM),
    "no-skips": short_row("without skips", decoder_skips=False),
    "no-decay": short_row("without weight decay", weight_decay=0.0),
    "no-slope": short_row("without R1", r1_weight=0.0),
    "momentum": short_row("with momentum 0.9", momentum=0.9),
    "epsilon": short_row("with Adam's own epsilon in (c)", encoder_epsilon=1e-7),
    "shallow": short_row("with two hidden layers", hidden=(400, 400)),
    "wide-start": short_row("from 20 components", signal_dimensions=20),
}


def measure_q2(
    model: q2.AdversarialAutoencoder,
    splits: Sequence[Split],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Measure a trained model as `q2_aae.py` does."""
    train, _, test = splits
    encoded = q2.encode(model.encoder, model.decoder, train, test, options.seed)
    found = q2.evaluate(encoded, *splits)
    if isinstance(model, VariationalAutoencoder):
        found["loss_discriminator"] = None  # it has none
    return found


def draw_q2(rows: Mapping[str, dict], figures: Path) -> None:
    """Draw the Fréchet distance against the test error."""
    points = {
        name: (row["test_mse"], row["frechet_distance"], row["long"])
        for name, row in rows.items()
        if row["frechet_distance"] is not None
    }
    if points:
        plots.q2_frontier(figures / "q2_frontier.png", points)


# Rows --------------------------------------------------------------------------------

QUESTIONS = {
    "q1": (q1, Q1_ROWS, load_mnist_m, measure_q1, draw_q1),
    "q2": (q2, Q2_ROWS, load_digits, measure_q2, draw_q2),
}


def row_options(name: str, row: Row, base: argparse.Namespace) -> argparse.Namespace:
    """Return a row's options; its folder bears a digest of settings, data and code."""
    options = argparse.Namespace(**vars(base) | {"name": name} | dict(row.changes))
    if base.epochs != base.full_epochs:  # asked for
        options.epochs = base.epochs
    if row.short:
        options.epochs = max(1, options.epochs // SHORTER)
    own = ("figures", "run_dir", "resume", "data", "updates_report")
    settings = {k: v for k, v in vars(options).items() if k not in own}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(utils.describe_source(options.data)["sha256"].encode())
    for module in (utils, metrics, q1, q2, sys.modules[__name__]):
        digest.update(Path(module.__file__).read_bytes())
    options.run_dir = base.run_dir / f"{name}-{digest.hexdigest()[:8]}"
    options.figures = options.run_dir
    options.resume = (options.run_dir / utils.SETTINGS).exists()
    return options


def train_row(
    row: Row, options: argparse.Namespace, splits: Sequence[Split], measure: Callable
) -> dict[str, Any]:
    """Train and measure a row, or go on with it; write what it comes to."""
    print(f"{options.name}: {row.title}", flush=True)
    with utils.RunFolder(options) as run:
        model = row.build(options, splits[0].images)
        run.fit(model, {}, splits[0].images, splits[1].images, lambda history: None)
        found = {
            "title": row.title,
            "long": not row.short,
            "epochs": options.epochs,
            "seed": options.seed,
            "loss_discriminator": run.rows[-1].get("discriminator_loss"),
            "training_seconds": sum(epoch["seconds"] for epoch in run.rows),
            **measure(model, splits, options),
        }
        utils.write_json(options.run_dir / FINISHED, found)
    return found


def main() -> None:
    """Train the rows that are asked for; refresh the report with all that there are."""
    parser = utils.OneLineParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("question", choices=list(QUESTIONS))
    parser.add_argument("--rows", metavar="ROW,ROW", help="default: all of them")
    asked, others = parser.parse_known_args()
    script, rows, load, measure, draw = QUESTIONS[asked.question]
    wanted = asked.rows.split(",") if asked.rows else list(rows)
    for name in wanted:
        if name not in rows:
            raise utils.UsageError(f"--rows: found {name}, expected {', '.join(rows)}")
    base = script.parse_options(others)
    base.data = find_file(base.data or ensure_data(script.DATA))
    base.run_dir = base.run_dir.parent / "comparisons" / asked.question
    splits = utils.prepare_splits(load(base.data), base)
    found = {}
    with utils.RunFolder(base) as run:
        for name, row in rows.items():
            options = row_options(name, row, base)
            path = options.run_dir / FINISHED
            if path.exists():
                found[name] = json.loads(path.read_text(encoding="utf-8"))
            elif name in wanted:
                found[name] = train_row(row, options, splits, measure)
        draw(found, base.figures)
        seconds = sum(row["training_seconds"] for row in found.values())
        content = {"rows": found, "training_seconds": seconds}
        run.write_metrics(content, f"{asked.question}_comparisons_metrics.json")
    if base.updates_report:
        report.update()
    print(f"{len(found)} of {len(rows)} rows are in {base.figures}.")


if __name__ == "__main__":
    utils.run_script(main)
