"""Define the plan of a streamed model: which stored bytes make up each parameter, and where they lie in a buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from swsurgery.storage.files import File

ALIGNMENT = 256
"""Each parameter begins at a multiple of this many bytes in a buffer."""


@dataclass(frozen=True)
class Part:
    """Stored bytes of some or all rows of a parameter.

    They are `size` bytes at `offset` of a shard, which store the tensor `tensor`. Their first value has the flat index
    `element` in the parameter.
    """

    tensor: str
    file: File
    offset: int
    size: int
    dtype: torch.dtype
    element: int


@dataclass(frozen=True)
class Slot:
    """One parameter or buffer of the model, and the stored parts from which it is read.

    `owners` are the modules that share the parameter, each with the parameter's name in that module. The first owner is
    `module` with `name`. `head` is True if only the language-model head needs the parameter.
    """

    module: nn.Module
    name: str
    shape: torch.Size
    dtype: torch.dtype
    parts: tuple[Part, ...]
    owners: tuple[tuple[nn.Module, str], ...]
    head: bool

    @property
    def size(self) -> int:
        """Size of the parameter in a buffer, in bytes."""
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class WeightPlan:
    """The parameters and buffers (slots) to be read for each layer, and those of the modules outside the layers."""

    layers: tuple[tuple[Slot, ...], ...]
    outside: tuple[Slot, ...]

    @property
    def slots(self) -> list[Slot]:
        """All slots, those outside the layers first."""
        return [*self.outside, *(slot for slots in self.layers for slot in slots)]


def compute_layout(slots: Sequence[Slot]) -> tuple[list[int], int]:
    """Compute the offset of each slot in a buffer, and the length of the buffer, in bytes."""
    begins, end = [], 0
    for slot in slots:
        begins.append(end)
        end += -(-slot.size // ALIGNMENT) * ALIGNMENT
    return begins, end
