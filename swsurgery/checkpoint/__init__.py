"""Read checkpoints: their files, weights and records, and the place where each architecture stores a scalar.

The package reads a checkpoint in a directory or in a repository of the Hub, compares two checkpoints byte by byte, and
undoes an interrupted edit in place. It must not depend on manifests, on known super weights, on running a model or on
the packages that import it. Import its modules directly: this file imports nothing.
"""
