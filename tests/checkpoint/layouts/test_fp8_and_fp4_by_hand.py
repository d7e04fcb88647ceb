"""FP8 and FP4 in hand-written files: formats without a writer that can be installed, and each rule of refusal."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import Tensor, down, write_single

from swsurgery.checkpoint.layouts.cells import CannotTell
from swsurgery.checkpoint.layouts.find import WeightShapes, find_matrix, make_reader
from swsurgery.checkpoint.opening import open_checkpoint

W = down(0)
M = W.removesuffix(".weight")
STACK = "model.layers.0.mlp.experts.down_proj"
ROWS, COLS = 6, 64
chosen = np.random.default_rng(5)
BYTES = chosen.integers(0, 256, (ROWS, COLS // 2), np.uint8)
FP8 = chosen.integers(0, 0x7E, (ROWS, COLS), np.uint8)
FP8_VALUES = FP8.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
LOW_FIRST = np.stack((BYTES & 15, BYTES >> 4), axis=2).reshape(ROWS, COLS)
FP4_VALUES = LOW_FIRST.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
F32 = chosen.uniform(0.01, 1, (ROWS, COLS)).astype("<f4")
SMALL = chosen.integers(0x20, 0x60, (ROWS, COLS // 16), np.uint8)  # positive F8_E4M3
SMALL_VALUES = SMALL.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
POWERS = chosen.integers(100, 130, (ROWS, COLS // 32), np.uint8)
POWER_VALUES = np.exp2(POWERS.astype(np.float64) - 127)
ONE = np.array([0.7], "<f4")


def stored(dtype: str, array: np.ndarray) -> Tensor:
    return dtype, array.shape, array.tobytes()


def declare(method: str, **more: object) -> dict:
    return {"quantization_config": {"quant_method": method, **more}}


def declare_compressed(form: str, strategy: str, size: int, **more: object) -> dict:
    weights = {"num_bits": 4, "type": "float", "strategy": strategy, "group_size": size, **more}
    return declare("compressed-tensors", format=form, config_groups={"group_0": {"weights": weights}})


NVIDIA = {"weight": stored("U8", BYTES), "weight_scale": stored("F8_E4M3", SMALL), "weight_scale_2": stored("F32", ONE)}
PACKED = {
    "weight_packed": stored("U8", BYTES), "weight_scale": stored("F8_E4M3", SMALL),
    "weight_global_scale": stored("F32", ONE),
}  # fmt: skip
PACKED_CONFIG = declare_compressed("nvfp4-pack-quantized", "tensor_group", 16)
MX = {"weight_packed": stored("U8", BYTES), "weight_scale": stored("U8", POWERS)}
MX_CONFIG = declare_compressed("mxfp4-pack-quantized", "group", 32)
CODED = {"weight": stored("F8_E4M3", FP8)}
IN_BYTES = {"weight": stored("I8", BYTES), "scale": stored("F8_E8M0", POWERS)}
IN_BYTES_CONFIG = {**declare("fp8"), "expert_dtype": "fp4"}
DIVIDED = (SMALL_VALUES.astype(np.float32) / ONE).astype(np.float64)


def widen(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.repeat(np.repeat(grid, height, axis=0), width, axis=1)[:ROWS, :COLS].astype(np.float64)


READ = {
    "ModelOpt": (NVIDIA, declare("modelopt", quant_algo="NVFP4"), FP4_VALUES * widen(SMALL_VALUES * ONE[0], 1, 16)),
    "ModelOpt without a declaration": (NVIDIA, {}, FP4_VALUES * widen(SMALL_VALUES * ONE[0], 1, 16)),
    "NVFP4": (PACKED, PACKED_CONFIG, FP4_VALUES * widen(DIVIDED, 1, 16)),
    "MXFP4": (MX, MX_CONFIG, FP4_VALUES * widen(POWER_VALUES, 1, 32)),
    "MXFP4 with E8M0": (
        {**MX, "weight_scale": stored("F8_E8M0", POWERS)}, MX_CONFIG, FP4_VALUES * widen(POWER_VALUES, 1, 32),
    ),
    "FP4 in I8": (IN_BYTES, IN_BYTES_CONFIG, FP4_VALUES * widen(POWER_VALUES, 1, 32)),
    "FP4 in I8, float scales": (
        {"weight": stored("I8", BYTES), "weight_scale_inv": stored("F32", F32[:, :2].copy())}, IN_BYTES_CONFIG,
        FP4_VALUES * widen(F32[:, :2], 1, 32),
    ),
    "rows": ({**CODED, "weight_scale": stored("F32", F32[:, 0].copy())}, declare("fbgemm_fp8"),
             FP8_VALUES * widen(F32[:, :1], 1, COLS)),
    "uneven blocks": (
        {**CODED, "scale": stored("F32", F32[:2, :2].copy())}, declare("fp8", weight_block_size=[4, 40]),
        FP8_VALUES * widen(F32[:2, :2], 4, 40),
    ),
    "MXFP8 of ModelOpt": (
        {**CODED, "weight_scale": stored("U8", POWERS)}, declare("modelopt", quant_algo="MXFP8"),
        FP8_VALUES * widen(POWER_VALUES, 1, 32),
    ),
    "ComfyUI": ({**CODED, "scale_weight": stored("F32", ONE)}, {}, FP8_VALUES * float(ONE[0])),
    "int8": (
        {"weight": stored("I8", FP8), "weight_scale": stored("F32", F32[:, :1].copy())}, {},
        FP8.astype(np.float64) * widen(F32[:, :1], 1, COLS),
    ),
}  # fmt: skip
"""Name -> (tensors of the module, config.json, values)."""


def write(folder: Path, tensors: dict, config: dict, module: str = M):
    joined = {f"{module}.{last}": tensor for last, tensor in tensors.items() if tensor is not None}
    return open_checkpoint(write_single(folder, joined, config))


@pytest.mark.parametrize("name", READ)
def test_the_values_are_those_of_the_definition(name, tmp_path):
    tensors, config, values = READ[name]
    checkpoint = write(tmp_path, tensors, config)
    matrix = find_matrix(checkpoint, W)
    assert matrix is not None and matrix.shape == (ROWS, COLS) == WeightShapes(checkpoint)[W]
    assert np.array_equal(matrix.dequantise(0, ROWS), values)
    assert np.array_equal(matrix.dequantise(3, 5), values[3:5])
    assert matrix.dequantise(2, 2).shape == (0, COLS)
    read = make_reader(checkpoint)
    for row in range(ROWS):
        for col in (0, 1, 15, 16, 39, 40, COLS - 1):
            cell = matrix.find_cell((row, col))
            assert cell.values[cell.read_code(read)] == values[row, col]


def test_stacked_matrices_share_no_block(tmp_path):
    """Each of two matrices has ceil(3 / 2) = 2 rows of blocks."""
    codes, scales = FP8.reshape(2, 3, COLS), F32[:2, :4].copy().reshape(2, 2, 2)
    tensors = {STACK: stored("F8_E4M3", codes), f"{STACK}_scale_inv": stored("F32", scales)}
    config = declare("fp8", weight_block_size=[2, 32])
    matrix = find_matrix(open_checkpoint(write_single(tmp_path, tensors, config)), STACK)
    spread = np.repeat(np.repeat(scales.astype(np.float64), 2, axis=1)[:, :3], 32, axis=2)
    expected = (FP8_VALUES.reshape(2, 3, COLS) * spread).reshape(6, COLS)
    assert np.array_equal(matrix.dequantise(0, 6), expected)
    cell = matrix.find_cell((1, 2, 40))
    assert cell.scale == scales[1, 1, 1] and cell.values[codes[1, 2, 40]] == expected[5, 40]


REFUSED = {
    "ModelOpt of another method": ({**NVIDIA}, declare("quark"), "the method 'quark'"),
    "ModelOpt of another algorithm": ({**NVIDIA}, declare("modelopt", quant_algo="W4A8_AWQ"), "'W4A8_AWQ'"),
    "ModelOpt scaled before": (
        {**NVIDIA, "pre_quant_scale": stored("U8", BYTES[:1])}, declare("modelopt"), "pre_quant_scale",
    ),
    "scales that are padded": (
        {**NVIDIA, "weight_scale": stored("F8_E4M3", np.zeros((128, 4), np.uint8))}, declare("modelopt"),
        "does not fit",
    ),
    "two second scales": ({**NVIDIA, "weight_scale_2": stored("F32", F32[0, :2])}, declare("modelopt"), "exactly one"),
    "a second scale of BF16": (
        {**NVIDIA, "weight_scale_2": stored("BF16", BYTES[0, :2].view("<u2"))}, declare("modelopt"), "instead of F32",
    ),
    "a second scale of zero": (
        {**NVIDIA, "weight_scale_2": stored("F32", ONE * 0)}, declare("modelopt"), "not positive",
    ),
    "a second scale that is no number": (
        {**NVIDIA, "weight_scale_2": stored("F32", ONE * np.nan)}, declare("modelopt"), "not finite",
    ),
    "groups that are not whole": (
        {**NVIDIA, "weight": stored("U8", BYTES[:, :31].copy())}, declare("modelopt"), "groups of 16",
    ),
    "NVFP4 without a global scale": ({**PACKED, "weight_global_scale": None}, PACKED_CONFIG, "is not stored"),
    "NVFP4 with other groups": (
        {**PACKED}, declare_compressed("nvfp4-pack-quantized", "tensor_group", 32), "groups of 32",
    ),
    "NVFP4 that is not symmetric": (
        {**PACKED}, declare_compressed("nvfp4-pack-quantized", "tensor_group", 16, symmetric=False), "zero points",
    ),
    "NVFP4 with scales of bytes": (
        {**PACKED, "weight_scale": stored("U8", SMALL)}, PACKED_CONFIG, "instead of F8_E4M3",
    ),
    "MXFP4 with a global scale": ({**MX, "weight_global_scale": stored("F32", ONE)}, MX_CONFIG, "weight_global_scale"),
    "FP4 in I8 of another method": ({**IN_BYTES}, {**declare("gptq"), "expert_dtype": "fp4"}, "the method 'gptq'"),
    "FP4 in I8 without a scale": ({**IN_BYTES, "scale": None}, IN_BYTES_CONFIG, "0 scales"),
    "FP4 in I8 with other groups": (
        {**IN_BYTES, "scale": stored("F8_E8M0", POWERS[:, :1].copy())}, IN_BYTES_CONFIG, "groups of 32",
    ),
    "I8 that nothing calls FP4": ({**IN_BYTES}, declare("fp8"), "depends on"),
    "scale of an unknown method": ({**CODED, "scale": stored("F32", ONE)}, declare("new"), "depends on"),
    "scale beside another": (
        {**CODED, "scale": stored("F32", ONE), "scale_2": stored("F32", ONE)}, declare("fp8"), "scale_2",
    ),
    "several scales of ComfyUI": ({**CODED, "scale_weight": stored("F32", F32[:, :1])}, {}, "does not fit"),
    "ComfyUI's newer files": (
        {**CODED, "weight_scale": stored("F32", ONE), "comfy_quant": stored("U8", BYTES[0])}, {}, "comfy_quant",
    ),
    "bytes as scales": ({**CODED, "weight_scale": stored("U8", POWERS)}, declare("modelopt"), "what its bytes mean"),
    "integers as scales": (
        {**CODED, "weight_scale": stored("I32", np.ones((1,), "<i4"))}, declare("modelopt"), "not a floating-point",
    ),
    "blocks that do not divide": (
        {**CODED, "weight_scale_inv": stored("F32", F32[:4, :2].copy())}, declare("fp8"), "which block",
    ),
    "a scale of a method that has none": ({**CODED, "weight_scale": stored("F32", ONE)}, declare("gptq"), "'gptq'"),
    "codes that may be turned": ({**CODED, "weight_scale": stored("F32", F32[:, 0].copy())}, declare("eetq"), "'eetq'"),
    "two declarations": (
        {**CODED, "weight_scale": stored("F32", ONE)},
        {**declare("fp8"), "text_config": declare("fp8", weight_block_size=[4, 40])}, "in several places, which differ",
    ),
    "blocks of a size that nobody uses": (
        {**CODED, "weight_scale_inv": stored("F32", F32[:2, :2].copy())}, declare("fp8"), "which block",
    ),
}  # fmt: skip
"""Name -> (tensors of the module, config.json, a part of the reason)."""


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_decide_the_weight_is_refused(name, tmp_path):
    tensors, config, reason = REFUSED[name]
    with pytest.raises(CannotTell) as caught:
        find_matrix(write(tmp_path, tensors, config), W)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "scale", "data"), [
    ("MXFP4", "weight_scale", np.full((ROWS, COLS // 32), 255, np.uint8)),
    ("NVFP4", "weight_scale", np.full((ROWS, COLS // 16), 0x7F, np.uint8)),
    ("NVFP4", "weight_global_scale", np.array([1e-45], "<f4")),
    ("rows", "weight_scale", np.full(ROWS, np.inf, "<f4")),
])  # fmt: skip
def test_an_element_whose_scale_is_not_finite_has_no_value(name, scale, data, tmp_path):
    tensors, config, _ = READ[name]
    changed = {**tensors, scale: (tensors[scale][0], data.shape, data.tobytes())}
    matrix = find_matrix(write(tmp_path, changed, config), W)
    for read in (lambda: matrix.find_cell((1, 3)), lambda: matrix.dequantise(0, 2)):
        with pytest.raises(CannotTell, match="not finite"):
            read()


BLOCKS = BYTES.reshape(2, 3, 2, 16)
STACK_REFUSED = {
    "no scales": ({"_blocks": stored("U8", BLOCKS)}, "mxfp4", "_scales is not stored"),
    "no four axes": (
        {"_blocks": stored("U8", BYTES), "_scales": stored("U8", POWERS)}, "mxfp4", "does not store blocks of 32",
    ),
    "other blocks": (
        {"_blocks": stored("U8", BLOCKS.reshape(2, 3, 4, 8)), "_scales": stored("U8", POWERS.reshape(2, 3, 2))},
        "mxfp4", "does not store blocks of 32",
    ),
    "scales of another shape": (
        {"_blocks": stored("U8", BLOCKS), "_scales": stored("U8", POWERS.reshape(3, 2, 2))}, "mxfp4", "does not fit",
    ),
    "scales of floats": (
        {"_blocks": stored("U8", BLOCKS), "_scales": stored("F32", F32[:, :2].reshape(2, 3, 2).copy())}, "mxfp4",
        "instead of U8",
    ),
    "another method": (
        {"_blocks": stored("U8", BLOCKS), "_scales": stored("U8", POWERS.reshape(2, 3, 2))}, "new", "is quantised",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STACK_REFUSED)
def test_experts_that_do_not_fit_are_refused(name, tmp_path):
    tensors, method, reason = STACK_REFUSED[name]
    joined = {STACK + ending: tensor for ending, tensor in tensors.items()}
    with pytest.raises(CannotTell, match=reason):
        find_matrix(open_checkpoint(write_single(tmp_path, joined, declare(method))), STACK)
