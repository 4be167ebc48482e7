"""What a batch is made of: its rows, leaf by leaf; the rows of several batches in one; copies.

Dicts and tuples are structure, arrays have a row for each record along their first axis, and a list
is a column with one item for each record. (A whole batch that is a list of arrays is structure.)
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import itertools
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from datarax_dist import codec
from datarax_dist.errors import (
    InvalidArgumentError,
    PositionError,
    UnsupportedLeafError,
    describe,
)

__all__ = ["Joining", "Parts", "leaves_with_names", "overlap", "rows_of"]


def _flatten(batch: Any) -> tuple[list[tuple[str, Any]], Any]:
    import jax

    from datarax_dist.trees import check_depth

    whole = isinstance(batch, list) and bool(batch) and all(hasattr(x, "shape") for x in batch)
    batch = list.copy(batch) if whole else batch  # a class of the user's is no structure for JAX

    def is_leaf(part: Any) -> bool:
        return isinstance(part, list) and not (whole and part is batch)

    try:
        check_depth(batch, is_leaf)
        found, structure = jax.tree_util.tree_flatten_with_path(batch, is_leaf=is_leaf)
    except UnsupportedLeafError:
        raise InvalidArgumentError(
            "A batch is nested too deep for its rows to be found, or holds itself. Let it be a few"
            " dicts and tuples of arrays and lists."
        ) from None
    except (ValueError, TypeError) as error:
        raise InvalidArgumentError(
            "The rows of a batch cannot be found, as JAX cannot look into it"
            f" ({describe(error)}). The keys of a dict must have an order: let all be texts."
        ) from None
    named = [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in found]
    return named, structure


def leaves_with_names(batch: Any) -> list[tuple[str, Any]]:
    """Returns the leaves of a batch with their places, `a.b`; a list is one leaf.

    Raises:
        InvalidArgumentError: JAX cannot look into it.
    """
    return _flatten(batch)[0]


def _length(leaf: Any) -> int | None:
    """Returns the number of rows of a leaf; None for what is no array and no list."""
    if isinstance(leaf, list):
        return len(leaf)
    shape = getattr(leaf, "shape", None)
    return int(shape[0]) if shape else None


def rows_of(batch: Any) -> int:
    """Returns the number of records in a batch.

    Raises:
        InvalidArgumentError: its leaves have different numbers, or none has an axis of records.
    """
    return _rows(leaves_with_names(batch))


def _rows(leaves: list[tuple[str, Any]]) -> int:
    lengths = {name: _length(leaf) for name, leaf in leaves}
    found = {name: length for name, length in lengths.items() if length is not None}
    if not found:
        raise InvalidArgumentError(
            "A batch has nothing with an axis of records. Each loader must give batches: batch()"
            " it, with 1 if need be."
        )
    if len(set(found.values())) > 1:
        told = ", ".join(f"{name or 'the batch'}: {length}" for name, length in found.items())
        raise InvalidArgumentError(
            f"The parts of a batch have different numbers of records ({told}). An array has one row"
            " along its first axis, a list one item, for each record; make anything else a tuple."
        )
    return next(iter(found.values()))


class Joining:
    """The rows of the batches of several data shards, leaf by leaf, in the order they are added.

    Those of an array are copied to their place at once: the loader of the next shard may write into
    the same memory. One batch alone is left as it is.
    """

    def __init__(self, count: int, waiting: Callable[[Any], Any]) -> None:
        """`waiting` is told of what is not copied, and returns it or a copy."""
        self._count, self._waiting = count, waiting
        self._parts: dict[int, tuple[list[tuple[str, Any]], Any]] = {}
        self._whole: list[Any] = []  # of each leaf of the first part, room for all rows

    def add(self, shard: int, part: Any) -> None:
        """Takes the batch of the next shard."""
        named, structure = _flatten(part)
        if self._count == 1:
            self._parts[shard] = named, structure
            return
        if not self._parts:
            self._whole = [_room(name, leaf, self._count) for name, leaf in named]
        kept = [self._kept(number, *pair) for number, pair in enumerate(named)]
        others = [number for number, leaf in enumerate(kept) if leaf is None]
        if others:
            leaves = self._waiting(tuple(named[number][1] for number in others))
            for number, leaf in zip(others, leaves, strict=True):
                kept[number] = leaf
        leaves = [(name, leaf) for (name, _), leaf in zip(named, kept, strict=True)]
        self._parts[shard] = leaves, structure

    def _kept(self, number: int, name: str, leaf: Any) -> Any:
        """Returns what does not change any more; None where that is more than to copy an array."""
        import jax

        if isinstance(leaf, jax.Array) or issubclass(type(leaf), _SCALARS):
            return leaf
        if isinstance(leaf, list) and set(map(type, leaf)) <= _PLAIN:
            return list.copy(leaf)
        if isinstance(leaf, list) or _is_tensor(leaf) or _length(leaf) is None:
            return None
        array = _array(name, leaf)
        if array.dtype.hasobject:
            return None
        whole = self._whole[number] if number < len(self._whole) else None
        if whole is None or (whole.dtype, whole.shape[1:]) != (array.dtype, array.shape[1:]):
            return array.copy()
        if len(array) * self._count != len(whole):
            return array.copy()
        begin = len(self._parts) * len(array)
        place = whole[begin : begin + len(array)]
        place[...] = array
        return place

    def check_rows(self, expected: int | None, limit_hint: str) -> int:
        """Returns the number of records in the batch of each data shard, which is always the same.

        Raises:
            PositionError: a shard has another number; hosts would have arrays of different shapes.
        """
        for shard, (leaves, _) in self._parts.items():
            rows = _rows(leaves)
            expected = rows if expected is None else expected
            if rows != expected:
                raise PositionError(
                    f"Data shard {shard} gave a batch of {rows} records; before, there were"
                    f" {expected}. Hosts with other shards would see another number, and arrays of"
                    " other shapes. Let the loader drop the remainder (drop_remainder=True), or"
                    f" {limit_hint}"
                )
        assert expected is not None
        return expected

    def joined(self) -> Any:
        """Returns the rows of all.

        Raises:
            InvalidArgumentError: they cannot be joined; it names the shard and the leaf.
        """
        import jax

        first, *_ = self._parts
        _, structure = self._parts[first]
        for shard, (_, other) in self._parts.items():
            if other != structure:
                raise InvalidArgumentError(
                    f"The batches of data shards {first} and {shard} have other parts: {structure}"
                    f" and {other}."
                )
        columns = zip(*(leaves for leaves, _ in self._parts.values()), strict=True)
        joined = [
            whole
            if whole is not None and all(getattr(leaf, "base", None) is whole for _, leaf in column)
            else _join_leaf(column[0][0], [leaf for _, leaf in column])
            for whole, column in zip(self._whole, columns, strict=True)
        ]
        return jax.tree.unflatten(structure, joined)


def _is_tensor(leaf: Any) -> bool:
    """Whether it is one of torch."""
    return hasattr(type(leaf), "untyped_storage") and hasattr(type(leaf), "clone")


def _array(name: str, leaf: Any) -> np.ndarray[Any, Any]:
    """Returns it as an array of numpy.

    Raises:
        InvalidArgumentError: it cannot be one, or is more than that: it has a mask, or columns.
    """
    kind = type(leaf)
    is_plain = kind in _ARRAYS or (hasattr(leaf, "dtype") and not issubclass(kind, np.ndarray))
    if is_plain:
        with contextlib.suppress(Exception):  # of a class of the user's, any
            return np.asarray(leaf)
    raise InvalidArgumentError(
        f"{name or 'The batch'} is a {kind.__module__}.{kind.__qualname__}, whose rows cannot be"
        " joined with those of other data shards. Let its loader give arrays of numpy or JAX,"
        " tensors of torch, or lists."
    )


def _room(name: str, leaf: Any, count: int) -> Any:
    import jax

    if isinstance(leaf, list | jax.Array) or _is_tensor(leaf) or _length(leaf) is None:
        return None
    array = _array(name, leaf)
    if array.dtype.hasobject or not array.dtype.isnative:  # these are joined in another dtype
        return None
    return np.empty((count * len(array), *array.shape[1:]), array.dtype)


def _join_leaf(name: str, leaves: list[Any]) -> Any:
    if isinstance(leaves[0], list):
        return [item for leaf in leaves for item in leaf]
    if _length(leaves[0]) is None:  # no rows: something that is the same for all records
        first = _exactly(leaves[0])
        if any(_exactly(leaf) != first for leaf in leaves[1:]):
            raise InvalidArgumentError(
                f"{name or 'The batch'} has no axis of records, and other values in other data"
                f" shards: {leaves[0]!r:.80} and others."
            )
        return leaves[0]
    kinds = {str(leaf.dtype) for leaf in leaves}
    if len(kinds) > 1 and not all(kind.startswith(("<U", "|S", "<S")) for kind in kinds):
        raise InvalidArgumentError(
            f"{name or 'The batch'} has other dtypes in other data shards: {sorted(kinds)}."
        )
    import jax

    if all(isinstance(leaf, jax.Array) for leaf in leaves):
        return jax.numpy.concatenate(leaves)  # it stays on its device
    if all(map(_is_tensor, leaves)):
        return sys.modules["torch"].cat(leaves)
    return np.concatenate([np.asarray(leaf) for leaf in leaves])


def _exactly(value: Any) -> Any:
    """Returns what is the same for values that are, to the last bit."""
    try:
        return codec.pack(value)
    except codec.EncodeError:
        return repr(value)


# What a batch holds that its loader may write again: a batch that waits is copied then.

MOST_PARTS = 10_000  # of a batch that are looked at; more are taken as they are
MOST_WATCHED = 50  # of one that is not copied, which costs time for each batch
MOST_DEPTH = 50
# No `np.void`: a row of a structured array is a view of it.
_SCALARS = (str, bytes, int, float, complex, np.number, np.bool_, np.datetime64, type(None))
_PLAIN = {str, bytes, int, float, bool, type(None)}
_ARRAYS = (np.ndarray, np.memmap, memoryview)  # and not those with a mask, or the names of fields
_WITHOUT_ATTRIBUTES = (dict, list, tuple, np.ndarray)
_KNOWN = (dict, list, bytearray)
_NOWHERE = (0, 0)
_EVERYWHERE = (0, 1 << 64)
_SAMPLES = 512  # of an array: about a microsecond


def overlap(groups: Iterable[Sequence[tuple[int, int]]]) -> bool:
    """Returns whether a place in memory is in two of the groups."""
    ranges = [(*place, number) for number, places in enumerate(groups) for place in places]
    first, second = (0, -1), (0, -1)  # the furthest ends, of two groups
    for begin, end, number in sorted(ranges):
        if begin < (second if number == first[1] else first)[0]:
            return True
        if number == first[1]:
            first = max(first, (end, number))
        elif end > first[0]:
            first, second = (end, number), first
        elif end > second[0]:
            second = end, number
    return False


class Parts:
    """What a batch is made of, as far as it is looked into: each part once.

    Attributes:
        has_more: whether it has parts that are not looked at, as they are too many or too deep.
        has_failed: whether one of them could not be copied.
        shapes: those of the arrays among the first parts; not of the items of lists, which are rows
            that may have other shapes each time.
    """

    def __init__(self, batch: Any, most: int = MOST_PARTS) -> None:
        self._batch = batch
        self._opened: dict[int, _Opened] = {}
        self._samples: dict[int, Any] = {}
        self.has_more = self.has_failed = False
        shapes = []
        waiting = collections.deque([(batch, 0, False)])  # the least deep ones first
        while waiting:
            part, depth, is_row = waiting.popleft()
            if issubclass(type(part), _SCALARS) or id(part) in self._opened:
                continue
            if len(self._opened) == most or depth > MOST_DEPTH:
                self.has_more = True
                break
            self._opened[id(part)] = opened = _opened(part)
            if opened.shape is not None and not is_row and len(self._opened) <= MOST_WATCHED:
                shapes.append(opened.shape)
            is_column = is_row or (depth > 0 and issubclass(type(part), list))
            waiting.extend((one, depth + 1, is_column) for one in opened.inner())
        self.shapes = tuple(shapes)

    def places(self, *, is_known: bool = True) -> list[tuple[int, int]]:
        """Returns where in memory its loader may write again, begin and end: arrays of numpy, torch
        tensors, and the containers that can be filled again; as long as this object lives. Without
        those of which `sample` remembers all, if not `is_known`.
        """
        opened_ones = self._opened.values()
        places = [one.place for one in opened_ones if is_known or type(one.part) not in _KNOWN]
        return [(begin, end) for begin, end in places if begin < end]

    def sample(self) -> None:
        """Remembers what is in the parts now: of a large array, some hundred values."""
        self._samples = {number: _sample(opened) for number, opened in self._opened.items()}

    def has_changed(self) -> bool:
        """Returns whether something else is seen in them than when `sample` was called."""
        pairs = ((before, self._opened[number]) for number, before in self._samples.items())
        return any(not _is_alike(before, _sample(opened)) for before, opened in pairs)

    def copied(self) -> Any:
        """Returns the batch with copies of its parts; those that nobody can copy are as they are.
        Parts that are one object are one object there.
        """
        while True:
            twins, failed = self._tried()
            if not failed:
                return twins.get(id(self._batch), self._batch)
            self.has_failed = True
            for number in failed:  # what others hold of its copies is no good: all once more
                self._opened[number] = _Opened(self._opened[number].part)

    def _tried(self) -> tuple[dict[int, Any], list[int]]:
        """Returns copies of the parts by the identities of these, and which ones have failed."""
        twins: dict[int, Any] = {}
        failed = list[int]()

        def of(parts: list[Any]) -> list[Any]:
            return [twins.get(id(part), part) for part in parts]

        def act(number: int, is_made: bool, is_finished: bool) -> None:
            opened = self._opened[number]
            try:
                if is_made:
                    twins[number] = opened.twin(of(opened.items))
                if is_finished and number in twins:
                    opened.finish(twins[number], of(opened.inner()))
            except MemoryError:  # what waits would be written to
                raise
            except Exception:  # of a class of the user's, any
                failed.append(number)

        begun, ended, has_ring = set[int](), set[int](), False
        waiting = [(number, False) for number in self._opened]
        while waiting:
            number, are_in = waiting.pop()  # the copies of what is in it
            opened = self._opened.get(number)
            if opened is None or opened.make is None:
                continue
            if not are_in and number in begun:
                has_ring = has_ring or number not in ended
                continue
            # What is filled afterwards is made first: it may hold itself.
            act(number, (opened.fill is None) == are_in, are_in)
            (ended if are_in else begun).add(number)
            if not are_in:
                waiting.append((number, True))
                waiting.extend((id(part), False) for part in opened.inner())
        for number in list(twins) if has_ring else ():  # not all were there
            act(number, False, True)
        return twins, failed


@dataclasses.dataclass(slots=True)
class _Opened:
    """A part of a batch, and how another one like it is made.

    Attributes:
        part: itself, as its identity counts.
        make: makes another one of items; None where nobody can.
        items: what it holds beside its attributes.
        fill: puts the items into what `make` made without them.
        attributes: those that it has.
        place: where in memory its loader may write again, begin and end.
        shape: that of an array.
    """

    part: Any
    make: Callable[[list[Any]], Any] | None = None
    items: list[Any] = dataclasses.field(default_factory=list)
    fill: Callable[[Any, list[Any]], object] | None = None
    attributes: _Attributes | None = None
    place: tuple[int, int] = _NOWHERE
    shape: tuple[int, ...] | None = None

    def inner(self) -> list[Any]:
        return self.items + (self.attributes.values if self.attributes else [])

    def twin(self, items: list[Any]) -> Any:
        assert self.make is not None
        twin = self.make(items)
        if twin is self.part or type(twin) is not type(self.part):
            raise TypeError(f"A {type(self.part).__qualname__} makes no other one like it.")
        return twin

    def finish(self, twin: Any, inner: list[Any]) -> None:
        if self.fill is not None:
            self.fill(twin, inner[: len(self.items)])
        if self.attributes:
            self.attributes.give(twin, inner[len(self.items) :])


class _Attributes:
    """Those of an object, past what its class says of them: it may refuse, or make others. A copy
    that its class has made has what that has given it: what is the same there is copied.
    """

    def __init__(self, part: Any) -> None:
        try:
            own = object.__getattribute__(part, "__dict__")
        except AttributeError:
            own = None
        self._own, self._is_part = own, own is part  # a dict of its attributes
        self._names = [] if own is None or own is part else list(own)
        self.values = [own[name] for name in self._names]
        self._slots = []
        for kind in type(part).__mro__:
            for slot in vars(kind).values() if "__slots__" in vars(kind) else ():
                if isinstance(slot, types.MemberDescriptorType):
                    with contextlib.suppress(AttributeError):  # nothing was put there
                        self.values.append(slot.__get__(part))
                        self._slots.append(slot)

    def __bool__(self) -> bool:
        return self._own is not None or bool(self._slots)

    def give(self, twin: Any, values: list[Any]) -> None:
        # Made by us, and not by its class; or by one that is known, with a copy of what is in it.
        is_bare = isinstance(twin, tuple | collections.UserDict | collections.UserList)
        if self._is_part:
            object.__setattr__(twin, "__dict__", twin)
        elif self._own is not None:
            found = object.__getattribute__(twin, "__dict__")
            if found is self._own:
                found = dict(found)
                object.__setattr__(twin, "__dict__", found)
            for name, before, value in zip(self._names, self.values, values, strict=False):
                if is_bare or (name in found and found[name] is before):
                    found[name] = value
        first = len(self._names)
        for slot, before, value in zip(
            self._slots, self.values[first:], values[first:], strict=True
        ):
            with contextlib.suppress(AttributeError):  # its class gave it none
                if is_bare or slot.__get__(twin) is before:
                    slot.__set__(twin, value)


def _opened(part: Any) -> _Opened:
    try:
        return _looked_into(part)
    except Exception:  # of a class of the user's, any
        return _Opened(part)


def _looked_into(part: Any) -> _Opened:
    kind, itself = type(part), (id(part), id(part) + 1)
    found = _Opened(part, lambda _: copy.copy(part), place=itself)
    found.attributes = None if kind in _WITHOUT_ATTRIBUTES else _Attributes(part)
    # By the methods of the builtin class: those of a subclass may refuse, or hold something else.
    if isinstance(part, dict):
        base = collections.OrderedDict if isinstance(part, collections.OrderedDict) else dict
        keys = list(base.keys(part))
        found.items = [dict.__getitem__(part, key) for key in keys]
        found.fill = functools.partial(_fill_dict, base, keys)
    elif isinstance(part, list):
        found.items = list.copy(part)
        found.fill = lambda twin, items: list.__setitem__(twin, slice(None), items)
    elif isinstance(part, tuple):
        found.items = list(tuple.__iter__(part))
        found.make = lambda items: tuple.__new__(kind, items)
        found.place = itself if found.attributes else _NOWHERE
    elif isinstance(part, np.ndarray):
        found.make = lambda _: part.copy(order="K")
        found.place, found.shape = _span(part), part.shape
        if part.dtype == object:
            found.items, found.fill = part.view(np.ndarray).ravel().tolist(), _fill_array
    elif isinstance(part, np.void):
        found.place = itself if part.flags.owndata else _span(part)
    elif (params := getattr(kind, "__dataclass_params__", None)) is not None:
        found.place = _NOWHERE if params.frozen else itself
    elif isinstance(part, bytearray | collections.UserDict | collections.UserList):
        pass  # the first holds bytes, the others what is in one of their attributes
    elif _is_tensor(part):
        shape = tuple(getattr(part, "shape", ()))
        return _Opened(part, lambda _: part.clone(), place=_storage(part), shape=shape)
    else:
        import jax

        found.items, structure = jax.tree.flatten(part, is_leaf=lambda one: one is not part)
        if len(found.items) == 1 and found.items[0] is part:  # no node that JAX knows
            return _Opened(part)
        found.make = lambda items: jax.tree.unflatten(structure, items)
    is_shallow = found.fill is not None and kind in _WITHOUT_ATTRIBUTES
    if is_shallow and set(map(type, found.items)) <= _PLAIN:
        found.items, found.fill = [], None  # texts, numbers: they are in the copy
    return found


def _fill_dict(base: type[dict[Any, Any]], keys: list[Any], twin: Any, items: list[Any]) -> None:
    base.clear(twin)  # what is in it was put there by a method of its class
    for key, item in zip(keys, items, strict=True):
        base.__setitem__(twin, key, item)


def _fill_array(array: np.ndarray[Any, Any], items: list[Any]) -> None:
    # In an array of objects first: as such, an item that is a list would be taken for a row.
    array.view(np.ndarray)[...] = np.fromiter(items, object, len(items)).reshape(array.shape)


def _span(array: Any) -> tuple[int, int]:
    """Returns the place of an array of numpy, or of a row of one."""
    if not array.size:
        return _NOWHERE
    begin = array.__array_interface__["data"][0]
    if array.flags.forc:
        return begin, begin + array.nbytes
    spans = [step * (length - 1) for step, length in zip(array.strides, array.shape, strict=True)]
    last = begin + sum(span for span in spans if span > 0)
    return begin + sum(span for span in spans if span < 0), last + array.itemsize


def _storage(tensor: Any) -> tuple[int, int]:
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    except Exception:  # a sparse one has none
        return _EVERYWHERE


def _sample(opened: _Opened) -> Any:
    """Returns what to know a part by that its loader may have written again: bytes, or the objects
    that it holds; None where nobody can tell.
    """
    part = opened.part
    try:
        if isinstance(part, dict):
            return list(itertools.chain.from_iterable(dict.items(part)))
        if isinstance(part, list):
            return list.copy(part)
        if isinstance(part, bytearray):
            return bytes(part)
        if opened.shape is not None:
            array = part if isinstance(part, np.ndarray) else part.detach().numpy()
            array = array.view(np.ndarray)
            if array.dtype.names:  # what is between them is not copied with them
                array = array.view(f"V{array.dtype.itemsize}")
            if array.dtype.kind == "T":  # of which a copy has other bytes
                return None
            values: Any = array.reshape(-1) if array.flags.c_contiguous else array.flat  # no copy
            if array.dtype.itemsize > 16 and array.flags.c_contiguous:
                values = values.view(np.uint8)
            # An odd step does not stay in one column of a matrix.
            return values[:: len(values) // _SAMPLES | 1].tobytes()
        return _Attributes(part).values if opened.attributes else None
    except Exception:  # of a class of the user's, any
        return None


def _is_alike(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return True
    if not isinstance(one, list):
        return bool(one == other)
    # More may have come to it: to a log that all batches have, or values that are computed once.
    return len(one) <= len(other) and all(
        a is b or (type(a) is type(b) and type(a) in _PLAIN and a == b)
        for a, b in zip(one, other, strict=False)
    )
