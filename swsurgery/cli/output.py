"""Write data to stdout, and messages and progress to stderr.

Only this module imports tqdm. It must not depend on what the commands print.
"""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, TextIO, TypeVar

from swsurgery.errors import TargetError, describe_done, escape_control
from swsurgery.storage.result import Result, name_schema

if TYPE_CHECKING:
    from tqdm import tqdm


R = TypeVar("R", bound=Result)


@dataclass
class Output:
    """How a command prints: the values of --json, --quiet and --debug, which every command has.

    `command` is the name of the command, and `given` contains the names of its other parameters that the user gave.
    `printed` is True once a JSON document was printed. `main` creates the Output, and the command sets its fields as
    soon as the command line is parsed.
    """

    json: bool = False
    quiet: bool = False
    debug: bool = False
    given: frozenset[str] = frozenset()
    command: str = ""
    printed: bool = False

    def print_result(self, result: R, show: Callable[[R], None]) -> None:
        """Print a result on stdout: as one JSON document, or as text by calling `show`."""
        if self.json:
            self.print_document(result.to_json())
        else:
            show(result)

    def print_document(self, document: Mapping[str, object]) -> None:
        """Print one JSON document on stdout, with the name of its schema, such as "swsurgery/diff/1"."""
        self.printed = True
        print_json({**document, "schema": name_schema(self.command)})

    def note(self, line: str) -> None:
        """Print one message on stderr, unless --quiet was given."""
        if not self.quiet:
            say(line)

    def make_reporter(self) -> Bar:
        """Make a Reporter that draws a progress bar and prints notes, or nothing if --quiet was given."""
        return Bar(self.quiet)


class Bar:
    """A Reporter that prints notes and a progress bar on stderr, or nothing if `quiet` is set.

    The bar is not drawn if stderr is not a terminal.
    """

    def __init__(self, quiet: bool = False):
        self._quiet = quiet
        self._hidden = quiet or not is_terminal(sys.stderr)
        self._bar: tqdm[NoReturn] | None = None

    def start(self, total: int, unit: str, label: str) -> None:
        """Draw a new bar. If `unit` is "B", numbers are printed with a unit prefix, such as 1.50MB."""
        self.close()
        if self._hidden:
            return
        from tqdm import tqdm  # importing it takes a tenth of the start-up time, and most commands draw no bar

        tqdm.set_lock(threading.RLock())  # the default lock uses a file in /dev/shm
        in_bytes = unit == "B"
        self._bar = tqdm(
            total=total,
            desc=label,
            unit=unit,
            unit_scale=in_bytes,
            unit_divisor=1000,
            file=sys.stderr,
            leave=False,
            dynamic_ncols=True,
        )

    def advance(self, n: int) -> None:
        if self._bar is not None:
            self._bar.update(n)

    def relabel(self, label: str) -> None:
        if self._bar is not None:
            self._bar.set_description(label)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def say(self, line: str) -> None:
        if not self._quiet:
            say(line)


def is_terminal(stream: TextIO | None) -> bool:
    """Return True if the stream is open and is connected to a terminal."""
    return stream is not None and not stream.closed and stream.isatty()


def say(line: str) -> None:
    """Print one message on stderr."""
    _write(f"swsurgery: {escape_control(line)}\n", sys.stderr)


def print_json(document: object) -> None:
    """Print one strict JSON document on stdout. Raises ValueError for NaN and infinities."""
    _write(json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n")


def print_text(text: str) -> None:
    """Print text on stdout, with a newline at the end."""
    _write(text if text.endswith("\n") else text + "\n")


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table on stdout, with columns of numbers aligned to the right."""
    table = [[escape_control(str(cell)) for cell in row] for row in [header, *rows]]
    numeric = [all(_is_number(row[i]) for row in table[1:]) for i in range(len(header))]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    for row in table:
        cells = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)]
        _write("  ".join(cells).rstrip() + "\n")


def _write(text: str, stream: TextIO | None = None) -> None:
    """Write text to a stream, stdout by default.

    If the stream is closed, or the program that reads it has ended (such as `head`), nothing more is printed, and the
    exit code stays the same. Raises TargetError if stdout cannot be written; the message says what was done before.
    """
    stream = stream or sys.stdout
    if stream is None or stream.closed:
        return
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:  # raised before anything is written
            encoding = stream.encoding or "ascii"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # otherwise Python would retry at exit
        if stream is sys.stdout:
            raise TargetError(f"cannot write ({os.strerror(error.errno or 0)})", "stdout", describe_done()) from error


def open_standard_streams() -> None:
    """Open the standard streams that the parent process closed. Make the others escape characters they cannot encode.

    If stdout stayed closed, the next file opened would get its descriptor, and text would be printed into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is `number`
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (open until the process ends)
        elif isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return False
    return True
