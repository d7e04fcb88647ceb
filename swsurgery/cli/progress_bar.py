"""Show the progress of long work on stderr: a bar on a terminal, and otherwise one line a minute.

Only this module imports tqdm.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, NoReturn

from swsurgery.cli.streams import is_terminal, say

if TYPE_CHECKING:
    from tqdm import tqdm

FIRST_LINE = 0.8
"""Seconds after which a task is reported for the first time if stderr is not a terminal."""

NEXT_LINE = 60.0
"""Seconds between two lines about one task if stderr is not a terminal."""


class Bar:
    """A Reporter that prints notes and a progress bar on stderr, or nothing if `quiet` is set.

    If stderr is not a terminal, such as the log of a CI job, lines take the place of the bar. The first line is printed
    when a task has taken FIRST_LINE seconds, and the next ones every NEXT_LINE seconds, so short tasks print nothing.
    """

    def __init__(self, quiet: bool = False):
        self._quiet = quiet
        self._terminal = is_terminal(sys.stderr)
        self._bar: tqdm[NoReturn] | None = None
        self._lines: _Lines | None = None
        self._printed: float | None = None  # when the last line about a task was printed

    def start(self, total: int, unit: str, label: str) -> None:
        """Draw a new bar. If `unit` is "B", numbers are printed with a unit prefix, such as 1.50MB.

        If `total` is 0, only the label is shown: nobody knows how long the task will take.
        """
        self.close()
        if self._quiet:
            return
        if not self._terminal:
            self._lines = _Lines(total, label, self._printed)
            return
        from tqdm import tqdm  # importing it takes a tenth of the start-up time, and most commands draw no bar

        tqdm.set_lock(threading.RLock())  # the default lock uses a file in /dev/shm
        in_bytes = unit == "B"
        self._bar = tqdm(
            total=total or None,
            desc=label,
            unit=unit,
            unit_scale=in_bytes,
            unit_divisor=1000,
            file=sys.stderr,
            leave=False,
            dynamic_ncols=True,
            bar_format=None if total else "{desc} ...",
        )

    def advance(self, n: int) -> None:
        if self._bar is not None:
            self._bar.update(n)
        if self._lines is not None:
            self._lines.done += n

    def relabel(self, label: str) -> None:
        if self._bar is not None:
            self._bar.set_description(label)
        if self._lines is not None:
            self._lines.label = label

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._lines is not None:
            self._lines.end()
            self._printed = self._lines.printed
            self._lines = None

    def say(self, line: str) -> None:
        if not self._quiet:
            say(line)


class _Lines:
    """Prints lines about one task from a thread of its own, until `end` is called.

    `done` counts finished units of `total`. `printed` is the time of the last line, in seconds of the monotonic clock,
    or None. A line about an earlier task counts too, so many tasks of some seconds do not print a line each.
    """

    def __init__(self, total: int, label: str, printed: float | None):
        self.total, self.label, self.done = total, label, 0
        self._began = time.monotonic()
        self.printed = printed
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._print_lines, name="swsurgery-progress", daemon=True)
        try:
            self._thread.start()
        except (RuntimeError, MemoryError):  # the system allows no further thread
            self._ended.set()

    def end(self) -> None:
        """Print no further line."""
        self._ended.set()

    def _print_lines(self) -> None:
        wait = FIRST_LINE
        if self.printed is not None:
            wait = max(wait, self.printed + NEXT_LINE - self._began)
        while not self._ended.wait(wait):
            self.printed = time.monotonic()
            say(self._describe())
            wait = NEXT_LINE

    def _describe(self) -> str:
        share = f", {min(self.done / self.total, 1):.0%}" if self.total else ""
        seconds = int(time.monotonic() - self._began)
        return f"{self.label}{share}" + (f", {seconds // 60} min" if seconds >= 60 else "") + " ..."
