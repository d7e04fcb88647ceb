"""Hold what belongs together."""

from __future__ import annotations

import json
import re
import sys
from typing import Any, NoReturn

import yaml

from swsurgery.manifest.schema import MAX_EDITS
from swsurgery.storage.dtypes import Written

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
