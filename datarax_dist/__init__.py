"""datarax_dist: one consistent, verified checkpoint step for JAX training on many hosts.

    import datarax_dist as dd

    with dd.Checkpointer("/checkpoints/run42", keep=dd.latest(3)) as ckpt:
        ckpt.save(step, state=state, data=batches, metadata={"loss": 0.1})
        restored = ckpt.try_restore(state=state, data=batches)

Importing it loads nothing heavy: JAX and Orbax come with the first name that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from datarax_dist import data, errors
    from datarax_dist.checkpointer import Checkpointer, Restored, StepInfo
    from datarax_dist.config import (
        KeepPolicy,
        Options,
        SavePolicy,
        every_n_steps,
        every_steps,
        latest,
    )
    from datarax_dist.data import Checkpointable, CheckpointableIterator
    from datarax_dist.handles import Progress, SaveHandle
    from datarax_dist.request import SaveReport
    from datarax_dist.restore import RestoreReport
    from datarax_dist.trees import tree_digest

__all__ = [
    "Checkpointable",
    "CheckpointableIterator",
    "Checkpointer",
    "KeepPolicy",
    "Options",
    "Progress",
    "RestoreReport",
    "Restored",
    "SaveHandle",
    "SavePolicy",
    "SaveReport",
    "StepInfo",
    "__version__",
    "data",
    "errors",
    "every_n_steps",
    "every_steps",
    "latest",
    "tree_digest",
]

_HOME = {
    "Checkpointable": "data",
    "CheckpointableIterator": "data",
    "Checkpointer": "checkpointer",
    "KeepPolicy": "config",
    "Options": "config",
    "Progress": "handles",
    "RestoreReport": "restore",
    "Restored": "checkpointer",
    "SaveHandle": "handles",
    "SavePolicy": "config",
    "SaveReport": "request",
    "StepInfo": "checkpointer",
    "every_n_steps": "config",
    "every_steps": "config",
    "latest": "config",
    "tree_digest": "trees",
}


def __dir__() -> list[str]:
    return [*__all__, "checkpoint", "testing"]


def __getattr__(name: str) -> Any:
    if name in ("checkpoint", "data", "errors", "testing"):
        return importlib.import_module(f"datarax_dist.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"datarax_dist.{_HOME[name]}"), name)
    raise AttributeError(f"module 'datarax_dist' has no attribute {name!r}")
