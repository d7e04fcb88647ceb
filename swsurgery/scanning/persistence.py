"""Find the massive hidden states that persist over many layers, in the traces recorded by spikes.py.

A spell is a massive state of one token and channel that persists from the layer whose MLP makes it through many later
layers. A massive state that appears in the last layers only shapes the logits and is not a spell. This module uses the
hidden states only. by_activations.py finds the scalars that make the states massive.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from swsurgery.scanning.report import PersistentActivation
from swsurgery.scanning.spikes import MADE, MASSIVE, Move, Trace

KEPT = 0.5
"""Minimum value of a persistent state, as a share of its first value. In SmolLM2 one state keeps 98% through 16 layers
and drops to 33% to 47% in the next layer. The other keeps 80% through 6 layers and then drops to 11% to 19%."""

LEAST_LAYERS, LEAST_DEPTH = 3, 1 / 8
"""Minimum number of layers through which a state must persist after the layer that makes it: a count, and a share of
the model's layers; the larger applies. States that appear in the last layers therefore do not count. In SmolLM2, which
has 30 layers, one state persists through 16 and the other through 6. The massive states of its last layer do not
count."""


class Spell(NamedTuple):
    """A massive state that `move` made in prompt number `sequence` and that persists through layer `last`."""

    sequence: int
    move: Move
    last: int

    @property
    def place(self) -> tuple[int, int, int, int]:
        """The sequence, layer, token and channel in which the state begins."""
        return self.sequence, self.move.layer, self.move.token, self.move.channel


def count_layers_to_last(layers: int) -> int:
    """Return through how many layers after its first a state must persist in a model with `layers` layers."""
    return max(LEAST_LAYERS, math.ceil(layers * LEAST_DEPTH))


def find_spells(traces: Sequence[Trace]) -> Iterator[Spell]:
    """Find the massive states that an MLP makes and that persist through enough layers."""
    for sequence, trace in enumerate(traces):
        for move in trace.moves.values():
            massive = abs(move.after) >= MASSIVE * move.median
            if massive and move.makes and abs(move.added) >= MADE * abs(move.after):
                last = _find_last(trace, move)
                if last - move.layer >= count_layers_to_last(len(trace.hidden)):
                    yield Spell(sequence, move, last)


def find_ends(traces: Sequence[Trace], spells: Iterable[Spell]) -> Iterator[Move]:
    """Find the moves that end the spells: an MLP removes the state in the layer after the spell's last layer."""
    for sequence, move, last in spells:
        end = traces[sequence].moves.get((last + 1, move.token, move.channel))
        if end is not None and end.added * move.after < 0:
            yield end


def find_untraced(traces: Sequence[Trace]) -> Mapping[int, set[int]]:
    """Find the channels that are massive in as many layers as a spell although no single MLP makes them massive.

    Returns the channels by the first layer in which they are massive. The embedding, attention or several layers
    together may have made them massive.
    """
    untraced: dict[int, set[int]] = defaultdict(set)
    for trace in traces:
        made = {(move.token, move.channel) for move in trace.moves.values() if move.makes}
        massive = torch.stack([h.abs() >= MASSIVE * m for h, m in zip(trace.hidden, trace.medians, strict=True)])
        for token, channel in (massive.sum(0) > count_layers_to_last(len(massive))).nonzero().tolist():
            if (token, channel) not in made:
                untraced[int(massive[:, token, channel].int().argmax())].add(channel)
    return untraced


def merge_spells(traces: Sequence[Trace], spells: Iterable[Spell]) -> Iterator[PersistentActivation]:
    """Merge all spells with the same first layer and channel into one super activation.

    Its values are those of the spell with the largest state.
    """
    groups: dict[tuple[int, int], list[Spell]] = defaultdict(list)
    for spell in spells:
        groups[spell.move.layer, spell.move.channel].append(spell)
    for (layer, channel), group in sorted(groups.items()):
        spell, peak, value = max((_find_peak(traces, spell) for spell in group), key=lambda found: abs(found[2]))
        prompts = len({spell.sequence for spell in group})
        yield PersistentActivation(layer, spell.last, channel, value, peak, spell.move.token, spell.sequence, prompts)


def _find_last(trace: Trace, move: Move) -> int:
    """Find the last layer through which the state that `move` makes persists."""
    states = [float(hidden[move.token, move.channel]) / move.after for hidden in trace.hidden[move.layer :]]
    faded = (number for number, state in enumerate(states) if not state >= KEPT)
    return move.layer + next(faded, len(states)) - 1


def _find_peak(traces: Sequence[Trace], spell: Spell) -> tuple[Spell, int, float]:
    """Find the largest state of a spell. Returns the spell, the layer after which it is reached, and its value."""
    sequence, move, last = spell
    states = [float(h[move.token, move.channel]) for h in traces[sequence].hidden[move.layer : last + 1]]
    at = max(range(len(states)), key=lambda i: abs(states[i]))
    return spell, move.layer + at, states[at]
