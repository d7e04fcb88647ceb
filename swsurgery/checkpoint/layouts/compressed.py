"""Read the integer and FP8 weights of compressed-tensors, which llm-compressor writes.

`pack-quantized` stores integers of 1 to 8 bits in words of 32 bits: `weight_packed` I32, `weight_shape`, `weight_scale`
and, with zero points, `weight_zero_point`. Until June 2026, codes of 3, 5, 6 and 7 bits did not cross words; the number
of words in a row shows which packing was used. `int-quantized`, `float-quantized` and `naive-quantized` store one code
in each element of `weight`, I8 or F8_E4M3. `mxfp8-quantized` stores F8_E4M3 with one power of two for 32 elements.

Source: compressors/pack_quantized, compressors/naive_quantized, compressors/mxfp8 and quantization/lifecycle of
compressed-tensors 0.20.1. Versions before August 2026 may also write `weight_g_idx`, the group of each column. Their
quantization/lifecycle/forward.py sorts the columns by group.
"""

from __future__ import annotations

import math

from swsurgery.checkpoint.layouts.blocks import BlockMatrix, Blocks, ColumnOrder, make_shape_error, require_matrix
from swsurgery.checkpoint.layouts.cells import CannotTell
from swsurgery.checkpoint.layouts.codes import decode_codes, list_integers
from swsurgery.checkpoint.layouts.module import ModuleTensor, QuantisedModule
from swsurgery.checkpoint.layouts.packing import PackedColumns, PackedRows, count_words
from swsurgery.checkpoint.layouts.scales import make_blocks, measure_blocks, require_dtype, require_float
from swsurgery.checkpoint.layouts.schemes import Scheme, find_by_schemes, is_compressed

_PLAIN_FORMATS = {
    "int-quantized": ("I8",),
    "float-quantized": ("F8_E4M3",),
    "naive-quantized": ("I8", "F8_E4M3"),
    "mxfp8-quantized": ("F8_E4M3",),
}
"""Formats that store one code in each element of the weight, with the dtypes that they use."""


def find_pack_quantized(module: QuantisedModule) -> BlockMatrix | None:
    """Recognise the format pack-quantized of compressed-tensors. Raises CannotTell if no scheme fits."""
    packed = module.find(".weight_packed")
    if not is_compressed(module) or packed is None or packed.dtype != "I32":
        return None
    return find_by_schemes(module, ("pack-quantized",), _fit_packed)


def find_plain_codes(module: QuantisedModule) -> BlockMatrix | None:
    """Recognise a weight of compressed-tensors with one code in each element. Raises CannotTell if no scheme fits."""
    codes = module.find(".weight")
    if not is_compressed(module) or codes is None or codes.dtype not in ("I8", "F8_E4M3"):
        return None
    return find_by_schemes(module, _PLAIN_FORMATS, _fit_codes)


def _fit_packed(module: QuantisedModule, scheme: Scheme) -> BlockMatrix:
    """Describe packed integers under a scheme. Raises CannotTell."""
    module.refuse_others((".weight_scale", ".weight_shape", *_name_optional(scheme)))
    if scheme.kind != "int" or not 1 <= scheme.bits <= 8 or scheme.strategy == "tensor_group":
        raise CannotTell(
            f"{module.name} is declared as {scheme.kind} of {scheme.describe()}, which pack-quantized does not store"
        )
    packed, scales = module.require(".weight_packed"), module.require(".weight_scale")
    require_matrix(packed)
    require_float(scales)
    zeros = None if scheme.symmetric else module.require(".weight_zero_point")
    rows, cols = _read_shape(module.require(".weight_shape"))
    if rows != packed.shape[0]:
        raise make_shape_error(packed, f"a weight of shape {[rows, cols]}")
    padded = _find_packing(packed, (rows, cols), scheme.bits, zeros)
    order = _find_order(module, scheme, cols)
    return BlockMatrix(
        module.weight,
        f"compressed-tensors pack-quantized, {scheme.describe()}",
        (rows, cols),
        PackedRows(packed, rows, cols, scheme.bits, padded),
        tuple(list_integers(scheme.bits)),
        make_blocks(scheme, scales, (rows, cols), order),
        None if zeros is None else _find_packed_zeros(zeros, scheme, (rows, cols), padded, order),
    )


def _find_packing(packed: ModuleTensor, shape: tuple[int, int], bits: int, zeros: ModuleTensor | None) -> bool:
    """Return True if no code crosses a word. The numbers of words of codes and zero points show this.

    Raises CannotTell if neither packing needs these numbers of words. Also raises it if both packings need them, but
    store a code in different bits.
    """
    rows, cols = shape
    counts = [(packed, cols, packed.shape[1])]
    if zeros is not None and zeros.dtype == "I32" and len(zeros.shape) == 2:
        counts.append((zeros, rows, zeros.shape[0]))
    possible = [False, True]
    for tensor, codes, words in counts:
        possible = [padded for padded in possible if count_words(codes, bits, padded=padded) == words]
        if not possible:
            raise make_shape_error(tensor, f"{codes} codes of {bits} bits")
    if len(possible) == 2 and 32 % bits and any(codes > 32 // bits for _, codes, _ in counts):
        raise CannotTell(
            f"it is unclear whether codes of {packed.name} cross words: both packings need the same number of words"
        )
    return possible[0]


def _find_packed_zeros(
    zeros: ModuleTensor, scheme: Scheme, shape: tuple[int, int], padded: bool, order: ColumnOrder | None
) -> Blocks:
    """Describe the zero points beside packed codes: packed along the columns, or one I8 for each scale."""
    if zeros.dtype == "I8":
        return make_blocks(scheme, zeros, shape, order)
    (rows, cols), (height, width) = measure_blocks(scheme, shape)
    require_dtype(zeros, "I32")
    if zeros.shape != (count_words(rows, scheme.bits, padded=padded), cols) or scheme.strategy in ("tensor", "block"):
        raise make_shape_error(zeros, f"the zero points of a weight of shape {list(shape)} with {scheme.describe()}")
    return Blocks(PackedColumns(zeros, cols, scheme.bits, padded), shape[0], height, width, order)


def _read_shape(stored: ModuleTensor) -> tuple[int, int]:
    """Read the shape of the weight. Raises CannotTell if it is not a shape of a matrix."""
    if stored.info.dtype.kind != "int" or stored.shape != (2,):
        raise CannotTell(f"{stored.name} does not contain the shape of a matrix")
    rows, cols = (stored.read_number((axis,)) for axis in (0, 1))
    if not (1 <= rows < 2**31 and 1 <= cols < 2**31):
        raise CannotTell(f"{stored.name} contains {[int(rows), int(cols)]}, which is not the shape of a matrix")
    return int(rows), int(cols)


def _fit_codes(module: QuantisedModule, scheme: Scheme) -> BlockMatrix:
    """Describe a weight with one code in each element under a scheme. Raises CannotTell."""
    module.refuse_others((".weight_scale", *_name_optional(scheme)))
    codes, scales = module.require(".weight"), module.require(".weight_scale")
    require_matrix(codes)
    require_dtype(codes, *_PLAIN_FORMATS[scheme.format])
    is_int = codes.dtype == "I8"
    if is_int != (scheme.kind == "int") or scheme.strategy == "tensor_group" or not _fits_bits(scheme):
        raise CannotTell(f"{codes.name} is stored as {codes.dtype}, but declared as {scheme.kind}, {scheme.describe()}")
    rows, cols = codes.shape
    exponents = scheme.format == "mxfp8-quantized"
    if exponents:
        require_dtype(scales, "U8", "F8_E8M0")
    else:
        require_float(scales)
    order = _find_order(module, scheme, cols)
    zeros = None if scheme.symmetric else _find_plain_zeros(module, scheme, (rows, cols), order)
    name = f"compressed-tensors {scheme.format}, {scheme.describe()}"
    packed = PackedRows(codes, rows, cols, 8)
    blocks = make_blocks(scheme, scales, (rows, cols), order, exponents)
    return BlockMatrix(module.weight, name, (rows, cols), packed, _list_values(codes, scheme), blocks, zeros)


def _fits_bits(scheme: Scheme) -> bool:
    """Return True if codes of 8 bits can store the numbers of a scheme."""
    if scheme.format == "mxfp8-quantized" and (scheme.strategy, scheme.block[1]) != ("group", 32):
        return False
    return 1 <= scheme.bits <= 8 if scheme.kind == "int" else scheme.bits == 8


def _list_values(codes: ModuleTensor, scheme: Scheme) -> tuple[float, ...]:
    """List the values of the 256 codes; NaN for integers that the declared number of bits cannot represent."""
    half = 1 << (scheme.bits - 1)
    values = decode_codes(codes.info.dtype)
    if scheme.kind == "float":
        return values
    return tuple(value if -half <= value < half else math.nan for value in values)


def _find_plain_zeros(
    module: QuantisedModule, scheme: Scheme, shape: tuple[int, int], order: ColumnOrder | None
) -> Blocks:
    zeros = module.require(".weight_zero_point")
    if zeros.info.dtype.kind not in ("int", "float"):
        raise CannotTell(f"the zero points {zeros.name} are stored as {zeros.dtype}")
    return make_blocks(scheme, zeros, shape, order)


def _name_optional(scheme: Scheme) -> list[str]:
    """List the endings of the tensors that only some schemes need: zero points, and the groups of the columns."""
    named = ((not scheme.symmetric, ".weight_zero_point"), (scheme.actorder is not None, ".weight_g_idx"))
    return [ending for needed, ending in named if needed]


def _find_order(module: QuantisedModule, scheme: Scheme, cols: int) -> ColumnOrder | None:
    """Return the group of each column if the columns of a group are not adjacent. Raises CannotTell."""
    if scheme.actorder is None:
        return None
    order, size = module.require(".weight_g_idx"), scheme.block[1]
    if scheme.strategy != "group" or order.dtype not in ("I32", "I64") or order.shape != (cols,) or cols % size:
        raise make_shape_error(order, f"{cols} columns with {scheme.describe()}")
    return ColumnOrder(order, size, cols // size)
