"""Two real jobs on one run: the second is refused, or follows; and one that was stopped, and goes
on, does no harm.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import datarax_dist as dd
from datarax_dist.errors import LeaseError
from datarax_dist.inspection import inspect_run
from datarax_dist.lease import Lease, newest_lease
from datarax_dist.storage import LocalStore
from datarax_dist.testing.faults import fail_at

TTL = 2.0

# Saves steps, tells how each ended, and is stopped by itself at a phase of the last one.
JOB = """
import json, signal, sys, threading
import numpy as np
import datarax_dist as dd
from datarax_dist import telemetry

root, steps, phase, keep, replace = json.loads(sys.argv[1])
last = False

def stop(name, host):
    if last and name == phase:
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # at once, on this thread

telemetry.observe(stop)
options = dd.Options(lease_ttl_seconds=2.0)
with dd.Checkpointer(root, keep=keep and dd.latest(keep), options=options) as ckpt:
    for step in steps:
        last = step == steps[-1]
        try:
            handle = ckpt._save(step, state={"w": np.full(4, 1)}, data=None, metadata=None,
                                force=True, replace=replace)
            handle.result(60)
            print(json.dumps([step, "saved", ""]), flush=True)
        except Exception as error:
            print(json.dumps([step, type(error).__name__, str(error)]), flush=True)
    print("done", flush=True)
    sys.stdin.readline()
"""


class Other:
    """Another job, in a process of its own."""

    def __init__(self, root: Path, steps: list[int], phase: str = "", **more: Any) -> None:
        told = json.dumps([str(root), steps, phase, more.get("keep"), more.get("replace", False)])
        self.process = subprocess.Popen(
            [sys.executable, "-c", JOB, told],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )

    def until_stopped(self) -> None:
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), "it was not stopped"

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def until_done(self) -> dict[int, tuple[str, str]]:
        """Waits until it has saved what it can. It stays there, and holds the run."""
        assert self.process.stdout is not None
        ended = {}
        for line in self.process.stdout:
            if line.strip() == "done":
                return ended
            step, how, text = json.loads(line)
            ended[step] = (how, text)
        raise AssertionError(self.process.communicate()[1])

    def end(self) -> str:
        out, err = self.process.communicate("\n", timeout=60)
        assert out == ""
        return err


@pytest.fixture
def others() -> Iterator[list[Other]]:
    started: list[Other] = []
    yield started
    for other in started:
        if other.process.poll() is None:
            other.process.kill()
        other.process.communicate()


def whose(root: Path) -> dict[int, float]:
    """Returns the value that each committed step holds: 1 of the other job, 2 of this one."""
    with dd.Checkpointer(root) as ckpt:
        return {
            step: float(ckpt.restore(step=step).state["w"].max())
            for step in inspect_run(LocalStore(str(root))).committed
        }


def save(ckpt: dd.Checkpointer, step: int, **more: Any) -> None:
    handle = ckpt._save(
        step,
        state={"w": np.full(4, 2)},
        data=None,
        metadata=None,
        force=True,
        replace=more.get("replace", False),
    )
    assert handle is not None
    handle.result(60)


OPTIONS = dd.Options(lease_ttl_seconds=TTL)


def test_a_second_job_is_refused_at_once_and_may_read(tmp_path: Path, others: list[Other]) -> None:
    others.append(Other(tmp_path, [1, 2]))
    assert {how for how, _ in others[0].until_done().values()} == {"saved"}
    with dd.Checkpointer(tmp_path, save_when=dd.every_steps(1000)) as ckpt:
        assert ckpt.restore().step == 2
        begin = time.monotonic()
        for call in (
            lambda: ckpt.save(3, state={"w": np.ones(4)}),  # whatever the policy says
            lambda: ckpt.save(1000, state={"w": np.ones(4)}),
            lambda: ckpt.delete(1),
        ):
            with pytest.raises(LeaseError, match=f"process {others[0].process.pid} on") as caught:
                call()
            assert "lease_wait_seconds" in str(caught.value)
        assert time.monotonic() - begin < 1.0
        assert others[0].end() == ""
        ckpt.save(1000, state={"w": np.ones(4)}).result(60)  # type: ignore[union-attr]
    assert inspect_run(LocalStore(str(tmp_path))).committed == [1, 2, 1000]


def test_a_second_job_that_waits_goes_on_when_the_first_has_ended(
    tmp_path: Path, others: list[Other]
) -> None:
    others.append(Other(tmp_path, [1]))
    others[0].until_done()
    options = dd.Options(lease_ttl_seconds=TTL, lease_wait_seconds=120)
    with dd.Checkpointer(tmp_path, options=options) as ckpt:
        assert others[0].process.stdin is not None
        others[0].process.stdin.write("\n")
        others[0].process.stdin.flush()
        save(ckpt, 2)
    assert others[0].end() == ""
    assert whose(tmp_path) == {1: 1, 2: 2}


def test_a_killed_job_is_followed_at_once(tmp_path: Path, others: list[Other]) -> None:
    others.append(Other(tmp_path, [1]))
    others[0].until_done()
    others[0].process.kill()
    others[0].process.wait()
    begin = time.monotonic()
    with dd.Checkpointer(tmp_path) as ckpt:  # its lease lasts a minute
        save(ckpt, 2)
    assert time.monotonic() - begin < 20
    assert whose(tmp_path) == {1: 1, 2: 2}


PHASES = ["save:stage", "save:started", "save:record", "save:commit", "save:publish"]
MORE_PHASES = ["save:positions", "save:hash", "save:verify"]


@pytest.mark.parametrize(
    "phase", [*PHASES, *(pytest.param(phase, marks=pytest.mark.long) for phase in MORE_PHASES)]
)
def test_a_job_that_was_stopped_and_goes_on_commits_nothing_and_says_who_has_the_run(
    tmp_path: Path, others: list[Other], phase: str
) -> None:
    others.append(Other(tmp_path, [1, 2], phase))
    others[0].until_stopped()
    with dd.Checkpointer(tmp_path, options=OPTIONS) as ckpt:
        save(ckpt, 2)
        save(ckpt, 3)
        before = whose(tmp_path)
        others[0].go_on()
        ended = others[0].until_done()
        assert ended[1][0] == "saved"
        assert ended[2][0] == "LeaseError", ended
        assert f"process {os.getpid()} on" in ended[2][1]
        save(ckpt, 4)  # ours still
    others[0].end()
    assert before == {1: 1, 2: 2, 3: 2}
    assert whose(tmp_path) == {**before, 4: 2}
    lease = newest_lease(LocalStore(str(tmp_path)))
    assert lease is not None and lease.epoch == 2


def test_a_job_that_was_stopped_and_goes_on_deletes_nothing(
    tmp_path: Path, others: list[Other]
) -> None:
    others.append(Other(tmp_path, [1, 2], "save:committed", keep=1))
    others[0].until_stopped()  # it has committed 2, and will not delete 1
    with dd.Checkpointer(tmp_path, options=OPTIONS) as ckpt:
        save(ckpt, 3)
        others[0].go_on()
        assert others[0].until_done()[2][0] == "saved"
        assert f"process {os.getpid()} on" in others[0].end()  # in its log
        assert whose(tmp_path) == {1: 1, 2: 1, 3: 2}


def test_objects_of_one_process_share_the_run(tmp_path: Path) -> None:
    with dd.Checkpointer(tmp_path) as first, dd.Checkpointer(tmp_path) as second:
        save(first, 1)
        save(second, 2)
        first.close()
        save(second, 3)
        lease = newest_lease(LocalStore(str(tmp_path)))
        assert lease is not None and not lease.released
    lease = newest_lease(LocalStore(str(tmp_path)))
    assert lease is not None and lease.released and lease.epoch == 1


FORKS = """
import multiprocessing, sys, threading
import numpy as np
import datarax_dist as dd
from datarax_dist.lease import newest_lease
from datarax_dist.storage import LocalStore
from datarax_dist.testing.faults import _at

ckpt = dd.Checkpointer(sys.argv[1])
ckpt.save(1, state={"w": np.ones(4)}).result()
there, go_on = threading.Event(), threading.Event()
_at("save:record", 0, 1, lambda: (there.set(), go_on.wait(60)))
handle = ckpt.save(2, state={"w": np.ones(4)})
there.wait(60)
child = multiprocessing.get_context("fork").Process(target=print, args=("child",))
child.start()  # in the middle of a save
child.join(30)
go_on.set()
handle.result()
print(child.exitcode, newest_lease(LocalStore(sys.argv[1])).released)
ckpt.close()
"""


def test_a_forked_child_that_ends_lets_nothing_go(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKS, str(tmp_path)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, check=True, env=environment
    )
    assert done.stdout.split() == ["child", "0", "False"], done.stderr


def test_a_lease_is_renewed_while_nothing_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renewed = threading.Semaphore(0)
    renew = Lease.renew

    def and_tell(lease: Lease) -> None:
        renew(lease)
        if lease._store.root == str(tmp_path):  # and not that of an object that lives elsewhere
            renewed.release()

    monkeypatch.setattr(Lease, "renew", and_tell)
    with dd.Checkpointer(tmp_path, options=dd.Options(lease_ttl_seconds=1.5)) as ckpt:
        save(ckpt, 1)
        for _ in range(3):
            assert renewed.acquire(timeout=30), "it is not renewed"
        found = newest_lease(LocalStore(str(tmp_path)))
    assert found is not None and found.renewals >= 3


ENDS = """
import sys
import numpy as np
import datarax_dist as dd

ckpt = dd.Checkpointer(sys.argv[1])
ckpt.save(1, state={"w": np.ones(4)}).result()
"""


def test_a_script_that_ends_without_closing_lets_the_run_go(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ENDS, str(tmp_path)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, timeout=100, check=True, env=environment)
    lease = newest_lease(LocalStore(str(tmp_path)))
    assert lease is not None and lease.released


def test_a_save_that_nobody_could_begin_takes_no_run(tmp_path: Path) -> None:
    with dd.Checkpointer(tmp_path) as ckpt:
        with fail_at("save:capture", 0, OSError("no")), pytest.raises(OSError, match="no"):
            save(ckpt, 1)
        assert list(tmp_path.iterdir()) == []
