"""No lock-in: plain Orbax reads ours, we read plain Orbax's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import targets
from jax.sharding import NamedSharding, PartitionSpec

import datarax_dist as dd


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
