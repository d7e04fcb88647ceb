"""Choose the factors by which all candidates of a scan are multiplied at once, and report their effects."""

from __future__ import annotations

from collections.abc import Iterable

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.errors import NumberError
from swsurgery.model.variant import Scalars
from swsurgery.scanning.causal_report import Effect
from swsurgery.scanning.factors import compute_scaled_values
from swsurgery.scanning.losses import Losses
from swsurgery.scanning.report import Dose
from swsurgery.scanning.suspects import Zeroed
from swsurgery.storage.coordinate import Coordinate

DOSES = (0.25, 0.5, 0.75)
"""Factors that are measured. The effects of 0 (zeroing) and 1 (the stored model) are known without a further run."""


def choose_doses(checkpoint: Checkpoint, together: Zeroed) -> dict[float, Scalars]:
    """Return for each factor of DOSES the scaled values of the scalars, rounded to the stored dtype as by `op: scale`.

    Returns {} if the dtype cannot represent a product.
    """
    try:
        scaled = compute_scaled_values(checkpoint, sorted(together), DOSES)
    except NumberError:
        return {}
    made: dict[float, Scalars] = {}
    for factor, values in zip(DOSES, scaled, strict=True):
        made[factor] = {coordinate: value for coordinate, value in values.items()}
    return made


def report_doses(losses: Losses[Coordinate], together: Zeroed, factors: Iterable[float]) -> tuple[Dose, ...]:
    """Return the effects of `factors`, which were measured, and of the factors 0 and 1; () if there are no factors."""
    measured = [Dose(factor, losses.get_dose_effect(factor)) for factor in factors]
    if not measured:
        return ()
    return (Dose(0.0, losses.effect(together)), *measured, Dose(1.0, Effect(1.0, 1.0, 1.0, 0.0)))
