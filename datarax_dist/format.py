"""The on-disk format, version 1: names, records, markers, digests. Pure data; docs/format.md is the
specification.

Every JSON file of ours is canonical (sorted keys, no blanks, UTF-8), carries `format_version`, and
the crc32c of itself without that field. What is read from storage is not trusted: each parser
checks types, ranges and paths.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import google_crc32c

from datarax_dist.errors import FormatVersionError, InvalidArgumentError

__all__ = [
    "COMMIT_NAME",
    "ORBAX_COMMIT_NAME",
    "FORMAT_VERSION",
    "RUN_NAME",
    "STEP_NAME",
    "TREE_NAME",
    "CommitMarker",
    "FileEntry",
    "HostRecord",
    "InvalidRecordError",
    "LeaseRecord",
    "PositionIndex",
    "PositionRecord",
    "RestoreAttempt",
    "StepClaim",
]

FORMAT_VERSION = 1
RUN_NAME = "RUN.json"
STEP_NAME = "STEP.json"  # the first file of a step directory: whose it is
TREE_NAME = "TREE.json"  # the structure of the state and its leaves that are not arrays
LEASE_NAME = "lease"  # the directory of leases, a file for each epoch
COMMIT_NAME = "COMMIT.json"  # the last file: the step counts
ORBAX_COMMIT_NAME = "commit_success.txt"  # tells plain Orbax that a step in a bucket is whole
MAX_RECORD_BYTES = 256 << 20
MAX_POSITION_BYTES = 64 << 20  # of the JSON of one position
MAX_BLOB_BYTES = 2 << 30  # of one position
MAX_SHARDS = 1 << 20
MAX_LEASE_SECONDS = 24 * 3600.0
TALLY_MODULUS = 1 << 128
_ATTEMPT = re.compile(r"(0|[1-9][0-9]{0,17})\.(?:restoring|restored)-([0-9a-f]{16})")
_MAX_ATTEMPT_BYTES = 1 << 16
_LATEST_SECONDS = 2.0**36  # in the year 4147
_EPOCH = re.compile(r"([0-9]{10})\.json")
MAX_SMALL_BYTES = 1 << 20  # of what says whose a directory is
MAX_VALUES = 1 << 24  # of all values and separators in one file: each takes up to 72 bytes
_MOST = 1 << 63  # of a number
_MOST_TEXT = 1024
_ASIDE = re.compile(r"(0|[1-9][0-9]{0,17})\.(staging|replaced|deleting)-([0-9a-f]{16})")
_STEP = re.compile(r"0|[1-9][0-9]{0,17}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class InvalidRecordError(ValueError):
    """A file of ours that does not parse, or whose checksum is wrong."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of a step: its path relative to the step directory, size in bytes, and digest.

    The digest is `<crc32c>-<crc32>` on file systems and `<crc32c>-<md5>` in buckets, whose listings
    carry both of these. Two, because TensorStore's chunks and OCDBT's nodes end with a crc32c of
    themselves, and the crc32c of a file is blind to what such a block holds: another valid block of
    the same length gives the same sum. The crc32, of another polynomial, and the md5 are not.
    """

    path: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class StepClaim:
    """`STEP.json`: who staged this directory, written before anything else in it."""

    run: str
    step: int
    nonce: str
    hosts: int
    writer: Mapping[str, Any]
    created_at: float


@dataclass(frozen=True, slots=True)
class RestoreAttempt:
    """`<step>.restoring-<nonce>`: a restore of this step has begun.

    Attributes:
        marker: the digest of the step's `COMMIT.json`.
        hosts: how many restore.
        timeout_seconds: how long its hosts wait for each other.
    """

    run: str
    step: int
    nonce: str
    marker: str
    hosts: int
    writer: Mapping[str, Any]
    created_at: float
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class HostRecord:
    """`hosts/host_<h>-of-<n>.json`: what one host wrote, the seconds that each phase took, and
    notes on how it was written and why: "compression".
    """

    run: str
    step: int
    nonce: str
    host: int
    hosts: int
    files: Sequence[FileEntry]
    seconds: Mapping[str, float]
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VoidMarker:
    """`COMMIT.json` of a given-up save, in a bucket.

    Attributes:
        at: when it was made, in seconds since 1970.
    """

    run: str
    at: float


@dataclass(frozen=True, slots=True)
class CommitMarker:
    """`COMMIT.json`: this step is whole. `records` are the host records with their digests."""

    run: str
    step: int
    epoch: int
    nonce: str
    hosts: int
    records: Sequence[FileEntry]
    bytes: int
    items: Sequence[str]
    committed_at: float
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """`lease/<epoch>.json`: who may write to the run. Only its owner writes it again.

    Attributes:
        renewals: how often it was renewed; an owner whose number stands still is not alive.
        ttl_seconds: for how long it may stand still.
        released: its owner has ended, and will write nothing any more.
        deleting: (step, digest of its marker) of what the owner deletes in this moment.
        place: device and inode of the root, on its owner's machine; empty where there is none.
    """

    run: str
    epoch: int
    nonce: str
    owner: Mapping[str, Any]
    ttl_seconds: float
    renewals: int = 0
    released: bool = False
    deleting: Sequence[tuple[int, str]] = ()
    place: str = ""


@dataclass(frozen=True, slots=True)
class PositionIndex:
    """`data/<item>/index.json`: what the positions of an item are. `fingerprint` is tagged JSON;
    `batches` is how many were handed out, `rows` how many records each data shard gave to one; None
    when nobody counted.
    """

    kind: str
    count: int
    fingerprint: Any
    batches: int | None
    rows: int | None


@dataclass(frozen=True, slots=True)
class PositionRecord:
    """`shard_<s>-of-<V>.json`: the position of one data shard, and the fingerprint of its loader,
    both as tagged JSON. `blobs` are sizes and digests of what stands in the `.bin` beside it.
    """

    item: str
    shard: int
    count: int
    state: Any
    ended: bool
    loader: Any
    blobs: Sequence[tuple[int, str]]


def most_bytes(key: str) -> int:
    """Returns how large a file of ours of that name may be; what is larger is not read."""
    if key.rsplit("/", 1)[-1] in (RUN_NAME, STEP_NAME) or key.startswith(f"{LEASE_NAME}/"):
        return MAX_SMALL_BYTES
    if "data" not in key.split("/")[:-1]:
        return MAX_RECORD_BYTES
    return MAX_BLOB_BYTES if key.endswith(".bin") else MAX_POSITION_BYTES


def too_large(key: str, size: int | str) -> InvalidRecordError:
    """Returns the error of a file that is larger than `most_bytes`."""
    return InvalidRecordError(
        f"{key} has {size} bytes; a file of ours of that name has at most {most_bytes(key)}"
    )


def step_name(step: int) -> str:
    """Returns the directory of a step, below the root."""
    return str(step)


def parse_step_name(name: str) -> int | None:
    """Returns the step that a directory's name says, or None."""
    return int(name) if _STEP.fullmatch(name) else None


def aside_name(step: int, role: str, nonce: str) -> str:
    """Returns the name of a directory beside a step's own.

    Args:
        role: "staging", where a step is put together; "replaced", what was the step until it was
            saved again; "deleting", what is being removed.
    """
    return f"{step}.{role}-{nonce}"


def parse_aside_name(name: str) -> tuple[int, str] | None:
    """Returns step and role of a directory beside a step's own, or None when it is not one."""
    found = _ASIDE.fullmatch(name)
    return (int(found[1]), found[2]) if found else None


def lease_name(epoch: int) -> str:
    return f"{LEASE_NAME}/{epoch:010d}.json"


def parse_lease_name(name: str) -> int | None:
    """Returns the epoch that a file's name says, or None."""
    found = _EPOCH.fullmatch(name)
    return int(found[1]) if found else None


def attempt_name(step: int, nonce: str, *, has_ended: bool = False) -> str:
    """Returns the name of the file, beside a step, that says that it is being restored; or that
    this has ended, where that file could not be removed.
    """
    return f"{step}.{'restored' if has_ended else 'restoring'}-{nonce}"


def parse_attempt_name(name: str) -> tuple[int, str] | None:
    """Returns step and nonce of a restore's attempt, ended or not, or None when it is no name of
    one.
    """
    found = _ATTEMPT.fullmatch(name)
    return (int(found[1]), found[2]) if found else None


def host_record_name(host: int, hosts: int) -> str:
    return f"hosts/host_{host:05d}-of-{hosts:05d}.json"


def position_name(item: str, shard: int, count: int) -> str:
    return f"data/{item}/shard_{shard:05d}-of-{count:05d}.json"


def position_blobs_name(item: str, shard: int, count: int) -> str:
    return f"data/{item}/shard_{shard:05d}-of-{count:05d}.bin"


def position_index_name(item: str) -> str:
    return f"data/{item}/index.json"


def check_item_name(name: str) -> str:
    """Returns a data item's name when it is safe as a directory name.

    Raises:
        ValueError: otherwise.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name):
        raise ValueError(
            f"A data item's name has letters, digits, '_', '-' and '.' only, not {name!r}."
        )
    return name


def crc32c(data: Any, crc: int = 0) -> int:
    """Returns the crc32c of `data`, bytes or a numpy array, going on from `crc`."""
    return int(google_crc32c.extend(crc, data))


class Digester:
    """Computes a digest as records have it, piece by piece.

    Args:
        kind: "crc32" or "md5", or a digest: then one of its kind.
    """

    def __init__(self, kind: str = "crc32") -> None:
        self._crc = self._other = 0
        # Not against anyone who wants to deceive: FIPS builds of Python want to know.
        md5 = kind == "md5" or len(kind) == _MD5_DIGEST_LENGTH
        self._md5 = hashlib.md5(usedforsecurity=False) if md5 else None

    def update(self, data: Any) -> None:
        """Goes on with bytes, or with a numpy array of bytes."""
        self._crc = crc32c(data, self._crc)
        self._update_other(data)

    def part(self) -> Part:
        """Returns what digests the bytes that come next, if their own crc32c is wanted, too."""
        return Part(self)

    def join(self, part: Part) -> int:
        """Goes on behind a part, which has ended, and returns the crc32c of the part."""
        self._crc = crc32c_of_both(self._crc, part.crc, part.size)
        return part.crc

    def _update_other(self, data: Any) -> None:
        if self._md5 is not None:
            self._md5.update(data)
        else:
            self._other = zlib.crc32(data, self._other)

    def text(self) -> str:
        other = f"{self._other:08x}" if self._md5 is None else self._md5.hexdigest()
        return f"{self._crc:08x}-{other}"


class Part:
    """Bytes in the midst of what a `Digester` digests, each of them summed once."""

    def __init__(self, digester: Digester) -> None:
        self._digester = digester
        self.crc = self.size = 0

    def update(self, data: Any) -> None:
        self.crc = crc32c(data, self.crc)
        self.size += len(data)
        self._digester._update_other(data)


def crc32c_of_both(first: int, second: int, size: int) -> int:
    """Returns the crc32c of two blocks together, from theirs and the bytes in the second one.

    A crc is a polynomial over GF(2): that of the first block is multiplied by x for each bit of the
    second, modulo the polynomial of the crc, and the second's is added. Bits are in reversed order,
    that of the highest power last.
    """
    return _times(_power_of_x(8 * size), first) ^ second


_CRC32C_POLYNOMIAL = 0x82F63B78
_ONE = 1 << 31


def _times(one: int, other: int) -> int:
    product, bit = 0, _ONE
    while one:
        if one & bit:
            product ^= other
            one ^= bit
        bit >>= 1
        other = (other >> 1) ^ (_CRC32C_POLYNOMIAL if other & 1 else 0)
    return product


@functools.lru_cache(1024)  # the parts of a state have few sizes
def _power_of_x(exponent: int) -> int:
    product, factor = _ONE, _ONE >> 1
    while exponent:
        if exponent & 1:
            product = _times(factor, product)
        factor = _times(factor, factor)
        exponent >>= 1
    return product


_MD5_DIGEST_LENGTH = 8 + 1 + 32


def digest(data: bytes, kind: str = "crc32") -> str:
    """Returns the digest of `data` as records have it; see `Digester`."""
    digester = Digester(kind)
    digester.update(data)
    return digester.text()


def same_kind(one: str, other: str) -> bool:
    """Whether two digests can be compared."""
    return len(one) == len(other)


def tally(entries: Iterable[FileEntry], *, digests: bool) -> int:
    """Returns a number that stands for a set of files, their paths and sizes: that of two sets
    together is the sum of theirs, modulo 2**128.

    So what many hosts have written is compared with a listing without anybody reading what each of
    them says.

    Args:
        digests: whether it stands for their digests, too.
    """
    total = 0
    for entry in entries:
        told = f"{entry.path}\0{entry.size}\0{entry.digest if digests else ''}"
        total += int.from_bytes(hashlib.blake2b(told.encode(), digest_size=16).digest(), "little")
    return total % TALLY_MODULUS


def crc_text(crc: int) -> str:
    return f"{crc:08x}"


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def dumps(value: Any) -> bytes:
    """Returns canonical JSON. Non-finite floats are written as JavaScript writes them; a codec tags
    them before.
    """
    return _CANONICAL.encode(value).encode()


def seal(body: Mapping[str, Any]) -> bytes:
    """Returns a record as bytes: canonical JSON with `format_version` and its own crc32c.

    Raises:
        InvalidArgumentError: it would be larger than a reader accepts.
    """
    full = {**body, "format_version": FORMAT_VERSION}
    data = dumps({**full, "crc32c": crc_text(crc32c(dumps(full)))})
    if len(data) > MAX_RECORD_BYTES:
        raise InvalidArgumentError(
            f"A position, or the part of the state that is not arrays, takes {len(data)} bytes as"
            f" JSON; at most {MAX_RECORD_BYTES} are possible. Keep large values as arrays in"
            " `state`. Nothing was saved."
        )
    if _values(data) > MAX_VALUES:
        raise InvalidArgumentError(
            f"A position, or the part of the state that is not arrays, has more than {MAX_VALUES}"
            " values or commas. Keep long lists of numbers as arrays. Nothing was saved."
        )
    return data


def _values(data: bytes) -> int:
    """Returns at least how many values JSON has, before anything is made of it."""
    if len(data) <= MAX_VALUES:
        return 0
    return data.count(b",") + data.count(b"[") + data.count(b"{")


def unseal(data: bytes, name: str) -> dict[str, Any]:
    """Returns the body of a sealed record.

    Raises:
        InvalidRecordError: it does not parse, is not canonical, or its checksum is wrong.
        FormatVersionError: it is whole, and of a newer format version.
    """
    if len(data) > MAX_RECORD_BYTES:
        raise InvalidRecordError(f"{name} has {len(data)} bytes, more than any record of ours")
    body = _parse_object(data, name)
    stored = body.pop("crc32c", None)
    try:
        wanted = crc_text(crc32c(dumps(body)))
        canonical = dumps({**body, "crc32c": stored}) == data
    except (ValueError, RecursionError) as error:
        raise InvalidRecordError(f"{name} cannot be checked: {error}") from error
    if stored != wanted or not canonical:
        raise InvalidRecordError(
            f"{name}: checksum mismatch (stored {_clipped(stored)}, computed {wanted})"
        )
    version = body.pop("format_version", None)
    if type(version) is not int or not 1 <= version < _MOST:
        raise InvalidRecordError(f"{name} has no format version")
    if version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{name} has format version {version}; this datarax_dist reads up to {FORMAT_VERSION}."
            " Upgrade datarax_dist.",
            found=version,
            supported=FORMAT_VERSION,
        )
    return body


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"there is the key {_clipped(key)} twice")
        found[key] = value
    return found


def _parse_object(
    data: bytes, name: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> dict[str, Any]:
    if _values(data) > MAX_VALUES:
        raise InvalidRecordError(f"{name} has more values than any record of ours")
    try:
        body = json.loads(data, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise InvalidRecordError(f"{name} is not JSON: {str(error)[:200]}") from error
    if not isinstance(body, dict):
        raise InvalidRecordError(f"{name} is not a JSON object")
    return body


def _clipped(value: Any) -> str:
    """Returns what was read for a message: short, on one line, whatever it is."""
    return repr(value[:80]) if isinstance(value, str) else type(value).__name__


def _is_plain(text: str) -> bool:
    return len(text) <= _MOST_TEXT and not _CONTROL.search(text)


def safe_key(path: Any, name: str) -> str:
    """Returns `path` when it is a clean relative key that stays inside its directory."""
    if (
        not isinstance(path, str)
        or not path
        or not _is_plain(path)
        or "\\" in path
        or any(part in ("", ".", "..") for part in path.split("/"))
    ):
        raise InvalidRecordError(f"{name} names an impossible file {_clipped(path)}")
    return path


def _get(body: Mapping[str, Any], key: str, kind: type | tuple[type, ...], name: str) -> Any:
    value = body.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InvalidRecordError(f"{name}: {key!r} is {type(value).__name__}")
    if isinstance(value, int) and value < 0:
        raise InvalidRecordError(f"{name}: {key!r} is negative")
    if isinstance(value, int | float) and not -_MOST < value < _MOST:  # NaN is not, either
        raise InvalidRecordError(f"{name}: {key!r} is out of range")
    if isinstance(value, str) and not _is_plain(value):
        raise InvalidRecordError(f"{name}: {key!r} is too long, or has control characters")
    return value


def _texts(body: Mapping[str, Any], key: str, name: str) -> Mapping[str, str]:
    found: dict[str, Any] = _get(body, key, dict, name)
    return {_get({"name": k}, "name", str, name): _get(found, k, str, name) for k in found}


def _digest(row: Mapping[str, Any], name: str) -> str:
    found = str(_get(row, "digest", str, name))
    if not re.fullmatch(r"[0-9a-f]{8}-([0-9a-f]{8}|[0-9a-f]{32})", found):
        raise InvalidRecordError(f"{name}: {found[:40]!r} is no digest")
    return found


def _entries(body: Mapping[str, Any], key: str, name: str) -> tuple[FileEntry, ...]:
    entries = [_entry(row, name) for row in _get(body, key, list, name)]
    if len({entry.path for entry in entries}) != len(entries):
        raise InvalidRecordError(f"{name} names a file twice")
    return tuple(entries)


def _entry(row: Any, name: str) -> FileEntry:
    if not isinstance(row, dict):
        raise InvalidRecordError(f"{name}: a file is not told of by an object")
    path = safe_key(row.get("path"), name)
    return FileEntry(path, _get(row, "size", int, name), _digest(row, name))


class _Records(Sequence[FileEntry]):
    """Those of the records a marker names that are used here, each checked when it is asked for."""

    def __init__(self, rows: Sequence[Any], used: Iterable[int]) -> None:
        self._count = len(rows)
        self._rows = {number: rows[number] for number in used}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: Any) -> Any:
        entry = _entry(self._rows[number], COMMIT_NAME)
        if entry.path != host_record_name(number, self._count):
            raise InvalidRecordError(f"{COMMIT_NAME} does not list the record of host {number}")
        return entry


def _rows(entries: Sequence[FileEntry]) -> list[dict[str, Any]]:
    return [{"path": e.path, "size": e.size, "digest": e.digest} for e in entries]


def dump_claim(claim: StepClaim) -> bytes:
    return seal(
        {
            "run": claim.run,
            "step": claim.step,
            "nonce": claim.nonce,
            "hosts": claim.hosts,
            "writer": dict(claim.writer),
            "created_at": claim.created_at,
        }
    )


def parse_claim(data: bytes) -> StepClaim:
    body = unseal(data, STEP_NAME)
    return StepClaim(
        run=_get(body, "run", str, STEP_NAME),
        step=_get(body, "step", int, STEP_NAME),
        nonce=_get(body, "nonce", str, STEP_NAME),
        hosts=_get(body, "hosts", int, STEP_NAME),
        writer=_get(body, "writer", dict, STEP_NAME),
        created_at=_get(body, "created_at", (int, float), STEP_NAME),
    )


def dump_attempt(attempt: RestoreAttempt) -> bytes:
    return seal(
        {
            "run": attempt.run,
            "step": attempt.step,
            "nonce": attempt.nonce,
            "marker": attempt.marker,
            "hosts": attempt.hosts,
            "writer": dict(attempt.writer),
            "created_at": attempt.created_at,
            "timeout_seconds": attempt.timeout_seconds,
        }
    )


def parse_attempt(data: bytes, name: str) -> RestoreAttempt:
    """Raises `InvalidRecordError` for anything that is not the attempt of this name."""
    if len(data) > _MAX_ATTEMPT_BYTES:
        raise InvalidRecordError(f"{name} has {len(data)} bytes, more than any attempt")
    body = unseal(data, name)
    times = [
        float(_get(body, key, (int, float), name)) for key in ("created_at", "timeout_seconds")
    ]
    attempt = RestoreAttempt(
        run=_get(body, "run", str, name),
        step=_get(body, "step", int, name),
        nonce=_get(body, "nonce", str, name),
        marker=_get(body, "marker", str, name),
        hosts=_get(body, "hosts", int, name),
        writer=_get(body, "writer", dict, name),
        created_at=times[0],
        timeout_seconds=times[1],
    )
    if parse_attempt_name(name) != (attempt.step, attempt.nonce):
        raise InvalidRecordError(f"{name} is the attempt of another name")
    if not all(0 <= value < _LATEST_SECONDS for value in times):
        raise InvalidRecordError(f"{name} has no time that can be")
    return attempt


def dump_record(record: HostRecord) -> bytes:
    return seal(
        {
            "run": record.run,
            "step": record.step,
            "nonce": record.nonce,
            "host": record.host,
            "hosts": record.hosts,
            "files": _rows(record.files),
            "seconds": {key: round(value, 6) for key, value in record.seconds.items()},
            **({"notes": dict(record.notes)} if record.notes else {}),
        }
    )


def parse_record(data: bytes, name: str) -> HostRecord:
    body = unseal(data, name)
    found: dict[str, Any] = _get(body, "seconds", dict, name)
    return HostRecord(
        run=_get(body, "run", str, name),
        step=_get(body, "step", int, name),
        nonce=_get(body, "nonce", str, name),
        host=_get(body, "host", int, name),
        hosts=_get(body, "hosts", int, name),
        files=_entries(body, "files", name),
        seconds={k: _get(found, k, (int, float), name) for k in found},
        notes=_texts(body, "notes", name) if "notes" in body else {},
    )


def dump_marker(marker: CommitMarker) -> bytes:
    return seal(
        {
            "run": marker.run,
            "step": marker.step,
            "epoch": marker.epoch,
            "nonce": marker.nonce,
            "hosts": marker.hosts,
            "records": _rows(marker.records),
            "bytes": marker.bytes,
            "items": list(marker.items),
            "committed_at": marker.committed_at,
            "versions": dict(marker.versions),
        }
    )


def parse_marker(data: bytes, used: Callable[[int], Iterable[int]] | None = None) -> CommitMarker:
    """Returns a commit marker.

    Args:
        used: of how many records which ones are; the others cannot be had from the marker then. For
            bytes that another host has parsed in full: a marker names the record of each host, and
            thousands of hosts need not check, or keep, what each of the others does.
    """
    body = unseal(data, COMMIT_NAME) if used is None else _parse_object(data, COMMIT_NAME)
    rows: list[Any] = _get(body, "records", list, COMMIT_NAME)
    marker = CommitMarker(
        run=_get(body, "run", str, COMMIT_NAME),
        step=_get(body, "step", int, COMMIT_NAME),
        epoch=_get(body, "epoch", int, COMMIT_NAME),
        nonce=_get(body, "nonce", str, COMMIT_NAME),
        hosts=_get(body, "hosts", int, COMMIT_NAME),
        records=_entries(body, "records", COMMIT_NAME)
        if used is None
        else _Records(rows, used(len(rows))),
        bytes=_get(body, "bytes", int, COMMIT_NAME),
        items=tuple(
            str(_get({"items": item}, "items", str, COMMIT_NAME))
            for item in _get(body, "items", list, COMMIT_NAME)
        ),
        committed_at=_get(body, "committed_at", (int, float), COMMIT_NAME),
        versions=_texts(body, "versions", COMMIT_NAME),
    )
    if (
        marker.hosts < 1
        or len(marker.records) != marker.hosts
        or (used is None and not _are_named_by_host(marker.records))
    ):
        raise InvalidRecordError(
            f"{COMMIT_NAME} does not list one record for each of {marker.hosts} hosts"
        )
    return marker


def _are_named_by_host(records: Sequence[FileEntry]) -> bool:
    names = [host_record_name(host, len(records)) for host in range(len(records))]
    return [entry.path for entry in records] == names


def dump_void(run: str, step: int, nonce: str, at: float) -> bytes:
    """Returns a void marker: it stands where `COMMIT.json` would, in a bucket, and keeps the save
    whose directory another writer has taken from committing it after all.
    """
    return seal({"void": nonce, "run": run, "step": step, "at": at})


def parse_void(data: bytes) -> VoidMarker | None:
    """Returns None for anything else that stands there."""
    try:
        body = unseal(data, COMMIT_NAME)
        if "void" not in body:
            return None
        return VoidMarker(
            run=_get(body, "run", str, COMMIT_NAME),
            at=float(_get(body, "at", (int, float), COMMIT_NAME)),
        )
    except (InvalidRecordError, FormatVersionError):
        return None


def dump_lease(lease: LeaseRecord) -> bytes:
    return seal(
        {
            "run": lease.run,
            "epoch": lease.epoch,
            "nonce": lease.nonce,
            "owner": dict(lease.owner),
            "ttl_seconds": lease.ttl_seconds,
            "renewals": lease.renewals,
            "released": lease.released,
            "deleting": [{"step": step, "digest": digest} for step, digest in lease.deleting],
            "place": lease.place,
        }
    )


def parse_lease(data: bytes, name: str) -> LeaseRecord:
    """Raises `InvalidRecordError` for anything that is no lease."""
    body = unseal(data, name)
    deleting = []
    for row in _get(body, "deleting", list, name):
        if not isinstance(row, dict):
            raise InvalidRecordError(f"{name}: a deletion that is no object")
        deleting.append((int(_get(row, "step", int, name)), _digest(row, name)))
    return LeaseRecord(
        run=_get(body, "run", str, name),
        epoch=_get(body, "epoch", int, name),
        nonce=_get(body, "nonce", str, name),
        owner=_get(body, "owner", dict, name),
        ttl_seconds=min(_get(body, "ttl_seconds", (int, float), name), MAX_LEASE_SECONDS),
        renewals=_get(body, "renewals", int, name),
        released=body.get("released") is True,
        deleting=tuple(deleting),
        place=str(body.get("place", "")),
    )


def dump_run(run: str, created_at: float) -> bytes:
    return seal({"run": run, "created_at": created_at})


def parse_run(data: bytes) -> str:
    return str(_get(unseal(data, RUN_NAME), "run", str, RUN_NAME))


def dump_metadata(metadata: Mapping[str, Any]) -> bytes:
    """Returns the user's metadata as Orbax's JSON item has it: neither canonical nor sealed.

    Raises:
        InvalidArgumentError: it would be larger than a reader accepts.
    """
    data = json.dumps(metadata).encode()
    if len(data) > MAX_RECORD_BYTES or _values(data) > MAX_VALUES:
        raise InvalidArgumentError(
            f"The metadata takes {len(data)} bytes as JSON; at most {MAX_RECORD_BYTES}, and"
            f" {MAX_VALUES} values, are possible. Keep large values in `state`. Nothing was saved."
        )
    return data


def parse_metadata(data: bytes, name: str) -> dict[str, Any]:
    """Raises `InvalidRecordError` for anything that is no JSON object, or has a key twice."""
    return _parse_object(data, name, _unique)


def _check_size(data: bytes, name: str) -> None:
    if len(data) > MAX_POSITION_BYTES:
        raise InvalidRecordError(f"{name} has {len(data)} bytes, more than any position")


def parse_position_index(data: bytes, name: str) -> PositionIndex:
    """Raises `InvalidRecordError` for anything that is no index."""
    _check_size(data, name)
    body = unseal(data, name)
    kind, count = _get(body, "kind", str, name), _get(body, "count", int, name)
    if kind not in ("global", "shards", "host") or not 1 <= count <= MAX_SHARDS:
        raise InvalidRecordError(f"{name}: {count} positions of the kind {kind[:20]!r}")
    numbers = [
        None if body.get(key) is None else _get(body, key, int, name) for key in ("batches", "rows")
    ]
    return PositionIndex(kind, count, body.get("fingerprint"), *numbers)


def parse_position(data: bytes, name: str) -> PositionRecord:
    """Raises `InvalidRecordError` for anything that is no position."""
    _check_size(data, name)
    body = unseal(data, name)
    blobs = []
    for row in _get({"blobs": body.get("blobs", [])}, "blobs", list, name):
        if not isinstance(row, dict):
            raise InvalidRecordError(f"{name}: a blob that is no object")
        blobs.append((int(_get(row, "size", int, name)), _digest(row, name)))
    return PositionRecord(
        item=_get(body, "item", str, name),
        shard=_get(body, "shard", int, name),
        count=_get(body, "count", int, name),
        state=body.get("state"),
        ended=body.get("ended") is True,
        loader=body.get("loader"),
        blobs=tuple(blobs),
    )
