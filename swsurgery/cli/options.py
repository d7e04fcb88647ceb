"""Declare the options that several commands share, and convert their values."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Concatenate, Literal, ParamSpec, TypeVar

import typer

from swsurgery.cli.completion import complete_device
from swsurgery.cli.environment import add_variable, find_used, refuse_bad_threads
from swsurgery.cli.output import Output, is_terminal
from swsurgery.errors import SwsurgeryError, TargetError

P = ParamSpec("P")
L = TypeVar("L")


def _declare(name: str, text: str) -> inspect.Parameter:
    annotation = Annotated[bool, typer.Option(f"--{name}", help=text)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)


LOCATIONS = frozenset({"a", "b", "base", "checkpoint", "source"})
"""Names of the parameters that are the location of a checkpoint, on this machine or on the Hub."""

COMMON = (
    _declare("json", "Print one JSON document instead of text."),
    _declare("quiet", "Print only errors on stderr: no messages and no progress."),
    _declare("debug", "Print the traceback of an error."),
)
"""Options of every command."""

TABLE_OPTIONS = (
    _declare("csv", "Print the table as CSV, with all digits."),
    _declare("latex", "Print the table for LaTeX."),
)
"""Options of the commands whose result is a table."""


def command(function: Callable[Concatenate[Output, P], None]) -> Callable[..., None]:
    """Make a command from a function, and add the options in COMMON to it.

    The function receives these options as its first argument, an Output. `main` creates the Output, so
    `main` can use the options when it reports an error.
    """
    return _make_command(function, COMMON)


def table_command(function: Callable[Concatenate[Output, P], None]) -> Callable[..., None]:
    """Make a command from a function whose result is a table, and add the options in TABLE_OPTIONS and COMMON to it."""
    return _make_command(function, (*TABLE_OPTIONS, *COMMON))


def _make_command(
    function: Callable[Concatenate[Output, P], None], options: tuple[inspect.Parameter, ...]
) -> Callable[..., None]:
    def run(context: typer.Context, *arguments: P.args, **named: P.kwargs) -> None:
        out: Output = context.obj
        chosen = {option.name for option in options if named.pop(option.name) is True}
        out.json, out.quiet, out.debug = (option.name in chosen for option in COMMON)
        out.command = function.__name__
        given = frozenset(str(name) for name in (*named, *chosen) if _is_given(context, str(name)))
        out.given = given - chosen
        out.variables = find_used(context)
        _choose_form(out, chosen, given)
        _restrain_libraries(out)
        refuse_bad_threads()
        _refuse_empty(named)
        for place in places:
            named[place] = read_location(out, place, named[place])
        try:
            function(out, *arguments, **named)
        finally:
            out.end_progress()

    functools.update_wrapper(run, function)
    signature = inspect.signature(function, eval_str=True)
    own = list(signature.parameters.values())[1:]
    places = [each.name for each in own if each.name in LOCATIONS and each.annotation != DirectoryArgument]
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    vars(run)["__signature__"] = signature.replace(parameters=[context, *map(add_variable, (*own, *options))])
    return run


def _choose_form(out: Output, chosen: set[str], given: frozenset[str]) -> None:
    """Set whether the result is printed as JSON or as a table of some form. Raises SwsurgeryError for two forms.

    An option on the command line takes precedence over one in the environment.
    """
    asked = [f"--{name}" for name in ("json", "csv", "latex", "format") if name in given]
    if len(asked) > 1:
        raise SwsurgeryError(f"{' and '.join(asked)} cannot be combined", remedy="give one of them")
    forms = {name for name in ("json", "csv", "latex") if name in (given if asked else chosen)}
    out.json = "json" in forms
    out.table = None if out.json else "csv" if "csv" in forms else "latex" if "latex" in forms else None


def _refuse_empty(named: Mapping[str, object]) -> None:
    """Raise SwsurgeryError if a location is "": an unset variable of a script would mean the current folder."""
    for name in sorted(LOCATIONS & named.keys()):
        if named[name] == "":
            raise SwsurgeryError(f"the name of the {name} is empty", "''", "write . for the current folder")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _restrain_libraries(out: Output) -> None:
    """Silence huggingface_hub if --quiet was given, and its progress bars also if stderr is not a terminal.

    huggingface_hub reads these environment variables when it is imported, so this function must run before the import.
    torchao, which transformers imports if it is installed, logs warnings about its own files: they are silenced too.
    """
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if out.quiet or not is_terminal(sys.stderr):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if out.quiet:
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # huggingface_hub reports retries as warnings


CheckpointArgument = Annotated[
    str, typer.Argument(help="A checkpoint: a directory, or hf://ORG/NAME[@REV][/sub].", show_default=False)
]
ReadableArgument = Annotated[
    str,
    typer.Argument(help="A checkpoint: a directory, a GGUF file, or hf://ORG/NAME[@REV][/sub].", show_default=False),
]
DirectoryArgument = Annotated[str, typer.Argument(help="The checkpoint's directory.", show_default=False)]
BaseOption = Annotated[
    str | None,
    typer.Option(help="The base, instead of the manifest's base: a directory, a GGUF file or hf://ORG/NAME[@REV]."),
]
TextOption = Annotated[
    Path | None, typer.Option(help="A file with the text to measure on, instead of the built-in passage.")
]
PromptOption = Annotated[list[str] | None, typer.Option(help="A prompt for the model to continue; may be repeated.")]
MaxRatio = Annotated[float | None, typer.Option(help="Fail if the perplexity ratio patched/base is above this.")]
MinRatio = Annotated[float | None, typer.Option(help="Fail if the perplexity ratio patched/base is below this.")]
DeviceOption = Annotated[
    str,
    typer.Option(help="The device that runs the model: auto, cpu, cuda or cuda:N.", autocompletion=complete_device),
]
PlacementOption = Annotated[
    Literal["auto", "whole", "streamed"],
    typer.Option(
        help="Keep all weights in memory (whole) or two layers (streamed); auto streams a model that does not fit."
    ),
]
ActivationBitsOption = Annotated[
    int | None,
    typer.Option(min=2, max=16, help="Also measure with the inputs of linear layers rounded to this number of bits."),
]
ActivationPerOption = Annotated[
    Literal["tensor", "token"], typer.Option(help="Which activations share one scale, with --activation-bits.")
]
WeightsOption = Annotated[
    Literal["index", "single"] | None,
    typer.Option(help="Which weights to read if there are both an index of shards and a single file, and no record."),
]
VariantOption = Annotated[
    str | None,
    typer.Option(help="Which variant of the weights to read, such as fp16 for model.fp16.safetensors."),
]
PlotOption = Annotated[Path | None, typer.Option(help="Draw the figure to this file: .png, .svg or .pdf.")]
PageOption = Annotated[Path | None, typer.Option(help="Also write the result as an HTML page to this file.")]
GenerateOption = Annotated[
    int, typer.Option(min=0, metavar="N", help="Also continue each prompt by N tokens with both models.")
]
ControlOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="mean|outliers[:N]",
        help="Also measure another change of the base. mean: replace the products of the edited scalars by their "
        "means. outliers: zero the N largest other scalars of the down projections (by default, about one in a "
        "million). May be repeated.",
    ),
]
TasksOption = Annotated[
    str | None,
    typer.Option(metavar="NAMES", help="Also run these tasks of lm-evaluation-harness, separated by commas."),
]
TasksDirOption = Annotated[
    Path | None, typer.Option(help="A directory with further task files for --tasks. A task file can run code.")
]
LimitOption = Annotated[int | None, typer.Option(min=1, metavar="N", help="Run at most N items of each task.")]


def read_location(out: Output, name: str, given: L) -> L | str:
    """Return the location of a checkpoint as hf://ORG/NAME[@REV] if it was typed as ORG/NAME or as a URL, and say so.

    Anything else is returned unchanged.
    """
    if not isinstance(given, str) or "/" not in given or given.startswith("hf://"):
        return given
    from swsurgery.hub.names import read_repo_id, read_url

    meant = read_url(given) or read_repo_id(given)
    if meant:
        out.note(f"{name}: {meant}")
    return meant or given


def get_width() -> int:
    """Return the width of the terminal in characters, or 100 if it is unknown."""
    import shutil

    return shutil.get_terminal_size((100, 24)).columns


def read_text(path: Path | None) -> str | None:
    """Return the contents of a UTF-8 file, with its line breaks as they are, or None if `path` is None.

    Raises SwsurgeryError if the file cannot be read or is empty.
    """
    if path is None:
        return None
    try:
        text = path.read_bytes().decode("utf-8")  # read_text would change CRLF, and so the digest
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise SwsurgeryError(f"cannot read the text ({reason})", path) from None
    if not text:
        raise SwsurgeryError("the text is empty", path, "give a longer text")
    return text


def split_tasks(tasks: str | None) -> list[str] | None:
    """Return the names in a list that is separated by commas; None if the option was not given."""
    return None if tasks is None else [name.strip() for name in tasks.split(",")]


def refuse_replacing(report: Path | None, inputs: Iterable[object], option: str = "--output") -> None:
    """Raise TargetError if the file `report` would replace a local input, or a file inside an input directory.

    `option` is the option that names the report.
    The path of `report` is checked with and without following its last link, because the files of a checkpoint in the
    Hub's cache are symbolic links.
    """
    places = [Path(os.path.realpath(report)), Path(os.path.realpath(report.parent), report.name)] if report else []
    reals = [os.path.realpath(each) for each in inputs if isinstance(each, Path)]
    if any(place.is_relative_to(real) for place in places for real in reals):
        raise TargetError(
            "the report would overwrite an input, or be written inside it", report, f"choose another {option}"
        )
