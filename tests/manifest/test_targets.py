"""The forms of a target: what each reads as, and one bad input for each rule with its line, column and words."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swsurgery.errors import ManifestError
from swsurgery.manifest.load import load_manifest
from swsurgery.manifest.targets import FORMS, AxisSlice, parse_slice

HEAD = "version: 1\nbase: {path: ../base}\nedits:\n  - "  # the edit begins in line 4, column 5


def read(edit: str):
    return load_manifest(f"{HEAD}{{{edit}}}\n".encode()).manifest.edits[0]


EXAMPLES = [
    # the form, the edit, the fields that it sets
    ("scalar", "layer: 2, row: 3968, col: 7003", {"layer": 2, "row": 3968, "col": 7003}),
    ("scalar", "layer: 2, row: 1, col: 3, expert: 4", {"layer": 2, "row": 1, "col": 3, "expert": 4}),
    ("scalar by index", "tensor: a.weight, index: [3, 5]", {"tensor": "a.weight", "index": (3, 5)}),
    ("row", "layer: 3, row: 12", {"layer": 3, "row": 12}),
    ("row", "layer: 3, row: 12, expert: shared", {"layer": 3, "row": 12, "expert": "shared"}),
    ("column", "layer: 3, col: 12", {"layer": 3, "col": 12}),
    ("column", "layer: 3, col: 12, expert: 5", {"layer": 3, "col": 12, "expert": 5}),
    ("neuron", "layer: 4, neuron: 77", {"layer": 4, "neuron": 77}),
    ("neuron", "layer: 4, neuron: 77, expert: 0", {"layer": 4, "neuron": 77, "expert": 0}),
    ("expert", "layer: 1, expert: 68", {"layer": 1, "expert": 68}),
    ("expert", "layer: 1, expert: shared", {"layer": 1, "expert": "shared"}),
    ("slice", 'tensor: a, slice: "3, 10:20"', {"tensor": "a", "slice": "3, 10:20"}),
    ("slice", "tensor: a, slice: 10:20", {"tensor": "a", "slice": "10:20"}),
    ("slice", "tensor: a, slice: 3", {"tensor": "a", "slice": "3"}),
    ("slice", "tensor: a, slice: -1", {"tensor": "a", "slice": "-1"}),
    ("slice", "tensor: a, slice: ':'", {"tensor": "a", "slice": ":"}),
    ("tensors", "tensors: model.embed_tokens.weight", {"tensors": "model.embed_tokens.weight"}),
    ("tensors", 'tensors: "model.layers.*.self_attn.*.weight"', {"tensors": "model.layers.*.self_attn.*.weight"}),
    ("known", "known: L2.3968.7003", {"known": "L2.3968.7003"}),
    ("known", "known: all", {"known": "all"}),
]


@pytest.mark.parametrize(("form", "text", "fields"), EXAMPLES, ids=[text for _, text, _ in EXAMPLES])
def test_each_form_reads_as_it_is_written(form, text, fields):
    edit = read(f"op: zero, {text}")
    assert edit.form.name == form
    assert edit.model_dump(exclude_none=True, exclude={"raw"}) == {"op": "zero"} | fields
    assert edit.options == {}


def test_every_form_has_an_example():
    assert {form for form, *_ in EXAMPLES} == {form.name for form in FORMS}


def test_a_field_that_is_null_counts_as_absent():
    assert read("op: zero, layer: 1, row: 2, col: null, tensor: ~").form.name == "row"


RULES = [
    # the edit, its column, the message
    ("op: zero", 5, "edits[0]: names no target: give layer and row, col, neuron or expert; tensor and index or slice; "
     "tensors; or known"),
    ("op: zero, layer: null", 5, "edits[0]: names no target"),
    ("op: zero, layer: 1", 5, "edits[0]: is missing row, col, neuron or expert"),
    ("op: zero, neuron: 1", 5, "edits[0]: is missing layer"),
    ("op: zero, row: 1, expert: 2", 5, "edits[0]: is missing layer"),
    ("op: zero, layer: 1, row: 2, neuron: 3", 5, "edits[0]: has neuron with row or col: a neuron is its gate row"),
    ("op: zero, layer: 1, col: 2, neuron: 3, expert: 4", 5, "edits[0]: has neuron with row or col"),
    ("op: zero, tensor: t", 5, "edits[0]: is missing index or slice (or use tensors)"),
    ('op: zero, slice: "1"', 5, "edits[0]: is missing tensor"),
    ('op: zero, tensor: t, index: [1], slice: "1"', 5, "edits[0]: has both index and slice: give one of them"),
    ("op: zero, tensor: t, tensors: u", 5, "edits[0]: names its target in more than one way (tensor; tensors): give"),
    ("op: zero, tensors: t, layer: 1, neuron: 2", 5, "in more than one way (layer, neuron; tensors): give one of them"),
    ("op: zero, tensors: t, known: all", 5, "in more than one way (tensors; known)"),
    ("op: zero, layer: 1, row: 2, expect: 1", 5, "has expect, which is the value of one scalar, but names a row"),
    ("op: zero, layer: 1, expert: 2, expect: 1", 5, "is the value of one scalar, but names an expert"),
    ("op: zero, tensors: t, expect: 1", 5, "is the value of one scalar, but names whole tensors"),
    ("op: zero, known: all, expect: 1", 5, "edits[0]: has both known and expect: known super weights already have"),
    ("op: zero, layer: 1, neuron: -2", 34, "edits[0].neuron: should not be negative, not -2"),
    ("op: zero, layer: 1, neuron: '2'", 34, 'edits[0].neuron: should be a whole number, not "2"'),
    ("op: zero, layer: 1, expert: all", 34, 'edits[0].expert: should be a whole number from 0, or shared, not "all"'),
    ("op: zero, tensors: ''", 25, 'edits[0].tensors: should not be empty, not ""'),
    ("op: zero, tensors: [a, b]", 25, 'edits[0].tensors: should be text, not ["a", "b"]'),
    ("op: zero, tensor: t, slice: ''", 34, "edits[0].slice: should be indices and ranges in quotes, such as "),
    ("op: zero, tensor: t, slice: '1:9:2'", 34, 'such as "3, 10:20", without a step, not "1:9:2"'),
    ("op: zero, tensor: t, slice: '1,,2'", 34, "edits[0].slice: should be indices and ranges in quotes"),
    ("op: zero, tensor: t, slice: '1, ...'", 34, "edits[0].slice: should be indices and ranges in quotes"),
    ("op: zero, tensor: t, slice: '+1'", 34, "edits[0].slice: should be indices and ranges in quotes"),
    ("op: zero, tensor: t, slice: '\u0663'", 34, "edits[0].slice: should be indices and ranges in quotes"),
    ("op: zero, tensor: t, slice: 1.5", 34, "edits[0].slice: should be indices and ranges in quotes"),
    ("op: zero, tensor: t, slice: true", 34, "edits[0].slice: should be indices and ranges in quotes"),
    ("op: zero, tensor: t, slice: [1, 2]", 34, "edits[0].slice: should be indices and ranges in quotes"),
    (f"op: zero, tensor: t, slice: 1{'0' * 18}", 34, "edits[0].slice: should be indices and ranges in quotes"),
    ("op: zero, tensor: t, slice: 3, 10:20", 37, "edits[0].10:20: unknown field"),  # the quotes are missing
    ("op: zero, layer: 1, nueron: 2", 26, "edits[0].nueron: unknown field (did you mean neuron?)"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "column", "message"), RULES, ids=[text for text, *_ in RULES])
def test_each_rule_has_its_place_and_its_words(text, column, message):
    with pytest.raises(ManifestError) as caught:
        read(text)
    first = caught.value.faults[0]
    assert first.startswith(f"manifest:4:{column}: ") and message in first, caught.value.faults
    assert len(caught.value.faults) == 1 or "unknown field" in first


def test_a_slice_is_parsed_axis_by_axis():
    assert parse_slice("3, 10:20") == (AxisSlice(index=3), AxisSlice(10, 20))
    assert parse_slice(" -1 ,:, 2 : ,:-3") == (AxisSlice(index=-1), AxisSlice(), AxisSlice(2), AxisSlice(None, -3))
    for wrong in ("", "1:2:3", "a", "1 2", "--1", "1,", "3\n"):
        with pytest.raises(ValueError, match="is not a slice"):
            parse_slice(wrong)


AXIS = st.integers(-9, 9).map(str) | st.tuples(st.none() | st.integers(-9, 9), st.none() | st.integers(-9, 9)).map(
    lambda ends: ":".join("" if end is None else str(end) for end in ends)
)


@given(st.lists(AXIS, min_size=1, max_size=3))
def test_a_slice_means_what_numpy_means(axes):
    array = np.arange(9 * 9 * 9).reshape(9, 9, 9)
    parsed = parse_slice(", ".join(axes))
    key = tuple(axis.index if axis.index is not None else slice(axis.begin, axis.end) for axis in parsed)
    try:
        expected = eval(f"array[{', '.join(axes)}]", {"array": array})
    except IndexError:  # 9 is outside the axis, which only the checkpoint's shape shows
        return
    assert np.array_equal(array[key], expected)


def test_every_form_has_a_reader_and_a_row_on_the_page():
    from swsurgery.editing import targets

    assert list(targets._READERS) == [form.name for form in FORMS]
    page = (Path(__file__).parents[2] / "docs" / "manifest.md").read_text()
    section = re.split(r"\n##+ ", page.partition("\n### Targets\n")[2])[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    for form, row in zip(FORMS, rows, strict=True):
        named = re.findall(r"`(\w+)`", row.split("|")[2])
        assert named[: len(form.fields)] == list(form.fields), form.name
