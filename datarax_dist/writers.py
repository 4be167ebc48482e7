"""Which process writes: what it is called for others, and whether it is still there.

>>> is_certainly_dead(writer_identity())
False
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Mapping
from typing import Any

__all__ = ["is_certainly_dead", "is_here", "is_running", "writer_identity"]

_UNKNOWN = ("?", "?")


@functools.cache
def _machine() -> str:
    """Names this boot of this machine and its process numbering (containers have their own)."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process(pid: int) -> tuple[str, str]:
    """Returns when a process began, in ticks since boot, and its state; empty when there is none,
    `_UNKNOWN` where that cannot be told: /proc may hide it (`hidepid`), or no file can be opened.
    """
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
    except OSError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return "", ""
        except (OSError, OverflowError):
            return _UNKNOWN
        return _UNKNOWN
    return ("", "") if fields[0] == "Z" else (fields[19], fields[0])


def writer_identity() -> dict[str, Any]:
    """Returns this process as a writer."""
    pid = os.getpid()
    started, state = _process(pid)
    is_known = (started, state) != _UNKNOWN  # or others would look for a process that began then
    return {
        "machine": _machine() if is_known else "",
        "pid": pid,
        "started": started if is_known else "",
        "name": socket.gethostname(),
    }


def is_here(writer: Mapping[str, Any]) -> bool:
    """Whether a writer runs, or ran, on this machine."""
    machine = writer.get("machine")
    return bool(machine) and machine == _machine() and isinstance(writer.get("pid"), int)


def is_certainly_dead(writer: Mapping[str, Any]) -> bool:
    """Whether a writer ran on this machine, and the kernel says that its process is gone."""
    if not is_here(writer):
        return False
    found = _process(writer["pid"])
    return found != _UNKNOWN and found[0] != writer.get("started")


def is_running(writer: Mapping[str, Any]) -> bool:
    """Whether a writer runs on this machine, and is not stopped."""
    if not is_here(writer):
        return False
    started, state = _process(writer["pid"])
    return started == writer.get("started") and state in ("R", "S", "D")
