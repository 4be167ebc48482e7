"""Who shows no sign of life is named soon; who does is not."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping

import pytest

from datarax_dist.beacons import Beacons, Silence
from datarax_dist.boards import LocalBoard, UnreachableError
from datarax_dist.errors import PeerLostError
from datarax_dist.hosts import HostGroup
from datarax_dist.testing import FakeClock


class Board:
    """Beacons of three hosts, which move as they are told to."""

    def __init__(self) -> None:
        self.values = {0: "1 a 10", 1: "1 b 11", 2: "1 c 12"}
        self.is_down = False
        self.clock = FakeClock()
        self.beacons = Beacons(self.send, lambda: dict(self.values), 0, 3, clock=self.clock)

    def send(self, text: str) -> None:
        if self.is_down:
            raise OSError("no answer")
        self.values[0] = text

    def second(self, *moving: int) -> None:
        """A second passes, in which some other hosts send a beacon."""
        self.clock.sleep(1.0)
        for host in moving:
            number, _, rest = self.values[host].partition(" ")
            self.values[host] = f"{int(number) + 1} {rest}"
        self.beacons.exchange()


def test_a_host_whose_beacon_stands_still_is_silent_and_no_other() -> None:
    board = Board()
    for _ in range(9):
        board.second(1)
    assert board.beacons.silent(10.0) == {}
    for _ in range(3):
        board.second(1)
    assert board.beacons.silent(10.0) == {2: Silence(11.0, "c, process 12")}
    board.second(1, 2)
    assert board.beacons.silent(10.0) == {}


def test_a_host_that_has_never_begun_is_not_silent() -> None:
    board = Board()
    del board.values[2]
    for _ in range(30):
        board.second(1)
    assert board.beacons.silent(10.0) == {}


def test_a_board_that_does_not_answer_is_host_0_cut_off() -> None:
    board = Board()
    board.second(1, 2)
    board.is_down = True
    for _ in range(10):
        board.second()
        assert board.beacons.silent(10.0) == {}
    board.second()
    assert board.beacons.silent(10.0).keys() == {0}
    assert board.beacons.silent(10.0)[0].cut_off
    board.is_down = False
    board.second()
    assert board.beacons.silent(10.0) == {}


def test_who_was_stopped_itself_takes_nobody_for_silent() -> None:
    board = Board()
    board.second(1, 2)
    board.clock.sleep(3600.0)
    assert board.beacons.silent(10.0) == {}
    board.second(1, 2)
    assert board.beacons.silent(10.0) == {}


class Quiet(LocalBoard):
    """The board of a host that has found others silent."""

    silence: Mapping[int, Silence] = {}
    down = False

    def silent(self) -> Mapping[int, Silence]:
        return self.silence

    def read(self, prefix: str) -> dict[str, str]:
        if self.down:
            raise UnreachableError("no answer", self.silence[0])
        return super().read(prefix)


def quiet(index: int, silence: Mapping[int, Silence]) -> tuple[HostGroup, Quiet]:
    board = Quiet(index, 3)
    board.silence = silence
    return HostGroup(board), board


def test_the_primary_names_a_silent_host_and_does_not_wait_for_the_deadline() -> None:
    group, board = quiet(0, {2: Silence(11.0, "c, process 12")})
    board.set("0/0/prepare/1", "[0, null]")
    with pytest.raises(PeerLostError) as caught:
        group.exchange("prepare", None, timeout_seconds=16)
    assert caught.value.missing == [2]
    assert caught.value.phase == "prepare"
    told = str(caught.value)
    for part in ("'prepare'", "arrived: hosts 0-1", "missing: host 2", "11 s", "c, process 12"):
        assert part in told
    assert "Look at its log" in told
    waited = re.search(r"waited (\d+) s", told)
    assert waited is not None
    assert int(waited[1]) < 8, "the deadline is after 16 s"


def test_a_silent_host_that_has_done_its_part_fails_nothing() -> None:
    group, board = quiet(0, {2: Silence(11.0)})
    for host in (1, 2):
        board.set(f"0/0/vote/{host}", f"[0, {host}]")
    assert group.exchange("vote", 0, timeout_seconds=3600) == [0, 1, 2]


def test_a_slow_host_is_waited_for_though_another_one_is_silent_that_has_arrived() -> None:
    group, board = quiet(0, {2: Silence(11.0)})
    board.set("0/0/vote/2", "[0, 2]")

    def arrive() -> None:
        board.set("0/0/vote/1", "[0, 1]")

    timer = threading.Timer(1.0, arrive)
    timer.start()
    assert group.exchange("vote", 0, timeout_seconds=3600) == [0, 1, 2]
    timer.join()


def test_a_host_that_has_gone_after_its_part_is_named_where_the_others_need_it() -> None:
    group, board = quiet(0, {2: Silence(11.0, "c, process 12")})
    board.set("0/gather/2", "[0, 2]")
    operation = group.begin("restore")
    operation.contribute("gather", 0)
    with pytest.raises(PeerLostError, match=r"missing: host 1\. Host 2: no sign of life") as lost:
        operation.gather("gather", 1e12, together=True)
    assert lost.value.missing == [2]
    operation.close()


def test_a_primary_that_is_busy_itself_leaves_it_a_moment_to_who_waits_for_that_host() -> None:
    looks: list[float] = []

    class Looked(Quiet):
        def silent(self) -> Mapping[int, Silence]:
            looks.append(0.0)
            return {2: Silence(11.0)}

    group = HostGroup(Looked(0, 3))
    operation = group.begin("save")
    with pytest.raises(PeerLostError, match="Host 2"):
        operation.result("written", 1e12)
    assert len(looks) > 3
    operation.close()


def test_the_others_name_a_silent_primary() -> None:
    group, _ = quiet(1, {0: Silence(12.0, "a, process 10")})
    with pytest.raises(PeerLostError, match="Host 0: no sign of life for 12 s") as caught:
        group.exchange("prepare", None, timeout_seconds=3600)
    assert caught.value.missing == [0]


def test_who_cannot_reach_the_board_says_so() -> None:
    group, board = quiet(1, {0: Silence(12.0, "a, process 10", cut_off=True)})
    board.down = True
    with pytest.raises(PeerLostError, match="Host 1 cannot reach") as caught:
        group.exchange("prepare", None, timeout_seconds=3600)
    assert caught.value.missing == [0]
    for part in ("'prepare'", "12 s", "a, process 10", "network", "restart the job"):
        assert part in str(caught.value)
