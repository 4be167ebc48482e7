"""Which host owns which data shards. Pure functions over numbers of hosts or a batch sharding."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datarax_dist.errors import InvalidArgumentError, PositionError

__all__ = [
    "Ownership",
    "acting_as_host",
    "own_by_modulo",
    "own_by_rows",
    "own_by_sharding",
    "this_host",
]

_acting_as: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar(
    "datarax_dist_host", default=None
)


def this_host() -> tuple[int, int]:
    """Returns which host of how many this is: the process of `jax.distributed`, or the one that
    `acting_as_host` says.
    """
    if (acting := _acting_as.get()) is not None:
        return acting
    import jax

    return jax.process_index(), jax.process_count()


@contextlib.contextmanager
def acting_as_host(host: int, hosts: int) -> Iterator[None]:
    """Loaders that are used in this context belong to host `host` of `hosts`, whatever this process
    is: for tests that go through several hosts in one process.
    """
    token = _acting_as.set((host, hosts))
    try:
        yield
    finally:
        _acting_as.reset(token)


@dataclass(frozen=True, slots=True)
class Ownership:
    """What one host does for data shards.

    Attributes:
        reads: the shards whose rows it needs, in the order of its rows.
        writes: those of them whose position it writes: of the hosts that need the same shard, the
            lowest.
    """

    reads: tuple[int, ...]
    writes: frozenset[int]


def own_by_modulo(count: int, host: int, hosts: int) -> Ownership:
    """Host h owns the shards with `s % hosts == h`.

    Raises:
        PositionError: the shards cannot be divided; it names the numbers of hosts that would work.
    """
    if count % hosts:
        fitting = [n for n in range(1, count + 1) if count % n == 0]
        raise PositionError(
            f"{count} data shards cannot be divided over {hosts} hosts. Numbers of hosts that would"
            f" work: {', '.join(map(str, fitting))}. (The number of shards is fixed for a run;"
            " choose one with many divisors, 840 or a power of two, say.)"
        )
    owned = tuple(range(host, count, hosts))
    return Ownership(owned, frozenset(owned))


def own_by_rows(
    count: int, rows: Mapping[int, Sequence[tuple[int, int]]], total: int, host: int
) -> Ownership:
    """A host owns the shards whose rows of the global batch it needs.

    Args:
        count: the number of shards; shard s is the s-th of as many equal parts of the batch.
        rows: host -> the ranges of rows, begin and end, that its devices hold.
        total: the number of rows that `rows` counts in; a multiple of `count`.
        host: for whom.

    Raises:
        PositionError: a host needs a part of a shard only, or nobody needs one.
    """
    size = total // count
    needed: dict[int, set[int]] = {}
    for who, ranges in rows.items():
        held = {row for begin, end in set(ranges) for row in range(begin, end)}
        shards = {row // size for row in held}
        whole = {s for s in shards if held.issuperset(range(s * size, s * size + size))}
        partial = sorted(shards - whole)
        if partial:
            raise PositionError(
                f"The batch sharding gives host {who} a part of data shard {partial[0]} only:"
                f" {count} shards are too few for it. Numbers of shards that would work: the"
                f" multiples of {_fewest(rows, total)}."
            )
        needed[who] = shards
    orphans = sorted(set(range(count)).difference(*needed.values()))
    if orphans:
        raise PositionError(
            f"No host needs data shard {orphans[0]} with this batch sharding: its mesh does not"
            " cover the whole batch."
        )
    mine = needed.get(host, set())
    writes = {s for s in mine if min(who for who in needed if s in needed[who]) == host}
    return Ownership(tuple(sorted(mine)), frozenset(writes))


def _fewest(rows: Mapping[int, Sequence[tuple[int, int]]], total: int) -> int:
    """Returns the least number of equal parts that no host needs in part."""
    edges = {edge for ranges in rows.values() for pair in ranges for edge in pair}
    return total // math.gcd(total, *edges)


def own_by_sharding(count: int, sharding: Any, host: int) -> Ownership:
    """The same, for a `NamedSharding` of the batch, whose first axis is that of the records."""
    import jax

    if not isinstance(sharding, jax.sharding.NamedSharding):
        raise InvalidArgumentError(
            "shards(sharding=...) needs the NamedSharding of the batch, not a"
            f" {type(sharding).__name__}."
        )
    first = sharding.spec[0] if len(sharding.spec) else None
    axes = (first,) if isinstance(first, str) else tuple(first or ())
    parts = math.prod(sharding.mesh.shape[axis] for axis in axes)
    total = math.lcm(count, parts)
    spec = jax.sharding.PartitionSpec(first)
    placed = jax.sharding.NamedSharding(sharding.mesh, spec).devices_indices_map((total,))
    rows: dict[int, list[tuple[int, int]]] = {}
    for device, (piece,) in dict[Any, Any](placed).items():
        begin, end, _ = piece.indices(total)
        rows.setdefault(device.process_index, []).append((begin, end))
    return own_by_rows(count, rows, total, host)
