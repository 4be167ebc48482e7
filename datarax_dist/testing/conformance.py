"""Conformance suites: what every store and every host group must keep, as checks to run on a real
one.

Each check is a function that raises `AssertionError` when a property does not hold. Store checks
take a factory of empty stores; host-group checks are collective: every host of the group runs the
same one.

    @pytest.mark.parametrize("check", STORE_CHECKS, ids=lambda check: check.__name__)
    def test_my_store(check, tmp_path):
        check(lambda: MyStore(tmp_path))

    SimulatedHosts(3).run(check_host_group)      # or on real hosts, with run_hosts
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable
from typing import Any

from datarax_dist import format as fmt
from datarax_dist.errors import CheckpointError, PeerError, PeerLostError, StepExistsError
from datarax_dist.hosts import HostGroup
from datarax_dist.storage import Store, SupportsRename, SupportsReplace

__all__ = ["HOST_GROUP_CHECKS", "STORE_CHECKS", "check_host_group"]

_WAIT_SECONDS = 20.0


# Stores


def put_replaces_whole_content(make: Callable[[], Store]) -> None:
    store = make()
    for data in (b"first", b"", b"\x00" * 100_000):
        store.put("a/b/c.json", data)
        assert store.get("a/b/c.json") == data


def get_refuses_what_is_larger_than_a_file_of_ours(make: Callable[[], Store]) -> None:
    store = make()
    store.put("7/STEP.json", b" " * fmt.MAX_SMALL_BYTES)
    assert len(store.get("7/STEP.json")) == fmt.MAX_SMALL_BYTES
    store.put("7/STEP.json", b" " * (fmt.MAX_SMALL_BYTES + 1))
    try:
        store.get("7/STEP.json")
    except fmt.InvalidRecordError:
        return
    raise AssertionError("it was read, whatever its size")


def a_missing_key_is_a_key_error(make: Callable[[], Store]) -> None:
    store = make()
    store.put("a/file", b"x")
    for key in ("nothing", "a/nothing", "a/file/below"):
        for read in (store.get, store.digest):
            try:
                read(key)
            except KeyError:
                continue
            raise AssertionError(f"{read.__name__}({key!r}) found something")


def create_never_replaces(make: Callable[[], Store]) -> None:
    store = make()
    assert store.create("7/COMMIT.json", b"mine") is True
    assert store.create("7/COMMIT.json", b"theirs") is False
    assert store.get("7/COMMIT.json") == b"mine"


def create_that_is_tried_again_knows_its_own_content(make: Callable[[], Store]) -> None:
    store = make()
    assert store.create("x", b"nonce 1")
    assert store.create("x", b"nonce 1"), "the reply to the first try may have been lost"


def one_of_many_creators_wins(make: Callable[[], Store]) -> None:
    store = make()
    start = threading.Barrier(8)

    def race(number: int) -> bool:
        start.wait()
        return store.create("marker", f"writer {number}".encode())

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        won = list(pool.map(race, range(8)))
    assert won.count(True) == 1
    assert store.get("marker") == f"writer {won.index(True)}".encode()


def children_are_names_and_directories(make: Callable[[], Store]) -> None:
    store = make()
    assert store.children("") == []
    assert store.children("nowhere") == []
    for key in ("RUN.json", "1/COMMIT.json", "1/state/d/x", "10/STEP.json"):
        store.put(key, b"x")
    assert store.children("") == ["1/", "10/", "RUN.json"]
    assert store.children("1") == ["COMMIT.json", "state/"]


def list_shows_every_file_below_with_its_size(make: Callable[[], Store]) -> None:
    store = make()
    assert store.list("nowhere") == []
    sizes = {"1/a": 1, "1/b/c": 20, "1/b/d/e": 0, "10/f": 4}
    for key, size in sizes.items():
        store.put(key, b"x" * size)
    assert [(e.key, e.size) for e in store.list("1")] == [("1/a", 1), ("1/b/c", 20), ("1/b/d/e", 0)]
    assert {e.key: e.size for e in store.list("")} == sizes
    assert [e.key for e in store.list("1/b/c")] == ["1/b/c"]


def listing_while_others_write_neither_fails_nor_loses_what_stays(
    make: Callable[[], Store],
) -> None:
    store = make()
    store.put("step/stays", b"x")
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            store.put("step/part/comes", b"x")
            store.delete("step/part")

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(300):
            assert "step/stays" in [entry.key for entry in store.list("step")]
    finally:
        stop.set()
        thread.join()


def digest_is_of_the_content(make: Callable[[], Store]) -> None:
    store = make()
    data = bytes(range(256)) * 9000
    store.put("big", data)
    kind = store.digest_kind
    assert store.digest("big") == (len(data), fmt.digest(data, kind))
    assert store.digest("big", len(data)) == (len(data), fmt.digest(data, kind))
    for like in (fmt.digest(b"", "crc32"), fmt.digest(b"", "md5")):
        assert store.digest("big", like=like) == (len(data), fmt.digest(data, like))
    assert store.digest("big", 3)[0] == len(data)
    assert store.digest("big", 3)[1] in ("", fmt.digest(data, kind))


def a_digest_in_a_listing_is_of_the_content(make: Callable[[], Store]) -> None:
    store = make()
    for data in (b"", b"x", bytes(range(256)) * 300):
        store.put("a/file", data)
        [entry] = store.list("a")
        assert entry.digest in ("", fmt.digest(data, store.digest_kind))


def delete_takes_the_last_file_last(make: Callable[[], Store]) -> None:
    store = make()
    for key in ("7/STEP.json", "7/a", "7/d/b", "70/a"):
        store.put(key, b"x")
    store.delete("7", last="STEP.json")
    assert [entry.key for entry in store.list("")] == ["70/a"]


def replace_needs_the_expected_content(make: Callable[[], Store]) -> None:
    store = make()
    if not isinstance(store, SupportsReplace):
        return
    assert not store.replace("7/COMMIT.json", b"void", b"mine"), "there is nothing to replace"
    store.put("7/COMMIT.json", b"void")
    assert not store.replace("7/COMMIT.json", b"other", b"mine")
    assert store.get("7/COMMIT.json") == b"void"
    assert store.replace("7/COMMIT.json", b"void", b"mine")
    assert store.replace("7/COMMIT.json", b"void", b"mine"), "the reply may have been lost"
    assert not store.replace("7/COMMIT.json", b"void", b"theirs")
    [seen] = store.list("7/COMMIT.json")
    assert store.replace("7/COMMIT.json", b"mine", b"mine"), "written once more"
    assert not store.replace("7/COMMIT.json", b"mine", b"void", seen=seen), "it was written since"
    [seen] = store.list("7/COMMIT.json")
    assert store.replace("7/COMMIT.json", b"mine", b"void", seen=seen)
    assert store.replace("7/COMMIT.json", b"void", b"mine")
    assert store.get("7/COMMIT.json") == b"mine"


def one_of_many_replacers_wins(make: Callable[[], Store]) -> None:
    store = make()
    if not isinstance(store, SupportsReplace):
        return
    store.put("marker", b"void")
    start = threading.Barrier(8)

    def race(number: int) -> bool:
        start.wait()
        return store.replace("marker", b"void", f"writer {number}".encode())

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        won = list(pool.map(race, range(8)))
    assert won.count(True) == 1
    assert store.get("marker") == f"writer {won.index(True)}".encode()


def copy_leaves_the_source_and_what_is_there(make: Callable[[], Store]) -> None:
    store = make()
    if not isinstance(store, SupportsReplace):
        return
    names = ["STEP.json", "a b#1", "d/b"]
    for name in (*names, "not copied"):
        store.put(f"7.x/{name}", name.encode())
    store.put("7/d/b", b"somebody else's")
    store.copy("7.x", "7", names)
    store.copy("7.x", "7", [])
    assert {e.key: store.get(e.key) for e in store.list("7")} == {
        "7/STEP.json": b"STEP.json",
        "7/a b#1": b"a b#1",
        "7/d/b": b"somebody else's",
    }
    assert sorted(store.children("7.x")) == ["STEP.json", "a b#1", "d/", "not copied"]
    try:
        store.copy("7.x", "8", ["nothing"])
    except KeyError:
        return
    raise AssertionError("nothing was copied")


def delete_removes_a_file_or_all_below_and_nothing_else(make: Callable[[], Store]) -> None:
    store = make()
    for key in ("1/a", "1/b/c", "10/a", "1x"):
        store.put(key, b"x")
    store.delete("1/a")
    assert [entry.key for entry in store.list("1")] == ["1/b/c"]
    store.delete("1")
    store.delete("1")
    assert [entry.key for entry in store.list("")] == ["10/a", "1x"]


def sync_of_what_was_put_does_nothing_visible(make: Callable[[], Store]) -> None:
    store = make()
    store.put("1/a/b", b"x")
    before = store.list("")
    store.sync("1", ["1/a/b"])
    store.sync("1", [])
    assert store.list("") == before


def rename_moves_everything_and_never_onto_something(make: Callable[[], Store]) -> None:
    store = make()
    if not isinstance(store, SupportsRename):
        return
    store.put("7.staging-x/a/b", b"content")
    store.rename("7.staging-x", "7")
    assert store.get("7/a/b") == b"content"
    assert store.children("") == ["7/"]
    store.put("7.staging-y/a", b"other")
    try:
        store.rename("7.staging-y", "7")
    except CheckpointError:
        assert store.get("7/a/b") == b"content"
        assert store.get("7.staging-y/a") == b"other"
    else:
        raise AssertionError("a directory was replaced")
    try:
        store.rename("7.staging-z", "8")
    except KeyError:
        assert store.children("8") == []
    else:
        raise AssertionError("nothing was renamed")


STORE_CHECKS: tuple[Callable[[Callable[[], Store]], None], ...] = (
    put_replaces_whole_content,
    get_refuses_what_is_larger_than_a_file_of_ours,
    a_missing_key_is_a_key_error,
    create_never_replaces,
    create_that_is_tried_again_knows_its_own_content,
    one_of_many_creators_wins,
    children_are_names_and_directories,
    list_shows_every_file_below_with_its_size,
    listing_while_others_write_neither_fails_nor_loses_what_stays,
    digest_is_of_the_content,
    a_digest_in_a_listing_is_of_the_content,
    delete_takes_the_last_file_last,
    replace_needs_the_expected_content,
    one_of_many_replacers_wins,
    copy_leaves_the_source_and_what_is_there,
    delete_removes_a_file_or_all_below_and_nothing_else,
    sync_of_what_was_put_does_nothing_visible,
    rename_moves_everything_and_never_onto_something,
)


# Host groups


def _raised(call: Callable[[], Any]) -> BaseException:
    try:
        value = call()
    except Exception as error:
        return error
    raise AssertionError(f"nothing was raised; the result was {value!r}")


def every_host_gets_every_payload_in_host_order(group: HostGroup) -> None:
    for number in range(3):
        payload = {"host": group.index, "number": number, "text": "größe"}
        got = group.exchange("payloads", payload, timeout_seconds=_WAIT_SECONDS)
        assert [row["host"] for row in got] == list(range(group.count))
        assert {row["number"] for row in got} == {number}


def the_leaders_result_is_every_hosts_result(group: HostGroup) -> None:
    ran: list[int] = []

    def lead(payloads: list[int]) -> int:
        ran.append(group.index)
        return sum(payloads)

    total = group.exchange("sum", group.index, leader=lead, timeout_seconds=_WAIT_SECONDS)
    assert total == sum(range(group.count))
    assert ran == ([0] if group.index == 0 else [])


def an_error_on_any_host_is_raised_on_all(group: HostGroup) -> None:
    for bad in {0, group.count - 1}:
        error = OSError(28, "No space left on device") if group.index == bad else None
        raised = _raised(
            lambda error=error: group.exchange(  # type: ignore[misc]
                "write", 1, error=error, timeout_seconds=_WAIT_SECONDS
            )
        )
        if group.count > 1:
            assert isinstance(raised, PeerError), raised
            assert raised.phase == "write"
            assert list(raised.failures) == [bad]
            assert "No space left on device" in raised.failures[bad]
        else:
            assert raised is error


def what_the_leader_raises_is_raised_on_all_with_its_type(group: HostGroup) -> None:
    def differ(payloads: list[Any]) -> Any:
        raise PeerError("the hosts differ", phase="prepare", failures={1: "step 8"})

    def exists(payloads: list[Any]) -> Any:
        raise StepExistsError("step 7 is there", step=7)

    for lead, kind in ((differ, PeerError), (exists, StepExistsError)):
        raised = _raised(
            lambda lead=lead: group.exchange(  # type: ignore[misc]
                "prepare", None, leader=lead, timeout_seconds=_WAIT_SECONDS
            )
        )
        assert type(raised) is kind, raised


def a_failure_while_the_primary_gathers_is_seen_at_once(group: HostGroup) -> None:
    """The last host fails an operation in a later phase than the one the primary waits in."""
    operation = group.begin("save")
    deadline = 1e12
    last = group.count - 1
    if group.count == 1:
        return
    if group.index == last:
        operation.fail("save:hash", OSError(5, "Input/output error"))
    else:
        operation.contribute("written", None)
    if group.index == 0:
        raised = _raised(lambda: operation.gather("written", deadline))
        assert isinstance(raised, PeerError)
        assert list(raised.failures) == [last]
    raised = _raised(lambda: operation.result("written", deadline))
    assert isinstance(raised, PeerError)
    assert raised.phase == "save:hash"


def the_first_decision_stands(group: HostGroup) -> None:
    operation = group.begin("race")
    operation.contribute("in", group.index)
    if group.index == 0:
        operation.gather("in", 1e12)
        operation.succeed("done")
    assert operation.result("in", 1e12) == "done"
    operation.fail("late", OSError("too late"))
    assert operation.result("in", 1e12) == "done"


def a_host_that_does_not_come_is_named(group: HostGroup) -> None:
    last = group.count - 1
    if group.count == 1:
        return
    if group.index == last:
        group.begin("missed")  # it counts the operation, and never contributes
    else:
        raised = _raised(lambda: group.exchange("vote", 1, timeout_seconds=0.5))
        assert isinstance(raised, PeerLostError)
        assert raised.missing == [last]
    group.exchange("together again", None, timeout_seconds=_WAIT_SECONDS)


def an_operation_keeps_its_outcome_until_every_host_has_read_it(group: HostGroup) -> None:
    """While others go on: a save in the background, and what the training loop asks meanwhile."""
    soon = time.monotonic() + _WAIT_SECONDS
    early = group.begin("early")
    early.contribute("in", group.index)
    if group.index == 0:
        early.gather("in", soon)
        early.succeed("kept")
    failing = [group.begin(f"failing {number}") for number in range(3)]
    if group.index == 0:
        for operation in failing:
            operation.fail("here", OSError(5, "on purpose"))
    for _ in range(3):
        group.exchange("after", None, timeout_seconds=_WAIT_SECONDS)
    assert early.result("in", soon) == "kept"
    for operation in failing:
        assert "on purpose" in str(_raised(lambda o=operation: o.result("here", soon)))  # type: ignore[misc]
    for operation in (early, *failing):
        operation.close()


def a_large_payload_arrives(group: HostGroup) -> None:
    text = "x" * 300_000
    got = group.exchange("large", text, leader=lambda all_: all_[-1], timeout_seconds=_WAIT_SECONDS)
    assert got == text


HOST_GROUP_CHECKS: tuple[Callable[[HostGroup], None], ...] = (
    every_host_gets_every_payload_in_host_order,
    the_leaders_result_is_every_hosts_result,
    an_error_on_any_host_is_raised_on_all,
    what_the_leader_raises_is_raised_on_all_with_its_type,
    a_failure_while_the_primary_gathers_is_seen_at_once,
    the_first_decision_stands,
    a_host_that_does_not_come_is_named,
    an_operation_keeps_its_outcome_until_every_host_has_read_it,
    a_large_payload_arrives,
)


def check_host_group(group: HostGroup) -> list[str]:
    """Runs every host-group check; returns their names. Collective.

    Raises:
        AssertionError: a check failed, with its name.
    """
    for check in HOST_GROUP_CHECKS:
        try:
            check(group)
        except Exception as error:
            raise AssertionError(f"{check.__name__}: {error!r}") from error
    return [check.__name__ for check in HOST_GROUP_CHECKS]
