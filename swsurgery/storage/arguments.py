"""Check the types of arguments of the public functions.

In each function, `name` is the name of the argument in the message, and `value` is the value that was passed.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Collection
from pathlib import Path
from typing import TypeGuard

from swsurgery.errors import SwsurgeryError


def require_choice(name: str, value: object, choices: Collection[str], *, optional: bool = False) -> None:
    """Raise TypeError if `value` is not one of the strings `choices`. With `optional`, None is accepted too."""
    if value is None and optional or isinstance(value, str) and value in choices:
        return
    listed = ", ".join(map(repr, choices))
    raise TypeError(f"{name} must be {'None or ' if optional else ''}one of {listed}, not {value!r:.80}")


def require_type(name: str, value: object, kind: type, *, optional: bool = False) -> None:
    """Raise TypeError if `value` is not an instance of `kind`. With `optional`, None is accepted too."""
    if not (value is None and optional or isinstance(value, kind)):
        raise TypeError(f"{name} must be {'None or ' if optional else ''}a {kind.__name__}, not {value!r:.80}")


def require_strings(name: str, value: object) -> None:
    """Accept None and a list or tuple of strings. Raises TypeError for anything else, also for a single string."""
    if value is not None and not (isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)):
        raise TypeError(f"{name} must be None or a list of strings, not {value!r:.80}")


def is_path(value: object) -> TypeGuard[str | Path]:
    """Return True for a str or a Path, the two types in which a caller may pass a path or a location."""
    return isinstance(value, str | Path)


def require_location(name: str, value: object) -> str | Path:
    """Return the location of a checkpoint, a str or a Path, unchanged.

    Raises TypeError for any other value, and SwsurgeryError for a path that the system cannot open.
    """
    if is_path(value):
        if "\0" in str(value):
            raise SwsurgeryError(f"{name} contains a NUL character, so it is not a path", value)
        return value
    raise TypeError(f"{name} must be a str or a Path, not {value!r:.80}")


def require_path(name: str, value: object) -> Path:
    """Convert a str or a Path to a Path. Raises the errors of `require_location`."""
    return Path(require_location(name, value))


def require_integer(name: str, value: object) -> int:
    """Convert an int, or a value of another integer type such as numpy's, to an int.

    Raises TypeError for anything else, also for a bool.
    """
    if not isinstance(value, bool) and hasattr(value, "__index__"):
        return operator.index(value)
    raise TypeError(f"{name} must be an integer, not {value!r:.80}")


def require_number(name: str, value: object) -> float:
    """Convert an int, a float or a real number of numpy to a float.

    Raises TypeError for anything else, and SwsurgeryError for a number that is too large for a float.
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise SwsurgeryError(f"{name} is a number that is too large for a float") from None
    raise TypeError(f"{name} must be a number, not {value!r:.80}")
