"""Render the report of a sanity check: perplexity, hidden states by layer, next tokens and continuations.

The report comes from `check`, or from a record, which nobody has validated.
"""

from __future__ import annotations

from collections.abc import Sequence

from swsurgery.sharing.page.markup import (
    MAX_TABLE_ROWS,
    NEW_LINE,
    Markup,
    escape,
    join,
    make_code,
    make_facts,
    make_list,
    make_section,
    make_table,
    make_tag,
)
from swsurgery.sharing.page.parts import show_figure, show_figures, show_measured
from swsurgery.sharing.page.svg import (
    BASE_MARK,
    OTHER_MARK,
    BarRow,
    DotRow,
    Figure,
    Line,
    Point,
    draw_bars,
    draw_dots,
    draw_lines,
    format_figure,
)
from swsurgery.sharing.page.tasks_part import show_tasks
from swsurgery.sharing.page.values import (
    MAX_LAYERS,
    Document,
    convert_number,
    is_finite,
    read_list,
    read_map,
    read_maps,
    read_number,
    read_numbers,
    read_text,
    read_texts,
    show_interval,
    show_number,
    show_ratio,
)

SIDES = (("base", BASE_MARK), ("patched", OTHER_MARK))
"""The two models of a check, and their marks."""

MAX_PROMPTS = 12
"""Maximum number of prompts whose next tokens are drawn."""

MAX_CONTINUATION = 2000
"""Maximum number of characters of one continuation."""


def show_check(check: Document) -> list[Markup]:
    """Render a report as sections."""
    if read_text(check, "kind") not in ("", "forward"):
        why = read_text(check, "reason")
        return [make_section("The check", make_tag("p", "The model was not run", f": {why}." if why else "."))]
    if not read_map(check, "patched"):
        return []
    return [
        make_section(
            "The check",
            _show_failures(check),
            make_list(read_texts(check, "notes")),
            show_figures(_show_main_figures(check)),
            _show_facts(check),
        ),
        make_section("Controls", _show_controls(check)),
        make_section("Inputs rounded to few bits", _show_rounded(check)),
        make_section("Tasks", show_tasks(check)),
        make_section("Next tokens", *_show_prompts(check)),
        make_section("Continuations", *_show_generations(check)),
    ]


def describe_effect(check: Document) -> str:
    """Return the perplexity ratio of a report as part of a sentence; "" if it was not measured."""
    ratio = show_ratio(check.get("perplexity_ratio"))
    interval = show_interval(check.get("ratio_low"), check.get("ratio_high"))
    return f"perplexity {ratio}{f' ({interval})' if interval else ''}" if ratio else ""


def draw_perplexity(check: Document) -> Figure | None:
    """Draw the perplexity of both models, with the interval of the ratio around that of the patched one."""
    base = read_number(check, "base", "perplexity")
    ends = [read_number(check, "ratio_low"), read_number(check, "ratio_high")]
    low, high = (None if base is None or end is None else base * end for end in ends)
    dots = [DotRow("base", base, mark=BASE_MARK)] if base is not None else []
    dots.append(DotRow("patched", read_number(check, "patched", "perplexity"), low, high))
    return draw_dots("Perplexity of base and patched model", dots, "perplexity", reference=base)


def draw_largest_by_layer(check: Document) -> Figure | None:
    """Draw the magnitude of the largest hidden state after each layer; None if the report does not contain it."""
    lines = []
    for side, mark in SIDES:
        values = read_numbers(check, side, "largest_by_layer")[:MAX_LAYERS]
        points = [Point(layer, None if value is None else abs(value)) for layer, value in enumerate(values)]
        lines += [Line(side, points, mark)] if points else []
    title = "Magnitude of the largest hidden state after each layer"
    return draw_lines(title, lines, "layer", "largest hidden state") if lines else None


def _show_main_figures(check: Document) -> list[Markup]:
    figures = [
        ("Perplexity, with the 95% interval of the ratio to the base. Lower is better.", draw_perplexity(check)),
        ("Magnitude of the largest hidden state after each layer, over the whole text.", draw_largest_by_layer(check)),
    ]
    return [show_figure(caption, figure) for caption, figure in figures if figure is not None]


def _show_failures(check: Document) -> Markup:
    failures = read_texts(check, "failures")
    return (
        make_tag("div", make_tag("p", "The check failed.", class_="bad"), make_list(failures))
        if failures
        else Markup("")
    )


def _show_facts(check: Document) -> Markup:
    kl, bounds = show_number(check.get("kl")), read_map(check, "bounds")
    named = ((show_ratio(bounds.get(f"{word}_perplexity_ratio")), words) for word, words in _BOUNDS)
    facts = [
        ("perplexity ratio", describe_effect(check).removeprefix("perplexity ") or None),
        ("KL(base || patched)", f"{kl} nats per token" if kl else None),
        ("perplexity per word", _show_both([read_number(check, side, "word_perplexity") for side, _ in SIDES])),
        ("stop-word mass", _show_both([read_number(check, "stopword_mass", side) for side, _ in SIDES])),
        ("super activation", _show_peaks(check)),
        ("logits", _show_finite(check)),
        ("bounds", ", ".join(f"{words} {limit}" for limit, words in named if limit) or None),
        ("versions", ", ".join(f"{k} {v}" for k, v in sorted(read_map(check, "versions").items())) or None),
    ]
    return join([make_facts(facts), show_measured(read_map(check, "text"), check)])


_BOUNDS = (("min", "at least"), ("max", "at most"))


def _show_both(values: Sequence[float | None]) -> str | None:
    """Format the values of both models, such as "base 0.45, patched 0.034"."""
    base, patched = (show_number(value) for value in values)
    return patched if base is None else f"base {base}, patched {patched}"


def _show_peaks(check: Document) -> Markup | None:
    peaks = []
    for side, _ in SIDES:
        peak = read_map(check, side, "super_activation")
        if value := read_number(peak, "value"):
            where = ", ".join(f"{key} {peak.get(key)}" for key in ("layer", "token", "channel"))
            peaks.append(make_tag("div", f"{side}: {format_figure(value)} ({where})"))
    return join(peaks) if peaks else None


def _show_finite(check: Document) -> Markup | None:
    broken = [side for side, _ in SIDES if read_map(check, side).get("finite") is False]
    if broken:
        return make_tag("span", f"not finite: {' and '.join(broken)}", class_="bad")
    return escape("all finite") if read_map(check, "patched").get("finite") is True else None


def _show_rounded(check: Document) -> Markup:
    keys = ("perplexity", "ratio", "kl", "stopword_mass")
    rows = [
        [read_text(side, "side"), read_text(side, "activations"), *(show_number(side.get(key)) for key in keys)]
        for side in read_maps(check, "rounded_activations")
    ]
    header = ("", "inputs of linear layers", "perplexity", "ratio", "KL", "stop-word mass")
    return make_table(header, rows, numeric=(2, 3, 4, 5))


def _show_controls(check: Document) -> Markup:
    """Render the effects of other changes of the base, and what each means for the edit."""
    names = {"mean": "products of the edited scalars held at their means", "outliers": "other outliers zeroed"}
    rows = [
        [
            names.get(read_text(one, "control")),
            show_number(one.get("scalars")),
            show_number(one.get("perplexity")),
            *(show_ratio(one.get(key)) if not key.endswith("_") else _show_control_ends(one, key) for key in _COLUMNS),
            read_text(one, "meaning"),
        ]
        for one in read_maps(check, "controls")
    ]
    header = ("control", "scalars", "perplexity", "ratio", "interval", "edit / control", "interval", "meaning")
    return make_table(header, rows, numeric=range(1, 7))


_COLUMNS = ("ratio", "ratio_", "edit_over_control", "edit_over_control_")
"""The keys of the ratios of a control; a key that ends in _ stands for the two ends of the interval."""


def _show_control_ends(one: Document, key: str) -> str | None:
    return show_interval(one.get(f"{key}low"), one.get(f"{key}high"))


def _show_prompts(check: Document) -> list[Markup]:
    found = []
    for prompt in read_maps(check, "prompts")[:MAX_PROMPTS]:
        figures = []
        for side, mark in SIDES:
            bars = _list_tokens(prompt, side)
            if bars:
                title = f"Most likely next tokens of the {side} model"
                figures.append(show_figure(side, draw_bars(title, bars, mark)))
            elif side == "patched" or read_map(check, "base"):
                figures.append(make_tag("p", f"{side}: no finite logits", class_="aside"))
        found.append(join([make_tag("h3", make_code(read_text(prompt, "prompt"))), show_figures(figures)]))
    return found


def _list_tokens(prompt: Document, side: str) -> list[BarRow]:
    """Return a bar for each token in the list [[token, probability], ...]. Quotes show the blanks of a token."""
    bars = []
    for pair in read_list(prompt, side)[:MAX_TABLE_ROWS]:
        if isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str):
            probability = convert_number(pair[1])
            if probability is not None and is_finite(probability):
                bars.append(BarRow(f"“{pair[0]}”", probability, f"{probability:.3f}"))
    return bars


def _show_generations(check: Document) -> list[Markup]:
    found = []
    for one in read_maps(check, "generations")[:MAX_PROMPTS]:
        found.append(make_tag("h3", make_code(read_text(one, "prompt"))))
        for side, _ in SIDES:
            if text := read_text(one, side):
                lines = (escape(line, MAX_CONTINUATION) for line in text[:MAX_CONTINUATION].split("\n"))
                found += [make_tag("p", side, class_="aside"), make_tag("pre", join(lines, NEW_LINE))]
    return found
