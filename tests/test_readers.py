"""Who reads a run: what is told, what is no damage, and that no reader is in anybody's way."""

from __future__ import annotations

import collections
import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import OPTIONS, Job

import datarax_dist as dd
from datarax_dist import attempts, cli, errors, retention, writers
from datarax_dist import format as fmt
from datarax_dist import restore as restoring
from datarax_dist.arrays import engine
from datarax_dist.boards import LocalBoard
from datarax_dist.cli import reading
from datarax_dist.clock import SystemClock
from datarax_dist.errors import CorruptStepError, StepNotFoundError, StorageError
from datarax_dist.hosts import HostGroup
from datarax_dist.inspection import inspect_run
from datarax_dist.restore import Restorer
from datarax_dist.storage import LocalStore
from datarax_dist.telemetry import Phases
from datarax_dist.testing import MemoryBucket, MemoryStore, SimulatedHosts

stores = pytest.mark.parametrize("make", [MemoryStore, MemoryBucket], ids=["file system", "bucket"])
OTHER = "f" * 32  # a run
ASIDE = "0123456789abcdef"


class Disk(LocalStore):
    """A directory, in which arrays of simulated hosts can be written."""

    def write(self, key: str, data: bytes) -> None:
        path = Path(self.path(key))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def make_run(store: Any, *steps: int) -> Any:
    for step in steps or (1, 2):
        Job("one", store).save(step)
    return store


def restorer_of(store: Any, group: HostGroup | None = None) -> Restorer:
    return Restorer(store, group or HostGroup(LocalBoard()), OPTIONS)


def restore(store: Any, group: HostGroup | None = None, *, load: Any = None) -> Any:
    """Returns step and report, or None."""
    default = lambda candidate, _: lambda: candidate.step
    return restorer_of(store, group).restore(None, load or default, Phases("restore", 0))


def saved(root: Path, *steps: int, **options: Any) -> Path:
    """Saves steps with arrays."""
    with dd.Checkpointer(root, options=dd.Options(**options)) as checkpointer:
        for step in steps or (1, 2):
            checkpointer.save(step, state={"w": np.full(500, step)}).result()
    return root


# A marker that is no file


def spoil(marker: Path, how: str) -> None:
    marker.rename(marker.parent.parent / "elsewhere")
    if how == "a link":
        marker.symlink_to(marker.parent.parent / "elsewhere")
    elif how == "a directory":
        marker.mkdir()
    else:
        marker.touch()
        os.truncate(marker, 300 << 20)


@pytest.mark.parametrize("how", ["a link", "a directory", "too large"])
def test_an_attempt_at_a_step_whose_marker_is_no_file_is_in_the_way_of_no_host_and_no_save(
    how: str, tmp_path: Path
) -> None:
    store = make_run(Disk(str(tmp_path)))
    found = inspect_run(store)
    attempts.Trial(store, SystemClock(), 1, 60.0).begin(str(found.run), found.candidates[0])
    [attempt] = inspect_run(store).attempts
    spoil(tmp_path / "2" / "COMMIT.json", how)
    (tmp_path / f"3.staging-{ASIDE}").mkdir()  # so that leftovers are looked for
    dead = {**writers.writer_identity(), "started": "0"}
    claim = fmt.StepClaim(str(found.run), 3, ASIDE, 1, dead, 0.0)
    store.put(f"3.staging-{ASIDE}/STEP.json", fmt.dump_claim(claim))
    results = SimulatedHosts(2).run(lambda group: restore(store, group))
    assert [step for step, _ in results] == [1, 1]
    assert results[0][1].removed == (f"3.staging-{ASIDE}",)
    assert Job("one", store).save(4) == "saved"
    assert inspect_run(store).attempts == (attempt,), "the step may be the one that it was at"


def test_a_restore_ends_alike_on_all_hosts_whatever_befalls_who_tidies_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_run(MemoryStore())
    store.put(f"3.staging-{ASIDE}/a", b"x")

    def fails(*_: Any) -> Any:
        raise ValueError("none of ours")

    monkeypatch.setattr(retention, "find_leftovers", fails)
    results = SimulatedHosts(2).run(lambda group: restore(store, group))
    assert [step for step, _ in results] == [2, 2]
    assert "could not look for leftovers of" in caplog.text and "none of ours" in caplog.text


# Many directories that are no steps


class Counting(Disk):
    """Counts listings: prefix -> how many."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.listings: collections.Counter[str] = collections.Counter()

    def children(self, prefix: str) -> list[str]:
        self.listings[prefix] += 1
        return super().children(prefix)


def test_the_root_is_listed_as_often_for_many_empty_directories_as_for_one(tmp_path: Path) -> None:
    store, counts = make_run(Counting(str(tmp_path))), []
    for numbers in (range(10, 11), range(11, 60)):
        for number in numbers:
            (tmp_path / str(number)).mkdir()
        store.listings.clear()
        found = {c.step: c.state for c in inspect_run(store).candidates}
        assert found == {1: "committed", 2: "committed"} | dict.fromkeys(
            range(10, numbers.stop), "refused"
        )
        counts.append(store.listings[""])
        assert max(n for prefix, n in store.listings.items() if prefix) <= counts[0], "nor they"
    assert counts[0] == counts[1] > 5, "what is empty is looked at several times"


@pytest.mark.parametrize("looks", [2, 6])
def test_a_directory_that_is_empty_at_some_looks_only_is_looked_at_again(
    looks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a step that is saved again, and has another name whenever it is listed."""
    store, children = make_run(Disk(str(tmp_path))), LocalStore.children
    (tmp_path / "10").mkdir()
    left = [looks]

    def is_away(files: LocalStore, prefix: str) -> list[str]:
        left[0] -= prefix == "2"
        return [] if prefix == "2" and left[0] >= 0 else children(files, prefix)

    monkeypatch.setattr(LocalStore, "children", is_away)
    found = {c.step: c.state for c in inspect_run(store).candidates}
    assert found == {1: "committed", 2: "committed" if looks < 6 else "refused", 10: "refused"}


# What cannot be read now is not damaged


PASSING = (
    *("ESHUTDOWN", "ECONNREFUSED", "ECONNRESET", "ECONNABORTED", "ENETUNREACH", "ENETDOWN"),
    *("ENETRESET", "EHOSTDOWN", "EHOSTUNREACH", "EBUSY", "EINTR", "ENOLCK", "EREMOTEIO", "EPIPE"),
    *("ENOTCONN", "ETIMEDOUT", "ESTALE", "EACCES", "ENOMEM", "EKEYEXPIRED", "ENOKEY"),
)


@pytest.mark.parametrize("name", [name for name in PASSING if hasattr(errno, name)])
@pytest.mark.parametrize("key", ["2/COMMIT.json", "2/TREE.json", "2/state"])
def test_a_storage_that_cannot_be_reached_is_no_damage(
    name: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, opens = make_run(Disk(str(tmp_path))), LocalStore.open
    number = getattr(errno, name)

    def refuse(files: LocalStore, wanted: str) -> int:
        if wanted.startswith(key):
            raise OSError(number, os.strerror(number), wanted)
        return opens(files, wanted)

    monkeypatch.setattr(LocalStore, "open", refuse)
    with pytest.raises(StorageError) as told:
        restore(store)
    assert told.value.errno == number


def test_a_bad_disk_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, opens = make_run(Disk(str(tmp_path))), LocalStore.open

    def refuse(files: LocalStore, wanted: str) -> int:
        if wanted == "2/TREE.json":
            raise OSError(errno.EIO, "bad", wanted)
        return opens(files, wanted)

    monkeypatch.setattr(LocalStore, "open", refuse)
    step, report = restore(store)
    assert (step, report.damaged) == (1, (2,))


def test_a_platform_need_not_have_each_error_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(errno, "EREMOTEIO", raising=False)
    assert errors._numbers("EPIPE", "EREMOTEIO") == {errno.EPIPE}


# What says that arrays are damaged is what is said of them, not what they are called


def raising(error: Exception) -> Any:
    def load(candidate: Any, _: Any) -> Any:
        if candidate.step == 2:
            raise error
        return lambda: candidate.step

    return load


NAMES = ("checksum-study", "DATA_LOSS: x", "Data corruption", "Error decoding ")


@stores
@pytest.mark.parametrize("name", NAMES)
def test_no_name_makes_an_error_that_is_none_damage(make: Any, name: str) -> None:
    told = (
        'Could not read the arrays: ValueError: FAILED_PRECONDITION: Error opening "zarr3" driver:'
        f" file:///{name}/2/state: unsupported driver option. Check the file system."
    )
    with pytest.raises(StorageError, match="unsupported driver option"):
        restore(make_run(make()), load=raising(StorageError(told, errno=None)))
    item = f"data/{name}/index.json: checksum of what? {name}"
    with pytest.raises(CorruptStepError, match="checksum of what"):
        restore(make_run(make()), load=raising(fmt.InvalidRecordError(item)))


@stores
@pytest.mark.parametrize(
    "error",
    [
        StorageError("Could not read the arrays: ValueError: DATA_LOSS: x", errno=None),
        StorageError(
            "Could not read the arrays: ValueError: Error decoding b-tree node: ZSTD", errno=None
        ),
        CorruptStepError("d/0: the checksum of a chunk is wrong", step=-1, files=["state/d/0"]),
    ],
    ids=["TensorStore", "its decoders", "ours"],
)
def test_arrays_that_fail_their_own_checks_are_damaged_whatever_the_records_say(
    make: Any, error: Exception
) -> None:
    step, report = restore(make_run(make()), load=raising(error))
    assert (step, report.damaged) == (1, (2,))


@stores
def test_a_record_that_fails_its_own_check_is_damaged_whatever_the_records_say(make: Any) -> None:
    sealed = fmt.seal({"a": 1}).replace(b'"a":1', b'"a":2')
    with pytest.raises(fmt.InvalidRecordError) as told:
        fmt.unseal(sealed, "TREE.json")
    step, report = restore(make_run(make()), load=raising(told.value))
    assert (step, report.damaged) == (1, (2,))


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_chunks_that_fail_their_own_checks_are_damaged_whatever_the_records_say(
    compression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of arrays that were damaged before their files were recorded; with the real texts."""
    saved(tmp_path, 1, 2, compression=compression)
    for file in (tmp_path / "2" / "state").rglob("d/*"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    monkeypatch.setattr(restoring, "verify_files", lambda *_, **more: {})
    monkeypatch.setattr(restoring.Loading, "take", lambda loading: [])
    with dd.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore().step == 1


def test_a_root_may_be_called_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, real = saved(tmp_path / "checksum-study"), engine.OrbaxArrays.restore

    def fails(arrays: Any, step: str, *rest: Any, **more: Any) -> Any:
        if step.startswith("2/"):
            with engine.wrapped("read", step):
                raise ValueError(f"FAILED_PRECONDITION: Error opening {root}/{step}: no option")
        return real(arrays, step, *rest, **more)

    monkeypatch.setattr(engine.OrbaxArrays, "restore", fails)
    with (
        dd.Checkpointer(root) as checkpointer,
        pytest.raises(StorageError, match="FAILED_PRECONDITION"),
    ):
        checkpointer.try_restore()


# Where nothing is restored


def refused(caplog: pytest.LogCaptureFixture, level: int) -> str:
    return "\n".join(r.getMessage() for r in caplog.records if r.levelno == level)


@pytest.mark.parametrize("hosts", [1, 2])
def test_where_every_step_has_lost_its_marker_a_job_does_not_begin_anew(hosts: int) -> None:
    store = make_run(MemoryStore())
    for step in (1, 2):
        store.delete(f"{step}/COMMIT.json")
    for error in SimulatedHosts(hosts).run(lambda group: restore(store, group)):
        assert isinstance(error, CorruptStepError)
        assert error.step == 2
        for part in ("step 1: no COMMIT.json", "step 2: no COMMIT.json", "move these directories"):
            assert part in str(error)


def test_where_one_step_has_its_marker_it_is_restored_and_the_others_are_told() -> None:
    store = make_run(MemoryStore())
    store.delete("2/COMMIT.json")
    step, report = restore(store)
    assert (step, list(report.refused)) == (1, ["step 2"])


def test_in_a_bucket_what_has_no_marker_is_a_save_that_did_not_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    bucket = make_run(MemoryBucket(), 1)
    bucket.delete("1/COMMIT.json")
    assert restore(bucket) is None
    assert refused(caplog, logging.WARNING) == ""
    assert "step 1: no COMMIT.json" in refused(caplog, logging.INFO)


@stores
def test_steps_of_another_run_are_told_where_nothing_is_restored(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    store = make_run(make())
    store.put("RUN.json", fmt.dump_run(OTHER, 0.0))
    store.put("7/a", b"nothing of ours")
    store.put(f"8.staging-{ASIDE}/a", b"x")
    restorer = restorer_of(store)
    assert restorer.restore(None, lambda *_: lambda: None, Phases("restore", 0)) is None
    told = refused(caplog, logging.WARNING)
    assert "step 1: its marker is of another run" in told
    assert "step 2: its marker is of another run" in told
    assert "step 7: no COMMIT.json and no STEP.json: not a step of ours" in told
    assert "staging" not in told
    assert f"8.staging-{ASIDE}: its save did not end" in refused(caplog, logging.INFO)
    for part in ("\n  step 1: its marker", "\n  step 7: no COMMIT.json", "\n  8.staging-"):
        assert part in restorer.why_nothing()


@stores
def test_of_a_new_root_nothing_is_told(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    restorer = restorer_of(make())
    assert restorer.restore(None, lambda *_: lambda: None, Phases("restore", 0)) is None
    asked = " Nothing of a run is there: is it the right path?"  # of who asks for a step
    assert (restorer.why_nothing(), caplog.records) == (asked, [])


def test_why_nothing_was_found_is_not_told_of_a_later_restore() -> None:
    store = MemoryStore()
    store.put(f"8.staging-{ASIDE}/a", b"x")
    restorer = restorer_of(store)
    assert restorer.restore(None, lambda *_: lambda: None, Phases("restore", 0)) is None
    assert "8.staging" in restorer.why_nothing()
    make_run(store, 1)
    assert restorer.restore(None, lambda *_: lambda: None, Phases("restore", 0)) is not None
    assert restorer.why_nothing() == ""
    restorer = restorer_of(MemoryStore())
    assert restorer.restore(None, lambda *_: lambda: None, Phases("restore", 0)) is None
    assert "Nothing of a run" in restorer.why_nothing()
    make_run(restorer._store, 1)
    assert restorer.restore(None, lambda *_: lambda: None, Phases("restore", 0)) is not None
    assert restorer.why_nothing() == ""


def test_a_root_that_is_no_directory_is_no_empty_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "not mounted")
    for root, told in (
        ("file", "it is not a directory"),
        ("file/run", "it is not a directory"),
        ("link", "a symbolic link to nothing"),
    ):
        with dd.Checkpointer(tmp_path / root) as checkpointer:
            for ask in (checkpointer.try_restore, checkpointer.latest_step, checkpointer.restore):
                with pytest.raises(StorageError, match=told):
                    ask()
    assert LocalStore(str(tmp_path / "not there")).children("") == []
    (tmp_path / "run").mkdir()
    (tmp_path / "also a link").symlink_to(tmp_path / "run")
    store = LocalStore(str(tmp_path / "also a link"))
    assert store.children("") == store.children("file") == []


# A reader is in nobody's way


def being_deleted(store: Any, step: int, *, inside: bool) -> str:
    """Leaves a deletion as far as its owner may be; returns its directory."""
    name = fmt.aside_name(step, "deleting", ASIDE)
    store.put(f"{name}/STEP.json", store.get(f"{step}/STEP.json"))
    if inside:
        store.rename(str(step), f"{name}/{step}")
    return name


def of(owner: dict[str, Any], *, released: bool = False) -> bytes:
    record = fmt.LeaseRecord(OTHER, 7, ASIDE, owner, 60.0, released=released)
    return fmt.dump_lease(record)


HERE = writers.writer_identity()
ELSEWHERE = {**HERE, "machine": "another", "name": "another"}
DEAD = {**HERE, "started": "0"}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("record", "goes"),
    [
        pytest.param(of(HERE), False, id="of this process"),
        pytest.param(of(ELSEWHERE), False, id="of another machine"),
        pytest.param(of(ELSEWHERE, released=True), True, id="let go"),
        pytest.param(of(DEAD), True, id="of a process that is gone"),
        pytest.param(None, True, id="of nobody"),
    ],
)
def test_what_the_owner_of_the_run_may_be_deleting_is_left_to_it(
    record: bytes | None, goes: bool, inside: bool
) -> None:
    store = make_run(MemoryStore())
    name = being_deleted(store, 1, inside=inside)
    if record is not None:
        store.put(fmt.lease_name(7), record)
    step, report = restore(store)
    assert (step, report.removed) == (2, (name,) if goes else ())
    assert bool(store.children(name)) is not goes
    Job("one", store).save(3)
    assert store.children(name) == [], "the next save removes it"


def test_what_the_owner_has_let_step_aside_is_left_to_it() -> None:
    store = make_run(MemoryStore())
    aside = fmt.aside_name(2, "replaced", ASIDE)
    for entry in store.list("2"):
        store.put(f"{aside}/{entry.key.removeprefix('2/')}", store.get(entry.key))
    store.put(f"3.staging-{ASIDE}/a", b"x")
    store.put(fmt.lease_name(7), of(ELSEWHERE))
    assert restore(store)[1].removed == ()
    store.put(fmt.lease_name(7), of(DEAD))
    assert restore(store)[1].removed == (aside,)


def test_a_lease_is_read_when_it_is_known_what_is_being_deleted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another job takes the run just after leftovers are looked for, or just before."""
    store = make_run(MemoryStore())
    name = being_deleted(store, 1, inside=False)
    find = retention.find_leftovers

    def then_it_is_taken(*arguments: Any, **more: Any) -> Any:
        found = find(*arguments, **more)
        store.put(fmt.lease_name(7), of(ELSEWHERE))
        return found

    monkeypatch.setattr(retention, "find_leftovers", then_it_is_taken)
    assert restore(store)[1].removed == ()
    assert store.children(name) == ["STEP.json"]


def test_a_restore_beside_a_deletion_is_not_in_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, restored = LocalStore.rename, []
    with dd.Checkpointer(saved(tmp_path)) as owner:

        def then_restores(store: LocalStore, source: str, destination: str) -> None:
            if ".deleting-" in destination:
                monkeypatch.undo()
                with dd.Checkpointer(tmp_path) as reader:
                    restored.append(reader.restore().step)
            rename(store, source, destination)

        monkeypatch.setattr(LocalStore, "rename", then_restores)
        owner.delete(1)
        assert restored == [2]
        assert owner.all_steps() == [2]
    assert sorted(os.listdir(tmp_path)) == ["2", "RUN.json", "lease"]


@pytest.mark.parametrize("which", ["the step", "the directory"])
def test_a_deletion_in_whose_way_something_was_says_what_is_gone(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, told = LocalStore.rename, "1"
    with dd.Checkpointer(saved(tmp_path)) as owner:

        def late(store: LocalStore, source: str, destination: str) -> None:
            nonlocal told
            if which == "the directory":
                told = destination.partition("/")[0]
            shutil.rmtree(tmp_path / told)
            rename(store, source, destination)

        monkeypatch.setattr(LocalStore, "rename", late)
        with pytest.raises(StorageError) as error:
            owner.delete(1)
    assert f"was not deleted: {told} has been removed meanwhile. Look again" in str(error.value)
    assert "another job" not in str(error.value)


@pytest.mark.parametrize("how", ["a link", "a directory", "too large"])
def test_a_step_that_does_not_say_whose_it_is_is_not_deleted_and_that_is_an_error_of_ours(
    how: str, tmp_path: Path
) -> None:
    store = make_run(Disk(str(tmp_path)))
    store.delete("1/STEP.json")
    spoil(tmp_path / "1" / "COMMIT.json", how)
    with pytest.raises(StorageError, match="has neither its claim nor its marker"):
        retention.delete_step(store, 1, now=0.0)


# From the command line


def changing(monkeypatch: pytest.MonkeyPatch, store: Any, act: Callable[[], Any]) -> None:
    """Has something happen just before the files of a step are looked at."""
    acts, once = [act], reading._verify_once
    monkeypatch.setattr(reading, "open_root", lambda root: store)

    def late(*arguments: Any) -> Any:
        if acts:
            acts.pop()()
        return once(*arguments)

    monkeypatch.setattr(reading, "_verify_once", late)


@stores
@pytest.mark.parametrize("target", ["root@2", "root@latest"])
def test_verify_says_that_the_step_that_was_asked_for_was_deleted_meanwhile(
    make: Any, target: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    store = make_run(make())
    changing(monkeypatch, store, lambda: retention.delete_step(store, 2, now=0.0))
    assert cli.main(["verify", target]) == cli.output.NOT_FOUND
    told = capsys.readouterr().err
    assert told == f"datarax-dist: Step 2 of {store.root} was deleted while it was read.\n"


def test_verify_says_that_a_step_was_damaged_meanwhile(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    store = make_run(MemoryStore())
    changing(monkeypatch, store, lambda: store.put("2/COMMIT.json", b"x"))
    monkeypatch.setattr(reading, "read_records", raises_corrupt(reading.read_records))
    assert cli.main(["verify", "root@2", "--json"]) == cli.output.FINDINGS
    [row] = json.loads(capsys.readouterr().out)["steps"]
    assert (row["result"], list(row["damage"])) == ("damaged", ["COMMIT.json"])


def raises_corrupt(read: Callable[..., Any]) -> Callable[..., Any]:
    def once(store: Any, name: str, *rest: Any) -> Any:
        if name == "2":
            raise CorruptStepError("no", step=2, files=["hosts/x"])
        return read(store, name, *rest)

    return once


# How long a restore may wait


def waits_of(store: Any, monkeypatch: pytest.MonkeyPatch, load: Any) -> tuple[list[float], float]:
    """Returns the time limits of all waits of one attempt, and what its file says."""
    waits: list[float] = []
    said: list[float] = []
    exchange, begin = HostGroup.exchange, attempts.Trial.begin

    def waiting(group: HostGroup, *arguments: Any, **more: Any) -> Any:
        waits.append(more["timeout_seconds"])
        return exchange(group, *arguments, **more)

    def beginning(trial: Any, run: str, candidate: Any, names: Any) -> None:
        begin(trial, run, candidate, names)
        [name] = inspect_run(store).attempts
        said.append(fmt.parse_attempt(store.get(name), name).timeout_seconds)

    monkeypatch.setattr(HostGroup, "exchange", waiting)
    monkeypatch.setattr(attempts.Trial, "begin", beginning)
    with pytest.raises(CorruptStepError):
        restore(store, load=load)
    return waits, said[0]


def test_a_restore_elsewhere_counts_as_ended_when_each_of_its_waits_can_have_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each time the files are looked at something is wrong once, and loading fails twice."""
    store = make_run(MemoryStore(), 1)
    looks = iter([{"a": "wrong"}, {}, {"a": "wrong"}, {}])
    monkeypatch.setattr(Restorer, "_verify_share", lambda *_: (next(looks), []))

    def load(*_: Any) -> Any:
        raise CorruptStepError("a is missing", step=1, files=["a"])

    waits, said = waits_of(store, monkeypatch, load)
    phases = OPTIONS.restore_timeout_seconds, OPTIONS.exchange_timeout_seconds
    assert [waits.count(seconds) for seconds in phases] == [6, 7]
    assert said == sum(phases)
    assert sum(waits) <= attempts._WAITS * said
    writer, begun = ELSEWHERE, time.time()
    attempt = fmt.RestoreAttempt(OTHER, 1, ASIDE, "", 1, writer, begun, said)
    assert not attempts._has_ended(attempt, HERE, begun + sum(waits) + 599)
    assert attempts._has_ended(attempt, HERE, begun + attempts._WAITS * said + 601)


def test_each_attempt_says_how_long_its_hosts_wait() -> None:
    options = dd.Options(restore_timeout_seconds=30, exchange_timeout_seconds=5)
    restorer = Restorer(MemoryStore(), HostGroup(LocalBoard()), options)
    assert restorer._trial._timeout_seconds == 35


# What is read is not compared with everything else that is read


def test_the_files_of_a_step_are_divided_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_run(MemoryStore())
    compared: list[object] = []
    equal = fmt.FileEntry.__eq__
    monkeypatch.setattr(
        fmt.FileEntry, "__eq__", lambda one, other: compared.append(1) or equal(one, other)
    )
    assert restore(store)[0] == 2
    assert compared == []


def test_a_step_that_is_not_there_is_told_with_what_there_is() -> None:
    store = make_run(MemoryStore())
    store.delete("2/COMMIT.json")
    with pytest.raises(StepNotFoundError, match=r"step 2: no COMMIT\.json"):
        restorer_of(store).restore(2, lambda *_: lambda: None, Phases("restore", 0))
