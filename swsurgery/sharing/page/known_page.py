"""Render what `lookup` found: the known super weights of a model, or the list of all known models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import isfinite

from swsurgery.errors import pluralise
from swsurgery.known.schema import STATUSES
from swsurgery.sharing.page.edit_page import render_record
from swsurgery.sharing.page.markup import (
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
from swsurgery.sharing.page.parts import Page, show_figure, show_figures
from swsurgery.sharing.page.svg import OTHER_MARK, Line, Point, draw_lines
from swsurgery.sharing.page.values import (
    Document,
    convert_number,
    read_integer,
    read_list,
    read_map,
    read_maps,
    read_number,
    read_text,
    read_texts,
    show_interval,
    show_number,
    show_ratio,
    show_value,
)

MAX_CURVES = 8
"""Maximum number of dose curves that are drawn."""


def render_lookup(subject: str, document: Document) -> Page:
    """Render the document of `lookup` for the model, or the patched checkpoint, `subject`."""
    if "manifest_sha256" in document:
        return render_record(subject, document)
    models = read_maps(document, "models")
    if models and "coordinates" in models[0] and isinstance(models[0]["coordinates"], list):
        return _render_model(models[0])
    return _render_list(models)


def _render_list(models: Sequence[Document]) -> Page:
    rows = [
        [
            make_code(read_text(model, "name")),
            read_text(model, "model"),
            *(read_integer(model, key) for key in ("coordinates", "experts", "columns")),
            read_text(model, "status"),
            show_number(model.get("max_activation")),
        ]
        for model in models[:60]
    ]
    rest = [make_code(read_text(model, "name")) for model in models[60:]]
    header = ("name", "repository", "scalars", "experts", "columns", "status", "maximum activation")
    table = make_table(header, rows, numeric=(2, 3, 4, 6))
    more = make_tag("p", "and ", join(rest, ", ")) if rest else ""
    parts = ("coordinates", "experts", "columns")
    bare = sum(not any(read_integer(model, key) for key in parts) for model in models)
    only = f" For {bare} of them, only the largest activation is known." if bare else ""
    answer = escape(f"{pluralise(len(models), 'model')}.{only}")
    return Page("Known super weights", answer, (make_section("Models", table, more),))


def _render_model(model: Document) -> Page:
    coordinates = read_maps(model, "coordinates")
    name = read_text(model, "hf_id")
    activation = read_map(model, "max_activation")
    facts = [
        ("family", read_text(model, "family") or None),
        ("layers", read_integer(model, "num_layers")),
        ("hidden size", read_integer(model, "hidden_size")),
        ("intermediate size", read_integer(model, "intermediate_size")),
        ("experts", read_integer(model, "num_experts")),
        ("also called", ", ".join(read_texts(model, "aliases")) or None),
        ("measured at revision", read_text(model, "revision_measured") or None),
        ("maximum activation", show_number(activation.get("value"))),
    ]
    sections = (
        make_section("Model", make_facts(facts)),
        make_section("Super weights", _show_coordinates(coordinates)),
        make_section("Whole experts and columns", _show_wholes(model)),
        make_section("Zeroed together", _show_joint_sets(model)),
        make_section("Effects", _show_effects(model, coordinates)),
        make_section("Scaled", _show_doses(model, coordinates)),
        make_section("Published without a super weight", _show_negative(model)),
        make_section("Notes", make_list([*read_texts(model, "notes"), *map(_describe, read_list(model, "disputes"))])),
        make_section("Sources", make_list([_describe(source) for source in _list_sources(model, coordinates)])),
    )
    return Page(f"Known super weights of {name}", _describe_found(name, coordinates), sections)


def _describe_found(name: str, coordinates: Sequence[Document]) -> Markup:
    """Count the known super weights, and then the scalars whose status says that they may be none."""
    counts = Counter(read_text(one, "status") for one in coordinates)
    doubted = [status for status in ("disputed", "refuted", "insufficient", "candidate") if counts[status]]
    known = len(coordinates) - sum(counts[status] for status in doubted)
    answer = [
        f"{pluralise(known, 'known super weight') if known else 'No known super weight'} of ",
        make_code(name),
        ".",
    ]
    for status in doubted:
        scalars = f"{pluralise(counts[status], 'scalar')} {'has' if counts[status] == 1 else 'have'}"
        answer.append(f" {scalars} the status {status}: {STATUSES[status]}.")
    return join(answer)


def _show_coordinates(coordinates: Sequence[Document]) -> Markup:
    rows = []
    for one in coordinates:
        value = show_value(one.get("value")) or read_text(one, "value_printed") or None
        alone = read_text(one, "causal_alone")
        place = [read_integer(one, key) for key in ("layer", "row", "col")]
        rows.append(
            [
                *place,
                one.get("expert"),
                value,
                read_text(one, "dtype"),
                read_text(one, "status"),
                alone,
                make_code(read_text(one, "tensor")),
            ]
        )
    header = ("layer", "row", "column", "expert", "value", "dtype", "status", "zeroed alone", "tensor")
    return make_table(header, rows, numeric=(0, 1, 2, 3, 4))


def _show_wholes(model: Document) -> Markup:
    rows = [
        [kind.removesuffix("s"), make_code(read_text(one, "id")), read_text(one, "status"), read_text(one, "note")]
        for kind in ("experts", "columns")
        for one in read_maps(model, kind)
    ]
    return make_table(("part", "name", "status", "note"), rows)


def _show_joint_sets(model: Document) -> Markup:
    rows = []
    for group in read_maps(model, "joint_sets"):
        effects = [_describe_effect(effect) for effect in read_maps(group, "effects")]
        rows.append([join([make_code(name) for name in read_texts(group, "coordinates")], " + "), "; ".join(effects)])
    return make_table(("scalars", "effects"), rows)


def _show_effects(model: Document, coordinates: Sequence[Document]) -> Markup:
    named = [(read_text(one, "id"), effect) for one in coordinates for effect in read_maps(one, "effects")]
    named += [("", effect) for effect in read_maps(model, "effects")]
    rows = [
        [
            make_code(name) if name else "model",
            read_text(effect, "protocol"),
            read_text(effect, "metric").replace("_", " "),
            *(show_number(effect.get(key)) for key in ("before", "after")),
            show_ratio(effect.get("ratio")),
            show_interval(*(read_list(effect, "ci95") or [None, None])[:2]),
            _describe_text(effect) or None,
            read_text(effect, "note") or None,
            _describe(effect.get("source")),
        ]
        for name, effect in named
        if not _list_curves(effect)
    ]
    header = ("of", "edit", "metric", "before", "after", "ratio", "95% interval", "measured on", "note", "source")
    return make_table(header, rows, numeric=(3, 4, 5))


def _describe_text(effect: Document) -> str:
    """Describe the text of a measurement and how it was cut; an empty string if the source does not state it."""
    found = read_map(effect, "conditions")
    if not found:
        return read_text(effect, "measured_on")
    windows = f"{read_integer(found, 'windows')} windows of {read_integer(found, 'window_tokens')} tokens"
    digest = read_text(found, "text_sha256")[:12]
    return ", ".join(part for part in (read_text(found, "protocol"), windows, f"text sha256 {digest}") if part)


def _show_doses(model: Document, coordinates: Sequence[Document]) -> Markup:
    """Draw each published series of measurements by factor."""
    named = [(read_text(one, "id"), effect) for one in coordinates for effect in read_maps(one, "effects")]
    named += [(read_text(model, "slug"), effect) for effect in read_maps(model, "effects")]
    figures = []
    for name, effect in named:
        for word, points in _list_curves(effect):
            metric = f"{read_text(effect, 'metric')}{word}"
            caption = f"{name}: {read_text(effect, 'protocol')}, {_describe(effect.get('source'))}"
            figure = draw_lines(caption, [Line(metric, points, OTHER_MARK)], "factor", "", "linear", 1.0)
            figures.append(show_figure(caption, figure))
    return show_figures(figures[:MAX_CURVES])


def _list_curves(effect: Document) -> list[tuple[str, list[Point]]]:
    """Return the series of an effect, each as (what to add to the name of the metric, points)."""
    found = []
    for key, word in (("dose", ""), ("dose_ratio", ", ratio")):
        pairs = [pair for pair in read_list(effect, key) if isinstance(pair, list) and len(pair) == 2]
        points = [Point(x, convert_number(y)) for x, y in ((convert_number(a), b) for a, b in pairs) if x is not None]
        found += [(word, points)] if len(points) > 1 else []
    return found


def _show_negative(model: Document) -> Markup:
    return make_list(
        [f"{read_text(one, 'finding')} ({read_text(one, 'cite')})" for one in read_maps(model, "negative_results")]
    )


def _list_sources(model: Document, coordinates: Sequence[Document]) -> list[object]:
    """List every source once, in the order in which they appear."""
    sources = [source for one in coordinates for source in read_list(one, "sources")]
    sources += read_list(model, "sources")
    return list({_describe(source): source for source in sources}.values())


def _describe(value: object) -> str:
    """Return a source, a dispute or a remark as one line of text."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return "; ".join(str(part) for part in value.values() if isinstance(part, str | int | float))
    return "" if value is None else str(value)


def _describe_effect(effect: Document) -> str:
    """Describe a measurement, such as "wikitext2 ppl 5.67 to 1211 x213.6 (in F16)"."""
    ratio = read_number(effect, "ratio")
    after = read_text(effect, "after") or show_number(effect.get("after"))
    figures = " to ".join(n for n in (show_number(effect.get("before")), after) if n)
    times = show_ratio(ratio) if ratio and isfinite(ratio) else ""
    note = read_text(effect, "note")
    parts = [read_text(effect, "metric").replace("_", " "), figures, times, f"({note})" if note else ""]
    return " ".join(part for part in parts if part)
