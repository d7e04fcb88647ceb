"""Check arguments of the public functions, so that a value of the wrong type never acts like a default."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Collection
from pathlib import Path
from typing import TypeGuard


def require_choice(name: str, value: object, choices: Collection[str], *, optional: bool = False) -> None:
    """Raise TypeError unless `value` is one of the strings `choices`, or None if it is `optional`."""
    if value is None and optional or isinstance(value, str) and value in choices:
        return
    listed = ", ".join(map(repr, choices))
    raise TypeError(f"{name} must be {'None or ' if optional else ''}one of {listed}, not {value!r:.80}")


def require_type(name: str, value: object, kind: type, *, optional: bool = False) -> None:
    """Raise TypeError unless `value` is a `kind`, or None if it is `optional`."""
    if not (value is None and optional or isinstance(value, kind)):
        raise TypeError(f"{name} must be {'None or ' if optional else ''}a {kind.__name__}, not {value!r:.80}")


def require_strings(name: str, value: object) -> None:
    """Raise TypeError unless `value` is None or a list or tuple of strings. A single string is refused."""
    if value is not None and not (isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)):
        raise TypeError(f"{name} must be None or a list of strings, not {value!r:.80}")


def is_path(value: object) -> TypeGuard[str | Path]:
    """Return True for a str or a Path, the two ways to give a path or a location."""
    return isinstance(value, str | Path)


def require_location(name: str, value: object) -> str | Path:
    """Return the location of a checkpoint, a str or a Path, unchanged. Raises TypeError for any other value."""
    if is_path(value):
        return value
    raise TypeError(f"{name} must be a str or a Path, not {value!r:.80}")


def require_path(name: str, value: object) -> Path:
    """Return a path given as a str or a Path. Raises TypeError for any other value."""
    return Path(require_location(name, value))


def require_integer(name: str, value: object) -> int:
    """Return an integer given as an int or another integer type, such as numpy's. Raises TypeError for anything else.

    A bool is refused.
    """
    if not isinstance(value, bool) and hasattr(value, "__index__"):
        return operator.index(value)
    raise TypeError(f"{name} must be an integer, not {value!r:.80}")


def require_number(name: str, value: object) -> float:
    """Return a number given as an int, a float or a number of numpy. Raises TypeError for anything else."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    raise TypeError(f"{name} must be a number, not {value!r:.80}")
