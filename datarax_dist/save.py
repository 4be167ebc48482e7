"""The save protocol, over the ports: no jax, no orbax.

On every host unless said otherwise.

Caller's thread (`Saver.begin`):
  1. capture   Positions are encoded and the state is planned, by the caller.
  2. prepare   All hosts contribute what they are about to save. The primary compares; then
     stage     it removes this run's leftovers, makes `<step>.staging-<nonce>/` and writes the
               claim `STEP.json` in it.
               A disagreement or an error on any host raises on all, and nothing was written.
  3. start     The array writer copies what it needs; training may go on.

Worker thread (`StartedSave.finish`):
  4. positions The position shards that this host owns.
  5. arrays    The array writer finishes. Its last act on the primary (merging) waits for all hosts'
               arrays.
  6. hash      Sizes and crc32c of what this host wrote; files and directories are fsynced.
  7. record    The host record, `hosts/host_<h>-of-<n>.json`.
  8. written   All hosts contribute the digest of their record. Primary:
     verify    the listing is the union of the records, nothing missing, nothing more;
     commit    `COMMIT.json`, the last file, is created, durable;
     publish   the staging directory gets its final name (file systems only). Now, and not before,
               the step counts.
  9. outcome   Every host learns the same outcome. A host that fails anywhere says so at once, and
               all the others hear it.
 10. retire    Primary: retention, marker first. It cannot fail the save.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from datarax_dist import format as fmt
from datarax_dist import retention
from datarax_dist.clock import Clock
from datarax_dist.config import KeepPolicy, Options
from datarax_dist.errors import (
    CorruptStepError,
    InvalidArgumentError,
    PeerError,
    PositionError,
    StepExistsError,
    StorageError,
)
from datarax_dist.hosts import HostGroup, Operation
from datarax_dist.inspection import find_run, inspect_run, read_records
from datarax_dist.lease import writer_identity
from datarax_dist.storage import Store, SupportsRename
from datarax_dist.telemetry import Phases

__all__ = ["ArrayWrite", "ArrayWriter", "SaveReport", "SaveRequest", "Saver", "StartedSave"]

logger = logging.getLogger("datarax_dist")


class ArrayWrite(Protocol):
    """A write of arrays that has begun."""

    def wait(self, timeout_seconds: float) -> None:
        """Returns when this host's files are complete; on the primary, when everything is merged.

        Raises:
            StorageError: it failed, or has not ended after `timeout_seconds`.
        """


class ArrayWriter(Protocol):
    """What writes the arrays of one step."""

    def start(self, prefix: str, all_written: Callable[[], None]) -> ArrayWrite | None:
        """Copies what it needs and goes on in the background; None when there are no arrays.

        Args:
            prefix: the staging directory, which exists, below the store's root.
            all_written: must be called on every host when its own arrays are written; on the
                primary it returns when all hosts have called it.
        """

    def parts(self, host: int) -> Sequence[str]:
        """Returns the prefixes (below the step) that hold everything that `host` writes."""

    def owns(self, key: str, host: int) -> bool:
        """Whether `key` (below the step) is written by `host`, for keys of the writer's items."""


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """What this host wants to save, already captured.

    Attributes:
        positions: key below the step -> content, for the position shards that this host writes.
        written: data item -> the data shards whose position this host writes.
        held: data item -> data shard -> digest, for the positions that this host reads; several
            hosts may read the same.
        counts: data item -> how many positions make it whole.
        shared: key -> content, for what the primary writes for all (structure, indexes).
        agreement: JSON that must be equal on all hosts, named part by part.
        local_digests: leaf name -> digest, for leaves that must be equal on all hosts.
        items: the names of the step's items, for its marker.
        versions: of the libraries that write it.
    """

    step: int
    writer: ArrayWriter
    positions: Mapping[str, bytes] = field(default_factory=dict)
    written: Mapping[str, Sequence[int]] = field(default_factory=dict)
    held: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    shared: Mapping[str, bytes] = field(default_factory=dict)
    agreement: Mapping[str, Any] = field(default_factory=dict)
    local_digests: Mapping[str, str] = field(default_factory=dict)
    items: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SaveReport:
    """How a save went on this host.

    Attributes:
        step: the committed step.
        bytes: of all files of the step, over all hosts.
        seconds: for each phase, on this host.
        deleted: steps that retention removed afterwards (known on the primary).
    """

    step: int
    bytes: int
    seconds: Mapping[str, float]
    deleted: Sequence[int] = ()


class Saver:
    """Begins saves of one run."""

    def __init__(
        self,
        store: Store,
        group: HostGroup,
        clock: Clock,
        options: Options,
        keep: KeepPolicy | None,
    ) -> None:
        self._store = store
        self._group = group
        self._clock = clock
        self._options = options
        self.keep = keep
        # Steps that a restore here has found damaged: they may be saved again, and they do not
        # count where retention decides how many good ones are left.
        self.suspects: set[int] = set()

    def begin(
        self,
        step: int,
        capture: Callable[[], SaveRequest],
        phases: Phases,
        *,
        replace: bool = False,
        previous_error: BaseException | None = None,
    ) -> StartedSave:
        """Steps 1 to 3. Returns the save that goes on in the background; raises when the hosts do
        not agree.
        """
        request: SaveRequest | None = None
        failure: BaseException | None = None
        payload: dict[str, Any] = {}
        try:
            with phases.span("capture"):
                request = capture()
            phases.reach("prepare")
            payload = {
                "step": request.step,
                "hosts": self._group.count,
                "agreement": dict(request.agreement),
                "digests": _digests(request.local_digests),
                "positions": positions_told(request.counts, request.written, request.held),
                "unseen": previous_error is not None,
            }
        except BaseException as error:
            failure = error
        begin = self._clock.monotonic()
        decided = self._group.exchange(
            "prepare",
            payload,
            error=failure,
            leader=lambda payloads: self._stage(payloads, phases, replace),
            timeout_seconds=self._options.exchange_timeout_seconds,
        )
        phases.seconds["prepare"] = self._clock.monotonic() - begin
        if decided.get("unseen") and previous_error is not None:
            raise previous_error
        assert request is not None
        operation = self._group.begin(
            f"save of step {step}", consequence=lambda phase: _consequence(step, phase)
        )
        started = StartedSave(
            self,
            request,
            decided["run"],
            decided["staging"],
            decided["nonce"],
            operation,
            phases,
            replace or step in self.suspects,
        )
        started.start()
        return started

    def _stage(self, payloads: list[Any], phases: Phases, replace: bool) -> dict[str, Any]:
        if all(payload["unseen"] for payload in payloads):
            return {"unseen": True}
        check_agreement(payloads)
        check_positions([payload["positions"] for payload in payloads])
        phases.reach("stage")
        step = int(payloads[0]["step"])
        replace = replace or step in self.suspects
        store = self._store
        run = self._claim_run()
        self._check_free(run, step, replace)
        nonce = secrets.token_hex(8)
        name = fmt.step_name(step)
        staging = name
        if isinstance(store, SupportsRename):
            staging = fmt.aside_name(step, "staging", nonce)
        claim = fmt.StepClaim(run, step, nonce, len(payloads), writer_identity(), self._clock.now())
        store.put(f"{staging}/{fmt.STEP_NAME}", fmt.dump_claim(claim))
        return {"run": run, "staging": staging, "nonce": nonce}

    def _check_free(self, run: str, step: int, replace: bool) -> None:
        store, name = self._store, fmt.step_name(step)
        there = store.children("")
        holders = [
            child[:-1]
            for child in there
            if child == f"{name}/" or fmt.parse_aside_name(child.rstrip("/")) == (step, "replaced")
        ]
        if any(fmt.COMMIT_NAME in store.children(holder) for holder in holders):
            if not replace:
                raise StepExistsError(
                    f"Step {step} is committed in {store.root} already; nothing was changed."
                    " Delete it first, or save to another root.",
                    step=step,
                )
        elif name in (child.rstrip("/") for child in there) and not self._is_ours(run, name):
            raise StepExistsError(
                f"{store.root}/{name} is there already and was not written by datarax_dist;"
                " nothing was changed. Move it away, or save another step.",
                step=step,
            )

    def _is_ours(self, run: str, name: str) -> bool:
        claim = retention.read_claim(self._store, name)
        return claim is not None and claim.run == run

    def _claim_run(self) -> str:
        """Returns the run of the root; makes one in a new root."""
        store = self._store
        run = find_run(store)
        if run is not None and fmt.RUN_NAME in store.children(""):
            return run
        new = run or secrets.token_hex(16)
        if store.create(fmt.RUN_NAME, fmt.dump_run(new, self._clock.now())):
            return new
        try:
            return fmt.parse_run(store.get(fmt.RUN_NAME))  # another job was faster
        except fmt.InvalidRecordError as error:
            raise CorruptStepError(
                f"{store.root}/{fmt.RUN_NAME} cannot be read ({error}), and no step says which run"
                " this is. Choose another root, or remove that file. Nothing was written.",
                step=None,
                files=[fmt.RUN_NAME],
            ) from error


def _consequence(step: int, phase: str) -> str:
    if phase in ("", "save:publish", "save:committed"):
        return f"Step {step} may be committed or not; earlier steps are as they were."
    return f"Step {step} was not committed; earlier steps are as they were."


def _digests(digests: Mapping[str, str]) -> dict[str, str]:
    """A few digests travel by name, so that an error can name the leaf; many travel as one."""
    if len(digests) <= 500:
        return dict(digests)
    return {f"one of {len(digests)} leaves": fmt.crc_text(fmt.crc32c(fmt.dumps(dict(digests))))}


def check_agreement(payloads: Sequence[Mapping[str, Any]]) -> None:
    """Raises when the hosts are not about to save the same."""
    first = payloads[0]
    for host, other in enumerate(payloads):
        if other["step"] != first["step"]:
            steps = {h: p["step"] for h, p in enumerate(payloads)}
            raise PeerError(
                f"prepare: the hosts save different steps: {steps}. Every host must call save()"
                " with the same step. Nothing was written.",
                phase="prepare",
                failures={h: f"step {s}" for h, s in steps.items() if s != first["step"]},
            )
        for part in sorted({*first["agreement"], *other["agreement"]}):
            ours, theirs = first["agreement"].get(part), other["agreement"].get(part)
            if ours != theirs:
                raise PeerError(
                    f"prepare: host {host} differs from host 0 in {part}: {theirs!r} instead of"
                    f" {ours!r}. Nothing was written.",
                    phase="prepare",
                    failures={host: f"{part}: {theirs!r}"},
                )
        differing = [
            name
            for name, digest in first["digests"].items()
            if other["digests"].get(name) != digest
        ]
        if differing:
            shown = ", ".join(differing[:10])
            raise InvalidArgumentError(
                f"These leaves of the state belong to one host each, and host {host} has other"
                f" values than host 0: {shown}. Make them global arrays"
                " (jax.make_array_from_process_local_data), or give them as `data`. Nothing was"
                " written."
            )


def positions_told(
    counts: Mapping[str, int],
    written: Mapping[str, Sequence[int]],
    held: Mapping[str, Mapping[int, str]],
) -> dict[str, Any]:
    """Returns what the primary needs to know of a host's positions; see `SaveRequest`."""
    return {
        item: {
            "count": count,
            "written": list(written[item]),
            "held": {str(shard): digest for shard, digest in held[item].items()},
        }
        for item, count in counts.items()
    }


def check_positions(told: Sequence[Mapping[str, Any]]) -> None:
    """Raises when hosts that read the same data shard are not at the same place, or when a position
    would be written by no host, or by two.
    """
    for item, first in told[0].items():
        held: dict[str, tuple[int, str]] = {}
        writers: dict[int, int] = {}
        for host, items in enumerate(told):
            mine = items[item]
            for shard, digest in mine["held"].items():
                other, theirs = held.setdefault(shard, (host, digest))
                if digest != theirs:
                    raise PositionError(
                        f"prepare: host {host} is at another place of data item {item!r}, position"
                        f" {shard}, than host {other}, which reads the same records. Hosts that"
                        " read the same must take the same number of batches. Nothing was written."
                    )
            for shard in mine["written"]:
                if shard in writers:
                    raise PositionError(
                        f"prepare: hosts {writers[shard]} and {host} both own data shard {shard} of"
                        f" {item!r}. Nothing was written."
                    )
                writers[shard] = host
        if missing := sorted(set(range(first["count"])).difference(writers)):
            raise PositionError(
                f"prepare: no host owns data shard {missing[0]} of {item!r} ({len(missing)} of"
                f" {first['count']} are missing). Do all hosts give shards() the same count and"
                " sharding? Nothing was written."
            )


class StartedSave:
    """A save whose background part is to be run, by `finish`, on the worker thread."""

    def __init__(
        self,
        saver: Saver,
        request: SaveRequest,
        run: str,
        staging: str,
        nonce: str,
        operation: Operation,
        phases: Phases,
        replace: bool = False,
    ) -> None:
        self._replace = replace
        self.step = request.step
        self.run = run
        self.operation = operation
        self.phases = phases
        self._saver = saver
        self._keep = saver.keep
        self._store = saver._store
        self._group = saver._group
        self._request = request
        self._staging = staging
        self._nonce = nonce
        self._write: ArrayWrite | None = None
        self._failure: BaseException | None = None
        self._deadline = saver._clock.monotonic() + saver._options.save_timeout_seconds
        self._aside = False

    def start(self) -> None:
        """Step 3. A failure is kept for `finish`, so that the handles of all hosts end alike."""
        try:
            with self.phases.span("start"):
                self._write = self._request.writer.start(self._staging, self._all_written)
            self.phases.reach("started")
        except BaseException as error:
            self._failure = error
            self.operation.fail(self.phases.current, error)
            if not isinstance(error, Exception):
                raise

    def _all_written(self) -> None:
        self.phases.reach("arrays")
        self.operation.contribute("arrays", None)
        if self._group.is_primary:
            self.operation.gather("arrays", self._deadline)

    def outcome(self) -> Any:
        """Step 9: waits for the decision, wherever this host's own work is. Any thread."""
        return self.operation.result("written", self._deadline, own=self._failure)

    def finish(self) -> SaveReport:
        """Steps 4 to 10. Returns when this host has nothing more to do for the save; raises what
        failed it.
        """
        try:
            self._work()
        except PeerError as error:
            logger.debug("step %d: stopped, as the save has failed: %s", self.step, error)
        except BaseException as error:
            self._failure = self._failure or error
            self.operation.fail(self.phases.current, error)
            if not isinstance(error, Exception):
                raise
        finally:
            self._end_write()
        decided = self.outcome()
        self._saver.suspects.discard(self.step)
        deleted = self._retire() if self._group.is_primary else []
        return SaveReport(
            self.step, int(decided["bytes"]), dict(self.phases.seconds), tuple(deleted)
        )

    def _retire(self) -> Sequence[int]:
        """Step 10. The step is committed: nothing that goes wrong here may fail the save."""
        if self._keep is None and not self._aside:
            return []
        with self.phases.span("retention"):
            try:
                if self._aside:
                    retention.delete_replaced(self._store, self.step)
                good = set(inspect_run(self._store).committed) - self._saver.suspects
                steps = retention.plan_retention(sorted(good), self._keep, saved=self.step)
            except Exception as error:
                logger.warning("retention of %s: %s. It is tried again.", self._store.root, error)
                return []
            return retention.retire(self._store, steps, reached=self.phases.reach)

    def _end_write(self) -> None:
        """A write that has begun must have ended before the next save removes what it has made."""
        if self._write is not None:
            with contextlib.suppress(Exception):  # whatever it is, it is too late to matter
                self._write.wait(self._seconds_left())
            self._write = None

    def _seconds_left(self) -> float:
        return max(0.0, self._deadline - self._saver._clock.monotonic())

    def _work(self) -> None:
        if self._failure is not None:
            return
        if self._group.is_primary:
            with self.phases.span("tidy"):
                self._remove_leftovers()
        with self.phases.span("positions"):
            contents = dict(self._request.positions)
            if self._group.is_primary:
                contents.update(self._request.shared)
            for key, content in contents.items():
                self._store.put(f"{self._staging}/{key}", content)
        with self.phases.span("wait_arrays"):
            if self._write is None:  # no arrays
                self._all_written()
            else:
                self._write.wait(self._seconds_left())
            self._write = None
        self.operation.check("hash")
        with self.phases.span("hash"):
            files = self._hash(sorted(contents))
        self.operation.check("record")
        with self.phases.span("record"):
            name = fmt.host_record_name(self._group.index, self._group.count)
            record = fmt.dump_record(
                fmt.HostRecord(
                    self.run,
                    self.step,
                    self._nonce,
                    self._group.index,
                    self._group.count,
                    files,
                    dict(self.phases.seconds),
                )
            )
            self._store.put(f"{self._staging}/{name}", record)
        self.phases.reach("written")
        self.operation.contribute("written", [name, len(record), fmt.digest(record)])
        if self._group.is_primary:
            rows = self.operation.gather("written", self._deadline)
            marker = self._commit([fmt.FileEntry(*row) for row in rows])
            self.operation.succeed({"bytes": marker.bytes})

    def _remove_leftovers(self) -> None:
        """What earlier saves of this run left behind. All hosts have ended them: they agreed on
        this one since.
        """
        leftovers = [
            left
            for left in retention.find_leftovers(self._store, self.run)
            if left.name != self._staging
        ]
        retention.remove_leftovers(self._store, leftovers)

    def _hash(self, own: Sequence[str]) -> list[fmt.FileEntry]:
        """Step 6: everything that this host wrote. What no host's name is on, the primary answers
        for.
        """
        prefix, host, writer = f"{self._staging}/", self._group.index, self._request.writer
        mine = {f"{prefix}{key}" for key in own}
        for part in writer.parts(host):  # not the whole step: n hosts that list n hosts' files
            for entry in self._store.list(f"{prefix}{part}".rstrip("/")):
                key = entry.key.removeprefix(prefix)
                if not key.startswith(("data/", "hosts/")) and writer.owns(key, host):
                    mine.add(entry.key)
        entries = []
        for key in sorted(mine):
            size, digest = self._store.digest(key)
            entries.append(fmt.FileEntry(key.removeprefix(prefix), size, digest))
        self._store.sync(self._staging, sorted(mine))
        return entries

    def _commit(self, records: Sequence[fmt.FileEntry]) -> fmt.CommitMarker:
        """Step 8, on the primary."""
        store, staging = self._store, self._staging
        with self.phases.span("verify"):
            try:
                files = read_records(store, staging, records, self.run, self.step)
            except CorruptStepError as error:
                raise StorageError(
                    f"Step {self.step} is not committed: of what the hosts say they have written to"
                    f" {store.root}/{staging}, host 0 does not find {', '.join(error.files[:10])}."
                    " Is this one file system, shared by all hosts?"
                ) from error
            listed = {
                entry.key.removeprefix(f"{staging}/"): entry.size for entry in store.list(staging)
            }
            wanted = {entry.path: entry.size for entry in (*files, *records)}
            if wrong := sorted({*listed.items()} ^ {*wanted.items()}):
                names = sorted({path for path, _ in wrong})
                raise StorageError(
                    f"Step {self.step} is not committed: the listing of {store.root}/{staging} and"
                    f" what the hosts wrote differ in {', '.join(names[:10])}. Is this one file"
                    " system, shared by all hosts?"
                )
        marker = fmt.CommitMarker(
            run=self.run,
            step=self.step,
            epoch=0,  # of a lease, when there are leases
            nonce=self._nonce,
            hosts=self._group.count,
            records=tuple(records),
            bytes=sum(wanted.values()),
            items=tuple(self._request.items),
            committed_at=self._saver._clock.now(),
            versions=self._request.versions,
        )
        name = fmt.step_name(self.step)
        with self.phases.span("commit"):
            self.operation.check("commit")
            if not store.create(f"{staging}/{fmt.COMMIT_NAME}", fmt.dump_marker(marker)):
                raise self._other_writer()
        with self.phases.span("publish"):
            if staging != name:
                self._publish(name)
        self.phases.reach("committed")
        logger.info(
            "committed step %d of %s (%d bytes, %d hosts)",
            self.step,
            store.root,
            marker.bytes,
            marker.hosts,
        )
        return marker

    def _publish(self, name: str) -> None:
        """Gives the staging directory its final name, at once and only if there is none: of two
        writers one commits. A committed step that is being replaced steps aside before; it stays
        the step until its successor has its name.
        """
        store = self._store
        assert isinstance(store, SupportsRename)
        committed = fmt.COMMIT_NAME in store.children(name)
        if committed and not self._replace:
            raise self._other_writer()
        if committed or self._saver._is_ours(self.run, name):  # what has lost its marker, too
            store.rename(name, fmt.aside_name(self.step, "replaced", self._nonce))
            self._aside = True
        try:
            store.rename(self._staging, name)
        except KeyError as error:
            raise StorageError(
                f"Another job has removed what this one staged in {store.root}/{self._staging}."
                " Only one job at a time may write to a run."
            ) from error

    def _other_writer(self) -> StepExistsError:
        return StepExistsError(
            f"Another writer has committed step {self.step} in {self._store.root}; that one stays.",
            step=self.step,
        )

    def clean_up(self) -> None:
        """Removes what a failed save of a single host has staged. With more hosts the next save
        does: another host may be writing still.
        """
        names = self._store.children(self._staging)
        finished = self._staging == fmt.step_name(self.step) and fmt.COMMIT_NAME in names
        if self._group.count == 1 and names and not finished:
            left = retention.Leftover(self._staging, self.step, True)
            retention.remove_leftovers(self._store, [left])
