"""Read 8-bit weights of quanto: `weight._data` and `weight._scale`.

optimum-quanto stores a scale for each row, and declares the types of the modules in quanto_qmap.json. A config of
transformers may declare the method "quanto" instead. Weights of 2 and 4 bits have a shift, and are not read. Source:
optimum-quanto 0.2.7, nn/qmodule.py and tensor/qbytes.py.
"""

from __future__ import annotations

from swsurgery.checkpoint.layouts.blocks import BlockMatrix, Blocks, StoredNumbers, make_shape_error, require_matrix
from swsurgery.checkpoint.layouts.cells import CannotTell
from swsurgery.checkpoint.layouts.codes import decode_codes
from swsurgery.checkpoint.layouts.module import QuantisedModule
from swsurgery.checkpoint.layouts.packing import PackedRows
from swsurgery.checkpoint.layouts.scales import require_float

_TYPES = {"I8": "int8", "F8_E4M3": "float8", "F8_E5M2": "float8"}
"""The dtypes of codes that are read, with the type that a config of transformers declares for each."""


def find_quanto(module: QuantisedModule) -> BlockMatrix | None:
    """Recognise an 8-bit weight of quanto.

    Raises CannotTell if the config declares another type, or if the tensors do not fit each other.
    """
    codes, packed = module.find(".weight._data"), module.find(".weight._data._data")
    if module.method not in ("", "quanto") or codes is None is packed:
        return None
    if codes is None:
        raise CannotTell(f"{module.weight} is a weight of quanto with 2 or 4 bits, but only 8 bits are read")
    if codes.dtype not in _TYPES or module.find(".weight._shift") is not None:
        raise CannotTell(f"{codes.name} is not a weight of 8 bits")
    declared = module.quantisation.get("weights", _TYPES[codes.dtype])
    if declared != _TYPES[codes.dtype]:
        raise CannotTell(f"{codes.name} is stored as {codes.dtype}, but config.json declares {str(declared)[:40]}")
    scales = module.require(".weight._scale")
    module.refuse_others((".weight._data", ".weight._scale"))
    require_matrix(codes)
    require_float(scales)
    rows, cols = codes.shape
    if scales.shape not in ((rows, 1), (1,), ()):
        raise make_shape_error(scales, f"{rows} rows")
    height = rows if scales.count == 1 else 1
    blocks = Blocks(StoredNumbers(scales, 1), rows, height, cols)
    table = decode_codes(codes.info.dtype)
    layout = f"quanto {_TYPES[codes.dtype]}"
    return BlockMatrix(module.weight, layout, codes.shape, PackedRows(codes, rows, cols, 8), table, blocks)
