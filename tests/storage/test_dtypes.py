"""One scalar's bits to its number and back, against numpy and ml_dtypes, which share no code with us.

Every pattern of the 8 and 16 bit floats is tried; the rounding oracle is a sorted table of what the
independent decoders say and a bisection in it, on whole numbers only.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_left
from fractions import Fraction
from functools import cache

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swsurgery.errors import NumberError
from swsurgery.storage.dtypes import (
    DTYPES,
    Dtype,
    decode,
    encode,
    format_bits,
    make_zero,
    parse_bits,
    round_to,
    scale_value,
)
from swsurgery.storage.numbers import format_exact

ORACLES = {
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}
FNUZ = {"F8_E4M3FNUZ", "F8_E5M2FNUZ"}
INTEGERS = {
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
}
OPAQUE = {"F4": "several elements", "F6_E2M3": "several elements", "F6_E3M2": "several elements",
          "F8_E8M0": "block scales", "C64": "complex"}  # fmt: skip
FACTORS = [1.0, -1.0, 2.0, 0.5, 1.5, -3.0, 0.1, 0.7, 1.1, 1 / 3, 0.999, 1.0000001, -0.25, 1e-3, 12345.678,
           2.0**-20]  # fmt: skip


@cache
def patterns(name: str) -> tuple[tuple[bytes, float], ...]:
    """Every bit pattern of a dtype, in order, as (little-endian bytes, value by the independent decoder)."""
    size = DTYPES[name].size
    words = np.arange(1 << (8 * size)).astype("<u2" if size == 2 else "u1")
    raw = words.tobytes()
    with np.errstate(invalid="ignore"):
        values = words.view(ORACLES[name]).astype(np.float64).tolist()
    return tuple((raw[i * size : (i + 1) * size], value) for i, value in enumerate(values))


@cache
def units(name: str) -> tuple[int, list[int]]:
    """(k, values): the finite values from 0 up as whole multiples of 2**-k, by ascending pattern."""
    half = patterns(name)[: 1 << (DTYPES[name].bits - 1)]
    ratios = [value.as_integer_ratio() for _, value in half if math.isfinite(value)]
    widest = max(denominator for _, denominator in ratios)
    return widest.bit_length() - 1, [numerator * (widest // denominator) for numerator, denominator in ratios]


def same(left: float, right: float) -> bool:
    """Equal as values and in the sign of a zero; NaN equals NaN."""
    if math.isnan(left) or math.isnan(right):
        return math.isnan(left) and math.isnan(right)
    return left == right and math.copysign(1, left) == math.copysign(1, right)


def refusal(dtype: Dtype, data: bytes, factor: float) -> str:
    """What `scale_value` says when it refuses. (pytest.raises is too slow for a hundred thousand calls.)"""
    try:
        got = scale_value(dtype, data, factor)
    except NumberError as error:
        return str(error)
    return f"not refused: {format_bits(data)} * {factor} gave {format_bits(got)}"


@pytest.mark.parametrize("name", ORACLES)
def test_every_pattern_decodes_as_the_independent_decoder_says(name):
    dtype = DTYPES[name]
    wrong = [format_bits(data) for data, value in patterns(name) if not same(decode(dtype, data), value)]
    assert wrong == []
    assert len(patterns(name)) == 1 << dtype.bits


@pytest.mark.parametrize("name", ORACLES)
def test_every_finite_value_encodes_to_its_own_pattern_and_the_others_are_refused(name):
    dtype, refused = DTYPES[name], 0
    for data, value in patterns(name):
        if math.isfinite(value):
            assert encode(dtype, value) == data
        else:
            refused += 1
            with pytest.raises(NumberError, match="is not finite"):
                encode(dtype, value)
    # Counted from the definitions: exponent all ones, both signs; or one NaN per sign; or one NaN.
    assert refused == {"F16": 2 * 1024, "BF16": 2 * 128, "F8_E5M2": 2 * 4, "F8_E4M3": 2}.get(name, 1)


@pytest.mark.parametrize("name", ORACLES)
def test_half_way_between_two_neighbours_the_even_pattern_wins_and_beside_it_the_nearer(name):
    dtype = DTYPES[name]
    k, values = units(name)
    step = Fraction(1, 1 << 200)
    for low in range(1, len(values) - 1):
        middle = Fraction(values[low] + values[low + 1], 2 << k)
        assert int.from_bytes(encode(dtype, middle), "little") == low + low % 2
        assert int.from_bytes(encode(dtype, middle * (1 - step)), "little") == low
        assert int.from_bytes(encode(dtype, middle * (1 + step)), "little") == low + 1


@pytest.mark.parametrize("name", ORACLES)
def test_the_first_value_that_rounds_away_from_the_largest_overflows(name):
    dtype = DTYPES[name]
    k, values = units(name)
    edge = Fraction(3 * values[-1] - values[-2], 2 << k)  # half a spacing above the largest
    # At the edge itself the tie goes to the even pattern: the largest itself where that is even.
    inside = edge if (len(values) - 1) % 2 == 0 else edge * (1 - Fraction(1, 1 << 60))
    assert int.from_bytes(encode(dtype, inside), "little") == len(values) - 1
    outside = edge * (1 + Fraction(1, 1 << 60)) if inside == edge else edge
    for sign in (1, -1):
        with pytest.raises(NumberError, match=f"overflows {name}, whose largest value is"):
            encode(dtype, sign * outside)


@pytest.mark.parametrize("name", ORACLES)
def test_half_of_the_smallest_value_underflows_and_a_little_more_does_not(name):
    dtype = DTYPES[name]
    k, values = units(name)
    half = Fraction(values[1], 2 << k)
    for sign in (1, -1):
        with pytest.raises(NumberError, match=f"underflows {name} to zero"):
            encode(dtype, sign * half)
    assert int.from_bytes(encode(dtype, half * (1 + Fraction(1, 1 << 60))), "little") == 1


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("name", ORACLES)
def test_scaled_is_the_nearest_value_to_the_exact_product(name, factor):
    dtype = DTYPES[name]
    _, values = units(name)
    numerator, denominator = factor.as_integer_ratio()
    top = values + [2 * values[-1] - values[-2]]  # one value past the largest, so that overflow has a place
    # Twice the values and twice their midpoints, so that all stay whole numbers.
    middles = [(low + high) * denominator for low, high in zip(top, top[1:], strict=False)]
    sign_bit = 1 << (dtype.bits - 1)
    outcomes = {"written": 0, "overflows": 0, "underflows": 0}
    for bits, (data, value) in enumerate(patterns(name)):
        if not math.isfinite(value):
            assert refusal(dtype, data, factor).startswith(f"the stored value is {value}, which cannot be scaled")
            continue
        magnitude = bits & (sign_bit - 1)
        product = 2 * values[magnitude] * abs(numerator)
        place = bisect_left(middles, product)
        if place < len(middles) and middles[place] == product and place % 2:
            place += 1
        expected = ""
        if place >= len(values):
            expected = "overflows"
        elif place == 0 and magnitude:
            expected = "underflows"
        if expected:
            outcomes[expected] += 1
            assert expected in refusal(dtype, data, factor)
            continue
        negative = (bits >= sign_bit) != (factor < 0)
        if place == 0 and name in FNUZ:
            negative = False  # these have one zero
        outcomes["written"] += 1
        assert scale_value(dtype, data, factor) == (place | sign_bit * negative).to_bytes(dtype.size, "little")
    finite = 2 * len(values) - (name in FNUZ)
    assert sum(outcomes.values()) == finite
    assert abs(factor) != 1 or outcomes["written"] == finite


@pytest.mark.parametrize("name", ORACLES)
def test_factor_one_changes_no_bit(name):
    finite = [data for data, value in patterns(name) if math.isfinite(value)]
    assert [scale_value(DTYPES[name], data, 1.0) for data in finite] == finite


@pytest.mark.parametrize("name", ["F16", "F32", "BF16"])
def test_one_rounding_differs_from_rounding_twice(name):
    """A product that a binary32 intermediate would carry to the wrong neighbour."""
    dtype = DTYPES[name]
    one = encode(dtype, 1.0)
    mantissa = {"F16": 10, "BF16": 7, "F32": 23}[name]
    factor = 1 + 2.0 ** -(mantissa + 1) + 2.0**-50  # just above half way: up; via a coarser step: a tie, so down
    assert decode(dtype, scale_value(dtype, one, factor)) == 1 + 2.0**-mantissa
    assert scale_value(dtype, one, 1 + 2.0 ** -(mantissa + 1)) == one


@pytest.mark.parametrize("name,word,kind", [("F32", "I", np.float32), ("F64", "Q", np.float64)])
def test_wide_floats_agree_with_numpy_on_samples(name, word, kind):
    dtype = DTYPES[name]
    generator = np.random.default_rng(20)
    edges = [0, 1, 2, (1 << (dtype.bits - 1)) - 1, 1 << (dtype.bits - 1), (1 << dtype.bits) - 1]
    edges += [int(np.array(np.finfo(kind).tiny).view(f"u{dtype.size}")) + i for i in (-1, 0, 1)]
    edges += [int(np.array(np.finfo(kind).max).view(f"u{dtype.size}")) + i for i in (-1, 0, 1)]
    words = edges + generator.integers(0, (1 << dtype.bits) - 1, 5000, dtype=np.uint64, endpoint=True).tolist()
    for bits in words:
        data = struct.pack("<" + word, bits)
        value = float(np.frombuffer(data, kind)[0])
        assert same(decode(dtype, data), value)
        if math.isfinite(value):
            assert encode(dtype, value) == data


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_binary64_rounds_to_binary32_as_numpy_does(value):
    with np.errstate(over="ignore", under="ignore"):
        expected = np.float32(value)
    dtype = DTYPES["F32"]
    if np.isinf(expected) or (expected == 0 and value != 0):
        with pytest.raises(NumberError, match="overflows|underflows"):
            encode(dtype, value)
    else:
        assert encode(dtype, value) == expected.astype("<f4").tobytes()


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(min_value=-8, max_value=8).filter(bool))
def test_a_binary64_product_is_the_machines_own(value, factor):
    """IEEE multiplication rounds the exact product once, so the hardware is the oracle where it stays finite."""
    dtype, product = DTYPES["F64"], value * factor
    data = struct.pack("<d", value)
    if math.isinf(product) or (product == 0 and value != 0):
        with pytest.raises(NumberError, match="overflows|underflows"):
            scale_value(dtype, data, factor)
    else:
        assert scale_value(dtype, data, factor) == struct.pack("<d", product)


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_agree_with_numpy_and_refuse_what_they_do_not_have(name):
    dtype, limits = DTYPES[name], np.iinfo(INTEGERS[name])
    for value in {limits.min, limits.min + 1, 0, 1, 77, limits.max - 1, limits.max}:
        data = np.array(value, INTEGERS[name]).astype(f"<{np.dtype(INTEGERS[name]).str[1:]}").tobytes()
        assert decode(dtype, data) == value
        assert type(decode(dtype, data)) is int
        assert encode(dtype, int(value)) == data
    for value in (int(limits.min) - 1, int(limits.max) + 1, 0.5, math.nan, math.inf):
        with pytest.raises(NumberError):
            encode(dtype, value)
    with pytest.raises(NumberError, match=rf"^{name} is an integer dtype.*use set or zero"):
        scale_value(dtype, bytes(dtype.size), 1.0)


def test_bool_holds_zero_and_one():
    dtype = DTYPES["BOOL"]
    assert [decode(dtype, b"\0"), decode(dtype, b"\1")] == [0, 1]
    assert [encode(dtype, 0), encode(dtype, 1), encode(dtype, 1.0)] == [b"\0", b"\1", b"\1"]
    for value in (2, -1, 0.5):
        with pytest.raises(NumberError, match="not a value of BOOL"):
            encode(dtype, value)
    with pytest.raises(NumberError, match="BOOL is an integer dtype"):
        scale_value(dtype, b"\1", 2.0)


@pytest.mark.parametrize("name", OPAQUE)
def test_dtypes_without_single_real_scalars_are_refused_by_name(name):
    dtype = DTYPES[name]
    data = bytes(max(dtype.size, 1))
    for attempt in (
        lambda: decode(dtype, data),
        lambda: encode(dtype, 0),
        lambda: make_zero(dtype),
        lambda: scale_value(dtype, data, 1.0),
    ):
        with pytest.raises(NumberError, match=f"^{name} .*{OPAQUE[name]}"):
            attempt()


def test_the_table_is_complete():
    """Every dtype is tested somewhere in this file, so a new row without a test fails here."""
    assert set(DTYPES) == set(ORACLES) | set(INTEGERS) | set(OPAQUE) | {"BOOL", "F32", "F64"}
    assert all(name == dtype.name for name, dtype in DTYPES.items())


@pytest.mark.parametrize("name", [*ORACLES, "F32", "F64", *INTEGERS, "BOOL"])
def test_zero_is_all_bits_zero_and_reads_as_positive_zero(name):
    dtype = DTYPES[name]
    assert make_zero(dtype) == bytes(dtype.bits // 8)
    assert same(decode(dtype, make_zero(dtype)), 0.0)
    assert encode(dtype, 0) == make_zero(dtype)


@pytest.mark.parametrize("name", ["F16", "BF16", "F8_E4M3", "F8_E5M2", "F32", "F64"])
def test_negative_zero_keeps_its_sign_where_the_dtype_has_one(name):
    dtype = DTYPES[name]
    negative = bytes(dtype.size - 1) + b"\x80"
    assert encode(dtype, -0.0) == negative
    assert scale_value(dtype, negative, 3.0) == negative
    assert scale_value(dtype, negative, -3.0) == make_zero(dtype)
    assert scale_value(dtype, make_zero(dtype), -3.0) == negative


@pytest.mark.parametrize("name", sorted(FNUZ))
def test_fnuz_dtypes_have_one_zero(name):
    assert encode(DTYPES[name], -0.0) == b"\0"
    assert scale_value(DTYPES[name], b"\0", -1.0) == b"\0"


def test_bits_are_written_most_significant_first():
    assert format_bits(bytes.fromhex("bc40")) == "0x40bc"
    assert parse_bits(DTYPES["BF16"], "0x40bc") == bytes.fromhex("bc40")
    assert parse_bits(DTYPES["BF16"], "0x40BC") == bytes.fromhex("bc40")
    assert decode(DTYPES["BF16"], bytes.fromhex("bc40")) == 5.875
    for data, _ in patterns("F16")[::97]:
        assert parse_bits(DTYPES["F16"], format_bits(data)) == data


@pytest.mark.parametrize("name,text", [("BF16", "0x40"), ("BF16", "0x40bc0000"), ("F8_E4M3", "0x4000"), ("F32", "0x")])
def test_bits_of_another_width_are_refused(name, text):
    with pytest.raises(NumberError, match=f"hex digits, but {name} takes {DTYPES[name].bits // 4}"):
        parse_bits(DTYPES[name], text)


def test_rounding_for_comparison_never_raises():
    half = DTYPES["F16"]
    assert round_to(half, 0.1) == float(np.float16(0.1))
    assert round_to(half, 1e9) == math.inf
    assert round_to(half, -1e9) == -math.inf
    assert same(round_to(half, -1e-30), -0.0)
    assert math.isnan(round_to(half, math.nan))
    assert round_to(half, math.inf) == math.inf


@pytest.mark.parametrize(
    "value,text",
    [
        (5, "5"),
        (5.0, "5"),
        (0.1, "0.1"),
        (-2.5, "-2.5"),
        (1e20, "1e+20"),
        (Fraction(1, 4), "0.25"),
        (Fraction(10) ** 400, "a number beyond 1e308"),
        (1 << 70, str(1 << 70)),
    ],
)
def test_values_are_shown_as_people_read_them(value, text):
    assert format_exact(value) == text
