"""Hold what belongs together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.projections import DownProjection, down_projection
from swsurgery.errors import ModelError
from swsurgery.scanning.report import Candidate, Expert
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.files import opened, read_exactly

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
