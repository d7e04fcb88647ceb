"""Print the result of a scan for super experts as lines and tables on stdout.

This module must not compute anything or import torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from swsurgery.cli.output import print_text
from swsurgery.cli.scan_parts import (
    describe_undecided,
    format_cell,
    format_effect,
    format_trials,
    print_columns,
    print_head,
    print_measured,
    print_notes,
)
from swsurgery.errors import pluralise
from swsurgery.scanning.expert_report import ExpertCandidate, ExpertConfirmation, ExpertMaximum, ExpertScan
from swsurgery.storage.numbers import format_ratio


def show_experts(report: ExpertScan) -> None:
    """Print the answer of a scan, then its candidates, the effects of zeroing them, and the notes."""
    print_head(report, _describe_answer(report), [expert.cause for expert in report.experts])
    if report.experts:
        _print_candidates(report.experts)
    _print_largest(report.largest)
    if report.expert_confirmation is not None:
        _print_confirmation(report.expert_confirmation)
    print_notes(report.notes)


def _print_candidates(experts: Sequence[ExpertCandidate]) -> None:
    print_text("\ncandidates: the largest output of the down projection, and the scalar with the largest share of it")
    print_columns(
        {
            "layer": [e.layer for e in experts],
            "expert": [e.expert for e in experts],
            "output": [format_cell(e.output) for e in experts],
            "prompt": [e.prompt for e in experts],
            "token": [e.token for e in experts],
            "prompts": [e.prompts for e in experts],
            "state / median": [format_cell(e.state) for e in experts],
            "row": [e.row for e in experts],
            "col": [e.cause.col for e in experts],
            "value": [format_cell(e.cause.value) for e in experts],
            "input": [format_cell(e.cause.input_spike) for e in experts],
            "share": [format_cell(e.cause.share) for e in experts],
            "rank of |W|": [f"{e.cause.rank:,}" for e in experts],
        }
    )


def _print_largest(largest: Sequence[ExpertMaximum]) -> None:
    if not largest:
        return
    print_text("\nexperts with the largest outputs")
    print_columns(
        {
            "layer": [one.layer for one in largest],
            "expert": [one.expert for one in largest],
            "output": [format_cell(one.output) for one in largest],
        }
    )


def _print_confirmation(confirmation: ExpertConfirmation) -> None:
    print_text(
        "\ncausal test: perplexity ratio to the base with this expert zeroed (alone), and with all others (without)"
    )
    trials = confirmation.trials
    print_columns(
        {
            "layer": [trial.candidate.layer for trial in trials],
            "expert": [trial.candidate.expert for trial in trials],
            **format_trials(trials),
        }
    )
    print_text(f"\ntogether  {format_effect(confirmation.together)}")
    for joint in confirmation.joint_sets:
        names = " + ".join(f"L{layer} expert {expert}" for layer, expert in joint.experts)
        print_text(f"joint     {format_effect(joint.effect)}: {names}")
    for ratios, what in ((confirmation.null, "random expert"), (confirmation.joint_null, "random set")):
        if ratios:
            how = "each alone" if what == "random expert" else "of as many experts, zeroed together"
            span = f"{format_ratio(min(ratios))} to {format_ratio(max(ratios))}"
            print_text(f"null      {pluralise(len(ratios), what)} of the same layers, {how}: ratio {span}")
    print_measured(confirmation)


def _describe_answer(report: ExpertScan) -> str:
    if report.answer == "undecided":
        return describe_undecided(report, bool(report.experts))
    count = pluralise(len(report.super_experts), "super expert")
    if not report.super_experts:
        return f"none: no super expert was {'confirmed' if report.experts else 'found'}"
    return f"{count} confirmed" if report.confirmed else f"{count}, not confirmed"
