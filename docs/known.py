"""Print a file that is generated from the known super weights.

Without an argument, print the page docs/known.md. With `names`, print names.toml, which maps names of models to files.
With `entry NAME`, print the result that `scan --register NAME` saved on this machine, in the format of shipped files.

python docs/known.py > docs/known.md
python docs/known.py names > swsurgery/known/names.toml
python docs/known.py entry NAME
"""

from __future__ import annotations

import io
import sys

from known_entry import render_entry
from known_page import render_page

from swsurgery.known.own import load_own_entry
from swsurgery.known.shipped import list_families, list_names, load_family, normalise


def render_names() -> str:
    """Return the text of names.toml: the normalised names of the models in each shipped file."""
    lines = ["# Which file knows which name; written by `python docs/known.py names`", ""]
    for family in list_families():
        names = sorted({normalise(name) for model in load_family(family) for name in list_names(model)})
        lines += [f'"{family}" = [', *(f'  "{name}",' for name in names), "]"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    match sys.argv[1:]:
        case ["names"]:
            text = render_names()
        case ["entry", name]:
            text = render_entry(load_own_entry(name))
        case _:
            text = render_page()
    sys.stdout.write(text)
