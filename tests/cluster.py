"""A cluster in one machine: each host of a job in a network namespace of its own, on a bridge.

    with cluster(2) as net, Stage() as stage, net.start(target, (stage.path, ...)) as job:
        paused = stage.wait("paused", host=1)     # the host waits at a phase until it is let go
        net.cut(1)
        paused.go()

The bridge has a namespace of its own, too, so nothing is left on this machine but namespaces; their
names carry the process that made them, and those of processes that are gone are removed before new
ones are made. Hosts and test talk through a socket in the file system, which no network reaches:
what is awaited there is an event, never a time.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from datarax_dist import telemetry
from datarax_dist.testing import HostResult, run_hosts

_NAMES = "datarax-dist"
_numbers = itertools.count(1)


class Unavailable(Exception):
    """This machine does not let us do it; says why."""


def run(*command: str) -> str:
    """Runs a command of the system; returns what it wrote.

    Raises:
        Unavailable: it is not there, or failed.
    """
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        raise Unavailable(f"there is no `{command[0]}` here") from None
    if ended.returncode:
        raise Unavailable(f"`{' '.join(command)}` failed: {ended.stderr.strip()}")
    return ended.stdout


def new_name() -> str:
    """Returns a name that says whose it is."""
    return f"{_NAMES}-{os.getpid()}-{next(_numbers)}"


def is_stale(name: str) -> bool:
    """Whether a name was given by `new_name` in a process that is gone."""
    found = re.match(rf"{_NAMES}-([0-9]+)-", name)
    if found is None:
        return False
    try:
        state = Path("/proc", found[1], "stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state in "ZX"  # killed, and held up by a disk that stalls


class Cluster:
    """Hosts 0 to n-1, at 10.77.0.1 and up."""

    def __init__(self, name: str, count: int) -> None:
        self._name = name
        self.count = count
        self._switch = f"{name}-switch"

    def _set_up(self) -> None:
        run("ip", "netns", "add", self._switch)
        run("ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", self._switch, "link", "set", "bridge", "up")
        for host in range(self.count):
            namespace, port = self._namespace(host), f"port{host}"
            run("ip", "netns", "add", namespace)
            run(
                *("ip", "link", "add", port, "netns", self._switch, "type", "veth"),
                *("peer", "name", "eth0", "netns", namespace),
            )
            run("ip", "-n", self._switch, "link", "set", port, "master", "bridge", "up")
            run("ip", "-n", namespace, "link", "set", "lo", "up")
            run("ip", "-n", namespace, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
            run("ip", "-n", namespace, "link", "set", "eth0", "up")
            run(*self.prefix(host), "true")

    def _tear_down(self) -> None:
        for name in (self._switch, *(self._namespace(host) for host in range(self.count))):
            with contextlib.suppress(Unavailable):
                run("ip", "netns", "delete", name)

    def _namespace(self, host: int) -> str:
        return f"{self._name}-host{host}"

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    def prefix(self, host: int) -> list[str]:
        """Returns what starts a command on a host.

        Its name is its address: JAX's collectives ask the system for the address of its name.
        """
        rename = 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"'
        return [
            *("nsenter", f"--net=/run/netns/{self._namespace(host)}"),
            *("unshare", "--uts", "sh", "-c", rename, self.address(host)),
        ]

    def cut(self, host: int) -> None:
        """Pulls the cable out of the switch."""
        run("ip", "-n", self._switch, "link", "set", f"port{host}", "down")

    def heal(self, host: int) -> None:
        run("ip", "-n", self._switch, "link", "set", f"port{host}", "up")

    @contextlib.contextmanager
    def start(
        self, target: Callable[..., Any], args: Sequence[Any], **keywords: Any
    ) -> Iterator[Job]:
        """Runs `target(*args)` on every host, see `run_hosts`."""
        prefixes = [self.prefix(host) for host in range(self.count)]
        with start_hosts(
            target, self.count, args, prefixes=prefixes, address=self.address(0), **keywords
        ) as job:
            yield job


@contextlib.contextmanager
def cluster(count: int) -> Iterator[Cluster]:
    """Makes a cluster, and removes it.

    Raises:
        Unavailable: this machine does not allow it.
    """
    for name in run("ip", "netns", "list").split():
        if is_stale(name):
            with contextlib.suppress(Unavailable):  # another process was faster
                run("ip", "netns", "delete", name)
    made = Cluster(new_name(), count)
    try:
        made._set_up()
        yield made
    finally:
        made._tear_down()


class Job:
    """What `run_hosts` runs on a thread of its own."""

    def __init__(self, call: Callable[[], list[HostResult]]) -> None:
        self._pool = ThreadPoolExecutor(1, "cluster-job")
        self._future = self._pool.submit(call)

    def results(self) -> list[HostResult]:
        return self._future.result()


@contextlib.contextmanager
def start_hosts(
    target: Callable[..., Any], hosts: int, args: Sequence[Any], **keywords: Any
) -> Iterator[Job]:
    """Runs `run_hosts` beside the test. What still runs when the test leaves is killed."""
    job = Job(lambda: run_hosts(target, hosts, args=args, **keywords))
    try:
        yield job
    finally:
        # Only after a test that failed does anything run here; the launcher reaps it.
        if not job._future.done():
            for pid in _descendants(os.getpid(), "_child_main"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        job._pool.shutdown(wait=True)


def _descendants(parent: int, command: str) -> list[int]:
    """Returns the children of a process whose command line has `command` in it."""
    found = []
    for task in Path(f"/proc/{parent}/task").iterdir():
        with contextlib.suppress(OSError):
            for pid in (task / "children").read_text().split():
                if command in Path(f"/proc/{pid}/cmdline").read_bytes().decode():
                    found.append(int(pid))  # noqa: PERF401 (what is found before an error counts)
    return found


class Visit:
    """A host that has come to the stage and, if it said so, waits there."""

    def __init__(self, connection: socket.socket, facts: dict[str, Any]) -> None:
        self._connection = connection
        self.facts = facts

    def go(self) -> None:
        """Lets the host go on."""
        with contextlib.suppress(OSError):  # it is dead
            self._connection.sendall(b"go\n")


class Stage:
    """Where hosts say what they do, and wait for the test to act. Times are `time.monotonic()`,
    which all processes of a machine share.
    """

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="stage-")
        self.path = os.path.join(self._folder, "s")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen()
        self._news = threading.Condition()
        self._visits: list[Visit] = []
        self._thread = threading.Thread(target=self._listen, name="stage", daemon=True)

    def __enter__(self) -> Stage:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        shutil.rmtree(self._folder)

    def _listen(self) -> None:
        unread: dict[socket.socket, bytes] = {}
        while True:
            ready, _, _ = select.select([self._listener, *unread], [], [])
            for connection in ready:
                if connection is self._listener:
                    try:
                        unread[self._listener.accept()[0]] = b""
                    except OSError:  # the test has ended
                        for left in unread:
                            left.close()
                        self._listener.close()
                        return
                    continue
                try:
                    data = connection.recv(65536)
                except ConnectionResetError:
                    data = b""
                if data:
                    unread[connection] += data
                    if unread[connection].endswith(b"\n"):
                        self._told(Visit(connection, json.loads(unread[connection])))
                    continue
                told = json.loads(unread.pop(connection) or b"{}")
                connection.close()
                if told.get("event") == "up":
                    facts = {"event": "gone", "host": told["host"], "at": time.monotonic()}
                    self._told(Visit(connection, facts))

    def _told(self, visit: Visit) -> None:
        with self._news:
            self._visits.append(visit)
            self._news.notify_all()

    def wait(self, *events: str, until: float, **facts: Any) -> Visit | None:
        """Returns the first of `events` with these facts (its `host`, say), or the news that the
        host is gone; None when there is neither at `until`.
        """

        def fits(told: dict[str, Any]) -> bool:
            wanted = {"host": facts["host"]} if told["event"] == "gone" else facts
            return told["event"] in (*events, "gone") and wanted.items() <= told.items()

        def found() -> Visit | None:
            return next((visit for visit in self._visits if fits(visit.facts)), None)

        with self._news:
            return self._news.wait_for(found, max(0.0, until - time.monotonic()))


_lines: list[socket.socket] = []


def tell(path: str, event: str, host: int, *, wait: bool = False, **facts: Any) -> None:
    """On a host: says what it does; with `wait`, returns when the test says so (or is gone)."""
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    line.connect(path)
    facts |= {"event": event, "host": host, "pid": os.getpid(), "at": time.monotonic()}
    line.sendall(json.dumps(facts).encode() + b"\n")
    if wait:
        line.recv(16)
        line.close()
    else:
        _lines.append(line)  # open as long as this process lives: its end is news, too


def tell_once(path: str, event: str, phase: str, host: int, *, wait: bool = False) -> None:
    """In a process that is `host`: tells, when `phase` begins next."""
    told = threading.Lock()

    def sink(name: str, where: int) -> None:
        if name == phase and where == host and told.acquire(blocking=False):
            tell(path, event, host, wait=wait, phase=phase)

    telemetry.observe(sink)
