"""What a state is made of, as `TREE.json` says it: the structure, and what each leaf is."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from datarax_dist import codec
from datarax_dist import format as fmt

__all__ = ["LeafSpec", "Path", "TreeSpec", "as_dict", "is_storable", "parse_tree"]

Path = tuple[str, ...]
_KINDS = (
    *("jax", "key", "key_data", "numpy", "scalar"),
    *("int", "float", "bool", "complex", "str", "bytes", "empty"),
)
_INLINE = ("int", "float", "bool", "complex", "str", "bytes", "empty")


@dataclass(frozen=True, slots=True)
class LeafSpec:
    """One leaf.

    Attributes:
        path: its place, as texts.
        kind: "jax", "key" (typed PRNG key that Orbax stores), "key_data" (host-local key, stored as
            its data), "numpy",
            "scalar" (numpy scalar), "int", "float", "bool", "complex", "str", "bytes", "empty"
            (zero-size array).
        shape, dtype: of the array as the user sees it; a key's dtype is its impl.
        value: the value of an inline leaf, encoded.
        local: a `jax.Array` of one host, stored once because it is equal on all.
        weak: a `jax.Array` whose dtype gives way to that of others, as `jnp.asarray(0.1)` has it.
    """

    path: Path
    kind: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    value: Any = None
    local: bool = False
    weak: bool = False

    @property
    def name(self) -> str:
        return "/".join(self.path)

    @property
    def nbytes(self) -> int:
        """At most how many bytes its array takes."""
        return math.prod(self.shape) * 16

    @property
    def inline(self) -> bool:
        return self.kind in _INLINE


@dataclass(frozen=True, slots=True)
class TreeSpec:
    """The structure of a state, with a `LeafSpec` for each leaf. `structure` is JSON: leaves are
    their numbers.

    Attributes:
        is_foreign: plain Orbax wrote it, with settings that may be others than ours.
    """

    structure: Any
    leaves: Sequence[LeafSpec]
    is_foreign: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "structure": self.structure,
            "leaves": [
                {
                    "path": list(leaf.path),
                    "kind": leaf.kind,
                    "shape": list(leaf.shape),
                    "dtype": leaf.dtype,
                    "value": leaf.value,
                    "local": leaf.local,
                    **({"weak": True} if leaf.weak else {}),
                }
                for leaf in self.leaves
            ],
        }

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> TreeSpec:
        """Returns what `to_json` wrote.

        Raises:
            InvalidRecordError: it is anything else. Nothing large is made of it.
        """
        rows = body.get("leaves")
        if not isinstance(rows, list):
            raise fmt.InvalidRecordError(f"{fmt.TREE_NAME} lists no leaves")
        leaves = tuple(_parse_leaf(row) for row in rows)
        if len({leaf.path for leaf in leaves}) != len(leaves):
            raise fmt.InvalidRecordError(f"{fmt.TREE_NAME} names a leaf twice")
        numbers: list[int] = []
        try:
            _check_structure(body.get("structure"), numbers, len(leaves))
        except RecursionError:
            raise fmt.InvalidRecordError(f"{fmt.TREE_NAME} is nested too deep") from None
        if len(numbers) != len(leaves):
            raise fmt.InvalidRecordError(
                f"{fmt.TREE_NAME}: its structure has not all of its leaves"
            )
        return TreeSpec(body["structure"], leaves)

    def build(self, values: Sequence[Any]) -> Any:
        """Returns the tree with `values` as its leaves; containers that are not plain Python's
        become dicts.
        """
        return _build(self.structure, values, codec.decode)

    def for_orbax(self, values: Sequence[Any]) -> Any:
        """The same, with texts as the keys of dicts: Orbax names arrays by them, and puts all that
        it finds in one container in order. It is given no class of the user's, which may not take
        what stands for a leaf.
        """
        return _build(self.structure, values, lambda key: str(codec.decode(key)))


def parse_tree(data: bytes) -> TreeSpec:
    """Returns what `TREE.json` says.

    Raises:
        InvalidRecordError: it is damaged, or no tree of ours.
        FormatVersionError: of a newer format version.
    """
    return TreeSpec.from_json(fmt.unseal(data, fmt.TREE_NAME))


def _parse_leaf(row: Any) -> LeafSpec:
    row = row if isinstance(row, dict) else {}
    parts, shape, dtype = row.get("path"), row.get("shape"), row.get("dtype")
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise fmt.InvalidRecordError(f"{fmt.TREE_NAME}: a leaf without a path")
    leaf = LeafSpec(tuple(parts), str(row.get("kind"))[:20], value=row.get("value"))
    wrong = fmt.InvalidRecordError(f"{fmt.TREE_NAME}: {leaf.name[:200]!r} is no leaf of ours")
    weak = row.get("weak", False)
    if leaf.kind not in _KINDS or type(row.get("local")) is not bool or type(weak) is not bool:
        raise wrong
    if not isinstance(shape, list) or len(shape) > 64 or not isinstance(dtype, str):
        raise wrong
    if any(type(n) is not int or not 0 <= n < 1 << 63 for n in shape) or len(dtype) > 100:
        raise wrong
    if leaf.kind in ("jax", "numpy", "scalar", "empty") and not dtype.startswith("key:"):
        if not _is_dtype(dtype):
            raise wrong
    elif leaf.kind not in ("key", "key_data", "empty") and (shape or dtype):
        raise wrong
    if leaf.kind == "empty":
        if 0 not in shape or math.prod(n or 1 for n in shape) >= 1 << 60:
            raise wrong
    elif leaf.inline:
        try:
            value = codec.decode(leaf.value)
        except codec.DecodeError:
            raise wrong from None
        if type(value).__name__ != leaf.kind:
            raise wrong
    return LeafSpec(leaf.path, leaf.kind, tuple(shape), dtype, leaf.value, row["local"], weak)


def _is_dtype(name: str) -> bool:
    try:
        dtype = np.dtype(name)
    except (TypeError, ValueError, SyntaxError):
        return False
    return str(dtype) == name and is_storable(dtype)


def _check_structure(node: Any, numbers: list[int], count: int) -> None:
    """Raises `InvalidRecordError` for what is not as `_structure` writes it. Leaves are numbered in
    their order.
    """
    if type(node) is int:
        if node != len(numbers) or node >= count:
            raise fmt.InvalidRecordError(f"{fmt.TREE_NAME}: a leaf that is not the next one")
        numbers.append(node)
        return
    wrong = fmt.InvalidRecordError(f"{fmt.TREE_NAME}: a container that is none of ours")
    if not isinstance(node, dict):
        raise wrong
    tags = set(node)
    if tags == {"none"}:
        return
    named = tags == {"dict"} or tags == {"node", "children"}
    children = node.get("children") if "node" in tags else next(iter(node.values()), None)
    if not (named or tags in ({"list"}, {"tuple"})) or not isinstance(children, list):
        raise wrong
    keys: list[Any] = []
    for child in children:
        if named:
            if not isinstance(child, list) or len(child) != 2:
                raise wrong
            try:
                keys.append(codec.decode(child[0]) if "dict" in tags else child[0])
            except codec.DecodeError:
                raise wrong from None
            if "node" in tags and not isinstance(keys[-1], str):
                raise wrong
            child = child[1]
        _check_structure(child, numbers, count)
    if not named:
        return
    try:
        codec.check_keys(keys)
        if len(set(keys)) != len(children):
            raise wrong
    except (codec.DecodeError, TypeError):
        raise wrong from None


def _build(structure: Any, values: Sequence[Any], key_of: Callable[[Any], Any]) -> Any:
    if isinstance(structure, int):
        return values[structure]
    if "none" in structure:
        return None
    if "dict" in structure:
        pairs = structure["dict"]
        return as_dict((key_of(key), _build(child, values, key_of)) for key, child in pairs)
    if "list" in structure:
        return [_build(child, values, key_of) for child in structure["list"]]
    if "tuple" in structure:
        return tuple(_build(child, values, key_of) for child in structure["tuple"])
    return {name: _build(child, values, key_of) for name, child in structure["children"]}


def as_dict(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Returns a dict that JAX can walk through: of keys that cannot be put in order it is an
    `OrderedDict`, as what was saved was.
    """
    made = dict(pairs)
    if len(set(map(type, made))) > 1 or any(type(key) is tuple for key in made):
        try:
            sorted(made)
        except TypeError:
            return OrderedDict(made)
    return made


def is_storable(dtype: np.dtype[Any]) -> bool:
    """Whether Orbax stores arrays of this type exactly."""
    return dtype.kind in "biufc" or (
        dtype.kind == "V" and dtype.names is None and dtype.name[0] in "bfiu"
    )
