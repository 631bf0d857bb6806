"""Every figure: drawn from small arrays, whole or not at all."""

import inspect
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import plots

RNG = np.random.default_rng(0)
EPOCHS = np.arange(1, 4)
NAMES = "loss", "reconstruction_loss", "discriminator_loss", "encoder_loss"
HISTORY = {"epoch": EPOCHS} | {
    f"{kind}{name}": sign / EPOCHS
    for kind in ("", "val_")
    for name, sign in zip(NAMES, (1, 1, 1, -1), strict=True)
}
FIRST = {name: values[:1] for name, values in HISTORY.items()}
UNVALIDATED = {k: v for k, v in HISTORY.items() if not k.startswith("val_")}
BALANCE = {"discriminator_loss": 1.39, "encoder_loss": -0.69}
LABELS = np.arange(40) % 10
BY_DIGIT = {"1": 0.02, "7": 0.03}
CODE_SIZES = [
    {"code_dim": size, "test_mse": 1 / size, "pca_test_mse": 2 / size}
    for size in (16, 64, 128)
]


def spectra(dimensions):
    eigenvalues = np.sort(RNG.random(dimensions))[::-1]
    return {"codes": eigenvalues, "40 prior draws": 0 * eigenvalues}


FIGURES = {
    "image_grid": [
        (RNG.random((2, 4, 784)), "title", ("input", "output")),
        (RNG.random((1, 1, 28, 28, 3)), "one image"),
    ],
    "q1_loss": [(HISTORY, 0.3, 16), (FIRST, 0.3, 1)],
    "q1_errors": [(RNG.random((28, 28)), x, 0.02) for x in (BY_DIGIT, None)],
    "q1_rate_distortion": [(CODE_SIZES,), (CODE_SIZES[:1],)],
    "q2_losses": [(x, BALANCE) for x in (HISTORY, FIRST, UNVALIDATED)],
    "q2_tsne": [(RNG.normal(size=(40, 2)), x) for x in (LABELS, None)],
    "q2_prior_match": [(RNG.normal(size=(40, d)), spectra(d)) for d in (1, 3)],
    "q2_frontier": [({"default": (0.91, 3.0, True), "other": (0.92, 2.0, False)},)],
}


def test_every_figure_is_tried_here():
    drawn = {
        name
        for name, value in vars(plots).items()
        if inspect.isfunction(value) and value.__module__ == "plots" and name[0] != "_"
    }
    assert drawn == FIGURES.keys()


@pytest.mark.parametrize(
    ("name", "case"), [(name, i) for name in FIGURES for i in range(len(FIGURES[name]))]
)
def test_figure_is_drawn_and_is_not_blank(tmp_path, name, case):
    path = tmp_path / "x.png"
    getattr(plots, name)(path, *FIGURES[name][case])
    assert list(tmp_path.iterdir()) == [path]
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 150
    assert pixels[..., :3].std() > 0.02


def test_a_grid_shows_each_image_in_its_place(tmp_path):
    greys = 0.2, 0.4, 0.6, 0.8, 0.0, 0.5
    rows = np.ones((3, 2, 784)) * np.reshape(greys, (3, 2, 1))
    plots.image_grid(tmp_path / "x.png", rows, "")
    drawn = matplotlib.image.imread(tmp_path / "x.png")[..., 0]
    places = [np.argwhere(np.abs(drawn - grey) < 0.01) for grey in greys]
    assert min(len(place) for place in places) > 200**2
    down, right = np.transpose([place.mean(axis=0) for place in places])
    np.testing.assert_allclose(down[::2], down[1::2])
    assert down[0] < down[2] < down[4]
    np.testing.assert_allclose(right[:4], right[2:])
    assert right[0] < right[1]


def test_a_grid_shows_pixels_in_their_colours(tmp_path):
    row = np.zeros((2, 28, 28, 3))
    row[:, :14], row[:, 14:, :, 2] = (1.0, 0.5, 0.0), 1.0
    plots.image_grid(tmp_path / "x.png", [row], "")
    drawn = matplotlib.image.imread(tmp_path / "x.png")[..., :3]
    for colour in ((1.0, 0.5, 0.0), (0.0, 0.0, 1.0)):
        assert (np.abs(drawn - colour).max(axis=-1) < 0.01).sum() > 100**2


def test_a_figure_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(b"old")
    rows = np.zeros((1, 1, 784))
    with pytest.raises(ValueError, match="frac"):
        plots.image_grid(path, rows, r"no formula: $\frac$")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="missing"):
        plots.image_grid(tmp_path / "missing" / "x.png", rows, "")


def test_a_guests_own_plots_stay_as_they_are(tmp_path):
    code = f"""
import sys
import matplotlib
matplotlib.use("svg")
before = dict(matplotlib.rcParams)
import plots, numpy
from pathlib import Path
plots.image_grid(Path({str(tmp_path / "x.png")!r}), numpy.zeros((1, 1, 784)), "")
assert dict(matplotlib.rcParams) == before
assert "matplotlib.pyplot" not in sys.modules
assert not {{"tensorflow", "keras"}} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(plots.__file__).parent,
    )
    assert done.returncode == 0, done.stderr
