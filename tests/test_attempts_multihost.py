"""Real processes that are killed while they restore, and what the jobs after them do."""

from __future__ import annotations

import concurrent.futures
import os
from pathlib import Path

import pytest
import targets

from datarax_dist.inspection import inspect_run
from datarax_dist.storage import LocalStore, Store, open_store
from datarax_dist.testing import run_hosts

pytestmark = [pytest.mark.multihost, pytest.mark.xdist_group("multihost")]


def crash(root: str, hosts: int, victim: int, phase: str = "restore:load") -> None:
    ended = run_hosts(
        targets.restore_step,
        hosts,
        args=(root, (-1,), ("x",)),
        env={"DATARAX_DIST_KILL_AT": f"{phase}@{victim}"},
        timeout_seconds=90,
        grace_seconds=2,
    )
    assert ended[victim].exit_code == -9, "the phase was never reached"


def attempts(store: Store) -> list[str]:
    return [name.split("-")[0] for name in store.children("") if ".restoring-" in name]


def go_on(root: str, hosts: int) -> list[tuple[object, ...]]:
    ended = run_hosts(targets.restore_and_go_on, hosts, args=(root,), timeout_seconds=90)
    assert [host.error for host in ended] == [None] * hosts
    return [host.value for host in ended]


def check_story(root: str, hosts: int, victim: int, phase: str = "restore:load") -> None:
    """Two jobs die of step 3; the third goes on from 2 and saves 3 again; the fourth takes that."""
    store = open_store(root)
    targets.save_steps(root, (4,), ("x",), [1, 2, 3])
    crash(root, hosts, victim, phase)
    assert attempts(store) == ["3.restoring"]
    crash(root, hosts, victim, phase)
    assert attempts(store) == ["3.restoring"] * 2
    for step, digest, refused, suspects in go_on(root, hosts):
        assert (step, digest) == (2, targets.expected_digest(2))
        assert "crashed the job twice" in refused["step 3"]  # type: ignore[operator]
        assert suspects == (3,)
    assert inspect_run(store).committed == [1, 2, 3]
    assert attempts(store) == []
    for step, digest, refused, suspects in go_on(root, hosts):
        assert (step, digest) == (3, targets.expected_digest(103)), "the one that was saved again"
        assert (refused, suspects) == ({}, ())
    assert sorted(store.children("")) == ["1/", "2/", "3/", "4/", "RUN.json", "lease/"]


@pytest.mark.parametrize(
    ("hosts", "victim", "phase"),
    [
        (1, 0, "restore:load"),
        (2, 1, "restore:load"),
        pytest.param(2, 0, "restore:load", marks=pytest.mark.long),
        pytest.param(1, 0, "restore:verify", marks=pytest.mark.long),
        pytest.param(1, 0, "restore:positions", marks=pytest.mark.long),
        pytest.param(2, 1, "restore:verify", marks=pytest.mark.long),
    ],
)
def test_a_step_whose_restore_is_killed_twice_is_not_tried_a_third_time(
    tmp_path: Path, hosts: int, victim: int, phase: str
) -> None:
    check_story(str(tmp_path / "run"), hosts, victim, phase)


def test_a_step_of_a_bucket_whose_restore_is_killed_twice_is_not_tried_a_third_time(
    bucket: str,
) -> None:
    check_story(f"gs://{bucket}/runs/one", 2, 1)


def test_one_crash_does_not_count_and_a_success_clears_it(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    targets.save_steps(root, (4,), ("x",), [1, 2, 3])
    store = LocalStore(root)
    for _ in range(2):
        crash(root, 1, 0)
        assert attempts(store) == ["3.restoring"]
        assert targets.restore_step(root, (4,), ("x",))[0] == 3
        assert attempts(store) == []


def test_an_evaluation_that_is_restoring_on_this_machine_does_not_count(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    targets.save_steps(root, (4,), ("x",), [1, 2, 3])
    begun, release = tmp_path / "begun", tmp_path / "release"
    os.mkfifo(begun)
    os.mkfifo(release)
    crash(root, 1, 0)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        evaluation = pool.submit(
            run_hosts,
            targets.restore_slowly,
            1,
            args=(root, str(begun), str(release)),
            timeout_seconds=120,
        )
        assert begun.read_text() == "begun"
        try:
            assert len(attempts(LocalStore(root))) == 2
            assert targets.restore_step(root, (4,), ("x",))[0] == 3
        finally:
            release.write_text("go on")
        assert evaluation.result()[0].value == 3
