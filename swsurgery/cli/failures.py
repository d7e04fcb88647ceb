"""Report why a command failed: one line per fault on stderr, and one JSON document on stdout if --json was given."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

import typer

from swsurgery.cli.environment import explain_bad_value, hide_variable, is_set, name_variable
from swsurgery.cli.output import Output, print_json, say
from swsurgery.errors import Fault, Interrupted, SwsurgeryError
from swsurgery.storage.memory import is_memory_shortage


def report_error(error: Exception | Interrupted, out: Output, received: Interrupted | None) -> int:
    """Print the error, with its traceback if it is a bug or --debug was given. Return the exit code.

    `received` is the signal that arrived while the command ran, or None.
    """
    known: BaseException = error
    if received and not isinstance(error, Interrupted | OSError):
        known = received  # a library caught the Interrupted and raised its own error instead
    faults: Sequence[Fault]
    if isinstance(known, SwsurgeryError | Interrupted):
        faults, code = known.faults, known.exit_code
    elif shortage := _explain_shortage(error):
        faults, code = (shortage,), 2
    elif isinstance(error, OSError):  # no module handled it: a disk failed, or a file was removed meanwhile
        faults, code = (_describe_refusal(error),), 2
    else:
        faults, code = (Fault("this is a bug in swsurgery: please report it with the lines above"),), 3
    if out.debug or code == 3:
        traceback.print_exception(error)
    faults = [name_variable(fault, out.variables) for fault in faults]
    for fault in faults:
        say(fault)
    _print_document(faults, out)
    return code


def report_usage(error: typer.TyperException, out: Output) -> int:
    """Print an error in the command line, such as an unknown option, and the usage. Return the exit code.

    A bad value of an environment variable is one line, because the command line is not wrong.
    """
    if isinstance(message := getattr(error, "message", None), str):
        vars(error)["message"] = message.replace("Value error, ", "")  # a prefix that says nothing to a user
    if fault := explain_bad_value(error):
        say(fault)
        _print_document((fault,), out)
        return error.exit_code
    hide_variable(error)
    error.show()  # type: ignore[attr-defined]  # every error that typer raises has it, but TyperException does not
    context: typer.Context | None = getattr(error, "ctx", None)
    command = context.command_path if context else "swsurgery"
    _print_document((Fault(error.format_message(), command, f"{command} --help lists the options"),), out)
    return error.exit_code


def is_json_wanted(words: Sequence[str]) -> bool:
    """Return True if a command line or a variable asks for JSON. Errors in the command line itself need it."""
    options = words[: words.index("--")] if "--" in words else words
    others = any(word.startswith(("--csv", "--latex", "--format")) for word in options)
    return "--json" in options or (is_set("json") and not others)


def _print_document(faults: Sequence[Fault], out: Output) -> None:
    """Print the faults as JSON if --json was given, unless the command has already printed its document."""
    if not out.json or out.printed:
        return
    document: dict[str, object] = {"schema": "swsurgery/error/1", "error": faults[0].to_json()}
    if len(faults) > 1:
        document["faults"] = [fault.to_json() for fault in faults]
    print_json(document)


def _describe_refusal(error: OSError) -> Fault:
    what = f"the system reported an error ({error.strerror or type(error).__name__})"
    remedy = "check the disk and the permissions, then run the command again"
    return Fault(what, error.filename or "", remedy)


def _explain_shortage(error: BaseException) -> Fault | None:
    """Return the message for an error that too little memory or too few threads caused, or None for any other error."""
    if is_memory_shortage(error):
        remedy = "free memory, or raise the limit on memory, then run the command again"
        return Fault("not enough memory", remedy=remedy)
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return Fault("cannot start a thread", remedy="raise the limit on processes, then run the command again")
    return None
