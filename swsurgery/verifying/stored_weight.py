"""Read one weight of a checkpoint: its value, its code if it is quantised, and the distance to the next values.

checkpoint/quantised.py decides whether a stored number is a weight, a code of a quantiser, or neither. The layouts give
codes their values. A weight whose layout is not certain is unreadable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.layouts.cells import CannotTell, Cell
from swsurgery.checkpoint.layouts.find import find_matrix, make_reader
from swsurgery.storage import dtypes
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import Dtype, FloatDtype


class Unreadable(Exception):
    """Raised if a coordinate cannot be read as one number. The message gives the reason."""


@dataclass(frozen=True)
class PlainWeight:
    """A weight that is stored as one float. `raw` are its bytes."""

    value: float
    dtype: Dtype
    raw: bytes

    @cached_property
    def step(self) -> float:
        """Distance from the value to the next larger magnitude of the dtype; 0 if the value is not finite."""
        return compute_spacing(self.dtype, self.value) if math.isfinite(self.value) else 0.0


@dataclass(frozen=True)
class CodedWeight:
    """A weight that is stored as a code. `layout` describes the layout of its matrix, and `cell` its grid.

    `code` is None if the weight has no code of its own, because one code stands for several elements.
    """

    value: float
    layout: str
    cell: Cell
    code: int | None

    @cached_property
    def step(self) -> float:
        """The larger of the distances to the two neighbouring values of the grid; 0 if there is no other value."""
        return self.cell.compute_step(self.value) if math.isfinite(self.value) else 0.0

    def is_nearest(self, wanted: float, slack: float = 0.0) -> bool:
        """Return True if the stored value is the nearest one of the grid to a number from wanted - slack to + slack.

        For a number outside the grid, such as a maximum that was rounded with its scale, the last value of the grid
        counts only if the number is at most one step away from it.
        """
        values = [value for value, _ in self.cell.grid]
        if self.code is None or not values or abs(self.value - wanted) > self.step + slack:
            return False
        ends = (min(max(end, values[0]), values[-1]) for end in (wanted - slack, wanted + slack))
        low, high = (self.cell.values[self.cell.find_nearest(end)] for end in ends)
        return low <= self.value <= high


StoredWeight = PlainWeight | CodedWeight


def read_weight(checkpoint: Checkpoint, coordinate: Coordinate) -> StoredWeight:
    """Read one weight, whose index is in range. Raises Unreadable."""
    name, index = coordinate
    try:
        matrix = find_matrix(checkpoint, name)
        if matrix is not None:
            cell = matrix.find_cell(index)
            code = cell.read_code(make_reader(checkpoint))
            return CodedWeight(cell.values[code], matrix.layout, cell, code if cell.fields else None)
    except CannotTell as error:
        raise Unreadable(str(error)) from None
    info = checkpoint.get_info(name)
    reading = checkpoint.quantisation.get_reading(name)
    if reading.kind == "internal":
        raise Unreadable(f"{name} does not contain weights: {reading.reason}")
    if info.dtype.kind != "float":
        raise Unreadable(f"{name} is stored as {info.dtype.name} and has no scale, so its values are unknown")
    raw = checkpoint.shards[checkpoint.weight_map[name]].read_scalar(name, index)
    return PlainWeight(float(dtypes.decode(info.dtype, raw)), info.dtype, raw)


def compute_spacing(dtype: Dtype, value: float) -> float:
    """Return the distance from `value` to the next larger magnitude in a float dtype."""
    if not isinstance(dtype, FloatDtype):
        raise ValueError(f"{dtype.name} is not a floating-point dtype")
    exponent = max(math.frexp(value)[1] - 1, 1 - dtype.bias) if value else 1 - dtype.bias
    return math.ldexp(1.0, exponent - dtype.mantissa)
