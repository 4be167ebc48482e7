"""The buckets of a `FakeGCS`, and what each request does to them in one step. No network."""

from __future__ import annotations

import base64
import binascii
import email.utils
import json
import random
import re
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote

from datarax_dist.testing.fake_gcs.wire import (
    JSON_HEADERS,
    WRITABLE,
    Call,
    Refused,
    Reply,
    as_error,
    as_json,
    check_conditions,
    check_name,
    claims_of,
    etag,
    given,
    hashes_of,
    head_and_body,
    number_of,
    phrase,
    take_apart,
    timestamp,
    writable,
)

__all__ = ["Service", "StoredObject"]

_CHUNK = 256 * 1024
_BATCH_PARTS = 100
_COMPOSE_SOURCES = 32
_CALLER = "tester@fake.iam.gserviceaccount.com"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """The live version of an object. `crc32c` and `md5` are in base64; a composed one has no md5.

    Times are seconds since 1970, of the server's clock.
    """

    content: bytes
    generation: int
    metageneration: int
    crc32c: str
    md5: str
    time_created: float
    updated: float
    properties: Mapping[str, Any]
    components: int = 0


@dataclass(slots=True)
class _Upload:
    call: Call
    content: bytearray = field(default_factory=bytearray)
    finished: bytes | None = None
    cancelled: bool = False


@dataclass(slots=True)
class _Bucket:
    settings: dict[str, Any]
    objects: dict[str, StoredObject] = field(default_factory=dict)
    written: dict[str, float] = field(default_factory=dict)


class Service:
    """The buckets, and what each request does to them in one step."""

    url = ""

    def __init__(self, buckets: Collection[str], seed: int) -> None:
        self.one_write_per_second = False
        self.clock_skew_seconds = 0.0
        self._lock = threading.RLock()
        self._buckets: dict[str, _Bucket] = {}
        self._uploads: dict[str, _Upload] = {}
        self._denied: set[str] = set()
        self._generation = 0
        self._random = random.Random(seed)
        for bucket in buckets:
            self._make_bucket(bucket)

    def _now(self) -> float:
        return time.time() + self.clock_skew_seconds

    def _part_fault(self, part: Call, client: str) -> int | None:
        """The status that a part of a batch fails with on purpose: none does, without faults."""
        return None

    def _apply(self, call: Call, client: str) -> Reply:
        with self._lock:
            try:
                if not call.handler:
                    raise Refused(404, "Not Found")
                if call.malformed:
                    raise Refused(400, call.malformed)
                for bucket in filter(None, (call.bucket, call.source_bucket)):
                    if bucket not in self._buckets:
                        raise Refused(404, "The specified bucket does not exist.")
                if call.kind == "batch":
                    return self._do_batch(call, client)
                reply: Reply = getattr(self, f"_do_{call.handler}")(call)
                return reply
            except Refused as refused:
                return refused.reply

    def _permit(self, permission: str) -> None:
        if permission in self._denied:
            on_object = permission.startswith("storage.objects.") and permission[-5:] != ".list"
            raise Refused(
                403,
                f"{_CALLER} does not have {permission} access to the Google Cloud Storage "
                f"{'object' if on_object else 'bucket'}. Permission '{permission}' denied on "
                f"resource (or it may not exist).",
            )

    def _find(
        self, call: Call, *, bucket: str = "", name: str = "", generation: str = ""
    ) -> StoredObject:
        bucket, name = bucket or call.bucket, name or call.name
        found = self._buckets[bucket].objects.get(name)
        if found is None or (generation and str(found.generation) != generation):
            raise Refused(404, f"No such object: {bucket}/{name}")
        return found

    def _admit(self, call: Call) -> None:
        """Whether the caller may put an object under this name, on these conditions."""
        self._permit("storage.objects.create")
        found = self._buckets[call.bucket].objects.get(call.name)
        check_conditions(call.query, found)
        if found is not None:
            self._permit("storage.objects.delete")

    def _limit_writes(self, bucket: str, name: str) -> None:
        written, now = self._buckets[bucket].written, time.monotonic()
        if self.one_write_per_second and now - written.get(name, float("-inf")) < 1:
            raise Refused(
                429,
                f"The object {bucket}/{name} exceeded the rate limit for object mutation "
                f"operations (create, update, and delete). Please reduce your request rate.",
            )
        written[name] = now

    def _store(
        self,
        bucket: _Bucket,
        name: str,
        content: bytes,
        properties: Mapping[str, Any],
        *,
        hashes: tuple[str, str] | None = None,
        components: int = 0,
    ) -> StoredObject:
        now = self._now()
        self._generation = max(self._generation + 1, int(time.time() * 1e6))
        crc32c, md5 = hashes or hashes_of(content)
        bucket.objects[name] = StoredObject(
            content=content,
            generation=self._generation,
            metageneration=1,
            crc32c=crc32c,
            md5=md5,
            time_created=now,
            updated=now,
            properties={"storageClass": "STANDARD"} | writable(properties),
            components=components,
        )
        return bucket.objects[name]

    def _create(
        self,
        call: Call,
        content: bytes,
        properties: Mapping[str, Any],
        *,
        claims: Collection[str] = (),
        hashes: tuple[str, str] | None = None,
        components: int = 0,
    ) -> dict[str, Any]:
        """Stores an object if conditions, permissions, claimed checksums and limits let it."""
        self._admit(call)
        hashes = hashes or hashes_of(content)
        for claim in claims:
            kind, _, value = claim.strip().partition("=")
            right = {"crc32c": hashes[0], "md5": hashes[1]}.get(kind, value)
            if value != right:
                title = {"crc32c": "CRC32C", "md5": "MD5 hash"}[kind]
                raise Refused(
                    400, f'Provided {title} "{value}" doesn\'t match calculated {title} "{right}".'
                )
        self._limit_writes(call.bucket, call.name)
        found = self._store(
            self._buckets[call.bucket],
            call.name,
            content,
            properties,
            hashes=hashes,
            components=components,
        )
        return self._resource(call.bucket, call.name, found)

    def _resource(self, bucket: str, name: str, found: StoredObject) -> dict[str, Any]:
        path = f"b/{bucket}/o/{quote(name, safe='')}"
        resource = {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{found.generation}",
            "selfLink": f"{self.url}/storage/v1/{path}",
            "mediaLink": f"{self.url}/download/storage/v1/{path}"
            f"?generation={found.generation}&alt=media",
            "name": name,
            "bucket": bucket,
            "generation": str(found.generation),
            "metageneration": str(found.metageneration),
            "size": str(len(found.content)),
            "crc32c": found.crc32c,
            "etag": etag(found),
            "timeCreated": timestamp(found.time_created),
            "updated": timestamp(found.updated),
            "timeStorageClassUpdated": timestamp(found.time_created),
            **found.properties,
        }
        if found.md5:
            resource["md5Hash"] = found.md5
        if found.components:
            resource["componentCount"] = found.components
        return resource

    def _do_stat(self, call: Call) -> Reply:
        self._permit("storage.objects.get")
        found = self._find(call, generation=call.query.get("generation", ""))
        check_conditions(call.query, found, reading=True)
        return as_json(self._resource(call.bucket, call.name, found))

    def _do_read(self, call: Call) -> Reply:
        self._permit("storage.objects.get")
        found = self._find(call, generation=call.query.get("generation", ""))
        check_conditions(call.query, found, reading=True)
        hashes = [f"crc32c={found.crc32c}"] + ([f"md5={found.md5}"] if found.md5 else [])
        headers = {
            "Content-Type": found.properties.get("contentType", "application/octet-stream"),
            "Accept-Ranges": "bytes",
            "ETag": etag(found),
            "Last-Modified": email.utils.formatdate(found.updated, usegmt=True),
            "x-goog-hash": ",".join(hashes),
            "x-goog-generation": str(found.generation),
            "x-goog-metageneration": str(found.metageneration),
            "x-goog-stored-content-length": str(len(found.content)),
            "x-goog-storage-class": found.properties["storageClass"],
        }
        if "contentEncoding" in found.properties:
            headers["Content-Encoding"] = found.properties["contentEncoding"]
        size = len(found.content)
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("range", ""))
        if not wanted or wanted[0] == "bytes=-":
            return Reply(200, found.content, headers)
        if wanted[1]:
            first, last = int(wanted[1]), min(int(wanted[2] or size), size - 1)
        else:
            first, last = max(0, size - int(wanted[2])), size - 1
        if first > last:
            message = "The requested range cannot be satisfied."
            raise Refused(416, message, Content_Range=f"bytes */{size}")
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return Reply(206, found.content[first : last + 1], headers)

    def _do_delete(self, call: Call) -> Reply:
        self._permit("storage.objects.delete")
        found = self._find(call, generation=call.query.get("generation", ""))
        check_conditions(call.query, found)
        del self._buckets[call.bucket].objects[call.name]
        return Reply(204)

    def _do_patch(self, call: Call) -> Reply:
        self._permit("storage.objects.update")
        found = self._find(call, generation=call.query.get("generation", ""))
        check_conditions(call.query, found)
        self._limit_writes(call.bucket, call.name)
        keep = found.properties if call.method == "PATCH" else {"storageClass": "STANDARD"}
        changes = {key: call.metadata[key] for key in WRITABLE if key in call.metadata}
        if call.method == "PATCH" and isinstance(changes.get("metadata"), dict):
            before: dict[str, Any] = dict(found.properties.get("metadata") or {})
            changes["metadata"] = given(before | changes["metadata"])
        found = replace(
            found,
            properties=given({**keep, **changes}),
            metageneration=found.metageneration + 1,
            updated=self._now(),
        )
        self._buckets[call.bucket].objects[call.name] = found
        return as_json(self._resource(call.bucket, call.name, found))

    def _do_compose(self, call: Call) -> Reply:
        sources = call.metadata.get("sourceObjects") or []
        if not all(source.get("name") for source in sources):
            raise Refused(400, "A source component has no name.")
        if not 1 <= len(sources) <= _COMPOSE_SOURCES:
            raise Refused(
                400, f"The number of source components must be from 1 to {_COMPOSE_SOURCES}."
            )
        self._permit("storage.objects.get")
        found = []
        for source in sources:
            generation = str(source.get("generation") or "")
            found.append(self._find(call, name=source["name"], generation=generation))
            check_conditions(source.get("objectPreconditions") or {}, found[-1])
        content = b"".join(source.content for source in found)
        metadata = call.metadata.get("destination") or {}
        first = {"contentType": found[0].properties.get("contentType")}
        resource = self._create(
            call,
            content,
            first | writable(metadata),
            claims=claims_of({}, metadata),
            hashes=(hashes_of(content)[0], ""),
            components=sum(source.components or 1 for source in found),
        )
        return as_json(resource)

    def _do_copy(self, call: Call) -> Reply:
        self._permit("storage.objects.get")
        generation = call.query.get("sourceGeneration", "")
        source = self._find(
            call, bucket=call.source_bucket, name=call.source, generation=generation
        )
        check_conditions(call.query, source, of="Source")
        resource = self._create(
            call,
            source.content,
            {**source.properties, **writable(call.metadata)},
            hashes=(source.crc32c, source.md5),
            components=source.components,
        )
        if "/copyTo/" in call.path:
            return as_json(resource)
        size = str(len(source.content))
        progress = {"totalBytesRewritten": size, "objectSize": size, "done": True}
        return as_json({"kind": "storage#rewriteResponse", **progress, "resource": resource})

    def _do_insert(self, call: Call) -> Reply:
        check_name(call.name)
        claims = claims_of(call.headers, call.metadata)
        return as_json(self._create(call, call.content, call.metadata, claims=claims))

    def _do_start(self, call: Call) -> Reply:
        check_name(call.name)
        self._admit(call)
        upload_id = f"{self._random.getrandbits(128):032x}"
        self._uploads[upload_id] = _Upload(call)
        location = (
            f"{self.url}/upload/storage/v1/b/{call.bucket}/o"
            f"?uploadType=resumable&name={quote(call.name, safe='')}&upload_id={upload_id}"
        )
        return Reply(200, b"", {"Location": location, "X-GUploader-UploadID": upload_id})

    def _upload(self, call: Call) -> _Upload:
        upload = self._uploads.get(call.query.get("upload_id", ""))
        if upload is None:
            raise Refused(404, "No such upload.")
        if upload.cancelled:
            raise Refused(499, "The upload was cancelled.")
        return upload

    def _do_cancel(self, call: Call) -> Reply:
        self._upload(call).cancelled = True
        return Reply(499)

    def _do_chunk(self, call: Call) -> Reply:
        upload = self._upload(call)
        if upload.finished is not None:
            return Reply(200, upload.finished, JSON_HEADERS)
        there, content = len(upload.content), call.content
        said = call.headers.get("content-range")
        total: int | None
        if said is None:
            first, total = there, there + len(content)
        else:
            wanted = re.fullmatch(r"bytes (?:\*|(\d+)-(\d+))/(\d+|\*)", said)
            if wanted is None:
                raise Refused(400, "Failed to parse Content-Range header.")
            first = int(wanted[1]) if wanted[1] else there
            total = None if wanted[3] == "*" else int(wanted[3])
            if len(content) != (int(wanted[2]) - first + 1 if wanted[2] else 0):
                raise Refused(400, "Content-Range does not tell the size of the body.")
        if first > there:
            raise Refused(400, f"The offset {first} exceeds the uploaded size of {there} bytes.")
        final = total == first + len(content)
        if content and not final:
            if len(content) < _CHUNK:
                raise Refused(
                    400, f"All chunks but the last need {_CHUNK} bytes; {len(content)} came."
                )
            whole = (first + len(content)) // _CHUNK * _CHUNK
            content = content[: whole - first]
        upload.content += content[there - first :]
        if not final or len(upload.content) != total:
            size = len(upload.content)
            return Reply(308, b"", {"Range": f"bytes=0-{size - 1}"} if size else {})
        claims = claims_of(upload.call.headers, upload.call.metadata)
        claims += claims_of({"x-goog-hash": call.headers.get("x-goog-hash", "")}, {})
        try:
            resource = self._create(
                upload.call, bytes(upload.content), upload.call.metadata, claims=claims
            )
        except Refused as refused:
            if refused.reply.status == 429:  # the client sends its last chunk again
                del upload.content[there:]
            else:
                del self._uploads[call.query["upload_id"]]
            raise
        upload.content.clear()
        upload.finished = json.dumps(resource).encode()
        return Reply(200, upload.finished, JSON_HEADERS)

    def _do_list(self, call: Call) -> Reply:
        self._permit("storage.objects.list")
        query = call.query
        for option in ("matchGlob", "softDeleted"):
            if query.get(option, "false") != "false":
                raise Refused(400, f"FakeGCS does not know {option}.")
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first, end = query.get("startOffset", ""), query.get("endOffset", "")
        limit = min(number_of(query, "maxResults") or 1000, 1000)
        try:
            last = base64.urlsafe_b64decode(query.get("pageToken", "")).decode()
        except (binascii.Error, UnicodeDecodeError):
            raise Refused(400, "Invalid pageToken.") from None
        items: list[dict[str, Any]] = []
        prefixes: list[str] = []
        answer: dict[str, Any] = {"kind": "storage#objects"}
        for name, found in sorted(self._buckets[call.bucket].objects.items()):
            if not name.startswith(prefix) or name < first or (end and name >= end):
                continue
            at = name.find(delimiter, len(prefix)) if delimiter else -1
            entry = name if at < 0 else name[: at + len(delimiter)]
            if entry <= last:
                continue
            if len(items) + len(prefixes) == limit:
                answer["nextPageToken"] = base64.urlsafe_b64encode(last.encode()).decode()
                break
            last = entry
            if at < 0:
                items.append(self._resource(call.bucket, name, found))
            else:
                prefixes.append(entry)
        answer |= {"items": items} if items else {}
        answer |= {"prefixes": prefixes} if prefixes else {}
        return as_json(answer)

    def _do_batch(self, call: Call, client: str) -> Reply:
        if not 1 <= len(call.parts) <= _BATCH_PARTS:
            raise Refused(400, f"A batch has from 1 to {_BATCH_PARTS} parts.")
        boundary, lines = "batch_fake_gcs", []
        for number, (headers, content) in enumerate(call.parts):
            reply = self._apply_part(content, client)
            status = f"{reply.status} {phrase(reply.status)}"
            content_id = headers.get("content-id", f"<{number}>").strip("<>")
            inner = reply.headers | {"Content-Length": str(len(reply.body))}
            lines.append(
                f"--{boundary}\r\nContent-Type: application/http\r\n"
                f"Content-ID: <response-{content_id}>\r\n\r\nHTTP/1.1 {status}\r\n"
                + "".join(f"{key}: {value}\r\n" for key, value in inner.items())
                + f"\r\n{reply.body.decode()}\r\n"
            )
        body = "".join(lines) + f"--{boundary}--\r\n"
        return Reply(200, body.encode(), {"Content-Type": f"multipart/mixed; boundary={boundary}"})

    def _apply_part(self, content: bytes, client: str) -> Reply:
        line, _, rest = content.lstrip().partition(b"\n")
        words = line.decode(errors="replace").split()
        headers, body = head_and_body(rest)
        if len(words) < 2:
            return as_error(400, "A part of the batch is not an HTTP request.")
        part = take_apart(words[0], words[1], headers, body)
        if part.kind not in ("delete", "stat", "patch"):
            return as_error(400, f"A batch cannot {words[0]} {part.path}.")
        if status := self._part_fault(part, client):
            return as_error(status, "Fault on purpose.")
        return self._apply(part, client)

    # Buckets

    def _make_bucket(self, name: str, settings: Mapping[str, Any] | None = None) -> None:
        if not 3 <= len(name) <= 222:
            raise ValueError(f"Invalid bucket name: {name!r}; it needs three characters or more.")
        now = timestamp(self._now())
        self._buckets[name] = _Bucket(
            {
                "kind": "storage#bucket",
                "id": name,
                "name": name,
                "projectNumber": "1",
                "metageneration": "1",
                "location": "US-CENTRAL1",
                "locationType": "region",
                "storageClass": "STANDARD",
                "etag": "CAE=",
                "timeCreated": now,
                "updated": now,
                "softDeletePolicy": {"retentionDurationSeconds": "604800", "effectiveTime": now},
                **(settings or {}),
            }
        )

    def _do_permissions(self, call: Call) -> Reply:
        asked = [value for key, value in call.pairs if key == "permissions"]
        granted = [permission for permission in asked if permission not in self._denied]
        answer: dict[str, Any] = {"kind": "storage#testIamPermissionsResponse"}
        return as_json(answer | ({"permissions": granted} if granted else {}))

    def _do_layout(self, call: Call) -> Reply:
        self._permit("storage.objects.list")
        settings = self._buckets[call.bucket].settings
        layout = {"kind": "storage#storageLayout", "bucket": call.bucket}
        shown = ("location", "locationType", "hierarchicalNamespace")
        return as_json(layout | {key: settings[key] for key in shown if key in settings})

    def _do_bucket_get(self, call: Call) -> Reply:
        self._permit("storage.buckets.get")
        return as_json(self._buckets[call.bucket].settings)

    def _do_bucket_patch(self, call: Call) -> Reply:
        self._permit("storage.buckets.update")
        self._buckets[call.bucket].settings |= call.metadata
        return as_json(self._buckets[call.bucket].settings)

    def _do_bucket_delete(self, call: Call) -> Reply:
        self._permit("storage.buckets.delete")
        if self._buckets[call.bucket].objects:
            raise Refused(409, "The bucket you tried to delete is not empty.")
        del self._buckets[call.bucket]
        return Reply(204)

    def _do_bucket_list(self, call: Call) -> Reply:
        self._permit("storage.buckets.list")
        found = [bucket.settings for _, bucket in sorted(self._buckets.items())]
        return as_json({"kind": "storage#buckets", "items": found})

    def _do_bucket_create(self, call: Call) -> Reply:
        self._permit("storage.buckets.create")
        name = str(call.metadata.get("name", ""))
        if name in self._buckets:
            raise Refused(409, "Your previous request to create the named bucket succeeded.")
        try:
            self._make_bucket(name, call.metadata)
        except ValueError as error:
            raise Refused(400, str(error)) from None
        return as_json(self._buckets[name].settings)
