"""Draws what `python -m benchmarks` has found.

python -m benchmarks.plots RESULTS.jsonl DIRECTORY
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_COLOURS = {
    "raw": "#9a9a9a",
    "ours": "#1b6ca8",
    "orbax_v0": "#d1812c",
    "orbax_v1": "#e8b765",
    "torch_dcp": "#8c5a9e",
    "safetensors": "#6aa36f",
}
_LABELS = {
    "raw": "raw medium",
    "ours": "datarax_dist (verified, durable)",
    "orbax_v0": "Orbax v0",
    "orbax_v1": "Orbax v1",
    "torch_dcp": "torch DCP",
    "safetensors": "safetensors (not synced)",
}


def draw(results: Path, directory: Path) -> list[Path]:
    """Draws the plots for which there are results; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    drawn = [
        _speed(rows, directory / "speed.png"),
        _coordination(rows, directory / "coordination.png"),
        _disturbance(rows, directory / "disturbance.png"),
    ]
    return [path for path in drawn if path is not None]


def _title(row: dict[str, Any]) -> str:
    size = f"{row['mib'] / 1024:g} GiB" if row["mib"] >= 1024 else f"{row['mib']:g} MiB"
    parts = [size, f"{row['leaves']:,} arrays"]
    parts += [row["kind"]] if row["kind"] != "noise" else []
    parts += [f"{row['hosts']} hosts"] if row["hosts"] > 1 else []
    parts += ["other mesh"] if row["mesh"] == "other" else []
    return ", ".join([*parts, row["file_system"]])


def _speed(rows: Iterable[dict[str, Any]], path: Path) -> Path | None:
    """Bars with quartiles: seconds of a save and a restore, for each state that was measured."""
    from matplotlib import pyplot

    found = [row for row in rows if row.get("benchmark") in ("save", "restore")]
    if not found:
        return None
    titles = list(dict.fromkeys(_title(row) for row in found))
    columns = 4
    lines = -(-len(titles) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(16, 2.9 * lines), squeeze=False)
    for ax in axes.flat[len(titles) :]:
        ax.axis("off")
    used: dict[str, Any] = {}
    for title, ax in zip(titles, axes.flat, strict=False):
        acts = {row["benchmark"]: row["seconds"] for row in found if _title(row) == title}
        names = list(dict.fromkeys(name for seconds in acts.values() for name in seconds))
        for number, name in enumerate(names):
            for place, act in enumerate(("save", "restore")):
                if name not in acts.get(act, {}):
                    continue
                told = acts[act][name]
                low, high = told["quartiles"]
                used[name] = ax.bar(
                    place + (number - len(names) / 2) * 0.8 / len(names),
                    told["median"],
                    0.75 / len(names),
                    yerr=[[max(0, told["median"] - low)], [max(0, high - told["median"])]],
                    color=_COLOURS.get(name, "#555555"),
                    error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
                )
        ax.set_title(title, fontsize=9)
        ax.set_xticks([0, 1], ["save", "restore"])
        ax.set_ylabel("seconds")
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(
        used.values(), [_LABELS.get(n, n) for n in used], loc="upper center", ncols=6, frameon=False
    )
    figure.suptitle(" ", fontsize=20)
    return _finish(figure, path)


def _coordination(rows: Sequence[dict[str, Any]], path: Path) -> Path | None:
    """Lines: seconds and kilobytes of the primary against the number of hosts."""
    from matplotlib import pyplot

    found = [row for row in rows if "simulated" in row.get("benchmark", "")]
    if not found:
        return None
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6))
    for act, colour in (("save", "#1b6ca8"), ("restore", "#d1812c")):
        mine = [row for row in found if f"a {act}," in row["benchmark"]]
        hosts = [row["hosts"] for row in mine]
        for ax, key in zip(
            axes, ("primary_seconds", "primary_messages", "primary_kilobytes"), strict=True
        ):
            ax.plot(hosts, [row[key] for row in mine], "o-", color=colour, label=act)
    for ax, label in zip(
        axes,
        ("seconds until the primary has ended it", "messages of the primary", "its kilobytes"),
        strict=True,
    ):
        ax.set_xscale("log")
        ax.set_xlabel("simulated hosts, each message 1 ms")
        ax.set_title(label, fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(0, 2.2)
    axes[1].set_ylim(bottom=0)
    axes[0].axhline(2.0, color="#9a9a9a", linestyle="--", linewidth=0.8)
    axes[0].annotate("target: 2 s", (1, 2.0), fontsize=8, va="bottom")
    axes[2].set_yscale("log")
    axes[0].legend(frameon=False)
    return _finish(figure, path)


def _disturbance(rows: Iterable[dict[str, Any]], path: Path) -> Path | None:
    """Bars: what a save costs a training loop."""
    from matplotlib import pyplot

    found = [row for row in rows if row.get("benchmark") == "disturbance"]
    if not found:
        return None
    row, names = found[-1], ("ours", "orbax_v0")
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.2))
    slower = [row[name]["slower"]["median"] for name in names]
    lost = [row[name]["lost_ms"] for name in names]
    for ax, values, label in (
        (axes[0], slower, "steps during a save take ... times as long"),
        (axes[1], lost, "a save costs the loop, in ms"),
    ):
        ax.bar([_LABELS[n] for n in names], values, color=[_COLOURS[n] for n in names])
        ax.set_title(label, fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].axhline(1.0, color="#333333", linewidth=0.8)
    return _finish(figure, path)


def _finish(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    print("\n".join(str(path) for path in draw(Path(sys.argv[1]), Path(sys.argv[2]))))
