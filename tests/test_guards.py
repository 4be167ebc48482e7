"""The list of guards is true; `python tests/guards.py` removes them one by one."""

from __future__ import annotations

import guards
import pytest


@pytest.mark.parametrize("guard", guards.GUARDS, ids=lambda guard: guard.name)
def test_a_guard_is_where_its_removal_expects_it(guard: guards.Guard) -> None:
    text = (guards.TREE / "datarax_dist" / guard.file).read_text()
    assert text.count(guard.old) == 1
    assert (guards.TREE / guard.tests.split()[0]).is_file()
