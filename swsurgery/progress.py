"""Define how the library reports progress and notes.

This module contains the protocols and a silent implementation. The visible progress bar is in `cli/output.py` and is
passed in.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable


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


@runtime_checkable
class Reporter(Progress, Protocol):
    """Receives the progress of the work, and notes for the user. Public functions accept one as `reporter`."""

    def say(self, line: str) -> None:
        """Receive one note, a line without a newline."""


class Silent:
    """A Reporter that does nothing."""

    def start(self, total: int, unit: str, label: str) -> None:
        pass

    def advance(self, n: int) -> None:
        pass

    def relabel(self, label: str) -> None:
        pass

    def close(self) -> None:
        pass

    def say(self, line: str) -> None:
        pass


def require_reporter(reporter: Reporter | None) -> Reporter:
    """Return the reporter, or a silent one for None. Raises TypeError for any other value."""
    if reporter is None:
        return Silent()
    if not isinstance(reporter, Reporter):
        raise TypeError(f"reporter must be None or a Reporter, not {reporter!r:.80}")
    return reporter


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
