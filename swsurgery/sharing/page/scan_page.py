"""Render the result of a scan for super weights or super experts.

The page shows what was found, what was not found and how close it came, and how both were measured.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from swsurgery.errors import pluralise
from swsurgery.sharing.page.effects import format_short_name, show_effects
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
from swsurgery.sharing.page.parts import MARKS_BY_VERDICT, Page, show_figure, show_figures
from swsurgery.sharing.page.svg import DotRow, draw_layers, format_figure
from swsurgery.sharing.page.values import (
    MAX_LAYERS,
    Document,
    is_finite,
    read_integer,
    read_map,
    read_maps,
    read_number,
    read_numbers,
    read_text,
    read_texts,
    show_number,
    show_ratio,
    show_scalar,
    show_value,
)

PANELS = (
    ("inputs", "input_spike", "Largest input of the down projection, by layer."),
    ("outputs", "output_spike", "Largest output of the down projection, by layer."),
    ("residuals", None, "Largest hidden state after the layer. Blue: layers with a super activation."),
)
"""The panels of the profile: the key of the values, the key of the spikes of candidates, and the caption."""

SHARED = "shared MLP"
"""The stream of an activation in the output of an MLP that several layers share."""

RUNNERS_UP = 5
"""Number of layers without a candidate that the page lists, those with the largest outputs."""

SETTINGS = {
    "outstanding": "a hidden state is massive from this many times the typical channel maximum of its layer on",
    "least_maximum": "the typical channel maximum is at least this many medians",
    "prominent": "the scalars of a state are searched for from this share of the largest hidden states on",
    "made": "a layer makes a massive state if it adds at least this share of it",
    "kept": "a state persists while it keeps at least this share of its first value",
    "layers_kept": "number of layers through which a state must persist",
    "full_attention": "number of layers with full attention, in a hybrid model",
    "share": "a candidate makes at least this share of the output in its row",
    "outlier": "input and output of a candidate are at least this many times the median of their kind",
    "companion": "an output below this share of the MLP’s largest output is a side effect",
    "rounds": "number of times the prompts were run; each round leaves out the scalars found before",
    "min_z": "a candidate’s robust z-score is at least this",
    "min_peak": "a candidate’s magnitude is at least this many times the usual column maximum of its layer",
    "top": "maximum number of candidates",
    "neurons": "number of neurons that were read",
    "scalars": "number of scalars that were read",
    "percentile": "a super expert’s output exceeds this percentile of all experts’ largest outputs",
    "percentile_bar": "the output at this percentile",
    "share_of_largest": "a super expert’s output exceeds this share of the model’s largest output",
    "largest_bar": "the output at this share",
    "depth": "super experts are searched for in this share of the layers, from the first on",
    "experts": "number of experts",
    "experts_reached": "number of experts that received a token",
    "dtype": "dtype in which the model ran",
    "device": "device on which the model ran",
    "placement": "how the model ran",
}
"""What each setting of a scan means. Settings that are not listed are shown by their names."""


def render_scan(subject: str, document: Document) -> Page:
    """Render the document of `scan` for the checkpoint `subject`."""
    experts = read_text(document, "method") == "experts"
    sections = [
        make_section(
            "Where the largest activations are",
            _show_passport(document),
            _show_activations(document),
            _show_profile(document),
        ),
        make_section("Candidates", _show_experts(document) if experts else _show_candidates(document)),
        *show_effects(document),
        make_section("What was not found, and how close it came", *_show_misses(document)),
        make_section("How it was measured", _show_prompts(document), _show_settings(document)),
    ]
    return Page(f"Scan of {subject}", _describe(document, experts), tuple(sections))


def _describe(document: Document, experts: bool) -> Markup:
    """Return the answer of a scan, followed by the parts that create an activation and were not found inert."""
    answer = [_describe_found(document, experts)]
    found = read_maps(document, "found_parts")
    needed = [one for one in found if read_text(one, "verdict").startswith("needed")]
    untested = [one for one in found if one not in needed]
    for parts, words in ((needed, "Needed"), (untested, "Not confirmed")):
        names = join([make_code(format_short_name(one)) for one in parts[:8]], ", ")
        more = f" and {len(parts) - 8} more" if len(parts) > 8 else ""
        amount = f"{pluralise(len(parts), 'part')} that create{'' if len(parts) > 1 else 's'} an activation"
        answer += [join([f" {words}: {amount}, ", names, more, "."])] if parts else []
    return join(answer)


def _describe_found(document: Document, experts: bool) -> Markup:
    found = read_maps(document, "super_experts" if experts else "super_weights")
    noun = "super expert" if experts else "super weight"
    answer = read_text(document, "answer")
    confirmed = [one for one in found if read_text(one, "verdict").startswith("needed")]
    rest = len(found) - len(confirmed) if confirmed else 0
    if answer == "undecided":
        unread = len(read_maps(document, "unread"))
        return escape(f"Undecided: no {noun} was found, but {pluralise(unread, 'layer')} could not be read completely.")
    if not found:
        return escape(f"No {noun} was found.")
    names = join([make_code(format_short_name(one)) for one in found[:8]], ", ")
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    amount = f"{pluralise(len(confirmed), noun)} confirmed" if confirmed else _count_candidates(len(found), noun)
    amount += f", {rest} without a verdict" if rest else ""
    return join([f"{amount}: ", names, more, "."])


def _count_candidates(number: int, noun: str) -> str:
    """Return the answer of a scan that confirmed nothing, such as "2 candidates for super weights, not confirmed"."""
    return f"{pluralise(number, 'candidate')} for {pluralise(number, noun).partition(' ')[2]}, not confirmed"


def _show_passport(document: Document) -> Markup:
    """Render the largest activation of each prompt, with and without BOS, and the published value."""
    passport = read_map(document, "passport")
    rows = []
    for one in read_maps(passport, "largest"):
        down = read_integer(one, "down")
        places = (read_integer(one, key) for key in ("layer", "token", "channel", "up"))
        values = show_number(one.get("value")), show_number(one.get("ratio"))
        bos = "with BOS" if one.get("bos") is True else "without BOS"
        rows.append([read_integer(one, "prompt"), bos, *values, *places, "never" if down is None else str(down)])
    if not rows:
        return join([])
    header = (
        *("prompt", "", "largest value", "in medians", "layer", "token", "channel"),
        *("step up in layer", "step down in layer"),
    )
    known = read_map(passport, "published")
    words = [show_number(known.get("value")), *(read_text(known, key) for key in ("model", "place", "source"))]
    words.append(f"measured on {read_text(known, 'measured_on') or 'a text that is not stated'}, not on these prompts")
    facts = make_facts([("published", ", ".join(str(word) for word in words if word))] if known else [])
    return join([make_table(header, rows, numeric=(0, *range(2, len(header)))), facts])


def _show_activations(document: Document) -> Markup:
    """Render where each super activation appears and disappears."""
    last_layer = (read_integer(document, "layers") or 0) - 1
    rows = []
    for one in read_maps(document, "super_activations"):
        if one.get("recurring") is True:
            continue
        last = read_integer(one, "last")
        down = "never" if last is None or last >= last_layer else str(last + 1)
        numbers = (read_integer(one, key) for key in ("peak", "prompt", "token", "prompts"))
        value, ratio = show_number(one.get("value")), show_number(one.get("ratio"))
        side = "side effect" if one.get("side") is True else ""
        up = read_integer(one, "layer")
        removers = [read_text(time, "removed_by") for time in read_maps(one, "appearances")]
        causes = read_text(one, "made_by"), next(iter(removers), "")
        rows.append([read_integer(one, "channel"), value, ratio, up, down, *numbers, *causes, side])
    header = (
        *("channel", "largest value", "in medians", "step up in layer", "step down in layer"),
        *("largest after layer", "prompt", "token", "in prompts", "made by", "removed by", ""),
    )
    tables = (make_table(header, rows, numeric=range(len(header) - 3)), _show_recurring(document))
    return join([*tables, _show_shared(document)])


def _show_recurring(document: Document) -> Markup:
    """Render each time that a recurring activation appears before a layer with full attention."""
    rows = [
        [
            *(read_integer(one, "channel"), read_integer(time, "first"), read_integer(time, "last")),
            ", ".join(str(layer) for layer in read_numbers(time, "before")),
            show_number(time.get("value")),
            *(read_text(time, "made_by"), read_text(time, "removed_by")),
        ]
        for one in read_maps(document, "super_activations")
        if one.get("recurring") is True and one.get("stream") != SHARED
        for time in read_maps(one, "appearances")
    ]
    if not rows:
        return join([])
    header = ("channel", "from layer", "to layer", "full attention in", "largest value", "made by", "removed by")
    words = "Activations that appear before layers with full attention, and do not persist:"
    return join([make_tag("p", words), make_table(header, rows, numeric=range(5))])


def _show_shared(document: Document) -> Markup:
    """Render each layer in which the output of an MLP that several layers share is massive."""
    rows = [
        [
            *(read_integer(one, "channel"), read_integer(one, "layer"), read_integer(time, "first")),
            *(show_number(time.get("value")), read_text(time, "made_by")),
        ]
        for one in read_maps(document, "super_activations")
        if one.get("stream") == SHARED
        for time in read_maps(one, "appearances")
    ]
    if not rows:
        return join([])
    header = ("channel", "stored in layer", "used in layer", "output", "made by")
    words = "Massive outputs of MLPs that several layers share, in the layers that use the MLP:"
    return join([make_tag("p", words), make_table(header, rows, numeric=range(4))])


def _show_profile(document: Document) -> Markup:
    profile = read_map(document, "profile")
    marked = [*_list_scalars(document), *(read_map(e, "cause") for e in read_maps(document, "experts"))]
    massive = _list_massive(document)
    figures = []
    for key, spike, caption in PANELS:
        values = read_numbers(profile, key)[:MAX_LAYERS]
        spikes = []
        for one in marked if spike else ():
            layer, value = read_integer(one, "layer"), read_number(one, spike or "")
            if layer is not None and 0 <= layer < len(values) and value is not None:
                mark = MARKS_BY_VERDICT.get(read_text(one, "verdict"), MARKS_BY_VERDICT[""])
                spikes.append((layer, DotRow(format_short_name(one), value, mark=mark)))
        if values:
            strong: Collection[int] = massive if key == "residuals" else ()
            figures.append(show_figure(caption, draw_layers(caption, values, "", strong, spikes)))
    return show_figures(figures)


def _list_massive(document: Document) -> set[int]:
    """List the layers after which a super activation exists."""
    layers: set[int] = set()
    for one in _list_spans(document):
        first, last = read_integer(one, "layer"), read_integer(one, "last")
        if first is not None and last is not None and 0 <= first <= last < MAX_LAYERS:
            layers.update(range(first, last + 1))
    return layers


def _list_scalars(document: Document) -> list[Document]:
    """List the candidates, followed by the scalars that remove activations."""
    return [*read_maps(document, "candidates"), *read_maps(document, "removers")]


def _list_spans(document: Document) -> list[Document]:
    """List the layers of each super activation, with one element for each appearance of a recurring one."""
    spans: list[Document] = []
    for one in read_maps(document, "super_activations"):
        if one.get("stream") == SHARED:
            continue  # not in the residual stream
        times = read_maps(one, "appearances") if one.get("recurring") is True else []
        spans += [{"layer": time.get("first"), "last": time.get("last")} for time in times] or [one]
    return spans


def _show_candidates(document: Document) -> Markup:
    keys = ("input_spike", "output_spike", "share", "z", "rank", "prompts", "round")
    words = ("input spike", "output spike", "share", "z", "rank of |W|", "prompts", "round")
    candidates = _list_scalars(document)
    kept = [at for at, key in enumerate(keys) if any(one.get(key) is not None for one in candidates)]
    rows = []
    for one in candidates:
        verdict = read_text(one, "verdict") or "not tested"
        aside = ", companion" if one.get("listed") is False else ""
        aside += ", removes an activation" if read_text(one, "role") == "removes" else ""
        numbers = [show_number(one.get(keys[at])) for at in kept]
        rows.append([make_code(show_scalar(one)), f"{verdict}{aside}", show_value(one.get("value")), *numbers])
    header = ("scalar", "verdict", "value", *(words[at] for at in kept))
    return make_table(header, rows, numeric=range(2, len(header)))


def _show_experts(document: Document) -> Markup:
    rows = [
        [
            format_short_name(one),
            show_number(one.get("output")),
            *(read_integer(one, key) for key in ("row", "token", "prompt", "prompts")),
            show_number(one.get("state")),
            make_code(show_scalar(read_map(one, "cause"))),
            read_text(one, "verdict") or "not tested",
        ]
        for one in read_maps(document, "experts")
    ]
    header = ("expert", "output", "channel", "token", "prompt", "in prompts", "state", "largest cause", "verdict")
    return make_table(header, rows, numeric=range(1, 7))


def _show_misses(document: Document) -> list[Markup]:
    """Render the notes, the layers that were not read, and the candidates and layers that came close."""
    unread = [
        f"layer {read_integer(layer, 'layer')} was not read completely: {', '.join(read_texts(layer, 'tensors')[:3])}"
        for layer in read_maps(document, "unread")
    ]
    inert = [
        f"{format_short_name(one)}: {read_text(one, 'verdict')}, perplexity x{format_figure(ratio)} without it"
        for one in [*_list_scalars(document), *read_maps(document, "experts"), *read_maps(document, "parts")]
        if read_text(one, "verdict") in ("inert", "untested")
        and (ratio := read_number(one, "alone", "ratio")) is not None
    ]
    return [
        make_list([*read_texts(document, "notes"), *inert, *unread]),
        _show_runners_up(document),
        _show_largest_experts(document),
    ]


def _show_runners_up(document: Document) -> Markup:
    """Render the layers without a candidate that have the largest outputs, compared with the weakest candidate."""
    outputs = read_numbers(document, "profile", "outputs")
    inputs = read_numbers(document, "profile", "inputs")
    candidates = read_maps(document, "candidates")
    spikes = [abs(value) for one in candidates if (value := read_number(one, "output_spike")) and is_finite(value)]
    taken = {read_integer(one, "layer") for one in candidates}
    left = [
        (abs(value), layer)
        for layer, value in enumerate(outputs)
        if value is not None and math.isfinite(value) and layer not in taken
    ]
    if not left or read_text(document, "method") != "activations":
        return Markup("")
    weakest = min(spikes, default=0.0)
    rows = []
    for size, layer in sorted(left, reverse=True)[:RUNNERS_UP]:
        share = show_ratio(size / weakest) if weakest else None
        given = inputs[layer] if layer < len(inputs) else None
        rows.append([layer, show_number(outputs[layer]), show_number(given), share])
    header = ("layer", "largest output", "largest input", "output, compared with the weakest candidate’s")
    words = (
        "Layers without a candidate, those with the largest outputs of the down projection first. A large output makes "
        "a candidate only if it makes a hidden state that persists:"
    )
    return join([make_tag("p", words), make_table(header, rows, numeric=range(4))])


def _show_largest_experts(document: Document) -> Markup:
    rows = [[format_short_name(one), show_number(one.get("output"))] for one in read_maps(document, "largest")]
    table = make_table(("expert", "largest output"), rows, numeric=(1,))
    return (
        join([make_tag("p", "The experts with the largest outputs, candidates or not:"), table]) if rows else Markup("")
    )


def _show_prompts(document: Document) -> Markup:
    prompts = read_texts(document, "prompts")
    if not prompts:
        return make_tag("p", "No prompt was run: only the weights were read.")
    bos = read_map(document, "settings").get("bos")
    words = {True: " Each begins with the token BOS.", False: " They do not begin with the token BOS."}
    said = words[bos] if isinstance(bos, bool) else ""
    return join(
        [make_tag("p", f"{pluralise(len(prompts), 'prompt')}.{said}"), make_list([make_code(p) for p in prompts])]
    )


def _show_settings(document: Document) -> Markup:
    settings = read_map(document, "settings")
    shown = [(name, value) for name, value in settings.items() if name != "bos"]
    rows: Sequence[Sequence[object]] = [
        [show_value(value) or str(value), SETTINGS.get(name, ""), make_code(name)] for name, value in shown
    ]
    scanned = f"{read_integer(document, 'layers')} layers of {read_text(document, 'model_type')}"
    facts = [("scanned", scanned), ("method", read_text(document, "method"))]
    return join([make_facts(facts), make_table(("value", "meaning", "setting"), rows)])
