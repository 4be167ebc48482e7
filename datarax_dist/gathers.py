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
_READY = "ready"
_BEACONS_SECONDS = 5.0  # until a beacon that has stood still is known to have
_LATE_SECONDS = 2.0
_STUCK = (
    "A computation of all hosts' devices, which a restore had begun when it failed, has not ended."
    " Others would be paired with it, and give wrong results without an error, those of the"
    " training, too. Start this job again, all of its hosts."
)


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
        self._asked: list[Operation] = []  # the agreement on each computation
        self._agreed = 0  # how many there are, where it was given up in one
        self._ended = 0
        self._changed = threading.Condition()
        self._computes = False

    @property
    def is_under_way(self) -> bool:
        """Whether a computation has not ended here that was agreed on when it was given up."""
        return self._agreed > self._ended

    def run(self, gather: Callable[[Together], None]) -> None:
        """Makes the computations. On a thread of its own."""
        try:
            gather(self._together)
        except BaseException as error:
            if self._computes:
                # When one host dies in it, it fails on others at once. Which one it was is known
                # when its beacon has stood still for long enough, and that is the better error.
                if not self._is_over.wait(self._patience):
                    self._operation.fail(GATHER, error)
            elif not isinstance(error, PeerError) or is_unheard(error):
                self._operation.fail(GATHER, error)  # else another host has said so
        else:
            # Too late, nobody asks any more; and the other thread finds out, too.
            with contextlib.suppress(PeerLostError, ValueError):
                self._operation.contribute(GATHER, None)

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        with self._operation.part(f"{_READY} {len(self._asked)}") as part:
            self._asked.append(part)
            if self._is_over.is_set():  # asked after it was said: see `give_up`
                part.fail(_READY, CheckpointError("the restore has failed before."))
            else:
                part.contribute(_READY, None)
                if self._group.is_primary:
                    part.lead(_READY, lambda rows: None, self._deadline, together=True)
            part.result(_READY, self._deadline)
        self._computes = True
        yield
        self._computes = False
        with self._changed:
            self._ended += 1
            self._changed.notify_all()

    def end(self) -> None:
        """Takes note that all of it has ended on all hosts."""
        self._is_over.set()

    def give_up(self, error: BaseException) -> None:
        """Takes note that the restore has failed with an error: what hosts have not agreed on yet
        none of them begins any more. Where they have, the error is told what that means.
        """
        self._is_over.set()
        asked = len(self._asked)  # later ones see that it is over
        if asked > self._ended and not self._asked[asked - 1].stop(_READY, error):
            self._agreed = asked
            _left.append(self)
            with self._changed:  # another one may have failed that ended it a little earlier
                is_over = self._changed.wait_for(lambda: not self.is_under_way, _LATE_SECONDS)
            if not is_over:
                error.add_note(_STUCK)


_left: list[Gathering] = []


def raise_if_stuck() -> None:
    """Raises when a restore that has failed has left a computation of all hosts' devices."""
    if any(gathering.is_under_way for gathering in _left):
        raise CheckpointError(_STUCK)
