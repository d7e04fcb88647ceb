"""Map values to positions in a figure, and choose the ticks of an axis.

All functions are pure. They know nothing of SVG.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["linear", "log", "signed"]
"""A linear scale, a logarithmic scale for values above 0, or a scale for values of both signs that is linear near 0."""

MAX_TICKS = 6
"""Maximum number of ticks of an axis, about."""


@dataclass(frozen=True)
class Axis:
    """A map from the values `low` to `high` to the positions `begin` to `end`, in units of the figure.

    On a "signed" scale, values of a magnitude below `threshold` are spaced about evenly, and larger ones by logarithm.
    """

    kind: Kind
    low: float
    high: float
    begin: float
    end: float
    threshold: float = 1.0

    def find_position(self, value: float) -> float:
        """Return the position of a value. A value outside the scale gets the position of the nearest end."""
        low, high = self._warp(self.low), self._warp(self.high)
        share = (self._warp(min(max(value, self.low), self.high)) - low) / (high - low)
        return self.begin + share * (self.end - self.begin)

    def list_ticks(self) -> list[float]:
        """Return round values from `low` to `high`."""
        ticks = {"linear": self._list_even, "log": self._list_powers, "signed": self._list_signed}[self.kind]()
        return [tick for tick in ticks if self.low <= tick <= self.high]

    def _warp(self, value: float) -> float:
        if self.kind == "log":
            return math.log10(value)
        return math.asinh(value / self.threshold) if self.kind == "signed" else value

    def _list_even(self) -> list[float]:
        step = find_step((self.high - self.low) / MAX_TICKS)
        first = math.ceil(self.low / step)
        return [round((first + number) * step, 12) for number in range(2 * MAX_TICKS)]

    def _list_powers(self) -> list[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        if last - first > 2:
            return [10.0**power for power in range(first, last + 1, 1 + (last - first) // MAX_TICKS)]
        ticks = [step * 10.0**power for power in range(first, last + 1) for step in (1, 2, 5)]
        return ticks if sum(self.low <= tick <= self.high for tick in ticks) > 1 else self._list_even()

    def _list_signed(self) -> list[float]:
        largest = max(abs(self.low), abs(self.high))
        powers = max(1, math.ceil(math.log10(max(largest / self.threshold, 1.0))))
        sizes = [self.threshold * 10.0**power for power in range(0, powers + 1, 1 + powers // 4)]
        return [*(-size for size in reversed(sizes)), 0.0, *sizes]


def find_step(size: float) -> float:
    """Return the smallest of 1, 2 and 5 times a power of ten that is at least `size`."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= size * (1 - 1e-9))


def make_scale(values: Iterable[float | None], kind: Kind, begin: float, end: float) -> Axis:
    """Make a scale that contains all finite values, with a margin. A linear or signed scale contains 0.

    A logarithmic scale leaves out values that are not above 0.
    """
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if kind == "log":
        positive = [value for value in finite if value > 0] or [1.0]
        low, high = min(positive), max(positive)
        margin = max((high / low) ** 0.08, 1.15)
        return Axis(kind, max(low / margin, 1e-300), min(high * margin, 1e300), begin, end)
    low, high = min([0.0, *finite]), max([0.0, *finite])
    if low == high:
        high = 1.0
    if kind == "signed":
        sizes = sorted(abs(value) for value in finite if value) or [1.0]
        threshold = 10.0 ** math.ceil(math.log10(sizes[len(sizes) // 5]))  # a few small values are near 0
        return Axis(kind, 1.6 * low, 1.6 * high, begin, end, min(threshold, max(-low, high)))
    margin = 0.06 * (high - low)
    return Axis(kind, low - margin if low < 0 else 0.0, high + margin, begin, end)
