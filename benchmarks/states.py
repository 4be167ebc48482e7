"""The states that are saved: what training jobs hold, in any size and number of leaves."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

KINDS = ("noise", "weights", "bf16", "zeros", "int8", "optimizer", "adapters", "demo")


def over_all_devices() -> Callable[[np.ndarray], Any]:
    """Returns what places an array over all devices, or on each where it cannot be divided."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()), ("x",))

    def place(array: np.ndarray) -> Any:
        divides = array.ndim and array.shape[0] % mesh.size == 0
        sharding = NamedSharding(mesh, PartitionSpec("x") if divides else PartitionSpec())
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return place


def other_sharding(array: Any) -> Any:
    """Returns how to place an array in another way: along its last dimension, if that divides."""
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = array.sharding.mesh
    last = array.ndim - 1
    divides = last > 0 and array.shape[last] % mesh.size == 0
    return NamedSharding(mesh, PartitionSpec(*[None] * last, "x") if divides else PartitionSpec())


def make(kind: str, mib: float, leaves: int, place: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """Returns a state of about `mib` MiB in `leaves` arrays.

    Args:
        kind: "noise" (fp32, normal), "weights" (fp32 that training has moved: the values of each
            leaf are of one scale, with short mantissas where gradients were small), "bf16",
            "zeros", "int8", "optimizer" (weights and two moments, of which the second is small and
            positive), "adapters" (nine tenths frozen bf16, the rest fp32), "demo" (what the demo's
            job has trained, with its optimizer: real weights, and as few as there are of them).
        place: makes a `jax.Array` of a numpy array.
    """
    if kind == "demo":
        return {name: place(value) for name, value in _trained_by_the_demo().items()}
    random = np.random.default_rng(0)
    shares = _shares(kind, leaves)
    state: dict[str, Any] = {}
    for number, (name, dtype, share) in enumerate(shares):
        size = max(1, int(mib * 2**20 * share / np.dtype(dtype).itemsize))
        state[name] = place(_values(kind, dtype, _shape(size), random, number))
    return state


def _trained_by_the_demo() -> dict[str, np.ndarray]:
    """Trains the demo's job to its end, in processes of its own, and returns its state."""
    import jax

    import datarax_dist as dd
    from datarax_dist.demo.train import STEPS, HostRun, train
    from datarax_dist.testing import run_hosts

    with tempfile.TemporaryDirectory() as root:
        run = HostRun(root=f"{root}/run", logs=f"{root}/logs", stop=STEPS, save_every=STEPS)
        os.mkdir(run.logs)
        [result] = run_hosts(train, 1, args=(run,), timeout_seconds=300)
        assert result.error is None, result.output
        with dd.Checkpointer(run.root) as checkpointer:
            state = checkpointer.restore().state
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in leaves
        if isinstance(leaf, jax.Array)
        and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    }


def _shares(kind: str, leaves: int) -> list[tuple[str, Any, float]]:
    import ml_dtypes

    if kind == "optimizer":
        groups = [f"{group}_{i}" for i in range(-(-leaves // 3)) for group in ("p", "mu", "nu")]
        return [(name, np.float32, 1 / leaves) for name in groups[:leaves]]
    if kind == "adapters":
        frozen = max(1, leaves // 2)
        rest = max(1, leaves - frozen)
        base = [(f"base_{i}", ml_dtypes.bfloat16, 0.9 / frozen) for i in range(frozen)]
        return [*base, *((f"adapter_{i}", np.float32, 0.1 / rest) for i in range(rest))]
    dtypes: Mapping[str, Any] = {"bf16": ml_dtypes.bfloat16, "int8": np.int8}
    return [(f"p_{i}", dtypes.get(kind, np.float32), 1 / leaves) for i in range(leaves)]


def _shape(size: int) -> tuple[int, ...]:
    """A matrix, whose first dimension divides over eight devices, when there is enough for one."""
    if size < 1024:
        return (size,)
    columns = 1 << (size.bit_length() // 2 - 1)
    return (max(8, size // columns // 8 * 8), columns)


def _values(
    kind: str, dtype: Any, shape: tuple[int, ...], random: np.random.Generator, number: int
) -> np.ndarray:
    if kind == "zeros":
        return np.zeros(shape, dtype)
    if kind == "int8":
        return random.integers(-128, 128, shape, np.int8)
    noise = random.standard_normal(shape, np.float32)
    if kind == "weights":  # initialised in bf16, and moved by steps of 1e-3
        first = (noise / np.sqrt(shape[-1])).astype(np.float16).astype(np.float32)
        return first + 1e-3 * np.round(random.standard_normal(shape, np.float32) * 8) / 8
    if kind == "optimizer" and number % 3:
        return noise**2 * 1e-6 if number % 3 == 2 else noise * 1e-3
    return noise.astype(dtype)
