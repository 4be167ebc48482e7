"""The datarax calling convention over `Checkpointer`: a job moves by changing one import.

    from datarax_dist.checkpoint import OrbaxCheckpointHandler

    with OrbaxCheckpointHandler() as handler:
        handler.save("/checkpoints", pipeline, step=1000, keep=5)
        handler.restore("/checkpoints", pipeline)

Any target works on many hosts: what is a global array is saved once, and every other leaf (an
iterator's position, a host's own counters) is saved by each host and comes back to that host. Such
a step restores on the same number of hosts only. A tree has such leaves on all hosts or on none; an
object with `get_state` and `set_state` may have them on some.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from datarax_dist import codec, config, trees
from datarax_dist import format as fmt
from datarax_dist.checkpointer import (
    Checkpointer,
    SaveHandle,
)
from datarax_dist.data import positions as data_io
from datarax_dist.errors import (
    InvalidArgumentError,
    PositionError,
    StepExistsError,
    StepNotFoundError,
    describe,
)
from datarax_dist.forms import Form
from datarax_dist.inspection import Candidate
from datarax_dist.request import SaveRequest
from datarax_dist.restore import Loading
from datarax_dist.specs import LeafSpec, TreeSpec, parse_tree
from datarax_dist.states import apply_state, is_checkpointable, state_tree

__all__ = [
    "CheckpointExistsError",
    "CheckpointNotFoundError",
    "IteratorCheckpoint",
    "OrbaxCheckpointHandler",
    "PipelineCheckpoint",
]

logger = logging.getLogger("datarax_dist")

_LOCAL = "_OrbaxCheckpointHandler"  # as nobody calls a loader
_UNVERSIONED = "checkpoint"
_MOST_RUNS = 8  # that a handler keeps open when no save goes on behind it


class CheckpointExistsError(StepExistsError, ValueError):
    """The checkpoint is there already, and `overwrite` was not given."""


class CheckpointNotFoundError(StepNotFoundError, ValueError):
    """There is no such directory, or no such checkpoint in it."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a `Run` is to restore into: the user's target, or nothing but the metadata."""

    value: Any
    metadata_only: bool = False


class _Local:
    """The part of a target that belongs to one host, as a data item of kind *host*."""

    def __init__(self, flat: bool, spec: TreeSpec, leaves: Mapping[str, Any]) -> None:
        # As one text: each container would be three levels of a position's, of which there are few.
        self._state = {
            "flat": flat,
            "spec": fmt.seal(spec.to_json()),
            "leaves": dict(leaves),
        }

    def get_state(self) -> dict[str, Any]:
        return self._state

    def set_state(self, state: Any) -> None:
        self._state = state


class _Arrays:
    """The part of a target that all hosts share, by the names of its leaves: each as its goal is,
    or as it was saved.
    """

    def __init__(self, goals: Mapping[str, Any]) -> None:
        self.state: Any = {name: goal for name, goal in goals.items() if goal is not None}

    def get_state(self) -> Any:
        return self.state

    def set_state(self, state: Any) -> None:
        self.state = state


class Run(Checkpointer):
    """A `Checkpointer` whose state is any target of datarax's convention."""

    _own_items = frozenset((_LOCAL,))

    def _capture(self, step: Any, state: Any, data: Any, metadata: Any) -> SaveRequest:
        hosts, is_own = self._group.count, is_checkpointable(state)
        tree = state_tree(state)
        flat_leaves = trees.flatten(tree)
        local = {path: leaf for path, leaf in flat_leaves if hosts > 1 and not _is_global(leaf)}
        if not local and not is_own:
            return super()._capture(step, state, data, metadata)
        # The state of an object may have something of its host's alone on another host only.
        is_flat = hosts > 1
        spec = trees.plan_state(tree, 1).spec
        leaves = {"/".join(path): _pack(leaf) for path, leaf in local.items()}
        rest = {"/".join(path): leaf for path, leaf in flat_leaves if path not in local}
        items = {_LOCAL: _Local(is_flat, spec, leaves)}
        if is_flat:
            self._state_left = ()  # what each host has for itself is not in the tree
            return self._capture_tree(step, rest, items, metadata, has_state=bool(rest))
        return self._capture_tree(step, tree, items, metadata, has_state=True)

    def _wants(self, target: Any, data: Any) -> str:
        return "the metadata" if target.metadata_only else super()._wants(target.value, data)

    def _loads(self, target: Any) -> bool:
        return not target.metadata_only

    def _sets_in_place(self, target: Any) -> bool:
        return super()._sets_in_place(target.value)

    def _load(
        self,
        candidate: Candidate,
        target: Any,
        data: Any,
        *,
        loading: Loading | None = None,
        metadata_only: bool = False,
        parted: bool | None = None,
        allow: Sequence[str] = (),
    ) -> Callable[[], Any]:
        assert isinstance(target, Target)
        if target.metadata_only:
            return super()._load(candidate, None, None, metadata_only=True)
        items = candidate.marker.items if candidate.marker else ()
        if f"data/{_LOCAL}" not in items:
            return super()._load(candidate, target.value, None, loading=loading)
        part = _Local(False, TreeSpec(None, ()), {})
        read = lambda key: self._read(candidate, key)
        try:
            plan = data_io.plan_restore(
                {_LOCAL: part}, items, read, self._group.index, self._group.count
            )
        except PositionError as error:
            key = fmt.position_index_name(_LOCAL)
            before, now = fmt.parse_position_index(read(key), key).count, self._group.count
            if before == now:
                raise
            raise PositionError(
                "This state has what belongs to each host alone (numbers, numpy arrays, positions),"
                f" and was saved by {before} hosts; this job has {now}, and nobody knows how to"
                " divide it. Restore on as many hosts; or save global jax.Arrays only, or with"
                " Checkpointer, for which equal numbers are one, and which has data=."
            ) from error
        position = data_io.decode_positions(plan, read)[_LOCAL][self._group.index]
        stored = codec.unpack(position.state)
        if not stored["flat"]:
            return super()._load(candidate, target.value, None, loading=loading)
        spec = parse_tree(stored["spec"])
        tree = None if target.value is None else state_tree(target.value)
        form = Form(spec, tree, is_own=is_checkpointable(target.value))
        left = form.left
        wanted, leaves = form.wanted, stored["leaves"]
        if loading is not None:
            loading.alike = _digest_of_shared(leaves, wanted)
        arrays: Any = {}
        if "state" in items:
            goals = {leaf.name: goal for leaf, goal in wanted if leaf.name not in leaves}
            shared = _Arrays(goals) if form.is_own else None if tree is None else goals
            # What is decoded with them here must be whole before the hosts vote.
            arrays = super()._load(candidate, shared, None, loading=loading, parted=False)()[0]
            arrays = arrays.state if form.is_own else arrays
        values = [
            _unpack(leaves[leaf.name], leaf, goal) if leaf.name in leaves else arrays[leaf.name]
            for leaf, goal in wanted
        ]
        metadata = super()._load(candidate, None, None, metadata_only=True)()[1]
        whole, self._left = form.build(values), left
        return lambda: (apply_state(target.value, whole), metadata, None)


def _is_global(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def _digest_of_shared(leaves: Mapping[str, Any], wanted: Sequence[tuple[Any, Any]]) -> str:
    """Returns a digest of what a host had for itself and is to be in arrays of all hosts; empty
    where nothing is.
    """
    shared = {
        leaf.name: leaves[leaf.name]
        for leaf, goal in wanted
        if leaf.name in leaves
        and leaf.kind not in ("key", "key_data")  # which stay where they are
        and (sharding := getattr(goal, "sharding", None)) is not None
        and len({device.process_index for device in sharding.device_set}) > 1
    }
    if not shared:
        return ""
    packed = codec.pack(shared)
    parts = [fmt.dumps(packed.value), *packed.blobs]
    return " ".join(fmt.crc_text(fmt.crc32c(part)) for part in parts)


def _pack(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return np.asarray(leaf)  # a memory map, maybe
    if trees.is_key(leaf) or not isinstance(leaf, jax.Array):
        return leaf
    return {"__jax__": np.asarray(leaf)}


def _unpack(value: Any, spec: LeafSpec, goal: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"__jax__"}:
        value = value["__jax__"]
        if goal is None or isinstance(goal, jax.Array | jax.ShapeDtypeStruct):
            trees.refuse_to_cut(spec)
        value = jax.device_put(value) if goal is None else value
    return trees.finish_leaf(spec, value, goal)


class OrbaxCheckpointHandler:
    """Saves and restores checkpoints, each call naming its directory.

    Args:
        async_checkpointing: `save` returns as soon as the state is copied; `wait_until_finished`
            and `close` wait and raise.
    """

    def __init__(self, async_checkpointing: bool = False) -> None:
        self.async_checkpointing = async_checkpointing
        self._runs: dict[str, Run] = {}  # the last used one is the last

    def _run(self, directory: str | os.PathLike[str]) -> Run:
        root = config.check_root(
            os.path.abspath(os.fspath(directory))
            if "://" not in os.fspath(directory)
            else directory
        )
        run = self._runs.pop(root, None)
        if run is None:
            run = Run(root)
            run._saver.keeps_to_a_run = False  # a directory may be removed, and made anew
        self._runs[root] = run
        while len(self._runs) > _MOST_RUNS and not self.async_checkpointing:
            self._runs.pop(next(iter(self._runs))).close()  # each has threads of its own
        return run

    def save(
        self,
        directory: str | os.PathLike[str],
        target: Any,
        step: int | None = None,
        keep: int | None = 1,
        overwrite: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> str:
        """Saves `target`; in a job with many hosts call it on every host.

        Args:
            directory: where; it is made when it is not there.
            target: a `Checkpointable`, an NNX module, or a tree with arrays, PRNG keys, numbers and
                strings.
            step: None is an unversioned checkpoint, which each later one replaces when `overwrite`
                is given.
            keep: how many of the newest steps to keep; None or 0 keeps all.
            overwrite: replace a step that is there. The old one is deleted when the new one is
                whole.
            metadata: JSON, saved beside it.

        Returns:
            The path of the checkpoint.

        Raises:
            CheckpointExistsError: it is there and `overwrite` is off (a `ValueError`, as datarax
                has it).
        """
        root = os.fspath(directory)
        if step is None:
            run = self._run(os.path.join(root, _UNVERSIONED))
            latest = run.latest_step()
            if latest is not None and not overwrite:
                raise CheckpointExistsError(
                    f"{run.root} has a checkpoint; give overwrite=True to replace it.", step=None
                )
            step, keep = 0 if latest is None else latest + 1, 1
        else:
            run = self._run(root)
        run._saver.keep = config.latest(keep) if keep else None
        try:
            handle = run._save(
                step, state=target, data=None, metadata=metadata, force=True, replace=overwrite
            )
            assert isinstance(handle, SaveHandle)
            if not self.async_checkpointing:
                handle.result()
        except StepExistsError as error:
            raise CheckpointExistsError(
                f"{error} Give overwrite=True to replace it.", step=step
            ) from error
        finally:
            if not self.async_checkpointing:
                # Programs that share a directory, and save in turn, may go on doing so.
                run._let_others_write()
        return os.path.join(run.root, str(step))

    save_to_directory = save

    def restore(
        self,
        directory: str | os.PathLike[str],
        target: Any = None,
        step: int | None = None,
        metadata_only: bool = False,
    ) -> Any:
        """Restores the newest good checkpoint, or `step`, into `target`, which is returned; without
        one the saved state is.

        Raises:
            CheckpointNotFoundError: no such directory or checkpoint (a `ValueError`, as datarax has
                it).
        """
        root = os.fspath(directory)
        run = self._run(root)
        wish = Target(target, metadata_only)
        try:
            restored = run.try_restore(step=step, state=wish)
            if restored is None:
                restored = self._run(os.path.join(run.root, _UNVERSIONED)).try_restore(state=wish)
        except StepNotFoundError as error:
            raise CheckpointNotFoundError(str(error), step=step) from error
        # Asked after the hosts have agreed; in a bucket there are no directories.
        there = config.is_bucket(run.root) or os.path.isdir(run.root)
        if restored is None and not there:
            raise CheckpointNotFoundError(f"Checkpoint directory not found: {run.root}", step=step)
        if restored is None:
            raise CheckpointNotFoundError(f"No checkpoints found in {run.root}", step=step)
        return restored.metadata if metadata_only else restored.state

    def get_checkpoint_steps(self, directory: str | os.PathLike[str]) -> list[int]:
        """Returns the committed steps of a directory, in order."""
        return self._run(directory).all_steps()

    def latest_step(self, directory: str | os.PathLike[str]) -> int | None:
        """Returns the newest committed step, or None."""
        return self._run(directory).latest_step()

    def list_checkpoints(self, directory: str | os.PathLike[str]) -> dict[int, str]:
        """Returns the path of each committed step."""
        run = self._run(directory)
        return {step: os.path.join(run.root, str(step)) for step in run.all_steps()}

    def wait_until_finished(self) -> None:
        """Waits for the saves that are under way, and raises what failed."""
        _each([run.wait_until_finished for run in self._runs.values()])

    def close(self) -> None:
        """Waits and ends. Can be called more than once."""
        try:
            _each([run.close for run in self._runs.values()])
        except Exception:  # all of them are closed; where it was cut short they are not
            self._runs = {}
            raise
        self._runs = {}

    def __enter__(self) -> OrbaxCheckpointHandler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any
    ) -> None:
        _close(self, error)


def _each(calls: Sequence[Callable[[], None]]) -> None:
    """Makes every call, and then raises the first error."""
    first: Exception | None = None
    for call in calls:
        try:
            call()
        except Exception as error:
            first = first or error
    if first is not None:
        raise first


def _close(
    opened: OrbaxCheckpointHandler | IteratorCheckpoint, error: BaseException | None
) -> None:
    """Closes at the end of a `with`, and never hides an exception of its body."""
    try:
        opened.close()
    except Exception as late:
        if error is None:
            raise
        logger.error("closing after %s: %s", type(error).__name__, describe(late))


class IteratorCheckpoint:
    """The checkpoints of one directory, for a target that is given at each call.

    Args:
        base_dir: the directory.
        keep: how many of the newest steps to keep; None keeps all.
    """

    def __init__(
        self,
        base_dir: str | os.PathLike[str],
        *,
        keep: int | None = None,
        async_checkpointing: bool = False,
    ) -> None:
        self.base_dir = os.fspath(base_dir)
        self._keep = keep
        self._handler = OrbaxCheckpointHandler(async_checkpointing)

    def save(
        self,
        iterator: Any,
        step: int | None = None,
        *,
        overwrite: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> str:
        """Saves an iterator's position."""
        return self._handler.save(self.base_dir, iterator, step, self._keep, overwrite, metadata)

    def restore(self, iterator: Any, step: int | None = None) -> Any:
        """Sets an iterator back to a saved position, and returns it."""
        return self._handler.restore(self.base_dir, iterator, step)

    def latest_step(self) -> int | None:
        """Returns the newest committed step, or None."""
        return self._handler.latest_step(self.base_dir)

    def wait_until_finished(self) -> None:
        """Waits for the save that is under way."""
        self._handler.wait_until_finished()

    def close(self) -> None:
        """Waits and ends."""
        self._handler.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any
    ) -> None:
        _close(self, error)


class PipelineCheckpoint(IteratorCheckpoint):
    """The same for a pipeline, with a save at every so many steps."""

    def save_to_step(
        self, pipeline: Any, step: int, *, interval: int = 1, metadata: dict[str, Any] | None = None
    ) -> str | None:
        """Saves when `step` is a multiple of `interval`; returns the path, or None.

        Raises:
            InvalidArgumentError: `interval` is less than 1.
        """
        if interval < 1:
            raise InvalidArgumentError(f"interval must be 1 or more, not {interval!r}.")
        return self.save(pipeline, step, metadata=metadata) if step % interval == 0 else None
