"""Known super weights, found by model name: published by papers and repositories, or measured by a scan.

The package contains the shipped data, the user's own scans, lookup in both, and the tables and manifests made from
them. It must not depend on a running model, torch or numpy.

    schema.py    models, coordinates, whole experts and columns, measurements and sources
    related.py   results without a coordinate: super experts, sink neurons, negative results, wrong values
    shipped.py   reads the shipped TOML files, one per model family
    own.py       the user's own entries, and lookup by name in shipped and own entries
    listing.py   lists all known models
    names.py     lists their names alone, for shell completion
    table.py     renders the table for the terminal, and manifests
    *.toml       the shipped data; related.toml contains results without a coordinate, and names.toml is a generated
                 index of the models' names

To add a model, add a table to its family's file or add a new file, then run the first two commands in docs/known.py.
The third command prints the table of a model that was scanned on this machine.

`status` is the origin of a coordinate, or the doubt about it:
    paper                   printed in a paper, in a table or in a sentence
    measured                found by `swsurgery scan`: by this project, or by you if it is marked as own scan
    independent-detection   found by a third party's detector, in no paper
    code-only               only in the code of the authors or of a fork
    disputed                sources disagree about its position or its importance
    refuted                 a published test found no lasting effect, or the weight is not large
    insufficient            doubted by its own author, untested, or not supported by the evidence
    candidate               found by your own scan, whose causal test was not made or gave no verdict
`causal_alone` is the effect on perplexity of zeroing only this scalar: catastrophic (x30 or more), strong (x4 to x30),
moderate (x2 to x4), weak (x1.05 to x2), inert (below x1.05), untested. If only a row is published, the whole row was
zeroed.
"""

from swsurgery.known.own import find_by_repo, find_model, forget, list_all_models, list_own_models, refuse_name, save
from swsurgery.known.schema import CAUSAL, STATUSES, KnownColumn, KnownCoordinate, KnownEntry, KnownExpert, KnownModel
from swsurgery.known.shipped import build_json, find, list_addressable, list_names
from swsurgery.known.table import render_manifest, render_table

__all__ = [
    "CAUSAL",
    "STATUSES",
    "build_json",
    "KnownColumn",
    "KnownCoordinate",
    "KnownEntry",
    "KnownExpert",
    "KnownModel",
    "list_addressable",
    "list_all_models",
    "find",
    "forget",
    "find_model",
    "list_names",
    "find_by_repo",
    "list_own_models",
    "render_manifest",
    "render_table",
    "refuse_name",
    "save",
]
