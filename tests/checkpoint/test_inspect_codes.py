"""inspect --tensor --at on quantised matrices: the value of the element beside its code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import down, write_single

from swsurgery.cli import main

MODULE = down(0).removesuffix(".weight")
SIZES = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "checkpoint_format": "gptq_v2"}
CODES = np.random.default_rng(0).integers(0, 16, (16, 8))
"""Codes of a matrix [8, 16], transposed as GPTQ stores them."""


def ask(folder: Path, capsys, tensor: str, at: str) -> tuple[int, dict]:
    code = main(["inspect", str(folder), "--tensor", tensor, "--at", at, "--json"])
    out = capsys.readouterr().out
    return code, json.loads(out) if out else {}


def write_gptq(folder: Path, **quantisation: object) -> None:
    words = sum(CODES.reshape(2, 8, 8)[:, n].astype(np.uint32) << np.uint32(4 * n) for n in range(8))
    write_single(
        folder,
        {
            f"{MODULE}.qweight": ("I32", [2, 8], words.astype("<u4").tobytes()),
            f"{MODULE}.qzeros": ("I32", [1, 1], bytes([0x88] * 4)),
            f"{MODULE}.scales": ("F16", [1, 8], np.full(8, 0.5, "<f2").tobytes()),
            f"{MODULE}.g_idx": ("I32", [16], bytes(64)),
        },
        {**SIZES, "quantization_config": GPTQ | quantisation},
    )


def test_an_element_of_packed_codes_is_named_as_in_the_model(tmp_path, capsys):
    write_gptq(tmp_path)
    code, found = ask(tmp_path, capsys, down(0), "3,13")
    assert code == 0 and found["code"] == CODES[13, 3] and found["value"] == (CODES[13, 3] - 8) * 0.5
    assert (found["step"], found["shape"], found["dtype"]) == (0.5, [8, 16], "I32")
    assert (found["layer"], found["row"], found["col"]) == (0, 3, 13) and "gptq" in found["layout"].lower()
    raw = (tmp_path / "model.safetensors").read_bytes()[found["offset"]]
    assert raw >> 4 == CODES[13, 3]  # column 13 is in the upper half of byte 2 of its word


@pytest.mark.parametrize(("tensor", "at"), [(down(0), "8,0"), (down(0), "0"), (down(1), "0,0")])
def test_an_element_that_is_not_there(tensor, at, tmp_path, capsys):
    write_gptq(tmp_path)
    code, found = ask(tmp_path, capsys, tensor, at)
    assert code == 2 and list(found) == ["error", "schema"]


def test_a_layout_that_is_not_known_has_no_elements(tmp_path, capsys):
    write_gptq(tmp_path, checkpoint_format="marlin")
    code, found = ask(tmp_path, capsys, down(0), "0,0")
    assert code == 2 and "marlin" in found["error"]["what"]
    code, found = ask(tmp_path, capsys, f"{MODULE}.qweight", "0,0")
    assert code == 0 and "weight" not in found and found["note"]


def test_a_code_of_a_byte_has_the_value_of_its_element_beside_it(tmp_path, capsys):
    codes = np.arange(128, dtype=np.uint8).reshape(8, 16)  # F8_E4M3 without negative numbers; 0x38 is 1
    tensors = {down(0): ("F8_E4M3", [8, 16], codes.tobytes()), f"{MODULE}.weight_scale": ("F32", [1], b"\0\0\x40\x40")}
    write_single(tmp_path, tensors, {**SIZES, "quantization_config": {"quant_method": "fp8"}})
    code, found = ask(tmp_path, capsys, down(0), "3,8")
    assert code == 0 and (found["value"], found["bits"], found["code"]) == (1.0, "0x38", 0x38)
    assert (found["weight"], found["step"]) == (3.0, 3 / 8)
