"""Holes planted into the product that another program can use: each is found by a race that is played step by step."""

from __future__ import annotations

import pytest

from faults import swaps
from faults.planted import IN_PLACE_RACES, planted
from faults.swaps import Room, in_link, refused

FOUND_BY = {
    "a shard is not compared with what it was": lambda room: refused(room, "during the check", swaps.replace_shard),
    "old bytes are not read before they are overwritten": lambda room: refused(
        room, "fsops.write_at", swaps.change_edited_scalar
    ),
    "files are opened by their paths": lambda room: in_link(room, "before the first write"),
}
"""Bug -> the race that finds it, which returns the promises that did not hold."""


@pytest.mark.parametrize("name", FOUND_BY)
def test_a_planted_hole_is_found(tmp_path, name):
    assert FOUND_BY[name](Room(tmp_path / "sound")) == []
    with planted(name):
        faults = FOUND_BY[name](Room(tmp_path / "holed"))
    assert faults and "the other program had no turn" not in faults


def test_every_hole_is_tried():
    assert list(FOUND_BY) == [b.name for b in IN_PLACE_RACES]
    assert len({b.text() for b in IN_PLACE_RACES}) == len(IN_PLACE_RACES) == 3
