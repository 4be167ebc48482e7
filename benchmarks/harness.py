"""What the benchmarks share: the machine, rounds in turn, medians with their spread, JSON lines."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

LIBRARIES = ("jax", "orbax-checkpoint", "tensorstore", "numpy", "torch", "safetensors")


def machine(place: str) -> dict[str, Any]:
    """Describes what a result was measured on; `place` is a directory on the medium."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "file_system": _file_system(place),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "versions": dict(_versions()),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _file_system(place: str) -> str:
    """The kind of file system that a directory is on: that of the longest mount point above it."""
    best, kind, real = "", "unknown", os.path.realpath(place)
    for line in Path("/proc/self/mounts").read_text().splitlines():
        point, found = line.split()[1:3]
        inside = os.path.commonpath([point, real]) == point
        if inside and len(point) >= len(best):
            best, kind = point, found
    return kind


def _versions() -> Iterator[tuple[str, str]]:
    for name in LIBRARIES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def seconds(act: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def in_turn(
    contenders: Mapping[str, Callable[[int], float]], rounds: int
) -> dict[str, list[float]]:
    """Measures each contender once in every round, A B C, C B A, A B C and so on, so that what the
    machine does meanwhile meets all of them; the first round warms up and does not count.

    Args:
        contenders: name -> function of the round, which returns what it has measured.
    """
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        names = list(contenders)
        for name in names if number % 2 == 0 else reversed(names):
            value = contenders[name](number)
            if number:
                found[name].append(value)
    return found


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles, three digits each."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": significant(middle),
        "quartiles": [significant(low), significant(high)],
        "rounds": len(values),
    }


def significant(value: float) -> float:
    return float(f"{value:.3g}")


def ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """The ratio of the medians."""
    return significant(statistics.median(values) / statistics.median(base))


class Results:
    """JSON lines, on the screen and, where one is given, in a file."""

    def __init__(self, path: str | None = None) -> None:
        self._path = path
        if path is not None:
            Path(path).write_text("")

    def add(self, row: Mapping[str, Any]) -> None:
        text = json.dumps(row)
        print(text, flush=True)
        if self._path is not None:
            with open(self._path, "a") as file:
                file.write(text + "\n")
