"""The reports' blocks, from the metrics that runs leave behind."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import report

HOME = Path(report.__file__).parent
REPORT = "before\n<!-- begin q1 -->\n{}\n<!-- end q1 -->\nafter \\1\n"
RUN = {
    "data": {"file": "given.npy", "source": "a file as given", "sha256": "abc"},
    "code": "123",
    "settings": {"epochs": 3, "batch_size": 42, "learning_rate": 0.002},
    "seed": 7,
    "versions": {"python": "3.12.1", "keras": "3.9.9"},
    "training_seconds": 90.0,
}
Q1 = RUN | {
    "test_mse": 0.0123456,
    "validation_mse": 0.013,
    "pca_test_mse": 0.0246912,
    "mean_image_test_mse": 0.1,
    "code_dim": 17,
    "parameters": 948675,
}
MATCH = dict.fromkeys(report.MATCH, 0.5) | {"fresh_discriminator": 0.5}
MATCH["draws"] = dict.fromkeys(report.MATCH, [0.4, 0.6])
MATCH["as_bad"] = dict.fromkeys(report.MATCH, 0.251)
PARTS = {"code": 0.91, "pca": 0.92}
GOOD = {"frechet_distance": 3.21, "precision": 0.81, "recall": 0.82}
GOOD |= {"clear": 0.83, "digits": [0.1] * 10}
Q2 = RUN | {
    "test_images": 10_000,
    "test_mse": 0.0123456,
    "pca_test_mse": 0.03,
    "test_reconstruction_loss": 2.5,
    "loss_discriminator": 1.3,
    "loss_encoder": -0.69,
    "code_dim": 100,
    "informative_dimensions": 10,
    "prior_match": MATCH,
    "informative_match": MATCH,
    "fresh_discriminator_on_draws": [0.501, 0.49, 0.5],
    "sample_quality": {"test_images": GOOD | {"accuracy": 0.98}, "samples": GOOD},
    "knn_accuracy": PARTS | {"pixels": 0.93},
    "logistic_accuracy": PARTS,
    "trustworthiness": PARTS,
    "knn_bound": 0.767,
    "tsne_trustworthiness": 0.94,
}
UNLABELLED = dict.fromkeys(("knn_accuracy", "logistic_accuracy", "knn_bound"))
UNLABELLED["sample_quality"] = dict.fromkeys(("test_images", "samples"))
DAMAGED = '{"test_mse": 0.', "null", '{"test_mse": null}', "\xe9"


def rendered(folder, text="", **metrics):
    """Return the report after runs that left these metrics, by the file's stem."""
    (folder / "figures").mkdir(exist_ok=True)
    for name, content in metrics.items():
        path = folder / "figures" / f"{name}_metrics.json"
        path.write_text(json.dumps(content), encoding="utf-8")
    # A block that two files fill stands there once.
    names = dict.fromkeys(name for blocks in report.BLOCKS.values() for name in blocks)
    for name in () if text else names:
        text += f"<!-- begin {name} -->\n<!-- end {name} -->\n"
    path = folder / "report.md"
    path.write_text(text, encoding="utf-8")
    report.update(folder / "figures", path)
    return path.read_text(encoding="utf-8")


def block(text, name):
    return text.partition(f"<!-- begin {name} -->\n")[2].partition("<!-- end")[0]


def test_blocks_are_rewritten_and_all_else_is_kept(tmp_path):
    path = tmp_path / "report.md"
    path.write_bytes(REPORT.format("old").replace("\n", "\r\n").encode())
    data = RUN["data"] | {"file": os.fsdecode(b"donn\xe9es.npy")}
    metrics = json.dumps(Q1 | {"data": data})
    (tmp_path / "q1_metrics.json").write_text(metrics, encoding="utf-8")
    assert report.update(tmp_path, path)
    text = path.read_bytes()
    assert b"old" not in text
    assert b"`donn?es.npy`" in text  # a byte that is no UTF-8
    assert text.startswith(b"before\r\n<!-- begin q1 -->\r\n| autoencoder |")
    assert text.endswith(b"of training.\r\n<!-- end q1 -->\r\nafter \\1\r\n")
    assert text.count(b"\n") == text.count(b"\r\n")


def test_question_1s_block_has_the_runs_numbers(tmp_path):
    text = rendered(tmp_path, q1=Q1)
    assert "0.50 times that of principal" in block(text, "q1.summary")
    text = block(text, "q1")
    for number in ("0.01235", "0.02469", "0.10000", "19.08", "948,675", "17"):
        assert f"| {number} |" in text
    for words in ("`given.npy`", "3 epochs", "batch 42", "rate 0.002", "seed 7"):
        assert words in text
    assert "1.5 minutes" in text


def test_the_verdict_hangs_on_the_tests_of_the_informative_coordinates(tmp_path):
    """Each verdict has its metrics; the appended coordinates change none."""
    far = MATCH | {"fresh_discriminator": 0.551, "mmd": 0.7}
    near = MATCH | {"fresh_discriminator": 0.549}
    none_as_bad = MATCH | {"as_bad": MATCH["as_bad"] | {"mmd": 0.0}}
    verdicts = {"no": far, "nearly, not exactly": near, "yes, as far": MATCH}
    for verdict, match in (*verdicts.items(), ("nearly, not exactly", none_as_bad)):
        run = Q2 | {"informative_match": match, "prior_match": far}
        text = block(rendered(tmp_path, q2=run), "q2.match")
        assert f"Over the 10 informative coordinates: **{verdict}" in text
        assert "other 90 are independent draws" in text
        assert "| < 0.5% |" in text or match is not none_as_bad
    name = "the 10 informative coordinates"
    text = block(rendered(tmp_path, q2=Q2 | {"informative_match": far}), "q2.match")
    assert f"| MMD², {name} | 7.0e-01 | 4.0e-01 .. 6.0e-01 | 25.1% |" in text
    assert f"| smallest eigenvalue, {name} | 0.500 | 0.400 .. 0.600 | 25.1% |" in text
    fresh = f"| fresh discriminator, {name} | 55.1% | 50.1%, 49.0%, 50.0% |  |"
    assert fresh in text
    assert "| fresh discriminator, all 100 coordinates | 50.0% |  |  |" in text
    text = block(rendered(tmp_path, q2=Q2 | {"code_dim": 10}), "q2.match")
    assert text.count("fresh discriminator, ") == 1
    assert "draws from the prior" not in text


def test_question_2s_blocks_have_the_runs_numbers_or_say_why_not(tmp_path):
    text = rendered(tmp_path, q2=Q2, q2_control=Q2 | UNLABELLED)
    assert "| 91.0% | 91.0% | 0.9100 |" in block(text, "q2.neighbours")
    assert "at most 76.7%" in block(text, "q2.neighbours")
    assert "| samples | 3.21 | 83.0% | 10 10" in block(text, "q2.samples")
    assert "python 3.12.1, keras 3.9.9" in block(text, "q2.versions")
    assert "| test MSE | 0.01235 |" in block(text, "q2.control")
    assert "5-NN |" not in block(text, "q2.control")
    assert "91.0% on the code, 92.0% on as many" in block(text, "q2.summary")
    styles = Q2 | {"obedience": 0.985, "fresh_discriminator": 0.6}
    (tmp_path / "figures" / "styles-1").mkdir()
    text = rendered(tmp_path, **{"styles-1/styles": styles})
    told = "Fréchet 3.21, clear digits 83.0%, the digit asked for 98.5%, 5-NN 91.0%"
    assert told in block(text, "styles.1")
    text = rendered(tmp_path, q2=Q2 | UNLABELLED)
    assert "takes labels" in block(text, "q2.samples")
    assert "at most" not in block(text, "q2.neighbours")
    assert block(text, "q2.summary").endswith("in 50.0% of cases (chance: 50%).\n")


def test_comparisons_show_the_scripts_own_runs_as_they_are_now(tmp_path, capsys):
    row = Q2 | {"title": "another", "long": True, "epochs": 3, "test_mse": 0.4}
    row["data"] = "abc"
    rows = {name: row for name in ("default", "control", "seed-1")}
    rows |= {"vae": row | {"loss_discriminator": None}, "old": {"long": True}}
    rows["other-code"] = row | {"code": "124"}
    rows["other-data"] = row | {"data": "abd"}
    rows["short"] = row | {"long": False, "seed": 1}
    text = rendered(tmp_path, q2=Q2, q2_comparisons={"rows": rows})
    table = block(text, "q2.comparisons")
    assert "| the default (`default`) | 3 | 0.01235 | 3.21 |" in table
    assert "`control`" not in table
    assert "| another (`vae`) | 3 | 0.40000 | 3.21 | 81.0% |" in table
    assert "another† (`other-code`)" in table
    assert "another† (`other-data`)" in table
    assert "`short`" in block(text, "q2.ablation")
    assert "`old`" not in text
    assert "row old is left out" in capsys.readouterr().err
    mean = "| test MSE | 0.01235 | 0.40000 | 0.20617 | 0.01235 .. 0.40000 |"
    assert mean in block(text, "q2.seeds")
    small = Q1 | {"title": "small", "code_dim": 8, "data": "abc"}
    text = rendered(tmp_path, q1=Q1, q1_comparisons={"rows": {"x": small}})
    table = block(text, "q1.comparisons")
    assert table.index("| small (`x`) | 8 |") < table.index("| the default (`default`)")


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_is_told_and_the_other_blocks_are_refreshed(
    tmp_path, capsys, content
):
    rendered(tmp_path)
    path = tmp_path / "figures" / "q2_control_metrics.json"
    path.write_bytes(content.encode("latin-1"))
    assert "0.01235" in block(rendered(tmp_path, q1=Q1), "q1")
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2  # the first of an empty folder
    assert str(path) in told[1]


def test_the_summary_spans_the_seeds_of_todays_code(tmp_path):
    row = Q2 | {"title": "a seed", "long": True, "epochs": 3, "data": "abc"}
    row["informative_match"] = MATCH | {"fresh_discriminator": 0.52}
    for code, told in {"123": "2 seeds: ", "older": "One seed: "}.items():
        rows = {"seed-1": row | {"code": code}, "short": row | {"long": False}}
        text = rendered(tmp_path, q2=Q2, q2_comparisons={"rows": rows})
        assert block(text, "q2.summary").startswith(told)
        in_range = "in 50.0% to 52.0% of cases" in block(text, "q2.summary")
        assert in_range == (code == "123")
        assert ("†: made by other" in block(text, "q2.seeds")) == (code == "older")
        assert "| a seed (`short`) | 3 |" in block(text, "q2.computed")
        assert "seed-1" not in block(text, "q2.computed")


def test_rows_are_shown_where_there_is_no_run_of_the_default(tmp_path, capsys):
    row = Q2 | {"title": "a short one", "long": False, "epochs": 3, "data": "abc"}
    text = rendered(tmp_path, q2_comparisons={"rows": {"short": row}})
    assert "no run of the default" in block(text, "q2.summary")
    assert "| a short one (`short`) | 3 |" in block(text, "q2.ablation")
    assert capsys.readouterr().err == ""


def test_a_run_of_other_code_is_told_apart(tmp_path):
    (tmp_path / "figures" / "course").mkdir(parents=True)
    for code in ("123", "older"):
        runs = {"q2": Q2, "course/q2": Q2 | {"code": code}}
        text = rendered(tmp_path, **runs)
        assert report.OTHER_CODE not in block(text, "q2.match")
        told = report.OTHER_CODE in block(text, "q2.course")
        assert told == (code == "older")


def test_a_block_lives_in_either_report_once(tmp_path, capsys):
    (tmp_path / "extras").mkdir()
    extras = tmp_path / "extras" / "report.md"
    extras.write_text("<!-- begin q2.seeds -->\n<!-- end q2.seeds -->")
    comparisons = {"rows": {"seed-1": Q2 | {"title": "", "long": True, "epochs": 1}}}
    rendered(tmp_path, REPORT, q1=Q1, q2_comparisons=comparisons)
    assert "| measure | seed 7 |" in extras.read_text()
    assert capsys.readouterr().err == ""
    rendered(tmp_path, "prose", q1=Q1)
    assert "0 blocks q1, expected one" in capsys.readouterr().err
    rendered(tmp_path, REPORT * 2, q1=Q1)
    assert "2 blocks q1, expected one" in capsys.readouterr().err


def test_a_report_that_cannot_be_read_or_written_is_told(tmp_path, capsys):
    (tmp_path / "q1_metrics.json").write_text(json.dumps(Q1), encoding="utf-8")
    latin, long = tmp_path / "latin", tmp_path / ("x" * 250)
    latin.write_bytes(b"caf\xe9" + REPORT.encode())
    long.write_text(REPORT)  # there is no room for a temporary name
    for path in (latin, long, tmp_path / "none"):
        assert not report.update(tmp_path, path)
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert str(path) in told
    assert latin.read_bytes() == b"caf\xe9" + REPORT.encode()
    assert long.read_text() == REPORT


def test_committed_report_says_what_the_committed_metrics_say(tmp_path, capsys):
    for name in ("report.md", "extras/report.md"):
        if (HOME / name).exists():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes((HOME / name).read_bytes())
    report.update(HOME / "figures", tmp_path / "report.md")
    assert capsys.readouterr().err == ""
    for path in tmp_path.rglob("*.md"):
        assert path.read_bytes() == (HOME / path.relative_to(tmp_path)).read_bytes()


def test_the_script_refreshes_a_report_also_many_at_once(tmp_path):
    command = [sys.executable, "-OO", report.__file__]
    wrong = [*command, "--figures", "nosuch"]
    done = subprocess.run(wrong, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "nosuch: found no metrics" in done.stderr
    text = rendered(tmp_path, REPORT, q1=Q1)
    (tmp_path / "report.md").write_text(REPORT, encoding="utf-8")
    running = [subprocess.Popen(command, cwd=tmp_path) for _ in range(4)]
    assert [each.wait() for each in running] == [0] * 4
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == text
    assert len(list(tmp_path.iterdir())) == 2


# Numbers in the reports' prose that follow from assignment, data, recipe or measures.
SETTLED = """
0 0..1 0.003 0.05 0.2 0.5 1 1/2 1,000 1.5e-3 10,000 100 128 14 199 1e-3 2 2,000 2.5 20
200 28 2e-4 3 3,000 30 32 4 40 400 5,000 50 59,000 6 64 7 768 784 8 90
"""


@pytest.mark.parametrize("path", ["report.md", "extras/report.md"])
def test_no_number_of_a_run_stands_in_prose(path):
    text = (HOME / path).read_text(encoding="utf-8")
    text = re.sub(r"<!-- begin (\S+) -->.*?<!-- end \1 -->", "", text, flags=re.DOTALL)
    for other in (r"```.*?```", r"`[^`]*`", r"\]\([^)]*\)", r"arXiv:\S+", "5-NN"):
        text = re.sub(other, "", text, flags=re.DOTALL)
    text = re.sub(r"(?<= )(19|20)\d\d(?=[,)])", "", text)  # years of papers
    numbers = {each.rstrip(".,") for each in re.findall(r"\d[\d.,e/-]*", text)}
    assert numbers <= set(SETTLED.split())
