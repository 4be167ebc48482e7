"""Arrays read straight from their files, and the files verified meanwhile."""

from __future__ import annotations

import errno
import itertools
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import datarax_dist as dd
from datarax_dist import arrays, direct, ocdbt
from datarax_dist import format as fmt
from datarax_dist.direct import layout, reading, writing
from datarax_dist.errors import CorruptStepError, StorageError

DEVICES = jax.device_count()
DTYPES = [np.bool_, np.int8, np.uint16, np.float16, ml_dtypes.bfloat16, np.float32, np.complex64]


def on_mesh(*sizes: int) -> Callable[..., NamedSharding]:
    names = tuple("abc"[: len(sizes)])
    mesh = Mesh(np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes), names)
    return lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))


def values(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.standard_normal(shape) * 50).astype(dtype)


def a_state(place: Callable[..., NamedSharding]) -> dict[str, Any]:
    put = lambda x, *spec: jax.device_put(x, place(*spec))
    return {
        **{
            np.dtype(dtype).name: put(values((8, 12), dtype, seed), "a")
            for seed, dtype in enumerate(DTYPES)
        },
        "columns": put(values((4, 2048), np.float32), None, "a"),
        "both": put(values((8, 64, 3), np.float32), "b", "a"),
        "everywhere": put(values((5, 7), np.float32)),
        "number": put(np.float32(3.5)),
        "numpy": values((3, 1000), np.int16),
        "of one device": jax.device_put(values((700,), np.float32), jax.devices()[-1]),
    }


def record_orbax(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns the leaves that Orbax reads."""
    read: list[str] = []
    by_orbax = arrays.OrbaxArrays._read_by_orbax

    def note(self: Any, path: str, spec: Any, chosen: Any) -> Any:
        read.extend("/".join(key) for key in chosen)
        return by_orbax(self, path, spec, chosen)

    monkeypatch.setattr(arrays.OrbaxArrays, "_read_by_orbax", note)
    return read


def same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert type(left) is type(right)
        assert left.dtype == right.dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


@pytest.mark.parametrize("slab_bytes", [4 << 20, 100], ids=["whole chunks", "slab by slab"])
@pytest.mark.parametrize("level", ["marker", "full"])
@pytest.mark.parametrize("sizes", [(DEVICES, 1), (2, DEVICES // 2), (1, 1)], ids=str)
def test_every_mesh_reads_what_another_one_wrote_without_orbax(
    sizes: tuple[int, int],
    level: Any,
    slab_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layout, "_SLAB_BYTES", slab_bytes)
    state = a_state(on_mesh(DEVICES // 2, 2))
    target = a_state(on_mesh(*sizes))
    with dd.Checkpointer(tmp_path, options=dd.Options(verify_on_restore=level)) as ckpt:
        ckpt.save(1, state=state).result()
        read = record_orbax(monkeypatch)
        restored = ckpt.restore(state=target).state
        assert read == []
        same(restored, state)
        for name, value in target.items():
            if isinstance(value, jax.Array):
                assert restored[name].sharding == value.sharding
        same(ckpt.restore().state, state)


def test_what_is_stored_in_another_way_is_left_to_orbax(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = a_state(on_mesh(DEVICES // 2, 2)) | {"key": jax.random.key(3)}
    with dd.Checkpointer(tmp_path, options=dd.Options(compression="zstd")) as ckpt:
        ckpt.save(1, state=state).result()
        read = record_orbax(monkeypatch)
        restored = ckpt.restore(state=state).state
    assert sorted(read) == sorted(state)
    assert jax.random.key_data(restored.pop("key")).tolist() == [0, 3]
    state.pop("key")
    same(restored, state)


def test_a_part_of_a_state_is_read_and_all_files_are_verified(tmp_path: Path) -> None:
    state = {f"p{i}": values((256, 256), np.float32, i) for i in range(3)}
    with dd.Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, state=state).result()
        assert np.array_equal(ckpt.restore(state={"p1": state["p1"]}).state["p1"], state["p1"])
        begin = state["p2"].tobytes()[:64]
        [file] = [p for p in (tmp_path / "1").rglob("d/*") if begin in p.read_bytes()]
        data = bytearray(file.read_bytes())
        at = data.index(begin)
        data[at] ^= 1
        file.write_bytes(data)
        with pytest.raises(CorruptStepError, match="checksum"):
            ckpt.restore(state={"p1": state["p1"]})


def chunk(array: np.ndarray) -> bytes:
    data = array.tobytes()
    index = struct.pack("<QQ", 0, len(data) + 4)
    sums = [struct.pack("<I", fmt.crc32c(part)) for part in (data, index)]
    return data + sums[0] + index + sums[1]


class Files:
    """Chunks in files, and readings of them."""

    def __init__(self, root: Path, contents: dict[str, bytes]) -> None:
        self.root = root
        self.entries = {}
        for name, content in contents.items():
            (root / name).write_bytes(content)
            self.entries[name] = fmt.FileEntry(name, len(content), fmt.digest(content))

    def reading(self, *verified: str) -> direct.Reading:
        return direct.Reading(
            lambda name: os.open(self.root / name, os.O_RDONLY),
            {name: self.entries[name] for name in verified},
        )


def stored(shape: tuple[int, ...], chunks: tuple[int, ...], *where: Any) -> direct.StoredArray:
    return direct.StoredArray("x", shape, np.dtype(np.float32), chunks, where)


def whole(shape: tuple[int, ...]) -> direct.Buffer:
    return direct.Buffer(tuple((0, n) for n in shape), np.dtype(np.float32))


@pytest.mark.parametrize("verified", [True, False], ids=["verified", "not verified"])
def test_chunks_may_lie_anywhere_in_a_file_and_in_any_order(verified: bool, tmp_path: Path) -> None:
    parts = [values((2, 300_000), np.float32, seed) for seed in range(3)]
    encoded = [chunk(part) for part in parts]
    content = b"gap" + encoded[2] + encoded[0] + b"g" * 3_000_000 + encoded[1] + b"the end"
    files = Files(tmp_path, {"a": content, "b": chunk(parts[1])})
    length = len(encoded[0])
    at = [ocdbt.Extent("a", content.index(data), length) for data in encoded]
    array = stored((6, 300_000), (2, 300_000), *at)
    twice = stored((4, 300_000), (2, 300_000), at[0], ocdbt.Extent("b", 0, length))
    again = stored((2, 300_000), (2, 300_000), at[0])
    reading = files.reading(*(["a", "b"] if verified else []))
    wanted = [
        (array, whole(array.shape)),
        (twice, whole(twice.shape)),
        (again, whole((2, 300_000))),
    ]
    for each, buffer in wanted:
        reading.want(each, [buffer])
    middle = direct.Buffer(((1, 5), (7, 299_999)), np.dtype(np.float32))
    reading.want(array, [middle])
    assert reading.run() == {}
    everything = np.concatenate(parts)
    assert np.array_equal(wanted[0][1].array, everything)
    assert np.array_equal(wanted[1][1].array, np.concatenate([parts[0], parts[1]]))
    assert np.array_equal(wanted[2][1].array, parts[0])
    assert np.array_equal(middle.array, everything[1:5, 7:299_999])


def test_a_chunk_that_no_digest_covers_is_checked_by_its_own(tmp_path: Path) -> None:
    part = values((2, 1000), np.float32)
    damaged = bytearray(chunk(part))
    damaged[4000] ^= 8
    files = Files(tmp_path, {"a": bytes(damaged)})
    for where in (ocdbt.Extent("a", 0, len(damaged)), bytes(damaged)):
        reading = files.reading()
        reading.want(stored((2, 1000), (2, 1000), where), [whole((2, 1000))])
        assert "checksum" in str(reading.run())


@pytest.mark.parametrize("at", [0, 2, 5_000, 9_000])
def test_a_digest_covers_what_no_chunk_does_too(at: int, tmp_path: Path) -> None:
    part = chunk(values((2, 1000), np.float32))
    content = b"gap" + part + b"\0" * 1000
    files = Files(tmp_path, {"a": content})
    damaged = bytearray(content)
    damaged[min(at, len(content) - 1)] ^= 1
    (tmp_path / "a").write_bytes(damaged)
    reading = files.reading("a")
    reading.want(stored((2, 1000), (2, 1000), ocdbt.Extent("a", 3, len(part))), [whole((2, 1000))])
    assert "checksum" in reading.run()["a"]


def test_files_that_are_shorter_or_gone_are_told_and_hide_no_other(tmp_path: Path) -> None:
    part = chunk(values((2, 1000), np.float32))
    names = ["short", "gone", "shorter than its index", "good"]
    files = Files(tmp_path, dict.fromkeys(names, part))
    for name in ("short", "shorter than its index"):
        (tmp_path / name).write_bytes(part[:-1])
    (tmp_path / "gone").unlink()
    reading = files.reading("short", "gone", "good")
    for name in names:
        where = ocdbt.Extent(name, 0, len(part))
        reading.want(stored((2, 1000), (2, 1000), where), [whole((2, 1000))])
    wrong = reading.run()
    assert sorted(wrong) == ["gone", "short", "shorter than its index"]
    assert wrong["gone"] == "missing"


def test_what_cannot_be_read_now_is_no_damage(tmp_path: Path) -> None:
    files = Files(tmp_path, {"a": b"x", "b": b"y"})

    def fail(name: str) -> int:
        raise OSError(5, "Input/output error")

    with pytest.raises(StorageError, match="Input/output error"):
        direct.Reading(fail, files.entries).run()


def test_the_index_names_no_file_outside_of_the_state() -> None:
    extent = ocdbt._extent("value:ocdbt.process_0/:d/ab:5:7")
    assert extent == ocdbt.Extent("ocdbt.process_0/d/ab", 5, 7)
    for location in (
        "value::../../secret:0:5",
        "value:..%2F..%2F:secret:0:5",
        "value::/etc/passwd:0:5",
        "value::d//x:0:5",
        "btreenode::d/x:0:5",
        "value::d/x:0",
        "value::d/x:0:five",
        "value::d/x:0:-5",
        "value::d/x:-5:5",
    ):
        with pytest.raises(ValueError):
            ocdbt._extent(location)


def test_an_index_of_several_levels_is_read_whole(tmp_path: Path) -> None:
    import tensorstore as ts

    config = {"max_decoded_node_bytes": 1000, "max_inline_value_bytes": 20}
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{tmp_path}/"}, "config": config}
    store = ts.KvStore.open(spec).result()
    want = {f"layer_{i // 7}.p_{i}/c/0": bytes([i % 256]) * (5 + i % 40) for i in range(700)}
    transaction = ts.Transaction(atomic=True)
    for key, value in want.items():
        store.with_transaction(transaction).write(key, value)
    transaction.commit_async().result()
    found = ocdbt.read_index(str(tmp_path))
    assert found.keys() == want.keys()
    for key, value in found.items():
        if isinstance(value, ocdbt.Extent):
            data = (tmp_path / value.file).read_bytes()
            value = data[value.offset : value.offset + value.length]
        assert value == want[key]
    assert {type(value) for value in found.values()} == {bytes, ocdbt.Extent}


def changes(meta: dict[str, Any]) -> list[Any]:
    """Returns metadata of arrays that are stored in another way, or damaged."""
    [sharding] = meta["codecs"]
    inner = sharding["configuration"]
    zstd = {"name": "zstd", "configuration": {"level": 1}}
    return [
        None,
        [],
        {},
        meta | {"codecs": [*meta["codecs"], zstd]},
        meta | {"codecs": [sharding | {"configuration": inner | {"codecs": [zstd]}}]},
        meta | {"codecs": [sharding | {"configuration": inner | {"chunk_shape": [1, 5]}}]},
        meta | {"data_type": "int4"},
        meta | {"data_type": ["float32"]},
        meta | {"shape": [4, 10, 1]},
        meta | {"shape": [4, -10]},
        meta | {"shape": [4, 10**12]},
        meta | {"shape": [10**30, 10]},
        meta | {"shape": "x"},
        meta | {"shape": [4.0, 10.0]},
        meta | {"chunk_grid": {"name": "irregular", **meta["chunk_grid"]} | {"name": "irregular"}},
        meta | {"chunk_key_encoding": {"name": "v2"}},
        meta | {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}}},
    ]


def test_only_arrays_as_we_write_them_are_read_here(tmp_path: Path) -> None:
    with dd.Checkpointer(tmp_path) as ckpt:
        array = jax.device_put(values((4, 10), np.float32), on_mesh(2)("a"))
        ckpt.save(1, state={"w": array}).result()
    index = ocdbt.read_index(str(tmp_path / "1" / "state"))
    found = direct.parse_array("w", index)
    assert found is not None and (found.shape, found.chunk_shape) == ((4, 10), (2, 10))
    meta = json.loads(index["w/zarr.json"])  # type: ignore[arg-type]
    for other in changes(meta):
        assert direct.parse_array("w", index | {"w/zarr.json": json.dumps(other).encode()}) is None
    deep = b"[" * 100_000
    assert direct.parse_array("w", index | {"w/zarr.json": deep}) is None
    for key, value in itertools.product(["w/c/1/0"], [None, b"short", ocdbt.Extent("a", 0, 3)]):
        rest = {k: v for k, v in index.items() if k != key}
        assert direct.parse_array("w", rest if value is None else rest | {key: value}) is None
    assert direct.parse_array("v", index) is None


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def test_orbax_would_describe_the_state_in_the_same_words(tmp_path: Path) -> None:
    """All that plain Orbax reads beside the arrays is as if it had written them itself."""
    place = on_mesh(DEVICES // 2, 2)
    state = a_state(place) | {
        "key": jax.random.key(3),
        "deep": {"er?/ü": [jax.device_put(values((4, 2), np.float32), place("a", "b")), 1, "t"]},
    }
    for name, compression in (("ours", "none"), ("orbax", "zstd")):
        with dd.Checkpointer(
            tmp_path / name,
            options=dd.Options(compression=compression),  # type: ignore[arg-type]
        ) as ckpt:
            ckpt.save(1, state=state).result()
    ours, orbaxs = (tmp_path / name / "1" / "state" for name in ("ours", "orbax"))
    for file in ("_METADATA", "_sharding", "_strings.json"):
        assert read_json(ours / file) == read_json(orbaxs / file)
    rows = []
    for state_directory in (ours, orbaxs):
        found = read_json(state_directory / "array_metadatas" / "process_0")["array_metadatas"]
        rows.append({row["array_metadata"]["param_name"]: row for row in found})
    assert rows[0] == rows[1]
    mine, theirs = ocdbt.read_index(str(ours)), ocdbt.read_index(str(orbaxs))
    assert mine.keys() == theirs.keys()
    for key in mine:
        if key.endswith("/zarr.json"):
            pair = [json.loads(index[key]) for index in (mine, theirs)]  # type: ignore[arg-type]
            codecs = [meta.pop("codecs")[0]["configuration"]["codecs"] for meta in pair]
            assert pair[0] == pair[1]
            assert [codec["name"] for codec in codecs[0]] == ["bytes", "crc32c"]
            assert codecs[0][0] == codecs[1][0]


@pytest.mark.parametrize(
    ("count", "node_bytes", "entries"),
    [(1, 10**8, 10**6), (300, 10**8, 10**6), (3000, 20_000, 10**6), (300, 10**8, 7)],
    ids=["one", "one node", "many nodes", "few in each node"],
)
def test_tensorstore_reads_our_index_and_merges_it(
    count: int, node_bytes: int, entries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorstore as ts

    monkeypatch.setattr(ocdbt, "_MOST_NODE_BYTES", node_bytes)
    monkeypatch.setattr(ocdbt, "_MOST_ENTRIES", entries)
    random = np.random.default_rng(0)
    child = tmp_path / "child"
    (child / "d").mkdir(parents=True)
    data = random.bytes(100_000)
    files = sorted(ocdbt.new_file() for _ in range(3))
    for file in files:
        (child / file).write_bytes(data)
    want: dict[str, bytes | ocdbt.Extent] = {
        f"layer_{i}.{'ä' * (i % 150)}/c/{i % 7}": random.bytes(int(random.integers(1024)))
        if i % 3
        else ocdbt.Extent(files[i % 2 * 2], int(random.integers(50_000)), 1 + i)
        for i in range(count)
    }
    file = ocdbt.new_file()
    index, manifest = ocdbt.make_index(want, file)
    (child / file).write_bytes(index)
    (child / "manifest.ocdbt").write_bytes(manifest)
    assert ocdbt.read_index(str(child)) == want
    context = ts.Context()
    config = {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 100_000_000}

    def open_store(directory: Path) -> Any:
        base = {"driver": "file", "path": f"{directory}/"}
        spec = {"driver": "ocdbt", "base": base, "config": config}
        return ts.KvStore.open(spec, context=context).result()

    def content(value: bytes | ocdbt.Extent) -> bytes:
        if isinstance(value, bytes):
            return value
        return data[value.offset : value.offset + value.length]

    store, parent = open_store(child), open_store(tmp_path)
    assert sorted(key.decode() for key in store.list().result()) == sorted(want)
    transaction = ts.Transaction(atomic=True)
    store.experimental_copy_range_to(parent.with_transaction(transaction)).result()
    transaction.commit_async().result()
    for key, value in want.items():
        assert store.read(key).result().value == content(value)
        assert parent.read(key).result().value == content(value)
    assert store.read("not there").result().state == "missing"
    assert ocdbt.read_index(str(tmp_path)).keys() == want.keys()


def test_a_number_of_any_size_is_written_as_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    want: dict[str, bytes | ocdbt.Extent] = {
        f"{n:020}": ocdbt.Extent("d/x", n, n + 1) for n in (0, 127, 128, 16383, 16384, 2**40, 2**61)
    }
    index, manifest = ocdbt.make_index(want, "d/i")
    (tmp_path / "d" / "i").write_bytes(index)
    (tmp_path / "manifest.ocdbt").write_bytes(manifest)
    assert ocdbt.read_index(str(tmp_path)) == want


class Disk:
    """What `os` is to a writer, on a disk that fails or damages large writes."""

    sched_getaffinity = staticmethod(os.sched_getaffinity)

    def __init__(self, act: Callable[[bytearray], None]) -> None:
        self._act = act

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, descriptor: int, data: Any) -> int:
        copy = bytearray(data)
        if len(copy) > 100_000:
            self._act(copy)
        return os.write(descriptor, copy)


def large_state() -> dict[str, Any]:
    return {"w": jax.device_put(values((64, 4000), np.float32), on_mesh(DEVICES)("a"))}


def test_what_was_written_is_recorded_and_not_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte that is damaged between the memory and the disk is noticed by the restore."""

    def damage(data: bytearray) -> None:
        data[len(data) // 2] ^= 4

    with dd.Checkpointer(tmp_path) as ckpt:
        with monkeypatch.context() as patch:
            patch.setattr(writing, "os", Disk(damage))
            ckpt.save(1, state=large_state()).result()
        with pytest.raises(CorruptStepError, match="checksum"):
            ckpt.restore()
        ckpt.save(2, state=large_state()).result()
        same(ckpt.restore(state=large_state()).state, large_state())


def test_a_disk_that_is_full_ends_the_save_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(data: bytearray) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with dd.Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, state=large_state()).result()
        with monkeypatch.context() as patch:
            patch.setattr(writing, "os", Disk(full))
            with pytest.raises(StorageError, match="No space left") as caught:
                ckpt.save(2, state=large_state()).result()
        assert caught.value.errno == errno.ENOSPC
        ckpt.wait_until_finished()
        assert ckpt.all_steps() == [1]
        assert not [name for name in os.listdir(tmp_path) if name.startswith("2")]
        ckpt.save(2, state=large_state()).result()
        same(ckpt.restore(state=large_state()).state, large_state())


def test_chunks_are_divided_over_files_and_each_is_digested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_FILE_BYTES", 3_000_000)
    monkeypatch.setattr(writing, "_PIECE_BYTES", 70_001)
    parts = {
        f"p{i}": values((1, size), np.float32, i)
        for i, size in enumerate([900_000, 5, 70_000, 400_000, 1, 249, 250, 300_000])
    }
    writer = direct.Writing(str(tmp_path))
    for name, part in parts.items():
        writer.add(
            f"{name}/zarr.json", direct.describe_array(part.shape, part.dtype, part.shape) or b""
        )
        writer.add_chunks(name, [((0, 0), part)])
    digests = writer.run()
    there = {str(p.relative_to(tmp_path)): p for p in tmp_path.rglob("*") if p.is_file()}
    assert digests == {
        name: (path.stat().st_size, fmt.digest(path.read_bytes())) for name, path in there.items()
    }
    assert len(digests) == 5, "three of data, and two of the index"
    index = ocdbt.read_index(str(tmp_path))
    reading = direct.Reading(lambda name: os.open(tmp_path / name, os.O_RDONLY), {})
    buffers = {}
    for name, part in parts.items():
        found = direct.parse_array(name, index)
        assert found is not None
        buffers[name] = whole(part.shape)
        reading.want(found, [buffers[name]])
    assert reading.run() == {}
    for name, part in parts.items():
        assert np.array_equal(buffers[name].array, part)


def test_of_several_files_the_one_that_failed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that another one was stopped for it."""
    monkeypatch.setattr(writing, "_FILE_BYTES", 2_000_000)
    writer = direct.Writing(str(tmp_path))
    arrays = [np.full((1, 200_000), number, np.float32) for number in (1, 2)]
    of_the_first = arrays[0].tobytes()[:64]

    def act(data: bytearray) -> None:
        if of_the_first not in data:
            raise OSError(errno.EIO, "Input/output error")
        assert writer._stopped.wait(20)  # the first file waits for its end

    disk = Disk(act)
    disk.sched_getaffinity = lambda process: {0, 1}  # two threads, on any machine
    monkeypatch.setattr(writing, "os", disk)
    for number, array in enumerate(arrays):
        writer.add_chunks(f"p{number}", [((0, 0), array), ((1, 0), array)])
    with pytest.raises(OSError, match="Input/output error"):
        writer.run()


@given(
    shape=st.lists(st.integers(1, 6), max_size=4).map(tuple),
    itemsize=st.sampled_from([1, 2, 8]),
    most=st.integers(1, 64),
)
def test_slabs_are_all_of_an_array_in_the_order_in_which_it_is_stored(
    shape: tuple[int, ...], itemsize: int, most: int
) -> None:
    array = np.arange(int(np.prod(shape))).reshape(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "_SLAB_BYTES", most)
        parts = [array[slab].ravel() for slab in layout.slabs(shape, itemsize)]
    assert np.array_equal(np.concatenate(parts), array.ravel())
    assert all(part.size * itemsize <= most or part.size == 1 for part in parts)


@pytest.mark.parametrize("slab_bytes", [4 << 20, 1000])
def test_what_does_not_lie_in_memory_as_it_is_stored_is_stored_like_its_copy(
    slab_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_SLAB_BYTES", slab_bytes)
    monkeypatch.setattr(writing, "_SMALL_BYTES", 100)
    turned = values((60, 50), np.float32).T
    digests = []
    for number, array in enumerate((turned, np.ascontiguousarray(turned))):
        names = iter(["d/data", "d/index"])
        monkeypatch.setattr(writing, "new_file", names.__next__)
        out = writing.Writing(str(tmp_path / str(number)))
        out.add_chunks("w", [((0, 0), array)])
        digests.append(out.run()["d/data"])
    assert digests[0] == digests[1]
    data = (tmp_path / "0" / "d" / "data").read_bytes()
    assert data[: turned.nbytes] == turned.tobytes()
    assert digests[0] == (len(data), fmt.digest(data))


@pytest.mark.parametrize("shape", [(40,), (3 << 18,)], ids=["small", "large"])
def test_memory_that_changes_while_it_is_written_is_digested_as_it_was_written(
    shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU an array may share its memory with one of numpy."""
    array = np.zeros(shape, np.int32)
    monkeypatch.setattr(writing, "MOST_INLINE_BYTES", 10)
    digest = fmt.crc32c

    def then_change(data: Any, crc: int = 0) -> int:
        found = digest(data, crc)
        array[:] += 1
        return found

    monkeypatch.setattr(fmt, "crc32c", then_change)
    names = iter(["d/data", "d/index"])
    monkeypatch.setattr(writing, "new_file", names.__next__)
    out = writing.Writing(str(tmp_path))
    out.add_chunks("w", [((0,), array)])
    told = out.run()["d/data"]
    monkeypatch.undo()
    data = (tmp_path / "d" / "data").read_bytes()
    assert array[0] > 0
    assert told == (len(data), fmt.digest(data))


def test_reading_another_mesh_takes_little_memory_beside_the_arrays(tmp_path: Path) -> None:
    """Chunks that no shard wants as a whole go through slabs of a few MiB."""
    if DEVICES < 2:
        pytest.skip("one device has one mesh only")
    put = on_mesh(DEVICES)
    state = {"w": jax.device_put(np.ones((DEVICES, 4 << 20), np.float32), put("a", None))}
    target = {"w": jax.ShapeDtypeStruct((DEVICES, 4 << 20), np.float32, sharding=put(None, "a"))}
    with dd.Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, state=state).result()
        held: list[int] = []
        empty = np.empty

        def count(shape: Any, *more: Any, **options: Any) -> Any:
            made = empty(shape, *more, **options)
            held.append(made.nbytes)
            return made

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reading.np, "empty", count)
            restored = ckpt.restore(state=target).state
    assert np.array_equal(restored["w"], state["w"])
    shard = 16 << 20
    assert sorted({size for size in held if size > 8 << 20}) == [shard + 64], "only the shards"
