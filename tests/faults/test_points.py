"""The real command killed, and failed, at a sample of its calls: the first of each name on each kind of file."""

from __future__ import annotations

import pytest

from faults import sweeps, tracing
from faults.cases import case, prepare

pytestmark = pytest.mark.skipif(bool(tracing.missing()), reason=tracing.missing())

LEAST = {"copy": 15, "edit in place": 15}
"""Points that a sample must have; fewer, and the sweep would look past the protocol."""


@pytest.mark.parametrize("name", LEAST)
def test_a_killed_run_leaves_old_or_new_and_the_same_command_finishes(name, tmp_path):
    prepared = prepare(case(name), tmp_path / "prepare")
    result = sweeps.kill(prepared, tmp_path / "kill", 1, "", sample=True)
    assert result.violations == []
    assert result.cases >= LEAST[name]


@pytest.mark.parametrize("name", LEAST)
def test_a_call_that_fails_is_told_in_one_line_and_leaves_old_or_new(name, tmp_path):
    prepared = prepare(case(name), tmp_path / "prepare")
    result = sweeps.errors(prepared, tmp_path / "errors", 1, "", sample=True)
    assert result.violations == []
    assert result.cases >= LEAST[name]
    assert sum(result.excused.values()) < result.cases / 4
