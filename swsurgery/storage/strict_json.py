"""Read the JSON files of a checkpoint: bounded size and depth, no duplicate keys, no NaN.

config.json alone is read as Python reads it, because that is how it is published: with Infinity and NaN, and with a
key that appears twice with the same value.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from swsurgery.errors import CheckpointError
from swsurgery.storage.files import Place, not_the_file, opened, read_at_most, size_of

if TYPE_CHECKING:
    from pydantic import ValidationError

MAX_JSON = 32 << 20
"""Bytes. The index of a published checkpoint of 91,000 tensors has 9 MB; one of 210,000 would have 25."""

MAX_COMMAS = 1 << 19
"""Counted before parsing: each value but the first of its list or map needs one. An index has one for each tensor.
Without it, 32 MB of `{},` become a gigabyte of empty maps."""

MAX_COUNTED = 10_000
"""Faults of a schema among which the first is looked for."""

MAX_DIGITS = 1100
"""Of a number with a point or an exponent; no binary64 has more than 1,075 that count."""


@dataclass(frozen=True)
class Limits:
    """Maximum size of a JSON file in bytes, and maximum number of commas in it."""

    size: int
    commas: int

    def fault(self, size: int, commas: int) -> str | None:
        """Say which limit a file of `size` bytes with `commas` commas exceeds; None if it exceeds none."""
        if size > self.size:
            return f"more than the {self.size} bytes accepted"
        return f"more than the {self.commas} values accepted" if commas > self.commas else None


SMALL = Limits(MAX_JSON, MAX_COMMAS)

RECORD = Limits(128 << 20, 1 << 21)
"""For swsurgery.json: 100,000 scalars take 60 MB and 1.4 million commas. Beyond MAX_JSON it must be ASCII, as the
writer makes it: other text takes up to four bytes of memory per byte."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(path: Place, name: str) -> dict[str, Any]:
    """A JSON object from a regular file; `name` is what the messages call it. Raises CheckpointError."""
    return parse_json(read_small(path, name), name)


def read_config(path: Place, name: str) -> dict[str, Any]:
    """Read a config.json. Its numbers may be infinite or NaN, so no value may be printed as JSON unchecked.

    Raises CheckpointError.
    """
    return parse_json(read_small(path, name), name, strict=False)


def read_small(path: Place, name: str, most: int = MAX_JSON) -> bytes:
    """The bytes of a regular file of at most `most` bytes. Raises CheckpointError."""
    with opened(path) as fd:
        # A file that says to be larger is not read at all.
        raw = read_at_most(fd, most + 1) if size_of(fd) <= most else None
    if raw is None or len(raw) > most:
        raise CheckpointError(f"has more than the {most} bytes accepted", name)
    return raw


def parse_json(raw: bytes, name: str, strict: bool = True, limits: Limits = SMALL) -> dict[str, Any]:
    """Parse a JSON object. Unless `strict`, accept what Python writes and JSON forbids; see the module.

    Raises CheckpointError.
    """
    if fault := limits.fault(len(raw), raw.count(b",")):
        raise CheckpointError(f"has {fault}", name)
    if len(raw) > MAX_JSON and not raw.isascii():
        raise CheckpointError(f"has more than {MAX_JSON} bytes and characters beyond ASCII", name)
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=no_duplicates if strict else _no_contradictions,
            parse_constant=_no_constant if strict else float,
            parse_float=_finite if strict else _short_float,
            parse_int=_whole,
        )
    except (ValueError, RecursionError) as error:  # ValueError covers bad UTF-8, bad JSON and the two hooks
        if found := not_the_file(raw[:8]):
            raise CheckpointError(found[0], name, found[1]) from None
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"is not sound JSON: {reason}", name) from None
    if _SURROGATE.search(raw):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise CheckpointError("is not sound JSON: it holds half a surrogate pair", name) from None
    if type(value) is not dict:
        raise CheckpointError("is not a JSON object", name)
    return value


def rendered(value: object, indent: str = "") -> str:
    """Render JSON exactly as `json.dumps(value, indent=2, sort_keys=True)` does, which is several times slower."""
    deeper = indent + "  "
    if type(value) is dict:
        if not value:
            return "{}"
        items = [f"{_ESCAPED(key)}: {rendered(value[key], deeper)}" for key in sorted(value)]
        return "{\n" + deeper + f",\n{deeper}".join(items) + f"\n{indent}}}"
    if type(value) is list:
        if not value:
            return "[]"
        return f"[\n{deeper}" + f",\n{deeper}".join([rendered(item, deeper) for item in value]) + f"\n{indent}]"
    if value is None:
        return "null"
    if type(value) is str:
        return _ESCAPED(value)
    return int.__repr__(value) if type(value) is int else json.dumps(value)


_ESCAPED = json.encoder.encode_basestring_ascii


def rendered_pieces(document: Mapping[str, object], lists: Mapping[str, Iterable[object]]) -> Iterator[str]:
    """Render `document`, joined with `lists`, as `rendered` does, in pieces: each item of a list is made when due."""
    start = "{\n  "
    for key in sorted({*document, *lists}):
        yield f"{start}{json.dumps(key)}: "
        start = ",\n  "
        if key not in lists:
            yield rendered(document[key], "  ")
            continue
        before = "[\n    "
        for item in lists[key]:
            yield before + rendered(item, "    ")
            before = ",\n    "
        yield "[]" if before.startswith("[") else "\n  ]"
    yield "\n}\n"


def first_fault(error: ValidationError, path: str = "") -> str:
    """The first thing that a schema finds wrong, as `where: what`, or how much is, where listing it would cost.
    `path` is where the validated value is."""
    if error.error_count() > MAX_COUNTED:
        return f"{error.error_count()} faults"
    first = error.errors(include_url=False, include_input=False)[0]
    return quoted(".".join(map(str, (*filter(None, [path]), *first["loc"]))))[1:-1] + f": {first['msg']}"


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number in JSON")


def _no_contradictions(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json's object_pairs_hook: accept a key that appears twice if both values are the same JSON."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result and json.dumps(result[key], sort_keys=True) != json.dumps(value, sort_keys=True):
            raise ValueError(f"{quoted(key)} appears twice with different values")
        result[key] = value
    return result


def _finite(text: str) -> float:
    if not math.isfinite(value := _short_float(text)):
        raise ValueError(f"{text[:40]} is not a number that a checkpoint has")
    return value


def _short_float(text: str) -> float:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"{text[:40]} is not a number that a checkpoint has")
    return float(text)


def _whole(text: str) -> int:
    if len(text) > 40:  # no size, offset or bits of a checkpoint comes near; and messages quote some numbers
        raise ValueError(f"{text[:40]} is not a number that a checkpoint has")
    return int(text)


_WIDTH = 120


def quoted(value: Any) -> str:
    """What a file says, in quotes, and not more of it than a line can hold."""
    text = repr(value[:_WIDTH] if type(value) is str else value)
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json's object_pairs_hook: Python keeps the last of two equal keys, other readers the first."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"{quoted(key)} appears twice")
            seen.add(key)
    return result
