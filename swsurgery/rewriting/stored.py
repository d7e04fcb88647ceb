"""Functions that take the new bit patterns from a file instead of computing them: for "restore", and for undoing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from swsurgery.errors import CheckpointError
from swsurgery.rewriting.function import ScalarwiseFunction, Source
from swsurgery.rewriting.rows import Indices, RegionRows, StoredMatrix
from swsurgery.storage.arrays import Words
from swsurgery.storage.dtypes import Dtype
from swsurgery.storage.files import File, read_exactly
from swsurgery.storage.region import Region
from swsurgery.storage.shard import Shard, TensorInfo

PIECE = 1 << 16
"""Number of indices of a sparse undo that are read at a time."""


@dataclass(frozen=True)
class Keep(ScalarwiseFunction):
    """Change nothing: for regions that are only hashed."""

    def measure(self, sources: Sequence[Source]) -> Keep:
        """Return the function itself."""
        return self

    def compute(self, name: str, dtype: Dtype, row: int, words: Words, out: Words | None = None) -> Words:
        """Return the block itself, or a copy in `out`."""
        if out is None:
            return words
        np.copyto(out, words)
        return out


@dataclass(frozen=True)
class RegionPlace:
    """A region of a tensor in a file. `start` is the offset of the tensor's data, in bytes."""

    info: TensorInfo
    start: int
    region: Region

    @cached_property
    def _rows(self) -> tuple[RegionRows, RegionRows]:
        flat = len(self.info.shape) == 1
        whole, divided = StoredMatrix(self.info, self.start), StoredMatrix(self.info, self.start, flat)
        return RegionRows(whole, self.region), RegionRows(divided, self.region)

    def choose_rows(self, words: Words) -> RegionRows:
        """Return the rows of the region, divided as the block `words` is: see `StoredMatrix.flat`."""
        return self._rows[words.shape[1] == 1]


def find_place(shard: Shard, region: Region, dtype: str) -> RegionPlace | None:
    """Return the place of a region in a shard; None if the shard has no such region of this dtype."""
    info = shard.tensors.get(region.tensor)
    if info is None or info.dtype.name != dtype or info.dtype.bits % 8 or len(region.bounds) != len(info.shape):
        return None
    if not all(0 <= begin < end <= size for (begin, end), size in zip(region.bounds, info.shape, strict=True)):
        return None
    return RegionPlace(info, shard.data_start + info.data_offsets[0], region)


@dataclass(frozen=True)
class StoredRows(ScalarwiseFunction):
    """Copy the bit patterns of a region from `file`, in which they are at `place`."""

    file: File
    place: RegionPlace

    def measure(self, sources: Sequence[Source]) -> StoredRows:
        """Return the function itself."""
        return self

    def compute(self, name: str, dtype: Dtype, row: int, words: Words, out: Words | None = None) -> Words:
        """Return the stored rows. Raises CheckpointError if they cannot be read."""
        rows = self.place.choose_rows(words)
        new = rows.read(self.file, row, row + len(words)).reshape(words.shape)
        if out is None:
            return new
        np.copyto(out, new)
        return out


@dataclass(frozen=True)
class SparseRows(ScalarwiseFunction):
    """Put back the scalars that a sparse rewrite changed.

    `file` contains `count` flat indices in the tensor (little-endian int64, rising) at offset `indices`, and the old
    bit patterns in the same order at offset `values`. `place` is the region in the changed file.
    """

    file: File
    place: RegionPlace
    count: int
    indices: int
    values: int

    def measure(self, sources: Sequence[Source]) -> SparseRows:
        """Return the function itself."""
        return self

    def compute(self, name: str, dtype: Dtype, row: int, words: Words, out: Words | None = None) -> Words:
        """Return the block with the old scalars. Raises CheckpointError if an index is not in the region."""
        new = np.empty_like(words) if out is None else out
        np.copyto(new, words)
        rows = self.place.choose_rows(words)
        runs, columns, word = rows.select(row, row + len(words)), rows.matrix.columns, rows.matrix.word_type
        at, end = self._find(runs[0][0] * columns), self._find(sum(runs[-1]) * columns)
        while at < end:
            length = min(PIECE, end - at)
            flat = self._read_indices(at, length)
            positions = rows.find_positions(row, flat)
            if (positions < 0).any() or (positions >= new.size).any() or (np.diff(flat) <= 0).any():
                raise CheckpointError("the undo file has an index outside its region", name)
            old = read_exactly(self.file, length * word.itemsize, self.values + at * word.itemsize)
            new.reshape(-1)[positions] = np.frombuffer(old, word)
            at += length
        return new

    def _find(self, flat: int) -> int:
        """Return the number of stored indices below `flat`."""
        low, high = 0, self.count
        while high - low > PIECE:
            middle = (low + high) // 2
            if self._read_indices(middle, 1)[0] < flat:
                low = middle + 1
            else:
                high = middle
        return low + int(np.searchsorted(self._read_indices(low, high - low), flat)) if high > low else low

    def _read_indices(self, begin: int, length: int) -> Indices:
        return np.frombuffer(read_exactly(self.file, length * 8, self.indices + begin * 8), np.dtype("<i8"))
