"""`compression="auto"`: what is compressed, why, and that it is read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import datarax_dist as dd
from datarax_dist import format as fmt
from datarax_dist.arrays import engine
from datarax_dist.arrays.sampling import compress_sample
from datarax_dist.compression import Advisor
from datarax_dist.errors import InvalidArgumentError
from datarax_dist.testing import run_hosts

GIB = 1 << 30


def advised(
    speed: float, *samples: tuple[str, float, float], size: int = GIB, threads: int = 2
) -> Any:
    advisor = Advisor(threads)
    advisor.note_speed(GIB, GIB / speed)
    for name, ratio, seconds_per_byte in samples:
        assert advisor.wants_sample(name, size)
        advisor.note_sample(name, size, ratio, seconds_per_byte)
    return advisor.choose()


def test_what_shrinks_is_compressed_on_a_slow_storage_and_nothing_on_a_fast_one() -> None:
    samples = ("weights", 0.75, 2e-9), ("zeros", 0.001, 0.3e-9), ("noise", 0.95, 3e-9)
    assert set(advised(100e6, *samples).compressed) == {"weights", "zeros"}
    assert set(advised(1.4e9, *samples).compressed) == {"zeros"}
    assert advised(20e9, *samples).compressed == ()


def test_a_choice_says_what_it_was_made_of() -> None:
    slow = advised(100e6, ("w", 0.5, 1.6e-9))
    assert slow.why == (
        "zstd for 1 of 1: the storage has taken 100 MB/s; samples shrank to 0.50, at 1.2 GB/s on 2"
        " threads"
    )
    assert advised(3e9, ("w", 0.5, 2e-9)).why.startswith("none: the storage has taken 3.0 GB/s;")
    assert "measured the storage yet" in Advisor(2).choose().why


def test_what_is_larger_than_the_limit_of_bytes_is_not_compressed() -> None:
    advisor = Advisor(2)
    advisor.note_speed(GIB, 100.0)
    advisor.note_sample("large", GIB, 0.1, 1e-9)
    advisor.note_sample("small", GIB // 8, 0.1, 1e-9)
    assert advisor.choose().compressed == ("large", "small")
    assert advisor.choose(GIB // 2).compressed == ("small",)


def test_an_array_that_has_left_the_state_is_neither_compressed_nor_counted() -> None:
    advisor = Advisor(2)
    advisor.note_speed(GIB, 100.0)
    for name in ("there", "gone"):
        advisor.note_sample(name, GIB, 0.1, 1e-9)
    advisor.forget_others(["there", "new"])
    choice = advisor.choose()
    assert choice.compressed == ("there",)
    assert choice.why.startswith("zstd for 1 of 1")


def test_samples_are_taken_of_large_arrays_once_the_storage_is_known_and_now_and_then() -> None:
    advisor = Advisor(1)
    assert not advisor.wants_sample("w", GIB), "what for?"
    advisor.note_speed(1 << 20, 1.0)
    assert not advisor.wants_sample("w", GIB), "so little says nothing of the storage"
    advisor.note_speed(GIB, 1.0)
    assert not advisor.wants_sample("w", 1000)
    assert advisor.wants_sample("w", GIB)
    advisor.note_sample("w", GIB, 0.5, 1e-9)
    assert not advisor.wants_sample("w", GIB)
    assert advisor.wants_sample("w", GIB // 2), "another array of that name"
    for _ in range(10):
        advisor.note_speed(GIB, 1.0)
    assert advisor.wants_sample("w", GIB)


def test_a_save_that_was_compressed_does_not_make_the_storage_seem_slow() -> None:
    advisor = Advisor(1)
    advisor.note_sample("w", GIB, 0.5, 0.6e-9)
    advisor.note_speed(GIB, 1.0)
    assert advisor.choose().compressed
    advisor.note_speed(GIB, 0.5, compressed=True)
    assert advisor.choose().compressed == (), "it takes 2 GB/s"
    advisor.note_speed(GIB, 4.0, compressed=True)
    assert advisor.choose().compressed == ()
    advisor.note_speed(GIB, 4.0)
    assert advisor.choose().compressed


def test_a_sample_tells_noise_from_zeros_however_it_lies_in_memory() -> None:
    noise = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    for values in (noise, noise.T, noise[:, ::2]):
        ratio, seconds = compress_sample(values)
        assert 0.85 < ratio < 1.01
        assert seconds > 0
    assert compress_sample(np.zeros((1 << 20,), np.int8))[0] < 0.01
    assert compress_sample(np.float32(3.0).reshape(()))[0] > 0


def _state() -> dict[str, Any]:
    random = np.random.default_rng(1)
    return {
        "zeros": jnp.zeros((1 << 20,)),
        "noise": jnp.asarray(random.standard_normal((1 << 20,), np.float32)),
        "numbers": jnp.arange(7),
        "numpy": np.zeros((1 << 18,), np.float32),
    }


def _seem_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every save seems to have gone to a storage of 10 MB/s."""
    real = Advisor.note_speed

    def note(self: Advisor, written: int, seconds: float, **more: Any) -> None:
        real(self, GIB, GIB / 10e6, **more)

    monkeypatch.setattr(Advisor, "note_speed", note)


def _size(step: Path) -> int:
    return sum(path.stat().st_size for path in (step / "state").rglob("*") if path.is_file())


def _note(step: Path) -> str:
    name = fmt.host_record_name(0, 1)
    return fmt.parse_record((step / name).read_bytes(), name).notes["compression"]


def test_the_second_save_compresses_what_the_first_has_shown_to_shrink(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _seem_slow(monkeypatch)
    state = _state()
    with dd.Checkpointer(tmp_path) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state=state).result()
            restored = ckpt.restore(state=state)
            assert restored.step == step
            assert dd.tree_digest(restored.state) == dd.tree_digest(state)
        for step in (3, 4):
            ckpt.save(step, state={"noise": state["noise"]}).result()
    assert _note(tmp_path / "4").startswith("none: the storage"), "the zeros have left the state"
    assert _note(tmp_path / "1").startswith("none: no save of 16 MiB")
    assert _note(tmp_path / "2").startswith("zstd for 1 of 2: the storage has taken 10 MB/s;")
    saved = _size(tmp_path / "1") - _size(tmp_path / "2")
    assert 0.95 * (4 << 20) < saved < 4 << 20, "the zeros, and not the noise"
    with ocp.StandardCheckpointer() as plain:
        found = plain.restore(tmp_path / "2" / "state")
    assert np.array_equal(found["zeros"], state["zeros"])
    assert np.array_equal(found["noise"], state["noise"])


def test_a_fast_storage_is_given_arrays_as_they_are(tmp_path: Path) -> None:
    state = {"zeros": jnp.zeros((8 << 20,))}
    with dd.Checkpointer(tmp_path, options=dd.Options(compression="none")) as ckpt:
        ckpt.save(1, state=state).result()
        ckpt.save(2, state=state).result()
    for step in (1, 2):
        assert _note(tmp_path / str(step)) == "none: as Options.compression says"
        assert _size(tmp_path / str(step)) > 32 << 20


def on_two_hosts(root: str) -> Any:
    """Each host would choose something else by itself; a step is what host 0 chooses."""
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    real, host = Advisor.note_speed, jax.process_index()

    def note(self: Advisor, written: int, seconds: float, **more: Any) -> None:
        real(self, GIB, GIB / (10e6 if host == 0 else 1e12), **more)

    Advisor.note_speed = note  # type: ignore[method-assign]
    mesh = Mesh(np.array(jax.devices()), ("x",))
    place = NamedSharding(mesh, PartitionSpec("x"))
    values = np.arange(1 << 20, dtype=np.float32)
    values[: 1 << 19] = 0
    make = lambda index: values[index]
    state = {"w": jax.make_array_from_callback(values.shape, place, make)}
    with dd.Checkpointer(root) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state=state).result()
        restored = ckpt.restore(state=state)
        whole = ckpt.restore(step=2)
    same = all(
        np.array_equal(a.data, b.data)
        for a, b in zip(
            restored.state["w"].addressable_shards, state["w"].addressable_shards, strict=True
        )
    )
    return restored.step, same, whole.step


@pytest.mark.multihost
def test_all_hosts_compress_what_host_0_has_chosen(tmp_path: Path) -> None:
    results = run_hosts(on_two_hosts, 2, args=(str(tmp_path / "run"),), timeout_seconds=60)
    assert [result.value for result in results] == [(2, True, 2)] * 2, results
    name = fmt.host_record_name(0, 2)
    record = fmt.parse_record((tmp_path / "run" / "2" / name).read_bytes(), name)
    assert record.notes["compression"].startswith("zstd for 1 of 1")
    assert _size(tmp_path / "run" / "2") < 0.7 * _size(tmp_path / "run" / "1")


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_limit_that_cannot_be_kept_is_said_before_anything_is_written(
    compression: Any, tmp_path: Path
) -> None:
    """Orbax reads and writes an array as a whole; what goes to files straight needs no memory."""
    state = {"big": jnp.arange(10_000.0), "small": jnp.ones(3)}
    options = dd.Options(compression=compression, save_concurrent_bytes=30_000)
    with dd.Checkpointer(tmp_path / "run", options=options) as ckpt:
        if compression == "zstd":
            with pytest.raises(InvalidArgumentError, match=r"'big'.* alone takes 40000 bytes"):
                ckpt.save(1, state=state)
            assert not (tmp_path / "run").exists() or list((tmp_path / "run").iterdir()) == []
            return
        ckpt.save(1, state=state).result()


def test_a_limit_for_a_restore_that_cannot_be_kept_is_said(tmp_path: Path) -> None:
    state = {"big": jnp.arange(10_000.0)}
    with dd.Checkpointer(tmp_path, options=dd.Options(compression="zstd")) as ckpt:
        ckpt.save(1, state=state).result()
    options = dd.Options(restore_concurrent_bytes=30_000)
    with dd.Checkpointer(tmp_path, options=options) as ckpt:
        with pytest.raises(InvalidArgumentError, match=r"restore_concurrent_bytes to 40001"):
            ckpt.restore(state=state)


def test_a_sample_that_cannot_be_taken_fails_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _seem_slow(monkeypatch)

    def fail(values: Any) -> Any:
        raise ValueError("no codec")

    monkeypatch.setattr(engine, "compress_sample", fail)
    state = {"zeros": jnp.zeros((1 << 20,))}
    with dd.Checkpointer(tmp_path) as ckpt:
        for step in (1, 2):
            assert ckpt.save(step, state=state).result().step == step
    assert "no codec" in caplog.text
    assert _note(tmp_path / "2").startswith("none:")
