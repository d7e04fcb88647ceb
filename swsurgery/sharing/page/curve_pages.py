"""Render the results of sweeps and comparisons: a model's quality by factor, or by manifest."""

from __future__ import annotations

from pathlib import PurePath

from swsurgery.errors import pluralise
from swsurgery.sharing.page.markup import Markup, escape, join, make_code, make_list, make_section, make_table, make_tag
from swsurgery.sharing.page.parts import Page, show_figure, show_figures, show_measured
from swsurgery.sharing.page.scales import Kind
from swsurgery.sharing.page.svg import BASE_MARK, OTHER_MARK, DotRow, Line, Point, draw_dots, draw_lines, format_figure
from swsurgery.sharing.page.tasks_part import show_tasks
from swsurgery.sharing.page.values import (
    Document,
    is_finite,
    read_integer,
    read_map,
    read_maps,
    read_number,
    read_text,
    read_texts,
    show_interval,
    show_number,
    show_ratio,
    show_scalar,
)

CURVES: tuple[tuple[str, str, str, Kind], ...] = (
    ("perplexity", "ratio", "Perplexity, on a logarithmic axis.", "log"),
    ("kl", "kl", "KL divergence from the stored model, in nats per token.", "linear"),
    ("stopword_mass", "stopword_mass", "Stop-word mass: the mean probability of all stop words together.", "linear"),
)
"""The curves of a sweep and of a comparison.

Each has the key of its values, the prefix of the ends of their intervals, its caption and the kind of its axis.
"""


def render_sweep(subject: str, document: Document) -> Page:
    """Render the document of `sweep` for the manifest `subject`."""
    base = read_map(document, "base")
    points = [*(p for p in read_maps(document, "points") if read_number(p, "factor") != 1), base]
    points.sort(key=lambda point: read_number(point, "factor") or 0.0)
    names = [make_code(show_scalar(one)) for one in read_maps(document, "coordinates")]
    names += [make_code(region) for region in read_texts(document, "regions")]
    figures = [
        show_figure(caption, draw_lines(caption, [_make_curve(points, base, key, prefix)], "factor", "", kind, 1.0))
        for key, prefix, caption, kind in CURVES
    ]
    rows = [
        [
            *(show_number(p.get("factor")), show_number(p.get("perplexity")), show_ratio(p.get("ratio"))),
            show_interval(p.get("ratio_low"), p.get("ratio_high")),
            *(show_number(p.get("kl")), show_number(p.get("stopword_mass")), show_number(p.get("peak"))),
            "as stored" if p is base else "not finite" if p.get("finite") is False else None,
        ]
        for p in points
    ]
    header = ("factor", "perplexity", "ratio", "interval", "KL", "stop-word mass", "largest hidden state", "")
    sections = (
        make_section("Quality by factor", show_figures(figures), make_table(header, rows, numeric=range(7))),
        make_section("What was scaled", make_list(names), show_measured(document, document)),
    )
    return Page(f"Sweep of {subject}", _describe_sweep(points, base, len(names)), sections)


def _make_curve(points: list[Document], base: Document, key: str, prefix: str) -> Line:
    scale = read_number(base, "perplexity") if key == "perplexity" else 1.0
    made = []
    for point in points:
        finite = point.get("finite") is not False
        ends = (read_number(point, f"{prefix}_{end}") for end in ("low", "high"))
        low, high = (None if end is None or scale is None else end * scale for end in ends)
        value = read_number(point, key) if finite else None
        made.append(Point(read_number(point, "factor") or 0.0, value, low, high, BASE_MARK if point is base else None))
    return Line("scaled", made, OTHER_MARK)


def _describe_sweep(points: list[Document], base: Document, count: int) -> Markup:
    ratios = [r for p in points if p is not base and (r := read_number(p, "ratio")) is not None and is_finite(r)]
    what = pluralise(count, "target")
    if not ratios:
        return escape(f"{what} scaled.")
    worst = max(ratios)
    factor = next(p.get("factor") for p in points if read_number(p, "ratio") == worst)
    stored = show_number(base.get("perplexity"))
    return escape(
        f"{what} scaled by {pluralise(len(points) - 1, 'factor')}. Perplexity is {stored} as stored, and at most "
        f"{show_ratio(worst)} of that, at factor {show_number(factor)}."
    )


def render_comparison(subject: str, document: Document) -> Page:
    """Render the document of `compare`. `subject` is not used, because the document names the base."""
    models = read_maps(document, "models")
    base = read_number(models[0], "perplexity") if models else None
    labels = [_name_model(model) for model in models]
    figures = []
    for key, prefix, caption, kind in CURVES:
        scale = base if key == "perplexity" else 1.0
        dots = []
        for number, (model, label) in enumerate(zip(models, labels, strict=True)):
            ends = [read_number(model, f"{prefix}_{end}") for end in ("low", "high")]
            low, high = (None if end is None or scale is None else end * scale for end in ends)
            dots.append(DotRow(label, read_number(model, key), low, high, OTHER_MARK if number else BASE_MARK))
        reference = base if key == "perplexity" else None
        figures.append(show_figure(caption, draw_dots(caption, dots, "", kind, reference)))
    sections = (
        make_section("Quality", show_figures(figures), make_tag("p", "Intervals are at 95%.", class_="aside")),
        make_section(
            "Figures", _show_models(models, labels), _show_meanings(models), show_measured(document, document)
        ),
        make_section("Tasks", show_tasks(document)),
    )
    edited = [model for model in models if model.get("manifest") is not None and not model.get("control")]
    count = len({str(model.get("manifest")) for model in edited})
    answer = [escape(f"{pluralise(count, 'manifest')} compared.")]
    ratios = [(r, m) for m in edited if (r := read_number(m, "ratio")) is not None and is_finite(r)]
    if ratios:
        best = min(ratios, key=lambda pair: pair[0])
        words = f" The smallest perplexity ratio is {show_ratio(best[0])}, of "
        answer += [escape(words), make_code(_name_model(best[1])), escape(".")]
    return Page(f"Comparison of edits of {read_text(document, 'base')}", join(answer), sections)


def _show_meanings(models: list[Document]) -> Markup:
    """List what each control means for its edit."""
    return make_list(
        [f"{_name_model(model)}: {read_text(model, 'meaning')}" for model in models if read_text(model, "control")]
    )


def _name_model(model: Document) -> str:
    """Return the name of a manifest without its folder and ending, or "base", and its rounding or control."""
    manifest, activations = read_text(model, "manifest"), read_text(model, "activations")
    rounded = "" if activations in ("", "as computed") else f", {activations}"
    control = f", control: {words}" if (words := read_text(model, "control")) else ""
    return f"{PurePath(manifest).stem if manifest else 'base'}{rounded}{control}"


def _show_models(models: list[Document], labels: list[str]) -> Markup:
    rows = []
    for model, label in zip(models, labels, strict=True):
        counts = [read_integer(model, key) for key in ("changed_scalars", "changed_bytes")]
        rows.append(
            [
                make_code(label),
                *(None if count is None else f"{count:,}" for count in counts),
                *(show_number(model.get(key)) for key in ("norm", "relative_norm", "perplexity")),
                show_ratio(model.get("ratio")),
                show_interval(model.get("ratio_low"), model.get("ratio_high")),
                show_number(model.get("kl")),
                _show_ends(model),
                show_number(model.get("stopword_mass")),
                "not finite" if model.get("finite") is False else None,
            ]
        )
    header = (
        *("manifest", "scalars", "bytes", "norm", "relative", "perplexity", "ratio", "interval", "KL", "interval"),
        *("stop-word mass", ""),
    )
    return make_table(header, rows, numeric=range(1, 11))


def _show_ends(model: Document) -> str | None:
    low, high = read_number(model, "kl_low"), read_number(model, "kl_high")
    return None if low is None or high is None else f"{format_figure(low)} to {format_figure(high)}"
