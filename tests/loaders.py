"""Loaders of every kind, for the tests in one process and for those on real hosts. Each factory is
called with a host and the number of hosts, and reads an epoch of `RECORDS` records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from grain.experimental import ElasticIterator

from datarax_dist.data import replay, shards, tracked

RECORDS = 96
V = 24
GLOBAL_BATCH = 12


class Stream:
    """Every `count`-th record from `shard`, each with a random number; a position of everything
    that JSON cannot say.
    """

    def __init__(self, shard: int, count: int, records: int = RECORDS, batch: int = 1) -> None:
        self.records = list(range(shard, records, count))
        self.batch = batch
        self.at = 0
        self.random = np.random.default_rng(shard)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        chosen = self.records[self.at : self.at + self.batch]
        if not chosen:
            raise StopIteration
        self.at += self.batch
        return {"id": np.asarray(chosen), "noise": self.random.integers(1 << 60, size=len(chosen))}

    def get_state(self) -> dict[Any, Any]:
        return {
            0: self.at,
            ("random", "state"): self.random.bit_generator.state,
            "seen": np.arange(self.at),
            "raw": bytes(self.at),
            "nan": float("nan"),
        }

    def set_state(self, state: dict[Any, Any]) -> None:
        assert state["seen"].tolist() == list(range(state[0]))
        assert state["raw"] == bytes(state[0])
        self.at = state[0]
        self.random.bit_generator.state = state[("random", "state")]


class Lazy:
    """A loader that forgets what it was set to until its first batch is taken."""

    def __init__(self, shard: int, count: int) -> None:
        self.records = list(range(shard, RECORDS, count))
        self.at = 0
        self.start = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        self.at = self.start
        while self.at < len(self.records):
            self.at += 1
            yield np.asarray([self.records[self.at - 1]])

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["at"]


class Anew(Stream):
    """One that begins another epoch when it is set to the end of one, as torchdata does."""

    finished = False

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            return super().__next__()
        except StopIteration:
            self.finished = True
            raise

    def get_state(self) -> dict[Any, Any]:
        return {"stream": super().get_state(), "finished": self.finished}

    def set_state(self, state: dict[Any, Any]) -> None:
        if not state["finished"]:
            super().set_state(state["stream"])


def generator(shard: int, count: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng([7, shard])
    for record in range(shard, RECORDS, count):
        yield np.asarray([[record, random.integers(1 << 30)]])


class Indexed:
    """Batch k is a function of k, as in Keras's PyDataset; rows may not divide evenly."""

    def __init__(self, host: int, hosts: int) -> None:
        self.host, self.hosts = host, hosts

    def __len__(self) -> int:
        return RECORDS // GLOBAL_BATCH

    def __getitem__(self, index: int) -> np.ndarray:
        records = np.random.default_rng(3).permutation(RECORDS).reshape(-1, GLOBAL_BATCH)
        return records[index, self.host :: self.hosts]


class ByStep:
    """The same, as Levanter's DataLoader has it."""

    def __init__(self, host: int, hosts: int) -> None:
        self.host, self.hosts = host, hosts

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.iter_from_step(0)

    def iter_from_step(self, step: int) -> Iterator[np.ndarray]:
        for k in range(step, RECORDS // GLOBAL_BATCH):
            yield np.arange(k * GLOBAL_BATCH, (k + 1) * GLOBAL_BATCH)[self.host :: self.hosts]


class Source:
    def __len__(self) -> int:
        return RECORDS

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"id": np.int32(index)}

    def __repr__(self) -> str:
        return "Source()"  # Grain's DataLoader compares it when it is restored


# No threads: they are Grain's to test, and hundreds of pipelines are made here.
QUIET = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def noise(record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {**record, "noise": rng.integers(1 << 30)}


def grain_map(shard: int, count: int) -> Any:
    dataset = grain.MapDataset.source(Source()).seed(5).shuffle()[shard::count]
    return dataset.random_map(noise).batch(1).to_iter_dataset(QUIET)


def grain_iter(shard: int, count: int) -> Any:
    dataset = grain.MapDataset.source(Source()).seed(5).shuffle()[shard::count]
    return dataset.to_iter_dataset(QUIET).random_map(noise).batch(1)


def grain_loader(shard: int, count: int) -> Any:
    return grain.DataLoader(
        data_source=Source(),
        sampler=grain.samplers.IndexSampler(
            RECORDS,
            shard_options=grain.sharding.ShardOptions(shard, count, drop_remainder=True),
            shuffle=True,
            seed=3,
            num_epochs=1,
        ),
        operations=[grain.transforms.Batch(1)],
        worker_count=0,
        read_options=QUIET,
    )


def grain_elastic(host: int, hosts: int) -> Any:
    dataset = grain.MapDataset.source(Source()).seed(5).shuffle().random_map(noise)
    options = grain.sharding.ShardOptions(host, hosts)
    return iter(ElasticIterator(dataset, GLOBAL_BATCH, options, read_options=QUIET))


TOYS: dict[str, Callable[[int, int], Any]] = {
    "shards": lambda host, hosts: shards(Stream, V),
    "lazy": lambda host, hosts: shards(Lazy, V),
    "begins anew": lambda host, hosts: shards(Anew, V),
    "replay": lambda host, hosts: shards(lambda s, n: replay(lambda: generator(s, n)), V),
    "tracked shards": lambda host, hosts: tracked(shards(Stream, V), 3),
    "step-indexed": lambda host, hosts: tracked(Indexed(host, hosts), 0),
    "step-indexed, ahead": lambda host, hosts: tracked(Indexed(host, hosts), 4),
    "by step": lambda host, hosts: tracked(ByStep(host, hosts), 1),
    "limited": lambda host, hosts: shards(lambda s, n: Stream(s, n, RECORDS + 7), V, batches=4),
}
GRAIN: dict[str, Callable[[int, int], Any]] = {
    "map": lambda host, hosts: shards(grain_map, V),
    "iter": lambda host, hosts: shards(grain_iter, V),
    "iter, ahead": lambda host, hosts: tracked(shards(grain_iter, V), 2),
    "loader": lambda host, hosts: shards(grain_loader, 4),
    "elastic": grain_elastic,
    "elastic, ahead": lambda host, hosts: tracked(grain_elastic(host, hosts), 3),
}
