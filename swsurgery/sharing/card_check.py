"""Render the sanity check of a record for a card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swsurgery.sharing.markdown import escape, render_code, render_table
from swsurgery.storage.names import FIGURE_NAME
from swsurgery.storage.numbers import NO_COMMAS, format_number

_FIGURE = f"![Perplexity of base and patched model, and the largest hidden state after each layer]({FIGURE_NAME})"
"""The line of Markdown that shows the figure of the check."""


def render_check(check: Mapping[str, Any], has_figure: bool) -> list[str]:
    """Render what was checked and its result. `has_figure` is True if the repository has the figure of the check."""
    return [_describe(check), *([_FIGURE] if has_figure else [])]


def _describe(check: Mapping[str, Any]) -> str:
    kind, reason = check.get("kind"), check.get("reason")
    why = f" ({escape(reason)})" if reason else ""
    if kind == "off":
        return f"No check was made{why}."
    if kind != "forward":
        return f"The weights were read back: exactly the scalars above differ. The model was not run{why}."
    rows = []
    for name in ("perplexity", "word_perplexity", "loss"):
        sides = [check[side].get(name) if isinstance(check.get(side), dict) else None for side in ("base", "patched")]
        if any(side is not None for side in sides):
            rows.append([name.replace("_", " "), *map(_format_value, sides)])
    mass = check.get("stopword_mass")
    if isinstance(mass, dict):
        rows.append(["stopword mass", _format_value(mass.get("base")), _format_value(mass.get("patched"))])
    text = check.get("text")
    tokens, where = _describe_text(text if isinstance(text, dict) else {})
    lines = [
        "Base and patched model on the same text, side by side:",
        render_table(("figure", "base", "patched"), rows),
        f"Perplexity ratio {_format_value(check.get('perplexity_ratio'))}, "
        f"KL divergence {_format_value(check.get('kl'))}, over {_format_value(tokens)} tokens{where}; "
        f"device {render_code(check.get('device'))}, dtype "
        f"{render_code(check.get('dtype'))}. Verdict: {'passed' if check.get('ok') is True else '**failed**'}.",
        *_describe_controls(check.get("controls")),
    ]
    return "\n\n".join(lines)


def _describe_controls(controls: object) -> list[str]:
    """Describe the controls of the edit, in one table; an empty list if none was measured."""
    found = [each for each in controls if isinstance(each, dict)] if isinstance(controls, list) else []
    if not found:
        return []
    rows = [
        [
            escape(_CONTROLS.get(str(each.get("control")), "unknown")),
            *(_format_value(each.get(key)) for key in ("scalars", "perplexity", "ratio")),
            escape(str(each.get("meaning"))),
        ]
        for each in found
    ]
    header = ("control: another change of the base", "scalars", "perplexity", "ratio", "meaning")
    return [render_table(header, rows)]


_CONTROLS = {"mean": "products of the edited scalars held at their means", "outliers": "other outliers zeroed"}


def _describe_text(text: Mapping[str, Any]) -> tuple[Any, str]:
    """Return the number of scored tokens, and the windows, the protocol and the digest of the text in words.

    Records of earlier versions have no protocol; the words are then "".
    """
    protocol = text.get("protocol")
    if not isinstance(protocol, dict):
        return text.get("scored_tokens"), ""
    words = f" in {_format_value(text.get('windows'))} windows (protocol {escape(str(protocol.get('description')))}, "
    return text.get("scored_tokens"), f"{words}text sha256 {render_code(text.get('sha256'))})"


def _format_value(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return render_code(value)
    return format_number(value, 6, NO_COMMAS)
