"""Mosaic's StreamingDataset on real hosts. Runs in the job that has `streaming`.

Its ranks meet through torch.distributed, so the property runs on processes: a few schedules of
three starts, each on another number of hosts.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import docs_code
import pytest

from datarax_dist.testing import free_port, run_hosts

# Its names in shared memory are those of the machine: ranks of two jobs that begin in one moment
# take each other for theirs.
pytestmark = pytest.mark.xdist_group("mosaic")

RECORDS, BATCH = 96, 12


def join(port: int) -> tuple[int, int]:
    """Tells Mosaic who this host is, as a launcher of torch jobs would."""
    import jax

    host, hosts = jax.process_index(), jax.process_count()
    os.environ |= {
        "RANK": str(host),
        "WORLD_SIZE": str(hosts),
        "LOCAL_RANK": str(host),
        "LOCAL_WORLD_SIZE": str(hosts),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return host, hosts


def write(folder: str) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=folder, columns={"id": "int"}, size_limit=1 << 10) as writer:
        for record in range(RECORDS):
            writer.write({"id": record})


def make(kind: str, folder: str, hosts: int, *, seed: int = 3) -> Any:
    from streaming import StreamingDataLoader, StreamingDataset

    from datarax_dist.data import tracked

    for _ in range(5):
        # It looks for a free name in shared memory, and takes it later; of another job on this
        # machine it then says that the file exists. The next look finds the next name.
        with contextlib.suppress(FileExistsError):
            dataset = StreamingDataset(
                local=folder,
                batch_size=BATCH // hosts,
                shuffle=True,
                shuffle_seed=seed,
                num_canonical_nodes=2,
            )
            break
    else:
        raise AssertionError("Mosaic finds no free name in shared memory")
    if kind == "dataset":
        return tracked(dataset, 0)
    loader = StreamingDataLoader(dataset, batch_size=BATCH // hosts)
    return loader if kind == "loader" else tracked(loader, 2)


def train(root: str, folder: str, kind: str, port: int, stop: int | None, lost: int) -> Any:
    """Takes batches and saves each step before `stop`; returns where it began and what it read."""
    _, hosts = join(port)

    import datarax_dist as dd

    batches = make(kind, folder, hosts)
    used: list[list[int]] = []
    with dd.Checkpointer(root, options=dd.Options(batches_per_step=None)) as ckpt:
        restored = ckpt.try_restore(data=batches)
        start = step = 0 if restored is None else restored.step + 1
        rows: list[int] = []
        for batch in batches:
            rows += [batch["id"]] if kind == "dataset" else batch["id"].tolist()
            if len(rows) < BATCH // hosts:
                continue
            used.append(rows)
            rows = []
            if stop is None or step < stop:
                ckpt.save(step, data=batches)
            step += 1
            if stop is not None and step == stop + lost:
                break
    return start, used


SCHEDULES = {
    "loader": [(2, 3, 1), (3, 5, 2), (1, None, 0)],
    "loader, ahead": [(1, 1, 0), (3, 4, 3), (2, None, 0)],
    "dataset": [(2, 2, 2), (1, 5, 1), (2, None, 0)],
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_each_record_is_read_once_on_other_numbers_of_hosts(tmp_path: Path, kind: str) -> None:
    folder = str(tmp_path / "mds")
    [done] = run_hosts(write, 1, args=(folder,), timeout_seconds=120)
    assert done.error is None
    [whole] = run_hosts(
        train, 1, args=(str(tmp_path / "whole"), folder, kind, 0, None, 0), timeout_seconds=120
    )
    assert whole.error is None
    truth = [sorted(rows) for rows in whole.value[1]]
    assert sorted(record for rows in truth for record in rows) == list(range(RECORDS))
    found: dict[int, list[int]] = {}
    for hosts, stop, lost in SCHEDULES[kind]:
        arguments = (str(tmp_path / "run"), folder, kind, free_port(), stop, lost)
        told = run_hosts(train, hosts, args=arguments, timeout_seconds=120)
        assert [host.error for host in told] == [None] * hosts
        start = told[0].value[0]
        for k, parts in enumerate(zip(*(host.value[1] for host in told), strict=True)):
            found[start + k] = sorted(record for rows in parts for record in rows)
    assert [found[step] for step in sorted(found)] == truth


def refusals(folder: str, root: str) -> list[str]:
    from streaming import StreamingDataset

    import datarax_dist as dd
    from datarax_dist.errors import PositionError

    told = []
    with dd.Checkpointer(root) as ckpt:
        loader = make("loader", folder, 1)
        ckpt.save(0, data=loader)
        next(iter(loader))
        for step, data in ((1, loader.dataset), (None, loader)):
            try:
                if step is not None:
                    ckpt.save(step, data=data)
                else:
                    ckpt.restore(data=data)
            except PositionError as error:
                told.append(str(error))
        del loader, data
        try:
            ckpt.restore(data=make("loader", folder, 1, seed=4))
        except PositionError as error:
            told.append(str(error))
    assert StreamingDataset
    return told


def test_what_it_refuses(tmp_path: Path) -> None:
    folder = str(tmp_path / "mds")
    [done] = run_hosts(write, 1, args=(folder,), timeout_seconds=120)
    assert done.error is None
    [told] = run_hosts(refusals, 1, args=(folder, str(tmp_path / "run")), timeout_seconds=120)
    assert told.error is None, json.dumps(told.output)
    alone, used, other = told.value
    assert "tracked(loader, 0)" in alone
    assert "iter() was called on it" in used
    assert "data.seed: saved 3, now 4" in other


@pytest.mark.parametrize(("place", "code"), docs_code.blocks("mosaic"))
def test_the_example_in_the_docs_runs(place: str, code: str) -> None:
    docs_code.run(code)
