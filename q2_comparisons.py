"""Question 2's comparisons: what each part of the default run is worth.

    python q2_comparisons.py          # every row of the report's table
    python q2_comparisons.py vae      # that row, then the table of what there is

The rows lead from the assignment to the letter to the default run, one change at a
time; then come other weights of the adversary, other seeds, two hidden layers in place
of four, and, as an outside reference, a variational autoencoder of the same widths.
Every row is trained for as long, on the same images, and goes on from its last epoch
if it was interrupted; a row that is finished is not trained again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import utils

import keras
import numpy as np
import tensorflow as tf

import metrics as measures
import q2_aae as q2
from read_MNIST_M import Split, load_digits

VAE_LEARNING_RATE = 1e-3  # decays to zero along a cosine, as the default run's


class Row(NamedTuple):
    """A row of the report's table.

    `beta` is None but for a variational autoencoder.
    """

    title: str
    arguments: tuple[str, ...] = ()
    recipe: q2.Recipe = q2.Recipe()
    beta: float | None = None


PLAIN = q2.Recipe(
    starts_at_pca=False,
    discriminator_learning_rate=q2.LEARNING_RATE,
    discriminator_rate_decays=True,
    momentum=0.9,
    gradient_penalty=0.0,
)
STARTED = PLAIN._replace(starts_at_pca=True)
FASTER = STARTED._replace(
    discriminator_learning_rate=q2.DISCRIMINATOR_LEARNING_RATE, momentum=q2.MOMENTUM
)
SMOOTH = FASTER._replace(gradient_penalty=q2.GRADIENT_PENALTY)
LETTER = ("--literal", "--encoder", "gaussian")
ROWS = {
    "literal": Row("the assignment to the letter", ("--literal",)),
    "gaussian": Row("+ Gaussian encoder", LETTER),
    "non-saturating": Row(
        "+ −log D in (c)", (*LETTER, "--encoder-loss", "non-saturating")
    ),
    "one-adam": Row("+ one Adam for the weighted sum", (), PLAIN),
    "start": Row("+ start at principal components", (), STARTED),
    "faster": Row("+ faster discriminator, less momentum", (), FASTER),
    "smooth": Row("+ R1 on the discriminator", (), SMOOTH),
    "default": Row("+ the discriminator's rate stays: **the default**"),
    "seed-1": Row("the default, seed 1", ("--seed", "1")),
    "seed-2": Row("the default, seed 2", ("--seed", "2")),
    "shallow": Row("two hidden layers", (), q2.Recipe(hidden=q2.HIDDEN[:2])),
    "weight-5": Row("weight 5", (), q2.Recipe(adversarial_weight=5.0)),
    "weight-80": Row("weight 80", (), q2.Recipe(adversarial_weight=80.0)),
    "vae": Row("variational autoencoder", beta=1.0),
    "vae-0.25": Row("variational autoencoder, β = 0.25", beta=0.25),
}
SEEDS = ("default", "seed-1", "seed-2")
OWN_RUNS = ("literal", "default")  # what q2_aae.py trains by itself


def parse_options(
    arguments: Sequence[str] | None = None,
) -> tuple[list[str], list[str]]:
    """Read the command line: the rows' names, and what is q2_aae.py's to read."""
    parser = utils.OneLineParser(
        description="Train and measure the rows of the report's table on question 2.",
        epilog="Settings of q2_aae.py, such as --quick or --data, hold for every row.",
    )
    parser.add_argument(
        "rows",
        nargs="*",
        metavar="ROW",
        help=f"of {', '.join(ROWS)} (default: all)",
    )
    options, others = parser.parse_known_intermixed_args(arguments)
    for name in options.rows:
        if name not in ROWS:
            raise utils.UsageError(f"found row {name}, expected {', '.join(ROWS)}")
    return options.rows or list(ROWS), others


class VariationalAutoencoder(keras.Model):
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

    def compile(self, learning_rate: float, steps: int) -> None:
        """Give it an Adam whose rate decays to zero over `steps` along a cosine."""
        rate = keras.optimizers.schedules.CosineDecay(learning_rate, steps)
        super().compile(optimizer=keras.optimizers.Adam(rate))
        self.optimizer.build(self.trainable_variables)

    @property
    def metrics(self) -> list[keras.Metric]:
        """What an epoch's log shows, reset when the next begins."""
        return [self.mse]

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Return the reconstructions, float32 (N, 784), of images in [0, 1]."""
        return self.decoder(self.encoder(x, training=training), training=training)

    def train_step(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        """Take a step up the evidence bound on a batch of uint8 images (N, 784)."""
        x = utils.unit_floats(images)
        with tf.GradientTape() as tape:
            codes, mean, log_variance = self.posterior(x, training=True)
            restored = self.decoder(codes, training=True)
            likelihood = -q2.PIXELS * keras.losses.binary_crossentropy(x, restored)
            divergence = 0.5 * tf.reduce_sum(
                tf.square(mean) + tf.exp(log_variance) - 1.0 - log_variance, axis=-1
            )
            loss = tf.reduce_mean(self.beta * divergence - likelihood)
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
    if name not in OWN_RUNS:
        options.run_dir = options.run_dir.parent / "q2_comparisons" / name
        options.figures = options.run_dir  # its history and its metrics
    options.recipe = row.recipe._asdict()
    if row.beta is not None:
        options.learning_rate = VAE_LEARNING_RATE
        options.recipe = {"beta": row.beta}
    options.resume = utils.RunFolder.holds_a_run(options.run_dir)
    return options


def train(
    row: Row, options: argparse.Namespace, splits: Sequence[Split]
) -> tuple[keras.Model, dict[str, np.ndarray]]:
    """Train a row's model, or go on with it; return it with its history."""
    train_split, valid, _ = splits
    folder = utils.RunFolder(options)
    keras.utils.set_random_seed(options.seed)
    steps = options.epochs * (len(train_split.images) // options.batch_size or 1)
    if row.beta is None:
        pca = measures.fit_pca(train_split.images, options.code_dim)
        model = q2.build_model(options, pca, steps, row.recipe)
        parts = {"discriminator": model.discriminator}
    else:
        encoder = q2.build_encoder(options.code_dim, "gaussian", options.seed)
        decoder = q2.build_decoder(options.code_dim)
        model = VariationalAutoencoder(encoder, decoder, row.beta)
        model.compile(options.learning_rate, steps)
        parts = {}
    history = folder.fit(
        model,
        train_split.images,
        options,
        tf.identity,
        tf.data.Dataset.from_tensor_slices(valid.images).batch(500),
        encoder=model.encoder,
        decoder=model.decoder,
        **parts,
    )
    return model, history


def measure(
    row: Row,
    options: argparse.Namespace,
    splits: Sequence[Split],
    classifier: keras.Model | None,
) -> dict[str, Any]:
    """Train a row's model and measure it, as `q2_aae.py` does."""
    model, history = train(row, options, splits)
    _, valid, test = splits
    codes = utils.predict(model.encoder, test.images)
    samples = q2.draw_samples(model.decoder, options.code_dim, options.seed)
    loss = history.get("discriminator_loss")
    return {
        **q2.evaluate(model, valid, test, codes, samples, classifier),
        "validation_mse": float(history["val_mse"][-1]),
        "loss_discriminator": None if loss is None else float(loss[-1]),
        "training_seconds": float(history["seconds"].sum()),
        "epochs": len(history["epoch"]),
    }


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
        for name, found in rows.items():
            colour = utils.INK
            if name in SEEDS or name.startswith("weight"):
                colour = utils.ACCENT
            elif name.startswith("vae"):
                colour = utils.PALE
            point = found["test_mse"], found["frechet_distance"]
            axes.plot(*point, "o", color=colour)
            axes.annotate(
                name, point, (4, 3), textcoords="offset points", fontsize=8, color="k"
            )


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


def report_block(
    rows: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, Any]
) -> str:
    """Return the report's block, in Markdown."""

    def cells(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
        match, loss = found["prior_match"], found["loss_discriminator"]
        low, high = (match[f"covariance_eigenvalue_{end}"] for end in ("min", "max"))
        distance = found["frechet_distance"]
        return (
            f"{ROWS[name].title} (`{name}`)",
            f"{found['test_mse']:.4f}",
            "" if loss is None else f"{loss:.2f}",
            f"{low:.2g} .. {high:.2g}",
            f"{match['mmd'] * 1e4:.1f}",
            "" if distance is None else f"{distance:.1f}",
            f"{found['parzen_log_likelihood']:.0f}",
            f"{found['training_seconds']:.0f}",
        )

    header = (
        *("what was trained", "test MSE", "L_D", "eigenvalues", "MMD² · 10⁴"),
        *("Fréchet", "Parzen", "seconds"),
    )
    parts = [utils.markdown_table(header, [cells(*item) for item in rows.items()])]
    seeds = [rows[name] for name in SEEDS if name in rows]
    if len(seeds) > 1 and seeds[0]["frechet_distance"] is not None:
        columns = (
            ("test MSE", [row["test_mse"] for row in seeds], ".4f"),
            ("L_D", [row["loss_discriminator"] for row in seeds], ".3f"),
            ("MMD² · 10⁴", [row["prior_match"]["mmd"] * 1e4 for row in seeds], ".1f"),
            ("Fréchet distance", [row["frechet_distance"] for row in seeds], ".1f"),
        )
        spread = "; ".join(
            f"{title} {np.mean(values):{form}} ({min(values):{form}} .. "
            f"{max(values):{form}})"
            for title, values, form in columns
        )
        parts.append(f"The default over {len(seeds)} seeds, mean and range: {spread}.")
    if {"vae", "default"} <= rows.keys() and rows["vae"]["frechet_distance"]:
        ratio = rows["default"]["frechet_distance"] / rows["vae"]["frechet_distance"]
        parts.append(
            "The default run's Fréchet distance is "
            f"{ratio:.2f} times the variational autoencoder's."
        )
    return "\n\n".join((*parts, utils.provenance(metrics)))


def main() -> None:
    """Train the rows that are asked for; refresh the report with all that there are."""
    started = time.perf_counter()
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
    for name in wanted:
        print(f"{name}: {ROWS[name].title}", flush=True)
        found = measure(ROWS[name], runs[name], splits, classifier)
        with utils.replacing(files[name]) as temporary:
            temporary.write_text(json.dumps(found, indent=2), encoding="utf-8")

    rows = {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name, file in files.items()
        if file.exists()
    }
    figures = base.figures
    if {"literal", "default"} <= rows.keys():
        controls = {name: runs[name] for name in ("literal", "default")}
        draw_controls(figures, controls, test)
    if classifier is not None:
        draw_frontier(figures / "q2_frontier.png", rows)
    metrics = utils.write_metrics(
        base,
        {
            "rows": rows,
            "training_seconds": sum(row["training_seconds"] for row in rows.values()),
        },
        started,
        "q2_comparisons_metrics.json",
    )
    if base.updates_report:
        utils.update_report({"q2.comparisons": report_block(rows, metrics)})
    print(f"{len(rows)} of {len(ROWS)} rows are in {figures}.")


if __name__ == "__main__":
    sys.exit(utils.run_script(main))
