"""The shared floor: command line, exit codes, batches, the run's folder, files."""

import contextlib
import json
import pickle
import resource
import shutil
import signal
import sys
import time

import utils

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plots
import report
from read_MNIST_M import DataError, Split

RNG = np.random.default_rng(0)


def complete(*arguments):
    parser = utils.argument_parser("Test.", "x.npy", 7, 5, 0.1, 4)
    return utils.complete_options(parser.parse_args([*map(str, arguments)]), "q1")


# Command line ----------------------------------------------------------------------


def test_quick_never_touches_the_report():
    full, quick = complete(), complete("--quick")
    assert (full.epochs, quick.epochs) == (7, utils.QUICK_EPOCHS)
    assert complete("--quick", "--epochs", 2).epochs == 2
    assert full.updates_report
    assert not quick.updates_report
    assert [str(full.figures), str(full.run_dir)] == ["figures", "runs/q1"]
    assert str(quick.figures) == "runs/quick/figures"
    assert str(quick.run_dir) == "runs/quick/q1"
    assert not complete("--figures", "elsewhere").updates_report


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epochs", "0"],
        ["--epochs", "x"],
        ["--learning-rate", "nan"],
        ["--learning-rate", "inf"],
        ["--learning-rate", "0"],
        ["--batch-size", "-1"],
        ["--code-dim", "1.5"],
        ["--seed", "-1"],
        ["--seed", 2**31],
        ["--no-such-flag"],
    ],
)
def test_wrong_argument_is_one_line_and_code_2(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        utils.run_script(lambda: complete(*arguments))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert arguments[0] in error


def test_help_tells_each_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        complete("--help")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for default in ("x.npy", "default: 7", "default: 5", "0.1", "default: 4"):
        assert default in text


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("a\nb"), 2),
        (utils.UsageError("wrong"), 2),
        (OSError("disk full"), 2),
        (KeyboardInterrupt(), 130),
        (utils.Interrupted(), 130),
        (BrokenPipeError(), 130),
    ],
)
def test_exit_codes(capsys, monkeypatch, error, code):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # as before, at the end

    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        utils.run_script(main)
    assert stopped.value.code == code
    told = capsys.readouterr().err.strip()
    assert told
    assert "\n" not in told
    assert told.endswith(" --resume") == isinstance(error, utils.Interrupted)


def test_success_returns_and_a_bug_is_not_hidden(capsys):
    assert utils.run_script(lambda: None) is None
    assert capsys.readouterr().err == ""
    with pytest.raises(ZeroDivisionError):
        utils.run_script(lambda: 1 / 0)


@pytest.fixture
def own_handlers():
    """Handlers of a guest's for the two signals that a script takes."""

    def own(*_):
        raise AssertionError("the guest's, while the script runs")

    numbers = signal.SIGINT, signal.SIGTERM
    before = {number: signal.signal(number, own) for number in numbers}
    yield {number: own for number in numbers}
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers():
    return {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_cut_short_what_the_first_one_saves(
    own_handlers, number
):
    saved = []

    def main():
        try:
            signal.raise_signal(number)
            time.sleep(5)
        except KeyboardInterrupt:
            for second in own_handlers:
                signal.raise_signal(second)
            saved.append("whole")
            raise

    with pytest.raises(SystemExit) as ended:
        utils.run_script(main)
    assert ended.value.code == 130
    assert saved == ["whole"]
    assert handlers() == own_handlers


def test_signals_and_keras_settings_are_put_back(own_handlers):
    config = keras.config
    before = config.floatx(), config.image_data_format()
    seen = []
    try:
        config.set_floatx("float16")
        config.set_image_data_format("channels_first")
        utils.run_script(
            lambda: seen.extend([config.floatx(), config.image_data_format()])
        )
        seen += config.floatx(), config.image_data_format()
    finally:
        config.set_floatx(before[0])
        config.set_image_data_format(before[1])
    assert seen == ["float32", "channels_last", "float16", "channels_first"]
    assert handlers() == own_handlers


# Data ------------------------------------------------------------------------------


def splits(*counts):
    return [
        Split(RNG.integers(0, 256, (count, 784), np.uint8), np.arange(count) % 10)
        for count in counts
    ]


def test_images_are_scaled_to_unit_floats():
    given = splits(100, 1, 20)
    for before, after in zip(
        given, utils.prepare_splits(given, complete()), strict=True
    ):
        assert after.images.dtype == np.float32
        np.testing.assert_allclose(after.images, before.images / 255, rtol=1e-6)
        np.testing.assert_array_equal(after.labels, before.labels)
    every = np.arange(256, dtype=np.uint8)
    assert (utils.unit_floats(every).min(), utils.unit_floats(every).max()) == (0, 1)


def test_quick_takes_the_first_images_of_each_split():
    given = splits(2001, 300, 501)
    unlabelled = [Split(images, None) for images, _ in given]
    for whole in (given, unlabelled):
        quick = utils.prepare_splits(whole, complete("--quick"))
        assert [len(split.images) for split in quick] == [2000, 200, 500]
        for before, after in zip(whole, quick, strict=True):
            np.testing.assert_allclose(
                after.images[-1] * 255, before.images[len(after.images) - 1], atol=1e-3
            )
            assert after.labels is None or len(after.labels) == len(after.images)


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ((99, 9, 99), "99 training images, expected 100"),
        ((100, 0, 99), "0 validation images, expected 1"),
        ((100, 9, 19), "19 test images, expected 20"),
    ],
)
def test_splits_too_small_to_measure_are_refused(counts, told):
    with pytest.raises(utils.UsageError, match=f"given.npy: found {told}"):
        utils.prepare_splits(splits(*counts), complete("--data", "given.npy"))


@pytest.mark.parametrize("image", [np.zeros(784), np.arange(784) % 251])
def test_training_images_that_are_all_the_same_are_refused(image):
    given = splits(100, 9, 20)
    given[0].images[:] = image
    with pytest.raises(utils.UsageError, match="given.npy: found .* all the same"):
        utils.prepare_splits(given, complete("--data", "given.npy"))


@pytest.mark.parametrize(("asked", "used"), [(5000, 100), (101, 100), (100, 100)])
def test_batch_size_is_at_most_the_number_of_images(capsys, asked, used):
    options = complete("--batch-size", asked)
    utils.prepare_splits(splits(100, 9, 20), options)
    assert options.batch_size == used
    assert (f"--batch-size {used}" in capsys.readouterr().out) == (asked != used)


def epoch_orders(first_epoch, epochs, seed=3):
    images = np.arange(10, dtype=np.float32)[:, np.newaxis]
    chosen = range(first_epoch, first_epoch + epochs)
    seen = []
    for x, target in utils.shuffled_batches(images, 4, seed, chosen):
        x = x.numpy()
        assert x.dtype == np.float32
        assert x.shape == (4, 1)
        np.testing.assert_array_equal(x, target)
        seen.append(x)
    return np.reshape(seen, (epochs, 8))


def test_epochs_have_orders_of_their_own_that_resuming_repeats():
    whole = epoch_orders(0, 4)
    assert all(len(set(order)) == 8 for order in whole)
    assert len({tuple(order) for order in whole}) == 4
    np.testing.assert_array_equal(whole[2:], epoch_orders(2, 2))
    assert not np.array_equal(whole, epoch_orders(0, 4, seed=4))


def test_predictions_are_of_all_images_in_their_order():
    same = keras.Sequential([keras.Input((3,)), keras.layers.Identity()])
    inputs = RNG.random((501, 3))
    found = utils.predict(same, inputs)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, inputs, rtol=1e-6)


# Training --------------------------------------------------------------------------


def test_rate_rises_in_the_first_epoch_and_falls_to_nothing():
    schedule = utils.falling_rate(0.1, epochs=4, steps=10)
    rates = np.array([float(schedule(step)) for step in range(41)])
    assert rates[0] == 0
    assert rates[10] == pytest.approx(0.1)
    assert (np.diff(rates[:11]) > 0).all()
    assert (np.diff(rates[10:]) < 0).all()
    assert rates[25] == pytest.approx(0.05)  # a cosine's middle
    assert rates[40] == pytest.approx(0, abs=1e-6)
    only = utils.falling_rate(0.1, epochs=1, steps=10)
    np.testing.assert_allclose([float(only(step)) for step in range(10)], rates[:10])


def run_options(folder, *arguments):
    (folder / "given.npy").write_bytes(b"images")
    places = "--run-dir", folder / "run", "--figures", folder / "figures"
    return complete("--data", folder / "given.npy", *places, *arguments)


def small_model(width=2):
    model = keras.Sequential([keras.Input((width,)), keras.layers.Dense(width)])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def fit(options, networks=(), model=None):
    """Train a small model in its folder; return the run."""
    images = np.linspace(0, 1, 40, dtype=np.float32).reshape(20, 2)
    with utils.RunFolder(options) as run:
        model = model or small_model()
        run.fit(model, dict(networks), images, images[:4], lambda history: None)
    return run


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    options = run_options(tmp_path)
    other = run_options(tmp_path, "--run-dir", tmp_path / "other")
    with utils.RunFolder(options):
        with (
            pytest.raises(utils.UsageError, match="run: found another run at work"),
            utils.RunFolder(options),
        ):
            pass
        with utils.RunFolder(other):
            pass
    with pytest.raises(ZeroDivisionError) as kept, utils.RunFolder(options):
        raise ZeroDivisionError
    assert kept.value.__traceback__  # its frames are alive, and the folder is free
    with utils.RunFolder(options):
        pass


def test_a_run_interrupted_before_its_first_epoch_ended_goes_on_from_the_start(
    tmp_path,
):
    with pytest.raises(utils.Interrupted), utils.RunFolder(run_options(tmp_path)):
        raise KeyboardInterrupt
    run = fit(run_options(tmp_path, "--resume"))
    assert list(run.history["epoch"]) == [1, 2, 3, 4, 5, 6, 7]


def test_loss_that_is_no_number_is_one_line_and_no_model_is_saved(tmp_path, refused):
    model = small_model()
    model.optimizer.learning_rate = 1e30
    error = refused(lambda: fit(run_options(tmp_path), {"model": model}, model))
    assert "expected a finite number" in error
    assert not list(tmp_path.rglob("*.keras"))


def test_history_is_of_each_epoch_and_a_new_run_begins_it_anew(tmp_path):
    for epochs in (3, 2):
        run = fit(run_options(tmp_path, "--epochs", epochs))
        assert list(run.history["epoch"]) == list(range(1, epochs + 1))
        assert {"loss", "val_loss", "seconds"} < run.history.keys()
        lines = (tmp_path / "figures" / "q1_history.csv").read_text().splitlines()
        assert lines[0].split(",") == list(run.history)
        assert len(lines) == 1 + epochs


def test_metrics_are_written_with_where_they_come_from(tmp_path):
    run = fit(run_options(tmp_path, "--epochs", "2", "--seed", "5"))
    run.write_metrics({"test_mse": 0.5, "none": None})
    found = json.loads((tmp_path / "figures" / "q1_metrics.json").read_text())
    assert (found["test_mse"], found["none"], found["seed"]) == (0.5, None, 5)
    assert found["settings"]["epochs"] == 2
    assert found["data"] == utils.describe_source(tmp_path / "given.npy")
    assert {"python", "tensorflow", "keras", "numpy"} <= found["versions"].keys()
    assert found["training_seconds"] == pytest.approx(sum(run.history["seconds"]))


# Files -----------------------------------------------------------------------------


@contextlib.contextmanager
def disk_with_room_for(size):
    """Let no file grow beyond a size in bytes, as where the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("written", ["checkpoint", "model", "figure", "report"])
def test_full_disk_is_told_and_what_was_there_stays(tmp_path, refused, written):
    options = run_options(tmp_path, "--epochs", 1)
    large = small_model(200)
    place = {
        "checkpoint": options.run_dir / utils.CHECKPOINT,
        "model": options.run_dir / "large.keras",
        "figure": tmp_path / "x.png",
        "report": tmp_path / "report.md",
    }[written]
    block = (
        "<!-- begin q1 --><!-- end q1 --><!-- begin q1.error --><!-- end q1.error -->"
    )
    (tmp_path / "report.md").write_text(block + "prose" * 3000)
    run = fit(options)
    committed = report.__file__.replace("report.py", "figures/q1_metrics.json")
    shutil.copy(committed, options.figures)

    def write():
        if written == "checkpoint":
            run.record(large, run.rows[0])
        elif written == "model":
            fit(options, {"large": large})
        elif written == "figure":
            plots.image_grid(place, RNG.random((4, 28, 28)), "title")
        else:
            report.update(options.figures, place)

    write()
    before = contents(tmp_path)
    assert len(before[place]) > 9_000
    with disk_with_room_for(9_000):
        error = refused(write)
    assert "File too large" in error
    after = contents(tmp_path)
    assert after.keys() == before.keys()
    assert after[place] == before[place]
    assert str(place) in error


def test_folder_that_cannot_be_made_is_told(tmp_path, refused):
    (tmp_path / "file").write_text("")
    options = run_options(tmp_path, "--run-dir", tmp_path / "file" / "x")
    assert str(tmp_path / "file") in refused(lambda: fit(options))


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_replacing_leaves_the_old_file_whole_where_it_fails(tmp_path, error):
    path = tmp_path / "new" / "file.txt"
    with utils.replacing(path) as temporary:
        assert temporary.suffix == path.suffix
        temporary.write_text("old")
    with pytest.raises(error), utils.replacing(path) as temporary:
        temporary.write_text("ne")
        raise error
    assert contents(tmp_path) == {path: b"old"}
    with utils.replacing(path) as temporary:
        temporary.write_text("new")
    assert contents(tmp_path) == {path: b"new"}


def test_source_of_a_built_file_is_known_until_somebody_changes_it(tmp_path):
    path = tmp_path / "data.npy"
    path.write_bytes(b"built")
    given = utils.describe_source(path)
    assert given["file"] == "data.npy"
    assert given["source"] == "a file as given"
    record = {"source": "built", "digits": "MNIST", "sha256": given["sha256"]}
    utils.write_json(utils.sources_path(path), record)
    assert utils.describe_source(path) == {"file": "data.npy"} | record
    for damaged in (b"{", b"[]", b"\xff"):
        utils.sources_path(path).write_bytes(damaged)
        assert utils.describe_source(path) == given
    utils.write_json(utils.sources_path(path), record)
    path.write_bytes(b"changed")
    assert utils.describe_source(path)["source"] == "a file as given"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Options that resume a run of two epochs, its model, its files."""
    folder = tmp_path_factory.mktemp("finished")
    model = small_model()
    fit(run_options(folder, "--epochs", 2), model=model)
    return run_options(folder, "--epochs", 2, "--resume"), model, contents(folder)


def resumed(finished, name, content):
    """Resume with a changed file; return the line that refuses, or None."""
    options, model, files = finished
    for path, whole in files.items():
        path.write_bytes(content if path.name == name else whole)
    try:
        run = fit(options, model=model)
    except utils.UsageError as error:
        assert "\n" not in str(error)
        assert str(options.run_dir) in str(error) or str(options.figures) in str(error)
        return str(error)
    assert list(run.history["epoch"]) == [1, 2]
    return None


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 9), st.binary(max_size=9)),
        min_size=1,
        max_size=3,
    )
)
def test_mutated_checkpoint_is_loaded_or_refused(finished, edits):
    options, _, files = finished
    content = bytearray(files[options.run_dir / utils.CHECKPOINT])
    for place, removed, new in edits:
        at = int(place * len(content))
        content[at : at + removed] = new
    resumed(finished, utils.CHECKPOINT, content)


@pytest.mark.parametrize("content", [b"", b"epoch,seconds\n1,soon\n2,soon\n", None])
def test_history_that_lacks_an_epoch_is_refused(finished, content):
    options, _, files = finished
    history = options.figures / "q1_history.csv"
    if content is None:
        content = files[history].rpartition(b"2,")[0]
    error = resumed(finished, history.name, content)
    assert f"{history}: found" in error
    assert "expected the history of 2 epochs" in error


class _Touch:
    def __reduce__(self):
        return open, ("it_ran", "w")


def test_checkpoint_of_something_else_is_refused(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, _, files = finished
    whole = files[options.run_dir / utils.CHECKPOINT]
    assert resumed(finished, utils.CHECKPOINT, whole) is None
    path = tmp_path / "other.npz"
    others = [b"", b"no archive", whole[: len(whole) // 2], pickle.dumps(_Touch())]
    for arrays in ([np.zeros(3)], [np.array(_Touch())] * 9):
        np.savez(path, *arrays)
        others.append(path.read_bytes())
    for content in others:
        assert "expected a checkpoint of this run" in resumed(
            finished, utils.CHECKPOINT, content
        )
    assert list(tmp_path.iterdir()) == [path]
