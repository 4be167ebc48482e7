"""Arrays that several hosts hold alike: each host reads a part, and the devices pass it on."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
import targets
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from datarax_dist.arrays import engine, replicas
from datarax_dist.testing import FakeGCS, run_hosts

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


def test_arrays_of_other_devices_or_of_another_order_are_gathered_apart() -> None:
    """The meshes of two stages of a pipeline, say; JAX computes with one order of devices."""
    devices = np.array(jax.devices()[:4])
    meshes = [Mesh(devices[order], ("data",)) for order in ([0, 1], [2, 3], [3, 2], [3, 2])]
    wholes = [NamedSharding(mesh, PartitionSpec()) for mesh in meshes]
    values = [np.arange(8.0, dtype=np.float32) + number for number in range(4)]

    def part(value: Any, whole: NamedSharding) -> replicas.Part:
        split = NamedSharding(whole.mesh, PartitionSpec("data"))
        return replicas.Part(lambda: jax.device_put(value, split), whole, value.nbytes)

    parts = [part(value, whole) for value, whole in zip(values, wholes, strict=True)]
    assert replicas._batches(parts) == [parts[:1], parts[1:2], parts[2:]]
    found = replicas.gather(parts, contextlib.nullcontext)
    assert [array.sharding for array in found] == wholes
    for array, value in zip(found, values, strict=True):
        np.testing.assert_array_equal(array, value)


def test_64_bits_stay_on_the_threads_that_read_and_gather() -> None:
    """Where the caller's thread alone has them."""
    value = np.arange(4.0)
    whole = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec())
    with jax.enable_x64(True):
        part = replicas.Part(lambda: jax.device_put(value, whole), whole, value.nbytes)
        loaded = engine.Loaded({}, {("a",): part})
        read = engine._in_time(lambda: jax.device_put(value, whole), 10.0, "Reading")
    thread = threading.Thread(target=loaded.gather, args=(contextlib.nullcontext,))
    thread.start()
    thread.join()
    assert loaded.values["a",].dtype == read.dtype == np.float64
    np.testing.assert_array_equal(np.asarray(loaded.values["a",]), value)


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
