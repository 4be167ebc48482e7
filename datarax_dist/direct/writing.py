"""Writes chunks into files of one OCDBT database, with an index, and digests of all that it writes.

The files are written on a few threads, each of them once: what is written is at that moment in the
processor's caches, where its checksums cost the least, and is synced while others are written. No
copy is made of what is larger than a piece.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from datarax_dist import format as fmt
from datarax_dist.direct.layout import TAIL_BYTES, make_tail
from datarax_dist.ocdbt import MOST_INLINE_BYTES, Extent, make_index, new_file

__all__ = ["Writing"]

_FILE_BYTES = 128 << 20  # several are written, and read, at the same time
_PIECE_BYTES = 1 << 20
_SMALL_BYTES = 1 << 18  # smaller chunks are put together before they are written
_THREADS = 8


@dataclass(frozen=True, slots=True)
class _Chunk:
    key: str
    memory: np.ndarray[Any, Any]  # its bytes


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
            key = "/".join([f"{name}/c", *map(str, at)])
            memory = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
            length = len(memory) + TAIL_BYTES
            if length <= MOST_INLINE_BYTES:
                tail = make_tail(len(memory), fmt.crc32c(memory))
                self._values[key] = memory.tobytes() + tail
                continue
            if self._at and self._at + length > _FILE_BYTES:
                self._file, self._at = new_file(), 0
                self._files[self._file] = []
            self._files[self._file].append(_Chunk(key, memory))
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
        threads = min(_THREADS, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(threads, "datarax_dist-write") as pool:
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
                if len(chunk.memory) < _SMALL_BYTES:
                    tail = make_tail(len(chunk.memory), fmt.crc32c(chunk.memory))
                    output.add(chunk.memory.tobytes() + tail)
                else:
                    output.add(make_tail(len(chunk.memory), output.write(chunk.memory)))
        return output.size, output.digester.text()

    def _create(self, file: str) -> _Output:
        return _Output(os.path.join(self._directory, file))


class _Output:
    """A file that is written from its beginning to its end, then synced."""

    def __init__(self, path: str) -> None:
        self.size = 0
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

    def write(self, memory: np.ndarray[Any, Any]) -> int:
        """Writes memory as it is, and returns its crc32c."""
        self._flush()
        crc = 0
        for begin in range(0, len(memory), _PIECE_BYTES):
            piece = memory[begin : begin + _PIECE_BYTES]
            crc = fmt.crc32c(piece, crc)
            self._put(piece)
        return crc

    def _flush(self) -> None:
        if self._small:
            data, self._small = self._small, bytearray()
            self._put(np.frombuffer(data, np.uint8))

    def _put(self, piece: np.ndarray[Any, Any]) -> None:
        self.digester.update(piece)
        written = 0
        while written < len(piece):
            written += os.write(self._descriptor, piece[written:].data)
        self.size += len(piece)
