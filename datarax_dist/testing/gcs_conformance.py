"""What a Google Cloud Storage must keep, as checks that run on a fake one and on a real bucket.

    with FakeGCS() as gcs:
        check_gcs(Endpoint(gcs.url, "bucket", "conformance"))

    check_gcs(Endpoint("https://storage.googleapis.com", "my-bucket", "conformance", token))

Each check takes an `Endpoint` whose prefix is its own, and raises `AssertionError` when a property
does not hold. `run_gcs_check` makes such a prefix, and deletes what the check left there.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import google_crc32c

__all__ = ["GCS_CHECKS", "Answer", "Endpoint", "check_gcs", "run_gcs_check"]

_CHUNK = 256 * 1024
_UPLOADS = ("media", "multipart", "resumable")
_WAIT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole HTTP reply. Names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.body)
        return answer


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A bucket by plain HTTP requests, a connection each.

    Args:
        url: Where the JSON API is, without a path.
        bucket: The bucket's name.
        prefix: Names of objects start with it and a slash.
        token: An OAuth2 access token; None sends none.
    """

    url: str
    bucket: str
    prefix: str
    token: str | None = None

    def request(
        self,
        method: str,
        target: str,
        *,
        query: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> Answer:
        """Sends one request; a 429 is tried again, because real buckets limit writes to a name.

        Args:
            method: The HTTP method.
            target: A path that is quoted already, or a whole URL.
            query: Values to add to the target.
            headers: Headers to add.
            body: What to send.
        """
        if query:
            target += ("&" if "?" in target else "?") + urlencode(query, quote_via=quote)
        all_headers = {"Content-Length": str(len(body)), **(headers or {})}
        if self.token is not None:
            all_headers["Authorization"] = f"Bearer {self.token}"
        answer = self._send(method, target, all_headers, body)
        for pause in (1, 2, 4, 8):
            if answer.status != 429:
                break
            time.sleep(pause)
            answer = self._send(method, target, all_headers, body)
        return answer

    def _send(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        url = urlsplit(target if target.startswith("http") else self.url + target)
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = kind(url.netloc, timeout=_WAIT_SECONDS)
        try:
            path = f"{url.path}?{url.query}" if url.query else url.path
            connection.request(method, path, body, dict(headers))
            reply = connection.getresponse()
            found = {key.lower(): value for key, value in reply.getheaders()}
            return Answer(reply.status, found, reply.read())
        finally:
            connection.close()

    def name(self, short: str) -> str:
        return f"{self.prefix}/{short}"

    def path(self, short: str, rest: str = "") -> str:
        return f"/storage/v1/b/{self.bucket}/o/{quote(self.name(short), safe='')}{rest}"

    def upload_path(self) -> str:
        return f"/upload/storage/v1/b/{self.bucket}/o"

    def media(
        self, short: str, data: bytes, *, headers: Mapping[str, str] | None = None, **query: Any
    ) -> Answer:
        query |= {"uploadType": "media", "name": self.name(short)}
        return self.request("POST", self.upload_path(), query=query, headers=headers, body=data)

    def multipart(
        self, short: str, data: bytes, *, metadata: Mapping[str, Any] | None = None, **query: Any
    ) -> Answer:
        said = json.dumps({"name": self.name(short), **(metadata or {})}).encode()
        mark = uuid.uuid4().hex.encode()
        body = b"--%b\r\nContent-Type: application/json\r\n\r\n%b\r\n" % (mark, said)
        body += b"--%b\r\nContent-Type: text/plain\r\n\r\n%b\r\n--%b--\r\n" % (mark, data, mark)
        return self.request(
            "POST",
            self.upload_path(),
            query=query | {"uploadType": "multipart"},
            headers={"Content-Type": f"multipart/related; boundary={mark.decode()}"},
            body=body,
        )

    def start(
        self, short: str, *, metadata: Mapping[str, Any] | None = None, **query: Any
    ) -> Answer:
        """Starts a resumable upload; its URL is the reply's header `location`."""
        query |= {"uploadType": "resumable", "name": self.name(short)}
        said = json.dumps(metadata or {}).encode()
        headers = {"Content-Type": "application/json"}
        return self.request("POST", self.upload_path(), query=query, headers=headers, body=said)

    def chunk(self, url: str, data: bytes, said: str, **headers: str) -> Answer:
        """Sends a chunk; `said` is its Content-Range, such as "0-9/10" or "*/10"."""
        more = {key.replace("_", "-"): value for key, value in headers.items()}
        content_range = {"Content-Range": f"bytes {said}"}
        return self.request("PUT", url, headers=content_range | more, body=data)

    def upload(self, kind: str, short: str, data: bytes, **query: Any) -> Answer:
        """Uploads in the way named: "media", "multipart" or "resumable"."""
        if kind == "media":
            return self.media(short, data, **query)
        if kind == "multipart":
            return self.multipart(short, data, **query)
        started = self.start(short, **query)
        if started.status != 200:
            return started
        last = f"0-{len(data) - 1}" if data else "*"
        return self.chunk(started.headers["location"], data, f"{last}/{len(data)}")

    def put(self, short: str, data: bytes = b"content") -> dict[str, Any]:
        """Stores an object, surely; returns its resource."""
        answer = self.media(short, data)
        assert answer.status == 200, answer
        return answer.json

    def stat(self, short: str, **query: Any) -> Answer:
        return self.request("GET", self.path(short), query=query)

    def read(self, short: str, *, headers: Mapping[str, str] | None = None, **query: Any) -> Answer:
        return self.request(
            "GET", self.path(short), query=query | {"alt": "media"}, headers=headers
        )

    def delete(self, short: str, **query: Any) -> Answer:
        return self.request("DELETE", self.path(short), query=query)

    def send_json(self, method: str, target: str, said: Mapping[str, Any], **query: Any) -> Answer:
        headers = {"Content-Type": "application/json"}
        return self.request(
            method, target, query=query, headers=headers, body=json.dumps(said).encode()
        )

    def compose(
        self, short: str, sources: Sequence[str | Mapping[str, Any]], **query: Any
    ) -> Answer:
        said = [{"name": self.name(s)} if isinstance(s, str) else dict(s) for s in sources]
        return self.send_json(
            "POST", self.path(short, "/compose"), {"sourceObjects": said}, **query
        )

    def copy(self, source: str, short: str, *, verb: str = "rewriteTo", **query: Any) -> Answer:
        place = f"/{verb}/b/{self.bucket}/o/{quote(self.name(short), safe='')}"
        return self.send_json("POST", self.path(source, place), {}, **query)

    def page(self, short: str = "", **query: Any) -> Answer:
        """One page of the listing below the prefix."""
        query = {"prefix": self.name(short)} | query
        return self.request("GET", f"/storage/v1/b/{self.bucket}/o", query=query)

    def names(self, short: str = "", **query: Any) -> list[str]:
        """The names, without the prefix, on all pages of a listing."""
        found: list[str] = []
        while True:
            page = self.page(short, **query)
            assert page.status == 200, page
            found += [item["name"] for item in page.json.get("items", [])]
            if "nextPageToken" not in page.json:
                return [name[len(self.prefix) + 1 :] for name in found]
            query["pageToken"] = page.json["nextPageToken"]

    def batch(self, requests: Sequence[tuple[str, str]]) -> Answer:
        """Sends requests without bodies, each a method and a path, as one."""
        body = "".join(
            f"--part\r\nContent-Type: application/http\r\nContent-ID: <id+{number}>\r\n\r\n"
            f"{method} {path} HTTP/1.1\r\nContent-Length: 0\r\n\r\n\r\n"
            for number, (method, path) in enumerate(requests, 1)
        )
        headers = {"Content-Type": "multipart/mixed; boundary=part"}
        return self.request(
            "POST", "/batch/storage/v1", headers=headers, body=f"{body}--part--\r\n".encode()
        )


def _crc32c(data: bytes) -> str:
    return base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _statuses(answer: Answer) -> list[int]:
    lines = answer.body.decode().splitlines()
    return [int(line.split()[1]) for line in lines if line.startswith("HTTP/1.1 ")]


# Uploads


def every_upload_stores_its_content(here: Endpoint) -> None:
    for kind in _UPLOADS:
        for data in (b"", b"x", b"\r\n--part\r\n\r", bytes(range(256)) * 2000):
            answer = here.upload(kind, kind, data)
            assert answer.status == 200, (kind, answer)
            assert here.read(kind).body == data
            assert answer.json["size"] == str(len(data))
            assert answer.json["crc32c"] == _crc32c(data)
            assert answer.json["md5Hash"] == _md5(data)
            assert answer.json["metageneration"] == "1"
            assert {"etag", "timeCreated", "updated", "storageClass"} <= set(answer.json)


def create_never_replaces(here: Endpoint) -> None:
    for kind in _UPLOADS:
        assert here.upload(kind, kind, b"mine", ifGenerationMatch=0).status == 200
        answer = here.upload(kind, kind, b"theirs", ifGenerationMatch=0)
        assert answer.status == 412, (kind, answer)
        assert answer.json["error"]["errors"][0]["reason"] == "conditionNotMet"
        assert here.read(kind).body == b"mine"


def an_upload_on_a_generation_replaces_that_one_only(here: Endpoint) -> None:
    for kind in _UPLOADS:
        first = here.put(kind, b"first")["generation"]
        second = here.upload(kind, kind, b"second", ifGenerationMatch=first)
        assert second.status == 200
        assert int(second.json["generation"]) > int(first)
        assert here.upload(kind, kind, b"late", ifGenerationMatch=first).status == 412
        now = second.json["generation"]
        assert here.upload(kind, kind, b"late", ifGenerationNotMatch=now).status == 412
        assert here.upload(kind, kind, b"late", ifMetagenerationMatch=9).status == 412
        assert here.upload(kind, kind, b"late", ifMetagenerationNotMatch=1).status == 412
        assert here.upload(kind, f"{kind} new", b"x", ifGenerationMatch=first).status == 412
        assert here.read(kind).body == b"second"
        assert here.stat(f"{kind} new").status == 404


def one_of_many_creators_wins(here: Endpoint) -> None:
    for kind in _UPLOADS:
        barrier = threading.Barrier(8)
        won: list[bytes] = []
        lost: list[int] = []

        def race(
            data: bytes,
            kind: str = kind,
            barrier: threading.Barrier = barrier,
            won: list[bytes] = won,
            lost: list[int] = lost,
        ) -> None:
            barrier.wait()
            answer = here.upload(kind, f"race {kind}", data, ifGenerationMatch=0)
            if answer.status == 200:
                won.append(data)
            else:
                lost.append(answer.status)

        threads = [
            threading.Thread(target=race, args=(f"writer {n}".encode(),), daemon=True)
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1, (kind, won, lost)
        assert lost == [412] * 7
        assert here.read(f"race {kind}").body == won[0]


def a_wrong_checksum_is_refused_and_nothing_is_stored(here: Endpoint) -> None:
    data, other = b"what was meant", b"what came"
    for headers in (
        {"x-goog-hash": f"crc32c={_crc32c(data)}"},
        {"x-goog-hash": f"crc32c={_crc32c(other)},md5={_md5(data)}"},
        {"Content-MD5": _md5(data)},
    ):
        assert here.media("media", other, headers=headers).status == 400, headers
    for metadata in ({"crc32c": _crc32c(data)}, {"md5Hash": _md5(data)}):
        assert here.multipart("multipart", other, metadata=metadata).status == 400, metadata
        url = here.start("resumable", metadata=metadata).headers["location"]
        assert here.chunk(url, other, f"0-{len(other) - 1}/{len(other)}").status == 400
    assert here.names() == []


def a_right_checksum_is_accepted(here: Endpoint) -> None:
    data = b"what was meant"
    hashes = {"x-goog-hash": f"crc32c={_crc32c(data)},md5={_md5(data)}"}
    claims = {"crc32c": _crc32c(data), "md5Hash": _md5(data)}
    assert here.media("media", data, headers=hashes).status == 200
    assert here.multipart("multipart", data, metadata=claims).status == 200
    url = here.start("resumable", metadata=claims).headers["location"]
    assert here.chunk(url, data, f"0-{len(data) - 1}/{len(data)}").status == 200
    assert here.names() == ["media", "multipart", "resumable"]


def a_resumable_upload_tells_how_far_it_is(here: Endpoint) -> None:
    data = bytes(range(256)) * 2048 + b"the end"
    size = len(data)
    url = here.start("big").headers["location"]
    none = here.chunk(url, b"", f"*/{size}")
    assert (none.status, none.headers.get("range")) == (308, None)
    half = here.chunk(url, data[:_CHUNK], f"0-{_CHUNK - 1}/*")
    assert (half.status, half.headers["range"]) == (308, f"bytes=0-{_CHUNK - 1}")
    asked = here.chunk(url, b"", f"*/{size}")
    assert (asked.status, asked.headers["range"]) == (308, f"bytes=0-{_CHUNK - 1}")
    assert here.stat("big").status == 404, "it is not there before it is whole"
    done = here.chunk(url, data[_CHUNK:], f"{_CHUNK}-{size - 1}/{size}")
    assert done.status == 200, done
    assert here.read("big").body == data
    again = here.chunk(url, b"", f"*/{size}")
    assert (again.status, again.json["generation"]) == (200, done.json["generation"])


def a_chunk_sent_again_is_stored_once(here: Endpoint) -> None:
    data = bytes(range(256)) * 2048
    url = here.start("big").headers["location"]
    for _ in range(2):
        assert here.chunk(url, data[:_CHUNK], f"0-{_CHUNK - 1}/{len(data)}").status == 308
    assert here.chunk(url, data, f"0-{len(data) - 1}/{len(data)}").status == 200
    assert here.read("big").body == data


def a_small_chunk_in_the_middle_is_refused(here: Endpoint) -> None:
    url = here.start("big").headers["location"]
    assert here.chunk(url, b"x" * 1000, "0-999/*").status == 400


def a_resumable_upload_checks_its_condition_when_it_finishes(here: Endpoint) -> None:
    url = here.start("late", ifGenerationMatch=0).headers["location"]
    here.put("late", b"somebody was faster")
    assert here.chunk(url, b"too late", "0-7/8").status == 412
    assert here.read("late").body == b"somebody was faster"


def a_cancelled_upload_stores_nothing(here: Endpoint) -> None:
    url = here.start("gone").headers["location"]
    assert here.chunk(url, b"x" * _CHUNK, f"0-{_CHUNK - 1}/*").status == 308
    assert here.request("DELETE", url).status == 499
    assert here.chunk(url, b"end", f"{_CHUNK}-{_CHUNK + 2}/{_CHUNK + 3}").status in (404, 410, 499)
    assert here.stat("gone").status == 404


# Reads


def a_read_tells_generation_and_hashes(here: Endpoint) -> None:
    stored = here.put("object", b"0123456789")
    for path in (here.path("object"), f"/download{here.path('object')}"):
        answer = here.request("GET", path, query={"alt": "media"})
        assert (answer.status, answer.body) == (200, b"0123456789")
        assert answer.headers["x-goog-generation"] == stored["generation"]
        assert answer.headers["x-goog-metageneration"] == "1"
        assert answer.headers["x-goog-stored-content-length"] == "10"
        assert f"crc32c={_crc32c(answer.body)}" in answer.headers["x-goog-hash"]
        assert f"md5={_md5(answer.body)}" in answer.headers["x-goog-hash"]
        assert {"etag", "content-type"} <= set(answer.headers)


def a_range_is_read_exactly(here: Endpoint) -> None:
    here.put("object", b"0123456789")
    for wanted, body, said in (
        ("0-0", b"0", "0-0"),
        ("2-5", b"2345", "2-5"),
        ("7-", b"789", "7-9"),
        ("8-100", b"89", "8-9"),
        ("-3", b"789", "7-9"),
        ("-100", b"0123456789", "0-9"),
    ):
        answer = here.read("object", headers={"Range": f"bytes={wanted}"})
        assert (answer.status, answer.body) == (206, body), wanted
        assert answer.headers["content-range"] == f"bytes {said}/10"


def a_range_past_the_end_is_416(here: Endpoint) -> None:
    here.put("object", b"0123456789")
    here.put("empty", b"")
    for name, wanted in (("object", "10-"), ("object", "10-12"), ("empty", "0-")):
        assert here.read(name, headers={"Range": f"bytes={wanted}"}).status == 416, wanted


def reads_keep_their_conditions(here: Endpoint) -> None:
    first = here.put("object", b"first")["generation"]
    now = here.put("object", b"second")["generation"]
    for ask in (here.read, here.stat):
        assert ask("object", generation=now).status == 200
        assert ask("object", generation=first).status == 404
        assert ask("object", ifGenerationMatch=now, ifMetagenerationMatch=1).status == 200
        assert ask("object", ifGenerationMatch=first).status == 412
        assert ask("object", ifMetagenerationMatch=2).status == 412
        assert ask("object", ifGenerationNotMatch=first).status == 200
        assert ask("object", ifGenerationNotMatch=now).status == 304
        assert ask("object", ifMetagenerationNotMatch=1).status == 304


def what_is_missing_is_404(here: Endpoint) -> None:
    for answer in (
        here.stat("nothing"),
        here.read("nothing"),
        here.delete("nothing"),
        here.compose("result", ["nothing"]),
        here.copy("nothing", "result"),
        here.send_json("PATCH", here.path("nothing"), {"contentType": "text/plain"}),
    ):
        assert answer.status == 404, answer
    elsewhere = replace(here, bucket=f"no-such-bucket-{uuid.uuid4().hex}")
    missing = elsewhere.stat("object")
    assert missing.status == 404
    assert missing.json["error"]["message"] == "The specified bucket does not exist."


def odd_names_are_names(here: Endpoint) -> None:
    odd = ["a b", "a+b", "ä/ß/日本", "#hash", "what?", "100%", "%2F", "a//b", "~'()*!&=;:@,$", "x/"]
    for kind in _UPLOADS:
        for name in odd:
            short = f"{kind}/{name}"
            answer = here.upload(kind, short, name.encode())
            assert (answer.status, answer.json["name"]) == (200, here.name(short)), name
            assert here.read(short).body == name.encode()
    expected = sorted((f"{kind}/{n}" for kind in _UPLOADS for n in odd), key=str.encode)
    assert here.names() == expected
    for short in expected:
        assert here.delete(short).status == 204
    assert here.names() == []


# Listings


def a_listing_shows_writes_and_deletes_at_once(here: Endpoint) -> None:
    for name in ("a", "b", "c"):
        here.put(name)
        assert name in here.names()
        assert here.delete(name).status == 204
        assert name not in here.names()


def a_listing_is_sorted_and_comes_in_pages(here: Endpoint) -> None:
    names = ["1/a", "1/b", "10/c", "2", "2.x", "a/b/c", "z"]
    for name in reversed(names):
        here.put(name)
    for size in (1, 2, 3, 1000):
        assert here.names(maxResults=size) == names
        assert len(here.page(maxResults=size).json["items"]) == min(size, len(names))
    assert here.names("1") == ["1/a", "1/b", "10/c"]
    assert here.names("1/") == ["1/a", "1/b"]
    assert here.names("nothing") == []
    window = {"startOffset": here.name("10/c"), "endOffset": here.name("a/b/c")}
    assert here.names(**window) == ["10/c", "2", "2.x"]


def a_delimiter_gathers_prefixes(here: Endpoint) -> None:
    for name in ("1/a", "1/b", "10/c", "RUN", "z/1/2"):
        here.put(name)
    found: list[str] = []
    query: dict[str, Any] = {"delimiter": "/", "maxResults": 2}
    while True:
        page = here.page(**query).json
        entries = [item["name"] for item in page.get("items", [])] + page.get("prefixes", [])
        assert len(entries) <= 2
        found += entries
        if "nextPageToken" not in page:
            break
        query["pageToken"] = page["nextPageToken"]
    assert sorted(found) == [here.name(entry) for entry in ("1/", "10/", "RUN", "z/")]
    below = here.page("z/", delimiter="/").json
    assert below["prefixes"] == [here.name("z/1/")]
    assert "items" not in below


# Changes


def delete_keeps_its_conditions(here: Endpoint) -> None:
    first = here.put("object", b"first")["generation"]
    now = here.put("object", b"second")["generation"]
    assert here.delete("object", ifGenerationMatch=first).status == 412
    assert here.delete("object", ifGenerationNotMatch=now).status == 412
    assert here.delete("object", ifMetagenerationMatch=2).status == 412
    assert here.delete("object", ifMetagenerationNotMatch=1).status == 412
    assert here.delete("object", generation=first).status == 404
    assert here.read("object").body == b"second"
    assert here.delete("object", ifGenerationMatch=now).status == 204
    assert here.stat("object").status == 404


def patch_changes_metadata_on_its_conditions(here: Endpoint) -> None:
    stored = here.put("object")
    path = here.path("object")
    said = {"contentType": "text/x-one", "metadata": {"a": "1", "b": "2"}}
    changed = here.send_json("PATCH", path, said, ifMetagenerationMatch=1)
    assert changed.status == 200
    assert changed.json["generation"] == stored["generation"]
    assert changed.json["metageneration"] == "2"
    assert here.read("object").headers["content-type"] == "text/x-one"
    for query in (
        {"ifMetagenerationMatch": 1},
        {"ifMetagenerationNotMatch": 2},
        {"ifGenerationMatch": 1},
        {"ifGenerationNotMatch": stored["generation"]},
    ):
        lost = here.send_json("PATCH", path, {"contentType": "text/x-two"}, **query)
        assert lost.status == 412, query
    merged = here.send_json("PATCH", path, {"metadata": {"a": None, "c": "3"}})
    assert merged.json["metadata"] == {"b": "2", "c": "3"}
    assert merged.json["contentType"] == "text/x-one"


def compose_joins_and_has_no_md5(here: Endpoint) -> None:
    generation = here.put("1", b"one ")["generation"]
    here.put("2", b"two")
    answer = here.compose("result", ["1", "2", "1"], ifGenerationMatch=0)
    assert answer.status == 200, answer
    assert here.read("result").body == b"one twoone "
    assert answer.json["crc32c"] == _crc32c(b"one twoone ")
    assert "md5Hash" not in answer.json
    assert answer.json["componentCount"] == 3
    assert here.compose("result", ["1"], ifGenerationMatch=0).status == 412
    good = {"ifGenerationMatch": generation}
    for condition, status in ((good, 200), ({"ifGenerationMatch": "1"}, 412)):
        source = {"name": here.name("1"), "objectPreconditions": condition}
        assert here.compose("other", [source]).status == status, condition
    assert here.compose("result", ["1"] * 33).status == 400


def copies_keep_content_and_conditions(here: Endpoint) -> None:
    source = here.put("source")["generation"]
    there = here.put("there", b"stays")["generation"]
    for verb in ("rewriteTo", "copyTo"):
        answer = here.copy("source", verb, verb=verb, ifGenerationMatch=0)
        assert answer.status == 200, answer
        resource = answer.json["resource"] if verb == "rewriteTo" else answer.json
        assert resource["crc32c"] == _crc32c(b"content")
        assert verb != "rewriteTo" or answer.json["done"] is True
        assert here.read(verb).body == b"content"
        for query in (
            {"ifGenerationMatch": 0},
            {"ifGenerationMatch": 1},
            {"ifGenerationNotMatch": there},
            {"ifMetagenerationMatch": 2},
            {"ifSourceGenerationMatch": 1},
            {"ifSourceGenerationNotMatch": source},
            {"ifSourceMetagenerationMatch": 2},
            {"ifSourceMetagenerationNotMatch": 1},
        ):
            assert here.copy("source", "there", verb=verb, **query).status == 412, query
        assert here.copy("source", "there", verb=verb, sourceGeneration=1).status == 404
        assert here.read("there").body == b"stays"


def a_batch_does_each_of_its_parts(here: Endpoint) -> None:
    old = here.put("changed", b"first")["generation"]
    here.put("changed", b"second")
    for name in ("1", "2 ä"):
        here.put(name)
    answer = here.batch(
        [
            ("DELETE", here.path("1")),
            ("DELETE", here.path("missing")),
            ("DELETE", here.path("changed") + f"?ifGenerationMatch={old}"),
            ("DELETE", here.path("2 ä")),
            ("GET", here.path("changed")),
        ]
    )
    assert answer.status == 200
    assert _statuses(answer) == [204, 404, 412, 204, 200]
    assert here.names() == ["changed"]


GCS_CHECKS: tuple[Callable[[Endpoint], None], ...] = (
    every_upload_stores_its_content,
    create_never_replaces,
    an_upload_on_a_generation_replaces_that_one_only,
    one_of_many_creators_wins,
    a_wrong_checksum_is_refused_and_nothing_is_stored,
    a_right_checksum_is_accepted,
    a_resumable_upload_tells_how_far_it_is,
    a_chunk_sent_again_is_stored_once,
    a_small_chunk_in_the_middle_is_refused,
    a_resumable_upload_checks_its_condition_when_it_finishes,
    a_cancelled_upload_stores_nothing,
    a_read_tells_generation_and_hashes,
    a_range_is_read_exactly,
    a_range_past_the_end_is_416,
    reads_keep_their_conditions,
    what_is_missing_is_404,
    odd_names_are_names,
    a_listing_shows_writes_and_deletes_at_once,
    a_listing_is_sorted_and_comes_in_pages,
    a_delimiter_gathers_prefixes,
    delete_keeps_its_conditions,
    patch_changes_metadata_on_its_conditions,
    compose_joins_and_has_no_md5,
    copies_keep_content_and_conditions,
    a_batch_does_each_of_its_parts,
)


def run_gcs_check(check: Callable[[Endpoint], None], endpoint: Endpoint) -> None:
    """Runs one check below a new prefix, and deletes what it leaves there."""
    here = replace(endpoint, prefix=f"{endpoint.prefix}/{check.__name__}-{uuid.uuid4().hex[:8]}")
    try:
        check(here)
    finally:
        for name in here.names():
            here.delete(name)


def check_gcs(endpoint: Endpoint) -> list[str]:
    """Runs all checks, and returns their names; the first that fails raises."""
    for check in GCS_CHECKS:
        run_gcs_check(check, endpoint)
    return [check.__name__ for check in GCS_CHECKS]
