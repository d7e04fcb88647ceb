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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swsurgery.architectures import loaded_candidates
from swsurgery.checkpoint import Checkpoint
from swsurgery.coordinate import Coordinate
from swsurgery.dtypes import decode
from swsurgery.errors import ModelError
from swsurgery.progress import Progress, Silent

Variant = Mapping[Coordinate, float]
"""Stored scalars and the value that each has in this variant; {} is the checkpoint as it is stored."""

TOKENS_AT_ONCE = 2048
"""Tokens that go through a layer in one call: enough to keep a device busy, and what bounds its memory."""

#: What the code of a model raises when it is called in a way that it does not expect.
REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError)


class Peak(NamedTuple):
    """The largest hidden state by magnitude that left a decoder layer: where, and its signed value."""

    layer: int
    token: int
    channel: int
    value: float


class Logits(Sequence[Tensor]):
    """The logits of each variant for one sequence, computed when they are asked for, and not kept: all together may
    be larger than the model. To be read before the next sequence is."""

    def __init__(self, variants: int, compute: Callable[[int], Tensor]):
        self._variants, self._compute = variants, compute

    def __len__(self) -> int:
        return self._variants

    def __getitem__(self, variant: int) -> Tensor:
        if not 0 <= variant < self._variants:
            raise IndexError(variant)
        return self._compute(variant)


class Outcomes(NamedTuple):
    """What all variants made of one sequence: logits (tokens, vocabulary) in the model's dtype, and the peaks."""

    sequence: int
    logits: Sequence[Tensor]
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

    sizes: Sequence[int]

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


@dataclass(frozen=True)
class _Place:
    """One scalar inside the loaded model. `owners` are all modules that hold its parameter, with the name it has
    there; `layers` are the decoder layers among which they lie, None for outside."""

    coordinate: Coordinate
    index: tuple[int, ...]
    stored: float
    owners: tuple[tuple[nn.Module, str], ...]
    layers: frozenset[int | None]


class _Call(NamedTuple):
    """What one layer is called with beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class _Group:
    """Sequences of one length on their way: hidden states (sequences, variants or 1, tokens, channels)."""

    sequences: list[int]
    calls: list[_Call]
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
        self._owners = _owners_of_parameters(model, self.layers)
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
        for each layer and one for each sequence, or the bytes that are streamed.
        """
        progress = progress or Silent()
        places = self._find_all(variants)
        layers = f"{len(self.layers)} layers"
        if self.weights is None:
            progress.start(len(self.layers) + len(sequences), "step", layers)
        else:
            progress.start(sum(self.weights.sizes), "B", layers)
        try:
            if self.layered(sequences[0]):
                yield from self._run_layers(sequences, variants, places, watch, progress)
            else:
                yield from self._run_whole(sequences, variants, places, watch, progress)
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
                self._layered = len(calls) == len(self.layers) and _same(calls, others)
                self._one_by_one = any(
                    leaf.dim() > 1 and len(leaf) != 1 for leaf in _leaves(calls) if isinstance(leaf, Tensor)
                )
            except torch.OutOfMemoryError:
                raise
            except (_Unknown, *REFUSALS):
                self._layered = False
        return self._layered

    # Layer by layer -------------------------------------------------------------------------------------------------

    def _run_layers(
        self,
        sequences: Sequence[Sequence[int]],
        variants: Sequence[Variant],
        places: Mapping[Coordinate, _Place],
        watch: Watch | None,
        progress: Progress,
    ) -> Iterator[Outcomes]:
        with self._outside():
            groups = self._enter(sequences, variants, places)
        peaks = _Peaks()
        for number, layer in enumerate(self.layers):
            touched = any(number in places[coordinate].layers for variant in variants for coordinate in variant)
            with self._weights_of(number) as device:
                for group in groups:
                    group.state = group.state.to(device)
                    if touched and group.state.shape[1] == 1:
                        group.state = group.state.repeat(1, len(variants), 1, 1)
                    if touched:
                        for index, variant in enumerate(variants):
                            with self._swapped(variant, places, number):
                                self._advance(number, layer, group, slice(index, index + 1), watch)
                    else:
                        self._advance(number, layer, group, slice(None), watch)
                    peaks.look(number, group)
            progress.advance(self.weights.sizes[number] if self.weights else 1)
        where = {number: (group, at) for group in groups for at, number in enumerate(group.sequences)}
        with self._outside(head=True) as device:
            for number, ids in enumerate(sequences):
                group, at = where[number]
                state = group.state[at].to(device).expand(len(variants), -1, -1)

                def logits(index: int, ids: Sequence[int] = ids, state: Tensor = state) -> Tensor:
                    with torch.no_grad(), self._swapped(variants[index], places, None):
                        return self._head(ids, state[index : index + 1])

                found = tuple(peaks.of(number, index) for index in range(len(variants)))
                yield Outcomes(number, Logits(len(variants), logits), found)
                progress.advance(0 if self.weights else 1)

    def _enter(
        self, sequences: Sequence[Sequence[int]], variants: Sequence[Variant], places: Mapping[Coordinate, _Place]
    ) -> list[_Group]:
        """The hidden states with which the first layer is called; one group for each length."""
        lengths: dict[int, list[int]] = defaultdict(list)
        for number, ids in enumerate(sequences):
            lengths[len(ids)].append(number)
        apart = any(_touches(variant, places, None) for variant in variants)
        groups = []
        for numbers in lengths.values():
            states, calls = [], []
            for number in numbers:
                rows = []
                for variant in variants if apart else ({},):
                    with self._swapped(variant, places, None):
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
        call = _on_device(group.calls[number], group.state.device)
        for begin in range(0, len(rows), size):
            batch = rows[begin : begin + size]
            at, v = torch.tensor(batch, device=state.device).unbind(1)
            named = [(group.sequences[row], variant) for row, variant in batch]
            with watch.around(number, layer, named) if watch else contextlib.nullcontext():
                hidden = _hidden(layer(group.state[at, v], *call.args, **call.kwargs))
            if watch:
                watch.after(number, named, hidden)
            group.state[at, v] = hidden

    def _rehearse(self, ids: Sequence[int]) -> tuple[Tensor, list[_Call]]:
        """Run the model with stand-ins for its layers: the hidden states (1, tokens, channels) with which the first is
        called, and what each is called with beside them."""
        entered: list[Tensor] = []
        calls: list[_Call] = []

        def stand_in(number: int, layer: nn.Module) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, call = _split(args, kwargs)
                entered.append(hidden)
                calls.append(call)
                if self._returned is None:
                    self._returned = self._try_layer(number, layer, hidden, call)
                if len(calls) == len(self.layers):
                    raise _Rehearsed
                return _like(self._returned, hidden)

            return forward

        with self._replaced(stand_in), contextlib.suppress(_Rehearsed):
            self.model(input_ids=self._tokens(ids), use_cache=False)
        if len(calls) != len(self.layers):
            raise _Unknown
        return entered[0], calls

    def _try_layer(self, number: int, layer: nn.Module, hidden: Tensor, call: _Call) -> Any:
        """What a layer returns, to make its stand-in return the like; without its weights if that can be."""
        if self.weights is not None:
            kept = [(module, dict(module._buffers)) for module in layer.modules()]
            try:
                moved = _on_device(call, torch.device("meta"))
                return type(layer).forward(layer, hidden.to("meta"), *moved.args, **moved.kwargs)
            except REFUSALS:
                pass
            finally:
                for module, buffers in kept:  # GPT-J moves its table of positions to where it was called last
                    module._buffers.update(buffers)
        with self._weights_of(number) as device:
            moved = _on_device(call, device)
            return type(layer).forward(layer, hidden.to(device), *moved.args, **moved.kwargs)

    def _head(self, ids: Sequence[int], hidden: Tensor) -> Tensor:
        """The logits (tokens, vocabulary) that the model makes of what its last layer gave."""

        def stand_in(number: int, layer: nn.Module) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                passing, _ = _split(args, kwargs)
                return _like(self._returned, hidden if layer is self.layers[-1] else passing)

            return forward

        with self._replaced(stand_in):
            return self.model(input_ids=self._tokens(ids), use_cache=False).logits[0]

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

    def _tokens(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=self.device)

    # Whole passes ---------------------------------------------------------------------------------------------------

    def _run_whole(
        self,
        sequences: Sequence[Sequence[int]],
        variants: Sequence[Variant],
        places: Mapping[Coordinate, _Place],
        watch: Watch | None,
        progress: Progress,
    ) -> Iterator[Outcomes]:
        for number, ids in enumerate(sequences):
            logits, found = [], []
            for index, variant in enumerate(variants):
                if index and not variant and not variants[0]:
                    logits.append(logits[0])
                    found.append(found[0])
                    continue
                peaks = _Peaks()
                with self._swapped(variant, places), self._observed(number, index, watch, peaks):
                    logits.append(self.model(input_ids=self._tokens(ids), use_cache=False).logits[0])
                found.append(peaks.of(number, 0))
            yield Outcomes(number, tuple(logits), tuple(found))
            progress.advance(1)

    @contextlib.contextmanager
    def _observed(self, sequence: int, variant: int, watch: Watch | None, peaks: _Peaks) -> Iterator[None]:
        def observed(number: int, layer: nn.Module) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                rows = [(sequence, variant)]
                with watch.around(number, layer, rows) if watch else contextlib.nullcontext():
                    returned = type(layer).forward(layer, *args, **kwargs)
                hidden = _hidden(returned)
                if watch:
                    watch.after(number, rows, hidden)
                peaks.look(number, _Group([sequence], [], hidden[:, None]))
                return returned

            return forward

        with self._replaced(observed):
            yield

    # Scalars --------------------------------------------------------------------------------------------------------

    def _find_all(self, variants: Sequence[Variant]) -> dict[Coordinate, _Place]:
        return {coordinate: self._find(coordinate) for variant in variants for coordinate in variant}

    def _find(self, coordinate: Coordinate) -> _Place:
        """The place of a stored scalar in the loaded model: the first candidate that exists."""
        shapes = self.checkpoint.shapes
        if coordinate.tensor in shapes:
            for candidate in loaded_candidates(self.checkpoint.config, coordinate, shapes):
                owners = self._owners.get(candidate.tensor)
                if owners and _inside(candidate.index, owners.shape):
                    shard = self.checkpoint.shards[self.checkpoint.weight_map[coordinate.tensor]]
                    try:
                        stored = shard.read_scalar(*coordinate)
                    except IndexError:
                        break
                    value = float(decode(self.checkpoint.info(coordinate.tensor).dtype, stored))
                    return _Place(coordinate, candidate.index, value, owners.modules, owners.layers)
        raise ModelError("no such scalar in the loaded model", coordinate, "--check weights")

    @contextlib.contextmanager
    def _swapped(
        self, variant: Variant, places: Mapping[Coordinate, _Place], where: int | None | object = ...
    ) -> Iterator[None]:
        """The weights of layer `where` (None: those outside the layers; ...: all) are those of `variant` while this
        lasts; afterwards, come what may, they have their very bits back."""
        kept: list[tuple[Tensor, tuple[int, ...], Tensor]] = []
        try:
            for coordinate, value in variant.items():
                place = places[coordinate]
                if where is not ... and where not in place.layers:
                    continue
                module, name = place.owners[0]
                weight = module._parameters[name].data
                if weight.device.type == "meta":  # the head, while only the embedding is there
                    continue
                held = weight[place.index].clone()
                expected = torch.tensor(place.stored, dtype=torch.float64).to(weight.dtype)
                if float(held) != float(expected):
                    raise ModelError(
                        f"the loaded model holds {float(held):g}, not the stored value {float(expected):g}",
                        coordinate,
                        "the loader changes this weight; --check weights",
                    )
                kept.append((weight, place.index, held))
                weight[place.index] = value
            yield
        finally:
            for weight, index, held in reversed(kept):
                weight[index] = held


class _Rehearsed(Exception):
    """The last layer was called: the rehearsal is over."""


class _Unknown(Exception):
    """The layers are called in a way that is not understood here."""


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


class _Owners(NamedTuple):
    """The modules that hold one parameter, with its name there, and the layers among which they lie."""

    modules: tuple[tuple[nn.Module, str], ...]
    layers: frozenset[int | None]
    shape: torch.Size


def _owners_of_parameters(model: nn.Module, layers: Sequence[nn.Module]) -> dict[str, _Owners]:
    """Every parameter by each of its names."""
    layer_of = {id(module): number for number, layer in enumerate(layers) for module in layer.modules()}
    holders: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    names: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                names[f"{path}.{name}" if path else name] = parameter
                if (module, name) not in holders[id(parameter)]:
                    holders[id(parameter)].append((module, name))
    return {
        name: _Owners(
            tuple(holders[id(parameter)]),
            frozenset(layer_of.get(id(module)) for module, _ in holders[id(parameter)]),
            parameter.shape,
        )
        for name, parameter in names.items()
    }


def find_decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers of the text model in order: the first list of modules, from the outside in, that is as long
    as the config says; empty where there is none."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for root in (model.get_decoder(), model):
        for module in root.modules() if isinstance(root, nn.Module) else ():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return list(module)
    return []


def _touches(variant: Variant, places: Mapping[Coordinate, _Place], where: int | None) -> bool:
    return any(where in places[coordinate].layers for coordinate in variant)


def _inside(index: tuple[int, ...], shape: Sequence[int]) -> bool:
    return len(index) == len(shape) and all(0 <= i < size for i, size in zip(index, shape, strict=True))


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, _Call]:
    """The hidden states with which a layer is called, and the rest."""
    if args:
        hidden, call = args[0], _Call(args[1:], kwargs)
    else:
        hidden, call = kwargs.get("hidden_states"), _Call((), {k: v for k, v in kwargs.items() if k != "hidden_states"})
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise _Unknown
    return hidden, call


def _hidden(returned: Any) -> Tensor:
    hidden = returned[0] if isinstance(returned, tuple) else returned
    if not isinstance(hidden, Tensor):
        raise _Unknown
    return hidden


def _like(returned: Any, hidden: Tensor) -> Any:
    """What a layer would return with these hidden states."""
    _hidden(returned)
    return (hidden, *returned[1:]) if isinstance(returned, tuple) else hidden


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        yield value
        return
    for item in value:
        yield from _leaves(item)


def _same(calls: Iterable[_Call], others: Iterable[_Call]) -> bool:
    """Are these the same calls, made of tensors and plain values only?"""
    pairs = list(zip(_leaves(list(calls)), _leaves(list(others)), strict=True))
    for one, other in pairs:
        if isinstance(one, Tensor):
            if not isinstance(other, Tensor) or not torch.equal(one, other):
                return False
        elif not isinstance(one, (int, float, str, torch.dtype, type(None))) or one != other:
            return False
    return True


def _on_device(value: Any, device: torch.device) -> Any:
    """The same with every tensor on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, _Call):
        return _Call(_on_device(value.args, device), _on_device(value.kwargs, device))
    if isinstance(value, Mapping):
        return {key: _on_device(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_on_device(item, device) for item in value)
    return value
