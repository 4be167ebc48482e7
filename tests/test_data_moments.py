"""When a position is read or set: amid a batch, by a signal handler or another thread; after the
end; inside of what was put around it.
"""

from __future__ import annotations

import gc
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import loaders
import numpy as np
import pytest
from targets import Counter
from test_data import Opaque, restore, save, taken

import datarax_dist as dd
from datarax_dist.data import (
    DataAdapter,
    memory,
    positions,
    register_adapter,
    replay,
    shards,
    tracked,
)
from datarax_dist.data.memory import remembered
from datarax_dist.data.ownership import acting_as_host
from datarax_dist.errors import PositionError

# A signal handler runs on the thread that makes a batch, between any two of its instructions.


def amid(act: Callable[[], Any], batch: int = 2, shard: int = 1) -> Callable[[int, int], Any]:
    """Returns a factory of loaders; that of a shard calls `act` while it makes a batch."""

    class Signalled(loaders.Stream):
        def __next__(self) -> Any:
            if (self.records[0], self.at) == (shard, batch):
                act()
            return super().__next__()

    return Signalled


def test_a_handler_that_saves_amid_a_batch_of_shards_is_told_what_to_do() -> None:
    refused = []

    def handler(*_: Any) -> None:
        with pytest.raises(PositionError, match=r"signal handler.*set a flag.*tracked") as caught:
            save(loader)
        refused.append(caught.value)

    loader = shards(amid(lambda: signal.raise_signal(signal.SIGUSR1)), 2)
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        taken(loader, 3)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(refused) == 1
    assert loader.batches() == 3
    assert save(loader) == save(taken(shards(amid(int), 2), 3))


@pytest.mark.parametrize(("batch", "shard"), [(0, 0), (2, 1)])
def test_a_handler_cannot_take_or_restore_amid_a_batch_of_shards(batch: int, shard: int) -> None:
    step = save(shards(loaders.Stream, 2))
    refused = []

    def handler() -> None:
        for use in (lambda: next(loader), lambda: restore(step, loader)):
            with pytest.raises(PositionError, match="next batch is being made") as caught:
                use()
            refused.append(caught.value)

    loader = shards(amid(handler, batch, shard), 2)
    assert [next(loader)["id"].tolist() for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert len(refused) == 2


def test_a_handler_cannot_restore_amid_the_first_batch_of_tracked() -> None:
    step = save(tracked(Opaque(), 2))

    class Signalled(Opaque):
        def __next__(self) -> Any:
            if not self.at:
                with pytest.raises(PositionError, match="any more: it has handed out 0 batches"):
                    restore(step, loader, allow=["data.class"])
            return super().__next__()

    loader = tracked(Signalled(), 2)
    assert [next(loader)["id"].tolist() for _ in range(2)] == [[0], [1]]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_handler_that_saves_amid_a_batch_of_tracked_saves_the_position_before_it(
    depth: int,
) -> None:
    def make(act: Callable[[], Any]) -> Any:
        return tracked(shards(amid(act), 2), depth)

    found: list[Any] = []
    loader = make(lambda: found.append((loader.batches(), save(loader))))
    straight = make(int)
    steps = [save(straight), *(save(taken(straight, 1)) for _ in range(4))]
    taken(loader, 4)
    [(batches, step)] = found
    assert step == steps[batches]
    assert batches == 3 - max(depth, 1)


def test_a_handler_that_ends_the_taking_of_a_batch_loses_none_silently() -> None:
    class Cut:
        """Ctrl-C comes as soon as the batch is no longer waiting."""

        def popleft(self) -> Any:
            inner.popleft()
            raise KeyboardInterrupt

        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        def __len__(self) -> int:
            return len(inner)

        def __getitem__(self, number: Any) -> Any:
            return inner[number]

    loader = tracked(Opaque(), 2)
    step = save(taken(loader, 1))
    inner = loader._waiting
    loader._waiting = Cut()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        next(loader)
    loader._waiting = inner
    assert save(loader) == step
    with pytest.raises(PositionError, match="Taking a batch failed with KeyboardInterrupt"):
        next(loader)


def test_a_position_of_replay_that_is_read_amid_a_batch_is_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from datarax_dist.data import streams

    loader = replay(lambda: iter(np.arange(9)))
    found = []
    real = streams._digest
    monkeypatch.setattr(streams, "_digest", lambda batch: found.append(save(loader)) or real(batch))
    taken(loader, 3)
    monkeypatch.undo()
    for k, step in enumerate(found):
        again = replay(lambda: iter(np.arange(9)))
        restore(step, again)
        assert next(again) == k


# Another thread.


def test_what_is_saved_of_a_moment_is_of_one_moment() -> None:
    """The number of batches, of records and the positions, while another thread takes batches."""

    class Slow(loaders.Stream):
        pass

    class SlowAdapter(DataAdapter):
        def fingerprint(self) -> dict[str, Any]:
            asked.set()
            moved.wait(10)
            return {}

    asked, moved = threading.Event(), threading.Event()
    register_adapter(f"{Slow.__module__}.{Slow.__qualname__}", SlowAdapter)
    loader = taken(shards(Slow, 2, batches=40), 2)
    taker = threading.Thread(target=lambda: (asked.wait(10), taken(loader, 1), moved.set()))
    taker.start()
    pace = positions.Pace(1)
    with acting_as_host(0, 1):
        captured = positions.capture(loader, 0, 1, 1, pace)
    taker.join()
    again = shards(Slow, 2, batches=40)
    restore({**captured.indexes, **captured.files}, again)
    assert again.batches() == 2
    assert next(again)["id"].tolist() == [4, 5]
    assert pace._offsets[loader] == 1


# After the end.


class Steps(loaders.Stream):
    """One whose iterators are other objects, which do not begin anew."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        while True:
            try:
                yield super().__next__()
            except StopIteration:
                return


@pytest.mark.parametrize("make", [loaders.Stream, Steps])
@pytest.mark.parametrize("limit", [None, 3])
def test_an_older_step_is_not_restored_into_shards_that_saw_their_end(
    make: Any, limit: int | None
) -> None:
    def epoch() -> Any:
        return shards(lambda s, n: make(s, n, 6), 2, batches=limit)

    older = save(taken(epoch(), 1))
    loader = epoch()
    restore(save(taken(epoch(), 3)), loader)
    assert list(loader) == []
    with pytest.raises(PositionError, match=r"any more: it has handed out 0 batches and ended"):
        restore(older, loader)


# Inside.


class WithSlots:
    __slots__ = ("at",)

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        self.at += 1
        return self.at

    def get_state(self) -> int:
        return self.at

    def set_state(self, state: int) -> None:
        self.at = state


@pytest.mark.parametrize(
    "make", [lambda: shards(loaders.Stream, 2), Opaque, WithSlots], ids=["shards", "raw", "slots"]
)
def test_what_tracked_was_put_around_is_not_saved_or_restored_by_itself(make: Any) -> None:
    inner = make()
    step = save(inner)
    outer = tracked(inner, 3)
    next(outer)
    for use in (lambda: save(inner), lambda: restore(step, inner)):
        with pytest.raises(PositionError, match=r"tracked\(\.\.\.\) was put around this"):
            use()
    assert save(outer)
    fresh = make()
    restore(step, fresh)  # before it is wrapped
    assert save(tracked(fresh, 3)).keys() == step.keys()


def test_the_loader_of_a_data_shard_is_not_saved_by_itself() -> None:
    inner = [Opaque(), Opaque()]
    outer = shards(lambda s, n: inner[s], 2)
    next(outer)
    with pytest.raises(PositionError, match=r"shards\(\.\.\.\) was put around this Opaque"):
        save(inner[1])


def test_batches_are_counted_on_when_what_was_restored_is_wrapped() -> None:
    def epoch() -> Any:
        return shards(loaders.Stream, 2, batches=6)

    inner = epoch()
    restore(save(taken(epoch(), 3)), inner)
    outer = tracked(inner, 2)
    assert outer.batches() == 3
    step = save(taken(outer, 1))
    assert outer.batches() == 4
    again = tracked(epoch(), 2)
    restore(step, again)
    assert len(list(again)) == 2


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_loader_with_slots_does_not_forget_that_a_restore_has_failed(
    tmp_path: Path, wrapped: bool
) -> None:
    class Bad(Opaque):
        def set_state(self, state: Any) -> None:
            raise ValueError("moved")

    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(0, data={"a": WithSlots(), "b": Bad()})
        ckpt.wait_until_finished()
        half = WithSlots()
        with pytest.raises(PositionError, match="moved"):
            ckpt.restore(data={"a": half, "b": Bad()})
        with pytest.raises(PositionError, match="Make the loader anew"):
            ckpt.save(1, data={"a": tracked(half, 1) if wrapped else half})


# Again.


def test_replay_does_not_end_quietly_after_an_error() -> None:
    def batches() -> Iterator[int]:
        yield 1
        raise OSError(5, "the disk")

    loader = taken(replay(batches), 1)
    step = save(loader)
    with pytest.raises(OSError, match="the disk"):
        next(loader)
    with pytest.raises(PositionError, match=r"replay\(\) failed with OSError.*Go on from"):
        next(loader)
    assert save(loader) == step  # it counts what was handed out


def test_replay_goes_through_one_epoch() -> None:
    loader = replay(lambda: iter([1, 2]))
    assert list(loader) == [1, 2]
    assert next(loader, None) is None
    with pytest.raises(PositionError, match="This epoch has ended"):
        list(loader)
    loader.set_state({"batches": 1, "last": ""})
    assert list(loader) == [2]


class OfSlots:
    """It cannot be told when it goes."""

    __slots__ = ("at",)

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[int]:
        while self.at < 100:
            self.at += 1
            yield self.at

    def get_state(self) -> dict[str, int]:
        return {"at": self.at}

    def set_state(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def test_what_is_known_of_a_loader_is_not_taken_for_that_of_another_in_its_place() -> None:
    class Maker:
        """Its iterators have positions, and it is not needed after them."""

        __slots__ = ()

        def __iter__(self) -> Counter:
            return Counter(0, 1)

    around = [tracked(Maker(), 2) for _ in range(50)]
    makers = [Maker() for _ in range(50)]
    assert [remembered(maker).outer for maker in makers] == [None] * 50
    del around


def test_a_loader_that_two_were_put_around_is_known_as_long_as_one_is_there() -> None:
    loader = OfSlots()
    first, second = tracked(loader, 2), tracked(loader, 2)
    del first
    gc.collect()
    assert remembered(loader).outer is not None
    del second
    gc.collect()
    assert remembered(loader).outer is None


def test_two_threads_that_ask_for_a_new_loader_find_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second one asks between any two steps of the first."""
    found = []

    def asked_meanwhile(*args: Any) -> Any:
        monkeypatch.undo()
        thread = threading.Thread(target=lambda: found.append(remembered(loader)))
        thread.start()
        thread.join()
        return weakref.finalize(*args)

    loader = Opaque()
    monkeypatch.setattr(memory.weakref, "finalize", asked_meanwhile)
    found.append(remembered(loader))
    assert found[0] is found[1] is remembered(loader)
