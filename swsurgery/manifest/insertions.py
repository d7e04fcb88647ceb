"""Insert fields into the text of a manifest, and keep its comments and its layout.

Must not depend on checkpoints; callers pass plain values.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import yaml

from swsurgery.manifest.yaml_reader import NodePath

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

FieldValue = str | float | Mapping[str, str]
"""A value that can be inserted: text, a number, or a map of texts."""


@dataclass(frozen=True)
class Insertion:
    """A field to add to the mapping at `path`, such as `expect` in ("edits", 0)."""

    path: NodePath
    key: str
    value: FieldValue


class CannotInsert(Exception):
    """Raised if the layout of a manifest leaves no place for a field."""


def add_fields(text: str, insertions: Iterable[Insertion]) -> str:
    """Return the text of a valid YAML or JSON manifest with fields added. Raises CannotInsert."""
    starts = _list_line_starts(text)
    try:
        root = yaml.compose(text, Loader=_LOADER)
    except yaml.YAMLError:  # JSON with halves of a surrogate pair, which the manifest's reader joins
        raise CannotInsert from None
    pieces = [_locate_insertion(text, starts, _find(root, one.path), one) for one in insertions]
    parts, done = [], 0
    for at, piece in sorted(pieces, key=lambda pair: pair[0]):
        parts += [text[done:at], piece]
        done = at
    return "".join([*parts, text[done:]])


def _list_line_starts(text: str) -> list[int]:
    """Return the offset of the beginning of each line."""
    starts, at = [0], 0
    for line in text.splitlines(keepends=True):
        at += len(line)
        starts.append(at)
    return starts


def _find(root: yaml.Node | None, path: NodePath) -> yaml.MappingNode:
    """Return the mapping at a path. Raises CannotInsert if there is none."""
    node = root
    for part in path:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
        elif isinstance(node, yaml.MappingNode):
            node = next((value for key, value in node.value if key.value == part), None)
    if not isinstance(node, yaml.MappingNode) or not node.value:
        raise CannotInsert
    return node


def _locate_insertion(text: str, starts: list[int], node: yaml.MappingNode, one: Insertion) -> tuple[int, str]:
    """Return the offset at which a field is inserted into a mapping, and the text to insert."""
    quoted = node.value[0][0].style == '"'
    key = json.dumps(one.key) if quoted else one.key
    if node.flow_style:
        last = node.value[-1][1].end_mark
        return starts[last.line] + last.column, f", {key}: {_render_flow(one.value, quoted)}"
    indent = " " * node.value[0][0].start_mark.column
    for _, value in reversed(node.value):  # the last field that ends on the line on which it begins
        begin, end = value.start_mark, value.end_mark
        if begin.line == end.line and (isinstance(value, yaml.ScalarNode) or value.flow_style):
            line_end = len(text[: starts[end.line + 1]].rstrip("\r\n"))
            newline = "\r\n" if "\r\n" in text else "\n"
            return line_end, "".join(f"{newline}{indent}{line}" for line in _render_block(key, one.value))
    raise CannotInsert


def _render_flow(value: FieldValue, quoted: bool) -> str:
    if isinstance(value, Mapping):
        items = (f"{json.dumps(k) if quoted else k}: {json.dumps(v)}" for k, v in value.items())
        return "{" + ", ".join(items) + "}"
    return json.dumps(value)


def _render_block(key: str, value: FieldValue) -> list[str]:
    if isinstance(value, Mapping):
        return [f"{key}:", *(f"  {name}: {json.dumps(text)}" for name, text in value.items())]
    return [f"{key}: {json.dumps(value)}"]
