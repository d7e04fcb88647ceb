"""Find and unpack codes in tensors of 32-bit words [words, columns]. Each column is a stream of bits.

GPTQ and AWQ store weights in such tensors, with one column for each output feature or for eight of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from swsurgery.checkpoint.layouts.cells import BitField
from swsurgery.checkpoint.layouts.codes import Codes, unpack_stream
from swsurgery.checkpoint.layouts.module import ModuleTensor
from swsurgery.storage.arrays import Words

WORD = 32
"""Bits of a word."""

_CHUNK = 1 << 22
"""Approximate number of bytes of one read, if only some columns of a tensor are needed."""


def list_fields(tensor: ModuleTensor, column: int, first: int, width: int) -> Iterator[BitField]:
    """Yield the bits `first` to `first + width` (excluded) of a column, with one field for each word.

    Bit 0 is the least significant bit of the first word. `tensor` has the shape [words, columns].
    """
    while width:
        word, shift = divmod(first, WORD)
        part = min(width, WORD - shift)
        yield BitField(tensor.name, (word * tensor.shape[1] + column) * WORD + shift, part)
        first, width = first + part, width - part


def read_columns(tensor: ModuleTensor, begin: int, end: int) -> Words:
    """Read the columns `begin` to `end` (excluded) of a matrix as bit patterns [rows, end - begin].

    The matrix is read in pieces of whole rows, because one read per row would take long.
    """
    rows, columns = tensor.shape
    found = np.empty((rows, end - begin), f"<u{tensor.info.dtype.size}")
    step = max(_CHUNK // max(columns * tensor.info.dtype.size, 1), 1)
    for row in range(0, rows, step):
        last = min(row + step, rows)
        piece = tensor.read_words(row * columns, last * columns).reshape(last - row, columns)
        found[row:last] = piece[:, begin:end]
    return found


def unpack_columns(words: Words, bits: int) -> Codes:
    """Return the codes of `bits` bits of each column of 32-bit words [words, columns], as [columns, codes].

    The number of bits in a column must be a multiple of `bits`.
    """
    count = words.shape[0] * WORD // bits
    stream = np.ascontiguousarray(words.T).tobytes()
    return unpack_stream(stream, bits, count * words.shape[1]).reshape(words.shape[1], count)
