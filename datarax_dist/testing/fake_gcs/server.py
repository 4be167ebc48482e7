"""The HTTP server of a `FakeGCS`, and what it does wrong on purpose."""

from __future__ import annotations

import asyncio
import email.utils
import itertools
import json
import re
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, get_args

from aiohttp import web

from datarax_dist.testing.fake_gcs.service import Service, StoredObject
from datarax_dist.testing.fake_gcs.wire import Call, as_error, take_apart

__all__ = ["FAULT_MODES", "REQUEST_KINDS", "FakeGCS", "Fault", "Request"]

Mode = Literal[
    "error",
    "drop",
    "applied_then_dropped",
    "applied_then_error",
    "truncated",
    "corrupted",
    "delay",
    "stalled",
]
FAULT_MODES: Final[tuple[str, ...]] = get_args(Mode)
REQUEST_KINDS: Final = (
    *("list", "stat", "read", "insert", "start", "chunk", "cancel", "delete", "patch"),
    *("compose", "copy", "batch", "bucket", "permissions", "other"),
)

_UPLOADS = ("insert", "chunk")
_READING = ("list", "stat", "read", "permissions")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request as the server saw it. `status` is 0 while, and when, nothing was answered.

    `sent` and `received` count bytes of bodies, from the client's side. `condition` is the value of
    ifGenerationMatch; a chunk has its upload's.
    """

    number: int
    method: str
    kind: str
    bucket: str
    name: str
    status: int = 0
    sent: int = 0
    received: int = 0
    client: str = ""
    condition: int | None = None
    fault: str = ""
    parts: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class Fault:
    """What goes wrong, with which requests. `seen` counts those that match, `hits` those it hit."""

    mode: str
    kinds: frozenset[str] | None
    name: re.Pattern[str] | None
    method: str | None
    client: re.Pattern[str] | None
    bucket: str | None
    number: int | None
    times: int | None
    status: int
    seconds: float
    seen: int = 0
    hits: int = 0

    def _due(self, call: Call, client: str) -> bool:
        if (
            (self.kinds is not None and call.kind not in self.kinds)
            or (self.name is not None and not self.name.search(call.name))
            or (self.method is not None and self.method != call.method)
            or (self.bucket is not None and self.bucket not in call.buckets)
            or (self.client is not None and not self.client.search(client))
        ):
            return False
        self.seen += 1
        return self.seen >= (self.number or 1) and (self.times is None or self.hits < self.times)


class FakeGCS(Service):
    """A local Google Cloud Storage; see the module's docstring.

    Attributes that can be set at any time: `latency_seconds`, what each request waits;
    `requests_per_second`, beyond which requests get a 429 (None: no limit; a burst of one second is
    let through); `one_write_per_second`, whether a second write to a name within a second gets a
    429; `clock_skew_seconds`, how far the server's clock is ahead.

    Args:
        buckets: The buckets that exist at the start. Names need three characters.
        port: The port on 127.0.0.1; 0 takes a free one.
        seed: For the places of damaged bytes.
    """

    def __init__(
        self, *, buckets: Collection[str] = ("bucket",), port: int = 0, seed: int = 0
    ) -> None:
        super().__init__(buckets, seed)
        self.latency_seconds = 0.0
        self.requests_per_second: float | None = None
        self._port = port
        self._faults: list[Fault] = []
        self._records: dict[int, Request] = {}
        self._numbers = itertools.count(1)
        self._tokens = float("inf")
        self._refilled = 0.0
        self._thread: threading.Thread | None = None
        self._started = threading.Event()
        self._failure: BaseException | None = None

    # What a test says and asks

    def __enter__(self) -> FakeGCS:
        if self._thread is not None:
            raise RuntimeError("This FakeGCS has been started before.")
        self._thread = threading.Thread(target=self._run, name="fake-gcs", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the server, whatever is under way. What is stored can still be looked at."""
        if self._thread is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()

    def environment(self) -> dict[str, str]:
        """Environment variables that send gcsfs, google-cloud-storage and TensorStore here."""
        options = {"token": "anon", "project": "p", "use_listings_cache": False}
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "FSSPEC_GCS": json.dumps(options),
            "GOOGLE_CLOUD_PROJECT": "p",
            "NO_GCE_CHECK": "true",
        }

    @property
    def requests(self) -> list[Request]:
        """All requests since the start, or since `clear_requests`, in order of arrival."""
        with self._lock:
            return [self._records[number] for number in sorted(self._records)]

    def clear_requests(self) -> None:
        with self._lock:
            self._records.clear()

    def make_bucket(self, name: str) -> None:
        with self._lock:
            self._make_bucket(name)

    def objects(self, bucket: str) -> dict[str, StoredObject]:
        """What is in a bucket now, sorted by name."""
        with self._lock:
            return dict(sorted(self._buckets[bucket].objects.items()))

    def put(self, bucket: str, name: str, data: bytes) -> StoredObject:
        """Stores an object as another writer would; no permission, limit or fault is asked."""
        with self._lock:
            properties = {"contentType": "application/octet-stream"}
            return self._store(self._buckets[bucket], name, data, properties)

    def flip(self, bucket: str, name: str, position: int, bit: int = 0) -> None:
        """Rots one bit in silence: the content changes, its hashes and generation do not."""
        with self._lock:
            objects = self._buckets[bucket].objects
            content = bytearray(objects[name].content)
            content[position] ^= 1 << bit
            objects[name] = replace(objects[name], content=bytes(content))

    def bucket_settings(self, bucket: str, **settings: Any) -> None:
        """Sets what GET of the bucket tells, by the names of the JSON API."""
        with self._lock:
            self._buckets[bucket].settings |= settings

    def deny(self, *permissions: str) -> None:
        """Refuses all that needs one of these permissions, with 403."""
        with self._lock:
            self._denied |= set(permissions)

    def allow(self, *permissions: str) -> None:
        with self._lock:
            self._denied -= set(permissions)

    def allow_all(self) -> None:
        with self._lock:
            self._denied.clear()

    def fail(
        self,
        mode: Mode,
        *,
        kind: str | Collection[str] | None = None,
        name: str | None = None,
        method: str | None = None,
        client: str | None = None,
        bucket: str | None = None,
        number: int | None = None,
        times: int | None = 1,
        status: int = 503,
        seconds: float = 20.0,
    ) -> Fault:
        """Makes requests go wrong.

        Args:
            mode: "error" answers `status`, "drop" closes the connection; both apply nothing.
                "applied_then_dropped" and "applied_then_error" (503) do it first. "truncated"
                cuts the reply in its middle. "corrupted" damages one byte: of a read's content, of
                an upload's content on its way here, of any other reply. "delay" waits `seconds`
                and goes on. "stalled" sends half of the reply of something that reads, nothing
                otherwise (and applies nothing), is silent for `seconds`, and closes.
            kind: One of `REQUEST_KINDS`, or several.
            name: A regular expression searched in the object's name.
            method: The HTTP method.
            client: A regular expression searched in the user agent.
            bucket: The bucket.
            number: The first matching request to hit, counted from 1, from now on.
            times: How many requests to hit; None for all.
            status: What "error" answers.
            seconds: For "delay" and "stalled".

        Parts of a batch are hit by "error" alone, by their own kind and name.
        """
        kinds = None if kind is None else frozenset([kind] if isinstance(kind, str) else kind)
        if mode not in FAULT_MODES:
            raise ValueError(f"There is no mode {mode!r}. Modes: {', '.join(FAULT_MODES)}.")
        if kinds is not None and not kinds <= set(REQUEST_KINDS):
            raise ValueError(f"Not all of {sorted(kinds)} are in {', '.join(REQUEST_KINDS)}.")
        fault = Fault(
            mode=mode,
            kinds=kinds,
            name=None if name is None else re.compile(name),
            method=method and method.upper(),
            client=None if client is None else re.compile(client),
            bucket=bucket,
            number=number,
            times=times,
            status=status,
            seconds=seconds,
        )
        with self._lock:
            self._faults.append(fault)
        return fault

    def heal(self, fault: Fault | None = None) -> None:
        """Takes a fault back, or all of them."""
        with self._lock:
            self._faults = [f for f in self._faults if fault is not None and f is not fault]

    # The server

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._failure = error
            if self._started.is_set():
                raise
        finally:
            self._started.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        server = web.Server(self._serve_one, access_log=None, auto_decompress=False)
        runner = web.ServerRunner(server, shutdown_timeout=0.2)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", self._port).start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            self._started.set()
            await self._stopping.wait()
        finally:
            await runner.cleanup()

    async def _pause(self, seconds: float) -> None:
        if seconds > 0:
            try:
                await asyncio.wait_for(self._stopping.wait(), seconds)
            except TimeoutError:
                pass

    async def _serve_one(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await self._take(request)
        except (ConnectionError, web.RequestPayloadError):
            return _hang_up(request)  # the client died: that is its business, and nothing to log

    async def _take(self, request: web.BaseRequest) -> web.StreamResponse:
        number = next(self._numbers)
        headers = {key.lower(): ",".join(request.headers.getall(key)) for key in request.headers}
        head = take_apart(request.method, request.raw_path, headers, b"")
        client = headers.get("user-agent", "")
        with self._lock:
            self._records[number] = Request(
                number=number,
                method=request.method,
                kind=head.kind,
                bucket=head.bucket,
                name=head.name,
                client=client,
            )
        if headers.get("expect", "").lower() == "100-continue" and request.transport:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await request.content.read()
        call = take_apart(request.method, request.raw_path, headers, body)
        with self._lock:
            if upload := self._uploads.get(call.query.get("upload_id", "")):
                call.name = upload.call.name
            fault = self._hit(call, client)
            condition = upload.call.condition if upload else call.condition
            self._amend(number, name=call.name, sent=len(body), condition=condition)
            self._amend(number, fault=fault.mode if fault else "", parts=len(call.parts))
        await self._pause(self.latency_seconds)
        return await self._answer(request, call, number, fault, client)

    def _amend(self, number: int, **changes: Any) -> None:
        with self._lock:
            if number in self._records:  # or they were cleared meanwhile
                self._records[number] = replace(self._records[number], **changes)

    def _hit(self, call: Call, client: str, modes: Collection[str] = FAULT_MODES) -> Fault | None:
        due = [fault for fault in self._faults if fault.mode in modes and fault._due(call, client)]
        if due:
            due[0].hits += 1
        return due[0] if due else None

    async def _answer(
        self, request: web.BaseRequest, call: Call, number: int, fault: Fault | None, client: str
    ) -> web.StreamResponse:
        mode = fault.mode if fault else ""
        if fault and mode == "delay":
            await self._pause(fault.seconds)
        silent = mode == "stalled" and not (
            call.kind in _READING or (call.kind == "bucket" and call.method == "GET")
        )
        if mode == "drop" or silent or self._stopping.is_set():
            await self._pause(fault.seconds if fault and silent else 0)
            return _hang_up(request)
        if mode == "corrupted" and call.kind in _UPLOADS:
            call.content = self._damaged(call.content)
        if fault and mode == "error":
            reply = as_error(fault.status, "Fault on purpose.")
        elif self._over_rate():
            reply = as_error(429, "The rate of requests exceeds the limit of this bucket.")
        else:
            reply = self._apply(call, client)
        if mode == "applied_then_error":
            reply = as_error(503, "Fault on purpose, after it was applied.")
        if mode == "corrupted" and call.kind not in _UPLOADS:
            reply.body = self._damaged(reply.body)
        cut = mode in ("truncated", "stalled")
        if mode == "applied_then_dropped" or (cut and not reply.body):
            await self._pause(fault.seconds if fault and mode == "stalled" else 0)
            return _hang_up(request)
        date = email.utils.formatdate(self._now(), usegmt=True)
        response = web.StreamResponse(status=reply.status, headers={"Date": date} | reply.headers)
        if reply.status not in (204, 304):
            response.content_length = len(reply.body)
        part = reply.body[: len(reply.body) // 2] if cut else reply.body
        if request.method == "HEAD":
            part = b""
        # The client may look at the records as soon as it has the reply.
        self._amend(number, status=reply.status, received=len(part))
        await response.prepare(request)
        if part:
            await response.write(part)
        if cut:
            await self._pause(fault.seconds if fault and mode == "stalled" else 0)
            return _hang_up(request)
        await response.write_eof()
        return response

    def _damaged(self, content: bytes) -> bytes:
        if not content:
            return content
        damaged = bytearray(content)
        damaged[self._random.randrange(len(damaged))] ^= 1 << self._random.randrange(8)
        return bytes(damaged)

    def _over_rate(self) -> bool:
        rate, now = self.requests_per_second, time.monotonic()
        if rate is None:
            self._tokens = float("inf")
            return False
        self._tokens = min(max(1.0, rate), self._tokens + (now - self._refilled) * rate)
        self._refilled = now
        if self._tokens < 1:
            return True
        self._tokens -= 1
        return False

    def _part_fault(self, part: Call, client: str) -> int | None:
        fault = self._hit(part, client, modes=("error",))
        return fault.status if fault else None


def _hang_up(request: web.BaseRequest) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.close()
    return web.Response()  # never sent: the connection is closed
