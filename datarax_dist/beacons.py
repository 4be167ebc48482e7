"""Signs of life: which hosts have shown none for a while, long before any deadline.

Each host writes a counter to the board about every second, on a thread of its own; the primary
reads all of them, the others that of host 0. A host whose counter stands still is *silent*: it was
killed, stopped, cut off, or holds the interpreter's lock. So is host 0 when the board itself does
not answer, since its service runs there.

Time is counted while this process runs and, for the others, while the board answers. So a host that
was stopped or cut off itself, and goes on, does not take all others for silent.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from datarax_dist.clock import Clock, SystemClock
from datarax_dist.errors import describe

__all__ = ["Beacons", "Silence"]

logger = logging.getLogger("datarax_dist")

_INTERVAL_SECONDS = 1.0
_HOSTS_PER_SECOND = 2000  # of thousands of hosts each writes less often


@dataclass(frozen=True, slots=True)
class Silence:
    """A host without a sign of life.

    Attributes:
        seconds: for how long.
        name: its machine and process, where it has told them.
        cut_off: whether it is the board that does not answer.
    """

    seconds: float
    name: str = ""
    cut_off: bool = False


class Beacons:
    """The beacons of a job, as one host sees them.

    Args:
        send: writes this host's beacon. It may hang, as long as it likes.
        receive: returns the beacons of the hosts that are watched. It may hang, too.
    """

    def __init__(
        self,
        send: Callable[[str], None],
        receive: Callable[[], Mapping[int, str]],
        index: int,
        count: int,
        *,
        clock: Clock | None = None,
    ) -> None:
        self._send, self._receive = send, receive
        self._index = index
        self._interval = max(_INTERVAL_SECONDS, count / _HOSTS_PER_SECOND)
        self._longest_gap = 2 * self._interval
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._looked = self._clock.monotonic()
        self._awake = 0.0
        self._answered = 0.0  # when the board did so last
        self._watched = 0.0  # how long the others have been watched
        self._seen: dict[int, tuple[str, float]] = {}
        self._number = 0
        self._is_stopped = threading.Event()

    def start(self) -> None:
        """Sends and receives from here on, until it is stopped, or the process ends."""
        threading.Thread(target=self._run, name="datarax_dist-beacon", daemon=True).start()

    def stop(self) -> None:
        """Sends and receives nothing any more: what this host was a part of is over."""
        self._is_stopped.set()

    def _run(self) -> None:
        while not self._is_stopped.is_set():
            self.exchange()
            self._clock.sleep(self._interval)

    def exchange(self) -> None:
        """Sends once, and receives once."""
        self._number += 1
        try:
            self._send(f"{self._number} {socket.gethostname()} {os.getpid()}")
            received = self._receive()
        except Exception as error:  # it is tried again; `silent` tells when that takes too long
            logger.debug("no beacon could be sent: %s", describe(error))
            return
        now = self._time()
        with self._lock:
            self._watched += min(now - self._answered, self._longest_gap)
            self._answered = now
            for host, text in received.items():
                if host not in self._seen or self._seen[host][0] != text:
                    self._seen[host] = (text, self._watched)

    def silent(self, seconds: float) -> dict[int, Silence]:
        """Returns the hosts that have shown no sign of life for so many seconds. One that has never
        shown any is not among them: it may not have begun.
        """
        now = self._time()
        with self._lock:
            if (gap := now - self._answered) > seconds:
                return {0: Silence(gap, self._name(0), cut_off=True)}
            return {
                host: Silence(self._watched - since, self._name(host))
                for host, (_, since) in self._seen.items()
                if host != self._index and self._watched - since > seconds
            }

    def _name(self, host: int) -> str:
        if host not in self._seen:
            return ""
        _, machine, pid = self._seen[host][0].split(" ", 2)
        return f"{machine}, process {pid}"

    def _time(self) -> float:
        """Seconds that this process was awake, as far as it has looked at the clock."""
        with self._lock:
            now = self._clock.monotonic()
            self._awake += min(now - self._looked, self._longest_gap)
            self._looked = now
            return self._awake
