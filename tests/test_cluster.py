"""Dead, stuck and cut off hosts, for real: each host has a network namespace of its own."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cluster
import pytest
import targets

from datarax_dist import telemetry
from datarax_dist.inspection import inspect_run
from datarax_dist.storage import LocalStore
from datarax_dist.testing import HostResult

pytestmark = [pytest.mark.multihost, pytest.mark.xdist_group("multihost")]

NAMED_SECONDS = 15.0  # the promise
SAVE_SECONDS = 25.0  # the deadline of a save: what is seen sooner is not seen by the deadline
START_SECONDS = 90.0

MOMENTS = ("before", *telemetry.SAVE_PHASES, "after")  # of the save of step 2
FAULTS = ("cut", "stop", "kill")
SHORT = [
    ("cut", 0, "save:start"),  # Orbax asks the coordination service there
    ("cut", 1, "save:written"),
]


def save_until_lost(path: str, root: str, moment: str, victim: int) -> Any:
    """Saves steps until a save fails; says so, and what it said. The victim waits at `moment` of
    step 2 until the test lets it go.
    """
    import jax

    import datarax_dist as dd

    me, devices = jax.process_index(), jax.device_count()
    cluster.tell(path, "up", me)
    states = {step: targets.mesh_state((devices,), ("x",), step) for step in (1, 2, 3)}
    batches = dd.data.shards(targets.Counter, 8)
    options = dd.Options(save_timeout_seconds=SAVE_SECONDS, exchange_timeout_seconds=SAVE_SECONDS)
    saved: list[int] = []
    with dd.Checkpointer(root, keep=dd.latest(1), options=options) as ckpt:
        for step, state in states.items():
            if step == 2 and me == victim:
                cluster.tell_once(path, "paused", moment, me, wait=True)
            if me == victim and (step, moment) in ((2, "before"), (3, "after")):
                cluster.tell(path, "paused", me, wait=True, phase=moment)
            next(batches)
            try:
                handle = ckpt.save(
                    step, state=state, data={"batches": batches}, metadata={"step": step}
                )
                assert handle is not None
                handle.result()
            except dd.errors.CheckpointError as error:
                cluster.tell(
                    path,
                    "ended",
                    me,
                    step=step,
                    saved=saved,
                    kind=type(error).__name__,
                    text=str(error),
                    phase=getattr(error, "phase", None),
                    missing=list(getattr(error, "missing", None) or ()),
                )
                break
            saved.append(step)
    cluster.tell(path, "closed", me)
    return saved


@pytest.fixture
def net(request: pytest.FixtureRequest) -> Iterator[cluster.Cluster]:
    try:
        made = cluster.cluster(getattr(request, "param", 2))
        entered = made.__enter__()
    except cluster.Unavailable as why:
        pytest.skip(f"hosts cannot have networks of their own here: {why}")
    yield entered
    made.__exit__(None, None, None)


def check_named(facts: dict[str, Any], victim: int) -> None:
    """What a host that was left behind must be told."""
    text = facts["text"]
    assert facts["kind"] == "PeerLostError", text
    assert facts["missing"] == [victim], text
    assert facts["phase"] and facts["phase"].split(":")[-1] in text, text
    assert re.search(rf"\bhosts? {victim}\b", text), text
    assert "arrived" in text and "missing" in text, text
    assert re.search(r"\b[0-9]+ s\b", text), text
    assert "Look at" in text, text


def check_run(root: Path, told: list[dict[str, Any]]) -> None:
    """What the hosts were told is true, the newest step is whole, and a fresh job goes on."""
    committed = inspect_run(LocalStore(str(root))).committed
    newest = max(committed)
    assert newest in (1, 2, 3)
    for facts in told:
        assert newest >= max(facts["saved"])
        if f"Step {facts['step']} was not committed" in facts["text"]:
            assert facts["step"] not in committed, facts
    assert targets.restore_step(str(root), (4,), ("x",))[:2] == (
        newest,
        targets.expected_digest(newest),
    )
    targets.save_steps(str(root), (4,), ("x",), [9])
    assert targets.restore_step(str(root), (4,), ("x",))[:2] == (9, targets.expected_digest(9))


def fell(
    root: Path, net: cluster.Cluster, fault: str, victim: int, moment: str
) -> list[HostResult]:
    """Runs a job, and takes a host away from it at a moment of the save of step 2."""
    survivors = [host for host in range(net.count) if host != victim]
    told: list[dict[str, Any]] = []
    with (
        cluster.Stage() as stage,
        net.start(
            save_until_lost,
            (stage.path, str(root), moment, victim),
            timeout_seconds=240,
            grace_seconds=120,
        ) as job,
    ):
        paused = stage.wait("paused", host=victim, until=time.monotonic() + START_SECONDS)
        assert paused is not None and paused.facts["event"] == "paused", "moment never reached"
        pid = paused.facts["pid"]
        begin = time.monotonic()
        if fault == "cut":
            net.cut(victim)
        else:
            os.kill(pid, signal.SIGSTOP if fault == "stop" else signal.SIGKILL)
        paused.go()
        late = begin + NAMED_SECONDS + SAVE_SECONDS + 80  # to tell late from never
        ends = [stage.wait("ended", host=host, until=late) for host in survivors]
        # The others have given up; the one that was away comes back.
        if fault == "cut":
            net.heal(victim)
        elif fault == "stop":
            os.kill(pid, signal.SIGCONT)
        back = time.monotonic()
        bound = back + SAVE_SECONDS + NAMED_SECONDS
        last = stage.wait("ended", host=victim, until=bound)
        closed = [stage.wait("closed", host=host, until=bound) for host in range(net.count)]
        report(stage, fault, victim, moment, begin, back)
        assert last is not None, (
            f"host {victim} has not ended {bound - back:.0f} s after its return"
        )
        assert None not in closed, "a host has not closed its run"
        told = [end.facts for end in (*ends, last) if end and end.facts["event"] == "ended"]
    results = job.results()
    check_run(root, told)
    for host, end in zip(survivors, ends, strict=True):
        assert end is not None, f"host {host} was never told"
        seconds = end.facts["at"] - begin
        assert seconds <= NAMED_SECONDS, f"host {host} was told after {seconds:.1f} s"
        if end.facts["event"] == "gone":  # JAX ends the others when the primary is killed
            assert (fault, victim) == ("kill", 0)
        else:
            check_named(end.facts, victim)
    return results


def report(
    stage: cluster.Stage, fault: str, victim: int, moment: str, begin: float, back: float
) -> None:
    """For whoever reads the output of a test that failed."""
    print(f"{fault} host {victim} at {moment}; it was back after {back - begin:.1f} s")
    for visit in stage._visits:
        facts = dict(visit.facts)
        if facts["at"] > begin:
            print(f"  {facts.pop('at') - begin:6.2f} s  host {facts.pop('host')}: {facts}")


@pytest.mark.parametrize(("fault", "victim", "moment"), SHORT)
def test_a_host_that_is_gone_is_named_within_15_seconds_and_the_run_goes_on(
    net: cluster.Cluster, tmp_path: Path, fault: str, victim: int, moment: str
) -> None:
    fell(tmp_path / "run", net, fault, victim, moment)


LONG = [
    (fault, victim, moment)
    for moment in MOMENTS
    for victim in (0, 1)
    for fault in FAULTS
    if (victim == 0 or moment not in targets.PRIMARY_PHASES)
    and (fault, victim, moment) not in SHORT
]


@pytest.mark.long
@pytest.mark.parametrize(("fault", "victim", "moment"), LONG)
def test_a_host_that_is_gone_at_any_moment_is_named_within_15_seconds_and_the_run_goes_on(
    net: cluster.Cluster, tmp_path: Path, fault: str, victim: int, moment: str
) -> None:
    fell(tmp_path / "run", net, fault, victim, moment)


@pytest.mark.long
@pytest.mark.parametrize("net", [4], indirect=True)
@pytest.mark.parametrize("fault", ["cut", "stop"])
@pytest.mark.parametrize("victim", [0, 2])
def test_all_the_hosts_that_are_left_are_told_the_same(
    net: cluster.Cluster, tmp_path: Path, fault: str, victim: int
) -> None:
    fell(tmp_path / "run", net, fault, victim, "save:record")
