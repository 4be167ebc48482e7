"""What waits while more is read: it is copied when its loader may write into its memory again."""

from __future__ import annotations

import collections
import logging
from collections.abc import Iterable
from typing import Any

from datarax_dist.data.batches import MOST_DEPTH, MOST_PARTS, MOST_WATCHED, Parts, overlap
from datarax_dist.errors import InvalidArgumentError

__all__ = ["Together", "Waiting"]

logger = logging.getLogger("datarax_dist")

_MOST_SHAPES = 10_000  # that are counted; so many batches had memory of their own by then


class Waiting:
    """Sees whether a loader writes its batches into memory that it uses again. What waits is copied
    then, and until that is known: the first ones of each shape, as it may have a buffer for each.

    A loader that does so later only is found out when it gives a batch in the memory of one that
    waits as it is. When that holds something else by then, it is lost.

    Attributes:
        is_shared: whether it does. When that is found, those that wait must be `copied`.
    """

    def __init__(self, depth: int, name: str, hint: str) -> None:
        """While one is read, `depth - 1` wait. `hint` says what to do when that cannot be."""
        self._depth, self._name, self._hint = depth, name, hint
        self._left = depth + 1  # of the first ones, which are looked at as a whole
        self._counts: dict[Any, int] = {}
        # The last ones, and whether they wait as they are. While these live, their memory is not
        # given to others.
        self._last: collections.deque[tuple[Parts, bool]] = collections.deque(maxlen=depth)
        self._batch: Any = None
        self._parts: Parts | None = None  # of the newest one, if it is to wait as it is
        self.is_shared = False
        self._told_more = self._told_failed = False

    def given(self, batch: Any) -> Any:
        """Returns a batch that was just read, or a copy of it.

        Raises:
            InvalidArgumentError: it was written over one that waits.
        """
        if self._depth < 2:
            return batch
        is_whole = self.is_shared or self._left > 0
        self._left -= self._left > 0
        parts = Parts(batch, MOST_PARTS if is_whole else MOST_WATCHED)
        if not self.is_shared:
            self._look(parts)
        if not (self.is_shared or self._is_new(parts.shapes)):
            self._batch, self._parts = batch, parts
            return batch
        if parts.has_more and not is_whole:
            parts = Parts(batch)
        if not self.is_shared:
            self._last.append((parts, False))
        return self._copied(parts)

    def waits(self, placed: Any) -> None:
        """Tells it what waits: what was made of the batch that was given last."""
        if self._parts is None:
            return
        parts = self._parts if placed is self._batch else Parts(placed, MOST_WATCHED)
        parts.sample()
        self._last.append((parts, True))
        self._batch = self._parts = None

    def _is_new(self, shapes: Any) -> bool:
        if shapes not in self._counts and len(self._counts) == _MOST_SHAPES:
            return False
        self._counts[shapes] = count = self._counts.get(shapes, 0) + 1
        return count <= self._depth + 1

    def _look(self, parts: Parts) -> None:
        before = [place for other, _ in self._last for place in other.places()]
        # The first of them was handed out, and is its user's.
        self._compare([parts.places(), before], list(self._last)[1 - self._depth :])

    def _compare(
        self, places: Iterable[list[tuple[int, int]]], waiting: Iterable[tuple[Parts, bool]]
    ) -> None:
        if not overlap(places):
            return
        uncopied = [parts for parts, is_as_read in waiting if is_as_read]
        if any(parts.has_changed() for parts in uncopied):
            raise self._lost()
        if uncopied:
            logger.warning(
                "%s: batches have memory in common, of which the first ones had none. What is in it"
                " seems to be as it was, where it was looked at; all that wait are copied from now"
                " on. If the loader does write into it again, %s.",
                self._name,
                self._hint,
            )
        self.is_shared = True
        self._last.clear()
        self._counts.clear()

    def _lost(self) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"{self._name}: a loader has written over what it gave before, which was not used yet."
            " In its first batches nothing was written over, so this one was not copied. Nothing"
            f" wrong was handed out. Let it give new arrays each time, or {self._hint}."
        )

    def left(self, count: int) -> None:
        """Tells it how many wait: what was handed out as it was is its user's."""
        first = len(self._last) - count
        kept = [pair for n, pair in enumerate(self._last) if n >= first or not pair[1]]
        self._last = collections.deque(kept if count else (), self._depth)

    def copied(self, waiting: Any) -> Any:
        """Returns a copy of what waits: it may be written over from now on."""
        return self._copied(Parts(waiting))

    def _copied(self, parts: Parts) -> Any:
        if parts.has_more and not self._told_more:
            self._told_more = True
            logger.warning(
                "%s: a batch has more than %d parts, or is nested more than %d deep. The further"
                " ones are not copied while they wait: if the loader writes into them again, %s.",
                self._name,
                MOST_PARTS,
                MOST_DEPTH,
                self._hint,
            )
        copy = parts.copied()
        if parts.has_failed and self.is_shared and not self._told_failed:
            self._told_failed = True
            logger.warning(
                "%s: a part of a batch cannot be copied while it waits, and the loader writes into"
                " its memory again. Let it give new objects each time, or %s.",
                self._name,
                self._hint,
            )
        return copy


class Together(Waiting):
    """Sees the same of the parts of one batch, which wait for one another."""

    def taken(self, part: Any) -> Any:
        """Returns one that was just read, or a copy of it."""
        found = self.given(part)
        self.waits(found)
        return found

    def joined(self) -> None:
        """Tells it that the last part was taken, and none waits any more.

        Raises:
            InvalidArgumentError: one of them was written over another one.
        """
        parts = list(self._last)
        self._last.clear()
        self._compare([one.places(is_known=False) for one, _ in parts], parts)
        if self.is_shared or not overlap(one.places() for one, _ in parts):
            return
        # Rows may well have a dict in common that stays as it is: not all is copied for that.
        changed = [is_as_read for one, is_as_read in parts if one.has_changed()]
        if any(changed):
            raise self._lost()
        self.is_shared = bool(changed)

    def _look(self, parts: Parts) -> None:
        """All are compared at once: there may be hundreds."""
        parts.sample()
