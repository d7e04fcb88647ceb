"""Plan which stored bytes make up each parameter of a model that is read layer by layer.

A model cannot be read this way if its weights are packed, or if transformers joins stored tensors in a way that STACKED
does not list; `plan_weights` then raises ModelError. This module works with names, shapes and offsets. It reads weights
only to compare tied tensors that are stored twice.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.projections import list_loaded_candidates, name_prefixes
from swsurgery.errors import ModelError
from swsurgery.model.places import find_decoder, find_output_embeddings
from swsurgery.model.refusals import HEAD_NAMES, make_missing_error
from swsurgery.model.slots import Part, Slot, WeightPlan
from swsurgery.model.torch_dtypes import get_streamed_dtype
from swsurgery.model.transformers_private import list_names_kept_in_float32
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.files import has_same_bytes

RENAMED = (
    (".mlp.", ".block_sparse_moe."),
    (".mlp.router.", ".block_sparse_moe.gate."),
    (".self_attn.forget_gate.", ".self_attn."),  # Kimi-Linear
    (".mlp.shared_experts.", ".share_expert."),  # Step-3.5, and the next three
    (".mlp.gate.e_score_correction_bias", ".moe.router_bias"),
    (".mlp.gate.", ".moe.gate."),
    (".mlp.experts.down_proj", ".moe.down_proj.weight"),
    ("lm_head.", "embed_out."),
)
"""Parts of names that differ between transformers and checkpoints, as (part in transformers, part in a checkpoint)."""

STACKED = {
    "experts.gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "experts.up_proj": (("up_proj",),),
    "experts.down_proj": (("down_proj",), ("w2",)),
}
"""Parameters that transformers stacks over all experts, with the possible names of the tensors that are stored for each
expert. If an expert has two stored tensors, they are joined along the rows."""

JOINED = {
    "self_attn.conv1d.weight": (0, tuple(f"self_attn.{letter}_conv1d.weight" for letter in "qkv")),  # Kimi-Linear
    "mlp.experts.gate_up_proj": (1, ("moe.gate_proj.weight", "moe.up_proj.weight")),  # Step-3.5
}
"""Parameters that transformers makes by joining several stored tensors, as (the axis, the endings of the stored names
in order)."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
"""The number of a layer or of an expert in the name of a tensor."""

_Holder = tuple[str, nn.Module, str]
"""One occurrence of a tensor in the model: the tensor's full name, its module, and its name in that module."""


def plan_weights(model: PreTrainedModel, layers: Sequence[nn.Module], checkpoint: Checkpoint) -> WeightPlan:
    """Find the stored bytes of each parameter, for each layer and for the modules outside the layers.

    Raises ModelError if a needed weight is not stored, or is stored in a form that only transformers can load.
    """
    planner = _Planner(model, layers)
    finder = _Finder(checkpoint)
    for holders in _list_tensors(model, _find_needed_modules(model)):
        path, module, name = holders[0]
        forms = finder.find_forms(holders, getattr(module, name).shape)
        if not forms:
            if HEAD_NAMES & set(path.split(".")) and not any(HEAD_NAMES & set(t.split(".")) for t in checkpoint.shapes):
                raise make_missing_error([path], checkpoint.directory)
            raise ModelError("cannot be read layer by layer: no stored form is known", path)
        planner.add(holders, forms)
    return planner.plan


def plan_tensors(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    checkpoint: Checkpoint,
    tensors: Collection[str],
    *,
    only_text: bool = True,
) -> WeightPlan:
    """Find the stored bytes of those parameters that are stored, in part or as a whole, in one of `tensors`.

    With `only_text`, parameters that do not affect the logits, such as those of a vision tower, are left out. Raises
    ModelError if the parameter of a tensor is not known, or if it is stored in a form that only transformers can load.
    """
    planner = _Planner(model, layers)
    finder = _Finder(checkpoint)
    needed = _find_needed_modules(model)
    unknown = set(tensors)
    for holders in _list_tensors(model):
        _, module, name = holders[0]
        forms: list[_Form] = []
        with contextlib.suppress(ModelError):  # a quantised tensor, which matters only if it is one of `tensors`
            forms = finder.find_forms(holders, getattr(module, name).shape)
        stored = {part.tensor for _, parts in forms for part in parts}
        if stored.isdisjoint(tensors):
            continue
        unknown -= stored
        if not only_text or any(id(module) in needed for _, module, _ in holders):
            planner.add(holders, forms)
    if unknown:
        raise ModelError("cannot be read layer by layer: the parameter of the tensor is not known", min(unknown))
    return planner.plan


class _Planner:
    """Collects the slots of a plan."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[nn.Module]):
        self._model = model
        self._layer_of = {id(module): number for number, layer in enumerate(layers) for module in layer.modules()}
        self._head = find_output_embeddings(model)
        self._in_layers: list[list[Slot]] = [[] for _ in layers]
        self._outside: list[Slot] = []

    @property
    def plan(self) -> WeightPlan:
        """The plan of all slots added so far. The slots of each layer are in the order in which they are stored."""
        layers = (
            sorted(slots, key=lambda slot: (str(slot.parts[0].file), slot.parts[0].offset)) for slots in self._in_layers
        )
        return WeightPlan(tuple(tuple(slots) for slots in layers), tuple(self._outside))

    def add(self, holders: Sequence[_Holder], forms: Sequence[_Form]) -> None:
        """Add the slots of one tensor, which is stored in at least one form.

        Raises ModelError if it is stored under several names with different bytes, because transformers would then load
        separate tensors, or in a dtype that cannot be converted.
        """
        first, parts = forms[0]
        for path, others in forms[1:]:
            if others != parts and not _has_same_bytes(parts, others):
                what = f"cannot be read layer by layer: it is tied to {path}, which is stored with other values"
                raise ModelError(what, first)
        path, module, name = holders[0]
        tensor = getattr(module, name)
        dtype = _find_loaded_dtype(self._model, path, tensor)
        if any(part.dtype != dtype and not _is_both_floating(part.dtype, dtype) for part in parts):
            raise ModelError(f"cannot be read layer by layer: stored as {parts[0].dtype}", path)
        for place in {self._layer_of.get(id(module)) for _, module, _ in holders}:
            mine = tuple((m, n) for _, m, n in holders if self._layer_of.get(id(m)) == place)
            head = all(module is self._head for module, _ in mine)
            slot = Slot(*mine[0], tensor.shape, dtype, parts, mine, head)
            (self._outside if place is None else self._in_layers[place]).append(slot)


def _find_needed_modules(model: PreTrainedModel) -> set[int]:
    """Return the ids of the modules of the text model and its head; those that process images are left out.

    ModernBERT's decoder has an `lm_head` before the matrix that returns the logits.
    """
    head = getattr(model, "lm_head", None)
    roots = [root for root in (find_decoder(model), find_output_embeddings(model), head) if root is not None]
    return {id(module) for root in roots for module in root.modules()}


def _list_tensors(model: PreTrainedModel, needed: Collection[int] | None = None) -> Iterable[list[_Holder]]:
    """List the occurrences of each stored tensor of the model, in the modules `needed`; a tied tensor has several."""
    holders: dict[int, list[_Holder]] = {}
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            stored = tensor is not None and name not in module._non_persistent_buffers_set
            if stored and (needed is None or id(module) in needed):
                holders.setdefault(id(tensor), []).append((f"{path}.{name}" if path else name, module, name))
    return holders.values()


_Form = tuple[str, tuple[Part, ...]]
"""One stored form of a tensor: the name under which the model holds it, and the parts."""


class _Finder:
    """Finds the stored bytes of parameters in one checkpoint."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._prefixes = ("", *name_prefixes(checkpoint.config))
        self._as_stored: dict[tuple[str, str, tuple[int, ...]], bool] = {}

    def find_forms(self, holders: Sequence[_Holder], shape: torch.Size) -> list[_Form]:
        """Find the stored bytes of a tensor under each of its names. A tied tensor is usually stored under one name."""
        found = [(path, self._find_parts(path, shape)) for path, _, _ in holders]
        return [(path, parts) for path, parts in found if parts]

    def _find_parts(self, path: str, shape: torch.Size) -> tuple[Part, ...]:
        """Find the stored bytes of one parameter.

        Returns an empty tuple if the checkpoint has no tensor of a suitable name and shape.
        """
        checkpoint = self._checkpoint
        longest = max((prefix for prefix in self._prefixes if path.startswith(prefix)), key=len)
        bare = path.removeprefix(longest)
        names = [prefix + rest for rest in dict.fromkeys((path, bare)) for prefix in ("", longest, *self._prefixes)]
        names = list(dict.fromkeys(names + [n.replace(*pair) for n in names for pair in RENAMED if pair[0] in n]))
        for name in names:
            if checkpoint.shapes.get(name) == tuple(shape) and self._is_as_stored(name, path):
                return (_locate_part(name, 0, checkpoint),)
        for ending, choices in STACKED.items():
            for name in names:
                if name.endswith(ending) and len(shape) == 3:
                    stem = name.removesuffix(ending) + "experts."
                    for parts in choices:
                        found = _find_stacked(stem, parts, shape, checkpoint)
                        if found:
                            return found
        for ending, (axis, endings) in JOINED.items():
            for name in names:
                stored = [name.removesuffix(ending) + one for one in endings]
                if name.endswith(ending) and (found := _find_joined(stored, axis, shape, checkpoint)):
                    return found
        return ()

    def _is_as_stored(self, name: str, path: str) -> bool:
        """Return True if transformers loads the stored tensor `name` as the parameter `path` without transposing it.

        Only down projections are known to be transposed, in all layers or in none.
        """
        shapes = self._checkpoint.shapes
        kind = (_NUMBER.sub("", name), _NUMBER.sub("", path), shapes[name])
        if kind not in self._as_stored:
            index = tuple(range(len(shapes[name])))
            candidates = list_loaded_candidates(self._checkpoint.config, Coordinate(name, index), shapes)
            self._as_stored[kind] = all(each.index == index for each in candidates if each.tensor == path)
        return self._as_stored[kind]


def _is_both_floating(one: torch.dtype, other: torch.dtype) -> bool:
    """Return True if both dtypes are floating-point, so that values of one can be converted to the other."""
    return one.is_floating_point and other.is_floating_point


def _find_loaded_dtype(model: PreTrainedModel, path: str, tensor: Tensor) -> torch.dtype:
    """Return the dtype in which transformers would load a weight.

    This is float32 for the modules that transformers always keeps in float32.
    """
    kept = list_names_kept_in_float32(model, tensor.dtype)
    if tensor.is_floating_point() and any(re.search(rf"(?:^|\.){re.escape(name)}(?:$|\.)", path) for name in kept):
        return torch.float32
    return tensor.dtype


def _find_joined(names: Sequence[str], axis: int, shape: torch.Size, checkpoint: Checkpoint) -> tuple[Part, ...]:
    """Find the parts of a parameter that consists of the stored tensors `names`, joined along `axis`.

    Returns an empty tuple if a tensor is missing or has another shape.
    """
    wanted = (*shape[:axis], shape[axis] // len(names), *shape[axis + 1 :])
    if shape[axis] % len(names) or any(checkpoint.shapes.get(name) != wanted for name in names):
        return ()
    wholes = [_locate_part(name, 0, checkpoint) for name in names]
    count, run = math.prod(shape[:axis]), math.prod(wanted[axis:])
    return tuple(
        Part(
            whole.tensor,
            whole.file,
            whole.offset + at * (whole.size // count),
            whole.size // count,
            whole.dtype,
            (at * len(wholes) + number) * run,
        )
        for at in range(count)
        for number, whole in enumerate(wholes)
    )


def _find_stacked(stem: str, names: Sequence[str], shape: torch.Size, checkpoint: Checkpoint) -> tuple[Part, ...]:
    """Find the stored parts of a parameter (experts, rows, columns) whose experts are stored as separate tensors.

    The name of a stored tensor is `stem`, the expert's number and one of `names`. Returns an empty tuple if a tensor is
    missing or has another shape.
    """
    experts, rows, columns = shape
    wanted = (rows // len(names), columns)
    found = []
    for expert in range(experts):
        for number, name in enumerate(names):
            stored = f"{stem}{expert}.{name}.weight"
            if checkpoint.shapes.get(stored) != wanted or rows % len(names):
                return ()
            found.append(_locate_part(stored, (expert * rows + number * wanted[0]) * columns, checkpoint))
    return tuple(found)


def _has_same_bytes(one: Sequence[Part], other: Sequence[Part]) -> bool:
    """Return True if the parts of two stored copies of one parameter have the same bytes. Raises ShardError."""
    if [(part.size, part.dtype, part.element) for part in one] != [(p.size, p.dtype, p.element) for p in other]:
        return False
    pairs = zip(one, other, strict=True)
    return all(has_same_bytes(a.file, b.file, a.size, a.offset, b.offset) for a, b in pairs)


def _locate_part(name: str, element: int, checkpoint: Checkpoint) -> Part:
    """Return one stored tensor as a part whose first value has the flat index `element` in the parameter.

    Raises ModelError if the tensor is quantised or has a dtype that cannot be streamed.
    """
    info, shard = checkpoint.get_info(name), checkpoint.shards[checkpoint.weight_map[name]]
    if why := checkpoint.quantisation.explain_refusal(name):
        raise ModelError(f"cannot be read layer by layer: {why}", name)
    dtype = get_streamed_dtype(info.dtype.name)
    if dtype is None:
        raise ModelError(f"cannot be read layer by layer: stored as {info.dtype.name}", name)
    return Part(name, shard.file, shard.data_start + info.data_offsets[0], info.size, dtype, element)
