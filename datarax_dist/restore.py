"""The restore protocol, over the ports: no jax, no orbax.

1. list     The primary reads the root and proposes candidates, newest first; what it refuses, it
             says why. No other host lists.
2. verify   Each host verifies its share of the candidate's files at the chosen level; all take the
             newest that all accept.
3. load     Each host loads; what fails is exchanged, never raised on one host alone. Damage moves
             on to the next candidate.
4. positions Applied only when every host has loaded and decoded; an error on one host is an error
             on all.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datarax_dist import errors, retention
from datarax_dist import format as fmt
from datarax_dist.config import Options
from datarax_dist.errors import (
    CheckpointError,
    CorruptStepError,
    FormatVersionError,
    StepNotFoundError,
    StorageError,
)
from datarax_dist.hosts import HostGroup
from datarax_dist.save import union_of_records
from datarax_dist.storage import Store
from datarax_dist.telemetry import Phases

__all__ = ["Candidate", "Inspection", "RestoreReport", "Restorer", "inspect_run", "verify_files"]

logger = logging.getLogger("datarax_dist")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A directory that may be a step.

    Attributes:
        state: "committed", "staged" (a claim, no marker), "foreign" (plain Orbax), "damaged" (its
            marker does not check),
            "refused" (of another run, a newer format, or nothing of ours at all).
        reason: why it is not committed; empty when it is.
    """

    step: int
    name: str
    state: str
    reason: str = ""
    marker: fmt.CommitMarker | None = None
    files: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a root holds."""

    run: str | None
    candidates: Sequence[Candidate]

    @property
    def committed(self) -> list[int]:
        return sorted(c.step for c in self.candidates if c.state == "committed")


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
        removed: leftovers that were removed.
    """

    step: int
    refused: Mapping[str, str]
    verified: str
    hosts_before: int
    hosts_now: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    removed: Sequence[str] = ()

    def __str__(self) -> str:
        lines = [
            f"restored step {self.step} (verified: {self.verified}; saved by {self.hosts_before}"
            f" hosts, {self.hosts_now} now)"
        ]
        lines += [f"  not {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


def inspect_run(store: Store) -> Inspection:
    """Returns every directory of a root that looks like a step, newest first, with what it is and
    why. Reads markers only.
    """
    names = store.children("")
    run: str | None = None
    if fmt.RUN_NAME in names:
        try:
            run = fmt.parse_run(store.get(fmt.RUN_NAME))
        except fmt.InvalidRecordError as error:
            logger.warning(
                "%s of %s is damaged (%s); the run is taken from its steps",
                fmt.RUN_NAME,
                store.root,
                error,
            )
    found = []
    for name in names:
        if not name.endswith("/"):
            continue
        staged, step = fmt.parse_staging_name(name[:-1]), fmt.parse_step_name(name[:-1])
        if staged is not None:
            reason = "its save did not end: a staging directory"
            found.append(Candidate(staged, name[:-1], "staged", reason))
        elif step is not None:
            found.append(_inspect_step(store, step, name[:-1]))
    if run is None:
        runs = {c.marker.run for c in found if c.marker is not None}
        run = runs.pop() if len(runs) == 1 else None
        if runs:
            raise CorruptStepError(
                f"{store.root} holds steps of several runs and no valid {fmt.RUN_NAME}. Move the"
                " steps of one run to a root of their own.",
                step=None,
                files=[fmt.RUN_NAME],
            )
    judged = [
        (
            Candidate(c.step, c.name, "refused", f"its marker is of another run ({c.marker.run})")
            if c.marker is not None and c.marker.run != run
            else c
        )
        for c in found
    ]
    return Inspection(run, sorted(judged, key=lambda c: (c.step, c.name), reverse=True))


def _inspect_step(store: Store, step: int, name: str) -> Candidate:
    inside = store.children(name)
    if fmt.COMMIT_NAME in inside:
        try:
            marker = fmt.parse_marker(store.get(f"{name}/{fmt.COMMIT_NAME}"))
        except FormatVersionError as error:
            return Candidate(step, name, "refused", str(error))
        except (fmt.InvalidRecordError, KeyError) as error:
            return Candidate(step, name, "damaged", f"{error}", files=(fmt.COMMIT_NAME,))
        if marker.step != step:
            return Candidate(step, name, "refused", f"its marker is that of step {marker.step}")
        missing = [
            entry.path
            for entry in marker.records
            if entry.path.rsplit("/", 1)[1] not in store.children(f"{name}/hosts")
        ]
        if missing:
            return Candidate(
                step,
                name,
                "damaged",
                f"host records are missing: {', '.join(missing[:5])}",
                files=tuple(missing),
            )
        return Candidate(step, name, "committed", marker=marker)
    if fmt.STEP_NAME in inside:
        return Candidate(
            step,
            name,
            "staged",
            f"no {fmt.COMMIT_NAME}: it was never committed, or its deletion did not end",
        )
    if "_CHECKPOINT_METADATA" in inside or "_METADATA" in inside:
        return Candidate(
            step,
            name,
            "foreign",
            "written by plain Orbax: no marker of ours, so nothing can be verified",
        )
    return Candidate(
        step, name, "refused", f"no {fmt.COMMIT_NAME} and no {fmt.STEP_NAME}: not a step of ours"
    )


def verify_files(
    store: Store,
    directory: str,
    files: Sequence[fmt.FileEntry],
    level: str,
    *,
    progress: Callable[[int], None] = lambda n: None,
) -> dict[str, str]:
    """Returns what is wrong with `files`: path -> reason. Level "sizes" compares sizes, "full"
    reads every byte.
    """
    wrong: dict[str, str] = {}
    if level == "marker":
        return wrong
    listed = {
        entry.key.removeprefix(f"{directory}/"): entry.size for entry in store.list(directory)
    }
    for entry in files:
        if entry.path not in listed:
            wrong[entry.path] = "missing"
        elif listed[entry.path] != entry.size:
            wrong[entry.path] = f"{listed[entry.path]} bytes instead of {entry.size}"
        elif level == "full":
            try:
                size, digest = store.digest(f"{directory}/{entry.path}", entry.size)
            except (KeyError, StorageError) as error:
                wrong[entry.path] = f"cannot be read: {error}"
                continue
            if (size, digest) != (entry.size, entry.digest):
                wrong[entry.path] = "its content has changed (checksum)"
            progress(entry.size)
    return wrong


def share(files: Sequence[fmt.FileEntry], host: int, hosts: int) -> list[fmt.FileEntry]:
    """Returns the files that `host` verifies: one split for all hosts, about equal in bytes."""
    loads = [0] * hosts
    mine = []
    for entry in sorted(files, key=lambda e: (-e.size, e.path)):
        chosen = loads.index(min(loads))
        loads[chosen] += entry.size + 4096
        if chosen == host:
            mine.append(entry)
    return mine


class Restorer:
    """Restores steps of one run. Collective."""

    def __init__(self, store: Store, group: HostGroup, options: Options) -> None:
        self._store = store
        self._group = group
        self._options = options

    def inspect(self) -> Inspection:
        """Returns the primary's view of the root, on every host."""
        body = self._group.exchange(
            "list",
            self._store.root,
            leader=lambda roots: self._list(roots),
            timeout_seconds=self._options.exchange_timeout_seconds,
        )
        return _inspection_from_json(body)

    def _list(self, roots: Sequence[str]) -> dict[str, Any]:
        for host, root in enumerate(roots):
            if root != roots[0]:
                raise errors.InvalidArgumentError(
                    f"Host {host} opened {root!r}, host 0 {roots[0]!r}: the root must be the same"
                    " on all."
                )
        return _inspection_to_json(inspect_run(self._store))

    def restore(
        self, step: int | None, load: Callable[[Candidate], Callable[[], Any]], phases: Phases
    ) -> tuple[Any, RestoreReport] | None:
        """Restores the newest good step, or `step`.

        Args:
            load: reads and decodes this host's part of a candidate, and returns what applies it. It
                must change nothing itself.
                An error of the tree other than damage (a target that does not fit, say) ends the
                restore on every host.

        Returns:
            What the function that `load` returned has returned, with the report; None when there is
            nothing to restore.

        Raises:
            StepNotFoundError: `step` was asked for and is not there.
            CorruptStepError: it is damaged, or every committed step is.
        """
        with phases.span("list"):
            inspection = self.inspect()
        candidates, refused = self._choose(inspection, step)
        damage: dict[int, Sequence[str]] = {
            c.step: c.files for c in inspection.candidates if c.state == "damaged"
        }
        for candidate in candidates:
            bad = self._verify(candidate, phases)
            applied: Any = None
            if not bad:
                bad, applied = self._load(candidate, load, phases)
            if not bad:
                removed = self._tidy(inspection)
                report = RestoreReport(
                    step=candidate.step,
                    refused=refused,
                    verified=(
                        "nothing"
                        if candidate.state == "foreign"
                        else self._options.verify_on_restore
                    ),
                    hosts_before=candidate.marker.hosts if candidate.marker else 0,
                    hosts_now=self._group.count,
                    seconds=dict(phases.seconds),
                    removed=tuple(removed),
                )
                log = logger.warning if refused or candidate.state == "foreign" else logger.info
                log("%s: %s", self._store.root, report)
                return applied, report
            files = "; ".join(f"{path}: {reason}" for path, reason in list(bad.items())[:5])
            refused[f"step {candidate.step}"] = f"damaged: {files}"
            damage[candidate.step] = list(bad)
            logger.warning("step %d of %s is damaged: %s", candidate.step, self._store.root, files)
        if damage and (step is None or step in damage):
            newest = max(damage) if step is None else step
            which = f"Step {newest}" if step is not None else "Every committed step"
            raise CorruptStepError(
                f"{which} of {self._store.root} is damaged: {_lines(refused)}\nRestore another"
                " step, or a copy.",
                step=newest,
                files=list(damage[newest]),
            )
        if step is not None:
            raise StepNotFoundError(
                f"There is no committed step {step} in {self._store.root}; there are"
                f" {inspection.committed or 'none'}.{_lines(refused)}",
                step=step,
            )
        return None

    def _choose(
        self, inspection: Inspection, step: int | None
    ) -> tuple[list[Candidate], dict[str, str]]:
        refused = {}
        for candidate in inspection.candidates:
            if candidate.reason and (step is None or candidate.step == step):
                label = (
                    f"step {candidate.step}"
                    if candidate.name == str(candidate.step)
                    else candidate.name
                )
                refused[label] = candidate.reason
        chosen = [
            c for c in inspection.candidates if c.state == "committed" and step in (None, c.step)
        ]
        foreign = [
            c for c in inspection.candidates if c.state == "foreign" and step in (None, c.step)
        ]
        damaged = any(c.state == "damaged" for c in inspection.candidates)
        if not chosen and foreign and not damaged:
            # A directory that plain Orbax wrote: a user who moves here expects to go on from it.
            for candidate in foreign:
                refused.pop(f"step {candidate.step}", None)
            return foreign, refused
        return chosen, refused

    def _verify(self, candidate: Candidate, phases: Phases) -> dict[str, str]:
        with phases.span("verify"):
            wrong: dict[str, str] = {}
            failure: BaseException | None = None
            if candidate.marker is not None:
                try:
                    wrong = self._verify_share(candidate)
                except BaseException as error:
                    failure = error
            votes = self._group.exchange(
                "verify", wrong, error=failure, timeout_seconds=self._options.save_timeout_seconds
            )
        return {path: reason for vote in votes for path, reason in vote.items()}

    def _verify_share(self, candidate: Candidate) -> dict[str, str]:
        assert candidate.marker is not None
        marker = candidate.marker
        try:
            files = union_of_records(
                self._store, candidate.name, marker.records, marker.run, marker.step
            )
        except CorruptStepError as error:
            return dict.fromkeys(error.files, "missing, or not what was committed")
        mine = share(files, self._group.index, self._group.count)
        return verify_files(self._store, candidate.name, mine, self._options.verify_on_restore)

    def _load(
        self, candidate: Candidate, load: Callable[[Candidate], Callable[[], Any]], phases: Phases
    ) -> tuple[dict[str, str], Any]:
        wrong: dict[str, str] = {}
        failure: BaseException | None = None
        apply: Callable[[], Any] | None = None
        with phases.span("load"):
            try:
                apply = load(candidate)
            except CorruptStepError as error:
                wrong = {path: str(error) for path in error.files}
            except (StorageError, fmt.InvalidRecordError, json.JSONDecodeError) as error:
                wrong = {"state": errors.describe(error, 500)}
            except BaseException as error:
                failure = error
            votes = self._group.exchange(
                "load", wrong, error=failure, timeout_seconds=self._options.save_timeout_seconds
            )
        wrong = {path: reason for vote in votes for path, reason in vote.items()}
        if wrong:
            return wrong, None
        assert apply is not None
        result = None
        with phases.span("positions"):
            try:
                result = apply()
            except BaseException as error:
                failure = error
            self._group.exchange(
                "positions",
                None,
                error=failure,
                timeout_seconds=self._options.exchange_timeout_seconds,
            )
        return {}, result

    def _tidy(self, inspection: Inspection) -> list[str]:
        """Removes what writers that are certainly dead have left. Theirs, that may live elsewhere,
        goes with the next save.
        """
        if not self._group.is_primary or not any(
            c.state == "staged" for c in inspection.candidates
        ):
            return []
        try:
            leftovers = [
                left for left in retention.find_leftovers(self._store, inspection.run) if left.dead
            ]
            return retention.remove_leftovers(self._store, leftovers)
        except CheckpointError as error:
            logger.warning("could not look for leftovers: %s", error)
            return []


def _lines(refused: Mapping[str, str]) -> str:
    return "".join(f"\n  {name}: {reason}" for name, reason in refused.items())


def _inspection_to_json(inspection: Inspection) -> dict[str, Any]:
    return {
        "run": inspection.run,
        "candidates": [
            {
                "step": c.step,
                "name": c.name,
                "state": c.state,
                "reason": c.reason,
                "files": list(c.files),
                "marker": fmt.dump_marker(c.marker).decode() if c.marker else None,
            }
            for c in inspection.candidates
        ],
    }


def _inspection_from_json(body: Mapping[str, Any]) -> Inspection:
    return Inspection(
        body["run"],
        tuple(
            Candidate(
                row["step"],
                row["name"],
                row["state"],
                row["reason"],
                fmt.parse_marker(row["marker"].encode()) if row["marker"] else None,
                tuple(row["files"]),
            )
            for row in body["candidates"]
        ),
    )
