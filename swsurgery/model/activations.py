"""Round the inputs of linear layers while a decoder layer runs.

This module must not depend on checkpoints or texts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from swsurgery.model.variant import Rounding

ROUNDED_INPUTS: dict[Callable[..., Any], tuple[int, str]] = {
    functional.linear: (0, "input"),
    torch.addmm: (1, "mat1"),  # how Conv1D of GPT-2 multiplies
}
"""The functions of torch that multiply activations by weights, with the position and the name of the activations."""

ROUNDED_INPUTS |= {
    getattr(where, name): (0, "input")
    for where, name in ((torch, "_grouped_mm"), (functional, "grouped_mm"))
    if hasattr(where, name)
}


MATRIX_PRODUCTS = frozenset({torch.bmm, torch.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.matmul})
"""Functions that multiply two tensors. The first one is an input of a linear layer if the second is a parameter, as in
stacked experts; otherwise both are activations, as in attention."""


class RoundInputs(TorchFunctionMode):
    """A context manager that rounds the inputs of the linear layers in `layer` that run during its block.

    The tokens of only one window of text may run at a time. Experts are linear layers too: the tokens that one call
    passes to them are one input.
    """

    def __init__(self, rounding: Rounding, layer: nn.Module):
        super().__init__()
        self._rounding = rounding
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call `func`, with its activations rounded if it multiplies them by weights."""
        kwargs = dict(kwargs or {})
        at, name = ROUNDED_INPUTS.get(func, (0, ""))
        if name in kwargs:
            kwargs[name] = round_activations(kwargs[name], self._rounding)
        elif name:
            args = (*args[:at], round_activations(args[at], self._rounding), *args[at + 1 :])
        elif func in MATRIX_PRODUCTS and len(args) == 2 and self._is_weight(args[1]) and not self._is_weight(args[0]):
            args = (round_activations(args[0], self._rounding), args[1])
        return func(*args, **kwargs)

    def _is_weight(self, tensor: object) -> bool:
        """Return True if a tensor is a parameter of the layer, or a view of one."""
        with torch._C.DisableTorchFunction():
            return isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() in self._weights


def round_inputs(rounding: Rounding | None, layer: nn.Module) -> AbstractContextManager[object]:
    """Return a context manager that rounds the inputs of linear layers in `layer`; None leaves them as they are."""
    return contextlib.nullcontext() if rounding is None else RoundInputs(rounding, layer)


def round_activations(x: Tensor, rounding: Rounding) -> Tensor:
    """Round a floating-point tensor (..., channels) as `Rounding` describes; its dtype stays.

    Ties are rounded to even. Groups of zeros stay zero. Values that are not finite make their group NaN.
    """
    with torch._C.DisableTorchFunction():
        if not x.numel():
            return x
        rows = x.reshape(-1, x.shape[-1])
        values = rows.float()
        magnitudes = values.abs()
        held = None
        if rounding.hold_out:
            held = divmod(int(magnitudes.argmax()), x.shape[-1])
            magnitudes[held] = 0
        per_token = rounding.per == "token"
        largest = magnitudes.amax(dim=1, keepdim=True) if per_token else magnitudes.amax()
        top = 2 ** (rounding.bits - 1) - 1
        scale = largest / top
        rounded = values.div(torch.where(scale == 0, 1.0, scale)).round_().mul_(scale).to(x.dtype)
        if held is not None:
            rounded[held] = rows[held]
        return rounded.view(x.shape)
