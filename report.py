"""Writes the runs' numbers into `report.md` and `extras/report.md`.

    python report.py [--figures DIR] [--report FILE]

A block of a report stands between the lines `<!-- begin NAME -->` and
`<!-- end NAME -->`; what the `*_metrics.json` of the runs say is put there. Nothing is
trained or measured here, so a change of wording takes no run.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from files import read_json, replacing

STALE = "†"  # marks a row of other code or data than the script's own run
OTHER_CODE = "This run is of other code than the one that the report shows."
Metrics = Mapping[str, Any]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, its first column left-aligned, the others right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def with_legend(table: str) -> str:
    """Return a table, and below it what its marks mean, if it has any."""
    legend = f"\n\n{STALE}: made by other code or data than the default."
    return table + legend if STALE in table else table


def provenance(metrics: Metrics) -> str:
    """Say in a paragraph where a run's numbers come from."""
    data, settings = metrics["data"], metrics["settings"]
    known = [data[key] for key in ("source", "digits", "backgrounds") if key in data]
    return (
        f"Data: `{data['file']}`, {'; '.join(known)}. {settings['epochs']} epochs, "
        f"batch {settings['batch_size']}, learning rate {settings['learning_rate']:g}, "
        f"seed {metrics['seed']}; {metrics['training_seconds'] / 60:.1f} minutes of "
        "training."
    )


def versions(metrics: Metrics) -> str:
    """Return the versions of Python and of packages that a run used."""
    return ", ".join(f"{name} {used}" for name, used in metrics["versions"].items())


def psnr_db(mse: float) -> float:
    """Return the peak signal-to-noise ratio in dB of a mean squared error on [0, 1]."""
    return -10 * math.log10(max(mse, sys.float_info.min))


# Question 1 --------------------------------------------------------------------------


def q1_summary(metrics: Metrics) -> str:
    """Return question 1's result in a sentence."""
    ratio = metrics["test_mse"] / metrics["pca_test_mse"]
    size = metrics["code_dim"]
    return (
        f"Its test error is {ratio:.2f} times that of principal component analysis "
        f"(PCA) with {size} components, the size of its code."
    )


def q1(metrics: Metrics) -> str:
    """Return question 1's result: the CNN beside PCA and the mean image."""
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
    return f"{table}\n\n{provenance(metrics)}"


def q1_rows(metrics: Metrics) -> str:
    """Return question 1's code sizes, other designs and seeds."""
    rows = []
    for name, row in metrics["rows"].items():
        errors = row["validation_mse"], row["test_mse"], row["pca_test_mse"]
        ratio = row["test_mse"] / row["pca_test_mse"]
        shown = [f"{error:.5f}" for error in errors] + [f"{ratio:.2f}"]
        rows.append(
            (f"{row['title']}{row['mark']} (`{name}`)", str(row["code_dim"]), *shown)
        )
    rows.sort(key=lambda row: int(row[1]))
    header = "autoencoder", "code", "validation MSE", "test MSE", "PCA test MSE"
    return with_legend(markdown_table((*header, "ratio"), rows))


# Question 2 --------------------------------------------------------------------------

# Of each measure of the match: its name and its format.
MATCH = {
    "mmd": ("MMD²", ".1e"),
    "covariance_eigenvalue_min": ("smallest eigenvalue", ".3f"),
    "covariance_eigenvalue_max": ("largest eigenvalue", ".3f"),
}
NEARLY = 0.55  # a fresh discriminator's accuracy up to which codes nearly follow
# Of each number that tables show of a run: its place in the metrics, and its format.
MEASURES = {
    "test MSE": ("test_mse", ".5f"),
    "Fréchet": ("sample_quality.samples.frechet_distance", ".2f"),
    "precision": ("sample_quality.samples.precision", ".1%"),
    "recall": ("sample_quality.samples.recall", ".1%"),
    "clear digits": ("sample_quality.samples.clear", ".1%"),
    "5-NN": ("knn_accuracy.code", ".1%"),
    "fresh D": ("informative_match.fresh_discriminator", ".1%"),
    "MMD²": ("informative_match.mmd", ".1e"),
    "fresh D, all coordinates": ("prior_match.fresh_discriminator", ".1%"),
    "MMD², all coordinates": ("prior_match.mmd", ".1e"),
    "L_recons, mean over images": ("test_reconstruction_loss", ".3f"),
    "L_D": ("loss_discriminator", ".3f"),
    "L_Enc": ("loss_encoder", ".3f"),
    "logistic regression": ("logistic_accuracy.code", ".1%"),
    "trustworthiness": ("trustworthiness.code", ".4f"),
    "test MSE, PCA": ("pca_test_mse", ".5f"),
    "5-NN, PCA": ("knn_accuracy.pca", ".1%"),
    "the digit asked for": ("obedience", ".1%"),
    "fresh D that sees the digit": ("fresh_discriminator", ".1%"),
}
COMPARED = list(MEASURES)[:8]
OF_SEEDS = [
    *("test MSE", "L_recons, mean over images", "L_D", "Fréchet", "clear digits"),
    *("5-NN", "fresh D", "MMD²"),
]
# Where a run has what these measures say of draws from the prior.
ON_DRAWS = {
    "fresh D": "fresh_discriminator_on_draws",
    "MMD²": "informative_match.draws.mmd",
}


def measured(run: Metrics, name: str) -> float | None:
    """Return a number of a run, None where it is null or missing."""
    return at(run, MEASURES[name][0])


def at(run: Metrics, place: str) -> Any:
    """Return what stands at a place such as "knn_accuracy.code", None if nothing."""
    value: Any = run
    for key in place.split("."):
        if value is None:
            return None
        value = value.get(key)
    return value


def cell(name: str, value: float | None) -> str:
    """Return a number as tables show it, nothing for None."""
    return "" if value is None else format(value, MEASURES[name][1])


def of_seeds(metrics: Metrics) -> list[Metrics]:
    """Return the default's runs, a seed each."""
    rows = metrics["rows"]
    return [rows[name] for name in ("default", "seed-1", "seed-2") if name in rows]


def ends(name: str, values: Sequence[float]) -> tuple[str, str]:
    """Return the least and the largest value of a measure, as tables show them."""
    return cell(name, min(values)), cell(name, max(values))


def q2_summary(runs: Sequence[Metrics]) -> str:
    """Return the results of runs of the default in a sentence."""

    def span(name: str) -> str:
        """Return a number's range over the runs."""
        least, most = ends(name, [measured(run, name) for run in runs])
        return least if least == most else f"{least} to {most}"

    if not runs:
        return "There is no run of the default here."
    seeds = "One seed" if len(runs) == 1 else f"{len(runs)} seeds"
    text = (
        f"{seeds}: a newly trained discriminator tells the computed numbers from draws "
        f"in {span('fresh D')} of cases (chance: 50%)"
    )
    accuracy = runs[0]["knn_accuracy"]
    if accuracy is None:
        return f"{text}."
    real = runs[0]["sample_quality"]["test_images"]["clear"]
    return (
        f"{text}. A classifier is at least 90% confident of {span('clear digits')} of "
        f"the samples (test images: {real:.1%}). Five-nearest-neighbour accuracy "
        f"(5-NN) is {span('5-NN')} on the code, {accuracy['pca']:.1%} on as many "
        f"principal components, and {accuracy['pixels']:.1%} on pixels."
    )


def q2_summary_of_seeds(metrics: Metrics) -> str:
    """Return the results of the seeds that the code of today trained."""
    return q2_summary([run for run in of_seeds(metrics) if not run["mark"]])


def q2_match(metrics: Metrics) -> str:
    """Return how the codes match the prior, beside true draws."""
    informative, size = metrics["informative_dimensions"], metrics["code_dim"]
    where = f"the {informative} informative coordinates"
    match = metrics["informative_match"]
    on_draws = metrics["fresh_discriminator_on_draws"]
    rows = [match_row(key, where, match) for key in MATCH]
    accuracy = match["fresh_discriminator"]
    yardstick = ", ".join(f"{each:.1%}" for each in on_draws)
    rows.append((f"fresh discriminator, {where}", f"{accuracy:.1%}", yardstick, ""))
    if accuracy > NEARLY:
        answer = "no"
    elif accuracy > max(on_draws) or 0 in match["as_bad"].values():
        answer = "nearly, not exactly"
    else:
        answer = "yes, as far as these measures tell"
    text = f"Do these codes follow the prior? Over {where}: **{answer}**."
    if informative < size:
        rest = metrics["prior_match"]
        rows.append(match_row("mmd", f"all {size} coordinates", rest))
        accuracy = f"{rest['fresh_discriminator']:.1%}"
        rows.append((f"fresh discriminator, all {size} coordinates", accuracy, "", ""))
        text += (
            f" As the other {size - informative} are independent draws from the prior, "
            f"the answer over all {size} is the same."
        )
    text += (
        f" *Nearly*: a fresh discriminator is right in at most {NEARLY:.0%} of cases."
    )
    header = "codes against the prior", "this run", "true draws", "p value"
    return f"{markdown_table(header, rows)}\n\n{text}"


def match_row(key: str, where: str, match: Metrics) -> tuple[str, ...]:
    """Return a measure of the match in a row, beside its range among true draws."""
    name, form = MATCH[key]
    least, largest = match["draws"][key]
    as_bad = match["as_bad"][key]
    p_value = f"{as_bad:.1%}" if as_bad else "< 0.5%"
    span = f"{least:{form}} .. {largest:{form}}"
    return f"{name}, {where}", f"{match[key]:{form}}", span, p_value


def q2_samples(metrics: Metrics) -> str:
    """Return a table of the samples' quality, if there are labels to judge it by."""
    quality = metrics["sample_quality"]
    if quality["samples"] is None:
        return "Measuring the samples takes labels, which this data lacks."
    rows = []
    for name, found in quality.items():
        # The test images are at distance 0 from themselves.
        distance = f"{found.get('frechet_distance', 0):.2f}"
        digits = " ".join(f"{100 * share:.0f}" for share in found["digits"])
        rows.append((name.replace("_", " "), distance, f"{found['clear']:.1%}", digits))
    header = "images", "Fréchet", "clear digits", "% of each digit, 0 to 9"
    right = f"{quality['test_images']['accuracy']:.1%}"
    table = markdown_table(header, rows)
    return f"{table}\n\nThe classifier is right on {right} of the test images."


def q2_neighbours(metrics: Metrics) -> str:
    """Return a table of what the code keeps of the images' neighbourhoods."""
    size, bound = metrics["informative_dimensions"], metrics["knn_bound"]
    accuracies = [metrics["knn_accuracy"] or {}, metrics["logistic_accuracy"] or {}]
    trust = metrics["trustworthiness"] | {"pixels": 1.0}
    errors = {"code": metrics["test_mse"], "pca": metrics["pca_test_mse"]}
    names = {
        "code": f"the code, {size} informative coordinates",
        "pca": "as many principal components",
        "pixels": "the pixels",
    }
    rows = []
    for key, name in names.items():
        shown = [f"{each[key]:.1%}" if key in each else "" for each in accuracies]
        error = f"{errors[key]:.5f}" if key in errors else ""
        rows.append((name, error, *shown, f"{trust[key]:.4f}"))
    header = "space", "test MSE", "5-NN", "logistic regression", "trustworthiness"
    of_map = f"{metrics['tsne_trustworthiness']:.3f}"
    text = f"Trustworthiness of the t-SNE map against the codes: {of_map}."
    if bound is not None:
        exact = f"codes that follow the prior exactly in {size} dimensions"
        text += f" 5-NN of {exact}: conjectured to be at most {bound:.1%}."
    return f"{markdown_table(header, rows)}\n\n{text}"


def q2_run(metrics: Metrics) -> str:
    """Return all numbers of one run, and where they come from."""
    values = {name: measured(metrics, name) for name in MEASURES}
    rows = [(name, cell(name, x)) for name, x in values.items() if x is not None]
    table = markdown_table(("measure", "this run"), rows)
    return f"{table}\n\n{provenance(metrics)}"


def q2_seeds(metrics: Metrics) -> str:
    """Return the default's numbers, a column a seed, with their mean and range."""
    runs, rows = of_seeds(metrics), []
    for name in OF_SEEDS:
        values = [measured(run, name) for run in runs]
        if not values or None in values:
            continue
        shown = [cell(name, value) for value in values]
        mean = cell(name, sum(values) / len(values))
        rows.append((name, *shown, mean, " .. ".join(ends(name, values))))
        if name in ON_DRAWS:
            span = " .. ".join(ends(name, at(runs[0], ON_DRAWS[name])))
            rows.append((f"{name} of true draws", *[""] * len(runs), "", span))
    seeds = [f"seed {run['seed']}{run['mark']}" for run in runs]
    return with_legend(markdown_table(["measure", *seeds, "mean", "range"], rows))


def q2_rows(metrics: Metrics, names: Collection[str], columns: Sequence[str]) -> str:
    """Return a table of the comparisons' rows of these names."""
    rows = []
    for name, row in metrics["rows"].items():
        if name in names:
            cells = [cell(each, measured(row, each)) for each in columns]
            title = f"{row['title']}{row['mark']} (`{name}`)"
            rows.append((title, str(row["epochs"]), *cells))
    if not rows:
        return "There are no rows of this kind here."
    return with_legend(markdown_table(("what was trained", "epochs", *columns), rows))


def q2_by_length(metrics: Metrics, long: bool) -> str:
    """Return the rows that trained as long as the default, or shorter."""
    names = [name for name, row in metrics["rows"].items() if row["long"] == long]
    return q2_rows(metrics, names, COMPARED)


def q2_computed(metrics: Metrics) -> str:
    """Return the rows that tell ten computed coordinates from all of them."""
    names = "default", "control", "short", "all-informative"
    columns = "test MSE", "Fréchet", "clear digits", "5-NN", "fresh D"
    return q2_rows(metrics, names, columns)


def styles(metrics: Metrics) -> str:
    """Return the figure and the numbers of a run of one style in ten digits."""
    figure = "![Ten styles, and those of five test images](../figures/styles.png)"
    return f"{figure}\n\n{q2_run(metrics)}"


def styles_seed(metrics: Metrics) -> str:
    """Return the main numbers of a further run of styles in a sentence."""
    names = ["test MSE", "Fréchet", "clear digits", "the digit asked for", "5-NN"]
    names.append("fresh D that sees the digit")
    shown = [f"{name} {cell(name, measured(metrics, name))}" for name in names]
    return f"Seed {metrics['seed']}: {', '.join(shown)}."


# Reports -----------------------------------------------------------------------------

# By metrics file: the blocks that it fills. Comparisons come last, for they show runs.
BLOCKS: dict[str, dict[str, Callable[[Metrics], str]]] = {
    "q1_metrics.json": {"q1.summary": q1_summary, "q1": q1},
    "unseen/q1_metrics.json": {"q1.unseen": q1},
    "q2_metrics.json": {
        "q2.summary": lambda metrics: q2_summary([metrics]),
        "q2": provenance,
        "q2.match": q2_match,
        "q2.samples": q2_samples,
        "q2.neighbours": q2_neighbours,
        "q2.versions": versions,
    },
    "q2_control_metrics.json": {"q2.control": q2_run},
    "course/q2_metrics.json": {"q2.course": q2_run},
    "styles_metrics.json": {"styles": styles},
    "styles-1/styles_metrics.json": {"styles.1": styles_seed},
    "styles-2/styles_metrics.json": {"styles.2": styles_seed},
    "q1_comparisons_metrics.json": {"q1.comparisons": q1_rows},
    "q2_comparisons_metrics.json": {
        "q2.summary": q2_summary_of_seeds,
        "q2.seeds": q2_seeds,
        "q2.computed": q2_computed,
        "q2.comparisons": lambda metrics: q2_by_length(metrics, long=True),
        "q2.ablation": lambda metrics: q2_by_length(metrics, long=False),
    },
}
# The homework's blocks; the others may be missing.
NEEDED = "q1", "q2", "q2.match", "q2.samples", "q2.neighbours"
# What tells a row of today's layout from an older one.
ROW_KEYS = {"q1": {"validation_mse"}, "q2": {"informative_match", "prior_match"}}


def with_own_runs(question: str, comparisons: Metrics, runs: Metrics) -> Metrics:
    """Return comparisons whose rows of the scripts' own runs are taken from `runs`.

    Each row gets a `mark`, `STALE` for other code or data than the script's own run.
    """
    files = {"default": f"{question}_metrics.json"}
    files["control"] = f"{question}_control_metrics.json"
    own = runs.get(files["default"], {})
    made_by = own.get("code"), own.get("data", {}).get("sha256")
    rows = {}
    for name, file in files.items():
        if file in runs:
            epochs = runs[file]["settings"]["epochs"]
            shown = {"title": f"the {name}", "long": True, "epochs": epochs}
            source = {"data": runs[file]["data"]["sha256"]}
            rows[name] = runs[file] | shown | source
    rows |= {k: v for k, v in comparisons["rows"].items() if k not in files}
    for name, row in rows.items():
        is_stale = own and (row.get("code"), row.get("data")) != made_by
        mark = STALE if is_stale else ""
        rows[name] = row | {"title": row.get("title", name), "mark": mark}
    return {"rows": rows}


def rewrite(report: Path, blocks: Mapping[str, str]) -> Counter[str]:
    """Put the blocks into a report; return how many of each it has."""
    text = report.read_bytes().decode("utf-8")  # bytes, so that line ends stay
    line_end = "\r\n" if "\r\n" in text else "\n"
    counts, new = Counter(), text
    for name, content in blocks.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        block = f"{begin}\n{content}\n{end}".replace("\n", line_end)
        new, counts[name] = pattern.subn(lambda _, block=block: block, new)
    if new != text:
        with replacing(report) as temporary:
            # A file's name in a block may be of bytes that are no text.
            temporary.write_bytes(new.encode("utf-8", "replace"))
    return counts


def update(figures: Path = Path("figures"), report: Path = Path("report.md")) -> bool:
    """Rewrite the blocks of the report, and of `extras/report.md` beside it.

    Tells what is damaged or can't be written, and returns whether all went well.
    """
    problems, blocks, runs = [], {}, {}
    for file, renderers in BLOCKS.items():
        path, question = figures / file, "q1" if "q1" in file else "q2"
        try:
            metrics = runs[file] = read_json(path)
            if "rows" in metrics:
                metrics = with_own_runs(question, metrics, runs)
                for name, row in list(metrics["rows"].items()):
                    if not ROW_KEYS[question] <= row.keys():
                        problems.append(f"{path}: row {name} is left out: old layout")
                        del metrics["rows"][name]
            new = {name: render(metrics) for name, render in renderers.items()}
            own = runs.get(f"{question}_metrics.json", metrics)
            if "rows" not in metrics and metrics.get("code") != own.get("code"):
                new = {name: f"{text}\n\n{OTHER_CODE}" for name, text in new.items()}
            blocks |= new
        except (FileNotFoundError, NotADirectoryError):
            continue
        except Exception as error:  # the file may hold anything
            runs.pop(file, None)
            problems.append(f"{path}: its blocks stay as they are: {error!r}")
    if not blocks and not problems:
        problems.append(f"{figures}: found no metrics there")
    counts = Counter()
    for path in (report, report.parent / "extras" / "report.md"):
        try:
            counts.update(rewrite(path, blocks))
        except FileNotFoundError:
            if path == report:
                problems.append(f"There is no {path} here to refresh.")
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{path}: {error}")
    for name, count in counts.items():
        if count > 1 or (count == 0 and name in NEEDED):
            problems.append(f"{report}: found {count} blocks {name}, expected one")
    for problem in problems:
        print(problem, file=sys.stderr)
    return not problems


def main() -> None:
    """Refresh the reports."""
    parser = argparse.ArgumentParser(
        description="Write the runs' numbers into reports."
    )
    parser.add_argument("--figures", type=Path, default=Path("figures"))
    parser.add_argument("--report", type=Path, default=Path("report.md"))
    options = parser.parse_args()
    if not update(options.figures, options.report):
        sys.exit(2)


if __name__ == "__main__":
    main()
