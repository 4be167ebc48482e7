"""The promises in a bucket, on real `jax.distributed` processes."""

from __future__ import annotations

import concurrent.futures
import json
import subprocess
import sys
from pathlib import Path

import pytest
import targets

from datarax_dist import telemetry
from datarax_dist.buckets import BucketStore
from datarax_dist.inspection import inspect_run
from datarax_dist.testing import FakeGCS, run_hosts

pytestmark = [pytest.mark.multihost, pytest.mark.xdist_group("multihost")]

REPOSITORY = Path(__file__).parent.parent
# On the primary only, or where it alone does something.
PHASES = (*telemetry.SAVE_PHASES, *telemetry.BUCKET_PHASES)
# The others, and four hosts, with `make test-long`.
SHORT = {
    "save:started",
    "save:claim",
    "save:arrays",
    "save:record",
    "save:verify",
    "save:publish",
    "save:commit",
    "save:committed",
    "save:retire",
}
two_or_four = pytest.mark.parametrize(
    "hosts", [2, pytest.param(4, marks=pytest.mark.long)], ids=["2 hosts", "4 hosts"]
)


@pytest.fixture
def root(bucket: str) -> str:
    return f"gs://{bucket}/runs/one"


@two_or_four
@pytest.mark.parametrize(
    "phase", [pytest.param(p, marks=[] if p in SHORT else pytest.mark.long) for p in PHASES]
)
def test_sigkill_at_each_phase_leaves_the_newest_committed_step_and_nothing_else(
    bucket: str, root: str, phase: str, hosts: int
) -> None:
    """The primary dies in the phases that only it has; in the others the hosts take turns."""
    host = 0 if phase in targets.PRIMARY_PHASES or PHASES.index(phase) % 2 else hosts - 1
    BucketStore(root).put("tensorboard/events", b"mine")
    targets.save_steps(root, (4,), ("x",), [1])
    killed = run_hosts(
        targets.save_and_retain,
        hosts,
        args=(root, [2, 3]),
        env={"DATARAX_DIST_KILL_AT": f"{phase}@{host}#1"},
        timeout_seconds=90,
        grace_seconds=2,
    )
    assert killed[host].exit_code == -9, "the phase was never reached"
    store = BucketStore(root)
    newest = max(inspect_run(store).committed)
    assert newest in (1, 2)
    assert newest == 2 or phase not in ("save:committed", "save:retire")
    assert newest == 1 or phase in ("save:commit", "save:committed", "save:retire", "save:written")
    assert targets.restore_step(root, (4,), ("x",))[:2] == (
        newest,
        targets.expected_digest(newest),
    )
    targets.save_steps(root, (4,), ("x",), [newest + 1])
    found = inspect_run(store)
    assert max(found.committed) == newest + 1
    # A void marker alone may stay: this process, which has saved step 1, is alive.
    assert {c.state for c in found.candidates} <= {"committed", "void"}
    names = {c.name for c in found.candidates}
    assert {name.rstrip("/") for name in store.children("")} == names | {
        "RUN.json",
        "lease",
        "tensorboard",
    }


@two_or_four
def test_two_jobs_never_damage_what_the_other_has_committed(root: str, hosts: int) -> None:
    steps = [1, 2, 3, 4]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(
                run_hosts, targets.save_what_is_free, hosts, args=(root, steps), timeout_seconds=120
            )
            for _ in range(2)
        ]
        ended = [job.result() for job in jobs]
    saved: list[int] = []
    for job in ended:
        assert [host.error for host in job] == [None] * hosts
        assert all(host.value == job[0].value for host in job), "all hosts of a job see the same"
        saved += [step for step, how in job[0].value if how == "saved"]
    assert len(saved) == len(set(saved)), "a step was saved by both"
    committed = inspect_run(BucketStore(root)).committed
    assert set(committed) == set(saved)
    for step in committed:
        found = targets.restore_step(root, (4,), ("x",), step)
        assert found[:2] == (step, targets.expected_digest(step))


@pytest.mark.parametrize("permission", ["storage.objects.create", "storage.objects.list"])
def test_a_permission_that_is_missing_is_named_on_all_hosts(
    gcs: FakeGCS, root: str, permission: str
) -> None:
    gcs.deny(permission)
    hosts = run_hosts(targets.save_steps, 2, args=(root, (2,), ("x",), [1]), timeout_seconds=90)
    for host in hosts:
        assert host.error is not None
        assert permission in host.error.message


def test_requests_that_go_wrong_leave_a_step_committed_or_not_and_all_hosts_agree() -> None:
    """A part of the sweep that `python -m benchmarks.bucket_faults` makes over all requests."""
    command = [sys.executable, "-m", "benchmarks.bucket_faults", "--json"]
    command += ["--hosts", "2", "--every", "53", "--modes", "applied_then_dropped,stalled"]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["bad"] == 0
    assert told["counts"]["committed"] >= 8
    assert told["counts"]["restored"] >= 4
