"""Every document of a command has a schema, and every document that a test prints fits it (json_documents.py)."""

from __future__ import annotations

import json

import jsonschema
import pytest
from json_documents import find_fault, forbid_other_fields, make_validator
from patched import DOWN, write_patched

from swsurgery.cli import COMMANDS, main
from swsurgery.cli.documents.schemas import DOCUMENTS, render_output_schema


def test_every_command_has_a_row():
    """The documents of `schema` are themselves schemas."""
    assert set(DOCUMENTS) == set(COMMANDS) - {"schema"} | {"error"}


@pytest.mark.parametrize("command", DOCUMENTS)
def test_a_schema_is_sound_and_described(command, capsys):
    assert main(["schema", "--output", command]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == render_output_schema(command)
    jsonschema.Draft202012Validator.check_schema(schema)
    for name, definition in schema["$defs"].items():
        assert definition.get("description", "").strip(), name
    assert '"default": ' not in json.dumps(schema) and '"title"' not in json.dumps(schema["$defs"])


def test_another_name_is_refused(capsys):
    assert main(["schema", "--output", "lobotomy"]) == 2
    assert "no such output: lobotomy (give one of apply, " in capsys.readouterr().err


@pytest.fixture
def documents(tmp_path, monkeypatch, capsys):
    """The documents of commands without a model, by the first words of the command."""
    write_patched(tmp_path)
    monkeypatch.chdir(tmp_path)
    lines = """
    apply patched.yaml --dry-run
    apply patched.yaml --check off -o new
    inspect base
    inspect base --tensor DOWN
    inspect base --tensor DOWN --at 1,2
    diff base patched
    diff base base
    verify patched
    verify patched --base base --values
    preflight base
    lint patched.yaml
    pin patched.yaml --dry-run
    lookup
    lookup llama-7b
    lookup patched
    lookup llama-7b --as modules
    recipe llama-7b --for torchao
    export patched --format sparse -o patch.safetensors
    revert patched -o back
    verify base
    """
    found = {}
    for line in filter(None, map(str.strip, lines.splitlines())):
        main([*line.replace("DOWN", DOWN).split(), "--json"])
        found[line] = json.loads(capsys.readouterr().out)
    return found


def test_documents_name_the_schema_that_they_fit(documents):
    for line, document in documents.items():
        command = "error" if line == "verify base" else line.split()[0]
        assert document["schema"] == f"swsurgery/{command}/1", line
        assert find_fault(document) is None, line
        jsonschema.validate(document, render_output_schema(command))


def test_a_document_with_another_field_does_not_fit(documents):
    """Twin: the fixture that examines the output of every test sees a field that no schema describes."""
    document = documents["diff base patched"]
    assert "'extra'" in find_fault(document | {"extra": 1})
    assert "'notes' is a required" in find_fault({k: v for k, v in document.items() if k != "notes"})
    assert find_fault(document | {"truncated": "no"}) and find_fault(document | {"schema": "swsurgery/lobotomy/1"})
    jsonschema.validate(document | {"extra": 1}, render_output_schema("diff"))  # a later version may add it
    assert make_validator("diff").is_valid(document)
    assert forbid_other_fields({"required": [], "properties": {}})["additionalProperties"] is False


def test_a_manifest_stays_a_manifest(capsys):
    assert main(["lookup", "llama-7b", "--manifest", "zero", "--json"]) == 0
    assert "schema" not in json.loads(capsys.readouterr().out)
