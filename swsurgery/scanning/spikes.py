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

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from swsurgery.model.forward import LayeredModel
from swsurgery.progress import Progress
from swsurgery.scanning.sources import Multiplied, Source, SourceWatch, find_sources, list_unread, set_largest
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


class LayerSpikes(SourceWatch):
    """Runs a model and observes its down projections.

    `unseen` contains the numbers of the layers with a stored down projection that cannot be observed in the loaded
    model. `unread` contains these layers and the layers with an MLP under unknown tensor names. After a run, `inputs`,
    `outputs` and `residuals` contain the signed value of largest magnitude in each layer: among the inputs of the down
    projections, among the MLP's outputs, and among the hidden states after the layer. Raises ArchitectureError if the
    checkpoint has no known down projection.
    """

    method = "activations"

    def __init__(self, model: LayeredModel):
        sources, self.unseen = find_sources(model)
        super().__init__(model, sources)
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
        self.clear_profile()
        self.traces = [Trace() for _ in range(sequences)]

    # The Watch of forward.py ----------------------------------------------------------------------------------------

    def watch_layer(self, layer: nn.Module) -> list[RemovableHandle]:
        self._normed: list[tuple[Tensor, Tensor]] = []
        self._multiplier = float(getattr(layer, "residual_multiplier", 1.0))  # Granite
        norms = [module for module in layer.modules() if "norm" in type(module).__name__.lower()]
        return [norm.register_forward_hook(self._keep_norm) for norm in norms]

    def after(self, number: int, rows: Sequence[tuple[int, int]], hidden: Tensor) -> None:
        self.keep_residuals(number, hidden)
        sources = [source for source in self.sources[number] if source.called]
        flat = hidden.reshape(-1, hidden.shape[-1])
        output = sum((source.output(len(flat)) for source in sources), torch.zeros_like(flat, dtype=torch.float32))
        added = self._find_normed(output) * self._multiplier
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
