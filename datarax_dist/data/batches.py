"""What a batch is made of: its rows, leaf by leaf; the rows of several batches in one; copies.

Dicts and tuples are structure, arrays have a row for each record along their first axis, and a list
is a column with one item for each record. (A whole batch that is a list of arrays is structure.)
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from datarax_dist import codec
from datarax_dist.errors import InvalidArgumentError, PositionError

__all__ = ["copied", "join", "leaves_with_names", "memory_of", "overlap", "rows_of"]


def _flatten(batch: Any) -> tuple[list[tuple[str, Any]], Any]:
    import jax

    whole = isinstance(batch, list) and bool(batch) and all(hasattr(x, "shape") for x in batch)
    found, structure = jax.tree_util.tree_flatten_with_path(
        tuple(batch) if whole else batch, is_leaf=lambda part: isinstance(part, list)
    )
    named = [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in found]
    return named, structure


def leaves_with_names(batch: Any) -> list[tuple[str, Any]]:
    """Returns the leaves of a batch with their places, `a.b`; a list is one leaf."""
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
    lengths = {name: _length(leaf) for name, leaf in leaves_with_names(batch)}
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


def join(parts: dict[int, Any]) -> Any:
    """Returns the rows of the batches of several data shards, leaf by leaf, in their order.

    Raises:
        InvalidArgumentError: they cannot be joined; it names the shard and the leaf.
    """
    if len(parts) == 1:
        return next(iter(parts.values()))
    first, *_ = parts
    flat = {shard: _flatten(part) for shard, part in parts.items()}
    _, structure = flat[first]
    for shard, (_, other) in flat.items():
        if other != structure:
            raise InvalidArgumentError(
                f"The batches of data shards {first} and {shard} have other parts: {structure} and"
                f" {other}."
            )
    columns = zip(*(leaves for leaves, _ in flat.values()), strict=True)
    joined = [_join_leaf(column[0][0], [leaf for _, leaf in column]) for column in columns]
    import jax

    return jax.tree.unflatten(structure, joined)


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
    return np.concatenate([np.asarray(leaf) for leaf in leaves])


def _exactly(value: Any) -> Any:
    """Returns what is the same for values that are, to the last bit."""
    try:
        return codec.pack(value)
    except codec.EncodeError:
        return repr(value)


def check_rows(parts: dict[int, Any], expected: int | None, limit_hint: str) -> int:
    """Returns the number of records in the batch of each data shard, which is always the same.

    Raises:
        PositionError: a shard has another number; hosts would have arrays of different shapes.
    """
    for shard, part in parts.items():
        rows = rows_of(part)
        expected = rows if expected is None else expected
        if rows != expected:
            raise PositionError(
                f"Data shard {shard} gave a batch of {rows} records; before, there were {expected}."
                " Hosts with other shards would see another number, and arrays of other shapes. Let"
                f" the loader drop the remainder (drop_remainder=True), or {limit_hint}"
            )
    assert expected is not None
    return expected


# What a batch holds that its loader may write again: a batch that waits is copied then.

_MOST_PARTS = 10_000  # of a batch that are looked at; more are taken as they are
_MOST_DEPTH = 50
_SCALARS = (str, bytes, int, float, complex, np.generic, type(None))


def memory_of(batch: Any) -> list[tuple[int, int]]:
    """Returns where in memory that is, begin and end: arrays of numpy, torch tensors, and the
    container that they are in; as long as the batch lives.
    """
    places = [] if isinstance(batch, tuple | np.ndarray) else [(id(batch), id(batch) + 1)]
    waiting, looked_at = [batch], dict[int, Any]()  # they live as long as their identities count
    while waiting and len(looked_at) < _MOST_PARTS:
        part = waiting.pop()
        if isinstance(part, _SCALARS) or id(part) in looked_at:
            continue
        looked_at[id(part)] = part
        if (opened := _opened(part)) is not None:
            waiting.extend(opened[0])
        elif _is_buffer(part):
            places.append(_place(part))
    return [(begin, end) for begin, end in places if begin < end]


def overlap(mine: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]) -> bool:
    """Returns whether a place in memory is in both."""
    furthest = [0, 0]
    ranges = [(*place, 0) for place in mine] + [(*place, 1) for place in others]
    for begin, end, side in sorted(ranges):
        if begin < furthest[1 - side]:
            return True
        furthest[side] = max(furthest[side], end)
    return False


def copied(batch: Any) -> Any:
    """Returns a batch with copies of what `memory_of` names."""
    return _copied(batch, itertools.count(), ())


def _copied(part: Any, looked_at: Iterator[int], within: tuple[int, ...]) -> Any:
    if isinstance(part, _SCALARS) or next(looked_at) >= _MOST_PARTS:
        return part
    if id(part) in within or len(within) == _MOST_DEPTH:
        return part
    opened = _opened(part)
    if opened is None:
        if not _is_buffer(part):
            return part
        return part.copy() if isinstance(part, np.ndarray) else part.clone()
    parts, made_of = opened
    others = [_copied(one, looked_at, (*within, id(part))) for one in parts]
    try:
        return made_of(others)
    except (TypeError, ValueError, AttributeError):  # a class that is not made of its parts
        return part


def _is_buffer(part: Any) -> bool:
    return isinstance(part, np.ndarray) or _is_tensor(part)


def _is_tensor(part: Any) -> bool:
    return hasattr(part, "untyped_storage") and hasattr(part, "clone")


def _place(part: Any) -> tuple[int, int]:
    if isinstance(part, np.ndarray):
        if not part.size:
            return 0, 0
        spans = [step * (length - 1) for step, length in zip(part.strides, part.shape, strict=True)]
        begin = part.__array_interface__["data"][0]
        last = begin + sum(span for span in spans if span > 0)
        return begin + sum(span for span in spans if span < 0), last + part.itemsize
    if _is_tensor(part):
        try:
            storage = part.untyped_storage()
        except Exception:  # a sparse one: as if it were everywhere
            return 0, 1 << 64
        return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    return 0, 0


def _opened(part: Any) -> tuple[list[Any], Callable[[list[Any]], Any]] | None:
    """Returns what a container has in it, and what makes another one of other parts; None for what
    is no container.
    """
    if isinstance(part, dict | collections.UserDict):
        return list(part.values()), lambda parts: _refilled(part, list(part), parts)
    if isinstance(part, list):
        if all(isinstance(item, _SCALARS) for item in part):
            return [], lambda parts: copy.copy(part)
        return list(part), lambda parts: _refilled(part, range(len(part)), parts)
    if type(part) is tuple or (isinstance(part, tuple) and hasattr(part, "_fields")):
        return list(part), lambda parts: tuple.__new__(type(part), parts)
    if isinstance(part, np.ndarray):
        if part.dtype != object:
            return None
        return [part[at] for at in np.ndindex(part.shape)], lambda parts: _refilled(
            part, np.ndindex(part.shape), parts
        )
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        names = [field.name for field in dataclasses.fields(part) if hasattr(part, field.name)]
        return [getattr(part, name) for name in names], lambda parts: _reset(part, names, parts)
    return _opened_node(part)


def _refilled(part: Any, keys: Iterable[Any], parts: list[Any]) -> Any:
    twin = copy.copy(part)
    for key, item in zip(keys, parts, strict=True):
        twin[key] = item
    return twin


def _reset(part: Any, names: list[str], parts: list[Any]) -> Any:
    twin = copy.copy(part)
    for name, item in zip(names, parts, strict=True):
        object.__setattr__(twin, name, item)  # a frozen one too
    return twin


def _opened_node(part: Any) -> tuple[list[Any], Callable[[list[Any]], Any]] | None:
    """The same, for what was made known to JAX as a node."""
    import jax

    leaves, structure = jax.tree.flatten(part, is_leaf=lambda inner: inner is not part)
    if len(leaves) == 1 and leaves[0] is part:
        return None
    return leaves, lambda parts: jax.tree.unflatten(structure, parts)
