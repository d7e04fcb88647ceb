"""Write the manifest that edits the super experts of a scan. This module measures nothing and writes no file."""

from __future__ import annotations

import math
from collections.abc import Mapping

from swsurgery.errors import ManifestError, pluralise
from swsurgery.manifest.writer import Operation, refuse_unfit
from swsurgery.scanning.causal_report import find_largest_ratio
from swsurgery.scanning.expert_report import ExpertCandidate, ExpertScan, ExpertTrial
from swsurgery.scanning.outputs import write_found
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
    edits = [(_describe(expert, trials.get(expert.name)), _list_fields(expert, op, factor)) for expert in found]
    ratio = find_largest_ratio(report.expert_confirmation, {expert.name for expert in found})
    what = pluralise(len(found), "super expert")
    verdicts = [trial.verdict if (trial := trials.get(expert.name)) else None for expert in found]
    return write_found(
        report, edits, base, op, factor, prefix="scan-experts", what=what, verdicts=verdicts, ratio=ratio
    )


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
