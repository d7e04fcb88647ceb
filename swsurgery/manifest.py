"""The manifest: what the user asks for, as strict YAML 1.2 or JSON, with every fault at its line and column.

Values follow the grammar of JSON (numbers, true, false, null, strings). Refused: duplicate keys, anchors,
aliases, tags, several documents, unknown fields and coerced types. Knows no checkpoint.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml import events as yaml_events
from ruamel.yaml.error import YAMLError

from swsurgery.edits import Edit, Strict
from swsurgery.errors import ManifestError

MAX_BYTES = 8 << 20
MAX_DEPTH = 16
FILE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,250}$"

Ratio = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Base(Strict):
    """The checkpoint to edit: a repository at a revision, or a directory."""

    repo_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?$")] | None = None
    revision: (
        Annotated[str, Field(pattern=r"^[0-9a-f]{40}$", description="the commit: 40 hex digits, quoted")] | None
    ) = None
    path: Annotated[str, Field(min_length=1, description="a directory, relative to the manifest")] | None = None
    model: Annotated[str, Field(description="which known model it is, where repo_id does not say")] | None = None
    sha256: Annotated[
        dict[Annotated[str, Field(pattern=FILE_NAME)], Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]],
        Field(description="digests of shards: another base is refused"),
    ] = {}
    weights: Annotated[
        Literal["index", "single"] | None,
        Field(description="which weights to edit where both an index and a single file are there"),
    ] = None
    copies: Annotated[
        Literal["omit", "keep"] | None,
        Field(description="further copies of the weights: leave them out, or carry them along unedited"),
    ] = None

    @model_validator(mode="after")
    def _one_place(self) -> Base:
        if (self.repo_id is None) == (self.path is None):
            raise ValueError("needs repo_id or path, one of them")
        if self.revision is not None and self.repo_id is None:
            raise ValueError("has a revision without a repo_id")
        return self


class Bounds(Strict):
    """What the sanity check has to hold."""

    max_perplexity_ratio: Ratio | None = None
    min_perplexity_ratio: Ratio | None = None


def _whole_number(value: Any) -> Any:
    """A literal compares by ==, so true and 1.0 would pass for 1 even in strict mode."""
    if type(value) is not int:
        raise ValueError("should be a whole number")
    return value


class Manifest(Strict):
    """What to do to which scalars of which base."""

    version: Annotated[Literal[1], BeforeValidator(_whole_number)]
    name: Annotated[str, Field(pattern=FILE_NAME)] | None = None
    description: str | None = None
    base: Base
    edits: Annotated[list[Edit], Field(min_length=1)]
    check: Bounds = Bounds()


@dataclass(frozen=True)
class LoadedManifest:
    """A manifest with the text it came from. `where(i)` places edit number i."""

    path: Path
    raw: bytes
    manifest: Manifest
    positions: dict[tuple, tuple[int, int]]

    def where(self, edit: int) -> str:
        line, column = self.positions[("edits", edit)]
        return f"{self.path}:{line}:{column}: edits[{edit}]"


def load_manifest(path: Path) -> LoadedManifest:
    """Read and check a manifest. Raises ManifestError with every fault as `file:line:column: path: what`."""
    try:
        raw = path.read_bytes() if path.stat().st_size <= MAX_BYTES else None
    except OSError as error:
        raise ManifestError(f"cannot read the manifest ({error.strerror})", path) from None
    if raw is None:
        raise ManifestError(f"manifest is larger than {MAX_BYTES} bytes", path)
    return parse_manifest(raw, path)


def parse_manifest(raw: bytes, path: Path) -> LoadedManifest:
    """As load_manifest, from bytes; `path` is only named in messages."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise ManifestError.of([f"{path}:{line}:{column}: not UTF-8 (save the file as UTF-8)"]) from None
    reader = _Reader(text)
    faults = reader.faults
    if reader.complete:
        try:
            manifest = Manifest.model_validate(reader.value)
            if not faults:
                return LoadedManifest(path, raw, manifest, reader.positions)
        except ValidationError as error:
            faults += [_fault(item, reader) for item in error.errors(include_url=False)]
    # A set, because each member of a union that a value fails to match gives the same line.
    raise ManifestError.of(f"{path}:{line}:{column}: {what}" for (line, column), what in sorted(set(faults)))


def schema() -> dict[str, Any]:
    """The manifest's JSON Schema (draft 2020-12)."""
    generated = Manifest.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **generated,
        "title": "swsurgery manifest",
    }


class _Reader:
    """YAML events -> plain values, and the line and column (from 1) of every node by its path.

    PyYAML and ruamel's constructors would resolve anchors, tags and loose scalars; building from the
    events leaves nothing that could be resolved, and no bomb that could go off.
    """

    def __init__(self, text: str):
        self.value: Any = None
        self.positions: dict[tuple, tuple[int, int]] = {(): (1, 1)}
        self.faults: list[tuple[tuple[int, int], str]] = []
        self.complete = False
        try:
            self._events = YAML(typ="safe", pure=True).parse(text)
            self.complete = self._read_document()
        except YAMLError as error:
            mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
            if mark:
                place = mark.line + 1, mark.column + 1
            else:  # a character that YAML does not allow: only its position is given
                before = text[: getattr(error, "position", 0)]
                place = before.count("\n") + 1, len(before) - before.rfind("\n")
            problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
            self.faults.append((place, f"not YAML: {problem}"))

    def _read_document(self) -> bool:
        """True where there was one whole document."""
        documents = 0
        for event in self._events:
            if isinstance(event, yaml_events.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self.faults.append((_place(event), "a second document begins here (a manifest is one document)"))
                    return False
                self.value = self._read(next(self._events), ())
        if not documents:
            self.faults.append(((1, 1), "the manifest is empty"))
        return documents == 1

    def _read(self, event: Any, path: tuple) -> Any:
        self.positions[path] = _place(event)
        if isinstance(event, yaml_events.AliasEvent):
            self.faults.append((_place(event), f"{_dotted(path)}alias *{event.anchor} (write the value out)"))
            return None
        if event.anchor is not None:
            self.faults.append((_place(event), f"{_dotted(path)}anchor &{event.anchor} (write the value out)"))
        if event.tag is not None and not (isinstance(event, yaml_events.ScalarEvent) and event.tag == "!"):
            self.faults.append((_place(event), f"{_dotted(path)}tag {event.tag} (leave it out)"))
        if isinstance(event, yaml_events.ScalarEvent):
            return self._scalar(event, path)
        if len(path) >= MAX_DEPTH:
            raise _TooDeep(_place(event))
        if isinstance(event, yaml_events.SequenceStartEvent):
            items: list[Any] = []
            while not isinstance(item := next(self._events), yaml_events.SequenceEndEvent):
                items.append(self._read(item, (*path, len(items))))
            return items
        return self._mapping(path)

    def _mapping(self, path: tuple) -> dict[str, Any]:
        result: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml_events.MappingEndEvent):
            place = _place(event)
            if not isinstance(event, yaml_events.ScalarEvent):
                self.faults.append((place, f"{_dotted(path)}a key that is not a plain word"))
                self._read(event, (*path, "?"))
                self._read(next(self._events), (*path, "?"))
                continue
            key = event.value
            if key == "<<":
                self.faults.append((place, f"{_dotted(path)}merge key << (write the fields out)"))
            value = self._read(next(self._events), (*path, key))
            if key in result:
                first = self.positions[(*path, key, "first")][0]
                self.faults.append((place, f"{_dotted((*path, key))}stands twice (first in line {first})"))
            else:
                self.positions[(*path, key, "first")] = place
                result[key] = value
        return result

    def _scalar(self, event: Any, path: tuple) -> Any:
        text = event.value
        if not event.implicit[0]:  # quoted, or a block of text
            try:
                return text.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                self.faults.append((_place(event), f"{_dotted(path)}half a surrogate pair"))
                return text
        if text in ("", "~", "null"):
            return None
        if text in ("true", "false"):
            return text == "true"
        if re.fullmatch(r"-?(0|[1-9][0-9]*)", text) and len(text) <= 40:
            return int(text)
        if re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?", text):
            return float(text)
        return text


class _TooDeep(YAMLError):
    def __init__(self, place: tuple[int, int]):
        self.problem = f"nested deeper than {MAX_DEPTH}"
        self.problem_mark = _Mark(place[0] - 1, place[1] - 1)


@dataclass(frozen=True)
class _Mark:
    line: int
    column: int


def _place(event: Any) -> tuple[int, int]:
    return event.start_mark.line + 1, event.start_mark.column + 1


def _dotted(path: tuple) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return f"{text}: " if text else ""


def _fault(item: Any, reader: _Reader) -> tuple[tuple[int, int], str]:
    """One pydantic error as ((line, column), 'path: what (remedy)')."""
    path, value = [], reader.value
    for part in item["loc"]:
        # pydantic puts the discriminator's and the union's tags into its paths; they are not in the data
        if isinstance(value, dict) and part in value or isinstance(value, list) and isinstance(part, int):
            path.append(part)
            value = value[part]
    kind, context = item["type"], item.get("ctx", {})
    leaf = item["loc"][-1] if item["loc"] else ""
    if kind == "missing":
        what = f"{leaf} is missing"
    elif kind == "extra_forbidden":
        # A field of another operation or place is spelled rightly: nothing to suggest.
        near = difflib.get_close_matches(str(leaf), _FIELDS, 1) if leaf not in _FIELDS else []
        what = "unknown field" + (f" (did you mean {near[0]}?)" if near else "")
    elif kind == "union_tag_invalid":
        what = f"unknown op {_short(context['tag'])} (one of {context['expected_tags']})"
    elif kind == "union_tag_not_found":
        what = "op is missing" if isinstance(value, dict) else f"is {_short(value)}, not an edit"
    elif kind == "value_error":
        what = str(context["error"])
    else:
        field = next((p for p in reversed(path) if isinstance(p, str)), "")
        expected = _EXPECTED.get(field) or _EXPECTED.get(kind) or f"{item['msg'][0].lower()}{item['msg'][1:]}"
        what = f"{expected}, not {_short(value)}"
    position = reader.positions.get((*path, "first")) if kind == "extra_forbidden" else None
    return position or reader.positions[tuple(path)], f"{_dotted(tuple(path))}{what}"


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
