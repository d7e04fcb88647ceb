"""Write the manifest that edits the super experts of a scan. This module measures nothing and writes no file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from swsurgery._version import __version__
from swsurgery.errors import ManifestError
from swsurgery.known.table import LARGE_RATIO
from swsurgery.manifest.load import parse_manifest
from swsurgery.manifest.writer import Operation, refuse_unfit, write_manifest
from swsurgery.scanning.expert_report import ExpertCandidate, ExpertScan, ExpertTrial
from swsurgery.storage.numbers import format_number, format_ratio


def write_expert_manifest(
    report: ExpertScan, *, base: Mapping[str, str | None], op: Operation, factor: float | None = None
) -> str:
    """Write the YAML text of a manifest that applies `op` to every matrix of the super experts of a scan.

    `base` contains the fields of the manifest's base, as in `outputs.scan_manifest`. If zeroing raised perplexity by at
    least `LARGE_RATIO` in the causal test, the check of a manifest with `op` "zero" requires that perplexity rises.
    Raises ManifestError if the scan found nothing, if `factor` does not fit `op`, or if `base` is not valid in a
    manifest.
    """
    refuse_unfit(op, factor)
    found = report.super_experts
    if not found:
        tested = f"all {len(report.experts)} candidates are inert" if report.experts else "there is no candidate"
        raise ManifestError(f"nothing to {op}: the scan found no super expert", remedy=tested)
    trials = {t.candidate.name: t for t in (report.expert_confirmation.trials if report.expert_confirmation else ())}
    how = "found and confirmed" if report.confirmed else "found, not confirmed"
    what = f"{len(found)} super expert{'s' if len(found) > 1 else ''} that a scan by experts {how}"
    text = write_manifest(
        head=[f"written by swsurgery scan, version {__version__}"],
        name=f"scan-experts-{op}" + (f"-{factor:g}" if factor is not None else ""),
        description=f"{op.capitalize()} {what}" + (f" by {factor!r}" if factor is not None else ""),
        base=base,
        edits=[(_describe(expert, trials.get(expert.name)), _list_fields(expert, op, factor)) for expert in found],
        damaging=op == "zero" and _find_largest_ratio(report) >= LARGE_RATIO,
    )
    parse_manifest(text.encode(), Path("the scan's manifest"))  # `base` comes from the caller and may be invalid
    return text


def _list_fields(expert: ExpertCandidate, op: Operation, factor: float | None) -> dict[str, object]:
    fields: dict[str, object] = {"op": op, "layer": expert.layer, "expert": expert.expert}
    return fields if factor is None else fields | {"factor": factor}


def _describe(expert: ExpertCandidate, trial: ExpertTrial | None) -> str:
    """Describe an expert in the comment above its edit."""
    cause = expert.cause
    output = f"output {format_number(expert.output)}, {cause.share or math.nan:.0%} of it from {cause.coordinate}"
    if trial is None or trial.verdict == "untested":
        return f"{output}; not confirmed"
    return f"{output}; {trial.verdict}, perplexity x{format_ratio(trial.alone.ratio)} without it"


def _find_largest_ratio(report: ExpertScan) -> float:
    """Find the largest perplexity ratio measured for zeroing super experts; 1 if none was measured."""
    test, zeroed = report.expert_confirmation, {expert.name for expert in report.super_experts}
    if test is None:
        return 1.0
    ratios = [t.alone.ratio for t in test.trials if t.candidate.name in zeroed]
    ratios += [s.effect.ratio for s in test.joint_sets if zeroed.issuperset(s.experts)]
    if zeroed == {t.candidate.name for t in test.trials}:
        ratios.append(test.together.ratio)
    return max((ratio for ratio in ratios if not math.isnan(ratio)), default=1.0)
