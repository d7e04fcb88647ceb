"""Split, compare and move the arguments and the return value of a decoder layer, and replace how layers are called.

This module must not depend on weights or models.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError)
"""Exceptions that the code of a model raises for arguments that it does not support."""


class Call(NamedTuple):
    """The arguments with which a model calls one decoder layer, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Unknown(Exception):
    """Raised if the arguments or the return value of a layer have a form that this module does not support."""


def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """Separate the hidden states (rows, tokens, channels) from the other arguments of a layer.

    Raises Unknown if the hidden states are neither the first positional argument nor the keyword argument
    hidden_states, or if they do not have these three axes.
    """
    if args:
        hidden, call = args[0], Call(args[1:], kwargs)
    else:
        hidden, call = kwargs.get("hidden_states"), Call((), {k: v for k, v in kwargs.items() if k != "hidden_states"})
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise Unknown
    return hidden, call


def find_hidden(returned: Any) -> Tensor:
    """Return the hidden states in a layer's return value: the tensor itself, or the first element of a tuple.

    Raises Unknown if that is not a tensor.
    """
    hidden = returned[0] if isinstance(returned, tuple) else returned
    if not isinstance(hidden, Tensor):
        raise Unknown
    return hidden


def replace_hidden(returned: Any, hidden: Tensor) -> Any:
    """Return a copy of a layer's return value in which `hidden` replaces the hidden states.

    Raises Unknown if `find_hidden` finds no hidden states in it.
    """
    find_hidden(returned)
    return (hidden, *returned[1:]) if isinstance(returned, tuple) else hidden


def list_leaves(value: Any) -> Iterator[Any]:
    """Yield the values inside nested mappings, tuples and lists, such as the tensors among a layer's arguments."""
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        yield value
        return
    for item in value:
        yield from list_leaves(item)


def is_same_calls(calls: Iterable[Call], others: Iterable[Call]) -> bool:
    """Return True if two sequences of calls have equal arguments.

    Returns False if an argument is neither a tensor nor a number, str, torch.dtype or None, because other types may not
    have a reliable comparison.
    """
    pairs = list(zip(list_leaves(list(calls)), list_leaves(list(others)), strict=True))
    for one, other in pairs:
        if isinstance(one, Tensor):
            if not isinstance(other, Tensor) or not torch.equal(one, other):
                return False
        elif not isinstance(one, (int, float, str, torch.dtype, type(None))) or one != other:
            return False
    return True


def move_to_device(value: Any, device: torch.device) -> Any:
    """Return `value` with every tensor in it moved to `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Call):
        return Call(move_to_device(value.args, device), move_to_device(value.kwargs, device))
    if isinstance(value, Mapping):
        return {key: move_to_device(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(move_to_device(item, device) for item in value)
    return value


@contextlib.contextmanager
def replace_forwards(
    layers: Sequence[nn.Module], stand_in: Callable[[int, nn.Module], Callable[..., Any]]
) -> Iterator[None]:
    """Replace the forward method of each layer with the result of `stand_in` for the length of a `with` block."""
    kept = [layer.__dict__.get("forward") for layer in layers]
    try:
        for number, layer in enumerate(layers):
            layer.forward = stand_in(number, layer)
        yield
    finally:
        for layer, forward in zip(layers, kept, strict=True):
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward
