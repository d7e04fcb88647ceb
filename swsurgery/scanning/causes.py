"""Find what makes a massive hidden state: scalars, a row, a neuron, experts, or the attention of a layer.

The value that a layer adds to a channel is the sum of what its attention and its MLP add. The output y[row] of the MLP
is the sum of x[col] * W[row, col] over the neurons of its down projections. This module compares the terms of both
sums. It runs no model: spikes.py recorded the terms, and the rows are read from the shards.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.projections import DownProjection
from swsurgery.scanning.activation_report import Cause, CauseKind, ExpertShare, PersistentActivation
from swsurgery.scanning.matrices import StoredProjection, refuse_quantised, refuse_unweighted
from swsurgery.scanning.spikes import Move
from swsurgery.storage.coordinate import Coordinate

SHARE = 0.25
"""Minimum share x[col] * W[row, col] / y[row] of a scalar that becomes a candidate. In SmolLM2 two neurons make the
activation of layer 11 (shares 0.73 and 0.26), and two others the activation of layer 2 (0.65 and 0.34). No other neuron
has a share above 0.02. A scalar whose share is too small at first may reach the minimum in a later round, after the
scalars with larger shares are set to zero."""

OUTLIER = 10.0
"""Minimum magnitude of x[col] and of y[row], each divided by the median magnitude of x or y for the same token. Only a
scalar for which both quotients reach the minimum becomes a candidate. In SmolLM2 they are over 1,000 for x and over 300
for y."""

EXPLAINED = 0.2
"""Maximum difference between an output y[row] and the sum of the products x[col] * W[row, col], divided by y[row]. A
larger difference shows that the model did not compute y[row] with the stored row W[row]."""

MOST = 0.5
"""Minimum share of a sum that names the cause: the attention's or the MLP's share of what a layer adds, and the share
of the MLP's output that the scalars named as the cause contribute together."""

LISTED_SHARE = 0.1
"""Minimum share of an MLP's output of an expert that is named in a cause."""


LISTED_SCALARS = 3
"""Number of scalars that are named if none of them makes a large share."""


class RowTerm(NamedTuple):
    """One scalar W[row, col] of a down projection, with its input `x` = x[col] for one token.

    `share` is x[col] * W[row, col] / y[row], the share of the output that this scalar makes. `outlier` is True if the
    magnitude of x[col] is at least `OUTLIER` times the median magnitude of the projection's inputs for that token.
    """

    projection: DownProjection
    row: int
    col: int
    x: float
    weight: float
    share: float
    outlier: bool

    @property
    def coordinate(self) -> Coordinate:
        return Coordinate(self.projection.tensor, self.projection.find_index(self.row, self.col))


class Decomposition(NamedTuple):
    """The terms of one output y[row] of an MLP.

    `scalars` contains the scalars with the largest shares, the largest first. `explained` is True if the products of
    the whole stored row add up to the output (see `EXPLAINED`). `outlier` is True if the output is at least `OUTLIER`
    times the median of its token. `half` is the number of scalars whose products add up to half of the output.
    `experts` contains the share of each expert, the largest first; it is empty in a dense MLP.
    """

    scalars: list[RowTerm]
    explained: bool
    outlier: bool
    half: int
    experts: tuple[ExpertShare, ...]

    @property
    def makers(self) -> list[RowTerm]:
        """The scalars that become candidates."""
        if not (self.explained and self.outlier):
            return []
        return [scalar for scalar in self.scalars if scalar.outlier and scalar.share >= SHARE]

    def explain_no_maker(self) -> str:
        """Explain why none of the scalars became a candidate, by the first condition that is not met."""
        if not self.scalars:
            return "the down projection was not called"
        if not self.explained:
            return "the products of the stored row do not add up to the output"
        if not self.outlier:
            return f"the output is below {OUTLIER:g} times the median for its token"
        largest = f"the largest share is {self.scalars[0].share:.2f}"
        low = self.scalars[0].share < SHARE
        return largest if low else f"{largest}, but its input is below {OUTLIER:g} times the median"


class Decomposer:
    """Decomposes outputs of down projections with rows that it reads from a checkpoint and keeps.

    A scalar that was set to zero with `remove` counts as zero. `unseen` contains the layers whose MLP is not observed.
    """

    def __init__(self, checkpoint: Checkpoint, unseen: Collection[int] = ()):
        self.checkpoint, self.unseen = checkpoint, frozenset(unseen)
        self._rows: dict[tuple[DownProjection, int], Tensor] = {}

    def remove(self, scalar: RowTerm) -> None:
        """Count a scalar as zero from now on."""
        self._rows[scalar.projection, scalar.row][scalar.col] = 0.0

    def decompose(self, move: Move) -> Decomposition:
        """Find the terms of the output of `move`.

        Raises ModelError if the elements of a down projection are not weights, for example because it is quantised.
        Raises ShardError if the file cannot be read.
        """
        scalars: list[RowTerm] = []
        shares = [self._compute_shares(part.projection, part.share * part.x, move) for part in move.record.multiplied]
        for part, share in zip(move.record.multiplied, shares, strict=True):
            row = self._fetch_row(part.projection, move.channel)
            typical = float(part.x.abs().median())
            for col in share.topk(min(8, len(share))).indices.tolist():
                x = float(part.x[col])
                outlier = abs(x) >= OUTLIER * typical
                scalars.append(
                    RowTerm(part.projection, move.channel, col, x, float(row[col]), float(share[col]), outlier)
                )
        total = sum(float(share.sum()) for share in shares)
        experts = [
            ExpertShare(part.projection.expert, float(share.sum()))
            for part, share in zip(move.record.multiplied, shares, strict=True)
            if part.projection.expert is not None
        ]
        return Decomposition(
            sorted(scalars, key=lambda s: -s.share),
            bool(scalars) and abs(total - 1) <= EXPLAINED,
            abs(move.output) >= OUTLIER * move.record.typical,
            _count_half(shares),
            tuple(sorted(experts, key=lambda one: -one.share)),
        )

    def _compute_shares(self, projection: DownProjection, x: Tensor, move: Move) -> Tensor:
        return x.double() * self._fetch_row(projection, move.channel) / (move.output or 1.0)

    def _fetch_row(self, projection: DownProjection, row: int) -> Tensor:
        """Return one row of a down projection, (cols,) in float64, without the scalars that were removed."""
        key = (projection, row)
        if key not in self._rows:
            refuse_quantised(self.checkpoint, projection.tensor)
            refuse_unweighted(self.checkpoint, projection.tensor)
            self._rows[key] = StoredProjection(self.checkpoint, projection).read_row(row)
        return self._rows[key]


def _count_half(shares: Sequence[Tensor]) -> int:
    """Count the largest terms of a sum that add up to half of it. `shares` contains the terms divided by the sum."""
    if not shares:
        return 0
    ordered = torch.cat(list(shares)).sort(descending=True).values.cumsum(0)
    return min(len(ordered), 1 + int((ordered < MOST).sum()))


def find_cause(move: Move, decomposer: Decomposer) -> Cause:
    """Find what a layer's step of a massive state comes from.

    A single neuron that makes several channels massive is found by `name_neurons`.
    """
    mlp = move.added / move.change if move.change else 0.0
    if mlp < MOST:
        unseen = move.layer in decomposer.unseen
        return Cause("layer" if unseen else "attention", move.layer, move.change, 1.0 if unseen else 1 - mlp)
    found = decomposer.decompose(move)
    cause = Cause("MLP", move.layer, move.change, mlp)
    if not found.explained:
        return cause
    makers = [scalar for scalar in found.scalars if scalar.outlier and scalar.share >= SHARE]
    kind: CauseKind
    experts = tuple(one for one in found.experts if one.share >= LISTED_SHARE)
    if makers and sum(scalar.share for scalar in makers) >= MOST:
        makers, kind = [scalar for scalar in makers if scalar.projection == makers[0].projection], "scalar"
    else:
        makers, kind = found.scalars[:LISTED_SCALARS], "expert" if experts else "row"
    return dataclasses.replace(
        cause,
        kind=kind,
        expert=makers[0].projection.expert if kind == "scalar" else None,
        row=move.channel,
        cols=tuple(scalar.col for scalar in makers),
        shares=tuple(scalar.share for scalar in makers),
        half=found.half,
        experts=experts,
    )


def name_neurons(activations: Sequence[PersistentActivation]) -> list[PersistentActivation]:
    """Name a neuron as the cause of all activations that its scalars make in different channels.

    Side effects do not count.
    """
    rows: dict[tuple[object, ...], set[int]] = defaultdict(set)
    for one in activations:
        for cause in one.causes if not one.side else ():
            if cause.kind == "scalar":
                rows[cause.layer, cause.expert, cause.cols[0]].add(one.channel)

    def mark(cause: Cause) -> Cause:
        shared = cause.kind == "scalar" and len(rows[cause.layer, cause.expert, cause.cols[0]]) > 1
        return dataclasses.replace(cause, kind="neuron") if shared else cause

    return [dataclasses.replace(one, causes=tuple(map(mark, one.causes))) for one in activations]
