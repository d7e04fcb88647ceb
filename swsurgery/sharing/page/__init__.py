"""Render results as HTML pages and SVG figures that load nothing and run no script.

`render.py` makes a page of the JSON document of a command, one module per kind of result renders its sections, `svg.py`
draws the figures, and `markup.py` escapes all text. The package must not depend on the results themselves, on models
or on matplotlib: it knows JSON documents and the record only, and writes no file.
"""

from swsurgery.sharing.page.figure import draw_record
from swsurgery.sharing.page.render import PAGES, render_page

__all__ = ["PAGES", "draw_record", "render_page"]
