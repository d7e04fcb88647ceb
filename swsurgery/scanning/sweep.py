"""Measure the base of a manifest with the scalars that the manifest changes multiplied by several factors.

`measure_sweep.py` runs the model. This module must not import torch at module level.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from swsurgery.checkpoint.opening import held, read_checkpoint
from swsurgery.editing.base import find_base
from swsurgery.editing.pins import check_planned
from swsurgery.editing.plan import Plan, make_plan
from swsurgery.errors import PlanError
from swsurgery.hub import download_checkpoint
from swsurgery.manifest.load import ManifestLike, load_manifest
from swsurgery.model import Placement
from swsurgery.model.protocol import BosChoice, ProtocolName, choose_protocol
from swsurgery.model.start_up import start_up
from swsurgery.model.variant import Variant
from swsurgery.progress import Progress, Reporter, Rounds, require_reporter
from swsurgery.scanning import figures
from swsurgery.scanning.factors import compute_scaled_values, refuse_factors
from swsurgery.scanning.report import Sweep
from swsurgery.scanning.run_options import RunOptions
from swsurgery.scanning.scan_files import choose_name
from swsurgery.storage import dtypes
from swsurgery.storage.arguments import require_number, require_path


def sweep(
    manifest: ManifestLike,
    factors: Sequence[float],
    base: str | Path | None = None,
    *,
    plot: str | Path | None = None,
    text: str | None = None,
    protocol: ProtocolName = "default",
    windows: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    bos: BosChoice | None = None,
    score_first: bool | None = None,
    device: str = "auto",
    placement: Placement = "auto",
    reporter: Reporter | None = None,
) -> Sweep:
    """Measure the base of a manifest with the scalars that the manifest changes multiplied by each of `factors`.

    `manifest` and `base` have the meaning that they have in `apply`; a base on the Hub is downloaded. `text`,
    `protocol` and its options, `device` and `placement` have the meaning that they have in `check`. `plot` is the path
    of a figure and ends in .png, .svg or .pdf. No other file is written.

    Raises TypeError, HubError, ManifestError, CheckpointError, PlanError, NumberError, ModelError, TargetError.
    """
    reporter = require_reporter(reporter)
    if isinstance(factors, str) or not isinstance(factors, Iterable):
        raise TypeError(f"factors must be a list of numbers, not {factors!r:.80}")
    numbers = [require_number("factors", factor) for factor in factors]
    target = None if plot is None else require_path("plot", plot)
    chosen = choose_protocol(protocol, windows=windows, window=window, stride=stride, bos=bos, score_first=score_first)
    options = RunOptions(device, placement, text, chosen)
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
        start_up(plan.checkpoint, options.device, options.placement, reporter)
        found = _measure(plan, numbers, options, reporter)
    found = dataclasses.replace(
        found,
        model=choose_name(plan.checkpoint),
        revision=plan.checkpoint.revision,
        manifest=str(loaded.path),
        manifest_sha256=hashlib.sha256(loaded.raw).hexdigest(),
    )
    if target is not None:
        figures.plot_sweep(found, target, choose_name(plan.checkpoint))
    return found


def _measure(plan: Plan, factors: Sequence[float], options: RunOptions, reporter: Reporter) -> Sweep:
    """Run the model of a plan's base with all scalars and regions of the plan multiplied by each factor."""
    from swsurgery.scanning.measure_sweep import Regions, sweep_checkpoint

    def scale(factor: float) -> Variant:
        return _scale_regions(plan, factor, reporter)

    return sweep_checkpoint(
        plan.checkpoint,
        [splice.coordinate for splice in plan.splices],
        factors,
        regions=Regions([str(rewrite.region) for rewrite in plan.rewrites], scale) if plan.rewrites else None,
        progress=Rounds(reporter),
        say=reporter.say,
        **options.on_text,
    )


def _scale_regions(plan: Plan, factor: float, progress: Progress) -> Variant:
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
