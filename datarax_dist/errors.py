"""The errors of datarax_dist: one tree, each also the builtin that a user would catch.

    CheckpointError
    ├── StepNotFoundError(FileNotFoundError)
    ├── StepExistsError(FileExistsError)
    ├── CorruptStepError(ValueError)
    ├── StructureMismatchError(ValueError)
    ├── UnsupportedLeafError(TypeError)
    ├── InvalidArgumentError(ValueError)
    ├── PositionError(ValueError)
    ├── FormatVersionError(ValueError)
    ├── StorageError(OSError)
    ├── LeaseError(RuntimeError)
    └── PeerError(RuntimeError)
        └── PeerLostError(TimeoutError)

An error that the primary decides on travels to every host and keeps its type there: `encode` and
`decode` carry the message and the typed attributes as plain JSON.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

__all__ = [
    "CheckpointError",
    "CorruptStepError",
    "FormatVersionError",
    "InvalidArgumentError",
    "LeaseError",
    "PeerError",
    "PeerLostError",
    "PositionError",
    "Preempted",
    "StepExistsError",
    "StepNotFoundError",
    "StorageError",
    "StructureMismatchError",
    "UnsupportedLeafError",
]


class CheckpointError(Exception):
    """The root of every error that datarax_dist raises on purpose.

    Attributes named in `attributes` are keyword arguments of the constructor, with JSON values.
    """

    attributes: ClassVar[tuple[str, ...]] = ()

    def __init__(self, message: str, **attributes: Any) -> None:
        super().__init__(message)
        self.message = message
        for name in self.attributes:
            setattr(self, name, attributes.pop(name, None))
        if attributes:
            raise TypeError(f"{type(self).__name__} has no attributes {sorted(attributes)}")

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return (decode, (encode(self),))


class StepNotFoundError(CheckpointError, FileNotFoundError):
    """No committed step answers the request. `.step` is the one asked for, or None."""

    attributes = ("step",)
    step: int | None


class StepExistsError(CheckpointError, FileExistsError):
    """The step, or something of its name, is there already. Nothing was changed."""

    attributes = ("step",)
    step: int


class CorruptStepError(CheckpointError, ValueError):
    """A committed step is damaged. `.files` names each damaged file, relative to the step
    directory.
    """

    attributes = ("step", "files")
    step: int
    files: Sequence[str]


class StructureMismatchError(CheckpointError, ValueError):
    """The target does not fit what was saved. Tree paths, as `a/b/0`.

    Attributes:
        missing: in the target, not in the step.
        unexpected: in the step, not in the target (no error by itself).
        changed: path -> what differs.
    """

    attributes = ("missing", "unexpected", "changed")
    missing: Sequence[str]
    unexpected: Sequence[str]
    changed: Mapping[str, str]


class UnsupportedLeafError(CheckpointError, TypeError):
    """A value that cannot be saved. `.path` is its place in the tree."""

    attributes = ("path",)
    path: str


class InvalidArgumentError(CheckpointError, ValueError):
    """An argument that can never work; nothing was done."""


class PositionError(CheckpointError, ValueError):
    """A data position cannot be captured, read or applied."""


class FormatVersionError(CheckpointError, ValueError):
    """Written by a newer datarax_dist. `.found` and `.supported` are format versions."""

    attributes = ("found", "supported")
    found: int
    supported: int


class StorageError(CheckpointError, OSError):
    """The file system or bucket refused. `.errno` is kept where there was one."""

    attributes = ("errno",)


class LeaseError(CheckpointError, RuntimeError):
    """Another writer holds the run. `.owner` describes it."""

    attributes = ("owner",)
    owner: str


class PeerError(CheckpointError, RuntimeError):
    """An operation of all hosts failed, because of what `.failures` says, the same on every host.

    Attributes:
        phase: the named phase that failed.
        failures: host index -> cause.
    """

    attributes: ClassVar[tuple[str, ...]] = ("phase", "failures")
    phase: str
    failures: Mapping[int, str]

    def __init__(self, message: str, **attributes: Any) -> None:
        super().__init__(message, **attributes)
        self.failures = {int(host): cause for host, cause in (self.failures or {}).items()}


class PeerLostError(PeerError, TimeoutError):
    """Hosts did not arrive in time. `.missing` lists their indices."""

    attributes = ("phase", "failures", "missing")
    missing: Sequence[int]
    _is_heard = True  # or it is known to this host only, which could not reach the others


class Preempted(SystemExit):
    """Raised after the step that a preemption asked for is durable. Exit code 75."""

    def __init__(self, step: int) -> None:
        super().__init__(75)
        self.step = step


def _classes(root: type[CheckpointError]) -> dict[str, type[CheckpointError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found.update(_classes(child))
    return found


def encode(error: BaseException) -> dict[str, Any]:
    """Returns `error` as JSON: its type, message and, for errors of this module, its attributes."""
    if isinstance(error, CheckpointError):
        attributes = {}
        for name in error.attributes:
            value = getattr(error, name)
            if isinstance(value, Mapping):
                value = {str(key): str(item) for key, item in value.items()}
            elif isinstance(value, Sequence) and not isinstance(value, str):
                value = list(value)
            attributes[name] = value
        return {"type": type(error).__name__, "message": str(error), "attributes": attributes}
    return {"type": type(error).__name__, "message": describe(error)}


def decode(encoded: Mapping[str, Any]) -> CheckpointError:
    """Returns the error that `encode` described; one of no class of ours becomes a plain
    `CheckpointError`.
    """
    found = _classes(CheckpointError).get(str(encoded.get("type")))
    if found is None:
        return CheckpointError(str(encoded.get("message")))
    return found(str(encoded["message"]), **dict(encoded.get("attributes", {})))


def describe(error: BaseException, limit: int = 2000) -> str:
    """Returns `error` in one short text: `OSError(28, 'No space left on device')`, or `Type:
    message`.
    """
    if isinstance(error, CheckpointError):
        text = f"{type(error).__name__}: {error}"
    elif isinstance(error, OSError) and error.errno is not None:
        name = f": {error.filename!r}" if error.filename else ""
        text = f"{type(error).__name__}({error.errno}, {error.strerror!r}){name}"
    else:
        text = f"{type(error).__name__}: {error}"
    text = mask(text)
    return text if len(text) <= limit else text[:limit] + " ..."


def mask(text: str) -> str:
    """Returns a text of others without what would let a reader act as this process: tokens, signed
    URLs, passwords in URLs.

    >>> mask("GET https://host/x?alt=media&access_token=ya29.abc failed")
    'GET https://host/x?alt=media&access_token=*** failed'
    """
    for pattern in _SECRETS:
        text = pattern.sub(r"\1***", text)
    return text


def storage_hint(number: int | None) -> str:
    """Returns what to do about an error number of the operating system."""
    return _HINTS.get(number or 0, "Check the file system.")


def is_passing(error: BaseException) -> bool:
    """Whether an error says that something cannot be read now and here, rather than that it is
    damaged. Going back to an older step would be the wrong answer.
    """
    return isinstance(error, OSError) and error.errno in _PASSING


_VALUE = r"[^\s&\"'<>,;)}\]]+"
_NAMES = "|".join(
    (
        *("access_token", "id_token", "refresh_token", "token", "assertion", "client_secret"),
        *("private_key", "password", "upload_id", "api_?key", "key", "sig", "signature"),
        *("x-goog-signature", "x-goog-credential", "x-amz-signature", "x-amz-credential"),
        "x-amz-security-token",
    )
)
_SECRETS = (
    re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----)[^-]*", re.IGNORECASE),
    re.compile(
        rf"(\bauthorization[\"']?\s*[:=]\s*[\"']?(?:(?:bearer|basic)\s+)?){_VALUE}", re.IGNORECASE
    ),
    re.compile(rf"(\bbearer\s+){_VALUE}", re.IGNORECASE),
    # In a query, or as a field of JSON. A bare `key='...'` is in many a message of ours.
    re.compile(rf"([?&](?:{_NAMES})=){_VALUE}", re.IGNORECASE),
    re.compile(
        rf"(\b(?:access_token|id_token|refresh_token|assertion|client_secret|private_key"
        rf"|x-goog-signature)[\"']?\s*[:=]\s*[\"']?){_VALUE}",
        re.IGNORECASE,
    ),
    re.compile(r"(\bya29\.)[\w.-]+"),  # what Google's access tokens begin with
    re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@]+(?=@)", re.IGNORECASE),
)


def cause(error: BaseException) -> BaseException | None:
    """Returns what to chain an error of ours to: None when a text of others in the chain has
    secrets, which every traceback would show.
    """
    link: BaseException | None = error
    while link is not None:
        if mask(text := f"{link} {link!r}") != text:
            return None
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return error


def _numbers(*names: str) -> frozenset[int]:
    """Returns error numbers; not each platform has all of them."""
    return frozenset(
        number for name in names if isinstance(number := getattr(errno, name, None), int)
    )


_UNREACHABLE = _numbers(
    *("ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN"),
    *("ENETRESET", "ENETUNREACH", "ENOLINK", "ENONET", "ENOTCONN", "EPIPE", "ESHUTDOWN"),
)
# Kerberos, on NFS and AFS.
_CREDENTIALS = _numbers("EKEYEXPIRED", "EKEYREJECTED", "EKEYREVOKED", "ENOKEY")
# EIO is not among them: it is what a bad disk says.
_PASSING = (
    _numbers(
        *("EACCES", "EPERM", "EMFILE", "ENFILE", "ENOMEM", "EAGAIN", "ETIMEDOUT", "ESTALE"),
        *("EBUSY", "EINTR", "ENOBUFS", "ENOLCK", "EREMOTEIO"),
    )
    | _UNREACHABLE
    | _CREDENTIALS
)
_HINTS = {
    **dict.fromkeys(
        _UNREACHABLE, "The storage cannot be reached: is the network down, or a server?"
    ),
    **dict.fromkeys(_CREDENTIALS, "The credentials for this file system are not valid any more."),
    errno.ENOENT: "Something has removed its directory meanwhile.",
    errno.ENOTDIR: "A part of this path is a file, not a directory: choose another root.",
    errno.ENOSPC: "Free some space, or choose another root.",
    errno.EDQUOT: "The quota is used up: free some space, or raise it.",
    errno.EFBIG: "A file is larger than this process or file system allows (ulimit -f).",
    errno.ENOMEM: "There is not enough memory for it, on this host or its devices.",
    errno.EROFS: "The file system is read-only.",
    errno.EIO: "The device below the file system has failed: look at the system's log (dmesg).",
    errno.EACCES: "This user may not do that here: check the owner and the mode.",
    errno.EPERM: "This user may not do that here: check the owner and the mode.",
    errno.EMFILE: "This process has too many files open: raise its limit (ulimit -n).",
    errno.ETIMEDOUT: "It has not ended at its deadline. Is the storage stuck, or slow?",
    errno.ESTALE: "The file handle is stale: the server of this file system has changed it.",
}
