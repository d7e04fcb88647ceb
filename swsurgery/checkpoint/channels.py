"""Find the stored regions by which the mixer of a layer and the embedding write to one channel of the residual stream.

A mixer is the part of a layer that moves information between tokens: its attention, convolution or state space. It ends
in an output projection, such as `self_attn.o_proj`. A layer with attention beside a state space has two. This module
must not read files or import torch or transformers: it takes config.json as a mapping, and the name and shape of each
tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from swsurgery.checkpoint.architectures import Shapes
from swsurgery.checkpoint.projections import DownProjection, has_residual_rows, list_down_projections
from swsurgery.checkpoint.sizes import TOKEN_EMBEDDING
from swsurgery.errors import ArchitectureError
from swsurgery.storage.region import Region

_MIXERS = """
self_attn.o_proj self_attn.out_proj self_attn.dense self_attention.dense attn.c_proj attn.out_proj attn.o_proj
attention.out_proj attention.o_proj attention.dense attention.wo attn.dense linear_attn.out_proj linear_attn.o_proj
attn.Wo conv.out_proj mamba.out_proj mixer.out_proj mixer.o_proj temporal_block.linear_out temporal_block.o_proj
"""
MIXERS = frozenset(_MIXERS.split())
"""The last two parts of the names of the modules that are output projections of mixers. Numbers are left out, as in
LongCat-Flash, which has self_attn.0 and self_attn.1 in each layer."""

SHARED_BLOCKS = frozenset({"shared_transf", "shared_transformer"})
"""Names of the blocks that several layers of Zamba share. Only a Mamba mixer reads what they compute, so the attention
in them does not write to the residual stream."""

_CONV1D = "c_proj"
"""Name of the output projection that GPT-2 stores transposed. Other families with this name store it as usual."""

_POSITIONS = re.compile(r"(?:.*\.)?(?:wpe|embed_positions|position_embeddings)\.weight", re.DOTALL)
"""Names of tables of learned positions. The residual stream begins with the sum of a token's and a position's row."""


def locate_mixer_row(config: Mapping[str, Any], shapes: Shapes, layer: int, channel: int) -> tuple[Region, ...]:
    """Find the regions by which the mixer of a layer writes to one channel: a row of each output projection.

    If a projection has a bias, one element of it is a region too. If all regions are zero, the mixer adds nothing to
    the channel, whatever its input is. Raises ArchitectureError if no output projection with a known name is stored, or
    if its shape does not fit.
    """
    reference = _find_reference(config, shapes)
    before, _, after = reference.tensor.partition(f".{reference.layer}.")
    prefix = f"{before}.{layer}."
    transposed = reference.transposed and re.search(rf"\b{_CONV1D}\b", after) is not None
    regions: list[Region] = []
    for name in sorted(shapes):
        parts = [part for part in name.removeprefix(prefix).split(".")[:-1] if not part.isdigit()]
        if not name.startswith(prefix) or not name.endswith(".weight") or ".".join(parts[-2:]) not in MIXERS:
            continue
        if SHARED_BLOCKS.intersection(parts):
            continue
        axis = 1 if transposed and parts[-1] == _CONV1D else 0
        regions.append(_cut(name, shapes, axis, channel, reference.rows))
        bias = name.removesuffix("weight") + "bias"
        regions += [_cut(bias, shapes, 0, channel, reference.rows)] if bias in shapes else []
    if not regions:
        raise ArchitectureError("no output projection of a known name is stored beside the MLP", f"{prefix}*")
    return tuple(regions)


def locate_embedding_channel(config: Mapping[str, Any], shapes: Shapes, channel: int) -> tuple[Region, ...]:
    """Find one channel of the embedding: a column of the table of tokens, and one of the table of positions.

    Raises ArchitectureError if none or several tables of tokens are stored, or if a shape does not fit.
    """
    width = _find_reference(config, shapes).rows
    tables = [name for name in shapes if TOKEN_EMBEDDING.fullmatch(name)]
    if len(tables) != 1:
        raise ArchitectureError(f"{len(tables) or 'no'} token embeddings of known names are stored")
    positions = sorted(name for name in shapes if _POSITIONS.fullmatch(name))
    return tuple(_cut(name, shapes, 1, channel, width) for name in (*tables, *positions))


def count_channels(config: Mapping[str, Any], shapes: Shapes) -> int:
    """Return the number of channels of the residual stream. Raises ArchitectureError if no down projection is known."""
    return _find_reference(config, shapes).rows


def _find_reference(config: Mapping[str, Any], shapes: Shapes) -> DownProjection:
    """Return a down projection that writes to the residual stream."""
    projections = list(list_down_projections(config, shapes))
    return next((one for one in projections if has_residual_rows(config, one)), projections[0])


def _cut(name: str, shapes: Shapes, axis: int, channel: int, channels: int) -> Region:
    """Return the part of a tensor that belongs to one channel, if the axis has one index for each channel."""
    shape = tuple(shapes[name])
    if axis >= len(shape) or shape[axis] != channels or not 0 <= channel < channels:
        raise ArchitectureError(f"axis {axis} does not have {channels} channels", f"{name} {list(shape)}")
    return Region(name, tuple((channel, channel + 1) if at == axis else (0, n) for at, n in enumerate(shape)))
