"""Check arguments of the public functions, so that a value of the wrong type never acts like a default."""

from __future__ import annotations

from collections.abc import Collection


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
