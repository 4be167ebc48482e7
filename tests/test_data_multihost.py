"""Each record exactly once on real `jax.distributed` processes, killed and resumed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import loaders
import numpy as np
import pytest

from datarax_dist.testing import run_hosts

pytestmark = [pytest.mark.multihost, pytest.mark.xdist_group("multihost")]


def ids(batch: Any) -> list[str]:
    """The records of a batch, each with its random number."""
    columns = [batch] if not isinstance(batch, dict) else [batch[key] for key in sorted(batch)]
    lists = [np.asarray(column).reshape(len(column), -1).tolist() for column in columns]
    return [json.dumps(row) for row in zip(*lists, strict=True)]


def train(root: str, logs: str, name: str, part: int, stop: int | None, lost: int) -> int:
    """A job: takes batches, saves each step up to `stop`, and tells a file what it used."""
    import jax

    import datarax_dist as dd

    host, hosts = jax.process_index(), jax.process_count()
    batches = (loaders.TOYS | loaders.GRAIN)[name](host, hosts)
    with (
        dd.Checkpointer(root) as ckpt,
        (Path(logs) / f"{part}-{host}.jsonl").open("a") as log,
    ):
        restored = ckpt.try_restore(data=batches)
        start = step = 0 if restored is None else restored.step + 1
        for batch in batches:
            log.write(json.dumps([step, ids(batch)]) + "\n")
            log.flush()
            if stop is None or step < stop:
                ckpt.save(step, data=batches)
            step += 1
            if stop is not None and step == stop + lost:
                break
    return start


def used(logs: Path, parts: int) -> dict[int, list[str]]:
    """Returns the records of each step as its last run had them, over all hosts."""
    found: dict[int, tuple[int, list[str]]] = {}
    for part in range(parts):
        rows: dict[int, list[str]] = {}
        for file in sorted(logs.glob(f"{part}-*.jsonl")):
            for line in file.read_text().splitlines():
                step, records = json.loads(line)
                rows.setdefault(step, []).extend(records)
        found |= {step: (part, sorted(records)) for step, records in rows.items()}
    return {step: records for step, (_, records) in sorted(found.items())}


# For each start: hosts, the step before which it saves, how many more it takes, and where which
# host is killed. None goes to the end of the epoch.
Start = tuple[int, int | None, int, str]
SCHEDULES: dict[str, Sequence[Start]] = {
    "tracked shards": [(2, 1, 0, ""), (3, None, 0, "save:record@1#2"), (1, None, 0, "")],
    "replay": [(1, 1, 2, ""), (2, 3, 1, ""), (3, None, 0, "")],
    "step-indexed, ahead": [(3, 1, 1, ""), (1, 5, 3, ""), (2, None, 0, "")],
    "iter": [(2, 0, 2, ""), (1, 3, 1, ""), (3, None, 0, "")],
    "loader": [(1, 5, 2, ""), (4, None, 0, "save:positions@0#4"), (2, None, 0, "")],
    "elastic, ahead": [(3, 2, 0, ""), (2, 7, 1, ""), (1, None, 0, "")],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_record_is_used_once_over_crashes_and_other_numbers_of_hosts(
    tmp_path: Path, name: str
) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    schedule = SCHEDULES[name]
    for part, (hosts, stop, lost, kill) in enumerate(schedule):
        done = run_hosts(
            train,
            hosts,
            args=(str(tmp_path / "run"), str(logs), name, part, stop, lost),
            timeout_seconds=90,
            env={"DATARAX_DIST_KILL_AT": kill} if kill else {},
        )
        if not kill:
            assert [host.error for host in done] == [None] * hosts
            assert len({host.value for host in done}) == 1
        else:
            assert done[int(kill.partition("@")[2][0])].exit_code == -9
    found = used(logs, len(schedule))
    truth = [sorted(ids(batch)) for batch in (loaders.TOYS | loaders.GRAIN)[name](0, 1)]
    assert list(found) == list(range(len(truth)))
    assert list(found.values()) == truth
    assert len({record for records in truth for record in records}) == loaders.RECORDS


def global_batches(root: str, shape: tuple[int, int], start: int, steps: int) -> list[Any]:
    """Takes batches that are sharded over `data` and replicated over `model`, and saves."""
    import jax
    from jax.experimental import multihost_utils
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import datarax_dist as dd

    sharding = NamedSharding(
        Mesh(np.array(jax.devices()).reshape(shape), ("data", "model")), PartitionSpec("data")
    )
    batches = dd.data.shards(loaders.Stream, 8, sharding=sharding)
    found = []
    with dd.Checkpointer(root) as ckpt:
        restored = ckpt.try_restore(data=batches)
        assert start == (0 if restored is None else restored.step + 1)
        for step in range(start, start + steps):
            rows = next(batches)["id"]
            batch = jax.make_array_from_process_local_data(sharding, rows)
            found.append(multihost_utils.process_allgather(batch, tiled=True).tolist())
            ckpt.save(step, data=batches)
    return [found, batches.owned()]


def test_hosts_of_one_model_replica_read_the_same_rows_in_the_same_order(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    reads = {
        (4, (2, 2)): [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2,  # tensor parallel over two hosts
        (2, (1, 2)): [list(range(8))] * 2,  # both hold every row
        (2, (2, 1)): [[0, 1, 2, 3], [4, 5, 6, 7]],
        (1, (1, 1)): [list(range(8))],
    }
    for part, ((hosts, shape), owned) in enumerate(reads.items()):
        done = run_hosts(global_batches, hosts, args=(root, shape, part * 2, 2), timeout_seconds=90)
        assert [host.error for host in done] == [None] * hosts
        assert [host.value[1] for host in done] == owned
        expected = [list(range(k * 8, k * 8 + 8)) for k in (part * 2, part * 2 + 1)]
        assert all(host.value[0] == expected for host in done)


def disagreeing(root: str) -> list[Any]:
    """What is told on each host when positions cannot be saved, and that the next save works."""
    import jax

    import datarax_dist as dd

    class Failing(loaders.Stream):
        broken = False

        def get_state(self) -> Any:
            if self.broken:
                raise OSError(5, "the index is gone")
            return super().get_state()

    told = []
    host, hosts = jax.process_index(), jax.process_count()
    opaque = Failing(host, hosts)
    with dd.Checkpointer(root) as ckpt:
        ckpt.save(0, data=opaque)
        opaque.broken = host == 1
        try:
            ckpt.save(1, data=opaque)
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
        opaque.broken = False
        handle = ckpt.save(2, data=opaque)
        assert handle is not None
        handle.result(60)
        batches = dd.data.shards(loaders.Stream, 4)
        for _ in range(1 + host):
            next(batches)
        try:
            ckpt.save(3, data=batches)
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
        return [told, ckpt.all_steps()]


def restore_opaque(root: str) -> str:
    import jax

    import datarax_dist as dd

    with dd.Checkpointer(root) as ckpt:
        try:
            ckpt.restore(data=loaders.Stream(jax.process_index(), jax.process_count()))
        except dd.errors.PositionError as error:
            return str(error)
    return ""


def test_positions_that_one_host_cannot_save_fail_the_save_on_all(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    done = run_hosts(disagreeing, 2, args=(root,), timeout_seconds=90)
    assert [host.error for host in done] == [None] * 2
    for host in done:
        (failed, differing), steps = host.value
        assert "the index is gone" in failed
        assert "the number of batches that 'data' has handed out" in differing
        assert "2 instead of 1" in differing
        assert steps == [0, 2]
    assert "host 1" in done[0].value[0][0]
    [other] = run_hosts(restore_opaque, 1, args=(root,), timeout_seconds=90)
    assert "saved by 2 hosts, this job has 1" in other.value
