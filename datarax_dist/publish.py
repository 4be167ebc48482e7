"""The last act of a save, on the primary: what was staged becomes the step.

On a file system the marker is created in the staging directory, which then gets the step's name: at
once, and only if there is none of that name. A bucket cannot rename. There what was staged is
copied to the step's name, each object on the condition that there is none; then the marker is
created there, on a condition too, and that is what makes the step count. So of several writers one
commits, and one that was believed dead can never change what another has committed.

A committed step that is saved again steps aside before, to `<step>.replaced-<nonce>`: it stays the
step until its successor is there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from datarax_dist import format as fmt
from datarax_dist import retention
from datarax_dist.errors import CheckpointError, StepExistsError, StorageError
from datarax_dist.inspection import compare, is_committed
from datarax_dist.storage import Entry, Store, SupportsRename, SupportsReplace
from datarax_dist.telemetry import Phases

__all__ = ["Staged", "check_free", "check_listing", "publish"]


@dataclass(frozen=True, slots=True)
class Staged:
    """What one save has staged.

    Attributes:
        directory: the staging directory.
        files: everything in it, by its path; without the marker. Digests as far as they are known.
        claim: the content of its `STEP.json`.
        marker: the content that `COMMIT.json` gets.
        last: path -> content, of those `files` that are written just before the marker, and not
            there yet.
        may_replace: whether the step may be committed already, by the name of its directory.
    """

    run: str
    step: int
    nonce: str
    directory: str
    files: Mapping[str, fmt.FileEntry] = field(default_factory=dict)
    claim: bytes = b""
    marker: bytes = b""
    last: Mapping[str, bytes] = field(default_factory=dict)
    may_replace: Callable[[str], bool] = lambda name: False

    @property
    def name(self) -> str:
        return fmt.step_name(self.step)

    @property
    def aside(self) -> str:
        """What the step that is saved again is called until its successor is there."""
        return fmt.aside_name(self.step, "replaced", self.nonce)


def check_free(
    store: Store, run: str, step: int, names: Sequence[str], may_replace: Callable[[str], bool]
) -> None:
    """Raises when a step may not be saved, as something is in its place.

    Args:
        names: what is in the root.
        may_replace: whether a committed step may be saved again, by the name of its directory.

    Raises:
        StepExistsError: there is a committed step, or something that no job of this run has made.
    """
    name = fmt.step_name(step)
    there = [
        child[:-1]
        for child in names
        if child == f"{name}/" or fmt.parse_aside_name(child.rstrip("/")) == (step, "replaced")
    ]
    committed = [holder for holder in there if is_committed(store, holder)]
    if name in committed:
        committed = [name]  # beside it the others are what it was before
    if not all(map(may_replace, committed)):
        raise StepExistsError(
            f"Step {step} is committed in {store.root} already; nothing was changed."
            f" Delete it first (delete({step}), on every host), or save to another root.",
            step=step,
        )
    if (name in there and not retention.is_ours(store, run, name)) or name in names:
        raise _not_ours(store, name, step)


def publish(
    store: Store, staged: Staged, now: float, phases: Phases, check: Callable[[], None]
) -> bool:
    """Makes what was staged the step. Returns whether something has stepped aside for it.

    Args:
        now: seconds since 1970.
        check: raises when the save has failed already, or its time is up.

    Raises:
        StepExistsError: the step is another one's.
        StorageError: it is not committed; or, where the marker itself could not be written in a
            bucket, it may be.
    """
    if isinstance(store, SupportsRename):
        return _publish_by_renaming(store, staged, phases, check)
    try:
        return _publish_by_copying(store, staged, now, phases, check)
    except CheckpointError:
        with contextlib.suppress(CheckpointError):
            _withdraw(store, staged, now)
        raise


def check_listing(store: Store, directory: str, staged: Staged, *, void: bool = False) -> None:
    """Raises unless a directory holds what the records name: nothing missing, more, other.

    Args:
        void: there is a void marker beside it.
    """
    expected = [entry for path, entry in staged.files.items() if path not in staged.last]
    names = {entry.path for entry in expected} | ({fmt.COMMIT_NAME} if void else set())

    def differences() -> list[str]:
        listing = store.list(directory)
        there = {entry.key.removeprefix(f"{directory}/") for entry in listing}
        return sorted({*(there - names), *compare(listing, directory, expected)})

    # Twice: a listing may be damaged on its way.
    if wrong := differences() and differences():
        raise StorageError(
            f"Step {staged.step} is not committed: the listing of {store.root}/{directory} and what"
            f" the hosts wrote differ in {', '.join(wrong[:10])}. Does another job write to this"
            " run? Is this one storage, shared by all hosts?"
        )


# File systems


def _publish_by_renaming(
    store: Store, staged: Staged, phases: Phases, check: Callable[[], None]
) -> bool:
    assert isinstance(store, SupportsRename)
    with phases.span("commit"):
        check()
        for path, content in staged.last.items():
            store.put(f"{staged.directory}/{path}", content)
        if not store.create(f"{staged.directory}/{fmt.COMMIT_NAME}", staged.marker):
            raise _other_writer(store, staged)
        # Where another job has renamed the directory, this has made a new one.
        if fmt.STEP_NAME not in store.children(staged.directory):
            raise _staging_removed(store, staged)
    with phases.span("publish"):
        names = store.children(staged.name)
        committed = fmt.COMMIT_NAME in names
        if committed and not staged.may_replace(staged.name):
            raise _other_writer(store, staged)
        # What has lost its marker steps aside, too.
        aside = retention.is_ours(store, staged.run, staged.name)
        if committed and not aside:
            raise _not_ours(store, staged.name, staged.step)
        check()  # from here on only what is there is renamed: see `retention.fence`
        if aside:
            store.rename(staged.name, staged.aside)
        try:
            store.rename(staged.directory, staged.name)
        except KeyError as error:
            if aside:
                with contextlib.suppress(KeyError, StorageError):
                    store.rename(staged.aside, staged.name)
            raise _staging_removed(store, staged) from error
    return aside


# Buckets


def _publish_by_copying(
    store: Store, staged: Staged, now: float, phases: Phases, check: Callable[[], None]
) -> bool:
    assert isinstance(store, SupportsReplace)
    name, marker = staged.name, staged.marker
    with phases.span("publish"):
        check()
        void = _make_room(store, staged, now, check)
        if not store.create(f"{name}/{fmt.STEP_NAME}", staged.claim):
            raise _other_writer(store, staged)
        late = {fmt.STEP_NAME, *staged.last}
        try:
            store.copy(staged.directory, name, [path for path in staged.files if path not in late])
        except KeyError as error:
            raise _staging_removed(store, staged) from error
        check_listing(store, name, staged, void=void is not None)
        for path, content in staged.last.items():
            if not store.create(f"{name}/{path}", content):
                raise _other_writer(store, staged)
        check()
    with phases.span("commit"):
        key = f"{name}/{fmt.COMMIT_NAME}"
        made = store.create(key, marker) if void is None else store.replace(key, void, marker)
        if not made:
            raise _other_writer(store, staged)
        _check_still_there(store, staged)
    return void is not None


def _make_room(store: Store, staged: Staged, now: float, check: Callable[[], None]) -> bytes | None:
    """Removes what is below the step's name: what a save that did not end has left, or the step
    that is saved again. Returns the void marker that is to be replaced by ours, if there is one.
    """
    name = staged.name
    if not (names := store.children(name)):
        return None
    if (committed := is_committed(store, name, names)) and not staged.may_replace(name):
        raise _other_writer(store, staged)
    if not retention.is_ours(store, staged.run, name):
        raise _not_ours(store, name, staged.step)
    if committed:
        void = fmt.dump_void(staged.run, staged.step, staged.nonce, now)
        _step_aside(store, staged, void, check)
    else:
        given_up = retention.give_up(store, staged.run, staged.step, staged.nonce, now)
        if given_up is None:
            raise _other_writer(store, staged)
        void = given_up
    if not retention.clear_given_up(store, name, void):
        raise _other_writer(store, staged)  # now, rather than after everything was copied
    return void


def _step_aside(store: Store, staged: Staged, void: bytes, check: Callable[[], None]) -> None:
    """Copies the step aside, and then puts a void marker in the place of its own."""
    assert isinstance(store, SupportsReplace)
    key = f"{staged.name}/{fmt.COMMIT_NAME}"
    try:
        old, seen = _copy_aside(store, staged)
        check()
    except (KeyError, CheckpointError) as error:
        with contextlib.suppress(CheckpointError):
            retention.delete_copy(store, staged.run, staged.step, staged.aside)
        if isinstance(error, KeyError):  # another job has changed the step
            raise _other_writer(store, staged) from error
        raise
    # Who takes the run over, or removes copies of a step, writes its marker once more before: then
    # it is not as seen.
    if not store.replace(key, old, void, seen=seen):
        # Another job has changed the step. But ours may have been the first to do so, if that reply
        # was lost, and that job has cleared away what was left: then the copy is the step.
        if is_committed(store, staged.name):
            retention.delete_copy(store, staged.run, staged.step, staged.aside)
            with contextlib.suppress(KeyError):
                if store.get(key) == old:
                    raise _not_aside(store, staged)
        raise _other_writer(store, staged)


def _copy_aside(store: Store, staged: Staged) -> tuple[bytes, Entry]:
    """Returns the step's marker, and how it was listed before anything was copied. The marker is
    written last, when what was copied is known to be what it speaks for.
    """
    assert isinstance(store, SupportsReplace)
    name, aside = staged.name, staged.aside
    key = f"{name}/{fmt.COMMIT_NAME}"
    old = store.get(key)
    entries = {entry.key.removeprefix(f"{name}/"): entry for entry in store.list(name)}
    seen, claim = entries[fmt.COMMIT_NAME], fmt.STEP_NAME
    if seen.digest != fmt.digest(old, store.digest_kind):
        raise _not_aside(store, staged)
    rest = [path for path in entries if path not in (claim, fmt.COMMIT_NAME)]
    for wave in ([claim] if claim in entries else [], rest):
        store.copy(name, aside, wave)
    files = [fmt.FileEntry(path, e.size, e.digest) for path, e in entries.items()]
    # A step changes only after its marker has.
    if store.list(key) == [seen]:
        store.create(f"{aside}/{fmt.COMMIT_NAME}", old)
    if compare(store.list(aside), aside, files):
        raise _not_aside(store, staged)
    return old, seen


def _check_still_there(store: Store, staged: Staged) -> None:
    """This host may have stood still before it made the marker, for so long that another job has
    saved this step, and deleted it again. Then the marker goes, too.
    """
    assert isinstance(store, SupportsReplace)
    name = staged.name
    for _ in range(2):  # a listing may be damaged on its way
        listing = store.list(name)
        if not compare(listing, name, staged.files.values()):
            return
    key = f"{name}/{fmt.COMMIT_NAME}"
    with contextlib.suppress(KeyError):  # it is gone, too
        if store.get(key) == staged.marker:
            store.delete_listed([entry for entry in listing if entry.key == key])
    raise StepExistsError(
        f"Another job has deleted or replaced what this one has saved as step {staged.step} in"
        f" {store.root}, before this save was over. Only one job at a time may write to a run.",
        step=staged.step,
    )


def _withdraw(store: Store, staged: Staged, now: float) -> None:
    """Takes back what this save has copied to where another job has removed the rest, and the
    claim: nobody would know whose it is.
    """
    assert isinstance(store, SupportsReplace)
    name = staged.name

    def ours() -> list[Entry]:
        there = {entry.key.removeprefix(f"{name}/"): entry for entry in store.list(name)}
        if fmt.STEP_NAME in there:
            return []  # who finds it can tell
        return [
            entry
            for path, entry in there.items()
            if path in staged.files and staged.files[path].digest == entry.digest
        ]

    # Another save may have found what is there to be what it copies itself: it must not commit.
    void = fmt.dump_void(staged.run, staged.step, staged.nonce, now)
    if ours() and store.create(f"{name}/{fmt.COMMIT_NAME}", void):
        store.delete_listed(ours())


# Errors


def _not_ours(store: Store, name: str, step: int) -> StepExistsError:
    return StepExistsError(
        f"{store.root}/{name} is there already and is no step of this run; nothing was changed."
        " Move it away, or save another step.",
        step=step,
    )


def _other_writer(store: Store, staged: Staged) -> StepExistsError:
    return StepExistsError(
        f"Another job has committed step {staged.step} in {store.root}, or is about to; that one"
        " stays. Only one job at a time may write to a run.",
        step=staged.step,
    )


def _staging_removed(store: Store, staged: Staged) -> StorageError:
    return StorageError(
        f"Another job has removed what this one staged in {store.root}/{staged.directory}. Only one"
        " job at a time may write to a run."
    )


def _not_aside(store: Store, staged: Staged) -> StorageError:
    return StorageError(
        f"Step {staged.step} of {store.root} is not saved again, and stays as it is: another job"
        f" has written to it, or to {staged.aside}, in this moment. Only one job at a time may"
        " write to a run; when there is one, save it again."
    )
