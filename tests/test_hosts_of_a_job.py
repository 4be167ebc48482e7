"""Which hosts a job has: `jax.distributed` begun anew, and targets that are on some hosts only."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import datarax_dist as dd
from datarax_dist import errors, hosts
from datarax_dist.testing import run_hosts

STATE = {"w": np.ones(3)}


def test_a_checkpointer_that_was_made_before_the_job_had_hosts_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take its host for a job of its own, and commit what one host has written."""
    ckpt = dd.Checkpointer(tmp_path / "run")
    monkeypatch.setattr(hosts, "_client", object)
    ckpt.save(1, state=STATE).result()  # of one process: nothing is wrong
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for act in (
        lambda: ckpt.save(2, state=STATE),
        lambda: ckpt.restore(state=STATE),
        ckpt.all_steps,
        lambda: ckpt.delete(1),
    ):
        with pytest.raises(errors.InvalidArgumentError, match="Make a new one, on every host"):
            act()
    ckpt.close()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["1", "RUN.json", "lease"]


def begun_anew(root: str, port: int) -> list[Any]:
    """A job that shuts `jax.distributed` down, and initializes it again."""
    from jax.extend.backend import clear_backends

    from datarax_dist import boards

    options = dd.Options(peer_silence_seconds=3)
    host = jax.process_index()
    old = dd.Checkpointer(root, options=options)
    old.save(1, state=STATE).result(60)
    beacons = boards._beacons()
    [thread] = [each for each in threading.enumerate() if each.name == "datarax_dist-beacon"]
    jax.distributed.shutdown()
    clear_backends()
    with pytest.raises(errors.InvalidArgumentError):
        old.all_steps()  # begins no backend, or the next line fails
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, host)
    found: list[Any] = []
    try:
        old.save(2, state=STATE)
    except errors.InvalidArgumentError as error:
        found.append(str(error))
    while not beacons.silent(3):  # nothing tells when: it is time that passes
        time.sleep(0.1)
    with dd.Checkpointer(root, options=options) as ckpt:
        found.append(ckpt.save(2, state=STATE).result(60).step)
        found.append(ckpt.restore(state=STATE).step)
        found.append(ckpt.all_steps())
        thread.join(10)  # it would ask a service that is not there, for ever
        found.append(thread.is_alive())
    return found


def on_one_host(root: str) -> list[Any]:
    """Restores into arrays that are on the devices of host 0 only; and without a target what each
    host had for itself.
    """
    found: list[Any] = []
    for number, compression in enumerate(("none", "zstd")):
        with dd.Checkpointer(
            f"{root}{number}", options=dd.Options(compression=compression)
        ) as ckpt:
            values = {
                "w": np.arange(24.0, dtype=np.float32),
                "b": np.arange(6, dtype=np.int32),
                "n": np.int32(7),
            }
            ckpt.save(1, state={**values, "own": jax.numpy.arange(3)}).result(60)
            mine = [device for device in jax.devices() if device.process_index == 0]
            mesh = jax.sharding.Mesh(np.array(mine), ("x",))
            whole = jax.sharding.PartitionSpec()
            for spec in (whole, jax.sharding.PartitionSpec("x")):
                target = {
                    name: jax.ShapeDtypeStruct(
                        value.shape,
                        value.dtype,
                        sharding=jax.sharding.NamedSharding(mesh, spec if value.ndim else whole),
                    )
                    for name, value in values.items()
                }
                restored = ckpt.restore(state=target).state
                found.append(type(ckpt.restore().state["own"]) is type(jax.numpy.arange(3)))
                for name, value in restored.items():
                    shards = value.addressable_shards
                    right = all(
                        np.array_equal(shard.data, values[name][shard.index]) for shard in shards
                    )
                    found.append((len(shards), right))
    return found


def run(job: Any, *arguments: Any) -> list[Any]:
    ended = run_hosts(job, 2, devices_per_host=2, args=arguments, timeout_seconds=90)
    assert [host.error for host in ended] == [None, None]
    return [host.value for host in ended]


@pytest.mark.multihost
@pytest.mark.xdist_group("multihost")
def test_a_job_may_begin_its_hosts_anew(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for told, *rest in run(begun_anew, str(tmp_path / "run"), port):
        assert "Make a new one, on every host, after jax.distributed.initialize()" in told
        assert rest == [2, 2, [1, 2], False]


@pytest.mark.multihost
@pytest.mark.xdist_group("multihost")
def test_arrays_may_be_on_the_devices_of_one_host(tmp_path: Path) -> None:
    first, second = run(on_one_host, str(tmp_path / "run"))
    assert first == [True, (2, True), (2, True), (2, True)] * 4
    assert second == [True, (0, True), (0, True), (0, True)] * 4
