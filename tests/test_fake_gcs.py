"""A fake Google Cloud Storage: it keeps what the real one promises, and fails as it is told."""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from datarax_dist.testing.fake_gcs import FAULT_MODES, FakeGCS, Request
from datarax_dist.testing.gcs_conformance import (
    GCS_CHECKS,
    Endpoint,
    check_gcs,
    run_gcs_check,
)

BUCKET = "bucket"
REAL = os.environ.get("DATARAX_DIST_TEST_BUCKET", "")
UPLOAD = f"/upload/storage/v1/b/{BUCKET}/o"


@pytest.fixture
def gcs() -> Iterator[FakeGCS]:
    with FakeGCS(buckets=(BUCKET,)) as server:
        yield server


@pytest.fixture
def here(gcs: FakeGCS) -> Endpoint:
    return Endpoint(gcs.url, BUCKET, "p")


def real_endpoint() -> Endpoint:
    import google.auth
    import google.auth.transport.requests

    scope = "https://www.googleapis.com/auth/devstorage.read_write"
    credentials, _ = google.auth.default(scopes=[scope])
    credentials.refresh(google.auth.transport.requests.Request())
    bucket, _, prefix = REAL.removeprefix("gs://").partition("/")
    prefix = prefix.strip("/") or "conformance"
    return Endpoint("https://storage.googleapis.com", bucket, prefix, credentials.token)


# What a real bucket keeps as well


@pytest.mark.parametrize("bucket", ["fake", "real"] if REAL else ["fake"])
@pytest.mark.parametrize("check", GCS_CHECKS, ids=lambda check: check.__name__)
def test_a_bucket_keeps(check, bucket, request):
    endpoint = real_endpoint() if bucket == "real" else request.getfixturevalue("here")
    run_gcs_check(check, endpoint)


def test_the_suite_tells_what_it_checked_and_leaves_nothing(gcs, here):
    assert check_gcs(here) == [check.__name__ for check in GCS_CHECKS]
    assert gcs.objects(BUCKET) == {}


def test_the_suite_finds_a_bucket_that_corrupts(gcs, here):
    gcs.fail("corrupted", kind="read", times=None)
    with pytest.raises(AssertionError):
        run_gcs_check(GCS_CHECKS[0], here)


# Real clients


def run_client(gcs: FakeGCS, script: str) -> str:
    environment = os.environ | gcs.environment()
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_gcsfs_works(gcs):
    run_client(
        gcs,
        """
import fsspec
fs = fsspec.filesystem("gs")
fs.pipe_file("bucket/run/marker", b"mine", mode="create")
try:
    fs.pipe_file("bucket/run/marker", b"theirs", mode="create")
except FileExistsError:
    pass
else:
    raise AssertionError("the second creator won")
assert fs.cat("bucket/run/marker") == b"mine"
big = bytes(range(256)) * 4096
fs.pipe_file("bucket/run/1/big", big, chunksize=2**18)
with fs.open("bucket/run/1/streamed", "wb", block_size=2**18) as file:
    file.write(big)
assert fs.cat_file("bucket/run/1/big", start=10, end=20) == big[10:20]
assert fs.cat("bucket/run/1/streamed") == big
fs.pipe({f"bucket/run/2/{n}": b"x" * n for n in range(5)})
assert [path for path in fs.find("bucket/run/2")] == [f"bucket/run/2/{n}" for n in range(5)]
assert sorted(fs.ls("bucket/run", detail=False)) == [
    "bucket/run/1", "bucket/run/2", "bucket/run/marker"]
assert fs.info("bucket/run/2/4")["size"] == 4
fs.cp("bucket/run/1/big", "bucket/run/3 odd #?%/copy")
assert fs.cat("bucket/run/3 odd #?%/copy") == big
assert not fs.exists("bucket/run/4")
fs.rm("bucket/run/2", recursive=True)
assert fs.find("bucket/run/2") == []
""",
    )
    kinds = {request.kind for request in gcs.requests}
    assert {"insert", "start", "chunk", "read", "list", "stat", "copy", "delete"} <= kinds
    marker = [r for r in gcs.requests if r.name == "run/marker" and r.kind == "insert"]
    assert [(r.status, r.condition) for r in marker] == [(200, 0), (412, 0)]
    assert "run/3 odd #?%/copy" in gcs.objects(BUCKET)


def test_google_cloud_storage_works(gcs):
    run_client(
        gcs,
        """
from google.api_core.exceptions import PreconditionFailed
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
client = storage.Client(project="p", credentials=AnonymousCredentials())
bucket = client.get_bucket("bucket")
blob = bucket.blob("run/a b")
blob.upload_from_string(b"mine", if_generation_match=0)
try:
    bucket.blob("run/a b").upload_from_string(b"theirs", if_generation_match=0)
except PreconditionFailed:
    pass
else:
    raise AssertionError("the second creator won")
assert bucket.blob("run/a b").download_as_bytes() == b"mine"
big = bytes(range(256)) * 4096
slow = bucket.blob("run/big", chunk_size=2**18)
slow.upload_from_string(big)
assert bucket.blob("run/big").download_as_bytes(start=5, end=9) == big[5:10]
assert [b.name for b in client.list_blobs("bucket", prefix="run/", page_size=1)] == [
    "run/a b", "run/big"]
joined = bucket.blob("run/joined")
joined.compose([blob, slow, blob], if_generation_match=0)
assert joined.md5_hash is None
assert joined.download_as_bytes() == b"mine" + big + b"mine"
moved = bucket.blob("run/moved")
token, done, total = moved.rewrite(slow)
assert (token, done, total) == (None, len(big), len(big))
blob.metadata = {"key": "value"}
blob.patch()
assert bucket.get_blob("run/a b").metadata == {"key": "value"}
assert bucket.get_blob("nothing") is None
moved.delete()
with client.batch():
    bucket.blob("run/joined").delete()
    bucket.blob("run/big").delete()
assert [b.name for b in client.list_blobs("bucket")] == ["run/a b"]
assert bucket.test_iam_permissions(["storage.objects.get"]) == ["storage.objects.get"]
assert client.bucket("bucket").exists() and not client.bucket("other").exists()
""",
    )
    [batch] = [request for request in gcs.requests if request.kind == "batch"]
    assert (batch.status, batch.parts, batch.name) == (200, 2, "")
    assert {"compose", "copy", "patch", "permissions", "bucket"} <= {r.kind for r in gcs.requests}
    assert all("gcloud-python" in request.client for request in gcs.requests)


def test_tensorstore_works(gcs):
    run_client(
        gcs,
        """
import tensorstore as ts
kv = ts.KvStore.open({"driver": "gcs", "bucket": "bucket", "path": "kv/"}).result()
stamp = kv.write("a", b"first").result()
assert kv.read("a").result().value == b"first"
again = kv.write("a", b"second", if_equal=stamp.generation).result()
late = kv.write("a", b"late", if_equal=stamp.generation).result()
assert again.generation != stamp.generation
assert late.generation not in (stamp.generation, again.generation)
assert kv.read("a").result().value == b"second"
assert kv.read("b").result().state == "missing"
big = bytes(range(256)) * 8192
kv.write("dir/ü #1", big).result()
assert kv.read("dir/ü #1").result().value == big
assert sorted(kv.list().result()) == [b"a", "dir/ü #1".encode()]
kv.delete_range(ts.KvStore.KeyRange("dir/", "dir0")).result()
assert kv.list().result() == [b"a"]
""",
    )
    assert list(gcs.objects(BUCKET)) == ["kv/a"]


def test_two_ocdbt_writers_lose_no_key(gcs):
    run_client(
        gcs,
        """
import threading
import tensorstore as ts
spec = {"driver": "ocdbt", "base": "gs://bucket/store/"}
barrier = threading.Barrier(2)
failures = []
def write(writer):
    try:
        kv = ts.KvStore.open(spec, context=ts.Context()).result()
        barrier.wait()
        for n in range(20):
            kv.write(f"{writer}/{n}", str(n).encode()).result()
    except BaseException as error:
        failures.append(error)
threads = [threading.Thread(target=write, args=(writer,)) for writer in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failures, failures
kv = ts.KvStore.open(spec, context=ts.Context()).result()
assert len(kv.list().result()) == 40
for writer in range(2):
    for n in range(20):
        assert kv.read(f"{writer}/{n}").result().value == str(n).encode()
""",
    )


# Faults on the wire


def test_an_error_applies_nothing(gcs, here):
    for status in (503, 429, 500, 408):
        fault = gcs.fail("error", kind="insert", status=status)
        # _send, because a 429 would be tried again
        target = f"{here.upload_path()}?uploadType=media&name=p/x"
        answer = here._send("POST", target, {}, b"data")
        assert answer.status == answer.json["error"]["code"] == status
        assert fault.hits == 1
        assert gcs.objects(BUCKET) == {}
        assert (gcs.requests[-1].fault, gcs.requests[-1].status) == ("error", status)


def test_a_dropped_request_applies_nothing(gcs, here):
    gcs.fail("drop")
    with pytest.raises(http.client.RemoteDisconnected):
        here.media("x", b"data")
    assert gcs.objects(BUCKET) == {}
    assert (gcs.requests[-1].fault, gcs.requests[-1].status) == ("drop", 0)
    assert here.media("x", b"data").status == 200


@pytest.mark.parametrize("kind", ["media", "multipart", "resumable"])
def test_a_lost_reply_leaves_the_object_there(gcs, here, kind):
    gcs.fail("applied_then_dropped", kind={"insert", "chunk"})
    with pytest.raises(http.client.RemoteDisconnected):
        here.upload(kind, "x", b"data", ifGenerationMatch=0)
    assert gcs.objects(BUCKET)["p/x"].content == b"data"
    assert here.upload(kind, "x", b"data", ifGenerationMatch=0).status == 412


def test_a_resumable_upload_survives_a_lost_reply(gcs, here):
    url = here.start("x").headers["location"]
    gcs.fail("applied_then_dropped", kind="chunk")
    with pytest.raises(http.client.RemoteDisconnected):
        here.chunk(url, b"data", "0-3/4")
    answer = here.chunk(url, b"", "*/4")
    assert (answer.status, answer.json["size"]) == (200, "4")


def test_an_error_after_it_was_applied(gcs, here):
    here.put("x")
    gcs.fail("applied_then_error", kind="delete")
    assert here.delete("x").status == 503
    assert gcs.objects(BUCKET) == {}


def test_a_truncated_read_tells_the_whole_length(gcs, here):
    here.put("x", b"0123456789")
    gcs.fail("truncated", kind="read")
    with pytest.raises(http.client.IncompleteRead) as caught:
        here.read("x")
    assert (caught.value.partial, caught.value.expected) == (b"01234", 5)
    assert gcs.requests[-1].received == 5


def test_a_truncated_upload_was_applied(gcs, here):
    gcs.fail("truncated", kind="insert")
    with pytest.raises(http.client.IncompleteRead):
        here.media("x", b"data")
    assert gcs.objects(BUCKET)["p/x"].content == b"data"
    gcs.fail("truncated", kind="delete")
    with pytest.raises(http.client.RemoteDisconnected):
        here.delete("x")
    assert gcs.objects(BUCKET) == {}


def differing(left: bytes, right: bytes) -> int:
    assert len(left) == len(right)
    return sum(a != b for a, b in zip(left, right, strict=True))


def test_a_corrupted_read_keeps_the_right_hashes(gcs, here):
    data = bytes(range(256))
    here.put("x", data)
    whole = here.read("x")
    gcs.fail("corrupted", kind="read", times=2)
    answer = here.read("x")
    assert differing(answer.body, data) == 1
    assert answer.headers["x-goog-hash"] == whole.headers["x-goog-hash"]
    part = here.read("x", headers={"Range": "bytes=10-19"})
    assert (part.status, differing(part.body, data[10:20])) == (206, 1)
    assert here.read("x").body == data


def test_a_corrupted_upload_is_refused_or_stored_with_its_own_checksum(gcs, here):
    data = bytes(range(256))
    claim = {"x-goog-hash": f"crc32c={here.put('x', data)['crc32c']}"}
    gcs.fail("corrupted", kind=("insert", "chunk"), times=None)
    assert here.media("y", data, headers=claim).status == 400
    assert list(gcs.objects(BUCKET)) == ["p/x"]
    for kind in ("media", "multipart", "resumable"):
        assert here.upload(kind, kind, data).status == 200
    gcs.heal()
    right = gcs.objects(BUCKET)["p/x"].crc32c
    for kind in ("media", "multipart", "resumable"):
        stored = gcs.objects(BUCKET)[f"p/{kind}"]
        assert differing(stored.content, data) == 1
        assert stored.crc32c != right
        assert f"crc32c={stored.crc32c}" in here.read(kind).headers["x-goog-hash"]


def test_a_corrupted_listing_differs_in_one_byte(gcs, here):
    here.put("x")
    whole = here.page()
    gcs.fail("corrupted", kind="list")
    assert differing(here.page().body, whole.body) == 1
    assert here.page().body == whole.body


def test_the_same_seed_damages_the_same_byte():
    bodies = []
    for _ in range(2):
        with FakeGCS(seed=7) as server:
            server.put(BUCKET, "p/x", bytes(1000))
            server.fail("corrupted")
            bodies.append(Endpoint(server.url, BUCKET, "p").read("x").body)
    assert bodies[0] == bodies[1] != bytes(1000)


def test_a_delayed_request_is_answered_late(gcs, here):
    gcs.fail("delay", seconds=0.05)
    start = time.monotonic()
    assert here.media("x", b"data").status == 200
    assert time.monotonic() - start >= 0.05


def test_a_stalled_read_sends_half_and_closes(gcs, here):
    here.put("x", b"0123456789")
    gcs.fail("stalled", kind="read", seconds=0.05)
    start = time.monotonic()
    with pytest.raises(http.client.IncompleteRead) as caught:
        here.read("x")
    assert caught.value.partial == b"01234"
    assert time.monotonic() - start >= 0.05


@pytest.mark.parametrize(
    ("kind", "act"),
    [
        ("insert", lambda here: here.media("y", b"data")),
        ("delete", lambda here: here.delete("x")),
        ("compose", lambda here: here.compose("y", ["x"])),
        ("copy", lambda here: here.copy("x", "y")),
        ("patch", lambda here: here.send_json("PATCH", here.path("x"), {"contentType": "a/b"})),
    ],
)
def test_a_stalled_change_is_not_applied(gcs, here, kind, act):
    here.put("x")
    before = gcs.objects(BUCKET)
    fault = gcs.fail("stalled", kind=kind, seconds=0.05)
    with pytest.raises(http.client.RemoteDisconnected):
        act(here)
    assert fault.hits == 1
    assert gcs.objects(BUCKET) == before


@pytest.mark.parametrize("mode", ["stalled", "delay"])
def test_stopping_ends_what_is_pending_at_once(mode):
    before = set(threading.enumerate())
    with FakeGCS() as server:
        server.put(BUCKET, "p/x", b"0123456789")
        server.fail(mode, kind="read", seconds=3600)
        here = Endpoint(server.url, BUCKET, "p")
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
        connection.request("GET", f"{here.path('x')}?alt=media")
        assert here.stat("x").status == 200  # others are served meanwhile
        if mode == "stalled":
            reply = connection.getresponse()
            assert reply.read(5) == b"01234"
    assert set(threading.enumerate()) == before
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        reply.read() if mode == "stalled" else connection.getresponse()
    connection.close()
    with pytest.raises(ConnectionError):
        here.read("x")


def test_a_fault_hits_only_what_it_names(gcs, here):
    gcs.put(BUCKET, "p/x", b"1")
    for wrong in (
        {"kind": "list"},
        {"kind": ("delete", "insert")},
        {"name": "^x"},
        {"method": "POST"},
        {"client": "tensorstore"},
    ):
        fault = gcs.fail("drop", **wrong)
        assert here.read("x").status == 200
        assert (fault.seen, fault.hits) == (0, 0)
    gcs.heal()
    fault = gcs.fail("error", kind="read", name="x$", method="get", client="^mine/")
    assert here.read("x", headers={"User-Agent": "mine/1.0"}).status == 503
    assert gcs.requests[-1].client == "mine/1.0"
    assert fault.hits == 1


def test_a_fault_hits_from_its_number_on_as_often_as_it_says(gcs, here):
    here.put("x")
    fault = gcs.fail("error", kind="read", number=2, times=2)
    assert [here.read("x").status for _ in range(5)] == [200, 503, 503, 200, 200]
    assert (fault.seen, fault.hits) == (5, 2)
    for_ever = gcs.fail("error", kind="read", times=None)
    other = gcs.fail("error", kind="list", times=None)
    assert [here.read("x").status for _ in range(3)] == [503] * 3
    gcs.heal(for_ever)
    assert (here.read("x").status, here.page().status) == (200, 503)
    gcs.heal()
    assert here.page().status == 200
    assert other.hits == 1


def test_a_part_of_a_batch_can_fail_alone(gcs, here):
    for name in ("a", "b", "c"):
        here.put(name)
    gcs.fail("error", kind="delete", name="b$")
    answer = here.batch([("DELETE", here.path(name)) for name in ("a", "b", "c")])
    assert answer.body.count(b"HTTP/1.1 204") == 2
    assert answer.body.count(b"HTTP/1.1 503") == 1
    assert list(gcs.objects(BUCKET)) == ["p/b"]


def test_a_batch_has_a_hundred_parts_at_most(gcs, here):
    paths = [("DELETE", here.path("x"))]
    assert here.batch(paths * 100).status == 200
    assert here.batch(paths * 101).status == 400


def test_a_misspelled_fault_is_refused(gcs):
    with pytest.raises(ValueError, match="There is no mode"):
        gcs.fail("dorp")
    with pytest.raises(ValueError, match="Not all of"):
        gcs.fail("drop", kind=["write"])
    assert "drop" in FAULT_MODES


# Permissions


@pytest.mark.parametrize(
    ("permission", "act"),
    [
        ("storage.objects.get", lambda here: here.read("x")),
        ("storage.objects.get", lambda here: here.stat("x")),
        ("storage.objects.get", lambda here: here.copy("x", "new")),
        ("storage.objects.get", lambda here: here.compose("new", ["x"])),
        ("storage.objects.list", lambda here: here.page()),
        ("storage.objects.create", lambda here: here.media("new", b"")),
        ("storage.objects.create", lambda here: here.multipart("new", b"")),
        ("storage.objects.create", lambda here: here.start("new")),
        ("storage.objects.create", lambda here: here.copy("x", "new")),
        ("storage.objects.create", lambda here: here.copy("x", "new", verb="copyTo")),
        ("storage.objects.create", lambda here: here.compose("new", ["x"])),
        ("storage.objects.delete", lambda here: here.media("x", b"")),
        ("storage.objects.delete", lambda here: here.start("x")),
        ("storage.objects.delete", lambda here: here.copy("y", "x")),
        ("storage.objects.delete", lambda here: here.compose("x", ["y"])),
        ("storage.objects.delete", lambda here: here.delete("x")),
        ("storage.objects.update", lambda here: here.send_json("PATCH", here.path("x"), {})),
        ("storage.buckets.get", lambda here: here.request("GET", f"/storage/v1/b/{BUCKET}")),
    ],
)
def test_a_denied_permission_is_403(gcs, here, permission, act):
    here.put("x")
    here.put("y")
    before = gcs.objects(BUCKET)
    gcs.deny(permission)
    answer = act(here)
    assert answer.status == 403
    error = answer.json["error"]
    assert error["errors"][0]["reason"] == "forbidden"
    kind = "object" if "objects" in permission and "list" not in permission else "bucket"
    assert error["message"].endswith(
        f"does not have {permission} access to the Google Cloud Storage {kind}. "
        f"Permission '{permission}' denied on resource (or it may not exist)."
    )
    assert gcs.objects(BUCKET) == before
    gcs.allow(permission)
    assert act(here).status in (200, 204)


def test_who_may_not_delete_may_still_create(gcs, here):
    gcs.deny("storage.objects.delete")
    for kind in ("media", "multipart", "resumable"):
        assert here.upload(kind, kind, b"new").status == 200
        assert here.upload(kind, kind, b"again").status == 403
    answer = here.batch([("DELETE", here.path("media"))])
    assert b"HTTP/1.1 403" in answer.body
    asked = f"/storage/v1/b/{BUCKET}/iam/testPermissions"
    names = ["storage.objects.get", "storage.objects.delete"]
    query = "&".join(f"permissions={name}" for name in names)
    assert here.request("GET", f"{asked}?{query}").json["permissions"] == names[:1]


# Limits, latency, clock


def test_a_second_write_to_a_name_is_429(gcs, here):
    gcs.one_write_per_second = True
    target = f"{here.upload_path()}?uploadType=media&name=p/x"
    # a slow machine may take a second between two of them, but not each time
    statuses = [here._send("POST", target, {}, b"data").status for _ in range(20)]
    assert statuses[0] == 200
    assert 429 in statuses
    others = [here._send("POST", target + str(n), {}, b"data").status for n in range(5)]
    assert others == [200] * 5
    gcs.one_write_per_second = False
    assert here.media("x", b"data").status == 200


def test_a_final_chunk_that_came_too_soon_can_be_sent_again(gcs, here):
    statuses = []
    for _ in range(20):
        url = here.start("x").headers["location"]
        gcs.one_write_per_second = True
        here._send("POST", f"{here.upload_path()}?uploadType=media&name=p/x", {}, b"other")
        said = {"Content-Range": "bytes 0-3/4"}
        statuses.append(here._send("PUT", url, said, b"data").status)
        gcs.one_write_per_second = False
        assert here._send("PUT", url, said, b"data").status == 200
        assert gcs.objects(BUCKET)["p/x"].content == b"data"
        if 429 in statuses:
            break
    assert 429 in statuses


def test_too_many_requests_are_429(gcs, here):
    here.put("x")
    gcs.requests_per_second = 0.001
    statuses = [here._send("GET", here.path("x"), {}, b"").status for _ in range(3)]
    assert statuses == [200, 429, 429]
    gcs.requests_per_second = None
    assert here.stat("x").status == 200


def test_latency_is_waited_by_each_request(gcs, here):
    gcs.latency_seconds = 0.03
    start = time.monotonic()
    here.put("x")
    here.read("x")
    assert time.monotonic() - start >= 0.06


def test_a_skewed_clock_is_told(gcs, here):
    gcs.clock_skew_seconds = -7200.0
    before = time.time()
    answer = here.media("x", b"data")
    told = email.utils.parsedate_to_datetime(answer.headers["date"]).timestamp()
    assert before - 7202 <= told <= time.time() - 7199
    stored = gcs.objects(BUCKET)["p/x"]
    assert before - 7201 <= stored.time_created <= time.time() - 7199
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(stored.updated))
    assert answer.json["updated"].startswith(stamp)


# What a test sees and does


def test_rot_changes_the_content_alone(gcs, here):
    stored = here.put("x", b"\x00\x00")
    gcs.flip(BUCKET, "p/x", 1, 3)
    answer = here.read("x")
    assert answer.body == b"\x00\x08"
    assert f"crc32c={stored['crc32c']}" in answer.headers["x-goog-hash"]
    assert here.stat("x").json == stored


def test_put_writes_as_somebody_else(gcs, here):
    gcs.deny("storage.objects.create", "storage.objects.delete")
    first = gcs.put(BUCKET, "p/x", b"first")
    second = gcs.put(BUCKET, "p/x", b"second")
    assert second.generation > first.generation
    assert here.read("x", generation=second.generation).body == b"second"
    assert gcs.objects(BUCKET)["p/x"] == second


def test_requests_are_recorded_in_order(gcs, here):
    generation = here.put("x y", b"12345")["generation"]
    here.read("x y", headers={"User-Agent": "me"})
    here.delete("x y", ifGenerationMatch=generation)
    url = here.start("z", ifGenerationMatch=0).headers["location"]
    here.chunk(url, b"", "*/4")
    here.request("DELETE", url)
    seen = gcs.requests
    assert [r.number for r in seen] == [1, 2, 3, 4, 5, 6]
    assert [r.kind for r in seen] == ["insert", "read", "delete", "start", "chunk", "cancel"]
    assert [r.name for r in seen] == ["p/x y"] * 3 + ["p/z"] * 3
    assert [r.status for r in seen] == [200, 200, 204, 200, 308, 499]
    assert [r.condition for r in seen] == [None, None, int(generation), 0, 0, 0]
    assert seen[0].sent == seen[1].received == 5
    assert seen[1] == Request(
        number=2,
        method="GET",
        kind="read",
        bucket=BUCKET,
        name="p/x y",
        status=200,
        received=5,
        client="me",
    )
    gcs.clear_requests()
    assert gcs.requests == []


def test_an_object_is_read_by_its_plain_path_too(gcs, here):
    generation = here.put("a/b c", b"data")["generation"]
    assert here.request("GET", f"/{BUCKET}/p/a/b%20c").body == b"data"
    head = here.request("HEAD", f"/{BUCKET}/p/a/b%20c")
    assert (head.status, head.headers["content-length"], head.body) == (200, "4", b"")
    for said, status in ((generation, 200), ("1", 412)):
        headers = {"x-goog-if-generation-match": said}
        assert here.request("GET", f"/{BUCKET}/p/a/b%20c", headers=headers).status == status


def test_a_bucket_tells_its_settings(gcs, here):
    path = f"/storage/v1/b/{BUCKET}"
    told = here.request("GET", path).json
    assert told["softDeletePolicy"]["retentionDurationSeconds"] == "604800"
    assert "versioning" not in told
    gcs.bucket_settings(
        BUCKET, versioning={"enabled": True}, hierarchicalNamespace={"enabled": True}
    )
    assert here.request("GET", path).json["versioning"] == {"enabled": True}
    layout = here.request("GET", f"{path}/storageLayout").json
    assert layout["hierarchicalNamespace"] == {"enabled": True}


def test_buckets_come_and_go(gcs, here):
    made = here.send_json("POST", "/storage/v1/b?project=p", {"name": "another"})
    assert (made.status, made.json["name"]) == (200, "another")
    assert here.send_json("POST", "/storage/v1/b", {"name": "another"}).status == 409
    assert here.send_json("POST", "/storage/v1/b", {"name": "x"}).status == 400
    listed = here.request("GET", "/storage/v1/b?project=p").json["items"]
    assert [bucket["name"] for bucket in listed] == ["another", BUCKET]
    gcs.put("another", "x", b"")
    assert here.request("DELETE", "/storage/v1/b/another").status == 409
    elsewhere = Endpoint(gcs.url, "another", "")
    assert elsewhere.request("DELETE", "/storage/v1/b/another/o/x").status == 204
    assert here.request("DELETE", "/storage/v1/b/another").status == 204
    assert here.request("GET", "/storage/v1/b/another").status == 404
    with pytest.raises(ValueError, match="three characters"):
        FakeGCS(buckets=("ab",))


@pytest.mark.parametrize(
    ("method", "target", "body"),
    [
        ("POST", f"{UPLOAD}?uploadType=multipart", b"no parts"),
        ("POST", f"{UPLOAD}?uploadType=resumable&name=x", b"{"),
        ("POST", f"{UPLOAD}?uploadType=media", b"no name"),
        ("POST", f"{UPLOAD}?name=x", b"no type"),
        ("POST", f"{UPLOAD}?uploadType=media&name=x&ifGenerationMatch=a", b"a condition"),
        ("POST", "/batch/storage/v1", b"no parts"),
        ("GET", f"/storage/v1/b/{BUCKET}/o?maxResults=a", b""),
        ("GET", f"/storage/v1/b/{BUCKET}/o?matchGlob=*", b""),
        ("POST", f"/storage/v1/b/{BUCKET}/o/x/compose", b"{}"),
    ],
)
def test_nonsense_is_400(gcs, here, method, target, body):
    answer = here.request(method, target, body=body)
    assert (answer.status, answer.json["error"]["code"]) == (400, 400)
    assert gcs.objects(BUCKET) == {}


def test_an_unknown_request_is_404(here):
    answer = here.request("GET", "/storage/v2/nothing")
    assert (answer.status, answer.json["error"]["errors"][0]["reason"]) == (404, "notFound")


def test_a_client_that_dies_in_its_upload_stores_nothing(caplog):
    with FakeGCS() as server:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
        connection.putrequest("POST", f"{UPLOAD}?uploadType=media&name=x")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b"half")
        connection.close()
        assert Endpoint(server.url, BUCKET, "p").stat("x").status == 404
    assert server.objects(BUCKET) == {}
    assert caplog.records == []


def test_a_port_in_use_is_an_error(gcs):
    before = set(threading.enumerate())
    with pytest.raises(OSError):
        FakeGCS(port=int(gcs.url.rpartition(":")[2])).__enter__()
    assert set(threading.enumerate()) == before


def test_it_runs_as_a_program():
    command = [sys.executable, "-m", "datarax_dist.testing.fake_gcs", "--bucket", "training"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        lines = [server.stdout.readline() for _ in FakeGCS().environment()]
        told = dict(line.removeprefix("export ").rstrip().split("=", 1) for line in lines)
        url = told["STORAGE_EMULATOR_HOST"].strip("'")
        assert json.loads(told["FSSPEC_GCS"].strip("'"))["use_listings_cache"] is False
        assert Endpoint(url, "training", "p").put("x")["bucket"] == "training"
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
