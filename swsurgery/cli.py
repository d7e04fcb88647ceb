"""The commands: each opens, calls one library function and prints. The only room that knows typer.

Rooms that take time to load are imported inside the command that needs them.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal, NoReturn

import typer

from swsurgery import __version__, output
from swsurgery.errors import Interrupted, SwsurgeryError, printable

app = typer.Typer(
    help="Change single scalars of a checkpoint: exactly, safely and provably.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No talk and no progress on stderr, errors only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
CheckpointArgument = Annotated[Path, typer.Argument(help="A checkpoint's directory.", show_default=False)]
Text = Annotated[Path | None, typer.Option(help="Text to measure on, instead of the built-in passage.")]
Prompt = Annotated[list[str] | None, typer.Option(help="Prompt to continue; may be repeated.")]
MaxRatio = Annotated[float | None, typer.Option(help="Fail where patched/base perplexity is above this.")]
MinRatio = Annotated[float | None, typer.Option(help="Fail where patched/base perplexity is below this.")]
DeviceOption = Annotated[Literal["auto", "cuda", "cpu"], typer.Option(help="Where the model runs.")]
PlacementOption = Annotated[
    Literal["auto", "whole", "streamed"],
    typer.Option(help="All weights in memory, or two layers at a time; auto streams what does not fit."),
]
Windows = Annotated[int, typer.Option(min=1, help="Windows of 512 tokens to measure on.")]


@app.command()
def apply(
    manifest: Annotated[Path, typer.Argument(help="The manifest, YAML or JSON.", show_default=False)],
    base: Annotated[
        str | None, typer.Option(help="The base, instead of the manifest's: a directory or hf://ORG/NAME[@REV].")
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The patched checkpoint; else a folder here named after the manifest."),
    ] = None,
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
    prompt: Prompt = None,
    max_perplexity_ratio: MaxRatio = None,
    min_perplexity_ratio: MinRatio = None,
    rehash: Annotated[bool, typer.Option("--rehash", help="Hash every file again, known digest or not.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Apply a manifest: write the patched checkpoint, checked, with its registry; or write nothing."""
    from swsurgery import show, surgery

    if dry_run:
        plan = surgery.plan_manifest(manifest, base)
        output.print_json({"output": None, **plan.to_json(), "check": None}) if json else show.plan(plan)
        return
    options = surgery.CheckOptions(
        check, device, placement, _read_text(text), prompt or None, _bounds(max_perplexity_ratio, min_perplexity_ratio)
    )
    target = directory or Path.cwd() / manifest.stem
    outcome = surgery.apply_manifest(
        manifest, target, base=base, link=link, check=options, rehash=rehash, progress=output.Bar(quiet),
        say=_silent if quiet else output.say,
    )  # fmt: skip
    output.print_json(outcome.to_json()) if json else show.outcome(outcome)


@app.command()
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
    from swsurgery import known

    if forget:
        if status or manifest or factor is not None:
            raise SwsurgeryError("--forget goes with no --status, --manifest or --factor")
        removed = str(known.forget(model))
        if json:
            output.print_json({"forgotten": removed})
        else:
            output.print_text(f"{printable(removed)}: removed, the shipped facts stay")
        return
    if os.sep in model and Path(model).is_dir() or Path(model, "swsurgery.json").is_file():
        from swsurgery import show, surgery

        patched, _ = surgery.open_patched(Path(model))
        document = patched.registry.model_dump(mode="json")
        output.print_json(document) if json else show.registry(patched.registry)
        return
    found = known.lookup(model)
    if manifest:
        output.print_text(known.render_manifest(found, manifest, factor, status or None))
    elif json:
        output.print_json(known.to_json(found, status or None))
    else:
        output.print_text(known.render_table(found, _width(), status or None))


@app.command()
def inspect(
    checkpoint: CheckpointArgument,
    tensor: Annotated[str | None, typer.Option(help="Only this tensor.")] = None,
    at: Annotated[str | None, typer.Option(help="One scalar of it: its index, such as 3968,7003.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """List files and tensors, or print one scalar with its bits."""
    from swsurgery import inspection, show

    if tensor is None and at is None:
        document = inspection.overview(checkpoint)
        output.print_json(document) if json else show.overview(document)
    else:
        document = inspection.scalar(checkpoint, tensor, at)
        output.print_json(document) if json else show.scalar(document)


@app.command()
def check(
    checkpoint: CheckpointArgument,
    text: Text = None,
    prompt: Prompt = None,
    max_perplexity_ratio: MaxRatio = None,
    min_perplexity_ratio: MinRatio = None,
    device: DeviceOption = "auto",
    placement: PlacementOption = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run a patched checkpoint and its base side by side. Exit 1 where a bound is not held."""
    from swsurgery import show, surgery

    bounds = _bounds(max_perplexity_ratio, min_perplexity_ratio)
    options = surgery.CheckOptions("forward", device, placement, _read_text(text), prompt or None, bounds)
    report = surgery.check_checkpoint(checkpoint, options, output.Bar(quiet), _silent if quiet else output.say)
    output.print_json(report.to_json()) if json else show.check(report.to_json())
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def scan(
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
    text: Text = None,
    windows: Windows = 16,
    device: DeviceOption = "auto",
    placement: PlacementOption = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Find the super weights of a checkpoint."""
    from swsurgery import scanning, show_scan

    say = _silent if quiet else output.say
    command = _scan_command(method, prompt, confirm, text, windows)
    outputs = scanning.Outputs(manifest, op, factor, plot, register, command)
    options = scanning.RunOptions(device, placement, _read_text(text), windows)
    report = scanning.scan_checkpoint(
        checkpoint, method, prompts=prompt or None, confirm=confirm, options=options, outputs=outputs,
        progress=output.Bar(quiet), say=say,
    )  # fmt: skip
    lines: list[str] = []
    try:
        lines = scanning.write_outputs(report, checkpoint, outputs)
    finally:  # what took long to find is shown, even if it cannot be kept
        output.print_json(report.to_json()) if json else show_scan.show_scan(report)
    for line in lines:
        say(line)


@app.command()
def sweep(
    manifest: Annotated[Path, typer.Argument(help="What to change, in YAML or JSON.", show_default=False)],
    factors: Annotated[str, typer.Option(help="Factors between commas, such as 0,0.5,1,1.5,2.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="The base: a directory or hf://ORG/NAME[@REV].")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figure: .png, .svg or .pdf.")] = None,
    text: Text = None,
    windows: Windows = 16,
    device: DeviceOption = "auto",
    placement: PlacementOption = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure quality as a function of the factor by which a manifest's scalars are scaled."""
    from swsurgery import scanning, show_scan

    report = scanning.sweep_manifest(
        manifest, _numbers(factors), base=base, plot=plot,
        options=scanning.RunOptions(device, placement, _read_text(text), windows),
        progress=output.Bar(quiet), say=_silent if quiet else output.say,
    )  # fmt: skip
    output.print_json(report.to_json()) if json else show_scan.show_sweep(report)


@app.command()
def verify(
    checkpoint: CheckpointArgument,
    base: Annotated[Path | None, typer.Option(help="Also compare with this base, byte by byte.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Prove that a patched checkpoint is its base with exactly the declared scalars changed. Exit 1 where it is not."""
    from swsurgery import show
    from swsurgery.verify import verify as run

    verification = run(checkpoint, output.Bar(quiet), base)
    output.print_json(verification.to_json()) if json else show.verification(verification)
    if not verification.ok:
        raise typer.Exit(1)


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="A checkpoint's directory.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Another one.", show_default=False)],
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Name every scalar in which two checkpoints differ. Exit 1 where they do."""
    from swsurgery import show
    from swsurgery.checkpoint import open_checkpoint
    from swsurgery.diff import diff as run

    difference = run(open_checkpoint(a), open_checkpoint(b), output.Bar(quiet))
    output.print_json(difference.to_json()) if json else show.difference(difference)
    if not difference.same:
        raise typer.Exit(1)


@app.command()
def revert(
    checkpoint: CheckpointArgument,
    directory: Annotated[Path, typer.Option("-o", "--output", help="Where the base is written.", show_default=False)],
    link: Annotated[Literal["auto", "clone", "copy"], typer.Option(help="How files get over.")] = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Give the base of a patched checkpoint back, byte for byte."""
    from swsurgery import surgery

    notes = surgery.revert(checkpoint, directory, link=link, progress=output.Bar(quiet))
    if json:
        output.print_json({"output": str(directory), "notes": notes})
    else:
        output.print_text(f"{printable(str(directory))}: every file has the base's sha256 again")
        for note in notes if not quiet else ():
            output.say(note)


@app.command()
def schema() -> None:
    """Print the JSON Schema of manifests."""
    from swsurgery import manifest

    output.print_json(manifest.schema())


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        output.print_text(__version__)
        raise typer.Exit


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done or yes, 1 no, 2 bad input, 3 a bug, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    previous = {s: signal.signal(s, _interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        app(argv, prog_name="swsurgery")
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0
    except SwsurgeryError as error:
        if debug:
            traceback.print_exc()
        for fault in error.faults:
            output.say(fault)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output left, as `head` does; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:  # noqa: BLE001 - the one boundary: whatever comes here is our bug, and says so
        traceback.print_exc()
        output.say("this is a bug in swsurgery: please report it with the lines above")
        return 3
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


def entry() -> NoReturn:
    sys.exit(main())


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not disturb the cleaning up
    raise Interrupted("interrupted", signal.Signals(number).name, "nothing was left behind")


def _silent(line: str) -> None:
    pass


def _width() -> int:
    import shutil

    return shutil.get_terminal_size((100, 24)).columns


def _read_text(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise SwsurgeryError(f"cannot read the text ({reason})", path) from None


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise SwsurgeryError("factors are numbers between commas", repr(text), "such as 0,0.5,1,1.5,2") from None


def _scan_command(method: str, prompts: list[str] | None, confirm: bool, text: Path | None, windows: int) -> str:
    """The command that repeats a scan, without what is this machine's alone."""
    words = ["swsurgery", "scan", "CHECKPOINT", "--method", method]
    for prompt in prompts or ():
        words += ["--prompt", shlex.quote(prompt)]
    if confirm:
        words += ["--confirm", "--windows", str(windows)]
    if text is not None:
        words += ["--text", shlex.quote(text.name)]
    return " ".join(words)


def _bounds(most: float | None, least: float | None):
    from swsurgery.report import Bounds

    for value in (most, least):
        if value is not None and not 0 < value < float("inf"):
            raise SwsurgeryError("a perplexity ratio is a finite number above 0", value)
    return None if most is None and least is None else Bounds(most, least)
