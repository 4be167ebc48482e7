"""Hosts, a store and arrays in one process: the real protocol code runs over them, fast.

hosts = SimulatedHosts(3)
results = hosts.run(lambda group: group.exchange("vote", group.index, timeout_seconds=5))
# -> [[0, 1, 2], [0, 1, 2], [0, 1, 2]]
"""

from __future__ import annotations

import bisect
import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from datarax_dist import format as fmt
from datarax_dist.boards import LocalBoard
from datarax_dist.errors import StorageError
from datarax_dist.hosts import HostGroup
from datarax_dist.storage import Entry

__all__ = [
    "ONCE_MORE",
    "FakeClock",
    "MemoryArrays",
    "MemoryBucket",
    "MemoryStore",
    "SimulatedHosts",
    "stepped",
]


_Result = TypeVar("_Result")

ONCE_MORE = ", once more, as no reply came"  # ends what is told of such a request


class FakeClock:
    """A clock that moves when somebody waits, and only then."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self._now = now
        self._lock = threading.Lock()

    def monotonic(self) -> float:
        return self._now

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self._now += seconds


class SimulatedHosts:
    """A group of hosts that are threads of this process."""

    def __init__(self, count: int) -> None:
        boards = [LocalBoard(0, count)]
        boards += [LocalBoard(index, count, shared=boards[0]) for index in range(1, count)]
        self.groups = [HostGroup(board) for board in boards]

    def run(self, target: Callable[[HostGroup], Any]) -> list[Any]:
        """Runs `target(group)` on every host; returns each one's value, or the error it raised."""

        def one(group: HostGroup) -> Any:
            try:
                return target(group)
            except Exception as error:
                return error

        with ThreadPoolExecutor(len(self.groups)) as pool:
            return list(pool.map(one, self.groups))


class _Files(dict[str, bytes]):
    """Files by their keys, of which those below a prefix are found without looking at all."""

    def __init__(self) -> None:
        super().__init__()
        self._sorted: list[str] = []

    def __setitem__(self, key: str, data: bytes) -> None:
        if key not in self:
            bisect.insort(self._sorted, key)
        super().__setitem__(key, data)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        del self._sorted[bisect.bisect_left(self._sorted, key)]

    def pop(self, key: str) -> bytes:  # type: ignore[override]
        data = self[key]
        del self[key]
        return data

    def update(self, files: Mapping[str, bytes]) -> None:  # type: ignore[override]
        for key, data in files.items():
            self[key] = data

    def below(self, prefix: str) -> list[str]:
        """Returns the keys below a prefix, sorted."""
        start = f"{prefix}/" if prefix else ""
        begin = bisect.bisect_left(self._sorted, start)
        end = bisect.bisect_left(self._sorted, f"{prefix}0") if prefix else None  # "0" follows "/"
        return self._sorted[begin:end]

    def in_directory(self, prefix: str) -> list[str]:
        """Returns the names in a directory, sorted; those of directories end with a slash."""
        keys, start = self._sorted, f"{prefix}/" if prefix else ""
        names, at = [], bisect.bisect_left(keys, start)
        while at < len(keys) and keys[at].startswith(start):
            slash = keys[at].find("/", len(start)) + 1
            names.append(keys[at][len(start) : slash or None])
            past = f"{keys[at][: slash - 1]}0" if slash else ""
            at = bisect.bisect_left(keys, past, at) if slash else at + 1
        return sorted(names)


_digest = functools.lru_cache(1 << 12)(fmt.digest)  # of contents that are listed again and again


@functools.lru_cache(1 << 12)
def _listed(key: str, data: bytes, generation: int) -> Entry:
    return Entry(key, len(data), _digest(data, "md5"), str(generation))


class _MemoryFiles:
    """Files in memory, shared by all simulated hosts. `log` lists what was done, in order.

    It can be cut off: after `crash_after(n)` the n-th operation that changes it, and every one
    after that, raises `StorageError`, as if all hosts had died there. `lose_power` then empties the
    files that nobody has synced.
    """

    root = "memory"
    digest_kind = "crc32"
    one_at_a_time = True

    def __init__(self) -> None:
        self.files: _Files = _Files()
        self.log: list[tuple[str, str]] = []
        self._volatile: set[str] = set()
        self._left: int | None = None
        self.crashed = False
        self._lock = threading.RLock()

    def crash_after(self, operations: int | None) -> None:
        """Crashes at the operation after so many more; None heals."""
        self._left = operations

    def lose_power(self) -> Sequence[str]:
        """Empties every file that was written and not synced; returns which."""
        emptied = sorted(self._volatile)
        for key in emptied:
            self.files[key] = b""
        self._volatile.clear()
        return emptied

    def write(self, key: str, data: bytes) -> None:
        """Writes as a library would that does not sync: TensorStore, say."""
        with self._lock:
            self._change()
            self.files[key] = data
            self._volatile.add(key)

    def _change(self) -> None:
        if self._left is not None:
            if self._left == 0:
                self.crashed = True
                raise StorageError("crashed on purpose", errno=5)
            self._left -= 1

    def get(self, key: str) -> bytes:
        data = self.files[key]
        if len(data) > fmt.most_bytes(key):
            raise fmt.too_large(key, len(data))
        return data

    def put(self, key: str, data: bytes) -> None:
        with self._lock:
            self._change()
            self.files[key] = data
            self._volatile.discard(key)
            self.log.append(("put", key))

    def create(self, key: str, data: bytes) -> bool:
        with self._lock:
            if key in self.files:
                return self.holds(key, data)
            self._change()
            self.files[key] = data
            self.log.append(("create", key))
            return True

    def holds(self, key: str, data: bytes) -> bool:
        """Reads back what could not be written, as a store does whose reply may have been lost."""
        return self.files.get(key) == data

    def children(self, prefix: str) -> list[str]:
        with self._lock:
            return self.files.in_directory(prefix)

    def list(self, prefix: str) -> list[Entry]:
        with self._lock:
            keys = [prefix] if prefix in self.files else []
            keys += self.files.below(prefix)
            return [self._entry(key, self.files[key]) for key in keys]

    def _entry(self, key: str, data: bytes) -> Entry:
        return Entry(key, len(data))

    def digest(
        self, key: str, expected_size: int | None = None, *, like: str = ""
    ) -> tuple[int, str]:
        data = self.files[key]
        return len(data), _digest(data, like or self.digest_kind)

    def delete(self, prefix: str, *, last: str | None = None) -> None:
        with self._lock:
            keys = [prefix] if prefix in self.files else []
            keys += self.files.below(prefix)
            for key in sorted(keys, key=lambda key: key == f"{prefix}/{last}"):
                self._change()  # file by file: it can be cut in the middle
                del self.files[key]
                self._volatile.discard(key)
            self.log.append(("delete", prefix))

    def sync(self, prefix: str, keys: Iterable[str]) -> None:
        with self._lock:
            self._change()
            for key in keys:
                self._volatile.discard(key)
                self.log.append(("sync", key))


class MemoryStore(_MemoryFiles):
    """A file system in memory: `_MemoryFiles` whose directories can be renamed."""

    told = "a file system; what is not synced is empty when the power has gone"

    def rename(self, source: str, destination: str) -> None:
        with self._lock:
            if self.children(destination):
                raise StorageError(f"{destination} is there already", errno=17)
            keys = self.files.below(source)
            parent = destination.rpartition("/")[0]
            if not keys or (parent and not self.children(parent)):
                raise KeyError(source)
            self._change()
            for key in keys:
                moved = destination + key[len(source) :]
                self.files[moved] = self.files.pop(key)
                if key in self._volatile:
                    self._volatile.remove(key)
                    self._volatile.add(moved)
            self.log.append(("rename", destination))


class _Written(_Files):
    """Files, and for each which writing it is."""

    def __init__(self) -> None:
        super().__init__()
        self.generations: dict[str, int] = {}

    def __setitem__(self, key: str, data: bytes) -> None:
        super().__setitem__(key, data)
        self.generations[key] = self.generations.get(key, 0) + 1


class MemoryBucket(_MemoryFiles):
    """A bucket in memory: no renaming, digests in listings, and a file can be replaced on a
    condition. What is written is durable at once.
    """

    told = "a bucket; what it holds is durable, and nothing can be renamed"
    root = "gs://memory"
    digest_kind = "md5"

    def __init__(self) -> None:
        super().__init__()
        self.files = self._written = _Written()

    def lose_power(self) -> Sequence[str]:
        self._volatile.clear()
        return ()

    def _entry(self, key: str, data: bytes) -> Entry:
        return _listed(key, data, self._written.generations[key])

    def delete_listed(self, entries: Sequence[Entry]) -> None:
        with self._lock:
            for entry in entries:
                there = self.files.get(entry.key)
                if there is not None and entry.generation in (
                    "",
                    str(self._written.generations[entry.key]),
                ):
                    self._change()
                    del self.files[entry.key]

    def replace(self, key: str, expected: bytes, data: bytes, *, seen: Entry | None = None) -> bool:
        with self._lock:
            if self.files.get(key) != expected:
                return self.holds(key, data)
            if seen is not None and seen.generation != str(self._written.generations[key]):
                return False
            self._change()
            self.files[key] = data
            self.log.append(("replace", key))
            return True

    def copy(self, source: str, destination: str, names: Sequence[str]) -> None:
        for name in names:
            with self._lock:
                data = self.files[f"{source}/{name}"]
                if f"{destination}/{name}" not in self.files:
                    self._change()
                    self.files[f"{destination}/{name}"] = data
        self.log.append(("copy", destination))


class _Stepped:
    """Memory as one job sees it: `step` is called before each operation, with what it is and
    whether it changes anything. What a batch copies or deletes is an operation for each file.
    """

    one_at_a_time = True

    def __init__(self, files: Any, step: Callable[[str, bool], None]) -> None:
        self._files, self._step = files, step
        self.root, self.digest_kind = files.root, files.digest_kind

    def _do(self, method: str, key: str, *arguments: Any, changes: bool = True) -> Any:
        self._step(f"{method}: {key or 'the root'}", changes)
        return getattr(self._files, method)(key, *arguments)

    def get(self, key: str) -> bytes:
        return self._do("get", key, changes=False)

    def put(self, key: str, data: bytes) -> None:
        self._do("put", key, data)

    def write(self, key: str, data: bytes) -> None:
        self._do("write", key, data)

    def create(self, key: str, data: bytes) -> bool:
        return self._do("create", key, data)

    def children(self, prefix: str) -> list[str]:
        return self._do("children", prefix, changes=False)

    def list(self, prefix: str) -> list[Entry]:
        return self._do("list", prefix, changes=False)

    def digest(self, key: str, expected_size: int | None = None, *, like: str = "") -> Any:
        self._step(f"digest: {key}", False)
        return self._files.digest(key, expected_size, like=like)

    def delete(self, prefix: str, *, last: str | None = None) -> None:
        keys = [entry.key for entry in self.list(prefix)]
        for key in sorted(keys, key=lambda key: key == f"{prefix}/{last}"):
            self._do("delete", key)

    def sync(self, prefix: str, keys: Iterable[str]) -> None:
        self._step(f"sync: {prefix}", True)
        self._files.sync(prefix, keys)


class _SteppedFiles(_Stepped):
    def rename(self, source: str, destination: str) -> None:
        self._step(f"rename: {source} to {destination}", True)
        self._files.rename(source, destination)


class _SteppedBucket(_Stepped):
    """Where a reply is lost, the request was done, and is made again as `BucketStore` makes it:
    with the condition that it had. Others may act in between. Each request is also `sent`: with the
    same condition it may arrive once more, or only after its host has died.
    """

    def __init__(
        self,
        files: MemoryBucket,
        step: Callable[[str, bool], None],
        is_lost: Callable[[], bool],
        sent: Callable[[str, Callable[[], object]], None],
    ) -> None:
        super().__init__(files, step)
        self._is_lost, self._sent = is_lost, sent

    def _change(
        self, what: str, request: Callable[[], _Result], again: Any = None, late: Any = None
    ) -> _Result:
        try:
            self._step(what, True)
        finally:
            self._sent(what, late or request)
        result = request()
        while self._is_lost():
            self._step(f"{what}{ONCE_MORE}", True)
            result = (again or request)()
        return result

    def _do(self, method: str, key: str, *arguments: Any, changes: bool = True) -> Any:
        if not changes:
            return super()._do(method, key, *arguments, changes=False)
        request = functools.partial(getattr(self._files, method), key, *arguments)
        return self._change(f"{method}: {key}", request)

    def replace(self, key: str, expected: bytes, data: bytes, *, seen: Entry | None = None) -> bool:
        if seen is None and key in self._files.files:
            [at] = (entry for entry in self._files.list(key) if entry.key == key)
        else:
            at = seen
        # Once done, it is refused: what it was to replace, by its generation, is gone.
        return self._change(
            f"replace: {key}",
            lambda: self._files.replace(key, expected, data, seen=seen),
            lambda: self._files.holds(key, data),
            lambda: at is not None and self._files.replace(key, expected, data, seen=at),
        )

    def copy(self, source: str, destination: str, names: Sequence[str]) -> None:
        for name in names:
            self._change(
                f"copy: {source}/{name} to {destination}",
                functools.partial(self._files.copy, source, destination, [name]),
            )

    def delete_listed(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._change(
                f"delete: {entry.key}", functools.partial(self._files.delete_listed, [entry])
            )


def stepped(
    files: MemoryStore | MemoryBucket,
    step: Callable[[str, bool], None],
    is_lost: Callable[[], bool] = lambda: False,
    sent: Callable[[str, Callable[[], object]], None] = lambda what, request: None,
) -> Any:
    """Returns a store over `files` of which each operation is a step of its own: `step(what,
    changes)` is called before it, and may raise, wait, or let others act. In a bucket `is_lost()`
    is asked after each change; where it says so, its reply is lost, and the change is asked for
    again. `sent(what, request)` is told of each change; who calls `request` lets it arrive late.
    """
    if isinstance(files, MemoryBucket):
        return _SteppedBucket(files, step, is_lost, sent)
    return _SteppedFiles(files, step)


class MemoryArrays:
    """An array writer: files of each host, and one of the primary after all hosts."""

    def __init__(self, store: MemoryStore, host: int, content: Mapping[str, bytes]) -> None:
        self._store = store
        self._host = host
        self._content = content
        self._work: Callable[[], None] = lambda: None
        self._released = False

    def choose(self) -> None:
        return None

    def start(self, prefix: str, all_written: Callable[[], None], choice: Any) -> MemoryArrays:
        def work() -> None:
            assert self._released, "nobody may write before the step is claimed"
            for name, data in self._content.items():
                self._store.write(f"{prefix}/state/ocdbt.process_{self._host}/{name}", data)
            all_written()
            if self._host == 0:
                self._store.write(f"{prefix}/state/manifest", b"merged")

        self._work = work
        return self

    def release(self) -> None:
        self._released = True

    def cancel(self) -> None:
        """Before `release` nothing was written, and nothing will be."""
        if not self._released:
            self._work = lambda: None

    def wait(self, timeout_seconds: float) -> None:
        work, self._work = self._work, lambda: None
        work()

    def digests(self) -> dict[str, tuple[int, str]]:
        return {}

    def notes(self) -> dict[str, str]:
        return {}

    def parts(self, host: int, children: Callable[[str], Sequence[str]]) -> list[str]:
        if host:
            return [f"state/ocdbt.process_{host}"]
        found = [name for name in children("") if name not in ("state/", "data/", "hosts/")]
        found += [f"state/{name}" for name in children("state")]
        return [name for name in found if self.owns(name, host)]

    def owns(self, key: str, host: int) -> bool:
        part = key.partition("ocdbt.process_")[2]
        return int(part.split("/")[0]) == host if part else host == 0
