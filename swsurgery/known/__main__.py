"""Print a text generated from the known super weights.

Without an argument, print the documentation page; with `names`, the index of names; with `entry`, the table of a model
scanned on this machine, in the format of its family's file.

python -m swsurgery.known > docs/known.md
python -m swsurgery.known names > swsurgery/known/names.toml
python -m swsurgery.known entry NAME
"""

import io
import sys

from swsurgery.known.docs import render_docs
from swsurgery.known.export import render_entry
from swsurgery.known.own import load_own_entry
from swsurgery.known.shipped import render_names

if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(encoding="utf-8")
match sys.argv[1:]:
    case ["names"]:
        text = render_names()
    case ["entry", name]:
        text = render_entry(load_own_entry(name))
    case _:
        text = render_docs()
sys.stdout.write(text)
