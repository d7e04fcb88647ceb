"""The JSON Schema in docs/ is the one that the code makes, and judges manifests as an independent validator."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from swsurgery.errors import ManifestError
from swsurgery.manifest.load import parse_manifest
from swsurgery.manifest.operations import OPERATIONS
from swsurgery.manifest.schema import render_schema
from swsurgery.manifest.targets import FORMS, TARGET_FIELDS

DOCUMENT = Path(__file__).parents[2] / "docs" / "manifest.schema.json"
VALIDATOR = jsonschema.Draft202012Validator(render_schema())
GOOD = {
    "version": 1,
    "name": "tiny",
    "base": {"repo_id": "org/tiny", "revision": "0123456789abcdef0123456789abcdef01234567", "weights": "index"},
    "edits": [
        {"op": "zero", "layer": 2, "row": 3968, "col": 7003, "expect": -1.5},
        {"op": "scale", "tensor": "w", "index": [0, 5], "factor": 0.5, "expect": "0x40bc"},
        {"op": "set", "layer": 0, "row": 0, "col": 0, "expert": "shared", "value": 7},
        {"op": "set", "known": "L2.3968.7003", "bits": "0x40bc"},
        {"op": "protect", "tensor": "w", "index": [], "expect": {"value": 2.5, "dtype": "F16"}},
        {"op": "zero", "layer": 3, "row": 12},
        {"op": "scale", "layer": 3, "col": 12, "expert": 1, "factor": -2},
        {"op": "set", "layer": 4, "neuron": 77, "value": 0},
        {"op": "zero", "layer": 1, "expert": "shared"},
        {"op": "zero", "tensor": "w", "slice": "3, 10:20"},
        {"op": "zero", "tensor": "w", "slice": -1},
        {"op": "protect", "tensors": "model.*.weight", "layer": None, "expect": None},
        {"op": "flip", "layer": 2, "row": 1, "col": 2, "bit": 14, "expect": 1},
        {"op": "flip", "known": "all", "bit": [0, 63], "raw": True},
        {"op": "clip", "tensors": "*", "z": 5},
        {"op": "clip", "known": "L1.E68", "iqr": 0, "block": [8, 8], "z": None},
        {"op": "clip", "layer": 1, "row": 2, "fraction": 0.5, "per": "channel", "block": None},
        {"op": "prune_outliers", "tensors": "*", "count": 7000},
        {"op": "prune_outliers", "tensors": "*", "fraction": 1e-9},
        {"op": "round", "tensors": "*", "bits": 2, "symmetric": False, "per": "tensor"},
        {"op": "round", "tensors": "*", "bits": 4, "levels": "nf4", "block": 128, "clip": {"iqr": 1.5}},
        {"op": "restore", "known": "all"},
        {"op": "restore", "layer": 2, "row": 1, "col": 2},
        {"op": "restore", "tensor": "w", "index": [1]},
        {"op": "restore", "layer": 2, "row": 1, "from": "../base"},
    ],
    "check": {"max_perplexity_ratio": 1.5},
}
BAD_EDITS = [
    {"op": "zap", "known": "all"},
    {"op": "zero"},
    {"op": "zero", "known": "all", "tensor": "t", "index": [0]},
    {"op": "zero", "layer": 1},
    {"op": "zero", "layer": 1, "row": None},
    {"op": "zero", "layer": -1, "row": 2, "col": 3},
    {"op": "zero", "layer": "1", "row": 2, "col": 3},
    {"op": "zero", "layer": 1, "row": 2, "neuron": 3},
    {"op": "zero", "layer": 1, "row": 2, "expect": 3},
    {"op": "zero", "tensor": "t", "slice": "1:2:3"},
    {"op": "zero", "tensor": "t", "slice": 1.5},
    {"op": "zero", "tensor": "t", "slice": 10**18},
    {"op": "zero", "tensor": "t", "slice": "1", "index": [1]},
    {"op": "zero", "tensors": ""},
    {"op": "zero", "tensors": "t", "known": "all"},
    {"op": "scale", "known": "all"},
    {"op": "scale", "known": "all", "factor": 0},
    {"op": "set", "known": "all"},
    {"op": "set", "known": "all", "value": 1, "bits": "0x40bc"},
    {"op": "set", "known": "all", "bits": "0x40b"},
    {"op": "flip", "known": "all"},
    {"op": "flip", "known": "all", "bit": []},
    {"op": "flip", "known": "all", "bit": [1, 1]},
    {"op": "flip", "known": "all", "bit": 64},
    {"op": "flip", "layer": 1, "row": 2, "bit": 1},
    {"op": "clip", "tensors": "t"},
    {"op": "clip", "tensors": "t", "z": 1, "iqr": 1},
    {"op": "clip", "tensors": "t", "z": 0},
    {"op": "clip", "known": "all", "z": 1},
    {"op": "clip", "layer": 1, "row": 2, "col": 3, "z": 1},
    {"op": "clip", "tensors": "t", "z": 1, "per": "tensor", "block": 8},
    {"op": "clip", "tensors": "t", "z": 1, "block": [8]},
    {"op": "clip", "tensors": "t", "z": 1, "block": 0},
    {"op": "prune_outliers", "tensors": "t", "count": 0},
    {"op": "prune_outliers", "tensors": "t", "count": 1, "fraction": 0.5},
    {"op": "round", "tensors": "t"},
    {"op": "round", "tensors": "t", "bits": 9},
    {"op": "round", "tensors": "t", "bits": 3, "levels": "nf4"},
    {"op": "round", "tensors": "t", "bits": 4, "levels": "nf4", "symmetric": False},
    {"op": "round", "tensors": "t", "bits": 4, "clip": {}},
    {"op": "round", "tensors": "t", "bits": 4, "clip": {"z": 1, "iqr": 1}},
    {"op": "restore", "tensors": "t"},
    {"op": "restore", "layer": 1, "row": 2},
    {"op": "restore", "layer": 1, "row": 2, "from": None},
    {"op": "restore", "layer": 1, "row": 2, "source": "x"},
]
BAD = [
    {},
    GOOD | {"version": 2},
    GOOD | {"edits": []},
    GOOD | {"base": {"repo_id": "org/tiny", "revision": "main"}},
    GOOD | {"base": {"path": "x", "colour": "red"}},
    GOOD | {"check": {"max_perplexity_ratio": 0}},
    GOOD | {"nmae": "x"},
]


def test_the_document_is_what_the_code_makes():
    assert DOCUMENT.read_text(encoding="utf-8") == json.dumps(render_schema(), indent=2, sort_keys=True) + "\n"


def test_it_is_a_sound_schema_of_its_draft():
    jsonschema.Draft202012Validator.check_schema(render_schema())
    assert render_schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_a_good_manifest_is_valid_for_both_readers():
    assert list(VALIDATOR.iter_errors(GOOD)) == []
    assert len(parse_manifest(json.dumps(GOOD).encode(), Path("m.json")).manifest.edits) == len(GOOD["edits"])


@pytest.mark.parametrize("bad", BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_bad_manifest_is_invalid_for_both_readers(bad):
    assert not VALIDATOR.is_valid(bad)
    assert not loads(bad)


@pytest.mark.parametrize("bad", BAD_EDITS, ids=[json.dumps(edit) for edit in BAD_EDITS])
def test_a_bad_edit_is_invalid_for_both_readers(bad):
    assert not VALIDATOR.is_valid(GOOD | {"edits": [bad]})
    assert not loads(GOOD | {"edits": [bad]})


def test_the_good_edits_have_every_form_and_every_operation():
    edits = parse_manifest(json.dumps(GOOD).encode(), Path("m.json")).manifest.edits
    assert {edit.form.name for edit in edits} == {form.name for form in FORMS}
    assert {type(edit) for edit in edits} == {*OPERATIONS}


# A whole number written as 1.0 is an integer for JSON Schema, but not for the loader, so no field below has one.
SMALL = st.sampled_from([0, 1, 2, 4, 8, 9, 63, 64])
ODD = st.sampled_from([None, True, False, -1, 0.5, 1.5, "", "x", "1", [], [1], [1, 2], [2, 2], {}, {"z": 5}])
VALUES = {
    "layer": SMALL,
    "row": SMALL,
    "col": SMALL,
    "neuron": SMALL,
    "expert": SMALL | st.just("shared"),
    "tensor": st.just("t"),
    "index": st.lists(SMALL, max_size=3),
    "slice": st.sampled_from(["3", "3, 10:20", ":", "-1:", "1:2:3", "1,,2", "a", 5, -5, 10**18]),
    "tensors": st.sampled_from(["t", "model.*"]),
    "known": st.sampled_from(["all", "L1.2.3"]),
    "expect": st.sampled_from([1, 0.5, "0x40bc", "0x40b", {"value": 1, "dtype": "F16"}, {"value": 1}]),
    "factor": st.sampled_from([0, 1, -0.5]),
    "value": st.sampled_from([0, 1, 0.5, 10**30]),
    "bits": st.sampled_from(["0x40bc", 1, 2, 4, 8, 9]),
    "bit": SMALL | st.lists(SMALL, max_size=3),
    "raw": st.booleans(),
    "max_error": st.sampled_from([0, 0.5, -1]),
    "z": st.sampled_from([0, 5, 0.5]),
    "iqr": st.sampled_from([0, 1.5, -1]),
    "fraction": st.sampled_from([0, 0.5, 1]),
    "count": SMALL,
    "per": st.sampled_from(["tensor", "channel", "block"]),
    "block": SMALL | st.lists(SMALL, min_size=1, max_size=3),
    "symmetric": st.booleans(),
    "levels": st.sampled_from(["integer", "nf4"]),
    "clip": st.fixed_dictionaries({}, optional={"z": st.sampled_from([0, 5]), "iqr": st.just(1.5)}),
    "from": st.sampled_from(["", "x"]),
}


@st.composite
def edits(draw: st.DrawFn) -> dict[str, object]:
    """An edit whose fields belong to one form and one operation, except for up to two that are added or replaced."""
    operation = draw(st.sampled_from(OPERATIONS))
    form = draw(st.sampled_from(FORMS))
    own = {field.alias or name for name, field in operation.model_fields.items()} - {*TARGET_FIELDS, "op"}
    chosen = [*form.fields, *(f for f in sorted({*form.optional} | own) if draw(st.booleans()))]
    edit: dict[str, object] = {field: draw(VALUES[field]) for field in chosen}
    for field in draw(st.lists(st.sampled_from(sorted(VALUES)), max_size=2)):
        edit[field] = draw(VALUES[field] | ODD)
    return {"op": operation.model_fields["op"].annotation.__args__[0], **edit}


def loads(document: object) -> bool:
    try:
        parse_manifest(json.dumps(document).encode(), Path("m.json"))
    except ManifestError:
        return False
    return True


@settings(max_examples=1500, deadline=None)
@given(edits())
def test_the_schema_accepts_exactly_what_the_loader_accepts(edit):
    document = {"version": 1, "base": {"path": "x"}, "edits": [edit]}
    event("accepted" if loads(document) else "refused")
    assert VALIDATOR.is_valid(document) == loads(document)
