"""A process with a token in its environment, whose bucket server answers with what it was told: the
worst that a service or a proxy does. tests/test_secrets.py looks for the token in all it leaves.

    python tests/secrets_job.py TOKEN FILE
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np
from aiohttp import web

from datarax_dist.testing import FakeGCS


class Echo(FakeGCS):
    """A bucket server that knows who asks, and says so in its errors when `status` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.status, self.only = 0, ""
        self.senders: dict[str, int] = {}

    async def _serve_one(self, request: web.BaseRequest) -> web.StreamResponse:
        given = request.headers.get("Authorization", "")
        client = request.headers.get("User-Agent", "").partition("/")[0].lower()
        self.senders[client] = self.senders.get(client, 0) + (len(given) > len("Bearer "))
        if not self.status or self.only not in client:
            return await super()._serve_one(request)
        url = f"{request.url}?access_token={given.rpartition(' ')[2]}&X-Goog-Signature={given[7:]}"
        text = f"{url} refused: Authorization: {given}; headers {dict(request.headers)!r}"
        return web.json_response(
            {"error": {"code": self.status, "message": text}}, status=self.status
        )


class _Impatient:
    """asyncio for gcsfs's retries, which waits for nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record) + repr(record.__dict__))


def main(token: str, file: str) -> None:
    kept = _Kept()
    logging.getLogger("datarax_dist").addHandler(kept)
    logging.getLogger("datarax_dist").setLevel(logging.DEBUG)
    told: dict[str, list[str]] = {}
    with Echo() as gcs:
        os.environ |= gcs.environment() | {
            "FSSPEC_GCS": json.dumps({"token": token, "project": "p", "use_listings_cache": False}),
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": token,
            "https_proxy": "http://127.0.0.1:1",  # nobody is there, and nobody else is asked
        }
        os.environ.pop("FETCH_RAW_TOKEN_EXPIRY", None)
        gcs.make_bucket("bucket")
        _ask_how_long_it_lasts("gs://bucket/run", told)
        os.environ["FETCH_RAW_TOKEN_EXPIRY"] = "false"
        del os.environ["https_proxy"]
        _work(gcs, "gs://bucket/run", told)
        files = {name: repr(found.content) for name, found in gcs.objects("bucket").items()}
        senders = gcs.senders
        gcs.close()
        _try(told, "refused", _restore("gs://bucket/run"))
    left = {"told": told, "logs": kept.texts, "files": files, "senders": senders}
    Path(file).write_text(json.dumps(left))


def _work(gcs: Echo, root: str, told: dict[str, list[str]]) -> None:
    import gcsfs.retry

    import datarax_dist as dd
    from datarax_dist import buckets

    gcsfs.retry.asyncio = _Impatient()
    buckets._FIRST_PAUSE_SECONDS, buckets._DEADLINE_SECONDS = 0.001, 2.0
    state = {"w": np.arange(1000.0), "name": "x"}
    with dd.Checkpointer(root) as ckpt:
        told["save"] = [repr(ckpt.save(step, state=state).result()) for step in (1, 2)]
        told["restore"] = [repr(ckpt.restore()), str(ckpt.restore().report)]
    with _printed() as text:
        doctor = _doctor(root)
        doctor()
    told["doctor"] = [text.getvalue()]
    for status in (401, 403, 404, 400, 500):
        gcs.status = status
        for name, act in (("restore", _restore(root)), ("save", _save(root)), ("doctor", doctor)):
            with _printed() as text:
                _try(told, f"{status} {name}", act)
            told[f"{status} {name}"].append(text.getvalue())
        gcs.status = 0
        with dd.Checkpointer(root) as ckpt:  # fails in the middle of the save, in the background
            gcs_save = ckpt.save(50, state=state)
            gcs.status = status
            _try(told, f"{status} in a save", lambda handle=gcs_save: handle.result(60))
            with contextlib.suppress(Exception):
                ckpt.close()
        gcs.status = 0
    gcs.only = "tensorstore"
    for gcs.status in (401, 403, 400):
        _try(told, f"{gcs.status} restore of arrays", _restore(root))
        _try(told, f"{gcs.status} save of arrays", _save(root))
    gcs.status = 0
    for mode in ("corrupted", "truncated"):
        fault = gcs.fail(mode, kind=("read", "list"), times=None)
        _try(told, mode, _restore(root))
        gcs.heal(fault)


def _ask_how_long_it_lasts(root: str, told: dict[str, list[str]]) -> None:
    """gcsfs asks Google, with the token in the query of a URL, which stands in the error."""
    from datarax_dist.buckets import BucketStore

    _try(told, "not asked: Checkpointer", _restore(root))
    _try(told, "not asked: get", lambda: BucketStore(root).get("RUN.json"))
    with _printed() as text:
        _try(told, "not asked: doctor", _doctor(root))
    told["not asked: printed"] = [text.getvalue()]


def _restore(root: str) -> Callable[[], Any]:
    def act() -> Any:
        import datarax_dist as dd

        with dd.Checkpointer(root, options=dd.Options(restore_timeout_seconds=20)) as ckpt:
            return ckpt.try_restore()

    return act


def _save(root: str) -> Callable[[], Any]:
    def act() -> Any:
        import datarax_dist as dd

        with dd.Checkpointer(root, options=dd.Options(save_timeout_seconds=20)) as ckpt:
            return ckpt.save(9, state={"w": np.arange(1000.0)}).result()

    return act


def _doctor(root: str) -> Callable[[], Any]:
    def act() -> Any:
        from datarax_dist import cli

        return [cli.main(["doctor", root]), cli.main(["doctor", "--json", "--write", root])]

    return act


@contextlib.contextmanager
def _printed() -> Iterator[io.StringIO]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        yield text


def _try(told: dict[str, list[str]], name: str, act: Callable[[], Any]) -> None:
    try:
        told[name] = [repr(act())]
    except Exception as error:
        told[name] = [str(error), repr(error), "".join(traceback.format_exception(error))]


if __name__ == "__main__":
    main(*sys.argv[1:])
