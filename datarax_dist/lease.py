"""Who writes: the identity of a writer, and whether it is certainly gone.

The claim in `STEP.json` carries it. A directory whose writer is certainly dead may be removed by
anyone who reads the run; one whose writer cannot be judged from here (another machine) is removed
only by the next writer.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

__all__ = ["is_certainly_dead", "writer_identity"]


def _machine() -> str:
    """Names this boot of this machine and its process numbering (containers have their own)."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Returns when a process began, in ticks since boot; empty when there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def writer_identity() -> dict[str, Any]:
    """Returns this process as a writer."""
    pid = os.getpid()
    return {
        "machine": _machine(),
        "pid": pid,
        "started": _started(pid),
        "name": socket.gethostname(),
    }


def is_certainly_dead(writer: Mapping[str, Any]) -> bool:
    """Whether a writer ran on this machine, and its process is gone."""
    machine, pid = writer.get("machine"), writer.get("pid")
    if not machine or machine != _machine() or not isinstance(pid, int):
        return False
    return _started(pid) != writer.get("started")
