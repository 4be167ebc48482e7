"""What is known of a loader beyond what it says itself, by the loader: for as long as it lives."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from datarax_dist import codec

__all__ = ["Memory", "Position", "remembered", "remembered_for_ever", "remembered_with"]


@dataclass(frozen=True, slots=True)
class Position:
    """Where one data shard is: its loader's state, and whether it has given its last batch. (There
    are loaders that begin another epoch when they are set to the end of one.)
    """

    state: codec.Encoded
    ended: bool = False


@dataclass
class Memory:
    """What is known of a loader that the user made.

    Attributes:
        described: its fingerprint.
        restored: what was restored into it.
        failure: why it has no position any more.
        outer: what was put around it, `tracked(...)`; the batches are taken from that.
    """

    described: dict[str, Any] | None = None
    restored: Position | None = None
    failure: str | None = None
    outer: str | None = None


@dataclass
class _Entry:
    """The memory of a loader that lives: by its identity, which another one may have after it."""

    memory: Memory
    loader: Any = None  # kept alive where it cannot be told when it goes (`__slots__`)
    owners: int = 0  # who keep it; one more is never taken away, where it has failed


_entries: dict[int, _Entry] = {}


def remembered(loader: Any) -> Memory:
    """Returns what is known of a loader; a new one each time for one of which nothing can be."""
    known = _entries.get(id(loader))
    if known is not None:
        return known.memory
    try:
        forgotten = weakref.finalize(loader, _entries.pop, id(loader), None)
    except TypeError:
        return Memory()
    forgotten.atexit = False
    mine = _Entry(Memory())
    entry = _entries.setdefault(id(loader), mine)  # another thread may have asked meanwhile
    if entry is not mine:
        forgotten.detach()
    return entry.memory


def remembered_with(owner: Any, loader: Any) -> Memory:
    """The same; one that cannot be told when it goes is known as long as an `owner` lives."""
    memory = remembered(loader)
    entry = _entries.setdefault(id(loader), _Entry(memory, loader))
    if entry.loader is not None:
        entry.owners += 1
        weakref.finalize(owner, _left_by_one, id(loader)).atexit = False
    return entry.memory


def _left_by_one(number: int) -> None:
    _entries[number].owners -= 1
    if not _entries[number].owners:
        del _entries[number]


def remembered_for_ever(loader: Any, memory: Memory) -> None:
    """Sees that `memory` is known as long as the loader could be used."""
    entry = _entries.setdefault(id(loader), _Entry(memory, loader))
    if entry.loader is not None:
        entry.owners += 1
