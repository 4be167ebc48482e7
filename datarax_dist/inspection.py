"""What a root holds: which directories are steps, which are not and why, and whether the files of a
step are whole. Reads only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datarax_dist import errors
from datarax_dist import format as fmt
from datarax_dist.errors import (
    CorruptStepError,
    FormatVersionError,
    InvalidArgumentError,
    StepNotFoundError,
    StorageError,
)
from datarax_dist.storage import Entry, Store, SupportsRename, for_each

__all__ = [
    "Candidate",
    "Inspection",
    "compare",
    "files_to_verify",
    "find_irregular",
    "find_run",
    "has_moved",
    "inspect_run",
    "inspect_step",
    "inspection_from_json",
    "inspection_to_json",
    "is_as_judged",
    "is_committed",
    "no_such_step",
    "read_marker",
    "read_records",
    "refuse_a_step",
    "records_verified_by",
    "verify_files",
]

logger = logging.getLogger("datarax_dist")

_TRIES = 20
_MOST_ORBAX_BYTES = 2 << 30
_ORBAX_TIMES = 16  # what Orbax says of each leaf is at most 10 times what TREE.json does
_LOOKS = 5  # at what a job that is saving may have moved: each would have to meet another save
_MOST_OTHERS = 20  # directories that are looked into, where no step is


@dataclass(frozen=True, slots=True)
class Candidate:
    """A directory that may be a step.

    Attributes:
        state: "committed", "staged" (a claim, no marker), "deleting", "foreign" (plain Orbax),
            "damaged" (its marker does not check), "refused" (of another run, a newer format, or
            nothing of ours at all), "void" (nothing but what keeps a given-up save from committing;
            in buckets).
        reason: why it is not committed; empty when it is.
        marker: as read; not known on a host that was only told of the candidate.
        files: what is missing or damaged.
        digest: of the marker of a committed one.
        version: the format version, where it is newer than ours.
        suspect: why a restore passes over a committed one; empty when it does not
            (`attempts.mark_suspects`).
        void: the digest of a void marker; empty where there is none.
        moves: a job that saves or deletes may have changed it while it was looked at.
    """

    step: int
    name: str
    state: str
    reason: str = ""
    marker: fmt.CommitMarker | None = None
    files: Sequence[str] = ()
    digest: str = ""
    version: int = 0
    suspect: str = ""
    void: str = ""
    moves: bool = False


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a root holds. Known on the primary: `attempts`, the names of its restores that have not
    ended; `others`, of directories that are not ours.
    """

    run: str | None
    candidates: Sequence[Candidate]
    attempts: Sequence[str] = ()
    others: Sequence[str] = ()

    @property
    def committed(self) -> list[int]:
        return sorted(c.step for c in self.candidates if c.state == "committed")

    @property
    def unmarked(self) -> list[int]:
        """Steps that have their name, and no marker. Where directories are renamed, a step has its
        marker first: these have lost it.
        """
        named = (c for c in self.candidates if c.name == fmt.step_name(c.step))
        return sorted(c.step for c in named if c.state == "staged")


def find_run(store: Store) -> str | None:
    """Returns the run that a root belongs to; None when nothing of ours is in it.

    Raises:
        CorruptStepError: `RUN.json` is lost, and there are steps of several runs.
        FormatVersionError: a newer version has made the run.
    """
    try:
        return fmt.parse_run(_read(store, fmt.RUN_NAME))
    except (KeyError, fmt.InvalidRecordError):
        return inspect_run(store).run


def refuse_a_step(store: Store, names: Sequence[str]) -> None:
    """Raises when a root, in which `names` are, is itself a step of a run: it would be taken for a
    run without steps, which begins anew.

    Raises:
        InvalidArgumentError: it is.
    """
    if fmt.COMMIT_NAME in names and fmt.STEP_NAME in names:
        above, _, name = store.root.rpartition("/")
        raise InvalidArgumentError(
            f"{store.root} is a step, and no root of a run. The root is {above}, it seems;"
            f" restore(step={name}) takes that step."
        )


def inspect_run(store: Store) -> Inspection:
    """Returns every directory of a root that looks like a step, newest first, with what it is and
    why. Reads markers only.

    Raises:
        InvalidArgumentError: the root is a step itself.
        StorageError: steps are moved all the time while it looks.
    """
    before: Any = None
    for _ in range(_TRIES):
        names = store.children("")
        refuse_a_step(store, names)
        inspection = _inspect(store, names)
        # In a bucket markers come and go inside the directories. Looked at one after another, the
        # new step may have had none yet, and the old one none any more.
        steps = [c for c in inspection.candidates if c.name == fmt.step_name(c.step)]
        states = [(c.name, c.state, c.digest, c.void) for c in inspection.candidates]
        settled = not any(c.moves for c in inspection.candidates) and (
            isinstance(store, SupportsRename)
            or states == before
            or all(c.state == "committed" for c in steps)
        )
        # Nothing was renamed, made or removed meanwhile, by a job that is saving; and the listing
        # was not damaged on its way, which would hide a step.
        if settled and _lasting(store.children("")) == _lasting(names):
            break
        before = states
    else:
        if not settled:
            raise StorageError(
                f"{store.root} changed {_TRIES} times while it was looked at. Is a job saving and"
                " deleting steps faster than they can be read?",
                errno=None,
            )
    attempts = [name for name in names if fmt.parse_attempt_name(name) is not None]
    others = [name for name in names if name == "_METADATA" or _may_be_other(name)]
    return dataclasses.replace(inspection, attempts=tuple(attempts), others=tuple(others))


def _lasting(names: Sequence[str]) -> list[str]:
    """Returns names of a root without those that come and go with each restore of any job."""
    return [name for name in names if fmt.parse_attempt_name(name) is None]


def _inspect(store: Store, names: Sequence[str]) -> Inspection:
    run: str | None = None
    if fmt.RUN_NAME in names:
        try:
            run = fmt.parse_run(_read(store, fmt.RUN_NAME))
        except (KeyError, fmt.InvalidRecordError) as error:
            logger.warning(
                "%s of %s is damaged (%s); the run is taken from its steps",
                fmt.RUN_NAME,
                store.root,
                errors.describe(error),
            )

    def look(name: str) -> Candidate | None:
        step, aside = fmt.parse_step_name(name), fmt.parse_aside_name(name)
        if step is not None:
            return inspect_step(store, step, name)
        return None if aside is None else _inspect_aside(store, *aside, name)

    looked = for_each(store, look, [name[:-1] for name in names if name.endswith("/")])
    found = [candidate for candidate in looked if candidate is not None]
    empty = _empty(store, [c.name for c in found if c.moves and c.state == "refused"])
    found = [dataclasses.replace(c, moves=False) if c.name in empty else c for c in found]
    if isinstance(store, SupportsRename):
        found += [
            Candidate(step, name, "refused", "a symbolic link or a file, not a directory")
            for name in names
            if (step := fmt.parse_step_name(name)) is not None
        ]
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
    return Inspection(run, sorted(_one_each(judged), key=lambda c: (c.step, c.name), reverse=True))


def _one_each(found: Sequence[Candidate]) -> list[Candidate]:
    """Of several directories that were a step, before saves that have not ended, the newest is: of
    the last job, and by the clock of one job only.
    """
    newest: dict[int, tuple[int, float, str]] = {}
    for c in found:
        if c.state == "committed" and c.marker is not None:
            age = c.marker.epoch, c.marker.committed_at, c.name
            newest[c.step] = max(newest.get(c.step, age), age)
    return [
        Candidate(c.step, c.name, "deleting", f"an older step {c.step}: it was saved again")
        if c.state == "committed" and newest[c.step][2] != c.name
        else c
        for c in found
    ]


def _inspect_aside(store: Store, step: int, role: str, name: str) -> Candidate:
    if role == "staging":
        return Candidate(step, name, "staged", "its save did not end: a staging directory")
    if role == "deleting":
        return Candidate(step, name, "deleting", "its deletion did not end")
    if not is_committed(store, fmt.step_name(step)):
        return inspect_step(store, step, name)  # it is the step until its successor is committed
    if not isinstance(store, SupportsRename) and store.children(name) == [fmt.COMMIT_NAME]:
        candidate = inspect_step(store, step, name)
        if candidate.state == "void":
            return candidate
    return Candidate(step, name, "deleting", f"the old step {step}: it was saved again")


def is_committed(store: Store, name: str, names: Iterable[str] | None = None) -> bool:
    """Whether a directory has a marker. `names` are its children, where they are known."""
    if fmt.COMMIT_NAME not in (store.children(name) if names is None else names):
        return False
    if isinstance(store, SupportsRename):
        return True  # only buckets have void ones
    try:
        return fmt.parse_void(store.get(f"{name}/{fmt.COMMIT_NAME}")) is None
    except (KeyError, fmt.InvalidRecordError):
        return False


def _read(store: Store, key: str) -> bytes:
    """Returns a record.

    Raises:
        InvalidRecordError: it is there and cannot be read, now or later.
        KeyError: it is not there.
        StorageError: it may be read another time.
    """
    try:
        return store.get(key)
    except StorageError as error:
        if errors.is_passing(error):
            raise
        raise fmt.InvalidRecordError(f"{key} cannot be read: {error}") from error


# Says what is wrong with the host records that a marker names, as far as a listing tells.
_Wrong = Callable[[Sequence[fmt.FileEntry]], dict[str, str]]


def _look_inside(store: Store, name: str) -> tuple[set[str], _Wrong]:
    """Returns the names in a step's directory, and what tells of its host records; of a bucket in
    one listing, which has their sizes and digests, too.
    """
    if not isinstance(store, SupportsRename):
        entries = store.list(name)
        keys = [entry.key.removeprefix(f"{name}/") for entry in entries]
        return {key.split("/")[0] for key in keys}, lambda rows: compare(entries, name, rows)
    inside, there = set(store.children(name)), set(store.children(f"{name}/hosts"))
    return inside, lambda rows: {
        row.path: "missing" for row in rows if row.path.removeprefix("hosts/") not in there
    }


def _empty(store: Store, names: Iterable[str]) -> set[str]:
    """Returns which directories are there, and nothing in them. A step has another name for a
    moment while it is saved again. The root is listed once for all of them, at each look: there may
    be thousands.
    """
    empty = set(names)
    for _ in range(_LOOKS):
        if not empty:
            break
        there = set(store.children(""))
        rows = sorted(name for name in empty if f"{name}/" in there)
        inside = for_each(store, store.children, rows)
        empty = {name for name, found in zip(rows, inside, strict=True) if not found}
    return empty


def _lacks(store: Store, name: str, data: bytes, records: Sequence[fmt.FileEntry]) -> bool:
    """Whether all of these host records are missing, or are others, beside a marker. Another
    version may have taken the place of the one that they were looked for in.
    """
    for _ in range(_LOOKS):
        _, wrong = _look_inside(store, name)
        try:
            stays = _read(store, f"{name}/{fmt.COMMIT_NAME}") == data
        except (KeyError, fmt.InvalidRecordError):
            stays = False
        if not stays or len(wrong(records)) < len(records):
            return False
    return True


def _is_unreadable(store: Store, name: str) -> bool:
    """Whether a marker cannot be read, or is none, at another look, too."""
    try:
        fmt.parse_marker(_read(store, f"{name}/{fmt.COMMIT_NAME}"))
    except fmt.InvalidRecordError:
        return True
    except (KeyError, FormatVersionError):
        pass
    return False


def no_such_step(root: str, step: int, inspection: Inspection, told: str = "") -> StepNotFoundError:
    """Returns the error of a step that was asked for and is not there."""
    return StepNotFoundError(
        f"There is no committed step {step} in {root}; there are"
        f" {inspection.committed or 'none'}.{told}",
        step=step,
    )


def inspect_step(store: Store, step: int, name: str) -> Candidate:
    """Returns what one directory is, for all that its name says. An empty one may have been moved:
    see `_empty`.
    """
    inside, wrong_of = _look_inside(store, name)
    if fmt.COMMIT_NAME in inside:
        try:
            data = _read(store, f"{name}/{fmt.COMMIT_NAME}")
            if fmt.parse_void(data) is not None:
                return Candidate(
                    step,
                    name,
                    "void" if inside == {fmt.COMMIT_NAME} else "staged",
                    "no marker: its save was given up, or it is being deleted",
                    void=fmt.digest(data),
                )
            marker = fmt.parse_marker(data)
        except FormatVersionError as error:
            return Candidate(step, name, "refused", str(error), version=error.found)
        except KeyError as error:
            if fmt.COMMIT_NAME not in store.children(name):
                return Candidate(step, name, "deleting", "it is being deleted", moves=True)
            files = (fmt.COMMIT_NAME,)
            return Candidate(step, name, "damaged", f"{error}", files=files, moves=True)
        except fmt.InvalidRecordError as error:
            moves = not _is_unreadable(store, name)
            files = (fmt.COMMIT_NAME,)
            return Candidate(step, name, "damaged", f"{error}", files=files, moves=moves)
        if marker.step != step:
            return Candidate(
                step, name, "refused", f"its marker is that of step {marker.step}: was it renamed?"
            )
        if wrong := wrong_of(marker.records):
            # Others: a marker that came late, when another save of this step had begun here.
            how = "missing" if set(wrong.values()) == {"missing"} else "not those of its marker"
            rows = [row for row in marker.records if row.path in wrong]
            return Candidate(
                step,
                name,
                "damaged",
                f"host records are {how}: {errors.printable(', '.join(list(wrong)[:5]))}",
                files=tuple(wrong),
                moves=not _lacks(store, name, data, rows),
            )
        return Candidate(step, name, "committed", marker=marker, digest=fmt.digest(data))
    # What was listed may be a step that was moved, and is being deleted under another name.
    moves = not inside or inside != _look_inside(store, name)[0]
    if fmt.STEP_NAME in inside:
        state = "staged"
        reason = f"no {fmt.COMMIT_NAME}: never committed, or the marker is lost"
    elif "_CHECKPOINT_METADATA" in inside or "_METADATA" in inside:
        state = "foreign"
        reason = "written by plain Orbax: no marker of ours, so nothing can be verified"
    else:
        state = "refused"
        reason = f"no {fmt.COMMIT_NAME} and no {fmt.STEP_NAME}: not a step of ours"
    return Candidate(step, name, state, reason, moves=moves)


def find_foreign(store: Store, name: str) -> str:
    """Returns which directory of a step of plain Orbax has its state: that of an item that is named
    as ours, or as Orbax names one that has no name, or the only one there is; else the step's.

    Raises:
        InvalidArgumentError: there are several others.
    """
    inside = store.children(name)
    for item in ("state/", "default/", "pytree/"):
        if item in inside:
            return f"{name}/{item[:-1]}"
    if "_METADATA" in inside:
        return name
    items = [
        item[:-1]
        for item in inside
        if item.endswith("/") and "_METADATA" in store.children(f"{name}/{item[:-1]}")
    ]
    if len(items) > 1:
        raise InvalidArgumentError(
            f"{store.root}/{name} was written by plain Orbax, with the items"
            f" {errors.printable(', '.join(sorted(items)))}, of which none is named 'state' or"
            " 'default': which one is the state? Restore it with Orbax, and save it here."
        )
    return f"{name}/{items[0]}" if items else name


def others_of_orbax(store: Store, others: Sequence[str]) -> str:
    """Returns which of some directories, that are not ours, plain Orbax has written; empty if none,
    or if they cannot be read.
    """
    if "_METADATA" in others:
        return "the root itself is one checkpoint"
    marks = {"_METADATA", "_CHECKPOINT_METADATA"}
    found = []
    for name in others[:_MOST_OTHERS]:
        with contextlib.suppress(StorageError):
            there = set(store.children(name[:-1]))
            if marks & there and fmt.STEP_NAME not in there:
                found.append(name[:-1])
    return errors.printable(", ".join(found))


def _may_be_other(name: str) -> bool:
    """Whether a name in a root may be a step of somebody else's: a directory with a number in its
    name, none of ours, and none of Orbax's for what has not ended.
    """
    plain = name.removesuffix("/")
    return (
        plain != name
        and any(char.isdigit() for char in plain)
        and fmt.parse_step_name(plain) is None
        and fmt.parse_aside_name(plain) is None
        and ".orbax-checkpoint-tmp" not in name
    )


def verify_files(
    store: Store,
    directory: str,
    files: Sequence[fmt.FileEntry],
    level: str,
    *,
    read_all: bool = True,
    whole: bool = True,
    progress: Callable[[int], None] = lambda n: None,
) -> dict[str, str]:
    """Returns what is wrong with `files`: path -> reason.

    Level "marker" looks for what is no file: a link may lead out of the step, a FIFO would be
    waited for. Level "sizes" compares sizes, and digests where the listing has them. Level "full"
    reads every byte; with `read_all=False` not of files whose digest the listing has.

    Args:
        whole: list the whole directory. Otherwise only `files` are looked at: of n hosts one is to
            see everything, lest the storage be asked for n times what n hosts have written.
    """
    if not isinstance(store, SupportsRename) and (level == "marker" or not files):
        return {}

    def look() -> list[Entry]:
        if whole:
            return store.list(directory)
        found = for_each(store, lambda e: store.list(f"{directory}/{e.path}"), files)
        return [entry for entries in found for entry in entries]

    listing = look() if whole or level != "marker" else []
    wrong = find_irregular(listing, directory)
    if level == "marker":
        return wrong
    wrong |= compare(listing, directory, files)
    if wrong and not isinstance(store, SupportsRename):
        # The listing itself may have been damaged on its way: what is wrong is so twice.
        second = look()
        again = find_irregular(second, directory) | compare(second, directory, files)
        wrong = {path: reason for path, reason in again.items() if path in wrong}
    if level != "full":
        return wrong
    digests = {} if read_all else {e.key.removeprefix(f"{directory}/"): e.digest for e in listing}

    def check(entry: fmt.FileEntry) -> str | None:
        try:
            key = f"{directory}/{entry.path}"
            found = store.digest(key, entry.size, like=entry.digest)
            if found != (entry.size, entry.digest) and not isinstance(store, SupportsRename):
                # It may have been damaged on its way: what is wrong is so twice.
                found = store.digest(key, entry.size, like=entry.digest)
        except (KeyError, StorageError) as error:
            if errors.is_passing(error):
                raise
            return f"cannot be read: {error}"
        progress(entry.size)
        return None if found == (entry.size, entry.digest) else "its content has changed (checksum)"

    unread = [
        entry
        for entry in files
        if entry.path not in wrong and not fmt.same_kind(digests.get(entry.path, ""), entry.digest)
    ]
    reasons = for_each(store, check, unread)
    return wrong | {e.path: r for e, r in zip(unread, reasons, strict=True) if r is not None}


def find_irregular(listing: Iterable[Entry], directory: str) -> dict[str, str]:
    """Returns what in a listing is never opened, as it is no file, or too large for what it is:
    path -> what it is.
    """
    listed = {entry.key.removeprefix(f"{directory}/"): entry for entry in listing}
    tree = listed.get(fmt.TREE_NAME)
    wrong = {}
    for path, entry in listed.items():
        most = _most_orbax_bytes(path, tree.size if tree is not None else None)
        if entry.irregular:
            wrong[path] = f"it is {entry.irregular}, not a file"
        elif most is not None and entry.size > most:
            wrong[path] = f"it has {entry.size} bytes; Orbax writes at most {most} to such a file"
    return wrong


def _most_orbax_bytes(path: str, tree_bytes: int | None) -> int | None:
    """Returns how large a file of a step may be that Orbax reads as a whole before any array; None
    for any other one.

    Args:
        path: relative to the step.
        tree_bytes: the size of `TREE.json`, which grows with the leaves as Orbax's files do.
    """
    *_, folder, name = ("", *path.split("/"))
    if name == "manifest.ocdbt":
        return fmt.MAX_SMALL_BYTES
    if name != "_METADATA" and folder != "array_metadatas":
        return None
    known = _MOST_ORBAX_BYTES if tree_bytes is None else tree_bytes
    return min(fmt.MAX_SMALL_BYTES + _ORBAX_TIMES * known, _MOST_ORBAX_BYTES)


def compare(
    listing: Iterable[Entry], directory: str, files: Iterable[fmt.FileEntry]
) -> dict[str, str]:
    """Returns how a listing differs from what was recorded: path -> reason."""
    listed = {entry.key.removeprefix(f"{directory}/"): entry for entry in listing}
    wrong = {}
    for entry in files:
        there = listed.get(entry.path)
        if there is None:
            wrong[entry.path] = "missing"
        elif there.irregular:
            wrong[entry.path] = f"it is {there.irregular}, not a file"
        elif there.size != entry.size:
            wrong[entry.path] = f"{there.size} bytes instead of {entry.size}"
        elif fmt.same_kind(there.digest, entry.digest) and there.digest != entry.digest:
            wrong[entry.path] = "its content has changed (checksum of the bucket)"
    return wrong


def read_records(
    store: Store,
    directory: str,
    records: Sequence[fmt.FileEntry],
    run: str,
    step: int,
    hosts: Iterable[int] | None = None,
) -> list[fmt.FileEntry]:
    """Returns every file that the host records name, after checking the records against their
    digests. `hosts` limits it to the records of some.

    Raises:
        CorruptStepError: a record is missing, damaged, of another step, or two records name one
            file.
    """
    files: dict[str, fmt.FileEntry] = {}
    bad: list[str] = []
    for host in range(len(records)) if hosts is None else hosts:
        name = fmt.host_record_name(host, len(records))
        try:
            row = records[host]
            data = _read(store, f"{directory}/{row.path}")
            if len(data) != row.size or fmt.digest(data, row.digest) != row.digest:
                raise fmt.InvalidRecordError(f"{row.path} is not the record that was committed")
            record = fmt.parse_record(data, row.path)
            found = (record.run, record.step, record.host, record.hosts)
            if found != (run, step, host, len(records)):
                raise fmt.InvalidRecordError(f"{row.path} is the record of another step or host")
        except (KeyError, fmt.InvalidRecordError):
            bad.append(name)
            continue
        for entry in record.files:
            if entry.path in files:
                bad.append(row.path)
            files[entry.path] = entry
    if bad:
        raise CorruptStepError(
            f"Step {step}: missing or damaged host records: {', '.join(bad[:10])}.",
            step=step,
            files=sorted(set(bad)),
        )
    return list(files.values())


def inspection_to_json(inspection: Inspection) -> dict[str, Any]:
    """Returns what the other hosts are told. Markers name every host, so they are not sent: who
    needs one reads it, and checks it against the digest (`read_marker`).
    """
    return {
        "run": inspection.run,
        "candidates": [
            {
                "step": c.step,
                "name": c.name,
                "state": c.state,
                "reason": c.reason,
                "files": list(c.files),
                "digest": c.digest,
                "version": c.version,
                "suspect": c.suspect,
            }
            for c in inspection.candidates
        ],
    }


def inspection_from_json(body: Mapping[str, Any]) -> Inspection:
    return Inspection(body["run"], tuple(Candidate(**row) for row in body["candidates"]))


def has_moved(store: Store, candidate: Candidate) -> bool:
    """Whether a committed candidate is not what it was: a job that is saving has deleted it, or has
    saved it again.
    """
    try:
        return fmt.digest(store.get(f"{candidate.name}/{fmt.COMMIT_NAME}")) != candidate.digest
    except (KeyError, fmt.InvalidRecordError):
        return True


def is_as_judged(store: Store, step: int, name: str, digest: str) -> bool:
    """Whether a directory is still the step that a restore has found damaged, or suspect. Another
    job may have saved it again since.

    Args:
        digest: of the marker then; empty where that could not be read, or its records were damaged.
    """
    found = inspect_step(store, step, name)
    return found.state == "damaged" or (found.state == "committed" and found.digest == digest)


def records_verified_by(host: int, hosts: int, count: int) -> Sequence[int]:
    """Returns which of `count` host records `host` of `hosts` reads; see `files_to_verify`."""
    return range(host, count, hosts) if hosts <= count else [host % count]


def read_marker(
    store: Store, candidate: Candidate, used: Callable[[int], Iterable[int]] = lambda count: ()
) -> fmt.CommitMarker:
    """Returns the marker of a committed candidate, the very one that the primary has read.

    Args:
        used: of how many host records which ones are to be in it.

    Raises:
        CorruptStepError: it is another one here, or gone.
    """
    try:
        data = _read(store, f"{candidate.name}/{fmt.COMMIT_NAME}")
        if fmt.digest(data) == candidate.digest:
            return fmt.parse_marker(data, used)
        reason = "not the one that the primary has read"
    except fmt.InvalidRecordError as error:
        reason = str(error)
    except KeyError:
        reason = "missing, though the primary has read it"
    raise CorruptStepError(
        f"{fmt.COMMIT_NAME} of step {candidate.step} is {reason}: is the root one file system for"
        " all hosts?",
        step=candidate.step,
        files=[fmt.COMMIT_NAME],
    )


def files_to_verify(
    store: Store, directory: str, marker: fmt.CommitMarker, host: int, hosts: int
) -> list[fmt.FileEntry]:
    """Returns the files that `host` of `hosts` verifies: the whole step once, over all hosts.

    Each host reads a part of the records only: of n hosts that read n records each, the file system
    would see n squared. Where there are more hosts than records, those of one record divide it.

    Raises:
        CorruptStepError: a record is missing, damaged or not the committed one.
    """
    count = len(marker.records)
    part, parts = (0, 1) if hosts <= count else (host // count, -(-(hosts - host % count) // count))
    mine: list[fmt.FileEntry] = []
    for number in records_verified_by(host, hosts, count):
        files = read_records(store, directory, marker.records, marker.run, marker.step, [number])
        loads = [0] * parts
        for entry in sorted(files, key=lambda e: (-e.size, e.path)):
            chosen = loads.index(min(loads))
            loads[chosen] += entry.size + 4096
            if chosen == part:
                mine.append(entry)
    return mine
