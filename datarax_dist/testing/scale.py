"""Thousands of simulated hosts in one process, of which each message takes a while: what agreement
costs when a job is larger than any machine at hand.

    report = simulate(1000, save_step, message_seconds=0.001)
    report.primary.messages, report.seconds

Every host runs the real protocol. It has a clock of its own, which moves by `message_seconds` for
each message that it sends to the board or the store (and waits for the answer of), and by the
processor time that its own code takes, as measured. So `report.seconds` is the length of the
critical path: what it would take if every host had a processor core to itself, and nothing but the
messages took time. A listing is a message for each thousand files, as in a bucket.
"""

from __future__ import annotations

import functools
import gc
import heapq
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from datarax_dist.beacons import Silence
from datarax_dist.hosts import HostGroup
from datarax_dist.storage import Entry
from datarax_dist.testing.simulated import MemoryStore
from datarax_dist.testing.turns import coroutine, current

__all__ = ["Cost", "ScaleReport", "ScaledHost", "simulate"]

_LISTED_AT_ONCE = 1000
_ENTRY_BYTES = 100  # of a listing
_BEGIN = 1_700_000_000.0


@dataclass(slots=True)
class Cost:
    """What one host has spent.

    Attributes:
        messages: requests to the board and to the store, each of them waited for.
        bytes: in both directions.
        processor_seconds: of its own code.
    """

    messages: int = 0
    bytes: int = 0
    processor_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ScaleReport:
    """What an operation of many hosts has cost.

    Attributes:
        seconds: from its begin until the last host had ended it.
        primary_seconds: until the primary had.
        primary: what host 0 has spent.
        most: what that host has spent, of the others, that sent the most messages.
        results: what each host has returned.
    """

    seconds: float
    primary_seconds: float
    primary: Cost
    most: Cost
    results: list[Any]


@dataclass(slots=True, eq=False)
class ScaledHost:
    """A simulated host: what its code needs to run the protocol. It is its own clock."""

    index: int
    _world: _World
    store: _Store = field(init=False)
    group: HostGroup = field(init=False)
    cost: Cost = field(default_factory=Cost)
    time: float = 0.0
    coroutine: Any = None
    woken: int = 0  # how often: an older entry of the queue says nothing

    def monotonic(self) -> float:
        self._world.charge()
        return self.time

    def now(self) -> float:
        return _BEGIN + self.monotonic()

    def sleep(self, seconds: float) -> None:
        self._world.charge()
        self._world.pause(self, self.time + seconds)


class _World:
    """Runs hosts in the order of their clocks."""

    def __init__(self, message_seconds: float) -> None:
        self.message_seconds = message_seconds
        self._queue: list[tuple[float, int, int, ScaledHost]] = []
        self._order = itertools.count()
        self._running: ScaledHost | None = None
        self._resumed = 0.0
        self.rows: dict[str, dict[str, str]] = {}
        self.waiting: dict[str, list[ScaledHost]] = {}
        self.scheduler: Any = None

    def charge(self) -> None:
        """Adds the processor time that the host that runs has taken since."""
        now = time.process_time()
        if (host := self._running) is not None:
            host.time += now - self._resumed
            host.cost.processor_seconds += now - self._resumed
        self._resumed = now

    def schedule(self, host: ScaledHost, at: float) -> None:
        host.woken += 1
        heapq.heappush(self._queue, (at, next(self._order), host.woken, host))

    def pause(self, host: ScaledHost, at: float | None) -> None:
        """Lets others run, until it is `at` for this host, or it is scheduled."""
        if at is not None:
            self.schedule(host, at)
        self.scheduler.switch()

    def message(self, size: int, count: int = 1) -> ScaledHost:
        """The host that runs sends something and waits for the answer."""
        self.charge()
        host = self._running
        assert host is not None
        host.cost.messages += count
        host.cost.bytes += size
        self.pause(host, host.time + count * self.message_seconds)
        return host

    def run(self, hosts: list[ScaledHost]) -> None:
        self.scheduler = current()
        for host in hosts:
            self.schedule(host, 0.0)
        while self._queue:
            at, _, woken, host = heapq.heappop(self._queue)
            if woken != host.woken:
                continue
            host.time = max(host.time, at)
            self._running, self._resumed = host, time.process_time()
            host.coroutine.switch()
            self.charge()
            self._running = None


class _Board:
    """The board as one host sees it; see `boards.Board`."""

    def __init__(self, world: _World, index: int, count: int) -> None:
        self.index, self.count = index, count
        self._world = world

    def set(self, key: str, value: str) -> bool:
        host = self._world.message(len(key) + len(value))
        rows = self._world.rows.setdefault(key.rpartition("/")[0] + "/", {})
        if key in rows:
            return False
        rows[key] = value
        for other in self._world.waiting.pop(key, ()):
            self._world.schedule(other, host.time + self._world.message_seconds)
        return True

    def wait(self, key: str, seconds: float) -> str | None:
        host = self._world.message(len(key))
        if (value := self._get(key)) is None:
            waiting = self._world.waiting.setdefault(key, [])
            waiting.append(host)
            self._world.pause(host, host.time + seconds)
            if (value := self._get(key)) is None:
                waiting.remove(host)
                return None
        host.cost.bytes += len(value)
        return value

    def _get(self, key: str) -> str | None:
        return self._world.rows.get(key.rpartition("/")[0] + "/", {}).get(key)

    def read(self, prefix: str) -> dict[str, str]:
        host = self._world.message(len(prefix))
        rows = dict(self._world.rows.get(prefix, {}))
        host.cost.bytes += sum(len(key) + len(value) for key, value in rows.items())
        return rows

    def clear(self, prefix: str) -> None:
        self._world.message(len(prefix))
        for start in [start for start in self._world.rows if start.startswith(prefix)]:
            del self._world.rows[start]

    def silent(self) -> Mapping[int, Silence]:
        return {}


class _Store:
    """The store as one host sees it: `MemoryStore`, each request of which is a message."""

    one_at_a_time = True

    def __init__(self, world: _World, files: MemoryStore) -> None:
        self._world, self._files = world, files
        self.root, self.digest_kind = files.root, files.digest_kind

    def get(self, key: str) -> bytes:
        host = self._world.message(len(key))
        data = self._files.get(key)
        host.cost.bytes += len(data)
        return data

    def put(self, key: str, data: bytes) -> None:
        self._world.message(len(key) + len(data))
        self._files.put(key, data)

    def write(self, key: str, data: bytes) -> None:
        self._world.message(len(key) + len(data))
        self._files.write(key, data)

    def create(self, key: str, data: bytes) -> bool:
        self._world.message(len(key) + len(data))
        return self._files.create(key, data)

    def children(self, prefix: str) -> list[str]:
        names = self._free(self._files.children, prefix)
        self._listed(len(names))
        return list(names)

    def list(self, prefix: str) -> list[Entry]:
        found = self._free(self._files.list, prefix)
        self._listed(len(found))
        return list(found)

    def _free(self, function: Callable[[str], Any], prefix: str) -> Any:
        """Calls what the storage itself does: it is no work of the host's."""
        self._world.charge()
        found = function(prefix)
        self._world._resumed = time.process_time()
        return found

    def _listed(self, count: int) -> None:
        self._world.message(count * _ENTRY_BYTES, 1 + max(0, count - 1) // _LISTED_AT_ONCE)

    def digest(
        self, key: str, expected_size: int | None = None, *, like: str = ""
    ) -> tuple[int, str]:
        self._world.message(len(key))
        return self._files.digest(key, expected_size, like=like)

    def delete(self, prefix: str, *, last: str | None = None) -> None:
        self._world.message(len(prefix))
        self._files.delete(prefix, last=last)

    def sync(self, prefix: str, keys: Iterable[str]) -> None:
        self._world.message(len(prefix))
        self._files.sync(prefix, keys)

    def rename(self, source: str, destination: str) -> None:
        self._world.message(len(source) + len(destination))
        self._free(functools.partial(self._files.rename, source), destination)


def simulate(
    count: int,
    target: Callable[[ScaledHost], Any],
    *,
    message_seconds: float = 0.001,
    files: MemoryStore | None = None,
) -> ScaleReport:
    """Runs `target(host)` on each of `count` hosts, which share a store and a board.

    Args:
        target: the operation; it uses `host.group`, `host.store`, and `host` as its clock.
        message_seconds: how long a request and its answer take.
        files: what the store holds; an empty one by default.

    Raises:
        Exception: what the operation has raised on the first host that failed.

    >>> report = simulate(3, lambda host: host.group.exchange("v", host.index, timeout_seconds=5))
    >>> report.results
    [[0, 1, 2], [0, 1, 2], [0, 1, 2]]
    """
    world = _World(message_seconds)
    files = MemoryStore() if files is None else files
    results: list[Any] = [None] * count

    def one(host: ScaledHost) -> None:
        try:
            results[host.index] = target(host)
        except Exception as error:
            results[host.index] = error

    hosts = [ScaledHost(index, world) for index in range(count)]
    here = current()
    for host in hosts:
        host.store = _Store(world, files)
        host.group = HostGroup(_Board(world, host.index, count), clock=host, names=None)
        host.coroutine = coroutine(functools.partial(one, host), here)
    with _no_collector():
        world.run(hosts)
    for result in results:
        if isinstance(result, Exception):
            raise result
    others = hosts[1:] or hosts
    return ScaleReport(
        seconds=max(host.time for host in hosts),
        primary_seconds=hosts[0].time,
        primary=hosts[0].cost,
        most=max((host.cost for host in others), key=lambda cost: cost.messages),
        results=results,
    )


@contextmanager
def _no_collector() -> Iterator[None]:
    """Else whichever host runs at that moment would be charged for the objects of all."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
