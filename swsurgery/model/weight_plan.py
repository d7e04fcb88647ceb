"""Which stored bytes make up which parameter of a model that is read layer by layer.

Where that cannot be told (packed weights, fusions that are not known here) the model cannot be streamed, and says so.
This room knows names, shapes and offsets. It reads no weight, except to compare tied tensors that are stored twice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.projections import loaded_candidates, name_prefixes
from swsurgery.errors import ModelError
from swsurgery.model import local_directory
from swsurgery.model.places import decoder, output_embeddings
from swsurgery.model.refusals import HEADS, missing_weights
from swsurgery.model.torch_dtypes import streamed_dtype
from swsurgery.model.transformers_private import names_kept_in_float32
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.files import Place, opened, read_exactly

ALIGNMENT = 256

COMPARED = 4 << 20
"""Bytes of tied tensors that are compared at a time."""


#: How checkpoints name what transformers calls otherwise: (loaded, stored).
RENAMED = (
    (".mlp.", ".block_sparse_moe."),
    (".mlp.router.", ".block_sparse_moe.gate."),
    ("lm_head.", "embed_out."),
)

#: What transformers stacks over the experts, and joins along an expert's rows: its name, and those of the parts.
STACKED = {
    "experts.gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "experts.down_proj": (("down_proj",), ("w2",)),
}


@dataclass(frozen=True)
class Part:
    """Stored bytes that make up some rows of a parameter, all of it for most: where they lie, and from which element
    of the parameter on they belong."""

    path: Place
    offset: int
    size: int
    dtype: torch.dtype
    element: int


@dataclass(frozen=True)
class Slot:
    """One parameter or buffer of a module, and what it is read from. `head` says that only the head needs it."""

    module: nn.Module
    name: str
    shape: torch.Size
    dtype: torch.dtype
    parts: tuple[Part, ...]
    owners: tuple[tuple[nn.Module, str], ...]
    head: bool

    @property
    def size(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def plan_weights(model: PreTrainedModel, layers: Sequence[nn.Module], checkpoint: Checkpoint) -> WeightPlan:
    """What each layer, and what is outside of them, is read from. Raises ModelError where a weight that is needed is
    not stored in a form that can be read as it is."""
    prefixes = ("", *name_prefixes(checkpoint.config))
    layer_of = {id(module): number for number, layer in enumerate(layers) for module in layer.modules()}
    # A model that also sees images never needs what sees them here.
    output = output_embeddings(model)
    roots = [root for root in (decoder(model), output) if root is not None]
    needed = {id(module) for root in roots for module in root.modules()}
    head = {id(output)}
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set and id(module) in needed:
                owners.setdefault(id(tensor), []).append((f"{path}.{name}" if path else name, module, name))
    in_layers: list[list[Slot]] = [[] for _ in layers]
    outside: list[Slot] = []
    for holders in owners.values():
        places = {layer_of.get(id(module)) for _, module, _ in holders}
        _, module, name = holders[0]
        tensor = getattr(module, name)
        found = [(path, _parts(path, tensor.shape, checkpoint, prefixes)) for path, _, _ in holders]
        stored = [(path, parts) for path, parts in found if parts]
        if not stored:
            if HEADS & set(found[0][0].split(".")) and not any(HEADS & set(t.split(".")) for t in checkpoint.shapes):
                raise missing_weights([found[0][0]], local_directory(checkpoint))
            raise ModelError("cannot be read layer by layer: no stored form is known", holders[0][0])
        parts = stored[0][1]
        # Tied: usually stored under one of its names. If it is stored twice and differs, transformers does not tie.
        for path, others in stored[1:]:
            if others != parts and not _same_bytes(parts, others):
                raise ModelError(
                    f"cannot be read layer by layer: it is tied to {path}, which is stored with other values",
                    stored[0][0],
                )
        dtype = _loaded_dtype(model, holders[0][0], tensor)
        if any(
            part.dtype != dtype and not (part.dtype.is_floating_point and dtype.is_floating_point) for part in parts
        ):
            raise ModelError(f"cannot be read layer by layer: stored as {parts[0].dtype}", holders[0][0])
        for place in places:
            mine = tuple((m, n) for _, m, n in holders if layer_of.get(id(m)) == place)
            slot = Slot(*mine[0], tensor.shape, dtype, parts, mine, all(id(module) in head for module, _ in mine))
            (outside if place is None else in_layers[place]).append(slot)
    return WeightPlan(tuple(tuple(slots) for slots in in_layers), tuple(outside))


@dataclass(frozen=True)
class WeightPlan:
    """The slots of each layer, and those outside of the layers."""

    layers: tuple[tuple[Slot, ...], ...]
    outside: tuple[Slot, ...]

    @property
    def largest(self) -> int:
        """Bytes that the largest layer takes in a buffer."""
        return max(layout(slots)[1] for slots in self.layers)


def layout(slots: Sequence[Slot]) -> tuple[list[int], int]:
    """Where each slot begins in a buffer, and how long the buffer must be."""
    begins, end = [], 0
    for slot in slots:
        begins.append(end)
        end += -(-slot.size // ALIGNMENT) * ALIGNMENT
    return begins, end


def _loaded_dtype(model: PreTrainedModel, path: str, tensor: Tensor) -> torch.dtype:
    """The dtype in which transformers would load it: some modules are kept in float32."""
    kept = names_kept_in_float32(model, tensor.dtype)
    if tensor.is_floating_point() and any(re.search(rf"(?:^|\.){re.escape(name)}(?:$|\.)", path) for name in kept):
        return torch.float32
    return tensor.dtype


def _parts(path: str, shape: torch.Size, checkpoint: Checkpoint, prefixes: Sequence[str]) -> tuple[Part, ...]:
    """The stored bytes of one parameter, or nothing where they are not found in its very shape."""
    longest = max((prefix for prefix in prefixes if path.startswith(prefix)), key=len)
    bare = path.removeprefix(longest)
    names = [prefix + rest for rest in dict.fromkeys((path, bare)) for prefix in ("", longest, *prefixes)]
    names = list(dict.fromkeys(names + [n.replace(*pair) for n in names for pair in RENAMED if pair[0] in n]))
    for name in names:
        if checkpoint.shapes.get(name) == tuple(shape) and _as_stored(name, path, checkpoint):
            return (_part(name, 0, checkpoint),)
    for ending, choices in STACKED.items():
        for name in names:
            if name.endswith(ending) and len(shape) == 3:
                stem = name.removesuffix(ending) + "experts."
                for parts in choices:
                    found = _stacked(stem, parts, shape, checkpoint)
                    if found:
                        return found
    return ()


def _stacked(stem: str, names: Sequence[str], shape: torch.Size, checkpoint: Checkpoint) -> tuple[Part, ...]:
    experts, rows, columns = shape
    wanted = (rows // len(names), columns)
    found = []
    for expert in range(experts):
        for number, name in enumerate(names):
            stored = f"{stem}{expert}.{name}.weight"
            if checkpoint.shapes.get(stored) != wanted or rows % len(names):
                return ()
            found.append(_part(stored, (expert * rows + number * wanted[0]) * columns, checkpoint))
    return tuple(found)


def _same_bytes(one: Sequence[Part], other: Sequence[Part]) -> bool:
    """Compare the stored bytes of two forms of one parameter, a few MB at a time. Raises ShardError."""
    if [(part.size, part.dtype, part.element) for part in one] != [(p.size, p.dtype, p.element) for p in other]:
        return False
    for a, b in zip(one, other, strict=True):
        with opened(a.path) as first, opened(b.path) as second:
            for at in range(0, a.size, COMPARED):
                size = min(COMPARED, a.size - at)
                if read_exactly(first, size, a.offset + at, a.path) != read_exactly(
                    second, size, b.offset + at, b.path
                ):
                    return False
    return True


def _as_stored(name: str, path: str, checkpoint: Checkpoint) -> bool:
    """Is a down projection loaded the way round in which it is stored? Any other weight is taken to be."""
    index = tuple(range(len(checkpoint.shapes[name])))
    candidates = loaded_candidates(checkpoint.config, Coordinate(name, index), checkpoint.shapes)
    turned = [c for c in candidates if c.tensor == path and c.index != index]
    return not turned


def _part(name: str, element: int, checkpoint: Checkpoint) -> Part:
    info, shard = checkpoint.info(name), checkpoint.shards[checkpoint.weight_map[name]]
    if why := checkpoint.quantisation.refusal(name):
        raise ModelError(f"cannot be read layer by layer: {why}", name)
    dtype = streamed_dtype(info.dtype.name)
    if dtype is None:
        raise ModelError(f"cannot be read layer by layer: stored as {info.dtype.name}", name)
    return Part(shard.path, shard.data_start + info.data_offsets[0], info.size, dtype, element)
