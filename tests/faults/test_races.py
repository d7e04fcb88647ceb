"""Eight runs at once, slowed down so that they overlap: one wins, the others say why not, and the result is whole."""

from __future__ import annotations

import pytest

from faults import races, transfers
from faults.cases import case, prepare

pytestmark = pytest.mark.skipif(bool(transfers.missing()), reason=transfers.missing())


@pytest.mark.parametrize(("name", "killed"), [("copy", False), ("copy", True), ("edit in place", True)])
def test_runs_on_one_target_do_not_mix(name, killed, tmp_path):
    prepared = prepare(case(name), tmp_path / "prepare")
    shim = transfers.build_shim(tmp_path)
    assert races.targets(prepared, tmp_path / "race", shim, rounds=1, killed=killed).violations == []


def test_edits_in_place_and_copies_of_what_they_edit_do_not_mix(tmp_path):
    prepared = prepare(case("edit in place"), tmp_path / "prepare")
    assert races.mixed(prepared, tmp_path / "race", transfers.build_shim(tmp_path), rounds=1).violations == []
