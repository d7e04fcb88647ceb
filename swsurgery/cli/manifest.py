"""The command that prints JSON Schemas: schema."""

from __future__ import annotations

from typing import Annotated

import typer

from swsurgery.cli.completion import complete_document
from swsurgery.cli.options import command
from swsurgery.cli.output import Output, print_json


@command
def schema(
    out: Output,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="Print the schema of what this command prints with --json, or of errors (error).",
            autocompletion=complete_document,
        ),
    ] = None,
) -> None:
    """Print the JSON Schema of manifests or, with --output, of the JSON document of a command."""
    from swsurgery.cli.documents.schemas import render_output_schema
    from swsurgery.manifest.schema import render_schema

    document = render_schema() if output is None else render_output_schema(output)
    out.printed = True
    print_json(document)
