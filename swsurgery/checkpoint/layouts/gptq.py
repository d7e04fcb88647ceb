"""Read GPTQ weights: `qweight`, `qzeros`, `scales` and `g_idx`.

AutoGPTQ, GPTQModel and AutoRound write this layout. Codes are packed along the input features, zero points along the
output features, both as streams of bits in 32-bit words. Format "gptq" stores zero points minus one, "gptq_v2" stores
them unchanged. Source: GPTQModel 7.7, nn_modules/qlinear/__init__.py and utils/model.py.

A zero point of 0 cannot be stored minus one. Some exporters subtract from whole words, so that the subtraction borrows
from the next zero points; others write ones into all later bits of the word, and readers differ too. The zero point in
a field of ones is therefore undecided, and so are those in the higher fields of the same word. With 3 bits, versions of
GPTQModel subtract different constants. They give the same bits only if the matrix is symmetric and is read as AutoGPTQ
reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from swsurgery.checkpoint.layouts.cells import BitField, CannotTell
from swsurgery.checkpoint.layouts.codes import Codes, unpack_stream
from swsurgery.checkpoint.layouts.grouped import GroupedMatrix, find_groups, read_count
from swsurgery.checkpoint.layouts.module import ModuleTensor, QuantisedModule
from swsurgery.checkpoint.layouts.words import WORD, list_fields, read_columns, unpack_columns
from swsurgery.storage.arrays import Doubles

BITS = (2, 3, 4, 8)

_FORMATS = {"gptq": True, "gptq_v2": False}
"""Names of the formats that can be read, with True if their zero points are stored minus one."""


@dataclass(frozen=True)
class GptqPacking:
    """The places of codes in `codes` [words, rows] and of zero points in `zeros` [groups, words].

    `minus_one` is True if zero points are stored minus one. `one_way` is True if the exporter is known to subtract 1
    from each zero point separately, not from whole words.
    """

    codes: ModuleTensor
    zeros: ModuleTensor
    bits: int
    minus_one: bool
    one_way: bool

    def list_fields(self, row: int, col: int) -> tuple[BitField, ...]:
        return tuple(list_fields(self.codes, row, col * self.bits, self.bits))

    def read_codes(self, begin: int, end: int) -> Codes:
        return unpack_columns(read_columns(self.codes, begin, end), self.bits)

    def read_zero(self, group: int, row: int) -> float:
        first = row - row % WORD  # 32 codes of any width fill whole words
        stored = self._read_stream(group * self._per_group + first, min(WORD, self._per_group - first))
        return float(self._decode(stored)[row - first])

    def read_zeros(self, begin: int, end: int) -> Doubles:
        stored = self._read_stream(0, self.zeros.shape[0] * self._per_group)
        return self._decode(stored).reshape(self.zeros.shape[0], self._per_group)[:, begin:end]

    @property
    def _per_group(self) -> int:
        """Number of zero points of a group."""
        return self.codes.shape[1]

    def _read_stream(self, first: int, count: int) -> Codes:
        """Read the stored zero points `first` to `first + count` (excluded), counted from the first group on."""
        data = self.zeros.read(self.zeros.name, first * self.bits // 8, count * self.bits // 8)
        return unpack_stream(data, self.bits, count)

    def _decode(self, stored: Codes) -> Doubles:
        """Decode stored zero points that fill whole words. An undecided zero point becomes NaN."""
        if not self.minus_one:
            return stored.astype(np.float64)
        if self.bits == 3 and not self.one_way:
            blocks = stored.reshape(-1, WORD)
            return np.where((blocks == 3).all(axis=1, keepdims=True), 4.0, np.nan).repeat(WORD, axis=1).reshape(-1)
        fields = stored.reshape(-1, WORD // self.bits if self.bits != 3 else WORD)
        undecided = np.logical_or.accumulate(fields == (1 << self.bits) - 1, axis=1)
        return np.where(undecided, np.nan, fields + 1.0).reshape(-1)


def find_gptq(module: QuantisedModule) -> GroupedMatrix | None:
    """Recognise a GPTQ weight of a checkpoint whose config declares the method "gptq".

    Raises CannotTell if the format is unknown, or if tensors and config do not fit each other.
    """
    if module.method != "gptq" or module.find(".qweight") is None:
        return None
    config = module.quantisation
    names = {str(config[key]) for key in ("checkpoint_format", "format") if config.get(key) is not None} or {"gptq"}
    if len(names) > 1 or not names <= _FORMATS.keys() or config.get("is_marlin_format"):
        raise CannotTell(f"the format of the GPTQ weights is {' and '.join(sorted(names))} according to config.json")
    if config.get("pack_dtype", "int32") != "int32":
        raise CannotTell("pack_dtype in config.json is not int32")
    name = names.pop()
    return build_gptq(module, name, _FORMATS[name], config.get("provider") == "auto-round", "dynamic")


def build_gptq(module: QuantisedModule, name: str, minus_one: bool, one_way: bool, overrides: str) -> GroupedMatrix:
    """Return the matrix of a module in the format `name`.

    `minus_one` and `one_way` have the same meaning as in `GptqPacking`. `overrides` is the key of the config under
    which single modules have other options. Raises CannotTell.
    """
    config = module.quantisation
    refuse_rotation(config)
    module.refuse_others((".qweight", ".qzeros", ".scales", ".g_idx"))
    codes, zeros, scales = (module.require(ending) for ending in (".qweight", ".qzeros", ".scales"))
    bits = _find_bits(config, codes, zeros, overrides)
    cols, rows = codes.shape[0] * WORD // bits, codes.shape[1]
    groups = zeros.shape[0]
    if scales.shape != (groups, rows) or scales.dtype not in ("F16", "BF16", "F32"):
        raise CannotTell(f"{scales.name} of shape {list(scales.shape)} does not fit {groups} groups of {rows} rows")
    size = read_count(config, "group_size")
    if config.get(overrides) and cols % groups == 0 and -(-cols // max(size, 1)) != groups:
        size = cols // groups
    column_groups = find_groups(size, cols, groups, module.find(".g_idx"), config.get("desc_act") is True)
    packing = GptqPacking(codes, zeros, bits, minus_one, one_way)
    layout = f"{name}, {bits} bits, groups of {column_groups.size}"
    return GroupedMatrix(module.weight, layout, (rows, cols), bits, packing, column_groups, scales)


def refuse_rotation(config: Mapping[str, object]) -> None:
    """Raise CannotTell if the config declares that the weights were rotated before they were quantised."""
    for key in ("rotation", "rotation_config"):
        if config.get(key):
            raise CannotTell(f"{key} in config.json says that the weights were rotated")


def _find_bits(config: Mapping[str, object], codes: ModuleTensor, zeros: ModuleTensor, overrides: str) -> int:
    """Return the width of a code. Raises CannotTell if it does not fit the shapes of the tensors."""
    if not (codes.dtype == zeros.dtype == "I32" and len(codes.shape) == len(zeros.shape) == 2 and codes.count):
        raise CannotTell(f"{codes.name} and {zeros.name} are not matrices of I32")
    declared = read_count(config, "bits")
    fitting = [
        bits
        for bits in BITS
        if codes.shape[1] * bits == zeros.shape[1] * WORD and codes.shape[0] * WORD % bits == 0 and zeros.shape[0]
    ]
    if declared in fitting:
        return declared
    if len(fitting) == 1 and config.get(overrides):
        return fitting[0]
    shapes = f"{list(codes.shape)} and {list(zeros.shape)}"
    raise CannotTell(f"{declared} bits do not fit the shapes {shapes} of {codes.name} and {zeros.name}")
