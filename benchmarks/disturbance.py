"""How much slower training steps are while a save goes on in the background.

    python -m benchmarks.disturbance [--mib 512] [--leaves 64] [--rounds 7] [--place DIRECTORY]

A real loop: a jitted step of gradient descent over the whole state. Each round runs some steps
alone, then saves and goes on until the save has ended, with each contender in turn. For each:
`blocked_ms`, how long the call took; `slower`, by what factor steps took longer meanwhile; and
`lost_ms`, what the save has cost the loop in all: the call, and what its steps took longer. JSON.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks import states
from benchmarks.harness import Results, machine, ratio, significant, summary
from benchmarks.speed import DEVICES

STEPS_ALONE = 12


class _Loop:
    """Training that can be timed step by step."""

    def __init__(self, mib: float, leaves: int) -> None:
        import jax
        import jax.numpy as jnp

        self.state = states.make("noise", mib, leaves, states.over_all_devices())

        def loss(state: Any, x: Any) -> Any:
            return sum(jnp.sum(jnp.tanh(w * x)) for w in jax.tree.leaves(state))

        def step(state: Any, x: Any) -> Any:
            return jax.tree.map(lambda w, g: w - 1e-4 * g, state, jax.grad(loss)(state, x))

        self._step = jax.jit(step, out_shardings=jax.tree.map(lambda w: w.sharding, self.state))
        self._number = 0

    def step(self) -> float:
        import jax

        begin = time.perf_counter()
        self._number += 1
        self.state = jax.block_until_ready(self._step(self.state, 1e-3 * self._number))
        return time.perf_counter() - begin


def _ours(root: str) -> tuple[Callable[[int, Any], Callable[[], bool]], Callable[[], None]]:
    import datarax_dist as dd

    checkpointer = dd.Checkpointer(root, keep=dd.latest(1))

    def begin(step: int, state: Any) -> Callable[[], bool]:
        handle = checkpointer.save(step, state=state)
        assert handle is not None
        return handle.done

    return begin, checkpointer.wait_until_finished


def _orbax(root: str) -> tuple[Callable[[int, Any], Callable[[], bool]], Callable[[], None]]:
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    manager = ocp.CheckpointManager(root, options=options)

    def begin(step: int, state: Any) -> Callable[[], bool]:
        manager.save(step, args=ocp.args.StandardSave(state))
        return lambda: not manager.is_saving_in_progress()

    return begin, manager.wait_until_finished


def measure(place: str, mib: float, leaves: int, rounds: int) -> dict[str, Any]:
    """Runs all contenders in this process."""
    loop = _Loop(mib, leaves)
    root = tempfile.mkdtemp(dir=place)
    savers = {"ours": _ours(f"{root}/ours"), "orbax_v0": _orbax(f"{root}/orbax")}
    found: dict[str, dict[str, list[float]]] = {
        name: {"blocked": [], "slower": [], "lost": [], "seconds": []} for name in savers
    }
    alone_all: list[float] = []
    try:
        for number in range(rounds + 1):
            names = list(savers)
            for name in names if number % 2 else reversed(names):
                begin_save, wait = savers[name]
                os.sync()
                alone = statistics.median(loop.step() for _ in range(STEPS_ALONE))
                begin = time.perf_counter()
                done = begin_save(number, loop.state)
                blocked = time.perf_counter() - begin
                during = [loop.step()]
                while not done():
                    during.append(loop.step())
                taken = time.perf_counter() - begin
                wait()
                if number:
                    alone_all.append(alone)
                    row = found[name]
                    row["blocked"].append(blocked)
                    row["slower"].append(statistics.fmean(during) / alone)
                    row["lost"].append(taken - len(during) * alone)
                    row["seconds"].append(taken)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    ours, orbax = found["ours"], found["orbax_v0"]
    return {
        "benchmark": "disturbance",
        "mib": mib,
        "leaves": leaves,
        "file_system": machine(place)["file_system"],
        "step_alone_ms": significant(1000 * statistics.median(alone_all)),
        **{
            name: {
                "blocked_ms": significant(1000 * statistics.median(row["blocked"])),
                "slower": summary(row["slower"]),
                "lost_ms": significant(1000 * statistics.median(row["lost"])),
                "seconds_until_committed": significant(statistics.median(row["seconds"])),
            }
            for name, row in found.items()
        },
        "lost_ours_over_orbax_v0": ratio(ours["lost"], orbax["lost"]),
        "slower_ours_over_orbax_v0": ratio(ours["slower"], orbax["slower"]),
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=float, default=512)
    parser.add_argument("--leaves", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--place", default=tempfile.gettempdir())
    asked = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={DEVICES}")
    Results().add(measure(asked.place, asked.mib, asked.leaves, asked.rounds))


if __name__ == "__main__":
    main()
