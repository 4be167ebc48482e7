"""Writes chunks into files of one OCDBT database, with an index, and digests of all that it writes.

The files are written on a few threads, each of them once: what is written is at that moment in the
processor's caches, where its checksums cost the least, and is synced while others are written.
Copies are made of a few MiB at a time.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from datarax_dist import format as fmt
from datarax_dist.direct.layout import TAIL_BYTES, make_tail, slabs, threads, value_key
from datarax_dist.ocdbt import MOST_INLINE_BYTES, Extent, make_index, new_file

__all__ = ["Writing"]

_FILE_BYTES = 128 << 20  # several are written, and read, at the same time
_PIECE_BYTES = 1 << 20
_BEGIN_BYTES = 8 << 20  # whenever so much was written, the disk is told to begin with it
_SMALL_BYTES = 1 << 18  # smaller chunks are put together before they are written
_THREADS = 8


@dataclass(frozen=True, slots=True)
class _Chunk:
    key: str
    values: np.ndarray[Any, Any]

    def pieces(self) -> Iterator[np.ndarray[Any, Any]]:
        """Yields its bytes: as they are in memory, or copied a little at a time where they do not
        lie there as they are stored.
        """
        values = self.values
        if values.flags.c_contiguous:
            yield values.reshape(-1).view(np.uint8)
            return
        for slab in slabs(values.shape, values.itemsize):
            yield np.ascontiguousarray(values[slab]).reshape(-1).view(np.uint8)


class Writing:
    """A database that is written once.

    Args:
        directory: where; it must be there, and empty.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._values: dict[str, bytes | Extent] = {}
        self._files: dict[str, list[_Chunk]] = {}
        self._at = _FILE_BYTES  # in the file that is filled now
        self._stopped = threading.Event()

    def add(self, key: str, value: bytes) -> None:
        """Adds a small value."""
        self._values[key] = value

    def add_chunks(
        self, name: str, chunks: Iterable[tuple[Sequence[int], np.ndarray[Any, Any]]]
    ) -> None:
        """Adds chunks of an array, each with its place in the grid of chunks."""
        for at, values in chunks:
            key = value_key(name, "c", *map(str, at))
            length = values.nbytes + TAIL_BYTES
            if length <= MOST_INLINE_BYTES:
                self._values[key] = _with_tail(values)
                continue
            if self._at and self._at + length > _FILE_BYTES:
                self._file, self._at = new_file(), 0
                self._files[self._file] = []
            self._files[self._file].append(_Chunk(key, values))
            self._values[key] = Extent(self._file, self._at, length)
            self._at += length

    def run(self) -> dict[str, tuple[int, str]]:
        """Writes everything, and returns size and digest of each file. All are synced; the names in
        their directories are not.

        Raises:
            OSError: something could not be written.
        """
        os.makedirs(f"{self._directory}/d", exist_ok=True)
        index = new_file()
        node, manifest = make_index(self._values, index)
        small = {index: node, "manifest.ocdbt": manifest}
        most = min(_THREADS, threads() + 1)  # one may wait for the disk
        with ThreadPoolExecutor(most, "datarax_dist-write") as pool:
            futures = {
                **{
                    file: pool.submit(self._write, file, chunks)
                    for file, chunks in self._files.items()
                },
                **{
                    file: pool.submit(self._write_small, file, data) for file, data in small.items()
                },
            }
            try:
                ended, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
            finally:
                self._stopped.set()
        for future in ended:
            future.result()  # what was stopped for it has no error of its own
        return {file: future.result() for file, future in futures.items()}

    def _write_small(self, file: str, data: bytes) -> tuple[int, str]:
        with self._create(file) as output:
            output.add(data)
        return output.size, output.digester.text()

    def _write(self, file: str, chunks: Sequence[_Chunk]) -> tuple[int, str]:
        with self._create(file) as output:
            for chunk in chunks:
                if self._stopped.is_set():
                    raise InterruptedError(f"{file}: the writing was given up")
                size = chunk.values.nbytes
                if size < _SMALL_BYTES:
                    output.add(_with_tail(chunk.values))
                else:
                    output.add(make_tail(size, output.write(chunk.pieces())))
        return output.size, output.digester.text()

    def _create(self, file: str) -> _Output:
        return _Output(os.path.join(self._directory, file))


def _begin_to_sync(descriptor: int, offset: int, count: int) -> None:
    """Has a part of a file go to the disk now, and waits for nothing. It makes nothing durable:
    that is the fsync at the end of the file, which has less to wait for then.
    """
    if _sync_file_range is not None:
        _sync_file_range(descriptor, offset, count, _WRITE)


def _find_sync_file_range() -> Any:
    """Linux has this call, Python does not; elsewhere there is none."""
    found = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if found is not None:
        found.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return found


_WRITE = 2  # SYNC_FILE_RANGE_WRITE
_sync_file_range = _find_sync_file_range()


def _with_tail(values: np.ndarray[Any, Any]) -> bytes:
    data = values.tobytes()
    return data + make_tail(len(data), fmt.crc32c(data))


class _Output:
    """A file that is written from its beginning to its end, then synced."""

    def __init__(self, path: str) -> None:
        self.size = self._begun = 0
        self.digester = fmt.Digester()
        self._small = bytearray()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def add(self, data: bytes) -> None:
        """Takes a little; it is written with what comes next."""
        self._small += data
        if len(self._small) >= _PIECE_BYTES:
            self._flush()

    def write(self, pieces: Iterable[np.ndarray[Any, Any]]) -> int:
        """Writes bytes that follow each other, as they are, and returns their crc32c."""
        self._flush()
        part = self.digester.part()
        copy = np.empty(_PIECE_BYTES, np.uint8)
        for memory in pieces:
            for begin in range(0, len(memory), _PIECE_BYTES):
                # On a CPU an array may share its memory with one of numpy that its owner changes
                # meanwhile: what is digested must be what is written.
                piece = copy[: min(_PIECE_BYTES, len(memory) - begin)]
                np.copyto(piece, memory[begin : begin + len(piece)])
                part.update(piece)
                self._put(piece)
        return self.digester.join(part)

    def _flush(self) -> None:
        if self._small:
            data, self._small = np.frombuffer(self._small, np.uint8), bytearray()
            self.digester.update(data)
            self._put(data)

    def _put(self, piece: np.ndarray[Any, Any]) -> None:
        written = 0
        while written < len(piece):
            written += os.write(self._descriptor, piece[written:].data)
        self.size += len(piece)
        if self.size - self._begun >= _BEGIN_BYTES:
            _begin_to_sync(self._descriptor, self._begun, self.size - self._begun)
            self._begun = self.size
