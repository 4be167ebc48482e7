"""What goes: retention of committed steps, and removal of what a crash left behind.

A step is deleted marker first, so that a half-deleted step is never taken for a whole one, and
`STEP.json` last, so that what
is left of it is still known as ours. Nothing that does not carry a claim of this run is ever
touched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datarax_dist import format as fmt
from datarax_dist.config import KeepPolicy
from datarax_dist.errors import FormatVersionError
from datarax_dist.lease import is_certainly_dead
from datarax_dist.storage import Store

__all__ = ["Leftover", "delete_step", "find_leftovers", "plan_retention", "remove_leftovers"]

logger = logging.getLogger("datarax_dist")


@dataclass(frozen=True, slots=True)
class Leftover:
    """A directory of this run that no marker makes a step. `dead`: its writer is certainly gone."""

    name: str
    step: int
    dead: bool


def plan_retention(committed: Sequence[int], keep: KeepPolicy | None) -> list[int]:
    """Returns the committed steps to delete, oldest first. The newest is always kept."""
    if keep is None or not committed:
        return []
    kept = keep.keep(sorted(committed)) | {max(committed)}
    return sorted(set(committed) - kept)


def delete_step(
    store: Store, step: int, *, reached: Callable[[str], None] = lambda phase: None
) -> None:
    """Deletes a step: marker, then content, then claim. Can be stopped anywhere and done again."""
    name = fmt.step_name(step)
    store.delete(f"{name}/{fmt.COMMIT_NAME}")
    reached("retire")
    _delete_directory(store, name)
    logger.info("deleted step %d of %s", step, store.root)


def _delete_directory(store: Store, name: str) -> None:
    for child in store.children(name):
        if child != fmt.STEP_NAME:
            store.delete(f"{name}/{child.rstrip('/')}")
    store.delete(name)


def find_leftovers(store: Store, run: str | None) -> list[Leftover]:
    """Returns what crashed saves and deletions of this run left behind. Reads only."""
    found = []
    for child in store.children(""):
        if not child.endswith("/"):
            continue
        name = child[:-1]
        staged, step = fmt.parse_staging_name(name), fmt.parse_step_name(name)
        if staged is None and step is None:
            continue
        names = store.children(name)
        if fmt.COMMIT_NAME in names:
            continue
        if fmt.STEP_NAME not in names:
            if staged is not None and not names:  # made, and nothing written in it yet
                found.append(Leftover(name, staged, True))
            continue
        try:
            claim = fmt.parse_claim(store.get(f"{name}/{fmt.STEP_NAME}"))
        except (fmt.InvalidRecordError, FormatVersionError, KeyError):
            continue
        if run is not None and claim.run == run:
            found.append(Leftover(name, claim.step, is_certainly_dead(claim.writer)))
    return found


def remove_leftovers(store: Store, leftovers: Sequence[Leftover]) -> list[str]:
    """Removes leftovers; returns their names. One that cannot be removed is logged and stays."""
    removed = []
    for leftover in leftovers:
        try:
            _delete_directory(store, leftover.name)
        except Exception as error:
            logger.warning(
                "could not remove the leftover %s of %s: %s", leftover.name, store.root, error
            )
        else:
            logger.warning(
                "removed %s/%s: step %d was never committed",
                store.root,
                leftover.name,
                leftover.step,
            )
            removed.append(leftover.name)
    return removed


def retire(store: Store, steps: Sequence[int], *, reached: Callable[[str], Any]) -> list[int]:
    """Deletes steps by policy. Never raises: a failed deletion does not fail the save that asked
    for it.
    """
    deleted = []
    for step in steps:
        try:
            delete_step(store, step, reached=reached)
        except Exception as error:
            logger.warning(
                "could not delete step %d of %s: %s. It is tried again.", step, store.root, error
            )
        else:
            deleted.append(step)
    return deleted
