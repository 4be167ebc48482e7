"""Computations of all hosts' devices in a restore: all hosts begin them, or none does."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from typing import Any

import pytest

from datarax_dist import config, gathers
from datarax_dist.beacons import Silence
from datarax_dist.boards import LocalBoard, UnreachableError
from datarax_dist.errors import CheckpointError, InvalidArgumentError, PeerError, PeerLostError
from datarax_dist.gathers import GATHER, Gathering, raise_if_stuck
from datarax_dist.hosts import HostGroup, Operation
from datarax_dist.restore import Restorer
from datarax_dist.telemetry import Phases
from datarax_dist.testing import SimulatedHosts
from datarax_dist.testing.simulated import MemoryStore


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datarax_dist.gathers._left", [])


def restore(
    store: Any, group: HostGroup, load: Any, silence_seconds: float = 10.0, seconds: float = 10.0
) -> Any:
    options = config.Options(
        exchange_timeout_seconds=10,
        restore_timeout_seconds=seconds,
        peer_silence_seconds=silence_seconds,
    )
    found = Restorer(store, group, options).restore(None, load, Phases("restore", group.index))
    return found and found[0]


@pytest.fixture
def saved() -> tuple[MemoryStore, SimulatedHosts]:
    from test_protocol import save

    store = MemoryStore()
    SimulatedHosts(3).run(lambda group: save(store, group, 1))
    return store, SimulatedHosts(3)


def test_all_gather_at_the_same_time_after_all_have_loaded_and_before_any_applies(
    saved: Any,
) -> None:
    store, hosts = saved
    told: list[str] = []
    met = threading.Barrier(3)  # as a collective: nobody leaves before all are in it

    def on(group: HostGroup) -> Any:
        def load(candidate: Any, loading: Any) -> Any:
            def gather(together: Any) -> None:
                with together():
                    met.wait(10)
                told.append("gathered")

            loading.gather_later("parts of a", gather)
            told.append("loaded")
            return lambda: told.append("applied")

        return restore(store, group, load)

    assert hosts.run(on) == [None] * 3
    assert told == ["loaded"] * 3 + ["gathered"] * 3 + ["applied"] * 3


@pytest.mark.parametrize("victim", [0, 2])
def test_hosts_that_would_gather_different_things_are_told_so_before(
    saved: Any, victim: int
) -> None:
    store, hosts = saved
    done: list[str] = []

    def on(group: HostGroup) -> Any:
        def load(candidate: Any, loading: Any) -> Any:
            if group.index != victim:
                loading.gather_later("parts of a", lambda together: done.append("gathered"))
            return lambda: done.append("applied")

        return restore(store, group, load)

    results = hosts.run(on)
    assert [type(result) for result in results] == [InvalidArgumentError] * 3
    assert all("single_replica_restore" in str(result) for result in results)
    assert done == []


@pytest.mark.parametrize("victim", [0, 2])
def test_a_gather_that_fails_on_one_host_and_never_ends_on_the_others_is_an_error_on_all(
    saved: Any, victim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, hosts = saved
    monkeypatch.setattr("datarax_dist.gathers._BEACONS_SECONDS", 0.0)
    applied: list[int] = []
    over = threading.Event()

    def on(group: HostGroup) -> Any:
        def load(candidate: Any, loading: Any) -> Any:
            def gather(together: Any) -> None:
                with together():
                    if group.index == victim:
                        raise ValueError("no memory on the device")
                    over.wait(20)

            loading.gather_later("parts of a", gather)
            return lambda: applied.append(group.index)

        return restore(store, group, load, silence_seconds=0.1)

    uncaught: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", uncaught.append)
    results = hosts.run(on)
    assert all("Start this job again" in str(result.__notes__) for result in results)
    with pytest.raises(CheckpointError, match="Start this job again"):
        raise_if_stuck()
    over.set()
    for thread in threading.enumerate():
        if thread.name == "datarax_dist-gather":
            thread.join(10)
    assert uncaught == [], "who comes too late is no error any more"
    assert [type(result) for result in results] == [PeerError] * 3
    assert all(
        f"host {victim} failed in phase 'gather'" in str(result)
        and "no memory on the device" in str(result)
        for result in results
    )
    assert applied == []


@pytest.mark.parametrize("victim", [0, 2])
def test_a_host_that_fails_before_all_are_ready_keeps_the_others_from_beginning(
    saved: Any, victim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they began could not be ended, and would be paired with whatever comes next."""
    store, hosts = saved
    begun: list[tuple[int, int]] = []
    over: list[int] = []

    def on(group: HostGroup) -> Any:
        def load(candidate: Any, loading: Any) -> Any:
            def gather(together: Any) -> None:
                try:
                    for batch in range(3):
                        if (group.index, batch) == (victim, 1):
                            raise MemoryError
                        with together():
                            begun.append((batch, group.index))
                finally:
                    over.append(group.index)

            loading.gather_later("parts of a", gather)
            return lambda: None

        with pytest.raises(PeerError, match=f"host {victim} failed in phase 'gather'") as raised:
            restore(store, group, load)
        assert not hasattr(raised.value, "__notes__")
        return restore(store, group, lambda candidate, loading: lambda: "whole")

    assert hosts.run(on) == ["whole"] * 3
    for thread in threading.enumerate():
        if thread.name == "datarax_dist-gather":
            thread.join(5)  # a second; their deadline is 10
    raise_if_stuck()
    assert sorted(begun) == [(0, 0), (0, 1), (0, 2)]
    assert sorted(over) == [0, 1, 2]


@pytest.mark.parametrize("how", ["deadline", "interrupt"])
@pytest.mark.parametrize("late", [(0,), (2,), (0, 1, 2)])
def test_who_is_late_for_a_computation_of_a_restore_that_has_failed_begins_none(
    saved: Any, late: tuple[int, ...], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do the others, which have waited for it; and later calls are as if nothing was."""
    result = Operation.result

    def interrupted(operation: Operation, phase: str, *arguments: Any, **more: Any) -> Any:
        if phase == GATHER and operation._group.index == 1:
            raise KeyboardInterrupt
        return result(operation, phase, *arguments, **more)

    if how == "interrupt":
        monkeypatch.setattr(Operation, "result", interrupted)
    store, hosts = saved
    monkeypatch.setattr("datarax_dist.hosts._GRACE_SECONDS", 0.0)
    begun: list[int] = []
    have_failed, may_come = threading.Barrier(3), threading.Event()

    def on(group: HostGroup) -> Any:
        def load(candidate: Any, loading: Any) -> Any:
            def gather(together: Any) -> None:
                assert group.index not in late or may_come.wait(20)
                with together():
                    begun.append(group.index)

            loading.gather_later("parts of a", gather)
            return lambda: None

        with pytest.raises((PeerError, KeyboardInterrupt)) as raised:
            restore(store, group, load, seconds=0.5 if how == "deadline" else 20)
        assert not hasattr(raised.value, "__notes__")
        have_failed.wait(20)
        group.begin("another call, which others have not made")
        have_failed.wait(20)
        may_come.set()
        for thread in threading.enumerate():
            if thread.name == "datarax_dist-gather":
                thread.join(20)
        raise_if_stuck()
        return "together"

    assert hosts.run(on) == ["together"] * 3
    assert begun == []


def test_a_computation_that_ends_a_little_later_is_not_told_of() -> None:
    """Another host may have failed that ended it a little earlier."""
    begun, is_waited_for = threading.Event(), threading.Event()

    class Changed(threading.Condition):
        def wait_for(self, predicate: Any, timeout: float | None = None) -> Any:
            is_waited_for.set()
            return super().wait_for(predicate, timeout)

    def gather(together: Any) -> None:
        with together():
            begun.set()
            is_waited_for.wait(10)

    group = HostGroup(LocalBoard())
    with group.begin("restore").part(GATHER) as operation:
        gathering = Gathering(group, operation, time.monotonic() + 10, 10)
        gathering._changed = Changed()
        thread = threading.Thread(target=gathering.run, args=(gather,))
        thread.start()
        assert begun.wait(10)
        error = CheckpointError("another host has failed")
        gathering.give_up(error)
        assert not hasattr(error, "__notes__")
        thread.join(10)
    raise_if_stuck()


def test_a_host_that_has_gone_after_its_part_is_named_while_the_others_hang(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, hosts = saved
    over = threading.Event()
    board = hosts.groups[0]._board

    def silent() -> Any:
        # What it has said of the whole, behind what it has said of the one computation.
        said = [key for key in board.read("") if key.endswith("/gather/2")]
        has_passed = any(key.count("/") == 3 for key in said)
        return {2: Silence(11.0)} if has_passed else {}

    for group in hosts.groups:
        monkeypatch.setattr(group._board, "silent", silent)

    def on(group: HostGroup) -> Any:
        def load(candidate: Any, loading: Any) -> Any:
            def gather(together: Any) -> None:
                with together():
                    if group.index != 2:
                        over.wait(20)

            loading.gather_later("parts of a", gather)
            return lambda: None

        return restore(store, group, load)

    results = hosts.run(on)
    over.set()
    assert [type(result) for result in results] == [PeerLostError] * 3
    assert all("Host 2: no sign of life" in str(result) for result in results)
    assert all(result.missing == [2] for result in results)


# What goes wrong on the way


def gather_on(hosts: SimulatedHosts, store: Any, gather: Any, **more: Any) -> list[Any]:
    """Restores with `gather(group, together)` as the computations; what each host is told."""

    def on(group: HostGroup) -> Any:
        def load(candidate: Any, loading: Any) -> Any:
            loading.gather_later("parts of a", lambda together: gather(group, together))
            return lambda: "restored"

        return restore(store, group, load, **more)

    return hosts.run(on)


def join_gathers() -> None:
    for thread in threading.enumerate():
        if thread.name == "datarax_dist-gather":
            thread.join(10)


def test_a_host_that_ends_its_wait_with_an_error_of_its_own_says_so(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler that raises, say. Its other thread knows of it then, and has nothing to say;
    the others would wait for as long as a restore may take.
    """
    store, hosts = saved
    result, stop = Operation.result, Operation.stop
    is_asked, may_come = threading.Event(), threading.Event()

    def interrupted(operation: Operation, phase: str, *arguments: Any, **more: Any) -> Any:
        is_waiting = threading.current_thread().name != "datarax_dist-gather"
        if phase == GATHER and operation._group.index == 1 and is_waiting:
            assert is_asked.wait(20)
            raise TimeoutError("the alarm of a training loop")
        if not is_waiting and operation._group.index == 1:
            is_asked.set()
        return result(operation, phase, *arguments, **more)

    def stopped(operation: Operation, *arguments: Any) -> bool:
        has_stopped = stop(operation, *arguments)
        may_come.set()
        join_gathers()  # they hear of it before this one goes on
        return has_stopped

    def gather(group: HostGroup, together: Any) -> None:
        assert group.index != 2 or may_come.wait(20)
        with together():
            raise AssertionError("not all were ready")

    monkeypatch.setattr(Operation, "result", interrupted)
    monkeypatch.setattr(Operation, "stop", stopped)
    first, second, third = gather_on(hosts, store, gather, seconds=8)
    assert isinstance(second, TimeoutError)
    for error in (first, third):
        assert "host 1 failed in phase 'gather': TimeoutError: the alarm" in str(error)


def test_what_another_host_has_failed_with_first_is_what_is_raised() -> None:
    first, second = (group.begin("restore") for group in SimulatedHosts(2).groups)
    second.fail(GATHER, MemoryError("no memory"))
    heard = PeerError("host 1 gave up.", phase=GATHER, failures={1: "gave up"})
    first.fail(GATHER, heard, is_own=False)  # on its other thread
    with pytest.raises(PeerError, match="host 1 failed in phase 'gather': MemoryError: no memory"):
        first.result(GATHER, time.monotonic() + 10)


def test_a_host_that_cannot_say_that_all_is_done_says_so(saved: Any) -> None:
    store, hosts = saved
    board = hosts.groups[1]._board
    say, lost = board.set, []

    def set_(key: str, value: str) -> bool:
        if key.endswith("/gather/1") and key.count("/") == 3 and len(lost) < 2:
            lost.append(key)
            raise UnreachableError("UNAVAILABLE")
        return say(key, value)

    board.set = set_  # type: ignore[method-assign]

    def gather(group: HostGroup, together: Any) -> None:
        with together():
            pass

    results = gather_on(hosts, store, gather, seconds=8)
    assert len(lost) == 2
    for error in results:
        assert "reach JAX's coordination service" in str(error)
    raise_if_stuck()


@pytest.mark.parametrize("asks", ["outcome/0", "gather/2"])
def test_one_answer_that_is_lost_ends_nothing(saved: Any, asks: str) -> None:
    store, hosts = saved
    lost: list[str] = []
    is_waited_for = threading.Event()

    def losing(group: HostGroup) -> Any:
        wait = group._board.wait

        def wait_(key: str, seconds: float) -> str | None:
            is_gather = threading.current_thread().name == "datarax_dist-gather"
            if is_gather and key.endswith(asks):
                is_waited_for.set()
            value = wait(key, seconds)
            if is_gather and value is not None and key.endswith(asks) and not lost:
                lost.append(key)
                raise UnreachableError("UNAVAILABLE: Socket closed")
            return value

        return wait_

    def gather(group: HostGroup, together: Any) -> None:
        if group.index == 2 and asks == "gather/2":
            assert is_waited_for.wait(20)
        with together():
            pass

    for group in hosts.groups:
        group._board.wait = losing(group)  # type: ignore[method-assign]
    assert gather_on(hosts, store, gather) == ["restored"] * 3
    assert len(lost) == 1


def test_hosts_are_not_said_to_have_missed_a_call_while_they_make_ready(
    saved: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, hosts = saved
    is_waited_for = threading.Event()
    gone = Operation._gone

    def waits(operation: Operation, *arguments: Any) -> list[int]:
        if threading.current_thread().name == "datarax_dist-gather":
            if len(seen) == 3:
                is_waited_for.set()
            seen.append(0)
        return gone(operation, *arguments)

    seen: list[int] = []

    def gather(group: HostGroup, together: Any) -> None:
        if group.index == 0:
            monkeypatch.setattr("datarax_dist.hosts._TOLD_SECONDS", 0.0)
            monkeypatch.setattr(Operation, "_gone", waits)
        if group.index == 2:
            assert is_waited_for.wait(20)
        with together():
            pass

    assert gather_on(hosts, store, gather) == ["restored"] * 3
    assert [record.message for record in caplog.records] == []


class Slow:
    """A gather of a host of its own, which was given up while it computed."""

    def __init__(self, board: LocalBoard | None = None) -> None:
        self.group = HostGroup(board or LocalBoard())
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.operation = self.group.begin("restore")
        self.gathering = Gathering(self.group, self.operation, time.monotonic() + 20, 10)
        self.thread = threading.Thread(target=self.gathering.run, args=(self._gather,))
        self.thread.start()

    def _gather(self, together: Any) -> None:
        with together():
            self.begun.set()
            assert self.may_end.wait(20)

    def end(self) -> None:
        self.may_end.set()
        self.thread.join(20)


def test_whatever_cuts_it_short_a_computation_that_was_left_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C once more, say."""

    def interrupt(*arguments: Any) -> bool:
        raise KeyboardInterrupt

    slow = Slow()
    assert slow.begun.wait(20)
    with monkeypatch.context() as patch:
        patch.setattr(Operation, "stop", interrupt)
        with pytest.raises(KeyboardInterrupt):
            slow.gathering.give_up(CheckpointError("another host has failed"))
    with pytest.raises(CheckpointError, match="Start this job again"):
        raise_if_stuck()
    slow.end()
    raise_if_stuck()


def test_what_was_not_agreed_on_as_it_turns_out_holds_nobody_up() -> None:
    """Where nothing could be heard of it when the restore failed."""
    first, second = LocalBoard(0, 2), None
    second = LocalBoard(1, 2, shared=first)
    answers = {name: getattr(second, name) for name in ("set", "read", "wait")}
    is_down = threading.Event()

    def through(name: str) -> Any:
        def call(*arguments: Any) -> Any:
            if is_down.is_set():
                raise UnreachableError("UNAVAILABLE")
            return answers[name](*arguments)

        return call

    for name in answers:
        setattr(second, name, through(name))
    slow = Slow(second)
    assert first.wait("0/0/gather/1", 20)
    is_down.set()
    error = CheckpointError("another host has failed")
    slow.gathering.give_up(error)
    assert "Start this job again" in error.__notes__[0]
    with pytest.raises(CheckpointError, match="Start this job again"):
        raise_if_stuck()
    is_down.clear()
    raise_if_stuck()
    slow.end()
    assert not slow.begun.is_set()


def test_what_has_ended_keeps_nothing_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arrays of the failed restore, say, by the traceback of its error."""
    monkeypatch.setattr(gathers, "_LATE_SECONDS", 0.0)
    slow = Slow()
    assert slow.begun.wait(20)

    def fail(gathering: Gathering) -> weakref.ref[Any]:
        arrays = threading.Event()
        try:
            raise CheckpointError("another host has failed")
        except CheckpointError as error:
            gathering.give_up(error)
        return weakref.ref(arrays)

    kept = fail(slow.gathering)
    assert kept() is not None
    slow.end()
    raise_if_stuck()
    del slow
    gc.collect()
    assert kept() is None


def test_who_comes_after_the_restore_has_failed_begins_nothing() -> None:
    group, begun = HostGroup(LocalBoard()), []
    gathering = Gathering(group, group.begin("restore"), time.monotonic() + 20, 10)
    gathering.give_up(CheckpointError("another host has failed"))

    def gather(together: Any) -> None:
        with together():
            begun.append(group.index)

    gathering.run(gather)
    assert begun == []
