"""The states that are saved: what training jobs hold, in any size and number of leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

KINDS = ("noise", "weights", "bf16", "zeros", "int8", "optimizer", "adapters")


def over_all_devices() -> Callable[[np.ndarray], Any]:
    """Returns what places an array over all devices, or on each where it cannot be divided."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()), ("x",))

    def place(array: np.ndarray) -> Any:
        spec = PartitionSpec("x") if array.shape[0] % mesh.size == 0 else PartitionSpec()
        return jax.device_put(array, NamedSharding(mesh, spec))

    return place


def make(kind: str, mib: float, leaves: int, place: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """Returns a state of about `mib` MiB in `leaves` arrays.

    Args:
        kind: "noise" (fp32, normal), "weights" (fp32 that training has moved: the values of each
            leaf are of one scale, with short mantissas where gradients were small), "bf16",
            "zeros", "int8", "optimizer" (weights and two moments, of which the second is small and
            positive), "adapters" (nine tenths frozen bf16, the rest fp32).
        place: makes a `jax.Array` of a numpy array.
    """
    random = np.random.default_rng(0)
    shares = _shares(kind, leaves)
    state: dict[str, Any] = {}
    for number, (name, dtype, share) in enumerate(shares):
        size = max(1, int(mib * 2**20 * share / np.dtype(dtype).itemsize))
        state[name] = place(_values(kind, dtype, _shape(size), random, number))
    return state


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
