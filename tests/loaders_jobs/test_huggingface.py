"""Hugging Face's IterableDataset. Runs in the job that has `datasets`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import docs_code
import pytest
from datasets import Dataset

import datarax_dist as dd
from datarax_dist.data import adapt, adapters, replay, shards, tracked
from datarax_dist.errors import PositionError
from datarax_dist.testing import check_exactly_once

RECORDS = 48


def stream(shard: int, count: int, files: int = 8) -> Any:
    records = Dataset.from_dict(
        {"id": list(range(RECORDS)), "text": [f"t{i}" for i in range(RECORDS)]}
    )
    return records.to_iterable_dataset(num_shards=files).shard(count, shard)


def doubled(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "double": 2 * record["id"]}


def batched(shard: int, count: int) -> Any:
    return stream(shard, count).map(doubled).batch(2)


FACTORIES: dict[str, Any] = {
    "batched": lambda host, hosts: shards(batched, 8),
    "batched, ahead": lambda host, hosts: tracked(shards(batched, 4), 2),
    "numpy": lambda host, hosts: shards(
        lambda s, n: stream(s, n).select_columns(["id"]).with_format("numpy").batch(3), 8
    ),
    "files shuffled": lambda host, hosts: shards(
        lambda s, n: replay(lambda: iter(stream(s, n).shuffle(seed=3, buffer_size=5).batch(2))), 4
    ),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_shards_read_each_record_once(name: str) -> None:
    hosts = (1, 2, 4) if name in ("batched, ahead", "files shuffled") else (1, 2, 4, 8)
    report = check_exactly_once(FACTORIES[name], hosts=hosts, schedules=30, records=RECORDS)
    assert report.resumes >= 50


def test_as_it_is_it_goes_on_with_the_same_number_of_hosts() -> None:
    check_exactly_once(
        lambda host, hosts: tracked(batched(host, hosts), 0),
        hosts=(2,),
        schedules=30,
        records=RECORDS,
    )


def test_a_save_right_after_a_restore_is_not_the_beginning(tmp_path: Path) -> None:
    """It reports the beginning of the epoch until its first record is taken."""
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        used = tracked(batched(0, 1), 0)
        for _ in range(5):
            next(used)
        ckpt.save(4, data=used)
        ckpt.wait_until_finished()
        expected = [batch["id"] for batch in used]
        again = tracked(batched(0, 1), 0)
        ckpt.restore(data=again)
        ckpt.save(5, data=again)
        ckpt.wait_until_finished()
        last = tracked(batched(0, 1), 0)
        ckpt.restore(step=5, data=last)
        assert [batch["id"] for batch in last] == expected
        begun = batched(0, 1)
        next(iter(begun))
        with pytest.raises(PositionError, match="records were taken from it"):
            ckpt.restore(data=tracked(begun, 0))
        with pytest.raises(PositionError, match=r"tracked\(loader, 0\)"):
            ckpt.save(6, data=batched(0, 1))


def test_lists_of_tokens_stay_one_item_for_each_record() -> None:
    tokens = Dataset.from_dict(
        {"id": list(range(8)), "tokens": [[i] * (2 + i % 3) for i in range(8)]}
    )
    stream = tokens.to_iterable_dataset(num_shards=4)
    loader = shards(lambda s, n: stream.shard(n, s).batch(2), 4)
    batch = next(loader)
    assert batch["tokens"] == [[i] * (2 + i % 3) for i in batch["id"]]
    check_exactly_once(
        lambda host, hosts: shards(lambda s, n: stream.shard(n, s).batch(1), 4),
        records=8,
        schedules=20,
    )


def test_a_shuffle_buffer_which_it_loses_is_refused() -> None:
    with pytest.raises(PositionError, match=r"loses the records in its buffer.*replay"):
        adapt(stream(0, 1).shuffle(seed=1, buffer_size=10).batch(2)).get_state()


def test_its_fingerprint_is_named(tmp_path: Path) -> None:
    described = adapters.describe_loader(adapt(batched(0, 4)))
    assert described["batch"] == 2
    assert described["class"] == "IterableDataset"
    assert "MappedExamplesIterable" in described["pipeline"]
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(0, data=shards(batched, 4))
        ckpt.wait_until_finished()
        with pytest.raises(PositionError, match=r"data\.pipeline: saved \[.*, now \["):
            ckpt.restore(data=shards(lambda s, n: stream(s, n).batch(2), 4))


@pytest.mark.parametrize(("place", "code"), docs_code.blocks("huggingface"))
def test_the_example_in_the_docs_runs(place: str, code: str) -> None:
    docs_code.run(code)
