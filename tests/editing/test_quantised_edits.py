"""Edits of single elements of quantised matrices store the nearest code, and change no other bit.

The oracle computes the codes with numpy; it shares no code with the package.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import tree, write_manifest
from safetensors.numpy import load_file, save_file

import swsurgery
from swsurgery.errors import CheckpointError, ManifestError, PlanError

HIDDEN, INNER, LAYERS = 6, 10, 2
DOWN = "model.layers.1.mlp.down_proj.weight"
WEIGHTS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"all": {"targets": ["Linear"], "weights": WEIGHTS}},
    },
}


def build() -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    tensors: dict[str, np.ndarray] = {"model.embed_tokens.weight": random.normal(size=(8, HIDDEN)).astype(np.float16)}
    for layer in range(LAYERS):
        for part, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
            name = f"model.layers.{layer}.mlp.{part}_proj.weight"
            tensors[name] = random.integers(-100, 100, shape).astype(np.int8)
            tensors[f"{name}_scale"] = random.uniform(0.01, 0.1, (shape[0], 1)).astype(np.float32)
    return tensors


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(build(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def apply(base: Path, *edits: dict, name: str = "out", **options) -> Path:
    manifest = write_manifest(base.parent / f"{name}.yaml", base, *edits)
    swsurgery.apply(manifest, output=base.parent / name, check="off", **options)
    return base.parent / name


def verify(checkpoint: Path, **options) -> bool:
    try:
        return swsurgery.verify(checkpoint, **options).ok
    except CheckpointError:  # a record that is not valid
        return False


def find_nearest(row: int, wanted: float) -> int:
    """The code from -128 to 127 nearest to `wanted` under the stored scale of a row of DOWN, ties toward zero."""
    scale = np.float64(build()[f"{DOWN}_scale"][row, 0])
    codes = sorted(range(-128, 128), key=lambda code: (abs(code * scale - wanted), abs(code)))
    return codes[0]


def differences(base: Path, patched: Path) -> dict[str, list[tuple[int, ...]]]:
    ours, theirs = load_file(patched / "model.safetensors"), load_file(base / "model.safetensors")
    assert ours.keys() == theirs.keys()
    found = {name: [tuple(map(int, at)) for at in np.argwhere(ours[name] != theirs[name])] for name in ours}
    return {name: places for name, places in found.items() if places}


@pytest.mark.parametrize(
    ("operation", "wanted"),
    [
        ({"op": "set", "value": 1.5}, lambda old: 1.5),
        ({"op": "set", "value": -0.33}, lambda old: -0.33),
        ({"op": "scale", "factor": 0.5}, lambda old: old * 0.5),
        ({"op": "zero"}, lambda old: 0.0),
    ],
)
def test_an_edit_stores_the_nearest_code_and_changes_nothing_else(base, operation, wanted):
    before = tree(base)
    old = float(build()[DOWN][2, 7]) * float(build()[f"{DOWN}_scale"][2, 0])
    patched = apply(base, {**operation, "layer": 1, "row": 2, "col": 7})
    assert load_file(patched / "model.safetensors")[DOWN][2, 7] == find_nearest(2, wanted(old))
    assert differences(base, patched) == {DOWN: [(2, 7)]}
    assert len(before["model.safetensors"]) == len(tree(patched)["model.safetensors"])
    assert verify(patched)
    swsurgery.revert(patched, base.parent / "back")
    assert tree(base.parent / "back") == before == tree(base)


def test_in_place_and_back(base):
    before = tree(base)
    digest = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    pinned = {"path": str(base), "sha256": {"model.safetensors": digest}}
    manifest = write_manifest(base.parent / "m.yaml", pinned, {"op": "zero", "layer": 0, "row": 1, "col": 3})
    swsurgery.apply(manifest, in_place=True, check="off")
    assert verify(base, manifest=manifest)
    swsurgery.apply(manifest, in_place=True, check="off")  # applied already
    swsurgery.revert(base)
    assert tree(base) == before


def test_the_plan_and_the_record_show_codes_and_the_error(base):
    edit = {"op": "set", "layer": 1, "row": 2, "col": 7, "value": 1.5}
    plan = swsurgery.plan(write_manifest(base.parent / "m.yaml", base, edit))
    [code] = plan.to_json()["codes"]
    scale, new = float(build()[f"{DOWN}_scale"][2, 0]), find_nearest(2, 1.5)
    assert (code["weight"], code["index"], code["wanted"]) == (DOWN, [2, 7], 1.5)
    assert code["old"] == float(build()[DOWN][2, 7]) * scale and code["new"] == new * scale
    assert code["error"] == abs(new * scale - 1.5) > 0
    assert code["new_code"] == new % 256 and code["elements"] == [{"tensor": DOWN, "index": [2, 7]}]
    record = json.loads((apply(base, edit) / "swsurgery.json").read_text())
    assert record["registry_version"] == 2
    assert record["codes"] == [{key: value for key, value in code.items() if key != "error"}]


def test_a_protected_element_keeps_its_code(base):
    edits = [{"op": "protect", "layer": 1, "row": 0, "col": 0}, {"op": "zero", "layer": 1, "row": 0, "col": 1}]
    patched = apply(base, *edits)
    assert verify(patched)
    manifest = write_manifest(base.parent / "again.yaml", patched, {"op": "zero", "layer": 1, "row": 0, "col": 0})
    with pytest.raises(PlanError, match="is protected by step 1") as caught:
        swsurgery.apply(manifest, output=base.parent / "again", check="off")
    assert len(caught.value.faults) == 1


def scale_row(row: int, factor: float = 2.0) -> dict:
    return {"op": "scale", "factor": factor, "raw": True, "tensor": f"{DOWN}_scale", "index": [row, 0]}


@pytest.mark.parametrize("in_place", [False, True])
def test_a_later_step_cannot_change_the_scale_of_a_protected_element(base, in_place):
    protect = {"op": "protect", "layer": 1, "row": 2, "col": 7}
    patched = apply(base, protect, {"op": "zero", "layer": 1, "row": 0, "col": 1})
    patched = apply(patched, {"op": "zero", "layer": 0, "row": 0, "col": 0}, name="second")
    before = tree(patched)
    manifest = write_manifest(base.parent / "m.yaml", patched, scale_row(3), scale_row(2))
    output = {"in_place": True} if in_place else {"output": base.parent / "third"}
    with pytest.raises(PlanError) as caught:
        swsurgery.apply(manifest, check="off", **output)
    [fault] = caught.value.faults
    old = float(build()[DOWN][2, 7]) * float(build()[f"{DOWN}_scale"][2, 0])
    assert "edits[1]: " in fault and f"{DOWN}[2, 7], which is protected by step 1 of the base's record" in fault
    assert f"would become {old * 2!r} instead of {old!r}" in fault
    assert tree(patched) == before and not (base.parent / "third").exists()
    third = apply(patched, scale_row(3), scale_row(2, 1.0), name="third")
    assert verify(third) and differences(patched, third) == {f"{DOWN}_scale": [(3, 0)]}


def test_a_protected_value_that_another_tool_changed_is_found(base, monkeypatch):
    patched = apply(base, {"op": "protect", "layer": 1, "row": 2, "col": 7})
    monkeypatch.setattr("swsurgery.editing.plan._check_protected_codes", lambda *_: ())
    changed = apply(patched, scale_row(2), name="changed")
    [finding] = swsurgery.verify(changed).findings
    assert finding.rule == "protected-changed" and "step 1 protects this quantised element" in finding.message
    assert (finding.tensor, finding.index) == (DOWN, (2, 7))


def test_a_number_of_the_layer_itself_needs_raw(base):
    scale = {"tensor": f"{DOWN}_scale", "index": [2, 0]}
    with pytest.raises(PlanError, match="set raw: true"):
        apply(base, {"op": "scale", "factor": 2.0, **scale})
    patched = apply(base, {"op": "scale", "factor": 2.0, "raw": True, **scale}, name="raw")
    assert differences(base, patched) == {f"{DOWN}_scale": [(2, 0)]}
    assert verify(patched)
    patched = apply(base, {"op": "set", "value": -7, "raw": True, "tensor": DOWN, "index": [2, 7]}, name="code")
    assert load_file(patched / "model.safetensors")[DOWN][2, 7] == -7


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([{"op": "set", "value": 1e6, "row": 2}], "outside the grid"),
        ([{"op": "set", "value": 1.5, "row": 2, "max_error": 1e-9}], "more than max_error"),
        ([{"op": "set", "value": 1.5, "row": 2, "expect": 77.0}], "expected 77"),
        ([{"op": "set", "value": 1.5, "row": 2, "expect": "0x40bc"}], "bits of a quantised element"),
        ([{"op": "set", "bits": "0x40", "row": 2}], "only a stored number has bits"),
        ([{"op": "zero", "row": 2}, {"op": "scale", "factor": 0.5, "row": 2}], "has two operations"),
        ([{"op": "zero", "row": HIDDEN}], "out of range"),
        ([{"op": "flip", "bit": 0, "row": 2}], "raw: true"),
    ],
)
def test_an_edit_that_does_not_fit_writes_nothing(base, edits, message):
    before = tree(base.parent)
    with pytest.raises(PlanError, match=message):
        apply(base, *({"layer": 1, "col": 7, **edit} for edit in edits))
    assert tree(base) == {k.removeprefix("base/"): v for k, v in before.items() if k.startswith("base/")}
    assert not (base.parent / "out").exists()


def test_a_code_and_the_scale_it_depends_on_are_not_edited_together(base):
    raw = {"op": "scale", "factor": 2.0, "raw": True, "tensor": f"{DOWN}_scale", "index": [2, 0]}
    with pytest.raises(PlanError, match="which this edit's value depends on"):
        apply(base, {"op": "zero", "layer": 1, "row": 2, "col": 7}, raw)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"op": "zero", "layer": 1, "row": 2, "raw": True}, "has raw: true, which changes one stored number"),
        ({"op": "scale", "factor": 2.0, "layer": 1, "row": 2, "max_error": 0.1}, "has max_error"),
        ({"op": "set", "value": 1, "tensor": DOWN, "index": [0, 0], "raw": True, "max_error": 0.1}, "has both"),
    ],
)
def test_options_that_contradict_each_other_are_refused(base, edit, message):
    with pytest.raises(ManifestError, match=message):
        swsurgery.plan(write_manifest(base.parent / "m.yaml", base, edit))


def forge(record: dict, **changes: object) -> None:
    record["codes"][0].update(changes)


@pytest.mark.parametrize(
    "forgery",
    [
        lambda record: forge(record, wanted=1.25),
        lambda record: forge(record, new=2.0),
        lambda record: forge(record, old_code=3),
        lambda record: forge(record, new_code=999),
        lambda record: forge(record, index=[2, 8]),
        lambda record: forge(record, index=[99, 8]),
        lambda record: forge(record, weight="model.embed_tokens.weight"),
        lambda record: forge(record, op="zero"),
        lambda record: forge(record, op="protect"),
        lambda record: forge(record, factor=2.0),
        lambda record: forge(record, elements=[{"tensor": DOWN, "index": [2, 8]}]),
        lambda record: forge(record, layout="gptq, 4 bits"),
        lambda record: forge(record, edit=1),
        lambda record: record["codes"].append(record["codes"][0]),
        lambda record: record.pop("codes"),
    ],
)
def test_a_record_that_says_something_else_is_refuted(base, forgery):
    patched = apply(base, {"op": "set", "layer": 1, "row": 2, "col": 7, "value": 1.5})
    record = json.loads((patched / "swsurgery.json").read_text())
    write_record(patched, record)
    assert verify(patched)
    forgery(record)
    write_record(patched, record)
    assert not verify(patched)


def write_record(patched: Path, record: dict) -> None:
    """Replace the record, and its digest in SHA256SUMS."""
    data = (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()
    sums = (patched / "SHA256SUMS").read_text()
    old, new = (hashlib.sha256(each).hexdigest() for each in ((patched / "swsurgery.json").read_bytes(), data))
    assert old in sums
    (patched / "swsurgery.json").write_bytes(data)
    (patched / "SHA256SUMS").write_text(sums.replace(old, new))


def test_the_record_is_refuted_without_the_manifest_too(base):
    patched = apply(base, {"op": "scale", "layer": 1, "row": 2, "col": 7, "factor": 0.5})
    record = json.loads((patched / "swsurgery.json").read_text())
    for change in (
        {"elements": [{"tensor": DOWN, "index": [2, 7]}, {"tensor": DOWN, "index": [2, 8]}]},
        {"factor": 1e308},
        {"layout": "another layout"},
    ):
        forged = copy.deepcopy(record)
        forge(forged, **change)
        write_record(patched, forged)
        found = swsurgery.verify(patched).findings
        assert any("edit of a quantised element is wrong" in finding.message for finding in found)


def test_an_element_that_the_record_lists_twice_and_a_wrong_number_of_its_edit_are_named(base):
    edits = [{"op": "zero", "layer": 0, "row": 0, "col": 0}, {"op": "zero", "layer": 1, "row": 2, "col": 7}]
    patched = apply(base, *edits)
    record = json.loads((patched / "swsurgery.json").read_text())
    assert verify(patched) and [code["edit"] for code in record["codes"]] == [0, 1]
    doubled, misnumbered = copy.deepcopy(record), copy.deepcopy(record)
    doubled["codes"].append(record["codes"][1])
    misnumbered["codes"][1]["edit"] = 0
    for forged, rule, words in (
        (doubled, "registry", "the record lists this element twice"),
        (misnumbered, "manifest", "edits[1] names this element, but the record says edits[0]"),
    ):
        write_record(patched, forged)
        [finding] = swsurgery.verify(patched).findings
        assert finding.rule == rule and words in finding.message
        assert (finding.tensor, finding.index) == (DOWN, (2, 7))


def test_a_product_beyond_float64_is_outside_the_grid(base):
    with pytest.raises(PlanError, match="inf is outside the grid"):
        apply(base, {"op": "scale", "layer": 1, "row": 2, "col": 7, "factor": 1.7e308})


def test_the_value_is_restored_from_a_plain_base(base, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    weights = {name: array.astype(np.float32) for name, array in build().items() if not name.endswith("_scale")}
    weights[DOWN][2, 7] = 0.71
    save_file(weights, plain / "model.safetensors")
    (plain / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "quantization_config"}))
    patched = apply(base, {"op": "restore", "layer": 1, "row": 2, "col": 7, "from": "./plain"})
    stored = load_file(patched / "model.safetensors")[DOWN][2, 7]
    assert stored == find_nearest(2, float(np.float32(0.71)))
    assert verify(patched)
