"""Two jobs in each other's way in a bucket: before each single request of one, the other acts
wholly; or the one is killed there, and the other goes on.

Everything is in memory, and the code of the protocol is the real one. What a batch deletes or
copies is done object by object.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from jobs import Job, Killed, attempt, requests, whose

from datarax_dist import config, retention
from datarax_dist.inspection import inspect_run
from datarax_dist.testing import MemoryBucket

ACTS: dict[str, Callable[[Job], Any]] = {
    "saves 5": lambda job: job.save(5),
    "saves 5 again": lambda job: job.save(5, replace=True),
    "saves 6": lambda job: job.save(6),
    "saves 6, retires": lambda job: job.save(6, keep=config.latest(1)),
    "deletes 5": lambda job: retention.delete_step(job.store, 5, now=0.0),
    "restores": lambda job: job.restore(),
}
REMOVING = ("saves 6, retires", "deletes 5")


def start(kind: str) -> MemoryBucket:
    bucket = MemoryBucket()
    job = Job("old", requests(bucket))
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
            try:
                Job("killed", requests(copy, killer(number))).save(5, replace=True)
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


def schedules(kind: str, first: str, second: str, *, killed: bool) -> Iterator[tuple[Any, ...]]:
    """Yields, for each request of the first job, the bucket and how both ended."""
    for number in itertools.count():
        bucket = start(kind)
        ended: list[Any] = []

        def before(now: int, bucket: Any = bucket, at: int = number, ended: Any = ended) -> None:
            if now == at and not ended:
                other = Job("second", requests(bucket))
                ended.append(attempt(lambda: ACTS[second](other)))
                if killed:
                    raise Killed

        result = attempt(lambda: ACTS[first](Job("first", requests(bucket, before))))  # noqa: B023 - called here
        if not ended:
            return
        yield number, bucket, result, ended[0]


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
        late = Job("late", requests(bucket))
        assert late.save(99) == late.save(5, replace=True) == "saved", told
        left = [c for c in inspect_run(bucket).candidates if c.state not in ("committed", "void")]
        assert left == [], told
        tops = {key.split("/")[0] for key in bucket.files}
        assert tops == {"RUN.json", *(c.name for c in inspect_run(bucket).candidates)}, told
    assert number > 0
