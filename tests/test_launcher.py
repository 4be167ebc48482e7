"""The launcher runs real processes, reports each host truthfully, and leaves none behind."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from datarax_dist.testing import HostError, run_hosts
from datarax_dist.testing.launcher import free_port

pytestmark = [pytest.mark.multihost, pytest.mark.xdist_group("multihost")]


@dataclasses.dataclass(frozen=True)
class Place:
    index: int
    count: int
    local_devices: int
    total: float


def report_place(offset: float) -> Place:
    import jax
    from jax.experimental import multihost_utils

    gathered = multihost_utils.process_allgather(jax.numpy.float32(offset + jax.process_index()))
    return Place(
        jax.process_index(), jax.process_count(), jax.local_device_count(), float(gathered.sum())
    )


def fail_on_host_one() -> str:
    import jax

    if jax.process_index() == 1:
        raise LookupError("no such thing")
    print("host zero was here")
    return "fine"


def kill_host(victim: int) -> str:
    import jax

    if jax.process_index() == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"


def wait_for_ever(folder: str) -> None:
    Path(folder, f"{os.getpid()}.pid").touch()
    print("about to wait", flush=True)
    time.sleep(3600)


def wait_when_peer_dies(folder: str) -> None:
    import jax

    if jax.process_index() == 1:
        os._exit(7)
    wait_for_ever(folder)


def coordinator() -> str:
    from jax._src import distributed

    return distributed.global_state.coordinator_address


def return_argument(argument: str) -> str:
    return argument


def return_unpicklable() -> object:
    return threading.Lock()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def pids_in(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob("*.pid")]


def test_two_hosts_form_one_job_and_return_their_places():
    results = run_hosts(report_place, 2, devices_per_host=2, args=(10.0,))
    assert [result.value for result in results] == [Place(0, 2, 2, 21.0), Place(1, 2, 2, 21.0)]
    assert [(result.host, result.exit_code) for result in results] == [(0, 0), (1, 0)]
    assert [result.error for result in results] == [None, None]


def test_one_host_needs_no_jax_distributed():
    (result,) = run_hosts(return_argument, 1, args=("hello",))
    assert (result.value, result.exit_code) == ("hello", 0)


def test_variables_given_reach_every_host():
    (result,) = run_hosts(os.getenv, 1, args=("DATARAX_X",), env={"DATARAX_X": "y"})
    assert result.value == "y"


def test_each_host_can_be_placed_by_a_command_of_its_own():
    prefixes = [["env", "DATARAX_X=zero"], ["env", "DATARAX_X=one"]]
    results = run_hosts(os.getenv, 2, args=("DATARAX_X",), prefixes=prefixes)
    assert [result.value for result in results] == ["zero", "one"]
    with pytest.raises(ValueError, match="2 prefixes were given for 3 hosts"):
        run_hosts(os.getenv, 3, args=("DATARAX_X",), prefixes=prefixes)


def test_the_job_is_formed_at_the_address_given():
    results = run_hosts(coordinator, 2, address="127.0.0.2")
    assert [result.value.rpartition(":")[0] for result in results] == ["127.0.0.2"] * 2


def test_the_error_of_a_failing_host_is_returned_beside_the_values_of_the_others():
    fine, failed = run_hosts(fail_on_host_one, 2)
    assert (fine.value, fine.error, fine.exit_code) == ("fine", None, 0)
    assert "host zero was here" in fine.output
    assert isinstance(failed.error, HostError)
    assert (failed.error.type_name, failed.error.message) == ("LookupError", "no such thing")
    assert "fail_on_host_one" in failed.error.traceback
    assert (failed.value, failed.exit_code) == (None, 1)


def test_a_value_that_cannot_be_pickled_is_an_error_of_the_host():
    (result,) = run_hosts(return_unpicklable, 1)
    assert result.error is not None
    assert result.exit_code == 1


def test_a_killed_host_shows_its_signal_and_the_other_still_returns():
    survivor, killed = run_hosts(kill_host, 2, args=(1,))
    assert (survivor.value, survivor.exit_code) == ("survived", 0)
    assert (killed.value, killed.error, killed.exit_code) == (None, None, -signal.SIGKILL)


def test_a_killed_coordinator_shows_its_signal_though_jax_may_abort_the_other():
    killed, other = run_hosts(kill_host, 2, args=(0,))
    assert (killed.value, killed.error, killed.exit_code) == (None, None, -signal.SIGKILL)
    # It finished, or JAX failed to reach the coordinator, or JAX aborted it: never killed by us.
    assert (
        other.value == "survived"
        or (other.error is not None and other.exit_code == 1)
        or other.exit_code == -signal.SIGABRT
    )


def test_a_host_that_waits_for_a_dead_peer_is_killed_after_the_grace(tmp_path):
    waiting, dead = run_hosts(wait_when_peer_dies, 2, args=(str(tmp_path),), grace_seconds=1.0)
    assert dead.exit_code == 7
    assert waiting.exit_code == -signal.SIGKILL
    assert "wait_for_ever" in waiting.output  # its stacks


def test_a_timeout_kills_every_process_and_shows_the_last_output(tmp_path):
    with pytest.raises(TimeoutError, match=r"hosts \[0\] of 1(.|\n)*about to wait"):
        run_hosts(wait_for_ever, 1, args=(str(tmp_path),), timeout_seconds=5.0)
    pids = pids_in(tmp_path)
    assert len(pids) == 1
    assert not any(is_running(pid) for pid in pids)


def test_a_script_can_run_its_own_functions_and_classes(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(
        "import dataclasses\n"
        "from datarax_dist.testing import run_hosts\n"
        "@dataclasses.dataclass\n"
        "class Box:\n"
        "    content: int\n"
        "def double(box):\n"
        "    return Box(2 * box.content)\n"
        "if __name__ == '__main__':\n"
        "    print(run_hosts(double, 1, args=(Box(4),))[0].value.content)\n"
    )
    root = str(Path(__file__).resolve().parents[1])
    ran = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.stdout.strip(), ran.returncode) == ("8", 0), ran.stderr


@pytest.mark.parametrize("target", [lambda: None, 3])
def test_a_target_that_a_process_cannot_find_is_refused(target):
    with pytest.raises(ValueError, match="module-level function"):
        run_hosts(target, 1)


def test_a_free_port_is_a_port():
    assert 1024 <= free_port() < 65536
