"""Iterators with a position: V logical shards of a loader, prefetch that keeps positions right, and
position by counting. Beneath them `Source`, what positions are read from and set on.
"""

from __future__ import annotations

import abc
import collections
import json
import logging
import operator
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from datarax_dist import codec
from datarax_dist import format as fmt
from datarax_dist.data import batches as batches_io
from datarax_dist.data.adapters import (
    DataAdapter,
    describe_loader,
    open_loader,
    register_adapter,
)
from datarax_dist.data.memory import Memory, Position, remembered_for_ever, remembered_with
from datarax_dist.data.ownership import Ownership, own_by_modulo, own_by_sharding, this_host
from datarax_dist.data.waiting import Together, Waiting
from datarax_dist.errors import (
    InvalidArgumentError,
    PositionError,
    UnsupportedLeafError,
    describe,
)

__all__ = [
    "Loader",
    "Replay",
    "Shards",
    "Snapshot",
    "Source",
    "Tracked",
    "replay",
    "shards",
    "tracked",
]

logger = logging.getLogger("datarax_dist")

_PROGRESS_SECONDS = 10.0
_SECOND_EPOCH = (
    "This epoch has ended, and the iterator goes through one only. Make a new one for the next"
    ' epoch, or let the loader repeat its data (docs/data.md, "Several epochs").'
)


_MOVING = (
    "The next batch is being made, and some data shards have moved on, others have not: this call"
    " came from a signal handler. Let the handler set a flag, and save after the step; or take the"
    " batches from datarax_dist.data.tracked(loader, 0), which has the position before that batch."
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The positions of a source, and what belongs to them, of one moment.

    Attributes:
        positions: those that this host reads.
        batches: how many were handed out over all runs; None when nobody counts.
        rows: how many records each data shard gives to a batch; None when nobody knows.
    """

    positions: dict[int, Position]
    batches: int | None
    rows: int | None


class Source(abc.ABC):
    """Something with the positions of one or more data shards; a data item of a step.

    Attributes:
        kind: "global", "shards" or "host".
        count: the number of positions: V of shards, otherwise 1.
        failure: why it has no position any more; None while it has one.
        outer: what was put around it, and has the position; None where nothing was.
    """

    kind: str
    count: int
    failure: str | None = None
    outer: str | None = None

    @abc.abstractmethod
    def ownership(self) -> Ownership:
        """Returns which positions this host reads, and which it writes."""

    @abc.abstractmethod
    def snapshot(self) -> Snapshot:
        """Returns the positions that this host reads, and what belongs to them. Later batches do
        not change them.
        """

    @abc.abstractmethod
    def apply(
        self, positions: Mapping[int, Position], batches: int | None, rows: int | None
    ) -> None:
        """Sets the positions; `batches` were handed out before them, over all runs, with `rows`
        records from each data shard.
        """

    @abc.abstractmethod
    def refusal(self) -> str | None:
        """Says why no position can be set any more, or None."""

    @abc.abstractmethod
    def batches(self) -> int | None:
        """Returns how many batches were handed out over all runs; None when nobody counts."""

    def poison(self, failure: str) -> None:
        """Nothing can be taken or saved from now on."""
        self.failure = failure

    def fingerprint(self) -> dict[str, Any]:
        """Returns what must be the same on restore, for the item as a whole."""
        return {}

    @abc.abstractmethod
    def loader_fingerprints(self) -> dict[int, dict[str, Any]]:
        """Returns what must be the same on restore, for each position that this host reads."""


def _broken(what: str, error: BaseException) -> str:
    return (
        f"{what} failed with {describe(error)}, and where it stands now is not known. Go on from a"
        " committed step: make the loader anew, and restore."
    )


def _used(handed: int, ahead: int = 0, *, ended: bool = False) -> str:
    return (
        f"it has handed out {handed} batches"
        + (f" and read {ahead} ahead" if ahead else "")
        + (" and ended" if ended else "")
    )


def _encode(state: Any) -> codec.Encoded:
    try:
        return codec.pack(state)
    except codec.EncodeError as error:
        raise UnsupportedLeafError(
            f"The position of a loader cannot be written: {error}", path=error.path
        ) from None


class Loader(Source):
    """One loader as it is: its adapter, and what was restored into it."""

    count = 1

    def __init__(self, adapter: DataAdapter, memory: Memory | None = None) -> None:
        self._mine = memory is None  # it is iterated through this object alone
        self._adapter = adapter
        self.failure = None if memory is None else memory.failure
        self.kind = adapter.kind
        self._memory = memory or Memory()
        self._iterator: Iterator[Any] | None = None
        self._handed = 0
        self._ended = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._ended:
            raise StopIteration
        if self._iterator is None:
            self._iterator = self._begin()
        try:
            batch = next(self._iterator)
        except StopIteration:
            self._ended = True
            raise
        self._handed += 1
        return batch

    def _begin(self) -> Iterator[Any]:
        adapter, restored = self._adapter, self._memory.restored
        if restored is None or not hasattr(adapter.loader, "__next__"):
            return iter(adapter.iterate())
        before = _encode(adapter.get_state())
        iterator = iter(adapter.iterate())
        if iterator is adapter.loader and _encode(adapter.get_state()) != before:
            # Its `__iter__` begins an epoch. It goes on where it was restored to.
            adapter.set_state(codec.unpack(restored.state))
        return iterator

    def ownership(self) -> Ownership:
        return Ownership((0,), frozenset((0,)))

    def snapshot(self) -> Snapshot:
        return Snapshot({0: self.position()}, None, None)

    def position(self) -> Position:
        """Returns where it is. As long as nothing was taken since a restore, that is exactly what
        was restored: some loaders forget it until their first batch.
        """
        if self.failure is not None:
            raise PositionError(self.failure)
        if self._memory.restored is not None and self._untouched():
            return self._memory.restored
        return Position(_encode(self._adapter.get_state()), self._ended)

    def _untouched(self) -> bool:
        """Whether nothing was taken since a restore; for a loader that is iterated elsewhere, as
        far as it says so itself.
        """
        if self._handed:
            return False
        if self._mine:
            return True
        if self._adapter.starts_when_read:
            return self._adapter.started() is None
        return self._memory.restored == Position(_encode(self._adapter.get_state()))

    def apply(self, positions: Mapping[int, Position], batches: int | None, rows: Any) -> None:
        [position] = positions.values()
        self.set_position(position)

    def set_position(self, position: Position) -> None:
        adapter = self._adapter
        peek = not (self._mine or adapter.starts_when_read)
        before = _encode(adapter.get_state()) if peek else None
        adapter.set_state(codec.unpack(position.state))
        self._memory.restored, self._ended = position, position.ended
        if peek and position.state != before == _encode(adapter.get_state()):
            raise PositionError(
                f"A {type(adapter.loader).__qualname__} does not say where it was set to until its"
                " first batch is taken, so nobody could tell whether it was used since. Restore `it"
                " = datarax_dist.data.tracked(loader, 0)` instead, and take the batches from that."
            )

    def poison(self, failure: str) -> None:
        self.failure = self._memory.failure = failure
        if not self._mine:
            remembered_for_ever(self._adapter.loader, self._memory)

    def refusal(self) -> str | None:
        if self.failure is not None:
            return self.failure
        if self._handed:
            return _used(self._handed)
        if self._memory.restored is not None and self._untouched():
            return None  # set, and not used since
        return self._adapter.started()

    def batches(self) -> int | None:
        return None

    def loader_fingerprints(self) -> dict[int, dict[str, Any]]:
        if self._memory.described is None:  # it costs more than the position does
            self._memory.described = describe_loader(self._adapter)
        return {0: dict(self._memory.described)}


def _open(loader: Any, outer: str) -> Loader:
    """Returns a loader that a factory or the user made, ready to be iterated here; from now on the
    position of its batches is that of `outer`.
    """
    if isinstance(loader, Source):
        kind = type(loader).__name__.lower()
        raise InvalidArgumentError(
            f"The loader of a data shard cannot be {kind}(...) itself. Put it around the whole,"
            " tracked(shards(factory, V), depth), and let the factory return the plain loader."
        )
    adapter = open_loader(loader)
    source = Loader(adapter)
    if not adapter.counts:  # one that counts has no position of its own to be taken for this one
        for one in (loader, adapter.loader):
            memory = remembered_with(source, one)
            memory.outer = outer
            source.failure = source.failure or memory.failure
    return source


class Shards(Source):
    """V logical shards of a loader; see `shards`."""

    kind = "shards"

    def __init__(
        self,
        factory: Callable[[int, int], Any],
        count: int,
        *,
        fingerprint: Any = None,
        sharding: Any = None,
        batches: int | None = None,
    ) -> None:
        if not callable(factory):
            raise InvalidArgumentError(
                "shards() needs a function of (shard, count) that makes the loader of a shard, not"
                f" a {type(factory).__name__}."
            )
        self.count = _at_least("shards() needs a number of shards", count, 1)
        if batches is not None:
            batches = _at_least("shards(batches=...) needs a number of batches", batches, 0)
        self._factory = factory
        self._fingerprint = _checked_fingerprint(fingerprint)
        self._sharding = sharding
        self._limit = batches
        self._owned: Ownership | None = None
        self._loaders: dict[int, Loader] | None = None
        self._memory: Together | None = None
        self._handed = 0
        self._before = 0
        self._rows: int | None = None
        self._ended = False
        self._told_end = False
        self._lock = threading.RLock()  # a batch and its position belong together
        self._moving = False  # of what this thread does, a signal handler sees the midst

    def ownership(self) -> Ownership:
        if self._owned is None:
            host, hosts = this_host()
            self._owned = (
                own_by_modulo(self.count, host, hosts)
                if self._sharding is None
                else own_by_sharding(self.count, self._sharding, host)
            )
        return self._owned

    def owned(self) -> list[int]:
        """Returns the shards of this host, in the order of its rows.

        Raises:
            PositionError: V cannot be divided over the hosts.
        """
        return list(self.ownership().reads)

    def _opened(self) -> dict[int, Loader]:
        if self._loaders is None:
            self._loaders = {
                shard: _open(self._factory(shard, self.count), "shards(...)")
                for shard in self.ownership().reads
            }
            self._memory = Together(
                len(self._loaders), "shards", "let each data shard have memory of its own"
            )
        return self._loaders

    def __iter__(self) -> Shards:
        if self._told_end:
            raise PositionError(_SECOND_EPOCH)
        return self

    def __next__(self) -> Any:
        with self._lock:
            self._check_still()
            self._moving = True
            try:
                return self._next()
            finally:
                self._moving = False

    def _check_still(self) -> None:
        if self._moving:
            raise PositionError(_MOVING)

    def _next(self) -> Any:
        if self.failure is not None:
            raise PositionError(self.failure)
        if self._ended or (self._limit is not None and self._before + self._handed >= self._limit):
            self._told_end = True
            raise StopIteration
        loaders = self._opened()
        if not loaders:
            raise PositionError(
                "The devices of this host hold no rows of shards(sharding=...): its mesh has none"
                " of them. Take batches on the hosts of the mesh only."
            )
        memory, ended = self._memory, list[int]()
        assert memory is not None
        joining = batches_io.Joining(len(loaders), memory.taken)
        try:
            for shard, loader in loaders.items():
                try:
                    part = next(loader)
                except StopIteration:
                    ended.append(shard)
                else:
                    joining.add(shard, part)
            if not ended:
                hint = (
                    f"end the epoch before it, shards(..., batches={self._before + self._handed})."
                )
                self._rows = joining.check_rows(self._rows, hint)
                batch = joining.joined() if len(loaders) > 1 else part
                memory.joined()
                self._handed += 1
        except BaseException as error:
            # Some shards have moved on, others have not; and an iterator that has failed may well
            # say that it has ended when it is asked again.
            self.failure = _broken("A data shard", error)
            raise
        if ended:
            self._end(ended)
            self._told_end = True
            raise StopIteration
        return batch

    def _end(self, ended: list[int]) -> None:
        """Ends the epoch, when all hosts will end it here."""
        handed = self._before + self._handed
        others = [shard for shard in self.ownership().reads if shard not in ended]
        if self._limit is not None:
            self.failure = (
                f"Data shard {ended[0]} ended after {handed} batches, of the {self._limit} that"
                " shards(batches=...) promises. Make `batches` smaller."
            )
        elif others:
            self.failure = (
                f"Data shard {ended[0]} ended after {handed} batches, data shard {others[0]} has"
                " more. With other hosts, some would take a step that others do not, and wait for"
                f" ever. Give shards(..., batches={handed}), which ends all of them there, or make"
                " the shards equally long."
            )
        if self.failure is not None:
            raise PositionError(self.failure)
        self._ended = True

    def snapshot(self) -> Snapshot:
        with self._lock:
            if self.failure is not None:
                raise PositionError(self.failure)
            self._check_still()
            found = {shard: loader.position() for shard, loader in self._opened().items()}
            return Snapshot(found, self.batches(), self._rows)

    def apply(
        self, positions: Mapping[int, Position], batches: int | None, rows: int | None
    ) -> None:
        with self._lock:
            self._check_still()
            self._moving = True
            try:
                for shard, position in positions.items():
                    self._opened()[shard].set_position(position)
                self._before, self._handed, self._rows = batches or 0, 0, rows
            finally:
                self._moving = False

    def refusal(self) -> str | None:
        with self._lock:
            if self.failure is not None:
                return self.failure
            if self._moving:
                return "its next batch is being made"
            if self._handed or self._told_end:
                return _used(self._handed, ended=self._told_end)
            for shard, loader in self._opened().items():
                if reason := loader.refusal():
                    return f"data shard {shard}: {reason}"
            return None

    def batches(self) -> int:
        return self._before + self._handed

    def fingerprint(self) -> dict[str, Any]:
        given = self._fingerprint
        found = {"batches": self._limit} if self._limit is not None else {}
        if isinstance(given, Mapping):
            return {**found, **{f"user.{key}": value for key, value in given.items()}}
        return found if given is None else {**found, "user": given}

    def loader_fingerprints(self) -> dict[int, dict[str, Any]]:
        found = {}
        for shard, loader in self._opened().items():
            [(_, described)] = loader.loader_fingerprints().items()
            if isinstance(size := described.pop("batch", None), int):
                described["global_batch"] = size * self.count
            found[shard] = described
        return found


def shards(
    factory: Callable[[int, int], Any],
    count: int,
    *,
    fingerprint: Any = None,
    sharding: Any = None,
    batches: int | None = None,
) -> Shards:
    """Returns `count` logical shards of a loader, as one iterator of this host's part of each
    global batch. Any number of hosts that divides `count` can go on where another one stopped.

    Host h owns the shards with `s % hosts == h`; with `sharding`, those whose rows its devices
    hold. Its part of a batch is the rows of its shards, concatenated in the order of the shards,
    leaf by leaf. Dicts and tuples are structure, and a list has one item for each record. Every
    batch of a shard has the same number of records.

    Args:
        factory: `factory(shard, count)` returns a loader of that shard: of every `count`-th record,
            say. It or its iterator has a position; see `adapt`. What it yields must depend on
            `shard` and `count` alone, never on the host.
        count: V, fixed for the run: the largest number of hosts it will ever have, or a multiple of
            it.
        fingerprint: JSON that must be the same on restore, the name of the data set, say. A dict is
            compared key by key.
        sharding: the `NamedSharding` of the global batch. Hosts whose devices hold the same rows
            then get the same rows (tensor parallelism over hosts), and the rows of the global batch
            have the same order on any number of hosts.
        batches: the number of batches of an epoch. Needed when the shards are not equally long:
            all hosts end there.

    >>> import numpy as np
    >>> class Count:
    ...     def __init__(self, shard, count): self.next = shard; self.step = count
    ...     def __iter__(self): return self
    ...     def __next__(self): self.next += self.step; return np.asarray([self.next - self.step])
    ...     def get_state(self): return self.next
    ...     def set_state(self, state): self.next = state
    >>> whole = shards(Count, 4)
    >>> next(whole).tolist(), next(whole).tolist()
    ([0, 1, 2, 3], [4, 5, 6, 7])
    """
    return Shards(factory, count, fingerprint=fingerprint, sharding=sharding, batches=batches)


class Tracked(Source):
    """An iterator that reads ahead; see `tracked`."""

    def __init__(self, loader: Any, depth: int, place: Callable[[Any], Any] | None) -> None:
        self._depth = _at_least("tracked() needs a depth", depth, 0)
        if place is not None and not callable(place):
            raise InvalidArgumentError(
                f"tracked(place=...) is a function of a batch, not a {type(place).__name__}."
            )
        whole = isinstance(loader, Source)
        self._source: Any = loader if whole else _open(loader, "tracked(...)")
        if whole:
            self._source.outer = "tracked(...)"
        self.kind = self._source.kind
        self.count = self._source.count
        self._place = place
        self._memory = Waiting(
            self._depth, "tracked", "read 0 or 1 batches ahead, or let `place` copy them"
        )
        self._lock = threading.RLock()
        self._told_end = False
        self._waiting: collections.deque[tuple[Any, Snapshot]] = collections.deque()
        self._stopped: BaseException | None = None
        self._at: Snapshot | None = None  # replaced as a whole: a signal handler may come any time
        self._begun = False
        self._handed = 0

    def __iter__(self) -> Tracked:
        if self._told_end:
            raise PositionError(_SECOND_EPOCH)
        return self

    def __next__(self) -> Any:
        with self._lock:
            if self.failure is not None:
                raise PositionError(self.failure)
            if self._at is None:
                self._at = self.snapshot()
            self._begun = True
            while self._stopped is None and len(self._waiting) < max(self._depth, 1):
                self._pull()
            if not self._waiting:
                assert self._stopped is not None
                self._told_end = isinstance(self._stopped, StopIteration)
                raise self._stopped
            batch, at = self._waiting[0]
            now = Snapshot(at.positions, self.batches() + 1, at.rows)
            try:
                self._waiting.popleft()
                self._at = now
            except BaseException as error:  # of a signal handler: the batch is in nobody's hands
                self._waiting.clear()
                self._stopped = PositionError(_broken("Taking a batch", error))
                raise
            self._memory.left(len(self._waiting))
            self._handed += 1
            return batch

    def _pull(self) -> None:
        """Reads one batch ahead. What stops it is raised when its turn comes."""
        try:
            batch, was_shared = next(self._source), self._memory.is_shared
            try:
                batch = self._memory.given(batch)
                if self._memory.is_shared and not was_shared:
                    waiting = [(self._memory.copied(one), at) for one, at in self._waiting]
                    self._waiting = collections.deque(waiting)
            except InvalidArgumentError:  # of those that wait, one is not what it was
                self._waiting.clear()
                raise
            at = self._source.snapshot()
            placed = self._placed(batch)
            self._memory.waits(placed)
            self._waiting.append((placed, at))
        except Exception as error:
            self._stopped = error
        except BaseException as error:
            self._stopped = PositionError(_broken("Reading ahead", error))
            raise

    def _placed(self, batch: Any) -> Any:
        if self._place is None:
            return batch
        try:
            return self._place(batch)
        except StopIteration as error:  # it would look like the end of the epoch
            raise InvalidArgumentError("tracked(place=...) raised StopIteration.") from error

    def ownership(self) -> Ownership:
        owned: Ownership = self._source.ownership()
        return owned

    def snapshot(self) -> Snapshot:
        with self._lock:
            if self.failure is not None:
                raise PositionError(self.failure)
            if self._at is not None:
                return self._at
            found: Snapshot = self._source.snapshot()
            return Snapshot(found.positions, found.batches or 0, found.rows)

    def apply(
        self, positions: Mapping[int, Position], batches: int | None, rows: int | None
    ) -> None:
        with self._lock:
            self._source.apply(positions, batches, rows)
            self._at = Snapshot(dict(positions), batches or 0, rows)

    def refusal(self) -> str | None:
        if self.failure is not None:
            return self.failure
        if self._begun:
            return _used(self._handed, len(self._waiting), ended=self._stopped is not None)
        reason: str | None = self._source.refusal()
        return reason

    def batches(self) -> int:
        at = self._at
        return (self._source.batches() if at is None else at.batches) or 0

    def fingerprint(self) -> dict[str, Any]:
        found: dict[str, Any] = self._source.fingerprint()
        return found

    def loader_fingerprints(self) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = self._source.loader_fingerprints()
        return found


def tracked(loader: Any, depth: int, *, place: Callable[[Any], Any] | None = None) -> Tracked:
    """Returns an iterator that reads `depth` batches ahead, and whose position is that of the last
    batch it handed out, never of one that it has read ahead.

    It is also how a loader is given that cannot tell by itself how far it was used: Mosaic's
    `StreamingDataset`, Keras's `PyDataset`, any sequence of batches (with a depth of 0).

    Args:
        loader: `shards(...)`, or any loader that `adapt` takes.
        depth: how many batches are held, placed on devices; 0 or 1 reads none ahead.
        place: called with each batch as soon as it is read, on this thread:
            `lambda batch: jax.make_array_from_process_local_data(sharding, batch)`, say, which
            starts the transfer and returns at once.

    Raises:
        PositionError: the loader has no position.

    >>> batches = tracked([10, 20, 30, 40], depth=2)
    >>> next(batches), next(batches)
    (10, 20)
    >>> batches.batches()
    2
    """
    return Tracked(loader, depth, place)


class Replay:
    """An iterator whose position is how many batches it has handed out; see `replay`."""

    def __init__(self, factory: Callable[[], Iterable[Any]]) -> None:
        if not callable(factory):
            raise InvalidArgumentError(
                "replay() needs a function that makes the iterator anew, replay(lambda:"
                f" batches(...)), not the {type(factory).__name__} itself."
            )
        self._factory = factory
        self._iterator: Iterator[Any] | None = None
        self._at = 0, ""  # replaced as a whole: a signal handler may come any time
        self._failure: str | None = None
        self._told_end = False

    def __iter__(self) -> Replay:
        if self._told_end:
            raise PositionError(_SECOND_EPOCH)
        return self

    def __next__(self) -> Any:
        if self._failure is not None:
            raise PositionError(self._failure)
        try:
            if self._iterator is None:
                self._iterator = iter(self._factory())
            batch = next(self._iterator)
            self._at = self._at[0] + 1, _digest(batch)
        except StopIteration:
            self._told_end = True
            raise
        except BaseException as error:  # a generator that has failed would say that it has ended
            self._failure = _broken("The iterator of replay()", error)
            raise
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the position: how many batches, and a digest of the last one."""
        batches, last = self._at
        return {"batches": batches, "last": last}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Makes a new iterator and skips to the position; that takes as long as reading it.

        Raises:
            PositionError: the iterator ends earlier, or does not give the same batches again.
        """
        wanted = state["batches"]
        if type(wanted) is not int or wanted < 0:
            raise PositionError(f"replay() cannot go to {wanted!r:.40} batches.")
        iterator = iter(self._factory())
        batch: Any = None
        told = time.monotonic()
        for done in range(wanted):
            try:
                batch = next(iterator)
            except StopIteration:
                raise PositionError(
                    f"replay() was to skip {wanted} batches; the factory's iterator ended after"
                    f" {done}."
                ) from None
            if time.monotonic() - told > _PROGRESS_SECONDS:
                told = time.monotonic()
                logger.info("replay: %d of %d batches skipped", done + 1, wanted)
        if wanted and (last := _digest(batch)) != state["last"] and state["last"] and last:
            raise PositionError(
                f"replay() came to another batch {wanted - 1} than the one that was handed out"
                " before: the factory's iterator does not give the same batches again. Give it a"
                " fixed seed, and nothing that depends on time or on the host."
            )
        self._iterator, self._at = iterator, (wanted, state["last"])
        self._failure, self._told_end = None, False


class _ReplayAdapter(DataAdapter):
    def started(self) -> str | None:
        at = self.loader.get_state()["batches"]
        return f"it has handed out {at} batches" if at else None


register_adapter(f"{Replay.__module__}.{Replay.__qualname__}", _ReplayAdapter)


def replay(factory: Callable[[], Iterable[Any]]) -> Replay:
    """Returns an iterator over `factory()` whose position is the number of batches it has handed
    out. A restore makes the iterator anew, reads that many batches and drops them.

    For what cannot be set back, generators above all. What it yields must be the same each time;
    that is checked, with a digest of the last batch before the position (of arrays, numbers and
    texts).

    Args:
        factory: makes the iterator, from its beginning.

    >>> numbers = replay(lambda: (n * n for n in range(9)))
    >>> next(numbers), next(numbers)
    (0, 1)
    >>> again = replay(lambda: (n * n for n in range(9)))
    >>> again.set_state(numbers.get_state())
    >>> next(again)
    4
    """
    return Replay(factory)


def _at_least(what: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise InvalidArgumentError(f"{what}, a whole number of {least} or more, not {value!r}.")
    return number


def _checked_fingerprint(given: Any) -> Any:
    """Returns a fingerprint when it is JSON, so that it can be compared."""
    try:
        if json.loads(json.dumps(given, allow_nan=False)) == given:
            return given
    except (TypeError, ValueError):
        pass
    raise InvalidArgumentError(
        "A fingerprint is JSON: texts, whole and finite numbers, true, false, None, lists and dicts"
        f" of them, not {given!r:.200}."
    )


def _digest(batch: Any) -> str:
    """Returns a digest of a batch; an empty one when it has anything but arrays and numbers, or
    JAX cannot look into it.
    """
    import jax

    from datarax_dist.trees import check_depth

    try:
        check_depth(batch)
        leaves = [codec.pack(leaf) for leaf in jax.tree.leaves(batch)]
    except MemoryError:  # with a digest or without one, as the moment has it
        raise
    except Exception:  # of a class of the user's, any
        return ""
    crc = 0
    for leaf in leaves:
        crc = fmt.crc32c(fmt.dumps(leaf.value), crc)
        for blob in leaf.blobs:
            crc = fmt.crc32c(blob, crc)
    return fmt.crc_text(crc)
