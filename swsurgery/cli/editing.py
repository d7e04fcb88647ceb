"""Commands that edit checkpoints and check edited ones: apply, revert, check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from swsurgery.cli.options import (
    BaseOption,
    CheckpointArgument,
    DeviceOption,
    DirectoryArgument,
    MaxRatio,
    MinRatio,
    PlacementOption,
    PromptOption,
    TextOption,
    VariantOption,
    WeightsOption,
    WindowOption,
    WindowsOption,
    command,
    describe_traffic,
    make_bounds,
    read_text,
)
from swsurgery.cli.output import Output, print_json, print_text
from swsurgery.errors import SwsurgeryError, escape_control


@command
def apply(
    out: Output,
    manifest: Annotated[
        Path, typer.Argument(help="A manifest (YAML or JSON), or a patch that export wrote.", show_default=False)
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
    device: DeviceOption = "auto",
    placement: PlacementOption = "auto",
    text: TextOption = None,
    windows: WindowsOption = 16,
    window: WindowOption = 512,
    prompt: PromptOption = None,
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
) -> None:
    """Apply a manifest: write a patched checkpoint, checked and with its record, or nothing."""
    from swsurgery.cli import show
    from swsurgery.editing import apply, sanity

    if dry_run:
        _print_plan(out, manifest, base)
        return
    bounds = make_bounds(max_perplexity_ratio, min_perplexity_ratio)
    options = sanity.CheckOptions(check, device, placement, read_text(text), prompt or None, bounds, windows, window)
    if in_place:
        from swsurgery.editing import in_place as in_place_module

        if directory or link != "auto" or reuse_digests or for_publish:
            raise SwsurgeryError(
                "--in-place writes no copy, so it cannot be combined with -o, --link, --reuse-digests or --for-publish"
            )
        outcome = in_place_module.apply_in_place(
            manifest, base=base, check=options, progress=out.make_bar(), say=out.note
        )
    else:
        outcome = apply.apply_manifest(
            manifest,
            directory or Path.cwd() / manifest.stem,
            base=base,
            link=link,
            check=options,
            reuse_digests=reuse_digests,
            for_publish=for_publish,
            progress=out.make_bar(),
            say=out.note,
        )
    out.print_result(outcome, show.show_outcome)


def _print_plan(out: Output, manifest: Path, base: str | None) -> None:
    from swsurgery.cli import show
    from swsurgery.editing.apply import plan_manifest
    from swsurgery.hub import RemoteTree

    plan = plan_manifest(manifest, base, progress=out.make_bar())
    if isinstance(plan.checkpoint.root, RemoteTree):
        out.note(describe_traffic(plan.checkpoint.root))
    if out.json:
        print_json({"output": None, **plan.to_json(), "check": None})
    else:
        show.show_plan(plan)


@command
def revert(
    out: Output,
    checkpoint: DirectoryArgument,
    directory: Annotated[
        Path | None, typer.Option("-o", "--output", help="A new directory for the base; by default, undo in place.")
    ] = None,
    link: Annotated[Literal["auto", "clone", "copy"], typer.Option(help="How files are copied, with -o.")] = "auto",
) -> None:
    """Restore the base of a patched checkpoint, byte for byte."""
    from swsurgery.hub import parse_directory

    patched = parse_directory(checkpoint)
    if directory is None:
        from swsurgery.editing.in_place import revert_in_place

        if link != "auto":
            raise SwsurgeryError("--link needs -o")
        notes = revert_in_place(patched, out.make_bar())
    else:
        from swsurgery.editing import revert

        notes = revert.revert(patched, directory, link=link, progress=out.make_bar())
    written = directory or patched
    if out.json:
        print_json({"output": str(written), "notes": notes})
    else:
        print_text(f"{escape_control(str(written))}: every file has the same bytes as before the manifest was applied")
        for note in notes:
            out.note(note)


@command
def check(
    out: Output,
    checkpoint: CheckpointArgument,
    text: TextOption = None,
    windows: WindowsOption = 16,
    window: WindowOption = 512,
    prompt: PromptOption = None,
    max_perplexity_ratio: MaxRatio = None,
    min_perplexity_ratio: MinRatio = None,
    weights: WeightsOption = None,
    variant: VariantOption = None,
    device: DeviceOption = "auto",
    placement: PlacementOption = "auto",
) -> None:
    """Run a patched checkpoint and its base on the same text. Exit 1 if a bound is not met.

    A checkpoint without a record is run alone: nothing is compared, and bounds are an error.
    """
    from swsurgery.cli import show
    from swsurgery.editing import sanity
    from swsurgery.hub import Uri, download_checkpoint, open_location, parse_location

    bounds = make_bounds(max_perplexity_ratio, min_perplexity_ratio)
    options = sanity.CheckOptions(
        "forward", device, placement, read_text(text), prompt or None, bounds, windows, window
    )
    where = parse_location(checkpoint)
    if isinstance(where, Uri):
        sanity.refuse_bounds_without_base(open_location(where), bounds)
    report = sanity.check_checkpoint(download_checkpoint(where), options, out.make_bar(), out.note, weights, variant)
    document = report.to_json() | {"compared": report.compared}
    if out.json:
        print_json(document)
    else:
        show.show_check(document)
    if not report.ok:
        raise typer.Exit(1)
