"""Describe what variants change in a part of the model, so that equal parts are computed once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from swsurgery.model.other_tensors import OtherTensors
from swsurgery.model.places import Places
from swsurgery.model.variant import Variant


def describe_changes(
    variants: Sequence[Variant], where: int | None, others: OtherTensors, places: Places
) -> list[Hashable]:
    """Describe what each variant changes in layer `where` (None: in the modules outside the layers).

    Variants with equal descriptions compute the same function of the layer's input.
    """
    return [
        (
            variant.rounding if where is not None else None,
            index if others.has(index, where) else None,
            places.list_scalars_in(variant.scalars, where),
            places.list_scalars_in(dict.fromkeys(variant.held, 0.0), where),
        )
        for index, variant in enumerate(variants)
    ]
