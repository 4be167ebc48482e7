"""The crash explorer: the real protocol code on simulated hosts, of which one moves at a time.

A *world* is a run in memory (a file system or a bucket) on which jobs of several hosts follow each
other: each restores, saves a few steps, and may lose hosts at any of their operations. A seed
decides everything: who moves next, who dies where, what is saved. After each job the invariants are
checked; a seed that breaks one prints what happened, in order, and does the same again.

    python -m datarax_dist.testing.explorer --seeds 20000      # random worlds
    python -m datarax_dist.testing.explorer --exhaust          # every crash, every pair of crashes
    python -m datarax_dist.testing.explorer --seed 17 --show   # one world, told

    >>> explore(range(3)).worlds
    3
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import itertools
import json
import logging
import multiprocessing
import random
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn
from unittest import mock

from datarax_dist import config, save
from datarax_dist.errors import CheckpointError, CorruptStepError
from datarax_dist.hosts import HostGroup
from datarax_dist.inspection import Candidate, inspect_run, read_records, verify_files
from datarax_dist.restore import Restorer
from datarax_dist.save import Saver, SaveRequest
from datarax_dist.telemetry import Phases
from datarax_dist.testing.simulated import MemoryArrays, MemoryBucket, MemoryStore, stepped

try:
    import greenlet
except ImportError:
    greenlet = None  # type: ignore[assignment,unused-ignore]

__all__ = ["BreachError", "Crash", "Explored", "exhaust", "explore", "run_world"]

_OPTIONS = config.Options(
    exchange_timeout_seconds=30, save_timeout_seconds=60, restore_timeout_seconds=60
)
_BEGIN = 1_700_000_000.0
_LONGEST_SECONDS = 3600.0  # of one job; every wait in it ends long before
_FOREIGN = {"tensorboard/events": b"not ours", "3.orbax-checkpoint-tmp/x": b"nor this"}


class Crash(BaseException):
    """The host's process is gone."""


class _StuckError(BaseException):
    """A host waits, again and again, for longer than any deadline."""


class BreachError(AssertionError):
    """An invariant does not hold. The text says which, of which world, and what happened."""


@dataclass(slots=True)
class Explored:
    """What was tried.

    Attributes:
        worlds: how many.
        crashes: hosts that died in them.
        operations: operations of hosts, over all worlds.
    """

    worlds: int = 0
    crashes: int = 0
    operations: int = 0

    def add(self, other: Explored) -> None:
        self.worlds += other.worlds
        self.crashes += other.crashes
        self.operations += other.operations


# Who moves


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
_coroutine: Any = _Thread if greenlet is None else greenlet.greenlet
_here: Callable[[], Any] = _thread_here if greenlet is None else greenlet.getcurrent


@dataclass(slots=True, eq=False)
class _Actor:
    """A host: it runs only when it has the turn."""

    index: int
    crash_at: int | None = None
    changes: int = 0
    is_dead: bool = False
    until: Callable[[], bool] | None = None
    deadline: float = 0.0
    coroutine: Any = None


class _Scheduler:
    """Hosts of which one runs at a time. Also their clock, which moves when all of them wait."""

    def __init__(self, choose: Callable[[int], int]) -> None:
        self._choose = choose
        self._time = _BEGIN
        self._live: list[_Actor] = []
        self._actor: _Actor | None = None  # who has the turn
        self._end = 0.0
        self.trace: list[str] = []
        self.operations = 0
        self.crashes = 0

    # A clock

    def monotonic(self) -> float:
        return self._time

    def now(self) -> float:
        return self._time

    def sleep(self, seconds: float) -> None:
        self.wait(lambda: False, seconds)

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
                self.trace.append(f"host {actor.index} DIES before {what}")
                raise Crash
            actor.changes += 1
        self._pass(actor)
        self.trace.append(f"host {actor.index} {what}")

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
            raise _StuckError(f"does not come to an end in {_LONGEST_SECONDS:.0f} s")

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
        self, target: Callable[[int], Any], count: int, crashes: Mapping[int, int]
    ) -> tuple[list[Any], list[int]]:
        """Runs `target(index)` on each host; returns what each returned or raised, and how many
        changes each made.
        """
        actors = [_Actor(index, crashes.get(index)) for index in range(count)]
        results: list[Any] = [None] * count

        def host(actor: _Actor) -> None:
            try:
                results[actor.index] = target(actor.index)
            except Crash:
                results[actor.index] = Crash
            except BaseException as error:
                results[actor.index] = error
            self._live = [other for other in self._live if other is not actor]

        here = _here()
        for actor in actors:
            actor.coroutine = _coroutine(functools.partial(host, actor), here)
        self._live, self._end = list(actors), self._time + _LONGEST_SECONDS
        while self._live:  # here again whenever a host has ended
            self._actor = self._next()
            self._actor.coroutine.switch()
            self._actor = None
        return results, [actor.changes for actor in actors]


class _Board:
    """The registers of one job."""

    def __init__(self, scheduler: _Scheduler, index: int, count: int, values: dict[str, str]):
        self.index, self.count = index, count
        self._scheduler, self._values = scheduler, values

    def set(self, key: str, value: str) -> bool:
        self._scheduler.step(f"tells {key}")
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


# What they do


@dataclass(frozen=True, slots=True)
class _Plan:
    """One job.

    Attributes:
        steps: (step, replace) in order.
        crashes: host -> before which of its changes it dies.
        power: whether the machine's power goes after the job: what was not synced is lost.
    """

    hosts: int
    steps: Sequence[tuple[int, bool]]
    keep: int | None = None
    crashes: Mapping[int, int] = field(default_factory=dict)
    power: bool = False


def _content(job: int, step: int, host: int) -> bytes:
    return f"step {step}, as job {job} has saved it, of host {host}".encode()


class _World:
    def __init__(self, name: str, in_bucket: bool, choose: Callable[[int], int]) -> None:
        self.name = name
        self.scheduler = _Scheduler(choose)
        self.files: Any = MemoryBucket() if in_bucket else MemoryStore()
        for key, data in _FOREIGN.items():
            self.files.files[key] = data
        self.store: Any = stepped(self.files, self.scheduler.step)
        self.jobs = 0
        # As it was found after the last job; nothing changes the files between two jobs.
        self.found: Sequence[Candidate] = ()
        self.committed: dict[int, int] = {}

    def run(self, plan: _Plan) -> list[int]:
        """Runs one job and checks the invariants. Returns how many changes each host made."""
        job, values = self.jobs, {}  # type: int, dict[str, str]
        self.jobs += 1
        self.scheduler.trace.append(f"-- job {job}: {plan}")
        before = self.committed

        def host(index: int) -> list[tuple[str, Any]]:
            group = HostGroup(
                _Board(self.scheduler, index, plan.hosts, values), clock=self.scheduler
            )
            return self._host(group, job, plan)

        results, changes = self.scheduler.run(host, plan.hosts, plan.crashes)
        if plan.power:
            self.files.lose_power()
        self._check(job, plan, before, results)
        return changes

    def _host(self, group: HostGroup, job: int, plan: _Plan) -> list[tuple[str, Any]]:
        keep = None if plan.keep is None else config.latest(plan.keep)
        saver = Saver(self.store, group, self.scheduler, _OPTIONS, keep)
        told: list[tuple[str, Any]] = []
        restorer = Restorer(self.store, group, _OPTIONS, self.scheduler, seen=saver.learn)
        try:
            found = restorer.restore(None, self._load, Phases("restore", group.index))
        except CheckpointError as error:
            return [("restore", error)]
        told.append(("restore", None if found is None else found[0]))
        for step, replace in plan.steps:
            mine = _content(job, step, group.index)
            shard = f"data/d/shard_{group.index:05d}-of-{group.count:05d}.json"
            request = SaveRequest(
                step=step,
                writer=MemoryArrays(self.store, group.index, {"a": mine}),
                positions={shard: json.dumps(mine.decode()).encode()},
                shared={"TREE.json": json.dumps(job).encode()},
                items=("state",),
            )

            def captured(request: SaveRequest = request) -> SaveRequest:
                return request

            try:
                phases = Phases("save", group.index)
                saver.begin(step, captured, phases, replace=replace).finish()
            except CheckpointError as error:
                told.append(("save", error))
            else:
                told.append(("save", step))
        return told

    def _load(self, candidate: Candidate) -> Callable[[], tuple[int, int]]:
        try:
            job = json.loads(self.store.get(f"{candidate.name}/TREE.json"))
            parts = {
                self.store.get(f"{candidate.name}/state/ocdbt.process_{host}/a")
                == _content(job, candidate.step, host)
                for host in range(candidate.marker.hosts if candidate.marker else 0)
            }
        except KeyError as error:
            raise CorruptStepError("missing", step=candidate.step, files=[str(error)]) from None
        assert parts == {True}, "what is restored is not what was saved"
        return lambda: (candidate.step, job)

    def _committed(self) -> dict[int, int]:
        """Returns which job has saved each committed step, after looking at every byte."""
        found: dict[int, int] = {}
        self.found = inspect_run(self.files).candidates
        for candidate in self.found:
            if candidate.state == "damaged":
                self._breach(f"{candidate.name} is damaged: {candidate.reason}")
            marker = candidate.marker
            if candidate.state != "committed" or marker is None:
                continue
            if candidate.step in found:
                self._breach(f"step {candidate.step} is there twice")
            name, step = candidate.name, candidate.step
            try:
                files = read_records(self.files, name, marker.records, marker.run, step)
            except CorruptStepError as error:
                self._breach(f"committed step {step}: {error}")
            if wrong := verify_files(self.files, name, files, "full"):
                self._breach(f"committed step {step} is torn: {wrong}")
            found[step] = job = json.loads(self.files.get(f"{name}/TREE.json"))
            for host in range(marker.hosts):
                part = self.files.get(f"{name}/state/ocdbt.process_{host}/a")
                if part != _content(job, step, host):
                    self._breach(f"step {step} is of job {job}, and of host {host} {part!r}")
        return found

    def _check(
        self, job: int, plan: _Plan, before: Mapping[int, int], results: Sequence[Any]
    ) -> None:
        for index, result in enumerate(results):
            if isinstance(result, BaseException):
                self._breach(f"host {index}: {type(result).__name__}: {result}")
        lived = [result for result in results if result is not Crash]
        self.committed = after = self._committed()
        restored = {str(r[0][1]) for r in lived if not isinstance(r[0][1], Exception)}
        if len(restored) > 1:
            self._breach(f"hosts restored different steps: {restored}")
        newest = max(before, default=None)
        wanted = None if newest is None else (newest, before[newest])
        if restored and restored != {str(wanted)}:
            self._breach(f"restored {restored} where {wanted} is the newest step")
        saved: set[int] = set()
        for number, (step, _) in enumerate(plan.steps, start=1):
            ends = [r[number] for r in lived if len(r) > number]
            good = {isinstance(how, int) for _, how in ends}
            if len(good) > 1:
                self._breach(f"hosts do not agree on step {step}: {ends}")
            if good == {True}:
                saved.add(step)
            elif not plan.crashes and ends:
                self._breach(f"step {step} was not saved though nobody died: {ends[0]}")
        tried = {step for step, _ in plan.steps}
        keep = plan.keep if plan.keep is not None else 10**9
        ours = saved | {step for step, of in after.items() if of == job}  # reported or not
        must = sorted({*ours, *before})[-keep:] if ours else sorted(before)
        for step in must:
            allowed = {before[step]} if step in before and step not in saved else {job}
            if step in tried:
                allowed.add(job)
            if after.get(step) not in allowed:
                self._breach(f"step {step} is {after.get(step)} and not one of {allowed}")
        for step, of in after.items():
            if of == job and step not in tried:
                self._breach(f"step {step} is there, and nobody has saved it")
        for key, data in _FOREIGN.items():
            if self.files.files.get(key) != data:
                self._breach(f"{key}, which is not ours, was touched")

    def finish(self) -> None:
        """A job that nothing happens to: it restores, saves, and nothing is left behind."""
        last = max(self.committed, default=0)
        self.run(_Plan(2, [(last + 1, False), (last + 2, False)]))
        left = [c.name for c in self.found if c.state not in ("committed", "void", "refused")]
        if left:
            self._breach(f"left over: {left}")
        tops = {key.split("/")[0] for key in self.files.files}
        known = (
            {c.name for c in self.found} | {"RUN.json"} | {key.split("/")[0] for key in _FOREIGN}
        )
        if tops - known:
            self._breach(f"left over: {sorted(tops - known)}")

    def _breach(self, what: str) -> NoReturn:
        told = "\n".join(f"  {number}. {line}" for number, line in enumerate(self.scheduler.trace))
        raise BreachError(f"{self.name}: {what}\n{told}")

    @property
    def explored(self) -> Explored:
        return Explored(1, self.scheduler.crashes, self.scheduler.operations)


# Worlds


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Names drawn by chance are drawn from the seed, so that a world is the same each time, on
    every machine.
    """
    chance = random.Random(seed)
    writer = {"machine": "", "pid": 0, "started": "", "name": "simulated"}
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            mock.patch.object(
                secrets, "token_hex", lambda n=16: f"{chance.getrandbits(8 * n):0{2 * n}x}"
            ),
            mock.patch.object(save, "writer_identity", return_value=writer),
        ):
            yield
    finally:
        logging.disable(level)


def run_world(seed: int, *, show: bool = False) -> Explored:
    """Runs the random world of a seed.

    Raises:
        BreachError: an invariant does not hold in it.
    """
    chance = random.Random(seed)
    with _seeded(seed):
        world = _World(f"seed {seed}", chance.random() < 0.5, chance.randrange)
        step = 0
        for _ in range(chance.randint(1, 2)):
            hosts = chance.choice([1, 2, 2, 3, 4])
            steps = []
            for _ in range(chance.randint(1, 2)):
                again = step > 0 and chance.random() < 0.25
                step += 0 if again else 1
                steps.append((step, again))
            dying = chance.sample(range(hosts), chance.randint(0, hosts))
            crashes = {host: chance.randint(0, 25 * len(steps)) for host in dying}
            keep = chance.choice([None, None, 1, 2])
            world.run(_Plan(hosts, steps, keep, crashes, power=chance.random() < 0.3))
            step = max([step, *world.committed])
        world.finish()
    if show:
        print("\n".join(world.scheduler.trace))
    return world.explored


def explore(seeds: Iterable[int]) -> Explored:
    """Runs the random worlds of some seeds.

    Raises:
        BreachError: as soon as an invariant does not hold in one.
    """
    total = Explored()
    for seed in seeds:
        total.add(run_world(seed))
    return total


def _crash_cases(hosts: int, changes: Sequence[int], most: int) -> Iterator[dict[int, int]]:
    for count in range(1, most + 1):
        for dying in itertools.combinations(range(hosts), count):
            for places in itertools.product(*(range(changes[host] + 1) for host in dying)):
                yield dict(zip(dying, places, strict=True))


def exhaust(
    hosts: int, in_bucket: bool, *, again: bool = False, most: int = 2, every: int = 1
) -> Explored:
    """Runs a world of `hosts` hosts once for each place at which up to `most` of them can die: they
    save step 2 (or step 1 again), and keep one step.

    Raises:
        BreachError: as soon as an invariant does not hold in one.
    """
    kind = "bucket" if in_bucket else "file system"
    plan = _Plan(hosts, [(1 if again else 2, again)], None if again else 1)

    def world(crashes: Mapping[int, int]) -> tuple[_World, list[int]]:
        with _seeded(0):
            turns = itertools.count()
            one = _World(
                f"{hosts} hosts, {kind}, again={again}, crashes {dict(crashes)}",
                in_bucket,
                lambda able: next(turns) % able,
            )
            one.run(_Plan(hosts, [(1, False)]))
            changes = one.run(
                _Plan(plan.hosts, plan.steps, plan.keep, crashes, power=bool(crashes))
            )
            one.finish()
        return one, changes

    _, changes = world({})
    total = Explored()
    for crashes in itertools.islice(_crash_cases(hosts, changes, most), 0, None, every):
        total.add(world(crashes)[0].explored)
    return total


# The command


def _part(work: tuple[str, tuple[Any, ...], dict[str, Any]]) -> Explored:
    name, arguments, more = work
    return explore(*arguments) if name == "explore" else exhaust(*arguments, **more)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m datarax_dist.testing.explorer",
        description="Runs the save and restore protocols on simulated hosts that may die anywhere.",
    )
    parser.add_argument("--seeds", type=int, default=0, help="how many random worlds")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--exhaust", action="store_true", help="every crash and pair of crashes")
    parser.add_argument("--seed", type=int, help="run this world alone")
    parser.add_argument("--show", action="store_true", help="tell what happens in it")
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    asked = parser.parse_args(argv)
    begin = time.monotonic()
    work: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    if asked.seed is not None:
        try:
            run_world(asked.seed, show=asked.show)
        except BreachError as breach:
            print(breach, file=sys.stderr)
            return 1
        return 0
    size = 250
    for start in range(asked.first, asked.first + asked.seeds, size):
        stop = min(start + size, asked.first + asked.seeds)
        work.append(("explore", (range(start, stop),), {}))
    if asked.exhaust:
        for hosts, in_bucket, again in itertools.product((2, 3), (False, True), (False, True)):
            work.append(("exhaust", (hosts, in_bucket), {"again": again}))
    total = Explored()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(asked.jobs, mp_context=context) as pool:
        try:
            for part in pool.map(_part, work):
                total.add(part)
        except BreachError as breach:
            pool.shutdown(cancel_futures=True)
            print(breach, file=sys.stderr)
            return 1
    seconds = time.monotonic() - begin
    print(
        f"{total.worlds} worlds, {total.crashes} hosts died, {total.operations} operations:"
        f" no breach ({seconds:.0f} s)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
