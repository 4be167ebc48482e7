"""Who saves and restores the same state: plain files, datarax_dist, Orbax, torch DCP, safetensors.

Each begins with an empty directory of its own. `save` returns when the step is committed and, where
the contender promises that at all, durable; `restore` returns when all values are in memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Contender(Protocol):
    """One way to save a state."""

    def save(self, step: int) -> None: ...

    def restore(self, step: int) -> Any:
        """Returns the state, or what holds its bytes."""

    def remove(self, step: int) -> None: ...

    def close(self) -> None: ...


class Raw:
    """The limit: one `write` and one `fsync` for each of the files that a step of ours has, one
    after the other; one `read` of each into memory that was never touched, in pieces of 1 MiB and
    memory of 64 MiB at a time, which was the fastest and the steadiest of what was tried.
    """

    def __init__(self, root: str, sizes: Sequence[int]) -> None:
        self._root = Path(root)
        self._root.mkdir()
        largest = max(sizes)
        self._bytes = memoryview(np.random.default_rng(0).bytes(largest))
        self._sizes = sizes

    def save(self, step: int) -> None:
        directory = self._root / str(step)
        directory.mkdir()
        for number, size in enumerate(self._sizes):
            with open(directory / str(number), "wb", buffering=0) as file:
                written = 0
                while written < size:
                    written += file.write(self._bytes[written:size])
                os.fsync(file.fileno())
        for path in (directory, self._root):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def restore(self, step: int) -> Any:
        directory = self._root / str(step)
        return [_read(directory / str(number), size) for number, size in enumerate(self._sizes)]

    def remove(self, step: int) -> None:
        shutil.rmtree(self._root / str(step))

    def close(self) -> None: ...


def _read(path: Path, size: int) -> list[np.ndarray]:
    found = []
    with open(path, "rb", buffering=0) as file:
        for begin in range(0, size, 1 << 26):
            fresh = np.empty(min(1 << 26, size - begin), np.uint8)
            at = 0
            while at < len(fresh):
                at += file.readinto(fresh[at : at + (1 << 20)].data)
            found.append(fresh)
    return found


class Ours:
    """datarax_dist, with its defaults unless said otherwise."""

    def __init__(self, root: str, state: Any, target: Any = None, options: Any = None) -> None:
        import datarax_dist as dd

        self._root = root
        self._checkpointer = dd.Checkpointer(root, options=options)
        self._state = state
        self._target = targets(state) if target is None else target
        self.report: Any = None

    def save(self, step: int) -> None:
        handle = self._checkpointer.save(step, state=self._state)
        assert handle is not None
        self.report = handle.result()

    def restore(self, step: int) -> Any:
        restored = self._checkpointer.restore(step=step, state=self._target)
        self.report = restored.report
        return restored.state

    def remove(self, step: int) -> None:
        self._checkpointer.delete(step)

    def sizes(self, step: int) -> list[int]:
        """The sizes of the files of a step."""
        directory = Path(self._root) / str(step)
        return sorted((p.stat().st_size for p in directory.rglob("*") if p.is_file()), reverse=True)

    def close(self) -> None:
        self._checkpointer.close()


class OrbaxManager:
    """Orbax v0: `CheckpointManager` with its defaults."""

    def __init__(self, root: str, state: Any, target: Any = None) -> None:
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._manager = ocp.CheckpointManager(root)
        self._state = state
        self._target = targets(state) if target is None else target

    def save(self, step: int) -> None:
        self._manager.save(step, args=self._ocp.args.StandardSave(self._state))
        self._manager.wait_until_finished()

    def restore(self, step: int) -> Any:
        return self._manager.restore(step, args=self._ocp.args.StandardRestore(self._target))

    def remove(self, step: int) -> None:
        self._manager.delete(step)

    def close(self) -> None:
        self._manager.close()


class OrbaxV1:
    """Orbax v1: `Checkpointer` with its defaults."""

    def __init__(self, root: str, state: Any, target: Any = None) -> None:
        from orbax.checkpoint import v1

        self._root = root
        self._checkpointer = v1.training.Checkpointer(root)
        self._state = state
        self._target = targets(state) if target is None else target

    def save(self, step: int) -> None:
        self._checkpointer.save_pytree(step, self._state)

    def restore(self, step: int) -> Any:
        return self._checkpointer.load_pytree(step, self._target)

    def remove(self, step: int) -> None:
        shutil.rmtree(Path(self._root) / str(step))

    def close(self) -> None:
        self._checkpointer.close()


class TorchDcp:
    """torch's distributed checkpoint, of the same bytes as tensors; one process."""

    def __init__(self, root: str, state: Any, target: Any = None) -> None:
        import torch
        import torch.distributed.checkpoint as dcp

        self._dcp = dcp
        self._root = root
        self._state = {name: torch.from_numpy(plain(x)) for name, x in state.items()}

    def save(self, step: int) -> None:
        self._dcp.save(self._state, checkpoint_id=f"{self._root}/{step}")

    def restore(self, step: int) -> Any:
        import torch

        fresh = {name: torch.empty_like(x) for name, x in self._state.items()}
        self._dcp.load(fresh, checkpoint_id=f"{self._root}/{step}")
        return fresh

    def remove(self, step: int) -> None:
        shutil.rmtree(f"{self._root}/{step}")

    def close(self) -> None: ...


class Safetensors:
    """One file of safetensors, neither synced nor checked."""

    def __init__(self, root: str, state: Any, target: Any = None) -> None:
        import safetensors.numpy

        self._safetensors = safetensors.numpy
        self._root = root
        os.mkdir(root)
        self._state = {name: plain(x) for name, x in state.items()}

    def save(self, step: int) -> None:
        self._safetensors.save_file(self._state, f"{self._root}/{step}")

    def restore(self, step: int) -> Any:
        return self._safetensors.load_file(f"{self._root}/{step}")

    def remove(self, step: int) -> None:
        os.unlink(f"{self._root}/{step}")

    def close(self) -> None: ...


def targets(state: Any, sharding: Callable[[Any], Any] | None = None) -> Any:
    """What to restore into: shapes, types and shardings, those of the state by default."""
    import jax

    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=x.sharding if sharding is None else sharding(x)
        ),
        state,
    )


def same(one: Any, other: Any) -> bool:
    """Whether two arrays hold the same, as far as this host sees both."""
    if one.is_fully_addressable:
        return np.array_equal(plain(one), plain(other))
    theirs = {str(shard.index): shard.data for shard in other.addressable_shards}
    return all(
        np.array_equal(plain(shard.data), plain(theirs[str(shard.index)]))
        for shard in one.addressable_shards
        if str(shard.index) in theirs
    )


def plain(x: Any) -> np.ndarray:
    """The bytes of an array, in a type that every library knows."""
    array = np.ascontiguousarray(np.asarray(x))
    kinds = {1: np.uint8, 2: np.int16, 4: np.float32}
    return array.view(kinds[array.dtype.itemsize])


PEERS: dict[str, Callable[..., Contender]] = {
    "orbax_v0": OrbaxManager,
    "orbax_v1": OrbaxV1,
    "torch_dcp": TorchDcp,
    "safetensors": Safetensors,
}
