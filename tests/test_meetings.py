"""Two jobs in each other's way, of which one has lost the run: schedules that were found to do
harm, once.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from jobs import Job

from datarax_dist import cli, retention
from datarax_dist.cli import reading
from datarax_dist.errors import LeaseError, StepExistsError, StorageError
from datarax_dist.inspection import inspect_run
from datarax_dist.testing import MemoryBucket, MemoryStore
from datarax_dist.testing.turns import Ran
from datarax_dist.testing.world import Plan, World

AGAIN = Plan(1, [(1, True)])
NEWER = Plan(1, [(2, True)], keep=1)
DELETES = Plan(1, [(2, True)], deletes=[1])
READS = Plan(1, [])


def run(
    in_bucket: bool, before: Sequence[Plan], plans: Sequence[Plan], turns: Any
) -> tuple[World, list[Ran]]:
    order = itertools.count()
    with World("a meeting", in_bucket, lambda able: next(order) % able, 0) as world:
        for plan in (Plan(1, [(1, False)]), *before):
            world.run([plan])
        ran = world.run(plans, turns)
        world.finish(1)
    return world, ran


def meet(
    plans: Sequence[Plan],
    stops: Sequence[tuple[int, Sequence[str]]],
    *,
    in_bucket: bool = False,
    before: Sequence[Plan] = (),
    then: Sequence[int] = (),
) -> tuple[World, list[Ran]]:
    """Runs jobs in a world that checks what is promised.

    Args:
        stops: which one moves, and then stands still before the first operation like the last of
            these, after one like the one before it, and so on.
        then: which ones come to their end after that, in this order; of two jobs the one that did
            not move last.
    """
    turns: list[tuple[int, float]] = []
    for job, patterns in stops:
        _, ran = run(in_bucket, before, plans, [*turns, (job, float("inf"))])
        done = sum(int(count) for who, count in turns if who == job)
        place = done - 1
        for pattern in patterns:
            place = next(
                n
                for n, (what, _) in enumerate(ran[job].moves)
                if n > place and fnmatch.fnmatch(what, pattern)
            )
        turns.append((job, place - done))
    ends = [(job, float("inf")) for job in then or [1 - stops[-1][0]]]
    return run(in_bucket, before, plans, [*turns, *ends])


def ends(ran: Ran) -> dict[str, Any]:
    """Returns what came of what the job's host did."""
    return dict(ran.results[0])


def has_lost(ran: Ran, what: str) -> bool:
    return isinstance(ends(ran)[what], LeaseError)


def test_who_has_lost_the_run_does_not_remove_what_its_owner_has_staged() -> None:
    """It was about to look what is left of earlier saves."""
    _, [stale, owner] = meet(
        [NEWER, NEWER],
        [(0, ["put: 2.staging*", "children: the root"]), (1, ["create: 2.staging*"])],
    )
    assert has_lost(stale, "save step 2")
    assert ends(owner)["save step 2"] is None


def test_who_has_lost_the_run_does_not_remove_what_its_owner_lets_step_aside() -> None:
    """It had saved the step, and was about to remove what that was before."""
    _, [stale, owner] = meet(
        [AGAIN, AGAIN],
        [
            (0, ["rename: 1.staging*", "children: the root"]),
            (1, ["rename: 1 to *", "rename: 1.staging*"]),
        ],
    )
    assert ends(stale)["save step 1"] is ends(owner)["save step 1"] is None


def test_who_has_lost_the_run_does_not_delete_a_step_that_has_only_stepped_aside() -> None:
    _, [alone] = run(False, [], [AGAIN], [])
    upto = itertools.takewhile(
        lambda move: not move[0].startswith("rename: 1.staging"), alone.moves
    )
    cut = Plan(1, [(1, True)], crashes={0: sum(changes for _, changes in upto)})
    world, [stale, _] = meet(
        [DELETES, NEWER], [(0, ["put: 1.deleting*", "rename: 1.replaced*"])], before=[cut]
    )
    assert has_lost(stale, "delete step 1")
    assert world.committed[2] == 3, "the owner's"


@pytest.mark.parametrize("stands_before", ["list: 1", "replace: 1/COMMIT.json"])
def test_who_has_lost_the_run_does_not_replace_a_step_of_a_bucket(stands_before: str) -> None:
    """It was about to list the step that it saves again, or to put a void marker there."""
    _, [stale, owner] = meet(
        [AGAIN, AGAIN],
        [(0, ["children: 1", "get: 1/COMMIT.json", stands_before]), (1, ["put: 1.staging*"])],
        in_bucket=True,
    )
    assert has_lost(stale, "save step 1")
    assert not [what for what, _ in stale.moves if what.startswith("delete: 1/")]
    assert ends(owner)["save step 1"] is None


@pytest.mark.parametrize(
    "stands_before", ["children: 1", "children: 1/hosts", "get: 1/COMMIT.json"]
)
@pytest.mark.parametrize("hosts", [1, 2])
def test_a_step_that_is_saved_again_while_a_reader_looks_at_it_is_there(
    stands_before: str, hosts: int
) -> None:
    """The reader has listed the root before, and lists it once more after it: it is the same."""
    _, [reader, _] = meet(
        [READS, Plan(hosts, [(1, True)])],
        [
            (0, ["children: the root", stands_before]),
            (1, ["rename: 1 to *", "rename: 1.staging*"]),
            (0, ["children: the root"]),
        ],
    )
    assert ends(reader)["restore"].startswith("step 1 of job ")


@pytest.mark.parametrize("stands_before", ["children: 1/hosts", "get: 1/COMMIT.json"])
def test_a_step_that_was_saved_again_by_more_hosts_while_a_reader_looks_is_not_damaged(
    stands_before: str,
) -> None:
    _, [reader, _] = meet(
        [READS, Plan(3, [(1, True)])], [(0, ["children: the root", stands_before])]
    )
    assert ends(reader)["restore"] == "step 1 of job 2"


def test_two_saves_of_a_step_in_a_bucket_are_not_taken_for_one_by_a_reader() -> None:
    """At both looks it sees a void marker; the directory that was the step then was not listed."""
    owner = [
        (1, ["replace: 1/COMMIT.json", "delete: 1/*"]),
        (1, ["replace: 1/COMMIT.json", "children: the root", "put: 1.staging*"]),
    ]
    looks = [(0, ["children: the root", "list: 1"]), (0, ["children: the root"])]
    _, [reader, _] = meet(
        [READS, Plan(1, [(1, True), (1, True)])],
        [looks[0], owner[0], looks[1], owner[1], looks[0], owner[0], looks[1]],
        in_bucket=True,
    )
    assert ends(reader)["restore"].startswith("step 1 of job ")


def test_a_step_that_a_job_which_has_lost_the_run_moves_for_a_moment_is_not_damaged() -> None:
    _, [_, _, reader] = meet(
        [AGAIN, NEWER, READS],
        [
            (0, ["create: 1.staging*", "rename: 1 to *"]),
            (1, ["put: 2.staging*"]),
            (2, ["create: 1.restoring*", "digest: 1/TREE.json"]),
            (0, ["rename: 1.staging*", "rename: 1.replaced*"]),
            (2, ["digest: 1/TREE.json", "tells*"]),
        ],
        then=[0, 2, 1],
    )
    assert ends(reader)["restore"] == "step 1 of job 0"


@pytest.mark.parametrize("in_bucket", [False, True], ids=["file system", "bucket"])
def test_who_is_overtaken_while_it_takes_the_run_takes_nothing_from_the_next_owner(
    in_bucket: bool,
) -> None:
    owner_stands = "create: 2/commit_success.txt" if in_bucket else "rename: 2.staging*"
    _, [_, _, owner] = meet(
        [NEWER, NEWER, NEWER],
        [
            (0, ["put: 2.staging*", "tells*"]),
            (1, ["create: lease*", "children: the root"]),
            (2, ["create: lease*", "put: 2.staging*", owner_stands]),
            (1, ["children: lease", "children: lease"]),
        ],
        in_bucket=in_bucket,
        then=[2, 1, 0],
    )
    assert ends(owner)["save step 2"] is None


def test_a_marker_for_which_there_is_nothing_left_is_not_given_the_name_of_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever has removed what was staged, by hand maybe: the marker would make its directory."""
    create = MemoryStore.create

    def after_its_directory_went(store: MemoryStore, key: str, data: bytes) -> bool:
        if key.startswith("1.staging") and key.endswith("COMMIT.json"):
            store.delete(key.partition("/")[0])
        return create(store, key, data)

    monkeypatch.setattr(MemoryStore, "create", after_its_directory_went)
    store = MemoryStore()
    with pytest.raises(StorageError, match="has removed what this one staged"):
        Job("one", store).save(1)
    assert inspect_run(store).committed == []
    monkeypatch.undo()
    assert Job("one", store).save(1) == "saved"
    assert [c.name for c in inspect_run(store).candidates] == ["1"]


def test_what_was_learnt_before_the_run_was_taken_does_not_count() -> None:
    """A job has looked at a bucket. Before it takes the run, another one has saved the step, one
    has died that had copied it aside, and a third one has come and gone.
    """
    new, order = Plan(1, [(1, False)]), itertools.count()
    _, [alone] = run(True, [], [AGAIN], [])
    upto = itertools.takewhile(lambda move: move[0] != "create: 1/STEP.json", alone.moves)
    dies = Plan(1, [(1, True)], crashes={0: sum(changes for _, changes in upto)})
    with World("learnt", True, lambda able: next(order) % able, 0) as world:
        world.run([Plan(1, [(1, False)], deletes=[1])])
        turns = [(0, 6), *((job, float("inf")) for job in (1, 2, 3))]
        late, *_ = world.run([new, new, dies, new], turns)
        assert late.moves[5][0] == "tells the others (agreement 1): prepare"
        assert isinstance(ends(late)["save step 1"], StepExistsError)
        assert world.committed == {1: 2}


def moved_away(*then: tuple[int, Sequence[str]]) -> Ran:
    """A job that has lost the run moves a step away and back, while another one restores it; `then`
    is how they take turns. Returns how the restore went.
    """
    stale_and_owner = [(0, ["create: 1.staging*", "rename: 1 to *"]), (1, ["put: 2.staging*"])]
    _, ran = meet([AGAIN, NEWER, READS], [*stale_and_owner, *then], then=[2, 0, 1])
    return ran[2]


def test_a_step_that_is_away_at_every_look_is_not_damaged() -> None:
    reader = moved_away(
        (2, ["create: 1.restoring*", "get: 1/COMMIT.json"]),
        (0, ["rename: 1.staging*"]),
        (2, ["get: 1/COMMIT.json", "get: 1/COMMIT.json", "tells*"]),
        (0, ["rename: 1.replaced*", "tells*"]),
    )
    assert ends(reader)["restore"] == "step 1 of job 0"


def test_a_step_that_was_away_when_it_was_loaded_is_not_damaged() -> None:
    reader = moved_away(
        (2, ["create: 1.restoring*", "get: 1/TREE.json"]),
        (0, ["rename: 1.staging*"]),
        (2, ["get: 1/TREE.json", "tells*"]),
        (0, ["rename: 1.replaced*", "tells*"]),
    )
    assert ends(reader)["restore"] == "step 1 of job 0"


def test_a_listing_of_a_directory_that_was_moved_meanwhile_is_not_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a real file system it was opened before, and read when its marker was gone already."""
    store, children, late = MemoryStore(), MemoryStore.children, ["1"]
    assert Job("one", store).save(1) == "saved"

    def is_late(files: MemoryStore, prefix: str) -> list[str]:
        names = children(files, prefix)
        if prefix in late:
            late.remove(prefix)
            names.remove("COMMIT.json")
        return names

    monkeypatch.setattr(MemoryStore, "children", is_late)
    assert inspect_run(store).committed == [1]


def test_a_root_that_changes_whenever_it_is_looked_at_is_no_empty_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, children = MemoryStore(), MemoryStore.children
    assert Job("one", store).save(1) == "saved"
    looks = itertools.count()

    def changing(files: MemoryStore, prefix: str) -> list[str]:
        names = children(files, prefix)
        return [n for n in names if n != "COMMIT.json"] + [f"{next(looks)}"] * (prefix == "1")

    monkeypatch.setattr(MemoryStore, "children", changing)
    with pytest.raises(StorageError, match="changed 20 times while it was looked at"):
        inspect_run(store)


@pytest.mark.parametrize("make", [MemoryStore, MemoryBucket])
@pytest.mark.parametrize("command", ["verify", "show"])
@pytest.mark.parametrize("then", ["is saved again", "is deleted"])
def test_the_command_line_does_not_call_a_step_damaged_that_changes_while_it_is_read(
    make: Any, command: str, then: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    store = make()
    Job("one", store).save(1)
    Job("one", store).save(2)
    acts = [lambda: Job("two", store).save(2, replace=True)]
    if then == "is deleted":
        acts = [lambda: retention.delete_step(store, 2, now=0.0)]
    read_records = reading.read_records

    def late(*arguments: Any) -> Any:
        if acts:
            acts.pop()()
        return read_records(*arguments)

    monkeypatch.setattr(reading, "read_records", late)
    monkeypatch.setattr(reading, "open_root", lambda root: store)
    assert cli.main([command, "root"]) == 0
    told = capsys.readouterr()
    assert "damaged" not in told.out + told.err


@pytest.mark.parametrize("command", ["verify", "show"])
def test_the_command_line_does_not_call_a_step_damaged_that_is_away_for_a_moment(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    store = MemoryStore()
    Job("one", store).save(1)
    looks, read_records = itertools.count(), reading.read_records

    def away(*arguments: Any) -> Any:
        if next(looks):
            return read_records(*arguments)
        store.rename("1", "1.replaced-0123456789abcdef")
        try:
            return read_records(*arguments)
        finally:
            store.rename("1.replaced-0123456789abcdef", "1")

    monkeypatch.setattr(reading, "read_records", away)
    monkeypatch.setattr(reading, "open_root", lambda root: store)
    assert cli.main([command, "root"]) == 0
    assert "damaged" not in capsys.readouterr().out
