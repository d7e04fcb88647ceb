"""Apply a function to regions in memory: what the engine does to files, for arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swsurgery.rewriting.function import Function, Source
from swsurgery.storage.arrays import Words
from swsurgery.storage.dtypes import Dtype


@dataclass(frozen=True)
class Array:
    """The bit patterns of one region, of any shape, and the flat indices of its protected scalars, in rising order."""

    dtype: Dtype
    words: Words
    kept: tuple[int, ...] = ()


def compute_regions(function: Function, arrays: Mapping[str, Array], rows: int | None = None) -> dict[str, Words]:
    """Measure all arrays together, and return the new bit patterns of each one. Protected scalars keep their bits.

    `arrays` are in the order of the edit's regions. At most about `rows` rows are computed at a time; None computes
    each array in one block. Raises NumberError as the methods of `function` do.
    """
    measured = function.measure([make_source(name, array) for name, array in arrays.items()])
    return {name: _compute_array(measured, name, array, rows) for name, array in arrays.items()}


def compute_region(
    function: Function, name: str, dtype: Dtype, words: Words, kept: Sequence[int] = (), rows: int | None = None
) -> Words:
    """Measure one array, and return its new bit patterns; otherwise like `compute_regions`."""
    return compute_regions(function, {name: Array(dtype, words, tuple(kept))}, rows)[name]


def make_source(name: str, array: Array) -> Source:
    """Make the source that `Function.measure` takes of an array."""
    flat = array.words.reshape(-1)
    return Source(name, array.dtype, array.words.shape, lambda: iter([flat]), array.kept)


def _compute_array(function: Function, name: str, array: Array, rows: int | None) -> Words:
    shape = array.words.shape
    out = array.words.copy(order="C")
    if out.size:
        matrix = out.reshape(-1, shape[-1] if shape else 1)
        height = function.find_height(shape)
        step = max((rows or len(matrix)) // height, 1) * height
        for row in range(0, len(matrix), step):
            block = matrix[row : row + step]
            function.compute(name, array.dtype, row, block, out=block)
    kept = list(array.kept)
    out.reshape(-1)[kept] = array.words.reshape(-1)[kept]
    return out
