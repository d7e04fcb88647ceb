"""Read weights that torchao stores in safetensors files: int8, float8, intx in bytes, and plain int4.

Module `m` stores `m._weight_qdata`, `m._weight_scale` and perhaps `m._weight_zero_point`. The metadata of the header
contains, under the name `m.weight`, JSON with the class, the block size and the names of the parts. Source: torchao
0.18, prototype/safetensors/ and quantization/quantize_/workflows/. The other classes store codes in an order that
depends on a kernel, and are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from swsurgery.checkpoint.layouts.blocks import BlockMatrix, Blocks, StoredNumbers, make_shape_error, require_matrix
from swsurgery.checkpoint.layouts.cells import CannotTell, Cell, QuantisedMatrix
from swsurgery.checkpoint.layouts.codes import decode_codes
from swsurgery.checkpoint.layouts.module import ModuleTensor, QuantisedModule
from swsurgery.checkpoint.layouts.packing import PackedRows
from swsurgery.checkpoint.layouts.scales import require_float
from swsurgery.checkpoint.layouts.words import read_columns
from swsurgery.errors import CheckpointError
from swsurgery.storage.arrays import Doubles, decode_doubles
from swsurgery.storage.dtypes import FloatDtype
from swsurgery.storage.strict_json import parse_json

_INT4 = (*range(8), *range(-8, 0))
"""Values of the 16 codes of int4 in two's complement."""

_ACTIVATION_PARTS = frozenset({"act_quant_scale", "act_quant_zero_point"})
_ATTRIBUTES = {
    "Int8Tensor": {"act_quant_kwargs", "reduce_range", "block_size", "dtype"},
    "Float8Tensor": {"block_size", "mm_config", "act_quant_kwargs", "kernel_preference", "dtype"},
    "IntxUnpackedToInt8Tensor": {"target_dtype", "block_size", "dtype", "activation_quantization"},
    "Int4Tensor": {"block_size", "shape", "activation_dtype"},
}
"""The known attributes of each class. Those that are not read here concern activations or the choice of a kernel."""


@dataclass(frozen=True)
class TorchaoWeight:
    """The parts of one weight, and the attributes that the header states. `kind` is the name of torchao's class."""

    name: str
    kind: str
    attributes: Mapping[str, object]
    codes: ModuleTensor
    scales: ModuleTensor
    zeros: ModuleTensor | None

    def read_block(self) -> tuple[int, int]:
        """Return height and width of a block. Raises CannotTell if it is not two positive integers."""
        match self.attributes.get("block_size"):
            case [height, width] if type(height) is type(width) is int and height > 0 and width > 0:
                return height, width
        raise CannotTell(f"the block_size of {self.name} is not two positive integers")


def find_torchao(module: QuantisedModule) -> QuantisedMatrix | None:
    """Recognise a weight of a checkpoint whose config declares the method "torchao".

    Raises CannotTell if the class is unknown, or if header and tensors do not fit each other.
    """
    if module.method != "torchao" or module.find("._weight_qdata") is None:
        return None
    document = _read_metadata(module)
    kind, attributes, parts = (document.get(key) for key in ("_type", "_data", "_tensor_data_names"))
    if not isinstance(kind, str) or kind not in _READERS:
        raise CannotTell(f"the codes of {module.weight} are of torchao's class {str(kind)[:40]}, which is not read")
    if not isinstance(attributes, Mapping) or not attributes.keys() <= _ATTRIBUTES[kind]:
        raise CannotTell(f"the attributes of {module.weight} in the header are not the known ones")
    names = set(map(str, parts)) if isinstance(parts, list) else set()
    if not {"qdata", "scale"} <= names <= {"qdata", "scale", "zero_point"} | _ACTIVATION_PARTS:
        raise CannotTell(f"the parts of {module.weight} in the header are not the known ones")
    module.refuse_others([f"._weight_{name}" for name in names])
    zeros = module.require("._weight_zero_point") if "zero_point" in names else None
    codes, scales = module.require("._weight_qdata"), module.require("._weight_scale")
    require_matrix(codes)
    require_float(scales)
    return _READERS[kind](TorchaoWeight(module.weight, kind, attributes, codes, scales, zeros))


def _read_metadata(module: QuantisedModule) -> Mapping[str, object]:
    """Read what the header states about a weight. Raises CannotTell if it states nothing that can be read."""
    if module.weight not in module.metadata:
        raise CannotTell(f"the header does not describe {module.weight}")
    try:
        return parse_json(module.metadata[module.weight].encode("utf-8", "replace"), f"metadata of {module.weight}")
    except CheckpointError as error:
        raise CannotTell(str(error)) from None


def _read_bytes(stored: TorchaoWeight) -> BlockMatrix:
    """Return the matrix of an Int8Tensor, a Float8Tensor or an IntxUnpackedToInt8Tensor. Raises CannotTell."""
    codes = stored.codes
    fitting = ("F8_E4M3", "F8_E5M2") if stored.kind == "Float8Tensor" else ("I8",)
    if codes.dtype not in fitting:
        raise CannotTell(f"{codes.name} is stored as {codes.dtype}, which does not fit {stored.kind}")
    table, name = decode_codes(codes.info.dtype), codes.dtype
    if stored.kind == "IntxUnpackedToInt8Tensor":
        bits = _read_target(stored)
        table = tuple(v if -(1 << (bits - 1)) <= v < 1 << (bits - 1) else math.nan for v in table)
        name = f"int{bits} in bytes"
    height, width = stored.read_block()
    zeros = stored.zeros
    if zeros is not None and zeros.dtype != "I8":
        raise CannotTell(f"{zeros.name} is stored as {zeros.dtype}, not as I8")
    layout = f"torchao {name}, blocks of {height} x {width}"
    packed = PackedRows(codes, codes.shape[0], codes.shape[1], 8)
    scales = _make_blocks(stored, stored.scales)
    return BlockMatrix(
        stored.name, layout, codes.shape, packed, table, scales, None if zeros is None else _make_blocks(stored, zeros)
    )


def _make_blocks(stored: TorchaoWeight, numbers: ModuleTensor) -> Blocks:
    """Return the numbers of the blocks of a weight. Raises CannotTell if their shape does not fit."""
    rows, cols = stored.codes.shape
    height, width = stored.read_block()
    down, across = rows // height, cols // width
    fitting = [(down, across)] + ([(down,)] if across == 1 else []) + ([()] if down == across == 1 else [])
    if rows % height or cols % width or numbers.shape not in fitting:
        raise make_shape_error(numbers, f"blocks of {height} x {width} in {rows} x {cols}")
    return Blocks(StoredNumbers(numbers, across), rows, height, width)


def _read_target(stored: TorchaoWeight) -> int:
    """Return the number of bits of the codes in bytes. Raises CannotTell if it is not 1 to 8."""
    target = stored.attributes.get("target_dtype")
    name = target.get("_data") if isinstance(target, Mapping) else None
    if not isinstance(name, str) or name not in {f"int{bits}" for bits in range(1, 9)}:
        raise CannotTell(f"the target_dtype of {stored.name} is not int1 to int8")
    return int(name[3:])


@dataclass(frozen=True)
class Int4Matrix:
    """A matrix of signed 4-bit codes [rows, cols / 2 bytes], whose elements are code * scale + zero point.

    The first of two codes is in the low bits. `scales` and `zeros` have the shape [groups, rows].
    """

    weight: str
    layout: str
    codes: PackedRows
    scales: ModuleTensor
    zeros: ModuleTensor
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.codes.rows, self.codes.cols

    def find_cell(self, index: tuple[int, ...]) -> Cell:
        row, col = index
        scale, zero = (tensor.read_number((col // self.size, row)) for tensor in (self.scales, self.zeros))
        return Cell((self.codes.find(row, col),), [value * scale + zero for value in _INT4], scale)

    def dequantise(self, begin: int, end: int) -> Doubles:
        scales, zeros = (self._spread(tensor, begin, end) for tensor in (self.scales, self.zeros))
        return np.array(_INT4, np.float64)[self.codes.read_rows(begin, end)] * scales + zeros

    def _spread(self, tensor: ModuleTensor, begin: int, end: int) -> Doubles:
        """Read a number for each element of the rows `begin` to `end`. Raises CannotTell if one is not finite."""
        dtype = tensor.info.dtype
        assert isinstance(dtype, FloatDtype)
        numbers = decode_doubles(dtype, read_columns(tensor, begin, end))
        if not np.isfinite(numbers).all():
            raise CannotTell(f"{tensor.name} contains a number that is not finite")
        return numbers.T.repeat(self.size, axis=1)


def _read_int4(stored: TorchaoWeight) -> Int4Matrix:
    """Return the matrix of an Int4Tensor. Raises CannotTell."""
    codes, zeros = stored.codes, stored.zeros
    rows, cols = codes.shape[0], codes.shape[1] * 2
    height, size = stored.read_block()
    if zeros is None or codes.dtype not in ("I8", "U8") or stored.attributes.get("shape", [rows, cols]) != [rows, cols]:
        raise CannotTell(f"the parts of {stored.name} do not fit Int4Tensor")
    require_float(zeros)
    if height != 1 or cols % size or not stored.scales.shape == zeros.shape == (cols // size, rows):
        raise make_shape_error(stored.scales, f"groups of {size} in {rows} x {cols}")
    layout = f"torchao int4, groups of {size}"
    return Int4Matrix(stored.name, layout, PackedRows(codes, rows, cols, 4), stored.scales, zeros, size)


_READERS: Mapping[str, Callable[[TorchaoWeight], QuantisedMatrix]] = {
    "Int8Tensor": _read_bytes,
    "Float8Tensor": _read_bytes,
    "IntxUnpackedToInt8Tensor": _read_bytes,
    "Int4Tensor": _read_int4,
}
