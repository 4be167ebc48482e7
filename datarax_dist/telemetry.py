"""Named phases: each is timed, logged, and a place where a fault can be injected.

A phase is named `operation:phase`, `save:prepare` say. `observe` adds a sink that is called as each
phase begins; the fault injection of `datarax_dist.testing` is such a sink. A process that has
`DATARAX_DIST_KILL_AT=save:record@1` in its environment kills itself there (see
`datarax_dist.testing.faults`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import time
from collections.abc import Callable, Iterator

__all__ = ["BUCKET_PHASES", "RESTORE_PHASES", "SAVE_PHASES", "Phases", "observe"]

logger = logging.getLogger("datarax_dist")

KILL_VARIABLE = "DATARAX_DIST_KILL_AT"

SAVE_PHASES = (
    "save:capture",  # positions are encoded, the state is planned
    "save:prepare",  # about to agree with the other hosts
    "save:stage",  # primary: agreed, about to make the staging directory
    "save:start",  # agreed and staged, about to hand the arrays to Orbax
    "save:started",  # arrays are on the host, training goes on
    "save:positions",  # about to write the data positions
    "save:arrays",  # of several hosts: this one's arrays are written; primary: about to merge
    "save:hash",  # about to hash and fsync this host's files
    "save:record",  # about to write the host record
    "save:written",  # the host record is durable
    "save:verify",  # primary: all records are in, about to compare them with the listing
    "save:commit",  # primary: about to create COMMIT.json
    "save:publish",  # primary: about to move the staging directory to its final name
    "save:committed",  # primary: the step is committed, the others do not know yet
    "save:retire",  # primary: a marker was removed by retention, its files are still there
)
BUCKET_PHASES = (
    "save:claim",  # in a bucket: save() has returned, the primary is about to claim the step
)
RESTORE_PHASES = (
    "restore:list",
    "restore:verify",
    "restore:load",
    "restore:gather",  # with Options.single_replica_restore: devices are about to pass arrays on
    "restore:positions",
)

Sink = Callable[[str, int], None]
_sinks: list[Sink] = []


def observe(sink: Sink) -> Callable[[], None]:
    """Calls `sink(phase, host)` as each phase begins; returns what removes the sink."""
    _sinks.append(sink)
    return lambda: _sinks.remove(sink)


@functools.cache
def _install_asked_faults() -> None:
    """Once, at the first phase: upwards in the layers, and only where somebody asks for a fault."""
    if asked := os.environ.get(KILL_VARIABLE):
        importlib.import_module("datarax_dist.testing.faults").install_from_environment(asked)


class Phases:
    """The seconds that one operation spent in each of its phases, on one host."""

    def __init__(self, operation: str, host: int) -> None:
        self.operation = operation
        self.host = host
        self.seconds: dict[str, float] = {}
        self.current = operation

    def reach(self, phase: str) -> None:
        """Says that `phase` begins; a point in time, not a span."""
        self.current = name = f"{self.operation}:{phase}"
        _install_asked_faults()
        for sink in tuple(_sinks):
            sink(name, self.host)

    @contextlib.contextmanager
    def span(self, phase: str) -> Iterator[None]:
        """Times a phase; its seconds add up when it runs more than once."""
        self.reach(phase)
        begin = time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - begin
