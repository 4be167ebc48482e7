"""Whether compressing an array makes a save faster: by what a sample of it shrinks to, how long
that takes, and how fast the storage was in the saves before.

    advisor = Advisor(threads=2)
    advisor.note_speed(written=1 << 30, seconds=8.0)          # a slow storage
    advisor.note_sample("w", size=1 << 30, ratio=0.5, seconds_per_byte=2e-9)
    advisor.choose().compressed                               # -> ("w",)

An array is compressed while other parts are written: it takes as long as the slower of the two, the
processor for all of its bytes or the storage for those that are left. Pure values; the samples are
taken in `arrays`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["EVERYTHING", "NOTHING", "Advisor", "Choice"]

LEAST_SAMPLED_BYTES = 1 << 20  # of an array
_LEAST_MEASURED_BYTES = 16 << 20  # of a save whose speed says something of the storage
_MUST_SAVE = 0.8  # of the time: the processor has other work, and a restore has to undo it
_SAVES_PER_SAMPLE = 10


@dataclass(frozen=True, slots=True)
class Choice:
    """What of one save is compressed.

    Attributes:
        compressed: names of arrays; None means all.
        why: in a few words, for the record.
    """

    compressed: Sequence[str] | None
    why: str

    def to_json(self) -> dict[str, Any]:
        return {
            "compressed": None if self.compressed is None else list(self.compressed),
            "why": self.why,
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Choice:
        names = body["compressed"]
        return cls(None if names is None else tuple(names), body["why"])


EVERYTHING = Choice(None, "zstd: as Options.compression says")
NOTHING = Choice((), "none: as Options.compression says")


@dataclass(slots=True)
class _Sample:
    size: int
    ratio: float
    seconds_per_byte: float
    saves_ago: int = 0


class Advisor:
    """Learns from each save what to do in the next one.

    Args:
        threads: that compress at the same time.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._bytes_per_second: float | None = None
        self._samples: dict[str, _Sample] = {}

    def note_speed(self, written: int, seconds: float, *, compressed: bool = False) -> None:
        """Takes in how long a save has written so many bytes to the storage.

        Args:
            compressed: some of them were; then the storage may be faster than that.
        """
        for sample in self._samples.values():
            sample.saves_ago += 1
        if written < _LEAST_MEASURED_BYTES or seconds <= 0:
            return
        speed = written / seconds
        if compressed and self._bytes_per_second is not None:
            speed = max(speed, self._bytes_per_second)
        self._bytes_per_second = speed

    def forget_others(self, names: Iterable[str]) -> None:
        """Forgets arrays that are not in the state any more."""
        there = set(names)
        self._samples = {name: found for name, found in self._samples.items() if name in there}

    def wants_sample(self, name: str, size: int) -> bool:
        """Whether a sample of an array of so many bytes is of use now."""
        if size < LEAST_SAMPLED_BYTES or self._bytes_per_second is None:
            return False
        known = self._samples.get(name)
        return known is None or known.size != size or known.saves_ago >= _SAVES_PER_SAMPLE

    def note_sample(self, name: str, size: int, ratio: float, seconds_per_byte: float) -> None:
        """Takes in what a sample has shown: its bytes over those before, and the seconds of one
        thread for each byte before.
        """
        self._samples[name] = _Sample(size, ratio, seconds_per_byte)

    def choose(self, most: int | None = None) -> Choice:
        """Returns what is to be compressed in the next save.

        Args:
            most: only arrays of fewer bytes may be: each is compressed as a whole.
        """
        speed = self._bytes_per_second
        if speed is None:
            return Choice(
                (),
                f"none: no save of {_LEAST_MEASURED_BYTES >> 20} MiB or more has measured the"
                " storage yet",
            )
        if not self._samples:
            least = LEAST_SAMPLED_BYTES >> 20
            return Choice((), f"none: no sample of an array of {least} MiB or more was taken")
        chosen = []
        for name, sample in self._samples.items():
            if most is not None and sample.size >= most:
                continue
            processor = sample.seconds_per_byte / self._threads
            if max(sample.ratio / speed, processor) <= _MUST_SAVE / speed:
                chosen.append(name)
        size = sum(sample.size for sample in self._samples.values())
        shrunk = sum(sample.size * sample.ratio for sample in self._samples.values())
        spent = sum(sample.size * sample.seconds_per_byte for sample in self._samples.values())
        told = (
            f"the storage has taken {_speed(speed)}; samples shrank to {shrunk / size:.2f}, at"
            f" {_speed(size / max(spent, 1e-9) * self._threads)} on {self._threads} threads"
        )
        if not chosen:
            return Choice((), f"none: {told}")
        return Choice(tuple(chosen), f"zstd for {len(chosen)} of {len(self._samples)}: {told}")


def _speed(bytes_per_second: float) -> str:
    if bytes_per_second >= 1e9:
        return f"{bytes_per_second / 1e9:.1f} GB/s"
    return f"{bytes_per_second / 1e6:.0f} MB/s"
