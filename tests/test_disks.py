"""A disk that is full, read-only or stalls, for real: what is told, and that it goes on after."""

from __future__ import annotations

import contextlib
import errno
import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cluster
import disks
import numpy as np
import pytest
import targets

import datarax_dist as dd
from datarax_dist import errors, telemetry
from datarax_dist.errors import PeerError, StorageError
from datarax_dist.inspection import inspect_run
from datarax_dist.storage import LocalStore

TOLD_SECONDS = 2.0  # the promise: how soon every host is told of an error
STALL_SECONDS = 3.0  # the deadline of a save on a disk that stalls
MARGIN_SECONDS = 2.0  # how much later than that every host is told

IMPATIENT = dd.Options(save_timeout_seconds=STALL_SECONDS, exchange_timeout_seconds=STALL_SECONDS)

# Phases of a save after which something is still written, or given a name.
WRITING = (
    "save:capture",
    "save:prepare",
    "save:stage",
    "save:start",
    "save:started",
    "save:positions",
    "save:hash",
    "save:record",
    "save:written",
    "save:verify",
    "save:commit",
)
NAMING = ("save:publish",)
LATER = ("save:committed", "save:retire")
PHASES = (*WRITING, *NAMING, *LATER)
assert {*PHASES, "save:arrays"} == set(telemetry.SAVE_PHASES)  # that is for hosts that meet there


# Orbax leaves its other writes behind when one of them has failed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _what_is_left_is_collected_here() -> Iterator[None]:
    """Rather than in whichever test comes later, which it would fail."""
    yield
    gc.collect()


def on_phases(names: tuple[str, ...], short: tuple[str, ...]) -> Any:
    """Parametrises over phases, all but `short` of them as long tests."""
    return pytest.mark.parametrize(
        "phase",
        [pytest.param(name, marks=[] if name in short else pytest.mark.long) for name in names],
    )


@pytest.fixture
def disk() -> Iterator[disks.Disk]:
    yield from _made(disks.ext4())


@pytest.fixture
def small_disk() -> Iterator[disks.Disk]:
    yield from _made(disks.tmpfs(8 << 20))


def _made(maker: contextlib.AbstractContextManager[disks.Disk]) -> Iterator[disks.Disk]:
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(maker)
        except cluster.Unavailable as why:
            pytest.skip(f"no file systems can be mounted here: {why}")
        yield made


@contextlib.contextmanager
def acting(phase: str, act: Callable[[], None]) -> Iterator[list[float]]:
    """Calls `act` when `phase` begins for the first time; gives when that was done."""
    when: list[float] = []
    lock = threading.Lock()

    def sink(name: str, host: int) -> None:
        if name == phase and lock.acquire(blocking=False):
            act()
            when.append(time.monotonic())

    remove = telemetry.observe(sink)
    try:
        yield when
    finally:
        remove()


def state_of(step: int) -> Any:
    return targets.mesh_state((4,), ("x",), step)


def save(ckpt: dd.Checkpointer, step: int) -> None:
    """Saves a step with positions; waits for it."""
    batches = dd.data.shards(targets.Counter, 8)
    handle = ckpt.save(step, state=state_of(step), data={"batches": batches}, metadata={})
    assert handle is not None
    handle.result(60)


def check_goes_on(
    root: Path, ckpt: dd.Checkpointer | None, intact: set[int], *, given_up: bool = False
) -> None:
    """What was committed is whole, and the next save works here and in a fresh job. With `given_up`
    a write that nobody waits for any more may still be writing, below a name that is no step's.
    """
    assert set(inspect_run(LocalStore(str(root))).committed) >= intact
    for step in intact:
        restored = targets.restore_step(str(root), (4,), ("x",), step)
        assert restored[:2] == (step, targets.expected_digest(step))
    if ckpt is not None:
        save(ckpt, 8)
    targets.save_steps(str(root), (4,), ("x",), [9])
    newest = targets.restore_step(str(root), (4,), ("x",))
    assert newest[:2] == (9, targets.expected_digest(9))
    left = {path.name for path in root.iterdir()}
    if given_up:
        left = {name for name in left if not name.startswith("3.staging-")}
    committed = {str(step) for step in inspect_run(LocalStore(str(root))).committed}
    assert left == committed | {"RUN.json", "lease"}


def test_a_disk_that_saves_fill_up_keeps_every_step_and_takes_new_ones_after_a_deletion(
    small_disk: disks.Disk,
) -> None:
    root = small_disk.path / "run"
    state = {"x": np.arange(1 << 19, dtype=np.float32)}
    with dd.Checkpointer(root) as ckpt:
        saved: list[int] = []

        def save_on() -> None:
            while True:
                ckpt.save(len(saved) + 1, state=state).result(60)
                saved.append(len(saved) + 1)

        with pytest.raises(StorageError, match=r"(?s)No space left on device.*Free some") as full:
            save_on()
        assert full.value.errno == errno.ENOSPC
        assert len(saved) >= 2
        assert ckpt.all_steps() == saved
        ckpt.delete(1)
        ckpt.save(20, state=state).result(60)
        assert ckpt.all_steps() == [*saved[1:], 20]
        for step in saved[1:]:
            assert np.array_equal(ckpt.restore(step=step).state["x"], state["x"])


@on_phases(PHASES, ("save:start", "save:record", "save:commit"))
def test_a_disk_that_is_full_from_a_phase_on_fails_the_save_and_the_next_works(
    small_disk: disks.Disk, phase: str
) -> None:
    root = small_disk.path / "run"
    with dd.Checkpointer(root, keep=dd.latest(2)) as ckpt:
        save(ckpt, 1)
        save(ckpt, 2)
        with acting(phase, small_disk.fill) as when:
            if phase in WRITING:
                with pytest.raises(StorageError, match="No space left on device") as full:
                    save(ckpt, 3)
                assert full.value.errno == errno.ENOSPC
                assert "Free some space" in str(full.value)
            else:  # names need no room here
                save(ckpt, 3)
        assert when and time.monotonic() - when[0] < TOLD_SECONDS
        small_disk.make_room()
        check_goes_on(root, ckpt, {2})


@on_phases(PHASES, ("save:started", "save:commit", "save:publish"))
def test_a_disk_that_turns_read_only_in_a_phase_fails_the_save_and_the_next_works(
    disk: disks.Disk, phase: str
) -> None:
    root = disk.path / "run"
    with dd.Checkpointer(root, keep=dd.latest(2)) as ckpt:
        save(ckpt, 1)
        save(ckpt, 2)
        with acting(phase, disk.refuse_writes) as when:
            if phase in LATER:
                save(ckpt, 3)
            else:
                with pytest.raises(StorageError, match="Read-only file system") as refused:
                    save(ckpt, 3)
                assert refused.value.errno == errno.EROFS
                assert "The file system is read-only:" in str(refused.value)
        assert when and time.monotonic() - when[0] < TOLD_SECONDS
        committed = inspect_run(LocalStore(str(root))).committed
        assert (3 in committed) == (phase in LATER)
        disk.allow_writes()
        check_goes_on(root, ckpt, {2})


@pytest.fixture
def failing_disk() -> Iterator[disks.FailingDisk]:
    yield from _made(disks.failing())


@on_phases(("save:started", "save:record", "save:commit"), ("save:started",))
def test_a_device_that_fails_in_a_phase_fails_the_save_and_the_next_works_on_the_repaired_one(
    failing_disk: disks.FailingDisk, phase: str
) -> None:
    root = failing_disk.path / "run"
    with dd.Checkpointer(root, keep=dd.latest(2)) as ckpt:
        save(ckpt, 1)
        save(ckpt, 2)
        with acting(phase, failing_disk.fail) as when:
            with pytest.raises(StorageError) as failed:
                save(ckpt, 3)
        assert when and time.monotonic() - when[0] < TOLD_SECONDS
        # What fails first, the device or what the file system makes of it, is not ours to say.
        assert failed.value.errno in (errno.EIO, errno.ENOSPC, errno.EROFS)
        assert errors.storage_hint(failed.value.errno) in str(failed.value)
        failing_disk.repair()
        check_goes_on(root, ckpt, {1, 2})


def stall_in_save(ckpt: dd.Checkpointer, disk: disks.Disk, phase: str) -> tuple[Any, float]:
    """Saves step 3 on a disk that stalls in a phase, and goes on when the save has ended, or long
    after its deadline. Returns how it had ended by then, and how long after the stall.
    """
    with acting(phase, disk.stall) as when, ThreadPoolExecutor(1) as pool:
        saving = pool.submit(save, ckpt, 3)
        try:
            ended = saving.exception(STALL_SECONDS + MARGIN_SECONDS + 1) or "saved"
        except TimeoutError:
            ended = None
        now = time.monotonic()
        disk.go_on()
        saving.exception(60)
    assert when, "the phase was never reached"
    return ended, now - when[0]


@on_phases(PHASES, ("save:record",))
def test_a_disk_that_stalls_damages_nothing_and_saves_work_when_it_goes_on(
    disk: disks.Disk, phase: str
) -> None:
    root = disk.path / "run"
    with dd.Checkpointer(root, keep=dd.latest(2), options=IMPATIENT) as ckpt:
        save(ckpt, 1)
        save(ckpt, 2)
        stall_in_save(ckpt, disk, phase)
        check_goes_on(root, ckpt, {2}, given_up=True)
        assert phase not in LATER or 3 in inspect_run(LocalStore(str(root))).committed


@on_phases(("save:positions", "save:record", "save:commit"), ())
def test_a_disk_that_stalls_fails_the_save_at_its_deadline(disk: disks.Disk, phase: str) -> None:
    with dd.Checkpointer(disk.path / "run", options=IMPATIENT) as ckpt:
        save(ckpt, 1)
        ended, seconds = stall_in_save(ckpt, disk, phase)
        assert isinstance(ended, StorageError | PeerError), f"not told after {seconds:.1f} s"
        assert "deadline" in str(ended) or "waited" in str(ended)
        assert seconds < STALL_SECONDS + MARGIN_SECONDS


def save_and_tell(path: str, root: str, phase: str, victim: int, other: str, seconds: float) -> Any:
    """Saves three steps; says how each ended. The victim waits at `phase` of step 2, and all wait
    after it, until the test lets them go. The other host says when it is at the phase `other`.
    """
    import jax

    me, devices = jax.process_index(), jax.device_count()
    cluster.tell(path, "up", me)
    options = dd.Options(save_timeout_seconds=seconds, exchange_timeout_seconds=seconds)
    with dd.Checkpointer(root, options=options) as ckpt:
        for step in (1, 2, 3):
            state = targets.mesh_state((devices,), ("x",), step)
            batches = dd.data.shards(targets.Counter, 8)
            if step == 2 and me == victim:
                cluster.tell_once(path, "paused", phase, me, wait=True)
            elif step == 2:
                cluster.tell_once(path, "there", other, me)
            facts: dict[str, Any] = {"kind": "saved", "text": ""}
            try:
                handle = ckpt.save(step, state=state, data={"batches": batches}, metadata={})
                assert handle is not None
                handle.result()
            except dd.errors.CheckpointError as error:
                failures = {str(h): told for h, told in getattr(error, "failures", {}).items()}
                facts = {"kind": type(error).__name__, "text": str(error), "failures": failures}
            cluster.tell(path, "ended", me, wait=step == 2, step=step, **facts)
        return ckpt.all_steps()


def break_in_save(
    root: Path,
    phase: str,
    victim: int,
    break_it: Callable[[int], None],
    mend_it: Callable[[int], None],
    *,
    other: str = "save:prepare",
    seconds: float = 60.0,
    within: float = TOLD_SECONDS,
    prefixes: Any = (),
) -> list[tuple[dict[str, Any], float]]:
    """Runs two hosts, breaks a disk in the save of step 2, while the victim is at `phase` and the
    other one at `other` or beyond, and mends it. Returns how that save
    ended on each host, and how long after the break; checks that the next one works, in the same
    processes and in a fresh job.
    """
    patience = time.monotonic() + 120
    with (
        cluster.Stage() as stage,
        cluster.start_hosts(
            save_and_tell,
            2,
            (stage.path, str(root), phase, victim, other, seconds),
            prefixes=prefixes,
            timeout_seconds=120,
        ) as job,
    ):
        paused = stage.wait("paused", host=victim, until=patience)
        assert paused is not None and paused.facts["event"] == "paused", paused
        assert stage.wait("there", host=1 - victim, until=patience), "the other is not there"
        pid = paused.facts["pid"]
        break_it(pid)
        begin = time.monotonic()
        paused.go()
        late = begin + within + 30  # to tell late from never
        try:
            ends = [stage.wait("ended", host=host, step=2, until=late) for host in (0, 1)]
        finally:
            mend_it(pid)
        assert None not in ends, "a host was never told"
        for end in ends:
            end.go()
        thirds = [stage.wait("ended", host=host, step=3, until=patience) for host in (0, 1)]
        assert [third and third.facts.get("kind") for third in thirds] == ["saved", "saved"], [
            third and third.facts for third in thirds
        ]
        hosts = job.results()
    assert [host.error for host in hosts] == [None, None]
    steps = hosts[0].value
    assert steps in ([1, 3], [1, 2, 3])
    check_goes_on(root, None, set(steps), given_up=seconds < 60)
    for end in ends:
        print(f"{end.facts['at'] - begin:.2f} s: {end.facts}")
        if "Step 2 was not committed" in end.facts["text"]:
            assert steps == [1, 3]
    return [(end.facts, end.facts["at"] - begin) for end in ends]


def check_told(ends: list[tuple[dict[str, Any], float]], host: int, *words: str) -> None:
    """Every host was told in time that it was `host`, in which phase, and why."""
    for facts, seconds in ends:
        assert facts["kind"] == "PeerError", facts
        assert list(facts["failures"]) == [str(host)], facts
        assert f"host {host} failed in phase 'save:" in facts["text"], facts
        for word in words:
            assert word in facts["text"], facts
        assert seconds < TOLD_SECONDS, facts


@pytest.mark.multihost
@pytest.mark.xdist_group("multihost")
@pytest.mark.parametrize("host", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_disk_that_is_full_on_one_host_only_is_told_on_all_and_the_next_save_works(
    tmp_path: Path, host: int
) -> None:
    root = tmp_path / "run"
    mounts = disks.OwnMounts(tmp_path / "own")
    try:
        mounts.check()
    except cluster.Unavailable as why:
        pytest.skip(f"hosts cannot have mounts of their own here: {why}")
    ends = break_in_save(
        root,
        "save:start",
        host,
        lambda pid: mounts.cover(pid, root, 64 << 10),
        lambda pid: mounts.uncover(pid, root),
        prefixes=[mounts.prefix] * 2,
    )
    check_told(ends, host, "No space left on device", "Free some space", "Step 2 was not committed")


@pytest.mark.multihost
@pytest.mark.xdist_group("multihost")
@pytest.mark.parametrize(
    ("host", "phase"),
    [
        pytest.param(0, "save:start", marks=pytest.mark.long),
        pytest.param(0, "save:hash", marks=pytest.mark.long),
        pytest.param(0, "save:commit", marks=pytest.mark.long),
        (1, "save:record"),
    ],
)
def test_a_shared_disk_that_turns_read_only_is_told_on_all_hosts_and_the_next_save_works(
    disk: disks.Disk, host: int, phase: str
) -> None:
    ends = break_in_save(
        disk.path / "run",
        phase,
        host,
        lambda pid: disk.refuse_writes(),
        lambda pid: disk.allow_writes(),
    )
    for facts, seconds in ends:
        assert facts["kind"] == "PeerError" and set(facts["failures"]) <= {"0", "1"}, facts
        assert "failed in phase 'save:" in facts["text"], facts
        assert "Read-only file system" in facts["text"], facts
        assert "The file system is read-only:" in facts["text"], facts
        assert seconds < TOLD_SECONDS, facts
    assert ends[0][0]["text"] == ends[1][0]["text"]


@pytest.mark.multihost
@pytest.mark.xdist_group("multihost")
@pytest.mark.parametrize(
    ("host", "phase", "other"),
    [
        pytest.param(0, "save:positions", "save:prepare", marks=pytest.mark.long),
        pytest.param(0, "save:arrays", "save:arrays", marks=pytest.mark.long),
        pytest.param(0, "save:commit", "save:written", marks=pytest.mark.long),
        (1, "save:record", "save:written"),
    ],
)
def test_a_shared_disk_that_stalls_is_told_on_all_hosts_at_the_deadline_and_the_next_save_works(
    disk: disks.Disk, host: int, phase: str, other: str
) -> None:
    ends = break_in_save(
        disk.path / "run",
        phase,
        host,
        lambda pid: disk.stall(),
        lambda pid: disk.go_on(),
        other=other,
        seconds=STALL_SECONDS,
        within=STALL_SECONDS + MARGIN_SECONDS,
    )
    for facts, seconds in ends:
        assert facts["kind"] in ("PeerError", "PeerLostError", "StorageError"), facts
        assert "deadline" in facts["text"] or "waited" in facts["text"], facts
        assert seconds < STALL_SECONDS + MARGIN_SECONDS, (seconds, facts)
