"""The state as a tree of leaves: what each leaf is, what Orbax is given for it, and how it comes
back.

Orbax stores arrays. Leaves that it cannot store exactly (bytes, big ints, zero-size arrays, host-
local arrays of a job with many hosts) are stored in another shape or in `TREE.json`, which also
keeps every leaf's exact type, so that a state comes back as it was, with or without a target.
Whatever Orbax is given keeps the tree's own structure and names, so the `state` item still loads
with plain Orbax.
"""

from __future__ import annotations

import cmath
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax._src.array import ArrayImpl
from jax.sharding import SingleDeviceSharding
from jax.tree_util import DictKey

from datarax_dist import codec
from datarax_dist import format as fmt
from datarax_dist.errors import StructureMismatchError, UnsupportedLeafError
from datarax_dist.specs import LeafSpec, Path, TreeSpec, is_storable

__all__ = [
    "StatePlan",
    "bound_like",
    "can_be",
    "check_depth",
    "children_of",
    "fits",
    "is_nameless",
    "match",
    "placed",
    "plain_key",
    "plan_state",
    "refuse_to_cut",
    "tree_digest",
    "would_be_cut",
]

_NAMELESS = (jax.tree_util.FlattenedIndexKey, jax.tree_util.SequenceKey)
_SMALL = ("int2", "uint2", "int4", "uint4")
_UNSTORABLE = (
    *("int1", "uint1", "uint2", "uint4", "float8_e4m3", "float6_e2m3fn", "float6_e3m2fn"),
    *("float96", "float128", "complex192", "complex256"),
)
_OF_64_BITS = ("int64", "uint64", "float64", "complex128")
_MOST_DEPTH = 200  # Python's and JAX's stacks end at a few hundred
_MOST_DIMENSIONS = 31  # of numpy's: TensorStore has 32, and Orbax needs one
_MOST_NAME_BYTES = (1 << 16) - 1  # TensorStore's limit, of an array's name and what is added to it


@dataclass(frozen=True, slots=True)
class StatePlan:
    """What is to be saved.

    Attributes:
        spec: the structure and its leaves.
        arrays: the tree that Orbax is given.
        local_digests: leaf number -> crc32c, for the leaves that must be equal on all hosts.
    """

    spec: TreeSpec
    arrays: Any
    local_digests: Mapping[int, str]


def plain_key(key: Any) -> Any:
    """Returns what is written of a key of a dict: what is equal to it, of a type of Python's or
    numpy's, or else its text.
    """
    if key is None or type(key) in (str, int, float, bool, bytes):
        return key
    if isinstance(key, np.generic):
        return key if key.dtype.kind in "biufcSU" else str(key)
    if isinstance(key, tuple):
        parts = tuple(map(plain_key, key))
        return parts if parts == key else str(key)
    for kind in (str, int, float, bytes):
        if isinstance(key, kind):  # a member of an enumeration, say
            return _BASES[kind](key)
    return str(key)


_BASES: Mapping[type, Callable[[Any], Any]] = {
    str: str.__str__,
    int: int.__int__,
    float: float.__float__,
    bytes: lambda key: b"".join((key,)),
}


def _part(key: Any) -> str:
    if isinstance(key, DictKey):
        return str(plain_key(key.key))
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def flatten(tree: Any) -> list[tuple[Path, Any]]:
    """Returns the leaves of a tree with their paths.

    Raises:
        UnsupportedLeafError: JAX cannot put the keys of a dict in order, or it is nested too deep.
    """
    try:
        check_depth(tree)
        pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    except ValueError as error:
        raise UnsupportedLeafError(
            f"JAX cannot walk through this state ({error}): a dict in it has keys of several types."
            " Use one type, str or int.",
            path="",
        ) from error
    return [(tuple(_part(key) for key in path), leaf) for path, leaf in pairs]


def check_depth(tree: Any, is_leaf: Callable[[Any], bool] = lambda _: False) -> None:
    """Raises for containers that are nested so deep that Python's stack could end within them: JAX
    may then crash the process, or leave it a stack that stays full.

    Raises:
        UnsupportedLeafError: it is nested too deep.
        ValueError: JAX cannot put the keys of a dict in order.
    """
    insides = jax.tree_util.default_registry.flatten_one_level
    # By identity, or one that holds itself twice would have no end. Each has where it was found.
    levels: list[dict[int, tuple[Any, int, int]]] = [{0: (tree, 0, 0)}]
    is_endless = False
    while levels[-1]:
        if is_endless or len(levels) > _MOST_DEPTH + 1:
            name = "/".join(_path_to(next(iter(levels[-1])), levels))
            raise UnsupportedLeafError(
                f"{name[:200]}...: a state is nested at most {_MOST_DEPTH} deep. Is there a list"
                " in it that holds the next one, and so on? Make one list of them.",
                path=name,
            )
        level = {}
        for here, (node, _, _) in levels[-1].items():
            inside = None if is_leaf(node) else insides(node)
            for number, child in enumerate(inside[0] if inside else ()):
                level[id(child)] = (child, here, number)
        is_endless = level.keys() == levels[-1].keys()  # each is in one of them
        levels.append(level)


def _path_to(here: int, levels: list[dict[int, tuple[Any, int, int]]]) -> Path:
    path = []
    for level, above in zip(levels[:0:-1], levels[-2::-1], strict=True):
        _, there, number = level[here]
        pairs, _ = jax.tree_util.default_registry.flatten_one_level_with_keys(above[there][0])
        path.append(_part(list(pairs)[number][0]))
        here = there
    return tuple(reversed(path))


_dtype_name = functools.lru_cache(256)(str)  # numpy makes it anew each time


def _dtype_text(dtype: Any) -> str:
    return _dtype_name(dtype) if isinstance(dtype, np.dtype) else str(dtype)


def is_key(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    try:
        return dtype is not None and jax.numpy.issubdtype(dtype, jax.dtypes.prng_key)
    except TypeError:  # of another library
        return False


def _describe_leaf(path: Path, leaf: Any, hosts: int) -> tuple[LeafSpec, Any, bytes | None]:
    """Returns the spec of a leaf, what Orbax is given, and the bytes that must be equal on all
    hosts, if any.
    """
    name = "/".join(path)
    dtype = _dtype_text(getattr(leaf, "dtype", ""))
    if dtype in _UNSTORABLE or isinstance(leaf, np.ma.MaskedArray):
        what = "masked array" if isinstance(leaf, np.ma.MaskedArray) else f"array of {leaf.dtype}"
        raise UnsupportedLeafError(
            f"{name}: a {what} cannot be saved. Convert it to another type first.", path=name
        )
    if isinstance(leaf, jax.Array):
        if isinstance(leaf, jax.core.Tracer):
            raise UnsupportedLeafError(
                f"{name}: the array has no values yet, since JAX is tracing. Save outside of what"
                " is jitted.",
                path=name,
            )
        if leaf.is_deleted():
            raise UnsupportedLeafError(
                f"{name}: the array has been deleted. Was it donated to a jitted function? Save"
                " what that function has returned.",
                path=name,
            )
        if hosts > 1 and not leaf.sharding.addressable_devices:
            raise UnsupportedLeafError(
                f"{name}: the array is on devices of other hosts only, and each host must hold a"
                " part. Place it over all of them (replicated, say) to save it.",
                path=name,
            )
        local = hosts > 1 and leaf.is_fully_addressable
        if is_key(leaf):
            impl = jax.random.key_impl(leaf)
            if not isinstance(impl, str):
                raise UnsupportedLeafError(
                    f"{name}: JAX finds the implementation of this PRNG key, {impl!r}, by no name."
                    " Save jax.random.key_data(key), and wrap what is restored.",
                    path=name,
                )
            if not local and leaf.size:
                return LeafSpec(path, "key", leaf.shape, impl), leaf, None
            if not leaf.size:  # it may be one of all hosts, whose numbers no host has
                return (
                    LeafSpec(path, "empty", leaf.shape, f"key:{impl}"),
                    _placeholder("key", leaf.shape),
                    b"",
                )
            data = np.asarray(jax.random.key_data(leaf))
            return LeafSpec(path, "key_data", leaf.shape, impl, local=True), data, data.tobytes()
        if not leaf.size:
            spec = LeafSpec(path, "empty", leaf.shape, dtype, "jax", local, leaf.weak_type)
            return spec, _placeholder(leaf.dtype, leaf.shape), None
        if local:
            data = np.asarray(leaf)
            return (
                LeafSpec(path, "jax", leaf.shape, dtype, local=True, weak=leaf.weak_type),
                data,
                data.tobytes(),
            )
        return LeafSpec(path, "jax", leaf.shape, dtype, weak=leaf.weak_type), leaf, None
    if isinstance(leaf, np.ndarray | np.generic):
        if isinstance(leaf, np.ndarray) and type(leaf) not in (np.ndarray, np.memmap):
            raise UnsupportedLeafError(
                f"{name}: a {type(leaf).__module__}.{type(leaf).__qualname__} would come back as a"
                " plain numpy array. Save np.asarray(it), and what else it has beside it.",
                path=name,
            )
        if not is_storable(leaf.dtype):
            raise UnsupportedLeafError(
                f"{name}: a numpy array of dtype {leaf.dtype} cannot be saved. Convert it to"
                " numbers, or to a list of str (.tolist()).",
                path=name,
            )
        kind = "numpy" if isinstance(leaf, np.ndarray) else "scalar"
        array = np.asarray(leaf)
        if not array.size:
            return (
                LeafSpec(path, "empty", array.shape, str(array.dtype), "numpy"),
                _placeholder(array.dtype, array.shape),
                b"",
            )
        if array.ndim > _MOST_DIMENSIONS:
            raise UnsupportedLeafError(
                f"{name}: a numpy array of {array.ndim} dimensions; Orbax writes"
                f" {_MOST_DIMENSIONS} at most. Reshape it.",
                path=name,
            )
        return LeafSpec(path, kind, array.shape, str(array.dtype)), array, array.tobytes()
    if type(leaf) in (bool, int, float, complex, str, bytes):
        try:
            value = codec.encode(leaf)
        except codec.EncodeError as error:
            raise UnsupportedLeafError(f"{name}: {error}", path=name) from None
        given: Any = leaf
        if type(leaf) is bytes:
            given = _bytes_array(leaf) if leaf else ""
        elif (type(leaf) is int and not -(1 << 31) <= leaf < 1 << 31) or type(leaf) is complex:
            given = str(leaf)  # Orbax's own scalars would be cut to 32 bits without x64
        return LeafSpec(path, type(leaf).__name__, value=value), given, fmt.dumps(value)
    raise UnsupportedLeafError(
        f"{name or 'the state'}: a {type(leaf).__module__}.{type(leaf).__qualname__} cannot be"
        " saved. A state has jax and numpy arrays, typed PRNG keys, numbers, str, bytes and None,"
        f" in containers that JAX knows. {_instead(leaf)}",
        path=name,
    )


def _instead(leaf: Any) -> str:
    if isinstance(leaf, bytearray):
        return "Give bytes."
    if isinstance(leaf, set | frozenset):
        return "Give a sorted list."
    if hasattr(leaf, "get_state") or hasattr(leaf, "state_dict"):
        return "A loader goes to `data`."
    if callable(leaf):
        return "Leave functions out: of an optimizer its state is saved, what its init() gave."
    return "Let the state have what it is made of, or its text."


def _bytes_array(data: bytes) -> np.ndarray[Any, Any]:
    return np.frombuffer(data, np.uint8).copy()


def _placeholder(dtype: Any, shape: Sequence[int]) -> str:
    return f"datarax_dist: zero-size array {dtype}{list(shape)}"


def plan_state(state: Any, hosts: int) -> StatePlan:
    """Plans how to save `state` in a job with `hosts` hosts.

    Raises:
        UnsupportedLeafError: a leaf cannot be saved, is nested too deep, has too long a name, or
            two leaves have one name. `.path` names it.
    """
    specs, given, digests = [], [], {}
    seen: dict[str, Path] = {}
    for number, (path, leaf) in enumerate(flatten(state)):
        spec, value, common = _describe_leaf(path, leaf, hosts)
        name = ".".join(path)
        _check_length(spec, name)
        for stored in (name, name.removesuffix("/")):  # TensorStore puts no second slash there
            if (clash := seen.setdefault(stored.replace("/", "."), path)) is not path:
                raise UnsupportedLeafError(
                    f"{spec.name}: another leaf, {'/'.join(clash)}, has the same name in the"
                    " checkpoint. Rename one of them.",
                    path=spec.name,
                )
        specs.append(spec)
        given.append(value)
        if common is not None and hosts > 1:
            digests[number] = fmt.crc_text(fmt.crc32c(spec.kind.encode() + common))
    texts = {".".join(s.path): n for n, s in enumerate(specs) if isinstance(given[n], str)}
    for name, number in texts.items():
        # Orbax has all texts in one file, where it takes a name for a place: none is in another.
        above = itertools.accumulate(name.split("/")[:-1], "{}/{}".format)
        if "~" in name or any(text in texts for text in above):
            given[number] = _bytes_array(given[number].encode(errors="surrogatepass") or b"\0")
    whole = TreeSpec(_structure(state), specs)
    return StatePlan(whole, whole.for_orbax(given), digests)


def _check_length(spec: LeafSpec, name: str) -> None:
    """Raises where a key of the array is too long: its name with `/zarr.json`, or with `/c` and the
    numbers of a chunk.
    """
    added = 20 + sum(len(str(size)) + 1 for size in spec.shape)
    if len(name.encode(errors="surrogatepass")) + added > _MOST_NAME_BYTES:
        raise UnsupportedLeafError(
            f"{spec.name[:200]}...: the name of this leaf, its keys joined, is too long: storage"
            f" takes {_MOST_NAME_BYTES - added} bytes. Use shorter keys.",
            path=spec.name,
        )


def _structure(tree: Any) -> Any:
    """Returns the containers of a tree as JSON, with the names that Orbax gives their children."""
    numbers = itertools.count()

    def walk(node: Any) -> Any:
        treedef: Any = jax.tree.structure(node)
        data = treedef.node_data()
        if data is None:
            return next(numbers) if treedef.num_leaves else {"none": 0}
        kind, _ = data
        if kind is type(None):
            return {"none": 0}
        pairs, _ = jax.tree_util.default_registry.flatten_one_level_with_keys(node)
        keys, children = [key for key, _ in pairs], [walk(child) for _, child in pairs]
        if kind is list or kind is tuple:
            return {kind.__name__: children}
        names = [_part(key) for key in keys]
        if issubclass(kind, Mapping) and all(isinstance(key, DictKey) for key in keys):
            _check_keys([key.key for key in keys], names)
            written = [_key_name(key.key) for key in keys]
            return {"dict": [list(pair) for pair in zip(written, children, strict=True)]}
        if issubclass(kind, tuple) and hasattr(kind, "_fields"):
            names = list(kind._fields)
        elif keys and all(isinstance(key, _NAMELESS) for key in keys):
            return {"list": children}  # a class that gives its children no names
        _check_keys([], names)
        named = [list(pair) for pair in zip(names, children, strict=True)]
        return {"node": f"{kind.__module__}.{kind.__qualname__}", "children": named}

    return walk(tree)


def _check_keys(keys: Sequence[Any], names: Sequence[str]) -> None:
    """Raises for keys with which a container could not be read again."""
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UnsupportedLeafError(
            f"Two keys of a container have the same name, {twice!r}. Rename one of them.", path=""
        )
    try:
        codec.check_keys(keys)
    except codec.DecodeError as error:
        raise UnsupportedLeafError(f"A dict cannot be saved: {error}.", path="") from None


def _key_name(key: Any) -> Any:
    try:
        return codec.encode(plain_key(key))
    except codec.EncodeError as error:
        text = f"The key {key!r} of a dict cannot be saved: {error}. Rename it."
        raise UnsupportedLeafError(text, path="") from None


def fits(spec: TreeSpec, target: Any) -> bool:
    """Whether a target has just the leaves that were saved, each of a kind that can take them."""
    leaves = dict(flatten(target))
    return {leaf.path for leaf in spec.leaves} == leaves.keys() and all(
        can_be(leaf, leaves[leaf.path]) for leaf in spec.leaves
    )


def can_be(saved: LeafSpec, target: Any) -> bool:
    """Whether what was saved can come back as a target wants it."""
    return _difference(saved, target) is None


def children_of(node: Any) -> list[tuple[str, Any]] | None:
    """Returns what a container has in it, by the names that paths have; None for a leaf or None."""
    treedef: Any = jax.tree.structure(node)
    data = treedef.node_data()
    if data is None or data[0] is type(None):
        return None
    pairs, _ = jax.tree_util.default_registry.flatten_one_level_with_keys(node)
    names = getattr(node, "_fields", None) if isinstance(node, tuple) else None
    names = names or [_part(key) for key, _ in pairs]
    return [(name, child) for name, (_, child) in zip(names, pairs, strict=True)]


def is_nameless(node: Any) -> bool:
    """Whether a container is of a class that gives its children no names, as a list."""
    if children_of(node) is None or type(node) is tuple or hasattr(node, "_fields"):
        return False
    pairs, _ = jax.tree_util.default_registry.flatten_one_level_with_keys(node)
    return all(isinstance(key, _NAMELESS) for key, _ in pairs)


def match(spec: TreeSpec, target: Any) -> list[tuple[LeafSpec, Any]]:
    """Returns for each leaf of `target` what was saved for it, in the target's order.

    Raises:
        StructureMismatchError: leaves are missing, or differ in shape or type; with the difference
            by tree path.
    """
    saved = {leaf.path: leaf for leaf in spec.leaves}
    pairs, missing, changed = [], [], {}
    wanted = set()
    for path, leaf in flatten(target):
        wanted.add(path)
        found = saved.get(path)
        name = "/".join(path)
        if found is None:
            missing.append(name)
        elif reason := _difference(found, leaf):
            changed[name] = reason
        else:
            pairs.append((found, leaf))
    if not missing and not changed:
        return pairs
    unexpected = sorted(leaf.name for leaf in spec.leaves if leaf.path not in wanted)
    lines = [f"  ! {name}: {reason}" for name, reason in changed.items()]
    lines += [
        f"  + {name}: in the target, not in the step" if name else "  + the target is one leaf"
        for name in missing
    ]
    # What is missing may be there by another name. Else it is no error that the step has more.
    more = [f"  - {name}: in the step, not in the target" for name in unexpected]
    shown = _shortened(lines, 50) + (_shortened(more, 10) if missing else [])
    if unexpected and not missing:
        shown.append(f"  (not asked for, which is allowed: {len(unexpected)} more of the step)")
    raise StructureMismatchError(
        "\n".join(["The target does not fit what was saved:", *shown])
        + "\nRestore without a target (state=None) to see all of it, or change the target.",
        missing=missing,
        unexpected=unexpected,
        changed=changed,
    )


def _shortened(lines: Sequence[str], most: int) -> list[str]:
    left = len(lines) - most
    return [*lines[:most], *([f"  ... and {left} more"] if left > 0 else [])]


def _difference(saved: LeafSpec, leaf: Any) -> str | None:
    """Says how a target leaf differs from what was saved, or None."""
    if is_key(leaf):
        impl = (
            str(jax.random.key_impl(leaf))
            if isinstance(leaf, jax.Array)
            else str(getattr(leaf.dtype, "_impl", ""))
        )
        impl = getattr(getattr(leaf.dtype, "_impl", None), "name", impl)
        if saved.kind not in ("key", "key_data") and not saved.dtype.startswith("key:"):
            return f"saved as {_text(saved)}, the target is a PRNG key"
        if saved.dtype.removeprefix("key:") != impl:
            return f"saved as a PRNG key of {saved.dtype}, the target is one of {impl}"
        return (
            None
            if tuple(leaf.shape) == saved.shape
            else f"saved as {_text(saved)}, the target has shape {tuple(leaf.shape)}"
        )
    if isinstance(leaf, bool | int | float | complex | str | bytes) and not isinstance(
        leaf, np.generic
    ):
        kind = type(leaf).__name__
        if saved.kind in (kind, f"foreign_{kind}") or (
            saved.kind == "int" and kind == "float" and _exact(saved, float)
        ):
            return None
        if (
            saved.kind in ("jax", "numpy", "scalar")
            and saved.shape == ()
            and kind == _PYTHON_KINDS.get(np.dtype(saved.dtype).kind, "float")
        ):
            return None
        return f"saved as {_text(saved)}, the target is a {kind}"
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return f"saved as {_text(saved)}, the target is a {type(leaf).__name__}"
    try:
        shape, dtype = tuple(leaf.shape), _dtype_text(np.dtype(leaf.dtype))
    except TypeError:  # of another library
        return f"saved as {_text(saved)}, the target is a {type(leaf).__name__}"
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and _is_cut(dtype):
        return (
            f"saved as {_text(saved)}, the target is an array of {dtype}, which JAX would cut to 32"
            " bits; set jax_enable_x64, or give a numpy array as the target"
        )
    if saved.kind in ("int", "float", "bool", "complex") and shape == ():
        if _exact(saved, np.dtype(leaf.dtype).type):
            return None
        return f"saved as a {saved.kind}, which a {dtype} cannot hold exactly"
    if saved.kind not in ("jax", "numpy", "scalar", "empty") or saved.dtype.startswith("key:"):
        return f"saved as {_text(saved)}, the target is an array"
    if shape != saved.shape:
        return f"saved with shape {list(saved.shape)}, the target has {list(shape)}"
    if dtype != saved.dtype:
        return (
            f"saved as {saved.dtype}, the target is {dtype}; restore it as it was saved, then cast"
        )
    return None


_PYTHON_KINDS = {"b": "bool", "i": "int", "u": "int", "f": "float", "c": "complex"}


def _exact(saved: LeafSpec, kind: Callable[[Any], Any]) -> bool:
    """Whether `kind` can hold the value of an inline number: as it is, or as the nearest float."""
    value = codec.decode(saved.value)
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            held = np.asarray(kind(value))
    except (OverflowError, TypeError, ValueError):
        return False
    is_float = held.dtype.kind == "f" or held.dtype.name.startswith(("bfloat", "float"))
    if isinstance(value, bool) != (held.dtype.kind == "b"):
        return False
    if isinstance(value, float | complex):
        is_alike = held.dtype.kind == "c" if isinstance(value, complex) else is_float
        kinds = [(cmath.isfinite(x), cmath.isnan(x)) for x in (complex(held), value)]
        return is_alike and kinds[0] == kinds[1]
    # By Python, which compares as they are: numpy would have the value cut, too.
    return bool((float(held) if is_float else held.item()) == value)


def _text(saved: LeafSpec) -> str:
    if saved.kind in ("key", "key_data"):
        return f"a PRNG key of {saved.dtype}{list(saved.shape)}"
    return (
        f"{saved.dtype}{list(saved.shape)}"
        if saved.dtype
        else f"a {saved.kind.removeprefix('foreign_')}"
    )


def finish_leaf(spec: LeafSpec, value: Any, target: Any = None) -> Any:
    """Returns a leaf as it was saved, or as the target wants it. `value` is what Orbax restored.

    Raises:
        InvalidRecordError: what `TREE.json` says of it cannot be.
    """
    try:
        value = _as_saved(spec, value)
    except (TypeError, ValueError) as error:
        raise fmt.InvalidRecordError(f"{fmt.TREE_NAME}: {spec.name}: {error}") from error
    value = bound_like(target, _as_wanted(spec, value, target))
    return as_weak(spec, value) if getattr(target, "weak_type", True) else value


def as_weak(spec: LeafSpec, array: Any) -> Any:
    """Returns an array with a dtype as weak as it was: what is computed after a restore has the
    dtypes that it would have had. JAX has no public way that computes nothing: one of all hosts.
    """
    if not spec.weak or getattr(array, "weak_type", True):
        return array
    aval = array.aval.update(weak_type=True)
    return ArrayImpl(aval, array.sharding, array._arrays, committed=array.committed)


def bound_like(target: Any, value: Any) -> Any:
    """Returns a restored array free to go where a computation needs it, where the target's is, as
    `jnp.zeros(())` is: the counter of a fresh state, say, which one that is bound to a device could
    not replace.
    """
    if isinstance(target, jax.Array) and isinstance(value, jax.Array) and not target.committed:
        return _uncommitted(value)
    return value


def _uncommitted(array: Any) -> Any:
    """JAX has no public way that does not copy."""
    if is_key(array):
        data, impl = jax.random.key_data(array), jax.random.key_impl(array)
        return jax.random.wrap_key_data(_uncommitted(data), impl=impl)
    if not array.committed or len(array.sharding.device_set) > 1:
        return array
    return ArrayImpl(array.aval, array.sharding, array._arrays, committed=False)


def placed(array: np.ndarray[Any, Any], sharding: Any) -> jax.Array:
    """Returns a numpy array that all hosts have as a `jax.Array`. Where the sharding is one of
    several hosts, `jax.device_put` would have their devices compare what they are given: a
    computation in which this host would wait for one that fails, or for its next computation.
    """
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    kind = sharding.memory_kind
    return jax.make_array_from_single_device_arrays(
        array.shape,
        sharding,
        [
            jax.device_put(array[part], SingleDeviceSharding(device, memory_kind=kind))
            for device, part in sharding.addressable_devices_indices_map(array.shape).items()
        ],
        dtype=jax.dtypes.canonicalize_dtype(array.dtype),
    )


def _as_wanted(spec: LeafSpec, value: Any, target: Any) -> Any:
    if spec.kind == "empty" and is_key(value):
        return value
    sharding = getattr(target, "sharding", None)
    if spec.kind == "empty" and sharding is not None:
        return placed(np.asarray(value), sharding)
    if target is None or isinstance(target, jax.Array | jax.ShapeDtypeStruct):
        if isinstance(target, jax.ShapeDtypeStruct | jax.Array) and not isinstance(
            value, jax.Array
        ):
            return placed(np.asarray(value, target.dtype), sharding)
        if spec.local and spec.kind == "jax" and not would_be_cut(spec):  # read as numpy
            return jax.numpy.asarray(value)
        return value
    if type(target) in (bool, int, float, complex):
        return type(target)(np.asarray(value)[()])
    if isinstance(target, np.generic):
        return np.asarray(value, target.dtype)[()]
    if isinstance(target, np.ndarray):
        return np.asarray(value, target.dtype)
    return value


def _as_saved(spec: LeafSpec, value: Any) -> Any:
    if spec.kind == "empty":
        return _empty(spec)
    if spec.inline:
        return codec.decode(spec.value)
    if spec.kind == "scalar" and not isinstance(value, jax.Array):
        return np.asarray(value)[()]
    if spec.kind == "key_data":
        return jax.random.wrap_key_data(jax.numpy.asarray(value), impl=spec.dtype)
    if spec.dtype.startswith((">", "<")) and isinstance(value, np.ndarray):
        return value.astype(spec.dtype)  # TensorStore reads all in this machine's order of bytes
    return value


def _empty(spec: LeafSpec) -> Any:
    if spec.dtype.startswith("key:"):
        impl = spec.dtype.removeprefix("key:")
        width = jax.random.key_data(jax.random.key(0, impl=impl)).shape
        return jax.random.wrap_key_data(
            jax.numpy.zeros((*spec.shape, *width), np.uint32), impl=impl
        )
    array = np.zeros(spec.shape, np.dtype(spec.dtype))
    return jax.numpy.asarray(array) if spec.value == "jax" else array


def _is_cut(dtype: str) -> bool:
    return dtype in _OF_64_BITS and not jax.config.read("jax_enable_x64")


def needs_x64(spec: LeafSpec) -> bool:
    """A `jax.Array` of 64 bits, which JAX would cut to 32 bits without `jax_enable_x64`."""
    return spec.kind == "jax" and spec.dtype in _OF_64_BITS


def would_be_cut(spec: LeafSpec) -> bool:
    """Whether it cannot be a `jax.Array` here."""
    return spec.kind == "jax" and _is_cut(spec.dtype)


def refuse_to_cut(spec: LeafSpec) -> None:
    """Raises `StructureMismatchError` for what cannot be the `jax.Array` that it was."""
    if would_be_cut(spec):
        raise StructureMismatchError(
            f"{spec.name} is a jax.Array of {spec.dtype}, which JAX would cut to 32 bits. Set"
            " jax_enable_x64, or give a numpy array as its target.",
            missing=[],
            unexpected=[],
            changed={spec.name: f"saved as {spec.dtype}, jax_enable_x64 is off"},
        )


def tree_digest(tree: Any) -> str:
    """Returns a digest of all leaves of `tree`, the same for every sharding, mesh and number of
    hosts.

    Collective: in a job with many hosts, call it on every host. Each array's bits are mixed with
    their positions and summed (mod 2^32, two independent mixes), which does not depend on how the
    array is split.

    >>> import numpy as np
    >>> tree_digest({"a": np.arange(3)}) == tree_digest({"a": np.arange(3)})
    True
    """
    parts: list[Any] = []
    for path, leaf in sorted(flatten(tree), key=lambda pair: pair[0]):
        if is_key(leaf):
            impl = str(jax.random.key_impl(leaf))
            bits = _mix(jax.random.key_data(leaf)) if leaf.size else [0, 0]
            parts.append(["/".join(path), "key", impl, list(leaf.shape), bits])
        elif isinstance(leaf, jax.Array | np.ndarray | np.generic):
            array = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
            bits = _mix(array) if array.size else [0, 0]
            parts.append(["/".join(path), "array", str(array.dtype), list(array.shape), bits])
        else:
            parts.append(["/".join(path), type(leaf).__name__, codec.encode(leaf)])
    data = fmt.dumps(parts)
    return f"{fmt.crc_text(fmt.crc32c(data))}{fmt.crc_text(fmt.crc32c(data[::-1]))}"


def _mix(array: Any) -> list[int]:
    if isinstance(array, np.ndarray):
        array = array.astype(np.uint8) if str(array.dtype) in _SMALL else array
        raw = np.ascontiguousarray(array).view(np.uint8).reshape(array.size, -1)
        words = _mix_words(raw, np)
    else:
        words = _mix_jax()(array)
    return [
        int(np.asarray(w.addressable_data(0) if hasattr(w, "addressable_data") else w))
        for w in words
    ]


def _bytes_of(array: Any) -> Any:
    """Returns the bytes of a `jax.Array`, those of each number along a last dimension. No dimension
    is joined with another: where a mesh has explicit axes, JAX refuses to do so with split ones.
    """
    if str(array.dtype) == "float4_e2m1fn":
        array = jax.lax.bitcast_convert_type(array, jax.numpy.uint4)
    if array.dtype == jax.numpy.bool_ or str(array.dtype) in _SMALL:
        return array.astype(jax.numpy.uint8)  # bool, and integers of less than a byte
    if jax.numpy.issubdtype(array.dtype, jax.numpy.complexfloating):
        array = jax.numpy.stack([array.real, array.imag], -1)
    return jax.lax.bitcast_convert_type(array, jax.numpy.uint8)


def _mix_words(raw: Any, xp: Any) -> tuple[Any, Any]:
    """Mixes each byte with its place in the order of C."""
    place, stride = xp.uint32(0), 1
    for axis in reversed(range(raw.ndim)):
        shape = [1] * raw.ndim
        shape[axis] = raw.shape[axis]
        numbers = xp.arange(raw.shape[axis], dtype=xp.uint32).reshape(shape)
        place = place + numbers * xp.uint32(stride % (1 << 32))
        stride *= raw.shape[axis]
    totals = []
    for seed in (0x9E3779B1, 0x85EBCA77):
        word = ((place + xp.uint32(seed & 0xFFFF)) * xp.uint32(seed)) ^ (
            raw.astype(xp.uint32) * xp.uint32(0xC2B2AE3D)
        )
        word = (word ^ (word >> 15)) * xp.uint32(0x27D4EB2F)
        word = word ^ (word >> 13)
        totals.append(xp.sum(word, dtype=xp.uint32))
    return totals[0], totals[1]


_mix_cache: list[Callable[..., Any]] = []


def _mix_jax() -> Callable[..., Any]:
    if not _mix_cache:
        _mix_cache.append(jax.jit(lambda array: _mix_words(_bytes_of(array), jax.numpy)))
    return _mix_cache[0]
