"""Commands that find super weights and measure the effect of scaling them: scan, sweep."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

import typer

from swsurgery.cli.options import (
    ActivationBitsOption,
    ActivationPerOption,
    BaseOption,
    ControlOption,
    DeviceOption,
    LimitOption,
    PageOption,
    PlacementOption,
    PlotOption,
    TasksDirOption,
    TasksOption,
    TextOption,
    VariantOption,
    WeightsOption,
    read_text,
    split_tasks,
    table_command,
)
from swsurgery.cli.output import Output
from swsurgery.cli.pages import refuse_page, write_page
from swsurgery.cli.protocol_options import (
    NAMES,
    BosOption,
    ProtocolOption,
    ScoreFirstOption,
    StrideOption,
    WindowOption,
    WindowsOption,
    list_words,
    read_protocol,
)
from swsurgery.errors import Interrupted, SwsurgeryError, report_done


@table_command
def scan(
    out: Output,
    checkpoint: Annotated[str, typer.Argument(help="A directory, or hf://ORG/NAME[@REV].", show_default=False)],
    method: Annotated[
        Literal["activations", "weights", "experts"],
        typer.Option(help="Run prompts through the model, read the weights only, or find super experts by prompts."),
    ] = "activations",
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt to run; may be repeated.")] = None,
    confirm: Annotated[bool, typer.Option("--confirm", help="Measure the effect of zeroing each candidate.")] = False,
    manifest: Annotated[
        Path | None, typer.Option(help="Write a manifest of the super weights and needed parts.")
    ] = None,
    op: Annotated[
        Literal["zero", "scale", "protect"], typer.Option(help="The operation in the manifest that --manifest writes.")
    ] = "zero",
    factor: Annotated[float | None, typer.Option(help="The factor for --op scale.")] = None,
    plot: PlotOption = None,
    page: PageOption = None,
    register: Annotated[
        str | None, typer.Option(help="Save the result, so that lookup finds it under this name.")
    ] = None,
    weights: WeightsOption = None,
    variant: VariantOption = None,
    text: Annotated[
        Path | None, typer.Option(help="A file with the text to confirm on, instead of the built-in passage.")
    ] = None,
    protocol: ProtocolOption = "default",
    windows: WindowsOption = None,
    window: WindowOption = None,
    stride: StrideOption = None,
    bos: BosOption = None,
    score_first: ScoreFirstOption = None,
    device: DeviceOption = "auto",
    placement: PlacementOption = "auto",
) -> None:
    """Find the super weights of a checkpoint. Exit 2 if none was found but some layers could not be read."""
    from swsurgery.cli import show_experts, show_scan
    from swsurgery.scanning import scan
    from swsurgery.scanning.expert_report import ExpertScan
    from swsurgery.scanning.report import Scan

    def show(report: Scan) -> None:
        if isinstance(report, ExpertScan):
            show_experts.show_experts(report)
        else:
            show_scan.show_scan(report)

    _refuse_idle(out.given, method, confirm, manifest)
    refuse_page(page, checkpoint, manifest, text)
    measured = read_protocol(out, protocol, windows, window, stride, bos, score_first)
    try:
        found = scan.scan(
            checkpoint,
            method=method,
            prompts=prompt or None,
            confirm=confirm,
            manifest=manifest,
            op=op,
            factor=factor,
            plot=plot,
            register=register,
            command=_scan_command(method, prompt, list_words(measured, text) if confirm else [], weights, variant),
            weights=weights,
            variant=variant,
            text=read_text(text),
            **measured,
            device=device,
            placement=placement,
            reporter=out.make_reporter(),
        )
    except (SwsurgeryError, Interrupted) as error:
        if isinstance(error.result, Scan):  # the scan took long, and only writing a file failed
            out.print_result(error.result, show)
        raise
    out.print_result(found, show)
    write_page(out, page, "scan", checkpoint, found.to_json())
    if found.answer == "undecided":
        what = "super expert" if method == "experts" else "super weight"
        out.note(f"undecided: some layers were not read, and no {what} was found in the others")
        raise typer.Exit(2)


@table_command
def sweep(
    out: Output,
    manifest: Annotated[Path, typer.Argument(help="A manifest (YAML or JSON) with the scalars.", show_default=False)],
    factors: Annotated[
        str, typer.Option(help="Factors separated by commas, such as 0,0.5,1,1.5,2.", show_default=False)
    ],
    base: BaseOption = None,
    plot: PlotOption = None,
    page: PageOption = None,
    text: TextOption = None,
    protocol: ProtocolOption = "default",
    windows: WindowsOption = None,
    window: WindowOption = None,
    stride: StrideOption = None,
    bos: BosOption = None,
    score_first: ScoreFirstOption = None,
    device: DeviceOption = "auto",
    placement: PlacementOption = "auto",
) -> None:
    """Multiply the scalars of a manifest by each factor, and measure the model's quality."""
    from swsurgery.cli import show_scan
    from swsurgery.scanning import sweep

    refuse_page(page, base, text, manifests=[manifest])
    report = sweep.sweep(
        manifest,
        parse_numbers(factors),
        base,
        plot=plot,
        text=read_text(text),
        **read_protocol(out, protocol, windows, window, stride, bos, score_first),
        device=device,
        placement=placement,
        reporter=out.make_reporter(),
    )
    if plot:
        report_done(f"figure: {plot}")
    out.print_result(report, show_scan.show_sweep)
    write_page(out, page, "sweep", str(manifest), report.to_json())


@table_command
def compare(
    out: Output,
    manifests: Annotated[list[Path], typer.Argument(help="Manifests of one base.", show_default=False)],
    base: BaseOption = None,
    plot: PlotOption = None,
    page: PageOption = None,
    text: TextOption = None,
    protocol: ProtocolOption = "default",
    windows: WindowsOption = None,
    window: WindowOption = None,
    stride: StrideOption = None,
    bos: BosOption = None,
    score_first: ScoreFirstOption = None,
    device: DeviceOption = "auto",
    placement: PlacementOption = "auto",
    activation_bits: ActivationBitsOption = None,
    activation_per: ActivationPerOption = "tensor",
    control: ControlOption = None,
    tasks: TasksOption = None,
    tasks_dir: TasksDirOption = None,
    limit: LimitOption = None,
) -> None:
    """Measure a base and the result of each manifest in one run, without writing a checkpoint."""
    from swsurgery.cli import show_scan
    from swsurgery.scanning.compare import compare

    refuse_page(page, base, text, manifests=manifests)
    report = compare(
        manifests,
        base,
        plot=plot,
        text=read_text(text),
        **read_protocol(out, protocol, windows, window, stride, bos, score_first),
        device=device,
        placement=placement,
        activation_bits=activation_bits,
        activation_per=activation_per,
        controls=control,
        tasks=split_tasks(tasks),
        tasks_dir=tasks_dir,
        limit=limit,
        reporter=out.make_reporter(),
    )
    if plot:
        report_done(f"figure: {plot}")
    out.print_result(report, show_scan.show_comparison)
    write_page(out, page, "compare", report.base, report.to_json())


def parse_numbers(text: str) -> list[float]:
    """Parse numbers separated by commas, such as "0,0.5,1". Raises SwsurgeryError for any other text."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise SwsurgeryError(
            "factors must be numbers separated by commas", repr(text), "write them like 0,0.5,1,1.5,2"
        ) from None


def _refuse_idle(given: Collection[str], method: str, confirm: bool, manifest: Path | None) -> None:
    """Raise SwsurgeryError if the user gave an option that has no effect without another one, which is missing."""
    runs = method in ("activations", "experts")
    for option, used, beside in (
        ("prompt", runs, "--method activations or experts"),
        ("device", runs or confirm, "--method activations or experts, or --confirm"),
        ("placement", runs or confirm, "--method activations or experts, or --confirm"),
        ("text", confirm, "--confirm"),
        *((name, confirm, "--confirm") for name in ("protocol", *NAMES)),
        ("op", manifest is not None, "--manifest"),
        ("factor", manifest is not None, "--manifest"),
    ):
        if option in given and not used:
            raise SwsurgeryError(f"--{option.replace('_', '-')} needs {beside}")


def _scan_command(
    method: str, prompts: list[str] | None, confirmed: list[str], weights: str | None, variant: str | None
) -> str:
    """Return the command that repeats a scan. `confirmed` contains the options of its causal test, if there was one.

    The word CHECKPOINT stands for the path of the checkpoint. Options for the device are left out.
    """
    words = ["swsurgery", "scan", "CHECKPOINT", "--method", method]
    for prompt in prompts or ():
        words += ["--prompt", shlex.quote(prompt)]
    if confirmed:
        words += ["--confirm", *confirmed]
    if weights is not None:
        words += ["--weights", weights]
    if variant is not None:
        words += ["--variant", variant]
    return " ".join(words)
