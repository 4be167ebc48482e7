"""The storage port: where the files of a run live, below one root.

Keys are relative, with `/`. What every store must keep:

- `put` and `create` are atomic and durable when they return: a reader sees all of the new content
  or none of it, also after a power cut. `create` succeeds for exactly one of several callers.
- `list` shows everything that a finished `put`, `create` or `delete` of any host made or removed.
- `sync` makes files that others wrote (Orbax, TensorStore) durable: their data, and their names.

`SupportsRename` is an ability of file systems: a staged directory appears under its final name at
once. `SupportsReplace` is one of buckets: there what was staged is copied, and what stands for the
marker decides alone whose step it is.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from datarax_dist import format as fmt
from datarax_dist.config import is_bucket
from datarax_dist.errors import StorageError, describe, printable, storage_hint

__all__ = [
    "Entry",
    "LocalStore",
    "Store",
    "SupportsRename",
    "SupportsReplace",
    "for_each",
    "open_store",
    "root_is_away",
]

_CHUNK_BYTES = 1 << 20
_PARALLEL = 16
# What a `put` or `create` that was cut off leaves; nobody has written such a key.
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")
_CUT_OFF_SECONDS = 24 * 3600.0  # no write takes so long, and no clock is wrong by that
_NO_LINK = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in a listing: key relative to the root, size in bytes; and, where the storage tells
    these without reading (buckets do), its digest, and which writing of this key it is.
    `irregular` says what it is when it is no file: "a symbolic link", "a FIFO". Nobody opens it.
    """

    key: str
    size: int
    digest: str = ""
    generation: str = ""
    irregular: str = ""


class Store(Protocol):
    """Files below one root. Errors are `StorageError`; a missing key is `KeyError`.

    Attributes:
        digest_kind: of digests, "crc32" or "md5"; that of listings, where these have any.
    """

    digest_kind: str

    @property
    def root(self) -> str: ...

    def get(self, key: str) -> bytes:
        """Returns a file of ours, which fits into memory.

        Raises:
            InvalidRecordError: there is no such file of ours: it is larger than `fmt.most_bytes`,
                or a link, a directory, a device. Nothing of it was read.
        """

    def put(self, key: str, data: bytes) -> None: ...

    def create(self, key: str, data: bytes) -> bool:
        """Writes `data` if there is no `key`; returns whether this call (and no other) made it."""

    def children(self, prefix: str) -> list[str]:
        """Returns the names directly below `prefix`; directories end with `/`. Empty when there is
        none.

        Raises:
            StorageError: it cannot be listed; on a file system also where the root is something
                else than a directory, which is no empty run.
        """

    def list(self, prefix: str) -> list[Entry]:
        """Returns every file below `prefix`, or the file of that name, sorted by key. Files that
        come or go meanwhile may be in it or not.
        """

    def digest(
        self, key: str, expected_size: int | None = None, *, like: str = ""
    ) -> tuple[int, str]:
        """Returns size and digest of a file, after reading every byte; no digest when the size is
        not as expected. `like` is a digest of the kind that is wanted.
        """

    def delete(self, prefix: str, *, last: str | None = None) -> None:
        """Removes a file, or everything below a prefix, the file `last` of it at the end; nothing
        there is no error. Durable when it returns.
        """

    def sync(self, prefix: str, keys: Iterable[str]) -> None:
        """Makes the files `keys` durable, and their names up to and with the directory `prefix`."""


@runtime_checkable
class SupportsRename(Protocol):
    """The ability to give a directory another name at once, durably, never onto something that
    exists. Where the new name is to be in another directory, that one must be there (`KeyError`).
    """

    def rename(self, source: str, destination: str) -> None: ...


@runtime_checkable
class SupportsSweep(Protocol):
    """The ability of file systems to remove what a write that was cut off has left, under a name
    that is no key.
    """

    def sweep(self, prefix: str) -> None:
        """Removes it directly below `prefix`, if it is there for a day."""


@runtime_checkable
class SupportsReplace(Protocol):
    """The ability of buckets to replace a file on a condition, and to copy without reading."""

    def replace(self, key: str, expected: bytes, data: bytes, *, seen: Entry | None = None) -> bool:
        """Writes `data` if `key` holds `expected`, be it the same; returns whether this call (and
        no other) did. With `seen`, as listed: not if `key` was written again since.
        """

    def delete_listed(self, entries: Sequence[Entry]) -> None:
        """Removes files as they were listed: what was written again since stays, and that is no
        error. One without a generation is removed whatever it is.
        """

    def copy(self, source: str, destination: str, names: Sequence[str]) -> None:
        """Copies the files `names` below a prefix to another one, without reading them here. Never
        onto something: what is there stays, and that is no error.
        """


def open_store(root: str) -> Store:
    """Returns the store of a root as `config.check_root` returns it."""
    if not is_bucket(root):
        return LocalStore(root)
    from datarax_dist.buckets import BucketStore

    return BucketStore(root)


def for_each(
    store: Store, function: Callable[[_Item], _Result], items: Iterable[_Item]
) -> list[_Result]:
    """Returns `function` of each item, in order, done at the same time: each waits for a disk or a
    bucket. A store that waits for neither may say `one_at_a_time`.
    """
    rows = list(items)
    if len(rows) <= 1 or getattr(store, "one_at_a_time", False):
        return [function(item) for item in rows]
    with concurrent.futures.ThreadPoolExecutor(min(_PARALLEL, len(rows))) as pool:
        return list(pool.map(function, rows))


def root_is_away(root: str, what: str) -> StorageError:
    """Returns the error of who has seen a run, and sees it no more.

    Args:
        what: is there now.
    """
    mounted = "" if "://" in root else " Is its file system mounted?"
    return StorageError(
        f"{root} {what}, and this job has read or written a run there.{mounted} If the run was"
        " removed, close every Checkpointer of this root, and open a new one.",
        errno=errno.ENOENT,
    )


@contextlib.contextmanager
def _storage_errors(action: str, path: str) -> Iterator[None]:
    try:
        yield
    except _IrregularError as error:
        told = printable(f"Could not {action} {path}: {error.told}")
        raise StorageError(told, errno=error.errno) from error
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        if missing and action in ("read", "list", "delete", "rename"):
            raise KeyError(path) from error
        raise StorageError(
            f"Could not {action} {printable(path)}: {describe(error)}. {storage_hint(error.errno)}",
            errno=error.errno,
        ) from error


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class LocalStore:
    """A directory of a local or shared POSIX file system. Below the root no symbolic link is
    followed, whoever has put it there; the root itself may be one, and what is above it.
    """

    digest_kind = "crc32"

    def __init__(self, root: str) -> None:
        self._root = root

    @property
    def root(self) -> str:
        return self._root

    def path(self, key: str) -> str:
        return os.path.join(self._root, *key.split("/")) if key else self._root

    def get(self, key: str) -> bytes:
        limit = fmt.most_bytes(key)
        with _storage_errors("read", self.path(key)):
            try:
                descriptor = self.open(key)
            except _IrregularError as error:
                raise fmt.InvalidRecordError(f"{key} is {error.kind}, not a file") from None
            with os.fdopen(descriptor, "rb") as file:
                if (size := os.fstat(descriptor).st_size) > limit:
                    raise fmt.too_large(key, size)
                return file.read(size)

    def _open_directory(self, prefix: str) -> int:
        """Opens a directory. Below the root no link is followed; the root itself may be one."""
        descriptor = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
        names = prefix.split("/") if prefix else []
        for depth, name in enumerate(names, 1):
            try:
                inner = os.open(name, _NO_LINK | os.O_DIRECTORY, dir_fd=descriptor)
            except OSError as error:
                if (kind := _irregular(name, descriptor)) is not None and kind != "a directory":
                    key = "/".join(names[:depth])
                    raise _IrregularError(kind, key, self.path(key)) from error
                raise
            finally:
                os.close(descriptor)
            descriptor = inner
        return descriptor

    def open(self, key: str) -> int:
        """Opens a regular file to read, and nothing else: to open a FIFO would wait for ever."""
        directory, _, name = key.rpartition("/")
        parent = self._open_directory(directory)
        try:
            kind = _irregular(name, parent)
            if kind is None:
                descriptor = os.open(name, _NO_LINK, dir_fd=parent)
                if stat.S_ISREG(os.fstat(descriptor).st_mode):
                    return descriptor
                os.close(descriptor)
            raise _IrregularError(kind or "no file any more", key, self.path(key))
        finally:
            os.close(parent)

    def put(self, key: str, data: bytes) -> None:
        above, _, name = key.rpartition("/")
        with (
            _storage_errors("write", self.path(key)),
            _closing(self._make_directories(above)) as parent,
        ):
            temporary = self._write_temporary(name, parent, data)
            try:
                os.replace(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
            except OSError:
                os.unlink(temporary, dir_fd=parent)
                raise
            os.fsync(parent)

    def create(self, key: str, data: bytes) -> bool:
        above, _, name = key.rpartition("/")
        with (
            _storage_errors("create", self.path(key)),
            _closing(self._make_directories(above)) as parent,
        ):
            temporary = self._write_temporary(name, parent, data)
            try:
                # link() is the one POSIX call that is exclusive and shows whole content, on NFS
                # too. There its reply can be lost, so a failure is checked by reading back: `data`
                # carries a nonce.
                os.link(
                    temporary, name, src_dir_fd=parent, dst_dir_fd=parent, follow_symlinks=False
                )
            except FileExistsError:
                try:
                    if self.get(key) != data:
                        return False
                except (KeyError, fmt.InvalidRecordError):
                    return False
            finally:
                # There are directories in which files may be made, and not be removed.
                with contextlib.suppress(PermissionError):
                    os.unlink(temporary, dir_fd=parent)
            os.fsync(parent)
            return True

    def _write_temporary(self, name: str, parent: int, data: bytes) -> str:
        temporary = f".{name}.{secrets.token_hex(6)}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        descriptor = os.open(temporary, flags, 0o666, dir_fd=parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            os.unlink(temporary, dir_fd=parent)
            raise
        return temporary

    def _make_directories(self, prefix: str) -> int:
        """Opens a directory. What is missing of it is made, and its names last."""
        with contextlib.suppress(FileNotFoundError):
            return self._open_directory(prefix)
        if prefix:
            above, _, name = prefix.rpartition("/")
            with _closing(self._make_directories(above)) as parent:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, dir_fd=parent)
                os.fsync(parent)
            return self._open_directory(prefix)
        missing, directory = [], self._root
        while not os.path.isdir(directory):
            missing.append(directory)
            directory = os.path.dirname(directory)
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(path)
            _sync_directory(os.path.dirname(path))
        return self._open_directory("")

    def children(self, prefix: str) -> list[str]:
        path = self.path(prefix)
        try:
            with _storage_errors("list", path):
                try:
                    descriptor = self._open_directory(prefix)
                except _IrregularError:
                    return []
                try:
                    with os.scandir(descriptor) as entries:
                        return sorted(
                            e.name + ("/" if e.is_dir(follow_symlinks=False) else "")
                            for e in entries
                            if not _TEMPORARY.fullmatch(e.name)
                        )
                finally:
                    os.close(descriptor)
        except KeyError as error:
            if not prefix and (told := self._is_no_root(error.__cause__)):
                raise StorageError(f"Could not list {path}: {told}", errno=errno.ENOTDIR) from error
            return []

    def _is_no_root(self, error: BaseException | None) -> str:
        """Returns what is wrong where there is no directory, and none can be made, either."""
        if isinstance(error, NotADirectoryError):
            return f"it is not a directory. {storage_hint(errno.ENOTDIR)}"
        if os.path.islink(self._root) and not os.path.exists(self._root):
            return "it is a symbolic link to nothing. Is something not mounted?"
        return ""

    def list(self, prefix: str) -> list[Entry]:
        above, _, name = prefix.rpartition("/")
        start = f"{above}/" if above else ""
        found: list[Entry] = []

        def add(path: str, status: os.stat_result) -> None:
            kind = _kind(status.st_mode) or ""
            found.append(Entry(f"{start}{path}", status.st_size, irregular=kind))

        gone = contextlib.suppress(FileNotFoundError, NotADirectoryError)
        with _storage_errors("list", self.path(prefix)), gone:
            try:
                parent = self._open_directory(above)
            except _IrregularError as error:  # what is in the way is all that there is
                return [Entry(error.key, 0, irregular=error.kind)]
            with _closing(parent):
                status = os.stat(name or ".", dir_fd=parent, follow_symlinks=False)
                directories = [name] if stat.S_ISDIR(status.st_mode) else []
                if not directories:
                    add(name, status)
                while directories:
                    directory = directories.pop()
                    flags = _NO_LINK | os.O_DIRECTORY
                    with (
                        gone,
                        _closing(os.open(directory or ".", flags, dir_fd=parent)) as descriptor,
                        os.scandir(descriptor) as entries,
                    ):
                        for entry in entries:
                            path = f"{directory}/{entry.name}" if directory else entry.name
                            with gone:
                                if entry.is_dir(follow_symlinks=False):
                                    directories.append(path)
                                else:
                                    add(path, entry.stat(follow_symlinks=False))
        return sorted(found, key=lambda entry: entry.key)

    def digest(
        self, key: str, expected_size: int | None = None, *, like: str = ""
    ) -> tuple[int, str]:
        path = self.path(key)
        size, digester = 0, fmt.Digester(like or self.digest_kind)
        with (
            _storage_errors("read", path),
            os.fdopen(self.open(key), "rb", buffering=0) as file,
        ):
            if (
                expected_size is not None
                and (actual := os.fstat(file.fileno()).st_size) != expected_size
            ):
                return actual, ""
            while chunk := file.read(_CHUNK_BYTES):
                digester.update(chunk)
                size += len(chunk)
        return size, digester.text()

    def delete(self, prefix: str, *, last: str | None = None) -> None:
        path = self.path(prefix)
        try:
            with _storage_errors("delete", path):
                os.close(self._open_directory(prefix.rpartition("/")[0]))  # by no link
                if os.path.isdir(path) and not os.path.islink(path):
                    for name in os.listdir(path) if last is not None else ():
                        if name != last:
                            _remove(os.path.join(path, name))
                    shutil.rmtree(path)
                else:
                    os.unlink(path)
                _sync_directory(os.path.dirname(path))
        except KeyError:
            return

    def sync(self, prefix: str, keys: Iterable[str]) -> None:
        directories = {prefix}
        files = list(keys)
        for key in files:
            directory = key.rpartition("/")[0]
            while len(directory) > len(prefix):
                directories.add(directory)
                directory = directory.rpartition("/")[0]

        for_each(self, self._sync_file, files)
        for_each(self, self._sync_names, sorted(directories, reverse=True))

    def _sync_file(self, key: str) -> None:
        with _storage_errors("fsync", self.path(key)):
            descriptor = self.open(key)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _sync_names(self, prefix: str) -> None:
        with (
            _storage_errors("fsync", self.path(prefix)),
            _closing(self._open_directory(prefix)) as directory,
        ):
            os.fsync(directory)

    def rename(self, source: str, destination: str) -> None:
        target = self.path(destination)
        with _storage_errors("rename", self.path(source)):
            for above in {key.rpartition("/")[0] for key in (source, destination)} - {""}:
                os.close(self._open_directory(above))  # by no link
            # rename() replaces an empty directory without a word; such a one is somebody else's
            # too.
            if os.path.lexists(target):
                raise FileExistsError(17, "something of that name is there already", target)
            before = os.lstat(self.path(source))
            try:
                os.rename(self.path(source), target)
            except FileNotFoundError:
                # A server that did not answer is asked again, and has done it already (NFS).
                if not os.path.lexists(target) or not os.path.samestat(before, os.lstat(target)):
                    raise
            for directory in {os.path.dirname(target), os.path.dirname(self.path(source))}:
                _sync_directory(directory)

    def sweep(self, prefix: str) -> None:
        with (
            _storage_errors("tidy up", self.path(prefix)),
            contextlib.suppress(FileNotFoundError),
            _closing(self._open_directory(prefix)) as directory,
            os.scandir(directory) as entries,
        ):
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # somebody was faster
                    if (
                        _TEMPORARY.fullmatch(entry.name)
                        and entry.is_file(follow_symlinks=False)
                        and time.time() - entry.stat().st_mtime > _CUT_OFF_SECONDS
                    ):
                        os.unlink(entry.name, dir_fd=directory)


class _IrregularError(OSError):
    """Something else stands where a file or a directory of ours would."""

    def __init__(self, kind: str, key: str, path: str) -> None:
        super().__init__(errno.EINVAL, f"it is {kind}", path)
        self.kind, self.key = kind, key
        self.told = f"{path} is {kind}, and not of a run. Move it away."
        if kind == _KINDS[stat.S_IFLNK]:
            self.told = (
                f"{path} is a symbolic link. Below the root of a run none is followed (the root"
                " itself may be one). Remove it, and move what it leads to into its place."
            )


def _kind(mode: int) -> str | None:
    """Returns what is there, when it is no regular file."""
    if stat.S_ISREG(mode):
        return None
    return _KINDS.get(stat.S_IFMT(mode), "nothing known")


def _irregular(name: str, directory: int) -> str | None:
    return _kind(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _sync_directory(path: str) -> None:
    descriptor = os.open(path or "/", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
