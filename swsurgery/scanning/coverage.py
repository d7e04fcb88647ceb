"""List the MLP matrices of a checkpoint that a scan did not read, from the stored names and shapes alone.

A scan reads the down projections that projections.py knows. If a family stores only some of its MLPs under such names
(Jamba: the dense layers, not the experts), a scan that finds nothing does not prove that nothing exists. This module
lists the remaining matrices. It reads no file and must not import torch or transformers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping

from swsurgery.checkpoint.architectures import Shapes
from swsurgery.checkpoint.projections import DownProjection, read_layer_limit
from swsurgery.scanning.report import UnreadLayer

_MIXERS = (
    "attn",
    "attention",
    "mamba",
    "conv",
    "ssm",
    "rnn",
    "norm",
    "rotary",
    "embed",
    "temporal_block",
    "lora_",
    "_hc",
)
"""Substrings of the names of modules that are not MLPs: those that mix tokens or residual streams (`ffn_hc`), normalise
or embed."""

_MLPS = ("mlp", "ffn", "feed_forward", "feedforward", "expert", "moe")
"""Substrings of the names of MLPs. If one MLP of a layer was read, only other matrices with such names are listed."""

_ROUTERS = re.compile(r"(gate|wg|\w*router\w*|\w*expert_gates?)", re.IGNORECASE)
_LAYER = re.compile(r"(?P<layer>0|[1-9][0-9]{0,8})\.(?P<rest>.+)", re.DOTALL)
_EXPERT = re.compile(r"(?<=experts\.)(0|[1-9][0-9]{0,8})(?=\.)")


def list_stored_layers(
    config: Mapping[str, object], shapes: Shapes, projections: Collection[DownProjection]
) -> set[int]:
    """Find the numbers of all layers, with or without an MLP, in the stacks that contain the projections."""
    return {layer for _, layer, _ in _list_tensors(config, shapes, projections)}


def list_unread_layers(
    config: Mapping[str, object], shapes: Shapes, projections: Collection[DownProjection]
) -> tuple[UnreadLayer, ...]:
    """List the layers with matrices that may belong to an MLP and that are not in the MLP of any of the projections.

    In a layer without a known down projection, these are all matrices except those of attention, norms and the like. A
    layer without such matrices has no MLP and is not listed.
    """
    known = {projection.layer for projection in projections}
    modules = {_name_module(projection.tensor) for projection in projections}
    tensors: dict[int, set[str]] = defaultdict(set)
    experts: dict[int, set[int]] = defaultdict(set)
    for name, layer, rest in _list_tensors(config, shapes, projections):
        if _name_module(name) in modules or not _may_be_mlp(rest, shapes[name], any_name=layer not in known):
            continue
        number = _EXPERT.search(rest)
        if number:
            experts[layer].add(int(number[0]))
        elif len(shapes[name]) == 3 and "expert" in rest:
            experts[layer].update(range(shapes[name][0]))
        tensors[layer].add(name.removesuffix(rest) + _EXPERT.sub("*", rest))
    return tuple(
        UnreadLayer(layer, tuple(sorted(experts[layer])), tuple(sorted(tensors[layer]))) for layer in sorted(tensors)
    )


def _list_tensors(
    config: Mapping[str, object], shapes: Shapes, projections: Collection[DownProjection]
) -> Iterator[tuple[str, int, str]]:
    """Yield (name, layer, rest of the name) of every tensor in the stacks of layers that contain the projections."""
    limit = read_layer_limit(config)
    trunks = {format_layer_name(projection).removesuffix(str(projection.layer)) for projection in projections}
    for name in shapes:
        for trunk in trunks:
            match = _LAYER.fullmatch(name[len(trunk) :]) if name.startswith(trunk) else None
            # Layers beyond num_hidden_layers predict further tokens and are not part of the model.
            if match and (limit is None or int(match["layer"]) < limit):
                yield name, int(match["layer"]), match["rest"]


def format_layer_name(projection: DownProjection) -> str:
    """Return the name of the layer that contains a down projection, such as model.layers.3."""
    steps = projection.tensor.split(".")
    return ".".join(steps[: steps.index(str(projection.layer)) + 1])


def _name_module(tensor: str) -> str:
    """Return the name of the module that contains a linear layer or stacked experts, such as model.layers.3.mlp."""
    return tensor.removesuffix(".weight").rpartition(".")[0]


def _may_be_mlp(rest: str, shape: tuple[int, ...], any_name: bool) -> bool:
    *modules, last = rest.removesuffix(".weight").split(".")
    if len(shape) < 2 or 0 in shape or last.endswith("bias") or _ROUTERS.fullmatch(last):
        return False
    if any(_ROUTERS.fullmatch(module) or any(word in module for word in _MIXERS) for module in (*modules, last)):
        return False
    return any_name or any(word in module for word in _MLPS for module in (*modules, last))
