"""Question 2's comparisons: what each part of the default run is worth.

    python q2_comparisons.py                # every row of the report's tables
    python q2_comparisons.py --rows vae     # that row; the tables of what there is

Some rows are trained for as long as the default run: the control (the assignment to the
letter), the default under other seeds, and, as an outside reference, a variational
autoencoder of the same widths. The others, for a part of its epochs, lead from the
letter to the default one change at a time, and then try other choices. A row that was
interrupted goes on after its last epoch, and one that is finished is not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import utils

import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
from sklearn.decomposition import PCA

import metrics as measures
import q2_aae as q2
from read_MNIST_M import Split, load_digits

VAE_LEARNING_RATE = 1e-3


class Row(NamedTuple):
    """A row of the report's tables.

    `beta` is None but for a variational autoencoder.
    """

    title: str
    arguments: tuple[str, ...] = ()
    recipe: q2.Recipe = q2.Recipe()
    beta: float | None = None


PLAIN = q2.Recipe(
    decoder_skips=False,
    start_dimensions=0,
    discriminator_learning_rate=q2.LEARNING_RATE,
    discriminator_rate_decays=True,
    discriminator_steps=1,
    momentum=0.9,
    gradient_penalty=0.0,
    weight_decay=0.0,
)
FULL_ROWS = {
    "literal": Row("the assignment to the letter", ("--literal",), PLAIN),
    "vae": Row("variational autoencoder", beta=1.0),
    "default": Row("the default run"),
    "seed-1": Row("the same, seed 1", ("--seed", "1")),
    "seed-2": Row("the same, seed 2", ("--seed", "2")),
}
SEEDS = ("default", "seed-1", "seed-2")
OWN_RUNS = ("literal", "default")  # what q2_aae.py trains by itself

SHORTER = 10  # times fewer epochs
SHORT = ("--epochs", str(q2.EPOCHS // SHORTER))
LETTER = (*SHORT, "--literal")
GAUSSIAN = (*LETTER, "--encoder", "gaussian")
NON_SATURATING = (*GAUSSIAN, "--encoder-loss", "non-saturating")
STARTED = PLAIN._replace(start_dimensions=q2.START_DIMENSIONS)
NIMBLE = STARTED._replace(momentum=q2.MOMENTUM)
SMOOTH = NIMBLE._replace(gradient_penalty=q2.GRADIENT_PENALTY)
DECAYED = SMOOTH._replace(weight_decay=q2.WEIGHT_DECAY)
STEADY = DECAYED._replace(
    discriminator_learning_rate=q2.DISCRIMINATOR_LEARNING_RATE,
    discriminator_rate_decays=False,
)
SKIPPED = STEADY._replace(decoder_skips=True)
DEFAULT = q2.Recipe()
SHORT_ROWS = {
    "letter": Row("the assignment to the letter", LETTER, PLAIN),
    "gaussian": Row("+ Gaussian encoder", GAUSSIAN, PLAIN),
    "non-saturating": Row("+ −log D in (c)", NON_SATURATING, PLAIN),
    "one-adam": Row("+ one Adam for the weighted sum", SHORT, PLAIN),
    "start": Row("+ start at principal components", SHORT, STARTED),
    "nimble": Row("+ less momentum", SHORT, NIMBLE),
    "smooth": Row("+ R1 on the discriminator", SHORT, SMOOTH),
    "decayed": Row("+ weight decay", SHORT, DECAYED),
    "steady": Row("+ the discriminator's rate stays", SHORT, STEADY),
    "skipped": Row("+ skips in the decoder", SHORT, SKIPPED),
    "whole": Row("+ up to four steps of (b): the default", SHORT),
    "shallow": Row(
        "the default with two hidden layers",
        SHORT,
        DEFAULT._replace(hidden=q2.HIDDEN[:2]),
    ),
    "wide-start": Row(
        "the default from 40 components", SHORT, DEFAULT._replace(start_dimensions=40)
    ),
    "narrow-start": Row(
        "the default from 8 components", SHORT, DEFAULT._replace(start_dimensions=8)
    ),
    "light": Row(
        "the default with (c) at half its weight",
        SHORT,
        DEFAULT._replace(adversarial_weight=q2.ADVERSARIAL_WEIGHT / 2),
    ),
    "heavy": Row(
        "the default with (c) at twice its weight",
        SHORT,
        DEFAULT._replace(adversarial_weight=q2.ADVERSARIAL_WEIGHT * 2),
    ),
    "short-vae": Row("variational autoencoder", SHORT, beta=1.0),
}
ROWS = FULL_ROWS | SHORT_ROWS


def parse_options(
    arguments: Sequence[str] | None = None,
) -> tuple[list[str], list[str]]:
    """Read the command line: the rows' names, and what is q2_aae.py's to read."""
    parser = utils.OneLineParser(
        description="Train and measure the rows of the report's table on question 2.",
        epilog="Settings of q2_aae.py, such as --quick or --data, hold for every row.",
    )
    parser.add_argument(
        "--rows",
        metavar="ROW,ROW",
        default=",".join(ROWS),
        help="what to train and measure (default: %(default)s)",
    )
    options, others = parser.parse_known_args(arguments)
    rows = options.rows.split(",")
    for name in rows:
        if name not in ROWS:
            raise utils.UsageError(f"--rows: found {name}, expected {', '.join(ROWS)}")
    return rows, others


class VariationalAutoencoder(q2.OneLaunch):
    """Kingma & Welling 2014 (arXiv:1312.6114), with a Bernoulli likelihood.

    Args:
        encoder: as `q2_aae.build_encoder` returns it, of kind "gaussian".
        decoder: as `q2_aae.build_decoder` returns it.
        beta: weight of the divergence (Higgins et al. 2017); 1 is the evidence bound.
    """

    def __init__(self, encoder: keras.Model, decoder: keras.Model, beta: float) -> None:
        super().__init__()
        self.encoder, self.decoder, self.beta = encoder, decoder, beta
        parts = [encoder.get_layer(n).output for n in ("mean", "log_variance")]
        self.posterior = keras.Model(encoder.inputs, [encoder.output, *parts])
        self.mse = keras.metrics.Mean("mse")
        self.built = True

    def compile(self, learning_rate: float, epochs: int, steps: int) -> None:
        """Give it an Adam, its rate as the default run's; see `utils.falling_rate`."""
        rate = utils.falling_rate(learning_rate, epochs, steps)
        super().compile(utils.FusedAdam(rate), steps)
        self.optimizer.build(self.trainable_variables)

    @property
    def metrics(self) -> list[keras.Metric]:
        """What an epoch's log shows, reset when the next begins."""
        return [self.mse]

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Return the reconstructions, float32 (N, 784), of images in [0, 1]."""
        return self.decoder(self.encoder(x, training=training), training=training)

    def minus_bound(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return what training minimises, in nats, and the reconstructions (N, 784)."""
        codes, mean, log_variance = self.posterior(x, training=True)
        restored = self.decoder(codes, training=True)
        surprise = q2.PIXELS * keras.losses.binary_crossentropy(x, restored)
        divergence = 0.5 * tf.reduce_sum(
            tf.square(mean) + tf.exp(log_variance) - 1.0 - log_variance, axis=-1
        )
        return tf.reduce_mean(surprise + self.beta * divergence), restored

    def train_step(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        """Take a step up the evidence bound on a batch of uint8 images (N, 784)."""
        x = utils.unit_floats(images)
        with tf.GradientTape() as tape:
            loss, restored = self.minus_bound(x)
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        self.mse.update_state(tf.square(x - restored))
        return {"mse": self.mse.result()}

    def test_step(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        """Measure the reconstruction of a batch of uint8 images (N, 784)."""
        x = utils.unit_floats(images)
        self.mse.update_state(tf.square(x - self(x)))
        return {"mse": self.mse.result()}


def run_options(name: str, others: Sequence[str]) -> argparse.Namespace:
    """Return the completed command line of a row, in a run folder of its own."""
    row = ROWS[name]
    options = q2.parse_options([*row.arguments, *others])
    root = options.run_dir.parent
    options.run_dir = root / options.name
    if name not in OWN_RUNS:
        options.run_dir = root / "q2_comparisons" / name
        options.figures = options.run_dir  # of its history
    if not options.literal:
        options.recipe = row.recipe._asdict()
    if row.beta is not None:
        options.learning_rate = VAE_LEARNING_RATE
        options.recipe = {"beta": row.beta}
    options.resume = utils.RunFolder.holds_a_run(options.run_dir)
    return options


def build_model(
    row: Row, options: argparse.Namespace, pca: PCA, images: np.ndarray
) -> keras.Model:
    """Build and compile a row's model; see `q2_aae.build_model`."""
    if row.beta is None:
        return q2.build_model(options, pca, images, row.recipe)
    encoder = q2.build_encoder(options.code_dim, "gaussian", options.seed)
    decoder = q2.build_decoder(options.code_dim)
    model = VariationalAutoencoder(encoder, decoder, row.beta)
    steps = utils.steps_per_epoch(images, options.batch_size)
    model.compile(options.learning_rate, options.epochs, steps)
    return model


def measure(
    row: Row,
    options: argparse.Namespace,
    splits: Sequence[Split],
    pca: PCA,
    classifier: keras.Model | None,
) -> dict[str, Any]:
    """Train a row's model, or go on with it, and measure it as `q2_aae.py` does."""
    train_split, valid, test = splits
    folder = utils.RunFolder(options)
    keras.utils.set_random_seed(options.seed)
    model = build_model(row, options, pca, train_split.images)
    history = q2.train(model, train_split, valid, options, folder)
    codes = utils.predict(model.encoder, test.images)
    posterior = q2.posterior(model.encoder, train_split.images)
    steps = int(model.optimizer.iterations.numpy())
    with q2.fresh_discriminator(*posterior, steps) as judge:
        samples = q2.draw_samples(model.decoder, options.code_dim, options.seed)
        measured = q2.evaluate(model, valid, test, codes, samples, classifier)
    loss = history.get("discriminator_loss")
    return {
        **measured,
        "validation_mse": float(history["val_mse"][-1]),
        "loss_discriminator": None if loss is None else float(loss[-1]),
        "fresh_discriminator_accuracy": q2.discriminator_accuracy(judge, codes),
        "training_seconds": float(history["seconds"].sum()),
        "epochs": len(history["epoch"]),
    }


def label_points(axes: plt.Axes, places: Mapping[str, tuple[float, float]]) -> None:
    """Write its name beside each point of the frontier, but for the further seeds.

    Names in a crowd stand to the left of it, one below the other.

    Args:
        axes: both logarithmic, the points drawn.
        places: by name, the decimal logarithms of a point's coordinates.
    """
    axes.figure.draw_without_rendering()  # settles where the points are
    lowest = math.inf  # height in typographic points of the last name beside a crowd
    for name, (x, y) in sorted(places.items(), key=lambda item: -item[1][1]):
        if name in SEEDS[1:]:
            continue
        if name == SEEDS[0]:  # beside the rightmost of its seeds
            x = max(places[seed][0] for seed in SEEDS if seed in places)
        point = 10**x, 10**y
        label = {
            "text": name,
            "xy": point,
            "textcoords": "offset points",
            "fontsize": 8,
        }
        crowded = any(
            -0.005 < other_x - x < 0.06 and abs(other_y - y) < 0.1
            for other, (other_x, other_y) in places.items()
            if other not in (name, *SEEDS[1:])
        )
        if not crowded:
            axes.annotate(**label, xytext=(6, -3))
            continue
        leftmost = min(
            other_x
            for other_x, other_y in places.values()
            if abs(other_x - x) < 0.06 and abs(other_y - y) < 0.25
        )
        ends = axes.transData.transform([point, (10**leftmost, 10**y)])
        (right, height), (left, _) = ends * 72 / axes.figure.dpi
        lowest = min(height + 36, lowest - 10)
        axes.annotate(
            **label,
            xytext=(left - right - 24, lowest - height - 3),
            ha="right",
            arrowprops={"arrowstyle": "-", "lw": 0.4, "relpos": (1, 0.5)},
        )


def draw_frontier(path: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the Fréchet distance of samples against the test MSE, a point a row."""
    with utils.figure(path, size=(7.5, 4.8)) as (_, axes):
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="test MSE (pixels in 0..1)",
            ylabel="Fréchet distance of samples",
            title="Reconstruction against samples: lower left is better",
        )
        places = {
            name: (math.log10(row["test_mse"]), math.log10(row["frechet_distance"]))
            for name, row in rows.items()
        }
        for name, (x, y) in places.items():
            full = name in FULL_ROWS
            colour = utils.ACCENT if full else utils.INK
            axes.plot(10**x, 10**y, "o" if full else ".", color=colour)
        label_points(axes, places)
        for marker, colour, label in (
            ("o", utils.ACCENT, "as long as the default"),
            (".", utils.INK, f"1/{SHORTER} as long"),
        ):
            axes.plot([], [], marker, color=colour, label=label)
        axes.legend(loc="lower right")


def draw_controls(
    figures: Path, runs: Mapping[str, argparse.Namespace], test: Split
) -> None:
    """Draw samples and prior match of the default run beside the literal one's.

    Args:
        figures: folder of the PNGs.
        runs: the completed command lines of the rows "literal" and "default".
        test: its images are encoded.
    """
    codes, samples = {}, []
    for name, options in runs.items():
        encoder, decoder = (
            keras.saving.load_model(options.run_dir / f"{part}.keras")
            for part in ("encoder", "decoder")
        )
        codes[name] = utils.predict(encoder, test.images)
        samples.append(q2.draw_samples(decoder, options.code_dim, options.seed)[:40])
    utils.image_grid(
        figures / "q2_control_samples.png",
        np.concatenate(samples).reshape(-1, 28, 28),
        "The same draws from the prior, decoded: to the letter above, default below",
        ("letter", "", "default", ""),
        columns=20,
    )
    q2.draw_prior_match(
        figures / "q2_control_prior_match.png", codes["default"], codes["literal"]
    )


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table of rows in Markdown."""

    def cells(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
        match, loss = found["prior_match"], found["loss_discriminator"]
        low, high = (match[f"covariance_eigenvalue_{end}"] for end in ("min", "max"))
        distance = found["frechet_distance"]
        return (
            f"{ROWS[name].title} (`{name}`)",
            f"{found['test_mse']:.4f}",
            "" if loss is None else f"{loss:.2f}",
            f"{100 * found['fresh_discriminator_accuracy']:.0f} %",
            f"{low:.2g} .. {high:.2g}",
            f"{match['mmd'] * 1e4:.1f}",
            "" if distance is None else f"{distance:.1f}",
            f"{found['parzen_log_likelihood']:.0f}",
            f"{found['training_seconds']:.0f}",
        )

    header = (
        *("what was trained", "test MSE", "L_D", "fresh D", "eigenvalues"),
        *("MMD² · 10⁴", "Fréchet", "Parzen", "seconds"),
    )
    return utils.markdown_table(header, [cells(*item) for item in rows.items()])


def report_blocks(
    rows: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, Any]
) -> dict[str, str]:
    """Return the report's blocks, in Markdown."""
    parts = [table({name: rows[name] for name in FULL_ROWS if name in rows})]
    seeds = [rows[name] for name in SEEDS if name in rows]
    if len(seeds) > 1 and seeds[0]["frechet_distance"] is not None:
        spread = "; ".join(
            f"{title} {np.mean(values):{form}} ± {np.std(values, ddof=1):{form}}"
            for title, values, form in (
                ("test MSE", [row["test_mse"] for row in seeds], ".4f"),
                ("L_D", [row["loss_discriminator"] for row in seeds], ".3f"),
                (
                    "fresh discriminator's accuracy in %",
                    [100 * row["fresh_discriminator_accuracy"] for row in seeds],
                    ".1f",
                ),
                (
                    "MMD² · 10⁴",
                    [1e4 * row["prior_match"]["mmd"] for row in seeds],
                    ".1f",
                ),
                ("Fréchet distance", [row["frechet_distance"] for row in seeds], ".2f"),
            )
        )
        parts.append(
            f"The default over {len(seeds)} seeds, mean and standard deviation: "
            f"{spread}."
        )
    if {"vae", "default"} <= rows.keys() and rows["vae"]["frechet_distance"]:
        ratio = rows["vae"]["frechet_distance"] / rows["default"]["frechet_distance"]
        parts.append(
            "The variational autoencoder's Fréchet distance is "
            f"{ratio:.1f} times the default run's."
        )
    parts.append(utils.provenance(metrics))
    short = table({name: rows[name] for name in SHORT_ROWS if name in rows})
    return {
        "q2.comparisons": "\n\n".join(parts),
        "q2.ablation": f"{SHORT[1]} epochs each:\n\n{short}",
    }


def main() -> None:
    """Train the rows that are asked for; refresh the report with all that there are."""
    watch = utils.Stopwatch()
    wanted, others = parse_options()
    base = q2.parse_options(others)
    splits = utils.limit_splits(load_digits(base.data), base.quick)
    runs = {name: run_options(name, others) for name in ROWS}
    files = {
        name: options.run_dir / "comparison.json" for name, options in runs.items()
    }
    train_split, _, test = splits
    classifier = None
    if train_split.labels is not None:
        classifier = measures.train_digit_classifier(
            train_split.images, train_split.labels
        )
    pca = measures.fit_pca(train_split.images, base.code_dim)
    for name in wanted:
        print(f"{name}: {ROWS[name].title}", flush=True)
        found = measure(ROWS[name], runs[name], splits, pca, classifier)
        with utils.replacing(files[name]) as temporary:
            temporary.write_text(json.dumps(found, indent=2), encoding="utf-8")

    rows = {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name, file in files.items()
        if file.exists()
    }
    figures = base.figures
    if rows.keys() >= set(OWN_RUNS):
        draw_controls(figures, {name: runs[name] for name in OWN_RUNS}, test)
    if classifier is not None:
        draw_frontier(figures / "q2_frontier.png", rows)
    metrics = utils.write_metrics(
        base,
        {
            "rows": rows,
            "training_seconds": sum(row["training_seconds"] for row in rows.values()),
        },
        watch,
        "q2_comparisons_metrics.json",
    )
    if base.updates_report:
        utils.update_report(report_blocks(rows, metrics))
    print(f"{len(rows)} of {len(ROWS)} rows are in {figures}.")


if __name__ == "__main__":
    utils.run_script(main)
