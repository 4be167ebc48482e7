"""What the demo shows: the logs of a start, the proofs, and the picture of both loss curves."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Proof", "StartLog", "draw", "proof_table", "read_log", "same_batches", "times_read"]


@dataclass(frozen=True, slots=True)
class Proof:
    """One claim, whether it holds, and the figures."""

    claim: str
    passed: bool
    figures: str


@dataclass(frozen=True, slots=True)
class StartLog:
    """The account of all hosts of one start.

    Attributes:
        losses: step -> loss, from host 0.
        bits: step -> the 32 bits of the loss, for each host in order.
        ids: step -> ids of the records that the hosts consumed together, in the order of the hosts.
        digests: step -> digest of the state that was given to `save`.
        restored: what the hosts wrote about their restore, in the order of the hosts.
    """

    losses: dict[int, float] = field(default_factory=dict)
    bits: dict[int, list[str]] = field(default_factory=dict)
    ids: dict[int, list[int]] = field(default_factory=dict)
    digests: dict[int, str] = field(default_factory=dict)
    restored: list[dict[str, Any]] = field(default_factory=list)


def read_log(folder: Path, hosts: int) -> StartLog:
    """Reads what the hosts of one start wrote; a line cut short by a kill is left out."""
    log = StartLog()
    for host in range(hosts):
        path = folder / f"host-{host}.jsonl"
        if not path.exists():
            continue
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n"):
                continue
            entry = json.loads(line)
            if entry["event"] == "step":
                step = entry["step"]
                if host == 0:
                    log.losses[step] = entry["loss"]
                log.bits.setdefault(step, []).append(entry["bits"])
                log.ids.setdefault(step, []).extend(entry["ids"])
            elif entry["event"] == "save" and host == 0:
                log.digests[entry["step"]] = entry["digest"]
            elif entry["event"] == "restored":
                log.restored.append(entry)
    return log


def times_read(ids: Mapping[int, Sequence[int]], records: int) -> tuple[int, int, int]:
    """Returns how many records were read exactly once, never, and more than once.

    >>> times_read({0: [0, 1], 1: [1]}, 3)
    (1, 1, 1)
    """
    counts = Counter(number for batch in ids.values() for number in batch)
    once = sum(counts[number] == 1 for number in range(records))
    never = sum(counts[number] == 0 for number in range(records))
    more = sum(1 for number, count in counts.items() if count > 1 or not 0 <= number < records)
    return once, never, more


def same_batches(first: Mapping[int, Sequence[int]], second: Mapping[int, Sequence[int]]) -> int:
    """Returns for how many steps both runs consumed the same records.

    >>> same_batches({0: [1, 2], 1: [3]}, {0: [2, 1], 1: [4]})
    1
    """
    return sum(sorted(first[step]) == sorted(second[step]) for step in first.keys() & second.keys())


def proof_table(proofs: Iterable[Proof]) -> str:
    """Returns the proofs as text, one for each line pair."""
    lines = []
    for proof in proofs:
        lines.append(f"  {'PASS' if proof.passed else 'FAIL'}  {proof.claim}")
        lines.append(f"        {proof.figures}")
    return "\n".join(lines)


def draw(
    path: Path,
    reference: Mapping[int, float],
    segments: Sequence[tuple[str, Mapping[int, float]]],
    marks: Sequence[tuple[float, str]],
) -> None:
    """Writes a picture of the uninterrupted curve, and on top of it the interrupted one's parts.

    Args:
        path: a PNG file.
        reference: step -> loss of the run that nothing disturbed.
        segments: label and losses of each start of the other run, in order.
        marks: step and text of what happened there.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(9, 6.5), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    above.plot(
        list(reference),
        list(reference.values()),
        color="0.75",
        linewidth=7,
        solid_capstyle="round",
        label="uninterrupted, 4 hosts",
    )
    for number, (label, losses) in enumerate(segments):
        color = f"C{number}"
        above.plot(list(losses), list(losses.values()), color=color, linewidth=1.8, label=label)
        gaps = [losses[step] - reference[step] for step in losses]
        below.plot(list(losses), gaps, ".-", color=color, linewidth=1)
    for step, text in marks:
        for axis in (above, below):
            axis.axvline(step, color="0.3", linestyle=":", linewidth=1)
        above.annotate(
            text,
            (step, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            va="top",
            fontsize=8,
        )
    above.set_ylabel("loss (nats per character)")
    above.set_title("Killed in the middle of a save, resumed on 4 hosts, then on 2")
    above.legend(loc="center right", fontsize=8)
    below.set_ylabel("difference")
    below.set_xlabel("step")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
