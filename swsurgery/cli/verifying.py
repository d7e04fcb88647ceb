"""Commands that prove what a checkpoint is: verify."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Literal

import typer

from swsurgery.cli import output
from swsurgery.cli.options import (
    CheckpointArgument,
    Debug,
    Json,
    Quiet,
    VariantOption,
    WeightsOption,
    reading,
    refuse_replacing,
)


def verify(
    checkpoint: CheckpointArgument,
    base: Annotated[
        str | None, typer.Option(help="Also compare with this base, byte by byte: a directory or hf://ORG/NAME[@REV].")
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option(help="Prove that it is exactly what this manifest makes of its base.")
    ] = None,
    known: Annotated[
        bool, typer.Option("--known", help="Hold it against the known super weights of its model; needs no registry.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Which known model it is, where nothing in it says; with --known.")
    ] = None,
    known_tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="How much of its value a known super weight may have lost.")
    ] = 0.25,
    weights: WeightsOption = None,
    variant: VariantOption = None,
    finite: Annotated[bool, typer.Option("--finite", help="Also search all values for NaN and infinities.")] = False,
    signature: Annotated[
        Path | None, typer.Option(help="Check this signature of the checkpoint; with --public-key.")
    ] = None,
    public_key: Annotated[Path | None, typer.Option(help="The signer's public key, a PEM file.")] = None,
    format: Annotated[
        Literal["text", "json", "junit", "sarif", "github"], typer.Option(help="How the findings are written.")
    ] = "text",
    file: Annotated[Path | None, typer.Option("--output", help="Write them to this file instead of stdout.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Prove that a patched checkpoint is its base with exactly the declared scalars changed. Exit 1 where it is not."""
    from swsurgery.checkpoint.opening import held
    from swsurgery.hub import named
    from swsurgery.storage import filesystem
    from swsurgery.verifying import formats, verify

    question = verify.Question(
        base,
        manifest,
        known or model is not None,
        model,
        known_tolerance,
        finite,
        signature,
        public_key,
        weights,
        variant,
    )
    with reading(checkpoint, quiet) as where, held(named(base)) if base else contextlib.nullcontext():
        refuse_replacing(file, [where, named(base) if base else None, manifest, signature, public_key])
        report = verify.prove(where, question, output.Bar(quiet)).report(checkpoint)
    text = formats.render(report, "json" if json else format)
    if file is None:
        output.print_text(text)
    else:
        filesystem.write_report(file, text.encode())
        if not quiet:
            output.say(f"{report.errors} findings in {file}")
    if report.exit_code:
        raise typer.Exit(report.exit_code)
