"""Count the values of tensors by kind: NaN, infinite, zero, subnormal, beyond the range of float16.

The counts are exact for every dtype: they compare bit patterns, whose ranges follow from the table of dtypes. Figures
of parts of a tensor can be merged, and the result does not depend on how the tensor was divided. This module must not
read files. It imports numpy, so callers import it only if they need it.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swsurgery.storage import dtypes
from swsurgery.storage.dtypes import DTYPES, Dtype, FloatDtype, Value
from swsurgery.storage.shard import TensorInfo

FLOAT16_LARGEST = 65_504.0
"""Largest finite value of float16 (IEEE 754 binary16)."""

SUM_WORD = 8
"""Parts of a tensor begin at multiples of this number of bytes: the size of the words whose sum is computed."""

Place = tuple[int, bytes]
"""The flat index of one element in its tensor, and its stored bytes."""

_Words = NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class _Pattern:
    """How the words of a dtype are read. A word is an element, or one of the two numbers of a C64 element.

    Words are compared without their sign, after `word & mask`. They are not finite above `largest`, and equal to
    `infinity` if infinite. They are subnormal from 1 to `normal` - 1, and too large for float16 above `float16`.
    `not_a_number` is the word of the only NaN of a FNUZ dtype. In other dtypes this word is negative zero. `number` is
    the dtype of one word; None if a word is not a number, because elements are smaller than a byte.
    """

    size: int
    mask: int
    largest: int
    number: Dtype | None
    normal: int = 0
    infinity: int | None = None
    float16: int | None = None
    not_a_number: int | None = None

    @property
    def word(self) -> np.dtype[np.unsignedinteger]:
        """Dtype of one word: a little-endian unsigned integer of `size` bytes."""
        return np.dtype(f"<u{self.size}")


@dataclass(frozen=True, slots=True)
class Figures:
    """Counts of the values of a tensor, or of a part of one. A C64 element counts as two values.

    `largest` is the bit pattern, without its sign, of the largest finite magnitude; None if there is none, and for
    integers. `lowest` and `highest` are the lowest and the highest bit pattern, read as unsigned integers. `total` is
    the sum of the bytes, read as words of 8 bytes, modulo 2**64: tensors with different sums have different bytes.
    `bad` is the first element that is not finite, and `beyond` the first that exceeds the range of float16.
    """

    values: int
    nan: int
    infinite: int
    zeros: int
    subnormal: int
    beyond_float16: int
    largest: int | None
    lowest: int
    highest: int
    total: int
    bad: Place | None = None
    beyond: Place | None = None

    def merge(self, other: Figures) -> Figures:
        """Return the figures of both parts together."""
        magnitudes = [m for m in (self.largest, other.largest) if m is not None]
        return Figures(
            self.values + other.values,
            self.nan + other.nan,
            self.infinite + other.infinite,
            self.zeros + other.zeros,
            self.subnormal + other.subnormal,
            self.beyond_float16 + other.beyond_float16,
            max(magnitudes, default=None),
            min(self.lowest, other.lowest),
            max(self.highest, other.highest),
            (self.total + other.total) % (1 << 64),
            min((p for p in (self.bad, other.bad) if p is not None), default=None),
            min((p for p in (self.beyond, other.beyond) if p is not None), default=None),
        )

    @property
    def not_finite(self) -> int:
        """Number of values that are NaN or infinite."""
        return self.nan + self.infinite

    def to_json(self, dtype: Dtype) -> dict[str, Any]:
        """Return the counts of a tensor of this dtype as JSON, with its largest finite magnitude."""
        largest = decode_largest(dtype, self)
        return {
            "values": self.values,
            "nan": self.nan,
            "infinite": self.infinite,
            "zeros": self.zeros,
            "subnormal": self.subnormal,
            "beyond_float16": self.beyond_float16,
            "largest_magnitude": largest,
        }


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor that begins `start` bytes into its data, with its bytes as words."""

    info: TensorInfo
    pattern: _Pattern
    start: int
    data: memoryview | bytes
    words: _Words

    def find_first(self, chosen: NDArray[np.bool_]) -> Place | None:
        """Return the first element that contains a chosen word; None if no word is chosen."""
        at = int(np.argmax(chosen))
        if not chosen[at]:
            return None
        size = self.info.dtype.size
        begin = at * self.pattern.size // size * size
        return (self.start + begin) // size, bytes(self.data[begin : begin + size])


def count_values(info: TensorInfo, start: int, data: memoryview | bytes) -> Figures:
    """Count the values of a part of a tensor that begins `start` bytes into its data.

    `start` is a multiple of SUM_WORD. `data` is not empty and ends with a whole element.
    """
    pattern = _describe_words(info.dtype)
    piece = _Piece(info, pattern, start, data, np.frombuffer(data, pattern.word))
    if isinstance(pattern.number, FloatDtype):
        return _count_floats(piece)
    return _count_whole_numbers(piece)


def decode_largest(dtype: Dtype, figures: Figures) -> float | None:
    """Decode the largest finite magnitude of a floating-point tensor; None if it has none."""
    number = _describe_words(dtype).number
    if figures.largest is None or number is None:
        return None
    return float(dtypes.decode(number, figures.largest.to_bytes(number.size, "little")))


def decode_constant(dtype: Dtype, figures: Figures) -> Value | str | None:
    """Return the value that all values of a tensor have: a number, or a bit pattern such as 0x7f if it is no number.

    Returns None if the values differ, or if they are NaN or infinite. Zeros of both signs are one value. The values of
    a dtype smaller than a byte are read as whole bytes.
    """
    if figures.not_finite or (figures.zeros != figures.values and figures.lowest != figures.highest):
        return None
    pattern = _describe_words(dtype)
    if figures.zeros == figures.values:
        return 0
    data = figures.lowest.to_bytes(pattern.size, "little")
    if pattern.number is None or pattern.number.kind == "opaque":
        return dtypes.format_bits(data)
    return dtypes.decode(pattern.number, data)


def _count_floats(piece: _Piece) -> Figures:
    """Count the values of a part of a floating-point or complex tensor."""
    pattern, words = piece.pattern, piece.words
    magnitudes: _Words = words & words.dtype.type(pattern.mask)
    zeros = len(words) - int(np.count_nonzero(magnitudes))
    top = int(magnitudes.max())
    is_bad = _find_not_finite(pattern, words, magnitudes, top)
    nan = infinite = 0
    if is_bad is not None:
        infinite = 0 if pattern.infinity is None else int(np.count_nonzero(magnitudes == pattern.infinity))
        nan = int(np.count_nonzero(is_bad)) - infinite
        zeros -= 0 if pattern.not_a_number is None else nan  # a FNUZ NaN has no bits besides its sign
        top = int(np.where(is_bad, words.dtype.type(0), magnitudes).max())
    beyond_float16, beyond = _count_beyond_float16(piece, magnitudes, top)
    magnitudes -= words.dtype.type(1)  # zero becomes the highest word, so that it is not counted as subnormal
    return Figures(
        values=len(words),
        nan=nan,
        infinite=infinite,
        zeros=zeros,
        subnormal=int(np.count_nonzero(magnitudes < words.dtype.type(pattern.normal - 1))),
        beyond_float16=beyond_float16,
        largest=top if nan + infinite < len(words) else None,
        lowest=int(words.min()),
        highest=int(words.max()),
        total=_sum_bytes(piece.data),
        bad=None if is_bad is None else piece.find_first(is_bad),
        beyond=beyond,
    )


def _find_not_finite(pattern: _Pattern, words: _Words, magnitudes: _Words, top: int) -> NDArray[np.bool_] | None:
    """Return True for each word that is NaN or infinite; None if all are finite. `top` is the largest magnitude."""
    if pattern.not_a_number is not None:
        found = np.equal(words, words.dtype.type(pattern.not_a_number))
        return found if found.any() else None
    return np.greater(magnitudes, words.dtype.type(pattern.largest)) if top > pattern.largest else None


def _count_beyond_float16(piece: _Piece, magnitudes: _Words, top: int) -> tuple[int, Place | None]:
    """Count the finite values beyond the range of float16, and find the first.

    `top` is the largest finite magnitude.
    """
    limit = piece.pattern.float16
    if limit is None or top <= limit:
        return 0, None
    is_beyond = magnitudes > magnitudes.dtype.type(limit)
    is_beyond &= magnitudes <= magnitudes.dtype.type(piece.pattern.largest)
    return int(np.count_nonzero(is_beyond)), piece.find_first(is_beyond)


def _count_whole_numbers(piece: _Piece) -> Figures:
    """Count the values of a part of a tensor of integers, of E8M0 scales, or of elements smaller than a byte."""
    words = piece.words
    scales = piece.info.dtype.name == "F8_E8M0"  # a power of two is never 0, and 0xff is NaN
    is_bad = words > words.dtype.type(piece.pattern.largest) if scales else None
    return Figures(
        values=len(words),
        nan=0 if is_bad is None else int(np.count_nonzero(is_bad)),
        infinite=0,
        zeros=0 if scales else len(words) - int(np.count_nonzero(words)),
        subnormal=0,
        beyond_float16=0,
        largest=None,
        lowest=int(words.min()),
        highest=int(words.max()),
        total=_sum_bytes(piece.data),
        bad=None if is_bad is None else piece.find_first(is_bad),
    )


def _sum_bytes(data: memoryview | bytes) -> int:
    whole = len(data) // SUM_WORD * SUM_WORD
    words = np.frombuffer(data[:whole], "<u8")
    return (int(words.sum(dtype=np.uint64)) + int.from_bytes(data[whole:], "little")) % (1 << 64)


@cache
def _describe_words(dtype: Dtype) -> _Pattern:
    number = DTYPES["F32"] if dtype.name == "C64" else dtype
    if not isinstance(number, FloatDtype):
        size = max(number.size, 1)
        # OCP MX 1.0, section 5.4.1: the scale with all bits set is NaN.
        largest = 0xFE if number.name == "F8_E8M0" else (1 << 8 * size) - 1
        return _Pattern(size, (1 << 8 * size) - 1, largest, number if number.bits % 8 == 0 else None)
    sign = 1 << (number.bits - 1)
    return _Pattern(
        number.size,
        sign - 1,
        number.largest,
        number,
        normal=1 << number.mantissa,
        infinity=number.largest + 1 if number.special == "ieee" else None,
        float16=_find_float16_limit(number),
        not_a_number=sign if number.special == "fnuz" else None,
    )


def _find_float16_limit(dtype: FloatDtype) -> int | None:
    """Return the bit pattern of the largest value up to FLOAT16_LARGEST; None if the dtype has no larger value."""
    patterns = range(dtype.largest + 1)
    limit = bisect.bisect_right(
        patterns, FLOAT16_LARGEST, key=lambda bits: float(dtypes.decode(dtype, bits.to_bytes(dtype.size, "little")))
    )
    return None if limit == len(patterns) else limit - 1
