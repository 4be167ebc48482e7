"""The datarax calling convention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import targets
from flax import nnx

import datarax_dist as dd
from datarax_dist.checkpoint import IteratorCheckpoint, OrbaxCheckpointHandler, PipelineCheckpoint
from datarax_dist.testing import faults, run_hosts


class Pipeline:
    def __init__(self) -> None:
        self.state: dict[str, Any] = {"at": 0, "key": jax.random.key(0), "name": "train"}

    def get_state(self) -> dict[str, Any]:
        return self.state

    def set_state(self, state: dict[str, Any]) -> None:
        self.state = state


def test_a_checkpointable_comes_back_into_the_target_which_is_returned(tmp_path: Path) -> None:
    pipeline = Pipeline()
    pipeline.state["at"] = 7
    with OrbaxCheckpointHandler() as handler:
        path = handler.save(str(tmp_path), pipeline, step=1000, keep=5, metadata={"epoch": 10})
        assert path == str(tmp_path / "1000")
        fresh = Pipeline()
        assert handler.restore(str(tmp_path), fresh) is fresh
        assert fresh.state["at"] == 7 and fresh.state["name"] == "train"
        assert (
            jax.random.key_data(fresh.state["key"]).tolist()
            == jax.random.key_data(jax.random.key(0)).tolist()
        )
        assert handler.restore(str(tmp_path), metadata_only=True) == {"epoch": 10}
        assert handler.restore(str(tmp_path))["at"] == 7


def test_keep_deletes_the_oldest_and_lists_the_rest(tmp_path: Path) -> None:
    with OrbaxCheckpointHandler() as handler:
        for step in (1, 2, 3):
            handler.save(tmp_path, {"a": step}, step=step, keep=2)
        assert handler.get_checkpoint_steps(tmp_path) == [2, 3]
        assert handler.latest_step(tmp_path) == 3
        assert handler.list_checkpoints(tmp_path) == {
            2: str(tmp_path / "2"),
            3: str(tmp_path / "3"),
        }
    assert not (tmp_path / "1").exists()


def test_overwrite_replaces_and_without_it_the_old_one_stays(tmp_path: Path) -> None:
    with OrbaxCheckpointHandler() as handler:
        handler.save(tmp_path, {"a": 1}, step=1)
        with pytest.raises(ValueError, match="overwrite"):
            handler.save(tmp_path, {"a": 2}, step=1)
        assert handler.restore(tmp_path) == {"a": 1}
        handler.save(tmp_path, {"a": 2}, step=1, overwrite=True)
        assert handler.restore(tmp_path) == {"a": 2}


def test_an_unversioned_checkpoint_is_saved_replaced_and_restored(tmp_path: Path) -> None:
    with OrbaxCheckpointHandler() as handler:
        handler.save(tmp_path, {"a": 1})
        with pytest.raises(ValueError, match="overwrite"):
            handler.save(tmp_path, {"a": 2})
        handler.save(tmp_path, {"a": 2}, overwrite=True)
        assert handler.restore(tmp_path) == {"a": 2}
        assert handler.get_checkpoint_steps(tmp_path) == []


def test_value_errors_where_datarax_raises_them(tmp_path: Path) -> None:
    with OrbaxCheckpointHandler() as handler:
        with pytest.raises(ValueError, match="not found"):
            handler.restore(tmp_path / "nowhere")
        with pytest.raises(ValueError, match="No checkpoints"):
            handler.restore(tmp_path)
        handler.save(tmp_path, {"a": 1}, step=1)
        with pytest.raises(ValueError, match="no committed step 9"):
            handler.restore(tmp_path, step=9)


def test_an_nnx_module_is_updated_in_place(tmp_path: Path) -> None:
    class Model(nnx.Module):
        def __init__(self, seed: int) -> None:
            rngs = nnx.Rngs(seed)
            self.linear = nnx.Linear(3, 4, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    saved, fresh = Model(1), Model(2)
    with OrbaxCheckpointHandler() as handler:
        handler.save(tmp_path, saved, step=1)
        assert handler.restore(tmp_path, fresh) is fresh
    assert np.array_equal(fresh.linear.kernel[...], saved.linear.kernel[...])
    assert dd.tree_digest(nnx.to_pure_dict(nnx.state(fresh))) == dd.tree_digest(
        nnx.to_pure_dict(nnx.state(saved))
    )


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_prng_keys_of_every_impl_nested_and_batched(tmp_path: Path, impl: str) -> None:
    key = jax.random.key(3, impl=impl)
    tree = {"one": key, "nested": [{"many": jax.random.split(key, (2, 3))}], "text": "a"}
    with OrbaxCheckpointHandler() as handler:
        handler.save(tmp_path, tree, step=1)
        for back in (handler.restore(tmp_path), handler.restore(tmp_path, tree)):
            assert dd.tree_digest(back) == dd.tree_digest(tree)
            assert jax.random.bits(back["nested"][0]["many"][1, 2]) == jax.random.bits(
                tree["nested"][0]["many"][1, 2]
            )


def test_iterator_and_pipeline_checkpoints(tmp_path: Path) -> None:
    counter = targets.Counter(0, 1)
    with IteratorCheckpoint(tmp_path / "i") as checkpoint:
        next(counter)
        checkpoint.save(counter, 1)
        next(counter)
        assert checkpoint.restore(counter).at == 1
    with PipelineCheckpoint(tmp_path / "p", async_checkpointing=True) as pipeline:
        assert pipeline.save_to_step(counter, 3, interval=2) is None
        assert pipeline.save_to_step(counter, 4, interval=2) == str(tmp_path / "p" / "4")
        pipeline.wait_until_finished()
        assert pipeline.latest_step() == 4


@pytest.mark.multihost
@pytest.mark.xdist_group("multihost")
def test_each_host_gets_its_own_part_back_and_another_count_is_refused(tmp_path: Path) -> None:
    hosts = run_hosts(targets.handler_save, 2, args=(str(tmp_path),), timeout_seconds=90)
    assert [host.error for host in hosts] == [None, None]
    assert [host.value for host in hosts] == [(8, 8, True), (12, 12, True)]
    [alone] = run_hosts(targets.handler_restore, 1, args=(str(tmp_path),), timeout_seconds=90)
    assert alone.value is not None
    assert alone.value[0] == "PositionError"
    assert "was saved by 2 hosts; this job has 1" in alone.value[1]
    assert "data=None" not in alone.value[1], "the handler has no data="


@pytest.mark.multihost
@pytest.mark.xdist_group("multihost")
def test_a_target_with_a_part_of_a_mixed_tree_reads_no_other_arrays(tmp_path: Path) -> None:
    hosts = run_hosts(targets.handler_parts, 2, args=(str(tmp_path),), timeout_seconds=90)
    assert [host.error for host in hosts] == [None, None]
    for host in hosts:
        assert host.value == [(True, ["params/b", "params/w"]), (True, [])]


@pytest.mark.multihost
@pytest.mark.xdist_group("multihost")
def test_a_host_may_have_nothing_for_itself_where_another_one_has(tmp_path: Path) -> None:
    hosts = run_hosts(targets.handler_buffers, 2, args=(str(tmp_path),), timeout_seconds=90)
    assert [host.error for host in hosts] == [None, None]
    for number, host in enumerate(hosts):
        buffer = {"buffer": [5] * number}
        assert host.value == [buffer, buffer, True, True, 1 - number]


@pytest.mark.parametrize("depth", [0, 20, 150])
def test_a_state_of_ones_own_may_be_nothing_and_may_be_deep(tmp_path: Path, depth: int) -> None:
    state: Any = None
    for _ in range(depth):
        state = {"a": state}
    with OrbaxCheckpointHandler() as handler:
        handler.save(tmp_path, targets.Thing(state), step=1)
        assert handler.restore(tmp_path, targets.Thing([1])).state == state


def test_a_step_with_the_position_of_any_loader_is_one_of_the_handler(tmp_path: Path) -> None:
    names = ("local", "data", "state", "handler", "checkpoint")
    data = {name: Pipeline() for name in names}
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state={"w": np.ones(3)}, data=data).result()
    restored = OrbaxCheckpointHandler().restore(tmp_path / "run", {"w": np.zeros(3)})
    assert restored["w"].tolist() == [1, 1, 1]


def test_close_ends_every_directory_and_raises_the_first_failure(tmp_path: Path) -> None:
    handler = OrbaxCheckpointHandler(async_checkpointing=True)
    handler.save(tmp_path / "a", {"x": np.ones(3)}, step=1)
    handler.save(tmp_path / "b", {"x": np.ones(3)}, step=1)
    handler.wait_until_finished()
    runs = list(handler._runs.values())
    with faults.fail_at("save:record", 0, OSError(28, "No space left on device")):
        handler.save(tmp_path / "a", {"x": np.ones(3)}, step=2)
        with pytest.raises(OSError, match="No space left"):
            handler.close()
    handler.close()
    assert all(run._closed for run in runs)
    assert OrbaxCheckpointHandler().get_checkpoint_steps(tmp_path / "b") == [1]


def test_directories_that_were_left_cost_nothing(tmp_path: Path) -> None:
    with OrbaxCheckpointHandler() as handler:
        runs = []
        for number in range(30):
            handler.save(tmp_path / str(number), {"a": number}, step=1)
            runs.append(handler._runs[str(tmp_path / str(number))])
        assert [run._closed for run in runs] == [True] * 22 + [False] * 8
        handler.save(tmp_path / "0", {"a": 2}, step=2)
        assert [handler.latest_step(tmp_path / str(number)) for number in range(30)] == [2] + [
            1
        ] * 29


def test_a_close_that_was_cut_short_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = OrbaxCheckpointHandler(async_checkpointing=True)
    for name in ("a", "b"):
        handler.save(tmp_path / name, {"a": 1}, step=1)
    first, second = handler._runs.values()

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(first, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            handler.close()
    handler.close()
    assert first._closed and second._closed
    handler.save(tmp_path / "a", {"a": 2}, step=2)
    handler.close()


def test_the_end_of_a_with_block_never_hides_the_error_of_its_body(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def body() -> None:
        with OrbaxCheckpointHandler(async_checkpointing=True) as handler:
            handler.save(tmp_path, {"x": np.ones(3)}, step=1)
            raise KeyError("mine")

    error = OSError(28, "No space left on device")
    with faults.fail_at("save:record", 0, error), pytest.raises(KeyError, match="mine"):
        body()
    assert "closing after KeyError" in caplog.text
