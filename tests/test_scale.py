"""What agreement costs when there are many hosts, on simulated ones that run the real protocol."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.coordination import simulated
from datarax_dist import format as fmt
from datarax_dist.agreement import digests_told
from datarax_dist.errors import PeerLostError
from datarax_dist.testing.scale import ScaledHost, simulate

SECOND = 1.0


@pytest.fixture(scope="module")
def costs() -> dict[tuple[str, int], dict[str, Any]]:
    """Of a save and of a restore, on 50 and on 400 hosts, each message of which takes a second:
    beside that the processor time of this machine does not count.
    """
    rows = [row for count in (50, 400) for row in simulated(count, SECOND, rounds=1)]
    return {(row["benchmark"].split()[3].rstrip(","), row["hosts"]): row for row in rows}


@pytest.mark.parametrize("act", ["save", "restore"])
def test_the_primary_sends_no_more_messages_for_more_hosts(act: str, costs: Any) -> None:
    few, many = costs[act, 50], costs[act, 400]
    # A listing of thousands of files comes in pages; and where hosts come at different times, a
    # board is read some more times, by the logarithm of their number.
    assert many["primary_messages"] <= few["primary_messages"] + 12
    assert many["primary_seconds"] <= few["primary_seconds"] + 12 * SECOND + 1


@pytest.mark.parametrize("act", ["save", "restore"])
def test_the_bytes_of_the_primary_grow_as_the_hosts_do(act: str, costs: Any) -> None:
    few, many = costs[act, 50], costs[act, 400]
    assert many["primary_kilobytes"] <= 8 * 1.5 * few["primary_kilobytes"]


def test_a_host_that_is_not_the_primary_has_as_much_to_do_however_many_there_are(
    costs: Any,
) -> None:
    for act in ("save", "restore"):
        few, many = costs[act, 50], costs[act, 400]
        assert many["other_host_messages"] <= few["other_host_messages"] + 1
    assert many["other_host_kilobytes"] < 100, "of a restore: the marker, which names all records"
    saved = costs["save", 400]["other_host_kilobytes"]
    assert saved <= 1.1 * costs["save", 50]["other_host_kilobytes"]


def test_hosts_that_come_one_after_the_other_are_gathered_in_few_reads() -> None:
    """In any order: here the reads grow as the logarithm of the hosts."""
    for order in (lambda index: index, lambda index: 199 - index, lambda index: index * 77 % 200):

        def late(host: ScaledHost, order: Any = order) -> Any:
            host.sleep(0.1 * order(host.index) if host.index else 0.0)
            return host.group.exchange("vote", 1, leader=sum, timeout_seconds=60)

        report = simulate(200, late, message_seconds=0.0001)
        assert report.results == [200] * 200
        # A wait is asked for again every quarter of a second, 20 seconds long.
        assert report.primary.messages <= 2 * (20 / 0.25) + 4 * 10
        assert report.primary.bytes < 400_000, "all rows were read again and again"


def test_a_host_that_never_comes_is_named_among_many() -> None:
    def target(host: ScaledHost) -> Any:
        if host.index == 123:
            return None
        try:
            return host.group.exchange("vote", 1, timeout_seconds=5)
        except PeerLostError as error:
            return error.missing

    results = simulate(200, target).results
    assert [results[index] for index in range(200) if index != 123] == [[123]] * 199


entries = st.builds(
    fmt.FileEntry,
    st.text("abc/", min_size=1, max_size=4),
    st.integers(0, 3),
    st.sampled_from(["x", "y"]),
)


@given(st.lists(entries, max_size=6), st.lists(entries, max_size=6), st.booleans())
def test_a_tally_is_that_of_the_parts_and_tells_sets_apart(
    one: list[fmt.FileEntry], other: list[fmt.FileEntry], digests: bool
) -> None:
    def plain(files: list[fmt.FileEntry]) -> list[Any]:
        return sorted((e.path, e.size, e.digest if digests else "") for e in files)

    together = fmt.tally(one, digests=digests) + fmt.tally(other, digests=digests)
    assert fmt.tally([*one, *other], digests=digests) == together % fmt.TALLY_MODULUS
    equal = fmt.tally(one, digests=digests) == fmt.tally(other, digests=digests)
    assert equal == (plain(one) == plain(other))


def test_thousands_of_hosts_do_not_tell_the_primary_hundreds_of_digests_each() -> None:
    many = {f"leaf {number}": "0123abcd" for number in range(400)}
    assert digests_told(many, 8) == many
    assert len(digests_told(many, 10_000)) == 1
    assert digests_told({**many, "leaf 0": "other"}, 10_000) != digests_told(many, 10_000)


@given(st.binary(max_size=300), st.binary(max_size=300), st.binary(max_size=5))
def test_a_digest_over_a_part_whose_own_checksum_is_wanted_is_the_same(
    first: bytes, second: bytes, third: bytes
) -> None:
    for kind in ("crc32", "md5"):
        digester = fmt.Digester(kind)
        digester.update(first)
        part = digester.part()
        part.update(second[:100])
        part.update(second[100:])
        assert digester.join(part) == fmt.crc32c(second)
        digester.update(third)
        assert digester.text() == fmt.digest(first + second + third, kind)
