"""Define how long-running work reports its progress.

This module contains the protocol and a silent implementation. The visible progress bar is in `cli/output.py` and is
passed in.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of one task at a time: `start`, any number of `advance`, then always `close`."""

    def start(self, total: int, unit: str, label: str) -> None:
        """Begin a task of `total` units, each called `unit` ("B" for bytes), shown as `label`."""

    def advance(self, n: int) -> None:
        """Count `n` further units as done."""

    def relabel(self, label: str) -> None:
        """Change the label of the task, for example to the name of its current part."""

    def close(self) -> None:
        """End the task; a second call does nothing."""


class Silent:
    """A Progress that does nothing."""

    def start(self, total: int, unit: str, label: str) -> None:
        pass

    def advance(self, n: int) -> None:
        pass

    def relabel(self, label: str) -> None:
        pass

    def close(self) -> None:
        pass


class Rounds:
    """A Progress that forwards several similar tasks to `progress`, one after another.

    It prefixes each label with `word` and the number of the task: "round 2, ...".
    """

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
