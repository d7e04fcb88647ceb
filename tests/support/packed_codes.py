"""Small matrices of packed 4-bit codes, as llm-compressor writes them. No test lives here."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np
from checkpoints import down

COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}}},
}  # fmt: skip
LAYOUT = "compressed-tensors pack-quantized, 4 bits"


def bf16(values: np.ndarray) -> bytes:
    return (np.asarray(values, "<f4").view("<u4") >> 16).astype("<u2").tobytes()


def pack(layer: int, codes: np.ndarray, scales: np.ndarray) -> Mapping[str, tuple]:
    """The tensors of a matrix of signed 4-bit codes [rows, cols] with scales [rows, groups]."""
    rows, cols = codes.shape
    padded = np.zeros((rows, -(-cols // 8) * 8), np.uint32)
    padded[:, :cols] = codes + 8
    words = sum(padded[:, n::8] << np.uint32(4 * n) for n in range(8)).astype("<u4")
    module = down(layer).removesuffix(".weight")
    return {
        f"{module}.weight_packed": ("I32", words.shape, words.tobytes()),
        f"{module}.weight_scale": ("BF16", (rows, scales.size // rows), bf16(scales)),
        f"{module}.weight_shape": ("I64", (2,), struct.pack("<qq", rows, cols)),
    }
