"""Read down projections as torch tensors from the shards of a checkpoint.

The modules by_activations.py, suspects.py and experts.py share this module. The scan by weights must not load torch, so
it reads matrices with blocks.py instead.
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
"""Maximum difference between log2 of two magnitudes that are considered similar (they differ by at most 10%)."""

MATRIX_PIECE = 1 << 22
"""Number of elements of a matrix that are read at a time (one stored row if a stored row is longer)."""

WEIGHT_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
"""The stored dtypes in which each element is one weight. In other dtypes an element may be a code of a quantiser."""

ProjectionKey = tuple[int, ExpertChoice]
"""Identifies a down projection by its layer and its expert."""


@dataclass(frozen=True)
class StoredProjection:
    """One down projection of a checkpoint, whose weights are read from its shard on demand.

    `outer` and `inner` are the first and the second size of the stored matrix: rows and cols, or cols and rows if the
    matrix is stored transposed.
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
        """Read one row, the weights that produce one residual channel: (cols,), float64. Raises ShardError."""
        return self._read_inner(row) if not self.projection.transposed else self._read_across(row)

    def read_column(self, col: int) -> Tensor:
        """Read one column, the weights that multiply the value of one neuron: (rows,), float64. Raises ShardError."""
        return self._read_inner(col) if self.projection.transposed else self._read_across(col)

    def read_pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Read the matrix in stored order, in pieces of at most `MATRIX_PIECE` elements (or of one stored row).

        Yields (first, piece). `piece` contains some stored rows, (stored rows, inner), in the stored dtype, and `first`
        is the index of its first stored row. Raises ShardError.
        """
        step = max(1, MATRIX_PIECE // self.inner)
        for first in range(0, self.outer, step):
            count = min(step, self.outer - first) * self.inner
            yield first, self._read([(first * self.inner, count)]).view(-1, self.inner)

    def compute_rank(self, value: float) -> int:
        """Compute the rank of the magnitude of `value` in the matrix: 1 plus the number of larger magnitudes.

        Compares in float64. Raises ShardError.
        """
        return 1 + sum(int((piece.double().abs() > abs(value)).sum()) for _, piece in self.read_pieces())

    def draw_similar(
        self, magnitudes: Sequence[float], count: int, avoid: set[int], seed: int
    ) -> list[list[Coordinate]]:
        """Draw up to `count` scalars of similar magnitude for each of `magnitudes`, outside the columns `avoid`.

        The scalars are drawn at random, with `seed`, from those that differ by at most 10% in magnitude. If there are
        fewer than `count`, the scalars with the nearest magnitudes are added. Raises ShardError.
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
            chance = torch.rand(logs.shape, generator=generator) * 1e-3  # chooses among equal distances
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
        """Read several runs of elements and join them: (elements,), in the stored dtype.

        A run (first, count) begins at element `first` of the matrix, counted in stored order.
        """
        name = self.projection.tensor
        info, shard = self.checkpoint.get_info(name), self.checkpoint.shards[self.checkpoint.weight_map[name]]
        start, size = shard.find_offset(name, self.projection.find_index(0, 0)), info.dtype.size
        with shard.file.open() as file:
            data = b"".join(read_exactly(file, n * size, start + first * size) for first, n in runs)
        return torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[info.dtype.name])


def refuse_unweighted(checkpoint: Checkpoint, tensor: str) -> None:
    """Raise ModelError if the dtype of a tensor is not in `WEIGHT_DTYPES`."""
    dtype = checkpoint.get_info(tensor).dtype.name
    if dtype not in WEIGHT_DTYPES:
        raise ModelError(f"{dtype} elements are not weights", tensor)


def refuse_quantised(checkpoint: Checkpoint, tensor: str) -> None:
    """Raise ModelError if a tensor is quantised, so that its elements are not plain weights."""
    if why := checkpoint.quantisation.explain_refusal(tensor):
        raise ModelError(why, tensor, "scan an unquantised copy")


def find_projections(checkpoint: Checkpoint, candidates: Sequence[Candidate]) -> dict[ProjectionKey, StoredProjection]:
    """Find the down projection of each candidate.

    Raises ModelError if a candidate is not a scalar of a down projection in its layer, or if the elements of the down
    projection are not weights.
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
            raise ModelError("this is not a scalar of a down projection", candidate.coordinate)
    return found
