"""The form in which a state comes back: its target's, or that in which it was saved.

A tree is restored as its target is: leaf by leaf, in the target's containers. An object with
`get_state` and `set_state` is given what it gave, whatever a fresh one has: an empty list where
that has None, say. What the fresh one has tells only where arrays belong, and of which classes
containers are that have the same in them.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from datarax_dist import codec, trees
from datarax_dist.specs import LeafSpec, TreeSpec

__all__ = ["Form"]


class Form:
    """How what was saved comes back.

    Args:
        target: a tree; None for all as it was saved.
        is_own: it is the state of an object of the user's.

    Attributes:
        wanted: the leaves that are read, each with what it is to become; None for what it was.
        is_own: what was saved is wanted as a whole, and the target tells but places.

    Raises:
        StructureMismatchError: the target does not fit.
    """

    wanted: Sequence[tuple[LeafSpec, Any]]

    def __init__(self, spec: TreeSpec, target: Any, *, is_own: bool = False) -> None:
        self._spec, self._target = spec, target
        # Of plain Orbax's containers nobody knows the classes.
        self.is_own = is_own and not (spec.is_foreign and trees.fits(spec, target))
        if target is None:
            self.wanted = [(leaf, None) for leaf in spec.leaves]
        elif self.is_own:
            goals = dict(trees.flatten(target))
            self.wanted = [
                (leaf, _goal(leaf, goals.get(leaf.path), spec.is_foreign)) for leaf in spec.leaves
            ]
        else:
            self.wanted = trees.match(spec, target)

    def build(self, leaves: Sequence[Any]) -> Any:
        """Returns the state of which these are the leaves, in the order of `wanted`."""
        if self._target is None:
            return self._spec.build(leaves)
        if self.is_own:
            return _built(self._spec.structure, self._target, leaves)
        return jax.tree.unflatten(jax.tree.structure(self._target), leaves)


def _goal(leaf: LeafSpec, fresh: Any, is_foreign: bool) -> Any:
    """Returns what a leaf of an object's state becomes: where a fresh one has it, of its kind."""
    if fresh is None or not trees.can_be(leaf, fresh):
        return None
    if is_foreign:  # plain Orbax notes less
        return fresh
    kind = (leaf.value or "jax") if leaf.kind == "empty" else leaf.kind
    if kind in ("jax", "key", "key_data"):
        return fresh if isinstance(fresh, jax.Array | jax.ShapeDtypeStruct) else None
    if kind in ("numpy", "scalar"):
        return fresh if isinstance(fresh, np.ndarray if kind == "numpy" else np.generic) else None
    return fresh if type(fresh).__name__ == kind else None


def _built(saved: Any, fresh: Any, leaves: Sequence[Any]) -> Any:
    if isinstance(saved, int):
        return leaves[saved]
    [tag] = saved.keys() - {"children"}
    if tag == "none":
        return None
    if tag in ("list", "tuple"):
        keys, children = list(range(len(saved[tag]))), saved[tag]
    else:
        pairs = saved["children" if tag == "node" else tag]
        keys = [codec.decode(key) if tag == "dict" else key for key, _ in pairs]
        children = [child for _, child in pairs]
    own = trees.children_of(fresh)
    has = dict(own or ())
    names = [_name_in(has, fresh, key) for key in keys]
    made = [
        _built(child, has.get(name), leaves) for name, child in zip(names, children, strict=True)
    ]
    is_alike = own is not None and len(own) == len(keys) and has.keys() == set(names)
    if tag == "dict" or (tag == "node" and is_alike and type(fresh) is dict):
        parts = dict(zip(_keys(keys, fresh), made, strict=True))
        return _mapping(parts, fresh) if own is not None else parts
    # An empty list is one, and no class of the user's without anything in it.
    is_list = tag == "list" and bool(made) and trees.is_nameless(fresh)
    if is_alike and (tag == "node" or is_list):
        return _remade(fresh, [name for name, _ in own or ()], dict(zip(names, made, strict=True)))
    if tag in ("list", "tuple"):
        return made if tag == "list" else tuple(made)
    return dict(zip(keys, made, strict=True))


def _name_in(has: Mapping[str, Any], fresh: Any, key: Any) -> str:
    """Returns the name of a child; that of an enumeration's member is not its text."""
    if str(key) in has or not isinstance(fresh, Mapping) or key not in fresh:
        return str(key)
    return next((str(other) for other in fresh if other == key), str(key))


def _remade(fresh: Any, names: Sequence[str], parts: Mapping[str, Any]) -> Any:
    treedef = jax.tree.structure(fresh, is_leaf=lambda part: part is not fresh)
    return jax.tree.unflatten(treedef, [parts[name] for name in names])


def _mapping(parts: dict[Any, Any], fresh: Any) -> Any:
    """Returns a dict as one of the class that a fresh object has there, if it has one: the keys and
    their order are those that were saved.
    """
    if type(fresh) is dict or not isinstance(fresh, Mapping):
        return parts
    if isinstance(fresh, defaultdict):
        return defaultdict(fresh.default_factory, parts)
    if isinstance(fresh, OrderedDict):
        return OrderedDict(parts)
    own = trees.children_of(fresh) or []
    if {name for name, _ in own} == {str(key) for key in parts}:
        named = {str(key): part for key, part in parts.items()}
        return _remade(fresh, [name for name, _ in own], named)
    make: Any = type(fresh)
    try:
        made = make(parts)
    except Exception:  # a class that is not made of a dict
        return parts
    return made if dict(trees.children_of(made) or ()).keys() == set(map(str, parts)) else parts


def _keys(saved: Sequence[Any], fresh: Any) -> list[Any]:
    """Returns the keys of a dict. Some are written as texts; versions before this one did so with
    more.
    """
    if not isinstance(fresh, Mapping):
        return list(saved)
    others = {
        str(key): key
        for key in fresh
        if key is None or isinstance(key, np.generic) or not trees.is_kept_key(key)
    }
    return [others.get(key, key) if isinstance(key, str) else key for key in saved]
