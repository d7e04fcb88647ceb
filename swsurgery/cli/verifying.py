"""Commands that check checkpoints and manifests, and sign checkpoints: verify, lint, sign."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from swsurgery.cli.options import (
    CheckpointArgument,
    DirectoryArgument,
    VariantOption,
    WeightsOption,
    command,
    open_for_reading,
    refuse_replacing,
)
from swsurgery.cli.output import Output, print_json, print_text
from swsurgery.errors import escape_control, pluralise, report_done

if TYPE_CHECKING:
    from swsurgery.verifying.formats import FindingReport

Format = Literal["text", "json", "junit", "sarif", "github"]
FormatOption = Annotated[Format, typer.Option(help="The format of the findings.")]
ReportFile = Annotated[Path | None, typer.Option("--output", help="Write the findings to this file instead of stdout.")]


@command
def verify(
    out: Output,
    checkpoint: CheckpointArgument,
    base: Annotated[
        str | None, typer.Option(help="Also compare byte by byte with this base: a directory or hf://ORG/NAME[@REV].")
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option(help="Prove that the checkpoint is exactly what this manifest makes of its base.")
    ] = None,
    known: Annotated[
        bool, typer.Option("--known", help="Check the known super weights of its model; needs no record.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="The known model that it derives from, if it does not say so. Implies --known.")
    ] = None,
    known_tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="The fraction of its value that a known super weight may have lost.")
    ] = 0.25,
    weights: WeightsOption = None,
    variant: VariantOption = None,
    finite: Annotated[bool, typer.Option("--finite", help="Also search all values for NaN and infinities.")] = False,
    signature: Annotated[
        Path | None, typer.Option(help="Also check this signature of the checkpoint; needs --public-key.")
    ] = None,
    public_key: Annotated[Path | None, typer.Option(help="The signer's public key, a PEM file.")] = None,
    format: FormatOption = "text",
    file: ReportFile = None,
) -> None:
    """Prove that a patched checkpoint is its base with exactly the declared scalars changed. Exit 1 if it is not."""
    from swsurgery.hub import parse_location
    from swsurgery.verifying import verify

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
    with open_for_reading(checkpoint, out) as where:
        refuse_replacing(file, [where, parse_location(base) if base else None, manifest, signature, public_key])
        report = verify.verify_checkpoint(where, question, out.make_bar()).report(checkpoint)
    _write_findings(out, report, format, file)


@command
def lint(
    out: Output,
    manifests: Annotated[list[Path], typer.Argument(help="Manifests (YAML or JSON).", show_default=False)],
    strict: Annotated[bool, typer.Option("--strict", help="Treat warnings as errors.")] = False,
    format: FormatOption = "text",
    file: ReportFile = None,
) -> None:
    """Find mistakes in manifests, offline and without a checkpoint. Exit 1 if there are any."""
    from swsurgery.verifying.lint import lint as run

    refuse_replacing(file, manifests)
    _write_findings(out, run(manifests, strict), format, file)


def _write_findings(out: Output, report: FindingReport, form: Format, file: Path | None) -> None:
    """Print the findings or write them to a file. Raises typer.Exit if the exit code is not 0."""
    from swsurgery.storage import filesystem
    from swsurgery.verifying import formats

    text = formats.render(report, "json" if out.json else form)
    if file is None:
        print_text(text)
    else:
        filesystem.write_report(file, text.encode())
        out.note(f"{pluralise(report.errors, 'finding')} in {file}")
    if report.exit_code:
        raise typer.Exit(report.exit_code)


@command
def sign(
    out: Output,
    checkpoint: DirectoryArgument,
    key: Annotated[Path, typer.Option(help="Your private key, a PEM file that only you can read.", show_default=False)],
    signature: Annotated[
        Path | None, typer.Option(help="The signature's file; by default model.sig in the checkpoint.")
    ] = None,
) -> None:
    """Sign every file of a checkpoint with a private key."""
    from swsurgery.hub import parse_directory
    from swsurgery.verifying import signature as signature_module

    root = parse_directory(checkpoint)
    written = signature_module.sign(root, key, signature)
    report_done(f"the signature was written: {written}")
    if out.json:
        print_json({"checkpoint": str(root), "signature": str(written)})
    else:
        print_text(f"signed    {escape_control(str(root))}")
        print_text(f"signature {escape_control(str(written))}")
