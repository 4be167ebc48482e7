"""Each record exactly once: the property, and that a breach of it is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import loaders
import numpy as np
import pytest

from datarax_dist.data import DataAdapter, register_adapter, replay, shards, tracked
from datarax_dist.errors import InvalidArgumentError
from datarax_dist.testing import ExactlyOnceError, check_exactly_once


@pytest.mark.parametrize("name", loaders.TOYS)
def test_a_loader_of_ours_reads_each_record_once_whatever_happens(name: str) -> None:
    report = check_exactly_once(
        loaders.TOYS[name],
        hosts=(1, 2, 3, 4, 6, 12) if "step" in name else (1, 2, 3, 4, 6, 8),
        schedules=150,
        records=loaders.RECORDS,
    )
    assert report.resumes >= 2 * 140


@pytest.mark.parametrize("hosts", [(1, 5, 7), (7, 1, 5), (5, 7)])
def test_numbers_of_hosts_that_share_no_divisor(hosts: tuple[int, ...]) -> None:
    report = check_exactly_once(
        lambda host, hosts: shards(lambda s, n: loaders.Stream(s, n, 105), 35),
        hosts=hosts,
        schedules=40,
        records=105,
    )
    assert (report.batches, report.records) == (3, 105)


@pytest.mark.parametrize("hosts", [1, 2, 3, 4, 6, 8])
def test_an_opaque_loader_goes_on_with_the_same_number_of_hosts(hosts: int) -> None:
    check_exactly_once(loaders.Stream, hosts=(hosts,), schedules=30, records=loaders.RECORDS)


def test_one_cursor_for_any_number_of_hosts() -> None:
    def rows(host: int, hosts: int) -> Any:
        return tracked([np.arange(840 * k, 840 * k + 840)[host::hosts] for k in range(4)], 2)

    check_exactly_once(rows, hosts=range(1, 9), schedules=60, records=4 * 840)


@pytest.mark.parametrize("name", loaders.GRAIN)
def test_grain_reads_each_record_once_whatever_happens(name: str) -> None:
    report = check_exactly_once(
        loaders.GRAIN[name],
        hosts=(1, 2, 4) if name == "loader" else (1, 2, 3, 4, 6),
        schedules=40 if name == "loader" else 80,
        records=loaders.RECORDS,
    )
    assert report.resumes >= 2 * report.schedules - 10


def ahead(iterator: Any, depth: int) -> Any:
    """Reading ahead as it must not be done: the position is that of what was read, not used."""

    class Ahead:
        def __init__(self) -> None:
            self.waiting: list[Any] = []

        def __iter__(self) -> Iterator[Any]:
            return self

        def __next__(self) -> Any:
            while len(self.waiting) < depth:
                try:
                    self.waiting.append(next(iterator))
                except StopIteration:
                    break
            if not self.waiting:
                raise StopIteration
            return self.waiting.pop(0)

        def get_state(self) -> Any:
            return iterator.get_state()

        def set_state(self, state: Any) -> None:
            iterator.set_state(state)

    return Ahead()


class Buffered(loaders.Stream):
    """A shuffle buffer that is not in the position, as Hugging Face has it."""

    def __next__(self) -> Any:
        if not hasattr(self, "buffer"):
            self.buffer: list[Any] = []
        while len(self.buffer) < 3:
            try:
                self.buffer.append(super().__next__())
            except StopIteration:
                break
        if not self.buffer:
            raise StopIteration
        return self.buffer.pop()

    def get_state(self) -> Any:
        return super().get_state()


class ForgetsItsRandomness(loaders.Stream):
    def set_state(self, state: Any) -> None:
        self.at = state[0]


class BeginsAnew(loaders.Stream):
    """One that begins another epoch when it is set to the end of one."""

    def set_state(self, state: Any) -> None:
        super().set_state(state)
        self.at %= len(self.records)


class NeverTheSame(loaders.Stream):
    def get_state(self) -> Any:
        return {**super().get_state(), "draw": np.random.default_rng().integers(1 << 60)}


class ReadOnce(loaders.Stream):
    """One that tells the place where it was first asked for it, for ever."""

    cached: Any = None

    def get_state(self) -> Any:
        if self.cached is None and self.at:
            self.cached = super().get_state()
        return self.cached or super().get_state()


BREACHES: dict[str, tuple[Callable[[int, int], Any], tuple[int, ...], str]] = {
    "read ahead": (
        lambda host, hosts: shards(lambda s, n: ahead(loaders.Stream(s, n), 2), loaders.V),
        (1, 2),
        "is not the one of the uninterrupted run",
    ),
    "a lost buffer": (
        lambda host, hosts: shards(lambda s, n: Buffered(s, n), loaders.V),
        (1, 2),
        "The epoch ended after",
    ),
    "other randomness": (
        lambda host, hosts: shards(lambda s, n: ForgetsItsRandomness(s, n), loaders.V),
        (2, 4),
        "not in the epoch",
    ),
    "depends on the host": (
        lambda host, hosts: shards(lambda s, n: loaders.Stream((s + host) % n, n), loaders.V),
        (1, 2),
        "is not the one of the uninterrupted run",
    ),
    "another epoch after the end": (
        lambda host, hosts: BeginsAnew(host, hosts),
        (2,),
        "A restore followed by a save gives other bytes",
    ),
    "another epoch after its end was seen": (
        lambda host, hosts: loaders.Anew(host, hosts),
        (2,),
        "A restore failed.* does not say where it was set to",
    ),
    "a position that is never the same twice": (
        lambda host, hosts: NeverTheSame(host, hosts),
        (2,),
        "A restore followed by a save gives other bytes",
    ),
    "a position that is read once only": (
        lambda host, hosts: shards(ReadOnce, loaders.V),
        (1, 2),
        "is not the one of the uninterrupted run|The epoch ended after",
    ),
    "batches of other sizes on other hosts": (
        lambda host, hosts: tracked([np.arange(2 + host)], 0),
        (2, 2),
        "different numbers of records in one global batch: {0: 2, 1: 3}",
    ),
    "no batch at all": (lambda host, hosts: tracked([], 0), (2,), "no batch at all"),
    "parts of other lengths": (
        lambda host, hosts: tracked([{"id": np.arange(2), "text": ["a"]}], 0),
        (1, 1),
        "different numbers of records .id: 2, text: 1",
    ),
    "shards of unequal length": (
        lambda host, hosts: shards(lambda s, n: loaders.Stream(s, n, 50), loaders.V),
        (24, 2),
        "Hosts see different numbers of steps",
    ),
}


@pytest.mark.parametrize("name", BREACHES)
def test_a_breach_is_found_and_shown(name: str) -> None:
    factory, hosts, words = BREACHES[name]
    with pytest.raises(ExactlyOnceError, match=words) as caught:
        check_exactly_once(factory, hosts=hosts, schedules=60)
    text = str(caught.value)
    assert caught.value.schedule
    assert len(text.splitlines()) < 15


def numbers(shard: int, count: int) -> Any:
    return replay(lambda: iter(np.arange(shard, 16, count)[:, None]))


def test_the_story_of_a_breach_can_be_read() -> None:
    with pytest.raises(ExactlyOnceError) as caught:
        check_exactly_once(
            lambda host, hosts: shards(lambda s, n: ahead(numbers(s, n), 2), 4), hosts=(1, 2)
        )
    assert str(caught.value).splitlines() == [
        "Global batch 2 is not the one of the uninterrupted run.",
        "     1. 1 host: 0 committed, 1 lost",
        "     2. 2 hosts: 2 committed, 0 lost",
        "  -> 3. 1 host: to the end",
        "  2 batches were right before.",
        "  missing: 8, 9, 10, 11",
        "  unexpected: 12 (belongs to batch 3), 13 (belongs to batch 3), 14 (belongs to batch 3),"
        " 15 (belongs to batch 3)",
    ]


@pytest.mark.parametrize("schedules", [0, 10])
def test_a_breach_at_the_end_is_found_with_few_schedules(schedules: int) -> None:
    class Rewinds:
        """One whose position at its end is its beginning, which it says."""

        def __init__(self, host: int, hosts: int) -> None:
            self.k, self.rows = 0, slice(host, None, hosts)

        def __iter__(self) -> Iterator[Any]:
            return self

        def __next__(self) -> Any:
            if self.k == 6:
                raise StopIteration
            self.k += 1
            return np.arange(8 * self.k - 8, 8 * self.k)[self.rows]

        def get_state(self) -> int:
            return self.k % 6

        def set_state(self, state: int) -> None:
            self.k = state

    class RewindsAdapter(DataAdapter):
        kind = "global"

    register_adapter(f"{Rewinds.__module__}.{Rewinds.__qualname__}", RewindsAdapter)
    with pytest.raises(ExactlyOnceError, match="There is a global batch 6; the uninterrupted"):
        check_exactly_once(Rewinds, schedules=schedules, records=48)


def test_the_cuts_that_break_most_often_are_tried_always() -> None:
    report = check_exactly_once(lambda host, hosts: shards(numbers, 4), schedules=1)
    assert (report.schedules, report.resumes) == (14, 24)


def test_records_that_are_read_twice_in_the_first_place() -> None:
    with pytest.raises(ExactlyOnceError, match="more than once: 0, 1, 2"):
        check_exactly_once(
            lambda host, hosts: tracked([np.arange(3), np.arange(6)], 0), hosts=(1,), records=6
        )


def test_an_endless_loader_needs_a_number_of_steps() -> None:
    def endless(host: int, hosts: int) -> Any:
        return shards(lambda s, n: loaders.Stream(s, n, 1000), 4)

    report = check_exactly_once(endless, steps=20, schedules=40)
    assert (report.batches, report.records) == (20, 80)


def test_hosts_are_numbers() -> None:
    with pytest.raises(InvalidArgumentError, match="1 or more"):
        check_exactly_once(loaders.Stream, hosts=(0,))
