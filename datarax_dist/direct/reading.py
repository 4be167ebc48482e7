"""Reads chunks into the memory where they stay, each byte once, and verifies files meanwhile.

File by file, on a few threads. A file whose digest this host has to verify is read from its first
byte to its last, the others only where a chunk is wanted.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from datarax_dist import format as fmt
from datarax_dist.direct.layout import TAIL_BYTES, StoredArray, is_tail, slabs, threads
from datarax_dist.errors import StorageError, describe, is_passing, storage_hint

__all__ = ["Buffer", "Reading", "Region", "region"]

Region = tuple[tuple[int, int], ...]  # of an array: for each dimension, from and to

_PIECE_BYTES = 1 << 20  # read and then checked while the processor has it at hand
_ALIGNMENT = 64  # JAX on CPU takes memory as it is, if it begins at a multiple of this
_THREADS = 8


class Buffer:
    """Memory for a part of an array: for a shard, say."""

    def __init__(self, region: Region, dtype: np.dtype[Any]) -> None:
        self.region = region
        shape = tuple(end - begin for begin, end in region)
        size = math.prod(shape) * dtype.itemsize
        memory = np.empty(size + _ALIGNMENT, np.uint8)
        skipped = -memory.ctypes.data % _ALIGNMENT
        self.array = memory[skipped : skipped + size].view(dtype).reshape(shape)


@dataclass(frozen=True, slots=True)
class _Copy:
    """A part of a chunk, and where it goes."""

    buffer: Buffer
    into: tuple[slice, ...]
    part: tuple[slice, ...]


@dataclass(slots=True)
class _Chunk:
    """A chunk that is wanted.

    Attributes:
        inside: the memory that takes the whole of it, if there is such.
        copies: what else is taken of it.
    """

    array: StoredArray
    offset: int
    inside: np.ndarray[Any, Any] | None = None
    copies: list[_Copy] = field(default_factory=list)


class Reading:
    """Arrays to be read, and files to be verified.

    Args:
        open_file: opens a file of the database by its path; it follows no links.
        verified: the files whose digests must be those of their entries, by their paths.
    """

    def __init__(
        self, open_file: Callable[[str], int], verified: Mapping[str, fmt.FileEntry]
    ) -> None:
        self._open = open_file
        self._verified = verified
        self._wanted: dict[str, list[_Chunk]] = {path: [] for path in verified}
        self._inline: list[tuple[bytes, _Chunk]] = []
        self._stopped = threading.Event()

    def want(self, array: StoredArray, buffers: Sequence[Buffer]) -> None:
        """Has the buffers filled with their parts of an array."""
        grid = itertools.product(*map(range, array.grid))
        for at, stored in zip(grid, array.chunks, strict=True):
            place = [n * size for n, size in zip(at, array.chunk_shape, strict=True)]
            chunk = _Chunk(array, 0)
            for buffer in buffers:
                _add(chunk, place, buffer)
            if chunk.inside is None and not chunk.copies:
                continue
            if isinstance(stored, bytes):
                self._inline.append((stored, chunk))
            else:
                chunk.offset = stored.offset
                self._wanted.setdefault(stored.file, []).append(chunk)

    def run(self) -> dict[str, str]:
        """Reads everything, and returns what is wrong with which files.

        Raises:
            StorageError: a file cannot be read now.
        """
        wrong: dict[str, str] = {}
        for data, chunk in self._inline:
            if not _take(chunk, data):
                wrong[chunk.array.name] = "the checksum of a chunk is wrong"
        # The largest first: else the last one may be read while the other threads have nothing.
        files = sorted(self._wanted, key=self._size, reverse=True)
        count = min(_THREADS, threads(), len(files))
        if count <= 1:
            reasons = [self._read_file(path) for path in files]
        else:
            with ThreadPoolExecutor(count, "datarax_dist-read") as pool:
                futures = [pool.submit(self._read_file, path) for path in files]
                try:
                    while wait(futures, 1.0).not_done:  # in slices, so that Ctrl-C is answered
                        pass
                finally:
                    self._stopped.set()
            reasons = [future.result() for future in futures]
        return wrong | {path: why for path, why in zip(files, reasons, strict=True) if why}

    def _size(self, path: str) -> int:
        chunks = sum(chunk.array.chunk_bytes for chunk in self._wanted[path])
        return max(chunks, self._verified[path].size if path in self._verified else 0)

    def _read_file(self, path: str) -> str | None:
        """Returns what is wrong with a file."""
        try:
            descriptor = self._open(path)
            try:
                return self._read_open(path, descriptor)
            finally:
                os.close(descriptor)
        except (KeyError, FileNotFoundError):
            return "missing"
        except _ShortError:
            return "it is shorter than it was"
        except StorageError as error:
            if is_passing(error):
                raise
            return f"cannot be read: {error}"
        except OSError as error:
            told = f"Could not read {path}: {describe(error)}. {storage_hint(error.errno)}"
            raise StorageError(told, errno=error.errno) from error

    def _read_open(self, path: str, descriptor: int) -> str | None:
        entry = self._verified.get(path)
        if entry is not None and (size := os.fstat(descriptor).st_size) != entry.size:
            return f"{size} bytes instead of {entry.size}"
        digester = fmt.Digester(entry.digest) if entry is not None else None
        at = 0  # the digest is that of everything before
        for chunk in sorted(self._wanted[path], key=lambda chunk: chunk.offset):
            in_order = digester is not None and chunk.offset >= at
            if in_order:
                self._skim(descriptor, at, chunk.offset, digester)
            sums = digester if in_order else _Crc()
            end = self._read_values(descriptor, chunk, sums)
            tail = np.empty(TAIL_BYTES, np.uint8)
            self._fill(descriptor, tail, end, digester if in_order else None)
            if in_order:
                at = end + len(tail)
            crc = sums.value if isinstance(sums, _Crc) else None  # else the digest will tell
            if not is_tail(tail.tobytes(), chunk.array, crc):
                return "the checksum of a chunk is wrong"
        if entry is None or digester is None:
            return None
        self._skim(descriptor, at, entry.size, digester)
        return None if digester.text() == entry.digest else "its content has changed (checksum)"

    def _read_values(self, descriptor: int, chunk: _Chunk, sums: Any) -> int:
        """Reads the values of a chunk into the memory that takes the whole of it, or through a
        little memory into what takes parts. Returns where they end in the file.
        """
        at, shape = chunk.offset, chunk.array.chunk_shape
        whole = chunk.inside is not None
        for part in [()] if whole else slabs(shape, chunk.array.dtype.itemsize):
            values = chunk.inside
            if values is None:
                sizes = [place.stop - place.start for place in part]
                values = np.empty((*sizes, *shape[len(part) :]), chunk.array.dtype)
            memory = values.reshape(-1).view(np.uint8)
            self._fill(descriptor, memory, at, sums)
            at += len(memory)
            _spread(chunk, values, part)
        return at

    def _skim(self, descriptor: int, begin: int, end: int, sums: Any) -> None:
        """Reads what nobody wants, for its digest."""
        scratch = np.empty(min(_PIECE_BYTES, max(end - begin, 0)), np.uint8)
        while begin < end:
            piece = scratch[: end - begin]
            self._fill(descriptor, piece, begin, sums)
            begin += len(piece)

    def _fill(self, descriptor: int, memory: np.ndarray[Any, Any], offset: int, sums: Any) -> None:
        """Reads into memory. Raises `_ShortError` when there is not as much."""
        begin = 0
        while begin < len(memory):
            if self._stopped.is_set():
                raise StorageError("The reading was given up.", errno=None)
            piece = memory[begin : begin + _PIECE_BYTES]
            count = os.preadv(descriptor, [piece.data], offset + begin)
            if not count:
                raise _ShortError
            if sums is not None:
                sums.update(piece[:count])
            begin += count


class _ShortError(Exception):
    """A file ends before a chunk does."""


class _Crc:
    """The crc32c of a chunk, where no digest of the whole file is computed."""

    def __init__(self) -> None:
        self.value = 0

    def update(self, data: Any) -> None:
        self.value = fmt.crc32c(data, self.value)


def _add(chunk: _Chunk, place: Sequence[int], buffer: Buffer) -> None:
    """Notes what of a chunk at `place` a buffer takes."""
    into, part, full = [], [], True
    for begin, size, (low, high) in zip(place, chunk.array.chunk_shape, buffer.region, strict=True):
        start, stop = max(begin, low), min(begin + size, high)
        if start >= stop:
            return
        full = full and (start, stop) == (begin, begin + size)
        into.append(slice(start - low, stop - low))
        part.append(slice(start - begin, stop - begin))
    everything: tuple[Any, ...] = (..., *into)  # of one number, too, an array and not that
    view = buffer.array[everything]
    if full and chunk.inside is None and view.flags.c_contiguous:
        chunk.inside = view
    else:
        chunk.copies.append(_Copy(buffer, tuple(into), tuple(part)))


def _spread(chunk: _Chunk, values: np.ndarray[Any, Any], slab: Sequence[slice] = ()) -> None:
    """Copies values to where they are wanted.

    Args:
        values: of the whole chunk, or of a slab of it.
        slab: where they are in the chunk, as far as it is not whole dimensions.
    """
    values = values.reshape((*values.shape[: len(slab)], *chunk.array.chunk_shape[len(slab) :]))
    for copy in chunk.copies:
        into, part = list(copy.into), list(copy.part)
        for axis, place in enumerate(slab):
            low, high = max(place.start, part[axis].start), min(place.stop, part[axis].stop)
            moved = into[axis].start - part[axis].start
            into[axis] = slice(low + moved, max(low, high) + moved)
            part[axis] = slice(low - place.start, max(low, high) - place.start)
        copy.buffer.array[tuple(into)] = values[tuple(part)]


def _take(chunk: _Chunk, data: bytes) -> bool:
    """Takes a chunk that lies in the index; False when its checksum is wrong."""
    size = chunk.array.chunk_bytes
    if not is_tail(data[size:], chunk.array, fmt.crc32c(data[:size])):
        return False
    values = np.frombuffer(data[:size], chunk.array.dtype).reshape(chunk.array.chunk_shape)
    if chunk.inside is not None:
        chunk.inside[...] = values
    _spread(chunk, values)
    return True


def region(index: Sequence[slice], shape: Sequence[int]) -> Region:
    """Returns the region that JAX means by the slices of a shard."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
