"""Arrays that several hosts hold alike: each host reads a part, and the devices pass it on."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
import targets
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from datarax_dist import config
from datarax_dist.arrays import engine, replicas
from datarax_dist.beacons import Silence
from datarax_dist.boards import LocalBoard
from datarax_dist.errors import CheckpointError, InvalidArgumentError, PeerError, PeerLostError
from datarax_dist.gathers import GATHER, Gathering, raise_if_stuck
from datarax_dist.hosts import HostGroup, Operation
from datarax_dist.restore import Restorer
from datarax_dist.telemetry import Phases
from datarax_dist.testing import FakeGCS, SimulatedHosts, run_hosts
from datarax_dist.testing.simulated import MemoryStore

FLOAT = "float32"


def of_two_hosts(device: Any) -> int:
    return int(device.id) // 2


def spec_of(
    axes: tuple[Any, ...],
    shape: tuple[int, ...],
    process_of: Any = of_two_hosts,
    dtype: str = FLOAT,
) -> PartitionSpec | None:
    """Returns how an array of a mesh of two hosts, with two devices each, is read."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    found = replicas.parted(sharding, shape, dtype, process_of)
    assert found is None or found.mesh == mesh
    return None if found is None else found.spec


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        ((), (1024, 512), ("data", None)),
        ((None, "model"), (1024, 512), ("data", "model")),
        (("model",), (1024, 512), (("model", "data"), None)),
        ((), (1025, 512), (None, "data")),
        ((), (4, 3, 1 << 18), ("data", None, None)),
    ],
)
def test_hosts_that_hold_the_same_read_parts(axes: Any, shape: Any, expected: Any) -> None:
    assert spec_of(axes, shape) == PartitionSpec(*expected)


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        (("data",), (1024, 512)),  # each host has its own part
        ((("data", "model"),), (1024, 512)),
        ((), (1025, 1023)),  # nothing divides
        ((), (16, 16)),  # not worth a collective
        ((), ()),
        ((), (0, 1024)),
    ],
)
def test_what_is_not_the_same_or_does_not_divide_is_read_as_it_is(axes: Any, shape: Any) -> None:
    assert spec_of(axes, shape) is None


def test_devices_of_one_host_read_nothing_twice_anyway() -> None:
    assert spec_of((), (1024, 512), lambda device: 0) is None
    # Here "model" goes from host to host, and "data" stays on one.
    assert spec_of((), (1024, 512), lambda device: device.id % 2) == PartitionSpec("model", None)


def test_what_is_smaller_than_a_byte_is_read_as_it_is() -> None:
    for dtype in ("int4", "uint4", "int2", "float4_e2m1fn"):
        assert spec_of((), (4096, 1024), dtype=dtype) is None
    assert spec_of((), (4096, 1024), dtype="float8_e5m2") is not None


def test_other_kinds_of_shardings_are_left_alone() -> None:
    one = SingleDeviceSharding(jax.devices()[0])
    assert replicas.parted(one, (1024, 512), FLOAT, of_two_hosts) is None


def test_what_is_not_in_the_devices_own_memory_is_read_as_it_is() -> None:
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    for kind, is_parted in (("device", True), ("pinned_host", False), ("unpinned_host", False)):
        sharding = NamedSharding(mesh, PartitionSpec(), memory_kind=kind)
        part = replicas.parted(sharding, (1024, 512), FLOAT, of_two_hosts)
        assert (part is not None) == is_parted, kind


def test_what_hosts_are_to_gather_is_the_same_only_with_the_same_devices_in_the_same_order() -> (
    None
):
    def told(devices: Any, *axes: Any, size: int = 8) -> str:
        mesh = Mesh(np.array(devices), ("data",))
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        part = replicas.Part(lambda: jax.device_put(0.0), sharding, size)
        return engine.Loaded({}, {("a",): part}).told

    devices = jax.devices()[:4]
    assert told(devices) == told(list(devices))
    others = [told(devices[::-1]), told(devices[:2]), told(devices, "data"), told(devices, size=4)]
    assert len({told(devices), *others}) == 5


def test_a_mesh_that_leaves_a_host_out_is_left_alone() -> None:
    mesh = Mesh(np.array(jax.devices()[:3]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec())
    three = lambda device: min(int(device.id), 2)
    assert replicas.parted(sharding, (3, 1 << 20), FLOAT, three) is not None
    assert replicas.parted(sharding, (3, 1 << 20), FLOAT, lambda device: int(device.id)) is None


def test_parts_are_gathered_in_batches_that_keep_their_order() -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    whole = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("data"))
    values = [np.arange(8.0, dtype=np.float32) + number for number in range(150)]
    sizes = [100 << 20 if number % 7 == 0 else 32 for number in range(150)]
    parts = [
        replicas.Part(lambda value=value: jax.device_put(value, split), whole, size)
        for value, size in zip(values, sizes, strict=True)
    ]
    batches = replicas._batches(parts)
    assert [part for batch in batches for part in batch] == parts
    assert max(len(batch) for batch in batches) <= 64
    assert all(
        len(batch) == 1 or sum(part.size for part in batch) <= 256 << 20 for batch in batches
    )
    begun: list[int] = []

    @contextlib.contextmanager
    def together() -> Iterator[None]:
        begun.append(len(begun))
        yield

    found = replicas.gather(parts, together)
    assert len(begun) == len(batches)
    assert all(array.sharding == whole for array in found)
    for array, value in zip(found, values, strict=True):
        np.testing.assert_array_equal(array, value)


def test_64_bits_stay_on_the_threads_that_read_and_gather() -> None:
    """Where the caller's thread alone has them."""
    value = np.arange(4.0)
    whole = SingleDeviceSharding(jax.devices()[0])
    with jax.enable_x64(True):
        part = replicas.Part(lambda: jax.device_put(value, whole), whole, value.nbytes)
        loaded = engine.Loaded({}, {("a",): part})
        read = engine._in_time(lambda: jax.device_put(value, whole), 10.0, "Reading")
    thread = threading.Thread(target=loaded.gather, args=(contextlib.nullcontext,))
    thread.start()
    thread.join()
    assert loaded.values["a",].dtype == read.dtype == np.float64
    np.testing.assert_array_equal(np.asarray(loaded.values["a",]), value)


# What the restore protocol makes of it


def restore(
    store: Any, group: HostGroup, load: Any, silence_seconds: float = 10.0, seconds: float = 10.0
) -> Any:
    options = config.Options(
        exchange_timeout_seconds=10,
        restore_timeout_seconds=seconds,
        peer_silence_seconds=silence_seconds,
    )
    found = Restorer(store, group, options).restore(None, load, Phases("restore", group.index))
    return found and found[0]


@pytest.fixture
def saved() -> tuple[MemoryStore, SimulatedHosts]:
    from test_protocol import save

    store = MemoryStore()
    SimulatedHosts(3).run(lambda group: save(store, group, 1))
    return store, SimulatedHosts(3)


def test_all_gather_at_the_same_time_after_all_have_loaded_and_before_any_applies(
    saved: Any,
) -> None:
    store, hosts = saved
    told: list[str] = []
    met = threading.Barrier(3)  # as a collective: nobody leaves before all are in it

    def on(group: HostGroup) -> Any:
        def load(candidate: Any, loading: Any) -> Any:
            def gather(together: Any) -> None:
                with together():
                    met.wait(10)
                told.append("gathered")

            loading.gather_later("parts of a", gather)
            told.append("loaded")
            return lambda: told.append("applied")

        return restore(store, group, load)

    assert hosts.run(on) == [None] * 3
    assert told == ["loaded"] * 3 + ["gathered"] * 3 + ["applied"] * 3


@pytest.mark.parametrize("victim", [0, 2])
def test_hosts_that_would_gather_different_things_are_told_so_before(
    saved: Any, victim: int
) -> None:
    store, hosts = saved
    done: list[str] = []

    def on(group: HostGroup) -> Any:
        def load(candidate: Any, loading: Any) -> Any:
            if group.index != victim:
                loading.gather_later("parts of a", lambda together: done.append("gathered"))
            return lambda: done.append("applied")

        return restore(store, group, load)

    results = hosts.run(on)
    assert [type(result) for result in results] == [InvalidArgumentError] * 3
    assert all("single_replica_restore" in str(result) for result in results)
    assert done == []


@pytest.mark.parametrize("victim", [0, 2])
def test_a_gather_that_fails_on_one_host_and_never_ends_on_the_others_is_an_error_on_all(
    saved: Any, victim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, hosts = saved
    monkeypatch.setattr("datarax_dist.gathers._BEACONS_SECONDS", 0.0)
    monkeypatch.setattr("datarax_dist.gathers._left", [])
    applied: list[int] = []
    over = threading.Event()

    def on(group: HostGroup) -> Any:
        def load(candidate: Any, loading: Any) -> Any:
            def gather(together: Any) -> None:
                with together():
                    if group.index == victim:
                        raise ValueError("no memory on the device")
                    over.wait(20)

            loading.gather_later("parts of a", gather)
            return lambda: applied.append(group.index)

        return restore(store, group, load, silence_seconds=0.1)

    uncaught: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", uncaught.append)
    results = hosts.run(on)
    assert all("Start this job again" in str(result.__notes__) for result in results)
    with pytest.raises(CheckpointError, match="Start this job again"):
        raise_if_stuck()
    over.set()
    for thread in threading.enumerate():
        if thread.name == "datarax_dist-gather":
            thread.join(10)
    assert uncaught == [], "who comes too late is no error any more"
    assert [type(result) for result in results] == [PeerError] * 3
    assert all(
        f"host {victim} failed in phase 'gather'" in str(result)
        and "no memory on the device" in str(result)
        for result in results
    )
    assert applied == []


@pytest.mark.parametrize("victim", [0, 2])
def test_a_host_that_fails_before_all_are_ready_keeps_the_others_from_beginning(
    saved: Any, victim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they began could not be ended, and would be paired with whatever comes next."""
    store, hosts = saved
    monkeypatch.setattr("datarax_dist.gathers._left", [])
    begun: list[tuple[int, int]] = []
    over: list[int] = []

    def on(group: HostGroup) -> Any:
        def load(candidate: Any, loading: Any) -> Any:
            def gather(together: Any) -> None:
                try:
                    for batch in range(3):
                        if (group.index, batch) == (victim, 1):
                            raise MemoryError
                        with together():
                            begun.append((batch, group.index))
                finally:
                    over.append(group.index)

            loading.gather_later("parts of a", gather)
            return lambda: None

        with pytest.raises(PeerError, match=f"host {victim} failed in phase 'gather'") as raised:
            restore(store, group, load)
        assert not hasattr(raised.value, "__notes__")
        return restore(store, group, lambda candidate, loading: lambda: "whole")

    assert hosts.run(on) == ["whole"] * 3
    for thread in threading.enumerate():
        if thread.name == "datarax_dist-gather":
            thread.join(5)  # a second; their deadline is 10
    raise_if_stuck()
    assert sorted(begun) == [(0, 0), (0, 1), (0, 2)]
    assert sorted(over) == [0, 1, 2]


@pytest.mark.parametrize("how", ["deadline", "interrupt"])
@pytest.mark.parametrize("late", [(0,), (2,), (0, 1, 2)])
def test_who_is_late_for_a_computation_of_a_restore_that_has_failed_begins_none(
    saved: Any, late: tuple[int, ...], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do the others, which have waited for it; and later calls are as if nothing was."""
    result = Operation.result

    def interrupted(operation: Operation, phase: str, *arguments: Any, **more: Any) -> Any:
        if phase == GATHER and operation._group.index == 1:
            raise KeyboardInterrupt
        return result(operation, phase, *arguments, **more)

    if how == "interrupt":
        monkeypatch.setattr(Operation, "result", interrupted)
    store, hosts = saved
    monkeypatch.setattr("datarax_dist.gathers._left", [])
    monkeypatch.setattr("datarax_dist.hosts._GRACE_SECONDS", 0.0)
    begun: list[int] = []
    have_failed, may_come = threading.Barrier(3), threading.Event()

    def on(group: HostGroup) -> Any:
        def load(candidate: Any, loading: Any) -> Any:
            def gather(together: Any) -> None:
                assert group.index not in late or may_come.wait(20)
                with together():
                    begun.append(group.index)

            loading.gather_later("parts of a", gather)
            return lambda: None

        with pytest.raises((PeerError, KeyboardInterrupt)) as raised:
            restore(store, group, load, seconds=0.5 if how == "deadline" else 20)
        assert not hasattr(raised.value, "__notes__")
        have_failed.wait(20)
        group.begin("another call, which others have not made")
        have_failed.wait(20)
        may_come.set()
        for thread in threading.enumerate():
            if thread.name == "datarax_dist-gather":
                thread.join(20)
        raise_if_stuck()
        return "together"

    assert hosts.run(on) == ["together"] * 3
    assert begun == []


def test_a_computation_that_ends_a_little_later_is_not_told_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another host may have failed that ended it a little earlier."""
    monkeypatch.setattr("datarax_dist.gathers._left", [])
    begun, is_waited_for = threading.Event(), threading.Event()

    class Changed(threading.Condition):
        def wait_for(self, predicate: Any, timeout: float | None = None) -> Any:
            is_waited_for.set()
            return super().wait_for(predicate, timeout)

    def gather(together: Any) -> None:
        with together():
            begun.set()
            is_waited_for.wait(10)

    group = HostGroup(LocalBoard())
    with group.begin("restore").part(GATHER) as operation:
        gathering = Gathering(group, operation, time.monotonic() + 10, 10)
        gathering._changed = Changed()
        thread = threading.Thread(target=gathering.run, args=(gather,))
        thread.start()
        assert begun.wait(10)
        error = CheckpointError("another host has failed")
        gathering.give_up(error)
        assert not hasattr(error, "__notes__")
        thread.join(10)
    raise_if_stuck()


def test_a_host_that_has_gone_after_its_part_is_named_while_the_others_hang(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, hosts = saved
    monkeypatch.setattr("datarax_dist.gathers._left", [])
    over = threading.Event()
    board = hosts.groups[0]._board

    def silent() -> Any:
        has_passed = any(key.endswith("/gather/2") for key in board.read(""))
        return {2: Silence(11.0)} if has_passed else {}

    for group in hosts.groups:
        monkeypatch.setattr(group._board, "silent", silent)

    def on(group: HostGroup) -> Any:
        def load(candidate: Any, loading: Any) -> Any:
            def gather(together: Any) -> None:
                with together():
                    if group.index != 2:
                        over.wait(20)

            loading.gather_later("parts of a", gather)
            return lambda: None

        return restore(store, group, load)

    results = hosts.run(on)
    over.set()
    assert [type(result) for result in results] == [PeerLostError] * 3
    assert all("Host 2: no sign of life" in str(result) for result in results)
    assert all(result.missing == [2] for result in results)


# On real processes


def real(test: Any) -> Any:
    return pytest.mark.multihost(pytest.mark.xdist_group("multihost")(test))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("replicas") / "run")
    ended = run_hosts(
        targets.save_replicated, 2, devices_per_host=2, args=(root,), timeout_seconds=90
    )
    assert [host.error for host in ended] == [None] * 2
    return root


def restore_really(root: str, single: tuple[bool, bool], verify: str) -> list[Any]:
    ended = run_hosts(
        targets.restore_replicated,
        2,
        devices_per_host=2,
        args=(root, single, verify),
        timeout_seconds=90,
    )
    return [str(host.error) if host.error else host.value for host in ended]


@real
def test_each_host_reads_half_of_what_both_hold(root: str) -> None:
    sizes = {
        name: math.prod(shape) * np.dtype(dtype).itemsize
        for name, (dtype, shape, _) in targets._REPLICATED.items()
    }
    whole = {"odd", "small"}
    expected = sum(size if name in whole else size / 2 for name, size in sizes.items())
    everything = sum(size / 2 if name == "sharded" else size for name, size in sizes.items())
    small = 2 << 20  # structure, records, Python's own
    for size, wrong, phases in restore_really(root, (True, True), "sizes"):
        assert wrong == []
        assert "gather" in phases
        assert expected <= size <= expected + small, (size, expected)
    for size, wrong, phases in restore_really(root, (False, False), "sizes"):
        assert wrong == []
        assert "gather" not in phases
        assert everything <= size <= everything + small, (size, everything)


@real
def test_verified_in_full_it_is_the_same_values(root: str) -> None:
    for _, wrong, phases in restore_really(root, (True, True), "full"):
        assert wrong == []
        assert "gather" in phases


@real
def test_hosts_with_different_options_are_told_so(root: str) -> None:
    for error in restore_really(root, (True, False), "sizes"):
        assert "InvalidArgumentError" in error
        assert "single_replica_restore" in error


@real
def test_after_a_gather_that_failed_on_one_host_computations_are_right(root: str) -> None:
    for host in run_hosts(
        targets.failed_gather, 2, devices_per_host=2, args=(root,), timeout_seconds=90
    ):
        assert host.error is None, host.error
        told, wrong, sums = host.value
        assert "host 1 failed in phase 'gather'" in told
        assert "no memory on the device" in told
        assert wrong == []
        assert sums == [[0, 100], [1, 101], [2, 102]]


@real
def test_a_host_that_is_killed_meanwhile_is_named(root: str) -> None:
    first, second = run_hosts(
        targets.killed_in_a_gather, 2, devices_per_host=2, args=(root,), timeout_seconds=90
    )
    assert second.exit_code == -9
    assert first.error is None
    _, told, missing = first.value
    assert missing == [1]
    assert "no sign of life" in told


@real
def test_in_a_bucket_hosts_read_parts_too(gcs: FakeGCS, bucket: str) -> None:
    root = f"gs://{bucket}/runs/one"
    ended = run_hosts(
        targets.save_replicated, 2, devices_per_host=2, args=(root,), timeout_seconds=90
    )
    assert [host.error for host in ended] == [None] * 2
    for _, wrong, phases in restore_really(root, (True, True), "full"):
        assert wrong == []
        assert "gather" in phases
