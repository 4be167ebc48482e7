"""Fuzzes everything that parses what storage holds, guided by coverage (atheris, on libFuzzer).

    python tests/fuzz_records.py --seconds 30

Each input is tried as it is, and, when it is a JSON object, once more with a right checksum:
nothing that is only damaged would get past that. Exit codes: 0 no crash, 1 a finding (its input is
printed), 3 atheris cannot be imported. tests/test_hostile.py asks the same parsers with Hypothesis.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FINDING, NO_ATHERIS = 1, 3
_DIGEST = "0123abcd-0123abcd"
_ROW = {"path": "state/d/1", "size": 5, "digest": _DIGEST}
_RUN = {"run": "a" * 32, "step": 7, "nonce": "b" * 16}
_LEAF = {"kind": "jax", "shape": [2, 3], "dtype": "float32", "value": None, "local": False}


@dataclass(frozen=True)
class Parser:
    """A parser, what it may raise, and bodies that it accepts."""

    parse: Callable[[bytes], Any]
    errors: tuple[type[Exception], ...]
    bodies: tuple[Mapping[str, Any], ...]
    sealed: bool = True


def _describe_array(name: str) -> Callable[[bytes], Any]:
    """Returns what takes the description of an array, as a file of that name, for all that reads
    it.
    """
    from datarax_dist import direct
    from datarax_dist.ocdbt import Extent

    def parse(data: bytes) -> Any:
        chunks: dict[str, bytes | Extent] = {f"a/c/{i}": Extent("d/x", 0, 40) for i in range(3)}
        found = direct.parse_array("a", {"a/zarr.json": data, **chunks})
        assert found is None or len(found.chunks) <= len(chunks)
        shape, kind, chunk = direct.describe_stored(data, name)
        assert isinstance(kind, str)
        assert all(0 < part <= max(size, 1) for size, part in zip(shape, chunk, strict=True))

    return parse


def _read_index(data: bytes) -> Any:
    """Reads a database of these nodes, without what seals them. They are told of as JSON."""
    import tensorstore as ts

    from datarax_dist import ocdbt

    body = json.loads(data)
    if not isinstance(body, dict) or not isinstance(body.get("nodes"), list):
        raise ValueError("not what is read here")
    nodes = [ocdbt._seal(bytes.fromhex(str(node))) for node in [*body["nodes"]][:100]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "d").mkdir()
        (folder / "d" / "x").write_bytes(b"".join(nodes))
        (folder / "manifest.ocdbt").write_bytes(ocdbt.make_index({"a": b"1"}, "d/x")[1])
        told = ts.ocdbt.dump(ts.KvStore.open(f"file://{folder}/").result()).result()
        newest = told["versions"][-1]
        newest["root_height"], newest["root"]["location"] = body.get("height"), body.get("root")
        try:
            manifest = ts.ocdbt.undump_manifest(told)
        except Exception as error:
            raise ValueError("no manifest can say so") from error
        (folder / "manifest.ocdbt").write_bytes(manifest)
        return ocdbt.read_index(name)


def _databases() -> tuple[Mapping[str, Any], ...]:
    """Returns what `_read_index` accepts: a leaf; and one below another node."""
    from datarax_dist import ocdbt

    leaf = ocdbt._leaf_node([(b"a/c/0", ocdbt.Extent("d/x", 3, 4)), (b"a/zarr.json", b"{}")])
    root = ocdbt._interior_node([ocdbt._Node(b"a/c/0", leaf, 2)], "d/x")
    nodes = [node[14:-4].hex() for node in (leaf, root)]
    return (
        {"nodes": nodes[:1], "root": f"btreenode::d/x:0:{len(leaf)}", "height": 0},
        {"nodes": nodes, "root": f"btreenode::d/x:{len(leaf)}:{len(root)}", "height": 1},
    )


def parsers() -> dict[str, Parser]:
    """Returns every parser of what storage holds, by the name of what it parses."""
    import ml_dtypes  # noqa: F401 - its types have names then
    import numpy as np

    from datarax_dist import codec, direct
    from datarax_dist import format as fmt
    from datarax_dist.errors import FormatVersionError
    from datarax_dist.specs import parse_tree

    known = (fmt.InvalidRecordError, FormatVersionError)
    record = fmt.host_record_name(0, 1)
    tree = {
        "structure": {
            "dict": [
                ["a", 0],
                ["b", {"list": [1, {"none": 0}, {"tuple": [2]}]}],
                [{"$int": "99999999999999999999"}, {"node": "m.C", "children": [["x", 3]]}],
            ]
        },
        "leaves": [
            {"path": ["a"], **_LEAF},
            {"path": ["b", "0"], **_LEAF, "kind": "int", "shape": [], "dtype": "", "value": 3},
            {"path": ["b", "2", "0"], **_LEAF, "kind": "empty", "shape": [0, 3], "value": "numpy"},
            {"path": ["c", "x"], **_LEAF, "kind": "key", "shape": [], "dtype": "threefry2x32"},
        ],
    }
    position = {"item": "data", "shard": 0, "count": 1, "loader": {"seed": 1}}
    values = (
        {"a": {"$tuple": [1, {"$bytes": "AAE="}]}, "b": {"$float": "nan"}},
        {"a": {"$array": {"dtype": "<f4", "shape": [1], "data": "AAAAAA=="}}},
        {
            "a": {
                "$dict": [[1, {"$int": "99999999999999999999"}]],
            }
        },
        {"$complex": [1.0, {"$float": "inf"}]},
    )
    return {
        "RUN.json": Parser(fmt.parse_run, known, ({"run": "a" * 32, "created_at": 1.5},)),
        "STEP.json": Parser(
            fmt.parse_claim, known, ({**_RUN, "hosts": 1, "writer": {"pid": 1}, "created_at": 1},)
        ),
        "COMMIT.json": Parser(
            fmt.parse_marker,
            known,
            (
                {
                    **_RUN,
                    "epoch": 0,
                    "hosts": 1,
                    "records": [{**_ROW, "path": record}],
                    "bytes": 5,
                    "items": ["data/data", "state"],
                    "committed_at": 1.5,
                    "versions": {"jax": "1"},
                },
            ),
        ),
        "void": Parser(fmt.parse_void, (), ({**_RUN, "void": "c" * 16, "at": 2.0},)),
        "host record": Parser(
            lambda data: fmt.parse_record(data, record),
            known,
            ({**_RUN, "host": 0, "hosts": 1, "files": [_ROW], "seconds": {"arrays": 0.5}},),
        ),
        "lease": Parser(
            lambda data: fmt.parse_lease(data, "lease"),
            known,
            (
                {
                    "run": "a" * 32,
                    "epoch": 3,
                    "nonce": "b" * 16,
                    "owner": {"machine": "m", "pid": 1, "started": "2", "name": "host"},
                    "ttl_seconds": 60.0,
                    "renewals": 4,
                    "released": False,
                    "deleting": [{"step": 1, "digest": _DIGEST}],
                },
            ),
        ),
        "attempt": Parser(
            lambda data: fmt.parse_attempt(data, f"1.restoring-{'c' * 16}"),
            known,
            (
                {
                    **_RUN,
                    "step": 1,
                    "nonce": "c" * 16,
                    "marker": _DIGEST,
                    "hosts": 1,
                    "writer": {"pid": 1},
                    "created_at": 1.5,
                    "timeout_seconds": 60.0,
                },
            ),
        ),
        "TREE.json": Parser(parse_tree, known, (tree,)),
        "index": Parser(
            lambda data: fmt.parse_position_index(data, "index.json"),
            known,
            ({"kind": "shards", "count": 2, "fingerprint": {}, "batches": 3, "rows": None},),
        ),
        "position": Parser(
            lambda data: fmt.parse_position(data, "shard.json"),
            known,
            (
                {**position, "state": {"at": 3}, "ended": True},
                {**position, "state": 1, "blobs": [{"size": 600, "digest": _DIGEST}]},
            ),
        ),
        "metadata": Parser(
            lambda data: fmt.parse_metadata(data, "metadata"), known, ({"loss": 0.5},), sealed=False
        ),
        "value": Parser(
            lambda data: codec.decode(json.loads(data)),
            (codec.DecodeError, ValueError, RecursionError),  # those of json itself
            values,
            sealed=False,
        ),
        "zarr.json": Parser(
            _describe_array("zarr.json"),
            (ValueError,),
            (json.loads(direct.describe_array((6,), np.dtype("float32"), (2,)) or b""),),
            sealed=False,
        ),
        ".zarray": Parser(
            _describe_array(".zarray"),
            (ValueError,),
            (
                {"shape": [6], "dtype": "<f4", "chunks": [2], "compressor": {"id": "zstd"}},
                {"shape": [], "dtype": "bfloat16", "chunks": [], "compressor": None},
            ),
            sealed=False,
        ),
        "nodes": Parser(_read_index, (ValueError, OSError), _databases(), sealed=False),
    }


def seal(body: Mapping[str, Any]) -> bytes:
    """Returns `body` with a right checksum, whatever it is."""
    from datarax_dist import format as fmt

    full = {"format_version": 1, **body}
    full.pop("crc32c", None)
    return fmt.dumps({**full, "crc32c": fmt.crc_text(fmt.crc32c(fmt.dumps(full)))})


def attack(parser: Parser, data: bytes) -> bool:
    """Parses hostile bytes; returns whether they were accepted. Raises what is a defect."""
    try:
        parser.parse(data)
    except parser.errors:
        return False
    return True


def try_input(found: Mapping[str, Parser], data: bytes) -> None:
    """The first byte chooses a parser."""
    if not data:
        return
    parser = list(found.values())[data[0] % len(found)]
    attack(parser, data[1:])
    if not parser.sealed:
        return
    try:
        body = json.loads(data[1:])
        sealed = seal(body) if isinstance(body, dict) else b""
    except (ValueError, RecursionError):
        return
    attack(parser, sealed)


def _fuzz(arguments: list[str]) -> None:
    import atheris

    with atheris.instrument_imports(include=["datarax_dist"]):
        found = parsers()
    atheris.instrument_func(try_input)
    atheris.Setup([sys.argv[0], *arguments], lambda data: try_input(found, data))
    atheris.Fuzz()


def main() -> int:
    asked = argparse.ArgumentParser(description="Fuzzes the parsers of what storage holds.")
    asked.add_argument("--seconds", type=int, default=30)
    asked.add_argument("--libfuzzer", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = asked.parse_args()
    if arguments.libfuzzer is not None:
        _fuzz(arguments.libfuzzer)
        return 0
    try:
        import atheris  # noqa: F401 - whether it can be
    except ImportError as error:
        print(f"atheris cannot be imported ({error}); nothing was fuzzed: pip install atheris")
        return NO_ATHERIS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "seeds").mkdir()
        for number, parser in enumerate(parsers().values()):
            for n, body in enumerate(parser.bodies):
                seed = bytes([number]) + json.dumps(body).encode()
                (folder / "seeds" / f"{number}-{n}").write_bytes(seed)
        limits = ["-timeout=10", "-rss_limit_mb=2048", "-max_len=16384", "-print_final_stats=1"]
        command = [sys.executable, __file__, "--libfuzzer", f"-max_total_time={arguments.seconds}"]
        command += [*limits, f"-artifact_prefix={folder}/", str(folder / "seeds")]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=arguments.seconds + 120
        )
        for path in sorted(folder.glob("*-*")):
            data = path.read_bytes()
            kind = list(parsers())[data[0] % len(parsers())] if data else "?"
            print(done.stderr[-4000:])
            print(f"{path.name.split('-')[0]} in the parser of {kind}; the input: {data!r}")
            return FINDING
        runs = re.search(r"number_of_executed_units: *([0-9]+)", done.stderr)
        if done.returncode or runs is None:
            print(done.stderr[-4000:])
            print(f"the fuzzer ended with {done.returncode}")
            return FINDING
        print(f"{runs[1]} executions in {arguments.seconds} s, no crash")
        return 0


if __name__ == "__main__":
    sys.exit(main())
