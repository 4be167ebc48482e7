"""Simulated hosts of which one moves at a time, from one operation to the next.

    scheduler = Scheduler(random.Random(7).randrange)
    results, changes = scheduler.run(host, 3, crashes={1: 12})   # host 1 dies before its change 12

Whose turn is next is chosen at each operation and each wait; so a run can be had again, whatever
the machine does.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

from datarax_dist.beacons import Silence

try:
    import greenlet
except ImportError:
    greenlet = None  # type: ignore[assignment,unused-ignore]

__all__ = ["Crash", "Scheduler", "SteppedBoard", "StuckError", "coroutine", "current"]

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


@dataclass(slots=True, eq=False)
class _Actor:
    """A host: it runs only when it has the turn."""

    index: int
    crash_at: int | None = None
    lost: Container[int] = ()
    pause: tuple[int, Callable[[str], bool]] | None = None
    changes: int = 0
    is_dead: bool = False
    until: Callable[[], bool] | None = None
    deadline: float = 0.0
    coroutine: Any = None


class Scheduler:
    """Hosts of which one runs at a time. Also their clock, which moves when all of them wait."""

    def __init__(self, choose: Callable[[int], int]) -> None:
        self._choose = choose
        self._time = _BEGIN
        self._actors: list[_Actor] = []
        self._live: list[_Actor] = []
        self._actor: _Actor | None = None  # who has the turn
        self._end = 0.0
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

    def silent(self) -> dict[int, Silence]:
        """Returns the hosts that are dead: sooner than any real beacon tells."""
        return {actor.index: Silence(10.0) for actor in self._actors if actor.is_dead}

    # What hosts call

    def step(self, what: str, changes: bool = True) -> None:
        """Another host may move, or this one may die, before it does `what`."""
        actor = self._actor
        if actor is None:
            return  # who looks at the world from outside
        if actor.is_dead:
            raise Crash
        self.operations += 1
        if changes:
            if actor.crash_at == actor.changes:
                actor.is_dead = True
                self.crashes += 1
                self.tell(f"DIES before this: {what}")
                raise Crash
            if actor.pause is not None and actor.pause[0] <= actor.changes:
                (_, meanwhile), actor.pause = actor.pause, None
                if not meanwhile(what):
                    actor.pause = actor.changes + 1, meanwhile
            actor.changes += 1
        self._pass(actor)
        self.tell(what)

    def reply_is_lost(self) -> bool:
        """Whether the host does not hear that its last change was done."""
        actor = self._actor
        return actor is not None and actor.changes - 1 in actor.lost

    def tell(self, what: str) -> None:
        """Adds to what is told of the world if it breaks a promise."""
        who = "" if self._actor is None else f"host {self._actor.index}  "
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
        live = self._live
        while True:
            time = self._time
            able = [a for a in live if a.until is None or a.deadline <= time or a.until()]
            if able:
                return able[self._choose(len(able))]
            self._time = min(actor.deadline for actor in live)

    def run(
        self,
        target: Callable[[int], Any],
        count: int,
        crashes: Mapping[int, int],
        lost: Mapping[int, Container[int]],
        pause: tuple[int, Callable[[str], bool]] | None = None,
    ) -> tuple[list[Any], list[int]]:
        """Runs `target(index)` on each host; returns what each returned or raised, and how many
        changes each made.

        Args:
            crashes: host -> before which of its changes it dies.
            lost: host -> the changes of which it does not hear that they were done.
            pause: before which change of host 0 all of them stand still, and what happens
                meanwhile: another run of this scheduler, say. It returns False when the time has
                not come yet.
        """
        outside = self._actors, self._live, self._actor, self._end
        actors = [_Actor(i, crashes.get(i), lost.get(i, ())) for i in range(count)]
        actors[0].pause = pause
        results: list[Any] = [None] * count

        def host(actor: _Actor) -> None:
            try:
                results[actor.index] = target(actor.index)
            except Crash:
                results[actor.index] = Crash
            except BaseException as error:
                results[actor.index] = error
            self._live = [other for other in self._live if other is not actor]

        here = current()
        for actor in actors:
            actor.coroutine = coroutine(functools.partial(host, actor), here)
        self._actors, self._live = actors, list(actors)
        self._end = self._time + _LONGEST_SECONDS
        while self._live:  # here again whenever a host has ended
            self._actor = self._next()
            self._actor.coroutine.switch()
            self._actor = None
        self._actors, self._live, self._actor, self._end = outside
        return results, [actor.changes for actor in actors]


class SteppedBoard:
    """The registers of a group of such hosts, all of which share `values`."""

    def __init__(self, scheduler: Scheduler, index: int, count: int, values: dict[str, str]):
        self.index, self.count = index, count
        self._scheduler, self._values = scheduler, values

    def set(self, key: str, value: str) -> bool:
        number, phase, _ = key.split("/")
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
