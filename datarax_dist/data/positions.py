"""Positions as files of a step: captured and encoded when `save` is called, checked against
today's loaders and hosts when they are restored.

`data/<item>/index.json` says what kind of positions these are, how many, and the fingerprint of the
item; `shard_<s>-of-<V>.json` is the position of one data shard, with the fingerprint of its loader;
`.bin` beside it holds its large bytes. docs/format.md is the specification.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datarax_dist import codec
from datarax_dist import format as fmt
from datarax_dist.data.adapters import adapt
from datarax_dist.data.memory import Position, remembered
from datarax_dist.data.ownership import Ownership
from datarax_dist.data.streams import Loader, Source
from datarax_dist.errors import (
    CheckpointError,
    InvalidArgumentError,
    PositionError,
    UnsupportedLeafError,
    cause,
    mask,
)

__all__ = [
    "Captured",
    "Pace",
    "Plan",
    "apply_positions",
    "capture",
    "named_loaders",
    "plan_restore",
]


@dataclass(frozen=True, slots=True)
class Captured:
    """The positions of one host.

    Attributes:
        files: key below the step -> content, for the positions that this host writes.
        indexes: the same, for what the primary writes.
        agreement: what hosts must agree on.
        held: item -> data shard -> digest, for the positions that this host reads.
        written: item -> the data shards whose position this host writes.
        counts: item -> how many positions make it whole.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    indexes: Mapping[str, bytes] = field(default_factory=dict)
    agreement: Mapping[str, Any] = field(default_factory=dict)
    held: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    written: Mapping[str, Sequence[int]] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)


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


def _source(loader: Any) -> Source:
    """Returns what the positions of a loader are read from, as the user gave it."""
    outer = loader.outer if isinstance(loader, Source) else remembered(loader).outer
    if outer is not None:
        raise PositionError(
            f"{outer} was put around this {type(loader).__qualname__}, and reads it, ahead of the"
            f" steps perhaps. The position of the batches you take is that of {outer}: give what"
            " that returned to save and restore; or make the loader anew, if that was to try it."
        )
    if isinstance(loader, Source):
        return loader
    if isinstance(loader, list | tuple):
        raise PositionError(
            f"`data` is a {type(loader).__name__}; give one loader, or {{name: loader}}. For a list"
            " of batches give `it = datarax_dist.data.tracked(batches, 0)`, and take them from it."
        )
    adapter = adapt(loader)
    if adapter.counts:
        raise PositionError(
            f"A {type(loader).__qualname__} does not know how far it was used. Take the batches"
            " from `it = datarax_dist.data.tracked(loader, 0)`, and give that as `data`."
        )
    return Loader(adapter, remembered(loader))


def _placed(source: Source, host: int, hosts: int) -> tuple[int, Ownership]:
    """Returns how many positions the item has, and which of them this host reads and writes."""
    if source.kind == "host":
        return hosts, Ownership((host,), frozenset((host,)))
    if source.kind == "global":
        return 1, Ownership((0,), frozenset((0,) if host == 0 else ()))
    return source.count, source.ownership()


def capture(data: Any, host: int, hosts: int, step: int = 0, pace: Pace | None = None) -> Captured:
    """Reads and encodes the position of every loader, now.

    Raises:
        PositionError: a loader has no position, or has handed out another number of batches than
            the steps say.
        UnsupportedLeafError: a position has something that cannot be written; it is named.
    """
    captured = Captured({}, {}, {}, {}, {}, {})
    items = named_loaders(data)
    if pace is not None and items:
        pace.check_names(items)
    for name, loader in items.items():
        source = _source(loader)
        try:
            batches = _capture_item(captured, name, source, host, hosts)
        except UnsupportedLeafError as error:
            raise UnsupportedLeafError(f"Data item {name!r}: {error}", path=error.path) from None
        if pace is not None:
            pace.check(name, source, batches, step)
    return captured


def _capture_item(to: Any, name: str, source: Source, host: int, hosts: int) -> int | None:
    """Returns how many batches were handed out."""
    snapshot, described = source.snapshot(), source.loader_fingerprints()
    positions = snapshot.positions
    count, owned = _placed(source, host, hosts)
    if source.kind == "host":  # one position, whatever it is called on this host
        positions = dict(zip(owned.reads, positions.values(), strict=True))
        described = dict(zip(owned.reads, described.values(), strict=True))
    index = {
        "kind": source.kind,
        "count": count,
        "fingerprint": _encode(source.fingerprint(), f"{name}'s fingerprint"),
        "batches": snapshot.batches,
        "rows": snapshot.rows,
    }
    to.indexes[fmt.position_index_name(name)] = fmt.seal(index)
    to.agreement[f"the number of batches that {name!r} has handed out"] = index.pop("batches")
    to.agreement[f"the number of records in a batch of each data shard of {name!r}"] = index.pop(
        "rows"
    )
    to.agreement[f"data item {name!r}"] = index
    held = to.held[name] = {}
    for shard, position in positions.items():
        blobs = position.state.blobs
        body = {
            "item": name,
            "shard": shard,
            "count": count,
            "state": position.state.value,
            "loader": _encode(described[shard], f"{name}'s fingerprint"),
            **({"ended": True} if position.ended else {}),
            **({"blobs": [_blob_entry(blob) for blob in blobs]} if blobs else {}),
        }
        data = fmt.seal(body)
        if len(data) > fmt.MAX_POSITION_BYTES:
            raise PositionError(
                f"A position of {name!r} takes {len(data)} bytes as JSON; at most"
                f" {fmt.MAX_POSITION_BYTES} are possible. Make long lists of numbers arrays, or"
                " keep them in `state`."
            )
        held[shard] = fmt.crc_text(fmt.crc32c(data))
        if shard in owned.writes:
            to.files[fmt.position_name(name, shard, count)] = data
            if blobs:
                to.files[fmt.position_blobs_name(name, shard, count)] = _joined(blobs)
    to.written[name] = sorted(owned.writes)
    to.counts[name] = count
    return snapshot.batches


def _encode(value: Mapping[str, Any], what: str) -> Any:
    try:
        return {key: codec.encode(value[key], key) for key in sorted(value)}
    except codec.EncodeError as error:
        raise UnsupportedLeafError(f"{what} cannot be written: {error}", path=error.path) from None


def _blob_entry(blob: bytes) -> dict[str, Any]:
    return {"size": len(blob), "digest": fmt.digest(blob)}


def _joined(blobs: Sequence[bytes]) -> bytes:
    size = sum(map(len, blobs))
    if size > fmt.MAX_BLOB_BYTES:
        raise PositionError(
            f"The position of one data shard has {size} bytes of arrays; at most"
            f" {fmt.MAX_BLOB_BYTES} are possible. Keep large values in `state`."
        )
    return b"".join(blobs)


class Pace:
    """Whether batches keep pace with steps, for the loaders of one `Checkpointer`.

    Batches handed out, minus what the steps took, must not grow: then something reads ahead, and a
    restore would lose what it has read. (It may fall. A step without a batch loses nothing.)

    Args:
        batches_per_step: how many batches one step takes, of all items or by name; None for what is
            not checked.
    """

    def __init__(self, batches_per_step: int | Mapping[str, int | None] | None) -> None:
        self._rates = batches_per_step
        self._offsets: weakref.WeakKeyDictionary[Source, int] = weakref.WeakKeyDictionary()

    def _offset(self, name: str, batches: int | None, step: int) -> int | None:
        rate = self._rates.get(name, 1) if isinstance(self._rates, Mapping) else self._rates
        return None if rate is None or batches is None else batches - rate * step

    def check_names(self, names: Iterable[str]) -> None:
        """Raises `InvalidArgumentError` for a rate of an item that there is not."""
        if isinstance(self._rates, Mapping) and (unknown := set(self._rates).difference(names)):
            raise InvalidArgumentError(
                f"Options(batches_per_step=...) names {sorted(unknown)!r}; the data items are"
                f" {sorted(names)!r}."
            )

    def check(self, name: str, source: Source, batches: int | None, step: int) -> None:
        """Raises `PositionError` when more batches were handed out than the steps say."""
        offset = self._offset(name, batches, step)
        if offset is None:
            return
        known = self._offsets.setdefault(source, offset)
        if offset > known:
            raise PositionError(
                f"Data item {name!r} has handed out more batches than the steps say: {batches} at"
                f" step {step}, which is {offset - known} too many. Were batches read ahead"
                " or skipped? Read ahead with datarax_dist.data.tracked(loader, depth), which keeps"
                " the position right. If a step takes another number of batches, say so:"
                f" Options(batches_per_step={{{name!r}: N}}), or None to leave it unchecked."
            )

    def restored(self, name: str, source: Source, step: int, batches: int | None) -> None:
        """Begins at what a restored step says."""
        self._offsets.pop(source, None)
        if (offset := self._offset(name, batches, step)) is not None:
            self._offsets[source] = offset


TWICE = (
    "%s: step %d has a position of %r, which restore() was not asked for; step %d is saved with a"
    " loader that goes on from where it stood. Records come twice, or never, unless the data was to"
    " begin anew; restore(data=...) sets it back."
)


class Unasked:
    """Data items whose positions in a restored step nobody has asked for, and that were neither
    restored nor saved otherwise.
    """

    def __init__(self) -> None:
        self._placed: set[str] = set()
        self._left: dict[str, int] = {}

    def restored(self, names: Iterable[str], left: Iterable[str], step: int) -> None:
        """Takes note of a restore: what was asked for, and what was not."""
        self._placed.update(names)
        self._left = dict.fromkeys(set(left) - self._placed, step)

    def among(self, names: Iterable[str]) -> dict[str, int]:
        """Returns those of the items that were not asked for, with the step that was restored."""
        return {name: self._left[name] for name in names if name in self._left}

    def saved(self, names: Iterable[str]) -> None:
        """Takes note of a save that is committed: from now on it is what counts."""
        self._placed.update(names)
        self._left = {name: step for name, step in self._left.items() if name not in self._placed}


@dataclass(frozen=True, slots=True)
class Plan:
    """Which positions this host needs, and what is to be done with them.

    Attributes:
        sources: item -> what its positions are set on.
        wanted: item -> data shard -> the number of positions that the item has.
        batches: item -> how many batches were handed out before, and how many records each data
            shard gave to one, where that is known.
        changes: what differs from the fingerprint, and is allowed: name -> (saved, now).
        left: items of the step that nobody asks for.
    """

    sources: Mapping[str, Source]
    wanted: Mapping[str, Mapping[int, int]]
    batches: Mapping[str, tuple[int | None, int | None]]
    allowed: frozenset[str]
    changes: dict[str, tuple[Any, Any]]
    left: tuple[str, ...]

    def spoil(self) -> None:
        """Has nothing taken from the loaders, nor saved of them: of a restore that has failed, here
        or on another host, where they stand is not known, or not what all hosts have.
        """
        for source in self.sources.values():
            source.poison(
                "A restore into it has failed, and where it stands now is not known. Make the"
                " loader anew, and restore into that."
            )


def plan_restore(
    data: Any,
    items: Sequence[str],
    read: Callable[[str], bytes],
    host: int,
    hosts: int,
    allow: Sequence[str] = (),
) -> Plan:
    """Checks that the positions of a step fit today's loaders and hosts; reads the indexes only.

    Args:
        allow: differences of fingerprints that are no error, `item.key`.

    Raises:
        PositionError: they do not fit; the message names both sides and the ways out.
    """
    if isinstance(allow, str) or not all(isinstance(name, str) for name in allow):
        raise InvalidArgumentError(
            f"allow_data_changes is a list of names, ['data.seed'], say, not {allow!r}."
        )
    loaders = named_loaders(data)
    saved = [item.removeprefix("data/") for item in items if item.startswith("data/")]
    left = tuple(name for name in saved if name not in loaders)
    plan = Plan({}, {}, {}, frozenset(allow), {}, left)
    for name, loader in loaders.items():
        if name not in saved:
            out = f"data={{{left[0]!r}: loader}} takes that one; with" if left else "With"
            raise PositionError(
                f"The step has no position of {name!r}; it has"
                f" {', '.join(map(repr, saved)) or 'none at all'}. {out} data=None the state alone"
                " is restored, and the data starts anew."
            )
        source = _source(loader)
        key = fmt.position_index_name(name)
        index = fmt.parse_position_index(read(key), key)
        _check_kind(name, index, source, hosts)
        if reason := source.refusal():
            raise PositionError(
                f"{name!r} cannot be set to a position any more: {reason}. Make a new loader, and"
                " restore into that before anything is taken from it."
            )
        _, owned = _placed(source, host, hosts)
        if index.fingerprint is not None and not isinstance(index.fingerprint, dict):
            raise fmt.InvalidRecordError(f"{key}: a fingerprint that is no object")
        then = index.fingerprint or {}
        now = _encode(source.fingerprint(), f"{name}'s fingerprint")
        _check_changes(plan, name, then, now, sorted({*then, *now}))
        plan.sources[name] = source  # type: ignore[index]
        plan.wanted[name] = dict.fromkeys(owned.reads, index.count)  # type: ignore[index]
        plan.batches[name] = index.batches, index.rows  # type: ignore[index]
    return plan


def _check_kind(name: str, index: fmt.PositionIndex, source: Source, hosts: int) -> None:
    kind, count = index.kind, index.count
    if source.kind != kind:
        was = {
            "host": f"a loader whose position is opaque, by {count} hosts",
            "global": "a loader whose position means the same on every host",
            "shards": f"{count} data shards",
        }[kind]
        out = {
            "host": "Restore into the same kind of loader",
            "global": "Restore into the same kind of loader",
            "shards": f"Restore into datarax_dist.data.shards(factory, {count})",
        }[kind]
        raise PositionError(
            f"{name!r} was saved as {was}; what it is to be restored into has positions of the kind"
            f" {source.kind!r}. {out}, or with data=None, which starts the data anew."
        )
    if kind == "shards" and count != source.count:
        raise PositionError(
            f"{name!r} was saved with {count} data shards, the loader has {source.count}. V is"
            f" fixed for a run: restore into shards(factory, {count}), or with data=None, which"
            " starts the data anew."
        )
    if kind == "host" and count != hosts:
        raise PositionError(
            f"{name!r} was saved by {count} hosts, this job has {hosts}, and its loader's position"
            f" is opaque: nobody knows how to divide it. Restore on {count} hosts; or restore with"
            " data=None, which starts the data anew; and save datarax_dist.data.shards(factory, V)"
            " from now on, which goes on with other numbers of hosts."
        )


def _check_changes(
    plan: Plan, item: str, then: Mapping[str, Any], now: Mapping[str, Any], keys: Sequence[str]
) -> None:
    """Refuses what differs and is not allowed; keeps what is. Both fingerprints are tagged JSON."""
    unlike = {
        f"{item}.{key}": (_decoded(then.get(key)), _decoded(now.get(key)))
        for key in keys
        if fmt.dumps(then.get(key)) != fmt.dumps(now.get(key))
    }
    refused = {key: pair for key, pair in unlike.items() if key not in plan.allowed}
    if refused:
        lines = "".join(
            f"\n  {key}: saved {_short(then, now)}, now {_short(now, then)}"
            for key, (then, now) in refused.items()
        )
        raise PositionError(
            f"The pipeline of {item!r} is not the one whose position was saved:{lines}\nMake it the"
            " same, or, if the position means the same all the same,"
            f" restore(..., allow_data_changes={sorted(refused)!r})."
        )
    plan.changes.update(unlike)


def _decoded(value: Any) -> Any:
    try:
        return codec.decode(value)
    except codec.DecodeError:
        return value


def _short(value: Any, other: Any) -> str:
    """Returns a value as text; of a long list that which differs from another one."""
    text = repr(value)
    if len(text) > 200 and isinstance(value, list) and isinstance(other, list):
        if len(value) == len(other):
            value = [mine for mine, theirs in zip(value, other, strict=True) if mine != theirs]
        text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def decode_positions(plan: Plan, read: Callable[[str], bytes]) -> dict[str, dict[int, Position]]:
    """Reads and decodes the positions of this host.

    Raises:
        InvalidRecordError: a file is damaged.
        PositionError: a position cannot be read, by this program or by any; or a loader is not the
            one whose position it is, each difference named.
    """
    found: dict[str, dict[int, Position]] = {}
    for name, wanted in plan.wanted.items():
        source = plan.sources[name]
        now = source.loader_fingerprints()
        found[name] = {}
        for number, (shard, count) in enumerate(wanted.items()):
            position, then = _read_position(name, shard, count, read)
            found[name][shard] = position
            mine = now[shard] if shard in now else list(now.values())[number]
            # A key that only one side has is one that another version of an adapter tells.
            keys = sorted({*then} & {*mine})
            _check_changes(plan, name, then, _encode(mine, f"{name}'s fingerprint"), keys)
    return found


def _read_position(
    name: str, shard: int, count: int, read: Callable[[str], bytes]
) -> tuple[Position, dict[str, Any]]:
    key = fmt.position_name(name, shard, count)
    record = fmt.parse_position(read(key), key)
    if (record.item, record.shard, record.count) != (name, shard, count):
        raise fmt.InvalidRecordError(f"{key} is the position of another shard")
    blobs: list[bytes] = []
    if record.blobs:
        whole = fmt.position_blobs_name(name, shard, count)
        data, at = read(whole), 0
        if len(data) != sum(size for size, _ in record.blobs):
            raise fmt.InvalidRecordError(f"{whole} has {len(data)} bytes, not those of its blobs")
        for size, digest in record.blobs:
            blobs.append(data[at : at + size])
            at += size
            if fmt.digest(blobs[-1]) != digest:
                raise fmt.InvalidRecordError(f"{whole}: a blob is not as recorded")
    state = codec.Encoded(record.state, tuple(blobs))
    try:
        codec.unpack(state)  # what cannot be read is found before any loader is changed
    except codec.DecodeError as error:
        raise PositionError(f"{key} cannot be read: {error}") from error
    then = record.loader if isinstance(record.loader, dict) else {}
    return Position(state, record.ended), then


def apply_positions(
    plan: Plan,
    positions: Mapping[str, Mapping[int, Position]],
    step: int = 0,
    pace: Pace | None = None,
) -> None:
    """Sets the loaders to their positions.

    Raises:
        PositionError: a loader refused its position; it says what. None of the loaders has a
            position after that: some may be set, others not.
    """
    try:
        for name, source in plan.sources.items():
            batches, rows = plan.batches[name]
            if f"{name}.global_batch" in plan.changes:
                rows = None  # there are others now, as allowed
            _apply(name, source, positions[name], batches, rows)
            if pace is not None:
                pace.restored(name, source, step, batches)
    except BaseException:
        plan.spoil()
        raise


def _apply(
    name: str,
    source: Source,
    positions: Mapping[int, Position],
    batches: int | None,
    rows: int | None,
) -> None:
    try:
        source.apply(positions, batches, rows)
    except CheckpointError:
        raise
    except Exception as error:
        raise PositionError(
            f"The loader of {name!r} refused its position with {type(error).__name__}:"
            f" {mask(str(error))}"
            "\nIts data or its settings are not those of the saved one. Make it the same again; and"
            " make new loaders before the next try, this one may have been changed."
        ) from cause(error)
