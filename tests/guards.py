"""Removes each guard of the promises, one at a time, and shows which test notices.

    python tests/guards.py [NAME ...]

It works on a copy of the tree. A guard whose removal no test notices ends the command with 1: it is
a missing test, or a needless guard.

A test that fails anyway notices nothing. So at the end the tests that have noticed are run with all
guards in place: all of them where guards are named (`""` names all), else a few drawn by chance.
"""

from __future__ import annotations

import compileall
import contextlib
import gc
import multiprocessing
import multiprocessing.connection
import os
import py_compile
import queue
import random
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

TREE = Path(__file__).parent.parent
JOBS = 4 * (os.cpu_count() or 1)  # a removed guard often means that somebody waits
_SAMPLE = 8  # of some hundreds: a few seconds
_HANGS_SECONDS = 120.0  # the slowest takes about 25
_HANGS = "a test that does not come to an end"
# Tests run in processes forked from one that has loaded what takes long to load.
_SERVER = multiprocessing.get_context("forkserver")
# Who starts a process asks all others how they ended, each of which can be asked by one thread.
_children = threading.Lock()
_LOADED = ["pytest", "jax", "orbax.checkpoint", "tensorstore", "gcsfs", "flax.nnx", "optax"]


@dataclass(frozen=True)
class Guard:
    """`old` in the file is replaced by `new`; one of the tests must fail then."""

    name: str
    file: str
    old: str
    new: str
    tests: str


with open(Path(__file__).with_suffix(".toml"), "rb") as _file:
    GUARDS = [Guard(**guard) for guard in tomllib.load(_file)["guard"]]


def prepared(folder: Path) -> Path:
    """Returns a copy of the tree in which all that a test loads has been compiled."""
    for part in ("datarax_dist", "tests", "benchmarks", "docs", "README.md", "pyproject.toml"):
        source = TREE / part
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / part, ignore=ignored)
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(source, folder / part)
    # Each guard would have it all compiled again. By content: a file without its guard may be as
    # old, to the second, and as long.
    by_content = py_compile.PycInvalidationMode.CHECKED_HASH
    for part in ("datarax_dist", "tests", "benchmarks"):
        compileall.compile_dir(folder / part, quiet=1, invalidation_mode=by_content)
    code, told = ended(folder, ["tests", "--collect-only"])  # has pytest compile the tests its way
    if code:
        raise SystemExit(f"the tests cannot be collected ({code}):\n{told[-2000:]}")
    return folder


def main(wanted: list[str]) -> int:
    import conftest  # noqa: F401  what is loaded for the tests finds their environment

    chosen = [g for g in GUARDS if not wanted or any(word in g.name for word in wanted)]
    unnoticed, by_tests = [], set[str]()
    _SERVER.set_forkserver_preload(_LOADED)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(JOBS) as pool:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        first = prepared(Path(folder) / "0")
        copies.put(first)
        for number in range(1, JOBS):
            copies.put(Path(shutil.copytree(first, Path(folder) / str(number))))

        def tried(guard: Guard) -> tuple[Guard, float, str]:
            copy, begin = copies.get(), time.monotonic()
            try:
                noticed = removed(copy, guard)
                return guard, time.monotonic() - begin, noticed
            finally:
                copies.put(copy)

        for guard, seconds, noticed in pool.map(tried, chosen):
            if not noticed:
                unnoticed.append(guard.name)
            elif noticed == _HANGS:
                by_tests.add(guard.tests)
            else:
                by_tests.add(shlex.quote(f"tests/{noticed}"))
            print(f"{seconds:5.1f} s  {guard.name}: {noticed or 'NOT NOTICED'}", flush=True)

        def fails_anyway(tests: str) -> str:
            copy = copies.get()
            try:
                return tests if failing(copy, tests, "nothing") else ""
            finally:
                copies.put(copy)

        drawn = sorted(by_tests)
        if not wanted:
            drawn = random.sample(drawn, min(_SAMPLE, len(drawn)))
        useless = [tests for tests in pool.map(fails_anyway, drawn) if tests]
    print(
        f"{len(chosen)} guards removed, one at a time;"
        f" no test notices the removal of {len(unnoticed)}: {', '.join(unnoticed) or 'none'}\n"
        f"{len(drawn)} of {len(by_tests)} tests that notice were run with all guards in place; of"
        f" these {len(useless)} fail all the same: {', '.join(useless) or 'none'}"
    )
    return 1 if unnoticed or useless else 0


def removed(copy: Path, guard: Guard) -> str:
    """Returns the test that fails without a guard; empty when none does."""
    file = copy / "datarax_dist" / guard.file
    text = file.read_text()
    if text.count(guard.old) != 1:
        raise SystemExit(
            f"{guard.name}: {guard.file} has changed; it is there {text.count(guard.old)} times"
        )
    file.write_text(text.replace(guard.old, guard.new))
    try:
        return failing(copy, guard.tests, guard.name)
    finally:
        file.write_text(text)


def failing(copy: Path, tests: str, without: str) -> str:
    """Returns the first of some tests that fails in a copy; empty when none does."""
    code, told = ended(copy, shlex.split(tests))
    if code is None:
        return _HANGS
    failed = [line for line in told.splitlines() if line.startswith("FAILED ")]
    if code != len(failed):  # -x: one at the most
        raise SystemExit(f"without {without}: {tests} did not run ({code}):\n{told[-2000:]}")
    if "NameError: name" in told or "SyntaxError: " in told:  # it fails for what `new` says
        raise SystemExit(f"without {without}: what is left is no program:\n{told[-2000:]}")
    return failed[0].removeprefix("FAILED tests/").split(" - ")[0] if failed else ""


def ended(copy: Path, arguments: Sequence[str]) -> tuple[int | None, str]:
    """Runs pytest in a copy; returns how it ended, `None` where it did not, and what it printed."""
    told = copy / "told.txt"
    process = _SERVER.Process(target=_run, args=(str(copy), arguments, str(told)))
    with _children:
        process.start()
    multiprocessing.connection.wait([process.sentinel], _HANGS_SECONDS)
    with _children:
        code = process.exitcode
    with contextlib.suppress(ProcessLookupError):  # the tests' own processes, too
        os.killpg(process.pid or 0, signal.SIGKILL)
    with _children:
        process.join()
    return code, told.read_text()


def _run(copy: str, arguments: Sequence[str], told: str) -> NoReturn:
    """In a process of its own."""
    os.setsid()
    sys.dont_write_bytecode = False  # what is set on the machine would have all compiled each time
    os.chdir(copy)
    os.environ["PYTHONPATH"] = copy
    gc.freeze()  # what was loaded stays; pytest collects twice at its end
    sys.path[:0] = [copy, f"{copy}/tests"]
    with open(told, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    # A place of its own: runs beside it remove what they take for old of a common one.
    options = ["-q", "-x", "-n", "0", f"--basetemp={copy}/temporary"]
    needless = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    code = pytest.main([*options, *needless, *arguments])
    sys.stdout.flush()
    os._exit(int(code))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
