"""Inputs made to cost time or memory: each is handled or refused with one line, in 2 seconds and 256 MB.

The inputs, their names and what they must say are in fuzz/hostile.py; the long run measures the same ones.
"""

from __future__ import annotations

import pytest
from fuzz.hostile import HOSTILE, SECONDS, Cost, Hostile, cost, file, header

SLACK = 2.5
"""Processor time doubles where two processes share one core."""


def within(found: Cost, hostile: Hostile) -> bool:
    return found.seconds <= SLACK * SECONDS and found.peak <= hostile.megabytes


@pytest.mark.parametrize("hostile", HOSTILE, ids=[hostile.name for hostile in HOSTILE])
def test_it_is_handled_or_refused_within_the_bounds(hostile, tmp_path):
    found = cost(hostile, tmp_path)
    assert within(found, hostile), found
    if hostile.says is None:
        assert (found.code, found.said) == (0, "")
        return
    assert found.code == 2, found
    assert hostile.says in found.said
    lines = found.said.splitlines()
    assert all(line.startswith("swsurgery: ") and len(line) < 1000 for line in lines)
    assert len(lines) <= 101


def test_the_measure_sees_memory_and_time(tmp_path):
    """Its twin: an input of the same kind that costs what it costs, against one that costs nothing."""
    small = cost(Hostile("small", header(b"{}"), None), tmp_path)
    (tmp_path / "more").mkdir()
    spaces = cost(Hostile("16 MiB of spaces", header(lambda: b"{}".ljust(16 << 20)), None), tmp_path / "more")
    assert small.code == spaces.code == 0
    assert 10 < small.peak < spaces.peak - 15
    assert 0.05 < small.seconds <= spaces.seconds + 0.2


def test_every_name_stands_once_and_every_kind_of_file_is_there():
    names = [hostile.name for hostile in HOSTILE]
    assert len(names) == len(set(names)) >= 55
    assert {name.partition(":")[0] for name in names} == {
        "manifest", "header", "headers", "index", "config", "record"
    }  # fmt: skip


def test_a_message_quotes_no_more_of_a_file_than_a_line_holds(tmp_path):
    text = '{"weight_map":{"a":"' + "../" * 10_000 + '"}}'
    found = cost(Hostile("long", file("model.safetensors.index.json", text), "not a plain file name"), tmp_path)
    assert found.code == 2
    assert "not a plain file name" in found.said and len(found.said) < 400
