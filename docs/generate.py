"""Write the pages that are made from the code: commands, families and schemas. usage: python docs/generate.py"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent
COMMANDS = (
    "apply", "lookup", "scan", "sweep", "compare", "inspect", "check", "verify", "preflight", "lint", "pin", "diff",
    "revert", "publish", "export", "recipe", "sign", "schema",
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


def output_schemas() -> dict[str, str]:
    """Return the JSON Schema of what each command prints with --json, by the name of its file in docs/schemas."""
    from swsurgery.cli.documents.schemas import DOCUMENTS, render_output_schema

    return {
        f"{command}.schema.json": json.dumps(render_output_schema(command), indent=2, sort_keys=True) + "\n"
        for command in DOCUMENTS
    }


KINDS = {"dense": "dense", "routed": "experts", "shared": "shared expert"}
"""Words of docs/families.md for the kinds of down projections."""


def families() -> str:
    """Return docs/families.md: the table of families, and what follows the last generated line of the page."""
    from swsurgery.checkpoint.architectures import FAMILIES

    rows = ["| family | model types | down projections, as stored or loaded |", "| --- | --- | --- |"]
    for family in FAMILIES:
        names = dict.fromkeys(f"{KINDS[template.kind]}: `{template.name}`" for template in family.templates)
        rows.append(f"| {family.name} | {', '.join(family.model_types)} | {'<br>'.join(names)} |")
    before, mark, after = (DOCS / "families.md").read_text().partition("<!-- generated -->\n")
    notes = after.partition("<!-- end -->\n")[2]
    table = "\n".join(rows)
    return f"{before}{mark}{table}\n<!-- end -->\n{notes}"


TOOLS = {  # what the row measures, the proof and the way back, by the name in docs/measured/tools.json
    "swsurgery --in-place": ("`swsurgery apply --in-place`", "`verify`, without the base", "`revert`, exact"),
    "swsurgery": ("`swsurgery apply -o`", "`verify`, without the base", "`revert`, exact"),
    "transformers": ("transformers: load, edit, save", "none", "keep the base"),
    "safetensors": ("safetensors: load the shard, edit, save, copy the rest", "none", "keep the base"),
    "mergekit": ("mergekit passthrough: copies, edits nothing", "none", "keep the base"),
    "llm-compressor": ("llm-compressor FP8_DYNAMIC: quantises, edits nothing", "none", "keep the base"),
}
"""Maps the rows of docs/measured/tools.json to the words of the table in README.md and docs/comparison.md."""


def tools() -> str:
    """Return the table of what one edited scalar costs with each tool."""
    measured = json.loads((DOCS / "measured" / "tools.json").read_text())
    rows = ["| | peak memory | bytes written | proof | undo |", "| --- | ---: | ---: | --- | --- |"]
    for row in measured["rows"]:
        label, proof, undo = TOOLS[row["name"]]
        written = row["written_bytes"]
        size = f"{written / 1e6:,.0f} MB" if written >= 1e6 else f"{written / 1e6:.1f} MB"
        rows.append(f"| {label} | {row['peak_bytes'] / 1e6:,.0f} MB | {size} | {proof} | {undo} |")
    return "\n".join(rows)


def differences() -> str:
    """Return the table of what each tool's output has in common with the base."""
    measured = json.loads((DOCS / "measured" / "tools.json").read_text())
    rows = ["| | version | files of the base with other bytes | scalars that differ |", "| --- | --- | ---: | ---: |"]
    for row in measured["rows"]:
        count = f"{len(row['changed_files'])} of {measured['checkpoint']['files']}"
        scalars = "other dtypes" if row["scalars"] is None else row["scalars"]
        rows.append(f"| {TOOLS[row['name']][0]} | {row['tool']} | {count} | {scalars} |")
    return "\n".join(rows)


def fill(page: str, name: str, text: str) -> str:
    """Return a page with the text between the marks `<!-- NAME -->` and `<!-- end NAME -->`."""
    before, mark, rest = page.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end {name} -->")
    assert mark and end, f"no marks of {name}"
    return f"{before}{mark}\n{text}\n\n{end}{after}"


def readme() -> str:
    """Return README.md with its measured table."""
    return fill((DOCS.parent / "README.md").read_text(), "tools", tools())


def comparison() -> str:
    """Return docs/comparison.md with its measured tables."""
    page = fill((DOCS / "comparison.md").read_text(), "tools", tools())
    return fill(page, "differences", differences())


if __name__ == "__main__":
    (DOCS / "commands.md").write_text(commands())
    (DOCS / "families.md").write_text(families())
    (DOCS / "manifest.schema.json").write_text(schema())
    (DOCS.parent / "README.md").write_text(readme())
    (DOCS / "comparison.md").write_text(comparison())
    (DOCS / "schemas").mkdir(exist_ok=True)
    for name, text in output_schemas().items():
        (DOCS / "schemas" / name).write_text(text)
