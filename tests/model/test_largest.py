"""The largest scalars of the down projections: compared with a full sort."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
from checkpoints import tensor, write_llama, write_single
from hypothesis import given
from hypothesis import strategies as st

import swsurgery
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.editing.control_checks import list_excluded, list_plan_excluded
from swsurgery.editing.record import draft_record
from swsurgery.errors import ArchitectureError, ModelError
from swsurgery.model import largest
from swsurgery.model.controls import compute_paper_count
from swsurgery.model.largest import _Best, find_largest_scalars, list_down_tensors
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import decode


def sort_all(folder: Path) -> list[tuple[float, Coordinate]]:
    """Read every scalar of the down projections on its own, and sort by magnitude, layer and index."""
    checkpoint = open_checkpoint(folder)
    found = []
    for name in list_down_tensors(checkpoint):
        shard, shape = checkpoint.shards[checkpoint.weight_map[name]], checkpoint.shapes[name]
        for index in np.ndindex(*shape):
            value = float(decode(checkpoint.get_info(name).dtype, shard.read_scalar(name, index)))
            found.append((abs(value) if math.isfinite(value) else 0.0, Coordinate(name, index)))
    return sorted(found, key=lambda pair: -pair[0])


@pytest.mark.parametrize("piece", [1, 5, 1 << 18])
def test_they_are_those_of_a_full_sort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(largest, "MAGNITUDES_AT_ONCE", piece)
    folder = write_llama(tmp_path / "base")
    everything = sort_all(folder)
    excluded = {everything[0][1], everything[3][1], Coordinate("model.embed_tokens.weight", (0, 0))}
    wanted = [pair for pair in everything if pair[1] not in excluded]
    for count in (1, 4, 17):
        found = find_largest_scalars(open_checkpoint(folder), count, excluded)
        assert [(one.magnitude, one.coordinate) for one in found] == wanted[:count]


@given(st.data())
def test_equal_magnitudes_are_in_the_order_of_the_file(data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=40))
    count, step = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 7))
    best = _Best(count)
    for begin in range(0, len(values), step):
        best.add(np.array(values[begin : begin + step], np.float64), 0, begin)
    order = sorted((at for at, value in enumerate(values) if value), key=lambda at: -values[at])
    assert best.places.tolist() == order[:count]


def test_more_scalars_than_there_are_is_one_line(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "base")
    total = sum(list_down_tensors(open_checkpoint(folder)).values())
    with pytest.raises(ModelError, match=r"fewer than \d+: .*\(leave out --control outliers\)"):
        find_largest_scalars(open_checkpoint(folder), total + 1, ())


def test_a_model_without_known_down_projections_is_one_line(tmp_path: Path) -> None:
    folder = write_single(tmp_path / "base", {"some.weight": tensor("F32", 4, 4)})
    with pytest.raises(ArchitectureError):
        find_largest_scalars(open_checkpoint(folder), 1, ())


@pytest.mark.model
@pytest.mark.skipif(not os.environ.get("SWSURGERY_TEST_MODEL"), reason="SWSURGERY_TEST_MODEL names no model")
def test_known_super_weights_are_no_outliers() -> None:
    """A plan and its record leave out the same scalars. Without them, 28 outliers are the paper's rate."""
    base = {"path": os.environ["SWSURGERY_TEST_MODEL"], "model": "SmolLM2-135M-Instruct"}
    edits = [
        {"op": "zero", "layer": 11, "row": 507, "col": 1229},
        {"op": "protect", "layer": 9, "row": 507, "col": 200},
    ]
    plan = swsurgery.plan({"version": 1, "base": base, "edits": edits})
    excluded = list_plan_excluded(plan)
    super_weights = [(11, (507, 1229)), (11, (507, 1487)), (2, (507, 90)), (2, (507, 430)), (9, (507, 200))]
    named = {Coordinate(f"model.layers.{layer}.mlp.down_proj.weight", index) for layer, index in super_weights}
    assert named <= excluded == list_excluded(plan.checkpoint, draft_record(plan))
    assert compute_paper_count(sum(list_down_tensors(plan.checkpoint).values())) == 28
    found = find_largest_scalars(plan.checkpoint, 28, excluded)
    assert named.isdisjoint(one.coordinate for one in found)
    assert (found[0].coordinate.index, found[0].magnitude) == ((507, 678), 5.78125)
