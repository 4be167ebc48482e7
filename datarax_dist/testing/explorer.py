"""The crash explorer: the real protocol code on simulated hosts, of which one moves at a time.

A *world* is a run in memory (a file system or a bucket) on which jobs of several hosts follow each
other: each restores, saves a few steps, and may lose hosts at any of their operations. In a bucket
replies can be lost, too: what was asked for is done, and is asked for again. A seed decides
everything: who moves next, who dies where, what is saved. After each job the invariants are
checked; a seed that breaks one prints what happened, in order, and does the same again.

    python -m datarax_dist.testing.explorer --seeds 20000      # random worlds
    python -m datarax_dist.testing.explorer --exhaust          # every crash, pair, lost reply
    python -m datarax_dist.testing.explorer --seed 17 --show   # one world, told

    >>> explore(range(3)).worlds
    3
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import faulthandler
import itertools
import json
import logging
import multiprocessing
import random
import secrets
import sys
import time
import types
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn
from unittest import mock

from datarax_dist import config, save, telemetry
from datarax_dist.errors import CheckpointError, CorruptStepError
from datarax_dist.hosts import HostGroup
from datarax_dist.inspection import Candidate, inspect_run, read_records, verify_files
from datarax_dist.lease import Lease
from datarax_dist.restore import Loading, Restorer
from datarax_dist.save import Saver, SaveRequest
from datarax_dist.telemetry import Phases
from datarax_dist.testing.simulated import MemoryArrays, MemoryBucket, MemoryStore, stepped
from datarax_dist.testing.turns import Crash, Scheduler, SteppedBoard

__all__ = ["BreachError", "Explored", "exhaust", "explore", "run_world"]

_OPTIONS = config.Options(
    exchange_timeout_seconds=30,
    save_timeout_seconds=60,
    restore_timeout_seconds=60,
    lease_ttl_seconds=2,
)
_NO_TIME = types.SimpleNamespace(monotonic=lambda: 0.0)
_PART_SECONDS = 1800.0  # of the machine, for one piece of work; a few are enough
_FOREIGN = {"tensorboard/events": b"not ours", "3.orbax-checkpoint-tmp/x": b"nor this"}


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


# What hosts do


@dataclass(frozen=True, slots=True)
class _Plan:
    """One job.

    Attributes:
        steps: (step, replace) in order.
        crashes: host -> before which of its changes it dies. What a host tells is a change, too.
        lost: host -> after which of its changes, of a bucket, it does not hear that they were done.
        power: whether the machine's power goes after the job: what was not synced is lost.
        pause: before which change of host 0 the whole job stands still, until another one has taken
            the run and ended; and the plan of that one.
    """

    hosts: int
    steps: Sequence[tuple[int, bool]]
    keep: int | None = None
    crashes: Mapping[int, int] = field(default_factory=dict)
    lost: Mapping[int, Container[int]] = field(default_factory=dict)
    power: bool = False
    pause: tuple[int, _Plan] | None = None

    def __str__(self) -> str:
        saves = [f"step {step}{' again' if replace else ''}" for step, replace in self.steps]
        kept = "every step" if self.keep is None else f"the newest {self.keep}"
        told = [
            f"{self.hosts} {'host' if self.hosts == 1 else 'hosts'}",
            f"restores, saves {' and '.join(saves)}, keeps {kept}",
        ]
        told += [f"host {h} dies before its change {n}" for h, n in sorted(self.crashes.items())]
        told += [f"some replies to host {h} are lost" for h in sorted(self.lost)]
        if self.pause is not None:
            told.append(f"stands still before change {self.pause[0]} of host 0, for another job")
        return "; ".join([*told, *(["the power goes at the end"] if self.power else [])])


def _content(job: int, step: int, host: int) -> bytes:
    return f"step {step}, as job {job} has saved it, of host {host}".encode()


class _World:
    def __init__(self, name: str, in_bucket: bool, choose: Callable[[int], int]) -> None:
        self.name = name
        self.scheduler = Scheduler(choose)
        self.files: Any = MemoryBucket() if in_bucket else MemoryStore()
        for key, data in _FOREIGN.items():
            self.files.files[key] = data
        self.store: Any = stepped(self.files, self.scheduler.step, self.scheduler.reply_is_lost)
        self.jobs = 0
        # As it was found after the last job; nothing changes the files between two jobs.
        self.found: Sequence[Candidate] = ()
        self.committed: dict[int, int] = {}
        self.holder: Lease  # of the job that moves

    def run(self, plan: _Plan) -> list[int]:
        """Runs one job and checks the invariants. Returns how many changes each host made."""
        job, values = self.jobs, {}  # type: int, dict[str, str]
        self.jobs += 1
        self.scheduler.tell(f"-- job {job}: {plan}")
        before = self.committed

        def host(index: int) -> list[tuple[str, Any]]:
            board = SteppedBoard(self.scheduler, index, plan.hosts, values)
            group = HostGroup(board, clock=self.scheduler, names=["simulated"] * plan.hosts)
            return self._host(group, job, plan)

        took_over: list[Mapping[int, int]] = []

        def meanwhile(what: str) -> bool:
            assert plan.pause is not None
            if not self.holder.epoch:
                return False  # a job that does not hold the run yet can take it later
            holder, crashes = self.holder, self.scheduler.crashes
            self.scheduler.tell(f"stands still before this, with all hosts of its job: {what}")
            self.committed = self._committed()
            self.run(plan.pause[1])
            if self.scheduler.crashes == crashes or self.holder.epoch:  # it came so far
                took_over.append(self.committed)
            self.scheduler.tell("goes on")
            self.holder = holder
            return True

        pause = None if plan.pause is None else (plan.pause[0], meanwhile)
        results, changes = self.scheduler.run(host, plan.hosts, plan.crashes, plan.lost, pause)
        if plan.power:
            emptied = self.files.lose_power()
            self.scheduler.tell(f"the power goes; empty now: {', '.join(emptied) or 'nothing'}")
        if took_over:
            self._check_harmless(took_over[0], results)
        else:
            self._check(job, plan, before, results)
        return changes

    def _host(self, group: HostGroup, job: int, plan: _Plan) -> list[tuple[str, Any]]:
        keep = None if plan.keep is None else config.latest(plan.keep)
        lease: Lease | None = None
        if group.is_primary:
            ttl = _OPTIONS.lease_ttl_seconds
            owner = {"machine": "", "pid": 0, "started": "", "name": f"job {job}"}
            self.holder = lease = Lease(self.store, self.scheduler, ttl_seconds=ttl, owner=owner)
        saver = Saver(self.store, group, self.scheduler, _OPTIONS, keep, lease)
        told: list[tuple[str, Any]] = []

        def ended(what: str, how: Any) -> None:
            told.append((what, how))
            failed = f", but: {type(how).__name__}: {how}" if isinstance(how, Exception) else ""
            self.scheduler.tell(f"is done: {what}{failed}")

        restorer = Restorer(self.store, group, _OPTIONS, self.scheduler, seen=saver.learn)
        try:
            found = restorer.restore(None, self._load, Phases("restore", group.index))
        except CheckpointError as error:
            ended("restore", error)
            return told
        if found is None:
            ended("restore (nothing there)", None)
        else:
            ended(f"restore step {found[0][0]} of job {found[0][1]}", found[0])
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
                ended(f"save step {step}", error)
            else:
                ended(f"save step {step}", step)
        if lease is not None:
            lease.release()
        return told

    def _load(self, candidate: Candidate, _: Loading) -> Callable[[], tuple[int, int]]:
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

    def _check_harmless(self, left: Mapping[int, int], results: Sequence[Any]) -> None:
        """A job that has lost the run, and went on, has committed and deleted nothing."""
        for index, result in enumerate(results):
            if isinstance(result, BaseException):
                self._breach(f"host {index}: {type(result).__name__}: {result}")
        self.committed = self._committed()
        if self.committed != left:
            self._breach(f"the job that had lost the run has made {self.committed} of {left}")
        lived = [result for result in results if result is not Crash]
        for number in range(max(map(len, lived), default=0)):
            ends = [isinstance(r[number][1], Exception) for r in lived if len(r) > number]
            if len(set(ends)) > 1:
                self._breach(f"hosts do not agree: {[r[number:] for r in lived]}")

    def _check(
        self, job: int, plan: _Plan, before: Mapping[int, int], results: Sequence[Any]
    ) -> None:
        for index, result in enumerate(results):
            if isinstance(result, BaseException):
                self._breach(f"host {index}: {type(result).__name__}: {result}")
        lived = [result for result in results if result is not Crash]
        nobody_died = len(lived) == len(results)
        self.committed = after = self._committed()
        steps = [f"step {step} of job {of}" for step, of in sorted(after.items())]
        self.scheduler.tell(f"committed: {', '.join(steps) or 'nothing'}")
        restored = {str(r[0][1]) for r in lived if not isinstance(r[0][1], Exception)}
        if len(restored) > 1:
            self._breach(f"hosts restored different steps: {restored}")
        failed = [r[0][1] for r in lived if isinstance(r[0][1], Exception)]
        if failed and nobody_died:
            self._breach(f"nothing was restored though nobody died: {failed[0]}")
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
            elif nobody_died and ends:
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
            {c.name for c in self.found}
            | {"RUN.json", "lease"}
            | {key.split("/")[0] for key in _FOREIGN}
        )
        if tops - known:
            self._breach(f"left over: {sorted(tops - known)}")

    def _breach(self, what: str) -> NoReturn:
        raise BreachError(f"{self.told()}\n{self.name} breaks a promise: {what}")

    def told(self) -> str:
        """Returns what has happened, for a reader who has not seen such a world before."""
        lines = [
            f"{self.name}: {self.files.told}",
            f"It holds {' and '.join(_FOREIGN)} of others from the start.",
            "Host 0 is the primary. Who dies does so before a change, if it comes so far: what"
            " writes, deletes, renames or copies, or tells the others something; counted from 0.",
            "An agreement is an exchange of the hosts, or a save. `children` lists a directory,"
            " `list` all below it; `write` is what TensorStore writes, and does not sync.",
            "The seconds are virtual: they go by only while every host waits.",
        ]
        for when, line in self.scheduler.trace:
            lines += ["", line[3:]] if line.startswith("-- ") else [f"{when:8.2f} s  {line}"]
        return "\n".join(lines)

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
            mock.patch.object(telemetry, "time", _NO_TIME),
        ):
            yield
    finally:
        logging.disable(level)


def run_world(seed: int, *, show: bool = False) -> Explored:
    """Runs the random world of a seed.

    Raises:
        BreachError: an invariant does not hold in it.
    """
    chance, luck = random.Random(seed), random.Random(f"replies {seed}")
    other = random.Random(f"other job {seed}")
    with _seeded(seed):
        in_bucket = chance.random() < 0.5
        world = _World(f"seed {seed}", in_bucket, chance.randrange)
        share = luck.choice([0.0, 0.02, 0.1]) if in_bucket else 0.0
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
            lost = _lost_replies(luck, share, hosts, 100 * len(steps)) if share else {}
            pause = _other_job(other, step) if other.random() < 0.3 else None
            power = chance.random() < 0.3
            world.run(_Plan(hosts, steps, keep, crashes, lost, power, pause))
            step = max([step, *world.committed])
        world.finish()
    if show:
        print(world.told())
    return world.explored


def _other_job(chance: random.Random, step: int) -> tuple[int, _Plan]:
    """Returns when a job stands still, and what the one does that takes the run meanwhile: it saves
    what the first one is about to save, too, or something else.
    """
    steps = [(chance.randint(max(step - 1, 1), step + 1), True)]
    hosts, keep = chance.choice([1, 1, 2]), chance.choice([None, 1])
    return chance.randint(0, 60), _Plan(hosts, steps, keep)


def _lost_replies(
    luck: random.Random, share: float, hosts: int, changes: int
) -> dict[int, Container[int]]:
    lost = {host: [n for n in range(changes) if luck.random() < share] for host in range(hosts)}
    return {host: numbers for host, numbers in lost.items() if numbers}


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
    """Runs a world of `hosts` hosts once for each place at which up to `most` of them can die, and
    once for each reply of a bucket that can be lost, and once for each place at which all can stand
    still while another job does the same: they save step 2 (or step 1 again), and keep one step.

    And where they stand still, once more for each later place at which the primary then dies (if
    `most` is 2 or more), and once more for a reply that was lost just before. Where one or two
    hosts save a step of a bucket again, also for each place at which the other job dies; of the
    first one the primary makes one more change, and dies, too.

    Raises:
        BreachError: as soon as an invariant does not hold in one.
    """
    kind = "bucket" if in_bucket else "file system"
    plan = _Plan(hosts, [(1 if again else 2, again)], None if again else 1)

    def world(
        crashes: Mapping[int, int],
        lost: Mapping[int, Container[int]],
        pause: int | None,
        other_dies: int | None = None,
    ) -> tuple[_World, list[int]]:
        told = f"crashes {dict(crashes)}, lost {dict(lost)}, pause {pause}, other {other_dies}"
        with _seeded(0):
            turns = itertools.count()
            one = _World(
                f"{hosts} hosts, {kind}, again={again}, {told}",
                in_bucket,
                lambda able: next(turns) % able,
            )
            one.run(_Plan(hosts, [(1, False)]))
            # Where a reply was lost, or it dies, the other job clears away what it finds, and that
            # is all.
            tidies = bool(lost) or other_dies is not None
            dies = {} if other_dies is None else {0: other_dies}
            other = _Plan(1, [(plan.steps[0][0] + tidies, True)], plan.keep, dies)
            changes = one.run(
                _Plan(
                    plan.hosts,
                    plan.steps,
                    plan.keep,
                    crashes,
                    lost,
                    power=bool(crashes),
                    pause=None if pause is None else (pause, other),
                )
            )
            one.finish()
        return one, changes

    _, changes = world({}, {}, None)
    both_die = in_bucket and again and hosts <= 2 <= most
    cases: Iterator[tuple[Any, ...]] = itertools.chain(
        ((crashes, {}, None) for crashes in _crash_cases(hosts, changes, most)),
        (
            ({}, {host: {place}}, None)
            for host in range(hosts if in_bucket else 0)
            for place in range(changes[host])
        ),
        (({}, {}, place) for place in range(changes[0])),
        # It goes on, and dies after all.
        (
            ({0: later}, {}, place)
            for place in range(changes[0] if most > 1 else 0)
            for later in range(place + 1, changes[0])
        ),
        # It stands still before it asks once more, as no reply has come.
        (({}, {0: {place}}, place + 1) for place in range(changes[0] if in_bucket else 0)),
        (
            ({0: place + 1}, {}, place, other_dies)
            for place in range(changes[0] if both_die else 0)
            for other_dies in range(changes[0])
        ),
    )
    total = Explored()
    for case in itertools.islice(cases, 0, None, every):
        total.add(world(*case)[0].explored)
    return total


# The command


def _part(work: tuple[str, tuple[Any, ...], dict[str, Any]]) -> Explored:
    name, arguments, more = work
    # Whoever blocks in earnest, on a lock, does not wait in virtual time.
    faulthandler.dump_traceback_later(_PART_SECONDS, exit=True)
    return explore(*arguments) if name == "explore" else exhaust(*arguments, **more)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m datarax_dist.testing.explorer",
        description="Runs the save and restore protocols on simulated hosts that may die anywhere.",
    )
    parser.add_argument("--seeds", type=int, default=0, help="how many random worlds")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument(
        "--exhaust",
        action="store_true",
        help="every crash, pair of crashes, lost reply and pause",
    )
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
