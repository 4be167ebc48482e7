"""No lock-in: plain Orbax reads ours, we read plain Orbax's."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import targets
from jax.sharding import NamedSharding, PartitionSpec

import datarax_dist as dd
from datarax_dist.arrays import OrbaxArrays, describe_foreign
from datarax_dist.errors import InvalidArgumentError, StorageError, StructureMismatchError


@pytest.fixture
def arrays() -> Any:
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    w = jax.device_put(
        np.arange(64, dtype=np.float32).reshape(8, 8), NamedSharding(mesh, PartitionSpec("x"))
    )
    return {"w": w, "list": [w + 1, {"k": w.astype(jax.numpy.bfloat16)}], "n": np.arange(3)}


@pytest.fixture
def root(tmp_path: Path, arrays: Any) -> Path:
    with dd.Checkpointer(tmp_path / "ours") as ckpt:
        ckpt.save(4, state=arrays, data=targets.Counter(0, 1), metadata={"loss": 0.5})
    return tmp_path / "ours"


def same(a: Any, b: Any) -> bool:
    return dd.tree_digest(a) == dd.tree_digest(b)


def test_standard_checkpointer_restores_our_state(root: Path, arrays: Any) -> None:
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, arrays)
    with ocp.StandardCheckpointer() as plain:
        assert same(plain.restore(root / "4" / "state", abstract), arrays)
        assert same(plain.restore(root / "4" / "state"), arrays)


def test_checkpoint_manager_restores_our_step(root: Path, arrays: Any) -> None:
    with ocp.CheckpointManager(root) as manager:
        assert manager.latest_step() == 4
        back = manager.restore(
            4,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(arrays), metadata=ocp.args.JsonRestore()
            ),
        )
        assert same(back["state"], arrays)
        assert back["metadata"] == {"loss": 0.5}


@pytest.mark.parametrize(("theirs", "levels"), [(3, set()), (5, {logging.WARNING})])
def test_only_a_step_of_plain_orbax_that_is_newer_than_what_is_restored_is_warned_of(
    root: Path, arrays: Any, theirs: int, levels: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    with ocp.CheckpointManager(root) as manager:
        manager.save(theirs, args=ocp.args.StandardSave(arrays), force=True)
    caplog.clear()
    with dd.Checkpointer(root) as ckpt:
        restored = ckpt.restore()
    assert (restored.step, f"step {theirs}" in restored.report.refused) == (4, True)
    ours = [r for r in caplog.records if r.name == "datarax_dist"]
    assert {r.levelno for r in ours if r.levelno >= logging.WARNING} == levels


def test_v1_load_restores_our_state(root: Path, arrays: Any) -> None:
    from orbax.checkpoint import v1

    assert same(v1.load(root / "4", checkpointable_name="state"), arrays)


def test_a_directory_of_plain_orbax_restores(tmp_path: Path, arrays: Any) -> None:
    with ocp.CheckpointManager(tmp_path / "theirs") as manager:
        for step in (1, 2):
            manager.save(
                step, args=ocp.args.StandardSave(jax.tree.map(lambda x, s=step: x * s, arrays))
            )
    (tmp_path / "theirs" / "9").mkdir()
    with dd.Checkpointer(tmp_path / "theirs") as ckpt:
        assert ckpt.all_steps() == []
        restored = ckpt.restore(state=arrays)
        assert restored.step == 2 and restored.report.verified == "nothing"
        assert same(restored.state, jax.tree.map(lambda x: x * 2, arrays))
        assert same(ckpt.restore(step=1).state["w"], arrays["w"])
        ckpt.save(3, state=arrays)
        ckpt.wait_until_finished()
        assert ckpt.all_steps() == [3]
    assert {p.name for p in (tmp_path / "theirs").iterdir()} == {
        "1",
        "2",
        "3",
        "9",
        "RUN.json",
        "lease",
    }


def save_plainly(root: Path, step: int, state: Any, **how: Any) -> Path:
    """Saves a step as plain Orbax does, and returns the directory of its state."""
    handlers = {"state": ocp.PyTreeCheckpointHandler(**how)}
    with ocp.CheckpointManager(root, item_names=("state",), item_handlers=handlers) as manager:
        manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state)))
        manager.wait_until_finished()
    return root / str(step) / "state"


@pytest.fixture
def with_keys(arrays: Any) -> Any:
    split = jax.random.split(jax.random.key(3, impl="rbg"), 3)
    return {"w": arrays["w"], "rng": [jax.random.key(1), {"each": split}], "raw": np.arange(4)}


@pytest.mark.parametrize("how", [{}, {"use_zarr3": True}, {"use_ocdbt": False}])
def test_typed_keys_of_plain_orbax_restore(tmp_path: Path, with_keys: Any, how: Any) -> None:
    save_plainly(tmp_path, 3, with_keys, **how)
    with dd.Checkpointer(tmp_path) as ckpt:
        assert same(ckpt.restore().state, with_keys)
        assert same(ckpt.restore(state=with_keys).state, with_keys)
        other = with_keys | {"rng": [jax.random.key(1, impl="rbg"), with_keys["rng"][1]]}
        with pytest.raises(
            StructureMismatchError, match=r"PRNG key of threefry2x32.*the target is one"
        ):
            ckpt.restore(state=other)


def test_a_step_of_plain_orbax_with_a_key_is_not_passed_over(
    tmp_path: Path, with_keys: Any
) -> None:
    save_plainly(tmp_path, 2, {"w": with_keys["w"]})
    save_plainly(tmp_path, 3, with_keys)
    with dd.Checkpointer(tmp_path) as ckpt:
        restored = ckpt.restore()
    assert (restored.step, restored.report.refused) == (3, {})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda text: text.replace('"threefry2x32"', '"of another program"'),
            "rng/0 is a PRNG key of",
        ),
        (lambda text: text[:-5], "tells typed PRNG keys from plain numbers, cannot be read"),
        (lambda text: json.dumps({"array_metadatas": [3]}), "cannot be read"),
    ],
)
def test_a_kind_of_key_that_cannot_be_told_is_no_damage(
    tmp_path: Path, with_keys: Any, change: Any, told: str
) -> None:
    save_plainly(tmp_path, 2, {"w": with_keys["w"]})
    described = save_plainly(tmp_path, 3, with_keys) / "array_metadatas" / "process_0"
    described.write_text(change(described.read_text()))
    with dd.Checkpointer(tmp_path) as ckpt:
        with pytest.raises(StructureMismatchError, match=told):
            ckpt.restore()
        assert ckpt.restore(step=2).step == 2


def test_directories_of_plain_orbax_without_ocdbt_restore(tmp_path: Path, arrays: Any) -> None:
    state = arrays | {"text": "abc", "number": 2.5, "count": 7}
    save_plainly(tmp_path, 3, state, use_ocdbt=False)
    with dd.Checkpointer(tmp_path) as ckpt:
        assert same(ckpt.restore(state=state).state, state)
        found = ckpt.restore().state
        assert found["text"] == "abc"
        assert found["count"] == 7 and isinstance(found["count"], np.int64)  # as README.md says


def test_a_step_of_ours_is_in_a_database_or_damaged(tmp_path: Path, arrays: Any) -> None:
    """Where the sizes in its descriptions are compared with what was saved."""
    where = str(save_plainly(tmp_path, 3, arrays, use_ocdbt=False))
    spec = describe_foreign(where)
    wanted = [(leaf, None) for leaf in spec.leaves]
    engine = OrbaxArrays(str(tmp_path), 0, dd.Options())
    assert len(engine.restore("3/state", spec, wanted).values) == len(wanted)
    with pytest.raises(StorageError, match="Manifest not found"):
        engine.restore("3/state", dataclasses.replace(spec, is_foreign=False), wanted)
    engine.close()


def test_the_state_of_a_step_of_plain_orbax_may_have_any_name_if_it_is_the_only_one(
    tmp_path: Path, arrays: Any
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    saved = ocp.args.StandardSave(arrays)
    with ocp.CheckpointManager(one) as manager:
        manager.save(7, args=ocp.args.Composite(items=saved, meta=ocp.args.JsonSave({"a": 1})))
    with ocp.CheckpointManager(two) as manager:
        manager.save(7, args=ocp.args.Composite(params=saved, opt=saved))
    with dd.Checkpointer(one) as ckpt:
        assert dd.tree_digest(ckpt.restore(state=arrays).state) == dd.tree_digest(arrays)
    with dd.Checkpointer(two) as ckpt:
        with pytest.raises(InvalidArgumentError, match="the items opt, params, of which"):
            ckpt.restore(state=arrays)


@pytest.mark.parametrize("text", ["abc", ""])
def test_strings_of_plain_orbax_restore_with_a_target(tmp_path: Path, text: str) -> None:
    save_plainly(tmp_path, 3, {"w": np.arange(3), "text": text})
    with dd.Checkpointer(tmp_path) as ckpt:
        assert ckpt.restore(state={"w": np.zeros(3, int), "text": "x"}).state["text"] == text
        with pytest.raises(StructureMismatchError, match="saved as a str, the target is a int"):
            ckpt.restore(state={"text": 3})


def test_the_crc32c_codec_is_in_our_arrays_and_not_in_plain_orbaxs(
    root: Path, tmp_path: Path, arrays: Any
) -> None:
    """The contract with the one private spot of Orbax that is overridden."""
    import tensorstore as ts

    def codecs(path: Path) -> list[str]:
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "ocdbt", "base": f"file://{path}/", "path": "w/"},
        }
        [sharding] = ts.open(spec).result().spec().to_json()["metadata"]["codecs"]
        return [codec["name"] for codec in sharding["configuration"]["codecs"]]

    assert codecs(root / "4" / "state") == ["bytes", "crc32c"]
    handler = ocp.PyTreeCheckpointHandler(use_zarr3=True)
    with ocp.Checkpointer(handler) as plain:
        plain.save(tmp_path / "plain", arrays)
    assert "crc32c" not in codecs(tmp_path / "plain")
