"""Write the pages that are made from the code: commands, families and the schema. usage: python docs/generate.py"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent
COMMANDS = (
    "apply", "lookup", "scan", "sweep", "compare", "inspect", "check", "verify", "preflight", "lint", "diff", "revert",
    "publish", "export", "recipe", "sign", "schema",
)  # fmt: skip


def commands() -> str:
    """Return docs/commands.md: the `--help` of every command on one page."""
    parts = ["# Commands\n\nMade from `--help` by `python docs/generate.py`.\n"]
    for words in ([], *([name] for name in COMMANDS)):
        text = subprocess.run(
            [sys.executable, "-m", "swsurgery", *words, "--help"],
            capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "100", "TERMINAL_WIDTH": "100"},
        ).stdout  # fmt: skip
        lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
        parts.append(f"## {' '.join(['swsurgery', *words])}\n\n```\n{lines}\n```\n")
    return "\n".join(parts)


def schema() -> str:
    """Return the JSON Schema of manifests, as `swsurgery schema` prints it."""
    from swsurgery.manifest.schema import render_schema

    return json.dumps(render_schema(), indent=2, sort_keys=True) + "\n"


KINDS = {"dense": "dense", "routed": "experts", "shared": "shared expert"}
"""Words of docs/families.md for the kinds of down projections."""


def families() -> str:
    """Return docs/families.md: the table of families, and what follows the last generated line of the page."""
    from swsurgery.checkpoint.architectures import FAMILIES

    rows = ["| family | model types | down projections, as stored or loaded |", "| --- | --- | --- |"]
    for family in FAMILIES:
        names = dict.fromkeys(f"{KINDS[layout.kind]}: `{layout.name}`" for layout in family.layouts)
        rows.append(f"| {family.name} | {', '.join(family.model_types)} | {'<br>'.join(names)} |")
    before, mark, after = (DOCS / "families.md").read_text().partition("<!-- generated -->\n")
    notes = after.partition("<!-- end -->\n")[2]
    table = "\n".join(rows)
    return f"{before}{mark}{table}\n<!-- end -->\n{notes}"


if __name__ == "__main__":
    (DOCS / "commands.md").write_text(commands())
    (DOCS / "families.md").write_text(families())
    (DOCS / "manifest.schema.json").write_text(schema())
