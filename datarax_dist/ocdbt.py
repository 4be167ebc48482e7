"""Where the values of an OCDBT database lie, as its index tells: in the index itself, or in a part
of a file. TensorStore reads the index, and checks the crc32c of its nodes.
"""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass
from typing import Any

import tensorstore as ts

__all__ = ["Extent", "read_index"]

_DEPTH = 64  # a tree of more levels is none


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """A part of a file.

    Attributes:
        file: its path, below the directory of the database.
        offset, length: in bytes.
    """

    file: str
    offset: int
    length: int


def read_index(directory: str) -> dict[str, bytes | Extent]:
    """Returns the newest version of the database in a local directory: key -> value.

    Raises:
        ValueError: it is damaged, or not a database; and whatever TensorStore raises then.
    """
    base = ts.KvStore.open({"driver": "file", "path": f"{directory}/"}).result()
    found: dict[str, bytes | Extent] = {}

    def walk(location: str, prefix: bytes, depth: int) -> None:
        if depth > _DEPTH:
            raise ValueError("The index of the arrays is nested too deep.")
        for entry in ts.ocdbt.dump(base, location).result()["entries"]:
            key = prefix + entry["key"]
            if "location" in entry:
                walk(entry["location"], prefix + entry["subtree_common_prefix"], depth + 1)
            elif "inline_value" in entry:
                found[key.decode()] = entry["inline_value"]
            else:
                found[key.decode()] = _extent(entry["indirect_value"])

    root = ts.ocdbt.dump(base).result()["versions"][-1]["root"]
    if "location" in root:
        walk(root["location"], b"", 0)
    return found


def _extent(location: Any) -> Extent:
    """Parses `value:<directory>:<path>:<offset>:<length>`."""
    kind, base, path, offset, length = str(location).split(":")
    file = urllib.parse.unquote(base) + urllib.parse.unquote(path)
    parts = file.split("/")
    if kind != "value" or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"The index of the arrays names {location[:200]!r}.")
    return Extent(file, int(offset), int(length))
