"""Power cuts by model: a real save is recorded, the power is cut after each of its operations, and
what may be on the disk then (`datarax_dist.testing.posix`) is looked at, state by state.

    python -m datarax_dist.testing.power                 # every cut
    python -m datarax_dist.testing.power --samples 40    # and more states at random

In each state: steps that were reported are there, whole, and as they were saved last; no other is
there in part; nothing that is not ours is touched; and the next save works and leaves nothing
behind. A sample of the states is restored by a real `Checkpointer`, and compared bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datarax_dist import config
from datarax_dist import format as fmt
from datarax_dist.clock import SystemClock
from datarax_dist.errors import CheckpointError
from datarax_dist.hosts import HostGroup
from datarax_dist.inspection import inspect_run, read_records, verify_files
from datarax_dist.request import SaveRequest
from datarax_dist.save import Saver
from datarax_dist.storage import LocalStore
from datarax_dist.telemetry import Phases
from datarax_dist.testing import posix
from datarax_dist.testing.faults import fail_at
from datarax_dist.testing.simulated import MemoryArrays, MemoryStore, SimulatedHosts

__all__ = [
    "BreachError",
    "Recording",
    "Tried",
    "main",
    "record_one_host",
    "record_two_hosts",
    "try_cuts",
]

_RUN = "new/run"  # the root of the run: it and the directory that it is in are made by the save
_FOREIGN = {"notes.txt": b"not ours", "board/events": b"not ours either"}
_KEPT = 2


class BreachError(AssertionError):
    """A promise was broken. The message says where the power was cut, and what was there."""


@dataclass(slots=True)
class Recording:
    """Saves, and what they did.

    Attributes:
        markers: digest of a marker -> the step that it is of, and which saving of it.
        digests: the same -> what the state's `tree_digest` is; empty where no real arrays are.
    """

    log: posix.Log
    markers: dict[str, tuple[int, int]] = field(default_factory=dict)
    digests: dict[tuple[int, int], str] = field(default_factory=dict)


@dataclass(slots=True)
class Tried:
    """What was tried: cuts, states of which each is different, and restores."""

    cuts: int = 0
    states: int = 0
    restores: int = 0


# Recording


class _Position:
    """A loader."""

    def __init__(self, position: int) -> None:
        self.position = position

    def get_state(self) -> dict[str, int]:
        return {"position": self.position}

    def set_state(self, state: Mapping[str, int]) -> None:
        self.position = state["position"]


def _state(step: int, version: int) -> dict[str, Any]:
    import jax.numpy as jnp

    return {"w": jnp.arange(64.0) + 1000 * step + version, "b": jnp.ones((4,)) * step, "n": step}


def _prepare(folder: Path) -> Path:
    base = folder / "disk"
    base.mkdir()
    for path, data in _FOREIGN.items():
        (base / path).parent.mkdir(exist_ok=True)
        (base / path).write_bytes(data)
    return base


def record_one_host(folder: Path) -> Recording:
    """Records real saves of one host: into a new root, one more, one of a step that is there, one
    that fails, and one after which retention deletes a step.
    """
    import datarax_dist as dd

    base = _prepare(folder)
    with posix.record(base) as log, dd.Checkpointer(base / _RUN, keep=dd.latest(_KEPT)) as ckpt:
        recording = Recording(log)
        for step, version in ((1, 1), (2, 1), (2, 2), (3, 1)):
            state = _state(step, version)
            with _marked(recording, base, step, version, [step - _KEPT]):
                handle = ckpt._save(
                    step,
                    state=state,
                    data=_Position(step),
                    metadata={"version": version},
                    force=True,
                    replace=version > 1,
                )
                assert isinstance(handle, dd.SaveHandle)
                handle.result()
            recording.digests[step, version] = dd.tree_digest(state)
            if version > 1:
                with fail_at("save:publish", 0, OSError(28, "no space")):
                    failing = ckpt.save(7, state=state)
                    assert failing is not None
                    with contextlib.suppress(OSError):
                        failing.result()
    return recording


class _Files(MemoryArrays):
    """An array writer that writes a few files, and fsyncs none."""

    def __init__(self, root: Path, host: int, content: bytes) -> None:
        super().__init__(MemoryStore(), host, {})
        self._root, self._bytes = root, content

    def start(self, prefix: str, all_written: Callable[[], None], choice: Any) -> _Files:
        state = self._root / prefix / "state"

        def work() -> None:
            own = state / f"ocdbt.process_{self._host}" / "d"
            own.mkdir(parents=True, exist_ok=True)
            (own / "a").write_bytes(self._bytes * 50)
            (own / "b").write_bytes(self._bytes * 9)
            all_written()
            if self._host == 0:
                (state / "manifest").write_bytes(b"merged")

        self._work = work
        return self


def _save_files(root: Path, group: HostGroup, step: int, content: bytes, **options: Any) -> None:
    """A save by the real protocol, without Orbax."""
    keep = options.pop("keep", None)
    saver = Saver(LocalStore(str(root)), group, SystemClock(), config.Options(), keep)
    shard = f"data/d/shard_{group.index:05d}-of-{group.count:05d}.json"
    request = SaveRequest(
        step=step,
        writer=_Files(root, group.index, content),
        positions={shard: b"{}"},
        shared={"TREE.json": b"{}"},
        last={fmt.ORBAX_COMMIT_NAME: b"{}"},
        items=("state",),
    )
    saver.begin(step, lambda: request, Phases("save", group.index), **options).finish()


def record_two_hosts(folder: Path) -> Recording:
    """Records saves of two hosts, which write to one file system at once."""
    base = _prepare(folder)
    hosts = SimulatedHosts(2)
    with posix.record(base) as log:
        recording = Recording(log)
        for step, version in ((1, 1), (2, 1), (2, 2), (3, 1)):
            with _marked(recording, base, step, version, [step - _KEPT]):
                save = functools.partial(
                    _save_files,
                    base / _RUN,
                    step=step,
                    content=f"{step}.{version} ".encode(),
                    replace=version > 1,
                    keep=config.latest(_KEPT),
                )
                failed = hosts.run(save)
                assert failed == [None, None], failed
    return recording


class _marked:  # noqa: N801 - reads as a function
    """Marks in the log what is promised from when on."""

    def __init__(
        self, recording: Recording, base: Path, step: int, version: int, going: Sequence[int]
    ) -> None:
        self._recording, self._base, self._saved = recording, base, (step, version)
        self._going = [step for step in going if step > 0]

    def __enter__(self) -> None:
        log = self._recording.log
        log.mark("begun", self._saved)
        for step in self._going:
            log.mark("going", step)

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:
            return
        log = self._recording.log
        marker = (self._base / _RUN / fmt.step_name(self._saved[0]) / fmt.COMMIT_NAME).read_bytes()
        self._recording.markers[fmt.digest(marker)] = self._saved
        log.mark("reported", self._saved)
        for step in self._going:
            log.mark("gone", step)


# Promises


def _promises(events: Sequence[posix.Event]) -> Iterator[dict[int, frozenset[int]]]:
    """Yields, after each event, which savings of each step may be there; 0 is none."""
    allowed: dict[int, frozenset[int]] = {}
    for event in events:
        if isinstance(event, posix.Mark):
            if event.what in ("begun", "reported"):
                step, version = event.value
                before = allowed.get(step, frozenset({0}))
                later = before | {version} if event.what == "begun" else frozenset({version})
                allowed = {**allowed, step: later}
            else:
                step = event.value
                none = frozenset({0})
                later = allowed[step] | none if event.what == "going" else none
                allowed = {**allowed, step: later}
        yield allowed


@dataclass(frozen=True, slots=True)
class _Found:
    """What a state turned out to be.

    Attributes:
        steps: those that are there -> which saving.
        wrong: what no promise allows; empty when nothing.
    """

    steps: Mapping[int, int]
    wrong: str = ""


def _look(top: Path, markers: Mapping[str, tuple[int, int]]) -> _Found:
    """Looks at what is below a directory, makes the next save there, and looks again."""
    root = top / _RUN
    store = LocalStore(str(root))
    inspection = inspect_run(store)
    steps: dict[int, int] = {}
    for candidate in inspection.candidates:
        if candidate.state == "committed" and candidate.marker is not None:
            wrong = _verify(store, candidate.name, candidate.marker)
            if wrong:
                return _Found(steps, f"{candidate.name} is there and torn: {wrong}")
            if markers.get(candidate.digest, (None,))[0] != candidate.step:
                return _Found(steps, f"{candidate.name} is something that nobody has saved")
            steps[candidate.step] = markers[candidate.digest][1]
        elif candidate.state in ("damaged", "refused", "foreign") or candidate.name.isdigit():
            told = f"{candidate.name} is {candidate.state}: {candidate.reason}"
            return _Found(steps, f"what no save may leave: {told}")
    [group] = SimulatedHosts(1).groups
    _save_files(root, group, 9, b"next")
    after = inspect_run(store)
    if set(after.committed) != {*steps, 9}:
        return _Found(steps, f"after the next save there are the steps {after.committed}")
    names = set(store.children(""))
    expected = {fmt.RUN_NAME, *(f"{c.name}/" for c in after.candidates if c.state == "committed")}
    expected |= names & {f"{fmt.LEASE_NAME}/"}
    if names != expected:
        return _Found(steps, f"after the next save is left behind: {sorted(names ^ expected)}")
    for path, data in _FOREIGN.items():
        if (top / path).read_bytes() != data:
            return _Found(steps, f"{path} was touched")
    return _Found(steps)


def _verify(store: LocalStore, name: str, marker: fmt.CommitMarker) -> str:
    """Returns what is wrong with a step: every byte is read, and nothing more may be there."""
    try:
        files = read_records(store, name, marker.records, marker.run, marker.step)
    except CheckpointError as error:
        return str(error)
    wrong = verify_files(store, name, files, "full")
    expected = {e.path for e in (*files, *marker.records)} | {fmt.COMMIT_NAME}
    there = {entry.key.removeprefix(f"{name}/") for entry in store.list(name)}
    return "".join(f"{path}: {reason}; " for path, reason in wrong.items()) + ", ".join(
        sorted(expected ^ there)
    )


def _restore(top: Path, found: _Found, digests: Mapping[tuple[int, int], str]) -> int:
    """Restores every step with a real `Checkpointer`; returns how many there were."""
    import datarax_dist as dd

    with dd.Checkpointer(top / _RUN) as ckpt:
        for step, version in found.steps.items():
            position = _Position(0)
            restored = ckpt.restore(step=step, state=_state(0, 0), data=position)
            if dd.tree_digest(restored.state) != digests[step, version]:
                raise BreachError(f"step {step} comes back as something else")
            if (position.position, restored.metadata) != (step, {"version": version}):
                raise BreachError(f"step {step}: its position or metadata are others")
        newest = ckpt.try_restore(state=_state(0, 0))
        if (newest.step if newest else None) != max(found.steps, default=None):
            raise BreachError(f"the newest step is {newest and newest.step}")
    return len(found.steps)


def try_cuts(
    recording: Recording,
    folder: Path,
    *,
    without: str | None = None,
    seed: int = 0,
    samples: int = 4,
    restores: int = 10,
    chosen: Callable[[int, posix.Event], bool] = lambda number, event: True,
) -> Tried:
    """Cuts the power after each operation, and looks at the states that may be there then.

    Args:
        without: the fsyncs of this place are taken for not made.
        samples: states at random, for each cut.
        restores: of how many states a real `Checkpointer` restores all steps.
        chosen: whether the power is cut after an event, which is given with its number.

    Raises:
        BreachError: a promise is broken.
    """
    log, chance, tried = recording.log, random.Random(seed), Tried()
    events = log.events if without is None else log.without(without)
    promises = [dict[int, frozenset[int]](), *_promises(events)]
    found: dict[str, _Found] = {}
    kept: list[posix.State] = []
    with posix.without_fsync(), _quiet():
        for number, disk in posix.cuts(log, events):
            if not chosen(number, events[number - 1]):
                continue
            tried.cuts += 1
            for state in posix.states_after_cut(disk, chance, samples):
                if state.digest not in found:
                    state.materialise(posix.clear(folder))
                    try:
                        found[state.digest] = _look(folder, recording.markers)
                    except Exception as error:
                        found[state.digest] = _Found({}, f"{type(error).__name__}: {error}")
                    tried.states += 1
                    if found[state.digest].steps and recording.digests:
                        kept.append(state)
                _judge(found[state.digest], promises[number], events[number - 1], state, number)
        for state in chance.sample(kept, min(restores, len(kept))):
            state.materialise(posix.clear(folder))
            tried.restores += _restore(folder, found[state.digest], recording.digests)
    return tried


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What is removed after each of thousands of cuts is no news."""
    logger = logging.getLogger("datarax_dist")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _judge(
    found: _Found,
    allowed: Mapping[int, frozenset[int]],
    last: posix.Event,
    state: posix.State,
    number: int,
) -> None:
    wrong = found.wrong
    for step in {*allowed, *found.steps}:
        version = found.steps.get(step, 0)
        if not wrong and version not in allowed.get(step, frozenset({0})):
            wrong = f"step {step}: saving {version} is there, and not one of {set(allowed[step])}"
    if wrong:
        there = "\n".join(
            f"  {path}{'/' if data is None else f' ({len(data)} bytes)'}"
            for path, data in state.files.items()
        )
        raise BreachError(
            f"{wrong}\nthe power was cut after operation {number}, {last};"
            f"\n{state.told}. There is:\n{there}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the model."""
    parser = argparse.ArgumentParser(
        prog="python -m datarax_dist.testing.power", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--samples", type=int, default=10, help="states at random, for each cut")
    parser.add_argument("--restores", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for name, make in (("one host", record_one_host), ("two hosts", record_two_hosts)):
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            recording = make(Path(folder))
            try:
                tried = try_cuts(
                    recording,
                    Path(folder) / "after",
                    seed=arguments.seed,
                    samples=arguments.samples,
                    restores=arguments.restores,
                )
            except BreachError as error:
                print(f"{name}: BREACH\n{error}", file=sys.stderr)
                return 1
        print(
            f"{name}: {tried.cuts} cuts, {tried.states} different states,"
            f" {tried.restores} restores, {time.monotonic() - begin:.0f} s; no breach",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
