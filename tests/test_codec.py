"""Values as tagged JSON: everything comes back as it was, and what is hostile is an error, soon."""

from __future__ import annotations

import json
import math
import sys
import time
import tracemalloc
from collections import OrderedDict
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from datarax_dist import codec
from datarax_dist import format as fmt
from datarax_dist.codec import DecodeError, Encoded, EncodeError, pack, unpack
from datarax_dist.specs import TreeSpec

keys = st.one_of(
    st.text(max_size=8),
    st.integers(),
    st.none(),
    st.binary(max_size=4),
    st.booleans(),
    st.floats(allow_nan=False),
    st.tuples(st.integers(0, 9), st.text(max_size=2)),
)
arrays = hnp.arrays(
    st.one_of(
        hnp.boolean_dtypes(),
        hnp.integer_dtypes(endianness="?"),
        hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
        hnp.complex_number_dtypes(endianness="?", sizes=(64, 128)),
        hnp.unicode_string_dtypes(endianness="?", min_len=1, max_len=4),
        hnp.byte_string_dtypes(min_len=1, max_len=4),
    ),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=20),
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**12_000) + 1, 2**12_000 - 1),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(),
    st.binary(max_size=2000),
    arrays,
    arrays.filter(lambda a: a.ndim == 0).map(lambda a: a[()]),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(st.sampled_from(["$int", "$", "blob", "a"]), inner, max_size=3),
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray | np.generic):
        little = a.dtype.newbyteorder("<")
        plain = np.ascontiguousarray(a, little).tobytes()
        return a.shape == b.shape and little == b.dtype and plain == b.tobytes()
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        typed = {(type(k), k): v for k, v in b.items()}
        return len(a) == len(b) and all(
            (type(k), k) in typed and same(v, typed[type(k), k]) for k, v in a.items()
        )
    if isinstance(a, float):
        return (a == b and math.copysign(1, a) == math.copysign(1, b)) or (a != a and b != b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    return bool(a == b)


def through_a_file(encoded: Encoded) -> Encoded:
    body = fmt.unseal(fmt.seal({"state": encoded.value}), "test")
    return Encoded(body["state"], encoded.blobs)


@settings(max_examples=400, deadline=None)
@given(values)
def test_a_value_comes_back_as_it_was_and_is_written_the_same_again(value: Any) -> None:
    encoded = pack(value)
    back = unpack(through_a_file(encoded))
    assert same(value, back)
    assert fmt.dumps(pack(back).value) == fmt.dumps(encoded.value)
    assert pack(back).blobs == encoded.blobs
    assert same(value, codec.decode(json.loads(fmt.dumps(codec.encode(value)))))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4"])
def test_the_dtypes_that_come_with_jax(dtype: str) -> None:
    array = np.arange(6).astype(getattr(ml_dtypes, dtype)).reshape(2, 3)
    assert same(array, unpack(through_a_file(pack(array))))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_prng_keys_of_jax_stay_keys(impl: str) -> None:
    keys = jax.random.split(jax.random.key(3, impl=impl), 4)
    back = unpack(through_a_file(pack({"keys": keys, "one": keys[1]})))
    assert str(jax.random.key_impl(back["keys"])) == impl
    assert jax.random.normal(back["one"]) == jax.random.normal(keys[1])
    assert (jax.random.key_data(back["keys"]) == jax.random.key_data(keys)).all()


def test_a_jax_array_becomes_numpys() -> None:
    back = unpack(pack({"x": jnp.arange(3, dtype=jnp.bfloat16)}))
    assert isinstance(back["x"], np.ndarray)
    assert back["x"].dtype == jnp.bfloat16


def test_later_changes_do_not_reach_what_was_packed() -> None:
    value = {"a": np.zeros(1000), "b": bytearray(1000), "c": [1]}
    encoded = pack(value)
    value["a"][:] = 1
    value["b"][0] = 1
    value["c"].append(2)
    back = unpack(encoded)
    assert not back["a"].any()
    assert back["b"] == bytes(1000)
    assert back["c"] == [1]


def test_the_order_of_a_dict_stays() -> None:
    for value in (OrderedDict(b=1, a=2), {"z": {"y": 1, "x": 2}, "a": 3}):
        back = unpack(through_a_file(pack(value)))
        assert list(back) == list(value)
        assert type(back) is dict
    assert list(back["z"]) == ["y", "x"]


def test_a_bytearray_stays_one() -> None:
    assert type(unpack(through_a_file(pack(bytearray(b"ab"))))) is bytearray


def test_a_blob_is_used_once_and_in_its_order() -> None:
    blob = {"dtype": "|u1", "shape": [4], "data": {"blob": 0}}
    for value, blobs in (
        ([{"$array": blob}] * 2, (b"1234",)),
        ([], (b"1234",)),
        ([{"$bytes": {"blob": 1}}, {"$bytes": {"blob": 0}}], (b"1", b"2")),
    ):
        with pytest.raises(DecodeError, match="blob"):
            unpack(Encoded(value, blobs))


class Custom:
    pass


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "path", "words"),
    [
        ({"a": [1, {"b": Custom()}]}, "a/1/b", "Custom"),
        ({"a": {3: Custom()}}, "a/3", "Custom"),
        ({"a": {Custom(): 1}}, "a/", "a key of type Custom"),
        ([lambda: 1], "0", "function"),
        ({"a": {1, 2}}, "a", "set"),
        ({"a": np.array([object()])}, "a", "dtype object"),
        ({"a": np.zeros(2, "i4,f4")}, "a", "dtype"),
        ({"a": np.ma.masked_array([1, 2], [0, 1])}, "a", "MaskedArray"),
        ({"a": np.array(["2020"], "datetime64[D]")}, "a", "dtype datetime64"),
        ({"a": 1 << 12_001}, "a", "bits"),
        ({"a": "\ud800"}, "a", "Unicode"),
        ({"a": nested(101)}, "a/", "nested deeper"),
    ],
)
def test_what_cannot_be_written_is_named_by_its_path(value: Any, path: str, words: str) -> None:
    with pytest.raises(EncodeError, match=words) as caught:
        pack(value)
    assert caught.value.path.startswith(path)
    assert str(caught.value).startswith(caught.value.path)


HOSTILE = [
    {"$pickle": "gASVAAAA"},
    {"$py/object": "os.system"},
    {"$tuple": 3},
    {"$tuple": {"a": 1}},
    {"$dict": {"a": 1}},
    {"$dict": [[1]]},
    {"$dict": [[{"$tuple": [[]]}, 1]]},
    {"$dict": [[[], 1]]},
    {"$int": "9" * 100_000},
    {"$int": 3},
    {"$int": "1_0"},
    {"$int": "0x10"},
    {"$float": "1e999"},
    {"$complex": [1]},
    {"$complex": ["1", "2"]},
    {"$bytes": "@@@"},
    {"$bytes": 4},
    {"$bytes": {"blob": 1}},
    {"$bytes": {"blob": -1}},
    {"$bytes": {"blob": True}},
    {"$bytes": {"blob": "0"}},
    {"$bytes": {}},
    {"$bytes": "", "x": 1},
    {"$array": {}},
    {"$array": {"dtype": "O", "shape": [1], "data": "AAAAAAAAAAA="}},
    {"$array": {"dtype": "<i4", "shape": [1 << 60], "data": ""}},
    {"$array": {"dtype": "<i4", "shape": [-1], "data": "AAAAAA=="}},
    {"$array": {"dtype": "<i4", "shape": [True], "data": "AAAAAA=="}},
    {"$array": {"dtype": "<i4", "shape": [1.0], "data": "AAAAAA=="}},
    {"$array": {"dtype": "<i4", "shape": [0] * 100, "data": ""}},
    {"$array": {"dtype": "<i4", "shape": 1, "data": "AAAAAA=="}},
    {"$array": {"dtype": "<i4,<i4", "shape": [1], "data": "AAAAAAAAAAA="}},
    {"$array": {"dtype": "<V4", "shape": [1], "data": "AAAAAA=="}},
    {"$array": {"dtype": "<M8[s]", "shape": [1], "data": "AAAAAAAAAAA="}},
    {"$array": {"dtype": ["a", "<i4"], "shape": [1], "data": "AAAAAA=="}},
    {"$array": {"dtype": "<U999999999", "shape": [1], "data": ""}},
    {"$array": {"dtype": "<i3", "shape": [], "data": "AAAA"}},
    {"$scalar": {"dtype": "bfloat16", "shape": [], "data": ""}},
    {"$torch": {"dtype": "__class__", "shape": [], "data": ""}},
    {"$torch": {"dtype": "load", "shape": [], "data": ""}},
    {"$key": {"impl": "os", "data": {"dtype": "<u4", "shape": [2], "data": "AAAAAAAAAAA="}}},
    {"$key": {"impl": 3, "data": {"dtype": "<u4", "shape": [2], "data": "AAAAAAAAAAA="}}},
    {"$key": {"impl": "threefry2x32", "data": {"dtype": "<u4", "shape": [1], "data": "AAAAAA=="}}},
    {"$": 1},
    {"$int": "1", "$float": "nan"},
    nested(300),
    {"$tuple": [nested(201)]},
]


@pytest.mark.parametrize("body", HOSTILE, ids=lambda body: repr(body)[:60])
def test_a_hostile_value_is_an_error(body: Any) -> None:
    with pytest.raises(DecodeError):
        codec.decode(body, blobs=[b"1234"])


# What a mutated file may look like: anything that JSON can say, with our tags in odd places.
tags = st.sampled_from(
    ["$int", "$float", "$complex", "$bytes", "$tuple", "$dict", "$array", "$scalar", "$key", "$x"]
)
fields = st.sampled_from(["dtype", "shape", "data", "impl", "blob", "a"])
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(["<i4", "<f8", "|b1", "<U9", "|S4", "bfloat16", "AAAA", "threefry2x32", "nan"]),
)
bodies = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(fields, inner, max_size=4),
        st.builds(lambda tag, body: {tag: body}, tags, inner),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["<i4", "<f8", "|b1", "<U2", "|S4", "bfloat16", "x"]),
                "shape": st.lists(st.integers(-2, 1 << 41), max_size=3),
                "data": st.one_of(st.sampled_from(["", "AAAAAAAAAAA=", "A"]), inner),
            }
        ).map(lambda body: {"$array": body}),
    ),
    max_leaves=15,
)


@settings(max_examples=1500, deadline=1000)
@given(bodies)
def test_whatever_is_read_is_a_value_or_an_error(body: Any) -> None:
    try:
        value = codec.decode(body, blobs=[b"12345678"])
    except DecodeError:
        return
    pack(value)


@settings(max_examples=300, deadline=1000)
@given(st.binary(max_size=300), st.randoms(use_true_random=False))
def test_a_position_file_of_random_bytes_is_an_error(noise: bytes, random: Any) -> None:
    good = fmt.seal({"item": "a", "shard": 0, "count": 1, "state": {"$tuple": [1, 2]}})
    at = random.randrange(len(good))
    for data in (noise, good[:at] + noise[:3] + good[at + 1 :], good[:at]):
        if data == good:
            continue
        with pytest.raises((fmt.InvalidRecordError, fmt.FormatVersionError)):
            fmt.parse_position(data, "shard")


@settings(max_examples=500, deadline=1000)
@given(
    st.dictionaries(
        st.sampled_from(["item", "shard", "count", "state", "ended", "loader", "blobs"]),
        st.one_of(scalars, st.lists(st.dictionaries(st.sampled_from(["size", "digest"]), scalars))),
    )
)
def test_a_sealed_file_of_the_wrong_types_is_an_error(body: dict[str, Any]) -> None:
    """Whoever can write to the root can also make a checksum."""
    try:
        data = fmt.seal(body)
    except (ValueError, UnicodeEncodeError):
        return
    for parse in (fmt.parse_position, fmt.parse_position_index):
        try:
            parse(data, "shard")
        except fmt.InvalidRecordError:
            pass


@pytest.mark.parametrize(
    "index",
    [
        {"kind": "other", "count": 1},
        {"kind": "shards", "count": 0},
        {"kind": "shards", "count": 1 << 30},
        {"kind": "shards", "count": "4"},
        {"kind": "global", "count": 1, "batches": -1},
        {"count": 1},
    ],
)
def test_an_impossible_index_is_an_error(index: dict[str, Any]) -> None:
    with pytest.raises(fmt.InvalidRecordError):
        fmt.parse_position_index(fmt.seal(index), "index")


@pytest.mark.parametrize("kind", ["int", "float", "tuple", "negative"])
def test_keys_that_were_made_to_hash_alike_are_an_error_soon(kind: str) -> None:
    """A dict of them takes the square of their number: 200,000 take minutes."""
    prime = sys.hash_info.modulus

    def key(number: int) -> Any:
        if kind == "float":
            return {"$complex": [float(-number * 1000003), float(number)]}
        if kind == "tuple":
            return {"$tuple": [{"$int": str(number * prime)}, 3]}
        return {"$int": str((-number if kind == "negative" else number) * prime)}

    pairs = [[key(number), number] for number in range(1, 20_001 if kind == "int" else 102)]
    with pytest.raises(DecodeError, match="same hash"):
        codec.decode({"a": {"$dict": pairs}})
    assert len(codec.decode({"$dict": pairs[:100]})) == 100


def test_keys_of_a_tree_that_were_made_to_hash_alike_are_an_error_soon() -> None:
    keys = [{"$int": str(number * sys.hash_info.modulus)} for number in range(5000)]
    structure = {"dict": [[key, {"none": None}] for key in keys]}
    with pytest.raises(fmt.InvalidRecordError, match="none of ours"):
        TreeSpec.from_json({"structure": structure, "leaves": []})
    good = {"dict": [[key, {"none": None}] for key in keys[:100]]}
    assert TreeSpec.from_json({"structure": good, "leaves": []}).leaves == ()


def test_large_and_many_keys_come_back() -> None:
    random = np.random.default_rng(0)
    numbers = [int(n) * 2**70 + int(n) for n in random.integers(1, 2**63, 20_000)]
    floats = [math.ldexp(1.5, exponent) for exponent in range(-1000, 1000)]
    for value in (dict.fromkeys(numbers, 0), dict.fromkeys(floats, 0), dict.fromkeys(range(5000))):
        assert unpack(through_a_file(pack(value))) == value


def test_hostile_files_cost_neither_time_nor_memory() -> None:
    deep = b"[" * 5_000_000
    wide = fmt.seal({"state": [{"$array": {"dtype": "<i4", "shape": [1 << 40], "data": ""}}] * 999})
    digits = b'{"state":' + b"9" * 5_000_000 + b"}"
    tracemalloc.start()
    begin = time.process_time()
    for data in (deep, digits):
        with pytest.raises(fmt.InvalidRecordError):
            fmt.parse_position(data, "shard")
    with pytest.raises(DecodeError):
        codec.decode(fmt.unseal(wide, "shard")["state"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - begin < 5
    assert peak < 64 << 20
