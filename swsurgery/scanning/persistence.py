"""Find the massive hidden states that persist over many layers, in the traces of spikes.py.

A spell is one such state: a channel of a token, from the layer whose MLP makes it to the last layer through which it
persists. Spikes of the last layers only shape the logits and are not spells. This module uses hidden states only;
by_activations.py finds the scalars that make them.
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
"""Minimum ratio of a persistent state to its first value, with the same sign. In SmolLM2 the two states keep 98% and
80% over 16 and 6 layers; one layer later they have 33% to 47% and 11% to 19%."""

LEAST_LAYERS, LEAST_DEPTH = 3, 1 / 8
"""Minimum number of further layers through which a state must persist, and minimum share of the model's layers. States
that appear in the last layers therefore do not count. In SmolLM2 the two states persist through 16 and 6 of 30 layers;
the spikes in layer 29, the last, do not count."""


class Spell(NamedTuple):
    """A massive state that an MLP made (`move`) and that persists through layer `last`."""

    sequence: int
    move: Move
    last: int

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Sequence, layer, token and channel of the state."""
        return self.sequence, self.move.layer, self.move.token, self.move.channel


def count_layers_to_last(layers: int) -> int:
    """Compute through how many further layers a state must persist in a model with this many layers."""
    return max(LEAST_LAYERS, math.ceil(layers * LEAST_DEPTH))


def find_spells(traces: Sequence[Trace]) -> Iterator[Spell]:
    """Find the massive states that an MLP makes and that persist."""
    for sequence, trace in enumerate(traces):
        for move in trace.moves.values():
            massive = abs(move.after) >= MASSIVE * move.median
            if massive and move.makes and abs(move.added) >= MADE * abs(move.after):
                last = _find_last(trace, move)
                if last - move.layer >= count_layers_to_last(len(trace.hidden)):
                    yield Spell(sequence, move, last)


def find_ends(traces: Sequence[Trace], spells: Iterable[Spell]) -> Iterator[Move]:
    """Find the moves that end spells: those with which an MLP removes the state right after its last layer."""
    for sequence, move, last in spells:
        end = traces[sequence].moves.get((last + 1, move.token, move.channel))
        if end is not None and end.added * move.after < 0:
            yield end


def find_untraced(traces: Sequence[Trace]) -> Mapping[int, set[int]]:
    """Find the channels, by first layer, that are massive for as long as a spell although no MLP makes them.

    Attention may make them, or the embedding, or several layers together.
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
    """Merge the spells of each layer and channel into one activation, with the values of its largest spell."""
    groups: dict[tuple[int, int], list[Spell]] = defaultdict(list)
    for spell in spells:
        groups[spell.move.layer, spell.move.channel].append(spell)
    for (layer, channel), group in sorted(groups.items()):
        spell, peak, value = max((_find_peak(traces, spell) for spell in group), key=lambda found: abs(found[2]))
        prompts = len({spell.sequence for spell in group})
        yield PersistentActivation(layer, spell.last, channel, value, peak, spell.move.token, spell.sequence, prompts)


def _find_last(trace: Trace, move: Move) -> int:
    """Find the last layer through which the state after `move` persists."""
    states = [float(hidden[move.token, move.channel]) / move.after for hidden in trace.hidden[move.layer :]]
    faded = (number for number, state in enumerate(states) if not state >= KEPT)
    return move.layer + next(faded, len(states)) - 1


def _find_peak(traces: Sequence[Trace], spell: Spell) -> tuple[Spell, int, float]:
    """Return a spell with the layer of its largest state and that state."""
    sequence, move, last = spell
    states = [float(h[move.token, move.channel]) for h in traces[sequence].hidden[move.layer : last + 1]]
    at = max(range(len(states)), key=lambda i: abs(states[i]))
    return spell, move.layer + at, states[at]
