"""Validate every JSON document that a command prints in a test against the schema that swsurgery publishes.

The schemas allow further fields, because a later version may add some. Here no field may be missing from them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from typing import Any

import jsonschema
import pytest

from swsurgery.cli import output
from swsurgery.cli.documents.schemas import DOCUMENTS, render_output_schema

faults: list[str] = []
"""What is wrong with the documents that were printed since the last test."""


def forbid_other_fields(schema: Any) -> Any:
    """Add to every object of a schema that it has no other fields."""
    if isinstance(schema, list):
        return [forbid_other_fields(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: forbid_other_fields(value) for key, value in schema.items()}
    return {"additionalProperties": False, **strict} if isinstance(schema.get("required"), list) else strict


@cache
def make_validator(command: str) -> jsonschema.Draft202012Validator:
    schema = render_output_schema(command)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(forbid_other_fields(schema))


def find_fault(document: Any) -> str | None:
    """Return the most specific fault of a document that names its schema; None for any other document."""
    name = document.get("schema") if isinstance(document, dict) else None
    if not isinstance(name, str) or not name.startswith("swsurgery/"):
        return None
    command = name.split("/")[1]
    if command not in DOCUMENTS:
        return f"no schema: {name}"
    worst = jsonschema.exceptions.best_match(make_validator(command).iter_errors(document))
    return worst and f"{name}: {worst.json_path}: {worst.message[:2000]}"


def examine(text: str | bytes | None) -> None:
    if (
        not text
        or text[:1] not in ("{", b"{")
        or (b"swsurgery/" if isinstance(text, bytes) else "swsurgery/") not in text
    ):
        return
    try:
        fault = find_fault(json.loads(text))
    except ValueError:
        return  # text that is no JSON, or two documents
    if fault is not None:
        faults.append(fault)


@pytest.fixture(scope="session", autouse=True)
def examined_output():
    """Examine what is printed in this process and what child processes print."""
    write, run = output.write, subprocess.run

    def examine_and_write(text, stream=None):
        if stream is None or stream is sys.stdout:
            examine(text)
        return write(text, stream)

    def run_and_examine(*arguments, **options):
        done = run(*arguments, **options)
        examine(done.stdout)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "write", examine_and_write)
        patch.setattr(subprocess, "run", run_and_examine)
        yield


@pytest.fixture(autouse=True)
def valid_documents():
    """Fail the test whose documents do not fit their schemas."""
    faults.clear()
    yield
    if faults:
        pytest.fail("\n".join(faults), pytrace=False)
