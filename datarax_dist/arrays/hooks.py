"""What stands in for functions of Orbax, in the directories that we save to and nowhere else.

Orbax plans what it writes, on threads of its own, and calls these then: arrays get a crc32c in each
chunk, writers wait until our `save()` has returned, and what can be written to files straight away
is (`direct`). The version of Orbax is pinned; tests/test_plain_orbax.py and tests/test_direct.py
watch these spots.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint._src.metadata import sharding as sharding_metadata
from orbax.checkpoint._src.multihost import multihost
from orbax.checkpoint._src.serialization import jax_array_handlers, tensorstore_utils
from orbax.checkpoint._src.serialization import types as serialization_types

from datarax_dist import direct
from datarax_dist.errors import StorageError

__all__ = ["Gate", "Written", "gates", "give_up"]

# Orbax has no public option for the codecs of its zarr3 arrays. In the directories of this dict,
# and nowhere else, the inner codecs get a crc32c, which stock Orbax reads and checks. It goes by
# directory, because Orbax builds its specs whenever its own threads come to it.
# tests/test_plain_orbax.py watches this spot.
gates: dict[str, Gate] = {}

_given_up: collections.deque[str] = collections.deque()  # directories
_MOST_GIVEN_UP = 64  # their writers have come to the gate long before there are so many others
_ENDED = "The save has ended before its arrays were written."


class Written:
    """What this host has written of an array.

    Attributes:
        name: as Orbax has it.
        size: in bytes, uncompressed.
    """

    __slots__ = ("_slices", "name", "size")

    def __init__(self, name: str, slices: Any) -> None:
        self.name = name
        self._slices = slices
        itemsize: int = np.dtype(slices.dtype).itemsize
        self.size = math.prod(slices.local_shape) * itemsize * len(slices.replica_slices)

    def values(self) -> np.ndarray[Any, Any]:
        """Returns a part of it."""
        found: np.ndarray[Any, Any] = self._slices.replica_slices[0].data()
        return found


class Gate:
    """Orbax's writing threads wait here until our `save()` has returned: they would take turns with
    the caller's thread in the interpreter, and so double the time that it blocks
    (benchmarks/blocking.py). In a bucket they wait for the claim, too.
    """

    def __init__(
        self,
        seconds: float,
        *,
        direct: bool = False,
        compressed: Sequence[str] | None = (),
        learn: Callable[[Sequence[Written], float], None] | None = None,
    ) -> None:
        """Args:
        direct: whether arrays may be written without TensorStore.
        compressed: names of arrays that are; None means all.
        learn: is told of the arrays that were written, and the seconds that it took.
        """
        self._seconds = seconds
        self._opened = threading.Event()
        self._compressed = None if compressed is None else frozenset(compressed)
        self.direct = direct
        self.learn = learn
        self.digests: dict[str, tuple[int, str]] = {}  # of what was, by its path below the item
        self._cancelled = ""

    def compresses(self, name: str) -> bool:
        return self._compressed is None or name in self._compressed

    def open(self) -> None:
        self._opened.set()

    def cancel(self, why: str = _ENDED) -> bool:
        """Has nothing written any more; returns whether it was closed still."""
        if self._opened.is_set():
            return False
        self._cancelled = why
        self._opened.set()
        return True

    def pass_through(self) -> None:
        if not self._opened.wait(self._seconds) or self._cancelled:
            raise StorageError(self._cancelled or _ENDED, errno=None)


def give_up(directory: str, gate: Gate) -> None:
    """Has nothing written any more of a save that could not begin. Its gate stays for a while:
    which of Orbax's threads have yet to come there is not known, as Orbax did not return.
    """
    gate.cancel()
    gate.learn = None  # it keeps more than itself
    _given_up.append(directory)
    if len(_given_up) > _MOST_GIVEN_UP:
        gates.pop(_given_up.popleft(), None)


class _Expected(logging.Filter):
    """Keeps Orbax from warning of each save in a bucket, where it updates a file of its own that is
    not there yet: `_InPlace.create` saves the request. And from three tracebacks of an error that
    is a gate's, where a save has ended for another one, which the save tells.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and _ENDED in str(record.exc_info[1]):
            return False
        if not str(record.msg).startswith("Metadata file does not exist") or not record.args:
            return True
        return os.path.dirname(record.getMessage().partition(": ")[2]) not in gates


logging.getLogger("absl").addFilter(_Expected())


class _WriteSpec(tensorstore_utils.ArrayWriteSpec):
    def __init__(self, directory: str, relative_array_filename: str, **options: Any) -> None:
        gate = gates.get(directory)
        if gate is not None:
            options["use_compression"] = gate.compresses(relative_array_filename)
        super().__init__(directory, relative_array_filename, **options)
        if gate is not None:
            spec = self._json_spec
            [sharding] = spec.get("base", spec)["metadata"]["codecs"]
            sharding["configuration"]["codecs"].append({"name": "crc32c"})


_await_path_creation = serialization_types.ParamInfo.await_path_creation


async def _await_gate(info: serialization_types.ParamInfo) -> None:
    """Each of Orbax's writers (arrays, strings, shardings) asks here whether its directory is there
    already.
    """
    await _await_path_creation(info)
    if (gate := gates.get(str(info.parent_dir))) is not None:
        gate.pass_through()


_serialize_by_orbax = jax_array_handlers._async_serialize_replica_slices
_shardings_by_orbax = jax_array_handlers._async_serialize_shardings


async def _serialize(
    values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any], **options: Any
) -> Sequence[Any]:
    """What Orbax calls to write this host's parts of `jax.Array`s that are in memory: writes them
    straight into files, where that can be.

    Args:
        values: Orbax's `ReplicaSlices` of each array.
        infos, args: Orbax's `ParamInfo` and `SaveArgs`.
        options: see Orbax's own.
    """
    gate = gates.get(str(infos[0].parent_dir))
    if gate is None:
        return await _serialize_by_orbax(values, infos, args, **options)
    await infos[0].await_path_creation()  # and the gate
    begin = time.monotonic()
    if gate.direct:
        told = await _serialize_direct(gate, values, infos, args, **options)
    else:
        told = await _serialize_by_orbax(values, infos, args, **options)
    if gate.learn is not None:
        seconds = time.monotonic() - begin
        found = [
            Written(info.name, value)
            for value, info in zip(values, infos, strict=True)
            if value.is_on_host and value.replica_slices
        ]
        await asyncio.to_thread(gate.learn, found, seconds)
    return told


async def _serialize_direct(
    gate: Gate, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any], **options: Any
) -> Sequence[Any]:
    directory = f"ocdbt.process_{jax.process_index()}_direct"
    writing = direct.Writing(os.path.join(str(infos[0].parent_dir), directory))
    written: dict[int, Any] = {}
    for number, (value, info, arg) in enumerate(zip(values, infos, args, strict=True)):
        dtype = np.dtype(value.dtype)
        described = direct.describe_array(
            tuple(value.global_shape), dtype, tuple(value.local_shape)
        )
        if described is None or not value.is_on_host or not _is_plain(arg, dtype):
            continue
        if gate.compresses(info.name):
            continue
        if options["primary_host"] in (None, jax.process_index()):
            writing.add(direct.value_key(info.name, "zarr.json"), described)
        writing.add_chunks(
            info.name,
            [(_place(part.index, value), part.data()) for part in value.replica_slices],
        )
        written[number] = tensorstore_utils.ArrayMetadata(
            param_name=info.name,
            shape=value.global_shape,
            dtype=dtype,
            write_shape=value.local_shape,
            chunk_shape=value.local_shape,
            use_ocdbt=True,
            use_zarr3=True,
            ext_metadata=options["ext_metadata"].get(info.name),
        )
    rest = [number for number in range(len(values)) if number not in written]
    if written:
        found = await asyncio.to_thread(writing.run)
        gate.digests |= {f"{directory}/{file}": digest for file, digest in found.items()}
    if rest:
        chosen = [[row[number] for number in rest] for row in (values, infos, args)]
        told = await _serialize_by_orbax(*chosen, **options | {"array_metadata_store": None})
        written |= dict(zip(rest, told, strict=True))
    metadata = [written[number] for number in range(len(values))]
    if (store := options["array_metadata_store"]) is not None:
        await store.write(
            checkpoint_dir=infos[0].parent_dir,
            array_metadatas=metadata,
            process_index=jax.process_index(),
        )
    return metadata


async def _serialize_shardings(
    shardings: Sequence[Any], infos: Sequence[Any], *, primary_host: int | None
) -> None:
    """What Orbax calls to note how arrays were sharded: the same file, at once rather than through
    a TensorStore for each array.
    """
    gate = gates.get(str(infos[0].parent_dir)) if infos else None
    if gate is None or not gate.direct:
        return await _shardings_by_orbax(shardings, infos, primary_host=primary_host)
    await infos[0].await_path_creation()
    if not multihost.is_primary_host(primary_host):
        return None
    noted: dict[Any, str | None] = {}
    rows: dict[str, str] = {}
    for sharding, info in zip(shardings, infos, strict=True):
        if sharding is None:
            continue
        if sharding not in noted:
            described = sharding_metadata.from_jax_sharding(sharding)
            noted[sharding] = None if described is None else described.to_serialized_string()
        if (text := noted[sharding]) is not None:
            rows[base64.urlsafe_b64encode(info.name.encode()).decode()] = text
    path = os.path.join(str(infos[0].parent_dir), "_sharding")
    await asyncio.to_thread(Path(path).write_text, json.dumps(rows))
    return None


def _is_plain(arg: Any, dtype: np.dtype[Any]) -> bool:
    """Whether Orbax would store an array as it is, a chunk for each shard."""
    other_dtype = arg.dtype is not None and np.dtype(arg.dtype) != dtype
    return not other_dtype and arg.chunk_byte_size is None and not arg.shard_axes


def _place(index: Sequence[slice], value: Any) -> list[int]:
    """Where a part of an array is in the grid of its parts, which are all of one shape."""
    begins = [part.start or 0 for part in index]
    return [begin // size for begin, size in zip(begins, value.local_shape, strict=True)]


jax_array_handlers._async_serialize_replica_slices = _serialize
jax_array_handlers._async_serialize_shardings = _serialize_shardings
tensorstore_utils.ArrayWriteSpec = _WriteSpec
serialization_types.ParamInfo.await_path_creation = _await_gate
