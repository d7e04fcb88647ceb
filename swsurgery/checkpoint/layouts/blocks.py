"""Define matrices of elements (value of the code - zero point) * scale, with one scale for each block of elements.

Most layouts are of this kind. They differ in where the codes, the scales and the zero points are stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from swsurgery.checkpoint.layouts.cells import CannotTell, Cell
from swsurgery.checkpoint.layouts.module import ModuleTensor, decode_exponent
from swsurgery.checkpoint.layouts.packing import PackedRows
from swsurgery.storage.arrays import Doubles


class BlockNumbers(Protocol):
    """Numbers in rows and columns: one number, such as a scale, for each block of a matrix."""

    def read_number(self, row: int, col: int) -> float:
        """Read one number. Raises CannotTell if it is not finite."""

    def read_numbers(self, begin: int, end: int) -> Doubles:
        """Read the rows `begin` to `end` (excluded), as float64 [end - begin, columns]. Raises CannotTell."""


@dataclass(frozen=True)
class StoredNumbers:
    """Block numbers that are the elements of a tensor, multiplied by `factor` and divided by `divisor`.

    If `exponents` is True, each byte of the tensor is the exponent of a power of two, as in E8M0. If `single` is True,
    the factor and the divisor are float32 numbers, and every result is rounded to float32.
    """

    tensor: ModuleTensor
    cols: int
    exponents: bool = False
    factor: float = 1.0
    divisor: float = 1.0
    single: bool = False

    def read_number(self, row: int, col: int) -> float:
        if not self.exponents:
            at = self.tensor.info.unflatten(row * self.cols + col)
            return float(self._adjust(np.array([self.tensor.read_number(at)]))[0])
        value = decode_exponent(self.tensor.read(self.tensor.name, row * self.cols + col, 1)[0])
        return float(self._adjust(np.array([value]))[0])

    def read_numbers(self, begin: int, end: int) -> Doubles:
        first, last = begin * self.cols, end * self.cols
        if self.exponents:
            table = np.array([decode_exponent(byte) for byte in range(256)])
            numbers = table[self.tensor.read_words(first, last)]
        else:
            numbers = self.tensor.read_numbers(first, last)
        return self._adjust(numbers).reshape(end - begin, self.cols)

    def _adjust(self, numbers: Doubles) -> Doubles:
        """Apply the factor and the divisor. Raises CannotTell if a result is not finite."""
        with np.errstate(over="ignore", invalid="ignore"):
            if self.single:
                singles = numbers.astype(np.float32) * np.float32(self.factor) / np.float32(self.divisor)
                results = singles.astype(np.float64)
            else:
                results = numbers * self.factor / self.divisor
        if not np.isfinite(results).all():
            raise CannotTell(f"{self.tensor.name} contains a number that is not finite, so its block has no values")
        return results


@dataclass(frozen=True)
class ColumnOrder:
    """The group of each column of a matrix, if the columns of a group are not adjacent (`weight_g_idx`).

    Each of `count` groups has `size` columns.
    """

    tensor: ModuleTensor
    size: int
    count: int

    @cached_property
    def groups(self) -> NDArray[np.intp]:
        """The group of each column. Raises CannotTell if a group has another number of columns."""
        groups = self.tensor.read_numbers(0, self.tensor.count).astype(np.intp)
        if groups.min() < 0 or groups.max() >= self.count or (np.bincount(groups) != self.size).any():
            raise CannotTell(f"{self.tensor.name} does not assign {self.size} columns to each of {self.count} groups")
        return groups


@dataclass(frozen=True)
class Blocks:
    """The numbers that belong to the blocks of a matrix, one for each block of `height` x `width` elements.

    `rows` is the number of rows of one matrix. If several matrices are stacked, each begins with a new row of blocks.
    If `order` is given, it contains the group of each column.
    """

    numbers: BlockNumbers
    rows: int
    height: int
    width: int
    order: ColumnOrder | None = None

    def find_number(self, row: int, col: int) -> float:
        """Read the number that belongs to one element. Raises CannotTell if it is not finite."""
        matrix, row = divmod(row, self.rows)
        block = col // self.width if self.order is None else int(self.order.groups[col])
        return self.numbers.read_number(matrix * -(-self.rows // self.height) + row // self.height, block)

    def read_rows(self, begin: int, end: int, columns: NDArray[np.intp]) -> Doubles:
        """Read the numbers that belong to the elements of rows and columns, as float64 [end - begin, columns]."""
        matrix, row = np.divmod(np.arange(begin, end), self.rows)
        block = matrix * -(-self.rows // self.height) + row // self.height
        numbers = self.numbers.read_numbers(int(block[0]), int(block[-1]) + 1)
        groups = columns // self.width if self.order is None else self.order.groups[columns]
        spread: Doubles = numbers[(block - block[0])[:, None], groups[None, :]]
        return spread


@dataclass(frozen=True)
class BlockMatrix:
    """A matrix whose elements are (value of the code - zero point) * scale.

    `table` contains the value of each code. `shape` is [rows, cols] or [matrices, rows, cols]. Zero points are
    subtracted only if `zeros` is not None.
    """

    weight: str
    layout: str
    shape: tuple[int, ...]
    codes: PackedRows
    table: tuple[float, ...]
    scales: Blocks
    zeros: Blocks | None = None

    def find_cell(self, index: tuple[int, ...]) -> Cell:
        *above, row, col = index
        row += above[0] * self.shape[-2] if above else 0
        scale = self.scales.find_number(row, col)
        zero = 0.0 if self.zeros is None else self.zeros.find_number(row, col)
        return Cell((self.codes.find(row, col),), [(value - zero) * scale for value in self.table], scale)

    def dequantise(self, begin: int, end: int) -> Doubles:
        return self.compute_part(begin, end, np.arange(self.shape[-1]))

    def compute_part(self, begin: int, end: int, columns: NDArray[np.intp]) -> Doubles:
        """Return the values of some columns of the rows `begin` to `end`, as float64 [end - begin, columns]."""
        if begin == end:
            return np.zeros((0, len(columns)))
        values: Doubles = self._values[self.codes.read_rows(begin, end)[:, columns]]
        with np.errstate(over="ignore", invalid="ignore"):  # a code may mean infinity or NaN
            if self.zeros is not None:
                values -= self.zeros.read_rows(begin, end, columns)
            values *= self.scales.read_rows(begin, end, columns)
        return values

    @cached_property
    def _values(self) -> Doubles:
        return np.array(self.table, np.float64)


@dataclass(frozen=True)
class TransposedMatrices:
    """Matrices that are stored transposed: [matrix, col, row] of the weight is [matrix, row, col] of `stored`."""

    stored: BlockMatrix

    @property
    def weight(self) -> str:
        return self.stored.weight

    @property
    def layout(self) -> str:
        return self.stored.layout

    @property
    def shape(self) -> tuple[int, ...]:
        matrices, rows, cols = self.stored.shape
        return matrices, cols, rows

    def find_cell(self, index: tuple[int, ...]) -> Cell:
        matrix, col, row = index
        return self.stored.find_cell((matrix, row, col))

    def dequantise(self, begin: int, end: int) -> Doubles:
        _, cols, rows = self.shape
        parts = [np.zeros((0, rows))]
        while begin < end:
            matrix, first = divmod(begin, cols)
            last = min(cols, first + end - begin)
            wanted = np.arange(first, last)
            parts.append(self.stored.compute_part(matrix * rows, (matrix + 1) * rows, wanted).T)
            begin += last - first
        return np.concatenate(parts)


def require_matrix(tensor: ModuleTensor, *, stacked: bool = False) -> None:
    """Raise CannotTell if a tensor is not a matrix, or has no elements.

    With `stacked`, the tensor may have one more axis, which counts matrices.
    """
    if len(tensor.shape) not in ((2, 3) if stacked else (2,)) or math.prod(tensor.shape) == 0:
        raise CannotTell(f"{tensor.name} of shape {list(tensor.shape)} is not a matrix")


def make_shape_error(tensor: ModuleTensor, what: str) -> CannotTell:
    """Make the exception for a tensor whose shape does not fit `what`."""
    return CannotTell(f"{tensor.name} of shape {list(tensor.shape)} does not fit {what}")
