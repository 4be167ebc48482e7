"""What data positions cost: capture and encode of one shard, and the restore of thousands.

    python -m benchmarks.positions [--shards 4096] [--rounds 9]

Prints one JSON line for each loader that is installed (Grain and loaders of the tests, and, where
they are, torchdata, Hugging Face and datarax): the median of capture, encoding and sealing, for
each shard, and the bytes it takes. Then the restore of many shards on one host, with a plain read
of the same files in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
SHARDS = 64
LARGE = 100_000  # bytes in one position: a small shuffle buffer


class Large:
    """A position with many bytes in it."""

    def __init__(self, shard: int, count: int) -> None:
        self.at = shard

    def __iter__(self) -> Large:
        return self

    def __next__(self) -> Any:
        import numpy as np

        self.at += 1
        return np.asarray([self.at])

    def get_state(self) -> Any:
        return {"at": self.at, "buffer": bytes(LARGE)}

    def set_state(self, state: Any) -> None:
        self.at = state["at"]


def loaders() -> dict[str, Callable[[int, int], Any]]:
    """Returns what is installed: name -> factory of one shard."""
    import loaders as ours

    found: dict[str, Callable[[int, int], Any]] = {
        "dict of a few values": lambda s, n: ours.Stream(s, n, 10_000),
        f"{LARGE} bytes": Large,
        "Grain MapDataset": lambda s, n: ours.grain_map(0, 1),
        "Grain IterDataset": lambda s, n: ours.grain_iter(0, 1),
        "Grain DataLoader": lambda s, n: ours.grain_loader(0, 1),
    }
    with contextlib.suppress(ImportError):
        import torch
        from torchdata.stateful_dataloader import StatefulDataLoader

        found["torchdata"] = lambda s, n: StatefulDataLoader(
            torch.arange(96), shuffle=True, generator=torch.Generator().manual_seed(s)
        )
    with contextlib.suppress(ImportError):
        from datasets import Dataset

        records = Dataset.from_dict({"id": list(range(96))}).to_iterable_dataset(num_shards=1)
        found["Hugging Face"] = lambda s, n: records.batch(1)
    with contextlib.suppress(ImportError):
        import jax.numpy as jnp
        from datarax.pipeline import Pipeline

        found["datarax"] = lambda s, n: Pipeline.from_arrays(
            {"id": jnp.arange(96)}, batch_size=1, seed=s, shuffle=True
        )
    return found


def capture(name: str, factory: Callable[[int, int], Any], rounds: int) -> dict[str, Any]:
    """Measures one loader, with the first batch taken."""
    from datarax_dist.data import positions, shards

    batches = shards(factory, SHARDS)
    next(batches)
    seconds, size = [], 0
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        captured = positions.capture(batches, 0, 1)
        seconds.append((time.perf_counter() - begin) / SHARDS)
        size = sum(map(len, captured.files.values())) // SHARDS
    return {
        "loader": name,
        "capture_and_encode_milliseconds_each_shard": round(
            statistics.median(seconds[1:]) * 1e3, 4
        ),
        "first_time_milliseconds": round(seconds[0] * 1e3, 4),
        "bytes_each_shard": size,
    }


def restore(count: int, rounds: int) -> dict[str, Any]:
    """Measures the restore of many shards on one host, beside a read of their files."""
    import loaders as ours

    import datarax_dist as dd
    from datarax_dist.data import shards

    root = tempfile.mkdtemp()
    try:
        with dd.Checkpointer(f"{root}/run") as ckpt:
            batches = shards(lambda s, n: ours.Stream(s, n, 10 * n), count)
            next(batches)
            begin = time.perf_counter()
            handle = ckpt.save(0, data=batches)
            blocked = time.perf_counter() - begin
            assert handle is not None
            handle.result()
            saved = time.perf_counter() - begin
            took, raw = [], []
            report: Any = None
            for _ in range(rounds):
                again = shards(lambda s, n: ours.Stream(s, n, 10 * n), count)
                begin = time.perf_counter()
                report = ckpt.restore(data=again).report
                took.append(time.perf_counter() - begin)
                begin = time.perf_counter()
                for file in sorted(Path(root, "run", "0", "data", "data").iterdir()):
                    file.read_bytes()
                raw.append(time.perf_counter() - begin)
    finally:
        shutil.rmtree(root)
    return {
        "shards": count,
        "restore_seconds": round(statistics.median(took), 3),
        "raw_read_seconds": round(statistics.median(raw), 3),
        "restore_to_raw_read": round(statistics.median(took) / statistics.median(raw), 2),
        "phases": {name: round(value, 3) for name, value in report.seconds.items()},
        "save_blocked_seconds": round(blocked, 3),
        "save_seconds": round(saved, 3),
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    for name, factory in loaders().items():
        print(json.dumps(capture(name, factory, arguments.rounds)), flush=True)
    print(json.dumps(restore(arguments.shards, arguments.rounds)))


if __name__ == "__main__":
    main()
