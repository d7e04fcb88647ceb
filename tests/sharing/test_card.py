"""The model card: what was done, in fields and tables, and no stranger's word in it is anything but text."""

from __future__ import annotations

import random
import re
import unicodedata
import xml.etree.ElementTree as xml
from collections.abc import Callable

import pytest
import yaml
from markdown_it import MarkdownIt

from swsurgery.checkpoint.record import Record
from swsurgery.checkpoint.record_entries import BaseRecord, EditRecord, FileRecord, ScalarRecord
from swsurgery.hub import cards
from swsurgery.sharing import card, card_fields, markdown
from swsurgery.sharing.commit_text import describe_edits
from swsurgery.sharing.page import draw_record
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.names import FIGURE_NAME
from swsurgery.verifying.findings import Finding

COMMIT = "ab" * 20
PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
FORWARD = {
    "kind": "forward", "reason": None, "base": {"perplexity": 12.345678}, "patched": {"perplexity": 890.1},
    "perplexity_ratio": 72.1, "kl": 3.5, "stopword_mass": {"base": 0.4, "patched": 0.01},
    "text": {"scored_tokens": 511}, "device": "cpu", "dtype": "bfloat16", "ok": True, "failures": [],
}  # fmt: skip


def record(word: Callable[[], str] | None = None, **more: object) -> Record:
    """A record with one edit and one protected scalar; `word` gives every word that may be a stranger's."""

    def own(text: object) -> object:
        return word() if word else text

    scalar = {
        "file": own("model.safetensors"), "tensor": own("model.layers.2.mlp.down_proj.weight"),
        "index": (3968, 7003), "dtype": "F16", "offset": 0, "old": own(-17.328125), "old_bits": "0xcc55",
        "known": {"id": own("llama-7b:0"), "status": own("published"), "causal_alone": "yes",
                  "sources": [{"cite": own("arXiv:2411.07191")}]},
    }  # fmt: skip
    fields = {
        "registry_version": 1,
        "swsurgery_version": "0.1.0",
        "base": BaseRecord(repo_id=own("org/base"), revision=own(COMMIT), named_by="cache"),
        "files": {"model.safetensors": FileRecord(size=1, base_sha256=None, sha256=None)},
        "omitted": [],
        "edits": [EditRecord(**scalar, op="zero", new=0.0, new_bits="0x0000")],
        "protected": [ScalarRecord(**scalar)],
        "known": None,
        "check": {name: own(value) for name, value in FORWARD.items()} | {"kind": "forward"},
        "manifest_sha256": "0" * 64,
        "history": [],
    }
    return Record(**fields | more)


def rendered(made: Record, base_fields: dict | None = None, **more: object) -> str:
    arguments = {"repo_id": "org/edited", "manifest": b"version: 1\n"} | more
    return cards.render(card_fields.make_fields(made, base_fields or {}), card.render_body(made, **arguments)).decode()


def split(text: str) -> tuple[dict, str]:
    """Front matter, by another reader of YAML's documents, and the Markdown below it."""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert match, text[:200]
    return yaml.safe_load(match[1]), text[match.end() :]


def tokens(markdown: str) -> list:
    """Every token, those within a line as well."""
    return [inner for token in PARSER.parse(markdown) for inner in (token, *(token.children or ()))]


def table(markdown: str, heading: str) -> list[list[str]]:
    """The text of the cells of the first table below a heading."""
    below, rows, found = False, [], False
    parsed = PARSER.parse(markdown)
    for at, token in enumerate(parsed):
        if token.type == "heading_open":
            if found:
                break
            below = parsed[at + 1].content == heading
        if below and token.type == "tr_open":
            rows.append([])
        if below and token.type == "inline" and rows and parsed[at - 1].type in ("td_open", "th_open"):
            rows[-1].append("".join(child.content for child in token.children))
            found = True
    return rows


def test_what_was_changed_stands_in_a_table():
    coordinate = Coordinate("model.layers.2.mlp.down_proj.weight", (3968, 7003))
    short = {coordinate: (2, 3968, 7003, None)}
    _, body = split(rendered(record(), short=short))
    header, row = table(body, "What was changed")
    assert dict(zip(header, row, strict=True)) == {
        "tensor": coordinate.tensor, "index": "[3968, 7003]", "layer": "2", "row": "3968", "column": "7003",
        "dtype": "F16", "old": "-17.328125", "new": "0.0", "operation": "zero", "bits": "0xcc55 to 0x0000",
    }  # fmt: skip
    assert table(body, "Protected: the same bits as in the base")[1][:2] == [coordinate.tensor, "[3968, 7003]"]
    assert table(body, "Known super weights")[1] == ["llama-7b:0", str(coordinate), "published", "arXiv:2411.07191"]


def test_the_check_and_what_was_accepted_stand_in_the_card():
    found = [Finding("digest", "its sha256 is another", "config.json")]
    _, body = split(rendered(record(), accepted=found))
    assert table(body, "The check")[1] == ["perplexity", "12.3457", "890.1"]
    assert "Perplexity ratio 72.1, KL divergence 3.5, over 511 tokens" in body and "Verdict: passed" in body
    assert table(body, "Accepted findings")[1] == ["digest", "config.json", "its sha256 is another"]
    _, without = split(rendered(record(check={"kind": "off", "reason": "the check was turned off"})))
    assert "No check was made (the check was turned off)" in without and "Accepted" not in without
    _, failed = split(rendered(record(check=FORWARD | {"ok": False})))
    assert "Verdict: **failed**" in failed


def test_the_largest_activation_stands_in_the_card_beside_the_published_one():
    """The published value is the one that `lookup gemma-2b` prints."""
    peak = {"layer": 1, "token": 0, "channel": 2533, "value": -2622.5, "window": 3}
    check = FORWARD | {
        "base": FORWARD["base"] | {"super_activation": peak, "largest_by_layer": [3.0, -2622.5, 2000.0, 1200.0]},
        "patched": FORWARD["patched"] | {"super_activation": peak | {"value": None, "layer": 30}},
    }
    base = BaseRecord(repo_id="google/gemma-2b", revision=COMMIT, named_by="cache")
    made = record(check=check, base=base)
    for body in (
        split(rendered(made))[1],
        card.render_patch_body(made, "org/patch", b"version: 1\n", "edit.patch", 10),
    ):
        assert table(body, "Largest activation") == [
            ["model", "value", "layer", "token", "channel", "half reached in layer", "below half in layer"],
            ["base", "-2622.5", "1", "0", "2533", "1", "3"],
            ["patched", "not finite", "30", "0", "2533", "-", "-"],
        ]
        plain = body.replace("\\", "")
        assert "Published for `google/gemma-2b`: -2,992 in layer 11 (hidden state)" in plain
        assert "measured on 5,000 samples of text, not on the text of the check." in plain


@pytest.mark.parametrize(
    ("by_layer", "peak", "span"),
    [
        ([-9.0, 5.0, -10.0, 6.0], 2, ["0", "never"]),
        ([1.0, 2.0, -10.0, 1.0], 2, ["2", "3"]),
        ([1.0, 2.0, "inf"], 2, ["-", "-"]),
        ([1.0, 2.0], 5, ["-", "-"]),
        (None, 0, ["-", "-"]),
    ],
)
def test_the_card_states_between_which_layers_the_largest_activation_lasts(by_layer, peak, span):
    top = {"layer": peak, "token": 0, "channel": 3, "value": -10.0, "window": 0}
    sides = {"base": FORWARD["base"] | {"super_activation": top, "largest_by_layer": by_layer}}
    text = {"text": FORWARD["text"] | {"protocol": {"bos": "no", "description": "default"}}}
    body = split(rendered(record(check=FORWARD | sides | text)))[1]
    assert table(body, "Largest activation")[1] == ["base", "-10", str(peak), "0", "3", *span]
    assert "on the text of the check, whose windows begin without BOS:" in body


def test_the_card_has_no_largest_activation_that_was_neither_measured_nor_published():
    assert "Largest activation" not in rendered(record())
    known = record(base=BaseRecord(repo_id="google/gemma-2b", revision=COMMIT, named_by="cache"))
    section = split(rendered(known))[1].split("## Largest activation")[1].split("\n## ")[0]
    assert section.strip().startswith("Published for") and "|" not in section
    assert section.strip().replace("\\", "").endswith("measured on 5,000 samples of text.")


def test_how_to_verify_and_to_revert_and_the_manifest_stand_in_blocks():
    _, body = split(rendered(record(), manifest=b"version: 1\nbase: {path: ```x}\n"))
    blocks = [token.content for token in tokens(body) if token.type == "fence"]
    assert "swsurgery verify hf://org/edited\nswsurgery verify DIRECTORY\n" in blocks
    assert "version: 1\nbase: {path: ```x}\n" in blocks
    assert any("swsurgery revert DIRECTORY" in block for block in blocks)


def test_licence_language_task_and_tags_are_carried_over():
    base = {
        "license": "other", "license_name": "llama3", "license_link": "LICENSE", "language": "en",
        "tags": ["a", "a", "b c"], "pipeline_tag": "text-generation", "library_name": "transformers",
    }  # fmt: skip
    data, _ = split(rendered(record(), base))
    assert data == base | {
        "base_model": "org/base", "base_model_relation": "finetune", "language": ["en"],
        "tags": ["a", "b c", "swsurgery", "super-weights"],
    }  # fmt: skip


@pytest.mark.parametrize(
    "field, value",
    [
        ("license_link", "javascript:alert(1)"), ("license_link", "a" * 501), ("license", "x\ny: z"), ("tags", 7),
        ("pipeline_tag", ["a"]), ("license_name", "<b>"), ("library_name", "‮x"), ("tags", [["a"], None, "<i>"]),
        ("license_name", "a" * 201), ("license_name", " "), ("license_name", 3.1), ("license_name", ["a"]),
        ("license", "x\u2028y"), ("language", True), ("library_name", "a b"), ("pipeline_tag", "a: b"),
    ],
)  # fmt: skip
def test_a_field_that_is_no_plain_text_is_not_carried_over_and_named(field, value):
    data, _ = split(rendered(record(), {field: value}))
    assert data.get(field) in (None, ["swsurgery", "super-weights"])
    assert card_fields.list_omitted_fields({field: value}) == [field]
    assert card_fields.list_omitted_fields({field: value}, card_fields.LICENCE) == [field] * (
        field in card_fields.LICENCE
    )


@pytest.mark.parametrize(
    "name",
    [
        "llama-3.1 (community)", "a: b", "no", "1.0", "null", "2024-01-01", "- a", "# a", "'", '"', "!!python/object",
        "&a", "*a", "{a: b}", "--- ", "...", "%YAML 1.1", "a # b", " a ", "\\x3c", "許諾", "a" * 200,
    ],
)  # fmt: skip
def test_any_line_is_carried_over_as_a_licences_name_and_stays_a_string(name):
    base = {"license": name, "license_name": name, "language": ["en", name]}
    data, _ = split(rendered(record(), base))
    assert {field: data[field] for field in base} == base and card_fields.list_omitted_fields(base) == []


@pytest.mark.parametrize("written, codes", [("no", ["no"]), ("[en, no]", ["en", "no"]), ("[en, 'no']", ["en", "no"])])
def test_norwegian_is_a_language(written, codes):
    base, _ = cards.read(f"---\nlanguage: {written}\nlicense: other\n---\n", card_fields.FIELDS)
    data, _ = split(rendered(record(), base))
    assert data["language"] == codes and card_fields.list_omitted_fields(base) == []


def test_of_a_list_what_is_plain_is_carried_over_and_the_rest_is_named():
    base = {"language": ["en", "<b>"], "license": ["mit", 7], "tags": ["a", "b|c", "base_model:x/y"]}
    data, _ = split(rendered(record(), base))
    assert (data["language"], data["license"], data["tags"][0]) == (["en"], ["mit"], "a")
    assert card_fields.list_omitted_fields(base) == ["language", "license", "tags"]
    assert (
        card_fields.list_omitted_fields({"language": ["en"] * 200})
        == []
        != card_fields.list_omitted_fields({"language": ["en"] * 201})
    )


def test_a_base_that_is_not_on_the_hub_is_no_base_model():
    data, body = split(rendered(record(base=BaseRecord(repo_id=None, revision=None, named_by=None))))
    assert set(data) == {"tags"} and "not on the Hub" in body


def test_many_edits_and_a_long_manifest_are_left_to_their_files():
    edit = record().edits[0]
    _, body = split(rendered(record(edits=[edit] * 1000), manifest=b"x" * 100_000))
    assert len(table(body, "What was changed")) == markdown.MAX_CARD_ROWS + 1 and "and 800 more" in body
    assert "Its 100000 bytes are in `manifest.yaml`" in body and len(body) < 200_000


HOSTILE_CARD = """# Base </details>
```
closed </div><script>alert(1)</script>
~~~~
[link](javascript:alert(1)) ![i](http://127.0.0.1/pixel.png)
---
base_model: evil/model
---
\x1b[2J\u202e <!-- -->
"""


def test_the_bases_own_card_is_quoted_and_nothing_in_it_is_live():
    _, body = split(rendered(record(), base_card=HOSTILE_CARD))
    found = tokens(body)
    assert not {t.type for t in found} & {"html_block", "html_inline", "link_open", "image"}
    quoted = [t.content for t in found if t.type == "fence" and t.info == "markdown"]
    assert len(quoted) == 1 and found[-1].content == quoted[0]
    assert quoted[0].splitlines()[:3] == HOSTILE_CARD.splitlines()[:3]
    assert "By the authors of `org/base` at commit `" + COMMIT in body
    assert "\\x1b[2J\\u202e" in quoted[0]


def test_an_endless_card_is_cut():
    _, body = split(rendered(record(), base_card="`" * 10_000_000))
    assert len(body) < 4 * card.MAX_CARD and tokens(body)[-1].type == "fence"


PIECES = [
    "|", "\n", "\r\n", "`", "```", "<b>", "</td>", "<script>alert(1)</script>", "&lt;", "&#60;", "---", "\n---\n", "#",
    "![x](http://a/b)", "[x](javascript:x)", "https://a.example/", "www.a.example", "\x00", "\x1b[31m", "\u202e",
    "\u2066", "\u2028", "\x85", "\x7f", "\ufeff", "\ud800", "*", "__", "~~", "\\", "\\|", "$x$", ":", "- ", "1. ",
    "    ", "\t", "{{", "'", '"', "!!python/object", "&a", "*a", "%", "@", "é", "模", "𝒳", "<!--", "-->", "<?",
    "<![CDATA[", "a", " ", "=",
]  # fmt: skip


def hostile(random: random.Random) -> str:
    return "".join(random.choice(PIECES) for _ in range(random.randint(1, 9)))


def test_ten_thousand_hostile_strings_stay_text():
    source, seen = random.Random(2411), []

    def word() -> str:
        seen.append(hostile(source))
        return seen[-1]

    while len(seen) < 10_000:
        begin = len(seen)
        base_fields = {name: word() for name in card_fields.FIELDS} | {"tags": [word()], "language": [word()]}
        made = rendered(
            record(word), base_fields, base_card=word(), manifest=word().encode("utf-8", "replace"),
            accepted=[Finding("digest", word(), word())],
        )  # fmt: skip
        inert(made, seen[begin:])


def inert(made: str, words: list[str]) -> None:
    """The card has its fields, its headings and its table, and nothing that the words brought."""
    data, body = split(made)
    assert {"tags"} <= set(data) <= set(card_fields.FIELDS), words
    assert not set("<>") & set(made.removesuffix(body)), words
    assert all(isinstance(value, (str, list)) for value in data.values()), words
    found = tokens(body)
    assert not {t.type for t in found} & {"html_block", "html_inline", "link_open", "image", "s_open"}, words
    assert [t.tag for t in found if t.type == "heading_open"].count("h2") in (8, 9), words
    assert [len(row) for row in table(body, "What was changed")] == [10, 10], words
    controls = {c for c in made if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c != "\n"}
    assert not controls, words


def patch_card(made: Record, **more: object) -> str:
    arguments = {"manifest": b"version: 1\n", "patch_name": "patch.safetensors", "size": 900} | more
    return cards.render(
        card_fields.make_patch_fields(made, {}), card.render_patch_body(made, "org/edit", **arguments)
    ).decode()


def test_a_patchs_card_says_how_it_is_applied():
    data, body = split(patch_card(record()))
    assert data["base_model"] == "org/base" and data["base_model_relation"] == "adapter"
    assert "pipeline_tag" not in data and data["library_name"] == "swsurgery"
    assert table(body, "What it changes")[1][:2] == ["model.layers.2.mlp.down_proj.weight", "[3968, 7003]"]
    assert f"swsurgery apply patch.safetensors --base hf://org/base@{COMMIT} -o patched" in body
    inside = record(base=BaseRecord(repo_id="org/base", revision=COMMIT, named_by="cache", sub="a/b"))
    assert f"--base hf://org/base@{COMMIT}/a/b -o patched" in patch_card(inside)


@pytest.mark.parametrize("part", ["repo_id", "revision", "sub"])
@pytest.mark.parametrize("text", ["a; rm -rf ~", "$(id)", "`id`", "a b", 'a"b', "a\nb", "-o/etc"])
def test_no_strangers_word_gets_into_a_command(part, text):
    base = {"repo_id": "org/base", "revision": COMMIT, "named_by": "cache", part: text}
    _, body = split(patch_card(record(base=BaseRecord(**base))))
    commands = [t.content for t in tokens(body) if t.type == "fence" and t.info in ("sh", "python")]
    assert len(commands) == 3 and "--base BASE -o patched" in commands[0]
    assert not [c for c in commands if text in c]


def test_a_thousand_hostile_strings_stay_text_in_a_patchs_card():
    source, seen = random.Random(1106), []

    def word() -> str:
        seen.append(hostile(source))
        return seen[-1]

    while len(seen) < 1000:
        made = patch_card(
            record(word), manifest=word().encode("utf-8", "replace"), accepted=[Finding("digest", word(), word())]
        )
        data, body = split(made)
        assert set(data) <= set(card_fields.FIELDS), seen
        found = tokens(body)
        assert not {t.type for t in found} & {"html_block", "html_inline", "link_open", "image", "s_open"}, seen
        assert [t.tag for t in found if t.type == "heading_open"].count("h2") in (6, 7), seen


def test_escaping_says_what_was_there():
    for text in ("a|b", "<b>", "a`b", "x*y*", "[a](b)", "\\"):
        inline = PARSER.parse(markdown.escape(text))[1]
        assert "".join(child.content for child in inline.children) == text


@pytest.mark.parametrize(
    "front, fields",
    [
        ("---\nlicense: mit\n---\nbelow", {"license": "mit"}),
        ("\ufeff---\r\nlicense: mit\r\n---\r\nbelow", {"license": "mit"}),
        ("---\nlicense: [\n---\nbelow", {}),
        ("---\n- a\n---\nbelow", {}),
        ("---\n1: a\n---\nbelow", {}),
        ("---\nto_dict: a\nget: b\nlicense: mit\n---\nbelow", {"license": "mit"}),
        ("---\nignore_metadata_errors: a\nlicense: mit\n---\nbelow", {}),
        ("---\nx: !!python/object/apply:os.system [a]\n---\nbelow", {}),
        ("---\nmodel-index: [{results: 1}]\nlicense: mit\n---\nbelow", None),
        ("---\n" + "[" * 5000 + "\n---\nbelow", {}),
        ("below", {}),
    ],
)
def test_front_matter_is_read_as_far_as_it_can_be(front, fields, capsys, caplog):
    found, below = cards.read(front, card_fields.FIELDS)
    assert below == "below" and (fields is None or found == fields)
    assert capsys.readouterr().err == "" and caplog.text == ""


def test_a_commits_description_is_lines():
    edit = record(lambda: "x\ny").edits[0]
    text = describe_edits(record(edits=[edit] * 30), [Finding("digest", "a\nb", "c")])
    assert len(text.splitlines()) == 20 + 1 + 1 + 1
    assert "accepted: digest: c: a\\nb" in text and "and 10 more" in text


def test_the_figure_of_the_check_is_in_the_card_and_loads_nothing():
    made = record(check=FORWARD)
    drawn = draw_record(made)
    assert drawn is not None and drawn == draw_record(made)
    figure = xml.fromstring(drawn)
    texts = ["".join(e.itertext()) for e in figure.iter("{http://www.w3.org/2000/svg}text")]
    assert any(text.startswith("Perplexity: x") for text in texts) and {"base", "patched"} <= set(texts)
    assert not re.search(rb"url\(|@import|<script|href|\bon\w+=", drawn)
    line = f"]({FIGURE_NAME})"
    assert line in card.render_body(made, "org/name", b"", has_figure=True)
    assert line not in card.render_body(made, "org/name", b"")
    assert line in patch_card(made, has_figure=True) and line not in patch_card(made)


@pytest.mark.parametrize("check", [{"kind": "off"}, {"kind": "weights", "reason": "x"}, {"kind": "forward"}, {}])
def test_a_card_without_a_forward_check_has_no_figure(check):
    assert draw_record(record().model_copy(update={"check": check})) is None
