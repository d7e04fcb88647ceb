"""Compile the package before it is measured, as its installation with pip does."""

from __future__ import annotations

import compileall
import importlib.util


def compile_package() -> None:
    """Write the bytecode of the swsurgery that `python -m swsurgery` runs.

    Every process would otherwise compile the modules that it imports if PYTHONDONTWRITEBYTECODE is set, as in many
    containers: this takes up to 0.2 s.
    """
    spec = importlib.util.find_spec("swsurgery")
    assert spec is not None and spec.submodule_search_locations is not None
    for folder in spec.submodule_search_locations:
        compileall.compile_dir(folder, quiet=1)
