"""Holes planted into the product that another program can use: each is found by a race that is played step by step."""

from __future__ import annotations

import pytest

from faults.planted import IN_PLACE_RACES, planted
from faults.swaps import FINDING, Room


@pytest.mark.parametrize("name", FINDING)
def test_a_planted_hole_is_found(tmp_path, name):
    assert FINDING[name](Room(tmp_path / "sound")) == []
    with planted(name):
        faults = FINDING[name](Room(tmp_path / "holed"))
    assert faults and "the other program had no turn" not in faults


def test_every_hole_is_tried():
    assert list(FINDING) == [b.name for b in IN_PLACE_RACES]
    assert len({b.text() for b in IN_PLACE_RACES}) == len(IN_PLACE_RACES) == 3
