"""JSON and YAML documents as trees, mutated by structure and misspelled at the leaves; then damaged as bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random
from typing import Any


class Raw(str):
    """A leaf, exactly as it is spelled in the file."""

    __slots__ = ()


class Object(list):
    """A map as [key, value] lists, so that a key can stand twice."""

    __slots__ = ()


Node = Raw | Object | list

NUMBERS = tuple(
    Raw(text)
    for text in (
        "0", "1", "2", "4", "8", "-0", "-1", "0.0", "4.0", "4e0", "4E+0", "00", "01", "+1", "1.", ".5", "0x4", "1_0",
        "9223372036854775807", "9223372036854775808", "18446744073709551615", "18446744073709551616", "1e400", "-1e400",
        "1" * 30, "1" * 4301, "NaN", "Infinity", "-Infinity", "-", "1:30", "010",
    )
)  # fmt: skip
WORDS = tuple(
    Raw(text)
    for text in (
        "true", "false", "null", "True", "nul", "no", "~", '"4"', '""', "''", '"\\ud800"', '"\\ud83d\\ude00"',
        '"\\u0000"',
        '"\\x41"', '"\n"', '"\t"', '"\x1b[2J"', '"../../x"', '"a\u202eb"', '"', "'a'", "//", "/* */", "", "[", "]", "{",
        "}", ",", ":", "[]", "{}", "[[]]", '{"":{}}', "[1,]", "{,}", "\ufeff", "\x00", "#", "|", ">", "&a", "*a",
        "!!str",
        "!", "? a", "- a", "%YAML 1.1", "---", "...", "<<",
    )
)  # fmt: skip
SCALARS = NUMBERS + WORDS
KEYS = tuple(
    Raw(text) for text in ('"a"', '"\\u0061"', '""', '"__metadata__"', '"\\ud800"', '"\\u0000"', "a", "1", "<<", "null")
)


def pick(random: Random, choices: Sequence[Any]) -> Any:
    """As random.choice, in half the time."""
    return choices[int(random.random() * len(choices))]


def tree(value: Any) -> Node:
    """A Python value as a tree."""
    if type(value) is dict:
        return Object([Raw(json.dumps(key)), tree(item)] for key, item in value.items())
    if type(value) is list:
        return [tree(item) for item in value]
    return Raw(json.dumps(value))


def spell(node: Node) -> str:
    """The tree as JSON."""
    kind = type(node)
    if kind is Raw:
        return node
    if kind is Object:
        return "{" + ",".join([key + ":" + spell(value) for key, value in node]) + "}"
    return "[" + ",".join([spell(item) for item in node]) + "]"


def spell_yaml(random: Random, node: Node, indent: int = 0, odd: float = 0.01) -> str:
    """The tree as YAML, in blocks or in one line, with an anchor, alias, tag or comment at `odd` of its nodes."""
    decoration = pick(random, ("&a ", "*a", "!!str ", "!x ", "! ", "# ", "| ")) if random.random() < odd else ""
    if type(node) is Raw or not node or random.random() < 0.3:
        return decoration + spell(node)
    margin = "\n" + " " * indent
    if type(node) is Object:
        lines = [f"{margin}{key}: {spell_yaml(random, value, indent + 2, odd)}" for key, value in node]
    else:
        lines = [f"{margin}- {spell_yaml(random, item, indent + 2, odd)}" for item in node]
    return decoration + "".join(lines)


def copied(node: Node) -> Node:
    if type(node) is Raw:
        return node
    if type(node) is Object:
        return Object([key, copied(value)] for key, value in node)
    return [copied(item) for item in node]


def mutate(random: Random, root: Node, scalars: Sequence[Raw] = SCALARS, keys: Sequence[Raw] = KEYS) -> None:
    """One change in place, somewhere in the tree: a value replaced, dropped, doubled, moved or wrapped, a key
    respelled."""
    node = root
    while True:  # descend; the deeper ones are the more numerous
        inner = [child for child in _children(node) if type(child) is not Raw]
        if not inner or random.random() < 0.25:
            break
        node = pick(random, inner)
    if not node:
        node.append([pick(random, keys), pick(random, scalars)] if type(node) is Object else pick(random, scalars))
        return
    place = pick(random, range(len(node)))
    what = int(random.random() * 10)
    if what < 4:
        _put(node, place, pick(random, scalars))
    elif what == 4:
        del node[place]
    elif what == 5:
        node.insert(
            pick(random, range(len(node) + 1)), copied(node[place]) if type(node) is list else list(node[place])
        )
    elif what == 6:
        other = pick(random, range(len(node)))
        node[place], node[other] = node[other], node[place]
    elif what == 7 and type(node) is Object:
        node[place][0] = pick(random, keys)
    elif what == 8 and type(node) is Object:
        key = node[place][0]
        node[place][0] = Raw(f'"\\u{ord(key[1]):04x}{key[2:]}') if len(key) > 2 and key[1] not in '\\"' else key
    elif what == 9:
        value = _children(node)[place]
        _put(node, place, [copied(value)] * pick(random, (1, 2, 200)) if type(value) is Raw else [value])
    else:
        pair = [pick(random, keys), pick(random, scalars)]
        node.insert(place, pair if type(node) is Object else pick(random, scalars))


def _children(node: Node) -> list[Node]:
    return [value for _, value in node] if type(node) is Object else node


def _put(node: Node, place: int, value: Node) -> None:
    if type(node) is Object:
        node[place][1] = value
    else:
        node[place] = value


BYTES = (
    b"\x00", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":",
    b" ", b"\n", b"\t", b"\r", b"-", b"0", b"9", b"e", b".", b"/", b"#", b"&", b"*", b"!", b"\xe2\x80\xa8")  # fmt: skip


def damage(random: Random, content: bytes) -> bytes:
    """One change of bytes: some replaced, put in, cut out, doubled, or the end cut off."""
    place = int(random.random() * (len(content) + 1))
    what = int(random.random() * 5)
    if what == 0:
        piece = pick(random, BYTES)
        return content[:place] + piece + content[place + len(piece) :]
    if what == 1:
        return content[:place] + pick(random, BYTES) + content[place:]
    end = min(len(content), place + 1 + int(random.random() * 8))
    if what == 2:
        return content[:place] + content[end:]
    if what == 3:
        return content[:end] + content[place:end] + content[end:]
    return (
        content[:place] + bytes([int(random.random() * 256)]) + content[place + 1 :]
        if random.random() < 0.8
        else content[:place]
    )
