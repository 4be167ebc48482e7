"""Never torn, never silently wrong: what is no step, and what has changed, on one host."""

from __future__ import annotations

import gc
import json
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import targets

import datarax_dist as dd
from datarax_dist import format as fmt
from datarax_dist.errors import (
    CheckpointError,
    CorruptStepError,
    FormatVersionError,
    StepExistsError,
    StepNotFoundError,
    StorageError,
)
from datarax_dist.storage import LocalStore


def make_state(step: int) -> Any:
    return targets.mesh_state((4,), ("x",), step)


def make_run(root: Path) -> None:
    with dd.Checkpointer(root) as ckpt:
        for step in (1, 2):
            loader = targets.Counter(0, 1)
            loader.at = step * 10
            ckpt.save(step, state=make_state(step), data=loader, metadata={"step": step})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("damage") / "run"
    make_run(root)
    return root


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


class Fails:
    """Lets a read of some file fail, once or always."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, key: str, *, times: float) -> None:
        self.left = times
        read = LocalStore.get

        def get(store: LocalStore, name: str) -> bytes:
            if name == key and self.left > 0:
                self.left -= 1
                raise StorageError(f"Could not read {key}", errno=5)
            return read(store, name)

        monkeypatch.setattr(LocalStore, "get", get)


def reseal(path: Path, **changes: Any) -> None:
    body = json.loads(path.read_bytes()) | changes
    body.pop("crc32c")
    path.write_bytes(fmt.dumps({**body, "crc32c": fmt.crc_text(fmt.crc32c(fmt.dumps(body)))}))


def restore_and_check(root: Path) -> tuple[int, dict[str, str]]:
    """Restores, and checks arrays, position and metadata against what was saved as that step."""
    loader = targets.Counter(0, 1)
    with dd.Checkpointer(root) as ckpt:
        restored = ckpt.restore(state=make_state(0), data=loader)
    assert dd.tree_digest(restored.state) == dd.tree_digest(make_state(restored.step))
    assert loader.at == restored.step * 10
    assert restored.metadata == {"step": restored.step}
    return restored.step, dict(restored.report.refused)


def test_a_directory_that_is_no_step_is_never_taken_for_one_and_the_report_says_why(
    copy: Path,
) -> None:
    (copy / "7").mkdir()
    shutil.copytree(copy / "2", copy / "8")  # the marker of another step
    shutil.copytree(copy / "2", copy / "9")
    (copy / "9" / "COMMIT.json").unlink()
    shutil.copytree(copy / "2", copy / "10")
    next((copy / "10" / "hosts").iterdir()).unlink()
    reseal(copy / "10" / "COMMIT.json", step=10)
    shutil.copytree(copy / "2", copy / "11")
    reseal(copy / "11" / "COMMIT.json", step=11, run="f" * 32)
    shutil.copytree(copy / "2", copy / "12")
    reseal(copy / "12" / "COMMIT.json", step=12, format_version=2)
    with dd.Checkpointer(copy) as ckpt:
        assert ckpt.all_steps() == [1, 2]
        with pytest.raises(FormatVersionError, match="Upgrade") as caught:
            ckpt.restore(step=12)
        assert (caught.value.found, caught.value.supported) == (2, 1)
        with pytest.raises(StepNotFoundError, match="another run"):
            ckpt.restore(step=11)
    step, refused = restore_and_check(copy)
    assert step == 2
    assert "not a step of ours" in refused["step 7"]
    assert "that of step 2" in refused["step 8"]
    assert "COMMIT.json" in refused["step 9"]
    assert "host records are missing" in refused["step 10"]
    assert "another run" in refused["step 11"]
    assert "format version 2" in refused["step 12"] and "Upgrade" in refused["step 12"]


def damage(path: Path, kind: str, random_: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if kind == "flip":
        data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
        path.write_bytes(bytes(data))
    elif kind == "truncate":
        path.write_bytes(bytes(data[: random_.randrange(len(data))]))
    else:
        path.unlink()


def test_300_flips_and_truncations_and_deletions_never_give_wrong_values(
    run: Path, tmp_path: Path
) -> None:
    random_ = random.Random(7)
    files = sorted(
        path.relative_to(run)
        for path in (run / "2").rglob("*")
        if path.is_file() and path.stat().st_size
    )
    cases = (
        [("flip", file) for file in files]
        + [("truncate", file) for file in files]
        + [("delete", file) for file in files]
    )
    sizes = [(run / file).stat().st_size for file in files]
    cases += [("flip", file) for file in random_.choices(files, k=150)]
    cases += [("flip", file) for file in random_.choices(files, sizes, k=300 - 150 - len(files))]
    root = tmp_path / "run"
    shutil.copytree(run, root)
    for kind, file in cases:
        damage(root / file, kind, random_)
        step, refused = restore_and_check(root)
        assert step == 1, f"{kind} of {file} was not noticed"
        assert str(file.relative_to("2")) in refused["step 2"] or file.name == "STEP.json", (
            f"{kind} of {file}: {refused}"
        )
        (
            shutil.copyfile(run / file, root / file)
            if (root / "2").exists()
            else shutil.copytree(run / "2", root / "2")
        )
    assert sum(kind == "flip" for kind, _ in cases) == 300


def test_a_valid_block_of_another_step_in_its_place_is_noticed() -> None:
    """A block that ends with a crc32c of itself is invisible to the file's: hence two sums."""

    def block(content: bytes) -> bytes:
        return content + fmt.crc32c(content).to_bytes(4, "little")

    ours, theirs = b"head" + block(b"step 2"), b"head" + block(b"step 1")
    assert fmt.crc32c(ours) == fmt.crc32c(theirs)
    assert fmt.digest(ours) != fmt.digest(theirs)


def test_a_host_record_that_is_whole_and_not_the_committed_one_is_noticed(copy: Path) -> None:
    [record] = (copy / "2" / "hosts").iterdir()
    files = json.loads(record.read_bytes())["files"]
    kept = [entry for entry in files if not entry["path"].endswith("TREE.json")]
    assert len(kept) == len(files) - 1
    reseal(record, files=kept)
    step, refused = restore_and_check(copy)
    assert step == 1
    assert record.name in refused["step 2"]


@pytest.mark.parametrize("level", ["marker", "sizes"])
def test_positions_structure_and_metadata_are_checked_at_every_level(
    copy: Path, level: Any
) -> None:
    small = ["metadata/metadata", "TREE.json", "data/data/shard_00000-of-00001.json"]
    for name in small:
        path = copy / "2" / name
        before = path.read_bytes()
        path.write_bytes(before.replace(b"2", b"3", 1))
        with dd.Checkpointer(copy, options=dd.Options(verify_on_restore=level)) as ckpt:
            restored = ckpt.restore(state=make_state(0), data=targets.Counter(0, 1))
        assert restored.step == 1, name
        assert restored.report.verified == level
        path.write_bytes(before)


def test_a_step_that_has_lost_its_marker_is_kept_until_it_is_saved_again(copy: Path) -> None:
    (copy / "2" / "COMMIT.json").unlink()
    assert restore_and_check(copy)[0] == 1
    with dd.Checkpointer(copy) as ckpt:
        ckpt.save(3, state=make_state(3)).result()
        assert (copy / "2" / "TREE.json").exists()
        ckpt.save(2, state=make_state(2)).result()
        ckpt.wait_until_finished()
        assert ckpt.all_steps() == [1, 2, 3]
    assert {path.name for path in copy.iterdir()} == {"1", "2", "3", "RUN.json", "lease"}


def test_after_falling_back_the_damaged_step_can_be_saved_again_and_is_not_counted_as_good(
    copy: Path,
) -> None:
    damage(copy / "2" / "TREE.json", "flip", random.Random(1))
    with dd.Checkpointer(copy, keep=dd.latest(2)) as ckpt:
        restored = ckpt.restore(state=make_state(0))
        assert (restored.step, restored.report.damaged) == (1, (2,))
        ckpt.save(3, state=make_state(3)).result()
        ckpt.wait_until_finished()
        assert ckpt.all_steps() == [1, 2, 3]  # of the good ones the newest two are kept
        ckpt.save(2, state=make_state(2)).result()
        assert ckpt.restore(step=2, state=make_state(0)).report.verified == "full"
        with pytest.raises(StepExistsError):
            ckpt.save(2, state=make_state(2))


def test_what_cannot_be_read_just_now_is_an_error_and_not_a_reason_to_go_back(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, key: str, expected_size: int | None = None, **more: Any) -> Any:
        raise StorageError("Too many open files", errno=24)

    monkeypatch.setattr(LocalStore, "digest", refuse)
    with dd.Checkpointer(copy) as ckpt, pytest.raises(StorageError, match="open files"):
        ckpt.restore(state=make_state(0))


def test_too_little_memory_is_an_error_and_not_damage(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import orbax.checkpoint as ocp

    def refuse(*arguments: Any, **keywords: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", refuse)
    with dd.Checkpointer(copy) as ckpt, pytest.raises(StorageError, match="enough memory"):
        ckpt.restore(state=make_state(0))


def test_an_explicit_damaged_step_raises_and_names_the_file(copy: Path) -> None:
    file = next((copy / "2" / "state" / "ocdbt.process_0" / "d").iterdir())
    damage(file, "flip", random.Random(1))
    with dd.Checkpointer(copy) as ckpt, pytest.raises(CorruptStepError) as caught:
        ckpt.restore(step=2, state=make_state(0))
    assert caught.value.files == [str(file.relative_to(copy / "2"))]
    assert caught.value.step == 2


def test_when_every_step_is_damaged_the_restore_raises_rather_than_starting_anew(
    copy: Path,
) -> None:
    for step in ("1", "2"):
        damage(copy / step / "COMMIT.json", "flip", random.Random(1))
    with dd.Checkpointer(copy) as ckpt, pytest.raises(CorruptStepError, match=r"COMMIT\.json"):
        ckpt.try_restore()


# Orbax reads leaf by leaf, and leaves its other reads behind when one finds damage.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_array_data_is_checked_while_it_is_read_whatever_the_level(
    run: Path, tmp_path: Path
) -> None:
    """The codec alone, without the host records."""
    noticed = 0
    flips = 40
    random_ = random.Random(3)
    files = [path for path in (run / "2" / "state").rglob("d/*") if path.stat().st_size > 1 << 16]
    root = tmp_path / "run"
    shutil.copytree(run, root)
    want = dd.tree_digest(make_state(2))
    for _ in range(flips):
        file = random_.choices(files, [path.stat().st_size for path in files])[0]
        damage(root / file.relative_to(run), "flip", random_)
        with dd.Checkpointer(root, options=dd.Options(verify_on_restore="marker")) as ckpt:
            restored = ckpt.restore(state=make_state(0))
        noticed += restored.step == 1
        assert restored.step == 1 or dd.tree_digest(restored.state) == want
        shutil.copyfile(file, root / file.relative_to(run))
        gc.collect()
    assert noticed > flips * 0.8


def test_a_restore_of_the_metadata_alone_verifies_the_arrays_too(copy: Path) -> None:
    from datarax_dist.checkpoint import OrbaxCheckpointHandler, Target

    [file] = [p for p in (copy / "2" / "state").rglob("d/*") if p.stat().st_size > 1 << 16]
    damage(file, "flip", random.Random(0))
    with dd.Checkpointer(copy) as ckpt:
        assert ckpt.restore(state=make_state(0)).report.damaged == (2,)
    with OrbaxCheckpointHandler() as handler:
        run = handler._run(str(copy))
        restored = run.restore(state=Target(None, metadata_only=True))
        assert (restored.step, restored.report.damaged) == (1, (2,))


def test_a_lost_run_file_is_taken_from_the_steps(copy: Path) -> None:
    (copy / "RUN.json").unlink()
    assert restore_and_check(copy)[0] == 2
    with dd.Checkpointer(copy) as ckpt:
        ckpt.save(3, state={"a": 1}).result()
        assert ckpt.all_steps() == [1, 2, 3]


@pytest.mark.parametrize("name", ["run[1]", "a\\b", "lr=[1,2]/run", "gs:/x", "\0", "\udcff"])
def test_names_that_are_no_names_for_what_writes_the_arrays_are_refused(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"in its path.*nothing was written"):
        dd.Checkpointer(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["run*?", "{1,2} [é", "r%41#]n;@+&=:"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_run_whose_name_is_odd_is_where_it_should_be(
    name: str, compression: Any, tmp_path: Path
) -> None:
    with dd.Checkpointer(tmp_path / name, options=dd.Options(compression=compression)) as ckpt:
        ckpt.save(1, state=make_state(1)).result()
        restored = ckpt.restore(state=make_state(0))
    assert dd.tree_digest(restored.state) == dd.tree_digest(make_state(1))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_root_that_begins_with_two_slashes_begins_with_one(tmp_path: Path) -> None:
    with dd.Checkpointer(f"/{tmp_path}/run") as ckpt:
        assert ckpt.root == f"{tmp_path}/run"
        ckpt.save(1, state=make_state(1)).result()
        assert ckpt.all_steps() == [1]


def test_bad_input_is_a_clear_error_and_loses_nothing(copy: Path) -> None:
    for root in ("relative/path", "s3://bucket/run", "file:///tmp/run"):
        with pytest.raises(CheckpointError, match=r"absolute|not supported"):
            dd.Checkpointer(root)
    with dd.Checkpointer(copy) as ckpt:
        for bad in ({"step": -1}, {"step": True}, {"step": 1.5}):
            with pytest.raises(ValueError, match="whole number"):
                ckpt.save(**bad, state={"a": 1})
        with pytest.raises(ValueError, match="neither"):
            ckpt.save(3)
        with pytest.raises(FileExistsError, match="committed"):
            ckpt.save(2, state={"a": 1})
        (copy / "5").mkdir()
        with pytest.raises(FileExistsError, match="no step of this run"):
            ckpt.save(5, state={"a": 1})
        with pytest.raises(TypeError, match="a/0/b") as caught:
            ckpt.save(3, state={"a": [{"b": object()}]})
        assert caught.value.path == "a/0/b"
        with pytest.raises(TypeError, match="dtype object"):
            ckpt.save(3, state={"a": np.array([None])})
        with pytest.raises(ValueError, match="metadata/x"):
            ckpt.save(3, state={"a": 1}, metadata={"x": object()})
        with pytest.raises(ValueError, match="cannot be resumed"):
            ckpt.save(3, data=(i for i in range(3)))
        assert ckpt.all_steps() == [1, 2]
        assert ckpt.save(3, state={"a": 1}).result().step == 3


def test_a_target_that_does_not_fit_is_a_diff_by_tree_path(copy: Path) -> None:
    target = make_state(0)
    target["params"]["w"] = jnp.zeros((16, 25))
    target["params"]["extra"] = jnp.zeros(3)
    target["half"] = target["half"].astype(jnp.float32)
    del target["numpy"]
    loader = targets.Counter(0, 1)
    with dd.Checkpointer(copy) as ckpt:
        with pytest.raises(dd.errors.StructureMismatchError) as caught:
            ckpt.restore(state=target, data=loader)
        assert caught.value.missing == ["params/extra"]
        assert caught.value.unexpected == ["numpy"]
        assert set(caught.value.changed) == {"params/w", "half"}
        assert "[16, 24]" in str(caught.value) and "[16, 25]" in str(caught.value)
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:3]), ("x",))
        odd = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
        with pytest.raises(ValueError, match="params/w"):
            ckpt.restore(
                state={"params": {"w": jax.ShapeDtypeStruct((16, 24), jnp.float32, sharding=odd)}}
            )
        assert loader.at == 0
        part = ckpt.restore(state={"params": {"b": jnp.zeros(24)}})
        assert np.array_equal(part.state["params"]["b"], make_state(2)["params"]["b"])


def test_no_step_is_none_for_try_restore_and_an_error_for_restore(tmp_path: Path) -> None:
    with dd.Checkpointer(tmp_path / "new") as ckpt:
        assert ckpt.try_restore() is None
        assert ckpt.latest_step() is None
        with pytest.raises(FileNotFoundError):
            ckpt.restore()


def test_steps_of_a_newer_format_alone_are_not_a_run_without_steps(copy: Path) -> None:
    shutil.rmtree(copy / "1")
    reseal(copy / "2" / "COMMIT.json", format_version=2)
    with dd.Checkpointer(copy) as ckpt, pytest.raises(FormatVersionError, match="Upgrade"):
        ckpt.try_restore(state=make_state(0))


def test_a_limit_of_bytes_below_the_largest_array_is_no_damage_and_no_failure(
    tmp_path: Path,
) -> None:
    state = {"big": jnp.arange(10_000.0), "small": jnp.ones(3)}
    options = dd.Options(restore_concurrent_bytes=1_000, save_concurrent_bytes=1_000)
    with dd.Checkpointer(tmp_path, options=options) as ckpt:
        ckpt.save(1, state=state).result()
        ckpt.save(2, state=state).result()
        restored = ckpt.restore()
    assert restored.step == 2
    assert dd.tree_digest(restored.state) == dd.tree_digest(state)


def test_a_plain_orbax_step_restores_by_number_beside_a_damaged_one_of_ours(copy: Path) -> None:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as plain:
        plain.save(copy / "100", {"w": jnp.arange(3.0)})
    (copy / "2" / "COMMIT.json").write_text("{")
    with dd.Checkpointer(copy) as ckpt:
        assert ckpt.restore(step=100).state["w"].tolist() == [0, 1, 2]


def test_reading_while_another_job_saves_and_deletes_finds_a_good_step_every_time(
    tmp_path: Path,
) -> None:
    state = {"w": np.arange(4.0)}
    stop = threading.Event()
    with dd.Checkpointer(tmp_path, keep=dd.latest(1)) as writer:
        writer.save(0, state=state).result()

        def save() -> None:
            step = 0
            while not stop.is_set():
                step += 1
                writer.save(step, state=state).result()
                writer.wait_until_finished()

        thread = threading.Thread(target=save)
        thread.start()
        try:
            with dd.Checkpointer(tmp_path) as reader:
                steps = [reader.restore(state=state).step for _ in range(300)]
        finally:
            stop.set()
            thread.join()
    assert steps == sorted(steps)
    assert len(set(steps)) > 3


def test_a_key_whose_kind_cannot_be_read_is_an_error_and_not_plain_numbers(tmp_path: Path) -> None:
    """Orbax keeps the kind in its array metadata, and goes on without when it finds none."""
    from datarax_dist import arrays
    from datarax_dist import format as fmt
    from datarax_dist.specs import TreeSpec

    with dd.Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, state={"key": jax.random.key(3), "w": np.ones(3)})
    spec = TreeSpec.from_json(
        fmt.unseal((tmp_path / "1" / fmt.TREE_NAME).read_bytes(), fmt.TREE_NAME)
    )
    engine = arrays.OrbaxArrays(str(tmp_path), 0, dd.Options())
    wanted = [(leaf, None) for leaf in spec.leaves]
    assert len(engine.restore("1/state", spec, wanted).values) == 2
    shutil.rmtree(tmp_path / "1" / "state" / "array_metadatas")
    with pytest.raises(StorageError, match="typed PRNG key"):
        engine.restore("1/state", spec, wanted)
    engine.close()


def test_a_marker_that_fails_to_be_read_once_is_no_damage(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Fails(monkeypatch, "2/COMMIT.json", times=1)
    assert restore_and_check(copy) == (2, {})
    assert failing.left == 0


def test_a_marker_that_cannot_be_read_is_damage(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Fails(monkeypatch, "2/COMMIT.json", times=float("inf"))
    step, refused = restore_and_check(copy)
    assert step == 1
    assert "Could not read 2/COMMIT.json" in refused["step 2"]
