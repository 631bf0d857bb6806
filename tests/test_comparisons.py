"""The comparisons' variants, and runs of some rows."""

import dataclasses
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import utils

import keras
import matplotlib.image
import numpy as np
import pytest
import tensorflow as tf
from conftest import tiny_digits

import metrics
import q2_aae as q2
from extras import comparisons

HOME = Path(__file__).parents[1]
RNG = np.random.default_rng(0)
BATCH = tf.constant(utils.unit_floats(tiny_digits()[0][:64].reshape(-1, 784)))
SCHEDULE = utils.Schedule(epochs=10, steps=100, batch_size=64)


def build(kind):
    keras.utils.set_random_seed(0)
    recipe = q2.DEFAULT._replace(hidden=(48, 48), discriminator_hidden=(40,))
    model = kind(8, recipe)
    model.compile(5e-3, SCHEDULE)
    return model


@pytest.mark.parametrize(
    ("kind", "weight"),
    [(comparisons.VariationalAutoencoder, 1), (comparisons.HalfWeight, 0.5)],
)
def test_variational_autoencoder_minimises_the_evidence_bounds_formula(kind, weight):
    model = build(kind)
    arrays = model.encoder.get_weights()
    model.encoder.set_weights([a + RNG.normal(0, 0.05, a.shape) for a in arrays])
    loss, restored = model.negative_bound(BATCH)
    x, y = BATCH.numpy(), restored.numpy().astype(np.float64)
    surprise = -(x * np.log(y) + (1 - x) * np.log(1 - y)).sum(axis=1)
    _, mean, log_variance = (part.numpy() for part in model.posterior(BATCH))
    deviation = np.exp(log_variance.astype(np.float64) / 2)
    divergence = (mean**2 + deviation**2 - 1).sum(axis=1) / 2
    divergence -= np.log(deviation).sum(axis=1)
    assert divergence.std() > 0
    expected = (surprise + weight * divergence).mean()
    assert loss.numpy() == pytest.approx(expected, rel=1e-4)

    # What is saved as its encoder draws from this posterior, and neighbours are means.
    codes = utils.predict(model.encoder, np.repeat(x[:1], 4000, axis=0))
    np.testing.assert_allclose(model.mean_encoder(x), mean, rtol=1e-4, atol=1e-5)
    assert np.abs((codes.mean(axis=0) - mean[0]) / deviation[0]).max() < 0.07
    np.testing.assert_allclose(codes.std(axis=0), deviation[0], rtol=0.05)


def test_variational_autoencoder_learns_and_leaves_the_discriminator_alone():
    model = build(comparisons.VariationalAutoencoder)
    before, judge = model.negative_bound(BATCH)[0], model.discriminator.get_weights()
    step = tf.function(model.train_step)
    for _ in range(60):
        step((BATCH, BATCH))
    assert model.negative_bound(BATCH)[0] < 0.7 * before
    for a, b in zip(judge, model.discriminator.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


# Runs


@pytest.fixture
def train(monkeypatch):
    """Return a function that runs a command, training its rows in this process.

    It returns the names of the rows that were trained.
    """

    def run(*words):
        trained = []

        def run_commands(commands, workers):
            for command in commands:
                assert command[:3] == [sys.executable, "-m", "extras.comparisons"]
                trained.append(command[command.index("--train") + 1])
                monkeypatch.setattr(sys, "argv", command[2:])
                comparisons.main()

        monkeypatch.setattr(comparisons, "run_commands", run_commands)
        monkeypatch.setattr(sys, "argv", ["comparisons.py", *words])
        utils.run_script(comparisons.main)
        return trained

    return run


def arguments(question, folder, data, rows, *others):
    return (
        *(question, "--rows", rows, "--batch-size", "42", "--data", str(data)),
        *("--figures", str(folder / "figures")),
        *("--run-dir", str(folder / "runs" / question), *others),
    )


def record(question, folder):
    return folder / "figures" / f"{question}_comparisons_metrics.json"


def rows_of(question, folder):
    return json.loads(record(question, folder).read_text())["rows"]


def test_a_row_of_question_2_is_trained_on_few_images_as_the_script_does(
    tiny_data, tmp_path, monkeypatch, train, few_measurements
):
    augmented = []

    def augment(images, rng):
        augmented.append(len(images))
        return images

    monkeypatch.setattr(q2, "augment", augment)
    monkeypatch.setattr(metrics, "compare_with_prior", lambda *given: {})
    monkeypatch.setattr(q2, "EPOCHS", 1)
    monkeypatch.setattr(q2, "LEAST_STEPS", 24)  # four steps an epoch
    small = {"hidden": (48, 48), "discriminator_hidden": (48,)}
    names = ["seed-1", "vae", "no-skips"]
    for name in names:
        row = comparisons.Q2_ROWS[name]
        row = dataclasses.replace(row, recipe=row.recipe._replace(**small))
        monkeypatch.setitem(comparisons.Q2_ROWS, name, row)
    data = tiny_data / "data.npy"
    given = arguments("q2", tmp_path, data, ",".join(names), "--batch-size", "105")
    assert train(*given) == names
    rows = rows_of("q2", tmp_path)
    long, vae, short = [rows[name] for name in names]
    assert (long["epochs"], long["long"], long["code_dim"]) == (6, True, 100)
    assert (vae["epochs"], vae["long"], vae["code_dim"]) == (2, False, 10)
    assert (short["epochs"], short["long"]) == (2, False)
    assert vae["loss_discriminator"] is None
    assert short["loss_discriminator"] > 0
    assert augmented.count(105) == 4 * (6 + 2 + 2)
    assert short["made_by"]["recipe"]["decoder_skips"] is False
    for row in rows.values():
        assert row["informative_dimensions"] == 10
        assert 0 < row["test_mse"] < 0.5
        assert row["frechet_distance"] > 0
        assert {"versions", "commit", "seed", "code", "data"} <= row.keys()
    folder = tmp_path / "runs" / "comparisons" / "q2"
    assert len(list(folder.glob("*/row.json"))) == 3
    assert not list(folder.glob("*/checkpoint.npz"))
    figure = matplotlib.image.imread(tmp_path / "figures" / "q2_frontier.png")
    assert figure.std() > 0.02


def test_finished_rows_are_kept_and_a_command_replaces_its_own_only(
    tiny_data, tmp_path, train
):
    path = tiny_data / "MNIST_M.npy"
    old = {"title": "older", "long": True, "code_dim": 4, "test_mse": 0.1}
    record("q1", tmp_path).parent.mkdir()
    older = {"rows": {"mask": old, "relu": old, "seed-1": old}, "note": "by hand"}
    record("q1", tmp_path).write_text(json.dumps(older))

    def again(rows, *others):
        given = arguments("q1", tmp_path, path, rows, "--epochs", "1", *others)
        return train(*given), rows_of("q1", tmp_path)

    given = arguments("q1", tmp_path, path, "code-16,relu", "--epochs", "1")
    command = [sys.executable, "-m", "extras.comparisons", *given, "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HOME)
    assert done.returncode == 0, done.stderr
    before = rows_of("q1", tmp_path)
    assert before.keys() == {"mask", "seed-1", "relu", "code-16"}
    assert before["mask"] == before["seed-1"] == old
    small, relu = before["code-16"], before["relu"]
    assert (small["code_dim"], relu["code_dim"]) == (16, 128)
    assert 0 < small["test_mse"] != relu["test_mse"] > 0

    # Finished rows are not trained again, though their folders are gone.
    shutil.rmtree(tmp_path / "runs")
    assert again("code-16,relu") == ([], before)
    trained, rows = again("code-16", "--seed", "7")
    assert trained == ["code-16"]
    assert rows["code-16"]["seed"] == rows["code-16"]["made_by"]["seed"] == 7
    assert rows == before | {"code-16": rows["code-16"]}


def test_an_interrupted_row_is_continued(
    tiny_data, tmp_path, monkeypatch, train, capsys
):
    save = utils.RunFolder.save_checkpoint

    def save_and_end(*losses):
        save(*losses)
        raise KeyboardInterrupt

    data = tiny_data / "MNIST_M.npy"
    given = arguments("q1", tmp_path, data, "relu", "--epochs", "2")
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(utils.RunFolder, "save_checkpoint", save_and_end)
        train(*given)
    assert rows_of("q1", tmp_path) == {}
    assert train(*given) == ["relu"]
    assert "Continuing after epoch 1 of " in capsys.readouterr().out
    assert rows_of("q1", tmp_path)["relu"]["epochs"] == 2


@pytest.mark.parametrize("question", ["q1", "q2"])
def test_quick_rows_stay_in_their_own_folder(tiny_data, question):
    script = comparisons.SCRIPTS[question]
    base = script.parse_settings(["--quick", "--data", str(tiny_data / script.DATA)])
    name = next(iter(comparisons.ROWS[question]))
    row = comparisons.row_settings(base, question, name)
    record = comparisons.record_path(question, base)
    for path in (row.run_dir, row.figures, record):
        assert path.is_relative_to("runs/quick")
    assert not base.updates_report


def test_where_a_row_fails_the_others_are_told_to_end(tmp_path):
    ready, told = tmp_path / "ready", tmp_path / "told"
    waits = f"""import pathlib, signal, time
signal.signal(signal.SIGTERM, lambda *_: exit(pathlib.Path({str(told)!r}).touch()))
pathlib.Path({str(ready)!r}).touch()
time.sleep(300)"""
    fails = f"""import pathlib
while not pathlib.Path({str(ready)!r}).exists():
    pass
exit(3)"""
    commands = [[sys.executable, "-c", code] for code in (waits, fails, "1 / 0")]
    with pytest.raises(utils.UsageError, match=r"exit\(3\): failed"):
        comparisons.run_commands(commands, workers=2)
    assert told.exists()


def test_unknown_row_is_one_line_and_code_2(tiny_data, tmp_path, refused):
    given = arguments("q2", tmp_path, tiny_data / "data.npy", "vae,lateral")
    error = refused(comparisons.main, *given)
    assert "--rows: found lateral, expected seed-1, seed-2, " in error
    assert list(tmp_path.iterdir()) == []


def test_a_row_is_made_by_its_data_and_by_the_code_of_its_model_and_its_bases(
    tmp_path, monkeypatch
):
    data = tmp_path / "data.npy"
    data.touch()
    base = q2.parse_settings(["--data", str(data)])

    def made_by(name):
        settings = comparisons.row_settings(base, "q2", name)
        return comparisons.what_makes(settings, "q2")

    names, source = ("vae", "vae-half", "no-skips"), inspect.getsource
    before = [made_by(name) for name in names]
    changed = comparisons.VariationalAutoencoder
    monkeypatch.setattr(
        inspect, "getsource", lambda kind: source(kind) + "\n1 + 1" * (kind is changed)
    )
    same = [made_by(name) == old for name, old in zip(names, before, strict=True)]
    assert same == [False, False, True]
    data.write_bytes(b"other images")
    assert made_by("no-skips")["data"] != before[2]["data"]
