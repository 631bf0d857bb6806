"""The bench measures both questions, in turns, and tells what it found."""

import json
import sys
import time

import utils

import pytest

from extras import bench


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for name, value in {"SECONDS": 0.1, "SIZE": 64, "IMAGES": 256}.items():
        monkeypatch.setattr(bench, name, value)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    utils.run_script(bench.main)


def test_contestants_take_turns_and_are_timed_for_one_time_each():
    turns = []

    def contestant(name, seconds):
        def repeat(times):
            turns.append(name)
            time.sleep(seconds * times)

        return repeat

    contestants = {"slow": contestant("slow", 0.02), "fast": contestant("fast", 0.005)}
    found = bench.take_turns(contestants, 3)
    assert found["slow"] == pytest.approx(0.02, rel=0.5)
    assert found["fast"] == pytest.approx(0.005, rel=0.5)
    assert turns[-6:] == ["slow", "fast"] * 3


@pytest.mark.parametrize("question", ["q1", "q2"])
def test_a_script_and_its_training_steps_are_measured(question, monkeypatch, capsys):
    whole = {"one_epoch_seconds": 61.0, "peak_memory_mib": None}
    monkeypatch.setattr(bench, "whole_script", lambda name: whole)
    run(monkeypatch, "--json", "--rounds", "1", "--question", question)
    found = json.loads(capsys.readouterr().out)[question]
    assert found["one_epoch_seconds"] == 61.0 and found["peak_memory_mib"] is None
    speed = found["batch_size"] / found["step_seconds"]
    assert found["images_per_second"] == pytest.approx(speed) and speed > 0
    assert found["matmul_gflops"] > 0


def test_the_table_has_a_column_a_question(monkeypatch, capsys):
    measured = {"q1": {"images_per_second": 5000.0}, "q2": {"images_per_second": 70.0}}
    monkeypatch.setattr(bench, "measure_apart", lambda name, _: measured[name])
    run(monkeypatch)
    heads, speeds = capsys.readouterr().out.splitlines()
    assert heads.split() == ["q1", "q2"]
    assert speeds.split() == ["images/s", "5,000", "70"]


def test_a_missing_torch_is_told_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit) as exit_info:
        run(monkeypatch, "--against", "torch")
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--against torch" in line
