"""Define what a run of several variants of a model returns: logits and the largest hidden states (forward.py).

This module runs no model.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from swsurgery.model.calls import Call


class Peak(NamedTuple):
    """The hidden state of largest magnitude after any decoder layer: its position and its signed value."""

    layer: int
    token: int
    channel: int
    value: float


class Logits:
    """The logits (tokens, vocabulary) of each variant for one sequence, in the model's dtype.

    Each access computes the logits of one variant. They are not stored, because together they may be larger than the
    model. They must be read before the next sequence is requested.
    """

    def __init__(self, variants: int, compute: Callable[[int], Tensor]):
        self._variants, self._compute = variants, compute

    def __len__(self) -> int:
        return self._variants

    def __iter__(self) -> Iterator[Tensor]:
        return map(self._compute, range(self._variants))

    def __getitem__(self, variant: int) -> Tensor:
        if not 0 <= variant < self._variants:
            raise IndexError(variant)
        return self._compute(variant)


class Outcomes(NamedTuple):
    """The results of all variants for the sequence with number `sequence`.

    `by_layer` contains, for each variant, the hidden state of largest magnitude after each decoder layer, in the order
    of the layers. It is empty for each variant if the model has no list of decoder layers.
    """

    sequence: int
    logits: Logits
    by_layer: tuple[tuple[Peak, ...], ...]

    @property
    def peaks(self) -> tuple[Peak | None, ...]:
        """The hidden state of largest magnitude of each variant after any layer; None without a list of layers."""
        return tuple(
            max(peaks, key=lambda peak: compute_magnitude(peak.value), default=None) for peaks in self.by_layer
        )


def compute_magnitude(value: float) -> float:
    """Return the magnitude of a hidden state for comparisons. A value that is not finite counts as the largest."""
    return abs(value) if math.isfinite(value) else math.inf


@dataclass
class Group:
    """The sequences of one length, which run together.

    `sequences` contains their numbers, and `calls` the arguments of each layer. `state` contains their hidden states
    (sequences, variants, tokens, channels); its second axis has length 1 until the first changed layer.
    """

    sequences: list[int]
    calls: list[Call]
    state: Tensor


def join_outcomes(parts: Sequence[Outcomes], order: Sequence[int]) -> Outcomes:
    """Join the outcomes of several runs for one sequence. `order` contains the number of each variant in the result."""
    places = [(part, at) for part in parts for at in range(len(part.logits))]
    sorted_places = [place for _, place in sorted(zip(order, places, strict=True), key=lambda pair: pair[0])]

    def compute(index: int) -> Tensor:
        part, at = sorted_places[index]
        return part.logits[at]

    by_layer = tuple(part.by_layer[at] for part, at in sorted_places)
    return Outcomes(parts[0].sequence, Logits(len(places), compute), by_layer)


class Peaks:
    """Collects the largest absolute hidden state of each sequence and variant after each decoder layer."""

    def __init__(self) -> None:
        self._seen: dict[int, list[tuple[int, int, list[int], list[float]]]] = defaultdict(list)

    def look(self, layer: int, group: Group) -> None:
        flat = group.state.flatten(2)  # (sequences, variants, tokens * channels)
        where = torch.empty(flat.shape[:2], dtype=torch.long, device=flat.device)
        for at, rows in enumerate(flat):  # one sequence at a time, because abs() allocates a copy
            where[at] = rows.abs().nan_to_num(nan=torch.inf).argmax(dim=1)
        values = flat.gather(2, where[..., None])[..., 0]
        for at, sequence in enumerate(group.sequences):
            self._seen[sequence].append((layer, group.state.shape[-1], where[at].tolist(), values[at].tolist()))

    def list_by_layer(self, sequence: int, variant: int) -> tuple[Peak, ...]:
        """Return the largest hidden state of a variant in a sequence after each layer, in the order of the layers.

        If the model runs a layer several times, the entry of the layer is the largest of all runs.
        """
        found: dict[int, Peak] = {}
        for layer, channels, where, values in self._seen[sequence]:
            at = min(variant, len(values) - 1)
            peak = Peak(layer, *divmod(where[at], channels), values[at])
            if layer not in found or compute_magnitude(peak.value) > compute_magnitude(found[layer].value):
                found[layer] = peak
        return tuple(found[layer] for layer in sorted(found))
