"""Commands that check checkpoints and manifests, and sign checkpoints: verify, preflight, lint, sign."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from swsurgery.cli.completion import complete_model
from swsurgery.cli.options import (
    DirectoryArgument,
    PageOption,
    ReadableArgument,
    VariantOption,
    WeightsOption,
    command,
    refuse_replacing,
)
from swsurgery.cli.output import Output, print_text
from swsurgery.cli.pages import refuse_page, write_page
from swsurgery.errors import escape_control, pluralise, report_done

if TYPE_CHECKING:
    from swsurgery.verifying.formats import FindingReport
    from swsurgery.verifying.signature import Signed

Format = Literal["text", "json", "junit", "sarif", "github"]
FormatOption = Annotated[Format, typer.Option(help="The format of the findings.")]
StrictOption = Annotated[bool, typer.Option("--strict", help="Treat warnings as errors.")]
ReportFile = Annotated[Path | None, typer.Option("--output", help="Write the findings to this file instead of stdout.")]


@command
def verify(
    out: Output,
    checkpoint: ReadableArgument,
    base: Annotated[
        str | None, typer.Option(help="Also compare byte by byte with this base: a directory or hf://ORG/NAME[@REV].")
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option(help="Prove that the checkpoint is exactly what this manifest makes from its base.")
    ] = None,
    known: Annotated[
        bool, typer.Option("--known", help="Check the known super weights of the model; needs no record.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="The known model that the checkpoint is made from, if it cannot be identified. Implies --known.",
            autocompletion=complete_model,
        ),
    ] = None,
    known_tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="The fraction of its value that a known super weight may have lost.")
    ] = 0.25,
    protected: Annotated[
        Path | None, typer.Option(help="Check that the scalars that this manifest protects kept their values.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="The relative difference that --protected permits, such as 0.01.")
    ] = 0.0,
    weights: WeightsOption = None,
    variant: VariantOption = None,
    finite: Annotated[bool, typer.Option("--finite", help="Also search all values for NaN and infinities.")] = False,
    values: Annotated[
        bool,
        typer.Option(
            "--values",
            help="Like --finite, and find constant or identical matrices, overflows of float16 and subnormal values.",
        ),
    ] = False,
    complete: Annotated[
        bool,
        typer.Option("--complete", help="Check that all layers, experts and tensors of config.json are there."),
    ] = False,
    transformers: Annotated[
        bool,
        typer.Option("--transformers", help="With --complete: compare with the model of transformers; loads torch."),
    ] = False,
    signature: Annotated[
        Path | None, typer.Option(help="Also check this signature of the checkpoint; needs --public-key.")
    ] = None,
    public_key: Annotated[Path | None, typer.Option(help="The signer's public key, a PEM file.")] = None,
    strict: StrictOption = False,
    format: FormatOption = "text",
    file: ReportFile = None,
    page: PageOption = None,
) -> None:
    """Prove that a patched checkpoint is its base with exactly the declared scalars changed. Exit 1 if it is not."""
    from swsurgery.hub import parse_location
    from swsurgery.verifying import verify

    inputs = [parse_location(each) for each in (checkpoint, base) if each is not None]
    refuse_replacing(file, [*inputs, manifest, protected, signature, public_key])
    manifests = [each for each in (manifest, protected) if each is not None]
    refuse_page(page, checkpoint, base, signature, public_key, file, manifests=manifests)
    verification = verify.verify(
        checkpoint,
        manifest=manifest,
        base=base,
        known=known,
        model=model,
        tolerance=known_tolerance,
        finite=finite,
        values=values,
        signature=signature,
        public_key=public_key,
        weights=weights,
        variant=variant,
        protected=protected,
        protected_tolerance=tolerance,
        complete=complete,
        transformers=transformers,
        strict=strict,
        reporter=out.make_reporter(),
    )
    _write_findings(out, verification, format, file)
    write_page(out, page, "verify", checkpoint, verification.to_json() | {"checked": verification.checked.splitlines()})
    _exit(verification)


@command
def preflight(
    out: Output,
    checkpoint: ReadableArgument,
    weights: WeightsOption = None,
    variant: VariantOption = None,
    format: FormatOption = "text",
    file: ReportFile = None,
) -> None:
    """Check that a checkpoint is complete, from headers and the index alone. Exit 1 if something is missing."""
    from swsurgery.hub import parse_location
    from swsurgery.verifying import preflight

    refuse_replacing(file, [parse_location(checkpoint)])
    report = preflight.preflight(checkpoint, weights=weights, variant=variant, reporter=out.make_reporter())
    _write_findings(out, report, format, file)
    _exit(report)


@command
def lint(
    out: Output,
    manifests: Annotated[
        list[Path], typer.Argument(help="Manifests (YAML or JSON), or folders of them.", show_default=False)
    ],
    strict: StrictOption = False,
    format: FormatOption = "text",
    file: ReportFile = None,
) -> None:
    """Find mistakes in manifests, offline and without a checkpoint. Exit 1 if there is a mistake."""
    from swsurgery.verifying import lint

    refuse_replacing(file, manifests)
    report = lint.lint(manifests, strict=strict, reporter=out.make_reporter())
    _write_findings(out, report, format, file)
    _exit(report)


def _write_findings(out: Output, report: FindingReport, form: Format, file: Path | None) -> None:
    """Print the findings, or write them to `file`."""
    from swsurgery.storage import filesystem
    from swsurgery.verifying import formats

    text = formats.render(report, "json" if out.json else form)
    out.printed = file is None
    if file is None:
        print_text(text)
    else:
        filesystem.write_report(file, text.encode())
        out.note(f"{pluralise(report.errors, 'finding')} in {file}")


def _exit(report: FindingReport) -> None:
    """Raise typer.Exit if the exit code of the report is not 0."""
    if report.exit_code:
        raise typer.Exit(report.exit_code)


@command
def sign(
    out: Output,
    checkpoint: DirectoryArgument,
    key: Annotated[Path, typer.Option(help="Your private key, a PEM file that only you can read.", show_default=False)],
    signature: Annotated[
        Path | None, typer.Option(help="The file to write the signature to; by default model.sig in the checkpoint.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace an earlier signature in this file.")] = False,
) -> None:
    """Sign every file of a checkpoint with a private key."""
    from swsurgery.verifying import signature as signature_module

    signed = signature_module.sign(checkpoint, key, signature, replace=replace, reporter=out.make_reporter())
    report_done(f"the signature was written: {signed.signature}")
    out.print_result(signed, _show_signed)


def _show_signed(signed: Signed) -> None:
    print_text(f"signed    {escape_control(str(signed.checkpoint))}")
    print_text(f"signature {escape_control(str(signed.signature))}")
