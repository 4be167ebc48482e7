"""Arrays that devices of several hosts hold alike: each host reads a part, and the devices tell
each other the rest.

A storage then gives each byte once, however many hosts there are. Only for `NamedSharding`, which
says along which axes of the mesh an array is the same.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

__all__ = ["Part", "gather", "parted"]

_LEAST_BYTES = 1 << 20  # a collective has its price
_BATCH_BYTES = 256 << 20
_BATCH_ARRAYS = 64
_SMALLER = re.compile("u?int[24]|float[46]_.*")  # than a byte
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

ProcessOf = Callable[[Any], int]
Together = Callable[[], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Part:
    """What this host has read of an array.

    Attributes:
        make: returns the array, each device with its part.
        sharding: how it is to be placed.
        size: bytes of all of it.
    """

    make: Callable[[], jax.Array]
    sharding: jax.sharding.NamedSharding
    size: int

    @property
    def told(self) -> str:
        """How large it is and how it is placed, in words that are the same on every host."""
        return f"{self.size} {self.sharding} {_devices(self.sharding.mesh)}"


@functools.lru_cache(maxsize=16)
def _devices(mesh: Any) -> int:
    """Returns a number that says which devices a mesh has, and in which order."""
    return zlib.crc32(",".join(str(device.id) for device in mesh.devices.flat).encode())


def parted(
    sharding: Any,
    shape: Sequence[int],
    dtype: Any,
    process_of: ProcessOf = lambda device: int(device.process_index),
) -> jax.sharding.NamedSharding | None:
    """Returns how to place an array over the same devices so that hosts which would hold the same
    values hold parts of them; None where nothing is gained, or no part fits.

    It is the same on every host.
    """
    dtype = np.dtype(dtype)
    if not isinstance(sharding, jax.sharding.NamedSharding) or _SMALLER.fullmatch(dtype.name):
        return None
    mesh, spec = sharding.mesh, sharding.spec
    entries: list[tuple[str, ...]] = []
    for entry in (*spec, *[None] * (len(shape) - len(spec))):
        if not isinstance(entry, str | tuple | None):
            return None  # not said, or not all of it
        entries.append((entry,) if isinstance(entry, str) else tuple(entry or ()))
    splits = [math.prod(mesh.shape[axis] for axis in entry) for entry in entries]
    held = dtype.itemsize * math.prod(shape) // math.prod(splits)
    if not isinstance(mesh, jax.sharding.Mesh) or held < _LEAST_BYTES:
        return None
    if sharding.memory_kind not in (None, mesh.devices.flat[0].default_memory().kind):
        return None  # collectives are of the devices' own memory
    processes = np.vectorize(process_of, otypes=[int])(mesh.devices)
    if set(processes.flat) != {process_of(device) for device in jax.devices()}:
        return None  # a host without a device of it could not take part
    used = {axis for entry in entries for axis in entry}
    alike = [
        axis
        for number, axis in enumerate(mesh.axis_names)
        if axis not in used and (processes != processes.take([0], axis=number)).any()
    ]
    before = [tuple(entry) for entry in entries]
    for axis in sorted(alike, key=lambda axis: -mesh.shape[axis]):
        # Along the first dimension that divides: there a part is a piece of a file.
        for dimension, size in enumerate(shape):
            if size % (splits[dimension] * mesh.shape[axis]) == 0:
                entries[dimension] += (axis,)
                splits[dimension] *= mesh.shape[axis]
                break
    if entries == before:
        return None
    return jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec(*entries), memory_kind=sharding.memory_kind
    )


def _as_they_are(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return arrays


@functools.partial(jax.jit, static_argnums=1)
def _seen_as(array: jax.Array, dtype: Any) -> jax.Array:
    return jax.lax.bitcast_convert_type(array, dtype)


def gather(parts: Sequence[Part], together: Together) -> list[jax.Array]:
    """Returns the arrays, each placed as it is to be. Collective: every host with the same ones, in
    the same order.

    Args:
        together: what each computation of all hosts is made within. It is entered when nothing is
            left that this host could fail in alone, and waits until that is so on all, or raises. A
            computation that one host does not begin would be paired, on the others, with whatever
            that one computes next.

    Beside them, the devices hold the parts of a batch (256 MiB, or one array) at the same time, and
    one array of it twice.
    """
    found: list[jax.Array] = []
    for batch in _batches(parts):
        made = [part.make() for part in batch]
        dtypes = [array.dtype for array in made]
        # As whole numbers: some platforms have no collectives of bfloat16, and go through float32,
        # which changes the bits of a NaN. Not in one computation, or the compiler undoes it.
        for number, dtype in enumerate(dtypes):
            if jax.numpy.issubdtype(dtype, jax.numpy.floating):
                made[number] = _seen_as(made[number], _BITS[dtype.itemsize])
        place = jax.jit(_as_they_are, out_shardings=tuple(part.sharding for part in batch))
        compiled = place.lower(*made).compile()
        jax.block_until_ready(made)
        with together():
            placed = list(compiled(*made))
            jax.block_until_ready(placed)
        for dtype in dtypes:
            array = placed.pop(0)
            if array.dtype != dtype:
                array = jax.block_until_ready(_seen_as(array, dtype))
            found.append(array)
        jax.block_until_ready(found)
        for array in made:
            array.delete()
    return found


def _of_one_order(mesh: Any, other: Any) -> bool:
    """Whether two meshes have the same devices in the same order: JAX computes with one."""
    return mesh is other or list(mesh.devices.flat) == list(other.devices.flat)


def _batches(parts: Sequence[Part]) -> list[list[Part]]:
    batches: list[list[Part]] = []
    size = 0
    mesh: Any = None
    for part in parts:
        fits = batches and size + part.size <= _BATCH_BYTES and len(batches[-1]) < _BATCH_ARRAYS
        if not fits or not _of_one_order(part.sharding.mesh, mesh):
            batches.append([])
            size, mesh = 0, part.sharding.mesh
        batches[-1].append(part)
        size += part.size
    return batches
