"""The form in which a state comes back: its target's, or that in which it was saved.

A tree is restored as its target is: leaf by leaf, in the target's containers. An object with
`get_state` and `set_state` is given what it gave, whatever a fresh one has: an empty list where
that has None, say. What the fresh one has tells only where arrays belong, and of which classes
containers are that have the same in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from datarax_dist import codec, trees

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

    wanted: Sequence[tuple[trees.LeafSpec, Any]]

    def __init__(self, spec: trees.TreeSpec, target: Any, *, is_own: bool = False) -> None:
        self._spec, self._target = spec, target
        # Of plain Orbax's containers nobody knows the classes.
        self.is_own = is_own and not (spec.is_foreign and trees.fits(spec, target))
        if target is None:
            self.wanted = [(leaf, None) for leaf in spec.leaves]
        elif self.is_own:
            goals = dict(trees.flatten(target))
            self.wanted = [(leaf, _goal(leaf, goals.get(leaf.path))) for leaf in spec.leaves]
        else:
            self.wanted = trees.match(spec, target)

    def build(self, leaves: Sequence[Any]) -> Any:
        """Returns the state of which these are the leaves, in the order of `wanted`."""
        if self._target is None:
            return self._spec.build(leaves)
        if self.is_own:
            return _built(self._spec.structure, self._target, leaves)
        return jax.tree.unflatten(jax.tree.structure(self._target), leaves)


def _goal(leaf: trees.LeafSpec, fresh: Any) -> Any:
    """Returns what a leaf of an object's state becomes: where a fresh one has it, of its kind."""
    if fresh is None or not trees.can_be(leaf, fresh):
        return None
    kinds = {"numpy": np.ndarray, "scalar": np.generic}
    if leaf.kind in kinds:
        return fresh if isinstance(fresh, kinds[leaf.kind]) else None
    if leaf.inline and leaf.kind != "empty":
        return fresh if type(fresh).__name__ == leaf.kind else None
    return fresh


def _built(saved: Any, fresh: Any, leaves: Sequence[Any]) -> Any:
    if isinstance(saved, int):
        return leaves[saved]
    [tag] = saved.keys() - {"children"}
    inside = [] if tag == "none" else saved["children" if tag == "node" else tag]
    if tag == "dict":
        keys, children = [codec.decode(key) for key, _ in inside], [child for _, child in inside]
    elif tag == "node":
        keys, children = [name for name, _ in inside], [child for _, child in inside]
    else:
        keys, children = list(range(len(inside))), inside
    names, own = [str(key) for key in keys], trees.children_of(fresh)
    has = dict(own or ())
    made = [
        _built(child, has.get(name), leaves) for name, child in zip(names, children, strict=True)
    ]
    if own is not None and has.keys() == set(names) and len(has) == len(names):
        if type(fresh) is dict and tag in ("dict", "node"):
            return dict(zip(_keys(keys, fresh), made, strict=True))
        if type(fresh) not in (dict, list, tuple) or tag in ("node", type(fresh).__name__):
            by_name = dict(zip(names, made, strict=True))
            treedef = jax.tree.structure(fresh, is_leaf=lambda part: part is not fresh)
            return jax.tree.unflatten(treedef, [by_name[name] for name, _ in own])
    if tag == "none":
        return None
    if tag in ("list", "tuple"):
        return made if tag == "list" else tuple(made)
    return dict(zip(keys, made, strict=True))


def _keys(saved: Sequence[Any], fresh: dict[Any, Any]) -> list[Any]:
    """Returns the keys of a dict. Versions before this one wrote some as texts that were none."""
    others = {str(key): key for key in fresh if key is None or isinstance(key, np.integer)}
    return [others.get(key, key) if isinstance(key, str) else key for key in saved]
