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

    def relabel(self, label: str) -> None:
        """Show the task as `label` from now on, such as the part that it has come to."""

    def close(self) -> None:
        """End the task; a second call does nothing."""


class Silent:
    """The Progress of a caller that does not want any."""

    def start(self, total: int, unit: str, label: str) -> None:
        pass

    def advance(self, n: int) -> None:
        pass

    def relabel(self, label: str) -> None:
        pass

    def close(self) -> None:
        pass


class Rounds:
    """Passes on to `progress` what is done in several tasks of one kind, one after the other; their labels begin with
    the number of the task: "round 2, ..."."""

    def __init__(self, progress: Progress, word: str = "round"):
        self._progress, self._word, self._number = progress, word, 0

    def start(self, total: int, unit: str, label: str) -> None:
        self._number += 1
        self._progress.start(total, unit, self._in_round(label))

    def advance(self, n: int) -> None:
        self._progress.advance(n)

    def relabel(self, label: str) -> None:
        self._progress.relabel(self._in_round(label))

    def close(self) -> None:
        self._progress.close()

    def _in_round(self, label: str) -> str:
        return f"{self._word} {self._number}, {label}"
