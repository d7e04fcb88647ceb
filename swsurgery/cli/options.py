"""Options shared by several commands, and the conversion of their values."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from swsurgery.cli import output
from swsurgery.errors import SwsurgeryError, TargetError

if TYPE_CHECKING:
    from swsurgery.hub import Repo
    from swsurgery.model.report import CheckedBounds

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No talk and no progress on stderr, errors only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
CheckpointArgument = Annotated[
    str, typer.Argument(help="A checkpoint: a directory, or hf://ORG/NAME[@REV][/sub].", show_default=False)
]


def require_directory(text: str) -> Path:
    """Convert an argument to a directory. Raises HubError for hf://..., which Path would change."""
    from swsurgery import hub

    return hub.parse_directory(text)


DirectoryArgument = Annotated[
    Path,
    typer.Argument(
        help="A checkpoint's directory.", show_default=False, parser=require_directory, metavar="checkpoint"
    ),
]
Text = Annotated[Path | None, typer.Option(help="Text to measure on, instead of the built-in passage.")]
Prompt = Annotated[list[str] | None, typer.Option(help="Prompt to continue; may be repeated.")]
MaxRatio = Annotated[float | None, typer.Option(help="Fail where patched/base perplexity is above this.")]
MinRatio = Annotated[float | None, typer.Option(help="Fail where patched/base perplexity is below this.")]
DeviceOption = Annotated[Literal["auto", "cuda", "cpu"], typer.Option(help="Where the model runs.")]
PlacementOption = Annotated[
    Literal["auto", "whole", "streamed"],
    typer.Option(help="All weights in memory, or two layers at a time; auto streams what does not fit."),
]
WeightsOption = Annotated[
    Literal["index", "single"] | None,
    typer.Option(help="Which weights to read, where an index and a single file are there and no registry."),
]
VariantOption = Annotated[
    str | None,
    typer.Option(help="Which variant of the weights to read, such as fp16: model.fp16.safetensors."),
]
Windows = Annotated[int, typer.Option(min=1, help="Maximum number of windows of text to measure on.")]
Window = Annotated[int, typer.Option(min=2, help="Tokens in a window; shorter windows are faster.")]


def ignore_message(line: str) -> None:
    """Ignore a message."""


def get_width() -> int:
    """Return the number of columns of the terminal, or 100 if it is unknown."""
    import shutil

    return shutil.get_terminal_size((100, 24)).columns


def read_text(path: Path | None) -> str | None:
    """Read a text in UTF-8, if a path is given. Raises SwsurgeryError if it cannot be read."""
    if path is None:
        return None
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise SwsurgeryError(f"cannot read the text ({reason})", path) from None


def make_bounds(most: float | None, least: float | None) -> CheckedBounds | None:
    """Return the bounds of the perplexity ratio, or None without any. Raises SwsurgeryError for an invalid ratio."""
    from swsurgery.model.report import CheckedBounds

    for value in (most, least):
        if value is not None and not 0 < value < float("inf"):
            raise SwsurgeryError("a perplexity ratio is a finite number above 0", value)
    return None if most is None and least is None else CheckedBounds(most, least)


def refuse_replacing(report: Path | None, inputs: Iterable[object]) -> None:
    """Raise TargetError if a report would replace a local input or a file in one.

    The path is checked both with links followed and without, because the files in a snapshot of a cache are links.
    """
    places = [Path(os.path.realpath(report)), Path(os.path.realpath(report.parent), report.name)] if report else []
    reals = [os.path.realpath(each) for each in inputs if isinstance(each, Path)]
    if any(place.is_relative_to(real) for place in places for real in reals):
        raise TargetError("the report would replace what it is about, or lie in it", report, "give another --output")


@contextlib.contextmanager
def open_for_reading(checkpoint: str, quiet: bool) -> Iterator[Path | Repo]:
    """Return a checkpoint to read; a local one cannot be edited in place within the block.

    For a checkpoint on the Hub, print the amount of data read afterwards, unless `quiet`.
    """
    from swsurgery.checkpoint.opening import held
    from swsurgery.hub import parse_location, place

    where = place(parse_location(checkpoint))
    with held(where):
        yield where
    if not isinstance(where, Path) and not quiet:
        output.say(describe_traffic(where))


def describe_traffic(repo: Repo) -> str:
    """Return how much was read from a repository and in how many requests."""
    return f"{repo}: {output.format_size(repo.traffic.bytes)} in {repo.traffic.requests} range requests"
