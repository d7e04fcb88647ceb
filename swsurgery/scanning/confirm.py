"""Test causally which candidates of a scan matter: zero them and measure the model's perplexity.

Each candidate is zeroed alone and in pairs. All candidates are zeroed together, and all candidates but one. For
comparison, null scalars are zeroed: random scalars of the same matrices with similar magnitudes. All of these variants
of the model run at once, or in several runs if memory requires it.

Companions are tested too. A companion is an outlier in a candidate's column of the down projection that no detector
lists. Llama-2-7B's best known super weight has little effect when it is zeroed without its companion (docs/known.md).
If the input of a column is very large, any large scalar of the column may change the loss. A companion is therefore
compared with the other large scalars of its column.

A bar is the effect that a scalar must exceed to count as critical.

    suspects.py       chooses the companions and the null scalars
    losses.py         measures the losses, with intervals of model/intervals.py
    bars.py           sets the bars
    clear_effects.py  finds the effects that are clear
    causal_test.py    what the causal test of experts does in the same way
    this module       decides the verdicts

This module does not search for candidates and prints nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from swsurgery.model.forward import LayeredModel
from swsurgery.scanning.bars import LEAST_ROWS, EffectBars, set_bars
from swsurgery.scanning.causal_report import Families
from swsurgery.scanning.causal_test import (
    DEFAULT_OPTIONS,
    INERT,
    CausalOptions,
    Say,
    Windows,
    list_conditions,
    refuse_untestable,
    report_too_few_windows,
)
from swsurgery.scanning.clear_effects import (
    Contrast,
    choose_verdict,
    find_clear,
    find_jointly,
    find_unclear,
    report_unclear,
)
from swsurgery.scanning.doses import choose_doses, report_doses
from swsurgery.scanning.losses import Losses, compute_exp
from swsurgery.scanning.report import Candidate, ColumnNull, Confirmation, JointSet, Trial
from swsurgery.scanning.suspects import (
    Column,
    Suspects,
    Zeroed,
    choose_suspects,
    get_column,
)
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.numbers import format_number


def confirm_scalars(
    model: LayeredModel,
    candidates: Sequence[Candidate],
    windows: Windows,
    options: CausalOptions = DEFAULT_OPTIONS,
) -> Confirmation:
    """Test `candidates` on windows of token ids. The model runs on each window separately.

    The effect of zeroing some scalars is the model's perplexity without them divided by its perplexity with them. The
    95% interval of an effect is computed from the mean losses of whole windows (`intervals.py`). If there are fewer
    than eight windows, no interval is computed and every verdict is "untested".

    The effect of zeroing a scalar is the perplexity without it divided by the perplexity with it. The effect is clear
    if the low end of its interval is above 1.05 and above the usual effects of null scalars. Null scalars are
    `options.nulls` random scalars of the candidates' matrices, outside the columns of all tested scalars, zeroed one at
    a time. They are drawn from the scalars within 10% of a candidate's magnitude. If there are too few, the scalars
    with the nearest magnitudes are added.

    A scalar is "needed alone" if its effect is clear. Any other scalar is "needed jointly" if it is in a joint set,
    or if zeroing it together with all other candidates clearly adds more than zeroing it alone. To set the bar for this
    addition, some null scalars are zeroed together with all candidates.

    A joint set is a group of scalars whose effect is clearly larger than the product of the effects of its parts. The
    parts are smaller joint sets and single scalars. Three kinds of groups are tested: pairs of candidates, pairs within
    a column, and the group of all scalars that add to the effect of all candidates.

    A companion is tested alone, in pairs, and together with all candidates. Its effect must also exceed the effect
    predicted for one more large scalar of its column (`model/intervals.py`). The prediction allows for scalars that
    raise the loss and scalars that lower it. A companion is "untested" if its column contains fewer than three other
    large scalars.

    A candidate with the role "removes" makes an activation small again. It is zeroed alone only, beside the same null
    scalars, and its verdict is "needed alone", "inert" or "untested".

    `options.say` receives a line for the user if the text is too short, if null scalars raise a bar, if a companion
    gets no verdict, if zeroing a companion lowers the loss, or if a null scalar is critical.

    The same inputs on the same machine give the same result. Raises ModelError if no candidate or no window is given,
    if a window has fewer than two tokens, if a candidate is not a scalar of the checkpoint's down projections, if the
    elements of such a projection are not weights, or if the losses of the stored model are not finite.
    """
    refuse_untestable(candidates, windows)
    suspects = choose_suspects(model.checkpoint, candidates, options.nulls, options.seed)
    every = [*suspects.tested, *suspects.removers]
    layers = {candidate.coordinate.tensor: candidate.layer for candidate in every}
    losses = Losses[Coordinate](
        model,
        windows,
        lambda name: layers[name.tensor],
        lambda name: (name,),
        # Zeroing a scalar that is zero has no effect at all, so such scalars are left out of every set.
        frozenset(candidate.coordinate for candidate in every if candidate.value == 0),
        suspects.list_errors(),
    )
    doses = choose_doses(model.checkpoint, suspects.together) if losses.enough and suspects.together else {}
    losses.measure(suspects.groups(), options.progress, doses)
    say = report_too_few_windows(losses, options.say)
    bars = set_bars(losses, suspects, say)
    judged = [name for name in suspects.names if name not in bars.unjudged]
    single = [*judged, *(candidate.coordinate for candidate in suspects.removers)]
    others = options.others
    effects = {name: (frozenset({name}), ()) for name in single}
    alone = find_clear(losses, effects, bars.alone, others.alone)
    pairs = [pair for pair in suspects.pairs if not pair & bars.unjudged]
    added = _list_added(suspects.together, judged)
    jointly = find_jointly(losses, added, pairs, bars.joint, others.jointly, options.progress)
    joint = jointly.joint_sets
    _report_companions(losses, suspects, bars, say)
    unclear = find_unclear(losses, effects, bars.alone, alone | jointly.units)
    report_unclear([str(name) for name in single if name in unclear], say)
    judge = _Judge(losses, alone, jointly.units, unclear | bars.unjudged)
    together = suspects.together
    return Confirmation(
        trials=tuple(judge.try_out(candidate, together) for candidate in every),
        together=losses.effect(together),
        joint_sets=tuple(
            JointSet(tuple(sorted(group, key=suspects.names.index)), losses.effect(group)) for group in joint
        ),
        null=tuple(losses.effect(frozenset({scalar})).ratio for scalar in suspects.null),
        **list_conditions(losses, Families(len(single) + others.alone, jointly.tests + others.jointly)),
        column_nulls=tuple(_measure_column_null(losses, together, *item) for item in suspects.columns.items()),
        doses=report_doses(losses, together, doses),
    )


# Verdicts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Judge:
    """Decides the verdict of each scalar from the measured losses and the bars.

    `alone` contains the scalars whose effect alone is clear. `jointly` contains the scalars that matter together with
    others. `unjudged` contains the scalars on which the measurement allows no verdict.
    """

    losses: Losses[Coordinate]
    alone: Zeroed
    jointly: Zeroed
    unjudged: Zeroed

    def try_out(self, candidate: Candidate, together: Zeroed) -> Trial:
        """Make the report of the test of one scalar. `together` contains all candidates that a detector lists."""
        name, removes = candidate.coordinate, candidate.role == "removes"
        others = frozenset[Coordinate]() if removes else together - {name}
        return Trial(
            candidate,
            alone=self.losses.effect(frozenset({name})),
            without=self.losses.effect(others) if others else None,
            verdict=choose_verdict(name, self.alone, self.jointly, self.unjudged),
            listed=removes or name in together,
        )


def _list_added(together: Zeroed, judged: Sequence[Coordinate]) -> dict[Coordinate, Contrast[Coordinate]]:
    """List what zeroing each scalar adds to zeroing all other candidates, beyond its effect alone."""
    contrasts = ((n, (together | {n}, (together - {n}, frozenset({n})))) for n in judged if together - {n})
    return dict(contrasts)


def _measure_column_null(
    losses: Losses[Coordinate], together: Zeroed, column: Column, rows: Sequence[Coordinate]
) -> ColumnNull:
    return ColumnNull(
        *column,
        alone=tuple(losses.effect(frozenset({row})).ratio for row in rows),
        added=tuple(compute_exp(losses.gain(together | {row}, [together]).log) for row in rows),
    )


def _report_companions(losses: Losses[Coordinate], suspects: Suspects, bars: EffectBars, say: Say) -> None:
    """Tell the user which companions get no verdict, and which companions lower the loss when they are zeroed."""
    together = suspects.together
    for candidate in suspects.tested:
        name, rows = candidate.coordinate, suspects.columns.get(get_column(candidate), ())
        if name in bars.unjudged:
            lead = suspects.lead(get_column(candidate))
            both = compute_exp(losses.gain(frozenset({lead, name})).log)
            say(
                f"untested companion: {name} (other large rows in its column: {len(rows)}, at least {LEAST_ROWS} are "
                f"needed for comparison; perplexity is x{format_number(both, 3)} without it and {lead})"
            )
        elif name in bars.of_minor and name not in together:
            added = losses.gain(together | {name}, [together])
            if added.high < -max(math.log(INERT), bars.of_minor[name].joint):
                ratio = f"x{format_number(compute_exp(added.log), 3)}"
                say(f"companion that helps: {name} (zeroed on top of all candidates, perplexity is {ratio})")
