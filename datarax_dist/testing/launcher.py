"""Runs a function on several real ``jax.distributed`` CPU processes of this machine.

The protocol between the launcher (parent) and one host (child):

1. The parent writes what to call, as a pickle file, and starts the child in a session of its own.
2. The child joins ``jax.distributed`` when there is more than one host, and calls the target.
3. The child writes its value, or its error, to a file that appears whole or not at all, and waits.
4. When every host has written or ended, the parent closes the children's standard inputs, that of
   the coordinator (host 0) last. Each child then leaves at once.

The wait in step 3 stands in for ``jax.distributed.shutdown``, whose barrier would hang when a host
has died, and whose absence on the coordinator would abort the hosts that still run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import faulthandler
import importlib
import importlib.util
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["HostError", "HostResult", "free_port", "run_hosts"]

_POLL_SECONDS = 0.02
_PORTS = (15_000, 32_000)
_LEAVE_SECONDS = 10.0
_TAIL_CHARACTERS = 4000
_HEARTBEAT_TIMEOUT_SECONDS = 100
_MAIN_ALIAS = "__datarax_dist_main__"
_STACKS_SIGNAL = signal.SIGUSR2
_CHILD_CODE = (
    "import sys; from datarax_dist.testing.launcher import _child_main; _child_main(sys.argv[1])"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HostError:
    """An exception that the target raised on one host.

    Attributes:
        type_name: Name of the exception's class, without its module.
        message: ``str()`` of the exception.
        traceback: The formatted traceback, causes included.
    """

    type_name: str
    message: str
    traceback: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HostResult:
    """What one host did.

    Attributes:
        host: Index of the host, equal to its ``jax.process_index()``.
        value: What the target returned; None when it raised or the host died.
        error: What the target raised; None when it returned or the host died.
        exit_code: 0 after a return, 1 after an exception, the negative signal number when killed.
        output: What the host wrote to standard output and standard error, in order.
    """

    host: int
    value: Any
    error: HostError | None
    exit_code: int
    output: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """What a child is told to do; the arguments are pickled apart, to be read after the target."""

    module: str
    file: str | None
    qualname: str
    args: bytes
    host: int
    hosts: int
    coordinator: str
    search_path: tuple[str, ...]


class _Child:
    """One started host, as the parent sees it."""

    def __init__(
        self, host: int, folder: Path, env: Mapping[str, str], prefix: Sequence[str]
    ) -> None:
        self.host = host
        self._folder = folder
        with (folder / "output").open("wb") as output:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, "-c", _CHILD_CODE, str(folder)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(env),
                start_new_session=True,
            )

    def exit_status(self) -> int | None:
        """Returns None while the process runs, and 0 when it ended well.

        The process is not reaped, so that its id, and that of its group, stay ours.
        """
        if self._process.returncode is not None:
            return self._process.returncode
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        ended = os.waitid(os.P_PID, self._process.pid, flags)
        return None if ended is None else ended.si_status

    def done(self) -> bool:
        written = (self._folder / "value").exists() or (self._folder / "error").exists()
        return written or self.exit_status() is not None

    def failed(self) -> bool:
        return (self._folder / "error").exists() or self.exit_status() not in (None, 0)

    def release(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def dump_stacks(self) -> None:
        if self.exit_status() is None:
            os.kill(self._process.pid, _STACKS_SIGNAL)

    def kill(self) -> int:
        """Kills what is left of the host's process group; returns the host's exit code."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self.release()
        return self._process.wait()

    def output(self) -> str:
        return (self._folder / "output").read_text(encoding="utf-8", errors="replace")

    def result(self) -> HostResult:
        exit_code = self.kill()
        value: Any = None
        error: HostError | None = None
        if (self._folder / "value").exists():
            value = pickle.loads((self._folder / "value").read_bytes())
        elif (self._folder / "error").exists():
            error = pickle.loads((self._folder / "error").read_bytes())
        return HostResult(
            host=self.host, value=value, error=error, exit_code=exit_code, output=self.output()
        )


def free_port() -> int:
    """Returns a TCP port of the loopback interface that nothing listened on a moment ago.

    Not one of those that the system gives to outgoing connections: between this call and the
    listener's start, another process might be given it.
    """
    for port in random.sample(range(*_PORTS), 200):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(errno.EADDRINUSE, f"no free port found in {_PORTS[0]} to {_PORTS[1]}")


def run_hosts(
    target: Callable[..., Any],
    hosts: int,
    *,
    devices_per_host: int = 1,
    args: Sequence[Any] = (),
    timeout_seconds: float = 120.0,
    grace_seconds: float = 15.0,
    env: Mapping[str, str] | None = None,
    prefixes: Sequence[Sequence[str]] = (),
    address: str = "127.0.0.1",
) -> list[HostResult]:
    """Runs ``target(*args)`` on ``hosts`` real processes and returns what each of them did.

    With more than one host the processes form one ``jax.distributed`` job over loopback, on CPU
    devices. A host that has finished stays connected until all have finished or died, so that an
    early return is not seen by the others as a failure.

    Host 0 runs the coordination service, as in a real job: when it dies, JAX aborts the other hosts
    soon after: their exit code is then ``-SIGABRT``, even beside a value already written.

    Args:
        target: A function defined at the top level of an importable module, of a test file, or of
            a script. A script must guard its own call with ``if __name__ == "__main__"``.
        hosts: Number of processes, at least 1. One process does not use ``jax.distributed``.
        devices_per_host: Number of CPU devices in each process.
        args: Arguments, the same for every host. They and the value returned must be picklable.
        timeout_seconds: Limit for the whole run.
        grace_seconds: How long the other hosts may go on once one has raised or died; those that
            still run are then killed, and their exit code is ``-SIGKILL``.
        env: Variables to set on top of this process's environment, for every host.
        prefixes: For each host, what to write before the command that starts it, to place it in a
            namespace of its own say: ``["ip", "netns", "exec", "host0"]``. It must replace itself
            with the command, which is how signals reach the host.
        address: Of host 0, as all hosts reach it.

    Returns:
        One result for each host, in the order of their indices.

    Raises:
        TimeoutError: The run took longer than ``timeout_seconds``. Every process started was
            killed; the message ends with each host's last output and its stacks.
        ValueError: A count is below 1, there are prefixes but not one for each host, or the target
            is not a module-level function.

    Example:
        >>> import os
        >>> from datarax_dist.testing import run_hosts
        >>> [result.value for result in run_hosts(os.path.basename, 2, args=("a/b",))]
        ['b', 'b']
    """
    if hosts < 1 or devices_per_host < 1:
        raise ValueError(f"hosts and devices_per_host must be >= 1: {hosts}, {devices_per_host}")
    if prefixes and len(prefixes) != hosts:
        raise ValueError(f"{len(prefixes)} prefixes were given for {hosts} hosts")
    module, file, qualname = _describe_target(target)
    coordinator = f"{address}:{free_port()}"
    child_env = _child_environment(devices_per_host, env)
    deadline = time.monotonic() + timeout_seconds

    with tempfile.TemporaryDirectory(prefix="datarax_dist_hosts_") as root:
        children: list[_Child] = []
        try:
            pickled_args = pickle.dumps(tuple(args))
            for host in range(hosts):
                folder = Path(root, str(host))
                folder.mkdir()
                call = _Call(
                    module=module,
                    file=file,
                    qualname=qualname,
                    args=pickled_args,
                    host=host,
                    hosts=hosts,
                    coordinator=coordinator,
                    search_path=tuple(os.path.abspath(entry) for entry in sys.path),
                )
                (folder / "call").write_bytes(pickle.dumps(call))
                prefix = prefixes[host] if prefixes else ()
                children.append(_Child(host, folder, child_env, prefix))
            _await_hosts(children, deadline, timeout_seconds, grace_seconds)
            _release_hosts(children)
            return [child.result() for child in children]
        finally:
            for child in children:
                child.kill()


def _await_hosts(
    children: Sequence[_Child], deadline: float, timeout_seconds: float, grace_seconds: float
) -> None:
    """Returns when every host is done, or when the grace after the first failure is over."""
    grace_ends: float | None = None
    while not all(child.done() for child in children):
        now = time.monotonic()
        if grace_ends is None and any(child.failed() for child in children):
            grace_ends = now + grace_seconds
        if grace_ends is not None and now >= grace_ends:
            for child in children:
                if not child.done():
                    child.dump_stacks()
            time.sleep(0.3)
            return
        if now >= deadline:
            missing = [child.host for child in children if not child.done()]
            for child in children:
                if not child.done():
                    child.dump_stacks()
            time.sleep(0.3)
            for child in children:
                child.kill()
            tails = "\n".join(
                f"--- host {child.host}:\n{child.output()[-_TAIL_CHARACTERS:]}"
                for child in children
            )
            raise TimeoutError(
                f"hosts {missing} of {len(children)} did not finish in {timeout_seconds:g} s\n"
                f"{tails}"
            )
        time.sleep(_POLL_SECONDS)


def _release_hosts(children: Sequence[_Child]) -> None:
    """Lets the hosts leave, the coordinator last: its end aborts those still connected."""
    for group in (children[1:], children[:1]):
        for child in group:
            if child.done():
                child.release()
            else:
                child.kill()
        leave_by = time.monotonic() + _LEAVE_SECONDS
        while any(child.exit_status() is None for child in group):
            if time.monotonic() >= leave_by:
                break
            time.sleep(_POLL_SECONDS)


def _describe_target(target: Callable[..., Any]) -> tuple[str, str | None, str]:
    """Returns the module, its file if it has one, and the name under which to find the target."""
    name: str | None = getattr(target, "__module__", None)
    qualname: str | None = getattr(target, "__qualname__", None)
    if name is None or qualname is None or "<" in qualname:
        raise ValueError(f"the target must be a module-level function, not {target!r}")
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if name == "__main__":
        if file is None:
            raise ValueError("a target defined in an interactive session has no file to import")
        # A child names the classes of this script by the alias when it pickles its value.
        sys.modules[_MAIN_ALIAS] = sys.modules["__main__"]
    return name, None if file is None else os.path.abspath(file), qualname


def _child_environment(devices: int, extra: Mapping[str, str] | None) -> dict[str, str]:
    env = dict(os.environ)
    package_root = str(Path(__file__).resolve().parents[2])
    inherited = env.get("PYTHONPATH")
    env["PYTHONPATH"] = os.pathsep.join([package_root, *([inherited] if inherited else [])])
    env["PYTHONUNBUFFERED"] = "1"
    env["JAX_PLATFORMS"] = "cpu"
    flags = re.sub(
        r"--xla_force_host_platform_device_count=\S*", "", env.get("XLA_FLAGS", "")
    ).split()
    env["XLA_FLAGS"] = " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"])
    env.update(extra or {})
    return env


def _child_main(folder_name: str) -> None:
    """Runs in the child: calls the target, writes what came of it, waits to be let go, leaves."""
    faulthandler.enable()
    faulthandler.register(_STACKS_SIGNAL, all_threads=True)
    folder = Path(folder_name)
    finished = threading.Event()
    released = threading.Event()

    def watch_parent() -> None:
        os.read(0, 1)
        if not finished.is_set():
            # The parent has died: nobody would end this host, nor what it started.
            os.killpg(os.getpgrp(), signal.SIGKILL)
        released.set()

    threading.Thread(target=watch_parent, name="datarax_dist-parent-watch", daemon=True).start()

    exit_code = 0
    name = "value"
    try:
        payload = pickle.dumps(_call_target(pickle.loads((folder / "call").read_bytes())))
    except BaseException as exc:
        traceback.print_exc()
        exit_code = 1
        name = "error"
        payload = pickle.dumps(
            HostError(
                type_name=type(exc).__name__, message=str(exc), traceback=traceback.format_exc()
            )
        )
    partial = folder / "partial"
    partial.write_bytes(payload)
    sys.stdout.flush()
    sys.stderr.flush()
    finished.set()
    partial.rename(folder / name)
    released.wait()
    # Not sys.exit: the exit handlers of jax.distributed wait for hosts that may have died.
    os._exit(exit_code)


def _call_target(call: _Call) -> Any:
    sys.path.extend(entry for entry in call.search_path if entry not in sys.path)
    if call.hosts > 1:
        import jax

        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            coordinator_address=call.coordinator,
            num_processes=call.hosts,
            process_id=call.host,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_SECONDS,
        )
    target: Any = _import_target_module(call.module, call.file)
    for part in call.qualname.split("."):
        target = getattr(target, part)
    return target(*pickle.loads(call.args))


def _import_target_module(name: str, file: str | None) -> ModuleType:
    """Imports by name where that finds the same file, and by path otherwise."""
    if file is None:
        return importlib.import_module(name)
    if name != "__main__":
        with contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(name)
            if spec is not None and (spec.origin is None or _same_file(spec.origin, file)):
                return importlib.import_module(name)
    sys.path.insert(0, str(Path(file).parent))
    loaded_name = _MAIN_ALIAS if name == "__main__" else name
    spec = importlib.util.spec_from_file_location(loaded_name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {file}", name=name, path=file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[loaded_name] = module
    if name == "__main__":
        # The parent's pickles name the script's classes by __main__.
        sys.modules["__main__"] = module
    spec.loader.exec_module(module)
    return module


def _same_file(first: str, second: str) -> bool:
    return os.path.exists(first) and os.path.exists(second) and os.path.samefile(first, second)
