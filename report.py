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

# What a table of question 2's runs shows of each, and the aims for its default run.
COLUMNS = "test MSE", "Fréchet", "5-NN", "L_D", "signal", "fresh D", "MMD² · 10⁴"
AIMS = {
    "test MSE": "at most 0.0105",
    "Fréchet": "at most 3.5",
    "L_D": "at least 1.30",
    "fresh D": "at most 60 %",
    "MMD² · 10⁴": "at most 3",
    "5-NN": "at least 95 %",
}


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


def psnr_db(mse: float) -> float:
    """Return the peak signal-to-noise ratio in dB of a mean squared error on [0, 1]."""
    return -10 * math.log10(max(mse, sys.float_info.min))


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
        [(*row, f"{mse:.5f}", f"{psnr_db(mse):.2f}") for *row, mse in rows],
    )
    verdict = (
        f"The CNN's test error is {ratio:.2f} times that of PCA: it "
        f"{'beats' if ratio < 1 else 'does **not** beat'} the best linear code."
    )
    return "\n\n".join([table, verdict, provenance(metrics)])


def q1_unseen(metrics: Metrics) -> str:
    """Return question 1's error on photographs that training did not see."""
    cnn, pca = metrics["test_mse"], metrics["pca_test_mse"]
    return f"Test MSE: {cnn:.5f}, PCA's {pca:.5f}.\n\n{provenance(metrics)}"


def q1_error(metrics: Metrics) -> str:
    """Return where question 1's error lies, and what the code knows."""
    parts = []
    if by_digit := metrics["digit_test_mse"]:
        easiest, hardest = (f(by_digit, key=by_digit.get) for f in (min, max))
        parts.append(
            f"The easiest digit is {easiest}, with a test MSE of "
            f"{by_digit[easiest]:.5f}, the hardest {hardest}, with "
            f"{by_digit[hardest]:.5f}."
        )
    if accuracy := metrics["knn_accuracy"]:
        rows = [
            ("the CNN's code", percent(accuracy["cnn_code"])),
            ("PCA's code of the same size", percent(accuracy["pca_code"])),
            ("the pixels", percent(accuracy["pixels"])),
        ]
        parts.append(markdown_table(("5 nearest neighbours in", "accuracy"), rows))
    return "\n\n".join(parts)


def q1_rows(metrics: Metrics) -> str:
    """Return question 1's code sizes, other designs and seeds."""
    rows = [
        (
            row["title"],
            str(row["code_dim"]),
            f"{row['validation_mse']:.5f}",
            f"{row['test_mse']:.5f}",
            f"{row['pca_test_mse']:.5f}",
            f"{row['test_mse'] / row['pca_test_mse']:.2f}",
        )
        for row in metrics["rows"].values()
    ]
    header = "autoencoder", "code", "validation MSE", "test MSE", "PCA test MSE"
    table = markdown_table((*header, "ratio"), rows)
    return f"{table}\n\n{provenance(metrics)}"


# Question 2 --------------------------------------------------------------------------


def q2(metrics: Metrics) -> str:
    """Return all measures of a run of question 2."""
    parts = q2_losses, q2_match, q2_samples, q2_neighbours, provenance
    return "\n\n".join(part(metrics) for part in parts)


def q2_losses(metrics: Metrics) -> str:
    """Return a table of the errors and the losses."""
    balance = 2 * math.log(2)
    linear = [f"{mse:.5f} (PCA, {n})" for n, mse in metrics["pca_test_mse"].items()]
    last = "in the last epoch, training (nats)"
    rows = [
        ("test MSE (pixels in 0..1)", f"{metrics['test_mse']:.5f}", ", ".join(linear)),
        ("mean of the test norms", f"{metrics['test_reconstruction_loss']:.3f}", ""),
        (f"L_D {last}", number(metrics["loss_discriminator"]), number(balance)),
        (f"L_Enc {last}", number(metrics["loss_encoder"]), number(-balance / 2)),
    ]
    return markdown_table(("loss", "this run", "to compare"), rows)


def q2_match(metrics: Metrics) -> str:
    """Return a table of how codes, untrained codes and true draws match the prior."""
    names = {
        "mmd": ("MMD² · 10⁴", lambda value: f"{1e4 * value:.1f}"),
        "covariance_eigenvalue_min": ("least eigenvalue", "{:.3g}".format),
        "covariance_eigenvalue_max": ("largest eigenvalue", "{:.3g}".format),
        "ks_max": ("largest KS distance of a marginal", "{:.3f}".format),
        "fresh_discriminator": ("accuracy of a fresh discriminator", percent),
    }
    dimensions, rows = metrics["signal_dimensions"], []
    parts = [(f"{dimensions} signal coordinates", "signal_match", "signal")]
    if dimensions < metrics["code_dim"]:
        parts.append(("all coordinates", "prior_match", "all"))
    for where, key, start in parts:
        match, before = metrics[key], metrics["start_match"].get(start)
        if match is None:
            continue
        for measure, (name, shown) in names.items():
            values = shown(match[measure]), shown(before[measure])
            draws = match["draws"].get(measure, [0.5])  # a discriminator's: chance
            rows.append((f"{name}, {where}", *values, " .. ".join(map(shown, draws))))
    header = "codes against the prior", "this run", "untrained start", "true draws"
    return f"{markdown_table(header, rows)}\n\n{verdict(metrics)}"


def q2_samples(metrics: Metrics) -> str:
    """Return a table of the samples' quality, if there are labels to judge it by."""
    quality = metrics["sample_quality"]
    if quality["samples"] is None:
        return "Measuring the samples takes labels, which this data lacks."
    rows = [
        (
            name.replace("_", " "),
            f"{q['frechet_distance']:.2f}" if "precision" in q else "0",
            *(percent(q[key]) if key in q else "" for key in ("precision", "recall")),
            percent(q["clear"]),
            " ".join(f"{100 * share:.0f}" for share in q["digits"]),
        )
        for name, q in quality.items()
    ]
    header = ("images", "Fréchet", "precision", "recall", "clear digits")
    table = markdown_table((*header, "% of each digit, 0 to 9"), rows)
    accuracy = percent(quality["test_images"]["accuracy"])
    return f"{table}\n\nThe classifier names {accuracy} of the test images."


def q2_neighbours(metrics: Metrics) -> str:
    """Return a table of what the code keeps of the images' neighbourhoods."""
    accuracy, trust = metrics["knn_accuracy"], metrics["trustworthiness"]
    names = {
        "signal": f"the code, {metrics['signal_dimensions']} signal coordinates",
        "pca_signal": "as many principal components",
        "code": "the code, all coordinates",
        "pca_code": "as many principal components",
        "pixels": "the pixels",
    }
    rows = [
        (
            name,
            "" if accuracy is None else percent(accuracy[key]),
            f"{trust[key]:.4f}" if key in trust else "1",
        )
        for key, name in names.items()
        if key in trust or key == "pixels"
    ]
    header = "space", "digit from 5 nearest neighbours", "trustworthiness"
    noise = metrics["signal_noise"]
    spread = f"{min(noise):.3g} to {max(noise):.3g}" if noise else "none"
    return (
        f"{markdown_table(header, rows)}\n\nNoise of q(z|x) in the signal coordinates "
        f"(standard deviation, median over images): {spread}. Trustworthiness of the "
        f"t-SNE map against the codes: {metrics['tsne_trustworthiness']:.3f}."
    )


def verdict(metrics: Metrics) -> str:
    """Say whether the codes can be told from as many true draws of the prior."""
    match = metrics["signal_match"]
    if match is None:
        return "No coordinate carries more signal than noise: the codes hold nothing."
    apart = []
    for key, name, too_small in (  # a distance can't be too small
        ("mmd", "MMD²", False),
        ("covariance_eigenvalue_min", "the least eigenvalue", True),
        ("covariance_eigenvalue_max", "the largest eigenvalue", True),
        ("ks_max", "the marginals", False),
    ):
        low, high = match["draws"][key]
        if match[key] > high or (too_small and match[key] < low):
            apart.append(name)
    accuracy = match["fresh_discriminator"]
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


def row_cells(row: Metrics) -> dict[str, str]:
    """Return what a table of runs shows of one, by column."""
    loss, distance = row["loss_discriminator"], row["frechet_distance"]
    neighbours, match = row["knn_accuracy"] or {}, row["signal_match"]
    cells = (
        f"{row['test_mse']:.4f}",
        "" if distance is None else f"{distance:.2f}",
        percent(neighbours["signal"]) if "signal" in neighbours else "",
        "" if loss is None else f"{loss:.2f}",
        str(row["signal_dimensions"]),
        percent(match["fresh_discriminator"]) if match else "",
        f"{match['mmd'] * 1e4:.1f}" if match else "",
    )
    return dict(zip(COLUMNS, cells, strict=True))


def q2_seeds(metrics: Metrics) -> str:
    """Return a table of the default's runs, a column a seed, beside the aims.

    A run without labels, or with nothing in its codes, is left out.
    """
    names = metrics["rows"].keys() & {"default", "seed-1", "seed-2"}
    runs = [metrics["rows"][name] for name in sorted(names)]
    runs = [run for run in runs if run["signal_match"] and run["knn_accuracy"]]
    cells = [row_cells(run) for run in runs]
    rows = [(name, aim, *(run[name] for run in cells)) for name, aim in AIMS.items()]
    accuracies = [run["knn_accuracy"] for run in runs]
    leads = [100 * (each["signal"] - each["pca_signal"]) for each in accuracies]
    more = [f"{lead:+.1f} points" for lead in leads]
    rows.append(("5-NN above that of PCA", "more than 0", *more))
    header = "measure", "aim", *(f"seed {run['seed']}" for run in runs)
    return markdown_table(header, rows)


def q2_rows(metrics: Metrics, long: bool) -> str:
    """Return the comparisons' rows that trained as long as the default, or shorter."""
    rows = [
        (f"{row['title']} (`{name}`)", str(row["epochs"]), *row_cells(row).values())
        for name, row in metrics["rows"].items()
        if row["long"] == long
    ]
    table = markdown_table(("what was trained", "epochs", *COLUMNS), rows)
    return f"{table}\n\n{provenance(metrics)}" if long else table


# Report ------------------------------------------------------------------------------

# By metrics file: the report's blocks that it fills.
BLOCKS: dict[str, dict[str, Callable[[Metrics], str]]] = {
    "q1_metrics.json": {"q1": q1, "q1.error": q1_error},
    "unseen/q1_metrics.json": {"q1.unseen": q1_unseen},
    "q1_comparisons_metrics.json": {"q1.comparisons": q1_rows},
    "q2_metrics.json": {
        "q2": provenance,
        "q2.losses": q2_losses,
        "q2.match": q2_match,
        "q2.samples": q2_samples,
        "q2.neighbours": q2_neighbours,
    },
    "q2_control_metrics.json": {"q2.control": q2},
    "course/q2_metrics.json": {"q2.course": q2},
    "q2_comparisons_metrics.json": {
        "q2.seeds": q2_seeds,
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
            try:
                block = f"{begin}\n{render(metrics).strip()}\n{end}"
            except (KeyError, TypeError, AttributeError):
                print(f"{figures / file} has another layout: run its script anew.")
                break
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
