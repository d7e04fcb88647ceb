"""Print the scores of tasks as a table on stdout. This module must not compute anything or import torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swsurgery.cli.output import print_table, print_text
from swsurgery.errors import escape_control, pluralise
from swsurgery.storage.numbers import format_number

_COLUMNS = ("task", "metric", "items", "model", "value", "stderr", "difference", "interval", "up", "down", "p", "test")


def show_tasks(document: Mapping[str, Any] | None) -> None:
    """Print one row per metric and model. `document` is the JSON of a TaskReport, or None if no task was run."""
    if document is None:
        return
    print_text("")
    print_table(
        _COLUMNS,
        [
            (
                *(escape_control(metric["task"]), metric["metric"], metric["items"], escape_control(score["model"])),
                *(_format(score["value"]), _format(score["stderr"]), _format(score["difference"])),
                _format_interval(score["low"], score["high"]),
                *("-" if score[key] is None else score[key] for key in ("risen", "fallen")),
                *(_format(score["p_value"]), score["test"] or ""),
            )
            for metric in document["results"]
            for score in metric["scores"]
        ],
    )
    for name in document["not_finite"]:
        print_text(f"note      some log-likelihoods are not finite: {escape_control(name)}")
    limit = "" if document["limit"] is None else f", at most {pluralise(document['limit'], 'item')} of each task"
    print_text(
        f"\n{document['requests']:,} requests of lm-eval {document['lm_eval']} as {document['sequences']:,} inputs, "
        f"run in {pluralise(document['readings'], 'reading')} of the weights{limit}"
    )
    print_text("difference from the base, with its 95% interval; p is exact, from the items that went up or down")


def _format(value: float | None) -> str:
    return "-" if value is None else format_number(value)


def _format_interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{format_number(low)} to {format_number(high)}"
