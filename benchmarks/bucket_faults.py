"""Each request of a save and of a restore in a bucket goes wrong once, in each way, on real hosts;
prints what became of it.

    python -m benchmarks.bucket_faults [--hosts 2] [--every 1] [--modes stalled,...]

The bucket is `FakeGCS`. Every case has a bucket of its own, with steps 0 and 1 in it, and one
fault: the n-th request of its operation, for each n. A save is one of step 2, with
`keep=latest(2)`, so that it also deletes step 0. Then a new `Checkpointer` restores without faults,
and the bucket is looked at. What must never be: a save that reported success and is not there, a
save that reported a failure of a kind that leaves nothing and is there, another value than the one
saved, a restore of an older step, hosts that do not agree, or an operation that does not end in its
time. Exits 1 if one of these was seen.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import itertools
import json
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from datarax_dist.testing import FakeGCS, HostResult, run_hosts

MODES = ("error", "drop", "applied_then_dropped", "truncated", "corrupted", "stalled")
OPERATIONS = ("save", "restore")
STALL_SECONDS = 20.0
DEADLINE_SECONDS = 150.0
TROUBLES = ("lost", "ghost", "wrong value", "older step", "disagree", "late", "unclear error")
_THREADS = 8
_STALLED_THREADS = 32

Case = tuple[str, str, int]  # operation, mode, number of the request


def state_of(step: int) -> dict[str, Any]:
    """Sharded, replicated, host-local and small leaves, whose values are those of a step."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()), ("x",))

    def place(array: np.ndarray, *axes: Any) -> jax.Array:
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    numbers = np.random.default_rng(step).standard_normal((16, 128)).astype(np.float32)
    return {
        "w": place(numbers, "x"),
        "b": place(numbers[0]),
        "key": jax.random.key(step),
        "n": numbers[1],
        "s": f"step {step}",
    }


class Loader:
    """A loader of one data shard."""

    def __init__(self, shard: int, count: int) -> None:
        self.shard, self.count, self.at = shard, count, 0

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> np.ndarray:
        self.at += 1
        return np.asarray([self.shard + (self.at - 1) * self.count])

    def get_state(self) -> dict[str, int]:
        return {"at": self.at}

    def set_state(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def open_run(bucket: str) -> Any:
    import datarax_dist as dd

    limits = dict.fromkeys(
        ("exchange_timeout_seconds", "save_timeout_seconds", "restore_timeout_seconds"),
        DEADLINE_SECONDS,
    )
    return dd.Checkpointer(f"gs://{bucket}/run", keep=dd.latest(2), options=dd.Options(**limits))


def save(bucket: str, step: int) -> str:
    """Saves a step; returns "committed", or what was raised."""
    import datarax_dist as dd

    batches = dd.data.shards(Loader, 4)
    for _ in range(step):
        next(batches)
    try:
        with open_run(bucket) as ckpt:
            ckpt.save(step, state=state_of(step), data=batches, metadata={"step": step}).result()
    except dd.errors.CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    except BaseException as error:
        return f"!{type(error).__name__}: {error}"
    return "committed"


def restore(bucket: str) -> str:
    """Restores; returns the step if all its values are those that were saved, or what was wrong."""
    import datarax_dist as dd

    batches = dd.data.shards(Loader, 4)
    try:
        with open_run(bucket) as ckpt:
            restored = ckpt.restore(state=state_of(0), data=batches)
    except dd.errors.CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    except BaseException as error:
        return f"!{type(error).__name__}: {error}"
    step = restored.step
    same = (
        equal_here(restored.state, state_of(step))
        and restored.metadata == {"step": step}
        and next(batches).min() // 4 == step
    )
    return f"step {step}" if same else "wrong value"


def equal_here(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Compares what this host holds: nothing collective may run on threads that take turns."""
    import jax

    def parts(value: Any) -> list[Any]:
        if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            return ["key", np.asarray(jax.random.key_data(value))]
        shards = getattr(value, "addressable_shards", None)
        return [value] if shards is None else [np.asarray(shard.data) for shard in shards]

    return one.keys() == other.keys() and all(
        np.array_equal(mine, theirs)
        for name in one
        for mine, theirs in itertools.zip_longest(parts(one[name]), parts(other[name]))
    )


def run_cases(cases: Sequence[tuple[str, str]], threads: int) -> list[tuple[str, str, float]]:
    """On each host: for each (operation, bucket) what the operation said, what a restore after it
    gives, and the seconds that the operation took.
    """
    for name in ("absl", "gcsfs", "datarax_dist", "fsspec"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    state_of(0)

    def one(case: tuple[str, str]) -> tuple[str, str, float]:
        operation, bucket = case
        begin = time.monotonic()
        told = save(bucket, 2) if operation == "save" else restore(bucket)
        seconds = time.monotonic() - begin
        return told, restore(bucket), seconds

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, cases))


def judge(operation: str, hosts: Sequence[tuple[str, str, float]]) -> str:
    """Returns one of `TROUBLES`, or how the operation ended."""
    told, after = {row[0] for row in hosts}, {row[1] for row in hosts}
    kinds = {text.partition(":")[0] for text in told}
    if max(row[2] for row in hosts) > DEADLINE_SECONDS + 30:
        return "late"
    if len(after) != 1 or len({kind == "committed" for kind in kinds}) != 1:
        return "disagree"
    [found] = after
    if "wrong value" in told | after:
        return "wrong value"
    if any(text.startswith("!") for text in told | after) or "Error" in found:
        return "unclear error"
    if operation == "restore":
        if len(told) != 1:
            return "disagree" if any(text.startswith("step") for text in told) else "error"
        return {"step 1": "restored", "step 0": "older step"}.get(*told, "error")
    if told == {"committed"}:
        # TensorStore sends no checksums over HTTP: an upload of its that is damaged on its way is
        # noticed when it is read.
        late = "committed, damaged on its way: noticed by the restore, which took step 1"
        return {"step 2": "committed", "step 1": late}.get(found, "lost")
    if found == "step 2" and not all("may be committed" in text for text in told):
        return "ghost"
    return "error, and not committed" if found == "step 1" else "error, and committed"


def sweep(
    hosts: int, modes: Sequence[str] = MODES, every: int = 1
) -> tuple[dict[Case, str], dict[Case, float], dict[Case, list[str]]]:
    """Returns for each case how it ended, its seconds, and what each host said."""
    ended: dict[Case, str] = {}
    seconds: dict[Case, float] = {}
    told: dict[Case, list[str]] = {}
    with FakeGCS(buckets=("first",)) as gcs:

        def run(rows: Sequence[tuple[str, str]], threads: int) -> list[HostResult]:
            results = run_hosts(
                run_cases, hosts, args=(rows, threads), env=gcs.environment(), timeout_seconds=560
            )
            for host in results:
                if host.error is not None or host.exit_code:
                    raise RuntimeError(f"host {host.host}: {host.error}\n{host.output[-3000:]}")
            return results

        def fill(bucket: str, steps: dict[str, Any]) -> None:
            for name, found in steps.items():
                gcs.put(bucket, name, found.content)

        for step in (0, 1):
            run_hosts(save, hosts, args=("first", step), env=gcs.environment(), timeout_seconds=120)
        template = gcs.objects("first")
        requests = {}
        for operation in OPERATIONS:
            bucket = f"count-{operation}"
            gcs.make_bucket(bucket)
            fill(bucket, template)
            probe = gcs.fail("delay", bucket=bucket, times=0)
            act = save if operation == "save" else restore
            args = (bucket, 2) if operation == "save" else (bucket,)
            run_hosts(act, hosts, args=args, env=gcs.environment(), timeout_seconds=120)
            requests[operation] = probe.seen
        gcs.heal()
        print(f"requests of {hosts} host(s): {requests}", file=sys.stderr)
        for mode in modes:
            cases = [
                (operation, mode, number)
                for operation in OPERATIONS
                for number in range(1, requests[operation] + 1, every)
            ]
            buckets = {}
            faults = {}
            for case in cases:
                operation, _, number = case
                buckets[case] = f"{operation}-{mode}-{number}".replace("_", "-")
                gcs.make_bucket(buckets[case])
                fill(buckets[case], template)
                faults[case] = gcs.fail(
                    mode,  # type: ignore[arg-type]
                    bucket=buckets[case],
                    number=number,
                    seconds=STALL_SECONDS,
                )
            threads = _STALLED_THREADS if mode == "stalled" else _THREADS
            results = run([(case[0], buckets[case]) for case in cases], threads)
            for place, case in enumerate(cases):
                rows = [host.value[place] for host in results]
                reached = faults[case].hits > 0
                ended[case] = judge(case[0], rows) if reached else "not reached"
                seconds[case] = max(row[2] for row in rows)
                told[case] = [f"{row[0]} | then {row[1]}" for row in rows]
            gcs.heal()
            print(f"{mode}: {len(cases)} cases", file=sys.stderr)
    return ended, seconds, told


def table(ended: dict[Case, str], seconds: dict[Case, float]) -> str:
    """Returns the counts as text, a line for each operation and mode."""
    lines = [f"{'operation':10}{'fault':22}{'cases':>6}{'longest s':>10}  how it ended"]
    for operation in OPERATIONS:
        for mode in MODES:
            cases = [case for case in ended if case[:2] == (operation, mode)]
            if cases:
                counts = collections.Counter(ended[case] for case in cases)
                longest = max(seconds[case] for case in cases)
                how = ", ".join(f"{n} {what}" for what, n in counts.most_common())
                lines.append(f"{operation:10}{mode:22}{len(cases):>6}{longest:>10.1f}  {how}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Faults of a bucket, one at a time.")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--every", type=int, default=1, help="try each n-th request only")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    ended, seconds, told = sweep(options.hosts, options.modes.split(","), options.every)
    bad = {case: how for case, how in ended.items() if how in TROUBLES}
    if options.json:
        counts = collections.Counter(ended.values())
        print(json.dumps({"hosts": options.hosts, "counts": counts, "bad": len(bad)}))
    else:
        print(table(ended, seconds))
        shown = {"not reached", "committed", "restored"}
        for case, how in ended.items():
            if how not in shown:
                print(f"{case}: {how} ({seconds[case]:.1f} s)")
                for host, text in enumerate(told[case]):
                    print(f"    host {host}: {text[:400]}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
