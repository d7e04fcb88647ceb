"""Compare the edits of several manifests with their base, without writing a checkpoint.

`measure_comparison.py` runs the models. This module must not import torch at module level.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from swsurgery.checkpoint.opening import held, read_checkpoint
from swsurgery.editing.base import find_base
from swsurgery.editing.control_checks import refuse_controls
from swsurgery.editing.pins import check_planned
from swsurgery.editing.plan import make_plan
from swsurgery.errors import ManifestError
from swsurgery.hub import download_checkpoint
from swsurgery.manifest.load import LoadedManifest, ManifestLike, load_manifest
from swsurgery.model import Placement
from swsurgery.model.controls import parse_controls
from swsurgery.model.protocol import BosChoice, ProtocolName, choose_protocol
from swsurgery.model.start_up import start_up
from swsurgery.model.tasks.load import load_tasks
from swsurgery.model.tasks.options import TaskOptions
from swsurgery.model.variant import PerActivation, list_roundings
from swsurgery.progress import Reporter, Rounds, require_reporter
from swsurgery.scanning import figures
from swsurgery.scanning.comparison import Comparison
from swsurgery.scanning.run_options import RunOptions
from swsurgery.storage.arguments import require_path


def compare(
    manifests: Sequence[ManifestLike],
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
    activation_bits: int | None = None,
    activation_per: PerActivation = "tensor",
    tasks: Sequence[str] | None = None,
    tasks_dir: str | Path | None = None,
    limit: int | None = None,
    controls: Sequence[str] | None = None,
    reporter: Reporter | None = None,
) -> Comparison:
    """Measure one base and the result of applying each of `manifests` to it, in one run; no checkpoint is written.

    `base` replaces the base of every manifest; without it, all manifests must name the same base. A base on the Hub is
    downloaded. The text and the options of the model are those of `check`. With `activation_bits`, every model also
    runs with the inputs of its linear layers rounded to so many bits, once as they are and once with the super
    activation held out (arXiv:2411.07191, section 4.1). `plot` is a figure, .png, .svg or .pdf. `tasks`, `tasks_dir`
    and `limit` are those of `check`; every model answers the tasks. `controls` are those of `check`, measured for each
    manifest; every manifest must then edit single scalars only.

    Raises TypeError, HubError, ManifestError (no manifest, or different bases), CheckpointError, PlanError, ModelError,
    TargetError; SwsurgeryError for a task that cannot be run.
    """
    reporter = require_reporter(reporter)
    if isinstance(manifests, (str, Path)) or not isinstance(manifests, Sequence):
        raise TypeError(f"manifests must be a list of manifests, not {manifests!r:.80}")
    target = None if plot is None else require_path("plot", plot)
    chosen = choose_protocol(protocol, windows=windows, window=window, stride=stride, bos=bos, score_first=score_first)
    options = RunOptions(device, placement, text, chosen)
    roundings = list_roundings(activation_bits, activation_per)
    asked_controls = parse_controls(controls)
    asked = TaskOptions.of(tasks, tasks_dir, limit)
    if target is not None:
        figures.check_figure_path(target)
    loaded = [load_manifest(manifest, base) for manifest in manifests]
    _refuse_different_bases(loaded, base)
    known = None if asked is None else load_tasks(asked, reporter)
    with contextlib.ExitStack() as stack:
        entered = stack.enter_context(held(download_checkpoint(find_base(loaded[0], base))))
        checkpoint = read_checkpoint(entered, loaded[0].manifest.base)
        plans = [check_planned(make_plan(one, checkpoint), reporter) for one in loaded]
        for plan in plans if asked_controls else ():
            refuse_controls(plan)
        start_up(checkpoint, options.device, options.placement, reporter)
        from swsurgery.scanning.measure_comparison import compare_plans

        found = compare_plans(
            checkpoint,
            plans,
            roundings,
            tasks=known,
            controls=asked_controls,
            progress=Rounds(reporter),
            say=reporter.say,
            **options.on_text,
        )
    if target is not None:
        figures.plot_comparison(found, target)
    return found


def _refuse_different_bases(loaded: Sequence[LoadedManifest], base: str | Path | None) -> None:
    """Raise ManifestError if there is no manifest, or if two manifests would be applied to different bases."""
    if not loaded:
        raise ManifestError("nothing to compare", "no manifests", "give at least one")

    def identify(one: LoadedManifest) -> tuple[object, ...]:
        where, said = find_base(one, base), one.manifest.base
        return (where.resolve() if isinstance(where, Path) else where, said.weights, said.variant)

    for one in loaded[1:]:
        if identify(one) != identify(loaded[0]):
            what = f"its base differs from that of {loaded[0].path}"
            raise ManifestError(what, one.path, "compare manifests of one base, or give --base")
