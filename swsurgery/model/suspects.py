"""Scalars that a confirmation tests beside the candidates: their companions, and the null.

A companion stands in a candidate's column, so it has the same input, and is large for that column. The null are
scalars of the same matrices and of like magnitude that nobody suspects. A companion has a null of its own: the other
large rows of its column. All are found in the stored down projections, read in parts of bounded size. No model is run
here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swsurgery.checkpoint import Checkpoint
from swsurgery.coordinate import Coordinate
from swsurgery.errors import ModelError
from swsurgery.findings import Candidate, Expert
from swsurgery.projections import DownProjection, down_projection
from swsurgery.shard import opened, read_exactly

COMPANIONS, COMPANION_SHARE, COMPANION_SIGMAS = 2, 1 / 6, 8.0
"""A companion has at least this share of the candidate's magnitude and is this many robust standard deviations from
zero in its column; so many are tested for each candidate. Known ones have half the candidate's magnitude (Llama-2-7B,
docs/known.md); in SmolLM2-135M the weakest that does something has a fifth, and 39 standard deviations."""

COLUMN_NULLS, LARGE_SIGMAS = 5, 4.0
"""A row of a column is large from this many robust standard deviations on; so many of the largest that are not tested
themselves are the null of a companion. In SmolLM2-135M the columns of its six best candidates have 2 to 8 rows beyond
four that are not companions; a normal distribution of 576 rows has 0.04."""

BAND = 0.14
"""In log2: magnitudes within 10% of the candidate's are like it."""

PIECE = 1 << 22
"""Elements of a matrix that are looked at in one go."""

_ELEMENTS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip

Place = tuple[int, Expert]
"""Layer and expert: where a matrix is."""

Column = tuple[int, Expert, int]
"""Layer, expert and col: one neuron's fan-out."""


@dataclass(frozen=True)
class Matrix:
    """One down projection, read from its shard. `outer` and `inner` are its sizes in the order in which it is stored:
    (rows, cols), or (cols, rows) where it is transposed."""

    checkpoint: Checkpoint
    place: DownProjection

    @property
    def outer(self) -> int:
        return self.place.cols if self.place.transposed else self.place.rows

    @property
    def inner(self) -> int:
        return self.place.rows if self.place.transposed else self.place.cols

    def coordinate(self, row: int, col: int) -> Coordinate:
        return Coordinate(self.place.tensor, self.place.index(row, col))

    def column(self, col: int) -> Tensor:
        """What neuron `col` is multiplied with on its way to each residual channel: (rows,), float64."""
        if self.place.transposed:
            return self._read([(col * self.inner, self.inner)]).double()
        return self._read([(row * self.inner + col, 1) for row in range(self.outer)]).double()

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """The matrix as it is stored, in parts of bounded size: (first outer index, magnitudes (outer, inner))."""
        step = max(1, PIECE // self.inner)
        for first in range(0, self.outer, step):
            count = min(step, self.outer - first) * self.inner
            yield first, self._read([(first * self.inner, count)]).float().abs().view(-1, self.inner)

    def rank(self, magnitude: float) -> int:
        """1 for the largest magnitude in the matrix."""
        return 1 + sum(int((piece > magnitude).sum()) for _, piece in self.pieces())

    def like(self, magnitudes: Sequence[float], count: int, avoid: set[int], seed: int) -> list[list[Coordinate]]:
        """For each of `magnitudes`, up to `count` scalars outside the columns `avoid`: of those in the band around it a
        random choice, beyond it the nearest."""
        generator = torch.Generator().manual_seed(seed)
        columns = torch.tensor(sorted(avoid), dtype=torch.long)
        best = [(torch.empty(0), torch.empty(0, dtype=torch.long))] * len(magnitudes)
        for first, piece in self.pieces():
            logs = piece.log2()
            if self.place.transposed:
                logs[columns[(columns >= first) & (columns < first + len(piece))] - first] = math.nan
            else:
                logs[:, columns] = math.nan
            chance = torch.rand(logs.shape, generator=generator) * 1e-3  # who of equals comes first
            for number, magnitude in enumerate(magnitudes):
                far = ((logs - math.log2(magnitude)).abs().clamp(min=BAND) + chance).flatten().nan_to_num(nan=math.inf)
                near = far.topk(min(count, len(far)), largest=False)
                distance = torch.cat([best[number][0], near.values])
                flat = torch.cat([best[number][1], near.indices + first * self.inner])
                kept = distance.argsort(stable=True)[:count]
                best[number] = distance[kept], flat[kept]
        return [
            [self._at(int(flat)) for far, flat in zip(distances, flats, strict=True) if math.isfinite(far)]
            for distances, flats in best
        ]

    def _at(self, flat: int) -> Coordinate:
        outer, inner = divmod(flat, self.inner)
        return self.coordinate(inner, outer) if self.place.transposed else self.coordinate(outer, inner)

    def _read(self, runs: Iterable[tuple[int, int]]) -> Tensor:
        """Elements in their stored dtype: for each (first, count), counted from the start of the matrix."""
        name = self.place.tensor
        info, shard = self.checkpoint.info(name), self.checkpoint.shards[self.checkpoint.weight_map[name]]
        start, size = shard.offset(name, self.place.index(0, 0)), info.dtype.size
        with opened(shard.path) as fd:
            data = b"".join(read_exactly(fd, n * size, start + first * size, shard.path) for first, n in runs)
        return torch.frombuffer(bytearray(data), dtype=_ELEMENTS[info.dtype.name])


def matrices_of(checkpoint: Checkpoint, candidates: Sequence[Candidate]) -> dict[Place, Matrix]:
    """The down projection of each candidate. Raises ModelError where the candidate is no scalar of it."""
    matrices: dict[Place, Matrix] = {}
    for candidate in candidates:
        key = (candidate.layer, candidate.expert)
        if key not in matrices:
            place = down_projection(checkpoint.config, checkpoint.shapes, *key)
            dtype = checkpoint.info(place.tensor).dtype
            if dtype.name not in _ELEMENTS:
                raise ModelError(f"{dtype.name} holds no single weights", place.tensor)
            if why := checkpoint.quantisation.refusal(place.tensor):
                raise ModelError(why, place.tensor, "scan an unquantised copy")
            matrices[key] = Matrix(checkpoint, place)
        place = matrices[key].place
        inside = 0 <= candidate.row < place.rows and 0 <= candidate.col < place.cols
        if not inside or matrices[key].coordinate(candidate.row, candidate.col) != candidate.coordinate:
            raise ModelError("no such scalar of a down projection", candidate.coordinate)
    return matrices


def companions_of(listed: Sequence[Candidate], matrices: Mapping[Place, Matrix]) -> list[Candidate]:
    """Outliers in the candidates' columns that are not listed themselves."""
    found: dict[Coordinate, Candidate] = {candidate.coordinate: candidate for candidate in listed}
    for candidate in listed:
        matrix = matrices[candidate.layer, candidate.expert]
        column = matrix.column(candidate.col)
        magnitudes = column.abs()
        sigma = 1.4826 * float(magnitudes.median())  # of a normal distribution around zero
        least = max(COMPANION_SHARE * float(magnitudes[candidate.row]), COMPANION_SIGMAS * sigma)
        rows = [row for row in magnitudes.argsort(descending=True, stable=True).tolist() if row != candidate.row]
        for row in rows[:COMPANIONS]:
            name = matrix.coordinate(row, candidate.col)
            if candidate.value != 0 and float(magnitudes[row]) >= least and name not in found:
                found[name] = dataclasses.replace(
                    candidate, coordinate=name, row=row, value=float(column[row]), score=0.0,
                    rank=matrix.rank(float(magnitudes[row])), z=None, input_spike=None, output_spike=None,
                    share=None, prompts=None, round=None,
                )  # fmt: skip
    return list(found.values())[len(listed) :]


def column_of(candidate: Candidate) -> Column:
    """Return the column that holds a candidate."""
    return candidate.layer, candidate.expert, candidate.col


def minor_scalars(listed: Sequence[Candidate], tested: Sequence[Candidate]) -> set[Coordinate]:
    """Find the scalars that may matter only because their column spikes.

    These are all companions, and each candidate beside a larger candidate of its column.
    """
    largest: dict[Column, float] = {}
    for candidate in listed:
        largest[column_of(candidate)] = max(abs(candidate.value), largest.get(column_of(candidate), 0.0))
    names = {candidate.coordinate for candidate in listed}
    return {c.coordinate for c in tested if c.coordinate not in names or abs(c.value) < largest[column_of(c)]}


def column_rows(
    listed: Sequence[Candidate], tested: Sequence[Candidate], matrices: Mapping[Place, Matrix]
) -> dict[Column, list[Coordinate]]:
    """Find the null of each column that has a minor scalar: its largest rows that are not tested, largest first."""
    names, minor = {candidate.coordinate for candidate in tested}, minor_scalars(listed, tested)
    found: dict[Column, list[Coordinate]] = {}
    for column in dict.fromkeys(column_of(candidate) for candidate in tested if candidate.coordinate in minor):
        layer, expert, col = column
        matrix = matrices[layer, expert]
        magnitudes = matrix.column(col).abs()
        least = LARGE_SIGMAS * 1.4826 * float(magnitudes.median())
        rows = [
            matrix.coordinate(row, col)
            for row in magnitudes.argsort(descending=True, stable=True).tolist()
            if float(magnitudes[row]) >= least and float(magnitudes[row]) > 0
        ]
        found[column] = [name for name in rows if name not in names][:COLUMN_NULLS]
    return found


def draw_nulls(
    listed: Sequence[Candidate], tested: Sequence[Candidate], matrices: Mapping[Place, Matrix], nulls: int, seed: int
) -> list[Coordinate]:
    """`nulls` scalars, shared out evenly over the candidates; fewer where their matrices are too small."""
    templates = [candidate for candidate in listed if candidate.value != 0]
    shares = {t.coordinate: len(range(number, nulls, len(templates))) for number, t in enumerate(templates)}
    drawn: list[Coordinate] = []
    for place, matrix in matrices.items():
        here = [t for t in templates if (t.layer, t.expert) == place and shares[t.coordinate]]
        avoid = {candidate.col for candidate in tested if (candidate.layer, candidate.expert) == place}
        total = sum(shares[t.coordinate] for t in here)
        choices = matrix.like([abs(t.value) for t in here], total, avoid, seed) if here else []
        for template, choice in zip(here, choices, strict=True):
            drawn += [name for name in choice if name not in drawn][: shares[template.coordinate]]
    return drawn
