"""What others may learn: credentials reach no log, no file and no error, and files are made as the
umask of the process says.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

import datarax_dist as dd
from datarax_dist import cli, errors
from datarax_dist.buckets import BucketStore
from datarax_dist.data import positions
from datarax_dist.errors import mask

HERE = Path(__file__).parent
TOKEN = "ya99.a0SecretSecretSecret-0123456789_x"


def run_job(*words: object, **more: Any) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    done = subprocess.run(
        [sys.executable, *(str(word) for word in words)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=240,
        **more,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_a_token_reaches_no_log_no_file_and_no_error(tmp_path: Path) -> None:
    run_job(HERE / "secrets_job.py", TOKEN, tmp_path / "left.json")
    left = json.loads((tmp_path / "left.json").read_text())
    assert left["senders"]["python-gcsfs"] > 100, "the token was sent"
    assert left["senders"]["tensorstore"] > 10
    told = left["told"]
    for status in (401, 403, 400):
        for what in ("restore", "save", "in a save", "restore of arrays", "save of arrays"):
            name = f"{status} in a save" if what == "in a save" else f"{status} {what}"
            assert "StorageError" in told[name][1], name
    assert any("***" in text for text in told["403 restore"]), (
        "the server told it, and it is masked"
    )
    assert any("***" in text for text in told["400 restore of arrays"])
    assert len(left["logs"]) > 5
    assert len(left["files"]) > 20
    texts = [
        *left["logs"],
        *left["files"].values(),
        *(text for all_ in told.values() for text in all_),
    ]
    assert [text for text in texts if TOKEN[5:] in text] == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("GET https://h/o?alt=media&access_token=S3CRET&x=1", "?alt=media&access_token=***&x=1"),
        ("/tokeninfo?access_token=S3CRET (Caused by ...)", "access_token=*** (Caused by ...)"),
        (
            "https://h/o?X-Goog-Credential=S3CRET&X-Goog-Signature=S3CRET&X-Goog-Date=2",
            "X-Goog-Date=2",
        ),
        ("https://h/o?X-Amz-Security-Token=S3CRET", "https://h/o?"),
        ("https://h/upload?uploadType=resumable&upload_id=S3CRET", "uploadType=resumable"),
        ("Authorization: Bearer S3CRET", "Authorization: Bearer ***"),
        ("authorization=Basic S3CRET==", "authorization=Basic ***"),
        ("<CIMultiDictProxy('Authorization': 'Bearer S3CRET', 'Host': 'h')>", "'Host': 'h'"),
        ("b'Authorization': b'Bearer S3CRET'", "***"),
        ('{"refresh_token": "S3CRET", "client_id": "me"}', '"client_id": "me"'),
        ('{"private_key": "-----BEGIN PRIVATE KEY-----\\nS3CRET\\n-----END', "***"),
        ("-----BEGIN RSA PRIVATE KEY-----\nS3CRET\nS3CRET\n-----END RSA PRIVATE KEY-----", "***"),
        ("token ya29.S3CRET-x is expired", "is expired"),
        ("https://user:S3CRET@proxy:3128/ is down", "https://***@proxy:3128/ is down"),
    ],
)
def test_credentials_in_texts_of_others_are_masked(text: str, shown: str) -> None:
    assert "S3CRET" not in mask(text)
    assert shown in mask(text)
    told = ValueError("it failed")
    told.__context__ = OSError(text)
    assert errors.cause(told) is None
    assert "S3CRET" not in errors.describe(OSError(5, text))
    assert "S3CRET" not in json.dumps(errors.encode(RuntimeError(text)))


@pytest.mark.parametrize(
    "text",
    [
        "Could not read gs://bucket/run@5/COMMIT.json: KeyError: 'token'",
        "a leaf 'params/key' and a key='x' differ; the signature of f(token) does too",
        "mail me@example.org; https://example.org/a@b",
        "batch=3&tokens=17",
    ],
)
def test_what_holds_no_credentials_is_told_as_it_is(text: str) -> None:
    assert mask(text) == text
    error = OSError(text)
    assert errors.cause(error) is error


def test_a_client_that_tells_its_token_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        def call(self, *args: Any, **more: Any) -> Any:
            raise ConnectionError(f"no route for url: /tokeninfo?access_token={TOKEN}")

    store = BucketStore("gs://bucket/run")
    monkeypatch.setitem(store.__dict__, "_fs", Session())
    with pytest.raises(errors.StorageError, match=r"no route .*access_token=\*\*\*") as caught:
        store.get("RUN.json")
    assert TOKEN not in "".join(traceback.format_exception(caught.value))


def test_a_loader_that_tells_its_token_is_not_repeated() -> None:
    class Source:
        def apply(self, *args: Any) -> None:
            raise OSError(f"https://h/o?X-Goog-Signature={TOKEN}")

    with pytest.raises(errors.PositionError) as caught:
        positions._apply("data", Source(), {}, None, None)  # type: ignore[arg-type]
    assert TOKEN not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "root",
    [
        "gs://user:S3CRET@bucket/run",
        "gs://user:S3C/RET@bucket/run",
        "gs://S3CRET@bucket",
        "gs:/user:S3CRET@bucket/run",
        "file://user:S3CRET@host/run",
        "https://user:S3CRET@host/run",
        "s3://user:S3CRET@bucket/run",
    ],
)
def test_a_root_with_a_password_is_refused_and_not_repeated(
    root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(errors.InvalidArgumentError) as caught:
        dd.Checkpointer(root)
    told = str(caught.value) + "".join(traceback.format_exception(caught.value))
    for command in ("ls", "show", "verify", "doctor") if "://" in root else ():  # else a path
        assert cli.main([command, root]) == 2
    told += "".join(capsys.readouterr())
    assert "S3C" not in told
    assert "RET@" not in told


_SAVE = """
import os, sys
os.umask(int(sys.argv[2], 8))
os.environ["JAX_PLATFORMS"] = "cpu"
import jax.numpy as jnp, numpy as np
import datarax_dist as dd
from targets import Counter
with dd.Checkpointer(sys.argv[1] + "/deep/run", keep=dd.latest(2)) as ckpt:
    for step in (1, 2, 3):
        state = {"w": jnp.ones((256, 256)), "n": np.arange(3), "s": "x", "b": b"y"}
        ckpt.save(step, state=state, data=Counter(0, 1), metadata={"a": 1}).result()
    assert ckpt.all_steps() == [2, 3]
"""


@pytest.mark.parametrize("umask", [0o077, 0o027, 0o002])
def test_everything_is_made_with_the_umask_of_the_process(tmp_path: Path, umask: int) -> None:
    run_job("-c", _SAVE, tmp_path, f"{umask:03o}")
    found = {
        str(path.relative_to(tmp_path)): stat.S_IMODE(path.lstat().st_mode)
        for path in tmp_path.rglob("*")
    }
    assert "deep/run/3/COMMIT.json" in found
    wanted = {
        name: (0o777 if (tmp_path / name).is_dir() else 0o666) & ~umask for name in sorted(found)
    }
    assert {name: oct(mode) for name, mode in found.items() if mode != wanted[name]} == {}
