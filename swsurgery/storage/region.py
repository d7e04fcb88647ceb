"""Name a rectangular part of a stored tensor, and list the runs of bytes that store it.

Must not depend on files or models.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.shard import TensorInfo

Bounds = tuple[tuple[int, int], ...]
"""The first index and the index after the last one, for each axis of a stored shape: ((3, 4), (0, 4096)) is row 3."""


class Region(NamedTuple):
    """A rectangular part of one tensor: the name of the tensor, and bounds in its *stored* shape.

    Prints as `model.layers.2.mlp.down_proj.weight[3, 0:4096]`.
    """

    tensor: str
    bounds: Bounds

    @classmethod
    def of_tensor(cls, info: TensorInfo) -> Region:
        """Return the region that is a whole tensor."""
        return cls(info.name, tuple((0, size) for size in info.shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of indices on each axis."""
        return tuple(end - begin for begin, end in self.bounds)

    @property
    def scalars(self) -> int:
        """The number of scalars in the region."""
        return math.prod(self.shape)

    def contains(self, coordinate: Coordinate) -> bool:
        """Return True if a scalar is in the region."""
        return (coordinate.tensor, len(coordinate.index)) == (self.tensor, len(self.bounds)) and all(
            begin <= i < end for i, (begin, end) in zip(coordinate.index, self.bounds, strict=True)
        )

    def overlaps(self, other: Region) -> bool:
        """Return True if a scalar is in both regions."""
        return (self.tensor, len(self.bounds)) == (other.tensor, len(other.bounds)) and all(
            max(a, c) < min(b, d) for (a, b), (c, d) in zip(self.bounds, other.bounds, strict=True)
        )

    def intersect(self, other: Region) -> Region:
        """Return the scalars that are in both regions. The regions must overlap."""
        axes = zip(self.bounds, other.bounds, strict=True)
        return Region(self.tensor, tuple((max(a, c), min(b, d)) for (a, b), (c, d) in axes))

    def list_positions(self, part: Region) -> Iterator[int]:
        """Yield the flat index in this region of each scalar of `part`, a region inside it, in rising order."""
        inner = tuple((begin - at, end - at) for (begin, end), (at, _) in zip(part.bounds, self.bounds, strict=True))
        for first, length in list_runs(Region(self.tensor, inner), self.shape):
            yield from range(first, first + length)

    @classmethod
    def of_scalar(cls, coordinate: Coordinate) -> Region:
        """Return the region that is one scalar."""
        return cls(coordinate.tensor, tuple((i, i + 1) for i in coordinate.index))

    def __str__(self) -> str:
        return f"{self.tensor}[{', '.join(_format_axis(*axis) for axis in self.bounds)}]"


def _format_axis(begin: int, end: int) -> str:
    return str(begin) if end == begin + 1 else f"{begin}:{end}"


def list_runs(region: Region, shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, length) of each run of adjacent scalars in the region, as flat indices in a tensor of `shape`.

    Runs are in rising order and as long as possible: a whole tensor is one run, a column has one run per row.
    """
    if not region.scalars:
        return
    axis = len(shape)
    length = 1
    while axis and region.bounds[axis - 1] == (0, shape[axis - 1]):
        axis -= 1
        length *= shape[axis]
    strides = [math.prod(shape[n + 1 :]) for n in range(len(shape))]
    if axis:  # the last axis with narrower bounds is still adjacent in memory
        axis -= 1
        begin, end = region.bounds[axis]
        first, length = begin * strides[axis], (end - begin) * strides[axis]
    else:
        first = 0
    for index in itertools.product(*(range(*bounds) for bounds in region.bounds[:axis])):
        yield first + sum(i * stride for i, stride in zip(index, strides, strict=False)), length
