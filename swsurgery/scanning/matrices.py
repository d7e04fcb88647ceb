"""Read down projections as torch tensors from the shards of a checkpoint.

`by_activations`, `suspects` and `confirm` share this module. The scan by weights must not load torch; it reads with
`scores.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swsurgery.checkpoint.architectures import ExpertChoice
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.projections import DownProjection, find_down_projection
from swsurgery.errors import ModelError
from swsurgery.model.torch_dtypes import TORCH_DTYPES
from swsurgery.scanning.report import Candidate
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.files import read_exactly

BAND = 0.14
"""Maximum distance between log2 of two magnitudes that count as similar: 10%."""

MATRIX_PIECE = 1 << 22
"""Number of elements of a matrix that are read at a time (one row if a row is longer)."""

WEIGHT_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
"""The stored dtypes in which one element is one weight."""

ProjectionKey = tuple[int, ExpertChoice]
"""The layer and the expert of a down projection."""


@dataclass(frozen=True)
class StoredProjection:
    """One down projection of a checkpoint, read from its shard on demand.

    `outer` and `inner` are its two sizes in stored order: (rows, cols), or (cols, rows) if it is stored transposed.
    """

    checkpoint: Checkpoint
    projection: DownProjection

    @property
    def outer(self) -> int:
        return self.projection.cols if self.projection.transposed else self.projection.rows

    @property
    def inner(self) -> int:
        return self.projection.rows if self.projection.transposed else self.projection.cols

    def make_coordinate(self, row: int, col: int) -> Coordinate:
        return Coordinate(self.projection.tensor, self.projection.find_index(row, col))

    def read_row(self, row: int) -> Tensor:
        """Read the weights that feed one residual channel: (cols,), float64. Raises ShardError."""
        return self._read_inner(row) if not self.projection.transposed else self._read_across(row)

    def read_column(self, col: int) -> Tensor:
        """Read the weights that one neuron's value is multiplied by: (rows,), float64. Raises ShardError."""
        return self._read_inner(col) if self.projection.transposed else self._read_across(col)

    def read_pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Read the matrix in stored order, `MATRIX_PIECE` elements at a time.

        Yields (first, piece): the outer index of the piece's first row, and its elements (outer, inner) in their stored
        dtype. Raises ShardError.
        """
        step = max(1, MATRIX_PIECE // self.inner)
        for first in range(0, self.outer, step):
            count = min(step, self.outer - first) * self.inner
            yield first, self._read([(first * self.inner, count)]).view(-1, self.inner)

    def compute_rank(self, value: float) -> int:
        """Count the magnitudes of the matrix that are larger than that of `value`, plus 1. Compares in float64."""
        return 1 + sum(int((piece.double().abs() > abs(value)).sum()) for _, piece in self.read_pieces())

    def draw_similar(
        self, magnitudes: Sequence[float], count: int, avoid: set[int], seed: int
    ) -> list[list[Coordinate]]:
        """Draw up to `count` scalars for each of `magnitudes`, outside the columns `avoid`.

        They are drawn at random, with `seed`, from the scalars whose magnitude is within 10%. If there are too few of
        these, the scalars with the nearest magnitudes are added. Raises ShardError.
        """
        generator = torch.Generator().manual_seed(seed)
        columns = torch.tensor(sorted(avoid), dtype=torch.long)
        best = [(torch.empty(0), torch.empty(0, dtype=torch.long))] * len(magnitudes)
        for first, piece in self.read_pieces():
            logs = piece.float().abs().log2()
            if self.projection.transposed:
                logs[columns[(columns >= first) & (columns < first + len(piece))] - first] = math.nan
            else:
                logs[:, columns] = math.nan
            chance = torch.rand(logs.shape, generator=generator) * 1e-3  # decides between equal distances
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
        return self.make_coordinate(inner, outer) if self.projection.transposed else self.make_coordinate(outer, inner)

    def _read_inner(self, outer: int) -> Tensor:
        return self._read([(outer * self.inner, self.inner)]).double()

    def _read_across(self, inner: int) -> Tensor:
        return self._read([(outer * self.inner + inner, 1) for outer in range(self.outer)]).double()

    def _read(self, runs: Iterable[tuple[int, int]]) -> Tensor:
        """Read runs (first, count) of elements, counted from the start of the matrix, in their stored dtype."""
        name = self.projection.tensor
        info, shard = self.checkpoint.get_info(name), self.checkpoint.shards[self.checkpoint.weight_map[name]]
        start, size = shard.find_offset(name, self.projection.find_index(0, 0)), info.dtype.size
        with shard.file.open() as file:
            data = b"".join(read_exactly(file, n * size, start + first * size) for first, n in runs)
        return torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[info.dtype.name])


def refuse_unweighted(checkpoint: Checkpoint, tensor: str) -> None:
    """Raise ModelError if the dtype of a tensor is not one in which each element is a weight."""
    dtype = checkpoint.get_info(tensor).dtype.name
    if dtype not in WEIGHT_DTYPES:
        raise ModelError(f"{dtype} elements are not weights", tensor)


def refuse_quantised(checkpoint: Checkpoint, tensor: str) -> None:
    """Raise ModelError if the elements of a tensor are codes of a quantiser."""
    if why := checkpoint.quantisation.explain_refusal(tensor):
        raise ModelError(why, tensor, "scan an unquantised copy")


def find_projections(checkpoint: Checkpoint, candidates: Sequence[Candidate]) -> dict[ProjectionKey, StoredProjection]:
    """Find the down projection of each candidate.

    Raises ModelError if a candidate is not a scalar of its layer's down projection, or if the elements of that are not
    weights.
    """
    found: dict[ProjectionKey, StoredProjection] = {}
    for candidate in candidates:
        key = (candidate.layer, candidate.expert)
        if key not in found:
            projection = find_down_projection(checkpoint.config, checkpoint.shapes, *key)
            refuse_unweighted(checkpoint, projection.tensor)
            refuse_quantised(checkpoint, projection.tensor)
            found[key] = StoredProjection(checkpoint, projection)
        projection = found[key].projection
        inside = 0 <= candidate.row < projection.rows and 0 <= candidate.col < projection.cols
        if not inside or found[key].make_coordinate(candidate.row, candidate.col) != candidate.coordinate:
            raise ModelError("no such scalar of a down projection", candidate.coordinate)
    return found
