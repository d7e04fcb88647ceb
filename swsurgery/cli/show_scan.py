"""Print the results of scans and sweeps as lines and tables on stdout.

This module must not compute anything or import torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import permutations

from swsurgery.cli.output import print_table, print_text
from swsurgery.cli.show import MAX_ROWS
from swsurgery.errors import escape_control, pluralise
from swsurgery.model.text import describe_measured_text
from swsurgery.scanning.comparison import Comparison
from swsurgery.scanning.report import (
    VERDICTS,
    Candidate,
    ColumnNull,
    Confirmation,
    Effect,
    PersistentActivation,
    Scan,
    Sweep,
    UnreadLayer,
)
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.numbers import format_number, format_ratio

Columns = dict[str, Sequence[object]]
"""Maps the header of each column to its cells. A column that contains only None is not printed."""


def show_scan(report: Scan) -> None:
    """Print the answer of a scan, then its candidates, the effects of zeroing them, and the notes."""
    print_text(f"scanned   {describe_scanned(report)}")
    print_text(f"answer    {_describe_answer(report)}")
    for line in describe_unread(report.unread):
        print_text(f"unread    {escape_control(line)}")
    trials = report.confirmation.trials if report.confirmation else ()
    companions = [trial.candidate for trial in trials if not trial.listed]
    for pattern in list_patterns([*report.candidates, *companions]):
        print_text(f"tensor    {escape_control(pattern)}")
    if report.activations:
        _print_activations(report.activations)
    if report.candidates:
        _print_candidates(report.candidates, scored=report.method == "weights")
    if report.confirmation is not None:
        _print_confirmation(report.confirmation)
    if report.notes:
        print_text("")
    for note in report.notes:
        print_text(f"note      {escape_control(note)}")


def _print_activations(activations: Sequence[PersistentActivation]) -> None:
    print_text("\nsuper activations: channels with massive values after these layers")
    print_columns(
        {
            "channel": [a.channel for a in activations],
            "from layer": [a.layer for a in activations],
            "to layer": [a.last for a in activations],
            "value": [format_cell(a.value) for a in activations],
            "peak after": [a.peak for a in activations],
            "prompt": [a.prompt for a in activations],
            "token": [a.token for a in activations],
            "prompts": [a.prompts for a in activations],
        }
    )


def _print_candidates(candidates: Sequence[Candidate], scored: bool) -> None:
    print_text("\ncandidates")
    print_columns(
        _format_places(candidates)
        | {
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
    print_table(
        ("factor", "perplexity", "ratio", "KL", "stop-word mass", "largest hidden state", ""),
        [
            (
                *(format_cell(p.factor), format_cell(p.perplexity), format_ratio(p.ratio)),
                *(format_cell(p.kl), format_cell(p.stopword_mass), format_cell(p.peak)),
                " ".join((["base"] if p is report.base else []) + ([] if p.finite else ["NOT FINITE"])),
            )
            for p in points
        ],
    )
    print_text("\nKL(base || scaled) is in nats per token; the largest hidden state is the largest after any layer")
    where = f"{report.dtype} on {escape_control(report.device)}, {escape_control(report.method)}"
    print_text(f"measured on {describe_measured_text(report)}, {where}")


def show_comparison(report: Comparison) -> None:
    """Print one row for the base and for each manifest, then the text and the device used."""
    print_text(f"base      {escape_control(report.base)}")
    print_text("")
    rounded = any(model.activations != "as computed" for model in report.models)
    print_table(
        (
            *("manifest", "activations")[: 1 + rounded],
            *("scalars", "bytes", "norm", "relative", "perplexity", "ratio", "interval", "KL", "interval"),
            *("stop-word mass", ""),
        ),
        [
            (
                *("base" if m.manifest is None else m.manifest, m.activations)[: 1 + rounded],
                *(m.changed_scalars, m.changed_bytes, format_cell(m.norm), format_cell(m.relative_norm)),
                *(format_cell(m.perplexity), format_ratio(m.ratio)),
                _format_ends(m.ratio_low, m.ratio_high, format_ratio),
                format_cell(m.kl),
                _format_ends(m.kl_low, m.kl_high, format_number),
                *(format_cell(m.stopword_mass), "" if m.finite else "NOT FINITE"),
            )
            for m in report.models
        ],
    )
    print_text("\nnorm is the Frobenius norm of the change, relative to the changed tensors in the next column")
    print_text("KL(base || model) is in nats per token; intervals are at 95%")
    where = f"{report.dtype} on {escape_control(report.device)}, {escape_control(report.method)}"
    print_text(f"measured on {describe_measured_text(report)}, {where}")


def _format_ends(low: float | None, high: float | None, write: Callable[[float], str]) -> str:
    return "-" if low is None or high is None else f"{write(low)} to {write(high)}"


def _print_confirmation(confirmation: Confirmation) -> None:
    print_text(
        "\ncausal test: perplexity divided by the base's, if this scalar is zeroed (alone) or all others are (without)"
    )
    trials = confirmation.trials
    print_columns(
        _format_places([trial.candidate for trial in trials])
        | {
            "alone": [format_ratio(trial.alone.ratio) for trial in trials],
            "interval": [format_interval(trial.alone) for trial in trials],
            "KL": [format_cell(trial.alone.kl) for trial in trials],
            "without": [format_ratio(trial.without.ratio) if trial.without else None for trial in trials],
            "verdict": [trial.verdict for trial in trials],
            "": [None if trial.listed else "companion" for trial in trials],
        }
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
    print_text(
        f"measured  base perplexity {format_number(confirmation.base_perplexity)} on "
        f"{describe_measured_text(confirmation)}, {confirmation.dtype} on {escape_control(confirmation.device)}"
    )


def describe_scanned(report: Scan) -> str:
    line = f"{pluralise(report.layers, 'layer')} of {escape_control(report.model_type)} by {report.method}"
    return f"{line}, {pluralise(len(report.prompts), 'prompt')}" if report.prompts else line


def describe_unread(unread: Sequence[UnreadLayer]) -> list[str]:
    """Return one line for each group of layers in which the same tensors were not read.

    For example "layers 1 to 3: model.layers.*.mlp.down_proj.weight". If only some experts were not read, their numbers
    follow those of the layers, as in "layer 1, experts 3, 5: ...".
    """
    alike: dict[tuple[tuple[int, ...], tuple[str, ...]], list[int]] = {}
    for layer in unread:
        names = tuple(re.sub(rf"(?<=\.){layer.layer}(?=\.)", "*", name, count=1) for name in layer.tensors)
        alike.setdefault((layer.experts, names), []).append(layer.layer)
    lines = []
    for (experts, names), layers in alike.items():
        line = _format_numbered("layer", layers) + (f", {_format_numbered('expert', experts)}" if experts else "")
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"{line}: {', '.join(names[:3])}{more}")
    return lines


def _format_numbered(noun: str, numbers: Sequence[int]) -> str:
    """Return the noun and the numbers, such as "layers 1 to 3, 5". At least three consecutive numbers make a range."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"{noun}{'s' if len(numbers) > 1 else ''} {', '.join(parts)}"


def _describe_answer(report: Scan) -> str:
    if report.answer == "undecided":
        layers = pluralise(len(report.unread), "layer")
        what = "confirmed" if report.candidates else "found"
        return f"undecided: nothing was {what}, but {layers} of {report.layers} were not read completely"
    count = len(report.super_weights)
    if report.confirmation is None or (count and not report.confirmed):
        return f"{pluralise(count, 'super weight')}, not confirmed" if count else "none: no super weight was found"
    verdicts = Counter(trial.verdict for trial in report.confirmation.trials)
    tally = ", ".join(f"{verdicts[v]} {v}" for v in VERDICTS if verdicts[v])
    if not count:
        return "none: no super weight was confirmed" + (f" ({tally})" if tally else "")
    return f"{pluralise(count, 'super weight')} confirmed ({tally})"


def _format_places(candidates: Sequence[Candidate]) -> Columns:
    return {
        "layer": [c.layer for c in candidates],
        "expert": [c.expert for c in candidates],
        "row": [c.row for c in candidates],
        "col": [c.col for c in candidates],
        "value": [format_cell(c.value) for c in candidates],
    }


def print_columns(columns: Columns) -> None:
    kept = {header: cells for header, cells in columns.items() if any(cell is not None for cell in cells)}
    rows = [["" if cell is None else cell for cell in row] for row in zip(*kept.values(), strict=True)]
    print_table(list(kept), rows[:MAX_ROWS])
    if len(rows) > MAX_ROWS:
        print_text(f"... and {len(rows) - MAX_ROWS} more")


def list_patterns(candidates: Iterable[Candidate]) -> list[str]:
    """Return each distinct tensor name with its axes, such as "model.layers.{layer}.mlp.down_proj.weight[row, col]".

    Placeholders replace the numbers of the layer and the expert.
    """
    names: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        names.setdefault(_format_pattern(candidate), []).append(candidate)
    return [f"{name}[{_find_axes(group)}]" for name, group in names.items()]


def _format_pattern(candidate: Candidate) -> str:
    numbers = {"layer": candidate.layer, "expert": candidate.expert}
    parts = candidate.coordinate.tensor.split(".")
    for name, number in numbers.items():
        if str(number) in parts:
            parts[parts.index(str(number))] = f"{{{name}}}"
    return ".".join(parts)


def _find_axes(candidates: Sequence[Candidate]) -> str:
    """Return the axes of the candidates' tensors in order, such as "row, col".

    If several orders agree with the indices of all candidates, the first one is returned.
    """
    length = len(candidates[0].coordinate.index)
    for order in permutations(("expert", "row", "col") if length == 3 else ("row", "col")):
        if all(c.coordinate.index == tuple(getattr(c, axis) for axis in order) for c in candidates):
            return ", ".join(order)
    raise AssertionError("the index of a candidate must contain its row and col")


def _format_short(coordinates: Iterable[Coordinate], confirmation: Confirmation) -> str:
    known = {trial.candidate.coordinate: trial.candidate for trial in confirmation.trials}
    return " + ".join(_name(known[c]) if c in known else str(c) for c in coordinates)


def _name(candidate: Candidate) -> str:
    expert = "" if candidate.expert is None else f" expert {candidate.expert}"
    return f"L{candidate.layer}{expert} [{candidate.row}, {candidate.col}]"


def format_effect(effect: Effect) -> str:
    interval = format_interval(effect)
    return (
        f"ratio {format_ratio(effect.ratio)}"
        + (f" ({interval})" if interval else "")
        + f", KL {format_number(effect.kl)}"
    )


def format_interval(effect: Effect) -> str | None:
    if effect.low is None or effect.high is None:
        return None
    return f"{format_ratio(effect.low)} to {format_ratio(effect.high)}"


def _format_column_null(column: ColumnNull) -> str:
    expert = "" if column.expert is None else f" expert {column.expert}"
    line = f"{pluralise(len(column.alone), 'other large row')} of layer {column.layer}{expert} column {column.col}"
    if not column.alone:
        return line
    return f"{line}: alone {_format_range(column.alone)}, beside all candidates {_format_range(column.added)}"


def _format_range(ratios: Sequence[float]) -> str:
    return f"{format_ratio(min(ratios))} to {format_ratio(max(ratios))}"


def format_cell(value: float | None) -> str | None:
    """Round a number for a table; --json prints all digits. Returns None, which makes an empty cell, for None."""
    return None if value is None else format_number(value)
