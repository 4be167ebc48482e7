"""The promises in a bucket, on one host; tests/test_buckets_multihost.py has those on several."""

from __future__ import annotations

import concurrent.futures
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath
from targets import Counter

import datarax_dist as dd
from datarax_dist import buckets, errors, telemetry
from datarax_dist import format as fmt
from datarax_dist.buckets import BucketStore
from datarax_dist.checkpoint import OrbaxCheckpointHandler
from datarax_dist.testing import FakeGCS


@pytest.fixture
def root(bucket: str) -> str:
    return f"gs://{bucket}/runs/one"


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is damaged is asked for again at once."""
    monkeypatch.setattr(buckets, "_FIRST_PAUSE_SECONDS", 0.001)


def state_of(step: int) -> dict[str, Any]:
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    numbers = np.arange(4000, dtype=np.float32).reshape(8, 500) + step
    return {
        "w": jax.device_put(numbers, rows),
        "b": jax.device_put(numbers[0], whole),
        "host": np.full(7, step),
        "key": jax.random.key(step),
        "name": "a name",
        "none": None,
    }


def save(root: str, *steps: int, keep: Any = None, **more: Any) -> list[dd.SaveReport]:
    with dd.Checkpointer(root, keep=keep) as ckpt:
        ckpt.try_restore()
        reports = []
        for step in steps:
            handle = ckpt.save(step, state=state_of(step), metadata={"step": step}, **more)
            assert handle is not None
            reports.append(handle.result())
        return reports


def restore(root: str, **options: Any) -> dd.Restored:
    with dd.Checkpointer(root, options=dd.Options(**options)) as ckpt:
        return ckpt.restore(state=state_of(0))


def same(restored: dd.Restored, step: int) -> bool:
    return bool(
        restored.step == step
        and restored.metadata == {"step": step}
        and dd.tree_digest(restored.state) == dd.tree_digest(state_of(step))
    )


def step_objects(gcs: FakeGCS, bucket: str, step: int) -> list[str]:
    return [name for name in gcs.objects(bucket) if name.startswith(f"runs/one/{step}/")]


# Save and restore


def test_a_run_in_a_bucket_is_saved_restored_and_goes_on(root: str, bucket: str) -> None:
    loader = Counter(0, 1)
    with dd.Checkpointer(root, keep=dd.latest(2)) as ckpt:
        assert ckpt.try_restore(state=state_of(0), data=loader) is None
        for step in (1, 2, 3):
            next(loader)
            ckpt.save(step, state=state_of(step), data=loader, metadata={"step": step})
        ckpt.wait_until_finished()
        assert ckpt.all_steps() == [2, 3]
    again = Counter(0, 1)
    with dd.Checkpointer(root, keep=dd.latest(2)) as ckpt:
        restored = ckpt.restore(state=state_of(0), data=again)
        assert same(restored, 3)
        assert again.at == loader.at
        assert restored.report.verified == "full"
        assert restored.report.refused == {}
        assert same(ckpt.restore(step=2, state=state_of(0)), 2)
        ckpt.save(4, state=state_of(4), metadata={"step": 4})
    assert same(restore(root), 4)
    with dd.Checkpointer(root) as ckpt:
        assert ckpt.all_steps() == [3, 4]
        assert ckpt.step_info(4).hosts == 1
        ckpt.delete(3)
        assert ckpt.all_steps() == [4]
        with pytest.raises(dd.errors.StepNotFoundError):
            ckpt.restore(step=3)


def test_plain_orbax_reads_a_step_in_a_bucket(root: str) -> None:
    import orbax.checkpoint as ocp

    save(root, 1)
    with ocp.StandardCheckpointer() as plain:
        mine = plain.restore(f"{root}/1/state")
    assert np.array_equal(mine["w"], np.asarray(state_of(1)["w"]))
    with ocp.CheckpointManager(root, item_names=("state", "metadata")) as manager:
        assert manager.latest_step() == 1


def test_a_step_of_plain_orbax_in_a_bucket_is_restored(root: str) -> None:
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(root) as manager:
        manager.save(5, args=ocp.args.StandardSave({"w": np.arange(5.0)}))
        manager.wait_until_finished()
    with dd.Checkpointer(root) as ckpt:
        restored = ckpt.restore()
    assert restored.step == 5
    assert np.array_equal(restored.state["w"], np.arange(5.0))
    assert restored.report.verified == "nothing"


def test_datarax_convention_works_in_a_bucket(root: str) -> None:
    with OrbaxCheckpointHandler() as handler:
        with pytest.raises(ValueError, match="No checkpoints found"):
            handler.restore(root)
        for step in (1, 2, 3):
            path = handler.save(root, state_of(step), step=step, keep=2, metadata={"step": step})
        assert path == f"{root}/3"
        assert handler.list_checkpoints(root) == {2: f"{root}/2", 3: f"{root}/3"}
        assert handler.restore(root, metadata_only=True) == {"step": 3}
        handler.save(root, state_of(30), step=3, keep=2, overwrite=True)
        tree = handler.restore(root, state_of(0))
        assert dd.tree_digest(tree) == dd.tree_digest(state_of(30))
        handler.save(f"{root}/plain", {"a": np.ones(3)})
        with pytest.raises(ValueError, match="overwrite=True"):
            handler.save(f"{root}/plain", {"a": np.ones(3)})
        handler.save(f"{root}/plain", {"a": np.zeros(3)}, overwrite=True)
        assert handler.restore(f"{root}/plain")["a"].tolist() == [0, 0, 0]


def test_two_runs_whose_prefixes_begin_alike_do_not_meet(bucket: str) -> None:
    save(f"gs://{bucket}/run", 1)
    save(f"gs://{bucket}/run2", 2)
    with dd.Checkpointer(f"gs://{bucket}/run") as ckpt:
        ckpt.delete(1)
    assert same(restore(f"gs://{bucket}/run2"), 2)


def test_datarax_store_refuses_a_bucket_which_it_would_take_for_a_path() -> None:
    from datarax_dist.substrax_store import SubstraxStore

    with pytest.raises(errors.InvalidArgumentError, match="cannot be in a bucket"):
        SubstraxStore("gs://bucket/run")


@pytest.mark.parametrize(
    "root", ["gs://", "gs://x", "gs://Bucket/run", "gs://bucket//run", "gs://bucket/../run"]
)
def test_roots_that_name_no_bucket_are_refused(root: str) -> None:
    with pytest.raises(errors.InvalidArgumentError, match=r"nothing was written|names no bucket"):
        dd.Checkpointer(root)


@pytest.mark.parametrize("name", ["run?v=2", "run#2", "run%2", "run[1]", "lr=[1,2]/run"])
def test_names_that_are_no_names_for_what_writes_the_arrays_are_refused(name: str) -> None:
    with pytest.raises(errors.InvalidArgumentError, match=r"in its path.*nothing was written"):
        dd.Checkpointer(f"gs://bucket/{name}")


@pytest.mark.parametrize("name", ["run*", "{1,2} [é", "r\\u]n;@+&=:"])
def test_a_run_whose_name_is_odd_is_where_it_should_be(
    gcs: FakeGCS, bucket: str, name: str
) -> None:
    save(f"gs://{bucket}/{name}", 1)
    assert same(restore(f"gs://{bucket}/{name}"), 1)
    assert {key.split("/")[0] for key in gcs.objects(bucket)} == {name}


def test_a_save_that_goes_well_warns_of_nothing(
    root: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(root, 1)
    told = [(r.threadName, r.getMessage()) for r in caplog.records if r.levelno >= logging.WARNING]
    assert told == []


@pytest.mark.parametrize("root", ["s3://bucket/run", "az://bucket/run", "hf://x/y", "http://x/y"])
def test_other_schemes_are_refused_by_name(root: str) -> None:
    with pytest.raises(errors.InvalidArgumentError, match=r"is not supported.*gs://BUCKET/PREFIX"):
        dd.Checkpointer(root)


def test_tensorflow_does_not_take_over_the_paths(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from etils.epath import gpath

    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: True)
    with pytest.raises(errors.InvalidArgumentError, match="EPATH_USE_TF=false"):
        dd.Checkpointer(root)


# Nothing torn, nothing wrong


def test_the_marker_is_the_last_object_written_and_the_first_deleted(
    gcs: FakeGCS, root: str
) -> None:
    save(root, 1)
    gcs.clear_requests()
    save(root, 2, keep=dd.latest(1))
    done = [r for r in gcs.requests if r.status < 300]
    written = [r.name for r in done if r.kind in ("insert", "chunk") and "/2/" in r.name]
    assert written[-1] == "runs/one/2/COMMIT.json"
    assert written[-2] == "runs/one/2/commit_success.txt"
    assert written[0] == "runs/one/2/STEP.json"
    staged = [r.name for r in done if r.kind in ("insert", "chunk") and "/2.staging-" in r.name]
    assert staged[0].endswith("/STEP.json"), "nobody writes before the step is claimed"
    copied = [r.name for r in done if r.kind == "copy"]
    assert written.index("runs/one/2/STEP.json") == len(written) - 3, "then nothing but the marker"
    assert all(name.startswith("runs/one/2/") for name in copied)
    deleted = [batch for batch in done if batch.kind == "batch"]
    note, left, old, lease = deleted[0], deleted[1:3], deleted[3:-1], deleted[-1]
    assert (note.parts, done.index(note) < done.index(left[0])) == (1, True), "of the restore"
    assert lease.parts == 1, "of the job before"
    assert left[1].parts == 1, "the claim of what was staged goes last"
    void = next(r for r in done if r.kind == "insert" and r.name == "runs/one/1/COMMIT.json")
    assert done.index(left[1]) < done.index(void) < done.index(old[0]), "a void marker goes first"
    assert (old[0].parts, old[-1].parts) == (1, 2), "then the sign of Orbax; the claim goes last"
    assert {name.split("/")[2] for name in gcs.objects(root.split("/")[2])} == {
        "2",
        "RUN.json",
        "lease",
    }


def test_a_lost_reply_to_the_marker_is_one_success(gcs: FakeGCS, root: str) -> None:
    gcs.fail("applied_then_dropped", kind="insert", name="COMMIT")
    [report] = save(root, 1)
    assert report.step == 1
    stored = [
        r.status for r in gcs.requests if r.name.endswith("COMMIT.json") and r.kind == "insert"
    ]
    assert stored == [0, 412], "it was made once, and recognised"
    assert same(restore(root), 1)


def test_a_marker_of_which_nothing_can_be_learnt_is_not_called_uncommitted(
    gcs: FakeGCS, root: str, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(root, 1)
    monkeypatch.setattr(buckets, "_DEADLINE_SECONDS", 1.0)
    gcs.fail("applied_then_dropped", kind="insert", name="2/COMMIT")
    gcs.fail("error", kind="read", name="2/COMMIT", times=None)
    with pytest.raises(errors.StorageError, match=r"Step 2 may be committed or not; earlier"):
        save(root, 2)
    gcs.heal()
    assert same(restore(root), 2)


@pytest.mark.parametrize("mode", ["", "applied_then_dropped", "applied_then_error", "error"])
def test_of_eight_writers_racing_for_one_marker_one_wins(
    gcs: FakeGCS, root: str, mode: Any
) -> None:
    for number in range(3):
        key, start = f"{number}/COMMIT.json", threading.Barrier(8)

        def race(writer: int, key: str = key, start: threading.Barrier = start) -> bool:
            store = BucketStore(root)
            start.wait()
            return store.create(key, f"marker of {writer}".encode())

        if mode:
            gcs.fail(mode, kind="insert", name=key, number=1 + number % 3, times=2)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            won = list(pool.map(race, range(8)))
        gcs.heal()
        assert won.count(True) == 1
        assert BucketStore(root).get(key) == f"marker of {won.index(True)}".encode()


def test_of_four_jobs_that_save_one_step_at_most_one_says_so_and_that_one_is_there(
    root: str,
) -> None:
    for step in (1, 2, 3):
        start = threading.Barrier(4)

        def job(number: int, step: int = step, start: threading.Barrier = start) -> Any:
            with dd.Checkpointer(root) as ckpt:
                start.wait()
                try:
                    handle = ckpt.save(step, state={"w": np.full(9, number)})
                    assert handle is not None
                    return handle.result().step
                except errors.CheckpointError as error:
                    return error
                finally:
                    ckpt._handle = None  # its error has been seen

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            ended = list(pool.map(job, range(4)))
        winners = [n for n, result in enumerate(ended) if result == step]
        assert len(winners) <= 1, ended
        with dd.Checkpointer(root) as ckpt:
            there = [s for s in ckpt.all_steps() if s == step]
            assert there == ([step] if winners else [])
            if winners:
                assert ckpt.restore(step=step).state["w"].tolist() == [winners[0]] * 9


@pytest.mark.parametrize(
    "phase",
    [
        *("save:claim", "save:positions", "save:hash", "save:record"),
        *("save:written", "save:verify", "save:publish", "save:commit"),
    ],
)
def test_a_job_that_was_believed_dead_and_comes_back_changes_nothing_of_what_another_has_committed(
    root: str, phase: str
) -> None:
    """The first job stands still in a phase; meanwhile another one saves the same step."""
    save(root, 1)
    reached, go_on = threading.Event(), threading.Event()

    def stand_still(at: str, host: int) -> None:
        if at == phase and not reached.is_set():
            reached.set()
            assert go_on.wait(60)

    second = state_of(7)
    forget = telemetry.observe(stand_still)
    try:
        with dd.Checkpointer(root) as late:
            handle = late.save(2, state=state_of(2), metadata={"step": 2})
            assert handle is not None
            assert reached.wait(60)
            with dd.Checkpointer(root) as ckpt:
                ckpt.save(2, state=second, metadata={"step": 7}).result()
            go_on.set()
            with pytest.raises(errors.CheckpointError):
                handle.result()
    finally:
        go_on.set()
        forget()
    restored = restore(root)
    assert restored.step == 2
    assert restored.report.refused == {}
    assert restored.metadata == {"step": 7}
    assert dd.tree_digest(restored.state) == dd.tree_digest(second)
    save(root, 3)
    with dd.Checkpointer(root) as ckpt:
        assert {c.state for c in ckpt.inspect().candidates} == {"committed"}


def test_any_changed_object_is_noticed_and_the_step_before_is_taken(
    gcs: FakeGCS, bucket: str, root: str, soon: None
) -> None:
    """Two kinds of damage: another content, and a rotten bit that the bucket itself does not
    know of.
    """
    save(root, 1, 2)
    random = np.random.default_rng(0)
    for name in step_objects(gcs, bucket, 2):
        original = gcs.objects(bucket)[name].content
        for how in ("changed", "rotten", "cut", "gone"):
            at = int(random.integers(len(original)))
            if how == "changed":
                bad = bytearray(original)
                bad[at] ^= 1 << int(random.integers(8))
                gcs.put(bucket, name, bytes(bad))
            elif how == "rotten":
                gcs.flip(bucket, name, at, int(random.integers(8)))
            elif how == "cut":
                gcs.put(bucket, name, original[:at])
            else:
                BucketStore(f"gs://{bucket}").delete(name)
            restored = restore(root)
            assert same(restored, restored.step), (name, how)
            # What a restore does not read may be rotten.
            assert restored.step == 1 or how == "rotten", (name, how)
            gcs.put(bucket, name, original)
    assert same(restore(root), 2)


def test_a_run_may_be_copied_between_a_bucket_and_a_file_system(
    gcs: FakeGCS, bucket: str, root: str, tmp_path: Path
) -> None:
    """As `gcloud storage cp -r` does; records have digests of the kind of where they were made."""
    save(root, 1, 2)
    for name, found in gcs.objects(bucket).items():
        path = tmp_path / "down" / name.removeprefix("runs/one/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(found.content)
    down = str(tmp_path / "down")
    assert same(restore(down), 2)
    save(down, 3)
    for path in (tmp_path / "down").rglob("*"):
        if path.is_file():
            name = str(path.relative_to(tmp_path / "down"))
            gcs.put(bucket, f"up/{name}", path.read_bytes())
    up = f"gs://{bucket}/up"
    assert same(restore(up), 3)
    for where in (down, up):
        victim = "3/state/manifest.ocdbt"
        if where == down:
            content = bytearray((tmp_path / "down" / victim).read_bytes())
            content[-1] ^= 1
            (tmp_path / "down" / victim).write_bytes(content)
        else:
            content = bytearray(gcs.objects(bucket)[f"up/{victim}"].content)
            content[-1] ^= 1
            gcs.put(bucket, f"up/{victim}", bytes(content))
        assert same(restore(where), 2)


# Permissions, limits, another host's writes


READ = ("storage.objects.get", "storage.objects.list")


@pytest.mark.parametrize("permission", [*READ, "storage.objects.create", "storage.objects.delete"])
def test_a_save_without_a_permission_says_which_and_where_to_get_it(
    gcs: FakeGCS, root: str, permission: str
) -> None:
    save(root, 1)
    gcs.deny(permission)
    with dd.Checkpointer(root) as ckpt:
        with pytest.raises(errors.CheckpointError) as caught:
            ckpt.save(2, state=state_of(2)).result()
        text = str(caught.value)
        assert permission in text
        assert root.split("/")[2] in text
        assert "roles/storage.objectUser" in text
        assert isinstance(caught.value, OSError)
        gcs.allow_all()
        ckpt.save(3, state=state_of(3), metadata={"step": 3}).result()
    assert same(restore(root), 3)


@pytest.mark.parametrize("permission", READ)
def test_a_restore_without_a_permission_says_which_and_takes_no_older_step(
    gcs: FakeGCS, root: str, permission: str
) -> None:
    save(root, 1, 2)
    gcs.deny(permission)
    with pytest.raises(errors.StorageError, match=permission):
        restore(root)
    gcs.allow_all()
    assert same(restore(root), 2)


def test_the_arrays_alone_without_a_permission_say_so_too(gcs: FakeGCS, root: str) -> None:
    """TensorStore has its own client, and may have other credentials."""
    save(root, 1)
    gcs.fail("error", status=403, client="tensorstore", times=None)
    with dd.Checkpointer(root) as ckpt:
        with pytest.raises(errors.StorageError, match="lack a permission"):
            ckpt.save(2, state=state_of(2)).result()
        with pytest.raises(errors.StorageError, match="lack a permission"):
            ckpt.restore()


@pytest.mark.parametrize("refused", ["the marker", "the content"])
def test_retention_that_is_not_permitted_fails_no_save_and_is_made_up_for(
    gcs: FakeGCS, bucket: str, root: str, refused: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(root, 1, 2)
    if refused == "the marker":
        gcs.fail("error", status=403, kind="insert", name="one/[12]/COMMIT", times=None)
    gcs.fail("error", status=403, kind="delete", name="one/[12]/", times=None)
    [report] = save(root, 3, keep=dd.latest(1))
    assert report.deleted == ()
    assert "could not delete step 1" in caplog.text
    assert "lack a permission" in caplog.text
    assert same(restore(root), 3)
    with dd.Checkpointer(root) as ckpt:
        assert ckpt.all_steps() == ([1, 2, 3] if refused == "the marker" else [3])
    gcs.heal()
    [report] = save(root, 4, keep=dd.latest(1))
    assert report.deleted == ((1, 2, 3) if refused == "the marker" else (3,))
    # What had lost its marker goes as a leftover.
    assert {name.split("/")[2] for name in gcs.objects(bucket)} <= {
        "4",
        "RUN.json",
        "1",
        "2",
        "lease",
    }
    assert not step_objects(gcs, bucket, 1)[1:] and not step_objects(gcs, bucket, 2)[1:]


def test_a_bucket_that_is_not_there_is_named(gcs: FakeGCS) -> None:
    with dd.Checkpointer("gs://no-such-bucket/run") as ckpt:
        for call in (ckpt.try_restore, ckpt.all_steps, lambda: ckpt.save(1, state={"a": 1})):
            with pytest.raises(errors.StorageError, match="no bucket gs://no-such-bucket"):
                call()


def test_a_bucket_that_throttles_is_waited_for(gcs: FakeGCS, root: str) -> None:
    gcs.requests_per_second, gcs.one_write_per_second = 40, True
    save(root, 1, 2)
    assert any(r.status == 429 for r in gcs.requests)
    gcs.requests_per_second = None
    assert same(restore(root), 2)


SEEN = """
import sys
from etils import epath
import datarax_dist as dd
from datarax_dist.buckets import BucketStore

root = sys.argv[1]
with dd.Checkpointer(root):
    folder = epath.Path(f"{root}/9")
    BucketStore(root).put("9/a", b"x")
    assert [path.name for path in folder.iterdir()] == ["a"] and not (folder / "b").exists()
    BucketStore(root).put("9/b", b"x")
    found = sorted(path.name for path in folder.iterdir())
    assert found == ["a", "b"], "a listing of before was kept"
    assert (folder / "b").exists()
"""


def test_what_another_host_has_written_is_seen_at_once(root: str) -> None:
    """Orbax's paths share a file system that keeps listings for ever, if it may: as by default."""
    options = json.dumps({"token": "anon", "project": "p"})
    subprocess.run(
        [sys.executable, "-c", SEEN, root],
        env=os.environ | {"FSSPEC_GCS": options},
        check=True,
        timeout=120,
    )


# Requests


def counted(gcs: FakeGCS, act: Callable[[], Any]) -> tuple[Any, list[Any]]:
    gcs.clear_requests()
    value = act()
    return value, gcs.requests


def test_requests_do_not_grow_with_the_number_of_arrays(gcs: FakeGCS, root: str) -> None:
    """TensorStore asks for the manifest again while it opens arrays, in turns: how often depends on
    how long that takes, so a bucket that answers in its usual time is needed to count.
    """
    gcs.latency_seconds = 0.03
    numbers = {}
    with dd.Checkpointer(root) as ckpt:
        ckpt.save(0, state={"w": np.ones(3)}).result()
        for arrays in (10, 400):
            state = {f"a{n}": jax.numpy.full(9, n) for n in range(arrays)}
            _, seen = counted(gcs, lambda s=state, n=arrays: ckpt.save(n, state=s).result())
            restored, read = counted(gcs, lambda s=state, n=arrays: ckpt.restore(step=n, state=s))
            assert dd.tree_digest(restored.state) == dd.tree_digest(state)
            numbers[arrays] = (len(seen), len(read))
    for few, many in zip(numbers[10], numbers[400], strict=True):
        assert many <= few + 15, numbers


def test_an_object_that_is_too_large_is_refused_with_one_request_and_not_read(
    gcs: FakeGCS, root: str
) -> None:
    store = BucketStore(root)
    store.put("1/STEP.json", b" " * (8 << 20))
    refusal = pytest.raises(fmt.InvalidRecordError, match=r"8388608 bytes.* at most 1048576")
    with refusal:
        counted(gcs, lambda: store.get("1/STEP.json"))
    [seen] = [request for request in gcs.requests if request.kind == "read"]
    assert seen.received <= (1 << 20) + 1


def test_objects_that_fit_are_read_with_one_request(gcs: FakeGCS, root: str) -> None:
    store = BucketStore(root)
    for data in (b"x", b"x" * fmt.MAX_SMALL_BYTES):
        store.put("1/STEP.json", data)
        found, seen = counted(gcs, lambda: store.get("1/STEP.json"))
        assert (found == data, len(seen)) == (True, 1)
    store.put("1/STEP.json", b"")
    assert store.get("1/STEP.json") == b""


def test_a_range_that_comes_without_a_checksum_is_asked_for_as_a_whole(
    gcs: FakeGCS, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = buckets._hashes
    monkeypatch.setattr(
        buckets, "_hashes", lambda headers: {} if "Content-Range" in headers else hashes(headers)
    )
    store = BucketStore(root)
    store.put("1/STEP.json", b"content")
    fault = gcs.fail("corrupted", kind="read", times=2)
    monkeypatch.setattr(buckets, "_FIRST_PAUSE_SECONDS", 0.001)
    assert store.get("1/STEP.json") == b"content"
    assert fault.hits == 2


def test_a_huge_marker_in_a_bucket_falls_back_and_is_removed(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(root, 1, 2)
    monkeypatch.setattr(fmt, "MAX_RECORD_BYTES", 100_000)
    store = BucketStore(root)
    store.put("2/COMMIT.json", b" " * 200_000)
    store.put(f"3.replaced-{'a' * 16}/COMMIT.json", b" " * 200_000)
    restored = restore(root)
    assert same(restored, 1)
    assert "200000 bytes" in restored.report.refused["step 2"]
    save(root, 4)
    assert same(restore(root), 4)


def test_verifying_sizes_reads_no_array_data(gcs: FakeGCS, root: str) -> None:
    from datarax_dist import cli

    save(root, 1)
    for level in ("sizes", "marker"):
        _, seen = counted(gcs, lambda level=level: cli.main(["verify", root, "--level", level]))
        assert not [r.name for r in seen if r.kind == "read" and "/state/" in r.name]
        assert not [r.name for r in seen if r.client.startswith("tensorstore")]
    _, seen = counted(gcs, lambda: cli.main(["verify", root, "--level", "full"]))
    assert [r.name for r in seen if r.kind == "read" and "/state/" in r.name]


def test_a_restore_verifies_with_one_listing(gcs: FakeGCS, root: str) -> None:
    save(root, 1, 2)
    _, seen = counted(gcs, lambda: restore(root))
    ours = [r for r in seen if "cache_type" not in r.client and r.client.startswith("python-gcsfs")]
    names = [r.name.removeprefix("runs/one/2/") for r in ours if r.kind == "read"]
    assert names.count("COMMIT.json") == 3, "found, verified, and still there after loading"
    assert not [name for name in names if name.startswith("state/")]


def test_a_save_that_nobody_else_disturbs_asks_for_nothing_on_the_callers_thread(
    gcs: FakeGCS, root: str
) -> None:
    with dd.Checkpointer(root) as ckpt:
        ckpt.save(1, state=state_of(1)).result()
        gcs.latency_seconds = 1.0  # no request can have been answered before that
        gcs.clear_requests()
        begin = time.monotonic()
        handle = ckpt.save(2, state=state_of(2))
        assert time.monotonic() - begin < 1.0
        assert handle is not None and not handle.done()
        gcs.latency_seconds = 0.0
        handle.result()


def test_a_large_directory_is_deleted_in_batches_the_signs_first_the_claim_last(
    gcs: FakeGCS, root: str
) -> None:
    store = BucketStore(root)
    signs = ["COMMIT.json", "commit_success.txt"]
    names = ["STEP.json", *signs, *(f"state/{n}" for n in range(250))]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: store.put(f"7/{name}", b"x"), names))
    gcs.clear_requests()
    from datarax_dist.retention import delete_step

    delete_step(store, 7, now=0.0)
    batches = [r.parts for r in gcs.requests if r.kind == "batch"]
    assert (batches[0], batches[-1], sum(batches)) == (1, 2, 253)
    assert len(batches) == 5
    assert store.list("7") == []


def test_a_part_of_a_batch_that_is_refused_is_asked_for_again(
    gcs: FakeGCS, root: str, soon: None
) -> None:
    store = BucketStore(root)
    for name in ("a", "b", "c"):
        store.put(f"7/{name}", b"x")
    gcs.fail("error", kind="delete", name="7/b", status=503)
    store.delete("7")
    assert store.list("7") == []
    store.put("7/a", b"x")
    gcs.fail("error", kind="delete", name="7/a", status=503, times=None)
    with pytest.raises(errors.StorageError, match="tried again"):
        store.delete("7")


# Replies that are wrong


@pytest.mark.parametrize("mode", ["truncated", "corrupted", "drop", "error"])
@pytest.mark.parametrize("kind", ["read", "list", "insert"])
def test_what_is_damaged_on_its_way_is_asked_for_again(
    gcs: FakeGCS, root: str, soon: None, kind: str, mode: Any
) -> None:
    store = BucketStore(root)
    data = bytes(range(256)) * 40
    store.put("7/a", data)
    for number in range(2):
        fault = gcs.fail(mode, kind=kind, bucket=root.split("/")[2])
        assert store.get("7/a") == data
        assert [(e.key, e.size, e.digest) for e in store.list("7/a")] == [
            ("7/a", len(data), fmt.digest(data, "md5"))
        ]
        store.put(f"8/{number}", data)
        assert store.get(f"8/{number}") == data
        assert fault.hits == 1


def test_whichever_reply_to_a_restore_is_damaged_on_its_way_the_newest_step_is_restored(
    gcs: FakeGCS, bucket: str, root: str, soon: None
) -> None:
    save(root, 1, 2)
    probe = gcs.fail("delay", bucket=bucket, times=0)
    assert same(restore(root), 2)
    assert probe.seen > 25
    for number in range(1, probe.seen + 1):
        fault = gcs.fail("corrupted", bucket=bucket, number=number)
        restored = restore(root)
        assert same(restored, 2), number
        assert restored.report.refused == {}, number
        gcs.heal(fault)


@pytest.mark.parametrize("name", ["_METADATA", "array_metadatas/process_0"])
def test_what_orbax_uploads_is_compared_with_what_the_bucket_has_got(
    gcs: FakeGCS, root: str, name: str
) -> None:
    save(root, 1)
    fault = gcs.fail("corrupted", kind="chunk", name=f"state/{name}$")
    with dd.Checkpointer(root) as ckpt:
        with pytest.raises(errors.StorageError, match="hecksum"):
            ckpt.save(2, state=state_of(2)).result()
        assert ckpt.all_steps() == [1]
    assert fault.hits == 1


def test_an_upload_of_orbax_that_fails_lets_go_of_its_buffer(gcs: FakeGCS, root: str) -> None:
    """Some versions of Python crash when they collect a buffer and a view of it together."""
    save(root, 1)
    gcs.fail("corrupted", kind="chunk", name="state/a$")
    file = epath.Path(f"{root}/state/a").open("wb")
    file.write(b"content")
    with pytest.raises(Exception, match="hecksum") as caught:
        file.close()
    file.buffer.close()  # a BufferError while there is a view
    assert caught.value.__traceback__ is not None


def test_what_an_error_of_an_upload_was_caused_by_lets_go_of_it_too(
    gcs: FakeGCS, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As aiohttp tells of a connection that could not be made."""
    save(root, 1)
    file = epath.Path(f"{root}/state/a").open("wb")
    file.write(b"content")

    def send(data: Any) -> None:
        raise ConnectionRefusedError

    def call(*arguments: Any, data: Any, **more: Any) -> Any:
        try:
            send(data)
        except OSError as error:
            raise RuntimeError("no connection") from error

    monkeypatch.setattr(file.gcsfs, "call", call)
    file.location, file.offset = "here", 0
    with pytest.raises(RuntimeError, match="no connection") as caught:
        file._upload_chunk(final=True)
    file.buffer.close()  # a BufferError while there is a view
    assert caught.value.__cause__ is not None


def test_a_bucket_that_does_not_answer_is_given_up_at_the_deadline(
    gcs: FakeGCS, root: str, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "_DEADLINE_SECONDS", 1.0)
    store = BucketStore(root)
    store.put("7/a", b"x")
    gcs.fail("delay", times=None, seconds=5.0)
    begin = time.monotonic()
    with pytest.raises(errors.StorageError, match="did not answer") as caught:
        store.get("7/a")
    assert errors.is_passing(caught.value)
    assert time.monotonic() - begin < 5.0


def test_an_object_that_its_own_checksum_does_not_fit_is_damaged_not_late(
    gcs: FakeGCS, bucket: str, root: str, soon: None
) -> None:
    store = BucketStore(root)
    store.put("7/a", b"content")
    gcs.flip(bucket, "runs/one/7/a", 3)
    with pytest.raises(errors.StorageError, match="damaged in the bucket") as caught:
        store.get("7/a")
    assert not errors.is_passing(caught.value)


# Commands


def test_commands_read_a_run_in_a_bucket(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    from datarax_dist import cli

    save(root, 1, 2)
    capsys.readouterr()
    assert cli.main(["ls", root, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in listed["steps"]] == [2, 1]
    assert cli.main(["show", f"{root}@latest"]) == 0
    assert "state       committed" in capsys.readouterr().out
    assert cli.main(["verify", root]) == 0
    assert cli.main(["ls", "gs://no-such-bucket/run"]) == 10
    assert "no bucket gs://no-such-bucket" in capsys.readouterr().err


def test_commands_say_which_permission_is_missing(
    gcs: FakeGCS, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from datarax_dist import cli

    save(root, 1)
    gcs.deny("storage.objects.list")
    assert cli.main(["ls", root]) == 12
    told = capsys.readouterr().err
    assert "storage.objects.list" in told
    assert "Traceback" not in told


def test_ls_of_a_bucket_loads_no_jax(gcs: FakeGCS, root: str) -> None:
    save(root, 1)
    code = (
        "import sys; from datarax_dist import cli; assert cli.main(['ls', sys.argv[1]]) == 0;"
        "print([n for n in ('jax', 'orbax', 'tensorstore') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, root], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]"
