"""The shipped facts: complete, in range, exact where they say so, every source in order; and the files' schema."""

import json
import math
import struct
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from known import render_names
from known_page import render_page

from swsurgery import known
from swsurgery.errors import LookupFailed, ManifestError
from swsurgery.known import own, schema, shipped, table
from swsurgery.known.shipped import find, list_related, list_shipped_models, load_file

MODELS = list_shipped_models()
COORDINATES = [(m, c) for m in MODELS for c in m.coordinates]
TABLE_2 = {
    "huggyllama/llama-7b": [(2, 3968, 7003)],
    "huggyllama/llama-13b": [(2, 2231, 2278), (2, 2231, 6939)],
    "huggyllama/llama-30b": [(3, 5633, 12817), (3, 5633, 17439), (10, 5633, 14386)],
    "meta-llama/Llama-2-7b-hf": [(1, 2533, 7890)],
    "meta-llama/Llama-2-13b-hf": [(3, 4743, 7678)],
    "mistralai/Mistral-7B-v0.1": [(1, 2070, 7310)],
    "allenai/OLMo-1B-0724-hf": [(1, 1764, 1710), (1, 1764, 8041)],
    "allenai/OLMo-7B-0724-hf": [(1, 269, 7467), (2, 269, 8275), (7, 269, 453), (24, 269, 2300)],
    "microsoft/Phi-3-mini-4k-instruct": [
        (2, 525, 808), (2, 1693, 808), (2, 1113, 808), (4, 525, 2723), (4, 1113, 2723), (4, 1693, 2723),
    ],
}  # fmt: skip
"""The 21 rows of arXiv:2411.07191, Table 2, as (layer, row, col)."""


def test_counts():
    assert len(MODELS) == 76
    assert len(COORDINATES) == 122
    assert sum(m.max_activation is not None for m in MODELS) == 27
    assert sum(not m.entries for m in MODELS) == 22
    assert sum(bool(m.coordinates) and all(c.col is None for c in m.coordinates) for m in MODELS) == 10
    statuses = [c.status for _, c in COORDINATES]
    assert {s: statuses.count(s) for s in schema.STATUSES} == {
        "paper": 31, "measured": 6, "independent-detection": 28, "code-only": 6, "disputed": 1, "refuted": 9,
        "insufficient": 41, "candidate": 0,
    }  # fmt: skip
    assert sum(c.value is not None or c.value_printed is not None for _, c in COORDINATES) == 84
    assert sum(len(m.joint_sets) for m in MODELS) == 26


def test_the_whole_table_of_the_paper_is_there():
    assert sum(map(len, TABLE_2.values())) == 21
    for hf_id, rows in TABLE_2.items():
        known_rows = {(c.layer, c.row, c.col): c for c in own.find_model(hf_id).coordinates}
        for row in rows:
            assert "yu-table-2" in {s.key for s in known_rows[row].sources}, (hf_id, row)
    cited = sum("yu-table-2" in {s.key for s in c.sources} for _, c in COORDINATES)
    assert cited == 21


def test_the_best_known_super_weight():
    [coordinate] = own.find_model("llama-7b").coordinates
    assert (coordinate.layer, coordinate.row, coordinate.col) == (2, 3968, 7003)
    assert coordinate.tensor == "model.layers.2.mlp.down_proj.weight"
    assert (coordinate.value, coordinate.dtype) == (-1.9267578125, "F16")
    table_1 = coordinate.effects[0]
    assert (table_1.before, table_1.after) == (5.67, 1211.11)
    assert str(table_1.source) == "Yu et al., arXiv:2411.07191v1, Table 1"


@pytest.mark.parametrize(("model", "coordinate"), COORDINATES, ids=lambda x: getattr(x, "slug", None) or x.id)
def test_coordinate_is_in_range_and_its_id_says_it(model, coordinate):
    assert 0 <= coordinate.layer < model.num_layers
    assert 0 <= coordinate.row < model.hidden_size
    assert coordinate.col is None or 0 <= coordinate.col < model.intermediate_size
    assert (coordinate.expert is None) == (model.num_experts is None)
    expert = "" if coordinate.expert is None else f".E{coordinate.expert}"
    col = "*" if coordinate.col is None else coordinate.col
    assert coordinate.id == f"L{coordinate.layer}{expert}.{coordinate.row}.{col}"
    assert f".{coordinate.layer}." in coordinate.tensor and "{" not in coordinate.tensor
    assert coordinate.expert is None or f".{coordinate.expert}." in coordinate.tensor


def exact(value: float, dtype: str) -> bool:
    """Whether `value` survives a trip through the dtype's bits."""
    if dtype == "F16":
        return struct.unpack("<e", struct.pack("<e", value))[0] == value
    bits = struct.pack("<f", value)
    return struct.unpack("<f", bits)[0] == value and (dtype == "F32" or bits[:2] == b"\0\0")


def test_every_value_with_a_dtype_is_exact_in_it():
    assert exact(-1.9267578125, "F16") and not exact(-0.5924, "F16")
    assert exact(-0.2734375, "BF16") and not exact(-1.9267578125, "BF16")
    guarded = [(m.slug, c.id, c.value, c.dtype) for m, c in COORDINATES if c.value is not None]
    assert len(guarded) == 71
    assert [g for g in guarded if not exact(g[2], g[3])] == []
    assert {dtype for *_, dtype in guarded} == {"F16", "BF16", "F32"}


def test_rounded_prints_are_no_guards():
    printed = {f"{m.slug}:{c.id}": c.value_printed for m, c in COORDINATES if c.value_printed and c.value is None}
    assert printed["olmo-1b:L1.1764.8041"] == "0.0018"
    assert printed["qwen2.5-3b:L2.318.3189"] == "-0.550781"
    assert len(printed) == 13


def test_row_level_evidence_is_marked():
    row = find(own.find_model("smollm2-135m"), "L11.507.*")
    assert (row.col, row.causal_alone, row.causal_scope) == (None, "strong", "row")
    assert "strong (row)" in table.render_table(own.find_model("smollm2-135m"), 80)
    assert find(own.find_model("llama-7b"), "L2.3968.7003").causal_scope == "scalar"


def test_sources_are_citable_and_consistent_across_files():
    seen = {}
    for model in MODELS:
        assert model.sources
        for source in model.sources:
            place = source.cite.split(":")[0]
            assert source.commit is None or "/" in place, source.key
            seen.setdefault((source.cite, source.commit), set()).add((source.kind, source.note))
    assert len(seen) > 60
    assert {where: facts for where, facts in seen.items() if len(facts) > 1} == {}


def test_what_is_known_without_a_coordinate():
    assert [len(e.experts) for e in list_related().super_experts] == [2, 1, 10, 3]
    moe = own.find_model("qwen3-30b-a3b")
    experts = {f"L{c.layer}.E{c.expert}" for c in moe.coordinates}
    assert experts == set(list_related().super_experts[3].experts)
    assert len(list_related().sink_neurons) == 4
    assert len(list_related().negative_results) == 8
    assert len(list_related().rows) == 7
    assert len(list_related().wrong_values) == 4


COORDINATE = """
id = "L1.2.3"
status = "paper"
causal_alone = "untested"
located_by = ["A"]
independent = { location = 1, value = 0 }
sources = ["a"]
"""
GOOD = (
    """
[sources]
a = { kind = "paper", cite = "A" }
[[models]]
hf_id = "org/m"
aliases = ["m"]
family = "F"
hidden_size = 4
intermediate_size = 8
num_layers = 2
sizes_from = "here"
tensor = "layers.{layer}.weight"
[[models.coordinates]]
"""
    + COORDINATE
)


def test_a_minimal_file_loads(tmp_path):
    (tmp_path / "m.toml").write_text(GOOD)
    [model] = load_file(tmp_path / "m.toml")
    assert [c.tensor for c in model.coordinates] == ["layers.1.weight"]
    assert [s.cite for s in model.sources] == ["A"]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('cite = "A" }', 'cite = "A" }\nb = { kind = "paper", cite = "B" }', "listed but not cited"),
        ('sources = ["a"]', 'sources = ["b"]', "cited but not listed"),
        ('kind = "paper"', 'kind = "hearsay"', "kind"),
        ('status = "paper"', 'status = "rumour"', "status"),
        ('causal_alone = "untested"', 'causal_alone = "awful"', "causal_alone"),
        ("num_layers = 2", 'num_layers = "2"', "num_layers"),
        ("num_layers = 2", "num_layers = 2\nnum_heads = 2", "num_heads"),
        ("hidden_size = 4\n", "", "hidden_size"),
        ('tensor = "layers.{layer}.weight"\n', "", "tensor"),
        ('id = "L1.2.3"', 'id = "L1.2"', "is not an id"),
        ('id = "L1.2.3"', 'id = "L1.2.3"\nvalue = 1.0', "value and dtype"),
        ('id = "L1.2.3"', 'id = "L1.2.3"\nvalue = 1.0\ndtype = "float16"', "dtype"),
        ("[sources]", "extra = 1\n[sources]", "unknown or missing tables"),
        ("num_layers = 2", 'num_layers = 2\nmax_activation = { value = 1.0, place = "p" }', "cited but not listed"),
        ("num_layers = 2", 'num_layers = 2\nmax_activation = { value = 1.0, source = "a" }', "place"),
        ("num_layers = 2", 'num_layers = 2\nmax_activation = { value = nan, place = "p", source = "a" }', "value"),
        ("num_layers = 2", 'num_layers = 2\nvocab_size = -1', "vocab_size"),
        ('sources = ["a"]', 'sources = ["a"]\n[[models.joint_sets]]\ncoordinates = ["L9.9.9"]\neffects = []', "L9.9.9"),
        ("[[models.coordinates]]", f"[[models.coordinates]]\n{COORDINATE}[[models.coordinates]]", "twice"),
    ],
)  # fmt: skip
def test_a_file_that_breaks_the_schema_is_refused(tmp_path, old, new, complaint):
    assert old in GOOD
    (tmp_path / "m.toml").write_text(GOOD.replace(old, new, 1))
    with pytest.raises(ValueError, match=complaint):
        load_file(tmp_path / "m.toml")


def test_models_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        own.find_model("llama-7b").hidden_size = 1


def test_addressable_leaves_out_rows_and_the_refuted():
    olmo = own.find_model("olmo-1b")
    ids = [c.id for c in shipped.list_addressable(olmo)]
    assert ids == ["L1.1764.1710", "L2.1764.8041", "L15.1764.3454", "L4.1764.556"]
    refuted = [c.id for c in shipped.list_addressable(olmo, "refuted")]
    assert refuted == ["L1.1764.8041", "L15.1764.6840", "L3.1764.1902", "L1.623.1710"]
    assert [c.id for c in shipped.list_addressable(olmo, ["paper", "disputed"])] == ["L1.1764.1710", "L2.1764.8041"]
    assert shipped.list_addressable(own.find_model("smollm2-135m")) == ()
    with pytest.raises(LookupFailed, match="no such status: rumour .give one of paper, measured"):
        shipped.list_addressable(olmo, "rumour")


def test_json_has_the_promised_shape():
    document = shipped.build_json(own.find_model("olmo-1b"))
    [model] = document["models"]
    assert model["hf_id"] == "allenai/OLMo-1B-0724-hf"
    assert model["aliases"][0] == model["slug"] == "olmo-1b"
    first = model["coordinates"][0]
    promised = {"layer", "row", "col", "expert", "tensor", "value", "status", "causal_alone", "sources"}
    assert promised <= set(first)
    assert (first["layer"], first["row"], first["col"], first["expert"]) == (1, 1764, 1710, None)
    assert first["sources"][0] == "Yu et al., arXiv:2411.07191v1, Table 2"
    assert model["joint_sets"][0]["coordinates"] == ["L1.1764.1710", "L2.1764.8041"]
    assert any("layer 1" in dispute for dispute in model["disputes"])


def test_json_of_everything_is_plain_and_keeps_infinities_as_words():
    document = shipped.build_json(MODELS)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert sum(len(m["coordinates"]) for m in document["models"]) == 122
    [llama] = shipped.build_json(own.find_model("llama-2-7b"))["models"]
    assert llama["joint_sets"][0]["effects"][0]["ratio"] == "inf"
    [only] = shipped.build_json(own.find_model("llama-2-7b"), "paper")["models"]
    assert [c["id"] for c in only["coordinates"]] == ["L1.2533.7890"]


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.slug)
def test_table_fits_the_terminal_and_names_everything(model, width):
    text = table.render_table(model, width)
    assert max(map(len, text.splitlines())) <= width
    flat = " ".join(text.split())
    for coordinate in model.coordinates:
        assert coordinate.id in flat
        assert coordinate.tensor in flat
        assert coordinate.value is None or f"{coordinate.value!r} {coordinate.dtype}" in flat
    for source in model.sources:
        if "comprehensive_analysis" not in source.cite:  # long paths are broken
            assert source.cite.split()[0] in flat
    for joint_set in model.joint_sets:
        assert " + ".join(joint_set.coordinates) in flat
    for dispute in model.disputes:
        assert f"WARNING: {dispute}" in flat


def test_table_says_what_zeroing_does_alone_and_together():
    assert "zeroed: wikitext2 ppl 5.67 -> 1211 [1]" in table.render_table(own.find_model("llama-7b"), 80)
    llama_13b = table.render_table(own.find_model("llama-13b"), 120)
    assert "wikitext2 ppl x1.145" in llama_13b
    assert "L2.2231.2278 + L2.2231.6939" in llama_13b
    assert "the published pair: wikitext2 ppl x129.8 (95%: x118.1 to x143.1)" in llama_13b
    assert "transformer.h.2.mlp.c_proj.weight[666, 447]" in table.render_table(own.find_model("gpt2"), 80)


# The commit of superweights/notes.md in which each number was read.
SECOND, THIRD = "7f6bd998d21637c00bb0c66023ef4356fa10532d", "701088bdcbe6b09d8a39b77991db12ac1bb5d5c3"


@pytest.mark.parametrize(
    ("model", "coordinate", "ratio", "ci95", "commit"),
    [
        ("llama-7b", "L2.3968.7003", 181, None, SECOND),
        ("mistral-7b", "L1.2070.7310", 1430, None, SECOND),
        ("mistral-7b", "L1.2070.7310", 1425, (1229, 1647), THIRD),
        ("olmo-1b", "L1.1764.1710", 3667, (3425, 3920), THIRD),
        ("olmo-7b", "L1.269.7467", 79.4, None, SECOND),
        ("olmo-1b", "L2.1764.8041", 1.02, None, "08f37fdd7f551474ae971f166d32665d02aec3f9"),
        ("phi-3-mini", "L2.1113.808", 1.0027, (1.0014, 1.0041), "47ca7823c695fdb28c6ea8a77788cc89130251dc"),
    ],
)
def test_a_number_is_cited_from_the_commit_that_contains_it(model, coordinate, ratio, ci95, commit):
    [known_one] = [c for c in own.find_model(model).coordinates if c.id == coordinate]
    [effect] = [e for e in known_one.effects if e.ratio == ratio and e.ci95 == ci95]
    assert effect.source.commit == commit


def test_no_shipped_interval_was_computed_from_tokens():
    document = tomllib.loads((Path(known.__file__).with_name("smollm2.toml")).read_text("utf-8"))
    [model] = [m for m in document["models"] if m["hf_id"] == "HuggingFaceTB/SmolLM2-135M-Instruct"]
    effects = [e for each in (*model["coordinates"], *model["joint_sets"]) for e in each["effects"]]
    assert len(effects) > 10
    for effect in effects:
        conditions = effect["conditions"]
        assert "ci95" not in effect or (conditions["windows"] >= 8 and conditions["scored_tokens"] > 0)


@pytest.mark.parametrize("model", ["mistral-7b", "olmo-1b"])
def test_doses_and_the_mean_control_are_cited_from_the_commit_that_contains_them(model):
    protocols = {
        e.protocol.split(",")[0]: e for e in own.find_model(model).effects if e.source.key.startswith("arctos")
    }
    assert {"scale", "zero"} <= set(protocols)
    assert {e.source.commit for e in protocols.values()} == {THIRD}


def test_table_warns_where_sources_disagree_and_only_there():
    olmo = " ".join(table.render_table(own.find_model("olmo-1b"), 80).split())
    assert "WARNING: Sources disagree on the second coordinate: the paper's Table 2 prints layer 1" in olmo
    assert "have layer 2" in olmo
    assert "WARNING" not in table.render_table(own.find_model("llama-7b"), 80)
    single = table.render_table(own.find_model("qwen3-1.7b"), 120)
    assert "WARNING: reported by one group only: L2.1793.1821, L2.1999.1821" in single
    copied = table.render_table(own.find_model("llama-3-8b-instruct"), 120)
    assert "WARNING: no source found it at this position" in copied
    assert "WARNING: only the row is published" in table.render_table(own.find_model("smollm2-135m"), 120)


def test_table_footnotes_are_all_listed():
    text = table.render_table(own.find_model("phi-3-mini"), 100)
    body, listed = text.split("\nsources\n")
    cited = {int(word[1:-1]) for word in body.replace("(", " ").split() if word[0] == "[" and word[1:-1].isdigit()}
    assert cited == set(range(1, len(own.find_model("phi-3-mini").sources) + 1))
    assert [line.split()[0] for line in listed.splitlines() if line.startswith("  [")] == [
        f"[{n}]" for n in sorted(cited)
    ]


def test_table_of_one_status():
    text = table.render_table(own.find_model("olmo-1b"), 80, status="paper")
    assert "L1.1764.1710" in text and "L15.1764.6840" not in text
    assert "none of this status" in table.render_table(own.find_model("olmo-1b"), 80, status="code-only")


PEAKS = """
qwen2.5-1.5b -7968 5 1; qwen2.5-1.5b-instruct -7968 5 1; qwen2.5-7b -13248 13 3; qwen2.5-7b-instruct -13312 13 3
qwen2.5-32b 30848 63 5; qwen2.5-32b-instruct 22144 42 4; qwen2.5-vl-3b -3984 30 2; qwen2.5-vl-7b -8256 13 3
qwen2.5-vl-32b 22144 44 4; qwen3-1.7b 14208 25 2; qwen3-8b 17664 16 6; qwen3-32b 35328 44 6; qwen3-30b-a3b 1512 3 2
gemma-2b -2992 11 6; gemma-2-9b 1664 41 15; gemma-2-27b 157696 38 25; gemma-3-4b-it 245760 29 13
gemma-3-27b-it 696320 46 23; gpt-oss-20b -145408 23 23; ling-mini-5t -7648 - 5; ling-mini-10t -9024 - 5
ling-mini-15t -10112 - 1; ling-mini-20t -11776 - 1; qwen3.5-0.8b -122 - -; qwen3.5-9b 956 - -; qwen3.5-27b 1848 - -
qwen3.5-35b-a3b 132 - -
"""
"""The 27 maximum activations of arXiv:2605.15572: name, value, layer, first layer with half of it."""


def test_every_maximum_activation_of_the_paper_is_there_and_in_range():
    listed = [line.split() for line in PEAKS.replace("\n", ";").split(";") if line.strip()]
    found = {m.slug: m.max_activation for m in MODELS if m.max_activation}
    assert len(listed) == len(found) == 27
    for slug, value, *layers in listed:
        numbers = [None if layer == "-" else int(layer) for layer in layers]
        assert [found[slug].value, found[slug].layer, found[slug].from_layer] == [float(value), *numbers], slug
        assert all(n is None or n < own.find_model(slug).num_layers for n in numbers)
    assert {str(each.source) for each in found.values()} == {
        "clx1415926/Max_act_llm: results/*/json/*_activation_stats.json@d3a0f2eab08e0fad2bc4d667d976f87a20bc96bd"
    }


def test_a_maximum_activation_that_float16_cannot_represent_is_a_warning():
    too_large = {m.slug for m in MODELS if m.max_activation and not m.max_activation.fits_float16}
    assert too_large == {"gemma-2-27b", "gemma-3-4b-it", "gemma-3-27b-it", "gpt-oss-20b"}
    for model in MODELS:
        flat = " ".join(table.render_table(model, 80).split())
        assert ("WARNING: float16 cannot represent" in flat) == (model.slug in too_large)
    flat = " ".join(table.render_table(own.find_model("gemma-3-27b"), 80).split())
    assert "maximum activation 696,320 in layer 46 (hidden state); half of it from layer 23 [1]" in flat
    assert "float16 cannot represent the maximum activation: 696,320 > 65,504; run this model in bfloat16" in flat
    [document] = shipped.build_json(own.find_model("gpt-oss-20b"))["models"]
    assert document["max_activation"]["fits_float16"] is False and document["max_activation"]["layer"] == 23


def test_negative_results_of_a_listed_model_are_shown_with_it():
    flat = " ".join(table.render_table(own.find_model("gemma-2-9b"), 80).split())
    assert "published without a super weight - zeroing the massive activation does no harm (Owen et al." in flat
    [document] = shipped.build_json(own.find_model("qwen2.5-1.5b-instruct"))["models"]
    [result] = document["negative_results"]
    assert "zeroing the two largest weights" in result["finding"] and "arXiv:2607.08733" in result["cite"]
    assert "published without" not in table.render_table(own.find_model("llama-7b"), 80)


def test_a_manifest_of_a_model_without_coordinates_says_why_there_is_none():
    with pytest.raises(LookupFailed, match="no whole coordinate to zero: gemma-2-27b .none is published"):
        table.render_manifest(own.find_model("gemma-2-27b"), "zero")


@pytest.mark.parametrize(("value", "fits"), [(65504.0, True), (-65504.0, True), (65505.0, False), (-65536.0, False)])
def test_the_largest_float16_is_65504(value, fits):
    found = schema.MaxActivation(value=value, place="p", source=schema.Citation(key="a", kind="paper", cite="A"))
    assert found.fits_float16 == fits
    assert struct.unpack("<e", b"\xff\x7b") == (schema.LARGEST_FLOAT16,)  # the bits before infinity


def test_documentation_is_up_to_date():
    page = Path(__file__).parents[2] / "docs" / "known.md"
    assert page.read_text("utf-8") == render_page(), "run python docs/known.py > docs/known.md"
    assert all(w.where in render_page() and w.truth in render_page() for w in list_related().wrong_values)
    assert all(", ".join(n.hf_ids) in render_page() for n in list_related().negative_results)
    for model, coordinate in COORDINATES:
        assert f"### {model.slug}\n" in render_page()
        assert f"| {coordinate.id} |" in render_page()


def test_index_of_names_is_up_to_date():
    index = Path(known.__file__).with_name("names.toml").read_text("utf-8")
    assert index == render_names(), "run python docs/known.py names > swsurgery/known/names.toml"
    assert '"huggyllama-llama-7-b"' in index


def test_one_name_opens_one_file():
    code = (
        "import tomllib; from swsurgery import known; loads, opened = tomllib.loads, [];"
        "tomllib.loads = lambda text: opened.append(text[:9]) or loads(text);"
        "known.find_model('phi-3-mini'); print(len(opened)); print(*opened, sep='')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "2", done.stdout  # the index and phi-3.toml


def test_every_word_of_the_vocabulary_is_explained():
    for word, meaning in schema.STATUSES.items():
        assert f"    {word.ljust(24)}{meaning}" in known.__doc__
    for word in schema.CAUSAL:
        assert word in known.__doc__


def test_words_agree_with_the_published_ratios():
    """`causal_alone` restates the strongest published perplexity ratio of zeroing the scalar."""
    floors = {"catastrophic": 30, "strong": 4, "moderate": 2, "weak": 1.05, "inert": 0}
    checked = 0
    for model, coordinate in COORDINATES:
        ratios = [
            e.ratio if isinstance(e.ratio, float) else e.after / e.before
            for e in coordinate.effects
            if e.protocol == "zero" and e.metric == "wikitext2_ppl" and not isinstance(e.ratio, str)
            and (e.ratio is not None or e.before is not None)
        ]  # fmt: skip
        if ratios:
            word = next(w for w, floor in floors.items() if max(ratios) >= floor)
            assert coordinate.causal_alone == word, (model.slug, coordinate.id, ratios)
            assert all(math.isfinite(r) for r in ratios)
            checked += 1
    assert checked >= 40


def test_lookup_is_light():
    """Neither torch nor numpy nor a YAML reader is loaded to look a name up."""
    code = (
        "import sys; from swsurgery import known; known.render_table(known.find_model('llama-7b'), 80);"
        "print(*sorted({'torch', 'numpy', 'yaml', 'huggingface_hub', 'transformers', 'typer'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_manifest_faults():
    llama = own.find_model("llama-7b")
    with pytest.raises(ManifestError, match="scale needs a factor"):
        table.render_manifest(llama, "scale")
    with pytest.raises(ManifestError, match="zero takes no factor"):
        table.render_manifest(llama, "zero", 0.5)
    with pytest.raises(ManifestError, match="no such operation"):
        table.render_manifest(llama, "set", 0.5)
    for factor in (0.0, math.nan, math.inf):
        with pytest.raises(ManifestError, match="finite number other than 0"):
            table.render_manifest(llama, "scale", factor)
    with pytest.raises(LookupFailed, match="no whole coordinate to protect: smollm2-135m .only rows are published"):
        table.render_manifest(own.find_model("smollm2-135m"), "protect")
    with pytest.raises(LookupFailed, match="all are insufficient"):
        table.render_manifest(own.find_model("falcon-7b"), "zero")
    with pytest.raises(LookupFailed, match="none is of this status"):
        table.render_manifest(llama, "zero", status="code-only")


def test_published_figures_say_on_which_text_they_were_measured():
    model = own.find_model("llama-7b")
    text = " ".join(table.render_table(model).split())
    paper = "the raw test set of WikiText-2 (all windows of 2,048 tokens), C4 and seven tasks"
    assert f"Table 1 (paper; measured on {paper})" in text
    assert "cannot be compared" not in text, "one figure of each scalar is shown"
    effects = [effect.to_json() for effect in model.coordinates[0].effects]
    assert effects[0]["measured_on"] == paper and "measured_on" not in effects[-1]
    assert own.find_model("gemma-2b").max_activation.to_json()["measured_on"] == "5,000 samples of text"


def test_an_own_scan_beside_a_published_perplexity_of_another_protocol_is_a_warning():
    model = own.find_model("llama-7b")
    first = model.coordinates[0]
    conditions = schema.Conditions(
        text_sha256="ab" * 32, windows=16, window_tokens=512, scored_tokens=8176, dtype="float32", device="cpu",
        protocol="default: without overlap, with BOS",
    )  # fmt: skip
    source = schema.Citation(key="scan", kind="own scan", cite="measured")
    own_effect = schema.KnownEffect(protocol="zero", metric="ppl", ratio=4.0, conditions=conditions, source=source)
    both = first.model_copy(update={"effects": (*first.effects, own_effect)})
    text = " ".join(table.render_table(model.model_copy(update={"coordinates": (both,)})).split())
    assert (
        "WARNING: the perplexities of L2.3968.7003 were measured by different protocols, so they cannot be compared: "
        "(1) the raw test set of WikiText-2 (all windows of 2,048 tokens), C4 and seven tasks; (2) default: without "
        "overlap, with BOS, 16 windows of 512 tokens, text sha256 abababababab" in text
    )
    alone = first.model_copy(update={"effects": (own_effect, own_effect)})
    assert "cannot be compared" not in table.render_table(model.model_copy(update={"coordinates": (alone,)}))
