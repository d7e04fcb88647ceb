"""Test causally which parts that create an activation matter: zero them, and measure perplexity.

Each part is zeroed alone, and with all other parts. For comparison, random parts of the same kind and layer are zeroed
alone: other rows of the same matrix, other neurons, other experts, other channels. The bars, intervals and verdicts are
those of the causal test of scalars (confirm.py).

A row is a row of a down projection, a neuron its column, so that nothing else of the neuron is changed. Of an expert,
the down projection and its bias are zeroed. Of the attention or another mixer, the row of the channel in the output
projection is zeroed, with its bias. Of the embedding, the channel is zeroed for all tokens and positions: the text of
the test contains other tokens than the prompts, and a row of a matrix is zeroed for all inputs too.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from swsurgery.checkpoint.channels import count_channels
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.projections import find_down_projection, list_down_projections
from swsurgery.errors import Unrunnable
from swsurgery.model.forward import LayeredModel
from swsurgery.scanning.causal_report import Families
from swsurgery.scanning.causal_test import (
    DEFAULT_OPTIONS,
    CausalOptions,
    NullTexts,
    Say,
    Windows,
    compute_floors,
    list_conditions,
    refuse_untestable,
    report_too_few_windows,
)
from swsurgery.scanning.clear_effects import choose_verdict, find_clear, find_unclear, report_unclear
from swsurgery.scanning.losses import Losses
from swsurgery.scanning.part_report import ModelPart, PartConfirmation, PartKind, PartName, PartTrial
from swsurgery.scanning.parts import locate_part

_NULL_TEXTS = NullTexts[PartName](
    "random parts of the same kind change perplexity too",
    "without the parts, random parts have larger effects",
    str,
)


def choose_testable(model: LayeredModel, parts: Sequence[ModelPart], say: Say) -> list[ModelPart]:
    """Choose the parts whose scalars are in the loaded model. `say` receives a line about every other part."""
    chosen: list[ModelPart] = []
    for part in parts:
        try:
            model.places.find([dict.fromkeys(locate_part(model.checkpoint, part.name), 0.0)])
        except Unrunnable as error:
            say(f"not tested: {part.name} ({error.faults[0]})")
        else:
            chosen.append(part)
    return chosen


def count_tests(parts: Sequence[ModelPart]) -> Families:
    """Count the effects that `confirm_parts` tests."""
    return Families(len(parts), len(parts) if len(parts) > 1 else 0)


def confirm_parts(
    model: LayeredModel,
    parts: Sequence[ModelPart],
    windows: Windows,
    options: CausalOptions = DEFAULT_OPTIONS,
) -> PartConfirmation:
    """Test `parts` on windows of token ids. The model runs on each window separately.

    A part is "needed alone" if its effect is clearly above 1.05 and above the usual effects of up to
    `options.nulls` random parts of its kind and layer. It is "needed jointly" if zeroing it together with all
    other parts clearly adds more than zeroing it alone. With fewer than eight windows every verdict is "untested".

    Raises ModelError as `confirm_experts` does.
    """
    refuse_untestable(parts, windows)
    checkpoint, names = model.checkpoint, [part.name for part in parts]
    drawn = _draw_nulls(checkpoint, names, options.nulls, options.seed)
    losses = Losses[PartName](model, windows, lambda name: name.layer or 0, lambda name: locate_part(checkpoint, name))
    together, every = frozenset(names), [name for group in drawn.values() for name in group]
    groups = [frozenset({name}) for name in (*names, *every)]
    losses.measure([*groups, together, *(together - {name} for name in names)], options.progress)
    say = report_too_few_windows(losses, options.say)
    floors = {key: compute_floors(losses, together, group, (), _NULL_TEXTS, say)[0] for key, group in drawn.items()}
    bars = {name: floors[name.kind, name.layer] for name in names}
    others = options.others
    single = {name: (frozenset({name}), ()) for name in names}
    alone = find_clear(losses, single, bars.__getitem__, others.alone)
    added = {name: (together, (together - {name}, frozenset({name}))) for name in names} if len(names) > 1 else {}
    jointly = find_clear(losses, added, bars.__getitem__, others.jointly)
    unclear = find_unclear(losses, single, bars.__getitem__, alone | jointly)
    report_unclear([str(name) for name in names if name in unclear], say)
    return PartConfirmation(
        trials=tuple(
            PartTrial(
                part,
                alone=losses.effect(frozenset({part.name})),
                without=losses.effect(together - {part.name}) if len(names) > 1 else None,
                verdict=choose_verdict(part.name, alone, jointly, unclear),
            )
            for part in parts
        ),
        together=losses.effect(together),
        joint_sets=(),
        null=tuple(losses.effect(frozenset({name})).ratio for name in every),
        **list_conditions(losses, Families(len(names) + others.alone, len(added) + others.jointly)),
        part_nulls=tuple(
            (*key, tuple(losses.effect(frozenset({name})).ratio for name in group)) for key, group in drawn.items()
        ),
    )


def _draw_nulls(
    checkpoint: Checkpoint, names: Sequence[PartName], nulls: int, seed: int
) -> dict[tuple[PartKind, int | None], list[PartName]]:
    """Draw up to `nulls` random parts for each kind and layer of `names`, none of which is in `names`."""
    dice = random.Random(seed)
    found: dict[tuple[PartKind, int | None], list[PartName]] = {}
    for name in names:
        if (name.kind, name.layer) in found:
            continue
        others: list[PartName]
        if name.kind == "expert":
            projections = list_down_projections(checkpoint.config, checkpoint.shapes)
            experts = [p.expert for p in projections if p.layer == name.layer and isinstance(p.expert, int)]
            others = [name._replace(expert=expert) for expert in experts]
        else:
            size = _count_alike(checkpoint, name)
            numbers = dice.sample(range(size), min(size, nulls + len(names)))
            others = [name._replace(number=number) for number in numbers]
        others = [other for other in others if other not in names]
        dice.shuffle(others)
        found[name.kind, name.layer] = others[:nulls]
    return found


def _count_alike(checkpoint: Checkpoint, name: PartName) -> int:
    """Count the rows, neurons or channels from which the parts for comparison are drawn."""
    if name.layer is None or name.kind == "attention":
        return count_channels(checkpoint.config, checkpoint.shapes)
    projection = find_down_projection(checkpoint.config, checkpoint.shapes, name.layer, name.expert)
    return projection.rows if name.kind == "row" else projection.cols
