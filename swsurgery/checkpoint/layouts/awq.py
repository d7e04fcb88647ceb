"""Read AWQ weights in the format "gemm": `qweight`, `qzeros` and `scales`.

AutoAWQ, llm-compressor's converters and AutoRound write this layout. A 32-bit word stores the 4-bit codes of eight
neighbouring output features in the order 0, 2, 4, 6, 1, 3, 5, 7, the first one in its lowest bits. Zero points are
stored in the same order and unchanged. Source: AutoAWQ, awq/utils/packing_utils.py, and compressed-tensors 0.20,
entrypoints/convert/converters/autoawq.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from swsurgery.checkpoint.layouts.cells import BitField, CannotTell, Cell
from swsurgery.checkpoint.layouts.codes import Codes, unpack_nibbles
from swsurgery.checkpoint.layouts.gptq import refuse_rotation
from swsurgery.checkpoint.layouts.grouped import GroupedMatrix, find_groups, read_count
from swsurgery.checkpoint.layouts.module import ModuleTensor, QuantisedModule
from swsurgery.checkpoint.layouts.words import WORD, read_columns
from swsurgery.storage.arrays import Doubles

_BITS = 4
_PER_WORD = WORD // _BITS
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""The place in its word of each of eight neighbouring output features, in units of 4 bits from the lowest bits on."""


@dataclass(frozen=True)
class AwqPacking:
    """The places of codes in `codes` [cols, words] and of zero points in `zeros` [groups, words].

    `symmetric` is True if the config declares that all zero points are 8.
    """

    codes: ModuleTensor
    zeros: ModuleTensor
    symmetric: bool

    def list_fields(self, row: int, col: int) -> tuple[BitField, ...]:
        return (_find_field(self.codes, col, row),)

    def read_codes(self, begin: int, end: int) -> Codes:
        return _read_outputs(self.codes, begin, end).T

    def read_zero(self, group: int, row: int) -> float:
        zero = Cell((_find_field(self.zeros, group, row),), (), 0.0).read_code(self.zeros.read)
        self._refuse_asymmetric(np.array([zero], np.uint8))
        return float(zero)

    def read_zeros(self, begin: int, end: int) -> Doubles:
        zeros = _read_outputs(self.zeros, begin, end)
        self._refuse_asymmetric(zeros)
        return zeros.astype(np.float64)

    def _refuse_asymmetric(self, zeros: Codes) -> None:
        """Raise CannotTell if zero points contradict the config."""
        if self.symmetric and (zeros != 1 << (_BITS - 1)).any():
            raise CannotTell(f"zero_point in config.json is false, but {self.zeros.name} has zero points other than 8")


def _find_field(tensor: ModuleTensor, line: int, row: int) -> BitField:
    """Return the bits that a tensor [lines, words] stores for one output feature in one line."""
    word = line * tensor.shape[1] + row // _PER_WORD
    return BitField(tensor.name, word * WORD + _PLACES[row % _PER_WORD] * _BITS, _BITS)


def _read_outputs(tensor: ModuleTensor, begin: int, end: int) -> Codes:
    """Read what a tensor [lines, words] stores for the output features `begin` to `end`, as [lines, end - begin]."""
    first, last = begin // _PER_WORD, -(-end // _PER_WORD)
    words = np.ascontiguousarray(read_columns(tensor, first, last))
    stored = unpack_nibbles(words.tobytes()).reshape(-1, _PER_WORD)
    codes = stored[:, _PLACES].reshape(tensor.shape[0], -1)
    return codes[:, begin - first * _PER_WORD : end - first * _PER_WORD]


def find_awq(module: QuantisedModule) -> GroupedMatrix | None:
    """Recognise an AWQ weight of a checkpoint whose config declares the method "awq".

    Raises CannotTell if the format is unknown, or if tensors and config do not fit each other.
    """
    if module.method != "awq" or module.find(".qweight") is None:
        return None
    config = module.quantisation
    names = {str(config[key]).lower() for key in ("version", "format") if config.get(key) is not None} or {"gemm"}
    if names != {"gemm"} or config.get("backend") == "llm-awq":
        names |= {"llm-awq"} if config.get("backend") == "llm-awq" else set()
        raise CannotTell(f"the format of the AWQ weights is {' and '.join(sorted(names))} according to config.json")
    zero_point = config.get("zero_point", True)
    if type(zero_point) is not bool:
        raise CannotTell("zero_point in config.json is neither true nor false")
    return build_awq(module, "AWQ gemm", not zero_point)


def build_awq(module: QuantisedModule, name: str, symmetric: bool) -> GroupedMatrix:
    """Return the matrix of a module in the layout `name`. Raises CannotTell if tensors and config do not fit."""
    config = module.quantisation
    refuse_rotation(config)
    if read_count(config, "bits") != _BITS:
        raise CannotTell("bits in config.json is not 4, the only width of AWQ gemm")
    module.refuse_others((".qweight", ".qzeros", ".scales", ".g_idx"))
    codes, zeros, scales = (module.require(ending) for ending in (".qweight", ".qzeros", ".scales"))
    if not (codes.dtype == zeros.dtype == "I32" and len(codes.shape) == len(zeros.shape) == 2 and codes.count):
        raise CannotTell(f"{codes.name} and {zeros.name} are not matrices of I32")
    if module.find(".g_idx") is not None:
        raise CannotTell(f"{module.name}.g_idx is stored, which AWQ does not have")
    cols, words = codes.shape
    groups, rows = zeros.shape[0], words * _PER_WORD
    if zeros.shape[1] != words or scales.shape != (groups, rows) or scales.dtype not in ("F16", "BF16", "F32"):
        raise CannotTell(f"the shapes of {zeros.name} and {scales.name} do not fit {list(codes.shape)} words of codes")
    column_groups = find_groups(read_count(config, "group_size"), cols, groups, None, free=False)
    if cols % column_groups.size:
        raise CannotTell(f"groups of {column_groups.size} do not divide {cols} columns, as AWQ requires")
    layout = f"{name}, {_BITS} bits, groups of {column_groups.size}"
    return GroupedMatrix(
        module.weight, layout, (rows, cols), _BITS, AwqPacking(codes, zeros, symmetric), column_groups, scales
    )
