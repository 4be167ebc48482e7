"""The form in which a state comes back: its target's, or that in which it was saved.

A tree is restored as its target is: leaf by leaf, in the target's containers. An object with
`get_state` and `set_state` is given what it gave, whatever a fresh one has: an empty list where
that has None, say. What the fresh one has tells only where arrays belong, and of which classes
containers are that have the same in them.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from datarax_dist import codec, errors, trees
from datarax_dist.specs import LeafSpec, TreeSpec, as_dict

__all__ = ["Form"]

logger = logging.getLogger("datarax_dist")


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

    @property
    def left(self) -> list[str]:
        """The leaves that are not read, by their paths."""
        wanted = {leaf.path for leaf, _ in self.wanted}
        return [leaf.name for leaf in self._spec.leaves if leaf.path not in wanted]

    def build(self, leaves: Sequence[Any]) -> Any:
        """Returns the state of which these are the leaves, in the order of `wanted`."""
        if self._target is None:
            return self._spec.build(leaves)
        if not self.is_own:
            return jax.tree.unflatten(jax.tree.structure(self._target), leaves)
        spec, lost = self._spec, set[str]()
        if not spec.is_foreign:
            leaves = [_kept(leaf, value) for leaf, value in zip(spec.leaves, leaves, strict=True)]
        built = _built(spec.structure, self._target, leaves, spec.is_foreign, lost)
        if lost:
            logger.warning(_LOST, errors.printable(", ".join(sorted(lost))))
        return built


def _goal(leaf: LeafSpec, fresh: Any, is_foreign: bool) -> Any:
    """Returns what a leaf of an object's state becomes: where a fresh one has it, of its kind."""
    if fresh is None or not trees.can_be(leaf, fresh):
        return None
    kind = (leaf.value or "jax") if leaf.kind == "empty" else leaf.kind
    # What plain Orbax wrote is of no known kind. An array of JAX is read as a fresh one has it, by
    # this host alone, and is one of JAX again: nobody knows where else it should be.
    if is_foreign or leaf.kind == "jax":
        return fresh
    if kind in ("jax", "key", "key_data"):
        return fresh if isinstance(fresh, jax.Array | jax.ShapeDtypeStruct) else None
    if kind in ("numpy", "scalar"):
        return fresh if isinstance(fresh, np.ndarray if kind == "numpy" else np.generic) else None
    return fresh if type(fresh).__name__ == kind else None


def _kept(leaf: LeafSpec, value: Any) -> Any:
    """Returns an array of JAX as one, if JAX would not cut it."""
    if isinstance(value, jax.Array):
        return trees.as_weak(leaf, value)
    if leaf.kind != "jax" or trees.would_be_cut(leaf):
        return value
    return trees.as_weak(leaf, jax.numpy.asarray(value, leaf.dtype))


_LOST = (
    "An object's state had containers of classes that a fresh one does not have there, or not with"
    " the same in them: %s. They come back as dicts. Let the object make them, before it is"
    " restored or in set_state."
)


def _built(saved: Any, fresh: Any, leaves: Sequence[Any], is_foreign: bool, lost: set[str]) -> Any:
    if isinstance(saved, int):
        return leaves[saved]
    [tag] = saved.keys() - {"children"}
    if tag == "none" and not is_foreign:
        return None
    if tag in ("list", "tuple", "none"):
        children = saved[tag] or []
        keys = list(range(len(children)))
    else:
        pairs = saved["children" if tag == "node" else tag]
        keys = [codec.decode(key) if tag == "dict" else key for key, _ in pairs]
        children = [child for _, child in pairs]
    names, own = [str(key) for key in keys], trees.children_of(fresh)
    has = dict(own or ())
    made = [
        _built(child, has.get(name), leaves, is_foreign, lost)
        for name, child in zip(names, children, strict=True)
    ]
    if is_foreign:  # Orbax has lists, dicts and None in the place of tuples and classes
        is_class = tag != "none" or type(fresh) not in (dict, list, tuple)
    else:  # an empty list is one, and no class of the user's without anything in it
        is_class = tag == "node" or (tag == "list" and bool(made) and trees.is_nameless(fresh))
    is_alike = own is not None and len(own) == len(keys) and has.keys() == set(names)
    if is_alike and is_class and (tag != "dict" or not isinstance(fresh, Mapping)):
        return _remade(fresh, dict(zip(names, made, strict=True)))
    if tag == "dict":
        return _mapping(list(zip(_keys(keys, fresh), made, strict=True)), fresh)
    if tag == "none":
        return None
    if tag in ("list", "tuple"):
        return made if tag == "list" else tuple(made)
    lost.add(saved["node"])
    return dict(zip(keys, made, strict=True))


def _remade(fresh: Any, parts: Mapping[str, Any]) -> Any:
    """Returns a container of a class as a fresh one, of parts of the same names."""
    treedef = jax.tree.structure(fresh, is_leaf=lambda part: part is not fresh)
    return jax.tree.unflatten(treedef, [parts[name] for name, _ in trees.children_of(fresh) or ()])


def _mapping(pairs: Sequence[tuple[Any, Any]], fresh: Any) -> Any:
    """Returns a dict as one of the class that a fresh object has there, if it has one: the keys and
    their order are those that were saved.
    """
    kind: Any = type(fresh)
    if kind is dict or not isinstance(fresh, Mapping) or trees.children_of(fresh) is None:
        return as_dict(pairs)
    if isinstance(fresh, defaultdict) and kind is defaultdict:
        return defaultdict(fresh.default_factory, pairs)
    if kind is OrderedDict:
        return OrderedDict(pairs)
    named = {str(key): part for key, part in pairs}
    if dict(trees.children_of(fresh) or ()).keys() == named.keys():
        return _remade(fresh, named)
    if kind.__module__.partition(".")[0] == "flax":  # FrozenDict, State: nothing but their items
        return kind(dict(pairs))
    return as_dict(pairs)


def _keys(saved: Sequence[Any], fresh: Any) -> list[Any]:
    """Returns the keys of a dict; those of which something else was written as a fresh one has
    them.
    """
    if not isinstance(fresh, Mapping):
        return list(saved)
    written = [(trees.plain_key(key), key) for key in fresh]
    others = {(type(plain), plain): key for plain, key in written if plain is not key}
    return [others.get((type(key), key), key) for key in saved]
