"""The protocols over hosts and a store in memory: fast, and at every phase."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from datarax_dist import config, retention, telemetry
from datarax_dist import format as fmt
from datarax_dist import restore as restore_module
from datarax_dist.clock import SystemClock
from datarax_dist.errors import (
    CheckpointError,
    CorruptStepError,
    PeerError,
    PeerLostError,
    StepExistsError,
    StorageError,
    StructureMismatchError,
)
from datarax_dist.hosts import HostGroup
from datarax_dist.inspection import (
    files_to_verify,
    inspect_run,
    read_records,
    verify_files,
)
from datarax_dist.request import SaveRequest
from datarax_dist.restore import Restorer
from datarax_dist.save import Saver
from datarax_dist.telemetry import Phases
from datarax_dist.testing import MemoryArrays, MemoryBucket, MemoryStore, SimulatedHosts, fail_at

STORES = [MemoryStore, MemoryBucket]
stores = pytest.mark.parametrize("make", STORES, ids=["file system", "bucket"])
OPTIONS = config.Options(exchange_timeout_seconds=20, save_timeout_seconds=20)


def save(
    store: Any,
    group: HostGroup,
    step: int,
    keep: Any = None,
    content: bytes = b"x",
    replace: bool = False,
    options: config.Options = OPTIONS,
) -> Any:
    phases = Phases("save", group.index)
    saver = Saver(store, group, SystemClock(), options, keep)
    request = SaveRequest(
        step=step,
        writer=MemoryArrays(store, group.index, {"a": content * (group.index + 1)}),
        positions={f"data/d/shard_{group.index:05d}-of-{group.count:05d}.json": b"{}"},
        shared={"TREE.json": b"{}"},
        items=("state",),
    )
    return saver.begin(step, lambda: request, phases, replace=replace).finish()


def whole(store: Any, step: int) -> bool:
    marker = next(c.marker for c in inspect_run(store).candidates if c.step == step and c.marker)
    assert marker is not None
    name = next(c.name for c in inspect_run(store).candidates if c.step == step and c.marker)
    files = read_records(store, name, marker.records, marker.run, step)
    return not verify_files(store, name, files, "full")


def test_a_host_that_does_not_come_is_named() -> None:
    def one(group: HostGroup) -> Any:
        return None if group.index == 1 else group.exchange("vote", 1, timeout_seconds=0.2)

    first, _, third = SimulatedHosts(3).run(one)
    for error in (first, third):
        assert isinstance(error, PeerLostError)
        assert error.missing == [1]
        assert "missing: host 1" in str(error)
        assert "arrived: hosts 0, 2" in str(error)


@pytest.mark.parametrize("hosts", [1, 2, 3])
def test_the_marker_is_the_last_object_written_and_everything_before_it_is_synced(
    hosts: int,
) -> None:
    store = MemoryStore()
    reports = SimulatedHosts(hosts).run(lambda group: save(store, group, 7))
    assert [report.step for report in reports] == [7] * hosts
    assert store.log[-1] == ("rename", "7")
    assert store.log[-2][0] == "create"
    assert store.log[-2][1].endswith("/COMMIT.json")
    arrays = [key for key in store.files if "/state/" in key]
    synced = {key.split("/", 1)[1] for action, key in store.log if action == "sync"}
    assert {key.split("/", 1)[1] for key in arrays} <= synced
    assert whole(store, 7)


@stores
@pytest.mark.parametrize("host", [0, 1, 2])
@pytest.mark.parametrize("phase", telemetry.SAVE_PHASES)
def test_an_error_at_any_phase_commits_nothing_or_everything_and_the_next_save_works(
    phase: str, host: int, make: Any
) -> None:
    store = make()
    hosts = SimulatedHosts(3)
    assert all(r.step == 1 for r in hosts.run(lambda group: save(store, group, 1)))
    with fail_at(phase, host, OSError(5, "Input/output error")):
        results = hosts.run(lambda group: save(store, group, 2, config.latest(1)))
    # A primary that fails after the marker is durable says so; the step is there all the same.
    steps = inspect_run(store).committed
    failed = [isinstance(result, Exception) for result in results]
    assert all(failed) or not any(failed)
    assert max(steps) == (1 if all(failed) and phase != "save:committed" else 2)
    assert all(whole(store, step) for step in steps)
    for result in results:
        if isinstance(result, Exception):
            assert isinstance(result, PeerError)
            assert "Input/output error" in str(result)
            assert list(result.failures) == [host]
    assert all(r.step == 3 for r in hosts.run(lambda group: save(store, group, 3)))
    assert whole(store, 3)
    assert leftovers(store) == []


@stores
@pytest.mark.parametrize("steps", [(5, 5), (5, 6)], ids=["same step", "other step"])
def test_a_second_writer_never_damages_what_the_first_has_committed(
    steps: tuple[int, int], make: Any
) -> None:
    for _ in range(40):
        store = make()
        start = threading.Barrier(2)

        def one(step: int, store: Any = store, start: Any = start) -> Any:
            group = SimulatedHosts(1).groups[0]
            start.wait()
            try:
                return save(store, group, step)
            except CheckpointError as error:
                return error

        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(one, steps))
        reported = {result.step for result in results if not isinstance(result, Exception)}
        assert reported == set(inspect_run(store).committed)
        assert all(whole(store, step) for step in reported)
        if steps[0] == steps[1]:
            assert sum(not isinstance(result, Exception) for result in results) <= 1


@stores
@pytest.mark.parametrize("change", ["new step", "retention", "replacement"])
def test_a_crash_and_power_cut_after_any_write_loses_no_committed_step_and_is_tidied_up(
    change: str, make: Any
) -> None:
    """Every host stops at the n-th write, for each n until the save gets through."""
    for number in range(1000):
        store = make()
        hosts = SimulatedHosts(2)
        hosts.run(lambda group, store=store: save(store, group, 1))
        store.crash_after(number)
        step, keep = (1 if change == "replacement" else 2), None
        if change == "retention":
            keep = config.latest(1)
        results = hosts.run(
            lambda group, store=store, step=step, keep=keep: save(
                store, group, step, keep, b"y", replace=change == "replacement"
            )
        )
        crashed = store.crashed
        store.crash_after(None)
        store.lose_power()
        committed = inspect_run(store).committed
        assert committed, f"nothing is left after a crash at write {number}"
        assert all(whole(store, step) for step in committed)
        if all(not isinstance(result, Exception) for result in results):
            assert max(committed) == step, "a save that was reported is lost"
            assert content_of(store, step) == b"y"
        if change == "new step":
            assert 1 in committed
        again = SimulatedHosts(2).run(lambda group, store=store: save(store, group, 3))
        assert [result.step for result in again] == [3, 3]
        assert whole(store, 3)
        assert leftovers(store) == [], f"left over after a crash at write {number}"
        if not crashed:
            assert number > 10
            return
    raise AssertionError("the save never got through")


def leftovers(store: Any) -> list[tuple[str, str]]:
    """What is neither a step nor a void marker alone, which in a bucket stays for a day, as this
    process, whose save it stops, is alive.
    """
    found = inspect_run(store).candidates
    return [(c.name, c.state) for c in found if c.state not in ("committed", "void")]


def content_of(store: Any, step: int) -> bytes:
    name = next(c.name for c in inspect_run(store).candidates if c.step == step and c.marker)
    return store.get(f"{name}/state/ocdbt.process_0/a")


def restore(
    store: Any,
    group: HostGroup,
    load: Any = None,
    level: str = "full",
    options: config.Options = OPTIONS,
) -> Any:
    options = dataclasses.replace(options, verify_on_restore=level)
    restorer = Restorer(store, group, options)
    default = lambda candidate, _: lambda: candidate.step
    found = restorer.restore(None, load or default, Phases("restore", group.index))
    return None if found is None else (found[0], dict(found[1].refused))


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("shorter", [False, True], ids=["other content", "shorter"])
@pytest.mark.parametrize("many", [False, True], ids=["few hosts", "many hosts"])
@pytest.mark.parametrize("make", [MemoryStore, MemoryBucket], ids=["file system", "bucket"])
def test_damage_that_one_host_sees_makes_all_take_the_older_step(
    victim: int, shorter: bool, make: Any, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a bucket that many hosts have written to, each looks at its own files only."""
    if many:
        monkeypatch.setattr(restore_module, "_FEW_HOSTS", 0)
    store = make()
    hosts = SimulatedHosts(3)
    for step in (1, 2):
        hosts.run(lambda group, step=step: save(store, group, step))
    key = f"2/state/ocdbt.process_{victim}/a"
    store.files[key] = b"y" * (len(store.files[key]) - shorter)
    results = hosts.run(lambda group: restore(store, group))
    assert [step for step, _ in results] == [1, 1, 1]
    for _, refused in results:
        assert key[2:] in refused["step 2"]


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_host_verifies_what_its_loader_has_taken_for_itself_only_once(victim: int) -> None:
    """Who takes the files that are still to be verified answers for them; the others' are not."""
    store = MemoryStore()
    hosts = SimulatedHosts(3)
    hosts.run(lambda group: save(store, group, 1))
    key = f"1/state/ocdbt.process_{victim}/a"
    store.files[key] = b"y" * len(store.files[key])

    def on(group: HostGroup) -> Any:
        def load(candidate: Any, unverified: Any) -> Any:
            if group.index == victim:
                assert key in [f"1/{entry.path}" for entry in unverified.take()]
                assert unverified.take() == []
            return lambda: candidate.step

        return restore(store, group, load)

    assert [step for step, _ in hosts.run(on)] == [1, 1, 1]


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("damaged", [True, False], ids=["damaged", "not damaged"])
def test_what_one_host_cannot_load_is_judged_by_all(victim: int, damaged: bool) -> None:
    """A checksum of the arrays' own makes all take the older step. Anything else, with files that
    are as recorded, is an error on all: going back would be the wrong answer.
    """
    store = MemoryStore()
    hosts = SimulatedHosts(3)
    applied = []
    for step in (1, 2):
        hosts.run(lambda group, step=step: save(store, group, step))

    def on(group: HostGroup) -> Any:
        def load(candidate: Any, _: Any) -> Any:
            if candidate.step == 2 and group.index == victim:
                text = "DATA_LOSS: Digest mismatch" if damaged else "more than the limit"
                raise StorageError(text, errno=None)
            return lambda: applied.append(candidate.step) or candidate.step

        return restore(store, group, load)

    results = hosts.run(on)
    if damaged:
        assert [step for step, _ in results] == [1, 1, 1]
        assert applied == [1, 1, 1], "nothing of step 2 was applied on any host"
        assert all("DATA_LOSS" in refused["step 2"] for _, refused in results)
    else:
        assert all("more than the limit" in str(result) for result in results)
        assert applied == []


@pytest.mark.parametrize("victim", [0, 2])
def test_a_target_that_does_not_fit_on_one_host_changes_nothing_on_any(victim: int) -> None:
    store = MemoryStore()
    hosts = SimulatedHosts(3)
    hosts.run(lambda group: save(store, group, 1))
    applied = []

    def on(group: HostGroup) -> Any:
        def load(candidate: Any, _: Any) -> Any:
            if group.index == victim:
                raise StructureMismatchError("no", missing=["a"], unexpected=[], changed={})
            return lambda: applied.append(group.index)

        return restore(store, group, load)

    results = hosts.run(on)
    kinds = {type(result) for result in results}
    assert kinds <= {StructureMismatchError, PeerError} and len(results) == 3
    assert applied == []


def test_what_another_run_or_anybody_else_has_left_is_never_removed() -> None:
    store = MemoryStore()
    claim = fmt.StepClaim("f" * 32, 9, "0" * 16, 1, {}, 0.0)
    theirs = {
        "9.staging-0123456789abcdef/STEP.json": fmt.dump_claim(claim),
        "9.staging-0123456789abcdef/state/x": b"x",
        "8/STEP.json": fmt.dump_claim(claim),
        "7/notes.txt": b"mine",
        "6.deleting-0123456789abcdef/keep": b"no claim",
        "5.orbax-checkpoint-tmp-1/x": b"x",
        "tensorboard/events": b"x",
    }
    store.files.update(theirs)
    hosts = SimulatedHosts(2)
    for step in (1, 2):
        results = hosts.run(lambda group, step=step: save(store, group, step, config.latest(1)))
        assert [result.step for result in results] == [step, step]
    hosts.run(lambda group: restore(store, group))
    assert {key: data for key, data in store.files.items() if key in theirs} == theirs
    assert inspect_run(store).committed == [2]


def test_a_file_that_no_host_wrote_or_that_has_changed_its_size_stops_the_commit() -> None:
    for change in ("extra", "missing", "grown"):
        store = MemoryStore()
        hosts = SimulatedHosts(2)

        def meddle(phase: str, host: int, store: MemoryStore = store, change: str = change) -> None:
            if phase != "save:verify":
                return
            [key] = [key for key in store.files if key.endswith("process_1/a")]
            if change == "extra":
                store.files[f"{key}-more"] = b"x"
            elif change == "missing":
                del store.files[key]
            else:
                store.files[key] += b"x"

        remove = telemetry.observe(meddle)
        try:
            results = hosts.run(lambda group, store=store: save(store, group, 1))
        finally:
            remove()
        assert all("process_1/a" in str(result) for result in results), change
        assert inspect_run(store).committed == []


def test_a_writer_whose_staging_is_being_removed_does_not_commit_what_is_left_of_it() -> None:
    """Another job takes it for a leftover, and gets no further than its first write."""
    store = MemoryStore()
    hosts = SimulatedHosts(1)
    hosts.run(lambda group: save(store, group, 1))

    def meddle(phase: str, host: int) -> None:
        if phase == "save:publish":
            run = inspect_run(store).run
            store.crash_after(1)
            retention.remove_leftovers(store, retention.find_leftovers(store, run))
            store.crash_after(None)

    remove = telemetry.observe(meddle)
    try:
        [result] = hosts.run(lambda group: save(store, group, 2))
    finally:
        remove()
    assert "Only one job at a time" in str(result)
    assert inspect_run(store).committed == [1]


def test_a_deletion_that_is_cut_never_brings_back_what_the_step_was_before() -> None:
    for number in range(1000):
        store = MemoryStore()
        hosts = SimulatedHosts(1)
        hosts.run(lambda group, store=store: save(store, group, 1))

        def cut(phase: str, host: int, store: MemoryStore = store) -> None:
            if phase == "save:committed":
                store.crash_after(0)  # the new step is there, and the old one still beside it

        remove = telemetry.observe(cut)
        hosts.run(lambda group, store=store: save(store, group, 1, content=b"y", replace=True))
        remove()
        store.crash_after(None)
        assert any(".replaced-" in key for key in store.files)
        store.crash_after(number)
        store.crashed = False
        try:
            retention.delete_step(store, 1, now=0.0)
        except StorageError:
            assert store.crashed
        store.crash_after(None)
        if inspect_run(store).committed:
            assert content_of(store, 1) == b"y", f"after a crash at write {number}"
        if not store.crashed:
            assert number > 5
            assert inspect_run(store).committed == []
            return
    raise AssertionError("the deletion never got through")


@pytest.mark.parametrize(("saved", "now"), [(1, 4), (2, 5), (3, 3), (5, 2), (4, 1), (3, 7)])
def test_every_file_is_verified_by_one_host_whatever_their_number(saved: int, now: int) -> None:
    store = MemoryStore()
    SimulatedHosts(saved).run(lambda group: save(store, group, 1))
    [candidate] = inspect_run(store).candidates
    assert candidate.marker is not None
    shares = [files_to_verify(store, "1", candidate.marker, host, now) for host in range(now)]
    paths = [entry.path for share in shares for entry in share]
    assert len(set(paths)) == len(paths)
    records = {entry.path for entry in candidate.marker.records}
    everything = {entry.key[2:] for entry in store.list("1")} - records - {"COMMIT.json"}
    assert set(paths) == everything


def test_a_root_that_is_another_directory_on_each_host_is_noticed() -> None:
    stores = [MemoryStore(), MemoryStore()]
    for store in stores:
        SimulatedHosts(1).run(lambda group, store=store: save(store, group, 1))
    results = SimulatedHosts(2).run(lambda group: restore(stores[group.index], group))
    for result in results:
        assert isinstance(result, CorruptStepError)
        assert "one file system for all hosts" in str(result)
    results = SimulatedHosts(2).run(lambda group: save(stores[group.index], group, 2))
    assert all("shared by all hosts" in str(result) for result in results)
    assert [inspect_run(store).committed for store in stores] == [[1], [1]]


def test_hosts_that_ask_for_different_steps_are_refused() -> None:
    store = MemoryStore()
    hosts = SimulatedHosts(2)
    for step in (1, 2):
        hosts.run(lambda group, step=step: save(store, group, step))

    def on(group: HostGroup) -> Any:
        restorer = Restorer(store, group, OPTIONS)
        phases = Phases("restore", group.index)
        return restorer.restore(1 + group.index, lambda candidate, _: lambda: None, phases)

    for result in hosts.run(on):
        assert "every host must restore the same one" in str(result)


def test_retention_never_takes_the_step_that_was_just_saved() -> None:
    assert retention.plan_retention([5, 10, 20], config.latest(2), saved=5) == []
    assert retention.plan_retention([5, 10, 20], config.latest(1), saved=5) == [10]


def test_a_step_that_has_only_its_old_name_can_be_deleted() -> None:
    store = MemoryStore()
    SimulatedHosts(1).run(lambda group: save(store, group, 7))
    store.rename("7", "7.replaced-0123456789abcdef")
    assert inspect_run(store).committed == [7]
    retention.delete_step(store, 7, now=0.0)
    assert inspect_run(store).committed == []
    assert list(store.files) == ["RUN.json"]


@stores
@pytest.mark.parametrize("key", ["2/COMMIT.json", "2/hosts/host_00000-of-00001.json"])
@pytest.mark.parametrize(("number", "taken"), [(5, 1), (13, None), (110, None)])
def test_a_record_that_can_never_be_read_is_damage_and_one_that_cannot_be_read_now_is_not(
    make: Any, key: str, number: int, taken: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make()
    hosts = SimulatedHosts(1)
    for step in (1, 2):
        hosts.run(lambda group, step=step: save(store, group, step))
    get = store.get

    def refuse(asked: str) -> bytes:
        if asked == key:
            raise StorageError("no", errno=number)
        return bytes(get(asked))

    monkeypatch.setattr(store, "get", refuse)
    [result] = SimulatedHosts(1).run(lambda group: restore(store, group))
    if taken is None:
        assert isinstance(result, StorageError)
    else:
        assert result[0] == taken


def test_a_step_that_another_writer_commits_while_room_is_made_for_ours_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a bucket: the other one commits between our look and the void marker."""
    store = MemoryBucket()
    SimulatedHosts(1).run(lambda group: save(store, group, 5))
    before = dict(store.files)
    looked = lambda store, name, names=None: False
    monkeypatch.setattr("datarax_dist.publish.is_committed", looked)
    [result] = SimulatedHosts(1).run(lambda group: save(store, group, 5))
    assert isinstance(result, CheckpointError)
    assert before.items() <= store.files.items()
    assert whole(store, 5)


def test_of_two_writers_that_both_find_room_for_one_step_the_first_to_claim_it_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = MemoryBucket()
    SimulatedHosts(1).run(lambda group: save(store, group, 5))
    monkeypatch.setattr("datarax_dist.save.check_free", lambda *_: False)
    monkeypatch.setattr("datarax_dist.publish._make_room", lambda *_: None)
    [result] = SimulatedHosts(1).run(lambda group: save(store, group, 5))
    assert isinstance(result, CheckpointError)
    assert whole(store, 5)


def test_a_listing_that_was_damaged_on_its_way_is_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = MemoryBucket()
    SimulatedHosts(1).run(lambda group: save(store, group, 5))
    marker = inspect_run(store).candidates[0].marker
    assert marker is not None
    files = read_records(store, "5", marker.records, marker.run, 5)
    listing, asked = store.list, itertools.count()

    def lacking(prefix: str) -> Any:  # the first one lacks a file
        return listing(prefix)[: -1 if next(asked) == 0 else None]

    monkeypatch.setattr(store, "list", lacking)
    assert verify_files(store, "5", files, "sizes") == {}
    assert next(asked) == 2


@pytest.mark.parametrize("seen", [["4/", "RUN.json"], ["4/", "7/", "RUN.json"], []])
def test_a_listing_that_was_damaged_on_its_way_hides_no_step(
    seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryBucket()
    job(store, 4)
    job(store, 5)
    children, asked = store.children, itertools.count()

    def damaged(prefix: str) -> list[str]:
        return seen if prefix == "" and next(asked) == 0 else children(prefix)

    monkeypatch.setattr(store, "children", damaged)
    assert inspect_run(store).committed == [4, 5]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_save_is_not_failed_by_a_listing_that_was_damaged_on_its_way(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the primary compares with the records: of what is staged, and of the step."""
    store = MemoryBucket()
    listing, compared = store.list, itertools.count()

    def lacking(prefix: str) -> Any:
        found = listing(prefix)
        whole_step = prefix == "5" or "hosts/host_00000-of-00001.json" in str(found)
        return found[:-1] if whole_step and next(compared) == number else found

    monkeypatch.setattr(store, "list", lacking)
    [report] = SimulatedHosts(1).run(lambda group: save(store, group, 5))
    assert not isinstance(report, Exception), report
    monkeypatch.undo()
    assert whole(store, 5)


def test_a_copy_that_is_not_whole_is_not_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryBucket()
    copy = store.copy
    monkeypatch.setattr(
        store, "copy", lambda source, destination, names: copy(source, destination, names[:-1])
    )
    [result] = SimulatedHosts(1).run(lambda group: save(store, group, 5))
    assert isinstance(result, StorageError)
    assert "5/COMMIT.json" not in store.files


def half_published(store: MemoryBucket) -> str:
    """Leaves what a save of step 5 leaves that ended while it was copied; returns the run."""
    SimulatedHosts(1).run(lambda group: save(store, group, 5))
    run = inspect_run(store).run
    assert run is not None
    store.delete("5/COMMIT.json")
    return run


def test_a_save_whose_leftovers_were_removed_cannot_commit_after_all() -> None:
    store = MemoryBucket()
    run = half_published(store)
    [left] = retention.find_leftovers(store, run)
    assert retention.remove_leftovers(store, [left], run=run, now=0.0) == ["5"]
    assert [entry.key for entry in store.list("5")] == ["5/COMMIT.json"]
    assert not store.create("5/COMMIT.json", b"the marker of the save that was believed dead")
    assert inspect_run(store).committed == []


def test_a_void_marker_alone_stays_for_a_day() -> None:
    store = MemoryBucket()
    run = half_published(store)
    retention.remove_leftovers(store, retention.find_leftovers(store, run), run=run, now=1000.0)
    soon, late = 1000.0 + 3600, 1000.0 + 25 * 3600
    assert retention.find_leftovers(store, run, now=soon) == []
    [found] = retention.find_leftovers(store, run, now=late)
    retention.remove_leftovers(store, [found], run=run, now=late)
    assert store.list("5") == []


def meanwhile(monkeypatch: pytest.MonkeyPatch, store: Any, method: str, act: Any) -> None:
    """Lets something happen the first time that a method of the store is about to run."""
    original, first = getattr(store, method), itertools.count()

    def stalled(*arguments: Any, **more: Any) -> Any:
        if next(first) == 0:
            act()
        return original(*arguments, **more)

    monkeypatch.setattr(store, method, stalled)


def job(store: Any, step: int, **more: Any) -> Any:
    [result] = SimulatedHosts(1).run(lambda group: save(store, group, step, **more))
    return result


def test_a_job_that_stands_still_while_it_tidies_up_deletes_nothing_of_another_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a bucket: another job takes over what a crash has left, and commits."""
    store = MemoryBucket()
    half_published(store)
    second: list[Any] = []
    meanwhile(monkeypatch, store, "delete_listed", lambda: second.append(job(store, 5)))
    first = job(store, 5)
    assert second[0].step == 5
    assert isinstance(first, CheckpointError)
    assert whole(store, 5)


@pytest.mark.parametrize("method", ["replace", "copy", "delete_listed", "list"])
def test_of_two_jobs_that_save_a_step_again_what_one_has_committed_stays(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryBucket()
    job(store, 4)
    job(store, 5)
    second: list[Any] = []
    meanwhile(monkeypatch, store, method, lambda: second.append(job(store, 5, replace=True)))
    first = job(store, 5, replace=True)
    assert 5 in inspect_run(store).committed
    assert whole(store, 5)
    assert (
        isinstance(first, CheckpointError)
        or isinstance(second[0], CheckpointError)
        or (method in ("copy", "list"))
    ), "one after the other, or one of them fails"


def test_a_job_that_stands_still_before_its_marker_does_not_commit_what_is_gone_by_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = MemoryBucket()
    create, first = store.create, itertools.count()

    def stalled(key: str, data: bytes) -> bool:
        if key == "5/COMMIT.json" and next(first) == 0:
            assert job(store, 5).step == 5
            assert job(store, 6, keep=config.latest(1)).step == 6
        return create(key, data)

    monkeypatch.setattr(store, "create", stalled)
    assert isinstance(job(store, 5), CheckpointError)
    assert [(c.name, c.state) for c in inspect_run(store).candidates] == [("6", "committed")]


def test_a_step_that_another_job_deletes_while_its_save_ends_is_not_called_saved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = MemoryBucket()
    create = store.create

    def deleted_at_once(key: str, data: bytes) -> bool:
        made = create(key, data)
        if key == "5/COMMIT.json":
            retention.delete_step(store, 5, now=0.0)
        return made

    monkeypatch.setattr(store, "create", deleted_at_once)
    failure = job(store, 5)
    assert isinstance(failure, StepExistsError)
    assert "Another job has deleted" in str(failure)
    assert not inspect_run(store).committed


def test_a_restore_while_another_job_saves_and_retires_never_finds_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = MemoryBucket()
    job(store, 5)
    children = store.children
    first = itertools.count()

    def stalled(prefix: str) -> list[str]:
        found = children(prefix)
        if prefix == "" and next(first) == 0:
            monkeypatch.setattr(store, "children", children)
            assert job(store, 6, keep=config.latest(1)).step == 6
        return found

    monkeypatch.setattr(store, "children", stalled)
    assert inspect_run(store).committed == [6]


def test_a_directory_that_is_not_ours_and_came_after_we_looked_is_not_touched() -> None:
    store = MemoryBucket()
    hosts = SimulatedHosts(1)

    def work(group: HostGroup) -> Any:
        saver = Saver(store, group, SystemClock(), OPTIONS, None)

        def one(step: int) -> Any:
            request = SaveRequest(step, MemoryArrays(store, group.index, {"a": b"x" * 100}))
            return saver.begin(step, lambda: request, Phases("save", group.index)).finish()

        one(4)
        store.put("5/_CHECKPOINT_METADATA", b"{}")
        store.put("5/default/precious", b"x")
        return one(5)

    [result] = hosts.run(work)
    assert isinstance(result, CheckpointError)
    assert "is no step of this run" in str(result)
    assert store.children("5") == ["_CHECKPOINT_METADATA", "default/"]


def test_a_step_that_lives_under_its_other_name_is_retired_like_any() -> None:
    store = MemoryBucket()
    job(store, 5)
    names = [entry.key.removeprefix("5/") for entry in store.list("5")]
    aside = "5.replaced-0123456789abcdef"
    store.copy("5", aside, names)
    store.delete("5")
    assert inspect_run(store).committed == [5]
    assert isinstance(job(store, 5), CheckpointError), "it is committed"
    assert job(store, 6, keep=config.latest(1)).deleted == (5,)
    assert inspect_run(store).committed == [6]


def test_a_save_that_is_not_over_at_its_deadline_ends_alike_on_all_hosts_and_commits_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bucket copies so slowly that another host has given up meanwhile."""
    store = MemoryBucket()
    copy, given_up = store.copy, threading.Event()

    def slow(*arguments: Any) -> None:
        assert given_up.wait(30)
        copy(*arguments)

    monkeypatch.setattr(store, "copy", slow)
    options = config.Options(exchange_timeout_seconds=20, save_timeout_seconds=0.5)

    def one(group: HostGroup) -> Any:
        try:
            return save(store, group, 5, options=options)
        finally:
            if group.index == 1:
                given_up.set()

    results = SimulatedHosts(2).run(one)
    assert [type(result) for result in results] == [PeerLostError, PeerLostError]
    assert inspect_run(store).committed == []


def test_hosts_that_wait_in_vain_for_the_primary_do_not_say_that_nothing_was_committed() -> None:
    """Also on the primary: who waits there does not know how far the one that works is."""

    def wait(group: HostGroup) -> Any:
        told = lambda phase: f"in {phase}" if phase else "may be"
        operation = group.begin("save", consequence=told)
        operation.contribute("written", None)
        return operation.result("written", SystemClock().monotonic() - 60)

    for failure in SimulatedHosts(2).run(wait):
        assert isinstance(failure, PeerLostError)
        assert str(failure).endswith("may be")
        assert "all hosts have arrived, and host 0 has not said" in str(failure)
        assert failure.missing == [0]


def test_a_marker_that_arrives_late_speaks_for_nothing_but_its_own_save() -> None:
    store = MemoryBucket()
    job(store, 4)
    job(store, 5)
    marker = store.files["5/COMMIT.json"]
    retention.delete_step(store, 5, now=0.0)
    job(store, 5, replace=True, content=b"longer")
    del store.files["5/COMMIT.json"]  # everything is there but that
    store.create("5/COMMIT.json", marker)
    [found] = [c for c in inspect_run(store).candidates if c.step == 5]
    assert found.state == "damaged"
    assert "not those of its marker" in found.reason
    assert inspect_run(store).committed == [4]


def test_a_bucket_that_changes_at_each_look_is_an_error_and_no_empty_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Step 1 is there at each moment: at each look it is just being saved again, and the copy that
    is the step then was not there when the root was listed.
    """
    store = MemoryBucket()
    job(store, 1)
    read, looks = store.get, itertools.count()

    def get(key: str) -> bytes:
        if key == "1/COMMIT.json":
            return fmt.dump_void("run", 1, f"nonce{next(looks)}", 0.0)
        return read(key)

    monkeypatch.setattr(store, "get", get)
    with pytest.raises(StorageError, match="changed 20 times"):
        inspect_run(store)
