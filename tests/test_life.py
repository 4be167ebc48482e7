"""A `Checkpointer` that is interrupted, dropped, forked or gets no thread; and two on one root."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.serialization import type_handlers

import datarax_dist as dd
from datarax_dist import checkpointer, direct, errors, save, sharing
from datarax_dist.arrays import engine
from datarax_dist.buckets import BucketStore
from datarax_dist.checkpoint import CheckpointExistsError, OrbaxCheckpointHandler
from datarax_dist.clock import SystemClock
from datarax_dist.storage import LocalStore

STATE = {"w": np.ones(3)}
SECONDS = 30.0  # for what must happen


def lease_of(root: Path) -> dict[str, Any]:
    newest = max((root / "lease").glob("*.json"))
    found: dict[str, Any] = json.loads(newest.read_text())
    return found


def staged(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if "staging" in path.name]


class Stall:
    """Lets a method of the store wait, for keys with some text in them."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, method: str, text: str, kind: Any = LocalStore
    ) -> None:
        self.reached, self.goes_on = threading.Event(), threading.Event()
        act = getattr(kind, method)

        def stalled(store: Any, key: str, *rest: Any, **more: Any) -> Any:
            if text in key and not self.reached.is_set():
                self.reached.set()
                assert self.goes_on.wait(SECONDS / 2)
            return act(store, key, *rest, **more)

        monkeypatch.setattr(kind, method, stalled)


@pytest.fixture
def disk_is_full(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """What fills the disk for structures of states, or empties it."""
    put, full = LocalStore.put, [False]

    def fails(store: Any, key: str, data: bytes) -> None:
        if full[0] and key.endswith("TREE.json"):
            raise errors.StorageError("no space left", errno=28)
        put(store, key, data)

    monkeypatch.setattr(LocalStore, "put", fails)
    return lambda is_full: full.__setitem__(0, is_full)


def close_cut_short(ckpt: dd.Checkpointer, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ctrl-C, while it waits."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ckpt, "_drain", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ckpt.close()


# Errors are told


def test_an_error_is_kept_when_the_next_save_fails_for_another_reason(
    tmp_path: Path, disk_is_full: Callable[[bool], None]
) -> None:
    ckpt = dd.Checkpointer(tmp_path / "run")
    disk_is_full(True)
    handle = ckpt.save(1, state=STATE)
    ckpt._drain()
    disk_is_full(False)
    with pytest.raises(errors.InvalidArgumentError, match="not JSON"):
        ckpt.save(2, state=STATE, metadata=object())
    with pytest.raises(errors.StorageError, match="no space left"):
        ckpt.check_for_errors()
    ckpt.check_for_errors()  # it has been seen
    assert handle is not None
    assert ckpt.save(2, state=STATE).result(SECONDS).step == 2
    ckpt.close()


def test_an_error_that_a_save_tells_is_not_told_again(
    tmp_path: Path, disk_is_full: Callable[[bool], None]
) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        told_by_the_next_save(ckpt, disk_is_full, ckpt._drain)
        assert ckpt.save(2, state=STATE).result(SECONDS).step == 2


def test_an_error_that_was_seen_on_another_host_only_is_kept(
    tmp_path: Path, disk_is_full: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the next save goes on; so it does here."""
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        disk_is_full(True)
        ckpt.save(1, state=STATE)
        ckpt._drain()
        disk_is_full(False)
        stage = ckpt._saver._stage
        seen = {"unseen": False}
        monkeypatch.setattr(
            ckpt._saver, "_stage", lambda rows, *more: stage([row | seen for row in rows], *more)
        )
        assert ckpt.save(2, state=STATE).result(SECONDS).step == 2
        assert ckpt.save(3, state=STATE).result(SECONDS).step == 3
        with pytest.raises(errors.StorageError, match="no space left"):
            ckpt.check_for_errors()
        ckpt.check_for_errors()


def told_by_the_next_save(
    ckpt: dd.Checkpointer, disk_is_full: Callable[[bool], None], end: Callable[[], None]
) -> None:
    """A save fails; `end` waits for that."""
    disk_is_full(True)
    ckpt.save(1, state=STATE)
    end()
    disk_is_full(False)
    with pytest.raises(errors.StorageError, match="no space left") as raised:
        ckpt.save(2, state=STATE)
    assert raised.value.__notes__ == ["That was the save of step 1; 2 is not saved."]
    ckpt.check_for_errors()


@pytest.mark.parametrize("act", ["save", "delete"])
def test_what_a_failed_save_has_left_on_a_full_disk_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    put = LocalStore.put

    def fails(store: Any, key: str, data: bytes) -> None:
        is_small = key.endswith(("TREE.json", "STEP.json"))
        if is_small and any(name.startswith("2.") for name in staged(tmp_path / "run")):
            raise errors.StorageError("no space left", errno=errno.ENOSPC)
        put(store, key, data)

    # What was staged stays, as in a job of several hosts, of which one may be writing still.
    monkeypatch.setattr(save.StartedSave, "clean_up", lambda started: None)
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state=STATE).result(SECONDS)
        monkeypatch.setattr(LocalStore, "put", fails)
        with pytest.raises(errors.StorageError, match="no space left"):
            ckpt.save(2, state=STATE).result(SECONDS)
        assert len(staged(tmp_path / "run")) == 1
        if act == "save":
            assert ckpt.save(3, state=STATE).result(SECONDS).step == 3
        else:
            ckpt.delete(1)
        assert ckpt.all_steps() == ([1, 3] if act == "save" else [])
        assert staged(tmp_path / "run") == []


# Threads that cannot be had


@pytest.mark.parametrize(
    ("why", "told"),
    [
        ("can't start new thread", "limit on threads"),
        # What Python 3.12 says of a program that has not waited for its save.
        ("can't create new thread at interpreter shutdown", r"ended without close\(\)"),
    ],
)
def test_without_a_thread_for_its_watcher_a_save_fails_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str, told: str
) -> None:
    ckpt = dd.Checkpointer(tmp_path / "run", options=dd.Options(save_timeout_seconds=12))
    ckpt.save(1, state=STATE).result(SECONDS)
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "datarax_dist-watch":
            raise RuntimeError(why)
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        handle = ckpt.save(2, state=STATE)
        with pytest.raises(errors.CheckpointError, match=told):
            handle.result(SECONDS)
    assert ckpt.save(3, state=STATE).result(SECONDS).step == 3
    ckpt.close()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["1", "3", "RUN.json", "lease"]


@pytest.mark.parametrize("what", [RuntimeError("can't start new thread"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["submit", "handle", "arrays", "started"])
def test_a_save_that_is_cut_short_while_it_begins_leaves_nothing_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, what: BaseException
) -> None:
    root = tmp_path / "run"
    ckpt = dd.Checkpointer(root, options=dd.Options(save_timeout_seconds=12))
    ckpt.save(1, state=STATE).result(SECONDS)
    spots: dict[str, tuple[Any, str]] = {
        "submit": (ckpt._worker, "submit"),
        "handle": (checkpointer.SaveHandle, "__init__"),
        "arrays": (engine.Engine, "save"),
        "started": (save.StartedSave, "start"),
    }
    owner, name = spots[where]
    act = getattr(owner, name)

    def cut(*args: Any, **more: Any) -> Any:
        if where in ("arrays", "started"):
            act(*args, **more)
        raise what

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, cut)
        kept = where == "arrays" and isinstance(what, Exception)  # for its handle
        if kept:
            with pytest.raises(errors.CheckpointError, match="start new thread"):
                ckpt.save(2, state={"w": np.ones(1000)}).result(SECONDS)
        else:
            with pytest.raises(type(what)):
                ckpt.save(2, state={"w": np.ones(1000)})
    assert ckpt.all_steps() == [1]
    assert all(gate._cancelled for gate in engine.gates.values()), "nobody waits there any more"
    assert ckpt.save(3, state=STATE).result(SECONDS).step == 3
    ckpt.wait_until_finished()
    assert ckpt._group._open == set(), "no agreement stays open"
    ckpt.close()
    assert staged(root) == []


def test_ctrl_c_twice_while_a_save_begins_leaves_no_agreement_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = dd.Checkpointer(tmp_path / "run")

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ckpt._worker, "submit", interrupted)
        patch.setattr(save.StartedSave, "fail", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ckpt.save(1, state=STATE)
    assert ckpt._group._open == set()
    assert ckpt.save(2, state=STATE).result(SECONDS).step == 2
    ckpt.close()


def test_ctrl_c_while_a_save_waits_for_the_one_before_ends_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the one before has staged is still known as what is being written."""
    root, stall = tmp_path / "run", Stall(monkeypatch, "put", "TREE.json")

    def interrupted() -> None:
        raise KeyboardInterrupt

    with dd.Checkpointer(root) as one, dd.Checkpointer(root) as other:
        handle = one.save(1, state=STATE)
        assert stall.reached.wait(SECONDS)
        with monkeypatch.context() as patch:
            patch.setattr(one, "_drain", interrupted)
            with pytest.raises(KeyboardInterrupt):
                one.save(2, state=STATE)
        assert other.save(3, state=STATE).result(SECONDS).step == 3
        stall.goes_on.set()
        assert handle.result(SECONDS).step == 1


# Memory


@pytest.mark.parametrize("fails", [False, True])
def test_what_was_saved_is_not_kept_on_its_devices(
    tmp_path: Path, disk_is_full: Callable[[bool], None], fails: bool
) -> None:
    array = jnp.ones((64, 64))
    alive = weakref.ref(array)
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        disk_is_full(fails)
        handle = ckpt.save(1, state={"w": array})
        ckpt._drain()
        if fails:
            assert "no space left" in str(handle._future.exception())
        del array
        gc.collect()
        assert alive() is None
        disk_is_full(False)
        with contextlib.suppress(errors.StorageError):
            handle.result(SECONDS)


# Stalls


def test_a_stall_after_the_commit_is_told_at_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save, "_HANGS_SECONDS", 0.1)
    ckpt = dd.Checkpointer(
        tmp_path / "run", keep=dd.latest(1), options=dd.Options(save_timeout_seconds=5)
    )
    ckpt.save(1, state=STATE).result(SECONDS)
    stall = Stall(monkeypatch, "delete", ".deleting-")
    handle = ckpt.save(2, state=STATE)
    report = handle.result(20)
    assert (report.step, report.deleted) == (2, ())
    assert stall.reached.is_set()
    for act in (lambda: ckpt.save(3, state=STATE), ckpt.restore, ckpt.wait_until_finished):
        with pytest.raises(errors.StorageError, match=r"step 2 is committed, but still hangs"):
            act()
    stall.goes_on.set()
    assert ckpt.save(3, state=STATE).result(SECONDS).step == 3
    ckpt.close()


class Ahead(SystemClock):
    """A clock that can be put forward."""

    seconds = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.seconds


def test_slow_retention_is_no_stall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dd.Options(save_timeout_seconds=100)
    with dd.Checkpointer(tmp_path / "run", keep=dd.latest(1), options=options) as ckpt:
        ckpt._saver._clock = clock = Ahead()
        ckpt.save(1, state=STATE).result(SECONDS)
        stalls = Stall(monkeypatch, "put", "TREE.json"), Stall(monkeypatch, "delete", ".deleting-")
        handle = ckpt.save(2, state=STATE)
        for stall in stalls:  # each for less than the deadline, both together for longer
            assert stall.reached.wait(SECONDS)
            clock.seconds += 60
            assert ckpt._running.started.hangs() is None
            stall.goes_on.set()
        assert ckpt.save(3, state=STATE).result(SECONDS).step == 3
        assert handle.result(SECONDS).deleted == (1,)


def test_a_handle_is_left_a_moment_to_say_how_its_save_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that hears nothing of the primary knows it some seconds after the deadline only."""
    with dd.Checkpointer(tmp_path / "run", options=dd.Options(save_timeout_seconds=100)) as ckpt:
        ckpt._saver._clock = clock = Ahead()
        stall = Stall(monkeypatch, "put", "TREE.json")
        handle = ckpt.save(1, state=STATE)
        assert stall.reached.wait(SECONDS)
        clock.seconds += 100 + save._HANGS_SECONDS + 1
        running = ckpt._running.started
        hangs = running.hangs

        def asked(more_seconds: float) -> str | None:
            phase = hangs(more_seconds)
            stall.goes_on.set()
            return phase

        monkeypatch.setattr(running, "hangs", asked)
        assert hangs() is not None and not handle.done()
        ckpt._drain()
        assert stall.goes_on.is_set() and handle.done()
        with contextlib.suppress(errors.StorageError):  # it is beyond its deadline
            handle.result(SECONDS)


# The end


def test_a_close_that_was_cut_short_is_done_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk_is_full: Callable[[bool], None]
) -> None:
    ckpt = dd.Checkpointer(tmp_path / "run")
    ckpt.save(1, state=STATE).result(SECONDS)
    disk_is_full(True)
    ckpt.save(2, state=STATE)
    close_cut_short(ckpt, monkeypatch)
    assert not lease_of(tmp_path / "run")["released"]
    with pytest.raises(errors.InvalidArgumentError, match="closed"):
        ckpt.save(3, state=STATE)
    with pytest.raises(errors.StorageError, match="no space left"):
        ckpt.close()
    assert lease_of(tmp_path / "run")["released"]
    ckpt.close()


class Written:
    """Lets the arrays of one save be written when it is told to, with or without an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.goes_on = threading.Event(), threading.Event()
        self.error: Exception | None = None
        write = direct.Writing.run

        def run(writing: direct.Writing) -> Any:
            self.begun.set()
            assert self.goes_on.wait(SECONDS)
            if self.error is not None:
                raise self.error
            return write(writing)

        monkeypatch.setattr(direct.Writing, "run", run)


def test_a_close_that_is_cut_short_does_not_wait_for_the_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt, written = dd.Checkpointer(tmp_path / "run"), Written(monkeypatch)
    handle = ckpt.save(1, state={"w": jnp.ones(3)})
    assert written.begun.wait(SECONDS)
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(close_cut_short, ckpt, monkeypatch)
        try:
            closing.result(SECONDS / 5)
        finally:
            written.goes_on.set()
    ckpt.close()
    assert handle.result(SECONDS).step == 1


@pytest.mark.parametrize("who", ["a close that is cut short", "somebody else"])
def test_arrays_that_are_not_written_fail_their_save_whoever_hears_of_it_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """Orbax tells it once. The worker is still at something else; without its error the step would
    be committed, and retention would delete the last good one.
    """
    ckpt = dd.Checkpointer(tmp_path / "run", keep=dd.latest(1))
    ckpt.save(1, state={"w": jnp.ones(3)}).result(SECONDS)
    written, stall = Written(monkeypatch), Stall(monkeypatch, "put", "TREE.json")
    written.error = OSError(28, "no space left")
    written.goes_on.set()
    handle = ckpt.save(2, state={"w": jnp.ones(3)})
    assert stall.reached.wait(SECONDS)
    if who == "somebody else":
        with pytest.raises(Exception, match="no space left"):
            ckpt._arrays._checkpointer.wait()
    else:
        close_cut_short(ckpt, monkeypatch)
    stall.goes_on.set()
    with pytest.raises(errors.StorageError, match="no space left"):
        handle.result(SECONDS)
    ckpt.close()
    with dd.Checkpointer(tmp_path / "run") as again:
        assert again.all_steps() == [1]
        assert again.restore().step == 1


def test_a_step_without_arrays_is_not_committed_whoever_says_that_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        written = Written(monkeypatch)
        written.error = OSError(28, "no space left")
        written.goes_on.set()
        monkeypatch.setattr(
            engine.Engine, "wait", lambda orbax: orbax._orbax._async_manager._thread.join()
        )
        with pytest.raises(errors.StorageError, match=r"manifest\.ocdbt is not there"):
            ckpt.save(1, state={"w": jnp.ones(3)}).result(SECONDS)
        assert ckpt.all_steps() == []


def test_a_save_that_failed_waits_for_what_else_its_host_is_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_LATE_SECONDS", SECONDS)
    failed, told, late = threading.Event(), threading.Event(), []
    write = type_handlers.NumpyHandler._open_and_write

    def fail(_: direct.Writing) -> Any:
        failed.set()
        raise OSError(errno.EFBIG, "too large")

    async def write_late(*args: Any) -> None:
        await asyncio.to_thread(failed.wait, SECONDS)
        await asyncio.to_thread(told.wait, 1.0)  # who waits for nothing tells its error before
        await write(*args)
        late.append("written")

    monkeypatch.setattr(direct.Writing, "run", fail)
    monkeypatch.setattr(type_handlers.NumpyHandler, "_open_and_write", write_late)
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        handle = ckpt.save(1, state={"a": jnp.ones(3), "b": np.ones(3)})  # Orbax waits for a first
        with pytest.raises(errors.StorageError, match="too large"):
            handle.result(SECONDS)
        assert late == ["written"]
        told.set()


def test_the_second_close_of_one_of_two_gives_back_nothing_of_the_other(tmp_path: Path) -> None:
    one, other = dd.Checkpointer(tmp_path / "run"), dd.Checkpointer(tmp_path / "run")
    one.save(1, state=STATE).result(SECONDS)
    one.close()
    one.close()
    assert not lease_of(tmp_path / "run")["released"]
    assert other.save(2, state=STATE).result(SECONDS).step == 2
    other.close()
    assert lease_of(tmp_path / "run")["released"]


def test_one_that_is_dropped_finishes_its_save_and_lets_the_run_go(tmp_path: Path) -> None:
    ckpt = dd.Checkpointer(tmp_path / "run")
    handle = ckpt.save(1, state=STATE)
    keeper, running = ckpt._saver.lease._keeper, ckpt._running
    del ckpt
    assert handle.result(SECONDS).step == 1
    assert running.over.wait(SECONDS)
    del running
    gc.collect()
    keeper.join(SECONDS)
    assert lease_of(tmp_path / "run")["released"]


def run_script(script: str, root: Path) -> str:
    command = [sys.executable, "-c", script, str(root)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


FORKED = """
import os, sys, threading
import numpy as np
import datarax_dist as dd
from datarax_dist import errors, storage

ckpt = dd.Checkpointer(sys.argv[1])
ckpt.save(1, state={"w": np.ones(3)}).result()
stalled, put = threading.Event(), storage.LocalStore.put

def wait(store, key, data):
    if key.endswith("TREE.json") and "2.staging" in key:
        stalled.wait()
    put(store, key, data)

storage.LocalStore.put = wait
handle = ckpt.save(2, state={"w": np.ones(3)})
child = os.fork()
if child == 0:
    for act in (
        lambda: ckpt.save(2, state={"w": np.ones(3)}), ckpt.all_steps,
        ckpt.wait_until_finished, handle.result,
    ):
        try:
            act()
        except errors.InvalidArgumentError as error:
            print(error, flush=True)
    ckpt.close()
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert ckpt.all_steps() == [1]
stalled.set()
assert handle.result().step == 2
ckpt.close()
"""


def test_a_forked_child_neither_saves_with_what_it_inherited_nor_ends_it(tmp_path: Path) -> None:
    told = run_script(FORKED, tmp_path / "run")
    assert told.count("Make one of its own") == 3
    assert "and does not hear of it" in told
    assert lease_of(tmp_path / "run")["epoch"] == 1


FORKED_EARLY = """
import os, sys
import numpy as np
import datarax_dist as dd

with dd.Checkpointer(sys.argv[1] + "/others") as ckpt:
    ckpt.all_steps()
child = os.fork()
if child == 0:
    own = dd.Checkpointer(sys.argv[1])
    own.save(5, state={"w": np.ones(3)})
    sys.exit(7)  # which waits for its own save
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""


def test_a_forked_child_that_leaves_its_own_object_open_keeps_its_last_save(tmp_path: Path) -> None:
    run_script(FORKED_EARLY, tmp_path)
    assert (tmp_path / "5" / "COMMIT.json").exists()
    assert lease_of(tmp_path)["released"]


def test_at_the_end_of_the_process_one_that_hangs_keeps_no_other_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, left = dd.Checkpointer(tmp_path / "a"), list[Any]()
    hangs.save(1, state=STATE).result(SECONDS)
    others = [dd.Checkpointer(tmp_path / str(number)) for number in range(3)]
    handles = [other.save(1, state=STATE) for other in others]
    monkeypatch.setattr(checkpointer, "_left_open", [others[0], hangs, *others[1:]])
    for other in others:
        monkeypatch.setattr(other._group, "close", functools.partial(left.append, other))

    def drain() -> None:
        raise errors.StorageError("hangs still")

    with monkeypatch.context() as patch:
        patch.setattr(hangs, "_drain", drain)
        checkpointer._end_all()
    assert [handle.done() for handle in handles] == [True] * 3
    assert left == others, "hosts that wait for this one are told"
    assert [lease_of(tmp_path / str(number))["released"] for number in range(3)] == [True] * 3
    assert not lease_of(tmp_path / "a")["released"], "it may write yet"


def test_the_run_is_taken_again_after_an_error_was_told_instead(
    tmp_path: Path, disk_is_full: Callable[[bool], None]
) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        told_by_the_next_save(ckpt, disk_is_full, ckpt._let_others_write)
        assert ckpt.save(2, state=STATE).result(SECONDS).step == 2


def test_a_handler_keeps_nothing_of_the_leases_that_it_has_let_go(tmp_path: Path) -> None:
    handler = OrbaxCheckpointHandler()
    for step in range(4):
        handler.save(tmp_path, STATE, step=step)
    gc.collect()
    held = [one for one in gc.get_objects() if type(one) is sharing.Share]
    assert len([one for one in held if one.place == str(tmp_path)]) == 1


@pytest.mark.parametrize("step", [1, None])
def test_a_directory_of_a_handler_may_be_made_anew(tmp_path: Path, step: int | None) -> None:
    handler, root = OrbaxCheckpointHandler(), tmp_path / "run"
    for _ in range(2):
        handler.save(root, STATE, step=step)
        assert handler.restore(root)["w"].tolist() == [1, 1, 1]
        shutil.rmtree(root)


def test_a_handler_whose_save_is_refused_lets_the_run_go(tmp_path: Path) -> None:
    handler = OrbaxCheckpointHandler()
    handler.save(tmp_path, STATE, step=1)
    with pytest.raises(CheckpointExistsError):
        handler.save(tmp_path, STATE, step=1)
    assert lease_of(tmp_path)["released"]


def test_a_handler_that_is_interrupted_while_it_lets_the_run_go_can_save_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, put = OrbaxCheckpointHandler(), LocalStore.put
    handler.save(tmp_path, STATE, step=1, keep=None)

    def interrupted(store: Any, key: str, data: bytes) -> None:
        put(store, key, data)
        is_here = threading.current_thread() is threading.main_thread()
        if is_here and key.startswith("lease/") and json.loads(data)["released"]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            handler.save(tmp_path, STATE, step=2, keep=None)
    handler.save(tmp_path, STATE, step=3, keep=None)
    assert lease_of(tmp_path)["released"]

    def before_it(share: Any) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sharing.Share, "_is_last", before_it)
        with pytest.raises(KeyboardInterrupt):
            handler.save(tmp_path, STATE, step=4, keep=None)
    handler.save(tmp_path, STATE, step=5, keep=None)
    assert lease_of(tmp_path)["released"]
    assert handler.get_checkpoint_steps(tmp_path) == [1, 2, 3, 4, 5]


# Two on one root


def test_two_of_one_process_save_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stall = Stall(monkeypatch, "put", "TREE.json")
    save_both(str(tmp_path / "run"), stall)


@pytest.mark.parametrize(("method", "text"), [("put", "TREE.json"), ("copy", "1.staging-")])
def test_two_of_one_process_save_into_a_bucket_at_the_same_time(
    bucket: str, monkeypatch: pytest.MonkeyPatch, method: str, text: str
) -> None:
    save_both(f"gs://{bucket}/run", Stall(monkeypatch, method, text, BucketStore))


def save_both(root: str, stall: Stall) -> None:
    with dd.Checkpointer(root) as one, dd.Checkpointer(root) as other:
        handle = one.save(1, state=STATE)
        assert stall.reached.wait(SECONDS)
        assert other.save(2, state=STATE).result(SECONDS).step == 2
        stall.goes_on.set()
        assert handle.result(SECONDS).step == 1
        assert other.all_steps() == [1, 2]


# What was cut off


def test_what_a_write_that_was_cut_off_has_left_goes_after_a_day(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with dd.Checkpointer(root) as ckpt:
        ckpt.save(1, state=STATE).result(SECONDS)
    left = [".RUN.json.0123456789ab.tmp", "lease/.0000000001.json.0123456789ab.tmp"]
    now, others = [f"{name[:-5]}f.tmp" for name in left], [".notes.tmp", ".mine.0123456789.tmp"]
    for name in [*left, *now, *others]:
        (root / name).write_bytes(b"")
    for name in [*left, *others]:
        os.utime(root / name, (0, 0))
    with dd.Checkpointer(root) as ckpt:
        ckpt.save(2, state=STATE).result(SECONDS)
    assert [name for name in [*left, *now, *others] if not (root / name).exists()] == left


# Damage that was found


def test_a_step_that_was_found_damaged_may_be_saved_again_and_is_no_good_one(
    tmp_path: Path,
) -> None:
    with dd.Checkpointer(tmp_path / "run", keep=dd.latest(2)) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state=STATE).result(SECONDS)
    [record] = (tmp_path / "run" / "2" / "hosts").iterdir()
    record.write_bytes(b"{}")
    with dd.Checkpointer(tmp_path / "run", keep=dd.latest(2)) as ckpt:
        with pytest.raises(errors.CorruptStepError):
            ckpt.restore(step=2)
        ckpt.restore(step=1)
        assert ckpt.save(3, state=STATE).result(SECONDS).deleted == (), "1 and 3 are the good ones"
        assert ckpt.save(2, state=STATE).result(SECONDS).step == 2


def test_where_all_steps_are_damaged_each_may_be_saved_again(tmp_path: Path) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        for step in (1, 2):
            ckpt.save(step, state=STATE).result(SECONDS)
    for record in (tmp_path / "run").glob("*/hosts/*"):
        record.write_bytes(b"{}")
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        with pytest.raises(errors.CorruptStepError, match="Every committed step"):
            ckpt.restore()
        for step in (1, 2):
            assert ckpt.save(step, state=STATE).result(SECONDS).step == step
        assert ckpt.restore().step == 2
