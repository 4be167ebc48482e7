"""What goes: retention of committed steps, and removal of what a crash left behind.

A directory that goes is first renamed (where the store can), so that it is out of sight at once and
a writer that still believes in it fails, rather than commits half of it. Then its marker is
deleted, then the content, and last the claim `STEP.json`, so that what is left is known as ours and
anyone can finish. Nothing that does not carry a claim of this run is ever touched.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datarax_dist import format as fmt
from datarax_dist.config import KeepPolicy
from datarax_dist.errors import FormatVersionError
from datarax_dist.lease import is_certainly_dead
from datarax_dist.storage import Store, SupportsRename

__all__ = [
    "Leftover",
    "delete_replaced",
    "delete_step",
    "find_leftovers",
    "plan_retention",
    "read_claim",
    "remove_leftovers",
    "retire",
]

logger = logging.getLogger("datarax_dist")


@dataclass(frozen=True, slots=True)
class Leftover:
    """A directory of this run that is not a step, or not any more.

    Attributes:
        abandoned: nobody can be writing to it: its writer is certainly gone, or it was being
            deleted.
    """

    name: str
    step: int
    abandoned: bool


def plan_retention(
    committed: Sequence[int], keep: KeepPolicy | None, *, saved: int | None = None
) -> list[int]:
    """Returns the committed steps to delete, oldest first. The newest is always kept, and so is the
    one that was just `saved`, which need not be the newest.
    """
    if keep is None or not committed:
        return []
    kept = keep.keep(sorted(committed)) | {max(committed), saved}
    return sorted(set(committed) - kept)


def delete_step(
    store: Store, step: int, *, reached: Callable[[str], None] = lambda phase: None
) -> None:
    """Deletes a step: marker, then content. Can be stopped anywhere, and done again by anyone.

    Args:
        reached: told "retire" when the marker is gone and the content is not.
    """
    delete_replaced(store, step)  # first: without its successor it would be the step again
    if f"{fmt.step_name(step)}/" in store.children(""):
        _delete_directory(store, step, fmt.step_name(step), reached)
    logger.info("deleted step %d of %s", step, store.root)


def delete_replaced(store: Store, step: int) -> None:
    """Deletes what was this step before it was saved again."""
    for child in store.children(""):
        if fmt.parse_aside_name(child.rstrip("/")) == (step, "replaced"):
            _delete_directory(store, step, child[:-1])


def _delete_directory(
    store: Store, step: int, name: str, reached: Callable[[str], None] = lambda phase: None
) -> None:
    if isinstance(store, SupportsRename) and fmt.parse_aside_name(name) != (step, "deleting"):
        aside = fmt.aside_name(step, "deleting", secrets.token_hex(8))
        store.rename(name, aside)
        name = aside
    store.delete(f"{name}/{fmt.COMMIT_NAME}")
    reached("retire")
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
        step, aside = fmt.parse_step_name(child[:-1]), fmt.parse_aside_name(child[:-1])
        if step is not None:
            aside = (step, "")
        if aside is not None and (left := _leftover(store, run, child[:-1], *aside)):
            found.append(left)
    return found


def _leftover(store: Store, run: str | None, name: str, step: int, role: str) -> Leftover | None:
    names = store.children(name)
    if role == "replaced" and fmt.COMMIT_NAME not in store.children(fmt.step_name(step)):
        return None  # it is still the step
    if role == "" and (isinstance(store, SupportsRename) or fmt.COMMIT_NAME in names):
        return None  # a step; or one that has lost its marker, which no crash of ours leaves behind
    if not names and role:
        # Made a moment ago, maybe, by a save that goes on; or all deleted.
        return Leftover(name, step, role == "deleting")
    claim = read_claim(store, name)
    if claim is None or run is None or claim.run != run:
        return None
    abandoned = role in ("replaced", "deleting") or is_certainly_dead(claim.writer)
    return Leftover(name, step, abandoned)


def read_claim(store: Store, name: str) -> fmt.StepClaim | None:
    """Returns whose a directory is; None when it does not say so."""
    try:
        return fmt.parse_claim(store.get(f"{name}/{fmt.STEP_NAME}"))
    except (fmt.InvalidRecordError, FormatVersionError, KeyError):
        return None


def remove_leftovers(store: Store, leftovers: Sequence[Leftover]) -> list[str]:
    """Removes leftovers; returns their names. One that cannot be removed is logged and stays."""
    removed = []
    for leftover in leftovers:
        try:
            _delete_directory(store, leftover.step, leftover.name)
        except Exception as error:
            logger.warning(
                "could not remove the leftover %s of %s: %s", leftover.name, store.root, error
            )
        else:
            logger.warning(
                "removed %s/%s: a save or a deletion of step %d did not end",
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
