"""Choose the scalars that the causal test zeroes in addition to the candidates: companions and null scalars.

A companion is an outlier in a candidate's column of the down projection, so both multiply the same input. Null scalars
are zeroed for comparison. Candidates are compared with random scalars of similar magnitude in the same matrices.
Companions are also compared with the other large scalars of their column. This module reads the stored down projections
and runs no model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from swsurgery.checkpoint.architectures import ExpertChoice
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.scanning.causal_test import CONTEXT_NULLS, PAIRS
from swsurgery.scanning.matrices import ProjectionKey, StoredProjection, find_projections
from swsurgery.scanning.report import Candidate
from swsurgery.storage.coordinate import Coordinate

COMPANIONS, COMPANION_SHARE, COMPANION_SIGMAS = 2, 1 / 6, 8.0
"""Maximum number of companions of a candidate. Minimum magnitude of a companion, as a share of its candidate's, and
in robust standard deviations of the column. The companions known in Llama-2-7B have half the candidate's magnitude
(docs/known.md). In SmolLM2-135M the weakest companion whose zeroing has an effect has a fifth of the candidate's
magnitude, and its own magnitude is 39 standard deviations."""

COLUMN_NULLS, LARGE_SIGMAS = 5, 4.0
"""Maximum number of scalars of a column with which its companions are compared, and the minimum magnitude of each in
robust standard deviations of the column. In SmolLM2-135M the columns of the six best candidates contain 2 to 8 scalars
beyond four standard deviations that are not companions. Of 576 normally distributed values, 0.04 would be expected."""

COMPARED_ERROR, RATIO_ERROR = 1e-5, 1e-8
"""Largest standard error of an estimated loss, in nats per token. The first is for groups that are only compared with
bars, which are at least 0.048 nats. The second is for groups whose perplexity ratio is reported, with six digits."""

Column = tuple[int, ExpertChoice, int]
"""The layer, expert and col that identify one column of a down projection."""

Zeroed = frozenset[Coordinate]
"""A set of scalars that are zeroed together. The empty set stands for the model as stored."""


def find_companions(listed: Sequence[Candidate], matrices: Mapping[ProjectionKey, StoredProjection]) -> list[Candidate]:
    """Find the companions of the candidates: outliers in their columns that no detector lists. Raises ShardError."""
    found: dict[Coordinate, Candidate] = {candidate.coordinate: candidate for candidate in listed}
    for candidate in listed:
        matrix = matrices[candidate.layer, candidate.expert]
        column = matrix.read_column(candidate.col)
        magnitudes = column.abs()
        sigma = 1.4826 * float(magnitudes.median())  # estimates the standard deviation of normal values around zero
        least = max(COMPANION_SHARE * float(magnitudes[candidate.row]), COMPANION_SIGMAS * sigma)
        rows = [row for row in magnitudes.argsort(descending=True, stable=True).tolist() if row != candidate.row]
        for row in rows[:COMPANIONS]:
            name = matrix.make_coordinate(row, candidate.col)
            if candidate.value != 0 and float(magnitudes[row]) >= least and name not in found:
                found[name] = dataclasses.replace(
                    candidate,
                    coordinate=name,
                    row=row,
                    value=float(column[row]),
                    score=0.0,
                    rank=matrix.compute_rank(float(column[row])),
                    z=None,
                    input_spike=None,
                    output_spike=None,
                    share=None,
                    prompts=None,
                    round=None,
                    role=None,
                )
    return list(found.values())[len(listed) :]


def get_column(candidate: Candidate) -> Column:
    """Return the layer, expert and col of the column that contains a candidate."""
    return candidate.layer, candidate.expert, candidate.col


def find_minor_scalars(listed: Sequence[Candidate], tested: Sequence[Candidate]) -> set[Coordinate]:
    """Find the minor scalars: those that may have an effect only because the input of their column is large.

    Minor scalars are all companions, and each candidate whose column contains a candidate of larger magnitude.
    """
    largest: dict[Column, float] = {}
    for candidate in listed:
        largest[get_column(candidate)] = max(abs(candidate.value), largest.get(get_column(candidate), 0.0))
    names = {candidate.coordinate for candidate in listed}
    return {c.coordinate for c in tested if c.coordinate not in names or abs(c.value) < largest[get_column(c)]}


def choose_column_rows(
    listed: Sequence[Candidate], tested: Sequence[Candidate], matrices: Mapping[ProjectionKey, StoredProjection]
) -> dict[Column, list[Coordinate]]:
    """Choose, for each column with a minor scalar, the scalars with which that minor scalar is compared.

    They are the largest scalars of the column that are not tested, largest first, and at most `COLUMN_NULLS`.
    """
    names, minor = {candidate.coordinate for candidate in tested}, find_minor_scalars(listed, tested)
    found: dict[Column, list[Coordinate]] = {}
    for column in dict.fromkeys(get_column(candidate) for candidate in tested if candidate.coordinate in minor):
        layer, expert, col = column
        matrix = matrices[layer, expert]
        magnitudes = matrix.read_column(col).abs()
        least = LARGE_SIGMAS * 1.4826 * float(magnitudes.median())
        rows = [
            matrix.make_coordinate(row, col)
            for row in magnitudes.argsort(descending=True, stable=True).tolist()
            if float(magnitudes[row]) >= least and float(magnitudes[row]) > 0
        ]
        found[column] = [name for name in rows if name not in names][:COLUMN_NULLS]
    return found


def draw_nulls(
    listed: Sequence[Candidate],
    tested: Sequence[Candidate],
    matrices: Mapping[ProjectionKey, StoredProjection],
    nulls: int,
    seed: int,
) -> list[Coordinate]:
    """Draw `nulls` random scalars whose magnitudes are similar to those of the candidates.

    Every candidate gets the same number of them, give or take one. Matrices that are too small give fewer scalars.
    """
    templates = [candidate for candidate in listed if candidate.value != 0]
    shares = {t.coordinate: len(range(number, nulls, len(templates))) for number, t in enumerate(templates)}
    drawn: list[Coordinate] = []
    for key, matrix in matrices.items():
        here = [t for t in templates if (t.layer, t.expert) == key and shares[t.coordinate]]
        avoid = {candidate.col for candidate in tested if (candidate.layer, candidate.expert) == key}
        total = sum(shares[t.coordinate] for t in here)
        choices = matrix.draw_similar([abs(t.value) for t in here], total, avoid, seed) if here else []
        for template, choice in zip(here, choices, strict=True):
            drawn += [name for name in choice if name not in drawn][: shares[template.coordinate]]
    return drawn


@dataclass(frozen=True)
class Suspects:
    """The scalars that the causal test zeroes.

    `tested` contains the candidates, followed by their companions. `together` contains the candidates only. `null`
    contains random scalars for comparison, and `crowded` the null scalars that are also zeroed together with all
    candidates. `minor` contains the scalars that may have an effect only because the input of their column is large.
    `columns` contains, for each column of a minor scalar, other large scalars of the column for comparison. `pairs`
    contains the pairs that are tested as joint sets. `removers` contains the scalars that remove an activation. Each of
    them is zeroed alone, and in no other set.
    """

    tested: list[Candidate]
    together: Zeroed
    null: list[Coordinate]
    crowded: list[Coordinate]
    columns: dict[Column, list[Coordinate]]
    minor: set[Coordinate]
    pairs: list[Zeroed]
    removers: list[Candidate] = dataclasses.field(default_factory=list)

    @property
    def names(self) -> list[Coordinate]:
        return [candidate.coordinate for candidate in self.tested]

    def lead(self, column: Column) -> Coordinate:
        """Return the first candidate in `column`. The other tested scalars of the column are compared with it."""
        return next(candidate.coordinate for candidate in self.tested if get_column(candidate) == column)

    def groups(self) -> list[Zeroed]:
        """List the sets of scalars that are zeroed first. Larger joint sets are chosen from their results."""
        removers = [candidate.coordinate for candidate in self.removers]
        groups = [frozenset({name}) for name in (*self.names, *removers, *self.null)]
        for name in self.names:
            groups += [self.together | {name}, self.together - {name}]
        groups += [*self.pairs, *(self.together | {scalar} for scalar in self.crowded)]
        for column, rows in self.columns.items():
            for row in rows:
                groups += [frozenset({row}), self.together | {row}, frozenset({self.lead(column), row})]
        return groups

    def list_errors(self) -> dict[Zeroed, float]:
        """List the groups whose losses may be estimated, and the largest standard error in nats per token.

        These are the groups of which no KL is reported. A group that is not reported at all is only compared with bars.
        """
        lead = {column: self.lead(column) for column in self.columns}
        rows = [(lead[column], row) for column, rows in self.columns.items() for row in rows]
        compared = [*self.pairs, *(self.together | {name} for name in (*self.names, *self.crowded))]
        compared += [frozenset(pair) for pair in rows]
        ratios = [frozenset({name}) for name in self.null]
        ratios += [group for _, row in rows for group in (frozenset({row}), self.together | {row})]
        errors = dict.fromkeys(compared, COMPARED_ERROR) | dict.fromkeys(ratios, RATIO_ERROR)
        reported = [self.together, *(self.together - {name} for name in self.names)]
        reported += [frozenset({name}) for name in (*self.names, *(remover.coordinate for remover in self.removers))]
        return {group: error for group, error in errors.items() if group not in reported}


def choose_suspects(checkpoint: Checkpoint, candidates: Sequence[Candidate], nulls: int, seed: int) -> Suspects:
    """Choose all scalars that the causal test zeroes; `nulls` null scalars are drawn with `seed`. Raises ShardError."""
    unique = list({candidate.coordinate: candidate for candidate in candidates}.values())
    removers = [candidate for candidate in unique if candidate.role == "removes"]
    listed = [candidate for candidate in unique if candidate.role != "removes"]
    matrices = find_projections(checkpoint, unique)
    apart = {candidate.coordinate for candidate in removers}
    tested = listed + [c for c in find_companions(listed, matrices) if c.coordinate not in apart]
    null = draw_nulls(unique, tested + removers, matrices, nulls, seed)
    together = frozenset(candidate.coordinate for candidate in listed)
    count = min(CONTEXT_NULLS, len(null)) if len(tested) > 1 else 0
    return Suspects(
        tested=tested,
        together=together,
        null=null,
        crowded=[null[number * len(null) // count] for number in range(count)],
        columns=choose_column_rows(listed, tested, matrices),
        minor=find_minor_scalars(listed, tested),
        pairs=_choose_pairs(tested, together),
        removers=removers,
    )


def _choose_pairs(tested: Sequence[Candidate], listed: Zeroed) -> list[Zeroed]:
    """Choose at most PAIRS pairs to test: two candidates, or any two tested scalars of the same column.

    Pairs in one column come first, then pairs in one row, then the pairs that are earliest in the list of scalars.
    """

    def same_column(one: Candidate, other: Candidate) -> bool:
        return (one.layer, one.expert, one.col) == (other.layer, other.expert, other.col)

    def order(pair: tuple[int, int]) -> tuple[bool, bool, int]:
        one, other = (tested[place] for place in pair)
        return not same_column(one, other), one.row != other.row, sum(pair)

    chosen = [
        frozenset({tested[one].coordinate, tested[other].coordinate})
        for one, other in sorted(combinations(range(len(tested)), 2), key=order)
        if same_column(tested[one], tested[other]) or {tested[one].coordinate, tested[other].coordinate} <= listed
    ]
    return chosen[:PAIRS]
