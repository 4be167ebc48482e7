"""Disks that fill up, turn read-only, fail or stall: real file systems, small ones of our own.

Where they are mounted carries the name of the process that made them; those of processes that are
gone are thawed and unmounted before a new one is made.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cluster import Unavailable, is_stale, new_name, run

_PATIENCE_SECONDS = 20.0
_RESCUE_SECONDS = 60.0


class Disk:
    """A mounted file system; `path` is where."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    def fill(self) -> None:
        """Takes all the room that is left."""
        with contextlib.suppress(OSError), self._filler.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 12)):
                pass

    def make_room(self) -> None:
        self._filler.unlink(missing_ok=True)

    def refuse_writes(self) -> None:
        """Makes it read-only. While any file is open for writing the system says no; such a file is
        closed in a moment.
        """
        end = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                run("mount", "-o", "remount,ro", str(self.path))
                return
            except Unavailable:
                if time.monotonic() > end:
                    raise

    def allow_writes(self) -> None:
        run("mount", "-o", "remount,rw", str(self.path))

    def stall(self) -> None:
        """From here on whoever writes waits in the system call, and no signal ends that. A test
        that hangs in it is let go after a while.
        """
        run("fsfreeze", "--freeze", str(self.path))
        rescue = threading.Timer(_RESCUE_SECONDS, self.go_on)
        rescue.daemon = True
        rescue.start()

    def go_on(self) -> None:
        with contextlib.suppress(Unavailable):  # it does already
            run("fsfreeze", "--unfreeze", str(self.path))


@contextlib.contextmanager
def _mounted(*mount: str, image_bytes: int = 0) -> Iterator[Disk]:
    _remove_stale()
    path = Path(tempfile.gettempdir(), new_name())
    image = path.with_suffix(".image")
    path.mkdir()
    disk = Disk(path)
    try:
        source = "none"
        if image_bytes:
            source = str(image)
            with image.open("wb") as file:
                file.truncate(image_bytes)
            run("mkfs.ext4", "-q", "-F", source)
        run("mount", *mount, source, str(path))
        yield disk
    finally:
        _remove(path)


@contextlib.contextmanager
def tmpfs(size_bytes: int) -> Iterator[Disk]:
    """A small disk.

    Raises:
        Unavailable: this machine does not allow it.
    """
    with _mounted("-t", "tmpfs", "-o", f"size={size_bytes}") as disk:
        yield disk


class FailingDisk(Disk):
    """A file system on a device that can fail. Its blocks are kept on another disk, below it; where
    that has no room, a write of a new block is an I/O error.
    """

    def __init__(self, path: Path, below: Disk) -> None:
        super().__init__(path)
        self._below = below

    def fail(self) -> None:
        self._below.fill()

    def repair(self) -> None:
        """What somebody does who has got the device back: checks the file system, mounts it."""
        self._below.make_room()
        run("umount", str(self.path))
        image = str(self._below.path / "image")
        subprocess.run(["e2fsck", "-fy", image], capture_output=True, timeout=60, check=False)
        run("mount", "-o", "loop", image, str(self.path))


@contextlib.contextmanager
def failing(size_bytes: int = 64 << 20) -> Iterator[FailingDisk]:
    """A file system on a device that can fail.

    Raises:
        Unavailable: this machine does not allow it.
    """
    with tmpfs(size_bytes) as below:
        image = below.path / "image"
        with image.open("wb") as file:
            file.truncate(size_bytes)
        run("mkfs.ext4", "-q", "-F", str(image))
        path = Path(tempfile.gettempdir(), new_name())
        path.mkdir()
        try:
            run("mount", "-o", "loop", str(image), str(path))
            yield FailingDisk(path, below)
        finally:
            _remove(path)


@contextlib.contextmanager
def ext4(size_bytes: int = 64 << 20) -> Iterator[Disk]:
    """A file system on a block device (a loop device, on a file).

    Raises:
        Unavailable: this machine does not allow it.
    """
    with _mounted("-o", "loop", image_bytes=size_bytes) as disk:
        yield disk


def _remove(path: Path) -> None:
    disk = Disk(path)
    disk.go_on()
    if os.path.ismount(path):
        run("umount", "--lazy", str(path))
    # A write that was given up may still make its directories, below the place of the mount.
    shutil.rmtree(path, ignore_errors=True)
    path.with_suffix(".image").unlink(missing_ok=True)


def _remove_stale() -> None:
    for path in Path(tempfile.gettempdir()).iterdir():
        if path.is_dir() and is_stale(path.name):
            with contextlib.suppress(Unavailable, OSError):  # another process was faster
                _remove(path)


class OwnMounts:
    """The mounts of one host, in a namespace of its own. They end with the host.

    A write to what is `covered` goes to a small disk of this host alone, what is not written is
    read through.
    """

    prefix = ("unshare", "--mount", "--propagation", "private")

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()

    def check(self) -> None:
        """Raises `Unavailable` when this machine does not allow it."""
        at = str(self._folder)
        mount = f"lowerdir={at},upperdir={at}/upper,workdir={at}/work"
        script = (
            f"mount -t tmpfs none {at} && mkdir {at}/upper {at}/work {at}/there"
            f" && mount -t overlay -o {mount} none {at}/there"
        )
        run(*self.prefix, "sh", "-ec", script)

    def cover(self, pid: int, path: Path, size_bytes: int) -> None:
        disk = self._folder
        options = f"lowerdir={path},upperdir={disk}/upper,workdir={disk}/work"
        run(*_inside(pid), "mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "none", str(disk))
        run(*_inside(pid), "mkdir", f"{disk}/upper", f"{disk}/work")
        run(*_inside(pid), "mount", "-t", "overlay", "-o", options, "none", str(path))

    def uncover(self, pid: int, path: Path) -> None:
        run(*_inside(pid), "umount", str(path))


def _inside(pid: int) -> tuple[str, ...]:
    return ("nsenter", f"--target={pid}", "--mount")
