"""List the edits of a manifest for the parts of a model that create its activations.

This module measures nothing and writes no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from swsurgery.manifest.writer import Operation
from swsurgery.scanning.part_report import ModelPart, PartName, PartTrial
from swsurgery.scanning.report import Candidate, Scan
from swsurgery.storage.numbers import format_number, format_ratio
from swsurgery.storage.region import Region

Edits = list[tuple[str, dict[str, object]]]
"""The edits of a manifest: the comment and the fields of each."""


def choose_parts(report: Scan) -> list[ModelPart]:
    """Choose the found parts of a scan that have no scalar in common with a super weight or an earlier part.

    A manifest must not name a scalar twice. The parts are in the order of the report, the largest values first.
    """
    chosen: list[ModelPart] = []
    for part in report.found_parts:
        if _contains_none(part.name, report.super_weights) and _crosses_none(part.name, [one.name for one in chosen]):
            chosen.append(part)
    return chosen


def list_part_edits(
    parts: Sequence[ModelPart], trials: Mapping[PartName, PartTrial], op: Operation, factor: float | None
) -> Edits:
    """List the edits that apply `op` to parts. The edit of a neuron names its column, as the causal test does.

    A channel of attention or of the embedding needs one edit for each of its regions.
    """
    return [
        (_describe(part, trials.get(part.name)), fields) for part in parts for fields in _list_fields(part, op, factor)
    ]


def _contains_none(name: PartName, scalars: Iterable[Candidate]) -> bool:
    """Return True if no scalar is in the part."""
    return not any(
        (scalar.layer, scalar.expert) == (name.layer, name.expert)
        and (name.kind == "expert" or name.number == {"row": scalar.row, "neuron": scalar.col}.get(name.kind))
        for scalar in scalars
    )


def _crosses_none(name: PartName, others: Iterable[PartName]) -> bool:
    """Return True if the part has no scalar in common with another one. A row crosses each column of its matrix."""
    in_mlp = ("row", "neuron", "expert")
    return name.kind not in in_mlp or not any(
        (name.layer, name.expert) == (o.layer, o.expert) and name.kind != o.kind and o.kind in in_mlp for o in others
    )


def _list_fields(part: ModelPart, op: Operation, factor: float | None) -> list[dict[str, object]]:
    """Return the fields of each edit of a part."""
    name, targets = part.name, list[dict[str, object]]()
    if name.kind in ("attention", "embedding"):
        targets = [{"tensor": region.tensor, "slice": _format_slice(region)} for region in part.regions]
    else:
        places = {"layer": name.layer, "expert": name.expert, "row" if name.kind == "row" else "col": name.number}
        targets = [{key: value for key, value in places.items() if value is not None}]
    return [{"op": op, **target, **({} if factor is None else {"factor": factor})} for target in targets]


def _format_slice(region: Region) -> str:
    """Return a region as the text of a slice, such as "3, 0:4096"."""
    return str(region).removeprefix(region.tensor).strip("[]")


def _describe(part: ModelPart, trial: PartTrial | None) -> str:
    """Describe a part in the comment above its edit."""
    channels = ", ".join(map(str, part.channels[:6])) + (", ..." if len(part.channels) > 6 else "")
    what = f"{part.name}: adds {format_number(part.added)} to {'channels' if len(part.channels) > 1 else 'channel'}"
    if trial is None or trial.verdict == "untested":
        return f"{what} {channels}; not confirmed"
    return f"{what} {channels}; {trial.verdict}, perplexity x{format_ratio(trial.alone.ratio)} without it"
