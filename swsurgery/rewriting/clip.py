"""Limit the scalars of a region to a threshold, by z-score, fraction or interquartile range.

Section 4 of "The Super Weight in Large Language Models" (arXiv:2411.07191) clips by z-score before rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from swsurgery.errors import NumberError
from swsurgery.rewriting.function import Source
from swsurgery.rewriting.kept import Indices, KeptScalars
from swsurgery.rewriting.scope import TENSOR, Grouping, find_pieces, gather, scatter
from swsurgery.rewriting.statistics import (
    add_rows,
    check_piece,
    count_fraction,
    count_scalars,
    find_largest,
    find_ordered,
    measure_moments,
)
from swsurgery.storage.arrays import (
    Doubles,
    Words,
    decode_doubles,
    encode_doubles,
    find_magnitudes,
    get_word_type,
    has_not_finite,
    order_words,
    require_float,
    restore_words,
)
from swsurgery.storage.dtypes import Dtype, FloatDtype

Rule = Literal["z", "fraction", "iqr"]
Keys = NDArray[np.int64]


@dataclass(frozen=True)
class ClipLimits:
    """The lowest and the highest permitted scalar of each group, as the ordered integers of `order_words`.

    Both are arrays with one entry per group.
    """

    low: Keys
    high: Keys


@dataclass(frozen=True)
class ClipFunction:
    """Limit values to a threshold. A value beyond it becomes the threshold, with its sign.

    - `z`: |w| is limited to mean(|w|) + amount * std(|w|), with the population standard deviation.
    - `fraction`: the largest |w| are limited to the largest one that remains. Their number is the fraction of the
      group, rounded down.
    - `iqr`: w is limited to the Tukey fences Q1 - amount * (Q3 - Q1) and Q3 + amount * (Q3 - Q1) of the signed values.
      Quartiles are interpolated linearly between neighbours, as `numpy.quantile` does by default.

    Means, deviations and fences are computed in float64. A threshold is rounded towards the interior (towards zero for
    `z`) to a value of the stored dtype, so that no result exceeds the exact threshold, and clipping a second time at
    the same threshold changes nothing.
    """

    rule: Rule
    amount: float
    scope: Grouping = TENSOR
    kept: KeptScalars = field(default_factory=KeptScalars, repr=False, compare=False)
    limits: Mapping[str, ClipLimits] = field(default_factory=dict, repr=False, compare=False)

    @property
    def sparse(self) -> bool:
        """True: most scalars keep their bits."""
        return True

    def find_height(self, shape: Sequence[int]) -> int:
        """Return the number of rows of a group."""
        return self.scope.height

    def measure(self, sources: Sequence[Source]) -> ClipFunction:
        """Return the function with the limits of each tensor, if the scope is the tensor.

        Raises NumberError if a scalar is NaN or infinite, and if the clip would set every scalar to zero.
        """
        for source in sources:
            require_float(source.dtype, source.name)
        limits = {s.name: self._measure_source(s) for s in sources} if self.scope.is_tensor else {}
        return replace(self, kept=KeptScalars.of_sources(sources), limits=limits)

    def compute(self, name: str, dtype: Dtype, row: int, words: Words, out: Words | None = None) -> Words:
        """Return the limited values. Raises NumberError as `measure` does, for the groups of the block."""
        floating = require_float(dtype, name)
        if out is None:
            out = np.empty_like(words)
        rows, columns = words.shape
        for piece in find_pieces(rows, columns, self.scope.height, 1 if self.scope.is_tensor else self.scope.columns):
            part, target = piece.view(words), piece.view(out)
            if self.scope.is_tensor:
                found = self.limits[name]
                keys = order_words(floating, part)
                np.clip(keys, keys.dtype.type(found.low[0]), keys.dtype.type(found.high[0]), out=keys)
                restore_words(floating, keys, target)
            else:
                if has_not_finite(floating, part):
                    check_piece(self.kept, name, floating, row, columns, piece, part)
                kept = self.kept.find_in_piece(name, row, columns, piece)
                self._clip_groups(name, floating, part, kept, target)
        return out

    def _measure_source(self, source: Source) -> ClipLimits:
        dtype = require_float(source.dtype, source.name)
        count = count_scalars(source)
        if not count:
            return _make_limits(dtype, -np.full(1, math.inf), np.full(1, math.inf))
        if self.rule == "z":
            moments = measure_moments(source)
            top = np.array([max(moments.mean + self.amount * moments.std, moments.smallest)])
            low, high, used = -top, top, moments.largest > 0
        elif self.rule == "fraction":
            first, limit = find_largest([source], [0, count_fraction(self.amount, count)])
            low, high, used = np.array([-limit]), np.array([limit]), first > 0
        else:
            places = _find_quartile_places(count)
            first, *values, last = find_ordered(source, [0, *places, count - 1])
            low, high = self._find_fences(source.name, count, *(np.array([v]) for v in values))
            used = first != 0 or last != 0
        limits = _make_limits(dtype, low, high)
        if self.rule == "iqr":
            values_inside = np.array(values[1:2])
            _refuse_crossed(limits, order_words(dtype, encode_doubles(dtype, values_inside)), source.name)
        if used and limits.high[0] <= 0 and limits.low[0] >= -1:
            _refuse_empty(source.name)
        return limits

    def _clip_groups(self, name: str, dtype: FloatDtype, words: Words, kept: Indices, out: Words) -> None:
        """Clip a piece with whole groups. `kept` are the flat indices of its protected scalars."""
        mask = None
        if len(kept):
            mask = np.zeros(words.shape, np.bool_)
            mask.reshape(-1)[kept] = True
        for tile in self.scope.find_tiles(*words.shape):
            groups = gather(tile, words)
            if mask is None:
                limits = self._find_limits(name, dtype, groups)
            else:
                limits = self._find_limits_without(name, dtype, groups, gather(tile, mask))
            keys = order_words(dtype, groups)
            low, high = (edge.astype(keys.dtype)[:, np.newaxis] for edge in (limits.low, limits.high))
            np.clip(keys, low, high, out=keys)
            scatter(tile, restore_words(dtype, keys), out)

    def _find_limits_without(self, name: str, dtype: FloatDtype, groups: Words, masks: NDArray[np.bool_]) -> ClipLimits:
        """Return the limits of each row of `groups`, computed without the scalars that are marked in `masks`."""
        found = _make_limits(dtype, np.full(len(groups), -math.inf), np.full(len(groups), math.inf))
        marked = masks.any(axis=1)
        rest = [(~marked, groups[~marked])]
        rest += [(np.array([n]), groups[n : n + 1, ~masks[n]]) for n in np.flatnonzero(marked)]
        for places, counted in rest:
            if counted.size:
                limits = self._find_limits(name, dtype, counted)
                found.low[places], found.high[places] = limits.low, limits.high
        return found

    def _find_limits(self, name: str, dtype: FloatDtype, groups: Words) -> ClipLimits:
        """Return the limits of each row of `groups`. Raises NumberError if a group would become zero."""
        count = groups.shape[1]
        if self.rule == "iqr":
            keys = order_words(dtype, groups)
            places = _find_quartile_places(count)
            keys.partition(sorted({*places}), axis=1)
            found = keys[:, places]
            values = decode_doubles(dtype, restore_words(dtype, found))
            limits = _make_limits(dtype, *self._find_fences(name, count, *values.T))
            _refuse_crossed(limits, found[:, 1], name)
        else:
            magnitudes = find_magnitudes(dtype, groups)
            if self.rule == "z":
                high = self._find_threshold(name, decode_doubles(dtype, magnitudes))
            else:
                place = count - 1 - count_fraction(self.amount, count)
                magnitudes.partition(place, axis=1)
                high = decode_doubles(dtype, np.ascontiguousarray(magnitudes[:, place]))
            limits = _make_limits(dtype, -high, high)
        empty = (limits.high <= 0) & (limits.low >= -1)
        if empty.any() and bool(decode_doubles(dtype, groups[empty]).any()):
            _refuse_empty(name)
        return limits

    def _find_threshold(self, name: str, magnitudes: Doubles) -> Doubles:
        """Return mean + amount * std of each row of magnitudes, which are overwritten."""
        count = magnitudes.shape[1]
        smallest = magnitudes.min(axis=1)
        mean = add_rows(magnitudes) / count
        with np.errstate(over="ignore", under="ignore"):
            np.multiply(magnitudes, magnitudes, out=magnitudes)
            squares = add_rows(magnitudes) / count
        if not np.isfinite(squares).all():
            raise NumberError("the squares of the scalars overflow float64", name)
        std = np.sqrt(np.maximum(squares - mean * mean, 0))
        threshold: Doubles = np.maximum(mean + self.amount * std, smallest)
        return threshold

    def _find_fences(
        self, name: str, count: int, a: Doubles, b: Doubles, c: Doubles, d: Doubles
    ) -> tuple[Doubles, Doubles]:
        """Return the Tukey fences from the neighbours of the quartiles: a <= Q1 <= b and c <= Q3 <= d."""
        with np.errstate(over="ignore", invalid="ignore"):
            q1 = a + (b - a) * ((count - 1) % 4 / 4)
            q3 = c + (d - c) * (3 * (count - 1) % 4 / 4)
            reach = self.amount * (q3 - q1)
            low, high = q1 - reach, q3 + reach
        if np.isnan(low).any() or np.isnan(high).any():
            raise NumberError("the interquartile range overflows float64", name)
        return low, high


def _find_quartile_places(count: int) -> list[int]:
    """Return the places, in a sorted group, of the neighbours of Q1 and Q3."""
    last = count - 1
    return [last // 4, -(-last // 4), 3 * last // 4, -(-3 * last // 4)]


def _make_limits(dtype: FloatDtype, low: Doubles, high: Doubles) -> ClipLimits:
    """Round thresholds inwards to values of the dtype: `low` up and `high` down."""
    lowest = -1 - _round_down(dtype, -low)
    if dtype.special == "fnuz":  # the key -1 is NaN instead of -0.0
        lowest[lowest == -1] = 0
    return ClipLimits(lowest, _round_down(dtype, high))


def _round_down(dtype: FloatDtype, limits: Doubles) -> Keys:
    """Return the key of the largest value of the dtype that does not exceed each limit; 0.0 rather than -0.0."""
    largest = decode_doubles(dtype, np.array([dtype.largest], get_word_type(dtype)))[0]
    limits = np.clip(limits, -largest, largest) + 0.0
    words = encode_doubles(dtype, limits.copy())
    keys = order_words(dtype, words).astype(np.int64)
    keys -= decode_doubles(dtype, words) > limits
    if dtype.special == "fnuz":
        keys -= (keys == -1) & (limits < 0)
    return keys


def _refuse_crossed(limits: ClipLimits, inside: NDArray[np.signedinteger], name: str) -> None:
    """Raise NumberError if a group has no scalar between its fences; `inside` are the upper neighbours of Q1."""
    if ((inside < limits.low) | (inside > limits.high)).any():
        raise NumberError("the clip would change every scalar", name, "give a larger iqr")


def _refuse_empty(name: str) -> None:
    raise NumberError("the clip removes everything: its threshold is 0", name, "choose a higher threshold")
