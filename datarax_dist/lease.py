"""Who writes to a run: one job at a time, by a lease.

A lease is a file of its own for each *epoch*, `lease/<epoch>.json`. Who creates the next epoch's
file, exclusively, owns the run; whoever owned it before has lost it, for good. So nothing is ever
replaced on a condition, and it works on file systems as in buckets.

No clock is compared with another one. The owner renews its file, a counter, every so often. Who
wants the run watches the counter, with its own clock: as soon as it moves, the owner is alive, and
there is a `LeaseError`; when it stands still for as long as the file says, the lease has run out.
On one machine a process that is gone, or runs, is known at once.

An owner that was stopped and goes on must do no harm. Before each act that counts (giving a step
its name or its marker, deleting a step) it first leaves a sign of it in the store (what it staged,
or what it deletes), and then asks whether there is a newer epoch. Who takes over first makes the
newer epoch, and then looks for such signs and makes them void (`retention.fence`). So one of the
two sees the other.

The identity of a writer stands in the claim `STEP.json`, too: a directory whose writer is certainly
dead may be removed by anyone who reads the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from datarax_dist import errors
from datarax_dist import format as fmt
from datarax_dist.clock import Clock
from datarax_dist.errors import FormatVersionError, LeaseError, StorageError
from datarax_dist.storage import Store

__all__ = [
    "Lease",
    "Right",
    "Unguarded",
    "borrow",
    "describe",
    "give_all_back",
    "give_back",
    "is_certainly_dead",
    "newest_lease",
    "writer_identity",
]

logger = logging.getLogger("datarax_dist")

_RENEWALS = 6  # in the time that a lease lasts
_LOOK_SECONDS = 0.5
_UNREADABLE_SECONDS = 60.0  # how long a lease lasts that does not say it

# Is given the run, the older leases, and what says whether there is none newer than ours.
Fence = Callable[[str, Sequence[fmt.LeaseRecord], Callable[[], bool]], None]


@functools.cache
def _machine() -> str:
    """Names this boot of this machine and its process numbering (containers have their own)."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process(pid: int) -> tuple[str, str]:
    """Returns when a process began, in ticks since boot, and its state; empty when there is
    none.
    """
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
    except OSError:
        return "", ""
    return ("", "") if fields[0] == "Z" else (fields[19], fields[0])


def writer_identity() -> dict[str, Any]:
    """Returns this process as a writer."""
    pid = os.getpid()
    return {
        "machine": _machine(),
        "pid": pid,
        "started": _process(pid)[0],
        "name": socket.gethostname(),
    }


def _is_here(writer: Mapping[str, Any]) -> bool:
    machine = writer.get("machine")
    return bool(machine) and machine == _machine() and isinstance(writer.get("pid"), int)


def is_certainly_dead(writer: Mapping[str, Any]) -> bool:
    """Whether a writer ran on this machine, and its process is gone."""
    return _is_here(writer) and _process(writer["pid"])[0] != writer.get("started")


def _is_running(writer: Mapping[str, Any]) -> bool:
    """Whether a writer runs on this machine, and is not stopped."""
    if not _is_here(writer):
        return False
    started, state = _process(writer["pid"])
    return started == writer.get("started") and state in ("R", "S", "D")


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
        """The staging directories of saves that go on now. Several objects of a process may share a
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
    """The right of this job to write to a run. For the primary.

    Args:
        ttl_seconds: how long it lasts without a sign of life.
        wait_seconds: how long `hold` waits for a job that is alive.
        owner: this process, for others.
        renews: on a thread, from `hold` to `release`.

    Attributes:
        under_way: see `Right`.
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
        self._owner = dict(owner or writer_identity())
        self._renews = renews
        self._record: fmt.LeaseRecord | None = None
        self._older: list[int] = []  # whose files may go
        self._lost: LeaseError | None = None
        self._lock = threading.RLock()  # one write of the file at a time
        self._ended = threading.Event()

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
        with self._lock:
            if self._lost is not None:
                raise self._lost
            if self._record is not None:
                return
            self._take(run, fence)
            self._ended = threading.Event()
            if self._renews:
                threading.Thread(
                    target=self._keep, args=(self._ended,), name="datarax_dist-lease", daemon=True
                ).start()

    def _take(self, run: str, fence: Fence) -> None:
        store, clock = self._store, self._clock
        end = clock.monotonic() + self._wait
        watched: _Seen | None = None
        since = clock.monotonic()
        while True:
            seen = _all(store)
            newest = seen[-1] if seen else None
            now = clock.monotonic()
            moves = False
            if newest != watched:
                moves, watched, since = watched is not None, newest, now
            if newest is None or _is_free(newest, now - since):
                if (mine := self._create(run, newest)) is not None:
                    break
                continue  # another job was faster
            alive = moves or (newest.record is not None and _is_running(newest.record.owner))
            if alive and now >= end:
                raise self._held_by(newest)
            if now == since:
                logger.warning(
                    "%s is held by %s; watching whether it is alive, for up to %.0f s",
                    store.root,
                    newest.owner,
                    newest.record.ttl_seconds if newest.record else _UNREADABLE_SECONDS,
                )
            clock.sleep(_LOOK_SECONDS)
        if newest is not None and not (newest.record is not None and newest.record.released):
            if self._newer(mine.epoch) is not None:
                return self._take(run, fence)
            logger.warning("%s is taken over from %s", store.root, newest.owner)
            # Read once more: what they have announced before they could see our file is there now.
            older = [lease.record for lease in _all(store) if lease.epoch < mine.epoch]
            # When it fails, our file runs out, and who comes next fences them too.
            fence(
                run,
                [record for record in older if record is not None],
                lambda: self._newer(mine.epoch) is None,
            )
            if self._newer(mine.epoch) is not None:
                return self._take(run, fence)
        self._older = [lease.epoch for lease in seen]
        self._record = mine
        return None

    def _create(self, run: str, newest: _Seen | None) -> fmt.LeaseRecord | None:
        """Makes the next epoch's file; returns it if this job, and no other, made it."""
        epoch = 1 if newest is None else newest.epoch + 1
        mine = fmt.LeaseRecord(run, epoch, secrets.token_hex(8), self._owner, self._ttl)
        made = self._store.create(fmt.lease_name(epoch), fmt.dump_lease(mine))
        return mine if made else None

    def _newer(self, epoch: int) -> int | None:
        newest = max(_epochs(self._store), default=0)
        return newest if newest > epoch else None

    def check(self) -> None:
        """Asks the store whether this job still holds the run.

        Raises:
            LeaseError: another one has taken it.
        """
        if self._lost is not None:
            raise self._lost
        if self._record is None:
            raise LeaseError(f"This job does not hold {self._store.root}; nothing was changed.")
        if (newer := self._newer(self._record.epoch)) is None:
            return
        self._lost = self._lost_to(_read(self._store, newer) or _Seen(newer, b"", None))
        logger.error("%s", self._lost)
        raise self._lost

    def raise_if_lost(self) -> None:
        """The same, as far as it is known without asking."""
        if self._lost is not None:
            raise self._lost

    def announce(self, step: int, marker_digest: str) -> None:
        """Says which step is deleted next, and asks whether this job still may.

        Raises:
            LeaseError: it may not.
        """
        with self._lock:
            if self._record is not None:
                # The last few, since objects of this process on one root delete at once.
                deleting = (*self._record.deleting[-7:], (step, marker_digest))
                self._write(dataclasses.replace(self._record, deleting=deleting))
        self.check()

    def renew(self) -> None:
        """Shows that this job is alive.

        Raises:
            LeaseError: another one has taken the run.
        """
        with self._lock:
            self.check()
            assert self._record is not None
            self._write(dataclasses.replace(self._record, renewals=self._record.renewals + 1))
            while self._older:
                self._store.delete(fmt.lease_name(self._older[-1]))
                self._older.pop()

    def _keep(self, ended: threading.Event) -> None:
        while not ended.wait(self._ttl / _RENEWALS):
            try:
                self.renew()
            except LeaseError:
                return  # whoever saves next is told
            except Exception as error:
                logger.warning("the lease of %s could not be renewed: %s", self._store.root, error)

    def _write(self, record: fmt.LeaseRecord) -> None:
        self._store.put(fmt.lease_name(record.epoch), fmt.dump_lease(record))
        self._record = record

    def release(self) -> None:
        """Lets the run go, so that the next job need not wait."""
        self._ended.set()
        with self._lock:
            record = self._record
            if record is None or self._lost is not None:
                return
            try:
                self._write(dataclasses.replace(record, released=True, deleting=()))
            except StorageError as error:
                logger.warning("the lease of %s could not be released: %s", self._store.root, error)
            self._record = None

    def _held_by(self, lease: _Seen) -> LeaseError:
        return LeaseError(
            f"{self._store.root} is held by another job: {lease.owner}, which is alive. Only one"
            " job at a time may write to a run; nothing was written. Stop that one, or wait for it"
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


def _is_free(lease: _Seen, unchanged_seconds: float) -> bool:
    record = lease.record
    if record is None:
        return unchanged_seconds > _UNREADABLE_SECONDS
    # Of this process, and it could not be released: nobody here uses it any more.
    is_over = record.released or record.owner == writer_identity()
    return is_over or is_certainly_dead(record.owner) or unchanged_seconds > record.ttl_seconds


# One lease for each run and process


_borrowed: dict[str, tuple[Lease, int]] = {}
_borrowing = threading.Lock()


def borrow(root: str, make: Callable[[], Lease]) -> Lease:
    """Returns the lease of this process on a root, for one more user of it. It is not held yet."""
    with _borrowing:
        lease, users = _borrowed.get(root) or (make(), 0)
        _borrowed[root] = lease, users + 1
        return lease


def give_back(root: str) -> None:
    """Takes note that one user has ended. When the last one has, the run is let go."""
    with _borrowing:
        lease, users = _borrowed.pop(root, (None, 0))
        if users > 1 and lease is not None:
            _borrowed[root] = lease, users - 1
        elif lease is not None:
            lease.release()


def give_all_back() -> None:
    """For a process that ends."""
    for root in tuple(_borrowed):
        with _borrowing:
            lease, _ = _borrowed.pop(root)
        lease.release()
