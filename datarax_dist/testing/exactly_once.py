"""The property that data positions promise, tried on a loader of yours: `check_exactly_once`.

For random schedules of hosts, committed steps and steps lost to a crash: every record of the epoch
is in exactly one committed step, global batch k is the same set of records (with the same random
changes to each) as in the uninterrupted run, all hosts take the same number of steps, and a restore
followed by a save gives the same bytes. It runs in one process: the hosts are taken in turn.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from datarax_dist import agreement
from datarax_dist import format as fmt
from datarax_dist.data import batches, positions
from datarax_dist.data.ownership import acting_as_host
from datarax_dist.errors import InvalidArgumentError

__all__ = ["ExactlyOnceError", "ExactlyOnceReport", "Part", "check_exactly_once"]

_MOST_BATCHES = 100_000
_ITEM = "data"


class ExactlyOnceError(AssertionError):
    """The first violation that was found. `.schedule` leads to it."""

    def __init__(self, message: str, schedule: Sequence[Part]) -> None:
        super().__init__(message)
        self.schedule = tuple(schedule)


@dataclass(frozen=True, slots=True)
class Part:
    """One start of a job: on so many hosts, with so many steps committed, and lost in a crash after
    that. `committed` None goes on to the end of the epoch.
    """

    hosts: int
    committed: int | None
    lost: int = 0

    def __str__(self) -> str:
        hosts = "1 host" if self.hosts == 1 else f"{self.hosts} hosts"
        if self.committed is None:
            return f"{hosts}: to the end"
        return f"{hosts}: {self.committed} committed, {self.lost} lost"


@dataclass(frozen=True, slots=True)
class ExactlyOnceReport:
    """What was tried: schedules, resumes in them, and the epoch that each one went through."""

    schedules: int
    resumes: int
    hosts: tuple[int, ...]
    batches: int
    records: int

    def __str__(self) -> str:
        return (
            f"exactly once: {self.schedules} schedules with {self.resumes} resumes on"
            f" {', '.join(map(str, self.hosts))} hosts; each an epoch of {self.batches} global"
            f" batches, {self.records} records"
        )


def check_exactly_once(
    factory: Callable[[int, int], Any],
    *,
    hosts: Sequence[int] = (1, 2, 4),
    schedules: int = 100,
    seed: int = 0,
    records: int | None = None,
    steps: int | None = None,
) -> ExactlyOnceReport:
    """Runs a loader through interrupted epochs and compares them with the uninterrupted one.

    Args:
        factory: `factory(host, hosts)` returns the loader of one host, as `save` and `restore` are
            given it. In it, `shards(...)` takes this host's part. It is called anew for each start.
        hosts: the numbers of hosts to go between. A loader whose positions are opaque takes one
            number only.
        schedules: how many schedules to try, at least. The first ones are tried always: each number
            of hosts without a cut, and cuts at 0, at 1, before the last batch and after the end,
            each for as many orders of the hosts as there are numbers of them (with 1, 2 and 4
            hosts: 14). The others are cut at random.
        seed: of the random ones.
        records: how many different records the epoch has; None does not check.
        steps: how many batches to look at, for a loader without an end.

    Returns:
        What was tried; printed, it is one line.

    Raises:
        ExactlyOnceError: an `AssertionError` that shows the first violation, and its schedule.

    >>> from datarax_dist.data import replay, shards
    >>> def shard(shard, count):
    ...     return replay(lambda: (np.arange(2) * count + shard + 8 * k for k in range(3)))
    >>> print(check_exactly_once(lambda host, hosts: shards(shard, 4), records=24, schedules=20))
    exactly once: 20 schedules with 40 resumes on 1, 2, 4 hosts; each an epoch of 3 global batches, 24 records
    """  # noqa: E501 - the report is one line
    hosts = tuple(hosts)
    given: tuple[Any, ...] = hosts
    if not hosts or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in given):
        raise InvalidArgumentError(f"hosts= needs numbers of hosts, 1 or more, not {hosts!r}.")
    trial = _Trial(factory, steps)
    whole = Part(hosts[0], None)
    truth = trial.uninterrupted(whole)
    seen = sum(truth, Counter())
    if not truth:
        raise ExactlyOnceError("The uninterrupted epoch has no batch at all.", (whole,))
    if records is not None and (len(seen), seen.total()) != (records, records):
        twice = [row for row, times in seen.items() if times > 1]
        raise ExactlyOnceError(
            f"The uninterrupted epoch on {whole.hosts} hosts has {seen.total()} records,"
            f" {len(seen)} of them different, instead of {records}."
            + (f"\n  more than once: {_some(twice)}" if twice else ""),
            (whole,),
        )
    tried = resumes = 0
    for schedule in _schedules(hosts, len(truth), schedules, random.Random(seed)):
        trial.interrupted(schedule, truth)
        tried, resumes = tried + 1, resumes + len(schedule) - 1
    return ExactlyOnceReport(tried, resumes, hosts, len(truth), seen.total())


def _schedules(
    hosts: Sequence[int], batches: int, count: int, chance: random.Random
) -> Iterator[list[Part]]:
    """First the cuts that break most often, all of them, then random ones."""
    fixed = [[Part(n, None)] for n in hosts[1:]]
    for cut in sorted({0, 1, max(batches - 1, 0), batches}):
        for shift in range(len(hosts)):
            first, second, third = (hosts[(shift + i) % len(hosts)] for i in range(3))
            cut = min(cut, batches)
            middle = (batches - cut) // 2
            fixed.append([Part(first, cut, 1), Part(second, middle), Part(third, None)])
    yield from fixed
    for _ in range(count - len(fixed)):
        left, schedule = batches, []
        for _ in range(chance.randint(2, 4)):
            committed = chance.randint(0, left) if chance.random() < 0.3 else chance.randint(0, 3)
            committed = min(committed, left)
            left -= committed
            schedule.append(Part(chance.choice(hosts), committed, chance.randint(0, 3)))
        yield [*schedule, Part(chance.choice(hosts), None)]


class _Trial:
    def __init__(self, factory: Callable[[int, int], Any], steps: int | None) -> None:
        self._factory = factory
        self._steps = steps

    def uninterrupted(self, whole: Part) -> list[Counter[str]]:
        job = _Job(self._factory, whole.hosts)
        truth: list[Counter[str]] = []
        while self._steps is None or len(truth) < self._steps:
            batch = job.step([whole])
            if batch is None:
                break
            truth.append(batch)
            if len(truth) > _MOST_BATCHES:
                raise InvalidArgumentError(
                    f"The loader has more than {_MOST_BATCHES} batches, or no end. Give"
                    " check_exactly_once(steps=...)."
                )
        job.crash()
        return truth

    def interrupted(self, schedule: list[Part], truth: list[Counter[str]]) -> None:
        step: dict[str, bytes] | None = None
        at = 0
        chance = random.Random(repr(schedule))
        for number, part in enumerate(schedule):
            job = _Job(self._factory, part.hosts)
            if step is not None:
                try:
                    job.restore(step, at)
                except Exception as error:
                    raise ExactlyOnceError(
                        f"A restore failed with {type(error).__name__}: {error}\n"
                        + _story(schedule, number, at),
                        schedule,
                    ) from error
                if (changed := job.capture(at, schedule)) != step:
                    names = sorted(k for k in {*step, *changed} if step.get(k) != changed.get(k))
                    raise ExactlyOnceError(
                        "A restore followed by a save gives other bytes.\n"
                        + _story(schedule, number, at)
                        + f"\n  differing files: {', '.join(names)}",
                        schedule,
                    )
            begin, wanted = at, part.committed
            while wanted is None or at < begin + wanted:
                if not self._one(job, schedule, number, at, truth):
                    break
                at += 1
                if chance.random() < 0.3:
                    job.capture(at, schedule)  # an earlier step of this job, of no use any more
            if wanted is None or at == len(truth):
                if at != len(truth):
                    raise ExactlyOnceError(
                        f"The epoch ended after {at} global batches; uninterrupted it has"
                        f" {len(truth)}.\n" + _story(schedule, number, at),
                        schedule,
                    )
                # After its end an epoch stays at its end.
                self._one(job, schedule, number, at, truth)
            step = job.capture(at, schedule)
            for lost in range(part.lost):
                self._one(job, schedule, number, at + lost, truth)
            job.crash()

    def _one(
        self, job: _Job, schedule: list[Part], number: int, at: int, truth: list[Counter[str]]
    ) -> bool:
        """Takes one step on every host; False at the end."""
        if self._steps is not None and at >= self._steps:
            return False
        batch = job.step(schedule)
        if batch is None or (at < len(truth) and batch == truth[at]):
            return batch is not None
        wanted: Counter[str] = truth[at] if at < len(truth) else Counter()
        where = {row: k for k, rows in enumerate(truth) for row in rows}
        unexpected = [
            f"{row} ({f'belongs to batch {where[row]}' if row in where else 'not in the epoch'})"
            for row in (batch - wanted).elements()
        ]
        missing = list((wanted - batch).elements())
        raise ExactlyOnceError(
            (
                f"Global batch {at} is not the one of the uninterrupted run."
                if at < len(truth)
                else f"There is a global batch {at}; the uninterrupted epoch has {len(truth)}."
            )
            + f"\n{_story(schedule, number, at)}"
            + f"\n  missing: {_some(missing)}\n  unexpected: {_some(unexpected)}",
            schedule,
        )


class _Job:
    """One start of a job: a loader for each host."""

    def __init__(self, factory: Callable[[int, int], Any], hosts: int) -> None:
        self._hosts = hosts
        self._loaders = []
        for host in range(hosts):
            with acting_as_host(host, hosts):
                self._loaders.append(factory(host, hosts))
        self._iterators: list[Any] = [None] * hosts
        self._paces = [positions.Pace(1) for _ in range(hosts)]

    def step(self, schedule: Sequence[Part]) -> Counter[str] | None:
        """Returns the records of the next global batch, or None when every host is at the end."""
        rows: Counter[str] = Counter()
        counts: dict[int, int] = {}
        ended = []
        for host, loader in enumerate(self._loaders):
            with acting_as_host(host, self._hosts):
                if self._iterators[host] is None:
                    self._iterators[host] = iter(loader)
                try:
                    batch = next(self._iterators[host])
                except StopIteration:
                    ended.append(host)
                else:
                    try:
                        mine = _rows(batch)
                    except InvalidArgumentError as error:
                        raise ExactlyOnceError(str(error), schedule) from error
                    counts[host] = len(mine)
                    rows.update(mine)
        if ended and len(ended) < self._hosts:
            others = [host for host in range(self._hosts) if host not in ended]
            raise ExactlyOnceError(
                f"Hosts see different numbers of steps: {_some(ended)} of {self._hosts} hosts"
                f" ended, {_some(others)} did not. In a real job the others would wait for"
                " ever.\n  schedule: " + " | ".join(map(str, schedule)),
                schedule,
            )
        if len(set(counts.values())) > 1:
            raise ExactlyOnceError(
                f"Hosts see different numbers of records in one global batch: {counts}. Arrays of"
                " such a batch have other shapes on other hosts.\n  schedule: "
                + " | ".join(map(str, schedule)),
                schedule,
            )
        return None if ended else rows

    def capture(self, at: int, schedule: Sequence[Part]) -> dict[str, bytes]:
        """Returns the files of a committed step, as `save` would write them."""
        captured = []
        for host, loader in enumerate(self._loaders):
            with acting_as_host(host, self._hosts):
                captured.append(positions.capture(loader, host, self._hosts, at, self._paces[host]))
        try:
            agreement.check_agreement(
                [{"step": at, "agreement": c.agreement, "digests": {}} for c in captured]
            )
            agreement.check_positions(
                [agreement.positions_told(c.counts, c.written, c.held) for c in captured]
            )
        except Exception as error:
            raise ExactlyOnceError(
                f"The hosts would not agree to save after global batch {at}: {error}\n  schedule: "
                + " | ".join(map(str, schedule)),
                schedule,
            ) from error
        files = dict(captured[0].indexes)
        for one in captured:
            files.update(one.files)
        return files

    def restore(self, step: Mapping[str, bytes], at: int) -> None:
        for host, loader in enumerate(self._loaders):
            with acting_as_host(host, self._hosts):
                plan = positions.plan_restore(
                    loader, [f"data/{_ITEM}"], step.__getitem__, host, self._hosts
                )
                found = positions.decode_positions(plan, step.__getitem__)
                positions.apply_positions(plan, found, at, self._paces[host])

    def crash(self) -> None:
        """Lets go of the loaders; those with workers are closed."""
        for thing in (*self._iterators, *self._loaders):
            close = getattr(thing, "close", None)
            if callable(close):
                close()
        self._loaders, self._iterators = [], []


def _rows(batch: Any) -> list[str]:
    """Returns each record of a batch as text: two are equal when their records are. What has no
    axis of records belongs to each.
    """
    count = batches.rows_of(batch)
    columns = []
    for name, leaf in batches.leaves_with_names(batch):
        whole = not isinstance(leaf, list) and not getattr(leaf, "shape", None)
        texts = [_text(leaf)] * count if whole else [_text(item) for item in leaf]
        columns.append([f"{name}={text}" if name else text for text in texts])
    return [" ".join(row) for row in zip(*columns, strict=True)]


def _text(item: Any) -> str:
    if not hasattr(item, "shape"):
        text = repr(item)
        return text if len(text) <= 40 else f"{text[:20]}...#{fmt.digest(text.encode())}"
    array = np.asarray(item)
    if array.ndim == 0:
        return str(array[()])
    return f"{array.dtype}{list(array.shape)}#{fmt.digest(array.tobytes())}"


def _some(values: Sequence[Any], most: int = 8) -> str:
    shown = ", ".join(map(str, values[:most])) or "none"
    return shown if len(values) <= most else f"{shown} and {len(values) - most} more"


def _story(schedule: Sequence[Part], number: int, at: int) -> str:
    lines = [
        f"  {'->' if i == number else '  '} {i + 1}. {part}" for i, part in enumerate(schedule)
    ]
    return "\n".join([*lines, f"  {at} batches were right before."])
