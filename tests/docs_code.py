"""Runs the code of the documentation, each block in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def blocks(needs: str = "") -> list[tuple[str, str]]:
    """Returns (file and line, code) of the Python blocks that need this package, or none."""
    found = []
    for file in sorted(DOCS.glob("*.md")):
        text = file.read_text()
        for match in re.finditer(r"^```python(?: needs=(\w+))?\n(.*?)^```$", text, re.M | re.S):
            if (match[1] or "") == needs:
                line = text[: match.start()].count("\n") + 1
                found.append((f"{file.name}:{line}", match[2]))
    return found


def run(code: str) -> str:
    """Runs a block as a user would."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
