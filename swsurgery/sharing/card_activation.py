"""Render the largest activation of base and patched model for a card, beside the published value of the base.

The measured values are those of the record's check. The published value is that of the shipped table of known models,
so that the card does not depend on entries that the publisher saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swsurgery.checkpoint.record import Record
from swsurgery.known.shipped import find_shipped_by_repo
from swsurgery.known.table import describe_max_activation
from swsurgery.sharing.markdown import escape, render_code, render_table
from swsurgery.storage.numbers import NO_COMMAS, format_number

_HEADER = ("model", "value", "layer", "token", "channel", "half reached in layer", "below half in layer")

HALF = 0.5
"""Share of the largest activation that counts as large. The card states in which layers the activation is large."""


def render_largest(record: Record) -> list[str]:
    """Render the section about the largest activation; nothing if none was measured or published."""
    rows = [row for side in ("base", "patched") if (row := _make_row(side, record.check))]
    published = _describe_published(record, bool(rows))
    if not rows and not published:
        return []
    protocol = record.check.get("text", {})
    protocol = protocol.get("protocol") if isinstance(protocol, dict) else None
    bos = {"yes": ", whose windows begin with BOS", "no": ", whose windows begin without BOS"}
    said = bos.get(str(protocol.get("bos")), "") if isinstance(protocol, dict) else ""
    measured = [
        f"The largest hidden state after any layer, on the text of the check{said}:",
        render_table(_HEADER, rows),
    ]
    return ["## Largest activation", *(measured if rows else []), *published]


def _make_row(side: str, check: Mapping[str, Any]) -> list[str] | None:
    """Return the cells for one side of a check; None if the check has no largest hidden state of this side."""
    figures = check.get(side)
    peak = figures.get("super_activation") if isinstance(figures, dict) else None
    if not isinstance(figures, dict) or not isinstance(peak, dict):
        return None
    value = peak.get("value")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # A check stores None for a value that is not finite.
    written = "not finite" if value is None else format_number(value, 6, NO_COMMAS) if is_number else render_code(value)
    layers = _find_span(value if is_number else None, peak.get("layer"), figures.get("largest_by_layer"))
    return [side, written, *(render_code(peak.get(key)) for key in _HEADER[2:5]), *layers]


def _find_span(value: object, peak: object, by_layer: object) -> tuple[str, str]:
    """Find the layers around the peak in which the largest hidden state is at least half of the peak.

    Returns the first of these layers, and the first layer after them. A dash stands for a layer that the check does not
    state.
    """
    if not isinstance(by_layer, list) or type(peak) is not int or not 0 <= peak < len(by_layer):
        return "-", "-"
    if not isinstance(value, (int, float)) or any(not isinstance(one, (int, float)) for one in by_layer):
        return "-", "-"
    large = [abs(one) >= HALF * abs(value) for one in by_layer]
    first = next((layer + 1 for layer in range(peak, -1, -1) if not large[layer]), 0)
    down = next((layer for layer in range(peak, len(large)) if not large[layer]), None)
    return str(first), "never" if down is None else str(down)


def _describe_published(record: Record, measured: bool) -> list[str]:
    """Describe the published largest activation of the base's repository, if the shipped table has one.

    `measured` is True if the largest activation on the text of the check stands beside it.
    """
    name = record.base.repo_id
    model = find_shipped_by_repo(name) if isinstance(name, str) else None
    if model is None or model.max_activation is None:
        return []
    said, source = describe_max_activation(model.max_activation), model.max_activation.source
    text = f"measured on {escape(source.measured_on or 'a text that is not stated')}"
    other = ", not on the text of the check" if measured else ""
    return [f"Published for {render_code(model.hf_id)}: {escape(said)}, by {escape(source)}, {text}{other}."]
