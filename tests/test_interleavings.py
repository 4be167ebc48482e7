"""Two jobs in each other's way in a bucket: before each single request of one, the other acts
wholly; or the one is killed there, and the other goes on.

Everything is in memory, and the code of the protocol is the real one. What a batch deletes or
copies is done object by object.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from datarax_dist import config, retention
from datarax_dist.clock import SystemClock
from datarax_dist.errors import CheckpointError, CorruptStepError
from datarax_dist.hosts import HostGroup, LocalBoard
from datarax_dist.inspection import Candidate, inspect_run, read_records, verify_files
from datarax_dist.restore import Restorer
from datarax_dist.save import Saver, SaveRequest
from datarax_dist.storage import Entry
from datarax_dist.telemetry import Phases
from datarax_dist.testing import MemoryArrays, MemoryBucket

OPTIONS = config.Options(exchange_timeout_seconds=20, save_timeout_seconds=600)


class Killed(BaseException):
    """The job's process is gone."""


class Requests:
    """A bucket as one job sees it. `before(number)` is called before each of its requests."""

    root, digest_kind = MemoryBucket.root, MemoryBucket.digest_kind

    def __init__(self, bucket: MemoryBucket, before: Callable[[int], None] | None = None) -> None:
        self._bucket, self._before = bucket, before
        self.count, self.is_dead = 0, False

    def _ask(self, method: str, *arguments: Any, **more: Any) -> Any:
        if self.is_dead:
            raise Killed
        number, self.count = self.count, self.count + 1
        if self._before is not None:
            try:
                self._before(number)
            except Killed:
                self.is_dead = True
                raise
        return getattr(self._bucket, method)(*arguments, **more)

    def get(self, key: str) -> bytes:
        return self._ask("get", key)

    def put(self, key: str, data: bytes) -> None:
        self._ask("put", key, data)

    write = put

    def create(self, key: str, data: bytes) -> bool:
        return self._ask("create", key, data)

    def replace(self, key: str, expected: bytes, data: bytes) -> bool:
        return self._ask("replace", key, expected, data)

    def children(self, prefix: str) -> list[str]:
        return self._ask("children", prefix)

    def list(self, prefix: str) -> list[Entry]:
        return self._ask("list", prefix)

    def digest(self, key: str, expected_size: int | None = None, *, like: str = "") -> Any:
        return self._ask("digest", key, expected_size, like=like)

    def copy(self, source: str, destination: str, names: Sequence[str]) -> None:
        for name in names:
            self._ask("copy", source, destination, [name])

    def delete_listed(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._ask("delete_listed", [entry])

    def delete(self, prefix: str, *, last: str | None = None) -> None:
        keys = [entry.key for entry in self.list(prefix)]
        for key in sorted(keys, key=lambda key: key == f"{prefix}/{last}"):
            self._ask("delete", key)

    def sync(self, prefix: str, keys: Any) -> None:
        """Nothing to do in a bucket."""


class Job:
    """One process of one host. What it saves is marked with its name."""

    def __init__(self, name: str, store: Requests) -> None:
        self.name, self.store, self.group = name, store, HostGroup(LocalBoard())

    def save(self, step: int, *, replace: bool = False, keep: Any = None) -> str:
        saver = Saver(self.store, self.group, SystemClock(), OPTIONS, keep)  # type: ignore[arg-type] # a store in all that it does
        name = self.name.encode()
        request = SaveRequest(
            step=step,
            writer=MemoryArrays(self.store, 0, {"a": name, "b": 2 * name}),  # type: ignore[arg-type] # the same
            positions={"data/d/shard_00000-of-00001.json": json.dumps(self.name).encode()},
            shared={"TREE.json": json.dumps(self.name).encode()},
            last={"commit_success.txt": b"x"},
            items=("state",),
        )
        started = saver.begin(step, lambda: request, Phases("save", 0), replace=replace)
        try:
            started.finish()
        except CheckpointError:
            started.clean_up()
            raise
        return "saved"

    def restore(self) -> tuple[int, set[str]] | None:
        """Returns the step, and whose the parts of it are."""

        def load(candidate: Candidate) -> Callable[[], tuple[int, set[str]]]:
            try:
                parts = {
                    self.store.get(f"{candidate.name}/state/ocdbt.process_0/a").decode(),
                    json.loads(self.store.get(f"{candidate.name}/TREE.json")),
                }
            except KeyError as error:
                raise CorruptStepError("missing", step=candidate.step, files=[str(error)]) from None
            return lambda: (candidate.step, parts)

        found = Restorer(self.store, self.group, OPTIONS).restore(  # type: ignore[arg-type] # a store
            None, load, Phases("restore", 0)
        )
        assert found is not None, "the run is there, and a restore finds nothing"
        assert found[1].damaged == (), "a restore takes a step that is being changed for damaged"
        return found[0]


ACTS: dict[str, Callable[[Job], Any]] = {
    "saves 5": lambda job: job.save(5),
    "saves 5 again": lambda job: job.save(5, replace=True),
    "saves 6": lambda job: job.save(6),
    "saves 6, retires": lambda job: job.save(6, keep=config.latest(1)),
    "deletes 5": lambda job: retention.delete_step(job.store, 5),  # type: ignore[arg-type] # a store
    "restores": lambda job: job.restore(),
}
REMOVING = ("saves 6, retires", "deletes 5")


def start(kind: str) -> MemoryBucket:
    bucket = MemoryBucket()
    job = Job("old", Requests(bucket))
    job.save(4)
    if kind != "without 5":
        job.save(5)
    if kind == "5 was not committed":
        del bucket.files["5/COMMIT.json"]
    if kind == "5 under its other name":  # killed after the void marker of another version
        for number in itertools.count():
            copy = MemoryBucket()
            for key, data in bucket.files.items():
                copy.files[key] = data
            requests = Requests(copy, killer(number))
            try:
                Job("killed", requests).save(5, replace=True)
            except Killed:
                found = [c.name for c in inspect_run(copy).candidates if c.state == "committed"]
                if "5" not in found and "4" in found and len(found) == 2:
                    return copy
    return bucket


def killer(at: int) -> Callable[[int], None]:
    def before(number: int) -> None:
        if number == at:
            raise Killed

    return before


def attempt(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except CheckpointError as error:
        return error
    except Killed:
        return Killed


def whose(bucket: MemoryBucket) -> dict[int, str]:
    """Returns whose version each committed step is, after looking at every byte."""
    found: dict[int, str] = {}
    for candidate in inspect_run(bucket).candidates:
        if candidate.state == "committed":
            marker = candidate.marker
            assert marker is not None
            assert candidate.step not in found, "a step is there twice"
            files = read_records(bucket, candidate.name, marker.records, marker.run, candidate.step)
            assert not verify_files(bucket, candidate.name, files, "full"), "a step is torn"
            content = bucket.get(f"{candidate.name}/state/ocdbt.process_0/a")
            found[candidate.step] = content.decode()
    return found


def schedules(kind: str, first: str, second: str, *, killed: bool) -> Iterator[tuple[Any, ...]]:
    """Yields, for each request of the first job, the bucket and how both ended."""
    for number in itertools.count():
        bucket = start(kind)
        ended: list[Any] = []

        def before(now: int, bucket: Any = bucket, at: int = number, ended: Any = ended) -> None:
            if now == at and not ended:
                other = Job("second", Requests(bucket))
                ended.append(attempt(lambda: ACTS[second](other)))
                if killed:
                    raise Killed

        result = attempt(lambda: ACTS[first](Job("first", Requests(bucket, before))))  # noqa: B023 - called here
        if not ended:
            return
        yield number, bucket, result, ended[0]


@pytest.fixture(autouse=True)
def _one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_turn(store: Any, function: Callable[[Any], Any], items: Any) -> list[Any]:
        return [function(item) for item in items]

    for module in ("inspection", "retention", "save"):
        monkeypatch.setattr(f"datarax_dist.{module}.for_each", in_turn)


AGAIN, RETIRES, DELETES, RESTORES = "saves 5 again", "saves 6, retires", "deletes 5", "restores"
CASES = [
    *itertools.product(
        ["5 is committed"], [AGAIN, RETIRES, DELETES], [AGAIN, RETIRES, "saves 6", RESTORES]
    ),
    *itertools.product(["5 is committed"], [RESTORES], [AGAIN, RETIRES, "saves 6"]),
    *itertools.product(["5 is committed", "without 5"], [AGAIN], [DELETES]),
    *itertools.product(["5 under its other name"], [AGAIN], [AGAIN, "saves 6", RESTORES]),
    *itertools.product(["5 under its other name"], [DELETES, RESTORES], [AGAIN]),
    *itertools.product(["5 was not committed"], [AGAIN], [AGAIN, RETIRES, "saves 6", RESTORES]),
    *itertools.product(["5 was not committed"], [RESTORES], [AGAIN]),
    *itertools.product(["without 5"], [AGAIN], [AGAIN, RETIRES]),
]


@pytest.mark.parametrize(
    ("kind", "first", "second", "killed"),
    [
        pytest.param(*case, killed, id=f"{', '.join(case)}{', killed' if killed else ''}")
        for case in CASES
        for killed in (False, True)
        if not (killed and case[1] == RESTORES)  # which has changed nothing that others see
    ],
)
def test_whatever_two_jobs_do_between_each_others_requests_no_step_is_lost_or_torn(
    kind: str, first: str, second: str, killed: bool
) -> None:
    acts = (first, second)
    there = kind in ("5 is committed", "5 under its other name")
    number = -1
    for number, bucket, result, other in schedules(kind, first, second, killed=killed):
        steps = whose(bucket)
        told = f"before request {number}: {result!r}; {other!r}; {steps}"
        savers = [
            name
            for name, act, how in (("first", first, result), ("second", second, other))
            if act == "saves 5 again" and how == "saved"
        ]
        if not any(act in REMOVING for act in acts):
            assert 4 in steps, told
            if savers or there:
                assert 5 in steps, told
        if 5 in steps:
            allowed = savers or (["old"] if there else [])
            # Killed after its marker, the save was not reported and is there.
            assert steps[5] in [*allowed, *(["first"] if killed else [])], told
        for act, how in ((first, result), (second, other)):
            if act.startswith("saves 6") and how == "saved":
                assert 6 in steps, told
            if act == "restores":
                step, parts = how
                assert len(parts) == 1, f"two versions in one restore; {told}"
                assert step > 4 or not there or any(act in REMOVING for act in acts), told
        # Whoever comes next finds nothing in the way, and nothing is left.
        late = Job("late", Requests(bucket))
        assert late.save(99) == late.save(5, replace=True) == "saved", told
        left = [c for c in inspect_run(bucket).candidates if c.state not in ("committed", "void")]
        assert left == [], told
        tops = {key.split("/")[0] for key in bucket.files}
        assert tops == {"RUN.json", *(c.name for c in inspect_run(bucket).candidates)}, told
    assert number > 0
