"""Read 4-bit weights of bitsandbytes (NF4 and FP4), with plain or quantised scales.

Two codes share a byte of `weight`, the first one in the high bits. `weight.absmax` contains the scale of each block of
consecutive elements, and `weight.quant_state.bitsandbytes__nf4` the shape and the block size as JSON. With "double
quantisation", `weight.absmax` contains codes of scales. Their table is `weight.nested_quant_map`, and the scale of each
block of them is in `weight.nested_absmax`. Source: bitsandbytes 0.50, functional.py (QuantState, dequantize_4bit).
LLM.int8 is in scaled.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from swsurgery.checkpoint.layouts.cells import BitField, CannotTell, Cell
from swsurgery.checkpoint.layouts.codes import unpack_nibbles
from swsurgery.checkpoint.layouts.module import ModuleTensor, QuantisedModule
from swsurgery.errors import CheckpointError
from swsurgery.storage.arrays import Doubles, Singles
from swsurgery.storage.strict_json import parse_json

_FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)

TABLES = {
    "nf4": np.array(
        [
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
            -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
            0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
            0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ],
        np.float32,
    ),
    "fp4": np.concatenate([_FP4, -_FP4]),
}  # fmt: skip
"""The float32 values of the 16 codes of each type, before multiplication by the scale."""

_ENDINGS = (
    ".weight", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map",
    ".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4",
)  # fmt: skip
"""Endings of the names of all tensors of a module except its bias."""

_BLOCK_SIZES = frozenset({32, 64, 128, 256, 512, 1024, 2048, 4096})
_MAX_STATE = 4096
"""Maximum size of the JSON in a tensor, in bytes. bitsandbytes writes about 200."""

_PLAIN_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}


@dataclass(frozen=True)
class NestedScales:
    """Scales that are stored as codes: table[code] * scale of the code's block + offset, each step in float32."""

    table: Singles
    scales: ModuleTensor
    block: int
    offset: np.float32


@dataclass(frozen=True)
class NormalFloatMatrix:
    """A matrix of NF4 or FP4 codes. Each `block` consecutive elements share a scale."""

    weight: str
    layout: str
    shape: tuple[int, ...]
    codes: ModuleTensor
    scales: ModuleTensor
    block: int
    table: Singles
    nested: NestedScales | None

    def find_cell(self, index: tuple[int, ...]) -> Cell:
        at = index[0] * self.shape[1] + index[1]
        scale = float(self._read_scales(at // self.block, at // self.block + 1)[0])
        start = at // 2 * 8 + (0 if at % 2 else 4)
        return Cell((BitField(self.codes.name, start, 4),), [float(v) * scale for v in self.table], scale)

    def dequantise(self, begin: int, end: int) -> Doubles:
        first, last = begin * self.shape[1], end * self.shape[1]
        data = self.codes.read(self.codes.name, first // 2, -(-last // 2) - first // 2)
        codes = unpack_nibbles(data, low_first=False)[first % 2 :][: last - first]
        block = first // self.block
        scales = self._read_scales(block, -(-last // self.block)).repeat(self.block)
        scales = scales[first - block * self.block :][: last - first]
        values: Doubles = self.table.astype(np.float64)[codes] * scales
        return values.reshape(end - begin, self.shape[1])

    def _read_scales(self, begin: int, end: int) -> Doubles:
        """Read the scales of the blocks `begin` to `end` (excluded). Raises CannotTell if one is not finite."""
        if self.nested is None:
            scales = self.scales.read_numbers(begin, end)
        else:
            scales = _compute_nested(self.nested, self.scales, begin, end)
        if not np.isfinite(scales).all():
            raise CannotTell(f"{self.scales.name} contains a scale that is not finite")
        return scales


def _compute_nested(nested: NestedScales, codes: ModuleTensor, begin: int, end: int) -> Doubles:
    """Compute the scales `begin` to `end` (excluded) in float32, as bitsandbytes does."""
    if begin == end:
        return np.empty(0)
    first = begin // nested.block
    scales = nested.scales.read_numbers(first, -(-end // nested.block)).astype(np.float32).repeat(nested.block)
    with np.errstate(invalid="ignore", over="ignore"):  # the caller refuses what is not finite
        found = nested.table[codes.read_words(begin, end)] * scales[begin - first * nested.block :][: end - begin]
        return (found + nested.offset).astype(np.float64)


def find_bitsandbytes(module: QuantisedModule) -> NormalFloatMatrix | None:
    """Recognise a 4-bit weight of a checkpoint whose config declares the method "bitsandbytes".

    Raises CannotTell if the tensors, the JSON and the config do not fit each other.
    """
    config = module.quantisation
    declared = module.method == "bitsandbytes" or (not module.method and config.get("load_in_4bit") is True)
    kinds = [kind for kind in TABLES if module.find(f".weight.quant_state.bitsandbytes__{kind}") is not None]
    if declared and any(module.find(f".quant_state.bitsandbytes__{kind}") is not None for kind in TABLES):
        raise CannotTell(f"{module.weight} stores several experts in 4 bits, and only matrices are read")
    if not declared or not kinds:
        return None
    if len(kinds) > 1 or config.get("bnb_4bit_quant_type", kinds[0]) != kinds[0]:
        raise CannotTell(f"{module.weight} is stored as {' and as '.join(kinds)}, which config.json contradicts")
    kind = kinds[0]
    state = _read_state(module.require(f".weight.quant_state.bitsandbytes__{kind}"), kind)
    module.refuse_others(_ENDINGS)
    codes, scales, table = (module.require(end) for end in (".weight", ".weight.absmax", ".weight.quant_map"))
    _require_shape(table, "F32", 16)
    if _read_singles(table).tobytes() != TABLES[kind].tobytes() and (_read_singles(table) != TABLES[kind]).any():
        raise CannotTell(f"{table.name} is not the table of {kind.upper()}")
    shape, block = _read_shape(state), _read_block(state, "blocksize")
    count = math.prod(shape)
    if codes.info.size != -(-count // 2):
        raise CannotTell(f"{codes.name} has {codes.info.size} bytes, which do not fit the shape {list(shape)}")
    nested = _find_nested(module, state, -(-count // block))
    _require_shape(scales, "F32" if nested is None else "U8", -(-count // block))
    layout = f"bitsandbytes {kind.upper()}, blocks of {block}{'' if nested is None else ', nested scales'}"
    return NormalFloatMatrix(module.weight, layout, shape, codes, scales, block, TABLES[kind], nested)


def _read_state(tensor: ModuleTensor, kind: str) -> Mapping[str, object]:
    """Read the JSON of a weight. Raises CannotTell if it has unknown keys, or contradicts the name of its tensor."""
    if tensor.dtype != "U8" or len(tensor.shape) != 1 or tensor.count > _MAX_STATE:
        raise CannotTell(f"{tensor.name} does not contain a text of at most {_MAX_STATE} bytes")
    try:
        state = parse_json(tensor.read(tensor.name, 0, tensor.count), tensor.name)
    except CheckpointError as error:
        raise CannotTell(str(error)) from None
    nested = "nested_offset" in state
    if state.keys() != _PLAIN_KEYS | (_NESTED_KEYS if nested else set()):
        raise CannotTell(f"the keys in {tensor.name} are not the known ones")
    if state["quant_type"] != kind:
        raise CannotTell(f"quant_type in {tensor.name} contradicts its name")
    return state


def _read_shape(state: Mapping[str, object]) -> tuple[int, int]:
    """Return the shape of the weight. Raises CannotTell if the weight is no matrix."""
    match state["shape"]:
        case [rows, cols] if type(rows) is type(cols) is int and rows > 0 and cols > 0:
            return rows, cols
    raise CannotTell("the shape in the quant_state is not that of a matrix")


def _read_block(state: Mapping[str, object], key: str) -> int:
    """Return a block size. Raises CannotTell if bitsandbytes does not support it."""
    size = state[key]
    if type(size) is not int or size not in _BLOCK_SIZES:
        raise CannotTell(f"{key} in the quant_state is not a block size of bitsandbytes")
    return size


def _find_nested(module: QuantisedModule, state: Mapping[str, object], count: int) -> NestedScales | None:
    """Return how `count` scales are quantised; None if they are stored as float32. Raises CannotTell."""
    table, scales = module.find(".weight.nested_quant_map"), module.find(".weight.nested_absmax")
    if table is None and scales is None and "nested_offset" not in state:
        return None
    if table is None or scales is None or "nested_offset" not in state:
        raise CannotTell(f"only a part of the nested scales of {module.weight} is stored")
    offset, block = state["nested_offset"], _read_block(state, "nested_blocksize")
    if state["nested_dtype"] != "float32" or not isinstance(offset, int | float):
        raise CannotTell(f"the nested scales of {module.weight} are not float32")
    _require_shape(table, "F32", 256)
    _require_shape(scales, "F32", -(-count // block))
    with np.errstate(over="ignore"):
        return NestedScales(_read_singles(table), scales, block, np.float32(float(offset)))


def _require_shape(tensor: ModuleTensor, dtype: str, count: int) -> None:
    """Raise CannotTell if a tensor does not consist of `count` elements of a dtype."""
    if tensor.dtype != dtype or tensor.shape != (count,):
        raise CannotTell(f"{tensor.name} is {tensor.dtype} of shape {list(tensor.shape)}, not {count} {dtype}")


def _read_singles(tensor: ModuleTensor) -> Singles:
    """Read all elements of a tensor of F32."""
    return tensor.read_words(0, tensor.count).view("<f4")
