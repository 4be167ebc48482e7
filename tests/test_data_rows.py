"""How the rows of shards are joined, and which host owns which."""

from __future__ import annotations

import collections
import dataclasses
import functools
import gc
import operator
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

import jax
import loaders
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from datarax_dist.data import (
    replay,
    shards,
    tracked,
)
from datarax_dist.data.ownership import acting_as_host, own_by_rows
from datarax_dist.errors import (
    InvalidArgumentError,
    PositionError,
)


def test_rows_are_joined_leaf_by_leaf_and_columns_of_text_too() -> None:
    def batches(shard: int, count: int) -> Any:
        one = {
            "x": np.full((2, 3), shard),
            "y": [f"a{shard}", None],
            "pair": (np.ones(2), [b"c", b"d"]),
        }
        return replay(lambda: iter([one]))

    batch = next(shards(batches, 2))
    assert batch["x"].tolist() == [[0] * 3] * 2 + [[1] * 3] * 2
    assert batch["y"] == ["a0", None, "a1", None]
    assert batch["pair"][0].shape == (4,)
    assert batch["pair"][1] == [b"c", b"d"] * 2


def test_records_without_a_batch_axis_are_named() -> None:
    with pytest.raises(InvalidArgumentError, match="nothing with an axis of records"):
        next(shards(lambda s, n: replay(lambda: iter([np.int32(1)])), 2))


def test_lists_inside_a_batch_are_columns_and_a_list_of_arrays_is_a_batch_of_parts() -> None:
    def batches(shard: int, count: int) -> Any:
        tokens = [[shard], [shard, shard]]
        return replay(lambda: iter([{"t": tokens, "r": [np.arange(shard), np.arange(3)], "n": 7}]))

    batch = next(shards(batches, 2))
    assert batch["t"] == [[0], [0, 0], [1], [1, 1]]
    assert [len(row) for row in batch["r"]] == [0, 3, 1, 3]
    assert batch["n"] == 7
    pair = next(shards(lambda s, n: replay(lambda: iter([[np.ones(2), np.zeros((2, 5))]])), 2))
    assert [part.shape for part in pair] == [(4,), (4, 5)]


def test_jax_arrays_and_keys_are_joined_as_they_are() -> None:
    def batches(shard: int, count: int) -> Any:
        return replay(lambda: iter([{"k": jax.random.split(jax.random.key(shard), 2)}]))

    batch = next(shards(batches, 2))
    assert batch["k"].shape == (4,)
    assert jax.random.key_data(batch["k"][2]).tolist() == (
        jax.random.key_data(jax.random.split(jax.random.key(1), 2)[0]).tolist()
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda s: {"a": np.zeros(2, np.float32 if s else np.int64)}, "a has other dtypes"),
        (lambda s: {"a": np.zeros(2), **({"b": np.zeros(2)} if s else {})}, "0 and 1 have other"),
        (lambda s: {"a": np.zeros(2), "shard": s}, "shard has no axis of records, and other"),
    ],
)
def test_batches_that_do_not_fit_together_are_named(make: Any, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        next(shards(lambda s, n: replay(lambda: iter([make(s)])), 2))


def mixed_keys(k: int) -> Any:
    return {"x": np.full(2, k), 0: np.full(2, k)}


def nested(levels: int, k: int) -> Any:
    return functools.reduce(lambda inner, _: {"in": inner}, range(levels), np.full(2, k))


def holds_itself(k: int) -> Any:
    found = {"x": np.full(2, k)}
    found["me"] = found  # type: ignore[assignment]
    return found


class Refusing:
    """A node that JAX cannot look into."""


def _refuse(_: Any) -> Any:
    raise RuntimeError("not now")


jax.tree_util.register_pytree_node(Refusing, _refuse, _refuse)
UNSEEN: dict[str, Callable[[int], Any]] = {
    "keys": mixed_keys,
    "nested": functools.partial(nested, 300),
    "bottomless": functools.partial(nested, 3000),  # JAX would leave a stack that stays full
    "ring": holds_itself,
    "node": lambda _: [Refusing()],
}


@pytest.mark.parametrize("kind", UNSEEN)
def test_replay_takes_batches_that_jax_cannot_look_into(kind: str) -> None:
    made = [UNSEEN[kind](k) for k in range(3)]
    found = replay(lambda: iter(made))
    assert all(mine is theirs for mine, theirs in zip(found, made, strict=True))
    again = replay(lambda: iter(made))
    again.set_state({"batches": 2, "last": found.get_state()["last"]})
    assert next(again) is made[2]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("keys", "keys of a dict must have an order"),
        ("nested", "too deep"),
        ("bottomless", "too deep"),
        ("ring", "holds itself"),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_shards_say_what_is_wrong_with_batches_whose_rows_jax_cannot_find(
    kind: str, words: str, count: int
) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        next(shards(lambda s, n: Plain(map(UNSEEN[kind], range(3))), count))


def test_a_second_epoch_over_the_same_iterator_is_not_silently_empty() -> None:
    for loader in (shards(loaders.Stream, 4), tracked([np.ones(1)], 0)):
        assert len(list(loader)) > 0
        with pytest.raises(PositionError, match="This epoch has ended"):
            list(loader)


# Who owns what.


def test_hosts_that_hold_the_same_rows_own_the_same_shards() -> None:
    # Four hosts, a mesh of (data 2, model 2): 0 and 1 hold the first half, 2 and 3 the second.
    rows = {0: [(0, 4)], 1: [(0, 4)], 2: [(4, 8)], 3: [(4, 8)]}
    owned = [own_by_rows(4, rows, 8, host) for host in range(4)]
    assert [o.reads for o in owned] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [sorted(o.writes) for o in owned] == [[0, 1], [], [2, 3], []]


def test_a_host_that_needs_a_part_of_a_shard() -> None:
    rows = {host: [(host, host + 1)] for host in range(8)}
    with pytest.raises(PositionError, match=r"part of data shard 0 only.*multiples of 8"):
        own_by_rows(4, rows, 8, 0)
    with pytest.raises(PositionError, match="No host needs data shard 1"):
        own_by_rows(2, {0: [(0, 4)]}, 8, 0)


def test_a_sharding_gives_this_process_its_rows() -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
    for spec in (PartitionSpec("data"), PartitionSpec(("data", "model")), PartitionSpec()):
        loader = shards(loaders.Stream, 8, sharding=NamedSharding(mesh, spec))
        assert loader.owned() == list(range(8))
    with pytest.raises(InvalidArgumentError, match="NamedSharding"):
        shards(loaders.Stream, 8, sharding=PartitionSpec("data")).owned()


def test_values_without_rows_are_compared_to_the_last_bit() -> None:
    def batches(other: Any) -> Any:
        return shards(lambda s, n: replay(lambda: iter([(np.ones(1), (1.0, other)[s])])), 2)

    for same in (1.0, np.float64(1.0), np.array(1.0)):
        pair = shards(lambda s, n, same=same: replay(lambda: iter([(np.ones(1), same)])), 2)
        assert next(pair)[1] == 1.0
    nan = shards(lambda s, n: replay(lambda: iter([(np.ones(1), np.array(np.nan))])), 2)
    assert np.isnan(next(nan)[1])
    for a, b in (
        (np.array(0.123456789), np.array(0.123456789 + 1e-12)),
        (np.array(1.0), np.array(1.0, np.float32)),
        (jax.numpy.float32(0.1), jax.numpy.float32(0.1 + 1e-8)),
    ):
        pair = shards(lambda s, n, ab=(a, b): replay(lambda: iter([(np.ones(1), ab[s])])), 2)
        with pytest.raises(InvalidArgumentError, match="other values in other data shards"):
            next(pair)


def test_a_host_without_rows_is_told_so() -> None:
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("d",)), PartitionSpec("d"))
    with acting_as_host(1, 2):
        loader = shards(loaders.Stream, 8, sharding=sharding)
        with pytest.raises(PositionError, match="devices of this host hold no rows"):
            next(loader)


# Batches that wait while their loader writes into the same memory again.


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Any


class Named(NamedTuple):
    x: Any


class Tensor:
    """What is asked of a torch tensor."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def clone(self) -> Tensor:
        return Tensor(self.array.copy())

    def untyped_storage(self) -> Any:
        begin, size = self.array.__array_interface__["data"][0], self.array.nbytes
        return collections.namedtuple("Storage", ["data_ptr", "nbytes"])(
            lambda: begin, lambda: size
        )

    def __getitem__(self, at: int) -> Any:
        return self.array[at]


class Sparse(Tensor):
    def untyped_storage(self) -> Any:
        raise NotImplementedError("a sparse tensor has none")

    def clone(self) -> Sparse:
        return Sparse(self.array.copy())


class Plain:
    """A loader that does not look at its batches."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = iter(batches)
        self.at = 0

    def __iter__(self) -> Plain:
        return self

    def __next__(self) -> Any:
        self.at += 1
        return next(self.batches)

    def get_state(self) -> int:
        return self.at

    def set_state(self, state: int) -> None:
        self.at = state


def objects(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    found = np.empty(1, object)
    found[0] = array
    return found


class Bag(dict[str, Any]):
    """Its keys are its attributes."""

    def __init__(self, **items: Any) -> None:
        super().__init__(**items)
        self.__dict__ = self


@dataclasses.dataclass
class Derived:
    x: Any

    def __post_init__(self) -> None:
        self.first = self.x[:1]


class Tagged(Named):
    tag: Any


def tagged(x: Any) -> Tagged:
    found = Tagged(())
    found.tag = x
    return found


class Tuple(tuple[Any, ...]):
    __slots__ = ()


class Slotted(list[Any]):
    __slots__ = ("__private", "unset")

    def __init__(self, x: Any = ()) -> None:
        self.__private = x

    def held(self) -> Any:
        return self.__private


@jax.tree_util.register_pytree_node_class
class Node:
    def __init__(self, x: Any) -> None:
        self.x = x
        self.first = x[:1]

    def tree_flatten(self) -> Any:
        return ({"x": self.x},), self.first

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> Node:
        return cls(children[0]["x"])


class Once(dict[str, Any]):
    """What is there is not written again."""

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self:
            raise KeyError(key)
        super().__setitem__(key, value)


def once(x: Any) -> Once:
    found = Once()
    found["x"] = x
    return found


def itself(x: Any) -> Any:
    found: dict[str, Any] = {"x": x}
    found["me"] = (found,)
    return found


def row(x: Any) -> Any:
    return [x.view([("n", int)])[0]]


HOLDERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "array": (lambda x: x, lambda b: b),
    "view": (lambda x: x[::-1], lambda b: b),
    "dict": (lambda x: {"x": x}, lambda b: b["x"]),
    "user dict": (lambda x: collections.UserDict(x=x), lambda b: b["x"]),
    "list": (lambda x: {"x": [x, "text"]}, lambda b: b["x"][0]),
    "tuples": (lambda x: ({"x": (x,)},), lambda b: b[0]["x"][0]),
    "named": (Named, lambda b: b.x),
    "data class": (lambda x: [Frozen([x])], lambda b: b[0].x[0]),
    "objects": (objects, lambda b: b[0]),
    "node": (lambda x: jax.tree_util.Partial(print, x), lambda b: b.args[0]),
    "tensor": (lambda x: {"x": Tensor(x)}, lambda b: b["x"]),
    "sparse": (lambda x: [Sparse(x)], lambda b: b[0]),
    "tuple class": (lambda x: Tuple([x]), lambda b: b[0]),
    "attribute of a tuple": (tagged, lambda b: b.tag),
    "items that are attributes": (lambda x: Bag(x=x), lambda b: b.x),
    "derived attribute": (Derived, lambda b: b.first),
    "derived attribute of a node": (Node, lambda b: b.first),
    "slot": (Slotted, lambda b: b.held()),
    "written once": (once, lambda b: b["x"]),
    "holds itself": (itself, lambda b: b["me"][0]["x"]),
    "row": (row, lambda b: b[0]),
    "list without axes": (lambda x: objects([x]).reshape(()), lambda b: b.item()[0]),
    "user list": (lambda x: collections.UserList([x]), lambda b: b[0]),
    "deep": (lambda x: deep(49, x), lambda b: functools.reduce(lambda b, _: b[0], range(49), b)),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("depth", [2, 3, 5])
def test_what_waits_is_not_written_again_whatever_holds_it(holder: str, depth: int) -> None:
    hold, held = HOLDERS[holder]

    def batches() -> Iterator[Any]:
        ring = np.zeros((2, 2), int)
        for k in range(12):
            ring[k % 2] = k
            yield hold(ring[k % 2])

    found = [(type(batch), int(held(batch)[0])) for batch in tracked(Plain(batches()), depth)]
    assert found == [(type(hold(np.zeros(2))), k) for k in range(12)]


def bag_of_one() -> Any:
    bag: dict[str, Any] = {}
    return bag, lambda k: bag.update(x=np.full(2, k)), lambda b: b["x"][0]


def list_of_ints() -> Any:
    column = [0, 0]
    return column, lambda k: operator.setitem(column, slice(None), [k, k]), lambda b: b[0]


def column_of_objects() -> Any:
    column = np.empty(2, object)
    return column, lambda k: column.fill(np.full(2, k)), lambda b: b[0][0]


def object_of_attributes() -> Any:
    one = Derived(np.zeros(2))
    return one, lambda k: setattr(one, "first", k), lambda b: b.first


def some_bytes() -> Any:
    raw = bytearray(2)
    return raw, lambda k: operator.setitem(raw, 0, k), lambda b: b[0]


@pytest.mark.parametrize(
    "make", [bag_of_one, list_of_ints, column_of_objects, object_of_attributes, some_bytes]
)
@pytest.mark.parametrize("inside", [False, True])
def test_containers_that_are_filled_again_are_copied_while_they_wait(
    make: Any, inside: bool
) -> None:
    def batches() -> Iterator[Any]:
        for k in range(12):
            fill(k)
            yield {"in": (filled,)} if inside else filled

    filled, fill, read = make()
    found = tracked(replay(batches), 3)
    assert [int(read(b["in"][0] if inside else b)) for b in found] == list(range(12))


def test_a_mask_that_is_written_again_is_copied_while_it_waits() -> None:
    def batches() -> Iterator[Any]:
        mask = np.zeros(2, bool)
        for k in range(12):
            mask[:] = k % 2
            yield np.ma.MaskedArray(np.full(2, k), mask, copy=False)

    found = [bool(batch.mask[0]) for batch in tracked(replay(batches), 3)]
    assert found == [bool(k % 2) for k in range(12)]


def test_what_is_copied_is_what_it_was() -> None:
    def batch(k: int) -> Any:
        one = np.asfortranarray(np.full((2, 3), k))
        bag = Bag(x=one, same=one)
        return {"bag": bag, "again": [bag], "times": (one.T,)}

    found = tracked(replay(lambda: map(batch, range(4))), 3)
    for k, copy in enumerate(found):
        bag = copy["bag"]
        assert bag.x is bag.same is bag["x"]
        assert copy["again"][0] is bag
        assert bag.x.flags.f_contiguous
        bag.x = k
        assert bag["x"] == k


def test_what_is_written_once_is_handed_out_as_it_is() -> None:
    made = [{"x": np.full(2, k), "texts": ["a", None]} for k in range(12)]
    found = list(tracked(replay(lambda: iter(made)), 2))
    assert all(mine is theirs for mine, theirs in zip(found[4:], made[4:], strict=True))
    assert jax.tree.all(jax.tree.map(np.array_equal, found, made))


class Prefixed(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(f"x_{key}", value)


class Lower(collections.OrderedDict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key.lower(), value)


class Doubled(list[Any]):
    def append(self, item: Any) -> None:
        super().extend([item, item])

    def extend(self, items: Iterable[Any]) -> None:
        for item in items:
            self.append(item)


def ordered(kind: Any, *items: tuple[str, Any]) -> Any:
    found = kind()
    for key, item in items:
        (collections.OrderedDict if kind is Lower else dict).__setitem__(found, key, item)
    if kind is Lower:
        found.move_to_end(items[0][0])
    return found


@pytest.mark.parametrize("item", [1, "text", (1, 2)])
def test_a_copy_holds_the_same_whatever_its_class_does_with_what_it_is_given(item: Any) -> None:
    made = [
        *(ordered(kind, ("A", item), ("x_b", item)) for kind in (Prefixed, Lower, dict)),
        Doubled([item, item]),
        collections.Counter({"a": 2}),
        collections.OrderedDict(b=item, a=item),
    ]
    for copy, before in zip(tracked(Plain(made), len(made)), made, strict=True):
        assert copy is not before and type(copy) is type(before)
        assert (list(copy), repr(copy)) == (list(before), repr(before))


@dataclasses.dataclass
class Linked:
    x: Any
    back: Any = None


class Sealed(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("sealed")


class Refuses(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        raise NotImplementedError("no items are set")


class Appended(list[Any]):
    def __setitem__(self, key: Any, value: Any) -> None:
        raise AssertionError("only appended to")


class Single(list[Any]):
    def __copy__(self) -> Single:
        return self


class Proxy:
    """What it stands for is not there."""

    @property
    def __class__(self) -> Any:
        raise LookupError("not loaded yet")

    def __getattr__(self, name: str) -> Any:
        raise LookupError(name)


@dataclasses.dataclass
class Lazy:
    x: Any
    y: Any

    def loaded(self) -> Any:
        raise RuntimeError("not loaded yet")


Lazy.y = property(Lazy.loaded, lambda self, value: None)  # type: ignore[assignment]


@jax.tree_util.register_pytree_node_class
class Unmade:
    def tree_flatten(self) -> Any:
        return (np.ones(1),), None

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> Unmade:
        raise RuntimeError("not made of these")


def deep(levels: int, x: Any = ()) -> Any:
    return [deep(levels - 1, x), np.ones(1)] if levels else x


def odd_batches(kind: str) -> list[Any]:
    if kind == "back":
        made = [Linked(np.full(2, k)) for k in range(8)]
        for one in made:
            one.back = one
        return made
    makes: dict[str, Any] = {
        "struct": lambda k: time.gmtime(k),
        "sealed": lambda k: Sealed(x=np.full(2, k)),
        "refuses": lambda k: {"x": Refuses(x=np.full(2, k))},
        "appended": lambda k: Appended([np.full(2, k)]),
        "single": lambda k: Single([np.full(2, k)]),
        "proxy": lambda k: {"x": np.full(2, k), "p": Proxy()},
        "lazy": lambda k: Lazy(np.full(2, k), k),
        "unmade": lambda k: (Unmade(), [Unmade()]),
        "deep": lambda k: deep(300),
        "many": lambda k: [Linked(k) for _ in range(20_000)],
    }
    return [makes[kind](k) for k in range(8)]


@pytest.mark.parametrize(
    "kind",
    [
        *("back", "struct", "sealed", "deep", "many"),
        *("refuses", "appended", "single", "proxy", "lazy", "unmade"),
    ],
)
def test_what_cannot_be_made_of_its_parts_is_handed_out_as_it_is(kind: str) -> None:
    made = odd_batches(kind)
    found = list(tracked(Plain(made), 2))
    assert [type(batch) for batch in found] == [type(batch) for batch in made]
    assert found[-1] is made[-1]


class Sealing(list[Any]):
    """A copy of it can be begun, and not be finished."""

    _attributes: ClassVar[dict[str, Any]] = {}
    __dict__ = property(lambda self: self._attributes)  # type: ignore[assignment]


@pytest.mark.parametrize("make", [Unmade, Sealing])
def test_a_part_that_cannot_be_copied_is_the_same_one_wherever_it_is_held(make: Any) -> None:
    made = [{"part": make(), "inner": [np.full(2, k)]} for k in range(4)]
    for batch in made:
        batch["inner"].append(batch["part"])
    for mine, theirs in zip(tracked(Plain(made), 3), made, strict=True):
        assert mine["part"] is mine["inner"][1] is theirs["part"]
        assert mine["inner"][0] is not theirs["inner"][0]


def test_a_batch_for_whose_copy_there_is_no_memory_is_not_handed_out() -> None:
    class Large(Derived):
        def __copy__(self) -> Large:
            raise MemoryError

    with pytest.raises(MemoryError):
        next(tracked(Plain([Large(np.zeros(2))]), 3))


class Borrowed(Derived):
    def __copy__(self) -> Borrowed:
        found = object.__new__(Borrowed)
        found.__dict__ = self.__dict__
        return found


def test_what_its_loader_made_is_not_written_to_where_a_copy_is_not_another_one() -> None:
    single, borrowed = Single([np.zeros(2)]), Borrowed(np.zeros(2))
    before = [single[0], borrowed.x, borrowed.first]
    [(one, other)] = tracked(Plain([(single, borrowed)]), 3)
    assert all(map(operator.is_, [single[0], borrowed.x, borrowed.first], before))
    assert one is single
    assert other.x is not borrowed.x


def test_nothing_of_the_first_batches_is_kept_once_it_is_known_that_memory_is_used_again() -> None:
    kept = []

    def batches() -> Iterator[Any]:
        always = np.ones(2)
        for k in range(12):
            fresh = np.full(2, k)
            kept.append(weakref.ref(fresh))
            yield {"always": always, "fresh": fresh}
            del fresh

    loader = tracked(Plain(batches()), 3)
    for _ in range(8):
        next(loader)
    gc.collect()
    assert [one() for one in kept[:4]] == [None] * 4


def test_of_a_batch_of_very_many_parts_the_first_are_copied_and_the_user_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The first that hold their memory again: were others looked at, nobody would see that."""

    def batches() -> Iterator[Any]:
        first = [np.zeros(1, int) for _ in range(5000)]
        for k in range(12):
            for one in first:
                one[:] = k
            yield [*first, *(np.full(1, k) for _ in range(10_000))]

    found = [(int(b[0][0]), int(b[4999][0]), int(b[-1][0])) for b in tracked(replay(batches), 3)]
    assert found == [(k, k, k) for k in range(12)]
    told = [record for record in caplog.records if "more than 10000 parts" in record.getMessage()]
    assert len(told) == 1


@pytest.mark.parametrize("levels", [50, 51])
def test_a_batch_that_is_nested_too_deep_is_told_of(
    levels: int, caplog: pytest.LogCaptureFixture
) -> None:
    made = [deep(levels, np.ones(1)) for _ in range(4)]
    list(tracked(replay(lambda: iter(made)), 3))
    assert ("nested more than 50 deep" in caplog.text) == (levels > 50)


class Lent(np.ndarray[Any, Any]):
    """It has what must be given back once: its copies have it not."""

    def __array_finalize__(self, other: Any) -> None:
        self.slot: Any = None


def test_a_copy_has_no_attribute_that_its_class_does_not_give_it() -> None:
    made = [np.zeros(2).view(Lent) for _ in range(3)]
    for number, array in enumerate(made):
        array.slot = number
    first, *_ = tracked(Plain(made), 3)
    assert first is not made[0] and isinstance(first, Lent)
    assert (first.slot, made[0].slot) == (None, 0)


@jax.tree_util.register_pytree_node_class
class Closed:
    """A node that keeps what it is made of where nobody can look."""

    def __init__(self, inside: list[Any]) -> None:
        inside = list(inside)
        self.get = lambda: inside

    def tree_flatten(self) -> Any:
        return [self.get()], None

    @classmethod
    def tree_unflatten(cls, _: Any, inside: Any) -> Closed:
        return cls(*inside)


def test_a_node_is_made_of_what_is_copied_already() -> None:
    def batches() -> Iterator[Any]:
        buffer = np.zeros(1)
        for number in range(8):
            buffer[:] = number
            yield Closed([buffer])

    found = [batch.get()[0].item() for batch in tracked(Plain(batches()), 3)]
    assert found == list(range(8))


def test_a_part_that_cannot_be_copied_and_is_written_again_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def batches() -> Iterator[Any]:
        held = Unmade(), np.zeros(1)
        for number in range(8):
            held[1][:] = number
            yield {"part": held[0], "x": held[1]}

    for _ in tracked(Plain(batches()), 3):
        pass
    [record] = caplog.records
    assert "a part of a batch cannot be copied while it waits" in record.message
