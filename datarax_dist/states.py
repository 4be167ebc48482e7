"""What can be given as a state: a tree, NNX modules anywhere in it, or an object that is asked for
its own.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections import Counter
from typing import Any

import jax

from datarax_dist.data import Checkpointable
from datarax_dist.errors import UnsupportedLeafError
from datarax_dist.trees import check_depth

__all__ = ["apply_state", "is_checkpointable", "is_set_in_place", "state_tree"]

logger = logging.getLogger("datarax_dist")


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
        given = state.get_state()
        if _is_nnx(state) and (left := _left_out(state, given)):
            _tell_left_out(type(state).__qualname__, left)
        return given
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


def _left_out(module: Any, given: Any) -> str:
    """Returns the shapes of variables of which there is none in what the module gives; empty if it
    has all, or what it gives cannot be saved. What is in them is not compared.
    """
    try:
        check_depth(given)
        leaves = jax.tree.leaves(given)
    except (ValueError, UnsupportedLeafError):  # the plan of the save says so better
        return ""
    shapes = Counter(map(_shape, jax.tree.leaves(_pure(module))))
    shapes -= Counter(map(_shape, leaves))
    return ", ".join(f"{dtype}{list(shape)}" for dtype, shape in list(shapes)[:5])


def _shape(leaf: Any) -> tuple[str, tuple[int, ...]]:
    return str(getattr(leaf, "dtype", type(leaf).__name__)), tuple(getattr(leaf, "shape", ()))


@functools.cache  # once
def _tell_left_out(name: str, left: str) -> None:
    logger.warning(
        "%s is an NNX module with get_state and set_state, and is asked for its state by these. It"
        " has variables of which it gives no array (%s). What it does not give otherwise is not"
        " saved: add it, or give nnx.state(module) as the state.",
        name,
        left,
    )


def is_checkpointable(state: Any) -> bool:
    """Whether an object is to be asked for its state, rather than being one."""
    if not isinstance(state, Checkpointable) or isinstance(state, dict | list | tuple):
        return False
    return not _is_nnx(state) or (_takes(state.get_state) and _takes(state.set_state, None))


def _takes(method: Any, *arguments: Any) -> bool:
    """Whether a method can be called so: else its name is another one's by chance."""
    try:
        inspect.signature(method).bind(*arguments)
    except (TypeError, ValueError):
        return False
    return True


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
