"""Runs the benchmarks, one after the other, and draws what they found.

    python -m benchmarks [--full] [--only speed,memory] [--out bench_out] [--disk DIRECTORY]
                         [--memory DIRECTORY]

Results go to `results.jsonl` in the directory `--out`, its first line the machine's description;
the plots go beside it. Without `--full` it takes about 20 minutes on two cores; with it larger
states and more of each, about an hour. What needs a package that is missing (torch, safetensors) is
left out, and said. A benchmark that fails is told at the end, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import plots
from benchmarks.harness import machine

_LIMIT_SECONDS = 1800.0  # of one benchmark
_KINDS = ("weights", "bf16", "zeros", "int8", "optimizer", "adapters", "demo")


def _grid(disk: str, memory: str, peers: list[str], *, full: bool) -> Iterator[list[str]]:
    """The commands, without the interpreter."""

    def speed(**options: object) -> list[str]:
        told = {"place": disk, "peers": "orbax_v0", "rounds": 5, **options}
        return ["speed", *(f"--{name}={value}" for name, value in told.items())]

    everybody = ",".join(peers)
    for place in (disk, memory):
        yield speed(place=place, peers=everybody)
        yield speed(place=place, mib=64)
    if full:
        yield speed(mib=4096, rounds=3)
    yield speed(mib=40, leaves=1000, peers="orbax_v0,orbax_v1")
    yield speed(mib=40, leaves=10000, rounds=5 if full else 2)
    for kind in _KINDS if full else ("optimizer", "demo"):
        yield speed(kind=kind, mib=256)
    yield speed(mib=256, mesh="other")
    for hosts in (2, 4):
        yield speed(mib=256, hosts=hosts)
    for hosts in (2, 4) if full else (2,):
        yield ["replicas", f"--hosts={hosts}", f"--place={disk}"]
    yield ["replicas", "--bucket", "--mib=64"]
    yield ["memory", f"--place={disk}"]
    for hosts in (1, 2, 4) if full else (1, 2):
        yield ["blocking", f"--hosts={hosts}", "--mib=1024"]
    yield ["disturbance", f"--place={disk}"]
    yield ["coordination", "--rounds=1", f"--hosts=1,10,100,1000{',10000' if full else ''}"]
    yield ["coordination", "--board=10000"]
    yield ["coordination", f"--real={'2,4,8,16,32' if full else '2,8,16'}"]


def main() -> int:
    """Runs everything; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="larger states, more of each")
    parser.add_argument("--only", default="", help="names of benchmarks, with commas")
    parser.add_argument("--out", default="bench_out")
    parser.add_argument("--disk", default=tempfile.gettempdir(), help="a directory on a disk")
    parser.add_argument("--memory", default="/dev/shm", help="a directory on tmpfs")
    asked = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    peers = ["orbax_v0", "orbax_v1"]
    for name, module in (("torch_dcp", "torch"), ("safetensors", "safetensors")):
        if importlib.util.find_spec(module):
            peers.append(name)
        else:
            print(f"{name} is left out: {module} is not installed (pip install {module})")
    only = asked.only.split(",") if asked.only else []
    commands = list(_grid(asked.disk, asked.memory, peers, full=asked.full))
    if unknown := sorted({*only} - {command[0] for command in commands}):
        names = sorted({command[0] for command in commands})
        parser.error(f"no benchmark is named {unknown[0]!r}; there are {', '.join(names)}")
    commands = [command for command in commands if not only or command[0] in only]
    out = Path(asked.out)
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    rows = [{"benchmark": "machine", **machine(asked.disk)}]
    failed: list[str] = []
    for number, (name, *options) in enumerate(commands, 1):
        told = " ".join([name, *options])
        print(f"[{number}/{len(commands)}] {told}", flush=True)
        begin = time.monotonic()
        command = [sys.executable, "-m", f"benchmarks.{name}", *options]
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, timeout=_LIMIT_SECONDS, check=False
            )
            lines, code = done.stdout.splitlines(), done.returncode
        except subprocess.TimeoutExpired:
            lines, code = [], f"no end after {_LIMIT_SECONDS:.0f} s"
        if code:
            failed.append(f"{told}: {code}")
        rows += [{"command": told, **json.loads(line)} for line in lines if line.startswith("{")]
        results.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"    {time.monotonic() - begin:.0f} s", flush=True)
    if importlib.util.find_spec("matplotlib"):
        print("\n".join(str(path) for path in plots.draw(results, out)))
    print(results)
    for line in failed:
        print(f"FAILED: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
