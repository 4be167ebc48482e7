"""The commands that read a run: ls, show, verify. They import neither jax nor orbax."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datarax_dist import format as fmt
from datarax_dist.attempts import mark_suspects
from datarax_dist.cli.output import (
    FINDINGS,
    NEWER_FORMAT,
    OK,
    UsageError,
    duration_text,
    note,
    print_clean,
    print_json,
    print_table,
    size_text,
    time_text,
)
from datarax_dist.config import check_typed_root, is_bucket
from datarax_dist.errors import CorruptStepError, FormatVersionError, StepNotFoundError, mask
from datarax_dist.inspection import (
    Candidate,
    Inspection,
    has_moved,
    inspect_run,
    read_records,
    verify_files,
)
from datarax_dist.storage import Store, SupportsRename, open_store

__all__ = ["ls", "open_root", "show", "split_target", "verify"]

_TRIES = 20  # at a step that a job saves again while it is read


def open_root(root: str) -> Store:
    """Returns the store of a root given on the command line, where a path may be relative.

    Raises:
        InvalidArgumentError: it is a URL of a kind that is not supported, or empty.
        StepNotFoundError: it is not there.
    """
    path = check_typed_root(root)
    if not is_bucket(path) and not os.path.isdir(path):
        what = "not a directory" if os.path.lexists(path) else "not there"
        raise StepNotFoundError(f"{path} is {what}.", step=None)
    return open_store(path)


def split_target(text: str) -> tuple[str, str | None]:
    """Returns root and step of `ROOT[@STEP|@latest]`; a directory whose name has an `@` is a root.

    Raises:
        UsageError: what follows the `@` is no step.
    """
    root, separator, step = text.rpartition("@")
    if not separator or "/" in step or os.path.isdir(text):
        return text, None
    if step != "latest" and fmt.parse_step_name(step) is None:
        raise UsageError(f"{mask(text)}: after the @ comes a step or 'latest', not {step!r}.")
    return root, step


def _row(candidate: Candidate, now: float) -> dict[str, Any]:
    marker = candidate.marker
    return {
        "step": candidate.step,
        "name": candidate.name,
        "state": "suspect" if candidate.suspect else candidate.state,
        "reason": candidate.reason or candidate.suspect.removeprefix("suspect: ") or None,
        "bytes": marker.bytes if marker else None,
        "hosts": marker.hosts if marker else None,
        "committed_at": marker.committed_at if marker else None,
        "age_seconds": round(now - marker.committed_at, 3) if marker else None,
    }


def _newer_format(store: Store, candidate: Candidate) -> FormatVersionError | None:
    """Returns the error of a step that a newer datarax_dist wrote; None for any other."""
    if candidate.state != "refused":
        return None
    try:
        fmt.parse_marker(store.get(f"{candidate.name}/{fmt.COMMIT_NAME}"))
    except FormatVersionError as error:
        return error
    except (KeyError, fmt.InvalidRecordError):
        return None
    return None


def _choose(store: Store, inspection: Inspection, step: str) -> Candidate:
    """Returns what a root holds of `step`, or its newest committed step.

    Raises:
        StepNotFoundError: nothing answers.
        CorruptStepError, FormatVersionError: why there is no newest committed step.
    """
    if step != "latest":
        order = ("committed", "damaged", "refused", "foreign", "deleting", "staged", "void")
        found = [c for c in inspection.candidates if c.step == int(step)]
        if not found:
            there = ", ".join(str(n) for n in inspection.committed[-20:]) or "none"
            raise StepNotFoundError(
                f"There is no step {step} in {store.root}; committed steps: {there}.",
                step=int(step),
            )
        return min(found, key=lambda c: order.index(c.state))
    for index, candidate in enumerate(inspection.candidates):
        if candidate.state == "committed":
            for other in inspection.candidates[:index]:
                note(f"not {other.name}: {other.reason}")
            return candidate
    for candidate in inspection.candidates:
        newer = _newer_format(store, candidate)
        if newer is not None:
            raise newer
        if candidate.state == "damaged":
            raise CorruptStepError(
                f"{store.root} has no committed step; {candidate.name} is damaged: "
                f"{candidate.reason}",
                step=candidate.step,
                files=list(candidate.files),
            )
    reasons = "".join(f"\n  {c.name}: {c.reason}" for c in inspection.candidates[:10])
    raise StepNotFoundError(f"There is no committed step in {store.root}.{reasons}", step=None)


def ls(arguments: argparse.Namespace) -> int:
    store = open_root(arguments.root)
    now = time.time()
    inspection = mark_suspects(store, inspect_run(store), now)
    rows = [_row(candidate, now) for candidate in inspection.candidates]
    if arguments.json:
        print_json({"root": store.root, "run": inspection.run, "steps": rows})
    elif not rows:
        note(f"{store.root} holds no steps.")
    else:
        print_table(
            ("STEP", "STATE", "SIZE", "HOSTS", "AGE", ""),
            (
                (
                    str(row["step"]),
                    row["state"],
                    size_text(row["bytes"]),
                    "-" if row["hosts"] is None else str(row["hosts"]),
                    duration_text(row["age_seconds"]),
                    _reason(row),
                )
                for row in rows
            ),
        )
    return OK


def _reason(row: Mapping[str, Any]) -> str:
    text = str(row["reason"] or "")
    return text if row["name"] == str(row["step"]) else f"{row['name']}: {text}"


def show(arguments: argparse.Namespace) -> int:
    root, step = split_target(arguments.target)
    store = open_root(root)
    for number in range(_TRIES):
        inspection = mark_suspects(store, inspect_run(store), time.time())
        candidate = _choose(store, inspection, step or "latest")
        newer = _newer_format(store, candidate)
        if newer is not None:
            raise newer
        body, damage = _describe(store, candidate, arguments.tree)
        if not damage or candidate.state != "committed":
            break
        # Not because a job has saved it again meanwhile, or moved it away for a moment.
        if number and not has_moved(store, candidate):
            break
    if arguments.json:
        print_json(body)
    else:
        _print_step(body)
    if damage:
        note(f"step {candidate.step} of {store.root} is damaged: {damage}")
    return FINDINGS if damage else OK


def _describe(store: Store, candidate: Candidate, tree: bool) -> tuple[dict[str, Any], str]:
    """Returns what is to be told of a directory, and why it is damaged, if it is."""
    marker = candidate.marker
    body: dict[str, Any] = {**_row(candidate, time.time()), "root": store.root}
    damage = candidate.reason if candidate.state == "damaged" else ""
    if candidate.state == "committed" and marker is not None:
        body |= {
            "run": marker.run,
            "epoch": marker.epoch,
            "items": list(marker.items),
            "versions": dict(marker.versions),
        }
        try:
            files = read_records(store, candidate.name, marker.records, marker.run, marker.step)
            body["files"] = [{"path": f.path, "size": f.size, "digest": f.digest} for f in files]
            first = marker.records[0].path
            record = fmt.parse_record(store.get(f"{candidate.name}/{first}"), first)
            body["notes"] = dict(record.notes)
            key = "metadata/metadata"
            if any(file.path == key for file in files):
                told = fmt.parse_metadata(store.get(f"{candidate.name}/{key}"), key)
                body["metadata"] = json.loads(json.dumps(told), parse_constant=str)  # no NaN
        except (CorruptStepError, KeyError, fmt.InvalidRecordError) as error:
            damage = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        if tree:
            try:
                body["leaves"] = _leaves(store, candidate.name, body.get("files", []))
            except fmt.InvalidRecordError as error:
                damage = damage or str(error)
    elif tree:
        note(f"{candidate.name} is {candidate.state}: its tree is not read.")
    return body, damage


def _leaves(
    store: Store, name: str, files: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]] | None:
    """Returns the leaves of a step's state as `TREE.json` lists them; None when it has no state.

    Raises:
        InvalidRecordError: `TREE.json` is damaged, or gone though a record names it.
    """
    try:
        body = fmt.unseal(store.get(f"{name}/{fmt.TREE_NAME}"), fmt.TREE_NAME)
    except KeyError:
        if any(file["path"] == fmt.TREE_NAME for file in files):
            raise fmt.InvalidRecordError(f"{fmt.TREE_NAME} is missing") from None
        return None
    rows = []
    leaves = body.get("leaves")
    for row in leaves if isinstance(leaves, list) else [None]:
        leaf: dict[str, Any] = row if isinstance(row, dict) else {}
        parts, shape = leaf.get("path"), leaf.get("shape")
        if not isinstance(parts, list) or not isinstance(shape, list):
            raise fmt.InvalidRecordError(f"{fmt.TREE_NAME} lists no leaves")
        rows.append(
            {
                "path": [str(part) for part in parts],
                "kind": str(leaf.get("kind")),
                "shape": shape,
                "dtype": str(leaf.get("dtype", "")),
                "value": leaf.get("value"),
            }
        )
    return rows


def _print_step(body: Mapping[str, Any]) -> None:
    lines = [("step", str(body["step"])), ("root", body["root"]), ("state", body["state"])]
    if body["reason"]:
        lines.append(("reason", body["reason"]))
    if "run" in body:
        age = duration_text(body["age_seconds"])
        lines += [
            ("run", body["run"]),
            ("committed", f"{time_text(body['committed_at'])} ({age} ago)"),
            ("size", size_text(body["bytes"])),
            ("hosts", str(body["hosts"])),
            ("items", ", ".join(body["items"]) or "none"),
            ("versions", ", ".join(f"{k} {v}" for k, v in sorted(body["versions"].items()))),
        ]
    if "files" in body:
        lines.append(("files", str(len(body["files"]))))
    lines += sorted(body.get("notes", {}).items())
    if body.get("metadata"):
        lines.append(("metadata", _short(json.dumps(body["metadata"], ensure_ascii=False), 500)))
    for name, text in lines:
        print_clean(f"{name:<11} {text}")
    if "leaves" not in body:
        return
    print_clean()
    if not body["leaves"]:
        print_clean("no state" if body["leaves"] is None else "a state without leaves")
        return
    print_table(
        ("LEAF", "KIND", "DTYPE", "SHAPE", "VALUE"),
        (
            (
                "/".join(leaf["path"]) or ".",
                leaf["kind"],
                leaf["dtype"] or "-",
                f"({', '.join(str(n) for n in leaf['shape'])})" if leaf["dtype"] else "-",
                "" if leaf["value"] is None else _short(json.dumps(leaf["value"])),
            )
            for leaf in body["leaves"]
        ),
    )


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 4] + " ..."


def verify(arguments: argparse.Namespace) -> int:
    root, step = split_target(arguments.target)
    store = open_root(root)
    inspection = inspect_run(store)
    chosen = inspection.candidates if step is None else [_choose(store, inspection, step)]
    results = []
    newer: FormatVersionError | None = None
    for candidate in reversed(chosen):
        row: dict[str, Any] | None = None
        error = _newer_format(store, candidate)
        if error is not None:
            newer = error
            note(f"step {candidate.step} was not verified: {error}")
        elif candidate.state == "damaged":
            row = _of_damaged(candidate)
        elif candidate.state != "committed":
            reason = f"{candidate.name} is {candidate.state}, not committed: {candidate.reason}"
            if step is not None:
                raise StepNotFoundError(reason, step=candidate.step)
            note(reason)
        else:
            row = _verify_step(store, candidate, arguments.level)
            if row["result"] == "gone" and step is None:
                note(f"step {candidate.step} was deleted while it was read.")
        if row is not None:
            results.append(row)
            if not arguments.json:
                _print_result(row, arguments.level)
    damaged = [row for row in results if row["result"] == "damaged"]
    if arguments.json:
        print_json({"root": store.root, "level": arguments.level, "steps": results})
    if damaged:
        steps = ", ".join(str(row["step"]) for row in damaged)
        note(f"damaged steps of {store.root}: {steps}")
        return FINDINGS
    if newer is not None:
        return NEWER_FORMAT
    if not any(row["result"] == "ok" for row in results):
        gone = [row["step"] for row in results]
        if step is not None and gone:
            raise StepNotFoundError(
                f"Step {gone[0]} of {store.root} was deleted while it was read.", step=gone[0]
            )
        raise StepNotFoundError(f"There is no committed step in {store.root}.", step=None)
    return OK


def _result(
    candidate: Candidate, files: int, wrong: Mapping[str, str], result: str = ""
) -> dict[str, Any]:
    return {
        "step": candidate.step,
        "name": candidate.name,
        "result": result or ("damaged" if wrong else "ok"),
        "files": files,
        "bytes": candidate.marker.bytes if candidate.marker else None,
        "damage": dict(sorted(wrong.items())),
    }


def _of_damaged(candidate: Candidate) -> dict[str, Any]:
    wrong = dict.fromkeys(candidate.files or (candidate.name,), candidate.reason)
    return _result(candidate, 0, wrong)


def _verify_step(store: Store, candidate: Candidate, level: str) -> dict[str, Any]:
    """Verifies a step, which a job may save again or delete meanwhile: then what it is now."""
    is_twice = not isinstance(store, SupportsRename)  # in a bucket nothing is away for a moment
    for _ in range(_TRIES):
        files, wrong = _verify_once(store, candidate, level)
        if not wrong:
            break
        if has_moved(store, candidate):
            found = [c for c in inspect_run(store).candidates if c.step == candidate.step]
            now = [c for c in found if c.state == "committed"]
            if not now:
                damaged = [c for c in found if c.state == "damaged"]
                return _of_damaged(damaged[0]) if damaged else _result(candidate, 0, {}, "gone")
            [candidate] = now
        elif is_twice:
            break
        else:
            is_twice = True
    return _result(candidate, files, wrong)


def _verify_once(store: Store, candidate: Candidate, level: str) -> tuple[int, dict[str, str]]:
    """Returns how many files a step has, and what is wrong with them."""
    marker = candidate.marker
    assert marker is not None
    show = _Meter(candidate.step) if level == "full" and sys.stderr.isatty() else None
    try:
        files = read_records(store, candidate.name, marker.records, marker.run, marker.step)
        advance = _nothing if show is None else show.start(sum(file.size for file in files))
        return len(files), verify_files(store, candidate.name, files, level, progress=advance)
    except CorruptStepError as error:
        return 0, dict.fromkeys(error.files, "missing, or not the record that was committed")
    finally:
        if show is not None:
            show.clear()


def _nothing(count: int) -> None:
    """Shows no progress."""


class _Meter:
    """One line on a terminal that says how far the reading of a step is."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._total = self._done = 0
        self._shown = 0.0

    def start(self, total: int) -> Callable[[int], None]:
        self._total = total
        return self._advance

    def _advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._shown >= 0.1:
            self._shown = now
            text = f"step {self._step}: {size_text(self._done)} of {size_text(self._total)}"
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _print_result(row: Mapping[str, Any], level: str) -> None:
    if row["result"] == "ok":
        print_clean(
            f"step {row['step']}: ok ({level}; {row['files']} files, {size_text(row['bytes'])})"
        )
    elif row["result"] == "damaged":
        print_clean(f"step {row['step']}: damaged")
        for path, reason in row["damage"].items():
            print_clean(f"  {path}: {reason}")
