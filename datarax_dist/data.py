"""Data positions: what adapts a loader, and V logical shards that make any loader elastic.

A loader's position is captured on the caller's thread and written as position shards. Two kinds so
far:

- *shards*: `shards(factory, V)`. V is fixed for the run; host h owns the shards with `s % hosts ==
  h`; any number of hosts that is at most V can go on with the positions of any other.
- *host*: an opaque loader. Exact on the same number of hosts; on another one it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from datarax_dist import codec
from datarax_dist import format as fmt
from datarax_dist.errors import InvalidArgumentError, PositionError, UnsupportedLeafError

__all__ = ["Checkpointable", "CheckpointableIterator", "Shards", "adapt", "shards"]


@runtime_checkable
class Checkpointable(Protocol):
    """An object whose state is a tree: datarax's own protocol."""

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> Any: ...


@runtime_checkable
class CheckpointableIterator(Checkpointable, Protocol):
    """An iterator that can say where it is, and go back there."""

    def __iter__(self) -> Iterator[Any]: ...

    def __next__(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Adapter:
    """How the position of one loader is read and set."""

    get: Callable[[], Any]
    set: Callable[[Any], Any]


def adapt(loader: Any) -> Adapter:
    """Returns the adapter of a loader.

    Raises:
        PositionError: the loader has no position that could be saved.
    """
    for get, put in (("get_state", "set_state"), ("state_dict", "load_state_dict")):
        if callable(getattr(loader, get, None)) and callable(getattr(loader, put, None)):
            return Adapter(getattr(loader, get), getattr(loader, put))
    raise PositionError(
        f"A {type(loader).__module__}.{type(loader).__qualname__} has no position to save: it has"
        " neither get_state/set_state nor state_dict/load_state_dict. A generator cannot be"
        " resumed; give the loader's own iterator (Grain: iter(loader)) instead."
    )


class Shards:
    """V logical shards of a loader; see `shards`."""

    def __init__(
        self, factory: Callable[[int, int], Any], count: int, *, fingerprint: Any = None
    ) -> None:
        given: Any = count
        if isinstance(given, bool) or not isinstance(given, int) or given < 1:
            raise InvalidArgumentError(
                f"shards() needs a whole number of 1 or more, not {count!r}."
            )
        self.count = count
        self.fingerprint = fingerprint
        self._factory = factory
        self._iterators: dict[int, Any] | None = None

    def owned(self) -> list[int]:
        """Returns the logical shards of this host."""
        import jax

        hosts, host = jax.process_count(), jax.process_index()
        if self.count % hosts:
            fitting = [n for n in range(1, self.count + 1) if self.count % n == 0]
            raise PositionError(
                f"{self.count} data shards cannot be divided over {hosts} hosts. Numbers of hosts"
                f" that would work: {', '.join(map(str, fitting))}."
            )
        return list(range(host, self.count, hosts))

    @property
    def iterators(self) -> dict[int, Any]:
        if self._iterators is None:
            self._iterators = {
                shard: iter(self._factory(shard, self.count)) for shard in self.owned()
            }
        return self._iterators

    def __iter__(self) -> Shards:
        return self

    def __next__(self) -> Any:
        import jax

        parts = [next(iterator) for iterator in self.iterators.values()]
        if len(parts) == 1:
            return parts[0]
        return jax.tree.map(
            lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves]), *parts
        )


def shards(factory: Callable[[int, int], Any], count: int, *, fingerprint: Any = None) -> Shards:
    """Returns `count` logical shards of a loader, as one iterator of this host's part of each
    global batch.

    Args:
        factory: `factory(shard, count)` returns a loader of that shard, whose iterator has a
            position.
        count: V, fixed for the run: the largest number of hosts it will ever have, or a multiple of
            it.
        fingerprint: JSON that must be the same on restore, the seed and the name of the data set,
            say.

    >>> class Count:
    ...     def __init__(self, shard, count): self.next = shard; self.step = count
    ...     def __iter__(self): return self
    ...     def __next__(self): self.next += self.step; return np.asarray([self.next - self.step])
    ...     def get_state(self): return self.next
    ...     def set_state(self, state): self.next = state
    >>> batches = shards(Count, 4)
    >>> next(batches).tolist(), next(batches).tolist()
    ([0, 1, 2, 3], [4, 5, 6, 7])
    """
    return Shards(factory, count, fingerprint=fingerprint)


@dataclass(frozen=True, slots=True)
class Captured:
    """The positions of one host: files of its own, indexes for the primary to write, and what hosts
    must agree on.
    """

    positions: Mapping[str, bytes]
    indexes: Mapping[str, bytes]
    agreement: Mapping[str, Any]


def named_loaders(data: Any) -> dict[str, Any]:
    """Returns `{name: loader}` for what `save` and `restore` are given as `data`."""
    if data is None:
        return {}
    if isinstance(data, Mapping):
        if not data:
            raise InvalidArgumentError(
                "`data` is an empty dict; give a loader, {name: loader}, or leave it out."
            )
        for name in data:
            if not isinstance(name, str):
                raise InvalidArgumentError(f"The names of data items are texts, not {name!r}.")
            try:
                fmt.check_item_name(name)
            except ValueError as error:
                raise InvalidArgumentError(str(error)) from None
        return dict(data)
    return {"data": data}


def capture(data: Any, host: int, hosts: int) -> Captured:
    """Reads and encodes the position of every loader, now.

    Raises:
        PositionError, UnsupportedLeafError: a loader has no position, or one that cannot be
            written.
    """
    positions: dict[str, bytes] = {}
    indexes: dict[str, bytes] = {}
    agreement: dict[str, Any] = {}
    for name, loader in named_loaders(data).items():
        if isinstance(loader, Shards):
            kind, count = "shards", loader.count
            states = {shard: adapt(iterator).get() for shard, iterator in loader.iterators.items()}
            fingerprint = loader.fingerprint
        else:
            kind, count, states, fingerprint = "host", hosts, {host: adapt(loader).get()}, None
        index = {"kind": kind, "count": count, "fingerprint": _encode(fingerprint, name)}
        indexes[fmt.position_index_name(name)] = fmt.seal(index)
        agreement[f"data item {name!r}"] = index
        for shard, state in states.items():
            body = {"item": name, "shard": shard, "count": count, "state": _encode(state, name)}
            positions[fmt.position_name(name, shard, count)] = fmt.seal(body)
    return Captured(positions, indexes, agreement)


def _encode(state: Any, name: str) -> Any:
    try:
        return codec.encode(_to_host(state))
    except codec.EncodeError as error:
        raise UnsupportedLeafError(
            f"The position of {name!r} cannot be written: {error}", path=error.path
        ) from None


def _to_host(value: Any) -> Any:
    """Replaces jax and torch arrays by numpy arrays, typed PRNG keys by their data, in plain
    containers.
    """
    if isinstance(value, dict):
        return {key: _to_host(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_to_host(item) for item in value)
    if isinstance(value, Mapping):
        return {key: _to_host(item) for key, item in value.items()}
    if hasattr(value, "__array__") and not isinstance(value, np.ndarray | np.generic):
        dtype = getattr(value, "dtype", None)
        if str(dtype).startswith("key<"):
            import jax

            return {
                "__prng_key__": str(jax.random.key_impl(value)),
                "data": np.asarray(jax.random.key_data(value)),
            }
        return np.asarray(value)
    return value


def _from_host(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"__prng_key__", "data"}:
            import jax

            return jax.random.wrap_key_data(value["data"], impl=value["__prng_key__"])
        return {key: _from_host(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_from_host(item) for item in value)
    return value


@dataclass(frozen=True, slots=True)
class Plan:
    """Which position files this host needs, and what to do with them."""

    loaders: Mapping[str, Any]
    wanted: Mapping[str, Mapping[int, str]]

    def keys(self) -> list[str]:
        return [key for files in self.wanted.values() for key in files.values()]


def plan_restore(
    data: Any, items: Sequence[str], read: Callable[[str], bytes], host: int, hosts: int
) -> Plan:
    """Checks that the positions of a step fit today's loaders and hosts; reads the indexes only.

    Raises:
        PositionError: they do not fit; the message names both sides and the ways out.
    """
    wanted: dict[str, dict[int, str]] = {}
    loaders = named_loaders(data)
    saved = [item.removeprefix("data/") for item in items if item.startswith("data/")]
    for name, loader in loaders.items():
        if name not in saved:
            raise PositionError(
                f"The step has no position of {name!r}; it has"
                f" {', '.join(map(repr, saved)) or 'none at all'}. Restore with data=None to take"
                " the state alone."
            )
        index = fmt.unseal(read(fmt.position_index_name(name)), fmt.position_index_name(name))
        kind, count = index["kind"], int(index["count"])
        if isinstance(loader, Shards):
            if kind != "shards":
                raise PositionError(
                    f"{name!r} was saved as an opaque loader of {count} hosts; it cannot become"
                    " shards()."
                )
            if count != loader.count:
                raise PositionError(
                    f"{name!r} was saved with {count} data shards, the loader has {loader.count}. V"
                    " is fixed for a run."
                )
            if codec.decode(index["fingerprint"]) != loader.fingerprint:
                raise PositionError(
                    f"{name!r} was saved with the fingerprint"
                    f" {codec.decode(index['fingerprint'])!r}, the loader has"
                    f" {loader.fingerprint!r}."
                )
            owned = loader.owned()
        else:
            if kind != "host":
                raise PositionError(
                    f"{name!r} was saved as {count} data shards; restore it into shards(factory,"
                    f" {count})."
                )
            if count != hosts:
                raise PositionError(
                    f"{name!r} was saved by {count} hosts, this job has {hosts}, and its loader's"
                    f" position is opaque. Restore on {count} hosts, save with"
                    " datarax_dist.data.shards(factory, V), or restore with data=None and start"
                    " the data anew."
                )
            owned = [host]
        wanted[name] = {shard: fmt.position_name(name, shard, count) for shard in owned}
    return Plan(loaders, wanted)


def decode_positions(plan: Plan, read: Callable[[str], bytes]) -> dict[str, dict[int, Any]]:
    """Reads and decodes the positions of this host.

    Raises:
        InvalidRecordError, DecodeError: a file is damaged.
    """
    states: dict[str, dict[int, Any]] = {}
    for name, files in plan.wanted.items():
        for shard, key in files.items():
            body = fmt.unseal(read(key), key)
            if body.get("item") != name or body.get("shard") != shard:
                raise fmt.InvalidRecordError(f"{key} is the position of another shard")
            states.setdefault(name, {})[shard] = _from_host(codec.decode(body["state"]))
    return states


def apply_positions(plan: Plan, states: Mapping[str, Mapping[int, Any]]) -> None:
    """Sets the loaders to their positions."""
    for name, loader in plan.loaders.items():
        for shard, state in states[name].items():
            target = loader.iterators[shard] if isinstance(loader, Shards) else loader
            adapt(target).set(state)
