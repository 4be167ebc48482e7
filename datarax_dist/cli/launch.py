"""The command launch: a job of several hosts on this machine."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

from datarax_dist.cli.output import FAILED, INTERRUPTED, OK, UsageError, note

__all__ = ["LAUNCH_HELP", "launch"]

LAUNCH_HELP = """\
Runs COMMAND once for each host, as processes of this machine that form one jax.distributed job on
CPU devices. Each gets these environment variables:

  JAX_PLATFORMS=cpu
  XLA_FLAGS=... --xla_force_host_platform_device_count=M
  JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo
  JAX_COORDINATOR_ADDRESS, JAX_COORDINATOR_BIND_ADDRESS   127.0.0.1:PORT
  JAX_NUM_PROCESSES, JAX_PROCESS_ID                       N and 0 ... N-1

jax.distributed.initialize() reads the coordinator's addresses itself, but neither the number of
processes nor the process id. A script has to pass them, before anything else uses JAX:

  import os, jax
  jax.distributed.initialize(
      num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
      process_id=int(os.environ["JAX_PROCESS_ID"]),
  )

Each line that a host writes, to stdout or stderr, comes out on stdout after `[host i]`. When a host
ends with an error, the others get some seconds (--grace) to end and are then terminated. Ctrl-C and
SIGTERM are passed on. The exit code is that of the host that failed first (128 + the number of the
signal that killed it), and 130 after Ctrl-C.
"""

_KILL_SECONDS = 5.0  # from SIGTERM to SIGKILL
_POLL_SECONDS = 0.05
_DEVICE_COUNT_FLAG = re.compile(r"--xla_force_host_platform_device_count=\S*")


def _host_environment(host: int, hosts: int, devices: int, port: int) -> dict[str, str]:
    flags = _DEVICE_COUNT_FLAG.sub("", os.environ.get("XLA_FLAGS", "")).split()
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(flags),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(hosts),
        "JAX_PROCESS_ID": str(host),
    }
    environment.setdefault("PYTHONUNBUFFERED", "1")
    environment.pop("JAX_NUM_CPU_DEVICES", None)  # would win over the flag
    return environment


class _Host:
    """One process of the job, in its own process group, with a thread that passes on its output."""

    def __init__(
        self, index: int, command: Sequence[str], env: Mapping[str, str], lock: threading.Lock
    ) -> None:
        self._prefix = f"[host {index}] ".encode()
        self._lock = lock
        self._process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._reader = threading.Thread(
            target=self._pass_on, args=(self._process.stdout,), daemon=True
        )
        self._reader.start()

    def _pass_on(self, output: IO[bytes]) -> None:
        broken = False
        for line in output:
            # When nobody reads any more, this goes on, so that the host does not block.
            if not broken:
                try:
                    with self._lock:
                        sys.stdout.buffer.write(self._prefix + line.rstrip(b"\r\n") + b"\n")
                        sys.stdout.buffer.flush()
                except (OSError, ValueError):
                    broken = True

    def exit_code(self) -> int | None:
        """Returns None while the process runs; 128 + the signal when one killed it."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def send(self, number: int) -> None:
        """Sends a signal to the process, and to what it started, unless it has ended."""
        if self._process.poll() is None:
            try:
                os.killpg(self._process.pid, number)
            except (ProcessLookupError, PermissionError):
                self._process.send_signal(number)

    def finish(self) -> None:
        """Waits for the end of a process that was killed, and a moment for the rest of its output.

        Something that the process started can hold the output open for longer.
        """
        self._process.wait()
        self._reader.join(2.0)


class _Job:
    """All hosts of a job, from the start of the first to the end of the last."""

    def __init__(self, grace_seconds: float) -> None:
        self.hosts: list[_Host] = []
        self._grace_seconds = grace_seconds
        self._signals: list[int] = []
        self._deadline: float | None = None
        self._failure: int | None = None
        self._interrupts = 0
        self._is_told = False  # to end

    def on_signal(self, number: int, frame: Any) -> None:
        """Notes a signal; `run` passes it on."""
        self._signals.append(number)

    def run(self) -> int:
        """Waits for the hosts; returns the exit code of the job."""
        terminated: float | None = None
        while True:
            self._pass_signals_on()
            codes = [host.exit_code() for host in self.hosts]
            if self._failure is None:
                self._check(codes)
            if None not in codes:
                break
            now = time.monotonic()
            if terminated is not None and now > terminated + _KILL_SECONDS:
                self._send(signal.SIGKILL)
            elif terminated is None and self._deadline is not None and now > self._deadline:
                left = ", ".join(str(i) for i, code in enumerate(codes) if code is None)
                note(f"terminating host(s) {left}.")
                # Once: who saves when it is told would begin again.
                self._send(signal.SIGKILL if self._is_told else signal.SIGTERM)
                terminated = now
            time.sleep(_POLL_SECONDS)
        return INTERRUPTED if self._interrupts else self._failure or OK

    def stop(self) -> None:
        """Leaves no host behind, whatever happened."""
        self._send(signal.SIGKILL)
        for host in self.hosts:
            host.finish()

    def _check(self, codes: Sequence[int | None]) -> None:
        for index, code in enumerate(codes):
            if code:
                self._failure = code
                if None in codes:
                    self._set_deadline()
                    rest = f"; the others have {self._grace_seconds:g} s to end"
                else:
                    rest = ""
                note(f"host {index} ended with exit code {code}{rest}.")
                return

    def _pass_signals_on(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            # JAX takes note of SIGTERM, and goes on: it ends nothing by itself.
            self._set_deadline()
            self._is_told = self._is_told or number == signal.SIGTERM
            if number == signal.SIGINT:
                self._interrupts += 1
                if self._interrupts > 1:
                    number = signal.SIGKILL
            self._send(number)

    def _set_deadline(self) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + self._grace_seconds

    def _send(self, number: int) -> None:
        for host in self.hosts:
            host.send(number)


def launch(arguments: argparse.Namespace) -> int:
    hosts, devices = arguments.hosts, arguments.devices_per_host
    if not arguments.command:
        raise UsageError("launch needs a command: launch --hosts 2 -- python train.py")
    from datarax_dist.testing.launcher import free_port

    port = free_port()
    lock = threading.Lock()
    job = _Job(arguments.grace)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, job.on_signal) for number in numbers}
    sys.stdout.flush()
    try:
        for index in range(hosts):
            env = _host_environment(index, hosts, devices, port)
            try:
                job.hosts.append(_Host(index, arguments.command, env, lock))
            except OSError as error:
                note(f"cannot start {arguments.command[0]!r}: {error.strerror}")
                return FAILED
        return job.run()
    finally:
        job.stop()
        for number, handler in before.items():
            signal.signal(number, handler)
