"""Print what is generated from the facts: the page of documentation, or with `names` the index of names.

python -m swsurgery.known > docs/known.md
python -m swsurgery.known names > swsurgery/known/names.toml
"""

import sys

from swsurgery.known.data import render_names
from swsurgery.known.docs import render_docs

sys.stdout.reconfigure(encoding="utf-8")
sys.stdout.write(render_names() if sys.argv[1:] == ["names"] else render_docs())
