"""Every error that swsurgery raises on purpose, and the exit code each one means.

    SwsurgeryError          exit 2: bad input, or something that cannot be done
    ├── ManifestError       the manifest is wrong; carries every fault
    ├── CheckpointError     the checkpoint on disk is wrong or ambiguous
    │   ├── ShardError      one safetensors file is malformed
    │   └── AmbiguousWeights  an index and a single file are there, and nobody said which is meant
    ├── ArchitectureError   layer/row/col has no meaning for this model
    ├── NumberError         a value that the dtype cannot hold
    ├── PlanError           manifest and checkpoint do not fit; carries every misfit
    ├── TargetError         the output cannot be written
    │   └── NoSpace         there is not enough room for it; nothing was written
    ├── LookupFailed        no such known model or coordinate, or an ambiguous name
    ├── HubError            the Hub cannot be reached, or says no
    ├── ModelError          the model cannot be loaded or run
    │   └── Unrunnable      ... whatever is asked of it; a command that can do without it adds how
    └── CheckFailed         exit 1: the sanity check says no; the target was not made

    Interrupted             exit 130: SIGINT or SIGTERM; no Exception, so that no library takes it for one of its own

A message is one line, `what: where (remedy)`; an error that carries several
faults prints one such line for each. Anything else that escapes is a bug (exit 3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator


def printable(text: str) -> str:
    """`text` with every control, bidirectional and surrogate character escaped, so that a name from a
    file can neither break a line nor rewrite the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


class SwsurgeryError(Exception):
    """Base of all known errors. `faults` holds one line for each thing that is wrong."""

    exit_code = 2

    def __init__(self, what: str, where: object = "", remedy: str = ""):
        line = printable(what)
        if str(where):
            line += f": {printable(str(where))}"
        if remedy:
            line += f" ({printable(remedy)})"
        self.faults: tuple[str, ...] = (line,)
        super().__init__(line)

    @classmethod
    def of(cls, faults: Iterable[str]) -> SwsurgeryError:
        """One error that carries several faults, each already a line."""
        error = cls.__new__(cls)
        error.faults = tuple(printable(f) for f in faults)
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


class ModelError(SwsurgeryError):
    pass


class Unrunnable(ModelError):
    """What loads and runs a model does not know for which command, so its remedies are those that all of them have;
    each adds its own with `or_else`."""

    def __init__(self, what: str, where: object = "", remedy: str = ""):
        super().__init__(what, where, remedy)
        self._parts = what, where, remedy

    def or_else(self, way: str) -> Unrunnable:
        """The same error with one more remedy."""
        what, where, remedy = self._parts
        return Unrunnable(what, where, f"{remedy}, or {way}" if remedy else way)


@contextlib.contextmanager
def or_else(way: str) -> Iterator[None]:
    """A model that cannot be run here is reported with `way` as a further remedy."""
    try:
        yield
    except Unrunnable as error:
        raise error.or_else(way) from error


class CheckFailed(SwsurgeryError):
    exit_code = 1


NOTHING_LEFT = "nothing was left behind"

_done = [NOTHING_LEFT]


def report_done(what: str | None) -> None:
    """Set what a signal, or a stdout that cannot be written, leaves done; None if nothing is done yet."""
    del _done[1:]
    if what:
        _done.append(what)


def done() -> str:
    """Return what the command has done so far and leaves; "" if nothing."""
    return "; ".join(_done[1:])


class Interrupted(BaseException):
    """A signal; `left` says what is left behind, by default what `report_done` was told. Not an Exception: torch and
    transformers catch those while they are imported, and would go on, or raise something else."""

    exit_code = 130

    def __init__(self, signal: str, left: str | None = None):
        self.faults = SwsurgeryError("interrupted", signal, left or _done[-1]).faults
        super().__init__(*self.faults)
        self.signal = signal

    def leaving(self, left: str) -> Interrupted:
        """The same signal, with another word about what is left."""
        return Interrupted(self.signal, left)
