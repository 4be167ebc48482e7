"""The README's code runs, the public names are pinned, and a golden step loads for ever."""

from __future__ import annotations

import doctest
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import docs_code
import numpy as np
import pytest
import targets

import datarax_dist as dd
from datarax_dist.testing import FakeGCS

HERE = Path(__file__).parent


def test_the_code_in_the_readme_runs(tmp_path: Path) -> None:
    text = (HERE.parent / "README.md").read_text()
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert len(blocks) == 2

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, timeout=120, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (tmp_path / "train.py").write_text(blocks[0])
    assert run(sys.executable, "train.py") == "began with step 0\n"
    assert run(sys.executable, "train.py") == "began with step 5\n"
    command = [sys.executable, "-m", "datarax_dist"]
    told = run(*command, "launch", "--hosts", "2", "--", sys.executable, "train.py")
    assert sorted(told.splitlines()) == [f"[host {host}] began with step 9" for host in (0, 1)]
    assert "12" in run(*command, "ls", "run42")
    run(sys.executable, "-c", "\n".join(blocks))


@pytest.mark.parametrize(("place", "code"), docs_code.blocks())
def test_the_code_in_the_docs_runs(place: str, code: str) -> None:
    docs_code.run(code)


@pytest.mark.parametrize(("place", "code"), docs_code.blocks("bucket"))
def test_the_code_in_the_docs_that_needs_a_bucket_runs(gcs: FakeGCS, place: str, code: str) -> None:
    gcs.make_bucket("my-bucket")
    docs_code.run(code)
    assert "runs/42/1/COMMIT.json" in gcs.objects("my-bucket")


@pytest.mark.parametrize(
    "name",
    [
        "checkpointer",
        "config",
        "data.adapters",
        "data.streams",
        "testing.exactly_once",
        "testing.explorer",
        "testing.world",
        "trees",
    ],
)
def test_the_examples_in_docstrings_run(name: str) -> None:
    module = importlib.import_module(f"datarax_dist.{name}")
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


PUBLIC = {
    "datarax_dist": """
        Checkpointable CheckpointableIterator Checkpointer KeepPolicy Options Progress
        RestoreReport Restored SaveHandle SavePolicy SaveReport StepInfo __version__ data errors
        every_n_steps every_steps latest tree_digest
    """,
    "datarax_dist.checkpoint": """
        CheckpointExistsError CheckpointNotFoundError IteratorCheckpoint OrbaxCheckpointHandler
        PipelineCheckpoint
    """,
    "datarax_dist.data": """
        Checkpointable CheckpointableIterator DataAdapter Replay Shards Tracked adapt
        register_adapter replay shards tracked
    """,
    "datarax_dist.errors": """
        CheckpointError CorruptStepError FormatVersionError InvalidArgumentError LeaseError
        PeerError PeerLostError PositionError Preempted StepExistsError StepNotFoundError
        StorageError StructureMismatchError UnsupportedLeafError
    """,
    "datarax_dist.substrax_store": "SubstraxStore",
    "datarax_dist.testing": """
        HOST_GROUP_CHECKS PHASES STORE_CHECKS ExactlyOnceError ExactlyOnceReport FakeClock FakeGCS
        HostError HostResult MemoryArrays MemoryBucket MemoryStore SimulatedHosts check_exactly_once
        check_host_group fail_at free_port kill_at run_hosts
    """,
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_stay(name: str) -> None:
    module = importlib.import_module(name)
    assert sorted(module.__all__) == sorted(PUBLIC[name].split())
    for public in module.__all__:
        assert getattr(module, public) is not None


def test_the_golden_step_of_version_1_loads(tmp_path: Path) -> None:
    expected = json.loads((HERE / "golden" / "v1.json").read_text())
    root = shutil.copytree(HERE / "golden" / "v1", tmp_path / "run")
    loader = targets.Counter(0, 1)
    with dd.Checkpointer(root) as ckpt:
        restored = ckpt.restore(data=loader)
    assert dd.tree_digest(restored.state) == expected["digest"]
    assert restored.state["name"] == "golden"
    assert np.array_equal(restored.state["w"], np.arange(12, dtype=np.float32).reshape(3, 4))
    assert (restored.step, restored.metadata, loader.at) == (7, {"loss": 0.5}, 3)
