"""How the position of one loader is read and set: `adapt`, and the loaders that are known.

A loader is known by the package and the name of its class; none of these packages is ever imported
here. What an adapter knows beyond `get_state` and `set_state` is what makes a resume safe: which
kind of position it is, whether the loader is still at its beginning, and what its pipeline looks
like (the fingerprint).
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib.metadata
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from datarax_dist.errors import InvalidArgumentError, PositionError

__all__ = [
    "Checkpointable",
    "CheckpointableIterator",
    "DataAdapter",
    "adapt",
    "open_loader",
    "register_adapter",
]

Kind = Literal["global", "host"]


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


class DataAdapter:
    """Reads and sets the position of one loader. This one: `get_state` and `set_state`.

    Make a subclass for a loader that has something else, and give it to `register_adapter`.

    Attributes:
        loader: the loader.
        kind: "host", the position means this host's part of the data only; "global", it is the same
            on every host and means the same on any number of them.
        counts: the position is how much was taken from `iterate()`, so only a loader that is
            iterated by `shards` or `tracked` has one.
        starts_when_read: `get_state` is not for a loader that was set and has not begun: it would
            start its workers, say. `started` must tell then.

    >>> class Tape:
    ...     at = 0
    ...     def __next__(self): self.at += 1; return self.at
    >>> class TapeAdapter(DataAdapter):
    ...     def get_state(self): return self.loader.at
    ...     def set_state(self, state): self.loader.at = state
    >>> register_adapter(f"{Tape.__module__}.Tape", TapeAdapter)
    >>> adapt(Tape()).get_state()
    0
    """

    kind: Kind = "host"
    counts = False
    starts_when_read = False

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def get_state(self) -> Any:
        """Returns the position: what comes next. See `datarax_dist.data` for what it may hold."""
        return self.loader.get_state()

    def set_state(self, state: Any) -> None:
        """Sets the position; `state` is what `get_state` returned."""
        self.loader.set_state(state)

    def iterate(self) -> Iterator[Any]:
        """Returns the iterator whose batches move the position. Called once, after `set_state`."""
        return iter(self.loader)

    def started(self) -> str | None:
        """Says why a position cannot be set any more (it has begun, its workers run), or None."""
        return None

    def fingerprint(self) -> dict[str, Any]:
        """Returns what must be the same when a position is set: JSON, without what is the host's
        own.

        The usual names: `batch` (records in a batch), `seed`, `records`, `shuffle`, `remainder`.
        """
        return {}


class _StateDict(DataAdapter):
    def get_state(self) -> Any:
        return self.loader.state_dict()

    def set_state(self, state: Any) -> None:
        self.loader.load_state_dict(state)


class _Grain(DataAdapter):
    """An iterator over a Grain `Dataset`: its pipeline can be walked, node by node."""

    def started(self) -> str | None:
        state = self.get_state()
        at = _deep_values(state, "next_index") if isinstance(state, dict) else []
        return f"it is at index {max(at)}" if any(at) else None

    def fingerprint(self) -> dict[str, Any]:
        return _grain_pipeline(self.loader)


class _GrainElastic(DataAdapter):
    """`ElasticIterator`: one index for all hosts, and its own batching and sharding."""

    kind: Kind = "global"

    def started(self) -> str | None:
        at = self.get_state()["global_next_index"]
        return f"it is at record {at}" if at else None

    def fingerprint(self) -> dict[str, Any]:
        found = _grain_pipeline(getattr(self.loader, "_ds", None))
        size = getattr(self.loader, "_global_batch_size", None)
        return {**found, "global_batch": size, "remainder": "drop"}


class _GrainDataLoader(DataAdapter):
    """The iterator of a Grain `DataLoader`; its state is JSON, as bytes."""

    def started(self) -> str | None:
        import json

        seen = json.loads(self.get_state()).get("last_seen_indices", {})
        return "it has read records" if any(at >= 0 for at in seen.values()) else None

    def fingerprint(self) -> dict[str, Any]:
        loader = getattr(self.loader, "_data_loader", None)
        sampler = getattr(loader, "_sampler", None)
        steps = list(getattr(loader, "_operations", ()))
        sizes = [getattr(step, "batch_size", None) for step in steps]
        drops = [getattr(step, "drop_remainder", None) for step in steps]
        return {
            "pipeline": [_grain_node(step) for step in steps],
            "batch": _last(sizes),
            "seed": getattr(sampler, "_seed", None),
            "records": getattr(sampler, "_num_records", None),
            "shuffle": getattr(sampler, "_shuffle", None),
            "remainder": _remainder(_last(drops)),
        }


class _Torchdata(_StateDict):
    """`StatefulDataLoader`: what it loads after `iter()` was called, it ignores without a word."""

    starts_when_read = True

    def get_state(self) -> Any:
        loader = self.loader
        version = _version("torchdata") or "0.11"
        if tuple(int(part) for part in re.findall(r"[0-9]+", version)[:2]) < (0, 11):
            raise PositionError(
                f"torchdata {version} goes on in another order than the one it was in. Upgrade to"
                " 0.11 or later."
            )
        inner = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
        for sampler in (getattr(loader, "sampler", None), inner):
            cls = type(sampler)
            if cls.__module__.startswith("torch.") and "Random" in cls.__name__:
                raise PositionError(
                    f"torch's {cls.__name__} keeps its place from torchdata: after the first epoch"
                    " another order would be restored, without a word. Use shuffle=True, or"
                    " torchdata.stateful_dataloader.sampler.RandomSampler."
                )
        return loader.state_dict()

    def started(self) -> str | None:
        running = getattr(self.loader, "_iterator", None) is not None
        return "iter() was called on it, so its workers run" if running else None

    def fingerprint(self) -> dict[str, Any]:
        loader = self.loader
        generator = getattr(loader, "generator", None)
        sampler = type(getattr(loader, "sampler", None)).__name__
        return {
            "batch": getattr(loader, "batch_size", None),
            "seed": generator.initial_seed() if generator is not None else None,
            "records": _length(getattr(loader, "dataset", None)),
            "shuffle": sampler,
            "remainder": _remainder(getattr(loader, "drop_last", None)),
        }


class _HuggingFace(_StateDict):
    """`IterableDataset`: its state is that of its last iterator, and begins with the first record
    taken, not with `load_state_dict`; and each later iterator would begin where that was.
    """

    counts = True

    def get_state(self) -> Any:
        kinds = [type(node).__name__ for node in self._nodes()]
        if "BufferShuffledExamplesIterable" in kinds:
            raise PositionError(
                "A Hugging Face IterableDataset with .shuffle(buffer_size=...) loses the records in"
                " its buffer at each resume. Shuffle the data set before to_iterable_dataset(), or"
                " its files, or give datarax_dist.data.replay(lambda: iter(dataset))."
            )
        return self.loader.state_dict()

    def _nodes(self) -> Iterator[Any]:
        waiting = [getattr(self.loader, "_ex_iterable", None)]
        while waiting:
            node = waiting.pop()
            if node is None:
                continue
            yield node
            waiting.append(getattr(node, "ex_iterable", None))
            waiting.extend(getattr(node, "ex_iterables", None) or ())

    def started(self) -> str | None:
        state = self.loader.state_dict()
        moved = any(_deep_values(state, "shard_example_idx")) or any(
            _deep_values(state, "shard_idx")
        )
        return "records were taken from it" if moved else None

    def fingerprint(self) -> dict[str, Any]:
        nodes = list(self._nodes())
        return {
            "batch": _last([getattr(node, "batch_size", None) for node in reversed(nodes)]),
            "shuffle": [type(node).__name__ for node in nodes if "Shuffle" in type(node).__name__],
            "pipeline": [type(node).__name__ for node in reversed(nodes)],
        }


class _Mosaic(DataAdapter):
    """`StreamingDataLoader`: five integers, equal on every host, right on any number of them. The
    hosts of one machine keep a position that was set in one piece of shared memory.
    """

    kind: Kind = "global"
    starts_when_read = True  # another host may be writing what would be read

    @property
    def _dataset(self) -> Any:
        return self.loader.dataset

    def get_state(self) -> Any:
        # Before the first epoch the epoch is -1, which is no place to go back to.
        return _from_first_epoch(self.loader.state_dict())

    def set_state(self, state: Any) -> None:
        self.loader.load_state_dict(state)

    def started(self) -> str | None:
        begun = getattr(self._dataset, "next_epoch", 0)
        return "iter() was called on it, so its workers run" if begun else None

    def fingerprint(self) -> dict[str, Any]:
        dataset = self._dataset
        hosts = getattr(getattr(dataset, "_unique_rank_world", None), "num_ranks", 1)
        batch = getattr(dataset, "batch_size", None)
        return {
            "global_batch": batch * hosts if batch else None,
            "seed": getattr(dataset, "shuffle_seed", None),
            "records": getattr(dataset, "num_samples", None),
            "shuffle": getattr(dataset, "shuffle_algo", None) if dataset.shuffle else None,
            "remainder": getattr(dataset, "sampling_method", None),
        }


class _MosaicDataset(_Mosaic):
    """`StreamingDataset` alone does not know how many of its samples were used."""

    counts = True

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self._taken = 0

    @property
    def _dataset(self) -> Any:
        return self.loader

    def get_state(self) -> Any:
        hosts = getattr(self.loader, "_parallel_rank_world").num_ranks  # noqa: B009 - private
        return _from_first_epoch(self.loader.state_dict(self._taken * hosts, False))

    def iterate(self) -> Iterator[Any]:
        for sample in self.loader:
            self._taken += 1
            yield sample


class _Datarax(DataAdapter):
    """The iterator of a datarax `Pipeline`."""

    def started(self) -> str | None:
        state = self.get_state()
        at, epoch = state.get("position", 0), state.get("epoch", 0)
        return f"it is at record {at} of epoch {epoch}" if at or epoch else None

    def fingerprint(self) -> dict[str, Any]:
        found = self.get_state().get("fingerprint", {})
        return {
            "batch": found.get("batch_size"),
            "records": found.get("length"),
            "epochs": found.get("num_epochs"),
            "shuffle": found.get("shuffled"),
            "remainder": _remainder(found.get("drop_last")),
        }


class _DataraxPipeline(DataAdapter):
    """The pipeline itself: its iterators write their progress into it."""

    def started(self) -> str | None:
        state = self.get_state()
        at, epoch = int(state.get("_position", 0)), int(state.get("_epoch", 0))
        return f"it is at record {at} of epoch {epoch}" if at or epoch else None


class _StepIndexed(DataAdapter):
    """Batch k is a function of k: Keras's `PyDataset`, Levanter's `DataLoader`, any sequence of
    batches.
    """

    kind: Kind = "global"
    counts = True

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self._next = 0

    def get_state(self) -> Any:
        return {"next": self._next}

    def set_state(self, state: Any) -> None:
        if type(state["next"]) is not int or state["next"] < 0:
            raise PositionError(f"There is no batch {state['next']!r:.40}.")
        self._next = state["next"]

    def iterate(self) -> Iterator[Any]:
        if hasattr(self.loader, "iter_from_step"):
            for batch in self.loader.iter_from_step(self._next):
                self._next += 1
                yield batch
            return
        while self._next < len(self.loader):
            batch = self.loader[self._next]
            self._next += 1
            yield batch

    def fingerprint(self) -> dict[str, Any]:
        return {"batches": _length(self.loader)}


class _Unopened(DataAdapter):
    """A loader whose iterators have positions, and which has none itself."""

    def get_state(self) -> Any:
        name = type(self.loader).__qualname__
        raise PositionError(
            f"A {name} has no position, its iterators have. Make one, `it = iter(loader)`, take the"
            " batches from it, and give it as `data`."
        )

    def set_state(self, state: Any) -> None:
        self.get_state()


# package -> class (or a base class of it) -> adapter
_KNOWN: dict[str, dict[str, type[DataAdapter]]] = {
    "grain": {
        "_ElasticMapDatasetIterator": _GrainElastic,
        "ElasticIterator": _GrainElastic,
        "DataLoaderIterator": _GrainDataLoader,
        "PyGrainDatasetIterator": _GrainDataLoader,
        "DatasetIterator": _Grain,
        "DataLoader": _Unopened,
        "MapDataset": _Unopened,
        "IterDataset": _Unopened,
    },
    "torchdata": {"StatefulDataLoader": _Torchdata},
    "datasets": {"IterableDataset": _HuggingFace},
    "streaming": {"StreamingDataLoader": _Mosaic, "StreamingDataset": _MosaicDataset},
    "datarax": {"PipelineIterator": _Datarax, "Pipeline": _DataraxPipeline},
    "keras": {"PyDataset": _StepIndexed},
    "levanter": {"DataLoader": _StepIndexed},
}
_registered: dict[str, Callable[[Any], DataAdapter]] = {}


def register_adapter(qualified_class_name: str, adapter: Callable[[Any], DataAdapter]) -> None:
    """Makes a loader known to `save`, `restore`, `shards` and `tracked`.

    Args:
        qualified_class_name: the module and the name of its class, `my_package.loaders.Loader`.
            Subclasses are known with it. The class is not imported.
        adapter: a subclass of `DataAdapter`, or anything that returns one for a loader.

    Raises:
        InvalidArgumentError: the name has no module, or the adapter cannot be called.
    """
    given: Any = qualified_class_name
    if not isinstance(given, str) or "." not in given:
        raise InvalidArgumentError(
            f"register_adapter needs a class's full name, 'package.module.Class', not {given!r}."
        )
    if not callable(adapter):
        raise InvalidArgumentError(
            "register_adapter needs a subclass of DataAdapter, or a function that returns one, not"
            f" {type(adapter).__name__}."
        )
    _registered[qualified_class_name] = adapter


def adapt(loader: Any) -> DataAdapter:
    """Returns the adapter of a loader: a registered one, a known one, or one by its methods.

    Raises:
        PositionError: the loader has no position that could be saved; it says what to use instead.
    """
    for cls in type(loader).__mro__:
        if registered := _registered.get(f"{cls.__module__}.{cls.__qualname__}"):
            return _checked(registered(loader))
        known = _KNOWN.get(cls.__module__.partition(".")[0], {}).get(cls.__qualname__)
        if known is not None:
            return known(loader)
    if _has(loader, "get_state", "set_state"):
        return DataAdapter(loader)
    if _has(loader, "state_dict", "load_state_dict"):
        return _StateDict(loader)
    if _has(loader, "iter_from_step") or (
        _has(loader, "__getitem__", "__len__")
        and (isinstance(loader, Sequence) or not hasattr(loader, "__iter__"))
        and not isinstance(loader, str | bytes)
    ):
        return _StepIndexed(loader)
    if isinstance(loader, types.GeneratorType):
        raise PositionError(
            "A generator cannot be resumed: nothing can set it back to a place. Give"
            " datarax_dist.data.replay(make_generator), which counts its batches and skips them at"
            " a restore, or the iterator that the generator reads from."
        )
    raise PositionError(
        f"A {type(loader).__module__}.{type(loader).__qualname__} has no position to save: it has"
        " neither get_state/set_state nor state_dict/load_state_dict. Give the loader's own"
        " iterator, datarax_dist.data.replay(factory), which counts, or tell how its position is"
        " read with datarax_dist.data.register_adapter."
    )


def _checked(adapter: DataAdapter) -> DataAdapter:
    """Returns an adapter of the user's, when it can tell what it must."""
    cls = type(adapter)
    if getattr(adapter, "starts_when_read", False) and (
        getattr(cls, "started", None) is DataAdapter.started
    ):
        raise InvalidArgumentError(
            f"{cls.__qualname__} says `starts_when_read`, and nothing about when it has started:"
            " each save would have the restored position, for ever. Give it a `started` that says"
            " so."
        )
    return adapter


def open_loader(loader: Any) -> DataAdapter:
    """Returns the adapter of a loader, or of its iterator when only that has a position.

    Raises:
        PositionError: neither has one.
    """
    try:
        adapter = adapt(loader)
    except PositionError:
        if isinstance(loader, Iterator) or not isinstance(loader, Iterable):
            raise
        return adapt(iter(loader))
    by_iterator = isinstance(adapter, _Unopened | _DataraxPipeline)
    return adapt(iter(loader)) if by_iterator else adapter


def describe_loader(adapter: DataAdapter) -> dict[str, Any]:
    """Returns a loader's fingerprint: its class, the version of a known package, and what the
    adapter says.
    """
    cls = type(adapter.loader)
    package = cls.__module__.partition(".")[0]
    found = {"class": cls.__name__, **adapter.fingerprint()}
    if package in _KNOWN:
        found["version"] = _version(package)
    return {key: _plain(value) for key, value in found.items()}


@functools.cache
def _version(package: str) -> str | None:
    name = {"streaming": "mosaicml-streaming"}.get(package, package)
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = getattr(sys.modules.get(package), "__version__", None)
        return version if isinstance(version, str) else None


def _plain(value: Any) -> Any:
    """Returns numpy's numbers as Python's, and what is no JSON as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def _has(loader: Any, *methods: str) -> bool:
    return all(callable(getattr(loader, method, None)) for method in methods)


def _from_first_epoch(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "epoch": max(state["epoch"], 0)}


def _grain_pipeline(top: Any) -> dict[str, Any]:
    """Walks a Grain pipeline from its end to its source. Only what can be read is told."""
    nodes: list[Any] = []
    waiting = [top]
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        nodes.append(node)
        waiting.extend(_parents(node))
    sources = [n for n in nodes if not _parents(n) and _length(n) is not None]
    names = ("_seed", "_seed_rng_seed", "_global_seed")
    seeds = [getattr(n, name, None) for n in nodes for name in names]
    sizes = [getattr(node, "_batch_size", None) for node in nodes]
    drops = [getattr(node, "_drop_remainder", None) for node in nodes]
    return {
        "batch": next((size for size in sizes if size is not None), None),
        "seed": [seed for seed in seeds if seed is not None] or None,
        "records": sum(_length(source) or 0 for source in sources) if sources else None,
        "shuffle": [type(n).__name__ for n in nodes if "Shuffle" in type(n).__name__],
        "remainder": _remainder(next((drop for drop in drops if drop is not None), None)),
        "pipeline": [_grain_node(node) for node in reversed(nodes)],
    }


def _parents(node: Any) -> list[Any]:
    """Returns what a node of a Grain pipeline reads from; an iterator's data set among it."""
    found = [getattr(node, "_map_parent", None), *(getattr(node, "_parents", None) or ())]
    return [parent for parent in found if parent is not None]


# What a node of a Grain pipeline, or an operation of its DataLoader, is set to. The rest of what
# they hold is a cache, or where they are. (Seeds have a name of their own in the fingerprint.)
_SETTINGS = (
    *("batch_size", "drop_remainder", "num_epochs", "reseed_each_epoch", "window_size"),
    *("start", "stop", "step", "proportions"),
)
# The same, of Grain's own classes only: users' have such names for what changes while they run.
_GRAINS_SETTINGS = (
    *("count", "cycle_length", "strict", "packer_cls", "length_struct", "num_packing_bins"),
    *("shuffle_bins", "max_sequences_per_bin", "pack_alignment_struct", "config"),
)


def _grain_node(node: Any) -> str:
    """Returns a node as text, with its settings."""
    found = {}
    for name in _SETTINGS:
        value = getattr(node, f"_{name}", getattr(node, name, None))
        if isinstance(value, bool) and name in ("start", "stop", "step"):
            continue  # no bound of a slice: a mixed iterator's `_stop` says that it has ended
        if isinstance(value, bool | int | float | tuple | list):
            found[name] = list(value) if isinstance(value, tuple | list) else value
    if type(node).__module__.partition(".")[0] == "grain":
        for name in _GRAINS_SETTINGS:
            if (setting := _setting(getattr(node, f"_{name}", None))) is not None:
                found[name] = setting
    weights = getattr(getattr(node, "_selection_map", None), "_proportions", None)
    if weights is not None:
        found["proportions"] = list(weights)
    inner = ", ".join(f"{name}={value}" for name, value in found.items())
    return f"{type(node).__name__}({inner})"


def _setting(value: Any) -> Any:
    """Returns a setting so that equal ones are equal texts; None for what is none, or not set."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, type):
        return value.__name__
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _setting(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_setting(item) for item in value]
    return value if isinstance(value, bool | int | float | str) else None


def _deep_values(state: Any, key: str) -> list[int]:
    """Returns the whole numbers that a nested state has under a key."""
    found = []
    waiting = [state]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Mapping):
            if type(item.get(key)) is int:
                found.append(item[key])
            waiting.extend(item.values())
        elif isinstance(item, list | tuple):
            waiting.extend(item)
    return found


def _length(value: Any) -> int | None:
    try:
        return len(value)
    except Exception:  # no length, or one that cannot be known yet
        return None


def _last(values: list[Any]) -> Any:
    return next((value for value in reversed(values) if value is not None), None)


def _remainder(drop: Any) -> str | None:
    return None if drop is None else ("drop" if drop else "keep")
