"""What agreement costs when there are many hosts: messages, bytes and time of a save and a restore.

    python -m benchmarks.coordination [--hosts 1,10,100,1000,10000] [--message-ms 1]
    python -m benchmarks.coordination --real 2,4,8,16,32 [--rounds 5]
    python -m benchmarks.coordination --board 10000

The first runs the real protocol on simulated hosts (`datarax_dist.testing.scale`): each request of
a host to the board or the store takes `--message-ms`, and its code the processor time that it takes
here. Arrays are three small files of each host; what the array libraries do is not in it.
The second times an exchange, a save and a restore of hardly any state on as many real
`jax.distributed` processes as are told, which share the cores of this machine. The third writes the
rows of as many hosts to JAX's real coordination service, from one of two processes, and times how
long the primary takes to read all of them, and to parse them. JSON lines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.harness import Results, significant


def simulated(count: int, message_seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Runs a first save, one that replaces nothing, and a restore, some rounds of each."""
    from datarax_dist import config
    from datarax_dist.request import SaveRequest
    from datarax_dist.restore import Restorer
    from datarax_dist.save import Saver
    from datarax_dist.telemetry import Phases
    from datarax_dist.testing import MemoryArrays, MemoryStore
    from datarax_dist.testing.scale import ScaledHost, simulate

    options = config.Options()
    files = MemoryStore()

    def save(step: int, host: ScaledHost) -> Any:
        index = host.index
        request = SaveRequest(
            step=step,
            writer=MemoryArrays(
                host.store, index, {"d/0123456789": b"x", "d/abcdefghij": b"x", "manifest": b"x"}
            ),
            positions={f"data/train/shard_{index:05d}-of-{count:05d}.json": b"{}" * 200},
            written={"train": [index]},
            held={"train": {index: "0123abcd-0123abcd"}},
            counts={"train": count},
            shared={"TREE.json": b"{}"},
            agreement={"the structure of the state": "0123abcd", "data item 'train'": "x" * 300},
            local_digests={f"state/{name}": "0123abcd" for name in ("step", "seed")},
            items=("data/train", "state"),
        )
        saver = Saver(host.store, host.group, host, options, None)
        phases = Phases("save", index)
        started = saver.begin(step, lambda: request, phases)
        blocked = host.monotonic()
        return started.finish().step, blocked

    def restore(host: ScaledHost) -> Any:
        restorer = Restorer(host.store, host.group, options, host)
        phases = Phases("restore", host.index)
        found = restorer.restore(None, lambda candidate, _: lambda: candidate.step, phases)
        assert found is not None
        return found[1].step

    rows = []
    for act in ("save", "restore"):
        reports = []
        for step in range(1, rounds + 2):
            target = restore if act == "restore" else (lambda host, step=step: save(step, host))
            report = simulate(count, target, message_seconds=message_seconds, files=files)
            reports.append(report)
        chosen = sorted(reports[1:], key=lambda report: report.primary_seconds)[(rounds - 1) // 2]
        rows.append(
            {
                "benchmark": f"coordination of a {act}, simulated",
                "hosts": count,
                "message_ms": message_seconds * 1000,
                "primary_seconds": significant(chosen.primary_seconds),
                "all_seconds": significant(chosen.seconds),
                "save_blocks_seconds": significant(chosen.results[0][1]) if act == "save" else None,
                "primary_messages": chosen.primary.messages,
                "primary_kilobytes": significant(chosen.primary.bytes / 1000),
                "primary_processor_seconds": significant(chosen.primary.processor_seconds),
                "other_host_messages": chosen.most.messages,
                "other_host_kilobytes": significant(chosen.most.bytes / 1000),
            }
        )
    return rows


def on_a_host(root: str, rounds: int) -> dict[str, list[float]]:
    """Runs on each real host: seconds of each exchange, save and restore."""
    import jax.numpy as jnp

    import datarax_dist as dd
    from datarax_dist.hosts import current_group

    group = current_group(root)
    found: dict[str, list[float]] = {"exchange": [], "save_blocks": [], "save": [], "restore": []}
    payload = {"told": "x" * 300}
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        group.exchange("measure", payload, leader=lambda rows: len(rows), timeout_seconds=120)
        found["exchange"].append(time.perf_counter() - begin)
    state = {"w": jnp.zeros(8)}
    with dd.Checkpointer(root) as checkpointer:
        for step in range(rounds + 1):
            begin = time.perf_counter()
            handle = checkpointer.save(step, state=state)
            found["save_blocks"].append(time.perf_counter() - begin)
            assert handle is not None
            handle.result()
            found["save"].append(time.perf_counter() - begin)
        for _ in range(rounds + 1):
            begin = time.perf_counter()
            checkpointer.restore(state=state)
            found["restore"].append(time.perf_counter() - begin)
    return found


def real(count: int, rounds: int) -> dict[str, Any]:
    """Runs real processes; the medians of what host 0 has measured."""
    from datarax_dist.testing import run_hosts

    with tempfile.TemporaryDirectory() as root:
        told = run_hosts(on_a_host, count, args=(f"{root}/run", rounds), timeout_seconds=500)
    errors = [result.error for result in told if result.error is not None]
    if errors:
        raise errors[0]
    row: dict[str, Any] = {"benchmark": "coordination, real processes", "hosts": count}
    for name, values in told[0].value.items():
        row[f"{name}_ms"] = significant(1000 * statistics.median(values[1:]))
    return row


def on_the_board(count: int, rounds: int) -> dict[str, list[float]]:
    """Runs on each of two real hosts; host 1 writes for all, host 0 reads."""
    import jax

    from datarax_dist.boards import JaxBoard

    board = JaxBoard("measure")
    row = json.dumps([0, {"told": "x" * 1000}])
    found: dict[str, list[float]] = {"write_all": [], "read_all": [], "parse_all": []}
    for number in range(rounds):
        begin = time.perf_counter()
        if jax.process_index() == 1:
            keys = [f"{number}/phase/{host}" for host in range(count)]
            with ThreadPoolExecutor(64) as pool:  # as many wait for their answers at a time
                list(pool.map(lambda key: board.set(key, row), keys))
            found["write_all"].append(time.perf_counter() - begin)
            board.set(f"{number}/ready/1", "")
            assert board.wait(f"{number}/done/0", 120.0) is not None
            continue
        assert board.wait(f"{number}/ready/1", 120.0) is not None
        begin = time.perf_counter()
        rows = board.read(f"{number}/phase/")
        found["read_all"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        assert len([json.loads(value) for value in rows.values()]) == count
        found["parse_all"].append(time.perf_counter() - begin)
        board.clear(f"{number}/phase/")
        board.set(f"{number}/done/0", "")
    return found


def on_a_board(count: int, rounds: int) -> dict[str, Any]:
    """Runs JAX's coordination service with the rows of many hosts."""
    from datarax_dist.testing import run_hosts

    told = run_hosts(on_the_board, 2, args=(count, rounds), timeout_seconds=500)
    errors = [result.error for result in told if result.error is not None]
    if errors:
        raise errors[0]
    found = {**told[0].value, "write_all": told[1].value["write_all"]}
    middle = {f"{name}_ms": 1000 * statistics.median(values) for name, values in found.items()}
    return {
        "benchmark": "JAX's coordination service",
        "rows": count,
        **{name: significant(value) for name, value in middle.items()},
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", default="1,10,100,1000,10000")
    parser.add_argument("--message-ms", type=float, default=1.0)
    parser.add_argument("--real", default="")
    parser.add_argument("--board", default="")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    results = Results()
    for count in asked.board.split(",") if asked.board else ():
        results.add(on_a_board(int(count), asked.rounds))
    for count in asked.real.split(",") if asked.real else ():
        results.add(real(int(count), asked.rounds))
    if asked.real or asked.board:
        return
    for count in asked.hosts.split(","):
        for row in simulated(int(count), asked.message_ms / 1000, asked.rounds):
            results.add(row)


if __name__ == "__main__":
    main()
