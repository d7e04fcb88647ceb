"""Commands that edit checkpoints, undo edits and check the result: apply, revert, check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from swsurgery.cli.options import (
    ActivationBitsOption,
    ActivationPerOption,
    BaseOption,
    CheckpointArgument,
    ControlOption,
    DeviceOption,
    DirectoryArgument,
    GenerateOption,
    LimitOption,
    MaxRatio,
    MinRatio,
    PageOption,
    PlacementOption,
    PromptOption,
    TasksDirOption,
    TasksOption,
    TextOption,
    VariantOption,
    WeightsOption,
    command,
    read_text,
    split_tasks,
    table_command,
)
from swsurgery.cli.output import Output, print_text
from swsurgery.cli.pages import refuse_page, write_page
from swsurgery.cli.protocol_options import (
    NAMES,
    BosOption,
    ProtocolOption,
    ScoreFirstOption,
    StrideOption,
    WindowOption,
    WindowsOption,
    read_protocol,
)
from swsurgery.errors import CheckFailed, SwsurgeryError, escape_control


@command
def apply(
    out: Output,
    manifest: Annotated[
        list[Path],
        typer.Argument(
            help="A manifest (YAML or JSON), or a patch that export wrote. Several for one base are merged.",
            show_default=False,
        ),
    ],
    base: BaseOption = None,
    directory: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The new directory; by default ./NAME for a manifest NAME.yaml."),
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Edit the base itself. Writes a few bytes, and a journal to undo them.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    link: Annotated[
        Literal["auto", "clone", "copy", "hard"],
        typer.Option(help="How files are copied: auto clones if the file system can, and copies otherwise."),
    ] = "auto",
    check: Annotated[
        Literal["auto", "off", "weights", "forward"],
        typer.Option(help="The sanity check; auto runs the model if torch is installed."),
    ] = "auto",
    undo_limit: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="Store the old bytes of rows, experts and tensors in an undo file of at most this size, such as 2GB. "
            "Undoing a larger edit needs the base.",
        ),
    ] = "256MB",
    device: DeviceOption = "auto",
    placement: PlacementOption = "auto",
    text: TextOption = None,
    protocol: ProtocolOption = "default",
    windows: WindowsOption = None,
    window: WindowOption = None,
    stride: StrideOption = None,
    bos: BosOption = None,
    score_first: ScoreFirstOption = None,
    prompt: PromptOption = None,
    generate: GenerateOption = 0,
    control: ControlOption = None,
    max_perplexity_ratio: MaxRatio = None,
    min_perplexity_ratio: MinRatio = None,
    for_publish: Annotated[
        bool, typer.Option("--for-publish", help="Download only those files of the base that publish needs.")
    ] = False,
    reuse_digests: Annotated[
        bool,
        typer.Option(
            "--reuse-digests",
            help="Use earlier digests of unedited files instead of hashing them; the record marks them as unverified.",
        ),
    ] = False,
    page: PageOption = None,
) -> None:
    """Apply manifests: write a patched checkpoint with its record, or nothing if any step fails."""
    from swsurgery.cli import show
    from swsurgery.editing import apply, check_options
    from swsurgery.editing.rejected import Rejected
    from swsurgery.storage.numbers import parse_size

    limit, subject = parse_size(undo_limit), ", ".join(map(str, manifest))
    refuse_page(page, base, directory, manifests=manifest)
    if dry_run:
        planned = apply.plan(manifest, base, in_place=in_place, undo_limit=limit, reporter=out.make_reporter())
        out.print_result(planned, lambda plan: show.show_plan(plan, limit))
        write_page(out, page, "apply", subject, planned.to_json())
        return
    bounds = check_options.make_bounds(max_perplexity_ratio, min_perplexity_ratio)
    if check in ("off", "weights") and "generate" not in out.given:
        generate = 0  # a variable asks for it, but this check generates nothing
    asked = not out.given.isdisjoint(
        ("device", "placement", "text", "prompt", "generate", "control", "protocol", *NAMES)
    )
    options = check_options.CheckOptions(
        check,
        device,
        placement,
        read_text(text),
        prompt or None,
        bounds,
        generate=generate,
        controls=control or (),
        required=asked,
        **read_protocol(out, protocol, windows, window, stride, bos, score_first),
    )
    try:
        applied = apply.apply(
            manifest,
            base,
            directory,
            in_place=in_place,
            link=link,
            check=options,
            reuse_digests=reuse_digests,
            for_publish=for_publish,
            undo_limit=limit,
            reporter=out.make_reporter(),
        )
    except CheckFailed as error:
        if isinstance(error.result, Rejected):
            write_page(out, page, "apply", subject, error.result.to_json())
        raise
    out.print_result(applied, show.show_applied)
    write_page(out, page, "apply", subject, applied.to_json())


@command
def revert(
    out: Output,
    checkpoint: DirectoryArgument,
    directory: Annotated[
        Path | None, typer.Option("-o", "--output", help="A new directory for the base; by default, undo in place.")
    ] = None,
    link: Annotated[Literal["auto", "clone", "copy"], typer.Option(help="How files are copied, with -o.")] = "auto",
    base: Annotated[
        str | None,
        typer.Option(help="The base, with -o: needed only if the old bytes exceeded the limit of the undo file."),
    ] = None,
) -> None:
    """Restore the base of a patched checkpoint, byte for byte."""
    from swsurgery.cli import show
    from swsurgery.editing import revert

    reverted = revert.revert(checkpoint, directory, link=link, base=base, reporter=out.make_reporter())
    out.print_result(reverted, show.show_reverted)
    if not out.json:
        for note in reverted.notes:
            out.note(note)


@table_command
def check(
    out: Output,
    checkpoint: CheckpointArgument,
    text: TextOption = None,
    protocol: ProtocolOption = "default",
    windows: WindowsOption = None,
    window: WindowOption = None,
    stride: StrideOption = None,
    bos: BosOption = None,
    score_first: ScoreFirstOption = None,
    prompt: PromptOption = None,
    max_perplexity_ratio: MaxRatio = None,
    min_perplexity_ratio: MinRatio = None,
    weights: WeightsOption = None,
    variant: VariantOption = None,
    device: DeviceOption = "auto",
    placement: PlacementOption = "auto",
    base: Annotated[
        str | None,
        typer.Option(help="Compare with this checkpoint of the same architecture, instead of the record's base."),
    ] = None,
    generate: GenerateOption = 0,
    activation_bits: ActivationBitsOption = None,
    activation_per: ActivationPerOption = "tensor",
    control: ControlOption = None,
    tasks: TasksOption = None,
    tasks_dir: TasksDirOption = None,
    limit: LimitOption = None,
    page: PageOption = None,
) -> None:
    """Run a patched checkpoint and its base on the same text. Exit 1 if a bound is not met.

    With --base, any two checkpoints of one architecture are compared. Without it, a checkpoint that has no record is
    run alone: it is compared with nothing, so a bound is an error. --csv and --latex print the scores of --tasks.
    """
    from swsurgery.cli import show
    from swsurgery.editing import sanity

    if out.table is not None and tasks is None:
        raise SwsurgeryError(f"--{out.table} prints the scores of tasks", remedy="name them with --tasks")
    refuse_page(page, checkpoint, base, text)
    report = sanity.check(
        checkpoint,
        text=read_text(text),
        prompts=prompt or None,
        **read_protocol(out, protocol, windows, window, stride, bos, score_first),
        max_perplexity_ratio=max_perplexity_ratio,
        min_perplexity_ratio=min_perplexity_ratio,
        weights=weights,
        variant=variant,
        device=device,
        placement=placement,
        base=base,
        generate=generate,
        activation_bits=activation_bits,
        activation_per=activation_per,
        controls=control,
        tasks=split_tasks(tasks),
        tasks_dir=tasks_dir,
        limit=limit,
        reporter=out.make_reporter(),
    )
    if out.table is not None and report.tasks is not None:
        out.print_result(report.tasks, lambda found: None)
    else:
        out.print_result(report, lambda report: show.show_check(report.to_json()))
    write_page(out, page, "check", checkpoint, report.to_json())
    if not report.ok:
        raise typer.Exit(1)


@command
def pin(
    out: Output,
    manifest: Annotated[Path, typer.Argument(help="A manifest (YAML or JSON).", show_default=False)],
    base: BaseOption = None,
    file: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the manifest to this file, instead of replacing it.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the manifest and write nothing.")] = False,
) -> None:
    """Fill in what a manifest lacks to identify its base: revision, sha256 and expect. Keeps comments."""
    from swsurgery.editing.pin import Pinned, pin

    def show(pinned: Pinned) -> None:
        if dry_run:
            print_text(pinned.text)
            return
        for name in pinned.added:
            print_text(f"added     {escape_control(name)}")
        print_text(f"wrote     {escape_control(str(pinned.output))}" if pinned.added or file else "nothing was missing")

    out.print_result(pin(manifest, base, file, dry_run=dry_run, reporter=out.make_reporter()), show)
