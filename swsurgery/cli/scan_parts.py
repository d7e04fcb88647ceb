"""Print the parts that the results of both kinds of scans have: head, tables of candidates, causal test and notes.

Scans for super weights (show_scan.py) and scans for super experts (show_experts.py) use this module. It must not
compute anything or import torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import permutations

from swsurgery.cli.output import print_table, print_text
from swsurgery.cli.show import MAX_ROWS
from swsurgery.errors import escape_control, list_some, pluralise
from swsurgery.model.text import describe_measured_text
from swsurgery.scanning.causal_report import AnyTest, Effect, Tested, UnitTrial
from swsurgery.scanning.report import Candidate, Scan, UnreadLayer
from swsurgery.storage.numbers import format_number, format_ratio

Columns = dict[str, Sequence[object]]
"""Maps the header of each column to its cells. A column that contains only None is not printed."""


def print_head(report: Scan, answer: str, scalars: Iterable[Candidate]) -> None:
    """Print what was scanned, the answer, the layers that were not read, and the tensors that contain `scalars`."""
    print_text(f"scanned   {describe_scanned(report)}")
    print_text(f"answer    {answer}")
    for line in describe_unread(report.unread):
        print_text(f"unread    {escape_control(line)}")
    for pattern in list_patterns(scalars):
        print_text(f"tensor    {escape_control(pattern)}")


def print_notes(notes: Sequence[str]) -> None:
    """Print the notes of a scan below an empty line."""
    if notes:
        print_text("")
    for note in notes:
        print_text(f"note      {escape_control(note)}")


def format_trials(trials: Sequence[UnitTrial[Tested]]) -> Columns:
    """Return the columns with the measured effects and the verdicts of a causal test."""
    return {
        "alone": [format_ratio(trial.alone.ratio) for trial in trials],
        "interval": [format_interval(trial.alone) for trial in trials],
        "KL": [format_cell(trial.alone.kl) for trial in trials],
        "without": [format_ratio(trial.without.ratio) if trial.without else None for trial in trials],
        "verdict": [trial.verdict for trial in trials],
    }


def print_measured(test: AnyTest) -> None:
    """Print the perplexity of the base, the text, the dtype and the device of a causal test."""
    print_text(
        f"measured  base perplexity {format_number(test.base_perplexity)} on "
        f"{describe_measured_text(test)}, {test.dtype} on {escape_control(test.device)}"
    )
    print_protocol(test.protocol.describe(), test.text_sha256)


def print_protocol(description: str, digest: str) -> None:
    """Print the protocol by which a text was measured, and the digest of the text."""
    print_text(f"protocol  {escape_control(description)}; text sha256 {escape_control(digest[:16])}")


def describe_undecided(report: Scan, tested: bool) -> str:
    """Return the answer of a scan that found nothing and did not read everything. `tested`: it had candidates."""
    layers = pluralise(len(report.unread), "layer")
    what = "confirmed" if tested else "found"
    return f"undecided: nothing was {what}, but {layers} of {report.layers} were not read completely"


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
        lines.append(f"{line}: {list_some(names, 3)}")
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


def format_cell(value: float | None) -> str | None:
    """Round a number for a table; --json prints all digits. Returns None, which makes an empty cell, for None."""
    return None if value is None else format_number(value)
