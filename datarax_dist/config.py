"""Settings, and the policies that say when to save and what to keep. Pure values: nothing here
acts.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from datarax_dist.errors import InvalidArgumentError, mask

__all__ = ["KeepPolicy", "Options", "SavePolicy", "every_n_steps", "every_steps", "latest"]

Compression = Literal["auto", "none", "zstd"]
VerifyLevel = Literal["marker", "sizes", "full"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How a `Checkpointer` works. Every default is safe.

    Attributes:
        compression: "none" stores arrays as they are, "zstd" compresses them. "auto", the default,
            compresses those of 1 MiB or more of which samples have shown that this makes a save
            faster by a fifth or more, on a storage as fast as it was in the saves before. So the
            first save compresses nothing. What was done, and why, is in the host records;
            `datarax-dist show` tells it.
        verify_on_restore: what is checked before a step is taken. "marker": the marker, the host
            records, and every byte of positions, structure and metadata, which are small. "sizes":
            also that every array file is there with its size. "full", the default: also every byte
            of the array files. Array data carries a checksum of its own that is checked at every
            level while it is read. In a bucket "full" compares the checksums that the bucket keeps
            of each object, which takes one listing; `datarax-dist verify` reads every byte.
        exchange_timeout_seconds: how long hosts wait for each other in one agreement (default 600);
            in the one that takes the run, for as long as the run may be waited for besides.
        peer_silence_seconds: a host whose process has shown no sign of life for so long is named,
            and not waited for any more (default 10). More than some library of the job may keep
            Python from running.
        save_timeout_seconds: how long the background part of one save may take (default 1800).
        restore_timeout_seconds: how long hosts wait for each other's verifying and loading, and how
            long reading the arrays of a bucket may take (default 1800).
        restore_concurrent_bytes: bytes of arrays that Orbax reads at the same time on one host, of
            a bucket or of a compressed array; None leaves it to Orbax. What is not compressed is
            read from files into the memory where it stays, or, on another mesh, through 4 MiB for
            each thread.
        single_replica_restore: whether hosts that hold the same values of an array (replicas) read
            a part each, which their devices then pass on (default False: each host reads all that
            it holds). The same on every host.
        save_concurrent_bytes: bytes of arrays that Orbax writes at the same time on one host, to a
            bucket or compressed; None does not limit. What is written to files as it is needs no
            memory beside its own. An array that alone takes more than one of these limits is an
            error, before anything is written.
        lease_ttl_seconds: how long the lease of this job lasts without a sign of life (default 60,
            from a second to a day): a job that crashed on another machine is followed by the next
            one after that time, and a job that stood still for longer may have lost the run. All
            objects of a process that are open for one root share a lease: the first one's counts.
        lease_wait_seconds: how long the first `save` waits for another job that holds the run and
            is alive (default 0: it fails at once). The longest of those objects' counts.
        batches_per_step: how many batches one step takes (default 1), for all data items or {name:
            number}. `save` checks that batches handed out keep pace with the steps, where they are
            counted (`shards`, `tracked`): a loader that was read ahead would lose records at the
            next restore. None, for all or for a name, leaves it unchecked.
    """

    compression: Compression = "auto"
    verify_on_restore: VerifyLevel = "full"
    exchange_timeout_seconds: float = 600.0
    peer_silence_seconds: float = 10.0
    save_timeout_seconds: float = 1800.0
    restore_timeout_seconds: float = 1800.0
    restore_concurrent_bytes: int | None = None
    single_replica_restore: bool = False
    save_concurrent_bytes: int | None = None
    lease_ttl_seconds: float = 60.0
    lease_wait_seconds: float = 0.0
    batches_per_step: int | Mapping[str, int | None] | None = 1

    def __post_init__(self) -> None:
        _one_of("compression", self.compression, ("auto", "none", "zstd"))
        _one_of("verify_on_restore", self.verify_on_restore, ("marker", "sizes", "full"))
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name.endswith("_seconds"):
                _check_seconds(item.name, value)
            if item.name.endswith("_bytes") and value is not None:
                _positive(f"Options.{item.name}", value, ", or None")
        if not isinstance(self.single_replica_restore, bool):
            raise InvalidArgumentError(
                "Options.single_replica_restore must be True or False, not"
                f" {self.single_replica_restore!r}."
            )
        rates: Any = self.batches_per_step
        for rate in rates.values() if isinstance(rates, Mapping) else [rates]:
            if rate is not None:
                _positive("Options.batches_per_step", rate)


def _check_seconds(name: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if name == "lease_ttl_seconds":
        limits, is_within = "from 1 to 86400", is_number and 1 <= value <= 24 * 3600
    elif name == "lease_wait_seconds":
        limits, is_within = "of 0 or more", is_number and 0 <= value < math.inf
    else:
        limits, is_within = "greater than 0", is_number and 0 < value < math.inf
    if not is_within:
        raise InvalidArgumentError(
            f"Options.{name} must be a number of seconds {limits}, not {value!r}: nothing may wait"
            " for ever."
        )


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InvalidArgumentError(
            f"Options.{name} must be one of {', '.join(allowed)}, not {value!r}."
        )


@runtime_checkable
class SavePolicy(Protocol):
    """Says whether this step is to be saved. Must give the same answer on every host."""

    def should_save(self, step: int) -> bool: ...


@runtime_checkable
class KeepPolicy(Protocol):
    """Says which of the committed steps to keep; the others are deleted."""

    def keep(self, steps: Sequence[int]) -> set[int]: ...


def check_policies(*, save_when: Any = None, keep: Any = None) -> None:
    """Raises `InvalidArgumentError` for what is no policy of its kind; None is none at all."""
    if save_when is not None:
        _check_save_policy(save_when)
    if keep is not None:
        _check_keep_policy(keep)


def _check_save_policy(policy: Any) -> None:
    if not isinstance(policy, SavePolicy):
        raise InvalidArgumentError(
            f"save_when must be a policy, datarax_dist.every_steps(100) say, not {policy!r}."
            + (" That is one for keep=." if isinstance(policy, KeepPolicy) else "")
        )


def _check_keep_policy(policy: Any) -> None:
    if not isinstance(policy, KeepPolicy):
        raise InvalidArgumentError(
            f"keep must be a policy, datarax_dist.latest(3) say, not {policy!r}."
            + (" That is one for save_when=." if isinstance(policy, SavePolicy) else "")
        )


def _any_of(*policies: SavePolicy) -> _AnyOf:
    _check_save_policy(policies[-1])
    return _AnyOf(policies)


def _union(*policies: KeepPolicy) -> _Union:
    _check_keep_policy(policies[-1])
    return _Union(policies)


@dataclass(frozen=True, slots=True)
class _AnyOf:
    policies: tuple[SavePolicy, ...]

    def should_save(self, step: int) -> bool:
        return any(policy.should_save(step) for policy in self.policies)

    def __or__(self, other: SavePolicy) -> _AnyOf:
        return _any_of(*self.policies, other)


@dataclass(frozen=True, slots=True)
class _EverySteps:
    steps: int

    def should_save(self, step: int) -> bool:
        return step % self.steps == 0

    def __or__(self, other: SavePolicy) -> _AnyOf:
        return _any_of(self, other)


@dataclass(frozen=True, slots=True)
class _Union:
    policies: tuple[KeepPolicy, ...]

    def keep(self, steps: Sequence[int]) -> set[int]:
        return set[int]().union(*(policy.keep(steps) for policy in self.policies))

    def __or__(self, other: KeepPolicy) -> _Union:
        return _union(*self.policies, other)


@dataclass(frozen=True, slots=True)
class _Latest:
    count: int

    def keep(self, steps: Sequence[int]) -> set[int]:
        return set(sorted(steps)[-self.count :])

    def __or__(self, other: KeepPolicy) -> _Union:
        return _union(self, other)


@dataclass(frozen=True, slots=True)
class _EveryNSteps:
    steps: int

    def keep(self, steps: Sequence[int]) -> set[int]:
        return {step for step in steps if step % self.steps == 0}

    def __or__(self, other: KeepPolicy) -> _Union:
        return _union(self, other)


def _positive(name: str, value: Any, other: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise InvalidArgumentError(
            f"{name} needs a whole number of 1 or more{other}, not {value!r}."
        )
    return int(value)


def every_steps(steps: int) -> SavePolicy:
    """Saves each step that is a multiple of `steps`.

    >>> every_steps(10).should_save(20), every_steps(10).should_save(21)
    (True, False)
    """
    return _EverySteps(_positive("every_steps", steps))


def latest(count: int) -> KeepPolicy:
    """Keeps the newest `count` committed steps.

    >>> sorted(latest(2).keep([1, 5, 9]))
    [5, 9]
    """
    return _Latest(_positive("latest", count))


def every_n_steps(steps: int) -> KeepPolicy:
    """Keeps every committed step that is a multiple of `steps`.

    >>> sorted((latest(1) | every_n_steps(4)).keep([4, 6, 8, 9]))
    [4, 8, 9]
    """
    return _EveryNSteps(_positive("every_n_steps", steps))


def check_root(root: str | os.PathLike[str]) -> str:
    """Returns a root in its one spelling, an absolute local path or `gs://bucket/prefix`; refuses
    what would end up somewhere else.

    Raises:
        InvalidArgumentError: for a relative path and for any URL that this version cannot write to.
    """
    text: Any = os.fspath(root) if isinstance(root, os.PathLike) else root
    if not isinstance(text, str) or not text:
        raise InvalidArgumentError(f"The root must be a path, not {root!r}.")
    scheme, separator, rest = text.partition("://")
    if separator:
        if scheme == "gs":
            return _check_bucket(text, rest)
        if scheme == "file":
            raise InvalidArgumentError(
                "file:// is not supported; give the path itself:"
                f" /{mask(text).removeprefix('file://').lstrip('/')}"
            )
        raise InvalidArgumentError(
            f"{scheme}:// is not supported, so nothing was written. A root is a path on a local or"
            " shared file system, or gs://BUCKET/PREFIX."
        )
    if not os.path.isabs(text):
        _refuse_a_broken_url(text)
        raise InvalidArgumentError(
            "The root must be absolute, so that all hosts mean the same place. Use"
            f" {os.path.abspath(os.path.expanduser(text))!r}."
        )
    # TensorStore takes a backslash for a slash: the arrays would be in another directory. Bytes
    # that are no text (surrogates) it takes for nothing.
    _without(text, text, r"[\0\ud800-\udfff]")
    path = os.path.normpath(_without(text, text, r"\\|\[[^/]*\]|(?<=/)(?:gs|s3):/"))
    return f"/{path.lstrip('/')}"  # two slashes stay two, which POSIX leaves open


def check_typed_root(text: str) -> str:
    """Does as `check_root` for a root on the command line, which may be relative."""
    if not text or "://" in text:
        return check_root(text)
    if not os.path.lexists(text):
        _refuse_a_broken_url(text)
    return check_root(os.path.abspath(text))


def _refuse_a_broken_url(text: str) -> None:
    if bucket := re.match(r"(gs|s3|az|hf):/*([^/].*)", text):
        raise InvalidArgumentError(
            "The root must be absolute, so that all hosts mean the same place. Use"
            f" {mask(f'{bucket[1]}://{bucket[2]}')!r}."
        )


def _without(root: str, path: str, pattern: str) -> str:
    """Returns a path in which nothing is as in the pattern."""
    if found := re.search(pattern, path):
        raise InvalidArgumentError(
            f"{mask(root)!r} has {found[0]!r} in its path. What writes the arrays does not take"
            " that for a part of a name, so nothing was written. Choose another root."
        )
    return path


def is_bucket(root: str) -> bool:
    """Whether a root is in a bucket, rather than on a file system."""
    return root.startswith("gs://")


def _check_bucket(root: str, rest: str) -> str:
    bucket, _, prefix = rest.partition("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", bucket):
        shown = f"gs://***@{rest.rpartition('@')[2]}" if "@" in rest else root  # a password
        raise InvalidArgumentError(
            f"{shown!r} names no bucket. A root in a bucket is gs://BUCKET/PREFIX; names of buckets"
            " have 3 or more lower-case letters, digits, '-', '_' and '.'."
        )
    parts = prefix.rstrip("/").split("/") if prefix.rstrip("/") else []
    if any(part in ("", ".", "..") for part in parts) or not prefix.isprintable():
        raise InvalidArgumentError(
            f"{root!r} has an empty part, '.', '..' or a control character in its path; nothing was"
            " written."
        )
    # TensorStore parses a URL, which ends at these, or decodes them; Orbax globs in brackets.
    _without(root, prefix, r"[?#%]|\[[^/]*\]")
    return "/".join([f"gs://{bucket}", *parts])
