"""Today's datarax over our steps. Runs in a job of its own, which has Python 3.12 and datarax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datarax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from datarax.checkpoint import IteratorCheckpoint
from flax import nnx
from substrax.checkpoint import (
    CheckpointDtypeMismatchError,
    CheckpointNotFoundError,
    CheckpointNotWrittenError,
    CheckpointStore,
    OrbaxCheckpointStore,
)

import datarax_dist as dd
from datarax_dist.checkpoint import OrbaxCheckpointHandler
from datarax_dist.substrax_store import SubstraxStore


class Counter:
    def __init__(self, at: int = 0) -> None:
        self.at = at

    def get_state(self) -> dict[str, Any]:
        return {"at": self.at, "key": jax.random.key(self.at), "shard_count": 1}

    def set_state(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


@pytest.fixture(params=[OrbaxCheckpointStore, SubstraxStore])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Theirs and ours: what holds for one must hold for the other."""
    with request.param(tmp_path / "run", max_to_keep=3) as made:
        yield made


ITEMS = {
    "model": {"w": jnp.arange(6.0).reshape(2, 3), "layers": [jnp.ones(2), jnp.zeros(1)]},
    "rng": jax.random.key(7),
    "data_iterator": {"at": 3, "name": "train"},
}


def test_it_is_a_checkpoint_store(store: Any) -> None:
    assert isinstance(store, CheckpointStore)
    assert store.list_steps() == []
    assert store.latest_step() is None
    assert store.best_step("loss") is None


def test_items_and_metadata_come_back(store: Any, tmp_path: Path) -> None:
    path = store.save(4, ITEMS, epoch=2, metrics={"loss": 0.5}, extra={"note": "x"})
    assert path == (tmp_path / "run" / "4").resolve()
    back = store.restore(4)
    assert back.step == 4
    assert list(back.items) == list(ITEMS)
    assert dd.tree_digest(back.items) == dd.tree_digest(ITEMS)
    record = store.read_metadata(4)
    assert (record.step, record.epoch, record.items) == (4, 2, tuple(ITEMS))
    assert (record.metrics, record.extra) == ({"loss": 0.5}, {"note": "x"})
    assert back.metadata == record


def test_templates_say_where_and_dtypes_are_not_changed_silently(store: Any) -> None:
    store.save(1, ITEMS)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    there = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    template = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there), ITEMS["model"]
    )
    back = store.restore(1, templates={"model": template})
    assert back.items["model"]["w"].sharding == there
    assert dd.tree_digest(back.items) == dd.tree_digest(ITEMS)
    half = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16, sharding=there), ITEMS["model"]
    )
    with pytest.raises(CheckpointDtypeMismatchError) as caught:
        store.restore(1, templates={"model": half})
    assert {(m.item, m.leaf, m.saved, m.restored) for m in caught.value.mismatches} >= {
        ("model", "w", "float32", "bfloat16")
    }
    cast = store.restore(1, templates={"model": half}, cast_dtypes=True).items["model"]["w"]
    assert (cast.dtype, cast.sharding) == (jnp.bfloat16, there)
    with pytest.raises(ValueError, match="optimizer"):
        store.restore(1, templates={"optimizer": {}})


def test_64_bit_arrays_are_not_cut_silently(store: Any) -> None:
    with jax.enable_x64(True):
        store.save(1, {"model": {"n": jnp.arange(3, dtype=jnp.int64)}})
    with pytest.raises(CheckpointDtypeMismatchError, match="x64"):
        store.restore(1)
    cut = store.restore(1, cast_dtypes=True).items["model"]["n"]
    assert (cut.dtype, cut.tolist()) == (jnp.int32, [0, 1, 2])


def test_steps_only_grow_and_none_is_replaced_unasked(store: Any) -> None:
    for step in (1, 5):
        store.save(step, {"model": {"a": jnp.int32(step)}}, metrics={"loss": 1 / (step + 1)})
    for step, reason in ((5, "exists"), (3, "below_latest")):
        with pytest.raises(CheckpointNotWrittenError) as caught:
            store.save(step, {"model": {"a": jnp.int32(0)}})
        assert (caught.value.step, caught.value.latest_step, caught.value.reason) == (
            step,
            5,
            reason,
        )
    store.save(5, {"model": {"a": jnp.int32(50)}}, metrics={"loss": 9.0}, overwrite=True)
    assert int(store.restore(5).items["model"]["a"]) == 50
    assert (store.best_step("loss"), store.best_step("loss", mode="max")) == (1, 5)
    for step in (6, 7):
        store.save(step, {"model": {"a": jnp.int32(step)}})
    assert store.list_steps() == [5, 6, 7]
    store.delete(6)
    assert (store.list_steps(), store.latest_step()) == ([5, 7], 7)
    for call in (store.restore, store.delete, store.read_metadata):
        with pytest.raises(CheckpointNotFoundError):
            call(6)


@pytest.mark.parametrize(
    ("step", "items", "extra"),
    [(-1, ITEMS, {}), (1, {}, {}), (1, {"weights": {}}, {}), (1, ITEMS, {"step": 3})],
    ids=["negative step", "no items", "unknown item", "reserved key"],
)
def test_bad_input_is_a_value_error(store: Any, step: int, items: Any, extra: Any) -> None:
    with pytest.raises(ValueError):
        store.save(step, items, extra=extra)
    assert store.list_steps() == []


def test_an_nnx_state_is_saved_and_restored_as_one(store: Any) -> None:
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    store.save(1, {"model": nnx.state(model)})
    other = nnx.Linear(3, 2, rngs=nnx.Rngs(1))
    back = store.restore(1, templates={"model": nnx.state(other)}).items["model"]
    nnx.update(other, back)
    assert dd.tree_digest(nnx.to_pure_dict(nnx.state(other))) == dd.tree_digest(
        nnx.to_pure_dict(nnx.state(model))
    )


def test_datarax_own_iterator_checkpoint_runs_over_our_store(tmp_path: Path) -> None:
    with IteratorCheckpoint(tmp_path, store=SubstraxStore(tmp_path, max_to_keep=2)) as checkpoint:
        for step in (1000, 2000, 3000):
            checkpoint.save(Counter(step), step, epoch=1, metadata={"loss": 0.5})
        assert checkpoint.all_steps() == [2000, 3000]
        fresh = Counter()
        checkpoint.restore(fresh)
        assert fresh.at == 3000
        checkpoint.restore(fresh, step=2000)
        assert fresh.at == 2000
    with dd.Checkpointer(tmp_path) as ckpt:
        assert ckpt.all_steps() == [2000, 3000]


def test_a_pipeline_of_datarax_resumes_where_it_was(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    iterator = iter(pipeline)
    for _ in range(3):
        next(iterator)
    with OrbaxCheckpointHandler() as handler:
        handler.save(tmp_path, iterator, step=3, metadata={"epoch": 0})
        expected = [batch_of(next(iterator)) for _ in range(2)]
        fresh = iter(make_pipeline())
        handler.restore(tmp_path, fresh)
    assert [batch_of(next(fresh)) for _ in range(2)] == expected
    with IteratorCheckpoint(tmp_path / "s", store=SubstraxStore(tmp_path / "s")) as checkpoint:
        checkpoint.save(fresh, 5)
        expected = batch_of(next(fresh))
        again = iter(make_pipeline())
        checkpoint.restore(again)
    assert batch_of(next(again)) == expected


def make_pipeline() -> Any:
    from datarax.pipeline import Pipeline
    from datarax.sources import MemorySource, MemorySourceConfig

    source = MemorySource(
        MemorySourceConfig(), data={"x": np.arange(64, dtype=np.float32)}, rngs=nnx.Rngs(0)
    )
    return Pipeline(source=source, stages=[], batch_size=4, rngs=nnx.Rngs(0))


def batch_of(batch: Any) -> list[float]:
    return np.asarray(batch["x"]).ravel().tolist()


def test_this_is_todays_datarax() -> None:
    major, minor, patch = (int(part) for part in datarax.__version__.split(".")[:3])
    assert (major, minor, patch) >= (0, 1, 6)
