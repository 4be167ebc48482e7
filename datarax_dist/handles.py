"""What the caller of `save` holds: how the save ended, or where it is."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass

from datarax_dist.errors import InvalidArgumentError, PeerLostError, describe
from datarax_dist.request import SaveReport
from datarax_dist.telemetry import Phases

__all__ = ["Progress", "SaveHandle"]

logger = logging.getLogger("datarax_dist")


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a save is on this host: its phase, and the seconds of each earlier one."""

    step: int
    phase: str
    seconds: Mapping[str, float]


class SaveHandle:
    """A save that goes on in the background. Its outcome is the same on every host; but one that
    cannot reach the others has an error, and cannot know whether the step is committed.
    """

    def __init__(self, step: int, phases: Phases) -> None:
        self.step = step
        self._phases = phases
        self._future: Future[SaveReport] = Future()
        self._settling = threading.Lock()
        self._seen = False
        self._process = os.getpid()

    def done(self) -> bool:
        """Whether the outcome is known."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> SaveReport:
        """Waits for the outcome, at most `timeout` seconds.

        Raises:
            PeerError: the save failed, on this host or another one; the same on every host.
            TimeoutError: it is not known yet; the save goes on.
            InvalidArgumentError: it goes on in the process that this one was forked from.
        """
        if os.getpid() != self._process and not self._future.done():
            raise InvalidArgumentError(
                f"The save of step {self.step} goes on in the process {self._process}; this is"
                f" {os.getpid()}, forked from it, and does not hear of it."
            )
        try:
            return self._future.result(timeout)
        except BaseException as error:
            # Not for a timeout of the caller's own, even if the save has failed in the same moment.
            if self._future.done() and error is self._future.exception():
                self._seen = True
            elif type(error) is TimeoutError and timeout is not None:
                raise TimeoutError(
                    f"Step {self.step} is still being saved, in phase {self._phases.current}, after"
                    f" the {timeout:g} s that were given to result(). Ask again, or wait without a"
                    " timeout."
                ) from None
            raise

    def progress(self) -> Progress:
        """Says where the save is on this host."""
        return Progress(self.step, self._phases.current, dict(self._phases.seconds))

    def _settle(
        self, *, report: SaveReport | None = None, error: BaseException | None = None
    ) -> None:
        """The first outcome stands: the worker and the watcher both bring one. But who could not
        reach the others for a while may hear afterwards that all is well.
        """
        with self._settling:
            if self._future.done():
                told = self._future.exception()
                if report is None or not isinstance(told, PeerLostError):
                    return
                logger.warning(
                    "step %d is committed after all, though: %s", self.step, describe(told)
                )
                self._future = Future()
            if report is not None:
                self._future.set_result(report)
            else:
                self._future.set_exception(error)

    def _unseen_error(self) -> BaseException | None:
        return None if self._seen or not self._future.done() else self._future.exception()
