"""Print the controls of an edit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swsurgery.cli.output import print_text
from swsurgery.errors import escape_control, pluralise
from swsurgery.storage.numbers import format_number, format_ratio


def show_controls(document: Mapping[str, Any]) -> None:
    """Print a line for each control in the report of a check: its perplexity ratio and what that means."""
    for control in document.get("controls", ()):
        ratio = _format_interval(control, "ratio")
        print_text(escape_control(f"control   {_describe(control)}: perplexity ratio {ratio}; {control['meaning']}"))
        if control["control"] == "outliers":
            print_text(f"          the edit divided by this control: {_format_interval(control, 'edit_over_control')}")
        if control["finite"] is False:
            print_text("          logits of this control are not finite")


def _describe(control: Mapping[str, Any]) -> str:
    """Describe a control, such as "28 other outliers (magnitude 3.219 or more) zeroed"."""
    if control["control"] == "mean":
        if control["scalars"] == 1:
            return "the product of the edited scalar held at its mean"
        return f"the products of {control['scalars']} edited scalars held at their means"
    least = control.get("smallest_magnitude")
    size = f" (magnitude {format_number(least)} or more)" if least is not None else ""
    return f"{pluralise(control['scalars'], 'other outlier')}{size} zeroed"


def _format_interval(control: Mapping[str, Any], name: str) -> str:
    """Format a ratio with its 95% interval, such as "1.260 (1.190 to 1.330)"."""
    value, low, high = (control[name + end] for end in ("", "_low", "_high"))
    text = "not finite" if value is None else format_ratio(value)
    return text if low is None or high is None else f"{text} ({format_ratio(low)} to {format_ratio(high)})"
