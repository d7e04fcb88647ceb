"""The registry: super weights that papers and repositories have published or a scan has measured, found by name.

    schema.py   what a model, a coordinate, a measurement and a source are
    data.py     reading the shipped TOML files (one per model family)
    overlay.py  the user's own entries, and lookup by name in both
    render.py   the facts as a table for the terminal and as a manifest
    export.py   an own entry as the text of a shipped one
    docs.py     the shipped facts as docs/known.md
    *.toml      the facts; related.toml holds what is known without a scalar, names.toml is a generated index

To add a model, add a table to its family's file, or a file, and run the first two commands in __main__.py; the third
prints the table of a model that was scanned here.

`status` says where a coordinate comes from:
    paper                   printed in a paper, in a table or in a sentence
    measured                found by `swsurgery scan`: by this project, or by yourself where it says own scan
    independent-detection   found by a third party's detector, in no paper
    code-only               only in the code of the authors or of a fork
    disputed                sources disagree on where it is or whether it matters
    refuted                 a published test found no lasting effect, or no large weight is there
    insufficient            doubted by its own author, untested, or not borne out by the evidence
`causal_alone` says what zeroing this one scalar does to perplexity: catastrophic (x30 or more), strong (x4 to x30),
moderate (x2 to x4), weak (x1.05 to x2), inert (below), untested. Where only a row is published, tests zeroed the row.

Knows neither checkpoints nor networks, and imports neither torch nor numpy.
"""

from swsurgery.known.own import all_models, forget, lookup, of_repo, own_models, refuse_name, save
from swsurgery.known.schema import CAUSAL, STATUSES, KnownCoordinate, KnownModel
from swsurgery.known.shipped import addressable, find, names_of, to_json
from swsurgery.known.table import render_manifest, render_table

__all__ = [
    "CAUSAL",
    "STATUSES",
    "KnownCoordinate",
    "KnownModel",
    "addressable",
    "all_models",
    "find",
    "forget",
    "lookup",
    "names_of",
    "of_repo",
    "own_models",
    "render_manifest",
    "render_table",
    "refuse_name",
    "save",
    "to_json",
]
