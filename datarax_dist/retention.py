"""What goes: retention of committed steps, and removal of what a crash left behind.

A directory that goes is first renamed (where the store can), so that it is out of sight at once and
a writer that still believes in it fails, rather than commits half of it. Then its marker is
deleted, then the content, and last the claim `STEP.json`, so that what is left is known as ours and
anyone can finish. Nothing that does not carry a claim of this run is ever touched, but for a
staging directory without one that holds nothing but what saves write. A step goes into
a directory that was made for it. Who takes the run over gives such directories other names: then a
writer that has lost the run, and does not know it yet, cannot move the step any more (`fence`).

A bucket cannot rename, and there every host that is believed dead may come back. So before what a
save left is touched, a void marker is put where `COMMIT.json` would be (`give_up`): whichever of
the two is created first stands. And everything is deleted as it was listed, generation by
generation, after another look at the marker: what was written since is another one's, and stays.
What is about to be deleted stands in the lease: who takes the run over writes its marker once more,
and then it cannot be deleted as it was seen before. Nor can a step be replaced as it was seen
before, when its copy is about to go.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import secrets
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from datarax_dist import attempts
from datarax_dist import format as fmt
from datarax_dist.config import KeepPolicy
from datarax_dist.errors import FormatVersionError, StorageError, describe
from datarax_dist.inspection import Inspection, inspect_step, is_committed
from datarax_dist.lease import Right, Unguarded, newest_lease
from datarax_dist.storage import Entry, Store, SupportsRename, SupportsReplace, for_each
from datarax_dist.writers import is_certainly_dead, writer_identity

__all__ = [
    "Leftover",
    "clear_given_up",
    "delete_copy",
    "delete_replaced",
    "delete_step",
    "fence",
    "find_abandoned",
    "find_leftovers",
    "give_up",
    "has_stray_attempts",
    "is_ours",
    "plan_retention",
    "read_claim",
    "remove_leftovers",
    "retire",
    "with_room",
]

logger = logging.getLogger("datarax_dist")

_Result = TypeVar("_Result")
_UNGUARDED = Unguarded()
_VOID_SECONDS = 24 * 3600.0


def _nowhere(phase: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Leftover:
    """A directory of this run that is not a step, or not any more; or the file that says that a
    step is being restored which is not there any more.

    Attributes:
        abandoned: nobody can be writing to it: its writer is certainly gone, or it was being
            deleted. The owner of the run may be deleting it still (`find_abandoned`).
        claim: whose it is, where it says so.
        keep_claim: remove all but the claim, which stays for a day: what a host that comes back
            writes after this is known as ours by it.
        only_marker: there is a marker, and nothing for which it could speak.
    """

    name: str
    step: int
    abandoned: bool
    claim: fmt.StepClaim | None = None
    keep_claim: bool = False
    only_marker: bool = False


def plan_retention(
    committed: Sequence[int], keep: KeepPolicy | None, *, saved: int | None = None
) -> list[int]:
    """Returns the committed steps to delete, oldest first. The newest is always kept, and so is the
    one that was just `saved`, which need not be the newest.
    """
    if keep is None or not committed:
        return []
    kept = {*keep.keep(sorted(committed)), max(committed), saved}
    return sorted(set(committed) - kept)


@functools.cache  # once
def tell_of_newer(root: str, newest: int) -> None:
    logger.warning(
        "%s: what is saved now is below step %d, which is there. A restore goes on taking that one,"
        " and policies that keep the newest delete what is below it. To go back for good, delete"
        " the newer steps (delete(), on every host), or save to another root.",
        root,
        newest,
    )


def with_room(act: Callable[[], _Result], make_room: Callable[[], None]) -> _Result:
    """Acts; where a disk or a quota is full, once more when there is room: what fills it may be
    what a failed save has left.
    """
    try:
        return act()
    except StorageError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        logger.info(
            "%s. What earlier saves have left is removed, and it is tried again.", describe(error)
        )
        make_room()
        return act()


def delete_step(
    store: Store,
    step: int,
    *,
    now: float,
    lease: Right = _UNGUARDED,
    reached: Callable[[str], None] = _nowhere,
) -> bool:
    """Deletes a step: marker, then content. Can be stopped anywhere, and done again by anyone.

    Args:
        now: seconds since 1970.
        lease: the right to do so.
        reached: told "retire" when the marker is gone and the content is not.

    Returns:
        Whether it is gone; it stays where another job saves it again in this moment.

    Raises:
        LeaseError: the run is another job's; the step stays.
    """
    # What it was before goes first: without its successor it would be the step again. And last,
    # where another job was just about to save the step again.
    names = store.children("")
    lease.check()
    _delete_asides(store, step, names, now, lease)
    is_gone = True
    if f"{fmt.step_name(step)}/" in names:
        is_gone = _delete_directory(
            store, step, fmt.step_name(step), now=now, reached=reached, lease=lease
        )
    if not isinstance(store, SupportsRename):
        is_gone = _delete_asides(store, step, store.children(""), now, lease) and is_gone
    if is_gone:
        attempts.remove_attempts(store, None, step, names)
        logger.info("deleted step %d of %s", step, store.root)
    return is_gone


def _asides(step: int, names: Sequence[str]) -> list[str]:
    children = [name.rstrip("/") for name in names]
    return [name for name in children if fmt.parse_aside_name(name) == (step, "replaced")]


def _is_aside(store: Store, step: int) -> bool:
    """Whether what was copied aside in a bucket is the step, where its own name has no marker."""
    return any(is_committed(store, name) for name in _asides(step, store.children("")))


def _delete_asides(store: Store, step: int, names: Sequence[str], now: float, lease: Right) -> bool:
    asides = _asides(step, names)
    gone = [_delete_directory(store, step, name, now=now, lease=lease) for name in asides]
    return all(gone)


def delete_replaced(store: Store, step: int, own: str, names: Sequence[str], now: float) -> None:
    """Deletes what was this step before it was saved again, as far as it is among `names`; and the
    attempts to restore that.

    Args:
        own: what the step that was replaced is called. On a file system only that goes: another one
            may be what the step is called now, for a job that has taken the run since. In a bucket
            such a one is known, by the marker.
    """
    renames = isinstance(store, SupportsRename)
    for name in _asides(step, names):
        if not renames or name == own:
            _delete_directory(store, step, name, now=now, replaced=True)
    attempts.remove_attempts(store, None, step, names)


def _delete_directory(
    store: Store,
    step: int,
    name: str,
    *,
    now: float,
    reached: Callable[[str], None] = _nowhere,
    replaced: bool = False,
    lease: Right = _UNGUARDED,
) -> bool:
    """Deletes a directory.

    Args:
        now: seconds since 1970.
        replaced: only because the step is committed under its own name.

    Returns:
        Whether it is gone; it stays when another job has put something in its place.
    """
    if not isinstance(store, SupportsRename):
        return _delete_objects(store, step, name, now, reached, replaced, lease)
    own, aside = fmt.step_name(step), fmt.aside_name(step, "deleting", secrets.token_hex(8))
    if name == own or (fmt.parse_aside_name(name) == (step, "replaced") and not replaced):
        _move_into(store, step, name, aside, lease)
        name = aside
    elif fmt.parse_aside_name(name) != (step, "deleting"):
        store.rename(name, aside)
        name = aside
    for directory in (f"{name}/{own}", name):
        store.delete(f"{directory}/{fmt.COMMIT_NAME}")
    reached("retire")
    store.delete(f"{name}/{own}", last=fmt.STEP_NAME)
    store.delete(name, last=fmt.STEP_NAME)
    return True


def _move_into(store: Store, step: int, name: str, directory: str, lease: Right) -> None:
    """Moves a step, or what it was, into a directory that is made for it, if the run is still this
    job's.
    """
    assert isinstance(store, SupportsRename)
    claim = read_claim(store, name)
    if claim is None:  # it has lost its own
        with contextlib.suppress(KeyError, fmt.InvalidRecordError):
            run = _run_in(store.get(f"{name}/{fmt.COMMIT_NAME}"))
            claim = fmt.StepClaim(run or "", step, "", 0, writer_identity(), 0.0)
    if claim is None:
        lease.check()
        raise _not_deleted(store, step, f"{name} has neither its claim nor its marker any more")
    store.put(f"{directory}/{fmt.STEP_NAME}", fmt.dump_claim(claim))
    lease.check()
    try:
        store.rename(name, f"{directory}/{fmt.step_name(step)}")
    except KeyError as error:
        lease.check()  # says who has made it impossible
        gone = directory if f"{name}/" in store.children("") else name
        raise _not_deleted(store, step, f"{gone} has been removed meanwhile") from error


def _not_deleted(store: Store, step: int, reason: str) -> StorageError:
    return StorageError(
        f"Step {step} of {store.root} was not deleted: {reason}. Look again, and delete it then.",
        errno=None,
    )


def _delete_objects(
    store: Store,
    step: int,
    name: str,
    now: float,
    reached: Callable[[str], None],
    replaced: bool,
    lease: Right,
) -> bool:
    """In a bucket: a void marker replaces the marker, then all the rest goes, then that, where
    nobody can come back who writes here.
    """
    assert isinstance(store, SupportsReplace)
    marker, is_the_step = f"{name}/{fmt.COMMIT_NAME}", name == fmt.step_name(step)
    old: bytes | None = None
    with contextlib.suppress(KeyError, fmt.InvalidRecordError):
        old = store.get(marker)
    stays = _may_be_copied_to(store, name, step)
    if stays and old is not None and (given_up := fmt.parse_void(old)) is not None:
        stays = now - given_up.at <= _VOID_SECONDS
        if stays and store.children(name) == [fmt.COMMIT_NAME]:
            return True
    elif stays and old is not None and not _outdate(store, step):
        if replaced:
            return False  # the save that has copied it is replacing the step, and counts on it
        is_the_step = True
    seen: Entry | None = None
    if is_the_step and old is not None:
        seen = next(iter(store.list(marker)), None)
        if seen is None or seen.digest != fmt.digest(old, store.digest_kind):
            return False  # saved again, or about to be
        lease.announce(step, seen.digest)
    run = (old and _run_in(old)) or _run_of(store, name) or _run_of(store, fmt.step_name(step))
    # One that need not stay until somebody's return is old from the start.
    void = fmt.dump_void(run or "", step, secrets.token_hex(8), now if stays else 0.0)
    if old is None:
        is_mine = store.create(marker, void)
    else:
        is_mine = store.replace(marker, old, void, seen=seen)
    if not is_mine:
        return False  # saved again, or about to be; or the run is another job's
    reached("retire")
    return clear_given_up(store, name, void, void_too=not stays)


def _may_be_copied_to(store: Store, name: str, step: int) -> bool:
    """Whether a directory is where a save lets its step step aside to, and that save has not
    committed: its primary may stand still, and go on copying.
    """
    if fmt.parse_aside_name(name) != (step, "replaced"):
        return False
    return _nonce(store, fmt.step_name(step)) != name.rsplit("-", 1)[1]


def _outdate(store: Store, step: int) -> bool:
    """Writes the marker of a step in a bucket once more, the same: then a save that has listed the
    step before, to replace it, cannot do that any more.

    Returns:
        Whether this was done; not where the step is not committed under its own name.
    """
    found = inspect_step(store, step, fmt.step_name(step))
    return _write_once_more(store, found.name, found.digest)  # a step that is not has none


def _write_once_more(store: Store, name: str, digest: str) -> bool:
    """Writes a marker once more if it is the one with this digest; returns whether it was."""
    assert isinstance(store, SupportsReplace)
    key = f"{name}/{fmt.COMMIT_NAME}"
    with contextlib.suppress(KeyError, fmt.InvalidRecordError):
        marker = store.get(key)
        return fmt.digest(marker, digest) == digest and store.replace(key, marker, marker)
    return False


def delete_copy(store: Store, run: str, step: int, name: str) -> None:
    """Deletes what a save in a bucket has copied aside, for that save, when it goes no further. Its
    claim, or even all of it, may have been deleted by another job before.
    """
    assert isinstance(store, SupportsReplace)
    key, void = f"{name}/{fmt.COMMIT_NAME}", fmt.dump_void(run, step, secrets.token_hex(8), 0.0)
    for _ in range(2):  # what is there may go before it is replaced
        with contextlib.suppress(KeyError, fmt.InvalidRecordError):
            if store.create(key, void) or store.replace(key, store.get(key), void):
                clear_given_up(store, name, void, void_too=True)
                return


def fence(
    store: Store,
    run: str,
    older: Sequence[fmt.LeaseRecord],
    now: float,
    is_newest: Callable[[], bool],
) -> None:
    """Keeps jobs that have lost the run from finishing what they have begun, should they go on. For
    the job that has taken it.

    Args:
        older: their leases.
        is_newest: whether nobody has taken it since.
    """
    names, begun = store.children(""), dict[int, list[str]]()
    for name in [child[:-1] for child in names if child.endswith("/")]:
        aside = fmt.parse_aside_name(name)
        if aside is None or aside[1] == "replaced":
            continue
        claim = read_claim(store, name)
        if claim is not None and claim.run == run:
            begun.setdefault(aside[0], []).append(name)
    if not is_newest():  # or what was found may be the next owner's
        return
    if isinstance(store, SupportsRename):
        for step, directories in begun.items():
            for name in directories:
                # What is renamed cannot be given a step's name, nor take one in.
                with contextlib.suppress(KeyError):  # it has gone meanwhile
                    store.rename(name, fmt.aside_name(step, "deleting", secrets.token_hex(8)))
        return
    assert isinstance(store, SupportsReplace)
    for step in begun:
        # Whoever saves it has seen the marker, or that there was none.
        if not _outdate(store, step):
            give_up(store, run, step, secrets.token_hex(8), now)
    for step, digest in [deletion for lease in older for deletion in lease.deleting]:
        for name in (fmt.step_name(step), *_asides(step, names)):
            _write_once_more(store, name, digest)  # it is not what they have seen


def give_up(store: Store, run: str, step: int, nonce: str, now: float) -> bytes | None:
    """Keeps the save that has left the directory of a step in a bucket from ever committing it.

    Returns:
        What stands for its marker now, and is to be replaced by a later one; None when the step is
        committed after all, or another writer is doing the same.
    """
    assert isinstance(store, SupportsReplace)
    key, void = f"{fmt.step_name(step)}/{fmt.COMMIT_NAME}", fmt.dump_void(run, step, nonce, now)
    if store.create(key, void):
        return void
    try:
        there = store.get(key)
    except (KeyError, fmt.InvalidRecordError):
        return None
    if fmt.parse_void(there) is None:
        return None
    return void if store.replace(key, there, void) else None


def clear_given_up(store: Store, name: str, void: bytes, *, void_too: bool = False) -> bool:
    """Deletes what is below a directory in a bucket that `void` is the marker of, the claim last.

    Only what was there while `void` was: a writer that goes on from here replaces that first. So
    whoever stands still in the middle of this, and comes back late, deletes nothing of another's.

    Args:
        void_too: delete `void` at the end.

    Returns:
        Whether the directory is still the caller's: nobody has replaced `void`.
    """
    assert isinstance(store, SupportsReplace)
    there = {entry.key.removeprefix(f"{name}/"): entry for entry in store.list(name)}
    marker = there.pop(fmt.COMMIT_NAME, None)
    if marker is None or marker.digest != fmt.digest(void, store.digest_kind):
        return False
    sign, claim = there.pop(fmt.ORBAX_COMMIT_NAME, None), there.pop(fmt.STEP_NAME, None)
    last = [claim, marker if void_too else None]
    for wave in ([sign], there.values(), last):  # for plain Orbax its sign is what our marker is
        store.delete_listed([entry for entry in wave if entry is not None])
    return True


def find_leftovers(
    store: Store,
    run: str | None,
    *,
    known: Container[int] = (),
    now: float | None = None,
    ended: Mapping[str, Any] | None = None,
) -> list[Leftover]:
    """Returns what crashed saves and deletions of this run left behind. Reads only.

    Args:
        known: steps that are committed, and need not be looked at.
        now: the time, to judge how old void markers are; None leaves these alone.
        ended: a writer whose saves have all ended, on all of its hosts.
    """

    def look(name: str) -> Leftover | None:
        step, aside = fmt.parse_step_name(name), fmt.parse_aside_name(name)
        if step is not None:
            return None if step in known else _leftover(store, run, name, step, "", now, ended)
        return None if aside is None else _leftover(store, run, name, *aside, now, ended)

    names = store.children("")
    looked = for_each(store, look, [name[:-1] for name in names if name.endswith("/")])
    stale = [] if run is None else attempts.find_stale(store, run, names)
    return [
        *(left for left in looked if left is not None),
        *(Leftover(name, step, True) for name, step in stale),
    ]


def find_abandoned(store: Store, run: str | None) -> list[Leftover]:
    """Returns the leftovers that a mere reader may remove: it is in the way of no job that lives.

    What was being deleted on a file system may be the work of the run's owner. It renames a step
    into a directory that it has made, and lists and removes what is in it. Who does that has the
    lease: so that is read when the leftovers are known.
    """
    found = [left for left in find_leftovers(store, run) if left.abandoned]
    if not isinstance(store, SupportsRename):
        return found  # there each deletion is on a condition, and leaves what another one took
    asides = [left for left in found if _is_being_deleted(left.name)]
    lease = newest_lease(store) if asides else None
    if lease is None or lease.released or is_certainly_dead(lease.owner):
        return found
    return [left for left in found if left not in asides]


def _is_being_deleted(name: str) -> bool:
    aside = fmt.parse_aside_name(name)
    return aside is not None and aside[1] in ("deleting", "replaced")


def has_stray_attempts(names: Sequence[str], inspection: Inspection) -> bool:
    """Whether there are attempts to restore a step of which nothing is there, among `names`."""
    there = {candidate.step for candidate in inspection.candidates}
    found = [fmt.parse_attempt_name(name) for name in names]
    return any(parsed is not None and parsed[0] not in there for parsed in found)


def _leftover(
    store: Store,
    run: str | None,
    name: str,
    step: int,
    role: str,
    now: float | None,
    ended: Mapping[str, Any] | None,
) -> Leftover | None:
    names = store.children(name)
    renames, own = isinstance(store, SupportsRename), fmt.step_name(step)
    if names == [fmt.COMMIT_NAME] and not renames:
        return _marker_alone(store, run, name, step, now)
    # On a file system what has no marker was one that has lost it: no crash of ours leaves that.
    is_step = renames or is_committed(store, name, names)
    if is_step and (role == "" or (role == "replaced" and not is_committed(store, own))):
        return None
    if not names and role:
        # Made a moment ago, maybe, by a save that goes on; or all deleted.
        return Leftover(name, step, role == "deleting")
    claim = read_claim(store, name)
    if run is None:
        return None
    unclaimed = claim is None and role in ("staging", "deleting")
    if unclaimed and ended is not None and _is_rest([n for n in names if n != f"{own}/"]):
        return Leftover(name, step, False)
    if (claim.run if claim else _run_of(store, name)) != run:
        return None
    if role == "replaced" and not renames:
        abandoned = not _may_be_copied_to(store, name, step)
    else:
        abandoned = role in ("replaced", "deleting")
        abandoned = abandoned or (claim is not None and is_certainly_dead(claim.writer))
    may_live = claim is not None and not abandoned and claim.writer != ended
    if role == "staging" and not renames and claim is not None and may_live:
        if names != [fmt.STEP_NAME]:
            return Leftover(name, step, False, claim, keep_claim=True)
        if now is None or now - claim.created_at <= _VOID_SECONDS:
            return None
    return Leftover(name, step, abandoned, claim)


def _is_rest(names: Sequence[str]) -> bool:
    """Whether a directory without a claim holds nothing but what a save writes. Hosts of a job that
    has lost the run make one, when they go on after their staging directory was removed.
    """
    written = {"state/", "data/", "metadata/", "hosts/", fmt.TREE_NAME, fmt.COMMIT_NAME}
    written |= {fmt.ORBAX_COMMIT_NAME, "_CHECKPOINT_METADATA"}
    temporary = [name for name in names if name.startswith(".") and name.endswith(".tmp")]
    return written.issuperset(set(names) - set(temporary))


def _run_of(store: Store, name: str) -> str | None:
    """Returns whose a directory in a bucket is: as its claim says; or, when a host that came back
    late has written to it after it was removed, its marker or a host's record.
    """
    if (claim := read_claim(store, name)) is not None:
        return claim.run
    return None if isinstance(store, SupportsRename) else next(_traces(store, name), None)


def _traces(store: Store, name: str) -> Iterator[str]:
    """Yields the runs that a directory's marker and host records name, as far as they do."""
    with contextlib.suppress(KeyError, fmt.InvalidRecordError):
        if run := _run_in(store.get(f"{name}/{fmt.COMMIT_NAME}")):
            yield run
    for record in store.children(f"{name}/hosts"):
        with contextlib.suppress(KeyError, fmt.InvalidRecordError, FormatVersionError):
            yield fmt.parse_record(store.get(f"{name}/hosts/{record}"), record).run
            return


def _run_in(marker: bytes) -> str | None:
    """Returns the run that a marker names, void or not."""
    void = fmt.parse_void(marker)
    try:
        return fmt.parse_marker(marker).run if void is None else void.run
    except (fmt.InvalidRecordError, FormatVersionError):
        return None


def is_ours(store: Store, run: str, name: str) -> bool:
    """Whether a save of this run may put its step in the place of a directory: a job of the run has
    made it.
    """
    if _run_of(store, name) == run:
        return True
    if run in _traces(store, name):  # the claim may be damaged, or lost
        return True
    return not isinstance(store, SupportsRename) and not store.children(name)  # gone meanwhile


def _nonce(store: Store, name: str) -> str | None:
    """Returns which save has committed a directory."""
    try:
        return fmt.parse_marker(store.get(f"{name}/{fmt.COMMIT_NAME}")).nonce
    except (KeyError, fmt.InvalidRecordError, FormatVersionError):
        return None


def _marker_alone(
    store: Store, run: str | None, name: str, step: int, now: float | None
) -> Leftover | None:
    """A void marker alone stays until the save that it stops must have met its deadline. Any other
    one alone is of a step that has gone: jobs in each other's way can leave it.
    """
    try:
        data = store.get(f"{name}/{fmt.COMMIT_NAME}")
        void = fmt.parse_void(data)
        if void is None:
            is_ours = fmt.parse_marker(data).run == run
            return Leftover(name, step, True, only_marker=True) if is_ours else None
    except (KeyError, fmt.InvalidRecordError, FormatVersionError):
        return None
    old = now is not None and now - void.at > _VOID_SECONDS
    # At the step's own name it stays while a copy is the step: the marker of a save that comes back
    # late would hide that copy.
    hides = name == fmt.step_name(step) and _is_aside(store, step)
    return Leftover(name, step, True) if old and not hides else None


def read_claim(store: Store, name: str) -> fmt.StepClaim | None:
    """Returns whose a directory is; None when it does not say so."""
    try:
        return fmt.parse_claim(store.get(f"{name}/{fmt.STEP_NAME}"))
    except (fmt.InvalidRecordError, FormatVersionError, KeyError):
        return None


def remove_leftovers(
    store: Store,
    leftovers: Sequence[Leftover],
    *,
    run: str | None = None,
    now: float = 0.0,
) -> list[str]:
    """Removes leftovers; returns their names. One that cannot be removed is logged and stays.

    Args:
        run, now: this run and the time, for void markers; needed in a bucket.
    """
    removed = []
    for leftover in leftovers:
        try:
            if not _remove_leftover(store, leftover, run, now):
                continue
        except Exception as error:
            logger.warning(
                "could not remove the leftover %s of %s: %s",
                leftover.name,
                store.root,
                describe(error),
            )
        else:
            logger.warning(
                "removed %s/%s: a save, a deletion or a restore of step %d did not end",
                store.root,
                leftover.name,
                leftover.step,
            )
            removed.append(leftover.name)
    return removed


def _remove_leftover(store: Store, leftover: Leftover, run: str | None, now: float) -> bool:
    step, name = leftover.step, leftover.name
    if fmt.parse_attempt_name(name) is not None:
        attempts.remove_attempts(store, run, step, [name])
        return True
    aside = fmt.parse_aside_name(name)
    if isinstance(store, SupportsRename):
        return _delete_directory(store, step, name, now=now)
    if leftover.only_marker:
        return _delete_lone_marker(store, name)
    if aside is not None and aside[1] == "staging":
        _clear_staging(store, name, keep_claim=leftover.keep_claim)
        return True
    if aside is not None:
        return _delete_directory(store, step, name, now=now, replaced=True)
    assert run is not None

    def is_another() -> bool:
        claim = read_claim(store, name)
        return claim is not None and claim != leftover.claim

    if is_another():
        return False  # taken over by a save that may go on
    void = give_up(store, run, step, secrets.token_hex(8), now)
    if void is None or is_another():
        return False  # committed after all, or taken over
    # Where it is abandoned, hardly anybody is left whom the void marker would stop.
    void_too = leftover.abandoned and not _is_aside(store, step)
    return clear_given_up(store, name, void, void_too=void_too)


def _delete_lone_marker(store: Store, name: str) -> bool:
    """Deletes a marker that speaks for nothing; returns whether it still does."""
    assert isinstance(store, SupportsReplace)
    listed = store.list(f"{name}/{fmt.COMMIT_NAME}")
    # A void one says something: that a save which comes back may not commit here.
    if store.children(name) != [fmt.COMMIT_NAME] or _nonce(store, name) is None:
        return False
    store.delete_listed(listed)  # unless it was written again since
    return True


def _clear_staging(store: Store, name: str, *, keep_claim: bool) -> None:
    assert isinstance(store, SupportsReplace)
    listing, claim = store.list(name), f"{name}/{fmt.STEP_NAME}"
    store.delete_listed([entry for entry in listing if entry.key != claim])
    if not keep_claim:
        store.delete_listed([entry for entry in listing if entry.key == claim])


def retire(
    store: Store,
    steps: Sequence[int],
    *,
    now: float,
    lease: Right = _UNGUARDED,
    reached: Callable[[str], Any],
) -> list[int]:
    """Deletes steps by policy. Never raises: a failed deletion does not fail the save that asked
    for it.
    """
    deleted = []
    for step in steps:
        try:
            is_gone = delete_step(store, step, now=now, lease=lease, reached=reached)
        except Exception as error:
            logger.warning(
                "could not delete step %d of %s: %s. It is tried again.",
                step,
                store.root,
                describe(error),
            )
        else:
            deleted += [step] if is_gone else []
    return deleted
