"""Data positions: each record of an epoch exactly once, on any number of hosts.

Give `save` and `restore` the iterator that the batches are taken from. There are three kinds of
positions:

- *global*: one cursor for all hosts. Grain's `ElasticIterator`, Mosaic's `StreamingDataLoader`, and
  whatever makes batch k from k (`tracked(dataset, 0)`). Any number of hosts.
- *shards*: `shards(factory, V)`. Any loader, V times; any number of hosts that divides V.
- *host*: any other loader with get_state/set_state or state_dict/load_state_dict. Exact on the same
  number of hosts, refused on another one.

`tracked` reads ahead and keeps the position right; `replay` counts what cannot be set back; `adapt`
says how a loader's position is read, and `register_adapter` teaches it another one.

A position may hold None, bools, ints, floats, texts, bytes, lists, tuples, dicts, numpy, JAX and
torch arrays and typed PRNG keys.
"""

from __future__ import annotations

from datarax_dist.data.adapters import (
    Checkpointable,
    CheckpointableIterator,
    DataAdapter,
    adapt,
    register_adapter,
)
from datarax_dist.data.streams import Replay, Shards, Tracked, replay, shards, tracked

__all__ = [
    "Checkpointable",
    "CheckpointableIterator",
    "DataAdapter",
    "Replay",
    "Shards",
    "Tracked",
    "adapt",
    "register_adapter",
    "replay",
    "shards",
    "tracked",
]
