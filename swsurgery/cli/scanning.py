"""Commands that find super weights and measure the effect of edits: lookup, scan, sweep, check.

Each calls one library function and prints the result.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from swsurgery.cli import output
from swsurgery.cli.options import (
    CheckpointArgument,
    Debug,
    DeviceOption,
    Json,
    MaxRatio,
    MinRatio,
    PlacementOption,
    Prompt,
    Quiet,
    Text,
    VariantOption,
    WeightsOption,
    Window,
    Windows,
    get_width,
    ignore_message,
    make_bounds,
    open_for_reading,
    read_text,
)
from swsurgery.errors import Interrupted, SwsurgeryError, escape_control, report_done


def lookup(
    model: Annotated[str, typer.Argument(help="A model's name, or a patched checkpoint.", show_default=False)],
    status: Annotated[list[str] | None, typer.Option(help="Only coordinates of this status; may be repeated.")] = None,
    manifest: Annotated[
        Literal["zero", "scale", "protect"] | None, typer.Option(help="Print a manifest that apply takes.")
    ] = None,
    factor: Annotated[float | None, typer.Option(help="The factor, with --manifest scale.")] = None,
    forget: Annotated[bool, typer.Option("--forget", help="Remove your own entry, which scan made.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show the known super weights of a model, your own scans included, or the registry of a patched checkpoint."""
    from swsurgery.known import own, shipped, table

    chosen = bool(status or manifest or factor is not None)
    if forget:
        if chosen:
            raise SwsurgeryError("--forget goes with no --status, --manifest or --factor")
        _forget(model, json)
        return
    is_checkpoint = model.startswith("hf://") or os.sep in model and Path(model).is_dir()
    if is_checkpoint or Path(model, "swsurgery.json").is_file():
        if chosen:
            raise SwsurgeryError("--status, --manifest and --factor go with a model's name, not a checkpoint", model)
        _show_record(model, json, quiet)
        return
    found = own.lookup(model)
    if factor is not None and manifest is None:
        raise SwsurgeryError("--factor goes with --manifest scale")
    if manifest:
        text = table.render_manifest(found, manifest, factor, status or None)
        if json:
            from swsurgery.manifest.load import parse_manifest

            loaded = parse_manifest(text.encode(), Path(f"{manifest}.yaml"))
            output.print_json(loaded.manifest.model_dump(mode="json", exclude_unset=True))
        else:
            output.print_text(text)
    elif json:
        output.print_json(shipped.to_json(found, status or None))
    else:
        output.print_text(table.render_table(found, get_width(), status or None))


def _forget(model: str, json: bool) -> None:
    from swsurgery.known import own

    removed = str(own.forget(model))
    report_done(f"the own entry was removed: {removed}")
    if json:
        output.print_json({"forgotten": removed})
    else:
        output.print_text(f"{escape_control(removed)}: removed, the shipped facts stay")


def _show_record(checkpoint: str, json: bool, quiet: bool) -> None:
    from swsurgery.checkpoint import record
    from swsurgery.cli import show

    with open_for_reading(checkpoint, quiet) as where:
        patched = record.read_records(where)
    document = patched.registry.model_dump(mode="json")
    output.print_json(document) if json else show.show_record(patched.registry)


def scan(
    context: typer.Context,
    checkpoint: Annotated[str, typer.Argument(help="A directory, or hf://ORG/NAME[@REV].", show_default=False)],
    method: Annotated[
        Literal["activations", "weights"], typer.Option(help="Run prompts, or look at the weights alone.")
    ] = "activations",
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt to run; may be repeated.")] = None,
    confirm: Annotated[bool, typer.Option("--confirm", help="Measure what zeroing each candidate does.")] = False,
    manifest: Annotated[Path | None, typer.Option(help="Write a manifest of what was found.")] = None,
    op: Annotated[Literal["zero", "scale", "protect"], typer.Option(help="What that manifest does.")] = "zero",
    factor: Annotated[float | None, typer.Option(help="The factor, with --op scale.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figure: .png, .svg or .pdf.")] = None,
    register: Annotated[str | None, typer.Option(help="Remember it: lookup finds it under this name.")] = None,
    weights: WeightsOption = None,
    variant: VariantOption = None,
    text: Annotated[Path | None, typer.Option(help="Text to confirm on, instead of the built-in passage.")] = None,
    windows: Annotated[
        int, typer.Option(min=1, help="Maximum number of windows to confirm on; a verdict needs 8.")
    ] = 16,
    window: Window = 512,
    device: DeviceOption = "auto",
    placement: PlacementOption = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Find the super weights of a checkpoint. Exit 2 if none was found and some layers could not be read."""
    from swsurgery.cli import show_scan
    from swsurgery.hub import download_checkpoint, parse_location
    from swsurgery.scanning import scan

    say = ignore_message if quiet else output.say
    _refuse_idle(context, method, confirm, manifest)
    command = _scan_command(method, prompt, confirm, text, windows, window, weights, variant)
    outputs = scan.Outputs(manifest, op, factor, plot, register, command)
    options = scan.RunOptions(device, placement, read_text(text), windows, window)
    where = download_checkpoint(parse_location(checkpoint))
    report = scan.scan_checkpoint(
        where,
        method,
        prompts=prompt or None,
        confirm=confirm,
        options=options,
        outputs=outputs,
        weights=weights,
        variant=variant,
        progress=output.Bar(quiet),
        say=say,
    )
    lines: list[str] = []
    try:
        scan.write_outputs(report, where, outputs, lines.append, weights, variant)
    except Interrupted as interrupted:
        if not lines:
            raise
        raise interrupted.leaving("what was written stays") from interrupted
    finally:  # print the result, which took long to compute, and the files written, even if writing failed
        report_done("; ".join(lines))
        output.print_json(report.to_json()) if json else show_scan.show_scan(report)
        for line in lines:
            say(line)
    if report.answer == "undecided":
        say("undecided: some layers were not read, and no super weight was found in the others")
        raise typer.Exit(2)


def sweep(
    manifest: Annotated[Path, typer.Argument(help="What to change, in YAML or JSON.", show_default=False)],
    factors: Annotated[str, typer.Option(help="Factors between commas, such as 0,0.5,1,1.5,2.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="The base: a directory or hf://ORG/NAME[@REV].")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figure: .png, .svg or .pdf.")] = None,
    text: Text = None,
    windows: Windows = 16,
    window: Window = 512,
    device: DeviceOption = "auto",
    placement: PlacementOption = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure quality as a function of the factor by which a manifest's scalars are scaled."""
    from swsurgery.cli import show_scan
    from swsurgery.scanning import scan

    report = scan.sweep_manifest(
        manifest,
        parse_numbers(factors),
        base=base,
        plot=plot,
        options=scan.RunOptions(device, placement, read_text(text), windows, window),
        progress=output.Bar(quiet),
        say=ignore_message if quiet else output.say,
    )
    report_done(f"figure: {plot}" if plot else None)
    output.print_json(report.to_json()) if json else show_scan.show_sweep(report)


def check(
    checkpoint: CheckpointArgument,
    text: Text = None,
    windows: Windows = 16,
    window: Window = 512,
    prompt: Prompt = None,
    max_perplexity_ratio: MaxRatio = None,
    min_perplexity_ratio: MinRatio = None,
    weights: WeightsOption = None,
    variant: VariantOption = None,
    device: DeviceOption = "auto",
    placement: PlacementOption = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run a patched checkpoint and its base side by side. Exit 1 where a bound is not held.

    A checkpoint without a registry is run alone: nothing is compared, and a bound is an error.
    """
    from swsurgery.cli import show
    from swsurgery.editing import sanity
    from swsurgery.hub import download_checkpoint, parse_location, place

    limits = make_bounds(max_perplexity_ratio, min_perplexity_ratio)
    options = sanity.CheckOptions(
        "forward", device, placement, read_text(text), prompt or None, limits, windows, window
    )
    where = parse_location(checkpoint)
    if not isinstance(where, Path):
        sanity.refuse_bounds_without_base(place(where), limits)
    report = sanity.check_checkpoint(
        download_checkpoint(where),
        options,
        output.Bar(quiet),
        ignore_message if quiet else output.say,
        weights,
        variant,
    )
    document = report.to_json() | {"compared": report.compared}
    output.print_json(document) if json else show.show_check(document)
    if not report.ok:
        raise typer.Exit(1)


def parse_numbers(text: str) -> list[float]:
    """Parse numbers separated by commas. Raises SwsurgeryError for anything else."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise SwsurgeryError("factors are numbers between commas", repr(text), "such as 0,0.5,1,1.5,2") from None


def _refuse_idle(context: typer.Context, method: str, confirm: bool, manifest: Path | None) -> None:
    """Raise SwsurgeryError for an option that has no effect with the other options."""
    activations = method == "activations"
    for option, used, beside in (
        ("prompt", activations, "--method activations"),
        ("device", activations or confirm, "--method activations or --confirm"),
        ("placement", activations or confirm, "--method activations or --confirm"),
        ("text", confirm, "--confirm"),
        ("windows", confirm, "--confirm"),
        ("window", confirm, "--confirm"),
        ("op", manifest is not None, "--manifest"),
        ("factor", manifest is not None, "--manifest"),
    ):
        source = context.get_parameter_source(option)
        if not used and source is not None and source.name == "COMMANDLINE":
            raise SwsurgeryError(f"--{option} goes with {beside}")


def _scan_command(
    method: str,
    prompts: list[str] | None,
    confirm: bool,
    text: Path | None,
    windows: int,
    window: int,
    weights: str | None,
    variant: str | None,
) -> str:
    """Return the command that repeats a scan, without paths and devices of this machine."""
    words = ["swsurgery", "scan", "CHECKPOINT", "--method", method]
    for prompt in prompts or ():
        words += ["--prompt", shlex.quote(prompt)]
    if confirm:
        words += ["--confirm", "--windows", str(windows)]
        words += ["--window", str(window)] if window != 512 else []
    if weights is not None:
        words += ["--weights", weights]
    if variant is not None:
        words += ["--variant", variant]
    if text is not None:
        words += ["--text", shlex.quote(text.name)]
    return " ".join(words)
