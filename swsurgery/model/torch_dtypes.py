"""Maps stored dtypes to torch dtypes.

A caller that supports only some of them defines the set of their names in its own module and says why.
"""

from __future__ import annotations

import torch

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
"""Maps the name of a safetensors dtype to the torch dtype with the same bits. Torch has no F4 or F6."""

STREAMED = frozenset({"F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL"})
"""Stored dtypes that can be read layer by layer. FP8 is excluded because its values need scales."""


def get_streamed_dtype(name: str) -> torch.dtype | None:
    """Return the torch dtype of a stored dtype; None if weights of that dtype cannot be read layer by layer."""
    return TORCH_DTYPES[name] if name in STREAMED else None
