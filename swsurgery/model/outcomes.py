"""Define what a run of several variants of a model returns: logits and the largest hidden states (forward.py).

This module runs no model.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
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


class LastProduct(NamedTuple):
    """The product of the output matrix with its inputs, which gives the logits of every variant without further steps.

    `matrix` has the shape (vocabulary, channels). `read_inputs` computes the inputs (variants, tokens, channels) of
    some variants for some tokens.
    """

    matrix: Tensor
    read_inputs: Callable[[Sequence[int], slice], Tensor]


class Logits:
    """The logits (tokens, vocabulary) of each variant for one sequence, in the model's dtype.

    Each access computes the logits of one variant. They are not stored, because together they may be larger than the
    model. They must be read before the next sequence is requested.
    """

    def __init__(
        self,
        variants: int,
        compute: Callable[[int], Tensor],
        read: Callable[[Sequence[int], slice], Tensor] | None = None,
        vocabulary: int = 0,
        device: torch.device | None = None,
        find_last_product: Callable[[], LastProduct | None] | None = None,
    ):
        """Take the functions that compute the logits.

        `compute` returns all logits of a variant. `read` does what the method `read` describes. If it is given, so are
        `vocabulary`, the number of logits of a token, and their device. `find_last_product` does what the method
        describes.
        """
        self._variants, self._compute, self._read = variants, compute, read
        self._find_last_product = find_last_product
        self.vocabulary, self.device = vocabulary, device or torch.device("cpu")

    def __len__(self) -> int:
        return self._variants

    def __iter__(self) -> Iterator[Tensor]:
        return map(self._compute, range(self._variants))

    def __getitem__(self, variant: int) -> Tensor:
        if not 0 <= variant < self._variants:
            raise IndexError(variant)
        return self._compute(variant)

    @property
    def is_divisible(self) -> bool:
        """True if `read` computes the requested logits only. If False, it computes all logits of each variant."""
        return self._read is not None

    def find_last_product(self) -> LastProduct | None:
        """Return the product that gives the logits; None if it is unknown, or if the model then changes the logits."""
        return self._find_last_product() if self._find_last_product else None

    def read(self, variants: Sequence[int], tokens: slice) -> Tensor:
        """Compute the logits (variants, tokens, vocabulary) of some variants for some tokens.

        The tensor is valid until the next call, which may use the same memory.
        """
        if self._read is not None:
            return self._read(variants, tokens)
        return torch.stack([self._compute(variant)[tokens] for variant in variants])


def make_logits(logits: Sequence[Tensor]) -> Logits:
    """Return the Logits of variants whose logits are all in memory: one tensor (tokens, vocabulary) per variant."""

    def read(variants: Sequence[int], tokens: slice) -> Tensor:
        if len(variants) == 1:
            return logits[variants[0]][None, tokens]
        return torch.stack([logits[variant][tokens] for variant in variants])

    return Logits(len(logits), logits.__getitem__, read, logits[0].shape[-1], logits[0].device)


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
    (sequences, columns, tokens, channels). Variants that do not differ yet share a column (`Columns`).
    """

    sequences: list[int]
    calls: list[Call]
    state: Tensor
    _made: dict[tuple[torch.device, tuple[tuple[int, int], ...]], Tensor] = field(default_factory=dict)

    def make_index(self, rows: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Return the numbers of the sequences and of the columns of some rows, as two tensors on the state's device.

        The tensors are made once, because each copy to a device waits until the device has computed all earlier layers.
        """
        key = (self.state.device, tuple(rows))
        if key not in self._made:
            self._made[key] = torch.tensor(rows, device=self.state.device)
        at, column = self._made[key].unbind(1)
        return at, column


class Columns:
    """Assigns the variants of a run to the columns of `Group.state`.

    Two variants share a column up to the first layer that they change in different ways. `of` contains the column of
    each variant. `changes` describes for each variant what it changes in front of the first layer.
    """

    def __init__(self, changes: Sequence[Hashable]):
        self.of = [0] * len(changes)
        self.split(changes)

    def split(self, changes: Sequence[Hashable]) -> list[int] | None:
        """Divide the columns whose variants change the next layer in different ways, as `changes` describes.

        Returns the old column of each new column; None if no column was divided.
        """
        pairs = list(zip(self.of, changes, strict=True))
        found = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
        divided = len(found) > max(self.of) + 1
        self.of = [found[pair] for pair in pairs]
        return [column for column, _ in found] if divided else None

    def list_first(self) -> list[int]:
        """Return the first variant of each column."""
        return [self.of.index(column) for column in range(max(self.of) + 1)]


def join_outcomes(parts: Sequence[Outcomes], order: Sequence[int]) -> Outcomes:
    """Join the outcomes of several runs for one sequence. `order` contains the number of each variant in the result."""
    places = [(part, at) for part in parts for at in range(len(part.logits))]
    sorted_places = [place for _, place in sorted(zip(order, places, strict=True), key=lambda pair: pair[0])]

    def compute(index: int) -> Tensor:
        part, at = sorted_places[index]
        return part.logits[at]

    def read(variants: Sequence[int], tokens: slice) -> Tensor:
        chosen = [sorted_places[index] for index in variants]
        if len({id(part) for part, _ in chosen}) == 1:
            return chosen[0][0].logits.read([at for _, at in chosen], tokens)
        return torch.cat([part.logits.read([at], tokens).clone() for part, at in chosen])

    divisible = all(part.logits.is_divisible for part in parts)
    first = sorted_places[0][0].logits
    logits = Logits(len(places), compute, read if divisible else None, first.vocabulary, first.device)
    return Outcomes(parts[0].sequence, logits, tuple(part.by_layer[at] for part, at in sorted_places))


class Peaks:
    """Collects the largest absolute hidden state of each sequence and variant after each decoder layer.

    The device computes them. They are copied to main memory when they are first listed, so that a layer is not delayed.
    """

    def __init__(self) -> None:
        self._found: list[tuple[int, int, list[int], list[int], Tensor, Tensor]] = []
        self._seen: dict[int, list[tuple[int, int, list[int], list[int], list[float]]]] = defaultdict(list)

    def look(self, layer: int, group: Group, columns: Sequence[int]) -> None:
        """Add the hidden states of a group after layer number `layer`. `columns` has the column of each variant."""
        flat = group.state.flatten(2)  # (sequences, columns, tokens * channels)
        where = torch.empty(flat.shape[:2], dtype=torch.long, device=flat.device)
        for at, rows in enumerate(flat):  # one sequence at a time, because abs() allocates a copy
            where[at] = rows.abs().nan_to_num(nan=torch.inf).argmax(dim=1)
        values = flat.gather(2, where[..., None])[..., 0]
        self._found.append((layer, group.state.shape[-1], list(columns), group.sequences, where, values))

    def list_by_layer(self, sequence: int, variant: int) -> tuple[Peak, ...]:
        """Return the largest hidden state of a variant in a sequence after each layer, in the order of the layers.

        If the model runs a layer several times, the entry of the layer is the largest of all runs.
        """
        self._copy_to_lists()
        found: dict[int, Peak] = {}
        for layer, channels, columns, where, values in self._seen[sequence]:
            at = columns[variant]
            peak = Peak(layer, *divmod(where[at], channels), values[at])
            if layer not in found or compute_magnitude(peak.value) > compute_magnitude(found[layer].value):
                found[layer] = peak
        return tuple(found[layer] for layer in sorted(found))

    def _copy_to_lists(self) -> None:
        for layer, channels, columns, sequences, where, values in self._found:
            for sequence, places, found in zip(sequences, where.tolist(), values.tolist(), strict=True):
                self._seen[sequence].append((layer, channels, columns, places, found))
        self._found.clear()
