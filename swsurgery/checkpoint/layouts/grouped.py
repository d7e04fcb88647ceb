"""Define matrices of integer codes with a scale and a zero point for each output feature and group of input features.

GPTQ and AWQ share this arithmetic. They differ in the places of the codes and in the encoding of zero points. A
`Packing` describes both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from swsurgery.checkpoint.layouts.cells import BitField, CannotTell, Cell
from swsurgery.checkpoint.layouts.codes import Codes, list_integers
from swsurgery.checkpoint.layouts.module import ModuleTensor
from swsurgery.storage.arrays import Doubles

Groups = NDArray[np.intp]


class Packing(Protocol):
    """The places of the codes of a matrix [rows, cols], and its zero points."""

    def list_fields(self, row: int, col: int) -> tuple[BitField, ...]:
        """Return the bits of the code of one element, low bits first."""

    def read_codes(self, begin: int, end: int) -> Codes:
        """Read the codes of the rows `begin` to `end` (excluded), as [end - begin, cols]."""

    def read_zero(self, group: int, row: int) -> float:
        """Read the zero point of one row and group. Returns NaN if the stored bits do not decide it."""

    def read_zeros(self, begin: int, end: int) -> Doubles:
        """Read the zero points of the rows `begin` to `end` (excluded), as float64 [groups, end - begin]."""


@dataclass(frozen=True)
class ColumnGroups:
    """The group of each column of a matrix.

    Without `order`, each group is `size` consecutive columns. If `order` (`g_idx`) is given, it contains the group of
    each column. The columns of a group need not be consecutive if `free` is True.
    """

    size: int
    count: int
    order: ModuleTensor | None = None
    free: bool = False

    def find(self, col: int) -> int:
        """Return the group of a column. Raises CannotTell if `order` contains a number that is not permitted."""
        if self.order is None:
            return col // self.size
        group = int(self.order.read_number((col,)))
        self._refuse_bad(np.array([group]), col)
        return group

    def list_all(self, cols: int) -> Groups:
        """Return the group of each column, as [cols]. Raises CannotTell like `find`."""
        if self.order is None:
            return np.arange(cols, dtype=np.intp) // self.size
        groups = self.order.read_numbers(0, cols).astype(np.intp)
        self._refuse_bad(groups, 0)
        return groups

    def _refuse_bad(self, groups: Groups, first: int) -> None:
        """Raise CannotTell if the groups of the columns from `first` on are not permitted."""
        assert self.order is not None
        if groups.min(initial=0) < 0 or groups.max(initial=0) >= self.count:
            raise CannotTell(f"{self.order.name} names a group that does not exist")
        if not self.free and (groups != np.arange(first, first + len(groups)) // self.size).any():
            raise CannotTell(f"{self.order.name} reorders the groups, but desc_act in config.json is not true")


@dataclass(frozen=True)
class GroupedMatrix:
    """A matrix whose elements have the value (code - zero point) * scale. `scales` has the shape [groups, rows]."""

    weight: str
    layout: str
    shape: tuple[int, ...]
    bits: int
    packing: Packing
    column_groups: ColumnGroups
    scales: ModuleTensor

    def find_cell(self, index: tuple[int, ...]) -> Cell:
        row, col = index
        group = self.column_groups.find(col)
        zero = self.packing.read_zero(group, row)
        if np.isnan(zero):
            raise CannotTell(self._explain_zero())
        scale = self.scales.read_number((group, row))
        integers = list_integers(self.bits, zero, offset=False)
        return Cell(self.packing.list_fields(row, col), [n * scale for n in integers], scale)

    def dequantise(self, begin: int, end: int) -> Doubles:
        groups = self.column_groups.list_all(self.shape[1])
        zeros = self.packing.read_zeros(begin, end)
        if np.isnan(zeros).any():
            raise CannotTell(self._explain_zero())
        values = self.packing.read_codes(begin, end) - zeros[groups].T
        values *= self._read_scales(begin, end)[groups].T
        return values

    def _read_scales(self, begin: int, end: int) -> Doubles:
        """Read the scales of the rows `begin` to `end` (excluded), as float64 [groups, end - begin]."""
        groups, rows = self.scales.shape
        scales = self.scales.read_numbers(0, groups * rows).reshape(groups, rows)[:, begin:end]
        if not np.isfinite(scales).all():
            raise CannotTell(f"{self.scales.name} contains a number that is not finite")
        return scales

    def _explain_zero(self) -> str:
        """Explain why a zero point is NaN."""
        return f"exporters and readers disagree about the zero points of {self.weight}, which are stored minus one"


def read_count(config: Mapping[str, object], key: str) -> int:
    """Return an integer of the config. Raises CannotTell if it is missing or no integer."""
    value = config.get(key)
    if type(value) is not int:
        raise CannotTell(f"{key} in config.json is not an integer")
    return value


def find_groups(module_size: int, cols: int, groups: int, order: ModuleTensor | None, free: bool) -> ColumnGroups:
    """Return the groups of `cols` columns.

    `module_size` is the declared group size; -1 means one group for all columns. Raises CannotTell if the groups do not
    fit the shapes.
    """
    size = cols if module_size == -1 else module_size
    if size <= 0 or -(-cols // size) != groups:
        raise CannotTell(f"{groups} groups are stored, which do not fit {cols} columns in groups of {module_size}")
    if order is not None and (order.dtype not in ("I32", "I64") or order.shape != (cols,)):
        raise CannotTell(f"{order.name} does not contain one integer for each of {cols} columns")
    if order is None and free:
        raise CannotTell("desc_act in config.json is true, but no g_idx is stored")
    return ColumnGroups(size, groups, order, free)
