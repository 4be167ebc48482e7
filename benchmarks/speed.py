"""How fast a step is saved and restored, beside the raw medium and the peers, in turn.

    python -m benchmarks.speed [--kind noise] [--mib 1024] [--leaves 16] [--rounds 5] [--hosts 1]
                               [--mesh same] [--place DIRECTORY] [--peers orbax_v0,orbax_v1]

`save` runs from the call until the step is committed, verified and durable; `restore` includes the
verification that the defaults ask for. Files are read from the page cache, as those of the raw
limit are. With `--mesh other` arrays are restored with another sharding than they were saved with.
Several hosts are processes of this machine; the slowest one counts. Prints one JSON line for each
of the two.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import contenders, states
from benchmarks.harness import Results, in_turn, machine, ratio, seconds, summary

DEVICES = 4
_LARGE_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """What is to be measured; see the options of the command."""

    kind: str
    mib: float
    leaves: int
    rounds: int
    hosts: int
    mesh: str
    place: str
    peers: str


def measure(asked: Asked, root: str) -> list[dict[str, Any]]:
    """Runs all contenders in this process; on several hosts, in each of theirs."""
    import jax

    together = barrier()
    state = states.make(asked.kind, asked.mib, asked.leaves, states.over_all_devices())
    target = contenders.targets(state, states.other_sharding if asked.mesh == "other" else None)
    host, hosts = jax.process_index(), jax.process_count()
    ours = contenders.Ours(f"{root}/ours", state, target)
    ours.save(0)
    limit = contenders.Raw(f"{root}/raw-{host}", ours.sizes(0)[host::hosts])
    _check(ours.restore(0), state)
    ours.remove(0)
    all_of_them: dict[str, contenders.Contender] = {"raw": limit, "ours": ours}
    all_of_them |= {
        name: contenders.PEERS[name](f"{root}/{name}", state, target)
        for name in asked.peers.split(",")
        if name
    }
    phases: dict[str, list[Any]] = {"save": [], "restore": []}

    def one(act: str, name: str, number: int) -> float:
        contender = all_of_them[name]
        if act == "restore":
            contender.save(number)
        os.sync()  # nobody waits for what another one has left to be written
        if act == "restore" and (host == 0 or name == "raw"):
            _read_once(f"{root}/raw-{host}" if name == "raw" else f"{root}/{name}")
        together()

        def act_together() -> None:
            getattr(contender, act)(number)
            together()

        taken = seconds(act_together)
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
        found = in_turn(acts, asked.rounds)
        rows.append(
            {
                "benchmark": act,
                "kind": asked.kind,
                "mib": round(sum(x.nbytes for x in state.values()) / 2**20, 1),
                "leaves": len(state),
                "hosts": hosts,
                "mesh": asked.mesh,
                "file_system": machine(root)["file_system"],
                "seconds": {name: summary(values) for name, values in found.items()},
                "ours_over": {
                    name: ratio(found["ours"], values)
                    for name, values in found.items()
                    if name != "ours"
                },
                "fastest_raw_seconds": min(found["raw"]),
                "phases": {
                    name: summary([row.get(name, 0.0) for row in phases[act][1:]])["median"]
                    for name in phases[act][-1]
                },
            }
        )
    for contender in all_of_them.values():
        contender.close()
    return rows


def _check(restored: dict[str, Any], state: dict[str, Any]) -> None:
    """Raises unless what was restored is the state. Large arrays are compared where they are: JAX
    would keep a second copy of what it has once given as a numpy array.
    """
    import datarax_dist as dd

    large = [name for name, value in state.items() if value.nbytes >= _LARGE_BYTES]
    assert dd.tree_digest([restored[name] for name in large]) == dd.tree_digest(
        [state[name] for name in large]
    )
    for name in state.keys() - set(large):
        assert contenders.same(restored[name], state[name]), name


def barrier() -> Callable[[], None]:
    """Returns what waits for all hosts."""
    import itertools

    import jax
    from jax._src import distributed

    if jax.process_count() == 1:
        return lambda: None
    client, numbers = distributed.global_state.client, itertools.count()
    return lambda: client.wait_at_barrier(f"speed-{next(numbers)}", 600_000)


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
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--mesh", choices=["same", "other"], default="same")
    parser.add_argument("--place", default=tempfile.gettempdir())
    parser.add_argument("--peers", default="orbax_v0,orbax_v1")
    asked = Asked(**vars(parser.parse_args()))
    results = Results()
    root = tempfile.mkdtemp(dir=asked.place)
    try:
        if asked.hosts == 1:
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
            os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
            rows = measure(asked, root)
        else:
            from datarax_dist.testing import run_hosts

            devices = max(1, DEVICES // asked.hosts)
            told = run_hosts(
                measure,
                asked.hosts,
                devices_per_host=devices,
                args=(asked, root),
                timeout_seconds=580,
            )
            for result in told:
                if result.error is not None or result.exit_code:
                    sys.exit(f"host {result.host}: {result.error}\n{result.output[-3000:]}")
            rows = told[0].value
        for row in rows:
            results.add(row)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
