"""Search the matrix of a lost super weight for the place to which it was moved, for example by a permutation.

The matrix is read in blocks of rows, and quantised matrices are dequantised block by block.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.layouts.cells import CannotTell
from swsurgery.checkpoint.layouts.find import find_matrix, make_reader
from swsurgery.checkpoint.layouts.module import ModuleTensor
from swsurgery.storage.arrays import Doubles
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import FloatDtype
from swsurgery.verifying.known_states import TOLERANCE, KnownNumber, classify_weight
from swsurgery.verifying.stored_weight import Unreadable, read_weight

BLOCK_ELEMENTS = 1 << 19
"""Approximate number of elements of a block. A block of float64 has 4 MiB."""

MAX_LARGE = 8
"""Maximum number of elements as large as the known value. If a matrix has more, none of them is reported."""

FAR = 10.0
"""Minimum ratio of a super weight to the root mean square of the other elements of its matrix.

The largest of 100 million normally distributed numbers is about 6 times as large as their root mean square.
"""


EXACT = 1 / 32
"""Maximum distance from the known value, in steps of the grid, of an element that has this value exactly.

The largest element of a group is often stored exactly, except for the rounding of its scale.
"""


@dataclass(frozen=True)
class FoundElsewhere:
    """An element that has the value of a lost super weight. `index` is an index of the weight in a loaded model."""

    index: tuple[int, ...]
    value: float

    def to_json(self) -> dict[str, object]:
        """Return the element as JSON."""
        return {"index": list(self.index), "value": self.value}


@dataclass
class _Tally:
    """What the blocks read so far contain. `large` are the elements within TOLERANCE of the known value: (row, col)."""

    large: list[tuple[int, int, float]] = field(default_factory=list)
    larger: int = 0
    count: int = 0
    squares: float = 0.0


def find_elsewhere(
    checkpoint: Checkpoint, lost: Coordinate, known: KnownNumber, others: Collection[Coordinate] = ()
) -> FoundElsewhere | None:
    """Find the element that has the known value of the super weight that is lost at `lost`.

    A candidate is an element that has the known value except for rounding. If there is none, the candidates are the
    elements one step of their dtype or grid away. A candidate must be FAR larger than the other elements. It is
    returned if it is the only one, or the only one with exactly the known value. Nothing is returned if more than
    MAX_LARGE elements are as large as the known value. `others` are coordinates of other known super weights, which are
    no candidates. If experts are stacked in one tensor, only the expert of `lost` is searched.

    Returns None also if the matrix is on the Hub, because it would have to be downloaded.
    """
    if not checkpoint.is_here or len(lost.index) < 2:
        return None
    tally = _Tally()
    try:
        for row, values in _read_blocks(checkpoint, lost):
            _add_block(tally, row, values, known)
            if len(tally.large) + tally.larger > MAX_LARGE:
                return None
        return _choose(checkpoint, lost, known, others, tally)
    except CannotTell:
        return None


class _Candidate(NamedTuple):
    """An element that may be the lost one: its distance from the known value, and the step at its place."""

    distance: float
    step: float
    found: FoundElsewhere


def _choose(
    checkpoint: Checkpoint, lost: Coordinate, known: KnownNumber, others: Collection[Coordinate], tally: _Tally
) -> FoundElsewhere | None:
    """Return the element of a tally that has the known value; None if none has, or if several may be meant."""
    kept: list[_Candidate] = []
    close: list[_Candidate] = []
    for row, col, value in tally.large:
        index = (*lost.index[:-2], row, col)
        rest = max(tally.squares - value * value, 0.0) / max(tally.count - 1, 1)
        if Coordinate(lost.tensor, index) in others or abs(value) < FAR * math.sqrt(rest):
            continue
        try:
            stored = read_weight(checkpoint, Coordinate(lost.tensor, index))
        except Unreadable:
            continue
        candidate = _Candidate(abs(value - known.orient(value)), stored.step, FoundElsewhere(index, value))
        match classify_weight(known, stored):
            case "kept":
                kept.append(candidate)
            case "close":
                close.append(candidate)
    return _pick(kept or close)


def _pick(candidates: list[_Candidate]) -> FoundElsewhere | None:
    """Return the only candidate. If there are several, return the nearest one if it is the only exact one."""
    if len(candidates) < 2:
        return candidates[0].found if candidates else None
    nearest, second = sorted(candidates, key=lambda each: each.distance)[:2]
    is_exact = nearest.distance <= EXACT * nearest.step
    return nearest.found if is_exact and second.distance > 4 * EXACT * second.step else None


def _add_block(tally: _Tally, row: int, values: Doubles, known: KnownNumber) -> None:
    """Add a block of rows, whose first one has the number `row`. Elements that are not finite are ignored."""
    finite = np.isfinite(values)
    if not finite.all():
        values = np.where(finite, values, 0.0)
    lowest, highest = ((1 + sign * TOLERANCE) * abs(known.value) for sign in (-1, 1))
    magnitudes = np.abs(values)
    tally.larger += int(np.count_nonzero(magnitudes > highest))
    for at, col in np.argwhere((magnitudes >= lowest) & (magnitudes <= highest)).tolist():
        tally.large.append((row + at, col, float(values[at, col])))
        if len(tally.large) > MAX_LARGE:
            return
    tally.count += values.size
    with np.errstate(over="ignore"):
        tally.squares += float(np.square(magnitudes, out=magnitudes).sum())


def _read_blocks(checkpoint: Checkpoint, lost: Coordinate) -> Iterator[tuple[int, Doubles]]:
    """Yield the rows of the matrix that contains `lost`, in blocks: (number of the first row, float64 [rows, cols]).

    If matrices are stacked, only the matrix that contains `lost` is read. Raises CannotTell.
    """
    matrix = find_matrix(checkpoint, lost.tensor)
    shape = checkpoint.get_info(lost.tensor).shape if matrix is None else matrix.shape
    *above, rows, cols = shape
    first = 0
    for length, index in zip(above, lost.index[:-2], strict=True):
        first = first * length + index
    first *= rows
    step = max(BLOCK_ELEMENTS // max(cols, 1), 1)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        if matrix is not None:
            yield begin, matrix.dequantise(first + begin, first + end)
        else:
            yield begin, _read_plain(checkpoint, lost.tensor, first + begin, first + end)


def _read_plain(checkpoint: Checkpoint, name: str, begin: int, end: int) -> Doubles:
    """Read rows of a plain tensor as float64.

    All axes before the last are joined into one axis of rows. Raises CannotTell.
    """
    tensor = ModuleTensor(checkpoint.get_info(name), make_reader(checkpoint))
    if not isinstance(tensor.info.dtype, FloatDtype):
        raise CannotTell(f"{name} does not contain floats")
    cols = tensor.shape[-1]
    return tensor.read_numbers(begin * cols, end * cols).reshape(end - begin, cols)
