"""Restores that crashed the job: what counts, what does not, and what becomes of the step."""

from __future__ import annotations

import collections
import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import datarax_dist as dd
from datarax_dist import cli, config, retention, telemetry, writers
from datarax_dist import format as fmt
from datarax_dist.attempts import mark_suspects
from datarax_dist.checkpoint import OrbaxCheckpointHandler
from datarax_dist.clock import SystemClock
from datarax_dist.errors import (
    CorruptStepError,
    PeerLostError,
    StorageError,
)
from datarax_dist.hosts import HostGroup
from datarax_dist.inspection import inspect_run
from datarax_dist.request import SaveRequest
from datarax_dist.restore import Restorer
from datarax_dist.save import Saver
from datarax_dist.storage import LocalStore
from datarax_dist.telemetry import Phases
from datarax_dist.testing import (
    FakeClock,
    FakeGCS,
    MemoryArrays,
    MemoryBucket,
    MemoryStore,
    SimulatedHosts,
)
from datarax_dist.testing.simulated import stepped

stores = pytest.mark.parametrize("make", [MemoryStore, MemoryBucket], ids=["file system", "bucket"])
OPTIONS = config.Options(
    exchange_timeout_seconds=20, save_timeout_seconds=20, restore_timeout_seconds=20
)
NOW = 1_700_000_000.0
ME = writers.writer_identity()
DEAD = {**ME, "started": "0"}
ELSEWHERE = {**ME, "machine": "another boot/pid:[1]", "name": "another-host"}
LONGEST = 7 * 20 + 600


def save(
    store: Any,
    group: HostGroup,
    step: int,
    *,
    keep: Any = None,
    suspects: Any = (),
    learn: bool = False,
    content: bytes = b"x",
) -> Any:
    saver = Saver(store, group, SystemClock(), OPTIONS, keep)
    saver.suspects.update(suspects)
    if learn:
        saver.learn(inspect_run(store))
    request = SaveRequest(
        step=step,
        writer=MemoryArrays(store, group.index, {"a": content * (group.index + 1)}),
        shared={"TREE.json": b"{}"},
        items=("state",),
    )
    return saver.begin(step, lambda: request, Phases("save", group.index)).finish()


def job(store: Any, step: int, **more: Any) -> Any:
    return save(store, HostGroup(dd.hosts.LocalBoard()), step, **more)


def make_run(make: Callable[[], Any], *steps: int) -> Any:
    store = make()
    for step in steps or (1, 2, 3):
        job(store, step)
    return store


def digest_of(store: Any, step: int) -> str:
    return fmt.digest(store.get(f"{step}/COMMIT.json"))


def note(
    store: Any,
    step: int,
    *,
    writer: Mapping[str, Any] = DEAD,
    at: float = NOW - 60,
    run: str | None = None,
    nonce: str | None = None,
    marker: str | None = None,
) -> str:
    """Leaves the attempt of a restore; returns its name."""
    nonce = nonce or os.urandom(8).hex()
    attempt = fmt.RestoreAttempt(
        run=run or str(inspect_run(store).run),
        step=step,
        nonce=nonce,
        marker=marker or digest_of(store, step),
        hosts=1,
        writer=writer,
        created_at=at,
        timeout_seconds=20.0,
    )
    name = fmt.attempt_name(step, nonce)
    store.put(name, fmt.dump_attempt(attempt))
    return name


def restore(
    store: Any,
    group: HostGroup | None = None,
    load: Any = None,
    *,
    step: int | None = None,
    now: float = NOW,
    options: config.Options = OPTIONS,
) -> Any:
    group = group or HostGroup(dd.hosts.LocalBoard())
    restorer = Restorer(store, group, options, FakeClock(now))
    default = lambda candidate, _: lambda: candidate.step
    found = restorer.restore(step, load or default, Phases("restore", group.index))
    assert found is not None
    return found


def attempts(store: Any) -> list[str]:
    return [name for name in store.children("") if ".restoring-" in name]


@stores
@pytest.mark.parametrize("hosts", [1, 3])
def test_a_step_whose_restore_crashed_twice_is_passed_over_on_all_hosts_and_the_report_says_why(
    make: Any, hosts: int, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_run(make)
    note(store, 3, at=NOW - 500)
    note(store, 3, at=NOW - 100, writer={**DEAD, "name": "trainer-0"})
    for step, report in SimulatedHosts(hosts).run(lambda group: restore(store, group)):
        assert (step, report.suspects, report.damaged) == (2, (3,), ())
        assert report.refused == {
            "step 3": "suspect: its restore crashed the job twice, last at 2023-11-14 22:11:40 UTC"
            " on trainer-0; restore(step=3) tries it all the same, and a success clears it"
        }
    assert any(r.levelname == "WARNING" and "step 3" in r.message for r in caplog.records)
    assert len(attempts(store)) == 2, "they still count at the next restore"
    assert restore(store)[0] == 2


@stores
def test_one_crash_does_not_count_and_a_success_clears_it(make: Any) -> None:
    store = make_run(make)
    note(store, 3)
    step, report = restore(store)
    assert (step, report.refused, report.suspects) == (3, {}, ())
    assert attempts(store) == []
    note(store, 3)
    assert restore(store)[0] == 3, "it is the first again"


@stores
def test_a_suspect_step_that_is_asked_for_is_tried_and_a_success_clears_it(make: Any) -> None:
    store = make_run(make)
    for _ in range(2):
        note(store, 3)
    step, report = restore(store, step=3)
    assert (step, report.suspects, report.refused) == (3, (), {})
    assert attempts(store) == []
    assert restore(store)[0] == 3


@stores
def test_a_suspect_step_that_is_asked_for_and_crashes_again_stays_suspect(make: Any) -> None:
    store = make_run(make)
    for _ in range(2):
        note(store, 3)
    with pytest.raises(ValueError, match="no"):
        restore(store, load=failing(ValueError("no")), step=3)
    assert restore(store)[0] == 2


@stores
@pytest.mark.parametrize("foreign", [False, True])
def test_when_every_step_is_suspect_it_is_an_error_that_says_what_to_do_and_no_silent_start(
    make: Any, foreign: bool
) -> None:
    store = make_run(make, 1, 2)
    if foreign:
        store.put("7/_CHECKPOINT_METADATA", b"{}")
    for step in (1, 1, 2, 2):
        note(store, step)
    for error in SimulatedHosts(2).run(lambda group: restore(store, group)):
        assert isinstance(error, CorruptStepError)
        assert error.step == 2
        for part in ("step 1: suspect", "step 2: suspect", "restore(step=2) tries one all the"):
            assert part in str(error)
    assert restore(store, step=2)[0] == 2
    assert restore(store)[0] == 2


@stores
def test_a_damaged_step_between_a_suspect_one_and_a_good_one_is_passed_over_too(make: Any) -> None:
    store = make_run(make)
    store.files["2/state/ocdbt.process_0/a"] = b"y"
    for _ in range(2):
        note(store, 3)
    step, report = restore(store)
    assert (step, report.suspects, report.damaged) == (1, (3,), (2,))
    store.files["1/state/ocdbt.process_0/a"] = b"y"
    with pytest.raises(CorruptStepError, match="every committed one is suspect, or damaged"):
        restore(store)


def failing(error: BaseException, on: int = 0) -> Any:
    def load(candidate: Any, _: Any) -> Any:
        raise error

    return load


@stores
@pytest.mark.parametrize("host", [0, 1])
@pytest.mark.parametrize(
    "error",
    [ValueError("no"), KeyboardInterrupt(), SystemExit(3), MemoryError(), StorageError("x")],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("where", ["load", "apply"])
def test_an_exception_on_any_host_is_no_crash(
    make: Any, host: int, error: BaseException, where: str
) -> None:
    store = make_run(make)

    def on(group: HostGroup) -> Any:
        def act(candidate: Any) -> Any:
            if group.index == host:
                raise error
            return candidate.step

        def load(candidate: Any, _: Any) -> Any:
            return (lambda: act(candidate)) if where == "apply" else lambda: act(candidate)()

        if where == "load":
            load = lambda candidate, _: act(candidate)
        try:
            return restore(store, group, load)
        except BaseException as failure:
            return failure

    results = SimulatedHosts(2).run(on)
    assert all(isinstance(result, BaseException) for result in results), results
    assert attempts(store) == []


@stores
def test_ctrl_c_while_the_step_is_verified_is_no_crash(make: Any) -> None:
    store = make_run(make)

    def interrupt(phase: str, host: int) -> None:
        if phase == "restore:verify":
            assert len(attempts(store)) == 1
            raise KeyboardInterrupt

    remove = telemetry.observe(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            restore(store)
    finally:
        remove()
    assert attempts(store) == []


@stores
def test_the_attempt_is_there_before_any_host_verifies_or_loads_and_gone_after_damage(
    make: Any,
) -> None:
    store = make_run(make)
    store.files["3/state/ocdbt.process_0/a"] = b"y"
    seen: list[tuple[str, int, list[int]]] = []

    def look(phase: str, host: int) -> None:
        steps = [int(name.split(".")[0]) for name in attempts(store)]
        seen.append((phase.removeprefix("restore:"), host, steps))

    remove = telemetry.observe(look)
    try:
        results = SimulatedHosts(2).run(lambda group: restore(store, group))
    finally:
        remove()
    assert [step for step, _ in results] == [2, 2]
    for host in (0, 1):
        told = [(phase, steps) for phase, where, steps in seen if where == host]
        assert told[1:] == [
            ("verify", [3]),
            *([("load", [3])] + 2 * [("verify", [3])] if make is MemoryStore else []),
            ("verify", [2]),
            ("load", [2]),
            ("positions", [2]),
        ]
    assert attempts(store) == []


@stores
def test_a_host_that_is_lost_counts_though_the_primary_lives(make: Any) -> None:
    store = make_run(make)
    options = config.Options(exchange_timeout_seconds=20, restore_timeout_seconds=0.2)

    def on(group: HostGroup) -> Any:
        if group.index == 0:
            return restore(store, group, options=options)
        return group.exchange("list", [store.root, None, ""], timeout_seconds=20)  # and dies

    [error, _] = SimulatedHosts(2).run(on)
    assert isinstance(error, PeerLostError)
    [name] = attempts(store)
    assert fmt.parse_attempt(store.get(name), name).step == 3


@pytest.mark.parametrize(
    ("writer", "at", "counts"),
    [
        pytest.param(DEAD, NOW, True, id="its process is gone"),
        pytest.param(DEAD, NOW + 3000, True, id="its process is gone, clocks differ"),
        pytest.param(ME, NOW - 60, False, id="its process lives"),
        pytest.param(ME, NOW - 10 * LONGEST, False, id="its process lives for long"),
        pytest.param(ELSEWHERE, NOW - 60, False, id="another machine"),
        pytest.param(ELSEWHERE, NOW + 500, False, id="another machine, its clock is ahead"),
        pytest.param(ELSEWHERE, NOW - 599, False, id="another machine, its clock is behind"),
        pytest.param(ELSEWHERE, NOW - LONGEST + 1, False, id="another machine, before the end"),
        pytest.param(ELSEWHERE, NOW - LONGEST - 1, True, id="another machine, long over"),
        pytest.param({**ELSEWHERE, "name": ME["name"]}, NOW, True, id="this host, restarted"),
        pytest.param({"name": ME["name"]}, NOW, False, id="a writer of which too little is known"),
        pytest.param({}, NOW, False, id="nothing known"),
        pytest.param({}, NOW - LONGEST - 1, True, id="nothing known, long over"),
    ],
)
def test_only_restores_that_must_have_ended_count(
    writer: Mapping[str, Any], at: float, counts: bool
) -> None:
    store = make_run(MemoryStore)
    note(store, 3, at=NOW)
    note(store, 3, writer=writer, at=at)
    assert restore(store)[0] == (2 if counts else 3)


def test_a_host_without_a_name_of_its_own_has_no_predecessor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    store = make_run(MemoryStore)
    for _ in range(2):
        note(store, 3, writer={**ELSEWHERE, "name": "localhost"})
    assert restore(store)[0] == 3


@stores
def test_training_that_goes_on_saves_the_suspect_step_again_and_nothing_counts_any_more(
    make: Any,
) -> None:
    store = make_run(make)
    for _ in range(2):
        note(store, 3)
    assert restore(store)[0] == 2
    old = digest_of(store, 3)
    assert job(store, 3, suspects={3: old}, content=b"new").step == 3
    assert digest_of(store, 3) != old
    assert attempts(store) == []
    assert restore(store)[0] == 3
    for _ in range(2):
        note(store, 3, marker=old)
    assert restore(store)[0] == 3, "attempts at what the step was before count for nothing"


@stores
def test_a_suspect_step_is_not_one_of_the_good_ones_that_retention_keeps(make: Any) -> None:
    store = make_run(make)
    report = job(store, 4, keep=config.latest(2), suspects={3: digest_of(store, 3)})
    assert report.deleted == (1,)
    assert inspect_run(store).committed == [2, 3, 4]


@stores
def test_a_step_that_is_deleted_takes_its_attempts_along(make: Any) -> None:
    store = make_run(make)
    kept = note(store, 2)
    note(store, 3)
    other = "3.restoring-0123456789abcdef"
    store.put(other, b"not ours")
    retention.delete_step(store, 3, now=0.0)
    assert attempts(store) == sorted([kept, other])


@stores
@pytest.mark.parametrize("by", ["a restore", "a save", "a save that knows the run"])
def test_attempts_at_steps_that_are_gone_are_tidied_away_and_those_of_another_run_stay(
    make: Any, by: str
) -> None:
    store = make_run(make)
    live = note(store, 2, writer=ELSEWHERE)
    theirs = note(store, 9, run="f" * 32, marker="0" * 8 + "-" + "0" * 8)
    gone = [note(store, 8, marker="0" * 8 + "-" + "0" * 8, writer=w) for w in (DEAD, ELSEWHERE)]
    if by == "a restore":
        _, report = restore(store)
        assert sorted(report.removed) == sorted(gone)
    else:
        job(store, 4, learn="knows" in by)
    assert attempts(store) == sorted([live, theirs])


@stores
def test_attempts_at_what_a_step_was_before_are_tidied_away(make: Any) -> None:
    store = make_run(make)
    live = note(store, 3)
    note(store, 3, marker="0" * 8 + "-" + "0" * 8)
    run = inspect_run(store).run
    left = retention.find_leftovers(store, run, now=0.0)
    assert retention.remove_leftovers(store, left, run=run, now=0.0) == [left[0].name]
    assert attempts(store) == [live]


def test_a_marker_that_cannot_be_read_does_not_fail_a_save_that_looks_at_attempts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = make_run(MemoryStore)
    kept = note(store, 3)
    get = store.get

    def refuse(key: str) -> bytes:
        if key == "3/COMMIT.json":
            raise StorageError("no", errno=errno.EIO)
        return bytes(get(key))

    monkeypatch.setattr(store, "get", refuse)
    assert job(store, 4).step == 4
    assert attempts(store) == [kept]


HOSTILE: list[Any] = [
    b"",
    b"not json",
    b"[]",
    fmt.seal({}),
    b"x" * (1 << 17),
    {"step": "3"},
    {"step": 4},
    {"run": 7},
    {"run": "f" * 32},
    {"nonce": "f" * 16},
    {"marker": None},
    {"hosts": -1},
    {"hosts": True},
    {"writer": "me"},
    {"writer": {"machine": [1], "pid": "x", "started": {}, "name": 5}},
    {"writer": {**ELSEWHERE, "pid": -1, "name": "\x1b[31m" * 1000}},
    {"writer": {**DEAD, "more": "x" * (1 << 16)}},
    {"created_at": float("inf")},
    {"created_at": float("nan")},
    {"created_at": float("-inf")},
    {"created_at": -1e300},
    {"created_at": 1e300},
    {"created_at": "yesterday"},
    {"timeout_seconds": -1e9},
    {"timeout_seconds": float("nan")},
]


@pytest.mark.parametrize("content", HOSTILE, ids=lambda content: str(content)[:30])
def test_hostile_attempts_are_harmless(content: Any) -> None:
    store = make_run(MemoryStore)
    for number in range(3):
        nonce = f"{number:016x}"
        name = note(store, 3, nonce=nonce)
        if isinstance(content, bytes):
            store.put(name, content)
        else:
            body = fmt.unseal(store.get(name), name)
            store.put(name, fmt.seal({**body, **content}))
    assert restore(store)[0] == 3
    job(store, 4)
    assert restore(store)[0] == 4


def test_copies_of_one_attempt_count_once() -> None:
    store = make_run(MemoryStore)
    data = store.get(note(store, 3))
    for number in range(100):
        store.put(f"3.restoring-{number:016x}", data)
    store.put("3.restoring-0123456789abcdef/x", b"a directory of that name")
    assert restore(store)[0] == 3


def test_a_name_that_would_spoil_the_report_is_left_out() -> None:
    store = make_run(MemoryStore)
    for _ in range(2):
        note(store, 3, writer={**DEAD, "name": "\x1b[2Jhost"})
    _, report = restore(store)
    assert "on an unknown host" in report.refused["step 3"]


@stores
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, None])
def test_where_the_attempt_cannot_be_written_the_restore_goes_on(
    make: Any, number: int | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_run(make)

    def refuse(*_: Any) -> Any:
        raise StorageError("no", errno=number)

    monkeypatch.setattr(store, "create", refuse)
    if number in (errno.EROFS, errno.EACCES):
        monkeypatch.setattr(store, "delete", refuse)
        if make is MemoryBucket:
            monkeypatch.setattr(store, "delete_listed", refuse)
    assert restore(store)[0] == 3
    assert [r for r in caplog.records if r.levelname == "WARNING"] == []


@stores
def test_where_the_attempt_cannot_be_removed_the_restore_goes_on_and_says_so(
    make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_run(make)

    def refuse(*_: Any) -> Any:
        raise StorageError("no", errno=errno.EIO)

    def load(candidate: Any, _: Any) -> Any:
        monkeypatch.setattr(store, "create", refuse)
        return lambda: candidate.step

    monkeypatch.setattr(store, "delete_listed" if make is MemoryBucket else "delete", refuse)
    assert restore(store, load=load)[0] == 3
    assert any("counts as a restore that has crashed" in r.message for r in caplog.records)


def test_restores_of_others_that_begin_and_end_do_not_make_a_look_at_the_root_start_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = make_run(MemoryBucket)
    children, asked = store.children, []

    def with_others(prefix: str) -> list[str]:
        asked.append(prefix)
        return sorted([*children(prefix), f"3.restoring-{len(asked):016x}"])

    monkeypatch.setattr(store, "children", with_others)
    assert inspect_run(store).committed == [1, 2, 3]
    assert asked == ["", ""]


def test_an_attempt_costs_one_create_and_one_delete_and_nothing_else_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket = make_run(MemoryBucket)

    def operations() -> list[str]:
        done: list[str] = []
        restore(stepped(bucket, lambda what, changes: done.append(what.split("-")[0])))
        return done

    ours = operations()
    monkeypatch.setattr("datarax_dist.attempts.Trial.begin", lambda *_: None)
    others = operations()
    more = collections.Counter(ours) - collections.Counter(others)
    assert sorted(more.elements()) == ["create: 3.restoring", "delete: 3.restoring"]
    assert [what for what in ours if ".restoring" not in what] == others


def test_in_a_bucket_that_is_one_upload_and_one_batch(gcs: FakeGCS, bucket: str) -> None:
    with dd.Checkpointer(f"gs://{bucket}/run") as checkpointer:
        checkpointer.save(1, state={"w": np.ones(3)}).result()
        gcs.clear_requests()
        checkpointer.restore()
        kinds = [r.kind for r in gcs.requests if r.kind in ("insert", "batch", "delete")]
    assert kinds == ["insert", "batch"]
    assert not [name for name in gcs.objects(bucket) if ".restoring-" in name]


# With arrays, and from the command line


def suspect_run(root: Path) -> None:
    with dd.Checkpointer(root) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, state={"w": np.full(4, step)}).result()
    store = LocalStore(str(root))
    for _ in range(2):
        note(store, 3)


def test_a_checkpointer_goes_on_from_the_older_step_and_saves_the_suspect_one_again(
    tmp_path: Path,
) -> None:
    suspect_run(tmp_path)
    with dd.Checkpointer(tmp_path, keep=dd.latest(1)) as checkpointer:
        restored = checkpointer.restore()
        assert (restored.step, restored.report.suspects) == (2, (3,))
        assert checkpointer.all_steps() == [1, 2, 3]
        checkpointer.save(3, state={"w": np.full(4, 33)}).result()
        assert checkpointer.restore().state["w"].tolist() == [33] * 4
    assert sorted(os.listdir(tmp_path)) == ["3", "RUN.json", "lease"]


def test_a_step_that_was_restored_after_all_is_not_replaced_by_accident(tmp_path: Path) -> None:
    suspect_run(tmp_path)
    with dd.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore().step == 2
        assert checkpointer.restore(step=3).step == 3
        with pytest.raises(dd.errors.StepExistsError):
            checkpointer.save(3, state={"w": np.zeros(4)})


def test_try_restore_of_a_run_with_suspect_steps_only_is_an_error(tmp_path: Path) -> None:
    suspect_run(tmp_path)
    with dd.Checkpointer(tmp_path) as checkpointer:
        checkpointer.delete(1)
        checkpointer.delete(2)
        with pytest.raises(CorruptStepError, match="suspect"):
            checkpointer.try_restore()
        assert checkpointer.restore(step=3).step == 3
        checkpointer.save(4, state={"w": np.ones(4)}).result()
        assert checkpointer.try_restore().step == 4  # type: ignore[union-attr]


def test_a_target_that_does_not_fit_twice_makes_no_step_suspect(tmp_path: Path) -> None:
    with dd.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state={"w": np.ones(3)}).result()
        for _ in range(2):
            with pytest.raises(dd.errors.StructureMismatchError):
                checkpointer.restore(state={"v": np.ones(3)})
    assert sorted(os.listdir(tmp_path)) == ["1", "RUN.json", "lease"]


def test_plain_orbax_does_not_mind_attempts(tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    suspect_run(tmp_path)
    with ocp.CheckpointManager(tmp_path) as manager:
        assert sorted(manager.all_steps()) == [1, 2, 3]


def test_the_commands_show_that_a_step_is_suspect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suspect_run(tmp_path)

    def told(*words: str) -> str:
        assert cli.main([*words]) == 0
        return capsys.readouterr().out

    rows = json.loads(told("ls", str(tmp_path), "--json"))["steps"]
    assert [(row["step"], row["state"]) for row in rows] == [
        (3, "suspect"),
        (2, "committed"),
        (1, "committed"),
    ]
    reason = "its restore crashed the job twice"
    assert reason in rows[0]["reason"]
    for words in (("ls", str(tmp_path)), ("show", f"{tmp_path}@3")):
        out = told(*words)
        assert "suspect" in out and reason in out
    out = told("doctor", str(tmp_path))
    assert "WARNING  step 3: is suspect: " + reason in out
    assert "step 3: ok" in told("verify", f"{tmp_path}@3")


def may_not_delete(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, as for a reader that may create objects, or in a directory that only grows."""

    def refuse(*_: Any, **more: Any) -> None:
        raise StorageError("you may not", errno=errno.EPERM)

    for name in ("delete", "delete_listed"):
        if hasattr(store, name):
            monkeypatch.setattr(store, name, refuse)


@stores
def test_restores_of_who_may_not_remove_their_attempts_make_no_step_suspect(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_run(make)
    with monkeypatch.context() as readers:
        may_not_delete(store, readers)
        readers.setattr("datarax_dist.attempts.writer_identity", lambda: DEAD)  # soon
        for _ in range(12):
            assert restore(store)[0] == 3
        ended = [name for name in store.children("") if "3.restored-" in name]
        assert len(attempts(store)) == len(ended) == 8, "they do not pile up"
    noted: list[str] = []

    def load(candidate: Any, _: Any) -> Any:
        noted.extend(attempts(store))
        return lambda: candidate.step

    assert restore(store, load=load)[0] == 3
    assert len(noted) == 1, "who may remove them does, and would count a crash"
    assert not [name for name in store.children("") if name.startswith("3.rest")]


@stores
def test_a_crash_counts_though_no_attempt_can_be_removed(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_run(make)
    may_not_delete(store, monkeypatch)
    note(store, 3)
    note(store, 3)
    assert restore(store)[0] == 2
    assert restore(store, step=3)[0] == 3
    assert restore(store)[0] == 3, "a success clears it, whoever may remove what"


def test_a_file_is_made_in_a_directory_that_only_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(str(tmp_path))

    def refuse(*_: Any, **more: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "unlink", refuse)
    assert store.create("a", b"1")
    assert not store.create("a", b"2")
    assert store.get("a") == b"1"


def test_who_may_only_create_objects_restores_the_newest_step_each_time(
    gcs: FakeGCS, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = f"gs://{bucket}/run"
    with dd.Checkpointer(root) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state={"w": np.full(3, step)}).result()
    monkeypatch.setattr("datarax_dist.attempts.writer_identity", lambda: DEAD)
    gcs.deny("storage.objects.delete")
    for _ in range(3):
        with dd.Checkpointer(root) as ckpt:
            assert ckpt.restore().step == 2


@pytest.mark.parametrize("step", [None, 3])
def test_who_reads_the_metadata_only_has_not_tried_the_step(
    step: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = OrbaxCheckpointHandler()
    for number in (1, 2, 3):
        handler.save(
            tmp_path, {"w": np.full(4, number)}, step=number, metadata={"n": number}, keep=0
        )
    store = LocalStore(str(tmp_path))
    kept, ended = note(store, 3), note(store, 3)
    store.create(ended.replace("restoring", "restored"), store.get(ended))
    created: list[str] = []
    create = LocalStore.create

    def noted(store: Any, key: str, data: bytes) -> bool:
        created.append(key)
        return create(store, key, data)

    monkeypatch.setattr(LocalStore, "create", noted)
    assert handler.restore(tmp_path, metadata_only=True, step=step) == {"n": 3}
    assert created == []
    assert attempts(store) == sorted([kept, ended]), (
        "one restore more that crashes, and the step is suspect"
    )
    assert handler.restore(tmp_path)["w"].tolist() == [3] * 4
    assert attempts(store) == []
    handler.close()


def test_the_metadata_of_a_step_is_read_without_its_arrays(tmp_path: Path) -> None:
    handler = OrbaxCheckpointHandler()
    for number in (1, 2):
        handler.save(
            tmp_path, {"w": np.arange(9000.0)}, step=number, metadata={"n": number}, keep=0
        )
    largest = max((p for p in (tmp_path / "2").rglob("*") if p.is_file()), key=os.path.getsize)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    assert handler.restore(tmp_path, metadata_only=True, step=2) == {"n": 2}
    assert handler.restore(tmp_path, metadata_only=True) == {"n": 1}, "as the state would be"
    assert handler.restore(tmp_path)["w"][8999] == 8999.0
    assert handler.restore(tmp_path, metadata_only=True, step=2) == {"n": 2}
    # That its metadata could be read does not make it a good one.
    handler.save(tmp_path, {"w": np.zeros(3)}, step=2, metadata={"n": 22})
    assert handler.restore(tmp_path, metadata_only=True) == {"n": 22}
    handler.close()


def test_marking_costs_nothing_where_there_are_no_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_run(MemoryBucket)
    found = inspect_run(store)
    monkeypatch.setattr(store, "get", None)
    assert mark_suspects(store, found, NOW) is found
