"""Replace the products of some scalars by their means while a model runs (the control "mean").

A scalar at (row, col) of a linear layer adds scalar * x[col] to output channel `row` at each token. In a variant that
holds the scalar, its weight is 0, and a constant is added to the channel instead: the mean of that product in the base.
First tokens of windows have a mean of their own, because massive activations usually occur there. All other tokens have
a second mean. The first token is BOS if windows begin with BOS. arXiv:2503.22329 also separates first tokens, but
averages only tokens whose activation is massive. Here each token counts, scored or not, so no threshold is needed.

`LayeredModel` computes a layer for all windows of the base before those of another variant that changes the layer. So
one reading of the weights is enough. The base runs on the text once before if the model cannot run layer by layer, or
if the hidden states of all windows need too much memory for one reading. This module must not depend on metrics.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from swsurgery.errors import Unrunnable
from swsurgery.model.controls import HeldScalar
from swsurgery.model.forward import LayeredModel
from swsurgery.model.outcomes import Outcomes
from swsurgery.model.places import Place
from swsurgery.model.variant import Variant
from swsurgery.progress import Progress
from swsurgery.storage.coordinate import Coordinate

_REMEDY = "leave out --control mean"


class HeldMeans:
    """A `Watch` that measures the products of held scalars in the base, and adds their means in other variants.

    Variant 0 of the run is the base. `variants` are all variants of the run. The first `windows` of the sequences are
    windows of the text, and `lengths` contains the number of tokens of every sequence.
    """

    def __init__(self, model: LayeredModel, variants: Sequence[Variant], lengths: Sequence[int], windows: int):
        """Raise Unrunnable if a held scalar is not in a linear layer of its own inside a decoder layer."""
        self._variants, self._lengths, self._windows = variants, lengths, windows
        held = dict.fromkeys(coordinate for variant in variants for coordinate in sorted(variant.held))
        self._places = {coordinate: _find_linear(model, coordinate) for coordinate in held}
        self._sums: defaultdict[tuple[Coordinate, int], Tensor] = defaultdict(lambda: torch.zeros(4).double())
        self._complete = False
        self._begin = 0  # the number of the first sequence of the current reading

    def run(
        self, model: LayeredModel, sequences: Sequence[Sequence[int]], progress: Progress | None
    ) -> Iterator[Outcomes]:
        """Run all variants on the sequences, in several readings of the weights if their states need much memory."""
        if not self._places:  # nothing is held, so nothing has to be watched
            yield from model.run(sequences, self._variants, progress=progress)
            return
        parts = model.divide(sequences, len(self._variants))
        if len(parts) > 1 or not model.is_layered(sequences[0]):
            for _ in self._run_parts(model, sequences[: self._windows], self._variants[:1], progress):
                pass
            self._complete = True
        yield from self._run_parts(model, sequences, self._variants, progress)

    def _run_parts(
        self,
        model: LayeredModel,
        sequences: Sequence[Sequence[int]],
        variants: Sequence[Variant],
        progress: Progress | None,
    ) -> Iterator[Outcomes]:
        """Run variants on the sequences, which `LayeredModel.run` does not divide if it is watched."""
        for numbers in model.divide(sequences, len(variants)):
            self._begin = numbers.start
            part = sequences[numbers.start : numbers.stop]
            for outcomes in model.run(part, variants, watch=self, progress=progress):
                yield outcomes._replace(sequence=numbers.start + outcomes.sequence)

    @contextlib.contextmanager
    def around(self, number: int, layer: nn.Module, rows: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Measure or add products during one call of the decoder layer `number`, as `Watch.around` describes."""
        here = {name: place for name, place in self._places.items() if number in place.layers}
        with ExitStack() as hooks:
            if here:
                if not self._complete and any(variant == 0 for _, variant in rows):
                    self._watch_inputs(hooks, here, number, rows)
                self._replace_outputs(hooks, here, number, rows)
            yield

    def after(self, number: int, rows: Sequence[tuple[int, int]], hidden: Tensor) -> None:
        """Ignore the hidden states after a layer."""

    def list_held(self, variant: Variant) -> tuple[HeldScalar, ...]:
        """Return the means of the scalars that a variant holds, one pair for each layer that uses a scalar."""
        return tuple(
            HeldScalar(coordinate, *self._compute_means(coordinate, number))
            for coordinate in sorted(variant.held)
            for number in sorted(each for each in self._places[coordinate].layers if each is not None)
        )

    def _watch_inputs(
        self, hooks: ExitStack, here: Mapping[Coordinate, Place], number: int, rows: Sequence[tuple[int, int]]
    ) -> None:
        """Add up the products in the rows that are windows of the base."""
        chosen = [
            at for at, (sequence, variant) in enumerate(rows) if variant == 0 and self._begin + sequence < self._windows
        ]
        tokens = self._lengths[self._begin + rows[0][0]]

        def watch(coordinate: Coordinate, place: Place) -> None:
            def measure(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                _, col = _find_row_and_column(module, place)
                inputs = _split_tokens(arguments[0], len(rows), tokens, coordinate)
                products = inputs[chosen, :, col].double() * place.weight[place.index].double()
                first, others = products[:, 0], products[:, 1:]
                found = [float(first.sum()), first.numel(), float(others.sum()), others.numel()]
                self._sums[coordinate, number] += torch.tensor(found).double()

            module = place.owners[0][0]
            hooks.callback(module.register_forward_pre_hook(measure).remove)

        for coordinate, place in here.items() if chosen else ():
            watch(coordinate, place)

    def _replace_outputs(
        self, hooks: ExitStack, here: Mapping[Coordinate, Place], number: int, rows: Sequence[tuple[int, int]]
    ) -> None:
        """Add the means of the held scalars. All rows of one call hold the same scalars."""
        held = self._variants[rows[0][1]].held
        tokens = self._lengths[self._begin + rows[0][0]]

        def replace(coordinate: Coordinate, place: Place) -> None:
            first, others = self._compute_means(coordinate, number)

            def add(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
                row, _ = _find_row_and_column(module, place)
                changed = output.clone(memory_format=torch.contiguous_format)
                channel = _split_tokens(changed, len(rows), tokens, coordinate)[:, :, row]
                channel[:, 0] += first
                channel[:, 1:] += others
                return changed

            module = place.owners[0][0]
            hooks.callback(module.register_forward_hook(add).remove)

        for coordinate, place in here.items():
            if coordinate in held:
                replace(coordinate, place)

    def _compute_means(self, coordinate: Coordinate, number: int) -> tuple[float, float]:
        """Return the mean products in first tokens and in all others. Raises Unrunnable if nothing was measured."""
        first, firsts, others, rest = self._sums[coordinate, number].tolist()
        if not firsts:
            raise Unrunnable("the model does not call the layer that contains this scalar", coordinate, _REMEDY)
        return first / firsts, others / rest if rest else 0.0


def _find_linear(model: LayeredModel, coordinate: Coordinate) -> Place:
    """Find a scalar in the weight of one linear layer inside the decoder layers. Raises Unrunnable."""
    place = model.places.find_place(coordinate)
    modules = {id(module): (module, name) for module, name in place.owners}
    [(module, name), *more] = modules.values()
    linear = isinstance(module, nn.Linear | Conv1D) and name == "weight" and not more
    if not linear or None in place.layers or len(place.index) != 2:
        what = "the mean of this scalar cannot be held, because it is not in a linear layer of its own in the decoder"
        raise Unrunnable(what, coordinate, _REMEDY)
    return place


def _find_row_and_column(module: nn.Module, place: Place) -> tuple[int, int]:
    """Return the output channel and the input channel of a scalar of a linear layer."""
    first, second = place.index
    assert isinstance(first, int) and isinstance(second, int)
    return (second, first) if isinstance(module, Conv1D) else (first, second)


def _split_tokens(values: Tensor, rows: int, tokens: int, coordinate: Coordinate) -> Tensor:
    """Return the input or output of a linear layer as (rows, tokens, channels): a view if `values` is contiguous.

    Raises Unrunnable if `values` does not have one vector for each token. An expert, for example, gets fewer.
    """
    if values.numel() != rows * tokens * values.shape[-1]:
        what = "the mean of this scalar cannot be held, because its layer does not get every token"
        raise Unrunnable(what, coordinate, _REMEDY)
    return values.reshape(rows, tokens, values.shape[-1])
