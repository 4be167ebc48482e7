"""Who writes to a run: one job at a time, by a lease.

A lease is a file of its own for each *epoch*, `lease/<epoch>.json`. Who creates the next epoch's
file, exclusively, owns the run; whoever owned it before has lost it, for good. So nothing is ever
replaced on a condition, and it works on file systems as in buckets.

No clock is compared with another one. The owner renews its file, a counter, every so often. Who
wants the run watches the counter, with its own clock: as soon as it moves, the owner is alive, and
there is a `LeaseError`; when it stands still for as long as the file says, the lease has run out.
On one machine a process that is gone, or runs, is known at once, where the kernel tells. But who
runs does not always renew (its thread has died, or hangs): who may wait, and has seen no renewal in
a third of that time, goes on watching until the lease has run out.

An owner that was stopped and goes on must do no harm. Before each act that counts (giving a step
its name or its marker, deleting a step) it first leaves a sign of it in the store (what it staged,
or what it deletes), and then asks whether there is a newer epoch. Who takes over first makes the
newer epoch, and then looks for such signs and makes them void (`retention.fence`). So one of the
two sees the other.

An owner that has ended says `released`; when that fails, it says so later, as long as its process
lives. One that could not finish taking over says that its lease lasts for 0 seconds: anyone may
take it at once, and has to make void what older ones have begun. Renewals and the release look for
the owner's own file first: what a person has removed does not come back.

The identity of a writer stands in the claim `STEP.json`, too: a directory whose writer is certainly
dead may be removed by anyone who reads the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import queue
import secrets
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from datarax_dist import errors
from datarax_dist import format as fmt
from datarax_dist.clock import Clock
from datarax_dist.errors import FormatVersionError, LeaseError, StorageError
from datarax_dist.storage import Store, root_is_away
from datarax_dist.writers import is_certainly_dead, is_here, is_running, writer_identity

__all__ = [
    "Lease",
    "Right",
    "Unguarded",
    "describe",
    "newest_lease",
]

logger = logging.getLogger("datarax_dist")

_RENEWALS = 6  # in the time that a lease lasts
_MISSED = 2  # so many, and it is no sign of life that a process runs
_LOOK_SECONDS = 0.5
_TRIES = 10  # to make a file that is not in the listing, and cannot be made
_SLACK_SECONDS = 5.0  # for a lease that lasts as long as ours to run out
_UNREADABLE_SECONDS = 60.0  # how long a lease lasts that does not say it

# Is given the run, the older leases, and what says whether there is none newer than ours.
Fence = Callable[[str, Sequence[fmt.LeaseRecord], Callable[[], bool]], None]


def describe(lease: fmt.LeaseRecord) -> str:
    """Returns whose a lease is."""
    pid, name = str(lease.owner.get("pid"))[:20], str(lease.owner.get("name"))
    shown = name if len(name) <= 253 and name.isprintable() else "an unknown host"
    return f"process {pid} on {shown} (epoch {lease.epoch})"


@dataclass(frozen=True, slots=True)
class _Seen:
    """A lease as it was seen; `record` is None where it cannot be read."""

    epoch: int
    content: bytes
    record: fmt.LeaseRecord | None

    @property
    def owner(self) -> str:
        if self.record is None:
            return f"a job whose lease cannot be read (epoch {self.epoch})"
        return describe(self.record)


def _read(store: Store, epoch: int) -> _Seen | None:
    name = fmt.lease_name(epoch)
    try:
        content = store.get(name)
    except KeyError:
        return None  # removed meanwhile
    except fmt.InvalidRecordError:  # too large, or no file
        return _Seen(epoch, b"", None)
    except StorageError as error:
        if errors.is_passing(error):
            raise
        return _Seen(epoch, b"", None)
    with contextlib.suppress(fmt.InvalidRecordError, FormatVersionError):
        return _Seen(epoch, content, fmt.parse_lease(content, name))
    return _Seen(epoch, content, None)


def _epochs(store: Store) -> list[int]:
    parsed = [fmt.parse_lease_name(name) for name in store.children(fmt.LEASE_NAME)]
    return sorted(epoch for epoch in parsed if epoch is not None)


def _all(store: Store) -> list[_Seen]:
    """Returns the leases of a root, oldest first."""
    return [found for epoch in _epochs(store) if (found := _read(store, epoch)) is not None]


def _place(store: Store) -> str:
    """Names the directory of a root, on this machine; empty where it is none, as in a bucket."""
    if "://" in store.root:
        return ""
    with contextlib.suppress(OSError, ValueError):
        found = os.stat(store.root)
        return f"{found.st_dev:x}:{found.st_ino:x}"
    return ""


def newest_lease(store: Store) -> fmt.LeaseRecord | None:
    """Returns the newest lease of a root that can be read."""
    for epoch in reversed(_epochs(store)):
        if (seen := _read(store, epoch)) is not None and seen.record is not None:
            return seen.record
    return None


class Right(Protocol):
    """What is asked before something is written: a `Lease`, or `Unguarded`."""

    @property
    def epoch(self) -> int: ...

    @property
    def under_way(self) -> set[str]:
        """What saves write to that go on now, directories. Several objects of a process may share a
        right, and none is to remove what another one is writing.
        """

    def hold(self, run: str, fence: Fence) -> None: ...

    def check(self) -> None: ...

    def raise_if_lost(self) -> None: ...

    def announce(self, step: int, marker_digest: str) -> None: ...


class Unguarded:
    """No lease: on hosts that are not the primary, and for who removes what nobody can want."""

    epoch = 0

    def __init__(self) -> None:
        self.under_way: set[str] = set()

    def hold(self, run: str, fence: Fence) -> None: ...

    def check(self) -> None: ...

    def raise_if_lost(self) -> None: ...

    def announce(self, step: int, marker_digest: str) -> None: ...


class Lease:
    """The right of this job to write to a run. For the primary. It belongs to the process that has
    made it: a forked one neither has that right nor lets it go.

    Args:
        ttl_seconds: how long it lasts without a sign of life.
        wait_seconds: how long `hold` waits for a job that is alive.
        owner: this process, for others.
        renews: on a thread, from `hold` to `release`.

    Attributes:
        under_way: see `Right`.
        on_wake: what the thread that renews it does first, whenever it looks about.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        ttl_seconds: float,
        wait_seconds: float = 0.0,
        owner: Mapping[str, Any] | None = None,
        renews: bool = False,
    ) -> None:
        self._store, self._clock = store, clock
        self._ttl, self._wait = ttl_seconds, wait_seconds
        self.under_way: set[str] = set()
        self.on_wake: Callable[[], None] = lambda: None
        self._owner = dict(owner or writer_identity())
        self._renews = renews
        self._process = os.getpid()
        self._record: fmt.LeaseRecord | None = None
        self._leaving: fmt.LeaseRecord | None = None  # says that it is released; not written yet
        self._is_over = False  # it has no user any more
        self._lost: LeaseError | None = None
        self._lock = threading.RLock()  # one write of the file at a time
        self._keeper: threading.Thread | None = None
        self._wake: queue.SimpleQueue[None] | None = None  # of that thread

    @property
    def epoch(self) -> int:
        """The fencing token; 0 while the run is not held."""
        return self._record.epoch if self._record is not None else 0

    def hold(self, run: str, fence: Fence) -> None:
        """Takes the run, unless it is held already.

        Args:
            fence: given the run and the older leases, keeps their owners from finishing what they
                have begun. It may ask whether this job is still the newest.

        Raises:
            LeaseError: another job holds it, or has taken it from this one.
        """
        self.raise_if_lost()
        with self._lock:
            self.raise_if_lost()
            try:
                self._start_keeping()  # who cannot renew it does not take it
                if self._record is None:
                    self._take(run, fence)
            finally:
                if self._record is None and self._leaving is None:
                    self._stop_keeping()

    def _take(self, run: str, fence: Fence) -> None:
        store, clock = self._store, self._clock
        end = clock.monotonic() + self._wait
        watched: _Seen | None = None
        since = clock.monotonic()
        tried: list[int] = []
        missed = 0
        while True:
            begun = clock.monotonic()  # this job may be stopped between a look and the clock
            epochs = _epochs(store)
            newest = _read(store, epochs[-1]) if epochs else None
            now = clock.monotonic()
            moves = False
            if newest != watched:
                moves, watched, since = watched is not None, newest, now
            unchanged = max(0.0, begun - since)
            if newest is None and epochs:  # removed meanwhile, as there is a newer one
                if now >= end + self._ttl:
                    raise self._blocked_by(
                        epochs[-1],
                        "is listed, and is not there: does this machine remember listings for so"
                        " long (NFS: actimeo)?",
                        "Try again.",
                    )
                missed += 1
                clock.sleep(_LOOK_SECONDS if missed > 1 else 0.0)
                continue
            if newest is None or self._is_free(newest, unchanged):
                epoch = 1 if newest is None else newest.epoch + 1
                if self._create(run, epoch, newest, fence):
                    return
                self._try_again(tried, epoch)  # another job was faster
                continue
            alive = moves
            if (record := newest.record) is not None and self._is_running_here(record):
                alive = alive or unchanged <= _MISSED * record.ttl_seconds / _RENEWALS
            if alive and now >= end:
                raise self._held_by(newest)
            if now >= end + max(self._ttl, _UNREADABLE_SECONDS) + _SLACK_SECONDS:
                raise self._held_for_long(newest, unchanged)
            if now == since:
                logger.warning(
                    "%s is held by %s; watching whether it is alive, for up to %.0f s",
                    store.root,
                    newest.owner,
                    newest.record.ttl_seconds if newest.record else _UNREADABLE_SECONDS,
                )
            clock.sleep(_LOOK_SECONDS)

    def _try_again(self, tried: list[int], epoch: int) -> None:
        """What was faster must be in the next listing; where it is not, something is in the way."""
        tried.append(epoch)
        if (times := tried.count(epoch)) > _TRIES:
            raise self._blocked_by(epoch, "is no lease, and in the way of one: a directory, say")
        if times > 1:
            self._clock.sleep(_LOOK_SECONDS)

    def _create(self, run: str, epoch: int, newest: _Seen | None, fence: Fence) -> bool:
        """Makes the next epoch's file, and makes void what its older owners have begun; returns
        whether this job, and no other, has the run now.
        """
        name = fmt.lease_name(epoch)
        if fmt.parse_lease_name(name.rpartition("/")[2]) != epoch:
            raise self._blocked_by(epoch - 1, "has the last number there is: no job has made it")
        nonce, place = secrets.token_hex(8), _place(self._store)
        mine = fmt.LeaseRecord(run, epoch, nonce, self._owner, self._ttl, place=place)
        _holders[mine.nonce] = self
        try:
            is_made = self._store.create(name, fmt.dump_lease(mine))
            is_ours = is_made and self._take_over(run, mine, newest, fence)
        except BaseException:
            self._give_up(mine)
            raise
        else:
            if is_ours:
                self._record, self._leaving = mine, None
            return is_ours
        finally:
            if self._record is not mine:
                _holders.pop(mine.nonce, None)

    def _take_over(
        self, run: str, mine: fmt.LeaseRecord, newest: _Seen | None, fence: Fence
    ) -> bool:
        # Jobs may have come and gone since the newest lease was read, and have removed the file of
        # this epoch, which was another one's.
        if self._newer(mine.epoch) is not None:
            return False
        if newest is not None and not (newest.record is not None and newest.record.released):
            logger.warning("%s is taken over from %s", self._store.root, newest.owner)
            # Read once more: what they have announced before they could see our file is there now.
            older = [lease.record for lease in _all(self._store) if lease.epoch < mine.epoch]
            # When it fails, who comes next fences them too.
            fence(
                run,
                [record for record in older if record is not None],
                lambda: self._newer(mine.epoch) is None,
            )
            return self._newer(mine.epoch) is None
        return True

    def _give_up(self, mine: fmt.LeaseRecord) -> None:
        """Lets nobody wait for what was not taken to the end. It is not released: who comes next
        has to fence the older owners.
        """
        with contextlib.suppress(StorageError):
            seen = _read(self._store, mine.epoch)
            if seen is not None and seen.record == mine:
                over = dataclasses.replace(mine, ttl_seconds=0)
                self._store.put(fmt.lease_name(mine.epoch), fmt.dump_lease(over))

    def _newer(self, epoch: int) -> int | None:
        newest = max(_epochs(self._store), default=0)
        return newest if newest > epoch else None

    def check(self) -> None:
        """Asks the store whether this job still holds the run.

        Raises:
            LeaseError: another one has taken it.
        """
        self.raise_if_lost()
        self._ask(self._held())

    def _held(self) -> fmt.LeaseRecord:
        if (record := self._record) is None:
            raise LeaseError(f"This job does not hold {self._store.root}; nothing was changed.")
        return record

    def _ask(self, record: fmt.LeaseRecord) -> list[int]:
        """Returns the epochs that there are, if ours is the newest, and ours."""
        epochs = _epochs(self._store)
        if (lost := self._loss(record, epochs)) is None:
            return epochs
        if fmt.RUN_NAME not in self._store.children("") and not _epochs(self._store):
            # No reason to give the run up: it may be mounted again, as it was.
            raise root_is_away(self._store.root, "is not there, or nothing of the run is")
        self._lost = lost
        logger.error("%s", lost)
        raise lost

    def _loss(self, record: fmt.LeaseRecord, epochs: Sequence[int]) -> LeaseError | None:
        newest = max(epochs, default=0)
        if newest > record.epoch:
            return self._lost_to(_read(self._store, newest) or _Seen(newest, b"", None))
        # Whatever a listing says: it may be without a file that is replaced meanwhile; and all may
        # have been removed, and another job have begun anew.
        seen = _read(self._store, record.epoch)
        if seen is None:
            return self._removed(record)
        if seen.record is not None and seen.record.nonce != record.nonce:
            return self._lost_to(seen)
        return None

    def raise_if_lost(self) -> None:
        """The same, as far as it is known without asking."""
        if os.getpid() != self._process:
            raise LeaseError(
                f"The process {self._process} may write to {self._store.root}; this is"
                f" {os.getpid()}, forked from it, and may not. A forked process must open its own"
                " Checkpointer. Nothing was written.",
                owner=f"process {self._process}",
            )
        if self._lost is not None:
            raise self._lost

    def announce(self, step: int, marker_digest: str) -> None:
        """Says which step is deleted next, and asks whether this job still may.

        Raises:
            LeaseError: it may not.
        """
        self.raise_if_lost()
        with self._lock:
            if self._record is not None:
                record = self._record
                self._ask(record)
                # The last few, since objects of this process on one root delete at once.
                deleting = (*record.deleting[-7:], (step, marker_digest))
                self._write(dataclasses.replace(record, deleting=deleting))
        self.check()

    def renew(self) -> None:
        """Shows that this job is alive.

        Raises:
            LeaseError: another one has taken the run.
        """
        self.raise_if_lost()
        with self._lock:
            self.raise_if_lost()
            record = self._held()
            epochs = self._ask(record)
            self._write(dataclasses.replace(record, renewals=record.renewals + 1))
            self._delete_older(record, epochs)

    def _delete_older(self, record: fmt.LeaseRecord, epochs: Sequence[int]) -> None:
        """Deletes what nobody needs any more: the newest stays, so that no epoch comes twice."""
        for epoch in epochs:
            if epoch < record.epoch:
                self._store.delete(fmt.lease_name(epoch))

    def _start_keeping(self) -> None:
        if not self._renews:
            return
        if self._wake is not None and self._keeper is not None and self._keeper.is_alive():
            return
        wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        keeper = threading.Thread(
            target=self._keep, args=(wake,), name="datarax_dist-lease", daemon=True
        )
        self._wake, self._keeper = wake, keeper
        keeper.start()

    def _stop_keeping(self) -> None:
        wake, self._wake = self._wake, None
        if wake is not None:
            wake.put(None)

    def _keep(self, wake: queue.SimpleQueue[None]) -> None:
        told = ""
        while True:
            with contextlib.suppress(queue.Empty):
                wake.get(timeout=self._ttl / _RENEWALS)
            self.on_wake()
            with self._lock:
                if self._wake is not wake:
                    return
                try:
                    if self._leaving is not None or self._is_over:
                        self._leave()
                        self._stop_keeping()
                        return
                    self.renew()
                    told = ""
                except LeaseError:  # whoever saves next is told
                    self._stop_keeping()
                    return
                except Exception as error:
                    if (text := errors.describe(error)) != told:
                        told = text
                        logger.warning(
                            "the lease of %s could not be renewed: %s", self._store.root, told
                        )

    def _write(self, record: fmt.LeaseRecord) -> None:
        self._store.put(fmt.lease_name(record.epoch), fmt.dump_lease(record))
        self._record = record

    def release(self) -> None:
        """Lets the run go, so that the next job need not wait. Where it `renews`, a release that
        fails is tried again for as long as the process lives.
        """
        if os.getpid() != self._process:
            return  # its parent's; and the lock may have been held at the fork
        with self._lock:
            try:
                self._leave()
            except StorageError as error:
                text = errors.describe(error)
                logger.warning("the lease of %s could not be released: %s", self._store.root, text)
                with contextlib.suppress(RuntimeError):  # no more threads: Python ends
                    self._start_keeping()
            else:
                self._stop_keeping()

    def _leave(self) -> None:
        if self._record is not None and self._lost is None:
            self._leaving = dataclasses.replace(self._record, released=True, deleting=())
            _holders.pop(self._record.nonce, None)
            self._record = None
        if (leaving := self._leaving) is None:
            return
        epochs = _epochs(self._store)
        if self._loss(leaving, epochs) is None:
            self._store.put(fmt.lease_name(leaving.epoch), fmt.dump_lease(leaving))
            with contextlib.suppress(StorageError):  # the next one does it
                self._delete_older(leaving, epochs)
        self._leaving = None

    def leave_soon(self) -> None:
        """The same, on the thread that renews it."""
        self._is_over = True
        self.disown()
        self.wake()

    def disown(self) -> None:
        """Says that it is about to be released: a new user in this process need not wait for it."""
        if (record := self._record) is not None:
            _holders.pop(record.nonce, None)

    def wake(self) -> None:
        """Makes the thread that renews it look about. May be called at any time and place."""
        if (wake := self._wake) is not None:
            wake.put(None)

    def share(self, other: Lease) -> None:
        """Takes note of what one more user of it wants."""
        self._wait = max(self._wait, other._wait)
        if other._ttl != self._ttl:
            logger.warning(
                "%s: the lease of this process lasts for %g s, as the first user of it has wanted,"
                " and not for %g s",
                self._store.root,
                self._ttl,
                other._ttl,
            )

    def _is_free(self, lease: _Seen, unchanged_seconds: float) -> bool:
        record = lease.record
        if record is None:
            return unchanged_seconds > _UNREADABLE_SECONDS
        is_over = record.released or not record.ttl_seconds
        if _is_of_this_process(record):
            # It could not be released, or not be taken to the end; or was copied with its run.
            holder = _holders.get(record.nonce)
            is_over |= holder is None or not _is_same_place(holder._store.root, self._store.root)
        return is_over or is_certainly_dead(record.owner) or unchanged_seconds > record.ttl_seconds

    def _is_running_here(self, record: fmt.LeaseRecord) -> bool:
        """Whether the process runs that owns a lease, and writes to this root: the lease may have
        been copied with its run.
        """
        return is_running(record.owner) and record.place in ("", _place(self._store))

    def _blocked_by(
        self, epoch: int, why: str, then: str = "When no job writes to this run, remove it."
    ) -> StorageError:
        return StorageError(
            f"{self._store.root} cannot be taken: {self._store.root}/{fmt.lease_name(epoch)} {why}."
            f" Nothing was written. {then}",
            errno=errno.EEXIST,
        )

    def _removed(self, record: fmt.LeaseRecord) -> LeaseError:
        name = fmt.lease_name(record.epoch)
        return LeaseError(
            f"This job does not hold {self._store.root} any more: its {name} was removed, by a"
            " person or a clean-up. It can commit and delete nothing, and brings nothing back."
            " Close every Checkpointer of this root, and open a new one.",
            owner="",
        )

    def _held_by(self, lease: _Seen) -> LeaseError:
        if lease.record is not None and _is_of_this_process(lease.record):
            return LeaseError(
                f"{self._store.root} is held by this very process ({lease.owner}), as another root:"
                " is it the same place by two paths? Use one of them; nothing was written.",
                owner=lease.owner,
            )
        return LeaseError(
            f"{self._store.root} is held by another job: {lease.owner}, which is alive. Only one"
            " job at a time may write to a run; nothing was written. Stop that one, or wait for it"
            " (Options.lease_wait_seconds), or choose another root.",
            owner=lease.owner,
        )

    def _held_for_long(self, lease: _Seen, unchanged_seconds: float) -> LeaseError:
        lasts = lease.record.ttl_seconds if lease.record is not None else _UNREADABLE_SECONDS
        return LeaseError(
            f"{self._store.root} is held by another job: {lease.owner}. It has shown no sign of"
            f" life for {unchanged_seconds:.0f} s, but has said that its lease lasts for"
            f" {lasts:.0f} s; nothing was written. Wait for that long"
            " (Options.lease_wait_seconds), or choose another root.",
            owner=lease.owner,
        )

    def _lost_to(self, lease: _Seen) -> LeaseError:
        return LeaseError(
            f"This job does not hold {self._store.root} any more: {lease.owner} has taken it over,"
            f" since this one had shown no sign of life for {self._ttl:.0f} s (was it stopped, or"
            " cut off?). It can commit and delete nothing. End it; what was committed is there.",
            owner=lease.owner,
        )


def _is_of_this_process(record: fmt.LeaseRecord) -> bool:
    return is_here(record.owner) and record.owner == writer_identity()


def _is_same_place(one: str, other: str) -> bool:
    if one == other:
        return True
    with contextlib.suppress(OSError):
        return "://" not in one + other and os.path.samefile(one, other)
    return False


# Who holds what in this process, by the nonces of their files
_holders: weakref.WeakValueDictionary[str, Lease] = weakref.WeakValueDictionary()
