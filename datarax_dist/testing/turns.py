"""Simulated hosts of which one moves at a time, from one operation to the next.

    scheduler = Scheduler(random.Random(7).randrange)
    job = Job(host, 3, crashes={1: 12})       # host 1 dies before its change 12
    other = Job(another, 1)
    ran, also = scheduler.run([job, other], turns=[(0, 40), (1, 7), (0, 3)])

Whose turn is next is chosen at each operation and each wait; so a run can be had again, whatever
the machine does. Of several jobs only one moves: the hosts of the others stand still, as if they
were stopped, between two operations.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datarax_dist.beacons import Silence

try:
    import greenlet
except ImportError:
    greenlet = None  # type: ignore[assignment,unused-ignore]

__all__ = ["Crash", "Job", "Ran", "Scheduler", "SteppedBoard", "StuckError", "coroutine", "current"]

_BEGIN = 1_700_000_000.0
_LONGEST_SECONDS = 3600.0  # of one run; every wait in it ends long before


class Crash(BaseException):
    """The host's process is gone."""


class StuckError(BaseException):
    """A host waits, again and again, for longer than any deadline."""


class _Thread:
    """Something that runs when it is switched to, and until it switches to another: what greenlet
    gives, more slowly.
    """

    def __init__(self, target: Callable[[], None] | None = None, parent: Any = None) -> None:
        self._turn = threading.Lock()  # held while it may not run
        self._turn.acquire()
        self._parent = parent
        self._target = target

    def switch(self) -> None:
        """Runs this one. Returns when somebody switches back to who called."""
        caller = _running.thread
        if self._target is not None:
            target, self._target = self._target, None
            threading.Thread(target=self._run, args=(target,), daemon=True).start()
        else:
            self._turn.release()
        caller._turn.acquire()

    def _run(self, target: Callable[[], None]) -> None:
        _running.thread = self
        target()
        self._parent._turn.release()


class _Running(threading.local):
    def __init__(self) -> None:
        self.thread = _Thread()


_running = _Running()


def _thread_here() -> Any:
    return _running.thread


# With greenlet, of the test extra, the same worlds take half the time.
coroutine: Any = _Thread if greenlet is None else greenlet.greenlet
current: Callable[[], Any] = _thread_here if greenlet is None else greenlet.getcurrent


@dataclass(frozen=True, slots=True)
class Job:
    """Hosts that belong together.

    Attributes:
        target: called with the index of each host, on it.
        hosts: how many.
        name: what it is called where it is told of.
        crashes: host -> before which of its changes it dies.
        lost: host -> the changes of which it does not hear that they were done.
        late: host -> the changes that were asked for once more than it knows, and after how many
            operations of any host that request arrives.
    """

    target: Callable[[int], Any]
    hosts: int = 1
    crashes: Mapping[int, int] = field(default_factory=dict)
    lost: Mapping[int, Container[int]] = field(default_factory=dict)
    late: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    stands: Mapping[int, tuple[int, float]] = field(default_factory=dict)
    name: str = "the job"


@dataclass(slots=True)
class Ran:
    """How a job went.

    Attributes:
        results: what each host has returned or raised; `Crash` where it died.
        changes: how many changes each has made.
        operations: how many operations, changes or not.
        moves: the operations of its hosts, in order, in words; and whether they change anything.
        stood: whether it stood still, once it had begun, while another job moved.
    """

    results: list[Any]
    changes: list[int]
    operations: list[int]
    moves: list[tuple[str, bool]] = field(default_factory=list)
    stood: bool = False


@dataclass(slots=True, eq=False)
class _Actor:
    """A host: it runs only when it has the turn."""

    job: int
    index: int
    crash_at: int | None
    lost: Container[int]
    late: dict[int, int]
    stands: tuple[int, float] | None
    changes: int = 0
    moves: int = 0
    is_dead: bool = False
    is_silent: bool = False
    until: Callable[[], bool] | None = None
    deadline: float = 0.0
    coroutine: Any = None


class Scheduler:
    """Hosts of which one runs at a time. Also their clock, which moves when all of a job wait."""

    def __init__(self, choose: Callable[[int], int]) -> None:
        self._choose = choose
        self._time = _BEGIN
        self._actors: list[_Actor] = []
        self._live: list[list[_Actor]] = []  # of each job
        self._actor: _Actor | None = None  # who has the turn
        self._turns: Iterator[tuple[int, float]] = iter(())
        self._job, self._left = 0, 0.0  # whose turn it is, and for how many operations
        self._end = 0.0
        self._jobs: Sequence[Job] = ()
        self._counts: Callable[[str], bool] = lambda what: True
        self._ran: list[Ran] = []
        self._mover: int | None = None
        self.trace: list[tuple[float, str]] = []
        self.operations = 0
        self.crashes = 0

    # A clock

    def monotonic(self) -> float:
        return self._time

    def now(self) -> float:
        return self._time

    def sleep(self, seconds: float) -> None:
        self.wait(lambda: False, seconds)

    def pass_time(self, seconds: float) -> None:
        """Lets time go by while nothing runs."""
        self._time += seconds

    def silent(self) -> dict[int, Silence]:
        """Returns the hosts of the job that are dead, or stand still: sooner than any real beacon
        tells.
        """
        job = self.job
        return {a.index: Silence(10.0) for a in self._actors if a.job == job and a.is_silent}

    # What hosts call

    @property
    def job(self) -> int | None:
        """Whose turn it is, by its place among those that run; None where nothing runs."""
        return None if self._actor is None else self._actor.job

    def step(self, what: str, changes: bool = True) -> None:
        """Another host may move, or this one may die, before it does `what`."""
        actor = self._actor
        if actor is None:
            return  # who looks at the world from outside
        if actor.is_dead:
            raise Crash
        self.operations += 1
        if actor.stands is not None and actor.stands[0] == actor.moves:
            self.tell(f"stands still for {actor.stands[1]:.0f} s before this: {what}")
            actor.is_silent = True
            self.wait(lambda: False, actor.stands[1])
            actor.is_silent = False
        actor.moves += 1
        if changes:
            if actor.crash_at == actor.changes:
                actor.is_dead = actor.is_silent = True
                self.crashes += 1
                self.tell(f"DIES before this: {what}")
                raise Crash
            actor.changes += 1
        self._pass(actor)
        counts = self._counts(what)
        while counts and self._left < 1:
            self._job, self._left = next(self._turns)
            self._pass(actor)
        self._left -= counts
        self._ran[actor.job].moves.append((what, changes))
        self.tell(what)

    def reply_is_lost(self) -> bool:
        """Whether the host does not hear that its last change was done."""
        actor = self._actor
        return actor is not None and actor.changes - 1 in actor.lost

    def is_late(self) -> int | None:
        """Returns after how many operations the last change arrives once more, or that before which
        the host has died; None where it does not.
        """
        actor = self._actor
        if actor is None:
            return None
        return actor.late.pop(actor.changes - (not actor.is_dead), None)

    def tell(self, what: str) -> None:
        """Adds to what is told of the world if it breaks a promise."""
        who = ""
        if (actor := self._actor) is not None:
            who = f"{self._jobs[actor.job].name} " if len(self._jobs) > 1 else ""
            who += f"host {actor.index}  "
        self.trace.append((self._time - _BEGIN, f"{who}{what}"))

    def wait(self, until: Callable[[], bool], seconds: float) -> None:
        """Lets the others move until something holds, or some seconds have gone by."""
        actor = self._actor
        assert actor is not None
        if actor.is_dead:
            raise Crash
        actor.until, actor.deadline = until, self._time + seconds
        self._pass(actor)
        actor.until = None
        if self._time > self._end:
            raise StuckError(f"does not come to an end in {_LONGEST_SECONDS:.0f} s")

    def _pass(self, actor: _Actor) -> None:
        chosen = self._next()
        if chosen is not actor:
            self._actor = chosen
            chosen.coroutine.switch()

    def _next(self) -> _Actor:
        while True:
            live, time = self._live[self._job], self._time
            if not live:
                self._job, self._left = next(self._turns)
                continue
            able = [a for a in live if a.until is None or a.deadline <= time or a.until()]
            if able:
                if self._job != self._mover:
                    self._change()
                return able[self._choose(len(able))]
            self._time = min(actor.deadline for actor in live)

    def _change(self) -> None:
        """Another job moves from here on."""
        before, self._mover = self._mover, self._job
        if before is None:
            return
        stands = bool(self._live[before])
        self._ran[before].stood |= stands
        how, name = "stands still" if stands else "has ended", self._jobs[self._job].name
        now = self._time - _BEGIN
        self.trace.append((now, f"-- {self._jobs[before].name} {how}, {name} moves"))

    def run(
        self,
        jobs: Sequence[Job],
        turns: Iterable[tuple[int, float]] = (),
        counts: Callable[[str], bool] = lambda what: True,
    ) -> list[Ran]:
        """Runs jobs on all of their hosts, and returns how each went.

        Args:
            turns: which job moves, and for how many operations; then which one, and so on. After
                the last of them each job in turn comes to its end, the last one first.
            counts: which operations these are; a turn ends before the next one of them.
        """
        self._jobs, self._counts = jobs, counts
        self._ran = [Ran([None] * job.hosts, [], []) for job in jobs]
        self._live = [
            [
                _Actor(
                    n,
                    i,
                    job.crashes.get(i),
                    job.lost.get(i, ()),
                    dict(job.late.get(i, {})),
                    job.stands.get(i),
                )
                for i in range(job.hosts)
            ]
            for n, job in enumerate(jobs)
        ]
        self._actors = [actor for live in self._live for actor in live]

        def host(actor: _Actor) -> None:
            results = self._ran[actor.job].results
            try:
                results[actor.index] = jobs[actor.job].target(actor.index)
            except Crash:
                results[actor.index] = Crash
            except BaseException as error:
                results[actor.index] = error
            self._live[actor.job].remove(actor)

        here = current()
        for actor in self._actors:
            actor.coroutine = coroutine(functools.partial(host, actor), here)
        ends = [(number, float("inf")) for number in reversed(range(len(jobs)))]
        self._turns = iter([*turns, *ends])
        self._job, self._left, self._mover = 0, 0.0, None
        self._end = self._time + _LONGEST_SECONDS
        while any(self._live):  # here again whenever a host has ended
            self._actor = self._next()
            self._actor.coroutine.switch()
            self._actor = None
        for actor in self._actors:
            self._ran[actor.job].changes.append(actor.changes)
            self._ran[actor.job].operations.append(actor.moves)
        return self._ran


class SteppedBoard:
    """The registers of a group of such hosts, all of which share `values`."""

    def __init__(self, scheduler: Scheduler, index: int, count: int, values: dict[str, str]):
        self.index, self.count = index, count
        self._scheduler, self._values = scheduler, values

    def set(self, key: str, value: str) -> bool:
        number, *_, phase, _ = key.split("/")
        what = f"tells the others (agreement {number}): {phase}"
        self._scheduler.step(f"{what}: {value:.400}" if '"error"' in value else what)
        if key in self._values:
            return False
        self._values[key] = value
        return True

    def wait(self, key: str, seconds: float) -> str | None:
        if key not in self._values:
            self._scheduler.wait(lambda: key in self._values, seconds)
        return self._values.get(key)

    def read(self, prefix: str) -> dict[str, str]:
        return {key: value for key, value in self._values.items() if key.startswith(prefix)}

    def clear(self, prefix: str) -> None:
        for key in [key for key in self._values if key.startswith(prefix)]:
            del self._values[key]

    def silent(self) -> Mapping[int, Silence]:
        return self._scheduler.silent()
