"""Arrays of bit patterns to values and back, against the scalar functions and, for whole tables, ml_dtypes."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swsurgery.errors import NumberError
from swsurgery.storage import arrays, dtypes
from swsurgery.storage.dtypes import DTYPES

FLOATS = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"]
SMALL = FLOATS[2:]
NUMPY = {
    "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz, "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}  # fmt: skip
ANY_FLOAT = st.floats(allow_nan=False, allow_infinity=False)
ANY_SINGLE = st.floats(allow_nan=False, allow_infinity=False, width=32)


def all_words(name: str) -> np.ndarray:
    return np.arange(1 << DTYPES[name].bits).astype(arrays.get_word_type(DTYPES[name]))


def finite_words(name: str) -> np.ndarray:
    words = all_words(name)
    return words[~arrays.find_not_finite(DTYPES[name], words)]


def encode(dtype, value: float) -> int | None:
    """The scalar encoding; zero with its sign on underflow, and None if the value does not fit."""
    try:
        return int.from_bytes(dtypes.encode(dtype, value), "little")
    except NumberError as error:
        if "underflows" not in str(error):
            return None
        return 0 if value > 0 or dtype.special == "fnuz" else 1 << (dtype.bits - 1)


@pytest.mark.parametrize("name", SMALL)
def test_every_pattern_has_the_value_of_the_scalar_function(name):
    dtype, words = DTYPES[name], all_words(name)
    expected = [dtypes.decode(dtype, int(w).to_bytes(dtype.size, "little")) for w in words]
    for found in (arrays.decode_singles(dtype, words), arrays.decode_doubles(dtype, words)):
        assert np.array_equal(found, expected, equal_nan=True)
        with np.errstate(invalid="ignore"):
            assert np.array_equal(found, words.view(NUMPY[name]).astype(np.float64), equal_nan=True)
        assert np.array_equal(np.signbit(found[found == 0]), words[found == 0] != 0)


@pytest.mark.parametrize("name", SMALL)
def test_every_finite_pattern_comes_back(name):
    dtype, words = DTYPES[name], finite_words(name)
    assert np.array_equal(arrays.encode_singles(dtype, arrays.decode_singles(dtype, words)), words)
    assert np.array_equal(arrays.encode_doubles(dtype, arrays.decode_doubles(dtype, words)), words)


@pytest.mark.parametrize("name", SMALL)
def test_values_between_neighbours_round_half_to_even(name):
    dtype = DTYPES[name]
    points = np.unique(arrays.decode_doubles(dtype, finite_words(name)))
    middle = (points[1:] + points[:-1]) / 2
    tried = np.concatenate([middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf)])
    tried = tried[np.random.default_rng(0).permutation(len(tried))][:3000]
    expected = [encode(dtype, v) for v in tried.tolist()]
    assert arrays.encode_doubles(dtype, tried.copy()).tolist() == expected
    singles = tried.astype(np.float32)
    expected = [encode(dtype, v) for v in singles.tolist()]
    assert arrays.encode_singles(dtype, singles.copy()).tolist() == expected


@pytest.mark.parametrize("name", FLOATS)
@given(value=ANY_FLOAT)
def test_a_float64_rounds_once(name, value):
    check_encoding(DTYPES[name], arrays.encode_doubles, np.float64, value)


@pytest.mark.parametrize("name", FLOATS[1:])
@given(value=ANY_SINGLE)
def test_a_float32_rounds_once(name, value):
    check_encoding(DTYPES[name], arrays.encode_singles, np.float32, value)


@pytest.mark.parametrize("name", FLOATS)
@given(data=st.data())
def test_a_float64_near_the_middle_of_two_values_rounds_once(name, data):
    dtype = DTYPES[name]
    bits = data.draw(st.integers(0, dtype.largest - 1))
    low, high = (Fraction(dtypes.decode(dtype, b.to_bytes(dtype.size, "little"))) for b in (bits, bits + 1))
    value = float((low + high) / 2)
    for _ in range(data.draw(st.integers(0, 2))):
        value = math.nextafter(value, data.draw(st.sampled_from([math.inf, -math.inf])))
    check_encoding(dtype, arrays.encode_doubles, np.float64, value * data.draw(st.sampled_from([1, -1])))


def check_encoding(dtype, function, kind, value):
    expected = encode(dtype, float(value))
    if expected is None:
        with pytest.raises(NumberError, match=f"1 result not finite or beyond the largest value of {dtype.name}"):
            function(dtype, np.array([value], kind))
    else:
        assert int(function(dtype, np.array([value], kind))[0]) == expected


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "all ones"])
def test_a_value_that_is_not_finite_is_refused(name, value):
    if value == "all ones":
        (value,) = struct.unpack("<d", b"\xff" * 8)
    two = np.array([1, value])
    with pytest.raises(NumberError, match="1 result not finite"):
        arrays.encode_doubles(DTYPES[name], two)
    if name != "F64":
        with pytest.raises(NumberError, match="1 result not finite"):
            arrays.encode_singles(DTYPES[name], two.astype(np.float32))


@pytest.mark.parametrize("name", FLOATS)
@given(data=st.data())
def test_results_go_to_out(name, data):
    dtype = DTYPES[name]
    words = np.array(data.draw(st.lists(st.integers(0, dtype.largest), max_size=5)), arrays.get_word_type(dtype))
    doubles, back = np.empty(words.shape), np.empty_like(words)
    assert arrays.decode_doubles(dtype, words, doubles) is doubles
    assert arrays.encode_doubles(dtype, doubles, back) is back
    assert np.array_equal(back, words)


@pytest.mark.parametrize("name", SMALL)
def test_not_finite_patterns_are_found(name):
    dtype, words = DTYPES[name], all_words(name)
    expected = ~np.isfinite(arrays.decode_doubles(dtype, words))
    assert np.array_equal(arrays.find_not_finite(dtype, words), expected)
    assert all(arrays.has_not_finite(dtype, words[n : n + 1]) == bad for n, bad in enumerate(expected))
    assert not arrays.has_not_finite(dtype, words[:0])


@pytest.mark.parametrize("name", SMALL)
def test_ordered_integers_are_ordered_like_the_values(name):
    dtype, words = DTYPES[name], finite_words(name)
    keys = arrays.order_words(dtype, words)
    assert np.array_equal(arrays.restore_words(dtype, keys), words)
    found = arrays.decode_doubles(dtype, words[np.argsort(keys)])
    assert (np.diff(found) >= 0).all() and len(np.unique(keys)) == len(keys)


@pytest.mark.parametrize(("name", "width"), [("F4", None), ("F6_E2M3", None), ("BOOL", 1), ("C64", 8), ("I16", 2)])
def test_the_word_type_has_the_width_of_the_dtype(name, width):
    if width is None:
        with pytest.raises(NumberError, match=name):
            arrays.get_word_type(DTYPES[name])
    else:
        assert arrays.get_word_type(DTYPES[name]).itemsize == width


@pytest.mark.parametrize("name", ["I8", "BOOL", "F8_E8M0", "C64"])
def test_other_dtypes_are_refused(name):
    with pytest.raises(NumberError, match=f"{name} is not a floating-point dtype: model.w"):
        arrays.require_float(DTYPES[name], "model.w")


def test_finite_float16_patterns_are_decoded_without_a_table():
    words = np.arange(1 << 16).astype(np.uint16)
    found = arrays.decode_singles(DTYPES["F16"], words, finite=True)
    expected = words.view(np.float16).astype(np.float32)
    finite = np.isfinite(expected)
    assert np.array_equal(found[finite].view(np.uint32), expected[finite].view(np.uint32))
    assert (np.abs(found[~finite]) >= 65_536).all()


@pytest.mark.parametrize("steps", [-1, 0, 1])
def test_normal_float16_values_and_the_middles_between_them_are_rounded_half_to_even(steps):
    patterns = np.arange(0x0400, 0x7BFF).astype(np.uint16)
    singles = patterns.view(np.float16).astype(np.float32)
    middles = (singles + (patterns + np.uint16(1)).view(np.float16).astype(np.float32)) / 2
    near = (middles.view(np.int32) + np.int32(steps)).view(np.float32)
    singles = np.concatenate([singles, near, -singles, -near, np.float32([0.0, -0.0])])
    expected = singles.astype(np.float16).view(np.uint16)
    out = np.empty(singles.shape, np.uint16)
    arrays.pack_singles(DTYPES["F16"], singles.copy(), out, normal=True)
    assert np.array_equal(out, expected)
