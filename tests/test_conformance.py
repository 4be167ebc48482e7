"""The conformance suites, on what the package itself has."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import targets

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
