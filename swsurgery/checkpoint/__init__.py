"""Describe what a checkpoint contains: its files, weights, record, journal, and how its architecture stores them.

This package reads a checkpoint from a directory or through a repository's files, compares two of them byte by byte,
and undoes an interrupted edit in place. It must not depend on manifests, on known super weights, on running a model or
on any package above: import its modules directly, since this one imports nothing.
"""
