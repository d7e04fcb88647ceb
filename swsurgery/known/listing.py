"""List the known models: how many super weights of each are known, and where they come from.

Must not depend on checkpoints or the network.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from swsurgery.known import own
from swsurgery.known.schema import STATUSES, KnownModel, select_by_status, select_entries
from swsurgery.known.table import describe_max_activation, explain_overflow
from swsurgery.storage.result import TableResult


@dataclass(frozen=True, repr=False)
class KnownModels(TableResult):
    """All known models. If `statuses` is not None, only super weights with one of them are counted."""

    models: tuple[KnownModel, ...]
    statuses: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the document that `lookup --json` prints without the name of a model."""
        rows = zip(self.models, self.to_rows(), strict=True)
        return {"models": [row | {"statuses": count_statuses(m, self.statuses)} for m, row in rows]}

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row per model: its name and repository, and the numbers of its super weights.

        `status` is the first status in the order of STATUSES that a coordinate, an expert or a column of the model has,
        and None if it has none of these. `max_activation` is the largest activation that was published. `fits_float16`
        is False if float16 cannot represent it; both are None if no activation was published.
        """
        return [self._make_row(model) for model in self.models]

    def _make_row(self, model: KnownModel) -> dict[str, object]:
        found, counts = model.max_activation, count_statuses(model, self.statuses)
        return {
            "name": model.slug,
            "model": model.hf_id,
            "own": model.own,
            **{kind: sum(counts[kind].values()) for kind in counts},
            "status": next((status for status in STATUSES if any(status in each for each in counts.values())), None),
            "max_activation": found and found.value,
            "fits_float16": found and found.fits_float16,
        }

    def render_cells(self) -> list[tuple[str, str, str, str]]:
        """Return the cells of the table for a terminal: name, number of coordinates, statuses, maximum activation."""
        return [self._render_row(model) for model in self.models]

    def _render_row(self, model: KnownModel) -> tuple[str, str, str, str]:
        counts = count_statuses(model, self.statuses)
        parts = [_format_counts(counts["coordinates"])]
        parts += [f"{kind}: {_format_counts(counts[kind])}" for kind in ("experts", "columns") if counts[kind]]
        activation = describe_max_activation(model.max_activation) if model.max_activation else "-"
        overflow = " > float16" if explain_overflow(model) else ""
        number = str(sum(counts["coordinates"].values()))
        return model.slug, number, "; ".join(filter(None, parts)) or "-", activation.partition(";")[0] + overflow


def list_models(statuses: Sequence[str] | None = None) -> KnownModels:
    """List the known models, the user's own included.

    With `statuses`, only models that have a super weight with one of them are listed. Raises LookupFailed for an
    unknown status.
    """
    models = own.list_all_models()
    if statuses is not None:
        models = tuple(model for model in models if any(count_statuses(model, statuses).values()))
    return KnownModels(models, None if statuses is None else tuple(statuses))


def count_statuses(model: KnownModel, statuses: Collection[str] | None = None) -> dict[str, dict[str, int]]:
    """Count the super weights of each status, in the order of STATUSES: of coordinates, of experts and of columns."""
    return {
        "coordinates": _count([each.status for each in select_by_status(model, statuses)]),
        "experts": _count([each.status for each in select_entries(model.experts, statuses)]),
        "columns": _count([each.status for each in select_entries(model.columns, statuses)]),
    }


def _count(found: Sequence[str]) -> dict[str, int]:
    return {status: found.count(status) for status in STATUSES if status in found}


def _format_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{status} {count}" for status, count in counts.items())
