"""What both scripts share: command line, settings, data, resumable training."""

from __future__ import annotations

import argparse
import builtins
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

# Keras and TensorFlow read these once, when they are first imported.
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

if keras.backend.backend() != "tensorflow":
    raise ImportError("Keras has another backend: import this module before Keras")
# What a user's keras.json says must not change results.
keras.config.set_floatx("float32")
keras.config.set_image_data_format("channels_last")
keras.config.set_epsilon(1e-7)

from files import read_json, replacing, versions, write_json  # noqa: E402
from read_MNIST_M import DataError, Split  # noqa: E402

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

QUICK_EPOCHS = 5
PARTS = 10  # of an epoch: the losses of each are kept
# Images in each split: at least, and with --quick.
SIZES = {"training": (100, 2_000), "validation": (1, 200), "test": (20, 500)}
Rows = list[dict[str, float]]  # losses by name, a row an epoch or a part of one
Losses = dict[str, np.ndarray]  # the same, by columns


class UsageError(ValueError):
    """A mistake of the user's, told in one line."""


class Interrupted(KeyboardInterrupt):
    """A run was interrupted, and `--resume` continues it."""


# Settings --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run is told, by the command line or by a row of the comparisons."""

    name: str  # such as "q1"; the names of figures and metrics begin with it
    data: Path | None  # None: the question's own file, which is built if missing
    epochs: int | None  # None: as many as the script chooses for the data
    batch_size: int  # images in a training step, at most
    learning_rate: float  # of Adam, at its highest; question 2: of stage (a)
    code_dim: int
    seed: int  # of weights, order and noise
    figures: Path  # folder for figures and metrics
    run_dir: Path  # folder for checkpoint and networks
    resume: bool  # whether to continue after the checkpoint in run_dir
    quick: bool  # whether to use a few images only
    updates_report: bool  # whether to refresh the report at the end
    labels: Path | None = None  # question 2: the labels of a data file without any
    control: bool = False  # question 2: whether to train the control


class Schedule(NamedTuple):
    """How long a run trains; it follows from settings and data."""

    epochs: int
    steps: int  # in an epoch
    batch_size: int


def training_schedule(
    settings: Settings, count: int, default_epochs: int, least_steps: int = 0
) -> Schedule:
    """Return how long to train on `count` images.

    Unless the settings say how many epochs, it is `default_epochs`, or as many more as
    it takes to reach `least_steps`.
    """
    batch_size = min(settings.batch_size, count)
    steps = count // batch_size
    if settings.epochs is not None:
        epochs = settings.epochs
    elif settings.quick:
        epochs = QUICK_EPOCHS
    else:
        epochs = max(default_epochs, math.ceil(least_steps / steps))
    return Schedule(epochs, steps, batch_size)


# Command line ----------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """Tells a mistake in one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Exit with the message."""
        line = " ".join(message.split())
        self.exit(2, f"{self.prog}: {line} (see --help)\n")


def number_in(
    kind: type[int] | type[float], least: float, most: float
) -> Callable[[str], float]:
    """Return a reader of numbers in least..most, for argparse."""

    def read(text: str) -> float:
        number = kind(text)
        if not least <= number <= most:
            expected = f"expected {least}..{most}"
            raise argparse.ArgumentTypeError(f"found {text}, {expected}")
        return number

    return read


def path_name(text: str) -> Path:
    """Read a path, which an unset variable would leave empty."""
    if not text:
        raise argparse.ArgumentTypeError("found an empty path")
    return Path(text)


def argument_parser(
    description: str,
    data: str,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    code_dim: int,
) -> OneLineParser:
    """Return a parser of the options that both scripts share, with their defaults."""
    parser = OneLineParser(description=description)
    positive, default = number_in(int, 1, 10**9), "(default: %(default)s)"
    rate, size = number_in(float, 1e-12, 1e6), number_in(int, 1, 10_000)
    seed = number_in(int, 0, 2**31 - 1)
    add = parser.add_argument
    text = f"data file (default: {data}, built if missing)"
    add("--data", type=path_name, metavar="PATH", help=text)
    text = f"training epochs (default: {epochs}; with --quick: {QUICK_EPOCHS})"
    add("--epochs", type=positive, metavar="N", help=text)
    text = f"images in a training step {default}"
    add("--batch-size", type=positive, default=batch_size, metavar="N", help=text)
    text = f"Adam's highest learning rate {default}"
    add("--learning-rate", type=rate, default=learning_rate, metavar="X", help=text)
    text = f"dimensions of the code {default}"
    add("--code-dim", type=size, default=code_dim, metavar="N", help=text)
    text = f"seed of all random numbers {default}"
    add("--seed", type=seed, default=0, metavar="N", help=text)
    text = "folder for figures and metrics (default: figures)"
    add("--figures", type=path_name, metavar="DIR", help=text)
    text = "folder for checkpoint and networks (default: runs/QUESTION)"
    add("--run-dir", type=path_name, metavar="DIR", help=text)
    text = "continue after the run's last checkpoint"
    add("--resume", action="store_true", help=text)
    text = f"try everything on {SIZES['training'][1]:,} images, in runs/quick"
    add("--quick", action="store_true", help=text)
    return parser


def settings_from(options: argparse.Namespace, name: str) -> Settings:
    """Return the settings of the run `name` from parsed command-line options.

    A full run whose figures go to their usual folder refreshes the report.
    """
    base = Path("runs/quick") if options.quick else Path("runs")
    values = vars(options) | {
        "name": name,
        "run_dir": options.run_dir or base / name,
        "figures": options.figures,
        "updates_report": options.figures is None and not options.quick,
    }
    if options.figures is None:
        values["figures"] = base / "figures" if options.quick else Path("figures")
    return Settings(**values)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM interrupt as Ctrl-C does; ignore further signals after the first."""
    signals = signal.SIGINT, signal.SIGTERM

    def interrupt(*_: object) -> NoReturn:
        # A second signal must not cut short what the first one saves.
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; exit with 2 on a user's mistake, 130 if interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # letters that it can't show
    tf.get_logger().setLevel("ERROR")  # it warns of each new model's first trace
    script = Path(sys.argv[0]).name
    try:
        with _interruptible():
            main()
            print(end="", flush=True)  # fails here if nobody reads the output
    except (KeyboardInterrupt, BrokenPipeError) as error:
        try:
            print(end="", flush=True)
        except OSError:  # nobody reads the output, so Python's last flush would fail
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        in_notebook = hasattr(builtins, "__IPYTHON__")
        words = ["%run", *sys.argv] if in_notebook else sys.orig_argv
        if isinstance(error, Interrupted) and "--resume" not in words:
            words = [*words, "--resume"]
        again = shlex.join(words)
        print(f"\n{script}: interrupted; continue with: {again}", file=sys.stderr)
        sys.exit(130)
    except (DataError, UsageError, OSError) as error:
        print(f"{script}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


# Data ------------------------------------------------------------------------------


def unit_floats(images: np.ndarray) -> np.ndarray:
    """Scale uint8 0..255 to float32 0..1, of the same shape."""
    return np.divide(images, np.float32(255), dtype=np.float32)


def prepare_splits(
    splits: Sequence[Split], path: Path, quick: bool
) -> tuple[Split, Split, Split]:
    """Scale the images to [0, 1], float32; if `quick`, take the first ones only.

    Raises:
        UsageError: a split of the file `path` has fewer images than training and
            measuring take, or all training images are the same.
    """
    prepared = []
    for split, (name, sizes) in zip(splits, SIZES.items(), strict=True):
        least, quick_size = sizes
        images, labels = split
        found = f"{path}: found {len(images)} {name} images"
        if len(images) < least:
            raise UsageError(f"{found}, expected {least} or more")
        if name == "training" and (images == images[0]).all():
            raise UsageError(f"{found} that are all the same")
        if quick:
            images = images[:quick_size]
            labels = None if labels is None else labels[:quick_size]
        prepared.append(Split(unit_floats(images), labels))
    train, valid, test = prepared
    return train, valid, test


Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def epoch_batches(
    images: tf.Tensor,
    batch_size: int,
    seed: int,
    epoch: int,
    change: Change | None = None,
) -> tf.data.Dataset:
    """Return an epoch's batches of images, in an order that seed and epoch fix.

    So a resumed run sees what a run never interrupted would see. The N mod batch_size
    images at the end of the order are left out.

    Returns:
        Pairs (x, x), float32 (batch_size, ...): an autoencoder's input and target.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(images))
    used = len(images) // batch_size * batch_size

    def changed(x: np.ndarray, index: np.ndarray) -> np.ndarray:
        return change(x, np.random.default_rng(index))

    def pick(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        # With numpy's indexing a step of question 1 took half as long again.
        x = tf.gather(images, index)
        if change is not None:
            x = tf.numpy_function(changed, [x, index], tf.float32)
        x = tf.ensure_shape(x, (batch_size, *images.shape[1:]))
        return x, x

    indices = order[:used].reshape(-1, batch_size)
    return tf.data.Dataset.from_tensor_slices(indices).map(pick).prefetch(2)


def predict(model: keras.Model, inputs: np.ndarray | list[np.ndarray]) -> np.ndarray:
    """Return what a model makes, float32 (N, ...), of its inputs, (N, ...) each."""
    return model.predict(inputs, batch_size=500, verbose=0)


def weights_digest(model: keras.Model) -> str:
    """Return the SHA-256 of a model's weights, which tells networks apart."""
    digest = hashlib.sha256()
    for array in model.get_weights():
        digest.update(array.tobytes())
    return digest.hexdigest()


# Training --------------------------------------------------------------------------


def falling_rate(
    rate: float, schedule: Schedule
) -> keras.optimizers.schedules.LearningRateSchedule:
    """Return a rate that rises to `rate` in the first epoch, then falls to 0.

    It falls along half a period of the cosine (Loshchilov & Hutter 2017,
    arXiv:1608.03983).
    """
    return keras.optimizers.schedules.CosineDecay(
        0.0,
        max(1, (schedule.epochs - 1) * schedule.steps),
        warmup_target=rate,
        warmup_steps=schedule.steps,
    )


@contextlib.contextmanager
def damage_told(path: Path, expected: str) -> Iterator[None]:
    """Tell in one line that a file of a run is damaged or another's."""
    try:
        yield
    except Exception as error:  # its bytes may raise errors of any kind
        found = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"{path}: found {found}, expected {expected}") from error


class RunFolder:
    """A run's folder: settings, checkpoint and networks; where its metrics go.

    Args:
        settings: the run's.
        source: what `describe_source` says of the data file.
        schedule: as `training_schedule` returns it.
    """

    def __init__(
        self, settings: Settings, source: Mapping[str, str], schedule: Schedule
    ) -> None:
        self.settings, self.source, self.schedule = settings, source, schedule
        self.path, self.figures = settings.run_dir, settings.figures
        self.checkpoint_path = self.path / "checkpoint.npz"
        self.described = {
            "epochs": schedule.epochs,
            "batch_size": schedule.batch_size,
            "learning_rate": settings.learning_rate,
            "code_dim": settings.code_dim,
            "seed": settings.seed,
            "quick": settings.quick,
            "control": settings.control,
        }

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Lock the folder, and check that a resumed run has its own settings and data.

        Raises:
            UsageError: another run is using the folder, there is no run to resume, or
                it had other settings or data.
            Interrupted: in place of a `KeyboardInterrupt` in the block.
        """
        path = self.path / "settings.json"
        if self.settings.resume and not path.exists():
            raise UsageError(f"--resume: found no {path}, expected one")
        for folder in (self.path, self.figures):
            folder.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w") as lock:
            self._take(lock)
            self._compare_settings(path)
            try:
                yield
            except (KeyboardInterrupt, BrokenPipeError) as error:
                raise Interrupted from error

    def _take(self, lock: IO[str]) -> None:
        """Lock a file until it is closed or the process ends."""
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{self.path}: found another run at work in this folder, expected none "
                "(--run-dir names another)"
            ) from None
        except OSError as error:
            print(f"{self.path}: there are no locks here ({error.strerror}), so don't")
            print("start a second run in this folder while this one is at work.")

    def _compare_settings(self, path: Path) -> None:
        """Write the settings of a new run; compare those of a resumed one."""
        settings = self.described | {"data": self.source["sha256"]}
        if not self.settings.resume:
            self.checkpoint_path.unlink(missing_ok=True)
            write_json(path, settings)
            return
        with damage_told(path, "settings of a run"):
            before = dict(read_json(path))
        for key, value in settings.items():
            if value != before.get(key):
                raise UsageError(
                    f"--resume: found --{key.replace('_', '-')} {value}, expected "
                    f"{before.get(key)} as in the run so far"
                )

    def save_checkpoint(
        self, state: Sequence[keras.Variable], epochs: Rows, parts: Rows
    ) -> None:
        """Save all that training changes, and the losses so far."""
        with replacing(self.checkpoint_path) as temporary:
            np.savez(
                temporary,
                *[variable.numpy() for variable in state],
                losses=json.dumps([epochs, parts]),
            )

    def load_checkpoint(self, state: Sequence[keras.Variable]) -> tuple[Rows, Rows]:
        """Load the state; return the losses so far, empty where there is no checkpoint.

        Raises:
            UsageError: the checkpoint is damaged, or of another model.
        """
        if not self.checkpoint_path.exists():
            return [], []  # a new run, or one interrupted in its first epoch
        with (
            damage_told(self.checkpoint_path, "a checkpoint of this run"),
            np.load(self.checkpoint_path, allow_pickle=False) as arrays,
        ):
            names = [name for name in arrays.files if name.startswith("arr_")]
            for variable, name in zip(state, names, strict=True):
                variable.assign(arrays[name])
            epochs, parts = json.loads(str(arrays["losses"]))
            print(f"Continuing after epoch {len(epochs)} of {self.checkpoint_path}.")
            return epochs, parts

    def save_networks(self, networks: Sequence[keras.Model]) -> None:
        """Save networks as NAME.keras; list digests of them and of the data.

        By networks.json a reader of the folder knows which files belong together.
        """
        content = {"data": self.source["sha256"]}
        for network in networks:
            with replacing(self.path / f"{network.name}.keras") as temporary:
                network.save(temporary)
            content[network.name] = weights_digest(network)
        write_json(self.path / "networks.json", content)

    def write_losses(self, name: str, losses: Losses) -> None:
        """Write a table of losses, such as "history", beside the figures."""
        path = self.figures / f"{self.settings.name}_{name}.csv"
        with replacing(path) as temporary:
            np.savetxt(
                temporary,
                np.column_stack(list(losses.values())),
                fmt="%.9g",
                delimiter=",",
                header=",".join(losses),
                comments="",
            )

    def write_metrics(self, metrics: Mapping[str, Any], history: Losses) -> None:
        """Write the numbers, and where they come from, beside the figures."""
        content = {
            "training_seconds": float(history["seconds"].sum()),
            **metrics,
            "data": dict(self.source),
            "settings": self.described,
            "seed": self.settings.seed,
            "versions": versions(),
        }
        write_json(self.figures / f"{self.settings.name}_metrics.json", content)


class LossCurve(keras.callbacks.Callback):
    """Keeps the means of the training losses over each tenth of an epoch.

    `epoch` is the number of the epoch, from 1, and `steps` that of its steps.
    """

    def __init__(self, epoch: int, steps: int) -> None:
        super().__init__()
        self.before, self.length = (epoch - 1) * steps, math.ceil(steps / PARTS)
        self.rows: Rows = []
        self.sums: dict[str, float] = {}

    def on_train_batch_end(self, batch: int, logs: Mapping[str, float]) -> None:
        """Add a row at the end of a part; `logs` holds means since the epoch began."""
        done = batch + 1
        if done % self.length:
            return
        sums = {name: done * float(mean) for name, mean in logs.items()}
        row = {"step": self.before + done}
        for name, total in sums.items():
            row[name] = (total - self.sums.get(name, 0.0)) / self.length
        self.rows.append(row)
        self.sums = sums


def fit(
    run: RunFolder,
    model: keras.Model,
    optimizers: Sequence[keras.optimizers.Optimizer],
    networks: Sequence[keras.Model],
    train: np.ndarray,
    valid: np.ndarray,
    shown: Mapping[str, str],
    draw: Callable[[Losses, Losses], None],
    change: Change | None = None,
) -> Losses:
    """Train a model, or continue its training, with a checkpoint after each epoch.

    Args:
        run: where checkpoints, networks and losses go, also after an interruption.
        model: compiled, with built optimizers.
        optimizers: all that train the model; a checkpoint holds their states.
        networks: parts of the model that are saved at the end.
        train: training images, float32 (N, ...) in [0, 1].
        valid: validation images, float32 (M, ...) in [0, 1].
        shown: the losses that the screen shows, and how it calls them.
        draw: called at the end with the history and the losses in tenths of epochs.
        change: changes each training batch at random.

    Returns:
        The history: "epoch", "step" (its last), what the model reports, and "seconds".

    Raises:
        UsageError: a loss is no longer finite, or the checkpoint is damaged.
    """
    schedule, images = run.schedule, tf.constant(train)
    size, seed = schedule.batch_size, run.settings.seed
    state = list(model.variables)
    for optimizer in optimizers:
        state += optimizer.variables
    epochs, parts = run.load_checkpoint(state)
    print(f"Training: {schedule.epochs} epochs of {schedule.steps} steps.", flush=True)
    try:
        for number in range(len(epochs) + 1, schedule.epochs + 1):
            batches = epoch_batches(images, size, seed, number - 1, change)
            curve = LossCurve(number, schedule.steps)
            epochs.append(train_epoch(model, batches, valid, number, curve))
            parts += curve.rows
            run.save_checkpoint(state, epochs, parts)
            print_epoch(epochs[-1], schedule.epochs, shown)
    except (KeyboardInterrupt, BrokenPipeError):
        # The networks are saved as they are, in the middle of an epoch.
        _finish(run, networks, epochs, parts, draw)
        raise
    return _finish(run, networks, epochs, parts, draw)


def _finish(
    run: RunFolder,
    networks: Sequence[keras.Model],
    epochs: Rows,
    parts: Rows,
    draw: Callable[[Losses, Losses], None],
) -> Losses:
    """Save networks and losses, and draw the losses; return the history."""
    run.save_networks(networks)
    if not epochs:
        return {}
    history, curve = [
        {name: np.array([row[name] for row in rows]) for name in rows[0]}
        for rows in (epochs, parts)
    ]
    run.write_losses("history", history)
    run.write_losses("steps", curve)
    draw(history, curve)
    return history


def train_epoch(
    model: keras.Model,
    batches: tf.data.Dataset,
    valid: np.ndarray,
    number: int,
    curve: LossCurve,
) -> dict[str, float]:
    """Train for an epoch; return its number, the losses and the seconds it took.

    Raises:
        UsageError: a loss is no longer finite.
    """
    started = time.perf_counter()
    history = model.fit(
        batches,
        validation_data=(valid, valid),
        validation_batch_size=500,
        shuffle=False,  # the batches have an order
        callbacks=[curve],
        verbose=0,
    ).history
    losses = {name: float(values[0]) for name, values in history.items()}
    for name, value in losses.items():
        if not math.isfinite(value):
            raise UsageError(
                f"{name}: found {value} in epoch {number}, expected a finite number "
                "(is --learning-rate too large?)"
            )
    steps = number * len(batches)
    seconds = time.perf_counter() - started
    return {"epoch": number, "step": steps, **losses, "seconds": seconds}


def print_epoch(
    row: Mapping[str, float], epochs: int, shown: Mapping[str, str]
) -> None:
    """Print a line about an epoch, and how long the rest of the run may take."""
    left = (epochs - row["epoch"]) * row["seconds"]
    time_left = f"{left / 60:.0f} min" if left >= 60 else f"{left:.0f} s"
    losses = ", ".join(f"{label} {row[name]:.3g}" for name, label in shown.items())
    print(f"epoch {row['epoch']} of {epochs}, {time_left} left: {losses}", flush=True)
