"""Run the commands `scan` and `sweep` from beginning to end.

    open_checkpoint      the checkpoint's headers                            checkpoint/opening.py, hub
    scan_activations     scalars behind persistent activations               by_activations.py
    scan_weights         scalars that could make one, from weights alone     by_weights.py
    confirm              effects of zeroing them, against random scalars     confirm.py
    known_entry          the entry that lookup prints                        outputs.py, known/own.py
    scan_manifest        a manifest for apply                                outputs.py
    sweep                quality as a function of a factor                   sweep.py

Requests that must fail are refused before the model runs, and files are written only after it ran.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from swsurgery import model
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.opening import held, open_checkpoint, read_checkpoint
from swsurgery.checkpoint.weight_files import Weights
from swsurgery.editing.base import find_base
from swsurgery.editing.copy import compute_outside_mode
from swsurgery.editing.pins import check_planned
from swsurgery.editing.plan import make_plan
from swsurgery.errors import PlanError, TargetError, Unrunnable, add_remedy
from swsurgery.hub import download_checkpoint, parse_location
from swsurgery.known import own
from swsurgery.manifest.load import load_manifest
from swsurgery.manifest.writer import refuse_unfit
from swsurgery.model import Placement, tokenizer
from swsurgery.model.refusals import refuse_unrunnable
from swsurgery.progress import Progress, Rounds, Silent
from swsurgery.scanning import figures
from swsurgery.scanning import outputs as outputs_module
from swsurgery.scanning.report import Method, ScanReport, SweepReport
from swsurgery.storage import filesystem, numeric

ManifestOp = Literal["zero", "scale", "protect"]


@dataclass(frozen=True)
class RunOptions:
    """The options for running a model. `text` is the text to run it on; None is the built-in text."""

    device: str = "auto"
    placement: Placement = "auto"
    text: str | None = None
    windows: int = 16
    window: int = 512


@dataclass(frozen=True)
class Outputs:
    """The files that a scan is asked to write.

    `manifest` is the path of a manifest that applies `op` (with `factor`) to the super weights, and `plot` the path of
    a figure. `register` is the name of an entry that lookup then finds; the entry cites `command` as its source.
    """

    manifest: Path | None = None
    op: ManifestOp = "zero"
    factor: float | None = None
    plot: Path | None = None
    register: str | None = None
    command: str = "swsurgery scan"


def scan_checkpoint(
    base: str | Path,
    method: Method = "activations",
    *,
    prompts: Sequence[str] | None = None,
    confirm: bool = False,
    options: RunOptions | None = None,
    outputs: Outputs | None = None,
    weights: Weights | None = None,
    variant: str | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> ScanReport:
    """Find the super weights of `base`: a directory, or hf://ORG/NAME[@REV].

    `outputs` are the files that `write_outputs` will write afterwards; impossible ones are refused before the scan.
    `weights` and `variant` choose between several sets of weights if the checkpoint has no record.
    Raises CheckpointError, ArchitectureError, ManifestError, LookupFailed, ModelError, TargetError.
    """
    options, progress = options or RunOptions(), progress or Silent()
    with held(download_checkpoint(parse_location(base))) as entered:
        checkpoint = open_checkpoint(entered, weights, variant)
        if outputs is not None:
            _refuse(outputs, checkpoint)
        by_weights = "--method weights without --confirm" if confirm else "--method weights"
        without = "leave out --confirm" if method == "weights" else by_weights
        with add_remedy(without):
            if method == "activations" or confirm:
                _require_model(checkpoint.directory)
            if confirm:
                from swsurgery.scanning.confirm import refuse_text

                refuse_text(checkpoint, options.text, options.windows, options.window)
            if method == "activations":
                from swsurgery.scanning.by_activations import scan_activations

                report = scan_activations(
                    checkpoint,
                    prompts=prompts,
                    device=options.device,
                    placement=options.placement,
                    progress=Rounds(progress),
                    say=say,
                )
            else:
                numeric.load_numpy()
                from swsurgery.scanning.by_weights import scan_weights

                report = scan_weights(checkpoint, progress=progress)
        if confirm and report.candidates:
            from swsurgery.scanning.confirm import confirm as run

            said: list[str] = []
            rounds = Rounds(progress, "confirmation round")
            with add_remedy("leave out --confirm"):
                confirmation = run(
                    checkpoint,
                    report.candidates,
                    device=options.device,
                    placement=options.placement,
                    text=options.text,
                    windows=options.windows,
                    window=options.window,
                    progress=rounds,
                    say=said.append,
                )
            report = dataclasses.replace(report, confirmation=confirmation, notes=(*report.notes, *said))
        return report


def write_outputs(
    report: ScanReport,
    base: str | Path,
    outputs: Outputs,
    say: Callable[[str], None] = lambda line: None,
    weights: Weights | None = None,
    variant: str | None = None,
) -> None:
    """Write the files that `outputs` asks for.

    `say` gets a line about each file as soon as it is written, so that after a failure the user knows which exist.
    Raises TargetError if a file cannot be written, and LookupFailed if the name belongs to another model.
    """
    checkpoint = open_checkpoint(download_checkpoint(parse_location(base)), weights, variant)
    if outputs.plot is not None:
        figures.plot_scan(report, outputs.plot, outputs.register or _choose_name(checkpoint))
        say(f"figure: {outputs.plot}")
    if outputs.manifest is not None and not report.super_weights:
        found = "the scan is undecided" if report.answer == "undecided" else "nothing was found"
        say(f"{found}, so no manifest was written: {outputs.manifest}")
    elif outputs.manifest is not None:
        text = outputs_module.scan_manifest(
            report, base=_make_base(checkpoint, outputs.manifest), op=outputs.op, factor=outputs.factor
        )
        filesystem.write_file(outputs.manifest, text.encode(), compute_outside_mode(checkpoint.files))
        say(f"manifest: {outputs.manifest}")
    if outputs.register is not None:
        entry = outputs_module.make_known_entry(
            report, checkpoint, hf_id=outputs.register, revision=checkpoint.revision, command=outputs.command
        )
        own.save(entry, compute_outside_mode(checkpoint.files))
        say(f"registered: swsurgery lookup {entry.hf_id}")


def sweep_manifest(
    manifest: Path,
    factors: Sequence[float],
    *,
    base: str | None = None,
    options: RunOptions | None = None,
    plot: Path | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> SweepReport:
    """Measure the base of `manifest` with the scalars that the manifest changes multiplied by each of `factors`.

    Raises ManifestError, CheckpointError, PlanError, NumberError, ModelError, TargetError.
    """
    options = options or RunOptions()
    if plot is not None:
        figures.check_figure_path(plot)
    loaded = load_manifest(manifest)
    with held(download_checkpoint(find_base(loaded, base))) as entered:
        plan = make_plan(loaded, read_checkpoint(entered, loaded.manifest.base))
        plan = check_planned(plan, progress or Silent())
        coordinates = [splice.coordinate for splice in plan.splices]
        if not coordinates:
            raise PlanError(
                "no scalar is changed, so there is nothing to sweep", manifest, "add an edit other than protect"
            )
        _require_model(plan.checkpoint.directory)
        from swsurgery.scanning.sweep import sweep

        rounds = Rounds(progress or Silent())
        report = sweep(
            plan.checkpoint,
            coordinates,
            factors,
            device=options.device,
            placement=options.placement,
            text=options.text,
            windows=options.windows,
            window=options.window,
            progress=rounds,
            say=say,
        )
    if plot is not None:
        figures.plot_sweep(report, plot, _choose_name(plan.checkpoint))
    return report


def _require_model(directory: Path) -> None:
    """Start the tokenizer's process. Raises Unrunnable if this machine cannot run models, or not this one."""
    if reason := model.explain_unavailable():
        raise Unrunnable(reason, "a model has to be run", "pip install 'swsurgery[check]'")
    refuse_unrunnable(directory)
    numeric.load_numpy()
    tokenizer.start()


def _refuse(outputs: Outputs, checkpoint: Checkpoint) -> None:
    refuse_unfit(outputs.op, outputs.factor)
    if outputs.register is not None:
        own.refuse_name(outputs.register, outputs_module.read_sizes(checkpoint))
    if outputs.plot is not None:
        figures.check_figure_path(outputs.plot)
    if outputs.manifest is not None:
        if outputs.plot is not None and os.path.abspath(outputs.manifest) == os.path.abspath(outputs.plot):
            raise TargetError("the manifest and the figure have the same name", outputs.manifest, "give two names")
        if filesystem.is_there(outputs.manifest):
            raise TargetError("the manifest exists already", outputs.manifest, "give another name, or remove it")
        if not outputs.manifest.absolute().parent.is_dir():
            raise TargetError("no such directory", outputs.manifest.absolute().parent, "make it first")
        if not os.access(outputs.manifest.absolute().parent, os.W_OK):
            raise TargetError("cannot write", outputs.manifest.absolute().parent, "choose a place where you may write")


def _choose_name(checkpoint: Checkpoint) -> str:
    return checkpoint.repo_id or checkpoint.directory.name


def _make_base(checkpoint: Checkpoint, manifest: Path) -> dict[str, Any]:
    """Return the fields of a manifest's base for the checkpoint.

    They are repo_id and revision if both are known, else the path relative to the manifest's directory. The user's
    choice of weights is added, if there was one.
    """
    chosen = {"weights": checkpoint.choice, "variant": checkpoint.variant}
    chosen = {key: value for key, value in chosen.items() if value}
    if checkpoint.repo_id and checkpoint.revision:
        return {"repo_id": checkpoint.repo_id, "revision": checkpoint.revision, **chosen}
    return {"path": os.path.relpath(checkpoint.directory, os.path.realpath(manifest.absolute().parent)), **chosen}
