"""What the primary knows of a bucket, so that later saves need not ask it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from datarax_dist import format as fmt
from datarax_dist.inspection import Inspection, inspect_run, inspect_step, is_committed
from datarax_dist.retention import has_stray_attempts
from datarax_dist.storage import Store, SupportsRename

__all__ = ["Known", "step_of"]


@dataclass(slots=True)
class Known:
    """What the primary knows of a bucket.

    Attributes:
        run: None when nothing is known.
        steps: what has a directory -> whether it is committed; None where nobody has looked.
        tidy: whether there are no leftovers.
    """

    run: str | None = None
    steps: dict[int, bool | None] = field(default_factory=dict)
    tidy: bool = False

    @classmethod
    def of(cls, inspection: Inspection) -> Known:
        """Returns what a look at the whole root has told."""
        return cls(
            inspection.run,
            {
                c.step: c.state == "committed"
                for c in inspection.candidates
                if c.name == fmt.step_name(c.step) or c.state == "committed"
            },
            tidy=all(c.state not in ("staged", "deleting", "void") for c in inspection.candidates)
            and not has_stray_attempts(inspection.attempts, inspection),
        )

    def committed(self, store: Store, names: Sequence[str]) -> list[int]:
        """Returns the committed steps; of a bucket those of `names` that are known here, and new
        ones.
        """
        if isinstance(store, SupportsRename):
            return inspect_run(store).committed
        found = set()
        for name in names:
            step = step_of(name)
            if step is None:
                continue
            if fmt.parse_step_name(name.rstrip("/")) is None:
                if is_committed(store, name[:-1]):
                    found.add(step)
                continue
            if self.steps.get(step) is None:
                self.steps[step] = inspect_step(store, step, name[:-1]).state == "committed"
            if self.steps[step]:
                found.add(step)
        return sorted(found)

    def is_free(self, step: int) -> bool:
        return self.run is not None and step not in self.steps


def step_of(name: str) -> int | None:
    """Returns the step that a directory is, or was until its successor was there."""
    step, aside = fmt.parse_step_name(name.rstrip("/")), fmt.parse_aside_name(name.rstrip("/"))
    return aside[0] if aside is not None and aside[1] == "replaced" else step
