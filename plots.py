"""All drawing: arrays in, PNG files out.

Figures are drawn without pyplot, so that a notebook's own plots stay as they are.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# `!python script.py` inherits a notebook's backend, which may not be installed here.
_backend = os.environ.get("MPLBACKEND", "")
_package = _backend.removeprefix("module://").partition(".")[0]
if _backend.startswith("module://") and not importlib.util.find_spec(_package):
    del os.environ["MPLBACKEND"]

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import scipy.stats  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

# Readable in grey: dark, light and dashed differ without colour.
INK, ACCENT, PALE = "#1b3a5b", "#d1622b", "#9aa5b1"
GAP = 2  # pixels between the images of a grid
STYLE = {
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(color=[INK, ACCENT, PALE]),
    "legend.frameon": False,
}
History = Mapping[str, np.ndarray]  # a column a quantity, a value an epoch


@contextlib.contextmanager
def _figure(
    path: str | Path,
    rows: int = 1,
    columns: int = 1,
    size: tuple[float, float] = (7, 4),
) -> Iterator[tuple[Figure, Any]]:
    """Draw a figure in the house style and save it under `path`, whole or not at all.

    Its `size` is in inches. Yields the figure and its axes, as `Figure.subplots` does.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}")
    with matplotlib.rc_context(STYLE):
        figure = Figure(size)
        yield figure, figure.subplots(rows, columns)
        try:
            figure.savefig(temporary)
            temporary.replace(path)
        except OSError as error:
            error.filename = str(path)  # a full disk does not say where
            raise
        finally:
            temporary.unlink(missing_ok=True)


def image_grid(
    path: str | Path,
    rows: Sequence[np.ndarray],
    title: str,
    labels: Sequence[str] = (),
) -> None:
    """Draw rows of images under a title, each row with a label or none with any.

    The rows are float in [0, 1], (columns, 784) each or (columns, 28, 28, 3).
    """
    height, columns = len(rows), len(rows[0])
    gutter = 0.2 + 0.11 * max(map(len, labels), default=0)
    size = (8, 0.4 + (8 - gutter) * height / columns)
    # One picture: axes for each image would take seven times as long.
    images = np.reshape(rows, (height, columns, 28, 28, -1))
    below_and_beside = (0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)
    images = np.pad(images, below_and_beside, constant_values=1.0).swapaxes(1, 2)
    mosaic = images.reshape(height * (28 + GAP), columns * (28 + GAP), -1)
    with _figure(path, size=size) as (figure, axes):
        figure.suptitle(title, fontsize=11)
        axes.set_axis_off()
        axes.imshow(mosaic[:-GAP, :-GAP], cmap="gray", vmin=0, vmax=1)
        for row, label in enumerate(labels):
            middle = row * (28 + GAP) + 14
            axes.text(-2 * GAP, middle, label, ha="right", va="center")


def _both_losses(axes: Axes, history: History, name: str) -> None:
    """Draw a quantity on training and, where there is one, on validation images."""
    few = len(history["epoch"]) <= 60  # so that markers do not hide the lines
    line = {"ms": 3} if few else {"ms": 0, "lw": 0.8}
    axes.plot(history["epoch"], history[name], "o-", label="training", **line)
    if f"val_{name}" in history:
        validation = history[f"val_{name}"]
        axes.plot(history["epoch"], validation, "s--", label="validation", **line)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


# Question 1 --------------------------------------------------------------------------


def q1_loss(path: str | Path, history: History, pca_mse: float, code_dim: int) -> None:
    """Draw the reconstruction loss over training ("loss", "val_loss"), and PCA's.

    `pca_mse` is PCA's mean squared error on the validation images, pixels in [0, 1].
    """
    with _figure(path) as (_, axes):
        _both_losses(axes, history, "loss")
        axes.axhline(pca_mse, color="black", ls=":")
        axes.annotate(
            f"PCA with {code_dim} components, validation",
            (1, pca_mse),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
        )
        ratio = history["val_loss"][-1] / pca_mse
        axes.set(
            yscale="log",
            ylabel="mean squared error (pixels in 0..1)",
            title=f"The validation error ends at {ratio:.2f} times that of PCA",
        )
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="minor", labelsize=8)
        axes.legend()


def q1_errors(
    path: str | Path,
    by_place: np.ndarray,
    by_digit: Mapping[str, float] | None,
    mse: float,
) -> None:
    """Draw where the test error lies: over the image, (28, 28), and by digit.

    `by_digit` is None without labels; `mse` is over all test images.
    """
    with _figure(path, 1, 2, (8, 3.4)) as (figure, (place, digits)):
        figure.suptitle("Where the test error lies", fontsize=11)
        shown = place.imshow(by_place, cmap="cividis", vmin=0)
        place.set(xticks=[], yticks=[], title="mean over images and channels")
        figure.colorbar(shown, ax=place, label="squared error (pixels in 0..1)")
        if by_digit is None:
            digits.set_axis_off()
            return
        digits.bar(list(by_digit), list(by_digit.values()), color=INK)
        digits.axhline(mse, color="black", ls=":")
        digits.set(title="by digit, and over all (dotted)", xlabel="digit")
        digits.set_ylabel("mean squared error (pixels in 0..1)")


def q1_rate_distortion(path: str | Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Draw the test error against the code's size, of the CNN and of PCA.

    Each row has "code_dim", "test_mse" and "pca_test_mse".
    """
    sizes = [row["code_dim"] for row in rows]
    ratios = [row["test_mse"] / row["pca_test_mse"] for row in rows]
    with _figure(path) as (_, axes):
        for key, style, label in (
            ("test_mse", "o-", "CNN"),
            ("pca_test_mse", "s--", "PCA"),
        ):
            axes.plot(sizes, [row[key] for row in rows], style, ms=4, label=label)
        axes.set_xscale("log", base=2)
        axes.set(
            yscale="log",
            title=f"The CNN's test error is {min(ratios):.2f} to {max(ratios):.2f} "
            "times that of PCA with a code of the same size",
            ylabel="test mean squared error (pixels in 0..1)",
            xlabel="numbers in the code",
            xticks=sizes,
        )
        axes.xaxis.set_major_formatter("{x:g}")
        axes.legend()


# Question 2 --------------------------------------------------------------------------


def q2_losses(
    path: str | Path, history: History, equilibrium: Mapping[str, float]
) -> None:
    """Draw the three losses over training, and the adversaries' equilibrium (nats).

    The history has "reconstruction_loss", "discriminator_loss", "encoder_loss" and
    what there is of the same after "val_".
    """
    titles = {
        "reconstruction_loss": r"(a) $L_{recons}$, mean of $\|x_n-\hat{x}_n\|$",
        "discriminator_loss": "(b) $L_D$ (nats)",
        "encoder_loss": "(c) $L_{Enc}=E[\\log(1-D)]$ (nats)",
    }
    with _figure(path, 1, 3, (9, 3.2)) as (figure, row):
        figure.suptitle(
            f"$L_D$ ends at {history['discriminator_loss'][-1]:.2f}; a discriminator "
            "that can't tell codes from draws of the prior has "
            f"{equilibrium['discriminator_loss']:.2f}",
            fontsize=11,
        )
        for axes, (name, title) in zip(row, titles.items(), strict=True):
            _both_losses(axes, history, name)
            if name in equilibrium:
                axes.axhline(equilibrium[name], color="black", ls=":", label="$D=1/2$")
            axes.set_title(title)
            axes.legend()


def q2_tsne(path: str | Path, points: np.ndarray, labels: np.ndarray | None) -> None:
    """Draw the t-SNE map of the training codes, (N, 2), coloured by digit, (N,)."""
    with _figure(path, size=(7, 7)) as (_, axes):
        axes.set_title(
            f"t-SNE of the mean codes of all {len(points):,} training digits"
        )
        axes.set(xticks=[], yticks=[], aspect="equal")
        axes.spines[:].set_visible(False)
        style = {"s": max(0.6, min(20.0, 20_000 / len(points))), "linewidths": 0}
        if labels is None:
            axes.scatter(*points.T, color=INK, **style)
            return
        order = np.random.default_rng(0).permutation(len(points))
        colours = {"cmap": "tab10", "vmin": -0.5, "vmax": 9.5}
        axes.scatter(*points[order].T, c=labels[order], **style, **colours)
        box = {"boxstyle": "circle", "fc": "white", "ec": "black", "alpha": 0.85}
        centred = {"ha": "center", "va": "center", "fontsize": 14, "bbox": box}
        for digit in np.unique(labels):
            # At its fullest place: the median of one in pieces lies among others.
            counts, *edges = np.histogram2d(*points[labels == digit].T, bins=15)
            x, y = np.unravel_index(counts.argmax(), counts.shape)
            at = edges[0][x : x + 2].mean(), edges[1][y : y + 2].mean()
            axes.text(*at, str(digit), **centred)


def q2_prior_match(
    path: str | Path, codes: np.ndarray, spectra: Mapping[str, np.ndarray]
) -> None:
    """Draw the aggregate posterior, codes (N, D), against the prior.

    The spectra are covariance eigenvalues (D,), the largest first; the codes' own come
    first.
    """
    count, dimensions = codes.shape
    own, prior = next(iter(spectra.values())), scipy.stats.chi2(dimensions)
    with _figure(path, 1, 3, (9, 3.2)) as (figure, (marginals, spectrum, lengths)):
        figure.suptitle(
            f"{dimensions} informative coordinates of {count:,} test codes: covariance "
            f" eigenvalues {own[-1]:.2f} .. {own[0]:.2f}",
            fontsize=11,
        )
        limit = float(max(4.0, np.quantile(np.abs(codes), 0.999)))
        z = np.linspace(-limit, limit, 121)
        marginals.hist(codes.ravel(), z, density=True, color=PALE, label="codes")
        marginals.plot(z, scipy.stats.norm.pdf(z), "--", color="black", label="prior")
        marginals.set(title="marginals, pooled", xlabel="$z_i$", ylabel="density")

        rank = np.arange(1, dimensions + 1)
        for (name, values), style in zip(spectra.items(), ("-", "k--"), strict=False):
            spectrum.plot(rank, np.maximum(values, 1e-8), style, label=name)
        scale = "log" if own[-1] < 0.1 else "linear"
        spectrum.set(yscale=scale, title="covariance spectrum", xlabel="rank")
        spectrum.xaxis.set_major_locator(MaxNLocator(integer=True))
        spectrum.set_ylabel("eigenvalue")

        squared = np.square(codes, dtype=np.float64).sum(axis=1)
        high = max(float(np.quantile(squared, 0.99)), float(prior.ppf(0.9999)))
        grid = np.linspace(0, high, 100)
        lengths.hist(squared, grid, density=True, color=PALE, label="codes")
        label = f"$\\chi^2({dimensions})$"
        lengths.plot(grid, prior.pdf(grid), "--", color="black", label=label)
        lengths.set(title="squared length", xlabel=r"$\|z\|^2$", ylabel="density")
        for axes in (marginals, spectrum, lengths):
            axes.legend(loc="lower left" if axes is spectrum else "best")


def q2_frontier(
    path: str | Path, points: Mapping[str, tuple[float, float, bool]]
) -> None:
    """Draw samples against neighbourhoods, a point a model.

    Points are by name the accuracy of 5 nearest neighbours, 0..1, the Fréchet distance
    of samples, and whether the model was trained for as long as the default run. A
    name stands beside its point, on a side where no other is; else it is left out.
    """
    with _figure(path, size=(7.5, 4.8)) as (_, axes):
        axes.set(
            yscale="log",
            xlabel="digits named by 5 nearest neighbours in the code (%)",
            ylabel="Fréchet distance of samples",
            title="Neighbourhoods against samples: lower right is better",
        )
        for name, point in points.items():
            accuracy, distance, is_long = point
            colour = ACCENT if is_long else INK
            axes.plot(100 * accuracy, distance, "o" if is_long else ".", color=colour)
            # Of the points at about this height: how far they are to the right, in %.
            steps = [
                100 * (other[0] - accuracy)
                for other in points.values()
                if other is not point and abs(np.log(other[1] / distance)) < 0.12
            ]
            length = 0.4 + 0.12 * len(name)
            for side, alignment in ((1, "left"), (-1, "right")):
                if not any(0 <= side * step < length for step in steps):
                    axes.annotate(
                        name,
                        (100 * accuracy, distance),
                        (6 * side, 0),
                        textcoords="offset points",
                        fontsize=8,
                        ha=alignment,
                        va="center",
                    )
                    break
        for marker, colour, label in (
            ("o", ACCENT, "long runs"),
            (".", INK, "short runs"),
        ):
            axes.plot([], [], marker, color=colour, label=label)
        axes.legend(loc="best")


def check() -> None:
    """Draw a small figure in memory, so that what can't be drawn is found early."""
