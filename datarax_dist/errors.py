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
from collections.abc import Iterator, Mapping, Sequence
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
    """For a training loop that ends after a preemption, when the step that this asked for is
    durable: exit code 75. Nothing here raises it by itself.
    """

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
        if "interpreter shutdown" in text:  # Python 3.12 and later start no threads then
            text += ". The program has ended without close(): call that, or use `with`."
    text = mask(text)
    if not isinstance(error, CheckpointError):  # the lines of a text are left to it
        text = "\n".join(printable(line) for line in text.split("\n"))
    return text if len(text) <= limit else text[:limit] + " ..."


def printable(text: str) -> str:
    r"""Returns a text of others, the name of a file say, in one line and without characters that
    control a terminal or turn the direction of writing.

    >>> printable("a\x1b[2J\nb")
    'a\\x1b[2J\\nb'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def mask(text: str) -> str:
    """Returns a text of others without what would let a reader act as this process: tokens, signed
    URLs, passwords in URLs. Of a very long text only the beginning.

    >>> mask("GET https://host/x?alt=media&access_token=ya29.abc failed")
    'GET https://host/x?alt=media&access_token=*** failed'
    """
    if is_long := len(text) > _MOST_MASKED:
        # The last word may be half a secret, of which a pattern does not see what it is.
        head = text[:_MOST_MASKED]
        text = head[: max(head.rfind(" "), _MOST_MASKED - _MOST_WORD)]
    for pattern in _SECRETS:
        text = pattern.sub(r"\1***", text)
    return text + " ..." if is_long else text


def storage_hint(number: int | None) -> str:
    """Returns what to do about an error number of the operating system."""
    return _HINTS.get(number or 0, "Check the file system.")


def is_passing(error: BaseException) -> bool:
    """Whether an error says that something cannot be read now and here, rather than that it is
    damaged. Going back to an older step would be the wrong answer.
    """
    return isinstance(error, OSError) and error.errno in _PASSING


_MOST_MASKED = 20_000  # characters: some of the patterns take the square of the length
_MOST_WORD = 2_000
_PART = r"(?:[^\s&\"'<>,;)}\]\\]|\\(?![\"'\\]))"
_VALUE = f"{_PART}+"
# A sign, and how it is written in a URL inside another one's query.
_IS = r"(?:[:=]|%(?:25)?3[AD])"
_EQUALS = r"(?:=|%(?:25)?3D)"
_AND = r"(?:[?&]|&amp;|\\u0026|%(?:25)?(?:3F|26))"
_QUOTE = r"(?:\\*[\"']|%(?:25)?22)"
# In no text but beside a credential.
_SURE = "|".join(
    (
        *(
            "(?:access|refresh|id|auth|session|oauth|bearer|security)[_-]?token",
            "client[_-]?secret",
        ),
        *("private[_-]?key", "passw(?:or)?d", "api[_-]?key", "upload_id"),
        *("x-(?:goog|amz)-(?:signature|credential)", "x-goog-iam-authorization-token"),
    )
)
# Words of their own, too: only as a field of a query, of JSON or of what `repr` shows.
_WORDS = "token|secret|assertion"
_QUERY = f"{_SURE}|{_WORDS}|key|sig|signature"
_SCHEMES = "bearer|basic|digest|negotiate|ntlm"
# The patterns keep what tells the kind, the first group. What is masked once is masked for good: a
# masked text has no secrets (`cause`).
_SECRETS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----)[^-]*",
        rf"(\bbearer(?:[\"'],\s*b?[\"']|\s+|%20|\+)){_VALUE}",
        # Between quotes to the closing one: `"password": "a b"`, `('authorization', b'...')`.
        rf"((?:{_SURE}|\b(?:(?:proxy-)?authorization|(?:set-)?cookie)){_QUOTE}?\s*"
        rf"(?:[:=]|(?<=[\"']),)\s*b?\\*(?P<q>[\"'])(?:(?:{_SCHEMES})\s+)?)"
        r"(?:\\.|(?!(?P=q))[^\\\n])+",
        rf"((?:(?<![\w-])(?:{_WORDS})=|[\"'](?:{_WORDS})\\*[\"']\s*[:=]\s*)b?\\*(?P<q>[\"']))"
        r"(?:\\.|(?!(?P=q))[^\\\n])+",
        # A header to the end of its line, where it may have several fields.
        rf"(\bauthorization{_QUOTE}?\s*[:=]\s*(?:digest|negotiate|ntlm|[\w-]{{1,40}}"
        r"(?=\s+[\w-]{1,40}=))\s+)[^\r\n]+",
        r"(\b(?:set-)?cookie\s*[:=]\s*)[^\s\"'][^\r\n]*",
        rf"(\bauthorization{_QUOTE}?\s*{_IS}\s*{_QUOTE}?(?:(?:{_SCHEMES})\s+)?){_VALUE}",
        rf"({_AND}(?:{_QUERY}){_EQUALS}){_VALUE}",
        rf"((?:{_SURE}|\bassertion){_QUOTE}?\s*{_EQUALS}\s*{_QUOTE}?){_VALUE}",
        # Not `/etc/passwd: Permission denied`.
        rf"((?<!/)(?:{_SURE}){_QUOTE}?\s*(?::|%(?:25)?3A)\s*{_QUOTE}?){_VALUE}",
        r"((?<![\w-])token=)[\w.~+/=-]{20,}",
        # A variable of the environment.
        r"((?-i:\b[A-Z0-9_]{0,40}(?:TOKEN|SECRET|PASSWORD|ACCESS_KEY)(?:_[A-Z0-9_]{0,40})?=))"
        rf"{_PART}{{8,}}",
        # What credentials of some services begin with.
        r"(\bya29\.)[\w.-]+",
        r"((?<![\w/])1//0)[\w-]{8,}",
        r"((?<![\w-])eyJ)[\w-]{5,}(?:\.[\w-]*)+",
        r"((?<![\w-])(?:hf_|gh[opsu]_))[a-z0-9]{24,}",
        r"((?<![\w-])(?:GOCSPX-|AIza))[\w-]{24,}",
        # The name and the password of a URL.
        r"([a-z][a-z0-9+.-]{0,30}://)[^\s/@]+(?=@)",
    )
)


def cause(error: BaseException) -> BaseException | None:
    """Returns what to chain an error of ours to: None when a text of others in the chain has
    secrets, which every traceback would show, or is too long to tell.
    """
    return None if any(_has_secrets(link) for link in chain(error)) else error


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yields an error, and each one that its traceback would show, once."""
    seen: set[int] = set()
    links = [error]
    while links:
        link = links.pop()
        if id(link) in seen:  # others may have made a circle of them
            continue
        seen.add(id(link))
        yield link
        if isinstance(link, BaseExceptionGroup):
            links += link.exceptions
        before = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
        links += [] if before is None else [before]


def _has_secrets(error: BaseException) -> bool:
    notes = getattr(error, "__notes__", ())
    texts = [
        str(error),
        repr(error),
        *(map(str, notes) if isinstance(notes, list) else (repr(notes),)),
    ]
    return any(mask(text) != text for text in texts)


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
    errno.EROFS: "The file system is read-only: mount it to be written to, or choose another root.",
    errno.EIO: "The device below the file system has failed: look at the system's log (dmesg).",
    errno.EACCES: "This user may not do that here: check the owner and the mode.",
    errno.EPERM: "This user may not do that here: check the owner and the mode.",
    errno.EMFILE: "This process has too many files open: raise its limit (ulimit -n).",
    errno.ETIMEDOUT: "It has not ended at its deadline. Is the storage stuck, or slow?",
    errno.ESTALE: "The file handle is stale: the server of this file system has changed it.",
}
