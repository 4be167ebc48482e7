"""`datarax-dist doctor`: a good root is said to be good, and what is missing is named."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

import datarax_dist as dd
from datarax_dist import cli
from datarax_dist import format as fmt
from datarax_dist.buckets import BucketStore
from datarax_dist.cli import diagnosis
from datarax_dist.storage import LocalStore
from datarax_dist.testing import FakeGCS, conformance
from datarax_dist.writers import writer_identity

NEEDED = ("list", "get", "create", "delete")


@pytest.fixture
def root(bucket: str) -> str:
    return f"gs://{bucket}/run"


def findings(
    capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, dict[str, tuple[str, str]]]:
    capsys.readouterr()
    code = cli.main(["doctor", "--json", *arguments])
    told = json.loads(capsys.readouterr().out)
    return code, {f["check"]: (f["level"], f["text"]) for f in told["findings"]}


def test_a_good_bucket_passes_and_nothing_stays_in_it(
    gcs: FakeGCS, root: str, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gcs.bucket_settings(bucket, softDeletePolicy={"retentionDurationSeconds": "0"})
    code, found = findings(capsys, "--write", root)
    assert code == 0
    assert {level for level, _ in found.values()} <= {"ok", "info"}
    assert found["one of many creators wins"][0] == "ok"
    assert found["an upload that was damaged on its way is refused"][0] == "ok"
    assert gcs.objects(bucket) == {}
    assert cli.main(["doctor", root]) == 0
    told = capsys.readouterr()
    assert "ok       storage.objects.list" in told.out
    assert "add --write" in told.err


def test_a_run_on_which_no_job_can_start_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state={"a": 1}).result()
        ckpt.save(2, state={"a": 1}).result()
    (tmp_path / "run" / "2" / "COMMIT.json").unlink()
    code, found = findings(capsys, str(tmp_path / "run"))
    assert (code, found["steps"][0]) == (0, "ok")
    (tmp_path / "run" / "1" / "COMMIT.json").unlink()
    code, found = findings(capsys, str(tmp_path / "run"))
    assert code == 3
    assert found["steps"][0] == "error"
    assert "none is committed, and 2 have lost their COMMIT.json" in found["steps"][1]
    with ocp.StandardCheckpointer() as plain:  # which is restored
        plain.save(tmp_path / "run" / "7", {"a": np.ones(2)})
    code, found = findings(capsys, str(tmp_path / "run"))
    assert (code, found["steps"][0]) == (0, "ok")


@pytest.mark.parametrize(
    ("free", "level", "text"),
    [(5 << 30, "info", "5.0 GiB"), (20 << 20, "warning", "20 MiB"), (0, "error", "0 MiB")],
)
def test_a_full_disk_is_an_error(
    free: int,
    level: str,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(diagnosis.shutil, "disk_usage", lambda path: usage)
    code, found = findings(capsys, str(tmp_path))
    assert found["free space"] == (level, text)
    assert code == (3 if level == "error" else 0)


def test_one_cause_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(store: Any, key: str, data: bytes) -> Any:
        raise dd.errors.StorageError("No space left on device", errno=errno.ENOSPC)

    for method in ("put", "create"):
        monkeypatch.setattr(LocalStore, method, full)
    code, found = findings(capsys, "--write", str(tmp_path))
    assert code == 3
    assert [check for check, (level, _) in found.items() if level == "error"] == ["writing"]
    assert list(tmp_path.iterdir()) == []


def test_without_write_nothing_is_written(gcs: FakeGCS, root: str) -> None:
    gcs.clear_requests()
    assert cli.main(["doctor", root]) == 0
    assert {r.kind for r in gcs.requests} <= {"list", "permissions", "bucket", "read"}


@pytest.mark.parametrize("permission", NEEDED)
@pytest.mark.parametrize("write", [False, True])
def test_a_missing_permission_is_named(
    gcs: FakeGCS, root: str, capsys: pytest.CaptureFixture[str], permission: str, write: bool
) -> None:
    gcs.deny(f"storage.objects.{permission}")
    code, found = findings(capsys, *(["--write"] if write else []), root)
    assert code == 12
    level, text = found[f"storage.objects.{permission}"]
    assert level == "denied"
    assert "roles/storage.objectUser" in text
    assert "one of many creators wins" not in found, "nothing is tried that cannot work"
    others = [found[f"storage.objects.{name}"][0] for name in NEEDED if name != permission]
    assert others == ["ok"] * 3


def test_settings_that_cannot_be_read_are_a_warning(
    gcs: FakeGCS, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gcs.deny("storage.buckets.get")
    code, found = findings(capsys, "--write", root)
    assert (code, found["storage.buckets.get"][0]) == (0, "warning")


@pytest.mark.parametrize(
    ("settings", "check", "level", "code"),
    [
        ({"softDeletePolicy": {"retentionDurationSeconds": "86400"}}, "soft delete", "warning", 0),
        ({"versioning": {"enabled": True}}, "versioning", "warning", 0),
        ({"retentionPolicy": {"retentionPeriod": "60"}}, "retention of the bucket", "error", 3),
        ({"defaultEventBasedHold": True}, "retention of the bucket", "error", 3),
        ({"billing": {"requesterPays": True}}, "requester pays", "error", 3),
        ({"lifecycle": {"rule": [{"action": {"type": "Delete"}}]}}, "lifecycle", "warning", 0),
        ({"storageClass": "ARCHIVE"}, "storage class", "warning", 0),
    ],
)
def test_settings_that_cost_money_or_forbid_deletion_are_named(
    gcs: FakeGCS,
    root: str,
    bucket: str,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    check: str,
    level: str,
    code: int,
) -> None:
    assert check not in findings(capsys, root)[1] or check in ("soft delete", "versioning")
    gcs.bucket_settings(bucket, **settings)
    ended, found = findings(capsys, root)
    assert (ended, found[check][0]) == (code, level)


@pytest.mark.parametrize(("skew", "level", "code"), [(60, "warning", 0), (-4000, "error", 3)])
def test_a_wrong_clock_is_told(
    gcs: FakeGCS,
    root: str,
    capsys: pytest.CaptureFixture[str],
    skew: float,
    level: str,
    code: int,
) -> None:
    gcs.clock_skew_seconds = skew
    ended, found = findings(capsys, root)
    assert (ended, found["clock"][0]) == (code, level)
    assert ("ahead" if skew > 0 else "behind") in found["clock"][1]


def test_a_bucket_that_does_not_keep_conditions_fails(
    root: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(self: BucketStore, key: str, data: bytes) -> bool:
        self._upload(key, data)
        return True

    monkeypatch.setattr(BucketStore, "create", create)
    code, found = findings(capsys, "--write", root)
    assert code == 3
    assert found["one of many creators wins"][0] == "error"
    assert found["create never replaces"][0] == "error"


def test_a_bucket_that_is_not_there_is_10(capsys: pytest.CaptureFixture[str], gcs: FakeGCS) -> None:
    assert cli.main(["doctor", "gs://no-such-bucket/run"]) == 10
    assert "no bucket gs://no-such-bucket" in capsys.readouterr().err


def test_tensorflow_beside_orbax_is_an_error(
    root: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_spec(name: str) -> Any:
        return name == "tensorflow" or None

    monkeypatch.setattr(diagnosis.importlib.util, "find_spec", find_spec)
    code, found = findings(capsys, root)
    assert (code, found["TensorFlow"][0]) == (3, "error")
    monkeypatch.setenv("EPATH_USE_TF", "false")
    assert findings(capsys, root)[0] == 0


def test_a_directory_passes_and_nothing_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    assert cli.main(["doctor", str(root)]) == 10
    code, found = findings(capsys, "--write", str(root))
    assert code == 0
    assert found["rename moves everything and never onto something"][0] == "ok"
    assert not root.exists()
    root.mkdir()
    (root / "mine").write_text("x")
    assert findings(capsys, "--write", str(root))[0] == 0
    assert [path.name for path in root.iterdir()] == ["mine"]


@pytest.mark.parametrize("where", ["a step", "a run that cannot be known"])
def test_where_no_run_can_be_it_does_not_write(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    with dd.Checkpointer(root) as ckpt:
        ckpt.save(1, state={"w": np.ones(3)})
    if where == "a step":
        root = root / "1"
        check, text = "steps", "is a step, and no root of a run"
    else:
        root = tmp_path / "other"
        root.mkdir()
        (root / "RUN.json").write_text("junk")
        check, text = "RUN.json", "nothing can be saved here"
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    code, found = findings(capsys, "--write", str(root))
    assert code == 3
    assert found[check][0] == "error" and text in found[check][1]
    assert found["writing"] == ("info", "is not tried before that is mended")
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_what_is_in_the_way_of_a_lease_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lease" / "0000000001.json").mkdir(parents=True)
    code, found = findings(capsys, str(tmp_path))
    assert code == 3
    assert "in the way" in found["lease/0000000001.json/"][1]


def test_who_writes_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    me = f"process {os.getpid()} on"
    assert "writer" not in findings(capsys, str(tmp_path))[1]
    with dd.Checkpointer(tmp_path) as ckpt:
        handle = ckpt.save(1, state={"w": np.ones(3)})
        assert handle is not None
        handle.result()
        level, text = findings(capsys, str(tmp_path))[1]["writer"]
        assert level == "info" and me in text and "holds it" in text
    assert "has let the run go" in findings(capsys, str(tmp_path))[1]["writer"][1]
    name = fmt.lease_name(2)
    owner = {**writer_identity(), "started": "1"}
    gone = fmt.LeaseRecord("run", 2, "c" * 16, owner, 60.0)
    (tmp_path / name).write_bytes(fmt.dump_lease(gone))
    assert "is gone" in findings(capsys, str(tmp_path))[1]["writer"][1]


@pytest.mark.parametrize(
    ("kind", "level", "code"),
    [("fuse.gcsfuse", "error", 3), ("tmpfs", "warning", 0), ("nfs4", "info", 0)],
)
def test_a_file_system_that_cannot_keep_a_run_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    level: str,
    code: int,
) -> None:
    monkeypatch.setattr(diagnosis, "_kind_of_file_system", lambda path: kind)
    ended, found = findings(capsys, str(tmp_path))
    assert (ended, found["file system"][0]) == (code, level)


def test_every_check_of_the_suite_is_run_somewhere() -> None:
    left_out = {
        conformance.listing_while_others_write_neither_fails_nor_loses_what_stays,
        conformance.sync_of_what_was_put_does_nothing_visible,
    }
    run = {
        check
        for root in ("gs://bucket/run", "/run")
        for check in diagnosis._checks(diagnosis.open_store(root))
    }
    assert run == set(conformance.STORE_CHECKS) - left_out


def test_a_root_that_this_user_cannot_write_to_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)
        who = os.geteuid()
        try:
            if who == 0:
                os.seteuid(65534)  # root may write anywhere
            code = cli.main(["doctor", name])
        finally:
            os.seteuid(who)
    assert code != 0
    assert "this user cannot write into" in capsys.readouterr().out
