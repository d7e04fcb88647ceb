"""Show the progress of long work on stderr: a bar on a terminal, and otherwise one line a minute.

Only this module imports tqdm.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from typing import TYPE_CHECKING, NoReturn

from swsurgery.cli.streams import is_terminal, say

if TYPE_CHECKING:
    from tqdm import tqdm

FIRST_LINE = 0.25
"""Number of seconds after the start of the command when its first task is reported, if stderr is not a terminal."""

SHORT_TASK = 0.05
"""Number of seconds that the first task must take before it is reported. Imports before it may take FIRST_LINE."""

PHASE_LINE = 1.0
"""Seconds after which a task of another kind than those reported before is reported."""

NEXT_LINE = 60.0
"""Seconds between two lines about one task if stderr is not a terminal."""


class Bar:
    """A Reporter that prints notes and a progress bar on stderr, or nothing if `quiet` is set.

    If stderr is not a terminal, such as the log of a CI job, lines take the place of the bar. A task whose label begins
    with "loading", such as loading torch, is reported at once unless torch is loaded already. The first other task
    is reported FIRST_LINE seconds after the command began at `began` (by default, now), but not before it has taken
    SHORT_TASK seconds. If a line about another kind of task was printed before, it is reported when it has taken
    PHASE_LINE seconds. Further lines follow every NEXT_LINE seconds. So short tasks print nothing, and many similar
    tasks, such as rounds, print one line a minute.
    """

    def __init__(self, quiet: bool = False, began: float | None = None):
        self._quiet = quiet
        self._began = time.monotonic() if began is None else began
        self._terminal = is_terminal(sys.stderr)
        self._bar: tqdm[NoReturn] | None = None
        self._lines: _Lines | None = None
        self._printed: float | None = None  # when the last line about a task was printed
        self._kinds: set[str] = set()  # labels, without numbers, of the tasks that were reported

    def start(self, total: int, unit: str, label: str) -> None:
        """Draw a new bar. If `unit` is "B", numbers are printed with a unit prefix, such as 1.50MB.

        If `total` is 0, only the label is shown: nobody knows how long the task will take.
        """
        self.close()
        if self._quiet:
            return
        if not self._terminal:
            self._lines = _Lines(total, label, self._choose_wait(total, label))
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

    def _choose_wait(self, total: int, label: str) -> float:
        """Return the number of seconds after which a task that starts now is reported for the first time."""
        if _find_kind(label) in self._kinds and self._printed is not None:
            return max(PHASE_LINE, self._printed + NEXT_LINE - time.monotonic())
        if label.startswith("loading"):  # loading torch takes seconds, unless the process has loaded it before
            return PHASE_LINE if "torch" in sys.modules else 0.0
        if self._printed is not None:
            return PHASE_LINE
        return max(SHORT_TASK, self._began + FIRST_LINE - time.monotonic())

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
            if self._lines.printed is not None:
                self._printed = self._lines.printed
                self._kinds |= self._lines.kinds
            self._lines = None

    def say(self, line: str) -> None:
        if not self._quiet:
            say(line)


def _find_kind(label: str) -> str:
    """Return a label without its numbers: tasks such as "round 1" and "round 2" are of one kind."""
    return re.sub(r"\d+", "", label)


class _Lines:
    """Prints lines about one task from a thread of its own, until `end` is called.

    The first line is printed after `wait` seconds; if this is 0, before the constructor returns. `done` counts finished
    units of `total`. `printed` is the time of the last line, in seconds of the monotonic clock, or None. `kinds`
    contains the kind of the task and the kinds of the lines.
    """

    def __init__(self, total: int, label: str, wait: float):
        self.total, self.label, self.done = total, label, 0
        self._began = time.monotonic()
        self._wait = wait
        self.printed: float | None = None
        self.kinds = {_find_kind(label)}
        if wait == 0:
            self._print_line()
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
        wait = self._wait or NEXT_LINE
        while not self._ended.wait(wait):
            self._print_line()
            wait = NEXT_LINE

    def _print_line(self) -> None:
        self.printed = time.monotonic()
        self.kinds.add(_find_kind(self.label))
        say(self._describe())

    def _describe(self) -> str:
        share = f", {min(self.done / self.total, 1):.0%}" if self.total else ""
        seconds = int(time.monotonic() - self._began)
        return f"{self.label}{share}" + (f", {seconds // 60} min" if seconds >= 60 else "") + " ..."
