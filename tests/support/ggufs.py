"""GGUF files written by the package gguf, and blocks of every type with random codes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.layouts.find import find_matrix
from swsurgery.checkpoint.layouts.gguf import GgufMatrix
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.storage.folder import SingleFile

TYPES = [kind for kind in gguf.GGMLQuantizationType if kind in gguf.quants._type_traits and kind.name != "BF16"]
"""The types with blocks that the package can dequantise."""

SCALES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)},
}
"""Places of the float16 scales in a block. The others have scales of 8 bits, or of bits that are spread (IQ1_M)."""


def write_gguf(path: Path, tensors: Mapping[str, tuple[np.ndarray, gguf.GGMLQuantizationType]], **sizes: int) -> Path:
    """Write a file of the architecture llama with tensors that are quantised already (bytes, type)."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, size in sizes.items():
        writer.add_uint32(f"llama.{key}", size)
    writer.add_token_list(["a", "bc", ""])
    writer.add_array("llama.some_floats", [0.5, 1.5])
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make_blocks(kind: gguf.GGMLQuantizationType, count: int, seed: int = 0) -> np.ndarray:
    """Random bytes as blocks [count, bytes of a block], in which the scales are ordinary numbers."""
    chance = np.random.default_rng(seed)
    blocks = chance.integers(0, 256, (count, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    for place in SCALES.get(kind.name, ()):
        scales = chance.uniform(0.001, 0.1, (count, 1)).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8)
    if kind.name == "MXFP4":
        blocks[:, 0] = chance.integers(100, 140, count)
    if kind.name == "IQ1_M":  # the upper four bits of the four words are the scale: 0x2c00 is 0.0625
        blocks[:, 48:56].view(np.uint16)[:] &= 0x0FFF
        blocks[:, 48:56].view(np.uint16)[:] |= np.array([0x0000, 0x0000, 0xC000, 0x2000], np.uint16)
    return blocks


def open_file(path: Path) -> Checkpoint:
    """Open one GGUF file as a checkpoint."""
    return open_checkpoint(SingleFile.find(path), gguf=True)


def open_matrix(path: Path, name: str) -> GgufMatrix:
    """Open a matrix of a GGUF file."""
    matrix = find_matrix(open_file(path), name)
    assert isinstance(matrix, GgufMatrix)
    return matrix
