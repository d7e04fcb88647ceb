"""Write text to stdout and stderr, and find out what the terminal can show.

Data is written to stdout, and messages are written to stderr.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
from typing import TextIO

from swsurgery.errors import TargetError, describe_done, escape_control

_COLOURS = {"OK": 32, "NO": 31, "FINDING": 31, "FAILED": 31, "UNDECIDED": 33, "warning": 33}
"""Code of the colour of each word that states a verdict: 31 is red, 32 green and 33 yellow (ECMA-48).

The word is coloured only at the beginning of a line.
"""

_VERDICT = re.compile(rf"^({'|'.join(_COLOURS)})\b", re.MULTILINE)


def measure_terminal() -> int | None:
    """Return the width of the terminal that shows stdout, in characters; None if stdout is not a terminal."""
    return shutil.get_terminal_size((80, 24)).columns if is_terminal(sys.stdout) else None


def format_verdict(text: str) -> str:
    """Colour the verdict with which a line begins, such as FAILED.

    The text is returned unchanged if stdout is not a terminal, or if the variable NO_COLOR is set and not empty
    (https://no-color.org), or if the terminal is a dumb one.
    """
    if not is_terminal(sys.stdout) or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return _VERDICT.sub(lambda found: f"\033[1;{_COLOURS[found[1]]}m{found[1]}\033[0m", text)


def is_terminal(stream: TextIO | None) -> bool:
    """Return True if the stream is open and is connected to a terminal."""
    return stream is not None and not stream.closed and stream.isatty()


def say(line: str) -> None:
    """Print one message on stderr."""
    write(f"swsurgery: {escape_control(line)}\n", sys.stderr)


def write(text: str, stream: TextIO | None = None) -> None:
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
