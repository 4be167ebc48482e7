"""One job at a time writes to a run, and one that has lost it can do no harm."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from jobs import Job, attempt, requests, whose

from datarax_dist import config, retention
from datarax_dist import format as fmt
from datarax_dist.errors import LeaseError
from datarax_dist.hosts import HostGroup
from datarax_dist.inspection import inspect_run
from datarax_dist.lease import Lease, newest_lease
from datarax_dist.save import Saver
from datarax_dist.storage import LocalStore
from datarax_dist.testing import FakeClock, MemoryBucket, MemoryStore, SimulatedHosts
from datarax_dist.testing.simulated import stepped
from datarax_dist.testing.turns import Job as Turn
from datarax_dist.testing.turns import Scheduler
from datarax_dist.writers import _process, writer_identity

TTL = 60.0
ELSEWHERE = {"machine": "another boot/pid:[1]", "pid": 7, "started": "1", "name": "far"}


class NoWallClock(FakeClock):
    """A clock that nobody may ask for the time of day. Others may act while somebody sleeps."""

    def __init__(self, while_asleep: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._while_asleep = while_asleep

    def now(self) -> float:
        raise AssertionError("clocks may be wrong by minutes")

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        self._while_asleep()


def lease(store: Any, clock: FakeClock | None = None, **more: Any) -> Lease:
    arguments: dict[str, Any] = {"ttl_seconds": TTL, "owner": ELSEWHERE, **more}
    return Lease(store, clock or NoWallClock(), **arguments)


def take(one: Lease) -> None:
    one.hold("run", lambda run, older, is_newest: None)


@pytest.fixture(params=[MemoryStore, MemoryBucket], ids=["file system", "bucket"])
def store(request: pytest.FixtureRequest) -> Any:
    return request.param()


def test_an_owner_that_is_alive_keeps_the_run_and_is_named(store: Any) -> None:
    owner = lease(store)
    take(owner)
    take(owner)
    assert owner.epoch == 1
    clock = NoWallClock(while_asleep=owner.renew)
    begin = clock.monotonic()
    with pytest.raises(LeaseError, match="process 7 on far") as caught:
        take(lease(store, clock))
    assert caught.value.owner == "process 7 on far (epoch 1)"
    assert clock.monotonic() - begin < 5, "at its first sign of life"
    owner.check()


def test_an_owner_whose_counter_stands_still_is_followed_without_a_person(store: Any) -> None:
    owner, clock = lease(store), NoWallClock()
    take(owner)
    begin = clock.monotonic()
    second = lease(store, clock)
    take(second)
    assert TTL < clock.monotonic() - begin < TTL + 5
    assert (owner.epoch, second.epoch) == (1, 2)
    second.check()
    for act in (owner.check, owner.renew, lambda: owner.announce(1, "0" * 8), lambda: take(owner)):
        with pytest.raises(LeaseError, match="has taken it over") as caught:
            act()
        assert caught.value.owner == "process 7 on far (epoch 2)"
    owner.release()
    second.check()
    second.renew()
    assert store.children(fmt.LEASE_NAME) == ["0000000002.json"]


def test_an_owner_that_dies_while_somebody_waits_is_followed(store: Any) -> None:
    owner = lease(store)
    take(owner)
    signs = iter(range(10))

    def live() -> None:
        if next(signs, None) is not None:
            owner.renew()

    second = lease(store, NoWallClock(live), wait_seconds=3600)
    take(second)
    assert second.epoch == 2


def test_who_waits_gets_the_run_as_soon_as_it_is_released(store: Any) -> None:
    owner = lease(store)
    take(owner)
    naps = itertools.count()
    clock = NoWallClock(lambda: owner.release() if next(naps) == 20 else owner.renew())
    begin = clock.monotonic()
    second = lease(store, clock, wait_seconds=3600)
    take(second)
    assert second.epoch == 2
    assert clock.monotonic() - begin < 15
    third = NoWallClock(second.renew)
    with pytest.raises(LeaseError):
        take(lease(store, third, wait_seconds=5 * TTL))
    assert 5 * TTL <= third.monotonic() - FakeClock().monotonic() < 5 * TTL + 5


def test_on_one_machine_a_running_owner_is_refused_and_a_dead_one_followed_at_once(
    store: Any,
) -> None:
    never = NoWallClock(lambda: pytest.fail("nobody needs to wait"))
    parent = {"pid": os.getppid(), "started": _process(os.getppid())[0]}
    take(lease(store, owner={**writer_identity(), **parent}))
    with pytest.raises(LeaseError):
        take(lease(store, never, owner=writer_identity()))
    gone = MemoryStore()
    take(lease(gone, owner={**writer_identity(), "started": "1"}))
    second = lease(gone, never)
    take(second)
    assert second.epoch == 2


def test_who_stood_still_itself_does_not_take_that_for_a_sign_of_death(store: Any) -> None:
    """The one that waits is stopped between its look at the lease and its look at the clock."""
    clock = NoWallClock()
    owner = lease(store, clock)
    take(owner)
    looks = 0

    class Stopped:
        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def get(self, key: str) -> bytes:
            nonlocal looks
            found: bytes = store.get(key)
            looks += 1
            if looks == 2:
                for _ in range(7):
                    clock.sleep(TTL / 6)
                    owner.renew()
            return found

    with pytest.raises(LeaseError, match="which is alive"):
        take(lease(Stopped(), clock, wait_seconds=TTL))
    assert looks > 2
    owner.check()


def test_a_lease_that_was_copied_with_its_run_runs_out(tmp_path: Path) -> None:
    run, copy = LocalStore(str(tmp_path / "run")), LocalStore(str(tmp_path / "copy"))
    os.makedirs(run.root)
    parent = {"pid": os.getppid(), "started": _process(os.getppid())[0]}
    take(lease(run, owner={**writer_identity(), **parent}))
    with pytest.raises(LeaseError, match="which is alive"):
        take(lease(run, owner=writer_identity()))
    shutil.copytree(run.root, copy.root)
    begin = (clock := NoWallClock()).monotonic()
    take(lease(copy, clock, owner=writer_identity()))
    assert TTL < clock.monotonic() - begin < TTL + 5


def test_what_this_process_could_not_release_does_not_lock_it_out(store: Any) -> None:
    take(lease(store, owner=writer_identity()))
    second = lease(store, NoWallClock(lambda: pytest.fail("nobody needs to wait")))
    take(second)
    assert second.epoch == 2


def test_of_many_that_want_a_run_one_gets_it() -> None:
    for store in (MemoryStore(), MemoryBucket()):
        take(lease(store, owner={**writer_identity(), "started": "1"}))
        together = threading.Barrier(8)

        def want(number: int, store: Any = store, barrier: Any = together) -> Any:
            owner = {**ELSEWHERE, "machine": "", "pid": number}
            mine = lease(store, owner=owner, clock=FakeClock())
            barrier.wait()
            return attempt(lambda: take(mine)), mine

        with ThreadPoolExecutor(8) as pool:
            ended = list(pool.map(want, range(8)))
        # With clocks that run at once, some may take it from others that show no sign of life.
        holding = [mine for how, mine in ended if how is None and attempt(mine.check) is None]
        assert len(holding) == 1


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100, fmt.seal({"run": "x"})])
def test_a_lease_that_cannot_be_read_runs_out(store: Any, content: bytes) -> None:
    store.put(fmt.lease_name(4), content)
    store.put(f"{fmt.LEASE_NAME}/notes.txt", b"somebody's")
    second = lease(store)
    take(second)
    assert second.epoch == 5
    second.renew()
    assert sorted(store.children(fmt.LEASE_NAME)) == ["0000000005.json", "notes.txt"]
    assert newest_lease(store).owner == ELSEWHERE  # type: ignore[union-attr]


def test_who_cannot_finish_taking_over_has_not_and_the_next_one_fences_again(store: Any) -> None:
    take(lease(store))
    fenced: list[list[int]] = []

    def fence(run: str, older: Any, is_newest: Any) -> None:
        fenced.append([one.epoch for one in older])
        if len(fenced) == 1:
            raise OSError("no")

    second = lease(store)
    with pytest.raises(OSError, match="no"):
        second.hold("run", fence)
    assert second.epoch == 0
    with pytest.raises(LeaseError):
        second.check()
    third = lease(store)
    third.hold("run", fence)
    assert fenced == [[1], [1, 2]]


def test_who_is_overtaken_while_it_takes_the_run_does_not_hold_it(store: Any) -> None:
    take(lease(store))
    third, told = lease(store), list[bool]()

    def overtaken(run: str, older: Any, is_newest: Callable[[], bool]) -> None:
        if not told:
            told.append(is_newest())
            take(third)
        told.append(is_newest())

    second = lease(store, NoWallClock(lambda: third.renew() if third.epoch else None))
    with pytest.raises(LeaseError, match="epoch 3"):
        second.hold("run", overtaken)
    assert (second.epoch, third.epoch, told) == (0, 3, [True, False])


def test_several_deletions_at_once_all_stand_in_the_lease(store: Any) -> None:
    one = lease(store)
    take(one)
    for step in (1, 2, 3):
        one.announce(step, fmt.digest(b"marker"))
    found = newest_lease(store)
    assert found is not None
    assert [step for step, _ in found.deleting] == [1, 2, 3]


# Jobs


def job(name: str, store: Any, seen: Any = None, clock: FakeClock | None = None) -> Job:
    clock = clock or FakeClock()
    owner = {**ELSEWHERE, "name": name}
    return Job(
        name, seen or store, Lease(seen or store, clock, ttl_seconds=TTL, owner=owner), clock
    )


def test_the_epoch_stands_in_each_marker(store: Any) -> None:
    first = job("first", store)
    first.save(1)
    first.save(2)
    assert first.lease is not None
    first.lease.release()
    job("second", store).save(3)
    found = {c.step: c.marker.epoch for c in inspect_run(store).candidates if c.marker}
    assert found == {1: 1, 2: 1, 3: 2}


ACTS: dict[str, Callable[[Job], Any]] = {
    "waits": lambda one: "saved",
    "saves 5": lambda one: one.save(5),
    "saves 4 again": lambda one: one.save(4, replace=True),
    "saves 5, retires": lambda one: one.save(5, keep=config.latest(1)),
    "deletes 4": lambda one: retention.delete_step(one.store, 4, now=0.0, lease=one.lease),
    "saves 4 again, retires": lambda one: one.save(4, replace=True, keep=config.latest(1)),
}


def stopped_before_each(
    kind: Callable[[], Any],
    act: str,
    then: str,
    prepare: Callable[[Any], None] = lambda files: None,
) -> Iterator[tuple[str, Any, Mapping[int, str], Any]]:
    """Yields, for each operation before which the first job stood still until the second one had
    taken the run and acted: the store, what the second one left, and how the first one ended.
    """
    for number in itertools.count():
        files = kind()
        old = job("old", files)
        for step in (3, 4):
            old.save(step)
        assert old.lease is not None
        old.lease.release()
        prepare(files)
        left: list[Any] = []
        holds: list[bool] = []
        operations = itertools.count()

        def before(
            _: int,
            files: Any = files,
            at: int = number,
            left: Any = left,
            holds: Any = holds,
            operations: Any = operations,
        ) -> None:
            if not holds or left or next(operations) != at:
                return
            second = job("second", files)
            assert second.lease is not None
            saver_takes(second)
            left.append(whose(files))
            left.append(attempt(lambda: ACTS[then](second)))
            left.append(whose(files))

        seen = requests(files, before)
        first = job("first", files, seen)
        saver_takes(first)
        holds.append(True)
        result = attempt(lambda: ACTS[act](first))  # noqa: B023 - called here
        if not left:
            return
        yield f"before {number}: {result!r}; {left}", files, left[2], result


def saver_takes(one: Job) -> None:
    """Takes the run, as the first save does, but for the time it takes: nobody else moves."""
    assert one.lease is not None
    run = fmt.parse_run(one.store.get(fmt.RUN_NAME))
    one.lease.hold(
        run, lambda run, older, newest: retention.fence(one.store, run, older, 0.0, newest)
    )


def test_the_other_hosts_wait_as_long_as_the_primary_may_wait_for_the_run() -> None:
    store, clock = MemoryStore(), FakeClock()
    take(lease(store))
    options = config.Options(exchange_timeout_seconds=5, lease_ttl_seconds=60)

    def host(group: HostGroup) -> int:
        group._clock = clock
        mine = lease(store, clock, owner=writer_identity()) if group.is_primary else None
        saver = Saver(store, group, clock, options, None, mine)
        saver.take(1)
        return saver.lease.epoch

    assert SimulatedHosts(2).run(host) == [2, 0]


def test_what_is_announced_while_another_job_takes_the_run_is_not_deleted() -> None:
    """The owner stands still before each of its requests; the other one takes the run as far as to
    each of its own; the owner goes on for some requests, and then the other one ends.
    """

    def run(*turns: tuple[int, float]) -> tuple[list[int], bool]:
        """Returns how many requests each made, and whether the other one got the run."""
        found = [dict[int, str]()]
        files, clock = MemoryBucket(), FakeClock()
        first, second = (
            Lease(files, clock, ttl_seconds=1.0, owner={**ELSEWHERE, "name": name})
            for name in ("owner", "other")
        )
        owner = Job("owner", files, first, clock)
        for step in (3, 4):
            owner.save(step)

        def deletes(_: int) -> None:
            with contextlib.suppress(LeaseError):
                retention.delete_step(store, 4, now=0.0, lease=first)

        def takes(_: int) -> None:
            with contextlib.suppress(LeaseError):
                saver_takes(Job("other", store, second, clock))
                found.append(whose(files))

        scheduler = Scheduler(lambda able: 0)
        first._store = second._store = store = stepped(files, scheduler.step)
        ran = scheduler.run([Turn(deletes), Turn(takes)], turns)
        assert [one.results for one in ran] == [[None], [None]]
        if found[1:]:
            assert whose(files) == found[1], turns
        return [len(one.moves) for one in ran], len(found) > 1

    (most, others), _ = run((0, 1000))
    taken = 0
    for begin, middle, then in itertools.product(range(most), range(others), range(5)):
        _, is_taken = run((0, begin), (1, middle), (0, then))
        taken += is_taken
    assert taken > 100


def test_a_copy_that_comes_while_its_step_is_deleted_is_not_deleted_for_who_has_lost_the_run() -> (
    None
):
    files, clock = MemoryBucket(), FakeClock()
    owner, other = job("owner", files, clock=clock), job("other", files, clock=clock)
    for step in (3, 4):
        owner.save(step)
    saved = [(key, data) for key, data in files.files.items() if key.startswith("4/")]
    deleted: list[str] = []

    def act(what: str, changes: bool) -> None:
        if what.startswith("delete: 4/"):
            deleted.append(what)
        elif deleted and whose(files) == {3: "owner"}:
            for key, data in saved:  # by a job that had lost the run before
                files.files[key.replace("4/", fmt.aside_name(4, "replaced", "a" * 16) + "/")] = data
            saver_takes(other)

    assert owner.lease is not None
    with pytest.raises(LeaseError):
        retention.delete_step(stepped(files, act), 4, now=0.0, lease=owner.lease)
    assert whose(files) == {3: "owner", 4: "owner"}


@pytest.mark.parametrize("act", ["deletes 4", "saves 5, retires"])
def test_who_has_lost_the_run_deletes_no_step_that_is_a_copy(act: str) -> None:
    """The step was about to be replaced in a bucket, by a job that has died."""

    def step_aside(bucket: MemoryBucket) -> None:
        names = [entry.key.removeprefix("4/") for entry in bucket.list("4")]
        bucket.copy("4", fmt.aside_name(4, "replaced", "a" * 16), names)
        run = fmt.parse_run(bucket.get(fmt.RUN_NAME))
        bucket.files["4/COMMIT.json"] = fmt.dump_void(run, 4, "b" * 16, 0.0)

    tried = 0
    stopped = stopped_before_each(MemoryBucket, act, "waits", step_aside)
    for told, files, left, _ in stopped:
        tried += 1
        assert whose(files) == left, told
    assert tried > 10


@pytest.mark.parametrize("then", ["waits", "saves 5", "saves 4 again", "saves 5, retires"])
@pytest.mark.parametrize("act", [act for act in ACTS if act != "waits"])
def test_who_has_lost_the_run_commits_nothing_and_deletes_nothing(
    store: Any, act: str, then: str
) -> None:
    tried = 0
    for told, files, left, result in stopped_before_each(type(store), act, then):
        tried += 1
        assert whose(files) == left, told
        assert isinstance(result, Exception) or result in ("saved", True, False), told
        # Whoever comes next finds nothing in the way, and nothing is left.
        late = job("late", files)
        assert late.save(99) == late.save(5, replace=True) == "saved", told
        states = {c.state for c in inspect_run(files).candidates}
        assert states <= {"committed", "void"}, told
        assert {**whose(files), 5: "late", 99: "late"} == {**left, 5: "late", 99: "late"}, told
    assert tried > 15
