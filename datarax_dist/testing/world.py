"""A run in memory, and jobs that do to it what jobs do: the real protocol code, on hosts of which
one moves at a time.

    >>> with World("one", in_bucket=True, choose=lambda able: 0, seed=0) as world:
    ...     [ran] = world.run([Plan(2, [(1, False)], crashes={1: 5})])
    ...     world.finish()
    >>> ran.results[1], sorted(world.committed.items())  # of the jobs that came after
    (<class 'datarax_dist.testing.turns.Crash'>, [(1, 1), (2, 2)])

After each operation that could change what counts as a step, the world looks at what does, and
after each job at every byte. What must hold:

- a committed step does not vanish or change, but for who owns the run, and as that job was told:
  to save the step again, to keep only so many, to delete it;
- nothing becomes a step but what the owner of the run saves, whole: the arrays and positions of
  each host, and records and a marker that say what is there, and no file more;
- all hosts of a job that live end alike, having restored the same step; what was reported as saved
  was a step then, and what was reported as deleted was none;
- a restore gives what was the newest step in that time, and reports say what was done;
- a job in whose way nobody is succeeds, and keeps and deletes exactly what it was told; it leaves
  nothing behind, no note of a restore and no lease of old, and nothing of others is touched.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import random
import secrets
import types
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol
from unittest import mock

from datarax_dist import attempts, config, lease, restore, retention, save, telemetry, writers
from datarax_dist import format as fmt
from datarax_dist.clock import Clock
from datarax_dist.errors import (
    CheckpointError,
    CorruptStepError,
    StepExistsError,
    StepNotFoundError,
    StorageError,
)
from datarax_dist.hosts import HostGroup
from datarax_dist.inspection import Candidate, inspect_run, read_records, verify_files
from datarax_dist.lease import Lease
from datarax_dist.request import SaveRequest
from datarax_dist.restore import Loading, Restorer
from datarax_dist.save import Saver
from datarax_dist.telemetry import Phases
from datarax_dist.testing.simulated import MemoryArrays, MemoryBucket, MemoryStore, stepped
from datarax_dist.testing.turns import Crash, Job, Ran, Scheduler, SteppedBoard

__all__ = ["BreachError", "Plan", "World"]

_OPTIONS = config.Options(
    exchange_timeout_seconds=30,
    save_timeout_seconds=60,
    restore_timeout_seconds=60,
    lease_ttl_seconds=2,
)
_NO_TIME = types.SimpleNamespace(monotonic=lambda: 0.0)
_ITEMS = ("state",)
_FOREIGN = {"tensorboard/events": b"not ours", "3.orbax-checkpoint-tmp/x": b"nor this"}
_DAY = 24 * 3600.0
_LATE = 3600.0  # more than clocks are wrong by
_HOSTS = 100  # of a job, at most: process numbers
# The same files are read again and again, in all worlds; half of the time would go into this.
_PARSERS = {
    name: functools.lru_cache(1 << 13)(getattr(fmt, name))
    for name in (
        "parse_marker",
        "parse_void",
        "parse_claim",
        "parse_run",
        "parse_record",
        "parse_lease",
    )
}


_protocols: Any = type(Protocol)
_ask_protocol = _protocols.__instancecheck__
_known_kinds: dict[tuple[type, type], bool] = {}


def _is_of_kind(protocol: type, instance: object) -> bool:
    """What `isinstance` says of a protocol. It is asked at each step what a store can do, and a
    seventh of the time would go into that.
    """
    key = protocol, type(instance)
    if (known := _known_kinds.get(key)) is None:
        known = _known_kinds[key] = _ask_protocol(protocol, instance)
    return known


class BreachError(AssertionError):
    """An invariant does not hold. The text says which, of which world, and what happened."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One job.

    Attributes:
        steps: (step, whether it may be there already) in order.
        keep: how many of the newest steps; None keeps all.
        deletes: steps that are deleted then.
        crashes: host -> before which of its changes it dies. What a host tells is a change, too.
        lost: host -> after which of its changes, of a bucket, it does not hear that they were done.
        late: host -> which of its changes, of a bucket, arrive once more, and after how many
            operations of any host. That before which it dies arrives then for the first time.
        stands: host -> before which of its operations it stands still, and for how many seconds.
        clock: by how many seconds its clocks are wrong.
    """

    hosts: int
    steps: Sequence[tuple[int, bool]]
    keep: int | None = None
    deletes: Sequence[int] = ()
    crashes: Mapping[int, int] = field(default_factory=dict)
    lost: Mapping[int, Container[int]] = field(default_factory=dict)
    late: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    stands: Mapping[int, tuple[int, float]] = field(default_factory=dict)
    clock: float = 0.0

    def __str__(self) -> str:
        saves = [f"step {step}{' again' if replace else ''}" for step, replace in self.steps]
        kept = "every step" if self.keep is None else f"the newest {self.keep}"
        does = f", saves {' and '.join(saves)}, keeps {kept}" if saves else ""
        told = [f"{self.hosts} {'host' if self.hosts == 1 else 'hosts'}", f"restores{does}"]
        told += [f"deletes step {step}" for step in self.deletes]
        told += [f"host {h} dies before its change {n}" for h, n in sorted(self.crashes.items())]
        told += [f"some replies to host {h} are lost" for h in sorted(self.lost)]
        told += [f"some requests of host {h} arrive late" for h in sorted(self.late)]
        told += [f"host {h} stands still once" for h in sorted(self.stands)]
        told += [f"its clock is wrong by {self.clock:.0f} s"] if self.clock else []
        return "; ".join(told)


View = Mapping[int, int]  # step -> which job has saved it


@dataclass(slots=True, eq=False)
class _Job:
    """A job that runs or has run.

    Attributes:
        lease: of its primary.
        epoch: of the run, once it has held it.
        after: the committed steps when it last moved.
        ended: its hosts that have.
        restored: the step that it has restored.
        doubts: what is wrong unless something was in its way.
        is_well: it has ended, and nothing was in its way.
    """

    number: int
    plan: Plan
    lease: Lease | None = None
    epoch: int = 0
    after: View = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    restored: int | None = None
    doubts: list[str] = field(default_factory=list)
    is_well: bool = False

    def may_change(self, step: int, old: int | None, new: int | None, view: View) -> bool:
        """Whether it was told to do this, as the owner of the run."""
        plan = self.plan
        if new is None:
            newest = sorted(view)[-plan.keep :] if plan.keep is not None else view
            return step in plan.deletes or step not in newest
        told = (step, True) in plan.steps or (old is None and (step, False) in plan.steps)
        return new == self.number and told


@dataclass(frozen=True, slots=True)
class _Late:
    """A request that is under way, and arrives before this operation."""

    at: int
    job: _Job
    what: str
    request: Callable[[], object]


class _WrongClock:
    """A clock that is wrong by some seconds."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.monotonic, self.sleep = clock.monotonic, clock.sleep
        self._now, self._seconds = clock.now, seconds

    def now(self) -> float:
        return self._now() + self._seconds


def _content(job: int, step: int, host: int) -> bytes:
    return f"step {step}, as job {job} has saved it, of host {host}".encode()


def _position(job: int, step: int, host: int, hosts: int) -> tuple[str, bytes]:
    """Returns where a host writes its position below the step, and what."""
    data = json.dumps(f"position: {_content(job, step, host).decode()}").encode()
    return f"data/d/shard_{host:05d}-of-{hosts:05d}.json", data


@functools.lru_cache(1 << 13)
def _saved(job: int, step: int, hosts: int) -> Mapping[str, bytes]:
    """Returns what a whole step holds below its directory, but records, claim and marker."""
    parts = {f"state/ocdbt.process_{host}/a": _content(job, step, host) for host in range(hosts)}
    parts |= dict(_position(job, step, host, hosts) for host in range(hosts))
    return {**parts, "state/manifest": b"merged", fmt.TREE_NAME: json.dumps(job).encode()}


class World:
    """A run, and what has become of it. A context: in it nothing is left to chance.

    Args:
        choose: picks one of so many hosts that could move.
        seed: of names that are drawn by chance.
        one_machine: whether all jobs run on one, where a process that has gone is known to have.
    """

    def __init__(
        self,
        name: str,
        in_bucket: bool,
        choose: Callable[[int], int],
        seed: int,
        one_machine: bool = False,
    ) -> None:
        self.name, self._seed = name, seed
        self.scheduler = Scheduler(choose)
        self.files: Any = MemoryBucket() if in_bucket else MemoryStore()
        for key, data in _FOREIGN.items():
            self.files.files[key] = data
        self.store: Any = stepped(self.files, self._step, self.scheduler.reply_is_lost, self._sent)
        self._machine = "simulated" if one_machine else ""
        self._jobs: list[_Job] = []  # all there have been
        self._moving: Sequence[_Job] = ()  # that run now
        self._late: list[_Late] = []
        self._came_late: set[str] = set()  # files that were made by such a request
        self._have_come_late = False  # whether any has; it may have written only what was there
        self._is_disturbed = False  # whether one of them has changed anything
        self._moved: tuple[_Job, str] | None = None  # by whom and what, since it was looked
        self._last: _Job | None = None  # who has moved last
        self._broken: BreachError | None = None
        self._stray: set[int] = set()  # steps whose marker is of a save that came too late
        self._found: Sequence[Candidate] = ()  # when every byte was looked at
        self._before: set[str] = set()  # what was in the root when the jobs that run now began
        self._whole: dict[str, Any] = {}  # steps that were, and every byte of them
        self.committed: View = {}
        self._views: list[View] = [{}]  # all there have been

    def __enter__(self) -> World:
        """Names drawn by chance are drawn from the seed, so that a world is the same each time, on
        every machine.
        """
        self._context = contextlib.ExitStack()
        chance = random.Random(self._seed)
        level = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        self._context.callback(logging.disable, level)

        def token(n: int = 16) -> str:
            return f"{chance.getrandbits(8 * n):0{2 * n}x}"

        for module, name, instead in (
            (secrets, "token_hex", token),
            (telemetry, "time", _NO_TIME),
            (_protocols, "__instancecheck__", _is_of_kind),
            (writers, "_machine", lambda: self._machine),
            (writers, "_process", self._process),
            (lease, "writer_identity", self._writer),
            (retention, "writer_identity", self._writer),
            (save, "writer_identity", self._writer),
            (attempts, "writer_identity", self._writer),
            # What crashes of restores are believed to tell is not what these worlds are about.
            (restore, "mark_suspects", lambda store, inspection, now: inspection),
            *((fmt, name, parser) for name, parser in _PARSERS.items()),
        ):
            self._context.enter_context(mock.patch.object(module, name, instead))
        return self

    def __exit__(self, *_: object) -> None:
        self._context.close()

    # Who is who

    def _here(self) -> _Job | None:
        """Returns whose turn it is."""
        index = self.scheduler.job
        return None if index is None else self._moving[index]

    def _writer(self) -> dict[str, Any]:
        job = self._here()
        number = -1 if job is None else job.number
        pid = (number + 1) * _HOSTS
        return {"machine": self._machine, "pid": pid, "started": "1", "name": f"job {number}"}

    def _process(self, pid: int) -> tuple[str, str]:
        """Returns of a primary what the kernel says of it: when it began, and its state."""
        job = self._jobs[pid // _HOSTS - 1]
        if job not in self._moving or 0 in job.ended:
            return "", ""
        return "1", "S" if job is self._here() else "T"

    # What is done, and what it has changed

    def _step(self, what: str, changes: bool) -> None:
        self.scheduler.step(what, changes)
        self._look()
        self._arrive(self.scheduler.operations)
        if (job := self._here()) is None:
            return
        if self._last is not job:
            self._leave()
            self._last = job
        if changes and (fmt.COMMIT_NAME in what or what.startswith("rename")):
            self._moved = job, what

    def _sent(self, what: str, request: Callable[[], object]) -> None:
        if (after := self.scheduler.is_late()) is not None and (job := self._here()) is not None:
            self._late.append(_Late(self.scheduler.operations + after, job, what, request))

    def _arrive(self, until: float) -> None:
        """Lets requests arrive that are late."""
        if not self._late:
            return
        for late in [late for late in self._late if late.at <= until]:
            self._late.remove(late)
            self._have_come_late = True
            self.scheduler.tell(f"(late, of job {late.job.number}: {late.what})")
            before = dict(self.files.files)
            with contextlib.suppress(KeyError):  # what it would copy is not there any more
                late.request()
            self._came_late |= set(self.files.files) - set(before)
            self._is_disturbed |= self.files.files != before
            self._moved = late.job, f"{late.what}, late"
            self._look()

    def _look(self) -> None:
        """Checks what the last operation has done to the steps."""
        if self._broken is not None:
            raise self._broken
        for job in self._moving:
            job.epoch = max(job.epoch, 0 if job.lease is None else job.lease.epoch)
        if self._moved is None:
            return
        (job, what), self._moved = self._moved, None
        before, after = self.committed, self._markers()
        if after == before:
            return
        for step in sorted({*before, *after}):
            old, new = before.get(step), after.get(step)
            if old == new:
                continue
            told = f"step {step}, of job {old}," if old is not None else f"step {step}"
            becomes = "vanishes" if new is None else f"becomes that of job {new}"
            if any(other.epoch > job.epoch for other in self._moving) or not job.epoch:
                self._breach(
                    f"{told} {becomes} by job {job.number}, which has lost the run: {what}"
                )
            if not job.may_change(step, old, new, before):
                self._breach(f"{told} {becomes}, which job {job.number} was not to do: {what}")
        self.committed = after
        self._views.append(after)

    def _leave(self) -> None:
        """Looks at every byte, when another job moves from now on."""
        if self._last is not None:
            self._last.after = self.committed
        if self._contents() != self.committed:
            self._breach(f"steps of jobs {self._contents()} where {self.committed} were committed")

    def _markers(self) -> dict[int, int]:
        """Returns which job has saved each committed step."""
        found: dict[int, int] = {}
        self._found = inspect_run(self.files).candidates
        for candidate in self._found:
            if candidate.state == "damaged":
                if not self._is_stray(candidate.name):
                    self._breach(f"{candidate.name} is damaged: {candidate.reason}")
                self._stray.add(candidate.step)
            if candidate.state == "committed":
                if candidate.step in found:
                    self._breach(f"step {candidate.step} is there twice")
                try:
                    found[candidate.step] = json.loads(
                        self.files.get(f"{candidate.name}/TREE.json")
                    )
                except KeyError:
                    self._breach(f"step {candidate.step} is committed and not whole")
        return found

    def _is_stray(self, name: str) -> bool:
        """Whether a marker in a bucket is of a step that has been deleted meanwhile: its save stood
        still before it made it. It goes as soon as that save looks, unless it dies before.
        """
        if not isinstance(self.files, MemoryBucket):
            return False
        if any(key.startswith(f"{name}/") for key in self._came_late):
            return True
        claim = retention.read_claim(self.files, name)
        try:
            marker = fmt.parse_marker(self.files.get(f"{name}/{fmt.COMMIT_NAME}"))
        except fmt.InvalidRecordError:
            return False
        return claim is None or claim.nonce != marker.nonce

    def _contents(self) -> dict[int, int]:
        """The same, after looking at every byte."""
        found = self._markers()
        for candidate in self._found:
            marker, step, name = candidate.marker, candidate.step, candidate.name
            if candidate.state != "committed" or marker is None:
                continue
            job = self._jobs[found[step]]
            there = [(key, self.files.files[key]) for key in self.files.files.below(name)]
            if self._whole.get(name) == (seen := (job.number, job.epoch, there)):
                continue  # as it was when it was looked at last
            try:
                files = read_records(self.files, name, marker.records, marker.run, step)
            except CorruptStepError as error:
                self._breach(f"committed step {step}: {error}")
            if wrong := verify_files(self.files, name, files, "full"):
                self._breach(f"committed step {step} is torn: {wrong}")
            self._compare(name, marker, files, job)
            self._whole[name] = seen
        return found

    def _compare(
        self, name: str, marker: fmt.CommitMarker, files: Sequence[fmt.FileEntry], job: _Job
    ) -> None:
        """Checks that a step is what this job has saved, that all of it is recorded, and that its
        marker says the truth.
        """
        whose = f"step {marker.step}, of job {job.number},"
        says = marker.epoch, marker.hosts, tuple(marker.items)
        if says != (is_so := (job.epoch, job.plan.hosts, _ITEMS)):
            self._breach(
                f"{whose} has a marker that names the epoch, hosts and items {says}: they are"
                f" {is_so}"
            )
        saved = _saved(job.number, marker.step, marker.hosts)
        for path, data in saved.items():
            if (there := self.files.files.get(f"{name}/{path}")) != data:
                self._breach(f"{whose} holds {there!r} as {path}, where {data!r} was saved")
        records = {entry.path for entry in marker.records}
        recorded = {entry.path for entry in files}
        whole = {*saved, fmt.STEP_NAME, *self._last_files()}
        if recorded != whole or len(records) != marker.hosts:
            self._breach(f"{whose} has records of {sorted(recorded ^ whole)} that are not right")
        size = sum(entry.size for entry in (*files, *marker.records))
        if size != marker.bytes:
            self._breach(f"{whose} has {size} bytes, and its marker says {marker.bytes}")
        there = set(self.files.files.below(name)) - self._came_late
        known = {f"{name}/{path}" for path in (*whole, *records, fmt.COMMIT_NAME)}
        if more := there - known:
            self._breach(f"{whose} also holds {', '.join(sorted(more))}")

    def _last_files(self) -> dict[str, bytes]:
        return {} if isinstance(self.files, MemoryStore) else {fmt.ORBAX_COMMIT_NAME: b"x"}

    # Jobs

    def run(
        self,
        plans: Sequence[Plan],
        turns: Iterable[tuple[int, float]] = (),
        counts: Callable[[str], bool] = lambda what: True,
        *,
        power: bool = False,
    ) -> list[Ran]:
        """Runs jobs at the same time, of which one moves, and checks the invariants.

        Args:
            turns, counts: see `Scheduler.run`.
            power: whether the power goes at the end: what was not synced is lost.
        """
        first = len(self._jobs)
        self._before = {name.rstrip("/") for name in self.files.children("")}
        self._moving = [_Job(first + n, plan) for n, plan in enumerate(plans)]
        self._jobs += self._moving
        for job in self._moving:
            self.scheduler.tell(f"-- job {job.number}: {job.plan}")
        self._last = None
        ran = self.scheduler.run([self._job(job) for job in self._moving], turns, counts)
        self._look()
        self._leave()
        if power:
            emptied = self.files.lose_power()
            self.scheduler.tell(f"the power goes; empty now: {', '.join(emptied) or 'nothing'}")
            self._leave()
        for job, how in zip(self._moving, ran, strict=True):
            self._check(job, how)
        for key, data in _FOREIGN.items():
            if self.files.files.get(key) != data:
                self._breach(f"{key}, which is not ours, was touched")
        steps = [f"step {step} of job {of}" for step, of in sorted(self.committed.items())]
        self.scheduler.tell(f"committed: {', '.join(steps) or 'nothing'}")
        self._moving = ()
        return ran

    def _job(self, job: _Job) -> Job:
        plan, values = job.plan, dict[str, str]()
        clock: Clock = _WrongClock(self.scheduler, plan.clock) if plan.clock else self.scheduler

        def host(index: int) -> list[tuple[str, Any]]:
            board = SteppedBoard(self.scheduler, index, plan.hosts, values)
            group = HostGroup(board, clock=clock, names=["simulated"] * plan.hosts)
            try:
                return list(self._host(job, group, clock))
            finally:
                job.ended.add(index)

        name = f"job {job.number}"
        return Job(host, plan.hosts, plan.crashes, plan.lost, plan.late, plan.stands, name)

    def _host(self, job: _Job, group: HostGroup, clock: Clock) -> Iterator[tuple[str, Any]]:
        """Does what a host of the job does; tells what, and what came of it."""
        plan = job.plan
        keep = None if plan.keep is None else config.latest(plan.keep)
        if group.is_primary:
            ttl = _OPTIONS.lease_ttl_seconds
            job.lease = Lease(self.store, clock, ttl_seconds=ttl, owner=self._writer())
        saver = Saver(
            self.store, group, clock, _OPTIONS, keep, job.lease if group.is_primary else None
        )
        restorer = Restorer(self.store, group, _OPTIONS, clock, seen=saver.learn)
        yield self._act("restore", functools.partial(self._restore, job, restorer, group))
        for step, replace in plan.steps:
            save = functools.partial(self._save, job, saver, group, step, replace)
            yield self._act(f"save step {step}", save)
        for step in plan.deletes:
            delete = functools.partial(self._delete, saver, group, clock, step)
            yield self._act(f"delete step {step}", delete)
        if group.is_primary:
            assert job.lease is not None
            job.lease.release()

    def _act(self, what: str, act: Callable[[], Any]) -> tuple[str, Any]:
        try:
            how = act()
        except CheckpointError as error:
            self.scheduler.tell(f"is done: {what}, but: {type(error).__name__}: {error}")
            return what, error
        self.scheduler.tell(f"is done: {what}{'' if how is None else f' ({how})'}")
        return what, how

    def _restore(self, job: _Job, restorer: Restorer, group: HostGroup) -> str:
        self._look()
        begin = len(self._views) - 1
        found = restorer.restore(None, self._load, Phases("restore", group.index))
        self._look()
        newest = {max(view.items(), default=None) for view in self._views[begin:]}
        got = None if found is None else found[0]
        if got not in newest:
            self._breach(f"restored {got} where the newest step was {newest}")
        if found is None:
            return "nothing there"
        (step, of), report = found
        told = report.step, report.hosts_before, report.hosts_now
        if told != (is_so := (step, self._jobs[of].plan.hosts, group.count)):
            self._breach(
                f"a restore is reported with the step, hosts then and hosts now {told}: they are"
                f" {is_so}"
            )
        job.restored = step
        return f"step {step} of job {of}"

    def _load(self, candidate: Candidate, _: Loading) -> Callable[[], tuple[int, int]]:
        try:
            job = json.loads(self.store.get(f"{candidate.name}/TREE.json"))
            parts = {
                self.store.get(f"{candidate.name}/state/ocdbt.process_{host}/a")
                == _content(job, candidate.step, host)
                for host in range(candidate.marker.hosts if candidate.marker else 0)
            }
        except KeyError as error:
            raise CorruptStepError("missing", step=candidate.step, files=[str(error)]) from None

        def apply() -> tuple[int, int]:
            # Until then it may be of two versions: no loader would notice.
            if parts - {True}:
                self._breach(f"what is restored of step {candidate.step} is of several versions")
            return candidate.step, job

        return apply

    def _save(self, job: _Job, saver: Saver, group: HostGroup, step: int, replace: bool) -> None:
        self._look()
        before = self.committed
        mine = _content(job.number, step, group.index)
        request = SaveRequest(
            step=step,
            writer=MemoryArrays(self.store, group.index, {"a": mine}),
            positions=dict([_position(job.number, step, group.index, group.count)]),
            shared={fmt.TREE_NAME: json.dumps(job.number).encode()},
            last=self._last_files(),
            items=_ITEMS,
        )
        started = saver.begin(step, lambda: request, Phases("save", group.index), replace=replace)
        try:
            report = started.finish()
        except CheckpointError:
            started.clean_up()
            raise
        self._look()
        if not any((step, job.number) in view.items() for view in self._views):
            self._breach(f"step {step} is reported as saved, and was not committed")
        if report.step != step:
            self._breach(f"step {step} is saved, and reported as step {report.step}")
        if self.committed.get(step) == job.number:
            of = [c.marker.bytes for c in self._found if c.step == step and c.marker is not None]
            if report.bytes not in of:
                self._breach(f"step {step} is reported with {report.bytes} bytes: it has {of}")
        if group.is_primary:
            self._doubt(job, {*before, step}, step, report.deleted)

    def _doubt(self, job: _Job, there: set[int], step: int, deleted: Sequence[int]) -> None:
        """Notes what retention should have done with the steps that were there."""
        newest = sorted(there)
        keep = job.plan.keep
        kept = newest if keep is None else sorted({*newest[-keep:], step})
        gone = [old for old in newest if old not in kept]
        if (is_so := (sorted(self.committed), list(deleted))) != (kept, gone):
            job.doubts.append(
                f"after step {step} was saved, {is_so[0]} are kept, and {is_so[1]} reported as"
                f" deleted: {kept} should be, and {gone}"
            )

    def _delete(self, saver: Saver, group: HostGroup, clock: Clock, step: int) -> None:
        def find() -> None:
            if step not in inspect_run(self.store).committed:
                raise StepNotFoundError("it is not there", step=step)

        def delete(_: Any) -> None:
            find()
            saver.hold()
            saver.forget()
            find()
            self._look()
            begin = len(self._views) - 1
            if not retention.delete_step(self.store, step, now=clock.now(), lease=saver.lease):
                raise StorageError("another job writes to it")
            self._look()
            if all(step in view for view in self._views[begin:]):
                self._breach(f"step {step} is reported as deleted, and was there all the time")

        group.exchange("delete", step, leader=delete, timeout_seconds=saver.agreement_seconds())

    def _check(self, job: _Job, ran: Ran) -> None:
        results = ran.results
        for index, result in enumerate(results):
            if isinstance(result, BaseException):
                self._breach(f"host {index} of job {job.number}: {type(result).__name__}: {result}")
        # Who is taken for dead may be told another thing, or hear of it too late.
        lived = [r for h, r in enumerate(results) if r is not Crash and h not in job.plan.stands]
        for ends in zip(*lived, strict=True):
            if len({"failed" if isinstance(how, Exception) else how for _, how in ends}) > 1:
                self._breach(f"hosts of job {job.number} do not agree: {ends}")
        if ran.stood or self._is_disturbed or len(lived) < len(results) or not lived:
            return
        for what, how in lived[0]:
            if isinstance(how, Exception) and not self._is_refused(job, what, how):
                self._breach(f"job {job.number}, though nobody died: {what}: {how!r}")
        for doubt in job.doubts:
            self._breach(f"job {job.number}, though nobody was in its way: {doubt}")
        job.is_well = True
        has_saved = any(what.startswith("save") and how is None for what, how in lived[0])
        self._check_notes(job, has_saved)
        if has_saved and len(self._moving) == 1 and not self._have_come_late:
            # On a file system a copy stays until the next save where its own save died before the
            # new step got its name, and this job has saved that step.
            asides = {name for name in self._before if fmt.parse_aside_name(name)}
            self._rest(of_today=True, may_stay={n for n in asides if ".replaced-" in n})

    def _check_notes(self, job: _Job, has_saved: bool) -> None:
        """Checks which notes of restores there are when a job has ended that nothing happened to.
        Of jobs that were there at the same time there may be some.
        """
        for name in self.files.children(""):
            if fmt.parse_attempt_name(name) is None:
                continue
            attempt = fmt.parse_attempt(self.files.get(name), name)
            by = self._jobs[int(attempt.writer["name"].removeprefix("job "))]
            if by.is_well:
                self._breach(f"{name} is left, though the restores of job {by.number} have ended")
            if by in self._moving:
                continue
            if attempt.step == job.restored:
                self._breach(f"{name} is left, though job {job.number} has restored that step")
            if has_saved and attempt.step not in job.after:
                self._breach(f"{name} is left, though there is no such step any more")

    def _is_refused(self, job: _Job, what: str, how: Exception) -> bool:
        """Whether a job was told that there is such a step already, or none, and rightly so."""
        step = int(what.rpartition(" ")[2]) if what != "restore" else -1
        if what.startswith("delete"):
            return isinstance(how, StepNotFoundError) and step not in job.after
        is_there = any(view.get(step, job.number) != job.number for view in self._views)
        is_there = is_there or step in self._stray
        return isinstance(how, StepExistsError) and (step, False) in job.plan.steps and is_there

    # The end

    def finish(self, hosts: int = 2) -> None:
        """A job that nothing happens to: it restores, saves, and nothing is left behind; nor, a day
        later, what was left for a while.
        """
        last = max(self.committed, default=0)
        last += self._is_disturbed  # below the next number may be what came late
        if self._late:
            last += 1
            self.run([Plan(hosts, [(last, False)])])
            self._arrive(float("inf"))
            self._leave()
        self.run([Plan(hosts, [(last + 1, False)])])
        if self._rest(of_today=True):
            self.scheduler.pass_time(_DAY + _LATE)
            self.scheduler.tell("-- a day later")
            self.run([Plan(1, [(last + 2, False)])])
            self._rest(of_today=False)

    def _rest(self, of_today: bool, may_stay: Container[str] = ()) -> bool:
        """Checks what is left. Returns whether something is that may stay for a day, so that what
        comes back late is known by it: of a bucket, a void marker, or a claim.
        """
        # Beside a copy that is the step a void marker stays.
        hides = {fmt.step_name(step) for step in self.committed}
        late = [
            c.name
            for c in self._found
            if (c.state == "void" and c.name not in hides)
            or (c.state == "staged" and self.files.children(c.name) == [fmt.STEP_NAME])
        ]
        may = [c.name for c in self._found if c.state in ("committed", "refused")]
        may += hides if isinstance(self.files, MemoryBucket) else ()
        may += map(fmt.step_name, self._stray)
        may += late if of_today and isinstance(self.files, MemoryBucket) else []
        known = {*may, fmt.RUN_NAME, fmt.LEASE_NAME, *(key.split("/")[0] for key in _FOREIGN)}
        left = {key.split("/")[0] for key in self.files.files} - known
        left -= {key.split("/")[0] for key in self._came_late}
        # Restores that have crashed count as long as their step is there.
        tried = {name: fmt.parse_attempt_name(name) for name in left}
        left -= {name for name, at in tried.items() if at is not None and at[0] in self.committed}
        left = {name for name in left if name not in may_stay}
        mine = fmt.lease_name(self._jobs[-1].epoch)
        left |= {*self.files.files.below(fmt.LEASE_NAME)} - self._came_late - {mine}
        if left:
            self._breach(f"left over: {sorted(left)}")
        if not fmt.parse_lease(self.files.get(mine), mine).released:
            self._breach(f"{mine} is not released, though its job has ended")
        return bool(late)

    # What is told

    def _breach(self, what: str) -> NoReturn:
        self._broken = BreachError(f"{self.told()}\n{self.name} breaks a promise: {what}")
        raise self._broken

    def told(self) -> str:
        """Returns what has happened, for a reader who has not seen such a world before."""
        lines = [
            f"{self.name}: {self.files.told}",
            f"It holds {' and '.join(_FOREIGN)} of others from the start.",
            "Host 0 is the primary. Who dies does so before a change, if it comes so far: what"
            " writes, deletes, renames or copies, or tells the others something; counted from 0.",
            "An agreement is an exchange of the hosts, or a save. `children` lists a directory,"
            " `list` all below it; `write` is what TensorStore writes, and does not sync.",
            "The seconds are virtual: they go by only while every host waits.",
        ]
        for when, line in self.scheduler.trace:
            lines += ["", line[3:]] if line.startswith("-- ") else [f"{when:8.2f} s  {line}"]
        return "\n".join(lines)
