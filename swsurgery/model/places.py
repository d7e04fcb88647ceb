"""Find stored scalars in a loaded model, and give them other values for the length of a block.

This module uses modules and parameters of torch, and must not depend on texts or metrics.
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
from swsurgery.checkpoint.projections import list_loaded_candidates
from swsurgery.errors import Unrunnable
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import decode

Variant = Mapping[Coordinate, float]
"""Maps the scalars that differ from the stored checkpoint to their values; {} is the stored checkpoint."""


@dataclass(frozen=True)
class Place:
    """One scalar of the loaded model.

    `owners` are the modules that share its parameter, each with the parameter's name in it. `layers` are the numbers of
    the decoder layers that contain these modules; None stands for modules outside the layers.
    """

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
    """The places of scalars in one model, found on first use."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._owners = _map_owners(model, layers)
        self._found: dict[Coordinate, Place] = {}

    def find(self, variants: Sequence[Variant]) -> None:
        """Find every scalar of `variants`. Raises Unrunnable for one that is not in the loaded model."""
        for coordinate in {coordinate for variant in variants for coordinate in variant} - set(self._found):
            self._found[coordinate] = self.find_place(coordinate)

    def has_scalars_in(self, variant: Variant, where: int | None) -> bool:
        """Return True if `variant` changes a weight of layer `where` (None: outside the layers)."""
        return any(where in self._found[coordinate].layers for coordinate in variant)

    @contextlib.contextmanager
    def swap(self, variant: Variant, where: int | None | object = ...) -> Iterator[None]:
        """Give the weights of layer `where` the values of `variant` for the length of a block.

        None stands for the weights outside the layers, and ... for all weights. The original bits are restored
        afterwards, also after an exception. Raises Unrunnable if a loaded value differs from the stored one.
        """
        kept: list[tuple[Tensor, tuple[int, ...], Tensor]] = []
        try:
            for coordinate, value in variant.items():
                place = self._found[coordinate]
                if where is not ... and where not in place.layers:
                    continue
                weight = place.weight
                if weight.device.type == "meta":  # the head, while only the embedding is loaded
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

    def find_place(self, coordinate: Coordinate) -> Place:
        """Find a stored scalar in the loaded model, under the first of its possible names that exists there.

        Raises Unrunnable if the checkpoint or the loaded model has no such scalar.
        """
        shapes = self._checkpoint.shapes
        if coordinate.tensor in shapes:
            for candidate in list_loaded_candidates(self._checkpoint.config, coordinate, shapes):
                owners = self._owners.get(candidate.tensor)
                if owners and _is_inside(candidate.index, owners.shape):
                    shard = self._checkpoint.shards[self._checkpoint.weight_map[coordinate.tensor]]
                    try:
                        stored = shard.read_scalar(*coordinate)
                    except IndexError:
                        break
                    value = float(decode(self._checkpoint.get_info(coordinate.tensor).dtype, stored))
                    return Place(coordinate, candidate.index, value, owners.modules, owners.layers)
        raise Unrunnable("no such scalar in the loaded model", coordinate)


class _Owners(NamedTuple):
    """The modules that share one parameter, its name in each, the layers that contain them, and its shape."""

    modules: tuple[tuple[nn.Module, str], ...]
    layers: frozenset[int | None]
    shape: torch.Size


def _map_owners(model: nn.Module, layers: Sequence[nn.Module]) -> dict[str, _Owners]:
    """Find the owners of each parameter, by name. A tied parameter has several names."""
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
    """Return the decoder layers of the text model in order.

    They are the first ModuleList, from the outside in, whose length is num_hidden_layers. Empty if no list fits.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for root in (find_decoder(model), model):
        for module in root.modules() if root is not None else ():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return list(module)
    return []


def find_decoder(model: PreTrainedModel) -> nn.Module | None:
    """Return the module of `model` that contains its decoder layers for text; None if transformers knows none."""
    get: Callable[[], nn.Module | None] = model.get_decoder
    return get()


def find_output_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """Return the module that turns hidden states into logits; None if the model has none."""
    get: Callable[[], nn.Module | None] = model.get_output_embeddings
    return get()


def _is_inside(index: tuple[int, ...], shape: Sequence[int]) -> bool:
    return len(index) == len(shape) and all(0 <= i < size for i, size in zip(index, shape, strict=True))
