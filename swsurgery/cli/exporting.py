"""The command that writes an edit without its checkpoint: export. `apply` takes the sparse form back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from swsurgery.cli import output
from swsurgery.cli.options import Debug, Json, Quiet
from swsurgery.errors import printable, report_done


def export(
    source: Annotated[
        str,
        typer.Argument(help="A patched checkpoint (a directory or hf://ORG/NAME[@REV]), a manifest, or a patch.",
                       show_default=False),
    ],
    form: Annotated[
        Literal["sparse", "peft", "vllm"],
        typer.Option("--format", help="sparse: one file that apply takes; peft: a LoRA adapter; vllm: arrays for its "
                     "checkpoint patches.", show_default=False),
    ],
    target: Annotated[
        Path, typer.Option("-o", "--output", help="The new file (sparse) or folder (peft, vllm).", show_default=False)
    ],
    base: Annotated[
        str | None, typer.Option(help="The manifest's base, instead of its own: a directory or hf://ORG/NAME[@REV].")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Write the edits alone, in a few kilobytes."""
    from swsurgery.sharing import export as room

    exported = room.write(source, form, target, base=base, progress=output.Bar(quiet))
    report_done(f"the output was written: {exported.output}")
    if json:
        output.print_json(exported.to_json())
        return
    scalars = f"{exported.scalars} changed scalar{'s' if exported.scalars > 1 else ''}"
    output.print_text(f"{printable(str(exported.output))}: {scalars} as {form}")
    for name, size in exported.files.items():
        output.print_text(f"  {printable(name)}  {output.size(size)}")
    for note in exported.notes if not quiet else ():
        output.say(note)
