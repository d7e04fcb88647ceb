"""Define the schema of published results around super weights that do not name a scalar of a listed model.

Must not depend on files or on lookup.
"""

from __future__ import annotations

from swsurgery.known.schema import Count, StrictValue


class SuperExperts(StrictValue):
    """Experts whose removal breaks a mixture-of-experts model. For most of them no scalar is published."""

    hf_id: str
    also: tuple[str, ...] = ()
    experts: tuple[str, ...]
    effects: tuple[str, ...]
    cite: str
    note: str | None = None


class SinkNeurons(StrictValue):
    """Columns of a down projection that cause attention sinks. The relevant rows are not published."""

    model: str
    layer: Count
    columns: tuple[Count, ...]
    cite: str


class KnownRow(StrictValue):
    """One row of a down projection whose zeroing was measured, in a model that is not listed with its sizes.

    `effect` is the relative change of the model's own loss if the whole row is zeroed.
    """

    model: str
    layer: Count
    row: Count
    effect: str
    cite: str


class WrongValue(StrictValue):
    """A number in circulation that is wrong: where it was published, what it claims, and what is true."""

    where: str
    claim: str
    truth: str


class NegativeResult(StrictValue):
    """Models in which a search or a test found nothing."""

    hf_ids: tuple[str, ...]
    finding: str
    cite: str


class Related(StrictValue):
    """Published results about super weights that name no scalar."""

    super_experts: tuple[SuperExperts, ...]
    sink_neurons: tuple[SinkNeurons, ...]
    rows: tuple[KnownRow, ...]
    wrong_values: tuple[WrongValue, ...]
    negative_results: tuple[NegativeResult, ...]
    open_questions: tuple[str, ...]
