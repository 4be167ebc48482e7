"""What is read from storage is not trusted: whatever stands there ends with an error of ours, or an
older step is taken, soon and in little memory; and nothing outside of the run is touched.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import ctypes
import gc
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fuzz_records
import jax
import numpy as np
import pytest
from fuzz_records import attack, seal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import Counter

import datarax_dist as dd
from datarax_dist import cli, errors, specs
from datarax_dist import format as fmt
from datarax_dist.inspection import inspect_run
from datarax_dist.retention import delete_step
from datarax_dist.storage import LocalStore
from datarax_dist.testing.simulated import MemoryBucket, MemoryStore

# Orbax leaves a read behind when it finds that it cannot go on.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s).*coroutine object Store._get_array_m:pytest.PytestUnraisableExceptionWarning"
)

PARSERS = fuzz_records.parsers()
SEALED = sorted(name for name, parser in PARSERS.items() if parser.sealed)
LEVELS = ("marker", "sizes", "full")
_OPENED_OR_CHANGED = 0x20 | 0x02 | 0x04 | 0x100 | 0x200 | 0xC0  # of inotify
RECORD = "hosts/host_00000-of-00001.json"
INDEX, SHARD = "data/data/index.json", "data/data/shard_00000-of-00001.json"
OURS = ("COMMIT.json", "STEP.json", RECORD, "TREE.json", INDEX, SHARD, "metadata/metadata")

json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([0, -1, 10**9, 2**63, 2**64, 10**18, 10**400, -(10**400)]),
        st.floats(),
        st.text(max_size=20),
        st.sampled_from(["..", "/etc/passwd", "a/../../b", "\x00", "x" * 2000, "O", "f8,f8", "$a"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(st.text(max_size=4), st.sampled_from(["$int", "$array", "dict", "path"])),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Gives the path of every value below the top of some JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in inner:
        yield (*at, key)
        if isinstance(item, dict | list):
            yield from places(item, (*at, key))


def replaced(body: Any, place: tuple[Any, ...], value: Any) -> Any:
    body = copy.deepcopy(body)
    inner = body
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return body


def without_memory(act: Callable[[], Any], most_bytes: int) -> Any:
    tracemalloc.start()
    try:
        result = act()
        assert tracemalloc.get_traced_memory()[1] < most_bytes
        return result
    finally:
        tracemalloc.stop()


# The parsers


@pytest.mark.parametrize("name", PARSERS)
def test_what_the_hostile_inputs_start_from_is_accepted(name: str) -> None:
    parser = PARSERS[name]
    for body in parser.bodies:
        assert attack(parser, seal(body) if parser.sealed else json.dumps(body).encode())


@settings(max_examples=500, deadline=1000)
@given(st.sampled_from(sorted(PARSERS)), st.binary(max_size=300))
def test_arbitrary_bytes_are_an_error_of_ours(name: str, data: bytes) -> None:
    attack(PARSERS[name], data)


@settings(max_examples=1500, deadline=1000)
@given(st.sampled_from(sorted(PARSERS)), st.data())
def test_any_field_may_be_any_value_under_a_right_checksum(name: str, data: st.DataObject) -> None:
    parser = PARSERS[name]
    body = data.draw(st.sampled_from(parser.bodies))
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(list(places(body))))
        body = replaced(body, place, data.draw(json_values))
    try:
        written = seal(body) if parser.sealed else json.dumps(body).encode()
    except UnicodeEncodeError:  # a lone surrogate, which only JSON's own escapes can say
        written = json.dumps(body).encode()
    without_memory(lambda: attack(parser, written), 32 << 20)


@pytest.mark.parametrize("shape", [[4_000_000, "00"], ["00", 4_000_000], [4_000_000, [1, 2]]])
def test_a_shape_is_of_numbers_before_they_are_multiplied(shape: Any) -> None:
    value = {"$array": {"dtype": "<f4", "shape": shape, "data": "AAAAAA=="}}
    written = json.dumps(value).encode()
    assert not without_memory(lambda: attack(PARSERS["value"], written), 1 << 20)


def wrapped(body: str) -> bytes:
    """Returns JSON text with the checksum of just that text, canonical or not."""
    crc = fmt.crc_text(fmt.crc32c(body.encode(errors="surrogatepass")))
    return (body[:-1] + f',"crc32c":"{crc}"}}').encode(errors="surrogatepass")


def raw_inputs() -> dict[str, bytes]:
    return {
        "deep lists": b"[" * 200_000 + b"]" * 200_000,
        "deep objects": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
        "deep below a field": wrapped('{"run":' + "[" * 900 + "]" * 900 + "}"),
        "an int of many digits": wrapped('{"hosts":' + "9" * 100_000 + "}"),
        "a key twice": wrapped('{"run":"a","run":"b","step":1}'),
        "not a number": wrapped('{"created_at":NaN,"run":"a"}'),
        "infinity": wrapped('{"created_at":-Infinity,"run":"a"}'),
        "a float that overflows": wrapped('{"created_at":1e999,"run":"a"}'),
        "a lone surrogate, escaped": wrapped('{"run":"\\ud800"}'),
        "a lone surrogate, in bytes": wrapped('{"run":"\ud800"}'),
        "UTF-16": '{"run":"a"}'.encode("utf-16"),
        "nothing": b"",
        "null": b"null",
        "not closed": b'{"run":"' + b"a" * 1_000_000,
    }


@pytest.mark.parametrize("kind", raw_inputs())
@pytest.mark.parametrize("name", SEALED)
def test_what_is_not_canonical_json_is_refused_soon(name: str, kind: str) -> None:
    begin = time.monotonic()
    data = raw_inputs()[kind]
    accepted = without_memory(lambda: attack(PARSERS[name], data), 200 << 20)
    assert name == "void" or not accepted
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("body", ['{"loss": 1, "loss": 2}', '{"a": [{"b": {"c": 1, "c": 1}}]}'])
def test_metadata_with_a_key_twice_is_refused_as_a_record_is(run: Path, body: str) -> None:
    """Which one was meant? It is not sealed, and so not compared with its canonical form."""
    with pytest.raises(fmt.InvalidRecordError, match=r"^metadata .*the key '(loss|c)' twice"):
        fmt.parse_metadata(body.encode(), "metadata")
    rewrite(run / "2", "metadata/metadata", body.encode())
    with pytest.raises(errors.CorruptStepError, match="twice"):  # as with any JSON that is none
        restore(run)


@pytest.mark.parametrize("name", SEALED)
def test_a_million_empty_values_in_a_small_file_are_refused_before_they_are_made(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fmt, "MAX_VALUES", 1 << 16)
    data = b'{"files":[' + b"{}," * (1 << 20) + b"{}]}"
    accepted = without_memory(lambda: attack(PARSERS[name], data), 4 << 20)
    assert name == "void" or not accepted


def test_what_a_reader_would_refuse_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fmt, "MAX_VALUES", 1000)
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        with pytest.raises(
            errors.InvalidArgumentError, match=r"more than 1000 .* Nothing was saved"
        ):
            ckpt.save(1, state={"a": "," * 1001})
        with pytest.raises(errors.InvalidArgumentError, match=r"metadata .* Nothing was saved"):
            ckpt.save(1, state={"a": 1}, metadata={"a": [0] * 1001})
        assert ckpt.all_steps() == []


REFUSED: list[tuple[str, tuple[Any, ...], Any]] = [
    ("COMMIT.json", ("hosts",), 0),
    ("COMMIT.json", ("hosts",), 10**9),
    ("COMMIT.json", ("hosts",), True),
    ("COMMIT.json", ("step",), 2**63),
    ("COMMIT.json", ("step",), -1),
    ("COMMIT.json", ("bytes",), 10**300),
    ("COMMIT.json", ("committed_at",), float("nan")),
    ("COMMIT.json", ("committed_at",), float("inf")),
    ("COMMIT.json", ("committed_at",), 10**400),
    ("COMMIT.json", ("versions",), {"jax": [1]}),
    ("COMMIT.json", ("items",), [["state"]]),
    ("COMMIT.json", ("run",), "a\n2026 INFO: all is well"),
    ("COMMIT.json", ("run",), "a" * 5000),
    ("COMMIT.json", ("records", 0, "path"), "hosts/../../x"),
    ("COMMIT.json", ("format_version",), True),
    ("COMMIT.json", ("format_version",), 10**400),
    ("STEP.json", ("created_at",), 10**400),
    ("STEP.json", ("writer",), []),
    ("host record", ("files", 0, "size"), 2**63),
    ("host record", ("files", 0, "path"), "/etc/passwd"),
    ("host record", ("files", 0, "path"), "../1/COMMIT.json"),
    ("host record", ("files", 0, "path"), "a//b"),
    ("host record", ("files", 0, "path"), "a\nb"),
    ("host record", ("files", 0, "path"), "a" * 2000),
    ("host record", ("files", 0, "path"), ["a"] * 100_000),
    ("host record", ("seconds",), {"arrays": "long"}),
    ("host record", ("files",), [{"path": "a", "size": 1, "digest": "0123abcd-0123abcd"}] * 2),
    ("index", ("count",), 2**40),
    ("TREE.json", ("leaves", 0, "shape"), [-1]),
    ("TREE.json", ("leaves", 0, "shape"), [2**63]),
    ("TREE.json", ("leaves", 0, "dtype"), "object"),
    ("TREE.json", ("leaves", 0, "dtype"), "float32,float32"),
    ("TREE.json", ("leaves", 0, "dtype"), "V1000000000"),
    ("TREE.json", ("leaves", 0, "kind"), "os.system"),
    ("TREE.json", ("leaves", 1, "value"), "text"),
    ("TREE.json", ("leaves", 1, "path"), ["a"]),
    ("TREE.json", ("leaves", 2, "shape"), [10**12]),
    ("TREE.json", ("leaves", 2, "shape"), [2**62, 2**62, 0]),
    ("TREE.json", ("leaves",), []),
    ("TREE.json", ("structure",), {"list": [0, 0, 0, 0]}),
    ("TREE.json", ("structure",), {"list": [0, 1, 2]}),
    ("TREE.json", ("structure",), {"list": [3, 2, 1, 0]}),
    ("TREE.json", ("structure",), {"eval": [0, 1, 2, 3]}),
    ("TREE.json", ("structure",), {"dict": [["a", 0], ["a", 1], ["b", 2], ["c", 3]]}),
    ("TREE.json", ("structure", "dict", 0, 0), {"$array": {}}),
]


@pytest.mark.parametrize(("name", "place", "value"), REFUSED)
def test_wrong_types_ranges_and_paths_are_refused_in_a_short_message(
    name: str, place: tuple[Any, ...], value: Any
) -> None:
    parser = PARSERS[name]
    begin = time.monotonic()
    with pytest.raises(fmt.InvalidRecordError) as caught:
        parser.parse(seal(replaced(parser.bodies[0], place, value)))
    assert time.monotonic() - begin < 1
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


# A hostile step beside a good one


def make_state(step: int) -> Any:
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    return {
        "w": jax.device_put(np.arange(64.0, dtype=np.float32).reshape(8, 8) + step, rows),
        "host": np.full(3, step),
        "empty": np.zeros((0, 3), np.int32),
        "key": jax.random.key(step),
        "name": "a name",
        "count": step,
    }


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile") / "run"
    with dd.Checkpointer(root) as ckpt:
        for step in (1, 2):
            loader = Counter(0, 1)
            loader.at = step * 10
            ckpt.save(step, state=make_state(step), data=loader, metadata={"step": step})
    return root


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


def rewrite(step: Path, name: str, data: bytes) -> None:
    """Writes a file of a step, and records and marks it as a host would that wrote just that."""
    (step / name).write_bytes(data)
    chain = [name] if name not in (RECORD, "COMMIT.json") else []
    if chain:
        record = json.loads((step / RECORD).read_bytes())
        for row in record["files"]:
            if row["path"] == name:
                row |= {"size": len(data), "digest": fmt.digest(data)}
        (step / RECORD).write_bytes(seal(record))
    if name != "COMMIT.json":
        record_data = (step / RECORD).read_bytes()
        marker = json.loads((step / "COMMIT.json").read_bytes())
        marker["records"][0] |= {"size": len(record_data), "digest": fmt.digest(record_data)}
        (step / "COMMIT.json").write_bytes(seal(marker))


def snapshot(folder: Path) -> dict[str, bytes | str]:
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file():
            found[str(path)] = os.readlink(path) if path.is_symlink() else "other"
        else:
            found[str(path)] = path.read_bytes()
    return found


@contextlib.contextmanager
def nothing_touched(folder: Path) -> Iterator[None]:
    """Checks that nothing below `folder` is opened, changed or removed, by Python or TensorStore:
    the kernel tells.
    """
    before = snapshot(folder)
    libc = ctypes.CDLL(None, use_errno=True)
    events = libc.inotify_init1(os.O_NONBLOCK)
    assert events >= 0, os.strerror(ctypes.get_errno())
    try:
        for directory, _, _ in list(os.walk(folder)):  # which opens them
            watch = libc.inotify_add_watch(events, os.fsencode(directory), _OPENED_OR_CHANGED)
            assert watch >= 0, os.strerror(ctypes.get_errno())
        yield
        with pytest.raises(BlockingIOError):
            assert not os.read(events, 65536), "something was opened"
    finally:
        os.close(events)
    assert snapshot(folder) == before


def restore(root: Path, **options: Any) -> dd.Restored | None:
    """Restores in bounded time and memory; checks what comes back against what was saved."""
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loader = Counter(0, 1)
    try:
        with dd.Checkpointer(root, options=dd.Options(**options)) as ckpt:
            restored = ckpt.try_restore(data=loader)
    except errors.CheckpointError:
        gc.collect()
        raise
    assert time.monotonic() - begin < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 << 10  # in KiB
    if restored is not None and restored.step == 1:
        assert dd.tree_digest(restored.state) == dd.tree_digest(make_state(1))
        assert (loader.at, restored.metadata) == (10, {"step": 1})
    return restored


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    capsys.readouterr()
    begin = time.monotonic()
    code = cli.main([str(word) for word in words])
    assert time.monotonic() - begin < 30
    told = capsys.readouterr()
    assert "Traceback" not in told.err
    return code, told.out + told.err


def survives(root: Path, capsys: pytest.CaptureFixture[str]) -> int | None:
    """Tries everything that reads; returns the step that was restored, None for an error."""
    step: int | None = None
    told = ""
    try:
        restored = restore(root)
        step = restored.step if restored is not None else None
    except errors.CheckpointError as error:
        told = str(error)
    assert len(told) < 20_000
    known = {0, 1, 3, 10, 13}
    for words in (
        ["ls"],
        ["show"],
        ["show", "--tree"],
        ["verify"],
        ["verify", "--level", "marker"],
    ):
        assert command(capsys, words[0], root, *words[1:])[0] in known
        assert command(capsys, words[0], root, *words[1:], "--json")[0] in known
    assert command(capsys, "show", f"{root}@2", "--tree")[0] in known
    return step


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_step_with_any_field_replaced_ends_with_our_error_or_the_older_step(
    original: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("case")
    root = Path(shutil.copytree(original, folder / "run"))
    name = data.draw(st.sampled_from([*OURS, "../RUN.json"]))
    body = json.loads((root / "2" / name).read_bytes())
    if data.draw(st.booleans()):
        place = data.draw(st.sampled_from(list(places(body))))
        body = replaced(body, place, data.draw(json_values))
        try:
            written = seal(body) if name != "metadata/metadata" else json.dumps(body).encode()
        except UnicodeEncodeError:
            written = json.dumps(body).encode()
    else:
        written = data.draw(st.binary(max_size=200))
    if name == "../RUN.json":
        (root / "RUN.json").write_bytes(written)
    else:
        rewrite(root / "2", name, written)
    survives(root, capsys)
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("kind", ["deep lists", "a lone surrogate, escaped", "not a number"])
def test_a_hostile_file_with_right_digests_does_no_harm(
    run: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    rewrite(run / "2", name, raw_inputs()[kind])
    survives(run, capsys)


def test_an_empty_marker_and_a_marker_of_no_hosts_fall_back(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = json.loads((run / "2" / "COMMIT.json").read_bytes())
    for data in (b"", seal(marker | {"hosts": 0, "records": []})):
        (run / "2" / "COMMIT.json").write_bytes(data)
        assert survives(run, capsys) == 1


def test_an_array_that_claims_to_be_huge_is_not_made(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = json.loads((run / "2" / "TREE.json").read_bytes())
    [leaf] = [leaf for leaf in tree["leaves"] if leaf["path"] == ["w"]]
    leaf["shape"] = [1 << 20, 1 << 20]
    rewrite(run / "2", "TREE.json", seal(tree))
    restored = restore(run)
    assert restored is not None and restored.step == 1
    assert "w, [1048576, 1048576] of float32, is stored" in restored.report.refused["step 2"]
    assert survives(run, capsys) == 1


def test_a_prng_key_of_no_known_kind_is_an_error_of_ours(run: Path) -> None:
    tree = json.loads((run / "2" / "TREE.json").read_bytes())
    [leaf] = [leaf for leaf in tree["leaves"] if leaf["path"] == ["empty"]]
    for kind, shape, dtype in (
        ("empty", [0], "key:os"),
        ("key_data", [3], "os"),
        ("key", [3], "os"),
    ):
        leaf |= {"kind": kind, "shape": shape, "dtype": dtype}
        rewrite(run / "2", "TREE.json", seal(tree))
        with pytest.raises(errors.CheckpointError):
            restore(run)


def test_step_numbers_that_are_none_do_no_harm(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("9" * 18, "9" * 19, "9" * 200, f"{'9' * 200}.staging-{'a' * 16}", "-1", "007", "1e5")
    for name in names:
        shutil.copytree(run / "2", run / name)
    shutil.rmtree(run / "2")
    assert survives(run, capsys) == 1


# What is no file, or no small one


@pytest.mark.parametrize("name", OURS)
def test_files_of_100_gb_are_refused_before_they_are_read(
    run: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with (run / "2" / name).open("r+b") as file:
        file.truncate(100 << 30)
    if name == "STEP.json":  # full verification reads all of it, in pieces: that is what it is for
        assert LocalStore(str(run)).digest("2/STEP.json", 5) == (100 << 30, "")
    assert survives(run, capsys) == 1


def test_a_run_file_of_100_gb_is_not_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (run / "RUN.json").open("r+b") as file:
        file.truncate(100 << 30)
    assert survives(run, capsys) == 2  # the run is taken from its steps


@pytest.mark.parametrize("make", [MemoryStore, MemoryBucket])
def test_stores_in_memory_refuse_what_is_too_large_too(make: Any) -> None:
    store = make()
    store.put("7/STEP.json", b" " * (fmt.MAX_SMALL_BYTES + 1))
    with pytest.raises(fmt.InvalidRecordError, match="1048577 bytes"):
        store.get("7/STEP.json")


def special(path: Path, kind: str) -> contextlib.AbstractContextManager[Any]:
    path.unlink()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
        (path / "x").touch()
    elif kind == "device":
        try:
            os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero: it never ends
        except OSError:
            pytest.skip("this user may not make devices")
    else:
        found = socket.socket(socket.AF_UNIX)
        here = Path.cwd()
        os.chdir(path.parent)  # addresses of sockets are short
        try:
            found.bind(path.name)
        finally:
            os.chdir(here)
        return found
    return contextlib.nullcontext()


@pytest.mark.parametrize("kind", ["FIFO", "directory", "socket", "device"])
@pytest.mark.parametrize("name", [*OURS, "state/manifest.ocdbt"])
def test_what_is_no_file_is_an_error_at_once(
    run: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    with special(run / "2" / name, kind):
        assert survives(run, capsys) == 1
        for level in LEVELS:
            restored = restore(run, verify_on_restore=level)
            assert restored is not None and restored.step == 1
            if name not in ("COMMIT.json", RECORD):
                assert name.rpartition("/")[2] in restored.report.refused["step 2"]


@pytest.mark.parametrize("kind", ["FIFO", "directory", "socket"])
def test_a_run_file_that_is_no_file_is_an_error_at_once(
    run: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    with special(run / "RUN.json", kind):
        assert survives(run, capsys) == 2


def test_hashing_and_syncing_do_not_wait_for_a_fifo(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    store.put("7/state/a", b"x")
    os.mkfifo(tmp_path / "7" / "state" / "fifo")
    (tmp_path / "7" / "state" / "link").symlink_to(tmp_path / "7" / "state" / "a")
    ended = threading.Event()
    told: list[str] = []

    def work() -> None:
        for name in ("fifo", "link"):
            for act in (
                lambda key: store.digest(key),
                lambda key: store.sync("7", [key]),
            ):
                try:
                    act(f"7/state/{name}")
                except errors.StorageError as error:
                    told.append(str(error))
        ended.set()

    threading.Thread(target=work, daemon=True).start()
    assert ended.wait(20), "it waits for somebody to write into the FIFO"
    assert [("FIFO" in text, "link" in text) for text in told] == [
        (True, False),
        (True, False),
        (False, True),
        (False, True),
    ]


# Symbolic links


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "name",
    [*OURS, "hosts", "data", "data/data", "state", "metadata", "state/manifest.ocdbt", "state/d"],
)
def test_a_link_out_of_a_step_is_not_followed_and_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, level: str
) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(run / "2", outside)  # followed, all would be as it was saved
    place = run / "2" / name
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    place.symlink_to(outside / name)
    with nothing_touched(outside):
        restored = restore(run, verify_on_restore=level)
        code, told = command(capsys, "verify", f"{run}@2", "--level", level)
    assert restored is not None and restored.step == 1
    assert name in restored.report.refused["step 2"]
    assert code == 3
    assert name in told
    with pytest.raises(errors.CorruptStepError, match=name), dd.Checkpointer(run) as ckpt:
        ckpt.restore(step=2)


@pytest.mark.parametrize("level", LEVELS)
def test_a_link_that_no_record_names_is_refused(run: Path, tmp_path: Path, level: str) -> None:
    (tmp_path / "outside").mkdir()
    (run / "2" / "state" / "d" / "more").symlink_to(tmp_path / "outside")
    restored = restore(run, verify_on_restore=level)
    assert restored is not None and restored.step == 1
    assert "state/d/more: it is a symbolic link" in restored.report.refused["step 2"]


@pytest.mark.parametrize("level", LEVELS)
def test_a_record_without_files_does_not_hide_a_link(run: Path, tmp_path: Path, level: str) -> None:
    shutil.copytree(run / "2", tmp_path / "outside")
    shutil.rmtree(run / "2" / "state")
    (run / "2" / "state").symlink_to(tmp_path / "outside" / "state")
    record = json.loads((run / "2" / RECORD).read_bytes())
    rewrite(run / "2", RECORD, seal(record | {"files": []}))
    restored = restore(run, verify_on_restore=level)
    assert restored is not None and restored.step == 1


def test_a_step_that_is_a_link_is_no_step_and_said_to_be_one(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move(run / "2", tmp_path / "outside")
    (run / "2").symlink_to(tmp_path / "outside")
    with nothing_touched(tmp_path / "outside"):
        assert survives(run, capsys) == 1
        restored = restore(run)
    assert restored is not None
    assert "symbolic link" in restored.report.refused["step 2"]
    assert "symbolic link" in command(capsys, "ls", run)[1]


def test_a_link_in_a_step_of_plain_orbax_is_not_followed(tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(5, args=ocp.args.StandardSave({"w": np.arange(5.0)}))
        manager.wait_until_finished()
    shutil.move(tmp_path / "run" / "5" / "default", tmp_path / "outside")
    (tmp_path / "run" / "5" / "default").symlink_to(tmp_path / "outside")
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        with nothing_touched(tmp_path / "outside"):
            with pytest.raises(errors.CorruptStepError, match="default: it is a symbolic link"):
                ckpt.try_restore()


def test_the_root_itself_may_be_a_link(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(run)
    assert survives(tmp_path / "link", capsys) == 2
    with dd.Checkpointer(tmp_path / "link") as ckpt:
        ckpt.save(3, state=make_state(3)).result()
        ckpt.delete(1)
        assert ckpt.all_steps() == [2, 3]


def test_deletion_removes_links_and_not_what_they_lead_to(run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(run / "2", outside)
    for name in ("STEP.json", "state/d/more", "data/more", "commit_success.txt"):
        (run / "2" / name).unlink(missing_ok=True)
        (run / "2" / name).symlink_to(outside / "STEP.json")
    for name in ("directory", "state/directory"):
        (run / "2" / name).symlink_to(outside)
    store = LocalStore(str(run))
    with nothing_touched(outside):
        delete_step(store, 2, now=0.0)
        assert not (run / "2").exists()
        for number, name in enumerate(("3", f"3.deleting-{'a' * 16}")):
            (run / name).symlink_to(outside)
            with pytest.raises(errors.StorageError, match="symbolic link"):
                store.delete(f"{name}/COMMIT.json")
            store.delete(name)
            assert not (run / name).is_symlink(), number
    assert inspect_run(store).committed == [1]


def test_saving_and_tidying_beside_hostile_leftovers_touches_nothing_outside(
    run: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(run / "2", outside)
    for role in ("staging", "deleting", "replaced"):
        name = f"2.{role}-{'a' * 16}"
        shutil.copytree(run / "2", run / name)
        for inner in ("STEP.json", "COMMIT.json", "hosts", "state"):
            place = run / name / inner
            shutil.rmtree(place) if place.is_dir() else place.unlink()
            place.symlink_to(outside / inner)
        (run / f"3.{role}-{'b' * 16}").symlink_to(outside)
    (run / "7").mkdir()
    os.mkfifo(run / "7" / "STEP.json")
    with nothing_touched(outside), dd.Checkpointer(run) as ckpt:
        ckpt.try_restore()
        ckpt.save(3, state=make_state(3)).result()
        assert ckpt.all_steps() == [1, 2, 3]


def test_a_lease_behind_a_link_is_an_error_that_names_the_link(run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.move(run / "lease", outside)
    cut_off = outside / ".a.0123456789ab.tmp"
    cut_off.touch()
    os.utime(cut_off, (1, 1))  # in a lease of its own, it would be swept
    (run / "lease").symlink_to(outside)
    with nothing_touched(outside):
        with dd.Checkpointer(run) as ckpt:
            with pytest.raises(errors.StorageError, match=r"run/lease is a symbolic link.*Remove"):
                ckpt.save(3, state=make_state(3)).result()
        restored = restore(run)
    assert restored is not None and restored.step == 2
    assert inspect_run(LocalStore(str(run))).committed == [1, 2]


def test_a_run_file_behind_a_link_is_not_read_and_said_to_be_one(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "outside").mkdir()
    shutil.move(run / "RUN.json", tmp_path / "outside")
    (run / "RUN.json").symlink_to(tmp_path / "outside" / "RUN.json")
    with nothing_touched(tmp_path / "outside"):
        with dd.Checkpointer(run) as ckpt:
            ckpt.save(3, state=make_state(3)).result()
        assert "RUN.json is a symbolic link" in caplog.text
        for step in (1, 2, 3):
            shutil.rmtree(run / str(step))
        with dd.Checkpointer(run) as ckpt:
            with pytest.raises(errors.CorruptStepError, match=r"RUN.json is a symbolic link"):
                ckpt.save(4, state=make_state(4)).result()


# No code comes from storage

_ALLOWED = {
    # what: (module, name): why
    ("datarax_dist", "importlib.import_module"): "names of its own modules, in a table",
    ("datarax_dist.telemetry", "importlib.import_module"): "one name, as it stands there",
    ("datarax_dist.testing.launcher", "import pickle"): "between a test and hosts it starts itself",
    ("datarax_dist.testing.launcher", "pickle.loads"): "the same",
    ("datarax_dist.testing.launcher", "pickle.dumps"): "the same",
    ("datarax_dist.testing.launcher", "importlib.import_module"): "the target that the test gave",
    ("datarax_dist.testing.launcher", "importlib.spec_from_file_location"): "the same, a script's",
    ("datarax_dist.testing.launcher", "importlib.module_from_spec"): "the same",
    ("datarax_dist.testing.launcher", "importlib.exec_module"): "the same",
}
_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "code", "imp"}
_CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
_IMPORTERS = {
    "import_module",
    "reload",
    "spec_from_file_location",
    "module_from_spec",
    "exec_module",
    "load_module",
    "SourceFileLoader",
}


def dangers(source: str) -> Iterator[str]:
    """Gives what in a module could run what it has read."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            yield from (f"import {n}" for n in names if n.partition(".")[0] in _MODULES)
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").partition(".")[0]
            if module in _MODULES or (
                module == "importlib" and {alias.name for alias in node.names} & _IMPORTERS
            ):
                yield f"from {node.module} import {', '.join(alias.name for alias in node.names)}"
        elif isinstance(node, ast.Name) and node.id in _CALLS:
            yield node.id
        elif isinstance(node, ast.Attribute):
            if node.attr in _IMPORTERS:
                yield f"importlib.{node.attr}"
            elif isinstance(node.value, ast.Name) and node.value.id in _MODULES:
                yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield "allow_pickle"


def test_no_module_unpickles_evaluates_or_imports_what_it_has_read() -> None:
    package = Path(dd.__file__).parent
    found = set()
    for path in sorted(package.rglob("*.py")):
        module = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        module = module.removesuffix(".__init__")
        found |= {(module, danger) for danger in dangers(path.read_text())}
    assert found == set(_ALLOWED)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "eval(x)",
        "__import__(x)",
        "import importlib\nimportlib.import_module(x)",
        "from importlib import import_module",
        "run = exec",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_the_search_for_such_code_finds_it(source: str) -> None:
    assert list(dangers(source))


# The fuzzer


def test_the_fuzzer_says_so_when_it_cannot_run(tmp_path: Path) -> None:
    (tmp_path / "atheris.py").write_text("raise ImportError('not for this machine')")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(dd.__file__).parent.parent)])
    }
    done = subprocess.run(
        [sys.executable, fuzz_records.__file__, "--seconds", "1"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=120,
    )
    assert done.returncode == fuzz_records.NO_ATHERIS
    assert "nothing was fuzzed" in done.stdout


def test_every_seed_of_the_fuzzer_passes_and_a_defect_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number, parser in enumerate(PARSERS.values()):
        for body in parser.bodies:
            fuzz_records.try_input(PARSERS, bytes([number]) + json.dumps(body).encode())
    monkeypatch.setattr(specs, "_parse_leaf", lambda row: row["path"])
    number = list(PARSERS).index("TREE.json")
    with pytest.raises(KeyError):
        fuzz_records.try_input(PARSERS, bytes([number]) + b'{"leaves": [{}]}')
