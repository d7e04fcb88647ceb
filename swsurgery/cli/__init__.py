"""The commands: each opens its arguments, calls one library function and prints the result.

The package contains one module of commands per library package, the shared options and everything that writes to the
terminal; only this package imports typer and tqdm. Nothing below may depend on it, and modules that are slow to load
are imported inside the command that needs them.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, NoReturn

import typer

from swsurgery._version import __version__
from swsurgery.cli import output
from swsurgery.cli.editing import apply, diff, inspect, revert, schema
from swsurgery.cli.scanning import check, lookup, scan, sweep
from swsurgery.cli.sharing import export, publish
from swsurgery.cli.verifying import lint, sign, verify
from swsurgery.errors import Interrupted, SwsurgeryError, escape_control, report_done

app = typer.Typer(
    help="Change single scalars of a checkpoint: exactly, safely and provably.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for command in (apply, lookup, inspect, check, scan, sweep, verify, lint, diff, revert, publish, export, sign, schema):
    app.command()(command)


@app.callback(invoke_without_command=True)
def _show_version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        output.print_text(__version__)
        raise typer.Exit


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done or yes, 1 no, 2 bad input, 3 a bug, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    if "--quiet" in argv or not output.is_terminal(sys.stderr):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # its progress bars follow the same rule as ours
    if "--quiet" in argv:
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # and so do its messages about retries
    previous = {s: signal.signal(s, _handle_interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
    _received.clear()
    report_done(None)
    log, handler = logging.getLogger("swsurgery"), _StderrHandler()
    log.addHandler(handler)
    try:
        app(argv, prog_name="swsurgery")
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0
    except (SwsurgeryError, Interrupted) as error:
        if _received and not isinstance(error, Interrupted):
            error = _received[0]  # a library replaced the interruption by an error of its own
        if debug:
            traceback.print_exc()
        for fault in error.faults:
            output.say(fault)
        return error.exit_code
    except BrokenPipeError:
        # The reader of stdout left, as `head` does. Without this, Python would report the error again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # an error that no module expects: a failing disk, a file removed meanwhile
        if debug:
            traceback.print_exc()
        remedy = "see to the disk or the permissions, then run it again"
        where = f": {escape_control(str(error.filename))}" if error.filename else ""
        refusal = f"the system refused ({error.strerror or type(error).__name__}){where} ({remedy})"
        output.say(_explain_shortage(error) or refusal)
        return 2
    except Exception as error:  # noqa: BLE001 - the one boundary: what arrives here is a shortage or our bug
        if _received:
            output.say(_received[0].faults[0])
            return _received[0].exit_code
        shortage = _explain_shortage(error)
        if debug or not shortage:
            traceback.print_exc()
        output.say(shortage or "this is a bug in swsurgery: please report it with the lines above")
        return 2 if shortage else 3
    finally:
        log.removeHandler(handler)
        for number, action in previous.items():
            signal.signal(number, action)
    return 0


def _explain_shortage(error: Exception) -> str:
    """Return one line if the system has too few resources for the command, or "" for any other error."""
    text = str(error)
    if isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY):
        return "not enough memory: the system gave no more (free some, or raise the limit on it, then run it again)"
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return "no further thread can be started: the system refused (raise the limit on processes, then run it again)"
    return ""


OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "annot allocate memory",
    "failed to map segment",
    "std::bad_alloc",
)
"""Messages of torch, the dynamic linker and C++. numpy raises MemoryError, and system calls raise OSError."""


class _StderrHandler(logging.Handler):
    """Prints the library's log messages on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        output.say(record.getMessage())


def entry() -> NoReturn:
    """Run the command of this process."""
    output.open_standard_streams()
    sys.exit(main())


_received: list[Interrupted] = []


def _handle_interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the cleanup
    _received.append(Interrupted(signal.Signals(number).name))
    raise _received[0]
