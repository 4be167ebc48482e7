"""Requests and replies of the JSON API: taken apart, and made. No state."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import parse_qsl, unquote, urlsplit

import google_crc32c

_LOST = "At least one of the pre-conditions you specified did not hold."
WRITABLE: tuple[str, ...] = (
    *("cacheControl", "contentDisposition", "contentEncoding", "contentLanguage"),
    *("contentType", "customTime", "metadata", "storageClass"),
)
_REASONS = {400: "invalid", 403: "forbidden", 404: "notFound", 408: "requestTimeout"}
_REASONS |= {409: "conflict", 412: "conditionNotMet", 416: "requestedRangeNotSatisfiable"}
_REASONS |= {429: "rateLimitExceeded", 500: "internalError", 503: "backendError"}
_B = r"/b/(?P<bucket>[^/]+)"
_O = _B + r"/o/(?P<name>[^/]+)"
_BUCKET = "/storage/v1" + _B
_OBJECT = "/storage/v1" + _O
_SOURCE = r"/storage/v1/b/(?P<source_bucket>[^/]+)/o/(?P<source>[^/]+)"
_NOT_JSON = "(?!storage/|upload/|resumable/|download/|batch/)"
_ROUTES = [
    (methods.split(), re.compile(path), kind, handler)
    for methods, path, kind, handler in (
        ("GET HEAD", rf"(?:/download)?{_OBJECT}", "stat", "stat"),
        ("DELETE", _OBJECT, "delete", "delete"),
        ("PATCH PUT", _OBJECT, "patch", "patch"),
        ("POST", rf"{_OBJECT}/compose", "compose", "compose"),
        ("POST", rf"{_SOURCE}/(rewrite|copy)To{_O}", "copy", "copy"),
        ("POST PUT", rf"(?:/resumable)?/upload{_BUCKET}/o", "insert", "insert"),
        ("DELETE", rf"(?:/resumable)?/upload{_BUCKET}/o", "cancel", "cancel"),
        ("GET", rf"{_BUCKET}/o", "list", "list"),
        ("POST", r"/batch(?:/storage/v1)?", "batch", "batch"),
        ("GET", rf"{_BUCKET}/iam/testPermissions", "permissions", "permissions"),
        ("GET", rf"{_BUCKET}/storageLayout", "bucket", "layout"),
        ("GET", _BUCKET, "bucket", "bucket_get"),
        ("PATCH", _BUCKET, "bucket", "bucket_patch"),
        ("DELETE", _BUCKET, "bucket", "bucket_delete"),
        ("GET", r"/storage/v1/b", "bucket", "bucket_list"),
        ("POST", r"/storage/v1/b", "bucket", "bucket_create"),
        ("GET HEAD", rf"/{_NOT_JSON}(?P<bucket>[^/]+)/(?P<name>.+)", "read", "read"),
    )
]  # fmt: skip


class Versioned(Protocol):
    """An object, as far as conditions go."""

    @property
    def generation(self) -> int: ...

    @property
    def metageneration(self) -> int: ...


@dataclass(slots=True)
class Reply:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Refused(Exception):
    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.reply = as_error(status, message)
        self.reply.headers |= {key.replace("_", "-"): value for key, value in headers.items()}


@dataclass(slots=True, kw_only=True)
class Call:
    """A request taken apart. `content` is what an upload stores, `metadata` its JSON."""

    method: str
    kind: str = "other"
    handler: str = ""
    bucket: str = ""
    name: str = ""
    source_bucket: str = ""
    source: str = ""
    path: str = ""
    pairs: list[tuple[str, str]]
    query: dict[str, str]
    headers: Mapping[str, str]
    body: bytes
    content: bytes = b""
    metadata: dict[str, Any] = field(default_factory=dict)
    parts: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    malformed: str = ""

    @property
    def buckets(self) -> set[str]:
        """The bucket; of a batch, those that its parts name."""
        parts = re.findall(rb" /storage/v1/b/([^/\s]+)/o/", self.body) if self.parts else ()
        return {self.bucket, *(unquote(name.decode(errors="replace")) for name in parts)}

    @property
    def condition(self) -> int | None:
        value = self.query.get("ifGenerationMatch", "")
        return int(value) if value.isdecimal() else None


JSON_HEADERS = {"Content-Type": "application/json; charset=UTF-8"}


def as_json(answer: Mapping[str, Any], status: int = 200) -> Reply:
    return Reply(status, json.dumps(answer).encode(), dict(JSON_HEADERS))


def as_error(status: int, message: str) -> Reply:
    if status == 304:
        return Reply(304)
    domain = "usageLimits" if status == 429 else "global"
    error = {"domain": domain, "reason": _REASONS.get(status, "error"), "message": message}
    return as_json({"error": {"code": status, "message": message, "errors": [error]}}, status)


def phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"


def timestamp(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"


def etag(found: Versioned) -> str:
    return base64.b64encode(f"{found.generation}/{found.metageneration}".encode()).decode()


def take_apart(method: str, target: str, headers: Mapping[str, str], body: bytes) -> Call:
    split = urlsplit(target if target.startswith("http") else f"http://host{target}")
    pairs = parse_qsl(split.query, keep_blank_values=True)
    call = Call(
        method=method, path=split.path, pairs=pairs, query=dict(pairs), headers=headers, body=body
    )
    for methods, path, kind, handler in _ROUTES:
        if method in methods and (found := path.fullmatch(split.path)):
            call.kind, call.handler = kind, handler
            for key, value in found.groupdict().items():
                setattr(call, key, unquote(value))
            break
    if call.kind == "stat" and call.query.get("alt") == "media":
        call.kind = call.handler = "read"
    if call.kind == "read":
        for key, value in headers.items():  # the preconditions of the XML API
            if key.startswith("x-goog-if-"):
                word = "".join(part.capitalize() for part in key.split("-")[3:])
                call.query.setdefault(f"if{word}", value)
    content_type = headers.get("content-type", "")
    if call.kind == "insert":
        kind = call.query.get("uploadType", "")
        call.name = call.query.get("name", "")
        if kind == "resumable" or "upload_id" in call.query:
            call.kind = call.handler = "chunk" if "upload_id" in call.query else "start"
        elif kind not in ("media", "multipart"):
            call.malformed = "Unknown uploadType."
        if call.kind == "chunk" or kind == "media":
            call.content = body
        if kind == "media":
            call.metadata = {"contentType": content_type}
    if not body:
        return call
    try:
        if call.kind == "batch":
            call.parts = _split_parts(content_type, body)
        elif call.kind == "insert" and call.query.get("uploadType") == "multipart":
            (_, first), (inner, call.content) = _split_parts(content_type, body)
            call.metadata = {"contentType": inner.get("content-type", "")} | json.loads(first)
        elif call.kind in ("start", "patch", "compose", "copy", "bucket"):
            call.metadata = {**json.loads(body)}
    except (ValueError, TypeError):
        call.malformed = "Parse Error"
    if call.kind == "start" and "x-upload-content-type" in headers:
        call.metadata.setdefault("contentType", headers["x-upload-content-type"])
    if call.kind in ("insert", "start") and not call.name:
        call.name = str(call.metadata.get("name", ""))
    return call


def head_and_body(part: bytes) -> tuple[dict[str, str], bytes]:
    """Header lines, then an empty line, then content; with either kind of line end."""
    headers: dict[str, str] = {}
    while part:
        line, _, part = part.partition(b"\n")
        if not line.strip():
            break
        key, _, value = line.decode(errors="replace").partition(":")
        headers[key.strip().lower()] = value.strip()
    return headers, part


def _split_parts(content_type: str, body: bytes) -> list[tuple[dict[str, str], bytes]]:
    found = re.search(r'boundary="?([^";]+)', content_type)
    if found is None:
        raise ValueError("There is no boundary.")
    mark = b"--" + found[1].strip().encode()
    start = body.index(mark) + len(mark)
    # Clients end lines with LF or CRLF; the content's own last byte may be a CR.
    end = b"\r\n" if body[start : start + 2] == b"\r\n" else b"\n"
    parts = (end + body[start + len(end) :]).split(end + mark)
    if not parts[-1].startswith(b"--"):
        raise ValueError("The last boundary is missing.")
    return [head_and_body(part.removeprefix(end)) for part in parts[:-1]]


def writable(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {key: metadata[key] for key in WRITABLE if metadata.get(key)}


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def hashes_of(content: bytes) -> tuple[str, str]:
    crc32c = google_crc32c.value(content).to_bytes(4, "big")
    md5 = hashlib.md5(content, usedforsecurity=False).digest()
    return base64.b64encode(crc32c).decode(), base64.b64encode(md5).decode()


def claims_of(headers: Mapping[str, str], metadata: Mapping[str, Any]) -> list[str]:
    """What the client says of the content: "crc32c=..." and "md5=..."."""
    claims = [claim for claim in headers.get("x-goog-hash", "").split(",") if claim]
    claims += [f"crc32c={metadata['crc32c']}"] if metadata.get("crc32c") else []
    claims += [f"md5={metadata['md5Hash']}"] if metadata.get("md5Hash") else []
    return claims + ([f"md5={headers['content-md5']}"] if headers.get("content-md5") else [])


def check_name(name: str) -> None:
    if not name or len(name.encode()) > 1024 or name in (".", "..") or set(name) & {"\r", "\n"}:
        raise Refused(400, f"The object name {name[:80]!r} is not allowed.")


def number_of(query: Mapping[str, Any], key: str) -> int | None:
    value = query.get(key)
    if value is None:
        return None
    try:
        return int(value)
    except ValueError:
        raise Refused(400, f"Invalid value for {key}: {value!r}.") from None


def check_conditions(
    query: Mapping[str, Any], found: Versioned | None, *, of: str = "", reading: bool = False
) -> None:
    generation = found.generation if found else 0
    metageneration = found.metageneration if found else -1
    for what, value in (("Generation", generation), ("Metageneration", metageneration)):
        match = number_of(query, f"if{of}{what}Match")
        if match is not None and match != value:
            raise Refused(412, _LOST)
        not_match = number_of(query, f"if{of}{what}NotMatch")
        if not_match is not None and not_match == value:
            raise Refused(304 if reading else 412, _LOST)
