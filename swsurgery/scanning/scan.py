"""Run the commands `scan` and `sweep` from beginning to end.

    open_checkpoint      the checkpoint's headers                            checkpoint/opening.py
    scan_activations     scalars that make persistent super activations      by_activations.py
    scan_weights         scalars that may make one, found in weights alone   by_weights.py
    scan_experts         experts with extreme outputs                        experts.py
    confirm              effects of zeroing candidates and random scalars    confirm.py
    confirm_experts      effects of zeroing experts and random experts       confirm_experts.py
    make_known_entry     the entry that the command lookup prints            outputs.py, known/own.py
    scan_manifest        a manifest for the command apply                    outputs.py, expert_manifest.py
    sweep_checkpoint     the model's quality by factor                       sweep.py

Output files that cannot be written are refused before the model runs. Files are written after the model has run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from swsurgery import model
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.opening import held, open_checkpoint, read_checkpoint
from swsurgery.checkpoint.weight_files import Weights
from swsurgery.editing.base import find_base
from swsurgery.editing.copy_job import compute_outside_mode
from swsurgery.editing.pin import pin_manifest
from swsurgery.editing.pins import check_planned
from swsurgery.editing.plan import Plan, make_plan
from swsurgery.errors import (
    Interrupted,
    LookupFailed,
    PlanError,
    SwsurgeryError,
    TargetError,
    Unrunnable,
    add_remedy,
    report_done,
)
from swsurgery.hub import download_checkpoint, parse_location
from swsurgery.known import own
from swsurgery.manifest.load import ManifestLike, load_manifest, parse_manifest
from swsurgery.manifest.writer import refuse_unfit
from swsurgery.model import Placement, tokenizer
from swsurgery.model.refusals import refuse_unrunnable
from swsurgery.model.run_arguments import refuse_device, refuse_empty_text
from swsurgery.model.variant import Variant
from swsurgery.progress import LOADING, Progress, Reporter, Rounds, require_reporter
from swsurgery.scanning import figures
from swsurgery.scanning import outputs as outputs_module
from swsurgery.scanning.expert_manifest import write_expert_manifest
from swsurgery.scanning.expert_report import ExpertScan
from swsurgery.scanning.factors import compute_scaled_values, refuse_factors
from swsurgery.scanning.report import Method, Scan, Sweep
from swsurgery.storage import dtypes, filesystem, numeric
from swsurgery.storage.arguments import (
    require_choice,
    require_integer,
    require_location,
    require_number,
    require_path,
    require_strings,
    require_type,
)

ManifestOp = Literal["zero", "scale", "protect"]


@dataclass(frozen=True)
class RunOptions:
    """The options for running a model. `text` is the text that the model reads; None means the built-in text."""

    device: str
    placement: Placement
    text: str | None
    windows: int
    window: int

    def __post_init__(self) -> None:
        """Raise TypeError for a field of the wrong type, and ModelError for an unknown device or an empty text."""
        require_type("device", self.device, str)
        require_choice("placement", self.placement, get_args(Placement))
        require_type("text", self.text, str, optional=True)
        for name in ("windows", "window"):
            object.__setattr__(self, name, require_integer(name, getattr(self, name)))
        refuse_device(self.device)
        refuse_empty_text(self.text)


@dataclass(frozen=True)
class _Outputs:
    """The files that the user wants a scan to write.

    `manifest` is the path of a manifest that applies `op` (with `factor`) to what was found. `plot` is the path of a
    figure. `register` is the model name under which the command lookup will find the super weights. The stored entry
    cites `command` as its source.
    """

    manifest: Path | None = None
    op: ManifestOp = "zero"
    factor: float | None = None
    plot: Path | None = None
    register: str | None = None
    command: str = "swsurgery scan"


def scan(
    checkpoint: str | Path,
    *,
    method: Method = "activations",
    prompts: Sequence[str] | None = None,
    confirm: bool = False,
    manifest: str | Path | None = None,
    op: ManifestOp = "zero",
    factor: float | None = None,
    plot: str | Path | None = None,
    register: str | None = None,
    command: str = "swsurgery scan",
    weights: Weights | None = None,
    variant: str | None = None,
    text: str | None = None,
    windows: int = 16,
    window: int = 512,
    device: str = "auto",
    placement: Placement = "auto",
    reporter: Reporter | None = None,
) -> Scan:
    """Find the super weights of a checkpoint (arXiv:2411.07191), and write the requested files.

    `checkpoint` is a directory or `hf://ORG/NAME[@REV][/sub]`, which is downloaded. The method "activations" runs the
    model on `prompts` and finds the scalars that make persistent super activations. The method "weights" reads the
    weights and runs no model. The method "experts" runs the model on `prompts` and finds the super experts of a mixture
    of experts (arXiv:2507.23279); the result is then an ExpertScan. With `confirm`, the effect of zeroing each
    candidate is measured on at most `windows` windows of `window` tokens of `text` (None: the built-in text). `device`
    and `placement` have the meaning that they have in `check`. If the directory contains several sets of weights and no
    record names one of them, `weights` and `variant` choose the set.

    `manifest` is the path of a new manifest that applies `op` (with `factor`) to what was found. `plot` is the path
    of a figure and ends in .png, .svg or .pdf. `register` is the model name under which `lookup` will find the result.
    The stored entry cites `command` as its source. Files that cannot be written are refused before the scan.

    Raises TypeError, HubError, CheckpointError, ArchitectureError, ManifestError, LookupFailed, ModelError,
    TargetError. If a file cannot be written after the scan, the error's attribute `result` is the Scan.
    """
    reporter = require_reporter(reporter)
    require_choice("method", method, get_args(Method))
    require_choice("op", op, get_args(ManifestOp))
    require_strings("prompts", prompts)
    require_type("confirm", confirm, bool)
    require_type("register", register, str, optional=True)
    outputs = _Outputs(
        None if manifest is None else require_path("manifest", manifest),
        op,
        None if factor is None else require_number("factor", factor),
        None if plot is None else require_path("plot", plot),
        register,
        command,
    )
    options = RunOptions(device, placement, text, windows, window)
    with held(download_checkpoint(parse_location(require_location("checkpoint", checkpoint)))) as entered:
        opened = open_checkpoint(entered, weights, variant)
        _refuse(outputs, opened, method)
        found = _find(opened, method, prompts, confirm, options, reporter)
    # The directory is released before the files are written, because one of them may be in it.
    try:
        _write_outputs(found, opened, outputs, reporter)
    except (SwsurgeryError, Interrupted) as error:
        error.result = found
        raise
    return found


def _find(
    checkpoint: Checkpoint,
    method: Method,
    prompts: Sequence[str] | None,
    confirm: bool,
    options: RunOptions,
    reporter: Reporter,
) -> Scan:
    """Scan an open checkpoint. With `confirm`, measure the effects of zeroing the candidates too."""
    if method == "experts":
        return _find_experts(checkpoint, prompts, confirm, options, reporter)
    by_weights = "--method weights without --confirm" if confirm else "--method weights"
    without = "leave out --confirm" if method == "weights" else by_weights
    with add_remedy(without):
        if method == "activations" or confirm:
            require_model(checkpoint.directory, reporter)
        if confirm:
            from swsurgery.scanning.causal_test import refuse_text

            refuse_text(checkpoint, options.text, options.windows, options.window)
        if method == "activations":
            from swsurgery.scanning.by_activations import scan_activations

            found = scan_activations(
                checkpoint,
                prompts=prompts,
                device=options.device,
                placement=options.placement,
                progress=Rounds(reporter),
                say=reporter.say,
            )
        else:
            numeric.load_numpy()
            from swsurgery.scanning.by_weights import scan_weights

            found = scan_weights(checkpoint, progress=reporter)
    if confirm and found.candidates:
        from swsurgery.scanning.confirm import confirm as run

        said: list[str] = []
        rounds = Rounds(reporter, "confirmation round")
        with add_remedy("leave out --confirm"):
            confirmation = run(
                checkpoint,
                found.candidates,
                device=options.device,
                placement=options.placement,
                text=options.text,
                windows=options.windows,
                window=options.window,
                progress=rounds,
                say=said.append,
            )
        found = dataclasses.replace(found, confirmation=confirmation, notes=(*found.notes, *said))
    return found


def _find_experts(
    checkpoint: Checkpoint, prompts: Sequence[str] | None, confirm: bool, options: RunOptions, reporter: Reporter
) -> ExpertScan:
    """Scan an open checkpoint for super experts, and confirm the candidates if requested."""
    require_model(checkpoint.directory, reporter)
    from swsurgery.scanning.causal_test import refuse_text
    from swsurgery.scanning.confirm_experts import confirm_experts
    from swsurgery.scanning.experts import scan_experts

    if confirm:
        with add_remedy("leave out --confirm"):
            refuse_text(checkpoint, options.text, options.windows, options.window)
    found = scan_experts(
        checkpoint,
        prompts=prompts,
        device=options.device,
        placement=options.placement,
        progress=Rounds(reporter),
        say=reporter.say,
    )
    if not confirm or not found.experts:
        return found
    said: list[str] = []
    with add_remedy("leave out --confirm"):
        confirmation = confirm_experts(
            checkpoint,
            found.experts,
            device=options.device,
            placement=options.placement,
            text=options.text,
            windows=options.windows,
            window=options.window,
            progress=Rounds(reporter, "confirmation round"),
            say=said.append,
        )
    return dataclasses.replace(found, expert_confirmation=confirmation, notes=(*found.notes, *said))


def _write_outputs(found: Scan, checkpoint: Checkpoint, outputs: _Outputs, reporter: Reporter) -> None:
    """Write the files that `outputs` names.

    The reporter gets a line about each file as soon as it is written. After a failure the user thus knows which files
    exist. Raises TargetError if a file cannot be written, LookupFailed if the name belongs to another model, and
    Interrupted, which names the files written.
    """
    written: list[str] = []

    def report(line: str) -> None:
        written.append(line)
        report_done("; ".join(written))
        reporter.say(line)

    try:
        if outputs.plot is not None:
            figures.plot_scan(found, outputs.plot, outputs.register or _choose_name(checkpoint))
            report(f"figure: {outputs.plot}")
        if outputs.manifest is not None and found.answer != "found":
            why = "the scan is undecided" if found.answer == "undecided" else "nothing was found"
            report(f"{why}, so no manifest was written: {outputs.manifest}")
        elif outputs.manifest is not None:
            base = _make_base(checkpoint, outputs.manifest)
            if isinstance(found, ExpertScan):
                text = write_expert_manifest(found, base=base, op=outputs.op, factor=outputs.factor)
            else:
                text = outputs_module.scan_manifest(found, base=base, op=outputs.op, factor=outputs.factor)
            text = pin_manifest(parse_manifest(text.encode(), outputs.manifest), checkpoint, reporter).text
            filesystem.write_file(outputs.manifest, text.encode(), compute_outside_mode(checkpoint.files))
            report(f"manifest: {outputs.manifest}")
        if outputs.register is not None:
            entry = outputs_module.make_known_entry(
                found, checkpoint, hf_id=outputs.register, revision=checkpoint.revision, command=outputs.command
            )
            own.save(entry, compute_outside_mode(checkpoint.files))
            report(f"registered: swsurgery lookup {entry.hf_id}")
    except Interrupted as interrupted:
        if not written:
            raise
        raise interrupted.replace_left("what was written stays") from interrupted


def sweep(
    manifest: ManifestLike,
    factors: Sequence[float],
    base: str | Path | None = None,
    *,
    plot: str | Path | None = None,
    text: str | None = None,
    windows: int = 16,
    window: int = 512,
    device: str = "auto",
    placement: Placement = "auto",
    reporter: Reporter | None = None,
) -> Sweep:
    """Measure the base of a manifest with the scalars that the manifest changes multiplied by each of `factors`.

    `manifest` and `base` have the meaning that they have in `apply`; a base on the Hub is downloaded. `text`,
    `windows`, `window`, `device` and `placement` have the meaning that they have in `check`. `plot` is the path of a
    figure and ends in .png, .svg or .pdf. No other file is written.

    Raises TypeError, HubError, ManifestError, CheckpointError, PlanError, NumberError, ModelError, TargetError.
    """
    reporter = require_reporter(reporter)
    if isinstance(factors, str) or not isinstance(factors, Iterable):
        raise TypeError(f"factors must be a list of numbers, not {factors!r:.80}")
    numbers = [require_number("factors", factor) for factor in factors]
    target = None if plot is None else require_path("plot", plot)
    options = RunOptions(device, placement, text, windows, window)
    if target is not None:
        figures.check_figure_path(target)
    refuse_factors(numbers)
    loaded = load_manifest(manifest, base)
    with held(download_checkpoint(find_base(loaded, base))) as entered:
        plan = make_plan(loaded, read_checkpoint(entered, loaded.manifest.base))
        plan = check_planned(plan, reporter)
        coordinates = [splice.coordinate for splice in plan.splices]
        if not plan.touched:
            raise PlanError(
                "no scalar is changed, so there is nothing to sweep", loaded.path, "add an edit other than protect"
            )
        compute_scaled_values(plan.checkpoint, coordinates, numbers, bool(plan.rewrites))  # refuses overflows
        require_model(plan.checkpoint.directory, reporter)
        from swsurgery.scanning.sweep import Regions, sweep_checkpoint

        def scale(factor: float) -> Variant:
            return scale_regions(plan, factor, reporter)

        regions = Regions([str(rewrite.region) for rewrite in plan.rewrites], scale) if plan.rewrites else None

        rounds = Rounds(reporter)
        found = sweep_checkpoint(
            plan.checkpoint,
            coordinates,
            numbers,
            regions=regions,
            device=options.device,
            placement=options.placement,
            text=options.text,
            windows=options.windows,
            window=options.window,
            progress=rounds,
            say=reporter.say,
        )
    found = dataclasses.replace(
        found,
        model=_choose_name(plan.checkpoint),
        revision=plan.checkpoint.revision,
        manifest=str(loaded.path),
        manifest_sha256=hashlib.sha256(loaded.raw).hexdigest(),
    )
    if target is not None:
        figures.plot_sweep(found, target, _choose_name(plan.checkpoint))
    return found


def scale_regions(plan: Plan, factor: float, progress: Progress) -> Variant:
    """Return the tensors in which a plan changes regions, with all scalars and regions of the plan scaled instead.

    Protected scalars keep their values. Raises NumberError if the dtype cannot represent a product.
    """
    from swsurgery.editing.overlay import overlay_checkpoint

    op, options = ("scale", {"factor": factor}) if factor else ("zero", dict[str, float]())
    rewrites = tuple(dataclasses.replace(rewrite, op=op, options=options) for rewrite in plan.rewrites)
    splices = tuple(
        dataclasses.replace(s, new=dtypes.scale_value(s.dtype, s.old, factor) if factor else dtypes.make_zero(s.dtype))
        for s in plan.splices
    )
    scaled = dataclasses.replace(plan, rewrites=rewrites, splices=splices)
    tensors = frozenset(rewrite.region.tensor for rewrite in rewrites)
    return Variant({}, tensors, overlay_checkpoint(scaled, progress))


def require_model(directory: Path, progress: Progress) -> None:
    """Check that the model in `directory` can be run on this machine, then start the tokenizer's process.

    `progress` receives the start of a task called LOADING, which ends when the next task begins.

    Raises Unrunnable if torch or transformers cannot be used, or if the directory contains no model that can be run.
    """
    if reason := model.explain_unavailable():
        raise Unrunnable(reason, "a model has to be run", "pip install 'swsurgery[check]'")
    refuse_unrunnable(directory)
    progress.start(0, "", LOADING)
    numeric.load_numpy()
    tokenizer.start()


def _refuse(outputs: _Outputs, checkpoint: Checkpoint, method: Method) -> None:
    refuse_unfit(outputs.op, outputs.factor)
    if outputs.register is not None and method == "experts":
        raise LookupFailed("super experts cannot be saved for lookup", outputs.register, "leave out --register")
    if outputs.register is not None:
        own.refuse_name(outputs.register, outputs_module.read_sizes(checkpoint))
    if outputs.plot is not None:
        figures.check_figure_path(outputs.plot)
    if outputs.manifest is not None:
        if outputs.plot is not None and os.path.abspath(outputs.manifest) == os.path.abspath(outputs.plot):
            raise TargetError("the manifest and the figure have the same name", outputs.manifest, "give two names")
        if filesystem.is_there(outputs.manifest):
            raise TargetError("the manifest already exists", outputs.manifest, "choose another --manifest")
        if not outputs.manifest.absolute().parent.is_dir():
            raise TargetError("no such directory", outputs.manifest.absolute().parent, "make it first")
        if not os.access(outputs.manifest.absolute().parent, os.W_OK):
            raise TargetError("cannot write", outputs.manifest.absolute().parent, "choose a place where you may write")


def _choose_name(checkpoint: Checkpoint) -> str:
    return checkpoint.repo_id or checkpoint.directory.name


def _make_base(checkpoint: Checkpoint, manifest: Path) -> dict[str, Any]:
    """Return the fields of `base:` in a manifest for the checkpoint.

    They are repo_id and revision if both are known. Otherwise the field is path, relative to the manifest's directory.
    If the user chose a set of weights, the fields weights and variant are added.
    """
    chosen = {"weights": checkpoint.choice, "variant": checkpoint.variant}
    chosen = {key: value for key, value in chosen.items() if value}
    if checkpoint.repo_id and checkpoint.revision:
        return {"repo_id": checkpoint.repo_id, "revision": checkpoint.revision, **chosen}
    return {"path": os.path.relpath(checkpoint.directory, os.path.realpath(manifest.absolute().parent)), **chosen}
