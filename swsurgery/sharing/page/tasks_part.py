"""Render the scores of tasks in the report of a check or of a comparison."""

from __future__ import annotations

from swsurgery.sharing.page.markup import Markup, join, make_code, make_table, make_tag
from swsurgery.sharing.page.svg import format_figure
from swsurgery.sharing.page.values import (
    Document,
    read_integer,
    read_map,
    read_maps,
    read_number,
    read_text,
    show_number,
)

_COLUMNS = ("task", "metric", "items", "model", "value", "stderr", "difference", "interval", "up", "down", "p", "test")


def show_tasks(document: Document) -> Markup:
    """Render the field `tasks` of a document as a table; "" if there is none."""
    tasks = read_map(document, "tasks")
    rows = [
        [
            *(make_code(read_text(metric, "task")), read_text(metric, "metric"), read_integer(metric, "items")),
            *(read_text(score, "model"), *(show_number(score.get(key)) for key in ("value", "stderr", "difference"))),
            _show_ends(score),
            *(read_integer(score, key) for key in ("risen", "fallen")),
            *(show_number(score.get("p_value")), read_text(score, "test")),
        ]
        for metric in read_maps(tasks, "results")
        for score in read_maps(metric, "scores")
    ]
    if not rows:
        return Markup("")
    words = "Differences are from the base, with 95% intervals. The p-values are exact and paired: they compare items."
    version = read_text(tasks, "lm_eval")
    return join(
        [
            make_table(_COLUMNS, rows, numeric=(2, 4, 5, 6, 7, 8, 9, 10)),
            make_tag("p", f"{words} Scored by lm-eval {version}." if version else words, class_="aside"),
        ]
    )


def _show_ends(score: Document) -> str | None:
    low, high = read_number(score, "low"), read_number(score, "high")
    return None if low is None or high is None else f"{format_figure(low)} to {format_figure(high)}"
