"""Moments, ranges and order statistics of sources, against exact arithmetic and sorts."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from arrays import FLOATS, draw_patterns, draw_weights, source_of, values_of
from hypothesis import given
from hypothesis import strategies as st

from swsurgery.errors import NumberError
from swsurgery.rewriting import statistics
from swsurgery.rewriting.apply import Array, make_source
from swsurgery.rewriting.function import CHUNK_SCALARS
from swsurgery.storage.dtypes import DTYPES

PIECES = [1000, 65_535, 65_536, 65_537, 131_072, 200_000]


@pytest.mark.parametrize("length", [1, 7, 100, 5000])
@pytest.mark.parametrize("pieces", [1, 6, 7, 8, 14, 99, 5000])
def test_pieces_have_the_length_that_is_asked_for(length, pieces):
    words = np.arange(1001, dtype=np.uint16)
    found = [
        (first, piece.copy()) for first, piece in statistics.read_pieces(source_of("F16", words, (), pieces), length)
    ]
    assert np.array_equal(np.concatenate([piece for _, piece in found]), words)
    assert [first for first, _ in found] == list(range(0, 1001, length))
    assert {len(piece) for _, piece in found[:-1]} <= {length}


def test_moments_are_sums_over_chunks():
    words = draw_weights("F32", (3, 70_000))
    kept = (0, 65_535, 65_536, 140_000, 209_999)
    magnitudes = np.abs(values_of("F32", words)).reshape(-1)
    counted = np.delete(magnitudes, kept)
    magnitudes[list(kept)] = 0
    total = squares = 0.0
    for begin in range(0, len(magnitudes), CHUNK_SCALARS):
        chunk = magnitudes[begin : begin + CHUNK_SCALARS]
        total += float(chunk.sum())
        squares += float((chunk * chunk).sum())
    mean = total / len(counted)
    expected = statistics.Moments(
        len(counted), mean, math.sqrt(squares / len(counted) - mean * mean), counted.min(), counted.max()
    )
    for pieces in (None, *PIECES):
        assert statistics.measure_moments(source_of("F32", words, kept, pieces)) == expected
    assert math.isclose(expected.mean, math.fsum(counted) / len(counted), rel_tol=1e-14)
    assert math.isclose(expected.std, counted.std(), rel_tol=1e-12)


@pytest.mark.parametrize("name", FLOATS)
def test_moments_of_every_dtype(name):
    words = draw_weights(name, (40, 50))
    found = statistics.measure_moments(source_of(name, words, (7,)))
    magnitudes = np.delete(np.abs(values_of(name, words)), 7)
    assert found.count == 1999
    assert (found.smallest, found.largest) == (magnitudes.min(), magnitudes.max())
    assert math.isclose(found.mean, magnitudes.mean(), rel_tol=1e-14)
    assert math.isclose(found.std, magnitudes.std(), rel_tol=1e-12)


def test_the_std_of_equal_magnitudes_is_zero():
    words = np.full((100, 1000), 0x3DCC, np.uint16)
    words[::2] |= 0x8000
    found = statistics.measure_moments(source_of("BF16", words))
    assert (found.std, found.mean) == (0, values_of("BF16", np.array([0x3DCC], np.uint16))[0])


@pytest.mark.parametrize("shape", [(0,), (2,)])
def test_moments_of_no_scalars(shape):
    source = source_of("BF16", np.zeros(shape, np.uint16), tuple(range(math.prod(shape))))
    assert statistics.measure_moments(source) == statistics.Moments(0, 0, 0, 0, 0)
    assert statistics.measure_range(source) == (0, 0)


@pytest.mark.parametrize("columns", [1, 100, 65_536, 65_537, 140_000])
def test_sums_of_rows_do_not_depend_on_the_number_of_rows(columns):
    values = np.random.default_rng(0).normal(size=(5, columns))
    expected = []
    for row in values:
        total = 0.0  # from Python 3.12, sum() of floats is compensated
        for begin in range(0, columns, CHUNK_SCALARS):
            total += fold(row[begin : begin + CHUNK_SCALARS].tolist())
        expected.append(total)
    assert statistics.add_rows(values).tolist() == expected
    assert [statistics.add_rows(values[n : n + 1])[0] for n in range(5)] == expected
    assert np.allclose(expected, values.sum(axis=1), rtol=1e-12)


def fold(numbers):
    """Add the second half of a list to its first half until one number is left."""
    while len(numbers) > 1:
        half = (len(numbers) + 1) // 2
        numbers = [a + b for a, b in zip(numbers[:half], [*numbers[half:], 0.0], strict=False)]
    return numbers[0]


@pytest.mark.parametrize("name", FLOATS)
def test_the_range_has_the_extremes(name):
    words = draw_patterns(name, (30, 40))
    kept = np.argsort(values_of(name, words).reshape(-1))[[0, -1]].tolist()
    values = np.delete(values_of(name, words), kept)
    for pieces in (None, 7, 1200):
        found = statistics.measure_range(source_of(name, words, tuple(sorted(kept)), pieces))
        assert found == (values.min(), values.max())


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("draw", [draw_weights, draw_patterns])
def test_order_statistics_are_those_of_a_sort(name, draw):
    words = draw(name, (20, 50))
    kept = (0, 500, 999)
    values = np.sort(np.delete(values_of(name, words), kept))
    places = [0, 1, 249, 250, 251, 500, 995, 996]
    for pieces in (None, 33):
        source = source_of(name, words, kept, pieces)
        assert statistics.find_ordered(source, places) == values[places].tolist()
        largest = np.sort(np.abs(values))[::-1]
        assert statistics.find_largest([source], places) == largest[places].tolist()


@pytest.mark.parametrize("names", [("BF16", "BF16"), ("F16", "F64"), ("F32", "F8_E4M3", "BF16")])
def test_order_statistics_of_several_sources(names):
    arrays = [Array(DTYPES[name], draw_patterns(name, (10, 20), seed=n), (n,)) for n, name in enumerate(names)]
    sources = [make_source(f"w{n}", array) for n, array in enumerate(arrays)]
    values = [np.delete(values_of(a.dtype.name, a.words), a.kept) for a in arrays]
    largest = np.sort(np.abs(np.concatenate(values)))[::-1]
    ranks = [0, 1, 10, 150, len(largest) - 1]
    assert statistics.find_largest(sources, ranks) == largest[ranks].tolist()


@given(
    words=st.lists(st.integers(0, 0x7F7FFFFF) | st.integers(1 << 31, 0xFF7FFFFF), min_size=1, max_size=50),
    data=st.data(),
)
def test_any_order_statistic(words, data):
    source = source_of("F32", np.array(words, np.uint32), (), data.draw(st.integers(1, 60)))
    values = np.sort(values_of("F32", np.array(words, np.uint32)))
    place = data.draw(st.integers(0, len(words) - 1))
    assert statistics.find_ordered(source, [place]) == [values[place]]
    assert statistics.find_largest([source], [place]) == [np.sort(np.abs(values))[::-1][place]]


@pytest.mark.parametrize(
    ("fraction", "count", "expected"), [(0.3, 10, 3), (0.1, 10, 1), (0.7, 10, 7), (1e-9, 10**9, 1)]
)
def test_a_fraction_is_that_of_its_decimal(fraction, count, expected):
    assert statistics.count_fraction(fraction, count) == expected


@given(parts=st.integers(1, 10**6), count=st.integers(0, 10**12))
def test_a_fraction_is_rounded_down(parts, count):
    assert statistics.count_fraction(parts / 10**6, count) == math.floor(Fraction(parts, 10**6) * count)


@pytest.mark.parametrize(
    "measure",
    [
        statistics.check_finite,
        statistics.measure_moments,
        statistics.measure_range,
        lambda source: statistics.find_largest([source], [0]),
        lambda source: statistics.find_ordered(source, [0]),
    ],
)
@pytest.mark.parametrize(
    ("name", "bad"), [("F64", 0x7FF << 52), ("F16", 0xFC01), ("F8_E4M3", 0x7F), ("F8_E5M2FNUZ", 0x80)]
)
def test_scalars_that_are_not_finite_are_counted(measure, name, bad):
    words = draw_weights(name, (700, 100))
    words[[2, 690], [3, 1]] = bad
    with pytest.raises(NumberError, match=r"^2 scalars are NaN or infinite: w \(first: \[2, 3\]\)$"):
        measure(source_of(name, words))
    with pytest.raises(NumberError, match=r"^1 scalar is NaN or infinite: w \(first: \[690, 1\]\)$"):
        measure(source_of(name, words, kept=(203,), pieces=50))
    measure(source_of(name, words, kept=(203, 69_001)))
