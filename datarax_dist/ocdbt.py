"""OCDBT databases, Orbax's way to keep many values in few files: where the values lie, and an index
for values that were written without TensorStore.

The index is a B+tree: its nodes and the manifest are as TensorStore documents them ("OCDBT storage
format", version 0). TensorStore reads it, and checks the crc32c of its nodes; before a step is
committed, too, when it merges the indexes of all hosts.
"""

from __future__ import annotations

import os
import secrets
import struct
import time
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorstore as ts

from datarax_dist import format as fmt

__all__ = ["MOST_INLINE_BYTES", "Extent", "make_index", "new_file", "read_index"]

MOST_INLINE_BYTES = 1024  # of a value in the index, as Orbax has it

_DEPTH = 64  # a tree of more levels is none
_LARGEST_NODE_BYTES = 1 << 27  # as it is stored; TensorStore reads it as a whole
_MOST_KEYS = 1 << 24
_MOST_KEY_BYTES = (1 << 16) - 1  # TensorStore's own limit
_MOST_NODE_BYTES = 50_000_000  # Orbax's own limit is 100 MB
_MOST_ENTRIES = 500_000  # TensorStore's own limit is 1 << 20
_NODE_MAGIC = 0x0CDB20DE
_CHECKSUM = struct.Struct("<I")


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

    Each node is visited once, and its bytes are its own: a small file cannot make a large tree.

    Raises:
        ValueError: it is damaged, or not a database; and whatever TensorStore raises then.
    """
    base = ts.KvStore.open({"driver": "file", "path": f"{directory}/"}).result()
    found: dict[str, bytes | Extent] = {}
    left: dict[str, int] = {}  # bytes of each file that no node has taken
    seen: set[tuple[str, int]] = set()

    def take(node: Extent) -> None:
        if node.file not in left:
            left[node.file] = os.path.getsize(os.path.join(directory, node.file))
        left[node.file] -= node.length
        if (node.file, node.offset) in seen or left[node.file] < 0:
            raise ValueError("The index of the arrays has a node that is in two places.")
        if node.length > _LARGEST_NODE_BYTES:
            raise ValueError(f"The index of the arrays has a node of {node.length} bytes.")
        seen.add((node.file, node.offset))

    def walk(location: str, prefix: bytes, height: int) -> None:
        take(_extent(location, "btreenode"))
        node = ts.ocdbt.dump(base, location).result()
        if node["height"] != height:
            raise ValueError("The index of the arrays has a node of another height than it says.")
        for entry in node["entries"]:
            key = prefix + entry["key"]
            if len(key) > _MOST_KEY_BYTES or len(found) >= _MOST_KEYS:
                raise ValueError("The index of the arrays has too many keys, or too long ones.")
            if "location" in entry:
                walk(entry["location"], prefix + entry["subtree_common_prefix"], height - 1)
            elif "inline_value" in entry:
                found[key.decode()] = entry["inline_value"]
            else:
                found[key.decode()] = _extent(entry["indirect_value"])

    newest = ts.ocdbt.dump(base).result()["versions"][-1]
    if newest["root_height"] > _DEPTH:
        raise ValueError("The index of the arrays is nested too deep.")
    if "location" in newest["root"]:
        walk(newest["root"]["location"], b"", newest["root_height"])
    return found


def _extent(location: Any, wanted: str = "value") -> Extent:
    """Parses `<kind>:<directory>:<path>:<offset>:<length>`."""
    kind, base, path, *place = str(location).split(":")
    file = urllib.parse.unquote(base) + urllib.parse.unquote(path)
    parts = file.split("/")
    offset, length = map(int, place)
    if kind != wanted or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"The index of the arrays names {location[:200]!r}.")
    if min(offset, length) < 0:
        raise ValueError(f"The index of the arrays names {location[:200]!r}.")
    return Extent(file, offset, length)


def new_file() -> str:
    """Returns a name for a new file of a database, as TensorStore gives them."""
    return f"d/{secrets.token_hex(16)}"


def make_index(values: Mapping[str, bytes | Extent], file: str) -> tuple[bytes, bytes]:
    """Returns the content of `file`, which is the index of a new database with these values, and of
    its `manifest.ocdbt`.
    """
    parts: list[bytes] = []
    nodes: list[_Node] = []
    size = 0

    def add(node: _Node) -> None:
        nonlocal size
        node.offset = size
        parts.append(node.data)
        size += len(node.data)

    for rows in _split(sorted((key.encode(), value) for key, value in values.items())):
        leaf = _Node(rows[0][0], _leaf_node(rows), len(rows))
        leaf.indirect_bytes = sum(v.length for _, v in rows if isinstance(v, Extent))
        leaf.tree_bytes = len(leaf.data)
        add(leaf)
        nodes.append(leaf)
    height = 0
    if len(nodes) > 1:
        root = _Node(nodes[0].key, _interior_node(nodes, file), sum(n.keys for n in nodes))
        root.indirect_bytes = sum(n.indirect_bytes for n in nodes)
        root.tree_bytes = len(root.data) + sum(n.tree_bytes for n in nodes)
        add(root)
        nodes, height = [root], 1
    [root] = nodes
    manifest = {
        "config": {
            "uuid": secrets.token_hex(16),
            "compression": {"id": "zstd"},
            "max_inline_value_bytes": MOST_INLINE_BYTES,
            "max_decoded_node_bytes": 100_000_000,
            "version_tree_arity_log2": 4,
        },
        "version_tree_nodes": [],
        "versions": [
            {
                "generation_number": 1,
                "commit_time": time.time_ns(),
                "root_height": height,
                "root": {
                    "location": f"btreenode::{file}:{root.offset}:{len(root.data)}",
                    "statistics": {
                        "num_keys": root.keys,
                        "num_tree_bytes": root.tree_bytes,
                        "num_indirect_value_bytes": root.indirect_bytes,
                    },
                },
            }
        ],
    }
    return b"".join(parts), ts.ocdbt.undump_manifest(manifest)


@dataclass(slots=True)
class _Node:
    """An encoded node: its first key, and what the node above it has to know."""

    key: bytes
    data: bytes
    keys: int
    indirect_bytes: int = 0
    tree_bytes: int = 0
    offset: int = 0


_Row = tuple[bytes, bytes | Extent]


def _split(rows: Sequence[_Row]) -> Iterable[Sequence[_Row]]:
    """Divides the rows over leaf nodes."""
    begin, size = 0, 0
    for number, (key, value) in enumerate(rows):
        more = len(key) + 16 + (len(value) if isinstance(value, bytes) else 0)
        if number > begin and (size + more > _MOST_NODE_BYTES or number - begin >= _MOST_ENTRIES):
            yield rows[begin:number]
            begin, size = number, 0
        size += more
    yield rows[begin:]


def _leaf_node(rows: Sequence[_Row]) -> bytes:
    extents = [value for _, value in rows if isinstance(value, Extent)]
    inline = [value for _, value in rows if isinstance(value, bytes)]
    files, number = _file_table({extent.file for extent in extents})
    lengths = [len(v) if isinstance(v, bytes) else v.length for _, v in rows]
    body = [
        b"\0",  # height
        files,
        _varint(len(rows)),
        *_keys([key for key, _ in rows]),
        _varints(lengths),
        bytes(isinstance(value, Extent) for _, value in rows),
        _varints([number[extent.file] for extent in extents]),
        _varints([extent.offset for extent in extents]),
        *inline,
    ]
    return _seal(b"".join(body))


def _interior_node(children: Sequence[_Node], file: str) -> bytes:
    files, _ = _file_table({file})
    zeros = bytes(len(children))
    lengths, keys = _keys([child.key for child in children])[-2:]
    body = [
        b"\1",
        files,
        _varint(len(children)),
        bytes(len(children) - 1),
        lengths,
        zeros,  # the children's keys are whole: no prefix is left out in them
        keys,
        zeros,  # all in the one file
        _varints([child.offset for child in children]),
        _varints([len(child.data) for child in children]),
        _varints([child.keys for child in children]),
        _varints([child.tree_bytes for child in children]),
        _varints([child.indirect_bytes for child in children]),
    ]
    return _seal(b"".join(body))


def _keys(keys: Sequence[bytes]) -> list[bytes]:
    """The columns of keys. What a key has in common with the one before could be left out; here it
    never is.
    """
    return [bytes(len(keys) - 1), _varints([len(key) for key in keys]), b"".join(keys)]


def _file_table(files: set[str]) -> tuple[bytes, dict[str, int]]:
    """The table of the files that a node names, and their numbers in it."""
    paths = sorted(file.encode() for file in files)
    number = {path.decode(): at for at, path in enumerate(paths)}
    if not paths:
        return _varint(0), number
    table = [_varint(len(paths)), bytes(len(paths) - 1), _varints([len(path) for path in paths])]
    return b"".join([*table, bytes(len(paths)), *paths]), number  # no path has a base of its own


def _seal(body: bytes) -> bytes:
    """Puts the header before a node, and its crc32c behind it."""
    rest = b"\0\0" + body  # version 0, not compressed
    header = struct.pack(">I", _NODE_MAGIC) + struct.pack("<Q", 12 + len(rest) + 4)
    crc = fmt.crc32c(rest, fmt.crc32c(header))
    return header + rest + _CHECKSUM.pack(crc)


def _varints(numbers: Sequence[int]) -> bytes:
    return b"".join(map(_varint, numbers))


def _varint(number: int) -> bytes:
    if number < 0x80:
        return _ONE_BYTE[number]
    found = bytearray()
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


_ONE_BYTE = [bytes([number]) for number in range(0x80)]
