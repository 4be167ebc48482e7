"""A restore that has failed on one host has failed on all: nobody goes on from half of it."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from targets import Counter

import datarax_dist as dd
from datarax_dist import Checkpointer, errors
from datarax_dist.checkpoint import OrbaxCheckpointHandler
from datarax_dist.testing import run_hosts

SPOILT = "A restore into it has failed"


class Model:
    """A state of one's own, which may refuse what it is given."""

    def __init__(self, value: float, fails: bool = False) -> None:
        self.weights, self.fails = np.full(3, value), fails

    def get_state(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def set_state(self, state: dict[str, Any]) -> None:
        if self.fails:
            raise RuntimeError("not this one")
        self.weights = state["weights"]


class Refusing(Counter):
    """Its position can be set where `there` says so."""

    there = True

    def set_state(self, state: dict[str, int]) -> None:
        if not self.there:
            raise RuntimeError("not this one")
        super().set_state(state)


def told(act: Any) -> str:
    try:
        act()
    except (Exception, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error} {getattr(error, '__notes__', '')}"
    return ""


@pytest.mark.parametrize("what", ["state", "interrupt"])
def test_loaders_of_a_restore_that_failed_with_the_state_cannot_be_used(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        shards = dd.data.shards(Counter, 4)
        next(shards)
        ckpt.save(1, state=Model(1.0), data={"a": shards, "b": Counter(0, 1)}).result()
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        model, shards, plain = Model(0.0, fails=True), dd.data.shards(Counter, 4), Counter(0, 1)
        if what == "interrupt":  # when all is done, and restore() has not returned

            def interrupt(*arguments: Any) -> Any:
                raise KeyboardInterrupt

            model.fails = False
            monkeypatch.setattr(ckpt._restorer, "_tidy", interrupt)
        failed = told(lambda: ckpt.restore(state=model, data={"a": shards, "b": plain}))
        assert ("KeyboardInterrupt" if what == "interrupt" else "not this one") in failed
        assert "cannot be used any more: make them anew" in failed
        assert "sets in place may be what the step has on some hosts only" in failed
        assert SPOILT in told(lambda: next(shards))
        for data in (shards, plain):
            assert SPOILT in told(lambda data=data: ckpt.save(2, state=Model(2.0), data=data))
        assert ckpt.all_steps() == [1]


def test_who_restores_no_data_in_place_is_told_of_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state={"a": np.zeros(2)}).result()
        monkeypatch.setattr(ckpt._restorer, "_tidy", interrupt)
        with pytest.raises(KeyboardInterrupt) as raised:
            ckpt.restore(state={"a": np.zeros(2)})
    assert not hasattr(raised.value, "__notes__")


def test_a_half_restore_of_the_handler_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = "sets in place may be what the step has on some hosts only"

    def interrupt(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with OrbaxCheckpointHandler() as handler:
        handler.save(tmp_path / "run", Model(1.0), step=1)
        failed = told(lambda: handler.restore(tmp_path / "run", Model(0.0, fails=True)))
        assert "not this one" in failed
        assert half in failed
        assert handler.restore(tmp_path / "run", Model(0.0)).weights[0] == 1.0
        # Before anything is set nothing is told of.
        monkeypatch.setattr(Checkpointer, "_drained", interrupt)
        failed = told(lambda: handler.restore(tmp_path / "run", Model(0.0)))
        assert "KeyboardInterrupt" in failed
        assert half not in failed


def test_a_restore_that_changed_nothing_spoils_no_loader(tmp_path: Path) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state={"a": np.zeros(2)}, data=dd.data.shards(Counter, 4)).result()
        shards = dd.data.shards(Counter, 4)
        with pytest.raises(errors.StructureMismatchError) as raised:
            ckpt.restore(state={"a": np.zeros(3)}, data=shards)
        assert not hasattr(raised.value, "__notes__")
        ckpt.restore(state={"a": np.zeros(2)}, data=shards)
        assert next(shards) is not None


def failing(root: str) -> list[str]:
    """Restores that fail on host 1 only; what each host is told, and what is left."""
    import jax

    there = jax.process_index() == 0
    found = []

    def make(kind: Any = Counter) -> Any:
        return {"a": dd.data.shards(kind, 4), "p": kind(jax.process_index(), 2)}

    with dd.Checkpointer(root) as ckpt:
        data = make()
        for batches in data.values():
            next(batches)
        ckpt.save(1, state=Model(1.0), data=data).result(60)
        Refusing.there = there
        allow = ["a.class", "p.class"]
        for model, data in (
            (Model(0.0, fails=not there), make()),
            (Model(0.0), make(Refusing)),
        ):
            found.append(
                told(
                    lambda model=model, data=data: ckpt.restore(
                        state=model, data=data, allow_data_changes=allow
                    )
                )
            )
            found.append(told(lambda data=data: next(data["a"])))
            # Both loaders are named as one save asks for them: the plain one alone.
            found.append(told(lambda data=data: ckpt.save(2, state=Model(2.0), data=data["p"])))
        data = make() if there else None
        found.append(told(lambda: ckpt.restore(state=Model(0.0), data=data)))
        found.append(told(lambda: ckpt.restore(state=Model(0.0) if there else None)))
        found.append(str(ckpt.all_steps()))  # hosts are together still
        found.append(str(ckpt.restore(state=Model(0.0), data=make()).step))
    return found


@pytest.mark.multihost
@pytest.mark.xdist_group("multihost")
def test_a_restore_that_fails_on_one_host_leaves_no_loader_that_can_be_used(tmp_path: Path) -> None:
    for host in run_hosts(failing, 2, args=(str(tmp_path / "run"),), timeout_seconds=90):
        assert host.error is None, host.error
        state, batch, save, loader, batch_2, save_2, no_data, no_state, steps, step = host.value
        for error in (state, loader):
            assert "not this one" in error
            assert "cannot be used any more: make them anew" in error
        for error in (batch, save, batch_2, save_2):
            assert SPOILT in error
        assert "Host 1 has a state to restore into, and data: none; host 0 has" in no_data
        assert "data: 'a', 'p'" in no_data
        assert "Host 1 has no state to restore into" in no_state
        assert (steps, step) == ("[1]", "1")


def alone(root: str) -> list[str]:
    import jax

    options = dd.Options(exchange_timeout_seconds=60)
    found = []
    ckpt = dd.Checkpointer(root, options=options)
    ckpt.save(1, state=Model(1.0)).result(60)
    if jax.process_index() == 1:
        ckpt.close()
    else:
        found = [
            told(lambda: ckpt.save(2, state=Model(2.0))),
            told(ckpt.all_steps),
            told(lambda: ckpt.restore(state=Model(0.0))),
            told(lambda: ckpt.delete(1)),
        ]
        ckpt.close()
    return found


@pytest.mark.multihost
@pytest.mark.xdist_group("multihost")
def test_who_has_closed_is_waited_for_by_no_later_call(tmp_path: Path) -> None:
    """Each call would wait for 60 s (600 by default), and this test does not."""
    first, second = run_hosts(alone, 2, args=(str(tmp_path / "run"),), timeout_seconds=30)
    assert (first.error, second.error) == (None, None)
    assert len(first.value) == 4
    for error in first.value:
        assert "host 1" in error
        assert "it has closed its Checkpointer, or has ended." in error


def in_a_computation(root: str) -> tuple[str, str]:
    import jax

    from datarax_dist import gathers

    with dd.Checkpointer(root, options=dd.Options(exchange_timeout_seconds=60)) as ckpt:
        ckpt.save(1, state=Model(1.0)).result(60)
        if jax.process_index() == 1:
            left = types.SimpleNamespace(is_stuck=lambda: True)  # of a restore that has failed
            gathers._left.append(left)  # type: ignore[arg-type]
        first = told(lambda: ckpt.save(2, state=Model(2.0)))
        gathers._left.clear()  # it has ended after all, and hosts are not together any more
        return first, told(ckpt.all_steps)


@pytest.mark.multihost
@pytest.mark.xdist_group("multihost")
def test_who_makes_no_call_for_a_computation_that_was_left_tells_the_others(tmp_path: Path) -> None:
    """They would wait for 60 s, and this test does not."""
    ended = run_hosts(in_a_computation, 2, args=(str(tmp_path / "run"),), timeout_seconds=30)
    for host, kind in zip(ended, ("PeerError", "CheckpointError"), strict=True):
        assert host.error is None, host.error
        for error in host.value:
            assert error.startswith(kind)
            assert "Start this job again, all of its hosts." in error


def goals() -> dict[str, Any]:
    """Targets that are on all hosts' devices."""
    import jax

    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return {
        name: jax.ShapeDtypeStruct((), dtype, sharding=everywhere)
        for name, dtype in (("n", "int32"), ("m", "float32"), ("own", "int32"))
    }


def values(restored: Any) -> list[Any]:
    return [restored[name].addressable_data(0).item() for name in ("n", "m")]


def into_arrays_of_all_hosts(root: str) -> list[Any]:
    """A restore of which host 1 fails while it loads, and one that succeeds; and what the hosts
    compute together after each.
    """
    import jax
    from jax.experimental import multihost_utils

    host, target = jax.process_index(), goals()
    del target["own"]

    def fail(*arguments: Any, **more: Any) -> Any:
        raise MemoryError

    def gathered() -> Any:
        return multihost_utils.process_allgather(np.array(100 + host)).tolist()

    with dd.Checkpointer(root) as ckpt:
        ckpt.save(1, state={"n": 5, "m": np.float32(2), "w": np.arange(4.0)}).result(60)
        restore = ckpt._arrays.restore
        ckpt._arrays.restore = fail if host == 1 else restore
        found = [told(lambda: ckpt.restore(state=target)), gathered()]
        ckpt._arrays.restore = restore
        return [*found, values(ckpt.restore(state=target).state), gathered()]


@pytest.mark.multihost
@pytest.mark.xdist_group("multihost")
def test_restoring_into_arrays_of_all_hosts_computes_nothing_on_their_devices(
    tmp_path: Path,
) -> None:
    """A host that failed would leave the others in it, or pair it with its next computation."""
    for host in run_hosts(into_arrays_of_all_hosts, 2, args=(str(tmp_path),), timeout_seconds=60):
        assert host.error is None, host.error
        failed, first, restored, second = host.value
        assert "MemoryError" in failed
        assert restored == [5, 2.0]
        assert first == second == [100, 101]


def own_into_arrays_of_all_hosts(root: str) -> list[Any]:
    """What each host had for itself is restored into arrays of all: equal ones, and others."""
    import jax

    state = {
        "n": jax.numpy.int32(3),
        "m": np.float32(2),
        "own": jax.numpy.int32(jax.process_index()),
    }
    target = goals()
    with OrbaxCheckpointHandler() as handler:
        handler.save(root, state, step=1)
        different = told(lambda: handler.restore(root, target))
        del target["own"]
        return [different, values(handler.restore(root, target))]


@pytest.mark.multihost
@pytest.mark.xdist_group("multihost")
def test_what_is_not_the_same_on_all_hosts_becomes_no_array_of_all(tmp_path: Path) -> None:
    for host in run_hosts(
        own_into_arrays_of_all_hosts, 2, args=(str(tmp_path),), timeout_seconds=60
    ):
        assert host.error is None, host.error
        different, alike = host.value
        assert "Host 1 had other values than host 0 for itself alone" in different
        assert alike == [3, 2.0]
