"""A restored value is the one that was saved: what a target cannot hold as it is, is refused."""

from __future__ import annotations

import datetime
import enum
import json
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.core import FrozenDict
from jax.extend.random import define_prng_impl
from targets import Thing

import datarax_dist as dd
from datarax_dist.checkpoint import OrbaxCheckpointHandler
from datarax_dist.errors import StructureMismatchError, UnsupportedLeafError
from datarax_dist.testing import run_hosts


def abstract(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("saved", "target"),
    [
        (np.int64(5_000_000_000), abstract((), np.int64)),
        (np.arange(3) + 2**33, abstract((3,), np.int64)),
        (np.array([0.1, 0.2]), abstract((2,), np.float64)),
        (2**40 + 3, abstract((), np.int64)),
        (0.1, abstract((), np.float64)),
    ],
    ids=str,
)
def test_64_bits_are_not_cut_for_an_abstract_target(
    tmp_path: Path, saved: Any, target: Any
) -> None:
    """As `jax.tree.map` makes one of a state that has numpy's numbers in it."""
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state={"a": saved}).result()
        with pytest.raises(StructureMismatchError, match="JAX would cut to 32 bits; set"):
            ckpt.restore(state={"a": target})
        with jax.enable_x64(True):
            restored = ckpt.restore(state={"a": target}).state["a"]
        assert restored.dtype == target.dtype
        np.testing.assert_array_equal(np.asarray(restored), saved)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (2**24 + 1, "float32"),
        (2**53 + 1, "float64"),
        (257, "bfloat16"),
        (17, "float8_e4m3fn"),
        (2**24 + 1, "complex64"),
        (1e300, "float32"),
        (1000.0, "float8_e4m3fn"),
        (-0.5, "float8_e8m0fnu"),
        (1e300j, "complex64"),
        (float("inf"), "float8_e4m3fn"),
    ],
)
def test_a_number_is_not_put_where_it_does_not_fit(tmp_path: Path, value: Any, dtype: str) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state={"a": value}).result()
        with pytest.raises(StructureMismatchError, match=f"a {dtype} cannot hold exactly"):
            ckpt.restore(state={"a": np.zeros((), dtype)})


@pytest.mark.parametrize(
    ("value", "dtype"), [(2**24, "float32"), (256, "bfloat16"), (0.1, "float32"), (1j, "complex64")]
)
def test_a_number_may_be_an_array_that_holds_it(tmp_path: Path, value: Any, dtype: str) -> None:
    """A float as the nearest one."""
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state={"a": value}).result()
        restored = ckpt.restore(state={"a": np.zeros((), dtype)}).state["a"]
    assert restored == np.asarray(value, dtype)


class Pair(NamedTuple):
    x: Any
    y: Any


class Letter(enum.StrEnum):
    A = "a"
    B = "b"

    def __str__(self) -> str:
        return f"Letter.{self.name}"


class Number(enum.IntEnum):
    ONE = 1
    TWO = 2


class OfAnotherLibrary:
    """An array of a type that numpy does not know."""

    class Type:
        pass

    shape, dtype = (2,), Type()

    def __repr__(self) -> str:
        return "of another library"


@pytest.mark.parametrize(
    ("saved", "fresh"),
    [
        ({"buffer": [], "pos": 7}, {"buffer": None, "pos": 0}),
        ({"buffer": None, "pos": 7}, {"buffer": [], "pos": 0}),
        ({"pending": {}, "pos": 7}, {"pos": 0}),
        ({"a": [3, 4]}, {"a": (0, 0)}),
        ({"a": {0: 3, 1: 4}}, {"a": [0, 0]}),
        ({"a": {0: 3}}, {"a": {"0": 0}}),
        ({"a": 3}, {"a": 0.0}),
        ({"a": np.int32(3)}, {"a": 0}),
        ({"a": {np.int64(3): 1, np.int64(4): 2}}, {}),
        ({"a": {None: 1}}, {}),
        ({"a": None}, {"a": OrderedDict()}),
        ({"a": None}, {"a": optax.EmptyState()}),
        ({"a": []}, {"a": OrderedDict()}),
        ({"a": ()}, {"a": optax.EmptyState()}),
        ({"a": [10, 20]}, {"a": OrderedDict({0: 1, 1: 2})}),
        ({"a": {"x": 1, "y": 2}}, {"a": Pair(0, 0)}),
        ({"a": Pair(1, [Pair(2, 3)])}, {"a": Pair(0, [Pair(0, 0)])}),
        ({"a": OrderedDict({5: 2, 3: 1})}, {"a": OrderedDict()}),
        ({"a": OrderedDict({5: 2, 3: 1})}, {"a": OrderedDict({3: 0, 5: 0})}),
        ({"a": OrderedDict({(1, 2): 2})}, {"a": OrderedDict()}),
        ({"a": defaultdict(int, {5: 2, 7: 1})}, {"a": defaultdict(int)}),
        ({"a": FrozenDict({5: {6: 2}})}, {"a": FrozenDict({})}),
        ({"a": {np.False_: 1, np.True_: 2}}, {}),
        ({"a": {datetime.date(2024, 1, 1): 1}}, {"a": {datetime.date(2024, 1, 1): 0}}),
        ({"a": jnp.int32(5)}, {"a": 0}),
        ({"a": jnp.bfloat16(5)}, {"a": 0.0}),
        ({"a": jnp.ones(2)}, {"a": np.zeros(2, np.float32)}),
        ({"a": np.zeros((0, 2), np.float32)}, {"a": jnp.zeros((0, 2))}),
        ({"a": jnp.zeros((0, 2))}, {"a": np.zeros((0, 2), np.float32)}),
        ({"a": np.ones(2)}, {"a": OfAnotherLibrary()}),
    ],
    ids=str,
)
def test_a_state_of_ones_own_is_given_what_it_gave(tmp_path: Path, saved: Any, fresh: Any) -> None:
    """Whatever a fresh one has: an empty buffer is another thing than none."""
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state=Thing(saved)).result()
        got = ckpt.restore(state=Thing(fresh)).state.state
    assert repr(got) == repr(saved)


def test_a_key_that_is_a_member_of_an_enumeration_has_what_is_below_it(tmp_path: Path) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state=Thing({Letter.A: Pair(1, 2), Letter.B: Pair(3, 4)})).result()
        fresh = {Letter.A: Pair(0, 0), Letter.B: Pair(0, 0)}
        got = ckpt.restore(state=Thing(fresh)).state.state
    assert got == {Letter.A: Pair(1, 2), Letter.B: Pair(3, 4)}
    assert isinstance(got[Letter.B], Pair)


def test_a_target_that_is_an_array_of_another_library_does_not_fit(tmp_path: Path) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state={"a": np.ones(2)}).result()
        with pytest.raises(StructureMismatchError, match="the target is a OfAnotherLibrary"):
            ckpt.restore(state={"a": OfAnotherLibrary()})


@jax.tree_util.register_pytree_with_keys_class
class Mixed:
    """A container of which some children have numbers and some have names, as NNX modules are."""

    def __init__(self, first: Any, second: Any) -> None:
        assert not isinstance(first, str), "Orbax is given what stands for a leaf"
        self.inside = first, second

    def tree_flatten_with_keys(self) -> Any:
        keys = jax.tree_util.SequenceKey(0), jax.tree_util.GetAttrKey("b")
        return tuple(zip(keys, self.inside, strict=True)), None

    @classmethod
    def tree_unflatten(cls, _: Any, inside: Any) -> Mixed:
        return cls(*inside)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_children_with_numbers_and_children_with_names_may_be_in_one_container(
    tmp_path: Path, compression: Any
) -> None:
    saved = {"m": Mixed(jax.random.key(3), jnp.arange(3.0)), "e": Mixed(2**40, {10: 1.0, 2: 2.0})}
    with dd.Checkpointer(tmp_path / "run", options=dd.Options(compression=compression)) as ckpt:
        ckpt.save(1, state=saved).result()
        assert dd.tree_digest(ckpt.restore(state=saved).state) == dd.tree_digest(saved)
        assert dd.tree_digest(ckpt.restore().state) == dd.tree_digest(saved)
    plain = ocp.PyTreeCheckpointer().restore(tmp_path / "run" / "1" / "state")
    np.testing.assert_array_equal(plain["m"]["b"], [0, 1, 2])
    assert jax.random.key_data(plain["m"]["0"]).tolist() == [0, 3]
    assert plain["e"]["b"] == {"2": 2.0, "10": 1.0}


class Module(nnx.Module):
    def __init__(self, seed: int) -> None:
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)])


@pytest.mark.parametrize("with_handler", [False, True])
def test_an_nnx_module_may_be_in_a_state_of_ones_own(tmp_path: Path, with_handler: bool) -> None:
    """Which is given one."""
    fresh = Thing({"m": Module(1), "s": nnx.state(Module(2))})
    thing = Thing({"m": Module(3), "s": nnx.state(Module(4))})
    if with_handler:
        with OrbaxCheckpointHandler() as handler:
            handler.save(tmp_path / "run", thing, step=1)
            handler.restore(tmp_path / "run", fresh)
    else:
        with dd.Checkpointer(tmp_path / "run") as ckpt:
            ckpt.save(1, state=thing).result()
            ckpt.restore(state=fresh)
    assert isinstance(fresh.state["m"], Module)
    assert dd.tree_digest(fresh.state) == dd.tree_digest(thing.state)
    assert jax.tree.structure(fresh.state["s"]) == jax.tree.structure(thing.state["s"])


class Sampler(nnx.Module):
    """Its position is in no variable."""

    def __init__(self) -> None:
        self.scale, self.position = nnx.Param(jnp.ones(2)), 0

    def get_state(self) -> dict[str, Any]:
        return {"weights": self.scale[...], "at": self.position}

    def set_state(self, state: dict[str, Any]) -> None:
        self.scale[...], self.position = state["weights"], state["at"]


@pytest.mark.parametrize("with_handler", [False, True])
def test_an_nnx_module_that_gives_its_state_is_asked_for_it(
    tmp_path: Path, with_handler: bool, caplog: pytest.LogCaptureFixture
) -> None:
    used, fresh = Sampler(), Sampler()
    used.position, used.scale[...] = 500, jnp.full(2, 3.0)
    if with_handler:
        with OrbaxCheckpointHandler() as handler:
            handler.save(tmp_path / "run", used, step=1)
            assert handler.restore(tmp_path / "run", fresh) is fresh
    else:
        with dd.Checkpointer(tmp_path / "run") as ckpt:
            ckpt.save(1, state=used).result()
            assert ckpt.restore(state=fresh).state is fresh
    assert (fresh.position, fresh.scale[...].tolist()) == (500, [3, 3])
    assert "gives no array" not in caplog.text


def test_an_nnx_module_that_gives_a_part_of_its_variables_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Half(Sampler):
        def get_state(self) -> dict[str, Any]:
            return {"at": self.position}

    class Otherwise(Sampler):
        def get_state(self, layer: int) -> dict[str, Any]:  # type: ignore[override]
            raise NotImplementedError

    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state=Half()).result()
        assert "variables of which it gives no array (float32[2])" in caplog.text
        module, fresh = Otherwise(), Otherwise()
        module.scale[...] = jnp.full(2, 3.0)
        ckpt.save(2, state=module).result()
        ckpt.restore(state=fresh)
    assert fresh.scale[...].tolist() == [3, 3]


def test_an_nnx_module_that_gives_what_cannot_be_saved_is_told_why(tmp_path: Path) -> None:
    ring: list[Any] = []
    ring.append(ring)

    class Odd(Sampler):
        def get_state(self) -> dict[str, Any]:
            return given

    with dd.Checkpointer(tmp_path / "run") as ckpt:
        given: dict[str, Any] = {"at": {1: 1, "a": 2}}
        with pytest.raises(UnsupportedLeafError, match="keys of several types"):
            ckpt.save(1, state=Odd())
        given = {"at": ring}
        with pytest.raises(UnsupportedLeafError, match="nested at most 200 deep"):
            ckpt.save(1, state=Odd())


@pytest.mark.parametrize("dtype", [">i4", ">f8", "<u2"])
def test_an_array_keeps_its_order_of_bytes(tmp_path: Path, dtype: str) -> None:
    class Object:
        x: Any = None

        def get_state(self) -> Any:
            return {"x": self.x}

        def set_state(self, state: Any) -> None:
            self.x = state["x"]

    array, used, fresh = np.arange(3).astype(dtype), Object(), Object()
    used.x = array
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state={"x": array}).result()
        ckpt.save(2, state=used).result()
        found = [ckpt.restore(step=1).state["x"], ckpt.restore(step=2, state=fresh).state.x]
        found.append(ckpt.restore(step=1, state={"x": np.zeros(3, dtype)}).state["x"])
    for one in found:
        assert (one.dtype, one.tobytes()) == (array.dtype, array.tobytes())


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_what_is_computed_after_a_restore_has_the_dtypes_that_it_would_have_had(
    tmp_path: Path, compression: Any
) -> None:
    """The dtype of a weak array gives way to that of others."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    shardings = [
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in ((), ("x",))
    ]
    state: dict[str, Any] = {
        "rate": jnp.asarray(0.1),
        "none": jnp.full((0, 2), 1.0),
        "strong": jnp.float32(0.1),
        **{str(n): jax.device_put(jnp.full(4, 7.0), place) for n, place in enumerate(shardings)},
        "w": jnp.ones(4, jnp.bfloat16),
    }
    plain = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
    with dd.Checkpointer(tmp_path / "run", options=dd.Options(compression=compression)) as ckpt:
        ckpt.save(1, state=state).result()
        for target in (state, plain, None, Thing(plain), Thing({**plain, "rate": 0.0})):
            got = ckpt.restore(state=target).state
            got = got.state if isinstance(got, Thing) else got
            wanted = plain if target is plain else state
            assert {name: leaf.weak_type for name, leaf in got.items()} == {
                name: leaf.weak_type for name, leaf in wanted.items()
            }
            assert dd.tree_digest(got) == dd.tree_digest(state)
            assert (got["w"] * got["rate"]).dtype == (wanted["w"] * wanted["rate"]).dtype
            assert (got["0"] + 1).tolist() == [8] * 4
        got = ckpt.restore(state=state).state
        assert [got[name].sharding for name in "01"] == shardings
        shards = [(shard.device, shard.data.tolist()) for shard in got["1"].addressable_shards]
        assert shards == [(device, [7, 7]) for device in jax.devices()[:2]]


def test_an_array_of_no_numbers_is_where_the_target_has_it(tmp_path: Path) -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state={"a": jnp.zeros((0, 4))}).result()
        restored = ckpt.restore(state={"a": jax.device_put(jnp.zeros((0, 4)), split)})
        assert restored.state["a"].sharding == split


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("value", ["text", "", b"", b"x", 2**40, 1j, np.zeros((0, 2))], ids=repr)
def test_a_value_without_an_array_may_have_any_name(
    tmp_path: Path, value: Any, compression: Any
) -> None:
    """Orbax has all texts in one file, by their places in it."""
    names = ("n~", "a", "a/b", "a/b/c", "d/0", "d/-", "e//f", "/g", "-", "0")
    state = {"mlp/~/linear": {"b": value}, **dict.fromkeys(names, value)}
    with dd.Checkpointer(tmp_path / "run", options=dd.Options(compression=compression)) as ckpt:
        ckpt.save(1, state=state).result()
        for target in (state, None):
            got = ckpt.restore(state=target).state
            assert dd.tree_digest(got) == dd.tree_digest(state)
            assert type(got["a/b"]) is type(value)


class Quantity(np.ndarray):  # type: ignore[type-arg]
    """Of which numpy keeps no unit."""


@pytest.mark.parametrize(
    ("leaf", "told"),
    [
        (np.ones(2).view(Quantity), r"a \S*Quantity would come back as a plain numpy array"),
        (np.zeros((1,) * 32), "a numpy array of 32 dimensions; Orbax writes 31 at most"),
        (
            jax.random.key(
                0,
                impl=define_prng_impl(
                    key_shape=(2,),
                    seed=lambda seed: jnp.zeros(2, np.uint32),
                    split=lambda key, shape: jnp.zeros((*shape, 2), np.uint32),
                    random_bits=lambda key, width, shape: jnp.zeros(shape, np.uint32),
                    fold_in=lambda key, data: key,
                    name="mine",
                    tag="mn",
                ),
            ),
            "finds the implementation of this PRNG key",
        ),
    ],
    ids=["class", "dimensions", "key"],
)
def test_what_would_come_back_as_something_else_is_not_saved(
    tmp_path: Path, leaf: Any, told: str
) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        with pytest.raises(UnsupportedLeafError, match=f"^a/b: .*{told}"):
            ckpt.save(1, state={"a": {"b": leaf}})
        assert ckpt.latest_step() is None


def test_a_class_that_a_fresh_object_does_not_have_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = optax.adam(0.1).init({"w": jnp.zeros(2)})
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state=Thing({"opt": optimizer})).result()
        ckpt.restore(state=Thing({"opt": optimizer}))
        assert "come back as dicts" not in caplog.text
        got = ckpt.restore(state=Thing({"opt": None})).state.state
    assert got["opt"][0].keys() == {"count", "mu", "nu"}
    assert "ScaleByAdamState" in caplog.text and "come back as dicts" in caplog.text


def test_keys_of_one_text_are_told_before_anything_is_written(tmp_path: Path) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        for state in (OrderedDict({1: None, "1": 5}), OrderedDict({(1, 2): {}, "(1, 2)": {}})):
            with pytest.raises(UnsupportedLeafError, match="have the same name"):
                ckpt.save(1, state={"a": state, "w": 1})
        alike = {number * (2**61 - 1): 0 for number in range(200)}  # of one hash
        with pytest.raises(UnsupportedLeafError, match="same hash"):
            ckpt.save(1, state={"a": alike})
        ckpt.save(1, state={"w": 1}).result()


def test_what_a_fresh_object_has_tells_where_arrays_belong_and_of_which_classes_containers_are(
    tmp_path: Path,
) -> None:
    """Though other parts of its state are of other kinds, or not there."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params = {"w": jax.device_put(jnp.arange(4.0), split)}
    saved = {"params": params, "opt": optax.adam(0.1).init(params), "step": jnp.int32(3), "q": [1]}
    fresh = {**saved, "params": {"w": jax.device_put(jnp.zeros(4), split)}, "step": 0, "q": None}
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state=Thing(saved)).result()
        got = ckpt.restore(state=Thing(fresh)).state.state
    assert got["params"]["w"].sharding == split
    assert got["opt"][0].mu["w"].sharding == split
    assert jax.tree.structure(got) == jax.tree.structure(saved)
    assert (got["step"], got["q"]) == (3, [1])


def test_plain_orbax_knows_no_classes_and_the_fresh_object_does(tmp_path: Path) -> None:
    saved = {"opt": optax.adam(0.1).init({"w": jnp.ones(4)}), "n": np.int32(3)}
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, args=ocp.args.StandardSave(saved))
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        fresh = jax.tree.map(lambda leaf: leaf * 0, saved)
        got = ckpt.restore(state=Thing(fresh)).state.state
        more = ckpt.restore(state=Thing({**fresh, "n": None})).state.state
    assert jax.tree.structure(got) == jax.tree.structure(more) == jax.tree.structure(saved)
    assert got["n"] == more["n"] == 3


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("kind", [dict, OrderedDict, FrozenDict])
@pytest.mark.parametrize(
    "keys",
    [
        [Letter.A, Letter.B],
        [Number.ONE, Number.TWO],
        [Pair(1, 2), Pair(3, 4)],
        [datetime.date(2024, 1, 1)],
        [(datetime.date(2024, 1, 1), Letter.A)],
        [np.datetime64("2024-01-01")],
        [(1, None, b"x", 2.5), (2, None, b"x", 2.5)],
    ],
    ids=str,
)
def test_any_key_comes_back_where_the_target_has_it(
    tmp_path: Path, compression: Any, kind: Any, keys: list[Any]
) -> None:
    """Without a target as one that is equal to it, or as a text where nothing is."""
    saved = {"d": kind({key: jax.random.key(number) for number, key in enumerate(keys)})}
    fresh = {"d": kind({key: jax.random.key(9) for key in keys})}
    with dd.Checkpointer(tmp_path / "run", options=dd.Options(compression=compression)) as ckpt:
        ckpt.save(1, state=saved).result()
        ckpt.save(2, state=Thing(saved)).result()
        for got in (ckpt.restore(step=1, state=fresh).state, ckpt.restore(state=Thing(fresh))):
            state = got if isinstance(got, dict) else got.state.state
            assert repr(state["d"]) == repr(saved["d"])
        found = ckpt.restore().state["d"]
    tree = json.loads((tmp_path / "run" / "1" / "TREE.json").read_bytes())
    plain = ocp.PyTreeCheckpointer().restore(tmp_path / "run" / "1" / "state")
    assert {leaf["path"][1] for leaf in tree["leaves"]} == plain["d"].keys(), "as it is stored"
    has_text = any(isinstance(key, datetime.date | np.datetime64) for key in np.ravel(keys[0]))
    assert list(found) == [str(key) if has_text else key for key in keys]
    assert [found.get(key) is not None for key in keys] == [not has_text for _ in keys]


def test_keys_that_have_no_order_are_in_an_ordered_dict(tmp_path: Path) -> None:
    """JAX could not walk through another one."""
    saved = {"a": OrderedDict([("b", 1), (3, 2), (None, [4])])}
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state=saved).result()
        ckpt.save(2, state=Thing(saved)).result()
        for got in (
            ckpt.restore(step=1).state,
            ckpt.restore(state=Thing(None)).state.state,
            ckpt.restore(state=Thing({"a": {"b": 0}})).state.state,
        ):
            assert (repr(got), dd.tree_digest(got)) == (repr(saved), dd.tree_digest(saved))


@jax.tree_util.register_pytree_with_keys_class
class Ordered(OrderedDict[Any, Any]):
    def tree_flatten_with_keys(self) -> Any:
        return [(jax.tree_util.DictKey(key), part) for key, part in self.items()], tuple(self)

    @classmethod
    def tree_unflatten(cls, keys: Any, parts: Any) -> Ordered:
        return cls(zip(keys, parts, strict=True))


@jax.tree_util.register_pytree_node_class
class Row(tuple[Any, ...]):
    __slots__ = ()

    def tree_flatten(self) -> Any:
        return list(self), None

    @classmethod
    def tree_unflatten(cls, _: Any, parts: Any) -> Row:
        return cls(parts)


def test_classes_derived_from_pythons_are_those_of_the_fresh_object(tmp_path: Path) -> None:
    saved = {"a": Ordered(y=1, x=2), "b": Row((1, 2))}
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state=Thing(saved)).result()
        fresh = {"a": Ordered(y=0, x=0), "b": Row((0, 0))}
        got = ckpt.restore(state=Thing(fresh)).state.state
    assert {name: type(part) for name, part in got.items()} == {"a": Ordered, "b": Row}
    assert got == saved


def test_a_wide_array_of_jax_is_given_to_an_object_as_it_can_be(tmp_path: Path) -> None:
    """As what a fresh one has, where JAX would cut it."""
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        with jax.enable_x64(True):
            saved = {"a": jnp.int64(2**40), "b": jnp.arange(3.0, dtype="float64")}
            ckpt.save(1, state=Thing(saved)).result()
        for fresh in ({"a": 0, "b": np.zeros(3)}, {"a": np.int64(0), "b": np.zeros(3)}):
            got = ckpt.restore(state=Thing(fresh)).state.state
            assert (got["a"], type(got["a"])) == (2**40, type(fresh["a"]))
            assert got["b"].tolist() == [0, 1, 2] and got["b"].dtype == np.float64
        with pytest.raises(StructureMismatchError, match="would cut to 32 bits"):
            ckpt.restore(state=Thing({}))


def average(root: str) -> Any:
    """Returns where each host has an array that one host saved, and a fresh object has of numpy."""
    with dd.Checkpointer(root) as ckpt:
        got = ckpt.restore(state=Thing({"ema": np.zeros(8, np.float32)})).state.state["ema"]
    return type(got).__name__, got.is_fully_addressable, np.asarray(got).tolist()


@pytest.mark.multihost
@pytest.mark.xdist_group("multihost")
def test_an_array_that_a_fresh_object_has_for_itself_is_not_spread_over_all_hosts(
    tmp_path: Path,
) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state=Thing({"ema": jnp.arange(8.0)})).result()
    hosts = run_hosts(average, 2, args=(str(tmp_path / "run"),), timeout_seconds=60)
    assert [host.error for host in hosts] == [None, None]
    for host in hosts:
        assert host.value == ("ArrayImpl", True, list(range(8)))


def own(root: str) -> list[Any]:
    """What each host has for itself, saved and restored by the handler: as on one host."""
    host, found = jax.process_index(), []
    numbers = {"int": 5 + host, "jax": jnp.int32(5 + host), "numpy": np.int32(5 + host)}
    targets = {
        "int": 0,
        "jax": jnp.int32(0),
        "numpy": np.int32(0),
        "abstract": abstract((), np.int32),
    }
    extended = [
        *("int2", "int4", "float4_e2m1fn", "float8_e4m3fnuz", "float8_e5m2fnuz"),
        *("float8_e8m0fnu", "float8_e3m4", "float8_e4m3b11fnuz", "bfloat16"),
    ]
    arrays = {name: np.ones(3, name) for name in extended}
    with OrbaxCheckpointHandler() as handler:
        handler.save(f"{root}/numbers", numbers, step=1)
        for name, target in targets.items():
            restored = handler.restore(f"{root}/numbers", dict.fromkeys(numbers, target))
            kinds = [type(value).__name__ for value in restored.values()]
            found.append((name, kinds, [int(value) - host for value in restored.values()]))
        weak = {"a": jnp.asarray(0.5 + host), "b": jnp.zeros(()), "c": jnp.full((0, 2), 1.0)}
        handler.save(f"{root}/weak", weak, step=1)
        for target in (None, weak, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), weak)):
            restored = handler.restore(f"{root}/weak", target)
            kinds = [f"{value.weak_type}" for value in restored.values()]
            wanted = (
                ["True", "False", "True"] if target is None or target is weak else ["False"] * 3
            )
            found.append(("weak", kinds, kinds == wanted))
        handler.save(f"{root}/arrays", arrays, step=1)
        restored = handler.restore(f"{root}/arrays", arrays)
        for name, value in arrays.items():
            is_alike = restored[name].dtype == value.dtype and (restored[name] == value).all()
            found.append((name, type(restored[name]).__name__, bool(is_alike)))
        with jax.enable_x64(True):
            wide = {"a": jnp.int64(2**40 + host), "b": jnp.arange(2.0, dtype="float64") + 2.0**-40}
            handler.save(f"{root}/wide", wide, step=1)
        for target in (None, {"a": abstract((), np.int64)}, {"a": np.int64(0)}):
            try:
                found.append(int(handler.restore(f"{root}/wide", target)["a"]) - host)
            except StructureMismatchError as error:
                found.append("would cut to 32 bits" in str(error))
    return found


@pytest.mark.multihost
@pytest.mark.xdist_group("multihost")
def test_the_handler_gives_each_of_several_hosts_what_it_gives_one(tmp_path: Path) -> None:
    [one] = run_hosts(own, 1, args=(str(tmp_path / "one"),), timeout_seconds=60)
    two = run_hosts(own, 2, args=(str(tmp_path / "two"),), timeout_seconds=60)
    assert [host.error for host in (one, *two)] == [None] * 3
    assert [host.value for host in two] == [one.value] * 2
    assert all(is_alike for _, _, is_alike in one.value[4:-3])
    assert one.value[-3:] == [True, True, 2**40]
