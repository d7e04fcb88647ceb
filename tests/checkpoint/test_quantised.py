"""Which stored numbers are weights: one checkpoint for each format, with the names that its writer stores, and beside
each rule a tensor that looks alike and is a plain weight."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import EMBED, HIDDEN, INNER, down, tensor, tree, write_index, write_manifest, write_shard, write_single

import swsurgery
from swsurgery.checkpoint import inspect
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.checkpoint.quantised import SCALES, Quantisation
from swsurgery.cli import main
from swsurgery.editing.check_options import CheckOptions
from swsurgery.errors import ArchitectureError, ModelError, PlanError
from swsurgery.scanning.blocks import Matrix
from swsurgery.sharing import export
from swsurgery.storage.dtypes import DTYPES

L = "model.layers.0.mlp.down_proj"
SELF = "model.layers.0.self_attn"
EXPERTS = "model.layers.0.mlp.experts"


def rule(tensors: Mapping[str, tuple], config: Mapping | None = None, files=(), metadata=()) -> Quantisation:
    """The rule for tensors that are given as name -> (dtype, *shape)."""
    headers = {n: SimpleNamespace(dtype=DTYPES[dtype], shape=shape) for n, (dtype, *shape) in tensors.items()}
    headers = {n: SimpleNamespace(dtype=h.dtype, shape=tuple(h.shape)) for n, h in headers.items()}
    return Quantisation(headers, config or {}, files, metadata)


def kinds(tensors: Mapping[str, tuple], *args, **named) -> dict[str, str]:
    found = rule(tensors, *args, **named)
    return {name: found.get_reading(name).kind for name in tensors}


def declared(method: str, **more: object) -> dict:
    return {"quantization_config": {"quant_method": method, **more}}


LISTED = {
    "tensor_names": '["a.weight"]',
    "a.weight": json.dumps({"_type": "Float8Tensor", "_data": {}, "_tensor_data_names": ["qdata", "scale"]}),
}

FORMATS: dict[str, tuple[dict[str, tuple], dict, dict[str, str]]] = {
    "GPTQ": (
        {"qweight": ("I32", 4, 8), "qzeros": ("I32", 1, 1), "scales": ("F16", 1, 8), "g_idx": ("I32", 32)},
        declared("gptq"), {},
    ),
    "AWQ": (
        {"qweight": ("I32", 32, 1), "qzeros": ("I32", 1, 1), "scales": ("F16", 1, 8)}, declared("awq"), {},
    ),
    "Marlin": (
        {"B": ("I32", 2, 16), "s": ("F16", 1, 8), "workspace": ("I32", 16)}, declared("marlin"),
        {"B": "unreadable", "workspace": "unreadable"},
    ),
    "Marlin that nothing declares": (
        {"B": ("I32", 2, 16), "s": ("F16", 1, 8), "bias": ("F16", 8)}, {}, {"B": "unreadable", "bias": "plain"},
    ),
    "compressed-tensors packed": (
        {"weight_packed": ("I32", 8, 4), "weight_scale": ("BF16", 8, 1), "weight_shape": ("I64", 2),
         "weight_zero_point": ("I32", 1, 1), "weight_g_idx": ("I32", 32)}, declared("compressed-tensors"), {},
    ),
    "compressed-tensors NVFP4": (
        {"weight_packed": ("U8", 8, 16), "weight_scale": ("F8_E4M3", 8, 2), "weight_global_scale": ("F32", 1),
         "input_global_scale": ("F32", 1)}, declared("compressed-tensors"), {},
    ),
    "ModelOpt NVFP4": (
        {"weight": ("U8", 8, 16), "weight_scale": ("F8_E4M3", 8, 2), "weight_scale_2": ("F32",),
         "input_scale": ("F32",), "pre_quant_scale": ("BF16", 32)}, declared("modelopt"), {"weight": "unreadable"},
    ),
    "ModelOpt fake-quantised": (
        {"weight": ("BF16", 8, 32), "weight_quantizer._amax": ("F32",), "input_quantizer._amax": ("F32",)},
        {}, {"weight": "unreadable"},
    ),
    "TensorRT-LLM": (
        {"weight": ("F8_E4M3", 8, 32), "weights_scaling_factor": ("F32", 1), "activation_scaling_factor": ("F32", 1)},
        {}, {"weight": "unreadable"},
    ),
    "bitsandbytes NF4": (
        {"weight": ("U8", 128, 1), "weight.absmax": ("U8", 4), "weight.quant_map": ("F32", 16),
         "weight.nested_absmax": ("F32", 1), "weight.nested_quant_map": ("F32", 256),
         "weight.quant_state.bitsandbytes__nf4": ("U8", 90)}, declared("bitsandbytes"), {"weight": "unreadable"},
    ),
    "bitsandbytes int8": (
        {"weight": ("I8", 8, 32), "SCB": ("F32", 8), "weight_format": ("U8",)},
        declared("bitsandbytes"), {"weight": "scaled"},
    ),
    "DeepSeek-V3": (
        {"weight": ("F8_E4M3", 8, 32), "weight_scale_inv": ("F32", 1, 1)}, declared("fp8"), {"weight": "scaled"},
    ),
    "FP8 of FBGEMM": (
        {"weight": ("F8_E4M3", 8, 32), "weight_scale": ("F32", 8, 1), "input_scale_ub": ("F32", 1)},
        declared("fbgemm_fp8"), {"weight": "scaled"},
    ),
    "static FP8": (
        {"weight": ("F8_E4M3", 8, 32), "weight_scale": ("F32",), "input_scale": ("F32",), "bias": ("BF16", 8)},
        declared("modelopt"), {"weight": "scaled", "bias": "plain"},
    ),
    "int8 of compressed-tensors": (
        {"weight": ("I8", 8, 32), "weight_scale": ("F32", 8, 1)}, declared("compressed-tensors"), {"weight": "scaled"},
    ),
    "DeepSeek-V4 FP8": (
        {"weight": ("F8_E4M3", 8, 32), "scale": ("F8_E8M0", 1, 1)}, declared("fp8"), {"weight": "unreadable"},
    ),
    "DeepSeek-V4 FP4, two in a byte": (
        {"weight": ("I8", 8, 16), "scale": ("F8_E8M0", 8, 1)}, {"expert_dtype": "fp4"}, {"weight": "unreadable"},
    ),
    "FP4 in a byte with scale_inv": (
        {"weight": ("I8", 8, 16), "weight_scale_inv": ("F32", 8, 1)}, declared("fp8"), {"weight": "unreadable"},
    ),
    "ComfyUI": (
        {"weight": ("F8_E4M3", 8, 32), "scale_weight": ("F32",), "scale_input": ("F32",)},
        {}, {"weight": "unreadable"},
    ),
    "ComfyUI, newer": (
        {"weight": ("F8_E4M3", 8, 32), "weight_scale": ("F32",), "comfy_quant": ("U8", 24)},
        {}, {"weight": "unreadable"},
    ),
    "Mistral": (
        {"weight": ("F8_E4M3", 8, 32), "qscale_weight": ("BF16",), "qscale_act": ("BF16",)},
        {}, {"weight": "unreadable"},
    ),
    "BitNet": (
        {"weight": ("U8", 2, 32), "weight_scale": ("BF16", 1)}, declared("bitnet"), {"weight": "unreadable"},
    ),
    "torchao": (
        {"_weight_qdata": ("F8_E4M3", 8, 32), "_weight_scale": ("F32", 8, 1), "_weight_zero_point": ("I8", 8, 1),
         "_weight_scale_and_zero": ("BF16", 1, 8, 2), "_weight_act_pre_scale": ("BF16", 32)}, {}, {},
    ),
    "torchao, first version": (
        {"weight:qdata": ("F8_E4M3", 8, 32), "weight:scale": ("F32", 8, 1), "bias:_data": ("BF16", 8)},
        {}, {"bias:_data": "plain"},
    ),
    "quanto": (
        {"weight._data": ("I8", 8, 32), "weight._scale": ("BF16", 8, 1), "input_scale": ("BF16",),
         "output_scale": ("BF16",)}, declared("quanto"), {},
    ),
    "EXL2": (
        {"q_weight": ("I32", 4, 8), "q_scale": ("I32", 1, 1), "q_scale_max": ("F16", 1), "q_groups": ("I16", 2),
         "q_perm": ("I16", 32), "q_invperm": ("I32", 32)}, {}, {},
    ),
    "EXL3": (
        {"trellis": ("I16", 2, 1, 64), "suh": ("F16", 32), "svh": ("F16", 16), "mcg": ("I32",), "mul1": ("I32",)},
        {}, {},
    ),
    "HQQ": (
        {"W_q": ("U8", 4, 32), "scale": ("F16", 8, 1), "zero": ("F16", 8, 1), "meta": ("F32", 1)}, {}, {},
    ),
    "HQQ, viewed as float": (
        {"W_q": ("F16", 4, 16), "scale": ("F16", 8, 1), "zero": ("F16", 8, 1), "nbits": ("I64",), "axis": ("I64",),
         "shape": ("I64", 2), "group_size": ("I64",), "bias": ("F16", 8)}, {}, {"bias": "plain"},
    ),
    "bitsandbytes NF4 in BF16 storage": (
        {"weight": ("BF16", 64, 1), "weight.absmax": ("F32", 4), "weight.quant_map": ("F32", 16),
         "weight.quant_state.bitsandbytes__nf4": ("U8", 90)}, declared("bitsandbytes"), {"weight": "unreadable"},
    ),
    "VPTQ": (
        {"indices": ("I32", 1, 8, 4), "res_indices": ("I32", 1, 8, 4), "outlier_indices": ("I16", 1, 8),
         "centroids.weight": ("BF16", 1, 64), "res_centroids.weight": ("BF16", 1, 64), "perm": ("I16", 32),
         "weight_scale": ("BF16", 32), "weight_bias": ("BF16", 32)}, {}, {},
    ),
    "QuIP#": (
        {"Qidxs": ("I64", 8, 4), "SU": ("F16", 32), "SV": ("F16", 8), "Wscale": ("F32",), "codebook_id": ("I64",)},
        {}, {},
    ),
    "AQLM": (
        {"codes": ("I8", 8, 4, 1), "codebooks": ("F16", 1, 256, 1, 8), "scales": ("F16", 8, 1, 1, 1)}, {}, {},
    ),
    "SpQR": (
        {"dense_weights": ("I64", 40), "row_offsets": ("I32", 9), "col_vals": ("I32", 4), "in_perm": ("I16", 32)},
        {}, {},
    ),
    "MLX": (
        {"weight": ("U32", 8, 4), "scales": ("BF16", 8, 1), "biases": ("BF16", 8, 1)},
        {"quantization": {"group_size": 32, "bits": 4}}, {"weight": "unreadable"},
    ),
    "a weight's part under another name": (
        {"weight": ("U8", 8, 16), "weight.__x": ("F32", 8)}, {}, {"weight": "unreadable"},
    ),
    "float weight with a scale": (
        {"weight": ("BF16", 8, 32), "weight_scale": ("BF16", 8, 1)}, {}, {"weight": "unreadable"},
    ),
}  # fmt: skip
"""Format -> (tensors of one linear layer, config.json, kinds that are not "internal")."""


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_recognised(name):
    layer, config, expected = FORMATS[name]
    tensors = {f"{L}.{last}": header for last, header in layer.items()}
    plain = {"model.norm.weight": ("BF16", 8), EMBED: ("BF16", 12, 8)}
    wanted = {f"{L}.{last}": expected.get(last, "internal") for last in layer}
    assert kinds({**tensors, **plain}, config) == {**wanted, **dict.fromkeys(plain, "plain")}


READ_BY_A_LAYOUT = {"DeepSeek-V4 FP8", "DeepSeek-V4 FP4, two in a byte", "ComfyUI"}
"""Formats whose weights are unreadable to this rule, and are read and edited through a layout."""


@pytest.mark.parametrize(
    "name", [n for n, (_, _, kinds) in FORMATS.items() if "scaled" not in kinds.values() and n not in READ_BY_A_LAYOUT]
)
def test_no_tensor_of_an_unreadable_format_can_be_edited(name, tmp_path):
    layer, config, expected = FORMATS[name]
    tensors = {f"{L}.{last}": tensor(dtype, *shape) for last, (dtype, *shape) in layer.items()}
    base = write_single(tmp_path / "base", {**tensors, "model.norm.weight": tensor("BF16", 8)}, config)
    edits = [
        {"op": "zero", "tensor": f"{L}.{last}", "index": [0] * len(shape)}
        for last, (_, *shape) in layer.items()
        if expected.get(last) != "plain"
    ]
    manifest = write_manifest(tmp_path / "m.json", base, *edits)
    before = tree(tmp_path)
    with pytest.raises(PlanError) as caught:
        swsurgery.apply(manifest, output=tmp_path / "out", check=CheckOptions("off"))
    assert tree(tmp_path) == before
    assert len(caught.value.faults) == len(edits)
    for fault in caught.value.faults:
        assert "quantised" in fault and "(edit the model before it is quantised" in fault
    norm = write_manifest(tmp_path / "n.json", base, {"op": "zero", "tensor": "model.norm.weight", "index": [1]})
    assert len(swsurgery.plan(norm).splices) == 1
    protect = write_manifest(tmp_path / "p.json", base, *({**e, "op": "protect"} for e in edits[:1]))
    assert len(swsurgery.plan(protect).protected) == 1


STACKED: dict[str, tuple[dict[str, tuple], dict, dict[str, str]]] = {
    "gpt-oss": (
        {f"{EXPERTS}.down_proj_blocks": ("U8", 2, 8, 1, 16), f"{EXPERTS}.down_proj_scales": ("U8", 2, 8, 1),
         f"{EXPERTS}.down_proj_bias": ("BF16", 2, 8)},
        declared("mxfp4"), {f"{EXPERTS}.down_proj_bias": "plain"},
    ),
    "gpt-oss as OpenAI stores it": (
        {"block.0.mlp.mlp2_weight.blocks": ("U8", 2, 8, 1, 16), "block.0.mlp.mlp2_weight.scales": ("U8", 2, 8, 1),
         "block.0.mlp.mlp2_bias": ("BF16", 2, 8), "block.0.mlp.norm.scale": ("BF16", 8)},
        {}, {"block.0.mlp.mlp2_bias": "plain", "block.0.mlp.norm.scale": "plain"},
    ),
    "FP8 experts of transformers": (
        {f"{EXPERTS}.down_proj": ("F8_E4M3", 2, 8, 32), f"{EXPERTS}.down_proj_scale_inv": ("F32", 2, 1, 1)},
        declared("fp8"), {f"{EXPERTS}.down_proj": "scaled"},
    ),
    "ModelOpt experts": (
        {f"{EXPERTS}.down_proj": ("U8", 2, 8, 16), f"{EXPERTS}.down_proj_weight_scale": ("F8_E4M3", 2, 8, 2),
         f"{EXPERTS}.down_proj_weight_scale_2": ("F32",), f"{EXPERTS}.down_proj_input_scale": ("F32",)},
        declared("modelopt"), {f"{EXPERTS}.down_proj": "unreadable"},
    ),
    "experts that nothing declares": (
        {f"{EXPERTS}.down_proj": ("F8_E4M3", 2, 8, 32), f"{EXPERTS}.down_proj_scale": ("F32", 2)},
        {}, {f"{EXPERTS}.down_proj": "scaled"},
    ),
    "KV cache": (
        {f"{SELF}.k_proj.weight": ("BF16", 8, 8), f"{SELF}.k_proj.k_scale": ("F32",), f"{SELF}.v_scale": ("F32", 1),
         f"{SELF}.kv_fake_quantizer.qscale_act": ("F32",), f"{SELF}.k_bmm_quantizer._amax": ("F32",)},
        {}, {f"{SELF}.k_proj.weight": "plain"},
    ),
    "the marker of ComfyUI": ({"scaled_fp8": ("F8_E4M3", 0), f"{L}.weight": ("F8_E4M3", 8, 32)},
                              {}, {f"{L}.weight": "unreadable"}),
}  # fmt: skip


@pytest.mark.parametrize("name", STACKED)
def test_what_is_stored_outside_a_linear_layer_is_recognised(name):
    tensors, config, expected = STACKED[name]
    assert kinds(tensors, config) == {name: expected.get(name, "internal") for name in tensors}


DECLARATIONS: dict[str, dict] = {
    "quantization_config": {"config": declared("fp8")},
    "in text_config": {"config": {"text_config": declared("fp8")}},
    "compression_config": {"config": {"compression_config": {"format": "naive-quantized"}}},
    "mlx": {"config": {"quantization": {"bits": 8, "group_size": 64}}},
    "chatglm": {"config": {"quantization_bit": 8}},
    "hf_quant_config.json": {"files": ["hf_quant_config.json"]},
    "quantize_config.json": {"files": ["quantize_config.json"]},
    "quant_config.json": {"files": ["quant_config.json"]},
    "torchao's metadata": {"metadata": [LISTED]},
}


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "U8", "I32", "U32", "I64"])
@pytest.mark.parametrize("where", DECLARATIONS)
def test_where_quantisation_is_declared_codes_without_a_scale_are_unreadable(where, dtype):
    tensors = {f"{L}.weight": (dtype, 8, 32), f"{L}.bias": ("BF16", 8), "model.norm.weight": ("BF16", 8)}
    found = rule(tensors, **DECLARATIONS[where])
    assert found.get_reading(f"{L}.weight").kind == "unreadable"
    assert str(found.declared) in found.explain_refusal(f"{L}.weight")
    assert found.explain_refusal("model.norm.weight") is None and found.explain_refusal(f"{L}.bias") is None


@pytest.mark.parametrize(
    "source",
    [
        {},
        {"config": {"quantization_config": None}},
        {"config": {"quantization_bit": 0, "text_config": {"quantization_config": {}}}},
        {"files": ["generation_config.json", "old/quantize_config.json"]},
        {
            "metadata": [
                {"format": "pt", "training": '{"_type": "run"}'},
                {"norm.weight": '{"_type": "Tensor"}', "tensor_names": '["norm.weight"]'},
            ]
        },
    ],
)
@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "U8", "I32"])
def test_without_a_declaration_a_weight_alone_is_plain(source, dtype):
    tensors = {f"{L}.weight": (dtype, 8, 32), f"{L}.bias": ("BF16", 8)}
    assert kinds(tensors, **source) == dict.fromkeys(tensors, "plain")


@pytest.mark.parametrize("other", ["scale", "anything", "weight_scale", "sub.module", "weight.__x"])
def test_with_anything_beside_it_it_is_not(other):
    tensors = {f"{L}.weight": ("F8_E4M3", 8, 32), f"{L}.{other}": ("F32", 1)}
    assert rule(tensors).get_reading(f"{L}.weight").kind == ("scaled" if other == "weight_scale" else "unreadable")


PLAIN_FLOATS = {
    "model.layers.0.input_layernorm.weight": ("BF16", 8),
    "model.layers.0.self_attn.q_proj.bias": ("BF16", 8),
    "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", 4),
    "model.layers.0.self_attn.sinks": ("BF16", 8),
    "model.layers.0.mlp.gate.weight": ("BF16", 2, 8),
    "model.layers.0.mlp.gate.e_score_correction_bias": ("F32", 2),
    "model.layers.0.mlp.router.scale": ("BF16", 8),
    "model.layers.0.mlp.router.per_expert_scale": ("BF16", 2),
    "model.layers.0.layer_scalar": ("BF16", 1),
    "model.layers.0.norm.scale": ("F32", 8),
    "model.layers.0.mixer.A_log": ("F32", 8),
    "model.layers.0.mixer.D": ("F32", 8),
    "model.layers.0.mixer.dt_bias": ("F32", 8),
    "vision.blocks.0.ls1.gamma": ("F32", 8),
    "vision.blocks.0.attn.relative_position_bias_table": ("F32", 9, 2),
    "vision.logit_scale": ("F32",),
    "vision.conv.parametrizations.weight.original0": ("F32", 1, 1, 3),
    "vision.conv.parametrizations.weight.original1": ("F32", 8, 8, 3),
    "masked_embedding.centroids.weight": ("BF16", 16, 8),
    "audio.quantizer.codebook.embed_sum": ("F32", 16, 8),
    "audio.quantizer.codebook.cluster_usage": ("F32", 16),
    "vision.bn.weight": ("F32", 8),
    "vision.bn.running_mean": ("F32", 8),
    "model.layers.0.a.weight": ("BF16", 8, 8),
    "model.layers.0.a.lora_A.weight": ("BF16", 2, 8),
    "model.layers.0.a.scale": ("BF16", 8),
    "head": ("F32", 8, 8),
    "head_scale": ("F32", 8),
}

PLAIN_INTEGERS = {
    "vision.embeddings.position_ids": ("I64", 1, 16),
    "vision.blocks.0.attn.relative_position_index": ("I64", 9, 9),
    "vision.bn.num_batches_tracked": ("I64",),
    "model.layers.0.mlp.gate.tid2eid": ("I32", 12, 2),
    "h.0.attn.causal_mask": ("U8", 1, 1, 4, 4),
}


def test_a_float_model_is_plain_from_end_to_end():
    tensors = {
        **PLAIN_FLOATS, **PLAIN_INTEGERS, "h.0.attn.bias": ("U8", 1, 1, 4, 4), "h.0.attn.masked_bias": ("F32",),
        "model.some.lookup": ("I64", 7), "model.flags": ("BOOL", 3),
    }  # fmt: skip
    assert kinds(tensors) == dict.fromkeys(tensors, "plain")


def test_what_was_left_unquantised_stays_plain_in_a_quantised_model():
    # In a quantised model the scale of `a` and that of `head` may be their quantiser's.
    unclear = ("model.layers.0.a.weight", "head")
    left = {n: h for n, h in PLAIN_FLOATS.items() if n not in unclear} | PLAIN_INTEGERS
    codes = {f"{L}.qweight": ("I32", 4, 8), f"{L}.scales": ("F16", 1, 8), "model.flags": ("BOOL", 3)}
    found = kinds({**left, **codes}, declared("gptq"))
    assert {n: k for n, k in found.items() if k != "plain"} == {f"{L}.qweight": "internal", f"{L}.scales": "internal"}


def test_a_router_of_fp8_with_its_correction_is_plain():
    gate = "model.layers.1.mlp.gate"
    tensors = {f"{gate}.weight": ("F8_E4M3", 8, 32), f"{gate}.e_score_correction_bias": ("F32", 8)}
    assert kinds(tensors) == dict.fromkeys(tensors, "plain")


def test_an_integer_buffer_of_a_float_model_is_edited(tmp_path):
    base = write_single(tmp_path / "base", {"model.lookup.weight": ("I64", (3,), bytes(range(24)))})
    edit = {"op": "set", "tensor": "model.lookup.weight", "index": [1], "value": 7}
    swsurgery.apply(write_manifest(tmp_path / "m.json", base, edit), output=tmp_path / "out", check=CheckOptions("off"))
    data = (tmp_path / "out" / "model.safetensors").read_bytes()[-24:]
    assert data == bytes(range(8)) + (7).to_bytes(8, "little") + bytes(range(16, 24))


def test_a_plain_fp8_weight_is_edited(tmp_path):
    base = write_single(tmp_path / "base", {down(0): ("F8_E4M3", (HIDDEN, INNER), bytes([0x38] * HIDDEN * INNER))})
    edit = {"op": "set", "layer": 0, "row": 1, "col": 2, "value": 2.0}
    swsurgery.apply(write_manifest(tmp_path / "m.json", base, edit), output=tmp_path / "out", check=CheckOptions("off"))
    data = (tmp_path / "out" / "model.safetensors").read_bytes()[-HIDDEN * INNER :]
    assert [i for i, byte in enumerate(data) if byte != 0x38] == [INNER + 2] and data[INNER + 2] == 0x40


def test_the_scale_may_be_in_another_shard(tmp_path):
    shards = {
        "model-00001-of-00002.safetensors": {down(0): tensor("F8_E4M3", HIDDEN, INNER)},
        "model-00002-of-00002.safetensors": {f"{L}.scale": tensor("F32", 1)},
    }
    for name, tensors in shards.items():
        write_shard(tmp_path / name, tensors)
    write_index(tmp_path, shards)
    assert open_checkpoint(tmp_path).quantisation.get_reading(down(0)).kind == "unreadable"


@pytest.mark.parametrize(
    "tensors",
    [{f"{L}.scale": tensor("F32", 1)}, {f"{L}.weight_scale": tensor("F32", 1)}],
    ids=["unknown scale", "known scale"],
)
def test_nothing_reads_codes_as_weights(tmp_path: Path, tensors, capsys):
    """Scanning, sweeping, inspecting, streaming and the checks of a loaded model ask the same rule."""
    from swsurgery.checkpoint.projections import find_down_projection
    from swsurgery.model.weight_plan import _locate_part
    from swsurgery.scanning.causes import Decomposer
    from swsurgery.scanning.factors import compute_scaled_values
    from swsurgery.storage.coordinate import Coordinate

    root = write_single(tmp_path, {down(0): tensor("F8_E4M3", HIDDEN, INNER), **tensors})
    (scale,) = tensors
    checkpoint = open_checkpoint(root)
    with pytest.raises(ArchitectureError, match=f"quantised: .* {scale}"):
        Matrix.of(checkpoint, down(0))
    with pytest.raises(ModelError, match=f"quantised: .* {scale}"):
        compute_scaled_values(checkpoint, [Coordinate(down(0), (0, 0))], [0.5])
    with pytest.raises(ModelError, match=f"quantised: .* {scale}"):
        _locate_part(down(0), 0, checkpoint)
    with pytest.raises(ModelError, match=f"quantised: .* {scale}"):
        Decomposer(checkpoint)._fetch_row(find_down_projection(checkpoint.config, checkpoint.shapes, 0), 1)
    assert scale in inspect.inspect(root, down(0), "1,2").to_json()["note"]
    assert main(["inspect", str(root), "--tensor", down(0), "--at", "1,2"]) == 0
    meaning = "its elements are multiplied by" if "weight_" in scale else "what its codes mean depends on"
    assert f"quantised: {meaning} {scale}" in capsys.readouterr().out


def test_diff_says_that_the_numbers_it_lists_are_no_weights(tmp_path, capsys):
    def side(name: str, seed: int) -> str:
        scale = {f"{L}.scale": tensor("F32", 1), "model.norm.weight": tensor("F32", 3, seed=seed)}
        return str(write_single(tmp_path / name, {down(0): tensor("F8_E4M3", HIDDEN, INNER, seed=seed), **scale}))

    a, b = side("a", 1), side("b", 2)
    assert main(["diff", a, b, "--json"]) == 1
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert note.startswith(f"{down(0)}: the numbers listed are no weights (quantised: ")
    assert main(["diff", a, b]) == 1
    assert note in capsys.readouterr().out


def test_a_model_whose_codes_transformers_would_take_for_weights_is_not_loaded(tmp_path):
    from tiny_checkpoint import write_pair

    from swsurgery import load_patched
    from swsurgery.errors import Unrunnable
    from swsurgery.model.load import open_model

    base = write_pair(tmp_path).base
    name = "model.layers.1.mlp.down_proj"
    path = base / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    stored = {
        n: (h["dtype"], tuple(h["shape"]), data[slice(*h["data_offsets"])])
        for n, h in header.items()
        if n != "__metadata__"
    }
    shape = stored[f"{name}.weight"][1]
    stored |= {f"{name}.weight": tensor("F8_E4M3", *shape), f"{name}.scale": tensor("F32", 1, one=True)}
    write_shard(path, stored)
    message = f"transformers would use its codes as weights: quantised: .* depends on {name}.scale: {name}.weight"
    with pytest.raises(Unrunnable, match=message):
        open_model(open_checkpoint(base), device="cpu", placement="whole")
    with pytest.raises(ModelError, match=message):
        open_model(open_checkpoint(base), device="cpu", placement="streamed")
    norm = {"op": "zero", "tensor": "model.norm.weight", "index": [0]}
    with pytest.raises(Unrunnable, match=message):
        load_patched(write_manifest(tmp_path / "m.json", base, norm), base)
    del stored[f"{name}.scale"]
    write_shard(path, stored)
    assert open_model(open_checkpoint(base), device="cpu", placement="whole")


def test_inspect_says_nothing_of_a_plain_weight(tmp_path):
    root = write_single(tmp_path, {down(0): tensor("F8_E4M3", HIDDEN, INNER)})
    assert "note" not in inspect.inspect(root, down(0), "1,2").to_json()


def test_an_old_record_of_edited_codes_makes_no_adapter(tmp_path, monkeypatch):
    """Version 0.1.0 edited codes with a scale of an unknown name, and their difference is no difference of weights."""
    weight = ("F8_E4M3", (HIDDEN, INNER), bytes([0x38] * HIDDEN * INNER))
    base = write_single(tmp_path / "base", {down(0): weight, f"{L}.scale": tensor("F32", 1)})
    manifest = write_manifest(tmp_path / "m.json", base, {"op": "zero", "layer": 0, "row": 1, "col": 2})
    with monkeypatch.context() as old:
        old.setattr(Quantisation, "explain_refusal", lambda self, name: None)
        old.setattr(Quantisation, "has_codes", False)
        swsurgery.apply(manifest, output=tmp_path / "out", check=CheckOptions("off"))
    with pytest.raises(
        PlanError, match=rf"LoRA adapter cannot represent this edit: {L}.weight\[1, 2\] is not a weight"
    ):
        export.export(tmp_path / "out", tmp_path / "adapter", format="peft")
    assert export.export(tmp_path / "out", tmp_path / "patch.safetensors", format="sparse").scalars == 1
    assert main(["verify", str(tmp_path / "out"), "--quiet"]) == 0
    assert main(["revert", str(tmp_path / "out"), "-o", str(tmp_path / "back"), "--quiet"]) == 0
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_each_known_scale_format_is_read(tmp_path):
    """A scale that is added to the table needs a layer in FORMATS that is read through it."""
    read = {
        rule({f"{L}.{n}": h for n, h in layer.items()}, config).get_reading(f"{L}.weight").scale
        for layer, config, found in FORMATS.values()
        if found.get("weight") == "scaled"
    }
    for ending, _ in SCALES:
        assert any(scale.removeprefix(f"{L}.weight").removeprefix(L) == ending for scale in read), ending
