"""What both scripts share: command line, data, resumable training, files."""

from __future__ import annotations

import argparse
import builtins
import contextlib
import csv
import hashlib
import json
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

# Keras and TensorFlow read these once, when they are first imported.
_before = {n: os.environ.get(n) for n in ("KERAS_BACKEND", "TF_CPP_MIN_LOG_LEVEL")}
os.environ.update(KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="3")
import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

for _name, _value in _before.items():
    os.environ.pop(_name)
    if _value is not None:
        os.environ[_name] = _value
if keras.backend.backend() != "tensorflow":
    raise ImportError("Keras has another backend: import this module before Keras")

from files import describe_source, replacing, write_json  # noqa: E402
from read_MNIST_M import DataError, Split  # noqa: E402

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

QUICK_EPOCHS = 5
# Images in each split: at least, and with --quick.
SIZES = {"training": (100, 2_000), "validation": (1, 200), "test": (20, 500)}
# Options that say where things lie, and change no number.
PLACES = {"data", "figures", "run_dir", "shared_dir", "resume", "updates_report"}
SETTINGS, CHECKPOINT, LOCK = "settings.json", "checkpoint.npz", "lock"
NETWORKS = "networks.json"  # data and networks that belong together
PACKAGES = ("tensorflow", "keras", "numpy", "scikit-learn", "openTSNE", "matplotlib")


class UsageError(ValueError):
    """A mistake of the user's, told in one line."""


class Interrupted(KeyboardInterrupt):
    """A run was interrupted that `--resume` goes on with."""


# Command line ----------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """Tells a mistake in one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Exit with the message."""
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def _positive(convert: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = convert(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {convert.__name__}"  # argparse names it in its error
    return parse


positive_int, positive_float = _positive(int), _positive(float)


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
    parser.set_defaults(full_epochs=epochs)
    add = parser.add_argument
    for flag, kind, default, unit, text in (
        ("--data", str, None, "PATH", f"data file (default: {data}, built if missing)"),
        (
            *("--epochs", positive_int, None, "N"),
            f"of training (default: {epochs}; with --quick {QUICK_EPOCHS})",
        ),
        ("--batch-size", positive_int, batch_size, "N", "images in a training step"),
        ("--learning-rate", positive_float, learning_rate, "X", "of Adam, at most"),
        ("--code-dim", positive_int, code_dim, "N", "dimensions of the code"),
        ("--seed", int, 0, "N", "of weights, order and noise"),
        ("--figures", Path, None, "DIR", "for figures and metrics (default: figures)"),
        ("--run-dir", Path, None, "DIR", "for models (default: runs/QUESTION)"),
    ):
        if default is not None:
            text += " (default: %(default)s)"
        add(flag, type=kind, default=default, metavar=unit, help=text)
    add("--resume", action="store_true", help="go on after the run's last checkpoint")
    few = SIZES["training"][1]
    text = f"try all on {few:,} images; what comes out goes to runs/quick"
    add("--quick", action="store_true", help=text)
    return parser


def complete_options(options: argparse.Namespace, name: str) -> argparse.Namespace:
    """Fill in the defaults that depend on other options, and on the run's name.

    A full run whose figures go to their usual place `updates_report`.

    Raises:
        UsageError: the seed is out of range.
    """
    if not 0 <= options.seed < 2**31:
        raise UsageError(f"--seed: found {options.seed}, expected 0..{2**31 - 1}")
    options.name, base = name, Path("runs/quick" if options.quick else "runs")
    options.default_epochs = options.epochs is None and not options.quick
    epochs = QUICK_EPOCHS if options.quick else options.full_epochs
    options.epochs = options.epochs or epochs
    options.updates_report = options.figures is None and not options.quick
    usual = base / "figures" if options.quick else Path("figures")
    options.figures = options.figures or usual
    options.run_dir = options.run_dir or base / name
    options.shared_dir = options.run_dir.parent  # of what all runs use
    return options


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM interrupt as Ctrl-C does, and only the first signal of both."""
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


@contextlib.contextmanager
def _plain_settings() -> Iterator[None]:
    """Put aside what a user's `keras.json` sets, and TensorFlow's warnings."""
    config, logger = keras.config, tf.get_logger()
    before = config.floatx(), config.image_data_format(), logger.level
    config.set_floatx("float32")
    config.set_image_data_format("channels_last")
    logger.setLevel("ERROR")  # it warns of each new model's first trace
    try:
        yield
    finally:
        config.set_floatx(before[0])
        config.set_image_data_format(before[1])
        logger.setLevel(before[2])


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; exit with 2 on a user's mistake, 130 if interrupted."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # no console
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # letters that it can't show
    script = Path(sys.argv[0]).name
    try:
        with _interruptible(), _plain_settings():
            main()
            sys.stdout.flush()
    except (KeyboardInterrupt, BrokenPipeError) as error:
        if BrokenPipeError in (type(error), type(error.__cause__)):
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  nobody reads on
        in_notebook = hasattr(builtins, "__IPYTHON__")
        words = ["%run", *sys.argv] if in_notebook else sys.orig_argv
        if isinstance(error, Interrupted) and "--resume" not in words:
            words = [*words, "--resume"]
        again = shlex.join(words)
        print(f"\n{script}: interrupted; go on with: {again}", file=sys.stderr)
        sys.exit(130)
    except (DataError, UsageError, OSError) as error:
        print(f"{script}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


# Data ------------------------------------------------------------------------------


def unit_floats(images: np.ndarray) -> np.ndarray:
    """Scale uint8 0..255 to float32 0..1, of the same shape."""
    return np.divide(images, np.float32(255), dtype=np.float32)


def prepare_splits(
    splits: Sequence[Split], options: argparse.Namespace
) -> tuple[Split, ...]:
    """Scale the images to [0, 1], float32; under `--quick` take the first ones only.

    A batch size beyond the number of training images becomes that number.

    Raises:
        UsageError: a split has fewer images than training and measuring take, or all
            training images are the same.
    """
    prepared = []
    for (images, labels), (name, sizes) in zip(splits, SIZES.items(), strict=True):
        least, quick = sizes
        found = f"{options.data}: found {len(images)} {name} images"
        if len(images) < least:
            raise UsageError(f"{found}, expected {least} or more")
        if name == "training" and (images == images[0]).all():
            raise UsageError(f"{found} that are all the same")
        first = slice(quick if options.quick else None)
        labels = None if labels is None else labels[first]
        prepared.append(Split(unit_floats(images[first]), labels))
    count = len(prepared[0].images)
    if options.batch_size > count:
        print(f"--batch-size {count}: there are no more training images.")
        options.batch_size = count
    return tuple(prepared)


Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def shuffled_batches(
    images: np.ndarray,
    batch_size: int,
    seed: int,
    epochs: range,
    change: Change | None = None,
) -> tf.data.Dataset:
    """Return the batches of some epochs, each in an order that seed and epoch fix.

    A run that is resumed at an epoch sees what a run never interrupted would see. The
    N mod batch_size images that an epoch's order leaves over are dropped. `change`
    makes of a batch of images another, at random.

    Returns:
        Pairs (x, x), float32 (batch_size, ...): an autoencoder's input and target.
    """
    used = len(images) // batch_size * batch_size
    orders = [
        np.random.default_rng([seed, epoch]).permutation(len(images))[:used]
        for epoch in epochs
    ]
    pixels = tf.constant(images)

    def changed(index: np.ndarray) -> np.ndarray:
        return change(images[index], np.random.default_rng(index))

    # TensorFlow's own operations where they do: with Python's a step of question 1 took
    # half as long again.
    def pick(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        if change is None:
            x = tf.gather(pixels, index)
        else:
            x = tf.numpy_function(changed, [index], tf.float32)
        x = tf.ensure_shape(x, (batch_size, *images.shape[1:]))
        return x, x

    indices = np.reshape(orders, (-1, batch_size))
    return tf.data.Dataset.from_tensor_slices(indices).map(pick).prefetch(2)


def predict(model: keras.Model, inputs: np.ndarray) -> np.ndarray:
    """Return what a model makes, float32 (N, ...), of inputs (N, ...), in batches."""
    return model.predict(inputs.astype(np.float32), batch_size=500, verbose=0)


def weights_digest(model: keras.Model) -> str:
    """Return the SHA-256 of a model's weights, which tells networks apart."""
    digest = hashlib.sha256()
    for array in model.get_weights():
        digest.update(array.tobytes())
    return digest.hexdigest()


# Training --------------------------------------------------------------------------


def falling_rate(
    rate: float, epochs: int, steps: int
) -> keras.optimizers.schedules.LearningRateSchedule:
    """Return a rate that rises in the first epoch, then falls to 0 along a cosine.

    `rate` is the highest, `epochs` are the whole run's, `steps` an epoch's.
    """
    return keras.optimizers.schedules.CosineDecay(
        0.0, max(1, (epochs - 1) * steps), warmup_target=rate, warmup_steps=steps
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
    """A run's folder: settings, checkpoint and models; and its history.

    Used in a `with` block, within which no other run can use the folder. `rows` is the
    history, an epoch each: "epoch", what the model logs, and "seconds".

    Raises:
        UsageError: on entering: `--resume` without a run, or with other settings or
            data; or another run is at work in the folder.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.path = options, options.run_dir
        self.history_path = options.figures / f"{options.name}_history.csv"
        self.checkpoint = self.path / CHECKPOINT
        self.rows: list[dict[str, float]] = []
        self.source = describe_source(options.data)

    def __enter__(self) -> RunFolder:
        if self.options.resume and not (self.path / SETTINGS).exists():
            raise UsageError(f"--resume: found no {self.path / SETTINGS}, expected one")
        for folder in (self.path, self.options.figures):
            folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            lock = stack.enter_context((self.path / LOCK).open("w"))
            try:
                if fcntl is not None:  # the system drops the lock with the process
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"{self.path}: found another run at work in this folder, expected "
                    "none (--run-dir names another)"
                ) from None
            self._settle()
            self.unlock = stack.pop_all().close
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        self.unlock()
        if isinstance(error, (KeyboardInterrupt, BrokenPipeError)):
            raise Interrupted from error

    def _settle(self) -> None:
        """Write the settings of a new run; compare those of a resumed one."""
        own = PLACES | {"name", "full_epochs", "default_epochs"}
        settings = {k: v for k, v in vars(self.options).items() if k not in own}
        settings["data"] = self.source["sha256"]
        path = self.path / SETTINGS
        if not self.options.resume:
            self.checkpoint.unlink(missing_ok=True)
            write_json(path, settings)
            return
        with damage_told(path, "settings of a run"):
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        for key, value in settings.items():
            if value != before.get(key):
                raise UsageError(
                    f"--resume: found --{key.replace('_', '-')} {value}, expected "
                    f"{before.get(key)} as in the run so far"
                )

    @property
    def history(self) -> dict[str, np.ndarray]:
        """The rows as columns, a value an epoch."""
        columns = self.rows[0] if self.rows else ()
        return {key: np.array([row[key] for row in self.rows]) for key in columns}

    def fit(
        self,
        model: keras.Model,
        networks: Mapping[str, keras.Model],
        train: np.ndarray,
        valid: np.ndarray,
        draw: Callable[[dict[str, np.ndarray]], None],
        change: Change | None = None,
    ) -> None:
        """Train a model, keeping checkpoints and the history; see `_Recorder`.

        Whether training ends or is interrupted, the networks are saved as NAME.keras,
        and `draw` draws the history. The model is compiled, its optimizers are built;
        the images are float32 (N, ...) in [0, 1].

        Raises:
            UsageError: a loss is no longer finite, or the checkpoint is damaged.
        """
        options = self.options
        batch_size, seed = options.batch_size, options.seed
        steps = len(train) // batch_size
        done = self._restore(model, steps)
        epochs = range(done, options.epochs)
        print(f"Training: {options.epochs} epochs of {steps} steps.", flush=True)
        try:
            if done < options.epochs:
                model.fit(
                    shuffled_batches(train, batch_size, seed, epochs, change),
                    epochs=options.epochs,
                    initial_epoch=done,
                    steps_per_epoch=steps,
                    validation_data=(valid, valid),
                    validation_batch_size=500,
                    callbacks=[_Recorder(self)],
                    shuffle=False,  # done
                    verbose=0,
                )
        except (KeyboardInterrupt, BrokenPipeError):
            self._finish(networks, draw)
            raise
        self._finish(networks, draw)

    def _finish(self, networks: Mapping[str, keras.Model], draw: Callable) -> None:
        """Save the networks as they are; draw the history if there is any."""
        for name, network in networks.items():
            with replacing(self.path / f"{name}.keras") as temporary:
                network.save(temporary)
        write_json(
            self.path / NETWORKS,
            {
                "data": self.source["sha256"],
                **{name: weights_digest(each) for name, each in networks.items()},
            },
        )
        if self.rows:
            draw(self.history)

    def _restore(self, model: keras.Model, steps_per_epoch: int) -> int:
        """Load checkpoint and history if there are any; return the epochs done."""
        if not self.checkpoint.exists():
            return 0  # new, or interrupted before its first epoch ended
        with (
            damage_told(self.checkpoint, "a checkpoint of this run"),
            np.load(self.checkpoint, allow_pickle=False) as arrays,
        ):
            for variable, name in zip(_variables(model), arrays.files, strict=True):
                variable.assign(arrays[name])
        # The weights' own step count, so that no second file can disagree with them.
        done = int(model.optimizer.iterations) // steps_per_epoch
        with (
            damage_told(self.history_path, f"the history of {done} epochs"),
            self.history_path.open(newline="", encoding="utf-8") as file,
        ):
            rows = [
                {key: float(value) for key, value in row.items()}
                for row in csv.DictReader(file)
            ]
            self.rows = rows[:done]
            if len(self.rows) != done or any("seconds" not in row for row in rows):
                raise ValueError(f"{len(rows)} of them")
        print(f"Going on after epoch {done} of {self.checkpoint}.")
        return done

    def record(self, model: keras.Model, row: dict[str, float]) -> None:
        """Add an epoch to the history and save it, then the checkpoint."""
        self.rows.append(row)
        with (
            replacing(self.history_path) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, fieldnames=list(row))
            writer.writeheader()
            writer.writerows(self.rows)
        # Last, so that a run killed in between finds no row of its history missing.
        with replacing(self.checkpoint) as temporary:
            np.savez(temporary, *[variable.numpy() for variable in _variables(model)])

    def write_metrics(
        self, metrics: Mapping[str, Any], file_name: str | None = None
    ) -> None:
        """Write the numbers, and where they come from, beside the figures."""
        options, rows = self.options, self.rows
        kept = ("epochs", "batch_size", "learning_rate", "quick")
        complete = {
            "training_seconds": sum(row["seconds"] for row in rows),
            **metrics,
            "data": self.source,
            "settings": {key: vars(options)[key] for key in kept},
            "seed": options.seed,
            "versions": {"python": platform.python_version()}
            | {package: version(package) for package in PACKAGES},
        }
        name = file_name or f"{options.name}_metrics.json"
        write_json(options.figures / name, complete)


def _variables(model: keras.Model) -> list[keras.Variable]:
    """Return all that training changes: weights, random states, optimizers."""
    owners = [model]
    for value in vars(model).values():
        if isinstance(value, keras.optimizers.Optimizer):
            owners.append(value)
    return [variable for owner in owners for variable in owner.variables]


class _Recorder(keras.callbacks.Callback):
    """Records each epoch, some thirty times with a checkpoint and a word."""

    def __init__(self, folder: RunFolder) -> None:
        super().__init__()
        self.folder = folder

    def on_epoch_begin(self, epoch: int, logs: Mapping | None = None) -> None:
        self.started = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Mapping | None = None) -> None:
        losses = {key: float(value) for key, value in logs.items()}
        for name, value in losses.items():
            if not np.isfinite(value):
                raise UsageError(
                    f"{name}: found {value} in epoch {epoch + 1}, expected a finite "
                    "number (is --learning-rate too large?)"
                )
        seconds = time.perf_counter() - self.started
        row = {"epoch": epoch + 1, **losses, "seconds": seconds}
        epochs = self.folder.options.epochs
        if (epoch + 1) % max(1, epochs // 30) and epoch + 1 < epochs:
            self.folder.rows.append(row)  # hundreds of checkpoints would take long
        else:
            self.folder.record(self.model, row)
            text = ", ".join(f"{name} {value:.3g}" for name, value in losses.items())
            print(f"epoch {epoch + 1} of {epochs}, {seconds:.0f} s: {text}", flush=True)
