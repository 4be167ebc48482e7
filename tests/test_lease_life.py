"""A lease from its first thread to its last file: what fails on the way locks nobody out, and what
is gone does not come back.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datarax_dist import config, sharing, writers
from datarax_dist import format as fmt
from datarax_dist.checkpoint import OrbaxCheckpointHandler
from datarax_dist.clock import SystemClock
from datarax_dist.errors import InvalidArgumentError, LeaseError, StorageError
from datarax_dist.lease import Lease, newest_lease
from datarax_dist.storage import LocalStore
from datarax_dist.testing import FakeClock, MemoryBucket, MemoryStore
from datarax_dist.writers import writer_identity

TTL = 60.0
SOON = 0.12  # in seconds: then a thread renews each 20 ms
ELSEWHERE = {"machine": "another boot/pid:[1]", "pid": 7, "started": "1", "name": "far"}


class Clock(FakeClock):
    """Others may act while somebody sleeps."""

    def __init__(self, while_asleep: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._while_asleep = while_asleep
        self.begin = self.monotonic()

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        self._while_asleep()

    @property
    def elapsed(self) -> float:
        return self.monotonic() - self.begin


def at_once() -> Clock:
    return Clock(lambda: pytest.fail("nobody needs to wait"))


def lease(store: Any, clock: Any = None, **more: Any) -> Lease:
    arguments: dict[str, Any] = {"ttl_seconds": TTL, "owner": ELSEWHERE, **more}
    return Lease(store, clock or Clock(), **arguments)


def mine(store: Any, clock: Any = None, **more: Any) -> Lease:
    return lease(store, clock, owner=writer_identity(), **more)


def take(one: Lease) -> None:
    one.hold("run", lambda run, older, is_newest: None)


def files(store: Any) -> list[str]:
    return store.children(fmt.LEASE_NAME)


@pytest.fixture(params=[MemoryStore, MemoryBucket], ids=["file system", "bucket"])
def store(request: pytest.FixtureRequest) -> Any:
    return request.param()


def parent() -> dict[str, Any]:
    """Another process of this machine, which runs, as an owner."""
    pid = os.getppid()
    return {**writer_identity(), "pid": pid, "started": writers._process(pid)[0]}


class Watched(MemoryStore):
    """Tells of each write that has failed or been done; the first `failing` of them fail."""

    def __init__(self, failing: int = 0) -> None:
        super().__init__()
        self.failing, self.writes = failing, list[fmt.LeaseRecord]()
        self.threads: list[threading.Thread] = []
        self.written, self.released = threading.Event(), threading.Event()

    def put(self, key: str, data: bytes) -> None:
        self.threads.append(threading.current_thread())
        if self.failing:
            self.failing -= 1
            raise StorageError("no space left", errno=28)
        super().put(key, data)
        self.writes.append(record := fmt.parse_lease(data, key))
        (self.released if record.released else self.written).set()


@pytest.fixture
def watched() -> Iterator[Watched]:
    made = Watched()
    yield made
    made.files.update({"RUN.json": b""})
    made.delete(fmt.LEASE_NAME)  # so that whoever renews ends
    sharing.give_all_back()


# Forked processes

FORKS = """
import json, os, signal, sys, threading
from datarax_dist import lease as leases, sharing
from datarax_dist.clock import SystemClock
from datarax_dist.errors import LeaseError
from datarax_dist.storage import LocalStore

root = sys.argv[1]
make = lambda: leases.Lease(LocalStore(root), SystemClock(), ttl_seconds=60, renews=True)
share = sharing.borrow(root, make)
one = share.lease
one.hold("run", lambda *_: None)
held, done = threading.Event(), threading.Event()

def hold_locks():
    with one._lock, sharing._borrowing:
        held.set()
        done.wait()

def told(act):
    try:
        return act()
    except LeaseError as error:
        return str(error)

threading.Thread(target=hold_locks).start()
held.wait()
if (pid := os.fork()) == 0:
    signal.alarm(8)  # a lock that nobody lets go in this process
    texts = [told(act) for act in (
        one.release, share.give_back, sharing.give_all_back,
        lambda: one.hold("run", lambda *_: None), one.check, one.raise_if_lost, one.renew,
        lambda: one.announce(1, "0" * 8),
    )]
    own = sharing.borrow(root, make).lease
    texts.append(told(lambda: own.hold("run", lambda *_: None)))
    share.give_back()  # what was inherited, and ends here, too
    share.give_back_later()
    sharing.note_dropped()
    texts.append(len(sharing._shares))
    print(json.dumps(texts), flush=True)
    os._exit(0)
_, status = os.waitpid(pid, 0)
done.set()
one.check()
print(json.dumps([status, one.epoch, leases.newest_lease(LocalStore(root)).released]), flush=True)
share.give_back()
"""


def test_a_forked_process_neither_writes_by_its_parents_lease_nor_lets_it_go(
    tmp_path: Path,
) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    child, healthy = [json.loads(line) for line in ran.stdout.splitlines()]
    assert healthy == [0, 1, False], ran.stderr
    assert child[:3] == [None] * 3
    assert all("must open its own Checkpointer" in text for text in child[3:8]), child
    assert "is held by another job" in child[8]
    assert child[9] == 1
    assert newest_lease(LocalStore(str(tmp_path))).released


# The thread that renews


def test_who_cannot_start_the_thread_that_renews_does_not_take_the_run(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = mine(watched, SystemClock(), ttl_seconds=SOON, renews=True)

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="new thread"):
            take(one)
    assert (one.epoch, files(watched)) == (0, [])
    take(one)
    assert one.epoch == 1
    assert watched.written.wait(10), "nobody renews"


def taken_without_a_thread(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> Lease:
    one = mine(watched, SystemClock(), ttl_seconds=SOON, renews=True)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda self: None)
        take(one)
    return one


def test_a_thread_that_does_not_run_is_started_when_the_run_is_held_again(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = taken_without_a_thread(watched, monkeypatch)
    take(one)
    assert one.epoch == 1
    assert watched.written.wait(10), "nobody renews"
    keeper = one._keeper
    take(one)
    assert one._keeper is keeper, "one is enough"
    assert keeper is not None
    with one._lock:  # it has not ended yet when the run is held again
        one.release()
        watched.written.clear()
        take(one)
    keeper.join(10)
    assert not keeper.is_alive()
    assert one.epoch == 2
    assert watched.written.wait(10), "nobody renews"


def test_who_is_refused_leaves_no_thread_behind(watched: Watched) -> None:
    take(lease(watched, owner=parent()))
    one = mine(watched, SystemClock(), ttl_seconds=100 * TTL, renews=True)
    with pytest.raises(LeaseError):
        take(one)
    assert one._keeper is not None
    one._keeper.join(10)
    assert not one._keeper.is_alive()


# Files


def test_who_takes_and_releases_the_run_again_and_again_leaves_one_file(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    get = store.get
    monkeypatch.setattr(store, "get", lambda key: (reads.append(key), get(key))[1])
    for number in range(1, 11):
        one = lease(store)
        take(one)
        assert one.epoch == number, "an epoch never comes twice"
        one.release()
        assert files(store) == [f"{number:010d}.json"]
        assert newest_lease(store).released
    for number in range(11, 21):  # as earlier versions have left them
        store.put(fmt.lease_name(number), store.files[fmt.lease_name(10)])
    reads.clear()
    take(lease(store))
    assert reads == [fmt.lease_name(20)], "the newest alone says whether the run is free"


def test_a_save_of_the_handler_leaves_no_more_leases_than_the_one_before(tmp_path: Path) -> None:
    with OrbaxCheckpointHandler() as handler:
        for step in range(3):
            handler.save(tmp_path, {"a": np.ones(2)}, step=step)
            assert os.listdir(tmp_path / "lease") == [f"{step + 1:010d}.json"]


def test_who_cannot_delete_the_older_files_has_released_all_the_same(
    store: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = lease(store)
    take(first)
    first.release()
    second = lease(store)
    take(second)

    def delete(prefix: str) -> None:
        assert newest_lease(store).released, "it is released first"
        raise StorageError("no")

    with monkeypatch.context() as patch:
        patch.setattr(store, "delete", delete)
        second.release()
    assert caplog.text == "", "nothing is left to be done"
    assert files(store) == ["0000000001.json", "0000000002.json"]
    third = lease(store, at_once())
    take(third)
    third.release()
    assert files(store) == ["0000000003.json"]


# Who lives


def hide_processes(patch: pytest.MonkeyPatch, error: OSError) -> None:
    def refuse(*_: Any) -> Any:
        raise error

    patch.setattr(writers, "open", refuse, raising=False)


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "hidepid=2"), PermissionError(13, "no"), OSError(24, "files")]
)
def test_a_process_is_gone_only_when_the_kernel_says_so(
    error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    gone, runs, store = {**writer_identity(), "pid": ended.pid}, parent(), MemoryStore()
    assert writers.is_certainly_dead(gone) and not writers.is_certainly_dead(runs)
    take(lease(store, owner=runs))
    with monkeypatch.context() as patch:
        hide_processes(patch, error)
        assert writers.is_certainly_dead(gone)
        for writer in (runs, {**runs, "pid": 2**80}):
            assert not writers.is_certainly_dead(writer)
            assert not writers.is_running(writer)
        clock = Clock()
        take(lease(store, clock))
        assert TTL < clock.elapsed < TTL + 5, "as if it were on another machine"


def test_who_cannot_tell_when_it_began_is_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    writers._machine()
    with monkeypatch.context() as patch:
        hide_processes(patch, OSError(24, "Too many open files"))
        identity = writer_identity()
    assert not writers.is_certainly_dead(identity)


def test_who_runs_and_does_not_renew_keeps_the_run_from_nobody_who_waits_long_enough(
    store: Any,
) -> None:
    take(lease(store, owner=parent()))
    for seconds in (0.0, 15.0):
        clock = Clock()
        with pytest.raises(LeaseError, match="which is alive"):
            take(mine(store, clock, wait_seconds=seconds))
        assert seconds <= clock.elapsed <= seconds + 1
    clock = Clock()
    second = mine(store, clock, wait_seconds=25.0)
    take(second)
    assert second.epoch == 2
    assert TTL < clock.elapsed < TTL + 5


def test_who_runs_and_renews_keeps_the_run(store: Any) -> None:
    owner, naps = lease(store, owner=parent()), list[None]()
    take(owner)

    def renew() -> None:
        naps.append(None)
        if len(naps) % 20 == 0:  # each ten seconds
            owner.renew()

    with pytest.raises(LeaseError, match="which is alive"):
        take(mine(store, Clock(renew), wait_seconds=5 * TTL + 3))
    owner.check()


# One place, several objects


def test_one_directory_by_two_paths_is_one_run(tmp_path: Path) -> None:
    root, link = str(tmp_path / "run"), str(tmp_path / "link")
    os.mkdir(root)
    os.symlink(root, link)
    first = sharing.borrow(root, lambda: mine(LocalStore(root)))
    one = first.lease
    take(one)
    second = sharing.borrow(link, lambda: mine(LocalStore(link)))
    assert second.lease is one
    os.unlink(link)
    os.symlink(tmp_path / "elsewhere", link)
    (tmp_path / "elsewhere").mkdir()
    other = sharing.borrow(link, lambda: mine(LocalStore(link)))
    take(other.lease)
    first.give_back()
    first.give_back()
    assert one.epoch == 1
    second.give_back()
    assert (one.epoch, other.lease.epoch) == (0, 1)
    assert newest_lease(LocalStore(root)).released


def test_a_root_in_a_bucket_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gs:/b").mkdir(parents=True)
    os.symlink("b", "gs:/c")
    store = MemoryBucket()
    one, two = (sharing.borrow(f"gs://{name}", lambda: mine(store)) for name in "bc")
    assert one.lease is not two.lease
    one.give_back()
    two.give_back()


def test_what_another_object_of_this_process_holds_is_not_free(store: Any) -> None:
    one = mine(store)
    take(one)
    with pytest.raises(LeaseError, match="very process"):
        take(mine(store, at_once()))
    one.check()
    del one  # dropped, and not released
    gc.collect()
    take(mine(store, at_once()))


def test_of_several_users_the_longest_wait_counts_and_the_first_ttl(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, root = MemoryStore(), str(tmp_path)
    take(lease(store, owner=parent()))
    clock = Clock()
    one = sharing.borrow(root, lambda: mine(store, clock)).lease
    sharing.borrow(root, lambda: mine(store, wait_seconds=10.0))
    assert caplog.text == ""
    sharing.borrow(root, lambda: mine(store, ttl_seconds=600.0))
    assert "lasts for 60 s" in caplog.text and "600 s" in caplog.text
    with pytest.raises(LeaseError):
        take(one)
    assert 10 <= clock.elapsed <= 11
    sharing.give_all_back()


def test_a_lease_may_last_for_one_second() -> None:
    assert config.Options(lease_ttl_seconds=1).lease_ttl_seconds == 1
    for value in (0.99, 86401):
        with pytest.raises(InvalidArgumentError, match=f"from 1 to 86400, not {value}"):
            config.Options(lease_ttl_seconds=value)
    with pytest.raises(InvalidArgumentError, match="of 0 or more, not -1"):
        config.Options(lease_wait_seconds=-1)


# Ends


def test_a_release_that_fails_is_tried_again_until_it_is_done(watched: Watched) -> None:
    one = mine(watched, SystemClock(), ttl_seconds=SOON, renews=True)
    take(one)
    keeper = one._keeper
    assert keeper is not None and watched.written.wait(10)
    with one._lock:
        watched.failing, begin = 3, len(watched.threads)
        one.release()
        assert len(watched.threads) == begin + 1, "who closes does not wait"
    assert one.epoch == 0
    assert watched.released.wait(10)
    keeper.join(10)
    assert not keeper.is_alive()
    take(lease(watched, at_once()))


def test_a_release_is_tried_again_where_no_thread_runs_any_more(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = taken_without_a_thread(watched, monkeypatch)
    watched.failing = 2
    one.release()
    assert watched.released.wait(10)


def test_what_is_released_late_does_not_come_between_who_has_taken_the_run(
    watched: Watched,
) -> None:
    one = mine(watched, SystemClock(), ttl_seconds=SOON, renews=True)
    take(one)
    watched.failing = 1 << 30
    one.release()
    second = mine(watched, at_once())
    with one._lock:  # its thread does not stand in the middle of a try
        take(second)
        watched.failing = 0
    keeper = one._keeper
    assert keeper is not None
    keeper.join(10)
    assert not keeper.is_alive()
    assert not any(record.released for record in watched.writes)
    second.renew()
    assert files(watched) == ["0000000002.json"]


class Interrupted(BaseException):
    """What Ctrl-C raises is one."""


@pytest.mark.parametrize("kind", [OSError, Interrupted])
def test_what_was_not_taken_to_the_end_may_be_taken_at_once_and_is_fenced(
    store: Any, kind: type[BaseException]
) -> None:
    take(lease(store, owner={**ELSEWHERE, "pid": 1}))
    fenced: list[list[int]] = []

    def fence(run: str, older: Any, is_newest: Any) -> None:
        fenced.append([one.epoch for one in older])
        if len(fenced) < 3:
            raise kind("no")

    one = lease(store, owner=parent())
    for clock in (Clock(), at_once()):  # by the same process, and by another one
        one._clock = clock
        with pytest.raises(kind):
            one.hold("run", fence)
        assert one.epoch == 0
    mine(store, at_once()).hold("run", fence)
    assert fenced == [[1], [1, 2], [1, 2, 3]]


def test_where_that_cannot_be_said_this_process_takes_it_at_once_and_others_when_it_runs_out(
    watched: Watched,
) -> None:
    take(lease(watched))

    def fence(run: str, older: Any, is_newest: Any) -> None:
        watched.failing = 1
        raise OSError("no space left")

    for owner in (writer_identity(), parent()):
        with contextlib.suppress(OSError):
            lease(watched, owner=owner).hold("run", fence)
    clock = Clock()
    take(mine(watched, clock, wait_seconds=TTL))
    assert TTL < clock.elapsed < TTL + 5
    one = mine(watched, at_once())
    with contextlib.suppress(OSError):
        one.hold("run", fence)
    take(mine(watched, at_once()))
    assert one.epoch == 0


def test_a_file_of_another_job_is_not_given_up(store: Any) -> None:
    other = lease(store, owner=parent())

    class Late(type(store)):
        def create(self, key: str, data: bytes) -> bool:
            take(other)
            raise StorageError("no reply")

    late = Late()
    late.files = store.files
    with pytest.raises(StorageError):
        take(mine(late))
    assert newest_lease(store).ttl_seconds == TTL
    other.check()


# What is in the way


def test_what_is_in_the_way_of_a_lease_is_named(tmp_path: Path) -> None:
    (tmp_path / "lease" / "0000000001.json").mkdir(parents=True)
    clock = Clock()
    with pytest.raises(StorageError, match=f"{tmp_path}/lease/0000000001.json .* remove it"):
        take(lease(LocalStore(str(tmp_path)), clock))
    assert 3 < clock.elapsed < 10
    (tmp_path / "lease" / "0000000001.json").rmdir()
    take(lease(LocalStore(str(tmp_path)), at_once()))


def test_after_the_last_epoch_there_is_none(store: Any) -> None:
    name = fmt.lease_name(10**10 - 1)
    record = fmt.LeaseRecord("run", 10**10 - 1, "0" * 16, ELSEWHERE, TTL, released=True)
    store.put(name, fmt.dump_lease(record))
    with pytest.raises(StorageError, match=f"{name} has the last number .* remove it"):
        take(lease(store, at_once()))
    assert files(store) == ["9999999999.json"]


def test_a_lease_that_is_listed_and_never_there_is_named(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "children", lambda prefix: ["0000000003.json"])
    clock = Clock()
    with pytest.raises(StorageError, match=r"0000000003\.json is listed, and is not there"):
        take(lease(store, clock))
    assert TTL <= clock.elapsed <= TTL + 1


def test_who_sees_an_old_listing_for_a_while_waits(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a client of NFS may, while another job takes the run over."""
    dead, listed = lease(store), store.children
    take(dead)
    seen = listed(fmt.LEASE_NAME)

    def meanwhile() -> None:
        if clock.elapsed > TTL and files(store) == seen:
            take(other)
            other.renew()

    def old(prefix: str) -> list[str]:
        return seen if prefix == fmt.LEASE_NAME and clock.elapsed < TTL + 30 else listed(prefix)

    clock = Clock(meanwhile)
    other = lease(store, Clock(), owner=parent())
    monkeypatch.setattr(store, "children", old)
    with pytest.raises(LeaseError, match=f"held by another job: process {os.getppid()} on"):
        take(lease(store, clock, wait_seconds=100.0))


def test_a_dead_job_whose_lease_lasts_for_a_day_is_not_waited_for_so_long(store: Any) -> None:
    take(lease(store, ttl_seconds=86400.0))
    clock = Clock()
    one = lease(store, clock, owner=parent())
    with pytest.raises(LeaseError, match=r"for 6\d s, but has said .* for 86400 s"):
        take(one)
    assert TTL <= clock.elapsed <= TTL + 10
    clock = Clock()
    take(lease(store, clock, owner=parent(), wait_seconds=86400.0))
    assert 86400 <= clock.elapsed <= 86410


# What is gone


@pytest.mark.parametrize("act", ["renew", "check", "release"])
def test_what_was_removed_does_not_come_back(
    tmp_path: Path, act: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "run"
    one = lease(LocalStore(str(root)))
    take(one)
    (root / "RUN.json").touch()
    shutil.rmtree(root / "lease")
    if act == "release":
        one.release()
        assert caplog.text == ""
    else:
        with caplog.at_level(logging.ERROR), pytest.raises(LeaseError, match="was removed"):
            getattr(one, act)()
        assert "lease/0000000001.json was removed" in caplog.text
        for late in (one.check, one.renew, lambda: one.announce(1, "0" * 8), lambda: take(one)):
            with pytest.raises(LeaseError, match="open a new one"):
                late()
        one.release()
    assert [path.name for path in root.iterdir()] == ["RUN.json"]


@pytest.mark.parametrize("act", ["renew", "check"])
def test_a_root_that_is_away_for_a_moment_is_not_lost(tmp_path: Path, act: str) -> None:
    """It is mounted again, as it was."""
    root = tmp_path / "run"
    one = lease(LocalStore(str(root)))
    take(one)
    root.rename(tmp_path / "away")
    for empty in (False, True):
        if empty:
            root.mkdir()
        with pytest.raises(StorageError, match="Is its file system mounted"):
            getattr(one, act)()
    root.rmdir()
    (tmp_path / "away").rename(root)
    getattr(one, act)()


@pytest.mark.parametrize("act", ["check", "renew"])
def test_who_comes_back_to_another_run_has_lost_its_own(store: Any, act: str) -> None:
    """Both have epoch 1."""
    one, other = lease(store), lease(store, owner=parent())
    take(one)
    store.delete("")
    with pytest.raises(StorageError, match="close every Checkpointer"):
        one.renew()
    take(other)
    assert (one.epoch, other.epoch) == (1, 1)
    with pytest.raises(LeaseError, match=f"process {os.getppid()} on"):
        getattr(one, act)()


def test_a_root_that_goes_away_between_two_looks_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "run"
    store = LocalStore(str(root))
    one, get = lease(store), store.get
    take(one)

    def get_after_it(key: str) -> bytes:
        monkeypatch.setattr(store, "get", get)
        root.rename(tmp_path / "away")
        return get(key)

    monkeypatch.setattr(store, "get", get_after_it)
    with pytest.raises(StorageError, match="Is its file system mounted"):
        one.check()
    (tmp_path / "away").rename(root)
    one.check()


def test_a_lease_that_cannot_be_renewed_says_so_once(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    one = mine(watched, SystemClock(), ttl_seconds=SOON, renews=True)
    take(one)
    watched.failing = 5
    while watched.failing:
        watched.written.wait(0.01)
    watched.written.clear()
    assert watched.written.wait(10), "it is renewed again"
    told = [record for record in caplog.records if "could not be renewed" in record.getMessage()]
    assert len(told) == 1


def test_a_root_that_was_removed_is_not_brought_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "run"
    one = lease(LocalStore(str(root)))
    take(one)
    shutil.rmtree(root)
    for act in (one.renew, one.check, lambda: one.announce(1, "0" * 8)):
        with pytest.raises(StorageError, match="If the run was removed"):
            act()
    one.release()
    assert str(root) not in caplog.text
    assert not root.exists()


@pytest.mark.parametrize("act", ["renew", "release", "check"])
def test_a_job_whose_lease_was_removed_leaves_alone_who_has_begun_anew(
    store: Any, act: str
) -> None:
    one = lease(store)
    take(one)
    store.delete("")
    other = lease(store, owner=parent())
    take(other)
    assert (one.epoch, other.epoch) == (1, 1)
    before = store.files[fmt.lease_name(1)]
    if act != "release":
        with pytest.raises(LeaseError, match=f"process {os.getppid()} on"):
            getattr(one, act)()
    one.release()
    assert store.files[fmt.lease_name(1)] == before


def test_a_listing_without_a_file_that_is_being_replaced_takes_no_run(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = lease(store)
    take(one)
    monkeypatch.setattr(store, "children", lambda prefix: [])
    one.check()
    one.renew()


def test_who_was_overtaken_while_it_made_its_file_does_not_hold_the_run(store: Any) -> None:
    """Others come and go in that moment, and remove the file of the same epoch."""
    one = lease(store, at_once(), owner=ELSEWHERE)
    create, owners = store.create, [lease(store, owner=parent()) for _ in range(2)]

    def meanwhile(key: str, data: bytes) -> bool:
        store.create = create
        take(owners[0])
        owners[0].release()
        take(owners[1])
        owners[1].renew()
        assert files(store) == ["0000000002.json"]
        return bool(create(key, data))

    store.create = meanwhile
    with pytest.raises(LeaseError, match="held by another job"):
        take(one)
    assert one.epoch == 0
    owners[1].check()
    owners[1].release()
    take(one)
    assert one.epoch == 3


def test_who_announces_brings_nothing_back(store: Any) -> None:
    one = lease(store)
    take(one)
    store.put("RUN.json", b"")
    store.delete(fmt.LEASE_NAME)
    with pytest.raises(LeaseError, match="was removed"):
        one.announce(1, "0" * 8)
    assert files(store) == []


def test_a_run_that_this_process_has_copied_is_another_one(tmp_path: Path) -> None:
    root, copy = LocalStore(str(tmp_path / "run")), LocalStore(str(tmp_path / "copy"))
    one, other = mine(root), mine(copy)
    take(one)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    take(other)
    one.check()
    other.check()


def test_what_is_cut_short_while_it_is_given_back_is_given_back_all_the_same(
    tmp_path: Path, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> Lease:
        return mine(watched, SystemClock(), ttl_seconds=100 * TTL, renews=True)

    share = sharing.borrow(str(tmp_path), make)
    take(share.lease)
    with monkeypatch.context() as patch:

        def cut() -> None:
            raise Interrupted

        patch.setattr(share.lease, "release", cut)
        with pytest.raises(Interrupted):
            share.give_back()
    share.give_back()
    assert watched.released.wait(10)


# Who is dropped


class User:
    """What borrows a lease, and may be dropped without giving it back."""

    def __init__(self, root: str, store: Any) -> None:
        share = sharing.borrow(
            root, lambda: mine(store, SystemClock(), ttl_seconds=100 * TTL, renews=True)
        )
        self.lease = share.lease
        weakref.finalize(self, share.give_back_later)


def test_who_is_dropped_gives_its_share_back_whatever_is_held_at_that_moment(
    tmp_path: Path, watched: Watched
) -> None:
    root = str(tmp_path)
    one, two = User(root, watched), User(root, watched)
    held = one.lease
    take(held)
    keeper = held._keeper
    assert keeper is not None
    del one
    sharing.note_dropped()
    held.check()
    with held._lock, sharing._borrowing:
        del two  # as the collector of garbage may, at any allocation
        assert watched.writes == []
    assert watched.released.wait(10)
    assert set(watched.threads) == {keeper}, "no finalizer writes"
    keeper.join(10)
    assert not keeper.is_alive()


def test_who_borrows_while_another_gives_back_need_not_wait_for_its_release(
    tmp_path: Path, watched: Watched
) -> None:
    root = str(tmp_path)
    share = sharing.borrow(root, lambda: mine(watched, SystemClock(), ttl_seconds=TTL))
    take(share.lease)
    second = sharing.borrow(root + "/x", lambda: mine(watched, at_once())).lease
    with share.lease._lock:  # which renews it, and takes its time
        giving = threading.Thread(target=share.give_back)
        giving.start()
        while share.lease in [one.lease for one in sharing._shares]:
            giving.join(0.01)
        take(second)
        assert second.epoch == 2
    giving.join(10)
    second.check()


def test_who_borrows_after_another_was_dropped_need_not_wait_for_its_release(
    tmp_path: Path, watched: Watched
) -> None:
    root = str(tmp_path)
    one = User(root, watched)
    take(one.lease)
    watched.failing = 1 << 30
    del one
    second = sharing.borrow(root, lambda: mine(watched, at_once())).lease
    take(second)
    assert second.epoch == 2
