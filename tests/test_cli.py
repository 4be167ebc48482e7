"""The command `datarax-dist`, mostly as its own process, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import datarax_dist as dd
from datarax_dist import cli
from datarax_dist import format as fmt
from datarax_dist.cli import output

REPOSITORY = str(Path(dd.__file__).resolve().parent.parent)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli") / "run"
    with dd.Checkpointer(root) as checkpointer:
        for step in (1, 2):
            state = {"params": {"w": np.arange(1000.0)}, "count": 7, "name": "x"}
            checkpointer.save(step, state=state, metadata={"loss": 0.5}).result()
    return root


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


def call(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "datarax_dist", *(str(word) for word in words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=environment(),
        timeout=120,
    )


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [REPOSITORY, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path}


def as_json(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> Any:
    assert cli.main([*(str(word) for word in words), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def largest(step: Path) -> Path:
    return max((f for f in step.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def make_newer(step: Path) -> None:
    """Gives a marker the format version after ours, with a checksum that is right."""
    body = json.loads((step / fmt.COMMIT_NAME).read_bytes())
    del body["crc32c"]
    body["format_version"] = fmt.FORMAT_VERSION + 1
    body["crc32c"] = fmt.crc_text(fmt.crc32c(fmt.dumps(body)))
    (step / fmt.COMMIT_NAME).write_bytes(fmt.dumps(body))


# --- ls


def test_ls_prints_each_step_and_why_it_is_not_committed(run: Path) -> None:
    (run / "3.staging-0123456789abcdef").mkdir()
    (run / "4").mkdir()
    (run / "4" / "_CHECKPOINT_METADATA").write_text("{}")
    shutil.copytree(run / "1", run / "5")
    flip(run / "2" / fmt.COMMIT_NAME)
    done = call("ls", run)
    lines = [line.split()[:2] for line in done.stdout.splitlines()[1:]]
    assert done.returncode == 0
    assert done.stderr == ""
    assert lines == [
        ["5", "refused"],
        ["4", "foreign"],
        ["3", "staged"],
        ["2", "damaged"],
        ["1", "committed"],
    ]
    assert "its marker is that of step 1" in done.stdout
    assert "3.staging-0123456789abcdef: its save did not end" in done.stdout


def test_ls_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = as_json(capsys, "ls", run)
    newest = body["steps"][0]
    assert body["root"] == str(run)
    assert body["run"] == fmt.parse_run((run / fmt.RUN_NAME).read_bytes())
    assert (newest["step"], newest["state"], newest["hosts"]) == (2, "committed", 1)
    assert newest["reason"] is None
    assert newest["bytes"] > 1000
    assert 0 <= newest["age_seconds"] < 600


def test_ls_takes_a_relative_path(run: Path) -> None:
    done = call("ls", "run", "--json", cwd=run.parent)
    assert json.loads(done.stdout)["root"] == str(run)


def test_ls_of_an_empty_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ls", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no steps" in captured.err


@pytest.mark.parametrize("verb", [["ls"], ["show", "--tree"], ["verify"]])
def test_reading_verbs_import_neither_jax_nor_orbax(run: Path, verb: list[str]) -> None:
    script = (
        "import sys; from datarax_dist.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'jax', 'orbax', 'numpy', 'tensorstore'} & set(sys.modules);"
        "sys.exit(code or (f'imported {heavy}' if heavy else 0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *verb, str(run)],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert (done.returncode, done.stderr) == (0, "")


# --- show


def test_show_describes_the_newest_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = as_json(capsys, "show", run)
    assert (body["step"], body["state"], body["items"]) == (2, "committed", ["state"])
    assert fmt.TREE_NAME in {file["path"] for file in body["files"]}
    assert as_json(capsys, "show", f"{run}@latest")["step"] == 2
    assert as_json(capsys, "show", f"{run}@1")["step"] == 1


def test_show_has_the_metadata(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state={"a": 1}, metadata={"loss": 0.5, "name": "größe\x1b[31m"}).result()
    body = as_json(capsys, "show", tmp_path / "run")
    assert body["metadata"] == {"loss": 0.5, "name": "größe\x1b[31m"}
    assert cli.main(["show", str(tmp_path / "run")]) == 0
    assert 'metadata    {"loss": 0.5, "name": "größe' in capsys.readouterr().out


def test_show_tree(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leaves = {
        "/".join(leaf["path"]): leaf for leaf in as_json(capsys, "show", run, "--tree")["leaves"]
    }
    assert set(leaves) == {"params/w", "count", "name"}
    assert leaves["params/w"]["shape"] == [1000]
    assert leaves["count"]["value"] == 7
    assert cli.main(["show", str(run), "--tree"]) == 0
    assert "(1000)" in capsys.readouterr().out


def test_show_tree_of_a_damaged_tree(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run / "2" / fmt.TREE_NAME)
    assert cli.main(["show", str(run), "--tree"]) == 3
    assert fmt.TREE_NAME in capsys.readouterr().err


def test_show_of_a_damaged_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run / "2" / fmt.host_record_name(0, 1))
    assert cli.main(["show", f"{run}@2"]) == 3
    assert fmt.host_record_name(0, 1) in capsys.readouterr().err


def test_a_newer_format_is_listed_and_exits_13(run: Path) -> None:
    make_newer(run / "2")
    listing = call("ls", run)
    assert listing.returncode == 0
    assert "format version 2" in listing.stdout
    shown = call("show", f"{run}@2")
    assert (shown.returncode, shown.stdout) == (13, "")
    assert shown.stderr.startswith("datarax-dist: ")
    assert "Upgrade datarax_dist" in shown.stderr
    newest = call("show", run)
    assert newest.returncode == 0
    assert "not 2: " in newest.stderr
    assert call("verify", run).returncode == 13
    shutil.rmtree(run / "1")
    assert call("show", run).returncode == 13


# --- verify


def test_verify_checks_every_committed_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = as_json(capsys, "verify", run)
    assert body["level"] == "full"
    assert [(row["step"], row["result"]) for row in body["steps"]] == [(1, "ok"), (2, "ok")]
    done = call("verify", run)
    assert done.returncode == 0
    assert done.stderr == ""
    assert [line.split(" (")[0] for line in done.stdout.splitlines()] == [
        "step 1: ok",
        "step 2: ok",
    ]


def test_verify_names_the_damaged_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = largest(run / "1" / "state")
    flip(file)
    name = file.relative_to(run / "1").as_posix()
    done = call("verify", run)
    assert done.returncode == 3
    assert f"  {name}: its content has changed" in done.stdout
    assert "step 2: ok" in done.stdout
    assert "damaged steps" in done.stderr
    assert list(as_json(capsys, "verify", f"{run}@1", code=3)["steps"][0]["damage"]) == [name]
    assert cli.main(["verify", f"{run}@1", "--level", "sizes"]) == 0
    assert cli.main(["verify", f"{run}@2"]) == 0
    file.write_bytes(file.read_bytes()[:-1])
    assert cli.main(["verify", f"{run}@1", "--level", "sizes"]) == 3
    assert cli.main(["verify", f"{run}@1", "--level", "marker"]) == 0


@pytest.mark.parametrize("name", [fmt.COMMIT_NAME, fmt.host_record_name(0, 1)])
@pytest.mark.parametrize("level", ["marker", "sizes", "full"])
def test_verify_finds_damaged_records_at_every_level(run: Path, name: str, level: str) -> None:
    flip(run / "2" / name)
    done = call("verify", run, "--level", level)
    assert done.returncode == 3
    assert name in done.stdout


def test_verify_of_a_step_that_is_not_committed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "2" / fmt.COMMIT_NAME).unlink()
    assert cli.main(["verify", f"{run}@2"]) == 10
    assert "staged" in capsys.readouterr().err
    assert cli.main(["verify", str(run)]) == 0


# --- errors


@pytest.mark.parametrize("verb", ["ls", "show", "verify"])
def test_a_root_that_is_missing_exits_10(tmp_path: Path, verb: str) -> None:
    done = call(verb, tmp_path / "none")
    assert (done.returncode, done.stdout) == (10, "")
    assert done.stderr == f"datarax-dist: {tmp_path / 'none'} is not there.\n"


def test_a_step_that_is_missing_exits_10(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("show", "verify"):
        assert cli.main([verb, f"{run}@9"]) == 10
        assert "committed steps: 1, 2" in capsys.readouterr().err


def test_usage_errors_exit_2(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        [],
        ["nothing"],
        ["ls"],
        ["ls", "s3://bucket/run"],
        ["doctor", "gs:/bucket/run"],
        ["ls", str(run), "more"],
        ["show", f"{run}@newest"],
        ["verify", str(run), "--level", "most"],
        ["launch", "--hosts", "0", "--", "true"],
        ["launch", "--hosts", "2"],
        ["launch", "--hosts", "x", "--", "true"],
        ["launch", "--hosts", "2", "--grace", "x", "--", "true"],
    ):
        assert cli.main(words) == 2, words
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Traceback" not in captured.err


def test_what_was_meant_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for words, told in (
        ("launch --hosts 2 python t.py -x", "datarax-dist launch --hosts 2 -- python t.py -x"),
        ("launch --hosts 2 --what x -- true", "unrecognized arguments: --what x"),
        ("ls gs:/bucket/run", "Use 'gs://bucket/run'"),
    ):
        assert cli.main(words.split()) == 2
        assert told in capsys.readouterr().err


def test_a_root_may_have_an_at_sign(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = run.with_name("run@7")
    run.rename(other)
    assert as_json(capsys, "show", other)["step"] == 2
    assert as_json(capsys, "show", f"{other}@1")["step"] == 1


def test_names_from_storage_cannot_control_the_terminal(
    run: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    place = os.fsencode(run / "2" / "state" / "d")
    for name in (b"evil\x1b[2J\x1b[31mOK", b"a\nstep 3: all is well", "\u202eb".encode()):
        os.symlink("/etc/passwd", place + b"/" + name)
    with dd.Checkpointer(run) as ckpt:
        report = ckpt.restore().report
        with pytest.raises(dd.errors.CorruptStepError) as caught:
            ckpt.restore(step=2)
    assert report is not None and report.step == 1
    told = caplog.text + str(report) + str(caught.value)
    assert not set(told) & set("\x1b\u202e")
    assert "\nstep 3: all" not in told and "a\\nstep 3: all" in told
    os.symlink("/etc/passwd", place + b"/\xff")  # no text at all
    for command in ("verify", "ls", "show"):
        cli.main([command, str(run)])
        told = "".join(capsys.readouterr())
        assert not set(told) & set("\x1b\u202e\udcff"), command
        assert "\nstep 3: all" not in told
        if command == "verify":
            assert "a\\nstep 3: all is well: it is a symbolic link, not a file" in told


def test_the_lines_of_our_own_errors_stay(capsys: pytest.CaptureFixture[str]) -> None:
    output.note_error(dd.errors.CheckpointError("first\n  second\x1b"))
    output.note_error(RuntimeError("third\nfourth"))
    assert capsys.readouterr().err == (
        "datarax-dist: first\n  second\\x1b\ndatarax-dist: RuntimeError: third\\nfourth\n"
    )


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert cli.main(["launch", "--help"]) == 0
    assert "jax.distributed.initialize(" in capsys.readouterr().out


# --- launch

JOIN = """
import faulthandler, os, sys, jax
faulthandler.dump_traceback_later(60, exit=True)  # a hang shows where
jax.distributed.initialize(
    num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
    process_id=int(os.environ["JAX_PROCESS_ID"]),
)
from jax.experimental import multihost_utils
import numpy as np
total = multihost_utils.process_allgather(np.array([jax.process_index() + 1])).sum()
devices = jax.device_count(), jax.local_device_count()
os.write(1, b"sum %d devices %d %d\\n" % (total, *devices))  # in one piece: gloo writes there too
os.write(2, b"to stderr\\n")
jax.distributed.shutdown()
os._exit(0)  # jax and gloo, torn down at the end of Python, hang once in a few hundred runs
"""


def launch(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "datarax_dist", "launch", *(str(word) for word in words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


@pytest.mark.multihost
def test_launch_runs_one_job_of_two_hosts(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(JOIN)
    command = [sys.executable, tmp_path / "train.py"]
    done = call("launch", "--hosts", 2, "--devices-per-host", 3, "--", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    for host in (0, 1):  # gloo writes to the same pipe, and not always whole lines
        assert re.search(rf"^\[host {host}\] .*sum 3 devices 6 3", done.stdout, re.MULTILINE)
        assert re.search(rf"^\[host {host}\] .*to stderr", done.stdout, re.MULTILINE)
    assert all(line.startswith("[host ") for line in done.stdout.splitlines())


def test_launch_ends_the_others_after_a_failure() -> None:
    script = (
        "import os, sys, time\n"
        "if os.environ['JAX_PROCESS_ID'] == '1': sys.exit(7)\n"
        "print(os.getpid(), flush=True); time.sleep(600)"
    )
    started = time.monotonic()
    done = call("launch", "--hosts", 3, "--grace", 2, "--", sys.executable, "-c", script)
    assert done.returncode == 7
    assert 2 <= time.monotonic() - started < 60
    assert "host 1 ended with exit code 7; the others have 2 s to end" in done.stderr
    assert "terminating host(s) 0, 2" in done.stderr
    pids = [int(line.split("] ")[1]) for line in done.stdout.splitlines()]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_launch_lets_the_others_end_in_time(tmp_path: Path) -> None:
    """Host 1 ends when the launcher has taken notice of the end of host 0: its process is gone."""
    script = (
        "import os, pathlib, sys\n"
        f"told = pathlib.Path({str(tmp_path / 'pid')!r})\n"
        "if os.environ['JAX_PROCESS_ID'] == '0':\n"
        "    told.with_suffix('.part').write_text(str(os.getpid()))\n"
        "    os.replace(told.with_suffix('.part'), told)\n"
        "    sys.exit(5)\n"
        "while not told.exists() or os.path.exists(f'/proc/{told.read_text()}'): pass\n"
        "print('ended'); sys.exit(6)"
    )
    done = call("launch", "--hosts", 2, "--", sys.executable, "-c", script)
    assert (done.returncode, done.stdout) == (5, "[host 1] ended\n")
    assert "terminating" not in done.stderr


def test_launch_says_that_a_host_was_killed() -> None:
    script = "import os; os.kill(os.getpid(), 9)"
    assert call("launch", "--hosts", 1, "--", sys.executable, "-c", script).returncode == 137


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)], ids=["ctrl-c", "sigterm"]
)
def test_launch_passes_signals_on(number: int, code: int) -> None:
    script = (
        "import signal, sys, time\n"
        "def stop(number, frame): print('got', number); sys.exit(75)\n"
        "signal.signal(signal.SIGINT, stop); signal.signal(signal.SIGTERM, stop)\n"
        "print('ready', flush=True); time.sleep(600)"
    )
    with launch("--hosts", 2, "--", sys.executable, "-c", script) as process:
        assert process.stdout is not None
        ready = [process.stdout.readline() for _ in range(2)]
        assert sorted(ready) == ["[host 0] ready\n", "[host 1] ready\n"]
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert sorted(out.splitlines()) == [f"[host {i}] got {int(number)}" for i in (0, 1)]
    assert "Traceback" not in err


def test_launch_ends_hosts_that_go_on_after_sigterm() -> None:
    """As JAX does, which takes note of it."""
    script = (
        "import signal\nsignal.signal(signal.SIGTERM, lambda *_: None)\n"
        "print('ready', flush=True)\nwhile True: signal.pause()"
    )
    with launch("--hosts", 2, "--grace", 0.1, "--", sys.executable, "-c", script) as process:
        assert process.stdout is not None
        assert "ready" in process.stdout.readline() and "ready" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 137
    assert "terminating host(s) 0, 1." in err


def test_launch_of_a_command_that_is_not_there() -> None:
    done = call("launch", "--hosts", 2, "--", "/no/such/command")
    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot start '/no/such/command'" in done.stderr
    assert "Traceback" not in done.stderr


# --- demo


def test_demo_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def popen(words: list[str]) -> subprocess.Popen[bytes]:
        seen.append(words)
        return real([sys.executable, "-c", "raise SystemExit(4)"])

    real = subprocess.Popen
    monkeypatch.setattr(cli.subprocess, "Popen", popen)
    assert cli.main(["demo", "--help", "--", "x"]) == 4
    assert seen == [[sys.executable, "-m", "datarax_dist.demo", "--help", "--", "x"]]
