"""What single-replica restores save: bytes that all hosts together read of an array that each of
them holds, and seconds, with `Options.single_replica_restore` and without, in turn.

    python -m benchmarks.replicas [--hosts 2] [--mib 256] [--rounds 5] [--bucket]
                                  [--place DIRECTORY]

The hosts are processes of this machine; their devices pass arrays on through JAX's CPU collectives
(gloo, over loopback), which are no measure for an accelerator's. With `--bucket` the step is in a
bucket server on this machine. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shutil
import statistics
import sys
import tempfile
from typing import Any

import numpy as np

from benchmarks.harness import Results, in_turn, machine, ratio, seconds, significant, summary
from benchmarks.speed import barrier

LEAVES = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """What is to be measured; see the options of the command."""

    hosts: int
    mib: float
    rounds: int
    bucket: bool
    place: str


def _bytes_read() -> int:
    """What this process has asked the kernel for, of files."""
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


def measure(asked: Asked, root: str) -> dict[str, Any]:
    """Runs on each host."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import datarax_dist as dd
    from datarax_dist.buckets import BucketStore

    together = barrier()
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("all",)), PartitionSpec())
    shape = (int(asked.mib * 2**20) // LEAVES // 4096, 1024)
    noise = np.random.default_rng(0).standard_normal(shape, np.float32)
    state = {
        f"{number}": jax.make_array_from_callback(shape, sharding, lambda index: noise[index])
        for number in range(LEAVES)
    }
    target = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for name, leaf in state.items()
    }
    with dd.Checkpointer(root) as ckpt:
        ckpt.save(1, state=state).result()  # type: ignore[union-attr]
    sizes: dict[str, list[int]] = {}

    def mark(name: str) -> None:
        """Lets the bucket's server know which requests are of what."""
        together()
        if asked.bucket and jax.process_index() == 0:
            with contextlib.suppress(KeyError):
                BucketStore("gs://marks").get(name)
        together()

    def one(name: str, single: bool) -> float:
        options = dd.Options(single_replica_restore=single)
        with dd.Checkpointer(root, options=options) as ckpt:
            mark(name)
            before = _bytes_read()
            taken = seconds(lambda: ckpt.restore(state=target))
            sizes.setdefault(name, []).append(_bytes_read() - before)
            mark("end")
        return taken

    found = in_turn(
        {
            "each_reads_all": lambda _: one("each_reads_all", False),
            "each_reads_a_part": lambda _: one("each_reads_a_part", True),
        },
        asked.rounds,
    )
    return {
        "seconds": found,
        "read": {} if asked.bucket else {name: values[1:] for name, values in sizes.items()},
        "state": sum(leaf.nbytes for leaf in state.values()),
    }


def _received(gcs: Any) -> dict[str, list[int]]:
    """Bytes that the bucket's server has sent between two marks."""
    found: dict[str, list[int]] = {}
    name = "end"
    for request in gcs.requests:
        if request.bucket == "marks" and request.kind == "read":
            name = request.name
            found.setdefault(name, []).append(0)
        elif name != "end":
            found[name][-1] += request.received
    return {name: sizes[1:] for name, sizes in found.items() if name != "end"}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--mib", type=float, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bucket", action="store_true")
    parser.add_argument("--place", default=tempfile.gettempdir())
    asked = Asked(**vars(parser.parse_args()))
    from datarax_dist.testing import FakeGCS, run_hosts

    results = Results()
    place = tempfile.mkdtemp(dir=asked.place)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, place)
        env, root, gcs = {}, f"{place}/run", FakeGCS(buckets=("bucket", "marks"))
        if asked.bucket:
            env, root = stack.enter_context(gcs).environment(), "gs://bucket/run"
        told = run_hosts(
            measure,
            asked.hosts,
            devices_per_host=1,
            args=(asked, root),
            timeout_seconds=580,
            env=env,
        )
        for result in told:
            if result.error is not None or result.exit_code:
                sys.exit(f"host {result.host}: {result.error}\n{result.output[-3000:]}")
        rows = [result.value for result in told]
        slowest: dict[str, list[float]] = {}
        for name in rows[0]["seconds"]:
            times = (row["seconds"][name] for row in rows)
            slowest[name] = [max(of_all) for of_all in zip(*times, strict=True)]
        read = _received(gcs) if asked.bucket else {}
        for name in slowest if not asked.bucket else ():
            read[name] = [
                sum(sizes) for sizes in zip(*(row["read"][name] for row in rows), strict=True)
            ]
        results.add(
            {
                "benchmark": "replicas",
                "hosts": asked.hosts,
                "mib": rows[0]["state"] / 2**20,
                "storage": "bucket" if asked.bucket else machine(place)["file_system"],
                "seconds": {name: summary(values) for name, values in slowest.items()},
                "part_over_all": ratio(slowest["each_reads_a_part"], slowest["each_reads_all"]),
                "read_over_state": {
                    name: significant(statistics.median(sizes) / rows[0]["state"])
                    for name, sizes in read.items()
                },
            }
        )


if __name__ == "__main__":
    main()
