"""What can be given as a state: a tree, NNX modules anywhere in it, or an object that is asked for
its own.
"""

from __future__ import annotations

import sys
from typing import Any

import jax

from datarax_dist.data import Checkpointable
from datarax_dist.trees import check_depth

__all__ = ["apply_state", "is_checkpointable", "is_set_in_place", "state_tree"]


def _nnx() -> Any:
    """Returns flax.nnx when the user's program has imported it; nothing of it can be in a state
    otherwise.
    """
    return sys.modules.get("flax.nnx")


def _is_nnx(value: Any) -> bool:
    """Whether a value is an NNX module, or anything else of NNX that has a state."""
    nnx = _nnx()
    if nnx is None:
        return False
    kinds = (nnx.Module, nnx.State, getattr(nnx, "Pytree", nnx.Module))
    return isinstance(value, kinds)


def state_tree(state: Any) -> Any:
    """Returns the tree of a state; NNX modules, anywhere in it, become dicts of arrays. A module
    that has `get_state` and `set_state`, and is not in a tree, is asked as any object is: it may
    have a position that is in no variable.

    Raises:
        UnsupportedLeafError: it is nested deeper than JAX can walk.
    """
    if is_checkpointable(state):
        return state.get_state()
    if _nnx() is None:
        return state
    try:
        check_depth(state, _is_nnx)
        nodes, treedef = jax.tree.flatten(state, is_leaf=_is_nnx)
    except ValueError:  # keys that cannot be sorted; the plan of the save says so better
        return state
    return jax.tree.unflatten(treedef, [_pure(n) if _is_nnx(n) else n for n in nodes])


def _pure(node: Any) -> Any:
    nnx = _nnx()
    return nnx.to_pure_dict(node if isinstance(node, nnx.State) else nnx.state(node))


def is_checkpointable(state: Any) -> bool:
    """Whether an object is to be asked for its state, rather than being one."""
    return isinstance(state, Checkpointable) and not isinstance(state, dict | list | tuple)


def is_set_in_place(target: Any) -> bool:
    """Whether `apply_state` changes something of a target."""
    if is_checkpointable(target):
        return True
    return _nnx() is not None and any(map(_is_nnx, jax.tree.leaves(target, is_leaf=_is_nnx)))


def apply_state(target: Any, tree: Any) -> Any:
    """Returns what `Restored.state` is: the tree, with the NNX modules of the target updated in
    place; or the object that it was put into.
    """
    if target is None or (_nnx() is None and not is_checkpointable(target)):
        return tree
    if is_checkpointable(target):
        target.set_state(tree)
        return target
    return jax.tree.map(
        lambda node, part: _update(node, part) if _is_nnx(node) else part,
        target,
        tree,
        is_leaf=_is_nnx,
    )


def _update(node: Any, part: Any) -> Any:
    nnx = _nnx()
    if isinstance(node, nnx.State):
        nnx.replace_by_pure_dict(node, part)
    else:
        nnx.update(node, part)
    return node
