"""All drawing: arrays in, PNG files out.

Figures are drawn without pyplot, under matplotlib's own defaults and the settings here,
so that a user's matplotlibrc does not change them, nor they a notebook's own plots.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# matplotlib fails on import where MPLBACKEND names a backend that it does not know, as
# one inherited from a notebook may be. No backend is needed here; where others draw in
# this process, they get theirs if there is one of that name.
_backend = None
if "matplotlib" not in sys.modules:
    _backend = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib
except (OSError, UnicodeDecodeError) as error:
    print(f"matplotlib can't read its matplotlibrc file: {error}", file=sys.stderr)
    sys.exit(2)
if _backend is not None:
    os.environ["MPLBACKEND"] = _backend
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = _backend

import numpy as np  # noqa: E402
import scipy.stats  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter  # noqa: E402
from scipy import ndimage  # noqa: E402

from files import replacing  # noqa: E402

# Readable in grey: dark, light and dashed differ without colour.
INK, ACCENT, PALE = "#1b3a5b", "#d1622b", "#9aa5b1"
# Of the digits, for any colour vision: Paul Tol's palette, as on the explorer's page.
DIGIT_COLOURS = ["#332288", "#2f8fc4", "#2f9d8c", "#117733", "#86861f"]
DIGIT_COLOURS += ["#c9a227", "#cc6677", "#882255", "#aa4499", "#7b7f85"]
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
Losses = Mapping[str, np.ndarray]  # "step" and losses by name, an array each


def _house_style() -> contextlib.AbstractContextManager:
    """Put matplotlib's defaults and `STYLE` in place of a user's own settings."""
    defaults = {k: v for k, v in matplotlib.rcParamsDefault.items() if k != "backend"}
    return matplotlib.rc_context(defaults | STYLE)


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
    with _house_style():
        figure = Figure(size)
        yield figure, figure.subplots(rows, columns)
        with replacing(path) as temporary:
            figure.savefig(temporary)


def check() -> None:
    """Draw a small figure in memory, to find out before training what can't be drawn.

    Raises:
        OSError: matplotlib can't draw here; the error says why in one line.
    """
    try:
        with _house_style():
            figure = Figure((2, 2))
            figure.subplots().set_title("$L_D$")
            figure.savefig(io.BytesIO())
    except Exception as error:  # of its fonts, its files or its libraries
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"matplotlib can't draw here: {reason}") from error


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


def _both_losses(axes: Axes, history: Losses, curve: Losses, name: str) -> None:
    """Draw a loss on training and on validation images against the training step.

    The axis is linear in the first epoch, where most happens, then logarithmic.
    """
    first, last = int(history["step"][0]), int(history["step"][-1])
    axes.plot(curve["step"], curve[name], lw=1.2, label="training")
    validation = history[f"val_{name}"]
    axes.plot(history["step"], validation, "s--", ms=2.5, lw=0.8, label="validation")
    axes.set_xscale("symlog", linthresh=first)
    axes.set_xlim(0, last * 1.1)
    ticks = sorted(
        {0, first, last} | {n * first for n in (3, 10, 100) if 4 * n * first < last}
    )
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.axvline(first, color=PALE, lw=0.8, zorder=0)
    axes.set_xlabel("training step")


def _log_scale(axes: Axes) -> None:
    """Give the vertical axis a logarithmic scale with plain numbers of one size."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


# Question 1 --------------------------------------------------------------------------


def q1_loss(
    path: str | Path, history: Losses, curve: Losses, pca_mse: float, code_dim: int
) -> None:
    """Draw the reconstruction loss over training, and PCA's.

    The history has "loss" and "val_loss" an epoch, the curve "loss" in shorter parts.
    `pca_mse` is PCA's mean squared error on the validation images, pixels in [0, 1].
    """
    with _figure(path) as (_, axes):
        _both_losses(axes, history, curve, "loss")
        axes.axhline(pca_mse, color="black", ls=":")
        axes.annotate(
            f"PCA with {code_dim} components, validation",
            (0, pca_mse),
            xycoords=("axes fraction", "data"),
            xytext=(4, -4),
            textcoords="offset points",
            va="top",
        )
        ratio = history["val_loss"][-1] / pca_mse
        axes.set(
            ylabel="mean squared error (pixels in 0..1)",
            title=f"The validation error ends at {ratio:.2f} times that of PCA",
        )
        _log_scale(axes)
        axes.legend()


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
            title=f"The CNN's test error is {min(ratios):.2f} to {max(ratios):.2f} "
            "times that of PCA with a code of the same size",
            ylabel="test mean squared error (pixels in 0..1)",
            xlabel="numbers in the code",
            xticks=sizes,
        )
        axes.xaxis.set_major_formatter("{x:g}")
        _log_scale(axes)
        axes.legend()


# Question 2 --------------------------------------------------------------------------


def q2_losses(
    path: str | Path, history: Losses, curve: Losses, equilibrium: Mapping[str, float]
) -> None:
    """Draw the three losses over training, and the adversaries' equilibrium (nats).

    The curve has "reconstruction_loss", "discriminator_loss" and "encoder_loss" in
    parts of epochs, the history the same after "val_", an epoch a value.
    """
    names = {
        "reconstruction_loss": ("(a) encoder, decoder", "$L_{recons}$ (mean)"),
        "discriminator_loss": ("(b) discriminator", "$L_D$ (nats)"),
        "encoder_loss": ("(c) encoder", "$L_{Enc}$ (nats)"),
    }
    with _figure(path, 1, 3, (10, 3.4)) as (figure, row):
        figure.suptitle(
            f"$L_D$ ends at {history['discriminator_loss'][-1]:.2f}; a discriminator "
            f"that says 1/2 has {equilibrium['discriminator_loss']:.2f}",
            fontsize=11,
        )
        for axes, (name, (title, label)) in zip(row, names.items(), strict=True):
            _both_losses(axes, history, curve, name)
            if name in equilibrium:
                axes.axhline(equilibrium[name], color="black", ls=":", label="$D=1/2$")
            axes.set(title=title, ylabel=label)
            axes.legend()


def q2_tsne(path: str | Path, points: np.ndarray, labels: np.ndarray | None) -> None:
    """Draw the t-SNE map of the training codes, (N, 2), coloured by digit, (N,)."""
    with _figure(path, size=(7, 7)) as (_, axes):
        count = f"{len(points):,}"
        axes.set_title(
            f"t-SNE of the informative coordinates of {count} training codes"
        )
        axes.set(xticks=[], yticks=[], aspect="equal")
        axes.invert_yaxis()  # as the explorer's page has it
        axes.spines[:].set_visible(False)
        style = {"s": max(0.6, min(20.0, 20_000 / len(points))), "linewidths": 0}
        if labels is None:
            axes.scatter(*points.T, color=INK, **style)
            return
        order = np.random.default_rng(0).permutation(len(points))
        colours = np.array(DIGIT_COLOURS)[labels[order]]
        axes.scatter(*points[order].T, c=colours, **style)
        box = {"boxstyle": "circle", "fc": "white", "ec": "black", "alpha": 0.85}
        centred = {"ha": "center", "va": "center", "fontsize": 14, "bbox": box}
        extent = np.stack([points.min(axis=0), points.max(axis=0)], axis=1)
        for digit in np.unique(labels):
            # The blurred density is highest in the middle of the largest cluster; the
            # mean of a digit in pieces would lie among others.
            own = points[labels == digit]
            counts, *_ = np.histogram2d(*own.T, bins=60, range=extent)
            density = ndimage.gaussian_filter(counts, 4, mode="constant")
            place = np.unravel_index(density.argmax(), density.shape)
            middle = extent[:, 0] + np.add(place, 0.5) / 60 * np.ptp(extent, axis=1)
            axes.text(*middle, str(digit), **centred)


def q2_prior_match(
    path: str | Path,
    codes: np.ndarray,
    informative: int,
    noise: np.ndarray,
    spectra: Mapping[str, np.ndarray],
) -> None:
    """Draw the aggregate posterior, codes (N, D), against the prior.

    The encoder computes the first `informative` coordinates; `noise` is the standard
    deviation of each one's noise, (D,). The spectra are eigenvalues of covariances of
    the informative coordinates, the largest first; the codes' own come first.
    """
    own, codes = next(iter(spectra.values())), codes.astype(np.float64)
    with _figure(path, 1, 3, (10, 3.4)) as (figure, (coordinates, spectrum, lengths)):
        figure.suptitle(
            f"{len(codes):,} test codes: the encoder computes {informative} of "
            f"{codes.shape[1]} coordinates; their covariance has eigenvalues "
            f"{own[-1]:.2f} .. {own[0]:.2f}",
            fontsize=11,
        )
        number = np.arange(1, codes.shape[1] + 1)
        mean, deviation = codes.mean(axis=0), codes.std(axis=0)
        marks = {"ls": "", "ms": 4}
        coordinates.plot(number, deviation, "o", label="standard deviation", **marks)
        coordinates.plot(number, noise, "s", mfc="none", label="its noise", **marks)
        coordinates.plot(number, mean, "^", color="black", label="mean", **marks)
        coordinates.set(title="each coordinate", xlabel="number of the coordinate")
        coordinates.set_ylabel("over the test codes")

        rank = np.arange(1, informative + 1)
        for (name, values), style in zip(spectra.items(), ("-", "k--"), strict=True):
            spectrum.plot(rank, np.maximum(values, 1e-8), style, label=name)
        scale = "log" if own[-1] < 0.1 else "linear"
        spectrum.set(yscale=scale, title="covariance spectrum", xlabel="rank")
        spectrum.xaxis.set_major_locator(MaxNLocator(integer=True))
        spectrum.set_ylabel("eigenvalue")

        prior = scipy.stats.chi2(informative)
        squared = np.square(codes[:, :informative]).sum(axis=1)
        high = max(float(np.quantile(squared, 0.99)), float(prior.ppf(0.9999)))
        grid = np.linspace(0, high, 100)
        lengths.hist(squared, grid, density=True, color=PALE, label="codes")
        label = f"$\\chi^2({informative})$, the prior"
        lengths.plot(grid, prior.pdf(grid), "--", color="black", label=label)
        lengths.set(title="squared length", xlabel=r"$\|z\|^2$", ylabel="density")
        coordinates.legend(loc="center")
        spectrum.legend(loc="lower left")
        lengths.legend()


def q2_frontier(
    path: str | Path,
    points: Mapping[str, tuple[float, float, bool]],
    bound: float | None,
) -> None:
    """Draw samples against neighbourhoods, a point a model.

    Points are by name the accuracy of 5 nearest neighbours, 0..1, the Fréchet distance
    of samples, and whether the model was trained for as long as the default run. The
    bound is the conjectured highest accuracy of codes that follow the prior, 0..1.
    """
    with _figure(path, size=(8, max(4.0, 1 + 0.2 * len(points)))) as (_, axes):
        for number, (name, point) in enumerate(points.items(), start=1):
            accuracy, distance, is_long = point
            mark = {"marker": f"${number}$", "ms": 6 if number < 10 else 9, "mew": 0.3}
            mark |= {"color": ACCENT if is_long else INK, "label": name}
            axes.plot(100 * accuracy, distance, ls="", **mark)
        if bound is not None:
            axes.axvline(100 * bound, color="black", ls=":")
            axes.annotate(
                "conjectured bound for an exact match",
                (100 * bound, 1),
                xycoords=axes.get_xaxis_transform(),
                xytext=(4, 0),
                textcoords="offset points",
                rotation=90,
                va="top",
                fontsize=8,
            )
        axes.set_xlabel("digits named by 5 nearest neighbours in the code (%)")
        axes.set_ylabel("Fréchet distance of samples")
        axes.set_title("Neighbourhoods against samples: lower right is better")
        _log_scale(axes)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
