"""A step that a restore has passed over may be saved again. What another job has put in its place
since may not, nor what is no step of the run.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import datarax_dist as dd
from datarax_dist import config, hosts, writers
from datarax_dist import format as fmt
from datarax_dist import lease as leases
from datarax_dist.checkpoint import OrbaxCheckpointHandler
from datarax_dist.clock import SystemClock
from datarax_dist.errors import StepExistsError
from datarax_dist.hosts import HostGroup
from datarax_dist.inspection import inspect_run
from datarax_dist.request import SaveRequest
from datarax_dist.restore import Restorer
from datarax_dist.save import Saver
from datarax_dist.telemetry import Phases
from datarax_dist.testing import MemoryArrays, MemoryBucket, MemoryStore

stores = pytest.mark.parametrize("make", [MemoryStore, MemoryBucket], ids=["file system", "bucket"])
OPTIONS = config.Options(
    exchange_timeout_seconds=20, save_timeout_seconds=20, restore_timeout_seconds=20
)
SECONDS = 30.0


class Job:
    """One host that saves and restores, without a lease: other jobs come in between."""

    def __init__(self, store: Any, keep: Any = None, lease: Any = None) -> None:
        self.store = store
        self.group = HostGroup(hosts.LocalBoard())
        self.saver = Saver(store, self.group, SystemClock(), OPTIONS, keep, lease)

    def begin(self, step: int, content: bytes, phases: Phases, *, replace: bool = False) -> Any:
        request = SaveRequest(
            step=step,
            writer=MemoryArrays(self.store, 0, {"a": content}),
            shared={"TREE.json": b"{}"},
            items=("state",),
        )
        return self.saver.begin(step, lambda: request, phases, replace=replace)

    def save(self, step: int, content: bytes, *, replace: bool = False) -> Any:
        return self.begin(step, content, Phases("save", 0), replace=replace).finish()

    def restore(self) -> int:
        restorer = Restorer(self.store, self.group, OPTIONS)
        found = restorer.restore(
            None, lambda candidate, _: lambda: candidate.step, Phases("restore", 0)
        )
        assert found is not None
        self.saver.suspects.update(restorer.judged)
        step: int = found[0]
        return step


def make_run(make: Callable[[], Any]) -> Any:
    store = make()
    for step in (1, 2, 3):
        Job(store).save(step, b"%d" % step)
    return store


def content(store: Any, step: int) -> bytes:
    found: bytes = store.get(f"{step}/state/ocdbt.process_0/a")
    return found


def make_suspect(store: Any, step: int) -> None:
    marker = fmt.digest(store.get(f"{step}/COMMIT.json"))
    dead = {**writers.writer_identity(), "started": "0"}
    run = str(inspect_run(store).run)
    for nonce in ("0" * 16, "1" * 16):
        attempt = fmt.RestoreAttempt(run, step, nonce, marker, 1, dead, 1.7e9, 20.0)
        store.put(fmt.attempt_name(step, nonce), fmt.dump_attempt(attempt))


def lose_a_record(store: Any) -> None:
    store.delete("3/hosts")


def damage_the_marker(store: Any) -> None:
    store.put("3/COMMIT.json", b"{}")


def damage_a_file(store: Any) -> None:
    store.put("3/TREE.json", b"[]")


WAYS = [lose_a_record, damage_the_marker, damage_a_file, lambda store: make_suspect(store, 3)]
ways = pytest.mark.parametrize("spoil", WAYS, ids=["record", "marker", "file", "suspect"])


@stores
@ways
def test_a_step_that_was_passed_over_is_saved_again(
    make: Any, spoil: Callable[[Any], None]
) -> None:
    store = make_run(make)
    spoil(store)
    job = Job(store)
    assert job.restore() == 2
    assert job.save(3, b"again").step == 3
    assert content(store, 3) == b"again"
    assert Job(store).restore() == 3
    with pytest.raises(StepExistsError):
        job.save(3, b"once more")


@stores
@ways
def test_a_step_that_another_job_has_saved_again_since_is_not(
    make: Any, spoil: Callable[[Any], None]
) -> None:
    store = make_run(make)
    spoil(store)
    job, other = Job(store, config.latest(3)), Job(store)
    assert job.restore() == other.restore() == 2
    other.save(3, b"theirs")
    with pytest.raises(StepExistsError, match="nothing was changed"):
        job.save(3, b"ours")
    assert content(store, 3) == b"theirs"
    assert job.save(4, b"ours").deleted == (1,), "it is one of the good ones"
    assert inspect_run(store).committed == [2, 3, 4]


@stores
@ways
def test_a_step_that_was_passed_over_is_not_one_of_the_good_ones(
    make: Any, spoil: Callable[[Any], None]
) -> None:
    store = make_run(make)
    spoil(store)
    job = Job(store, config.latest(2))
    assert job.restore() == 2
    assert job.save(4, b"ours").deleted == (1,)
    assert set(inspect_run(store).committed) | {3} == {2, 3, 4}


@stores
@pytest.mark.parametrize("marker", [b"{}", None], ids=["no marker", "a marker of another run"])
def test_a_directory_that_no_job_of_the_run_has_made_stays(make: Any, marker: bytes | None) -> None:
    store = make_run(make)
    if marker is None:
        other = make()
        Job(other).save(7, b"theirs")
        for entry in other.list("7"):
            store.put(entry.key, other.get(entry.key))
    else:
        store.put("7/COMMIT.json", marker)
    store.put("7/thesis.tex", b"mine")
    before = {entry.key: store.get(entry.key) for entry in store.list("7")}
    job = Job(store)
    assert job.restore() == 3
    for replace in (False, True):
        with pytest.raises(StepExistsError):
            job.begin(7, b"ours", Phases("save", 0), replace=replace)
    with pytest.raises(StepExistsError, match="no step of this run"):
        job.begin(7, b"ours", Phases("save", 0), replace=True)
    assert {entry.key: store.get(entry.key) for entry in store.list("7")} == before
    assert job.save(8, b"ours").step == 8


@stores
def test_what_comes_while_a_step_is_saved_again_stays(make: Any) -> None:
    store = make_run(make)
    theirs = {"3/COMMIT.json": b"{}", "3/thesis.tex": b"mine"}

    def come(phase: str) -> None:
        if phase == "arrays":
            store.delete("3")
            for key, data in theirs.items():
                store.put(key, data)

    phases = Phases("save", 0)
    begun = Job(store).begin(3, b"ours", phases, replace=True)
    phases.reach = come  # type: ignore[method-assign]
    with pytest.raises(StepExistsError):
        begun.finish()
    assert {entry.key: store.get(entry.key) for entry in store.list("3")} == theirs


@stores
def test_a_step_whose_claim_and_marker_are_lost_is_known_by_its_hosts_records(make: Any) -> None:
    store = make_run(make)
    store.put("3/STEP.json", b"")
    store.put("3/COMMIT.json", b"")
    job = Job(store)
    assert job.restore() == 2
    assert job.save(3, b"again").step == 3
    assert content(store, 3) == b"again"


@stores
def test_what_another_job_saves_while_it_is_saved_again_stays(make: Any) -> None:
    """Both are objects of one process, have passed over it, and the other one is faster."""
    store, lease = make_run(make), leases.Unguarded()
    damage_a_file(store)
    job, other = Job(store, lease=lease), Job(store, lease=lease)
    assert job.restore() == other.restore() == 2
    phases = Phases("save", 0)
    begun = job.begin(3, b"ours", phases)
    reach = phases.reach

    def then_the_other(phase: str) -> None:
        if phase == "arrays":
            phases.reach = reach  # type: ignore[method-assign]
            other.save(3, b"theirs")
        reach(phase)

    phases.reach = then_the_other  # type: ignore[method-assign]
    with pytest.raises(StepExistsError, match="that one stays"):
        begun.finish()
    assert content(store, 3) == b"theirs"


def test_what_a_step_was_before_does_not_keep_it_from_being_saved_again() -> None:
    """A save of it that died had not removed that yet; and what it has saved is damaged since."""
    store = make_run(MemoryStore)
    before = {entry.key: store.get(entry.key) for entry in store.list("3")}
    assert Job(store).save(3, b"newer", replace=True).step == 3
    damage_a_file(store)
    job = Job(store)
    assert job.restore() == 2
    for key, data in before.items():
        store.put(key.replace("3/", "3.replaced-0123456789abcdef/", 1), data)
    assert job.save(3, b"again").step == 3
    assert content(store, 3) == b"again"


@stores
def test_a_step_whose_claim_is_lost_is_known_by_its_marker(make: Any) -> None:
    store = make_run(make)
    store.delete("3/STEP.json")
    assert Job(store).save(3, b"again", replace=True).step == 3
    assert content(store, 3) == b"again"


def test_programs_that_take_turns_do_not_save_over_each_others_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with dd.Checkpointer(run) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, state={"w": np.full(4, step)}).result(SECONDS)
    (run / "3" / "TREE.json").write_bytes(b"")
    one, other = dd.Checkpointer(run), dd.Checkpointer(run)
    assert one.restore().step == other.restore().step == 2
    other.save(3, state={"w": np.full(4, 33)}).result(SECONDS)
    other.close()
    with pytest.raises(StepExistsError):
        one.save(3, state={"w": np.zeros(4)})
    one.close()
    with dd.Checkpointer(run) as ckpt:
        assert ckpt.restore().state["w"].tolist() == [33] * 4


def test_overwrite_does_not_mean_what_is_of_another_run(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for root in (ours, theirs):
        with dd.Checkpointer(root) as ckpt:
            ckpt.save(5 if root == theirs else 4, state={"w": np.ones(3)}).result(SECONDS)
    shutil.copytree(theirs / "5", ours / "5")
    (ours / "5" / "notes.txt").write_text("mine")
    handler = OrbaxCheckpointHandler()
    with pytest.raises(dd.errors.CheckpointError, match="no step of this run"):
        handler.save(ours, {"w": np.zeros(3)}, step=5, keep=0, overwrite=True)
    handler.close()
    assert (ours / "5" / "notes.txt").read_text() == "mine"
