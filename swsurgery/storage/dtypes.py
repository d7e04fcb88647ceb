"""The dtypes of the safetensors format, and exact decoding and encoding of one scalar.

Arithmetic is done on exact fractions and rounded once, half to even; nothing saturates
silently. This room knows numbers and bits; it knows no tensors and no files, and needs no torch.

Sources: the safetensors format (README, `Dtype` in its Rust crate) for names and sizes; IEEE 754-2019
for binary16/32/64; "FP8 Formats for Deep Learning" (arXiv:2209.05433) for F8_E4M3 and F8_E5M2; "8-bit
Numerical Formats for Deep Neural Networks" (arXiv:2206.02915) for the FNUZ forms, whose only NaN is
0x80; OCP Microscaling Formats 1.0 for E8M0, F6 and F4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from swsurgery.errors import NumberError
from swsurgery.storage import dtypes

Value = int | float
"""What a scalar decodes to: an int for integer dtypes and BOOL, else a float. Every float dtype of the
format is a subset of binary64, so a Python float holds each of its values exactly."""


class Written(float):
    """A decimal number of JSON's grammar: to others the nearest binary64, and `exact` where it is rounded to a dtype,
    for on the way over binary64 it would be rounded twice."""

    __slots__ = ("_text",)

    def __new__(cls, text: str) -> Written:
        number = super().__new__(cls, text)
        number._text = text
        return number

    @property
    def exact(self) -> Fraction:
        if self and math.isfinite(self):
            return Fraction(self._text)
        # How near to zero or how large does not matter, and its exponent may be of any length.
        digits = self._text.lower().partition("e")[0].strip("-0.")
        return Fraction(-1 if self._text.startswith("-") else 1, 1 << 1080) if digits else Fraction(0)


@dataclass(frozen=True)
class FloatFormat:
    """Binary floating point: 1 sign bit, then exponent, then mantissa.

    `special` says which patterns are not numbers: "ieee" (top exponent is inf and NaN), "fn" (finite:
    only the all-ones pattern is NaN), "fnuz" (finite, unsigned zero: only 0x80 is NaN, and no -0).
    """

    exponent: int
    mantissa: int
    bias: int
    special: str

    @cached_property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @cached_property
    def largest(self) -> int:
        """The bits of the largest finite value."""
        all_ones = (1 << (self.bits - 1)) - 1
        return {"ieee": all_ones - (1 << self.mantissa), "fn": all_ones - 1, "fnuz": all_ones}[self.special]


@dataclass(frozen=True)
class Dtype:
    """One row of the table. `bits` per element; `refusal` says why a scalar of it cannot be edited."""

    name: str
    bits: int
    kind: str  # "float", "int", "uint", "bool" or "opaque"
    float_format: FloatFormat | None = None
    refusal: str = ""

    @property
    def size(self) -> int:
        """Bytes per element (only for the dtypes of whole bytes)."""
        return self.bits // 8


def _float(name: str, exponent: int, mantissa: int, bias: int, special: str) -> Dtype:
    return Dtype(name, 1 + exponent + mantissa, "float", FloatFormat(exponent, mantissa, bias, special))


_SUB_BYTE = "holds several elements in a byte, which are scaled by block: a scalar of it is not a weight"

DTYPES: dict[str, Dtype] = {
    d.name: d
    for d in (
        Dtype("BOOL", 8, "bool"),
        Dtype("F4", 4, "opaque", refusal=_SUB_BYTE),
        Dtype("F6_E2M3", 6, "opaque", refusal=_SUB_BYTE),
        Dtype("F6_E3M2", 6, "opaque", refusal=_SUB_BYTE),
        Dtype("U8", 8, "uint"),
        Dtype("I8", 8, "int"),
        _float("F8_E5M2", 5, 2, 15, "ieee"),
        _float("F8_E4M3", 4, 3, 7, "fn"),
        Dtype("F8_E8M0", 8, "opaque", refusal="holds block scales (powers of two) and has no zero"),
        _float("F8_E4M3FNUZ", 4, 3, 8, "fnuz"),
        _float("F8_E5M2FNUZ", 5, 2, 16, "fnuz"),
        Dtype("I16", 16, "int"),
        Dtype("U16", 16, "uint"),
        _float("F16", 5, 10, 15, "ieee"),
        _float("BF16", 8, 7, 127, "ieee"),
        Dtype("I32", 32, "int"),
        Dtype("U32", 32, "uint"),
        _float("F32", 8, 23, 127, "ieee"),
        Dtype("C64", 64, "opaque", refusal="is complex: an edit has one real value"),
        _float("F64", 11, 52, 1023, "ieee"),
        Dtype("I64", 64, "int"),
        Dtype("U64", 64, "uint"),
    )
}


def decode(dtype: Dtype, data: bytes) -> Value:
    """The value of one scalar from its little-endian bytes, exactly. NaN and infinities come back as such.

    Raises NumberError where the dtype's scalars have no single real value.
    """
    if dtype.kind == "opaque":
        raise NumberError(f"{dtype.name} {dtype.refusal}")
    if dtype.kind != "float":
        return int.from_bytes(data, "little", signed=dtype.kind == "int")
    fmt = dtype.float_format
    bits = int.from_bytes(data, "little")
    negative = bits >> (fmt.bits - 1)
    magnitude = bits & ((1 << (fmt.bits - 1)) - 1)
    if fmt.special == "fnuz" and negative and magnitude == 0:
        return math.nan
    if magnitude > fmt.largest:
        infinite = fmt.special == "ieee" and magnitude == fmt.largest + 1
        return (-math.inf if negative else math.inf) if infinite else math.nan
    value = _magnitude(fmt, magnitude)
    return -value if negative else value


def encode(dtype: Dtype, value: Value | Fraction, *, negative_zero: bool = False) -> bytes:
    """The little-endian bytes of `value`, rounded once to the dtype, half to even.

    Raises NumberError, never saturates: on overflow, for NaN and infinities, for a non-zero value that
    would round to zero, and for a value that an integer dtype does not have.
    """
    if dtype.kind == "opaque":
        raise NumberError(f"{dtype.name} {dtype.refusal}")
    if isinstance(value, float) and not math.isfinite(value):
        raise NumberError(f"{value} is not finite")
    exact = value.exact if isinstance(value, Written) else Fraction(value)
    if dtype.kind != "float":
        return _encode_integer(dtype, exact)
    fmt = dtype.float_format
    if exact == 0:
        negative = math.copysign(1, value) < 0 if isinstance(value, float) else negative_zero
        return zero(dtype) if not negative or fmt.special == "fnuz" else _pack(fmt, 1, 0)
    magnitude = _round(fmt, abs(exact))
    if magnitude > fmt.largest:
        largest = _magnitude(fmt, fmt.largest)
        raise NumberError(f"{show(value)} overflows {dtype.name}, whose largest value is {show(largest)}")
    if magnitude == 0:
        raise NumberError(f"{show(value)} underflows {dtype.name} to zero", remedy="zero it where zero is meant")
    return _pack(fmt, int(exact < 0), magnitude)


def zero(dtype: Dtype) -> bytes:
    """All bits zero. Raises NumberError where that is no zero, or no single scalar."""
    if dtype.kind == "opaque":
        raise NumberError(f"{dtype.name} {dtype.refusal}")
    return bytes(dtype.size)


def scaled(dtype: Dtype, data: bytes, factor: float) -> bytes:
    """The stored scalar times `factor` (the binary64 number itself): the exact product, rounded once to
    the dtype, half to even. Raises NumberError for what `encode` refuses, for integer dtypes and for a
    stored value that is not finite."""
    if dtype.kind in ("int", "uint", "bool"):
        raise NumberError(f"{dtype.name} is an integer dtype: a product is not exact", remedy="use set or zero")
    value = decode(dtype, data)
    if not math.isfinite(value):
        raise NumberError(f"the stored value is {value}, which cannot be scaled", remedy="use set or zero")
    (a, b), (c, d) = value.as_integer_ratio(), factor.as_integer_ratio()
    product = Fraction(a * c, b * d)
    return encode(dtype, product, negative_zero=math.copysign(1, value) * math.copysign(1, factor) < 0)


def bits_of(data: bytes) -> str:
    """Little-endian bytes as the usual hex word, `0x40bc`."""
    return "0x" + data[::-1].hex()


def from_bits(dtype: Dtype, text: str) -> bytes:
    """`0x40bc` as the bytes of one scalar. Raises NumberError where the width is not the dtype's."""
    if len(text) - 2 != dtype.bits // 4:
        raise NumberError(f"{text} has {len(text) - 2} hex digits, {dtype.name} takes {dtype.bits // 4}")
    return bytes.fromhex(text[2:])[::-1]


def round_to(dtype: Dtype, value: Value) -> float:
    """`value` as the dtype would hold it; overflow gives an infinity and underflow 0. For comparisons only."""
    try:
        return decode(dtype, encode(dtype, value))
    except NumberError:
        return math.nan if math.isnan(value) else math.copysign(math.inf if abs(value) > 1 else 0.0, value)


def show(value: Value | Fraction) -> str:
    """A value as people read it: shortest decimal that gives the same float."""
    if isinstance(value, int):
        return str(value)
    try:
        number = float(value)
    except OverflowError:
        return "a number beyond 1e308"
    if not number and (value.exact if isinstance(value, Written) else value):
        return "a number nearer to zero than 5e-324"
    return repr(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)


def _magnitude(fmt: FloatFormat, magnitude: int) -> float:
    exponent, mantissa = magnitude >> fmt.mantissa, magnitude & ((1 << fmt.mantissa) - 1)
    if exponent:
        mantissa += 1 << fmt.mantissa
    return math.ldexp(mantissa, max(exponent, 1) - fmt.bias - fmt.mantissa)  # exact: binary64 holds every format


def _round(fmt: FloatFormat, exact: Fraction) -> int:
    """Nearest pattern without its sign, half to even, in integers only. Patterns are ordered like values, so a carry
    out of the mantissa lands in the exponent by itself, and overflow shows as a pattern above `largest`."""
    numerator, denominator = exact.numerator, exact.denominator
    exponent = numerator.bit_length() - denominator.bit_length()
    if numerator << max(-exponent, 0) < denominator << max(exponent, 0):
        exponent -= 1
    exponent = max(exponent, 1 - fmt.bias)  # below that values are subnormal: their spacing stays
    shift = fmt.mantissa - exponent
    unit = denominator << max(-shift, 0)
    units, rest = divmod(numerator << max(shift, 0), unit)
    if 2 * rest > unit or (2 * rest == unit and units & 1):
        units += 1
    return units + ((exponent + fmt.bias - 1) << fmt.mantissa)


def _pack(fmt: FloatFormat, negative: int, magnitude: int) -> bytes:
    return (negative << (fmt.bits - 1) | magnitude).to_bytes(fmt.bits // 8, "little")


def _encode_integer(dtype: Dtype, exact: Fraction) -> bytes:
    if dtype.kind == "bool":
        low, high = 0, 1
    elif dtype.kind == "int":
        low, high = -(1 << (dtype.bits - 1)), (1 << (dtype.bits - 1)) - 1
    else:
        low, high = 0, (1 << dtype.bits) - 1
    if exact.denominator != 1 or not low <= exact <= high:
        raise NumberError(f"{show(exact)} is not a value of {dtype.name}", remedy=f"whole numbers from {low} to {high}")
    return int(exact).to_bytes(dtype.size, "little", signed=dtype.kind == "int")


def json_value(dtype: Dtype, data: bytes) -> int | float | str | None:
    """A stored value for JSON: a number; "nan", "inf" or "-inf"; None where the dtype has no single value."""
    if dtype.kind == "opaque":
        return None
    value = dtypes.decode(dtype, data)
    return value if math.isfinite(value) else str(value)
