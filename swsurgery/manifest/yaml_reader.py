"""Read strict YAML 1.2 or JSON into plain values, with the line and column of every node.

Must not depend on the schema beyond the maximum number of edits.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import yaml

from swsurgery.manifest.schema import MAX_EDITS
from swsurgery.storage.numbers import JSON_NUMBER, Written

MAX_NODES = 100_000
"""Maximum number of keys and values outside the edits."""

MAX_NODES_OF_EDIT = 100
"""Maximum number of keys and values in one edit. Most edits have about 11."""

MAX_PLACED = 100_000
"""Maximum number of keys and values inside edits whose positions are stored. Later ones get their edit's position."""

MAX_DEPTH = 16
"""Maximum nesting depth."""

MAX_DIGITS = 400
"""Maximum length of a number, in characters. 17 digits identify any float64."""

MAX_FAULTS = 100
"""Maximum number of faults listed individually."""

NodePath = tuple[str | int, ...]
"""Keys and list indices from the document's root to a node."""

LineColumn = tuple[int, int]
"""Line and column, both counted from 1."""


class Reader:
    """Reads a document into plain values (`value`), with the position of each node and a list of faults.

    The values are built from the parser's events. A YAML loader would resolve anchors and tags, with which a small file
    can expand without limit, and would convert words such as `no`. Reading stops at the limits above.
    """

    def __init__(self, text: str):
        self.value: Any = None
        self.positions: dict[NodePath, LineColumn] = {(): (1, 1)}
        self.faults: list[tuple[LineColumn, str]] = []
        self.complete = self.stopped = False
        self._nodes = self._nodes_of_edit = self._nodes_of_edits = 0
        if odd := _ODD_CHARACTER.search(text):
            start = odd.start()
            place = text.count("\n", 0, start) + 1, start - text.rfind("\n", 0, start)
            what = f"not YAML: the character U+{ord(odd[0]):04X} is not allowed"
            self.faults.append((place, f"{what} (write it as an escape, in double quotes)"))
            return
        self._events: Iterator[Any] = iter(_LOADER(_join_surrogates(text)).get_event, None)
        try:
            self.complete = self._read_document()
        except _Stop:
            self.stopped = len(self.faults) > 1
        except yaml.MarkedYAMLError as error:
            problem = error.problem or ""
            if "Unicode character escape" in problem:
                problem = "half a surrogate pair, or no character (write the character itself)"
            mark = error.problem_mark
            if mark and "any token" in problem and text[mark.index : mark.index + 1] == "\t":
                problem = "a line is indented with a tab (indent with spaces)"
            self.faults.append((_get_line_column(error.problem_mark or error.context_mark), f"not YAML: {problem}"))

    def _read_document(self) -> bool:
        """Read the document. Returns False if the text contains no document or more than one document."""
        documents = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self.faults.append((_start(event), "a second document begins here (a manifest is one document)"))
                    return False
                self.value = self._read(next(self._events), ())
        if not documents:
            self.faults.append(((1, 1), "the manifest is empty"))
        return documents == 1

    def _fault(self, event: yaml.Event, path: NodePath, what: str) -> None:
        self.faults.append((_start(event), f"{format_path(path)}{what}"))
        if len(self.faults) >= MAX_FAULTS:
            raise _Stop

    def _refuse(self, event: yaml.Event, what: str) -> NoReturn:
        self.faults.append((_start(event), what))
        raise _Stop

    def _count(self, event: yaml.Event, path: NodePath) -> bool:
        """Count a key or value. Returns True if its position should be stored. Raises _Stop if a limit is exceeded."""
        if len(path) < 2 or path[0] != "edits" or not isinstance(path[1], int):
            self._nodes += 1
            if self._nodes > MAX_NODES:
                self._refuse(event, f"the manifest has more than {MAX_NODES} keys and values outside the edits")
            return True
        if len(path) == 2:
            self._nodes_of_edit = 0
            if path[1] == MAX_EDITS:
                self._refuse(event, f"the manifest has more than {MAX_EDITS} edits")
        self._nodes_of_edit += 1
        self._nodes_of_edits += 1
        if self._nodes_of_edit > MAX_NODES_OF_EDIT:
            self._refuse(event, f"the edit has more than {MAX_NODES_OF_EDIT} keys and values")
        return len(path) == 2 or self._nodes_of_edits <= MAX_PLACED

    def _read(self, event: Any, path: NodePath) -> Any:
        if self._count(event, path):
            self.positions[path] = _start(event)
        if isinstance(event, yaml.AliasEvent):
            self._fault(event, path, f"the alias *{_cut(event.anchor or '')} is not accepted (write the value out)")
            return None
        if event.anchor is not None:
            self._fault(event, path, f"the anchor &{_cut(event.anchor)} is not accepted (write the value out)")
        if event.tag is not None:
            self._fault(event, path, f"the tag {_cut(event.tag)} is not accepted (leave it out)")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, path)
        if len(path) >= MAX_DEPTH:
            self._refuse(event, f"not YAML: nested deeper than {MAX_DEPTH}")
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Any] = []
            while not isinstance(item := next(self._events), yaml.SequenceEndEvent):
                items.append(self._read(item, (*path, len(items))))
            return items
        return self._read_mapping(path)

    def _read_mapping(self, path: NodePath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                self._fault(event, path, "the key is not a plain word")
                self._read(event, (*path, "?"))
                self._read(next(self._events), (*path, "?"))
                continue
            key = sys.intern(event.value)
            placed = self._count(event, (*path, key))
            if event.anchor is not None or event.tag is not None:
                self._fault(event, path, "the key has an anchor or a tag (leave it out)")
            if key == "<<":
                self._fault(event, path, "the merge key << is not accepted (write the fields out)")
            value = self._read(next(self._events), (*path, key))
            if key in result:
                self._fault(event, (*path, key), f"this key is repeated (first in line {lines[key]})")
            else:
                lines[key] = _start(event)[0]
                if placed:
                    self.positions[(*path, key, "first")] = _start(event)
                result[key] = value
        return result

    def _scalar(self, event: yaml.ScalarEvent, path: NodePath) -> str | int | float | bool | None:
        text: str = event.value
        if not event.implicit[0]:  # quoted, or a block of text
            return sys.intern(text) if len(text) < 200 else text
        if len(text) > MAX_DIGITS:
            if _NUMBER_LIKE.fullmatch(text):
                self._fault(event, path, f"the number has more than {MAX_DIGITS} characters")
            return text
        if text in ("", "~", "null"):
            return None
        if text in ("true", "false"):
            return text == "true"
        if re.fullmatch(r"-?(0|[1-9][0-9]*)", text) and len(text) <= 40:
            return int(text)
        if re.fullmatch(JSON_NUMBER, text):
            return Written(text)
        return sys.intern(text)


class _Stop(Exception):
    """Stops the reader after a limit is exceeded or MAX_FAULTS faults are found. The last fault gives the reason."""


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Loader, used only for its events. PyYAML's wheels include libyaml, 25 times faster than the Python parser."""

_NUMBER_LIKE = re.compile(r"-?[0-9][0-9.eE+-]*")

_ODD_CHARACTER = re.compile("[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that YAML forbids, and three more: U+0085, U+2028 and U+2029 end a line in YAML 1.1 but not in 1.2."""

_PAIR = re.compile(r"(?<!\\)((?:\\\\)*)\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})", re.IGNORECASE)
"""Two JSON escapes that form a surrogate pair."""


def _join_surrogates(text: str) -> str:
    """Replace the two escapes that JSON uses for a character above U+FFFF by YAML's single escape.

    Each replacement makes the columns of later faults on its line too small by two.
    """
    most = MAX_NODES + 20 * MAX_EDITS
    if not _PAIR.search(text) or text.count(",") > most or text.count("\\u") > MAX_NODES:
        return text
    try:
        json.loads(text)  # only JSON: in a plain or single-quoted YAML string, a backslash is literal
    except (ValueError, RecursionError):
        return text

    def join(match: re.Match[str]) -> str:
        high, low = int(match[2], 16), int(match[3], 16)
        return f"{match[1]}\\U{0x10000 + ((high & 0x3FF) << 10) + (low & 0x3FF):08x}"

    return _PAIR.sub(join, text)


def _start(event: yaml.Event) -> LineColumn:
    return _get_line_column(event.start_mark)


def _get_line_column(mark: Any) -> LineColumn:
    return mark.line + 1, mark.column + 1


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def format_path(path: NodePath) -> str:
    """Format the path of a node as the beginning of a message, such as `edits[0].layer: `; "" for the root."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{_cut(part)}" if text else _cut(part)
    return f"{text}: " if text else ""
