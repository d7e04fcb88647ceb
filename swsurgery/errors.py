"""Define every error that swsurgery raises on purpose, and its exit code.

    SwsurgeryError            exit 2: bad input, or something that cannot be done
    ├── ManifestError         the manifest is wrong; carries every fault
    ├── CheckpointError       the checkpoint on disk is wrong or ambiguous
    │   ├── ShardError        one safetensors file is malformed
    │   ├── AmbiguousWeights  an index and a single file exist, and the caller did not choose one
    │   └── Unidentified      the known model that a checkpoint is made from cannot be identified
    ├── ArchitectureError     layer/row/col has no meaning for this model
    ├── NumberError           a value that the dtype cannot represent
    ├── PlanError             manifest and checkpoint do not match; carries every mismatch
    ├── TargetError           the output cannot be written
    │   └── NoSpace           the disk has not enough space for it; nothing was written
    ├── LookupFailed          no such known model or coordinate, or an ambiguous name
    ├── HubError              the Hub cannot be reached, or refuses
    ├── ModelError            the model cannot be loaded or run
    │   └── Unrunnable        the model cannot be run at all; some commands add a remedy that does not need a run
    └── CheckFailed           exit 1: a check failed, so nothing was written or published

    Interrupted               exit 130: SIGINT or SIGTERM; `except Exception` does not catch it

A message is one line, `what: where (remedy)`. An error with several faults prints one such line for each. Any other
exception that escapes is a bug (exit 3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence


def pluralise(number: int, noun: str) -> str:
    """Return the number and its noun, as in "1 scalar" and "2 scalars"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def list_some(names: Sequence[object], most: int) -> str:
    """Return the first names and the number of the others, as in "a, b and 4 more". At most `most` are named."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def escape_control(text: str) -> str:
    """Escape every control, bidirectional and surrogate character in `text`.

    A name from a file can then neither break a line nor control the terminal.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


class Fault(str):
    """One line of an error message, `what: where (remedy)`, which keeps its parts. Control characters are escaped.

    `position` is a place in a manifest, such as `edit.yaml:3:5`. The line then begins with it. Parts that are missing
    are "".
    """

    what: str
    where: str
    remedy: str
    position: str

    def __new__(cls, what: str, where: object = "", remedy: str = "", position: str = "") -> Fault:
        what, place, remedy, position = map(escape_control, (what, str(where), remedy, position))
        line = ": ".join(part for part in (position, what, place) if part)
        fault = super().__new__(cls, f"{line} ({remedy})" if remedy else line)
        fault.what, fault.where, fault.remedy, fault.position = what, place, remedy, position
        return fault

    @classmethod
    def parse(cls, line: str, position: str = "") -> Fault:
        """Make a fault from a line without its position. Text in parentheses at the end of the line is the remedy.

        A Fault keeps its parts. If both have a position, they are joined.
        """
        if isinstance(line, Fault):
            position = ": ".join(part for part in (position, line.position) if part)
            return cls(line.what, line.where, line.remedy, position)
        what, remedy = _split_remedy(line)
        return cls(what, "", remedy, position)

    def add_context(self, context: str) -> Fault:
        """Return this fault with `context` and a colon before its `what`."""
        return Fault(f"{context}: {self.what}", self.where, self.remedy, self.position)

    def to_json(self) -> dict[str, str]:
        """Return the parts of the line: what, where and remedy. The position is the beginning of `where`."""
        where = ": ".join(part for part in (self.position, self.where) if part)
        return {"what": self.what, "where": where, "remedy": self.remedy}


def _split_remedy(line: str) -> tuple[str, str]:
    """Split a line into the text before the last pair of parentheses and the text in them; "" if it has no remedy."""
    if not line.endswith(")"):
        return line, ""
    depth = 0
    for at in range(len(line) - 1, 0, -1):
        depth += {")": 1, "(": -1}.get(line[at], 0)
        if depth == 0:
            what, remedy = line[: at - 1], line[at + 1 : -1]
            return (what, remedy) if what and remedy and line[at - 1] == " " else (line, "")
    return line, ""


class SwsurgeryError(Exception):
    """Base class of all errors that swsurgery raises on purpose. `faults` contains one line per fault.

    `result` is what the command had computed when it failed: a scan that could not be written to a file, or an edit
    that the check rejected. It is None for all other errors.
    """

    exit_code = 2
    result: object = None

    def __init__(self, what: str, where: object = "", remedy: str = ""):
        self.faults: tuple[Fault, ...] = (Fault(what, where, remedy),)
        super().__init__(str(self.faults[0]))

    @classmethod
    def of(cls, faults: Iterable[str]) -> SwsurgeryError:
        """Make one error with several faults. Each fault is a complete line, such as "what: where (remedy)"."""
        error = cls.__new__(cls)
        error.faults = tuple(map(Fault.parse, faults))
        Exception.__init__(error, "\n".join(error.faults))
        return error


class ManifestError(SwsurgeryError):
    pass


class CheckpointError(SwsurgeryError):
    pass


class ShardError(CheckpointError):
    pass


class AmbiguousWeights(CheckpointError):
    pass


class Unidentified(CheckpointError):
    pass


class ArchitectureError(SwsurgeryError):
    pass


class NumberError(SwsurgeryError):
    pass


class PlanError(SwsurgeryError):
    pass


class TargetError(SwsurgeryError):
    pass


class NoSpace(TargetError):
    pass


class LookupFailed(SwsurgeryError):
    pass


class HubError(SwsurgeryError):
    pass


class HubUnreachable(HubError):
    """The Hub did not answer: there is no connection, or the offline mode is on."""


class ModelError(SwsurgeryError):
    pass


class Unrunnable(ModelError):
    """The model cannot be run at all.

    The code that loads and runs models does not know the command, so it gives only remedies that all commands share. A
    command adds its own remedy with `add_remedy`.
    """

    def __init__(self, what: str, where: object = "", remedy: str = ""):
        super().__init__(what, where, remedy)
        self._parts = what, where, remedy

    def add_remedy(self, way: str) -> Unrunnable:
        """Return a copy of this error whose message also gives the remedy `way`."""
        what, where, remedy = self._parts
        return Unrunnable(what, where, f"{remedy}, or {way}" if remedy else way)


@contextlib.contextmanager
def add_remedy(way: str) -> Iterator[None]:
    """Add the remedy `way` to the message of an Unrunnable that the `with` block raises."""
    try:
        yield
    except Unrunnable as error:
        raise error.add_remedy(way) from error


class CheckFailed(SwsurgeryError):
    exit_code = 1


NOTHING_LEFT = "nothing was left behind"
"""Last part of the message of an Interrupted if the command left no file behind."""

_done = [NOTHING_LEFT]


def report_done(what: str | None) -> None:
    """Store what the command has produced so far, such as "figure: sweep.png"; None if it has produced nothing.

    The text becomes part of the message if a signal arrives or writing to stdout fails.
    """
    del _done[1:]
    if what:
        _done.append(what)


def describe_done() -> str:
    """Return the text that was given to `report_done`, or "" if the command has produced nothing."""
    return "; ".join(_done[1:])


class Interrupted(BaseException):
    """A signal ended the command. `left` describes what the command leaves on disk.

    If `left` is None, the text given to `report_done` is used.

    Not a subclass of Exception: torch and transformers catch every Exception while they are imported, and would
    continue or raise another error.
    """

    exit_code = 130
    result: object = None

    def __init__(self, signal: str, left: str | None = None):
        self.faults = SwsurgeryError("interrupted", signal, left or _done[-1]).faults
        super().__init__(*self.faults)
        self.signal = signal

    def replace_left(self, left: str) -> Interrupted:
        """Return an Interrupted for the same signal whose message describes what remains on disk as `left`."""
        return Interrupted(self.signal, left)
