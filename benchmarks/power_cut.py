"""Does a step that was reported as saved survive a power cut? Ours and plain Orbax's, on a real
file system.

    sudo python -m benchmarks.power_cut [--cuts 9] [--kind ext4]

Makes a file system in a file, saves on it, and copies the file at the moment a save reports
success: what the "disk" has received by then. The copy is mounted, which replays the journal, and
what is on it is checked: for ours every byte, for Orbax that the step is there and restores what
was saved. Needs root, loop devices and mkfs; where there are none it says so and exits with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

import datarax_dist as dd


@contextlib.contextmanager
def mounted(image: Path, point: Path) -> Iterator[Path]:
    """Mounts an image, and unmounts it."""
    point.mkdir()
    subprocess.run(["mount", "-o", "loop", image, point], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", point], check=True)


def state_of(step: int) -> dict[str, jax.Array]:
    """A state of 4 MiB that depends on the step."""
    return {f"p{i}": jax.numpy.full((1024, 256), step * 10 + i, np.float32) for i in range(4)}


def same(step: int, state: object) -> bool:
    return dd.tree_digest(state) == dd.tree_digest(state_of(step))


def save_ours(root: Path, step: int) -> None:
    with dd.Checkpointer(root) as ckpt:
        handle = ckpt.save(step, state=state_of(step))
        assert handle is not None
        handle.result()


def check_ours(root: Path, step: int) -> bool:
    with dd.Checkpointer(root) as ckpt:
        restored = ckpt.try_restore(state=state_of(0))
    return restored is not None and restored.step == step and same(step, restored.state)


def save_orbax(root: Path, step: int) -> None:
    with ocp.CheckpointManager(root) as manager:
        manager.save(step, args=ocp.args.StandardSave(state_of(step)))
        manager.wait_until_finished()


def check_orbax(root: Path, step: int) -> bool:
    with ocp.CheckpointManager(root) as manager:
        if manager.latest_step() != step:
            return False
        return same(step, manager.restore(step, args=ocp.args.StandardRestore(state_of(0))))


def cut(
    kind: str, save: Callable[[Path, int], None], check: Callable[[Path, int], bool], step: int
) -> bool:
    """Saves, cuts, and returns whether the reported step is there afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        image, copy = Path(folder) / "disk", Path(folder) / "copy"
        with image.open("wb") as file:
            file.truncate(256 << 20)
        subprocess.run([f"mkfs.{kind}", "-q", image], check=True)
        with mounted(image, Path(folder) / "before") as point:
            subprocess.run(["sync", "-f", point], check=True)
            save(point / "run", step)
            shutil.copyfile(image, copy)
        with mounted(copy, Path(folder) / "after") as point:
            try:
                return check(point / "run", step)
            except Exception as error:
                print(f"  {type(error).__name__}: {str(error)[:150]}", file=sys.stderr)
                return False


def main() -> int:
    """Runs the cuts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuts", type=int, default=9)
    parser.add_argument("--kind", default="ext4")
    arguments = parser.parse_args()
    sides = {"ours": (save_ours, check_ours), "orbax": (save_orbax, check_orbax)}
    survived = dict.fromkeys(sides, 0)
    try:
        for number in range(arguments.cuts):
            for name, (save, check) in sides.items():
                survived[name] += cut(arguments.kind, save, check, number + 1)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        print(f"cannot run here: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"kind": arguments.kind, "cuts": arguments.cuts, "survived": survived}))
    return 0 if survived["ours"] == arguments.cuts else 1


if __name__ == "__main__":
    sys.exit(main())
