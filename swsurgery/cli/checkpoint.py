"""Commands that look at checkpoints: inspect, diff."""

from __future__ import annotations

from typing import Annotated

import typer

from swsurgery.cli.options import CheckpointArgument, VariantOption, WeightsOption, command, open_for_reading
from swsurgery.cli.output import Output, print_json


@command
def inspect(
    out: Output,
    checkpoint: CheckpointArgument,
    tensor: Annotated[str | None, typer.Option(help="Print only this tensor.")] = None,
    at: Annotated[
        str | None, typer.Option(help="Print one scalar of the tensor: its index, such as 3968,7003.")
    ] = None,
    weights: WeightsOption = None,
    variant: VariantOption = None,
) -> None:
    """List files and tensors, or print one scalar with its bits."""
    from swsurgery.checkpoint import inspect
    from swsurgery.cli import show

    with open_for_reading(checkpoint, out) as where:
        if tensor is None and at is None:
            document = inspect.inspect_files(where, weights, variant)
            show_document = show.show_files
        else:
            document = inspect.inspect_tensor(where, tensor, at, weights, variant)
            show_document = show.show_tensor
        if out.json:
            print_json(document)
        else:
            show_document(document)


@command
def diff(
    out: Output,
    a: CheckpointArgument,
    b: Annotated[str, typer.Argument(help="The checkpoint to compare it with.", show_default=False)],
    weights: WeightsOption = None,
    variant: VariantOption = None,
) -> None:
    """List every scalar in which two checkpoints differ. Exit 1 if they differ."""
    from swsurgery.cli import show
    from swsurgery.storage import numeric

    numeric.load_numpy()
    from swsurgery.checkpoint.diff import diff as run
    from swsurgery.checkpoint.opening import held, open_checkpoint

    with (
        open_for_reading(a, out) as first,
        open_for_reading(b, out) as second,
        held(first) as one,
        held(second) as other,
    ):
        base, patched = open_checkpoint(one, weights, variant), open_checkpoint(other, weights, variant)
        difference = run(base, patched, out.make_bar())
    out.print_result(difference, show.show_difference)
    if not difference.same:
        raise typer.Exit(1)
