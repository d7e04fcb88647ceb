"""Base and patched model side by side, from one copy of the weights in memory.

The patched checkpoint is loaded; the base differs from it in a handful of scalars. Where these lie in weights of
linear layers, a batch of two rows gives both models in one pass: row 0 is the patched model, row 1 the base. A scalar
W[row, col] touches one output channel of its layer only, so a hook computes that channel of the base's row anew from
the base's weights and leaves the rest as it is. It adds no correction to the patched sum: that would lose digits
where the patched value is large, and everything where it overflows. Anywhere else (embeddings, norms, biases, stacked
experts) the scalars are swapped in memory and the model is run a second time.

This room knows modules and parameters. It knows no text, no tokenizer and no metric.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from swsurgery.architectures import loaded_candidates
from swsurgery.coordinate import Coordinate
from swsurgery.errors import ModelError
from swsurgery.model import ScalarChange

__all__ = ["Outcome", "PairedForward", "Peak", "ScalarChange", "find_decoder_layers"]

PATCHED, BASE = 0, 1  # rows of the batch


class Peak(NamedTuple):
    """The largest hidden state by magnitude that left a decoder layer: where, and its signed value."""

    layer: int
    token: int
    channel: int
    value: float


class Outcome(NamedTuple):
    """What one model made of one sequence: logits (tokens, vocabulary) in the model's dtype, and the peak."""

    logits: Tensor
    peak: Peak | None


@dataclass(frozen=True)
class _Place:
    """One changed scalar inside the loaded model."""

    parameter: nn.Parameter
    index: tuple[int, ...]
    base: float


class _ChannelHook:
    """Recomputes, for the base's row, the output channels of one linear layer that its edits touch."""

    def __init__(self, module: nn.Linear | Conv1D, places: Sequence[_Place]):
        transposed = isinstance(module, Conv1D)  # stored (in, out), whereas nn.Linear stores (out, in)
        base = module.weight.detach().clone()
        for place in places:
            base[place.index] = place.base
        by_row = base.T if transposed else base
        rows = sorted({place.index[1] if transposed else place.index[0] for place in places})
        self.rows = torch.tensor(rows, device=base.device)
        self.weight = by_row[self.rows].clone()
        self.bias = None if module.bias is None else module.bias.detach()[self.rows]
        self.calls: list[bool] = []  # for each call of the module: was its input shaped as expected?

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        x = arguments[0] if arguments else None
        fits = isinstance(x, Tensor) and x.dim() == 3 and len(x) == 2
        self.calls.append(fits)
        if fits:
            output[BASE, :, self.rows] = functional.linear(x[BASE], self.weight, self.bias)
        return output


class _PeakWatch:
    """Remembers the largest |hidden state| of each row of the batch after each decoder layer."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, Tensor, Tensor]] = []  # layer, channels, flat position and value per row

    def watch(self, layer: int, module: nn.Module) -> RemovableHandle:
        def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            flat = hidden.reshape(len(hidden), -1)
            where = flat.abs().nan_to_num(nan=torch.inf).argmax(dim=1, keepdim=True)
            self.seen.append((layer, hidden.shape[-1], where, flat.gather(1, where)))

        return module.register_forward_hook(after)

    def peak(self, row: int) -> Peak | None:
        best, largest = None, -1.0
        for layer, channels, where, values in self.seen:
            value = float(values[row, 0])
            magnitude = torch.inf if value != value else abs(value)  # NaN counts as the largest
            if magnitude > largest:
                best, largest = Peak(layer, *divmod(int(where[row, 0]), channels), value), magnitude
        return best


class PairedForward:
    """Both models as one function of token ids.

    `model` holds the patched weights and is in evaluation mode, `config` is its config.json and `shapes` gives the
    stored shape of each tensor. Raises ModelError where a changed scalar cannot be found in the loaded model, or where
    the model holds another value than the patched one: a loader that changed the weights would have the check judge
    something else.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        changes: Sequence[ScalarChange],
        config: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
    ):
        self.model = model
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.places = [
            _find(parameters, change, loaded_candidates(config, change.coordinate, shapes)) for change in changes
        ]
        self.layers = find_decoder_layers(model)
        owners = self._linear_owners()
        self.one_pass = bool(self.places) and owners is not None
        self.hooks = {module: _ChannelHook(module, places) for module, places in (owners or {}).items()}

    @property
    def method(self) -> str:
        """ "paired", or "two passes" where the edits did not allow it (known for sure after the first call)."""
        return "paired" if self.one_pass or not self.places else "two passes"

    @torch.no_grad()
    def __call__(self, ids: Sequence[int]) -> tuple[Outcome, Outcome]:
        """(base, patched) for one sequence of token ids. Without changes both are the same object."""
        tokens = torch.tensor([list(ids)], device=self.model.device)
        if not self.places:
            (only,) = self._run(tokens)
            return only, only
        if self.one_pass:
            outcomes = self._run_paired(tokens)
            if outcomes is not None:
                return outcomes
            self.one_pass = False
        (patched,) = self._run(tokens)
        with self.base_weights():
            (base,) = self._run(tokens)
        return base, patched

    @contextlib.contextmanager
    def base_weights(self) -> Iterator[None]:
        """The model is the base while this lasts; afterwards, come what may, it has its very bits back."""
        kept = [(place, place.parameter.data[place.index].clone()) for place in self.places]
        try:
            for place in self.places:
                place.parameter.data[place.index] = place.base
            yield
        finally:
            for place, value in kept:
                place.parameter.data[place.index] = value

    def _linear_owners(self) -> dict[nn.Module, list[_Place]] | None:
        """The linear layers that hold the changed scalars, or None if not all of them lie in weights of such layers.

        A tensor that two modules share (tied embeddings) has no one place for a hook. A subclass of nn.Linear may
        compute anything, hence the exact types.
        """
        owners = defaultdict(list)
        for module in self.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                owners[id(parameter)].append((name, module))
        by_module: dict[nn.Module, list[_Place]] = defaultdict(list)
        for place in self.places:
            [(name, module), *others] = owners[id(place.parameter)]
            if others or name != "weight" or type(module) not in (nn.Linear, Conv1D):
                return None
            by_module[module].append(place)
        return by_module

    def _run_paired(self, tokens: Tensor) -> tuple[Outcome, Outcome] | None:
        """(base, patched), or None where a hooked layer was not called exactly once on the batch as a whole: experts
        see shuffled tokens, and some modules use the weights of a layer without ever calling it."""
        handles = []
        try:
            for module, hook in self.hooks.items():
                hook.calls.clear()
                handles.append(module.register_forward_hook(hook))
            outcomes = self._run(tokens.expand(2, -1))
        finally:
            for handle in handles:
                handle.remove()
        if any(hook.calls != [True] for hook in self.hooks.values()):
            return None
        return outcomes[BASE], outcomes[PATCHED]

    def _run(self, tokens: Tensor) -> list[Outcome]:
        """One pass over `tokens` (rows, length); one Outcome for each row."""
        watch = _PeakWatch()
        handles = []
        try:
            handles.extend(watch.watch(number, layer) for number, layer in enumerate(self.layers))
            logits = self.model(input_ids=tokens, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return [Outcome(logits[row], watch.peak(row)) for row in range(len(tokens))]


def find_decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers of the text model in order: the first list of modules, from the outside in, that is as long
    as the config says; empty where there is none."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for root in (model.get_decoder(), model):
        for module in root.modules() if isinstance(root, nn.Module) else ():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return list(module)
    return []


def _find(parameters: Mapping[str, nn.Parameter], change: ScalarChange, candidates: Iterable[Coordinate]) -> _Place:
    """The place of `change` in the loaded model: the first candidate that exists, once its value is compared."""
    for coordinate in candidates:
        parameter = parameters.get(coordinate.tensor)
        if parameter is not None and _inside(coordinate.index, parameter):
            break
    else:
        raise ModelError("no such scalar in the loaded model", change.coordinate, "--check weights")
    loaded = parameter.detach()[coordinate.index]
    expected = torch.tensor(change.patched, dtype=torch.float64).to(loaded.dtype)
    if float(loaded) != float(expected):
        raise ModelError(
            f"the loaded model holds {float(loaded):g}, not the patched value {float(expected):g}",
            change.coordinate,
            "the loader changes this weight; --check weights",
        )
    return _Place(parameter, coordinate.index, change.base)


def _inside(index: tuple[int, ...], parameter: nn.Parameter) -> bool:
    return len(index) == parameter.dim() and all(0 <= i < size for i, size in zip(index, parameter.shape, strict=True))
