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


_memories: dict[int, Memory] = {}
# Those that have failed, and cannot be told when they go (`__slots__`).
_kept: list[Any] = []


def remembered(loader: Any) -> Memory:
    """Returns what is known of a loader; a new one each time for one of which nothing can be."""
    if id(loader) in _memories:
        return _memories[id(loader)]
    memory = Memory()
    if _until_it_goes(loader, loader):
        _memories[id(loader)] = memory
    return memory


def remembered_with(owner: Any, loader: Any) -> Memory:
    """The same; one that cannot be told when it goes is known as long as `owner`, who has it."""
    memory = remembered(loader)
    if id(loader) not in _memories and _until_it_goes(owner, loader):
        _memories[id(loader)] = memory
    return memory


def remembered_for_ever(loader: Any, memory: Memory) -> None:
    """Sees that `memory` is known as long as the loader could be used."""
    if id(loader) not in _memories:
        _memories[id(loader)] = memory
        _kept.append(loader)


def _until_it_goes(owner: Any, loader: Any) -> bool:
    try:
        weakref.finalize(owner, _memories.pop, id(loader), None).atexit = False
    except TypeError:
        return False
    return True
