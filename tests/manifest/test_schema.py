"""The JSON Schema in docs/ is the one that the code makes, and judges manifests as an independent validator."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from swsurgery.manifest.load import parse_manifest
from swsurgery.manifest.schema import render_schema

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
    ],
    "check": {"max_perplexity_ratio": 1.5},
}
BAD = [
    {},
    GOOD | {"version": 2},
    GOOD | {"edits": []},
    GOOD | {"edits": [{"op": "zap", "known": "all"}]},
    GOOD | {"edits": [{"op": "zero"}]},
    GOOD | {"edits": [{"op": "zero", "known": "all", "tensor": "t", "index": [0]}]},
    GOOD | {"edits": [{"op": "zero", "layer": 1}]},
    GOOD | {"edits": [{"op": "zero", "layer": -1, "row": 2, "col": 3}]},
    GOOD | {"edits": [{"op": "zero", "layer": "1", "row": 2, "col": 3}]},
    GOOD | {"edits": [{"op": "scale", "known": "all"}]},
    GOOD | {"edits": [{"op": "set", "known": "all"}]},
    GOOD | {"edits": [{"op": "set", "known": "all", "value": 1, "bits": "0x40bc"}]},
    GOOD | {"edits": [{"op": "set", "known": "all", "bits": "0x40b"}]},
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
    assert len(parse_manifest(json.dumps(GOOD).encode(), Path("m.json")).manifest.edits) == 5


@pytest.mark.parametrize("bad", BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_bad_manifest_is_invalid(bad):
    assert not VALIDATOR.is_valid(bad)
