"""Find and unpack codes of a few bits that are packed along the rows or the columns of a matrix.

A *dense* packing is a stream of bits, in which a code may begin in one word of 32 bits and end in the next. A *padded*
packing stores the same number of codes in every word, and leaves the remaining upper bits of a word unused. The first
code occupies the least significant bits in both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from swsurgery.checkpoint.layouts.cells import BitField, Cell
from swsurgery.checkpoint.layouts.codes import Codes
from swsurgery.checkpoint.layouts.module import ModuleTensor
from swsurgery.checkpoint.layouts.words import WORD, list_fields
from swsurgery.storage.arrays import Doubles


def count_words(codes: int, bits: int, *, padded: bool = False) -> int:
    """Return the number of 32-bit words that store this number of codes of `bits` bits."""
    return -(-codes // (WORD // bits)) if padded else -(-codes * bits // WORD)


def find_start(code: int, bits: int, *, padded: bool) -> int:
    """Return the number of the first bit of code number `code`, counted from the first bit of code 0."""
    if not padded:
        return code * bits
    word, place = divmod(code, WORD // bits)
    return word * WORD + place * bits


def unpack_rows(packed: Codes, bits: int, count: int, *, padded: bool = False) -> Codes:
    """Unpack the first `count` codes of each row of bytes [rows, bytes], as [rows, count]."""
    if bits == 8:
        return packed[:, :count]
    if bits == 4:
        return np.stack((packed & 15, packed >> 4), axis=2).reshape(len(packed), -1)[:, :count]
    stream = np.unpackbits(packed, axis=1, bitorder="little")
    if padded:
        used = WORD // bits * bits
        stream = stream.reshape(len(packed), -1, WORD)[:, :, :used].reshape(len(packed), -1)
    split = stream[:, : count * bits].reshape(len(packed), count, bits)
    return np.packbits(split, axis=2, bitorder="little")[:, :, 0]


@dataclass(frozen=True)
class PackedRows:
    """The codes of a matrix [rows, cols] in which every row begins at a new byte. `bits` is the width of one code."""

    tensor: ModuleTensor
    rows: int
    cols: int
    bits: int
    padded: bool = False

    @property
    def stride(self) -> int:
        """Bytes of one row."""
        return self.tensor.info.size // self.rows

    def find(self, row: int, col: int) -> BitField:
        """Find the bits of one code."""
        start = row * self.stride * 8 + find_start(col, self.bits, padded=self.padded)
        return BitField(self.tensor.name, start, self.bits)

    def read_rows(self, begin: int, end: int) -> Codes:
        """Read the codes of the rows `begin` to `end` (excluded), as [end - begin, cols]."""
        data = self.tensor.read(self.tensor.name, begin * self.stride, (end - begin) * self.stride)
        packed = np.frombuffer(data, np.uint8).reshape(end - begin, self.stride)
        return unpack_rows(packed, self.bits, self.cols, padded=self.padded)


@dataclass(frozen=True)
class PackedColumns:
    """Signed zero points [rows, cols] that are packed along the columns of a tensor of words [words, cols].

    Code 0 is the smallest signed integer, -2**(bits - 1).
    """

    tensor: ModuleTensor
    cols: int
    bits: int
    padded: bool = False

    def read_number(self, row: int, col: int) -> float:
        """Read one zero point."""
        fields = list_fields(self.tensor, col, find_start(row, self.bits, padded=self.padded), self.bits)
        code = Cell(tuple(fields), (), 1.0).read_code(self.tensor.read)
        return float(code - (1 << (self.bits - 1)))

    def read_numbers(self, begin: int, end: int) -> Doubles:
        """Read the zero points of the rows `begin` to `end` (excluded), as float64 [end - begin, cols]."""
        unit = WORD // self.bits if self.padded else WORD  # rows after which the codes begin at a new word
        first = begin // unit * unit
        words = (count_words(first, self.bits, padded=self.padded), count_words(end, self.bits, padded=self.padded))
        stored = self.tensor.read_words(words[0] * self.cols, words[1] * self.cols).reshape(-1, self.cols)
        packed = np.ascontiguousarray(stored.T).view(np.uint8)
        codes = unpack_rows(packed, self.bits, end - first, padded=self.padded)[:, begin - first :]
        return codes.T.astype(np.float64) - (1 << (self.bits - 1))
