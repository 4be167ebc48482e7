"""Crashes at every place, in simulated worlds; and what the explorer notices."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest

from datarax_dist import attempts, lease, publish, restore, retention, save
from datarax_dist import format as fmt
from datarax_dist.errors import StorageError
from datarax_dist.request import SaveReport, SaveRequest
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


@kinds
def test_the_job_that_recovers_may_die_too(in_bucket: bool) -> None:
    """A part of the places; `python -m datarax_dist.testing.explorer --exhaust` tries more."""
    tried = explorer.recover(2, in_bucket, again=True, every=151)
    assert tried.worlds > 60
    assert tried.crashes > tried.worlds


def test_hosts_die_with_the_power_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    cuts, lose_power = [0], MemoryStore.lose_power

    def counted(store: MemoryStore) -> Any:
        cuts[0] += 1
        return lose_power(store)

    monkeypatch.setattr(MemoryStore, "lose_power", counted)
    tried = explorer.exhaust(2, False, most=1)
    assert 0 < cuts[0] <= tried.worlds - cuts[0]


def _nothing_happens(in_bucket: bool) -> None:
    """Jobs in whose way nobody is, and which restore, save, save again, keep two and delete."""
    with worlds.World("a plain run", in_bucket, lambda able: able - 1, 0) as world:
        world.run([worlds.Plan(2, [(1, False)])])
        world.run([worlds.Plan(3, [(1, True), (2, False)])])
        world.run([worlds.Plan(2, [(3, False), (4, False)], keep=2, deletes=[3])])
        assert [*world.committed] == [4]
        world.finish()


@kinds
def test_a_run_to_which_nothing_happens_is_as_it_was_told(in_bucket: bool) -> None:
    _nothing_happens(in_bucket)


def _with(function: Callable[..., Any], **told: Any) -> Callable[..., Any]:
    """The same function, which is told something else."""
    return lambda *given, **more: function(*given, **{**more, **told})


def _marked(**told: Any) -> Callable[[fmt.CommitMarker], bytes]:
    dump = fmt.dump_marker
    return lambda marker: dump(dataclasses.replace(marker, **told))


def _another_step(step: int, *told: Any) -> SaveReport:
    return SaveReport(step + 1, *told)


# What is broken, and what is told of it then
BROKEN: dict[str, tuple[object, str, Any, str]] = {
    "no positions": (
        worlds,
        "SaveRequest",
        _with(SaveRequest, positions={}),
        "step 1, of job 0, holds None as data/d/shard_00000-of-00002.json",
    ),
    "retention deletes nothing": (
        retention,
        "plan_retention",
        lambda *_, **__: [],
        r"\[1, 2, 3\] are kept, and \[\] reported as deleted: \[2, 3\] should be, and \[1\]",
    ),
    "deletions do nothing": (
        retention,
        "delete_step",
        lambda *_, **__: True,
        "step 3 is reported as deleted, and was there all the time",
    ),
    "another step is reported as saved": (
        save,
        "SaveReport",
        _another_step,
        "step 1 is saved, and reported as step 2",
    ),
    "another step is reported as restored": (
        restore,
        "RestoreReport",
        _with(restore.RestoreReport, step=7),
        r"hosts now \(7, 2, 3\): they are \(1, 2, 3\)",
    ),
    "a marker of no items": (fmt, "dump_marker", _marked(items=()), r"items \(1, 2, \(\)\)"),
    "a marker of another epoch": (fmt, "dump_marker", _marked(epoch=9), r"items \(9, 2, \('state"),
    "a marker of other bytes": (fmt, "dump_marker", _marked(bytes=1), "(its marker says|it has)"),
    "leases stay": (
        lease.Lease,
        "_delete_older",
        lambda *_: None,
        r"left over: \['lease/0000000001.json'\]",
    ),
    "notes of restores stay": (
        attempts,
        "_remove",
        lambda *_: None,
        r"1.restoring-\w+ is left, though the restores of job 1 have ended",
    ),
}


@kinds
@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_broken_is_noticed(
    broken: str, in_bucket: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name, instead, told = BROKEN[broken]
    monkeypatch.setattr(module, name, instead)
    with pytest.raises(explorer.BreachError, match=f"a plain run breaks a promise: .*{told}"):
        _nothing_happens(in_bucket)


def test_notes_of_restores_that_crashed_go_with_a_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "_ours", lambda *_: [])
    with pytest.raises(
        explorer.BreachError, match=r"is left, though job \d has restored that step"
    ):
        explorer.exhaust(2, False, most=1)


def test_hosts_that_restore_different_steps_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    restores = worlds.World._restore

    def differently(world: Any, job: Any, restorer: Any, group: Any) -> str:
        return f"{restores(world, job, restorer, group)}{' or so' if group.index else ''}"

    monkeypatch.setattr(worlds.World, "_restore", differently)
    with pytest.raises(explorer.BreachError, match="hosts of job 0 do not agree"):
        _nothing_happens(False)


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
