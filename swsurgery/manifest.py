"""The manifest: what the user asks for, as strict YAML 1.2 or JSON, with every fault at its line and column.

Values follow the grammar of JSON (numbers, true, false, null, strings). Refused: duplicate keys, anchors,
aliases, tags, several documents, unknown fields and coerced types. Knows no checkpoint.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import yaml
from pydantic import Field, ValidationError, model_validator

from swsurgery import patches
from swsurgery.dtypes import Written
from swsurgery.edits import Edit, Strict, Version
from swsurgery.errors import ManifestError, ShardError
from swsurgery.names import VARIANT
from swsurgery.shard import opened, read_at_most

MAX_BYTES = 32 << 20
MAX_EDITS = 150_000
"""An edit of 100,000 scalars must work. The largest published set of weights removed at once has 7,000."""
MAX_NODES = 100_000
"""Keys and values outside the edits."""
MAX_NODES_OF_EDIT = 100
"""Keys and values of one edit; 11 or so are usual."""
MAX_PLACED = 100_000
"""Nodes inside edits whose position is kept. A fault in a later edit points at the beginning of the edit."""
MAX_DEPTH = 16
MAX_DIGITS = 400
"""Of a number: 17 tell every binary64 from its neighbours."""
MAX_FAULTS = 100
"""Listed one by one."""
MAX_COUNTED = 50_000
"""Faults of the schema that are looked at to find the first MAX_FAULTS."""
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
    variant: Annotated[
        str | None,
        Field(pattern=f"^{VARIANT}$", description="which variant of the weights to edit, such as fp16"),
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


class Manifest(Strict):
    """What to do to which scalars of which base."""

    version: Version
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
    return parse_manifest(patches.manifest_text(raw, path) if patches.looks_like(raw) else raw, path)


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

    A loader's constructors would resolve anchors, tags and loose scalars; building from the events leaves
    nothing that could be resolved, and no bomb that could go off. Reading stops at the limits above.
    """

    def __init__(self, text: str):
        self.value: Any = None
        self.positions: dict[tuple, tuple[int, int]] = {(): (1, 1)}
        self.faults: list[tuple[tuple[int, int], str]] = []
        self.complete = self.stopped = False
        self._nodes = self._nodes_of_edit = self._nodes_of_edits = 0
        if odd := _ODD_CHARACTER.search(text):
            start = odd.start()
            place = text.count("\n", 0, start) + 1, start - text.rfind("\n", 0, start)
            what = f"not YAML: the character U+{ord(odd[0]):04X} has no place in YAML"
            self.faults.append((place, f"{what} (write it as an escape, in double quotes)"))
            return
        self._events = iter(_LOADER(_whole_escapes(text)).get_event, None)
        try:
            self.complete = self._read_document()
        except _Stop:
            self.stopped = len(self.faults) > 1
        except yaml.MarkedYAMLError as error:
            problem = error.problem
            if "Unicode character escape" in problem:
                problem = "half a surrogate pair, or no character (write the character itself)"
            self.faults.append((_marked(error.problem_mark or error.context_mark), f"not YAML: {problem}"))

    def _read_document(self) -> bool:
        """True where there was one whole document."""
        documents = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self.faults.append((_place(event), "a second document begins here (a manifest is one document)"))
                    return False
                self.value = self._read(next(self._events), ())
        if not documents:
            self.faults.append(((1, 1), "the manifest is empty"))
        return documents == 1

    def _fault(self, event: Any, path: tuple, what: str) -> None:
        self.faults.append((_place(event), f"{_dotted(path)}{what}"))
        if len(self.faults) >= MAX_FAULTS:
            raise _Stop

    def _refuse(self, event: Any, what: str) -> NoReturn:
        self.faults.append((_place(event), what))
        raise _Stop

    def _count(self, event: Any, path: tuple) -> bool:
        """Count a key or value at or below `path`. True if its position is kept. Raises _Stop beyond a limit."""
        if len(path) < 2 or path[0] != "edits" or not isinstance(path[1], int):
            self._nodes += 1
            if self._nodes > MAX_NODES:
                self._refuse(event, f"more than {MAX_NODES} keys and values")
            return True
        if len(path) == 2:
            self._nodes_of_edit = 0
            if path[1] == MAX_EDITS:
                self._refuse(event, f"more than {MAX_EDITS} edits")
        self._nodes_of_edit += 1
        self._nodes_of_edits += 1
        if self._nodes_of_edit > MAX_NODES_OF_EDIT:
            self._refuse(event, f"more than {MAX_NODES_OF_EDIT} keys and values in one edit")
        return len(path) == 2 or self._nodes_of_edits <= MAX_PLACED

    def _read(self, event: Any, path: tuple) -> Any:
        if self._count(event, path):
            self.positions[path] = _place(event)
        if isinstance(event, yaml.AliasEvent):
            self._fault(event, path, f"alias *{_cut(event.anchor)} (write the value out)")
            return None
        if event.anchor is not None:
            self._fault(event, path, f"anchor &{_cut(event.anchor)} (write the value out)")
        if event.tag is not None:
            self._fault(event, path, f"tag {_cut(event.tag)} (leave it out)")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, path)
        if len(path) >= MAX_DEPTH:
            self._refuse(event, f"not YAML: nested deeper than {MAX_DEPTH}")
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Any] = []
            while not isinstance(item := next(self._events), yaml.SequenceEndEvent):
                items.append(self._read(item, (*path, len(items))))
            return items
        return self._mapping(path)

    def _mapping(self, path: tuple) -> dict[str, Any]:
        result: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                self._fault(event, path, "a key that is not a plain word")
                self._read(event, (*path, "?"))
                self._read(next(self._events), (*path, "?"))
                continue
            key = sys.intern(event.value)
            placed = self._count(event, (*path, key))
            if event.anchor is not None or event.tag is not None:
                self._fault(event, path, "a key with an anchor or a tag (leave it out)")
            if key == "<<":
                self._fault(event, path, "merge key << (write the fields out)")
            value = self._read(next(self._events), (*path, key))
            if key in result:
                self._fault(event, (*path, key), f"stands twice (first in line {lines[key]})")
            else:
                lines[key] = _place(event)[0]
                if placed:
                    self.positions[(*path, key, "first")] = _place(event)
                result[key] = value
        return result

    def _scalar(self, event: Any, path: tuple) -> Any:
        text = event.value
        if not event.implicit[0]:  # quoted, or a block of text
            return sys.intern(text) if len(text) < 200 else text
        if len(text) > MAX_DIGITS:
            if _NUMBER_LIKE.fullmatch(text):
                self._fault(event, path, f"a number of more than {MAX_DIGITS} digits")
            return text
        if text in ("", "~", "null"):
            return None
        if text in ("true", "false"):
            return text == "true"
        if re.fullmatch(r"-?(0|[1-9][0-9]*)", text) and len(text) <= 40:
            return int(text)
        if re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?", text):
            return Written(text)
        return sys.intern(text)


class _Stop(Exception):
    """Enough faults, or a limit reached: the reader has noted which."""


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Only its events are used. libyaml, which PyYAML's wheels bring, gives them 25 times faster than Python does."""

_NUMBER_LIKE = re.compile(r"-?[0-9][0-9.eE+-]*")

_ODD_CHARACTER = re.compile("[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What YAML does not allow, and three line breaks that version 1.1 ended lines at and version 1.2 does not."""


_PAIR = re.compile(r"(?<!\\)((?:\\\\)*)\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})", re.IGNORECASE)


def _whole_escapes(text: str) -> str:
    """JSON spells a character beyond U+FFFF as two escapes, YAML as one: those of a JSON file are made one.

    Columns behind such a character in its line come out two too small.
    """
    most = MAX_NODES + 20 * MAX_EDITS
    if not _PAIR.search(text) or text.count(",") > most or text.count("\\u") > MAX_NODES:
        return text
    try:
        json.loads(text)  # in YAML's other strings, a backslash is a backslash
    except (ValueError, RecursionError):
        return text

    def whole(match: re.Match[str]) -> str:
        high, low = int(match[2], 16), int(match[3], 16)
        return f"{match[1]}\\U{0x10000 + ((high & 0x3FF) << 10) + (low & 0x3FF):08x}"

    return _PAIR.sub(whole, text)


def _place(event: Any) -> tuple[int, int]:
    return _marked(event.start_mark)


def _marked(mark: Any) -> tuple[int, int]:
    return mark.line + 1, mark.column + 1


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _dotted(path: tuple) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{_cut(part)}" if text else _cut(part)
    return f"{text}: " if text else ""


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
