"""Every figure: drawn from small arrays, whole or not at all, for any user alike."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import plots

RNG = np.random.default_rng(0)
LOSSES = "loss", "reconstruction_loss", "discriminator_loss", "encoder_loss"
NAMES = [f"{kind}{name}" for kind in ("", "val_") for name in LOSSES]
HISTORY = {name: 1 / np.arange(1, 4) for name in NAMES}
HISTORY |= {"epoch": np.arange(1, 4), "step": np.arange(460, 1381, 460)}
CURVE = {name: 1 / np.arange(1, 31) for name in LOSSES}
CURVE["step"] = 46 * np.arange(1, 31)
TRAINED = HISTORY, CURVE
BRIEFLY = tuple({name: x[name][:1] for name in x} for x in TRAINED)
BALANCE = {"discriminator_loss": 1.39, "encoder_loss": -0.69}
LABELS = np.arange(40) % 10
SIZES = [{"code_dim": n, "test_mse": 1 / n, "pca_test_mse": 2 / n} for n in (16, 64)]
CODES = RNG.normal(size=(40, 5))
SPECTRA = {1: [0.05], 3: [2.0, 1.0, 0.5]}
MODELS = {"default": (0.91, 3.0, True), "other": (0.92, 2.0, False)}
FIGURES = {
    "image_grid": [
        (RNG.random((2, 4, 784)), "title", ("input", "output")),
        (RNG.random((1, 1, 28, 28, 3)), "one image"),
    ],
    "q1_loss": [(*TRAINED, 0.3, 16), (*BRIEFLY, 0.3, 1)],
    "q1_rate_distortion": [(SIZES,), (SIZES[:1],)],
    "q2_losses": [(*x, BALANCE) for x in (TRAINED, BRIEFLY)],
    "q2_tsne": [(RNG.normal(size=(40, 2)), x) for x in (LABELS, None)],
    "q2_prior_match": [
        (CODES, size, np.ones(5), {"codes": np.array(own), "draws": np.ones(size)})
        for size, own in SPECTRA.items()
    ],
    "q2_frontier": [(MODELS, 0.77), (MODELS, None)],
}


def test_every_figure_is_tried_here():
    functions = inspect.getmembers(plots, inspect.isfunction)
    own = {name for name, value in functions if value.__module__ == "plots"}
    assert {name for name in own if name[0] != "_"} - {"check"} == FIGURES.keys()


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


def test_a_grid_shows_each_image_in_its_place_and_colours(tmp_path):
    colours = RNG.random((3, 2, 3)).round(1)
    rows = np.ones((3, 2, 28, 28, 3)) * colours[:, :, None, None]
    plots.image_grid(tmp_path / "x.png", rows, "")
    drawn = matplotlib.image.imread(tmp_path / "x.png")[..., :3]
    apart = [np.abs(drawn - colour).max(axis=-1) for colour in colours.reshape(-1, 3)]
    places = [np.argwhere(distance < 0.01) for distance in apart]
    assert min(len(place) for place in places) > 200**2
    down, right = np.transpose([place.mean(axis=0) for place in places])
    np.testing.assert_allclose(down[::2], down[1::2])
    assert down[0] < down[2] < down[4]
    np.testing.assert_allclose(right[:4], right[2:])
    assert right[0] < right[1]


def test_what_cannot_be_drawn_is_told_in_one_line(monkeypatch):
    plots.check()
    monkeypatch.setitem(plots.STYLE, "text.usetex", True)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(OSError, match="can't draw here: .*latex") as raised:
        plots.check()
    assert "\n" not in str(raised.value)


GRID = """
import sys, plots, numpy
rows = numpy.linspace(0, 1, 2 * 784).reshape(2, 1, 784)
plots.image_grid("x.png", rows, "title", ("input", "output"))
assert "matplotlib.pyplot" not in sys.modules
assert not {"tensorflow", "keras"} & set(sys.modules)
"""
RC = b"image.origin: lower\nsavefig.dpi: 30\ntext.usetex: True\nno colon\n"


@pytest.mark.parametrize(
    ("settings", "exit_code"), [(RC, 0), (b"font.family: caf\xe9\n", 2)]
)
def test_a_users_settings_change_no_figure(tmp_path, settings, exit_code):
    (tmp_path / "matplotlibrc").write_bytes(settings)
    home = str(Path(plots.__file__).parent)
    environment = os.environ | {"MPLBACKEND": "nonsense", "PYTHONPATH": home}
    command = [sys.executable, "-c", GRID]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment)
    assert done.returncode == exit_code, done.stderr
    if exit_code:
        assert b"Traceback" not in done.stderr
        assert b"can't read its matplotlibrc" in done.stderr.splitlines()[-1]
        return
    rows = np.linspace(0, 1, 2 * 784).reshape(2, 1, 784)
    plots.image_grid(tmp_path / "y.png", rows, "title", ("input", "output"))
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "y.png").read_bytes()
