"""Tiny real data, how a script is run and refuses, and a full disk."""

import contextlib
import functools
import resource
import sys

import utils

import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits, load_sample_images

import make_data
import metrics
import q2_aae as q2

SIZES = (420, 40, 60)
LONGEST = "ends_the_same", "finished_rows", "a_row_of_question_2", "beats_the_mean"


def tiny_digits():
    """scikit-learn's 8x8 digits, enlarged to 28x28, as uint8, and their labels."""
    digits = load_digits()
    large = np.kron(digits.images, np.ones((3, 3)))
    images = np.pad(large, ((0, 0), (2, 2), (2, 2))) * (255 / 16)
    return images.astype(np.uint8), digits.target


def save_pairs(path, pairs):
    content = np.empty(len(pairs), object)
    content[:] = pairs
    np.save(path, content, allow_pickle=True)


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


def descend(rate, loss, *networks):
    """Take a plain gradient step on a loss; return the loss before it."""
    variables = [v for network in networks for v in network.trainable_variables]
    with tf.GradientTape() as tape:
        value = loss()
    gradients = tape.gradient(value, variables)
    for variable, gradient in zip(variables, gradients, strict=True):
        variable.assign_sub(rate * gradient)
    return value.numpy()


def pytest_collection_modifyitems(items):
    """Run the longest tests first, so that two workers end at about the same time."""
    items.sort(key=lambda item: not any(word in item.name for word in LONGEST))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A folder with a tiny MNIST_M.npy and data.npy in the course's layout."""
    folder = tmp_path_factory.mktemp("data")
    images, labels = tiny_digits()
    rng = np.random.RandomState(0)
    blended = make_data.blend(images, load_sample_images().images, rng)
    one_hot = np.eye(10, dtype=np.uint8)[labels]
    ends = np.cumsum(SIZES)
    for name, pixels in (("MNIST_M", blended), ("data", images.reshape(-1, 784))):
        parts = zip(
            np.split(pixels, ends)[:3], np.split(one_hot, ends)[:3], strict=True
        )
        save_pairs(folder / f"{name}.npy", list(parts))
    return folder


@pytest.fixture
def few_measurements(monkeypatch):
    """Measure in a hurry, where no number matters."""
    monkeypatch.setattr(q2, "SAMPLES", SIZES[2])  # another size is compiled anew
    tsne = functools.partial(metrics.TSNE, early_exaggeration_iter=50, n_iter=50)
    monkeypatch.setattr(metrics, "TSNE", tsne)
    monkeypatch.setattr(metrics, "NULL_SETS", 2)
    for name in ("FRESH_STEPS", "FRESH_EPOCHS", "FRESH_ON_DRAWS"):
        monkeypatch.setattr(metrics, name, 1)
    metrics._true_draws.cache_clear()
    yield
    metrics._true_draws.cache_clear()


@pytest.fixture
def refused(capsys, monkeypatch):
    """Return a function that runs a `main` in this process and returns its one line.

    It checks that the exit code is 2 and that standard error holds this line alone.
    """

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            utils.run_script(main)
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert error.startswith("script.py: ")
        return error

    return run
