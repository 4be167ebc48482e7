"""Faults on purpose: kill a host, or fail it, at a named phase.

    with kill_at("save:record", host=1):       # in this process: SIGKILL when host 1 gets there
        ...
    DATARAX_DIST_KILL_AT=save:record@1         # the same for any process, by its environment
    DATARAX_DIST_KILL_AT=save:record@1#2       # at the second time it gets there

`PHASES` lists the names.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from datarax_dist import telemetry

__all__ = ["PHASES", "fail_at", "kill_at"]

PHASES = telemetry.SAVE_PHASES + telemetry.BUCKET_PHASES + telemetry.RESTORE_PHASES


def _at(phase: str, host: int, occurrence: int, act: Callable[[], None]) -> Callable[[], None]:
    if phase not in PHASES:
        raise ValueError(f"There is no phase {phase!r}. Phases: {', '.join(PHASES)}.")
    lock = threading.Lock()
    seen = 0

    def sink(name: str, where: int) -> None:
        nonlocal seen
        if name != phase or where != host:
            return
        with lock:
            seen += 1
            reached = seen == occurrence
        if reached:
            act()

    return telemetry.observe(sink)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def kill_at(phase: str, host: int, *, occurrence: int = 1) -> Iterator[None]:
    """In a `with` block: kills this process with SIGKILL when it is `host` and begins `phase` for
    the `occurrence`-th time.

    Raises:
        ValueError: there is no such phase.
    """
    remove = _at(phase, host, occurrence, _kill)
    try:
        yield
    finally:
        remove()


@contextlib.contextmanager
def fail_at(phase: str, host: int, error: BaseException, *, occurrence: int = 1) -> Iterator[None]:
    """In a `with` block: raises `error` in this process when it is `host` and begins `phase` for
    the `occurrence`-th time.
    """

    def act() -> None:
        raise error

    remove = _at(phase, host, occurrence, act)
    try:
        yield
    finally:
        remove()


def install_from_environment(text: str) -> None:
    """Installs `PHASE@HOST[#OCCURRENCE]` for the life of this process.

    Raises:
        ValueError: it is none, or there is no such phase.
    """
    place, _, occurrence = text.partition("#")
    phase, _, host = place.rpartition("@")
    if not (host.isdecimal() and (occurrence or "1").isdecimal()):
        raise ValueError(
            f"{telemetry.KILL_VARIABLE} must be PHASE@HOST or PHASE@HOST#OCCURRENCE, such as"
            f" save:record@1, not {text!r}."
        )
    _at(phase, int(host), int(occurrence or 1), _kill)
