"""Round F16 and BF16 scalars to symmetric levels with few passes over memory, on bit patterns without signs.

`round` defines the results, and computes them for every dtype. Division, rounding half to even and multiplication give
results of equal magnitude for w and -w. Therefore this module computes with |w| and restores the signs last. Maxima are
those of 16-bit integers.

|w| becomes a float32 by a shift of its bit pattern. For BF16 that is the value. F16 has 5 bits of exponent with the
bias 15, and the sign bit is set first, which adds 32 to the exponent. The float32, whose bias is 127, is then the value
times 2**-80, and the scale of a group is multiplied by the same power of two. Zeros and subnormal values of F16 become
normal numbers that are too large, but still smaller than the smallest normal value of F16. Their code is 0 in both
cases, because a scale is at least twice that value. Subnormal float32 numbers would be slow on some processors.

No product of a code and a scale is half-way between two values of the dtype, so that adding half a unit and cutting off
the lower bits rounds it to nearest. Proof: let m be the maximum of a group. It is an integer of at most 11 bits times a
power of two. A half-way value is an odd integer K of one more bit times a power of two.
- If m * code / top = K * 2**j, then top / gcd(top, code) divides m, since top is odd. So K is smaller than m.
- Otherwise both differ by a fraction of at least 1 / (K * top) > 2**-19. The float32 roundings of the scale and of the
  product change it by less than 2**-22.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from swsurgery.storage.arrays import Singles, Words
from swsurgery.storage.dtypes import FloatDtype

SMALLEST_SCALES = {"F16": 2.0**-13, "BF16": 2.0**-126}
"""The smallest scale for each dtype of this module. No result but 0 is then a subnormal value of the dtype."""

_SIGN, _REST = np.uint16(0x8000), np.uint16(0x7FFF)


class Magnitudes:
    """The magnitudes of a piece of scalars of a dtype in SMALLEST_SCALES.

    The buffers are used again for the next piece, so threads must not share an instance.
    """

    def __init__(self, dtype: FloatDtype) -> None:
        self._marked = dtype.name == "F16"  # the sign bit of every magnitude is set
        shift, factor = (13, 2.0**-80) if self._marked else (16, 1)
        self._shift, self._factor = np.int32(shift), np.float32(factor)
        less = 0 if self._marked else 1 << shift  # results of BF16 are 1 too small, so that 0 is recognised
        self._half = np.int32((1 << (shift - 1)) - less)
        self._words: Words = np.empty(0, np.uint16)
        self._values, self._spare = np.empty(0, np.float32), np.empty(0, np.float32)

    def take(self, words: Words) -> Words:
        """Take the magnitudes of a piece, an array (rows, columns). Returns an array for the other methods."""
        if words.size > self._words.size:
            self._words = np.empty(words.size, np.uint16)
            self._values, self._spare = np.empty(words.size, np.float32), np.empty(words.size, np.float32)
        magnitudes = self._words[: words.size].reshape(words.shape)
        if self._marked:
            return np.bitwise_or(words, _SIGN, out=magnitudes)
        return np.bitwise_and(words, _REST, out=magnitudes)

    def clear(self, magnitudes: Words, places: NDArray[np.int64]) -> None:
        """Set the magnitudes at flat indices to 0."""
        magnitudes.reshape(-1)[places] = _SIGN if self._marked else 0

    def get_patterns(self, maxima: Words) -> Words:
        """Return the bit patterns of maxima of magnitudes."""
        return maxima & _REST

    def round_groups(self, groups: Words, scale: Singles, top: int | None) -> None:
        """Replace each magnitude by rint(|w| / scale) * scale, for `put_signs`.

        `groups` has the shape (groups down, height, groups across, width), and `scale` has one number per group, in
        which the height and the width are 1, or one number for all. No scale is smaller than that in SMALLEST_SCALES,
        and no magnitude is NaN or infinite. Codes are limited to `top` if it is given.
        """
        values, spare = (b[: groups.size].reshape(groups.shape) for b in (self._values, self._spare))
        scale = scale * self._factor  # exact
        scales = scale
        if scale.size > 1:  # two operations with arrays of different shapes would be slower
            scales = spare
            np.copyto(scales, scale)
        bits = values.view(np.int32)
        np.copyto(bits, groups)
        np.left_shift(bits, self._shift, out=bits)
        np.divide(values, scales, out=values)
        np.rint(values, out=values)
        if top is not None:
            np.minimum(values, np.float32(top), out=values)
        np.multiply(values, scales, out=values)
        np.add(bits, self._half, out=bits)
        np.right_shift(bits, self._shift, out=bits)
        np.copyto(groups, bits, casting="unsafe")

    def put_signs(self, magnitudes: Words, words: Words, out: Words) -> None:
        """Write to `out` the rounded magnitudes with the signs of `words`. Zeros become 0.0, which has no sign."""
        if self._marked:
            np.bitwise_or(words, _REST, out=out)
            np.bitwise_and(out, magnitudes, out=out)  # 0.0 has no mark
        else:
            np.bitwise_and(words, _SIGN, out=out)
            np.bitwise_or(out, magnitudes, out=out)
            np.add(out, np.uint16(1), out=out)  # 0xFFFF, which is 0.0 with either sign, overflows to 0
