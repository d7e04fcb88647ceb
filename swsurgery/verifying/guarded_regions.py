"""Compare protected regions of a derived checkpoint with those of a base, for `verify --protected`.

Tensors that store plain weights are compared in blocks with numpy, so a region may be a whole tensor. Tensors with
scales are compared scalar by scalar. Must not depend on manifests.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.errors import pluralise
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import FloatDtype, decode
from swsurgery.storage.numeric import load_numpy
from swsurgery.storage.region import Region
from swsurgery.storage.shard import Shard, TensorInfo
from swsurgery.verifying.findings import Finding

load_numpy()

import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from swsurgery.rewriting.rows import BAND_SIZE, RegionRows, StoredMatrix  # noqa: E402
from swsurgery.storage.arrays import Doubles, Words, decode_doubles, encode_doubles  # noqa: E402

MAX_SINGLE = 1 << 16
"""Maximum number of scalars of a region that are compared one by one."""

MAX_EXAMPLES = 10
"""Maximum number of lost scalars of a region that are listed."""

CompareOne = Callable[[Coordinate, Coordinate], tuple[bool, str]]
"""Compares a scalar of the checkpoint with a scalar of the base: returns (it was kept, a message)."""


@dataclass(frozen=True)
class GuardedRegion:
    """A protected region, and how many of its scalars have the base's values.

    `number` is the position of the edit in the manifest, counted from 0. `examples` are the first lost scalars, each
    with a message. `reason` tells why the region cannot be compared; "" if it can.
    """

    number: int
    target: str
    region: Region | None
    file: str | None = None
    scalars: int = 0
    kept: int = 0
    examples: tuple[tuple[Coordinate, str], ...] = ()
    reason: str = ""

    @property
    def lost(self) -> int:
        """The number of scalars with another value."""
        return 0 if self.reason else self.scalars - self.kept

    def list_findings(self) -> Iterator[Finding]:
        """Yield a finding for each example, and one that counts the other lost scalars."""
        tensor = self.region.tensor if self.region else None
        if self.reason:
            yield Finding("protected-unreadable", f"{self.target}: {self.reason}", self.file, tensor)
        for coordinate, message in self.examples:
            yield Finding("protected-lost", message, self.file, *coordinate)
        if more := self.lost - len(self.examples):
            yield Finding(
                "protected-lost", f"and {pluralise(more, 'more lost scalar')} of {self.target}", self.file, tensor
            )

    def to_json(self) -> dict[str, Any]:
        """Return the region as JSON."""
        return {
            "edit": self.number,
            "target": self.target,
            "tensor": self.region.tensor if self.region else None,
            "bounds": [list(axis) for axis in self.region.bounds] if self.region else None,
            "file": self.file,
            "scalars": self.scalars,
            "kept": self.kept,
            "lost": self.lost,
            "message": self.reason or None,
        }


class _Side:
    """A region of one of the two checkpoints."""

    def __init__(self, region: Region, checkpoint: Checkpoint):
        self.region = region
        self.info: TensorInfo = checkpoint.get_info(region.tensor)
        self.file = checkpoint.weight_map[region.tensor]
        self.shard: Shard = checkpoint.shards[self.file]
        matrix = StoredMatrix(
            self.info, self.shard.data_start + self.info.data_offsets[0], flat=len(self.info.shape) == 1
        )
        self.rows = RegionRows(matrix, region)
        self.is_plain = checkpoint.quantisation.get_reading(region.tensor).kind == "plain"

    def locate(self, row: int, position: int) -> Coordinate:
        """Return the coordinate of a scalar of a block whose first row is the region's row `row`."""
        flat = self.rows.find_flat(row, np.array([position], np.int64))
        return Coordinate(self.info.name, self.info.unflatten(int(flat[0])))


def compare_region(
    number: int,
    target: str,
    regions: tuple[Region, Region],
    checkpoints: tuple[Checkpoint, Checkpoint],
    tolerance: float,
    compare_one: CompareOne,
) -> GuardedRegion:
    """Compare a region of a checkpoint with a region of its base. Both pairs begin with the checkpoint.

    A scalar is kept if it has the base's value after rounding to either dtype, or if their difference is at most the
    fraction `tolerance` of the base's value.
    """
    ours, theirs = (_Side(region, one) for region, one in zip(regions, checkpoints, strict=True))
    found = GuardedRegion(number, target, ours.region, ours.file, ours.region.scalars)
    if ours.region.shape != theirs.region.shape:
        return _refuse(found, f"it has the shape {list(ours.region.shape)}, not {list(theirs.region.shape)}")
    dtypes = ours.info.dtype, theirs.info.dtype
    if ours.is_plain and theirs.is_plain and not any(dtype.bits % 8 for dtype in dtypes):
        if dtypes[0] != dtypes[1] and not all(isinstance(dtype, FloatDtype) for dtype in dtypes):
            return _refuse(found, f"it is stored as {dtypes[0].name}, not as {dtypes[1].name}")
        return _compare_blocks(found, ours, theirs, tolerance, compare_one)
    if ours.region.scalars > MAX_SINGLE:
        return _refuse(found, f"it is quantised and has more than {MAX_SINGLE} scalars")
    return _compare_singly(found, ours.region, theirs.region, compare_one)


def _refuse(found: GuardedRegion, reason: str) -> GuardedRegion:
    return GuardedRegion(found.number, found.target, found.region, found.file, found.scalars, reason=reason)


def _finish(found: GuardedRegion, lost: int, examples: list[tuple[Coordinate, str]]) -> GuardedRegion:
    kept = found.scalars - lost
    return GuardedRegion(
        found.number, found.target, found.region, found.file, found.scalars, kept, tuple(examples[:MAX_EXAMPLES])
    )


def _compare_singly(found: GuardedRegion, ours: Region, theirs: Region, compare_one: CompareOne) -> GuardedRegion:
    indices = (itertools.product(*(range(*axis) for axis in region.bounds)) for region in (ours, theirs))
    examples: list[tuple[Coordinate, str]] = []
    lost = 0
    for index, other in zip(*indices, strict=True):
        coordinate = Coordinate(ours.tensor, index)
        kept, message = compare_one(coordinate, Coordinate(theirs.tensor, other))
        if not kept:
            lost += 1
            if len(examples) < MAX_EXAMPLES:
                examples.append((coordinate, message))
    return _finish(found, lost, examples)


def _compare_blocks(
    found: GuardedRegion, ours: _Side, theirs: _Side, tolerance: float, compare_one: CompareOne
) -> GuardedRegion:
    step = max(1, BAND_SIZE // max(ours.rows.matrix.row_size, theirs.rows.matrix.row_size, 1))
    examples: list[tuple[Coordinate, str]] = []
    lost = 0
    with ours.shard.file.open() as one, theirs.shard.file.open() as other:
        for row in range(0, ours.rows.total, step):
            end = min(row + step, ours.rows.total)
            new, old = (side.rows.read(file, row, end).reshape(-1) for side, file in ((ours, one), (theirs, other)))
            places = np.flatnonzero(~_find_kept(ours.info, new, theirs.info, old, tolerance))
            lost += len(places)
            for position in places[: MAX_EXAMPLES - len(examples)].tolist():
                coordinate = ours.locate(row, position)
                examples.append((coordinate, compare_one(coordinate, theirs.locate(row, position))[1]))
    return _finish(found, lost, examples)


def _find_kept(ours: TensorInfo, new: Words, theirs: TensorInfo, old: Words, tolerance: float) -> NDArray[np.bool_]:
    """Return for each scalar whether its value was kept. `new` and `old` are the bit patterns."""
    dtype, coarse = ours.dtype, theirs.dtype
    kept: NDArray[np.bool_] = new == old if dtype == coarse else np.zeros(new.shape, np.bool_)
    if not isinstance(dtype, FloatDtype) or not isinstance(coarse, FloatDtype):
        return kept
    value, wanted = decode_doubles(dtype, new), decode_doubles(coarse, old)
    kept |= value == wanted
    if dtype != coarse:
        finite = np.isfinite(value) & np.isfinite(wanted)
        kept |= finite & (_round(coarse, value) == wanted)
        kept |= finite & (_round(dtype, wanted) == value)
    if tolerance:
        with np.errstate(invalid="ignore", over="ignore"):
            kept |= np.isfinite(wanted) & (np.abs(value - wanted) <= tolerance * np.abs(wanted))
    return kept


def _round(dtype: FloatDtype, values: Doubles) -> Doubles:
    """Round values to a dtype. A value that is not finite or larger than the largest one of the dtype becomes NaN."""
    largest = float(decode(dtype, dtype.largest.to_bytes(dtype.size, "little")))
    fits = np.abs(values) <= (largest if math.isfinite(largest) else np.inf)
    rounded = decode_doubles(dtype, encode_doubles(dtype, np.where(fits, values, 0.0)))
    return np.where(fits, rounded, np.nan)
