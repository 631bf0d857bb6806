"""The shared floor: command line, batches, report blocks, exit codes."""

import argparse
import contextlib
import gc
import hashlib
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import utils

import keras
import matplotlib.pyplot as plt
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

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


def test_garbage_is_collected_once_all_is_loaded():
    assert gc.isenabled()


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


def test_fused_adam_steps_as_keras_adam_with_decoupled_decay_does():
    rng = np.random.default_rng(0)
    start = [rng.standard_normal(shape, np.float32) for shape in ((40, 30), (30,))]
    gradients = rng.standard_normal((3, 40, 30), np.float32)
    found = []
    for kind, choices in (
        (keras.optimizers.AdamW, {"weight_decay": 5.0, "global_clipnorm": 0.5}),
        (utils.FusedAdam, {"decay": 5.0, "clip": 0.5}),
        (utils.FusedAdam, {}),
    ):
        variables = [keras.Variable(values) for values in start]
        adam = kind(utils.falling_rate(0.01, 2, 2), beta_1=0.5, **choices)
        for gradient in gradients:
            adam.apply([tf.constant(gradient), tf.constant(gradient[0])], variables)
        found.append([variable.numpy() for variable in variables])
    for expected, decayed, plain in zip(*found, strict=True):
        np.testing.assert_allclose(decayed, expected, atol=1e-6)
        assert np.abs(decayed - plain).max() > 0.01


@pytest.mark.parametrize(("steps", "most"), [(460, 23), (461, 1), (32, 32), (1, 1)])
def test_steps_at_a_time_divide_an_epochs(steps, most):
    assert utils.steps_per_execution(steps) == most


def test_predictions_are_of_all_images_in_their_order():
    same = keras.Sequential([keras.Input((3,)), keras.layers.Identity()])
    images = np.random.default_rng(0).integers(0, 256, (501, 3), np.uint8)
    np.testing.assert_allclose(utils.predict(same, images), images / 255, rtol=1e-6)


def test_a_grid_shows_each_image_in_its_place(tmp_path):
    greys = 0.2, 0.4, 0.6, 0.8, 0.0
    images = np.ones((5, 28, 28)) * np.reshape(greys, (5, 1, 1))
    utils.image_grid(tmp_path / "x.png", images, "", columns=2)
    drawn = plt.imread(tmp_path / "x.png")[..., 0]
    places = [np.argwhere(np.abs(drawn - grey) < 0.01) for grey in greys]
    assert min(len(place) for place in places) > 200**2
    down, right = np.transpose([place.mean(axis=0) for place in places])
    np.testing.assert_allclose(down[[0, 2]], down[[1, 3]])
    assert down[0] < down[2] < down[4]
    np.testing.assert_allclose(right[[0, 1, 0]], right[[2, 3, 4]])
    assert right[0] < right[1]


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


@contextlib.contextmanager
def disk_with_room_for(size):
    """Let no file grow beyond a size in bytes, as where the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("written", ["checkpoint", "model", "figure", "report"])
def test_full_disk_is_told_and_what_was_there_stays(tmp_path, capsys, written):
    folder = utils.RunFolder(run_options(tmp_path))
    model = keras.Sequential([keras.Input((200,)), keras.layers.Dense(200)])
    report = tmp_path / "report.md"
    report.write_text("<!-- begin a --><!-- end a -->")

    def write():
        if written == "checkpoint":
            folder.record(model, {"epoch": 1, "seconds": 1.0})
        elif written == "model":
            folder.save({"model": model})
        elif written == "figure":
            utils.image_grid(tmp_path / "x.png", np.random.rand(4, 28, 28), "title")
        else:
            utils.update_report({"a": "long " * 4000}, report)

    write()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with disk_with_room_for(9_000), pytest.raises(SystemExit) as ended:
        utils.run_script(write)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "File too large" in error
    assert str(tmp_path) in error
    assert error.count("\n") == 1
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} <= {"q1_history.csv"}


def test_folder_that_cannot_be_made_is_told(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        utils.run_script(lambda: utils.RunFolder(run_options(tmp_path / "file" / "x")))
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture(scope="module")
def run_of_one_epoch(tmp_path_factory):
    """A run's folder, its model and the bytes of its checkpoint."""
    folder = utils.RunFolder(run_options(tmp_path_factory.mktemp("run")))
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    model.optimizer.iterations.assign(5)
    folder.record(model, {"epoch": 1, "seconds": 1.0})
    return folder, model, folder.checkpoint.read_bytes()


@settings(max_examples=50, deadline=None)
@given(
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 9), st.binary(max_size=9)),
        min_size=1,
        max_size=3,
    )
)
def test_mutated_checkpoint_is_loaded_or_refused(run_of_one_epoch, edits):
    folder, model, content = run_of_one_epoch
    content = bytearray(content)
    for place, removed, new in edits:
        at = int(place * len(content))
        content[at : at + removed] = new
    # HDF5 holds on to a file that it failed to read: each has a name of its own.
    name = hashlib.sha256(content).hexdigest()
    folder.checkpoint = folder.path / f"{name}.weights.h5"
    folder.checkpoint.write_bytes(content)
    try:
        assert folder.restore(model, steps_per_epoch=5) in (0, 1)
    except utils.UsageError as error:
        assert "\n" not in str(error)
        assert str(folder.path) in str(error)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_script_interrupted_while_it_loads_says_how_to_start_again(tmp_path, number):
    script = Path(utils.__file__).with_name("q2_aae.py")
    process = subprocess.Popen(
        [sys.executable, str(script), "--quick", "--run-dir", str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
    )
    status = Path(f"/proc/{process.pid}/status")
    while True:  # until the script takes signals, early in its imports
        caught = int(re.search(r"SigCgt:\s+(\w+)", status.read_text())[1], 16)
        if caught >> (signal.SIGTERM - 1) & 1:
            break
    time.sleep(random.uniform(0, 2))
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    again = f"python q2_aae.py --quick --run-dir {tmp_path}\n"
    assert error == f"\nq2_aae.py: interrupted; go on with: {again}"


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
