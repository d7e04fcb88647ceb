"""The command that signs a checkpoint: sign. `verify --signature` checks what it made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swsurgery.cli import output
from swsurgery.cli.options import Debug, DirectoryArgument, Json, Quiet
from swsurgery.errors import printable, report_done


def sign(
    checkpoint: DirectoryArgument,
    key: Annotated[Path, typer.Option(help="The private key: a PEM file that only you can read.", show_default=False)],
    signature: Annotated[
        Path | None, typer.Option(help="Where the signature is written; else model.sig in the checkpoint.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Sign every file of a checkpoint with a private key."""
    from swsurgery.verifying import signature as signature_module

    written = signature_module.sign(checkpoint, key, signature)
    report_done(f"the signature was written: {written}")
    if json:
        output.print_json({"checkpoint": str(checkpoint), "signature": str(written)})
        return
    output.print_text(f"signed    {printable(str(checkpoint))}")
    output.print_text(f"signature {printable(str(written))}")
