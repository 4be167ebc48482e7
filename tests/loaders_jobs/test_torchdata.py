"""torchdata's StatefulDataLoader, and torch tensors in positions. Runs in the job that has them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import docs_code
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchdata calls what today's torch has deprecated
    from torchdata.stateful_dataloader import StatefulDataLoader
    from torchdata.stateful_dataloader.sampler import RandomSampler

import datarax_dist as dd
from datarax_dist import codec
from datarax_dist.data import adapt, adapters, replay, shards, tracked
from datarax_dist.errors import PositionError
from datarax_dist.testing import check_exactly_once

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital':UserWarning")

RECORDS = 48


class Records(torch.utils.data.Dataset):
    def __init__(self, shard: int = 0, count: int = 1) -> None:
        self.ids = list(range(shard, RECORDS, count))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Any:
        return {"id": self.ids[index], "square": torch.tensor([self.ids[index] ** 2, 1])}


def loader(shard: int, count: int, *, seed: int = 3, batch: int = 1, workers: int = 0) -> Any:
    return StatefulDataLoader(
        Records(shard, count),
        batch_size=batch,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
        num_workers=workers,
    )


class Streaming(torch.utils.data.IterableDataset):
    """A stateful data set, with randomness of its own in its state."""

    def __init__(self, shard: int, count: int) -> None:
        self.ids = list(range(shard, RECORDS, count))
        self.at = 0
        self.random = torch.Generator().manual_seed(shard)

    def __iter__(self) -> Any:
        while self.at < len(self.ids):
            self.at += 1
            noise = torch.randint(1 << 30, (), generator=self.random)
            yield {"id": self.ids[self.at - 1], "noise": noise}

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "random": self.random.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]
        self.random.set_state(state["random"])


FACTORIES: dict[str, Any] = {
    "map": lambda host, hosts: shards(loader, 8),
    "map, ahead": lambda host, hosts: tracked(shards(loader, 8), 2),
    "iterable": lambda host, hosts: shards(
        lambda s, n: StatefulDataLoader(Streaming(s, n), batch_size=1), 8
    ),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_shards_read_each_record_once(name: str) -> None:
    report = check_exactly_once(FACTORIES[name], hosts=(1, 2, 4, 8), schedules=40, records=RECORDS)
    assert report.resumes >= 70


def test_as_it_is_it_goes_on_with_the_same_number_of_hosts() -> None:
    """`tracked` ends with its epoch; the loader alone begins another one, as it does in torch."""
    check_exactly_once(
        lambda host, hosts: tracked(loader(host, hosts), 0),
        hosts=(2,),
        schedules=40,
        records=RECORDS,
    )


def test_a_run_over_several_epochs_goes_on_in_the_middle_of_one(tmp_path: Path) -> None:
    def make() -> Any:
        records = Records()
        order = RandomSampler(records, generator=torch.Generator().manual_seed(3))
        return StatefulDataLoader(records, batch_size=8, sampler=order)

    def epochs(used: Any) -> list[list[int]]:
        return [[int(i) for batch in used for i in batch["id"]] for _ in range(2)]

    with dd.Checkpointer(tmp_path / "run") as ckpt:
        used = make()
        list(used)
        rest = []
        for step, batch in enumerate(used):
            if step == 2:
                ckpt.save(8, data=used)
            rest.extend(batch["id"].tolist() if step > 2 else [])
        expected = epochs(used)
        ckpt.wait_until_finished()
        again = make()
        ckpt.restore(data=again)
        assert [int(i) for batch in again for i in batch["id"]] == rest
        assert epochs(again) == expected


def test_a_sampler_whose_place_torchdata_does_not_know_is_refused() -> None:
    records = Records()
    order = torch.utils.data.RandomSampler(records)
    for keywords in (
        {"sampler": order},
        {"batch_sampler": torch.utils.data.BatchSampler(order, 4, False)},
    ):
        with pytest.raises(PositionError, match=r"RandomSampler keeps its place.*shuffle=True"):
            adapt(StatefulDataLoader(records, **keywords)).get_state()


def test_with_workers_it_goes_on_and_after_iter_it_is_refused(tmp_path: Path) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        used = loader(0, 1, batch=8, workers=1)
        batches = iter(used)
        next(batches)
        ckpt.save(0, data=used)
        expected = [batch["id"].tolist() for batch in batches]
        ckpt.wait_until_finished()
        again = loader(0, 1, batch=8, workers=1)
        iter(again)
        with pytest.raises(PositionError, match=r"iter\(\) was called on it"):
            ckpt.restore(data=again)
        again = loader(0, 1, batch=8, workers=1)
        ckpt.restore(data=again)
        assert [batch["id"].tolist() for batch in again] == expected


def test_an_older_torchdata_which_resumes_wrongly_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adapters, "_version", lambda package: "0.10.1")
    with pytest.raises(PositionError, match=r"torchdata 0\.10\.1 goes on in another order"):
        adapt(loader(0, 1)).get_state()


def test_its_fingerprint_is_named(tmp_path: Path) -> None:
    described = adapters.describe_loader(adapt(loader(0, 4)))
    assert described == {
        "class": "StatefulDataLoader",
        "version": described["version"],
        "batch": 1,
        "seed": 3,
        "records": 12,
        "shuffle": "RandomSampler",
        "remainder": "keep",
    }
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(0, data=shards(loader, 4))
        ckpt.wait_until_finished()
        with pytest.raises(PositionError, match=r"data\.seed: saved 3, now 4"):
            ckpt.restore(data=shards(lambda s, n: loader(s, n, seed=4), 4))


@pytest.mark.parametrize("dtype", codec._TORCH_DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (40, 30)])
def test_a_tensor_comes_back_as_it_was(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = (torch.rand(shape) * 9).to(getattr(torch, dtype))
    back = codec.unpack(codec.pack({"t": tensor}))["t"]
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor)
    if tensor.ndim == 2:
        turned = codec.unpack(codec.pack(tensor.T))
        assert torch.equal(turned, tensor.T)


@pytest.mark.parametrize("count", [1, 2])
def test_tensors_are_tensors_for_any_number_of_shards(count: int) -> None:
    """Also what numpy does not know, and what shards write into one tensor."""
    common = torch.zeros(2, 1024, dtype=torch.bfloat16)

    def batches(shard: int, count: int) -> Any:
        for number in range(shard, 20 * count, count):
            common.zero_()[:, 7] = number
            yield {"x": common, "y": [common] * 2, "z": torch.ones(2, requires_grad=True) * number}

    for first, batch in enumerate(shards(lambda s, n: replay(lambda: batches(s, n)), count)):
        numbers = [first * count + shard for shard in range(count)]
        rows = [number for number in numbers for _ in range(2)]
        assert (batch["x"].dtype, batch["x"][:, 7].tolist()) == (torch.bfloat16, rows)
        assert [row[0, 7].item() for row in batch["y"]] == rows
        assert batch["z"].tolist() == rows


def test_a_tensor_that_cannot_be_written_is_named() -> None:
    with pytest.raises(codec.EncodeError, match="a/0"):
        codec.pack({"a": [torch.eye(3).to_sparse()]})


@pytest.mark.parametrize(
    "body",
    [
        {"dtype": "float32", "shape": [2], "data": "AAAA"},
        {"dtype": "float32", "shape": [-1], "data": "AAAAAA=="},
        {"dtype": "load", "shape": [], "data": ""},
        {"dtype": ["float32"], "shape": [1], "data": "AAAAAA=="},
        {"dtype": "float32", "shape": [1 << 60], "data": ""},
        {"dtype": "float32", "shape": [1 << 28], "data": ""},  # a gigabyte for nothing
    ],
)
def test_a_hostile_tensor_is_an_error(body: Any) -> None:
    with pytest.raises(codec.DecodeError):
        codec.decode({"$torch": body})


@pytest.mark.parametrize(("place", "code"), docs_code.blocks("torchdata"))
def test_the_example_in_the_docs_runs(place: str, code: str) -> None:
    docs_code.run(code)
