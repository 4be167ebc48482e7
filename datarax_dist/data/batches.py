"""What a batch is made of: its rows, leaf by leaf; the rows of several batches in one; copies.

Dicts and tuples are structure, arrays have a row for each record along their first axis, and a list
is a column with one item for each record. (A whole batch that is a list of arrays is structure.)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from datarax_dist.errors import InvalidArgumentError, PositionError

__all__ = ["arrays_of", "copied", "join", "leaves_with_names", "rows_of"]


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
        if any(repr(leaf) != repr(leaves[0]) for leaf in leaves):
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


def arrays_of(batch: Any) -> list[np.ndarray[Any, Any]]:
    """Returns the numpy arrays of a batch."""
    return [leaf for _, leaf in leaves_with_names(batch) if isinstance(leaf, np.ndarray)]


def copied(batch: Any) -> Any:
    """Returns a batch with copies of its numpy arrays."""
    import jax

    return jax.tree.map(
        lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf,
        batch,
        is_leaf=lambda part: (
            isinstance(part, list) and not any(isinstance(item, np.ndarray) for item in part)
        ),
    )
