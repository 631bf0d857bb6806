"""The bench measures both questions, in turns, and tells what it found."""

import json
import sys
import time

import utils

import pytest

import q2_aae as q2
from extras import bench


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    utils.run_script(bench.main)


def test_contestants_take_turns_and_are_timed_for_one_call_each():
    turns = []

    def contestant(name, seconds):
        def call():
            turns.append(name)
            time.sleep(seconds)

        return call

    contestants = {"slow": contestant("slow", 0.05), "fast": contestant("fast", 0.02)}
    found = bench.take_turns(contestants, 3)
    assert found["slow"] == pytest.approx(0.05, rel=0.3)
    assert found["fast"] == pytest.approx(0.02, rel=0.3)
    changes = [name for i, name in enumerate(turns) if turns[i - 1 : i] != [name]]
    assert changes == ["slow", "fast"] * 4


@pytest.mark.parametrize("question", ["q1", "q2"])
def test_a_script_and_its_training_steps_are_measured(question, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SIZE", 64)
    monkeypatch.setattr(bench, "IMAGES", 256)
    monkeypatch.setattr(q2, "DEFAULT", q2.DEFAULT._replace(hidden=(16, 16)))
    monkeypatch.setattr(bench, "whole_script", lambda _: {"one_epoch_seconds": 61.0})
    run(monkeypatch, "--json", "--rounds", "1", "--question", question)
    found = json.loads(capsys.readouterr().out)[question]
    assert found["one_epoch_seconds"] == 61.0
    size = bench.SCRIPTS[question].BATCH_SIZE
    assert found["images_per_second"] * found["seconds_per_step"] == pytest.approx(size)
    assert found["seconds_per_step"] > 0 and found["matrix_products_gflops"] > 0


def test_the_table_has_a_line_a_measure(monkeypatch, capsys):
    measured = {"seconds_per_step": 0.0256, "images_per_second": 5000.0}
    monkeypatch.setattr(bench, "measure", lambda *_: measured)
    run(monkeypatch, "--question", "q1")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["q1", "seconds", "per", "step", "0.0256"]
    assert lines[1] == ["q1", "images", "per", "second", "5,000"]


def test_a_missing_torch_is_told_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit) as exit_info:
        run(monkeypatch, "--against", "torch")
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--against torch" in line
