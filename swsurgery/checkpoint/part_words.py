"""Name the parts of a model that a scan zeroes, for tables, notes and pages. This module must not import anything."""

from __future__ import annotations


def name_part(kind: str, layer: int | None, expert: int | str | None, number: int | None) -> str:
    """Name a part, such as "layer 3 row 39", "layer 1 expert 68" or "embedding channel 7"."""
    words = [] if layer is None else [f"layer {layer}"]
    words += [] if expert is None else [f"expert {expert}"]
    return " ".join([*words, *([] if number is None else [f"{_choose_noun(kind)} {number}"])])


def describe_random_parts(kind: str, layer: int | None, count: int) -> str:
    """Describe the parts with which a part is compared, such as "16 random rows of layer 3"."""
    where = "" if layer is None else f" of layer {layer}"
    return f"{count} random {_choose_noun(kind)}{'' if count == 1 else 's'}{where}"


def _choose_noun(kind: str) -> str:
    """Return the noun for a part of a kind: the kind itself, but "attention channel" and "embedding channel"."""
    return f"{kind} channel" if kind in ("attention", "embedding") else kind
