"""List the types of tensors in GGUF files: the dtypes of `storage.dtypes`, and types that store blocks of elements.

Source: `ggml_type` and the structures `block_*` of llama.cpp (ggml/include/ggml.h, ggml/src/ggml-common.h). Must not
depend on the package `gguf`; a test compares the table with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from swsurgery.storage.dtypes import DTYPES, Dtype


@dataclass(frozen=True)
class BlockDtype(Dtype):
    """A GGML type that stores a block of consecutive elements and their common scales in `block_size` bytes.

    `block` is the number of elements in a block. `bits` is the average width of one element, rounded up, which is never
    a multiple of 8.
    """

    block: int = field(kw_only=True)
    block_size: int = field(kw_only=True)


def _make_block(name: str, block: int, block_size: int) -> BlockDtype:
    refusal = "stores elements in blocks that share scales, so no element has bytes of its own"
    return BlockDtype(name, -(-8 * block_size // block), "opaque", refusal, block=block, block_size=block_size)


_BLOCKS = (
    (2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20), (6, "Q5_0", 32, 22), (7, "Q5_1", 32, 24), (8, "Q8_0", 32, 34),
    (9, "Q8_1", 32, 40), (10, "Q2_K", 256, 84), (11, "Q3_K", 256, 110), (12, "Q4_K", 256, 144), (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210), (15, "Q8_K", 256, 292), (16, "IQ2_XXS", 256, 66), (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98), (19, "IQ1_S", 256, 50), (20, "IQ4_NL", 32, 18), (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82), (23, "IQ4_XS", 256, 136), (29, "IQ1_M", 256, 56), (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66), (39, "MXFP4", 32, 17), (40, "NVFP4", 64, 36), (41, "Q1_0", 128, 18),
)  # fmt: skip
"""Number, name, elements in a block and bytes of a block of each type that stores blocks."""

_PLAIN = ((0, "F32"), (1, "F16"), (24, "I8"), (25, "I16"), (26, "I32"), (27, "I64"), (28, "F64"), (30, "BF16"))
"""Number and name of each type that stores every element in bytes of its own."""

GGML_TYPES: dict[int, Dtype] = {
    **{number: DTYPES[name] for number, name in _PLAIN},
    **{number: _make_block(name, block, size) for number, name, block, size in _BLOCKS},
}
"""The types by the number that a GGUF file stores. Numbers that llama.cpp no longer reads are left out."""
