"""Render known super weights as a table for the terminal and as a manifest for `apply`.

All functions are pure. Must not depend on checkpoints or files.
"""

from __future__ import annotations

import math
import shlex
import textwrap
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from swsurgery.errors import LookupFailed, escape_control
from swsurgery.known.schema import (
    LARGEST_FLOAT16,
    STATUSES,
    Citation,
    Figure,
    KnownColumn,
    KnownCoordinate,
    KnownEffect,
    KnownExpert,
    KnownJointSet,
    KnownModel,
    MaxActivation,
    select_by_status,
    select_entries,
)
from swsurgery.known.shipped import list_addressable, list_negative_results
from swsurgery.manifest.writer import Operation, is_gentle, list_edit_fields, refuse_unfit, write_manifest
from swsurgery.storage.numbers import format_number

UNDECIDED_NOTE = "A scan is undecided."
"""First words of the note in an own entry if the scan found nothing and did not read every layer."""

DERIVED = "checkpoint"
"""The directory that a restore manifest names as its base: a placeholder, which --base replaces."""

LARGE_RATIO = 4.0
"""Minimum known perplexity ratio from zeroing for which a printed manifest makes the sanity check require damage."""


def render_table(model: KnownModel, width: int = 100, status: str | Collection[str] | None = None) -> str:
    """Render one model as a table for a terminal of `width` columns.

    The table contains the maximum activation, the coordinates with tensor, value, status and the effect of zeroing each
    alone, then whole experts and columns, joint sets, other measurements, warnings, negative results, notes, and the
    sources as numbered footnotes. Raises LookupFailed for an unknown status.
    """
    shown = select_by_status(model, status)
    notes = _Footnotes()
    out = _Page(width)
    _add_heading(out, model, notes)
    _add_coordinates(out, model, shown, notes)
    _add_parts(out, "expert", select_entries(model.experts, status), notes)
    _add_parts(out, "column", select_entries(model.columns, status), notes)
    _add_joint_sets(out, model, shown, notes)
    out.section("measured otherwise", [f"{e.protocol}: {_describe_effect(e, notes)}" for e in model.effects])
    out.section("", [f"WARNING: {warning}" for warning in _list_warnings(model, shown)], indent=0)
    found = [f"- {result.finding} ({result.cite})" for result in list_negative_results(model)]
    out.section("published without a super weight", found)
    out.section("notes", [f"- {note}" for note in model.notes])
    notes.mark(*model.scans)
    _add_sources(out, notes.sources)
    return out.text()


def _add_heading(out: _Page, model: KnownModel, notes: _Footnotes) -> None:
    out.line(f"{model.hf_id} ({model.family})")
    out.line(
        f"{model.num_layers} layers, hidden {model.hidden_size}, intermediate {model.intermediate_size}"
        + (f", {model.num_experts} experts" if model.num_experts else "")
        + (f", vocabulary {model.vocab_size}" if model.vocab_size else "")
        + (f"; also called {', '.join(model.aliases)}" if model.aliases != (model.hf_id,) else "")
    )
    if model.own:
        out.line(f"with an own scan, which swsurgery lookup {shlex.quote(model.slug)} --forget removes")
    if model.revision_measured:
        out.line(f"measured at revision {model.revision_measured}")
    if model.max_activation:
        out.line(
            f"maximum activation {describe_max_activation(model.max_activation)} "
            f"{notes.mark(model.max_activation.source)}"
        )
    out.line()


def _add_coordinates(out: _Page, model: KnownModel, shown: Sequence[KnownCoordinate], notes: _Footnotes) -> None:
    rows = [("coordinate", "value", "status", "zeroed alone")]
    rows += [(c.id, format_value(c), _describe_status(c), _describe_alone(c)) for c in shown]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    head, *cells = ["  ".join([*(cell.ljust(w) for cell, w in zip(r, widths, strict=False)), r[3]]) for r in rows]
    out.line(head)
    for coordinate, line in zip(shown, cells, strict=True):
        out.line(line)
        for detail in _describe_coordinate(model, coordinate, notes):
            out.line(detail, indent=4)
    if not shown:
        out.line("none of this status" if model.coordinates else "none")


def _add_parts(out: _Page, what: str, parts: Sequence[KnownExpert | KnownColumn], notes: _Footnotes) -> None:
    """Add the experts or columns that were published as a whole, with status, effect of zeroing each, and sources."""
    if not parts:
        return
    rows = [(f"whole {what}", "status"), *((part.id, part.status) for part in parts)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *cells = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    out.line()
    out.line(f"{head}  zeroed alone")
    for part, cell in zip(parts, cells, strict=True):
        effects = "".join(f"; {_describe_protocol(e)}: {_describe_effect(e, notes)}" for e in part.effects)
        remark = f" ({part.note})" if part.note else ""
        out.line(f"{cell}  {part.causal_alone}{effects} {notes.mark(*part.sources)}{remark}", hanging=4)


def _add_joint_sets(out: _Page, model: KnownModel, shown: Iterable[KnownCoordinate], notes: _Footnotes) -> None:
    """Add the joint sets with at least one of the coordinates shown."""
    ids = {c.id for c in shown}
    joint = [j for j in model.joint_sets if ids.intersection(j.coordinates)]
    if joint:
        out.line()
        out.line("zeroed together")
        for joint_set in joint:
            out.line(" + ".join(joint_set.coordinates), indent=2)
            out.line(_describe_joint_set(joint_set, notes), indent=4)


def _add_sources(out: _Page, sources: Iterable[Citation]) -> None:
    out.line()
    out.line("sources")
    for number, source in enumerate(sources, 1):
        kind = "second-hand" if source.kind == "secondary" else source.kind
        measured = f"measured on {source.measured_on}" if source.measured_on else ""
        text = f"[{number}] {_cite(source)} ({'; '.join(filter(None, (kind, measured, source.note)))})"
        out.line(text, indent=2, hanging=4)


def render_manifest(
    model: KnownModel,
    op: Operation,
    factor: float | None = None,
    status: str | Collection[str] | None = None,
) -> str:
    """Render a manifest, as YAML text, that applies `op` to the known coordinates of a model.

    Without `status`, a protect manifest contains every coordinate that identifies a scalar and is not refuted. A zero
    or scale manifest also omits those with status insufficient, because no test has shown that they matter. A restore
    manifest is for a checkpoint that was derived from the model; it contains the coordinates whose exact value is
    known, and lists the others in a comment. Raises ManifestError for another operation or a factor that does not fit
    it, and LookupFailed if no coordinate is left.
    """
    refuse_unfit(op, factor, values_known=True)
    tested = set(STATUSES) - {"refuted", "insufficient"}
    listed = list_addressable(model, tested if status is None and op in ("zero", "scale") else status)
    coordinates = [c for c in listed if op != "restore" or c.value is not None]
    if not coordinates:
        reason = "no exact value is known" if listed else _explain_none(model, op, status)
        raise LookupFailed(f"no whole coordinate to {op}", model.slug, reason)
    head = [f"{model.hf_id}: printed by", f"  {_make_command(model, op, factor, status)}"]
    if op == "restore":
        head.append(
            "Give the checkpoint whose super weights are to be restored: swsurgery apply MANIFEST --base CHECKPOINT"
        )
    if unknown := [c.id for c in listed if c not in coordinates]:
        head.append(f"Not restored, because no exact value is known: {', '.join(unknown)}")
    what = f"{len(coordinates)} known coordinate{'s' if len(coordinates) > 1 else ''} of {model.hf_id}"
    base: dict[str, str | None]
    if op == "restore":
        base = {"path": DERIVED, "model": model.hf_id}
    elif model.path:
        base = {"path": model.path, "model": model.hf_id}
    else:
        base = {"repo_id": model.hf_id, "revision": model.pinned_revision}
    return write_manifest(
        head=head,
        name=f"{model.slug}-{op}" + (f"-{factor:g}" if factor is not None else ""),
        description=f"{op.capitalize()} {what}" + (f" by {factor!r}" if factor is not None else ""),
        base=base,
        edits=[(_make_comment(c, op), _make_edit(c, op, factor)) for c in coordinates],
        damaging=op == "zero" and _find_largest_ratio(model, coordinates) >= LARGE_RATIO,
        gentle=is_gentle(op, factor),
    )


def describe(effect: KnownEffect) -> str:
    """Describe one measurement in a few words, as in `wikitext2 ppl 5.67 -> 1211` or `wikitext2 ppl x3667`."""
    metric = effect.metric.replace("_", " ")
    times = f"x{format_figure(effect.ratio)}" if effect.ratio not in (None, math.inf) else ""
    if effect.dose or effect.dose_ratio:
        pairs = [f"{format_figure(a)}: {format_figure(b)}" for a, b in effect.dose]
        pairs += [f"{format_figure(a)}: x{format_figure(b)}" for a, b in effect.dose_ratio]
        return f"{metric} at {', '.join(pairs)}"
    if effect.before is not None and effect.after is not None:
        return f"{metric} {format_figure(effect.before)} -> {format_figure(effect.after)}"
    if effect.after is None or times:
        return f"{metric} {times}".rstrip()
    return f"{metric} {format_figure(effect.after)}"


def describe_max_activation(found: MaxActivation) -> str:
    """Describe a maximum activation, as in `-13,248 in layer 13 (hidden state); half of it from layer 3`."""
    where = f"in layer {found.layer} ({found.place})" if found.layer is not None else f"({found.place})"
    start = f"; half of it from layer {found.from_layer}" if found.from_layer is not None else ""
    return f"{found.value:,g} {where}{start}"


def explain_overflow(model: KnownModel) -> str | None:
    """Return a warning if float16 cannot represent a model's maximum activation; None if it can or if none is known."""
    found = model.max_activation
    if found is None or found.fits_float16:
        return None
    return (
        f"float16 cannot represent the maximum activation: {abs(found.value):,.0f} > {LARGEST_FLOAT16:,.0f}; "
        "run this model in bfloat16 or float32"
    )


def format_figure(value: Figure) -> str:
    """Format a measured number with four digits, or as an integer from 1000; words stay unchanged."""
    if isinstance(value, str):
        return value
    if math.isinf(value):
        return "infinite"
    return format_number(value, commas=(10_000, math.inf))


class _Footnotes:
    """Numbers sources in the order of their first citation."""

    def __init__(self) -> None:
        self.sources: list[Citation] = []

    def mark(self, *sources: Citation) -> str:
        """Cite the sources: number those that are new, and return the marks of all, such as "[1] [3]"."""
        marks = []
        for source in dict.fromkeys(sources):
            if source not in self.sources:
                self.sources.append(source)
            marks.append(f"[{self.sources.index(source) + 1}]")
        return " ".join(marks)


class _Page:
    """The lines of a table, wrapped to a width."""

    def __init__(self, width: int):
        self.width = max(width, 40)
        self.lines: list[str] = []

    def line(self, text: str = "", indent: int = 0, hanging: int = 0) -> None:
        """Add one line, wrapped; the lines after the first are indented by `hanging` more."""
        text = escape_control(text)  # an own entry may contain text from a config.json
        first, rest = " " * indent, " " * (indent + hanging)
        if len(first) + len(text) <= self.width:
            self.lines.append(first + text if text else "")  # wrapping would remove the spaces between columns
            return
        self.lines += textwrap.wrap(
            text, self.width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
        )

    def section(self, title: str, lines: Sequence[str], indent: int = 2) -> None:
        """Add a blank line, the title if not empty, and the lines; add nothing if there are no lines."""
        if lines:
            self.line()
        if lines and title:
            self.line(title)
        for line in lines:
            self.line(line, indent, hanging=2)

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


def _describe_coordinate(model: KnownModel, coordinate: KnownCoordinate, notes: _Footnotes) -> Iterable[str]:
    stored = (coordinate.row, "*" if coordinate.col is None else coordinate.col)
    first, second = reversed(stored) if model.transposed else stored
    yield f"{coordinate.tensor}[{first}, {second}]" + (" (stored transposed)" if model.transposed else "")
    # Only the first published effect, the strongest, is shown. All effects that a scan measured are shown.
    for number, effect in enumerate(coordinate.effects):
        if number == 0 or effect.conditions:
            own = "own scan, " if effect.source.kind == "own scan" else ""
            yield f"{own}{_describe_protocol(effect)}: {_describe_effect(effect, notes)}"
    if coordinate.value_printed:
        yield f"printed as {coordinate.value_printed}"
    for remark in (coordinate.role, coordinate.note):
        if remark:
            yield remark
    by = "; ".join(coordinate.located_by)
    yield f"found by {by} {notes.mark(*coordinate.sources, *(e.source for e in coordinate.effects))}"


def _describe_joint_set(joint_set: KnownJointSet, notes: _Footnotes) -> str:
    effects = "; ".join(
        ("whole rows: " if "rows" in e.protocol else "") + _describe_effect(e, notes) for e in joint_set.effects
    )
    name = f"{joint_set.name}: " if joint_set.name else ""
    return name + effects + (f"; {joint_set.note}" if joint_set.note else "")


def _describe_effect(effect: KnownEffect, notes: _Footnotes) -> str:
    """Describe a measurement, with its interval, footnote and remark."""
    interval = f" (95%: x{format_figure(effect.ci95[0])} to x{format_figure(effect.ci95[1])})" if effect.ci95 else ""
    remark = f" ({effect.note})" if effect.note else ""
    return f"{describe(effect)}{interval} {notes.mark(effect.source)}{remark}"


def _list_warnings(model: KnownModel, shown: Sequence[KnownCoordinate]) -> list[str]:
    overflow = explain_overflow(model)
    warnings = [*model.disputes, *([overflow] if overflow else []), *_list_other_texts(shown)]
    alone = [c.id for c in shown if c.independent.location == 1 and c.status != "measured"]
    if alone:
        warnings.append(f"reported by one group only: {', '.join(alone)}")
    copied = [c.id for c in shown if c.independent.location == 0]
    if copied:
        warnings.append(f"no source found it at this position, so it was copied or misprinted: {', '.join(copied)}")
    rows = [c.id for c in shown if c.col is None]
    if rows:
        warnings.append(f"only the row is published, so a manifest cannot name the scalar: {', '.join(rows)}")
    return warnings


def _list_other_texts(shown: Sequence[KnownCoordinate]) -> list[str]:
    """Return a warning for each coordinate whose perplexities were measured on texts, or in windows, that differ."""
    warnings = []
    for coordinate in shown:
        effects = [e for at, e in enumerate(coordinate.effects) if at == 0 or e.conditions]
        texts = list(dict.fromkeys(e.describe_text() or "not stated" for e in effects if is_perplexity(e)))
        if len(texts) > 1:
            said = "; ".join(f"({number}) {text}" for number, text in enumerate(texts, start=1))
            what = f"the perplexities of {coordinate.id} were measured by different protocols"
            warnings.append(f"{what}, so they cannot be compared: {said}")
    return warnings


def is_perplexity(effect: KnownEffect) -> bool:
    """Return True if a measurement is a perplexity."""
    return effect.metric == "ppl" or effect.metric.endswith("_ppl")


def _describe_protocol(effect: KnownEffect) -> str:
    return {"zero": "zeroed", "zero row": "whole row zeroed"}.get(effect.protocol, effect.protocol)


def _describe_status(coordinate: KnownCoordinate) -> str:
    if not coordinate.own:
        return coordinate.status
    return "own scan" if coordinate.status == "measured" else f"{coordinate.status}, own scan"


def _describe_alone(coordinate: KnownCoordinate) -> str:
    if coordinate.causal_scope == "row" and coordinate.causal_alone != "untested":
        return f"{coordinate.causal_alone} (row)"
    return coordinate.causal_alone


def describe_effect_alone(coordinate: KnownCoordinate) -> str:
    """Describe the effect of zeroing the coordinate alone, as in `catastrophic: wikitext2 ppl 5.67 -> 1211`."""
    effect = next(iter(coordinate.effects), None)
    row = " (whole row)" if effect and effect.protocol == "zero row" and coordinate.col is not None else ""
    return _describe_alone(coordinate) + (f": {describe(effect)}{row}" if effect else "")


def _summarise_effect(coordinate: KnownCoordinate) -> str:
    return f"status {_describe_status(coordinate)}; zeroed alone {describe_effect_alone(coordinate)}"


def format_value(coordinate: KnownCoordinate) -> str:
    """Format the value of a coordinate: the exact value and its dtype; else `~` and the published value; else `-`."""
    if coordinate.value is not None:
        return f"{coordinate.value!r} {coordinate.dtype}"
    return f"~{coordinate.value_printed.split()[0]}" if coordinate.value_printed else "-"


def _cite(source: Citation) -> str:
    return f"{source.cite}@{source.commit[:12]}" if source.commit else source.cite


def _make_comment(coordinate: KnownCoordinate, op: Operation) -> str:
    value = f"value {format_value(coordinate)}; " if op == "restore" else ""
    return f"{coordinate.id}: {value}{_summarise_effect(coordinate)}"


def _make_edit(coordinate: KnownCoordinate, op: Operation, factor: float | None) -> dict[str, Any]:
    if op == "restore":
        return {"op": op, "known": coordinate.id}
    guard = {"value": coordinate.value, "dtype": coordinate.dtype} if coordinate.value is not None else None
    return list_edit_fields(coordinate, op, factor, guard)


def _make_command(model: KnownModel, op: Operation, factor: float | None, status: str | Collection[str] | None) -> str:
    words = [status] if isinstance(status, str) else [s for s in STATUSES if s in (status or ())]
    return " ".join(
        [f"swsurgery lookup {shlex.quote(model.slug)}", *(f"--status {word}" for word in words), f"--manifest {op}"]
        + ([f"--factor {factor!r}"] if factor is not None else [])
    )


def _explain_none(model: KnownModel, op: Operation, status: str | Collection[str] | None) -> str:
    if not model.coordinates:
        undecided = any(note.startswith(UNDECIDED_NOTE) for note in model.notes)
        if undecided:
            return "its scan is undecided"
        return "a scan found none" if model.scans else "none is published"
    left = list_addressable(model)
    if status is None and left:
        return f"all are insufficient, none was shown to matter; --status insufficient would {op} them"
    return "only rows are published" if all(c.col is None for c in model.coordinates) else "none is of this status"


def _find_largest_ratio(model: KnownModel, coordinates: Iterable[KnownCoordinate]) -> float:
    """Find the largest known perplexity ratio from zeroing one of the coordinates or a joint set of them.

    The ratio was published for wikitext-2 or measured by a scan, and is not second-hand. Returns 1 if none is known.
    """
    coordinates = list(coordinates)
    ids = {c.id for c in coordinates}
    effects = [e for c in coordinates for e in c.effects if e.protocol == "zero"]
    for joint_set in model.joint_sets:
        if ids.issuperset(joint_set.coordinates):
            effects += [e for e in joint_set.effects if e.protocol == "zero jointly"]
    return max(map(get_published_ratio, effects), default=1.0)


def get_published_ratio(effect: KnownEffect) -> float:
    """Return the perplexity ratio of a measurement on wikitext-2 or by a scan; 1 for any other or second-hand one."""
    if not (effect.metric == "wikitext2_ppl" or effect.conditions) or effect.source.kind == "secondary":
        return 1.0
    if isinstance(effect.ratio, float):
        return effect.ratio
    if isinstance(effect.before, float) and isinstance(effect.after, float):
        return effect.after / effect.before
    return 1.0
