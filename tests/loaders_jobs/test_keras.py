"""Keras's PyDataset. Runs in the job that has keras."""

from __future__ import annotations

import os
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"
import docs_code
import keras
import numpy as np
import pytest

from datarax_dist.data import adapt, shards, tracked
from datarax_dist.errors import PositionError
from datarax_dist.testing import check_exactly_once

RECORDS, BATCH = 4200, 840


class Batches(keras.utils.PyDataset):
    """This host's rows of each global batch."""

    def __init__(self, host: int, hosts: int) -> None:
        super().__init__()
        self.host, self.hosts = host, hosts

    def __len__(self) -> int:
        return RECORDS // BATCH

    def __getitem__(self, index: int) -> Any:
        rows = np.random.default_rng(3).permutation(RECORDS).reshape(-1, BATCH)[index]
        noise = np.random.default_rng([index]).random(BATCH)
        return rows[self.host :: self.hosts], noise[self.host :: self.hosts]


@pytest.mark.parametrize("depth", [0, 2])
def test_it_reads_each_record_once_on_any_number_of_hosts(depth: int) -> None:
    report = check_exactly_once(
        lambda host, hosts: tracked(Batches(host, hosts), depth),
        hosts=range(1, 9),
        schedules=60,
        records=RECORDS,
    )
    assert report.batches == RECORDS // BATCH


def test_shards_of_it_do_too() -> None:
    check_exactly_once(
        lambda host, hosts: shards(Batches, 12), hosts=(1, 3, 4), schedules=50, records=RECORDS
    )


def test_alone_it_has_no_position() -> None:
    assert adapt(Batches(0, 1)).kind == "global"
    from datarax_dist.data import positions

    with pytest.raises(PositionError, match=r"tracked\(loader, 0\)"):
        positions.capture(Batches(0, 1), 0, 1)


@pytest.mark.parametrize(("place", "code"), docs_code.blocks("keras"))
def test_the_example_in_the_docs_runs(place: str, code: str) -> None:
    docs_code.run(code)
