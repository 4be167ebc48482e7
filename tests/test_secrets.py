"""What others may learn: credentials reach no log, no file and no error, and files are made as the
umask of the process says.
"""

from __future__ import annotations

import ast
import errno
import itertools
import json
import os
import stat
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import fsspec
import pytest

import datarax_dist as dd
from datarax_dist import cli, errors
from datarax_dist.arrays import failures
from datarax_dist.buckets import BucketStore
from datarax_dist.data import positions
from datarax_dist.errors import mask

HERE = Path(__file__).parent
TOKEN = "ya99.a0SecretSecretSecret-0123456789_x"


def run_job(*words: object, timeout: float = 240, **more: Any) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    done = subprocess.run(
        [sys.executable, *(str(word) for word in words)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=timeout,
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
    for what in ("Checkpointer", "get"):
        assert "access_token=***" in told[f"not asked: {what}"][0]
        assert "StorageError" in told[f"not asked: {what}"][1]
    assert "access_token=***" in told["not asked: printed"][0]
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
        ("gs+with-a-long-name-indeed-which-is-allowed://u:S3CRET@h", "://***@h"),
        ('{"token": "S3CRET", "project": "p"}', '{"token": "***", "project": "p"}'),
        ("GCSFileSystem(token='S3CRET', project='p')", "token='***', project='p'"),
        ('{"password": "S3CRET, S3CRET", "user": "me"}', '"password": "***", "user": "me"'),
        (r'"{\"access_token\": \"S3CRET\", \"x\": 1}" was refused', "was refused"),
        ("Cookie: SID=S3CRET; other=S3CRET\nHost: h", "Cookie: ***\nHost: h"),
        ("{'Set-Cookie': 'SID=S3CRET; Path=/', 'Host': 'h'}", "'Set-Cookie': '***', 'Host'"),
        ('Authorization: Digest username="me", response="S3CRET"', "Authorization: Digest ***"),
        ("Authorization: Custom id=me, sign=S3CRET\nHost: h", "\nHost: h"),
        ("[('authorization', 'S3CRET'), ('host', 'h')]", "('authorization', '***'), ('host', 'h')"),
        ("[(b'Authorization', b'Bearer S3CRET')]", "(b'Authorization', b'Bearer ***')"),
        ("{'authorization': ('Bearer', 'S3CRET')}", "'Bearer', '***')"),
        (
            "to https://h/?next=https%3A%2F%2Fs%2Fo%3Faccess_token%3DS3CRET%26x",
            "access_token%3D***",
        ),
        ("o%3FX-Goog-Signature%3DS3CRET", "X-Goog-Signature%3D***"),
        ("o%253Ftoken%253DS3CRET", "token%253D***"),
        ("u?uploadType=resumable&amp;upload_id=S3CRET&amp;x=1", "upload_id=***&amp;x=1"),
        ("X-Goog-Api-Key: S3CRET", "X-Goog-Api-Key: ***"),
        ("Proxy-Authorization: Basic S3CRET", "Proxy-Authorization: Basic ***"),
        ("token=S3CRETS3CRETS3CRETS3CRET is expired", "token=*** is expired"),
        ("HF_TOKEN=S3CRETS3CRET in the environment", "HF_TOKEN=*** in the environment"),
        ("refused 1//0gS3CRETS3CRET here", "refused 1//0*** here"),
        ("refused eyJhbGciOiJSUzI1NiJ9.S3CRET.S3CRET here", "refused eyJ*** here"),
    ],
)
def test_credentials_in_texts_of_others_are_masked(text: str, shown: str) -> None:
    assert "S3CRET" not in mask(text)
    assert shown in mask(text)
    assert mask(mask(text)) == mask(text), "what is masked has no secrets"
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
        "Unexpected token: '}' at 3; the token is expired; tokens='a b', token=17, token = x",
        "/data/tokens.bin and /run/secrets/token: no such file",
        "/etc/passwd: Permission denied",
        "pad_token='<pad>', {'tokens': 3, 'token_count': 7, 'token': 5}, MAX_TOKENS=17",
        "the secret of a cookie, and who has authorization for it",
        "hf_model_checkpoint_converted_v2_final, eyJ, runs/1//0123456789ab, keyJabcdefgh.b.c",
        "assertion failed: AssertionError: x != y",
        "a%3Db%26key, signature: f(token, password)",
    ],
)
def test_what_holds_no_credentials_is_told_as_it_is(text: str) -> None:
    assert mask(text) == text
    error = OSError(text)
    assert errors.cause(error) is error


def test_masking_takes_no_more_time_than_a_long_text_has_length() -> None:
    """A child, which is ended: without bounds each of these takes minutes."""
    code = """
from datarax_dist.errors import cause, mask
for part in ("a.", "a+://", "password ", "authorization: a b=", "-----BEGIN PRIVATE ", "eyJaaaa-"):
    assert len(mask(part * 400_000)) < 30_000
assert cause(ValueError("a." * 400_000)) is None, "nobody has looked at all of it"
"""
    run_job("-c", code, timeout=20)


def test_a_secret_that_is_cut_in_two_is_not_told() -> None:
    for start in range(19_900, 20_001, 7):
        text = "x" * start + " https://user:S3CRETS3CRETS3CRET@host " + "y" * 1000
        assert "S3C" not in mask(text)
        assert mask(text).endswith(" ...")
    assert mask("z" * 100_000).startswith("z" * 10_000), "a text of one word is told, too"


def test_a_circle_of_errors_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__context__ = second, first
    assert list(itertools.islice(errors.chain(first), 9)) == [first, second]
    assert errors.cause(first) is first
    second.args = ("access_token=S3CRET",)
    assert errors.cause(first) is None
    assert failures._first(first) is second


def test_a_secret_in_a_note_or_in_one_of_a_group_is_looked_for() -> None:
    noted = ValueError("it failed")
    noted.add_note("Authorization: Bearer S3CRET")
    assert errors.cause(noted) is None
    inner = ValueError("plain")
    inner.__cause__ = OSError("access_token=S3CRET")
    assert errors.cause(ExceptionGroup("many", [ValueError("x"), inner])) is None
    noted.__notes__ = ["a plain note"]
    assert errors.cause(noted) is noted


def test_texts_of_others_do_not_control_a_terminal() -> None:
    name = "a\x1b[2J\r\u202e\udcff\x9bä"
    shown = "a\\x1b[2J\\r\\u202e\\udcff\\x9bä"
    assert errors.printable(f"{name}\nb") == f"{shown}\\nb"
    assert errors.describe(RuntimeError(f"{name}\nb")) == f"RuntimeError: {shown}\nb"


@pytest.mark.parametrize(
    "token",
    [
        {"type": "service_account", "private_key": "S3CRET"},
        {"refresh_token": "S3CRET"},
        "/not/there/S3CRET.json",
    ],
)
def test_credentials_that_cannot_be_used_do_not_mean_that_an_object_is_missing(
    token: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": token, "project": "p"})
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("FETCH_RAW_TOKEN_EXPIRY", raising=False)
    store = BucketStore("gs://bucket/run")
    for ask in (store.get, store.children, store.digest):
        with pytest.raises(errors.StorageError, match="Could not connect") as caught:
            ask("RUN.json")
        assert caught.value.errno in (errno.EACCES, errno.ETIMEDOUT)
        assert "S3CRET" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("error", [KeyError("refresh_token"), RuntimeError("x")])
def test_only_the_bucket_says_that_an_object_is_missing(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Session:
        told: Exception = error

        def call(self, *args: Any, **more: Any) -> Any:
            raise self.told

    store = BucketStore("gs://bucket/run")
    monkeypatch.setitem(store.__dict__, "_fs", Session())
    with pytest.raises(errors.StorageError):
        store.get("RUN.json")
    Session.told = FileNotFoundError("RUN.json")
    with pytest.raises(KeyError):
        store.get("RUN.json")


def test_a_client_that_tells_its_token_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        def call(self, *args: Any, **more: Any) -> Any:
            raise ConnectionError(f"no route for url: /tokeninfo?access_token={TOKEN}")

    store = BucketStore("gs://bucket/run")
    monkeypatch.setitem(store.__dict__, "_fs", Session())
    with pytest.raises(errors.StorageError, match=r"no route .*access_token=\*\*\*") as caught:
        store.get("RUN.json")
    assert TOKEN not in "".join(traceback.format_exception(caught.value))


def test_the_errors_of_others_are_logged_without_their_secrets(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Policy:
        def keep(self, steps: Any) -> Any:
            raise OSError(f"https://h/o?X-Goog-Signature={TOKEN}")

    with dd.Checkpointer(tmp_path / "run", keep=Policy()) as ckpt:  # type: ignore[arg-type]
        for step in (1, 2):
            ckpt.save(step, state={"a": 1}).result()
    assert "retention of" in caplog.text and "X-Goog-Signature=***" in caplog.text
    assert TOKEN not in caplog.text + "".join(str(record.args) for record in caplog.records)


def test_no_error_is_logged_as_it_is() -> None:
    """`describe` masks; the name of a caught error is no argument of a logger."""
    found = []
    for file in (HERE.parent / "datarax_dist").rglob("*.py"):
        tree = ast.parse(file.read_text())
        caught = {n.name for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler)}
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("logger."):
                names = {arg.id for arg in call.args if isinstance(arg, ast.Name)}
                found += [f"{file.name}:{call.lineno} {name}" for name in names & caught]
    assert [place for place in found if "hosts.py" not in place] == []  # it tells a call of ours


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
