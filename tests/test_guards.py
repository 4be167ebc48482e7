"""The list of guards is true; `python tests/guards.py` removes them one by one."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import guards
import pytest


@pytest.fixture(scope="module")
def all_tests() -> list[str]:
    files = sorted({guard.tests.split()[0] for guard in guards.GUARDS})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", *files]
    found = subprocess.run(command, cwd=guards.TREE, capture_output=True, text=True, timeout=100)
    assert found.returncode == 0, found.stdout[-2000:]
    return [line for line in found.stdout.splitlines() if "::" in line]


@pytest.mark.parametrize("guard", guards.GUARDS, ids=lambda guard: guard.name)
def test_a_guard_is_where_its_removal_expects_it(guard: guards.Guard) -> None:
    text = (guards.TREE / "datarax_dist" / guard.file).read_text()
    assert text.count(guard.old) == 1
    assert guard.old != guard.new


@pytest.mark.xdist_group("the tests of guards")
def test_each_guard_has_tests(all_tests: list[str]) -> None:
    assert [g.name for g in guards.GUARDS if not chosen(g.tests, all_tests)] == []


@pytest.mark.xdist_group("the tests of guards")
def test_a_guard_whose_test_has_gone_is_seen(all_tests: list[str]) -> None:
    assert chosen("tests/test_meetings.py", all_tests)
    assert not chosen("tests/test_meetings.py -k 'no_such or (meet and no_such)'", all_tests)


def chosen(selection: str, names: list[str]) -> list[str]:
    """Of the names of tests those that pytest would run, by a file and what follows `-k`."""
    file, *rest = shlex.split(selection)
    below = [name for name in names if name.startswith(file)]
    if not rest:
        return below
    flag, words = rest
    assert flag == "-k"

    def fits(name: str) -> bool:
        lower = name.lower()
        terms = re.sub(
            r"[^\s()]+",  # as pytest has it: what a parameter is called may have `-` and `/`
            lambda word: word[0] if word[0] in ("and", "or", "not") else str(word[0] in lower),
            words.lower(),
        )
        return bool(eval(terms))  # of "True", "False", "and", "or", "not" and brackets

    return [name for name in below if fits(name)]
