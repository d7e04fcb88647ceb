"""Progress: how long work tells whoever is watching how far it is.

This room holds the shape of such an object and a silent one. It draws nothing; the bar that people see is made in
`output.py` and passed in.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """One task at a time: `start`, any number of `advance`, then `close`, also when the task fails."""

    def start(self, total: int, unit: str, label: str) -> None:
        """Begin a task of `total` units, each called `unit` ("B" for bytes), shown as `label`."""

    def advance(self, n: int) -> None:
        """Count `n` further units as done."""

    def close(self) -> None:
        """End the task; a second call does nothing."""


class Silent:
    """The Progress of a caller that does not want any."""

    def start(self, total: int, unit: str, label: str) -> None:
        pass

    def advance(self, n: int) -> None:
        pass

    def close(self) -> None:
        pass
