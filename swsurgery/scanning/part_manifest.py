"""List the edits of a manifest for the rows, neurons and experts that the causal test found needed.

This module measures nothing and writes no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from swsurgery.manifest.writer import Operation
from swsurgery.scanning.part_report import PartName, PartTrial
from swsurgery.scanning.report import Candidate, Scan
from swsurgery.storage.numbers import format_number, format_ratio

Edits = list[tuple[str, dict[str, object]]]
"""The edits of a manifest: the comment and the fields of each."""


def choose_parts(report: Scan) -> list[PartTrial]:
    """Choose the needed parts of a scan that have no scalar in common with a super weight or an earlier part.

    A manifest must not name a scalar twice. The parts are in the order of the report, the largest values first.
    """
    chosen: list[PartTrial] = []
    for trial in report.needed_parts:
        name = trial.candidate.name
        if _contains_none(name, report.super_weights) and _crosses_none(name, [t.candidate.name for t in chosen]):
            chosen.append(trial)
    return chosen


def list_part_edits(trials: Sequence[PartTrial], op: Operation, factor: float | None) -> Edits:
    """List the edits that apply `op` to parts. The edit of a neuron names its column, as the causal test does."""
    return [(_describe(trial), _list_fields(trial.candidate.name, op, factor)) for trial in trials]


def _contains_none(name: PartName, scalars: Iterable[Candidate]) -> bool:
    """Return True if no scalar is in the part."""
    places = {"row": "row", "neuron": "col"}
    return not any(
        (scalar.layer, scalar.expert) == (name.layer, name.expert)
        and (name.kind == "expert" or getattr(scalar, places[name.kind]) == name.number)
        for scalar in scalars
    )


def _crosses_none(name: PartName, others: Iterable[PartName]) -> bool:
    """Return True if the part has no scalar in common with another one. A row crosses each column of its matrix."""
    return not any((name.layer, name.expert) == (o.layer, o.expert) and name.kind != o.kind for o in others)


def _list_fields(name: PartName, op: Operation, factor: float | None) -> dict[str, object]:
    fields: dict[str, object] = {"op": op, "layer": name.layer, "expert": name.expert}
    fields |= {"row" if name.kind == "row" else "col": name.number, "factor": factor}
    return {key: value for key, value in fields.items() if value is not None}


def _describe(trial: PartTrial) -> str:
    """Describe a part in the comment above its edit."""
    part, ratio = trial.candidate, format_ratio(trial.alone.ratio)
    channels = ", ".join(map(str, part.channels[:6])) + (", ..." if len(part.channels) > 6 else "")
    where = f"channel{'s' if len(part.channels) > 1 else ''} {channels}"
    return f"{part.name}: adds {format_number(part.added)} to {where}; {trial.verdict}, perplexity x{ratio} without it"
