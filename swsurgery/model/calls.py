"""What a layer is called with, and what it returns: taken apart, compared and put on another device.

Knows nothing of weights or of models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """What one layer is called with beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Unknown(Exception):
    """The layers are called in a way that is not understood here."""


def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """The hidden states with which a layer is called, and the rest."""
    if args:
        hidden, call = args[0], Call(args[1:], kwargs)
    else:
        hidden, call = kwargs.get("hidden_states"), Call((), {k: v for k, v in kwargs.items() if k != "hidden_states"})
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise Unknown
    return hidden, call


def hidden_of(returned: Any) -> Tensor:
    hidden = returned[0] if isinstance(returned, tuple) else returned
    if not isinstance(hidden, Tensor):
        raise Unknown
    return hidden


def like(returned: Any, hidden: Tensor) -> Any:
    """What a layer would return with these hidden states."""
    hidden_of(returned)
    return (hidden, *returned[1:]) if isinstance(returned, tuple) else hidden


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        yield value
        return
    for item in value:
        yield from leaves(item)


def same(calls: Iterable[Call], others: Iterable[Call]) -> bool:
    """Are these the same calls, made of tensors and plain values only?"""
    pairs = list(zip(leaves(list(calls)), leaves(list(others)), strict=True))
    for one, other in pairs:
        if isinstance(one, Tensor):
            if not isinstance(other, Tensor) or not torch.equal(one, other):
                return False
        elif not isinstance(one, (int, float, str, torch.dtype, type(None))) or one != other:
            return False
    return True


def on_device(value: Any, device: torch.device) -> Any:
    """The same with every tensor on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Call):
        return Call(on_device(value.args, device), on_device(value.kwargs, device))
    if isinstance(value, Mapping):
        return {key: on_device(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(on_device(item, device) for item in value)
    return value
