"""What of a tree is read, with which types and placements."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint._src import asyncio_utils
from orbax.checkpoint._src.metadata import array_metadata, array_metadata_store

from datarax_dist import codec, direct
from datarax_dist.arrays.failures import wrapped
from datarax_dist.errors import (
    CorruptStepError,
    StorageError,
    StructureMismatchError,
    describe,
)
from datarax_dist.ocdbt import Extent
from datarax_dist.specs import LeafSpec, TreeSpec
from datarax_dist.trees import refuse_to_cut

__all__ = [
    "bytes_of",
    "check_kind",
    "check_stored",
    "default_sharding",
    "describe_foreign",
    "elsewhere",
    "fits",
    "restore_args",
    "spec_leaves",
    "want",
]

_MOST_DESCRIPTION_BYTES = 1 << 16  # of one array
_MOST_KEY_NUMBERS = 1 << 10  # of one PRNG key; JAX's own have at most 4


def restore_args(leaf: LeafSpec, target: Any) -> Any:
    if leaf.kind == "foreign_str":
        return ocp.RestoreArgs(restore_type=str)
    sharding = (
        getattr(target, "sharding", None)
        if isinstance(target, jax.Array | jax.ShapeDtypeStruct)
        else None
    )
    here = sharding is None or sharding.is_fully_addressable
    if leaf.kind == "key_data" or (here and (leaf.kind in ("numpy", "scalar") or leaf.local)):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    if isinstance(target, np.ndarray | np.generic | bool | int | float | complex):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    refuse_to_cut(leaf)
    if sharding is None:
        sharding = default_sharding(leaf.shape)
    else:
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError as error:
            raise StructureMismatchError(
                f"{leaf.name}: the target's sharding does not fit the saved shape"
                f" {list(leaf.shape)}: {error}",
                missing=[],
                unexpected=[],
                changed={leaf.name: str(error)},
            ) from error
    if leaf.kind == "key":
        return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding)
    return ocp.ArrayRestoreArgs(
        restore_type=jax.Array,
        sharding=sharding,
        global_shape=leaf.shape,
        dtype=np.dtype(leaf.dtype),
    )


def bytes_of(leaf: LeafSpec, wish: Any) -> int:
    """Bytes that Orbax reads of a leaf here."""
    sharding = getattr(wish, "sharding", None)
    itemsize = np.dtype(leaf.dtype).itemsize if leaf.kind != "key" and leaf.dtype else 8
    if sharding is None:
        return math.prod(leaf.shape) * itemsize
    parts = sharding.addressable_devices_indices_map(tuple(leaf.shape)).values()
    regions = {direct.region(part, leaf.shape) for part in parts if part is not None}
    return sum(math.prod(end - begin for begin, end in region) for region in regions) * itemsize


def fits(stored: direct.StoredArray, leaf: LeafSpec) -> bool:
    """Whether what is stored is what the leaf was, with nothing to convert."""
    if leaf.kind not in ("jax", "key_data", "numpy", "scalar"):
        return False
    return _is_as_saved(leaf, stored.shape, stored.dtype.name)


def check_stored(
    leaf: LeafSpec, name: str, index: Mapping[str, bytes | Extent], read: Callable[[Extent], bytes]
) -> None:
    """Raises where an array is not stored as the leaf that it was: Orbax would take as much memory
    as its description asks for, whatever was saved.

    Args:
        name: of the array, as Orbax has it.
        index: of the database.
        read: returns what a part of a file holds.
    """
    for file in ("zarr.json", ".zarray"):  # it is told elsewhere which of both Orbax reads
        _, text = direct.find_description(name, file, index)
        if text is None:
            continue
        try:
            size = text.length if isinstance(text, Extent) else len(text)
            if size > _MOST_DESCRIPTION_BYTES:
                raise ValueError(f"{file} has {size} bytes")
            text = read(text) if isinstance(text, Extent) else text
            shape, dtype, chunk = direct.describe_stored(text, file)
            if not _is_as_saved(leaf, shape, dtype):
                raise ValueError(f"{file} tells of {list(shape)} of {dtype}")
            if math.prod(-(-n // part) for n, part in zip(shape, chunk, strict=True)) > len(index):
                raise ValueError(f"{file} has more chunks than there are")
        except ValueError as error:
            raise CorruptStepError(
                f"The array {leaf.name}, {list(leaf.shape)} of {leaf.dtype}, is stored in another"
                f" way than it was saved: its {str(error)[:300]}. It was not read.",
                step=-1,
                files=["state"],
            ) from error


def _is_as_saved(leaf: LeafSpec, shape: tuple[int, ...], dtype: str) -> bool:
    if leaf.kind in ("key", "key_data") or not leaf.dtype:  # the numbers of each key
        keys, numbers = shape[: len(leaf.shape)], shape[len(leaf.shape) :]
        is_key = 0 < math.prod(numbers) <= _MOST_KEY_NUMBERS and dtype == "uint32"
        return keys == tuple(leaf.shape) and bool(numbers) and is_key
    return shape == tuple(leaf.shape) and dtype == np.dtype(leaf.dtype).name


def want(reading: direct.Reading, stored: direct.StoredArray, wish: Any) -> Callable[[], Any]:
    """Has this host's part of an array read; returns what makes the array afterwards."""
    if wish.restore_type is np.ndarray:
        whole = direct.Buffer(tuple((0, size) for size in stored.shape), stored.dtype)
        reading.want(stored, [whole])
        return lambda: whole.array
    sharding: jax.sharding.Sharding = wish.sharding
    parts = sharding.addressable_devices_indices_map(stored.shape).values()
    regions = {direct.region(part, stored.shape) for part in parts if part is not None}
    buffers = {region: direct.Buffer(region, stored.dtype) for region in regions}
    reading.want(stored, list(buffers.values()))
    return lambda: jax.make_array_from_callback(
        stored.shape,
        sharding,
        lambda part: buffers[direct.region(part or (), stored.shape)].array,
        dtype=stored.dtype,
    )


def elsewhere(leaf: LeafSpec, wish: Any) -> Callable[[], Any] | None:
    """Returns what makes an array of which this host has no part; None for another one. Neither JAX
    nor Orbax makes one by itself.
    """
    if not isinstance(wish, ocp.ArrayRestoreArgs) or leaf.kind == "key":
        return None
    if wish.sharding is None or wish.sharding.addressable_devices:
        return None
    return functools.partial(
        jax.make_array_from_single_device_arrays, leaf.shape, wish.sharding, [], dtype=wish.dtype
    )


def check_kind(leaf: LeafSpec, value: Any) -> None:
    """Raises when Orbax gives something else than was saved. It does where its array metadata could
    not be found: a typed PRNG key comes back as plain numbers.
    """
    found = getattr(value, "dtype", np.dtype("O"))
    is_key = jax.numpy.issubdtype(found, jax.dtypes.prng_key)
    impl = str(jax.random.key_impl(value)) if is_key else ""
    if impl != (leaf.dtype if leaf.kind == "key" else ""):
        kind = f"key ({leaf.dtype})" if leaf.kind == "key" else leaf.kind
        raise StorageError(
            f"{leaf.name} was saved as a {kind}, and Orbax reads it as {found}: its array"
            " metadata, which tells a typed PRNG key from plain numbers, cannot be read.",
            errno=None,
        )


def default_sharding(shape: Sequence[int]) -> jax.sharding.Sharding:
    """Returns how to place an array over all of today's devices: along the longest dimension that
    divides, or replicated.
    """
    devices = np.array(jax.devices())
    if devices.size == 1:
        return jax.sharding.SingleDeviceSharding(devices[0])
    mesh = jax.sharding.Mesh(devices, ("devices",))
    axes: list[str | None] = [None] * len(shape)
    fitting = [axis for axis, n in enumerate(shape) if n and n % devices.size == 0]
    if fitting:
        axes[max(fitting, key=lambda axis: shape[axis])] = "devices"
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))


def spec_leaves(spec: TreeSpec, tree: Any) -> list[Any]:
    """Returns the leaves of a tree that is as `spec.for_orbax` makes one, placeholders included, in
    the order of `spec`.
    """
    found: list[Any] = [None] * len(spec.leaves)

    def walk(structure: Any, node: Any) -> None:
        if isinstance(structure, int):
            found[structure] = node
            return
        for tag in ("list", "tuple"):
            for child, item in zip(structure[tag], node, strict=True) if tag in structure else ():
                walk(child, item)
        for key, child in structure.get("dict", ()):
            walk(child, node[str(codec.decode(key))])
        for name, child in structure.get("children", ()):
            walk(child, node[name])

    walk(spec.structure, tree)
    return found


def describe_foreign(path: str) -> TreeSpec:
    """Returns the structure of a state written by plain Orbax, from its own metadata. `path` is the
    item's directory.

    Raises:
        StructureMismatchError: it cannot be told which of its arrays are typed PRNG keys, or of
            which kind.
        StorageError: there is no state of Orbax here that can be read.
    """
    with wrapped("read", path):
        metadata = ocp.PyTreeCheckpointHandler().metadata(epath.Path(path))
        tree = getattr(metadata, "tree", metadata)
        impls = _foreign_keys(path)
        leaves: list[LeafSpec] = []

        def walk(node: Any, at: tuple[str, ...]) -> Any:
            if isinstance(node, dict):
                return {"dict": [[key, walk(item, (*at, str(key)))] for key, item in node.items()]}
            if isinstance(node, list | tuple):
                return {
                    "list" if isinstance(node, list) else "tuple": [
                        walk(item, (*at, str(i))) for i, item in enumerate(node)
                    ]
                }
            if node is None:
                return {"none": 0}
            leaves.append(_foreign_leaf(node, at, impls))
            return len(leaves) - 1

        structure = walk(tree, ())
        return TreeSpec(structure, leaves, is_foreign=True)


def _foreign_keys(path: str) -> dict[str, str]:
    """Returns the kind of each typed PRNG key in a state of plain Orbax, by the name of its array.
    Orbax stores keys as plain numbers, and notes the kind beside them.
    """
    try:
        store = array_metadata_store.Store()
        hosts = asyncio_utils.run_sync(store.read(epath.Path(path))) or {}
        # Of the host that Orbax asks; all hosts note the same.
        rows: list[Any] = next(iter(hosts.values()), [])
        noted = {row.param_name: row.ext_metadata or {} for row in rows}
        kinds = {name: more.get(array_metadata.RANDOM_KEY_IMPL) for name, more in noted.items()}
        return {name: str(impl) for name, impl in kinds.items() if impl}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # Not damage, for which an older step would be taken: the arrays themselves may be whole.
        told = "the array metadata, which tells typed PRNG keys from plain numbers, cannot be read"
        raise StructureMismatchError(
            f"{path}: {told}: {describe(error, 300)}", missing=[], unexpected=[], changed={}
        ) from error


def _foreign_key(path: tuple[str, ...], shape: tuple[int, ...], impl: str) -> LeafSpec:
    """Returns the leaf of a typed PRNG key. `shape` is that of its numbers."""
    try:
        numbers = jax.random.key_data(jax.random.key(0, impl=impl)).ndim
    except ValueError as error:
        name = "/".join(path)
        raise StructureMismatchError(
            f"{name} is a PRNG key of {impl}, which this program does not know: {error}",
            missing=[],
            unexpected=[],
            changed={name: f"saved as a PRNG key of {impl}"},
        ) from error
    return LeafSpec(path, "key", shape[: len(shape) - numbers], impl)


def _foreign_leaf(node: Any, path: tuple[str, ...], impls: Mapping[str, str]) -> LeafSpec:
    name = type(node).__name__
    shape = tuple(int(n) for n in getattr(node, "shape", None) or ())
    if impl := impls.get(getattr(node, "name", "")):
        return _foreign_key(path, shape, impl)
    dtype = str(np.dtype(node.dtype)) if getattr(node, "dtype", None) is not None else ""
    if "String" in name:
        return LeafSpec(path, "foreign_str")
    if "Scalar" in name:
        return LeafSpec(path, "scalar", (), dtype)
    if getattr(node, "sharding", None) is None and dtype:
        return LeafSpec(path, "numpy", shape, dtype)  # Orbax notes the sharding of a jax.Array only
    return LeafSpec(path, "jax", shape, dtype)
