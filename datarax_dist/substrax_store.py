"""The checkpoint store that today's datarax (0.1.6 and later) takes, over `Checkpointer`.

datarax hands its checkpoints to a `substrax.checkpoint.CheckpointStore`; this is one, so that a
job keeps datarax's own `IteratorCheckpoint` and gets our steps under it:

    from datarax.checkpoint import IteratorCheckpoint
    from datarax_dist.substrax_store import SubstraxStore

    with IteratorCheckpoint(directory, store=SubstraxStore(directory, max_to_keep=5)) as checkpoint:
        checkpoint.save(pipeline, step=1000)
        checkpoint.restore(pipeline)

It needs substrax (Python 3.12 or later), which datarax brings; nothing of it is imported before
the first call.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from datarax_dist import config, trees
from datarax_dist import format as fmt
from datarax_dist.checkpoint import Run, Target
from datarax_dist.errors import CorruptStepError, InvalidArgumentError, StepExistsError
from datarax_dist.specs import LeafSpec, parse_tree
from datarax_dist.states import apply_state, state_tree

__all__ = ["SubstraxStore"]

_ARRAYS = ("jax", "numpy", "scalar", "empty")


class SubstraxStore:
    """Keeps named items and a metadata record under a step, as substrax's protocol has it.

    In a job with many hosts every host makes one and calls it alike; what belongs to one host (an
    iterator's position) comes back to that host.

    Args:
        directory: where; made with the first save.
        max_to_keep: how many of the newest steps to keep; None keeps all.
        options: see `datarax_dist.Options`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        max_to_keep: int | None = 5,
        options: config.Options | None = None,
    ) -> None:
        if not os.fspath(directory).strip():
            raise ValueError("Checkpoint directory cannot be empty")
        if "://" in os.fspath(directory):
            raise InvalidArgumentError(
                f"{os.fspath(directory)!r}: datarax's store names its steps by local paths, so it"
                " cannot be in a bucket. Use datarax_dist.Checkpointer, or"
                " datarax_dist.checkpoint.OrbaxCheckpointHandler. Nothing was written."
            )
        keep = None if max_to_keep is None else config.latest(max_to_keep)
        self.directory = Path(directory).resolve()
        self.max_to_keep = max_to_keep
        self._make: Callable[[], Run] = lambda: Run(self.directory, keep=keep, options=options)
        self._opened: Run | None = None

    @property
    def _run(self) -> Run:
        if self._opened is None:
            self._opened = self._make()
        return self._opened

    def save(
        self,
        step: int,
        items: Mapping[str, Any],
        *,
        epoch: int | None = None,
        metrics: Mapping[str, float] | None = None,
        producer: Any = None,
        extra: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Writes `items` at `step` and returns the step's directory, when it is committed.

        Raises:
            CheckpointNotWrittenError: the step is there, or below the latest.
            ValueError: a negative step, an unknown item, or a reserved key in `extra`.
        """
        from substrax.checkpoint import CheckpointMetadata
        from substrax.checkpoint.errors import CheckpointNotWrittenError
        from substrax.checkpoint.metadata import (
            check_extra,
            check_item_names,
            library_versions,
            now_iso,
        )

        if step < 0:
            raise ValueError("Step must be a non-negative integer")
        record = CheckpointMetadata(
            step=step,
            epoch=epoch,
            items=check_item_names(items),
            libraries=library_versions(),
            producer=producer,
            metrics={name: float(value) for name, value in (metrics or {}).items()},
            extra=check_extra(extra),
            created_at=now_iso(),
        )
        latest = self.latest_step()
        if latest is not None and step < latest:
            raise CheckpointNotWrittenError(step=step, latest_step=latest, reason="below_latest")
        try:
            handle = self._run._save(
                step,
                state={name: state_tree(item) for name, item in items.items()},
                data=None,
                metadata=record.to_dict(),
                force=True,
                replace=overwrite,
            )
        except StepExistsError as error:
            raise CheckpointNotWrittenError(
                step=step, latest_step=latest, reason="exists"
            ) from error
        assert handle is not None
        handle.result()
        self._run.wait_until_finished()
        return self.directory / str(step)

    def restore(
        self,
        step: int,
        *,
        templates: Mapping[str, Any] | None = None,
        cast_dtypes: bool = False,
    ) -> Any:
        """Reads the checkpoint at `step`, onto `templates` where given.

        Returns:
            A `substrax.checkpoint.Checkpoint`.

        Raises:
            CheckpointNotFoundError: there is no such step.
            CheckpointDtypeMismatchError: an array would change its dtype, and `cast_dtypes` is off.
            ValueError: a template names an item that is not there, or does not fit.
        """
        from substrax.checkpoint import Checkpoint, CheckpointDtypeMismatchError

        record = self.read_metadata(step)
        templates = dict(templates or {})
        if missing := sorted(set(templates) - set(record.items)):
            raise ValueError(
                f"templates name items the checkpoint lacks: {missing}; step {step} holds"
                f" {list(record.items)}"
            )
        saved = {leaf.path: leaf for leaf in self._leaves(step)}
        changes: list[Any] = []
        goals = {name: _goal(name, tree, saved, changes) for name, tree in templates.items()}
        narrowed = False
        if not jax.config.read("jax_enable_x64"):
            for leaf in saved.values():
                if leaf.path[0] not in templates and trees.needs_x64(leaf):
                    changes.append(_change(leaf, str(jax.dtypes.canonicalize_dtype(leaf.dtype))))
                    narrowed = True
        if changes and not cast_dtypes:
            raise CheckpointDtypeMismatchError(
                step=step, mismatches=tuple(changes), x64_disabled=narrowed
            )
        items = {}
        if goals:
            whole = self._run.restore(step=step, state=Target(goals)).state
            items = {name: _into(templates[name], whole[name]) for name in goals}
        if len(items) < len(record.items):
            with jax.enable_x64(True) if narrowed else contextlib.nullcontext():
                whole = self._run.restore(step=step, state=Target(None)).state
            for name in set(record.items) - set(items):
                items[name] = jax.tree.map(_narrow, whole[name]) if narrowed else whole[name]
        ordered = {name: items[name] for name in record.items}
        return Checkpoint(step=step, items=ordered, metadata=record)

    def _leaves(self, step: int) -> list[LeafSpec]:
        store = self._run._store
        if fmt.TREE_NAME not in store.children(str(step)):
            return []
        try:
            return list(parse_tree(store.get(f"{step}/{fmt.TREE_NAME}")).leaves)
        except fmt.InvalidRecordError as error:
            raise CorruptStepError(str(error), step=step, files=[fmt.TREE_NAME]) from error

    def read_metadata(self, step: int) -> Any:
        """Returns the `substrax.checkpoint.CheckpointMetadata` of a step.

        Raises:
            CheckpointNotFoundError: there is no such step.
        """
        from substrax.checkpoint import CheckpointMetadata, CheckpointNotFoundError

        if step not in self.list_steps():
            raise CheckpointNotFoundError(step, self.directory)
        restored = self._run.restore(step=step, state=Target(None, metadata_only=True))
        return CheckpointMetadata.from_dict(restored.metadata)

    def list_steps(self) -> list[int]:
        """Returns the committed steps, in order."""
        return self._run.all_steps()

    def latest_step(self) -> int | None:
        """Returns the newest committed step, or None."""
        return self._run.latest_step()

    def best_step(self, metric: str, *, mode: str = "min") -> int | None:
        """Returns the step whose `metric` is the lowest ("min") or highest ("max"), or None."""
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
        scores = {step: self.read_metadata(step).metrics.get(metric) for step in self.list_steps()}
        known = [(score, step) for step, score in scores.items() if score is not None]
        if not known:
            return None
        best = (min if mode == "min" else max)(score for score, _ in known)
        return min(step for score, step in known if score == best)

    def delete(self, step: int) -> None:
        """Deletes a step.

        Raises:
            CheckpointNotFoundError: there is no such step.
        """
        from substrax.checkpoint import CheckpointNotFoundError

        if step not in self.list_steps():
            raise CheckpointNotFoundError(step, self.directory)
        self._run.delete(step)

    def close(self) -> None:
        """Waits and ends. The next call opens it again."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()

    def __enter__(self) -> SubstraxStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _change(leaf: LeafSpec, dtype: str) -> Any:
    from substrax.checkpoint import DtypeMismatch

    item, *path = leaf.path
    return DtypeMismatch(item=item, leaf="/".join(path), saved=leaf.dtype, restored=dtype)


def _goal(
    name: str,
    template: Any,
    saved: Mapping[tuple[str, ...], LeafSpec],
    changes: list[Any],
) -> Any:
    """Returns an item's template with the dtypes that were saved, so that nothing is cast by the
    way; adds to `changes` where they differ.
    """
    form = state_tree(template)
    leaves = []
    for path, leaf in trees.flatten(form):
        found, dtype = saved.get((name, *path)), getattr(leaf, "dtype", None)
        if found is None or found.kind not in _ARRAYS or dtype is None or trees.is_key(leaf):
            pass  # the restore itself says how it differs
        elif str(np.dtype(dtype)) != found.dtype:
            changes.append(_change(found, str(np.dtype(dtype))))
            leaf = _with_dtype(leaf, found.dtype)
        leaves.append(leaf)
    return jax.tree.unflatten(jax.tree.structure(form), leaves)


def _with_dtype(leaf: Any, dtype: str) -> Any:
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and not _cut(dtype):
        return jax.ShapeDtypeStruct(leaf.shape, np.dtype(dtype), sharding=leaf.sharding)
    return np.empty(leaf.shape, np.dtype(dtype))


def _cut(dtype: str) -> bool:
    return str(jax.dtypes.canonicalize_dtype(dtype)) != dtype


def _into(template: Any, tree: Any) -> Any:
    """Returns an item in its template's dtypes and, for an NNX state, in its form."""

    def cast(goal: Any, value: Any) -> Any:
        dtype = getattr(goal, "dtype", None)
        if dtype is None or trees.is_key(goal) or getattr(value, "dtype", dtype) == dtype:
            return value
        value = value.astype(dtype)
        if isinstance(value, np.ndarray) and isinstance(goal, jax.Array | jax.ShapeDtypeStruct):
            return trees.placed(value, goal.sharding)
        return value

    form = state_tree(template)
    leaves = [
        cast(goal, value)
        for (_, goal), (_, value) in zip(trees.flatten(form), trees.flatten(tree), strict=True)
    ]
    whole = jax.tree.unflatten(jax.tree.structure(form), leaves)
    return whole if form is template else apply_state(template, whole)


def _narrow(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and not trees.is_key(leaf) and _cut(str(leaf.dtype)):
        return leaf.astype(jax.dtypes.canonicalize_dtype(leaf.dtype))
    return leaf
