"""Saves and restores through Orbax.

Orbax's `AsyncCheckpointer` is used with settings under which it coordinates nothing by itself: each
host tells it that it is alone (`active_processes`), so its own barriers, some without a deadline,
are never entered; the one point at which hosts must meet (all arrays written, before the primary
merges) is our exchange. Directories are made beforehand, by the save protocol.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import json
import logging
import math
import os
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from etils.epath import backend as epath_backend
from etils.epath import gpath
from orbax.checkpoint._src.futures import future as orbax_futures
from orbax.checkpoint._src.futures import signaling_client
from orbax.checkpoint._src.handlers.base_pytree_checkpoint_handler import (
    BasePyTreeCheckpointHandler,
)
from orbax.checkpoint._src.metadata import array_metadata_store
from orbax.checkpoint._src.path import atomicity
from orbax.checkpoint._src.serialization import (
    jax_array_handlers,
    type_handler_registry,
    type_handlers,
)

from datarax_dist import direct
from datarax_dist import format as fmt
from datarax_dist.arrays import replicas
from datarax_dist.arrays.failures import wrapped
from datarax_dist.arrays.hooks import Gate, Written, gates, give_up
from datarax_dist.arrays.leaves import (
    bytes_of,
    check_kind,
    check_stored,
    elsewhere,
    fits,
    restore_args,
    spec_leaves,
    want,
)
from datarax_dist.arrays.sampling import compress_sample
from datarax_dist.boards import PatientClient
from datarax_dist.buckets import connecting
from datarax_dist.compression import EVERYTHING, NOTHING, Advisor, Choice
from datarax_dist.config import Options, is_bucket
from datarax_dist.errors import (
    CheckpointError,
    CorruptStepError,
    InvalidArgumentError,
    StorageError,
    cause,
    describe,
)
from datarax_dist.ocdbt import Extent, read_index
from datarax_dist.specs import LeafSpec, TreeSpec
from datarax_dist.storage import LocalStore

__all__ = ["NEEDED", "ORBAX_VERSION", "Engine", "OrbaxArrays"]

logger = logging.getLogger("datarax_dist")

ORBAX_VERSION = ocp.__version__
# What it makes on the primary when the arrays of all hosts are written.
_MANIFEST = "manifest.ocdbt"
NEEDED = ("state/_METADATA", f"state/{_MANIFEST}")
_BUCKET_FILE_BYTES = 128 << 20  # several are uploaded at the same time
_TENSORSTORE_SETTINGS = {
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "15",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
}
_OVERTAKEN = "Another save of this Checkpointer was begun before this call had returned."
_LATE_SECONDS = 1.0  # for other writes, when one of a save's has failed
_SAMPLES_PER_SAVE = 8  # each takes some milliseconds, before the save goes on
_Result = TypeVar("_Result")
_METADATA_OF_ARRAYS = "state/array_metadatas/"
_HOST_PART = re.compile(
    r"(?:.*/)?(?:ocdbt\.process_|array_metadatas/process_)([0-9]+)(?:_direct)?(?:/.*)?"
)


class _InPlace(atomicity.CommitFileTemporaryPath):
    """Writes where the save protocol says, into a directory that may be there already; never
    removes one.
    """

    async def create(self) -> Any:
        if is_bucket(str(self._tmp_path)):
            return self._tmp_path  # no directories there; and nobody waits for it here
        self._tmp_path.mkdir(parents=True, exist_ok=True)
        if self._checkpoint_metadata_store is not None:
            self._checkpoint_metadata_store.write(
                file_path=self._tmp_path / "_CHECKPOINT_METADATA", metadata={}
            )
        return self._tmp_path


def _type_handlers() -> Any:
    """Returns handlers of leaves that nobody else has. Those that Orbax shares in a process keep in
    themselves which keys they are writing, so that saves at the same time mix them up; and a
    program may have put others in their place.
    """
    scalars = type_handlers.ScalarHandler()
    arrays = jax_array_handlers.ArrayHandler(array_metadata_store=array_metadata_store.Store())
    return type_handler_registry.create_type_handler_registry(
        (int, scalars),
        (float, scalars),
        (bytes, scalars),
        (np.number, scalars),
        (np.ndarray, type_handlers.NumpyHandler()),
        (jax.Array, arrays),
        (str, type_handlers.StringHandler()),
        (type(ocp.PLACEHOLDER), type_handlers.PlaceholderHandler()),
    )


def _handler(
    processes: Any,
    options: Options,
    *,
    save_bytes: int | None = None,
    restore_bytes: int | None = None,
) -> ocp.PyTreeCheckpointHandler:
    # The outer class counts limits in whole GB and has one by default, which keeps Orbax from
    # writing all arrays in a single OCDBT transaction; the inner one takes bytes, and None.
    handlers = _type_handlers()
    inner = BasePyTreeCheckpointHandler(
        use_ocdbt=True,
        use_zarr3=True,
        use_compression=options.compression == "zstd",  # the hooks say of each array
        save_concurrent_bytes=save_bytes,
        restore_concurrent_bytes=restore_bytes,
        multiprocessing_options=processes,
        type_handler_registry=handlers,
    )
    # Every host may make the directory of its array metadata. By default the others wait ten
    # minutes for the primary to do so, even if that has failed.
    inner._array_metadata_store.set_primary_host(None)
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=True,
        use_zarr3=True,
        multiprocessing_options=processes,
        type_handler_registry=handlers,
        handler_impl=inner,
    )


def _at_least(limit: int | None, leaves: Sequence[Any]) -> int | None:
    """Orbax fails when one array is not smaller than its limit of bytes at a time, be it one that
    it does not write itself.
    """
    if limit is None:
        return None
    return max([limit, *(int(getattr(leaf, "nbytes", 0)) + 1 for leaf in leaves)])


def _check_limit(option: str, limit: int, sizes: Iterable[tuple[str, int]]) -> None:
    """Raises where a limit of bytes at a time cannot be kept.

    Args:
        sizes: bytes on this host of each array that Orbax reads or writes: it does so with an array
            as a whole.
    """
    name, size = max(sizes, key=lambda row: row[1], default=("", 0))
    if size >= limit:
        raise InvalidArgumentError(
            f"Options.{option} is {limit}, and {name} alone takes {size} bytes on this host: it"
            f" cannot be read or written in parts. Nothing was changed. Set Options.{option} to"
            f" {size + 1} or more, or to None."
        )


def _local_bytes(array: Any) -> int:
    """Bytes of an array on this host."""
    if isinstance(array, jax.Array) and not jax.numpy.issubdtype(array.dtype, jax.dtypes.extended):
        return sum(shard.data.nbytes for shard in array.addressable_shards if not shard.replica_id)
    return int(getattr(array, "nbytes", 0))


@functools.cache
def _make_signals_patient() -> None:
    """Orbax asks JAX's coordination service whether there are signals to wait for, on the thread
    that calls `save`, and without a deadline.
    """
    signals = signaling_client.get_signaling_client()
    if isinstance(signals, signaling_client.JaxDistributedSignalingClient):
        signals._client = PatientClient(signals._client)


class Engine:
    """An Orbax checkpointer, with what it is to call when this host's arrays are written. Each has
    its own: one that hangs and is given up must never speak for a later save.
    """

    def __init__(self, host: int, options: Options, limit: int | None) -> None:
        _make_signals_patient()
        self.limit = limit
        self._all_written: Callable[[], None] = lambda: None
        self._waiting = threading.Lock()
        self._failure: BaseException | None = None  # of the save under way, or the last one
        processes = ocp.options.MultiprocessingOptions(
            primary_host=0, active_processes={host}, barrier_sync_key_prefix="datarax_dist"
        )
        asynchronous = ocp.options.AsyncOptions(
            timeout_secs=int(min(options.save_timeout_seconds, 10**9)) + 1,
            barrier_sync_fn=self._barrier,
            create_directories_asynchronously=False,
        )
        self._orbax = ocp.AsyncCheckpointer(
            _handler(processes, options, save_bytes=limit),
            multiprocessing_options=processes,
            async_options=asynchronous,
            temporary_path_class=_InPlace,
            file_options=ocp.options.FileOptions(skip_sync_file_validations=True),
        )

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        del timeout_ms  # the save protocol has its own deadline
        if "async_write_complete" in key:
            self._all_written()

    def save(self, path: str, arrays: Any, all_written: Callable[[], None]) -> None:
        self._all_written, self._failure = all_written, None
        size = _BUCKET_FILE_BYTES if is_bucket(path) else None
        arguments = ocp.args.PyTreeSave(arrays, ocdbt_target_data_file_size=size)
        self._orbax.save(epath.Path(path), args=arguments)

    def wait(self) -> None:
        """Waits until the arrays are written. Orbax says only once that they are not, to whoever
        asks first; here all are told.
        """
        with self._waiting:
            if self._failure is None:
                try:
                    self._orbax.wait_until_finished()
                except BaseException as error:
                    self._failure = error
                    if isinstance(error, Exception):  # nobody waits after Ctrl-C
                        self._await_other_writes()
            if self._failure is not None:
                raise self._failure

    def _await_other_writes(self) -> None:
        """Orbax tells of the first write that has failed while others go on: what these still make
        would come after the staging directory was tidied up. They get a moment.
        """
        end = time.monotonic() + _LATE_SECONDS
        writes = list(self._orbax._async_manager._commit_futures or ())
        while writes:
            write = writes.pop()
            if isinstance(write, orbax_futures.ChainedFuture):
                writes += write._futures
                continue
            with contextlib.suppress(Exception):  # one error of a save is enough
                write.result(timeout=max(0.0, end - time.monotonic()))

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._orbax.close()


def _x64_as_here() -> contextlib.AbstractContextManager[Any]:
    """Returns what gives another thread 64 bits where the caller's has them."""
    enabled: bool = jax.config.read("jax_enable_x64")
    return jax.enable_x64(enabled)


@dataclass
class Loaded:
    """What this host has read.

    Attributes:
        values: arrays by path.
        parts: of arrays that all hosts have still to `gather`, what is here; the same ones, in the
            same order, on every host.
    """

    values: dict[tuple[str, ...], Any]
    parts: dict[tuple[str, ...], replicas.Part]
    _as_here: contextlib.AbstractContextManager[Any] = field(default_factory=_x64_as_here)

    @property
    def told(self) -> str:
        """What is gathered, in words that are the same on every host."""
        names = ", ".join("/".join(path) for path in list(self.parts)[:3])
        placed = "".join(f"{path}{part.told}" for path, part in self.parts.items())
        digest = fmt.digest(placed.encode())
        return f"parts of {len(self.parts)} arrays ({names}...; {digest})"

    def gather(self, together: replicas.Together) -> None:
        """Makes `values` whole. Collective.

        Args:
            together: see `replicas.gather`.

        Raises:
            CheckpointError: a host has gone, or a device lacks memory.
        """
        try:
            with self._as_here:  # on another thread
                found = replicas.gather(list(self.parts.values()), together)
        except CheckpointError:  # another host's
            raise
        except Exception as error:
            raise CheckpointError(
                f"The devices could not tell each other what their hosts have read:"
                f" {describe(error, 500)}. Started again with Options.single_replica_restore=False,"
                " each host reads everything itself."
            ) from cause(error)
        self.values |= dict(zip(self.parts, found, strict=True))
        self.parts = {}


class OrbaxArrays:
    """Orbax for one `Checkpointer`: writes and reads the `state` item of steps below `root`."""

    def __init__(self, root: str, host: int, options: Options) -> None:
        self._root = root
        self._host = host
        self._options = options
        self._checkpointer: Engine | None = None
        self._compressed: Sequence[str] | None = ()  # in the save under way
        self._gate: Gate | None = None  # of the last save
        self._made = self._begun = 0  # writers, counted; and the last one of them that has begun
        self._advisor = Advisor(direct.threads())
        if is_bucket(root):
            _prepare_buckets(root)

    def writer(self, arrays: Any) -> OrbaxWriter:
        """Returns what writes these arrays, a tree of what Orbax can store; None for no state.

        Raises:
            InvalidArgumentError: `save_concurrent_bytes` cannot be kept.
        """
        if (limit := self._options.save_concurrent_bytes) is not None:
            sizes = [
                (jax.tree_util.keystr(path), _local_bytes(leaf))
                for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
                if not (isinstance(leaf, jax.Array) and self._is_direct)
            ]
            _check_limit("save_concurrent_bytes", limit, sizes)
        self._made += 1
        return OrbaxWriter(self, arrays, self._made)

    @property
    def _is_direct(self) -> bool:
        """Whether arrays are written without TensorStore, where they can be."""
        return self._options.compression != "zstd" and not is_bucket(self._root)

    def choose(self) -> Choice:
        """Returns what the next save compresses. For the primary."""
        if self._options.compression == "auto":
            return self._advisor.choose(self._options.save_concurrent_bytes)
        return EVERYTHING if self._options.compression == "zstd" else NOTHING

    def _learn(self, arrays: Sequence[Written], seconds: float) -> None:
        """Takes in how long this host's parts have taken to be written, and takes samples."""
        size = sum(array.size for array in arrays)
        self._advisor.note_speed(size, seconds, compressed=bool(self._compressed))
        self._advisor.forget_others(array.name for array in arrays)
        wanted = [array for array in arrays if self._advisor.wants_sample(array.name, array.size)]
        wanted.sort(key=lambda array: -array.size)
        for array in wanted[:_SAMPLES_PER_SAVE]:
            try:
                found = compress_sample(array.values())
            except Exception as error:  # no reason for the save to fail
                logger.warning("%s: no sample could be compressed: %s", array.name, describe(error))
                return
            self._advisor.note_sample(array.name, array.size, *found)

    def start(
        self,
        prefix: str,
        all_written: Callable[[], None],
        arrays: Any,
        choice: Choice = NOTHING,
        *,
        number: int,
    ) -> _OrbaxWrite:
        if number < self._begun:
            raise StorageError(_OVERTAKEN, errno=None)
        self._begun = number
        if self._gate is not None and self._gate.cancel(_OVERTAKEN):
            # Its caller cannot go on before this returns, as this is called in a signal handler,
            # say; and Orbax would wait for its arrays.
            self._checkpointer = None
        limit = _at_least(self._options.save_concurrent_bytes, jax.tree.leaves(arrays))
        if self._checkpointer is None or self._checkpointer.limit != limit:
            if self._checkpointer is not None:
                self._checkpointer.close()
            self._checkpointer = Engine(self._host, self._options, limit)
        engine = self._checkpointer  # this one, whatever a signal handler does meanwhile
        path = os.path.join(self._root, prefix, "state")
        if self._host == 0 and not is_bucket(path):
            with wrapped("write", path):
                os.makedirs(path, exist_ok=True)
        self._compressed = choice.compressed
        gates[path] = self._gate = gate = Gate(
            self._options.save_timeout_seconds,
            direct=self._is_direct,
            compressed=choice.compressed,
            learn=self._learn if self._host == 0 and self._options.compression == "auto" else None,
        )
        try:
            write = _OrbaxWrite(self, engine, path, gate, choice)
            with wrapped("write", path):
                engine.save(path, arrays, all_written)
            return write
        except BaseException:
            give_up(path, gate)
            self.abandon(engine)
            raise

    def restore(
        self,
        step: str,
        spec: TreeSpec,
        wanted: Sequence[tuple[LeafSpec, Any]],
        verified: Sequence[fmt.FileEntry] = (),
        *,
        parted: bool = False,
    ) -> Loaded:
        """Reads the arrays of `wanted` leaves. A target of None means today's default placement.

        Args:
            verified: files of this state whose digests this host verifies while it reads.
            parted: of arrays that several hosts hold alike read a part only.

        Raises:
            StructureMismatchError: an array cannot be placed as the target says.
            CorruptStepError: a file that is to be verified, or what was read, is damaged.
            StorageError: Orbax or TensorStore could not read it.
        """
        path = os.path.join(self._root, step)
        chosen = {
            leaf.path: (leaf, restore_args(leaf, target))
            for leaf, target in wanted
            if not leaf.inline
        }
        placed: dict[tuple[str, ...], Any] = {}
        for key, (leaf, arguments) in chosen.items() if parted else ():
            if leaf.kind != "jax" or not isinstance(arguments, ocp.ArrayRestoreArgs):
                continue
            if part := replicas.parted(arguments.sharding, leaf.shape, leaf.dtype):
                placed[key] = arguments.sharding
                chosen[key] = leaf, dataclasses.replace(arguments, sharding=part)
        made = {key: elsewhere(leaf, arguments) for key, (leaf, arguments) in chosen.items()}
        makers = {key: make for key, make in made.items() if make is not None}
        # Plain Orbax may have stored each array in files of its own, which only Orbax reads.
        is_database = not spec.is_foreign or os.path.exists(os.path.join(path, _MANIFEST))
        if not is_bucket(path) and is_database:
            here = {key: value for key, value in chosen.items() if key not in makers}
            makers |= self._read_direct(path, here, verified)
        rest = {key: value for key, value in chosen.items() if key not in makers}
        values = self._read_by_orbax(path, spec, rest)
        parts: dict[tuple[str, ...], replicas.Part] = {}
        for key, sharding in placed.items():
            make = makers.pop(key, None) or functools.partial(values.pop, key)
            leaf = chosen[key][0]
            size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
            parts[key] = replicas.Part(make, sharding, size)
        with wrapped("read", path):
            values |= {key: jax.block_until_ready(make()) for key, make in makers.items()}
        return Loaded(values, parts)

    def _read_direct(
        self,
        path: str,
        chosen: Mapping[tuple[str, ...], tuple[LeafSpec, Any]],
        verified: Sequence[fmt.FileEntry],
    ) -> dict[tuple[str, ...], Callable[[], Any]]:
        """Reads those arrays that need no Orbax to be read, and verifies files meanwhile. Returns
        what makes each.
        """
        store = LocalStore(self._root)
        where = os.path.relpath(path, self._root)
        files = {entry.path.removeprefix("state/"): entry for entry in verified}
        reading = direct.Reading(lambda file: store.open(f"{where}/{file}"), files)
        makers: dict[tuple[str, ...], Callable[[], Any]] = {}

        def read(part: Extent) -> bytes:
            descriptor = store.open(f"{where}/{part.file}")
            try:
                return os.pread(descriptor, part.length, part.offset)
            finally:
                os.close(descriptor)

        with wrapped("read", path):
            index = read_index(path) if chosen else {}
            for key, (leaf, arguments) in chosen.items():
                name = ".".join(key)  # as Orbax has it
                stored = direct.parse_array(name, index)
                if stored is not None and fits(stored, leaf):
                    makers[key] = want(reading, stored, arguments)
                elif leaf.kind != "foreign_str":
                    check_stored(leaf, name, index, read)
            if wrong := reading.run():
                told = "; ".join(f"{name}: {why}" for name, why in list(wrong.items())[:5])
                raise CorruptStepError(told, step=-1, files=[f"state/{name}" for name in wrong])
        return makers

    def _read_by_orbax(
        self,
        path: str,
        spec: TreeSpec,
        chosen: Mapping[tuple[str, ...], tuple[LeafSpec, Any]],
    ) -> dict[tuple[str, ...], Any]:
        if not chosen:
            return {}
        values: list[Any] = [ocp.PLACEHOLDER] * len(spec.leaves)
        arguments: list[Any] = [ocp.RestoreArgs()] * len(spec.leaves)
        numbers = {leaf.path: number for number, leaf in enumerate(spec.leaves)}
        for key, (_, wish) in chosen.items():
            values[numbers[key]] = 0
            arguments[numbers[key]] = wish
        leaves = [leaf for leaf, _ in chosen.values()]
        if (limit := self._options.restore_concurrent_bytes) is not None:
            sizes = [(leaf.name, bytes_of(leaf, wish)) for leaf, wish in chosen.values()]
            _check_limit("restore_concurrent_bytes", limit, sizes)
        handler = _handler(
            ocp.options.MultiprocessingOptions(primary_host=0, active_processes={self._host}),
            self._options,
            restore_bytes=_at_least(limit, leaves),
        )

        def read() -> dict[tuple[str, ...], Any]:
            wish = ocp.args.PyTreeRestore(
                item=spec.for_orbax(values), restore_args=spec.for_orbax(arguments)
            )
            restored = spec_leaves(spec, handler.restore(epath.Path(path), args=wish))
            for leaf in leaves:
                check_kind(leaf, restored[numbers[leaf.path]])
            return {
                leaf.path: jax.block_until_ready(restored[numbers[leaf.path]]) for leaf in leaves
            }

        with wrapped("read", path):
            if not is_bucket(path):
                return read()
            return _in_time(read, self._options.restore_timeout_seconds, f"Reading {path}")

    def abandon(self, checkpointer: Engine) -> None:
        """Lets go of an Orbax checkpointer that hangs or has failed; the next save gets a new one.

        One that has failed keeps what it has not told: of several errors of one save it raises the
        first, and another one in the next save.
        """
        if self._checkpointer is checkpointer:
            self._checkpointer = None

    def close(self) -> None:
        if self._checkpointer is not None:
            self._checkpointer.close()
            self._checkpointer = None


class OrbaxWriter:
    """The array writer of one save."""

    def __init__(self, engine: OrbaxArrays, arrays: Any, number: int) -> None:
        self._engine = engine
        self._arrays = arrays
        self._number = number

    def choose(self) -> Any:
        """See `request.ArrayWriter`."""
        return self._engine.choose().to_json()

    def start(
        self, prefix: str, all_written: Callable[[], None], choice: Any
    ) -> _OrbaxWrite | None:
        if self._arrays is None:
            return None
        return self._engine.start(
            prefix, all_written, self._arrays, Choice.from_json(choice), number=self._number
        )

    def step_files(self) -> dict[str, bytes]:
        """Returns what plain Orbax wants to see in a step directory beside its items."""
        handlers = {"metadata": ocp.handlers.JsonCheckpointHandler}
        if self._arrays is not None:
            handlers["state"] = ocp.PyTreeCheckpointHandler
        names = {item: f"{kind.__module__}.{kind.__qualname__}" for item, kind in handlers.items()}
        described = {"item_handlers": names, "custom_metadata": {}}
        return {
            "_CHECKPOINT_METADATA": json.dumps(described).encode(),
            fmt.ORBAX_COMMIT_NAME: b"COMMIT.json tells\n",
        }

    def parts(self, host: int, children: Callable[[str], Sequence[str]]) -> list[str]:
        if host:
            return [
                f"state/ocdbt.process_{host}",
                f"state/ocdbt.process_{host}_direct",
                f"{_METADATA_OF_ARRAYS}process_{host}",
            ]
        if is_bucket(self._engine._root):
            return [""]  # thousands of files in one request
        found = [name for name in children("") if name not in ("state/", "data/", "hosts/")]
        found += [f"state/{name}" for name in children("state")]
        if _METADATA_OF_ARRAYS in found:
            found.remove(_METADATA_OF_ARRAYS)
            found += [f"{_METADATA_OF_ARRAYS}{name}" for name in children(_METADATA_OF_ARRAYS)]
        return [name for name in found if self.owns(name, host)]

    def owns(self, key: str, host: int) -> bool:
        found = _HOST_PART.fullmatch(key)
        return (int(found[1]) if found else 0) == host


class _OrbaxWrite:
    def __init__(
        self,
        engine: OrbaxArrays,
        checkpointer: Engine,
        path: str,
        gate: Gate,
        choice: Choice,
    ) -> None:
        self._gate = gate
        self._choice = choice
        self._engine = engine
        self._checkpointer = checkpointer
        self._path = path
        self._ended: Future[None] | None = None

    def _wait(self, ended: Future[None]) -> None:
        try:
            self._checkpointer.wait()
            if self._engine._host == 0 and is_bucket(self._path):
                _read_structure(self._path)
        except BaseException as error:
            self._engine.abandon(self._checkpointer)
            ended.set_exception(error)
        else:
            ended.set_result(None)
        finally:
            gates.pop(self._path, None)

    def release(self) -> None:
        self._gate.open()

    def digests(self) -> dict[str, tuple[int, str]]:
        """See `request.ArrayWrite`."""
        return {f"state/{file}": digest for file, digest in self._gate.digests.items()}

    def notes(self) -> dict[str, str]:
        """See `request.ArrayWrite`."""
        return {"compression": self._choice.why}

    def cancel(self) -> None:
        self._gate.cancel()

    def wait(self, timeout_seconds: float) -> None:
        if self._ended is None:  # on a thread of its own, because Orbax's waiting has no deadline
            ended: Future[None] = Future()
            threading.Thread(
                target=self._wait, args=(ended,), name="datarax_dist-arrays", daemon=True
            ).start()
            self._ended = ended
        with wrapped("write", self._path):
            done, _ = concurrent.futures.wait([self._ended], timeout_seconds)
            if not done:
                self._engine.abandon(self._checkpointer)
                raise StorageError(
                    f"Writing the arrays to {self._path} has not ended at the save's deadline. Is"
                    " the storage stuck? Options.save_timeout_seconds sets the deadline.",
                    errno=errno.ETIMEDOUT,
                )
            self._ended.result()


def _read_structure(path: str) -> None:
    """Reads what tells where each array is. TensorStore sends no checksum with its uploads to a
    bucket; what is damaged there would lose all arrays, and is noticed here, before the commit.
    """
    ts.KvStore.open({"driver": "ocdbt", "base": f"{path}/"}).result().list().result()


def _in_time(act: Callable[[], _Result], seconds: float, what: str) -> _Result:
    """Returns what `act` returns, or raises when it has not ended in time: then it is left alone,
    as nothing can stop it.
    """
    ended: Future[_Result] = Future()
    as_here = _x64_as_here()

    def run() -> None:
        try:
            with as_here:
                ended.set_result(act())
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=run, name="datarax_dist-read", daemon=True).start()
    end = time.monotonic() + seconds
    while not ended.done():
        left = end - time.monotonic()
        if left <= 0:
            raise StorageError(
                f"{what} has not ended after {seconds:.0f} s. Does the bucket answer?"
                " Options.restore_timeout_seconds sets the deadline.",
                errno=errno.ETIMEDOUT,
            )
        concurrent.futures.wait([ended], min(left, 1.0))  # in slices, so that Ctrl-C is answered
    return ended.result()


def _prepare_buckets(root: str) -> None:
    """Sets what Orbax and TensorStore need for buckets, where the user has not.

    Raises:
        InvalidArgumentError: Orbax would go through TensorFlow's file layer.
        StorageError: the credentials cannot be used.
    """
    if gpath._is_tf_installed():
        raise InvalidArgumentError(
            "TensorFlow is installed here, and Orbax's paths would use its file layer for gs://,"
            " which has other credentials, caches and errors. Set EPATH_USE_TF=false in the"
            " environment of the job, before it starts."
        )
    # A transfer that stalls is cut and made again; TensorStore by itself would wait for ever.
    for name, value in _TENSORSTORE_SETTINGS.items():
        os.environ.setdefault(name, value)
    # The file system that Orbax's paths share keeps listings for ever, another host's files would
    # not be in them.
    with connecting(root):
        shared = epath_backend.fsspec_backend.fs("gs://")
    shared.dircache.use_listings_cache = False
    shared.invalidate_cache()
    shared.consistency = "md5"  # it compares what it has sent with what the bucket has got
    _release_views_of_failed_uploads()


@functools.cache
def _release_views_of_failed_uploads() -> None:
    """Makes gcsfs's files, through which Orbax writes what TensorStore does not, let go of their
    buffer when an upload fails.

    The traceback of such an error holds a view of an `io.BytesIO`, often in a cycle. Python 3.12.0
    and 3.12.1 crash when they collect the two together, and later versions complain
    (https://github.com/python/cpython/issues/111049 and 111331).
    """
    from gcsfs.core import GCSFile

    upload = GCSFile._upload_chunk

    @functools.wraps(upload)
    def _upload_chunk(self: Any, final: bool = False) -> Any:
        try:
            return upload(self, final)
        except BaseException as error:
            found: BaseException | None = error
            seen = set[int]()
            while found is not None and id(found) not in seen:  # it may be a circle
                seen.add(id(found))
                traceback.clear_frames(found.__traceback__)
                found = found.__cause__ or found.__context__
            raise

    GCSFile._upload_chunk = _upload_chunk
