"""The digest of a tree: the same however its arrays are split, and in every version."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from datarax_dist import tree_digest

SPLITS = [(), ("a",), (None, "b"), ("a", "b"), (("a", "b"),), (None, ("b", "a"))]
DTYPES = [
    *("bool", "int8", "uint16", "float32", "complex64", "bfloat16", "float8_e5m2"),
    *("int4", "uint2", "float4_e2m1fn"),
]


def numbers(dtype: str, shape: tuple[int, ...] = (8, 4)) -> Any:
    array = np.arange(np.prod(shape)).reshape(shape) % (7 if dtype in DTYPES[:7] else 2)
    return array.astype(np.int8).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_it_is_the_same_however_an_array_is_split(dtype: str, kind: AxisType) -> None:
    array = numbers(dtype)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"), axis_types=(kind, kind))
    placed = [jax.device_put(array, NamedSharding(mesh, PartitionSpec(*split))) for split in SPLITS]
    digests = {tree_digest({"a": other}) for other in [array, jax.numpy.asarray(array), *placed]}
    assert len(digests) == 1
    changed = array.copy()
    changed[3, 2] = 1 - int(array[3, 2] != 0)
    assert tree_digest({"a": jax.numpy.asarray(changed)}) not in digests


def test_keys_have_one_split_or_empty() -> None:
    keys = jax.random.split(jax.random.key(1), 8)
    mesh = jax.make_mesh((4,), ("a",), devices=jax.devices()[:4], axis_types=(AxisType.Explicit,))
    placed = jax.device_put(keys, NamedSharding(mesh, PartitionSpec("a")))
    assert tree_digest(keys) == tree_digest(placed) != tree_digest(keys[:0])
    assert tree_digest(keys[:0]) != tree_digest(keys.reshape(2, 4)[:0])


@pytest.mark.parametrize(
    ("leaf", "digest"),
    [
        (numbers("float32"), "d2ad4407e8a4320f"),
        (numbers("bool", (3, 5, 2)), "ece95bce6232289a"),
        (numbers("bfloat16", (40,)), "1d5943174b0a7522"),
        (numbers("complex64"), "dd003c79365955a8"),
        (numbers("int4"), "53715d36c6c4ea40"),
        (np.float64(2.5), "004ab59d3e1c4ae8"),
        (np.zeros((0, 3), np.float32), "959473c0ba410632"),
        (7, "3da1438bfbd6d283"),
    ],
)
def test_it_is_that_of_earlier_versions(leaf: Any, digest: str) -> None:
    assert tree_digest({"a": leaf}) == digest
    if isinstance(leaf, np.ndarray):
        assert tree_digest({"a": jax.numpy.asarray(leaf)}) == digest


def test_that_of_a_key_is_that_of_earlier_versions() -> None:
    assert tree_digest({"a": jax.random.key(3, impl="rbg")}) == "670d697ef8bf5faa"
