"""Read values from JSON documents, and format numbers for pages.

A record contains a report that nobody has validated, so a value may be missing or have any type. The functions return
None, "" or an empty collection for a value of the wrong type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from swsurgery.storage.numbers import format_number, format_ratio

Document = Mapping[str, object]
"""A JSON object, such as the document that a command prints with --json."""

MAX_LAYERS = 300
"""Maximum number of layers that a figure shows."""

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def read_map(document: object, *path: str) -> Document:
    """Return the object at `path`, a series of keys; {} if there is none."""
    found = _find(document, path)
    return found if isinstance(found, Mapping) else {}


def read_list(document: object, *path: str) -> Sequence[object]:
    """Return the list at `path`; [] if there is none."""
    found = _find(document, path)
    return found if isinstance(found, list | tuple) else []


def read_maps(document: object, *path: str) -> list[Document]:
    """Return the objects in the list at `path`."""
    return [each for each in read_list(document, *path) if isinstance(each, Mapping)]


def read_texts(document: object, *path: str) -> list[str]:
    """Return the texts in the list at `path`."""
    return [each for each in read_list(document, *path) if isinstance(each, str)]


def read_text(document: object, *path: str) -> str:
    """Return the text at `path`; "" if there is none."""
    found = _find(document, path)
    return found if isinstance(found, str) else ""


def read_number(document: object, *path: str) -> float | None:
    """Return the number at `path`; None if there is none. The texts "nan", "inf" and "-inf" are numbers."""
    return convert_number(_find(document, path))


def read_numbers(document: object, *path: str) -> list[float | None]:
    """Return the elements of the list at `path` as numbers, and None for each other element."""
    return [convert_number(each) for each in read_list(document, *path)]


def read_integer(document: object, *path: str) -> int | None:
    """Return the whole number at `path`; None if there is none."""
    found = _find(document, path)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def convert_number(value: object) -> float | None:
    """Return a JSON value as a number; None if it is none, or too large for a float."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int) and abs(value) > 10**300:
        return None
    if isinstance(value, int | float):
        return float(value)
    return _NOT_FINITE.get(value) if isinstance(value, str) else None


def is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _find(document: object, path: Sequence[str]) -> object:
    for key in path:
        document = document.get(key) if isinstance(document, Mapping) else None
    return document


def show_number(value: object) -> str | None:
    """Format a measured number with four significant digits; None for anything else."""
    number = convert_number(value)
    return None if number is None else format_number(number)


def show_ratio(value: object) -> str | None:
    """Format a ratio, such as x5.612; None for anything else."""
    number = convert_number(value)
    return None if number is None else f"x{format_ratio(number)}"


def show_interval(low: object, high: object) -> str | None:
    """Format the two ends of an interval of ratios, such as "x5.1 to x6.2"; None if an end is missing."""
    ends = [show_ratio(low), show_ratio(high)]
    return None if None in ends else " to ".join(end for end in ends if end is not None)


def show_value(value: object) -> str | None:
    """Format a stored value exactly, such as 5.09375 and 0; None if it is missing."""
    number = convert_number(value)
    if number is None:
        return None
    return f"{number:,.0f}" if number.is_integer() and abs(number) < 10**15 else f"{value}"


def show_index(index: object) -> str:
    """Format an index, such as [507, 1229]."""
    return f"[{', '.join(map(str, index))}]" if isinstance(index, list | tuple) else ""


def show_scalar(entry: Document) -> str:
    """Format the coordinate in a document with the keys `tensor` and `index`."""
    return f"{read_text(entry, 'tensor')}{show_index(entry.get('index'))}"
