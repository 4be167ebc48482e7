"""The board: write-once registers that all hosts of a job share, on which `hosts` builds agreement.

On JAX it is the coordination service's key-value store: no device collectives, so it may be used on
any thread. Most calls of its client hang for as long as the service does not answer; here they end.
"""

from __future__ import annotations

import functools
import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from typing import Any, Protocol

from datarax_dist.beacons import Beacons, Silence
from datarax_dist.errors import describe

__all__ = [
    "SILENCE_SECONDS",
    "Board",
    "JaxBoard",
    "LocalBoard",
    "PatientClient",
    "UnreachableError",
]

logger = logging.getLogger("datarax_dist")

SILENCE_SECONDS = 10.0
_SLICE_SECONDS = 1.0


class UnreachableError(Exception):
    """The board does not answer."""

    def __init__(self, message: str, silence: Silence | None = None) -> None:
        super().__init__(message)
        self.silence = silence or Silence(0.0, cut_off=True)


class Board(Protocol):
    """Write-once registers that all hosts of a group share. What cannot be done because the board
    does not answer raises `UnreachableError`, soon.
    """

    @property
    def index(self) -> int: ...

    @property
    def count(self) -> int: ...

    def set(self, key: str, value: str) -> bool:
        """Writes a register; returns False when it was written before (it keeps its value)."""

    def wait(self, key: str, seconds: float) -> str | None:
        """Returns a register's value as soon as it has one, or None after `seconds`."""

    def read(self, prefix: str) -> dict[str, str]:
        """Returns the registers whose key begins with `prefix`, which ends with `/`."""

    def clear(self, prefix: str) -> None: ...

    def silent(self) -> Mapping[int, Silence]:
        """Returns the hosts that have shown no sign of life for too long."""


class LocalBoard:
    """The board of a group that lives in one process: the single host, and simulated ones."""

    def __init__(self, index: int = 0, count: int = 1, *, shared: LocalBoard | None = None) -> None:
        self.index = index
        self.count = count
        # Of keys like `operation/phase/host` all are wanted that have one operation and phase.
        self._values: dict[str, dict[str, str]] = {} if shared is None else shared._values
        self._changed: threading.Condition = (
            threading.Condition() if shared is None else shared._changed
        )

    def set(self, key: str, value: str) -> bool:
        with self._changed:
            rows = self._values.setdefault(key.rpartition("/")[0] + "/", {})
            if key in rows:
                return False
            rows[key] = value
            self._changed.notify_all()
            return True

    def wait(self, key: str, seconds: float) -> str | None:
        with self._changed:
            self._changed.wait_for(lambda: self._get(key) is not None, seconds)
            return self._get(key)

    def _get(self, key: str) -> str | None:
        return self._values.get(key.rpartition("/")[0] + "/", {}).get(key)

    def read(self, prefix: str) -> dict[str, str]:
        with self._changed:
            found = [rows for start, rows in self._values.items() if start.startswith(prefix)]
            return {key: value for rows in found for key, value in rows.items()}

    def clear(self, prefix: str) -> None:
        with self._changed:
            for start in [start for start in self._values if start.startswith(prefix)]:
                del self._values[start]

    def silent(self) -> Mapping[int, Silence]:
        return {}


class PatientClient:
    """The client of JAX's coordination service, most of whose calls hang for as long as the service
    does not answer: until JAX ends the process. Here they end when that was so for a while.
    """

    def __init__(self, client: Any, silence_seconds: float = SILENCE_SECONDS) -> None:
        self._client = client
        self._beacons = _beacons()
        self._silence_seconds = silence_seconds

    def silent(self) -> Mapping[int, Silence]:
        return self._beacons.silent(self._silence_seconds)

    def _call(self, function: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        """Raises `UnreachableError` when the service does not answer."""
        begun: tuple[_Calls, Future[Any]] | None = None
        while True:
            silence = self.silent().get(0)
            if silence is not None and silence.cut_off:
                if begun is not None:
                    calls, call = begun
                    call.cancel()
                    calls.give_up()
                raise UnreachableError("it does not answer", silence)
            if begun is None:
                begun = _Calls.begin(functools.partial(function, *arguments, **more))
            if wait([begun[1]], _SLICE_SECONDS).done:
                return begun[1].result()

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._client, name)
        if not callable(function) or name.startswith(("blocking_", "wait_")):
            return function  # what has a deadline
        return functools.partial(self._call, function)


class JaxBoard:
    """The key-value store of JAX's coordination service. Safe on any thread; uses no device."""

    def __init__(self, namespace: str, silence_seconds: float = SILENCE_SECONDS) -> None:
        from jax._src import distributed

        self._client = PatientClient(distributed.global_state.client, silence_seconds)
        self.index, self.count = _place()
        self._prefix = f"datarax_dist/{namespace}/"

    def set(self, key: str, value: str) -> bool:
        try:
            self._client.key_value_set(self._prefix + key, value)
        except UnreachableError:
            raise
        except Exception as error:
            if "ALREADY_EXISTS" in str(error):
                return False
            raise UnreachableError(str(error)) from error
        return True

    def wait(self, key: str, seconds: float) -> str | None:
        try:
            return str(
                self._client.blocking_key_value_get(self._prefix + key, max(1, int(seconds * 1000)))
            )
        except Exception as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise UnreachableError(str(error)) from error

    def read(self, prefix: str) -> dict[str, str]:
        try:
            rows = self._client.key_value_dir_get(self._prefix + prefix)
        except UnreachableError:
            raise
        except Exception as error:
            raise UnreachableError(str(error)) from error
        return {key[len(self._prefix) :]: value for key, value in rows}

    def clear(self, prefix: str) -> None:
        try:
            self._client.key_value_delete(self._prefix + prefix)
        except Exception as error:  # tidying up; the registers are never used again
            logger.debug("could not clear %s: %s", prefix, describe(error))

    def silent(self) -> Mapping[int, Silence]:
        return self._client.silent()


class _Calls:
    """A thread that makes calls which may hang for ever: one for the process, and another one when
    it hangs. It is a daemon, so that a process whose calls hang can end.
    """

    _current: _Calls | None = None
    _lock = threading.Lock()

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = (
            queue.SimpleQueue()
        )
        threading.Thread(target=self._run, name="datarax_dist-board", daemon=True).start()

    @classmethod
    def begin(cls, work: Callable[[], Any]) -> tuple[_Calls, Future[Any]]:
        """Returns the call, and on whose thread it is."""
        call: Future[Any] = Future()
        with cls._lock:
            calls = cls._current = cls._current or cls()
            calls._queue.put((call, work))
        return calls, call

    @classmethod
    def forget(cls) -> None:
        """In a forked child, which has no such thread."""
        cls._current, cls._lock = None, threading.Lock()

    def give_up(self) -> None:
        """Its thread hangs. When it does not any more, it ends."""
        with self._lock:
            if _Calls._current is self:
                _Calls._current = None
                self._queue.put(None)

    def _run(self) -> None:
        while (told := self._queue.get()) is not None:
            call, work = told
            if not call.set_running_or_notify_cancel():
                continue
            try:
                call.set_result(work())
            except BaseException as error:
                call.set_exception(error)


os.register_at_fork(after_in_child=_Calls.forget)


def _place() -> tuple[int, int]:
    import jax

    return jax.process_index(), jax.process_count()


def _beacons() -> Beacons:
    """The beacons of this process, for all its groups."""
    from jax._src import distributed

    return _beacons_by(distributed.global_state.client)


_sent: list[Beacons] = []  # by the client before


@functools.lru_cache(maxsize=1)  # another client: jax.distributed was shut down, and begun anew
def _beacons_by(client: Any) -> Beacons:
    while _sent:
        _sent.pop().stop()
    index, count = _place()
    prefix = "datarax_dist/beacons/"

    def send(text: str) -> None:
        client.key_value_set(f"{prefix}{index}/at", text, allow_overwrite=True)

    def receive() -> dict[int, str]:
        rows = client.key_value_dir_get(prefix if index == 0 else f"{prefix}0/")
        return {int(key.removeprefix(prefix).split("/")[0]): text for key, text in rows}

    beacons = Beacons(send, receive, index, count)
    beacons.start()
    _sent.append(beacons)
    return beacons
