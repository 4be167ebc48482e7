"""The storage port over a bucket of Google Cloud Storage (`gs://bucket/prefix`), through gcsfs.

gcsfs gives credentials, sessions and the first round of retries; the requests are our own, because
these need what gcsfs has no call for: checksums that travel with each upload and are checked on
each download, conditions on generations, listings that nobody caches, and deletion in batches.

A reply can be lost after the request was done. So nothing here believes that a refused condition
means another writer: the object is read back, and `data` carries a nonce where that matters.
"""

from __future__ import annotations

import base64
import binascii
import concurrent.futures
import contextlib
import email.utils
import errno
import functools
import json
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

from datarax_dist import format as fmt
from datarax_dist.errors import CheckpointError, StorageError, cause, describe, printable
from datarax_dist.storage import Entry

__all__ = ["BucketStore", "advice", "bucket_and_prefix", "connecting"]

_DEADLINE_SECONDS = 120.0  # for one operation, retries and all; more for large contents
_SLOWEST_BYTES_PER_SECOND = 2 << 20
_CONNECT_SECONDS = 10.0
_STALL_SECONDS = 15.0  # without a byte: the request is made again
_DAMAGED_TRIES = 3  # what is damaged as often is damaged in the bucket
_FIRST_PAUSE_SECONDS = 0.5
_BATCH = 100  # the most that one batch request may delete
_PARALLEL = 16
_CHUNK_BYTES = 32 << 20
_RETRY_STATUS = {408, 429, 500, 502, 503, 504}
_RETRIED = {str(status) for status in _RETRY_STATUS}
_NO_ANSWER = (
    "The bucket did not answer as it should, though it was asked several times. Check the network,"
    " and the state of the service; then try again."
)
_FIELDS = "items(name,size,crc32c,md5Hash,generation),prefixes,nextPageToken"
_PERMISSION = re.compile(r"storage\.[a-zA-Z]+\.[a-zA-Z]+")
_Result = TypeVar("_Result")


def bucket_and_prefix(root: str) -> tuple[str, str]:
    """Returns the bucket and the prefix of `gs://bucket/prefix`."""
    bucket, _, prefix = root.removeprefix("gs://").partition("/")
    return bucket, prefix


def advice(error: BaseException, bucket: str) -> tuple[int, str] | None:
    """Returns an error number for what went wrong with a bucket, and what to do about it; None when
    that cannot be told. Knows the errors of gcsfs, aiohttp, google-auth and TensorStore.
    """
    text, code = str(error), str(getattr(error, "code", ""))
    if "Forbidden" in text or "PERMISSION_DENIED" in text or code == "403":
        return errno.EACCES, _permission_hint(text, bucket)
    kind = type(error).__module__.partition(".")[0]
    if code == "401" or kind == "google" or "UNAUTHENTICATED" in text:
        return errno.EACCES, (
            "Its credentials are missing, or not valid any more: run `gcloud auth"
            " application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS."
        )
    late = re.search(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED)\b", text)
    away = kind in ("aiohttp", "requests", "urllib3") or isinstance(error, TimeoutError)
    if late or away or code in _RETRIED:
        return errno.ETIMEDOUT, _NO_ANSWER
    return None


@contextlib.contextmanager
def connecting(root: str) -> Iterator[None]:
    """Makes what goes wrong while a client reads its credentials one error of ours. What gcsfs
    raises there may tell them: a raw token is sent in the query of a URL.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        number, hint = advice(error, bucket_and_prefix(root)[0]) or (
            errno.EACCES,
            "Its credentials cannot be used as they are: look at FSSPEC_GCS and"
            " GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`.",
        )
        raise StorageError(
            f"Could not connect to {root}: {describe(error, 800)}. {hint}", errno=number
        ) from cause(error)


def _permission_hint(text: str, bucket: str) -> str:
    found = _PERMISSION.search(text)
    if found and found[0].startswith("storage.buckets."):
        role = "roles/storage.bucketViewer (or one with this permission)"
    else:
        role = "roles/storage.objectUser, which has all that a run needs,"
    what = f"the permission {found[0]}" if found else "a permission"
    return (
        f"The credentials of this process lack {what} on gs://{bucket}. Grant {role} to its"
        " account; `datarax-dist doctor --write` on this root tells what else is missing."
    )


class _Damaged(Exception):
    """A reply that is not what the bucket sent."""


class BucketStore:
    """A prefix of a bucket. Reads, writes and listings are strongly consistent, as Google Cloud
    Storage promises; `datarax-dist doctor --write` tests it.
    """

    digest_kind = "md5"

    def __init__(self, root: str) -> None:
        self._root = root
        self.bucket, self._prefix = bucket_and_prefix(root)

    @property
    def root(self) -> str:
        return self._root

    @functools.cached_property
    def _fs(self) -> Any:
        import aiohttp
        from gcsfs.core import GCSFileSystem  # not the one that asks for each bucket's type first

        with connecting(self._root):  # not all of its errors are of the request it is made for
            return GCSFileSystem(
                use_listings_cache=False,
                requests_timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=_CONNECT_SECONDS, sock_read=_STALL_SECONDS
                ),
            )

    def _name(self, key: str) -> str:
        return "/".join(part for part in (self._prefix, key) if part)

    # Requests

    def _request(
        self,
        method: str,
        path: str,
        *args: str,
        size: int = 0,
        read: Callable[[Mapping[str, Any], bytes], _Result],
        **more: Any,
    ) -> _Result:
        """Makes one request, again while that may help, and reads its reply with `read`."""
        end = time.monotonic() + _DEADLINE_SECONDS + size / _SLOWEST_BYTES_PER_SECOND
        pause, damaged = _FIRST_PAUSE_SECONDS, 0
        while True:
            try:
                left = max(0.1, end - time.monotonic())
                headers, content = self._fs.call(method, path, *args, timeout=left, **more)
                return read(headers, content)
            except Exception as error:
                # gcsfs has tried the other kinds again already.
                if isinstance(error, _Damaged) or "doesn't match calculated" in str(error):
                    damaged += 1
                    if damaged == _DAMAGED_TRIES:
                        raise
                elif not isinstance(error, TimeoutError):
                    raise
                if time.monotonic() + pause > end:
                    raise TimeoutError(
                        errno.ETIMEDOUT, f"no whole answer in {_DEADLINE_SECONDS:.0f} s: {error}"
                    ) from error
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, 8.0)

    @contextlib.contextmanager
    def _errors(self, action: str, key: str) -> Iterator[None]:
        """Makes the many kinds of errors of gcsfs, aiohttp and google-auth one. A `KeyError` of
        theirs does not say that an object is missing.
        """
        where = printable(f"{self._root}/{key}".rstrip("/"))
        try:
            yield
        except (CheckpointError, FileNotFoundError, FileExistsError):
            raise
        except fmt.InvalidRecordError:
            raise
        except Exception as error:
            number, hint = self._advice(error)
            raise StorageError(
                f"Could not {action} {where}: {describe(error, 800)}. {hint}", errno=number
            ) from cause(error)

    @contextlib.contextmanager
    def _missing(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise KeyError(key) from error

    def _advice(self, error: Exception) -> tuple[int, str]:
        if isinstance(error, _Damaged):
            return errno.EIO, "It was so each time it was asked for: it is damaged in the bucket."
        if (known := advice(error, self.bucket)) is not None:
            return known
        if str(getattr(error, "code", "")) in ("400", "412") or isinstance(error, ValueError):
            return errno.EPERM, "The bucket refused the request as it is."
        return errno.ETIMEDOUT, _NO_ANSWER

    def _no_bucket(self, error: Exception) -> StorageError:
        return StorageError(
            f"There is no bucket gs://{self.bucket}. Check its name, or make it: gcloud storage"
            f" buckets create gs://{self.bucket} --location=...",
            errno=errno.ENXIO,
        )

    # The port

    def get(self, key: str) -> bytes:
        return self._get(key)[0]

    def _get(self, key: str) -> tuple[bytes, str]:
        """Returns the content of an object, checked, and its generation. One byte more than it may
        have is asked for, and no more comes.
        """
        limit = fmt.most_bytes(key)

        def read(headers: Mapping[str, Any], content: bytes) -> tuple[bytes, str, bool]:
            if len(content) > limit:
                raise fmt.too_large(key, headers.get("Content-Range", "").rpartition("/")[2])
            # It is that of the whole object, for a range too; and the range is the whole object.
            wanted = _hashes(headers).get("crc32c")
            if wanted is not None and wanted != fmt.crc32c(content).to_bytes(4, "big"):
                raise _Damaged(f"{key} was changed on its way here (checksum)")
            return content, str(headers.get("X-Goog-Generation", "")), wanted is not None

        content, generation, is_checked = b"", "", False
        for headers in ({"Range": f"bytes=0-{limit}"}, {}):
            with self._missing(key), self._errors("read", key):
                try:
                    content, generation, is_checked = self._request(
                        *("GET", "b/{}/o/{}", self.bucket, self._name(key)),
                        alt="media",
                        headers=headers,
                        read=read,
                    )
                except Exception as error:
                    if str(getattr(error, "code", "")) != "416":  # there is no first byte
                        raise
                    is_checked = True
            if is_checked:  # else a proxy has taken away the checksum of what it calls a part
                break
        return content, generation

    def put(self, key: str, data: bytes) -> None:
        self._upload(key, data)

    def create(self, key: str, data: bytes) -> bool:
        try:
            self._upload(key, data, ifGenerationMatch="0")
        except FileExistsError:
            return self._holds(key, data)
        return True

    def replace(self, key: str, expected: bytes, data: bytes, *, seen: Entry | None = None) -> bool:
        """See `SupportsReplace`."""
        try:
            content, generation = self._get(key)
        except KeyError:
            return False
        if content != expected:
            return content == data
        generation = generation if seen is None else seen.generation
        try:
            self._upload(key, data, ifGenerationMatch=generation)
        except FileExistsError:
            return self._holds(key, data)
        return True

    def _holds(self, key: str, data: bytes) -> bool:
        try:
            return self.get(key) == data
        except KeyError:
            return False

    def _upload(
        self, key: str, data: bytes, *, claimed: bytes | None = None, **condition: str
    ) -> None:
        """Args:
        claimed: what the checksum is of, that the bucket is told to compare.
        """
        told = data if claimed is None else claimed
        crc = base64.b64encode(fmt.crc32c(told).to_bytes(4, "big")).decode()
        described = json.dumps({"name": self._name(key), "crc32c": crc})
        boundary = f"part-{random.getrandbits(96):024x}"
        body = b"".join(
            [
                f"--{boundary}\r\nContent-Type: application/json\r\n\r\n{described}\r\n".encode(),
                f"--{boundary}\r\nContent-Type: application/octet-stream\r\n\r\n".encode(),
                data,
                f"\r\n--{boundary}--\r\n".encode(),
            ]
        )
        with self._errors("write", key):
            try:
                self._request(
                    "POST",
                    f"{self._location}/upload/storage/v1/b/{quote(self.bucket, safe='')}/o",
                    uploadType="multipart",
                    headers={"Content-Type": f"multipart/related; boundary={boundary}"},
                    data=_body(body),
                    size=len(data),
                    read=lambda headers, content: None,  # the bucket has compared the checksum
                    **condition,
                )
            except FileNotFoundError as error:
                raise self._no_bucket(error) from error

    @property
    def _location(self) -> str:
        return str(self._fs.base).removesuffix("/storage/v1/")

    def children(self, prefix: str) -> list[str]:
        start = f"{self._name(prefix)}/" if self._name(prefix) else ""
        found: set[str] = set()
        for page in self._pages(prefix, start, delimiter="/"):
            names = [item["name"] for item in page.get("items", ())]
            found.update(name.removeprefix(start) for name in [*names, *page.get("prefixes", ())])
        return sorted(found - {""})

    def list(self, prefix: str) -> list[Entry]:
        return sorted(
            (entry for entry in self._entries(prefix) if not entry.key.endswith("/")),
            key=lambda entry: entry.key,
        )

    def _entries(self, prefix: str) -> Sequence[Entry]:
        """Returns every object below a prefix, placeholders of directories too, or the one of that
        name.
        """
        name = self._name(prefix)
        found = [self._entry(item) for item in self._items(prefix, f"{name}/" if name else "")]
        if not found and prefix:
            found = [self._entry(i) for i in self._items(prefix, name) if i["name"] == name]
        return found

    def _items(self, prefix: str, start: str) -> Iterator[Mapping[str, Any]]:
        for page in self._pages(prefix, start):
            yield from page.get("items", ())

    def _entry(self, item: Mapping[str, Any]) -> Entry:
        key = str(item["name"])
        if self._prefix:
            key = key.removeprefix(f"{self._prefix}/")
        digest = ""
        if "md5Hash" in item and "crc32c" in item:  # composed objects have no md5
            crc, md5 = (base64.b64decode(item[field]) for field in ("crc32c", "md5Hash"))
            digest = f"{crc.hex()}-{md5.hex()}"
        return Entry(key, int(item.get("size", 0)), digest, str(item.get("generation", "")))

    def _pages(
        self, prefix: str, start: str, delimiter: str | None = None
    ) -> Iterator[Mapping[str, Any]]:
        token: str | None = None

        def read(headers: Mapping[str, Any], content: bytes) -> Mapping[str, Any]:
            try:
                page = json.loads(content)
                for item in page.get("items", ()):
                    self._entry(item)
            except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
                raise _Damaged(f"a listing that cannot be read: {error}") from error
            return dict(page)

        while True:
            with self._errors("list", prefix):
                try:
                    page = self._request(
                        "GET",
                        "b/{}/o",
                        self.bucket,
                        prefix=start or None,
                        maxResults="1000",
                        pageToken=token,
                        fields=_FIELDS,
                        delimiter=delimiter,
                        read=read,
                    )
                except FileNotFoundError as error:
                    raise self._no_bucket(error) from error
            yield page
            token = page.get("nextPageToken")
            if not token:
                return

    def digest(
        self, key: str, expected_size: int | None = None, *, like: str = ""
    ) -> tuple[int, str]:
        found = [entry for entry in self._entries(key) if entry.key == key]
        if not found:
            raise KeyError(key)
        size = found[0].size
        if expected_size is not None and size != expected_size:
            return size, ""
        digester = fmt.Digester(like or self.digest_kind)
        for start in range(0, size, _CHUNK_BYTES):
            wanted = min(_CHUNK_BYTES, size - start)

            def read(headers: Mapping[str, Any], content: bytes, wanted: int = wanted) -> bytes:
                if len(content) != wanted:
                    raise _Damaged(f"{len(content)} bytes of {key} instead of {wanted}")
                return content

            with self._missing(key), self._errors("read", key):
                digester.update(
                    self._request(
                        "GET",
                        "b/{}/o/{}",
                        self.bucket,
                        self._name(key),
                        alt="media",
                        headers={"Range": f"bytes={start}-{start + wanted - 1}"},
                        size=wanted,
                        read=read,
                    )
                )
        return size, digester.text()

    def delete(self, prefix: str, *, last: str | None = None) -> None:
        entries = self._entries(prefix)
        final = [e for e in entries if last is not None and e.key == f"{prefix}/{last}"]
        self._delete_all([(entry.key, "") for entry in entries if entry not in final])
        self._delete_all([(entry.key, "") for entry in final])

    def delete_listed(self, entries: Sequence[Entry]) -> None:
        self._delete_all([(entry.key, entry.generation) for entry in entries])

    def _delete_all(self, keys: Sequence[tuple[str, str]]) -> None:
        chunks = [keys[i : i + _BATCH] for i in range(0, len(keys), _BATCH)]
        with concurrent.futures.ThreadPoolExecutor(_PARALLEL) as pool:
            list(pool.map(self._delete_keys, chunks))

    def _delete_keys(self, keys: Sequence[tuple[str, str]]) -> None:
        """Deletes up to a hundred objects, each of a generation or of any, in one request."""
        pause = _FIRST_PAUSE_SECONDS
        for _ in range(6):
            with self._errors("delete", keys[0][0] if len(keys) == 1 else "..."):
                keys = self._delete_batch(keys)
            if not keys:
                return
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause *= 2
        raise StorageError(
            f"Could not delete {self._root}/{keys[0][0]} and {len(keys) - 1} others: the bucket has"
            " refused it several times (too many requests, or an error of its own). It is tried"
            " again with the next save.",
            errno=errno.EAGAIN,
        )

    def _delete_batch(self, keys: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
        """Returns the keys that are to be deleted again."""
        bucket, boundary = quote(self.bucket, safe=""), f"batch-{random.getrandbits(96):024x}"
        body = "".join(
            f"--{boundary}\r\nContent-Type: application/http\r\nContent-ID: <{number}>\r\n\r\n"
            f"DELETE /storage/v1/b/{bucket}/o/{quote(self._name(key), safe='')}"
            f"{f'?ifGenerationMatch={generation}' if generation else ''} HTTP/1.1\r\n\r\n\r\n"
            for number, (key, generation) in enumerate(keys)
        )

        def read(headers: Mapping[str, Any], content: bytes) -> Sequence[tuple[str, str]]:
            parts = re.split(rb"HTTP/1\.[01] (?=[0-9]{3})", content)[1:]
            if len(parts) != len(keys):
                raise _Damaged(f"{len(parts)} answers to {len(keys)} requests")
            again = []
            for key, part in zip(keys, parts, strict=True):
                status = int(part[:3])
                if status in _RETRY_STATUS:
                    again.append(key)
                elif status >= 300 and status not in (404, 412):
                    text = part.decode(errors="replace")
                    told = re.search(r'"message": *"([^"]*)"', text)
                    kind = "Forbidden" if status == 403 else f"HTTP {status}"
                    raise OSError(f"{kind}: {key[0]}: {told[1] if told else text[:300]}")
            return again

        return self._request(
            "POST",
            f"{self._location}/batch/storage/v1",
            headers={"Content-Type": f"multipart/mixed; boundary={boundary}"},
            data=_body(f"{body}--{boundary}--\r\n".encode()),
            read=read,
        )

    def copy(self, source: str, destination: str, names: Sequence[str]) -> None:
        pairs = [(f"{source}/{name}", f"{destination}/{name}") for name in names]
        with concurrent.futures.ThreadPoolExecutor(_PARALLEL) as pool:
            list(pool.map(self._copy_one, pairs))

    def _copy_one(self, pair: tuple[str, str]) -> None:
        source, destination = (self._name(key) for key in pair)
        token: str | None = None
        while True:  # a large object is copied in several calls

            def read(headers: Mapping[str, Any], content: bytes) -> Mapping[str, Any]:
                try:
                    reply = json.loads(content)
                    return {"done": reply["done"], "token": reply.get("rewriteToken")}
                except (ValueError, KeyError, TypeError) as error:
                    raise _Damaged(f"an answer that cannot be read: {error}") from error

            with self._missing(pair[0]), self._errors("copy", pair[0]):
                try:
                    reply = self._request(
                        "POST",
                        "b/{}/o/{}/rewriteTo/b/{}/o/{}",
                        *(self.bucket, source, self.bucket, destination),
                        rewriteToken=token,
                        ifGenerationMatch="0",
                        read=read,
                    )
                except FileExistsError:  # ours, and the reply was lost; or another writer's
                    return
            if reply["done"]:
                return
            token = reply["token"]

    def sync(self, prefix: str, keys: Iterable[str]) -> None:
        """Nothing to do: what a bucket has acknowledged is durable."""

    # What `datarax-dist doctor` asks

    def settings(self) -> Mapping[str, Any]:
        """Returns the settings of the bucket, by the names of the JSON API.

        Raises:
            StorageError: there is no such bucket, or `storage.buckets.get` is missing.
        """
        return self._ask("b/{}")

    def granted(self, permissions: Sequence[str]) -> set[str]:
        """Returns which of these permissions this process has on the bucket."""
        reply = self._ask("b/{}/iam/testPermissions", permissions=list(permissions))
        return {str(name) for name in reply.get("permissions", ())}

    def _ask(self, path: str, **more: Any) -> Mapping[str, Any]:
        def read(headers: Mapping[str, Any], content: bytes) -> Mapping[str, Any]:
            try:
                return dict(json.loads(content))
            except (ValueError, TypeError) as error:
                raise _Damaged(f"an answer that cannot be read: {error}") from error

        with self._errors("ask about", ""):
            try:
                return self._request("GET", path, self.bucket, read=read, **more)
            except FileNotFoundError as error:
                raise self._no_bucket(error) from error

    def seconds_ahead(self) -> float:
        """Returns how far the bucket's clock is ahead of this host's; to about a second."""

        def read(headers: Mapping[str, Any], content: bytes) -> float:
            told = email.utils.parsedate_to_datetime(str(headers["Date"])).timestamp() + 0.5
            return told - time.time()

        with self._errors("ask about", ""):
            return self._request("GET", "b/{}/o", self.bucket, maxResults="1", read=read)

    def refuses_wrong_checksums(self, key: str) -> bool:
        """Whether an upload that does not fit its checksum leaves nothing behind."""
        with contextlib.suppress(StorageError):
            self._upload(key, b"what came", claimed=b"what was meant")
        return not self.list(key)


def _body(data: bytes) -> Any:
    """Returns what to send, so that a large one does not hold up other requests, and can be sent
    again.
    """
    from gcsfs.core import UnclosableBytesIO

    return UnclosableBytesIO(data)


def _hashes(headers: Mapping[str, Any]) -> dict[str, bytes]:
    """Returns the checksums that a reply carries: name -> bytes."""
    lines = headers.getall("X-Goog-Hash", []) if hasattr(headers, "getall") else []
    found = {}
    for part in ",".join(lines).split(","):
        name, separator, value = part.strip().partition("=")
        if separator:
            with contextlib.suppress(binascii.Error):
                found[name] = base64.b64decode(value)
    return found
