"""The command that reads manifests and opens no checkpoint: lint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from swsurgery.cli import output
from swsurgery.cli.options import Debug, Json, Quiet, refuse_replacing


def lint(
    manifests: Annotated[list[Path], typer.Argument(help="Manifests, YAML or JSON.", show_default=False)],
    strict: Annotated[bool, typer.Option("--strict", help="Let a warning be a finding too.")] = False,
    format: Annotated[
        Literal["text", "json", "junit", "sarif", "github"], typer.Option(help="How the findings are written.")
    ] = "text",
    file: Annotated[Path | None, typer.Option("--output", help="Write them to this file instead of stdout.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Find what is wrong with manifests, offline and without a checkpoint. Exit 1 where something is."""
    from swsurgery.storage import filesystem
    from swsurgery.verifying import formats
    from swsurgery.verifying.lint import lint as run

    refuse_replacing(file, manifests)
    report = run(manifests, strict)
    text = formats.render(report, "json" if json else format)
    if file is None:
        output.print_text(text)
    else:
        filesystem.write_report(file, text.encode())
        if not quiet:
            output.say(f"{report.errors} findings in {file}")
    if report.exit_code:
        raise typer.Exit(report.exit_code)
