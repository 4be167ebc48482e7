"""How long `save()` blocks, beside Orbax's `AsyncCheckpointer.save`, in one run, interleaved.

    python -m benchmarks.blocking [--hosts 2] [--mib 256] [--rounds 9]

Prints one JSON line for each host: medians in seconds, their ratio, and the cost of one exchange,
which is what ours may add.
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
    ours, theirs, exchanges = [], [], []
    with dd.Checkpointer(f"{root}/ours", keep=dd.latest(1)) as ckpt:
        for step in range(rounds + 1):
            begin = time.perf_counter()
            handle = ckpt.save(step, state=state)
            ours.append(time.perf_counter() - begin)
            assert handle is not None
            handle.result()
            ckpt.wait_until_finished()
            begin = time.perf_counter()
            ckpt._group.exchange("bench", {"step": step}, timeout_seconds=60)
            exchanges.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            plain.save(f"{root}/plain/{step}", args=ocp.args.PyTreeSave(state))
            theirs.append(time.perf_counter() - begin)
            plain.wait_until_finished()
            ckpt._group.exchange("pause", None, timeout_seconds=60)
            if jax.process_index() == 0:
                shutil.rmtree(f"{root}/plain/{step}")
    plain.close()
    medians = [statistics.median(times[1:]) for times in (ours, theirs, exchanges)]
    return {
        "hosts": jax.process_count(),
        "mib": mib,
        "ours_seconds": round(medians[0], 5),
        "orbax_seconds": round(medians[1], 5),
        "exchange_seconds": round(medians[2], 5),
        "ratio": round(medians[0] / medians[1], 3),
        "within_orbax_plus_one_exchange": medians[0] <= medians[1] + medians[2],
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
