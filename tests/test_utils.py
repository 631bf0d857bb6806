"""The shared floor: command line, exit codes, batches, the run's folder, files."""

import contextlib
import io
import json
import resource
import signal
import sys
import time

import utils

import keras
import numpy as np
import pytest

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


def test_a_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        utils.run_script(lambda: 1 / 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_cut_short_what_the_first_one_saves(number):
    both, saved = (signal.SIGINT, signal.SIGTERM), []
    before = [signal.getsignal(each) for each in both]

    def main():
        try:
            signal.raise_signal(number)
            time.sleep(5)
        except KeyboardInterrupt:
            for second in both:
                signal.raise_signal(second)
            saved.append("whole")
            raise

    with pytest.raises(SystemExit) as ended:
        utils.run_script(main)
    assert ended.value.code == 130
    assert saved == ["whole"]
    assert [signal.getsignal(each) for each in both] == before


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
    assert list(utils.unit_floats(np.array([0, 255], np.uint8))) == [0, 1]


def test_quick_takes_the_first_images_of_each_split():
    given = splits(2001, 300, 501)
    given[1] = Split(given[1].images, None)
    quick = utils.prepare_splits(given, complete("--quick"))
    assert [len(split.images) for split in quick] == [2000, 200, 500]
    for before, after in zip(given, quick, strict=True):
        last = before.images[len(after.images) - 1]
        np.testing.assert_allclose(after.images[-1] * 255, last, atol=1e-3)
    assert [len(quick[0].labels), quick[1].labels] == [2000, None]


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


def test_training_images_that_are_all_the_same_are_refused():
    given = splits(100, 9, 20)
    given[0].images[:] = np.arange(784) % 251
    with pytest.raises(utils.UsageError, match="given.npy: found .* all the same"):
        utils.prepare_splits(given, complete("--data", "given.npy"))


def test_batch_size_is_at_most_the_number_of_images(capsys):
    options = complete("--batch-size", 101)
    utils.prepare_splits(splits(100, 9, 20), options)
    assert options.batch_size == 100
    assert "--batch-size 100:" in capsys.readouterr().out


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
    rates = [float(schedule(step)) for step in (0, 5, 10, 25, 40)]
    np.testing.assert_allclose(rates, [0, 0.05, 0.1, 0.05, 0], atol=1e-6)


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
    refusal = pytest.raises(utils.UsageError, match="run: found another run at work")
    with utils.RunFolder(options), refusal, utils.RunFolder(options):
        pass
    with utils.RunFolder(options):  # which is free again
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
    resumed = fit(run_options(tmp_path, "--epochs", 2, "--resume"))
    assert list(resumed.history["epoch"]) == [1, 2]


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


def test_full_disk_is_told_and_what_was_there_stays(tmp_path, refused):
    options, large = run_options(tmp_path, "--epochs", 1), small_model(200)
    run = fit(options, {"large": large})
    run.record(large, run.rows[0])
    before = contents(tmp_path)
    for path, write in (
        (run.checkpoint, lambda: run.record(large, run.rows[0])),
        (options.run_dir / "large.keras", lambda: fit(options, {"large": large})),
    ):
        with disk_with_room_for(9_000):
            error = refused(write)
        assert "File too large" in error
        assert str(path) in error
        after = contents(tmp_path)
        assert after.keys() == before.keys()
        assert after[path] == before[path]


def test_replacing_leaves_the_old_file_whole_where_it_fails(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with utils.replacing(path) as temporary:
        assert temporary.suffix == path.suffix
        temporary.write_text("old")
    with pytest.raises(KeyboardInterrupt), utils.replacing(path) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
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
    utils.sources_path(path).write_bytes(b"{")
    assert utils.describe_source(path) == given
    utils.write_json(utils.sources_path(path), record)
    path.write_bytes(b"changed")
    assert utils.describe_source(path)["source"] == "a file as given"


class _Touch:
    def __reduce__(self):
        return open, ("it_ran", "w")


def archive_of(*arrays):
    file = io.BytesIO()
    np.savez(file, *arrays)
    return file.getvalue()


EXPECTED = {
    utils.SETTINGS: "settings of a run",
    "q1_history.csv": "the history of 2 epochs",
    utils.CHECKPOINT: "a checkpoint of this run",
}


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        (utils.SETTINGS, lambda whole: b"{"),
        ("q1_history.csv", lambda whole: b""),
        ("q1_history.csv", lambda whole: whole.splitlines()[0]),
        (utils.CHECKPOINT, lambda whole: whole[: len(whole) // 2]),
        (utils.CHECKPOINT, lambda whole: archive_of(np.zeros(3))),
        (utils.CHECKPOINT, lambda whole: archive_of(*[np.array(_Touch())] * 9)),
    ],
)
def test_damaged_file_of_a_run_is_refused(
    tmp_path, monkeypatch, refused, name, damaged
):
    monkeypatch.chdir(tmp_path)
    fit(run_options(tmp_path, "--epochs", 2))
    (path,) = tmp_path.rglob(name)
    path.write_bytes(damaged(path.read_bytes()))
    before = contents(tmp_path)
    resumed = run_options(tmp_path, "--epochs", 2, "--resume")
    error = refused(lambda: fit(resumed))
    assert f"{path}: found " in error
    assert f", expected {EXPECTED[name]}" in error
    assert contents(tmp_path) == before  # nothing in the file ran
