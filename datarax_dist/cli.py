"""The command `datarax-dist`: looks at a run without JAX, and starts small jobs of many hosts.

What is asked for goes to stdout, everything else to stderr. The verbs that read a run import
neither jax nor orbax, so they answer at once and also where no accelerator is free.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, Any

from datarax_dist import __version__
from datarax_dist import format as fmt
from datarax_dist.config import check_root
from datarax_dist.errors import (
    CheckpointError,
    CorruptStepError,
    FormatVersionError,
    InvalidArgumentError,
    StepNotFoundError,
)
from datarax_dist.inspection import (
    Candidate,
    Inspection,
    inspect_run,
    read_records,
    verify_files,
)
from datarax_dist.storage import LocalStore

__all__ = ["main"]

OK, FAILED, USAGE, FINDINGS = 0, 1, 2, 3
NOT_FOUND, NEWER_FORMAT, INTERRUPTED = 10, 13, 130

_EXIT_CODES = """\
exit codes:
  0 ok, 1 failed, 2 usage, 3 findings (damage), 10 not found, 13 newer format, 130 interrupted
"""

_LAUNCH_HELP = """\
Runs COMMAND once for each host, as processes of this machine that form one jax.distributed job on
CPU devices. Each gets these environment variables:

  JAX_PLATFORMS=cpu
  XLA_FLAGS=... --xla_force_host_platform_device_count=M
  JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo
  JAX_COORDINATOR_ADDRESS, JAX_COORDINATOR_BIND_ADDRESS   127.0.0.1:PORT
  JAX_NUM_PROCESSES, JAX_PROCESS_ID                       N and 0 ... N-1

jax.distributed.initialize() reads the coordinator's addresses itself, but neither the number of
processes nor the process id. A script has to pass them, before anything else uses JAX:

  import os, jax
  jax.distributed.initialize(
      num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
      process_id=int(os.environ["JAX_PROCESS_ID"]),
  )

Each line that a host writes, to stdout or stderr, comes out on stdout after `[host i]`. When a host
ends with an error, the others get some seconds (--grace) to end and are then terminated. Ctrl-C and
SIGTERM are passed on. The exit code is that of the host that failed first (128 + the number of the
signal that killed it), and 130 after Ctrl-C.
"""

_KILL_SECONDS = 5.0  # from SIGTERM to SIGKILL
_POLL_SECONDS = 0.05
_DEVICE_COUNT_FLAG = re.compile(r"--xla_force_host_platform_device_count=\S*")


class _UsageError(Exception):
    """The command line cannot mean anything."""


# --- what is printed ---------------------------------------------------------------------------


def _note(text: str) -> None:
    """Writes one message for the user to stderr."""
    print(f"datarax-dist: {_clean(text)}", file=sys.stderr)


def _clean(text: str) -> str:
    """Returns `text` without control characters: names that come from storage are not trusted."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _print(text: str = "") -> None:
    print(_clean(text))


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True))


def _size(count: int | None) -> str:
    """Returns a number of bytes for a reader: `1.5 GiB`."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def _duration(seconds: float | None) -> str:
    """Returns a number of seconds for a reader: `5m`."""
    if seconds is None:
        return "-"
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{int(seconds // length)}{unit}"
    return f"{int(max(seconds, 0))}s"


def _time(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):
        return str(seconds)


def _print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        _print("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())


# --- which run, which step ---------------------------------------------------------------------


def _open(root: str) -> LocalStore:
    """Returns the store of a root given on the command line, which may be relative.

    Raises:
        InvalidArgumentError: it is a URL, or empty.
        StepNotFoundError: it is not there.
    """
    path = check_root(os.path.abspath(root) if root and "://" not in root else root)
    if not os.path.isdir(path):
        what = "not a directory" if os.path.lexists(path) else "not there"
        raise StepNotFoundError(f"{path} is {what}.", step=None)
    return LocalStore(path)


def _split_target(text: str) -> tuple[str, str | None]:
    """Returns root and step of `ROOT[@STEP|@latest]`; a directory whose name has an `@` is a root.

    Raises:
        _UsageError: what follows the `@` is no step.
    """
    root, separator, step = text.rpartition("@")
    if not separator or "/" in step or os.path.isdir(text):
        return text, None
    if step != "latest" and fmt.parse_step_name(step) is None:
        raise _UsageError(f"{text}: after the @ comes a step or 'latest', not {step!r}.")
    return root, step


def _row(candidate: Candidate, now: float) -> dict[str, Any]:
    marker = candidate.marker
    return {
        "step": candidate.step,
        "name": candidate.name,
        "state": candidate.state,
        "reason": candidate.reason or None,
        "bytes": marker.bytes if marker else None,
        "hosts": marker.hosts if marker else None,
        "committed_at": marker.committed_at if marker else None,
        "age_seconds": round(now - marker.committed_at, 3) if marker else None,
    }


def _newer_format(store: LocalStore, candidate: Candidate) -> FormatVersionError | None:
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


def _choose(store: LocalStore, inspection: Inspection, step: str) -> Candidate:
    """Returns what a root holds of `step`, or its newest committed step.

    Raises:
        StepNotFoundError: nothing answers.
        CorruptStepError, FormatVersionError: why there is no newest committed step.
    """
    if step != "latest":
        order = ("committed", "damaged", "refused", "foreign", "deleting", "staged")
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
                _note(f"not {other.name}: {other.reason}")
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


# --- ls ----------------------------------------------------------------------------------------


def _ls(arguments: argparse.Namespace) -> int:
    store = _open(arguments.root)
    inspection = inspect_run(store)
    now = time.time()
    rows = [_row(candidate, now) for candidate in inspection.candidates]
    if arguments.json:
        _print_json({"root": store.root, "run": inspection.run, "steps": rows})
    elif not rows:
        _note(f"{store.root} holds no steps.")
    else:
        _print_table(
            ("STEP", "STATE", "SIZE", "HOSTS", "AGE", ""),
            (
                (
                    str(row["step"]),
                    row["state"],
                    _size(row["bytes"]),
                    "-" if row["hosts"] is None else str(row["hosts"]),
                    _duration(row["age_seconds"]),
                    _reason(row),
                )
                for row in rows
            ),
        )
    return OK


def _reason(row: Mapping[str, Any]) -> str:
    text = str(row["reason"] or "")
    return text if row["name"] == str(row["step"]) else f"{row['name']}: {text}"


# --- show --------------------------------------------------------------------------------------


def _show(arguments: argparse.Namespace) -> int:
    root, step = _split_target(arguments.target)
    store = _open(root)
    inspection = inspect_run(store)
    candidate = _choose(store, inspection, step or "latest")
    newer = _newer_format(store, candidate)
    if newer is not None:
        raise newer
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
        except (CorruptStepError, FormatVersionError) as error:
            if isinstance(error, FormatVersionError):
                raise
            damage = str(error)
        if arguments.tree:
            try:
                body["leaves"] = _leaves(store, candidate.name, body.get("files", []))
            except fmt.InvalidRecordError as error:
                damage = damage or str(error)
    elif arguments.tree:
        _note(f"{candidate.name} is {candidate.state}: its tree is not read.")
    if arguments.json:
        _print_json(body)
    else:
        _print_step(body)
    if damage:
        _note(f"step {candidate.step} of {store.root} is damaged: {damage}")
    return FINDINGS if damage else OK


def _leaves(
    store: LocalStore, name: str, files: Sequence[Mapping[str, Any]]
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
        age = _duration(body["age_seconds"])
        lines += [
            ("run", body["run"]),
            ("committed", f"{_time(body['committed_at'])} ({age} ago)"),
            ("size", _size(body["bytes"])),
            ("hosts", str(body["hosts"])),
            ("items", ", ".join(body["items"]) or "none"),
            ("versions", ", ".join(f"{k} {v}" for k, v in sorted(body["versions"].items()))),
        ]
    if "files" in body:
        lines.append(("files", str(len(body["files"]))))
    for name, text in lines:
        _print(f"{name:<10} {text}")
    if "leaves" not in body:
        return
    _print()
    if not body["leaves"]:
        _print("no state" if body["leaves"] is None else "a state without leaves")
        return
    _print_table(
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


# --- verify ------------------------------------------------------------------------------------


def _verify(arguments: argparse.Namespace) -> int:
    root, step = _split_target(arguments.target)
    store = _open(root)
    inspection = inspect_run(store)
    chosen = inspection.candidates if step is None else [_choose(store, inspection, step)]
    results = []
    newer: FormatVersionError | None = None
    for candidate in reversed(chosen):
        error = _newer_format(store, candidate)
        if error is not None:
            newer = error
            _note(f"step {candidate.step} was not verified: {error}")
        elif candidate.state == "damaged":
            wrong = dict.fromkeys(candidate.files or (candidate.name,), candidate.reason)
            results.append(_result(candidate, 0, wrong))
        elif candidate.state != "committed":
            reason = f"{candidate.name} is {candidate.state}, not committed: {candidate.reason}"
            if step is not None:
                raise StepNotFoundError(reason, step=candidate.step)
            _note(reason)
        else:
            results.append(_verify_step(store, candidate, arguments.level))
            if results[-1]["result"] == "gone":
                _note(f"step {candidate.step} was deleted while it was read.")
        if not arguments.json and results and results[-1]["name"] == candidate.name:
            _print_result(results[-1], arguments.level)
    damaged = [row for row in results if row["result"] == "damaged"]
    if arguments.json:
        _print_json({"root": store.root, "level": arguments.level, "steps": results})
    if damaged:
        steps = ", ".join(str(row["step"]) for row in damaged)
        _note(f"damaged steps of {store.root}: {steps}")
        return FINDINGS
    if newer is not None:
        return NEWER_FORMAT
    if not any(row["result"] == "ok" for row in results):
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


def _verify_step(store: LocalStore, candidate: Candidate, level: str) -> dict[str, Any]:
    marker = candidate.marker
    assert marker is not None
    files: Sequence[fmt.FileEntry] = ()
    show = _Meter(candidate.step) if level == "full" and sys.stderr.isatty() else None
    try:
        files = read_records(store, candidate.name, marker.records, marker.run, marker.step)
        advance = _nothing if show is None else show.start(sum(file.size for file in files))
        wrong = verify_files(store, candidate.name, files, level, progress=advance)
    except CorruptStepError as error:
        wrong = dict.fromkeys(error.files, "missing, or not the record that was committed")
    finally:
        if show is not None:
            show.clear()
    # A training job may delete old steps while this reads; it removes the marker before the files.
    if wrong and fmt.COMMIT_NAME not in store.children(candidate.name):
        return _result(candidate, len(files), {}, "gone")
    return _result(candidate, len(files), wrong)


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
            text = f"step {self._step}: {_size(self._done)} of {_size(self._total)}"
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _print_result(row: Mapping[str, Any], level: str) -> None:
    if row["result"] == "ok":
        _print(f"step {row['step']}: ok ({level}; {row['files']} files, {_size(row['bytes'])})")
    elif row["result"] == "damaged":
        _print(f"step {row['step']}: damaged")
        for path, reason in row["damage"].items():
            _print(f"  {path}: {reason}")


# --- launch ------------------------------------------------------------------------------------


def _host_environment(host: int, hosts: int, devices: int, port: int) -> dict[str, str]:
    flags = _DEVICE_COUNT_FLAG.sub("", os.environ.get("XLA_FLAGS", "")).split()
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(flags),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(hosts),
        "JAX_PROCESS_ID": str(host),
    }
    environment.setdefault("PYTHONUNBUFFERED", "1")
    environment.pop("JAX_NUM_CPU_DEVICES", None)  # would win over the flag
    return environment


class _Host:
    """One process of the job, in its own process group, with a thread that passes on its output."""

    def __init__(
        self, index: int, command: Sequence[str], env: Mapping[str, str], lock: threading.Lock
    ) -> None:
        self._prefix = f"[host {index}] ".encode()
        self._lock = lock
        self._process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._reader = threading.Thread(
            target=self._pass_on, args=(self._process.stdout,), daemon=True
        )
        self._reader.start()

    def _pass_on(self, output: IO[bytes]) -> None:
        broken = False
        for line in output:
            # When nobody reads any more, this goes on, so that the host does not block.
            if not broken:
                try:
                    with self._lock:
                        sys.stdout.buffer.write(self._prefix + line.rstrip(b"\r\n") + b"\n")
                        sys.stdout.buffer.flush()
                except (OSError, ValueError):
                    broken = True

    def exit_code(self) -> int | None:
        """Returns None while the process runs; 128 + the signal when one killed it."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def send(self, number: int) -> None:
        """Sends a signal to the process, and to what it started, unless it has ended."""
        if self._process.poll() is None:
            try:
                os.killpg(self._process.pid, number)
            except (ProcessLookupError, PermissionError):
                self._process.send_signal(number)

    def finish(self) -> None:
        """Waits for the end of a process that was killed, and a moment for the rest of its output.

        Something that the process started can hold the output open for longer.
        """
        self._process.wait()
        self._reader.join(2.0)


class _Job:
    """All hosts of a job, from the start of the first to the end of the last."""

    def __init__(self, grace_seconds: float) -> None:
        self.hosts: list[_Host] = []
        self._grace_seconds = grace_seconds
        self._signals: list[int] = []
        self._deadline: float | None = None
        self._failure: int | None = None
        self._interrupts = 0

    def on_signal(self, number: int, frame: Any) -> None:
        """Notes a signal; `run` passes it on."""
        self._signals.append(number)

    def run(self) -> int:
        """Waits for the hosts; returns the exit code of the job."""
        terminated: float | None = None
        while True:
            self._pass_signals_on()
            codes = [host.exit_code() for host in self.hosts]
            if self._failure is None:
                self._check(codes)
            if None not in codes:
                break
            now = time.monotonic()
            if terminated is not None and now > terminated + _KILL_SECONDS:
                self._send(signal.SIGKILL)
            elif terminated is None and self._deadline is not None and now > self._deadline:
                left = ", ".join(str(i) for i, code in enumerate(codes) if code is None)
                _note(f"terminating host(s) {left}.")
                self._send(signal.SIGTERM)
                terminated = now
            time.sleep(_POLL_SECONDS)
        return INTERRUPTED if self._interrupts else self._failure or OK

    def stop(self) -> None:
        """Leaves no host behind, whatever happened."""
        self._send(signal.SIGKILL)
        for host in self.hosts:
            host.finish()

    def _check(self, codes: Sequence[int | None]) -> None:
        for index, code in enumerate(codes):
            if code:
                self._failure = code
                if None in codes:
                    self._set_deadline()
                    rest = f"; the others have {self._grace_seconds:g} s to end"
                else:
                    rest = ""
                _note(f"host {index} ended with exit code {code}{rest}.")
                return

    def _pass_signals_on(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            if number == signal.SIGINT:
                self._interrupts += 1
                self._set_deadline()
                if self._interrupts > 1:
                    number = signal.SIGKILL
            self._send(number)

    def _set_deadline(self) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + self._grace_seconds

    def _send(self, number: int) -> None:
        for host in self.hosts:
            host.send(number)


def _launch(arguments: argparse.Namespace) -> int:
    hosts, devices = arguments.hosts, arguments.devices_per_host
    if not arguments.command:
        raise _UsageError("launch needs a command: launch --hosts 2 -- python train.py")
    from datarax_dist.testing.launcher import free_port

    port = free_port()
    lock = threading.Lock()
    job = _Job(arguments.grace)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, job.on_signal) for number in numbers}
    sys.stdout.flush()
    try:
        for index in range(hosts):
            env = _host_environment(index, hosts, devices, port)
            try:
                job.hosts.append(_Host(index, arguments.command, env, lock))
            except OSError as error:
                _note(f"cannot start {arguments.command[0]!r}: {error.strerror}")
                return FAILED
        return job.run()
    finally:
        job.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


# --- demo --------------------------------------------------------------------------------------


def _demo(rest: Sequence[str]) -> int:
    """Runs the demo in a process of its own, which gets the terminal's Ctrl-C itself."""
    with subprocess.Popen([sys.executable, "-m", "datarax_dist.demo", *rest]) as process:
        while True:
            try:
                code = process.wait()
                return code if code >= 0 else 128 - code
            except KeyboardInterrupt:
                continue


# --- the command line --------------------------------------------------------------------------


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="datarax-dist",
        description="Looks at the checkpoints of a run, and starts small distributed jobs here.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"datarax-dist {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def add(name: str, summary: str, description: str, **more: Any) -> argparse.ArgumentParser:
        return verbs.add_parser(
            name,
            help=summary,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **more,
        )

    target_help = "the root of a run, and a step of it; 'latest' is the newest committed one"
    ls = add(
        "ls",
        "list the steps of a run",
        "Lists every directory of a root that looks like a step, newest first, and what it is:\n"
        "committed, staged (its save did not end), deleting, foreign (plain Orbax), damaged (its\n"
        "marker is) or refused (another run, a newer format). Only markers are read; verify reads\n"
        "the data.",
        epilog=_EXIT_CODES,
    )
    ls.add_argument("root", metavar="ROOT", help="the root of a run")
    ls.set_defaults(action=_ls)

    show = add("show", "describe a step", "Describes one step.", epilog=_EXIT_CODES)
    show.add_argument("target", metavar="ROOT[@STEP|@latest]", help=f"{target_help} (the default)")
    show.add_argument("--tree", action="store_true", help="list the leaves of the state")
    show.set_defaults(action=_show)

    verify = add(
        "verify",
        "check the files of steps",
        "Checks one step or, without a step, every committed one.",
        epilog=_EXIT_CODES,
    )
    verify.add_argument("target", metavar="ROOT[@STEP|@latest]", help=target_help)
    verify.add_argument(
        "--level",
        choices=("marker", "sizes", "full"),
        default="full",
        help="marker: the marker and the host records; sizes: also that every file is there with "
        "its size; full (default): also the checksums of every file",
    )
    verify.set_defaults(action=_verify)

    for reader in (ls, show, verify):
        reader.add_argument("--json", action="store_true", help="print JSON")

    launch = add(
        "launch",
        "run a script as several hosts on this machine",
        _LAUNCH_HELP,
        usage="datarax-dist launch --hosts N [--devices-per-host M] [--grace S] -- COMMAND ...",
    )
    launch.add_argument("--hosts", metavar="N", type=_count, required=True, help="processes")
    launch.add_argument(
        "--devices-per-host", metavar="M", type=_count, default=1, help="CPU devices of each (1)"
    )
    launch.add_argument(
        "--grace",
        metavar="S",
        type=_seconds,
        default=15.0,
        help="seconds that the others have to end after one failed, or after Ctrl-C (15)",
    )
    launch.set_defaults(action=_launch)

    # Listed here for --help only: `main` hands its arguments on as they are.
    add("demo", "run the demo; its arguments are passed on", "See datarax-dist demo --help.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="datarax-dist: %(message)s", level=logging.WARNING)
    try:
        if words[:1] == ["demo"]:
            return _demo(words[1:])
        command: list[str] = []
        if words[:1] == ["launch"] and "--" in words:
            split = words.index("--")
            words, command = words[:split], words[split + 1 :]
        try:
            arguments = _parser().parse_args(words)
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else OK
        arguments.command = command
        code = int(arguments.action(arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read stdout has gone. What is left in its buffer must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        _note("interrupted")
        return INTERRUPTED
    except Exception as error:
        return _explain(error)
    return code


def _explain(error: Exception) -> int:
    """Says what went wrong, without a traceback; returns the exit code for it."""
    known: tuple[tuple[type[Exception], int], ...] = (
        (_UsageError, USAGE),
        (InvalidArgumentError, USAGE),
        (StepNotFoundError, NOT_FOUND),
        (FormatVersionError, NEWER_FORMAT),
        (CorruptStepError, FINDINGS),
        (CheckpointError, FAILED),
    )
    for kind, code in known:
        if isinstance(error, kind):
            _note(str(error))
            return code
    _note(f"{type(error).__name__}: {error}")
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
