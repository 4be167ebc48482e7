"""What one host saves, and who writes its arrays: the ports of the save protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from datarax_dist.errors import InvalidArgumentError

__all__ = ["ArrayWrite", "ArrayWriter", "SaveReport", "SaveRequest", "plain_metadata"]


class ArrayWrite(Protocol):
    """A write of arrays: everything is copied, and nothing is written before `release`."""

    def release(self) -> None: ...

    def cancel(self) -> None:
        """Makes `wait` end soon, with an error. After `release` it may do nothing."""

    def wait(self, timeout_seconds: float) -> None:
        """Returns when this host's files are complete; on the primary, when everything is merged.

        Raises:
            StorageError: it failed, or has not ended after `timeout_seconds`.
        """

    def digests(self) -> Mapping[str, tuple[int, str]]:
        """Returns size and digest of files that it has digested while it wrote them, by their keys
        below the step. After `wait`.
        """

    def notes(self) -> Mapping[str, str]:
        """Returns what the host record is to tell of it, and why."""


class ArrayWriter(Protocol):
    """What writes the arrays of one step."""

    def choose(self) -> Any:
        """Returns what all hosts are to do alike, as JSON. On the primary, while hosts agree."""

    def start(self, prefix: str, all_written: Callable[[], None], choice: Any) -> ArrayWrite | None:
        """Copies what it needs and goes on in the background; None when there are no arrays.

        Args:
            prefix: the staging directory, below the store's root.
            choice: what `choose` has returned on the primary.
            all_written: must be called on every host when its own arrays are written; on the
                primary it returns when all hosts have called it.
        """

    def parts(self, host: int, children: Callable[[str], Sequence[str]]) -> Sequence[str]:
        """Returns prefixes (below the step) that hold everything that `host` writes, and not much
        of what the others do: the primary of n hosts must not list what n hosts have written.

        Args:
            children: returns the names directly below a prefix, those of directories with `/`.
        """

    def owns(self, key: str, host: int) -> bool:
        """Whether `key` (below the step) is written by `host`, for keys of the writer's items."""


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """What this host wants to save, already captured.

    Attributes:
        positions: key below the step -> content, for the position shards that this host writes.
        written: data item -> the data shards whose position this host writes.
        held: data item -> data shard -> digest, for the positions that this host reads; several
            hosts may read the same.
        counts: data item -> how many positions make it whole.
        shared: key -> content, for what the primary writes for all (structure, indexes).
        last: the same, for what must not be there before everything else is: what other programs
            take for a sign that the step is whole.
        needed: keys without which there are no arrays; the array writer makes them in the end.
        agreement: JSON that must be equal on all hosts, named part by part.
        local_digests: leaf name -> digest, for leaves that must be equal on all hosts.
        items: the names of the step's items, for its marker.
        versions: of the libraries that write it.
    """

    step: int
    writer: ArrayWriter
    positions: Mapping[str, bytes] = field(default_factory=dict)
    written: Mapping[str, Sequence[int]] = field(default_factory=dict)
    held: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    shared: Mapping[str, bytes] = field(default_factory=dict)
    last: Mapping[str, bytes] = field(default_factory=dict)
    needed: Sequence[str] = ()
    agreement: Mapping[str, Any] = field(default_factory=dict)
    local_digests: Mapping[str, str] = field(default_factory=dict)
    items: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SaveReport:
    """How a save went on this host.

    Attributes:
        step: the committed step.
        bytes: of all files of the step, over all hosts.
        seconds: for each phase, on this host.
        deleted: steps that retention removed afterwards (known on the primary).
    """

    step: int
    bytes: int
    seconds: Mapping[str, float]
    deleted: Sequence[int] = ()


def plain_metadata(metadata: Any) -> dict[str, Any]:
    """Returns metadata as a JSON object; numbers of numpy and JAX become Python's."""
    if metadata is None:
        return {}
    plain = _plain_json(metadata, "metadata")
    if not isinstance(plain, dict):
        raise InvalidArgumentError(
            f"metadata is a dict of JSON values, not {type(metadata).__name__}: give it a name,"
            ' {"loss": ...} say.'
        )
    return plain


def _plain_json(value: Any, path: str) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InvalidArgumentError(
                    f"{path}: a key of type {type(key).__name__}; JSON has text keys only."
                )
        return {key: _plain_json(item, f"{path}/{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_json(item, f"{path}/{i}") for i, item in enumerate(value)]
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        plain = value.item()
        if type(plain) in (bool, int, float, str):
            return plain
    how = "give .tolist()" if hasattr(value, "tolist") else "convert it"
    raise InvalidArgumentError(
        f"{path}: a {type(value).__name__} is not JSON; {how}, or save it in the state."
    )
