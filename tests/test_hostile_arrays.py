"""Array files that are whole, with right checksums, and were made to do harm: TensorStore and Orbax
take as much time and memory as such a file asks for. See test_hostile.py for all other files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from test_hostile import LEVELS, rewrite

import datarax_dist as dd
from datarax_dist import direct, errors, ocdbt
from datarax_dist import format as fmt
from datarax_dist.arrays.leaves import fits
from datarax_dist.inspection import verify_files
from datarax_dist.specs import LeafSpec
from datarax_dist.testing.simulated import MemoryBucket

Extent = ocdbt.Extent


# Indexes


def sealed(node: bytes, height: int) -> bytes:
    """Returns a node as it would be at another height, with a right checksum."""
    return ocdbt._seal(bytes([height]) + node[14:-4][1:])


def above(children: list[tuple[int, int]], height: int, file: str = "d/x") -> bytes:
    """Returns a node above others, of each the offset and length."""
    nodes = [
        ocdbt._Node(b"%02d" % number, b" " * length, 1, 1, 1, offset)
        for number, (offset, length) in enumerate(children)
    ]
    return sealed(ocdbt._interior_node(nodes, file), height)


def write_database(directory: Path, data: bytes, root: tuple[int, int], height: int) -> None:
    """Writes a database whose nodes are in `data`, the root at an offset, of a length."""
    _, manifest = ocdbt.make_index({"a": b"1"}, "d/x")
    (directory / "manifest.ocdbt").write_bytes(manifest)
    told = ts.ocdbt.dump(ts.KvStore.open(f"file://{directory}/").result()).result()
    told["versions"][-1]["root_height"] = height
    told["versions"][-1]["root"]["location"] = f"btreenode::d/x:{root[0]}:{root[1]}"
    (directory / "manifest.ocdbt").write_bytes(ts.ocdbt.undump_manifest(told))
    (directory / "d").mkdir(exist_ok=True)
    (directory / "d" / "x").write_bytes(data)


LEAF = ocdbt._leaf_node([(b"00", b"1")])


@pytest.fixture
def dumps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Returns the nodes that are read, None for the manifest."""
    read: list[Any] = []
    dump = ts.ocdbt.dump

    def note(base: Any, node: Any = None) -> Any:
        read.append(node)
        if len(read) > 200:
            pytest.fail("it does not come to an end")
        return dump(base, node)

    monkeypatch.setattr(ts.ocdbt, "dump", note)
    return read


def test_nodes_that_all_lead_to_one_are_not_visited_again_and_again(
    tmp_path: Path, dumps: list[Any]
) -> None:
    data, place = LEAF, (0, len(LEAF))
    for height in range(1, 41):
        node = above([place, place], height)
        data, place = data + node, (len(data), len(node))
    write_database(tmp_path, data, place, 40)
    dumps.clear()
    with pytest.raises(ValueError, match="in two places"):
        ocdbt.read_index(str(tmp_path))
    assert len(dumps) <= 42  # though 2 ** 40 ways lead to the leaf


def test_a_node_is_one_lower_than_the_one_above(tmp_path: Path, dumps: list[Any]) -> None:
    circle = above([(0, 0)], 1)
    for length in range(60, 100):  # a node that leads to itself names its own length
        if len(circle := above([(0, length)], 1)) == length:
            break
    write_database(tmp_path, circle, (0, len(circle)), 1)
    with pytest.raises(ValueError, match="in two places"):
        ocdbt.read_index(str(tmp_path))
    low = above([(0, len(LEAF))], 1)
    write_database(tmp_path, LEAF + low, (len(LEAF), len(low)), 2)
    with pytest.raises(ValueError, match="another height"):
        ocdbt.read_index(str(tmp_path))
    write_database(tmp_path, LEAF + low, (len(LEAF), len(low)), 1)
    assert ocdbt.read_index(str(tmp_path)) == {"00": b"1"}
    write_database(tmp_path, LEAF + low, (len(LEAF), len(low)), 200)
    with pytest.raises(ValueError, match="too deep"):
        ocdbt.read_index(str(tmp_path))


def test_nodes_do_not_share_bytes(tmp_path: Path) -> None:
    """Else a file could have as many nodes as bytes, each nearly as long as the file."""
    outer = ocdbt._leaf_node([(b"00", LEAF)])
    root = above([(0, len(outer)), (outer.index(LEAF), len(LEAF))], 1)
    write_database(tmp_path, outer + root, (len(outer), len(root)), 1)
    with pytest.raises(ValueError, match="in two places"):
        ocdbt.read_index(str(tmp_path))


def test_a_huge_node_is_not_read(tmp_path: Path, dumps: list[Any]) -> None:
    size = ocdbt._LARGEST_NODE_BYTES + 1
    write_database(tmp_path, LEAF, (0, size), 0)
    with (tmp_path / "d" / "x").open("r+b") as file:
        file.truncate(size)
    dumps.clear()
    with pytest.raises(ValueError, match=f"a node of {size} bytes"):
        ocdbt.read_index(str(tmp_path))
    assert dumps == [None]


def test_an_index_of_more_or_longer_keys_than_any_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d").mkdir()
    index, manifest = ocdbt.make_index({f"a{i}": b"1" for i in range(10)}, "d/x")
    (tmp_path / "d" / "x").write_bytes(index)
    (tmp_path / "manifest.ocdbt").write_bytes(manifest)
    for name in ("_MOST_KEYS", "_MOST_KEY_BYTES"):
        with monkeypatch.context() as changed:
            changed.setattr(ocdbt, name, 1)
            with pytest.raises(ValueError, match="too many keys"):
                ocdbt.read_index(str(tmp_path))
    assert len(ocdbt.read_index(str(tmp_path))) == 10


# Arrays


def make_state(step: int) -> dict[str, Any]:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    return {
        "w": jax.device_put(np.arange(64.0, dtype=np.float32).reshape(8, 8) + step, rows),
        "host": np.full(3, step),
        "key": jax.random.key(step),
    }


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    roots = {}
    for compression in ("none", "zstd"):
        root = roots[compression] = tmp_path_factory.mktemp("arrays") / "run"
        with dd.Checkpointer(root, options=dd.Options(compression=compression)) as ckpt:
            for step in (1, 2):
                ckpt.save(step, state=make_state(step)).result()
    return roots


@pytest.fixture(params=["none", "zstd"])
def run(request: pytest.FixtureRequest, originals: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals[request.param], tmp_path / "run"))


def rewrite_index(step: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes what the database says, under right checksums."""
    index: dict[str, Any] = ocdbt.read_index(str(step / "state"))
    change(index)
    [file] = (step / "state" / "d").iterdir()
    values: Mapping[str, bytes | Extent] = index
    data, manifest = ocdbt.make_index(values, f"d/{file.name}")
    rewrite(step, f"state/d/{file.name}", data)
    rewrite(step, "state/manifest.ocdbt", manifest)


def with_chunks(meta: dict[str, Any], shape: list[int]) -> dict[str, Any]:
    [sharding] = meta["codecs"]
    inner = sharding["configuration"] | {"chunk_shape": shape}
    return meta | {
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
        "codecs": [sharding | {"configuration": inner}],
    }


VALUES = {"name": "bytes", "configuration": {"endian": "little"}}
OTHERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a chunk of 2 GiB": lambda meta: with_chunks(meta, [1 << 16, 1 << 13]),
    "that in gzip": lambda meta: (
        with_chunks(meta, [1 << 29, 8])
        | {"codecs": [VALUES, {"name": "gzip", "configuration": {"level": 1}}]}
    ),
    "another shape": lambda meta: meta | {"shape": [1 << 20, 8]},
    "another type": lambda meta: meta | {"data_type": "complex128"},
    "a type of any size": lambda meta: meta | {"data_type": "r8000000000"},
    "an unknown codec": lambda meta: meta | {"codecs": [VALUES, {"name": "blosc"}]},
    "no chunks": lambda meta: with_chunks(meta, [0, 0]),
    "chunks that are not there": lambda meta: with_chunks(meta, [1, 1]),
    "no object": lambda meta: [],
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", ["w", "key"])
def test_an_array_that_is_described_otherwise_than_it_was_saved_is_not_read(
    run: Path, name: str, kind: str
) -> None:
    def change(index: dict[str, Any]) -> None:
        meta = json.loads(index[f"{name}/zarr.json"])
        index[f"{name}/zarr.json"] = json.dumps(OTHERS[kind](meta)).encode()

    rewrite_index(run / "2", change)
    with dd.Checkpointer(run) as ckpt:
        restored = ckpt.try_restore()
        assert restored is not None and restored.step == 1
        assert f"The array {name}, " in restored.report.refused["step 2"]
        with pytest.raises(errors.CorruptStepError, match=f"The array {name}, .* was not read"):
            ckpt.restore(step=2)


@pytest.mark.parametrize(
    ("shape", "is_one"),
    [((3, 2), True), ((3, 4, 8), True), ((3,), False), ((2, 2), False), ((3, 1 << 20), False)],
)
def test_keys_of_a_kind_that_jax_does_not_have_itself_are_keys(
    shape: tuple[int, ...], is_one: bool
) -> None:
    leaf = LeafSpec(("keys",), "key_data", (3,), "a kind of its own")
    stored = direct.StoredArray("keys", shape, np.dtype("uint32"), shape, [])
    assert fits(stored, leaf) == is_one


@pytest.mark.parametrize(
    ("length", "told"), [(2000, "chunks of [65536]"), (1 << 16, "zarr.json has 66")]
)
def test_a_description_in_a_file_is_checked_too(run: Path, length: int, told: str) -> None:
    """As one of more than 1 KiB is."""

    def change(index: dict[str, Any]) -> None:
        meta = with_chunks(json.loads(index["key/zarr.json"]), [1 << 16])
        text = json.dumps(meta | {"attributes": {"a": "x" * length}}).encode()
        (run / "2" / "state" / "x").write_bytes(text)
        index["key/zarr.json"] = Extent("x", 0, len(text))

    rewrite_index(run / "2", change)
    with dd.Checkpointer(run) as ckpt:
        restored = ckpt.try_restore()
    assert restored is not None
    assert told in restored.report.refused["step 2"]


def test_an_array_of_zarr2_beside_the_saved_one_is_checked_too(run: Path) -> None:
    """Orbax reads the one that `_METADATA` tells of."""
    old = {"zarr_format": 2, "shape": [8, 8], "chunks": [1 << 29, 8], "dtype": "<f4"}
    old |= {"compressor": None, "filters": None, "fill_value": None, "order": "C"}

    def change(index: dict[str, Any]) -> None:
        meta = json.loads(index["w/zarr.json"])
        index["w/zarr.json"] = json.dumps(meta | {"attributes": {}}).encode()
        index["w/.zarray"] = json.dumps(old).encode()
        for key in [key for key in index if key.startswith("w/c/")]:
            del index[key]  # so that it is left to Orbax

    rewrite_index(run / "2", change)
    with dd.Checkpointer(run) as ckpt:
        restored = ckpt.try_restore()
    assert restored is not None
    assert ".zarray has chunks" in restored.report.refused["step 2"]


@pytest.mark.parametrize("zarr3", [False, True])
def test_a_step_of_plain_orbax_is_read_unless_its_chunks_are_larger_than_its_arrays(
    tmp_path: Path, zarr3: bool
) -> None:
    state = make_state(1) | {"text": "abc", "number": 2.5, "i4": jax.numpy.ones(4, "int4")}
    del state["key"]
    handler = ocp.PyTreeCheckpointHandler(use_zarr3=zarr3)
    with ocp.CheckpointManager(tmp_path / "run", item_handlers=handler) as manager:
        manager.save(5, args=ocp.args.PyTreeSave(state))
        manager.wait_until_finished()
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        restored = ckpt.restore().state
        assert restored.pop("text") == state.pop("text")
        assert all(np.array_equal(restored[name], state[name]) for name in state)
        place = tmp_path / "run" / "5" / "default"
        index: dict[str, Any] = ocdbt.read_index(str(place))
        name = "w/zarr.json" if zarr3 else "w/.zarray"
        meta = json.loads(index[name])
        huge = [1 << 29, 8]
        other = with_chunks(meta, huge) if zarr3 else meta | {"chunks": huge}
        index[name] = json.dumps(other).encode()
        data, manifest = ocdbt.make_index(index, "d/index")
        (place / "d" / "index").write_bytes(data)
        (place / "manifest.ocdbt").write_bytes(manifest)
        with pytest.raises(errors.CorruptStepError, match=r"The array w, .*536870912"):
            ckpt.restore()


@pytest.mark.parametrize(
    "codecs",
    [
        [],
        [{"name": "crc32c"}],
        [VALUES, VALUES],
        [VALUES, {"name": "zstd"}, {"name": "gzip"}],
        [VALUES, {"name": "crc32c"}, {"name": "zstd"}],
        [{"name": "transpose"}, VALUES],
        [{"name": "sharding_indexed", "configuration": {}}],
        "bytes",
        [None],
    ],
)
def test_codecs_that_nobody_writes_are_refused(codecs: Any) -> None:
    meta = {
        "shape": [4],
        "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4]}},
        "codecs": [VALUES, {"name": "zstd"}, {"name": "crc32c"}],
    }
    assert direct.describe_stored(json.dumps(meta).encode(), "zarr.json")[0] == (4,)
    with pytest.raises(ValueError, match="not known"):
        direct.describe_stored(json.dumps(meta | {"codecs": codecs}).encode(), "zarr.json")


# Files that Orbax reads as a whole

READ_WHOLE = ("state/_METADATA", "state/array_metadatas/process_0", "state/manifest.ocdbt")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", READ_WHOLE)
def test_a_file_that_orbax_reads_whole_is_not_larger_than_it_writes_it(
    run: Path, name: str, level: Any
) -> None:
    path = run / "2" / name
    rewrite(run / "2", name, path.read_bytes() + b" " * (2 << 20))
    with dd.Checkpointer(run, options=dd.Options(verify_on_restore=level)) as ckpt:
        restored = ckpt.try_restore()
    assert restored is not None and restored.step == 1
    assert f"{name}: it has 2" in restored.report.refused["step 2"]


def test_what_orbax_writes_grows_with_the_tree_and_is_let_through(tmp_path: Path) -> None:
    shape = (1,) * 12
    names = ["ä" * 40, "0", "a"]
    state = {"a": [{f"{name}{i}": jax.numpy.zeros(shape) for name in names} for i in range(10)]}
    with dd.Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, state=state).result()
        tree = (tmp_path / "1" / "TREE.json").stat().st_size
        for name in READ_WHOLE[:2]:
            assert (tmp_path / "1" / name).stat().st_size < 10 * tree


def test_it_is_not_in_a_bucket_either() -> None:
    store, data = MemoryBucket(), b" " * (2 << 20)
    store.put("7/state/manifest.ocdbt", data)
    files = [fmt.FileEntry("state/manifest.ocdbt", len(data), fmt.digest(data, "md5"))]
    for level in ("sizes", "full"):
        [told] = verify_files(store, "7", files, level).values()
        assert "it has 2097152 bytes" in told
