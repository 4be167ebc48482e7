"""How fast a step is saved and restored, beside the raw medium and the peers, in turn.

    python -m benchmarks.speed [--kind noise] [--mib 1024] [--leaves 16] [--rounds 5]
                               [--place DIRECTORY] [--peers orbax_v0,orbax_v1]

`save` runs from the call until the step is committed, verified and durable; `restore` includes the
verification that the defaults ask for. Files are read from the page cache, as those of the raw
limit are. Prints one JSON line for each of the two.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import contenders, states
from benchmarks.harness import Results, in_turn, machine, ratio, seconds, summary

DEVICES = 4


def measure(
    place: str, kind: str, mib: float, leaves: int, rounds: int, peers: list[str]
) -> list[dict[str, Any]]:
    """Runs all contenders in this process."""
    import numpy as np

    put = states.over_all_devices()

    state = states.make(kind, mib, leaves, put)
    root = tempfile.mkdtemp(dir=place)
    try:
        ours = contenders.Ours(f"{root}/ours", state)
        ours.save(0)
        limit = contenders.Raw(f"{root}/raw", ours.sizes(0))
        for name, value in ours.restore(0).items():
            assert np.array_equal(contenders.plain(value), contenders.plain(state[name])), name
        ours.remove(0)
        all_of_them: dict[str, contenders.Contender] = {"raw": limit, "ours": ours}
        all_of_them |= {name: contenders.PEERS[name](f"{root}/{name}", state) for name in peers}
        phases: dict[str, list[Any]] = {"save": [], "restore": []}

        def one(act: str, name: str, number: int) -> float:
            contender = all_of_them[name]
            if act == "restore":
                contender.save(number)
            os.sync()  # nobody waits for what another one has left to be written
            if act == "restore":
                _read_once(f"{root}/{name}")
            taken = seconds(lambda: getattr(contender, act)(number))
            if contender is ours:
                phases[act].append(dict(ours.report.seconds))
            contender.remove(number)
            return taken

        rows = []
        for base, act in ((1, "save"), (1001, "restore")):
            acts = {
                name: lambda number, base=base, act=act, name=name: one(act, name, base + number)
                for name in all_of_them
            }
            found = in_turn(acts, rounds)
            rows.append(
                {
                    "benchmark": act,
                    "kind": kind,
                    "mib": mib,
                    "leaves": leaves,
                    "file_system": machine(root)["file_system"],
                    "seconds": {name: summary(values) for name, values in found.items()},
                    "ours_over": {
                        name: ratio(found["ours"], values)
                        for name, values in found.items()
                        if name != "ours"
                    },
                    "phases": {
                        name: summary([row.get(name, 0.0) for row in phases[act][1:]])["median"]
                        for name in phases[act][-1]
                    },
                }
            )
        for contender in all_of_them.values():
            contender.close()
        return rows
    finally:
        shutil.rmtree(root)


def _read_once(directory: str) -> None:
    """Has the page cache hold all files of a directory: the first read after a write may be slow,
    for reasons that are the disk's, and some contenders have read while they saved.
    """
    for path in Path(directory).rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=states.KINDS, default="noise")
    parser.add_argument("--mib", type=float, default=1024)
    parser.add_argument("--leaves", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--place", default=tempfile.gettempdir())
    parser.add_argument("--peers", default="orbax_v0,orbax_v1")
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={DEVICES}")
    results = Results()
    peers = [name for name in arguments.peers.split(",") if name]
    for row in measure(
        arguments.place, arguments.kind, arguments.mib, arguments.leaves, arguments.rounds, peers
    ):
        results.add(row)


if __name__ == "__main__":
    main()
