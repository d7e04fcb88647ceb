"""Observe what the down projections add to the residual stream while a model runs layer by layer.

For every sequence, `LayerSpikes` stores the hidden states after each layer. A hidden state is massive if its magnitude
is at least `MASSIVE` times the median of its layer. For every massive state that an MLP makes or removes (`Move`),
`LayerSpikes` stores the inputs of the down projections. If a norm follows the MLP (Gemma 3, OLMo 2), the residual
stream receives the output of the norm. Then both the MLP's output and the norm's output are stored.

This module reads no shard and decides nothing: by_activations.py decides which scalars are super weights.

Memory use: the hidden states of all tokens after all layers in float32 (for a 7B model and five prompts of ten tokens,
26 MB), and the inputs of the down projections for each token with a massive state.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

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
from swsurgery.progress import Progress
from swsurgery.scanning.coverage import list_unread_layers
from swsurgery.scanning.report import UnreadLayer
from swsurgery.storage.coordinate import Coordinate

MASSIVE = 400.0
"""Minimum magnitude of a massive hidden state, divided by the median magnitude in the same layer and sequence.

Calibrated on SmolLM2-135M-Instruct. In layer 2 the quotient is 589 to 899 for the channel that the super weights make
massive. In layer 1, before they act, it is 200 to 300 for this channel, and zeroing the channel there changes little.
For any other channel before layer 11 it is at most 160. arXiv:2402.17762 requires about 1,000, which would miss layer
2. In models with random weights the largest quotient is 3 to 10.
"""

MADE = 0.3
"""Minimum value that an MLP adds to a massive state if it makes or removes the state, as a share of the state.
Calibrated like MASSIVE: layer 2 adds 0.57 to 0.80 of a state and layer 11 adds 0.998. Layer 28 removes 0.53 to 0.66
and layer 9 removes 0.76 to 0.87. Layer 8 removes no state and changes at most 0.16."""

TINY = torch.finfo(torch.float32).tiny
"""The smallest normal float32. A smaller median is replaced with it, so that no threshold is zero."""


@dataclass(frozen=True)
class Multiplied:
    """The input `x` of one down projection for one token: (cols,), float32.

    The output of the projection is multiplied by `share` before it is added to the MLP's output. `share` is 1 in a
    dense MLP, the router's weight for a routed expert, and the value of the gate for a shared MLP that has a gate.
    """

    projection: DownProjection
    share: float
    x: Tensor


@dataclass(frozen=True)
class TokenRecord:
    """What the MLP of one layer computed for one token.

    `multiplied` contains the inputs of the layer's down projections; there are several if the layer has experts.
    `largest` and `typical` are the largest and the median magnitude of the MLP's output over the channels.
    """

    multiplied: tuple[Multiplied, ...]
    largest: float
    typical: float


@dataclass(frozen=True)
class Move:
    """A massive hidden state that the MLP of `layer` makes or removes, in `channel` of `token`.

    `output` is the MLP's output in this channel, and `added` is the value that is added to the residual stream. They
    differ if a norm or a multiplier follows the MLP. `after` is the hidden state after the layer. `median` is the
    median magnitude of the hidden states of the sequence after the layer.
    """

    layer: int
    token: int
    channel: int
    output: float
    added: float
    after: float
    median: float
    record: TokenRecord

    @property
    def makes(self) -> bool:
        """True if the value that the MLP adds has the sign of the state after the layer: the MLP makes the state."""
        return self.added * self.after > 0


@dataclass
class Trace:
    """What was observed while the model ran on one sequence.

    `hidden` contains the hidden states after each layer: (tokens, channels), float32, on the CPU. `medians` contains
    the median magnitude of the hidden states after each layer. `moves` contains all moves by (layer, token, channel).
    """

    hidden: list[Tensor] = field(default_factory=list)
    medians: list[float] = field(default_factory=list)
    moves: dict[tuple[int, int, int], Move] = field(default_factory=dict)


class LayerSpikes:
    """Runs a model and observes its down projections.

    `unseen` contains the numbers of the layers with a stored down projection that cannot be observed in the loaded
    model. `unread` contains these layers and the layers with an MLP under unknown tensor names. After a run, `inputs`,
    `outputs` and `residuals` contain the signed value of largest magnitude in each layer: among the inputs of the down
    projections, among the MLP's outputs, and among the hidden states after the layer. Raises ArchitectureError if the
    checkpoint has no known down projection.
    """

    def __init__(self, model: LayeredModel):
        self.model = model
        self._sources, self.unseen = find_sources(model)
        self.unread = list_unread(model, self.unseen)
        self._clear(0)

    def run(
        self, sequences: Sequence[Sequence[int]], removed: Sequence[Coordinate], progress: Progress | None = None
    ) -> list[Trace]:
        """Run the model on all sequences with the scalars `removed` set to zero. Returns one trace per sequence."""
        self._clear(len(sequences))
        for _ in self.model.run(sequences, [dict.fromkeys(removed, 0.0)], watch=self, progress=progress):
            pass  # the logits are not needed
        return self.traces

    def _clear(self, sequences: int) -> None:
        count = len(self.model.layers)
        self.traces = [Trace() for _ in range(sequences)]
        self.inputs, self.outputs, self.residuals = ([math.nan] * count for _ in range(3))
        self.broken: int | None = None  # the first layer whose hidden states are not all finite

    # The Watch of forward.py ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def around(self, number: int, layer: nn.Module, rows: Sequence[tuple[int, int]]) -> Iterator[None]:
        self._normed: list[tuple[Tensor, Tensor]] = []
        self._multiplier = float(getattr(layer, "residual_multiplier", 1.0))  # Granite
        handles: list[RemovableHandle] = []
        try:
            for source in self._sources[number]:
                handles += source.watch()
            for module in layer.modules():
                if "norm" in type(module).__name__.lower():
                    handles.append(module.register_forward_hook(self._keep_norm))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def after(self, number: int, rows: Sequence[tuple[int, int]], hidden: Tensor) -> None:
        if hidden.ndim != 3:  # Gemma 3n and DeepSeek-V4 pass several streams on
            raise Unrunnable(
                "its layers pass several residual streams on, and a scan by activations follows one",
                self.model.checkpoint.root,
            )
        if self.broken is None and not bool(hidden.isfinite().all()):
            self.broken = number
        sources = [source for source in self._sources[number] if source.called]
        flat = hidden.reshape(-1, hidden.shape[-1])
        output = sum((source.output(len(flat)) for source in sources), torch.zeros_like(flat, dtype=torch.float32))
        added = self._find_normed(output) * self._multiplier
        set_largest(self.residuals, number, hidden)
        if sources:
            set_largest(self.outputs, number, output)
        for source in sources:
            set_largest(self.inputs, number, source.neurons())
        for row, (sequence, _) in enumerate(rows):
            tokens = range(row * hidden.shape[1], (row + 1) * hidden.shape[1])
            self._look(number, self.traces[sequence], hidden[row], output[tokens], added[tokens], sources, tokens.start)
        for source in sources:
            source.forget()

    def _keep_norm(self, module: nn.Module, arguments: tuple[object, ...], output: object) -> None:
        if arguments and isinstance(arguments[0], Tensor) and isinstance(output, Tensor):
            self._normed.append((arguments[0], output))

    def _find_normed(self, output: Tensor) -> Tensor:
        """Return the output of the norm that follows the MLP: (tokens, channels), float32.

        It is the norm whose input was `output`, the output of the MLP. Returns `output` itself if no norm follows.
        """
        for given, made in self._normed:
            if given.numel() == output.numel() and torch.allclose(given.reshape(output.shape).float(), output):
                return made.reshape(output.shape).float()
        return output

    def _look(
        self,
        number: int,
        trace: Trace,
        hidden: Tensor,
        output: Tensor,
        added: Tensor,
        sources: Sequence[Source],
        start: int,
    ) -> None:
        """Add what one layer computed for one sequence to the trace of the sequence.

        `start` is the number of the sequence's first token among all tokens of the batch.
        """
        hidden, output, added = (tensor.float().cpu() for tensor in (hidden, output, added))
        median = max(float(hidden.abs().median()), TINY)
        # The state before the first layer is not known, so the first layer cannot remove anything.
        before = trace.hidden[-1] if trace.hidden else torch.zeros_like(hidden)
        median_before = trace.medians[-1] if trace.medians else median
        trace.hidden.append(hidden)
        trace.medians.append(median)
        massive = (hidden.abs() >= MASSIVE * median) | (before.abs() >= MASSIVE * median_before)
        moved = massive & (added.abs() >= MADE * torch.maximum(hidden.abs(), before.abs())) & (added != 0)
        records: dict[int, TokenRecord] = {}
        for token, channel in moved.nonzero().tolist():
            if token not in records:
                multiplied = tuple(part for source in sources for part in source.list_multiplied(start + token))
                sizes = output[token].abs()
                records[token] = TokenRecord(multiplied, float(sizes.max()), float(sizes.median()))
            at = (token, channel)
            trace.moves[(number, *at)] = Move(
                number, *at, float(output[at]), float(added[at]), float(hidden[at]), median, records[token]
            )


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


class _Linear:
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


Source = _Linear | _Experts


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
        path, module, name = _find_loaded_module(modules, config, shapes, projection)
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
            sources[projection.layer].append(_Linear(projection, module, gate))
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


def _find_loaded_module(
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


def set_largest(profile: list[float], layer: int, values: Tensor) -> None:
    """Set `profile[layer]` to the element of `values` with the largest magnitude, unless it is already larger."""
    if values.numel():
        flat = values.flatten()
        value = float(flat[flat.abs().argmax()])
        if math.isnan(profile[layer]) or abs(value) > abs(profile[layer]):
            profile[layer] = value
