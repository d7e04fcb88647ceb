"""The pages that are made from the code have not drifted from it, and the README's manifest is a sound one."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from swsurgery.checkpoint.architectures import FAMILIES
from swsurgery.cli import COMMANDS
from swsurgery.manifest.load import parse_manifest

ROOT = Path(__file__).parents[2]
GENERATE = runpy.run_path(str(ROOT / "docs" / "generate.py"), run_name="generate")


def test_commands_page_is_what_help_says():
    assert (ROOT / "docs" / "commands.md").read_text() == GENERATE["commands"]()


def test_every_command_is_on_the_page():
    assert set(COMMANDS) == set(GENERATE["COMMANDS"])


def test_schema_file_is_what_the_command_prints():
    assert (ROOT / "docs" / "manifest.schema.json").read_text() == GENERATE["schema"]()


def test_schemas_of_outputs_are_what_the_command_prints():
    files = {path.name: path.read_text() for path in (ROOT / "docs" / "schemas").iterdir()}
    assert files == GENERATE["output_schemas"]()


def test_families_page_lists_the_table_of_the_code():
    page = (ROOT / "docs" / "families.md").read_text()
    assert page == GENERATE["families"]()
    for family in FAMILIES:
        assert f"\n| {family.name} | {', '.join(family.model_types)} | " in page


def test_manifest_of_the_readme_is_sound():
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 1
    assert [e.op for e in parse_manifest(blocks[0].encode(), Path("README.md")).manifest.edits] == [
        "zero",
        "scale",
        "zero",
        "round",
        "protect",
    ]


def test_manifest_page_has_every_field():
    page = (ROOT / "docs" / "manifest.md").read_text()
    named = set(re.findall(r"`([a-z_0-9.]+)`", page))
    for field in ("version", "name", "description", "base.repo_id", "base.revision", "base.path", "base.model",
                  "base.sha256", "base.weights", "base.variant", "base.copies", "edits", "check.max_perplexity_ratio",
                  "check.min_perplexity_ratio", "zero", "scale", "set", "protect", "layer", "row", "col", "expert",
                  "tensor", "index", "known", "expect", "factor", "value", "bits", "neuron", "slice", "tensors", "flip",
                  "clip", "prune_outliers", "round", "restore", "bit", "z", "fraction", "iqr", "per", "block", "count",
                  "symmetric", "levels", "from"):  # fmt: skip
        assert field in named
