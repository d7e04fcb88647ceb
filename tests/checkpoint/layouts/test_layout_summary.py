"""inspect on quantised checkpoints: a line for each layout, and the facts about one packed matrix."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from checkpoints import CONFIG, down, tensor, write_single

import swsurgery
from swsurgery.checkpoint.layouts import summary
from swsurgery.checkpoint.layouts.find import WeightShapes
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.cli import main

ROWS, COLS = 16, 32
SIZES = {**CONFIG, "hidden_size": ROWS, "intermediate_size": COLS}
WEIGHTS = {"type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
LAYOUT = "compressed-tensors pack-quantized, 4 bits"


def declare(**groups: tuple[int, str]) -> dict:
    listed = {
        name: {"targets": [target], "weights": {**WEIGHTS, "num_bits": bits}} for name, (bits, target) in groups.items()
    }
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": listed,
    }  # fmt: skip


def packed(name: str, bits: int = 4) -> dict[str, tuple]:
    module = name.removesuffix(".weight")
    return {
        f"{module}.weight_packed": tensor("I32", ROWS, COLS * bits // 32, seed=len(module)),
        f"{module}.weight_scale": tensor("BF16", ROWS, 1, one=True),
        f"{module}.weight_shape": ("I64", (2,), struct.pack("<qq", ROWS, COLS)),
    }


def gate(layer: int) -> str:
    return down(layer).replace("down", "gate")


def write(root: Path, tensors: Mapping[str, tuple], **groups: tuple[int, str]) -> Path:
    return write_single(root, tensors, SIZES | {"quantization_config": declare(**groups or {"all": (4, "Linear")})})


def ask(capsys, *words: object) -> dict:
    assert main(["inspect", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_line_has_the_layout_and_what_was_kept(tmp_path, capsys):
    tensors = packed(down(0)) | packed(down(1)) | packed(gate(0)) | {down(2): tensor("BF16", ROWS, COLS)}
    tensors |= {"lm_head.weight": tensor("BF16", 12, ROWS), "model.layers.0.norm.weight": tensor("BF16", ROWS)}
    root = write(tmp_path, tensors)
    found = ask(capsys, root)["quantised"]
    assert [(one["weights"], one["reason"]) for one in found["layouts"]] == [(3, None)]
    assert found["layouts"][0]["layout"].startswith(LAYOUT)
    assert found["high_precision"] == {"BF16": [down(2)]}
    (line,) = found["text"]
    assert line.startswith(f"3 weights: {LAYOUT}") and line.endswith("; 1 kept in BF16: model.layers.2.mlp.down_proj")
    assert main(["inspect", str(root)]) == 0
    assert line in capsys.readouterr().out.splitlines()
    assert swsurgery.inspect(root).layouts.to_lines() == [line]


def test_every_layout_has_a_line(tmp_path, capsys):
    tensors = packed(down(0)) | packed(down(1)) | packed(gate(0), 8) | packed(gate(1), 8)
    root = write(tmp_path, tensors, wide=(8, "re:.*gate_proj"), narrow=(4, "re:.*down_proj"))
    found = ask(capsys, root)["quantised"]
    counts = {one["layout"].split(", ")[1]: one["weights"] for one in found["layouts"]}
    assert counts == {"4 bits": 2, "8 bits": 2} and found["high_precision"] == {}
    assert len(found["text"]) == 2


def test_a_layout_that_cannot_be_decided_has_a_reason(tmp_path, capsys):
    root = write_single(tmp_path, packed(down(0)), SIZES | {"quantization_config": {"quant_method": "new"}})
    ((one,), (line,)) = (ask(capsys, root)["quantised"][key] for key in ("layouts", "text"))
    assert (one["layout"], one["weights"]) == (None, 1) and one["reason"]
    assert line == f"1 weight: cannot be read, because {one['reason']}"


def test_a_float_checkpoint_has_no_such_line(tmp_path, capsys):
    root = write_single(tmp_path, {down(0): tensor("BF16", ROWS, COLS)}, SIZES)
    assert ask(capsys, root)["quantised"] is None
    assert main(["inspect", str(root)]) == 0
    assert "kept in" not in capsys.readouterr().out


def test_many_matrices_in_high_precision_are_listed_by_role(tmp_path, capsys):
    plain = {down(n): tensor("BF16", ROWS, COLS) for n in range(9)}
    odd = {f"model.layers.{n}.odd_{n}.weight": tensor("F16", 4, 4) for n in range(7)}
    (line,) = ask(capsys, write(tmp_path, packed(gate(0)) | plain | odd))["quantised"]["text"]
    assert "; 9 kept in BF16: model.layers.*.mlp.down_proj (9)" in line
    assert "; 7 kept in F16: model.layers.0.odd_0, " in line and line.endswith("model.layers.4.odd_4, and 2 more")


def test_one_module_of_each_role_is_read(tmp_path, monkeypatch):
    tensors: dict[str, tuple] = {}
    for layer in range(50):
        tensors |= packed(down(layer)) | packed(gate(layer))
    root = write(tmp_path, tensors)
    asked: list[str] = []
    find = summary.find_matrix
    monkeypatch.setattr(summary, "find_matrix", lambda checkpoint, name: asked.append(name) or find(checkpoint, name))
    (count,) = open_checkpoint(root).layouts.counts
    assert count.weights == 100 and asked == [down(0), gate(0)]
    monkeypatch.setattr(summary, "MAX_EXAMINED", 1)
    first, rest = open_checkpoint(root).layouts.counts
    assert (first.weights, rest.weights, rest.layout) == (50, 50, None)


def test_the_names_of_all_weights_need_one_module_of_each_role(tmp_path, monkeypatch):
    tensors = {"model.norm.weight": tensor("BF16", ROWS)}
    for layer in range(50):
        tensors |= packed(down(layer))
    shapes = WeightShapes(open_checkpoint(write(tmp_path, tensors)))
    read = WeightShapes._read_shape
    asked: list[str] = []
    monkeypatch.setattr(WeightShapes, "_read_shape", lambda self, name: asked.append(name) or read(self, name))
    names = list(shapes)
    assert asked == [down(0)] and {down(n) for n in range(50)} <= set(names) and "model.norm.weight" in names
    assert not [name for name in names if name.endswith("_packed")]
    assert all(name in shapes for name in names) and shapes[down(49)] == (ROWS, COLS)


def test_a_packed_matrix_lists_its_tensors(tmp_path, capsys):
    root = write(tmp_path, packed(down(1)))
    found = ask(capsys, root, "--tensor", down(1))
    assert found["tensor"] == down(1) and found["shape"] == [ROWS, COLS] and found["layout"].startswith(LAYOUT)
    assert {part["tensor"]: (part["dtype"], part["shape"]) for part in found["stored"]} == {
        name: (dtype, list(shape)) for name, (dtype, shape, _) in packed(down(1)).items()
    }
    assert main(["inspect", str(root), "--tensor", down(1)]) == 0
    assert f"stored        {down(1)}_packed[16, 4] I32 model.safetensors" in capsys.readouterr().out
    assert ask(capsys, root, "--tensor", f"{down(1)}_packed")["dtype"] == "I32"


def test_an_element_lists_the_number_that_holds_its_code(tmp_path, capsys):
    tensors = packed(down(1))
    root = write(tmp_path, tensors)
    words = np.frombuffer(tensors[f"{down(1)}_packed"][2], "<u4").reshape(ROWS, COLS // 8)
    found = ask(capsys, root, "--tensor", down(1), "--at", "5,13")
    (number,) = found["stored"]
    assert number == {"tensor": f"{down(1)}_packed", "index": [5, 1], "bits": f"0x{words[5, 1]:08x}"}
    assert found["code"] == words[5, 1] >> 20 & 15 and found["scale"] == 1.0 and found["value"] == found["code"] - 8
    assert (found["layer"], found["row"], found["col"]) == (1, 5, 13)
    assert main(["inspect", str(root), "--tensor", down(1), "--at", "5,13"]) == 0
    assert f"stored        {down(1)}_packed[5, 1] {number['bits']}" in capsys.readouterr().out
    raw = ask(capsys, root, "--tensor", f"{down(1)}_packed", "--at", "5,1")
    assert raw["bits"] == number["bits"] and "layer" not in raw


@pytest.mark.parametrize("at", ["3,9", "15,31"])
def test_codes_under_the_name_of_their_weight_are_named_by_element(tmp_path, capsys, at):
    """ModelOpt stores two FP4 codes in a byte of `weight`, whose second axis is half as long as the weight's."""
    row, col = map(int, at.split(","))
    name, data = down(0), np.random.default_rng(3).integers(0, 256, (ROWS, COLS // 2), np.uint8)
    scales = {
        f"{name}_scale": ("F8_E4M3", (ROWS, 2), bytes([0x38] * ROWS * 2)),
        f"{name}_scale_2": ("F32", (), struct.pack("<f", 0.5)),
    }
    config = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
    root = write_single(tmp_path, {name: ("U8", (ROWS, COLS // 2), data.tobytes()), **scales}, SIZES | config)
    found = ask(capsys, root, "--tensor", name, "--at", at)
    code = int(data[row, col // 2]) >> 4 * (col % 2) & 15
    e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert found["code"] == code and found["value"] == (e2m1[code & 7] * (-1 if code & 8 else 1)) * 0.5
    assert found["stored"] == [{"tensor": name, "index": [row, col // 2], "bits": f"0x{data[row, col // 2]:02x}"}]
    assert ask(capsys, root, "--tensor", name)["shape"] == [ROWS, COLS // 2]
