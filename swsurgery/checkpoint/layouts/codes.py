"""Define what codes of a few bits mean, and unpack arrays of them."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from swsurgery.storage.dtypes import Dtype, decode

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the 16 codes of FP4 (OCP Microscaling Formats 1.0, section 5.3.3)."""

Codes = NDArray[np.uint8]


@cache
def decode_codes(dtype: Dtype) -> tuple[float, ...]:
    """Return the values of the 256 bit patterns of an 8-bit dtype, in order; NaN stays NaN."""
    return tuple(float(decode(dtype, bytes([code]))) for code in range(256))


def list_integers(bits: int, zero: float = 0.0, *, offset: bool = True) -> list[float]:
    """Return the integers that codes of `bits` bits mean, minus the zero point `zero`, in the order of the codes.

    With `offset`, code 0 is the smallest signed integer, -2**(bits - 1). Otherwise, code 0 is the integer 0.
    """
    first = -(1 << (bits - 1)) if offset else 0
    return [first + code - zero for code in range(1 << bits)]


def unpack_stream(data: bytes, bits: int, count: int) -> Codes:
    """Return the first `count` codes of `bits` bits (at most 8) of a bit stream, the least significant bit first."""
    stream = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little", count=count * bits)
    packed = np.packbits(stream.reshape(count, bits), axis=1, bitorder="little")
    return packed.reshape(count)


def unpack_nibbles(data: bytes, *, low_first: bool = True) -> Codes:
    """Return the two codes of 4 bits in each byte, the low nibble first unless `low_first` is False."""
    packed = np.frombuffer(data, np.uint8)
    halves = (packed & 15, packed >> 4)
    return np.stack(halves if low_first else halves[::-1], axis=1).reshape(-1)
