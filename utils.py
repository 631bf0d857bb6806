"""What both scripts share: command line, run folder, training, figures, report."""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import json
import os
import platform
import re
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, NoReturn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_standard_error = os.dup(2)  # whatever is held back


def _interrupted(*more: str) -> str:
    """Return the line that says how to go on: the command, with more arguments."""
    script, *arguments = Path(sys.argv[0]).name, *sys.argv[1:]
    arguments = [argument for argument in arguments if argument not in more]
    again = shlex.join(["python", script, *arguments, *more])
    return f"\n{script}: interrupted; go on with: {again}\n"


def _leave_at_once(*_: object) -> NoReturn:
    """End a script that is interrupted while it loads, with nothing yet to save."""
    os.write(_standard_error, _interrupted().encode())
    os._exit(130)


if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:
    for _number in SIGNALS:  # until `run_script`
        signal.signal(_number, _leave_at_once)


@contextlib.contextmanager
def _loading() -> Iterator[None]:
    """Hold back what TensorFlow's C++ code prints while it loads, unless it fails.

    No setting turns these lines off, and an error of ours has to be the one line on
    standard error. The garbage collector is held back, too: nothing that a library
    makes as it loads is garbage, and looking takes a fifth of the time.
    """
    gc.disable()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held_back:
        os.dup2(held_back.fileno(), 2)
        try:
            yield
        except BaseException:
            held_back.seek(0)
            os.write(_standard_error, held_back.read())
            raise
        finally:
            os.dup2(_standard_error, 2)
            gc.freeze()
            gc.enable()


os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Without these XLA compiles in three quarters of the time, and its steps are no slower.
# The last pass also kept it from fusing sums with what they add up.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_extra_options=xla_cpu_disable_loop_unrolling "
    "--xla_disable_hlo_passes=while-loop-invariant-code-motion,simplify-while-loops,"
    "tree_reduction_rewriter",
)
with _loading():
    import keras
    import tensorflow as tf
tf.get_logger().setLevel("ERROR")  # it warns of each new model's first trace

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from make_data import describe_source, ensure_data, replacing  # noqa: E402
from read_MNIST_M import DataError, Split  # noqa: E402

FIGURES = "figures"
REPORT = "report.md"
QUICK_SIZES = (2_000, 200, 500)  # train, validation and test images
LEAST_SIZES = (100, 1, 20)
SETTINGS, CHECKPOINT, LOCK = "settings.json", "checkpoint.weights.h5", "lock"
PACKAGES = ("tensorflow", "keras", "numpy", "scikit-learn", "openTSNE", "matplotlib")

# Readable in grey: dark, light and dashed differ without colour.
INK, ACCENT, PALE = "#1b3a5b", "#d1622b", "#9aa5b1"
GAP = 2  # pixels between the images of a grid
STYLE = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": plt.cycler(color=[INK, ACCENT, PALE]),
    "legend.frameon": False,
}


class UsageError(ValueError):
    """A mistake of the user's, told in one line."""


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
    *,
    name: str,
    data: str,
    epochs: int,
    quick_epochs: int,
    batch_size: int,
    learning_rate: float,
    code_dim: int,
) -> argparse.ArgumentParser:
    """Return a parser of the command line that both scripts share.

    Args:
        description: what the script does.
        name: the question's, "q1" or "q2", which its run folder and figures bear.
        data: default data file.
        epochs: default number of passes over the training images.
        quick_epochs: the same under `--quick`.
        batch_size: default number of images in a step.
        learning_rate: default of Adam's, in units of the weights.
        code_dim: default number of dimensions of the code.
    """
    parser = OneLineParser(description=description)
    parser.set_defaults(name=name, default_data=data, quick_epochs=quick_epochs)
    add = parser.add_argument
    add(
        "--data",
        metavar="PATH",
        help=f"data file (default: {data}, built when it is missing)",
    )
    add(
        "--epochs",
        type=positive_int,
        metavar="N",
        help=f"passes over the training images (default: {epochs}; {quick_epochs} "
        "with --quick)",
    )
    add(
        "--batch-size",
        type=positive_int,
        default=batch_size,
        metavar="N",
        help="images in a training step (default: %(default)s)",
    )
    add(
        "--learning-rate",
        type=positive_float,
        default=learning_rate,
        metavar="X",
        help="Adam's step size, in units of the weights (default: %(default)s)",
    )
    add(
        "--code-dim",
        type=positive_int,
        default=code_dim,
        metavar="N",
        help="dimensions of the code (default: %(default)s numbers)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of weights, order and noise (default: %(default)s)",
    )
    add(
        "--figures",
        metavar="DIR",
        help=f"folder for figures and metrics (default: {FIGURES}, which also "
        f"refreshes {REPORT}; runs/quick/figures with --quick)",
    )
    add(
        "--run-dir",
        metavar="DIR",
        help=f"folder for models and checkpoints (default: runs/{name}; "
        f"runs/quick/{name} with --quick)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on from the last epoch that the run folder holds",
    )
    add(
        "--quick",
        action="store_true",
        help="the same path in about a minute, on the first "
        f"{QUICK_SIZES[0]:,} training images",
    )
    parser.set_defaults(full_epochs=epochs)
    return parser


def complete_options(options: argparse.Namespace) -> argparse.Namespace:
    """Fill in the defaults that depend on `--quick`; build the data if missing.

    Raises:
        UsageError: the seed is out of range.
        DataError: the data is missing and can't be built.
    """
    if not 0 <= options.seed < 2**31:
        raise UsageError(f"--seed: found {options.seed}, expected 0..{2**31 - 1}")
    if options.data is None:
        options.data = options.default_data
        ensure_data(options.data)
    base = Path("runs/quick") if options.quick else Path("runs")
    if options.epochs is None:
        options.epochs = options.quick_epochs if options.quick else options.full_epochs
    options.updates_report = options.figures is None and not options.quick
    if options.figures is None:
        options.figures = base / "figures" if options.quick else FIGURES
    options.figures = Path(options.figures)
    options.run_dir = Path(options.run_dir or base / options.name)
    return options


def limit_splits(splits: Sequence[Split], quick: bool) -> list[Split]:
    """Return the splits, under `--quick` only the first images of each.

    Raises:
        UsageError: a split has fewer images than training and measuring take.
    """
    limited = []
    for (images, labels), size, least, name in zip(
        splits,
        QUICK_SIZES,
        LEAST_SIZES,
        ("training", "validation", "test"),
        strict=True,
    ):
        if len(images) < least:
            raise UsageError(
                f"--data: found {len(images)} {name} images, expected {least} or more"
            )
        end = size if quick else None
        limited.append(Split(images[:end], None if labels is None else labels[:end]))
    return limited


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main` and exit: 0 done, 2 user's mistake, 130 interrupted."""

    def interrupt(*_: object) -> NoReturn:
        # Once is enough: a second signal must not cut short what the first one saves.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in SIGNALS:
        signal.signal(number, interrupt)
    script = Path(sys.argv[0]).name
    try:
        main()
    except (DataError, UsageError, OSError) as error:
        print(f"{script}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write(_interrupted(*["--resume"] * RunFolder.begun))
        sys.exit(130)
    sys.exit(0)


class Stopwatch:
    """Notes what each stage of a run takes, in seconds of wall-clock time."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.started = self.last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Add the time since the last call to a stage."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.last = now


def peak_memory_mib() -> float | None:
    """Return the most memory that this process ever held, None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# Training --------------------------------------------------------------------------


def shuffled_batches(
    images: np.ndarray | tf.Tensor, batch_size: int, seed: int, first_epoch: int = 0
) -> tf.data.Dataset:
    """Return batches without end, each epoch in an order that seed and epoch fix.

    A run that is resumed at an epoch sees what a run never interrupted would see.

    Args:
        images: uint8 (N, ...).
        batch_size: images in a batch; the N mod batch_size that an epoch's order
            leaves over are dropped.
        seed: of the orders.
        first_epoch: the epoch that the batches begin with.
    """
    pixels = tf.convert_to_tensor(images)
    options = tf.data.Options()
    options.autotune.enabled = False  # its thread can take 5 s to stop

    @tf.autograph.experimental.do_not_convert
    def one_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
        order = tf.random.experimental.stateless_shuffle(
            tf.range(len(images)), seed=tf.stack([tf.cast(seed, tf.int64), epoch])
        )
        order = order[: len(images) // batch_size * batch_size]
        return tf.data.Dataset.from_tensor_slices(tf.reshape(order, (-1, batch_size)))

    @tf.autograph.experimental.do_not_convert
    def pick(index: tf.Tensor) -> tf.Tensor:
        return tf.gather(pixels, index)

    return (
        tf.data.Dataset.counter(first_epoch)
        .flat_map(one_epoch)
        .map(pick)
        .prefetch(2)
        .with_options(options)
    )


def steps_per_epoch(images: np.ndarray | tf.Tensor, batch_size: int) -> int:
    """Return the training steps in an epoch: whole batches, one at least."""
    return max(1, len(images) // batch_size)


def steps_per_execution(steps: int, most: int = 32) -> int:
    """Return how many training steps Keras takes at a time, without Python between.

    They divide the steps of an epoch, for Keras finishes what it has begun.

    Args:
        steps: in an epoch.
        most: steps at a time.
    """
    return max(n for n in range(1, most + 1) if steps % n == 0)


def falling_rate(
    rate: float, epochs: int, steps: int
) -> keras.optimizers.schedules.LearningRateSchedule:
    """Return a rate that rises over an epoch, then decays to zero along a cosine.

    Args:
        rate: the highest.
        epochs: of the whole run.
        steps: training steps in an epoch.
    """
    return keras.optimizers.schedules.CosineDecay(
        0.0, max(1, (epochs - 1) * steps), warmup_target=rate, warmup_steps=steps
    )


class FusedAdam(keras.optimizers.Adam):
    """Keras's Adam, each variable's update one operation of TensorFlow's.

    Keras makes it of a dozen, each a pass through memory and something to compile.

    Args:
        learning_rate: a number or a schedule.
        *args: as of `keras.optimizers.Adam`.
        decay: of all variables, times the rate (Loshchilov & Hutter 2019,
            arXiv:1711.05101).
        clip: the norm that all gradients together are scaled down to.
        **kwargs: as of `keras.optimizers.Adam`.
    """

    def __init__(
        self,
        learning_rate: Any,
        *args: Any,
        decay: float = 0.0,
        clip: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, *args, **kwargs)
        self.decay, self.clip = decay, clip

    def apply(
        self,
        grads: Sequence[tf.Tensor],
        trainable_variables: Sequence[keras.Variable] | None = None,
    ) -> None:
        """Update the variables by their gradients; see `keras.optimizers.Optimizer`."""
        if self.clip is not None:
            grads, _ = tf.clip_by_global_norm(grads, self.clip)
        super().apply(grads, trainable_variables)

    def _backend_update_step(
        self,
        grads: Sequence[tf.Tensor],
        trainable_variables: Sequence[keras.Variable],
        learning_rate: tf.Tensor,
    ) -> None:
        """Take a step (Kingma & Ba 2015, arXiv:1412.6980, the end of section 2).

        `update_step`, meant for this, would compute for each variable what all share.
        """
        step = tf.cast(self.iterations.value + 1, tf.float32)
        shared = {
            "beta1_power": self.beta_1**step,
            "beta2_power": self.beta_2**step,
            "lr": tf.convert_to_tensor(learning_rate),
            "beta1": tf.constant(self.beta_1),
            "beta2": tf.constant(self.beta_2),
            "epsilon": tf.constant(self.epsilon),
        }
        shrinking = shared["lr"] * self.decay
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            index = self._get_variable_index(variable)
            if self.decay:
                variable.value.assign_sub(shrinking * variable.value)
            tf.raw_ops.ResourceApplyAdam(
                var=variable.value.handle,
                m=self._momentums[index].value.handle,
                v=self._velocities[index].value.handle,
                grad=gradient,
                **shared,
            )


def unit_floats(images: tf.Tensor) -> tf.Tensor:
    """Scale uint8 0..255 to float32 0..1, in the graph."""
    return tf.cast(images, tf.float32) / 255.0


def predict(model: keras.Model, images: np.ndarray) -> np.ndarray:
    """Return what a model makes, float32 (N, ...), of uint8 images (N, ...).

    The model gets them as it was trained on them, scaled to [0, 1].
    """
    pixels, size = tf.constant(images), 500
    batches = tf.data.Dataset.range(0, len(images), size).map(
        lambda start: unit_floats(pixels[start : start + size])
    )
    return model.predict(batches, verbose=0)


@contextlib.contextmanager
def _damage_told(path: Path, expected: str) -> Iterator[None]:
    """Tell in one line that a file of a run is damaged or another's.

    Its bytes may make Keras, h5py or the standard library raise errors of any kind.
    """
    try:
        yield
    except Exception as error:
        found = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"{path}: found {found}, expected {expected}") from error


def _checkpoint_size(model: keras.Model) -> int:
    """Return about how many bytes a model's weights and optimizers take as a file."""
    held = [
        value
        for value in vars(model).values()
        if isinstance(value, keras.optimizers.Optimizer)
    ]
    kept = [variable for part in (model, *held) for variable in part.variables]
    return 2**20 + sum(np.asarray(variable).nbytes + 2**12 for variable in kept)


class RunFolder:
    """A run's folder: its checkpoint, its settings, its models and its history.

    Args:
        options: the completed command line; `run_dir`, `figures`, `resume` and what
            must not change when a run is resumed.

    Attributes:
        begun: whether this process has a run, or went on with one.

    Raises:
        UsageError: `resume` without a run, or with other settings; or another run is
            at work in the folder.
    """

    begun = False

    def __init__(self, options: argparse.Namespace) -> None:
        self.path: Path = options.run_dir
        self.history_path: Path = options.figures / f"{options.name}_history.csv"
        self.checkpoint = self.path / CHECKPOINT
        self.rows: list[dict[str, float]] = []
        self.first_step_seconds = 0.0
        settings_path = self.path / SETTINGS
        if options.resume and not self.holds_a_run(self.path):
            raise UsageError(f"--resume: found no {settings_path}, expected one")
        self.lock = self._locked()
        fixed = (
            *("data", "epochs", "batch_size", "learning_rate", "code_dim", "seed"),
            *("quick", "precision", "encoder", "encoder_loss", "literal", "recipe"),
        )
        settings = {key: vars(options)[key] for key in sorted(fixed) if key in options}
        settings = json.loads(json.dumps(settings))  # compared as the file has them
        if options.resume:
            with _damage_told(settings_path, "settings of a run"):
                before = dict(json.loads(settings_path.read_text(encoding="utf-8")))
            changed = [key for key in settings if settings[key] != before.get(key)]
            if changed:
                flag = "--" + changed[0].replace("_", "-")
                flag = {"--recipe": "a recipe of"}.get(flag, flag)
                raise UsageError(
                    f"--resume: found {flag} {settings[changed[0]]}, "
                    f"expected {before.get(changed[0])} as in the run so far"
                )
        else:
            self.checkpoint.unlink(missing_ok=True)
            with replacing(settings_path) as temporary:
                temporary.write_text(json.dumps(settings, indent=2), encoding="utf-8")
        RunFolder.begun = True

    def _locked(self) -> IO[str]:
        """Return a file whose lock keeps a second run out for as long as it is open.

        The system drops the lock with the process, however that ends. Windows has none.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        file = (self.path / LOCK).open("w")
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise UsageError(
                    f"{self.path}: found another run at work in this folder, expected "
                    "none (--run-dir names another)"
                ) from None
        return file

    @staticmethod
    def holds_a_run(path: Path) -> bool:
        """Say whether a folder holds a run to resume."""
        return (path / SETTINGS).exists()

    def restore(self, model: keras.Model, steps_per_epoch: int) -> int:
        """Load the checkpoint and the history if there is one.

        Args:
            model: built, its optimizers too; `model.optimizer` counts the steps.
            steps_per_epoch: training steps in an epoch.

        Returns:
            How many epochs are done.
        """
        if not self.checkpoint.exists():
            return 0  # new, or interrupted before its first epoch ended
        with _damage_told(self.checkpoint, "a checkpoint of this run"):
            model.load_weights(self.checkpoint)
        # The weights' own step count, so that no second file can disagree with them.
        done = int(model.optimizer.iterations.numpy()) // steps_per_epoch
        with (
            _damage_told(self.history_path, f"the history of {done} epochs"),
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

    def fit(
        self,
        model: keras.Model,
        images: np.ndarray | tf.Tensor,
        options: argparse.Namespace,
        prepare: Callable[[tf.data.Dataset], tf.data.Dataset],
        validation_data: tf.data.Dataset,
        draw: Callable[[dict[str, np.ndarray]], None] | None = None,
        **models: keras.Model,
    ) -> dict[str, np.ndarray]:
        """Train a model, keeping a checkpoint and the history after each epoch.

        Whether training ends or is interrupted, what was learned is saved.

        Args:
            model: compiled and built, with its optimizers' variables.
            images: uint8 (N, ...), training images.
            options: the completed command line.
            prepare: makes of batches of images what `model.fit` takes.
            validation_data: finite batches of what `model.fit` takes.
            draw: draws the history so far if training is interrupted.
            **models: each is saved in the folder as NAME.keras.

        Returns:
            The history: a column a quantity, a value an epoch.

        Raises:
            UsageError: a loss is no longer finite.
        """
        batch_size = min(options.batch_size, len(images))
        steps = steps_per_epoch(images, batch_size)
        done = self.restore(model, steps)
        batches = shuffled_batches(images, batch_size, options.seed, done)
        if done < options.epochs:
            try:
                model.fit(
                    prepare(batches),
                    epochs=options.epochs,
                    initial_epoch=done,
                    steps_per_epoch=steps,
                    validation_data=validation_data,
                    callbacks=[_Recorder(self)],
                    shuffle=False,
                    verbose=1 if sys.stdout.isatty() else 2,
                )
            except KeyboardInterrupt:
                self.save(models)
                if draw is not None and self.rows:
                    draw(self.history)
                raise
        self.save(models)
        return self.history

    @property
    def history(self) -> dict[str, np.ndarray]:
        """A column a quantity, a value an epoch; at least one epoch must be done."""
        return {key: np.array([row[key] for row in self.rows]) for key in self.rows[0]}

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
            # HDF5 crashes where it finds the disk full; a plain write only fails.
            temporary.write_bytes(bytes(_checkpoint_size(model)))
            model.save_weights(temporary)

    def save(self, models: Mapping[str, keras.Model]) -> None:
        """Save each model as NAME.keras."""
        for name, model in models.items():
            with replacing(self.path / f"{name}.keras") as temporary:
                model.save(temporary)


class _Recorder(keras.callbacks.Callback):
    def __init__(self, folder: RunFolder) -> None:
        super().__init__()
        self.folder = folder
        self.epoch = 0
        self.started = 0.0

    def on_epoch_begin(self, epoch: int, logs: Mapping | None = None) -> None:
        self.epoch = epoch
        self.started = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Mapping | None = None) -> None:
        if not self.folder.first_step_seconds:
            self.folder.first_step_seconds = time.perf_counter() - self.started
        for name, value in (logs or {}).items():
            if not np.isfinite(value):
                good = (
                    f"the last good weights are in {self.folder.checkpoint}"
                    if self.folder.rows
                    else "no epoch before it ended well"
                )
                raise UsageError(
                    f"{name}: found {value} at step {batch + 1} of epoch "
                    f"{self.epoch + 1}, expected a finite number; {good} "
                    "(is --learning-rate too large?)"
                )

    def on_epoch_end(self, epoch: int, logs: Mapping | None = None) -> None:
        seconds = time.perf_counter() - self.started
        quantities = {key: float(value) for key, value in (logs or {}).items()}
        row = {"epoch": epoch + 1, **quantities, "seconds": seconds}
        self.folder.record(self.model, row)


# Figures ---------------------------------------------------------------------------


@contextlib.contextmanager
def figure(
    path: Path, rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 4)
) -> Iterator[tuple[plt.Figure, Any]]:
    """Draw a figure in the house style and save it under `path`.

    Args:
        path: of the PNG.
        rows: of axes.
        columns: of axes.
        size: width and height in inches.

    Yields:
        The figure and its axes, as `matplotlib.pyplot.subplots` returns them.
    """
    with plt.style.context(STYLE):
        drawn, axes = plt.subplots(rows, columns, figsize=size)
        try:
            yield drawn, axes
            with replacing(path) as temporary:
                drawn.savefig(temporary)
        finally:
            plt.close(drawn)


def image_grid(
    path: Path,
    images: np.ndarray,
    title: str,
    row_labels: Sequence[str] = (),
    columns: int = 10,
) -> None:
    """Draw images in rows under a title.

    Args:
        path: of the PNG.
        images: float in [0, 1], (N, 28, 28) or (N, 28, 28, 3), row by row.
        title: says what is seen.
        row_labels: one for each row, or none.
        columns: images in a row.
    """
    rows = -(-len(images) // columns)
    gutter = 0.2 + 0.11 * max(map(len, row_labels), default=0)
    size = (8, 0.4 + (8 - gutter) * rows / columns)
    # One picture: axes for each image would take seven times as long.
    height, width = images.shape[1] + GAP, images.shape[2] + GAP
    mosaic = np.ones((rows * height, columns * width, *images.shape[3:]))
    for index, image in enumerate(images):
        top, left = index // columns * height, index % columns * width
        mosaic[top : top + height - GAP, left : left + width - GAP] = image
    with figure(path, size=size) as (drawn, axes):
        drawn.suptitle(title, fontsize=11)
        axes.set_axis_off()
        axes.imshow(mosaic[:-GAP, :-GAP], cmap="gray", vmin=0, vmax=1)
        for row, label in enumerate(row_labels):
            middle = row * height + (height - GAP) / 2
            axes.text(-2 * GAP, middle, label, ha="right", va="center")


# Metrics and report ----------------------------------------------------------------


def write_metrics(
    options: argparse.Namespace,
    metrics: Mapping[str, Any],
    watch: Stopwatch,
    file_name: str | None = None,
) -> dict[str, Any]:
    """Write a run's metrics with where they come from.

    Args:
        options: the completed command line.
        metrics: the numbers.
        watch: started when the run did.
        file_name: in the folder of the figures; by default `NAME_metrics.json`.

    Returns:
        What was written.
    """
    settings = ("epochs", "batch_size", "learning_rate", "quick", "precision")
    complete = {
        **metrics,
        "data": describe_source(options.data),
        "settings": {key: vars(options)[key] for key in settings if key in options},
        "seed": options.seed,
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in PACKAGES},
        "wall_seconds": time.perf_counter() - watch.started,
        "stage_seconds": watch.seconds,
        "peak_memory_mib": peak_memory_mib(),
    }
    path = options.figures / (file_name or f"{options.name}_metrics.json")
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(complete, indent=2) + "\n", encoding="utf-8")
    return complete


def update_report(blocks: Mapping[str, str], path: str | os.PathLike = REPORT) -> None:
    """Rewrite the marked blocks of the report.

    A block stands between the lines `<!-- begin NAME -->` and `<!-- end NAME -->`.

    Args:
        blocks: Markdown by the block's name.
        path: of the report.

    Raises:
        UsageError: the report is missing, or a block of it is.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"{path}: found no such file, expected the report to refresh")
    text = path.read_text(encoding="utf-8")
    for name, content in blocks.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        replacement = f"{begin}\n{content.strip()}\n{end}"
        text, count = pattern.subn(lambda _, new=replacement: new, text)
        if count != 1:
            raise UsageError(f"{path}: found {count} blocks {name}, expected one")
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, its first column left-aligned, the others right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def provenance(metrics: Mapping[str, Any]) -> str:
    """Say in a paragraph of Markdown where a run's numbers come from."""
    data, settings = metrics["data"], metrics["settings"]
    versions = ", ".join(f"{name} {v}" for name, v in metrics["versions"].items())
    sources = [data[key] for key in ("digits", "backgrounds") if key in data]
    training, wall = (metrics[f"{kind}_seconds"] / 60 for kind in ("training", "wall"))
    resumed = ", partly before it was resumed" if training > wall else ""
    precision = f", in {settings['precision']}" if "precision" in settings else ""
    return (
        f"Data: `{data['file']}`, {data['source']}"
        f"{': ' if sources else ''}{'; '.join(sources)}. "
        f"{settings['epochs']} epochs, batch {settings['batch_size']}, learning rate "
        f"{settings['learning_rate']:g}, seed {metrics['seed']}{precision}; "
        f"{training:.1f} minutes of training{resumed}; the command took {wall:.1f} in "
        f"all. {versions}."
    )
