"""The run-bound object: `Checkpointer`, its `SaveHandle`s and what `restore` returns."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import logging
import operator
import os
import platform
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import jax

from datarax_dist import arrays as arrays_io
from datarax_dist import config, sharing, trees
from datarax_dist import format as fmt
from datarax_dist import lease as leases
from datarax_dist.clock import SystemClock
from datarax_dist.config import KeepPolicy, Options, SavePolicy
from datarax_dist.data import positions as data_io
from datarax_dist.errors import (
    CheckpointError,
    CorruptStepError,
    InvalidArgumentError,
    StepNotFoundError,
    StorageError,
    describe,
)
from datarax_dist.forms import Form
from datarax_dist.gathers import Together, raise_if_stuck
from datarax_dist.handles import Progress, SaveHandle
from datarax_dist.hosts import HostGroup, current_group
from datarax_dist.inspection import Candidate, Inspection, find_foreign, inspect_run, no_such_step
from datarax_dist.request import SaveRequest, plain_metadata
from datarax_dist.restore import Loading, Restorer, RestoreReport, leaves_text
from datarax_dist.retention import delete_step, with_room
from datarax_dist.save import Saver, StartedSave
from datarax_dist.specs import TreeSpec, parse_tree
from datarax_dist.states import apply_state, is_checkpointable, is_set_in_place, state_tree
from datarax_dist.storage import open_store
from datarax_dist.telemetry import Phases

__all__ = ["Checkpointer", "Progress", "Restored", "SaveHandle", "StepInfo"]

logger = logging.getLogger("datarax_dist")

_SAYS_NOTHING_SECONDS = 20.0  # how long a handle may need to say so of the primary
_LESS = "%s: step %d is saved without %s, which the restored one has; it was not asked for."
_SPOILT = "The loaders that restore() was given cannot be used any more: make them anew."
_HALF_SET = "What restore() sets in place may be what the step has on some hosts only."
_ORBAX_MARKER = "commit_success.txt"  # what plain Orbax takes for a whole step, in a bucket


@dataclass(frozen=True, slots=True)
class StepInfo:
    """A committed step, as its marker describes it."""

    step: int
    hosts: int
    bytes: int
    items: tuple[str, ...]
    committed_at: float


@dataclass(frozen=True, slots=True)
class Restored:
    """What `restore` returns.

    Attributes:
        step: the step.
        state: the state, in the target's structure when there was one; None when the step has none.
        metadata: what was saved as metadata; an empty dict when there was none.
        report: which steps were refused and why, what was verified, seconds for each phase, hosts
            before and now.
    """

    step: int
    state: Any
    metadata: Any
    report: RestoreReport


class Checkpointer:
    """One run: saves and restores its steps, on one host or on many.

    In a job with many hosts make it, and call each of its methods, on every host in the same order.

    Args:
        root: an absolute path on a local file system, or on one that all hosts share; or
            `gs://bucket/prefix`.
        save_when: which steps `save` saves: `every_steps(n)`; None: all.
        keep: which steps are kept, the newest always: `latest(n) | every_n_steps(n)`; None: all.
        options: see `Options`.

    Raises:
        InvalidArgumentError: the root is relative or of a kind that is not supported.

    >>> import tempfile, numpy as np
    >>> with Checkpointer(tempfile.mkdtemp()) as ckpt:
    ...     report = ckpt.save(1, state={"w": np.ones(3)}, metadata={"loss": 0.5}).result()
    ...     restored = ckpt.restore()
    >>> restored.step, restored.state["w"].tolist(), restored.metadata
    (1, [1.0, 1.0, 1.0], {'loss': 0.5})
    """

    _own_items: frozenset[str] = frozenset()  # data items that are no loaders of the user

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        save_when: SavePolicy | None = None,
        keep: KeepPolicy | None = None,
        options: Options | None = None,
    ) -> None:
        self._root = config.check_root(root)
        self._options = options or Options()
        if not isinstance(self._options, Options):
            raise InvalidArgumentError(
                f"options must be datarax_dist.Options, not {type(options).__name__}."
            )
        config.check_policies(save_when=save_when, keep=keep)
        self._save_when = save_when
        self._group: HostGroup = current_group(self._root, self._options.peer_silence_seconds)
        self._store = open_store(self._root)
        self._clock = SystemClock()
        self._arrays = arrays_io.OrbaxArrays(self._root, self._group.index, self._options)
        self._share: sharing.Share | None = None
        self._process = os.getpid()
        # Reading needs no lease: it is taken by the first `save`.
        self._saver = Saver(
            self._store, self._group, self._clock, self._options, keep, self._borrow_lease()
        )
        self._pace = data_io.Pace(self._options.batches_per_step)
        self._unasked = data_io.Unasked()
        self._state_left: Sequence[str] = ()  # leaves of the restored step that were not asked for
        self._plan: data_io.Plan | None = None  # of what is being restored
        self._restorer = Restorer(
            self._store, self._group, self._options, self._clock, seen=self._saver.learn
        )
        # One worker, kept: waking it costs the training thread less than starting a thread.
        self._worker = ThreadPoolExecutor(1, "datarax_dist-save")
        self._running: _Running | None = None
        _left_open.add(self)
        _drain_at_exit()
        self._handle: SaveHandle | None = None
        self._missed: SaveHandle | None = None  # an earlier one, whose error nobody has seen here
        self._closed = False

    def _borrow_lease(self) -> leases.Right:
        if not self._group.is_primary:
            return leases.Unguarded()
        options = self._options
        make = functools.partial(
            leases.Lease,
            self._store,
            self._clock,
            ttl_seconds=options.lease_ttl_seconds,
            wait_seconds=options.lease_wait_seconds,
            renews=True,
        )
        self._share = share = sharing.borrow(self._root, make)
        self._dropped = weakref.finalize(self, share.give_back_later)
        self._dropped.atexit = False  # see `_drain_at_exit`
        return share.lease

    def _let_go(self) -> None:
        """Lets another job write."""
        if self._share is not None:
            self._share.give_back()
            self._dropped.detach()  # a handler that saves and lets go would keep one for each save

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception as late:
            logger.error(
                "closing %s after %s: %s", self._root, type(error).__name__, describe(late)
            )

    @property
    def root(self) -> str:
        """The root, as an absolute path."""
        return self._root

    def should_save(self, step: int) -> bool:
        """Whether `save(step)` would save; the same on every host."""
        return self._save_when is None or self._save_when.should_save(step)

    def save(
        self,
        step: int,
        *,
        state: Any = None,
        data: Any = None,
        metadata: Any = None,
        force: bool = False,
    ) -> SaveHandle | None:
        """Saves a step in the background. Call it on every host.

        It blocks while an earlier save still runs, for one agreement of the hosts, and for the copy
        of the state to host memory. On a CPU that copy may be the array itself, with memory that it
        shares with a numpy array (`jax.device_put` of one): do not write into that one before the
        handle is done.

        Args:
            step: 0 or more.
            state: a tree of `jax.Array`s (sharded over all hosts, or equal on all), numpy arrays,
                typed PRNG keys, numbers, str, bytes
                and None; a Flax NNX module; or an object with get_state/set_state.
            data: a loader or iterator with a position, or `{name: loader}`.
            metadata: JSON. The primary's is written.
            force: save whatever `save_when` says.

        Returns:
            A handle; None when `save_when` said no.

        Raises:
            LeaseError: another job writes to this run. The first call finds out, whatever
                `save_when` says.
            StepExistsError: the step is there already.
            UnsupportedLeafError: a leaf cannot be saved; it is named.
            PeerError: another host failed, or the hosts do not agree. Nothing was written.
        """
        return self._save(
            step, state=state, data=data, metadata=metadata, force=force, replace=False
        )

    def _save(
        self, step: int, *, state: Any, data: Any, metadata: Any, force: bool, replace: bool
    ) -> SaveHandle | None:
        self._check_open()
        number = _whole_number(step)
        refused: BaseException | None = None
        wanted = force or number is None
        try:
            wanted = wanted or self.should_save(number or 0)
        except Exception as error:  # the others must hear of it, if they save
            refused, wanted = error, True
        if not wanted:
            # A job that may not write is told now, and not in an hour.
            self._saver.take(number or 0)
            return None
        refused = self._drained() or refused
        previous = self._handle
        unseen = previous._unseen_error() if previous is not None else None
        phases = Phases("save", self._group.index)

        def capture() -> SaveRequest:
            if refused is not None:
                raise refused
            return self._capture(step if number is None else number, state, data, metadata)

        started: StartedSave | None = None
        running: _Running | None = None
        try:
            started = self._saver.begin(
                -1 if number is None else number,  # `capture` refuses it
                capture,
                phases,
                replace=replace,
                previous_error=unseen,
            )
            self._saver.check_turn(started.turn, started.step)
            names = list(data_io.named_loaders(data))
            running = _Running(started, SaveHandle(started.step, phases), names)
            if unseen is not None and (self._missed is None or self._missed._seen):
                self._missed = previous  # on another host it was seen
            self._worker.submit(self._finish, running)
            self._keep(running)
        except BaseException as error:
            if previous is not None and error is unseen:
                previous._seen = True
                error.add_note(f"That was the save of step {previous.step}; {step} is not saved.")
            # Ctrl-C, or no thread to be had: nobody else would end what has begun.
            if started is not None and (running is None or running.take()):
                started.abandon(error)
            elif running is not None:
                self._keep(running)
            raise
        return running.handle

    def _keep(self, running: _Running) -> None:
        """Takes note of the save that goes on; not when a signal handler has made one since."""
        if running.started.turn == self._saver.turn:
            self._running, self._handle = running, running.handle

    def _capture(self, step: Any, state: Any, data: Any, metadata: Any) -> SaveRequest:
        """Step 1 of the protocol: what the caller changes later must not reach the step."""
        if state is None and data is None:
            raise InvalidArgumentError(
                "save() needs a state, or data, or both; it was given neither."
            )
        tree = None if state is None else state_tree(state)
        return self._capture_tree(step, tree, data, metadata, has_state=state is not None)

    def _capture_tree(
        self, step: Any, tree: Any, data: Any, metadata: Any, *, has_state: bool
    ) -> SaveRequest:
        if _whole_number(step) is None:
            raise InvalidArgumentError(f"{_no_step(step)} Nothing was saved.")
        metadata = plain_metadata(metadata)
        captured = data_io.capture(
            data,
            self._group.index,
            self._group.count,
            step,
            self._pace,
        )
        shared = dict(captured.indexes)
        agreement = dict(captured.agreement)
        names = list(data_io.named_loaders(data))
        for name, restored in self._unasked.among(names).items():
            if self._group.is_primary:
                logger.warning(data_io.TWICE, self._root, restored, name, step)
        items = [f"data/{name}" for name in names]
        plan: trees.StatePlan | None = None
        if has_state:
            plan = trees.plan_state(tree, self._group.count)
            shared[fmt.TREE_NAME] = fmt.seal(plan.spec.to_json())
            left, self._state_left = set(self._state_left), ()
            if (lost := left - {leaf.name for leaf in plan.spec.leaves}) and self._group.is_primary:
                logger.warning(_LESS, self._root, step, leaves_text(sorted(lost)))
            told = f"{len(plan.spec.leaves)} leaves, {_tree_digest(plan.spec)}"
            agreement["the structure of the state"] = told
            items.append("state")
        shared["metadata/metadata"] = fmt.dump_metadata(metadata)
        has_arrays = plan is not None and any(not leaf.inline for leaf in plan.spec.leaves)
        writer = self._arrays.writer(plan.arrays if plan and plan.spec.leaves else None)
        files = writer.step_files()
        shared |= {name: data for name, data in files.items() if name != _ORBAX_MARKER}
        local = (
            {plan.spec.leaves[number].name: digest for number, digest in plan.local_digests.items()}
            if plan
            else {}
        )
        return SaveRequest(
            step=step,
            writer=writer,
            positions=captured.files,
            written=captured.written,
            held=captured.held,
            counts=captured.counts,
            shared=shared,
            last={_ORBAX_MARKER: files[_ORBAX_MARKER]},
            needed=arrays_io.NEEDED if has_arrays else (),
            agreement=agreement,
            local_digests=local,
            items=sorted(items),
            versions=_versions(),
        )

    def _finish(self, running: _Running) -> None:
        """On the worker. A watcher beside it tells the handle of a failure elsewhere at once, while
        this host still writes; and at the deadline, though this host may hang.
        """
        if not running.take():
            return
        started, handle = running.started, running.handle
        watcher = threading.Thread(
            target=_watch, args=(started, handle), name="datarax_dist-watch", daemon=True
        )
        try:
            try:
                watcher.start()
            except RuntimeError as error:
                why = (
                    "the program has ended without close(). Call that, or use `with`"
                    if "shutdown" in str(error)  # Python 3.12 and later start no threads then
                    else f"no thread could be started to watch over it ({error}). Is there a limit"
                    " on threads or processes (ulimit -u, the pids of a container)?"
                )
                started.fail(CheckpointError(f"Step {started.step} is not saved: {why}"))
            report = started.finish()
            self._unasked.saved(running.names)
            handle._settle(report=report)
        except BaseException as error:
            told = describe(error)
            logger.error("%s: the save of step %d failed: %s", self._root, started.step, told)
            handle._settle(error=error)
            started.tell()
            started.clean_up()
        finally:
            if watcher.ident is not None:
                watcher.join()  # it has the same outcome
            started.let_go()
            if self._running is running:
                self._running = None
            running.over.set()

    def restore(
        self,
        *,
        step: int | None = None,
        state: Any = None,
        data: Any = None,
        allow_data_changes: Sequence[str] = (),
    ) -> Restored:
        """Restores the newest good step, or `step`. Call it on every host.

        Args:
            step: a committed step; None takes the newest that every host finds undamaged.
            state: a live tree, a tree of `jax.ShapeDtypeStruct`s with shardings, an NNX module
                (updated in place) or an object with set_state. It may be a part of what was saved.
                None returns what was saved, placed over today's devices.
            data: the loaders to set back, as they were given to `save`: new ones, from which
                nothing was taken.
            allow_data_changes: what may differ between the pipelines then and now, by the names
                that the error gives, `["data.seed"]`. The report lists what did.

        Raises:
            StepNotFoundError: there is no committed step, or not this one.
            CorruptStepError: the step is damaged, or every one is, or has lost its marker.
            StorageError: something cannot be read now; or the root is no directory.
            StructureMismatchError: the target does not fit; nothing was changed.
            PositionError: the data positions do not fit, and nothing was changed; or a loader
                refused its own, and then none of the loaders can be used any more.
        """
        restored = self.try_restore(
            step=step, state=state, data=data, allow_data_changes=allow_data_changes
        )
        if restored is None:
            told = f"{self._root} has no committed step.{self._restorer.why_nothing()}"
            raise StepNotFoundError(told, step=step)
        return restored

    def try_restore(
        self,
        *,
        step: int | None = None,
        state: Any = None,
        data: Any = None,
        allow_data_changes: Sequence[str] = (),
    ) -> Restored | None:
        """The same, but returns None for a run that has no step yet. Damage still raises, or falls
        back; so do steps that have all lost their markers.
        """
        self._check_open()
        try:
            return self._restore(step, state, data, allow_data_changes)
        except BaseException as error:
            if self._restorer.has_applied:  # here, or on another host only
                if self._plan is not None and self._plan.sources:
                    self._plan.spoil()
                    error.add_note(_SPOILT)
                if self._sets_in_place(state):
                    error.add_note(_HALF_SET)
            raise
        finally:
            self._plan, self._restorer.has_applied = None, False
            self._saver.suspects.update(self._restorer.judged)

    def _restore(
        self, step: Any, state: Any, data: Any, allow_data_changes: Sequence[str]
    ) -> Restored | None:
        refused = self._drained()
        self._left: Sequence[str] = ()
        number = None if step is None else _whole_number(step)
        if step is not None and number is None:
            refused = refused or _no_step(step)
        wants = ""
        try:
            wants = self._wants(state, data)
        except Exception as error:
            refused = refused or error
        found = self._restorer.restore(
            number,
            lambda candidate, loading: self._load(
                candidate, state, data, loading=loading, allow=allow_data_changes
            ),
            Phases("restore", self._group.index),
            refused=refused,
            loads=self._loads(state),
            wants=wants,
        )
        if found is None:
            return None
        (value, metadata, plan), report = found
        self._saver.newer, self._state_left = self._restorer.newer, tuple(self._left)
        if plan is not None:
            left = [name for name in plan.left if name not in self._own_items]
            report = dataclasses.replace(
                report,
                data_changes=plan.changes,
                data_left=tuple(left),
                state_left=self._state_left,
            )
            self._unasked.restored(plan.sources, left, report.step)
        for name, (then, now) in report.data_changes.items():
            logger.warning("%s: %s was %r, and is %r now, as allowed", self._root, name, then, now)
        if self._loads(state):
            self._saver.suspects.pop(report.step, None)
        return Restored(report.step, value, metadata, report)

    def _wants(self, target: Any, data: Any) -> str:
        """What is restored, in words that must be the same on every host."""
        names = ", ".join(map(repr, sorted(data_io.named_loaders(data)))) or "none"
        return f"{'no state' if target is None else 'a state'} to restore into, and data: {names}"

    def _loads(self, target: Any) -> bool:
        """Whether more than the metadata is read for a target."""
        del target
        return True

    def _sets_in_place(self, target: Any) -> bool:
        return is_set_in_place(target)

    def _load(
        self,
        candidate: Candidate,
        target: Any,
        data: Any,
        *,
        loading: Loading | None = None,
        metadata_only: bool = False,
        parted: bool | None = None,
        allow: Sequence[str] = (),
    ) -> Callable[[], Any]:
        """Reads this host's part of a step; changes nothing. Returns what applies it, and returns
        state, metadata, and what was done about data, if something was.

        Args:
            loading: what the restore protocol asks for, and is told.
            parted: whether hosts may read parts of what all of them need; as the options say by
                default.
        """
        name = candidate.name
        read = lambda key: self._read(candidate, key)
        items = list(candidate.marker.items) if candidate.marker else []
        metadata: Any = {}
        tree: Callable[[], Any] = _no_state
        has_state = "state" in items
        spec: TreeSpec | None = None
        where = f"{name}/state"
        if candidate.state == "foreign":
            where = find_foreign(self._store, name)
            spec = arrays_io.describe_foreign(os.path.join(self._root, where))
            has_state = True
        else:
            metadata = fmt.parse_metadata(read("metadata/metadata"), "metadata/metadata")
            if metadata_only:
                return lambda: (None, metadata, None)
            if has_state:
                spec = parse_tree(read(fmt.TREE_NAME))
        if target is not None and not has_state:
            raise StepNotFoundError(
                f"Step {candidate.step} of {self._root} has no state; restore with state=None.",
                step=candidate.step,
            )
        plan = data_io.plan_restore(data, items, read, self._group.index, self._group.count, allow)
        positions = data_io.decode_positions(plan, read)
        if spec is not None:
            goal = None if target is None else state_tree(target)
            form = Form(spec, goal, is_own=is_checkpointable(target))
            self._left = form.left
            tree = self._load_state(where, spec, form, loading or Loading(), parted)

        self._plan = plan

        def apply() -> tuple[Any, Any, data_io.Plan]:
            data_io.apply_positions(plan, positions, candidate.step, self._pace)
            return apply_state(target, tree()), metadata, plan

        return apply

    def _load_state(
        self,
        where: str,
        spec: TreeSpec,
        form: Form,
        loading: Loading,
        parted: bool | None,
    ) -> Callable[[], Any]:
        """Reads the state, and returns what returns it, when all hosts have gathered it."""
        wanted = form.wanted
        if parted is None:
            parted = self._options.single_replica_restore
        loaded = self._arrays.restore(where, spec, wanted, loading.take(), parted=parted)
        leaves = [
            None
            if leaf.path in loaded.parts
            else trees.finish_leaf(leaf, loaded.values.get(leaf.path), goal)
            for leaf, goal in wanted
        ]
        later = [number for number, (leaf, _) in enumerate(wanted) if leaf.path in loaded.parts]

        def build() -> Any:
            for number in later:
                leaf, goal = wanted[number]
                leaves[number] = trees.finish_leaf(leaf, loaded.values[leaf.path], goal)
            return form.build(leaves)

        if not later:
            state = build()
            return lambda: state
        built: list[Any] = []

        def gather(together: Together) -> None:
            loaded.gather(together)
            built.append(build())

        loading.gather_later(loaded.told, gather)
        return lambda: built[0]

    def _read(self, candidate: Candidate, key: str) -> bytes:
        try:
            return self._store.get(f"{candidate.name}/{key}")
        except KeyError:
            raise CorruptStepError(f"{key} is missing", step=candidate.step, files=[key]) from None

    def inspect(self) -> Inspection:
        """Returns whatever looks like a step in the root, and what it is. Collective."""
        self._check_open()
        return self._restorer.inspect()

    def all_steps(self) -> list[int]:
        """Returns the committed steps, in order; the same on every host. Collective."""
        return self.inspect().committed

    def latest_step(self) -> int | None:
        """Returns the newest committed step, or None; the same on every host. Collective."""
        steps = self.all_steps()
        return steps[-1] if steps else None

    def step_info(self, step: int) -> StepInfo:
        """Describes a committed step. Collective.

        Raises:
            StepNotFoundError: it is not there.
            InvalidArgumentError: that is no step's number.
        """
        self._check_open()
        number = _whole_number(step)
        hosts, size, items, committed_at = self._group.exchange(
            "info",
            number,
            error=_no_step(step) if number is None else None,
            leader=self._describe,
            timeout_seconds=self._options.exchange_timeout_seconds,
        )
        assert number is not None
        return StepInfo(number, hosts, size, tuple(items), committed_at)

    def _describe(self, steps: Sequence[int]) -> list[Any]:
        """On the primary, that all hosts may be told the same."""
        [step, *others] = sorted(set(steps))
        if others:
            raise InvalidArgumentError(f"Hosts ask for different steps: {step}, {others[0]}.")
        inspection = inspect_run(self._store)
        for marker in (c.marker for c in inspection.candidates if c.state == "committed"):
            if marker is not None and marker.step == step:
                return [marker.hosts, marker.bytes, list(marker.items), marker.committed_at]
        raise no_such_step(self._root, step, inspection)

    def delete(self, step: int) -> None:
        """Deletes a committed step. Collective.

        Raises:
            StepNotFoundError: it is not there.
            StorageError: another job writes to it in this moment.
        """
        self._check_open()
        number = _whole_number(step)
        gone = f"Step {number} may be deleted or not: look again (all_steps)."
        with self._group.in_parts("delete", lambda phase: "" if phase else gone) as operation:
            self._group.exchange(
                "delete",
                number,
                error=self._drained() or (_no_step(step) if number is None else None),
                leader=self._delete,
                timeout_seconds=self._saver.agreement_seconds(),
                within=operation,
            )

    def _delete(self, steps: Sequence[int]) -> None:
        self._describe(steps)
        self._saver.hold()
        self._saver.forget()
        self._describe(steps)  # the run is this job's by now, and was another's before, maybe
        step = steps[0]
        now, saver = self._clock.now(), self._saver
        if not with_room(
            lambda: delete_step(self._store, step, now=now, lease=saver.lease),
            saver.remove_leftovers,
        ):
            raise StorageError(
                f"Step {step} of {self._store.root} was not deleted: another job writes to it in"
                " this moment. Look again, and delete it then.",
                errno=None,
            )
        saver.newer = [other for other in saver.newer if other != step]

    def wait_until_finished(self) -> None:
        """Waits for the save that is under way; raises its error if nobody has seen it."""
        self._drain()
        self.check_for_errors()

    def check_for_errors(self) -> None:
        """Raises the error of a finished save that nobody has seen on this host."""
        missed, self._missed = self._missed, None
        for handle in (missed, self._handle):
            if handle is not None and (error := handle._unseen_error()) is not None:
                handle._seen = True
                raise error

    def close(self) -> None:
        """Waits for the save under way and ends. Can be called more than once: when it was cut
        short, by Ctrl-C say, it does the rest.
        """
        if os.getpid() != self._process:
            return  # a forked child: what it has inherited goes on in its parent
        self._closed = True
        self._worker.shutdown(wait=False)  # it ends when it has nothing more to do
        self._drain()
        try:  # not where the worker goes on, or hangs: it may write yet
            self._let_go()
            self._group.close()
        finally:
            with contextlib.suppress(Exception):  # it has failed a save, which has said so
                self._arrays.close()
        self.check_for_errors()

    def _let_others_write(self) -> None:
        """Lets the run go, until this one saves again."""
        self._saver.ask_anew()  # first: on all hosts alike, whatever this host is interrupted in
        self._drain()
        try:
            self._let_go()
        finally:  # Ctrl-C in between would leave a lease that nobody holds
            if self._share is None or not self._share.is_lent:
                self._saver.let_go(self._borrow_lease())

    def _drain(self) -> None:
        """Waits until the worker has nothing to do: two saves never overlap.

        Raises:
            StorageError: it should have ended at the deadline of its save, and hangs still.
        """
        if (running := self._running) is None:
            return
        if os.getpid() != self._process:
            raise self._forked()
        while not running.over.wait(1.0):  # in slices, so that Ctrl-C is answered
            started, handle = running.started, running.handle
            # Where this host's part is done, and host 0 says nothing, the handle says so soon.
            phase = started.hangs(0.0 if handle.done() else _SAYS_NOTHING_SECONDS)
            if phase is not None:
                failed = not handle.done() or handle._future.exception() is not None
                how = "has failed at its deadline, and" if failed else "is committed, but"
                raise StorageError(
                    f"{self._root}: the save of step {started.step} {how} still hangs in phase"
                    f" {phase!r}: the storage does not answer. Nothing can be saved, and this"
                    " process cannot end, until it does.",
                    errno=errno.ETIMEDOUT,
                )
        self._running = None

    def _drained(self) -> BaseException | None:
        """Drains before hosts agree; returns why that was not possible, or was cut short, for the
        others to hear.
        """
        try:
            self._drain()
        except BaseException as error:
            return error
        return None

    def _check_open(self) -> None:
        if os.getpid() != self._process:
            raise self._forked()
        if self._closed:
            raise InvalidArgumentError(f"{self._root}: a closed Checkpointer. Make a new one.")
        self._group.check_job()
        try:
            raise_if_stuck()
        except CheckpointError as error:  # the others may not be, and need not wait
            self._group.close(str(error))
            raise

    def _forked(self) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"The Checkpointer of {self._root} was made by the process {self._process}, and this is"
            f" {os.getpid()}, forked from it. Make one of its own here."
        )


class _Running:
    """A save in the background, which the worker finishes, unless it is given up before."""

    def __init__(self, started: StartedSave, handle: SaveHandle, names: Sequence[str]) -> None:
        self.started, self.handle, self.names = started, handle, names
        self.over = threading.Event()  # the worker has nothing more to do for it
        self._taken = threading.Lock()

    def take(self) -> bool:
        """Whether it is for the caller to end it: the first one."""
        return self._taken.acquire(blocking=False)


def _watch(started: StartedSave, handle: SaveHandle) -> None:
    try:
        report = started.watch()
        # The worker has more to tell, but may hang in what comes after the commit.
        wait([handle._future], started.seconds_left())
        handle._settle(report=report)
    except BaseException as error:
        handle._settle(error=error)


def _no_step(step: Any) -> InvalidArgumentError:
    return InvalidArgumentError(f"A step is a whole number of 0 or more, not {step!r}.")


def _whole_number(step: Any) -> int | None:
    """Returns a step as an int, of numpy's and JAX's integers too; None when it cannot be one."""
    if isinstance(step, bool):
        return None
    try:
        number = operator.index(step)
    except TypeError:
        return None
    return number if 0 <= number < 10**18 else None


_left_open: weakref.WeakSet[Checkpointer] = weakref.WeakSet()


def _end_all() -> None:
    hang: list[sharing.Share] = []
    for checkpointer in tuple(_left_open):
        try:
            checkpointer._drain()
            checkpointer._group.close()
        except Exception as error:  # the others have saves to end, too
            logger.error("%s", describe(error))
            if checkpointer._share is not None:
                hang.append(checkpointer._share)
    sharing.give_all_back(but=hang)


@functools.cache
def _drain_at_exit() -> None:
    """Lets saves end that a script has begun, and left behind without `close()`. It must happen
    before Python stops the executors, Orbax's too; only this hook runs that early. (Python 3.12
    starts no threads even there: then the save fails, and says so in the log.)
    """

    process = os.getpid()

    def drain() -> None:
        if os.getpid() == process:  # else a forked child ends, and what it has inherited goes on
            _end_all()

    with contextlib.suppress(AttributeError, RuntimeError):  # not there, or ending already
        threading._register_atexit(drain)  # type: ignore[attr-defined]


def _begin_anew() -> None:
    """In a forked child: what is open there is its parent's."""
    _left_open.clear()
    _drain_at_exit.cache_clear()


os.register_at_fork(after_in_child=_begin_anew)


def _tree_digest(spec: TreeSpec) -> str:
    """A digest of the structure, without the values of leaves (those have digests of their own)."""
    shape = [[list(leaf.path), leaf.kind, list(leaf.shape), leaf.dtype] for leaf in spec.leaves]
    return fmt.crc_text(fmt.crc32c(fmt.dumps([spec.structure, shape])))


def _versions() -> dict[str, str]:
    from datarax_dist import __version__

    return {
        "datarax_dist": __version__,
        "jax": jax.__version__,
        "orbax-checkpoint": arrays_io.ORBAX_VERSION,
        "python": platform.python_version(),
    }


def _no_state() -> None: ...
