"""Grain's fingerprint: what is a setting of its pipelines, and what is not."""

from __future__ import annotations

from typing import Any

import grain
import loaders
import numpy as np
import pytest
from grain import experimental
from test_data import restore, save, taken

from datarax_dist.data import shards
from datarax_dist.errors import PositionError


def stream(records: int = 48) -> Any:
    return grain.MapDataset.range(records).to_iter_dataset(loaders.QUIET)


def texts() -> Any:
    """Records of 1 to 4 tokens each."""
    dataset = grain.MapDataset.range(48).map(lambda i: {"x": np.full(1 + i % 4, i)})
    return dataset.to_iter_dataset(loaders.QUIET)


def interleaved(cycle: int) -> Any:
    parts = grain.MapDataset.range(6).map(
        lambda k: grain.MapDataset.range(8 * k, 8 * k + 8).to_iter_dataset(loaders.QUIET)
    )
    return experimental.InterleaveIterDataset(parts, cycle_length=cycle).batch(2)


def packed(length: int = 8, bins: int = 2, cls: Any = None, **other: Any) -> Any:
    cls = cls or experimental.FirstFitPackIterDataset
    return cls(texts(), length_struct={"x": length}, num_packing_bins=bins, **other).batch(1)


def split(length: int) -> Any:
    return experimental.ConcatThenSplitIterDataset(texts(), length_struct={"x": length}).batch(1)


CHANGES: dict[str, tuple[Any, Any, str]] = {
    "seed of a window": (
        lambda: experimental.WindowShuffleIterDataset(stream(), window_size=5, seed=3).batch(2),
        lambda: experimental.WindowShuffleIterDataset(stream(), window_size=5, seed=4).batch(2),
        r"data\.seed: saved \[3\], now \[4\]",
    ),
    "cycle": (lambda: interleaved(2), lambda: interleaved(3), "cycle_length=2"),
    "limit": (
        lambda: experimental.LimitIterDataset(stream().batch(2), 7),
        lambda: experimental.LimitIterDataset(stream().batch(2), 9),
        "count=7",
    ),
    "packed length": (packed, lambda: packed(length=12), r"length_struct=\{'x': 8\}"),
    "bins": (packed, lambda: packed(bins=3), "num_packing_bins=2"),
    "packer": (
        packed,
        lambda: packed(cls=experimental.BestFitPackIterDataset),
        "packer_cls=FirstFit",
    ),
    "shuffled bins": (packed, lambda: packed(shuffle_bins=False), "shuffle_bins=True"),
    "split length": (lambda: split(8), lambda: split(12), r"'length_struct': \{'x': 8\}"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_setting_of_a_grain_pipeline_is_refused(change: str) -> None:
    before, after, words = CHANGES[change]
    step = save(taken(shards(lambda s, n: before(), 1), 1))
    restore(step, shards(lambda s, n: before(), 1))
    with pytest.raises(PositionError, match=words):
        restore(step, shards(lambda s, n: after(), 1))


def test_that_a_mixed_stream_has_ended_is_no_setting() -> None:
    def mixed(shard: int, count: int) -> Any:
        parts = [
            grain.MapDataset.range(begin + shard, begin + 48, count).to_iter_dataset(loaders.QUIET)
            for begin in (0, 100)
        ]
        return grain.IterDataset.mix(parts, weights=[0.5, 0.5]).batch(2)

    ended = shards(mixed, 4)
    assert len(list(ended)) == 12
    again = shards(mixed, 4)
    restore(save(ended), again)  # asked for its settings for the first time
    assert list(again) == []


def test_what_a_transform_of_the_users_counts_is_no_setting() -> None:
    class Counts(grain.IterDataset[Any]):
        def __iter__(self) -> Any:
            return CountsIterator(self._parent.__iter__())

    class CountsIterator(grain.DatasetIterator[Any]):
        _count = 0

        def __next__(self) -> Any:
            self._count += 1
            return next(self._parent)

        def get_state(self) -> Any:
            return self._parent.get_state()

        def set_state(self, state: Any) -> None:
            self._parent.set_state(state)

    def epoch() -> Any:
        return shards(lambda s, n: Counts(stream().batch(2)), 1)

    again = epoch()
    restore(save(taken(epoch(), 3)), again)
    assert next(again).tolist() == [6, 7]
