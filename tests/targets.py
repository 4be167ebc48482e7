"""What the tests run on each host; `run_hosts` imports them by name."""

from __future__ import annotations

from typing import Any

import numpy as np

PRIMARY_PHASES = (  # that no other host has
    "save:stage",
    "save:claim",
    "save:verify",
    "save:publish",
    "save:commit",
    "save:committed",
    "save:retire",
)


def mesh_state(shape: tuple[int, ...], names: tuple[str, ...], seed: int = 0) -> Any:
    """A state with sharded, replicated and host-local leaves, and of every kind that a user may
    have.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()).reshape(shape), names)

    def sharded(array: np.ndarray, *axes: Any) -> jax.Array:
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    random = np.random.default_rng(seed)
    w = random.standard_normal((16, 24)).astype(np.float32)
    b = random.standard_normal(24).astype(np.float32)
    keys = jax.random.split(jax.random.key(seed), 16)
    data = np.asarray(jax.random.key_data(keys))
    key_sharding = NamedSharding(mesh, PartitionSpec(names[0]))
    return {
        "params": {
            "w": sharded(w, names[0], names[-1] if len(names) > 1 else None),
            "b": sharded(b),
        },
        "big": sharded(
            random.standard_normal((64, 1024)).astype(np.float32), names[0]
        ),  # large enough for a data file
        "half": sharded(w.astype(jnp.bfloat16), None, names[-1]),
        "keys": jax.jit(jax.random.wrap_key_data, out_shardings=key_sharding)(
            sharded(data, names[0])
        ),
        "key": jax.random.key(seed),
        "rbg": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
        "count": jnp.int32(seed),
        "numpy": random.integers(0, 9, (3, 2)),
        "zero": np.zeros((0, 3), np.float32),
        "scalar": np.float64(0.25),
        "step": 12 + seed,
        "name": "größe",
        "raw": b"\x00\xff",
        "nothing": None,
        "nested": [1.5, (True, 2**80)],
    }


class Counter:
    """A loader: its position is how many it has given."""

    def __init__(self, shard: int, count: int, records: int = 1000) -> None:
        self.shard, self.count, self.records, self.at = shard, count, records, 0

    def __iter__(self) -> Counter:
        return self

    def __next__(self) -> np.ndarray:
        record = self.shard + self.at * self.count
        if record >= self.records:
            raise StopIteration
        self.at += 1
        return np.asarray([record])

    def get_state(self) -> dict[str, int]:
        return {"at": self.at}

    def set_state(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Thing:
    """A state of one's own, of any form."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def get_state(self) -> Any:
        return self.state

    def set_state(self, state: Any) -> None:
        self.state = state


def save_steps(
    root: str, shape: tuple[int, ...], names: tuple[str, ...], steps: list[int], **keywords: Any
) -> Any:
    """Saves `steps`; returns each step's digest and this host's last batch."""
    import datarax_dist as dd

    digests = {}
    batches = dd.data.shards(Counter, 8)
    opaque = Counter(0, 1)
    last = []
    with dd.Checkpointer(root, **keywords) as ckpt:
        for step in steps:
            last = next(batches).tolist()
            next(opaque)
            state = mesh_state(shape, names, step)
            digests[step] = dd.tree_digest(state)
            handle = ckpt.save(
                step,
                state=state,
                data={"batches": batches, "opaque": opaque},
                metadata={"step": step},
            )
            assert handle is not None
            handle.result(60)
        return digests, last, ckpt.all_steps()


def restore_step(
    root: str,
    shape: tuple[int, ...],
    names: tuple[str, ...],
    step: int | None = None,
    target: bool = True,
) -> Any:
    """Restores; returns step, digest, next batch, and what the report says."""
    import datarax_dist as dd

    batches = dd.data.shards(Counter, 8)
    with dd.Checkpointer(root) as ckpt:
        state = mesh_state(shape, names, 99) if target else None
        restored = ckpt.restore(step=step, state=state, data={"batches": batches})
        digest = dd.tree_digest(restored.state)
        return (
            restored.step,
            digest,
            next(batches).tolist(),
            dict(restored.report.refused),
            ckpt.all_steps(),
            restored.metadata,
        )


def fail_one(root: str, phase: str, host: int) -> Any:
    """Fails one host in a phase of the second save; returns how long each step took to end, and how
    it ended.
    """
    import time

    import datarax_dist as dd
    from datarax_dist.testing import faults

    outcomes = []
    with dd.Checkpointer(root) as ckpt:
        for step in (1, 2, 3):
            state = mesh_state((-1,), ("x",), step)
            begin = time.monotonic()
            error = OSError(28, "No space left on device")
            with (
                faults.fail_at(phase, host, error)
                if step == 2
                else faults.fail_at(phase, 10**6, error)
            ):
                try:
                    ckpt.save(step, state=state).result(60)
                    outcomes.append(("ok", "", {}, time.monotonic() - begin))
                except dd.errors.PeerError as failure:
                    outcomes.append(
                        (
                            type(failure).__name__,
                            failure.phase,
                            dict(failure.failures),
                            time.monotonic() - begin,
                        )
                    )
        return outcomes, ckpt.all_steps()


def handler_save(root: str) -> Any:
    """Hosts at different positions save and restore an iterator and a mixed tree."""
    import jax

    import datarax_dist as dd
    from datarax_dist.checkpoint import OrbaxCheckpointHandler

    counter = Counter(0, 1)
    counter.at = 8 + 4 * jax.process_index()
    mixed = mesh_state((-1,), ("x",), 1) | {
        "mine": np.full(3, jax.process_index()),
        "own": jax.random.key(jax.process_index()),
    }
    with OrbaxCheckpointHandler() as handler:
        handler.save(root, counter, step=1)
        handler.save(root + "/mixed", mixed, step=1)
        fresh = Counter(0, 1)
        handler.restore(root, fresh)
        plain = handler.restore(root)
        back = handler.restore(root + "/mixed", mixed)
        same = all(
            type(a) is type(b) and (dd.tree_digest([a]) == dd.tree_digest([b]))
            for a, b in zip(jax.tree.leaves(mixed), jax.tree.leaves(back), strict=True)
        )
    return fresh.at, plain["at"], same


def handler_parts(root: str) -> Any:
    """Returns for parts of a mixed tree whether they came back, and of which arrays each was read
    from.
    """
    import datarax_dist as dd
    from datarax_dist.arrays.engine import OrbaxArrays
    from datarax_dist.checkpoint import OrbaxCheckpointHandler

    asked: list[str] = []
    restore = OrbaxArrays.restore

    def seen(self: Any, step: Any, spec: Any, wanted: Any, *args: Any, **options: Any) -> Any:
        asked.extend(leaf.name for leaf, _ in wanted)
        return restore(self, step, spec, wanted, *args, **options)

    mixed = mesh_state((-1,), ("x",), 1) | {"mine": np.full(3, 7)}
    parts = [{"params": mixed["params"], "mine": mixed["mine"]}, {"mine": mixed["mine"]}]
    outcomes = []
    with OrbaxCheckpointHandler() as handler:
        handler.save(root, mixed, step=1)
        OrbaxArrays.restore = seen  # type: ignore[method-assign]
        for part in parts:
            asked.clear()
            back = handler.restore(root, part)
            outcomes.append((dd.tree_digest(back) == dd.tree_digest(part), sorted(asked)))
    return outcomes


def handler_buffers(root: str) -> Any:
    """Returns what each host gets back of states of one's own, of which one host has nothing for
    itself alone; and an array that is to be on one host's device.
    """
    import jax

    from datarax_dist.checkpoint import OrbaxCheckpointHandler

    me, found = jax.process_index(), []
    w = mesh_state((-1,), ("x",), 1)["params"]["w"]
    deep: Any = me
    for _ in range(150):
        deep = [deep]
    states: list[Any] = [{"buffer": [5] * me}, {"w": w, "buffer": [5] * me}, None, deep]
    there = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # of host 0
    with OrbaxCheckpointHandler() as handler:
        for number, state in enumerate(states):
            handler.save(f"{root}/{number}", Thing(state), step=1)
            got = handler.restore(f"{root}/{number}", Thing(None)).state
            found.append({"buffer": got["buffer"]} if isinstance(got, dict) else got == state)
        handler.save(f"{root}/there", {"a": np.ones(4, np.float32)}, step=1)
        abstract = jax.ShapeDtypeStruct((4,), np.float32, sharding=there)
        back = handler.restore(f"{root}/there", {"a": abstract})
        found.append(len(back["a"].addressable_shards))
    return found


def handler_restore(root: str) -> Any:
    """Restores on whatever hosts there are; returns the error."""
    from datarax_dist.checkpoint import OrbaxCheckpointHandler

    with OrbaxCheckpointHandler() as handler:
        try:
            return handler.restore(root, Counter(0, 1))
        except Exception as error:
            return type(error).__name__, str(error)


def expected_digest(step: int) -> str:
    """The digest of the state of `step`, which does not depend on the mesh: computed on this
    process's devices.
    """
    import jax

    import datarax_dist as dd

    return dd.tree_digest(mesh_state((len(jax.devices()),), ("x",), step))


def save_and_retain(root: str, steps: list[int]) -> Any:
    """Saves `steps`, keeping two."""
    import jax

    import datarax_dist as dd

    jax.devices()
    return save_steps(root, (-1,), ("x",), steps, keep=dd.latest(1))


class Boom(Counter):
    def get_state(self) -> dict[str, int]:
        raise RuntimeError("boom")


def disagree(root: str) -> Any:
    """One host names another step, has another value, has a failing loader; asks for no step."""
    import time

    import jax

    import datarax_dist as dd

    me = jax.process_index()
    seen = []
    with dd.Checkpointer(root) as ckpt:
        state = mesh_state((-1,), ("x",), 1)
        wrong = state | {"count": jax.numpy.int32(me)}
        devices = [d for d in jax.devices() if d.process_index == 0]
        mesh = jax.sharding.Mesh(np.array(devices), ("x",))
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        there = jax.make_array_from_callback(
            (4,), place, lambda index: np.ones(4, np.float32)[index], dtype=np.float32
        )
        calls = [
            (7, state | {"there": there}, None),
            (7 + me, state, None),
            (7, wrong, None),
            (7, state, Boom(0, 1) if me else Counter(0, 1)),
        ]
        for step, tree, data in calls:
            try:
                ckpt.save(step, state=tree, data=data)
                text = "saved"
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
            seen.append((text, ckpt.all_steps()))
        for ask in (lambda step: ckpt.restore(step=step), ckpt.step_info, ckpt.delete):
            begin = time.monotonic()
            try:
                ask(-1 if me else 7)
                text = "done"
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
            seen.append((text, time.monotonic() - begin))
    return seen


def conform() -> Any:
    """Runs the host-group checks on real hosts."""
    from datarax_dist.hosts import current_group
    from datarax_dist.testing import check_host_group

    return check_host_group(current_group("conformance"))


def full_disk_on(root: str, host: int) -> Any:
    """On one host every write of more than a little fails, for the second of three saves."""
    import resource
    import time

    import jax

    import datarax_dist as dd

    seen = []
    with dd.Checkpointer(root) as ckpt:
        for step in (1, 2, 3):
            state = mesh_state((-1,), ("x",), step)
            small = 20_000 if step == 2 and jax.process_index() == host else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (small, resource.RLIM_INFINITY))
            begin = time.monotonic()
            try:
                ckpt.save(step, state=state).result(60)
                seen.append("saved")
            except dd.errors.PeerError as error:
                seen.append((str(error), dict(error.failures), time.monotonic() - begin))
        return seen, ckpt.all_steps()


def policy_fails(root: str) -> Any:
    """A save policy that raises on host 1 only: what each host is told, and that the next works."""
    import jax

    import datarax_dist as dd

    class Policy:
        broken = False

        def should_save(self, step: int) -> bool:
            if self.broken:
                raise OSError(2, "the policy's own file")
            return True

    policy, told = Policy(), ""
    with dd.Checkpointer(root, save_when=policy) as ckpt:
        policy.broken = jax.process_index() == 1
        try:
            ckpt.save(1, state={"x": np.ones(3)})
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
        policy.broken = False
        ckpt.save(2, state={"x": np.ones(3)})
        ckpt.wait_until_finished()
        steps, left = ckpt.all_steps(), ""
        if jax.process_index() == 0:  # the other one has closed, or will in a moment
            try:
                ckpt.save(3, state={"x": np.ones(3)})
            except dd.errors.PeerError as error:
                left = str(error)
        return told, steps, left


def given_up_write(root: str) -> Any:
    """Host 1 hangs in Orbax beyond the deadline of save 1, and goes on in the middle of save 2."""
    import threading

    import jax

    import datarax_dist as dd
    from datarax_dist.arrays.engine import Engine

    first, release = threading.Event(), threading.Event()
    real = Engine._barrier

    def barrier(engine: Any, *, key: str, timeout_ms: int) -> None:
        if jax.process_index() == 1 and not first.is_set():
            first.set()
            release.wait(60)
        real(engine, key=key, timeout_ms=timeout_ms)

    Engine._barrier = barrier  # type: ignore[method-assign]
    told = ""
    with dd.Checkpointer(root, options=dd.Options(save_timeout_seconds=4)) as ckpt:
        handle = ckpt.save(1, state=mesh_state((-1,), ("x",), 1))
        assert handle is not None
        try:
            handle.result(60)
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
        handle = ckpt.save(2, state=mesh_state((-1,), ("x",), 2))
        release.set()
        assert handle is not None
        handle.result(60)
        restored = ckpt.restore(state=mesh_state((-1,), ("x",), 9))
        return (
            told,
            restored.step,
            dd.tree_digest(restored.state) == dd.tree_digest(mesh_state((-1,), ("x",), 2)),
        )


def save_what_is_free(root: str, steps: list[int]) -> Any:
    """Saves each step that no other job saves; returns how each ended."""
    import jax

    import datarax_dist as dd

    count, outcomes = jax.device_count(), []
    with dd.Checkpointer(root) as ckpt:
        for step in steps:
            batches = dd.data.shards(Counter, 8)
            try:
                handle = ckpt.save(
                    step,
                    state=mesh_state((count,), ("x",), step),
                    data={"batches": batches},
                    metadata={"step": step},
                )
                assert handle is not None
                handle.result(60)
            except dd.errors.CheckpointError as error:
                outcomes.append((step, type(error).__name__))
            else:
                outcomes.append((step, "saved"))
    return outcomes


def restore_and_go_on(root: str) -> Any:
    """Restores the newest step that is good, and saves the one after it; returns both, and what the
    report says.
    """
    import jax

    import datarax_dist as dd

    jax.devices()
    batches = dd.data.shards(Counter, 8)
    with dd.Checkpointer(root) as ckpt:
        state = mesh_state((-1,), ("x",), 99)
        restored = ckpt.restore(state=state, data={"batches": batches})
        digest = dd.tree_digest(restored.state)
        step = restored.step + 1
        next(batches)
        handle = ckpt.save(
            step, state=mesh_state((-1,), ("x",), step + 100), data={"batches": batches}
        )
        assert handle is not None
        handle.result(60)
        return restored.step, digest, dict(restored.report.refused), restored.report.suspects


def restore_slowly(root: str, begun: str, go_on: str) -> Any:
    """Restores, and stands still in the middle of it. `begun` and `go_on` are FIFOs."""
    import pathlib

    from datarax_dist import telemetry

    def wait(phase: str, host: int) -> None:
        if phase == "restore:load":
            pathlib.Path(begun).write_text("begun")
            pathlib.Path(go_on).read_text()

    telemetry.observe(wait)
    return restore_step(root, (-1,), ("x",))[0]


def killed_in_a_save(root: str, silence_seconds: float) -> Any:
    """Saves a step, in which host 1 is killed; returns how soon that was told, and how."""
    import os
    import signal
    import time

    import jax

    import datarax_dist as dd
    from datarax_dist import telemetry

    me = jax.process_index()
    options = dd.Options(peer_silence_seconds=silence_seconds)
    with dd.Checkpointer(root, options=options) as ckpt:
        ckpt.save(1, state=mesh_state((-1,), ("x",), 1)).result(60)  # type: ignore[union-attr]
        if me == 1:
            telemetry.observe(
                lambda phase, _: phase == "save:record" and os.kill(os.getpid(), signal.SIGKILL)
            )
        handle = ckpt.save(2, state=mesh_state((-1,), ("x",), 2))
        begin = time.monotonic()
        try:
            handle.result(60)  # type: ignore[union-attr]
        except dd.errors.PeerLostError as error:
            return time.monotonic() - begin, str(error)
    raise AssertionError("the save has not failed")


def interrupted(root: str, pid: str, heard: str) -> Any:
    """Host 1 gets SIGINT while hosts agree on step 2, and while it waits for step 3, and goes on.
    Returns how each call ended. `pid` is a file, `heard` a FIFO.
    """
    import os
    import pathlib
    import signal
    import threading

    import jax

    import datarax_dist as dd
    from datarax_dist import telemetry

    me = jax.process_index()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    if me == 1:
        pathlib.Path(pid).write_text(str(os.getpid()))
    ended: list[Any] = []

    def send(phase: str, host: int) -> None:
        if phase == "save:stage":  # on host 0, when host 1 waits for what it decides
            os.kill(int(pathlib.Path(pid).read_text()), signal.SIGINT)
            pathlib.Path(heard).read_text()

    with dd.Checkpointer(root) as ckpt:
        ckpt.save(1, state=mesh_state((-1,), ("x",), 1)).result(60)  # type: ignore[union-attr]
        remove = telemetry.observe(send)
        try:
            ckpt.save(2, state=mesh_state((-1,), ("x",), 2))
        except KeyboardInterrupt:
            pathlib.Path(heard).write_text("heard")
            ended.append("interrupted")
        except dd.errors.PeerError as error:
            ended.append((type(error).__name__, dict(error.failures)))
        remove()
        waits = threading.Event()
        if me == 1:
            telemetry.observe(
                lambda phase, _: (
                    phase == "save:record"
                    and waits.wait(60)
                    and os.kill(os.getpid(), signal.SIGINT)
                )
            )
        handle = ckpt.save(3, state=mesh_state((-1,), ("x",), 3))
        try:
            waits.set()
            ended.append(handle.result(60).step)  # type: ignore[union-attr]
        except KeyboardInterrupt:
            ended.append("interrupted")
        ckpt.wait_until_finished()
        return ended, ckpt.all_steps()


_REPLICATED = {  # dtype, shape, axes of a mesh ("data", "model")
    "weights": ("float32", (4096, 1024), ()),
    "split": ("float32", (2048, 1024), (None, "model")),
    "half": ("bfloat16", (1024, 3, 1024), ()),
    "bytes": ("int8", (1 << 20, 2), ()),
    "eight": ("float8_e4m3fn", (2048, 1024), ()),
    "flags": ("bool", (2048, 1024), ()),
    "complex": ("complex64", (512, 512), ()),
    "odd": ("float32", (1025, 1023), ()),  # no part of it fits
    "small": ("float32", (8,), ()),
    "sharded": ("float32", (2048, 512), ("data",)),
}


def replicated_state() -> Any:
    """A state of which most is the same on all hosts; every bit pattern is in it."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    hosts = jax.process_count()
    mesh = Mesh(np.array(jax.devices()).reshape(hosts, -1), ("data", "model"))
    random = np.random.default_rng(0)

    def make(dtype: str, shape: tuple[int, ...], axes: tuple[Any, ...]) -> jax.Array:
        bits = random.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        if dtype == "bool":
            bits = bytes(byte & 1 for byte in bits)
        array = np.frombuffer(bits, dtype).reshape(shape)
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.make_array_from_callback(shape, sharding, lambda index: array[index])

    return {name: make(*row) for name, row in _REPLICATED.items()}


def _bytes_read() -> int:
    """What this process has asked the kernel for, by system calls."""
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


def save_replicated(root: str) -> Any:
    import datarax_dist as dd

    with dd.Checkpointer(root) as ckpt:
        ckpt.save(1, state=replicated_state(), metadata={"one": 1}).result(60)  # type: ignore[union-attr]


def restore_replicated(root: str, single: tuple[bool, ...], verify: Any) -> Any:
    """Returns how many bytes this host has read, which leaves are not as they were, and the phases
    of the restore.

    Args:
        single: `Options.single_replica_restore` of each host.
    """
    import jax

    import datarax_dist as dd

    options = dd.Options(
        single_replica_restore=single[jax.process_index()],
        verify_on_restore=verify,
        peer_silence_seconds=3,
    )
    state = replicated_state()
    target = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in state.items()
    }
    with dd.Checkpointer(root, options=options) as ckpt:
        before = _bytes_read()
        restored = ckpt.restore(state=target)
        size = _bytes_read() - before
    wrong = [
        name
        for name, leaf in restored.state.items()
        if leaf.sharding != state[name].sharding
        or any(
            np.asarray(mine.data).tobytes() != np.asarray(other.data).tobytes()
            for mine, other in zip(
                leaf.addressable_shards, state[name].addressable_shards, strict=True
            )
        )
    ]
    return size, wrong, sorted(restored.report.seconds)


def killed_in_a_gather(root: str) -> Any:
    """Restores, in which host 1 is killed while arrays are passed on; returns what that told."""
    import time

    import datarax_dist as dd
    from datarax_dist.testing import kill_at

    begin = time.monotonic()
    try:
        with kill_at("restore:gather", host=1):
            restore_replicated(root, (True, True), "full")
    except dd.errors.PeerLostError as error:
        return time.monotonic() - begin, str(error), error.missing
    raise AssertionError("the restore has not failed")


def failed_gather(root: str) -> Any:
    """Restores, in which host 1 lacks memory before arrays are passed on; then restores without
    that, and computes something with the other host.
    """
    import jax
    from jax.experimental import multihost_utils

    import datarax_dist as dd
    from datarax_dist.arrays import replicas

    host, compute, told = jax.process_index(), replicas._seen_as, ""

    def fails(*arguments: Any) -> Any:
        if host == 1:
            raise MemoryError("no memory on the device")
        return compute(*arguments)

    replicas._seen_as = fails  # type: ignore[assignment]
    try:
        restore_replicated(root, (True, True), "full")
    except dd.errors.PeerError as error:
        told = str(error)
    wrong = restore_replicated(root, (False, False), "full")[1]
    sums = [
        multihost_utils.process_allgather(np.array(100 * host + step)).tolist() for step in range(3)
    ]
    return told, wrong, sums
