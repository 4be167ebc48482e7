"""A file system of which only what was fsynced is sure to survive: a model, and its recorder.

    with record(base) as log:          # what storage.py does below `base`, and others
        ...                            # a save
    for number, disk in cuts(log):     # the power is cut after so many of the events
        for state in states_after_cut(disk, random.Random(0)):
            state.materialise(empty_directory)

What may be there after the power was cut, as POSIX leaves it open (the rationale of `fsync` in
POSIX.1-2017; fsync(2): "Calling fsync() does not necessarily ensure that the entry in the directory
containing the file has also reached disk"; and Pillai et al., "All File Systems Are Not Created
Equal", OSDI 2014, on what file systems do with that):

- *Data* of a file that was not fsynced since: what it was, nothing, half of it, zeros in its
  length, or all of it; whatever is there of its name.
- *Names*: what changed in a directory that was not fsynced since is there or not, each change for
  itself and in any order. An fsync of a file is none of its name, an fsync of a directory none of
  the directory's own name, nor of what is in the files.
- *Renaming* within one directory is one change: the journals of ext4, xfs and btrfs write it in one
  transaction. From one directory to another it may be seen done in the new one alone (both names
  are there), and never in the old one alone: neither name is no state that a journal leaves.

What is written by others (Orbax, TensorStore) is recorded as it is found, and their own fsyncs are
not: only ours count.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from datarax_dist import storage

__all__ = [
    "Change",
    "Disk",
    "Event",
    "Log",
    "Mark",
    "State",
    "Sync",
    "Write",
    "cuts",
    "record",
    "states_after_cut",
]

_TOP = 0
_DAMAGES: Mapping[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
}


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """Names of one directory change, at once.

    Attributes:
        directory: which one; each file and directory has a number, the top is 0.
        entries: name -> what it names from now on; None where it is removed.
        needs: it is not seen without this other change.
    """

    directory: int
    entries: Mapping[str, int | None]
    needs: Change | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Write:
    """A file has other content, which is `data`."""

    file: int
    data: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Sync:
    """An fsync.

    Attributes:
        where: what called it, as `LocalStore.put, directory`.
    """

    target: int
    where: str


@dataclass(frozen=True, slots=True, eq=False)
class Mark:
    """Something that is known from here on, to whoever writes the log: a step was reported, say."""

    what: str
    value: Any = None


Event = Change | Write | Sync | Mark


@dataclass(slots=True)
class Log:
    """What was done below a directory, in order. What was there before is durable.

    Attributes:
        directories: those of the numbers that are directories.
        inherited: how many of the events are what was there before.
    """

    events: list[Event] = field(default_factory=list)
    directories: set[int] = field(default_factory=lambda: {_TOP})
    inherited: int = 0

    def mark(self, what: str, value: Any = None) -> None:
        self.events.append(Mark(what, value))

    def without(self, where: str) -> list[Event]:
        """Returns the events without the fsyncs of one place."""
        return [e for e in self.events if not (isinstance(e, Sync) and e.where == where)]


# What may be there


@dataclass(frozen=True, slots=True)
class State:
    """What is there after a cut.

    Attributes:
        files: path -> content; None for a directory.
        told: what of that which was not fsynced is there, or not.
    """

    files: Mapping[str, bytes | None]
    digest: str
    told: str

    def materialise(self, top: Path) -> None:
        """Writes it to an empty directory."""
        for path, data in sorted(self.files.items()):
            if data is None:
                (top / path).mkdir()
            else:
                (top / path).write_bytes(data)


class Disk:
    """What is on a disk after some events, and what is still under way to it."""

    def __init__(self, directories: set[int]) -> None:
        self._directories = directories
        self.names: dict[int, dict[str, int]] = {}
        self.data: dict[int, bytes] = {}
        self.changes: list[Change] = []
        self.writes: dict[int, bytes] = {}  # the last one of each file
        self._digests: dict[bytes, bytes] = {}

    def add(self, event: Event) -> None:
        if isinstance(event, Change):
            self.changes.append(event)
        elif isinstance(event, Write):
            self.writes[event.file] = event.data
        elif isinstance(event, Sync):
            if event.target in self.writes:
                self.data[event.target] = self.writes.pop(event.target)
            # With a removal goes the change that it needs: a journal has both then.
            mine = [c for c in self.changes if c.directory == event.target]
            mine += [c.needs for c in mine if c.needs is not None and c.needs in self.changes]
            for change in [c for c in self.changes if c in mine]:
                _apply(self.names, change)
            self.changes = [c for c in self.changes if c not in mine]

    def settle(self) -> None:
        """Everything is durable."""
        for change in self.changes:
            _apply(self.names, change)
        self.data |= self.writes
        self.changes, self.writes = [], {}

    def state(self, kept: set[Change], data: Mapping[int, str], told: str) -> State:
        """Returns what is there with some of the changes, and with the content of each file that
        is being written as `data` says: "old", "whole", or how it is damaged.
        """
        names = {directory: dict(entries) for directory, entries in self.names.items()}
        for change in self.changes:
            if change in kept and (
                change.needs is None or change.needs in kept or change.needs not in self.changes
            ):
                _apply(names, change)
        files: dict[str, bytes | None] = {}
        digester = hashlib.blake2b(digest_size=16)

        def visit(directory: int, prefix: str) -> None:
            for name, number in sorted(names.get(directory, {}).items()):
                path = f"{prefix}{name}"
                digester.update(path.encode() + b"\0")
                if number in self._directories:
                    files[path] = None
                    visit(number, f"{path}/")
                else:
                    content = self._content(number, data.get(number, "old"))
                    files[path] = content
                    digester.update(self._digest(content))

        visit(_TOP, "")
        return State(files, digester.hexdigest(), told)

    def _content(self, number: int, how: str) -> bytes:
        if how == "old" or number not in self.writes:
            return self.data.get(number, b"")
        whole = self.writes[number]
        return whole if how == "whole" else _DAMAGES[how](whole)

    def _digest(self, content: bytes) -> bytes:
        if content not in self._digests:
            self._digests[content] = hashlib.blake2b(content, digest_size=16).digest()
        return self._digests[content]


def _apply(names: dict[int, dict[str, int]], change: Change) -> None:
    entries = names.setdefault(change.directory, {})
    for name, number in change.entries.items():
        if number is None:
            entries.pop(name, None)
        else:
            entries[name] = number


def cuts(log: Log, events: Sequence[Event] | None = None) -> Iterator[tuple[int, Disk]]:
    """Yields, for a cut after each event, how many events came before it, and the disk."""
    disk = Disk(log.directories)
    for event in log.events[: log.inherited]:
        disk.add(event)
    disk.settle()
    yield log.inherited, disk
    for number, event in enumerate(
        (log.events if events is None else events)[log.inherited :], log.inherited + 1
    ):
        disk.add(event)
        yield number, disk


def states_after_cut(disk: Disk, chance: random.Random, samples: int = 8) -> Iterator[State]:
    """Yields what may be there: with nothing and with everything that was not fsynced, with each
    such thing missing or damaged alone, with each there alone, and `samples` at random. Not all
    are different.
    """
    changes, writes = disk.changes, list(disk.writes)
    all_changes, whole = set(changes), dict.fromkeys(writes, "whole")
    yield disk.state(set(), {}, "nothing survived")
    yield disk.state(all_changes, whole, "everything survived")
    for how in ("old", *_DAMAGES):
        if writes:
            yield disk.state(all_changes, dict.fromkeys(writes, how), f"all names; data {how}")
    for change in changes:
        yield disk.state(all_changes - {change}, whole, f"all but {_tell(change)}")
        yield disk.state({change}, {}, f"only {_tell(change)}")
        yield disk.state({change}, whole, f"of the names only {_tell(change)}")
    for file in writes:
        for how in ("old", *_DAMAGES):
            yield disk.state(all_changes, whole | {file: how}, f"all; file {file} {how}")
        yield disk.state(all_changes, {file: "whole"}, f"all names; data of file {file} alone")
    for number in range(samples if changes or writes else 0):
        kept: set[Change] = set()
        for directory in {change.directory for change in changes}:
            here = [change for change in changes if change.directory == directory]
            if chance.random() < 0.5:  # in order
                kept |= set(here[: chance.randrange(len(here) + 1)])
            else:
                kept |= {change for change in here if chance.random() < 0.5}
        data = {file: chance.choice(["old", "whole", "whole", *_DAMAGES]) for file in writes}
        yield disk.state(kept, data, f"at random, number {number}")


def _tell(change: Change) -> str:
    names = ", ".join(
        f"{name} {'removed' if number is None else f'= {number}'}"
        for name, number in change.entries.items()
    )
    return f"[{names}] in directory {change.directory}"


# Recording


class _Recorder:
    """Looks at a directory before and after each operation of `datarax_dist.storage`: what is
    found before was done by others.
    """

    def __init__(self, base: Path, log: Log) -> None:
        self._base = base
        self._log = log
        self._lock = threading.RLock()
        self._count = 0
        self._names: dict[int, dict[str, int]] = {_TOP: {}}
        self._numbers: dict[int, int] = {os.stat(base).st_ino: _TOP}  # inode -> number
        self._seen: dict[int, tuple[int, int]] = {}
        self.look()
        log.inherited = len(log.events)

    def do(self, operation: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        with self._lock:
            self.look()
            try:
                return operation(*arguments, **keywords)
            finally:
                self.look()

    def fsync(self, descriptor: int, where: str) -> None:
        with self._lock:
            self.look()
            number = self._numbers.get(os.fstat(descriptor).st_ino)
            if number is not None:  # not above the directory that is looked at
                kind = "directory" if number in self._log.directories else "file"
                self._log.events.append(Sync(number, f"{where}, {kind}"))

    def look(self) -> None:
        """Adds to the log what has changed."""
        found: dict[int, dict[str, os.stat_result]] = {}
        self._visit(str(self._base), _TOP, found)
        alive = {status.st_ino for entries in found.values() for status in entries.values()}
        for inode in set(self._numbers) - alive - {os.stat(self._base).st_ino}:
            del self._numbers[inode]  # it may be given to another file
        moved: dict[int, Change] = {}
        removals: list[tuple[int, str, int]] = []
        for directory in sorted(found):
            now = {name: self._numbers[s.st_ino] for name, s in found[directory].items()}
            before = self._names.get(directory, {})
            gone = {number: name for name, number in before.items() if name not in now}
            for name, number in now.items():
                if before.get(name) != number:
                    entries: dict[str, int | None] = {name: number}
                    if number in gone:
                        entries[gone.pop(number)] = None
                    moved[number] = Change(directory, entries)
                    self._log.events.append(moved[number])
            removals += [(directory, name, number) for number, name in gone.items()]
            self._names[directory] = now
        for directory in set(self._names) - set(found):  # it has gone, with what was in it
            removals += [(directory, name, n) for name, n in self._names.pop(directory).items()]
        for directory, name, number in removals:
            self._log.events.append(Change(directory, {name: None}, moved.get(number)))

    def _visit(
        self, path: str, directory: int, found: dict[int, dict[str, os.stat_result]]
    ) -> None:
        found[directory] = {}
        try:
            names = sorted(os.listdir(path))
        except FileNotFoundError:
            return
        for name in names:
            inside = os.path.join(path, name)
            try:
                status = os.lstat(inside)
                is_new = status.st_ino not in self._numbers
                number = self._numbers.setdefault(status.st_ino, self._count + 1)
                self._count += is_new
                if stat.S_ISDIR(status.st_mode):
                    self._log.directories.add(number)
                else:
                    self._look_at_data(inside, number, status)
            except FileNotFoundError:  # others are quick
                continue
            found[directory][name] = status
            if stat.S_ISDIR(status.st_mode):
                self._visit(inside, number, found)

    def _look_at_data(self, path: str, number: int, status: os.stat_result) -> None:
        seen = (status.st_size, status.st_mtime_ns)
        if self._seen.get(number, (0, 0)) != seen:
            data = Path(path).read_bytes()
            if data or number in self._seen:
                self._log.events.append(Write(number, data))
            self._seen[number] = seen


class _RecordedOs:
    """What `datarax_dist.storage` takes for the module `os`, and for `shutil`."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder

    def __getattr__(self, name: str) -> Any:
        value = getattr(os, name)
        if name in ("open", "mkdir", "link", "unlink", "rename", "replace"):
            return lambda *arguments, **keywords: self._recorder.do(value, *arguments, **keywords)
        return value

    def fsync(self, descriptor: int) -> None:
        frame = sys._getframe(1)
        if frame.f_code.co_name == "_sync_directory" and frame.f_back is not None:
            frame = frame.f_back
        self._recorder.fsync(descriptor, frame.f_code.co_qualname)

    def rmtree(self, path: str) -> None:
        """As that of `shutil`, but each removal is an operation."""
        for entry in list(os.scandir(path)):
            if entry.is_dir(follow_symlinks=False):
                self.rmtree(entry.path)
            else:
                self._recorder.do(os.unlink, entry.path)
        self._recorder.do(os.rmdir, path)


@contextlib.contextmanager
def record(base: Path) -> Iterator[Log]:
    """Records what `LocalStore` does below `base`, in this process, and what others do there
    meanwhile. Nothing is really fsynced.
    """
    log = Log()
    recorder = _Recorder(base, log)
    with mock.patch.multiple(storage, os=(seen := _RecordedOs(recorder)), shutil=seen):
        yield log
    recorder.look()


@contextlib.contextmanager
def without_fsync() -> Iterator[None]:
    """`LocalStore` fsyncs nothing meanwhile: where the power stays on."""

    class Quick:
        def __getattr__(self, name: str) -> Any:
            return (lambda descriptor: None) if name == "fsync" else getattr(os, name)

    with mock.patch.object(storage, "os", Quick()):
        yield


def clear(directory: Path) -> Path:
    """Returns the directory, empty."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory
