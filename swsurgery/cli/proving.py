"""Commands that prove what a checkpoint is: verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swsurgery import output
from swsurgery.cli.options import CheckpointArgument, Debug, Json, Quiet


def verify(
    checkpoint: CheckpointArgument,
    base: Annotated[Path | None, typer.Option(help="Also compare with this base, byte by byte.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Prove that a patched checkpoint is its base with exactly the declared scalars changed. Exit 1 where it is not."""
    from swsurgery import show
    from swsurgery.verify import verify as run

    verification = run(checkpoint, output.Bar(quiet), base)
    output.print_json(verification.to_json()) if json else show.verification(verification)
    if not verification.ok:
        raise typer.Exit(1)
