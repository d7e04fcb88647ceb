"""Observe what the down projections add to the residual stream while a model runs layer by layer.

For every sequence, `LayerSpikes` stores the hidden states after each layer. A hidden state is massive if its magnitude
is at least `OUTSTANDING` times the typical channel maximum of its layer. For every massive state that a layer makes or
removes (`Move`), `LayerSpikes` stores the inputs of the down projections. If a norm follows the MLP (Gemma 3, OLMo 2),
the residual stream receives the output of the norm. Then both the MLP's output and the norm's output are stored.

This module reads no shard and decides nothing: by_activations.py decides which scalars are super weights.

Memory use: the hidden states of all tokens after all layers in float32 (for a 7B model and five prompts of ten tokens,
26 MB), and the inputs of the down projections for each token with a massive state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from swsurgery.model.forward import LayeredModel
from swsurgery.progress import Progress
from swsurgery.scanning.sources import (
    LinearSource,
    Multiplied,
    Source,
    SourceWatch,
    find_sources,
    list_unread,
    set_largest,
)
from swsurgery.storage.coordinate import Coordinate

OUTSTANDING = 8.0
"""Minimum magnitude of a massive hidden state, divided by the typical channel maximum of its layer and prompt.

The typical channel maximum is the median over the channels of the largest magnitude of each channel, over all tokens.
In 288 random models of 20 shapes the largest quotient of a state that persists is 2.6. In nine small trained models,
it is 24 to 48 if the model has a massive activation on the first token, 8.7 for a weak one, and at most 3.6 if there is
none. In SmolLM2-135M-Instruct, it is over 100 in layer 2 and about 500 in layer 11. The limit is the geometric mean of
2.6 and 24."""

LEAST_MAXIMUM = 3.0
"""Minimum typical channel maximum, in medians of the layer. It applies to prompts of one or two tokens. With ten
normally distributed tokens, the typical channel maximum is 2.7 medians."""

MADE = 0.3
"""Minimum value that a layer or its MLP adds to a massive state if it makes or removes the state, as a share of the
state. Calibrated on SmolLM2-135M-Instruct: layer 2 adds 0.57 to 0.80 of a state and layer 11 adds 0.998. Layer 28
removes 0.53 to 0.66 and layer 9 removes 0.76 to 0.87. Layer 8 removes no state and changes at most 0.16."""

TINY = torch.finfo(torch.float32).tiny
"""The smallest normal float32. A smaller median is replaced with it, so that no threshold is zero."""


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
    """A massive hidden state that `layer` makes or removes, in `channel` of `token`.

    `before` and `after` are the hidden states before and after the layer. `output` is the MLP's output in this channel,
    and `added` is the value that the MLP adds to the residual stream. They differ if a norm or a multiplier follows the
    MLP. `median` is the median magnitude of the hidden states of the sequence after the layer. `massive` is True if the
    state after the layer is massive.
    """

    layer: int
    token: int
    channel: int
    before: float
    after: float
    output: float
    added: float
    median: float
    massive: bool
    record: TokenRecord

    @property
    def change(self) -> float:
        """The value that the whole layer adds to the hidden state."""
        return self.after - self.before

    @property
    def raises(self) -> bool:
        """True if the layer makes a massive state: it adds at least `MADE` of the state."""
        return self.massive and self.change * self.after > 0 and abs(self.change) >= MADE * abs(self.after)

    @property
    def made_by_mlp(self) -> bool:
        """True if the MLP adds at least `MADE` of a massive state."""
        return self.massive and self.added * self.after > 0 and abs(self.added) >= MADE * abs(self.after)


@dataclass
class Trace:
    """What was observed while the model ran on one sequence.

    `entry` contains the hidden states before the first layer, or None if they were not observed. `hidden` contains the
    hidden states after each layer: (tokens, channels), float32, on the CPU. `medians` contains the median magnitude of
    the hidden states after each layer, and `bars` the magnitude from which they are massive. `moves` contains all moves
    by (layer, token, channel). `shared` contains the massive outputs of MLPs that several layers share, as moves from
    0, by the layer that uses the MLP, the token and the channel.
    """

    entry: Tensor | None = None
    hidden: list[Tensor] = field(default_factory=list)
    medians: list[float] = field(default_factory=list)
    bars: list[float] = field(default_factory=list)
    moves: dict[tuple[int, int, int], Move] = field(default_factory=dict)
    shared: dict[tuple[int, int, int], Move] = field(default_factory=dict)

    def add_layer(self, hidden: Tensor) -> Tensor:
        """Add the hidden states after one more layer, and return their magnitudes."""
        magnitudes = hidden.abs()
        median = max(float(magnitudes.median()), TINY)
        self.hidden.append(hidden)
        self.medians.append(median)
        self.bars.append(compute_bar(magnitudes, median))
        return magnitudes


def compute_bar(magnitudes: Tensor, median: float) -> float:
    """Compute the magnitude from which the hidden states of one layer and prompt are massive.

    `magnitudes` contains the magnitudes of the hidden states, (tokens, channels), and `median` their median.
    """
    typical = float(magnitudes.amax(dim=0).median())
    return OUTSTANDING * max(typical, LEAST_MAXIMUM * median)


PADDED = 64
"""Maximum length in tokens of a sequence that is padded."""


def fill_sequences(sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    """Pad short sequences on the right, so that sequences of similar length run in one batch.

    Each pass through a layer reads all its weights, so fewer batches are faster. A token is never influenced by later
    tokens, so padding changes nothing before it. A sequence is padded to at most twice its length.
    """
    padded = [list(ids) for ids in sequences]
    longest = 0
    for ids in sorted(padded, key=len, reverse=True):
        if len(ids) > PADDED or 2 * len(ids) < longest or not longest:
            longest = len(ids)
        ids += [ids[-1]] * (min(longest, PADDED) - len(ids))
    return padded


def read_multiplier(layer: nn.Module) -> float:
    """Return the number by which a layer multiplies the output of its down projection before adding it."""
    of_residual = float(getattr(layer, "residual_multiplier", 1.0))  # Granite
    return of_residual * float(getattr(getattr(layer, "feed_forward", None), "down_multiplier", 1.0))  # Falcon-H1


class LayerSpikes(SourceWatch):
    """Runs a model and observes its down projections.

    `unseen` contains the numbers of the layers with a stored down projection that cannot be observed in the loaded
    model. `unread` contains these layers and the layers with an MLP under unknown tensor names. After a run, `inputs`,
    `outputs` and `residuals` contain the signed value of largest magnitude in each layer: among the inputs of the down
    projections, among the MLP's outputs, and among the hidden states after the layer. `shared` contains, for each
    layer, the sources of MLPs that several layers share and whose output is not added to the residual stream. Raises
    ArchitectureError if the checkpoint has no known down projection.
    """

    method = "activations"

    def __init__(self, model: LayeredModel, shared: Sequence[Sequence[LinearSource]] = ()):
        sources, unseen = find_sources(model)
        super().__init__(model, sources)
        self.shared = shared or [[] for _ in model.layers]
        self.unseen = [layer for layer in unseen if not self.shared[layer]]
        self.unread = list_unread(model, self.unseen)
        self._clear(0)

    def run(
        self,
        sequences: Sequence[Sequence[int]],
        removed: Sequence[Coordinate],
        progress: Progress | None = None,
        searched: int | None = None,
    ) -> list[Trace]:
        """Run the model on all sequences with the scalars `removed` set to zero. Returns one trace per sequence.

        Only the first `searched` sequences (None: all) have moves and count for the profile.
        """
        self._clear(len(sequences))
        self._searched = len(sequences) if searched is None else searched
        self._lengths = [len(ids) for ids in sequences]
        padded = fill_sequences(sequences)
        for _ in self.model.run(padded, [dict.fromkeys(removed, 0.0)], watch=self, progress=progress):
            pass  # the logits are not needed
        return self.traces

    def _clear(self, sequences: int) -> None:
        self.clear_profile()
        self._searched, self._lengths = sequences, [0] * sequences
        self.traces = [Trace() for _ in range(sequences)]

    # The Watch of forward.py ----------------------------------------------------------------------------------------

    def watch_layer(self, layer: nn.Module) -> list[RemovableHandle]:
        self._normed: list[tuple[Tensor, Tensor]] = []
        self._multiplier = read_multiplier(layer)
        norms = [module for module in layer.modules() if "norm" in type(module).__name__.lower()]
        handles = [norm.register_forward_hook(self._keep_norm) for norm in norms]
        number = next(number for number, one in enumerate(self.model.layers) if one is layer)
        for source in self.shared[number]:
            handles += source.watch()
        self._entry: Tensor | None = None
        if layer is self.model.layers[0]:
            handles.append(layer.register_forward_pre_hook(self._keep_entry))
        return handles

    def after(self, number: int, rows: Sequence[tuple[int, int]], hidden: Tensor) -> None:
        self.refuse_streams(hidden)
        sources = [source for source in self.sources[number] if source.called]
        length = hidden.shape[1]
        flat = hidden.reshape(-1, hidden.shape[-1])
        output = sum((source.output(len(flat)) for source in sources), torch.zeros_like(flat, dtype=torch.float32))
        added = self._find_normed(output) * self._multiplier
        inputs = [source.neurons().reshape(len(rows), length, -1) for source in sources]
        for row, (sequence, _) in enumerate(rows):
            begin, tokens = row * length, self._lengths[sequence]
            trace, here = self.traces[sequence], slice(row * length, row * length + tokens)
            state = hidden[row, :tokens]
            if self._entry is not None and self._entry.shape == hidden.shape:
                trace.entry = self._entry[row, :tokens].float().cpu()
            if sequence >= self._searched:
                trace.add_layer(state.float().cpu())
                continue
            self.keep_residuals(number, state)
            if sources:
                set_largest(self.outputs, number, output[here])
            for x in inputs:
                set_largest(self.inputs, number, x[row, :tokens])
            self._look(number, trace, state, output[here], added[here], sources, begin)
            for shared in self.shared[number]:
                if shared.called:
                    self._look_at_shared(number, trace, shared, len(flat), here)
        for source in (*sources, *self.shared[number]):
            source.forget()

    def _keep_entry(self, module: nn.Module, arguments: tuple[object, ...]) -> None:
        if arguments and isinstance(arguments[0], Tensor):
            self._entry = arguments[0]

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
        before = trace.hidden[-1] if trace.hidden else trace.entry
        before = torch.zeros_like(hidden) if before is None else before
        magnitudes = trace.add_layer(hidden)
        massive = magnitudes >= trace.bars[-1]
        watched = massive | (before.abs() >= trace.bars[-2]) if len(trace.bars) > 1 else massive
        if not bool(watched.any()):
            return
        largest = torch.maximum(magnitudes, before.abs())
        change = torch.maximum(added.abs(), (hidden - before).abs())
        records: dict[int, TokenRecord] = {}
        for token, channel in (watched & (change >= MADE * largest) & (change != 0)).nonzero().tolist():
            if token not in records:
                multiplied = tuple(part for source in sources for part in source.list_multiplied(start + token))
                sizes = output[token].abs()
                records[token] = TokenRecord(multiplied, float(sizes.max()), float(sizes.median()))
            at = (token, channel)
            trace.moves[(number, *at)] = Move(
                number,
                *at,
                before=float(before[at]),
                after=float(hidden[at]),
                output=float(output[at]),
                added=float(added[at]),
                median=trace.medians[-1],
                massive=bool(massive[at]),
                record=records[token],
            )

    def _look_at_shared(self, number: int, trace: Trace, source: LinearSource, tokens: int, here: slice) -> None:
        """Add the massive outputs of a shared MLP for the tokens `here` of a batch of `tokens` to the trace."""
        output, x = source.output(tokens)[here].cpu(), source.neurons().reshape(tokens, -1)[here]
        set_largest(self.inputs, number, x)
        set_largest(self.outputs, number, output)
        sizes = output.abs()
        median = max(float(sizes.median()), TINY)
        for token, channel in (sizes >= compute_bar(sizes, median)).nonzero().tolist():
            typical = float(sizes[token].median())
            record = TokenRecord(tuple(source.list_multiplied(here.start + token)), float(sizes[token].max()), typical)
            value = float(output[token, channel])
            trace.shared[number, token, channel] = Move(
                number, token, channel, 0.0, value, value, value, median, True, record
            )
