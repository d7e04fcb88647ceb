"""A cell: where the code of one element is, and the nearest code for a value."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swsurgery.checkpoint.layouts.cells import BitField, Cell
from swsurgery.errors import NumberError

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)


def make_cell(values: list[float], fields: tuple[BitField, ...] = ()) -> Cell:
    return Cell(fields, values, 1.0)


@given(st.binary(min_size=8, max_size=8), st.integers(0, 55), st.integers(1, 8))
def test_a_code_is_the_bits_of_its_fields_low_bits_first(data: bytes, start: int, width: int):
    def read(name: str, begin: int, size: int) -> bytes:
        assert name == "words" and begin + size <= len(data)
        return data[begin : begin + size]

    bits = f"{int.from_bytes(data, 'little'):064b}"[::-1]
    expected = int(bits[start : start + width][::-1], 2)
    assert make_cell([], (BitField("words", start, width),)).read_code(read) == expected
    parts = (BitField("words", start, 1), BitField("words", start + 1, width - 1))
    assert make_cell([], parts[: 1 + (width > 1)]).read_code(read) == expected


@given(st.lists(FINITE, min_size=1, max_size=20), FINITE)
def test_the_nearest_code_is_the_nearest(values: list[float], wanted: float):
    cell = make_cell(values)
    if not min(values) <= wanted <= max(values):
        with pytest.raises(NumberError, match="outside the grid"):
            cell.find_nearest(wanted)
        return
    found = cell.values[cell.find_nearest(wanted)]
    distances = [abs(Fraction(value) - Fraction(wanted)) for value in values]
    assert abs(Fraction(found) - Fraction(wanted)) == min(distances)
    ties = [v for v, distance in zip(values, distances, strict=True) if distance == min(distances)]
    assert abs(found) == min(map(abs, ties))


def test_zero_is_the_code_with_the_value_zero():
    assert make_cell([-1.0, 0.0, 1.0, -0.0]).find_zero() == 1
    with pytest.raises(NumberError, match="no code of this element has the value 0"):
        make_cell([-1.5, -0.5, 0.5]).find_zero()


def test_a_code_that_is_no_number_is_never_chosen():
    cell = make_cell([float("nan"), 2.0, float("inf"), -2.0])
    assert [cell.find_nearest(w) for w in (-2.0, 0.0, 2.0)] == [3, 3, 1]


def test_the_step_is_the_larger_distance_to_a_neighbour():
    cell = make_cell([0.0, 1.0, 3.0, 7.0])
    assert [cell.compute_step(v) for v in (0.0, 1.0, 3.0, 7.0)] == [1.0, 2.0, 4.0, 4.0]
    assert make_cell([5.0]).compute_step(5.0) == 0.0
