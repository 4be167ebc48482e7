"""What the hosts tell each other before a save, and whether it fits together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datarax_dist import format as fmt
from datarax_dist.errors import InvalidArgumentError, PeerError, PositionError

__all__ = ["check_agreement", "check_positions", "digests_told", "positions_told"]


_HINTS = {
    "the structure of the state": (
        " Print jax.tree.map(jax.numpy.shape, state) on both, and compare containers, names and"
        " shapes."
    )
}
_MOST_DIGESTS = 100_000  # that host 0 is told of, by all hosts together


def digests_told(digests: Mapping[str, str], hosts: int) -> dict[str, str]:
    """A few digests travel by name, so that an error can name the leaf; many travel as one."""
    if len(digests) <= min(500, _MOST_DIGESTS // hosts):
        return dict(digests)
    return {f"one of {len(digests)} leaves": fmt.crc_text(fmt.crc32c(fmt.dumps(dict(digests))))}


def check_agreement(payloads: Sequence[Mapping[str, Any]]) -> None:
    """Raises when the hosts are not about to save the same."""
    first = payloads[0]
    for host, other in enumerate(payloads):
        if other["step"] != first["step"]:
            steps = {h: p["step"] for h, p in enumerate(payloads)}
            raise PeerError(
                f"The hosts save different steps: {steps}. Every host must call save()"
                " with the same step. Nothing was written.",
                phase="prepare",
                failures={h: f"step {s}" for h, s in steps.items() if s != first["step"]},
            )
        for part in sorted({*first["agreement"], *other["agreement"]}):
            ours, theirs = first["agreement"].get(part), other["agreement"].get(part)
            if ours != theirs:
                raise PeerError(
                    f"Host {host} differs from host 0 in {part}: {theirs!r} instead of"
                    f" {ours!r}. Nothing was written.{_HINTS.get(part, '')}",
                    phase="prepare",
                    failures={host: f"{part}: {theirs!r}"},
                )
        differing = [
            name
            for name, digest in first["digests"].items()
            if other["digests"].get(name) != digest
        ]
        if differing:
            shown = ", ".join(differing[:10])
            raise InvalidArgumentError(
                f"These leaves of the state belong to one host each, and host {host} has other"
                f" values than host 0: {shown}. Make them global arrays"
                " (jax.make_array_from_process_local_data), or give them as `data`. Nothing was"
                " written."
            )


def positions_told(
    counts: Mapping[str, int],
    written: Mapping[str, Sequence[int]],
    held: Mapping[str, Mapping[int, str]],
) -> dict[str, Any]:
    """Returns what the primary needs to know of a host's positions; see `SaveRequest`."""
    return {
        item: {
            "count": count,
            "written": list(written[item]),
            "held": {str(shard): digest for shard, digest in held[item].items()},
        }
        for item, count in counts.items()
    }


def check_positions(told: Sequence[Mapping[str, Any]]) -> None:
    """Raises when hosts that read the same data shard are not at the same place, or when a position
    would be written by no host, or by two.
    """
    for item, first in told[0].items():
        held: dict[str, tuple[int, str]] = {}
        writers: dict[int, int] = {}
        for host, items in enumerate(told):
            mine = items[item]
            for shard, digest in mine["held"].items():
                other, theirs = held.setdefault(shard, (host, digest))
                if digest != theirs:
                    raise PositionError(
                        f"prepare: host {host} is at another place of data item {item!r}, position"
                        f" {shard}, than host {other}, which reads the same records. Hosts that"
                        " read the same must take the same number of batches. Nothing was written."
                    )
            for shard in mine["written"]:
                if shard in writers:
                    raise PositionError(
                        f"prepare: hosts {writers[shard]} and {host} both own data shard {shard} of"
                        f" {item!r}. Nothing was written."
                    )
                writers[shard] = host
        if missing := sorted(set(range(first["count"])).difference(writers)):
            raise PositionError(
                f"prepare: no host owns data shard {missing[0]} of {item!r} ({len(missing)} of"
                f" {first['count']} are missing). Do all hosts give shards() the same count and"
                " sharding? Nothing was written."
            )
