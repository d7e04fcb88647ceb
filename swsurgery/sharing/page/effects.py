"""Render the causal tests of a scan: the effects of zeroing candidates alone, together, and of random parts.

Scalars or experts come first. The parts that create an activation follow in a section of their own: rows, neurons,
experts, and channels of attention or of the embedding.
"""

from __future__ import annotations

from swsurgery.checkpoint.part_words import describe_random_parts, name_part
from swsurgery.errors import pluralise
from swsurgery.sharing.page.markup import Markup, make_facts, make_section, make_table, make_tag
from swsurgery.sharing.page.parts import MARKS_BY_VERDICT, show_figure, show_figures, show_measured
from swsurgery.sharing.page.svg import NULL_MARK, OTHER_MARK, DotRow, Line, Point, draw_dots, draw_lines
from swsurgery.sharing.page.values import (
    Document,
    read_integer,
    read_map,
    read_maps,
    read_number,
    read_numbers,
    read_text,
    show_number,
    show_ratio,
)

AXIS = "perplexity ratio: without / with"
"""Title of the axis of the effects."""


def show_effects(document: Document) -> list[Markup]:
    """Render the effects of zeroing what was tested: candidates, and parts that create an activation."""
    return [*_show_candidates(document), *_show_parts(document)]


def _show_candidates(document: Document) -> list[Markup]:
    """Render the effects of zeroing scalars or super experts, if they were tested."""
    test = read_map(document, "confirmation") or read_map(document, "expert_confirmation")
    if not test:
        return []
    alone = _list_alone(document)
    joint = _list_joint(document, test)
    null = _list_null(test, experts=bool(read_maps(document, "experts")))
    figures = [
        show_figure(f"{caption}, with 95% intervals.", draw_dots(caption, dots, AXIS))
        for caption, dots in (("Zeroed alone", alone), ("Zeroed together", joint))
        if dots
    ]
    if null:
        words = "Zeroed for comparison. Each circle is one random scalar of the candidates' matrices."
        if read_maps(document, "experts"):
            words = "Zeroed for comparison. Each circle is one random expert, or one set of random experts."
        elif read_maps(test, "column_nulls"):
            words = f"{words[:-1]}, or another large scalar of a candidate's column."
        figures.append(show_figure(words, draw_dots(words, null, AXIS)))
    base = show_number(test.get("base_perplexity"))
    facts = make_facts([("perplexity as stored", base)])
    return [
        make_section("Effects", show_figures(figures), facts, show_measured(test, test)),
        make_section("Dose", *_show_dose(test)),
    ]


def _show_parts(document: Document) -> list[Markup]:
    """Render the parts that create an activation, and the effects of zeroing them if they were tested."""
    parts, test = read_maps(document, "parts"), read_map(document, "part_confirmation")
    title = "Parts that create an activation"
    if parts and not test:
        return [make_section(title, _tabulate_parts(parts))]
    parts = [one for one in parts if read_text(one, "verdict")]
    if not parts:
        return []
    alone = [_make_dot(_label_part(one), read_map(one, "alone"), read_text(one, "verdict")) for one in parts]
    joint = [_make_dot("all parts", read_map(test, "together"), "needed jointly")] if len(parts) > 1 else []
    joint += [
        _make_dot(f"all parts but {format_short_name(one)}", without, "inert")
        for one in parts
        if (without := read_map(one, "without"))
    ]
    captions = {
        "Parts zeroed alone, with 95% intervals. Circles below them: random parts of the same kind and layer": [
            *alone,
            *_list_part_nulls(test),
        ],
        "Parts zeroed together, with 95% intervals": joint,
    }
    figures = [show_figure(f"{words}.", draw_dots(words, dots, AXIS)) for words, dots in captions.items() if dots]
    facts = make_facts([("perplexity as stored", show_number(test.get("base_perplexity")))])
    return [make_section(title, _tabulate_parts(parts), show_figures(figures), facts, show_measured(test, test))]


def _label_part(part: Document) -> str:
    return f"{format_short_name(part)}: {read_text(part, 'verdict')}"


def _tabulate_parts(parts: list[Document]) -> Markup:
    """Render the activations that each part creates, and its verdict."""
    rows = [
        [
            format_short_name(one),
            ", ".join(show_number(channel) or "" for channel in read_numbers(one, "channels")[:6]),
            show_number(one.get("added")),
            show_ratio(read_number(one, "alone", "ratio")),
            read_text(one, "verdict") or "not tested",
        ]
        for one in parts
    ]
    header = ("part", "creates activations in channels", "largest value added", "zeroed alone", "verdict")
    return make_table(header, rows, numeric=range(1, 4))


def _list_part_nulls(test: Document) -> list[DotRow]:
    rows = []
    for null in read_maps(test, "part_nulls"):
        if ratios := _read_ratios(null, "ratios"):
            words = describe_random_parts(read_text(null, "kind"), read_integer(null, "layer"), len(ratios))
            rows.append(DotRow(f"{words}, each alone", None, mark=NULL_MARK, others=ratios))
    return rows


def _list_alone(document: Document) -> list[DotRow]:
    dots = []
    keys = ("candidates", "removers", "experts")
    for one in (one for key in keys for one in read_maps(document, key)):
        verdict = read_text(one, "verdict")
        if verdict:
            kind = ", removes an activation" if read_text(one, "role") == "removes" else ""
            kind = ", companion" if one.get("listed") is False else kind
            label = f"{format_short_name(one)}: {verdict}{kind}"
            dots.append(_make_dot(label, read_map(one, "alone"), verdict))
    return dots


def _list_joint(document: Document, test: Document) -> list[DotRow]:
    dots = [_make_dot("all candidates", read_map(test, "together"), "needed jointly")]
    for group in read_maps(document, "joint_sets") or read_maps(document, "expert_joint_sets"):
        parts = [_name_in(document, part) for part in read_maps(group, "coordinates") or read_maps(group, "experts")]
        dots.append(_make_dot(" + ".join(parts), read_map(group, "effect"), "needed jointly"))
    for one in [*read_maps(document, "candidates"), *read_maps(document, "experts")]:
        if without := read_map(one, "without"):
            dots.append(_make_dot(f"all candidates but {format_short_name(one)}", without, "inert"))
    return dots


def _list_null(test: Document, experts: bool) -> list[DotRow]:
    """List the effects of what was zeroed for comparison: scalars, or experts in a scan for super experts."""
    rows = []
    if ratios := _read_ratios(test, "null_ratios"):
        what = "random expert" if experts else "random scalar"
        words = f"{pluralise(len(ratios), what)} of {'these layers' if experts else 'similar magnitude'}, each alone"
        rows.append(DotRow(words, None, mark=NULL_MARK, others=ratios))
    if ratios := _read_ratios(test, "joint_null_ratios"):
        rows.append(
            DotRow(
                f"{pluralise(len(ratios), 'random set')} of as many experts in each layer",
                None,
                mark=NULL_MARK,
                others=ratios,
            )
        )
    for column in read_maps(test, "column_nulls"):
        place = f"layer {read_integer(column, 'layer')} column {read_integer(column, 'col')}"
        for key, words in (("alone", "alone"), ("added", "beside all candidates")):
            if ratios := _read_ratios(column, key):
                label = f"{pluralise(len(ratios), 'large scalar')} of {place}, {words}"
                rows.append(DotRow(label, None, mark=NULL_MARK, others=ratios))
    return rows


def _read_ratios(document: Document, key: str) -> list[float]:
    return [value for value in read_numbers(document, key) if value is not None]


def _make_dot(label: str, effect: Document, verdict: str) -> DotRow:
    low, high = read_number(effect, "low"), read_number(effect, "high")
    mark = MARKS_BY_VERDICT.get(verdict, OTHER_MARK)
    return DotRow(label, read_number(effect, "ratio"), low, high, mark)


def format_short_name(one: Document) -> str:
    """Return the short name of a scalar, an expert or another part.

    Examples: "L11 [507, 1229]", "L1 expert 68", "L3 row 39", "embedding channel 7".
    """
    if one.get("kind") == "embedding":
        return name_part("embedding", None, None, read_integer(one, "number"))
    expert = one.get("expert")
    aside = "" if expert is None else f" expert {expert}"
    place = f" [{one.get('row')}, {one.get('col')}]" if "col" in one else ""
    if one.get("number") is not None:
        place = f" {name_part(read_text(one, 'kind'), None, None, read_integer(one, 'number'))}"
    return f"L{one.get('layer')}{aside}{place}"


def _name_in(document: Document, part: Document) -> str:
    """Return the short name of a scalar that is given by its tensor and index, or of an expert."""
    if "tensor" not in part:
        return format_short_name(part)
    for one in read_maps(document, "candidates"):
        if one.get("tensor") == part.get("tensor") and one.get("index") == part.get("index"):
            return format_short_name(one)
    return read_text(part, "tensor")


def _show_dose(test: Document) -> list[Markup]:
    """Render perplexity by the factor that multiplies all candidates, if it was measured."""
    points = []
    for dose in read_maps(test, "doses"):
        factor = read_number(dose, "factor")
        if factor is not None:
            ends = read_number(dose, "low"), read_number(dose, "high")
            points.append(Point(factor, read_number(dose, "ratio"), *ends))
    if len(points) < 2:
        return []
    points.sort(key=lambda point: point.x)
    caption = "All candidates multiplied by a factor at once. Factor 1 is the stored model; 0 is zeroing."
    lines = [Line("perplexity, divided by that of the stored model", points, OTHER_MARK)]
    figure = draw_lines(caption, lines, "factor", "", stored=1.0)
    return [show_figure(caption, figure), make_tag("p", "Intervals are at 95%.", class_="aside")]
