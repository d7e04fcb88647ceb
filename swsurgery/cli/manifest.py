"""The command that describes manifests: schema."""

from __future__ import annotations

from swsurgery.cli.options import command
from swsurgery.cli.output import Output, print_json


@command
def schema(out: Output) -> None:
    """Print the JSON Schema of manifests, with and without --json."""
    from swsurgery.manifest import schema

    print_json(schema.render_schema())
