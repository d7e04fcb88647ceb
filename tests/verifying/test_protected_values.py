"""verify --protected: protected scalars of a derived checkpoint are compared with what they should be."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from xml.etree import ElementTree

import ml_dtypes
import numpy as np
import pytest
from checkpoints import CONFIG, down, tensor, tree, write_llama, write_manifest, write_single
from packed_codes import COMPRESSED, LAYOUT, pack

import swsurgery
from swsurgery.cli import main
from swsurgery.errors import PlanError

PLACES = ((1, 2, 3), (2, 5, 9), (2, 0, 1))
PROTECT = [{"op": "protect", "layer": layer, "row": row, "col": col} for layer, row, col in PLACES]
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}


def make(folder: Path, values: dict[int, np.ndarray], dtype: str = "F32", extra: dict | None = None) -> Path:
    """A checkpoint whose down projections have these values, rounded to the dtype."""
    tensors = {down(n): (dtype, a.shape, a.astype(NUMPY[dtype]).tobytes()) for n, a in values.items()}
    return write_single(folder, {**tensors, **(extra or {})}, CONFIG)


def random(seed: int = 0) -> dict[int, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {n: generator.normal(0, 1, (6, 10)).astype("<f4") for n in range(3)}


def manifest(folder: Path, *edits: dict, **base: object) -> Path:
    return write_manifest(folder / "protect.json", base or {"path": "base"}, *edits)


@pytest.fixture
def room(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make(Path("base"), random())
    manifest(Path(), *PROTECT)
    return tmp_path


def states(*words: str, capsys) -> tuple[int, list[dict]]:
    capsys.readouterr()
    code = main(["verify", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)["protected_values"]["scalars"]


def test_a_derived_checkpoint_that_changed_everything_else_is_fine(room, capsys):
    values, other = random(), random(1)
    for layer, row, col in PLACES:
        other[layer][row, col] = values[layer][row, col]
    make(Path("merged"), other)
    before = tree(room)
    assert main(["verify", "merged", "--protected", "protect.json", "--base", "base"]) == 0
    assert "kept      3 of 3 scalars that protect.json protects" in capsys.readouterr().out
    assert tree(room) == before


@pytest.mark.parametrize("which", range(3))
def test_one_lost_scalar_is_one_finding_at_its_edit(room, capsys, which):
    values = random()
    layer, row, col = PLACES[which]
    values[layer][row, col] *= np.float32(1.0625)
    make(Path("merged"), values)
    assert main(["verify", "merged", "--protected", "protect.json", "--base", "base"]) == 1
    text = capsys.readouterr().out
    assert "protected-lost" in text and f"{down(layer)}[{row}, {col}]" in text and "x1.06" in text
    report = swsurgery.verify("merged", protected="protect.json", base="base")
    [finding] = report.findings
    assert (finding.rule, finding.tensor, finding.index) == ("protected-lost", down(layer), (row, col))
    lines = Path("protect.json").read_text().splitlines()
    loaded = swsurgery.load_manifest("protect.json")
    assert (finding.line, finding.column) == loaded.positions["edits", which] and finding.line <= len(lines)
    for tolerance, code in (("0.06", 1), ("0.07", 0)):
        words = ["verify", "merged", "--protected", "protect.json", "--base", "base", "--tolerance", tolerance]
        assert main(words) == code


@pytest.mark.parametrize("stored", ["F64", "F32", "F16", "BF16", "F8_E4M3"])
@pytest.mark.parametrize("original", ["F32", "BF16", "F16"])
def test_a_conversion_between_dtypes_is_no_loss(room, capsys, original, stored):
    values = {n: a.astype(NUMPY[original]).astype("<f4") for n, a in random().items()}
    make(Path("first"), values, original)
    make(Path("converted"), values, stored)
    code, found = states("converted", "--protected", "protect.json", "--base", "first", capsys=capsys)
    assert code == 0 and {scalar["state"] for scalar in found} == {"kept"}
    assert {scalar["origin"] for scalar in found} == {"base"} and {scalar["dtype"] for scalar in found} == {stored}
    moved = {n: a * np.float32(1.25) for n, a in values.items()}
    make(Path("moved"), moved, stored)
    code, found = states("moved", "--protected", "protect.json", "--base", "first", capsys=capsys)
    assert code == 1 and {scalar["state"] for scalar in found} == {"lost"}


@pytest.mark.parametrize("kind", ["value", "bits", "measured"])
def test_expect_is_the_value_and_comes_before_the_base(room, capsys, kind):
    value = float(random()[1][2, 3])
    bits = "0x" + struct.pack("<f", value)[::-1].hex()
    expect = {"value": value, "bits": bits, "measured": {"value": value, "dtype": "F32"}}[kind]
    manifest(Path(), {**PROTECT[0], "expect": expect})
    other = random(1)
    make(Path("other"), other)
    code, [found] = states("base", "--protected", "protect.json", "--base", "other", capsys=capsys)
    assert (code, found["origin"], found["expected"], found["stored"]) == (0, "expect", value, value)
    code, [found] = states("other", "--protected", "protect.json", capsys=capsys)
    assert (code, found["state"], found["stored"]) == (1, "lost", float(other[1][2, 3]))


def known_weight(folder: Path, value: float, dtype: str) -> Path:
    weight = np.ones((4096, 11008), NUMPY[dtype])
    weight[3968, 7003] = value
    config = CONFIG | {"hidden_size": 4096, "intermediate_size": 11008}
    return write_single(folder, {down(2): (dtype, weight.shape, weight.tobytes())}, config)


@pytest.mark.parametrize(("value", "code"), [(-1.9267578125, 0), (-1.9, 1), (0.0, 1), (1.9267578125, 1)])
def test_known_values_are_used_without_a_base(room, capsys, value, code):
    manifest(Path(), {"op": "protect", "known": "all"}, path="base", model="llama-7b")
    known_weight(Path("derived"), value, "F16")
    got, [found] = states("derived", "--protected", "protect.json", capsys=capsys)
    assert got == code and found["origin"] == "known" and found["expected"] == -1.9267578125
    base = known_weight(Path("own-base"), value, "BF16")
    got, [found] = states("derived", "--protected", "protect.json", "--base", str(base), capsys=capsys)
    assert got == 0 and found["origin"] == "base", "a base that is given comes before published values"


def test_known_all_leaves_out_what_another_edit_changes(room):
    weight = {"op": "zero", "layer": 2, "row": 3968, "col": 7003}
    manifest(Path(), weight, {"op": "protect", "known": "all"}, path="base", model="llama-7b")
    known_weight(Path("derived"), 0.0, "F16")
    with pytest.raises(PlanError, match="the manifest protects no scalar"):
        swsurgery.verify("derived", protected="protect.json")


@pytest.mark.parametrize("shift", [0, 20])
def test_the_nearest_scaled_code_is_the_value(room, capsys, shift):
    values = random()
    scale = np.float32(np.abs(values[1]).max() / 400)
    codes = (values[1] / scale).astype(ml_dtypes.float8_e4m3fn)
    raw = codes.view("u1").copy()
    raw[2, 3] -= shift
    extra = {down(1): ("F8_E4M3", (6, 10), raw.tobytes()), down(1) + "_scale_inv": ("F32", (1, 1), scale.tobytes())}
    make(Path("fp8"), {0: values[0], 2: values[2]}, extra=extra)
    manifest(Path(), PROTECT[0])
    code, [found] = states("fp8", "--protected", "protect.json", "--base", "base", capsys=capsys)
    assert found["dtype"] == "F8_E4M3" and found["state"] == ("lost" if shift == 20 else "kept")
    assert code == (shift == 20)


def packed(folder: Path, code: int, **config: object) -> Path:
    """A checkpoint whose down projections are packed codes with steps of 0.5 and have `code` at [2, 3]."""
    tensors = {}
    for layer in range(3):
        codes = np.full((6, 10), 1)
        codes[2, 3] = code
        tensors |= pack(layer, codes, np.full(6, 0.5))
    return write_single(folder, tensors, CONFIG | {"quantization_config": COMPRESSED | config})


@pytest.mark.parametrize(("code", "state"), [(5, "kept"), (4, "kept"), (6, "kept"), (3, "lost"), (-5, "lost")])
@pytest.mark.parametrize("place", [{"layer": 1, "row": 2, "col": 3}, {"tensor": down(1), "index": [2, 3]}])
def test_a_packed_weight_is_read_by_its_name(room, capsys, code, state, place):
    values = random()
    values[1][2, 3] = 2.5
    make(Path("plain"), values)
    packed(Path("packed"), code)
    manifest(Path(), {"op": "protect", **place}, path="plain")
    got, [found] = states("packed", "--protected", "protect.json", "--base", "plain", capsys=capsys)
    assert got == (state == "lost") and found["state"] == state
    assert found["layout"] == f"{LAYOUT}, one scale a row" and found["code"] == code + 8 and found["step"] == 0.5
    assert found["stored"] == code * 0.5 and found["dtype"] == "I32" and LAYOUT in found["message"]
    got, [found] = states("packed", "--protected", "protect.json", "--base", "packed", capsys=capsys)
    assert got == 0 and found["origin"] == "base" and found["expected"] == code * 0.5


@pytest.mark.parametrize(
    ("config", "edit", "reason"),
    [
        ({}, {"layer": 1, "row": 2, "col": 3, "expect": "0x4020"}, "expect names bits, but the weight is quantised"),
        ({}, {"tensor": down(1), "index": [6, 0], "expect": 2.5}, "out of range for shape [6, 10]"),
        ({"sparsity_config": {"format": "sparse-24"}}, {"tensor": down(1), "index": [2, 3], "expect": 2.5}, "sparse"),
    ],
)
def test_a_packed_weight_that_cannot_be_compared_is_unreadable(room, capsys, config, edit, reason):
    packed(Path("packed"), 5, **config)
    manifest(Path(), {"op": "protect", **edit}, path="packed")
    code, [found] = states("packed", "--protected", "protect.json", capsys=capsys)
    assert code == 1 and found["state"] == "unreadable" and reason in found["message"]


def test_what_cannot_be_read_is_a_finding(room, capsys):
    values = random()
    make(Path("short"), {0: values[0], 1: values[1]})
    assert main(["verify", "short", "--protected", "protect.json", "--base", "base"]) == 1
    text = capsys.readouterr().out
    assert text.count("protected-unreadable") >= 2 and "kept      1 of 3 scalars" in text
    report = swsurgery.verify("short", protected="protect.json", base="base")
    assert {finding.rule for finding in report.findings} == {"protected-unreadable"}
    assert all(finding.line for finding in report.findings)


def test_a_tensor_and_an_index(room, capsys):
    edits = [{"op": "protect", "tensor": down(1), "index": [2, 3]}, {"op": "protect", "tensor": "gone", "index": [0]}]
    manifest(Path(), *edits)
    words = ("base", "--protected", "protect.json", "--base", "base")
    with pytest.raises(PlanError, match="no value of gone"):
        swsurgery.verify("base", protected="protect.json", base="base")
    edits[1]["expect"] = 1.5
    manifest(Path(), *edits)
    code, found = states(*words, capsys=capsys)
    assert code == 1 and [scalar["state"] for scalar in found] == ["kept", "unreadable"]


def test_not_a_number_is_lost(room, capsys):
    values = random()
    values[1][2, 3] = np.nan
    values[2][5, 9] = np.inf
    make(Path("broken"), values)
    code, found = states(
        "broken", "--protected", "protect.json", "--base", "base", "--tolerance", "1000", capsys=capsys
    )
    assert code == 1 and [scalar["state"] for scalar in found] == ["lost", "lost", "kept"]


def test_a_record_is_proved_too(room, capsys):
    write_llama(Path("llama"))
    protect = write_manifest(Path("p.json"), Path("llama"), *PROTECT[:2])
    zero = {"op": "zero", "layer": 1, "row": 2, "col": 3}
    swsurgery.apply(write_manifest(Path("m.json"), Path("llama"), zero), output="patched", check="off")
    report = swsurgery.verify("patched", protected=protect, base="llama")
    assert {finding.rule for finding in report.findings} == {"protected-lost"} and report.record is not None
    assert report.record.proved


def test_every_format_reports_the_finding(room, capsys):
    values = random()
    values[2][5, 9] = 0
    make(Path("merged"), values)
    words = ["verify", "merged", "--protected", "protect.json", "--base", "base", "--format"]
    texts = {}
    for form in ("text", "json", "junit", "sarif", "github"):
        assert main([*words, form]) == 1
        texts[form] = capsys.readouterr().out
    assert "protected-lost" in texts["text"] and "::error" in texts["github"] and "protect.json" in texts["github"]
    [finding] = json.loads(texts["json"])["findings"]
    assert finding["rule"] == "protected-lost" and finding["manifest"] == "protect.json"
    cases = {case.get("name"): case for case in ElementTree.fromstring(texts["junit"]).iter("testcase")}
    assert cases["protected-lost"].find("failure") is not None
    assert cases["protected-unreadable"].find("failure") is None
    [result] = json.loads(texts["sarif"])["runs"][0]["results"]
    assert result["ruleId"] == "protected-lost"


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        (PROTECT[:1], "no value of model.layers.1.mlp.down_proj.weight[2, 3] is known (give --base, or expect"),
        ([{"op": "zero", "layer": 1, "row": 2, "col": 3}], "the manifest protects no scalar"),
        (
            [{"op": "protect", "layer": 1, "row": 2}],
            "edits[0]: the values of L1 row 2 are not known (give --base)",
        ),
        ([{"op": "protect", "known": "all"}], "no known super weights of this base"),
    ],
)
def test_what_is_no_question_is_one_line_and_exit_2(room, capsys, edits, said):
    manifest(Path(), *edits)
    before = tree(room)
    assert main(["verify", "base", "--protected", "protect.json"]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert tree(room) == before


def test_the_report_may_not_replace_the_manifest(room, capsys):
    words = ["verify", "base", "--protected", "protect.json", "--base", "base", "--output", "protect.json"]
    assert main(words) == 2 and "overwrite an input" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "much"])
def test_a_tolerance_is_a_number_from_0(room, capsys, value):
    assert main(["verify", "base", "--protected", "protect.json", "--base", "base", "--tolerance", value]) == 2


def test_a_tensor_of_integers_is_unreadable(room, capsys):
    make(Path("packed"), {0: random()[0]}, extra={down(1): tensor("I32", 6, 10)})
    manifest(Path(), PROTECT[0])
    code, [found] = states("packed", "--protected", "protect.json", "--base", "base", capsys=capsys)
    assert code == 1 and found["state"] == "unreadable"
