"""Does a step that was reported as saved survive a power cut? Ours and plain Orbax's, on real file
systems.

    sudo python -m benchmarks.power_cut [--kinds ext4,xfs,btrfs] [--cuts 2] [--moments 4]

A file system is made in a file, a process saves on it again and again, and the file is copied: what
is in the copy is what the disk had received. Copying a file takes a while, and of one that is being
written would be many moments in one. So it lies on a file system of its own (xfs or btrfs, the
*vault*), where a copy shares its blocks: "Clones are atomic with regards to concurrent writes"
(ioctl_ficlone(2)).

Two disks are tried. One loses nothing that it was sent. The other has a cache, which the cut
empties: its file lies on an ext4 in another file, and that one is copied, so what the loop device
has written and not flushed stays behind in the memory of this machine.

Each disk is cut (a) the moment a save reports success, by the process that saves; here plain Orbax
stands beside ours; (b) at random moments of a loop of saves, with retention, of which some save a
step again. Then every copy is mounted, which replays its journal, and what is on it is read: a step
that was reported, and that nobody has begun to delete, is there with every byte; another one is
whole or not there; and the next save works.

It ends with 1 on a breach, and with 3 where it cannot run (it needs root, loop devices, mkfs).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import logging
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_FICLONE = 0x40049409
_MIB = 1 << 20
_DISK_BYTES = 320 * _MIB  # xfs makes none below 300 MiB
_KEPT = 3
_MKFS = {"ext4": ["-q", "-F"], "xfs": ["-q", "-f"], "btrfs": ["-q", "-f"]}
_MOUNT = {"ext4": "loop", "xfs": "loop,nouuid", "btrfs": "loop"}


class CannotRunError(Exception):
    """Something that this needs is not there; the message says what."""


def run(*command: Any) -> None:
    """Runs a command that must succeed."""
    try:
        subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise CannotRunError(f"{command[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        raise CannotRunError(f"{error.stderr.strip() or error}") from error


def make(kind: str, image: Path) -> None:
    run(f"mkfs.{kind}", *_MKFS[kind], image)


@contextlib.contextmanager
def mounted(kind: str, image: Path, point: Path) -> Iterator[Path]:
    """Mounts an image, and unmounts it."""
    point.mkdir(parents=True, exist_ok=True)
    if kind == "btrfs":  # copies have one and the same identity
        if shutil.which("btrfs") is None:
            raise CannotRunError("btrfs is not installed")
        subprocess.run(["btrfs", "device", "scan", "--forget"], check=False, capture_output=True)
    run("mount", "-t", kind, "-o", _MOUNT[kind], image, point)
    try:
        yield point
    finally:
        unmount(point)


def unmount(point: Path) -> None:
    """Unmounts; a loop device on it lets go of its file a moment after it was unmounted itself."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return run("umount", point)
        except CannotRunError as error:
            if "busy" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def allocate(image: Path, size: int) -> None:
    with image.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
        os.fsync(file.fileno())


def clone(source: Path, copy: Path) -> None:
    """Copies a file as it is at one moment: nobody can write to it meanwhile."""
    with source.open("rb") as old, copy.open("wb") as new:
        fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())


@contextlib.contextmanager
def vault(folder: Path) -> Iterator[Path]:
    """Mounts a file system on which files can be cloned."""
    image, reasons = folder / "vault.img", []
    with contextlib.ExitStack() as stack:
        for kind in ("xfs", "btrfs"):
            with image.open("wb") as file:
                file.truncate(8 << 30)
            try:
                with contextlib.ExitStack() as attempt:
                    make(kind, image)
                    point = attempt.enter_context(mounted(kind, image, folder / "vault"))
                    (point / "a").write_bytes(b"a")
                    clone(point / "a", point / "b")
                    stack.push(attempt.pop_all())
                    break
            except (CannotRunError, OSError) as error:
                reasons.append(f"{kind}: {error}")
        else:
            raise CannotRunError(f"no file system that can clone files ({'; '.join(reasons)})")
        yield point


@dataclass(slots=True)
class Disk:
    """A disk that can be cut.

    Attributes:
        point: where its file system is mounted.
        cloned: the file that is copied at a cut.
        with_cache: it loses at a cut what was not flushed.
    """

    kind: str
    point: Path
    cloned: Path
    with_cache: bool


@contextlib.contextmanager
def disk(kind: str, store: Path, with_cache: bool) -> Iterator[Disk]:
    """Makes a disk in the vault, with a file system on it, and mounts it."""
    image = store / "disk.img"
    with contextlib.ExitStack() as stack:
        cloned = image
        if with_cache:
            cloned = store / "below.img"
            allocate(cloned, _DISK_BYTES + 160 * _MIB)
            make("ext4", cloned)
            image = stack.enter_context(mounted("ext4", cloned, store / "below")) / "disk.img"
        allocate(image, _DISK_BYTES)
        make(kind, image)
        run("sync", "-f", image)
        yield Disk(
            kind, stack.enter_context(mounted(kind, image, store / "fs")), cloned, with_cache
        )


@contextlib.contextmanager
def after_cut(cut: Disk, copy: Path, folder: Path) -> Iterator[Path]:
    """Mounts what a cut has left."""
    with contextlib.ExitStack() as stack:
        if cut.with_cache:
            copy = stack.enter_context(mounted("ext4", copy, folder / "below-after")) / "disk.img"
        yield stack.enter_context(mounted(cut.kind, copy, folder / "after"))


# The process that saves


def state_of(step: int, version: int) -> dict[str, Any]:
    """A state of 2 MiB that depends on the step, and on which saving of it this is."""
    import jax
    import numpy as np

    value = 1000 * step + version
    return {f"p{i}": jax.numpy.full((512, 256), value + i / 8, np.float32) for i in range(4)}


class Ours:
    """Saves by datarax_dist."""

    def __init__(self, root: Path) -> None:
        import datarax_dist as dd

        self._ckpt = dd.Checkpointer(root, keep=dd.latest(_KEPT))

    def save(self, step: int, version: int) -> None:
        handle = self._ckpt._save(
            step,
            state=state_of(step, version),
            data=None,
            metadata={"version": version},
            force=True,
            replace=version > 0,
        )
        assert handle is not None
        handle.result()


class Orbax:
    """Saves by plain Orbax; `version` is left out, it replaces nothing."""

    def __init__(self, root: Path) -> None:
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(max_to_keep=_KEPT)
        self._manager = ocp.CheckpointManager(root, options=options)

    def save(self, step: int, version: int) -> None:
        import orbax.checkpoint as ocp

        self._manager.save(step, args=ocp.args.StandardSave(state_of(step, 0)))
        self._manager.wait_until_finished()


SIDES = {"ours": Ours, "orbax": Orbax}


def work(point: Path) -> None:
    """Does what stdin says, and says on stdout what it has begun and what was reported.

    `once SIDE IMAGE COPY` saves a step and clones at the report; `loop SIDE` saves until there is
    another command, or the process is killed.
    """
    sides = {name: side(point / name) for name, side in SIDES.items()}
    steps = dict.fromkeys(SIDES, 1)
    for side in sides.values():
        side.save(1, 0)  # compiles, and makes the directories
    say("ready")
    while line := sys.stdin.readline():
        command, name, *paths = line.split()
        if command == "once":
            step = steps[name] = steps[name] + 1
            run("sync", "-f", point)
            sides[name].save(step, 0)
            clone(Path(paths[0]), Path(paths[1]))
            say("reported", name, step, 0)
        while command == "loop" and not select.select([sys.stdin], [], [], 0)[0]:
            step = steps[name] = steps[name] + 1
            for version in range(2 if step % 3 == 0 and name == "ours" else 1):
                say("begun", name, step, version)
                sides[name].save(step, version)
                say("reported", name, step, version)


def say(*words: Any) -> None:
    print(*words, flush=True)


@dataclass(slots=True)
class Known:
    """What the process has said of one side.

    Attributes:
        reported, begun: step -> the last version of it that was.
        reports: how many there were.
    """

    reported: dict[int, int] = field(default_factory=dict)
    begun: dict[int, int] = field(default_factory=dict)
    reports: int = 0


class Worker:
    """The process that saves, as seen from here; it is killed at the end."""

    def __init__(self, point: Path) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.power_cut", "--work", str(point)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        self._known = {side: Known() for side in SIDES}
        self._changed = threading.Condition()
        self._is_ready = self._is_over = False
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Worker:
        self._thread.start()
        self._wait_until(lambda: self._is_ready)
        return self

    def __exit__(self, *error: Any) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join()
        self._errors.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                word, *rest = line.split()
                if rest:
                    known = self._known[rest[0]]
                    getattr(known, word)[int(rest[1])] = int(rest[2])
                    known.reports += word == "reported"
                self._is_ready = True
                self._changed.notify_all()
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def _wait_until(self, there: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: there() or self._is_over, 120)
            if not there():
                self._errors.seek(0)
                raise RuntimeError(f"the process that saves: {self._errors.read()[-2000:]}")

    def _tell(self, *words: Any) -> None:
        assert self._process.stdin is not None
        print(*words, file=self._process.stdin, flush=True)

    def known(self, side: str) -> Known:
        with self._changed:
            known = self._known[side]
            return Known(dict(known.reported), dict(known.begun), known.reports)

    def wait(self, side: str) -> None:
        """Waits for the next report."""
        goal = self.known(side).reports + 1
        self._wait_until(lambda: self._known[side].reports >= goal)

    def once(self, side: str, image: Path, copy: Path) -> int:
        """Lets it save, and cut; returns the step."""
        goal = self.known(side).reports + 1
        self._tell("once", side, image, copy)
        self._wait_until(lambda: self._known[side].reports >= goal)
        return max(self.known(side).reported)

    def loop(self, side: str) -> None:
        """Lets it save on and on."""
        self._tell("loop", side)


# What is there afterwards


@dataclass(slots=True)
class Cut:
    """A copy, and what must be on it.

    Attributes:
        after_report: it was made the moment a save reported success, and not at random.
        wanted: step -> versions of which one must be there.
        unreported: the step whose save was under way, if it is a new one.
    """

    side: str
    copy: Path
    after_report: bool
    wanted: dict[int, set[int]]
    unreported: int | None = None


@dataclass(slots=True)
class Found:
    """What was on a copy.

    Attributes:
        steps: what is there -> its version, or why it cannot be restored.
        wrong: what else no cut may leave.
    """

    steps: dict[int, int | str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def read_ours(root: Path) -> Found:
    """Restores every step, looks for what is left of others, and makes the next save."""
    import datarax_dist as dd

    found = Found()
    with dd.Checkpointer(root, keep=dd.latest(_KEPT)) as ckpt:
        for candidate in ckpt.inspect().candidates:
            step = candidate.step
            if candidate.state == "committed":
                try:
                    restored = ckpt.restore(step=step, state=state_of(0, 0))
                    version = restored.metadata["version"]
                    found.steps[step] = judged(step, version, restored.state)
                except Exception as error:
                    found.steps[step] = f"{type(error).__name__}: {str(error)[:150]}"
            elif candidate.name.isdigit():
                found.wrong.append(f"{candidate.name} is {candidate.state}")
        handle = ckpt.save(10_000, state=state_of(10_000, 0))
        assert handle is not None
        handle.result()
        left = [c.name for c in ckpt.inspect().candidates if c.state != "committed"]
        found.wrong += [f"{name} is left behind by the next save" for name in left]
    return found


def read_orbax(root: Path) -> Found:
    """Restores every step."""
    import orbax.checkpoint as ocp

    found = Found()
    with ocp.CheckpointManager(root) as manager:
        for step in manager.all_steps():
            try:
                restored = manager.restore(step, args=ocp.args.StandardRestore(state_of(0, 0)))
                found.steps[step] = judged(step, 0, restored)
            except Exception as error:
                found.steps[step] = f"{type(error).__name__}: {str(error)[:150]}"
    return found


def judged(step: int, version: int, state: Any) -> int | str:
    import datarax_dist as dd

    is_same = dd.tree_digest(state) == dd.tree_digest(state_of(step, version))
    return version if is_same else "it is not what was saved"


READERS = {"ours": read_ours, "orbax": read_orbax}


def wanted_after(before: Known, after: Known) -> dict[int, set[int]]:
    """Returns which of the steps that were reported before a cut must be there: what a save that
    had begun when it was over may delete, need not.
    """
    newest = max(after.begun)
    return {
        step: {version, after.begun.get(step, version)}
        for step, version in before.reported.items()
        if step > newest - _KEPT
    }


def make_cuts(
    cut: Disk, store: Path, arguments: argparse.Namespace, chance: random.Random
) -> list[Cut]:
    """Saves, and cuts."""
    made: list[Cut] = []

    def copy() -> Path:
        return store / f"cut{len(made)}.img"

    with Worker(cut.point) as worker:
        for side in SIDES:
            for _ in range(arguments.cuts):
                step = worker.once(side, cut.cloned, copy())
                made.append(Cut(side, copy(), True, {step: {0}}))
        for side in SIDES:
            worker.loop(side)
            for _ in range(arguments.moments):
                worker.wait(side)
                time.sleep(chance.random() * 0.4)  # the moment is what is drawn
                before = worker.known(side)
                clone(cut.cloned, copy())
                after = worker.known(side)
                new = max(after.begun)
                unreported = new if new not in before.reported else None
                made.append(Cut(side, copy(), False, wanted_after(before, after), unreported))
    return made


def try_kind(kind: str, store: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Cuts the disks of one file system; returns what was seen."""
    counted = ("cuts", "reported", "lost", "whole", "invisible")
    moments = {side: dict.fromkeys(counted, 0) for side in SIDES}
    survived, cuts, breaches, begin = dict.fromkeys(SIDES, 0), 0, 0, time.monotonic()
    for with_cache in (False, True):
        chance = random.Random(f"{arguments.seed} {kind} {with_cache}")
        with tempfile.TemporaryDirectory(dir=store) as own:
            with disk(kind, Path(own), with_cache) as cut:
                made = make_cuts(cut, Path(own), arguments, chance)
            for number, one in enumerate(made):
                try:
                    with after_cut(cut, one.copy, folder) as point:
                        found = READERS[one.side](point / one.side)
                except Exception as error:
                    found = Found(wrong=[f"{type(error).__name__}: {str(error)[:200]}"])
                lost = {
                    step: found.steps.get(step, "it is not there")
                    for step, versions in one.wanted.items()
                    if found.steps.get(step) not in versions
                }
                torn = {s: f for s, f in found.steps.items() if isinstance(f, str)}
                told = [f"step {step}: {why}" for step, why in (torn | lost).items()] + found.wrong
                where = f"{kind}, {'with' if with_cache else 'without'} a cache, cut {number}"
                for text in told:
                    print(f"  {where}: {one.side}: {text}", file=sys.stderr)
                breaches += bool(told) and one.side == "ours"
                if one.after_report:
                    cuts += one.side == "ours"
                    survived[one.side] += not told
                    continue
                seen = moments[one.side]
                seen["cuts"] += 1
                seen["reported"] += len(one.wanted)
                seen["lost"] += len(lost)
                if one.unreported is not None:
                    seen["whole" if one.unreported in found.steps else "invisible"] += 1
    return {
        "kind": kind,
        "cuts": cuts,
        "survived": survived,
        "random": moments,
        "breaches": breaches,
        "seconds": round(time.monotonic() - begin),
    }


def place(asked: str | None) -> str | None:
    """Returns where to put the files: in memory, where there is room."""
    memory = "/dev/shm"
    if asked is None and os.path.isdir(memory) and shutil.disk_usage(memory).free > 4 << 30:
        return memory
    return asked


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cuts."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.power_cut", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--kinds", default=",".join(_MKFS))
    parser.add_argument(
        "--cuts", type=int, default=1, help="at a reported success, on each of the two disks"
    )
    parser.add_argument("--moments", type=int, default=3, help="random ones, on each of the two")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where to put the files; by default in memory")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.work is not None:
        work(arguments.work)
        return 0
    if unknown := set(arguments.kinds.split(",")) - set(_MKFS):
        parser.error(f"--kinds: {', '.join(sorted(unknown))}")
    if os.geteuid() != 0:
        print("cannot run here: only root can mount file systems")
        return 3
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    logging.getLogger("datarax_dist").setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all is unmounted
    breaches, tried = 0, 0
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=place(arguments.folder))))
        try:
            store = stack.enter_context(vault(folder))
        except CannotRunError as error:
            print(f"cannot run here: {error}")
            return 3
        for kind in arguments.kinds.split(","):
            try:
                seen = try_kind(kind, store, folder, arguments)
            except CannotRunError as error:
                print(f"cannot run {kind} here: {error}", flush=True)
                continue
            print(json.dumps(seen), flush=True)
            tried += 1
            breaches += seen["breaches"]
    return 1 if breaches else 0 if tried else 3


if __name__ == "__main__":
    sys.exit(main())
