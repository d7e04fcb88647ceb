"""Which tests `make quick` leaves out: those that need torch or the model, and those that take long.

A file that imports torch at its top, itself or through a helper, is found by reading it. Everything else is listed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parents[1]
EXTRAS = {"matplotlib", "model_signing", "peft", "torch", "transformers"}
"""Libraries that the extra `test` does not install."""

NEEDS_TORCH: tuple[str, ...] = ()
"""Tests that load torch inside a function or in a child process, as `file` or `file::function`."""

TAKES_LONG: tuple[str, ...] = ()
"""Folders, files and tests that together would take more than the minute, as `folder/`, `file` or `file::function`."""


def _imported(source: str) -> Iterator[str]:
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@cache
def imports_extras(path: Path) -> bool:
    """Tell whether a file imports a library of `EXTRAS` at its top, itself or through a helper."""
    names = {name.split(".")[0] for name in _imported(path.read_text())}
    helpers = (TESTS / "support" / f"{name}.py" for name in names)
    return bool(names & EXTRAS) or any(helper.is_file() and imports_extras(helper) for helper in helpers)


def leaves_out_file(path: Path) -> bool:
    """Tell whether `make quick` reads nothing of this test file."""
    name = path.relative_to(TESTS).as_posix()
    folders = tuple(entry for entry in TAKES_LONG if entry.endswith("/"))
    return name.startswith(folders) or name in NEEDS_TORCH + TAKES_LONG or imports_extras(path)


def leaves_out_test(path: Path, function: str) -> bool:
    """Tell whether `make quick` leaves out this one test of a file that it reads."""
    return f"{path.relative_to(TESTS).as_posix()}::{function}" in NEEDS_TORCH + TAKES_LONG
