"""Name one scalar of a checkpoint. This module knows neither files nor models."""

from __future__ import annotations

from typing import NamedTuple


class Coordinate(NamedTuple):
    """One scalar: the name of a stored tensor and an index into its *stored* shape."""

    tensor: str
    index: tuple[int, ...]  # type: ignore[assignment]  # the field hides tuple.index, which no caller needs

    def __str__(self) -> str:
        return f"{self.tensor}[{', '.join(map(str, self.index))}]"
