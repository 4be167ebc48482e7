"""How an array is stored without compression: zarr3, one chunk for each shard, its values as they
are in memory, and a tail with their crc32c. What is stored in any other way is left to Orbax.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from datarax_dist import format as fmt
from datarax_dist.ocdbt import Extent

__all__ = [
    "TAIL_BYTES",
    "StoredArray",
    "describe_array",
    "describe_stored",
    "find_description",
    "is_tail",
    "make_tail",
    "parse_array",
    "slabs",
    "threads",
    "value_key",
]

_SLAB_BYTES = 4 << 20
_CACHED = 4096  # many arrays of a model are of one shape
_CHECKSUM = struct.Struct("<I")
_SHARD_INDEX = struct.Struct("<QQ")  # offset and length of the only inner chunk
TAIL_BYTES = 4 + _SHARD_INDEX.size + 4
_DTYPES = {
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
}
_IS_STORED_AS_IN_MEMORY = sys.byteorder == "little"
_BYTES: Mapping[str, Any] = {"name": "bytes"}
_LITTLE_ENDIAN: Mapping[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC: Mapping[str, Any] = {"name": "crc32c"}
_COMPRESSIONS: Sequence[Sequence[str]] = ([], ["zstd"], ["gzip"])  # they stop where a chunk ends


@dataclass(frozen=True, slots=True)
class StoredArray:
    """An array as it is stored, its chunks uncompressed.

    Attributes:
        chunks: where each one is, in the order of the grid, the last dimension the fastest.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_shape: tuple[int, ...]
    chunks: Sequence[bytes | Extent]

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(
            -(-size // chunk) for size, chunk in zip(self.shape, self.chunk_shape, strict=True)
        )


def value_key(name: str, *parts: str) -> str:
    """Returns what a value of an array is called in the database, as TensorStore does. A state that
    is one array has a leaf without a name, and a name may end with a slash.
    """
    if name in ("", "/"):
        return "/".join(parts)
    return name.removesuffix("/") + "/" + "/".join(parts)


def find_description(
    name: str, file: str, index: Mapping[str, bytes | Extent]
) -> tuple[str, bytes | Extent | None]:
    """Returns what the keys of an array begin with, and what its `zarr.json` (or so) is. The first
    versions wrote those of odd names with one slash more; Orbax cannot read these.
    """
    for begin in (value_key(name, ""), f"{name}/"):
        if (text := index.get(f"{begin}{file}")) is not None:
            return begin, text
    return value_key(name, ""), None


def parse_array(name: str, index: Mapping[str, bytes | Extent]) -> StoredArray | None:
    """Returns how an array is stored, or None when Orbax must read it.

    Args:
        name: as Orbax names it.
        index: of the database (`ocdbt.read_index`).
    """
    begin, text = find_description(name, "zarr.json", index)
    described = _parse_description(text) if isinstance(text, bytes) else None
    if described is None:
        return None
    shape, dtype, chunk = described
    grid = [-(-size // part) for size, part in zip(shape, chunk, strict=True)]
    if math.prod(grid) > len(index):
        return None  # chunks are missing
    places = itertools.product(*map(range, grid))
    keys = (begin + "/".join(["c", *map(str, at)]) for at in places)
    chunks = [index.get(key) for key in keys]
    array = StoredArray(name, shape, dtype, chunk, [c for c in chunks if c is not None])
    length = array.chunk_bytes + TAIL_BYTES
    if None in chunks or any(_length(c) != length for c in array.chunks):
        return None
    return array


_Description = tuple[tuple[int, ...], np.dtype[Any], tuple[int, ...]]
_Stored = tuple[tuple[int, ...], str, tuple[int, ...]]


@functools.lru_cache(_CACHED)
def _parse_description(text: bytes) -> _Description | None:
    """Returns shape, type and shape of the chunks from a `zarr.json`; None for any other way to
    store an array.
    """
    try:
        meta = json.loads(text)
        shape, kind = tuple(meta["shape"]), meta["data_type"]
        chunk = tuple(meta["chunk_grid"]["configuration"]["chunk_shape"])
        encoding, [sharding] = meta["chunk_key_encoding"], meta["codecs"]
        ours = kind in _DTYPES and sharding == _sharding(chunk, np.dtype(kind).itemsize)
        ours = ours and meta["chunk_grid"]["name"] == "regular" and encoding["name"] == "default"
        ours = ours and not encoding.get("configuration") and len(chunk) == len(shape)
        ours = ours and all(type(n) is int and n > 0 for n in (*shape, *chunk))
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return (shape, np.dtype(kind), chunk) if ours and _IS_STORED_AS_IN_MEMORY else None


def _sharding(chunk: Sequence[int], itemsize: int) -> dict[str, Any]:
    """The codec that `arrays` has Orbax write, with one inner chunk in each shard."""
    values = _LITTLE_ENDIAN if itemsize > 1 else _BYTES
    configuration = {
        "chunk_shape": [*chunk],
        "codecs": [values, _CRC],
        "index_codecs": [_LITTLE_ENDIAN, _CRC],
    }
    return {"name": "sharding_indexed", "configuration": configuration}


@functools.lru_cache(_CACHED)
def describe_stored(text: bytes, name: str) -> _Stored:
    """Returns shape, type and shape of the chunks of an array that TensorStore reads.

    Args:
        text: its `zarr.json`, or `.zarray` of zarr2.
        name: which of both.

    Raises:
        ValueError: neither Orbax nor we store arrays in this way.
    """
    try:
        meta = json.loads(text)
        shape = tuple(meta["shape"])
        if name == "zarr.json":
            kind, [*codecs] = meta["data_type"], meta["codecs"]
            chunk = tuple(meta["chunk_grid"]["configuration"]["chunk_shape"])
            inner = chunk
            known = meta["chunk_grid"]["name"] == "regular"
            if codecs[0]["name"] == "sharding_indexed":
                [configuration] = [codec["configuration"] for codec in codecs]
                inner, codecs = tuple(configuration["chunk_shape"]), configuration["codecs"]
                names = [codec["name"] for codec in configuration["index_codecs"]]
                known = known and names == ["bytes", "crc32c"]
            [first, *rest] = [codec["name"] for codec in codecs]
            rest = rest[:-1] if rest[-1:] == ["crc32c"] else rest
            known = known and first == "bytes" and rest in _COMPRESSIONS
        else:
            kind, chunk = np.dtype(meta["dtype"]).name, tuple(meta["chunks"])
            inner, compressor = chunk, meta["compressor"]
            known = not meta.get("filters")
            known = known and [c["id"] for c in [compressor] if c is not None] in _COMPRESSIONS
        known = known and len(inner) == len(chunk) == len(shape) and isinstance(kind, str)
        known = known and all(type(n) is int for n in (*shape, *chunk, *inner))
    except (AttributeError, LookupError, TypeError, ValueError, SyntaxError, RecursionError):
        known = False
    if not known:
        raise ValueError(f"{name} tells of a way to store arrays that is not known")
    if not all(0 < i <= c <= max(n, 1) for i, c, n in zip(inner, chunk, shape, strict=True)):
        raise ValueError(f"{name} has chunks of {list(chunk)}, which the array is too small for")
    return shape, kind, chunk


def _length(value: bytes | Extent) -> int:
    return len(value) if isinstance(value, bytes) else value.length


@functools.lru_cache(_CACHED)
def describe_array(
    shape: tuple[int, ...], dtype: np.dtype[Any], chunk_shape: tuple[int, ...]
) -> bytes | None:
    """Returns the `zarr.json` of an array, or None where Orbax must write it."""
    kind = str(dtype)
    if kind not in _DTYPES or not all(n > 0 for n in (*shape, *chunk_shape)):
        return None
    if not _IS_STORED_AS_IN_MEMORY:
        return None
    fill: Any = False if kind == "bool" else 0.0 if dtype.kind not in "iu" else 0
    return fmt.dumps(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [*shape],
            "data_type": kind,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [*chunk_shape]}},
            "chunk_key_encoding": {"name": "default"},
            "fill_value": [fill, fill] if dtype.kind == "c" else fill,
            "codecs": [_sharding(chunk_shape, dtype.itemsize)],
        }
    )


def make_tail(chunk_bytes: int, crc: int) -> bytes:
    """Returns what stands behind the values of a chunk: their crc32c, and the index of the shard
    with its own.
    """
    index = _SHARD_INDEX.pack(0, chunk_bytes + 4)
    return _CHECKSUM.pack(crc) + index + _CHECKSUM.pack(fmt.crc32c(index))


def is_tail(tail: bytes, array: StoredArray, crc: int | None) -> bool:
    """Whether a chunk ends as it must; whatever its crc32c is, where none was computed."""
    right = make_tail(array.chunk_bytes, crc or 0)
    return tail[4:] == right[4:] and (crc is None or tail[:4] == right[:4])


def threads() -> int:
    """Returns how many threads can compute here at the same time."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def slabs(shape: Sequence[int], itemsize: int) -> Iterator[tuple[slice, ...]]:
    """Yields the parts of an array that lie behind each other when it is stored, of a few MiB each:
    slices of its first dimensions; the others are whole.
    """
    size, axis = itemsize, len(shape)
    while axis and size * shape[axis - 1] <= _SLAB_BYTES:
        axis -= 1
        size *= shape[axis]
    if not axis:
        yield ()
        return
    count = max(1, _SLAB_BYTES // size)
    for at in itertools.product(*map(range, shape[: axis - 1])):
        first = tuple(slice(number, number + 1) for number in at)
        for begin in range(0, shape[axis - 1], count):
            yield (*first, slice(begin, min(begin + count, shape[axis - 1])))
