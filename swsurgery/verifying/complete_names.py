"""Sort the names of a checkpoint's tensors into lists of layers, layers, modules and experts.

A quantised matrix counts as one tensor with the name that it would have without quantisation, so that a layer that was
not quantised has the same tensors as its peers. This module reports no faults: complete_layers.py compares the layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.damage import Survey
from swsurgery.checkpoint.projections import name_prefixes

Shape = tuple[int, ...]

_LAYER = re.compile(r"(?:^|(?<=\.))(?:layers|layer|h|blocks|block|resblocks|blk)\.(\d{1,5})\.", re.ASCII)
"""The pattern of the first number of a layer in a name."""

_EXPERT = re.compile(r"(?<=experts\.)(\d{1,5})(?=\.)", re.ASCII)

_OTHER_TOWERS = re.compile(
    r"vision|visual|image|img|audio|speech|(^|[._])(vit|clip|mm|mtp|sam)[._]|projector|resampler|qformer|eagle|talker"
    r"|code2wav|token2wav|depth_decoder|connector|aligner|speaker|generation_(head|embeddings|aligner)"
    r"|(^|\.)(perception|ctc_timestamp)\."
)
"""The pattern of prefixes of modules that are no part of the language model."""

_CODES = re.compile(
    r"qweight|weight_packed|W_q|q_weight|trellis|Qidxs|_weight_qdata|dense_weights|codes|indices|weight[.:](qdata|_data)"
)
"""The pattern of the ends of names of tensors that store a matrix instead of `weight`."""

SCALE_PARTS = re.compile(r"(weight_)?scales?(_inv|_2)?|SCB|qzeros|absmax|weight_zero_point|weight_global_scale")
"""The pattern of last parts of names of tensors without which the codes of the same module have no value."""


@dataclass(frozen=True, slots=True)
class Member:
    """One tensor of a layer.

    `name` is the stored name. `pattern` is the part of the name after the number of the layer, with "*" for the number
    of the expert, such as "mlp.experts.*.up_proj.weight". `shape` is None if it is unknown, or if a quantiser
    stores the matrix in another shape. `coded` is True if the tensor stores the codes of a quantiser.
    """

    name: str
    layer: int
    pattern: str
    expert: int | None
    shape: Shape | None
    coded: bool


@dataclass
class LayerList:
    """One list of layers. `prefix` is the part of the names before the number, such as "model.layers.".

    `layers` maps each number to the members of the layer by pattern. `scales` maps (layer, expert, module) to the rest
    of the names of the scales beside the codes of the module, such as "weight_scale" or "weight.absmax".
    """

    prefix: str
    layers: dict[int, dict[str, list[Member]]] = field(default_factory=dict)
    scales: dict[tuple[int, int | None, str], set[str]] = field(default_factory=dict)

    def count(self) -> int:
        """Return the number of tensors in the layers."""
        return sum(len(members) for layer in self.layers.values() for members in layer.values())


@dataclass(frozen=True)
class Sorted:
    """All tensors of a checkpoint: the lists of layers by prefix, and the shapes of the tensors outside of them."""

    lists: dict[str, LayerList]
    outside: dict[str, Shape | None]


def sort_names(survey: Survey) -> Sorted:
    """Sort all tensors that are stored, or that the index puts in a shard whose header could not be read."""
    found = Sorted({}, {})
    for name, (clean, shape, coded) in _list_tensors(survey).items():
        match = _LAYER.search(name)
        if match is None:
            if clean is not None:
                found.outside[clean] = shape
            continue
        prefix = name[: match.start(1)]
        if (target := found.lists.get(prefix)) is None:
            target = found.lists[prefix] = LayerList(prefix)
        _add(target, name, clean, int(match[1]), match.end(), shape, coded)
    return found


def _add(
    target: LayerList, name: str, clean: str | None, layer: int, start: int, shape: Shape | None, coded: bool
) -> None:
    """Add one tensor to a list of layers. `start` is the position after the number of the layer."""
    rest = (name if clean is None else clean)[start:]
    expert = _EXPERT.search(rest)
    number = int(expert[1]) if expert else None
    pattern = f"{rest[: expert.start()]}*{rest[expert.end() :]}" if expert else rest
    if clean is None:
        module, _, last = pattern.rpartition(".")
        if SCALE_PARTS.fullmatch(last):
            matrix = module.removesuffix(".weight")
            target.scales.setdefault((layer, number, matrix), set()).add(pattern[len(matrix) + 1 :])
        return
    members = target.layers.setdefault(layer, {}).setdefault(pattern, [])
    members.append(Member(name, layer, pattern, number, shape, coded))


_Tensor = tuple[str | None, Shape | None, bool]
"""What one tensor is: its name without quantisation, or None for a scale or other tensor of a quantiser; its shape, or
None if it is unknown or the shape of codes; and True if it stores codes."""


def _list_tensors(survey: Survey) -> dict[str, _Tensor]:
    """Return what each tensor is, by its stored name."""
    checkpoint = survey.checkpoint
    tensors: dict[str, _Tensor] = {}
    quantised = survey.gguf is None and is_quantised(checkpoint)  # GGUF files keep names and shapes
    for name, shape in checkpoint.all_shapes.items():
        tensors[name] = _read_quantised(name, shape, checkpoint) if quantised else (name, shape, False)
    for name in survey.unseen:
        is_scale = quantised and SCALE_PARTS.fullmatch(name.rpartition(".")[2])
        tensors.setdefault(name, (None if is_scale else _rename_codes(name) or name, None, False))
    return tensors


def is_quantised(checkpoint: Checkpoint) -> bool:
    """Return True if the checkpoint declares quantisation or stores integers or floats of 8 bits."""
    if checkpoint.quantisation.declared is not None:
        return True
    dtypes = {info.dtype for shard in checkpoint.shards.values() for info in shard.tensors.values()}
    return any(dtype.kind in ("int", "uint") or dtype.bits <= 8 for dtype in dtypes)


def _read_quantised(name: str, shape: Shape, checkpoint: Checkpoint) -> _Tensor:
    """Return what a tensor of a quantised checkpoint is."""
    reading = checkpoint.quantisation.get_reading(name)
    if reading.kind == "plain":
        return name, shape, False
    renamed = _rename_codes(name)
    if reading.kind == "internal":
        return renamed, None, renamed is not None
    return renamed or name, None, True


def _rename_codes(name: str) -> str | None:
    """Return the name of a matrix without quantisation from the name of its codes; None for any other tensor."""
    if name.endswith("_blocks"):
        return name.removesuffix("_blocks")
    module, _, last = name.rpartition(".")
    if _CODES.fullmatch(last):
        return f"{module}.weight"
    inner, _, first = module.rpartition(".")
    return (
        f"{inner}.weight" if _CODES.fullmatch(f"{first}.{last}") or last in ("weight:qdata", "weight:_data") else None
    )


def find_main_lists(found: Sorted, depths: Mapping[str, int], config: Mapping[str, object]) -> dict[str, LayerList]:
    """Find the layers of the language model: for each key of `depths`, the list of layers whose number it states."""
    lists = [each for each in found.lists.values() if not is_other_tower(each.prefix)]
    chosen: dict[str, LayerList] = {}
    known = name_prefixes(config)
    for side in depths:
        fitting = [each for each in lists if not side or side in each.prefix.split(".")]
        if fitting:
            chosen[side] = max(fitting, key=lambda each: (_has_known_prefix(each, known), each.count()))
    return chosen


def _has_known_prefix(each: LayerList, known: tuple[str, ...]) -> bool:
    """Return True if the list of layers is directly below one of the prefixes `known`."""
    container = each.prefix.rstrip(".").rpartition(".")[0]
    return (f"{container}." if container else "") in known


def is_other_tower(name: str) -> bool:
    """Return True if a tensor's name or prefix belongs to another part than the language model, such as images."""
    return _OTHER_TOWERS.search(name) is not None
