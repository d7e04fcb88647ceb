"""Run several variants of one model side by side, layer by layer, reading its weights once.

A variant is the stored checkpoint with other values for some scalars or with some tensors of another checkpoint: the
base of a patched model, a zeroed candidate or a factor of a sweep. Variants that are equal up to a layer are computed
together up to it. In a changed layer, the scalars and tensors of each variant are put into the weights, its rows are
computed, and the stored weights are restored. The result equals loading each variant's checkpoint on its own, for
changes in any parameter. If it is not known how transformers makes a parameter from a changed tensor, transformers
loads that variant as a model of its own.

A rehearsal finds out how the model calls its layers (masks, positions): the code of transformers runs with stand-ins
for the layers, which record their arguments. Then this module calls the layers one after the other, so that only the
running layer needs its weights (stream.py). The code of transformers computes the head. If the layers of a model cannot
be called this way, the whole model runs once per variant.

    outcomes.py       what a run returns
    interfaces.py     what a run expects of the objects that load weights and observe layers

This module must not depend on texts, tokenizers or metrics.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from transformers import PreTrainedModel

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.errors import ModelError, Unrunnable
from swsurgery.model.activations import round_inputs
from swsurgery.model.calls import (
    REFUSALS,
    Call,
    Unknown,
    find_hidden,
    is_same_calls,
    list_leaves,
    move_to_device,
    replace_forwards,
    replace_hidden,
    split,
)
from swsurgery.model.changes import describe_changes
from swsurgery.model.head import Head, VariantLogits
from swsurgery.model.interfaces import LoadOther, Watch, Weights
from swsurgery.model.other_tensors import OtherTensors, find_changed_by_loader
from swsurgery.model.outcomes import Columns, Group, Outcomes, Peak, Peaks, join_outcomes, make_logits
from swsurgery.model.places import Places, find_decoder_layers
from swsurgery.model.readings import divide_sequences
from swsurgery.model.slots import WeightPlan
from swsurgery.model.variant import AnyVariant, Rounding, Variant
from swsurgery.model.wake import ATTENTION, TOKENS_AT_ONCE, TOKENS_ON_GPU
from swsurgery.model.weight_plan import plan_tensors
from swsurgery.progress import NumberedPart, Progress, Silent


class LayeredModel:
    """A causal language model whose variants are computed layer by layer.

    `model` is in evaluation mode. If `weights` is None, all of its weights are in memory. `load_other` loads a variant
    whose tensors have no known place in the model; if it is None, `run` raises ModelError for such a variant. `run`
    raises ModelError if a scalar of a variant is not in the loaded model, or if the loaded value differs from the
    stored one: the figures would then be those of other weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        weights: Weights | None = None,
        device: torch.device | None = None,
        load_other: LoadOther | None = None,
    ):
        self.model, self.checkpoint, self.weights = model, checkpoint, weights
        self.load_other = load_other
        self.layers = find_decoder_layers(model)
        self.dtype, self.device = model.dtype, device or model.device
        self.places = Places(model, self.layers, checkpoint)
        self._returned: Any = None  # the return value of one layer, a template for the stand-ins
        self._one_by_one = False
        self._layered: bool | None = None if self.layers else False
        self._compared: frozenset[str] = frozenset()  # tensors whose loaded values are known to be the stored ones
        self._separate = False

    @property
    def method(self) -> str:
        """How the model runs: "streamed", "layer by layer" or "whole passes".

        "separate models" means that transformers loaded a variant as a model of its own. The value is final after the
        first run.
        """
        if self._separate:
            return "separate models"
        if self._layered is False:
            return "whole passes"
        return "layer by layer" if self.weights is None else "streamed"

    @torch.no_grad()
    def run(
        self,
        sequences: Sequence[Sequence[int]],
        variants: Sequence[AnyVariant] = ({},),
        *,
        watch: Watch | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Outcomes]:
        """Run every sequence of token ids in every variant and yield one Outcomes per sequence, in order.

        Sequences may differ in length. Besides the weights, memory holds sequences x variants x tokens x channels
        hidden states. If they exceed readings.STATES and there is no `watch`, the weights are read several times, each
        time for a part of the sequences. `progress` counts one step per layer and per sequence, or the bytes streamed.
        Its label names the current layer or sequence. `watch` sees no variant that is loaded as a model of its own.
        Raises ModelError as the class describes, and CheckpointError if a streamed shard cannot be read.
        """
        wanted = [Variant.of(variant) for variant in variants]
        plans = [self.plan_variant(variant) for variant in wanted]
        apart = {index: self._load_apart(wanted[index]) for index, plan in enumerate(plans) if plan == "apart"}
        here = [index for index in range(len(wanted)) if index not in apart]
        self._separate = bool(apart)
        inner = [plan for plan in plans if not isinstance(plan, str)]
        mine = self._run_here(sequences, [wanted[index] for index in here], inner, watch, progress or Silent())
        if not apart:
            yield from mine
            return
        runs = [mine, *(one.run(sequences, [wanted[at].without_tensors()]) for at, one in apart.items())]
        order = [*here, *apart]
        for together in zip(*runs, strict=True):
            yield join_outcomes(together, order)

    def _run_here(
        self,
        sequences: Sequence[Sequence[int]],
        variants: Sequence[Variant],
        plans: Sequence[WeightPlan | None],
        watch: Watch | None,
        progress: Progress,
    ) -> Iterator[Outcomes]:
        """Run the variants that this model's modules can take."""
        self.places.find([variant.scalars for variant in variants])
        devices = [self.device] if self.weights is None else self.weights.devices
        try:
            layered = self.is_layered(sequences[0])
            run = self._run_layers if layered else self._run_whole
            readings = self.divide(sequences, len(variants)) if watch is None else [range(len(sequences))]
            steps = len(sequences) + (len(readings) * len(self.layers) if layered else 0)
            total, unit = (steps, "step") if self.weights is None else (len(readings) * sum(self.weights.sizes), "B")
            progress.start(total, unit, f"{len(self.layers)} layers")
            for number, numbers in enumerate(readings):
                part = NumberedPart(progress, "reading", number + 1, len(readings))
                with contextlib.closing(OtherTensors(plans, devices)) as others:
                    yield from run({at: sequences[at] for at in numbers}, variants, others, watch, part)
        finally:
            progress.close()
            if self.weights is not None:
                self.weights.close()

    def divide(self, sequences: Sequence[Sequence[int]], variants: int) -> list[range]:
        """Return for each reading of the weights the numbers of the sequences that `run` computes in it."""
        if not self.is_layered(sequences[0]):
            return [range(len(sequences))]
        size = variants * self.model.config.get_text_config().hidden_size * self.dtype.itemsize
        return divide_sequences([len(ids) for ids in sequences], size, self.count_rows)

    def count_rows(self, tokens: int) -> int:
        """Return how many rows of `tokens` tokens a layer computes in one call."""
        most = TOKENS_ON_GPU if self.device.type == "cuda" and self.weights is None else TOKENS_AT_ONCE
        return 1 if self._one_by_one else max(1, most // tokens)

    def plan_variant(self, variant: Variant) -> WeightPlan | Literal["apart"] | None:
        """Find the parameters that the tensors of a variant change; "apart" if it must be a model of its own.

        Raises ModelError if the tensors do not fit the loaded checkpoint.
        """
        if not variant.tensors:
            return None
        merged = variant.merge(self.checkpoint)
        if self.load_other and any(map(self.checkpoint.quantisation.explain_refusal, variant.tensors)):
            return "apart"  # only a quantiser of transformers knows how it makes parameters of stored codes
        if self.weights is not None:
            self.weights.close()  # while weights are loaded, two tied parameters of a layer and outside are not one
        try:
            plan = plan_tensors(self.model, self.layers, merged, variant.tensors)
            if self.weights is None and variant.tensors - self._compared:
                loaded = plan_tensors(self.model, self.layers, self.checkpoint, variant.tensors - self._compared)
                if tensor := find_changed_by_loader(loaded, self.device):
                    raise Unrunnable("the loader changes a weight: it differs from the stored tensor", tensor)
                self._compared |= variant.tensors
        except ModelError:
            if self.load_other is None:
                raise
            return "apart"
        return plan

    def open_apart(self, variant: Variant) -> LayeredModel | None:
        """Load a variant that must be a model of its own; None if `run` can run it with this model."""
        return self._load_apart(variant) if self.plan_variant(variant) == "apart" else None

    def _load_apart(self, variant: Variant) -> LayeredModel:
        assert self.load_other is not None
        merged = variant.merge(self.checkpoint)
        return LayeredModel(self.load_other(self.model, merged, self.device), merged)

    def is_layered(self, ids: Sequence[int]) -> bool:
        """Return True if this class can call the layers one by one.

        It can if the arguments of the layers neither depend on the tokens nor carry state from call to call. The first
        call of this method decides this for good: it compares two rehearsals, one with the token ids `ids` and one with
        their reverse.
        """
        if self._layered is None:
            try:
                with torch.no_grad(), self._outside():
                    _, calls = self._rehearse(ids, len(self.layers))
                    _, others = self._rehearse(ids[::-1], len(self.layers))
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
        sequences: Mapping[int, Sequence[int]],
        variants: Sequence[Variant],
        others: OtherTensors,
        watch: Watch | None,
        progress: Progress,
    ) -> Iterator[Outcomes]:
        outside = describe_changes(variants, None, others, self.places)
        columns = Columns(outside)
        with self._outside():
            groups = self._enter(sequences, variants, columns, others)
        peaks = Peaks()
        for number, layer in enumerate(self.layers):
            progress.relabel(f"layer {number + 1}/{len(self.layers)}")
            changes = describe_changes(variants, number, others, self.places)
            divided = columns.split(changes)
            first = columns.list_first()
            with self._weights_of(number) as device:
                for group in groups:
                    group.state = group.state.to(device)
                    if divided is not None:
                        group.state = group.state[:, divided]
                for change in dict.fromkeys(changes):
                    index = changes.index(change)
                    rows = [(column, variant) for column, variant in enumerate(first) if changes[variant] == change]
                    with others.swap_layer(index, number), self.places.swap(variants[index].scalars, number):
                        for group in groups:
                            self._advance(number, layer, group, rows, watch, variants[index].rounding)
                for group in groups:
                    peaks.look(number, group, columns.of)
            progress.advance(self.weights.sizes[number] if self.weights else 1)
        where = {number: (group, at) for group in groups for at, number in enumerate(group.sequences)}

        @contextlib.contextmanager
        def swap(index: int) -> Iterator[None]:
            scalars = variants[index].scalars
            with torch.no_grad(), others.swap_outside(index, keep=True), self.places.swap(scalars, None):
                yield

        head = Head(self.model, self.layers, self._returned)
        with self._outside(head=True) as device:
            for position, (number, ids) in enumerate(sequences.items(), start=1):
                progress.relabel(f"sequence {position}/{len(sequences)}")
                group, at = where[number]
                own = group.state[at].to(device, copy=True)  # a view would keep the states of a whole reading alive
                logits = VariantLogits(head, ids, own, columns.of, outside, swap)
                found = tuple(peaks.list_by_layer(number, index) for index in range(len(variants)))
                yield Outcomes(number, logits.wrap(), found)
                progress.advance(0 if self.weights else 1)

    def _enter(
        self,
        sequences: Mapping[int, Sequence[int]],
        variants: Sequence[Variant],
        columns: Columns,
        others: OtherTensors,
    ) -> list[Group]:
        """Compute the input of the first layer for every sequence. Sequences of equal length form one group."""
        lengths: dict[int, list[int]] = defaultdict(list)
        for number, ids in sequences.items():
            lengths[len(ids)].append(number)
        rows: dict[int, list[Tensor]] = defaultdict(list)
        calls: dict[int, list[Call]] = {}
        for index in columns.list_first():
            with others.swap_outside(index), self.places.swap(variants[index].scalars, None):
                for number, ids in sequences.items():
                    hidden, found = self._rehearse(ids, 1 if len(ids) in calls else len(self.layers))
                    calls.setdefault(len(ids), found)
                    rows[number].append(hidden[0])
        return [
            Group(numbers, calls[length], torch.stack([torch.stack(rows[number]) for number in numbers]))
            for length, numbers in lengths.items()
        ]

    def _advance(
        self,
        number: int,
        layer: nn.Module,
        group: Group,
        columns: Sequence[tuple[int, int]],
        watch: Watch | None,
        rounding: Rounding | None,
    ) -> None:
        """Run one layer on some columns of all sequences of a group, in batches of bounded size.

        `columns` contains the number of each of these columns and the first variant in it.
        """
        rows = [(at, column, variant) for at in range(len(group.sequences)) for column, variant in columns]
        size = 1 if rounding else self.count_rows(group.state.shape[2])
        call = move_to_device(group.calls[number], group.state.device)
        for begin in range(0, len(rows), size):
            batch = rows[begin : begin + size]
            at, column = group.make_index([(row, column) for row, column, _ in batch])
            named = [(group.sequences[row], variant) for row, _, variant in batch]
            watched = watch.around(number, layer, named) if watch else contextlib.nullcontext()
            with watched, sdpa_kernel(ATTENTION), round_inputs(rounding, layer):
                hidden = find_hidden(layer(group.state[at, column], *call.args, **call.kwargs))
            if watch:
                watch.after(number, named, hidden)
            group.state[at, column] = hidden

    def _rehearse(self, ids: Sequence[int], most: int) -> tuple[Tensor, list[Call]]:
        """Run the model on one sequence with stand-ins for its layers, up to layer `most`.

        Returns the hidden states (1, tokens, channels) that enter the first layer, and the other arguments of each of
        these layers. Raises Unknown if the model does not call every layer once, in a form that `calls.py` supports.
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
                if len(calls) == most:
                    raise _Rehearsed
                return replace_hidden(self._returned, hidden)

            return forward

        with replace_forwards(self.layers, stand_in), contextlib.suppress(_Rehearsed):
            self.model(input_ids=self._tokens(ids), use_cache=False)
        if len(calls) != most:
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
        sequences: Mapping[int, Sequence[int]],
        variants: Sequence[Variant],
        others: OtherTensors,
        watch: Watch | None,
        progress: Progress,
    ) -> Iterator[Outcomes]:
        for position, (number, ids) in enumerate(sequences.items(), start=1):
            progress.relabel(f"sequence {position}/{len(sequences)}")
            logits: list[Tensor] = []
            found: list[tuple[Peak, ...]] = []
            for index, variant in enumerate(variants):
                if index and variant.is_stored and variants[0].is_stored:
                    logits.append(logits[0])
                    found.append(found[0])
                    continue
                peaks = Peaks()
                observed = self._observe(number, index, watch, peaks, variant.rounding)
                with others.swap_all(index), self.places.swap(variant.scalars), observed:
                    logits.append(self._logits(ids))
                found.append(peaks.list_by_layer(number, 0))
            yield Outcomes(number, make_logits(logits), tuple(found))
            progress.advance(1)

    @contextlib.contextmanager
    def _observe(
        self, sequence: int, variant: int, watch: Watch | None, peaks: Peaks, rounding: Rounding | None
    ) -> Iterator[None]:
        def watch_layer(number: int, layer: nn.Module) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                rows = [(sequence, variant)]
                watched = watch.around(number, layer, rows) if watch else contextlib.nullcontext()
                with watched, round_inputs(rounding, layer):
                    returned = type(layer).forward(layer, *args, **kwargs)
                hidden = find_hidden(returned)
                if watch:
                    watch.after(number, rows, hidden)
                peaks.look(number, Group([sequence], [], hidden[:, None]), [0])
                return returned

            return forward

        with replace_forwards(self.layers, watch_layer):
            yield


class _Rehearsed(Exception):
    """Raised by the stand-in for the last layer to end a rehearsal."""
