"""Split, compare and move the arguments and the return value of a decoder layer.

This module must not depend on weights or models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """The arguments of one layer, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Unknown(Exception):
    """Raised if a layer is called with, or returns, something that this module does not support."""


def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """Separate the hidden states (rows, tokens, channels) from the other arguments of a layer.

    Raises Unknown if they are neither the first argument nor named hidden_states.
    """
    if args:
        hidden, call = args[0], Call(args[1:], kwargs)
    else:
        hidden, call = kwargs.get("hidden_states"), Call((), {k: v for k, v in kwargs.items() if k != "hidden_states"})
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise Unknown
    return hidden, call


def find_hidden(returned: Any) -> Tensor:
    """Return the hidden states in the return value of a layer. Raises Unknown if it has none."""
    hidden = returned[0] if isinstance(returned, tuple) else returned
    if not isinstance(hidden, Tensor):
        raise Unknown
    return hidden


def replace_hidden(returned: Any, hidden: Tensor) -> Any:
    """Return what a layer returned, with its hidden states replaced by `hidden`. Raises Unknown like `find_hidden`."""
    find_hidden(returned)
    return (hidden, *returned[1:]) if isinstance(returned, tuple) else hidden


def list_leaves(value: Any) -> Iterator[Any]:
    """Yield every value in nested mappings, tuples and lists."""
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        yield value
        return
    for item in value:
        yield from list_leaves(item)


def is_same_calls(calls: Iterable[Call], others: Iterable[Call]) -> bool:
    """Return True if both sequences of calls have equal arguments; False for any that is no tensor or plain value."""
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
