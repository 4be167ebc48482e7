"""Computations of all hosts' devices in the middle of a restore, in which they pass arrays on.

Nothing can end one: where a host does not begin it, or dies in it, the others stay in it, and what
they compute next is paired with whatever comes, without an error. So it runs on a thread of its
own, beside the one that waits for the other hosts; and before each one hosts agree that all begin
it, or none.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from datarax_dist.errors import CheckpointError, PeerError, PeerLostError
from datarax_dist.hosts import HostGroup, Operation, is_unheard

__all__ = ["GATHER", "Gathering", "Together", "raise_if_stuck"]

# What a computation is to be made within: entering it waits until all hosts are ready for it.
Together = Callable[[], contextlib.AbstractContextManager[None]]

GATHER = "gather"
_BEACONS_SECONDS = 5.0  # until a beacon that has stood still is known to have
_LATE_SECONDS = 2.0
_STUCK = (
    "A computation of all hosts' devices, which a restore had begun when it failed, has not ended"
    " well, as far as this host knows. Others would be paired with it, and give wrong results"
    " without an error, those of the training, too. Start this job again, all of its hosts."
)


class _Computation:
    """A computation of all hosts' devices, and the agreement on it."""

    def __init__(self, agreement: Operation) -> None:
        self.agreement = agreement
        self.has_ended = False


class Gathering:
    """What a restore has all hosts' devices compute.

    Args:
        operation: the agreement on all of it.
        deadline: for each host, by the clock of `operation`.
        silence_seconds: after which a host that shows no sign of life is known to have gone.
    """

    def __init__(
        self, group: HostGroup, operation: Operation, deadline: float, silence_seconds: float
    ) -> None:
        self._group = group
        self._operation = operation
        self._deadline = deadline
        self._patience = silence_seconds + _BEACONS_SECONDS
        self._is_over = threading.Event()  # nobody waits for it any more
        self._why: BaseException = CheckpointError("the restore has failed before.")
        self._last: _Computation | None = None
        self._changed = threading.Condition()
        self._computes = False

    def run(self, gather: Callable[[Together], None]) -> None:
        """Makes the computations. On a thread of its own."""
        try:
            gather(self._together)
        except BaseException as error:
            # When one host dies in it, it fails on others at once. Which one it was is known when
            # its beacon has stood still for long enough, and that is the better error.
            if not self._computes or not self._is_over.wait(self._patience):
                is_own = not isinstance(error, PeerError) or is_unheard(error)
                self._operation.fail(GATHER, error, is_own=is_own)
        else:
            self._say_that_all_is_done()

    def _say_that_all_is_done(self) -> None:
        try:
            self._operation.contribute(GATHER, None)
        except PeerLostError as error:
            if not self._is_over.is_set():
                self._operation.fail(GATHER, error)
        except ValueError:  # too late, the restore is over
            pass

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        with self._operation.part(GATHER) as agreement:
            computation = self._last = _Computation(agreement)
            if self._is_over.is_set():  # asked after it was said: see `give_up`
                agreement.fail(GATHER, self._why)
            else:
                agreement.contribute(GATHER, None)
                if self._group.is_primary:
                    agreement.lead(GATHER, lambda rows: None, self._deadline, together=True)
            agreement.result(GATHER, self._deadline)
        self._computes = True
        yield
        self._computes = False
        with self._changed:
            computation.has_ended = True
            self._changed.notify_all()

    def end(self) -> None:
        """Takes note that all of it has ended on all hosts."""
        self._is_over.set()

    def give_up(self, error: BaseException) -> None:
        """Takes note that the restore has failed with an error: what hosts have not agreed on yet
        none of them begins any more. Where they have, the error is told what that means.
        """
        self._why = error
        self._is_over.set()
        last = self._last  # a later one sees that it is over
        if last is None or last.has_ended:
            return
        _left.append(self)  # whatever cuts this short: a second Ctrl-C, say
        if not last.agreement.stop(GATHER, error):
            with self._changed:  # another one may have failed that ended it a little earlier
                self._changed.wait_for(lambda: last.has_ended, _LATE_SECONDS)
            if not last.has_ended:
                error.add_note(_STUCK)
                return
        _forget(self)

    def is_stuck(self) -> bool:
        """Whether a computation was agreed on when this was given up, and has not ended here; also
        where it is still not known whether it was.
        """
        last = self._last
        if last is None or last.has_ended:
            return False
        return not last.agreement.stop(GATHER, self._why)


_left: list[Gathering] = []


def _forget(gathering: Gathering) -> None:
    with contextlib.suppress(ValueError):  # a call on another thread has
        _left.remove(gathering)


def raise_if_stuck() -> None:
    """Raises when a restore that has failed has left a computation of all hosts' devices."""
    for gathering in tuple(_left):
        if gathering.is_stuck():
            raise CheckpointError(_STUCK)
        _forget(gathering)
