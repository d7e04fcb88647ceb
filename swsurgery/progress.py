"""Define how the library reports progress and notes.

This module contains the protocols and a silent implementation. The visible progress bar is in `cli/progress_bar.py`
and is passed in.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable


class Progress(Protocol):
    """Receives the progress of one task at a time: `start`, any number of `advance`, then `close`."""

    def start(self, total: int, unit: str, label: str) -> None:
        """Begin a task of `total` units, each called `unit` ("B" for bytes), shown as `label`.

        `total` is 0 if it is unknown, such as for loading a library.
        """

    def advance(self, n: int) -> None:
        """Count `n` further units as done."""

    def relabel(self, label: str) -> None:
        """Change the label of the task, for example to the name of its current part."""

    def close(self) -> None:
        """End the task; a second call does nothing."""


@runtime_checkable
class Reporter(Progress, Protocol):
    """Receives progress and notes for the user. Public functions take a Reporter as the argument `reporter`."""

    def say(self, line: str) -> None:
        """Receive one note for the user: one line, without the newline."""


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
    """Return `reporter`, or a Silent if it is None. Raises TypeError if it is not a Reporter."""
    if reporter is None:
        return Silent()
    if not isinstance(reporter, Reporter):
        raise TypeError(f"reporter must be None or a Reporter, not {reporter!r:.80}")
    return reporter


LOADING = "loading torch and the model"
"""Label of the task that lasts from the import of torch until the model begins to run. Its length is unknown."""


class Rounds:
    """A Progress that forwards several similar tasks to `progress`, one after another, and numbers them.

    Each label begins with `word` and the number of the task, such as "round 2, layer 5".
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


class NumberedPart:
    """A Progress for part `number` of the `count` parts of one task, which the caller starts and closes.

    Each label begins with `word` and these numbers, such as "reading 2 of 3, layer 5/32", unless there is only one
    part.
    """

    def __init__(self, progress: Progress, word: str, number: int, count: int):
        self._progress, self._prefix = progress, f"{word} {number} of {count}, " if count > 1 else ""

    def start(self, total: int, unit: str, label: str) -> None:
        self.relabel(label)

    def advance(self, n: int) -> None:
        self._progress.advance(n)

    def relabel(self, label: str) -> None:
        self._progress.relabel(self._prefix + label)

    def close(self) -> None:
        pass
