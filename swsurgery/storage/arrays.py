"""Convert arrays of bit patterns to float32 or float64 values exactly, and back with one rounding.

The scalar functions of `storage.dtypes` define the results. This module computes the same for arrays.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from swsurgery.errors import NumberError, pluralise
from swsurgery.storage.dtypes import DTYPES, Dtype, FloatDtype, decode

Words = NDArray[np.unsignedinteger]
"""An array of bit patterns, one per scalar, of the unsigned integer type with the width of the dtype."""

Singles = NDArray[np.float32]
Doubles = NDArray[np.float64]


def get_word_type(dtype: Dtype) -> np.dtype[np.unsignedinteger]:
    """Return the unsigned integer type of one bit pattern. Raises NumberError if an element is not whole bytes."""
    if dtype.bits % 8:
        raise NumberError(f"{dtype.name} {dtype.refusal}")
    return np.dtype(f"<u{dtype.size}")


def require_float(dtype: Dtype, name: str) -> FloatDtype:
    """Return `dtype` as a floating-point dtype. Raises NumberError for any other dtype; `name` is the tensor's."""
    if isinstance(dtype, FloatDtype):
        return dtype
    raise NumberError(f"{dtype.name} is not a floating-point dtype", name, "only zero and set accept it")


def decode_singles(dtype: FloatDtype, words: Words, out: Singles | None = None, finite: bool = False) -> Singles:
    """Convert bit patterns of a dtype of at most 32 bits to float32. Every value is exact; NaN stays NaN.

    `finite` is faster for F16. NaN and infinity then become values of magnitude 65,536 or more, which F16 has not.
    """
    if out is None:
        out = np.empty(words.shape, np.float32)
    if dtype.name == "F32":
        np.copyto(out.view(np.uint32), words)
    elif dtype.name == "BF16":
        bits = out.view(np.uint32)
        np.copyto(bits, words)
        np.left_shift(bits, np.uint32(16), out=bits)
    elif dtype.name == "F16" and finite:
        _decode_float16(words, out)
    else:  # mode "wrap" skips the check of the indices, which cannot be out of range
        np.take(_make_decode_table(dtype.name), words, out=out, mode="wrap")
    return out


def decode_doubles(dtype: FloatDtype, words: Words, out: Doubles | None = None) -> Doubles:
    """Convert bit patterns of any floating-point dtype to float64. Every value is exact; NaN stays NaN."""
    if out is None:
        out = np.empty(words.shape, np.float64)
    if dtype.name == "F64":
        np.copyto(out.view(np.uint64), words)
    else:
        with np.errstate(invalid="ignore"):  # signalling NaN
            np.copyto(out, decode_singles(dtype, words))
    return out


def encode_singles(dtype: FloatDtype, values: Singles, out: Words | None = None) -> Words:
    """Round float32 values once to a dtype of at most 32 bits, half to even, and return their bit patterns.

    Unlike `storage.dtypes.encode`, a value that underflows becomes zero with its sign (without a sign in a FNUZ dtype).
    Raises NumberError if a value is not finite or overflows the dtype. `values` is overwritten.
    """
    if out is None:
        out = np.empty(values.shape, get_word_type(dtype))
    if not np.isfinite(values).all():
        _refuse(dtype, ~np.isfinite(values))
    pack_singles(dtype, values, out)
    if has_not_finite(dtype, out):
        _refuse(dtype, find_not_finite(dtype, out))
    return out


def pack_singles(
    dtype: FloatDtype, values: Singles, out: Words, normal: bool = False, spare: Singles | None = None
) -> None:
    """Write to `out` what `encode_singles` returns, without looking for values that it would refuse.

    `normal` is faster for F16. It promises that no value is subnormal in the dtype, and that none overflows. `spare`
    is a buffer of the shape of `values`. Overwrites both.
    """
    if spare is None:
        spare = np.empty_like(values)
    bits = values.view(np.uint32)
    if dtype.name == "F32":
        np.copyto(out, bits)
    elif dtype.name == "BF16":
        _round_to_bfloat16(bits, out, spare.view(np.uint32))
    elif dtype.name == "F16" and normal:
        _round_to_normal_float16(values, out, spare.view(np.int32))
    elif dtype.name == "F16":
        _round_to_float16(bits, out)
    else:
        np.take(_make_encode_table(dtype.name), _round_to_odd_bfloat16(bits), out=out, mode="wrap")


def encode_doubles(dtype: FloatDtype, values: Doubles, out: Words | None = None) -> Words:
    """Round float64 values once to any floating-point dtype, half to even; otherwise like `encode_singles`."""
    if out is None:
        out = np.empty(values.shape, get_word_type(dtype))
    if dtype.name == "F64":
        np.copyto(out, values.view(np.uint64))
        if has_not_finite(dtype, out):
            _refuse(dtype, find_not_finite(dtype, out))
        return out
    if not np.isfinite(values).all():
        _refuse(dtype, ~np.isfinite(values))
    with np.errstate(over="ignore", under="ignore"):
        singles = values.astype(np.float32)
    if dtype.name != "F32":
        _make_odd(singles, values)
    return encode_singles(dtype, singles, out)


def has_not_finite(dtype: FloatDtype, words: Words) -> bool:
    """Return True if a bit pattern is NaN or infinite."""
    if not words.size:
        return False
    if dtype.special == "fnuz":
        return bool((words == dtype.largest + 1).any())
    return bool(find_magnitudes(dtype, words).max() > dtype.largest)


def find_not_finite(dtype: FloatDtype, words: Words) -> NDArray[np.bool_]:
    """Return True for each bit pattern that is NaN or infinite."""
    if dtype.special == "fnuz":
        return np.equal(words, dtype.largest + 1)
    return np.greater(find_magnitudes(dtype, words), dtype.largest)


def find_magnitudes(dtype: FloatDtype, words: Words) -> Words:
    """Return the bit patterns without their signs. They are ordered like |w|."""
    magnitudes: Words = words & words.dtype.type((1 << (dtype.bits - 1)) - 1)
    return magnitudes


def order_words(dtype: FloatDtype, words: Words) -> NDArray[np.signedinteger]:
    """Return signed integers that are ordered like the values of the bit patterns; -0.0 comes before 0.0.

    `restore_words` is the inverse.
    """
    signed = words.view(np.dtype(f"<i{dtype.size}"))
    keys: NDArray[np.signedinteger] = signed >> signed.dtype.type(dtype.bits - 1)
    keys &= signed.dtype.type((1 << (dtype.bits - 1)) - 1)
    keys ^= signed
    return keys


def restore_words(dtype: FloatDtype, keys: NDArray[np.signedinteger], out: Words | None = None) -> Words:
    """Return the bit patterns whose ordered integers are `keys`."""
    words = order_words(dtype, keys.view(get_word_type(dtype))).view(get_word_type(dtype))
    if out is None:
        return words
    np.copyto(out, words)
    return out


def _decode_float16(words: Words, out: Singles) -> None:
    """Convert finite float16 bit patterns to float32.

    The sign is moved by 16 bits, and exponent and fraction by 13. As the exponent's bias is 127 instead of 15, that is
    the value times 2**-112, also for subnormal values.
    """
    bits = out.view(np.int32)
    np.copyto(bits, words.view("<i2"))
    bits <<= np.int32(13)
    bits &= np.int32(~0x70000000)  # copies of the sign
    out *= np.float32(2.0**112)


def _round_to_bfloat16(bits: NDArray[np.uint32], out: Words, odd: NDArray[np.uint32]) -> None:
    """Round float32 bit patterns to the upper 16 bits, half to even. Overwrites `bits` and the buffer `odd`."""
    np.right_shift(bits, np.uint32(16), out=odd)
    odd &= np.uint32(1)
    odd += np.uint32(0x7FFF)
    bits += odd
    bits >>= np.uint32(16)
    np.copyto(out, bits, casting="unsafe")


def _round_to_normal_float16(values: Singles, out: Words, spare: NDArray[np.int32]) -> None:
    """Round float32 values to float16, half to even, if each is 0 or at least 2**-14, and none overflows.

    Overwrites `values` and the buffer `spare`.
    """
    values *= np.float32(2.0**-112)  # exact; the exponent's bias is 15 instead of 127
    bits = values.view(np.int32)
    np.right_shift(bits, np.int32(13), out=spare)
    spare &= np.int32(1)
    spare += np.int32(0xFFF)
    bits += spare
    bits >>= np.int32(13)
    np.right_shift(bits, np.int32(3), out=spare)
    spare &= np.int32(0x8000)  # the sign
    bits |= spare
    np.copyto(out, bits, casting="unsafe")


def _round_to_float16(bits: NDArray[np.uint32], out: Words) -> None:
    """Round float32 bit patterns to float16, half to even. Overwrites `bits`.

    Faster than numpy's conversion, which takes one scalar at a time. An overflow gives a pattern that is not finite.
    """
    signs = bits >> np.uint32(16)
    signs &= np.uint32(0x8000)
    bits &= np.uint32(0x7FFFFFFF)
    # All bits of `tiny` are 1 below 2**-14, the smallest normal float16.
    tiny = (bits - np.uint32(0x38800000)).view(np.int32)
    tiny >>= np.int32(31)
    subnormal = None
    if tiny.any():  # 0.5 + |w| is rounded to multiples of 2**-24, as subnormal float16 values are
        subnormal = (bits.view(np.float32) + np.float32(0.5)).view(np.uint32)
        subnormal -= np.uint32(0x3F000000)
    np.clip(bits, np.uint32(0), np.uint32(0x477FFFFF), out=bits)  # all larger values round to infinity
    odd = bits >> np.uint32(13)
    odd &= np.uint32(1)
    bits += odd
    bits += np.uint32(0xFFF - (112 << 23) & 0xFFFFFFFF)  # the exponent's bias is 15 instead of 127
    bits >>= np.uint32(13)
    if subnormal is not None:
        subnormal ^= bits
        subnormal &= tiny.view(np.uint32)
        bits ^= subnormal
    bits |= signs
    np.copyto(out, bits, casting="unsafe")


def _round_to_odd_bfloat16(bits: NDArray[np.uint32]) -> Words:
    """Return the upper 16 bits of float32 bit patterns; the last one is set if a lower bit is.

    Rounding to odd keeps what a later rounding to fewer bits needs, so that both together round once (Boldo and
    Melquiond, "When double rounding is odd", 2005).
    """
    upper = (bits >> np.uint32(16)).astype(np.uint16)
    upper |= (bits & np.uint32(0xFFFF)) != 0
    return upper


def _make_odd(singles: Singles, values: Doubles) -> None:
    """Change float32 values that were rounded from `values` to what rounding to odd gives."""
    bits = singles.view(np.uint32)
    exact = singles.astype(np.float64)
    bits -= np.abs(exact) > np.abs(values)
    bits |= exact != values


def _refuse(dtype: FloatDtype, bad: NDArray[np.bool_]) -> None:
    count = int(np.count_nonzero(bad))
    raise NumberError(f"{pluralise(count, 'result')} not finite or beyond the largest value of {dtype.name}")


@cache
def _make_decode_table(name: str) -> Singles:
    """Return the float32 values of all bit patterns of a dtype of 8 or 16 bits."""
    dtype = DTYPES[name]
    patterns = range(1 << dtype.bits)
    table = np.array([decode(dtype, bits.to_bytes(dtype.size, "little")) for bits in patterns], np.float32)
    table.flags.writeable = False
    return table


@cache
def _make_encode_table(name: str) -> Words:
    """Return the bit patterns of a dtype of 8 bits for all bit patterns of BF16, rounded half to even.

    Values that overflow become a bit pattern that is not finite.
    """
    dtype = DTYPES[name]
    assert isinstance(dtype, FloatDtype)
    values = np.abs(_make_decode_table("BF16").astype(np.float64))
    bad = ~np.isfinite(values)
    values[bad] = 0
    exponents = np.maximum(np.where(values, np.frexp(values)[1] - 1, 1 - dtype.bias), 1 - dtype.bias)
    units = np.rint(np.ldexp(values, dtype.mantissa - exponents))
    magnitudes = units.astype(np.int64) + ((exponents.astype(np.int64) + dtype.bias - 1) << dtype.mantissa)
    negative = np.arange(1 << 16) >= 1 << 15
    table = magnitudes + (negative << (dtype.bits - 1))
    if dtype.special == "fnuz":
        table[magnitudes == 0] = 0
        nan = dtype.largest + 1
    else:
        nan = (1 << (dtype.bits - 1)) - 1
    table[bad | (magnitudes > dtype.largest)] = nan
    words: Words = table.astype(np.uint8)
    words.flags.writeable = False
    return words
