"""The restore protocol, over the ports: no jax, no orbax.

1. list     The primary reads the root and proposes candidates, newest first; what it refuses, it
             says why. No other host lists. Before a candidate is tried, the primary notes that in
             the root, and strikes it out when the process that tried has survived (`attempts`): a
             step whose restore crashed the job twice is not proposed any more.
2. verify   Each host verifies its share of the candidate's files at the chosen level; all take the
             newest that all accept. On a file system the content of the array files waits for the
             next phase, so that it is read once.
3. load     Each host loads, and verifies what it reads; then what of its share is left. What fails
             is exchanged, never raised on one host alone. Damage moves on to the next candidate.
4. gather   Where hosts have read parts of what all of them need, their devices pass these on
             (`gathers`).
5. positions Applied only when every host has loaded and decoded; an error on one host is an error
             on all.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datarax_dist import errors, retention
from datarax_dist import format as fmt
from datarax_dist.attempts import Trial, mark_suspects
from datarax_dist.clock import Clock, SystemClock
from datarax_dist.config import Options
from datarax_dist.errors import (
    CorruptStepError,
    FormatVersionError,
    InvalidArgumentError,
    PeerLostError,
    StorageError,
    printable,
)
from datarax_dist.gathers import GATHER, Gathering, Together
from datarax_dist.hosts import HostGroup, Operation
from datarax_dist.inspection import (
    Candidate,
    Inspection,
    files_to_verify,
    find_irregular,
    has_moved,
    inspect_run,
    inspection_from_json,
    inspection_to_json,
    no_such_step,
    others_of_orbax,
    read_marker,
    records_verified_by,
    verify_files,
)
from datarax_dist.storage import Store, SupportsRename
from datarax_dist.telemetry import Phases

__all__ = ["Loading", "RestoreReport", "Restorer"]

logger = logging.getLogger("datarax_dist")

_TRIES = 20
_FEW_HOSTS = 64  # that have written a step: what they wrote is listed in a request or two
_MOST_TOLD = 100  # damaged files that one host tells the others of
# How the errors of arrays that fail their own checks begin, before any name that is not ours: with
# a status of TensorStore, or with what its decoders say. And how findings of ours end.
_OWN_CHECK = re.compile(r"(?:Could not \w+ the arrays: \w+: )?(?:DATA_LOSS: |Error decoding )")
_OUR_FINDINGS = ("the checksum of a chunk is wrong", "its content has changed (checksum)")
_OUR_SEAL = re.compile(r": checksum mismatch \(stored .*, computed [0-9a-f]{8}\)\Z", re.DOTALL)


class Loading:
    """What is agreed with a loader while it loads.

    Attributes:
        gathers: what all hosts are to do together when each has loaded, in words that are the same
            on every host; empty for nothing.
        alike: a digest of what each host had for itself, and becomes an array of all of them; empty
            for nothing.
    """

    def __init__(self, entries: Sequence[fmt.FileEntry] = ()) -> None:
        self._entries = {entry.path: entry for entry in entries}
        self.gathers = self.alike = ""
        self.gather: Callable[[Together], None] = lambda together: None

    def take(self) -> list[fmt.FileEntry]:
        """Returns the array files of the step whose content this host has still to verify; who
        takes them verifies them, or raises.
        """
        taken, self._entries = list(self._entries.values()), {}
        return taken

    def gather_later(self, what: str, gather: Callable[[Together], None]) -> None:
        """Has `gather` called, on a thread of its own, when every host has loaded the step, and
        before anything is applied. It is given what each computation of all hosts' devices is to be
        made within: entering it waits until the others are ready for that computation, too.
        """
        self.gathers, self.gather = what, gather


# Reads and decodes this host's part of a candidate, changes nothing, and returns what applies it.
Loader = Callable[[Candidate, Loading], Callable[[], Any]]


_OTHERS = (
    "%s has no step, but what plain Orbax wrote (%s), which is not restored: steps have plain"
    " numbers for names here. Rename them so, or give the directory above as the root; or use"
    " another root, to begin anew."
)


def leaves_text(names: Sequence[str]) -> str:
    """Returns how many leaves of a state these are, and the first ones."""
    shown = printable(", ".join(names[:5]))
    count = "a leaf" if len(names) == 1 else f"{len(names)} leaves"
    return f"{count} of the state: {shown}{', ...' if len(names) > 5 else ''}"


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """How a restore went.

    Attributes:
        step: the step that was restored.
        refused: step -> why it was not taken, for everything newer (and everything that is no step
            at all).
        verified: what was checked: "marker", "sizes", "full", or "nothing" for a directory of plain
            Orbax.
        hosts_before, hosts_now: numbers of hosts.
        seconds: for each phase, on this host.
        removed: leftovers that were removed (known on the primary).
        damaged: steps that were found damaged. They stay as they are; they may be saved again.
        suspects: other steps whose restore crashed the job twice. They stay, too, and may be saved
            again.
        data_changes: what differs between the data pipelines then and now, and was allowed: name ->
            (saved, now).
        data_left: data items of the step whose positions were not asked for.
        state_left: leaves of its state that were not asked for, by their paths.
    """

    step: int
    refused: Mapping[str, str]
    verified: str
    hosts_before: int
    hosts_now: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    removed: Sequence[str] = ()
    damaged: Sequence[int] = ()
    suspects: Sequence[int] = ()
    data_changes: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    data_left: Sequence[str] = ()
    state_left: Sequence[str] = ()

    def __str__(self) -> str:
        before = f"{self.hosts_before or 'an unknown number of'} {_hosts(self.hosts_before)}"
        lines = [
            f"restored step {self.step} (verified: {self.verified}; saved by {before},"
            f" {self.hosts_now} now)"
        ]
        lines += [printable(f"  not {name}: {reason}") for name, reason in self.refused.items()]
        lines += [
            f"  changed, as allowed: {name} was {then!r}, is {now!r}"
            for name, (then, now) in self.data_changes.items()
        ]
        lines += [f"  not asked for: the position of {name!r}" for name in self.data_left]
        if self.state_left:
            lines.append(f"  not asked for: {leaves_text(self.state_left)}")
        return "\n".join(lines)


def _hosts(count: int) -> str:
    return "host" if count == 1 else "hosts"


class Restorer:
    """Restores steps of one run. Collective."""

    def __init__(
        self,
        store: Store,
        group: HostGroup,
        options: Options,
        clock: Clock | None = None,
        *,
        seen: Callable[[Inspection], None] = lambda inspection: None,
    ) -> None:
        self._store = store
        self._group = group
        self._options = options
        self._clock = clock or SystemClock()
        self._seen = seen  # told of what the primary has found in the root
        self._trial = Trial(
            store,
            self._clock,
            group.count,
            options.restore_timeout_seconds + options.exchange_timeout_seconds,
        )
        self._attempts: Sequence[str] = ()  # those of others, as the primary has seen them
        self._others: Sequence[str] = ()  # directories that are not ours, as the primary has
        self._operation: Operation | None = None  # the restore that is under way
        self._refused: Mapping[str, str] = {}
        self._is_unknown = False  # nothing says that a run is there
        self._loads = True
        # What the last restore has found damaged, or suspect: step -> the digest of its marker,
        # empty where that could not be read, or its records were damaged.
        self.judged: Mapping[int, str] = {}
        self.has_applied = False  # whether what is restored is being put into its place
        self.newer: Sequence[int] = ()  # committed steps above the one that was restored

    def why_nothing(self) -> str:
        """Returns what directories there are that were not taken, and why, by the last restore, if
        that has found nothing: a line for each, each with a line feed before it. For an error.
        """
        unknown = " Nothing of a run is there: is it the right path?" if self._is_unknown else ""
        return _lines(self._refused) or unknown

    def inspect(self) -> Inspection:
        """Returns the primary's view of the root, on every host."""
        return self._inspect("look", None, self._list)

    def _exchange(self, phase: str, payload: Any = None, **more: Any) -> Any:
        return self._group.exchange(phase, payload, within=self._operation, **more)

    def _inspect(
        self,
        phase: str,
        step: int | None,
        leader: Callable[[Sequence[Any]], dict[str, Any]],
        refused: BaseException | None = None,
        wants: str = "",
    ) -> Inspection:
        body = self._exchange(
            phase,
            [self._store.root, step, wants],
            error=refused,
            leader=leader,
            timeout_seconds=self._options.exchange_timeout_seconds,
        )
        return inspection_from_json(body)

    def _propose(self, asked: Sequence[Any]) -> dict[str, Any]:
        """Lists, and notes what is tried first: no host begins with it before."""
        body = self._list(asked)
        inspection, step = inspection_from_json(body), asked[0][1]
        for candidate in inspection.candidates:
            if candidate.suspect and step is None:
                logger.warning(
                    "step %d of %s is %s", candidate.step, self._store.root, candidate.suspect
                )
        candidates, _ = self._choose(inspection, step)
        self._begin(inspection, candidates)
        return body

    def _begin(self, inspection: Inspection, candidates: Sequence[Candidate]) -> None:
        """Notes that the first of some candidates is tried. For the primary."""
        self._trial.end()
        if not self._loads or inspection.run is None or not candidates:
            return
        if candidates[0].state == "committed":
            self._trial.begin(inspection.run, candidates[0], self._attempts)

    def _list(self, asked: Sequence[Any]) -> dict[str, Any]:
        for host, (root, step, wants) in enumerate(asked):
            if root != asked[0][0]:
                raise InvalidArgumentError(
                    f"Host {host} opened {root!r}, host 0 {asked[0][0]!r}: the root must be the"
                    " same on all."
                )
            if step != asked[0][1]:
                raise InvalidArgumentError(
                    f"Host {host} asks for step {step}, host 0 for {asked[0][1]}: every host must"
                    " restore the same one. Nothing was changed."
                )
            if wants != asked[0][2]:
                raise InvalidArgumentError(
                    f"Host {host} has {wants}; host 0 has {asked[0][2]}. Every host must give"
                    " restore() the same ones. Nothing was changed."
                )
        inspection = mark_suspects(self._store, inspect_run(self._store), self._clock.now())
        self._attempts, self._others = inspection.attempts, inspection.others
        self._seen(inspection)
        return inspection_to_json(inspection)

    def restore(
        self,
        step: int | None,
        load: Loader,
        phases: Phases,
        *,
        refused: BaseException | None = None,
        loads: bool = True,
        wants: str = "",
    ) -> tuple[Any, RestoreReport] | None:
        """Restores the newest good step, or `step`.

        Args:
            load: reads and decodes this host's part of a candidate, and returns what applies it. It
                must change nothing itself. What it does not take of the files that are still to be
                verified is verified when it has returned.
                An error of the tree other than damage (a target that does not fit, say) ends the
                restore on every host.
            refused: why this host cannot take part. It is raised on every host.
            loads: whether `load` reads arrays or positions, which may crash the job. Where it does
                not, the step is not noted as tried, nor as restored; and of a `step` that is asked
                for the arrays are not read to verify them.
            wants: what is restored, in words. It must be the same on every host.

        Returns:
            What the function that `load` returned has returned, with the report; None when there is
            nothing to restore (`why_nothing`).

        Raises:
            StepNotFoundError: `step` was asked for and is not there.
            CorruptStepError: it is damaged, or every committed step is damaged or suspect; or, on a
                file system, every step has lost its marker.
        """
        self._refused, self._is_unknown = {}, False
        self.judged, self._loads = {}, loads
        try:
            with self._group.in_parts("restore") as self._operation:
                for _ in range(_TRIES):
                    try:
                        with phases.span("list"):
                            inspection = self._inspect("list", step, self._propose, refused, wants)
                        return self._restore(inspection, step, load, phases)
                    except _MovedError:
                        logger.info(
                            "%s changes while it is read; reading it again", self._store.root
                        )
                    except PeerLostError:
                        self._trial.leave()
                        raise
                    finally:
                        self._trial.end()
        finally:
            self._operation = None
        raise StorageError(
            f"{self._store.root} changed {_TRIES} times while it was read. Is a job saving and"
            " deleting steps faster than they can be read?",
            errno=None,
        )

    def _restore(
        self,
        inspection: Inspection,
        step: int | None,
        load: Loader,
        phases: Phases,
    ) -> tuple[Any, RestoreReport] | None:
        candidates, refused = self._choose(inspection, step)
        damage: dict[int, Sequence[str]] = {
            c.step: c.files for c in inspection.candidates if c.state == "damaged"
        }
        suspects = [c for c in reversed(inspection.candidates) if c.suspect]
        judged = {c.step: c.digest for c in inspection.candidates if c.step in damage}
        judged |= {c.step: c.digest for c in suspects}
        self.judged = judged
        for place, told in enumerate(candidates):
            level = self._options.verify_on_restore
            if not self._loads and step is not None and level == "full":
                level = "sizes"
            candidate, bad, unverified = self._verify(told, phases, level)
            applied: Any = None
            if not bad:
                bad, applied = self._load(candidate, load, unverified, phases)
            if bad and candidate.state == "committed":
                self._go_on(inspection, candidates[place:])
            if not bad:
                if self._group.is_primary and inspection.run is not None:
                    self._trial.succeed(inspection.run, candidate.step, self._attempts)
                judged.pop(candidate.step, None)
                self.newer = [other for other in inspection.committed if other > candidate.step]
                removed = self._tidy(inspection)
                report = RestoreReport(
                    step=candidate.step,
                    refused=refused,
                    verified=("nothing" if candidate.state == "foreign" else level),
                    hosts_before=candidate.marker.hosts if candidate.marker else 0,
                    hosts_now=self._group.count,
                    seconds=dict(phases.seconds),
                    removed=tuple(removed),
                    damaged=tuple(sorted(damage)),
                    suspects=tuple(c.step for c in suspects if c.step != candidate.step),
                )
                odd = [
                    c
                    for c in inspection.candidates
                    if _label(c) in refused and (c.state != "foreign" or c.step > candidate.step)
                ]  # a run that has grown from one of Orbax has its old steps
                log = logger.warning if odd or candidate.state == "foreign" else logger.info
                log("%s: %s", self._store.root, report)
                return applied, report
            told_of = [f"{path}: {reason}" for path, reason in list(bad.items())[:5]]
            files = printable("; ".join(told_of))  # names of a listing may be anything
            refused[f"step {candidate.step}"] = f"damaged: {files}"
            damage[candidate.step] = list(bad)
            judged[candidate.step] = candidate.digest
            logger.warning("step %d of %s is damaged: %s", candidate.step, self._store.root, files)
        if suspects and step is None:
            # Not None, which would make a job begin anew.
            newest = suspects[-1].step
            raise CorruptStepError(
                f"No step of {self._store.root} is restored, and nothing was changed: every"
                f" committed one is suspect, or damaged.{_lines(refused)}\nFind out what ended"
                " those restores (too little memory, say; the logs of the jobs may tell). Then"
                f" restore(step={newest}) tries one all the same, and a success clears it.",
                step=newest,
                files=[],
            )
        if damage and (step is None or step in damage):
            newest = max(damage) if step is None else step
            which = f"Step {newest}" if step is not None else "Every committed step"
            raise CorruptStepError(
                f"{which} of {self._store.root} is damaged: {_lines(refused)}\nRestore"
                f" {'another step, or ' if step is not None else ''}a copy of the run.",
                step=newest,
                files=list(damage[newest]),
            )
        newer = [c for c in inspection.candidates if c.version and step in (None, c.step)]
        if newer:
            raise FormatVersionError(
                f"{self._store.root} has steps of a newer format only: {newer[0].reason}",
                found=newer[0].version,
                supported=fmt.FORMAT_VERSION,
            )
        if step is not None:
            raise no_such_step(self._store.root, step, inspection, _lines(refused))
        self._tell_nothing(inspection, refused)
        return None

    def _tell_nothing(self, inspection: Inspection, refused: Mapping[str, str]) -> None:
        """Tells what there is where no step is.

        Raises:
            CorruptStepError: there were steps. Where directories are renamed, a step has its marker
                before it has its name.
        """
        self._refused, self._is_unknown = dict(refused), inspection.run is None
        numbered = [c for c in inspection.candidates if c.name == fmt.step_name(c.step)]
        if (lost := inspection.unmarked) and isinstance(self._store, SupportsRename):
            # Not None, which would make a job begin anew.
            raise CorruptStepError(
                f"No step of {self._store.root} is restored, and nothing was changed: there are"
                f" steps, and each has lost its {fmt.COMMIT_NAME}, which no crash of a job does."
                f"{_lines(refused)}\nWas the run copied, and not all of it? Restore a copy that is"
                " whole; or move these directories away, to begin anew.",
                step=max(lost),
                files=[fmt.COMMIT_NAME],
            )
        # What saves and deletions leave that did not end is in every run whose job was killed.
        if self._group.is_primary and (others := others_of_orbax(self._store, self._others)):
            logger.warning(_OTHERS, self._store.root, others)
        odd = {_label(c) for c in numbered if c.state == "refused"}
        for log, names in ((logger.warning, odd), (logger.info, refused.keys() - odd)):
            if told := {name: why for name, why in refused.items() if name in names}:
                log("%s has no committed step. What there is:%s", self._store.root, _lines(told))

    def _choose(
        self, inspection: Inspection, step: int | None
    ) -> tuple[list[Candidate], dict[str, str]]:
        refused = {}
        for candidate in inspection.candidates:
            if candidate.state == "void":
                continue
            # Who asks for a step by its number gets it tried.
            reason = candidate.reason or (candidate.suspect if step is None else "")
            if reason and (step is None or candidate.step == step):
                refused[_label(candidate)] = reason
        chosen = [
            c for c in inspection.candidates if c.state == "committed" and step in (None, c.step)
        ]
        foreign = [
            c for c in inspection.candidates if c.state == "foreign" and step in (None, c.step)
        ]
        damaged = any(
            c.state == "damaged" and step in (None, c.step) for c in inspection.candidates
        )
        if not chosen and foreign and not damaged:
            # A directory that plain Orbax wrote: a user who moves here expects to go on from it.
            for candidate in foreign:
                refused.pop(f"step {candidate.step}", None)
            return foreign, refused
        return [c for c in chosen if step is not None or not c.suspect], refused

    def _stop_if_moved(
        self, candidate: Candidate, otherwise: Callable[[], None] | None = None
    ) -> None:
        """Raises on every host when a job that is saving has deleted or replaced a candidate: then
        it is not damaged.

        Args:
            otherwise: what the primary does when nobody has, before any host goes on.
        """

        def look(_: Sequence[Any]) -> bool:
            moved = has_moved(self._store, candidate)
            if not moved and otherwise is not None:
                otherwise()
            return moved

        moved = self._exchange(
            "moved",
            None,
            leader=look,
            timeout_seconds=self._options.exchange_timeout_seconds,
        )
        if moved:
            raise _MovedError

    def _stop_if_away(self, candidate: Candidate) -> None:
        """The same, before a second look at what had something wrong."""
        if candidate.state == "committed":
            self._stop_if_moved(candidate)

    def _go_on(self, inspection: Inspection, candidates: Sequence[Candidate]) -> None:
        """From the first candidate, which is damaged, to the next one, if there is one."""
        self._stop_if_moved(candidates[0], lambda: self._begin(inspection, candidates[1:]))

    def _verify(
        self, candidate: Candidate, phases: Phases, level: str, *, read_all: bool = False
    ) -> tuple[Candidate, dict[str, str], list[fmt.FileEntry]]:
        """Returns the candidate with its marker, what is wrong with it on any host, and the files
        whose content this host has still to verify.

        On a file system what is wrong is so twice: a job that has lost the run, and stood still,
        may have moved the step away for a moment.

        Args:
            read_all: leave nothing for later, and read what a bucket's listing tells a digest of,
                too.
        """
        found = self._verify_once(candidate, phases, level, read_all)
        if found[1] and isinstance(self._store, SupportsRename):
            self._stop_if_away(candidate)
            found = self._verify_once(candidate, phases, level, read_all)
        return found

    def _verify_once(
        self, candidate: Candidate, phases: Phases, level: str, read_all: bool
    ) -> tuple[Candidate, dict[str, str], list[fmt.FileEntry]]:
        with phases.span("verify"):
            wrong: dict[str, str] = {}
            failure: BaseException | None = None
            found: dict[str, str] = {}
            later: list[fmt.FileEntry] = []
            try:
                if candidate.state == "committed":
                    used = functools.partial(
                        records_verified_by, self._group.index, self._group.count
                    )
                    marker = read_marker(self._store, candidate, used)
                    candidate = dataclasses.replace(candidate, marker=marker)
                    found, later = self._verify_share(candidate, level, read_all)
                elif isinstance(self._store, SupportsRename):
                    found = find_irregular(self._store.list(candidate.name), candidate.name)
                wrong = dict(list(found.items())[:_MOST_TOLD])
            except CorruptStepError as error:
                wrong = dict.fromkeys(error.files, str(error))
            except BaseException as error:
                failure = error
            wrong = self._exchange(
                "verify",
                wrong,
                error=failure,
                leader=_all_of_them,
                timeout_seconds=self._options.restore_timeout_seconds,
            )
        return candidate, wrong, later

    def _verify_share(
        self, candidate: Candidate, level: str, read_all: bool
    ) -> tuple[dict[str, str], list[fmt.FileEntry]]:
        assert candidate.marker is not None
        marker = candidate.marker
        group = self._group
        try:
            mine = files_to_verify(self._store, candidate.name, marker, group.index, group.count)
        except CorruptStepError as error:
            return dict.fromkeys(error.files, "missing, or not what was committed"), []
        arrays = [entry for entry in mine if entry.path.startswith("state/")]
        renames = isinstance(self._store, SupportsRename)
        waits = level == "full" and not read_all and renames
        now = "sizes" if waits else level
        # Of a few hosts in a bucket each sees everything, in one request or two.
        whole = group.is_primary or not (renames or marker.hosts > _FEW_HOSTS)
        wrong = verify_files(self._store, candidate.name, mine, now, read_all=read_all, whole=whole)
        if now != "full":
            # Positions, structure and metadata are small, and nothing else would notice.
            small = [entry for entry in mine if not entry.path.startswith("state/")]
            wrong |= verify_files(
                self._store,
                candidate.name,
                small,
                "full",
                read_all=read_all,
                whole=whole and not renames,
            )
        return wrong, arrays if waits else []

    def _load(
        self,
        candidate: Candidate,
        load: Loader,
        unverified: Sequence[fmt.FileEntry],
        phases: Phases,
    ) -> tuple[dict[str, str], Any]:
        attempt = _Attempt()
        wrong: dict[str, str] = {}
        is_sure = False  # it is the arrays' own checks that say so, whatever the records say

        def look(votes: Sequence[tuple[tuple[dict[str, str], bool], str, str]]) -> dict[str, Any]:
            wrong = _all_of_them([found for (found, _), _, _ in votes])
            sure = any(sure for (_, sure), _, _ in votes)
            if not wrong:
                _check_gathers([gathers for _, gathers, _ in votes])
                _check_alike([alike for _, _, alike in votes])
            # Another job may have saved the step again while it was loaded: then some of what was
            # loaded is of the old one, some of the new one.
            loaded = candidate.state == "committed" and not wrong
            moved = loaded and has_moved(self._store, candidate)
            return {"wrong": wrong, "sure": sure, "moved": moved}

        # What comes from a bucket may be damaged on its way: it is damaged there if it is so twice.
        # What is not there on a file system may have been moved away for a moment.
        renames = isinstance(self._store, SupportsRename)
        with phases.span("load"):
            for number in range(2):
                if number and renames:
                    if is_sure:
                        break
                    self._stop_if_away(candidate)
                if attempt.apply is None:
                    attempt = self._try_load(candidate, load, unverified)
                told = self._exchange(
                    "load",
                    [
                        [attempt.wrong, attempt.is_sure],
                        attempt.loading.gathers,
                        attempt.loading.alike,
                    ],
                    error=attempt.failure,
                    leader=look,
                    timeout_seconds=self._options.restore_timeout_seconds,
                )
                if told["moved"]:
                    raise _MovedError
                wrong, is_sure = told["wrong"], told["sure"]
                if not wrong:
                    break
        if wrong and candidate.state == "committed":
            # What cannot be loaded may be damaged, or too large for a limit, say. The files tell.
            _, found, _ = self._verify(candidate, phases, "full", read_all=True)
            if not found and not is_sure:
                self._stop_if_moved(candidate)
                self._exchange(
                    "load",
                    None,
                    error=attempt.unread,
                    leader=_nothing,
                    timeout_seconds=self._options.exchange_timeout_seconds,
                )
            wrong = found or wrong
        if wrong:
            return wrong, None
        assert attempt.apply is not None and self._operation is not None
        if attempt.loading.gathers:
            with phases.span("gather"):
                self._gather(attempt.loading, self._operation)
        failure: BaseException | None = None
        result = None
        with phases.span("positions"):
            self.has_applied = True
            try:
                result = attempt.apply()
            except BaseException as error:
                failure = error
            self._exchange(
                "positions",
                None,
                error=failure,
                leader=_nothing,
                timeout_seconds=self._options.restore_timeout_seconds,  # replay() may read for long
            )
        return {}, result

    def _gather(self, loading: Loading, restore: Operation) -> None:
        """Lets all hosts do together what they have agreed on in the vote."""
        deadline = self._clock.monotonic() + self._options.restore_timeout_seconds
        with restore.part(GATHER) as operation:
            silence = self._options.peer_silence_seconds
            gathering = Gathering(self._group, operation, deadline, silence)
            try:
                threading.Thread(
                    target=gathering.run,
                    args=(loading.gather,),
                    name="datarax_dist-gather",
                    daemon=True,
                ).start()
                if self._group.is_primary:
                    operation.lead(GATHER, _nothing, deadline, together=True)
                operation.result(GATHER, deadline)
            except BaseException as error:
                gathering.give_up(error)
                raise
            gathering.end()

    def _try_load(
        self, candidate: Candidate, load: Loader, unverified: Sequence[fmt.FileEntry]
    ) -> _Attempt:
        loading = Loading(unverified)
        try:
            apply = load(candidate, loading)
            wrong = verify_files(self._store, candidate.name, loading.take(), "full", whole=False)
            if wrong:
                sure = any(reason in _OUR_FINDINGS for reason in wrong.values())
                return _Attempt(dict(list(wrong.items())[:_MOST_TOLD]), sure)
            return _Attempt(apply=apply, loading=loading)
        except CorruptStepError as error:
            sure = error.message.endswith(_OUR_FINDINGS)
            return _Attempt({path: str(error) for path in error.files}, sure)
        except fmt.InvalidRecordError as error:
            told = CorruptStepError(
                f"Step {candidate.step}: {error}", step=candidate.step, files=[]
            )
            sure = _OUR_SEAL.search(str(error)) is not None
            return _Attempt({"state": errors.describe(error, 500)}, sure, unread=told)
        except StorageError as error:
            if errors.is_passing(error):
                return _Attempt(failure=error)
            sure = _OWN_CHECK.match(error.message) is not None
            return _Attempt({"state": errors.describe(error, 500)}, sure, unread=error)
        except BaseException as error:
            return _Attempt(failure=error)

    def _tidy(self, inspection: Inspection) -> list[str]:
        """Removes what nobody can be writing to. What a living process may have staged, here or on
        another machine, goes with the next save.
        """
        unfinished = any(c.state in ("staged", "deleting") for c in inspection.candidates)
        unfinished = unfinished or retention.has_stray_attempts(self._attempts, inspection)
        if not self._group.is_primary or not unfinished:
            return []
        try:
            return retention.remove_leftovers(
                self._store,
                retention.find_abandoned(self._store, inspection.run),
                run=inspection.run,
                now=self._clock.now(),
            )
        except Exception as error:  # the step is restored, and the other hosts have gone on
            told = errors.describe(error)
            logger.warning("could not look for leftovers of %s: %s", self._store.root, told)
            return []


@dataclass(frozen=True, slots=True)
class _Attempt:
    """How loading went on this host.

    Attributes:
        wrong: damaged files and why.
        is_sure: it is the arrays' own checks that say so.
        failure: an error that says nothing about the step.
        unread: one that may mean damage.
        apply: what to do with what was loaded.
        loading: what is to be done together before.
    """

    wrong: dict[str, str] = field(default_factory=dict)
    is_sure: bool = False
    failure: BaseException | None = None
    unread: BaseException | None = None
    apply: Callable[[], Any] | None = None
    loading: Loading = field(default_factory=Loading)


class _MovedError(Exception):
    """The run has changed while it was read."""


def _all_of_them(votes: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What is wrong with a step on any host. Every host is told this, rather than all votes."""
    return {path: reason for vote in votes for path, reason in vote.items()}


def _check_gathers(gathers: Sequence[str]) -> None:
    """Raises where hosts would not gather the same: they would wait for each other for ever."""
    for host, what in enumerate(gathers):
        if what != gathers[0]:
            raise InvalidArgumentError(
                f"Host {host} has read {what or 'everything that it needs itself'}, host 0"
                f" {gathers[0] or 'everything that it needs itself'}. The targets' shapes and"
                " shardings, and Options.single_replica_restore, must be the same on every host."
                " Nothing was changed."
            )


def _check_alike(digests: Sequence[str]) -> None:
    for host, digest in enumerate(digests):
        if digest != digests[0]:
            raise InvalidArgumentError(
                f"Host {host} had other values than host 0 for itself alone, and the target has"
                " arrays of all hosts for them, which would not be the same everywhere. Give each"
                " host a target of its own (an array on its own devices, or numpy). Nothing was"
                " changed."
            )


def _nothing(_: Sequence[Any]) -> None:
    """What hosts are told that only need to know that nobody has failed."""


def _label(candidate: Candidate) -> str:
    is_own = candidate.name == fmt.step_name(candidate.step)
    return f"step {candidate.step}" if is_own else candidate.name


def _lines(refused: Mapping[str, str]) -> str:
    return "".join("\n" + printable(f"  {name}: {reason}") for name, reason in refused.items())
