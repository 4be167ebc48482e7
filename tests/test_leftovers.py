"""In a bucket: what is whose, and what stays, where jobs come back late."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
from jobs import attempt
from test_interleavings import Job, Killed, killer, requests, start, whose

from datarax_dist import format as fmt
from datarax_dist import publish, retention
from datarax_dist.errors import CheckpointError
from datarax_dist.inspection import inspect_run, is_committed
from datarax_dist.telemetry import Phases
from datarax_dist.testing import FakeClock, MemoryBucket
from datarax_dist.testing.simulated import stepped
from datarax_dist.testing.turns import Job as Turn
from datarax_dist.testing.turns import Scheduler
from datarax_dist.writers import writer_identity

ELSEWHERE = {"machine": "another", "pid": 1, "started": "1", "name": "another"}
DAY = 24 * 3600.0


def goes_on() -> None:
    """What a save asks before it does what counts; this one has not failed, nor lost the run."""


def run_of(bucket: MemoryBucket) -> str:
    run = inspect_run(bucket).run
    assert run is not None
    return run


def duplicate(bucket: MemoryBucket, source: str, destination: str) -> None:
    names = [entry.key.removeprefix(f"{source}/") for entry in bucket.list(source)]
    bucket.copy(source, destination, names)


def aside_of(bucket: MemoryBucket, step: int) -> str:
    """Returns where the save that has committed a step has let its predecessor step aside to."""
    nonce = retention._nonce(bucket, str(step))
    assert nonce is not None
    return fmt.aside_name(step, "replaced", nonce)


def tidy(bucket: MemoryBucket, now: float = 0.0) -> list[str]:
    run = run_of(bucket)
    leftovers = retention.find_leftovers(bucket, run, now=now)
    return retention.remove_leftovers(bucket, leftovers, run=run, now=now)


def keys(bucket: MemoryBucket, directory: str) -> list[str]:
    return [entry.key.removeprefix(f"{directory}/") for entry in bucket.list(directory)]


def void(bucket: MemoryBucket, step: int) -> None:
    bucket.files[f"{step}/COMMIT.json"] = fmt.dump_void(run_of(bucket), step, "00", 0.0)


def test_of_several_directories_that_were_the_step_the_newest_is_taken() -> None:
    bucket = start("5 is committed")
    saved = dict(bucket.files)
    Job("new", requests(bucket)).save(5, replace=True)
    duplicate(bucket, "5", fmt.aside_name(5, "replaced", "0" * 16))
    for key, data in saved.items():
        if key.startswith("5/"):
            bucket.files[key.replace("5/", fmt.aside_name(5, "replaced", "f" * 16) + "/")] = data
    void(bucket, 5)
    assert whose(bucket) == {4: "old", 5: "new"}


def test_the_newest_is_of_the_last_job_whatever_the_clocks_say() -> None:
    bucket = start("5 is committed")
    marker = fmt.parse_marker(bucket.files["5/COMMIT.json"])
    for name, epoch, hours in (("0", 2, -1), ("f", 1, 2), ("5", 2, -2)):
        copy = fmt.aside_name(5, "replaced", name * 16)
        duplicate(bucket, "5", copy)
        later = dataclasses.replace(
            marker, epoch=epoch, committed_at=marker.committed_at + 3600 * hours
        )
        bucket.files[f"{copy}/COMMIT.json"] = fmt.dump_marker(later)
    void(bucket, 5)
    found = [c.name for c in inspect_run(bucket).candidates if c.state == "committed"]
    assert found == [fmt.aside_name(5, "replaced", "0" * 16), "4"]


def test_a_void_marker_that_hides_nothing_goes_a_day_later_though_a_copy_is_the_step() -> None:
    bucket = start("5 is committed")
    copy, other = (fmt.aside_name(5, "replaced", letter * 16) for letter in "ab")
    duplicate(bucket, "5", copy)
    bucket.delete("5")
    bucket.files[f"{other}/COMMIT.json"] = fmt.dump_void(run_of(bucket), 5, "00", 1000.0)
    assert tidy(bucket, 1000.0 + DAY) == []
    assert tidy(bucket, 1001.0 + DAY) == [other]
    assert whose(bucket) == {4: "old", 5: "old"}


def test_a_copy_of_a_step_stays_when_the_step_is_being_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket = start("5 is committed")
    aside = fmt.aside_name(5, "replaced", "a" * 16)
    duplicate(bucket, "5", aside)
    before, get = bucket.list(aside), bucket.get

    def then_the_step_goes(key: str) -> bytes:
        data = get(key)
        if key == f"{aside}/COMMIT.json":
            monkeypatch.undo()
            void(bucket, 5)
        return data

    monkeypatch.setattr(bucket, "get", then_the_step_goes)
    retention.delete_replaced(bucket, 5, "", bucket.children(""), 0.0)
    assert fmt.parse_void(bucket.files["5/COMMIT.json"])
    assert bucket.list(aside) == before
    assert whose(bucket) == {4: "old", 5: "old"}


@pytest.mark.parametrize("deletes", ["the copy", "the step"])
def test_a_step_is_not_replaced_once_another_job_has_begun_to_remove_its_copy(
    deletes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who replaces the step stands still when it has copied it aside. The other job dies at any of
    its changes; the first one goes on, and dies after one change more.
    """
    for place in range(20):
        bucket = start("5 is committed")
        run, listing, left = run_of(bucket), bucket.list, {4, 5}
        staged = publish.Staged(run, 5, "c" * 16, "5.staging-x", may_replace=lambda _: True)

        def then_another_job_acts(
            prefix: str,
            bucket: Any = bucket,
            listing: Any = listing,
            left: set[int] = left,
            aside: str = staged.aside,
            place: int = place,
        ) -> Any:
            found = listing(prefix)
            if prefix == aside:
                bucket.list = listing
                bucket.crash_after(place)
                with contextlib.suppress(publish.StorageError):
                    if deletes == "the copy":
                        retention.delete_replaced(bucket, 5, "", bucket.children(""), 0.0)
                    else:
                        retention.delete_step(bucket, 5, now=0.0)
                bucket.crash_after(None)
                left &= set(whose(bucket))
                bucket.crash_after(1)
            return found

        monkeypatch.setattr(bucket, "list", then_another_job_acts)
        with contextlib.suppress(publish.StorageError, publish.StepExistsError):
            publish._step_aside(bucket, staged, fmt.dump_void(run, 5, "c" * 16, 0.0), goes_on)
        bucket.crash_after(None)
        assert set(whose(bucket)) == left, place
    assert left == ({4, 5} if deletes == "the copy" else {4})


def both(
    first: Callable[[Any], Any], second: Callable[[Any], Any], turns: list[tuple[int, float]]
) -> tuple[MemoryBucket, int]:
    """Runs two jobs on one bucket, which take turns; then the second to its end, and the first.
    Returns the bucket, and how many requests the first made.
    """
    bucket, scheduler = start("5 is committed"), Scheduler(lambda able: 0)

    def job(act: Callable[[Any], Any]) -> Turn:
        def host(_: int) -> None:
            with contextlib.suppress(CheckpointError):
                act(stepped(bucket, scheduler.step))

        return Turn(host)

    ran = scheduler.run([job(first), job(second)], turns)
    assert [one.results for one in ran] == [[None], [None]]
    return bucket, len(ran[0].moves)


def test_a_step_stays_whatever_who_replaces_it_and_who_removes_its_copy_do_in_turn() -> None:
    """Neither comes further: both die then."""
    run = run_of(start("5 is committed"))
    staged = publish.Staged(run, 5, "c" * 16, "5.staging-x", may_replace=lambda _: True)

    def replaces(store: Any) -> None:
        publish._step_aside(store, staged, fmt.dump_void(run, 5, "c" * 16, 0.0), goes_on)

    def removes(store: Any) -> None:
        for _ in range(2):  # in the first one there may be no copy yet
            retention.delete_replaced(store, 5, "", store.children(""), 0.0)

    _, most = both(replaces, lambda store: None, [])
    ends = set()
    for begin, others in itertools.product(range(most + 1), range(12)):
        for then in range(most - begin + 2):  # the last one ends it
            turns: list[tuple[int, float]] = [(0, begin), (1, others), (0, then)]
            bucket, _ = both(replaces, removes, turns)
            assert whose(bucket) == {4: "old", 5: "old"}, turns
            ends.add((is_committed(bucket, "5"), len(keys(bucket, staged.aside)) > 1))
    assert ends == {(True, False), (False, True)}, "removed, or replaced"


def test_the_void_marker_of_a_step_stays_while_a_copy_is_the_step() -> None:
    """Its writer is gone; but another one may still be about to make a marker there."""
    bucket = start("5 is committed")
    marker, aside = bucket.files["5/COMMIT.json"], fmt.aside_name(5, "replaced", "a" * 16)
    duplicate(bucket, "5", aside)
    bucket.delete("5")
    dead = {**writer_identity(), "pid": 4_000_000}
    claim = fmt.StepClaim(run_of(bucket), 5, "b" * 16, 1, dead, 1000.0)
    bucket.put("5/STEP.json", fmt.dump_claim(claim))
    assert tidy(bucket, 1000.0) == ["5"]
    for now in (2000.0, 1001.0 + DAY):
        assert tidy(bucket, now) == []
        assert keys(bucket, "5") == ["COMMIT.json"]
        assert not bucket.create("5/COMMIT.json", marker)
        assert whose(bucket) == {4: "old", 5: "old"}
    retention.delete_step(bucket, 5, now=3000.0)
    assert (keys(bucket, "5"), keys(bucket, aside)) == ([], ["COMMIT.json"])


def test_a_step_whose_copy_another_job_writes_to_is_not_told_as_deleted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket = start("5 is committed")
    aside = fmt.aside_name(5, "replaced", "a" * 16)
    duplicate(bucket, "5", aside)
    bucket.delete("5")
    replace = bucket.replace

    def refused(key: str, *arguments: Any, **more: Any) -> bool:
        return not key.startswith(aside) and replace(key, *arguments, **more)

    monkeypatch.setattr(bucket, "replace", refused)
    assert not retention.delete_step(bucket, 5, now=0.0)
    monkeypatch.undo()
    assert whose(bucket) == {4: "old", 5: "old"}
    assert retention.delete_step(bucket, 5, now=0.0)
    assert whose(bucket) == {4: "old"}


def test_a_marker_that_speaks_for_nothing_is_no_reason_to_remove_a_copy() -> None:
    bucket = start("5 is committed")
    aside = fmt.aside_name(5, "replaced", "a" * 16)
    duplicate(bucket, "5", aside)
    for name in keys(bucket, "5"):
        if name != "COMMIT.json":
            del bucket.files[f"5/{name}"]
    before = bucket.list(aside)
    retention.delete_replaced(bucket, 5, "", bucket.children(""), 0.0)
    assert bucket.list(aside) == before


def test_a_restore_leaves_the_copy_that_another_job_makes_before_it_replaces_a_step() -> None:
    bucket = start("5 is committed")
    aside = fmt.aside_name(5, "replaced", "a" * 16)
    duplicate(bucket, "5", aside)
    Job("reader", requests(bucket)).restore()
    assert bucket.list(aside)
    Job("writer", requests(bucket)).save(6)
    assert keys(bucket, aside) == ["COMMIT.json"]


def test_what_a_primary_copies_aside_after_the_copy_was_removed_goes_a_day_later() -> None:
    """It stood still in the middle of it, another job has taken the run, and it goes on."""
    bucket = start("5 is committed")
    aside = fmt.aside_name(5, "replaced", "a" * 16)
    bucket.copy("5", aside, ["STEP.json", "TREE.json"])
    assert tidy(bucket, 1000.0) == [aside]
    assert keys(bucket, aside) == ["COMMIT.json"]
    bucket.copy("5", aside, ["state/manifest"])
    assert tidy(bucket, 2000.0) == [aside]
    assert keys(bucket, aside) == ["COMMIT.json"]
    void = bucket.files[f"{aside}/COMMIT.json"]
    assert tidy(bucket, 2000.0 + DAY) == []
    retention.delete_replaced(bucket, 5, "", bucket.children(""), 3000.0)
    assert bucket.files[f"{aside}/COMMIT.json"] == void, "its day does not begin again"
    assert [c.state for c in inspect_run(bucket).candidates if c.name == aside] == ["void"]
    assert tidy(bucket, 2001.0 + DAY) == [aside]
    assert keys(bucket, aside) == []


def test_a_copy_that_does_not_say_whose_it_is_is_known_by_its_step() -> None:
    bucket = start("5 is committed")
    aside = fmt.aside_name(5, "replaced", "a" * 16)
    bucket.copy("5", aside, ["TREE.json"])
    retention.delete_replaced(bucket, 5, "", bucket.children(""), 1000.0)
    assert keys(bucket, aside) == ["COMMIT.json"]
    bucket.copy("5", aside, ["state/manifest"])
    assert tidy(bucket, 2000.0) == [aside]
    assert tidy(bucket, 2001.0 + DAY) == [aside]
    assert keys(bucket, aside) == []


@pytest.mark.parametrize("there", [["STEP.json", "TREE.json"], ["TREE.json"], ["COMMIT.json"]])
@pytest.mark.parametrize("deletions", [0, 1, 2])
def test_who_drops_the_copy_it_has_made_and_dies_leaves_nothing_unknown(
    there: list[str], deletions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = start("5 is committed")
    run, aside = run_of(bucket), fmt.aside_name(5, "replaced", "a" * 16)
    bucket.copy("5", aside, there)
    delete, done = bucket.delete_listed, []

    def dies(entries: Any) -> None:
        if len(done) == deletions:
            raise Killed
        done.append(entries)
        delete(entries)

    monkeypatch.setattr(bucket, "delete_listed", dies)
    with pytest.raises(Killed):
        retention.delete_copy(bucket, run, 5, aside)
    monkeypatch.undo()
    assert keys(bucket, aside)[0] == "COMMIT.json"
    assert tidy(bucket, 1.0 + DAY) == [aside]
    assert keys(bucket, aside) == []


def test_a_void_marker_that_goes_while_the_copy_is_dropped_leaves_nothing_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket = start("5 is committed")
    run, aside = run_of(bucket), fmt.aside_name(5, "replaced", "a" * 16)
    bucket.copy("5", aside, ["TREE.json"])
    bucket.put(f"{aside}/COMMIT.json", fmt.dump_void(run, 5, "0" * 16, 0.0))
    create = bucket.create

    def then_it_goes(key: str, data: bytes) -> bool:
        made = create(key, data)
        monkeypatch.undo()
        del bucket.files[key]
        return made

    monkeypatch.setattr(bucket, "create", then_it_goes)
    retention.delete_copy(bucket, run, 5, aside)
    assert bucket.list(aside) == []


def test_what_a_host_uploads_after_its_staging_was_removed_goes_a_day_later() -> None:
    bucket = start("5 is committed")
    staging = fmt.aside_name(7, "staging", "a" * 16)
    claim = fmt.StepClaim(run_of(bucket), 7, "a" * 16, 1, ELSEWHERE, 1000.0)
    bucket.put(f"{staging}/STEP.json", fmt.dump_claim(claim))
    bucket.put(f"{staging}/state/a", b"a")
    assert tidy(bucket, 2000.0) == [staging]
    assert [entry.key for entry in bucket.list(staging)] == [f"{staging}/STEP.json"]
    assert tidy(bucket, 3000.0) == []
    bucket.put(f"{staging}/state/b", b"b")  # it comes back
    assert tidy(bucket, 4000.0) == [staging]
    assert tidy(bucket, 4000.0 + DAY) == [staging]
    assert bucket.list(staging) == []


@pytest.mark.parametrize("left", ["hosts/host_00000-of-00001.json", "COMMIT.json"])
@pytest.mark.parametrize("role", ["staging", "replaced"])
def test_what_has_lost_its_claim_is_known_by_its_marker_or_a_record(role: str, left: str) -> None:
    bucket = start("5 is committed")
    directory = aside_of(bucket, 5) if role == "replaced" else fmt.aside_name(5, role, "a" * 16)
    bucket.copy("5", directory, [left, "state/manifest"])
    assert tidy(bucket) == [directory]
    assert bucket.list(directory) == []
    bucket.put(f"{directory}/state/manifest", b"somebody's")
    assert tidy(bucket) == []
    assert bucket.list(directory)


def test_a_step_with_a_void_marker_and_no_claim_can_be_tidied_and_saved_again() -> None:
    bucket = start("without 5")
    void(bucket, 5)
    bucket.put("5/commit_success.txt", b"x")
    assert tidy(bucket) == ["5"]
    bucket.put("5/commit_success.txt", b"x")
    assert Job("new", requests(bucket)).save(5) == "saved"
    assert whose(bucket) == {4: "old", 5: "new"}


@pytest.mark.parametrize("name", ["5", fmt.aside_name(5, "replaced", "a" * 16)])
def test_a_marker_without_anything_that_it_speaks_for_goes(name: str) -> None:
    bucket = start("5 is committed")
    marker = bucket.files["5/COMMIT.json"]
    retention.delete_step(bucket, 5, now=0.0)
    bucket.put(f"{name}/COMMIT.json", marker)
    assert tidy(bucket) == [name]
    assert bucket.list(name) == []


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_step_is_not_taken_for_the_marker_that_stood_alone_there(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has found that one stands still; another job has removed it, and saved the step."""
    bucket = start("5 is committed")
    run, marker, children = run_of(bucket), bucket.files["5/COMMIT.json"], bucket.children
    retention.delete_step(bucket, 5, now=0.0)
    bucket.put("5/COMMIT.json", marker)
    leftovers = retention.find_leftovers(bucket, run)
    assert [(left.name, left.only_marker) for left in leftovers] == [("5", True)]

    def then_it_is_saved(prefix: str) -> list[str]:
        found = children(prefix)
        monkeypatch.undo()
        new = Job("new", requests(bucket))
        assert new.save(6) == new.save(5) == "saved"
        return found

    if when == "before":
        then_it_is_saved("")
    else:
        monkeypatch.setattr(bucket, "children", then_it_is_saved)
    retention.remove_leftovers(bucket, leftovers, run=run, now=0.0)
    assert whose(bucket) == {4: "old", 5: "new", 6: "new"}


@pytest.mark.parametrize(
    "stands_before", ["list: 5", "copy: 5/STEP.json", "copy: 5/state/ocdbt.process_0/a"]
)
def test_what_was_copied_of_two_versions_is_never_the_step(stands_before: str) -> None:
    """Who copies the step aside stands still before; another job saves it again, and does so once
    more, and dies when it has put its void marker. The first one is killed at each later request.
    """
    for number in itertools.count():
        bucket = MemoryBucket()
        first = Job("old", requests(bucket), clock=FakeClock(4e9))  # whose clock is wrong
        assert first.save(4) == first.save(5) == "saved"
        del bucket.files["5/state/ocdbt.process_0/b"]  # the new one has a file more
        run = run_of(bucket)
        staged = publish.Staged(run, 5, "c" * 16, "5.staging-x", may_replace=lambda _: True)
        requested: list[str] = []  # since it went on

        def act(
            what: str,
            changes: bool,
            bucket: Any = bucket,
            requested: list[str] = requested,
            most: int = number,
            staged: publish.Staged = staged,
        ) -> None:
            if not requested:
                if not what.startswith(stands_before):
                    return
                assert Job("new", requests(bucket)).save(5, replace=True) == "saved"
            marker = bucket.files.get(f"{staged.aside}/COMMIT.json")
            assert marker is None or fmt.parse_void(marker), "no marker speaks for it"
            if len(requested) > most:
                raise Killed
            requested.append(what)

        with contextlib.suppress(Killed, CheckpointError):
            publish._step_aside(stepped(bucket, act), staged, b"", goes_on)
        duplicate(bucket, "5", fmt.aside_name(5, "replaced", "0" * 16))
        void(bucket, 5)
        assert whose(bucket) == {4: "old", 5: "new"}, requested
        if len(requested) <= number:
            break
    assert number > (0 if stands_before == "list: 5" else 8)


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_dead_writer_left_and_a_living_one_has_taken_over_is_not_touched(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever tidies up has found it, and stands still, before its void marker or after."""
    bucket = start("5 was not committed")
    run = run_of(bucket)
    leftovers = retention.find_leftovers(bucket, run)
    assert [left.name for left in leftovers] == ["5"]

    def taken_over() -> None:
        claim = fmt.StepClaim(run, 5, "b" * 16, 1, ELSEWHERE, 1000.0)
        bucket.files["5/STEP.json"] = fmt.dump_claim(claim)

    if when == "before":
        taken_over()
    else:
        create = bucket.create

        def after(key: str, data: bytes) -> bool:
            taken_over()
            return create(key, data)

        monkeypatch.setattr(bucket, "create", after)
    before = set(bucket.files)
    assert retention.remove_leftovers(bucket, leftovers, run=run, now=0.0) == []
    assert before <= set(bucket.files)
    assert ("5/COMMIT.json" in bucket.files) == (when == "after")


def test_a_deletion_that_comes_back_late_deletes_nothing_that_was_saved_since(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for method in ("get", "create", "replace", "list", "delete_listed"):
        bucket = start("5 is committed")
        original: Any = getattr(bucket, method)
        first = [True]

        def stalled(
            *arguments: Any,
            original: Any = original,
            bucket: Any = bucket,
            first: Any = first,
            **more: Any,
        ) -> Any:
            if first.pop() if first else False:
                Job("new", requests(bucket)).save(5, replace=True)
            return original(*arguments, **more)

        monkeypatch.setattr(bucket, method, stalled)
        retention.delete_step(bucket, 5, now=0.0)
        monkeypatch.undo()
        assert method in ("get", "create") or whose(bucket)[5] == "new", method
        assert whose(bucket).get(5, "new") == "new", method


def test_a_copy_that_is_not_whole_leaves_the_step_where_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket = start("5 is committed")
    copy = bucket.copy

    def lossy(source: str, destination: str, names: Any) -> None:
        copy(source, destination, [name for name in names if name != "TREE.json"])

    monkeypatch.setattr(bucket, "copy", lossy)
    staged = publish.Staged(run_of(bucket), 5, "c" * 16, "5.staging-x", may_replace=lambda _: True)
    with pytest.raises(publish.StorageError, match="stays as it is"):
        publish._step_aside(bucket, staged, fmt.dump_void(staged.run, 5, "c" * 16, 0.0), goes_on)
    assert whose(bucket) == {4: "old", 5: "old"}
    assert bucket.list(staged.aside) == []


def test_what_a_step_was_goes_when_its_deletion_was_cut() -> None:
    bucket = start("5 is committed")
    aside = aside_of(bucket, 5)
    duplicate(bucket, "5", aside)
    bucket.delete(f"{aside}/COMMIT.json")  # cut after the marker
    assert tidy(bucket) == [aside]
    assert bucket.list(aside) == []


def test_a_step_that_is_deleted_while_another_job_copies_it_aside_stays_deleted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket = start("5 is committed")
    children, looked = bucket.children, []

    def then_it_is_copied(prefix: str) -> list[str]:
        found = children(prefix)
        if prefix == "" and not looked:
            looked.append(prefix)
            duplicate(bucket, "5", fmt.aside_name(5, "replaced", "a" * 16))
        return found

    monkeypatch.setattr(bucket, "children", then_it_is_copied)
    retention.delete_step(bucket, 5, now=0.0)
    assert whose(bucket) == {4: "old"}


def test_of_two_that_give_up_one_step_one_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = start("5 was not committed")
    run, replace = run_of(bucket), bucket.replace
    assert retention.give_up(bucket, run, 5, "a" * 16, 0.0)

    def the_other_was_first(key: str, expected: bytes, data: bytes) -> bool:
        replace(key, expected, fmt.dump_void(run, 5, "b" * 16, 0.0))
        return replace(key, expected, data)

    monkeypatch.setattr(bucket, "replace", the_other_was_first)
    assert retention.give_up(bucket, run, 5, "c" * 16, 0.0) is None


def test_a_step_that_was_changed_while_it_was_copied_aside_leaves_no_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket = start("5 is committed")
    run, replace = run_of(bucket), bucket.replace
    staged = publish.Staged(run, 5, "c" * 16, "5.staging-x", may_replace=lambda _: True)

    def saved_again(key: str, expected: bytes, data: bytes, **more: Any) -> bool:
        monkeypatch.undo()
        Job("new", requests(bucket)).save(5, replace=True)
        return replace(key, expected, data, **more)

    monkeypatch.setattr(bucket, "replace", saved_again)
    with pytest.raises(publish.StepExistsError, match="that one stays"):
        publish._step_aside(bucket, staged, fmt.dump_void(run, 5, "c" * 16, 0.0), goes_on)
    assert whose(bucket) == {4: "old", 5: "new"}
    assert bucket.list(staged.aside) == []


def test_a_copy_of_a_step_has_its_marker_only_when_it_is_whole() -> None:
    for number in range(20):
        bucket = start("5 is committed")
        staged = publish.Staged(
            run_of(bucket), 5, "c" * 16, "5.staging-x", may_replace=lambda _: True
        )
        store = requests(bucket, killer(number))
        try:
            publish._copy_aside(store, staged)
        except Killed:
            there = {
                entry.key.removeprefix(f"{staged.aside}/") for entry in bucket.list(staged.aside)
            }
            step = {entry.key.removeprefix("5/") for entry in bucket.list("5")}
            assert "COMMIT.json" not in there or there == step, number
        else:
            assert number > 8
            return


def test_a_commit_and_a_deletion_between_two_looks_leave_no_reader_with_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The new step had no marker yet when it was looked at, the old one had none any more."""
    bucket = start("5 is committed")
    Job("new", requests(bucket)).save(6)
    marker = bucket.files.pop("6/COMMIT.json")
    gone = fmt.dump_void(run_of(bucket), 5, "00", 0.0)
    new, listing = bucket.list("6"), bucket.list
    looks = {"5": 1, "6": 2}  # at what has no marker it looks twice

    def late(prefix: str) -> Any:
        early = looks.get(prefix, 0) > 0
        looks[prefix] = looks.get(prefix, 0) - 1
        if prefix == "6" and early:
            return new
        if prefix == "5" and early:
            bucket.files["6/COMMIT.json"] = marker
            bucket.files["5/COMMIT.json"] = gone
        return listing(prefix)

    monkeypatch.setattr(bucket, "list", late)
    assert inspect_run(bucket).committed == [4, 6]


def refuse(*arguments: Any) -> Any:
    raise AssertionError(f"nothing more should be asked for: {arguments}")


def test_a_deletion_ends_when_another_job_has_changed_the_marker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket = start("5 is committed")
    monkeypatch.setattr(bucket, "replace", lambda *_, **__: False)
    reached: list[str] = []
    assert not retention.delete_step(bucket, 5, now=0.0, reached=reached.append)
    assert reached == [], "it has not begun"
    assert retention.retire(bucket, [5], now=0.0, reached=reached.append) == []
    assert whose(bucket)[5] == "old"


def test_what_another_job_has_taken_is_noticed_before_everything_is_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket = start("5 was not committed")
    del bucket.files["5/STEP.json"]  # the other one has cleared the step, and not yet claimed it
    monkeypatch.setattr(retention, "clear_given_up", lambda *_, **__: False)
    monkeypatch.setattr(bucket, "copy", refuse)
    with pytest.raises(publish.StepExistsError):
        Job("new", requests(bucket)).save(5)


def test_the_void_marker_of_a_save_under_way_is_not_taken_for_a_marker_that_stands_alone() -> None:
    bucket = start("5 is committed")
    run, marker = run_of(bucket), bucket.files["5/COMMIT.json"]
    duplicate(bucket, "5", fmt.aside_name(5, "replaced", "a" * 16))
    bucket.delete("5")
    bucket.put("5/COMMIT.json", marker)
    leftovers = retention.find_leftovers(bucket, run)
    assert [left.only_marker for left in leftovers if left.name == "5"] == [True]
    void(bucket, 5)
    retention.remove_leftovers(bucket, leftovers, run=run, now=0.0)
    assert keys(bucket, "5") == ["COMMIT.json"]
    assert whose(bucket) == {4: "old", 5: "old"}


def test_what_a_save_has_copied_after_its_claim_was_removed_is_taken_back() -> None:
    bucket = start("without 5")
    removed: list[str] = []

    def act(what: str, changes: bool) -> None:
        if what.endswith("state/manifest to 5"):
            removed.append(what)
            bucket.delete("5")

    with pytest.raises(publish.StorageError, match="differ"):
        Job("late", stepped(bucket, act)).save(5)
    assert removed
    assert keys(bucket, "5") == ["COMMIT.json"]
    tidy(bucket, time.time() + 2 * DAY)
    assert keys(bucket, "5") == []


@pytest.mark.parametrize("stands_before", ["create: 5/COMMIT.json", "delete: 5/state/manifest"])
def test_what_another_save_has_found_there_is_not_taken_back_from_it(
    stands_before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looked before that was there, and copies the very same."""
    bucket = start("without 5")
    bucket.put("5/state/manifest", b"merged")
    [entry] = bucket.list("5")
    copied = {"state/manifest": fmt.FileEntry("state/manifest", entry.size, entry.digest)}
    staged = publish.Staged(run_of(bucket), 5, "c" * 16, "5.staging-x", copied)
    ends: list[Any] = []
    children = bucket.children

    def looks(prefix: str) -> list[str]:
        return [] if prefix == "5" else [name for name in children(prefix) if name != "5/"]

    def act(what: str, changes: bool) -> None:
        if what.startswith(stands_before) and not ends:
            monkeypatch.setattr(bucket, "children", looks)
            ends.append(attempt(lambda: Job("new", requests(bucket)).save(5)))
            monkeypatch.undo()

    publish._withdraw(stepped(bucket, act), staged, 0.0)
    assert len(ends) == 1
    assert whose(bucket) == ({4: "old", 5: "new"} if ends == ["saved"] else {4: "old"})
    assert (ends == ["saved"]) == stands_before.startswith("create")


def test_nothing_is_copied_for_a_save_that_has_failed_already() -> None:
    bucket = start("without 5")
    staged = publish.Staged(run_of(bucket), 5, "c" * 16, "5.staging-x")

    def failed() -> None:
        raise publish.StorageError("another host has failed")

    before = dict(bucket.files)
    with pytest.raises(publish.StorageError, match="another host"):
        publish.publish(bucket, staged, 0.0, Phases("save", 0), failed)
    assert bucket.files == before


def test_who_finds_its_copy_removed_and_dies_leaves_nothing_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It dies before each of the changes that it makes."""
    for place in itertools.count():
        bucket = start("5 is committed")
        bucket.crashed = False
        run = run_of(bucket)
        staged = publish.Staged(run, 5, "c" * 16, "5.staging-x", may_replace=lambda _: True)
        copy = bucket.copy

        def then_it_is_removed(
            *arguments: Any, bucket: Any = bucket, copy: Any = copy, place: int = place
        ) -> None:
            bucket.copy = copy
            copy(*arguments)
            tidy(bucket, 1000.0)
            bucket.crash_after(place)

        monkeypatch.setattr(bucket, "copy", then_it_is_removed)
        with pytest.raises((publish.StorageError, publish.StepExistsError)):
            publish._step_aside(bucket, staged, fmt.dump_void(run, 5, "c" * 16, 0.0), goes_on)
        bucket.crash_after(None)
        if not bucket.crashed:
            break
        assert tidy(bucket, 1001.0) in ([], [staged.aside])
        assert set(keys(bucket, staged.aside)) <= {"COMMIT.json"}
        tidy(bucket, 1002.0 + DAY)
        assert bucket.list(staged.aside) == []
        assert whose(bucket) == {4: "old", 5: "old"}
    assert place > 10
    assert bucket.list(staged.aside) == []


def test_the_copy_stays_when_it_is_the_step_though_another_job_was_first_to_say_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The void marker of the step was put there, the reply was lost, and before it is asked for
    once more another job has taken the run, and cleared what was left of the step.
    """
    bucket = start("5 is committed")
    run, replace = run_of(bucket), bucket.replace
    staged = publish.Staged(run, 5, "c" * 16, "5.staging-x", may_replace=lambda _: True)

    def lost(key: str, expected: bytes, data: bytes, **more: Any) -> bool:
        assert replace(key, expected, data, **more)
        monkeypatch.undo()
        assert Job("new", requests(bucket)).save(6) == "saved"
        return replace(key, expected, data, **more)

    monkeypatch.setattr(bucket, "replace", lost)
    with pytest.raises(publish.StepExistsError):
        publish._step_aside(bucket, staged, fmt.dump_void(run, 5, "c" * 16, 0.0), goes_on)
    assert whose(bucket) == {4: "old", 5: "old", 6: "new"}


def test_a_copy_whose_step_was_changed_meanwhile_is_removed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket = start("5 is committed")
    staged = publish.Staged(run_of(bucket), 5, "c" * 16, "5.staging-x", may_replace=lambda _: True)
    replace = bucket.replace

    def another_was_first(key: str, *arguments: Any, **more: Any) -> bool:
        return key != "5/COMMIT.json" and replace(key, *arguments, **more)

    monkeypatch.setattr(bucket, "replace", another_was_first)
    with pytest.raises(publish.StorageError, match="stays as it is"):
        publish._step_aside(bucket, staged, fmt.dump_void(staged.run, 5, "c" * 16, 0.0), goes_on)
    assert bucket.list(staged.aside) == []
