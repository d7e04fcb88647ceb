"""One model in several variants at once, layer by layer, from one reading of its weights.

A variant is the stored checkpoint with some scalars at other values: a patched model's base, a candidate zeroed, a
factor of a sweep. All of them go through the layers side by side. Up to the first layer that a variant touches they
are one and are computed once; in a layer that is touched, each variant's rows are computed with its own scalars put
into the weights, and the stored ones put back after. So every variant is computed exactly as if its checkpoint had
been loaded alone, wherever its scalars lie: in a linear layer, an expert, a norm or the embedding.

How the model calls its layers (masks, positions) is learnt from transformers' own code: a rehearsal runs it with
stand-ins for the layers that note what they are called with. Then the layers are called here, one after the other, so
that only the running one needs its weights (stream.py). The head is transformers' own again. A model whose layers
cannot be called like this is run whole, once for each variant.

This room knows modules and parameters. It knows no text, no tokenizer and no metric.
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
from swsurgery.model.calls import Call, Unknown, hidden_of, leaves, like, on_device, same, split
from swsurgery.model.places import Places, Variant, find_decoder_layers
from swsurgery.progress import Progress, Silent

TOKENS_AT_ONCE = 2048
"""Tokens that go through a layer in one call: enough to keep a device busy, and what bounds its memory."""

ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Not cuDNN's, which plans anew for each shape: half a second on an H100, as much as the rest of 13.5 GB takes."""

#: What the code of a model raises when it is called in a way that it does not expect.
REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError)


class Peak(NamedTuple):
    """The largest hidden state by magnitude that left a decoder layer: where, and its signed value."""

    layer: int
    token: int
    channel: int
    value: float


class Logits:
    """The logits of each variant for one sequence, computed when they are asked for, and not kept: all together may
    be larger than the model. To be read before the next sequence is."""

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
    """What all variants made of one sequence: logits (tokens, vocabulary) in the model's dtype, and the peaks."""

    sequence: int
    logits: Logits
    peaks: tuple[Peak | None, ...]


class Watch(Protocol):
    """Someone who looks at the layers while they run."""

    def around(self, number: int, layer: nn.Module, rows: Sequence[tuple[int, int]]) -> AbstractContextManager[None]:
        """Entered around one call of a decoder layer, whose weights are there. Each row of the batch is a (sequence,
        variant); before the first layer that a variant touches a row stands for all variants, and its variant is 0."""
        ...

    def after(self, number: int, rows: Sequence[tuple[int, int]], hidden: Tensor) -> None:
        """What left the layer: hidden states (rows, tokens, channels)."""
        ...


class Weights(Protocol):
    """Where a layer's weights come from, if they are not in memory all the time. `sizes` are the layers' in bytes."""

    @property
    def sizes(self) -> Sequence[int]: ...

    def layer(self, number: int) -> AbstractContextManager[torch.device]:
        """The layer has its weights, on the device that is given, while this lasts."""
        ...

    def outside(self, head: bool) -> AbstractContextManager[torch.device]:
        """What is no layer's (embedding, last norm, the head where it is asked for) has its weights, on the given
        device, while this lasts."""
        ...

    def close(self) -> None:
        """Stop reading ahead and give the memory back; a layer may be asked for again."""
        ...


@dataclass
class _Group:
    """Sequences of one length on their way: hidden states (sequences, variants or 1, tokens, channels)."""

    sequences: list[int]
    calls: list[Call]
    state: Tensor


class LayeredModel:
    """A causal language model whose variants are computed layer by layer.

    `model` is in evaluation mode. `weights` None means that all of its weights are in memory. Raises ModelError at the
    first run where a scalar of a variant cannot be found in the loaded model, or where the model holds another value
    than the one that is stored: a loader that changed the weights would have us judge something else.
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
        self._returned: Any = None  # what a layer returned, as a pattern for its stand-in
        self._one_by_one = False
        self._layered: bool | None = None if self.layers else False

    @property
    def method(self) -> str:
        """ "streamed", or "layer by layer" with all weights in memory, or "whole passes" where the model's code allows
        neither (known for sure after a run)."""
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
        """Every sequence (token ids, of any lengths) in every variant. One Outcomes for each sequence, in order.

        Memory beside the weights: sequences x variants x tokens x channels of hidden states. `progress` counts a step
        for each layer and one for each sequence, or the bytes that are streamed, and its label the layers and then the
        sequences.
        """
        progress = progress or Silent()
        self.places.find(variants)
        try:
            layered = self.layered(sequences[0])
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

    def layered(self, ids: Sequence[int]) -> bool:
        """Can the layers be called from here? So it is where what they are called with does not depend on the tokens,
        and where nothing lives on in it from call to call. Answered once, by a rehearsal of `ids` and its reverse."""
        if self._layered is None:
            try:
                with torch.no_grad(), self._outside():
                    _, calls = self._rehearse(ids)
                    _, others = self._rehearse(ids[::-1])
                self._layered = len(calls) == len(self.layers) and same(calls, others)
                self._one_by_one = any(
                    leaf.dim() > 1 and len(leaf) != 1 for leaf in leaves(calls) if isinstance(leaf, Tensor)
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
            touched = any(self.places.touches(variant, number) for variant in variants)
            with self._weights_of(number) as device:
                for group in groups:
                    group.state = group.state.to(device)
                    if touched and group.state.shape[1] == 1:
                        group.state = group.state.repeat(1, len(variants), 1, 1)
                    if touched:
                        for index, variant in enumerate(variants):
                            with self.places.swapped(variant, number):
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
                    with torch.no_grad(), self.places.swapped(variants[index], None):
                        return self._head(ids, state[index : index + 1])

                found = tuple(peaks.of(number, index) for index in range(len(variants)))
                yield Outcomes(number, Logits(len(variants), logits), found)
                progress.advance(0 if self.weights else 1)

    def _enter(self, sequences: Sequence[Sequence[int]], variants: Sequence[Variant]) -> list[_Group]:
        """The hidden states with which the first layer is called; one group for each length."""
        lengths: dict[int, list[int]] = defaultdict(list)
        for number, ids in enumerate(sequences):
            lengths[len(ids)].append(number)
        apart = any(self.places.touches(variant, None) for variant in variants)
        groups = []
        for numbers in lengths.values():
            states: list[Tensor] = []
            calls: list[Call] = []
            for number in numbers:
                rows = []
                for variant in variants if apart else ({},):
                    with self.places.swapped(variant, None):
                        hidden, calls = self._rehearse(sequences[number])
                    rows.append(hidden[0])
                states.append(torch.stack(rows))
            groups.append(_Group(numbers, calls, torch.stack(states)))
        return groups

    def _advance(self, number: int, layer: nn.Module, group: _Group, columns: slice, watch: Watch | None) -> None:
        """Take some variants of all sequences of a group through one layer, in batches of bounded size."""
        state = group.state[:, columns]
        tokens = state.shape[2]
        variants = range(group.state.shape[1])[columns]
        rows = [(at, v) for at in range(len(group.sequences)) for v in variants]
        size = 1 if self._one_by_one else max(1, TOKENS_AT_ONCE // tokens)
        call = on_device(group.calls[number], group.state.device)
        for begin in range(0, len(rows), size):
            batch = rows[begin : begin + size]
            at, v = torch.tensor(batch, device=state.device).unbind(1)
            named = [(group.sequences[row], variant) for row, variant in batch]
            with watch.around(number, layer, named) if watch else contextlib.nullcontext(), sdpa_kernel(ATTENTION):
                hidden = hidden_of(layer(group.state[at, v], *call.args, **call.kwargs))
            if watch:
                watch.after(number, named, hidden)
            group.state[at, v] = hidden

    def _rehearse(self, ids: Sequence[int]) -> tuple[Tensor, list[Call]]:
        """Run the model with stand-ins for its layers: the hidden states (1, tokens, channels) with which the first is
        called, and what each is called with beside them."""
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
                return like(self._returned, hidden)

            return forward

        with self._replaced(stand_in), contextlib.suppress(_Rehearsed):
            self.model(input_ids=self._tokens(ids), use_cache=False)
        if len(calls) != len(self.layers):
            raise Unknown
        return entered[0], calls

    def _try_layer(self, number: int, layer: nn.Module, hidden: Tensor, call: Call) -> Any:
        """What a layer returns, to make its stand-in return the like; without its weights if that can be."""
        if self.weights is not None:
            kept = [(module, dict(module._buffers)) for module in layer.modules()]
            try:
                moved = on_device(call, torch.device("meta"))
                return type(layer).forward(layer, hidden.to("meta"), *moved.args, **moved.kwargs)
            except REFUSALS:
                pass
            finally:
                for module, buffers in kept:  # GPT-J moves its table of positions to where it was called last
                    module._buffers.update(buffers)
        with self._weights_of(number) as device:
            moved = on_device(call, device)
            return type(layer).forward(layer, hidden.to(device), *moved.args, **moved.kwargs)

    def _head(self, ids: Sequence[int], hidden: Tensor) -> Tensor:
        """The logits (tokens, vocabulary) that the model makes of what its last layer gave."""

        def stand_in(number: int, layer: nn.Module) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                passing, _ = split(args, kwargs)
                return like(self._returned, hidden if layer is self.layers[-1] else passing)

            return forward

        with self._replaced(stand_in):
            return self._logits(ids)

    @contextlib.contextmanager
    def _replaced(self, stand_in: Callable[[int, nn.Module], Callable[..., Any]]) -> Iterator[None]:
        """Layers call what `stand_in` gives for them while this lasts."""
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
                with self.places.swapped(variant), self._observed(number, index, watch, peaks):
                    logits.append(self._logits(ids))
                found.append(peaks.of(number, 0))
            yield Outcomes(number, Logits(len(logits), logits.__getitem__), tuple(found))
            progress.advance(1)

    @contextlib.contextmanager
    def _observed(self, sequence: int, variant: int, watch: Watch | None, peaks: _Peaks) -> Iterator[None]:
        def observed(number: int, layer: nn.Module) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                rows = [(sequence, variant)]
                with watch.around(number, layer, rows) if watch else contextlib.nullcontext():
                    returned = type(layer).forward(layer, *args, **kwargs)
                hidden = hidden_of(returned)
                if watch:
                    watch.after(number, rows, hidden)
                peaks.look(number, _Group([sequence], [], hidden[:, None]))
                return returned

            return forward

        with self._replaced(observed):
            yield


class _Rehearsed(Exception):
    """The last layer was called: the rehearsal is over."""


class _Peaks:
    """Remembers the largest |hidden state| of each row after each decoder layer."""

    def __init__(self) -> None:
        self._seen: dict[int, list[tuple[int, int, Tensor, Tensor]]] = defaultdict(list)

    def look(self, layer: int, group: _Group) -> None:
        flat = group.state.flatten(2)  # (sequences, variants, tokens * channels)
        where = torch.empty(flat.shape[:2], dtype=torch.long, device=flat.device)
        for at, rows in enumerate(flat):  # one sequence at a time: this takes memory of its own
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
