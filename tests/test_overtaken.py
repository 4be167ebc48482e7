"""A `save()` in a signal handler, while another one begins; and what Orbax had begun for one that
was interrupted.
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import datarax_dist as dd
from datarax_dist import errors, save
from datarax_dist.arrays import engine, hooks
from datarax_dist.storage import LocalStore

STATE = {"w": np.ones(3)}
SECONDS = 30.0  # for what must happen


def staged(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if "staging" in path.name]


def test_what_orbax_has_begun_for_a_save_that_was_interrupted_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()
    engines: list[Any] = []
    come, begin = hooks._await_path_creation, engine.Engine.save

    async def come_late(info: Any) -> None:
        await asyncio.to_thread(goes_on.wait, SECONDS)
        await come(info)

    def interrupted(this: Any, *args: Any) -> None:
        begin(this, *args)
        engines.append(this)
        raise KeyboardInterrupt

    monkeypatch.setattr(hooks, "_MOST_GIVEN_UP", len(hooks._given_up) + 1)
    with dd.Checkpointer(tmp_path) as ckpt:
        with monkeypatch.context() as patch:
            patch.setattr(hooks, "_await_path_creation", come_late)
            patch.setattr(engine.Engine, "save", interrupted)
            with pytest.raises(KeyboardInterrupt):
                ckpt.save(2, state={"w": jnp.ones(1000), "n": np.ones(1000)})
            goes_on.set()
            engines[0]._orbax._async_manager._thread.join(SECONDS)
        [staging] = tmp_path.glob("2.staging-*")
        written = [path.name for path in (staging / "state").rglob("*") if path.is_file()]
        assert written == ["_CHECKPOINT_METADATA"], "which is there before any array"
        assert ckpt.save(3, state=STATE).result(SECONDS).step == 3
    assert staged(tmp_path) == []


def test_the_gates_of_saves_that_were_interrupted_do_not_pile_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hooks, "gates", {})
    monkeypatch.setattr(hooks, "_given_up", type(hooks._given_up)())
    for number in range(100):
        hooks.gates[str(number)] = gate = hooks.Gate(1.0)
        hooks.give_up(str(number), gate)
    assert list(hooks.gates) == [str(number) for number in range(36, 100)]


def test_a_save_that_was_overtaken_while_it_captured_has_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, start = engine.OrbaxArrays.writer, engine.OrbaxArrays.start
    begun: list[str] = []

    def interrupted(arrays: Any, tree: Any) -> Any:
        monkeypatch.setattr(engine.OrbaxArrays, "writer", writer)
        ckpt.save(50, state=STATE)
        return writer(arrays, tree)

    def note(arrays: Any, prefix: str, *args: Any, **more: Any) -> Any:
        begun.append(prefix.split(".")[0])
        return start(arrays, prefix, *args, **more)

    with dd.Checkpointer(tmp_path / "run") as ckpt:
        monkeypatch.setattr(engine.OrbaxArrays, "writer", interrupted)
        monkeypatch.setattr(engine.OrbaxArrays, "start", note)
        with pytest.raises(errors.InvalidArgumentError, match="in a signal handler"):
            ckpt.save(2, state=STATE)
        assert begun == ["50"], "or the writer would be taken from it"


def test_what_a_save_has_staged_is_no_leftover_for_the_one_that_overtakes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written to yet."""
    start, kept = save.StartedSave.start, []

    def interrupted(started: Any, *arguments: Any) -> Any:
        monkeypatch.setattr(save.StartedSave, "start", start)
        ckpt.save(50, state=STATE).result(SECONDS)
        kept.extend(name.split(".")[0] for name in staged(tmp_path / "run"))
        return start(started, *arguments)

    with dd.Checkpointer(tmp_path / "run") as ckpt:
        monkeypatch.setattr(save.StartedSave, "start", interrupted)
        with pytest.raises(errors.InvalidArgumentError, match="in a signal handler"):
            ckpt.save(2, state=STATE)
        assert kept == ["2"]
        assert ckpt.save(60, state=STATE).result(SECONDS).step == 60
    assert staged(tmp_path / "run") == []


@pytest.mark.parametrize("what", [SystemExit(7), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize(
    ("kind", "name"),
    [(save.StartedSave, "start"), (save.Saver, "hold"), (LocalStore, "_write_temporary")],
)
def test_a_signal_handler_that_saves_and_exits_does_so(
    kind: type, name: str, what: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = getattr(kind, name)

    def interrupted(*_: Any) -> Any:
        monkeypatch.setattr(kind, name, before)
        ckpt.save(50, state=STATE).result(SECONDS)
        raise what

    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state=STATE).result(SECONDS)
        monkeypatch.setattr(kind, name, interrupted)
        with pytest.raises(type(what)):
            ckpt.save(2, state=STATE)
        assert ckpt.all_steps() == [1, 50]


def test_a_save_that_is_refused_in_a_signal_handler_leaves_the_other_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = save.Saver.hold

    def interrupted(saver: Any) -> None:
        monkeypatch.setattr(save.Saver, "hold", hold)
        with pytest.raises(errors.InvalidArgumentError, match="metadata"):
            ckpt.save(50, state=STATE, metadata={"x": object()})
        hold(saver)

    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state=STATE).result(SECONDS)
        monkeypatch.setattr(save.Saver, "hold", interrupted)
        assert ckpt.save(2, state=STATE).result(SECONDS).step == 2


@pytest.mark.parametrize("waits", [True, False], ids=["waits", "does not wait"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (save.StartedSave, "start"),
        (engine.OrbaxWriter, "start"),
        (save.Saver, "hold"),
        (LocalStore, "_write_temporary"),
        (engine.OrbaxArrays, "writer"),
        (engine._OrbaxWrite, "__init__"),
    ],
    ids=[
        *("after Orbax has begun", "before Orbax begins", "before it is agreed", "while it stages"),
        *("while it captures", "while its writer is made"),
    ],
)
def test_a_save_in_a_signal_handler_takes_the_place_of_the_one_that_was_about_to_begin(
    kind: type, name: str, waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handles: list[Any] = []
    before = getattr(kind, name)

    def interrupted(this: Any, *args: Any) -> Any:
        monkeypatch.setattr(kind, name, before)
        found = before(this, *args) if name == "start" and kind is save.StartedSave else None
        handles.append(ckpt.save(50, state={"w": jnp.full(3, 50.0)}))
        if waits:
            assert handles[0].result(SECONDS).step == 50
        return found if kind is save.StartedSave else before(this, *args)

    options = dd.Options(save_timeout_seconds=12)  # for which it would wait
    with dd.Checkpointer(tmp_path / "run", options=options) as ckpt:
        ckpt.save(1, state={"w": jnp.ones(3)}).result(SECONDS)
        monkeypatch.setattr(kind, name, interrupted)
        with pytest.raises(errors.InvalidArgumentError, match="in a signal handler"):
            ckpt.save(2, state={"w": jnp.full(3, 2.0)})
        assert handles[0].result(SECONDS).step == 50
        assert ckpt.save(51, state={"w": jnp.full(3, 51.0)}).result(SECONDS).step == 51
        assert ckpt.restore(step=50).state["w"].tolist() == [50.0] * 3
        assert ckpt.all_steps() == [1, 50, 51]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        *("1", "50", "51", "RUN.json", "lease")
    ]


def test_a_signal_handler_may_call_the_hosts_that_it_has_interrupted(tmp_path: Path) -> None:
    numbers: list[int] = []

    def interrupted(ckpt: dd.Checkpointer) -> None:
        with ckpt._group._lock:
            numbers.append(ckpt._group._next())

    with dd.Checkpointer(tmp_path / "run") as ckpt:
        thread = threading.Thread(target=interrupted, args=(ckpt,), daemon=True)
        thread.start()
        thread.join(5.0)
        assert numbers


def test_of_two_saves_of_one_step_the_end_of_one_is_not_the_end_of_the_other(
    tmp_path: Path,
) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        saver = ckpt._saver
        for staging in ("2.staging-a", "2.staging-b"):
            saver._under_way[staging] = staging, "2"
            saver.lease.under_way.update(saver._under_way[staging])
        saver.ended("2.staging-a")
        assert saver.lease.under_way == {"2", "2.staging-b"}
        saver.ended("2.staging-b")
        assert saver.lease.under_way == set()


def test_the_save_of_a_signal_handler_stays_the_one_that_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes when the other one is under way, and before that is noted."""
    goes_on, begun, finish = threading.Event(), threading.Event(), save.StartedSave.finish
    nested: list[Any] = []

    def held(started: save.StartedSave) -> Any:
        if started.step == 50:  # the worker has done with the other one
            begun.set()
            goes_on.wait(SECONDS)
        return finish(started)

    with dd.Checkpointer(tmp_path / "run") as ckpt:
        submit = ckpt._worker.submit

        def interrupted(*args: Any) -> Any:
            monkeypatch.setattr(ckpt._worker, "submit", submit)
            found = submit(*args)
            nested.append(ckpt.save(50, state={}))
            return found

        monkeypatch.setattr(save.StartedSave, "finish", held)
        monkeypatch.setattr(ckpt._worker, "submit", interrupted)
        outer = ckpt.save(2, state={})
        assert outer is not None
        outer.result(SECONDS)
        assert ckpt._handle is nested[0]
        assert begun.wait(SECONDS)
        assert ckpt._running is not None and ckpt._running.handle is nested[0]
        goes_on.set()
        assert nested[0].result(SECONDS).step == 50
