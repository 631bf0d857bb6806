"""The shared floor: command line, exit codes, batches, training, the run's folder."""

import builtins
import io
import json
import signal
import sys

import utils

import keras
import numpy as np
import pytest
from conftest import contents, disk_with_room_for

from read_MNIST_M import Split

RNG = np.random.default_rng(0)


def settings(*arguments):
    parser = utils.argument_parser("Test.", "x.npy", 7, 5, 0.1, 4)
    return utils.settings_from(parser.parse_args([*map(str, arguments)]), "q1")


# Command line ----------------------------------------------------------------------


def test_quick_never_touches_the_report():
    full, quick = settings(), settings("--quick")
    assert full.updates_report
    assert not quick.updates_report
    assert [str(full.figures), str(full.run_dir)] == ["figures", "runs/q1"]
    assert str(quick.figures) == "runs/quick/figures"
    assert str(quick.run_dir) == "runs/quick/q1"
    assert not settings("--figures", "elsewhere").updates_report


@pytest.mark.parametrize(
    ("arguments", "least_steps", "expected"),
    [
        ([], 41, (11, 4, 5)),
        (["--quick"], 41, (utils.QUICK_EPOCHS, 4, 5)),
        (["--quick", "--epochs", 2], 41, (2, 4, 5)),
        (["--batch-size", 24], 0, (7, 1, 23)),
    ],
)
def test_schedule_follows_from_settings_and_data(arguments, least_steps, expected):
    chosen = settings(*arguments)
    assert utils.training_schedule(chosen, 23, 7, least_steps) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epochs", "x"],
        ["--learning-rate", "nan"],
        ["--seed", "-1"],
        ["--data", ""],
        ["--no-such-flag"],
    ],
)
def test_wrong_argument_is_one_line_and_code_2(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        utils.run_script(lambda: settings(*arguments))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert arguments[0] in error


def test_help_tells_each_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        settings("--help")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for default in ("x.npy", "default: 7", "default: 5", "0.1", "default: 4"):
        assert default in text


def test_a_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        utils.run_script(lambda: 1 / 0)


def test_a_notebook_is_told_how_to_go_on(monkeypatch, capsys):
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    monkeypatch.setattr(sys, "argv", ["q.py", "--epochs", "2"])

    def main():
        raise utils.Interrupted

    with pytest.raises(SystemExit) as ended:
        utils.run_script(main)
    assert ended.value.code == 130
    told = capsys.readouterr().err
    assert told.endswith("continue with: %run q.py --epochs 2 --resume\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_cut_short_what_the_first_one_saves(
    number, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    both, saved = (signal.SIGINT, signal.SIGTERM), []
    before = [signal.getsignal(each) for each in both]

    def main():
        try:
            signal.raise_signal(number)
            pytest.fail("the signal did not interrupt")
        except KeyboardInterrupt:
            for second in both:
                signal.raise_signal(second)
            saved.append("whole")
            raise

    with pytest.raises(SystemExit) as ended:
        utils.run_script(main)
    assert ended.value.code == 130
    assert saved == ["whole"]
    assert "--resume" not in capsys.readouterr().err  # there is no run to resume
    assert [signal.getsignal(each) for each in both] == before


# Data ------------------------------------------------------------------------------


def splits(*counts):
    return [
        Split(RNG.integers(0, 256, (count, 784), np.uint8), np.arange(count) % 10)
        for count in counts
    ]


def test_images_are_scaled_and_a_quick_run_takes_the_first_of_each_split():
    given = splits(2001, 300, 501)
    given[1] = Split(given[1].images, None)
    whole, quick = (
        utils.prepare_splits(given, "given.npy", quick) for quick in (False, True)
    )
    assert [len(split.images) for split in quick] == [2000, 200, 500]
    assert [len(quick[0].labels), quick[1].labels] == [2000, None]
    for before, after, few in zip(given, whole, quick, strict=True):
        assert after.images.dtype == np.float32
        np.testing.assert_allclose(after.images, before.images / 255, rtol=1e-6)
        np.testing.assert_array_equal(few.images, after.images[: len(few.images)])


def test_data_that_cannot_be_trained_on_is_refused():
    alike = splits(100, 9, 20)
    alike[0].images[:] = np.arange(784) % 251
    for given, told in (
        (splits(99, 9, 99), "99 training images, expected 100"),
        (splits(100, 9, 19), "19 test images, expected 20"),
        (alike, ".* all the same"),
    ):
        with pytest.raises(utils.UsageError, match=f"given.npy: found {told}"):
            utils.prepare_splits(given, "given.npy", quick=False)


# Batches ---------------------------------------------------------------------------

TEN = np.arange(10, dtype=np.float32)[:, np.newaxis]


def epoch_orders(first_epoch, epochs, seed=3, change=None):
    seen = []
    for epoch in range(first_epoch, first_epoch + epochs):
        for x, target in utils.epoch_batches(TEN, 4, seed, epoch, change):
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


def test_changes_differ_by_epoch_and_resuming_repeats_them():
    def add_noise(images, rng):
        return images + rng.uniform(0, 0.5, images.shape).astype(np.float32)

    whole = epoch_orders(0, 3, change=add_noise)
    noise = whole - epoch_orders(0, 3)
    assert len(np.unique(noise)) == noise.size
    np.testing.assert_array_equal(whole[1:], epoch_orders(1, 2, change=add_noise))


# Training --------------------------------------------------------------------------


def test_loss_curve_has_the_means_of_parts_of_an_epoch():
    losses, curve = RNG.random(25), utils.LossCurve(epoch=3, steps=25)
    for step in range(25):  # Keras gives the means since the epoch began
        curve.on_train_batch_end(step, {"loss": losses[: step + 1].mean()})
    assert [row["step"] for row in curve.rows] == list(range(53, 75, 3))
    parts = [row["loss"] for row in curve.rows]
    np.testing.assert_allclose(parts, losses[:24].reshape(8, 3).mean(axis=1))


def run_folder(folder, *arguments):
    places = "--run-dir", folder / "run", "--figures", folder / "figures"
    chosen = settings(*places, "--epochs", 3, *arguments)
    source = {"file": "given.npy", "sha256": "0123"}
    return utils.RunFolder(chosen, source, utils.training_schedule(chosen, 20, 7))


def small_model(seed=0, width=2, rate=0.001, name="model"):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [keras.Input((width,)), keras.layers.Dense(width)], name=name
    )
    model.compile(keras.optimizers.Adam(rate), "mse", jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    return model


def fit(run, **options):
    """Train a small model in a run's folder; return the history."""
    images = np.linspace(0, 1, 40, dtype=np.float32).reshape(20, 2)
    model = small_model(run.settings.seed, **options)
    with run.in_use():
        return utils.fit(
            run,
            model,
            optimizers=[model.optimizer],
            networks=[model],
            train=images,
            valid=images[:4],
            shown={"loss": "loss", "val_loss": "validation loss"},
            draw=lambda history, curve: None,
        )


def interrupt_after(run, epoch, monkeypatch):
    save = run.save_checkpoint

    def save_and_stop(state, epochs, parts):
        save(state, epochs, parts)
        if len(epochs) == epoch:
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "save_checkpoint", save_and_stop)


def test_a_resumed_run_goes_on_with_its_own_history_to_the_same_end(
    tmp_path, monkeypatch, capsys
):
    def run_a(*arguments):
        return run_folder(
            tmp_path, "--seed", 1, "--run-dir", tmp_path / "a", *arguments
        )

    whole = fit(run_folder(tmp_path / "whole", "--seed", 1))
    run = run_a()
    interrupt_after(run, 2, monkeypatch)
    with pytest.raises(utils.Interrupted):
        fit(run)
    fit(run_folder(tmp_path, "--seed", 2, "--run-dir", tmp_path / "b"))
    capsys.readouterr()
    resumed = fit(run_a("--resume"))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("epoch 3 of 3, 0 s left: loss 0.") for line in lines)
    assert list(resumed) == ["epoch", "step", "loss", "val_loss", "seconds"]
    for key in ("epoch", "step", "loss", "val_loss"):
        np.testing.assert_array_equal(resumed[key], whole[key], key)
    history, parts = [
        np.genfromtxt(tmp_path / "figures" / name, delimiter=",", names=True)
        for name in ("q1_history.csv", "q1_steps.csv")
    ]
    assert history.dtype.names == tuple(resumed)
    np.testing.assert_allclose(history["loss"], whole["loss"], rtol=1e-8)
    # The parts of an epoch, here a step each, have the epoch's mean.
    steps = int(whole["step"][0])
    np.testing.assert_array_equal(parts["step"], np.arange(1, 3 * steps + 1))
    means = parts["loss"].reshape(3, steps).mean(axis=1)
    np.testing.assert_allclose(means, whole["loss"], rtol=1e-5)
    assert np.ptp(parts["loss"]) > 1e-4
    networks = [
        json.loads((folder / "networks.json").read_text())
        for folder in (tmp_path / "whole" / "run", tmp_path / "a", tmp_path / "b")
    ]
    assert networks[0] == networks[1]
    assert networks[0]["model"] != networks[2]["model"]
    # To resume what has ended changes nothing; a new run begins its history anew.
    np.testing.assert_array_equal(fit(run_a("--resume"))["loss"], whole["loss"])
    assert list(fit(run_a("--epochs", 1))["epoch"]) == [1]


def test_a_run_interrupted_before_its_first_epoch_ended_goes_on_from_the_start(
    tmp_path,
):
    with pytest.raises(utils.Interrupted), run_folder(tmp_path).in_use():
        raise KeyboardInterrupt
    assert list(fit(run_folder(tmp_path, "--resume"))["epoch"]) == [1, 2, 3]


def test_loss_that_is_no_number_is_one_line_and_no_model_is_saved(tmp_path, refused):
    error = refused(lambda: fit(run_folder(tmp_path), rate=1e30))
    assert "expected a finite number" in error
    assert not list(tmp_path.rglob("*.keras"))


# The run's folder ------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    run, second = run_folder(tmp_path), run_folder(tmp_path)
    refusal = pytest.raises(utils.UsageError, match="run: found another run at work")
    with run.in_use(), refusal, second.in_use():
        pass
    with second.in_use():  # the folder is free again
        pass


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--code-dim", "7"], "--code-dim 7, expected 4"),
        (["--run-dir", "new"], "--resume: found no new/settings.json"),
    ],
)
def test_a_run_is_resumed_with_its_own_settings_only(tmp_path, arguments, told):
    with run_folder(tmp_path).in_use():
        pass
    resumed = run_folder(tmp_path, "--resume", *arguments)
    with pytest.raises(utils.UsageError, match=told), resumed.in_use():
        pass


def test_full_disk_is_told_and_what_was_there_stays(tmp_path, refused):
    run, large = run_folder(tmp_path), small_model(width=100, name="large")
    rows, history = [{"epoch": 1}], {"epoch": np.ones(999), "seconds": np.ones(999)}
    writes = {
        "checkpoint.npz": lambda: run.save_checkpoint(large.variables, rows, rows),
        "large.keras": lambda: run.save_networks([large]),
        "q1_history.csv": lambda: run.write_losses("history", history),
        "q1_metrics.json": lambda: run.write_metrics({"list": [0] * 999}, history),
    }
    for write in writes.values():
        write()
    before = contents(tmp_path)
    for name, write in writes.items():
        with disk_with_room_for(3_000):
            error = refused(write)
        assert "File too large" in error
        assert name in error
        assert contents(tmp_path) == before


class _Touch:
    def __reduce__(self):
        return open, ("it_ran", "w")


def archive_of(*arrays, **named):
    file = io.BytesIO()
    np.savez(file, *arrays, **named)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("settings.json", lambda whole: b"{"),
        ("checkpoint.npz", lambda whole: whole[: len(whole) // 2]),
        ("checkpoint.npz", lambda whole: archive_of(np.zeros(3))),
        (
            "checkpoint.npz",
            lambda whole: archive_of(*[np.array(_Touch())] * 9, losses=_Touch()),
        ),
    ],
)
def test_damaged_file_of_a_run_is_refused(
    tmp_path, monkeypatch, refused, name, damaged
):
    monkeypatch.chdir(tmp_path)
    run, model = run_folder(tmp_path), small_model()
    with run.in_use():
        state, rows = model.variables + model.optimizer.variables, [{"epoch": 1}]
        run.save_checkpoint(state, rows, rows)
    path = tmp_path / "run" / name
    path.write_bytes(damaged(path.read_bytes()))
    before = contents(tmp_path)
    error = refused(lambda: fit(run_folder(tmp_path, "--resume")))
    assert f"{path}: found " in error
    assert ", expected " in error
    assert contents(tmp_path) == before  # nothing in the file ran
