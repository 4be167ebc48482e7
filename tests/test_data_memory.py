"""Loaders that use their memory again: for each shape, or later only; and shards that have some in
common.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import random
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_data import restore, save
from test_data_rows import (
    Plain,
    bag_of_one,
    column_of_objects,
    list_of_ints,
    object_of_attributes,
    some_bytes,
)

from datarax_dist.data import batches, shards, tracked
from datarax_dist.errors import InvalidArgumentError, PositionError


class Taking(Plain):
    """A loader that has a buffer for each name, and writes the number of each batch into it."""

    def __init__(self, names: Iterable[Any], make: Callable[[Any], Any]) -> None:
        super().__init__(())
        self.names = list(names)
        self.buffers = {name: make(name) for name in set(self.names)}

    def __next__(self) -> Any:
        if self.at == len(self.names):
            raise StopIteration
        found = self.buffers[self.names[self.at]]
        found[:] = self.at
        self.at += 1
        return found


LENGTHS = [8, 16, 24, 32, 8, 8, 16, 16, 24, 24, 8, 24, 24, 24, 16, 32, 32, 8]


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_what_waits_is_not_written_again_where_each_shape_has_its_buffer(depth: int) -> None:
    loader = Taking(LENGTHS, lambda length: np.empty((2, length), int))
    found = [(batch.shape[1], int(batch[0, 0])) for batch in tracked(loader, depth)]
    assert found == [(length, k) for k, length in enumerate(LENGTHS)]


def test_a_shape_that_came_often_in_new_memory_is_handed_out_as_it_is() -> None:
    made = [np.full(2 + k % 3, k) for k in range(20)]
    found = list(tracked(Plain(made), 2))
    assert [mine is theirs for mine, theirs in zip(found, made, strict=True)] == (
        [False] * 9 + [True] * 11
    )


def late() -> Any:
    """Its first batches have memory of their own."""
    return Taking("abcdabccab", lambda _: np.zeros((2, 3), int))


def test_what_was_written_over_while_it_waited_is_not_handed_out() -> None:
    loader = tracked(late(), 2)
    assert [int(next(loader)[0, 0]) for _ in range(6)] == list(range(6))
    for _ in range(2):
        with pytest.raises(InvalidArgumentError, match=r"written over.*read 0 or 1 batches ahead"):
            next(loader)
    again = tracked(late(), 1)
    restore(save(loader), again)
    assert [int(batch[0, 0]) for batch in again] == [6, 7, 8, 9]


@pytest.mark.parametrize("how", ["each its own", "new at first", "now and then", "of one shape"])
def test_wherever_a_loader_writes_again_nothing_wrong_is_handed_out(how: str) -> None:
    """By chance it takes new memory, or one of its buffers. It may be an error; some are none."""
    ended = 0
    for seed in range(150):
        chance = random.Random(seed)
        sizes, new = [chance.randrange(1, 5) for _ in range(40)], itertools.count()
        names: list[Any] = list(sizes)
        if how == "new at first":
            names[:6] = [(size, next(new)) for size in sizes[:6]]
        elif how == "now and then":
            names = [(size, next(new)) if chance.random() < 0.5 else size for size in sizes]
        elif how == "of one shape":
            rates = [max(0.0, 1 - at / 20) for at in range(40)]
            names = [
                next(new) if chance.random() < rate else -chance.randrange(3) for rate in rates
            ]
        make = lambda name: np.zeros(5 if how == "of one shape" else np.ravel(name)[0], int)
        it = tracked(Taking(names, make), chance.randrange(6))
        handed = itertools.count()
        try:
            for batch in it:
                number = next(handed)
                assert set(batch.tolist()) == {number}, (seed, number)
            assert next(handed) == 40
            ended += 1
        except InvalidArgumentError:
            pass
    assert ended > 50


def test_what_is_handed_out_before_it_is_written_over_is_no_error() -> None:
    for depth in (0, 1):
        assert [int(batch[0, 0]) for batch in tracked(late(), depth)] == list(range(10))
    placed = tracked(late(), 2, place=lambda batch: {"x": batch.copy()})
    assert [int(batch["x"][0, 0]) for batch in placed] == list(range(10))


@pytest.mark.parametrize(
    "make", [bag_of_one, list_of_ints, column_of_objects, object_of_attributes, some_bytes]
)
def test_a_container_that_is_filled_again_later_is_not_handed_out(make: Any) -> None:
    def found() -> Iterator[Any]:
        filled, fill, _ = make()
        for k in range(12):
            if k < 9:
                filled, fill, _ = make()
            fill(k)
            yield {"in": filled}

    loader, read = tracked(Plain(found()), 2), make()[2]
    assert [int(read(next(loader)["in"])) for _ in range(8)] == list(range(8))
    with pytest.raises(InvalidArgumentError, match="written over"):
        next(loader)


@dataclasses.dataclass
class Counted:
    values: list[int]
    sums: int | None = None

    def sum(self) -> int:
        self.total = sum(self.values)
        return self.total


CONSTANTS: dict[str, Callable[[], Any]] = {
    "array": lambda: np.arange(5000.0),
    "part of an array": lambda: np.arange(60.0).reshape(6, 10)[::2, ::3],
    "nan": lambda: np.full((2, 2), np.nan),
    "padded": lambda: np.zeros(8, np.dtype([("a", "i1"), ("b", "f8")], align=True))[::2],
    "texts": lambda: np.array(["a", "b" * 100] * 2, dtype=np.dtypes.StringDType())[1::2],
    "objects": lambda: np.array([[1], None], object),
    "list": lambda: ["a", 1, float("nan"), [2]],
    "dict": lambda: {"a": {"b": np.ones(1)}},
    "object": lambda: Counted([1, 2]),
    "row": lambda: np.zeros(2, [("a", "i1"), ("b", "f8")])[0],
    "raw": lambda: bytearray(b"ab"),
}


@pytest.mark.parametrize("kind", CONSTANTS)
def test_what_is_the_same_in_some_later_batches_is_no_error(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    always = CONSTANTS[kind]()

    def found() -> Iterator[Any]:
        for k in range(12):
            yield {"x": np.full(2, k), "c": always if k in (5, 6, 8, 9) else CONSTANTS[kind]()}
            if kind == "object" and k == 5:
                always.sum()  # which it keeps
            np.full(64, k, np.uint8)  # in the gaps of the next 64 bytes

    for k, batch in enumerate(tracked(Plain(found()), 2)):
        assert batch["x"].tolist() == [k, k]
        assert repr(batch["c"]) == repr(always)
    [record] = caplog.records
    assert "batches have memory in common, of which the first ones had none" in record.message


def test_records_that_come_again_in_the_next_epoch_are_no_error() -> None:
    records = [np.full(3 + k, k) for k in range(8)]
    orders = [[*range(8)], [*range(8)], [7, 6, *range(6)], [7, *range(7)]]
    order = list(itertools.chain(*orders))

    def found() -> Iterator[Any]:
        for k in range(0, len(order), 2):
            yield {"rows": [records[n] for n in order[k : k + 2]]}

    seen = [int(row[0]) for batch in tracked(Plain(found()), 2) for row in batch["rows"]]
    assert seen == order


def test_what_was_placed_is_not_kept_itself() -> None:
    kept = []

    def found() -> Iterator[Any]:
        for k in range(12):
            fresh = np.full(2, k)
            kept.append(weakref.ref(fresh))
            given = {"fresh": fresh}
            del fresh
            yield given
            del given

    loader = tracked(Plain(found()), 3, place=lambda batch: jax.numpy.array(batch["fresh"]))
    for _ in range(8):
        next(loader)
    gc.collect()
    assert [k for k, one in enumerate(kept[:-1]) if one() is not None] == []


# The parts of one batch wait for one another.


class Common(Plain):
    """All shards write into what they have in common."""

    def __init__(self, shard: int, count: int, hold: Any, at: dict[str, Any]) -> None:
        super().__init__(self.made(shard, count, hold, at))

    @staticmethod
    def made(shard: int, count: int, hold: Any, at: dict[str, Any]) -> Iterator[Any]:
        for k in range(6):
            array = at["late"] if k < at["from"] else at["x"]
            if array is None:
                array = np.empty(2, int)
            array[:] = k * count + shard
            yield hold(array)


PARTS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "array": (lambda x: x, lambda b: b),
    "in a dict": (lambda x: {"x": (x,)}, lambda b: b["x"][0]),
    "rows": (lambda x: {"x": [x[:1], x[1:]]}, lambda b: np.concatenate(b["x"])),
}


@pytest.mark.parametrize(
    ("kind", "begin"), [(kind, 0) for kind in PARTS] + [("array", 4), ("in a dict", 4)]
)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_shards_that_have_a_buffer_in_common_give_the_rows_of_each(
    kind: str, count: int, begin: int
) -> None:
    hold, held = PARTS[kind]
    at = {"x": np.empty(2, int), "late": None, "from": begin}
    loader = shards(lambda shard, count: Common(shard, count, hold, at), count)
    for k in range(6):
        rows = [k * count + shard for shard in range(count)]
        assert held(next(loader)).tolist() == np.repeat(rows, 2).tolist()


def test_shards_that_write_over_the_items_of_another_one_later_are_told() -> None:
    at = {"x": np.empty(2, int), "late": None, "from": 4}
    hold, held = PARTS["rows"]
    loader = shards(lambda shard, count: Common(shard, count, hold, at), 3)
    for k in range(4):
        assert held(next(loader)).tolist() == np.repeat(range(3 * k, 3 * k + 3), 2).tolist()
    with pytest.raises(InvalidArgumentError, match=r"written over.*memory of its own"):
        next(loader)
    with pytest.raises(PositionError, match="make the loader anew"):
        save(loader)


@pytest.mark.parametrize("other", [np.int8, ">i4", "U2", object])
def test_rows_of_other_kinds_are_joined_as_numpy_does_it(other: Any) -> None:
    parts = [np.arange(4).reshape(2, 2).astype(other), np.arange(10, 14).reshape(2, 2)]
    parts[1] = np.asfortranarray(parts[1].astype(other))
    batch = next(shards(lambda shard, count: Plain([{"x": parts[shard], "n": [1, "a"]}]), 2))
    want = np.concatenate(parts)
    assert (batch["x"].dtype, batch["x"].tolist()) == (want.dtype, want.tolist())
    assert batch["n"] == [1, "a"] * 2


def test_a_column_of_texts_that_shards_have_in_common_has_the_items_of_each() -> None:
    column = ["", ""]

    def found(shard: int) -> Iterator[Any]:
        for k in range(3):
            column[:] = f"{shard}{k}"
            yield {"texts": column}

    loader = shards(lambda shard, count: Plain(found(shard)), 2)
    assert [next(loader)["texts"] for k in range(3)] == [["0", k, "1", k] for k in "012"]


class Column:
    """As one of a table."""

    shape = (2,)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.arange(2)


class Refusing(Column):
    dtype = np.dtype(int)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise TypeError("Got unsupported ScalarType")


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        (np.ma.masked_invalid([1.0, np.nan]), "MaskedArray"),
        (np.ma.masked_invalid(np.zeros(0)), "MaskedArray"),
        (np.rec.array([(1, 2)], dtype=[("a", int), ("b", int)]), "recarray"),
        (Column(), "Column"),
        (Refusing(), "Refusing"),
    ],
)
def test_rows_that_would_lose_something_are_not_joined(rows: Any, kind: str) -> None:
    assert next(shards(lambda shard, count: Plain([{"x": rows}]), 1))["x"] is rows
    with pytest.raises(InvalidArgumentError, match=rf"^x is a .*{kind}, whose rows cannot be"):
        next(shards(lambda shard, count: Plain([{"x": rows}]), 2))


def test_arrays_in_files_are_joined(tmp_path: Path) -> None:
    rows = np.memmap(tmp_path / "rows", int, "w+", shape=(2,))
    rows[:] = [1, 2]
    assert next(shards(lambda shard, count: Plain([rows]), 2)).tolist() == [1, 2, 1, 2]


def test_bytes_that_are_looked_at_are_rows() -> None:
    found = next(shards(lambda shard, count: Plain([{"x": memoryview(b"ab")}]), 2))
    assert found["x"].tobytes() == b"abab"


@pytest.mark.parametrize("kind", [list, type("Fields", (list,), {})])
def test_a_list_of_arrays_is_one_for_any_number_of_shards(kind: Any) -> None:
    for count in (1, 2):
        made = kind([np.ones(2), np.zeros((2, 3))])
        found = next(shards(lambda shard, count, made=made: Plain([made]), count))
        assert type(found) is (list if count == 2 else kind)
        assert [part.shape for part in found] == [(2 * count,), (2 * count, 3)]


def test_texts_of_other_lengths_are_joined() -> None:
    texts = [["a", "b"], ["long", "longer"], ["c", "d"]]
    batch = next(shards(lambda shard, count: Plain([np.array(texts[shard])]), 3))
    assert batch.tolist() == ["a", "b", "long", "longer", "c", "d"]


def test_one_shard_is_handed_out_as_it_is() -> None:
    made = [{"x": np.full(2, k), "rows": [np.ones(k)] * 2} for k in range(4)]
    found = shards(lambda shard, count: Plain(made), 1)
    assert all(mine is theirs for mine, theirs in zip(found, made, strict=True))


def test_the_parts_of_shards_with_a_buffer_each_are_not_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copied = []
    real = batches.Parts.copied
    monkeypatch.setattr(batches.Parts, "copied", lambda parts: copied.append(1) or real(parts))

    def of_one(shard: int, count: int) -> Any:
        at = {"x": np.empty(2, int), "late": None, "from": 0}
        return Common(shard, count, hold, at)

    hold, held = PARTS["rows"]
    loader = shards(of_one, 2)
    for k in range(6):
        assert held(next(loader)).tolist() == [2 * k, 2 * k, 2 * k + 1, 2 * k + 1]
    assert len(copied) == 3


@pytest.mark.parametrize(
    "held", ["web", ["a"], bytearray(b"a"), np.ones(3)], ids=["text", "list", "bytes", "array"]
)
def test_rows_may_have_something_in_common_that_stays(
    held: Any, caplog: pytest.LogCaptureFixture
) -> None:
    constant = {"source": held}

    def factory(shard: int, count: int) -> Iterator[Any]:
        return Plain([[{"at": at, "of": constant}] for at in range(20)])

    rows = list(shards(factory, 3))
    assert [[row["at"] for row in batch] for batch in rows] == [[at] * 3 for at in range(20)]
    assert all(np.array_equal(row["of"]["source"], held) for batch in rows for row in batch)
    assert caplog.text == ""
    # What is seen as a whole is no reason to copy all rows.
    is_copied = {row["of"] is not constant for batch in rows[5:] for row in batch}
    assert is_copied == {isinstance(held, np.ndarray)}


@pytest.mark.parametrize("begin", [0, 1, 40])
def test_a_dict_that_shards_have_in_common_is_seen_to_be_written_over(begin: int) -> None:
    common = {"number": -1}

    def made(shard: int, count: int) -> Iterator[Any]:
        for number in range(shard, 80, count):
            common["number"] = max(0, number - begin)
            yield [{"of": common}]

    loader, found = shards(lambda shard, count: Plain(made(shard, count)), 4), []
    with (
        contextlib.nullcontext() if begin < 4 else pytest.raises(InvalidArgumentError, match="over")
    ):
        for batch in loader:
            found += [row["of"]["number"] for row in batch]
    assert found == [max(0, number - begin) for number in range(len(found))]
    assert len(found) == (80 if begin < 4 else 40)


def padded(array: Any, number: int) -> None:
    array[:] = 0
    array[number] = number


def boxed(array: Any, number: int) -> None:
    array[:] = 0
    array[number, number + 100] = number  # not on the diagonal


def begun_late(array: Any, number: int) -> None:
    array[:] = max(0, number - 9)


def told(array: Any, number: int) -> None:
    array[:] = f"a text that is no short one: {number}"


def named(array: Any, number: int) -> None:
    array["text"] = str(number)


@pytest.mark.parametrize(
    ("buffer", "write"),
    [
        (np.zeros(4096, np.int32), padded),
        (np.zeros((512, 512), np.int8), boxed),
        (np.zeros(4), begun_late),
        (np.zeros(2, np.dtypes.StringDType()), told),  # type: ignore[call-overload]
        (np.zeros(2, [("at", "i4"), ("text", object)]), named),
    ],
    ids=["padded", "boxed", "begun late", "texts", "structured"],
)
@pytest.mark.parametrize("is_row", [False, True])
def test_however_alike_it_is_what_shards_write_into_one_buffer_is_that_of_each(
    buffer: Any, write: Callable[[Any, int], None], is_row: bool
) -> None:
    def made(shard: int, count: int) -> Iterator[Any]:
        for number in range(shard, 40, count):
            write(buffer, number)
            yield {"x": [buffer] if is_row else buffer}

    def wanted(number: int) -> Any:
        array = buffer.copy()
        write(array, number)
        return array

    loader = shards(lambda shard, count: Plain(made(shard, count)), 4)
    for first, batch in zip(range(0, 40, 4), loader, strict=True):
        rows = np.split(batch["x"], 4) if not is_row else batch["x"]
        for number, row in enumerate(rows, first):
            assert np.array_equal(row, wanted(number))


def test_a_log_that_grows_is_no_error() -> None:
    def loader() -> Iterator[Any]:
        log: list[int] = []
        for at in range(20):
            log.append(at)
            yield {"x": np.full(3, at), **({"log": log} if at > 8 else {})}

    batches = [batch["x"][0] for batch in tracked(Plain(loader()), 4)]
    assert batches == list(range(20))


def test_what_was_handed_out_is_not_kept() -> None:
    class Batch(dict[str, Any]):
        pass

    it = tracked(Plain(Batch(x=np.zeros(at)) for at in [3] * 30), 4)
    for _ in range(10):
        batch = next(it)
    alive = weakref.ref(batch)
    del batch
    assert alive() is None
    for batch in it:
        alive = weakref.ref(batch)
    del batch
    assert alive() is None
