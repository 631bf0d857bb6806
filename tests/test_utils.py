"""The shared floor: command line, batches, report blocks, exit codes."""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

import utils

import keras
import numpy as np
import pytest

from read_MNIST_M import DataError, Split


def parser():
    return utils.argument_parser(
        "Test.",
        name="q1",
        data="x.npy",
        epochs=7,
        quick_epochs=3,
        batch_size=5,
        learning_rate=0.1,
        code_dim=4,
    )


def complete(*arguments):
    arguments = ["--data", "given.npy", *arguments]
    return utils.complete_options(parser().parse_args(arguments))


def test_quick_never_touches_the_report():
    full, quick = complete(), complete("--quick")
    assert (full.epochs, quick.epochs) == (7, 3)
    assert full.updates_report
    assert not quick.updates_report
    assert str(full.figures) == "figures"
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
        ["--batch-size", "-1"],
        ["--no-such-flag"],
    ],
)
def test_wrong_argument_is_one_line_and_code_2(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert arguments[0] in error


def test_help_tells_each_default(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
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
        (None, 0),
    ],
)
def test_exit_codes(capsys, error, code):
    def main():
        if error:
            raise error

    with pytest.raises(SystemExit) as stopped:
        utils.run_script(main)
    assert stopped.value.code == code
    told = capsys.readouterr().err.strip()
    assert told.count("\n") == 0
    assert bool(told) == bool(error)


def epoch_orders(first_epoch, epochs, seed=3):
    images = np.arange(10, dtype=np.uint8)[:, np.newaxis]
    batches = utils.shuffled_batches(images, 4, seed, first_epoch)
    seen = [batch[:, 0] for batch in batches.take(2 * epochs).as_numpy_iterator()]
    return [np.concatenate(seen[i : i + 2]) for i in range(0, len(seen), 2)]


def test_epochs_have_orders_of_their_own_that_resuming_repeats():
    whole = epoch_orders(0, 4)
    assert all(len(set(order)) == 8 for order in whole)
    assert len({tuple(order) for order in whole}) == 4
    np.testing.assert_array_equal(whole[2:], epoch_orders(2, 2))
    assert not np.array_equal(whole, epoch_orders(0, 4, seed=4))


def test_splits_too_small_to_measure_are_refused():
    def split(count):
        return Split(np.zeros((count, 784), np.uint8), None)

    whole = [split(3000), split(300), split(600)]
    assert [len(s.images) for s in utils.limit_splits(whole, True)] == [2000, 200, 500]
    assert [len(s.images) for s in utils.limit_splits(whole, False)] == [3000, 300, 600]
    with pytest.raises(utils.UsageError, match="found 19 test images"):
        utils.limit_splits([*whole[:2], split(19)], False)


def test_report_blocks_are_rewritten_and_prose_is_kept(tmp_path):
    path = tmp_path / "report.md"
    prose = "before\n<!-- begin a -->\n{}\n<!-- end a -->\nafter \\1\n"
    path.write_text(prose.format("old"))
    utils.update_report({"a": "new \\1\n"}, path)
    assert path.read_text() == prose.format("new \\1")
    with pytest.raises(utils.UsageError, match="0 blocks b"):
        utils.update_report({"b": "new"}, path)
    assert path.read_text() == prose.format("new \\1")


def run_options(folder, **changes):
    return argparse.Namespace(
        run_dir=folder, figures=folder, name="q1", resume=False, epochs=3, **changes
    )


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    first = utils.RunFolder(run_options(tmp_path))
    with pytest.raises(utils.UsageError, match="another run at work"):
        utils.RunFolder(run_options(tmp_path))
    utils.RunFolder(run_options(tmp_path / "other"))
    del first
    utils.RunFolder(run_options(tmp_path))


def test_full_disk_is_told_and_what_was_there_stays(tmp_path, monkeypatch, capsys):
    folder = utils.RunFolder(run_options(tmp_path))
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    folder.record(model, {"epoch": 1, "seconds": 1.0})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keras.Model, "save_weights", full)
    monkeypatch.setattr(csv, "DictWriter", full)
    with pytest.raises(SystemExit) as ended:
        utils.run_script(lambda: folder.record(model, {"epoch": 2, "seconds": 1.0}))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert error.count("\n") == 1
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_second_signal_does_not_cut_short_what_the_first_one_saves(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(Path(utils.__file__).parent)!r})
import os, signal, time, utils
def main():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(9)
    except KeyboardInterrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        open({str(tmp_path / "saved")!r}, "w").write("whole")
        raise
utils.run_script(main)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert (tmp_path / "saved").read_text() == "whole"
