"""Decode and encode single scalars of every safetensors dtype exactly.

Arithmetic uses exact fractions and rounds once, half to even. A value too large for its dtype is an error; it is never
replaced by the largest value. Must not depend on tensors, files or torch.

Sources: the safetensors format (README, and `Dtype` in its Rust crate) for names and sizes; IEEE 754-2019 for
binary16/32/64; "FP8 Formats for Deep Learning" (arXiv:2209.05433) for F8_E4M3 and F8_E5M2; "8-bit Numerical Formats for
Deep Neural Networks" (arXiv:2206.02915) for the FNUZ formats, whose only NaN is 0x80; OCP Microscaling Formats 1.0 for
E8M0, F6 and F4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Literal

from swsurgery.errors import NumberError
from swsurgery.storage.numbers import Written, format_exact

Value = int | float
"""A decoded scalar: an int for integer dtypes and BOOL, a float for float dtypes.

A Python float is a float64, which represents every value of every float dtype of safetensors exactly."""


DtypeKind = Literal["float", "int", "uint", "bool", "opaque"]


@dataclass(frozen=True)
class Dtype:
    """One dtype of safetensors. `bits` is the width of one element.

    If `kind` is "opaque", elements cannot be edited. `refusal` then explains why. In messages it follows the name of
    the dtype: "C64 is complex, but an edit sets one real number".
    """

    name: str
    bits: int
    kind: DtypeKind
    refusal: str = ""

    @property
    def size(self) -> int:
        """Bytes per element (meaningful only if an element fills whole bytes)."""
        return self.bits // 8


@dataclass(frozen=True)
class FloatDtype(Dtype):
    """A binary floating-point dtype: 1 sign bit, then `exponent` bits, then `mantissa` bits. `kind` is "float".

    `bias` is the number that is subtracted from the stored exponent. `special` defines which bit patterns are
    not numbers: "ieee" (those with the largest exponent are infinity and NaN), "fn" (only the one with all bits 1 after
    the sign is NaN) or "fnuz" (only 0x80 is NaN, and negative zero does not exist).
    """

    exponent: int = field(kw_only=True)
    mantissa: int = field(kw_only=True)
    bias: int = field(kw_only=True)
    special: Literal["ieee", "fn", "fnuz"] = field(kw_only=True)

    @cached_property
    def largest(self) -> int:
        """Bit pattern of the largest finite value."""
        all_ones = (1 << (self.bits - 1)) - 1
        return {"ieee": all_ones - (1 << self.mantissa), "fn": all_ones - 1, "fnuz": all_ones}[self.special]


def _make_float(
    name: str, exponent: int, mantissa: int, bias: int, special: Literal["ieee", "fn", "fnuz"]
) -> FloatDtype:
    bits = 1 + exponent + mantissa
    return FloatDtype(name, bits, "float", exponent=exponent, mantissa=mantissa, bias=bias, special=special)


_SUB_BYTE = "packs several elements into a byte and scales them by block, so one element is not a weight"

DTYPES: dict[str, Dtype] = {
    d.name: d
    for d in (
        Dtype("BOOL", 8, "bool"),
        Dtype("F4", 4, "opaque", refusal=_SUB_BYTE),
        Dtype("F6_E2M3", 6, "opaque", refusal=_SUB_BYTE),
        Dtype("F6_E3M2", 6, "opaque", refusal=_SUB_BYTE),
        Dtype("U8", 8, "uint"),
        Dtype("I8", 8, "int"),
        _make_float("F8_E5M2", 5, 2, 15, "ieee"),
        _make_float("F8_E4M3", 4, 3, 7, "fn"),
        Dtype("F8_E8M0", 8, "opaque", refusal="contains block scales (powers of two) and has no zero"),
        _make_float("F8_E4M3FNUZ", 4, 3, 8, "fnuz"),
        _make_float("F8_E5M2FNUZ", 5, 2, 16, "fnuz"),
        Dtype("I16", 16, "int"),
        Dtype("U16", 16, "uint"),
        _make_float("F16", 5, 10, 15, "ieee"),
        _make_float("BF16", 8, 7, 127, "ieee"),
        Dtype("I32", 32, "int"),
        Dtype("U32", 32, "uint"),
        _make_float("F32", 8, 23, 127, "ieee"),
        Dtype("C64", 64, "opaque", refusal="is complex, but an edit sets one real number"),
        _make_float("F64", 11, 52, 1023, "ieee"),
        Dtype("I64", 64, "int"),
        Dtype("U64", 64, "uint"),
    )
}


def decode(dtype: Dtype, data: bytes) -> Value:
    """Decode the little-endian bytes of one scalar to its exact value, which may be NaN or infinite.

    Raises NumberError for an opaque dtype.
    """
    if dtype.kind == "opaque":
        raise NumberError(f"{dtype.name} {dtype.refusal}")
    if not isinstance(dtype, FloatDtype):
        return int.from_bytes(data, "little", signed=dtype.kind == "int")
    bits = int.from_bytes(data, "little")
    negative = bits >> (dtype.bits - 1)
    magnitude = bits & ((1 << (dtype.bits - 1)) - 1)
    if dtype.special == "fnuz" and negative and magnitude == 0:
        return math.nan
    if magnitude > dtype.largest:
        infinite = dtype.special == "ieee" and magnitude == dtype.largest + 1
        return (-math.inf if negative else math.inf) if infinite else math.nan
    value = _decode_magnitude(dtype, magnitude)
    return -value if negative else value


def encode(dtype: Dtype, value: Value | Fraction, *, negative_zero: bool = False) -> bytes:
    """Encode `value` as little-endian bytes, rounded once to the dtype, half to even.

    An int or a Fraction cannot be -0.0. If it is 0 and `negative_zero` is True, it is encoded as negative zero.

    Raises NumberError if the dtype is opaque, if `value` is NaN, infinite or too large for the dtype, if a non-zero
    value would round to zero, or if the dtype is an integer dtype that cannot represent `value`.
    """
    if dtype.kind == "opaque":
        raise NumberError(f"{dtype.name} {dtype.refusal}")
    if isinstance(value, float) and not math.isfinite(value):
        raise NumberError(f"{value} is not finite")
    exact = value.exact if isinstance(value, Written) else Fraction(value)
    if not isinstance(dtype, FloatDtype):
        return _encode_integer(dtype, exact)
    if exact == 0:
        negative = math.copysign(1, value) < 0 if isinstance(value, float) else negative_zero
        return make_zero(dtype) if not negative or dtype.special == "fnuz" else _pack(dtype, 1, 0)
    magnitude = _round_magnitude(dtype, abs(exact))
    if magnitude > dtype.largest:
        largest = _decode_magnitude(dtype, dtype.largest)
        what = f"{format_exact(value)} overflows {dtype.name}"
        raise NumberError(f"{what}, whose largest value is {format_exact(largest)}")
    if magnitude == 0:
        what = f"{format_exact(value)} underflows {dtype.name} to zero"
        raise NumberError(what, remedy="use op: zero if the value should become zero")
    return _pack(dtype, int(exact < 0), magnitude)


def make_zero(dtype: Dtype) -> bytes:
    """Return the bytes of zero: all bits 0. Raises NumberError for an opaque dtype."""
    if dtype.kind == "opaque":
        raise NumberError(f"{dtype.name} {dtype.refusal}")
    return bytes(dtype.size)


def scale_value(dtype: Dtype, data: bytes, factor: float) -> bytes:
    """Multiply a stored scalar by `factor` exactly and round the product once to the dtype, half to even.

    The float64 `factor` is not rounded to the dtype before it is multiplied. Raises NumberError for integer dtypes, for
    a stored value that is not finite, and for a product that `encode` refuses.
    """
    if dtype.kind in ("int", "uint", "bool"):
        raise NumberError(f"{dtype.name} is an integer dtype, so it cannot be scaled", remedy="use set or zero")
    value = decode(dtype, data)
    if not math.isfinite(value):
        raise NumberError(f"the stored value is {value}, which cannot be scaled", remedy="use set or zero")
    (a, b), (c, d) = value.as_integer_ratio(), factor.as_integer_ratio()
    product = Fraction(a * c, b * d)
    return encode(dtype, product, negative_zero=math.copysign(1, value) * math.copysign(1, factor) < 0)


def format_bits(data: bytes) -> str:
    """Format the little-endian bytes of a scalar as a hexadecimal number such as `0x40bc`."""
    return "0x" + data[::-1].hex()


def parse_bits(dtype: Dtype, text: str) -> bytes:
    """Parse a hexadecimal number such as `0x40bc` to little-endian bytes; the inverse of `format_bits`.

    Raises NumberError if `text` has more or fewer digits than a value of the dtype.
    """
    if len(text) - 2 != dtype.bits // 4:
        raise NumberError(f"{text} has {len(text) - 2} hex digits, but {dtype.name} takes {dtype.bits // 4}")
    return bytes.fromhex(text[2:])[::-1]


def round_to(dtype: Dtype, value: Value | Fraction) -> float:
    """Round `value` to a value of the dtype, for a comparison with stored values.

    Never raises NumberError: an overflow becomes infinity, an underflow becomes 0, and NaN stays NaN.
    """
    try:
        return decode(dtype, encode(dtype, value))
    except NumberError:
        if math.isnan(value):
            return math.nan
        return math.copysign(math.inf if not -1 <= value <= 1 else 0.0, value)


def _decode_magnitude(dtype: FloatDtype, magnitude: int) -> float:
    """Decode a finite bit pattern without its sign bit. The float64 result is exact."""
    exponent, mantissa = magnitude >> dtype.mantissa, magnitude & ((1 << dtype.mantissa) - 1)
    if exponent:
        mantissa += 1 << dtype.mantissa
    return math.ldexp(mantissa, max(exponent, 1) - dtype.bias - dtype.mantissa)


def _round_magnitude(dtype: FloatDtype, exact: Fraction) -> int:
    """Round a positive number to the dtype, half to even. Returns the bit pattern without its sign bit.

    Uses integers only. Bit patterns are ordered like the values that they encode, so a carry out of the mantissa
    increments the exponent. On overflow the result is greater than `dtype.largest`.
    """
    numerator, denominator = exact.numerator, exact.denominator
    exponent = numerator.bit_length() - denominator.bit_length()
    if numerator << max(-exponent, 0) < denominator << max(exponent, 0):
        exponent -= 1
    exponent = max(exponent, 1 - dtype.bias)  # smaller values are subnormal and share one spacing
    shift = dtype.mantissa - exponent
    unit = denominator << max(-shift, 0)
    units, rest = divmod(numerator << max(shift, 0), unit)
    if 2 * rest > unit or (2 * rest == unit and units & 1):
        units += 1
    return units + ((exponent + dtype.bias - 1) << dtype.mantissa)


def _pack(dtype: FloatDtype, negative: int, magnitude: int) -> bytes:
    return (negative << (dtype.bits - 1) | magnitude).to_bytes(dtype.size, "little")


def _encode_integer(dtype: Dtype, exact: Fraction) -> bytes:
    """Encode a value of an integer dtype or BOOL. Raises NumberError if the dtype cannot represent it."""
    if dtype.kind == "bool":
        low, high = 0, 1
    elif dtype.kind == "int":
        low, high = -(1 << (dtype.bits - 1)), (1 << (dtype.bits - 1)) - 1
    else:
        low, high = 0, (1 << dtype.bits) - 1
    if exact.denominator != 1 or not low <= exact <= high:
        what = f"{format_exact(exact)} is not a value of {dtype.name}"
        raise NumberError(what, remedy=f"give a whole number from {low} to {high}")
    return int(exact).to_bytes(dtype.size, "little", signed=dtype.kind == "int")


def convert_to_json(dtype: Dtype, data: bytes) -> int | float | str | None:
    """Convert stored bytes to a JSON value: a number, "nan", "inf" or "-inf", or None for an opaque dtype."""
    if dtype.kind == "opaque":
        return None
    value = decode(dtype, data)
    return value if math.isfinite(value) else str(value)
