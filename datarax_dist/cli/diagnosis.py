"""`datarax-dist doctor`: whether a root can keep what the protocols promise, in plain words."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import functools
import importlib.util
import itertools
import os
import secrets
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from datarax_dist import format as fmt
from datarax_dist.attempts import mark_suspects
from datarax_dist.buckets import BucketStore
from datarax_dist.cli.output import FINDINGS, NOT_AUTHORISED, OK, note, print_clean, print_json
from datarax_dist.config import check_typed_root, is_bucket
from datarax_dist.errors import CheckpointError, StepNotFoundError, storage_hint
from datarax_dist.errors import describe as describe_error
from datarax_dist.inspection import inspect_run
from datarax_dist.lease import describe, newest_lease
from datarax_dist.storage import Store, SupportsRename, SupportsReplace, open_store
from datarax_dist.writers import is_certainly_dead

__all__ = ["Finding", "diagnose", "doctor"]

_NEEDED = {
    "storage.objects.list": "without it no step can be found",
    "storage.objects.get": "without it no step can be restored",
    "storage.objects.create": "without it no step can be saved",
    "storage.objects.delete": "without it no step can be saved (Orbax replaces files of its"
    " own), and old steps stay",
}
_SETTINGS = "storage.buckets.get"
_SOON_SECONDS, _FAR_SECONDS = 5.0, 300.0
_LITTLE_GIB, _NONE_GIB = 1.0, 1 / 2**10
_SAMPLES = 5
_Check = Callable[[Callable[[], Store]], None]
_ROLES = "roles/storage.objectUser on the bucket has all of these"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check has shown.

    Attributes:
        level: "ok", "info", "warning" (it works, and costs something), "error" (it does not work),
            "denied" (a permission is missing).
        check: what was looked at.
        text: what was seen, and what to do about it.
    """

    level: str
    check: str
    text: str = ""


def doctor(arguments: argparse.Namespace) -> int:
    """Prints what `diagnose` finds; returns the exit code."""
    root = check_typed_root(str(arguments.root))
    found: list[Finding] = []
    for finding in diagnose(root, write=arguments.write):
        found.append(finding)
        if not arguments.json:
            print_clean(_line(finding))
    levels = {finding.level for finding in found}
    if arguments.json:
        print_json({"root": root, "findings": [dataclasses.asdict(finding) for finding in found]})
    if not arguments.write and not levels & {"denied", "error"}:
        note(f"nothing was written; add --write to try {root} with real writes and deletions")
    return NOT_AUTHORISED if "denied" in levels else FINDINGS if "error" in levels else OK


def _line(finding: Finding) -> str:
    marks = {"ok": "ok     ", "info": "       ", "warning": "WARNING"}
    first = f"{marks.get(finding.level, 'ERROR  ')}  {finding.check}"
    return f"{first}: {finding.text}" if finding.text else first


def diagnose(root: str, *, write: bool) -> Iterator[Finding]:
    """Looks at a root, and tells of each thing when it has seen it.

    Args:
        root: as `config.check_root` returns it.
        write: also write, race and delete, in a directory of its own below the root, which is
            removed afterwards.

    Raises:
        StepNotFoundError: a local root is not there, and is not to be made.
        StorageError: there is no such bucket, or it cannot be reached at all.
    """
    store = open_store(root)
    denied = broken = False
    looks = _bucket(store) if isinstance(store, BucketStore) else _directory(root, write)
    for finding in itertools.chain(_environment(root), looks, _lease(store), _steps(store)):
        denied |= finding.level == "denied"
        broken |= finding.level == "error" and finding.check in ("steps", fmt.RUN_NAME)
        yield finding
    if write and denied:
        yield Finding("info", "writing", "is not tried before the permissions are there")
    elif write and broken:
        yield Finding("info", "writing", "is not tried before that is mended")
    elif write:
        yield from _writes(root)


def _environment(root: str) -> Iterator[Finding]:
    if not is_bucket(root):
        return
    forced = os.environ.get("EPATH_USE_TF", "").lower() in ("0", "false")
    if importlib.util.find_spec("tensorflow") is not None and not forced:
        yield Finding(
            "error",
            "TensorFlow",
            "is installed, and Orbax would use its file layer for gs://. Set EPATH_USE_TF=false in"
            " the environment of the job.",
        )
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        if address := os.environ.get(name):
            yield Finding("info", name, f"this is not Google's service, but {address}")


def _lease(store: Store) -> Iterator[Finding]:
    try:
        lease = newest_lease(store)
        names = store.children(fmt.LEASE_NAME)
    except CheckpointError:
        return  # `_steps` says why
    for name in names:
        if name.endswith("/") and fmt.parse_lease_name(name[:-1]) is not None:
            path = f"{fmt.LEASE_NAME}/{name}"
            yield Finding("error", path, "is a directory, and in the way of a lease. Remove it.")
    if lease is None:
        return
    if lease.released:
        state = "has ended, and has let the run go"
    elif is_certainly_dead(lease.owner):
        state = "is gone; the next job follows at once"
    else:
        state = (
            f"holds it, unless it is gone; then the next job follows within {lease.ttl_seconds:.0f}"
            " s"
        )
    yield Finding("info", "writer", f"{describe(lease)} {state}")


def _steps(store: Store) -> Iterator[Finding]:
    try:
        inspection = mark_suspects(store, inspect_run(store), time.time())
    except CheckpointError as error:
        denied = getattr(error, "errno", None) == errno.EACCES
        yield Finding("denied" if denied else "error", "steps", str(error))
        return
    if inspection.run is None and fmt.RUN_NAME in store.children(""):
        yield Finding(
            "error",
            fmt.RUN_NAME,
            "cannot be read, and no step says which run this is: nothing can be saved here. Choose"
            " another root, or remove that file.",
        )
    states = {candidate.state for candidate in inspection.candidates}
    has_one = not states.isdisjoint(("committed", "foreign"))
    if inspection.unmarked and not has_one and isinstance(store, SupportsRename):
        yield Finding(
            "error",
            "steps",
            f"none is committed, and {len(inspection.unmarked)} have lost their {fmt.COMMIT_NAME}:"
            " no job restores or begins anew here. Was the run copied, and not all of it? Take a"
            " copy that is whole, or move these directories away.",
        )
        return
    other = len(inspection.candidates) - len(inspection.committed)
    text = f"{len(inspection.committed)} committed"
    yield Finding("ok", "steps", text + (f", {other} others (datarax-dist ls)" if other else ""))
    for candidate in inspection.candidates:
        if candidate.suspect:
            yield Finding("warning", f"step {candidate.step}", f"is {candidate.suspect}")


# Buckets


def _bucket(store: BucketStore) -> Iterator[Finding]:
    granted = store.granted([*_NEEDED, _SETTINGS])
    for permission, without in _NEEDED.items():
        if permission in granted:
            yield Finding("ok", permission)
        else:
            yield Finding("denied", permission, f"is missing: {without}. Grant it; {_ROLES}.")
    if _SETTINGS in granted:
        yield from _judge_settings(store.bucket, store.settings())
    else:
        yield Finding(
            "warning",
            _SETTINGS,
            "is missing, so its settings (soft delete, versioning, retention) are not known. Plain"
            " Orbax needs it too. Grant roles/storage.bucketViewer to see them here.",
        )
    if "storage.objects.list" in granted:
        ahead = store.seconds_ahead()
        level = "ok" if abs(ahead) < _SOON_SECONDS else "warning"
        level = "error" if abs(ahead) > _FAR_SECONDS else level
        text = f"that of the bucket is {abs(ahead):.0f} s {'ahead' if ahead > 0 else 'behind'}"
        advice = "" if level == "ok" else ". Is NTP running on this host? Credentials expire by it."
        yield Finding(level, "clock", text + advice)


def _judge_settings(bucket: str, settings: Mapping[str, Any]) -> Iterator[Finding]:
    update = f"gcloud storage buckets update gs://{bucket}"
    seconds = int((settings.get("softDeletePolicy") or {}).get("retentionDurationSeconds", 0))
    if seconds:
        yield Finding(
            "warning",
            "soft delete",
            f"is on: what is deleted is stored, and billed, for {seconds / 86400:.0f} more days."
            " That is each step after its deletion, and once more its staged copy, which is deleted"
            f" as soon as the step is committed. To turn it off: {update} --clear-soft-delete",
        )
    else:
        yield Finding("ok", "soft delete", "is off")
    if (settings.get("versioning") or {}).get("enabled"):
        yield Finding(
            "warning",
            "versioning",
            "is on: deleted checkpoints stay as old versions, and are billed, until a lifecycle"
            f" rule removes them. To turn it off: {update} --no-versioning",
        )
    else:
        yield Finding("ok", "versioning", "is off")
    held = [
        name
        for name in ("retentionPolicy", "defaultEventBasedHold", "objectRetention")
        if settings.get(name)
    ]
    if held:
        yield Finding(
            "error",
            "retention of the bucket",
            f"{', '.join(held)}: objects cannot be deleted or replaced, so old steps stay, and a"
            " save that has crashed cannot be done again. Use a bucket without it.",
        )
    if (settings.get("billing") or {}).get("requesterPays"):
        yield Finding(
            "error",
            "requester pays",
            f"is on, which TensorStore's reads do not know here. {update} --no-requester-pays",
        )
    rules = [
        rule
        for rule in (settings.get("lifecycle") or {}).get("rule", ())
        if (rule.get("action") or {}).get("type") == "Delete"
    ]
    if rules:
        yield Finding(
            "warning",
            "lifecycle",
            f"{len(rules)} rule(s) delete objects: be sure that none takes a checkpoint's, which"
            " would damage it.",
        )
    kind = str(settings.get("storageClass", "STANDARD"))
    if kind in ("NEARLINE", "COLDLINE", "ARCHIVE"):
        yield Finding(
            "warning",
            "storage class",
            f"{kind} bills each deleted checkpoint for its minimum duration, and each read. Use"
            " STANDARD.",
        )
    where = settings.get("location", "?")
    yield Finding("info", "location", f"{where}; machines elsewhere pay for each read, and wait")


# Directories


def _directory(root: str, write: bool) -> Iterator[Finding]:
    there = root
    while not os.path.isdir(there) and there != os.path.dirname(there):
        there = os.path.dirname(there)
    if os.path.lexists(root) and there != root:
        yield Finding("error", "root", f"{root} is no directory")
        return
    if there != root and not write:
        raise StepNotFoundError(
            f"{root} is not there; it is made with the first save, or by doctor --write.", step=None
        )
    kind = _kind_of_file_system(there)
    if "gcsfuse" in kind or kind == "fuse.s3fs":
        yield Finding(
            "error",
            "file system",
            f"{kind} does not rename a directory at once, which is how a step is committed. Use"
            " gs:// for the root.",
        )
    elif kind in ("tmpfs", "ramfs", "overlay"):
        yield Finding(
            "warning",
            "file system",
            f"{kind}: what is here does not outlive the machine, or the container",
        )
    elif kind.startswith(("nfs", "lustre", "fuse", "cifs", "smb")):
        text = f"{kind}: it must be one, shared by all hosts; run doctor --write on two of them"
        yield Finding("info", "file system", text)
    else:
        yield Finding("info", "file system", f"{kind or 'unknown'}; for hosts that share it only")
    if not os.access(
        there, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids
    ):
        yield Finding("error", "permission", f"this user cannot write into {there}")
    free = shutil.disk_usage(there).free / 2**30
    level = "info" if free >= _LITTLE_GIB else "error" if free < _NONE_GIB else "warning"
    yield Finding(
        level, "free space", f"{free:.1f} GiB" if free >= 0.1 else f"{free * 2**10:.0f} MiB"
    )


def _kind_of_file_system(path: str) -> str:
    """Returns the type of the mount that a path is on, as Linux names it; empty elsewhere."""
    best, kind = "", ""
    with contextlib.suppress(OSError), open("/proc/mounts", encoding="utf-8") as file:
        for line in file:
            _, point, this, *_ = line.split(" ")
            point = point.encode().decode("unicode_escape")
            inside = path == point or path.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best):
                best, kind = point, this
    return kind


# What needs writing


def _writes(root: str) -> Iterator[Finding]:
    place = f"{root}/doctor-{secrets.token_hex(6)}"
    made = not is_bucket(root) and not os.path.isdir(root)
    if not is_bucket(root):
        try:
            os.makedirs(place)
        except OSError as error:
            hint = storage_hint(error.errno)
            denied = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
            text = f"cannot be tried: {describe_error(error)}. {hint}"
            yield Finding("denied" if denied else "error", "writing", text)
            return
    try:
        failed = False
        for number, check in enumerate(_checks(open_store(place))):
            finding = _try(check, functools.partial(open_store, f"{place}/{number}"))
            failed |= finding.level != "ok"
            yield finding
            if finding.check == "writing":  # each of the others would say so, too
                break
        store = open_store(f"{place}/more")
        if isinstance(store, BucketStore) and not failed:
            refused = store.refuses_wrong_checksums("checksum")
            name = "an upload that was damaged on its way is refused"
            yield Finding("ok" if refused else "error", name)
        if not failed:
            yield _latency(store)
    finally:
        try:
            open_store(root).delete(place.removeprefix(f"{root}/"))
            if made:
                with contextlib.suppress(OSError):
                    os.rmdir(root)
        except CheckpointError as error:
            yield Finding("denied", "what doctor has written", f"stays in {place}: {error}")


def _checks(store: Store) -> list[_Check]:
    """Returns the checks of the conformance suite that say something of this kind of store."""
    from datarax_dist.testing import conformance as suite

    left_out = {
        suite.listing_while_others_write_neither_fails_nor_loses_what_stays,  # 1000 requests
        suite.sync_of_what_was_put_does_nothing_visible,
    }
    if not isinstance(store, SupportsRename):
        left_out.add(suite.rename_moves_everything_and_never_onto_something)
    if not isinstance(store, SupportsReplace):
        left_out |= {
            suite.replace_needs_the_expected_content,
            suite.copy_leaves_the_source_and_what_is_there,
        }
    return [check for check in suite.STORE_CHECKS if check not in left_out]


def _try(check: _Check, make: Callable[[], Store]) -> Finding:
    name = check.__name__.replace("_", " ").replace("is a key error", "is not found")
    try:
        check(make)
    except AssertionError as error:
        return Finding("error", name, str(error) or "it is not so here: do not keep a run here")
    except CheckpointError as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            name = "writing"
        return Finding("denied" if number == errno.EACCES else "error", name, str(error))
    return Finding("ok", name)


def _latency(store: Store) -> Finding:
    def seconds(act: Callable[[int], Any]) -> float:
        taken = []
        for number in range(_SAMPLES):
            begin = time.monotonic()
            act(number)
            taken.append(time.monotonic() - begin)
        return statistics.median(taken)

    write = seconds(lambda number: store.create(f"latency/{number}", b"x" * 200))
    read = seconds(lambda number: store.get(f"latency/{number}"))
    listing = seconds(lambda number: store.list("latency"))
    text = f"write {write * 1e3:.1f}, read {read * 1e3:.1f}, list {listing * 1e3:.1f}"
    return Finding("info", "milliseconds for a small file", text)
