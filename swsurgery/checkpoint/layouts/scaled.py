"""Read F8 and I8 weights that are multiplied by one scale per tensor, row or block.

Covers `weight_scale` and `weight_scale_inv` (DeepSeek-V3, transformers' fine-grained FP8, compressed-tensors'
float-quantized and int-quantized without zero points) and `SCB` (LLM.int8).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swsurgery.checkpoint.layouts.cells import BitField, CannotTell, Cell
from swsurgery.checkpoint.layouts.codes import decode_codes
from swsurgery.checkpoint.layouts.module import ModuleTensor, QuantisedModule
from swsurgery.storage.arrays import Doubles


@dataclass(frozen=True)
class ScaledMatrix:
    """A matrix of F8 or I8 codes, of which each block of `block` elements (one length per axis) shares a scale.

    `divisor` is the number by which scales are divided: LLM.int8 stores the largest magnitude of a row, which is 127
    steps (arXiv:2208.07339, section 2.1).
    """

    weight: str
    layout: str
    codes: ModuleTensor
    scales: ModuleTensor
    block: tuple[int, ...]
    divisor: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.codes.shape

    def find_cell(self, index: tuple[int, ...]) -> Cell:
        scale = self.scales.read_number(self._find_scale(index)) / self.divisor
        at = BitField(self.codes.name, self.codes.info.flatten(index) * 8, 8)
        return Cell((at,), [value * scale for value in decode_codes(self.codes.info.dtype)], scale)

    def dequantise(self, begin: int, end: int) -> Doubles:
        *above, cols = self.shape
        values = self.codes.read_numbers(begin * cols, end * cols).reshape(end - begin, cols)
        for number in range(begin, end):
            values[number - begin] *= self._read_row_scales(np.unravel_index(number, above), cols)
        return values

    def _find_scale(self, index: tuple[int, ...]) -> tuple[int, ...]:
        """Return the index of the scale of an element, or of the first element of a row without its last axis."""
        if self.scales.count == 1:
            return (0,) * len(self.scales.shape)
        place = tuple(i // size for i, size in zip(index, self.block, strict=True))
        return place[: len(self.scales.shape)]

    def _read_row_scales(self, row: Sequence[np.intp], cols: int) -> Doubles:
        """Return the scales of one row's elements, as float64 [cols]."""
        first = self.scales.info.flatten(self._find_scale((*map(int, row), 0)))
        count = self.scales.shape[-1] if len(self.scales.shape) == len(self.shape) else 1
        scales = self.scales.read_numbers(first, first + count)
        return np.repeat(scales, self.block[-1])[:cols] / self.divisor


def find_scaled(module: QuantisedModule) -> ScaledMatrix | None:
    """Recognise a weight whose scale checkpoint/quantised.py has found.

    Raises CannotTell if the scale does not fit the weight, or if the matrix is not stored row by row.
    """
    if module.scale is None:
        return None
    codes = ModuleTensor(module.tensors[module.weight], module.read)
    scales = ModuleTensor(module.tensors[module.scale], module.read)
    if scales.info.dtype.kind != "float":
        raise CannotTell(f"the scale {scales.name} is stored as {scales.dtype}, which is not a floating-point dtype")
    is_int8 = scales.name.endswith(".SCB")
    if is_int8:
        _refuse_turned(module)
    block = _find_block(module, codes.shape, scales)
    name = "LLM.int8" if is_int8 else f"{codes.dtype} with {scales.name.rpartition('.')[2]}"
    return ScaledMatrix(module.weight, name, codes, scales, block, 127 if is_int8 else 1)


def _find_block(module: QuantisedModule, shape: tuple[int, ...], scales: ModuleTensor) -> tuple[int, ...]:
    """Return the lengths of the blocks that share a scale, one for each axis. Raises CannotTell."""
    if scales.count == 1:
        return tuple(max(length, 1) for length in shape)
    if len(scales.shape) == 1 and scales.shape == shape[:1]:
        return (1, *(max(length, 1) for length in shape[1:]))
    if len(scales.shape) != len(shape):
        what = f"the scale {scales.name} of shape {list(scales.shape)} does not fit the weight of shape {list(shape)}"
        raise CannotTell(what)
    pairs = list(zip(shape, scales.shape, strict=True))
    said = module.quantisation.get("weight_block_size")
    if isinstance(said, list) and len(said) == 2 and all(type(n) is int and n > 0 for n in said):
        block = (*(1,) * (len(shape) - 2), *said)
        if all(-(-length // size) == count for (length, count), size in zip(pairs, block, strict=True)):
            return block
    if any(count == 0 or length % count for length, count in pairs):
        what = f"the shape {list(scales.shape)} of {scales.name} does not show which scale belongs to which block"
        raise CannotTell(what)
    return tuple(length // count for length, count in pairs)


def _refuse_turned(module: QuantisedModule) -> None:
    """Raise CannotTell if the `weight_format` of bitsandbytes is not 0: the matrix is then not stored by rows."""
    form = module.find(".weight_format")
    if form is None:
        return
    if form.count != 1:
        raise CannotTell(f"{form.name} does not contain exactly one number")
    if any(form.read(form.name, 0, form.info.size)):
        raise CannotTell(f"according to {form.name}, the matrix is not stored row by row")
