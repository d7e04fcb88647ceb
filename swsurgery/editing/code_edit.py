"""Describe edits of single elements of quantised matrices: which code each element has before and after the edit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from swsurgery.editing.asked import Asked, Misfit
from swsurgery.editing.conflicts import find_conflicts
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.ggml import BlockDtype
from swsurgery.storage.shard import TensorInfo
from swsurgery.storage.splice import Scalar, Splice


@dataclass(frozen=True, slots=True)
class CodeEdit:
    """One element of a quantised matrix that edit number `number` (from 0) of the manifest changes.

    `coordinate` is the element's name and index in the weight that the codes encode. `wanted` is the value that the
    edit asks for, as float64. `old` and `new` are the values of the codes `old_code` and `new_code` under the stored
    scale. `elements` are the stored numbers that contain the bits of the code.
    """

    number: int
    op: str
    factor: float | None
    coordinate: Coordinate
    layout: str
    wanted: float
    old: float
    new: float
    old_code: int
    new_code: int
    elements: tuple[Coordinate, ...]

    @property
    def error(self) -> float:
        """The rounding error |new - wanted|."""
        return abs(self.new - self.wanted)

    def to_json(self) -> dict[str, Any]:
        """Convert the edit to a JSON object, in the form of the record."""
        return {
            "edit": self.number,
            "op": self.op,
            "factor": self.factor,
            "weight": self.coordinate.tensor,
            "index": list(self.coordinate.index),
            "layout": self.layout,
            "wanted": self.wanted,
            "old": self.old,
            "new": self.new,
            "old_code": self.old_code,
            "new_code": self.new_code,
            "elements": [{"tensor": tensor, "index": list(index)} for tensor, index in self.elements],
        }


def name_stored(place: Coordinate, infos: Mapping[str, TensorInfo]) -> str:
    """Name a stored number in a message, such as "byte [0, 5] of blk.1.ffn_down.weight" in a tensor of blocks."""
    info = infos.get(place.tensor)
    if info is not None and isinstance(info.dtype, BlockDtype):
        return f"byte {list(place.index)} of {place.tensor}"
    return str(place)


@dataclass
class PlannedCodes:
    """The edits of quantised elements, and the stored numbers that change.

    If several edits change bits of one stored number, the number has one splice. `protected` are the stored numbers
    that hold the codes of protected elements. Each splice and scalar has the number of the first edit that names it.
    `misfits` are the edits that do not fit the checkpoint.
    """

    edits: list[CodeEdit] = field(default_factory=list)
    splices: list[tuple[int, Splice]] = field(default_factory=list)
    protected: list[tuple[int, Scalar]] = field(default_factory=list)
    misfits: list[Misfit] = field(default_factory=list)

    def protect(self, number: int, scalars: Iterable[Scalar]) -> None:
        """Add stored numbers that edit `number` protects, except those that an earlier edit protects."""
        known = {scalar.coordinate for _, scalar in self.protected}
        self.protected += [(number, scalar) for scalar in scalars if scalar.coordinate not in known]

    def list_misfits(self, others: Sequence[tuple[Asked, Scalar]], infos: Mapping[str, TensorInfo]) -> list[Misfit]:
        """List the misfits, and the conflicts of these edits with each other and with `others`.

        `infos` are the headers of the stored tensors. `others` are the edits of the stored numbers themselves. If one
        of them changes a tensor of a quantised layer, no element of this layer can be edited, because its value may
        depend on the changed number.
        """
        found = [*self.misfits, *find_conflicts((edit.number, edit.coordinate) for edit in self.edits)]
        kept = {scalar.coordinate: number for number, scalar in self.protected}
        kept |= {scalar.coordinate: one.number for one, scalar in others if not one.edit.writes}
        for number, splice in self.splices:
            if splice.coordinate in kept:
                why = f"{name_stored(splice.coordinate, infos)} also holds bits that another edit protects"
                found.append(Misfit(number, why, kept[splice.coordinate]))
        layers = {edit.coordinate.tensor.removesuffix(".weight"): edit.number for edit in self.edits}
        for one, _ in others:
            for layer, number in layers.items():
                if one.edit.writes and one.coordinate.tensor.startswith((f"{layer}.", f"{layer}_")):
                    what = f"another edit changes {one.coordinate.tensor}, which this edit's value depends on"
                    found.append(Misfit(number, what, one.number))
        return found
