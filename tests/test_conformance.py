"""The conformance suites, on what the package itself has."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import targets

from datarax_dist import format as fmt
from datarax_dist.buckets import BucketStore
from datarax_dist.errors import StorageError
from datarax_dist.storage import LocalStore, Store
from datarax_dist.testing import (
    HOST_GROUP_CHECKS,
    STORE_CHECKS,
    MemoryBucket,
    MemoryStore,
    SimulatedHosts,
    check_host_group,
    run_hosts,
)

Check = Callable[[Callable[[], Store]], None]


@pytest.mark.parametrize("check", STORE_CHECKS, ids=lambda check: check.__name__)
def test_local_store(check: Check, tmp_path: Path) -> None:
    numbers = itertools.count()
    check(lambda: LocalStore(str(tmp_path / str(next(numbers)))))


def test_local_store_never_renames_onto_an_empty_directory(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    store.put("7.staging-x/a", b"content")
    (tmp_path / "7").mkdir()
    with pytest.raises(StorageError, match="there already"):
        store.rename("7.staging-x", "7")
    assert store.get("7.staging-x/a") == b"content"


def test_local_store_knows_a_renaming_whose_reply_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client of NFS asks again then, and is told that there is nothing to rename."""
    store, rename = LocalStore(str(tmp_path)), os.rename

    def twice(source: str, target: str) -> None:
        rename(source, target)
        rename(source, target)

    def elsewhere(source: str, target: str) -> None:
        rename(source, source + ".gone")
        os.mkdir(target)
        rename(source, target)

    store.put("7.staging-x/a", b"content")
    monkeypatch.setattr(os, "rename", twice)
    store.rename("7.staging-x", "7")
    assert store.get("7/a") == b"content"
    monkeypatch.setattr(os, "rename", elsewhere)
    with pytest.raises(KeyError):
        store.rename("7", "8")


def below(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


# What there is to be done to what a link leads to, at each depth.
ACTS: dict[str, Callable[[LocalStore, str], object]] = {
    "put": lambda store, link: store.put(f"{link}/a", b"new"),
    "put, and make a directory": lambda store, link: store.put(f"{link}/new/a", b"new"),
    "create": lambda store, link: store.create(f"{link}/new", b"new"),
    "create what is there": lambda store, link: store.create(f"{link}/a", b"x"),
    "get": lambda store, link: store.get(f"{link}/a"),
    "digest": lambda store, link: store.digest(f"{link}/a"),
    "delete": lambda store, link: store.delete(f"{link}/a"),
    "rename into": lambda store, link: store.rename("own", f"{link}/own"),
    "rename out of": lambda store, link: store.rename(f"{link}/directory", "directory"),
    "sync a file": lambda store, link: store.sync("", [f"{link}/a"]),
    "sync names": lambda store, link: store.sync(link, []),
    "sweep": lambda store, link: store.sweep(link),
    "sweep below": lambda store, link: store.sweep(f"{link}/directory"),
}


@pytest.mark.parametrize("link", ["link", "own/link"])
@pytest.mark.parametrize("act", ACTS)
def test_no_operation_goes_through_a_link_below_the_root(
    act: str, link: str, tmp_path: Path
) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    for folder in (outside, outside / "directory", root, root / "own"):
        folder.mkdir()
    for name in ("a", "directory/b", ".a.0123456789ab.tmp", "directory/.b.0123456789ab.tmp"):
        (outside / name).write_bytes(b"x")
        os.utime(outside / name, (1, 1))  # old enough to be swept
    (root / link).symlink_to(outside)
    before = below(outside), below(root)
    with pytest.raises((StorageError, fmt.InvalidRecordError), match="symbolic link") as raised:
        ACTS[act](LocalStore(str(root)), link)
    assert (below(outside), below(root)) == before
    if isinstance(raised.value, StorageError):
        assert f"{root / link} is a symbolic link" in str(raised.value), "which one"
        assert "Remove it" in str(raised.value), "what to do"


def test_a_listing_ends_at_a_link_below_the_root_and_shows_it(tmp_path: Path) -> None:
    outside, store = tmp_path / "outside", LocalStore(str(tmp_path / "root"))
    store.put("7/a", b"x")
    (outside / "directory").mkdir(parents=True)
    (outside / "directory" / "b").write_bytes(b"x")
    (tmp_path / "root" / "7" / "link").symlink_to(outside)
    shown = [("7/link", "a symbolic link")]
    for prefix in ("7/link", "7/link/directory", "7/link/directory/b", "7/link/nothing"):
        assert [(e.key, e.irregular) for e in store.list(prefix)] == shown, prefix
    for prefix in ("", "7"):
        assert [(e.key, e.irregular) for e in store.list(prefix)] == [("7/a", ""), *shown]
    assert store.children("7/link") == store.children("7/link/directory") == []


def test_the_root_and_what_is_above_it_may_be_links(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "above").symlink_to(tmp_path / "there")
    (tmp_path / "there" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    for root in (tmp_path / "above" / "link", tmp_path / "above" / "new" / "run"):
        numbers = itertools.count()
        for check in STORE_CHECKS[:4]:
            check(lambda: LocalStore(f"{root}/{next(numbers)}"))  # noqa: B023 - called at once
        store = LocalStore(str(root))
        store.put("a/b", b"x")
        store.rename("a", "c")
        store.sync("c", ["c/b"])
        store.sweep("c")
        assert store.digest("c/b")[0] == len(store.list("c")) == 1
        store.delete("c")
        assert "c/" not in store.children("")


@pytest.mark.parametrize("check", STORE_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("make", [MemoryStore, MemoryBucket])
def test_memory_store(check: Check, make: Callable[[], Store]) -> None:
    check(make)


@pytest.mark.parametrize("check", STORE_CHECKS, ids=lambda check: check.__name__)
def test_bucket_store(check: Check, bucket: str) -> None:
    check(lambda: BucketStore(f"gs://{bucket}/runs/one"))


def test_a_bucket_without_a_prefix_is_a_root(bucket: str) -> None:
    store = BucketStore(f"gs://{bucket}")
    store.put("7/COMMIT.json", b"x")
    assert store.children("") == ["7/"]
    assert [entry.key for entry in store.list("7")] == ["7/COMMIT.json"]
    store.delete("7")
    assert store.list("") == []


@pytest.mark.parametrize("hosts", [1, 2, 5])
@pytest.mark.parametrize("check", HOST_GROUP_CHECKS, ids=lambda check: check.__name__)
def test_simulated_host_group(check: Callable[[Any], None], hosts: int) -> None:
    assert SimulatedHosts(hosts).run(check) == [None] * hosts


@pytest.mark.multihost
@pytest.mark.xdist_group("multihost")
def test_real_host_group() -> None:
    hosts = run_hosts(targets.conform, 3, timeout_seconds=90)
    names = [check.__name__ for check in HOST_GROUP_CHECKS]
    assert [(host.error, host.value) for host in hosts] == [(None, names)] * 3


def test_a_host_group_that_does_not_conform_is_told_so() -> None:
    hosts = SimulatedHosts(1)
    hosts.groups[0].exchange = lambda *a, **k: [{"host": 1}]
    [result] = hosts.run(check_host_group)
    assert isinstance(result, AssertionError)
    assert "every_host_gets_every_payload" in str(result)
