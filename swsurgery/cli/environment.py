"""Take the defaults of some options from environment variables, such as SWSURGERY_DEVICE.

PERMITTED and REFUSED name every option of every command by its parameter. A variable may say how a command works, and
in which form it prints. It must not choose what is written, what is published, or what the answer is: a variable that
somebody forgot must not change a result.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_origin

import typer

from swsurgery.errors import Fault

PERMITTED = {
    "activation_bits": "SWSURGERY_ACTIVATION_BITS",
    "activation_per": "SWSURGERY_ACTIVATION_PER",
    "bos": "SWSURGERY_BOS",
    "debug": "SWSURGERY_DEBUG",
    "device": "SWSURGERY_DEVICE",
    "format": "SWSURGERY_FORMAT",
    "generate": "SWSURGERY_GENERATE",
    "json": "SWSURGERY_JSON",
    "placement": "SWSURGERY_PLACEMENT",
    "protocol": "SWSURGERY_PROTOCOL",
    "quiet": "SWSURGERY_QUIET",
    "score_first": "SWSURGERY_SCORE_FIRST",
    "strict": "SWSURGERY_STRICT",
    "stride": "SWSURGERY_STRIDE",
    "text": "SWSURGERY_TEXT",
    "window": "SWSURGERY_WINDOW",
    "windows": "SWSURGERY_WINDOWS",
}
"""Maps the parameter of an option to the variable that contains its default."""

_WRITES = "it chooses what is written or published"
_DECIDES = "it decides the answer"
_SUBJECT = "it says what one command is about"
_FORM = "it exists for some results only"

REFUSED = {
    "accept": _WRITES,
    "at": _SUBJECT,
    "base": _WRITES,
    "check": _WRITES,
    "complete": _SUBJECT,
    "confirm": _SUBJECT,
    "control": _SUBJECT,
    "create_pr": _WRITES,
    "csv": _FORM,
    "directory": _WRITES,
    "dry_run": _WRITES,
    "factor": _WRITES,
    "factors": _SUBJECT,
    "file": _WRITES,
    "finite": _SUBJECT,
    "for_publish": _WRITES,
    "forget": _WRITES,
    "form": _SUBJECT,
    "in_place": _WRITES,
    "key": _WRITES,
    "known": _SUBJECT,
    "known_tolerance": _DECIDES,
    "latex": _FORM,
    "limit": _DECIDES,
    "link": _WRITES,
    "manifest": _WRITES,
    "max_perplexity_ratio": _DECIDES,
    "message": _WRITES,
    "method": _SUBJECT,
    "min_perplexity_ratio": _DECIDES,
    "model": _SUBJECT,
    "op": _WRITES,
    "output": _SUBJECT,
    "page": _WRITES,
    "patch": _WRITES,
    "plot": _WRITES,
    "private": _WRITES,
    "prompt": _SUBJECT,
    "protected": _SUBJECT,
    "public_key": _DECIDES,
    "register": _WRITES,
    "replace": _WRITES,
    "reuse_digests": _WRITES,
    "revision": _WRITES,
    "signature": _WRITES,
    "status": _SUBJECT,
    "tag": _WRITES,
    "target": _WRITES,
    "tasks": _SUBJECT,
    "tasks_dir": _SUBJECT,
    "tensor": _SUBJECT,
    "tolerance": _DECIDES,
    "tool": _SUBJECT,
    "transformers": _SUBJECT,
    "undo_limit": _WRITES,
    "values": _SUBJECT,
    "variant": _SUBJECT,
    "weights": _SUBJECT,
    "yes": _WRITES,
}
"""Maps the parameter of each other option to the reason why no variable contains its default."""

_HIDDEN = frozenset({"json", "quiet", "debug"})
"""Options of every command. The help of a command does not repeat their variables."""

_YES = frozenset({"1", "true", "t", "yes", "y", "on"})
"""Values of a variable that set an option without a value, as typer reads them."""


def add_variable(parameter: inspect.Parameter) -> inspect.Parameter:
    """Return the parameter of a command, whose option takes its default from a variable if PERMITTED names one."""
    if parameter.name not in PERMITTED or get_origin(parameter.annotation) is not Annotated:
        return parameter
    kind, option = get_args(parameter.annotation)
    option = copy.copy(option)
    option.envvar = PERMITTED[parameter.name]
    option.show_envvar = parameter.name not in _HIDDEN
    return parameter.replace(annotation=Annotated[kind, option])


def is_set(name: str) -> bool:
    """Return True if the variable of an option without a value says yes."""
    return os.environ.get(PERMITTED[name], "").lower() in _YES


def find_used(context: typer.Context) -> dict[str, str]:
    """Return the values that a command took from variables. Maps a variable to its value."""
    used = {}
    for name, variable in PERMITTED.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "ENVIRONMENT":
            used[variable] = os.environ[variable]
    return used


def refuse_bad_threads() -> None:
    """Raise SwsurgeryError if SWSURGERY_THREADS has a bad value, also for a command that hashes no file."""
    if os.environ.get("SWSURGERY_THREADS"):
        from swsurgery.storage.hashing import count_threads

        count_threads()


def explain_bad_value(error: typer.TyperException) -> Fault | None:
    """Return the fault for a value that a variable contains and that its option does not accept, otherwise None."""
    parameter: Any = getattr(error, "param", None)
    context: typer.Context | None = getattr(error, "ctx", None)
    if parameter is None or context is None or parameter.name not in PERMITTED:
        return None
    variable = PERMITTED[parameter.name]
    source = context.get_parameter_source(parameter.name)
    if source is None or source.name != "ENVIRONMENT":
        return None
    reason = " ".join(str(getattr(error, "message", "")).split()).rstrip(".")
    what = f"an environment variable has a bad value ({reason})"
    return Fault(what, f"{variable}={os.environ[variable]}", f"change or unset {variable}")


def hide_variable(error: typer.TyperException) -> None:
    """Leave the variable out of the message about an option, because the bad value is on the command line."""
    parameter: Any = getattr(error, "param", None)
    if parameter is not None and hasattr(parameter, "show_envvar"):
        parameter.show_envvar = False


def name_variable(fault: Fault, used: Mapping[str, str]) -> Fault:
    """Return the fault with the name of the variable before its `where`, if the value of a variable is at fault."""
    for variable, value in used.items():
        if fault.where == Fault("", value).where:
            return Fault(fault.what, f"{variable}={value}", fault.remedy, fault.position)
    return fault
