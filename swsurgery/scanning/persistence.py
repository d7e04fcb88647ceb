"""Find the massive hidden states that persist over many layers, in the traces recorded by spikes.py.

A spell is a massive state of one token and channel that persists from the layer that makes it through many later
layers. A rise is one or several spells of the same token and channel that overlap: each of their layers raises the
state further. A massive state that appears in the last layers only shapes the logits and is not a spell. This module
uses the hidden states only. causes.py finds what makes the states massive.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import NamedTuple

import torch

from swsurgery.scanning.activation_report import Cause, CauseKind, PersistentActivation
from swsurgery.scanning.spikes import TINY, Move, Trace

KEPT = 0.5
"""Minimum value of a persistent state, as a share of its first value. In SmolLM2 one state keeps 98% through 16 layers
and drops to 33% to 47% in the next layer. The other keeps 80% through 6 layers and then drops to 11% to 19%."""

LEAST_LAYERS, LEAST_DEPTH = 3, 1 / 8
"""Minimum number of layers through which a state must persist after the layer that makes it: a count, and a share of
the model's layers; the larger applies. States that appear in the last layers therefore do not count. In SmolLM2, which
has 30 layers, one state persists through 16 and the other through 6. The massive states of its last layer do not
count."""

PROMINENT = 0.4
"""Minimum share of a rise in the largest hidden state of each layer and prompt (the median over its layers), if its
scalars are searched for. A rise with a smaller share is a side effect. In SmolLM2, ordinary tokens have 0.1 or less of
the state of the first token. In two small trained models, they have up to 0.37."""

LEAST_TO_END = 2
"""Minimum number of further layers for a state that begins in the first half of a model with more than LEAST_LAYERS
layers, and persists to the last layer or the last but one."""


class Spell(NamedTuple):
    """A massive state that `move` made in prompt number `sequence` and that persists through layer `last`."""

    sequence: int
    move: Move
    last: int

    @property
    def place(self) -> tuple[int, int, int, int]:
        """The sequence, layer, token and channel in which the state begins."""
        return self.sequence, self.move.layer, self.move.token, self.move.channel


class Rise(NamedTuple):
    """Spells of one token and channel that overlap, in the order of their layers."""

    spells: tuple[Spell, ...]

    @property
    def main(self) -> Spell:
        """The spell whose layer adds most to the state."""
        return max(self.spells, key=lambda spell: abs(spell.move.change))

    @property
    def first(self) -> int:
        return self.spells[0].move.layer

    @property
    def last(self) -> int:
        return max(spell.last for spell in self.spells)


class Drift(NamedTuple):
    """A state that is massive after layers `first` to `last`, although no single layer makes it massive."""

    sequence: int
    token: int
    channel: int
    first: int
    last: int


def count_layers_to_last(layers: int) -> int:
    """Return through how many layers after its first a state must persist in a model with `layers` layers."""
    return max(LEAST_LAYERS, math.ceil(layers * LEAST_DEPTH))


def is_persistent(first: int, last: int, layers: int) -> bool:
    """Return True if a state that lasts from layer `first` to `last` of `layers` persists long enough."""
    further = last - first
    to_end = further >= LEAST_TO_END and layers > LEAST_LAYERS and 2 * first < layers and last >= layers - 2
    return to_end or further >= count_layers_to_last(layers)


def find_rises(traces: Sequence[Trace], brief: bool = False) -> Iterator[Rise]:
    """Find the massive states that a layer makes and that persist through enough layers.

    If `brief` is True, find the states that do not persist instead.
    """
    for sequence, trace in enumerate(traces):
        found: dict[tuple[int, int], list[Spell]] = defaultdict(list)
        for move in trace.moves.values():
            if move.raises or move.made_by_mlp:
                last = _find_last(trace, move)
                if is_persistent(move.layer, last, len(trace.hidden)) is not brief:
                    found[move.token, move.channel].append(Spell(sequence, move, last))
        for spells in found.values():
            yield from _join_spells(sorted(spells, key=lambda spell: spell.move.layer))


def _join_spells(spells: Sequence[Spell]) -> Iterator[Rise]:
    """Join the spells of one token and channel that overlap."""
    joined: list[Spell] = []
    for spell in spells:
        if joined and (spell.move.layer > max(s.last for s in joined) or spell.move.after * joined[0].move.after < 0):
            yield Rise(tuple(joined))
            joined = []
        joined.append(spell)
    if joined:
        yield Rise(tuple(joined))


def find_ends(traces: Sequence[Trace], rises: Iterable[Rise]) -> Iterator[tuple[int, Move]]:
    """Find the moves that end the main spells of rises: an MLP removes the state after the spell's last layer.

    Yields the number of the sequence with each move.
    """
    for rise in rises:
        end = find_end(traces, rise)
        if end is not None and abs(end.added) >= KEPT * abs(end.change) and end.added * end.before < 0:
            yield rise.main.sequence, end


def find_end(traces: Sequence[Trace], rise: Rise) -> Move | None:
    """Return the move that ends the main spell of `rise`; None if the spell lasts to the end or fades slowly."""
    sequence, move, last = rise.main
    end = traces[sequence].moves.get((last + 1, move.token, move.channel))
    return end if end is not None and end.change * move.after < 0 else None


def find_drifts(traces: Sequence[Trace]) -> Iterator[Drift]:
    """Find the states that are massive in as many layers as a spell although no single layer makes them massive.

    The embedding, or several layers together, made them massive.
    """
    for sequence, trace in enumerate(traces):
        made = {(move.token, move.channel) for move in trace.moves.values() if move.raises}
        massive = torch.stack([h.abs() >= bar for h, bar in zip(trace.hidden, trace.bars, strict=True)])
        for token, channel in (massive.sum(0) > count_layers_to_last(len(massive))).nonzero().tolist():
            if (token, channel) not in made:
                layers = massive[:, token, channel].nonzero().flatten().tolist()
                yield Drift(sequence, token, channel, layers[0], layers[-1])


def merge_rises(traces: Sequence[Trace], rises: Iterable[Rise]) -> Iterator[tuple[Rise, PersistentActivation]]:
    """Merge all rises with the same channel and the same main layer into one super activation, without causes.

    Its values are those of the rise with the largest state, which is yielded with it.
    """
    groups: dict[tuple[int, int], list[Rise]] = defaultdict(list)
    for rise in rises:
        groups[rise.main.move.layer, rise.main.move.channel].append(rise)
    for (layer, channel), group in sorted(groups.items()):
        found = ((rise, *find_peak(traces, rise)) for rise in group)
        rise, peak, value = max(found, key=lambda one: abs(one[2]))
        prompts = len({rise.main.sequence for rise in group})
        sequence, token = rise.main.sequence, rise.main.move.token
        yield (
            rise,
            PersistentActivation(
                layer, rise.last, channel, value, peak, token, sequence, prompts,
                first=rise.first, ratio=abs(value) / traces[sequence].medians[peak],
            ),
        )  # fmt: skip


def merge_drifts(traces: Sequence[Trace], drifts: Iterable[Drift]) -> Iterator[PersistentActivation]:
    """Merge all drifts of the same channel into one super activation, with the embedding or several layers as cause."""
    groups: dict[int, list[Drift]] = defaultdict(list)
    for drift in drifts:
        groups[drift.channel].append(drift)
    for channel, group in sorted(groups.items()):
        states = {
            drift: [float(h[drift.token, channel]) for h in traces[drift.sequence].hidden[drift.first : drift.last + 1]]
            for drift in group
        }
        drift = max(group, key=lambda one: max(map(abs, states[one])))
        trace = traces[drift.sequence]
        value = max(states[drift], key=abs)
        peak = drift.first + states[drift].index(value)
        begun = 0.0 if trace.entry is None else float(trace.entry[drift.token, channel])
        kind: CauseKind = "embedding" if begun * value >= KEPT * abs(value * states[drift][0]) else "several layers"
        yield PersistentActivation(
            drift.first, drift.last, channel, value, peak, drift.token, drift.sequence,
            len({one.sequence for one in group}), first=drift.first, ratio=abs(value) / trace.medians[peak],
            causes=(Cause(kind, drift.first, begun if kind == "embedding" else value, 1.0),),
        )  # fmt: skip


def _find_last(trace: Trace, move: Move) -> int:
    """Find the last layer through which the state that `move` makes persists."""
    layers = slice(move.layer, None)
    for number, (hidden, bar) in enumerate(zip(trace.hidden[layers], trace.bars[layers], strict=True)):
        state = float(hidden[move.token, move.channel])
        if not (state / move.after >= KEPT and abs(state) >= bar):
            return move.layer + number - 1
    return len(trace.hidden) - 1


def find_peak(traces: Sequence[Trace], rise: Rise) -> tuple[int, float]:
    """Find the largest state of a rise. Returns the layer after which it is reached, and its value."""
    sequence, move, _ = rise.main
    states = [float(h[move.token, move.channel]) for h in traces[sequence].hidden[rise.first : rise.last + 1]]
    at = max(range(len(states)), key=lambda i: abs(states[i]))
    return rise.first + at, states[at]


def compute_prominence(unedited: Trace, traces: Sequence[Trace], rise: Rise) -> float:
    """Compute the share of `rise` in the largest hidden state of the unedited model: the median over its layers."""
    sequence, move, _ = rise.main
    layers = slice(rise.first, rise.last + 1)
    shares = [
        abs(float(new[move.token, move.channel])) / max(float(old.abs().max()), TINY)
        for old, new in zip(unedited.hidden[layers], traces[sequence].hidden[layers], strict=True)
    ]
    return median(shares)


def compute_remainder(before: Trace, after: Trace, rise: Rise) -> float:
    """Compute which share of the largest state of `rise`, a rise of the trace `after`, there is compared with `before`.

    The result is the largest state after the edit divided by that before it, in the layers of the rise.
    """
    move, layers = rise.main.move, slice(rise.first, rise.last + 1)
    old, new = (max(abs(float(h[move.token, move.channel])) for h in trace.hidden[layers]) for trace in (before, after))
    return new / max(old, TINY)
