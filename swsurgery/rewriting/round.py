"""Round the scalars of a region to a few levels, as weight-only quantisation by rounding to nearest does.

The scalars stay in their dtype: each one becomes the value that its quantised code stands for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from swsurgery.errors import NumberError
from swsurgery.rewriting.clip import ClipFunction
from swsurgery.rewriting.function import CHUNK_SCALARS, Source
from swsurgery.rewriting.kept import Indices, KeptScalars
from swsurgery.rewriting.magnitudes import SMALLEST_SCALES, Magnitudes
from swsurgery.rewriting.scope import TENSOR, Grouping, Piece, Scalar, find_pieces
from swsurgery.rewriting.statistics import check_piece, measure_range, read_pieces
from swsurgery.storage.arrays import (
    Doubles,
    Singles,
    Words,
    decode_doubles,
    decode_singles,
    encode_doubles,
    encode_singles,
    pack_singles,
    require_float,
)
from swsurgery.storage.dtypes import Dtype, FloatDtype, decode

Levels = Literal["integer", "nf4"]
Floats = NDArray[np.floating]
"""An array of float32 for dtypes of at most 16 bits, of float64 for the others."""

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The levels of 4-bit NormalFloat, as float32 values (QLoRA, arXiv:2305.14314, appendix E)."""


@dataclass(frozen=True)
class RoundFunction:
    """Round to nearest. Every group of scalars has 2**bits levels, which depend on its own extremes.

    - `symmetric`: scale = max|w| / (2**(bits - 1) - 1), and code = w / scale rounded half to even, so that codes lie in
      -(2**(bits - 1) - 1) .. 2**(bits - 1) - 1.
    - not `symmetric`: the range is [min(w, 0), max(w, 0)], scale = range / (2**bits - 1), and the zero point is
      -min(w, 0) / scale rounded half to even. Codes lie in 0 .. 2**bits - 1, so that 0 is a level.
    - `levels` "nf4": code = the level of NF4 nearest to w / max|w|; the lower one of two equally near levels.

    The new value is (code - zero point) * scale, or level * max|w|, rounded once to the stored dtype. Zero is always
    0.0, since codes have no negative zero. A group of zeros stays zero.

    Scales are float64 quotients. For dtypes of at most 16 bits they are rounded to float32, and codes and new values
    are computed in float32; for F32 and F64 in float64. The arithmetic is thus at least 13 bits wider than the stored
    dtype (F64 excepted), so that the scalar of largest magnitude keeps its value in symmetric and NF4 groups.

    `clip` is applied first, with limits for the whole unrounded tensor. Protected scalars count in no statistic.
    """

    bits: int
    symmetric: bool = True
    levels: Levels = "integer"
    scope: Grouping = TENSOR
    clip: ClipFunction | None = None
    kept: KeptScalars = field(default_factory=KeptScalars, repr=False, compare=False)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.clip and not self.clip.scope.is_tensor:
            raise ValueError("the clip of a rounding has limits for the whole tensor")

    @property
    def sparse(self) -> bool:
        """False: most scalars change."""
        return False

    def find_height(self, shape: Sequence[int]) -> int:
        """Return the number of rows of a group."""
        return self.scope.height

    def measure(self, sources: Sequence[Source]) -> RoundFunction:
        """Return the function with what depends on whole tensors: the limits of `clip`, and ranges.

        Raises NumberError if `clip` does, and if a scalar is NaN or infinite.
        """
        for source in sources:
            require_float(source.dtype, source.name)
        clip = self.clip.measure(sources) if self.clip else None
        ranges = {s.name: measure_range(_clip_source(clip, s)) for s in sources} if self.scope.is_tensor else {}
        return replace(self, clip=clip, kept=KeptScalars.of_sources(sources), ranges=ranges)

    def compute(self, name: str, dtype: Dtype, row: int, words: Words, out: Words | None = None) -> Words:
        """Return the rounded values.

        Raises NumberError if a scalar of the block is NaN or infinite, and if a new value overflows the dtype, which is
        possible only for levels that are not symmetric.
        """
        floating = require_float(dtype, name)
        if out is None:
            out = np.empty_like(words)
        rows, columns = words.shape
        width = 1 if self.scope.is_tensor else self.scope.columns
        pieces = list(find_pieces(rows, columns, self.scope.height, width))
        block = _Block(name, floating, row, columns, max((piece.scalars for piece in pieces), default=0))
        for piece in pieces:
            part, target = piece.view(words), piece.view(out)
            if self.clip:
                part = self.clip.compute(name, dtype, 0, part)
            if not self._round_magnitudes(block, piece, part, target):
                self._round_values(block, piece, part, target)
        return out

    def _round_magnitudes(self, block: _Block, piece: Piece, words: Words, out: Words) -> bool:
        """Round a piece as `_round_values` does, but faster. Returns False if it cannot, and leaves `out` unchanged."""
        if block.magnitudes is None or not self.symmetric or self.levels != "integer":
            return False
        dtype, top = block.dtype, self._top
        magnitudes = block.magnitudes.take(words)
        kept = self.kept.find_in_piece(block.name, block.row, block.columns, piece)
        if len(kept):
            block.magnitudes.clear(magnitudes, kept)
        for tile in self.scope.find_tiles(*words.shape):
            groups = tile.view(magnitudes)
            if self.scope.is_tensor:
                high = np.full((1, 1, 1, 1), max(map(abs, self.ranges[block.name])), np.float32)
            else:
                maxima = block.magnitudes.get_patterns(_reduce(np.maximum, groups))
                if maxima.max() > dtype.largest:  # NaN or infinite
                    return False
                high = decode_singles(dtype, maxima, finite=True)
            # The float32 quotient is the float64 quotient rounded to float32, because `high` has at most 11 bits.
            scale = _find_scale(high, top, np.float32)
            if scale.min() < SMALLEST_SCALES[dtype.name]:
                return False
            # No code of a group exceeds `top`, because the relative error of its scale is at most 2**-24.
            block.magnitudes.round_groups(groups, scale, top if self.scope.is_tensor else None)
        block.magnitudes.put_signs(magnitudes, words, out)
        return True

    def _round_values(self, block: _Block, piece: Piece, words: Words, out: Words) -> None:
        """Round a piece in floating-point arithmetic."""
        values, spare = block.make_buffers(words.shape)
        kept = self.kept.find_in_piece(block.name, block.row, block.columns, piece)
        self._decode(block.dtype, words, kept, values)
        smallest, largest = np.inf, 0.0
        for tile in self.scope.find_tiles(*words.shape):
            groups, free = tile.view(values), tile.view(spare)
            low, high = self._find_ranges(block.name, groups, free)
            if not (low.min() >= -block.limit and high.max() <= block.limit):  # or NaN
                check_piece(self.kept, block.name, block.dtype, block.row, block.columns, piece, words)
            least, most = self._quantise(block.name, groups, low, high)
            smallest, largest = min(smallest, least), max(largest, most)
        _encode(block.name, block.dtype, values, out, spare, smallest, largest)

    def _decode(self, dtype: FloatDtype, words: Words, kept: Indices, values: Floats) -> None:
        """Write the values to `values`, with 0, which changes no statistic, for protected scalars."""
        if values.dtype == np.float64:
            decode_doubles(dtype, words, cast(Doubles, values))
        else:
            decode_singles(dtype, words, cast(Singles, values), finite=True)
        if len(kept):
            values.reshape(-1)[kept] = 0

    def _find_ranges(self, name: str, groups: Floats, spare: Floats) -> tuple[Doubles, Doubles]:
        """Return the lowest and highest level of each group, as arrays (groups down, 1, groups across, 1)."""
        if self.scope.is_tensor:
            low, high = (np.full((1, 1, 1, 1), end) for end in self.ranges[name])
            if self._is_symmetric:
                high = np.maximum(-low, high)
                low = -high
        elif self._is_symmetric:
            np.abs(groups, out=spare)
            high = _reduce(np.maximum, spare).astype(np.float64)
            low = -high
        else:
            low, high = (_reduce(end, groups).astype(np.float64) for end in (np.minimum, np.maximum))
        return np.minimum(low, 0), np.maximum(high, 0)

    @property
    def _top(self) -> int:
        """The largest code. Of symmetric levels, -top is the smallest one."""
        return (1 << (self.bits - 1 if self.symmetric else self.bits)) - 1

    @property
    def _is_symmetric(self) -> bool:
        return self.symmetric or self.levels == "nf4"

    def _quantise(self, name: str, groups: Floats, low: Doubles, high: Doubles) -> tuple[float, float]:
        """Replace values by those of their codes.

        Returns bounds of the magnitudes of the results other than 0: none is smaller than the first bound or larger
        than the second one.
        """
        kind = groups.dtype.type
        if self.levels == "nf4":
            scale = _use_one_for_zero(high.astype(kind))
            _quantise_nf4(groups, scale)
            return float(scale.min()) / 16, float(scale.max())  # the smallest level is 0.0796
        top = self._top
        lowest: Floats | np.floating
        highest: Floats | np.floating
        if self.symmetric:
            scale = _find_scale(high, top, kind)
            lowest, highest = kind(-top), kind(top)
        else:
            with np.errstate(over="ignore"):
                exact = (high - low) / top
            if not np.isfinite(exact).all():
                raise NumberError("the range of the scalars overflows float64", name)
            scale = _use_one_for_zero(exact.astype(kind))
            zero = np.clip(np.rint(-low / scale), 0, top)
            lowest, highest = (-zero).astype(kind), (top - zero).astype(kind)
        np.divide(groups, scale, out=groups)
        np.rint(groups, out=groups)
        if self.symmetric:  # code - zero point
            if self.scope.is_tensor or _exceeds(high, scale, top):
                np.clip(groups, lowest, highest, out=groups)
        else:  # faster than np.clip, if the limits are arrays
            np.maximum(groups, lowest, out=groups)
            np.minimum(groups, highest, out=groups)
        np.add(groups, kind(0), out=groups)  # -0.0 becomes 0.0
        with np.errstate(over="ignore"):  # refused later
            np.multiply(groups, scale, out=groups)
        reach = np.maximum(np.abs(lowest), highest) * scale.astype(np.float64)
        return float(scale.min()), float(reach.max())


class _Block:
    """The place of a block in its source, and buffers for its pieces, of which none has more than `size` scalars."""

    def __init__(self, name: str, dtype: FloatDtype, row: int, columns: int, size: int) -> None:
        self.name, self.dtype, self.row, self.columns, self.size = name, dtype, row, columns, size
        self.limit = decode(dtype, dtype.largest.to_bytes(dtype.size, "little"))
        self.magnitudes = Magnitudes(dtype) if dtype.name in SMALLEST_SCALES else None
        self._buffers: list[Floats] = []

    def make_buffers(self, shape: tuple[int, ...]) -> list[Floats]:
        """Return two arrays of a shape, for values and results of operations."""
        if not self._buffers:
            kind = np.float64 if self.dtype.bits > 16 else np.float32
            self._buffers = [np.empty(self.size, kind) for _ in range(2)]
        return [buffer[: math.prod(shape)].reshape(shape) for buffer in self._buffers]


def _clip_source(clip: ClipFunction | None, source: Source) -> Source:
    """Return a source that reads the clipped scalars of `source`."""
    if clip is None:
        return source

    def read() -> Iterator[Words]:
        for _, words in read_pieces(source, CHUNK_SCALARS):
            yield clip.compute(source.name, source.dtype, 0, words[np.newaxis]).reshape(-1)

    return replace(source, read=read)


def _encode(
    name: str, dtype: FloatDtype, values: Floats, out: Words, spare: Floats, smallest: float, largest: float
) -> None:
    """Round values to the dtype. Raises NumberError for an overflow.

    `smallest` and `largest` are bounds of the magnitudes other than 0. Overwrites the buffer `spare`.
    """
    try:
        if values.dtype == np.float64:
            encode_doubles(dtype, cast(Doubles, values), out)
        elif largest < _find_safe_limit(dtype):
            normal = smallest >= 2.0 ** (1 - dtype.bias)
            pack_singles(dtype, cast(Singles, values), out, normal, cast(Singles, spare))
        else:
            encode_singles(dtype, cast(Singles, values), out)
    except NumberError as error:
        raise NumberError(str(error), name, "round symmetrically") from error


def _reduce(reduce: np.ufunc, groups: NDArray[Scalar]) -> NDArray[Scalar]:
    """Reduce each group of a tile to one number."""
    down, height, across, width = groups.shape
    if groups.flags.c_contiguous:  # twice as fast as `reduce.reduce` for short groups
        starts = np.arange(0, groups.size, width)
        found = reduce.reduceat(groups.reshape(-1), starts).reshape(down, height, across, 1)
    else:
        found = reduce.reduce(groups, axis=3, keepdims=True)
    reduced: NDArray[Scalar] = reduce.reduce(found, axis=1, keepdims=True) if height > 1 else found
    return reduced


def _find_scale(high: Floats, top: int, kind: type[np.floating]) -> Floats:
    """Return the scale of symmetric levels for each group, of which `high` is the largest magnitude."""
    return _use_one_for_zero((high / top).astype(kind))


def _exceeds(high: Floats, scale: Floats, top: int) -> bool:
    """Return True if a code of a group may exceed `top`, because the scale was rounded down.

    No quotient in a group is larger than that of its extreme, since division and rint are monotonic.
    """
    return bool(np.rint(high.astype(scale.dtype) / scale).max() > top)


def _use_one_for_zero(scale: Floats) -> Floats:
    """Replace a scale of 0, of a group of zeros, by 1: then 0 / scale is 0."""
    scale[scale == 0] = 1
    return scale


def _find_safe_limit(dtype: FloatDtype) -> float:
    """Return a bound below which no value overflows the dtype."""
    return float(2.0 ** ((dtype.largest >> dtype.mantissa) - dtype.bias))


def _quantise_nf4(groups: Floats, top: Floats) -> None:
    """Replace values by the nearest level times `top`, the maximum magnitude of the group."""
    kind = groups.dtype.type
    levels = np.array(NF4)
    middles = (levels[1:] + levels[:-1]) / 2  # exact
    limits = middles.astype(kind)
    limits = np.where(limits > middles, np.nextafter(limits, kind(-1)), limits)  # w > limit exactly if w > middle
    np.divide(groups, top, out=groups)
    codes = np.zeros(groups.shape, np.uint8)
    above = np.empty(groups.shape, np.bool_)
    for limit in limits:
        np.greater(groups, limit, out=above)
        np.add(codes, above.view(np.uint8), out=codes)
    np.multiply(np.take(levels.astype(kind), codes, mode="wrap"), top, out=groups)
