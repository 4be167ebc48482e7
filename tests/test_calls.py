"""Hosts that do not all make the same call, are interrupted in one, or cannot reach the others for
a moment: the others hear of it, and the next calls work.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import datarax_dist as dd
from datarax_dist import checkpointer, hosts
from datarax_dist.beacons import Silence
from datarax_dist.boards import UnreachableError
from datarax_dist.clock import Clock, SystemClock
from datarax_dist.data.positions import Unasked
from datarax_dist.errors import CheckpointError, PeerError, PeerLostError, StorageError
from datarax_dist.hosts import HostGroup
from datarax_dist.inspection import inspect_run
from datarax_dist.request import SaveRequest
from datarax_dist.restore import Restorer
from datarax_dist.save import Saver, StartedSave
from datarax_dist.telemetry import Phases
from datarax_dist.testing import (
    FakeClock,
    MemoryArrays,
    MemoryBucket,
    MemoryStore,
    SimulatedHosts,
)

stores = pytest.mark.parametrize("make", [MemoryStore, MemoryBucket], ids=["file system", "bucket"])
SECONDS = 20.0  # for what must happen
# Nothing here waits for these, but where a host is waited for that does not come.
OPTIONS = dd.Options(
    exchange_timeout_seconds=5,
    save_timeout_seconds=5,
    restore_timeout_seconds=5,
    lease_ttl_seconds=1,
)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "_GRACE_SECONDS", 1.0)


class Board:
    """A host's board, on which something happens once: `at[method]` is called with a key, before
    the method, until it returns True.
    """

    def __init__(self, group: HostGroup) -> None:
        self._board = group._board
        group._board = self
        self.at: dict[str, Callable[[str], bool]] = {}
        self.value = ""  # that is being set

    def __getattr__(self, name: str) -> Any:
        act = getattr(self._board, name)

        def method(key: str, *rest: Any) -> Any:
            self.value = str(rest[0]) if rest else ""
            if name in self.at and self.at[name](key):
                del self.at[name]
            return act(key, *rest)

        return method if name in ("set", "wait", "read") else act


def unreachable() -> UnreachableError:
    return UnreachableError("it does not answer", Silence(11.0, "the first", cut_off=True))


class Job:
    """The hosts of a job, with what each saves with. In lock step, as training is."""

    def __init__(self, store: Any, count: int = 3, clock: Clock | None = None) -> None:
        self.store = store
        clock = clock or SystemClock()
        self.hosts = SimulatedHosts(count)
        self.boards = [Board(group) for group in self.hosts.groups]
        for group in self.hosts.groups:
            group._clock = clock
        self.savers = [Saver(store, group, clock, OPTIONS, None) for group in self.hosts.groups]

    def begin(self, group: HostGroup, step: int) -> StartedSave:
        request = SaveRequest(
            step=step,
            writer=MemoryArrays(self.store, group.index, {"a": b"x"}),
            shared={"TREE.json": b"{}"},
            items=("state",),
        )
        return self.savers[group.index].begin(step, lambda: request, Phases("save", group.index))

    def save(self, group: HostGroup, step: int) -> int:
        return self.begin(group, step).finish().step

    def restore(self, group: HostGroup) -> Any:
        restorer = Restorer(self.store, group, OPTIONS)
        load = lambda candidate, _: lambda: candidate.step
        return restorer.restore(None, load, Phases("restore", group.index))

    def each(self, *calls: Callable[[HostGroup], Any]) -> list[list[Any]]:
        """Makes calls on every host, all one after the other; returns how each one ended, for each
        host.
        """
        together = threading.Barrier(len(self.boards))

        def one(group: HostGroup) -> list[Any]:
            ended: list[Any] = []
            for call in calls:
                together.wait(60)
                try:
                    ended.append(call(group))
                except (KeyboardInterrupt, ZeroDivisionError, CheckpointError) as error:
                    ended.append(error)
            return ended

        found = self.hosts.run(one)
        assert all(isinstance(ended, list) for ended in found), found
        return found

    def saves(self, step: int) -> Callable[[HostGroup], int]:
        return lambda group: self.save(group, step)


class LateJob(Job):
    """One whose hosts wait in vain for one of them, until a deadline that is soon there."""

    def __init__(self, store: Any, late: int, count: int = 3) -> None:
        self._clock = FakeClock()
        super().__init__(store, count, self._clock)
        self._late = late
        self.ended = [threading.Event() for _ in range(count)]
        self.ended[late].set()

    def let_time_pass(self) -> None:
        """Until all others have ended."""
        while not all(ended.wait(0.05) for ended in self.ended):
            self._clock.sleep(60)

    def waits(self, group: HostGroup, step: int) -> int | None:
        """Saves, on the others."""
        if group.index == self._late:
            return None
        try:
            return self.save(group, step)
        finally:
            self.ended[group.index].set()


def check_told(errors: list[Any], victim: int, own: type, text: str) -> None:
    """All hosts have an error, the victim its own; the others name it at once."""
    for host, error in enumerate(errors):
        assert type(error) is (own if host == victim else PeerError), (host, error)
        if host != victim:
            assert list(error.failures) == [victim]
            assert text in error.failures[victim]


@stores
@pytest.mark.parametrize(
    ("call", "decided", "victim"),
    [
        *((call, True, victim) for call in ("save", "restore") for victim in (0, 1, 2)),
        *((call, False, 1) for call in ("save", "restore")),
    ],
)
def test_ctrl_c_on_one_host_while_hosts_agree_is_heard_by_all_and_the_next_save_works(
    make: Any, call: str, decided: bool, victim: int
) -> None:
    job, interrupted = Job(make()), threading.Event()
    job.each(job.saves(1))

    def interrupt(key: str) -> bool:
        if "/outcome/" in key:
            del job.boards[victim].at["wait"]
            if decided:
                assert job.boards[victim].wait(key, SECONDS)
            raise KeyboardInterrupt
        return False

    def after_it(key: str) -> bool:
        return "/outcome/" in key and interrupted.wait(SECONDS)

    def first(group: HostGroup) -> Any:
        try:
            return job.restore(group) if call == "restore" else job.save(group, 2)
        finally:
            if group.index == victim:
                interrupted.set()

    job.boards[victim].at["wait"] = interrupt
    if not decided:
        job.boards[0].at["set"] = after_it
    ended = job.each(first, job.saves(3))
    check_told([errors for errors, _ in ended], victim, KeyboardInterrupt, "KeyboardInterrupt")
    assert [step for _, step in ended] == [3, 3, 3]
    assert inspect_run(job.store).committed == [1, 3]


@pytest.mark.parametrize("call", ["save", "restore"])
def test_ctrl_c_while_the_service_does_not_answer_waits_for_one_request(call: str) -> None:
    job = Job(MemoryStore())
    job.each(job.saves(1))
    asked: list[str] = []

    def interrupt(key: str) -> bool:
        if "/outcome/" in key:
            raise KeyboardInterrupt
        return False

    def no_answer(key: str) -> bool:
        if "/outcome/" in key:
            asked.append(key)
            raise unreachable()
        return False

    job.boards[1].at |= {"wait": interrupt, "set": no_answer}
    [first] = job.each(
        lambda group: (
            (job.restore(group) if call == "restore" else job.save(group, 2))
            if group.index == 1
            else None
        )
    )[1:2]
    assert type(first[0]) is KeyboardInterrupt
    assert len(set(asked)) == 1 and len(asked) == 2, "one agreement, and its request once more"


@stores
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_host_that_has_missed_a_call_is_with_the_others_in_the_next_one(
    make: Any, victim: int
) -> None:
    job = LateJob(make(), victim)

    def not_on_one(group: HostGroup) -> int | None:
        if group.index == victim:
            job.let_time_pass()
        return job.waits(group, 2)

    ended = job.each(job.saves(1), not_on_one, job.saves(3), job.saves(4))
    for host, (one, two, three, four) in enumerate(ended):
        assert type(two) is (type(None) if host == victim else PeerLostError)
        assert (one, three, four) == (1, 3, 4)


@stores
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_host_that_has_made_a_call_alone_is_with_the_others_in_the_next_one(
    make: Any, victim: int
) -> None:
    job = Job(make())

    def fails() -> Any:
        raise ZeroDivisionError

    def on_one(group: HostGroup) -> Any:
        if group.index == victim:
            job.savers[victim].begin(2, fails, Phases("save", victim))

    ended = job.each(job.saves(1), on_one, job.saves(3), job.restore, job.saves(4))
    for host, (one, two, three, restored, four) in enumerate(ended):
        assert (type(two) in (ZeroDivisionError, PeerError)) == (host == victim)
        assert (one, three, restored[0], four) == (1, 3, 3, 4)


@stores
def test_hosts_that_save_different_steps_are_all_told(make: Any) -> None:
    job = Job(make())
    ended = job.each(job.saves(1), lambda group: job.save(group, 2 + group.index), job.saves(3))
    for one, two, three in ended:
        assert isinstance(two, PeerError) and not isinstance(two, PeerLostError)
        assert (one, three) == (1, 3)


@stores
def test_a_step_that_is_no_step_on_one_host_is_refused_on_all(make: Any) -> None:
    job = Job(make())

    def refused() -> Any:
        raise ZeroDivisionError

    def call(group: HostGroup) -> Any:
        if group.index == 1:
            return job.savers[1].begin(-1, refused, Phases("save", 1))
        return job.save(group, 2)

    ended = job.each(job.saves(1), call, job.saves(3))
    for one, two, three in ended:
        assert type(two) is PeerError and list(two.failures) == [1]
        assert (one, three) == (1, 3)


@stores
@pytest.mark.parametrize("call", ["save", "restore"])
@pytest.mark.parametrize("victim", [1, 2])
def test_a_host_that_did_not_hear_what_was_agreed_fails_the_call_at_once(
    make: Any, victim: int, call: str
) -> None:
    job = Job(make())

    tries: list[str] = []

    def cut_off(key: str) -> bool:
        if "/outcome/" not in key:
            return False
        tries.append(key)
        if len(tries) == 2:
            del job.boards[victim].at["wait"]
            assert job.boards[victim].wait(key, SECONDS)
        raise unreachable()

    job.each(job.saves(1))
    job.boards[victim].at["wait"] = cut_off
    ended = job.each(job.saves(2) if call == "save" else job.restore, job.saves(3))
    check_told([two for two, _ in ended], victim, PeerLostError, "could not reach JAX's")
    assert [three for _, three in ended] == [3, 3, 3]


@stores
@pytest.mark.parametrize("victim", [1, 2])
def test_a_host_that_could_not_say_how_far_it_is_fails_the_save_at_once(
    make: Any, victim: int
) -> None:
    job = Job(make())

    tries: list[str] = []

    def cut_off(key: str) -> bool:
        if "/arrays/" not in key:
            return len(tries) == 2
        tries.append(key)
        raise unreachable()

    job.boards[victim].at["set"] = cut_off
    ended = job.each(job.saves(1), job.saves(2))
    check_told([one for one, _ in ended], victim, PeerLostError, "could not reach JAX's")
    assert [two for _, two in ended] == [2, 2, 2]


@stores
@pytest.mark.parametrize("call", ["restore", "exchange"])
def test_a_primary_that_comes_when_the_call_has_failed_does_nothing(make: Any, call: str) -> None:
    job, led = LateJob(make(), 0), []

    def late(group: HostGroup) -> Any:
        if group.index == 0:
            job.let_time_pass()
        try:
            if call == "restore":
                return job.restore(group)
            return group.exchange("delete", leader=led.append, timeout_seconds=5)
        finally:
            job.ended[group.index].set()

    ended = job.each(job.saves(1), late, job.restore)
    for one, two, three in ended:
        assert type(two) is PeerLostError and two.missing == [0]
        assert (one, three[0]) == (1, 1)
    assert not led, "it was not deleted"
    assert not [name for name in job.store.children("") if "restoring" in name]


@stores
@pytest.mark.parametrize("call", ["save", "restore"])
def test_a_primary_that_cannot_see_who_has_come_fails_the_call_at_once(
    make: Any, call: str
) -> None:
    job = Job(make())
    phase = "/prepare/" if call == "save" else "/verify/"

    tries: list[str] = []

    def cut_off(key: str) -> bool:
        if phase not in key:
            return False
        tries.append(key)
        if len(tries) == 2:
            del job.boards[0].at["read"]
        raise unreachable()

    job.each(job.saves(1))
    job.boards[0].at["read"] = cut_off
    ended = job.each(job.saves(2) if call == "save" else job.restore, job.saves(3))
    check_told([two for two, _ in ended], 0, PeerLostError, "could not reach JAX's")
    assert [three for _, three in ended] == [3, 3, 3]


@stores
@pytest.mark.parametrize("rows", ["prepare", "outcome"])
def test_what_a_primary_cannot_read_for_a_moment_is_read_again(make: Any, rows: str) -> None:
    job = Job(make())

    def cut_off(key: str) -> bool:
        if f"/{rows}/" not in key:
            return False
        del job.boards[0].at["read"]
        raise unreachable()

    job.boards[0].at["read"] = cut_off
    assert job.each(job.saves(1)) == [[1], [1], [1]]
    assert "read" not in job.boards[0].at


@stores
@pytest.mark.parametrize("phase", ["prepare", "arrays"])
def test_who_can_reach_nobody_for_a_while_says_what_has_failed_when_it_can(
    make: Any, phase: str
) -> None:
    """In the next call, if not before; here before: while it waits for what the others say, or
    says that the whole has failed.
    """
    job, left = Job(make()), 4

    def cut_off(key: str) -> bool:
        nonlocal left
        if left and (f"/{phase}/" in key or "/outcome/" in key):
            left -= 1
            raise unreachable()
        return False

    job.each(job.saves(1))
    job.boards[1].at["set"] = cut_off
    ended = job.each(job.saves(2), job.saves(3))
    assert left == 0
    for host, (two, three) in enumerate(ended):
        assert type(two) is (PeerLostError if host == 1 else PeerError)
        assert host == 1 or list(two.failures) == [1]
        assert three == 3


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("then", ["waits", "makes its next call", "closes"])
def test_who_can_reach_nobody_until_its_save_has_ended_says_what_has_failed_after_it(
    tmp_path: Path, then: str, victim: int
) -> None:
    """Its watcher is the first to see that nobody is there."""
    job, is_away, has_failed = Job(MemoryStore()), threading.Event(), threading.Event()

    def cut_off(key: str) -> bool:
        if is_away.is_set() and ("/arrays/" in key or "/outcome/" in key):
            raise unreachable()
        return False

    def call(group: HostGroup) -> int:
        started = job.begin(group, 2)
        if group.index != victim:
            return started.finish().step
        handle = checkpointer.SaveHandle(2, started.phases)
        is_away.set()
        if then == "waits":
            work = started.finish

            def finish() -> Any:
                with pytest.raises(PeerLostError):
                    handle.result(SECONDS)
                try:
                    return work()
                finally:
                    has_failed.set()

            started.finish = finish  # type: ignore[method-assign]
            with dd.Checkpointer(tmp_path / "run") as ckpt:
                ckpt._worker.submit(ckpt._finish, checkpointer._Running(started, handle, []))
                assert has_failed.wait(SECONDS)
                is_away.clear()
            return handle.result(SECONDS).step
        try:
            return started.finish().step
        finally:
            is_away.clear()
            if then == "closes":
                group.close()

    def saves_and_goes_on(group: HostGroup) -> Any:
        try:
            return call(group)
        finally:
            if then == "makes its next call":
                group.exchange("next", timeout_seconds=SECONDS)

    job.each(job.saves(1))
    job.boards[victim].at |= {"set": cut_off, "wait": cut_off}
    for host, [two] in enumerate(job.each(saves_and_goes_on)):
        assert type(two) is (PeerLostError if host == victim else PeerError), two
        assert host == victim or "could not reach JAX's" in two.failures[victim]


@stores
@pytest.mark.parametrize("victim", [0, 1])
def test_a_look_of_one_host_is_not_taken_for_the_restore_of_the_others(
    make: Any, victim: int
) -> None:
    job = LateJob(make(), victim)

    def call(group: HostGroup) -> Any:
        if group.index != victim:
            try:
                return job.restore(group)
            finally:
                job.ended[group.index].set()
        with contextlib.suppress(PeerLostError):
            Restorer(job.store, group, OPTIONS).inspect()
        return None

    def in_time(group: HostGroup) -> Any:
        if group.index != victim:
            return call(group)
        passes = threading.Thread(target=job.let_time_pass)
        passes.start()
        try:
            return call(group)
        finally:
            passes.join(SECONDS)

    for host, [one, two] in enumerate(job.each(job.saves(1), in_time)):
        assert one == 1
        assert type(two) is (type(None) if host == victim else PeerLostError)
        assert host == victim or two.phase == "list", "and not when it has begun"


@stores
@pytest.mark.parametrize("phase", ["prepare", "arrays", "written"])
def test_a_reply_that_is_lost_fails_nothing(make: Any, phase: str) -> None:
    """What the host has said has arrived, and the others go on."""
    job = Job(make())

    def lost(key: str) -> bool:
        if f"/{phase}/" not in key:
            return False
        del job.boards[1].at["set"]
        job.boards[1]._board.set(key, job.boards[1].value)
        raise unreachable()

    job.boards[1].at["set"] = lost
    assert job.each(job.saves(1)) == [[1], [1], [1]]


def test_who_loses_the_reply_to_what_it_has_written_does_not_say_what_became_of_it() -> None:
    job = Job(MemoryStore())
    renamed, told = threading.Event(), threading.Event()
    rename = job.store.rename

    def slow(source: str, target: str) -> None:
        rename(source, target)
        renamed.set()
        assert told.wait(SECONDS)

    def lost(key: str) -> bool:
        if "/outcome/" in key:
            job.boards[1]._board.set(key, job.boards[1].value)
            told.set()
        if "/written/" not in key:
            return False
        job.boards[1]._board.set(key, job.boards[1].value)
        assert renamed.wait(SECONDS)
        raise unreachable()

    job.boards[1].at["set"], job.store.rename = lost, slow
    [[error], _, [also]] = job.each(job.saves(1))
    assert str(error) == str(also)
    assert "Step 1 may be committed or not" in str(error)
    assert inspect_run(job.store).committed == [1]


@pytest.mark.parametrize("times", [1, 2, 4, 6])
def test_who_is_cut_off_while_it_says_why_it_failed_says_it_again(times: int) -> None:
    job = Job(MemoryStore())

    def cut_off(key: str) -> bool:
        nonlocal times
        if "/outcome/" in key and times:
            times -= 1
            raise unreachable()
        return False

    def silent() -> dict[int, Silence]:
        nonlocal lasts
        lasts -= 1
        return {0: Silence(11.0, "the first", cut_off=True)} if lasts >= 0 else {}

    job.boards[1].at["set"] = cut_off
    lasts = min(times - 1, 1)
    job.boards[1].silent = silent  # type: ignore[attr-defined]

    def call(group: HostGroup) -> Any:
        error = StorageError("it is full") if group.index == 1 else None
        return group.exchange("vote", 1, error=error, timeout_seconds=OPTIONS.save_timeout_seconds)

    ended = job.each(call, job.saves(1))
    for host, (error, step) in enumerate(ended):
        assert step == 1
        if host != 1:
            assert type(error) is PeerError and "it is full" in error.failures[1]


@stores
@pytest.mark.parametrize("times", [2, 3, 4])
def test_what_is_committed_is_reported_though_that_cannot_be_said_for_a_moment(
    make: Any, times: int
) -> None:
    job = Job(make())

    def cut_off(key: str) -> bool:
        nonlocal times
        if times and "/outcome/" in key and 1 in inspect_run(job.store).committed:
            times -= 1
            raise unreachable()
        return False

    job.boards[0].at["set"] = cut_off
    assert job.each(job.saves(1), job.saves(2)) == [[1, 2]] * 3
    assert times == 0


@stores
@pytest.mark.parametrize("call", ["save", "restore", "look"])
@pytest.mark.parametrize("victim", [0, 1])
def test_who_has_closed_is_not_waited_for(make: Any, victim: int, call: str) -> None:
    job = Job(make())

    def closes_or_calls(group: HostGroup) -> Any:
        if group.index == victim:
            return group.close()
        if call == "look":
            return Restorer(job.store, group, OPTIONS).inspect()
        return job.saves(2)(group) if call == "save" else job.restore(group)

    for host, [_, two] in enumerate(job.each(job.saves(1), closes_or_calls)):
        if host != victim:
            assert type(two) is PeerError
            assert "has closed its Checkpointer" in two.failures[victim]


def test_what_was_passed_over_is_told_by_who_waits_in_vain() -> None:
    """Hosts are one step apart, and one of them cannot save: the others do not take that for theirs
    and are told of it when they have waited.
    """
    job = LateJob(MemoryStore(), 1)

    def fails() -> Any:
        raise ZeroDivisionError("no batch")

    def call(group: HostGroup) -> Any:
        if group.index == 1:
            with contextlib.suppress(PeerError):
                job.savers[1].begin(3, fails, Phases("save", 1))
            job.let_time_pass()
        return job.waits(group, 2)

    ended = job.each(job.saves(1), call, job.saves(4))
    assert [four for *_, four in ended] == [4, 4, 4]
    [error, _, also] = [two for _, two, _ in ended]
    assert isinstance(error, PeerLostError) and isinstance(also, PeerLostError)
    assert "was about save of step 3, and failed: " in str(error) and "no batch" in str(error)


def test_a_policy_that_fails_on_one_host_in_the_first_call_is_heard_by_all() -> None:
    """The others do not save, and ask whether they may."""
    job = Job(MemoryStore())

    def fails() -> Any:
        raise ZeroDivisionError

    def call(group: HostGroup) -> Any:
        if group.index == 1:
            return job.savers[1].begin(1, fails, Phases("save", 1))
        return job.savers[group.index].take(1)

    ended = job.each(call, job.saves(2), job.saves(3))
    for first, *rest in ended:
        assert type(first) is PeerError and list(first.failures) == [1]
        assert rest == [2, 3]


def test_of_many_hosts_that_hear_of_a_lost_one_none_says_it_once_more() -> None:
    job = LateJob(MemoryStore(), 7, 20)
    outcomes: list[str] = []

    def count(key: str) -> bool:
        if "/outcome/" in key:
            outcomes.append(key)
        return False

    for board in job.boards:
        board.at["set"] = count

    def call(group: HostGroup) -> Any:
        if group.index == 7:
            job.let_time_pass()
        return job.waits(group, 1)

    ended = job.each(call)
    assert sum(isinstance(error, PeerLostError) for [error] in ended) == 19
    assert len(outcomes) <= 3


@stores
def test_whether_hosts_ask_each_other_does_not_depend_on_what_only_some_know(make: Any) -> None:
    """The first call takes the run, though it saves nothing."""
    job = Job(make())

    def interrupt(key: str) -> bool:
        if "/outcome/" in key:
            del job.boards[1].at["wait"]
            assert job.boards[1].wait(key, SECONDS)
            raise KeyboardInterrupt
        return False

    def no_save(group: HostGroup) -> None:
        job.savers[group.index].take(1)

    job.boards[1].at["wait"] = interrupt
    ended = job.each(no_save, no_save, job.saves(3), no_save, job.saves(5))
    for host, (first, *rest) in enumerate(ended):
        assert type(first) is (KeyboardInterrupt if host == 1 else type(None))
        assert rest == [None, 3, None, 5]


def test_a_host_that_was_cut_off_while_its_save_went_on_hears_that_it_is_committed() -> None:
    job, is_out = Job(MemoryStore()), threading.Event()
    tries: list[str] = []

    def cut_off(key: str) -> bool:
        if threading.current_thread().name != "datarax_dist-watch":
            return False
        tries.append(key)
        if len(tries) == 2:
            del job.boards[1].at["wait"]
        raise unreachable()

    def not_before(key: str) -> bool:
        return "/written/" in key and is_out.wait(SECONDS)

    def save(group: HostGroup) -> tuple[int, Any]:
        started = job.begin(group, 1)
        handle = dd.SaveHandle(1, started.phases)
        running = checkpointer._Running(started, handle, [])
        ckpt: Any = SimpleNamespace(_root="run", _running=None, _unasked=Unasked())
        if group.index == 1:
            job.boards[1].at["wait"], job.boards[1].at["set"] = cut_off, not_before
        threading.Thread(target=dd.Checkpointer._finish, args=(ckpt, running)).start()
        told: Any = None
        try:
            handle.result(SECONDS)
        except PeerLostError as error:
            told = error
            is_out.set()
        assert running.over.wait(SECONDS)
        return handle.result(SECONDS).step, told

    ended = job.each(save)
    assert [(step, type(told)) for [(step, told)] in ended] == [
        (1, type(None)),
        (1, PeerLostError),
        (1, type(None)),
    ]


class Count:
    """A loader."""

    def __init__(self) -> None:
        self.number = 0

    def __iter__(self) -> Count:
        return self

    def __next__(self) -> int:
        self.number += 1
        return self.number

    def get_state(self) -> dict[str, int]:
        return {"number": self.number}

    def set_state(self, state: dict[str, int]) -> None:
        self.number = state["number"]


def opened(
    job: Job, path: Path, monkeypatch: pytest.MonkeyPatch, **more: Any
) -> dict[int, dd.Checkpointer]:
    """Returns a real `Checkpointer` for each host of a job."""
    found: dict[int, dd.Checkpointer] = {}
    for group in job.hosts.groups:
        monkeypatch.setattr(checkpointer, "current_group", lambda *_, group=group: group)
        found[group.index] = dd.Checkpointer(path / "run", options=OPTIONS, **more)
    return found


def cannot_drain(ckpt: Any, what: BaseException) -> None:
    """Once."""

    def cut() -> None:
        del ckpt._drain
        raise what

    ckpt._drain = cut


@pytest.mark.parametrize("what", [KeyboardInterrupt(), StorageError("it hangs", errno=None)])
@pytest.mark.parametrize("call", ["save", "restore", "delete"])
def test_who_cannot_end_its_save_before_a_call_tells_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, what: BaseException
) -> None:
    """Here one is interrupted, or its storage hangs, while a call waits for the save before."""
    job = Job(MemoryStore(), 2)
    ckpts = opened(job, tmp_path, monkeypatch)

    def saves(step: int) -> Callable[[HostGroup], int]:
        return lambda group: ckpts[group.index].save(step, data=Count()).result(SECONDS).step

    def acts(group: HostGroup) -> Any:
        ckpt = ckpts[group.index]
        if group.index == 1:
            cannot_drain(ckpt, what)
        if call == "save":
            return saves(2)(group)
        return ckpt.restore(data=Count()) if call == "restore" else ckpt.delete(1)

    ended = job.each(saves(1), acts, saves(3), lambda group: ckpts[group.index].all_steps())
    own = PeerError if isinstance(what, StorageError) else type(what)
    check_told([errors for _, errors, *_ in ended], 1, own, type(what).__name__)
    assert [steps for *_, steps in ended] == [[1, 3], [1, 3]]
    job.each(lambda group: ckpts[group.index].close())


def test_hosts_ask_alike_after_one_was_interrupted_while_it_let_the_run_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(MemoryStore(), 2)
    ckpts = opened(job, tmp_path, monkeypatch, save_when=dd.every_steps(10))

    def let_go(group: HostGroup) -> None:
        if group.index == 0:
            cannot_drain(ckpts[0], KeyboardInterrupt())
        ckpts[group.index]._let_others_write()

    def saves(step: int) -> Callable[[HostGroup], Any]:
        return lambda group: ckpts[group.index].save(step, data=Count())

    ended = job.each(saves(1), let_go, saves(2))
    assert [(type(cut), none) for _, cut, none in ended] == [
        (KeyboardInterrupt, None),
        (type(None), None),
    ]
    job.each(lambda group: ckpts[group.index].close())
