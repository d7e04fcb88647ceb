"""Scalars that a confirmation tests beside the candidates: their companions, and the null.

A companion stands in a candidate's column, so it has the same input, and is large for that column. The null are
scalars of the same matrices and of like magnitude that nobody suspects. A companion has a null of its own: the other
large rows of its column. All are found in the stored down projections, read in parts of bounded size. No model is run
here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from swsurgery.scanning.matrices import Matrix, Place
from swsurgery.scanning.report import Candidate, Expert
from swsurgery.storage.coordinate import Coordinate

COMPANIONS, COMPANION_SHARE, COMPANION_SIGMAS = 2, 1 / 6, 8.0
"""A companion has at least this share of the candidate's magnitude and is this many robust standard deviations from
zero in its column; so many are tested for each candidate. Known ones have half the candidate's magnitude (Llama-2-7B,
docs/known.md); in SmolLM2-135M the weakest that does something has a fifth, and 39 standard deviations."""

COLUMN_NULLS, LARGE_SIGMAS = 5, 4.0
"""A row of a column is large from this many robust standard deviations on; so many of the largest that are not tested
themselves are the null of a companion. In SmolLM2-135M the columns of its six best candidates have 2 to 8 rows beyond
four that are not companions; a normal distribution of 576 rows has 0.04."""


Column = tuple[int, Expert, int]
"""Layer, expert and col: one neuron's fan-out."""


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
                    candidate,
                    coordinate=name,
                    row=row,
                    value=float(column[row]),
                    score=0.0,
                    rank=matrix.rank(float(magnitudes[row])),
                    z=None,
                    input_spike=None,
                    output_spike=None,
                    share=None,
                    prompts=None,
                    round=None,
                )
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
