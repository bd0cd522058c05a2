"""Side-by-side timing and its files."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from s3a.support import timing
from s3a.support.timing import Sample, make_row, read_results, take_turns, write_result


def test_candidates_take_turns_after_a_warm_up():
    calls = []
    samples = take_turns({"first": lambda: calls.append(1), "second": lambda: calls.append(2)}, turns=3, warm_up=1)
    assert calls == [1, 2] * 4
    assert samples["first"].turns == 3


def test_a_slow_turn_leaves_the_median_as_it_is(monkeypatch):
    times = iter([2.0, 90.0, 1.0])
    monkeypatch.setattr(timing, "time_call", lambda call: next(times))
    assert take_turns({"one": int}, turns=3)["one"] == Sample(median=2.0, fastest=1.0, slowest=90.0, turns=3)


def test_times_are_milliseconds():
    sample = take_turns({"nap": lambda: time.sleep(0.02)}, turns=3)["nap"]
    assert 20 <= sample.fastest <= sample.median <= sample.slowest
    assert sample.fastest < 200
    assert make_row(sample, side=7) == {
        "side": 7,
        "median_ms": sample.median,
        "fastest_ms": sample.fastest,
        "slowest_ms": sample.slowest,
        "turns": 3,
    }


def written(path: Path) -> Path:
    write_result(path, "operator", torch.device("cpu"), {"turns": 3}, [{"median_ms": 1.0}])
    return path


def test_a_result_names_its_machine_and_compares_with_its_like(tmp_path):
    results = read_results([written(tmp_path / "a.json"), written(tmp_path / "b.json")])
    assert results[0]["rows"] == [{"median_ms": 1.0}]
    assert results[0]["machine"]["packages"]["torch"] == torch.__version__.partition("+")[0]


def test_the_command_of_a_result_can_be_pasted(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tools/benchmark.py", "--output", "my results.json"])
    (result,) = read_results([written(tmp_path / "a.json")])
    assert result["command"] == "python tools/benchmark.py --output 'my results.json'"


def test_results_of_different_machines_are_not_compared(tmp_path):
    first, second = written(tmp_path / "a.json"), written(tmp_path / "b.json")
    other = json.loads(second.read_text())
    other["machine"]["processor"] = "another"
    second.write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"differ in processor: only figures of one machine"):
        read_results([first, second])
