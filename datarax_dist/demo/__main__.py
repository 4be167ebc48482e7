"""``python -m datarax_dist.demo --out DIR``: kill a job in the middle of a save, prove the rest.

Exit code 0 when every proof holds, 1 when one fails or a run does not work, 2 for a wrong call.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datarax_dist.demo import account
from datarax_dist.demo.account import Proof, StartLog

if TYPE_CHECKING:
    from datarax_dist.testing import HostResult

_SAVE_EVERY = 8
_HOSTS = 4
_FEWER_HOSTS = 2
_VICTIM = 2
_KILL_PHASE = "save:record"
_FOUR_HOSTS_STOP = 32
_TOLERANCE = 0.001
_MARKER = ".datarax_dist_demo"
# Four processes share a machine; one thread each is faster, and its sums have one order.
_XLA_FLAGS = "--xla_cpu_multi_thread_eigen=false --xla_force_host_platform_device_count=1"


class DemoError(RuntimeError):
    """A run of the demo did not go as it must."""


class _Narrator:
    """Prints what happens, with the seconds since the start."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._lock = threading.Lock()

    def seconds(self) -> float:
        return time.monotonic() - self._begin

    def say(self, text: str) -> None:
        with self._lock:
            print(f"[{self.seconds():6.1f} s] {text}", flush=True)

    def detail(self, text: str) -> None:
        with self._lock:
            for line in text.splitlines():
                print(f"           {line}", flush=True)


class _Follower:
    """Says how far host 0 has come while the hosts run."""

    def __init__(self, narrator: _Narrator, path: Path, total: int) -> None:
        self._narrator = narrator
        self._path = path
        self._total = total
        self._stop = threading.Event()
        self._seen = 0
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> _Follower:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(0.2):
            self._look()
        self._look()

    def _look(self) -> None:
        if not self._path.exists():
            return
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        for line in lines[self._seen :]:
            if not line.endswith("\n"):
                return
            self._seen += 1
            entry = json.loads(line)
            if entry["event"] == "step" and (entry["step"] + 1) % _SAVE_EVERY == 0:
                done = entry["step"] + 1
                self._narrator.detail(f"step {done:2d} of {self._total}, loss {entry['loss']:.4f}")


def _check_installed() -> None:
    missing = [
        name for name in ("grain", "optax", "matplotlib") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise DemoError(
            f"The demo needs {', '.join(missing)}. Install with: pip install 'datarax_dist[demo]'"
        )


def _prepare(out: Path) -> Path:
    """Returns an empty folder for the runs; removes that of an earlier demo, and nothing else."""
    runs = out / "runs"
    if runs.exists():
        if not (runs / _MARKER).exists():
            raise DemoError(f"{runs} is there and is not of an earlier demo; choose another --out.")
        shutil.rmtree(runs)
        for name in ("loss.png", "results.json"):  # a failed demo must not show an old success
            (out / name).unlink(missing_ok=True)
    runs.mkdir(parents=True)
    (runs / _MARKER).touch()
    return runs


class _Demo:
    """The four starts, and the proofs over their logs."""

    def __init__(self, out: Path, narrator: _Narrator) -> None:
        self._out = out
        self._runs = _prepare(out)
        self._narrator = narrator
        self._seconds: dict[str, float] = {}

    def _start(
        self, name: str, root: str, hosts: int, stop: int, kill: str | None = None
    ) -> tuple[StartLog, list[HostResult]]:
        """Runs the job once; a host that fails ends the demo, unless a kill was asked for."""
        from datarax_dist.demo.train import HostRun, train
        from datarax_dist.testing import run_hosts

        logs = self._runs / "logs" / name
        logs.mkdir(parents=True)
        run = HostRun(
            root=str(self._runs / root), logs=str(logs), stop=stop, save_every=_SAVE_EVERY
        )
        env = {"XLA_FLAGS": _XLA_FLAGS, "DATARAX_DIST_KILL_AT": kill or ""}
        begin = time.monotonic()
        with _Follower(self._narrator, logs / "host-0.jsonl", stop):
            results = run_hosts(
                train,
                hosts,
                devices_per_host=1,
                args=(run,),
                env=env,
                timeout_seconds=90,
                grace_seconds=2,
            )
        self._seconds[name] = round(time.monotonic() - begin, 2)
        for result in results:
            (logs / f"host-{result.host}.output").write_text(result.output, encoding="utf-8")
        failed = [result for result in results if result.exit_code != 0]
        if failed and kill is None:
            worst = next((result for result in failed if result.error is not None), failed[0])
            cause = worst.error.traceback if worst.error else worst.output
            raise DemoError(
                f"{name}: host {worst.host} ended with {worst.exit_code}.\n{cause[-4000:]}"
            )
        return account.read_log(logs, hosts), results

    def run(self) -> bool:
        """Runs everything, writes the files; returns whether every proof holds."""
        from datarax_dist.demo.train import BATCH, DATA_SHARDS, SEQUENCE, STEPS

        say, detail = self._narrator.say, self._narrator.detail
        records = STEPS * BATCH
        say(
            f"The job: a transformer over characters, {records} records of {SEQUENCE + 1} "
            "characters of the standard library's source,"
        )
        detail(
            f"{STEPS} steps of {BATCH} records (one epoch), {DATA_SHARDS} data shards, state "
            f"sharded over all hosts, a save every {_SAVE_EVERY} steps."
        )

        say(f"1. Uninterrupted: {_HOSTS} hosts, steps 0 to {STEPS - 1}.")
        reference, _ = self._start("1-uninterrupted", "reference", _HOSTS, STEPS)

        say(
            f"2. The same, but host {_VICTIM} gets SIGKILL in the middle of its second save "
            f"({_KILL_PHASE})."
        )
        kill = f"{_KILL_PHASE}@{_VICTIM}#2"
        killed, dead = self._start("2-killed", "interrupted", _HOSTS, STEPS, kill)
        detail(
            f"host {_VICTIM} ended with {dead[_VICTIM].exit_code}; the launcher ended the others, "
            "which could not go on without it"
        )
        left = sorted(path.name for path in (self._runs / "interrupted").iterdir())
        detail(f"left in the run's directory: {', '.join(left)}")
        torn = 2 * _SAVE_EVERY - 1
        recorded = _recorded_hosts(self._runs / "interrupted", torn)
        detail(f"hosts whose part of step {torn} was complete: {recorded or 'none'}")

        say(f"3. Resumed on {_HOSTS} hosts, up to step {_FOUR_HOSTS_STOP - 1}.")
        same, same_results = self._start("3-resumed", "interrupted", _HOSTS, _FOUR_HOSTS_STOP)
        self._say_restored(same)
        detail(f"committed steps now: {same_results[0].value['committed']}")

        say(f"4. Resumed on {_FEWER_HOSTS} hosts, to the end of the epoch.")
        fewer, fewer_results = self._start("4-fewer-hosts", "interrupted", _FEWER_HOSTS, STEPS)
        self._say_restored(fewer)
        detail(f"committed steps now: {fewer_results[0].value['committed']}")

        proofs, history = self._prove(reference, killed, dead, recorded, same, fewer, records)
        self._write(proofs, history, reference, killed, same, fewer)
        passed = all(proof.passed for proof in proofs)
        say("What was proved:")
        print(account.proof_table(proofs))
        say(
            f"{'All' if passed else 'NOT all'} proofs hold. "
            f"See {self._out / 'loss.png'} and {self._out / 'results.json'}."
        )
        return passed

    def _say_restored(self, log: StartLog) -> None:
        if not log.restored:
            raise DemoError("The hosts found no step to go on from.")
        entry = log.restored[0]
        self._narrator.detail(entry["report"])
        phases = ", ".join(f"{name} {value:.2f} s" for name, value in entry["seconds"].items())
        self._narrator.detail(f"  {phases}")

    def _prove(
        self,
        reference: StartLog,
        killed: StartLog,
        dead: Sequence[HostResult],
        recorded: Sequence[int] | None,
        same: StartLog,
        fewer: StartLog,
        records: int,
    ) -> tuple[list[Proof], StartLog]:
        """Returns the proofs, and the committed history of the interrupted run."""
        first, second = same.restored[0]["step"], fewer.restored[0]["step"]
        torn = 2 * _SAVE_EVERY - 1
        history = StartLog()
        for log, begin, end in (
            (killed, 0, first + 1),
            (same, first + 1, second + 1),
            (fewer, second + 1, max(fewer.losses, default=-1) + 1),
        ):
            for step in range(begin, end):
                history.losses[step] = log.losses[step]
                history.bits[step] = log.bits[step]
                history.ids[step] = log.ids[step]
            history.digests.update({k: v for k, v in log.digests.items() if begin <= k < end})

        code = dead[_VICTIM].exit_code
        refused = [*same.restored[0]["refused"]]
        proofs = [
            Proof(
                f"host {_VICTIM} died of SIGKILL inside the save of step {torn}; its torn step is "
                "not taken",
                code == -signal.SIGKILL
                and first == torn - _SAVE_EVERY
                and recorded is not None
                and _VICTIM not in recorded,
                f"exit code {code}; host records in the torn step: {recorded}; resumed from step "
                f"{first}; refused: {', '.join(refused) or 'none'}",
            )
        ]

        on_four = range(second + 1)
        equal = sum(
            len({*reference.bits[step], *history.bits[step]}) == 1
            and len(history.bits[step]) == _HOSTS
            for step in on_four
        )
        proofs.append(
            Proof(
                f"on {_HOSTS} hosts the interrupted loss curve is the uninterrupted one, bit for "
                "bit",
                equal == len(on_four) and second > first,
                f"{equal} of {len(on_four)} steps have the same 32 bits on all hosts "
                f"({first + 1} before the kill, {second - first} after it)",
            )
        )
        saved = [step for step in sorted(same.digests) if step <= second]
        alike = sum(reference.digests.get(step) == same.digests[step] for step in saved)
        proofs.append(
            Proof(
                "after resuming, the whole state is the uninterrupted run's too",
                bool(saved) and alike == len(saved),
                f"digests equal at {alike} of {len(saved)} later saves (steps {saved})",
            )
        )
        for log, hosts, told in (
            (same, _HOSTS, f"the same {_HOSTS} hosts"),
            (fewer, _FEWER_HOSTS, f"{_FEWER_HOSTS} hosts, another mesh"),
        ):
            step = log.restored[0]["step"]
            source = killed if log is same else same
            wanted = source.digests.get(step)
            good = [
                entry
                for entry in log.restored
                if entry["restored_digest"] == entry["saved_digest"] == wanted
                and entry["fresh_digest"] != wanted
            ]
            proofs.append(
                Proof(
                    f"the state restored on {told} has the digest of the saved one",
                    len(good) == hosts,
                    f"step {step}: saved {wanted}, restored {log.restored[0]['restored_digest']} "
                    f"({len(good)} of {hosts} hosts agree)",
                )
            )
        once, never, more = account.times_read(history.ids, records)
        proofs.append(
            Proof(
                "every record of the epoch was consumed exactly once, over the kill and both "
                "resumes",
                once == records and not never and not more,
                f"{once} of {records} records once, {never} never, {more} more than once",
            )
        )
        batches = account.same_batches(reference.ids, history.ids)
        proofs.append(
            Proof(
                "each global batch holds the same records as in the uninterrupted run",
                batches == len(reference.ids) == len(history.ids),
                f"{batches} of {len(reference.ids)} batches "
                f"({len(history.ids) - second - 1} of them read by {_FEWER_HOSTS} hosts)",
            )
        )
        gap = max(
            (abs(loss - reference.losses[step]) for step, loss in fewer.losses.items()),
            default=float("inf"),
        )
        proofs.append(
            Proof(
                f"on {_FEWER_HOSTS} hosts the curve goes on (sums run in another order there, so "
                "bits may differ)",
                gap <= _TOLERANCE,
                f"largest difference {gap:.2e} over {len(fewer.losses)} steps, "
                f"limit {_TOLERANCE:g}",
            )
        )
        return proofs, history

    def _write(
        self,
        proofs: Sequence[Proof],
        history: StartLog,
        reference: StartLog,
        killed: StartLog,
        same: StartLog,
        fewer: StartLog,
    ) -> None:
        first, second = same.restored[0]["step"], fewer.restored[0]["step"]
        account.draw(
            self._out / "loss.png",
            reference.losses,
            [
                (f"{_HOSTS} hosts, until the kill", killed.losses),
                (f"resumed on {_HOSTS} hosts", same.losses),
                (f"resumed on {_FEWER_HOSTS} hosts", fewer.losses),
            ],
            [
                (first + 0.5, f"{_HOSTS} hosts\nresume here"),
                (2 * _SAVE_EVERY - 1, f"host {_VICTIM} killed\nin this save"),
                (second + 0.5, f"{_FEWER_HOSTS} hosts\nresume here"),
            ],
        )
        results: dict[str, Any] = {
            "passed": all(proof.passed for proof in proofs),
            "proofs": [asdict(proof) for proof in proofs],
            "seconds": {**self._seconds, "all": round(self._narrator.seconds(), 2)},
            "resumed_from": {"4_hosts": first, "2_hosts": second},
            "uninterrupted": {"losses": reference.losses, "bits": _first(reference)},
            "interrupted": {"losses": history.losses, "bits": _first(history)},
            "digests": {"uninterrupted": reference.digests, "interrupted": history.digests},
        }
        text = json.dumps(results, indent=1)
        (self._out / "results.json").write_text(text + "\n", encoding="utf-8")


def _recorded_hosts(root: Path, step: int) -> list[int] | None:
    """Returns the hosts with a record in the staging directory of a step; None without one."""
    staged = list(root.glob(f"{step}.staging-*"))
    if not staged:
        return None
    pattern = re.compile(r"host_(\d+)-of-\d+\.json")
    names = (pattern.fullmatch(path.name) for path in staged[0].glob("hosts/*"))
    return sorted(int(name[1]) for name in names if name)


def _first(log: StartLog) -> dict[int, str]:
    return {step: bits[0] for step, bits in log.bits.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo.

    Args:
        arguments: the command line without the program's name; that of the process by default.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="datarax-dist demo",
        description="Kill a job of four hosts in the middle of a save, go on, and prove the rest.",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where to write the results"
    )
    out = parser.parse_args(arguments).out.resolve()
    narrator = _Narrator()
    try:
        _check_installed()
        passed = _Demo(out, narrator).run()
    except (DemoError, TimeoutError) as error:
        print(f"The demo failed: {error}", file=sys.stderr)
        return 1
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
