"""Commands that read and write checkpoints: apply, revert, inspect, diff, schema.

Each calls one library function and prints the result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from swsurgery.cli import output
from swsurgery.cli.options import (
    CheckpointArgument,
    Debug,
    DeviceOption,
    DirectoryArgument,
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
    describe_traffic,
    ignore_message,
    make_bounds,
    open_for_reading,
    read_text,
)
from swsurgery.errors import SwsurgeryError, escape_control


def apply(
    manifest: Annotated[
        Path, typer.Argument(help="The manifest, YAML or JSON; or a patch that export wrote.", show_default=False)
    ],
    base: Annotated[
        str | None, typer.Option(help="The base, instead of the manifest's: a directory or hf://ORG/NAME[@REV].")
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The patched checkpoint; else a folder here named after the manifest."),
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Edit the base itself, under a journal; only a few bytes are written.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    link: Annotated[
        Literal["auto", "clone", "copy", "hard"],
        typer.Option(help="How files get over: auto clones where the file system can, and copies otherwise."),
    ] = "auto",
    check: Annotated[
        Literal["auto", "off", "weights", "forward"],
        typer.Option(help="The sanity check: auto runs the model where torch is installed."),
    ] = "auto",
    device: DeviceOption = "auto",
    placement: PlacementOption = "auto",
    text: Text = None,
    windows: Windows = 16,
    window: Window = 512,
    prompt: Prompt = None,
    max_perplexity_ratio: MaxRatio = None,
    min_perplexity_ratio: MinRatio = None,
    for_publish: Annotated[
        bool, typer.Option("--for-publish", help="Of a base on the Hub download only what publishing needs here.")
    ] = False,
    reuse_digests: Annotated[
        bool,
        typer.Option(
            "--reuse-digests", help="Do not hash untouched files hashed before; the record marks them as unverified."
        ),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Apply a manifest: write the patched checkpoint, checked, with its registry; or write nothing."""
    from swsurgery.cli import show
    from swsurgery.editing import apply, sanity

    if dry_run:
        from swsurgery.hub import Repo

        plan = apply.plan_manifest(manifest, base, progress=output.Bar(quiet))
        if isinstance(plan.checkpoint.root, Repo) and not quiet:
            output.say(describe_traffic(plan.checkpoint.root))
        output.print_json({"output": None, **plan.to_json(), "check": None}) if json else show.show_plan(plan)
        return
    options = sanity.CheckOptions(
        check,
        device,
        placement,
        read_text(text),
        prompt or None,
        make_bounds(max_perplexity_ratio, min_perplexity_ratio),
        windows,
        window,
    )
    bar, say = output.Bar(quiet), ignore_message if quiet else output.say
    if in_place:
        from swsurgery.editing import in_place as in_place_module

        if directory or link != "auto" or reuse_digests or for_publish:
            raise SwsurgeryError(
                "--in-place writes no copy, so it goes with no -o, --link, --reuse-digests or --for-publish"
            )
        outcome = in_place_module.apply_in_place(manifest, base=base, check=options, progress=bar, say=say)
    else:
        target = directory or Path.cwd() / manifest.stem
        outcome = apply.apply_manifest(
            manifest,
            target,
            base=base,
            link=link,
            check=options,
            reuse_digests=reuse_digests,
            for_publish=for_publish,
            progress=bar,
            say=say,
        )
    output.print_json(outcome.to_json()) if json else show.show_outcome(outcome)


def revert(
    checkpoint: DirectoryArgument,
    directory: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where the base is written; else it is put back in place.")
    ] = None,
    link: Annotated[Literal["auto", "clone", "copy"], typer.Option(help="How files get over.")] = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Give the base of a patched checkpoint back, byte for byte."""
    if directory is None:
        from swsurgery.editing import in_place as in_place_module

        if link != "auto":
            raise SwsurgeryError("--link goes with -o")
        notes = in_place_module.revert_in_place(checkpoint, output.Bar(quiet))
    else:
        from swsurgery.editing import revert

        notes = revert.revert(checkpoint, directory, link=link, progress=output.Bar(quiet))
    written = directory or checkpoint
    if json:
        output.print_json({"output": str(written), "notes": notes})
    else:
        output.print_text(
            f"{escape_control(str(written))}: every file has the bytes again that it had before the manifest"
        )
        for note in notes if not quiet else ():
            output.say(note)


def inspect(
    checkpoint: CheckpointArgument,
    tensor: Annotated[str | None, typer.Option(help="Only this tensor.")] = None,
    at: Annotated[str | None, typer.Option(help="One scalar of it: its index, such as 3968,7003.")] = None,
    weights: WeightsOption = None,
    variant: VariantOption = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """List files and tensors, or print one scalar with its bits."""
    from swsurgery.checkpoint import inspect
    from swsurgery.cli import show

    with open_for_reading(checkpoint, quiet) as where:
        if tensor is None and at is None:
            document = inspect.inspect_files(where, weights, variant)
            output.print_json(document) if json else show.show_files(document)
        else:
            document = inspect.inspect_tensor(where, tensor, at, weights, variant)
            output.print_json(document) if json else show.show_tensor(document)


def diff(
    a: CheckpointArgument,
    b: Annotated[str, typer.Argument(help="Another one.", show_default=False)],
    weights: WeightsOption = None,
    variant: VariantOption = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Name every scalar in which two checkpoints differ. Exit 1 where they do."""
    from swsurgery.cli import show
    from swsurgery.storage import numeric

    numeric.load_numpy()
    from swsurgery.checkpoint.diff import diff as run
    from swsurgery.checkpoint.opening import open_chosen

    with open_for_reading(a, quiet) as first, open_for_reading(b, quiet) as second:
        difference = run(open_chosen(first, weights, variant), open_chosen(second, weights, variant), output.Bar(quiet))
    output.print_json(difference.to_json()) if json else show.show_difference(difference)
    if not difference.same:
        raise typer.Exit(1)


def schema(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Print the JSON Schema of manifests; it is JSON with --json and without."""
    from swsurgery.manifest import schema

    output.print_json(schema.render_schema())
