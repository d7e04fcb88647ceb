"""What people see: data on stdout, talk and progress on stderr. The only room that knows tqdm."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from swsurgery.errors import TargetError, done, printable

if TYPE_CHECKING:
    from tqdm import tqdm


class Bar:
    """A Progress drawn on stderr; nothing is drawn where stderr is no terminal, or when quiet."""

    def __init__(self, quiet: bool = False):
        self._hidden = quiet or not is_terminal(sys.stderr)
        self._bar: tqdm | None = None

    def start(self, total: int, unit: str, label: str) -> None:
        self.close()
        if self._hidden:
            return
        from tqdm import tqdm  # a tenth of the start-up, and most commands draw no bar

        tqdm.set_lock(threading.RLock())  # its own is shared with other processes, through a file in /dev/shm
        in_bytes = unit == "B"
        self._bar = tqdm(
            total=total, desc=label, unit=unit, unit_scale=in_bytes, unit_divisor=1000, file=sys.stderr,
            leave=False, dynamic_ncols=True,
        )  # fmt: skip

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


def is_terminal(stream: TextIO | None) -> bool:
    """Return True if a person watches the stream. A closed one is no terminal."""
    return stream is not None and not stream.closed and stream.isatty()


def say(line: str) -> None:
    _write(f"swsurgery: {printable(line)}\n", sys.stderr)


def print_json(document: Any) -> None:
    """One strict JSON document on stdout."""
    _write(json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n")


def print_text(text: str) -> None:
    _write(text if text.endswith("\n") else text + "\n")


def print_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Columns as wide as their widest cell; numbers to the right."""
    table = [[printable(str(cell)) for cell in row] for row in [header, *rows]]
    numeric = [all(_is_number(row[i]) for row in table[1:]) for i in range(len(header))]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    for row in table:
        cells = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)]
        _write("  ".join(cells).rstrip() + "\n")


def _write(text: str, stream: TextIO | None = None) -> None:
    """Write `text`. If the reader has left, as `head` does, or if the stream was closed, nothing more is shown and the
    exit code stays the command's answer. Raises TargetError if stdout cannot be written; it names what the
    command has already done."""
    stream = stream or sys.stdout
    if stream is None or stream.closed:
        return
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:  # nothing of it was written
            encoding = stream.encoding or "ascii"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # Python would try the rest again at exit
        if stream is sys.stdout:
            raise TargetError(f"cannot write ({os.strerror(error.errno or 0)})", "stdout", done()) from error


def open_standard_streams() -> None:
    """Give the process the standard streams that its parent closed, so that no file takes their descriptors: what is
    printed to descriptor 1 would go into that file. A stream escapes what its encoding lacks."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for the life of the process)
        elif isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def size(count: int) -> str:
    """Bytes for people, in powers of 1000."""
    number = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    raise AssertionError


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return False
    return True
