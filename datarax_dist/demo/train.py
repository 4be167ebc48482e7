"""What each host of the demo runs: a small character-level transformer, read through Grain.

The job is an ordinary one. Parameters and optimizer state are sharded over all hosts, the text
comes from the Python standard library's own source files, and one `Checkpointer` saves both the
state and the data positions. Each host logs every step to a file, so that a host that is killed
leaves its account behind.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import datarax_dist as dd
from datarax_dist.data import shards

__all__ = [
    "BATCH",
    "DATA_SHARDS",
    "SEQUENCE",
    "STEPS",
    "HostRun",
    "Records",
    "train",
]

STEPS = 48
BATCH = 32
SEQUENCE = 64
DATA_SHARDS = 4

_VOCABULARY = 128
_WIDTH = 64
_HEADS = 4
_LAYERS = 2
_DROPOUT = 0.1
_LEARNING_RATE = 3e-3
_SEED = 20240607

Tree = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRun:
    """What one start of the job is told.

    Attributes:
        root: where the run keeps its checkpoints.
        logs: where each host writes ``host-N.jsonl``, one line for each event.
        stop: the first step that is not taken any more.
        save_every: a step is saved whenever this many have been taken.
    """

    root: str
    logs: str
    stop: int
    save_every: int


class Records:
    """The records of the epoch, as a Grain data source: pieces of text, each with an id.

    All modules at the top of the standard library, in the order of their names, are cut into
    pieces of the same length, and as many as one epoch needs are taken, evenly spread.
    """

    def __init__(self) -> None:
        self._table = _read_records()

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"id": np.int32(index), "text": self._table[index]}

    def digest(self) -> str:
        """Returns a digest of all records, which a restore compares as part of the fingerprint."""
        return hashlib.sha256(self._table.tobytes()).hexdigest()[:16]


@cache
def _read_records() -> np.ndarray[Any, np.dtype[np.uint8]]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    length, wanted = SEQUENCE + 1, STEPS * BATCH
    pieces = len(text) // length
    if pieces < wanted:
        raise RuntimeError(
            f"{folder} holds {len(text)} bytes of Python source, the demo needs {wanted * length}."
        )
    table = np.frombuffer(text[: pieces * length], np.uint8).reshape(pieces, length)
    chosen = table[np.arange(wanted) * pieces // wanted]
    return np.where(chosen < _VOCABULARY, chosen, np.uint8(0))


def _loader(shard: int, count: int) -> Any:
    """Returns one logical shard of the epoch: a Grain pipeline whose iterator has a position."""
    source = grain.MapDataset.source(Records())
    dataset = source[shard::count].shuffle(seed=_SEED).batch(BATCH // count)
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))


def _init(key: jax.Array) -> Tree:
    """Returns the state before the first step."""
    init_key, dropout_key = jax.random.split(key)
    keys = iter(jax.random.split(init_key, 3 + 4 * _LAYERS))

    def matrix(rows: int, columns: int) -> jax.Array:
        return jax.random.normal(next(keys), (rows, columns), jnp.float32) / np.sqrt(rows)

    params: Tree = {
        "embed": matrix(_VOCABULARY, _WIDTH),
        "position": 0.1 * matrix(SEQUENCE, _WIDTH),
        "head": matrix(_WIDTH, _VOCABULARY),
        "norm": jnp.ones(_WIDTH),
        "layers": [
            {
                "norm_1": jnp.ones(_WIDTH),
                "qkv": matrix(_WIDTH, 3 * _WIDTH),
                "out": matrix(_WIDTH, _WIDTH),
                "norm_2": jnp.ones(_WIDTH),
                "up": matrix(_WIDTH, 4 * _WIDTH),
                "down": matrix(4 * _WIDTH, _WIDTH),
            }
            for _ in range(_LAYERS)
        ],
    }
    return {"params": params, "optimizer": _optimizer().init(params), "key": dropout_key}


def _optimizer() -> Any:
    return optax.adamw(_LEARNING_RATE, weight_decay=0.01)


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * scale * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def _dropout(x: jax.Array, keys: jax.Array, place: int) -> jax.Array:
    """Drops by record, not by row: on another number of hosts the rows come in another order."""

    def keep(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, place), 1 - _DROPOUT, x.shape[1:])

    return jnp.where(jax.vmap(keep)(keys), x / (1 - _DROPOUT), 0)


def _loss(params: Tree, text: jax.Array, keys: jax.Array) -> jax.Array:
    """Returns the mean cross entropy of the next character."""
    inputs, targets = text[:, :-1].astype(jnp.int32), text[:, 1:].astype(jnp.int32)
    x = params["embed"][inputs] + params["position"]
    mask = jnp.tril(jnp.ones((SEQUENCE, SEQUENCE), bool))
    for number, layer in enumerate(params["layers"]):
        qkv = _norm(x, layer["norm_1"]) @ layer["qkv"]
        split = (*x.shape[:2], _HEADS, _WIDTH // _HEADS)
        query, keyed, value = (part.reshape(split) for part in jnp.split(qkv, 3, -1))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, keyed) / np.sqrt(_WIDTH // _HEADS)
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e9), -1)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        x = x + _dropout(mixed @ layer["out"], keys, 2 * number)
        hidden = jax.nn.gelu(_norm(x, layer["norm_2"]) @ layer["up"])
        x = x + _dropout(hidden @ layer["down"], keys, 2 * number + 1)
    logits = _norm(x, params["norm"]) @ params["head"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def _step(state: Tree, text: jax.Array, ids: jax.Array) -> tuple[Tree, jax.Array]:
    key, used = jax.random.split(state["key"])
    keys = jax.vmap(lambda number: jax.random.fold_in(used, number))(ids)
    loss, gradients = jax.value_and_grad(_loss)(state["params"], text, keys)
    updates, optimizer = _optimizer().update(gradients, state["optimizer"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "optimizer": optimizer, "key": key}, loss


def _shardings(mesh: Mesh, tree: Any) -> Any:
    """Splits the largest dimension that the hosts divide; keeps the rest equal on all of them."""

    def sharding(leaf: Any) -> NamedSharding:
        fitting = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0]
        if not fitting or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return NamedSharding(mesh, PartitionSpec())
        axis = max(fitting, key=lambda number: leaf.shape[number])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))

    return jax.tree.map(sharding, tree)


class _Log:
    """The account of one host: one JSON object for each line, written at once."""

    def __init__(self, folder: str) -> None:
        self._path = Path(folder, f"host-{jax.process_index()}.jsonl")

    def write(self, event: str, **fields: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **fields}) + "\n")


def train(run: HostRun) -> Mapping[str, Any]:
    """Trains up to a step, from where the run's newest checkpoint left off.

    Args:
        run: what to do, the same on every host.

    Returns:
        The first step that was taken, and the steps that are committed now.
    """
    log = _Log(run.logs)
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())

    seed = jax.random.key(_SEED)
    layout = _shardings(mesh, jax.eval_shape(_init, seed))
    state = jax.jit(lambda: _init(jax.random.key(_SEED)), out_shardings=layout)()
    step_fn = jax.jit(_step, out_shardings=(layout, whole), donate_argnums=0)

    records = Records()
    fingerprint = {"seed": _SEED, "records": len(records), "digest": records.digest()}
    batches = shards(_loader, DATA_SHARDS, fingerprint=fingerprint)

    with dd.Checkpointer(run.root) as checkpointer:
        fresh_digest = dd.tree_digest(state)
        restored = checkpointer.try_restore(state=state, data=batches)
        start = 0
        if restored is not None:
            state, start = restored.state, restored.step + 1
            log.write(
                "restored",
                step=restored.step,
                saved_digest=restored.metadata["digest"],
                restored_digest=dd.tree_digest(state),
                fresh_digest=fresh_digest,
                report=str(restored.report),
                refused=dict(restored.report.refused),
                seconds=dict(restored.report.seconds),
            )
        for step in range(start, run.stop):
            local = next(batches)
            text = jax.make_array_from_process_local_data(rows, local["text"])
            ids = jax.make_array_from_process_local_data(rows, local["id"])
            state, loss_array = step_fn(state, text, ids)
            loss = np.float32(loss_array)
            log.write(
                "step",
                step=step,
                loss=float(loss),
                bits=f"{int(loss.view(np.uint32)):08x}",
                ids=[int(number) for number in local["id"]],
            )
            if (step + 1) % run.save_every == 0:
                digest = dd.tree_digest(state)
                log.write("save", step=step, digest=digest)
                metadata = {"digest": digest, "loss": float(loss)}
                checkpointer.save(step, state=state, data=batches, metadata=metadata)
        checkpointer.wait_until_finished()
        return {"start": start, "committed": checkpointer.all_steps()}
