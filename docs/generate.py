"""Write docs/commands.md and docs/manifest.schema.json from the code. usage: python docs/generate.py"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent
COMMANDS = (
    "apply", "lookup", "scan", "sweep", "compare", "inspect", "check", "verify", "lint", "diff", "revert", "publish",
    "export", "recipe", "sign", "schema",
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


if __name__ == "__main__":
    (DOCS / "commands.md").write_text(commands())
    (DOCS / "manifest.schema.json").write_text(schema())
