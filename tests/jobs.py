"""Jobs of one host on a store in memory, step by step: the code of the protocol is the real one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

from datarax_dist import config
from datarax_dist.boards import LocalBoard
from datarax_dist.clock import Clock, SystemClock
from datarax_dist.errors import CheckpointError, CorruptStepError
from datarax_dist.hosts import HostGroup
from datarax_dist.inspection import Candidate, inspect_run, read_records, verify_files
from datarax_dist.lease import Lease
from datarax_dist.request import SaveRequest
from datarax_dist.restore import Restorer
from datarax_dist.save import Saver
from datarax_dist.telemetry import Phases
from datarax_dist.testing import MemoryArrays
from datarax_dist.testing.simulated import stepped

OPTIONS = config.Options(exchange_timeout_seconds=20, save_timeout_seconds=600)


class Killed(BaseException):
    """The job's process is gone."""


def requests(bucket: Any, before: Callable[[int], None] = lambda number: None) -> Any:
    """Returns a store as one job sees it. `before(number)` is called before each request; once it
    has raised, there are no more.
    """
    numbers, dead = itertools.count(), []

    def step(what: str, changes: bool) -> None:
        if dead:
            raise Killed
        try:
            before(next(numbers))
        except Killed:
            dead.append(True)
            raise

    return stepped(bucket, step)


class Job:
    """One process of one host. What it saves is marked with its name."""

    def __init__(
        self, name: str, store: Any, lease: Lease | None = None, clock: Clock | None = None
    ) -> None:
        self.name, self.store, self.group = name, store, HostGroup(LocalBoard())
        self.lease, self.clock = lease, clock or SystemClock()

    def save(self, step: int, *, replace: bool = False, keep: Any = None) -> str:
        saver = Saver(self.store, self.group, self.clock, OPTIONS, keep, self.lease)
        name = self.name.encode()
        request = SaveRequest(
            step=step,
            writer=MemoryArrays(self.store, 0, {"a": name, "b": 2 * name}),
            positions={"data/d/shard_00000-of-00001.json": json.dumps(self.name).encode()},
            shared={"TREE.json": json.dumps(self.name).encode()},
            last={"commit_success.txt": b"x"},
            items=("state",),
        )
        started = saver.begin(step, lambda: request, Phases("save", 0), replace=replace)
        try:
            started.finish()
        except CheckpointError:
            started.clean_up()
            raise
        return "saved"

    def restore(self) -> tuple[int, set[str]] | None:
        """Returns the step, and whose the parts of it are."""

        def load(candidate: Candidate, _: Any) -> Callable[[], tuple[int, set[str]]]:
            try:
                parts = {
                    self.store.get(f"{candidate.name}/state/ocdbt.process_0/a").decode(),
                    json.loads(self.store.get(f"{candidate.name}/TREE.json")),
                }
            except KeyError as error:
                raise CorruptStepError("missing", step=candidate.step, files=[str(error)]) from None
            return lambda: (candidate.step, parts)

        found = Restorer(self.store, self.group, OPTIONS).restore(None, load, Phases("restore", 0))
        assert found is not None, "the run is there, and a restore finds nothing"
        assert found[1].damaged == (), "a restore takes a step that is being changed for damaged"
        return found[0]


def attempt(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except CheckpointError as error:
        return error
    except Killed:
        return Killed


def whose(bucket: Any) -> dict[int, str]:
    """Returns whose version each committed step is, after looking at every byte."""
    found: dict[int, str] = {}
    for candidate in inspect_run(bucket).candidates:
        if candidate.state == "committed":
            marker = candidate.marker
            assert marker is not None
            assert candidate.step not in found, "a step is there twice"
            files = read_records(bucket, candidate.name, marker.records, marker.run, candidate.step)
            assert not verify_files(bucket, candidate.name, files, "full"), "a step is torn"
            content = bucket.get(f"{candidate.name}/state/ocdbt.process_0/a")
            found[candidate.step] = content.decode()
    return found
