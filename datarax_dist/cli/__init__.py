"""The command `datarax-dist`: looks at a run without JAX, and starts small jobs of many hosts.

What is asked for goes to stdout, everything else to stderr. The verbs that read a run import
neither jax nor orbax, so they answer at once and also where no accelerator is free.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from datarax_dist import __version__
from datarax_dist.cli.diagnosis import doctor
from datarax_dist.cli.launch import LAUNCH_HELP, launch
from datarax_dist.cli.output import (
    FAILED,
    FINDINGS,
    INTERRUPTED,
    NEWER_FORMAT,
    NOT_AUTHORISED,
    NOT_FOUND,
    OK,
    USAGE,
    UsageError,
    note,
    note_error,
)
from datarax_dist.cli.reading import ls, show, verify
from datarax_dist.errors import (
    CheckpointError,
    CorruptStepError,
    FormatVersionError,
    InvalidArgumentError,
    StepNotFoundError,
    StorageError,
)

__all__ = ["main"]

_EXIT_CODES = """\
exit codes:
  0 ok, 1 failed, 2 usage, 3 findings (damage), 10 not found, 12 not authorised,
  13 newer format, 130 interrupted
"""


def demo(rest: Sequence[str]) -> int:
    """Runs the demo in a process of its own, which gets the terminal's Ctrl-C itself."""
    with subprocess.Popen([sys.executable, "-m", "datarax_dist.demo", *rest]) as process:
        while True:
            try:
                code = process.wait()
                return code if code >= 0 else 128 - code
            except KeyboardInterrupt:
                continue


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")


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
    ls_verb = add(
        "ls",
        "list the steps of a run",
        "Lists every directory of a root that looks like a step, newest first, and what it is:\n"
        "committed, staged (its save did not end), deleting, foreign (plain Orbax), damaged (its\n"
        "marker is) or refused (another run, a newer format). Only markers are read; verify reads\n"
        "the data.",
        epilog=_EXIT_CODES,
    )
    ls_verb.add_argument("root", metavar="ROOT", help="the root of a run")
    ls_verb.set_defaults(action=ls)

    show_verb = add("show", "describe a step", "Describes one step.", epilog=_EXIT_CODES)
    show_verb.add_argument(
        "target", metavar="ROOT[@STEP|@latest]", help=f"{target_help} (the default)"
    )
    show_verb.add_argument("--tree", action="store_true", help="list the leaves of the state")
    show_verb.set_defaults(action=show)

    verify_verb = add(
        "verify",
        "check the files of steps",
        "Checks one step or, without a step, every committed one.",
        epilog=_EXIT_CODES,
    )
    verify_verb.add_argument("target", metavar="ROOT[@STEP|@latest]", help=target_help)
    verify_verb.add_argument(
        "--level",
        choices=("marker", "sizes", "full"),
        default="full",
        help="marker: the marker and the host records; sizes: also that every file is there with "
        "its size; full (default): also the checksums of every file",
    )
    verify_verb.set_defaults(action=verify)

    doctor_verb = add(
        "doctor",
        "tell whether a root can keep a run",
        "Looks at a root and says in plain words what is missing. Of a bucket: permissions,\n"
        "settings that cost money or forbid deletion, the clock. Of a directory: its file system\n"
        "and space. With --write it also tries what saving needs: that one of many writers wins,\n"
        "that what was written is there at once, reads, listings, deletions.",
        epilog=_EXIT_CODES,
    )
    doctor_verb.add_argument("root", metavar="ROOT", help="the root of a run, there yet or not")
    doctor_verb.add_argument(
        "--write", action="store_true", help="write and delete in a directory of its own below it"
    )
    doctor_verb.set_defaults(action=doctor)

    for reader in (ls_verb, show_verb, verify_verb, doctor_verb):
        reader.add_argument("--json", action="store_true", help="print JSON")

    launch_verb = add(
        "launch",
        "run a script as several hosts on this machine",
        LAUNCH_HELP,
        usage="datarax-dist launch --hosts N [--devices-per-host M] [--grace S] -- COMMAND ...",
    )
    launch_verb.add_argument("--hosts", metavar="N", type=_count, required=True, help="processes")
    launch_verb.add_argument(
        "--devices-per-host", metavar="M", type=_count, default=1, help="CPU devices of each (1)"
    )
    launch_verb.add_argument(
        "--grace",
        metavar="S",
        type=_seconds,
        default=15.0,
        help="seconds that the others have to end after one failed, Ctrl-C, or SIGTERM (15)",
    )
    launch_verb.set_defaults(action=launch)

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
    # It logs a traceback of each error that it raises; ours say what to do.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    try:
        if words[:1] == ["demo"]:
            return demo(words[1:])
        command: list[str] = []
        if words[:1] == ["launch"] and "--" in words:
            split = words.index("--")
            words, command = words[:split], words[split + 1 :]
        try:
            parser = _parser()
            arguments, rest = parser.parse_known_args(words)
            is_command = arguments.verb == "launch" and not command
            if rest and is_command and words[-len(rest) :] == rest:
                begun = shlex.join(words[: len(words) - len(rest)])
                raise UsageError(
                    f"Put -- before the command: datarax-dist {begun} -- {shlex.join(rest)}"
                )
            if rest:
                parser.error(f"unrecognized arguments: {' '.join(rest)}")
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
        note("interrupted")
        return INTERRUPTED
    except Exception as error:
        return _explain(error)
    return code


def _explain(error: Exception) -> int:
    """Says what went wrong, without a traceback; returns the exit code for it."""
    known: tuple[tuple[type[Exception], int], ...] = (
        (UsageError, USAGE),
        (InvalidArgumentError, USAGE),
        (StepNotFoundError, NOT_FOUND),
        (FormatVersionError, NEWER_FORMAT),
        (CorruptStepError, FINDINGS),
        (CheckpointError, FAILED),
    )
    note_error(error)
    if isinstance(error, StorageError) and error.errno == errno.EACCES:
        return NOT_AUTHORISED
    if isinstance(error, StorageError) and error.errno == errno.ENXIO:  # no such bucket
        return NOT_FOUND
    for kind, code in known:
        if isinstance(error, kind):
            return code
    return FAILED
