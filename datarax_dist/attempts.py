"""Which step is being restored, so that one whose restore crashes the job is not tried for ever.

What is wrong with a step need not be seen in its files: a restore may be killed because it takes
too much memory, or crash in a library. Nobody is left then to say so. So the primary says before
what it is about to do:

1. Before any host verifies or loads a step, the primary makes `<step>.restoring-<nonce>`, a file
   below the root, the *attempt*. It names the very step by the digest of its marker.
2. The attempt goes when the restore of that step has ended in any way but the death of a process:
   it succeeded, the step is damaged, there was an error. A success takes along those of earlier
   restores. When a host is lost, the attempt stays: its death is what is counted.
   Who may create files, and not remove them, makes `<step>.restored-<nonce>` beside it instead.
3. Whoever restores later counts the attempts of restores that must have ended, and do not say so.
   From the second on the step is *suspect*, and passed over, unless it is asked for by its number.

An attempt is a note, and nothing depends on it: where it cannot be written, read or removed, the
restore goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from datarax_dist import format as fmt
from datarax_dist.clock import Clock
from datarax_dist.errors import CheckpointError, describe
from datarax_dist.inspection import Candidate, Inspection
from datarax_dist.storage import Entry, Store, SupportsReplace, for_each
from datarax_dist.writers import is_certainly_dead, writer_identity

__all__ = ["Trial", "find_stale", "mark_suspects", "remove_attempts"]

logger = logging.getLogger("datarax_dist")

_CRASHES = 2  # a step is suspect from this one on
_MOST_READ = 64  # attempts at one step
_MOST_ENDED = 8  # that nobody could remove: then no more are made
# Twice each: verify, load, and verify all of it; or gather and positions in place of the last. And
# around each of these, seven times in all, whether the step has moved.
_WAITS = 7
_CLOCKS_SECONDS = 600.0  # by how much two clocks may differ
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)  # the root is only read, by this job
_NO_NAMES = ("", "localhost", "localhost.localdomain")


class Trial:
    """The attempt of a restore that is under way. For the primary; elsewhere it is never begun.

    Args:
        timeout_seconds: how long its hosts wait for each other in one phase, and until it is known
            whether the step has moved: `_WAITS` times this is as long as they can wait in all.
    """

    def __init__(self, store: Store, clock: Clock, hosts: int, timeout_seconds: float) -> None:
        self._store = store
        self._clock = clock
        self._hosts = hosts
        self._timeout_seconds = timeout_seconds
        self._open: str | None = None

    def begin(self, run: str, candidate: Candidate, names: Sequence[str] = ()) -> None:
        """Says that this step is going to be restored. Ends the attempt before, if there is one.

        Args:
            names: of attempts that there are.
        """
        self.end()
        ended = _ended(names := _of_step(candidate.step, names))
        over = [name for name in names if fmt.parse_attempt_name(name) in ended]
        if len(ended) >= _MOST_ENDED and not _removed(self._store, over):
            return  # nor would this one be
        nonce = secrets.token_hex(8)
        self._open = name = fmt.attempt_name(candidate.step, nonce)
        attempt = fmt.RestoreAttempt(
            run=run,
            step=candidate.step,
            nonce=nonce,
            marker=candidate.digest,
            hosts=self._hosts,
            writer=writer_identity(),
            created_at=self._clock.now(),
            timeout_seconds=self._timeout_seconds,
        )
        try:
            self._store.create(name, fmt.dump_attempt(attempt))
        except CheckpointError as error:
            logger.debug("this restore is not noted in %s: %s", self._store.root, describe(error))
            if isinstance(error, OSError) and error.errno in _REFUSED:
                self._open = None

    def end(self) -> None:
        """The attempt has ended, and nobody has died of it."""
        if (name := self._open) is not None:
            _remove(self._store, [name])
            self._open = None

    def succeed(self, run: str, step: int, names: Sequence[str]) -> None:
        """The step was restored: earlier attempts at it, among `names`, do not count any more."""
        if (name := self._open) is not None:
            _remove(self._store, [name, *_ours(self._store, run, step, names)])
            self._open = None

    def leave(self) -> None:
        """A host was lost: the attempt stays, and counts when this process has ended, too."""
        self._open = None


def mark_suspects(store: Store, inspection: Inspection, now: float) -> Inspection:
    """Returns the inspection with the reason at each committed step that a restore passes over.

    Costs one read for each attempt where a step has two or more, and else nothing.
    """
    if not inspection.attempts:
        return inspection
    here = writer_identity()

    def judged(candidate: Candidate) -> Candidate:
        names = _of_step(candidate.step, inspection.attempts)
        ended = _ended(names)
        names = [name for name in names if fmt.parse_attempt_name(name) not in ended]
        if candidate.state != "committed" or len(names) < _CRASHES:
            return candidate
        crashed = [
            attempt
            for _, attempt in _read_all(store, names[:_MOST_READ])
            if (attempt.run, attempt.marker) == (inspection.run, candidate.digest)
            and _has_ended(attempt, here, now)
        ]
        if len(crashed) < _CRASHES:
            return candidate
        return dataclasses.replace(candidate, suspect=_reason(candidate.step, crashed))

    return dataclasses.replace(inspection, candidates=tuple(map(judged, inspection.candidates)))


def remove_attempts(store: Store, run: str | None, step: int, names: Sequence[str]) -> None:
    """Removes what attempts at a step there are among `names`. A run of None is any run."""
    _remove(store, _ours(store, run, step, names))


def find_stale(store: Store, run: str, names: Sequence[str]) -> list[tuple[str, int]]:
    """Returns the attempts of this run, and their steps, at what is not there any more."""
    found = [name for name in names if fmt.parse_attempt_name(name) is not None]
    return [
        (name, attempt.step)
        for name, attempt in _read_all(store, found)
        if attempt.run == run and _is_gone(store, attempt, names)
    ]


def _is_gone(store: Store, attempt: fmt.RestoreAttempt, names: Sequence[str]) -> bool:
    if any(fmt.parse_aside_name(name[:-1]) == (attempt.step, "replaced") for name in names):
        return False
    try:
        marker = store.get(f"{fmt.step_name(attempt.step)}/{fmt.COMMIT_NAME}")
    except KeyError:
        return True
    except (CheckpointError, fmt.InvalidRecordError):
        return False  # it cannot be read, now or ever; nobody waits for an answer
    return fmt.digest(marker) != attempt.marker


def _of_step(step: int, names: Sequence[str]) -> list[str]:
    found = ((name, fmt.parse_attempt_name(name)) for name in names)
    return [name for name, parsed in found if parsed is not None and parsed[0] == step]


def _ours(store: Store, run: str | None, step: int, names: Sequence[str]) -> list[str]:
    attempts = _read_all(store, _of_step(step, names))
    return [name for name, attempt in attempts if run in (None, attempt.run)]


def _ended(names: Sequence[str]) -> set[tuple[int, str] | None]:
    """Returns step and nonce of the attempts that have ended, and say so."""
    parsed = {name: fmt.parse_attempt_name(name) for name in names}
    return {
        at
        for name, at in parsed.items()
        if at is not None and name == fmt.attempt_name(*at, has_ended=True)
    }


def _read_all(store: Store, names: Sequence[str]) -> list[tuple[str, fmt.RestoreAttempt]]:
    """Returns those that are attempts, and can be read, by their names."""

    def read(name: str) -> tuple[str, fmt.RestoreAttempt] | None:
        try:
            return name, fmt.parse_attempt(store.get(name), name)
        except KeyError:  # its restore has ended meanwhile
            return None
        except (fmt.InvalidRecordError, CheckpointError) as error:
            logger.debug("%s of %s does not count: %s", name, store.root, describe(error))
            return None

    found = for_each(store, read, names) if names else []
    return [attempt for attempt in found if attempt is not None]


def _has_ended(attempt: fmt.RestoreAttempt, here: Mapping[str, Any], now: float) -> bool:
    """Whether a restore that has left its attempt cannot be going on any more."""
    writer, machine = attempt.writer, here["machine"]
    if machine and writer.get("machine") == machine:
        return is_certainly_dead(writer)  # here its process can be looked for
    # A restarted pod has the name of the one before, whose place it has taken.
    name = writer.get("name")
    if machine and writer.get("machine") and name == here["name"] and name not in _NO_NAMES:
        return True
    longest = _WAITS * attempt.timeout_seconds + _CLOCKS_SECONDS
    return now - attempt.created_at > longest


def _reason(step: int, crashed: Sequence[fmt.RestoreAttempt]) -> str:
    last = max(crashed, key=lambda attempt: attempt.created_at)
    name = last.writer.get("name")
    known = isinstance(name, str) and 0 < len(name) <= 253 and name.isprintable()
    times = "twice" if len(crashed) == 2 else f"{len(crashed)} times"
    at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(last.created_at))
    return (
        f"suspect: its restore crashed the job {times}, last at {at} on"
        f" {name if known else 'an unknown host'}; restore(step={step}) tries it all the same, and"
        " a success clears it"
    )


def _remove(store: Store, names: Sequence[str]) -> None:
    """Removes attempts; of those that stay says that they have ended."""
    if _removed(store, names):
        return
    ended = _ended(names)
    try:
        for name in names:
            if (at := fmt.parse_attempt_name(name)) is not None and at not in ended:
                with contextlib.suppress(KeyError, fmt.InvalidRecordError):  # it is gone after all
                    store.create(fmt.attempt_name(*at, has_ended=True), store.get(name))
    except CheckpointError as error:
        logger.warning(
            "could not remove %s of %s: %s. Such a file counts as a restore that has crashed, once"
            " its process is gone.",
            ", ".join(names[:10]),
            store.root,
            describe(error),
        )


def _removed(store: Store, names: Sequence[str]) -> bool:
    """Removes attempts; returns whether that could be done."""
    try:
        if isinstance(store, SupportsReplace) and names:
            store.delete_listed([Entry(name, 0) for name in names])  # in one request
        else:
            for name in names:
                store.delete(name)
    except CheckpointError as error:
        logger.debug("could not remove attempts of %s: %s", store.root, describe(error))
        return False
    return True
