"""Read and write the JSON files of a checkpoint: bounded size and depth, no duplicate keys, no NaN.

Only config.json is read leniently, because published files contain Infinity, NaN, and keys that appear twice with the
same value.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from swsurgery.errors import CheckpointError
from swsurgery.storage.files import File, read_at_most, recognise_format

if TYPE_CHECKING:
    from pydantic import ValidationError

MAX_JSON = 32 << 20
"""Maximum size of a file in bytes. A published index of 91,000 tensors has 9 MB; 210,000 tensors would need 25 MB."""

MAX_COMMAS = 1 << 19
"""Maximum number of commas, counted before parsing. In a list or map, each value except the first needs a comma; an
index has one comma per tensor. Without this limit, 32 MB of `{},` would become a gigabyte of empty maps."""

MAX_COUNTED = 10_000
"""If a document has more schema faults than this, only their number is reported. To describe the first fault, pydantic
would have to build the list of all of them."""

MAX_NUMBER_LENGTH = 1100
"""Maximum length of a number with a point or an exponent, in characters. No float64 needs more."""


@dataclass(frozen=True)
class Limits:
    """Maximum size of a JSON file in bytes, and maximum number of commas in it."""

    size: int
    commas: int

    def describe_excess(self, size: int, commas: int) -> str | None:
        """Describe the limit that a file of `size` bytes with `commas` commas exceeds, or return None."""
        if size > self.size:
            return f"more than the {self.size} bytes accepted"
        return f"more than the {self.commas} values accepted" if commas > self.commas else None


SMALL_JSON = Limits(MAX_JSON, MAX_COMMAS)
"""Limits for every JSON file except swsurgery.json."""

RECORD = Limits(128 << 20, 1 << 21)
"""Limits for swsurgery.json: 100,000 scalars need 60 MB and 1.4 million commas. A file larger than MAX_JSON must be
ASCII, as swsurgery writes it, because other text needs up to four bytes of memory per byte of the file."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(file: File, name: str) -> dict[str, Any]:
    """Read a JSON object from a regular file, whose name in messages is `name`. Raises CheckpointError."""
    return parse_json(read_small(file, name), name)


def read_config(file: File, name: str) -> dict[str, Any]:
    """Read a config.json. Its numbers may be infinite or NaN, so check them before writing them as JSON.

    Raises CheckpointError.
    """
    return parse_json(read_small(file, name), name, strict=False)


def read_small(file: File, name: str, most: int = MAX_JSON) -> bytes:
    """Read a regular file of at most `most` bytes. Raises CheckpointError."""
    with file.open() as opened:
        # A file with a larger reported size is not read at all.
        raw = read_at_most(opened, most + 1) if opened.size <= most else None
    if raw is None or len(raw) > most:
        raise CheckpointError(f"has more than the {most} bytes accepted", name)
    return raw


def parse_json(raw: bytes, name: str, strict: bool = True, limits: Limits = SMALL_JSON) -> dict[str, Any]:
    """Parse the bytes of a JSON file, which must contain an object. `name` is the name of the file in messages.

    If `strict` is False, accepts Infinity, NaN, and repeated keys with equal values. Raises CheckpointError.
    """
    if fault := limits.describe_excess(len(raw), raw.count(b",")):
        raise CheckpointError(f"has {fault}", name)
    if len(raw) > MAX_JSON and not raw.isascii():
        raise CheckpointError(f"has more than {MAX_JSON} bytes and characters beyond ASCII", name)
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=refuse_duplicates if strict else _refuse_contradictions,
            parse_constant=_refuse_constant if strict else float,
            parse_float=_parse_finite if strict else _parse_float,
            parse_int=_parse_whole,
        )
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, or one of the hooks
        if found := recognise_format(raw[:8]):
            raise CheckpointError(found[0], name, found[1]) from None
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"is not valid JSON: {reason}", name) from None
    if _SURROGATE.search(raw):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise CheckpointError("is not valid JSON: it contains half a surrogate pair", name) from None
    if type(value) is not dict:
        raise CheckpointError("is not a JSON object", name)
    return value


def render(value: object, indent: str = "") -> str:
    """Render JSON exactly like `json.dumps(value, indent=2, sort_keys=True)`, but several times faster."""
    deeper = indent + "  "
    if type(value) is dict:
        if not value:
            return "{}"
        items = [f"{_ESCAPED(key)}: {render(value[key], deeper)}" for key in sorted(value)]
        return "{\n" + deeper + f",\n{deeper}".join(items) + f"\n{indent}}}"
    if type(value) is list:
        if not value:
            return "[]"
        return f"[\n{deeper}" + f",\n{deeper}".join([render(item, deeper) for item in value]) + f"\n{indent}]"
    if value is None:
        return "null"
    if type(value) is str:
        return _ESCAPED(value)
    return int.__repr__(value) if type(value) is int else json.dumps(value)


_ESCAPED = json.encoder.encode_basestring_ascii


def render_pieces(document: Mapping[str, object], lists: Mapping[str, Iterable[object]]) -> Iterator[str]:
    """Render `document` merged with `lists` as `render` does, in pieces. Items of `lists` are taken one at a time."""
    start = "{\n  "
    for key in sorted({*document, *lists}):
        yield f"{start}{json.dumps(key)}: "
        start = ",\n  "
        if key not in lists:
            yield render(document[key], "  ")
            continue
        before = "[\n    "
        for item in lists[key]:
            yield before + render(item, "    ")
            before = ",\n    "
        yield "[]" if before.startswith("[") else "\n  ]"
    yield "\n}\n"


def describe_first_fault(error: ValidationError, path: str = "") -> str:
    """Describe the first fault that a schema found, as `location: fault`.

    If there are more than MAX_COUNTED faults, returns only their number. `path` is the location of the validated value.
    """
    if error.error_count() > MAX_COUNTED:
        return f"{error.error_count()} faults"
    first = error.errors(include_url=False, include_input=False)[0]
    return quote(".".join(map(str, (*filter(None, [path]), *first["loc"]))))[1:-1] + f": {first['msg']}"


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number in JSON")


def _refuse_contradictions(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict for object_pairs_hook of json; a repeated key must have equal values. Raises ValueError."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result and json.dumps(result[key], sort_keys=True) != json.dumps(value, sort_keys=True):
            raise ValueError(f"{quote(key)} appears twice with different values")
        result[key] = value
    return result


def _parse_finite(text: str) -> float:
    if not math.isfinite(value := _parse_float(text)):
        raise ValueError(f"{text[:40]} is not a number that a checkpoint may contain")
    return value


def _parse_float(text: str) -> float:
    if len(text) > MAX_NUMBER_LENGTH:
        raise ValueError(f"{text[:40]} is not a number that a checkpoint may contain")
    return float(text)


def _parse_whole(text: str) -> int:
    if len(text) > 40:  # larger than any size or offset, and messages quote some numbers
        raise ValueError(f"{text[:40]} is not a number that a checkpoint may contain")
    return int(text)


_WIDTH = 120
"""Maximum length of a quoted value, in characters."""


def quote(value: object) -> str:
    """Quote a value from a file, shortened to fit one line."""
    text = repr(value[:_WIDTH] if isinstance(value, str) else value)
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict for object_pairs_hook of json. Raises ValueError for a repeated key.

    Python would keep the last of two equal keys, and other readers keep the first.
    """
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"{quote(key)} appears twice")
            seen.add(key)
    return result
