"""List the parts of a model that create the persistent activations of a scan, and find their stored scalars.

A part is a row or a column of a down projection, an expert, or one channel of what the attention of a layer or the
embedding writes to the residual stream. This module runs no model, reads no file, and must not import torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from swsurgery.checkpoint.channels import locate_embedding_channel, locate_mixer_row
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.projections import find_down_projection
from swsurgery.checkpoint.structures import locate_column, locate_expert, locate_row
from swsurgery.errors import ArchitectureError, pluralise
from swsurgery.scanning.activation_report import Cause, PersistentActivation
from swsurgery.scanning.expert_report import ExpertName
from swsurgery.scanning.part_report import ModelPart, PartName
from swsurgery.storage.region import Region

MAX_PARTS = 12
"""Maximum number of parts that are listed: those that add the largest values."""


def list_parts(
    checkpoint: Checkpoint, activations: Sequence[PersistentActivation]
) -> tuple[list[ModelPart], list[str]]:
    """List the parts that create activations, the largest first, and the reasons why other causes cannot be zeroed.

    Side effects do not count, and neither do single scalars, which are candidates of the scan. The second list contains
    a line for each cause without a part.
    """
    found: dict[PartName, list[tuple[int, float]]] = defaultdict(list)
    missing: dict[str, None] = {}
    for one in activations:
        for cause in _list_causes(one):
            for name in _name_parts(cause, one.channel):
                found[name].append((one.channel, cause.added))
            if why := _UNTESTABLE.get(cause.kind):
                missing[f"channel {one.channel} from layer {cause.layer} on ({why})"] = None
    parts: list[ModelPart] = []
    for name, made in found.items():
        channels = tuple(sorted({channel for channel, _ in made}))
        try:
            regions = locate_part(checkpoint, name)
        except ArchitectureError as error:
            missing[f"{name} ({error.faults[0]})"] = None
            continue
        refusals = (checkpoint.quantisation.explain_refusal(region.tensor) for region in regions)
        if why := next(filter(None, refusals), None):
            missing[f"{name} ({why})"] = None
        else:
            parts.append(ModelPart(name, channels, max((added for _, added in made), key=abs), regions))
    parts.sort(key=lambda part: -abs(part.added))
    if len(parts) > MAX_PARTS:
        missing[f"{pluralise(len(parts) - MAX_PARTS, 'part')} that add less than the {MAX_PARTS} largest"] = None
    return parts[:MAX_PARTS], [f"not tested: {line}" for line in missing]


_UNTESTABLE = {
    "MLP": "the stored weights do not explain what the MLP adds",
    "layer": "its MLP was not observed, so it cannot be told from the attention",
    "several layers": "no layer adds a large share, so there is no single part to zero",
}
"""The reason why a cause of each of these kinds names no part."""


def _list_causes(one: PersistentActivation) -> Iterator[Cause]:
    """Yield the causes of an activation, in each layer and at each appearance. A side effect has none."""
    if not one.side:
        yield from one.causes
        yield from (time.made_by for time in one.appearances if time.made_by and time.made_by not in one.causes)


def _name_parts(cause: Cause, channel: int) -> list[PartName]:
    """Name the parts of a cause."""
    if cause.kind == "row":
        return [PartName("row", cause.layer, None, cause.row)]
    if cause.kind == "neuron":
        return [PartName("neuron", cause.layer, cause.expert, cause.cols[0])]
    if cause.kind == "expert":
        return [PartName("expert", cause.layer, share.expert, None) for share in cause.experts]
    if cause.kind == "attention":
        return [PartName("attention", cause.layer, None, channel)]
    return [PartName("embedding", None, None, channel)] if cause.kind == "embedding" else []


def locate_part(checkpoint: Checkpoint, name: PartName) -> tuple[Region, ...]:
    """Find the stored scalars of a part. Raises ArchitectureError if they have no known names."""
    config, shapes, number = checkpoint.config, checkpoint.shapes, name.number or 0
    if name.layer is None:
        return locate_embedding_channel(config, shapes, number)
    if name.kind == "attention":
        return locate_mixer_row(config, shapes, name.layer, number)
    if name.kind == "expert" and name.expert is not None:
        return list_output_regions(checkpoint, (name.layer, name.expert))
    locate = locate_row if name.kind == "row" else locate_column
    return (locate(config, shapes, name.layer, number, name.expert),)


def list_output_regions(checkpoint: Checkpoint, name: ExpertName) -> tuple[Region, ...]:
    """List the regions of an expert that make its output zero: its down projection, and its bias if it has one."""
    down = find_down_projection(checkpoint.config, checkpoint.shapes, *name).tensor
    regions = locate_expert(checkpoint.config, checkpoint.shapes, *name)
    return regions[[region.tensor for region in regions].index(down) :]
