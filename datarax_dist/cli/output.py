"""What the commands print, and their exit codes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from datarax_dist.errors import CheckpointError, describe, printable

__all__ = [
    "UsageError",
    "duration_text",
    "note",
    "note_error",
    "print_clean",
    "print_json",
    "print_table",
    "size_text",
    "time_text",
]

OK, FAILED, USAGE, FINDINGS = 0, 1, 2, 3
NOT_FOUND, NOT_AUTHORISED, NEWER_FORMAT, INTERRUPTED = 10, 12, 13, 130


class UsageError(Exception):
    """The command line cannot mean anything."""


def note(text: str) -> None:
    """Writes one message for the user to stderr, in one line: the names in it are not trusted."""
    print(f"datarax-dist: {printable(text)}", file=sys.stderr)


def note_error(error: Exception) -> None:
    """Writes what an error says to stderr. Those of ours may have several lines; the names in them
    have one.
    """
    if not isinstance(error, CheckpointError):
        return note(str(error) if isinstance(error, UsageError) else describe(error))
    text = "\n".join(printable(line) for line in str(error).split("\n"))
    return print(f"datarax-dist: {text}", file=sys.stderr)


def print_clean(text: str = "") -> None:
    """Writes one line to stdout: names that come from storage are not trusted."""
    print(printable(text))


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True))


def size_text(count: int | None) -> str:
    """Returns a number of bytes for a reader: `1.5 GiB`."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def duration_text(seconds: float | None) -> str:
    """Returns a number of seconds for a reader: `5m`."""
    if seconds is None:
        return "-"
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{int(seconds // length)}{unit}"
    return f"{int(max(seconds, 0))}s"


def time_text(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):
        return str(seconds)


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        print_clean("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())
