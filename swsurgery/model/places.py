"""Find stored scalars and regions in a loaded model, and give them other values for the length of a `with` block.

This module uses modules and parameters of torch, and must not depend on texts or metrics.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.projections import list_loaded_candidates
from swsurgery.errors import Unrunnable
from swsurgery.model.variant import Scalars
from swsurgery.storage.coordinate import Coordinate, is_valid_index
from swsurgery.storage.dtypes import decode
from swsurgery.storage.region import Region

_MISSING = "no such scalar in the loaded model"


@dataclass(frozen=True)
class Place:
    """One scalar or region of the loaded model.

    `index` is its index in the loaded parameter: slices for a region. `stored` is the value of a scalar in the
    checkpoint, and None for a region. `owners` are the modules that share the parameter, each with the parameter's name
    in that module. `layers` are the numbers of the decoder layers that contain these modules; None stands for modules
    outside the layers.
    """

    coordinate: Coordinate | Region
    index: tuple[int | slice, ...]
    stored: float | None
    owners: tuple[tuple[nn.Module, str], ...]
    layers: frozenset[int | None]

    @property
    def weight(self) -> Tensor:
        """The loaded parameter that contains the scalar or region."""
        module, name = self.owners[0]
        return module.get_parameter(name).data


class Places:
    """Finds scalars in one loaded model and remembers their places.

    `list_scalars_in` and `swap` accept only scalars that were passed to `find` before.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._owners = _map_owners(model, layers)
        self._found: dict[Coordinate | Region, Place] = {}

    def find(self, variants: Sequence[Scalars]) -> None:
        """Find all scalars and regions of `variants`. Raises Unrunnable if one is not in the loaded model."""
        for target in {target for variant in variants for target in variant} - set(self._found):
            if isinstance(target, Region):
                self._found[target] = self._find_region(target)
            else:
                self._found[target] = self.find_place(target)

    def list_scalars_in(self, variant: Scalars, where: int | None) -> frozenset[tuple[Coordinate | Region, str]]:
        """Return the scalars that `variant` changes in layer `where`, or outside the layers if `where` is None.

        The values are in hexadecimal, so that 0.0 and -0.0 differ.
        """
        return frozenset(
            (name, float(value).hex()) for name, value in variant.items() if where in self._found[name].layers
        )

    @contextlib.contextmanager
    def swap(self, variant: Scalars, where: int | None | object = ...) -> Iterator[None]:
        """Give the weights of layer `where` the values of `variant` for the length of a `with` block.

        If `where` is None, the weights outside the layers get these values; without `where`, all weights do. The
        original bits are restored afterwards, also after an exception. Raises Unrunnable if a loaded value differs from
        the stored one.
        """
        kept: list[tuple[Tensor, tuple[int | slice, ...], Tensor]] = []
        try:
            for coordinate, value in variant.items():
                place = self._found[coordinate]
                if where is not ... and where not in place.layers:
                    continue
                weight = place.weight
                if weight.device.type == "meta":  # not loaded: the head, while only the embedding is needed
                    continue
                held = weight[place.index].clone()
                if place.stored is not None:
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
        index, owners = self._find_loaded(coordinate)
        shard = self._checkpoint.shards[self._checkpoint.weight_map[coordinate.tensor]]
        try:
            stored = shard.read_scalar(*coordinate)
        except IndexError:
            raise Unrunnable(_MISSING, coordinate) from None
        value = float(decode(self._checkpoint.get_info(coordinate.tensor).dtype, stored))
        return Place(coordinate, index, value, owners.modules, owners.layers)

    def _find_region(self, region: Region) -> Place:
        """Find a stored region in the loaded model by its first and its last scalar.

        The loaded parameter may have its axes in another order and an additional axis for experts. The region is a box
        there too. Raises Unrunnable if the loaded model has no such scalars.
        """
        first, owners = self._find_loaded(Coordinate(region.tensor, tuple(begin for begin, _ in region.bounds)))
        last, _ = self._find_loaded(Coordinate(region.tensor, tuple(end - 1 for _, end in region.bounds)))
        box = tuple(slice(begin, end + 1) for begin, end in zip(first, last, strict=True))
        return Place(region, box, None, owners.modules, owners.layers)

    def _find_loaded(self, coordinate: Coordinate) -> tuple[tuple[int, ...], _Owners]:
        """Find the index of a stored scalar in a loaded parameter, and the owners of this parameter."""
        shapes = self._checkpoint.shapes
        if coordinate.tensor in shapes:
            for candidate in list_loaded_candidates(self._checkpoint.config, coordinate, shapes):
                owners = self._owners.get(candidate.tensor)
                if owners and is_valid_index(candidate.index, owners.shape):
                    return candidate.index, owners
        raise Unrunnable(_MISSING, coordinate)


class _Owners(NamedTuple):
    """The modules that share one parameter, each with the parameter's name in that module.

    `layers` are the numbers of the layers that contain these modules, as in Place, and `shape` is the parameter's.
    """

    modules: tuple[tuple[nn.Module, str], ...]
    layers: frozenset[int | None]
    shape: torch.Size


def _map_owners(model: nn.Module, layers: Sequence[nn.Module]) -> dict[str, _Owners]:
    """Map the full name of each parameter to its owners. A tied parameter has several names with the same owners."""
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

    They are the first ModuleList, from the outside in, whose length is the config's num_hidden_layers, or else its
    num_layers (in LongCat-Flash, num_hidden_layers counts both attention blocks of each layer). If there is none, the
    result is empty.
    """
    config = model.config.get_text_config()
    for key in ("num_hidden_layers", "num_layers"):
        for root in (find_decoder(model), model):
            for module in root.modules() if root is not None else ():
                if isinstance(module, nn.ModuleList) and len(module) == getattr(config, key, None):
                    return list(module)
    return []


def find_decoder(model: PreTrainedModel) -> nn.Module | None:
    """Return the module of `model` that contains its decoder layers for text; None if transformers finds none.

    In ModernBERT's decoder, the attribute `decoder` is the head, and transformers returns it.
    """
    get: Callable[[], nn.Module | None] = model.get_decoder
    found = get()
    base: nn.Module = model.base_model
    return base if found is not None and found is find_output_embeddings(model) else found


def find_output_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """Return the module of `model` that turns hidden states into logits; None if it has none."""
    get: Callable[[], nn.Module | None] = model.get_output_embeddings
    return get()
