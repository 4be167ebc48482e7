"""Arrays through Orbax and TensorStore: the only module that imports them.

Orbax's `AsyncCheckpointer` is used with settings under which it coordinates nothing by itself: each
host tells it that it is alone (`active_processes`), so its own barriers, some without a deadline,
are never entered; the one point at which hosts must meet (all arrays written, before the primary
merges) is our exchange. Directories are made beforehand, by the save protocol.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import errno
import functools
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from etils.epath import backend as epath_backend
from etils.epath import gpath
from orbax.checkpoint._src.futures import signaling_client
from orbax.checkpoint._src.handlers.base_pytree_checkpoint_handler import (
    BasePyTreeCheckpointHandler,
)
from orbax.checkpoint._src.metadata import sharding as sharding_metadata
from orbax.checkpoint._src.multihost import multihost
from orbax.checkpoint._src.path import atomicity
from orbax.checkpoint._src.serialization import jax_array_handlers, tensorstore_utils
from orbax.checkpoint._src.serialization import types as serialization_types

from datarax_dist import codec, direct
from datarax_dist import format as fmt
from datarax_dist.boards import PatientClient
from datarax_dist.buckets import advice, bucket_and_prefix
from datarax_dist.config import Options, is_bucket
from datarax_dist.errors import (
    CheckpointError,
    CorruptStepError,
    InvalidArgumentError,
    StorageError,
    StructureMismatchError,
    cause,
    describe,
    storage_hint,
)
from datarax_dist.ocdbt import read_index
from datarax_dist.storage import LocalStore
from datarax_dist.trees import LeafSpec, TreeSpec, needs_x64

__all__ = ["ORBAX_VERSION", "OrbaxArrays", "describe_foreign"]

ORBAX_VERSION = ocp.__version__
_BUCKET_FILE_BYTES = 128 << 20  # several are uploaded at the same time
_TENSORSTORE_SETTINGS = {
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "15",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
}
_BUCKET_HINT = "`datarax-dist doctor --write` on this root tells whether the bucket is at fault."
_Result = TypeVar("_Result")
_OS_ERROR = re.compile(r"os_error_code='([0-9]+)'")  # as TensorStore writes it
_HOST_PART = re.compile(
    r"(?:.*/)?(?:ocdbt\.process_|array_metadatas/process_)([0-9]+)(?:_direct)?(?:/.*)?"
)

# Orbax has no public option for the codecs of its zarr3 arrays. In the directories of this dict,
# and nowhere else, the inner codecs get a crc32c, which stock Orbax reads and checks. It goes by
# directory, because Orbax builds its specs whenever its own threads come to it.
# tests/test_plain_orbax.py watches this spot.
_gates: dict[str, _Gate] = {}


class _Gate:
    """Orbax's writing threads wait here until our `save()` has returned: they would take turns with
    the caller's thread in the interpreter, and so double the time that it blocks
    (benchmarks/blocking.py). In a bucket they wait for the claim, too.
    """

    def __init__(self, seconds: float, *, direct: bool = False) -> None:
        self._seconds = seconds
        self._opened = threading.Event()
        self.direct = direct  # whether arrays may be written without TensorStore
        self.digests: dict[str, tuple[int, str]] = {}  # of what was, by its path below the item
        self._cancelled = False

    def open(self) -> None:
        self._opened.set()

    def cancel(self) -> None:
        if not self._opened.is_set():
            self._cancelled = True
            self._opened.set()

    def pass_through(self) -> None:
        if not self._opened.wait(self._seconds) or self._cancelled:
            raise StorageError("The save has ended before its arrays were written.", errno=None)


class _WriteSpec(tensorstore_utils.ArrayWriteSpec):
    def __init__(self, directory: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(directory, *args, **kwargs)
        if directory in _gates:
            spec = self._json_spec
            [sharding] = spec.get("base", spec)["metadata"]["codecs"]
            sharding["configuration"]["codecs"].append({"name": "crc32c"})


_await_path_creation = serialization_types.ParamInfo.await_path_creation


async def _await_gate(info: serialization_types.ParamInfo) -> None:
    """Each of Orbax's writers (arrays, strings, shardings) asks here whether its directory is there
    already.
    """
    await _await_path_creation(info)
    if (gate := _gates.get(str(info.parent_dir))) is not None:
        gate.pass_through()


_serialize_by_orbax = jax_array_handlers._async_serialize_replica_slices
_shardings_by_orbax = jax_array_handlers._async_serialize_shardings


async def _serialize(
    values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any], **options: Any
) -> Sequence[Any]:
    """What Orbax calls to write this host's parts of `jax.Array`s that are in memory: writes them
    straight into files, where that can be.

    Args:
        values: Orbax's `ReplicaSlices` of each array.
        infos, args: Orbax's `ParamInfo` and `SaveArgs`.
        options: see Orbax's own.
    """
    gate = _gates.get(str(infos[0].parent_dir))
    if gate is None or not gate.direct:
        return await _serialize_by_orbax(values, infos, args, **options)
    await infos[0].await_path_creation()
    directory = f"ocdbt.process_{jax.process_index()}_direct"
    writing = direct.Writing(os.path.join(str(infos[0].parent_dir), directory))
    written: dict[int, Any] = {}
    for number, (value, info, arg) in enumerate(zip(values, infos, args, strict=True)):
        dtype = np.dtype(value.dtype)
        described = direct.describe_array(
            tuple(value.global_shape), dtype, tuple(value.local_shape)
        )
        if described is None or not value.is_on_host or not _is_plain(arg, dtype):
            continue
        if options["primary_host"] in (None, jax.process_index()):
            writing.add(f"{info.name}/zarr.json", described)
        writing.add_chunks(
            info.name,
            [(_place(part.index, value), part.data()) for part in value.replica_slices],
        )
        written[number] = tensorstore_utils.ArrayMetadata(
            param_name=info.name,
            shape=value.global_shape,
            dtype=dtype,
            write_shape=value.local_shape,
            chunk_shape=value.local_shape,
            use_ocdbt=True,
            use_zarr3=True,
            ext_metadata=options["ext_metadata"].get(info.name),
        )
    rest = [number for number in range(len(values)) if number not in written]
    if written:
        found = await asyncio.to_thread(writing.run)
        gate.digests |= {f"{directory}/{file}": digest for file, digest in found.items()}
    if rest:
        chosen = [[row[number] for number in rest] for row in (values, infos, args)]
        told = await _serialize_by_orbax(*chosen, **options | {"array_metadata_store": None})
        written |= dict(zip(rest, told, strict=True))
    metadata = [written[number] for number in range(len(values))]
    if (store := options["array_metadata_store"]) is not None:
        await store.write(
            checkpoint_dir=infos[0].parent_dir,
            array_metadatas=metadata,
            process_index=jax.process_index(),
        )
    return metadata


async def _serialize_shardings(
    shardings: Sequence[Any], infos: Sequence[Any], *, primary_host: int | None
) -> None:
    """What Orbax calls to note how arrays were sharded: the same file, at once rather than through
    a TensorStore for each array.
    """
    gate = _gates.get(str(infos[0].parent_dir)) if infos else None
    if gate is None or not gate.direct:
        return await _shardings_by_orbax(shardings, infos, primary_host=primary_host)
    await infos[0].await_path_creation()
    if not multihost.is_primary_host(primary_host):
        return None
    noted: dict[Any, str | None] = {}
    rows: dict[str, str] = {}
    for sharding, info in zip(shardings, infos, strict=True):
        if sharding is None:
            continue
        if sharding not in noted:
            described = sharding_metadata.from_jax_sharding(sharding)
            noted[sharding] = None if described is None else described.to_serialized_string()
        if (text := noted[sharding]) is not None:
            rows[base64.urlsafe_b64encode(info.name.encode()).decode()] = text
    path = os.path.join(str(infos[0].parent_dir), "_sharding")
    await asyncio.to_thread(Path(path).write_text, json.dumps(rows))
    return None


def _is_plain(arg: Any, dtype: np.dtype[Any]) -> bool:
    """Whether Orbax would store an array as it is, a chunk for each shard."""
    other_dtype = arg.dtype is not None and np.dtype(arg.dtype) != dtype
    return not other_dtype and arg.chunk_byte_size is None and not arg.shard_axes


def _place(index: Sequence[slice], value: Any) -> list[int]:
    """Where a part of an array is in the grid of its parts, which are all of one shape."""
    begins = [part.start or 0 for part in index]
    return [begin // size for begin, size in zip(begins, value.local_shape, strict=True)]


jax_array_handlers._async_serialize_replica_slices = _serialize
jax_array_handlers._async_serialize_shardings = _serialize_shardings
tensorstore_utils.ArrayWriteSpec = _WriteSpec
serialization_types.ParamInfo.await_path_creation = _await_gate


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


def _handler(
    processes: Any,
    options: Options,
    *,
    save_bytes: int | None = None,
    restore_bytes: int | None = None,
) -> ocp.PyTreeCheckpointHandler:
    # The outer class counts limits in whole GB and has one by default, which keeps Orbax from
    # writing all arrays in a single OCDBT transaction; the inner one takes bytes, and None.
    inner = BasePyTreeCheckpointHandler(
        use_ocdbt=True,
        use_zarr3=True,
        use_compression=options.compression == "zstd",
        save_concurrent_bytes=save_bytes,
        restore_concurrent_bytes=restore_bytes,
        multiprocessing_options=processes,
    )
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=True, use_zarr3=True, multiprocessing_options=processes, handler_impl=inner
    )


def _at_least(limit: int | None, leaves: Sequence[Any]) -> int | None:
    """Orbax fails when one array is not smaller than its limit of bytes at a time."""
    if limit is None:
        return None
    return max([limit, *(int(getattr(leaf, "nbytes", 0)) + 1 for leaf in leaves)])


@functools.cache
def _make_signals_patient() -> None:
    """Orbax asks JAX's coordination service whether there are signals to wait for, on the thread
    that calls `save`, and without a deadline.
    """
    signals = signaling_client.get_signaling_client()
    if isinstance(signals, signaling_client.JaxDistributedSignalingClient):
        signals._client = PatientClient(signals._client)


class _Engine:
    """An Orbax checkpointer, with what it is to call when this host's arrays are written. Each has
    its own: one that hangs and is given up must never speak for a later save.
    """

    def __init__(self, host: int, options: Options, limit: int | None) -> None:
        _make_signals_patient()
        self.limit = limit
        self._all_written: Callable[[], None] = lambda: None
        processes = ocp.options.MultiprocessingOptions(
            primary_host=0, active_processes={host}, barrier_sync_key_prefix="datarax_dist"
        )
        asynchronous = ocp.options.AsyncOptions(
            timeout_secs=int(min(options.save_timeout_seconds, 10**9)) + 1,
            barrier_sync_fn=self._barrier,
            create_directories_asynchronously=False,
        )
        self._handler = _handler(processes, options, save_bytes=limit)
        self._orbax = ocp.AsyncCheckpointer(
            self._handler,
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
        self._all_written = all_written
        # Every host may make the directory of its array metadata. By default the others wait ten
        # minutes for the primary to do so, even if that has failed. The store is one for the whole
        # process, and every new Orbax handler sets it back.
        if (store := self._handler._handler_impl._array_metadata_store) is not None:
            store.set_primary_host(None)
        size = _BUCKET_FILE_BYTES if is_bucket(path) else None
        arguments = ocp.args.PyTreeSave(arrays, ocdbt_target_data_file_size=size)
        self._orbax.save(epath.Path(path), args=arguments)

    def wait(self) -> None:
        self._orbax.wait_until_finished()

    def close(self) -> None:
        self._orbax.close()


class OrbaxArrays:
    """Orbax for one `Checkpointer`: writes and reads the `state` item of steps below `root`."""

    def __init__(self, root: str, host: int, options: Options) -> None:
        self._root = root
        self._host = host
        self._options = options
        self._checkpointer: _Engine | None = None
        if is_bucket(root):
            _prepare_buckets()

    def writer(self, arrays: Any) -> OrbaxWriter:
        """Returns what writes these arrays, a tree of what Orbax can store; None for no state."""
        return OrbaxWriter(self, arrays)

    def start(self, prefix: str, all_written: Callable[[], None], arrays: Any) -> _OrbaxWrite:
        limit = _at_least(self._options.save_concurrent_bytes, jax.tree.leaves(arrays))
        if self._checkpointer is None or self._checkpointer.limit != limit:
            if self._checkpointer is not None:
                self._checkpointer.close()
            self._checkpointer = _Engine(self._host, self._options, limit)
        path = os.path.join(self._root, prefix, "state")
        if self._host == 0 and not is_bucket(path):
            with _wrapped("write", path):
                os.makedirs(path, exist_ok=True)
        straight = self._options.compression != "zstd" and not is_bucket(path)
        _gates[path] = gate = _Gate(self._options.save_timeout_seconds, direct=straight)
        try:
            with _wrapped("write", path):
                self._checkpointer.save(path, arrays, all_written)
        except BaseException:
            gate.cancel()
            self.abandon(self._checkpointer)
            raise
        return _OrbaxWrite(self, self._checkpointer, path, gate)

    def restore(
        self,
        step: str,
        spec: TreeSpec,
        wanted: Sequence[tuple[LeafSpec, Any]],
        verified: Sequence[fmt.FileEntry] = (),
    ) -> dict[tuple[str, ...], Any]:
        """Returns the arrays of `wanted` leaves by path. A target of None means today's default
        placement.

        Args:
            verified: files of this state whose digests this host verifies while it reads.

        Raises:
            StructureMismatchError: an array cannot be placed as the target says.
            CorruptStepError: a file that is to be verified, or what was read, is damaged.
            StorageError: Orbax or TensorStore could not read it.
        """
        path = os.path.join(self._root, step)
        chosen = {
            leaf.path: (leaf, _restore_args(leaf, target))
            for leaf, target in wanted
            if not leaf.inline
        }
        found: dict[tuple[str, ...], Any] = {}
        if not is_bucket(path):
            found = self._read_direct(path, chosen, verified)
        rest = {key: value for key, value in chosen.items() if key not in found}
        return found | self._read_by_orbax(path, spec, rest)

    def _read_direct(
        self,
        path: str,
        chosen: Mapping[tuple[str, ...], tuple[LeafSpec, Any]],
        verified: Sequence[fmt.FileEntry],
    ) -> dict[tuple[str, ...], Any]:
        """Returns those arrays that need no Orbax to be read, and verifies files meanwhile."""
        store = LocalStore(self._root)
        where = os.path.relpath(path, self._root)
        files = {entry.path.removeprefix("state/"): entry for entry in verified}
        reading = direct.Reading(lambda file: store.open(f"{where}/{file}"), files)
        makers: dict[tuple[str, ...], Callable[[], Any]] = {}
        with _wrapped("read", path):
            index = read_index(path) if chosen else {}
            for key, (leaf, arguments) in chosen.items():
                stored = direct.parse_array(".".join(key), index)  # as Orbax names it
                if stored is not None and _fits(stored, leaf):
                    makers[key] = _want(reading, stored, arguments)
            if wrong := reading.run():
                told = "; ".join(f"{name}: {why}" for name, why in list(wrong.items())[:5])
                raise CorruptStepError(told, step=-1, files=[f"state/{name}" for name in wrong])
            return {key: jax.block_until_ready(make()) for key, make in makers.items()}

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
        handler = _handler(
            ocp.options.MultiprocessingOptions(primary_host=0, active_processes={self._host}),
            self._options,
            restore_bytes=_at_least(self._options.restore_concurrent_bytes, leaves),
        )

        def read() -> dict[tuple[str, ...], Any]:
            wish = ocp.args.PyTreeRestore(
                item=spec.build(values), restore_args=spec.build(arguments)
            )
            restored = spec_leaves(spec, handler.restore(epath.Path(path), args=wish))
            for leaf in leaves:
                _check_kind(leaf, restored[numbers[leaf.path]])
            return {
                leaf.path: jax.block_until_ready(restored[numbers[leaf.path]]) for leaf in leaves
            }

        with _wrapped("read", path):
            if not is_bucket(path):
                return read()
            return _in_time(read, self._options.restore_timeout_seconds, f"Reading {path}")

    def abandon(self, checkpointer: _Engine) -> None:
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

    def __init__(self, engine: OrbaxArrays, arrays: Any) -> None:
        self._engine = engine
        self._arrays = arrays

    def start(self, prefix: str, all_written: Callable[[], None]) -> _OrbaxWrite | None:
        if self._arrays is None:
            return None
        return self._engine.start(prefix, all_written, self._arrays)

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

    def parts(self, host: int) -> list[str]:
        if host == 0:
            return [""]
        return [
            f"state/ocdbt.process_{host}",
            f"state/ocdbt.process_{host}_direct",
            f"state/array_metadatas/process_{host}",
        ]

    def owns(self, key: str, host: int) -> bool:
        found = _HOST_PART.fullmatch(key)
        return (int(found[1]) if found else 0) == host


class _OrbaxWrite:
    def __init__(self, engine: OrbaxArrays, checkpointer: _Engine, path: str, gate: _Gate) -> None:
        self._gate = gate
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
            _gates.pop(self._path, None)

    def release(self) -> None:
        self._gate.open()

    def digests(self) -> dict[str, tuple[int, str]]:
        """See `save.ArrayWrite`."""
        return {f"state/{file}": digest for file, digest in self._gate.digests.items()}

    def cancel(self) -> None:
        self._gate.cancel()

    def wait(self, timeout_seconds: float) -> None:
        if self._ended is None:  # on a thread of its own, because Orbax's waiting has no deadline
            ended: Future[None] = Future()
            threading.Thread(
                target=self._wait, args=(ended,), name="datarax_dist-arrays", daemon=True
            ).start()
            self._ended = ended
        with _wrapped("write", self._path):
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

    def run() -> None:
        try:
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


def _prepare_buckets() -> None:
    """Sets what Orbax and TensorStore need for buckets, where the user has not.

    Raises:
        InvalidArgumentError: Orbax would go through TensorFlow's file layer.
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
    shared = epath_backend.fsspec_backend.fs("gs://")
    shared.dircache.use_listings_cache = False
    shared.invalidate_cache()
    shared.consistency = "md5"  # it compares what it has sent with what the bucket has got


@contextlib.contextmanager
def _wrapped(action: str, path: str) -> Iterator[None]:
    """Makes the many kinds of errors of Orbax and TensorStore one."""
    try:
        yield
    except (CheckpointError, KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:
        number = getattr(error, "errno", None)
        if number is None and (found := _OS_ERROR.search(str(error))):
            number = int(found[1])
        if number is None and isinstance(_first(error), TimeoutError):
            number = errno.ETIMEDOUT  # Orbax's own deadline, which is just behind that of the save
        if isinstance(error, MemoryError) or (
            number is None and "RESOURCE_EXHAUSTED" in str(error)  # said of a full disk, too
        ):
            number = errno.ENOMEM  # of the host or the device: nothing is damaged
        hint = storage_hint(number)
        if number is None and is_bucket(path):
            number, hint = advice(error, bucket_and_prefix(path)[0]) or (None, _BUCKET_HINT)
        raise StorageError(
            f"Could not {action} the arrays: {_cause(error)}. {hint}",
            errno=number,
        ) from cause(error)


def _cause(error: BaseException) -> str:
    """Returns what an error says, and before it what was its first cause: Orbax tells that last, or
    not at all.
    """
    first = _first(error)
    told = describe(error, 1000)
    return told if first is error else f"{describe(first, 400)} ({told})"


def _first(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _restore_args(leaf: LeafSpec, target: Any) -> Any:
    sharding = (
        getattr(target, "sharding", None)
        if isinstance(target, jax.Array | jax.ShapeDtypeStruct)
        else None
    )
    here = sharding is None or sharding.is_fully_addressable
    if leaf.kind == "key_data" or (here and (leaf.kind in ("numpy", "scalar") or leaf.local)):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    if isinstance(target, np.ndarray | np.generic | bool | int | float | complex):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    if needs_x64(leaf) and not jax.config.read("jax_enable_x64"):
        raise StructureMismatchError(
            f"{leaf.name} is a jax.Array of {leaf.dtype}, which JAX would cut to 32 bits. Set"
            " jax_enable_x64, or give a numpy array as its target.",
            missing=[],
            unexpected=[],
            changed={leaf.name: f"saved as {leaf.dtype}, jax_enable_x64 is off"},
        )
    if sharding is None:
        sharding = default_sharding(leaf.shape)
    else:
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError as error:
            raise StructureMismatchError(
                f"{leaf.name}: the target's sharding does not fit the saved shape"
                f" {list(leaf.shape)}: {error}",
                missing=[],
                unexpected=[],
                changed={leaf.name: str(error)},
            ) from error
    if leaf.kind == "key":
        return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding)
    return ocp.ArrayRestoreArgs(
        restore_type=jax.Array,
        sharding=sharding,
        global_shape=leaf.shape,
        dtype=np.dtype(leaf.dtype),
    )


def _fits(stored: direct.StoredArray, leaf: LeafSpec) -> bool:
    """Whether what is stored is what the leaf was, with nothing to convert."""
    if leaf.kind == "key_data":
        return True
    if leaf.kind not in ("jax", "numpy", "scalar"):
        return False
    return stored.shape == tuple(leaf.shape) and str(stored.dtype) == leaf.dtype


def _want(reading: direct.Reading, stored: direct.StoredArray, wish: Any) -> Callable[[], Any]:
    """Has this host's part of an array read; returns what makes the array afterwards."""
    if wish.restore_type is np.ndarray:
        whole = direct.Buffer(tuple((0, size) for size in stored.shape), stored.dtype)
        reading.want(stored, [whole])
        return lambda: whole.array
    sharding: jax.sharding.Sharding = wish.sharding
    parts = sharding.addressable_devices_indices_map(stored.shape).values()
    regions = {direct.region(part, stored.shape) for part in parts if part is not None}
    buffers = {region: direct.Buffer(region, stored.dtype) for region in regions}
    reading.want(stored, list(buffers.values()))
    return lambda: jax.make_array_from_callback(
        stored.shape,
        sharding,
        lambda part: buffers[direct.region(part or (), stored.shape)].array,
        dtype=stored.dtype,
    )


def _check_kind(leaf: LeafSpec, value: Any) -> None:
    """Raises when Orbax gives something else than was saved. It does where its array metadata could
    not be found: a typed PRNG key comes back as plain numbers.
    """
    found = getattr(value, "dtype", np.dtype("O"))
    is_key = jax.numpy.issubdtype(found, jax.dtypes.prng_key)
    if is_key != (leaf.kind == "key"):
        raise StorageError(
            f"{leaf.name} was saved as a {leaf.kind}, and Orbax reads it as {found}: its array"
            " metadata, which tells a typed PRNG key from plain numbers, cannot be read.",
            errno=None,
        )


def default_sharding(shape: Sequence[int]) -> jax.sharding.Sharding:
    """Returns how to place an array over all of today's devices: along the longest dimension that
    divides, or replicated.
    """
    devices = np.array(jax.devices())
    if devices.size == 1:
        return jax.sharding.SingleDeviceSharding(devices[0])
    mesh = jax.sharding.Mesh(devices, ("devices",))
    axes: list[str | None] = [None] * len(shape)
    fitting = [axis for axis, n in enumerate(shape) if n and n % devices.size == 0]
    if fitting:
        axes[max(fitting, key=lambda axis: shape[axis])] = "devices"
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))


def spec_leaves(spec: TreeSpec, tree: Any) -> list[Any]:
    """Returns the leaves of a tree that has the structure of `spec`, placeholders included, in the
    order of `spec`.
    """
    found: list[Any] = [None] * len(spec.leaves)

    def walk(structure: Any, node: Any) -> None:
        if isinstance(structure, int):
            found[structure] = node
            return
        for tag in ("list", "tuple"):
            for child, item in zip(structure[tag], node, strict=True) if tag in structure else ():
                walk(child, item)
        for key, child in structure.get("dict", ()):
            walk(child, node[codec.decode(key)])
        for name, child in structure.get("children", ()):
            walk(child, node[name])

    walk(spec.structure, tree)
    return found


def describe_foreign(path: str) -> TreeSpec:
    """Returns the structure of a state written by plain Orbax, from its own metadata. `path` is the
    item's directory.

    Raises:
        StorageError: there is no state of Orbax here that can be read.
    """
    with _wrapped("read", path):
        metadata = ocp.PyTreeCheckpointHandler().metadata(epath.Path(path))
        tree = getattr(metadata, "tree", metadata)
        leaves: list[LeafSpec] = []

        def walk(node: Any, at: tuple[str, ...]) -> Any:
            if isinstance(node, dict):
                return {"dict": [[key, walk(item, (*at, str(key)))] for key, item in node.items()]}
            if isinstance(node, list | tuple):
                return {
                    "list" if isinstance(node, list) else "tuple": [
                        walk(item, (*at, str(i))) for i, item in enumerate(node)
                    ]
                }
            if node is None:
                return {"none": 0}
            leaves.append(_foreign_leaf(node, at))
            return len(leaves) - 1

        structure = walk(tree, ())
        return TreeSpec(structure, leaves)


def _foreign_leaf(node: Any, path: tuple[str, ...]) -> LeafSpec:
    name = type(node).__name__
    shape = tuple(int(n) for n in getattr(node, "shape", None) or ())
    dtype = (
        str(np.dtype(node.dtype))
        if getattr(node, "dtype", None) is not None and "Key" not in name
        else ""
    )
    if "String" in name:
        return LeafSpec(path, "foreign_str")
    if "Scalar" in name:
        return LeafSpec(path, "scalar", (), dtype)
    if getattr(node, "sharding", None) is None and dtype:
        return LeafSpec(path, "numpy", shape, dtype)  # Orbax notes the sharding of a jax.Array only
    return LeafSpec(path, "jax", shape, dtype)
