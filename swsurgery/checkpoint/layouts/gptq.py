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

from collections.abc import Mapping, Sequence
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
    options = _list_options(config, overrides)
    bits = _find_bits(options, codes, zeros)
    cols, rows = codes.shape[0] * WORD // bits, codes.shape[1]
    groups = zeros.shape[0]
    if scales.shape != (groups, rows) or scales.dtype not in ("F16", "BF16", "F32"):
        raise CannotTell(f"{scales.name} of shape {list(scales.shape)} does not fit {groups} groups of {rows} rows")
    order = module.find(".g_idx")
    size = _find_group_size(options, cols, groups, order)
    free = any(each.get("desc_act") is True for each in options)
    column_groups = find_groups(size, cols, groups, order, free)
    packing = GptqPacking(codes, zeros, bits, minus_one, one_way)
    layout = f"{name}, {bits} bits, groups of {column_groups.size}"
    return GroupedMatrix(module.weight, layout, (rows, cols), bits, packing, column_groups, scales)


def refuse_rotation(config: Mapping[str, object]) -> None:
    """Raise CannotTell if the config declares that the weights were rotated before they were quantised."""
    for key in ("rotation", "rotation_config"):
        if config.get(key):
            raise CannotTell(f"{key} in config.json says that the weights were rotated")


Options = Sequence[Mapping[str, object]]
"""The options that a module may have: those of the config, and those that the config states for some modules.

The patterns that say for which modules the latter are, are not compared with names: config.json is not trusted, and a
pattern can take very long. The shapes of the tensors decide between the options instead.
"""


def _list_options(config: Mapping[str, object], overrides: str) -> Options:
    """Return the options of the config, and those under the key `overrides`, each completed by those of the config."""
    found = config.get(overrides)
    others = found.values() if isinstance(found, Mapping) else ()
    return [config, *({**config, **each} for each in others if isinstance(each, Mapping))]


def _list_stated(options: Options, key: str) -> list[int]:
    """Return the different integers that the options state under a key. Raises CannotTell if the config states none."""
    others = (each.get(key) for each in options[1:])
    return list(dict.fromkeys([read_count(options[0], key), *(n for n in others if type(n) is int)]))


def _find_group_size(options: Options, cols: int, groups: int, order: ModuleTensor | None) -> int:
    """Return the group size that fits the number of groups of a module. Raises CannotTell if several fit.

    If none fits, returns the size of the config, which `find_groups` refuses. An order of columns that starts with the
    first group decides between several sizes; the order of act-order does not depend on the size.
    """
    stated = _list_stated(options, "group_size")
    fitting = [size for size in stated if _fits(size, cols, groups)]
    whole = [size for size in fitting if order is not None and _is_consecutive(order, size, cols)]
    if len(fitting) < 2 or order is not None and not whole:
        return fitting[0] if fitting else stated[0]
    if len(whole) == 1:
        return whole[0]
    sizes = " and ".join(map(str, fitting))
    raise CannotTell(f"config.json states the group sizes {sizes} for some modules, and each fits {groups} groups")


def _fits(size: int, cols: int, groups: int) -> bool:
    """Return True if `cols` columns in groups of `size` are `groups` groups; -1 means one group."""
    return groups == 1 if size == -1 else size > 0 and -(-cols // size) == groups


def _is_consecutive(order: ModuleTensor, size: int, cols: int) -> bool:
    """Return True if an order of columns has groups of `size` consecutive columns."""
    if order.dtype not in ("I32", "I64") or order.shape != (cols,):
        return False  # find_groups refuses it
    expected = np.arange(cols) // (cols if size == -1 else size)
    return bool((order.read_numbers(0, cols) == expected).all())


def _find_bits(options: Options, codes: ModuleTensor, zeros: ModuleTensor) -> int:
    """Return the width of a code. Raises CannotTell if it does not fit the shapes of the tensors."""
    if not (codes.dtype == zeros.dtype == "I32" and len(codes.shape) == len(zeros.shape) == 2 and codes.count):
        raise CannotTell(f"{codes.name} and {zeros.name} are not matrices of I32")
    stated = _list_stated(options, "bits")
    fitting = [
        bits
        for bits in stated
        if codes.shape[1] * bits == zeros.shape[1] * WORD and codes.shape[0] * WORD % bits == 0 and zeros.shape[0]
    ]
    if not fitting:
        shapes = f"{list(codes.shape)} and {list(zeros.shape)}"
        widths = " or ".join(map(str, stated))
        raise CannotTell(f"{widths} bits do not fit the shapes {shapes} of {codes.name} and {zeros.name}")
    if fitting[0] not in BITS:
        raise CannotTell(
            f"codes of {fitting[0]} bits are stored in a way that is not read ({', '.join(map(str, BITS))} are)"
        )
    return fitting[0]
