"""Make the JSON Schema of the documents of each command.

DOCUMENTS is the table of all documents. To add a document, describe it in a module of this package and add it here;
a test fails until every command has a row, and validates each document that a test makes.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from swsurgery.checkpoint.record import Record
from swsurgery.cli.documents import checkpoints, edits, failures, findings, known, scans, sharing
from swsurgery.errors import SwsurgeryError
from swsurgery.storage.result import name_schema

DOCUMENTS: dict[str, tuple[type[BaseModel], ...]] = {
    "apply": (edits.AppliedDocument, edits.PlanDocument),
    "check": (edits.CheckDocument,),
    "compare": (scans.ComparisonDocument,),
    "diff": (checkpoints.DifferenceDocument,),
    "error": (failures.ErrorDocument,),
    "export": (sharing.ExportedDocument,),
    "inspect": (
        checkpoints.CheckpointDocument,
        checkpoints.TensorDocument,
        checkpoints.MatrixDocument,
        checkpoints.ScalarDocument,
    ),
    "lint": (findings.LintDocument,),
    "lookup": (
        known.KnownModelDocument,
        known.ModelListDocument,
        known.ModulesDocument,
        known.ForgottenDocument,
        Record,
    ),
    "pin": (edits.PinnedDocument,),
    "preflight": (findings.PreflightDocument,),
    "publish": (sharing.PublishedDocument, sharing.ProposalDocument),
    "recipe": (sharing.RecipeDocument,),
    "revert": (checkpoints.RevertedDocument,),
    "scan": (scans.ExpertScanDocument, scans.ScanDocument),
    "sign": (findings.SignedDocument,),
    "sweep": (scans.SweepDocument,),
    "verify": (findings.VerifyDocument,),
}
"""Maps each command to its documents, and "error" to the document that any command prints if it fails."""


def render_output_schema(command: str) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of what `swsurgery COMMAND --json` prints; "error" is that of errors.

    Raises SwsurgeryError for any other name.
    """
    models = DOCUMENTS.get(command)
    if models is None:
        raise SwsurgeryError("no such output", command, f"give one of {', '.join(DOCUMENTS)}")
    _, generated = models_json_schema([(model, "validation") for model in models])
    definitions = {name: _tidy(definition) for name, definition in generated["$defs"].items()}
    for model in models:
        definition = definitions[model.__name__]
        definition["properties"]["schema"] = {"const": name_schema(command)}
        definition["required"] = sorted([*definition["required"], "schema"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": name_schema(command),
        "anyOf": [{"$ref": f"#/$defs/{model.__name__}"} for model in models],
        "$defs": definitions,
    }


def _tidy(schema: Any) -> Any:
    """Return a schema without titles, defaults and the rule that no other field may exist.

    A document may get new fields, and a default is only a mark of an absent field.
    """
    if isinstance(schema, list):
        return [_tidy(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if key not in ("title", "default")}
    if kept.get("additionalProperties") is False:
        del kept["additionalProperties"]
    fields = kept.pop("properties", None)
    tidied = {key: _tidy(value) for key, value in kept.items()}
    if fields is not None:
        tidied["properties"] = {name: _tidy(value) for name, value in fields.items()}
    if "description" in tidied:
        tidied["description"] = " ".join(str(tidied["description"]).split())
    return tidied
