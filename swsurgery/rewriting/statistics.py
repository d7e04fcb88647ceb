"""Measure sources: float64 sums over fixed chunks, and exact order statistics by counting bit patterns.

The results depend only on the scalars and their order, not on the lengths of the arrays in which a source is read.
Memory is a few megabytes for a source of any size. Protected scalars are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swsurgery.errors import NumberError, pluralise
from swsurgery.rewriting.function import CHUNK_SCALARS, Source
from swsurgery.rewriting.kept import KeptScalars
from swsurgery.rewriting.scope import Piece
from swsurgery.storage.arrays import (
    Doubles,
    Words,
    decode_doubles,
    find_magnitudes,
    find_not_finite,
    get_word_type,
    has_not_finite,
    order_words,
    require_float,
    restore_words,
)
from swsurgery.storage.dtypes import FloatDtype

Keys = NDArray[np.unsignedinteger]
"""Unsigned integers that are ordered like the numbers that they represent."""

_DIGIT = 16
"""Bits of a key that one pass of the selection counts."""


@dataclass(frozen=True)
class Moments:
    """The number of scalars, the mean and the population standard deviation of |w|, and the extremes of |w|."""

    count: int
    mean: float
    std: float
    smallest: float
    largest: float


def count_scalars(source: Source) -> int:
    """Return the number of scalars of a source that are not protected."""
    return math.prod(source.shape) - len(source.kept)


def read_pieces(source: Source, length: int) -> Iterator[tuple[int, Words]]:
    """Yield (flat index of the first scalar, bit patterns) in pieces of `length` scalars; the last may be shorter.

    A piece is valid until the next one is requested, and must not be written to.
    """
    buffer = np.empty(length, get_word_type(source.dtype))
    filled = first = 0
    for words in source.read():
        start = 0
        while start < len(words):
            count = min(length - filled, len(words) - start)
            if count == length:
                yield first, words[start : start + length]
                first += length
            else:
                buffer[filled : filled + count] = words[start : start + count]
                filled += count
                if filled == length:
                    yield first, buffer
                    first, filled = first + length, 0
            start += count
    if filled:
        yield first, buffer[:filled]


def check_finite(source: Source) -> None:
    """Raise NumberError if a scalar that is not protected is NaN or infinite, with their number and the first index."""
    dtype = require_float(source.dtype, source.name)
    kept = KeptScalars.of_sources([source])
    count, where = 0, 0
    for first, words in read_pieces(source, CHUNK_SCALARS):
        if has_not_finite(dtype, words):
            bad = find_not_finite(dtype, words)
            bad[kept.find(source.name, first, len(words))] = False
            if not count and bad.any():
                where = first + int(bad.argmax())
            count += int(np.count_nonzero(bad))
    if count:
        refuse_not_finite(source.name, count, kept.format_index(source.name, where))


def refuse_not_finite(name: str, count: int, index: str) -> None:
    """Raise the NumberError for `count` scalars of source `name` that are NaN or infinite."""
    verb = "is" if count == 1 else "are"
    raise NumberError(f"{pluralise(count, 'scalar')} {verb} NaN or infinite", f"{name} (first: {index})")


def check_piece(
    kept: KeptScalars, name: str, dtype: FloatDtype, row: int, columns: int, piece: Piece, words: Words
) -> None:
    """Raise NumberError if a scalar of a piece that is not protected is NaN or infinite.

    `words` are the bit patterns of the piece; the other arguments are those of `KeptScalars.find_in_piece`.
    """
    bad = np.setdiff1d(
        np.flatnonzero(find_not_finite(dtype, words)), kept.find_in_piece(name, row, columns, piece), assume_unique=True
    )
    if len(bad):
        down, across = divmod(int(bad[0]), piece.right - piece.left)
        flat = (row + piece.begin + down) * columns + piece.left + across
        refuse_not_finite(name, len(bad), kept.format_index(name, flat))


def measure_moments(source: Source) -> Moments:
    """Measure |w| in one pass: sums of |w| and of its square in float64 over chunks of 65,536 scalars, added in order.

    A protected scalar adds 0 to the sum of its chunk. Raises NumberError if another scalar is NaN or infinite, or if a
    square overflows float64.
    """
    dtype = require_float(source.dtype, source.name)
    kept = KeptScalars.of_sources([source])
    total = squares = largest = 0.0
    smallest = math.inf
    for first, words in read_pieces(source, CHUNK_SCALARS):
        values = decode_doubles(dtype, words)
        np.abs(values, out=values)
        skipped = kept.find(source.name, first, len(words))
        if len(skipped):
            values[skipped] = math.inf
            smallest = min(smallest, float(values.min()))
            values[skipped] = 0
        else:
            smallest = min(smallest, float(values.min()))
        top = float(values.max())
        if not math.isfinite(top):
            check_finite(source)
        largest = max(largest, top)
        total += float(add_rows(values[np.newaxis])[0])
        with np.errstate(over="ignore", under="ignore"):
            np.multiply(values, values, out=values)
        squares += float(add_rows(values[np.newaxis])[0])
    count = count_scalars(source)
    if not math.isfinite(squares):
        raise NumberError("the squares of the scalars overflow float64", source.name)
    if not count:
        return Moments(0, 0.0, 0.0, 0.0, 0.0)
    mean = total / count
    return Moments(count, mean, math.sqrt(max(squares / count - mean * mean, 0.0)), smallest, largest)


def measure_range(source: Source) -> tuple[float, float]:
    """Return the smallest and the largest scalar, and (0, 0) for a source without scalars that are not protected.

    Raises NumberError if a scalar is NaN or infinite.
    """
    low, high = math.inf, -math.inf
    for dtype, words in _read_counted(source):
        if words.size:
            keys = order_words(dtype, words)
            ends = restore_words(dtype, np.array([keys.min(), keys.max()]))
            first, last = decode_doubles(dtype, ends).tolist()
            low, high = min(low, first), max(high, last)
    return (low, high) if low <= high else (0.0, 0.0)


def add_rows(values: Doubles) -> Doubles:
    """Sum each row of a matrix in float64, over chunks of 65,536 columns that are added in order.

    A chunk is folded: its second half is added to its first until one number is left. numpy's own sum may use another
    order in another version or on another processor.
    """
    total = np.zeros(len(values), np.float64)
    for begin in range(0, values.shape[1], CHUNK_SCALARS):
        part = values[:, begin : begin + CHUNK_SCALARS].copy()
        count = part.shape[1]
        while count > 1:
            half = (count + 1) // 2
            part[:, : count - half] += part[:, half:count]
            count = half
        total += part[:, 0]
    return total


def count_fraction(fraction: float, count: int) -> int:
    """Return the number of scalars that are `fraction` of `count`, rounded down.

    The fraction is taken as its shortest decimal: 0.3 of 10 is 3, although the float64 0.3 is below 3/10.
    """
    from fractions import Fraction  # slow to import

    return math.floor(Fraction(repr(float(fraction))) * count)


def find_largest(sources: Sequence[Source], ranks: Sequence[int]) -> list[float]:
    """Return the scalars of the given ranks in all sources together, as magnitudes: rank 0 is the largest |w|."""
    shared = {s.dtype.name for s in sources}
    dtype = require_float(sources[0].dtype, sources[0].name)
    total = sum(map(count_scalars, sources))
    places = [total - 1 - rank for rank in ranks]
    if len(shared) == 1:
        keys = _select(lambda: (k for s in sources for k in _read_magnitudes(s)), dtype.bits, places)
        words = np.array(keys, get_word_type(dtype))
        return [float(v) for v in decode_doubles(dtype, words)]
    keys = _select(lambda: (k for s in sources for k in _read_float64_magnitudes(s)), 64, places)
    return [float(v) for v in np.array(keys, np.uint64).view(np.float64)]


def find_ordered(source: Source, places: Sequence[int]) -> list[float]:
    """Return the signed scalars at the given places of the sorted source: place 0 is the smallest."""
    dtype = require_float(source.dtype, source.name)
    keys = _select(lambda: _read_ordered(source), dtype.bits, places)
    half = 1 << (dtype.bits - 1)
    words = [key - half if key >= half else (key ^ (half - 1)) | half for key in keys]
    return [float(v) for v in decode_doubles(dtype, np.array(words, get_word_type(dtype)))]


def _read_counted(source: Source) -> Iterator[tuple[FloatDtype, Words]]:
    """Yield the bit patterns that are not protected. Raises NumberError if one of them is NaN or infinite."""
    dtype = require_float(source.dtype, source.name)
    kept = KeptScalars.of_sources([source])
    for first, words in read_pieces(source, CHUNK_SCALARS):
        skipped = kept.find(source.name, first, len(words))
        if len(skipped):
            words = np.delete(words, skipped)
        if has_not_finite(dtype, words):
            check_finite(source)
        yield dtype, words


def _read_magnitudes(source: Source) -> Iterator[Keys]:
    for dtype, words in _read_counted(source):
        yield find_magnitudes(dtype, words)


def _read_float64_magnitudes(source: Source) -> Iterator[Keys]:
    for dtype, words in _read_counted(source):
        yield np.abs(decode_doubles(dtype, words)).view(np.uint64)


def _read_ordered(source: Source) -> Iterator[Keys]:
    for dtype, words in _read_counted(source):
        keys = order_words(dtype, words).view(words.dtype)
        keys ^= words.dtype.type(1 << (dtype.bits - 1))
        yield keys


def _select(read: Callable[[], Iterator[Keys]], bits: int, places: Sequence[int]) -> list[int]:
    """Return the keys at `places` of all keys in rising order, without sorting them.

    Each pass counts the values of the next 16 bits among the keys that share the bits found so far, so that keys of 16
    bits take one pass, of 32 bits two and of 64 bits four.
    """
    digit = min(_DIGIT, bits)
    prefixes = [0] * len(places)
    left = list(places)
    for shift in range(bits - digit, -1, -digit):
        counts = {prefix: np.zeros(1 << digit, np.int64) for prefix in set(prefixes)}
        for keys in read():
            for prefix, count in counts.items():
                count += _count_digits(keys, shift, digit, prefix, bits)
        for n, place in enumerate(left):
            below = np.cumsum(counts[prefixes[n]])
            value = int(np.searchsorted(below, place, side="right"))
            left[n] -= int(below[value - 1]) if value else 0
            prefixes[n] = prefixes[n] << digit | value
    return prefixes


def _count_digits(keys: Keys, shift: int, digit: int, prefix: int, bits: int) -> NDArray[np.int64]:
    """Count the values of the `digit` bits above `shift` among the keys whose higher bits are `prefix`."""
    if shift + digit < bits:
        keys = keys[(keys >> keys.dtype.type(shift + digit)) == prefix]
    if shift or digit < bits:
        keys = (keys >> keys.dtype.type(shift)) & keys.dtype.type((1 << digit) - 1)
    return np.bincount(keys.astype(np.intp), minlength=1 << digit)
