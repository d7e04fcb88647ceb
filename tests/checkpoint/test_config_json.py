"""config.json is read as Python reads it: infinities, NaN and repeated keys. Every other JSON file stays strict."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from checkpoints import CONFIG, INDEX, down, tree, write_llama, write_manifest

from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.cli import main
from swsurgery.errors import CheckpointError
from swsurgery.storage.strict_json import parse_json


def with_config(folder: Path, more: str) -> Path:
    """A checkpoint whose config.json ends in `more`, which need not be JSON."""
    write_llama(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG)[:-1] + f", {more}}}")
    return folder


def value_of(tmp_path: Path, more: str, key: str) -> object:
    return open_checkpoint(with_config(tmp_path / "base", more)).config[key]


@pytest.mark.parametrize(
    ("text", "value"),
    [("Infinity", math.inf), ("-Infinity", -math.inf), ("1e999", math.inf), ("[0.0, Infinity]", [0.0, math.inf])],
)
def test_infinities_are_values(tmp_path, text, value):
    assert value_of(tmp_path, f'"time_step_limit": {text}', "time_step_limit") == value


def test_nan_is_a_value(tmp_path):
    assert math.isnan(value_of(tmp_path, '"x": NaN', "x"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('"x": 1, "x": 1', 1),
        ('"x": NaN, "x": NaN, "x": NaN', math.nan),
        ('"x": {"a": 1, "b": [2]}, "x": {"b": [2], "a": 1}', {"a": 1, "b": [2]}),
        ('"x": {"y": null, "y": null}', {"y": None}),
    ],
)
def test_a_key_may_stand_twice_with_the_same_value(tmp_path, text, value):
    assert json.dumps(value_of(tmp_path, text, "x"), sort_keys=True) == json.dumps(value, sort_keys=True)


@pytest.mark.parametrize(
    "text", ['"x": 1, "x": 2', '"x": 1, "x": true', '"x": 0, "x": false', '"x": 1, "x": 1.0', '"x": 1, "x": 1, "x": 2',
             '"x": [1, 2], "x": [2, 1]', '"y": {"x": 1, "x": "1"}'],
)  # fmt: skip
def test_but_not_with_different_values(tmp_path, text):
    with pytest.raises(CheckpointError, match="'x' appears twice with different values"):
        value_of(tmp_path, text, "x")


@pytest.mark.parametrize("text", ["infinity", "nan", "+Infinity", "1" * 41, "1." + "0" * 2000])
def test_what_python_does_not_write_is_refused(tmp_path, text):
    with pytest.raises(CheckpointError, match="is not valid JSON: .*: config.json"):
        value_of(tmp_path, f'"x": {text}', "x")


@pytest.mark.parametrize("more", ['"x": Infinity', '"x": NaN', '"x": 1e999', '"x": 1, "x": 1'])
def test_the_index_and_the_record_stay_strict(tmp_path, more):
    base = write_llama(tmp_path / "base")
    text = (base / INDEX).read_text().rstrip()
    (base / INDEX).write_text(text[:-1] + f", {more}}}")
    with pytest.raises(CheckpointError, match=f"is not valid JSON: .*: {INDEX}"):
        open_checkpoint(base)
    with pytest.raises(CheckpointError, match="is not valid JSON: .*: swsurgery.json"):
        parse_json(f"{{{more}}}".encode(), "swsurgery.json")


MIXED = '"time_step_limit": [0.0, Infinity], "n": NaN, "bos_token_id": 1, "bos_token_id": 1'


def test_such_a_checkpoint_goes_through_every_command_and_documents_stay_strict_json(tmp_path, capsys):
    base, patched = with_config(tmp_path / "base", MIXED), tmp_path / "patched"
    manifest = write_manifest(tmp_path / "m.json", base, {"op": "zero", "layer": 1, "row": 2, "col": 3})
    before = tree(base)
    commands = {
        ("apply", manifest, "-o", patched, "--check", "weights"): 0,
        ("inspect", base): 0,
        ("inspect", patched, "--tensor", down(1), "--at", "2,3"): 0,
        ("verify", patched, "--finite"): 0,
        ("diff", base, patched): 1,
        ("revert", patched, "-o", tmp_path / "reverted"): 0,
    }
    for command, code in commands.items():
        assert main([*map(str, command), "--json", "--quiet"]) == code, command
        json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert tree(tmp_path / "reverted") == before


@pytest.mark.parametrize("value", ["Infinity", "NaN", "[NaN]", '{"x": Infinity}', "3", "[]"])
def test_a_model_type_that_is_no_text_stops_nothing(tmp_path, capsys, value):
    base = write_llama(tmp_path / "base")
    (base / "config.json").write_text(f'{{"model_type": {value}}}')
    assert main(["inspect", str(base), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["model_type"] is None
    manifest = write_manifest(tmp_path / "m.json", base, {"op": "zero", "tensor": down(1), "index": [2, 3]})
    assert main(["export", str(manifest), "--format", "peft", "-o", str(tmp_path / "peft")]) == 0
    assert main(["inspect", str(base), "--tensor", down(1), "--at", "2,3"]) == 0


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts", "intermediate_size", "quantization_config"])
def test_a_size_that_is_infinite_stops_nothing(tmp_path, key):
    base = write_llama(tmp_path / "base")
    (base / "config.json").write_text(json.dumps({**CONFIG, key: math.inf}))
    manifest = write_manifest(tmp_path / "m.json", base, {"op": "zero", "layer": 1, "row": 2, "col": 3})
    assert main(["apply", str(manifest), "--dry-run", "--quiet"]) == 0
    assert main(["verify", str(base), "--known", "--model", "llama-7b", "--quiet"]) in (1, 2)
