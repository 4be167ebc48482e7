"""Power cuts by model: `python -m datarax_dist.testing.power` tries all cuts, these are a part."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from datarax_dist import storage
from datarax_dist.testing import posix, power

# Where the library fsyncs; and what must not be there after a cut when one of these does not.
FSYNCS = {
    "LocalStore._make_directories, directory": "step 1: saving 0",
    "LocalStore._write_temporary, file": "damaged",
    "LocalStore.create, directory": r"never committed, or the marker is lost",
    "LocalStore.put, directory": "host records are missing",
    "LocalStore.rename, directory": "step 1: saving 0",
    "LocalStore._sync_names, directory": r"torn: state/.*: missing",
    "LocalStore._sync_file, file": r"torn: state/.*: 0 bytes instead",
}


@pytest.fixture(scope="module")
def one_host(tmp_path_factory: pytest.TempPathFactory) -> power.Recording:
    return power.record_one_host(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> power.Recording:
    return power.record_two_hosts(tmp_path_factory.mktemp("two"))


def after_marks(number: int, event: posix.Event) -> bool:
    return isinstance(event, posix.Mark)


def claim_begun(number: int, event: posix.Event) -> bool:
    entries = event.entries if isinstance(event, posix.Change) else {}
    return any(name.startswith(".STEP.json") for name in entries)


def claim_removed(number: int, event: posix.Event) -> bool:
    return isinstance(event, posix.Change) and event.entries.get("STEP.json", 0) is None


def every(n: int) -> Any:
    return lambda number, event: number % n == 0 or after_marks(number, event)


def test_a_reported_step_of_a_real_save_survives_whatever_a_cut_leaves(
    one_host: power.Recording, tmp_path: Path
) -> None:
    tried = power.try_cuts(one_host, tmp_path / "after", chosen=every(67), samples=2, restores=5)
    assert tried.cuts > 15
    assert tried.states > 60
    assert tried.restores > 4


def test_a_reported_step_of_two_hosts_survives_whatever_a_cut_leaves(
    two_hosts: power.Recording, tmp_path: Path
) -> None:
    tried = power.try_cuts(two_hosts, tmp_path / "after", chosen=every(13), samples=2)
    assert tried.states > 60


def test_a_save_that_is_cut_before_its_claim_leaves_nothing_for_ever(
    one_host: power.Recording, tmp_path: Path
) -> None:
    tried = power.try_cuts(one_host, tmp_path / "after", chosen=claim_begun, restores=0)
    assert tried.cuts >= 5


def test_a_deletion_whose_claim_is_lost_leaves_nothing_for_ever(
    one_host: power.Recording, tmp_path: Path
) -> None:
    assert power.try_cuts(one_host, tmp_path / "after", chosen=claim_removed).cuts > 0


@pytest.mark.parametrize("where", FSYNCS)
def test_each_fsync_is_needed(where: str, one_host: power.Recording, tmp_path: Path) -> None:
    power.try_cuts(one_host, tmp_path / "with", chosen=after_marks)
    with pytest.raises(power.BreachError, match=FSYNCS[where]):
        power.try_cuts(one_host, tmp_path / "after", without=where, chosen=after_marks)


def test_no_fsync_is_forgotten_above(one_host: power.Recording) -> None:
    syncs = {e.where for e in one_host.log.events if isinstance(e, posix.Sync)}
    assert syncs == {*FSYNCS, "LocalStore.delete, directory"}


def test_a_name_lasts_whose_link_was_made_though_its_reply_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def lost(source: str, target: str, **directories: int) -> None:
        link(source, target, **directories)
        raise FileExistsError(17, "the reply was lost, and the request sent again")

    monkeypatch.setattr(os, "link", lost)
    with posix.record(tmp_path) as log:
        assert storage.LocalStore(str(tmp_path)).create("a", b"mine")
    *_, (_, disk) = posix.cuts(log)
    nothing, *_ = posix.states_after_cut(disk, random.Random(0))
    assert nothing.files == {"a": b"mine"}


def test_a_recording_misses_nothing(tmp_path: Path) -> None:
    base, again = tmp_path / "base", tmp_path / "again"
    (base / "there").mkdir(parents=True)
    (base / "there" / "before").write_bytes(b"1")
    again.mkdir()
    store = storage.LocalStore(str(base))
    with posix.record(base) as log:
        store.put("there/a", b"first")
        store.put("there/a", b"second")
        store.create("new/deep/b", b"b")
        (base / "new" / "other").write_bytes(b"by others")
        store.rename("new", "newer")
        (base / "there" / "before").rename(base / "moved")
        store.delete("there/a")
    *_, (_, disk) = posix.cuts(log)
    _, everything, *_ = posix.states_after_cut(disk, random.Random(0))
    everything.materialise(again)
    assert tree(again) == tree(base)
    assert tree(base) == {
        "newer": None, "newer/deep": None, "newer/deep/b": b"b", "newer/other": b"by others",
        "there": None, "moved": b"1",
    }  # fmt: skip


def tree(top: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(top)): None if path.is_dir() else path.read_bytes()
        for path in top.rglob("*")
    }


def seen(*events: posix.Event, directories: tuple[int, ...] = ()) -> set[Any]:
    """Every state after a cut at the end, each as the set of its files; a directory is ""."""
    log = posix.Log(list(events), {0, *directories})
    *_, (_, disk) = posix.cuts(log)
    states = posix.states_after_cut(disk, random.Random(0), samples=50)
    return {frozenset((path, data or b"") for path, data in s.files.items()) for s in states}


def test_of_a_file_that_was_not_fsynced_anything_may_be_there() -> None:
    states = seen(posix.Change(0, {"a": 1}), posix.Sync(0, ""), posix.Write(1, b"data"))
    assert states == {frozenset({("a", c)}) for c in (b"", b"da", bytes(4), b"data")}


def test_an_fsync_of_a_file_is_none_of_its_name() -> None:
    states = seen(posix.Change(0, {"a": 1}), posix.Write(1, b"data"), posix.Sync(1, ""))
    assert states == {frozenset(), frozenset({("a", b"data")})}


def test_an_fsync_of_a_directory_is_none_of_its_own_name() -> None:
    change, inside = posix.Change(0, {"d": 1}), posix.Change(1, {"a": 2})
    states = seen(change, inside, posix.Sync(1, ""), directories=(1,))
    assert states == {frozenset(), frozenset({("d", b""), ("d/a", b"")})}


def test_names_of_a_directory_come_in_any_order() -> None:
    a, b = posix.Change(0, {"a": 1}), posix.Change(0, {"b": 2})
    only_b = frozenset({("b", b"")})
    assert only_b in seen(a, b)
    assert only_b not in seen(a, posix.Sync(0, ""), b)


def test_renaming_within_a_directory_is_one_change_and_across_two_never_loses_both() -> None:
    made = (posix.Change(0, {"a": 1}), posix.Sync(0, ""))
    within = seen(*made, posix.Change(0, {"a": None, "b": 1}))
    assert within == {frozenset({("a", b"")}), frozenset({("b", b"")})}

    made = (posix.Change(0, {"a": 1, "d": 2}), posix.Sync(0, ""))
    to = posix.Change(2, {"a": 1})
    away = posix.Change(0, {"a": None}, needs=to)
    before, both, after = (
        frozenset({("d", b""), *names}) for names in
        ([("a", b"")], [("a", b""), ("d/a", b"")], [("d/a", b"")])
    )  # fmt: skip
    assert seen(*made, to, away, directories=(2,)) == {before, both, after}
    assert seen(*made, to, away, posix.Sync(0, ""), directories=(2,)) == {after}
