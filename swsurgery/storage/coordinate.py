"""Name one scalar of a checkpoint. Must not depend on files or models."""

from __future__ import annotations

from typing import NamedTuple


class Coordinate(NamedTuple):
    """The name of one scalar: the name of its tensor, and its index in the *stored* shape of the tensor.

    Prints as `model.layers.2.mlp.down_proj.weight[3968, 7003]`.
    """

    tensor: str
    index: tuple[int, ...]  # type: ignore[assignment]  # the field hides tuple.index, which no caller needs

    def __str__(self) -> str:
        return f"{self.tensor}[{', '.join(map(str, self.index))}]"
