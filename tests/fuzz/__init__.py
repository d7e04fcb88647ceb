"""Generators of odd files and the targets that read them, for the short runs of the tests and for `make fuzz`.

    documents.py   JSON and YAML as trees whose leaves may be misspelled, and their mutations
    headers.py     safetensors files, compared with the official parser
    readers.py     index, config, manifest, record and journal
    hostile.py     inputs that are large on purpose, each with its name
    long.py        the long run: millions of inputs, figures to docs/reliability/fuzz.json

Every generator draws from a `random.Random`: hypothesis hands in one that it can shrink, the long run a fast one.
"""
