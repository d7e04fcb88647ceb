"""HTML pages: their structure, that they load nothing, that no text becomes an element, and what they say."""

from __future__ import annotations

import json
import random
import re
import xml.etree.ElementTree as xml
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from page_documents import DOCUMENTS, SCAN

from swsurgery.scanning.part_report import ModelPart, PartName
from swsurgery.sharing.page import PAGES, render_page
from swsurgery.sharing.page.markup import MAX_TABLE_ROWS, Markup, escape, make_tag
from swsurgery.sharing.page.render import MAX_PAGE

ELEMENTS = set(
    re.findall(
        r"\w+",
        "html head meta title style body h1 h2 h3 main section p div span b strong code pre table thead tbody tr th td "
        "dl dt dd ul li figure figcaption footer svg text line rect circle polygon polyline",
    )
)
ATTRIBUTES = set(
    re.findall(
        r"\S+",
        "class title lang charset name content http-equiv xmlns viewbox width height role x y x1 y1 x2 y2 cx cy r "
        "points text-anchor",
    )
)
HOSTILE = (
    "<script>alert(1)</script>",
    '" onload="alert(1)',
    "' onerror='alert(1)",
    "]]><svg onload=alert(1)>",
    "<!-- -->",
    "</style></title></svg><img src=//evil.example/x>",
    "\u202eevil\u2066",
    "\x1b[31mred\x00\ud800",
    "&lt;b&gt; &#60;",
    "javascript:alert(1)",
)


class Reader(HTMLParser):
    """Reads a page strictly: every element that is opened is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names)
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag not in ("span", "b", "code", "strong"):
            self.text.append(" ")

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    def handle_pi(self, data: str) -> None:
        raise AssertionError(data)


def read(page: bytes) -> Reader:
    """Read a page and check what must be true of every page."""
    text = page.decode()
    assert len(page) < MAX_PAGE
    assert text.startswith('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">')
    assert all(c == "\n" or c.isprintable() for c in text)
    found = Reader(text)
    assert {name for name, _ in found.elements} <= ELEMENTS
    assert {key for _, attributes in found.elements for key in attributes} <= ATTRIBUTES
    style = "".join(re.findall(r"<style>(.*?)</style>", text, re.S))
    assert "url(" not in style and "@import" not in style and "<" not in style
    for drawing in re.findall(r"<svg .*?</svg>", text, re.S):
        xml.fromstring(drawing)
    addresses = re.findall(
        r"\b\w+://[^\s\"<]+", "".join(f"{value} " for _, a in found.elements for value in a.values())
    )
    assert set(addresses) <= {"http://www.w3.org/2000/svg"}
    return found


def say(found: Reader) -> str:
    return " ".join("".join(found.text).split())


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_page_is_well_formed_and_loads_nothing(name):
    command, document = DOCUMENTS[name]
    page = render_page(command, "my-model", document)
    found = read(page)
    assert page == render_page(command, "my-model", document)
    assert [tag for tag, _ in found.elements].count("h1") == 1
    policy = [a["content"] for tag, a in found.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy and policy[0].startswith("default-src 'none';")


def test_every_command_with_a_page_has_a_document_here():
    assert {command for command, _ in DOCUMENTS.values()} == PAGES.keys()


def replace_texts(value: object, word) -> object:
    """Replace every text of a JSON value, also the names of files, which are keys."""
    if isinstance(value, str):
        return word(value)
    if isinstance(value, list):
        return [replace_texts(each, word) for each in value]
    if isinstance(value, dict):
        strange = {f"{word(key)}{number}": each for number, (key, each) in enumerate(value.items()) if "." in key}
        return {key: replace_texts(each, word) for key, each in (value | strange).items()}
    return value


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_text_of_a_document_becomes_an_element(name, hostile):
    command, document = DOCUMENTS[name]
    made = replace_texts(document, lambda text: text if text in KEPT else hostile)
    found = read(render_page(command, hostile, made))
    assert any(
        word in say(found) for word in (hostile[:6], hostile.encode("unicode_escape", "surrogatepass").decode()[:6])
    )


KEPT = ("forward", "experts", "activations", "weights", "error", "BF16", "needed alone", "inert", "found")
"""Words that choose what a page shows."""


@pytest.mark.parametrize("name", DOCUMENTS)
def test_texts_of_any_length_fit(name):
    command, document = DOCUMENTS[name]
    made = replace_texts(document, lambda text: text if text in KEPT else '"' * 5000)
    lists = {key: value * 100 if isinstance(value, list) else value for key, value in made.items()}
    read(render_page(command, "x" * 100_000, lists))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("nan"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(DOCUMENTS)), st.integers(0, 2**32), st.lists(JSON, min_size=3, max_size=3))
def test_any_value_in_a_document_gives_a_page(name, seed, values):
    command, document = DOCUMENTS[name]
    chooser = random.Random(seed)

    def change(value: object) -> object:
        if chooser.random() < 0.04:
            return chooser.choice(values)
        if isinstance(value, list):
            return [change(each) for each in value]
        return {key: change(each) for key, each in value.items()} if isinstance(value, dict) else value

    changed = {key: change(value) for key, value in document.items()}
    read(render_page(command, "my-model", changed))


def test_a_page_about_an_edit_says_what_it_is_to_say():
    text = say(read(render_page(*("apply", "zero.yaml"), DOCUMENTS["apply"][1])))
    assert (
        "2 of 134,515,008 scalars differ; perplexity x5.600 (x5.100 to x6.200); provable against the base’s sha256"
        in text
    )
    assert "model.layers.2.mlp.down_proj.weight[507, 90]" in text and "at byte 8,649,850" in text
    assert "0 10000001 0111100" in text  # 5.875 in BF16: sign, exponent, fraction
    assert "“ Paris”" in text
    assert "swsurgery verify patched swsurgery revert patched -o DIRECTORY --base BASE" in text
    assert " a cold winter is " in text
    assert "pack-quantized" in text and "round" in text and "L3 row 12" in text


def test_a_page_about_a_scan_says_what_it_is_to_say():
    text = say(read(render_page("scan", "my-model", DOCUMENTS["scan"][1])))
    assert "1 super weight confirmed: L11 [507, 1229]." in text
    assert "step up in layer step down in layer" in text and "507 23,941 11 28" in text
    assert "L2 [507, 90]: inert, perplexity x1.02 without it" in text
    assert "2 prompts. Each begins with the token BOS." in text
    assert (
        "a hidden state is massive from this many times the typical channel maximum of its layer on outstanding" in text
    )
    assert "2 random scalars of similar magnitude, each alone" in text
    assert "all candidates multiplied by a factor" in text.lower()


def test_a_page_about_a_scan_shows_tested_parts_beside_random_ones():
    page = render_page("scan", "my-model", DOCUMENTS["parts"][1])
    text = say(read(page))
    assert "No super weight was found. Needed: 1 part that creates an activation, L1 row 39." in text
    assert "L1 row 39 39 963 x5.600 needed alone" in text
    assert "L3 expert 2 neuron 834 7, 39 -202 x1.020 inert" in text
    assert "L3 expert 2 neuron 834: inert, perplexity x1.02 without it" in text
    assert "2 random rows of layer 1, each alone" in text and "1 random neuron of layer 3, each alone" in text
    section = page.decode().partition("Parts that create an activation")[2].partition("What was not found")[0]
    # Each part alone, all parts, and all parts but one of them have an interval. The random parts have none.
    assert section.count('class="interval"') == 5 and section.count("<figure>") == 2
    assert "Parts that" not in say(read(render_page("scan", "my-model", DOCUMENTS["scan"][1])))


def test_a_page_about_a_scan_shows_parts_that_were_not_tested():
    parts = (
        ModelPart(PartName("attention", 2, None, 7), (7,), 90.0),
        ModelPart(PartName("embedding", None, None, 8), (8,), -120.0),
    )
    document = replace(SCAN, candidates=(), unread=(), confirmation=None, parts=parts).to_json()
    text = say(read(render_page("scan", "my-model", document)))
    assert "Not confirmed: 2 parts that create an activation, L2 attention channel 7, embedding channel 8." in text
    assert "L2 attention channel 7 7 90 not tested" in text and "embedding channel 8 8 -120 not tested" in text


def test_a_page_about_proof_says_yes_or_no():
    document = DOCUMENTS["verify"][1]
    assert "OK: nothing contradicts" in say(read(render_page("verify", "patched", document)))
    finding = {
        "rule": "digest",
        "level": "error",
        "file": "a.safetensors",
        "tensor": None,
        "index": None,
        "message": "no",
    }
    bad = document | {"ok": False, "findings": [finding]}
    assert "NO: 1 finding. Findings level rule where what error digest a.safetensors no" in say(
        read(render_page("verify", "patched", bad))
    )


def test_a_page_about_a_known_model_counts_doubtful_scalars_apart():
    model = DOCUMENTS["llama-7b"][1]["models"][0]
    first = model["coordinates"][0]
    changed = [first | {"status": status} for status in ("paper", "insufficient", "insufficient", "refuted")]

    def answer(coordinates):
        return say(read(render_page("lookup", "x", {"models": [model | {"coordinates": coordinates}]})))

    assert "1 known super weight of huggyllama/llama-7b. 1 scalar has the status refuted: a published" in answer(
        changed
    )
    assert "2 scalars have the status insufficient: doubted by its own author" in answer(changed)
    assert "No known super weight of huggyllama/llama-7b. 2 scalars have" in answer(changed[1:3])


def test_every_figure_shows_the_values_of_the_document():
    page = render_page("sweep", "zero.yaml", DOCUMENTS["sweep"][1]).decode()
    (first, *_) = re.findall(r"<svg .*?</svg>", page, re.S)
    titles = [e.text for e in xml.fromstring(first).iter("{http://www.w3.org/2000/svg}title")]
    assert "scaled, 0: 165" in titles and "scaled, 1: 29.6" in titles and "scaled, 2: 71" in titles


def test_a_value_that_is_not_finite_is_a_gap_in_its_line():
    page = render_page("check", "x", DOCUMENTS["check"][1]).decode()
    figure = next(f for f in re.findall(r"<svg .*?</svg>", page, re.S) if "after each layer" in f)
    lines = [len(e.get("points").split()) for e in xml.fromstring(figure).iter("{http://www.w3.org/2000/svg}polyline")]
    assert lines == [3], "base has three layers, and patched is infinite after the middle one"
    assert "patched, 1: not finite" in figure and "patched, 2: 300" in figure


def test_more_rows_than_a_table_has_are_counted():
    splice = DOCUMENTS["apply"][1]["splices"][0]
    document = DOCUMENTS["apply"][1] | {"splices": [splice] * 1000}
    text = say(read(render_page("apply", "m.yaml", document)))
    assert f"and {1000 - 24 - MAX_TABLE_ROWS:,} more" in text


def test_escape():
    assert escape("<a href='x'>&\"") == "&lt;a href=&#x27;x&#x27;&gt;&amp;&quot;"
    assert escape("\u202e\n") == "\\u202e\\n"
    assert escape("x" * 500) == "x" * 399 + "…"
    assert escape(Markup("<b>")) == "<b>"
    assert make_tag("p", "<", make_tag("b", 1), class_='"', data_x=None) == '<p class="&quot;">&lt;<b>1</b></p>'
    with pytest.raises(AssertionError):
        make_tag("p onload=x")


def test_the_style_sheets_are_part_of_the_package():
    folder = Path(render_page.__code__.co_filename).parent
    assert {path.name for path in folder.glob("*.css")} == {"page.css", "figure.css"}
    assert "sharing/page/*.css" in (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for path in folder.glob("*.css"):
        assert "prefers-color-scheme: dark" in path.read_text() and "@media print" in path.read_text()


def test_documents_are_strict_json():
    for _, document in DOCUMENTS.values():
        json.dumps(document, allow_nan=False)


def test_a_check_without_a_bound_is_not_called_ok():
    document = DOCUMENTS["check"][1]
    loose = document | {"bounds": dict.fromkeys(document["bounds"]), "failures": []}
    page = render_page("check", "x", loose).decode()
    assert "No bound was set." in page and ">OK<" not in page
    bound = loose | {"bounds": document["bounds"] | {"max_perplexity_ratio": 9.0}}
    assert ">OK<" in render_page("check", "x", bound).decode()
