"""The report's blocks, from the metrics that runs leave behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import report

HOME = Path(report.__file__).parent
PROSE = "before\n<!-- begin q1 -->\n{}\n<!-- end q1 -->\nafter \\1 <!-- begin q2 -->\n"
PROVENANCE = {
    "data": {"file": "given.npy", "source": "a file as given"},
    "settings": {"epochs": 3, "batch_size": 42, "learning_rate": 0.002},
    "seed": 7,
    "versions": {"python": "3.12.1", "keras": "3.9.9"},
    "training_seconds": 90.0,
}
Q1 = PROVENANCE | {
    "test_mse": 0.0123456,
    "pca_test_mse": 0.0246912,
    "mean_image_test_mse": 0.1,
    "code_dim": 17,
    "parameters": 948675,
    "digit_test_mse": {"3": 0.01111, "4": 0.02222},
    "mse_inside_digit": None,
    "knn_accuracy": None,
}


@pytest.fixture
def figures(tmp_path):
    folder = tmp_path / "figures"
    folder.mkdir()
    (folder / "q1_metrics.json").write_text(json.dumps(Q1), encoding="utf-8")
    return folder


def refreshed(figures, text):
    path = figures.parent / "report.md"
    path.write_text(text, encoding="utf-8")
    report.update(figures, path)
    assert sorted(figures.parent.iterdir()) == [figures, path]
    return path.read_text(encoding="utf-8")


def test_blocks_are_rewritten_and_prose_is_kept(figures):
    text = refreshed(figures, PROSE.format("old"))
    before, block, after = text.partition("<!-- end q1 -->")
    assert before.startswith("before\n<!-- begin q1 -->\n|")
    assert "old" not in before
    assert block + after == PROSE.format("").partition("\n\n")[2]
    assert refreshed(figures, text) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [("prose alone", 0), (PROSE.format("") * 2, 2), ("<!-- begin q1 -->", 0)],
)
def test_a_block_that_is_not_there_once_is_said_and_no_error(
    figures, capsys, text, count
):
    found = refreshed(figures, text)
    assert f"{count} blocks q1," in capsys.readouterr().out
    if count == 0:
        assert found == text


def test_metrics_that_are_not_there_leave_their_block_alone(figures, capsys):
    text = "<!-- begin q2 -->\nof another day\n<!-- end q2 -->\n" + PROSE.format("")
    assert "of another day" in refreshed(figures, text)


def test_question_1s_block_has_the_runs_numbers(figures):
    text = refreshed(
        figures, PROSE.format("") + "<!-- begin q1.error --><!-- end q1.error -->"
    )
    for number in ("0.01235", "0.02469", "0.10000", "19.08", "948,675", "17"):
        assert f"| {number} |" in text
    assert "0.50 times" in text
    assert "beats" in text
    for words in ("`given.npy`", "3 epochs", "batch 42", "rate 0.002", "seed 7"):
        assert words in text
    assert "1.5 minutes" in text
    assert "keras 3.9.9" in text
    assert "hardest 4, with 0.02222" in text
    (figures / "q1_metrics.json").write_text(json.dumps(Q1 | {"test_mse": 0.05}))
    assert "**not** beat" in refreshed(figures, text)


def committed(name):
    return json.loads((HOME / "figures" / name).read_text(encoding="utf-8"))


def test_committed_report_says_what_the_committed_metrics_say(tmp_path, capsys):
    path = tmp_path / "report.md"
    text = (HOME / "report.md").read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    report.update(HOME / "figures", path)
    assert "should be" not in capsys.readouterr().out
    assert path.read_text(encoding="utf-8") == text
    for name in ("q1_metrics.json", "q2_metrics.json", "q2_control_metrics.json"):
        assert f"| {committed(name)['test_mse']:.5f} |" in text


def test_question_2_without_labels_or_signal_and_with_a_loss_near_zero(figures):
    metrics = committed("q2_metrics.json")
    nothing = dict.fromkeys(key for key in metrics if key.startswith("frechet"))
    nothing |= {"knn_accuracy": None, "signal_match": None, "signal_dimensions": 0}
    content = metrics | nothing | {"loss_encoder": -1e-4, "test_mse": 0.0123456}
    (figures / "q2_metrics.json").write_text(json.dumps(content))
    text = refreshed(figures, "<!-- begin q2 --><!-- end q2 -->")
    assert "| 0.01235 |" in text
    assert "-0.000" not in text
    assert "None" not in text
    assert "no labels" in text


def test_report_starts_without_tensorflow_and_numpy(figures):
    (figures.parent / "report.md").write_text(PROSE.format("old"), encoding="utf-8")
    code = f"""
import runpy, sys
runpy.run_path({report.__file__!r}, run_name="__main__")
print(sorted({{"tensorflow", "keras", "numpy", "matplotlib"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=figures.parent,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n[]\n")
    assert "0.01235" in (figures.parent / "report.md").read_text(encoding="utf-8")


def test_no_report_is_said_and_no_error(tmp_path):
    done = subprocess.run(
        [sys.executable, report.__file__],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "no report.md" in done.stdout
    assert not list(tmp_path.iterdir())
