"""What users get wrong: each is told at once, and says what to do."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import datarax_dist as dd
from datarax_dist import errors, hosts
from datarax_dist.cli import main
from datarax_dist.hosts import HostGroup
from datarax_dist.testing import SimulatedHosts

STATE = {"w": np.ones(3)}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"keep": 3}, r"keep must be a policy, datarax_dist\.latest\(3\) say, not 3"),
        ({"save_when": 2}, r"save_when must be a policy, datarax_dist\.every_steps\(100\) say"),
    ],
)
def test_a_number_is_no_policy(tmp_path: Path, arguments: Any, text: str) -> None:
    with pytest.raises(errors.InvalidArgumentError, match=text):
        dd.Checkpointer(tmp_path / "run", **arguments)


def test_a_step_is_no_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(12, state=STATE)
    step = tmp_path / "run" / "12"
    before = sorted(path.name for path in step.iterdir())
    for act in (
        lambda ckpt: ckpt.try_restore(),
        lambda ckpt: ckpt.all_steps(),
        lambda ckpt: ckpt.save(50, state=STATE),
    ):
        with dd.Checkpointer(step) as ckpt:
            with pytest.raises(errors.InvalidArgumentError) as raised:
                act(ckpt)
            assert f"The root is {tmp_path}/run, it seems; restore(step=12)" in str(raised.value)
    assert sorted(path.name for path in step.iterdir()) == before
    for verb in ("ls", "doctor"):
        assert main([verb, str(step)]) != 0
        told = "".join(capsys.readouterr())
        assert f"The root is {tmp_path}/run" in told


def test_a_donated_array_is_named_before_anything_is_written(tmp_path: Path) -> None:
    donated = jnp.ones(3)
    jax.jit(lambda x: x + 1, donate_argnums=0)(donated)
    if not donated.is_deleted():  # not every platform donates
        donated.delete()
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        with pytest.raises(errors.UnsupportedLeafError, match="Was it donated") as raised:
            ckpt.save(1, state={"a": {"w": donated}})
        assert raised.value.path == "a/w"


def test_a_save_inside_of_what_is_jitted_is_told(tmp_path: Path) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:

        @jax.jit
        def step(x: jax.Array) -> jax.Array:
            ckpt.save(1, state={"w": x})
            return x

        with pytest.raises(errors.UnsupportedLeafError, match=r"w: .* Save outside"):
            step(jnp.ones(3))


def test_hosts_that_have_not_made_the_call_are_told_of_while_they_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hosts, "_TOLD_SECONDS", 0.0)
    is_told = threading.Event()

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            is_told.set()

    handler = Told()
    logging.getLogger("datarax_dist").addHandler(handler)

    def one(group: HostGroup) -> Any:
        assert group.index != 1 or is_told.wait(20)
        return group.exchange("list", group.index, timeout_seconds=20)

    try:
        assert SimulatedHosts(2).run(one) == [[0, 1], [0, 1]]
    finally:
        logging.getLogger("datarax_dist").removeHandler(handler)
    [record] = caplog.records
    told = "list: waiting for hosts 1 to make the same call, on the same root"
    assert record.getMessage() == told


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_a_host_that_does_not_know_of_the_others_is_told(tmp_path: Path) -> None:
    code = f"import datarax_dist as dd\nfor _ in 'ab': dd.Checkpointer({str(tmp_path)!r}).close()"
    told = run(code, JAX_NUM_PROCESSES="2").stderr
    assert told.count("jax.distributed.initialize() was not called") == 1
    assert run(code, JAX_NUM_PROCESSES="1").stderr == ""


def test_a_fault_that_is_none_is_told(tmp_path: Path) -> None:
    code = (
        "import datarax_dist as dd, numpy as np\n"
        f"dd.Checkpointer({str(tmp_path)!r}).save(1, state=np.ones(3))"
    )
    told = run(code, DATARAX_DIST_KILL_AT="nonsense").stderr
    assert "must be PHASE@HOST or PHASE@HOST#OCCURRENCE, such as save:record@1" in told


def test_the_names_of_the_package_are_listed() -> None:
    code = "import datarax_dist, sys; print(dir(datarax_dist), 'jax' in sys.modules)"
    told = run(code).stdout
    assert "'Checkpointer'" in told and "'testing'" in told and told.endswith("False\n")


def test_a_file_is_no_root_for_the_doctor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["doctor", str(tmp_path / "file")]) != 0
    assert f"{tmp_path}/file is no directory" in capsys.readouterr().out


def test_a_root_that_cannot_be_written_is_denied_for_the_doctor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: str, *rest: Any, **more: Any) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "makedirs", refused)
    assert main(["doctor", "--write", str(tmp_path)]) == 12
    assert "check the owner and the mode" in capsys.readouterr().out
