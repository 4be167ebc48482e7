"""Crashes at every place, in simulated worlds; and what the explorer notices."""

from __future__ import annotations

import random
from typing import Any

import pytest

from datarax_dist import publish, restore, retention
from datarax_dist.errors import StorageError
from datarax_dist.testing import MemoryBucket, MemoryStore, explorer, turns
from datarax_dist.testing import world as worlds

kinds = pytest.mark.parametrize("in_bucket", [False, True], ids=["file system", "bucket"])
again = pytest.mark.parametrize("again", [False, True], ids=["new step", "saved again"])


@pytest.mark.parametrize("first", range(0, 600, 100))
def test_random_worlds_hold_what_is_promised(first: int) -> None:
    tried = explorer.explore(range(first, first + 100))
    assert tried.worlds == 100
    assert tried.crashes > 15


@again
@kinds
def test_whichever_host_dies_and_wherever_the_promises_hold(in_bucket: bool, again: bool) -> None:
    tried = explorer.exhaust(2, in_bucket, again=again, most=1)
    assert tried.worlds > 40


@again
@kinds
def test_two_hosts_may_die_at_different_places(in_bucket: bool, again: bool) -> None:
    """A part of the pairs; `python -m datarax_dist.testing.explorer --exhaust` tries all."""
    assert explorer.exhaust(3, in_bucket, again=again, every=23).worlds > 40


@pytest.mark.parametrize("plans", explorer.meetings().values(), ids=explorer.meetings().keys())
@kinds
def test_two_jobs_take_turns_and_may_die(plans: list[worlds.Plan], in_bucket: bool) -> None:
    """A part of the orders; `python -m datarax_dist.testing.explorer --exhaust` tries more."""
    tried = explorer.interleave(plans, in_bucket, every=53, deaths=397)
    assert tried.worlds > (60 if plans[0].steps else 15)
    assert tried.crashes > 2


@kinds
def test_two_jobs_take_three_turns(in_bucket: bool) -> None:
    plans = explorer.meetings()["both save a step again"]
    assert explorer.interleave(plans, in_bucket, switches=3, every=47).worlds > 100


def test_a_world_is_the_same_each_time_on_greenlets_and_on_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traces = []
    plans = [
        worlds.Plan(3, [(1, False), (2, False)], 1, crashes={1: 9, 2: 30}),
        worlds.Plan(2, [(1, True)]),
    ]
    for _ in range(2):
        with worlds.World("one", True, random.Random(5).randrange, 5) as world:
            world.run(plans[:1])
            world.run(plans, [(0, 50), (1, 70), (0, 20)])
            world.finish()
        traces.append(world.scheduler.trace)
        monkeypatch.setattr(turns, "coroutine", turns._Thread)
        monkeypatch.setattr(turns, "current", turns._thread_here)
    assert traces[0] == traces[1]
    assert any("DIES" in line for _, line in traces[0])
    assert any(line == "-- job 1 stands still, job 2 moves" for _, line in traces[0])


@pytest.mark.parametrize("with_threads", [False, True])
def test_hosts_that_wait_for_ever_are_a_breach(
    monkeypatch: pytest.MonkeyPatch, with_threads: bool
) -> None:
    def for_ever(restorer: Any, *_: Any) -> None:
        while True:
            restorer._clock.sleep(60)

    monkeypatch.setattr(worlds.Restorer, "restore", for_ever)
    if with_threads:
        monkeypatch.setattr(turns, "coroutine", turns._Thread)
        monkeypatch.setattr(turns, "current", turns._thread_here)
    with pytest.raises(explorer.BreachError, match="does not come to an end"):
        explorer.explore([3])


def test_nothing_is_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryStore, "sync", lambda *_: None)
    with pytest.raises(explorer.BreachError, match=r"torn|damaged|missing"):
        explorer.exhaust(2, False, most=1)


def test_a_deletion_that_does_not_begin_with_the_marker(monkeypatch: pytest.MonkeyPatch) -> None:
    def delete(store: Any, step: int, name: str, *_: Any, **__: Any) -> bool:
        store.delete(name, last="COMMIT.json")
        return True

    monkeypatch.setattr(retention, "_delete_directory", delete)
    for in_bucket in (False, True):
        with pytest.raises(explorer.BreachError):
            explorer.exhaust(2, in_bucket, most=1)


def test_a_step_that_is_saved_again_and_does_not_step_aside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone(store: Any, staged: Any, void: bytes, check: Any) -> None:
        key = f"{staged.name}/COMMIT.json"
        store.replace(key, store.get(key), void)

    monkeypatch.setattr(publish, "_step_aside", gone)
    with pytest.raises(explorer.BreachError, match="step 1, of job 0, vanishes"):
        explorer.exhaust(2, True, again=True, most=1)


def test_a_marker_that_is_made_before_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = MemoryBucket.copy

    def early(bucket: MemoryBucket, source: str, destination: str, names: Any) -> None:
        for key, data in list(bucket.files.items()):
            if key.startswith(f"{source}/hosts/"):
                bucket.files[f"{destination}/COMMIT.json"] = data
        copy(bucket, source, destination, names)

    monkeypatch.setattr(MemoryBucket, "copy", early)
    with pytest.raises(explorer.BreachError):
        explorer.exhaust(2, True, most=1)


def test_a_restore_of_two_versions_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore, "has_moved", lambda *_: False)
    plans = explorer.meetings()["one restores the step that the other saves again"]
    with pytest.raises(explorer.BreachError, match="of several versions"):
        explorer.interleave(plans, True, switches=1)


def test_a_restore_that_fails_though_nobody_died(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise StorageError("it cannot be read")

    monkeypatch.setattr(worlds.Restorer, "restore", fail)
    with pytest.raises(explorer.BreachError, match="though nobody died: restore"):
        explorer.run_world(3)


@pytest.mark.parametrize("operation", ["create", "replace"])
def test_a_lost_reply_that_is_not_read_back(
    monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """Who makes a marker, and does not hear that it is made, must not take it for another's."""
    monkeypatch.setattr(MemoryBucket, "holds", lambda *_: False)
    with pytest.raises(explorer.BreachError, match="though nobody died: save"):
        explorer.exhaust(2, True, again=operation == "replace", most=0)


BUCKET_MEETINGS = [plans for plans in explorer.meetings().values() if plans[0].steps]


@pytest.mark.parametrize(
    "plans", BUCKET_MEETINGS, ids=[str(n) for n in range(len(BUCKET_MEETINGS))]
)
def test_requests_may_arrive_late(plans: list[worlds.Plan]) -> None:
    assert explorer.late(plans, every=29).worlds > 70


@pytest.mark.parametrize("unconditional", ["create", "delete_listed", "replace"])
def test_what_a_late_request_breaks_is_noticed(
    unconditional: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket that honours no condition when a request is late."""
    is_late = False
    honest = getattr(worlds.MemoryBucket, unconditional)
    arrive = worlds.World._arrive

    def act(files: Any, key: Any, *rest: Any, **more: Any) -> bool:
        if not is_late:
            return honest(files, key, *rest, **more)
        if unconditional != "delete_listed":
            files.files[key] = rest[-1]
        for entry in key if unconditional == "delete_listed" else ():
            if entry.key in files.files:
                del files.files[entry.key]
        return True

    def let_arrive(world: Any, until: float) -> None:
        nonlocal is_late
        is_late = True
        arrive(world, until)
        is_late = False

    monkeypatch.setattr(worlds.MemoryBucket, unconditional, act)
    monkeypatch.setattr(worlds.World, "_arrive", let_arrive)
    with pytest.raises(worlds.BreachError, match=r"\(late, of job"):
        explorer.late(explorer.meetings()["both save a step again"])


def test_random_worlds_lose_replies_of_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryBucket, "holds", lambda *_: False)
    with pytest.raises(explorer.BreachError, match="no reply came"):
        explorer.explore(range(1000))


def test_a_breach_is_told_with_its_world_and_what_happened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(explorer, "_plan", lambda *_: worlds.Plan(2, [(1, False)]))
    monkeypatch.setattr(worlds.World, "_contents", lambda world: dict.fromkeys(world.committed, 7))
    assert explorer.main(["--seed", "3"]) == 1
    told = capsys.readouterr().err.strip().splitlines()
    assert told[0].startswith("seed 3: a bucket")
    assert "job 0: 2 hosts; restores, saves step 1, keeps every step" in told
    assert any("host 0  create: lease/0000000001.json" in line for line in told)
    assert told[-1].startswith("seed 3 breaks a promise: steps of jobs {1: 7} where {1: ")
