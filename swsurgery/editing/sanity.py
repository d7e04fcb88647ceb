"""Hold what belongs together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from swsurgery import model
from swsurgery.checkpoint.compare import undeclared_changes
from swsurgery.checkpoint.opening import held, open_as, open_chosen, refuse_other_weights
from swsurgery.checkpoint.record import REGISTRY_NAME, Patched, read_patched
from swsurgery.checkpoint.weight_files import Weights
from swsurgery.editing.plan import Plan
from swsurgery.errors import (
    CheckFailed,
    ModelError,
    PlanError,
    Unrunnable,
    or_else,
)
from swsurgery.hub import Repo
from swsurgery.model import Placement
from swsurgery.model.check import run_checks
from swsurgery.model.report import Bounds, CheckReport
from swsurgery.progress import Progress
from swsurgery.storage.arguments import require_choice, require_strings, require_type
from swsurgery.storage.dtypes import DTYPES, decode
from swsurgery.storage.folder import Folder
from swsurgery.storage.splice import Splice

Check = Literal["auto", "off", "weights", "forward"]


@dataclass(frozen=True)
class CheckOptions:
    """How the sanity check is made. `text` None is the built-in passage; a bound that is None is the manifest's."""

    kind: Check = "auto"
    device: str = "auto"
    placement: Placement = "auto"
    text: str | None = None
    prompts: Sequence[str] | None = None
    bounds: Bounds | None = None
    windows: int = 16
    window: int = 512

    def __post_init__(self) -> None:
        """Raise TypeError for a field of a wrong type."""
        require_choice("kind", self.kind, get_args(Check))
        require_type("device", self.device, str)
        require_choice("placement", self.placement, get_args(Placement))
        require_type("text", self.text, str, optional=True)
        require_strings("prompts", self.prompts)
        require_type("bounds", self.bounds, Bounds, optional=True)

    @classmethod
    def of(cls, check: CheckOptions | Check | None) -> CheckOptions:
        """Return the options that the argument `check` of a public function means. Raises TypeError."""
        if check is None:
            return cls()
        if isinstance(check, cls):
            return check
        if isinstance(check, str) and check in get_args(Check):
            return cls(check)
        kinds = ", ".join(map(repr, get_args(Check)))
        raise TypeError(f"check must be a CheckOptions, None, or one of {kinds}, not {check!r:.80}")

    @property
    def asked(self) -> bool:
        """Whether the user said how the model is to be run, and so that it is."""
        given = (self.device, self.placement, self.text, self.prompts, self.windows, self.window)
        return given != ("auto", "auto", None, None, 16, 512)


def check_checkpoint(
    root: Path,
    options: CheckOptions | Check | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
    weights: Weights | None = None,
    variant: str | None = None,
) -> CheckReport:
    """Run a checkpoint and, if its registry says what its base was, compare it with the base.

    Without a registry there is nothing to compare with: the report has `compared` False, and bounds are refused.
    `weights` and `variant` say which to read if there are several sets of weights, and no registry. `options`
    of the kinds "off" and "weights" are refused, for the model is always run.

    Raises CheckpointError, ModelError, PlanError (bounds and nothing to compare with), TargetError while another run is
    editing the checkpoint in place.
    """
    options = CheckOptions.of(options)
    if options.kind in ("off", "weights"):
        raise TypeError(
            f"check_checkpoint runs the model, so the kind must be 'auto' or 'forward', not {options.kind!r}"
        )
    require_choice("weights", weights, get_args(Weights), optional=True)
    require_type("variant", variant, str, optional=True)
    with held(root):
        patched = read_patched(root)
        _refuse_bounds_without_base(root, patched, options.bounds)
        registry = patched.registry if patched else None
        said = registry.base if registry else None
        if said is not None:
            refuse_other_weights(weights, said.weights, REGISTRY_NAME, variant, said.variant)
            weights, variant = said.weights or weights, said.variant or variant
        checkpoint = open_chosen(root, weights, variant)
        changes = [
            model.ScalarChange(
                e.coordinate, float(decode(DTYPES[e.dtype], e.old_bytes)), float(decode(DTYPES[e.dtype], e.new_bytes))
            )
            for e in (registry.edits if registry else ())
        ]
        with or_else("swsurgery verify, which runs none") if patched else contextlib.nullcontext():
            report = run_checks(
                checkpoint, changes, text=options.text, prompts=options.prompts, bounds=options.bounds,
                device=options.device, placement=options.placement, windows=options.windows, window=options.window,
                progress=progress, say=say,
            )  # fmt: skip
        return replace(report, compared=patched is not None)


def refuse_bounds_without_base(root: Path | Repo, bounds: Bounds | None) -> None:
    """Raise PlanError if bounds were given for a checkpoint whose base nothing names, CheckpointError for a damaged
    registry. For a repository this is known before the weights are downloaded."""
    if bounds not in (None, Bounds()):
        _refuse_bounds_without_base(root, read_patched(root), bounds)


def _refuse_bounds_without_base(root: Path | Repo, patched: Patched | None, bounds: Bounds | None) -> None:
    if patched is None and bounds not in (None, Bounds()):
        raise PlanError(
            "a bound on the perplexity ratio needs a base to compare with, and no registry says what it was",
            root,
            "leave out the bounds, or give a patched checkpoint",
        )


def run_check(
    plan: Plan, patched: Path | Folder, options: CheckOptions, progress: Progress, say: Callable[[str], None]
) -> dict[str, Any]:
    """Check the checkpoint that is not yet done, staged or edited in place; what is returned goes into the registry.
    Raises CheckFailed, ModelError."""
    bounds = bounds_of(plan, options)
    if options.kind == "off":
        return {"kind": "off", "reason": "the check was turned off"}
    weights = _check_weights(plan, patched, progress)
    reason = None
    if options.kind == "weights":
        reason = "only the weights were to be checked"
    elif not plan.splices:
        # Base and patched are one, so the ratio is 1 whatever the model.
        if bounds.min_perplexity_ratio is not None and bounds.min_perplexity_ratio > 1:
            raise CheckFailed("check failed: nothing was changed, so the perplexity ratio is 1",
                              f"at least {bounds.min_perplexity_ratio:g} wanted")  # fmt: skip
        if bounds.max_perplexity_ratio is not None and bounds.max_perplexity_ratio < 1:
            raise CheckFailed("check failed: nothing was changed, so the perplexity ratio is 1",
                              f"at most {bounds.max_perplexity_ratio:g} allowed")  # fmt: skip
        reason = "nothing was changed"
    if reason is None:
        try:
            report = _check_forward(plan, patched, options, bounds, progress, say)
        except ModelError as error:
            # What was asked for is done or refused; without bounds and wishes the check is a courtesy.
            if options.kind == "forward" or bounds != Bounds() or options.asked:
                if isinstance(error, Unrunnable) and options.bounds is None:
                    raise error.or_else("--check weights") from error
                raise
            # The directory has this name only until it is done, and the registry does not depend on where it was made.
            reason = model.available() or str(error).replace(
                str(patched if isinstance(patched, Folder) else Path(os.path.realpath(patched))), "the checkpoint"
            )
        else:
            if not report.ok:
                raise CheckFailed.of(f"check failed: {line}" for line in report.failures)
            return {"kind": "forward", "reason": None, "weights": weights, **report.to_json()}
    if plan.splices:
        say(f"no forward check was made: {reason}")
    return {"kind": "weights", "reason": reason, "weights": weights}


def bounds_of(plan: Plan, options: CheckOptions) -> Bounds:
    """The manifest's bounds; of each of them, the options' where they give it. Raises PlanError where no ratio can
    hold both, or where the check that was chosen measures none."""
    if options.kind in ("off", "weights") and options.bounds:
        raise PlanError(f"--check {options.kind} measures no perplexity, and a bound on it was given",
                        remedy="leave out one of the two")  # fmt: skip
    given, said = options.bounds or Bounds(), plan.loaded.manifest.check
    most = said.max_perplexity_ratio if given.max_perplexity_ratio is None else given.max_perplexity_ratio
    least = said.min_perplexity_ratio if given.min_perplexity_ratio is None else given.min_perplexity_ratio
    if most is not None and least is not None and least > most:
        raise PlanError(f"no perplexity ratio is at least {least:g} and at most {most:g}", plan.loaded.path)
    return Bounds(most, least)


def _check_forward(
    plan: Plan,
    patched: Path | Folder,
    options: CheckOptions,
    bounds: Bounds,
    progress: Progress,
    say: Callable[[str], None],
) -> CheckReport:
    changes = [
        model.ScalarChange(s.coordinate, float(decode(s.dtype, s.old)), float(decode(s.dtype, s.new)))
        for s in plan.splices
    ]
    return run_checks(
        open_as(patched, plan.loaded.manifest.base, editing=True), changes, text=options.text,
        prompts=options.prompts, bounds=bounds, device=options.device, placement=options.placement,
        windows=options.windows, window=options.window, progress=progress, say=say,
    )  # fmt: skip


def _check_weights(plan: Plan, patched: Path | Folder, progress: Progress) -> dict[str, Any]:
    """Re-read the touched shards: exactly the planned scalars differ from the base, and have the planned values. Of
    an edit in place only the latter, for there is no base left to compare with, and where the base is on the Hub."""
    touched = sorted({s.file for s in plan.splices})
    there = set(os.listdir(patched.fd if isinstance(patched, Folder) else patched))
    elsewhere = [name for name in plan.checkpoint.shards if name not in there]
    result = open_as(patched, plan.loaded.manifest.base, editing=True, elsewhere=elsewhere)
    declared: dict[str, set[int]] = {}
    for splice in plan.splices:
        declared.setdefault(splice.file, set()).update(range(splice.offset, splice.offset + len(splice.new)))
    compared = isinstance(plan.checkpoint.root, Path) and result.root != plan.checkpoint.root
    findings = [] if not compared else undeclared_changes(result, plan.checkpoint, touched, declared, progress)
    wrong = [f"{f.file}: {f.message}" for f in findings]
    for scalar in (*plan.splices, *plan.protected):
        if scalar.file in elsewhere:
            continue
        stored = result.shards[scalar.file].read_scalar(*scalar.coordinate)
        if stored != (scalar.new if isinstance(scalar, Splice) else scalar.old):
            wrong.append(f"{scalar.coordinate} holds 0x{stored[::-1].hex()} after the edit")
    if wrong:
        raise CheckFailed.of(f"check failed: {line}" for line in wrong)
    return {"changed_scalars": len(plan.splices), "protected_scalars": len(plan.protected), "shards": touched}
