"""Read F8 and I8 weights that are multiplied by one scale per tensor, row or block, except those of compressed-tensors.

Covers `weight_scale_inv` (DeepSeek-V3 and transformers' fine-grained FP8), `scale` (DeepSeek's own names),
`weight_scale` (static FP8 of several writers), `scale_weight` (ComfyUI) and `SCB` (LLM.int8). A scale that is stored as
F8_E8M0, or as U8 by a method that is known to store exponents, is a power of two.
"""

from __future__ import annotations

from swsurgery.checkpoint.layouts.blocks import BlockMatrix, Blocks, StoredNumbers, make_shape_error, require_matrix
from swsurgery.checkpoint.layouts.cells import CannotTell
from swsurgery.checkpoint.layouts.codes import decode_codes
from swsurgery.checkpoint.layouts.module import ModuleTensor, QuantisedModule
from swsurgery.checkpoint.layouts.packing import PackedRows
from swsurgery.checkpoint.layouts.scales import require_float
from swsurgery.checkpoint.layouts.schemes import is_compressed
from swsurgery.storage.strict_json import quote

_INT8_STEPS = 127
"""Steps in one scale of LLM.int8: it stores the largest magnitude of each row (arXiv:2208.07339, section 2.1)."""

_OTHER_METHODS = frozenset(
    {"aqlm", "awq", "bitsandbytes", "eetq", "gptq", "higgs", "hqq", "quanto", "spqr", "torchao", "vptq"}
)
"""Methods whose weights have other names than `weight` and `weight_scale`, or the axes in another order. LLM.int8 of
bitsandbytes has `SCB`."""


def find_scaled(module: QuantisedModule) -> BlockMatrix | None:
    """Recognise an F8 or I8 weight with one scale of a known name.

    Raises CannotTell if the scale does not fit the weight, or if the matrix is not stored row by row.
    """
    scales = None if is_compressed(module) else _find_scale(module)
    if scales is None:
        return None
    codes = ModuleTensor(module.tensors[module.weight], module.read)
    is_int8 = scales.name.endswith(".SCB")
    if module.method in _OTHER_METHODS and not (is_int8 and module.method == "bitsandbytes"):
        raise CannotTell(f"config.json declares the method {quote(module.method)}, and {scales.name} is stored")
    exponents = _is_exponent(module, scales)
    if not exponents:
        require_float(scales)
    if is_int8:
        _refuse_turned(module)
    require_matrix(codes, stacked=True)
    name = "LLM.int8" if is_int8 else f"{codes.dtype} with {scales.name.rpartition('.')[2]}"
    blocks = _make_blocks(module, codes.shape, scales, StoredNumbers(scales, 1, exponents))
    if is_int8:
        blocks = Blocks(StoredNumbers(scales, 1, divisor=_INT8_STEPS), blocks.rows, blocks.height, blocks.width)
    packed = PackedRows(codes, codes.count // codes.shape[-1], codes.shape[-1], 8)
    return BlockMatrix(module.weight, name, codes.shape, packed, decode_codes(codes.info.dtype), blocks)


def _find_scale(module: QuantisedModule) -> ModuleTensor | None:
    """Return the scale of a weight: the one that checkpoint/quantised.py recognises, or one of two further names."""
    if module.scale is not None:
        return ModuleTensor(module.tensors[module.scale], module.read)
    codes = module.tensors.get(module.weight)
    if codes is None or not codes.dtype.name.startswith(("F8_E4M3", "F8_E5M2")):
        return None
    allowed = ".scale" if module.method == "fp8" else ".scale_weight" if module.method == "" else ""
    found = module.find(allowed) if allowed else None
    if found is not None:
        module.refuse_others((allowed,))
    if found is not None and allowed == ".scale_weight" and found.count != 1:
        raise make_shape_error(found, "a weight with one scale")
    return found


def _is_exponent(module: QuantisedModule, scales: ModuleTensor) -> bool:
    """Return True if the scales are powers of two that are stored as exponents.

    Raises CannotTell if it is undecided.
    """
    if scales.dtype == "F8_E8M0":
        return True
    if scales.dtype != "U8":
        return False
    if module.method in ("fp8", "mxfp8") or module.quantisation.get("quant_algo") == "MXFP8":
        return True
    raise CannotTell(f"the scale {scales.name} is stored as U8, and config.json does not say what its bytes mean")


def _make_blocks(
    module: QuantisedModule, shape: tuple[int, ...], scales: ModuleTensor, numbers: StoredNumbers
) -> Blocks:
    """Describe which elements share a scale. Raises CannotTell."""
    *above, rows, cols = shape
    if scales.count == 1:
        total = rows * (above[0] if above else 1)
        return Blocks(numbers, total, total, cols)
    if len(scales.shape) == 1 and scales.shape == shape[:1]:
        return Blocks(numbers, rows, rows if above else 1, cols)
    if len(scales.shape) != len(shape) or scales.shape[:-2] != tuple(above):
        raise make_shape_error(scales, f"the weight of shape {list(shape)}")
    height, width = _find_block(module, (rows, cols), scales)
    return Blocks(StoredNumbers(scales, scales.shape[-1], numbers.exponents), rows, height, width)


def _find_block(module: QuantisedModule, shape: tuple[int, int], scales: ModuleTensor) -> tuple[int, int]:
    """Return the height and the width of the blocks that share a scale. Raises CannotTell."""
    pairs = list(zip(shape, scales.shape[-2:], strict=True))
    said = module.quantisation.get("weight_block_size")
    if isinstance(said, list) and len(said) == 2 and all(type(n) is int and n > 0 for n in said):
        height, width = said
        if tuple(-(-length // size) for length, size in zip(shape, said, strict=True)) == scales.shape[-2:]:
            return height, width
    if any(not _is_division(length, count) for length, count in pairs):
        what = f"the shape {list(scales.shape)} of {scales.name} does not show which scale belongs to which block"
        raise CannotTell(what)
    height, width = (length // count for length, count in pairs)
    return height, width


def _is_division(length: int, count: int) -> bool:
    """Return True if `count` scales divide an axis in the only plausible way: one block, or sizes of a power of two.

    For example, four scales of 500 rows do not belong to blocks of 125 rows, but to blocks of 128 with a smaller last
    one.
    """
    if count == 0 or length % count:
        return False
    return count == 1 or (length // count).bit_count() == 1


def _refuse_turned(module: QuantisedModule) -> None:
    """Raise CannotTell if the `weight_format` of bitsandbytes is not 0: the matrix is then not stored by rows."""
    form = module.find(".weight_format")
    if form is None:
        return
    if form.count != 1:
        raise CannotTell(f"{form.name} does not contain exactly one number")
    if any(form.read(form.name, 0, form.info.size)):
        raise CannotTell(f"according to {form.name}, the matrix is not stored row by row")
