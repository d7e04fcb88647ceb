"""Round F16 and BF16 scalars to symmetric levels with few passes over memory, on bit patterns without signs.

`round` defines the results, and computes them for every dtype. Division, rounding half to even and multiplication treat
w and -w alike. Therefore this module computes with |w| and adds the signs last. Maxima are those of 16-bit integers.

|w| becomes a float32 by a shift of its bit pattern. For BF16 that is the value. For F16 it is the value times 2**-112,
because the bias of the exponent is 127 instead of 15; the scale of a group is multiplied by the same power of two.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from swsurgery.storage.arrays import Singles, Words
from swsurgery.storage.dtypes import FloatDtype

STRIP_SCALARS = 65_536
"""Number of scalars that are computed at a time, so that two float32 buffers fit into a processor's L2 cache."""

_SHIFTS = {"F16": 13, "BF16": 16}
"""By how many bits a bit pattern is shifted to become that of a float32, for each dtype of this module."""

Strip = tuple[slice, slice]


def can_round_magnitudes(dtype: FloatDtype) -> bool:
    """Return True if this module has the dtype."""
    return dtype.name in _SHIFTS


class Magnitudes:
    """The magnitudes of a piece of scalars. Reuses its buffers for the next piece, so threads cannot share it."""

    def __init__(self, dtype: FloatDtype) -> None:
        shift = _SHIFTS[dtype.name]
        self._shift, self._one = np.int32(shift), np.int32(1)
        self._half = np.int32((1 << (shift - 1)) - 1 - (1 << shift))
        self._factor = np.float32(2.0 ** (dtype.bias - 127))
        self._words: Words = np.empty(0, np.uint16)
        self._values, self._spare = np.empty(0, np.float32), np.empty(0, np.int32)

    def take(self, words: Words) -> Words:
        """Return the bit patterns of the magnitudes of a piece, which is an array (rows, columns)."""
        if words.size > self._words.size:
            self._words = np.empty(words.size, words.dtype)
        magnitudes = self._words[: words.size].reshape(words.shape)
        return np.bitwise_and(words, words.dtype.type(0x7FFF), out=magnitudes)

    def round_groups(self, groups: Words, scale: Singles, top: int | None) -> None:
        """Replace each magnitude by the bit pattern of rint(|w| / scale) * scale, less 1: 0.0 becomes 0xFFFF.

        `groups` has the shape (groups down, height, groups across, width), and `scale` has one number per group, in
        which the height and the width are 1, or one number for all. No scale is smaller than the smallest normal number
        of the dtype, and no magnitude is NaN or infinite. Codes are limited to `top` if it is given.
        """
        scale = scale * self._factor  # exact
        for down, rows in _find_strips(groups.shape):
            strip = groups[down, rows]
            of_strip = scale[down] if len(scale) > 1 else scale
            if strip.size > self._values.size:
                self._values, self._spare = np.empty(strip.size, np.float32), np.empty(strip.size, np.int32)
            values = self._values[: strip.size].reshape(strip.shape)
            bits = values.view(np.int32)
            np.copyto(bits, strip)
            np.left_shift(bits, self._shift, out=bits)
            np.divide(values, of_strip, out=values)
            np.rint(values, out=values)
            if top is not None:
                np.minimum(values, np.float32(top), out=values)
            np.multiply(values, of_strip, out=values)
            self._round(bits.reshape(-1), self._spare[: strip.size])
            np.copyto(strip, bits, casting="unsafe")

    def _round(self, bits: NDArray[np.int32], spare: NDArray[np.int32]) -> None:
        """Round float32 bit patterns half to even to those of the dtype, less 1."""
        np.right_shift(bits, self._shift, out=spare)
        np.bitwise_and(spare, self._one, out=spare)
        np.add(spare, self._half, out=spare)
        np.add(bits, spare, out=bits)
        np.right_shift(bits, self._shift, out=bits)

    def add_signs(self, words: Words, out: Words) -> None:
        """Write to `out` the results of `round_groups`, with the signs of `words`. Zeros become 0.0 without a sign."""
        magnitudes, kind = self._words[: words.size].reshape(words.shape), words.dtype.type
        np.bitwise_and(words, kind(0x8000), out=out)
        np.bitwise_or(out, magnitudes, out=out)
        np.add(out, kind(1), out=out)  # 0xFFFF, which is 0.0 with either sign, overflows to 0


def _find_strips(shape: tuple[int, ...]) -> Iterator[Strip]:
    """Yield parts of groups of `shape` (down, height, across, width) as slices of the first two axes.

    Each part has about STRIP_SCALARS scalars, and at least one row.
    """
    down, height, across, width = shape
    count = max(STRIP_SCALARS // (across * width), 1)
    if height == 1:
        for begin in range(0, down, count):
            yield slice(begin, begin + count), slice(None)
        return
    for place in range(down):
        for begin in range(0, height, count):
            yield slice(place, place + 1), slice(begin, begin + count)
