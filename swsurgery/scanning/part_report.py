"""Define the parts of a model that create a persistent activation, and the results of their causal test.

A part is a row or a column of a down projection, an expert, or what the attention or the embedding writes to a channel.

All results are frozen. This module must not import torch, and it reads no files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from swsurgery.checkpoint.architectures import ExpertChoice
from swsurgery.checkpoint.part_words import name_part
from swsurgery.scanning.causal_report import CausalTest, UnitSet, UnitTrial, convert_to_plain
from swsurgery.storage.region import Region

PartKind = Literal["row", "neuron", "expert", "attention", "embedding"]
"""The kinds of parts. "row" and "neuron" are a row and a column of a down projection. "attention" stands for one
channel of the output of a layer's attention, convolution or other mixer, and "embedding" for one channel of the
embedding."""


class PartName(NamedTuple):
    """Identifies a part of a model.

    `number` is the number of the row, the neuron or the channel. It is None for an expert. `layer` is None for
    the embedding.
    """

    kind: PartKind
    layer: int | None
    expert: ExpertChoice
    number: int | None

    def __str__(self) -> str:
        return name_part(*self)


@dataclass(frozen=True)
class ModelPart:
    """A part of a model that creates persistent activations in `channels`.

    `added` is the largest value that it adds to one of them. `regions` contains the stored scalars that are zeroed in
    the causal test.
    """

    name: PartName
    channels: tuple[int, ...]
    added: float
    regions: tuple[Region, ...] = ()

    @property
    def unit(self) -> PartName:
        return self.name

    def to_json(self) -> dict[str, Any]:
        return {
            **self.name._asdict(),
            "channels": list(self.channels),
            "added": convert_to_plain(self.added),
            "regions": list(map(str, self.regions)),
        }


@dataclass(frozen=True)
class PartTrial(UnitTrial[ModelPart]):
    """The causal test of one part."""


@dataclass(frozen=True)
class PartConfirmation(CausalTest[PartTrial, UnitSet]):
    """The causal test of parts.

    `null` contains the effects of zeroing random parts of the same kinds and layers. `part_nulls` contains the same
    effects by kind and layer.
    """

    part_nulls: tuple[tuple[PartKind, int | None, tuple[float, ...]], ...] = ()

    def list_further_nulls(self) -> dict[str, Any]:
        entries = [
            {"kind": kind, "layer": layer, "ratios": convert_to_plain(ratios)}
            for kind, layer, ratios in self.part_nulls
        ]
        return {"part_nulls": entries}
