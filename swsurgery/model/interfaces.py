"""Define what forward.py expects of the objects that observe its layers and that load their weights.

This module contains protocols only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swsurgery.checkpoint.checkpoint import Checkpoint


class Watch(Protocol):
    """An object that is passed to `LayeredModel.run` and observes each call of a decoder layer."""

    def around(self, number: int, layer: nn.Module, rows: Sequence[tuple[int, int]]) -> AbstractContextManager[None]:
        """Return a context manager that is open during one call of the decoder layer `number`, with its weights loaded.

        `rows` contains the (sequence, variant) of each row of the batch. One row represents all variants that do not
        differ yet, and has the number of the first of them.
        """
        ...

    def after(self, number: int, rows: Sequence[tuple[int, int]], hidden: Tensor) -> None:
        """Receive the hidden states (rows, tokens, channels) that the decoder layer `number` returned for `rows`."""
        ...


class Weights(Protocol):
    """A source of weights for a model whose weights are not all in memory."""

    @property
    def sizes(self) -> Sequence[int]:
        """Size of the weights of each layer, in bytes."""

    @property
    def devices(self) -> Sequence[torch.device]:
        """The devices that take the layers in turn; weights outside the layers are on the first one."""

    def layer(self, number: int) -> AbstractContextManager[torch.device]:
        """Load the weights of one layer for the length of a `with` block, which receives the weights' device."""
        ...

    def outside(self, head: bool) -> AbstractContextManager[torch.device]:
        """Load the weights outside the layers for the length of a `with` block, which receives the weights' device.

        These are the weights of the embedding, of the last norm and, if `head` is True, of the language-model head.
        """
        ...

    def close(self) -> None:
        """Stop reading ahead and free the memory. Layers can be loaded again afterwards."""
        ...


LoadOther = Callable[[PreTrainedModel, Checkpoint, torch.device], PreTrainedModel]
"""Type of a function that loads a checkpoint, which may be virtual, as a model like the given one, on a device."""
