"""The crash explorer: the real protocol code on simulated hosts, of which one moves at a time.

A *world* (`testing.world`) is a run in memory, on a file system or in a bucket, on which jobs of
several hosts follow each other: each restores, saves a few steps, and may lose hosts at any of
their operations. In a bucket replies can be lost, too: what was asked for is done, and is asked for
again; and any request may arrive once more, late. And several jobs can be there at once, of which
one moves while the others stand still, between any two of their operations. A seed decides
everything: who moves next, who dies where, what is saved. A seed that breaks a promise prints what
happened, in order, and does the same again.

    python -m datarax_dist.testing.explorer --seeds 20000      # random worlds
    python -m datarax_dist.testing.explorer --exhaust          # every crash, pair, lost reply, ...
    python -m datarax_dist.testing.explorer --seed 17 --show   # one world, told

    >>> explore(range(3)).worlds
    3
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import faulthandler
import functools
import itertools
import multiprocessing
import random
import re
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datarax_dist import format as fmt
from datarax_dist.testing.simulated import ONCE_MORE
from datarax_dist.testing.turns import Ran
from datarax_dist.testing.world import BreachError, Plan, World

__all__ = [
    "BreachError",
    "Explored",
    "exhaust",
    "explore",
    "interleave",
    "late",
    "meetings",
    "recover",
    "run_world",
]

_PART_SECONDS = 1800.0  # of the machine, for one piece of work; a few are enough
_LONG_SECONDS = 300.0
_TELLING = re.compile(r"COMMIT|STEP|rename|lease|(list|children): \d+$|children: the root")
_RECOVERIES = 2  # of the worlds in which the next job dies, too, so many times more
_DEATHS = 23  # of the worlds in which two jobs meet and one dies, one in so many


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


def _explored(world: World) -> Explored:
    return Explored(1, world.scheduler.crashes, world.scheduler.operations)


# Random worlds


def run_world(seed: int, *, show: bool = False) -> Explored:
    """Runs the random world of a seed.

    Raises:
        BreachError: an invariant does not hold in it.
    """
    chance = random.Random(seed)
    in_bucket, one_machine = chance.random() < 0.5, chance.random() < 0.3
    with World(f"seed {seed}", in_bucket, chance.randrange, seed, one_machine) as world:
        share = chance.choice([0.0, 0.02, 0.1]) if in_bucket else 0.0
        step = 0
        for _ in range(chance.randint(1, 2)):
            count = chance.choice([1, 1, 2, 2, 3])
            plans = [_plan(chance, step, share) for _ in range(count)]
            turns, counts = _turns(chance, count)
            world.run(plans, turns, counts, power=chance.random() < 0.3)
            step = max([step, *world.committed])
        world.finish(chance.choice([1, 2]))
    if show:
        print(world.told())
    return _explored(world)


def _plan(chance: random.Random, step: int, share: float) -> Plan:
    """Returns a job that goes on from about this step."""
    hosts = chance.choice([1, 1, 2, 2, 3, 4])
    steps = []
    for _ in range(chance.choice([0, 1, 1, 2, 2])):
        again = step > 0 and chance.random() < 0.4
        step += 0 if again else 1
        steps.append((step, again))
    if not steps:
        return Plan(hosts, steps)  # it only reads
    dying = chance.sample(range(hosts), chance.choice([0, 0, chance.randint(0, hosts)]))
    return Plan(
        hosts,
        steps,
        keep=chance.choice([None, None, 1, 2]),
        deletes=[step] if chance.random() < 0.2 else [],
        crashes={host: chance.randint(0, 25 * len(steps)) for host in dying},
        lost=_lost_replies(chance, share, hosts, 100 * len(steps)) if share else {},
        late=_late_requests(chance, share, hosts, 100 * len(steps)) if share else {},
        stands=_stands(chance, hosts),
        clock=chance.choice([0.0, 0.0, -600.0, 600.0]),
    )


def _stands(chance: random.Random, hosts: int) -> dict[int, tuple[int, float]]:
    if chance.random() < 0.8:
        return {}
    return {chance.randrange(hosts): (chance.randint(0, 80), chance.choice([1.0, 40.0, 200.0]))}


def _lost_replies(
    chance: random.Random, share: float, hosts: int, changes: int
) -> dict[int, Container[int]]:
    lost = {host: [n for n in range(changes) if chance.random() < share] for host in range(hosts)}
    return {host: numbers for host, numbers in lost.items() if numbers}


def _late_requests(
    chance: random.Random, share: float, hosts: int, changes: int
) -> dict[int, dict[int, int]]:
    lengths = [10, 100, 500]
    return {
        host: {
            n: chance.randint(1, chance.choice(lengths))
            for n in range(changes)
            if chance.random() < share
        }
        for host in range(hosts)
    }


def _turns(
    chance: random.Random, jobs: int
) -> tuple[list[tuple[int, float]], Callable[[str], bool]]:
    """Returns a few turns, most of them long enough to come to where jobs meet; and which
    operations count: all, or those that say and ask what is a step, and whose.
    """
    telling = chance.random() < 0.5
    lengths = [3, 10, 25, 40] if telling else [5, 30, 100, 200]
    many = chance.randint(1, 8) if jobs > 1 else 0
    turns: list[tuple[int, float]] = [
        (chance.randrange(jobs), chance.randint(0, chance.choice(lengths))) for _ in range(many)
    ]
    return turns, _tells if telling else lambda what: True


def _tells(what: str) -> bool:
    return _TELLING.search(what) is not None


def explore(seeds: Iterable[int]) -> Explored:
    """Runs the random worlds of some seeds.

    Raises:
        BreachError: as soon as an invariant does not hold in one.
    """
    total = Explored()
    for seed in seeds:
        total.add(run_world(seed))
    return total


# Every world of a kind


def _run(
    name: str,
    in_bucket: bool,
    plans: Sequence[Plan],
    turns: Sequence[tuple[int, float]] = (),
    *,
    power: bool = False,
    then: Sequence[Plan] = (),
) -> tuple[World, list[Ran]]:
    """Runs a job that saves step 1, then these, and those one by one.

    Args:
        power: whether the power goes each time that a host has died.
    """
    order = itertools.count()
    with World(name, in_bucket, lambda able: next(order) % able, 0) as world:
        world.run([Plan(plans[0].hosts, [(1, False)])])
        ran = world.run(plans, turns, power=power and any(plan.crashes for plan in plans))
        for plan in then:
            ran += world.run([plan], power=power and bool(plan.crashes))
        world.finish(plans[0].hosts)
    return world, ran


def _power(crashes: Mapping[int, int], in_bucket: bool) -> Sequence[bool]:
    """Returns whether the power is to go when these hosts have died: for a host alone it is tried
    that it does and that it does not, of pairs each place next to one where it does is one where it
    does not. In a bucket it makes no difference.
    """
    if in_bucket:
        return [False]
    return [True, False] if len(crashes) == 1 else [sum(crashes.values()) % 2 == 0]


def _crash_cases(hosts: int, changes: Sequence[int], most: int) -> Iterator[dict[int, int]]:
    for count in range(1, most + 1):
        for dying in itertools.combinations(range(hosts), count):
            for places in itertools.product(*(range(changes[host] + 1) for host in dying)):
                yield dict(zip(dying, places, strict=True))


def exhaust(
    hosts: int, in_bucket: bool, *, again: bool = False, most: int = 2, every: int = 1
) -> Explored:
    """Runs a world of `hosts` hosts once for each place at which up to `most` of them can die, with
    the power and without (of pairs one or the other), once for each operation before which one can
    stand still for longer than any deadline, and once for each reply of a bucket that can be lost:
    they save step 2 (or step 1 again), and keep one step.

    Raises:
        BreachError: as soon as an invariant does not hold in one.
    """
    kind = "bucket" if in_bucket else "file system"
    name = f"{hosts} hosts, {kind}, again={again}"
    plan = _saves_one(hosts, again)
    _, [alone] = _run(name, in_bucket, [plan])
    cases: Iterator[dict[str, Any]] = itertools.chain(
        (
            {"crashes": crashes, "power": power}
            for crashes in _crash_cases(hosts, alone.changes, most)
            for power in _power(crashes, in_bucket)
        ),
        (
            {"lost": {host: {place}}}
            for host in range(hosts if in_bucket else 0)
            for place in range(alone.changes[host])
        ),
        (
            {"stands": {host: (place, _LONG_SECONDS)}}
            for host in range(hosts if most else 0)
            for place in range(alone.operations[host])
        ),
    )
    total = Explored()
    for case in itertools.islice(cases, 0, None, every):
        told = f"{name}, {case}"
        power = case.pop("power", False)
        job = dataclasses.replace(plan, **case)
        total.add(_explored(_run(told, in_bucket, [job], power=power)[0]))
    return total


def _saves_one(hosts: int, again: bool) -> Plan:
    return Plan(hosts, [(1 if again else 2, again)], None if again else 1)


def recover(hosts: int, in_bucket: bool, *, again: bool = False, every: int = 1) -> Explored:
    """Runs a world of `hosts` hosts once for each place at which one of them can die, and each at
    which one can die of the job that comes next, restores, and saves the same step; every other of
    the first places with a loss of power, each time.

    Args:
        every: of these worlds only one in so many.

    Raises:
        BreachError: as soon as an invariant does not hold in one.
    """
    kind = "bucket" if in_bucket else "file system"
    plan, total, places = _saves_one(hosts, again), Explored(), itertools.count()
    next_job = dataclasses.replace(plan, steps=[(step, True) for step, _ in plan.steps])
    _, [alone] = _run(kind, in_bucket, [plan])
    for number, first in enumerate(_crash_cases(hosts, alone.changes, 1)):
        name = f"{hosts} hosts, {kind}, again={again}, crashes {first}"
        dies = dataclasses.replace(plan, crashes=first)

        def run(dies_too: Plan, name: str, dies: Plan = dies, power: bool = number % 2 == 0) -> Ran:
            world, [_, next_ran] = _run(
                name, in_bucket, [dies], power=power and not in_bucket, then=[dies_too]
            )
            total.add(_explored(world))
            return next_ran

        for second in _crash_cases(hosts, run(next_job, name).changes, 1):
            if next(places) % every == 0:
                run(dataclasses.replace(next_job, crashes=second), f"{name}, then {second}")
    return total


def meetings() -> dict[str, list[Plan]]:
    """Returns what two jobs do that are in each other's way."""
    again, newer = Plan(1, [(1, True)]), Plan(1, [(2, True)], keep=1)
    deletes, reads = Plan(1, [(2, True)], deletes=[1]), Plan(1, [])
    return {
        "one restores the step that the other saves again": [reads, again],
        "both save the same new step, and keep one": [newer, newer],
        "both save a step again": [again, again],
        "one saves the step again that the other does not keep": [again, newer],
        "one does not keep the step that the other saves again": [newer, again],
        "one deletes the step that the other saves again": [deletes, again],
        "one saves the step again that the other deletes": [again, deletes],
    }


def interleave(
    plans: Sequence[Plan], in_bucket: bool, *, switches: int = 2, every: int = 1, deaths: int = 0
) -> Explored:
    """Runs two jobs that take turns, up to so many times, once for each place where one of them can
    stand still for the other; but of orders that can make no difference only one. In a bucket also
    once for each reply that the first does not get: it stands still before it asks once more.

    Args:
        every: of the places where the second job stands still, the first one again, and so on,
            only one in so many.
        deaths: of the worlds in which the last job to move dies at one of its changes, the other
            one where it stands, or both, also one in so many; 0 for none.

    Raises:
        BreachError: as soon as an invariant does not hold in one.
    """
    total, kind = Explored(), "bucket" if in_bucket else "file system"
    ends, dying = itertools.count(), itertools.count()

    def run(turns: Sequence[tuple[int, float]], **more: Mapping[int, Any]) -> list[Ran]:
        """Runs the jobs; `more` is what happens to each, by its number, as `Plan` has it."""
        jobs = list(plans)
        for what, happens in more.items():
            for job, how in happens.items():
                jobs[job] = dataclasses.replace(jobs[job], **{what: how})
        power = not in_bucket and total.worlds % 2 == 0
        name = f"{kind}, turns {turns}, {more}, power {'goes' if power else 'stays'}"
        world, ran = _run(name, in_bucket, jobs, turns, power=power)
        total.add(_explored(world))
        return ran

    def tail(ran: Sequence[Ran], turns: Sequence[tuple[int, float]], job: int) -> Any:
        """Returns what a job does after these turns."""
        return ran[job].moves[sum(int(count) for who, count in turns if who == job) :]

    def let_die(turns: list[tuple[int, float]], job: int, ran: Sequence[Ran]) -> None:
        """The same as `ran`, in which after these turns this job came to its end, and then the
        other one.
        """
        made = [sum(changes for _, changes in one.moves) for one in ran]
        left = [sum(changes for _, changes in tail(ran, turns, n)) for n in (0, 1)]
        here = made[1 - job] - left[1 - job]  # the next change of who stands still
        for there in (None, *range(made[job] - left[job], made[job])):
            for both in (True, False):
                if (there is not None or both) and next(dying) % deaths == 0:
                    crashes = {} if there is None else {job: {0: there}}
                    crashes |= {1 - job: {0: here}} if both else {}
                    run([*turns, (job, float("inf"))], crashes=crashes)

    def preempt(turns: list[tuple[int, float]], job: int, ran: Sequence[Ran], left: int) -> None:
        """After these turns this job came to its end, in `ran`, and then the other one."""
        other, mine = 1 - job, tail(ran, turns, job)
        theirs = tail(ran, turns, other)
        for place in reversed(range(len(mine))):
            # Where it makes no difference whether it does this before the other one, or after.
            if not any(_conflict(mine[place][0], their) for their, _ in theirs):
                continue
            if turns and next(ends) % every:
                continue
            here = [*turns, (job, place)]
            ran_here = run([*here, (other, float("inf"))])
            theirs = tail(ran_here, here, other)
            if deaths:
                let_die(here, other, ran_here)
            if left > 1:
                preempt(here, other, ran_here, left - 1)

    [first, _] = alone = run([(0, float("inf"))])
    preempt([], 0, alone, switches)
    for place in range(sum(changes for _, changes in first.moves) if in_bucket else 0):
        lost = {0: {0: {place}}}
        [first, _] = run([(0, float("inf"))], lost=lost)
        again = [n for n, (what, _) in enumerate(first.moves) if what.endswith(ONCE_MORE)]
        for stands_before in again:
            run([(0, stands_before)], lost=lost)
    return total


def late(plans: Sequence[Plan], every: int = 1) -> Explored:
    """Runs two jobs, one after the other, in a bucket, once for each request of the first and each
    place where it matters that it arrives there, once more; and the same where the first job dies
    after it had sent it, and it arrives there for the first time.

    Args:
        every: of these places only one in so many.

    Raises:
        BreachError: as soon as an invariant does not hold in one.
    """
    total, places = Explored(), itertools.count()

    def run(**more: Any) -> list[Ran]:
        jobs = [dataclasses.replace(plans[0], **more), *plans[1:]]
        world, ran = _run(f"late requests, {more}", True, jobs, [(0, float("inf"))])
        total.add(_explored(world))
        return ran

    [first, _] = run()
    changes = [(n, what) for n, (what, is_change) in enumerate(first.moves) if is_change]
    for number, (sent_at, what) in enumerate(changes):
        dying: Mapping[int, int] = {0: number}
        for crashes in ({}, dying):
            ran = run(crashes=crashes) if crashes else [first, _]
            rest = [*ran[0].moves[sent_at + 1 :], *ran[1].moves]
            for after, (their, _is_change) in enumerate(rest, 1):
                if _conflict(what, their) and next(places) % every == 0:
                    run(crashes=crashes, late={0: {number: after}})
            run(crashes=crashes, late={0: {number: len(rest) + 1}})
    return total


# Which operations can stand in each other's way


@dataclass(frozen=True, slots=True)
class _Touched:
    """What an operation reads and writes: keys (`at`), all `below` one, or what is there `in` one,
    by name.
    """

    reads: tuple[tuple[str, str], ...] = ()
    writes: tuple[tuple[str, str], ...] = ()


@functools.lru_cache(1 << 14)
def _touched(what: str) -> _Touched:
    method, _, rest = what.partition(",")[0].partition(": ")
    key, _, other = rest.partition(" to ")
    if method == "list":
        return _Touched(reads=((key, "below"),))
    if method == "children":
        return _Touched(reads=(("" if key == "the root" else key, "in"),))
    if method in ("get", "digest"):
        return _Touched(reads=((key, "at"),))
    if method in ("put", "write", "create", "delete", "replace"):
        return _Touched(writes=((key, "at"),))
    if method == "copy":
        copied = f"{other}/{key.partition('/')[2]}"
        return _Touched(reads=((key, "at"),), writes=((copied, "at"),))
    if method == "rename":
        return _Touched(writes=((key, "below"), (other, "below")))
    return _Touched()  # between the hosts of a job


@functools.lru_cache(1 << 16)
def _conflict(one: str, other: str) -> bool:
    """Whether it matters in which order two operations of different jobs are done."""
    a, b = _touched(one), _touched(other)
    return any(
        _overlap(written, touched) or _overlap(touched, written)
        for writes, both in ((a.writes, b.writes + b.reads), (b.writes, a.reads))
        for written, touched in itertools.product(writes, both)
    )


def _overlap(one: tuple[str, str], other: tuple[str, str]) -> bool:
    (a, how), (b, _) = one, other
    if a == b or how == "at":
        return a == b
    is_below = not a or b.startswith(f"{a}/")
    if how == "below" or not is_below:
        return is_below
    # Whether a directory is there changes with what is first in it, or last.
    rest = b[len(a) :].strip("/")
    return "/" not in rest or rest.endswith((fmt.STEP_NAME, fmt.COMMIT_NAME))


# The command


def _part(work: Callable[[], Explored]) -> Explored:
    # Whoever blocks in earnest, on a lock, does not wait in virtual time.
    faulthandler.dump_traceback_later(_PART_SECONDS, exit=True)
    return work()


def _all(every: int) -> Iterator[Callable[[], Explored]]:
    """Returns the worlds of each kind, the largest first."""
    for in_bucket in (True, False):
        for plans in meetings().values():
            if not plans[0].steps:  # it has to be met twice
                yield functools.partial(interleave, plans, in_bucket, switches=3)
                continue
            yield functools.partial(
                interleave, plans, in_bucket, every=every, deaths=_DEATHS * every
            )
            if in_bucket:
                yield functools.partial(late, plans, every)
    for hosts, in_bucket, again in itertools.product((3, 2), (True, False), (True, False)):
        yield functools.partial(exhaust, hosts, in_bucket, again=again)
    for in_bucket, again in itertools.product((True, False), (True, False)):
        yield functools.partial(
            recover, 2, in_bucket, again=again, every=max(1, every // _RECOVERIES)
        )


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
        help="every crash, pair of crashes and lost reply; crashes of two jobs, one after the"
        " other; and two jobs that take turns",
    )
    parser.add_argument(
        "--every", type=int, default=1, help="of the worlds of two jobs only one in about so many"
    )
    parser.add_argument("--seed", type=int, help="run this world alone")
    parser.add_argument("--show", action="store_true", help="tell what happens in it")
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    asked = parser.parse_args(argv)
    begin = time.monotonic()
    work: list[Callable[[], Explored]] = []
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
        work.append(functools.partial(explore, range(start, stop)))
    if asked.exhaust:
        work += _all(asked.every)
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
