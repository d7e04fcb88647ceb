"""Codes in columns of 32-bit words: what one code is, and what all of them are, for every width."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from swsurgery.checkpoint.layouts.cells import Cell
from swsurgery.checkpoint.layouts.module import ModuleTensor
from swsurgery.checkpoint.layouts.words import list_fields, read_columns, unpack_columns
from swsurgery.storage.dtypes import DTYPES
from swsurgery.storage.shard import TensorInfo


@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 5), st.randoms(use_true_random=False))
def test_one_code_and_all_codes_are_the_bits_of_a_column(bits: int, blocks: int, columns: int, random):
    words = [[random.getrandbits(32) for _ in range(columns)] for _ in range(blocks * bits)]
    data = np.array(words, "<u4").tobytes()

    def read(name: str, begin: int, size: int) -> bytes:
        assert name == "t" and begin >= 0 and begin + size <= len(data)
        return data[begin : begin + size]

    shape = (len(words), columns)
    tensor = ModuleTensor(TensorInfo("t", DTYPES["I32"], shape, (0, len(data))), read)
    begin = random.randrange(columns)
    found = unpack_columns(read_columns(tensor, begin, columns), bits)
    assert found.shape == (columns - begin, blocks * 32)
    for column in range(begin, columns):
        stream = sum(row[column] << 32 * at for at, row in enumerate(words))
        for number in range(blocks * 32):
            code = stream >> number * bits & (1 << bits) - 1
            cell = Cell(tuple(list_fields(tensor, column, number * bits, bits)), (), 1.0)
            assert cell.read_code(read) == code == found[column - begin, number]
