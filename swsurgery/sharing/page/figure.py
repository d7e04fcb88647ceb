"""Draw the figure of a published checkpoint's card from its record, as one SVG file."""

from __future__ import annotations

from swsurgery.checkpoint.record import Record
from swsurgery.sharing.page.check_parts import describe_effect, draw_largest_by_layer, draw_perplexity
from swsurgery.sharing.page.markup import Markup, make_tag
from swsurgery.sharing.page.render import read_style
from swsurgery.sharing.page.svg import join_figures


def draw_record(record: Record) -> bytes | None:
    """Draw the perplexity of base and patched model, and the largest hidden state after each layer.

    Returns the bytes of an SVG file, which loads nothing. Returns None if the record has no forward check that compared
    the two models.
    """
    check = record.check
    if check.get("kind") != "forward" or not describe_effect(check):
        return None
    figures = [
        (f"Perplexity: {describe_effect(check).removeprefix('perplexity ')}", draw_perplexity(check)),
        ("Largest hidden state after each layer", draw_largest_by_layer(check)),
    ]
    drawn = [(heading, figure) for heading, figure in figures if figure is not None]
    style = make_tag("style", Markup(read_style("figure.css")))
    return f"{join_figures('What the edit does to the model', drawn).render(style=style)}\n".encode()
