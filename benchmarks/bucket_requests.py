"""How many requests a save and a restore in a bucket take, beside plain Orbax's `CheckpointManager`
in the same run; and how long `save()` blocks there, beside a local path.

    python -m benchmarks.bucket_requests [--hosts 1,4,16] [--arrays 10,1000] [--latency-ms 30]

The bucket is `FakeGCS`, which answers each request after `--latency-ms`. Prints one JSON line for
each number of hosts and arrays: requests of all hosts together in the second save of a job (which
retains both steps), in a restore by a new `Checkpointer` or `CheckpointManager`, and in a
verification of sizes. `blocked_ms` are medians of `--rounds` saves, in turn in the bucket and on a
local path.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from datarax_dist.testing import FakeGCS, run_hosts


def state_of(arrays: int) -> dict[str, Any]:
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
    shape = (jax.device_count(), 8)
    return {
        f"a{n}": jax.make_array_from_callback(
            shape, sharding, lambda index, n=n: np.full((1, 8), n, np.float32)
        )
        for n in range(arrays)
    }


def measure(folder: str, arrays: int, rounds: int) -> dict[str, Any]:
    """Runs on each host: marks what it does with requests for objects that are not there."""
    import orbax.checkpoint as ocp

    import datarax_dist as dd
    from datarax_dist.buckets import BucketStore
    from datarax_dist.hosts import current_group

    for name in ("absl", "gcsfs", "datarax_dist", "fsspec"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    group, marks = current_group("marks"), BucketStore("gs://marks")
    state = state_of(arrays)

    def meet() -> float:
        begin = time.monotonic()
        group.exchange("meet", timeout_seconds=300)
        return time.monotonic() - begin

    def mark(name: str) -> None:
        meet()
        if group.is_primary:
            marks.list(name)
            try:
                marks.get(name)
            except KeyError:
                pass
        meet()

    ours = "gs://bucket/ours"
    with dd.Checkpointer(ours) as ckpt:
        ckpt.try_restore()
        ckpt.save(1, state=state).result()  # type: ignore[union-attr]
        mark("ours save")
        ckpt.save(2, state=state).result()  # type: ignore[union-attr]
        mark("end")
    with dd.Checkpointer(ours) as ckpt:
        mark("ours restore")
        ckpt.restore(state=state)
        mark("end")
    processes = ocp.options.MultiprocessingOptions(
        primary_host=0,
        active_processes=set(range(group.count)) if group.count > 1 else None,
        barrier_sync_key_prefix="plain",
    )
    options = ocp.CheckpointManagerOptions(
        create=group.count == 1, multiprocessing_options=processes
    )
    with ocp.CheckpointManager("gs://bucket/plain", options=options) as manager:
        manager.save(1, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        mark("orbax save")
        manager.save(2, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        mark("end")
    with ocp.CheckpointManager("gs://bucket/plain", options=options) as manager:
        mark("orbax restore")
        manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
        mark("end")
    blocked: dict[str, list[float]] = {"bucket": [], "local": []}
    exchanges = []
    with dd.Checkpointer("gs://bucket/blocked") as there, dd.Checkpointer(folder) as here:
        for step in range(rounds + 1):
            for name, ckpt in (("bucket", there), ("local", here)):
                exchanges.append(meet())
                begin = time.monotonic()
                handle = ckpt.save(step, state=state)
                blocked[name].append(time.monotonic() - begin)
                assert handle is not None
                handle.result()
    result = {name: statistics.median(seconds[1:]) * 1e3 for name, seconds in blocked.items()}
    result["bucket, the first"] = blocked["bucket"][0] * 1e3
    result["one exchange"] = statistics.median(exchanges[1:]) * 1e3
    return {name: round(value, 2) for name, value in result.items()}


def sections(gcs: FakeGCS) -> Iterator[tuple[str, dict[str, int]]]:
    """Returns the requests between two marks, counted by client."""
    name, counts = "", collections.Counter[str]()
    for request in gcs.requests:
        if request.bucket == "marks":
            if request.kind == "read":
                if name not in ("", "end"):
                    yield name, dict(counts)
                name, counts = request.name, collections.Counter()
        else:
            counts["tensorstore" if request.client.startswith("tensorstore") else "gcsfs"] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description="Requests of a save and of a restore.")
    parser.add_argument("--hosts", default="1,4,16")
    parser.add_argument("--arrays", default="10,1000")
    parser.add_argument("--latency-ms", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    for hosts in map(int, options.hosts.split(",")):
        for arrays in map(int, options.arrays.split(",")):
            with FakeGCS(buckets=("bucket", "marks")) as gcs, tempfile.TemporaryDirectory() as root:
                gcs.latency_seconds = options.latency_ms / 1e3
                results = run_hosts(
                    measure,
                    hosts,
                    args=(f"{root}/run", arrays, options.rounds),
                    env=gcs.environment(),
                    timeout_seconds=580,
                )
                for host in results:
                    if host.error is not None:
                        raise RuntimeError(f"{host.error}\n{host.output[-3000:]}")
                told: dict[str, Any] = {"hosts": hosts, "arrays": arrays}
                for name, counts in sections(gcs):
                    told[name] = {"all": sum(counts.values()), **counts}
                told["blocked_ms"] = results[0].value
                print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
