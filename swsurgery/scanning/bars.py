"""Set the bars of the causal test of scalars: the effects that a critical scalar or a joint set must exceed.

Random scalars set a bar for all tested scalars. A companion is also compared with the other large scalars of its
column, since any large scalar has an effect if the input of its column is very large. This module zeroes nothing
itself: it computes from measured losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from swsurgery.model.intervals import compute_prediction_bound
from swsurgery.scanning.causal_test import NullTexts, Say, compute_floors
from swsurgery.scanning.losses import Losses
from swsurgery.scanning.suspects import Suspects, Zeroed, get_column
from swsurgery.storage.coordinate import Coordinate

LEAST_ROWS = 3
"""Minimum number of other large scalars in a companion's column. With fewer, the companion gets no verdict."""


class _Bar(NamedTuple):
    """The largest rise or fall of the loss predicted for zeroing one more large scalar of a column.

    Both fields are logarithms of perplexity ratios. `alone` is the effect of zeroing the scalar alone. `joint` is the
    effect of zeroing it together with candidates, minus the effects of zeroing the scalar and the candidates apart.
    """

    alone: float
    joint: float


_NO_BAR = _Bar(-math.inf, -math.inf)

_NULL_TEXTS = NullTexts[Coordinate](
    "random scalars of similar magnitude change perplexity too",
    "random scalars have larger effects once the candidates are zeroed",
    str,
)


@dataclass(frozen=True)
class EffectBars:
    """The bars for all tested scalars: logarithms of the perplexity ratios that a clear effect exceeds.

    `floor` is the bar for the effect of a scalar. `joint_floor` is the bar for the effect of a group beyond the sum of
    the effects of its parts. `of_minor` contains additional bars for minor scalars. `unjudged` contains the companions
    that get no verdict, because their columns contain too few large scalars to compute a bar.
    """

    floor: float
    joint_floor: float
    of_minor: dict[Coordinate, _Bar]
    unjudged: set[Coordinate]

    def alone(self, name: Coordinate) -> float:
        return max(self.floor, self.of_minor.get(name, _NO_BAR).alone)

    def joint(self, group: Iterable[Coordinate]) -> float:
        return max([self.joint_floor, *(self.of_minor.get(name, _NO_BAR).joint for name in group)])


def set_bars(losses: Losses[Coordinate], suspects: Suspects, say: Say) -> EffectBars:
    """Set the bars of all tested scalars from the measured losses. `say` receives a line if null scalars raise one."""
    floor, joint_floor = compute_floors(losses, suspects.together, suspects.null, suspects.crowded, _NULL_TEXTS, say)
    bars = {
        column: _set_column_bar(losses, suspects.together, suspects.lead(column), rows)
        for column, rows in suspects.columns.items()
        if len(rows) >= LEAST_ROWS
    }
    companions = [c for c in suspects.tested if c.coordinate not in suspects.together]
    return EffectBars(
        floor,
        joint_floor,
        of_minor={
            c.coordinate: bars.get(get_column(c), _NO_BAR) for c in suspects.tested if c.coordinate in suspects.minor
        },
        unjudged={c.coordinate for c in companions if get_column(c) not in bars},
    )


def _set_column_bar(losses: Losses[Coordinate], together: Zeroed, lead: Coordinate, rows: Sequence[Coordinate]) -> _Bar:
    alone = [losses.gain(frozenset({row})).log for row in rows]
    joint = [
        [losses.gain(group | {row}, [group, frozenset({row})]).log for row in rows]
        for group in (together, frozenset({lead}))
    ]
    # A value that is not finite means that the model without the candidates has infinite losses, so it shows nothing.
    finite = [gains for gains in joint if all(map(math.isfinite, gains))]
    return _Bar(compute_prediction_bound(alone), max(map(compute_prediction_bound, finite), default=math.inf))
