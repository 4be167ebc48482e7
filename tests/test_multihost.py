"""The promises on real `jax.distributed` processes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import targets

import datarax_dist as dd
from datarax_dist import telemetry
from datarax_dist.buckets import BucketStore
from datarax_dist.inspection import inspect_run
from datarax_dist.storage import LocalStore, Store
from datarax_dist.testing import run_hosts

pytestmark = [pytest.mark.multihost, pytest.mark.xdist_group("multihost")]

SHAPES = {1: ((2,), ("y",)), 2: ((2, 2), ("a", "b")), 4: ((4, 2), ("a", "b"))}


@dataclass(frozen=True)
class Place:
    """Where a run is. `flip` damages one byte in the middle of a file below the root."""

    root: str
    store: Store
    flip: Callable[[str], None]


@pytest.fixture(params=["file system", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "bucket":
        gcs, bucket = request.getfixturevalue("gcs"), request.getfixturevalue("bucket")

        def flip_object(key: str) -> None:
            name = f"runs/one/{key}"
            gcs.flip(bucket, name, len(gcs.objects(bucket)[name].content) // 2, 3)

        root = f"gs://{bucket}/runs/one"
        return Place(root, BucketStore(root), flip_object)

    def flip_file(key: str) -> None:
        content = bytearray((tmp_path / "run" / key).read_bytes())
        content[len(content) // 2] ^= 8
        (tmp_path / "run" / key).write_bytes(content)

    root = str(tmp_path / "run")
    return Place(root, LocalStore(root), flip_file)


@pytest.mark.parametrize(
    ("place", "before"),
    [
        ("file system", 4),
        ("bucket", 2),
        pytest.param("file system", 2, marks=pytest.mark.long),
        pytest.param("bucket", 4, marks=pytest.mark.long),
    ],
    indirect=["place"],
)
def test_a_step_of_n_hosts_restores_on_1_2_and_4_with_another_mesh(
    place: Place, before: int
) -> None:
    def run(target: Any, hosts: int, *arguments: Any) -> Any:
        ended = run_hosts(
            target,
            hosts,
            devices_per_host=2,
            args=(place.root, *arguments),
            timeout_seconds=90,
        )
        assert [host.error for host in ended] == [None] * hosts
        return [host.value for host in ended]

    saved = run(targets.save_steps, before, (2 * before,), ("x",), [1, 2])
    assert all(value[0] == saved[0][0] for value in saved)
    digests = saved[0][0]
    for hosts, mesh in SHAPES.items():
        back = run(targets.restore_step, hosts, *mesh)
        assert {value[:2] for value in back} == {(2, digests[2])}
        assert sorted(record for value in back for record in value[2]) == list(range(16, 24))
    bare = targets.restore_step(place.root, (4,), ("x",), 1, False)
    assert bare[:2] == (1, digests[1])
    # One bit of what the last host has written: all hosts fall back, and say so.
    last = re.compile(rf"2/state/ocdbt\.process_{before - 1}(_direct)?/d/")
    entries = [entry for entry in place.store.list("2/state") if last.match(entry.key)]
    place.flip(max(entries, key=lambda entry: entry.size).key)
    back = run(targets.restore_step, 2, *SHAPES[2])
    assert {value[:2] for value in back} == {(1, digests[1])}
    assert all("step 2" in value[3] for value in back)


@pytest.mark.parametrize("host", [0, 1])
@pytest.mark.parametrize("phase", telemetry.SAVE_PHASES)
def test_sigkill_at_each_phase_leaves_the_newest_committed_step_and_nothing_else(
    tmp_path: Path, phase: str, host: int
) -> None:
    only_primary = phase in targets.PRIMARY_PHASES
    if only_primary and host:  # these exist on the primary only: killed there in the next save
        host, occurrence, last = 0, 2, 3
    else:
        occurrence, last = 1, 2
    root = tmp_path / "run"
    (root / "tensorboard").mkdir(parents=True)
    (root / "tensorboard" / "events").write_text("mine")
    (root / "5.orbax-checkpoint-tmp").mkdir()
    targets.save_steps(str(root), (4,), ("x",), [1])
    killed = run_hosts(
        targets.save_and_retain,
        2,
        args=(str(root), [2, 3]),
        env={"DATARAX_DIST_KILL_AT": f"{phase}@{host}#{occurrence}"},
        timeout_seconds=90,
        grace_seconds=2,
    )
    assert killed[host].exit_code == -9, "the phase was never reached"
    inspection = inspect_run(LocalStore(str(root)))
    newest = max(inspection.committed)
    assert newest in (last - 1, last)
    assert newest == last or phase not in ("save:committed", "save:retire")
    assert targets.restore_step(str(root), (4,), ("x",))[:2] == (
        newest,
        targets.expected_digest(newest),
    )
    left = sorted(path.name for path in root.iterdir())
    expected = {str(step) for step in inspect_run(LocalStore(str(root))).committed}
    assert set(left) == expected | {"RUN.json", "lease", "tensorboard", "5.orbax-checkpoint-tmp"}


@pytest.mark.parametrize(
    "phase", ["save:capture", "save:started", "save:positions", "save:hash", "save:record"]
)
@pytest.mark.parametrize("host", [0, 1])
def test_an_error_on_one_host_is_raised_on_all_within_two_seconds_and_the_next_save_works(
    tmp_path: Path, phase: str, host: int
) -> None:
    hosts = run_hosts(
        targets.fail_one, 2, args=(str(tmp_path / "run"), phase, host), timeout_seconds=90
    )
    assert [h.error for h in hosts] == [None, None]
    for result in hosts:
        (first, second, third), steps = result.value
        assert first[0] == third[0] == "ok"
        kind, where, failures, seconds = second
        assert kind == "PeerError" and seconds < 2.0
        assert where in (phase, "prepare")
        assert list(failures) == [host] and "No space left on device" in failures[host]
        assert steps == [1, 3]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["1", "3", "RUN.json", "lease"]


def test_ctrl_c_on_one_host_is_heard_by_the_others_and_ends_no_save_in_the_background(
    tmp_path: Path,
) -> None:
    os.mkfifo(tmp_path / "heard")
    paths = [str(tmp_path / name) for name in ("run", "pid", "heard")]
    hosts = run_hosts(targets.interrupted, 2, args=tuple(paths), timeout_seconds=90)
    assert [h.error for h in hosts] == [None, None]
    (first, steps), (second, also) = (h.value for h in hosts)
    assert (second, steps, also) == (["interrupted", "interrupted"], [1, 3], [1, 3])
    [(kind, failures), saved] = first
    assert (kind, list(failures), saved) == ("PeerError", [1], 3)
    assert "KeyboardInterrupt" in failures[1]
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == ["1", "3", "RUN.json", "lease"]


@pytest.mark.parametrize("host", [0, 1])
def test_a_write_that_the_file_system_refuses_on_one_host_is_raised_on_all(
    tmp_path: Path, host: int
) -> None:
    """A real refusal, inside TensorStore: the host may write small files only (RLIMIT_FSIZE)."""
    hosts = run_hosts(targets.full_disk_on, 2, args=(str(tmp_path), host), timeout_seconds=90)
    assert [h.error for h in hosts] == [None, None]
    for result in hosts:
        (first, (text, failures, seconds), third), steps = result.value
        assert (first, third, steps) == ("saved", "saved", [1, 3])
        assert seconds < 2.0
        assert list(failures) == [host]
        assert "File too large" in failures[host]
        assert "ulimit -f" in text
        assert "Step 2 was not committed" in text
    # What TensorStore is still writing when one of its writes has failed may outlive the next save,
    # which tidies up; the one after that finds what it has made.
    with dd.Checkpointer(tmp_path) as ckpt:
        ckpt.save(4, state={"x": 4})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "3", "4", "RUN.json", "lease"]


def test_another_step_number_or_another_value_on_one_host_raises_on_all_and_writes_nothing(
    tmp_path: Path,
) -> None:
    hosts = run_hosts(targets.disagree, 2, args=(str(tmp_path / "run"),), timeout_seconds=90)
    assert [h.error for h in hosts] == [None, None]
    for host in hosts:
        (elsewhere, _), *told = host.value
        assert "host 1 failed" in elsewhere or host.host == 1
        assert "there: the array is on devices of other hosts only" in elsewhere
        (wrong_step, before), (wrong_value, then), (wrong_position, after), *asked = told
        assert "PeerError" in wrong_step and "different steps" in wrong_step
        assert "count" in wrong_value and "InvalidArgumentError" in wrong_value
        assert "host 1" in wrong_position and "boom" in wrong_position
        assert before == then == after == []
        for text, seconds in asked:
            assert "0 or more, not -1" in text
            assert seconds < 10.0, "nobody waits for who has asked for no step"


def test_a_policy_that_raises_on_one_host_raises_on_all_and_the_next_save_works(
    tmp_path: Path,
) -> None:
    hosts = run_hosts(targets.policy_fails, 2, args=(str(tmp_path / "run"),), timeout_seconds=90)
    assert [h.error for h in hosts] == [None, None]
    for host in hosts:
        told, steps, left = host.value
        assert "the policy's own file" in told
        assert steps == [2]
        assert host.host or "host 1 failed in phase 'close': it has closed" in left


def test_a_killed_host_is_named_after_as_long_as_the_options_say(tmp_path: Path) -> None:
    [told, _] = run_hosts(
        targets.killed_in_a_save, 2, args=(str(tmp_path / "run"), 2.0), timeout_seconds=60
    )
    assert told.error is None
    seconds, text = told.value
    assert "no sign of life for 2 s" in text or "no sign of life for 3 s" in text
    assert seconds < 10


def test_a_write_that_was_given_up_does_not_speak_for_the_next_save(tmp_path: Path) -> None:
    hosts = run_hosts(targets.given_up_write, 2, args=(str(tmp_path / "run"),), timeout_seconds=120)
    assert [h.error for h in hosts] == [None, None]
    for host in hosts:
        told, step, whole = host.value
        assert "Error" in told
        assert (step, whole) == (2, True)
