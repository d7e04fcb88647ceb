"""Print the results of scans and sweeps as lines and tables on stdout.

This module must not compute anything or import torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from swsurgery.checkpoint.part_words import describe_random_parts
from swsurgery.cli.output import print_table, print_text
from swsurgery.cli.scan_parts import (
    Columns,
    describe_undecided,
    format_cell,
    format_effect,
    format_trials,
    print_columns,
    print_head,
    print_measured,
    print_notes,
    print_protocol,
)
from swsurgery.cli.show_tasks import show_tasks
from swsurgery.errors import escape_control, list_some, pluralise
from swsurgery.model.intervals import LEAST_WINDOWS
from swsurgery.model.text import describe_measured_text
from swsurgery.scanning.activation_report import Passport, PersistentActivation
from swsurgery.scanning.causal_report import VERDICTS
from swsurgery.scanning.comparison import Comparison
from swsurgery.scanning.part_report import PartConfirmation
from swsurgery.scanning.report import (
    Candidate,
    ColumnNull,
    Confirmation,
    Scan,
    Sweep,
    Trial,
)
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.numbers import format_number, format_ratio


def show_scan(report: Scan) -> None:
    """Print the answer of a scan, then its candidates, the effects of zeroing them, and the notes."""
    trials = report.confirmation.trials if report.confirmation else ()
    companions = [trial.candidate for trial in trials if not trial.listed]
    print_head(report, _describe_answer(report), [*report.candidates, *companions])
    if report.passport:
        _print_passport(report.passport)
    if report.activations:
        _print_activations(report.activations)
    if report.candidates or report.removers:
        _print_candidates([*report.candidates, *report.removers], scored=report.method == "weights")
    if report.confirmation is not None:
        _print_confirmation(report.confirmation)
    if report.part_confirmation is not None:
        _print_parts(report.part_confirmation)
    if test := report.confirmation or report.part_confirmation:
        print_measured(test)  # both tests run on the same text
    print_notes(report.notes)


def _print_parts(test: PartConfirmation) -> None:
    """Print the effects of zeroing the parts that create activations."""
    columns = "if this part is zeroed (alone) or all others are (without)"
    print_text(f"\nparts that create an activation: perplexity divided by the base's, {columns}")
    parts = [trial.candidate for trial in test.trials]
    channels = [", ".join(map(str, part.channels[:6])) for part in parts]
    print_columns({"part": [str(part.name) for part in parts], "channels": channels} | format_trials(test.trials))
    if len(parts) > 1:
        print_text(f"\ntogether  {format_effect(test.together)}")
    for kind, layer, ratios in test.part_nulls:
        if ratios:
            what = describe_random_parts(kind, layer, len(ratios))
            print_text(f"null      {what}, each alone: ratio {_format_range(ratios)}")


def _print_passport(passport: Passport) -> None:
    """Print the largest activation with and without BOS, and the published value if there is one."""
    for one in passport.find_extremes():
        alike, prompts = passport.count_prompts(one)
        down = "never falls below half" if one.down is None else f"falls below half in layer {one.down}"
        print_text(
            f"largest   {format_cell(one.value)} {'with' if one.bos else 'without'} BOS ({format_cell(one.ratio)} "
            f"medians): layer {one.layer}, prompt {one.prompt}, token {one.token}, channel {one.channel}; steps up in "
            f"layer {one.up}, {down}; largest at this token and channel in {alike} of {pluralise(prompts, 'prompt')}"
        )
    if known := passport.published:
        where = known.place if known.layer is None else f"layer {known.layer}, {known.place}"
        text = known.measured_on or "a text that is not stated"
        print_text(
            f"published {format_cell(known.value)} for {known.model} ({where}; {known.source}), measured on {text}, "
            "not on the prompts of this scan"
        )


def _print_activations(activations: Sequence[PersistentActivation]) -> None:
    """Print the super activations. Side effects and recurring activations follow in tables of their own."""
    for side, title in ((False, "super activations"), (True, "side effects")):
        shown = [a for a in activations if a.side is side and not a.recurring]
        if not shown:
            continue
        print_text(f"\n{title}: channels with massive values after these layers")
        print_columns(
            {
                "channel": [a.channel for a in shown],
                "from layer": [a.layer if a.first is None else a.first for a in shown],
                "steps up in": [a.layer if a.causes else None for a in shown],
                "to layer": [a.last for a in shown],
                "value": [format_cell(a.value) for a in shown],
                "in medians": [format_cell(a.ratio) for a in shown],
                "peak after": [a.peak for a in shown],
                "prompt": [a.prompt for a in shown],
                "token": [a.token for a in shown],
                "prompts": [a.prompts for a in shown],
                "made by": [a.cause.describe() if a.cause else None for a in shown],
                "removed by": [a.removed_by.describe() if a.removed_by else None for a in shown],
            }
        )
    _print_recurring([a for a in activations if a.recurring and a.stream == "residual"])
    _print_shared([a for a in activations if a.stream == "shared MLP"])


def _print_recurring(activations: Sequence[PersistentActivation]) -> None:
    """Print where each recurring activation appears and disappears, one row for each time."""
    if not activations:
        return
    print_text("\nrecurring activations: massive values before layers with full attention, which do not persist")
    rows = [(a, one) for a in activations for one in a.appearances]
    print_columns(
        {
            "channel": [a.channel for a, _ in rows],
            "from layer": [one.first for _, one in rows],
            "to layer": [one.last for _, one in rows],
            "full attention in": [", ".join(map(str, one.before)) for _, one in rows],
            "value": [format_cell(one.value) for _, one in rows],
            "token": [a.token for a, _ in rows],
            "prompts": [a.prompts for a, _ in rows],
            "made by": [one.made_by.describe() if one.made_by else None for _, one in rows],
            "removed by": [one.removed_by.describe() if one.removed_by else None for _, one in rows],
            "": ["side effect" if a.side else None for a, _ in rows],
        }
    )


def _print_shared(activations: Sequence[PersistentActivation]) -> None:
    """Print the activations in the outputs of MLPs that several layers share, one row for each of these layers."""
    if not activations:
        return
    print_text("\nactivations of shared MLPs: massive outputs in the layers that use the MLP")
    rows = [(a, one) for a in activations for one in a.appearances]
    print_columns(
        {
            "channel": [a.channel for a, _ in rows],
            "stored in layer": [a.layer for a, _ in rows],
            "used in layer": [one.first for _, one in rows],
            "value": [format_cell(one.value) for _, one in rows],
            "token": [a.token for a, _ in rows],
            "prompts": [a.prompts for a, _ in rows],
            "made by": [one.made_by.describe() if one.made_by else None for _, one in rows],
            "": ["side effect" if a.side else None for a, _ in rows],
        }
    )


def _print_candidates(candidates: Sequence[Candidate], scored: bool) -> None:
    print_text("\ncandidates")
    several = any(c.role == "removes" for c in candidates)
    print_columns(
        _format_places(candidates)
        | {
            "role": [c.role if several else None for c in candidates],
            "input spike": [format_cell(c.input_spike) for c in candidates],
            "output spike": [format_cell(c.output_spike) for c in candidates],
            "share": [format_cell(c.share) for c in candidates],
            "prompts": [c.prompts for c in candidates],
            "round": [c.round for c in candidates],
            "score": [format_cell(c.score) if scored else None for c in candidates],
            "z": [format_cell(c.z) for c in candidates],
            "rank of |W|": [f"{c.rank:,}" for c in candidates],
        }
    )


def show_sweep(report: Sweep) -> None:
    """Print the model's quality for each factor and for the base, then the text and the device used."""
    for name in (*map(str, report.coordinates), *report.regions):
        print_text(f"scaled    {escape_control(name)}")
    others = (point for point in report.points if point.factor != 1)
    points = sorted([*others, report.base], key=lambda point: point.factor)
    print_text("")
    known = any(point.ratio_low is not None for point in points)
    words = any(point.word_perplexity is not None for point in points)
    print_table(
        (
            *("factor", "perplexity", *["word perplexity"][:words], "ratio", *["interval"][:known]),
            *("KL", "stop-word mass", "largest hidden state", ""),
        ),
        [
            (
                *(format_cell(p.factor), format_cell(p.perplexity), *[format_cell(p.word_perplexity)][:words]),
                format_ratio(p.ratio),
                *[_format_ends(p.ratio_low, p.ratio_high, format_ratio)][:known],
                *(format_cell(p.kl), format_cell(p.stopword_mass), format_cell(p.peak)),
                " ".join((["base"] if p is report.base else []) + ([] if p.finite else ["NOT FINITE"])),
            )
            for p in points
        ],
    )
    print_text("\nKL(base || scaled) is in nats per token; the largest hidden state is the largest after any layer")
    if known:
        print_text("intervals are at 95%")
    where = f"{report.dtype} on {escape_control(report.device)}, {escape_control(report.method)}"
    print_text(f"measured on {describe_measured_text(report)}, {where}")
    print_protocol(report.protocol.describe(), report.text_sha256)


def show_comparison(report: Comparison) -> None:
    """Print one row for the base and for each manifest, then the text and the device used."""
    print_text(f"base      {escape_control(report.base)}")
    print_text("")
    words = any(model.word_perplexity is not None for model in report.models)
    rounded = any(model.activations != "as computed" for model in report.models)
    controlled = any(model.control is not None for model in report.models)
    print_table(
        (
            *("manifest", *["activations"][:rounded], *["control"][:controlled]),
            *("scalars", "bytes", "norm", "relative", "perplexity", *["word perplexity"][:words]),
            *("ratio", "interval", "KL", "interval"),
            *("stop-word mass", ""),
        ),
        [
            (
                *("base" if m.manifest is None else m.manifest, *[m.activations][:rounded]),
                *[m.control or "-"][:controlled],
                *(m.changed_scalars, "-" if m.changed_bytes is None else m.changed_bytes),
                *(format_cell(m.norm) or "-", format_cell(m.relative_norm) or "-"),
                *(format_cell(m.perplexity), *[format_cell(m.word_perplexity)][:words], format_ratio(m.ratio)),
                _format_ends(m.ratio_low, m.ratio_high, format_ratio),
                format_cell(m.kl),
                _format_ends(m.kl_low, m.kl_high, format_number),
                *(format_cell(m.stopword_mass), "" if m.finite else "NOT FINITE"),
            )
            for m in report.models
        ],
    )
    for m in report.models:
        if m.control is not None:
            print_text(f"control   {escape_control(f'{m.manifest}, {m.control}: {m.meaning}')}")
    print_text("\nnorm is the Frobenius norm of the change, relative to the changed tensors in the next column")
    intervals = "intervals are at 95%"
    if all(model.kl_low is None for model in report.models):
        intervals = f"95% intervals need at least {LEAST_WINDOWS} windows"
    print_text(f"KL(base || model) is in nats per token; {intervals}")
    where = f"{report.dtype} on {escape_control(report.device)}, {escape_control(report.method)}"
    print_text(f"measured on {describe_measured_text(report)}, {where}")
    print_protocol(report.protocol.describe(), report.text_sha256)
    show_tasks(None if report.tasks is None else report.tasks.to_json())


def _format_ends(low: float | None, high: float | None, write: Callable[[float], str]) -> str:
    return "-" if low is None or high is None else f"{write(low)} to {write(high)}"


def _print_confirmation(confirmation: Confirmation) -> None:
    print_text(
        "\ncausal test: perplexity divided by the base's, if this scalar is zeroed (alone) or all others are (without)"
    )
    trials = confirmation.trials
    print_columns(
        _format_places([trial.candidate for trial in trials])
        | format_trials(trials)
        | {"": [_describe_kind(trial) for trial in trials]}
    )
    print_text(f"\ntogether  {format_effect(confirmation.together)}")
    for joint in confirmation.joint_sets:
        names = escape_control(_format_short(joint.coordinates, confirmation))
        print_text(f"joint     {format_effect(joint.effect)}: {names}")
    for column in confirmation.column_nulls:
        print_text(f"null      {_format_column_null(column)}")
    if confirmation.null:
        print_text(
            f"null      {pluralise(len(confirmation.null), 'random scalar')} of similar magnitude, each alone: ratio "
            f"{format_ratio(min(confirmation.null))} to {format_ratio(max(confirmation.null))}"
        )


def _describe_kind(trial: Trial) -> str | None:
    """Describe a tested scalar that creates no activation itself; None for any other."""
    removes = trial.candidate.role == "removes"
    return "removes an activation" if removes else None if trial.listed else "companion"


def _describe_answer(report: Scan) -> str:
    """Return the answer: the super weights, and the parts that create an activation."""
    if report.answer == "undecided":
        return describe_undecided(report, bool(report.candidates or report.parts))
    head = "none: " if report.answer == "none" else ""
    return "; ".join([head + _describe_scalars(report), *_describe_parts(report)])


def _describe_scalars(report: Scan) -> str:
    count, test = len(report.super_weights), report.confirmation
    if test is None or (count and not test.has_verdicts):
        return f"{pluralise(count, 'candidate')}, not confirmed" if count else "no super weight was found"
    verdicts = Counter(trial.verdict for trial in test.trials)
    tally = ", ".join(f"{verdicts[v]} {v}" for v in VERDICTS if verdicts[v])
    needed = verdicts["needed alone"] + verdicts["needed jointly"]
    if count and not needed:
        return f"{pluralise(count, 'candidate')} without a verdict ({tally})"
    words = pluralise(needed, "super weight") if needed else "no super weight was"
    return f"{words} confirmed{f' ({tally})' if tally else ''}"


def _describe_parts(report: Scan) -> list[str]:
    """Name the rows, neurons, experts and channels that the model needs, or that have no verdict."""
    trials = report.part_trials
    needed = [part for part in report.found_parts if part.name in trials and trials[part.name].verdict != "untested"]
    untested = [part for part in report.found_parts if part not in needed]
    lines = []
    if report.parts and not report.found_parts:
        lines.append(f"{pluralise(len(report.parts), 'part')} inert")
    if needed:
        names = [f"{part.name} ({trials[part.name].verdict})" for part in needed]
        lines.append(f"{pluralise(len(needed), 'needed part')}: {list_some(names, 3)}")
    if untested:
        names = [str(part.name) for part in untested]
        lines.append(f"{pluralise(len(untested), 'part')}, not confirmed: {list_some(names, 3)}")
    return lines


def _format_places(candidates: Sequence[Candidate]) -> Columns:
    return {
        "layer": [c.layer for c in candidates],
        "expert": [c.expert for c in candidates],
        "row": [c.row for c in candidates],
        "col": [c.col for c in candidates],
        "value": [format_cell(c.value) for c in candidates],
    }


def _format_short(coordinates: Iterable[Coordinate], confirmation: Confirmation) -> str:
    known = {trial.candidate.coordinate: trial.candidate for trial in confirmation.trials}
    return " + ".join(_name(known[c]) if c in known else str(c) for c in coordinates)


def _name(candidate: Candidate) -> str:
    expert = "" if candidate.expert is None else f" expert {candidate.expert}"
    return f"L{candidate.layer}{expert} [{candidate.row}, {candidate.col}]"


def _format_column_null(column: ColumnNull) -> str:
    expert = "" if column.expert is None else f" expert {column.expert}"
    line = f"{pluralise(len(column.alone), 'other large row')} of layer {column.layer}{expert} column {column.col}"
    if not column.alone:
        return line
    return f"{line}: alone {_format_range(column.alone)}, beside all candidates {_format_range(column.added)}"


def _format_range(ratios: Sequence[float]) -> str:
    low, high = format_ratio(min(ratios)), format_ratio(max(ratios))
    return low if low == high else f"{low} to {high}"
