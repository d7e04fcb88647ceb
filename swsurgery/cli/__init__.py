"""The commands: each opens its arguments, calls one library function and prints the result.

The package contains one module of commands per library package, the shared options and everything that writes to the
terminal. Only this package imports typer and tqdm, and no other package may import this one. The module of a command is
imported when the command runs, and modules that are slow to load are imported inside the command that needs them.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import Annotated, NoReturn

import typer

from swsurgery._version import __version__
from swsurgery.cli import failures, output
from swsurgery.errors import Interrupted, report_done

COMMANDS = {
    "apply": "editing",
    "lookup": "known",
    "inspect": "checkpoint",
    "check": "editing",
    "scan": "scanning",
    "sweep": "scanning",
    "compare": "scanning",
    "verify": "verifying",
    "preflight": "verifying",
    "lint": "verifying",
    "pin": "editing",
    "diff": "checkpoint",
    "revert": "editing",
    "publish": "sharing",
    "export": "sharing",
    "recipe": "sharing",
    "sign": "verifying",
    "schema": "manifest",
}
"""The commands in the order of the help, each with the module of this package that contains its function."""


def make_app(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """Make the program with the commands `names`, and import only their modules."""
    app = typer.Typer(
        help="Change single scalars of a checkpoint: exactly, safely and provably.",
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    for name in names:
        module = importlib.import_module(f"swsurgery.cli.{COMMANDS[name]}")
        app.command()(getattr(module, name))
    app.callback(invoke_without_command=True)(_show_version)
    return app


def _show_version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        output.print_text(__version__)
        raise typer.Exit


def _choose_commands(words: Sequence[str]) -> Iterable[str]:
    """Return the name of the command that a command line begins with, or all names if it begins with another word."""
    return words[:1] if words and words[0] in COMMANDS else COMMANDS


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. `argv` are the words after `swsurgery`, by default those of sys.argv.

    0: done, or the answer is "yes". 1: the answer is "no". 2: bad input. 3: a bug. 130: interrupted.
    """
    report_done(None)
    words = sys.argv[1:] if argv is None else list(argv)
    out = output.Output(json=failures.is_json_wanted(words))
    with _convert_signals(), _print_log():
        try:
            app = make_app(_choose_commands(words))
            code = app(words, prog_name="swsurgery", obj=out, standalone_mode=False)
            return code if isinstance(code, int) else 0
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else 0
        except BrokenPipeError:
            # The program that read stdout, such as `head`, has ended. Python would report the error again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except typer.TyperException as error:
            return failures.report_usage(error, out)
        except (Exception, Interrupted) as error:  # noqa: BLE001 - every error ends here
            signal_received = _received[0] if _received else None
            return failures.report_error(error, out, signal_received)


class _StderrHandler(logging.Handler):
    """Prints the library's log messages on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        output.say(record.getMessage())


@contextlib.contextmanager
def _print_log() -> Iterator[None]:
    """Print the library's log messages on stderr while the `with` block runs."""
    log, handler = logging.getLogger("swsurgery"), _StderrHandler()
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


REPEAT_SECONDS = 0.01
"""Time in seconds after which an Interrupted that Python ignored is raised again: the finalizer has ended by then."""

_received: list[Interrupted] = []


@contextlib.contextmanager
def _convert_signals() -> Iterator[None]:
    """Raise Interrupted if SIGINT or SIGTERM arrives while the `with` block runs.

    Python ignores an exception in a finalizer or a weakref callback. An Interrupted that is lost there is raised again.
    """
    _received.clear()
    previous = {number: signal.signal(number, _handle_interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    report_ignored = sys.unraisablehook

    def repeat_interrupt(ignored: sys.UnraisableHookArgs) -> None:
        if not isinstance(ignored.exc_value, Interrupted):
            report_ignored(ignored)
            return
        signal.signal(signal.SIGALRM, _repeat_interrupt)
        signal.setitimer(signal.ITIMER_REAL, REPEAT_SECONDS)

    sys.unraisablehook = repeat_interrupt
    try:
        yield
    finally:
        sys.unraisablehook = report_ignored
        for number, action in previous.items():
            signal.signal(number, action)


def _handle_interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the cleanup
    _received.append(Interrupted(signal.Signals(number).name))
    raise _received[0]


def _repeat_interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    raise _received[0]


GARBAGE = 20_000
"""Number of new objects after which Python collects garbage. Its default of 700 makes imports a tenth slower."""


def entry() -> NoReturn:
    """Run the command that sys.argv contains, and end the process with its exit code.

    After a signal, the process ends without waiting for threads: the import of torch can take many seconds.
    """
    gc.set_threshold(GARBAGE)
    output.open_standard_streams()
    code = main()
    if code == Interrupted.exit_code:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # nobody reads it
                stream.flush()
        os._exit(code)
    gc.freeze()  # otherwise Python searches all objects for garbage at the end: a second once torch is loaded
    sys.exit(code)
