"""Functions built from the JSON options of manifests and records."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import get_args

import pytest

from swsurgery.checkpoint.record_entries import ChangeRecord
from swsurgery.manifest import operations
from swsurgery.rewriting.clip import ClipFunction
from swsurgery.rewriting.elementwise import ScaleFunction, SetFunction, ZeroFunction
from swsurgery.rewriting.prune import PruneFunction
from swsurgery.rewriting.read import FUNCTIONS, build_function
from swsurgery.rewriting.round import RoundFunction
from swsurgery.rewriting.scope import CHANNEL, TENSOR, Grouping
from swsurgery.storage.numbers import Written


@pytest.mark.parametrize(
    ("op", "options", "function"),
    [
        ("zero", {}, ZeroFunction()),
        ("scale", {"factor": -0.5}, ScaleFunction(-0.5)),
        ("scale", {"factor": 3}, ScaleFunction(3.0)),
        ("set", {"value": 7}, SetFunction(7)),
        ("set", {"value": 0.25, "bits": None}, SetFunction(0.25)),
        ("set", {"value": "0.1"}, SetFunction(Written("0.1"))),
        ("set", {"bits": "0x40bc"}, SetFunction(bits="0x40bc")),
        ("clip", {"z": 5}, ClipFunction("z", 5.0)),
        ("clip", {"fraction": 0.01, "per": "tensor"}, ClipFunction("fraction", 0.01)),
        ("clip", {"iqr": 0, "per": "channel"}, ClipFunction("iqr", 0.0, CHANNEL)),
        ("clip", {"iqr": 1.5, "block": 128}, ClipFunction("iqr", 1.5, Grouping(1, 128))),
        ("clip", {"z": 3, "block": [64, 32]}, ClipFunction("z", 3.0, Grouping(64, 32))),
        ("prune_outliers", {"count": 7000}, PruneFunction(7000)),
        ("prune_outliers", {"fraction": 0.001}, PruneFunction(fraction=0.001)),
        ("round", {"bits": 4}, RoundFunction(4)),
        ("round", {"bits": 8, "symmetric": False, "per": "channel"}, RoundFunction(8, False, "integer", CHANNEL)),
        ("round", {"bits": 4, "levels": "nf4", "block": 64}, RoundFunction(4, True, "nf4", Grouping(1, 64))),
        (
            "round",
            {"bits": 3, "block": (128, 128), "clip": {"z": 9}},
            RoundFunction(3, scope=Grouping(128, 128), clip=ClipFunction("z", 9.0, TENSOR)),
        ),
    ],
)
def test_options_become_a_function(op, options, function):
    assert build_function(op, options) == function


@pytest.mark.parametrize(
    ("op", "options", "message"),
    [
        ("flip", {}, "no function computes 'flip': give one of zero, scale"),
        ("zero", {"factor": 1}, "zero has no option factor"),
        ("scale", {}, "factor is None: give a finite number"),
        ("scale", {"factor": 0}, "factor is 0: use zero"),
        ("scale", {"factor": float("inf")}, "factor is inf"),
        ("scale", {"factor": True}, "factor is True"),
        ("set", {}, "set needs exactly one of value, bits"),
        ("set", {"value": 1, "bits": "0x40bc"}, "exactly one"),
        ("set", {"value": "one"}, "value is 'one': give a number"),
        ("set", {"value": False}, "value is False"),
        ("set", {"bits": "40bc"}, "bits is '40bc': give a hexadecimal number"),
        ("clip", {}, "clip needs exactly one of z, fraction, iqr"),
        ("clip", {"z": 1, "iqr": 1}, "exactly one"),
        ("clip", {"z": 0}, "z is 0: give a positive number"),
        ("clip", {"z": -1}, "z is -1"),
        ("clip", {"iqr": -0.1}, "iqr is -0.1: give a number from 0"),
        ("clip", {"fraction": 0}, "fraction is 0: give a number between 0 and 1"),
        ("clip", {"fraction": 1}, "fraction is 1"),
        ("clip", {"z": float("nan")}, "z is nan"),
        ("clip", {"z": 1, "per": "row"}, "per is 'row': give tensor or channel"),
        ("clip", {"z": 1, "per": "channel", "block": 4}, "both per and block"),
        ("clip", {"z": 1, "block": 0}, "block is 0: give a positive whole number"),
        ("clip", {"z": 1, "block": [4]}, r"block is \[4\]"),
        ("clip", {"z": 1, "block": [4, True]}, "block is"),
        ("clip", {"z": 1, "block": "4"}, "block is '4'"),
        ("clip", {"z": 1, "bits": 4}, "clip has no option bits"),
        ("prune_outliers", {}, "prune_outliers needs exactly one of count, fraction"),
        ("prune_outliers", {"count": 0}, "count is 0: give a positive whole number"),
        ("prune_outliers", {"count": 1.5}, "count is 1.5"),
        ("prune_outliers", {"fraction": 1.5}, "fraction is 1.5"),
        ("round", {}, "bits is None: give a whole number from 2 to 8"),
        ("round", {"bits": 1}, "bits is 1"),
        ("round", {"bits": 9}, "bits is 9"),
        ("round", {"bits": 4.0}, "bits is 4.0"),
        ("round", {"bits": 4, "symmetric": 1}, "symmetric is 1: give true or false"),
        ("round", {"bits": 4, "levels": "fp4"}, "levels is 'fp4': give integer or nf4"),
        ("round", {"bits": 3, "levels": "nf4"}, "levels nf4 are 4 bits and symmetric"),
        ("round", {"bits": 4, "levels": "nf4", "symmetric": False}, "levels nf4 are 4 bits and symmetric"),
        ("round", {"bits": 4, "clip": 5}, "clip is 5: give the options of a clip"),
        ("round", {"bits": 4, "clip": {}}, "clip of round needs exactly one of z, fraction, iqr"),
        ("round", {"bits": 4, "clip": {"z": 5, "block": 4}}, "clip of round has no option block"),
        ("round", {"bits": 4, "group": 128}, "round has no option group"),
    ],
)
def test_nonsense_is_refused(op, options, message):
    with pytest.raises(ValueError, match=message):
        build_function(op, options)


def test_every_operation_that_computes_values_has_a_function():
    """`restore` copies bytes and `protect` changes none; the other operations on regions are in the table."""
    classes = get_args(get_args(operations.Edit)[0])
    on_regions = [get_args(each.model_fields["op"].annotation)[0] for each in classes if each.on_regions]
    assert set(FUNCTIONS) == {*on_regions} - {"restore", "protect"}
    recorded = get_args(ChangeRecord.model_fields["op"].annotation)
    assert {*recorded} == {*FUNCTIONS, "restore"}
    tested = {op for op, _ in runpy.run_path(str(Path(__file__).parent / "test_blocks.py"))["OPERATIONS"]}
    assert tested == {*FUNCTIONS}
