"""The host-group port: agreement between hosts that carries errors, with a deadline for every wait.

An *operation* is one agreement. Its state is a few write-once registers on a board that all hosts
can reach: one contribution for each host and phase, and one *outcome*. Whoever writes the outcome
first has decided: the primary writes success after it has seen every contribution; any host may
write failure at any time before. So a failure is known everywhere as fast as one register can be
read, success is never announced while a host has failed, and nobody waits for a host that has
already said that it will not come.

    group = HostGroup(board)
    group.exchange("prepare", {"step": 7}, timeout_seconds=60)   # -> every host's payload
    group.exchange("prepare", payload, leader=decide, timeout_seconds=60)   # -> decide(payloads)

Both return the same on every host; the leader runs on the primary only.

Who waits does not wait for the dead: a host whose beacon stands still (`beacons`) is named after
`Options.peer_silence_seconds`, whatever the deadline.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import socket
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from datarax_dist import errors
from datarax_dist.beacons import Silence
from datarax_dist.boards import (
    SILENCE_SECONDS,
    Board,
    JaxBoard,
    LocalBoard,
    UnreachableError,
)
from datarax_dist.clock import Clock, SystemClock
from datarax_dist.errors import CheckpointError, InvalidArgumentError, PeerError, PeerLostError

__all__ = [
    "HostGroup",
    "Operation",
    "current_group",
    "is_unheard",
]

logger = logging.getLogger("datarax_dist")

Leader = Callable[[list[Any]], Any]
Consequence = Callable[[str], str]
_T = TypeVar("_T")
_SLICE_SECONDS = 1.0  # so that Ctrl-C is answered within a second
_CHECK_SECONDS = 0.25  # how soon a primary that waits for a host sees that the operation has failed
_CLOSE = "close"
_TOLD_SECONDS = 30.0  # how soon it is said that hosts are waited for
_PATIENCE_SECONDS = 3.0
_GRACE_SECONDS = 10.0  # how long after a deadline the others wait for the primary to say so
_LATE_SECONDS = 0.5  # and it for itself, where it hangs
_TELL_SECONDS = 0.5


class _AnotherCallError(CheckpointError):
    """An agreement has failed that was about another call: not all hosts have made it, or one that
    others have not. Then what this host calls is one of the next ones.
    """


class HostGroup:
    """All hosts of a job, as one of them sees it. Operations must begin in the same order on every
    host.
    """

    def __init__(
        self, board: Board, *, clock: Clock | None = None, names: Sequence[str] | None = None
    ) -> None:
        self._board = board
        self._clock = clock or SystemClock()
        self._sequence = itertools.count()
        self._lock = threading.RLock()  # a signal handler may call what it has interrupted
        self._open: set[int] = set()
        self._cleared = 0
        self._untold: dict[str, str] = {}  # decisions, until the board has them
        self._siblings: _Siblings | None = None
        self._closed_for = ""
        self._check: Callable[[], None] = lambda: None
        self._left: dict[str, Any] | None = None  # what a host has said that makes no more calls
        self.index = board.index
        self.count = board.count
        self.name = names[board.index] if names else socket.gethostname()

    @property
    def is_primary(self) -> bool:
        return self.index == 0

    def check_job(self) -> None:
        """Raises when this host may make no more calls: it has said why, and told the others, or
        these are not the hosts of the job any more (`InvalidArgumentError`).
        """
        if self._closed_for:
            raise CheckpointError(self._closed_for)
        self._check()

    def begin(
        self,
        name: str,
        *,
        consequence: Consequence = lambda phase: "",
        is_any_call: bool = False,
    ) -> Operation:
        """Begins the next operation. Every host must begin the same ones in the same order, on its
        main thread.

        Args:
            name: what it is, in errors. A host that has missed a call, or has made one alone, is
                known by it: its next call has another name, and passes over the failed one.
            consequence: says in one sentence what a failure in a phase means; the phase is empty
                when the outcome is not known here.
            is_any_call: if it fails here, so does what the others call now, whatever its name.
        """
        number = self._next()
        call = None if is_any_call else name
        return Operation(
            self, self._board, self._clock, number, name, consequence, f"{number}/", call
        )

    def _next(self) -> int:
        number = next(self._sequence)
        with self._lock:
            self._open.add(number)
        return number

    @contextlib.contextmanager
    def in_parts(
        self, name: str, consequence: Consequence = lambda phase: ""
    ) -> Iterator[Operation]:
        """Begins an operation that consists of parts (`exchange(..., within=)`), and ends it. When
        this host cannot go on between two of them, the next one fails on the others.
        """
        operation = self.begin(name, consequence=consequence)
        try:
            yield operation
        except BaseException as error:
            if is_unheard(error) and not operation.is_told:
                with operation.part(name) as part:
                    part.fail(name, error)
            raise
        finally:
            operation.close()

    def _oldest_open(self) -> int:
        with self._lock:
            return min(self._open)

    def _closed(self, number: int) -> None:
        with self._lock:
            self._open.discard(number)

    def _set(self, key: str, row: str) -> bool:
        try:
            return self._board.set(key, row)
        except UnreachableError:  # for a moment only, maybe; and it may have arrived
            return self._board.set(key, row)

    def _tell(self, key: str = "", row: str = "") -> bool:
        """Says what has failed: `row`, and before it what could not be said yet, or the others
        would wait for it. Returns whether `row` is the first decision.
        """
        with self._lock:
            if key:
                self._untold.setdefault(key, row)
            untold = list(self._untold.items())
        stands = False
        for told, decided in untold:
            is_first = self._set(told, decided)
            stands |= is_first and (told, decided) == (key, row)
            with self._lock:
                self._untold.pop(told, None)
        return stands

    def tell(self, seconds: float) -> None:
        """Says what could not be said yet, as soon as the board answers; gives up in the end."""
        deadline = self._clock.monotonic() + seconds
        while self._untold and self._clock.monotonic() < deadline:
            with contextlib.suppress(UnreachableError):
                self._tell()
                return
            self._clock.sleep(_TELL_SECONDS)

    def close(self, why: str = "it has closed its Checkpointer, or has ended.") -> None:
        """Takes note that this host will make no more calls in this group. Who makes one all the
        same is told so, and waits for nobody; and of what could not be said yet.
        """
        if not self._closed_for and self.count > 1:
            self._closed_for = why
            with self.begin(_CLOSE, is_any_call=True).part(_CLOSE) as part:
                part.fail(_CLOSE, CheckpointError(why))
        if self._siblings is not None:
            self._siblings.closed(self)

    def _clear_before(self, number: int) -> None:
        """Forgets the registers that no host will read again. For the primary."""
        with self._lock:
            numbers = range(self._cleared, number)
            self._cleared = max(self._cleared, number)
        for old in numbers:
            self._board.clear(f"{old}/")

    def exchange(
        self,
        phase: str,
        payload: Any = None,
        *,
        error: BaseException | None = None,
        leader: Leader | None = None,
        timeout_seconds: float,
        within: Operation | None = None,
    ) -> Any:
        """Contributes `payload`, or `error`; returns the same result on every host, or raises on
        every host.

        Args:
            phase: its name, in errors.
            payload: JSON.
            error: what this host failed with, instead of a payload.
            leader: runs on the primary with the payloads in host order; what it returns (JSON) is
                the result. Without one the result is the list of payloads. What it raises is raised
                on every host.
            timeout_seconds: how long to wait for the others.
            within: the operation of which this is a part.

        Raises:
            PeerError: a host contributed an error. An error of this module's tree that this host
                contributed itself is raised as it is, and so is whatever it contributed when it is
                the only host.
            PeerLostError: hosts did not arrive; `.missing`.
        """
        if within is None:
            with self.in_parts(phase) as within:
                return self.exchange(
                    phase,
                    payload,
                    error=error,
                    leader=leader,
                    timeout_seconds=timeout_seconds,
                    within=within,
                )
        deadline = self._clock.monotonic() + timeout_seconds
        while True:
            try:
                with within.part(phase) as operation:
                    if self._left is not None:
                        operation.repeat(self._left)
                    elif error is not None:
                        operation.fail(phase, error)
                    else:
                        operation.contribute(phase, payload)
                        if self.is_primary:
                            operation.lead(phase, leader or (lambda payloads: payloads), deadline)
                    return operation.result(phase, deadline, own=error)
            except _AnotherCallError as skipped:
                logger.warning("%s: passed over an agreement that %s", within.name, skipped)
                within.begin_anew(str(skipped))


class Operation:
    """One agreement, as one host sees it."""

    def __init__(
        self,
        group: HostGroup,
        board: Board,
        clock: Clock,
        number: int,
        name: str,
        consequence: Consequence,
        prefix: str,
        call: str | None,
    ) -> None:
        self.name = name
        self._call = call  # the whole of which this may be a part
        self.consequence = consequence
        self._group = group
        self._board = board
        self._clock = clock
        self._number = number
        self._prefix = prefix
        self._parts = 0  # begun
        self._passed_over = ""
        # The others hear from this host that it, or a part of it, has failed; or cannot.
        self.is_told = False
        self._own: BaseException | None = None
        self._decided: str | None = None  # what is kept of it when the board forgets it

    @property
    def _told(self) -> str:
        """What the caller knows it by."""
        return self._call or self.name

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[Operation]:
        """Begins the next part of this operation, an agreement of its own. Every host must begin
        the same parts in the same order.
        """
        part = Operation(
            self._group,
            self._board,
            self._clock,
            self._number,
            name,
            lambda phase: self.consequence(phase and name),
            f"{self._prefix}{self._parts}/",
            self._call,
        )
        part._passed_over = self._passed_over
        self._parts += 1
        try:
            with part.failing(name):
                yield part
        finally:
            self.is_told |= part.is_told

    def begin_anew(self, why: str) -> None:
        """Takes the next number, as this one was another call's."""
        self._passed_over = f" Before, an agreement was passed over that {why}"
        self.close()
        self._number = self._group._next()
        self._prefix, self._parts = f"{self._number}/", 0

    @contextlib.contextmanager
    def failing(self, phase: str) -> Iterator[None]:
        """Says it to the others when this host cannot go on: Ctrl-C, say."""
        try:
            yield
        except BaseException as error:
            if is_unheard(error) and not self.is_told:
                self.fail(phase, error)
            raise

    @property
    def _siblings(self) -> _Siblings | None:
        """What closed groups are cleared by: asked once for each group, in its first operation."""
        return self._group._siblings if self._number == 0 else None

    def contribute(self, phase: str, payload: Any) -> None:
        """Posts this host's payload of a phase, and which older operations it is still in.

        Raises:
            PeerLostError: the board does not answer; so do the other methods.
        """
        row = [self._group._oldest_open(), payload]
        if (siblings := self._siblings) is not None:
            row.append(siblings.oldest())
        with self._reaching(phase):
            self._group._tell()
            self._group._set(f"{self._prefix}{phase}/{self._group.index}", json.dumps(row))

    def close(self) -> None:
        """Says that this host will not ask for this operation again; its registers may go."""
        self._group._closed(self._number)

    def fail(
        self, phase: str, error: BaseException, *, heard: bool = False, is_own: bool = True
    ) -> None:
        """Decides this operation: it failed here. The first decision stands.

        Args:
            heard: all hosts have contributed to it.
            is_own: this host raises that error, if it is one of its own, whoever decides.
        """
        if is_own:
            self._own = error
        cause = error.__cause__
        if cause is not None and isinstance(error, PeerLostError) and not error._is_heard:
            error = cause
        told = errors.encode(error)
        if isinstance(error, UnreachableError):  # of the others it is this host that was
            message = f"it could not reach JAX's coordination service: {_first_line(error)}."
            told = {"type": "CheckpointError", "message": message}
        call = None if heard else self._call
        decided = {"phase": phase, "host": self._group.index, "error": told, "call": call}
        try:
            with self._reaching(phase):
                self.is_told |= self._group._tell(f"{self._prefix}outcome/0", json.dumps(decided))
        except PeerLostError:  # `result` will say so, and it is said as soon as it can be
            if not isinstance(error, Exception):  # Ctrl-C is not kept waiting once more
                self.is_told = True

    def repeat(self, decided: Mapping[str, Any]) -> None:
        """Decides this operation as another one was: a host has gone. All others know that by now,
        or find it here.
        """
        with self._reaching(decided["phase"]):
            self._group._tell(f"{self._prefix}outcome/0", json.dumps(decided))

    def stop(self, phase: str, error: BaseException) -> bool:
        """Decides that it failed, if nothing is decided yet; returns whether it has. Another thread
        of this host that is in it knows it then, whenever it comes to ask.
        """
        if self._decided is None:
            self.fail(phase, error)
            with contextlib.suppress(PeerLostError):  # who knows
                for row in self._read("outcome", phase).values():
                    self._decided = row
        return self._decided is not None and "error" in json.loads(self._decided)

    def succeed(self, result: Any) -> None:
        """Decides this operation: it succeeded. For the primary, after the last phase. Where that
        cannot be said yet it stands all the same, and is said as soon as it can be.
        """
        with self._reaching(""):
            self._group._tell(f"{self._prefix}outcome/0", json.dumps({"result": result}))

    @contextlib.contextmanager
    def _reaching(self, phase: str) -> Iterator[None]:
        try:
            yield
        except UnreachableError as error:
            raise self._out_of_reach(phase, error) from error

    def gather(self, phase: str, deadline: float, *, together: bool = False) -> list[Any]:
        """Returns every host's payload of a phase, in host order. For the primary only.

        Args:
            together: hosts need each other in this phase: one that has gone fails it, though it
                has arrived.

        Raises:
            PeerError: the operation has failed meanwhile.
            PeerLostError: hosts did not arrive, or show no sign of life; this decides the
                operation.
        """
        begin = self._clock.monotonic()
        rows, missing = self._arrived(phase)
        is_told = self._prefix != f"{self._number}/0/"  # that hosts have not made the call
        while missing:
            self.check(phase)
            if not is_told and self._clock.monotonic() - begin > _TOLD_SECONDS:
                is_told = True
                logger.warning(
                    "%s: waiting for %s to make the same call, on the same root; without it, this"
                    " is an error in %.0f s",
                    self._call,
                    _hosts(missing),
                    deadline - self._clock.monotonic(),
                )
            left = deadline - self._clock.monotonic()
            if left <= 0 or self._gone(missing, together):
                rows, missing = self._arrived(phase)  # some may have come since
                gone = self._gone(missing, together)
                if missing and (left <= 0 or gone):
                    seconds = self._clock.monotonic() - begin
                    lost = self._lost(phase, missing, seconds, known=phase, gone=gone)
                    self.fail(phase, lost)
                    raise lost
                continue
            # When the one in the middle has come, so have about half of them, whatever the order:
            # few reads of all rows are enough.
            if self._has_arrived(phase, missing[len(missing) // 2], min(left, _CHECK_SECONDS)):
                rows, missing = self._arrived(phase)
        found = [json.loads(rows[host]) for host in range(self._group.count)]
        self._group._clear_before(min(row[0] for row in found))
        if (siblings := self._siblings) is not None:
            siblings.clear_before(min(row[2] for row in found))
        return [row[1] for row in found]

    def _gone(self, missing: Sequence[int], together: bool) -> list[int]:
        silent = self._board.silent()
        return sorted(host for host in silent if together or host in missing)

    def _arrived(self, phase: str) -> tuple[dict[int, str], list[int]]:
        """Returns what hosts have contributed to a phase, and which have not yet."""
        rows = {int(key.rpartition("/")[2]): row for key, row in self._read(phase, phase).items()}
        return rows, [host for host in range(self._group.count) if host not in rows]

    def await_primary(self, phase: str, deadline: float) -> None:
        """Waits until the primary has contributed to a phase.

        Raises:
            PeerError: the operation has failed meanwhile.
            PeerLostError: the primary did not arrive, or shows no sign of life.
        """
        begin = self._clock.monotonic()
        while not self._has_arrived(phase, 0, _CHECK_SECONDS):
            self.check(phase)
            if self._clock.monotonic() > deadline or 0 in self._board.silent():
                raise self._lost(phase, [0], self._clock.monotonic() - begin, known="")

    def _has_arrived(self, phase: str, host: int, seconds: float) -> bool:
        """Waits a moment for a host's payload."""
        key = f"{self._prefix}{phase}/{host}"
        return self._answer(phase, lambda: self._board.wait(key, seconds)) is not None

    def lead(self, phase: str, leader: Leader, deadline: float, *, together: bool = False) -> None:
        """Gathers a phase, runs `leader` with it and decides. For the primary only; errors are in
        the outcome.
        """
        try:
            payloads = self.gather(phase, deadline, together=together)
            self.check(phase)  # all have come, and some may have gone since
        except PeerError as error:
            if is_unheard(error):
                raise
            return  # decided already
        try:
            self.succeed(leader(payloads))
        except BaseException as error:
            self.fail(phase, error, heard=True)
            if not isinstance(error, Exception):
                raise

    def check(self, phase: str) -> None:
        """Raises when the operation has failed already."""
        known = [] if self._decided is None else [self._decided]
        for value in known or self._read("outcome", phase).values():
            if "error" in (decided := json.loads(value)):
                raise self._error(decided)

    def result(
        self,
        phase: str,
        deadline: float,
        *,
        own: BaseException | None = None,
        late: Callable[[], tuple[str, BaseException]] | None = None,
    ) -> Any:
        """Waits for the decision: a result, or an error, the same on every host.

        Args:
            own: what this host has failed with.
            late: on the primary, what it says at the deadline when it hangs itself: the phase, and
                the error.
        """
        own = own or self._own
        grace = _GRACE_SECONDS if late is None else _LATE_SECONDS
        begin = self._clock.monotonic()
        patience = _PATIENCE_SECONDS if self._group.is_primary else 0.0
        while (value := self._outcome(phase)) is None:
            with contextlib.suppress(UnreachableError):
                self._group._tell()
            now, silent = self._clock.monotonic(), self._board.silent()
            # The primary decides at the deadline; the others leave it a moment to say so.
            is_late = now >= deadline + grace
            if is_late and late is not None:
                phase_now, error = late()
                self.fail(phase_now, error)
                continue
            if not silent and not is_late:
                continue
            if 0 in silent and silent[0].cut_off:
                # Nobody hears what is decided here.
                unreachable = UnreachableError("no answer", silent[0])
                raise self._out_of_reach(phase, unreachable) from own or unreachable
            _, missing = self._arrived(phase)
            if 0 in silent or not silent.keys().isdisjoint(missing):
                # Where the primary waits for that host itself, in `gather`, it can say more.
                patience -= _SLICE_SECONDS
                is_late = is_late or patience <= 0
            if is_late:
                # Who waits here does not know how far the primary is, not even on the primary.
                lost = self._lost(phase, missing, now - begin, known="")
                # From here on nobody can succeed; if somebody has in this moment, that stands.
                self.fail(phase, lost)
        outcome = json.loads(value)
        if "error" not in outcome:
            return outcome.get("result")
        call = outcome.get("call")
        if call is not None and self._call not in (None, call):
            raise _AnotherCallError(f"was about {call}, and failed: {outcome['error']['message']}")
        own = own or self._own  # what another thread of this host has failed with meanwhile
        if own is not None and (
            self._group.count == 1 or not isinstance(own, Exception) or _same_everywhere(own)
        ):
            raise own
        raise self._error(outcome) from own

    def _outcome(self, phase: str) -> str | None:
        """Waits a moment for the decision."""
        if self._decided is not None:
            return self._decided
        key = self._prefix + "outcome/0"
        return self._answer(phase, lambda: self._board.wait(key, _SLICE_SECONDS))

    def _read(self, rows: str, phase: str) -> dict[str, str]:
        prefix = f"{self._prefix}{rows}/"
        return self._answer(phase, lambda: self._board.read(prefix))

    def _answer(self, phase: str, ask: Callable[[], _T]) -> _T:
        with self._reaching(phase):
            try:
                return ask()
            except UnreachableError:  # for a moment only, maybe
                return ask()

    def _error(self, outcome: dict[str, Any]) -> CheckpointError:
        cause = errors.decode(outcome["error"])
        if isinstance(cause, PeerError) or (outcome["host"] == 0 and _same_everywhere(cause)):
            return cause
        host, phase = outcome["host"], outcome["phase"]
        if phase == _CLOSE:
            self._group._left = outcome
        text = outcome["error"]["message"]
        if type(cause) is not CheckpointError:
            text = f"{type(cause).__name__}: {text}"
        told = f"{self._told}: host {host} failed in phase {phase!r}: {text}"
        return PeerError(
            f"{told} {self.consequence(phase)}".rstrip(),
            phase=phase,
            failures={host: text},
        )

    def _lost(
        self,
        phase: str,
        missing: Sequence[int],
        seconds: float,
        *,
        known: str,
        gone: Sequence[int] = (),
    ) -> PeerLostError:
        """Args:
        missing: the hosts that have not arrived; none when host 0 has not decided.
        known: the phase the primary is in, as far as that is known.
        gone: hosts that show no sign of life, if they need not be among the missing.
        """
        silent = self._board.silent()
        there = [host for host in range(self._group.count) if host not in missing]
        told = f"{self._told}: waited {seconds:.0f} s in phase {phase!r}; "
        if missing:
            told += f"arrived: {_hosts(there)}; missing: {_hosts(missing)}."
        else:
            missing = [0]
            told += "all hosts have arrived, and host 0 has not said how it ended."
        if found := [host for host in gone or missing if host in silent]:
            missing = found
            told += f" {_no_sign(silent, found)}"
        else:
            told += (
                f" Look at the logs of {_hosts(missing)}: they are alive, or were a moment ago, and"
                " hang, or did not make the same call, on the same root; or they have never begun."
                f"{self._passed_over}"
            )
        return PeerLostError(
            f"{told} {self.consequence(known)}".rstrip(),
            phase=phase,
            failures={
                host: _silence(silent[host]) if host in silent else "did not arrive"
                for host in missing
            },
            missing=list(missing),
        )

    def _out_of_reach(self, phase: str, error: UnreachableError) -> PeerLostError:
        silence, me = error.silence, self._group.index
        seconds = f"{silence.seconds:.0f} s"
        said = _first_line(error)
        name = f" ({silence.name})" if silence.name else ""
        place = f" in phase {phase!r}" if phase else ""
        told = (
            f"{self._told}: waited {seconds}{place}; arrived: hosts {me}, of the others nothing is"
            f" known; missing: hosts 0. Host {me} cannot reach JAX's coordination service, which"
            f" runs beside host 0{name}: {said}. Host 0 was stopped or killed, or one of the two"
            " is cut off from the network. Look at the log of host 0, and at the network of both."
            " Then restart the job; the last committed step will restore."
        )
        lost = PeerLostError(
            f"{told} {self.consequence('')}".rstrip(),
            phase=phase,
            failures={0: f"cannot be reached for {seconds}"},
            missing=[0],
        )
        lost._is_heard = False
        return lost


def is_unheard(error: BaseException) -> bool:
    """Whether the other hosts do not know of it: agreements fail with errors of this module's tree,
    on all hosts; but not with what this one could not reach.
    """
    if isinstance(error, PeerLostError):
        return not error._is_heard
    return not isinstance(error, CheckpointError)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:300]


def _silence(silence: Silence) -> str:
    name = f" ({silence.name})" if silence.name else ""
    return f"no sign of life for {silence.seconds:.0f} s{name}"


def _no_sign(silent: Mapping[int, Silence], hosts: Sequence[int]) -> str:
    shown = ", ".join(f"Host {host}: {_silence(silent[host])}" for host in hosts[:10])
    more = f" and {len(hosts) - 10} more" if len(hosts) > 10 else ""
    return (
        f"{shown}{more}. Such a host was killed (out of memory? preempted?), is stopped, is cut off"
        " from the network, or some library keeps its Python from running. Look at its log, and"
        " at its machine."
    )


def _same_everywhere(cause: BaseException) -> bool:
    """An error with a type of ours that says what is wrong with the call or the run, not with one
    host's disk.
    """
    return (
        isinstance(cause, CheckpointError)
        and type(cause) is not CheckpointError
        and not isinstance(cause, errors.StorageError)
    )


def _hosts(hosts: Sequence[int]) -> str:
    """Returns `hosts 0-3, 7` for [0, 1, 2, 3, 7]."""
    parts: list[str] = []
    for _, run in itertools.groupby(enumerate(sorted(hosts)), key=lambda pair: pair[1] - pair[0]):
        block = [host for _, host in run]
        parts.append(str(block[0]) if len(block) == 1 else f"{block[0]}-{block[-1]}")
    return f"host{'s' if len(hosts) > 1 else ''} {', '.join(parts)}" if parts else "none"


@functools.cache
def _warn_of_a_job_of_its_own() -> None:
    """Once: a script that was started on several hosts, and does not know it."""
    count = os.environ.get("JAX_NUM_PROCESSES", "1")
    if count.isdecimal() and int(count) > 1:
        logger.warning(
            "This process was started as one of %s (JAX_NUM_PROCESSES), but"
            " jax.distributed.initialize() was not called: for JAX, and here, it is a job of its"
            " own. Call that first (datarax-dist launch --help shows how).",
            count,
        )


class _Siblings:
    """The groups of this process on one root: one for each `Checkpointer`, one after the other or
    side by side, in the same order on every host.
    """

    def __init__(self, namespace: str, client: Any = None) -> None:
        self._namespace = namespace
        self.client = client
        self._opened = 0
        self._open: weakref.WeakValueDictionary[int, HostGroup] = weakref.WeakValueDictionary()
        self._cleared = 1
        self._lock = threading.RLock()  # a group may be dropped wherever it is held

    def open(self, silence_seconds: float) -> HostGroup:
        with self._lock:
            self._opened += 1
            group = HostGroup(JaxBoard(f"{self._namespace}/{self._opened}", silence_seconds))
            group._siblings = self
            self._open[self._opened] = group
        return group

    def closed(self, group: HostGroup) -> None:
        with self._lock:
            for number, other in list(self._open.items()):
                if other is group:
                    del self._open[number]

    def oldest(self) -> int:
        """Returns the first of them that is still used here."""
        with self._lock:
            return min(self._open.keys(), default=self._opened + 1)

    def clear_before(self, number: int) -> None:
        """Forgets the registers of those that no host uses any more. For the primary."""
        with self._lock:
            numbers = range(self._cleared, number)
            self._cleared = max(self._cleared, number)
        for old in numbers:
            JaxBoard(f"{self._namespace}/{old}").clear("")


_siblings: dict[str, _Siblings] = {}


def current_group(root: str, silence_seconds: float = SILENCE_SECONDS) -> HostGroup:
    """Returns the group of all hosts of this JAX job, for one more `Checkpointer` on `root`.

    Args:
        silence_seconds: who has shown no sign of life for so long is not waited for.
    """
    client = _client()
    if client is None:
        _warn_of_a_job_of_its_own()
        group = HostGroup(LocalBoard())
    else:
        if root not in _siblings or _siblings[root].client is not client:
            _siblings[root] = _Siblings(hashlib.sha256(root.encode()).hexdigest()[:16], client)
        group = _siblings[root].open(silence_seconds)
    group._check = functools.partial(_check_job, client, group.count)
    return group


def _client() -> Any:
    """Returns the client of JAX's coordination service; None where there is none."""
    from jax._src import distributed

    return distributed.global_state.client


def _check_job(client: Any, count: int) -> None:
    import jax

    if _client() is not client and (count > 1 or jax.process_count() > 1):
        raise InvalidArgumentError(
            "jax.distributed was initialized, or shut down, after this Checkpointer was made, which"
            " knows nothing of that, nor of the hosts that there are now. Make a new one, on every"
            " host, after jax.distributed.initialize()."
        )
