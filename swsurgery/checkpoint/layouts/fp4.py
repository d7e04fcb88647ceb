"""Read weights of FP4 (E2M1), two in each byte, the even column in the low nibble.

- compressed-tensors `nvfp4-pack-quantized`: `weight_packed` U8, `weight_scale` F8_E4M3 for 16 elements, and
  `weight_global_scale`, by which the scales are divided in float32 (compressors/nvfp4 of compressed-tensors 0.20.1).
- ModelOpt NVFP4: `weight` U8, `weight_scale` F8_E4M3 for 16 elements, and `weight_scale_2`, by which the scales are
  multiplied (entrypoints/convert/converters/modelopt_nvfp4.py of compressed-tensors 0.20.1).
- compressed-tensors `mxfp4-pack-quantized`: `weight_packed` U8, and `weight_scale` with the exponent of a power of two
  for 32 elements (compressors/mxfp4).
- DeepSeek-V4: `weight` I8, and `scale` or `weight_scale_inv` for 32 elements (`Fp8Dequantize` in
  integrations/finegrained_fp8.py of transformers 5.23).
- gpt-oss: `experts.down_proj_blocks` U8 [experts, rows, blocks, 16] and `experts.down_proj_scales` U8 with exponents.
  The loaded weight is [experts, cols, rows] (integrations/mxfp4.py of transformers 5.23).
"""

from __future__ import annotations

from swsurgery.checkpoint.layouts.blocks import (
    BlockMatrix,
    Blocks,
    StoredNumbers,
    TransposedMatrices,
    make_shape_error,
    require_matrix,
)
from swsurgery.checkpoint.layouts.cells import CannotTell
from swsurgery.checkpoint.layouts.codes import E2M1
from swsurgery.checkpoint.layouts.module import ModuleTensor, QuantisedModule
from swsurgery.checkpoint.layouts.packing import PackedRows
from swsurgery.checkpoint.layouts.scales import require_dtype, require_float
from swsurgery.checkpoint.layouts.schemes import Scheme, find_by_schemes, is_compressed
from swsurgery.storage.strict_json import quote

_MODELOPT = ("NVFP4", "NVFP4_AWQ", "W4A8_NVFP4_FP8", "W4A16_NVFP4", "MIXED_PRECISION")
"""Values of `quant_algo` with which ModelOpt stores weights as NVFP4."""


def find_packed_fp4(module: QuantisedModule) -> BlockMatrix | None:
    """Recognise nvfp4-pack-quantized and mxfp4-pack-quantized of compressed-tensors. Raises CannotTell if none fits."""
    packed = module.find(".weight_packed")
    if not is_compressed(module) or packed is None or packed.dtype != "U8":
        return None
    return find_by_schemes(module, ("nvfp4-pack-quantized", "mxfp4-pack-quantized"), _fit_fp4)


def _fit_fp4(module: QuantisedModule, scheme: Scheme) -> BlockMatrix:
    is_nvidia = scheme.format == "nvfp4-pack-quantized"
    size, strategy = (16, "tensor_group") if is_nvidia else (32, "group")
    stated = (scheme.kind, scheme.bits, scheme.symmetric, scheme.strategy, scheme.block[1], scheme.actorder)
    if stated != ("float", 4, True, strategy, size, None):
        raise CannotTell(f"{module.name} is declared as {scheme.format}, {scheme.kind}, {scheme.describe()}")
    module.refuse_others((".weight_scale", *((".weight_global_scale",) if is_nvidia else ())))
    packed, scales = module.require(".weight_packed"), module.require(".weight_scale")
    name = f"compressed-tensors {scheme.format}, groups of {size}"
    if is_nvidia:
        require_dtype(scales, "F8_E4M3")
        divisor = _read_single(module.require(".weight_global_scale"))
        numbers = StoredNumbers(scales, _count_groups(packed, size), divisor=divisor, single=True)
    else:
        require_dtype(scales, "U8", "F8_E8M0")
        numbers = StoredNumbers(scales, _count_groups(packed, size), exponents=True)
    return _make_matrix(module, name, packed, numbers, size)


def find_modelopt_fp4(module: QuantisedModule) -> BlockMatrix | None:
    """Recognise NVFP4 of ModelOpt. Raises CannotTell if the tensors do not fit, or if config.json states otherwise.

    config.json may lack the declaration, because ModelOpt also writes it into hf_quant_config.json. The names and
    dtypes of the three tensors occur in no other format.
    """
    packed, scales, second = (module.find(ending) for ending in (".weight", ".weight_scale", ".weight_scale_2"))
    if packed is None or scales is None or second is None or (packed.dtype, scales.dtype) != ("U8", "F8_E4M3"):
        return None
    algorithm = module.quantisation.get("quant_algo")
    if module.method not in ("", "modelopt", "modelopt_fp4", "modelopt_mixed"):
        raise CannotTell(f"config.json declares the method {quote(module.method)}, and {second.name} is stored")
    if algorithm is not None and algorithm not in _MODELOPT:
        raise CannotTell(f"config.json (quant_algo) is {quote(algorithm)}, and {second.name} is stored")
    module.refuse_others((".weight_scale", ".weight_scale_2"))
    numbers = StoredNumbers(scales, _count_groups(packed, 16), factor=_read_single(second))
    return _make_matrix(module, "ModelOpt NVFP4, groups of 16", packed, numbers, 16)


def find_fp4_in_bytes(module: QuantisedModule) -> BlockMatrix | None:
    """Recognise the experts of DeepSeek-V4: FP4 in I8. Raises CannotTell if the tensors do not fit."""
    packed = module.find(".weight")
    if module.config.get("expert_dtype") != "fp4" or packed is None or packed.dtype != "I8":
        return None
    if module.method not in ("", "fp8"):
        raise CannotTell(f"config.json declares the method {quote(module.method)} and expert_dtype fp4")
    found = [tensor for ending in (".scale", ".weight_scale_inv") if (tensor := module.find(ending)) is not None]
    if len(found) != 1:
        raise CannotTell(f"{module.name} has {len(found)} scales instead of one")
    [scales] = found
    module.refuse_others((scales.name.removeprefix(module.name),))
    exponents = scales.dtype in ("U8", "F8_E8M0")
    if not exponents:
        require_float(scales)
    numbers = StoredNumbers(scales, _count_groups(packed, 32), exponents=exponents)
    return _make_matrix(module, "FP4 in I8, groups of 32", packed, numbers, 32)


def find_stacked_fp4(module: QuantisedModule) -> TransposedMatrices | None:
    """Recognise the experts of gpt-oss. Raises CannotTell if the tensors do not fit."""
    blocks, scales = module.find("_blocks"), module.find("_scales")
    if module.method != "mxfp4" or blocks is None:
        return None
    if scales is None:
        raise CannotTell(f"{module.name}_scales is not stored")
    module.refuse_others(("_scales",))
    require_dtype(blocks, "U8")
    require_dtype(scales, "U8", "F8_E8M0")
    if len(blocks.shape) != 4 or blocks.shape[3] != 16 or blocks.count == 0:
        raise CannotTell(f"{blocks.name} of shape {list(blocks.shape)} does not store blocks of 32 codes")
    if scales.shape != blocks.shape[:3]:
        raise make_shape_error(scales, f"{blocks.name} of shape {list(blocks.shape)}")
    experts, rows, count, _ = blocks.shape
    codes = PackedRows(blocks, experts * rows, count * 32, 4)
    numbers = Blocks(StoredNumbers(scales, count, exponents=True), rows, 1, 32)
    shape = (experts, rows, count * 32)
    return TransposedMatrices(BlockMatrix(module.weight, "MXFP4 in blocks of 32", shape, codes, E2M1, numbers))


def _count_groups(packed: ModuleTensor, size: int) -> int:
    """Return the number of groups in a row. Raises CannotTell if the codes are no matrix of whole groups."""
    require_matrix(packed)
    if packed.shape[1] * 2 % size:
        raise make_shape_error(packed, f"rows of groups of {size} codes")
    return packed.shape[1] * 2 // size


def _make_matrix(
    module: QuantisedModule, name: str, packed: ModuleTensor, numbers: StoredNumbers, size: int
) -> BlockMatrix:
    """Describe a weight with two codes in each byte and a scale for each group of `size` codes. Raises CannotTell."""
    rows, cols = packed.shape[0], packed.shape[1] * 2
    if numbers.tensor.shape != (rows, numbers.cols):
        raise make_shape_error(numbers.tensor, f"a weight of shape {[rows, cols]} with groups of {size}")
    blocks = Blocks(numbers, rows, 1, size)
    return BlockMatrix(module.weight, name, (rows, cols), PackedRows(packed, rows, cols, 4), E2M1, blocks)


def _read_single(tensor: ModuleTensor) -> float:
    """Read the only number of a float32 tensor. Raises CannotTell if it is not positive and finite."""
    require_dtype(tensor, "F32")
    if tensor.count != 1:
        raise CannotTell(f"{tensor.name} of shape {list(tensor.shape)} does not contain exactly one number")
    value = tensor.read_number((0,) * len(tensor.shape))
    if value <= 0:
        raise CannotTell(f"{tensor.name} contains {value}, which is not positive")
    return value
