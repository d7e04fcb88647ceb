"""Commands that read and compare checkpoints: inspect, diff."""

from __future__ import annotations

from typing import Annotated

import typer

from swsurgery.cli.options import ReadableArgument, VariantOption, WeightsOption, table_command
from swsurgery.cli.output import Output


@table_command
def inspect(
    out: Output,
    checkpoint: ReadableArgument,
    tensor: Annotated[str | None, typer.Option(help="Print only this tensor.")] = None,
    at: Annotated[
        str | None, typer.Option(help="Print one scalar of the tensor: its index, such as 3968,7003.")
    ] = None,
    weights: WeightsOption = None,
    variant: VariantOption = None,
) -> None:
    """List files, tensors and the manifests that were applied, or print one scalar with its bits."""
    from swsurgery.checkpoint import inspect
    from swsurgery.checkpoint.checkpoint import Checkpoint
    from swsurgery.cli import show

    found = inspect.inspect(checkpoint, tensor, at, weights=weights, variant=variant, reporter=out.make_reporter())
    show_document = show.show_files if isinstance(found, Checkpoint) else show.show_tensor
    out.print_result(found, lambda found: show_document(found.to_json()))


@table_command
def diff(
    out: Output,
    a: ReadableArgument,
    b: Annotated[str, typer.Argument(help="The checkpoint to compare A with.", show_default=False)],
    weights: WeightsOption = None,
    variant: VariantOption = None,
) -> None:
    """List every scalar in which two checkpoints differ. Exit 1 if they differ."""
    from swsurgery.cli import show
    from swsurgery.storage import numeric

    numeric.load_numpy()
    from swsurgery.checkpoint import diff

    difference = diff.diff(a, b, weights=weights, variant=variant, reporter=out.make_reporter())
    out.print_result(difference, show.show_difference)
    if not difference.same:
        raise typer.Exit(1)
