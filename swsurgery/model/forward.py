"""Run several variants of one model side by side, layer by layer, reading its weights once.

A variant is the stored checkpoint with other values for some scalars, for example the base of a patched checkpoint, or
a checkpoint in which one candidate is zeroed. Layers before the first changed one are computed once for all variants.
In a changed layer, the scalars of each variant are written into the weights, the variant's hidden states are computed,
and the stored scalars are restored. The results are the same as if each variant were loaded from a checkpoint of its
own and run alone. This holds for scalars of any parameter: linear layers, experts, norms and the embedding.

A rehearsal finds the arguments with which the model calls its layers, such as masks and positions: the code of
transformers runs with stand-ins for the layers, which record their arguments. Afterwards this module calls the layers
one after the other, so that only the layer that is running needs its weights in memory (stream.py). The code of
transformers computes the head. If the layers of a model cannot be called this way, the whole model runs once per
variant.

This module must not depend on texts, tokenizers or metrics.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.model.calls import (
    Call,
    Unknown,
    find_hidden,
    is_same_calls,
    list_leaves,
    move_to_device,
    replace_hidden,
    split,
)
from swsurgery.model.places import Places, Variant, find_decoder_layers
from swsurgery.progress import Progress, Silent

TOKENS_AT_ONCE = 2048
"""Maximum number of tokens in one call of a layer. More tokens would need more memory and gain no speed."""

ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Attention kernels that torch may use. cuDNN's kernel is excluded: on an H100 it takes half a second to plan each new
input shape. The rest of a run of a 13.5 GB model takes no longer than that."""

REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError)
"""Exceptions that the code of a model raises for arguments that it does not support."""


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

    `peaks` contains the largest hidden state of each variant, or None for each variant if the model has no list of
    decoder layers.
    """

    sequence: int
    logits: Logits
    peaks: tuple[Peak | None, ...]


class Watch(Protocol):
    """An object that is passed to `LayeredModel.run` and observes each call of a decoder layer."""

    def around(self, number: int, layer: nn.Module, rows: Sequence[tuple[int, int]]) -> AbstractContextManager[None]:
        """Return a context manager that is open during one call of the decoder layer `number`, with its weights loaded.

        `rows` contains the (sequence, variant) of each row of the batch. Before the first changed layer, the variants
        do not differ yet, so one row represents all of them and its variant is 0.
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


@dataclass
class _Group:
    """The sequences of one length, which run together.

    `sequences` contains their numbers, and `calls` the arguments of each layer. `state` contains their hidden states
    (sequences, variants, tokens, channels); its second axis has length 1 until the first changed layer.
    """

    sequences: list[int]
    calls: list[Call]
    state: Tensor


class LayeredModel:
    """A causal language model whose variants are computed layer by layer.

    `model` is in evaluation mode. If `weights` is None, all of its weights are in memory. `run` raises ModelError if a
    scalar of a variant is not in the loaded model, or if its loaded value differs from the stored one, because the
    results would then be those of other weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        weights: Weights | None = None,
        device: torch.device | None = None,
    ):
        self.model, self.checkpoint, self.weights = model, checkpoint, weights
        self.layers = find_decoder_layers(model)
        self.dtype, self.device = model.dtype, device or model.device
        self.places = Places(model, self.layers, checkpoint)
        self._returned: Any = None  # the return value of one layer, a template for the stand-ins
        self._one_by_one = False
        self._layered: bool | None = None if self.layers else False

    @property
    def method(self) -> str:
        """How the model runs: "streamed", "layer by layer" or "whole passes".

        With "streamed", the weights of two layers at a time are in memory; with "layer by layer", all weights are. With
        "whole passes", the whole model runs once per variant, because its layers cannot be called separately. The value
        is final after the first run.
        """
        if self._layered is False:
            return "whole passes"
        return "layer by layer" if self.weights is None else "streamed"

    @torch.no_grad()
    def run(
        self,
        sequences: Sequence[Sequence[int]],
        variants: Sequence[Variant] = ({},),
        *,
        watch: Watch | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Outcomes]:
        """Run every sequence of token ids in every variant and yield one Outcomes per sequence, in order.

        Sequences may differ in length. In addition to the weights, memory holds one hidden state per sequence, variant,
        token and channel. `progress` counts one step per layer and one per sequence, or bytes if the weights are
        streamed. Its label names the current layer or sequence. Raises ModelError in the cases that the class
        describes, and CheckpointError if a streamed shard cannot be read.
        """
        progress = progress or Silent()
        self.places.find(variants)
        try:
            layered = self.is_layered(sequences[0])
            steps = len(sequences) + (len(self.layers) if layered else 0)
            total, unit = (steps, "step") if self.weights is None else (sum(self.weights.sizes), "B")
            progress.start(total, unit, f"{len(self.layers)} layers")
            if layered:
                yield from self._run_layers(sequences, variants, watch, progress)
            else:
                yield from self._run_whole(sequences, variants, watch, progress)
        finally:
            progress.close()
            if self.weights is not None:
                self.weights.close()

    def is_layered(self, ids: Sequence[int]) -> bool:
        """Return True if this class can call the layers one by one.

        It can if the arguments of the layers neither depend on the tokens nor carry state from call to call. The first
        call of this method decides this for good: it compares two rehearsals, one with the token ids `ids` and one with
        their reverse.
        """
        if self._layered is None:
            try:
                with torch.no_grad(), self._outside():
                    _, calls = self._rehearse(ids)
                    _, others = self._rehearse(ids[::-1])
                self._layered = len(calls) == len(self.layers) and is_same_calls(calls, others)
                self._one_by_one = any(
                    leaf.dim() > 1 and len(leaf) != 1 for leaf in list_leaves(calls) if isinstance(leaf, Tensor)
                )
            except torch.OutOfMemoryError:
                raise
            except (Unknown, *REFUSALS):
                self._layered = False
        return self._layered

    # Layer by layer -------------------------------------------------------------------------------------------------

    def _run_layers(
        self,
        sequences: Sequence[Sequence[int]],
        variants: Sequence[Variant],
        watch: Watch | None,
        progress: Progress,
    ) -> Iterator[Outcomes]:
        with self._outside():
            groups = self._enter(sequences, variants)
        peaks = _Peaks()
        for number, layer in enumerate(self.layers):
            progress.relabel(f"layer {number + 1}/{len(self.layers)}")
            touched = any(self.places.has_scalars_in(variant, number) for variant in variants)
            with self._weights_of(number) as device:
                for group in groups:
                    group.state = group.state.to(device)
                    if touched and group.state.shape[1] == 1:
                        group.state = group.state.repeat(1, len(variants), 1, 1)
                    if touched:
                        for index, variant in enumerate(variants):
                            with self.places.swap(variant, number):
                                self._advance(number, layer, group, slice(index, index + 1), watch)
                    else:
                        self._advance(number, layer, group, slice(None), watch)
                    peaks.look(number, group)
            progress.advance(self.weights.sizes[number] if self.weights else 1)
        where = {number: (group, at) for group in groups for at, number in enumerate(group.sequences)}
        with self._outside(head=True) as device:
            for number, ids in enumerate(sequences):
                progress.relabel(f"sequence {number + 1}/{len(sequences)}")
                group, at = where[number]
                state = group.state[at].to(device).expand(len(variants), -1, -1)

                def logits(index: int, ids: Sequence[int] = ids, state: Tensor = state) -> Tensor:
                    with torch.no_grad(), self.places.swap(variants[index], None):
                        return self._head(ids, state[index : index + 1])

                found = tuple(peaks.of(number, index) for index in range(len(variants)))
                yield Outcomes(number, Logits(len(variants), logits), found)
                progress.advance(0 if self.weights else 1)

    def _enter(self, sequences: Sequence[Sequence[int]], variants: Sequence[Variant]) -> list[_Group]:
        """Compute the input of the first layer for every sequence, and group the sequences by length."""
        lengths: dict[int, list[int]] = defaultdict(list)
        for number, ids in enumerate(sequences):
            lengths[len(ids)].append(number)
        apart = any(self.places.has_scalars_in(variant, None) for variant in variants)
        groups = []
        for numbers in lengths.values():
            states: list[Tensor] = []
            calls: list[Call] = []
            for number in numbers:
                rows = []
                for variant in variants if apart else ({},):
                    with self.places.swap(variant, None):
                        hidden, calls = self._rehearse(sequences[number])
                    rows.append(hidden[0])
                states.append(torch.stack(rows))
            groups.append(_Group(numbers, calls, torch.stack(states)))
        return groups

    def _advance(self, number: int, layer: nn.Module, group: _Group, columns: slice, watch: Watch | None) -> None:
        """Run one layer on all sequences of a group, in batches of bounded size.

        The slice `columns` selects the variants.
        """
        state = group.state[:, columns]
        tokens = state.shape[2]
        variants = range(group.state.shape[1])[columns]
        rows = [(at, v) for at in range(len(group.sequences)) for v in variants]
        size = 1 if self._one_by_one else max(1, TOKENS_AT_ONCE // tokens)
        call = move_to_device(group.calls[number], group.state.device)
        for begin in range(0, len(rows), size):
            batch = rows[begin : begin + size]
            at, v = torch.tensor(batch, device=state.device).unbind(1)
            named = [(group.sequences[row], variant) for row, variant in batch]
            with watch.around(number, layer, named) if watch else contextlib.nullcontext(), sdpa_kernel(ATTENTION):
                hidden = find_hidden(layer(group.state[at, v], *call.args, **call.kwargs))
            if watch:
                watch.after(number, named, hidden)
            group.state[at, v] = hidden

    def _rehearse(self, ids: Sequence[int]) -> tuple[Tensor, list[Call]]:
        """Run the model on one sequence with stand-ins for its layers.

        Returns the hidden states (1, tokens, channels) that enter the first layer, and the other arguments of each
        layer. Raises Unknown if the model does not call every layer once, in a form that `calls.py` supports.
        """
        entered: list[Tensor] = []
        calls: list[Call] = []

        def stand_in(number: int, layer: nn.Module) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, call = split(args, kwargs)
                entered.append(hidden)
                calls.append(call)
                if self._returned is None:
                    self._returned = self._try_layer(number, layer, hidden, call)
                if len(calls) == len(self.layers):
                    raise _Rehearsed
                return replace_hidden(self._returned, hidden)

            return forward

        with self._replace_forwards(stand_in), contextlib.suppress(_Rehearsed):
            self.model(input_ids=self._tokens(ids), use_cache=False)
        if len(calls) != len(self.layers):
            raise Unknown
        return entered[0], calls

    def _try_layer(self, number: int, layer: nn.Module, hidden: Tensor, call: Call) -> Any:
        """Run one layer to learn the form of its return value.

        Streamed weights are loaded only if the layer cannot run on the meta device, which needs no weights.
        """
        if self.weights is not None:
            kept = [(module, dict(module._buffers)) for module in layer.modules()]
            try:
                moved = move_to_device(call, torch.device("meta"))
                return type(layer).forward(layer, hidden.to("meta"), *moved.args, **moved.kwargs)
            except REFUSALS:
                pass
            finally:
                for module, buffers in kept:  # GPT-J moves its table of positions to the device of the last call
                    module._buffers.update(buffers)
        with self._weights_of(number) as device:
            moved = move_to_device(call, device)
            return type(layer).forward(layer, hidden.to(device), *moved.args, **moved.kwargs)

    def _head(self, ids: Sequence[int], hidden: Tensor) -> Tensor:
        """Compute the logits (tokens, vocabulary) from `hidden`, the output of the last layer."""

        def stand_in(number: int, layer: nn.Module) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                passing, _ = split(args, kwargs)
                return replace_hidden(self._returned, hidden if layer is self.layers[-1] else passing)

            return forward

        with self._replace_forwards(stand_in):
            return self._logits(ids)

    @contextlib.contextmanager
    def _replace_forwards(self, stand_in: Callable[[int, nn.Module], Callable[..., Any]]) -> Iterator[None]:
        """Replace the forward method of each layer with the result of `stand_in` for the length of a `with` block."""
        kept = [layer.__dict__.get("forward") for layer in self.layers]
        try:
            for number, layer in enumerate(self.layers):
                layer.forward = stand_in(number, layer)
            yield
        finally:
            for layer, forward in zip(self.layers, kept, strict=True):
                layer.__dict__.pop("forward", None)
                if forward is not None:
                    layer.forward = forward

    def _weights_of(self, number: int) -> AbstractContextManager[torch.device]:
        return self.weights.layer(number) if self.weights else contextlib.nullcontext(self.device)

    def _outside(self, head: bool = False) -> AbstractContextManager[torch.device]:
        return self.weights.outside(head) if self.weights else contextlib.nullcontext(self.device)

    def _logits(self, ids: Sequence[int]) -> Tensor:
        logits: Tensor = self.model(input_ids=self._tokens(ids), use_cache=False).logits
        return logits[0]

    def _tokens(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=self.device)

    # Whole passes ---------------------------------------------------------------------------------------------------

    def _run_whole(
        self,
        sequences: Sequence[Sequence[int]],
        variants: Sequence[Variant],
        watch: Watch | None,
        progress: Progress,
    ) -> Iterator[Outcomes]:
        for number, ids in enumerate(sequences):
            progress.relabel(f"sequence {number + 1}/{len(sequences)}")
            logits: list[Tensor] = []
            found: list[Peak | None] = []
            for index, variant in enumerate(variants):
                if index and not variant and not variants[0]:
                    logits.append(logits[0])
                    found.append(found[0])
                    continue
                peaks = _Peaks()
                with self.places.swap(variant), self._observe(number, index, watch, peaks):
                    logits.append(self._logits(ids))
                found.append(peaks.of(number, 0))
            yield Outcomes(number, Logits(len(logits), logits.__getitem__), tuple(found))
            progress.advance(1)

    @contextlib.contextmanager
    def _observe(self, sequence: int, variant: int, watch: Watch | None, peaks: _Peaks) -> Iterator[None]:
        def watch_layer(number: int, layer: nn.Module) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                rows = [(sequence, variant)]
                with watch.around(number, layer, rows) if watch else contextlib.nullcontext():
                    returned = type(layer).forward(layer, *args, **kwargs)
                hidden = find_hidden(returned)
                if watch:
                    watch.after(number, rows, hidden)
                peaks.look(number, _Group([sequence], [], hidden[:, None]))
                return returned

            return forward

        with self._replace_forwards(watch_layer):
            yield


class _Rehearsed(Exception):
    """Raised by the stand-in for the last layer to end a rehearsal."""


class _Peaks:
    """Collects the largest absolute hidden state of each sequence and variant after each decoder layer."""

    def __init__(self) -> None:
        self._seen: dict[int, list[tuple[int, int, Tensor, Tensor]]] = defaultdict(list)

    def look(self, layer: int, group: _Group) -> None:
        flat = group.state.flatten(2)  # (sequences, variants, tokens * channels)
        where = torch.empty(flat.shape[:2], dtype=torch.long, device=flat.device)
        for at, rows in enumerate(flat):  # one sequence at a time, because abs() allocates a copy
            where[at] = rows.abs().nan_to_num(nan=torch.inf).argmax(dim=1)
        values = flat.gather(2, where[..., None])[..., 0]
        for at, sequence in enumerate(group.sequences):
            self._seen[sequence].append((layer, group.state.shape[-1], where[at], values[at]))

    def of(self, sequence: int, variant: int) -> Peak | None:
        best, largest = None, -1.0
        for layer, channels, where, values in self._seen[sequence]:
            at = min(variant, len(values) - 1)
            value = float(values[at])
            magnitude = torch.inf if value != value else abs(value)  # NaN counts as the largest
            if magnitude > largest:
                best, largest = Peak(layer, *divmod(int(where[at]), channels), value), magnitude
        return best
