"""Beyond the homework: seeds, references, and what each choice is worth.

    python -m extras.comparisons q1                  # question 1: all rows
    python -m extras.comparisons q2 --rows vae,tuned # these rows of question 2
    python -m extras.comparisons q2 --workers 2      # two rows at a time
    python -m extras.comparisons q2 --cluster tcp://host:8786   # on a Dask cluster

Settings of the question's script, such as --quick or --data, hold for every row. A row
is trained in a folder of its own that its settings, its data and the code name. So an
interrupted row goes on after its last epoch, a finished one is not trained again, and
one of other code or data is never mixed in. The runs that the scripts make themselves
are rows, too, taken from their metrics. A cluster's workers need the same folders.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import utils

import joblib
import keras
import numpy as np
import tensorflow as tf

import metrics
import plots
import q1_cnn_autoencoder as q1
import q2_aae as q2
import report
from files import describe_source, write_json
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


SIZES = ("code-16", "code-32", "code-64", "default", "code-256")
Q1_ROWS = {
    "code-16": Row("ours", q1.build_model, {"code_dim": 16}),
    "code-32": Row("ours", q1.build_model, {"code_dim": 32}),
    "code-64": Row("ours", q1.build_model, {"code_dim": 64}),
    "code-256": Row("ours", q1.build_model, {"code_dim": 256}),
    "seed-1": Row("ours, seed 1", q1.build_model, {"seed": 1}),
    "seed-2": Row("ours, seed 2", q1.build_model, {"seed": 2}),
    "relu": Row("a plain CNN, with ReLU", partial(q1.build_model, activation="relu")),
    "gelu": Row("ours with GELU", partial(q1.build_model, activation="gelu")),
}


def measure_q1(
    model: keras.Model, splits: Sequence[Split], run: utils.RunFolder
) -> dict[str, Any]:
    """Measure a trained autoencoder beside PCA with a code of the same size."""
    train, valid, test = (split.images for split in splits)
    code_dim = run.options.code_dim
    pca = metrics.fit_pca(train, code_dim)
    return {
        "code_dim": code_dim,
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


def r1_penalty(discriminator: keras.Model, z: tf.Tensor) -> tf.Tensor:
    """Return R1, half the mean squared length of the logit's gradient at z, (N, D)."""
    with tf.GradientTape() as tape:
        tape.watch(z)
        logits = discriminator(z)
    gradient = tape.gradient(logits, z)
    return 0.5 * tf.reduce_mean(tf.reduce_sum(tf.square(gradient), axis=-1))


class TunedAutoencoder(q2.AdversarialAutoencoder):
    """One Adam for (a) and (c), -log D in (c), and up to four steps of (b).

    Not the assignment's formulas, but the best samples that we know of. The later steps
    of (b) have images of their own: on those of (a) and (c) again, the discriminator
    would learn them by heart. One step takes R1 (Mescheder et al. 2018,
    arXiv:1801.04406) for all of them (Karras et al. 2020,
    arXiv:1912.04958, appendix B).
    """

    WEIGHT, STEPS = 10 / 3, 4  # of (c); of (b)
    R1_WEIGHT = 0.1  # of the slope penalty in (b)

    def compile(self, learning_rate: float, epochs: int, steps: int) -> None:
        """Give autoencoder and discriminator their Adams; see the base class."""
        super().compile(learning_rate, epochs, steps)
        self.training_steps = epochs * steps

    def train_step(self, data: tuple[tf.Tensor, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Take a step on a batch x, float32 (N, 784) in [0, 1]."""
        x, _ = data
        with tf.GradientTape() as tape:
            codes = self.encoder(x, training=True)
            x_hat = self.decoder(codes, training=True)
            norm = q2.reconstruction_loss(x, x_hat) / x.shape[0]
            with tape.stop_recording():
                loss_d = self.train_discriminator(codes)
            logits = self.discriminator(codes)
            loss = norm + self.WEIGHT * tf.reduce_mean(tf.nn.softplus(-logits))
        variables = self.encoder.trainable_variables + self.decoder.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return self.update_means(x, x_hat, loss_d, q2.encoder_loss(logits))

    def train_discriminator(self, codes: tf.Tensor) -> tf.Tensor:
        """Take one step of (b) at first, four at the end; return the last's L_D."""
        done = tf.cast(self.optimizer.iterations, tf.int32)
        steps = tf.minimum(1 + self.STEPS * done // self.training_steps, self.STEPS)
        count, variables = codes.shape[0], self.discriminator.trainable_variables

        def step(codes: tf.Tensor, weight: tf.Tensor | None) -> tf.Tensor:
            z = self.sample_prior(count)
            with tf.GradientTape() as tape:
                logits = self.discriminator(z), self.discriminator(codes)
                loss = objective = q2.discriminator_loss(*logits)
                if weight is not None:
                    objective += weight * r1_penalty(self.discriminator, z)
            gradients = tape.gradient(objective, variables)
            self.discriminator_optimizer.apply(gradients, variables)
            return loss

        def further(number: tf.Tensor, _: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            index = keras.random.randint(
                (count,), 0, len(self.images), seed=self.seed_generator
            )
            x = tf.gather(self.images, index)
            return number + 1, step(self.encoder(x, training=True), None)

        weight = self.R1_WEIGHT * tf.cast(steps, tf.float32)
        first = 1, step(codes, weight)
        return tf.while_loop(lambda number, _: number < steps, further, first)[1]


def tuned_model(
    options: argparse.Namespace, images: np.ndarray, recipe: q2.Recipe
) -> TunedAutoencoder:
    """Build a tuned model, with the images that its later steps of (b) draw from."""
    model = q2.build_model(options, images, recipe, TunedAutoencoder)
    model.images = tf.constant(images)
    return model


class VariationalAutoencoder(q2.AdversarialAutoencoder):
    """Kingma & Welling 2014 (arXiv:1312.6114), with a Bernoulli likelihood.

    It has the default's networks; its discriminator is left alone.
    """

    BETA = 1.0  # weight of the divergence from the prior (Higgins et al. 2017)

    def train_step(self, data: tuple[tf.Tensor, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Take a step up the evidence bound on a batch x, float32 (N, 784)."""
        x, _ = data
        with tf.GradientTape() as tape:
            loss, x_hat = self.minus_bound(x)
        variables = self.encoder.trainable_variables + self.decoder.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return self.update_means(x, x_hat, 0.0, 0.0)

    def minus_bound(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return what training minimises, in nats, and the reconstructions (N, 784)."""
        encoder = self.encoder
        parts = [encoder.get_layer(name).output for name in ("mean", "log_variance")]
        posterior = keras.Model(encoder.inputs, [*encoder.outputs, *parts])
        codes, mean, log_variance = posterior(x, training=True)
        x_hat = self.decoder(codes, training=True)
        surprise = q2.PIXELS * keras.losses.binary_crossentropy(x, x_hat)
        divergence = 0.5 * tf.reduce_sum(
            tf.square(mean) + tf.exp(log_variance) - 1.0 - log_variance, axis=-1
        )
        return tf.reduce_mean(surprise + self.BETA * divergence), x_hat


class HalfWeight(VariationalAutoencoder):
    """With half the weight on the divergence, so with less noise in the code."""

    BETA = 0.5


def recipe_row(
    title: str,
    kind: type[q2.AdversarialAutoencoder] = q2.AdversarialAutoencoder,
    changes: Mapping[str, Any] = {},
    short: bool = False,
    **recipe: Any,
) -> Row:
    """Return a row of the default recipe with something changed."""
    build = partial(q2.build_model, recipe=q2.DEFAULT._replace(**recipe), kind=kind)
    return Row(title, build, changes, short)


NO_BOUNDS = {"signal_dimensions": 0}
NO_CLIPS = {"clipnorm": None, "encoder_clipnorm": None}
FASTER_D = {"discriminator_rate": 1.5e-3}
EIGHT = FASTER_D | {"signal_dimensions": 8}
TUNED = {"learning_rate": 1.5e-3, "epochs": 32}
TUNED_RECIPE = q2.DEFAULT._replace(discriminator_rate=2e-3, clipnorm=8.0)
VAE = {"learning_rate": 1e-3}
VAE_RECIPE = NO_BOUNDS | NO_CLIPS
# One thing changed at a time; what has to change with it is named.
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "short": ("the default, shorter", {}),
    "slow-d": ("with (b) at half its rate", {"discriminator_rate": 5e-4}),
    "fast-d": ("with (b) at twice its rate", {"discriminator_rate": 2e-3}),
    "without-c": ("without stage (c)", {"encoder_rate": 0.0}),
    "no-bounds": ("without bounds on the noise", NO_BOUNDS),
    "point": ("with a deterministic encoder", {"gaussian": False}),
    "no-skips": ("without skips", {"decoder_skips": False}),
    "no-decay": ("without weight decay", {"weight_decay": 0.0}),
    "momentum": ("with momentum 0.9", {"momentum": 0.9}),
    "epsilon": ("with Adam's own epsilon in (c)", {"encoder_epsilon": 1e-7}),
    "no-clips": ("without clips", NO_CLIPS),
    "shallow": ("with two hidden layers", {"hidden": (400, 400)}),
}
short_row = partial(recipe_row, short=True)
Q2_ROWS = {
    "seed-1": recipe_row("the default, seed 1", changes={"seed": 1}),
    "seed-2": recipe_row("the default, seed 2", changes={"seed": 2}),
    "faster-d": recipe_row("with (b) at 1.5 times its rate", **FASTER_D),
    "eight": recipe_row("the same, with eight coordinates for the digits", **EIGHT),
    "tuned": Row(
        "one Adam, −log D, up to four steps of (b)",
        partial(tuned_model, recipe=TUNED_RECIPE),
        TUNED,
    ),
    "vae": recipe_row("a variational one", VariationalAutoencoder, VAE, **VAE_RECIPE),
    "vae-half": recipe_row("a variational one, β = 1/2", HalfWeight, VAE, **VAE_RECIPE),
    **{
        f"{name}{suffix}": short_row(title, changes=changes, **recipe)
        for suffix, changes in (("", {}), ("-1", {"seed": 1}))
        for name, (title, recipe) in CHANGES.items()
    },
    "code-10": short_row(
        "with a code of 10 dimensions, all for the digits", changes={"code_dim": 10}
    ),
}


def measure_q2(
    model: q2.AdversarialAutoencoder, splits: Sequence[Split], run: utils.RunFolder
) -> dict[str, Any]:
    """Measure a trained model as `q2_aae.py` does."""
    train, _, test = splits
    encoded = q2.encode(model.encoder, model.decoder, train, test, run.options.seed)
    found = q2.evaluate(encoded, q2.digit_classifier(run, train), splits)
    if isinstance(model, VariationalAutoencoder):
        found["loss_discriminator"] = None  # it has none
    return found


def draw_q2(rows: Mapping[str, dict], figures: Path) -> None:
    """Draw samples against neighbourhoods, with PCA as a point of its own."""
    points = {}
    for name, row in rows.items():
        accuracy, distance = row["knn_accuracy"], row["frechet_distance"]
        if accuracy is None or "signal" not in accuracy:
            continue
        if name == "default":
            linear = row["sample_quality"]["pca_samples"]["frechet_distance"]
            title = f"PCA, {row['signal_dimensions']} components"
            points[title] = accuracy["pca_signal"], linear, True
        points[name] = accuracy["signal"], distance, row["long"]
    if points:
        plots.q2_frontier(figures / "q2_frontier.png", points)


# Rows --------------------------------------------------------------------------------


class Question(NamedTuple):
    """What a question's rows need."""

    script: Any
    rows: Mapping[str, Row]
    load: Callable  # of options: the splits
    measure: Callable
    draw: Callable
    runs: Mapping[str, tuple[str, str]]  # of the script itself: title, metrics file


QUESTIONS = {
    "q1": Question(
        *(q1, Q1_ROWS, lambda o: load_mnist_m(o.data), measure_q1, draw_q1),
        {"default": ("ours", "q1_metrics.json")},
    ),
    "q2": Question(
        *(q2, Q2_ROWS, lambda o: load_digits(o.data, o.labels), measure_q2, draw_q2),
        {
            "default": ("the default run", "q2_metrics.json"),
            "control": ("the control", "q2_control_metrics.json"),
        },
    ),
}


def base_options(question: Question, arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options that hold for every row."""
    base = question.script.parse_options(arguments)
    base.data = find_file(base.data or ensure_data(question.script.DATA))
    base.run_dir = base.shared_dir / "comparisons" / base.name
    return base


def row_options(
    name: str, row: Row, base: argparse.Namespace, source: Mapping[str, str]
) -> argparse.Namespace:
    """Return a row's options; its folder bears a digest of settings, data and code."""
    options = argparse.Namespace(**vars(base) | {"name": name} | dict(row.changes))
    if not base.default_epochs:
        options.epochs = base.epochs
    if row.short:
        options.epochs = max(1, options.epochs // SHORTER)
    settings = {k: v for k, v in vars(options).items() if k not in utils.PLACES}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(source["sha256"].encode())
    for module in (utils, metrics, q1, q2, sys.modules[__name__]):
        digest.update(Path(module.__file__).read_bytes())
    options.run_dir = base.run_dir / f"{name}-{digest.hexdigest()[:8]}"
    options.figures = options.run_dir
    options.resume = (options.run_dir / utils.SETTINGS).exists()
    return options


def train_row(question_name: str, name: str, arguments: Sequence[str]) -> None:
    """Train and measure a row, or go on with it; leave what it comes to in its folder.

    A job of its own: all that it needs is in its arguments and in files.
    """
    question = QUESTIONS[question_name]
    base, row = base_options(question, arguments), question.rows[name]
    options = row_options(name, row, base, describe_source(base.data))
    splits = utils.prepare_splits(question.load(base), options)
    print(f"{name}: {row.title}", flush=True)
    # scikit-learn's own jobs stay here: on a cluster they would wait for other rows.
    with utils.RunFolder(options) as run, joblib.parallel_config("threading"):
        model = row.build(options, splits[0].images)
        run.fit(model, {}, splits[0].images, splits[1].images, lambda history: None)
        found = {
            "title": row.title,
            "long": not row.short,
            "epochs": options.epochs,
            "seed": options.seed,
            "loss_discriminator": run.rows[-1].get("discriminator_loss"),
            "training_seconds": sum(epoch["seconds"] for epoch in run.rows),
            **question.measure(model, splits, run),
        }
        write_json(run.path / FINISHED, found)


def run_jobs(jobs: Sequence[Any], workers: int, cluster: str | None) -> None:
    """Run jobs on this machine or on a Dask cluster.

    Raises:
        UsageError: the package `distributed` is missing.
    """
    if cluster is None:
        # TensorFlow reads this in each worker: more threads than cores are slow.
        threads = max(1, (os.cpu_count() or 1) // workers)
        os.environ.setdefault("TF_NUM_INTRAOP_THREADS", str(threads))
        joblib.Parallel(n_jobs=workers)(jobs)
        return
    try:
        from distributed import Client
    except ImportError:
        raise utils.UsageError("--cluster: pip install distributed") from None
    with Client(cluster), joblib.parallel_config("dask"):
        joblib.Parallel(n_jobs=-1)(jobs)


def collect(
    question: Question, base: argparse.Namespace, source: Mapping[str, str]
) -> dict[str, dict]:
    """Return all finished rows on this data; those of the scripts' own runs first."""
    found = {}
    for name, (title, file) in question.runs.items():
        path = base.figures / file
        if path.exists():
            run = json.loads(path.read_text(encoding="utf-8"))
            if run["data"]["sha256"] == source["sha256"]:
                epochs = run["settings"]["epochs"]
                found[name] = {"title": title, "long": True, "epochs": epochs} | run
    for name, row in question.rows.items():
        path = row_options(name, row, base, source).run_dir / FINISHED
        if path.exists():
            found[name] = json.loads(path.read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Train the rows that are asked for; refresh the report with all that there are."""
    parser = utils.OneLineParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("question", choices=list(QUESTIONS))
    parser.add_argument("--rows", metavar="ROW,ROW", help="default: all of them")
    parser.add_argument("--workers", type=utils.positive_int, default=1, metavar="N")
    parser.add_argument("--cluster", metavar="ADDRESS", help="of a Dask scheduler")
    asked, others = parser.parse_known_args()
    question = QUESTIONS[asked.question]
    wanted = asked.rows.split(",") if asked.rows else list(question.rows)
    for name in set(wanted) - question.rows.keys():
        names = ", ".join(question.rows)
        raise utils.UsageError(f"--rows: found {name}, expected {names}")
    base = base_options(question, others)
    with utils.RunFolder(base) as run:
        found = collect(question, base, run.source)
        jobs = [
            joblib.delayed(train_row)(asked.question, name, others)
            for name in wanted
            if name not in found
        ]
        run_jobs(jobs, asked.workers, asked.cluster)
        found = collect(question, base, run.source)
        question.draw(found, base.figures)
        seconds = sum(row["training_seconds"] for row in found.values())
        content = {"rows": found, "training_seconds": seconds}
        run.write_metrics(content, f"{asked.question}_comparisons_metrics.json")
    if base.updates_report:
        report.update()
    print(f"{len(found)} rows are in {base.figures}.")


if __name__ == "__main__":
    from extras import comparisons  # by this name workers find what is in it

    utils.run_script(comparisons.main)
