"""Commands that check checkpoints and manifests: verify, lint, sign.

Each calls one function of `verifying` and prints the result. Must not contain any check itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from swsurgery.cli import output
from swsurgery.cli.options import (
    CheckpointArgument,
    Debug,
    DirectoryArgument,
    Json,
    Quiet,
    VariantOption,
    WeightsOption,
    open_for_reading,
    refuse_replacing,
)
from swsurgery.errors import escape_control, report_done

if TYPE_CHECKING:
    from swsurgery.hub import Uri
    from swsurgery.verifying.formats import FindingReport

FormatOption = Annotated[
    Literal["text", "json", "junit", "sarif", "github"], typer.Option(help="How the findings are written.")
]
ReportFile = Annotated[Path | None, typer.Option("--output", help="Write them to this file instead of stdout.")]


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
    format: FormatOption = "text",
    file: ReportFile = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Prove that a patched checkpoint is its base with exactly the declared scalars changed. Exit 1 where it is not."""
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
    with open_for_reading(checkpoint, quiet) as where, _hold_base(base) as base_root:
        refuse_replacing(file, [where, base_root, manifest, signature, public_key])
        report = verify.verify_checkpoint(where, question, output.Bar(quiet)).report(checkpoint)
    _write_findings(report, "json" if json else format, file, quiet)


@contextlib.contextmanager
def _hold_base(base: str | None) -> Iterator[Path | Uri | None]:
    """Keep a base directory from being edited in place within the block."""
    from swsurgery.checkpoint.opening import held
    from swsurgery.hub import parse_location

    root = parse_location(base) if base else None
    with held(root) if isinstance(root, Path) else contextlib.nullcontext():
        yield root


def lint(
    manifests: Annotated[list[Path], typer.Argument(help="Manifests, YAML or JSON.", show_default=False)],
    strict: Annotated[bool, typer.Option("--strict", help="Let a warning be a finding too.")] = False,
    format: FormatOption = "text",
    file: ReportFile = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Find what is wrong with manifests, offline and without a checkpoint. Exit 1 where something is."""
    from swsurgery.verifying.lint import lint as run

    refuse_replacing(file, manifests)
    _write_findings(run(manifests, strict), "json" if json else format, file, quiet)


def _write_findings(
    report: FindingReport, form: Literal["text", "json", "junit", "sarif", "github"], file: Path | None, quiet: bool
) -> None:
    """Print the findings or write them to a file. Raises typer.Exit if the exit code is not 0."""
    from swsurgery.storage import filesystem
    from swsurgery.verifying import formats

    text = formats.render(report, form)
    if file is None:
        output.print_text(text)
    else:
        filesystem.write_report(file, text.encode())
        if not quiet:
            output.say(f"{report.errors} findings in {file}")
    if report.exit_code:
        raise typer.Exit(report.exit_code)


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
    output.print_text(f"signed    {escape_control(str(checkpoint))}")
    output.print_text(f"signature {escape_control(str(written))}")
