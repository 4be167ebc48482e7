"""The save protocol, over the ports: no jax, no orbax.

On every host unless said otherwise.

Caller's thread (`Saver.begin`):
  1. capture   Positions are encoded and the state is planned, by the caller.
  2. prepare   All hosts contribute what they are about to save. The primary compares; the first
               time it takes the run, so that no other job writes to it (`lease`); then
     stage     it makes `<step>.staging-<nonce>/` and writes the claim `STEP.json` in it.
               A disagreement or an error on any host raises on all, and nothing was written.
  3. start     The array writer copies what it needs; training may go on.

Worker thread (`StartedSave.finish`):
     claim     In a bucket the primary writes the claim only here, so that `save` need not wait for
               the bucket, and no host writes before it has.
     tidy      Primary: what this run's crashed saves have left is removed.
  4. positions The position shards that this host owns.
  5. arrays    The array writer finishes. Its last act on the primary (merging) waits for all hosts'
               arrays.
  6. hash      Sizes and digests of what this host wrote; files and directories are fsynced.
  7. record    The host record, `hosts/host_<h>-of-<n>.json`.
  8. written   All hosts contribute the digest of their record. Primary:
     verify    the listing is the union of the records, nothing missing, nothing more: by a tally
               that each host has contributed; the records are read when it differs;
     commit    `COMMIT.json`, the last file, is created, durable;
     publish   the lease is still ours; the staging directory gets its final name. Now, and not
               before, the step counts.
               A bucket cannot rename. There `publish` comes first: what was staged is copied, by
               the bucket itself, to the final name, each object on the condition that there is
               none; then the marker is created there, and that is what makes the step count. So a
               writer that was believed dead can never change what another one has committed.
  9. outcome   Every host learns the same outcome. A host that fails anywhere says so at once, and
               all the others hear it.
 10. retire    Primary: retention, marker first. It cannot fail the save.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from datarax_dist import format as fmt
from datarax_dist import retention
from datarax_dist.agreement import (
    check_agreement,
    check_positions,
    digests_told,
    positions_told,
)
from datarax_dist.clock import Clock
from datarax_dist.config import KeepPolicy, Options
from datarax_dist.errors import (
    CorruptStepError,
    InvalidArgumentError,
    PeerError,
    StepExistsError,
    StorageError,
    describe,
)
from datarax_dist.hosts import HostGroup, Operation, is_unheard
from datarax_dist.inspection import (
    Inspection,
    find_run,
    is_as_judged,
    read_records,
    refuse_a_step,
)
from datarax_dist.known import Known, step_of
from datarax_dist.lease import Right, Unguarded
from datarax_dist.publish import Staged, check_free, check_listing, publish
from datarax_dist.request import ArrayWrite, SaveReport, SaveRequest
from datarax_dist.storage import (
    Entry,
    Store,
    SupportsRename,
    SupportsSweep,
    for_each,
    root_is_away,
)
from datarax_dist.telemetry import Phases
from datarax_dist.writers import writer_identity

__all__ = ["Saver", "StartedSave"]

logger = logging.getLogger("datarax_dist")

_HANGS_SECONDS = 10.0  # after the deadline
_TELLS_SECONDS = 15.0  # who has been cut off for longer is named by the others
_GONE = "is not there, or nothing of the run is"
_CANCEL_SECONDS = 5.0  # for the end of a write that nobody has begun yet


class Saver:
    """Begins saves of one run."""

    def __init__(
        self,
        store: Store,
        group: HostGroup,
        clock: Clock,
        options: Options,
        keep: KeepPolicy | None,
        lease: Right | None = None,
    ) -> None:
        self._store = store
        self.lease: Right = lease or Unguarded()
        self._is_taken = self._has_asked = False
        self._group = group
        self._clock = clock
        self._options = options
        self.keep = keep
        # What restores here have found damaged, or suspect: step -> what `is_as_judged` is told.
        # They may be saved again, and are none of the good ones that retention keeps.
        self.suspects: dict[int, str] = {}
        self.turn = 0  # counts saves
        # What this object writes to: staging directory -> all that such a save may write to. Of two
        # saves one is given up: see `check_turn`.
        self._under_way: dict[str, Sequence[str]] = {}
        self.has_swept = False
        self.claims: dict[str, bytes] = {}  # staging directory -> claim, of a save under way
        self._known = Known()
        self.newer: Sequence[int] = ()  # good steps above the one that was restored
        # What was read here first is what is saved to, or a job would begin anew where its file
        # system is not mounted. Not so for who takes the run for each save.
        self.keeps_to_a_run = True
        self._run: str | None = None  # that this job has read or taken; on the primary

    def learn(self, inspection: Inspection) -> None:
        """Takes in what the root holds, as far as a bucket need not be asked again. For the
        primary.

        Raises:
            StorageError: it holds nothing, and this job has written to it.
        """
        if self._is_taken and self._run is not None and inspection.run is None:
            raise root_is_away(self._store.root, _GONE)
        if self.keeps_to_a_run and self._run is None:
            self._run = inspection.run
        self._known = Known.of(inspection)

    def forget(self) -> None:
        """The root may hold something else than what was learnt."""
        self._known = Known()

    def take(self, step: int) -> None:
        """Takes the run for this job, in the first call. Collective. Later ones do nothing: whether
        hosts ask each other must not depend on how that ended, which may be known to some only.

        Args:
            step: what is not saved in this call.

        Raises:
            LeaseError: another job has it.
        """
        if self._has_asked:
            return
        self._has_asked = True
        with self._group.in_parts(f"save of step {step}") as operation:
            self._group.exchange(
                "lease",
                leader=lambda _: self.hold(),
                timeout_seconds=self.agreement_seconds(),
                within=operation,
            )
        self._is_taken = True

    def ask_anew(self) -> None:
        """Takes note that the run is let go: the next call takes it. Collective."""
        self._has_asked = False

    def let_go(self, lease: Right) -> None:
        """Takes note that the lease was given back, and which one will be held next."""
        self.lease, self._is_taken = lease, False
        self._run = None

    def agreement_seconds(self) -> float:
        """Returns how long hosts wait for each other, while the primary may wait for the run."""
        options = self._options
        patience = options.lease_wait_seconds + options.lease_ttl_seconds
        return options.exchange_timeout_seconds + (0.0 if self._is_taken else patience)

    def hold(self) -> None:
        """Takes the run, if it has not. On the primary."""
        if self._is_taken:
            return
        run = self._claim_run(self._store.children(""), self._run)
        self.lease.hold(run, self._fence)
        self._run = run
        self.forget()  # another job may have held it since a restore of this one has looked
        self._is_taken = True

    def _fence(
        self, run: str, older: Sequence[fmt.LeaseRecord], is_newest: Callable[[], bool]
    ) -> None:
        retention.fence(self._store, run, older, self._clock.now(), is_newest)

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

        Args:
            step: less than 0 when it is none, which `capture` says.
        """
        self._has_asked = True
        self.turn += 1
        turn = self.turn
        request: SaveRequest | None = None
        failure: BaseException | None = None
        payload: dict[str, Any] = {}
        overwrite, replace = replace, replace or step in self.suspects
        # A host that is interrupted while hosts agree does not know whether the others go on with
        # the save; it tells them here.
        operation = self._group.begin(
            f"save of step {step}",
            consequence=functools.partial(self._consequence, step, replace),
            is_any_call=step < 0,
        )
        try:
            with phases.span("capture"):
                request = capture()
            phases.reach("prepare")
            payload = {
                "step": request.step,
                "hosts": self._group.count,
                "agreement": dict(request.agreement),
                "digests": digests_told(request.local_digests, self._group.count),
                "positions": positions_told(request.counts, request.written, request.held),
                "unseen": previous_error is not None,
            }
        except BaseException as error:
            failure = error
        begin, mine = self._clock.monotonic(), list[str]()
        started: StartedSave | None = None
        try:
            with operation.failing("save:prepare"):
                decided = self._group.exchange(
                    "prepare",
                    payload,
                    error=failure,
                    leader=lambda payloads: {
                        **self._stage(payloads, phases, overwrite, mine),
                        "arrays": request and request.writer.choose(),
                    },
                    timeout_seconds=self.agreement_seconds(),
                    within=operation,
                )
                phases.seconds["prepare"] = self._clock.monotonic() - begin
                if decided.get("unseen") and previous_error is not None:
                    raise previous_error
                self._is_taken = True
                assert request is not None
                started = StartedSave(self, operation, request, decided, phases, turn)
                self.check_turn(turn, step)
            started.start()
            return started
        except BaseException as error:
            if started is not None:
                started.abandon(error)
            operation.close()
            for staging in mine:  # an earlier save may go on
                self.ended(staging)
            if started is None and not mine and turn == self.turn:
                self.turn -= 1  # it has disturbed no other one
            raise

    def check_turn(self, turn: int, step: int) -> None:
        """Raises when another save was made while one began: Orbax's writer is its own."""
        if turn != self.turn:
            raise InvalidArgumentError(
                f"Step {step} is not saved: before this save() had returned, another one of the"
                " same Checkpointer was called, in a signal handler or on another thread. Let a"
                " handler set a flag, and save where the training loop sees it."
            )

    def may_be_committed(self, phase: str) -> bool:
        """Whether a save that fails in a phase may have committed its step."""
        renames = isinstance(self._store, SupportsRename)
        late = "save:publish" if renames else "save:commit"
        # Who says what it has written, and hears no reply, does not know what becomes of it.
        return phase in ("", "save:written", late, "save:committed")

    def _consequence(self, step: int, replace: bool, phase: str) -> str:
        """Returns what has become of a step when its save fails in a phase."""
        if step < 0:
            return ""
        if self.may_be_committed(phase):
            return f"Step {step} may be committed or not; earlier steps are as they were."
        if replace:
            return f"Step {step} was not saved again: what it was is there still."
        return f"Step {step} was not committed; earlier steps are as they were."

    def ended(self, staging: str) -> None:
        """Nothing is written any more of a save."""
        names = set(self._under_way.pop(staging, ()))
        names = names.difference(*self._under_way.values())
        self.lease.under_way.difference_update(names)
        self.claims.pop(staging, None)

    def is_others(self, name: str) -> bool:
        """Whether another object of this process writes to it now."""
        ours = itertools.chain.from_iterable(list(self._under_way.values()))
        return name in self.lease.under_way and name not in ours

    def _stage(
        self, payloads: list[Any], phases: Phases, replace: bool, mine: list[str]
    ) -> dict[str, Any]:
        if all(payload["unseen"] for payload in payloads):
            return {"unseen": True}
        check_agreement(payloads)
        check_positions([payload["positions"] for payload in payloads])
        self.hold()
        self.lease.raise_if_lost()
        phases.reach("stage")
        step = int(payloads[0]["step"])
        nonce = secrets.token_hex(8)
        store, known = self._store, self._known
        staging = fmt.aside_name(step, "staging", nonce)
        aside = fmt.aside_name(step, "replaced", nonce)
        mine.append(staging)
        self._under_way[staging] = staging, fmt.step_name(step), aside
        self.lease.under_way.update(self._under_way[staging])
        decided: dict[str, Any] = {"staging": staging, "nonce": nonce, "claimed": False}
        decided["replace"] = replace
        if (
            not isinstance(store, SupportsRename)
            and known.run == self._run is not None
            and known.is_free(step)
        ):
            return {**decided, "run": known.run}
        there = store.children("")
        run = self._claim_run(there, self._run)
        try:
            check_free(store, run, step, there, lambda name: replace or self.is_suspect(step, name))
        except StepExistsError:
            self.lease.check()  # which would say more
            raise
        if isinstance(store, SupportsRename):
            retention.with_room(
                lambda: self.write_claim(run, step, nonce, len(payloads), staging),
                lambda: self.remove_leftovers(but=staging),
            )
            decided["claimed"] = True
        else:
            self._learn_names(run, there)
        return {**decided, "run": run}

    def write_claim(self, run: str, step: int, nonce: str, hosts: int, staging: str) -> None:
        """Writes `STEP.json`: from here on, what is in the directory is known as ours."""
        claim = fmt.dump_claim(
            fmt.StepClaim(run, step, nonce, hosts, writer_identity(), self._clock.now())
        )
        self.claims[staging] = claim
        self._store.put(f"{staging}/{fmt.STEP_NAME}", claim)

    def remove_leftovers(self, *, but: str = "") -> None:
        """Removes what earlier saves of the run left behind, `but` what is staged now. On the
        primary, which has taken it; all hosts have ended those saves: they agreed on something
        since.
        """
        assert self._run is not None
        run, store, known, now = self._run, self._store, self._known, self._clock.now()
        found: Sequence[retention.Leftover] = ()
        if isinstance(store, SupportsRename) or not known.tidy:
            committed = {step for step, is_one in known.steps.items() if is_one}
            found = retention.find_leftovers(
                store, run, known=committed, now=now, ended=writer_identity()
            )
        # Then nothing of it is what a job has staged that has taken the run since.
        self.lease.check()
        ours = {but, *self._under_way}
        leftovers = [o for o in found if o.name not in ours and not self.is_others(o.name)]
        removed = retention.remove_leftovers(store, leftovers, run=run, now=now)
        if isinstance(store, SupportsSweep) and not self.has_swept:
            self.has_swept = True
            with contextlib.suppress(StorageError):  # no reason for a save to fail
                for prefix in ("", fmt.LEASE_NAME):
                    store.sweep(prefix)
        known.tidy = len(removed) == len(leftovers)

    def _learn_names(self, run: str, names: Sequence[str]) -> None:
        """In a bucket: which steps have anything, so that later saves need not ask."""
        steps = [step_of(name) for name in names]
        there = {step: self._known.steps.get(step) for step in steps if step is not None}
        self._known = Known(run, there, tidy=self._known.tidy)

    def is_suspect(self, step: int, name: str) -> bool:
        """Whether a directory is still what a restore has found damaged, or suspect."""
        judged = self.suspects.get(step)
        return judged is not None and is_as_judged(self._store, step, name, judged)

    def _claim_run(self, there: Sequence[str], known: str | None) -> str:
        """Returns the run of the root, in which `there` is; makes one in a new root.

        Args:
            known: the run that this job has read or written here. It must not begin anew in the
                directory on which its file system was mounted.
        """
        store = self._store
        refuse_a_step(store, there)
        run = find_run(store) if there else None
        if known is not None and run != known:
            what = _GONE if run is None else "holds another run"
            raise root_is_away(store.root, what)
        if run is not None and fmt.RUN_NAME in there:
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


class StartedSave:
    """A save whose background part is to be run, by `finish`, on the worker thread."""

    def __init__(
        self,
        saver: Saver,
        operation: Operation,
        request: SaveRequest,
        decided: Mapping[str, Any],
        phases: Phases,
        turn: int,
    ) -> None:
        self.turn = turn
        self._replace: bool = decided["replace"]
        self.step = request.step
        self.run: str = decided["run"]
        self.phases = phases
        self._saver = saver
        self._keep = saver.keep
        self._store = saver._store
        self._group = saver._group
        self.operation = operation
        self._request = request
        self._staging: str = decided["staging"]
        self._nonce: str = decided["nonce"]
        self._claimed: bool = decided["claimed"]
        self._choice = decided["arrays"]
        self._write: ArrayWrite | None = None
        self._failure: BaseException | None = None
        self._deadline = saver._clock.monotonic() + saver._options.save_timeout_seconds
        self._aside = False

    def start(self) -> None:
        """Step 3. A failure is kept for `finish`, so that the handles of all hosts end alike."""
        try:
            with self.phases.span("start"):
                self._write = self._request.writer.start(
                    self._staging, self._all_written, self._choice
                )
            self.phases.reach("started")
        except BaseException as error:
            self._failure = error
            self.operation.fail(self.phases.current, error)
            if not isinstance(error, Exception):
                raise

    def fail(self, error: BaseException) -> None:
        """Fails the save, for something that keeps this host from going on with it."""
        self._failure = error
        self.operation.fail(self.phases.current, error)

    def abandon(self, error: BaseException) -> None:
        """Fails the save instead of `finish`, which nobody will call."""
        with contextlib.ExitStack() as then:  # all of it, though Ctrl-C may come once more
            then.callback(self.let_go)
            then.callback(self._saver.forget)
            then.callback(self._saver.ended, self._staging)
            then.callback(self._end_write, _CANCEL_SECONDS)
            self.fail(error)

    def let_go(self) -> None:
        """Ends: nobody asks for anything any more. An error's traceback may keep this object, which
        must not keep the arrays, on their devices.
        """
        self.operation.close()
        self._write = None
        del self._request

    def _all_written(self) -> None:
        self.phases.reach("arrays")
        self.operation.contribute("arrays", None)
        if self._group.is_primary:
            self.operation.gather("arrays", self._deadline)

    def outcome(self) -> Any:
        """Step 9: waits for the decision."""
        return self.operation.result("written", self._deadline, own=self._failure)

    def watch(self) -> SaveReport:
        """Waits for the decision, wherever this host's own work is, and though it may hang. On a
        thread of its own.
        """
        late = self._late if self._group.is_primary else None
        return self._report(
            self.operation.result("written", self._deadline, own=self._failure, late=late)
        )

    def tell(self) -> None:
        """Says why it has failed, if that could not be said yet."""
        self._group.tell(min(_TELLS_SECONDS, self.seconds_left()))

    def _report(self, decided: Mapping[str, Any], deleted: Sequence[int] = ()) -> SaveReport:
        seconds = dict(self.phases.seconds)
        return SaveReport(self.step, int(decided["bytes"]), seconds, tuple(deleted))

    def _late(self) -> tuple[str, BaseException]:
        phase = self.phases.current
        name = "" if self._group.count == 1 else f" on host {self._group.index}"
        error = StorageError(
            f"the save of step {self.step} has not ended at its deadline of"
            f" {self._saver._options.save_timeout_seconds:.0f} s;{name} it waits in phase"
            f" {phase!r}. Does the storage hang, or is it slow? Options.save_timeout_seconds sets"
            " the deadline.",
            errno=errno.ETIMEDOUT,
        )
        if self._group.count == 1:
            error = StorageError(
                f"{error} {self.operation.consequence(phase)}", errno=errno.ETIMEDOUT
            )
        return phase, error

    def hangs(self, more_seconds: float = 0.0) -> str | None:
        """Returns where this host's work is, though the save should have ended a while ago."""
        late = self._saver._clock.monotonic() - self._deadline
        return self.phases.current if late > _HANGS_SECONDS + more_seconds else None

    def finish(self) -> SaveReport:
        """Steps 4 to 10. Returns when this host has nothing more to do for the save; raises what
        failed it.
        """
        try:
            self._work()
        except PeerError as error:
            logger.debug("step %d: stopped, as the save has failed: %s", self.step, describe(error))
            if is_unheard(error):
                self.operation.fail(self.phases.current, error)
        except BaseException as error:
            self._failure = self._failure or error
            self.operation.fail(self.phases.current, error)
            if not isinstance(error, Exception):
                raise
        finally:
            self._end_write(float("inf"))
            self._saver.ended(self._staging)
        try:
            decided = self.outcome()
        except BaseException:
            self._saver.forget()
            raise
        self._saver.suspects.pop(self.step, None)
        if self._group.is_primary:
            self._saver._known.steps[self.step] = True
            good = {*self._saver.newer, *(n for n, ok in self._saver._known.steps.items() if ok)}
            newest = max(good - self._saver.suspects.keys())
            if newest > self.step and self._keep is None:
                retention.tell_of_newer(self._store.root, newest)
        # What retention deletes may take as long again.
        self._deadline = self._saver._clock.monotonic() + self._saver._options.save_timeout_seconds
        return self._report(decided, self._retire() if self._group.is_primary else [])

    def _retire(self) -> Sequence[int]:
        """Step 10. The step is committed: nothing that goes wrong here may fail the save."""
        renames, now = isinstance(self._store, SupportsRename), self._saver._clock.now()
        if self._keep is None and not self._aside and renames:
            return []
        with self.phases.span("retention"):
            try:
                if not renames:  # what was staged was copied
                    self._store.delete(self._staging, last=fmt.STEP_NAME)
                names = self._store.children("")
                own = fmt.aside_name(self.step, "replaced", self._nonce)
                retention.delete_replaced(self._store, self.step, own, names, now)
                suspects = {
                    step
                    for name in names
                    if (step := step_of(name)) is not None
                    and self._saver.is_suspect(step, name[:-1])
                }
                good = sorted(set(self._saver._known.committed(self._store, names)) - suspects)
                steps = retention.plan_retention(good, self._keep, saved=self.step)
                if good and good[-1] > self.step:
                    retention.tell_of_newer(self._store.root, good[-1])
            except Exception as error:
                told = describe(error)
                logger.warning("retention of %s: %s. It is tried again.", self._store.root, told)
                self._saver._known.tidy = False
                return []
            deleted = retention.retire(
                self._store,
                steps,
                now=now,
                lease=self._saver.lease,
                reached=self.phases.reach,
            )
            for step in deleted:
                self._saver._known.steps.pop(step, None)
            return deleted

    def _end_write(self, most_seconds: float) -> None:
        """A write that has begun must have ended before the next save removes what it has made."""
        if self._write is not None:
            with contextlib.suppress(Exception):  # whatever it is, it is too late to matter
                self._write.cancel()
                self._write.wait(min(most_seconds, self.seconds_left()))
            self._write = None

    def seconds_left(self) -> float:
        """Returns how long it is until the deadline."""
        return max(0.0, self._deadline - self._saver._clock.monotonic())

    def _work(self) -> None:
        if self._failure is not None:
            return
        try:
            self._write_and_commit()
        except Exception as error:
            self._raise_if_taken(error)
            if isinstance(error, KeyError):  # what was there a moment ago
                name = str(error.args[0]).removeprefix(f"{self._store.root}/")
                raise StorageError(
                    f"{self._store.root}/{name} is not there any more: another job has"
                    " removed what this one has staged. Only one job at a time may write to a run."
                ) from error
            raise

    def _raise_if_taken(self, error: Exception) -> None:
        """Raises `LeaseError` when it is no wonder that something is missing."""
        if self._group.is_primary and not isinstance(error, PeerError):
            with contextlib.suppress(StorageError):
                self._saver.lease.check()

    def _write_and_commit(self) -> None:
        if not self._claimed:
            with self.phases.span("claim"):
                self._claim()
        if self._group.is_primary:
            with self.phases.span("tidy"):
                self._saver.remove_leftovers(but=self._staging)
        if self._write is not None:
            self._write.release()
        with self.phases.span("positions"):
            contents = dict(self._request.positions)
            if self._group.is_primary:
                contents.update(self._request.shared)
            prefix = self._staging
            for_each(
                self._store,
                lambda item: self._store.put(f"{prefix}/{item[0]}", item[1]),
                contents.items(),
            )
        known: Mapping[str, tuple[int, str]] = {}
        notes: Mapping[str, str] = {}
        with self.phases.span("wait_arrays"):
            if self._write is None:  # no arrays
                self._all_written()
            else:
                # The primary may wait in it for others, and says at the deadline for whom.
                waits = self._group.is_primary and self._group.count > 1
                self._write.wait(self.seconds_left() + (2.0 if waits else 0.0))
                known, notes = self._write.digests(), self._write.notes()
            self._write = None
        self.operation.check("hash")
        with self.phases.span("hash"):
            if self._group.is_primary:
                contents |= {fmt.STEP_NAME: self._saver.claims[self._staging], **self._request.last}
            files = self._hash(contents, known)
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
                    notes,
                )
            )
            self._store.put(f"{self._staging}/{name}", record)
        self.phases.reach("written")
        row = [name, len(record), fmt.digest(record, self._store.digest_kind)]
        staged = [entry for entry in files if entry.path not in self._request.last]
        self.operation.contribute("written", [*row, f"{self._tally(staged):x}"])
        if self._group.is_primary:
            rows = self.operation.gather("written", self._deadline)
            records = [fmt.FileEntry(*row[:3]) for row in rows]
            expected = sum(int(row[3], 16) for row in rows) + self._tally(records)
            marker = self._commit(records, expected % fmt.TALLY_MODULUS)
            self.operation.succeed({"bytes": marker.bytes})

    def _tally(self, files: Iterable[fmt.FileEntry]) -> int:
        """What stands for files; for their digests, too, where a listing has these."""
        return fmt.tally(files, digests=not isinstance(self._store, SupportsRename))

    def _claim(self) -> None:
        """In a bucket: the primary claims the step, and no host writes before."""
        if self._group.is_primary:
            self._saver.write_claim(
                self.run, self.step, self._nonce, self._group.count, self._staging
            )
            self.operation.contribute("claim", None)
        else:
            self.operation.await_primary("claim", self._deadline)

    def _hash(
        self, own: Mapping[str, bytes], known: Mapping[str, tuple[int, str]]
    ) -> list[fmt.FileEntry]:
        """Step 6: everything that this host wrote. What no host's name is on, the primary answers
        for.

        Args:
            own: what this module has written: key -> content.
            known: sizes and digests that were computed while files were written.
        """
        prefix, host, writer = f"{self._staging}/", self._group.index, self._request.writer
        store, kind = self._store, self._store.digest_kind
        entries = {
            key: fmt.FileEntry(key, len(content), fmt.digest(content, kind))
            for key, content in own.items()
        }
        # What is recorded is what was written, be it there or not: the listing will tell.
        entries |= {key: fmt.FileEntry(key, *found) for key, found in known.items()}
        unread: list[Entry] = []

        def children(part: str) -> Sequence[str]:
            return store.children(f"{prefix}{part}".rstrip("/"))

        for part in writer.parts(host, children):
            for entry in store.list(f"{prefix}{part}".rstrip("/")):
                key = entry.key.removeprefix(prefix)
                if (
                    key in own
                    or key == fmt.COMMIT_NAME
                    or key.startswith(("data/", "hosts/"))
                    or not writer.owns(key, host)
                ):
                    continue
                if key in known:
                    continue
                if entry.digest:  # the bucket's own, of what it has
                    entries[key] = fmt.FileEntry(key, entry.size, entry.digest)
                else:
                    unread.append(entry)
        unread.sort(key=lambda entry: -entry.size)
        for entry, found in zip(
            unread, for_each(store, lambda entry: store.digest(entry.key), unread), strict=True
        ):
            key = entry.key.removeprefix(prefix)
            entries[key] = fmt.FileEntry(key, *found)
        written = [key for key in entries if key not in self._request.last]
        store.sync(self._staging, sorted(f"{prefix}{key}" for key in written))
        return [entries[key] for key in sorted(entries)]

    def _commit(self, records: Sequence[fmt.FileEntry], expected: int) -> fmt.CommitMarker:
        """Step 8, on the primary.

        Args:
            expected: the tally of everything that the hosts have staged.
        """
        store, staging = self._store, self._staging
        with self.phases.span("verify"):
            written = self._listed(expected) or self._recorded(records)
            if missing := [path for path in self._request.needed if path not in written]:
                raise StorageError(
                    f"Step {self.step} is not committed: its arrays were said to be written, and"
                    f" {', '.join(missing)} is not there. Look at the log for errors of Orbax."
                )
            kind = store.digest_kind
            written |= {
                path: fmt.FileEntry(path, len(content), fmt.digest(content, kind))
                for path, content in self._request.last.items()
            }
            marker = fmt.CommitMarker(
                run=self.run,
                step=self.step,
                epoch=self._saver.lease.epoch,
                nonce=self._nonce,
                hosts=self._group.count,
                records=tuple(records),
                bytes=sum(entry.size for entry in written.values()),
                items=tuple(self._request.items),
                committed_at=self._saver._clock.now(),
                versions=self._request.versions,
            )
            staged = Staged(
                self.run,
                self.step,
                self._nonce,
                staging,
                claim=self._saver.claims[self._staging],
                marker=fmt.dump_marker(marker),
                files=written,
                last=self._request.last,
                may_replace=lambda name: self._replace or self._saver.is_suspect(self.step, name),
            )
        self._publish(staged)
        self.phases.reach("committed")
        logger.info(
            "committed step %d of %s (%d bytes, %d hosts)",
            self.step,
            store.root,
            marker.bytes,
            marker.hosts,
        )
        return marker

    def _listed(self, expected: int) -> dict[str, fmt.FileEntry]:
        """Returns what is staged, by path, if it is what the hosts have written; else nothing."""
        prefix = f"{self._staging}/"
        listing = self._store.list(self._staging)
        files = {
            (path := entry.key.removeprefix(prefix)): fmt.FileEntry(path, entry.size, entry.digest)
            for entry in listing
            if not entry.irregular
        }
        whole = len(files) == len(listing) and self._tally(files.values()) == expected
        return files if whole else {}

    def _recorded(self, records: Sequence[fmt.FileEntry]) -> dict[str, fmt.FileEntry]:
        """Returns what the records name, and the records. Many reads, where a listing does not say
        the same.

        Raises:
            StorageError: it is not what is staged; the files are named.
        """
        store, staging = self._store, self._staging
        try:
            files = read_records(store, staging, records, self.run, self.step)
        except CorruptStepError as error:
            raise StorageError(
                f"Step {self.step} is not committed: of what the hosts say they have written to"
                f" {store.root}/{staging}, host 0 does not find {', '.join(error.files[:10])}."
                " Is this one file system, shared by all hosts? Has another job removed it?"
            ) from error
        last = self._request.last
        written = {entry.path: entry for entry in (*files, *records) if entry.path not in last}
        check_listing(store, staging, Staged(self.run, self.step, self._nonce, staging, written))
        return written

    def _publish(self, staged: Staged) -> None:
        def check() -> None:
            self.operation.check("commit")
            self._saver.lease.check()
            if self.seconds_left() <= 0:
                raise StorageError(
                    f"Step {self.step} is not committed: its save has not ended at its deadline. Is"
                    " the storage slow? Options.save_timeout_seconds sets the deadline.",
                    errno=errno.ETIMEDOUT,
                )

        now = self._saver._clock.now()
        try:
            self._aside = publish(self._store, staged, now, self.phases, check)
        except StorageError as error:
            # What travels to other hosts says what has become of the step; this does not.
            phase = self.phases.current
            if self._group.count > 1 or not self._saver.may_be_committed(phase):
                raise
            told = f"{error} {self.operation.consequence(phase)}"
            raise StorageError(told, errno=error.errno) from error

    def clean_up(self) -> None:
        """Removes what a failed save of a single host has staged. With more hosts the next save
        does: another host may be writing still.
        """
        if self._group.count > 1:
            return
        left = retention.Leftover(self._staging, self.step, True)
        try:
            if self._store.children(self._staging):
                retention.remove_leftovers(self._store, [left])
        except StorageError as error:
            told = describe(error)
            logger.warning("could not remove what step %d has staged: %s", self.step, told)
