"""datarax's pipelines as data. Runs in the job that has datarax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import docs_code
import jax
import numpy as np
import pytest
from datarax.pipeline import Pipeline
from datarax.sources import MemorySource, MemorySourceConfig
from flax import nnx

import datarax_dist as dd
from datarax_dist.data import adapt, adapters, shards, tracked
from datarax_dist.errors import PositionError
from datarax_dist.testing import check_exactly_once

RECORDS = 48


class Noise(nnx.Module):
    """A stage with randomness of its own, from where each record stands."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {
            **batch,
            "noise": jax.vmap(lambda i: jax.random.uniform(jax.random.key(i)))(batch["id"]),
        }


def pipeline(shard: int, count: int, batch: int = 1) -> Pipeline:
    source = MemorySource(
        MemorySourceConfig(shuffle=True),
        {"id": np.arange(shard, RECORDS, count)},
        rngs=nnx.Rngs(3),
    )
    return Pipeline(
        source=source,
        stages=[Noise()],
        batch_size=batch,
        rngs=nnx.Rngs(0),
        num_epochs=1,
        drop_last=True,
    )


@pytest.mark.parametrize("depth", [0, 2])
def test_shards_of_pipelines_read_each_record_once(depth: int) -> None:
    def factory(host: int, hosts: int) -> Any:
        loader = shards(pipeline, 8)
        return tracked(loader, depth) if depth else loader

    report = check_exactly_once(factory, hosts=(1, 2, 4, 8), schedules=25, records=RECORDS)
    assert report.resumes >= 40


def test_an_iterator_and_a_pipeline_are_opaque_on_the_same_number_of_hosts() -> None:
    check_exactly_once(
        lambda host, hosts: iter(pipeline(host, hosts)),
        hosts=(2,),
        schedules=15,
        records=RECORDS,
    )


def test_its_fingerprint_is_named(tmp_path: Path) -> None:
    described = adapters.describe_loader(adapt(iter(pipeline(0, 4))))
    assert (described["batch"], described["records"], described["shuffle"]) == (1, 12, True)
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        loader = shards(pipeline, 4)
        next(loader)
        ckpt.save(0, data=loader)
        ckpt.wait_until_finished()
        with pytest.raises(PositionError, match=r"data\.global_batch: saved 4, now 8"):
            ckpt.restore(data=shards(lambda s, n: pipeline(s, n, 2), 4))


def test_a_pipeline_itself_goes_back_to_where_its_iterator_was(tmp_path: Path) -> None:
    whole = [np.asarray(batch["id"]).tolist() for batch in pipeline(0, 1, 4)]
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        used = pipeline(0, 1, 4)
        batches = iter(used)
        next(batches)
        next(batches)
        ckpt.save(1, data=used)
        ckpt.wait_until_finished()
        again = pipeline(0, 1, 4)
        ckpt.restore(data=again)
        assert [np.asarray(batch["id"]).tolist() for batch in again] == whole[2:]
        with pytest.raises(PositionError, match="cannot be set"):
            ckpt.restore(data=used)


@pytest.mark.parametrize(("place", "code"), docs_code.blocks("datarax"))
def test_the_example_in_the_docs_runs(place: str, code: str) -> None:
    docs_code.run(code)
