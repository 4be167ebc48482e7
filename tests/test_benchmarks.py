"""The benchmarks run, compare what they say they compare, and are drawn. Nothing here is timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import plots
from benchmarks.coordination import simulated
from benchmarks.harness import in_turn, ratio, summary

ROOT = Path(__file__).parent.parent


def test_a_small_round_of_each_contender_is_measured_and_drawn(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.speed", "--mib=1", "--leaves=3", "--rounds=2"]
    command += [f"--place={tmp_path}", "--peers=orbax_v0", "--mesh=other"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["benchmark"] for row in rows] == ["save", "restore"]
    for row in rows:
        assert set(row["seconds"]) == {"raw", "ours", "orbax_v0"}
        assert row["seconds"]["ours"]["rounds"] == 2
        assert set(row["ours_over"]) == {"raw", "orbax_v0"}
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"
    rows += simulated(3, 0.001, rounds=1)
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = plots.draw(results, tmp_path)
    assert [path.name for path in drawn] == ["speed.png", "coordination.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_a_benchmark_that_there_is_not_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--only=speed,foo", f"--out={tmp_path}/out"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert "no benchmark is named 'foo'; there are " in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_contenders_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []

    def one(name: str, value: float) -> float:
        order.append(name)
        return value

    found = in_turn(
        {"a": lambda number: one("a", number), "b": lambda number: one("b", 10 * number)}, 3
    )
    assert "".join(order) == "abbaabba"
    assert found == {"a": [1, 2, 3], "b": [10, 20, 30]}
    assert ratio(found["b"], found["a"]) == 10
    assert summary(found["a"]) == {"median": 2, "quartiles": [1.5, 2.5], "rounds": 3}


def test_the_runner_knows_only_benchmarks_that_are_there() -> None:
    from benchmarks.__main__ import _grid

    for full in (False, True):
        commands = list(_grid("/tmp", "/dev/shm", ["orbax_v0"], full=full))
        assert {name for name, *_ in commands} >= {"speed", "memory", "blocking", "disturbance"}
        for name, *_ in commands:
            assert (ROOT / "benchmarks" / f"{name}.py").is_file()


@pytest.mark.parametrize("kind", ["noise", "bf16", "zeros", "int8", "optimizer", "adapters"])
def test_a_state_has_the_size_and_the_arrays_that_were_asked_for(kind: str) -> None:
    from benchmarks import states

    state = states.make(kind, 2, 6, lambda array: array)
    assert len(state) == 6
    assert 0.8 * (2 << 20) < sum(value.nbytes for value in state.values()) <= 2 << 20
