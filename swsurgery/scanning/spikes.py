"""What the down projections do to the residual stream, watched while a model runs layer by layer.

`LayerSpikes` keeps, of every sequence, the hidden states after each layer, and of every place where an MLP makes or
takes away a massive one (`Move`) what its down projections multiplied there. A mixture of experts has no module whose
input could be watched: what its chosen experts multiply is computed here once more, from what the experts were called
with. Where a norm follows the MLP (Gemma 3, OLMo 2) it is the norm's output that reaches the residual stream, so both
sides of it are kept.

This room measures. It reads no shard, and what counts as a super weight is decided in activations.py.

Memory: hidden states of all tokens after all layers in float32 (7B, five prompts of ten tokens: 26 MB), and one vector
of neurons for each token that has a massive place.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from swsurgery.checkpoint.architectures import Shapes
from swsurgery.checkpoint.projections import DownProjection, down_projections, loaded_candidates
from swsurgery.errors import Unrunnable
from swsurgery.model.forward import LayeredModel
from swsurgery.progress import Progress
from swsurgery.scanning.coverage import unread_layers
from swsurgery.scanning.report import UnreadLayer
from swsurgery.storage.coordinate import Coordinate

MASSIVE = 400.0
"""A hidden state is massive from this many medians of |hidden state| of its layer and sequence on.

Calibrated on SmolLM2-135M-Instruct: the channel that its super weights make in layer 2 has 589 to 899 medians, what
layer 1 puts there before, on which little depends, 200 to 300, and any other channel before layer 11 at most 160.
arXiv:2402.17762 takes about 1,000; layer 2 would be missed. Random weights give 3 to 10.
"""

MADE = 0.3
"""An MLP makes (or takes away) a massive state if it adds at least this share of it. Calibrated as MASSIVE was: layer 2
adds 0.57 to 0.80, layer 11 0.998; layers 28 and 9 take 0.53 to 0.66 and 0.76 to 0.87, layer 8 at most 0.16."""

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Multiplied:
    """What one down projection multiplied for one token: its neurons x (cols,), float32. Its output entered the MLP's
    with the factor `share`, the router's for an expert."""

    projection: DownProjection
    share: float
    x: Tensor


@dataclass(frozen=True)
class TokenRecord:
    """One token in one layer: all that its down projections multiplied, and of the MLP's output for it the largest and
    the median magnitude."""

    multiplied: tuple[Multiplied, ...]
    largest: float
    typical: float


@dataclass(frozen=True)
class Move:
    """An MLP that makes or takes away a massive hidden state: `output` is what the down projection gave for it,
    `added` what reached the residual stream (the same but for a norm in between), `after` the state behind the layer
    and `median` that of the layer's magnitudes."""

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
        """Does it push the state to where it is after the layer?"""
        return self.added * self.after > 0


@dataclass
class Trace:
    """One sequence: by layer the hidden states (tokens, channels), float32 on the CPU, and the median magnitude; and
    all moves by (layer, token, channel)."""

    hidden: list[Tensor] = field(default_factory=list)
    medians: list[float] = field(default_factory=list)
    moves: dict[tuple[int, int, int], Move] = field(default_factory=dict)


class LayerSpikes:
    """Runs a model and watches it. `unseen` are the layers with a down projection that the loaded model does not show
    in a form that is known here, `unread` those with an MLP whose stored names are not known, or that is unseen. Raises
    ArchitectureError where the model has no known down projection at all."""

    def __init__(self, model: LayeredModel):
        self.model = model
        self._sources, self.unseen = _find_sources(model)
        self.unread = _unread(model, self.unseen)
        self._clear(0)

    def run(
        self, sequences: Sequence[Sequence[int]], removed: Sequence[Coordinate], progress: Progress | None = None
    ) -> list[Trace]:
        """The traces of all sequences with the scalars `removed` at zero."""
        self._clear(len(sequences))
        for _ in self.model.run(sequences, [dict.fromkeys(removed, 0.0)], watch=self, progress=progress):
            pass  # the logits are never asked for
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
                    handles.append(module.register_forward_hook(self._note_norm))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def after(self, number: int, rows: Sequence[tuple[int, int]], hidden: Tensor) -> None:
        if hidden.ndim != 3:  # Gemma 3n and DeepSeek-V4 pass several on
            raise Unrunnable(
                "its layers pass several residual streams on, and a scan by activations follows one",
                self.model.checkpoint.root,
            )
        if self.broken is None and not bool(hidden.isfinite().all()):
            self.broken = number
        sources = [source for source in self._sources[number] if source.called]
        flat = hidden.reshape(-1, hidden.shape[-1])
        output = sum((source.output(len(flat)) for source in sources), torch.zeros_like(flat, dtype=torch.float32))
        added = self._behind_norm(output) * self._multiplier
        _note_largest(self.residuals, number, hidden)
        if sources:
            _note_largest(self.outputs, number, output)
        for source in sources:
            _note_largest(self.inputs, number, source.neurons())
        for row, (sequence, _) in enumerate(rows):
            tokens = range(row * hidden.shape[1], (row + 1) * hidden.shape[1])
            self._look(number, self.traces[sequence], hidden[row], output[tokens], added[tokens], sources, tokens.start)
        for source in sources:
            source.forget()

    def _note_norm(self, module: nn.Module, arguments: tuple[object, ...], output: object) -> None:
        if arguments and isinstance(arguments[0], Tensor) and isinstance(output, Tensor):
            self._normed.append((arguments[0], output))

    def _behind_norm(self, output: Tensor) -> Tensor:
        """What became of the MLP's output before it was added to the residual stream: itself, or what a norm that was
        called with just these values made of it."""
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
        sources: Sequence[_Source],
        start: int,
    ) -> None:
        """Add one layer to the trace of one sequence, whose first token is number `start` of the batch."""
        hidden, output, added = (tensor.float().cpu() for tensor in (hidden, output, added))
        median = max(float(hidden.abs().median()), TINY)
        # Before the first layer nothing is known, so nothing can be taken away there.
        before = trace.hidden[-1] if trace.hidden else torch.zeros_like(hidden)
        median_before = trace.medians[-1] if trace.medians else median
        trace.hidden.append(hidden)
        trace.medians.append(median)
        massive = (hidden.abs() >= MASSIVE * median) | (before.abs() >= MASSIVE * median_before)
        moved = massive & (added.abs() >= MADE * torch.maximum(hidden.abs(), before.abs())) & (added != 0)
        records: dict[int, TokenRecord] = {}
        for token, channel in moved.nonzero().tolist():
            if token not in records:
                multiplied = tuple(part for source in sources for part in source.multiplied(start + token))
                sizes = output[token].abs()
                records[token] = TokenRecord(multiplied, float(sizes.max()), float(sizes.median()))
            at = (token, channel)
            trace.moves[(number, *at)] = Move(
                number, *at, float(output[at]), float(added[at]), float(hidden[at]), median, records[token]
            )


class _Linear:
    """The down projection of a dense or shared MLP, and the gate that scales the shared one where there is any."""

    def __init__(self, projection: DownProjection, module: nn.Module, gate: nn.Module | None):
        self.projection, self.module, self.gate = projection, module, gate
        self.forget()

    def forget(self) -> None:
        self.called, self._x, self._y = False, torch.empty(0), torch.empty(0)
        self._gate: Tensor | None = None

    def watch(self) -> list[RemovableHandle]:
        handles = [self.module.register_forward_hook(self._note)]
        if self.gate is not None:
            handles.append(self.gate.register_forward_hook(self._note_gate))
        return handles

    def _note(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        # Falcon and Llama 4 go on to add to this very tensor.
        self.called, self._x, self._y = True, arguments[0], output.clone()

    def _note_gate(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        self._gate = output.float().sigmoid().flatten()

    def output(self, tokens: int) -> Tensor:
        """(tokens, channels), float32: what it adds to the MLP's output."""
        y = self._y.reshape(tokens, -1).float()
        return y if self._gate is None else y * self._gate[:, None]

    def neurons(self) -> Tensor:
        return self._x

    def multiplied(self, token: int) -> list[Multiplied]:
        x = self._x.reshape(-1, self._x.shape[-1])[token].float().cpu()
        return [Multiplied(self.projection, 1.0 if self._gate is None else float(self._gate[token]), x)]


class _Experts:
    """The routed experts of a layer in the stacked form of transformers >= 5."""

    def __init__(self, module: nn.Module):
        self.projections: dict[int, DownProjection] = {}
        self.module = module
        self.forget()

    def forget(self) -> None:
        self.called, self._y = False, torch.empty(0)
        self._x = self._index = self._weights = torch.empty(0)

    def watch(self) -> list[RemovableHandle]:
        return [self.module.register_forward_hook(self._note, with_kwargs=True)]

    def _note(self, module: nn.Module, arguments: tuple[object, ...], named: dict[str, object], output: Tensor) -> None:
        """Called with hidden states (tokens, channels), the chosen experts and their shares (tokens, chosen). Llama 4
        gives only hidden states, (experts * tokens, channels), that the router has already scaled, zero where an
        expert is not chosen."""
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
        self._x = _expert_neurons(module, hidden, self._index)
        self.called = True

    def output(self, tokens: int) -> Tensor:
        return self._y.reshape(tokens, -1).float()

    def neurons(self) -> Tensor:
        return self._x

    def multiplied(self, token: int) -> list[Multiplied]:
        return [
            Multiplied(
                self.projections[expert], float(self._weights[token, place]), self._x[token, place].float().cpu()
            )
            for place, expert in enumerate(self._index[token].tolist())
        ]


_Source = _Linear | _Experts


class _StackedExperts(Protocol):
    """The parts that transformers' modules of stacked experts have in common."""

    gate_up_proj: Tensor
    act_fn: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]


def _expert_neurons(module: nn.Module, hidden: Tensor, index: Tensor) -> Tensor:
    """What each token's chosen experts (tokens, chosen) put into their down projections: (tokens, chosen, cols).

    `hidden` is (tokens, channels), or (tokens, experts, channels) where each expert is given its own.
    """
    experts = cast("_StackedExperts", module)
    found: Tensor | None = None
    for expert in sorted(set(index.flatten().tolist())):
        token, place = (index == expert).nonzero(as_tuple=True)
        given = hidden[token] if hidden.dim() == 2 else hidden[token, place]
        weight = experts.gate_up_proj[expert]
        turned = getattr(module, "is_transposed", weight.shape[0] == given.shape[-1])
        gate_up = given @ (weight if turned else weight.T)
        bias: Tensor | None = getattr(module, "gate_up_proj_bias", None)
        if bias is not None:
            gate_up = gate_up + bias[expert]
        if hasattr(module, "_apply_gate"):  # of every class that transformers calls experts, but Llama 4's
            x = experts._apply_gate(gate_up)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            x = experts.act_fn(gate) * up
        if found is None:
            found = x.new_zeros(*index.shape, x.shape[-1])
        found[token, place] = x
    return found if found is not None else hidden.new_zeros(*index.shape, 1)


def _find_sources(model: LayeredModel) -> tuple[list[list[_Source]], list[int]]:
    """By layer the modules that hold its down projections in the loaded model, and the layers where one is missing."""
    modules = dict(model.model.named_modules(remove_duplicate=False))
    config, shapes = model.checkpoint.config, model.checkpoint.shapes
    sources: list[list[_Source]] = [[] for _ in model.layers]
    stacks: dict[nn.Module, _Experts] = {}
    unseen: set[int] = set()
    for projection in down_projections(config, shapes):
        if projection.layer >= len(sources):
            continue
        path, module, name = _loaded_module(modules, config, shapes, projection)
        if module is None:
            unseen.add(projection.layer)
        elif isinstance(projection.expert, int):
            if name == "weight" or not hasattr(module, "gate_up_proj"):  # experts as modules of their own
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


def _unread(model: LayeredModel, unseen: Sequence[int]) -> tuple[UnreadLayer, ...]:
    """The layers whose MLP is not watched, or not all of it."""
    config, shapes = model.checkpoint.config, model.checkpoint.shapes
    projections = list(down_projections(config, shapes))
    unread = {layer.layer: layer for layer in unread_layers(config, shapes, projections)}
    for number in unseen:
        hidden = [p for p in projections if p.layer == number]
        experts = tuple(p.expert for p in hidden if isinstance(p.expert, int))
        unread[number] = UnreadLayer(number, experts, tuple(dict.fromkeys(p.tensor for p in hidden)))
    return tuple(unread[number] for number in sorted(unread))


def _loaded_module(
    modules: Mapping[str, nn.Module], config: Mapping[str, Any], shapes: Shapes, projection: DownProjection
) -> tuple[str, nn.Module | None, str]:
    """The path of the module that holds a down projection in the loaded model, the module, and the weight's name."""
    coordinate = Coordinate(projection.tensor, projection.index(0, 0))
    for candidate in loaded_candidates(config, coordinate, shapes):
        path, _, name = candidate.tensor.rpartition(".")
        if path in modules and name in modules[path]._parameters:
            return path, modules[path], name
    return "", None, ""


def _note_largest(profile: list[float], layer: int, values: Tensor) -> None:
    """Keep the signed value of the largest magnitude."""
    if values.numel():
        flat = values.flatten()
        value = float(flat[flat.abs().argmax()])
        if math.isnan(profile[layer]) or abs(value) > abs(profile[layer]):
            profile[layer] = value
