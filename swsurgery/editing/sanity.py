"""Check a patched checkpoint: compare its bytes with the plan, and run it and its base if possible.

This module decides what is checked, and `model/check.py` runs the models.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from swsurgery import model
from swsurgery.checkpoint.compare import find_undeclared_changes
from swsurgery.checkpoint.opening import held, open_checkpoint, read_checkpoint, refuse_other_weights
from swsurgery.checkpoint.record import RECORD_NAME, Patched, find_record
from swsurgery.checkpoint.weight_files import Weights
from swsurgery.editing import control_checks
from swsurgery.editing.check_base import find_checked_base
from swsurgery.editing.check_options import CheckOptions, make_bounds
from swsurgery.editing.plan import Plan
from swsurgery.editing.rejected import Rejected
from swsurgery.errors import CheckFailed, ModelError, PlanError, Unrunnable, add_remedy
from swsurgery.hub import Uri, download_checkpoint, open_location, parse_location
from swsurgery.model import Placement
from swsurgery.model.bounds import CheckedBounds
from swsurgery.model.controls import parse_controls, refuse_uncontrolled
from swsurgery.model.protocol import BosChoice, ProtocolName
from swsurgery.model.tasks.options import TaskOptions
from swsurgery.model.variant import PerActivation, Variant, list_roundings
from swsurgery.progress import Progress, Reporter, require_reporter
from swsurgery.storage.arguments import (
    require_choice,
    require_location,
    require_type,
)
from swsurgery.storage.dtypes import DTYPES, decode
from swsurgery.storage.files import File, has_same_bytes
from swsurgery.storage.folder import Folder
from swsurgery.storage.region import list_runs
from swsurgery.storage.splice import Splice

if TYPE_CHECKING:
    from swsurgery.model.report import CheckReport


def check(
    checkpoint: str | Path,
    *,
    text: str | None = None,
    prompts: Sequence[str] | None = None,
    protocol: ProtocolName = "default",
    windows: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    bos: BosChoice | None = None,
    score_first: bool | None = None,
    max_perplexity_ratio: float | None = None,
    min_perplexity_ratio: float | None = None,
    weights: Weights | None = None,
    variant: str | None = None,
    device: str = "auto",
    placement: Placement = "auto",
    base: str | Path | None = None,
    activation_bits: int | None = None,
    activation_per: PerActivation = "tensor",
    generate: int = 0,
    tasks: Sequence[str] | None = None,
    tasks_dir: str | Path | None = None,
    limit: int | None = None,
    controls: Sequence[str] | None = None,
    reporter: Reporter | None = None,
) -> CheckReport:
    """Run a checkpoint and compare it with `base` or, if it has a record, with the base of the record.

    `checkpoint` is a directory or `hf://ORG/NAME[@REV][/sub]`, which is downloaded. The perplexity is measured on
    `text`, by default the built-in passage, and each of `prompts` is continued by one token. With `generate`, both
    models also continue each prompt by at most so many tokens, always by the most likely one.

    `protocol` says how the text is cut and scored: "default" (16 windows of 512 tokens), "paper" (that of
    arXiv:2411.07191) or "lm-eval" (every token of every document, with perplexity per word). For "paper", `text` is the
    raw test file of WikiText-2; None loads it with the package `datasets`. At most `windows` windows of `window` tokens
    begin `stride` tokens apart, and tokens in two of them are scored once. `bos` is "auto", "yes" or "no". With
    `score_first` False, the first token of a window is not scored even after BOS. None keeps the protocol's value.

    `max_perplexity_ratio` and `min_perplexity_ratio` are limits on patched / base perplexity. Without a record and
    without `base` there is nothing to compare with: the report has `compared` False, and limits raise PlanError.
    `weights` and `variant` choose between several sets of weights if no record does. `device` is "auto", "cpu" or
    "cuda"; `placement` is "whole" (all weights in memory), "streamed" (two layers at a time) or "auto".

    `base` is a directory or hf:// address of any checkpoint of the same architecture and sizes. It is needed if the
    record has no old bytes of a changed region, because they exceeded the limit of the undo file. If names or dtypes of
    its tensors differ, as in a quantised copy, both models are in memory.

    With `activation_bits`, the models also run with the inputs of their linear layers rounded to so many bits, once as
    they are and once with the super activation held out.

    `tasks` are names of tasks of lm-evaluation-harness, which all of these models answer. `tasks_dir` is a directory
    with further task files, and `limit` the maximum number of items of each task. Task files can run code, and their
    data are downloaded if they are not in the cache of datasets.

    `controls` change the base in other ways than the edit did: "mean" holds the products of the edited scalars at their
    means over the text, and "outliers" or "outliers:N" zeroes N other large scalars of down projections
    (docs/controls.md). They need a record in which only single scalars were edited, and no `base`.

    Raises TypeError, HubError, CheckpointError, ModelError, PlanError; SwsurgeryError for a task that cannot be run;
    TargetError if another run is editing the checkpoint in place.
    """
    from swsurgery.model.check import run_checks
    from swsurgery.model.tasks.load import load_tasks

    reporter = require_reporter(reporter)
    bounds = make_bounds(max_perplexity_ratio, min_perplexity_ratio)
    roundings = list_roundings(activation_bits, activation_per)
    options = CheckOptions(
        "forward",
        device,
        placement,
        text,
        prompts,
        bounds,
        windows,
        window,
        generate,
        protocol=protocol,
        stride=stride,
        bos=bos,
        score_first=score_first,
        controls=controls or (),
    )
    asked = TaskOptions.of(tasks, tasks_dir, limit)
    require_choice("weights", weights, get_args(Weights), optional=True)
    require_type("variant", variant, str, optional=True)
    where = parse_location(require_location("checkpoint", checkpoint))
    if isinstance(where, Uri) and bounds and base is None:  # raises before the weights are downloaded
        with held(open_location(where)) as remote:
            _refuse_bounds_without_base(where, find_record(remote), bounds)
    loaded = None if asked is None else load_tasks(asked, reporter)
    root = download_checkpoint(where)
    with held(root) as entered, contextlib.ExitStack() as bases:
        patched = find_record(entered)
        if base is None:
            _refuse_bounds_without_base(root, patched, options.bounds)
        record = patched.record if patched else None
        said = record.base if record else None
        if said is not None:
            refuse_other_weights(weights, said.weights, RECORD_NAME, variant, said.variant)
            weights, variant = said.weights or weights, said.variant or variant
        opened = open_checkpoint(entered, weights, variant)
        changes = [
            model.ScalarChange(
                e.coordinate, float(decode(DTYPES[e.dtype], e.old_bytes)), float(decode(DTYPES[e.dtype], e.new_bytes))
            )
            for e in (record.edits if record and base is None else ())
        ]
        found_base = find_checked_base(opened, record, base, bases, reporter.say)
        if options.controls:
            control_checks.refuse_without_record(root, record, base)
            refuse_uncontrolled(changes, found_base.tensors if isinstance(found_base, Variant) else ())
        with add_remedy("use swsurgery verify, which does not run the model") if patched else contextlib.nullcontext():
            found = run_checks(
                opened,
                changes,
                base=found_base,
                generate=options.generate,
                roundings=roundings,
                tasks=loaded,
                controls=parse_controls(options.controls),
                excluded=control_checks.list_excluded(opened, record) if options.controls and record else (),
                text=options.text,
                prompts=options.prompts,
                bounds=options.bounds,
                device=options.device,
                placement=options.placement,
                protocol=options.choose_protocol(),
                progress=reporter,
                say=reporter.say,
            )
        return replace(found, compared=patched is not None or base is not None)


def _refuse_bounds_without_base(root: Path | Uri, patched: Patched | None, bounds: CheckedBounds | None) -> None:
    """Raise PlanError if bounds are given for a checkpoint without a record, because it has no base to compare with."""
    if patched is None and bounds not in (None, CheckedBounds()):
        raise PlanError(
            "a bound on the perplexity ratio needs a base to compare with, and no record names the base",
            root,
            "give the base with --base, or leave out the bounds",
        )


def run_check(
    plan: Plan, patched: Folder, options: CheckOptions, progress: Progress, say: Callable[[str], None]
) -> dict[str, Any]:
    """Check a patched checkpoint, staged or edited in place, and return the report for its record, as JSON.

    Raises CheckFailed if the checkpoint fails; its `result` is a Rejected if the models were run. Raises ModelError if
    the check that the user asked for cannot be made.
    """
    bounds = combine_bounds(plan, options)
    if options.kind == "off":
        return {"kind": "off", "reason": "the check was turned off"}
    weights = _check_weights(plan, patched, progress)
    reason = None
    if options.kind == "weights":
        reason = "a forward check was not requested"
    elif not plan.touched:
        _check_unchanged(bounds)
        reason = "nothing was changed"
    if reason is None:
        try:
            report = _check_forward(plan, patched, options, bounds, progress, say)
        except ModelError as error:
            # If the user asked for a forward check, by an option or a bound, it must be made; otherwise it is optional.
            if options.kind == "forward" or bounds != CheckedBounds() or options.asked:
                if isinstance(error, Unrunnable) and options.bounds is None:
                    raise error.add_remedy("--check weights") from error
                raise
            # The path of the stage is temporary and must not appear in the record.
            reason = model.explain_unavailable() or str(error).replace(str(patched), "the checkpoint")
        else:
            document = {"kind": "forward", "reason": None, "weights": weights, **report.to_record()}
            if not report.ok:
                failed = CheckFailed.of(f"check failed: {line}" for line in report.failures)
                failed.result = Rejected(plan, document)
                raise failed
            return document
    if plan.touched and options.kind != "weights":
        say(f"only the weights were checked: {reason}")
    return {"kind": "weights", "reason": reason, "weights": weights}


def _check_unchanged(bounds: CheckedBounds) -> None:
    """Check the bounds without running a model: base and patched are equal, so the ratio is 1. Raises CheckFailed."""
    unchanged = "check failed: nothing was changed, so the perplexity ratio is 1"
    if bounds.min_perplexity_ratio is not None and bounds.min_perplexity_ratio > 1:
        raise CheckFailed(unchanged, f"at least {bounds.min_perplexity_ratio:g} wanted")
    if bounds.max_perplexity_ratio is not None and bounds.max_perplexity_ratio < 1:
        raise CheckFailed(unchanged, f"at most {bounds.max_perplexity_ratio:g} allowed")


def combine_bounds(plan: Plan, options: CheckOptions) -> CheckedBounds:
    """Combine the bounds of the manifest with those of the options, which take precedence.

    Raises PlanError if no ratio satisfies both bounds, or if the chosen check does not measure the ratio.
    """
    for given, option, text in (
        (options.bounds, "the bound", "measure perplexity, but a bound on its ratio was given"),
        (options.generate, "--generate", "run the model, but --generate was given"),
        (options.controls, "--control", "run the model, but --control was given"),
    ):
        if given and options.kind in ("off", "weights"):
            raise PlanError(
                f"--check {options.kind} does not {text}", remedy=f"leave out {option} or --check {options.kind}"
            )
    given, said = options.bounds or CheckedBounds(), plan.loaded.manifest.check
    most = said.max_perplexity_ratio if given.max_perplexity_ratio is None else given.max_perplexity_ratio
    least = said.min_perplexity_ratio if given.min_perplexity_ratio is None else given.min_perplexity_ratio
    if most is not None and least is not None and least > most:
        raise PlanError(f"no perplexity ratio is at least {least:g} and at most {most:g}", plan.loaded.path)
    return CheckedBounds(most, least)


def _check_forward(
    plan: Plan,
    patched: Folder,
    options: CheckOptions,
    bounds: CheckedBounds,
    progress: Progress,
    say: Callable[[str], None],
) -> CheckReport:
    """Run base and patched on the same text. Raises ModelError if that is impossible."""
    from swsurgery.model.check import run_checks

    if plan.checkpoint.is_gguf:
        raise ModelError("swsurgery cannot run GGUF files", remedy="run the patched file with llama.cpp")
    changes = [
        model.ScalarChange(s.coordinate, float(decode(s.dtype, s.old)), float(decode(s.dtype, s.new)))
        for s in plan.splices
    ]
    tensors = control_checks.list_whole_tensors(plan)
    return run_checks(
        read_checkpoint(patched, plan.loaded.manifest.base),
        changes,
        base=Variant({}, tensors, plan.checkpoint) if tensors else None,
        text=options.text,
        prompts=options.prompts,
        bounds=bounds,
        device=options.device,
        placement=options.placement,
        protocol=options.choose_protocol(),
        generate=options.generate,
        controls=parse_controls(options.controls),
        excluded=control_checks.list_plan_excluded(plan),
        progress=progress,
        say=say,
    )


def _check_weights(plan: Plan, patched: Folder, progress: Progress) -> dict[str, Any]:
    """Reread the shards with edits, and check that the planned scalars are stored and that nothing else was changed.

    Comparing all other bytes with the base is left out for an edit in place, which overwrites the base, and for a base
    on the Hub. Returns a report for the record. Raises CheckFailed.
    """
    touched = sorted(plan.touched)
    there = set(os.listdir(patched.fd))
    elsewhere = [name for name in plan.checkpoint.shards if name not in there]
    result = read_checkpoint(patched, plan.loaded.manifest.base, elsewhere=elsewhere, gguf=True)
    declared: dict[str, set[int]] = {}
    for splice in plan.splices:
        declared.setdefault(splice.file, set()).update(range(splice.offset, splice.offset + len(splice.new)))
    compared = plan.checkpoint.is_here and result.root != plan.checkpoint.root
    wrong: list[str] = []
    if compared:
        rewritten = {rewrite.file for rewrite in plan.rewrites}
        only_scalars = [name for name in touched if name not in rewritten]
        differences = find_undeclared_changes(result, plan.checkpoint, only_scalars, declared, progress)
        wrong += [f"{difference.file}: {difference.message}" for difference in differences]
        wrong += [
            f"{name}: bytes that no edit names differ from the base's"
            for name in sorted(rewritten)
            if not _is_same_elsewhere(plan, name, result.shards[name].file)
        ]
    for scalar in (*plan.splices, *plan.protected):
        if scalar.file in elsewhere:
            continue
        stored = result.shards[scalar.file].read_scalar(*scalar.coordinate)
        if stored != (scalar.new if isinstance(scalar, Splice) else scalar.old):
            wrong.append(f"{scalar.coordinate} has the bits 0x{stored[::-1].hex()}, not the planned bits")
    if wrong:
        raise CheckFailed.of(f"check failed: {line}" for line in wrong)
    return {"changed_scalars": len(plan.splices), "protected_scalars": len(plan.protected), "shards": touched}


def _is_same_elsewhere(plan: Plan, name: str, patched: File) -> bool:
    """Compare a patched shard with the base outside the changed regions and scalars. Returns True if equal."""
    changed = [(splice.offset, splice.offset + len(splice.new)) for splice in plan.splices if splice.file == name]
    for rewrite in plan.rewrites:
        size = rewrite.info.dtype.size
        for first, count in list_runs(rewrite.region, rewrite.info.shape) if rewrite.file == name else ():
            changed.append((rewrite.start + first * size, rewrite.start + (first + count) * size))
    with plan.checkpoint.shards[name].file.open() as ours, patched.open() as theirs:
        at = 0
        for begin, end in [*sorted(changed), (ours.size, ours.size)]:
            if begin > at and not has_same_bytes(ours, theirs, begin - at, at, at):
                return False
            at = max(at, end)
    return True
