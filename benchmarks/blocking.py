"""How long `save()` blocks, beside Orbax's `AsyncCheckpointer.save`, in one run, interleaved.

    python -m benchmarks.blocking [--hosts 2] [--mib 256] [--rounds 9]

Prints one JSON line for each host: medians in seconds, the cost of one exchange, which is what ours
may add, and the phases of ours. Every measurement begins after an exchange, so that no host waits
for another that is late.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from typing import Any

import numpy as np

from datarax_dist.testing import run_hosts

PHASES = ("capture", "prepare", "start")


def measure(root: str, mib: int, rounds: int) -> dict[str, Any]:
    """Runs on each host: both savers in turn, on the same state."""
    import jax
    import orbax.checkpoint as ocp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import datarax_dist as dd

    mesh = Mesh(np.array(jax.devices()), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    shape = (16 * jax.device_count(), mib * (1 << 18) // 16 // (16 * jax.device_count()))
    state = {
        f"p{i}": jax.make_array_from_callback(
            shape,
            sharding,
            lambda index: (
                np.random.default_rng(index[0].start or 0)
                .standard_normal((shape[0] // jax.device_count(), shape[1]))
                .astype(np.float32)
            ),
        )
        for i in range(16)
    }
    active = set(range(jax.process_count())) if jax.process_count() > 1 else None
    options = ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes=active, barrier_sync_key_prefix="plain"
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_zarr3=True, use_compression=False, multiprocessing_options=options
    )
    plain = ocp.AsyncCheckpointer(handler, multiprocessing_options=options)
    ours, theirs, exchanges, phases = [], [], [], []
    with dd.Checkpointer(f"{root}/ours", keep=dd.latest(1)) as ckpt:

        def together() -> float:
            ckpt._group.exchange("together", None, timeout_seconds=60)
            return time.perf_counter()

        def save_ours(step: int) -> None:
            begin = together()
            handle = ckpt.save(step, state=state)
            ours.append(time.perf_counter() - begin)
            assert handle is not None
            report = handle.result()
            phases.append([report.seconds[name] for name in PHASES])
            ckpt.wait_until_finished()

        def save_theirs(step: int) -> None:
            begin = together()
            plain.save(f"{root}/plain/{step}", args=ocp.args.PyTreeSave(state))
            theirs.append(time.perf_counter() - begin)
            plain.wait_until_finished()

        for step in range(rounds + 1):
            first, second = (save_ours, save_theirs) if step % 2 else (save_theirs, save_ours)
            first(step)
            second(step)
            begin = together()
            ckpt._group.exchange("bench", {"step": step}, timeout_seconds=60)
            exchanges.append(time.perf_counter() - begin)
            together()
            if jax.process_index() == 0:
                shutil.rmtree(f"{root}/plain/{step}")
    plain.close()
    mine, orbax, exchange = (statistics.median(times[1:]) for times in (ours, theirs, exchanges))
    return {
        "benchmark": "blocking",
        "host": jax.process_index(),
        "hosts": jax.process_count(),
        "mib": mib,
        "ours_seconds": round(mine, 5),
        "orbax_seconds": round(orbax, 5),
        "exchange_seconds": round(exchange, 5),
        "ours_to_orbax_plus_exchange": round(mine / (orbax + exchange), 3),
        "phases": {
            name: round(statistics.median(row[number] for row in phases[1:]), 5)
            for number, name in enumerate(PHASES)
        },
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    root = tempfile.mkdtemp()
    try:
        results = run_hosts(
            measure,
            arguments.hosts,
            devices_per_host=2,
            args=(root, arguments.mib, arguments.rounds),
            timeout_seconds=300,
        )
        for result in results:
            print(json.dumps(result.value) if result.error is None else result.error)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
