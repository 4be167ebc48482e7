"""How much host memory a save and a restore take at their peak, beside the state's own.

    python -m benchmarks.memory [--kind noise] [--mib 1024] [--leaves 16] [--place DIRECTORY]
                                [--who ours,orbax_v0,orbax_v1]

Each contender runs in a process of its own, which saves a small state before, so that libraries are
loaded. Prints one JSON line for each: extra bytes over bytes of the state; of a restore, after the
restored state is taken off.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks import contenders, states
from benchmarks.harness import Results, machine, significant
from benchmarks.speed import DEVICES


def peak_bytes() -> int:
    """The largest resident set of this process since `forget_peak`."""
    with open("/proc/self/status") as status:
        [line] = [line for line in status if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def forget_peak() -> int:
    """Returns the resident set now, from which the peak is counted on."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return peak_bytes()


def measure(name: str, place: str, kind: str, mib: float, leaves: int) -> dict[str, Any]:
    """Runs one contender, in this process."""
    import gc

    import jax

    put = states.over_all_devices()

    def make(root: str, state: Any) -> contenders.Contender:
        if name == "ours":
            return contenders.Ours(root, state)
        return contenders.PEERS[name](root, state)

    root = tempfile.mkdtemp(dir=place)
    try:
        first = make(f"{root}/first", states.make(kind, 1, leaves, put))
        first.save(1)
        first.restore(1)
        first.close()
        state = states.make(kind, mib, leaves, put)
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        contender = make(f"{root}/second", state)
        gc.collect()
        before = forget_peak()
        contender.save(1)
        saved = peak_bytes() - before
        gc.collect()
        before = forget_peak()
        restored = contender.restore(1)
        taken = peak_bytes() - before - size
        contender.close()
        del restored
        return {
            "benchmark": "memory",
            "who": name,
            "kind": kind,
            "mib": mib,
            "leaves": leaves,
            "file_system": machine(root)["file_system"],
            "save_extra_over_state": significant(saved / size),
            "restore_extra_over_state": significant(taken / size),
        }
    finally:
        shutil.rmtree(root)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=states.KINDS, default="noise")
    parser.add_argument("--mib", type=float, default=1024)
    parser.add_argument("--leaves", type=int, default=16)
    parser.add_argument("--place", default=tempfile.gettempdir())
    parser.add_argument("--who", default="ours,orbax_v0,orbax_v1")
    parser.add_argument("--one", action="store_true", help="measure in this process")
    asked = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={DEVICES}")
    results = Results()
    for name in asked.who.split(","):
        if asked.one:
            results.add(measure(name, asked.place, asked.kind, asked.mib, asked.leaves))
            continue
        more = [f"--{key}={getattr(asked, key)}" for key in ("kind", "mib", "leaves", "place")]
        command = [sys.executable, "-m", "benchmarks.memory", "--one", "--who", name, *more]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results.add(json.loads(told.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
