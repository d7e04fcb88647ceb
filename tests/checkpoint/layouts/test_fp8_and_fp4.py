"""FP8 and FP4 weights of real matrices, against what transformers computes while it loads them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import down
from layout_files import compare, compare_super, read_weights, write_tensors
from quantised_files import LAYERS, SHARD, differ_once, only_with_model, set_nearest
from safetensors.torch import load_file
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from swsurgery.checkpoint import projections
from swsurgery.checkpoint.layouts.find import WeightShapes, make_reader
from swsurgery.checkpoint.opening import open_checkpoint

pytestmark = only_with_model
MIDDLES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
"""The numbers between the magnitudes of E2M1: 0, 0.5, 1, 1.5, 2, 3, 4 and 6."""


def quantise(weight: torch.Tensor, fmt: str) -> dict[str, torch.Tensor]:
    """Quantise a matrix with transformers in blocks of 64 x 128."""
    config = FineGrainedFP8Config(weight_block_size=(64, 128))
    config.scale_fmt = fmt
    made = Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"x.weight": weight})
    return {"weight": made["x.weight"], "weight_scale_inv": made["x.weight_scale_inv"]}


def dequantise(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)


def pack_fp4(weight: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (bytes with two codes, exponents of the scales) of a matrix with one power of two for `size` elements."""
    grouped = weight.float().unflatten(-1, (-1, size))
    exponents = torch.floor(torch.log2(grouped.abs().amax(-1).clamp(min=2**-100))) - 2
    scaled = grouped / torch.exp2(exponents)[..., None]
    codes = (torch.bucketize(scaled.abs(), MIDDLES) | (scaled < 0) << 3).flatten(-2).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


def write(folder, name: str, parts: dict[int, dict[str, torch.Tensor]], config: dict | None):
    tensors = {
        down(layer).removesuffix("weight") + last: tensor for layer in parts for last, tensor in parts[layer].items()
    }
    return write_tensors(folder / name, tensors, config)


FP8 = {"quant_method": "fp8", "weight_block_size": [64, 128]}


@pytest.mark.parametrize("kind", ["float", "ue8m0", "ue8m0 as bytes", "scale", "one scale", "scale_weight"])
def test_fp8_is_what_transformers_computes(kind, tmp_path):
    parts = {layer: quantise(w, "float" if kind in ("float", "one scale", "scale_weight") else "ue8m0")
             for layer, w in zip(LAYERS, read_weights().values(), strict=True)}  # fmt: skip
    expected, config = {}, FP8
    for layer, part in parts.items():
        scales = part["weight_scale_inv"]
        if kind == "ue8m0 as bytes":
            part["weight_scale_inv"] = scales.view(torch.uint8)
        if kind in ("one scale", "scale_weight"):
            scales = part["weight_scale_inv"] = scales.amax().reshape(1, 1)
        expected[layer] = dequantise(part["weight"], scales)
        if kind == "scale":
            part["scale"] = part.pop("weight_scale_inv")
        if kind == "scale_weight":
            part["scale_weight"], config = part.pop("weight_scale_inv").reshape(()), None
            part["scale_input"] = torch.ones(())
    folder = write(tmp_path, "made", parts, config)
    for layer in LAYERS:
        compare(folder, down(layer), expected[layer], torch.float32, torch.bfloat16)
    compare_super(folder, expected[11])


@pytest.mark.parametrize("name", ["scale", "weight_scale_inv"])
def test_fp4_in_bytes_is_what_transformers_computes(name, tmp_path):
    parts, expected = {}, {}
    for layer, weight in zip(LAYERS, read_weights().values(), strict=True):
        packed, exponents = pack_fp4(weight, 32)
        scales = exponents.view(torch.float8_e8m0fnu)
        parts[layer] = {"weight": packed.view(torch.int8), name: scales}
        expected[layer] = dequantise(parts[layer]["weight"], scales)
    folder = write(tmp_path, "made", parts, FP8)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "expert_dtype": "fp4"}))
    for layer in LAYERS:
        compare(folder, down(layer), expected[layer], torch.float32, torch.bfloat16)
    compare_super(folder, expected[11])
    weight = down(11)
    value = set_nearest(folder, tmp_path / "edited", weight, (507, 1229), 3.2)
    stored = load_file(tmp_path / "edited" / SHARD)
    after = dequantise(stored[weight], stored[weight.removesuffix("weight") + name])
    assert after[507, 1229] == value
    assert differ_once(after.float().numpy(), expected[11].float().numpy(), (507, 1229))


def test_experts_of_gpt_oss_are_what_transformers_computes(tmp_path):
    """Three experts, whose matrices are those of SmolLM2; the loaded weight is [expert, col, row]."""
    packed, exponents = pack_fp4(torch.stack(list(read_weights().values())), 32)
    blocks = packed.unflatten(-1, (-1, 16))
    expected = convert_moe_packed_tensors(blocks, exponents)
    weight = "model.layers.1.mlp.experts.down_proj"
    tensors = {f"{weight}_blocks": blocks, f"{weight}_scales": exponents, f"{weight}_bias": torch.zeros(3, 576)}
    tensors["model.layers.1.mlp.experts.gate_up_proj_blocks"] = blocks.clone()
    tensors["model.layers.1.mlp.experts.gate_up_proj_scales"] = exponents.clone()
    folder = write_tensors(tmp_path / "made", tensors, {"quant_method": "mxfp4"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt_oss"}))
    matrix = compare(folder, weight, expected, torch.float32, torch.bfloat16)
    compare(folder, "model.layers.1.mlp.experts.gate_up_proj", expected, torch.float32, torch.bfloat16)
    values = matrix.dequantise(0, 3 * 1536)
    assert np.array_equal(matrix.dequantise(1530, 3080), values[1530:3080])

    checkpoint = open_checkpoint(folder)
    found = projections.locate(checkpoint.config, WeightShapes(checkpoint), layer=1, row=507, col=1229, expert=1)
    assert found == (weight, (1, 1229, 507))
    cell = matrix.find_cell(found.index)
    assert cell.values[cell.read_code(make_reader(checkpoint))] == expected[1, 1229, 507]

    value = set_nearest(folder, tmp_path / "edited", weight, found.index, 3.2)
    stored = load_file(tmp_path / "edited" / SHARD)
    after = convert_moe_packed_tensors(stored[f"{weight}_blocks"], stored[f"{weight}_scales"])
    assert after[found.index] == value
    assert differ_once(after.float().numpy(), expected.float().numpy(), found.index)
