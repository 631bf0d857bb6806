"""Writes the numbers into `report.md`, from the metrics that runs left behind.

    python report.py [--figures DIR] [--report FILE]

A block of the report stands between the lines `<!-- begin NAME -->` and
`<!-- end NAME -->`; what a run's `*_metrics.json` says is put there. Nothing is trained
or measured here, so a change of wording takes no run.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Metrics = Mapping[str, Any]
FRECHET = ("frechet_distance", "frechet_distance_floor", "frechet_distance_restored")
# Rows of question 1's comparisons that differ in the code's size alone.
Q1_SIZES = ("code-16", "code-32", "code-64", "default", "code-256")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, its first column left-aligned, the others right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def provenance(metrics: Metrics) -> str:
    """Say in a paragraph of Markdown where a run's numbers come from."""
    data, settings = metrics["data"], metrics["settings"]
    versions = ", ".join(f"{name} {v}" for name, v in metrics["versions"].items())
    sources = [data[key] for key in ("digits", "backgrounds") if key in data]
    minutes = metrics["training_seconds"] / 60
    note = f"{metrics['note']} " if "note" in metrics else ""
    return (
        f"{note}Data: `{data['file']}`, {data['source']}"
        f"{': ' if sources else ''}{'; '.join(sources)}. "
        f"{settings['epochs']} epochs, batch {settings['batch_size']}, learning rate "
        f"{settings['learning_rate']:g}, seed {metrics['seed']}; "
        f"{minutes:.1f} minutes of training. {versions}."
    )


def percent(share: float) -> str:
    """Return a share in [0, 1] in percent."""
    return f"{100 * share:.1f} %"


def psnr(mse: float) -> str:
    """Return a mean squared error on [0, 1] as a peak signal-to-noise ratio in dB."""
    return f"{-10 * math.log10(max(mse, sys.float_info.min)):.2f}"


# Question 1 --------------------------------------------------------------------------


def q1(metrics: Metrics) -> str:
    """Return question 1's result: the CNN beside PCA and the mean image."""
    ratio = metrics["test_mse"] / metrics["pca_test_mse"]
    size = str(metrics["code_dim"])
    rows = [
        ("the mean image", "0", "", metrics["mean_image_test_mse"]),
        ("PCA, the best linear one", size, "", metrics["pca_test_mse"]),
        ("CNN", size, f"{metrics['parameters']:,}", metrics["test_mse"]),
    ]
    table = markdown_table(
        ("autoencoder", "code", "parameters", "test MSE", "test PSNR (dB)"),
        [(*row, f"{mse:.5f}", psnr(mse)) for *row, mse in rows],
    )
    verdict = (
        f"The CNN's test error is {ratio:.2f} times that of PCA: it "
        f"{'beats' if ratio < 1 else 'does **not** beat'} the best linear code."
    )
    return "\n\n".join([table, verdict, provenance(metrics)])


def q1_error(metrics: Metrics) -> str:
    """Return where question 1's error lies, and what the code knows."""
    parts = []
    by_digit, accuracy = metrics["digit_test_mse"], metrics["knn_accuracy"]
    if by_digit is not None:
        easiest, hardest = (f(by_digit, key=by_digit.get) for f in (min, max))
        parts.append(
            f"The easiest digit is {easiest}, with a test MSE of "
            f"{by_digit[easiest]:.5f}, the hardest {hardest}, with "
            f"{by_digit[hardest]:.5f}."
        )
    if metrics["mse_inside_digit"] is None:
        parts.append("Where the digits are is not known for this data.")
    else:
        parts.append(
            f"Inside the digits the MSE is {metrics['mse_inside_digit']:.5f}, outside "
            f"them {metrics['mse_outside_digit']:.5f}."
        )
    if accuracy is None:
        return " ".join(parts)
    names = {
        "cnn_code": "the CNN's code",
        "pca_code": "PCA's code of the same size",
        "pixels": "the pixels",
    }
    rows = [(name, percent(accuracy[key])) for key, name in names.items()]
    table = markdown_table(("5 nearest neighbours in", "accuracy"), rows)
    return " ".join(parts) + "\n\n" + table


def q1_sizes(metrics: Metrics) -> str:
    """Return question 1's error at each code size."""
    rows = [row for name, row in metrics["rows"].items() if name in Q1_SIZES]
    table = markdown_table(
        ("code", "CNN test MSE", "PCA test MSE", "ratio", "CNN PSNR (dB)", "PCA PSNR"),
        [
            (
                str(row["code_dim"]),
                *(f"{mse:.5f}" for mse in (row["test_mse"], row["pca_test_mse"])),
                f"{row['test_mse'] / row['pca_test_mse']:.2f}",
                *(psnr(mse) for mse in (row["test_mse"], row["pca_test_mse"])),
            )
            for row in sorted(rows, key=lambda row: row["code_dim"])
        ],
    )
    return f"{table}\n\n{provenance(metrics)}"


def q1_designs(metrics: Metrics) -> str:
    """Return question 1's other designs and seeds."""
    rows = [
        (row["title"], f"{row['validation_mse']:.5f}", f"{row['test_mse']:.5f}")
        for name, row in metrics["rows"].items()
        if name == "default" or name not in Q1_SIZES
    ]
    table = markdown_table(("autoencoder", "validation MSE", "test MSE"), rows)
    return f"{table}\n\n{provenance(metrics)}"


# Question 2 --------------------------------------------------------------------------


def q2(metrics: Metrics) -> str:
    """Return the measures of a run of question 2."""
    balance = 2 * math.log(2)
    linear = [f"{mse:.5f} (PCA, {n})" for n, mse in metrics["pca_test_mse"].items()]
    fresh = percent(metrics["fresh_discriminator_accuracy"])
    dimensions = metrics["signal_dimensions"]
    last = "in the last epoch, training (nats)"
    rows = [
        ("test MSE (pixels in 0..1)", f"{metrics['test_mse']:.5f}", ", ".join(linear)),
        ("mean of the test norms", f"{metrics['test_reconstruction_loss']:.3f}", "0"),
        (f"L_D {last}", number(metrics["loss_discriminator"]), number(balance)),
        (f"L_Enc {last}", number(metrics["loss_encoder"]), number(-balance / 2)),
        ("accuracy of a fresh discriminator", fresh, "50 %"),
        *match_rows("all coordinates", metrics["prior_match"]),
        *match_rows(f"{dimensions} signal coordinates", metrics["signal_match"]),
        *sample_rows(metrics),
    ]
    if metrics["knn_accuracy"] is not None:
        accuracy = {key: percent(x) for key, x in metrics["knn_accuracy"].items()}
        name = "digit from 5 nearest neighbours"
        others = f"{accuracy['pixels']} (pixels), {accuracy['pca_code']} (PCA)"
        rows.append((f"{name}, all coordinates", accuracy["code"], others))
        if "signal" in accuracy:
            others = f"{accuracy['pca_signal']} (PCA of as many)"
            rows.append((f"{name}, signal coordinates", accuracy["signal"], others))
    table = markdown_table(("measure", "this run", "to compare"), rows)
    return f"{table}\n\n{verdict(metrics)}\n\n{provenance(metrics)}"


def match_rows(where: str, match: Metrics | None) -> list[tuple[str, str, str]]:
    """Return rows that compare codes with true draws, over some coordinates."""
    if match is None:
        return []
    draws = match["draws"]
    low = draws["covariance_eigenvalue_min"][0]
    high = draws["covariance_eigenvalue_max"][1]
    mmd, most = (f"{1e4 * value:.1f}" for value in (match["mmd"], draws["mmd"][1]))
    compared = f"{low:.3g} .. {high:.3g} (true draws)"
    return [
        (f"covariance eigenvalues, {where}", eigenvalues(match), compared),
        (f"MMD² to the prior · 10⁴, {where}", mmd, f"at most {most} (true draws)"),
    ]


def sample_rows(metrics: Metrics) -> list[tuple[str, str, str]]:
    """Return rows that say how good samples and the map are."""
    distances = [
        "not measured (no labels)" if metrics[key] is None else f"{metrics[key]:.1f}"
        for key in FRECHET
    ]
    nearest = [f"{value:.2f}" for value in metrics["nearest_training_image"].values()]
    parzen = f"{metrics['parzen_log_likelihood']:.0f}"
    parzen += f" ± {metrics['parzen_standard_error']:.1f}"
    images = "{} (test images), {} (their reconstructions)"
    return [
        (
            "Fréchet distance of samples",
            distances[0],
            "{} (training images), {} (test reconstructions)".format(*distances[1:]),
        ),
        (
            f"Parzen log-likelihood, σ = {metrics['parzen_sigma']:.3f} (nats)",
            parzen,
            "",
        ),
        (
            "median distance of samples to the nearest training image",
            nearest[0],
            images.format(*nearest[1:]),
        ),
        ("trust in the t-SNE map", f"{metrics['tsne_trustworthiness']:.3f}", "1"),
    ]


def verdict(metrics: Metrics) -> str:
    """Say whether the codes can be told from as many true draws of the prior."""
    match = metrics.get("signal_match")
    if match is None:
        return "No coordinate carries more signal than noise: the codes hold nothing."
    names = {
        "mmd": "MMD²",
        "covariance_eigenvalue_min": "the least eigenvalue",
        "covariance_eigenvalue_max": "the largest eigenvalue",
        "mean_abs_mean": "the mean absolute mean",
    }
    apart = [
        name
        for key, name in names.items()
        if not match["draws"][key][0] <= match[key] <= match["draws"][key][1]
        and not (key == "mmd" and match[key] < 0)
    ]
    accuracy = metrics["fresh_discriminator_accuracy"]
    error = 0.5 / math.sqrt(2 * metrics["test_images"])
    if accuracy > 0.5 + 3 * error:
        apart.append("the accuracy of a fresh discriminator")
    answer = "No" if accuracy > 0.75 else "Not exactly" if apart else "Yes"
    return (
        f"Do the codes follow the prior? **{answer}.** "
        f"Over the {metrics['signal_dimensions']} signal coordinates, "
        f"{', '.join(apart) or 'none of these measures'} "
        f"{'are' if len(apart) > 1 else 'is'} outside what 19 sets of as many true "
        "draws show. The standard error of a fresh discriminator's accuracy is "
        f"{percent(error)}."
    )


def number(value: float) -> str:
    """Return a loss with three decimals, and no minus before a zero."""
    return f"{round(value, 3) + 0.0:.3f}"


def eigenvalues(match: Metrics) -> str:
    """Return the least and the largest eigenvalue of the codes' covariance."""
    low, high = (match[f"covariance_eigenvalue_{end}"] for end in ("min", "max"))
    return f"{low:.3g} .. {high:.3g}"


def q2_rows(metrics: Metrics, long: bool) -> str:
    """Return the comparisons' rows that trained as long as the default, or shorter."""
    header = (
        *("what was trained", "epochs", "test MSE", "L_D", "fresh D", "eigenvalues"),
        *("MMD² · 10⁴", "Fréchet", "5-NN", "seconds"),
    )
    rows = []
    for name, row in metrics["rows"].items():
        loss, distance = row["loss_discriminator"], row["frechet_distance"]
        neighbours = row.get("knn_accuracy")
        cells = (
            f"{row['title']} (`{name}`)",
            str(row["epochs"]),
            f"{row['test_mse']:.4f}",
            "" if loss is None else f"{loss:.2f}",
            f"{100 * row['fresh_discriminator_accuracy']:.0f} %",
            eigenvalues(row["prior_match"]),
            f"{row['prior_match']['mmd'] * 1e4:.1f}",
            "" if distance is None else f"{distance:.1f}",
            "" if neighbours is None else percent(neighbours["code"]),
            f"{row['training_seconds']:.0f}",
        )
        if row["long"] == long:
            rows.append(cells)
    return f"{markdown_table(header, rows)}\n\n{provenance(metrics)}"


# Report ------------------------------------------------------------------------------

# By metrics file: the report's blocks that it fills.
BLOCKS: dict[str, dict[str, Callable[[Metrics], str]]] = {
    "q1_metrics.json": {"q1": q1, "q1.error": q1_error},
    "q1_comparisons_metrics.json": {"q1.sizes": q1_sizes, "q1.designs": q1_designs},
    "q2_metrics.json": {"q2": q2},
    "q2_control_metrics.json": {"q2.control": q2},
    "course/q2_metrics.json": {"q2.course": q2},
    "q2_comparisons_metrics.json": {
        "q2.comparisons": lambda metrics: q2_rows(metrics, long=True),
        "q2.ablation": lambda metrics: q2_rows(metrics, long=False),
    },
}


def update(figures: Path = Path("figures"), report: Path = Path("report.md")) -> None:
    """Rewrite the blocks of the report for which there are metrics.

    Where there is no report, or it lacks a block, that is said and nothing is lost.

    Args:
        figures: folder of the metrics.
        report: the report.
    """
    if not report.exists():
        print(f"There is no {report} here to refresh.")
        return
    text = report.read_text(encoding="utf-8")
    for file, blocks in BLOCKS.items():
        if not (figures / file).exists():
            continue
        metrics = json.loads((figures / file).read_text(encoding="utf-8"))
        for name, render in blocks.items():
            begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
            pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
            block = f"{begin}\n{render(metrics).strip()}\n{end}"
            text, count = pattern.subn(lambda _, new=block: new, text)
            if count != 1:
                print(f"{report} has {count} blocks {name}, where there should be one.")
    temporary = report.with_name(f".{report.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(report)
    except OSError as error:
        error.filename = str(report)  # a full disk does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)


def main() -> None:
    """Refresh the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--figures", type=Path, default=Path("figures"))
    parser.add_argument("--report", type=Path, default=Path("report.md"))
    options = parser.parse_args()
    update(options.figures, options.report)


if __name__ == "__main__":
    main()
