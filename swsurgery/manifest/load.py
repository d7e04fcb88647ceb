"""Load a manifest from strict YAML 1.2 or JSON and report every fault with its line and column.

Values follow the grammar of JSON (numbers, true, false, null, strings). Duplicate keys, anchors, aliases, tags,
several documents, unknown fields and values of another type are errors. Must not depend on checkpoints.
"""

from __future__ import annotations

import difflib
import json
import numbers
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from swsurgery.errors import Fault, ManifestError, SwsurgeryError
from swsurgery.manifest.operations import OPERATIONS
from swsurgery.manifest.schema import Base, Bounds, Manifest
from swsurgery.manifest.targets import Target
from swsurgery.manifest.yaml_reader import MAX_FAULTS, LineColumn, NodePath, Reader, format_path
from swsurgery.storage.arguments import is_path
from swsurgery.storage.files import LocalFile, read_at_most
from swsurgery.storage.result import Result

MAX_MANIFEST = 32 << 20
"""Maximum size of a manifest, in bytes."""

MAX_MANIFEST_FAULTS = 50_000
"""Maximum number of schema faults that are sorted by line to list the first MAX_FAULTS.

If there are more faults, only their number is reported.
"""


class Origin(NamedTuple):
    """The source of an edit of a merged manifest: the number of the file, and that of the edit there, both from 0."""

    part: int
    number: int


@dataclass(frozen=True, repr=False)
class LoadedManifest(Result):
    """A manifest with its source text and the position of each node.

    A manifest that was merged from several ones has them as `parts`, and the origin of each edit.
    """

    path: Path
    raw: bytes
    manifest: Manifest
    positions: dict[NodePath, LineColumn] = field(repr=False)
    parts: tuple[LoadedManifest, ...] = field(default=(), repr=False)
    origins: tuple[Origin, ...] = field(default=(), repr=False)

    def to_json(self) -> dict[str, object]:
        """Return the manifest's fields as written, without defaults."""
        return self.manifest.model_dump(mode="json", exclude_unset=True, by_alias=True)

    def find_position(self, *path: str | int) -> LineColumn:
        """Return the line and column of the node at `path`, or of its nearest parent whose position is stored."""
        while path not in self.positions:
            path = path[:-1]
        return self.positions[path]

    def describe_position(self, edit: int) -> str:
        """Return the position of edit number `edit`, counted from 0, as `file:line:column: edits[0]`."""
        if self.origins:
            part, number = self.origins[edit]
            return self.parts[part].describe_position(number)
        line, column = self.positions[("edits", edit)]
        return f"{self.path}:{line}:{column}: edits[{edit}]"

    def name_edit(self, edit: int) -> str:
        """Name an edit in a message about another one: `edits[0]`, with its position if several files were merged."""
        return self.describe_position(edit) if self.origins else f"edits[{edit}]"


ManifestLike = (
    str | Path | bytes | Mapping[str, object] | Sequence[Mapping[str, object] | Target] | Manifest | LoadedManifest
)
"""The forms in which a function accepts a manifest.

They are a path to a manifest or a patch, a manifest's text as bytes, its fields as a dict, a list of its edits, a
Manifest, or a LoadedManifest.
"""


def load_manifest(manifest: ManifestLike, base: str | Path | None = None) -> LoadedManifest:
    """Read and validate a manifest, or convert a patch written by `swsurgery export` to a manifest.

    A list of edits needs `base`, a directory or hf://ORG/NAME[@REV], which becomes the manifest's base; other manifests
    name their base. Integers and floats of numpy are accepted in a dict and in a list of edits. A relative `base.path`
    is relative to the manifest's directory, or to the current directory if the manifest is not a file.

    Raises ManifestError with every fault, one line each: `file:line:column: path: fault`. Raises TypeError for a
    manifest of another type, and for a list of edits without a base.
    """
    if isinstance(manifest, LoadedManifest):
        return manifest
    if is_path(manifest):
        return _load_file(Path(manifest))
    if isinstance(manifest, bytes):
        return parse_manifest(manifest, IN_MEMORY)
    if isinstance(manifest, Manifest):
        return parse_manifest(_render_document(manifest), IN_MEMORY)
    if isinstance(manifest, Mapping):
        return parse_manifest(_render_document(dict(manifest)), IN_MEMORY)
    if isinstance(manifest, list | tuple) and all(isinstance(edit, Mapping | Target) for edit in manifest):
        if base is None:
            raise TypeError("a list of edits does not name its base, so base must be a str or a Path")
        document = {"version": 1, "base": _describe_base(base), "edits": list(manifest)}
        return parse_manifest(_render_document(document), IN_MEMORY)
    raise TypeError(
        "manifest must be a path (str or Path), a dict, a Manifest, a LoadedManifest, bytes or a list of edits, "
        f"not {manifest!r:.80}"
    )


IN_MEMORY = Path("manifest")
"""Name that messages use for a manifest that is not a file."""


def _render_document(document: object) -> bytes:
    """Render the content of a manifest as JSON, one field per line so that messages can name lines.

    Raises ManifestError if the document contains itself or is nested too deeply.
    """
    try:
        return json.dumps(document, indent=1, default=_convert_value).encode()
    except (ValueError, RecursionError):
        raise ManifestError("contains itself, or is nested too deeply", IN_MEMORY) from None


def _convert_value(value: object) -> object:
    """Convert a value that `json` cannot write: a numpy number, a path, a mapping or a pydantic model.

    Raises TypeError for a value of any other type.
    """
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True, by_alias=True)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a manifest must contain texts, numbers, lists and dicts, not {value!r:.80}")


def _describe_base(base: str | Path) -> dict[str, str]:
    """Return the field `base` of a manifest for a directory or `hf://ORG/NAME[@REV][/sub]`."""
    match = re.fullmatch(r"hf://([^/@]+(?:/[^/@]+)?)(?:@([^/]+))?(?:/.*)?", str(base))
    if match is None:
        return {"path": str(base)}
    revision = {"revision": match[2]} if match[2] and re.fullmatch("[0-9a-f]{40}", match[2]) else {}
    return {"repo_id": match[1], **revision}


def _load_file(path: Path) -> LoadedManifest:
    try:
        real = path.resolve(strict=True)  # the path may be a link, but its target must be a file
        raw = read_at_most(LocalFile(real), MAX_MANIFEST + 1)
    except SwsurgeryError as error:
        raise ManifestError.of(f.add_context("cannot read the manifest") for f in error.faults) from None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a link to itself; ValueError: a NUL character
        raise ManifestError(f"cannot read the manifest ({getattr(error, 'strerror', error)})", path) from None
    if len(raw) > MAX_MANIFEST:
        raise ManifestError(f"manifest is larger than {MAX_MANIFEST} bytes", path)
    if not _is_safetensors(raw):
        return parse_manifest(raw, path)
    from swsurgery.manifest import patch  # most manifests are text

    return parse_manifest(patch.render_manifest(raw, path), path)


def _is_safetensors(raw: bytes) -> bool:
    """Return True if the bytes begin a safetensors file.

    The length of its header contains zero bytes, which YAML and JSON do not allow.
    """
    return raw[4:9] == b"\0\0\0\0{"


def parse_manifest(raw: bytes, path: Path) -> LoadedManifest:
    """Parse and validate the bytes of a manifest; `path` appears only in messages.

    Raises ManifestError as `load_manifest` does.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        fault = Fault("not UTF-8", remedy="save the file as UTF-8", position=f"{path}:{line}:{column}")
        raise ManifestError.of([fault]) from None
    if text.startswith("version https://git-lfs"):
        raise ManifestError(f"{path}:1:1: is a git-lfs pointer, not the file itself", remedy="run git lfs pull")
    reader = Reader(text)
    faults = reader.faults
    if reader.complete:
        try:
            manifest = Manifest.model_validate(reader.value)
            if not faults:
                return LoadedManifest(path, raw, manifest, reader.positions)
        except ValidationError as error:
            faults += _list_schema_faults(error, reader)
    # A value that matches no member of a union gives the same line once per member.
    faults = sorted(set(faults))
    lines = [Fault.parse(what, f"{path}:{line}:{column}") for (line, column), what in faults[:MAX_FAULTS]]
    if len(faults) > MAX_FAULTS or reader.stopped:
        lines.append(Fault("and more of these", position=str(path)))
    raise ManifestError.of(lines)


def _list_schema_faults(error: ValidationError, reader: Reader) -> list[tuple[LineColumn, str]]:
    """Return the first MAX_FAULTS + 1 schema faults in file order.

    The caller prints MAX_FAULTS of them. One more shows that the list is incomplete. If there are more than
    MAX_MANIFEST_FAULTS faults, only their number is returned, as a single fault.
    """
    if error.error_count() > MAX_MANIFEST_FAULTS:
        return [((1, 1), f"{error.error_count()} faults, too many to list (is this a manifest?)")]
    if isinstance(reader.value, dict) and not {"version", "base", "edits"} & reader.value.keys():
        return [((1, 1), "this is not a manifest (a manifest has the fields version, base and edits)")]
    items = [(*_locate(item, reader), item) for item in error.errors(include_url=False, include_input=False)]
    items.sort(key=lambda found: found[0])
    found: dict[tuple[LineColumn, str], None] = {}
    for position, path, value, item in items:
        if len(found) > MAX_FAULTS:
            break
        found[position, f"{format_path(path)}{_describe(item, path, value)}"] = None
    return list(found)


def _locate(item: ErrorDetails, reader: Reader) -> tuple[LineColumn, NodePath, Any]:
    """Find the position of a pydantic error, the path of its node in the manifest, and the node's value."""
    path: list[str | int] = []
    value = reader.value
    for depth, part in enumerate(item["loc"]):
        # pydantic inserts the op of an edit behind its number, and tags of unions; the data has no such nodes
        if depth == 2 and path[0] == "edits":
            continue
        if isinstance(value, dict):
            exists = part in value
        else:
            exists = isinstance(value, list) and isinstance(part, int) and path[-1] not in _WHOLE
        if exists:
            path.append(part)
            value = value[part]
    position = reader.positions.get((*path, "first")) if item["type"] == "extra_forbidden" else None
    node = tuple(path)
    while position is None:
        position, node = reader.positions.get(node), node[:-1]
    return position, tuple(path), value


def _describe(item: ErrorDetails, path: NodePath, value: Any) -> str:
    """Describe one pydantic error in words, with the remedy."""
    kind, context = item["type"], item.get("ctx", {})
    leaf = item["loc"][-1] if item["loc"] else ""
    if kind == "missing" and isinstance(leaf, str):
        return f"{leaf} is missing"
    if kind == "extra_forbidden":
        # A field of another operation or target is spelled correctly, so a suggestion would be wrong.
        near = difflib.get_close_matches(str(leaf)[:40], _FIELDS, 1) if leaf not in _FIELDS else []
        return "unknown field" + (f" (did you mean {near[0]}?)" if near else "")
    if kind == "union_tag_invalid":
        return f"unknown op {_shorten(context['tag'])} (one of {context['expected_tags']})"
    if kind == "union_tag_not_found":
        return "op is missing" if isinstance(value, dict) else f"is {_shorten(value)}, not an edit"
    if kind == "value_error":
        return str(context["error"])
    field = next((p for p in reversed(path) if isinstance(p, str)), "")
    op = item["loc"][2] if path[:1] == ("edits",) and len(item["loc"]) > 2 else ""
    names = (f"{op}.{field}", field, kind)
    expected = next((_EXPECTED[n] for n in names if n in _EXPECTED), f"{item['msg'][0].lower()}{item['msg'][1:]}")
    return f"{expected}, not {_shorten(value)}"


_WHOLE = ("bit", "block")
"""Fields that are a number or a list of numbers. A fault in an item is a fault of the field."""

_EXPECTED = {
    "expect": "should be a number, bits such as 0x40bc, or {value: ..., dtype: ...}",
    "value": "should be a finite number",
    "set.bits": "should be hex bits of the dtype's width, such as 0x40bc",
    "revision": "should be the commit's 40 hex digits, in quotes",
    "index": "should be a list of whole numbers from 0, such as [3968, 7003]",
    "expert": "should be a whole number from 0, or shared",
    "slice": 'should be indices and ranges in quotes, such as "3, 10:20", without a step',
    "flip.bit": "should be the number of a bit from 0 to 63, or a list of such numbers",
    "clip.z": "should be a number above 0",
    "round.z": "should be a number above 0",
    "clip.iqr": "should be a number from 0",
    "round.iqr": "should be a number from 0",
    "fraction": "should be a number above 0 and below 1",
    "count": "should be a whole number from 1",
    "round.bits": "should be a whole number from 2 to 8",
    "round.clip": "should be a rule such as {z: 5}",
    "per": "should be tensor or channel",
    "block": "should be a whole number from 1, or two of them for rows and columns",
    "levels": "should be integer or nf4",
    "sha256": "should map names of shards to 64 hex digits",
    "int_type": "should be a whole number",
    "float_type": "should be a number",
    "finite_number": "should be a finite number",
    "string_type": "should be text",
    "string_too_short": "should not be empty",
    "bool_type": "should be true or false",
    "list_type": "should be a list",
    "dict_type": "should be a map",
    "model_type": "should be a map",
    "model_attributes_type": "should be a map",
    "greater_than_equal": "should not be negative",
    "literal_error": "is not one of the values that this field accepts",
    "too_short": "should not be empty",
}
"""What a field should contain, by the field's name or else by pydantic's error type. `, not VALUE` is appended."""


def _shorten(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


_MODELS: tuple[type[BaseModel], ...] = (Manifest, Base, Bounds, *OPERATIONS)

_FIELDS = sorted({field.alias or name for model in _MODELS for name, field in model.model_fields.items()})
"""Every field of a manifest, for suggestions."""
