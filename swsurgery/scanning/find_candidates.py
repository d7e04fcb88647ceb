"""Find the candidates of an open checkpoint with one method, and measure the effects of zeroing them.

Each method imports its module, and with it torch, only when it runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.errors import LookupFailed, add_remedy
from swsurgery.known.own import identify
from swsurgery.model.start_up import start_up
from swsurgery.progress import Reporter, Rounds
from swsurgery.scanning.activation_report import PublishedActivation
from swsurgery.scanning.expert_report import ExpertScan
from swsurgery.scanning.report import Method, Scan
from swsurgery.scanning.run_options import RunOptions
from swsurgery.storage import numeric


def find_candidates(
    checkpoint: Checkpoint,
    method: Method,
    prompts: Sequence[str] | None,
    confirm: bool,
    options: RunOptions,
    reporter: Reporter,
) -> Scan:
    """Scan an open checkpoint. With `confirm`, measure the effects of zeroing the candidates too.

    Raises Unrunnable, ModelError and ArchitectureError. The remedy names the options that need no model.
    """
    if method == "experts":
        return _find_experts(checkpoint, prompts, confirm, options, reporter)
    by_weights = "--method weights without --confirm" if confirm else "--method weights"
    with add_remedy("leave out --confirm" if method == "weights" else by_weights):
        if method == "activations" or confirm:
            start_up(checkpoint, options.device, options.placement, reporter)
        if confirm:
            _refuse_text(checkpoint, options)
        if method == "activations":
            found = _scan_activations(checkpoint, prompts, options, reporter)
        else:
            found = _scan_weights(checkpoint, reporter)
    return _confirm(found, checkpoint, options, reporter) if confirm else found


def _scan_activations(
    checkpoint: Checkpoint, prompts: Sequence[str] | None, options: RunOptions, reporter: Reporter
) -> Scan:
    from swsurgery.scanning.by_activations import scan_activations

    progress = Rounds(reporter)
    found = scan_activations(checkpoint, prompts=prompts, progress=progress, say=reporter.say, **options.on_device)
    if found.passport is None:
        return found
    passport = dataclasses.replace(found.passport, published=_find_published(checkpoint))
    return dataclasses.replace(found, passport=passport)


def _find_published(checkpoint: Checkpoint) -> PublishedActivation | None:
    """Find the published maximum activation of a checkpoint, by the repository that it is known to come from."""
    try:
        known = identify(None, (checkpoint.repo_id, checkpoint.config.get("_name_or_path")))
    except LookupFailed:  # the user's own entry of this model is damaged, which must not end a scan
        return None
    found = known.max_activation if known else None
    if known is None or found is None:
        return None
    source = found.source
    return PublishedActivation(
        known.hf_id, found.value, found.layer, found.place, str(source), measured_on=source.measured_on
    )


def _scan_weights(checkpoint: Checkpoint, reporter: Reporter) -> Scan:
    numeric.load_numpy()
    from swsurgery.scanning.by_weights import scan_weights

    return scan_weights(checkpoint, progress=reporter)


def _find_experts(
    checkpoint: Checkpoint, prompts: Sequence[str] | None, confirm: bool, options: RunOptions, reporter: Reporter
) -> ExpertScan:
    """Scan an open checkpoint for super experts, and confirm the candidates if requested."""
    start_up(checkpoint, options.device, options.placement, reporter)
    from swsurgery.scanning.experts import scan_experts

    if confirm:
        with add_remedy("leave out --confirm"):
            _refuse_text(checkpoint, options)
    progress = Rounds(reporter)
    found = scan_experts(checkpoint, prompts=prompts, progress=progress, say=reporter.say, **options.on_device)
    return _confirm_experts(found, checkpoint, options, reporter) if confirm and found.experts else found


def _refuse_text(checkpoint: Checkpoint, options: RunOptions) -> None:
    """Refuse a text that is too short for the causal test, before the scan. Raises ModelError."""
    from swsurgery.scanning.causal_test import refuse_text

    refuse_text(checkpoint, options.text, options.protocol)


def _confirm(found: Scan, checkpoint: Checkpoint, options: RunOptions, reporter: Reporter) -> Scan:
    """Measure the effects of zeroing the scalars that a scan found, and the parts that create activations."""
    from swsurgery.scanning.causal_report import Families
    from swsurgery.scanning.causal_test import CausalOptions, open_bench
    from swsurgery.scanning.confirm import confirm_scalars
    from swsurgery.scanning.confirm_parts import choose_testable, confirm_parts, count_tests
    from swsurgery.scanning.parts import list_parts

    suspects, (_, said) = (*found.candidates, *found.removers), list_parts(checkpoint, found.activations)
    if not suspects and not found.parts:
        return dataclasses.replace(found, notes=(*found.notes, *said))
    causal = CausalOptions(progress=Rounds(reporter, "confirmation round"), say=said.append)
    with add_remedy("leave out --confirm"), open_bench(checkpoint, options, said.append) as bench:
        parts = choose_testable(bench.model, found.parts, said.append)
        of_parts = count_tests(parts)
        first = dataclasses.replace(causal, others=of_parts)
        scalar_test = bench.run(confirm_scalars, suspects, first) if suspects else None
        others = scalar_test.families.subtract(of_parts) if scalar_test else Families()
        second = dataclasses.replace(causal, others=others)
        part_test = bench.run(confirm_parts, parts, second) if parts else None
    notes = (*found.notes, *dict.fromkeys(said))
    return dataclasses.replace(found, confirmation=scalar_test, part_confirmation=part_test, notes=notes)


def _confirm_experts(found: ExpertScan, checkpoint: Checkpoint, options: RunOptions, reporter: Reporter) -> ExpertScan:
    """Measure the effects of zeroing the experts that a scan found."""
    from swsurgery.scanning.causal_test import CausalOptions, open_bench
    from swsurgery.scanning.confirm_experts import confirm_experts

    said: list[str] = []
    causal = CausalOptions(progress=Rounds(reporter, "confirmation round"), say=said.append)
    with add_remedy("leave out --confirm"), open_bench(checkpoint, options, said.append) as bench:
        confirmation = bench.run(confirm_experts, found.experts, causal)
    return dataclasses.replace(found, expert_confirmation=confirmation, notes=(*found.notes, *said))
