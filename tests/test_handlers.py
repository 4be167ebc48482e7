"""Orbax's handlers of leaves, which it shares in a process: other saves and the user's own ones
reach no step of ours. And names of leaves that look odd to them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint._src.serialization import type_handler_registry

import datarax_dist as dd
from datarax_dist import direct
from datarax_dist.arrays.leaves import check_kind
from datarax_dist.direct import writing
from datarax_dist.errors import StorageError
from datarax_dist.specs import LeafSpec

SECONDS = 30.0
compressions = pytest.mark.parametrize("compression", ["none", "zstd"])


def keys(*impls: str) -> dict[str, Any]:
    return {f"k{n}": jax.random.key(n, impl=impl) for n, impl in enumerate(impls)}


def restored(root: Path, **more: Any) -> Any:
    with dd.Checkpointer(root) as ckpt:
        return ckpt.restore(**more).state


def same(one: Any, other: Any) -> bool:
    return dd.tree_digest(one) == dd.tree_digest(other)


@compressions
def test_a_save_in_the_middle_of_another_one_mixes_up_no_keys(
    compression: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dd.Options(compression=compression)
    ours, theirs = keys("rbg", "rbg"), {**keys("unsafe_rbg"), "k1": jnp.zeros(2, jnp.uint32)}
    told: list[int] = []
    impl_of = jax.random.key_impl

    def save_theirs() -> None:
        with dd.Checkpointer(tmp_path / "theirs", options=options) as ckpt:
            ckpt.save(1, state=theirs).result(SECONDS)

    def impl(key: Any) -> Any:
        # Orbax has noted the first key, and is about to note the second one.
        if sys._getframe(1).f_code.co_name == "serialize" and same(key, ours["k1"]) and not told:
            told.append(1)
            thread = threading.Thread(target=save_theirs)
            thread.start()
            thread.join(SECONDS)
            assert not thread.is_alive()
        return impl_of(key)

    monkeypatch.setattr(jax.random, "key_impl", impl)
    with dd.Checkpointer(tmp_path / "ours", options=options) as ckpt:
        ckpt.save(1, state=ours).result(SECONDS)
    assert told
    monkeypatch.undo()
    assert same(restored(tmp_path / "ours"), ours)
    assert same(restored(tmp_path / "theirs"), theirs)


@pytest.fixture
def others_handlers() -> Iterator[None]:
    """The user's program has registered a handler of its own."""
    registry = type_handler_registry.GLOBAL_TYPE_HANDLER_REGISTRY
    before = registry.get(jax.Array)
    ocp.type_handlers.register_type_handler(
        jax.Array, ocp.type_handlers.ArrayHandler(), override=True
    )
    yield
    registry.add(jax.Array, before, override=True)


@compressions
@pytest.mark.usefixtures("others_handlers")
def test_handlers_that_the_user_has_registered_are_not_ours(
    compression: Any, tmp_path: Path
) -> None:
    state = {**keys("threefry2x32"), "w": jnp.arange(5.0), "n": np.arange(3)}
    with dd.Checkpointer(tmp_path, options=dd.Options(compression=compression)) as ckpt:
        ckpt.save(1, state=state).result(SECONDS)
        assert same(ckpt.restore().state, state)
        assert same(ckpt.restore(state=state).state, state)


def test_a_key_that_orbax_reads_as_one_of_another_kind_is_an_error() -> None:
    leaf = LeafSpec(("k",), "key", (), "rbg")
    check_kind(leaf, jax.random.key(0, impl="rbg"))
    with pytest.raises(StorageError, match=r"k was saved as a key \(rbg\)"):
        check_kind(leaf, jax.random.key(0, impl="unsafe_rbg"))


ODD = [
    "",
    "/",
    "a/",
    "a//",
    "/a",
    "a//b",
    ".",
    "..",
    "a.",
    "zarr.json",
    "c",
    "c/0",
    "a\\b",
    "%61",
    " ",
]


@compressions
@pytest.mark.parametrize("name", [None, *ODD])
def test_leaves_of_odd_names_are_where_orbax_looks_for_them(
    name: str | None, compression: Any, tmp_path: Path
) -> None:
    values = [jax.random.key(1), jnp.arange(400.0), jnp.arange(3.0), np.arange(3)]
    for step, value in enumerate(values):
        state = value if name is None else {name: value, "w": jnp.ones(3)}
        with dd.Checkpointer(tmp_path, options=dd.Options(compression=compression)) as ckpt:
            ckpt.save(step, state=state).result(SECONDS)
        assert same(restored(tmp_path), state)
        assert same(restored(tmp_path, state=state), state)
        with ocp.PyTreeCheckpointer() as plain:
            found = plain.restore(tmp_path / str(step) / "state")
        assert same(found, state)


@pytest.mark.parametrize(
    "pair", [("", "/"), ("a", "a/"), ("a/", "a"), ("a//", "a/"), ("a/b", "a.b"), ("a/b/", "a/b")]
)
def test_leaves_that_would_be_stored_alike_are_refused(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    with (
        dd.Checkpointer(tmp_path) as ckpt,
        pytest.raises(dd.errors.UnsupportedLeafError, match="the same name"),
    ):
        ckpt.save(1, state={name: jnp.full(400, n) for n, name in enumerate(pair)})


@pytest.mark.parametrize("level", ["sizes", "full"])
def test_arrays_with_odd_names_that_the_first_versions_wrote_are_read(
    level: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def before(name: str, *parts: str) -> str:
        return "/".join([name, *parts])

    states = [jnp.arange(400.0), {"": jnp.ones(3), "a/": jnp.arange(400.0), "w": jnp.zeros(2)}]
    with monkeypatch.context() as patch, dd.Checkpointer(tmp_path) as ckpt:
        patch.setattr(direct, "value_key", before)
        patch.setattr(writing, "value_key", before)
        for step, state in enumerate(states):
            ckpt.save(step, state=state).result(SECONDS)
    options = dd.Options(verify_on_restore=level)
    with dd.Checkpointer(tmp_path, options=options) as ckpt:
        for step, state in enumerate(states):
            assert same(ckpt.restore(step=step).state, state)
            assert same(ckpt.restore(step=step, state=state).state, state)
