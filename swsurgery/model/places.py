"""Where stored scalars are inside a loaded model, and how they get other values for a while.

Knows modules and parameters, and not what is computed with them.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.projections import loaded_candidates
from swsurgery.errors import Unrunnable
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import decode

Variant = Mapping[Coordinate, float]
"""Stored scalars and the value that each has in this variant; {} is the checkpoint as it is stored."""


@dataclass(frozen=True)
class Place:
    """One scalar inside the loaded model. `owners` are all modules that hold its parameter, with the name it has
    there; `layers` are the decoder layers among which they lie, None for outside."""

    coordinate: Coordinate
    index: tuple[int, ...]
    stored: float
    owners: tuple[tuple[nn.Module, str], ...]
    layers: frozenset[int | None]

    @property
    def weight(self) -> Tensor:
        """The loaded parameter that contains the scalar."""
        module, name = self.owners[0]
        return module.get_parameter(name).data


class Places:
    """The places of the scalars of one model, found when they are first asked for."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._owners = _owners_of_parameters(model, layers)
        self._found: dict[Coordinate, Place] = {}

    def find(self, variants: Sequence[Variant]) -> None:
        """Find every scalar of `variants`. Raises Unrunnable for one that the loaded model lacks."""
        for coordinate in {coordinate for variant in variants for coordinate in variant} - set(self._found):
            self._found[coordinate] = self.place(coordinate)

    def touches(self, variant: Variant, where: int | None) -> bool:
        """Does `variant` change a weight of layer `where` (None: one outside the layers)?"""
        return any(where in self._found[coordinate].layers for coordinate in variant)

    @contextlib.contextmanager
    def swapped(self, variant: Variant, where: int | None | object = ...) -> Iterator[None]:
        """The weights of layer `where` (None: those outside the layers; ...: all) are those of `variant` while this
        lasts; afterwards, come what may, they have their very bits back."""
        kept: list[tuple[Tensor, tuple[int, ...], Tensor]] = []
        try:
            for coordinate, value in variant.items():
                place = self._found[coordinate]
                if where is not ... and where not in place.layers:
                    continue
                weight = place.weight
                if weight.device.type == "meta":  # the head, while only the embedding is there
                    continue
                held = weight[place.index].clone()
                expected = torch.tensor(place.stored, dtype=torch.float64).to(weight.dtype)
                if float(held) != float(expected):
                    raise Unrunnable(
                        "the loader changes a weight: "
                        f"the loaded model holds {float(held):g}, not the stored value {float(expected):g}",
                        coordinate,
                    )
                kept.append((weight, place.index, held))
                weight[place.index] = value
            yield
        finally:
            for weight, index, held in reversed(kept):
                weight[index] = held

    def place(self, coordinate: Coordinate) -> Place:
        """The place of a stored scalar in the loaded model: the first candidate that exists."""
        shapes = self._checkpoint.shapes
        if coordinate.tensor in shapes:
            for candidate in loaded_candidates(self._checkpoint.config, coordinate, shapes):
                owners = self._owners.get(candidate.tensor)
                if owners and _inside(candidate.index, owners.shape):
                    shard = self._checkpoint.shards[self._checkpoint.weight_map[coordinate.tensor]]
                    try:
                        stored = shard.read_scalar(*coordinate)
                    except IndexError:
                        break
                    value = float(decode(self._checkpoint.info(coordinate.tensor).dtype, stored))
                    return Place(coordinate, candidate.index, value, owners.modules, owners.layers)
        raise Unrunnable("no such scalar in the loaded model", coordinate)


class _Owners(NamedTuple):
    """The modules that hold one parameter, with its name there, and the layers among which they lie."""

    modules: tuple[tuple[nn.Module, str], ...]
    layers: frozenset[int | None]
    shape: torch.Size


def _owners_of_parameters(model: nn.Module, layers: Sequence[nn.Module]) -> dict[str, _Owners]:
    """Every parameter by each of its names."""
    layer_of = {id(module): number for number, layer in enumerate(layers) for module in layer.modules()}
    holders: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    names: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                names[f"{path}.{name}" if path else name] = parameter
                if (module, name) not in holders[id(parameter)]:
                    holders[id(parameter)].append((module, name))
    return {
        name: _Owners(
            tuple(holders[id(parameter)]),
            frozenset(layer_of.get(id(module)) for module, _ in holders[id(parameter)]),
            parameter.shape,
        )
        for name, parameter in names.items()
    }


def find_decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers of the text model in order: the first list of modules, from the outside in, that is as long
    as the config says; empty where there is none."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for root in (decoder(model), model):
        for module in root.modules() if root is not None else ():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return list(module)
    return []


def decoder(model: PreTrainedModel) -> nn.Module | None:
    """Return the text decoder of `model`, or None."""
    get: Callable[[], nn.Module | None] = model.get_decoder
    return get()


def output_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """Return the module that turns hidden states into logits, or None."""
    get: Callable[[], nn.Module | None] = model.get_output_embeddings
    return get()


def _inside(index: tuple[int, ...], shape: Sequence[int]) -> bool:
    return len(index) == len(shape) and all(0 <= i < size for i, size in zip(index, shape, strict=True))
