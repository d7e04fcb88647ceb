"""Read the JSON files of a checkpoint: bounded size and depth, no duplicate keys, no NaN.

config.json alone is read as Python reads it, because that is how it is published: with Infinity and NaN, and with a
key that stands twice with the same value.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

from swsurgery.errors import CheckpointError
from swsurgery.shard import Place, no_duplicates, opened, quoted, read_at_most

if TYPE_CHECKING:
    from pydantic import ValidationError

MAX_JSON = 32 << 20
"""Bytes. The index of a published checkpoint of 91,000 tensors has 9 MB; one of 210,000 would have 25."""

MAX_COMMAS = 1 << 19
"""Counted before parsing: each value but the first of its list or map needs one. An index has one for each tensor, a
registry of 20,000 edits 300,000. Without it, 32 MB of `{},` become a gigabyte of empty maps."""

MAX_COUNTED = 10_000
"""Faults of a schema among which the first is looked for."""

MAX_DIGITS = 1100
"""Of a number with a point or an exponent; no binary64 has more than 1,075 that count."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(path: Place, name: str) -> dict[str, Any]:
    """A JSON object from a regular file; `name` is what the messages call it. Raises CheckpointError."""
    return parse_json(read_small(path, name), name)


def read_config(path: Place, name: str) -> dict[str, Any]:
    """Read a config.json. Its numbers may be infinite or NaN, so no value may be printed as JSON unchecked.

    Raises CheckpointError.
    """
    return parse_json(read_small(path, name), name, strict=False)


def read_small(path: Place, name: str) -> bytes:
    """The bytes of a regular file of at most MAX_JSON. Raises CheckpointError."""
    with opened(path) as fd:
        raw = read_at_most(fd, MAX_JSON + 1)
    if len(raw) > MAX_JSON:
        raise CheckpointError(f"has more than the {MAX_JSON} bytes accepted", name)
    return raw


def parse_json(raw: bytes, name: str, strict: bool = True) -> dict[str, Any]:
    """Parse a JSON object. Unless `strict`, accept what Python writes and JSON forbids; see the module.

    Raises CheckpointError.
    """
    if raw.count(b",") > MAX_COMMAS:
        raise CheckpointError(f"has more than the {MAX_COMMAS} values accepted", name)
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=no_duplicates if strict else _no_contradictions,
            parse_constant=_no_constant if strict else float,
            parse_float=_finite if strict else _short_float,
            parse_int=_whole,
        )
    except (ValueError, RecursionError) as error:  # ValueError covers bad UTF-8, bad JSON and the two hooks
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


def first_fault(error: ValidationError) -> str:
    """The first thing that a schema finds wrong, as `where: what`, or how much is, where listing it would cost."""
    if error.error_count() > MAX_COUNTED:
        return f"{error.error_count()} faults"
    first = error.errors(include_url=False, include_input=False)[0]
    return quoted(".".join(map(str, first["loc"])))[1:-1] + f": {first['msg']}"


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number in JSON")


def _no_contradictions(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json's object_pairs_hook: accept a key that stands twice if both values are the same JSON."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result and json.dumps(result[key], sort_keys=True) != json.dumps(value, sort_keys=True):
            raise ValueError(f"{quoted(key)} stands twice with different values, so it is ambiguous")
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
