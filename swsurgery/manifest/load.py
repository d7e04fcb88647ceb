"""The manifest: what the user asks for, as strict YAML 1.2 or JSON, with every fault at its line and column.

Values follow the grammar of JSON (numbers, true, false, null, strings). Refused: duplicate keys, anchors,
aliases, tags, several documents, unknown fields and coerced types. Knows no checkpoint.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from swsurgery.errors import ManifestError, ShardError
from swsurgery.manifest import patch
from swsurgery.manifest.schema import Base, Bounds, Manifest
from swsurgery.manifest.yaml_reader import MAX_FAULTS, _dotted, _Reader
from swsurgery.storage.files import opened, read_at_most

MAX_BYTES = 32 << 20
MAX_COUNTED = 50_000
"""Faults of the schema that are looked at to find the first MAX_FAULTS."""


@dataclass(frozen=True)
class LoadedManifest:
    """A manifest with the text it came from. `where(i)` places edit number i."""

    path: Path
    raw: bytes
    manifest: Manifest
    positions: dict[tuple, tuple[int, int]]

    def position(self, *path: str | int) -> tuple[int, int]:
        """Return the line and column of a node, or of the nearest node around it whose position is known."""
        while path not in self.positions:
            path = path[:-1]
        return self.positions[path]

    def where(self, edit: int) -> str:
        line, column = self.positions[("edits", edit)]
        return f"{self.path}:{line}:{column}: edits[{edit}]"


def load_manifest(path: Path) -> LoadedManifest:
    """Read and check a manifest; of a patch (`swsurgery export`), the manifest that does the same.

    Raises ManifestError with every fault as `file:line:column: path: what`.
    """
    try:
        real = path.resolve(strict=True)  # the user's own file may be a link; only what it leads to has to be a file
        with opened(real) as fd:
            raw = read_at_most(fd, MAX_BYTES + 1)
    except ShardError as error:
        raise ManifestError.of(f"cannot read the manifest: {fault}" for fault in error.faults) from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
        raise ManifestError(f"cannot read the manifest ({getattr(error, 'strerror', error)})", path) from None
    if len(raw) > MAX_BYTES:
        raise ManifestError(f"manifest is larger than {MAX_BYTES} bytes", path)
    return parse_manifest(patch.manifest_text(raw, path) if patch.looks_like(raw) else raw, path)


def parse_manifest(raw: bytes, path: Path) -> LoadedManifest:
    """As load_manifest, from bytes; `path` is only named in messages."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise ManifestError.of([f"{path}:{line}:{column}: not UTF-8 (save the file as UTF-8)"]) from None
    if text.startswith("version https://git-lfs"):
        raise ManifestError(f"{path}:1:1: is a git-lfs pointer, not the file itself", remedy="run git lfs pull")
    reader = _Reader(text)
    faults = reader.faults
    if reader.complete:
        try:
            manifest = Manifest.model_validate(reader.value)
            if not faults:
                return LoadedManifest(path, raw, manifest, reader.positions)
        except ValidationError as error:
            faults += _schema_faults(error, reader)
    # Each member of a union that a value fails to match gives the same line.
    faults = sorted(set(faults))
    lines = [f"{path}:{line}:{column}: {what}" for (line, column), what in faults[:MAX_FAULTS]]
    if len(faults) > MAX_FAULTS or reader.stopped:
        lines.append(f"{path}: and more of these")
    raise ManifestError.of(lines)


def _schema_faults(error: ValidationError, reader: _Reader) -> list[tuple[tuple[int, int], str]]:
    """The first faults in the order of the file; one more than are listed shows that there are more."""
    if error.error_count() > MAX_COUNTED:
        return [((1, 1), f"{error.error_count()} faults, too many to list (is this a manifest?)")]
    items = [(*_located(item, reader), item) for item in error.errors(include_url=False, include_input=False)]
    items.sort(key=lambda found: found[0])
    found: dict[tuple[tuple[int, int], str], None] = {}
    for position, path, value, item in items:
        if len(found) > MAX_FAULTS:
            break
        found[position, f"{_dotted(path)}{_what(item, path, value)}"] = None
    return list(found)


def _located(item: Any, reader: _Reader) -> tuple[tuple[int, int], tuple, Any]:
    """Where one of pydantic's errors is: ((line, column), path, value there)."""
    path, value = [], reader.value
    for part in item["loc"]:
        # pydantic puts the discriminator's and the union's tags into its paths; they are not in the data
        if isinstance(value, dict) and part in value or isinstance(value, list) and isinstance(part, int):
            path.append(part)
            value = value[part]
    position = reader.positions.get((*path, "first")) if item["type"] == "extra_forbidden" else None
    place = tuple(path)
    while position is None:
        position, place = reader.positions.get(place), place[:-1]
    return position, tuple(path), value


def _what(item: Any, path: tuple, value: Any) -> str:
    """One of pydantic's errors in words, with the remedy."""
    kind, context = item["type"], item.get("ctx", {})
    leaf = item["loc"][-1] if item["loc"] else ""
    if kind == "missing":
        return f"{leaf} is missing"
    if kind == "extra_forbidden":
        # A field of another operation or place is spelled rightly: nothing to suggest.
        near = difflib.get_close_matches(str(leaf)[:40], _FIELDS, 1) if leaf not in _FIELDS else []
        return "unknown field" + (f" (did you mean {near[0]}?)" if near else "")
    if kind == "union_tag_invalid":
        return f"unknown op {_short(context['tag'])} (one of {context['expected_tags']})"
    if kind == "union_tag_not_found":
        return "op is missing" if isinstance(value, dict) else f"is {_short(value)}, not an edit"
    if kind == "value_error":
        return str(context["error"])
    field = next((p for p in reversed(path) if isinstance(p, str)), "")
    expected = _EXPECTED.get(field) or _EXPECTED.get(kind) or f"{item['msg'][0].lower()}{item['msg'][1:]}"
    return f"{expected}, not {_short(value)}"


_EXPECTED = {
    "expect": "should be a number, bits such as 0x40bc, or {value: ..., dtype: ...}",
    "value": "should be a finite number",
    "bits": "should be hex bits of the dtype's width, such as 0x40bc",
    "revision": "should be the commit's 40 hex digits, in quotes",
    "index": "should be a list of whole numbers from 0, such as [3968, 7003]",
    "expert": "should be a whole number from 0, or shared",
    "sha256": "should map names of shards to 64 hex digits",
    "int_type": "should be a whole number",
    "float_type": "should be a number",
    "finite_number": "should be a finite number",
    "string_type": "should be text",
    "list_type": "should be a list",
    "dict_type": "should be a map",
    "model_type": "should be a map",
    "model_attributes_type": "should be a map",
    "greater_than_equal": "should not be negative",
    "literal_error": "is none of the values that this field has",
    "too_short": "should not be empty",
}
"""How a field, or a kind of error where the field is not here, is put in words."""


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


_FIELDS = sorted(
    {name for model in (Manifest, Base, Bounds) for name in model.model_fields}
    | {"op", "layer", "row", "col", "expert", "tensor", "index", "known", "expect", "factor", "value", "bits"}
)
