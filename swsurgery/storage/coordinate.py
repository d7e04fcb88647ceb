"""Coordinate: the one name of one scalar. This room knows neither files nor models."""

from __future__ import annotations

from typing import NamedTuple


class Coordinate(NamedTuple):
    """One scalar: the stored tensor's name and an index in its *stored* shape."""

    tensor: str
    index: tuple[int, ...]  # type: ignore[assignment]  # the field hides tuple.index, which no caller needs

    def __str__(self) -> str:
        return f"{self.tensor}[{', '.join(map(str, self.index))}]"
