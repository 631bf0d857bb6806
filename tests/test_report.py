"""The report's blocks, from the metrics that runs leave behind."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

import report

HOME = Path(report.__file__).parent
OTHER = "<!-- begin q2 -->\nof another day\n<!-- end q2 -->\n"
PROSE = "before\n<!-- begin q1 -->\n{}\n<!-- end q1 -->\nafter \\1\n" + OTHER
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
    "knn_accuracy": None,
}
EIGENVALUES = "covariance_eigenvalue_min", "covariance_eigenvalue_max"
MEASURES = "mmd", "ks_max", *EIGENVALUES
MATCH = dict.fromkeys(MEASURES, 0.5) | {"fresh_discriminator": 0.5}
MATCH["draws"] = dict.fromkeys(MEASURES, [0.4, 0.6])
# As of data without labels.
Q2 = PROVENANCE | {
    "test_images": 10_000,
    "test_mse": 0.0123456,
    "pca_test_mse": {"10": 0.03},
    "test_reconstruction_loss": 2.5,
    "loss_discriminator": 1.3,
    "loss_encoder": -1e-4,
    "code_dim": 100,
    "signal_dimensions": 10,
    "signal_noise": [0.1, 0.2],
    "prior_match": MATCH,
    "signal_match": MATCH,
    "start_match": {"all": MATCH, "signal": MATCH},
    "sample_quality": {"samples": None},
    "knn_accuracy": None,
    "trustworthiness": {"code": 0.9},
    "tsne_trustworthiness": 0.9,
}


def refreshed(folder, text, name="q1_metrics.json", metrics=Q1):
    """Return the report after a run that left these metrics."""
    path, figures = folder / "report.md", folder / "figures"
    figures.mkdir(exist_ok=True)
    (figures / name).write_text(json.dumps(metrics), encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    report.update(figures, path)
    assert sorted(folder.iterdir()) == [figures, path]
    return path.read_text(encoding="utf-8")


def test_blocks_are_rewritten_and_all_else_is_kept(tmp_path):
    text = refreshed(tmp_path, PROSE.format("old"))
    before, block, after = text.partition("<!-- end q1 -->")
    assert before.startswith("before\n<!-- begin q1 -->\n|")
    assert "old" not in before
    assert block + after == PROSE.format("").partition("\n\n")[2]
    assert refreshed(tmp_path, text) == text


@pytest.mark.parametrize(("text", "count"), [("prose", 0), (PROSE * 2, 2)])
def test_a_block_that_is_not_there_once_is_said(tmp_path, capsys, text, count):
    found = refreshed(tmp_path, text)
    assert f"{count} blocks q1," in capsys.readouterr().out
    assert count or found == text


def test_question_1s_block_has_the_runs_numbers(tmp_path):
    text = PROSE.format("") + "<!-- begin q1.error --><!-- end q1.error -->"
    found = refreshed(tmp_path, text)
    for number in ("0.01235", "0.02469", "0.10000", "19.08", "948,675", "17"):
        assert f"| {number} |" in found
    for words in ("`given.npy`", "3 epochs", "batch 42", "rate 0.002", "seed 7"):
        assert words in found
    for words in ("0.50 times", "it beats", "1.5 minutes", "keras 3.9.9"):
        assert words in found
    assert "hardest 4, with 0.02222" in found
    worse = refreshed(tmp_path, text, metrics=Q1 | {"test_mse": 0.05})
    assert "does **not** beat" in worse


@pytest.mark.parametrize(
    ("signal_match", "told"),
    [
        (MATCH, "**Yes.**"),
        (MATCH | {"ks_max": 0.7}, "**Not exactly.**"),
        (MATCH | {"fresh_discriminator": 0.9}, "**No.**"),
        (None, "the codes hold nothing"),
    ],
)
def test_question_2s_block_says_whether_codes_follow_the_prior(
    tmp_path, signal_match, told
):
    block = "<!-- begin q2.control --><!-- end q2.control -->"
    metrics = Q2 | {"signal_match": signal_match}
    text = refreshed(tmp_path, block, "q2_control_metrics.json", metrics)
    assert told in text
    assert "| 0.01235 |" in text
    assert "takes labels" in text
    assert "-0.000" not in text
    assert "None" not in text


def test_committed_report_says_what_the_committed_metrics_say(tmp_path, capsys):
    path = tmp_path / "report.md"
    text = (HOME / "report.md").read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    report.update(HOME / "figures", path)
    assert capsys.readouterr().out == ""
    assert path.read_text(encoding="utf-8") == text


def test_psnr_of_a_known_error():
    assert report.psnr_db(0.01) == pytest.approx(20.0)
    assert 1000 < report.psnr_db(0.0) < math.inf


def test_metrics_of_another_layout_are_told_and_change_nothing(tmp_path, capsys):
    text = PROSE.format("old")
    assert refreshed(tmp_path, text, metrics={"test_mse": 0.5}) == text
    assert "q1_metrics.json has another layout" in capsys.readouterr().out


def test_the_script_refreshes_a_report_if_there_is_one(tmp_path):
    command = [sys.executable, report.__file__, "--report", "report.md"]
    assert b"no report.md" in subprocess.check_output(command, cwd=tmp_path)
    assert not list(tmp_path.iterdir())
    text = refreshed(tmp_path, PROSE)
    (tmp_path / "report.md").write_text(PROSE, encoding="utf-8")
    subprocess.run(command, cwd=tmp_path, check=True)
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == text
