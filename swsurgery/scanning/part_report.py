"""Define the results of the causal test of rows, neurons and experts that create a persistent activation.

All results are frozen. This module must not import torch, and it reads no files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from swsurgery.checkpoint.architectures import ExpertChoice
from swsurgery.scanning.causal_report import CausalTest, UnitSet, UnitTrial, convert_to_plain

PartKind = Literal["row", "neuron", "expert"]


class PartName(NamedTuple):
    """Identifies a row or a column of a down projection, or an expert.

    `number` is the row, or the neuron whose column it is. It is None for an expert.
    """

    kind: PartKind
    layer: int
    expert: ExpertChoice
    number: int | None

    def __str__(self) -> str:
        expert = "" if self.expert is None else f" expert {self.expert}"
        return f"layer {self.layer}{expert}" + ("" if self.number is None else f" {self.kind} {self.number}")


@dataclass(frozen=True)
class MlpPart:
    """A part of an MLP that creates persistent activations in `channels`.

    `added` is the largest value that its layer adds to one of them.
    """

    name: PartName
    channels: tuple[int, ...]
    added: float

    @property
    def unit(self) -> PartName:
        return self.name

    def to_json(self) -> dict[str, Any]:
        return {**self.name._asdict(), "channels": list(self.channels), "added": convert_to_plain(self.added)}


@dataclass(frozen=True)
class PartTrial(UnitTrial[MlpPart]):
    """The causal test of one part."""


@dataclass(frozen=True)
class PartConfirmation(CausalTest[PartTrial, UnitSet]):
    """The causal test of parts.

    `null` contains the effects of zeroing random parts of the same kinds and layers. `part_nulls` contains the same
    effects by kind and layer.
    """

    part_nulls: tuple[tuple[PartKind, int, tuple[float, ...]], ...] = ()

    def list_further_nulls(self) -> dict[str, Any]:
        entries = [
            {"kind": kind, "layer": layer, "ratios": convert_to_plain(ratios)}
            for kind, layer, ratios in self.part_nulls
        ]
        return {"part_nulls": entries}
