"""Compute logits from hidden states with the code of a model, for all tokens or for some tokens of several variants.

A large vocabulary makes the logits of a window far larger than its hidden states, and computing them takes longer than
all layers of a small model. This module therefore computes any rows (one token of one variant each) on request. The
model's code runs with stand-ins for the decoder layers, the last of which returns the rows. So whatever the model does
after its last layer (norms, output matrix, scaling, softcapping) is done by its own code.

This module must not depend on checkpoints or metrics.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swsurgery.model.calls import REFUSALS, Unknown, replace_forwards, replace_hidden, split
from swsurgery.model.outcomes import LastProduct, Logits
from swsurgery.model.places import find_output_embeddings

PROBE_TOKENS = 8
"""Number of tokens on which `Head` tests whether a model computes the logits of each token separately."""

PROBE_TOLERANCES = {torch.float32: 1e-4}
"""Maximum difference between the logits of the test and those of the whole sequence, relative to the largest logit."""

HALF_TOLERANCE = 0.02
"""The same for the other dtypes, which have 8 or 11 significant bits."""

COLUMNS = 512
"""Number of output channels that one product computes. The product of so many channels stays in a cache."""


class Head:
    """What a model computes after its last decoder layer.

    `returned` is the return value of one layer, as a template for the stand-ins.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[nn.Module], returned: Any):
        self._model, self._layers, self._returned = model, layers, returned
        self._divisible: bool | None = None
        self.vocabulary = 0
        """Number of logits of a token, once `is_divisible` was called."""
        self._memory = torch.empty(0)
        self._is_product: bool | None = None

    def compute(self, ids: Sequence[int], hidden: Tensor) -> Tensor:
        """Compute the logits (tokens, vocabulary) of a sequence.

        `hidden` (1, tokens, channels) is the output of the last layer.
        """

        def stand_in(number: int, layer: nn.Module) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                passing, _ = split(args, kwargs)
                return replace_hidden(self._returned, hidden if layer is self._layers[-1] else passing)

            return forward

        tokens = torch.tensor([list(ids)], device=hidden.device)
        with replace_forwards(self._layers, stand_in):
            logits: Tensor = self._model(input_ids=tokens, use_cache=False).logits
        return logits[0]

    def compute_rows(self, ids: Sequence[int], rows: Tensor) -> Tensor:
        """Compute the logits (rows, vocabulary) of hidden states (rows, channels) of any tokens.

        The tensor is valid until the next call. `ids` is any sequence of the run.
        """
        with self._reuse_memory(rows):
            return self.compute(ids[:1], rows[None])

    def find_last_product(self, ids: Sequence[int], hidden: Tensor) -> Tensor | None:
        """Return the output matrix (vocabulary, channels) if the logits are its plain product with its input.

        `hidden` (tokens, channels) is the output of the last layer for some tokens. Returns None if the matrix is not a
        plain one in float32 on the CPU, or if the model scales or caps the logits. The first call decides this.
        """
        rows = hidden[:PROBE_TOKENS]
        if (matrix := self._find_plain_matrix(rows)) is None:
            return None
        if self._is_product is None:
            logits = self.compute_rows(ids, rows).clone()
            try:
                self._is_product = torch.equal(self._multiply(self.read_inputs(ids, rows), matrix.weight), logits)
            except REFUSALS:  # the code after the matrix expects logits
                self._is_product = False
        return matrix.weight.detach() if self._is_product else None

    def read_inputs(self, ids: Sequence[int], rows: Tensor) -> Tensor:
        """Compute the inputs (rows, channels) of the output matrix for hidden states (rows, channels) of any tokens."""
        found: list[Tensor] = []

        def stand_in(number: int, module: nn.Module) -> Callable[[Tensor], Tensor]:
            def forward(hidden: Tensor) -> Tensor:
                found.append(hidden)
                return hidden

            return forward

        matrix = find_output_embeddings(self._model)
        assert matrix is not None
        with replace_forwards([matrix], stand_in):
            self.compute(ids[:1], rows[None])
        return found[0].reshape(len(rows), -1)

    def is_divisible(self, ids: Sequence[int], hidden: Tensor) -> bool:
        """Return True if the model computes the logits of each token separately from those of other tokens.

        The first call decides this: it computes the first tokens of a sequence with the output of the last layer
        `hidden` (tokens, channels), and then the same tokens in reverse order.
        """
        if self._divisible is None:
            count = min(PROBE_TOKENS, len(ids))
            whole = self.compute(ids[:count], hidden[None, :count])
            self.vocabulary = whole.shape[-1]
            try:
                rows = self.compute_rows(ids, hidden[:count].flip(0)).flip(0)
                self._divisible = rows.shape == whole.shape and _is_close(rows, whole)
            except torch.OutOfMemoryError:
                raise
            except (Unknown, *REFUSALS):
                self._divisible = False
        return self._divisible

    @contextlib.contextmanager
    def _reuse_memory(self, rows: Tensor) -> Iterator[None]:
        """Let the output matrix write into the same memory in each call, if it is a plain one in float32 on the CPU.

        New memory is slow: the operating system clears each page before the first use.
        """
        if (matrix := self._find_plain_matrix(rows)) is None:
            yield
            return
        weight = matrix.weight

        def stand_in(number: int, module: nn.Module) -> Callable[[Tensor], Tensor]:
            return lambda hidden: self._multiply(hidden, weight)

        with replace_forwards([matrix], stand_in):
            yield

    def _find_plain_matrix(self, rows: Tensor) -> nn.Linear | None:
        """Find the module of the output matrix; None if it is not a plain one in float32 on the CPU."""
        matrix = find_output_embeddings(self._model)
        if type(matrix) is not nn.Linear or matrix.bias is not None or "forward" in matrix.__dict__:
            return None
        weight = matrix.weight
        plain = {weight.dtype, rows.dtype} == {torch.float32} and {weight.device.type, rows.device.type} == {"cpu"}
        return matrix if plain else None

    def _multiply(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Return `hidden` @ `weight`.T. Every element has the bits that one product of the whole matrices gives."""
        inputs = hidden.reshape(-1, hidden.shape[-1])
        size = len(inputs) * len(weight)
        if self._memory.numel() < size:
            self._memory = torch.empty(size)
        outputs = self._memory[:size].view(len(inputs), len(weight))
        for begin in range(0, len(weight), COLUMNS):
            part = slice(begin, begin + COLUMNS)
            torch.mm(inputs, weight[part].T, out=outputs[:, part])
        return outputs.view(*hidden.shape[:-1], len(weight))


def _is_close(found: Tensor, wanted: Tensor) -> bool:
    """Return True if two tensors of logits differ by rounding only."""
    finite = wanted.isfinite()
    size = float(wanted[finite].abs().max()) if bool(finite.any()) else 1.0
    tolerance = PROBE_TOLERANCES.get(wanted.dtype, HALF_TOLERANCE)
    return torch.allclose(found.float(), wanted.float(), rtol=tolerance, atol=tolerance * size, equal_nan=True)


class VariantLogits:
    """Computes the logits of the variants of one run for one sequence of token ids.

    `state` (columns, tokens, channels) is the output of the last layer, and `columns` has the column of each variant.
    `changes` describes what each variant changes outside the layers. `swap` puts the changes of one variant into the
    model for the length of a `with` block.
    """

    def __init__(
        self,
        head: Head,
        ids: Sequence[int],
        state: Tensor,
        columns: Sequence[int],
        changes: Sequence[Hashable],
        swap: Callable[[int], AbstractContextManager[None]],
    ):
        self._head, self._ids, self._state = head, ids, state
        self._columns, self._changes, self._swap = columns, changes, swap

    def wrap(self) -> Logits:
        """Return the logits as an object that computes them on request."""
        with self._swap(0):
            divisible = self._head.is_divisible(self._ids, self._state[self._columns[0]])
        read = self._read if divisible else None
        find = self._find_last_product if divisible else None
        return Logits(len(self._columns), self._compute, read, self._head.vocabulary, self._state.device, find)

    def _find_last_product(self) -> LastProduct | None:
        if len(set(self._changes)) > 1:
            return None
        with self._swap(0):
            matrix = self._head.find_last_product(self._ids, self._state[self._columns[0]])
        return None if matrix is None else LastProduct(matrix, self._read_inputs)

    def _read_inputs(self, variants: Sequence[int], tokens: slice) -> Tensor:
        hidden = self._state[[self._columns[variant] for variant in variants], tokens]
        with self._swap(variants[0]):
            inputs = self._head.read_inputs(self._ids, hidden.flatten(0, 1))
        return inputs.view(*hidden.shape[:2], -1)

    def _compute(self, variant: int) -> Tensor:
        with self._swap(variant):
            return self._head.compute(self._ids, self._state[self._columns[variant]][None])

    def _read(self, variants: Sequence[int], tokens: slice) -> Tensor:
        """Compute the logits (variants, tokens, vocabulary). They are valid until the next call."""
        if len({self._changes[variant] for variant in variants}) > 1:
            return torch.cat([self._read([variant], tokens).clone() for variant in variants])
        hidden = self._state[[self._columns[variant] for variant in variants], tokens]
        with self._swap(variants[0]):
            logits = self._head.compute_rows(self._ids, hidden.flatten(0, 1))
        return logits.view(*hidden.shape[:2], -1)
