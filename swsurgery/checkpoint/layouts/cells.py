"""Define what a layout knows about one element of a quantised matrix: where its code is, and what each code means.

A *code* is the unsigned integer that the bits of one element form. The *grid* of an element is the set of values that
it can have: one value for each code, under the stored scale and zero point.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple, Protocol

from swsurgery.errors import NumberError
from swsurgery.storage.arrays import Doubles
from swsurgery.storage.numbers import format_exact

ReadBytes = Callable[[str, int, int], bytes]
"""Type of a function that reads the data of a stored tensor: (name, first byte, number of bytes) -> bytes."""


class CannotTell(Exception):
    """Raised if the headers or the config do not decide how a quantised weight is stored. The message is the reason."""


class BitField(NamedTuple):
    """Consecutive bits of a stored tensor.

    `start` is the number of the first bit, counted from the first byte of the tensor's data and in each byte from the
    least significant bit. As all integers are stored little-endian, bit 35 of a tensor of I32 is bit 3 of its second
    word.
    """

    tensor: str
    start: int
    width: int


@dataclass(frozen=True)
class Cell:
    """One element of a quantised matrix.

    `fields` are the bits of its code, the least significant bits first. `values` contains the value of each code, in
    the order of the codes; NaN or infinity is the value of a code that is no number. `scale` is the factor by which a
    code of this element is multiplied, for messages.

    In some layouts, one code stands for several elements. Such an element has no fields, and `values` contains only its
    present value. `refusal` then explains why no other value can be stored.
    """

    fields: tuple[BitField, ...]
    values: Sequence[float]
    scale: float
    refusal: str = ""

    @cached_property
    def grid(self) -> list[tuple[float, int]]:
        """The finite values with their codes, sorted by value. If codes share a value, only the smallest is listed."""
        smallest: dict[float, int] = {}
        for code, value in enumerate(self.values):
            if math.isfinite(value):
                smallest.setdefault(value, code)
        return sorted(smallest.items())

    def read_code(self, read: ReadBytes) -> int:
        """Read the code of this element."""
        code = known = 0
        for tensor, start, width in self.fields:
            first, last = start // 8, (start + width - 1) // 8
            data = int.from_bytes(read(tensor, first, last - first + 1), "little")
            code |= (data >> start % 8 & (1 << width) - 1) << known
            known += width
        return code

    def find_nearest(self, wanted: float) -> int:
        """Return the code whose value is nearest to `wanted`; of two equally near values, the one nearer to zero.

        Raises NumberError if `wanted` is not finite, or is not between the smallest and the largest value of the grid.
        Also raises it if the element has no code of its own.
        """
        self._require_code()
        values = [value for value, _ in self.grid]
        if not values:
            raise NumberError("no code of this element has a finite value")
        if not (math.isfinite(wanted) and values[0] <= wanted <= values[-1]):
            what = f"{format_exact(wanted)} is outside the grid of this element"
            raise NumberError(f"{what}, {format_exact(values[0])} to {format_exact(values[-1])}")
        at = bisect_left(values, wanted)
        near = self.grid[max(at - 1, 0) : at + 1]
        exact = Fraction(wanted)  # a difference of two float64 numbers could be rounded
        return min(near, key=lambda entry: (abs(Fraction(entry[0]) - exact), abs(entry[0])))[1]

    def find_zero(self) -> int:
        """Return the code whose value is 0.

        Raises NumberError if none has, or if the element has no code of its own.
        """
        self._require_code()
        code = next((code for value, code in self.grid if value == 0), None)
        if code is None:
            remedy = "use set with value: 0, which stores the nearest code"
            raise NumberError("no code of this element has the value 0", remedy=remedy)
        return code

    def _require_code(self) -> None:
        """Raise NumberError if the element has no code of its own."""
        if self.refusal:
            raise NumberError(self.refusal)

    def compute_step(self, value: float) -> float:
        """Return the larger of the distances from `value` to the next smaller and larger value of the grid.

        Returns 0 if the grid has fewer than two values.
        """
        values = [v for v, _ in self.grid]
        at = bisect_left(values, value)
        below = value - values[at - 1] if at > 0 else 0.0
        above = next((v - value for v in values[at : at + 2] if v > value), 0.0)
        return max(below, above)


class QuantisedMatrix(Protocol):
    """The weight that the tensors of one quantised module encode.

    `weight` is the name that the weight has in a loaded model, such as "model.layers.2.mlp.down_proj.weight". `shape`
    is the shape of this weight, [rows, cols] or [experts, rows, cols]. `layout` names the layout for messages, such as
    "compressed-tensors pack-quantized, 4 bits, groups of 128".
    """

    @property
    def layout(self) -> str: ...

    @property
    def weight(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def find_cell(self, index: tuple[int, ...]) -> Cell:
        """Find the element at `index`, and read its scale and its zero point.

        `index` must be in range. Raises CannotTell if the stored numbers do not decide what the element is.
        """

    def dequantise(self, begin: int, end: int) -> Doubles:
        """Return the values of the rows `begin` to `end` (excluded) as float64 [end - begin, cols].

        All axes before the last are joined into one axis of rows. The value of an element equals
        `find_cell(index).values[code]`.
        """
