"""Name one scalar of a checkpoint. Must not depend on files or models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Coordinate(NamedTuple):
    """The name of one scalar: the name of its tensor, and its index in the *stored* shape of the tensor.

    Prints as `model.layers.2.mlp.down_proj.weight[3968, 7003]`.
    """

    tensor: str
    index: tuple[int, ...]  # type: ignore[assignment]  # the field hides tuple.index, which no caller needs

    def __str__(self) -> str:
        return f"{self.tensor}[{', '.join(map(str, self.index))}]"


def is_valid_index(index: Sequence[int], shape: Sequence[int]) -> bool:
    """Return True if `index` has one number per axis of `shape`, each from 0 and below the length of its axis."""
    return len(index) == len(shape) and all(0 <= i < length for i, length in zip(index, shape, strict=True))
