"""Print what is generated from the facts: the page of documentation, with `names` the index of names, and with `entry`
the table of a model that was scanned here, to go into its family's file.

python -m swsurgery.known > docs/known.md
python -m swsurgery.known names > swsurgery/known/names.toml
python -m swsurgery.known entry NAME
"""

import sys

from swsurgery.known.docs import render_docs
from swsurgery.known.export import render_entry
from swsurgery.known.own import own_entry
from swsurgery.known.shipped import render_names

sys.stdout.reconfigure(encoding="utf-8")
match sys.argv[1:]:
    case ["names"]:
        text = render_names()
    case ["entry", name]:
        text = render_entry(own_entry(name))
    case _:
        text = render_docs()
sys.stdout.write(text)
