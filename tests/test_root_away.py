"""A root that is not there for a while: its file system is not mounted, say."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import datarax_dist as dd
from datarax_dist.boards import LocalBoard
from datarax_dist.clock import SystemClock
from datarax_dist.errors import LeaseError, StorageError
from datarax_dist.hosts import HostGroup
from datarax_dist.inspection import inspect_run
from datarax_dist.lease import Lease
from datarax_dist.request import SaveRequest
from datarax_dist.save import Saver
from datarax_dist.storage import LocalStore
from datarax_dist.telemetry import Phases
from datarax_dist.testing import MemoryArrays, MemoryBucket


def test_a_save_while_the_root_is_away_brings_nothing_back(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with dd.Checkpointer(root) as ckpt:
        ckpt.save(1, state={"w": np.ones(3)}).result(20)
        root.rename(tmp_path / "away")
        with pytest.raises(StorageError, match="Is its file system mounted"):
            ckpt.save(2, state={"w": np.ones(3)})
        assert not root.exists()
        (tmp_path / "away").rename(root)
        assert ckpt.save(3, state={"w": np.ones(3)}).result(20).step == 3


def test_a_job_that_has_written_is_not_told_that_there_is_nothing(tmp_path: Path) -> None:
    """Or it would begin anew."""
    root = tmp_path / "run"
    with dd.Checkpointer(root) as ckpt:
        assert ckpt.try_restore() is None
        ckpt.save(1, state={"w": np.ones(3)}).result(20)
        root.rename(tmp_path / "away")
        for ask in (ckpt.try_restore, ckpt.restore, ckpt.latest_step, ckpt.all_steps):
            with pytest.raises(StorageError, match="Is its file system mounted"):
                ask()
        (tmp_path / "away").rename(root)
        assert ckpt.restore().step == 1


@pytest.mark.parametrize("what", ["nothing", "an empty directory", "another run"])
def test_a_run_that_was_restored_does_not_begin_anew_where_it_is_away(
    tmp_path: Path, what: str
) -> None:
    root = tmp_path / "run"
    for path in (root, tmp_path / "other"):
        with dd.Checkpointer(path) as ckpt:
            ckpt.save(1, state={"w": np.ones(3)})
    with dd.Checkpointer(root) as ckpt:
        assert ckpt.restore().step == 1
        root.rename(tmp_path / "away")
        if what != "nothing":
            root.mkdir()
        if what == "another run":
            root.rmdir()
            (tmp_path / "other").rename(root)
        before = sorted(root.rglob("*"))
        assert ckpt.all_steps() == ([1] if what == "another run" else [])
        with pytest.raises(StorageError, match="Is its file system mounted"):
            ckpt.save(2, state={"w": np.ones(3)})
        assert sorted(root.rglob("*")) == before
        if root.exists():
            root.rename(tmp_path / "gone")
        (tmp_path / "away").rename(root)
        assert ckpt.save(3, state={"w": np.ones(3)}).result(20).step == 3


def test_a_root_that_goes_away_during_a_save_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the save still writes makes the directory anew."""
    root, put = tmp_path / "run", LocalStore.put

    def then_it_is_away(store: Any, key: str, data: bytes) -> None:
        put(store, key, data)
        if "2.staging" in key and key.endswith("/STEP.json"):
            root.rename(tmp_path / "away")

    with dd.Checkpointer(root) as ckpt:
        ckpt.save(1, state={"w": np.ones(3)}).result(20)
        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "put", then_it_is_away)
            with pytest.raises(StorageError):
                ckpt.save(2, state={"w": np.ones(3)}).result(20)
            ckpt._drain()
        shutil.rmtree(root)
        (tmp_path / "away").rename(root)
        assert ckpt.save(3, state={"w": np.ones(3)}).result(20).step == 3


@pytest.mark.parametrize(
    ("has_leases", "looks"), [(True, False), (True, True), (False, True)], ids=str
)
def test_a_bucket_that_holds_another_run_is_not_written_to(has_leases: bool, looks: bool) -> None:
    """Both leases have epoch 1, and this one knows from before what there is."""

    def saver(store: MemoryBucket) -> Saver:
        lease = Lease(store, SystemClock(), ttl_seconds=60) if has_leases else None
        return Saver(store, HostGroup(LocalBoard()), SystemClock(), dd.Options(), None, lease)

    def save(one: Saver, step: int) -> int:
        writer = MemoryArrays(one._store, 0, {"a": b"x"})
        request = SaveRequest(
            step=step, writer=writer, shared={"TREE.json": b"{}"}, items=("state",)
        )
        return one.begin(step, lambda: request, Phases("save", 0)).finish().step

    ours, other = MemoryBucket(), MemoryBucket()
    one = saver(ours)
    assert (save(one, 1), save(saver(other), 1)) == (1, 1)
    for key in list(ours.files):
        del ours.files[key]
    ours.files.update(other.files)
    if looks:
        one.learn(inspect_run(ours))
    before = dict(ours.files)
    with pytest.raises((StorageError, LeaseError)):
        save(one, 2)
    assert inspect_run(ours).committed == [1]
    assert all(ours.files[key] == data for key, data in before.items())
