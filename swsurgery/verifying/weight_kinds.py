"""Decide from names, shapes and dtypes which stored tensors are trained matrices, and which contain no numbers.

In a trained matrix the values differ, and two layers have different matrices. Norms, biases, masks, scales, zero points
and tables of positions are often constant or the same in every layer, so the rules about values leave them out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.storage.shard import TensorInfo

SMALLEST_MATRIX = 16
"""Minimum number of stored elements of a trained matrix. Smaller ones may have equal values by chance."""

_PACKED = "qweight|weight_packed|W_q|q_weight|trellis|dense_weights|_weight_qdata"
_MATRIX = re.compile(rf"(\w+_)?(weight|proj|blocks|kernel)|w\d+|{_PACKED}")
"""The pattern of last parts of names of matrices and of packed matrices."""

_CODES = re.compile(rf"{_PACKED}|(\w+_)?blocks")
"""The pattern of last parts of names of packed codes."""

_NORM = re.compile(r"norm|(^|[._])ln(_|\d|\.|$)", re.IGNORECASE)
"""The pattern of names of norms. Some have one row for each attention head, so their shape is that of a matrix."""

_SHARED = re.compile(r"embed|wte|wpe|head|position|(^|[._])rotary", re.IGNORECASE)
"""The pattern of names of embeddings and heads. Layers that predict further tokens store copies of them."""

_NUMBER = re.compile(r"(?:^|\.)\d+(?:\.|$)")
"""The pattern of the number of a layer or an expert in a name."""

_BUFFER = re.compile(r"(\w+_)?(mask|masked_bias|inv_freq|cached)")
"""The pattern of last parts of names of constants that loaders compute again. Masks use very large numbers."""

_SHARED_BY_CONFIG = {
    "tie_encoder_decoder": re.compile(r"(^|\.)(encoder|decoder)\."),
    "decoder_bbox_embed_share": re.compile(r"bbox_embed\."),
    "num_mem_blocks": re.compile(r"(^|\.)shared_transformer\."),
}
"""Keys of config.json that make layers share matrices, with the pattern of the names of these matrices."""


def explain_unexamined(checkpoint: Checkpoint, info: TensorInfo) -> str | None:
    """Explain why the elements of a tensor are not examined as numbers; None if they are."""
    if info.dtype.bits % 8:
        return f"{info.dtype.name} {info.dtype.refusal}"
    if info.dtype.kind == "float" and info.dtype.bits > 8 and _stores_codes(checkpoint, info.name):
        return f"stores packed codes in {info.dtype.name} elements"
    return None


def is_trained_matrix(checkpoint: Checkpoint, info: TensorInfo) -> bool:
    """Return True if a tensor is a matrix of weights, or the packed codes of one, so that its values should differ."""
    last = info.name.rpartition(".")[2]
    if info.size * 8 // info.dtype.bits < SMALLEST_MATRIX or not _MATRIX.fullmatch(last) or _NORM.search(info.name):
        return False
    kind = checkpoint.quantisation.get_reading(info.name).kind
    if kind == "internal" and not _CODES.fullmatch(last):
        return False
    # bitsandbytes stores the codes of a matrix as one column.
    return sum(size > 1 for size in info.shape) > 1 or (kind == "unreadable" and info.dtype.kind == "uint")


def is_layer_matrix(checkpoint: Checkpoint, info: TensorInfo) -> bool:
    """Return True if a tensor is a trained matrix of a numbered layer or expert, of which no copy should exist."""
    numbered = _NUMBER.search(info.name) is not None and not _SHARED.search(info.name)
    return numbered and is_trained_matrix(checkpoint, info)


def is_plain_weight(checkpoint: Checkpoint, info: TensorInfo) -> bool:
    """Return True if the floating-point numbers of a tensor are weights, which loaders may convert to float16."""
    buffer = _BUFFER.fullmatch(info.name.rpartition(".")[2])
    return buffer is None and checkpoint.quantisation.get_reading(info.name).kind == "plain"


def may_be_shared(config: Mapping[str, object], name: str, other: str) -> bool:
    """Return True if config.json explains that two matrices are the same parameter, stored twice."""
    return any(
        config.get(key) and pattern.search(name) and pattern.search(other) for key, pattern in _SHARED_BY_CONFIG.items()
    )


def _stores_codes(checkpoint: Checkpoint, name: str) -> bool:
    return bool(_CODES.fullmatch(name.rpartition(".")[2])) or f"{name}.absmax" in checkpoint.shapes
