"""Test causally which rows, neurons and experts that create an activation matter: zero them, and measure perplexity.

Each part is zeroed alone, and with all other parts. For comparison, random parts of the same kind and layer are zeroed
alone: other rows of the same matrix, other neurons, other experts. The bars, intervals and verdicts are those of the
causal test of scalars (confirm.py).

A row is a row of a down projection, a neuron its column, so that nothing else of the neuron is changed. Of an expert,
the down projection and its bias are zeroed.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.projections import find_down_projection, list_down_projections
from swsurgery.checkpoint.structures import locate_column, locate_row
from swsurgery.model.forward import LayeredModel
from swsurgery.scanning.activation_report import PersistentActivation
from swsurgery.scanning.causal_report import Verdict
from swsurgery.scanning.causal_test import (
    DEFAULT_OPTIONS,
    CausalOptions,
    NullTexts,
    Windows,
    compute_floors,
    find_clear,
    list_conditions,
    refuse_untestable,
    report_too_few_windows,
)
from swsurgery.scanning.confirm_experts import list_output_regions
from swsurgery.scanning.losses import Losses
from swsurgery.scanning.part_report import MlpPart, PartConfirmation, PartKind, PartName, PartTrial
from swsurgery.storage.region import Region

MAX_PARTS = 12
"""Maximum number of parts that are tested: those of the layers that add the largest values."""

_NULL_TEXTS = NullTexts[PartName](
    "random parts of the same kind change perplexity too",
    "without the parts, random parts have larger effects",
    str,
)


def list_parts(activations: Sequence[PersistentActivation]) -> list[MlpPart]:
    """List the rows, neurons and experts that create activations, those with the largest values first.

    Side effects do not count.
    """
    found: dict[PartName, list[tuple[int, float]]] = defaultdict(list)
    for one in activations:
        for cause in one.causes if not one.side else ():
            names: list[PartName] = []
            if cause.kind == "row":
                names = [PartName("row", cause.layer, None, cause.row)]
            elif cause.kind == "neuron":
                names = [PartName("neuron", cause.layer, cause.expert, cause.cols[0])]
            elif cause.kind == "expert":
                names = [PartName("expert", cause.layer, share.expert, None) for share in cause.experts]
            for name in names:
                found[name].append((one.channel, cause.added))
    parts = [
        MlpPart(name, tuple(sorted({channel for channel, _ in made})), max((added for _, added in made), key=abs))
        for name, made in found.items()
    ]
    return sorted(parts, key=lambda part: -abs(part.added))[:MAX_PARTS]


def confirm_parts(
    model: LayeredModel,
    parts: Sequence[MlpPart],
    windows: Windows,
    options: CausalOptions = DEFAULT_OPTIONS,
) -> PartConfirmation:
    """Test `parts` on windows of token ids. The model runs on each window separately.

    A part is "needed alone" if its effect is clearly above 1.05 and above the usual effects of up to
    `options.nulls` random parts of its kind and layer. It is "needed jointly" if zeroing it together with all
    other parts clearly adds more than zeroing it alone. With fewer than eight windows every verdict is "untested".

    Raises ModelError as `confirm_expert_windows` does.
    """
    refuse_untestable(parts, windows)
    checkpoint, names = model.checkpoint, [part.name for part in parts]
    drawn = _draw_nulls(checkpoint, names, options.nulls, options.seed)
    losses = Losses[PartName](model, windows, lambda name: name.layer, lambda name: _locate(checkpoint, name))
    together, every = frozenset(names), [name for group in drawn.values() for name in group]
    groups = [frozenset({name}) for name in (*names, *every)]
    losses.measure([*groups, together, *(together - {name} for name in names)], options.progress)
    say = report_too_few_windows(losses, options.say)
    floors = {key: compute_floors(losses, together, group, (), _NULL_TEXTS, say)[0] for key, group in drawn.items()}
    bars = {name: floors[name.kind, name.layer] for name in names}
    alone = find_clear(losses, {name: (frozenset({name}), ()) for name in names}, bars.__getitem__)
    added = {name: (together, (together - {name}, frozenset({name}))) for name in names} if len(names) > 1 else {}
    jointly = find_clear(losses, added, bars.__getitem__)

    def decide(name: PartName) -> Verdict:
        if not losses.enough:
            return "untested"
        return "needed alone" if name in alone else "needed jointly" if name in jointly else "inert"

    return PartConfirmation(
        trials=tuple(
            PartTrial(
                part,
                alone=losses.effect(frozenset({part.name})),
                without=losses.effect(together - {part.name}) if len(names) > 1 else None,
                verdict=decide(part.name),
            )
            for part in parts
        ),
        together=losses.effect(together),
        joint_sets=(),
        null=tuple(losses.effect(frozenset({name})).ratio for name in every),
        **list_conditions(losses),
        part_nulls=tuple(
            (*key, tuple(losses.effect(frozenset({name})).ratio for name in group)) for key, group in drawn.items()
        ),
    )


def _locate(checkpoint: Checkpoint, name: PartName) -> tuple[Region, ...]:
    """List the regions that are zeroed for a part."""
    config, shapes = checkpoint.config, checkpoint.shapes
    if name.kind == "expert" and name.expert is not None:
        return list_output_regions(checkpoint, (name.layer, name.expert))
    locate = locate_row if name.kind == "row" else locate_column
    return (locate(config, shapes, name.layer, name.number or 0, name.expert),)


def _draw_nulls(
    checkpoint: Checkpoint, names: Sequence[PartName], nulls: int, seed: int
) -> dict[tuple[PartKind, int], list[PartName]]:
    """Draw up to `options.nulls` random parts for each kind and layer of `names`, none of which is in `names`."""
    dice = random.Random(seed)
    found: dict[tuple[PartKind, int], list[PartName]] = {}
    for name in names:
        if (name.kind, name.layer) in found:
            continue
        others: list[PartName]
        if name.kind == "expert":
            projections = list_down_projections(checkpoint.config, checkpoint.shapes)
            experts = [p.expert for p in projections if p.layer == name.layer and isinstance(p.expert, int)]
            others = [name._replace(expert=expert) for expert in experts]
        else:
            projection = find_down_projection(checkpoint.config, checkpoint.shapes, name.layer, name.expert)
            size = projection.rows if name.kind == "row" else projection.cols
            others = [
                name._replace(number=number) for number in dice.sample(range(size), min(size, nulls + len(names)))
            ]
        others = [other for other in others if other not in names]
        dice.shuffle(others)
        found[name.kind, name.layer] = others[:nulls]
    return found
