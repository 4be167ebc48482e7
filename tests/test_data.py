"""Data positions one by one: what is refused and how, reading ahead, counting, owning."""

from __future__ import annotations

import gc
import itertools
import json
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import loaders
import numpy as np
import pytest
import targets

import datarax_dist as dd
from datarax_dist import agreement, codec
from datarax_dist import format as fmt
from datarax_dist.data import (
    Checkpointable,
    CheckpointableIterator,
    DataAdapter,
    adapt,
    adapters,
    memory,
    positions,
    register_adapter,
    replay,
    shards,
    tracked,
)
from datarax_dist.data.ownership import acting_as_host
from datarax_dist.errors import (
    CheckpointError,
    InvalidArgumentError,
    PositionError,
    UnsupportedLeafError,
)


def save(loader: Any, host: int = 0, hosts: int = 1, step: int = 0) -> dict[str, bytes]:
    """What one host would write, and the index."""
    with acting_as_host(host, hosts):
        captured = positions.capture(loader, host, hosts, step)
    return {**captured.indexes, **captured.files}


def paced(loader: Any, pace: positions.Pace, step: int) -> None:
    with acting_as_host(0, 1):
        positions.capture(loader, 0, 1, step, pace)


def restore(
    step: dict[str, bytes], loader: Any, host: int = 0, hosts: int = 1, allow: Any = ()
) -> positions.Plan:
    with acting_as_host(host, hosts):
        plan = positions.plan_restore(loader, ["data/data"], step.__getitem__, host, hosts, allow)
        found = positions.decode_positions(plan, step.__getitem__)
        positions.apply_positions(plan, found)
    return plan


def taken(loader: Any, count: int) -> Any:
    for _ in range(count):
        next(loader)
    return loader


class Opaque(loaders.Stream):
    def __init__(self) -> None:
        super().__init__(0, 1)


# What cannot be restored, and what the message says.


def test_an_opaque_loader_on_another_number_of_hosts_names_both_and_the_ways_out() -> None:
    step = save(taken(Opaque(), 3), 0, 4)
    with pytest.raises(PositionError) as caught:
        restore(step, Opaque(), 0, 2)
    for words in ("by 4 hosts", "this job has 2", "on 4 hosts", "data=None", "shards(factory, V)"):
        assert words in str(caught.value)


def test_shards_that_cannot_be_divided_name_the_numbers_that_would_work() -> None:
    with acting_as_host(0, 5), pytest.raises(PositionError, match=r"1, 2, 3, 4, 6, 12\."):
        shards(loaders.Stream, 12).owned()


def test_another_number_of_shards() -> None:
    step = save(taken(shards(loaders.Stream, 4), 1))
    with pytest.raises(PositionError, match=r"4 data shards, the loader has 8.*factory, 4\)"):
        restore(step, shards(loaders.Stream, 8))


@pytest.mark.parametrize(
    ("saved", "now"), list(itertools.permutations(["shards", "opaque", "step-indexed"], 2))
)
def test_another_kind_of_position(saved: str, now: str) -> None:
    make: dict[str, Any] = {
        "shards": lambda: shards(loaders.Stream, 4),
        "opaque": Opaque,
        "step-indexed": lambda: tracked(loaders.Indexed(0, 1), 0),
    }
    with pytest.raises(PositionError, match="Restore into"):
        restore(save(make[saved]()), make[now]())


@pytest.mark.parametrize(
    "make",
    [
        lambda: shards(loaders.Stream, 4),
        lambda: tracked(shards(loaders.Stream, 4), 2),
        lambda: tracked(loaders.Indexed(0, 1), 0),
        lambda: replay(lambda: iter(range(9))),
        lambda: iter(loaders.grain_map(0, 1)),
        lambda: iter(loaders.grain_loader(0, 1)),
        lambda: loaders.grain_elastic(0, 1),
    ],
)
def test_a_loader_that_was_used_is_refused_and_one_that_was_restored_is_not(make: Any) -> None:
    step = save(taken(make(), 2))
    with pytest.raises(PositionError, match=r"cannot be set to a position any more.*Make a new"):
        restore(step, taken(make(), 1))
    again = make()
    restore(step, again)
    assert save(again) == step
    restore(step, again)  # a second try is no harm as long as nothing was taken
    next(again)
    with pytest.raises(PositionError, match="cannot be set"):
        restore(step, again)


def test_a_generator_is_refused_with_what_to_use_instead() -> None:
    with pytest.raises(PositionError, match=r"replay\(make_generator\)"):
        adapt(n for n in range(3))
    with pytest.raises(PositionError, match=r"replay\(factory\)"):
        adapt(iter([1, 2]))
    with pytest.raises(PositionError, match="register_adapter"):
        adapt(object())
    with pytest.raises(PositionError, match="register_adapter"):
        adapt({"a": 1})


@pytest.mark.parametrize("loader", [loaders.grain_loader(0, 1), loaders.grain_map(0, 1)])
def test_a_loader_whose_iterators_have_positions(loader: Any) -> None:
    with pytest.raises(PositionError, match=r"it = iter\(loader\)"):
        save(loader)


def test_a_loader_that_does_not_know_how_far_it_was_used() -> None:
    with pytest.raises(PositionError, match=r"tracked\(loader, 0\)"):
        save(loaders.Indexed(0, 1))


def test_tracked_and_shards_go_around_the_whole() -> None:
    for inner in (tracked(Opaque(), 1), shards(loaders.Stream, 2)):
        with pytest.raises(InvalidArgumentError, match="Put it around the whole"):
            next(shards(lambda s, n, inner=inner: inner, 4))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: shards(loaders.Stream, 0), "number of shards"),
        (lambda: shards(loaders.Stream, True), "number of shards"),
        (lambda: shards(loaders.Stream, "4"), "number of shards"),
        (lambda: shards([1, 2], 4), "function of"),
        (lambda: shards(loaders.Stream, 4, batches=-1), "number of batches"),
        (lambda: tracked(Opaque(), -1), "depth"),
        (lambda: tracked(Opaque(), 1, place=3), "function of a batch"),
        (lambda: replay(n for n in range(3)), r"replay\(lambda:"),
        (lambda: register_adapter("Loader", DataAdapter), "full name"),
        (lambda: register_adapter("a.Loader", 3), "subclass"),
    ],
)
def test_arguments_that_cannot_work(make: Any, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        make()


def test_a_value_that_cannot_be_written_is_named_with_its_item_and_place() -> None:
    class Odd(Opaque):
        def get_state(self) -> Any:
            return {"workers": [{"lock": object()}]}

    with pytest.raises(UnsupportedLeafError, match=r"'train'.*workers/0/lock") as caught:
        positions.capture({"train": Odd()}, 0, 1)
    assert caught.value.path == "workers/0/lock"


def test_what_a_loader_refuses_is_told_with_its_own_words() -> None:
    class Fussy(Opaque):
        def set_state(self, state: Any) -> None:
            raise ValueError("sampler has changed")

    with pytest.raises(PositionError, match=r"'data' refused.*ValueError: sampler has changed"):
        restore(save(Fussy()), Fussy())


# The fingerprint.


def test_each_difference_of_the_pipeline_is_named_old_and_new() -> None:
    def epoch(batch: int, seed: int, records: int = 48, shuffle: bool = True) -> Any:
        dataset = grain.MapDataset.range(records).seed(seed)
        dataset = dataset.shuffle() if shuffle else dataset
        return shards(
            lambda s, n: dataset[s::n].batch(batch).to_iter_dataset(loaders.QUIET),
            4,
            fingerprint={"name": "text", "version": seed},
        )

    step = save(taken(epoch(2, 1), 1))
    restore(step, epoch(2, 1))
    with pytest.raises(PositionError) as caught:
        restore(step, epoch(2, 2))
    text = str(caught.value)
    assert "data.user.version: saved 1, now 2" in text
    assert "allow_data_changes=['data.user.version']" in text
    with pytest.raises(PositionError, match=r"data\.seed: saved \[\d+, 1\], now \[\d+, 2\]"):
        restore(step, epoch(2, 2), allow=["data.user.version"])
    with pytest.raises(PositionError, match=r"data\.global_batch: saved 8, now 12"):
        restore(step, epoch(3, 1))
    with pytest.raises(PositionError, match=r"data\.shuffle: saved \['ShuffleMapDataset'\], now"):
        restore(step, epoch(2, 1, shuffle=False))
    allowed = ["data.user.version", "data.seed", "data.never"]
    changed = restore(step, epoch(2, 2), allow=allowed).changes
    assert set(changed) == {"data.user.version", "data.seed"}
    assert changed["data.user.version"] == (1, 2)


def test_another_class_or_version_of_a_loader_is_another_pipeline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = save(Opaque())
    with pytest.raises(PositionError, match=r"data\.class: saved 'Opaque', now 'Counter'"):
        restore(step, targets.Counter(0, 1))
    step = save(loaders.grain_elastic(0, 1))
    monkeypatch.setattr(adapters, "_version", lambda package: "99.1")
    with pytest.raises(PositionError, match=r"data\.version: saved '0\.[\d.]+', now '99\.1'"):
        restore(step, loaders.grain_elastic(0, 1))


@pytest.mark.parametrize(
    "change",
    [
        {"micro": 2},
        {"records": 128},
        {"epochs": 3},
        {"begin": 8},
    ],
)
def test_what_would_lose_or_repeat_records_is_in_grains_fingerprint(change: dict[str, int]) -> None:
    def epoch(micro: int = 4, records: int = 64, epochs: int = 2, begin: int = 0) -> Any:
        dataset = grain.MapDataset.range(records)[begin:].repeat(epochs).batch(micro)
        return shards(lambda s, n: dataset[s::n].batch(2).to_iter_dataset(loaders.QUIET), 2)

    with pytest.raises(PositionError, match=r"data\.pipeline: saved"):
        restore(save(taken(epoch(), 1)), epoch(**change))


def test_weights_and_operations_are_in_grains_fingerprint() -> None:
    def mixed(weight: float) -> Any:
        parts = [grain.MapDataset.range(64), grain.MapDataset.range(100, 164)]
        return iter(grain.MapDataset.mix(parts, weights=[weight, 1 - weight]).to_iter_dataset())

    with pytest.raises(PositionError, match=r"data\.pipeline: saved"):
        restore(save(mixed(0.5)), mixed(0.75))
    described = adapters.describe_loader(adapt(iter(loaders.grain_loader(0, 4))))
    assert described["pipeline"] == ["Batch(batch_size=1, drop_remainder=False)"]


def test_a_setting_that_was_none_is_compared_too() -> None:
    class Seeded(Opaque):
        seed: Any = None

    class SeededAdapter(DataAdapter):
        def fingerprint(self) -> dict[str, Any]:
            return {"seed": self.loader.seed}

    register_adapter(f"{Seeded.__module__}.{Seeded.__qualname__}", SeededAdapter)
    now = Seeded()
    now.seed = 7
    with pytest.raises(PositionError, match=r"data\.seed: saved None, now 7"):
        restore(save(Seeded()), now)


@pytest.mark.parametrize("given", [float("nan"), {"w": np.ones(2)}, {1: "a"}, (1, 2)])
def test_a_fingerprint_is_json(given: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="A fingerprint is JSON"):
        shards(loaders.Stream, 2, fingerprint=given)


def test_a_list_of_loaders_is_told_how_to_give_them() -> None:
    with pytest.raises(PositionError, match=r"give one loader, or \{name: loader\}"):
        positions.capture([Opaque(), Opaque()], 0, 1)


@pytest.mark.parametrize("allow", ["data.seed", [3]])
def test_allowed_changes_are_a_list_of_names(allow: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="list of names"):
        restore(save(Opaque()), Opaque(), allow=allow)


def test_what_grain_says_of_itself() -> None:
    """A contract: these spots of Grain are private, and an upgrade that moves them ends here."""
    described = adapters.describe_loader(adapt(iter(loaders.grain_map(0, 4))))
    assert described["class"] == "PrefetchDatasetIterator"
    assert (described["batch"], described["records"], described["remainder"]) == (1, 96, "keep")
    assert described["shuffle"] == ["ShuffleMapDataset"]
    assert described["seed"][-1] == 5
    described = adapters.describe_loader(adapt(iter(loaders.grain_iter(0, 4))))
    assert (described["batch"], described["records"]) == (1, 96)
    described = adapters.describe_loader(adapt(iter(loaders.grain_loader(0, 4))))
    assert (described["seed"], described["records"], described["shuffle"]) == (3, 96, True)
    assert (described["batch"], described["remainder"]) == (1, "keep")
    described = adapters.describe_loader(adapt(loaders.grain_elastic(0, 4)))
    assert (described["global_batch"], described["records"]) == (loaders.GLOBAL_BATCH, 96)


# Batches and steps.


@pytest.mark.parametrize("wrap", [shards, tracked])
def test_a_loader_whose_iter_takes_back_what_was_restored_is_set_once_more(wrap: Any) -> None:
    class Rewinding(loaders.Stream):
        def __iter__(self) -> Any:
            self.set_state(self.fresh)
            return self

    def make(shard: int, count: int) -> Any:
        loader = Rewinding(shard, count)
        loader.fresh = loader.get_state()
        return loader

    def wrapped() -> Any:
        return shards(make, 2) if wrap is shards else tracked(make(0, 1), 0)

    first = wrapped()
    taken(first, 2)  # nothing is wrong with a fresh one
    second = wrapped()
    second.apply(first.snapshot().positions, None, None)
    assert str(next(second)) == str(next(first))


def test_batches_keep_pace_with_the_steps() -> None:
    loader, pace = shards(loaders.Stream, 4), positions.Pace(1)
    taken(loader, 1)
    paced(loader, pace, 0)
    taken(loader, 2)
    paced(loader, pace, 2)
    paced(loader, pace, 3)  # a step without a batch loses nothing
    taken(loader, 2)  # one too many
    with pytest.raises(PositionError, match=r"5 at step 3, .* 1 too many.*\{'data': N\}"):
        paced(loader, pace, 3)
    paced(loader, pace, 4)
    for unchecked in (positions.Pace(None), positions.Pace({"data": None}), positions.Pace(1)):
        paced(loader, unchecked, 3)
    two, other = positions.Pace({"data": 2}), shards(loaders.Stream, 4)
    for step in range(3):
        paced(taken(other, 2), two, step)
    with pytest.raises(InvalidArgumentError, match=r"names \['trian'\]; the data items are"):
        paced(other, positions.Pace({"trian": 1}), 9)
    with pytest.raises(InvalidArgumentError, match="batches_per_step"):
        dd.Options(batches_per_step=0)


def test_what_was_read_ahead_before_a_restore_is_noticed_after_it() -> None:
    def run(start: int, steps: int, step: dict[str, bytes] | None) -> dict[str, bytes]:
        loader, pace = shards(loaders.Stream, 4), positions.Pace(1)
        if step is not None:
            with acting_as_host(0, 1):
                plan = positions.plan_restore(loader, ["data/data"], step.__getitem__, 0, 1)
                found = positions.decode_positions(plan, step.__getitem__)
                positions.apply_positions(plan, found, start - 1, pace)
        buffer = [next(loader), next(loader)]  # a reader that does not keep the position right
        for _ in range(steps):
            buffer.pop(0)
            buffer.append(next(loader))
        paced(loader, pace, start + steps - 1)
        return save(loader)

    step = run(0, 3, None)
    with pytest.raises(PositionError, match="read ahead"):
        run(3, 2, step)


def test_a_save_with_hosts_at_different_batches_is_refused() -> None:
    def told(host: int, batches: int) -> positions.Captured:
        with acting_as_host(host, 2):
            return positions.capture(taken(shards(loaders.Stream, 4), batches), host, 2)

    one, other = told(0, 3), told(1, 2)
    name = "the number of batches that 'data' has handed out"
    assert (one.agreement[name], other.agreement[name]) == (3, 2)
    assert one.agreement["data item 'data'"] == other.agreement["data item 'data'"]


# Reading ahead.


def test_what_is_read_ahead_is_not_in_the_position() -> None:
    placed = []
    loader = tracked(shards(loaders.Stream, 4), 3, place=lambda b: placed.append(b) or b)
    plain = shards(loaders.Stream, 4)
    assert placed == []
    for _ in range(4):
        assert next(loader)["id"].tolist() == next(plain)["id"].tolist()
    assert len(placed) == 6
    ahead, straight = save(loader, step=3), save(plain, step=3)
    assert ahead == straight


def test_an_error_while_reading_ahead_is_raised_at_its_turn() -> None:
    def batches() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError(5, "the disk")

    loader = tracked(replay(batches), 4)
    assert [next(loader), next(loader)] == [1, 2]
    before = save(loader, step=1)
    with pytest.raises(OSError, match="the disk"):
        next(loader)
    assert save(loader, step=1) == before


def test_ctrl_c_while_reading_ahead_loses_nothing_silently() -> None:
    class Interrupted(Opaque):
        def __next__(self) -> Any:
            if self.at == 3:
                self.at += 1
                raise KeyboardInterrupt
            return super().__next__()

    loader = tracked(Interrupted(), 1)
    taken(loader, 3)
    before = save(loader, step=2)
    with pytest.raises(KeyboardInterrupt):
        next(loader)
    assert save(loader, step=2) == before
    with pytest.raises(PositionError, match="where it stands now is not known"):
        next(loader)


def test_shards_that_failed_in_the_middle_of_a_batch_have_no_position_any_more() -> None:
    class Broken(loaders.Stream):
        def __next__(self) -> Any:
            if self.records[0] == 2 and self.at == 1:
                raise OSError(5, "the disk")
            return super().__next__()

    loader = taken(shards(Broken, 4), 1)
    with pytest.raises(OSError, match="the disk"):
        next(loader)
    for use in (lambda: next(loader), lambda: save(loader)):
        with pytest.raises(PositionError, match="not known"):
            use()


def test_a_batch_that_could_not_be_joined_is_not_lost_silently() -> None:
    loader = shards(lambda s, n: replay(lambda: iter([np.int32(1), np.int32(2)])), 2)
    with pytest.raises(InvalidArgumentError, match="nothing with an axis of records"):
        next(loader)
    with pytest.raises(PositionError, match="not known"):
        save(loader)


def test_what_has_ended_or_was_made_from_a_used_loader_is_refused() -> None:
    step = save(tracked([], 1))
    ended = tracked([], 1)
    assert list(ended) == []
    with pytest.raises(PositionError, match="handed out 0 batches and ended"):
        restore(step, ended)
    step = save(shards(loaders.grain_map, 2))
    used = shards(lambda s, n: taken(iter(loaders.grain_map(s, n)), s), 2)
    with pytest.raises(PositionError, match="data shard 1: it is at index 1"):
        restore(step, used)


def test_a_loader_that_uses_its_buffers_again_can_be_read_ahead() -> None:
    def batches() -> Iterator[Any]:
        ring = [np.zeros(2, int), np.zeros(2, int)]
        for k in range(9):
            ring[k % 2][:] = k
            yield {"x": ring[k % 2]}

    for depth in (2, 3, 5):
        found = [int(batch["x"][0]) for batch in tracked(replay(batches), depth)]
        assert found == list(range(9))


def test_place_cannot_end_the_epoch() -> None:
    extra = iter(range(3))
    loader = tracked(shards(loaders.Stream, 4), 2, place=lambda batch: (batch, next(extra)))
    taken(loader, 3)
    with pytest.raises(InvalidArgumentError, match="raised StopIteration"):
        next(loader)


@pytest.mark.parametrize("whole", [True, False], ids=["shards", "tracked"])
def test_a_position_taken_by_another_thread_is_whole(whole: bool) -> None:
    class Slow(loaders.Stream):
        def get_state(self) -> Any:
            if not reading.is_set():
                reading.set()
                moved.wait(0.2)  # in vain: nothing can be taken meanwhile
            return super().get_state()

    reading, moved = threading.Event(), threading.Event()
    loader = taken(shards(Slow, 4), 1) if whole else tracked(taken(Slow(0, 1), 1), 1)
    taker = threading.Thread(target=lambda: (reading.wait(10), taken(loader, 3), moved.set()))
    taker.start()
    found = loader.snapshot().positions
    taker.join()
    assert {codec.unpack(position.state)[0] for position in found.values()} == {1}


def test_a_restore_that_fails_half_way_leaves_nothing_that_can_be_used() -> None:
    class Moved(loaders.Stream):
        def set_state(self, state: Any) -> None:
            if self.records[0] == 2:
                raise ValueError("the file has moved")
            super().set_state(state)

    step = save(taken(shards(Moved, 4), 3))
    for wrap in (lambda loader: loader, lambda loader: tracked(loader, 2)):
        loader = wrap(shards(Moved, 4))
        with pytest.raises(PositionError, match="ValueError: the file has moved"):
            restore(step, loader)
        for use in (next, save, lambda used: restore(step, used)):
            with pytest.raises(PositionError, match="Make the loader anew"):
                use(loader)


# Counting.


def test_replay_notices_an_iterator_that_gives_other_batches() -> None:
    seeds = itertools.count()
    loader = replay(lambda: (np.random.default_rng(seed).random(3) for seed in seeds))
    step = save(taken(loader, 3))
    with pytest.raises(PositionError, match=r"another batch 2 than the one"):
        restore(step, replay(lambda: (np.random.default_rng(seed).random(3) for seed in seeds)))
    with pytest.raises(PositionError, match=r"to skip 3 batches.*ended after 2"):
        restore(step, replay(lambda: iter([1, 2])))


def test_replay_goes_on_from_what_has_no_digest() -> None:
    class Odd:
        def __init__(self, value: int) -> None:
            self.value = value

    loader = replay(lambda: map(Odd, range(9)))
    step = save(taken(loader, 3))
    again = replay(lambda: map(Odd, range(9)))
    restore(step, again)
    assert next(again).value == 3


# The end of an epoch.


def test_shards_of_unequal_length_are_an_error_and_a_limit_is_the_way_out() -> None:
    def unequal(shard: int, count: int) -> Any:
        return loaders.Stream(shard, count, 10)

    loader = taken(shards(unequal, 4), 2)
    with pytest.raises(PositionError, match=r"Data shard 2 ended after 2.*batches=2"):
        next(loader)
    with pytest.raises(PositionError, match="batches=2"):
        save(loader)
    limited = taken(shards(unequal, 4, batches=2), 2)
    assert list(limited) == []
    again = shards(unequal, 4, batches=2)
    restore(save(limited), again)
    assert list(again) == []
    with pytest.raises(PositionError, match=r"data\.batches: saved 2, now None"):
        restore(save(limited), shards(unequal, 4))
    with pytest.raises(PositionError, match="ended after 2 batches, of the 5"):
        list(shards(unequal, 4, batches=5))


def test_a_shorter_last_batch_is_an_error_before_hosts_differ() -> None:
    def epoch(**limit: int) -> Any:
        dataset = grain.MapDataset.range(14)
        return shards(
            lambda s, n: dataset[s::n].batch(2).to_iter_dataset(loaders.QUIET), 4, **limit
        )

    loader = taken(epoch(), 1)
    with pytest.raises(PositionError, match=r"Data shard 2 gave a batch of 1 records; before.*2\."):
        next(loader)
    assert len(list(epoch(batches=1))) == 1
    again = epoch()
    restore(save(taken(epoch(), 1)), again)  # its first batch is the short one
    with pytest.raises(PositionError, match=r"Data shard 2 gave a batch of 1 records; before.*2\."):
        next(again)


# Adapters.


def test_a_registered_adapter_is_taken_for_its_class_and_what_is_derived_from_it() -> None:
    class Tape:
        def __init__(self) -> None:
            self.place = 0

        def __iter__(self) -> Iterator[int]:
            while self.place < 5:
                self.place += 1
                yield self.place

    class Reel(Tape):
        pass

    class TapeAdapter(DataAdapter):
        def get_state(self) -> Any:
            return self.loader.place

        def set_state(self, state: Any) -> None:
            self.loader.place = state

        def started(self) -> str | None:
            return f"it is at {self.loader.place}" if self.loader.place else None

        def fingerprint(self) -> dict[str, Any]:
            return {"records": np.int64(5)}

    with pytest.raises(PositionError):
        adapt(Reel())
    register_adapter(f"{Tape.__module__}.{Tape.__qualname__}", TapeAdapter)
    tape = Reel()
    assert next(iter(tape)) == 1
    step = save(tape)
    again = Reel()
    restore(step, again)
    assert list(again) == [2, 3, 4, 5]
    with pytest.raises(PositionError, match="it is at 5"):
        restore(step, again)


def test_protocols_are_what_datarax_has() -> None:
    assert isinstance(Opaque(), Checkpointable)
    assert isinstance(Opaque(), CheckpointableIterator)
    assert isinstance(replay(lambda: iter([])), CheckpointableIterator)
    assert not isinstance(object(), Checkpointable)


def test_what_is_remembered_of_a_loader_goes_with_it() -> None:
    loader = Opaque()
    restore(save(loader), loader)
    known = weakref.ref(memory._entries[id(loader)].memory)
    gone = weakref.ref(loader)
    del loader
    gc.collect()
    assert gone() is None
    assert known() is None


def test_a_loader_that_forgets_until_its_first_batch_is_not_saved_at_its_beginning() -> None:
    step = save(taken(tracked(loaders.Lazy(0, 1), 0), 3))
    again = tracked(loaders.Lazy(0, 1), 0)
    restore(step, again)
    assert save(again) == step
    assert next(again).tolist() == [3]
    alone = loaders.Lazy(0, 1)
    with pytest.raises(PositionError, match=r"does not say where.*tracked\(loader, 0\)"):
        restore(step, alone)
    with pytest.raises(PositionError, match="Make the loader anew"):
        save(alone)


# The files.


def test_large_bytes_stand_beside_the_json_and_a_damaged_one_is_found() -> None:
    step = save(taken(shards(lambda s, n: loaders.Stream(s, n, 4000), 2), 1500), step=1499)
    blobs = "data/data/shard_00001-of-00002.bin"
    assert len(step[blobs]) == 1500 * 8 + 1500
    assert len(step["data/data/shard_00001-of-00002.json"]) < 2000
    again = shards(lambda s, n: loaders.Stream(s, n, 4000), 2)
    restore(step, again)
    assert next(again)["id"].tolist() == [3000, 3001]
    for wrong in (step[blobs][:-1], b"x" + step[blobs][1:], step[blobs] + b"x"):
        with pytest.raises(fmt.InvalidRecordError, match="blob"):
            restore({**step, blobs: wrong}, shards(lambda s, n: loaders.Stream(s, n, 4000), 2))


def test_a_position_that_could_not_be_read_again_is_not_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loader = taken(shards(loaders.Stream, 2), 1)
    monkeypatch.setattr(fmt, "MAX_POSITION_BYTES", 100)
    with pytest.raises(PositionError, match=r"position of 'data' takes [0-9]+ bytes.*at most 100"):
        save(loader)


def test_a_damaged_fingerprint_is_an_error() -> None:
    step = save(taken(shards(loaders.Stream, 2), 1))
    index = json.loads(step["data/data/index.json"])
    index.pop("crc32c")
    index["fingerprint"] = [1]
    with pytest.raises(fmt.InvalidRecordError, match="a fingerprint that is no object"):
        restore({**step, "data/data/index.json": fmt.seal(index)}, shards(loaders.Stream, 2))


def test_torchdata_that_resumes_in_another_order_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class StatefulDataLoader(loaders.Stream):
        def state_dict(self) -> Any:
            return self.get_state()

        def load_state_dict(self, state: Any) -> None:
            self.set_state(state)

    StatefulDataLoader.__module__ = "torchdata.stateful_dataloader"
    StatefulDataLoader.__qualname__ = "StatefulDataLoader"
    for version, refused in (("0.10.1", True), ("0.11.0", False), ("1.0", False)):
        monkeypatch.setattr(adapters, "_version", lambda package, version=version: version)
        if refused:
            with pytest.raises(PositionError, match=r"Upgrade to 0\.11 or later"):
                save(StatefulDataLoader(0, 1))
        else:
            assert save(StatefulDataLoader(0, 1))


def test_a_loader_that_starts_when_read_is_not_asked_between_its_restore_and_its_start() -> None:
    """Mosaic's position is in memory that another host may be writing."""

    class Lazy(loaders.Stream):
        set_to: Any = None
        begun = False

        def __next__(self) -> Any:
            self.begun, self.set_to = True, None
            return super().__next__()

        def set_state(self, state: Any) -> None:
            super().set_state(state)
            self.set_to = state

        def get_state(self) -> Any:
            assert self.set_to is None, "asked before it has started"
            return super().get_state()

    class LazyAdapter(DataAdapter):
        starts_when_read = True

        def started(self) -> str | None:
            return "it has begun" if self.loader.begun else None

    register_adapter(f"{Lazy.__module__}.{Lazy.__qualname__}", LazyAdapter)
    step = save(taken(Lazy(0, 1), 2))
    loader = Lazy(0, 1)
    restore(step, loader)
    assert save(loader) == step
    assert save(taken(loader, 1)) == save(taken(Lazy(0, 1), 3))


def test_an_adapter_that_cannot_tell_when_its_loader_has_started_is_refused() -> None:
    class Silent(loaders.Stream):
        pass

    class SilentAdapter(DataAdapter):
        starts_when_read = True

    register_adapter(f"{Silent.__module__}.{Silent.__qualname__}", SilentAdapter)
    with pytest.raises(InvalidArgumentError, match=r"SilentAdapter says.*Give it a `started`"):
        save(Silent(0, 1))
    with pytest.raises(InvalidArgumentError, match="Give it a `started`"):
        next(tracked(Silent(0, 1), 0))


def test_another_batch_that_was_allowed_is_taken() -> None:
    def epoch(batch: int) -> Any:
        dataset = grain.MapDataset.range(64)
        return shards(lambda s, n: dataset[s::n].batch(batch).to_iter_dataset(loaders.QUIET), 2)

    step = save(taken(epoch(2), 2))
    again = epoch(4)
    restore(step, again, allow=["data.global_batch", "data.pipeline"])
    assert next(again).shape == (8,)
    with pytest.raises(PositionError, match="global_batch: saved 4, now 8"):
        restore(step, epoch(4), allow=["data.pipeline"])


def test_the_position_of_another_shard_is_not_taken() -> None:
    step = save(taken(shards(loaders.Stream, 2), 1))
    one, other = (f"data/data/shard_0000{s}-of-00002.json" for s in (0, 1))
    with pytest.raises(fmt.InvalidRecordError, match="another shard"):
        restore({**step, one: step[other]}, shards(loaders.Stream, 2))


def test_a_position_that_cannot_be_read_changes_no_loader() -> None:
    step = save(taken(shards(loaders.Stream, 2), 1))
    other = "data/data/shard_00001-of-00002.json"
    body = json.loads(step[other])
    body.pop("crc32c")
    body["state"] = {"$class": "os.system"}
    loader = shards(loaders.Stream, 2)
    with pytest.raises(PositionError, match=r"shard_00001-of-00002\.json cannot be read.*\$class"):
        restore({**step, other: fmt.seal(body)}, loader)
    assert next(loader)["id"].tolist() == [0, 1]


# The whole way, through a Checkpointer.


@pytest.mark.parametrize("name", [*loaders.TOYS, *loaders.GRAIN])
def test_batches_taken_while_a_save_is_in_flight_change_nothing(tmp_path: Path, name: str) -> None:
    factory = (loaders.TOYS | loaders.GRAIN)[name]
    loader = factory(0, 1)
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        next(loader)
        handle = ckpt.save(0, state={"x": np.ones(4)}, data=loader)
        expected = [jax.tree.map(np.array, batch) for batch in loader]
        assert handle is not None
        handle.result(60)
        again = factory(0, 1)
        ckpt.restore(data=again)
        found = list(again)
    assert len(found) == len(expected) > 0
    assert dd.tree_digest(found) == dd.tree_digest(expected)


def test_allowed_changes_are_in_the_report(tmp_path: Path) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(0, data=shards(loaders.Stream, 4, fingerprint="a"))
        ckpt.wait_until_finished()
        now = shards(loaders.Stream, 4, fingerprint="b")
        with pytest.raises(PositionError, match=r"data\.user: saved 'a', now 'b'"):
            ckpt.restore(data=now)
        restored = ckpt.restore(data=now, allow_data_changes=["data.user"])
    assert restored.report.data_changes == {"data.user": ("a", "b")}
    assert "changed, as allowed: data.user was 'a', is 'b'" in str(restored.report)


def test_a_position_error_changes_no_loader_and_no_state(tmp_path: Path) -> None:
    with dd.Checkpointer(tmp_path / "run") as ckpt:
        good = taken(shards(loaders.Stream, 4), 2)
        ckpt.save(0, data={"a": good, "b": shards(loaders.Stream, 2)})
        ckpt.wait_until_finished()
        first = shards(loaders.Stream, 4)
        with pytest.raises(CheckpointError):
            ckpt.restore(data={"a": first, "b": shards(loaders.Stream, 4)})
        assert first.batches() == 0
        assert next(first)["id"].tolist() == [0, 1, 2, 3]


# What the primary checks before anything is written.


def told(reads: list[list[int]], writes: list[list[int]], at: list[int], count: int) -> Any:
    return [
        agreement.positions_told(
            {"a": count}, {"a": mine}, {"a": {shard: str(place) for shard in held}}
        )
        for held, mine, place in zip(reads, writes, at, strict=True)
    ]


def test_positions_of_all_hosts_are_whole_and_hosts_with_the_same_rows_agree() -> None:
    agreement.check_positions(told([[0, 1], [0, 1]], [[0, 1], []], [5, 5], 2))
    with pytest.raises(PositionError, match=r"host 1 is at another place.*than host 0"):
        agreement.check_positions(told([[0, 1], [0, 1]], [[0, 1], []], [5, 6], 2))
    with pytest.raises(PositionError, match="hosts 0 and 1 both own data shard 1"):
        agreement.check_positions(told([[0, 1], [1]], [[0, 1], [1]], [5, 5], 2))
    with pytest.raises(PositionError, match=r"no host owns data shard 2.*1 of 3"):
        agreement.check_positions(told([[0], [1]], [[0], [1]], [5, 5], 3))
