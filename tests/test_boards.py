"""What a job of many `Checkpointer`s costs a process and JAX's coordination service."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import datarax_dist as dd
from datarax_dist import boards, hosts
from datarax_dist.beacons import Silence
from datarax_dist.boards import LocalBoard, PatientClient, UnreachableError
from datarax_dist.hosts import HostGroup

SECONDS = 10.0  # for what must happen


class Service:
    """JAX's coordination service, as a client sees it that may hang."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hangs, self.goes_on = threading.Event(), threading.Event()
        self.silence: dict[int, Silence] = {}
        self.asked: list[str] = []
        beacons = SimpleNamespace(silent=lambda seconds: dict(self.silence))
        monkeypatch.setattr(boards, "_beacons", lambda: beacons)
        monkeypatch.setattr(boards, "_SLICE_SECONDS", 0.05)
        boards._Calls.forget()

    def ask(self, what: str) -> str:
        self.asked.append(what)
        if what == "hang":
            self.hangs.set()
            assert self.goes_on.wait(SECONDS)
        return what


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    return Service(monkeypatch)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "datarax_dist-board"]


def test_clients_share_a_thread(service: Service) -> None:
    before = threads()
    for number in range(5):
        assert PatientClient(service).ask(f"{number}") == f"{number}"
    assert len(threads()) == len(before) + 1


def test_calls_behind_one_that_hangs_end_and_the_next_ones_work(service: Service) -> None:
    before = threads()
    clients = [PatientClient(service) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(clients[0].ask, "hang")
        assert service.hangs.wait(SECONDS)
        behind = [pool.submit(client.ask, "behind") for client in clients[1:]]
        service.silence = {0: Silence(11.0, "the first", cut_off=True)}
        for call in (first, *behind):
            with pytest.raises(UnreachableError):
                call.result(SECONDS)
    [hung] = [thread for thread in threads() if thread not in before]
    service.silence = {}
    assert [client.ask("again") for client in clients] == 3 * ["again"]
    assert len(threads()) == len(before) + 2
    service.goes_on.set()
    hung.join(SECONDS)
    assert not hung.is_alive(), "nobody needs it any more"
    assert "behind" not in service.asked, "nor what nobody waits for"


FORKED = """
import os, signal, types
from datarax_dist import boards

boards._beacons = lambda: types.SimpleNamespace(silent=lambda seconds: {})
client = boards.PatientClient(types.SimpleNamespace(ask=str))
assert client.ask(1) == "1"
with boards._Calls._lock:
    child = os.fork()
    if child == 0:
        signal.alarm(8)
        os._exit(7 if client.ask(2) == "2" else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert client.ask(3) == "3"
"""


def test_a_forked_child_neither_waits_for_the_thread_of_its_parent_nor_for_its_lock() -> None:
    command = [sys.executable, "-c", FORKED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


class Registers:
    """What `JaxBoard` is on the hosts of a job, each a thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.shared = LocalBoard(0, count)
        self.count = count
        self.host = threading.local()
        self.siblings = [hosts._Siblings("root") for _ in range(count)]
        monkeypatch.setattr(hosts, "JaxBoard", self.board)

    def board(self, namespace: str, silence_seconds: float = 10.0) -> Any:
        board = LocalBoard(self.host.index, self.count, shared=self.shared)
        start = len(f"{namespace}/")

        def named(act: Any) -> Any:
            return lambda key, *rest: act(f"{namespace}/{key}", *rest)

        def read(prefix: str) -> dict[str, str]:
            return {key[start:]: row for key, row in named(board.read)(prefix).items()}

        return SimpleNamespace(
            set=named(board.set),
            wait=named(board.wait),
            clear=named(board.clear),
            read=read,
            silent=board.silent,
            index=board.index,
            count=board.count,
        )

    def each(self, act: Any) -> list[Any]:
        def one(index: int) -> Any:
            self.host.index = index
            return act(index, self.siblings[index])

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(one, range(self.count)))

    def of_groups(self) -> set[str]:
        return {key.split("/")[1] for key in self.shared.read("")}


def votes(group: HostGroup) -> list[Any]:
    return [group.exchange("vote", group.index, timeout_seconds=20) for _ in range(2)]


def test_what_the_hosts_have_said_in_groups_that_are_closed_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = Registers(monkeypatch, 3)

    def one(index: int, siblings: hosts._Siblings) -> None:
        for _ in range(10):
            group = siblings.open(10.0)
            assert votes(group) == 2 * [[0, 1, 2]]
            group.close()

    job.each(one)
    assert job.of_groups() <= {"9", "10"}


@pytest.mark.parametrize("how", ["is kept by one host", "was dropped by all"])
def test_a_group_that_a_host_still_uses_is_not_forgotten(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    job, kept = Registers(monkeypatch, 2), []

    def one(index: int, siblings: hosts._Siblings) -> None:
        first = [siblings.open(10.0)]
        assert votes(first[0]) == 2 * [[0, 1]]
        if how == "is kept by one host" and index == 1:
            kept.append(first[0])
        first.clear()
        for _ in range(3):
            group = siblings.open(10.0)
            votes(group)
            group.close()

    job.each(one)
    assert job.of_groups() == ({"1", "2", "3", "4"} if kept else {"4"})


def test_groups_may_be_opened_and_asked_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread saves for the first time, while another opens a `Checkpointer`."""
    job = Registers(monkeypatch, 1)
    job.host.index = 0
    [siblings] = job.siblings
    groups, is_asking, goes_on = [siblings.open(10.0)], threading.Event(), threading.Event()

    class Open(dict[int, HostGroup]):
        def keys(self) -> Any:
            for number in self:
                is_asking.set()
                assert goes_on.wait(SECONDS)
                yield number

    class Lock:
        """The lock of the siblings, which tells that somebody waits for it."""

        def __init__(self) -> None:
            self._lock = threading.RLock()

        def __enter__(self) -> None:
            if not self._lock.acquire(blocking=False):
                goes_on.set()
                self._lock.acquire()

        def __exit__(self, *error: object) -> None:
            self._lock.release()

    siblings._open = Open(siblings._open)  # type: ignore[assignment]
    siblings._lock = Lock()  # type: ignore[assignment]
    with ThreadPoolExecutor(1) as pool:
        oldest = pool.submit(siblings.oldest)
        assert is_asking.wait(20)
        groups.append(siblings.open(10.0))
        goes_on.set()
        assert oldest.result(20) == 1


def test_who_closes_will_not_use_its_group_again(tmp_path: Path) -> None:
    siblings = hosts._Siblings("root")
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        siblings._opened, siblings._open[1] = 1, ckpt._group
        ckpt._group._siblings = siblings
        assert siblings.oldest() == 1
    assert siblings.oldest() == 2
