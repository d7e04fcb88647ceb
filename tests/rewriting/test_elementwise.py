"""Zero, scale and set of regions, against the scalar functions that a manifest's edits of scalars use."""

from __future__ import annotations

import math

import numpy as np
import pytest
from arrays import FLOATS, draw_patterns, draw_weights, source_of, words_of
from hypothesis import given
from hypothesis import strategies as st

from swsurgery.errors import NumberError
from swsurgery.rewriting.apply import Array, compute_region, compute_regions
from swsurgery.rewriting.elementwise import ScaleFunction, SetFunction, ZeroFunction
from swsurgery.storage import dtypes
from swsurgery.storage.arrays import get_word_type
from swsurgery.storage.dtypes import DTYPES
from swsurgery.storage.numbers import Written

FACTORS = [-1.0, 0.5, 2.0, 1.5, 0.1, -math.pi, 1 + 2**-52, 1e-3, 256.0]


def scale_each(name: str, words: np.ndarray, factor: float) -> tuple[list[int], list[int]]:
    """Scale with the scalar function: the new bit patterns, and the flat indices that it refuses."""
    dtype, new, refused = DTYPES[name], [], []
    for n, word in enumerate(words.reshape(-1).tolist()):
        try:
            new.append(int.from_bytes(dtypes.scale_value(dtype, word.to_bytes(dtype.size, "little"), factor), "little"))
        except NumberError:
            new.append(word)
            refused.append(n)
    return new, refused


def check_scale(name: str, words: np.ndarray, factor: float) -> None:
    expected, refused = scale_each(name, words, factor)
    dtype = DTYPES[name]
    if refused:
        many = f"{len(refused)} scalar{'s' if len(refused) > 1 else ''} of w cannot be scaled"
        index = [int(i) for i in np.unravel_index(refused[0], words.shape)]
        with pytest.raises(NumberError) as error:
            compute_region(ScaleFunction(factor), "w", dtype, words)
        assert str(error.value).startswith(many) and f"the first, {index}: " in str(error.value)
    # What cannot be scaled may be protected.
    found = compute_region(ScaleFunction(factor), "w", dtype, words, tuple(refused), rows=2)
    assert found.reshape(-1).tolist() == expected


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("name", FLOATS)
def test_scale_is_the_scalar_function_on_every_scalar(name, factor):
    check_scale(name, draw_weights(name, (20, 30)), factor)
    check_scale(name, draw_patterns(name, (20, 30)), factor)


@pytest.mark.parametrize("factor", [0.3, -0.5, 1e-30])
@pytest.mark.parametrize("name", FLOATS[3:])
def test_scale_of_every_pattern(name, factor):
    words = np.arange(1 << DTYPES[name].bits).astype(get_word_type(DTYPES[name]))
    check_scale(name, words.reshape(16, -1)[:, :: 7 if words.size > 256 else 1].copy(), factor)


@pytest.mark.parametrize("name", ["F64", "F32", "BF16"])
@given(data=st.data())
def test_scale_rounds_the_exact_product_once(name, data):
    dtype = DTYPES[name]
    words = [data.draw(st.integers(0, dtype.largest)) for _ in range(3)]
    factor = data.draw(st.floats(allow_nan=False, allow_infinity=False).filter(bool))
    check_scale(name, np.array([words], get_word_type(dtype)), factor)


@given(mantissa=st.integers(1 << 23, (1 << 24) - 1), exponent=st.integers(-100, 100), odd=st.integers(0, 1 << 23))
def test_a_product_near_the_middle_of_two_float32_values_rounds_once(mantissa, exponent, odd):
    # The quotient of a middle and a stored value is rounded, so the exact product is next to the middle.
    value = math.ldexp(mantissa, exponent)
    middle = math.ldexp(2 * ((1 << 23) + odd) + 1, exponent)
    check_scale("F32", words_of("F32", [[value, -value]]), middle / value)


def test_the_same_table_serves_a_second_block():
    function = ScaleFunction(3.0).measure([source_of("BF16", draw_weights("BF16", (4, 5)))])
    words = draw_weights("BF16", (4, 5), seed=1)
    found = function.compute("w", DTYPES["BF16"], 0, words)
    assert found.reshape(-1).tolist() == scale_each("BF16", words, 3.0)[0]


@pytest.mark.parametrize("name", ["F32", "BF16"])
@pytest.mark.parametrize(("value", "why"), [(math.nan, "the stored value is nan"), (1e38, "overflows"), (1e-37, "")])
def test_compute_refuses_what_measure_did_not_see(name, value, why):
    words = words_of(name, [[1, 2], [3, 4]])
    bad = 0x7FC0 if name == "BF16" else 0x7FC00000
    words[1, 0] = bad if math.isnan(value) else words_of(name, [value])[0]
    if why:
        with pytest.raises(NumberError, match=rf"1 scalar of w cannot be scaled by 1e\+06; the first, \[16\]: .*{why}"):
            ScaleFunction(1e6).compute("w", DTYPES[name], 7, words)
    else:
        ScaleFunction(1e6).compute("w", DTYPES[name], 7, words)


@pytest.mark.parametrize("name", ["I8", "U16", "BOOL", "F8_E8M0"])
def test_scale_refuses_other_dtypes(name):
    words = np.zeros((2, 2), get_word_type(DTYPES[name]))
    with pytest.raises(NumberError, match="not a floating-point dtype: w"):
        compute_region(ScaleFunction(2.0), "w", DTYPES[name], words)


@pytest.mark.parametrize("name", [*FLOATS, "I8", "U16", "I32", "U64", "BOOL"])
def test_zero_clears_every_bit_but_the_protected(name):
    words = np.full((3, 4), 77, get_word_type(DTYPES[name]))
    found = compute_region(ZeroFunction(), "w", DTYPES[name], words, kept=(0, 7))
    assert found.reshape(-1).tolist() == [77 if n in (0, 7) else 0 for n in range(12)]
    assert (words == 77).all(), "the input is unchanged"


def test_zero_refuses_a_dtype_without_zero():
    words = np.zeros((2, 2), np.uint8)
    with pytest.raises(NumberError, match="F8_E8M0 contains block scales.*: w"):
        compute_region(ZeroFunction(), "w", DTYPES["F8_E8M0"], words)


@pytest.mark.parametrize("name", [*FLOATS, "I8", "U16", "I64"])
@pytest.mark.parametrize("value", [0, 1, 3, 0.1, Written("0.3"), -2.5])
def test_set_stores_what_the_scalar_function_encodes(name, value):
    dtype = DTYPES[name]
    words = np.full((2, 3), 77, get_word_type(dtype))
    try:
        expected = int.from_bytes(dtypes.encode(dtype, value), "little")
    except NumberError:
        with pytest.raises(NumberError, match=f"is not a value of {name}.*: w"):
            compute_region(SetFunction(value), "w", dtype, words)
    else:
        assert (compute_region(SetFunction(value), "w", dtype, words) == expected).all()


def test_set_stores_bits():
    assert (
        compute_region(SetFunction(bits="0x40bc"), "w", DTYPES["BF16"], np.zeros((2, 3), np.uint16)) == 0x40BC
    ).all()


@pytest.mark.parametrize(
    ("bits", "why"), [("0x7fc0", "is nan in BF16"), ("0x40", "has 2 hex digits, but BF16 takes 4")]
)
def test_set_refuses_bits(bits, why):
    with pytest.raises(NumberError, match=why):
        compute_region(SetFunction(bits=bits), "w", DTYPES["BF16"], np.zeros((2, 3), np.uint16))


@pytest.mark.parametrize("function", [ZeroFunction(), SetFunction(1.5), ScaleFunction(2.0)])
def test_results_go_to_out_which_may_be_the_input(function):
    words = draw_weights("BF16", (4, 6))
    expected = function.compute("w", DTYPES["BF16"], 0, words)
    out = np.empty_like(words)
    assert function.compute("w", DTYPES["BF16"], 0, words, out) is out
    assert np.array_equal(out, expected)
    assert function.compute("w", DTYPES["BF16"], 0, words, words) is words
    assert np.array_equal(words, expected)
    assert not function.sparse and function.find_height((4, 6)) == 1


@pytest.mark.parametrize("function", [ZeroFunction(), SetFunction(1.5), ScaleFunction(2.0)])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,), (), (5,), (2, 3, 4)])
def test_any_shape(function, shape):
    words = np.full(shape, 0x3F80, np.uint16)
    found = compute_regions(function, {"w": Array(DTYPES["BF16"], words)})["w"]
    assert found.shape == shape
