"""Beyond the homework: sizes, seeds, references, and what each choice is worth.

    python -m extras.comparisons q1                    # question 1: all rows
    python -m extras.comparisons q2 --rows vae,short   # these rows of question 2
    python -m extras.comparisons q2 --workers 2        # two rows at a time

Settings of the question's script, such as --quick or --data, hold for every row. A row
is trained by a process of its own, in a folder of its own, and an interrupted row is
continued. `figures/q1_comparisons_metrics.json` and its sibling for question 2 hold all
rows that were ever trained, each with what made it. A command replaces only rows that
it was asked for, and only those that other code, data or settings made.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import utils

import keras
import tensorflow as tf

import metrics
import plots
import q1_cnn_autoencoder as q1
import q2_aae as q2
import report
from files import (
    code_digest,
    describe_source,
    read_json,
    training_code,
    versions,
    write_json,
)
from make_data import ensure_data
from read_MNIST_M import find_file, load_digits, load_mnist_m

SHORTER = 3  # times fewer epochs, in the short rows
SIZES = ("code-16", "code-64", "default", "code-256")


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the report's tables: what differs from the script's own run."""

    title: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    short: bool = False  # trained for a part of the default's epochs
    activation: str = q1.ACTIVATION  # question 1
    recipe: q2.Recipe = q2.DEFAULT  # question 2
    kind: type[q2.AdversarialAutoencoder] = q2.AdversarialAutoencoder  # question 2


# Variational autoencoders ------------------------------------------------------------


@keras.saving.register_keras_serializable("comparisons")
class Sampling(keras.layers.Layer):
    """Draws from a normal with a mean and a log-variance (Kingma & Welling 2014)."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator()

    def call(self, inputs: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        """Return mean + exp(log_variance / 2) * noise, float32 (N, D)."""
        mean, log_variance = inputs
        noise = keras.random.normal(tf.shape(mean), seed=self.seed_generator)
        return mean + tf.exp(0.5 * log_variance) * noise


class VariationalAutoencoder(q2.AdversarialAutoencoder):
    """Kingma & Welling 2014 (arXiv:1312.6114), with a Bernoulli likelihood.

    It has the default's layers; its discriminator is left alone.
    """

    BETA = 1.0  # weight of the divergence from the prior (Higgins et al. 2017)

    def build_networks(self, code_dim: int) -> None:
        """Build an encoder that draws from q(z|x), and the default's other networks."""
        image = keras.Input((q2.PIXELS,))
        hidden = q2.hidden_layers(image, self.recipe.hidden)
        mean = keras.layers.Dense(code_dim, name="informative")(hidden)
        log_variance = keras.layers.Dense(code_dim, name="log_variance")(hidden)
        code = Sampling()([mean, log_variance])
        self.encoder = keras.Model(image, code, name="encoder")
        self.mean_encoder = keras.Model(image, mean)
        self.posterior = keras.Model(image, [code, mean, log_variance])
        self.decoder = q2.build_decoder(code_dim, self.recipe)
        self.discriminator = q2.build_discriminator(code_dim, self.recipe)

    def compile(self, learning_rate: float, schedule: utils.Schedule) -> None:
        """Compile as the default, but without XLA, with which the loss became NaN."""
        super().compile(learning_rate, schedule)
        self.jit_compile = False

    def train_step(self, data: tuple[tf.Tensor, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Take a step up the evidence bound on a batch x, float32 (N, 784)."""
        x, _ = data
        with tf.GradientTape() as tape:
            loss, x_hat = self.negative_bound(x)
        variables = self.encoder.trainable_variables + self.decoder.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return self.update_means(x, x_hat, 0.0, 0.0)

    def negative_bound(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return what training minimises, in nats, and the reconstructions (N, 784)."""
        codes, mean, log_variance = self.posterior(x)
        x_hat = self.decoder(codes)
        surprise = q2.PIXELS * keras.losses.binary_crossentropy(x, x_hat)
        divergence = 0.5 * tf.reduce_sum(
            tf.square(mean) + tf.exp(log_variance) - 1.0 - log_variance, axis=-1
        )
        return tf.reduce_mean(surprise + self.BETA * divergence), x_hat


class HalfWeight(VariationalAutoencoder):
    """With half the weight on the divergence, so with less noise in the code."""

    BETA = 0.5


# Rows --------------------------------------------------------------------------------


Q1_ROWS = {
    "code-16": Row("ours", {"code_dim": 16}),
    "code-64": Row("ours", {"code_dim": 64}),
    "code-256": Row("ours", {"code_dim": 256}),
    "seed-1": Row("ours, seed 1", {"seed": 1}),
    "seed-2": Row("ours, seed 2", {"seed": 2}),
    "relu": Row("ours with ReLU", activation="relu"),
    "gelu": Row("ours with GELU", activation="gelu"),
}

VAE = {"learning_rate": 1e-3, "code_dim": q2.INFORMATIVE}
# One thing is changed at a time; what has to change with it is named.
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "short": ("the default, shorter", {}),
    "without-c": ("without stage (c)", {"rate_c": 0.0}),
    "all-informative": ("with all 100 coordinates computed", {"informative": None}),
    "no-skips": ("without skips", {"decoder_skips": False}),
    "no-decay": ("without weight decay", {"weight_decay": 0.0}),
    "momentum": ("with momentum 0.9", {"beta_1": 0.9}),
    "epsilon": ("with Adam's own epsilon in (c)", {"epsilon_c": 1e-7}),
}
Q2_ROWS = {
    "seed-1": Row("the default, seed 1", {"seed": 1}),
    "seed-2": Row("the default, seed 2", {"seed": 2}),
    "vae": Row("a variational one", VAE, short=True, kind=VariationalAutoencoder),
    "vae-half": Row("a variational one, β = 1/2", VAE, short=True, kind=HalfWeight),
}
for _name, (_title, _recipe) in CHANGES.items():
    _changed = q2.DEFAULT._replace(**_recipe)
    Q2_ROWS[_name] = Row(_title, {}, short=True, recipe=_changed)
    Q2_ROWS[f"{_name}-1"] = Row(
        f"{_title}, seed 1", {"seed": 1}, short=True, recipe=_changed
    )

SCRIPTS: dict[str, ModuleType] = {"q1": q1, "q2": q2}
ROWS = {"q1": Q1_ROWS, "q2": Q2_ROWS}


def row_settings(base: utils.Settings, question: str, name: str) -> utils.Settings:
    """Return a row's settings; a digest of what makes it names its folder."""
    row = ROWS[question][name]
    settings = dataclasses.replace(base, name=name, **row.settings)
    made_by = json.dumps(what_makes(settings, question), sort_keys=True)
    digest = hashlib.sha256(made_by.encode()).hexdigest()[:8]
    folder = base.run_dir.parent / "comparisons" / question / f"{name}-{digest}"
    resume = (folder / "settings.json").exists()
    return dataclasses.replace(
        settings, run_dir=folder, figures=folder, resume=resume, updates_report=False
    )


def what_makes(settings: utils.Settings, question: str) -> dict[str, Any]:
    """Return all that a row's numbers follow from but versions and machine."""
    row = ROWS[question][settings.name]
    made_by: dict[str, Any] = {
        "epochs": settings.epochs,
        "short": row.short,
        "batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "code_dim": settings.code_dim,
        "seed": settings.seed,
        "quick": settings.quick,
        "data": describe_source(settings.data)["sha256"],
        "code": training_code(SCRIPTS[question].__file__),
    }
    if question == "q1":
        made_by["activation"] = row.activation
    else:
        # Tuples become lists, as they do in a JSON file.
        made_by["recipe"] = json.loads(json.dumps(row.recipe._asdict()))
        ours = [each for each in row.kind.__mro__ if each.__module__ == __name__]
        sources = [inspect.getsource(each) for each in (Sampling, *ours)]
        made_by["variant"] = code_digest(sources)
    return made_by


# Training and measuring --------------------------------------------------------------


def run_q1(settings: utils.Settings, row: Row) -> dict[str, Any]:
    """Train a row of question 1; return its measures, beside those of PCA."""
    splits = load_mnist_m(settings.data)
    train, valid, test = utils.prepare_splits(splits, settings.data, settings.quick)
    schedule = utils.training_schedule(settings, len(train.images), q1.EPOCHS)
    run = utils.RunFolder(settings, describe_source(settings.data), schedule)
    with run.in_use():
        autoencoder = q1.build_model(settings, schedule, row.activation)
        pca = metrics.fit_pca(train.images, settings.code_dim)
        history = q1.train_model(run, autoencoder, train.images, valid.images, pca)
        mse = autoencoder.evaluate(test.images, test.images, verbose=0)
        return {
            "epochs": schedule.epochs,
            "code_dim": settings.code_dim,
            "training_seconds": float(history["seconds"].sum()),
            "validation_mse": float(history["val_loss"][-1]),
            "test_mse": mse,
            "pca_test_mse": metrics.pca_reconstruction_mse(pca, test.images),
        }


def run_q2(settings: utils.Settings, row: Row) -> dict[str, Any]:
    """Train a row of question 2; return its measures, as `q2_aae.py` takes them."""
    splits = load_digits(settings.data, settings.labels)
    train, valid, test = utils.prepare_splits(splits, settings.data, settings.quick)
    count = len(train.images)
    schedule = utils.training_schedule(settings, count, q2.EPOCHS, q2.LEAST_STEPS)
    if row.short:
        schedule = schedule._replace(epochs=max(1, schedule.epochs // SHORTER))
    run = utils.RunFolder(settings, describe_source(settings.data), schedule)
    with run.in_use():
        model = q2.build_model(settings, schedule, row.recipe, row.kind)
        history = q2.train_model(run, model, train.images, valid.images)
        seed = settings.seed
        encoded = q2.encode(model.encoder, model.decoder, train, test, seed)
        # The classifier that judges the scripts' own runs, too.
        classifier = q2.digit_classifier(settings.run_dir.parents[2], train)
        measures = q2.evaluate(encoded, model.informative, classifier, train, test)
        loss = float(history["discriminator_loss"][-1])
        if isinstance(model, VariationalAutoencoder):
            loss = None  # its discriminator is not trained
            # Neighbours are found among means, not among draws from q(z|x).
            train_means = utils.predict(model.mean_encoder, train.images)
            test_means = utils.predict(model.mean_encoder, test.images)
            measures |= metrics.dimension_reduction(
                train, test, train_means, test_means
            )
        return {
            "epochs": schedule.epochs,
            "training_seconds": float(history["seconds"].sum()),
            "loss_discriminator": loss,
            **measures,
        }


def train_row(base: utils.Settings, question: str, name: str) -> None:
    """Train and measure a row, or continue it; write `row.json` into its folder."""
    settings, row = row_settings(base, question, name), ROWS[question][name]
    print(f"{name}: {row.title}", flush=True)
    made_by = what_makes(settings, question)
    content = {
        "title": row.title,
        "long": not row.short,
        "seed": settings.seed,
        "made_by": made_by,
        "versions": versions(),
        "code": made_by["code"],
        "data": made_by["data"],
        "commit": current_commit(),
    }
    run_question = run_q1 if question == "q1" else run_q2
    content |= run_question(settings, row)
    write_json(settings.run_dir / "row.json", content)
    (settings.run_dir / "checkpoint.npz").unlink(missing_ok=True)


def current_commit() -> str | None:
    """Return the commit that is checked out here, or None."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def run_commands(commands: Sequence[Sequence[str]], workers: int) -> None:
    """Run commands, some at a time.

    Raises:
        UsageError: one of them failed.
    """
    # TensorFlow reads this in each process: more threads than cores are slow.
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    environment = {"TF_NUM_INTRAOP_THREADS": threads} | os.environ
    waiting, running = list(commands), []
    try:
        while waiting or running:
            if waiting and len(running) < workers:
                running.append(subprocess.Popen(waiting.pop(0), env=environment))
                continue
            time.sleep(0.2)
            for process in [each for each in running if each.poll() is not None]:
                running.remove(process)
                if process.returncode:
                    raise utils.UsageError(f"{' '.join(process.args)}: failed")
    finally:
        for process in running:
            process.terminate()
            process.wait()


# Tables ------------------------------------------------------------------------------


def draw(question: str, rows: Mapping[str, dict], figures: Path) -> None:
    """Draw the figures of a question's rows, the script's own runs among them."""
    rows = dict(rows)
    for name, suffix in (("default", ""), ("control", "_control")):
        path = figures / f"{question}{suffix}_metrics.json"
        if path.exists():
            with utils.damage_told(path, "metrics of a run"):
                rows[name] = {"long": True} | read_json(path)
    if question == "q1":
        sizes = [row for name, row in rows.items() if name in SIZES]
        sizes.sort(key=lambda row: row["code_dim"])
        if sizes:
            plots.q1_rate_distortion(figures / "q1_rate_distortion.png", sizes)
        return
    points, bound = {}, None
    for name, row in rows.items():
        if "knn_bound" not in row or row["knn_accuracy"] is None:
            continue  # of another layout, or without labels
        accuracy, distance = row["knn_accuracy"]["code"], row["frechet_distance"]
        points[name] = accuracy, distance, row["long"]
        if row["informative_dimensions"] == q2.INFORMATIVE:
            bound = row["knn_bound"]
    if points:
        plots.q2_frontier(figures / "q2_frontier.png", points, bound)


def add_to_record(
    question: str, base: utils.Settings, names: Sequence[str]
) -> dict[str, dict]:
    """Add finished rows to the question's table, draw it, and return all its rows."""
    path = record_path(question, base)
    rows = read_record(path)
    for name in names:
        finished = row_settings(base, question, name).run_dir / "row.json"
        if finished.exists():
            rows[name] = read_json(finished)
    rows = {name: rows[name] for name in ROWS[question] if name in rows} | rows
    write_json(path, {"rows": rows})
    draw(question, rows, base.figures)
    if base.updates_report:
        report.update()
    return rows


def record_path(question: str, base: utils.Settings) -> Path:
    """Return the file that holds a question's rows."""
    return base.figures / f"{question}_comparisons_metrics.json"


def read_record(path: Path) -> dict[str, dict]:
    """Return the rows that were trained before, by name."""
    if not path.exists():
        return {}
    with utils.damage_told(path, "rows of this question"):
        return {name: dict(row) for name, row in read_json(path)["rows"].items()}


def read_rows(question: str, text: str | None) -> list[str]:
    """Return the names of the rows that are asked for, by default all of them.

    Raises:
        UsageError: there is no such row.
    """
    names = list(ROWS[question]) if text is None else text.split(",")
    unknown = [name for name in names if name not in ROWS[question]]
    if unknown:
        expected = ", ".join(ROWS[question])
        raise utils.UsageError(f"--rows: found {unknown[0]}, expected {expected}")
    return names


def main() -> None:
    """Train the rows that are asked for, and add them to the table."""
    parser = utils.OneLineParser(description="Train rows of the report's tables.")
    parser.add_argument("question", choices=list(ROWS))
    parser.add_argument("--rows", metavar="ROW,ROW", help="default: all of them")
    count = utils.number_in(int, 1, 1_000)
    parser.add_argument("--workers", type=count, default=1, metavar="N")
    # Given by this script to the processes that it starts.
    parser.add_argument("--train", metavar="ROW", help=argparse.SUPPRESS)
    asked, others = parser.parse_known_args()
    question = asked.question
    names = read_rows(question, asked.rows)
    base = SCRIPTS[question].parse_settings(others)
    data = find_file(base.data or ensure_data(SCRIPTS[question].DATA))
    base = dataclasses.replace(base, data=data)
    if asked.train:
        train_row(base, question, asked.train)
        return
    plots.check()
    commands = commands_for(question, base, names, others)
    try:
        run_commands(commands, asked.workers)
    finally:
        rows = add_to_record(question, base, names)
    print(f"{len(rows)} rows are in {record_path(question, base)}.")


def commands_for(
    question: str, base: utils.Settings, names: Sequence[str], others: Sequence[str]
) -> list[list[str]]:
    """Return the commands that train those rows that are not there already."""
    rows, commands = read_record(record_path(question, base)), []
    for name in names:
        settings = row_settings(base, question, name)
        made_by = rows.get(name, {}).get("made_by")
        finished = (settings.run_dir / "row.json").exists()
        if not finished and made_by != what_makes(settings, question):
            command = [sys.executable, "-m", "extras.comparisons", question]
            commands.append([*command, "--train", name, *others])
    return commands


if __name__ == "__main__":
    from extras import comparisons  # by this name networks find their classes

    utils.run_script(comparisons.main)
