"""List the MLP matrices of a checkpoint that a scan did not read, from the stored names and shapes alone.

A scan reads only the down projections whose names projections.py knows. Some models store other MLPs under other names
(LongCat-Flash has experts with known names, and two dense MLPs in each layer without). If the scan of such a model
finds nothing, a super weight may still exist. This module lists the matrices that were not read. It reads no file and
must not import torch or transformers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping

from swsurgery.checkpoint.architectures import Shapes
from swsurgery.checkpoint.model_config import read_layer_limit
from swsurgery.checkpoint.projections import DownProjection
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
    "adapter",
    "_hc",
    "hc_",
)
"""Substrings of the names of modules that are not MLPs. These modules mix tokens or residual streams (`ffn_hc`),
normalise, or embed."""

_MLPS = ("mlp", "ffn", "feed_forward", "feedforward", "expert", "moe")
"""Substrings of the names of MLPs. If an MLP of a layer was read, other matrices of the layer are listed only if a part
of their name contains one of these substrings."""

_MIXER = re.compile(r"mixer\.([qkvo]|in|out|x|dt)_proj\.weight")
"""Matches matrices of attention and Mamba in models that name every block "mixer" (Nemotron-H, Mamba 2)."""

_AFTER_BLOCK = "linear.weight"
"""The matrix through which Zamba passes the output of its shared block."""

_ROUTERS = re.compile(r"(gate|wg|\w*router\w*|\w*expert_gates?)", re.IGNORECASE)
_LAYER = re.compile(r"(?P<layer>0|[1-9][0-9]{0,8})\.(?P<rest>.+)", re.DOTALL)
_EXPERT = re.compile(r"(?<=experts\.)(0|[1-9][0-9]{0,8})(?=\.)")


def list_stored_layers(
    config: Mapping[str, object], shapes: Shapes, projections: Collection[DownProjection]
) -> set[int]:
    """List the numbers of all layers, with or without an MLP, in the stacks of layers that contain the projections."""
    return {layer for _, layer, _ in _list_tensors(config, shapes, projections)}


def list_unread_layers(
    config: Mapping[str, object], shapes: Shapes, projections: Collection[DownProjection]
) -> tuple[UnreadLayer, ...]:
    """List the layers with matrices that may belong to an MLP, but not to an MLP of `projections`.

    In a layer without a known down projection, every matrix may belong to an MLP, except matrices of attention, norms
    and other modules in `_MIXERS`, and of routers. A layer without any such matrix has no MLP and is not listed.
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
    """Yield (name, layer, rest of the name) for every tensor in the stacks of layers that contain the projections.

    For "model.layers.3.mlp.up_proj.weight", the rest of the name is "mlp.up_proj.weight".
    """
    limit = read_layer_limit(config)
    trunks = {format_layer_name(projection).removesuffix(str(projection.layer)) for projection in projections}
    for name in shapes:
        for trunk in trunks:
            match = _LAYER.fullmatch(name[len(trunk) :]) if name.startswith(trunk) else None
            # Layers with numbers from num_hidden_layers on predict further tokens and are not part of the model.
            if match and (limit is None or int(match["layer"]) < limit):
                yield name, int(match["layer"]), match["rest"]


def format_layer_name(projection: DownProjection) -> str:
    """Return the name of the layer that contains a down projection, such as "model.layers.3"."""
    steps = projection.tensor.split(".")
    return ".".join(steps[: steps.index(str(projection.layer)) + 1])


def _name_module(tensor: str) -> str:
    """Return the name of the module that contains a tensor's linear layer or stacked experts: "model.layers.3.mlp"."""
    return tensor.removesuffix(".weight").removesuffix(".base_layer").rpartition(".")[0]


def _may_be_mlp(rest: str, shape: tuple[int, ...], any_name: bool) -> bool:
    *modules, last = rest.removesuffix(".weight").split(".")
    if rest == _AFTER_BLOCK or _MIXER.fullmatch(rest):
        return False
    if len(shape) < 2 or 0 in shape or last.endswith("bias") or _ROUTERS.fullmatch(last):
        return False
    if any(_ROUTERS.fullmatch(module) or any(word in module for word in _MIXERS) for module in (*modules, last)):
        return False
    return any_name or any(word in module for word in _MLPS for module in (*modules, last))
