"""Test causally which super experts of a scan matter: zero them and measure the model's perplexity.

Each expert is zeroed alone and in pairs. All are zeroed together, and all but one. For comparison, random experts of
the same layers are zeroed alone, and as many of them together as there are candidates (arXiv:2507.23279, table 3, calls
this random pruning). The bars, intervals and verdicts are those of the causal test of scalars (confirm.py).

Only the down projection of an expert and its bias are zeroed. The output is then exactly zero, as if all of the
expert's matrices were zeroed. The router still chooses the expert.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import NamedTuple

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.projections import list_down_projections
from swsurgery.model.forward import LayeredModel
from swsurgery.scanning.causal_report import Families
from swsurgery.scanning.causal_test import (
    CONTEXT_NULLS,
    DEFAULT_OPTIONS,
    PAIRS,
    CausalOptions,
    NullTexts,
    Windows,
    compute_floors,
    list_conditions,
    refuse_untestable,
    report_too_few_windows,
)
from swsurgery.scanning.clear_effects import choose_verdict, find_clear, find_jointly, find_unclear, report_unclear
from swsurgery.scanning.expert_report import (
    ExpertCandidate,
    ExpertConfirmation,
    ExpertJointSet,
    ExpertName,
    ExpertTrial,
)
from swsurgery.scanning.losses import Losses
from swsurgery.scanning.parts import list_output_regions

JOINT_NULLS = 5
"""Number of random sets of experts that are zeroed together (arXiv:2507.23279, table 3, uses as many)."""

_NULL_TEXTS = NullTexts[ExpertName](
    "random experts change perplexity too",
    "without the candidates, random experts have larger effects",
    lambda name: f"layer {name[0]} expert {name[1]}",
)

Group = frozenset[ExpertName]
"""A set of experts that are zeroed together. The empty set stands for the model as stored."""


def confirm_experts(
    model: LayeredModel,
    candidates: Sequence[ExpertCandidate],
    windows: Windows,
    options: CausalOptions = DEFAULT_OPTIONS,
) -> ExpertConfirmation:
    """Test `candidates` on windows of token ids. The model runs on each window separately.

    The effect of zeroing an expert is the perplexity without it divided by the perplexity with it. Its 95% interval is
    computed from whole windows. The effect is clear if the low end is above 1.05 and above the usual effects of
    `options.nulls` random routed experts of the same layers.

    An expert is "needed alone" if its effect is clear. Any other expert is "needed jointly" if it is in a joint
    set, or if zeroing it together with all other candidates clearly adds more than zeroing it alone. With fewer than
    eight windows, no interval is computed and every verdict is "untested".

    `options.say` receives a line for the user if the text is too short, if random experts raise a bar, or if a random
    expert is critical. Raises ModelError if no candidate or no window is given, if a window has fewer than two tokens,
    or if the losses of the stored model are not finite.
    """
    refuse_untestable(candidates, windows)
    names = [candidate.name for candidate in candidates]
    plan = _plan(model.checkpoint, names, options.nulls, options.seed)
    regions = {name: list_output_regions(model.checkpoint, name) for name in plan.list_experts()}
    losses = Losses[ExpertName](model, windows, lambda name: name[0], regions.__getitem__)
    losses.measure(plan.list_groups(), options.progress)
    say = report_too_few_windows(losses, options.say)
    floor, joint_floor = compute_floors(losses, plan.together, plan.null, plan.crowded, _NULL_TEXTS, say)
    together = plan.together
    others = options.others
    single = {name: (frozenset({name}), ()) for name in names}
    alone = find_clear(losses, single, lambda name: floor, others.alone)
    added = {name: (together, (together - {name}, frozenset({name}))) for name in names} if len(names) > 1 else {}
    jointly = find_jointly(losses, added, plan.pairs, lambda group: joint_floor, others.jointly, options.progress)
    unclear = find_unclear(losses, single, lambda name: floor, alone | jointly.units)
    report_unclear([_NULL_TEXTS.describe(name) for name in names if name in unclear], say)
    trials = [
        ExpertTrial(
            candidate,
            alone=losses.effect(frozenset({candidate.name})),
            without=losses.effect(together - {candidate.name}) if len(names) > 1 else None,
            verdict=choose_verdict(candidate.name, alone, jointly.units, unclear),
        )
        for candidate in candidates
    ]
    return ExpertConfirmation(
        trials=tuple(trials),
        together=losses.effect(together),
        joint_sets=tuple(
            ExpertJointSet(tuple(sorted(group, key=names.index)), losses.effect(group)) for group in jointly.joint_sets
        ),
        null=tuple(losses.effect(frozenset({name})).ratio for name in plan.null),
        joint_null=tuple(losses.effect(group).ratio for group in plan.joint_null),
        **list_conditions(losses, Families(len(names) + others.alone, jointly.tests + others.jointly)),
    )


class _Plan(NamedTuple):
    """The experts that are zeroed in the first run.

    `null` contains random experts of the candidates' layers. `crowded` contains those that are also zeroed together
    with all candidates. Each set of `joint_null` has as many random experts in each layer as the candidates.
    """

    together: Group
    pairs: list[Group]
    null: list[ExpertName]
    crowded: list[ExpertName]
    joint_null: list[Group]

    def list_groups(self) -> Iterable[Group]:
        singles = [frozenset({name}) for name in (*self.together, *self.null)]
        others = [self.together - {name} for name in self.together]
        crowded = [self.together | {name} for name in self.crowded]
        return [*singles, self.together, *others, *self.pairs, *crowded, *self.joint_null]

    def list_experts(self) -> Iterable[ExpertName]:
        return {*self.together, *self.null, *(name for group in self.joint_null for name in group)}


def _plan(checkpoint: Checkpoint, names: Sequence[ExpertName], nulls: int, seed: int) -> _Plan:
    dice = random.Random(seed)
    others: dict[int, list[ExpertName]] = {layer: [] for layer, _ in names}
    for projection in list_down_projections(checkpoint.config, checkpoint.shapes):
        name = projection.layer, projection.expert
        if projection.layer in others and isinstance(name[1], int) and name not in names:
            others[projection.layer].append((projection.layer, name[1]))
    for group in others.values():
        dice.shuffle(group)
    # One expert of each layer after the other, so that every layer contributes equally many as long as it has some.
    longest = max(map(len, others.values()))
    null = [group[number] for number in range(longest) for group in others.values() if number < len(group)][:nulls]
    counts = {layer: sum(name[0] == layer for name in names) for layer in others}
    joint_null: list[Group] = []
    if len(names) > 1 and all(len(others[layer]) >= count for layer, count in counts.items()):
        for _ in range(JOINT_NULLS):
            draw = frozenset(name for layer, n in counts.items() for name in dice.sample(others[layer], n))
            joint_null += [] if draw in joint_null else [draw]
    pairs = [frozenset(pair) for pair in combinations(names, 2)][:PAIRS]
    crowded = null[:CONTEXT_NULLS] if len(names) > 1 else []
    return _Plan(frozenset(names), pairs, null, crowded, joint_null)
