"""One lease for each run and process: all objects of a process that write to a run share it, and
the last one lets it go.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterable

from datarax_dist.lease import Lease

__all__ = ["Share", "borrow", "give_all_back"]


class Share:
    """What one user of a lease has, until it gives it back. A forked process has none of those that
    it has inherited, and gives none back.
    """

    def __init__(self, lease: Lease, place: str) -> None:
        self.lease, self.place = lease, place

    def give_back(self) -> None:
        """Takes note that the user has ended; once. When the last one has, the run is let go."""
        try:
            if self._is_last():
                self.lease.disown()
                self.lease.release()
        except BaseException:  # Ctrl-C while another thread renews it, say
            if not any(share is self or share.lease is self.lease for share in tuple(_shares)):
                self.lease.leave_soon()
            raise

    @property
    def is_lent(self) -> bool:
        """Whether it was not given back yet."""
        return self in _shares

    def give_back_later(self) -> None:
        """The same for a finalizer, which may run on any thread and between any two instructions,
        where locks of this module are held: the thread that renews the lease does it.
        """
        _dropped.put(self)  # its `put` may interrupt itself
        self.lease.wake()

    def _is_last(self) -> bool:
        with _borrowing:
            if self not in _shares:
                return False
            _shares.remove(self)
            return not any(other.lease is self.lease for other in _shares)


_shares: list[Share] = []  # one for each user
_dropped: queue.SimpleQueue[Share] = queue.SimpleQueue()  # of users that have gone
_borrowing = threading.RLock()


def _begin_anew() -> None:
    """In a forked child: all that was its parent's, and a lock may have been held."""
    global _borrowing, _dropped
    _borrowing, _dropped = threading.RLock(), queue.SimpleQueue()
    _shares.clear()


os.register_at_fork(after_in_child=_begin_anew)


def borrow(root: str, make: Callable[[], Lease]) -> Share:
    """Returns a share of this process's lease on a root, for one more user. It is not held yet."""
    # A directory may be known by several paths.
    place = root if "://" in root else os.path.realpath(root)
    note_dropped()
    made = make()
    made.on_wake = note_dropped
    with _borrowing:
        lease = next((share.lease for share in _shares if share.place == place), made)
        _shares.append(share := Share(lease, place))
    if lease is not made:
        lease.share(made)
    return share


def note_dropped() -> None:
    """Does what `give_back_later` has been told."""
    with contextlib.suppress(queue.Empty):
        while True:
            share = _dropped.get_nowait()
            if share._is_last():
                share.lease.leave_soon()


def give_all_back(but: Iterable[Share] = ()) -> None:
    """For a process that ends, `but` what is held by users that hang, and may write yet."""
    with _borrowing:
        ended = {id(share.lease): share.lease for share in _shares}
        _shares.clear()
    for share in but:
        ended.pop(id(share.lease), None)
    for lease in ended.values():
        lease.release()
