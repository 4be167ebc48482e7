"""What users get wrong: each is told at once, and says what to do."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from targets import Counter
from test_disks import acting

import datarax_dist as dd
from datarax_dist import errors, hosts, trees
from datarax_dist import format as fmt
from datarax_dist.agreement import check_agreement
from datarax_dist.checkpoint import OrbaxCheckpointHandler
from datarax_dist.cli import main
from datarax_dist.hosts import HostGroup
from datarax_dist.testing import SimulatedHosts, fail_at

STATE = {"w": np.ones(3)}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"keep": 3}, r"keep must be a policy, datarax_dist\.latest\(3\) say, not 3"),
        ({"save_when": 2}, r"save_when must be a policy, datarax_dist\.every_steps\(100\) say"),
    ],
)
def test_a_number_is_no_policy(tmp_path: Path, arguments: Any, text: str) -> None:
    with pytest.raises(errors.InvalidArgumentError, match=text):
        dd.Checkpointer(tmp_path / "run", **arguments)


def test_a_policy_of_the_other_kind_is_told_where_it_goes(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgumentError, match="That is one for save_when=") as told:
        dd.Checkpointer(tmp_path / "run", keep=dd.every_steps(3))  # type: ignore[arg-type]
    assert "keep must be a policy" in str(told.value)
    with pytest.raises(errors.InvalidArgumentError, match="That is one for keep="):
        dd.Checkpointer(tmp_path / "run", save_when=dd.latest(3))  # type: ignore[arg-type]


def test_who_restores_from_where_no_run_is_is_asked_for_the_path(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for path in (tmp_path / "no" / "such" / "directory", tmp_path / "data"):
        with dd.Checkpointer(path) as ckpt:
            with pytest.raises(errors.StepNotFoundError, match=r"no committed step.* right path"):
                ckpt.restore()
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state=STATE).result()
        ckpt.delete(1)
        with pytest.raises(errors.StepNotFoundError, match=r"no committed step\.$"):
            ckpt.restore()


def test_who_asks_for_a_step_that_is_not_there_is_told_which_ones_are(tmp_path: Path) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state=STATE).result()
        for ask in (ckpt.step_info, ckpt.delete, lambda step: ckpt.restore(step=step)):
            with pytest.raises(errors.StepNotFoundError, match=r"step 9 in .*; there are \[1\]"):
                ask(9)
        assert ckpt.all_steps() == [1]


@pytest.mark.parametrize(
    ("leaf", "instead"),
    [
        (bytearray(b"x"), "Give bytes"),
        ({1}, "Give a sorted list"),
        (optax.adam(1.0), r"save .*its state|its state is saved"),
        (iter([]), "what it is made of"),
        (np.array(["a"]), "a list of str"),
    ],
)
def test_a_leaf_that_cannot_be_saved_is_told_what_to_give_instead(
    tmp_path: Path, leaf: Any, instead: str
) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        with pytest.raises(errors.UnsupportedLeafError, match=instead):
            ckpt.save(1, state={"x": leaf})


def test_a_save_that_fails_before_its_arrays_are_written_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        with fail_at("save:started", 0, OSError(5, "the disk is broken")):
            with pytest.raises(OSError, match="the disk is broken"):
                ckpt.save(1, state=STATE).result()
    told = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record.name for record in told] == ["datarax_dist"]


def test_a_thread_that_cannot_start_as_the_program_has_ended_is_told_what_to_call() -> None:
    error = RuntimeError("can't create new thread at interpreter shutdown")
    assert errors.describe(error).endswith("without close(): call that, or use `with`.")
    assert errors.describe(RuntimeError("x")) == "RuntimeError: x"


def test_who_waits_too_short_for_a_save_is_told_where_it_is(tmp_path: Path) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        goes_on.wait(60)

    with acting("save:commit", wait), dd.Checkpointer(tmp_path / "run") as ckpt:
        handle = ckpt.save(3, state=STATE)
        assert begun.wait(60)
        with pytest.raises(TimeoutError, match=r"Step 3 is still .*save:commit, .*Ask again"):
            handle.result(timeout=0.0)
        goes_on.set()
        assert handle.result().step == 3


def test_a_policy_of_the_other_kind_is_refused_where_it_is_joined() -> None:
    for keep in (dd.latest(1), dd.latest(1) | dd.every_n_steps(2)):
        for other in (dd.every_steps(3), None):
            with pytest.raises(errors.InvalidArgumentError, match=r"keep must be a policy"):
                keep | other  # type: ignore[operator]
    for save_when in (dd.every_steps(2), dd.every_steps(2) | dd.every_steps(3)):
        for other in (dd.latest(3), None):
            with pytest.raises(errors.InvalidArgumentError, match=r"save_when must be a policy"):
                save_when | other  # type: ignore[operator]


def test_a_policy_of_ones_own_may_return_a_list(tmp_path: Path) -> None:
    class Even:
        def keep(self, steps: Sequence[int]) -> Any:
            return [step for step in steps if step % 2 == 0]

    for keep in (Even(), dd.latest(1) | Even()):  # type: ignore[operator]
        with dd.Checkpointer(tmp_path / "run", keep=keep) as ckpt:
            for step in range(4):
                ckpt.save(step, state=STATE).result()
            assert ckpt.all_steps() == [0, 2, 3]
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("save_concurrent_bytes", "1"),
        ("save_concurrent_bytes", 0.5),
        ("restore_concurrent_bytes", 0),
        ("single_replica_restore", "no"),
    ],
)
def test_an_option_of_another_type_is_refused(name: str, value: Any) -> None:
    with pytest.raises(errors.InvalidArgumentError, match=rf"Options\.{name} .*{value!r}"):
        dd.Options(**{name: value})


@pytest.mark.parametrize(
    ("root", "text"),
    [
        (None, "must be a path, not None"),
        ("~/run", re.escape(f"Use {os.path.expanduser('~/run')!r}")),
        ("gs:/bucket/run", "Use 'gs://bucket/run'"),
    ],
)
def test_what_is_no_root_is_told_what_is_one(root: Any, text: str) -> None:
    with pytest.raises(errors.InvalidArgumentError, match=text):
        dd.Checkpointer(root)


def test_what_differs_is_told_before_what_is_only_not_asked_for(tmp_path: Path) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state={f"n{number}": np.zeros(1) for number in range(300)}).result()
        with pytest.raises(errors.StructureMismatchError) as raised:
            ckpt.restore(state={"n5": np.ones(2)})
        first, *lines = str(raised.value).splitlines()
        assert first == "The target does not fit what was saved:"
        assert lines[0].startswith("  ! n5: saved with shape [1]")
        assert lines[1] == "  (not asked for, which is allowed: 299 more of the step)"
        assert len(lines) == 3
        with pytest.raises(errors.StructureMismatchError) as raised:
            ckpt.restore(state={"m5": np.ones(1)})
        first, *lines = str(raised.value).splitlines()
        assert lines[0] == "  + m5: in the target, not in the step"
        assert lines[1] == "  - n0: in the step, not in the target"
        assert lines[-2] == "  ... and 290 more"
        assert len(raised.value.unexpected) == 300
        with pytest.raises(errors.StructureMismatchError, match=r"\n  \+ the target is one leaf\n"):
            ckpt.restore(state=np.ones(1))


def test_hosts_with_other_states_are_told_how_to_compare_them() -> None:
    part = "the structure of the state"
    rows = [{"step": 1, "agreement": {part: text}, "digests": {}} for text in ("a", "b")]
    with pytest.raises(errors.PeerError, match=r"Host 1 .*jax\.tree\.map\(jax\.numpy\.shape"):
        check_agreement(rows)


def test_a_failed_agreement_says_of_which_call_it_was() -> None:
    def one(group: HostGroup) -> str:
        operation = group.begin("save of step 7", consequence=lambda phase: f"So much for {phase}.")
        error = OSError("on purpose") if group.index == 1 else None
        with pytest.raises(errors.CheckpointError) as raised:
            group.exchange("prepare", 1, error=error, timeout_seconds=20, within=operation)
        return str(raised.value)

    told = "save of step 7: host 1 failed in phase 'prepare': OSError: on purpose"
    first, second = SimulatedHosts(2).run(one)
    assert first == second == f"{told} So much for prepare."


def test_data_that_was_restored_without_is_told_when_it_is_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its records would come twice."""
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state=STATE, data={"a": Counter(0, 1), "b": Counter(0, 1)}).result()
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        report = ckpt.restore(data={"b": Counter(0, 1)}).report
        assert report.data_left == ("a",)
        assert "not asked for: the position of 'a'" in str(report)
        ckpt.save(2, state=STATE).result()  # nothing is wrong with it
        assert caplog.records == []
        with pytest.raises(errors.CheckpointError):  # it is told, and as if nothing had been
            ckpt.save(2, data={"a": Counter(0, 1)}).result()
        assert "'a', which restore() was not asked for" in caplog.messages[0]
        caplog.clear()
        for step in (3, 4):
            ckpt.save(step, state=STATE, data={"a": Counter(0, 1), "b": Counter(0, 1)}).result()
        [record] = caplog.records
        assert "step 1 has a position of 'a', which restore() was not asked for" in record.message
        assert "step 3 is saved" in record.message
        report = ckpt.restore(data={"a": Counter(0, 1), "b": Counter(0, 1)}).report
        assert report.data_left == ()
        with pytest.raises(errors.PositionError, match=r"data=\{'a': loader\} takes that one"):
            ckpt.restore(data={"c": Counter(0, 1)})


def test_a_part_of_the_state_that_was_not_asked_for_is_told_when_it_is_saved_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = {"params": np.ones(3), "opt": {"mu": np.ones(3), "nu": np.ones(3)}}
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state=whole).result()
        assert ckpt.restore().report.state_left == ()
        report = ckpt.restore(state={"params": np.ones(3)}).report
        assert report.state_left == ("opt/mu", "opt/nu")
        assert "not asked for: 2 leaves of the state: opt/mu, opt/nu" in str(report)
        assert caplog.records == []
        for step in (2, 3):
            ckpt.save(step, state={"params": np.ones(3), "opt": {"mu": np.ones(3)}}).result()
        [record] = caplog.records
        assert "step 2 is saved without a leaf of the state: opt/nu, which the" in record.message
        caplog.clear()
        ckpt.restore(step=1, state={"params": np.ones(3)})
        ckpt.save(4, state=whole).result()
        assert caplog.records == []


def test_who_goes_back_to_a_step_is_told_of_the_newer_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with dd.Checkpointer(tmp_path / "run", keep=dd.latest(3)) as ckpt:
        for step in (10, 20, 30):
            ckpt.save(step, state=STATE).result()
    with dd.Checkpointer(tmp_path / "run", keep=dd.latest(3)) as ckpt:
        ckpt.restore(step=10)
        assert caplog.records == []
        for step in (11, 12):
            ckpt.save(step, state=STATE).result()
        [record] = caplog.records
        assert "what is saved now is below step 30, which is there" in record.message
        for step in (20, 30):
            ckpt.delete(step)
        caplog.clear()
        ckpt.save(13, state=STATE).result()
        assert caplog.records == [] and ckpt.all_steps() == [12, 13]


def test_a_newer_step_that_is_damaged_is_not_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No restore takes that one."""
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        for step in (1, 5):
            ckpt.save(step, state=STATE).result()
    next((tmp_path / "run" / "5" / "state").glob("d/*")).unlink()
    with dd.Checkpointer(tmp_path / "run", keep=dd.latest(9)) as ckpt:
        assert ckpt.restore().step == 1
        caplog.clear()
        ckpt.save(2, state=STATE).result()
        ckpt.save(4, state=STATE).result()
        ckpt.restore()
        shutil.rmtree(tmp_path / "run" / "4")
        ckpt.save(3, state=STATE).result()
    assert "which is there" not in caplog.text


def test_what_a_restore_that_failed_has_left_is_not_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = {"a": np.ones(3), "b": np.ones(3)}
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, state=whole, data=Counter(0, 1)).result()
        used = Counter(0, 1)
        next(used)
        with pytest.raises(errors.PositionError):
            ckpt.restore(state={"a": np.ones(3)}, data={"other": used})
        ckpt.save(2, state={"a": np.ones(3)}, data=Counter(0, 1)).result()
    assert caplog.records == []


def test_what_cannot_be_read_beside_no_step_and_what_is_ours_is_not_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`lost+found`, where a file system is mounted; a save that did not end."""
    who = os.geteuid()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for part, inside in (
            ("lost+found", "_METADATA"),
            (fmt.aside_name(0, "staging", "ab" * 8), "_METADATA"),
        ):
            (root / part).mkdir()
            (root / part / inside).touch()
        (root / "3.orbax-checkpoint-tmp-5" / "_METADATA").mkdir(parents=True)
        (root / "lost+found").chmod(0)
        root.chmod(0o777)
        try:
            if who == 0:
                os.seteuid(65534)  # root may read anything
            with dd.Checkpointer(root) as ckpt:
                assert ckpt.try_restore() is None
        finally:
            os.seteuid(who)
    assert not [record for record in caplog.records if "plain Orbax wrote" in record.message]


@pytest.mark.parametrize("name", ["ckpt_7", ""])
def test_what_plain_orbax_has_under_other_names_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """A job would begin anew without a word."""
    with ocp.StandardCheckpointer() as plain:
        plain.save(tmp_path / "run" / name, STATE)
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        assert ckpt.try_restore(state=STATE) is None
    [record] = caplog.records
    assert f"plain Orbax wrote ({name or 'the root itself is'}" in record.message


def test_data_that_was_restored_otherwise_is_not_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In two calls, whichever comes first; or long before an older step was looked at."""
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        for step in (1, 2):
            data = {"a": Counter(0, 1), "b": Counter(0, 1)}
            ckpt.save(step, state=STATE, data=data).result()
    for first, second in (({}, {"a", "b"}), ({"a", "b"}, {}), ({"a"}, {"b"})):
        with dd.Checkpointer(tmp_path / "run") as ckpt:
            data = {"a": Counter(0, 1), "b": Counter(0, 1)}
            for names in (first, second):
                ckpt.restore(data={name: data[name] for name in names} or None)
            ckpt.save(3, state=STATE, data=data).result()
            ckpt.restore(step=1, state=STATE)
            ckpt.save(4, state=STATE, data=data).result()
            ckpt.delete(3)
            ckpt.delete(4)
    assert [record.message for record in caplog.records] == []


def test_the_handler_has_no_data_that_could_be_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with OrbaxCheckpointHandler() as handler:
        handler.save(tmp_path, Counter(0, 1), step=1)
        handler.restore(tmp_path, Counter(0, 1))
        handler.save(tmp_path, Counter(0, 1), step=2)
    assert [record.message for record in caplog.records] == []


def test_a_step_is_no_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(12, state=STATE)
    step = tmp_path / "run" / "12"
    before = sorted(path.name for path in step.iterdir())
    for act in (
        lambda ckpt: ckpt.try_restore(),
        lambda ckpt: ckpt.all_steps(),
        lambda ckpt: ckpt.save(50, state=STATE),
    ):
        with dd.Checkpointer(step) as ckpt:
            with pytest.raises(errors.InvalidArgumentError) as raised:
                act(ckpt)
            assert f"The root is {tmp_path}/run, it seems; restore(step=12)" in str(raised.value)
    assert sorted(path.name for path in step.iterdir()) == before
    for verb in ("ls", "doctor"):
        assert main([verb, str(step)]) != 0
        told = "".join(capsys.readouterr())
        assert f"The root is {tmp_path}/run" in told


def test_a_donated_array_is_named_before_anything_is_written(tmp_path: Path) -> None:
    donated = jnp.ones(3)
    jax.jit(lambda x: x + 1, donate_argnums=0)(donated)
    if not donated.is_deleted():  # not every platform donates
        donated.delete()
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        with pytest.raises(errors.UnsupportedLeafError, match="Was it donated") as raised:
            ckpt.save(1, state={"a": {"w": donated}})
        assert raised.value.path == "a/w"


@pytest.mark.parametrize(
    ("depth", "has_leaf"),
    [(201, True), (500, True), (700, True), (50_000, True), (700, False), (50_000, False)],
)
def test_a_state_that_is_nested_too_deep_is_told_before_anything_is_written(
    tmp_path: Path, depth: int, has_leaf: bool
) -> None:
    state: Any = [jnp.ones(3)] if has_leaf else []
    for _ in range(depth - 1):
        state = [state]
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        with pytest.raises(errors.UnsupportedLeafError, match="at most 200 deep"):
            ckpt.save(1, state=state)
        assert not (tmp_path / "run" / "1").exists() and ckpt.all_steps() == []
        while depth > 200:
            state, depth = state[0], depth - 1
        ckpt.save(2, state=state).result()
        assert jax.tree.structure(ckpt.restore().state) == jax.tree.structure(state)


@jax.tree_util.register_pytree_node_class
class Link:
    """A container that is none of Python's."""

    def __init__(self, *inside: Any) -> None:
        self.inside = inside

    def tree_flatten(self) -> Any:
        return self.inside, None

    @classmethod
    def tree_unflatten(cls, _: Any, inside: Any) -> Link:
        return cls(*inside)


def _linked(depth: int, *inside: Any) -> Link:
    state = Link(*inside)
    for _ in range(depth - 1):
        state = Link(state)
    return state


@pytest.mark.parametrize("inside", [(jnp.ones(3),), ()])
@pytest.mark.parametrize("depth", [202, 700])
def test_containers_of_ones_own_are_not_nested_too_deep_either(
    tmp_path: Path, depth: int, inside: Any
) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        with pytest.raises(errors.UnsupportedLeafError, match="at most 200 deep") as raised:
            ckpt.save(1, state={"some": [1], "w": _linked(depth, *inside)})
        assert raised.value.path == "/".join(["w", *["0"] * 200])
        with pytest.raises(errors.UnsupportedLeafError, match="at most 200 deep"):
            dd.tree_digest(_linked(depth, *inside))
        ckpt.save(2, state=_linked(200, *inside)).result()
        assert isinstance(ckpt.restore(state=_linked(200, *inside)).state, Link)


_DEEPER = """
import sys
sys.path.insert(0, sys.argv[1])
from flax import nnx
import datarax_dist as dd
from datarax_dist import errors
from test_mistakes import _linked
state = _linked(50_000, 1)
with dd.Checkpointer(sys.argv[2]) as ckpt:
    ckpt.save(1, state={"w": 1}).result()
    for call in (lambda: ckpt.save(2, state=state), lambda: ckpt.restore(state=state)):
        try:
            call()
        except errors.UnsupportedLeafError:
            print("told")
    print(ckpt.restore().state)
"""


def test_jax_does_not_walk_through_what_would_fill_its_stack_for_good(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _DEEPER, str(Path(__file__).parent), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.stdout.split("\n")[:-1], done.returncode) == (
        ["told", "told", "{'w': 1}"],
        0,
    ), done.stderr


def test_a_state_that_holds_itself_is_told(tmp_path: Path) -> None:
    state: list[Any] = [jnp.ones(3)]
    state += [state, state]
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        with pytest.raises(errors.UnsupportedLeafError, match="at most 200 deep"):
            ckpt.save(1, state=state)


def test_a_name_that_is_too_long_for_the_storage_is_told_before_anything_is_written(
    tmp_path: Path,
) -> None:
    array = np.ones((2, 3), np.float32)
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        for name, leaf in (("x" * 65_536, array), ("ä" * 32_768, jnp.ones(()))):
            with pytest.raises(errors.UnsupportedLeafError, match="is too long") as raised:
                ckpt.save(1, state={"a": {name: leaf}})
            assert raised.value.path == f"a/{name}" and len(str(raised.value)) < 400
        state = {"a": {"x" * 65_509: array, "y" * 65_400: jnp.asarray(array)}}
        ckpt.save(1, state=state).result()
        assert dd.tree_digest(ckpt.restore().state) == dd.tree_digest(state)


@pytest.mark.parametrize("dtype", ["int1", "uint1", "uint2", "uint4"])
def test_an_array_of_a_type_that_cannot_be_stored_is_told(tmp_path: Path, dtype: str) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        with pytest.raises(errors.UnsupportedLeafError, match=f"array of {dtype} cannot be saved"):
            ckpt.save(1, state={"w": np.zeros(3, dtype)})


def test_nothing_is_read_of_keys_of_all_hosts_of_which_there_are_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No host could: it has no part of their numbers."""
    none = jax.random.split(jax.random.key(1), 3)[:0]
    monkeypatch.setattr(jax.random, "key_data", lambda _: pytest.fail("their numbers are read"))
    [leaf] = trees.plan_state({"keys": none}, 2).spec.leaves
    assert (leaf.kind, leaf.shape) == ("empty", (0,))


def test_a_save_inside_of_what_is_jitted_is_told(tmp_path: Path) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:

        @jax.jit
        def step(x: jax.Array) -> jax.Array:
            ckpt.save(1, state={"w": x})
            return x

        with pytest.raises(errors.UnsupportedLeafError, match=r"w: .* Save outside"):
            step(jnp.ones(3))


def test_hosts_that_have_not_made_the_call_are_told_of_while_they_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hosts, "_TOLD_SECONDS", 0.0)
    is_told = threading.Event()

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            is_told.set()

    handler = Told()
    logging.getLogger("datarax_dist").addHandler(handler)

    def one(group: HostGroup) -> Any:
        assert group.index != 1 or is_told.wait(20)
        return group.exchange("list", group.index, timeout_seconds=20)

    try:
        assert SimulatedHosts(2).run(one) == [[0, 1], [0, 1]]
    finally:
        logging.getLogger("datarax_dist").removeHandler(handler)
    [record] = caplog.records
    told = "list: waiting for host 1 to make the same call, on the same root; without it, this is"
    assert record.getMessage().startswith(told)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_a_host_that_does_not_know_of_the_others_is_told(tmp_path: Path) -> None:
    code = f"import datarax_dist as dd\nfor _ in 'ab': dd.Checkpointer({str(tmp_path)!r}).close()"
    told = run(code, JAX_NUM_PROCESSES="2").stderr
    assert told.count("jax.distributed.initialize() was not called") == 1
    assert run(code, JAX_NUM_PROCESSES="1").stderr == ""


def test_a_fault_that_is_none_is_told(tmp_path: Path) -> None:
    code = (
        "import datarax_dist as dd, numpy as np\n"
        f"dd.Checkpointer({str(tmp_path)!r}).save(1, state=np.ones(3))"
    )
    told = run(code, DATARAX_DIST_KILL_AT="nonsense").stderr
    assert "must be PHASE@HOST or PHASE@HOST#OCCURRENCE, such as save:record@1" in told


def test_the_names_of_the_package_are_listed() -> None:
    code = "import datarax_dist, sys; print(dir(datarax_dist), 'jax' in sys.modules)"
    told = run(code).stdout
    assert "'Checkpointer'" in told and "'testing'" in told and told.endswith("False\n")


def test_a_file_is_no_root_for_the_doctor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["doctor", str(tmp_path / "file")]) != 0
    assert f"{tmp_path}/file is no directory" in capsys.readouterr().out


def test_a_root_that_cannot_be_written_is_denied_for_the_doctor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: str, *rest: Any, **more: Any) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "makedirs", refused)
    assert main(["doctor", "--write", str(tmp_path)]) == 12
    assert "check the owner and the mode" in capsys.readouterr().out
