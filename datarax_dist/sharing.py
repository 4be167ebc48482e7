"""One lease for each run and process: all objects of a process that write to a run share it, and
the last one lets it go.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from datarax_dist.lease import Lease

__all__ = ["borrow", "give_all_back", "give_back", "give_back_later"]


@dataclass(frozen=True, eq=False, slots=True)
class _Share:
    root: str
    place: str
    lease: Lease


_shares: list[_Share] = []  # one for each user
_dropped: queue.SimpleQueue[str] = queue.SimpleQueue()  # roots of users that have gone
_borrowing = threading.RLock()


def _begin_anew() -> None:
    """In a forked child: all that was its parent's, and a lock may have been held."""
    global _borrowing, _dropped
    _borrowing, _dropped = threading.RLock(), queue.SimpleQueue()
    _shares.clear()


os.register_at_fork(after_in_child=_begin_anew)


def borrow(root: str, make: Callable[[], Lease]) -> Lease:
    """Returns the lease of this process on a root, for one more user of it. It is not held yet."""
    # A directory may be known by several paths.
    place = root if "://" in root else os.path.realpath(root)
    note_dropped()
    made = make()
    made.on_wake = note_dropped
    with _borrowing:
        lease = next((share.lease for share in _shares if share.place == place), made)
        _shares.append(_Share(root, place, lease))
    if lease is not made:
        lease.share(made)
    return lease


def give_back(root: str, process: int | None = None) -> None:
    """Takes note that one user has ended. When the last one has, the run is let go.

    Args:
        process: that has borrowed it; in a forked one nothing is done. Told where a forked process
            may have borrowed one of its own.
    """
    if process in (None, os.getpid()) and (lease := _take_back(root)) is not None:
        lease.release()


def give_back_later(root: str, process: int | None = None) -> None:
    """The same for a finalizer, which may run on any thread and between any two instructions, where
    locks of this module are held: the thread that renews the lease does it.
    """
    if process in (None, os.getpid()):
        _dropped.put(root)  # its `put` may interrupt itself
        for share in tuple(_shares):
            share.lease.wake()


def note_dropped() -> None:
    """Does what `give_back_later` has been told."""
    with contextlib.suppress(queue.Empty):
        while True:
            if (lease := _take_back(_dropped.get_nowait())) is not None:
                lease.leave_soon()


def _take_back(root: str) -> Lease | None:
    """Returns the lease, if it has no user any more."""
    with _borrowing:
        for share in reversed(_shares):
            if share.root == root:
                _shares.remove(share)
                is_used = any(other.lease is share.lease for other in _shares)
                return None if is_used else share.lease
    return None


def give_all_back() -> None:
    """For a process that ends."""
    with _borrowing:
        ended = {id(share.lease): share.lease for share in _shares}
        _shares.clear()
    for lease in ended.values():
        lease.release()
