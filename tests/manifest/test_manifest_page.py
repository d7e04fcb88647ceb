"""docs/manifest.md: its examples load, and they show every target and every operation with a field of each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from swsurgery.manifest.load import load_manifest
from swsurgery.manifest.operations import OPERATIONS, Operation
from swsurgery.manifest.targets import FORMS
from swsurgery.verifying.lint import lint

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "manifest.md").read_text("utf-8")
EXAMPLES = sorted((ROOT / "manifests" / "examples").glob("*.yaml"))
HEAD = "version: 1\nbase: {path: x}\nedits:\n"


def load(edits: str) -> list[Operation]:
    return load_manifest(f"{HEAD}{edits}\n".encode()).manifest.edits


def test_the_table_of_targets_has_every_form_and_an_example_of_it():
    rows = re.findall(r"^\| ([a-z ]+) \| (`[^|]*) \| `(\{op: [^|]*\})` \|$", PAGE, re.MULTILINE)
    forms = {"whole tensors": "tensors"}
    found = {forms.get(name, name): load(f"- {example}")[0].form.name for name, _, example in rows}
    assert found == {form.name: form.name for form in FORMS}
    fields = {forms.get(name, name): set(re.findall("`([a-z]+)`", text)) for name, text, _ in rows}
    assert all({*form.fields} <= fields[form.name] for form in FORMS)


def test_the_table_of_operations_has_every_operation_and_its_fields():
    rows = {name: row for name, row in re.findall(r"^\| `([a-z_]+)` \| (.*)$", PAGE, re.MULTILINE)}
    for operation in OPERATIONS:
        name = operation.model_fields["op"].annotation.__args__[0]
        own = {field.alias or key for key, field in operation.model_fields.items()} - {*Operation.model_fields}
        assert own <= set(re.findall("`([a-z_]+)[`:]", rows[name])), name
        kinds = {"all": (True, True), "single scalars": (True, False), "all but single scalars": (False, True)}
        targets = rows[name].removesuffix(" |").rpartition("| ")[2].partition(";")[0]
        assert kinds[targets] == (operation.on_scalars, operation.on_regions), name


def test_the_blocks_of_the_page_load_and_show_every_operation():
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    edits = [edit for block in blocks for edit in load(block)]
    assert len(blocks) == 4 and {type(edit) for edit in edits} == {*OPERATIONS}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_load_and_have_no_finding(path):
    assert load_manifest(path).manifest.name == path.stem
    assert lint(path, strict=True).findings == ()


def test_the_examples_show_a_row_a_clip_and_a_round_with_protect():
    edits = {path.stem: load_manifest(path).manifest.edits for path in EXAMPLES}
    assert {name: [(edit.op, edit.form.name) for edit in found] for name, found in edits.items()} == {
        "llama-7b-zero-row": [("zero", "row")],
        "llama-7b-clip": [("clip", "tensors"), ("protect", "known")],
        "llama-7b-round-4-bits-protect": [("round", "tensors"), ("protect", "known")],
    }
