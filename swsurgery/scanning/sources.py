"""Observe the inputs and outputs of down projections in a loaded model, with hooks on its modules.

A source is a module that contains down projections: a linear layer, or the stacked experts of a layer. spikes.py and
experts.py read from the sources after each layer has run. This module keeps nothing longer than one layer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from swsurgery.checkpoint.architectures import Shapes
from swsurgery.checkpoint.projections import (
    DownProjection,
    has_residual_rows,
    list_down_projections,
    list_loaded_candidates,
)
from swsurgery.errors import Unrunnable
from swsurgery.model.forward import LayeredModel
from swsurgery.scanning.coverage import list_unread_layers
from swsurgery.scanning.report import Method, Profile, UnreadLayer
from swsurgery.storage.coordinate import Coordinate


@dataclass(frozen=True)
class Multiplied:
    """The input `x` of one down projection for one token: (cols,), float32.

    The output of the projection is multiplied by `share` before it is added to the MLP's output. `share` is 1 in a
    dense MLP, the router's weight for a routed expert, and the value of the gate for a shared MLP that has a gate.
    """

    projection: DownProjection
    share: float
    x: Tensor


class ExpertCall(NamedTuple):
    """The inputs and outputs of one expert's down projection in one call of a layer.

    `tokens` are the numbers of the tokens in the batch (n,), `x` the neurons (n, cols), and `y` the outputs (n, rows)
    before the router's weights. `weight` is the loaded matrix (rows, cols).
    """

    projection: DownProjection
    tokens: Tensor
    x: Tensor
    y: Tensor
    weight: Tensor


class LinearSource:
    """Observes the down projection of a dense or shared MLP, and the gate that scales a shared MLP (Qwen2-MoE)."""

    def __init__(self, projection: DownProjection, module: nn.Module, gate: nn.Module | None):
        self.projection, self.module, self.gate = projection, module, gate
        self.forget()

    def forget(self) -> None:
        self.called, self._x, self._y = False, torch.empty(0), torch.empty(0)
        self._gate: Tensor | None = None

    def watch(self) -> list[RemovableHandle]:
        handles = [self.module.register_forward_hook(self._keep)]
        if self.gate is not None:
            handles.append(self.gate.register_forward_hook(self._keep_gate))
        return handles

    def _keep(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        # The output is copied, because Falcon and Llama 4 later add to this tensor in place.
        self.called, self._x, self._y = True, arguments[0], output.clone()

    def _keep_gate(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        self._gate = output.float().sigmoid().flatten()

    def output(self, tokens: int) -> Tensor:
        """Compute what the projection adds to the MLP's output: (tokens, channels), float32."""
        y = self._y.reshape(tokens, -1).float()
        return y if self._gate is None else y * self._gate[:, None]

    def neurons(self) -> Tensor:
        return self._x

    @property
    def experts(self) -> list[DownProjection]:
        """The down projection, if it is that of a shared expert."""
        return [self.projection] if self.projection.expert == "shared" else []

    def list_expert_calls(self) -> Iterator[ExpertCall]:
        """Yield the call of a shared expert, before the gate that scales it."""
        for projection in self.experts:
            x, y = self._x.flatten(0, -2), self._y.flatten(0, -2)
            yield ExpertCall(projection, torch.arange(len(x)), x, y, self.module.get_parameter("weight"))

    def list_multiplied(self, token: int) -> list[Multiplied]:
        x = self._x.reshape(-1, self._x.shape[-1])[token].float().cpu()
        return [Multiplied(self.projection, 1.0 if self._gate is None else float(self._gate[token]), x)]


class _Experts:
    """Observes the routed experts of a layer. transformers 5 and later stack all of them in one module."""

    def __init__(self, module: nn.Module):
        self.projections: dict[int, DownProjection] = {}
        self.module = module
        self.forget()

    def forget(self) -> None:
        self.called, self._y = False, torch.empty(0)
        self._x = self._index = self._weights = torch.empty(0)

    def watch(self) -> list[RemovableHandle]:
        return [self.module.register_forward_hook(self._keep, with_kwargs=True)]

    def _keep(self, module: nn.Module, arguments: tuple[object, ...], named: dict[str, object], output: Tensor) -> None:
        """Store the inputs of the down projections, the router's choice and the output of one call of the module.

        The module receives three tensors: the hidden states (tokens, channels), the numbers of the chosen experts
        (tokens, chosen), and their router weights (tokens, chosen). In Llama 4 it receives only hidden states
        (experts * tokens, channels). The router has already multiplied them by its weights, which are zero for an
        expert that was not chosen.
        """
        hidden, *routing = [value for value in (*arguments, *named.values()) if isinstance(value, Tensor)]
        hidden = hidden.reshape(-1, hidden.shape[-1])
        if routing:
            [self._index] = [tensor for tensor in routing if not tensor.is_floating_point()]
            [self._weights] = [tensor.float() for tensor in routing if tensor.is_floating_point()]
            self._y = output.clone()
        else:
            experts = len(self.projections)
            hidden = hidden.reshape(experts, -1, hidden.shape[-1]).transpose(0, 1)
            self._index = torch.arange(experts, device=hidden.device).expand(len(hidden), -1)
            self._weights = torch.ones(self._index.shape)
            self._y = output.reshape(experts, len(hidden), -1).sum(0)
        self._x = _compute_expert_neurons(module, hidden, self._index, self.projections)
        self.called = True

    def output(self, tokens: int) -> Tensor:
        return self._y.reshape(tokens, -1).float()

    def neurons(self) -> Tensor:
        return self._x

    @property
    def experts(self) -> list[DownProjection]:
        """The down projections of all experts of the layer."""
        return list(self.projections.values())

    def list_expert_calls(self) -> Iterator[ExpertCall]:
        """Yield the call of each expert that received a token."""
        module = cast("_StackedExperts", self.module)
        bias: Tensor | None = getattr(self.module, "down_proj_bias", None)
        for expert in sorted(set(self._index.flatten().tolist()) & set(self.projections)):
            tokens, place = (self._index == expert).nonzero(as_tuple=True)
            x, weight = self._x[tokens, place], module.down_proj[expert]
            turned = getattr(self.module, "is_transposed", weight.shape[0] == x.shape[-1])
            weight = weight.T if turned else weight
            y = nn.functional.linear(x, weight, None if bias is None else bias[expert])
            yield ExpertCall(self.projections[expert], tokens, x, y, weight)

    def list_multiplied(self, token: int) -> list[Multiplied]:
        return [
            Multiplied(
                self.projections[expert], float(self._weights[token, place]), self._x[token, place].float().cpu()
            )
            for place, expert in enumerate(self._index[token].tolist())
            if expert in self.projections  # the zero experts of LongCat have no down projection
        ]


Source = LinearSource | _Experts


class _StackedExperts(Protocol):
    """The attributes that are used of a module of stacked experts in transformers."""

    gate_up_proj: Tensor
    up_proj: Tensor  # instead of gate_up_proj, if the experts have no gate (Nemotron-H)
    down_proj: Tensor
    act_fn: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]


def _compute_expert_neurons(module: nn.Module, hidden: Tensor, index: Tensor, known: Collection[int]) -> Tensor:
    """Compute the inputs of the down projections of each token's chosen experts: (tokens, chosen, cols).

    A hook cannot observe these inputs, because the down projections of stacked experts are not modules. They are
    computed again from the inputs of the experts. `index` contains the numbers of the chosen experts: (tokens, chosen).
    `hidden` is (tokens, channels), or (tokens, experts, channels) if each expert has its own input. `known` contains
    the numbers of the experts that have a down projection. The result is 0 for any other expert.
    """
    experts = cast("_StackedExperts", module)
    gated = hasattr(module, "gate_up_proj")
    found: Tensor | None = None
    for expert in sorted(set(index.flatten().tolist()) & set(known)):
        token, place = (index == expert).nonzero(as_tuple=True)
        given = hidden[token] if hidden.dim() == 2 else hidden[token, place]
        weight = experts.gate_up_proj[expert] if gated else experts.up_proj[expert]
        turned = getattr(module, "is_transposed", weight.shape[0] == given.shape[-1])
        gate_up = given @ (weight if turned else weight.T)
        bias: Tensor | None = getattr(module, "gate_up_proj_bias", None)
        if bias is not None:
            gate_up = gate_up + bias[expert]
        if not gated:
            x = experts.act_fn(gate_up)
        elif hasattr(module, "_apply_gate"):  # all expert classes of transformers except Llama 4's
            x = experts._apply_gate(gate_up)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            x = experts.act_fn(gate) * up
        if found is None:
            found = x.new_zeros(*index.shape, x.shape[-1])
        found[token, place] = x
    return found if found is not None else hidden.new_zeros(*index.shape, 1)


def find_sources(model: LayeredModel) -> tuple[list[list[Source]], list[int]]:
    """Find the modules of the down projections in the loaded model.

    Returns the observed modules of each layer, and the numbers of the layers with a down projection whose module was
    not found or cannot be observed.
    """
    modules = dict(model.model.named_modules(remove_duplicate=False))
    config, shapes = model.checkpoint.config, model.checkpoint.shapes
    sources: list[list[Source]] = [[] for _ in model.layers]
    stacks: dict[nn.Module, _Experts] = {}
    unseen: set[int] = set()
    for projection in list_down_projections(config, shapes):
        if projection.layer >= len(sources):
            continue
        path, module, name = find_loaded_module(modules, config, shapes, projection)
        if module is None:
            unseen.add(projection.layer)
        elif not has_residual_rows(config, projection):
            weight = module._parameters[name]  # the layers of Zamba share it
            sharing = (n for n, layer in enumerate(model.layers) if any(one is weight for one in layer.parameters()))
            unseen.update(sharing)
        elif isinstance(projection.expert, int):
            if name == "weight" or not (hasattr(module, "gate_up_proj") or hasattr(module, "up_proj")):
                # each expert is a module
                unseen.add(projection.layer)
                continue
            if module not in stacks:
                stacks[module] = _Experts(module)
                sources[projection.layer].append(stacks[module])
            stacks[module].projections[projection.expert] = projection
        else:
            gate = modules.get(f"{path.rpartition('.')[0]}_gate") if projection.expert == "shared" else None
            sources[projection.layer].append(LinearSource(projection, module, gate))
    return sources, sorted(unseen)


def list_unread(model: LayeredModel, unseen: Sequence[int]) -> tuple[UnreadLayer, ...]:
    """List the layers whose MLP `LayerSpikes` does not observe, or observes only in part.

    `unseen` contains the numbers of the layers with a known down projection that cannot be observed.
    """
    config, shapes = model.checkpoint.config, model.checkpoint.shapes
    projections = list(list_down_projections(config, shapes))
    unread = {layer.layer: layer for layer in list_unread_layers(config, shapes, projections)}
    for number in unseen:
        hidden = [p for p in projections if p.layer == number]
        hidden = hidden or [p for p in projections if not has_residual_rows(config, p)]  # a block of another layer
        experts = tuple(p.expert for p in hidden if isinstance(p.expert, int))
        unread[number] = UnreadLayer(number, experts, tuple(dict.fromkeys(p.tensor for p in hidden)))
    return tuple(unread[number] for number in sorted(unread))


def find_loaded_module(
    modules: Mapping[str, nn.Module], config: Mapping[str, Any], shapes: Shapes, projection: DownProjection
) -> tuple[str, nn.Module | None, str]:
    """Find the module of a down projection in the loaded model. Returns its path, the module and the weight's name.

    The module is None if the loaded model does not contain the projection.
    """
    coordinate = Coordinate(projection.tensor, projection.find_index(0, 0))
    for candidate in list_loaded_candidates(config, coordinate, shapes):
        path, _, name = candidate.tensor.rpartition(".")
        if path in modules and name in modules[path]._parameters:
            return path, modules[path], name
    return "", None, ""


class SourceWatch:
    """Observes the sources of each layer while a model runs. It is a Watch of forward.py.

    `sources` contains the sources of each layer. After a run, `inputs`, `outputs` and `residuals` contain the values of
    a `Profile`, and `broken` is the number of the first layer whose hidden states are not all finite, or None.
    """

    method: ClassVar[Method]

    def __init__(self, model: LayeredModel, sources: Sequence[Sequence[Source]]):
        self.model, self.sources = model, sources
        self.clear_profile()

    def clear_profile(self) -> None:
        self.inputs, self.outputs, self.residuals = ([math.nan] * len(self.model.layers) for _ in range(3))
        self.broken: int | None = None

    def make_profile(self) -> Profile:
        return Profile(tuple(self.inputs), tuple(self.outputs), tuple(self.residuals))

    @contextlib.contextmanager
    def around(self, number: int, layer: nn.Module, rows: Sequence[tuple[int, int]]) -> Iterator[None]:
        handles: list[RemovableHandle] = []
        try:
            for source in self.sources[number]:
                handles += source.watch()
            handles += self.watch_layer(layer)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def watch_layer(self, layer: nn.Module) -> list[RemovableHandle]:
        """Observe further modules of a layer; none in this class."""
        return []

    def refuse_streams(self, hidden: Tensor) -> None:
        """Raise Unrunnable if a layer passes several residual streams on."""
        if hidden.ndim != 3:  # Gemma 3n and DeepSeek-V4
            raise Unrunnable(
                f"its layers pass several residual streams on, and a scan by {self.method} follows one",
                self.model.checkpoint.root,
            )

    def keep_residuals(self, number: int, hidden: Tensor) -> None:
        """Keep the largest of the hidden states after a layer, of any shape."""
        if self.broken is None and not bool(hidden.isfinite().all()):
            self.broken = number
        set_largest(self.residuals, number, hidden)


def set_largest(profile: list[float], layer: int, values: Tensor) -> None:
    """Set `profile[layer]` to the element of `values` with the largest magnitude, unless it is already larger."""
    if values.numel():
        flat = values.flatten()
        value = float(flat[flat.abs().argmax()])
        if math.isnan(profile[layer]) or abs(value) > abs(profile[layer]):
            profile[layer] = value
