"""Recipes: each pattern excludes its own module and no other one, as the tool compares it with names."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import pytest
from checkpoints import CONFIG, down, tensor, tree, write_llama, write_manifest, write_single

import swsurgery
from swsurgery.cli import main
from swsurgery.errors import PlanError
from swsurgery.known import list_all_models
from swsurgery.sharing.recipes import llama_cpp
from swsurgery.sharing.recipes.modules import KeptModule, Subject
from swsurgery.sharing.recipes.names import ToolName
from swsurgery.sharing.recipes.tools import TOOLS

ROOT = Path(__file__).parents[2]
NAMES = get_args(ToolName)
RENDER = {tool.name: tool.render for tool in TOOLS}
SPLIT = {"llm-compressor", "compressed-tensors", "gptqmodel", "auto-round"}
"""Tools that split stacked experts into one linear layer per expert."""

HEADED = set(NAMES) - {"gptqmodel", "auto-round", "llama.cpp"}
"""Tools whose default skips a list of the user replaces."""


def match_or_equal(pattern: str, name: str, names: Sequence[str]) -> bool:
    """compressed_tensors/utils/match.py, match_name."""
    return bool(re.match(pattern[3:], name)) if pattern.startswith("re:") else pattern == name


def match_part(pattern: str, name: str, names: Sequence[str]) -> bool:
    """transformers/quantizers/quantizers_utils.py, should_convert_module."""
    return bool(re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name)) or name.endswith(pattern)


def match_all(pattern: str, name: str, names: Sequence[str]) -> bool:
    """torchao/quantization/quant_api.py, fqn_matches_fqn_config."""
    return bool(re.fullmatch(pattern, name))


def match_begin(pattern: str, name: str, names: Sequence[str]) -> bool:
    """gptqmodel/quantization/config.py, dynamic_get."""
    return pattern.startswith("-:") and bool(re.match(pattern[2:], name))


def match_substring(pattern: str, name: str, names: Sequence[str]) -> bool:
    """auto_round/compressors/layer_config_resolver.py, get_fp_layer_names."""
    return pattern == name if pattern in names else pattern in name


def match_anywhere(pattern: str, name: str, names: Sequence[str]) -> bool:
    """llama.cpp src/llama-quant.cpp, std::regex_search; tools/quantize converts the pattern to lower case."""
    return bool(re.search(pattern.lower(), name))


MATCHERS: dict[str, Callable[[str, str, Sequence[str]], bool]] = {
    "llm-compressor": match_or_equal,
    "compressed-tensors": match_or_equal,
    "transformers": match_part,
    "torchao": match_all,
    "gptqmodel": match_begin,
    "auto-round": match_substring,
    "llama.cpp": match_anywhere,
    "bitsandbytes": match_part,
}
"""How each tool compares a pattern with a name, written again from the tool's source."""

ATTENTION = [f"self_attn.{part}_proj" for part in "qkvo"]
LLAMA = [
    *(f"model.layers.{n}.{part}" for n in range(32) for part in [*ATTENTION, "mlp.gate_proj", "mlp.up_proj"]),
    *(f"model.layers.{n}.mlp.down_proj" for n in range(32)),
    *("lm_head", "model.embed_tokens", "model.norm"),
]
MIXTRAL_STORED = [
    *(f"model.layers.{n}.{part}" for n in range(32) for part in [*ATTENTION, "block_sparse_moe.gate"]),
    *(
        f"model.layers.{n}.block_sparse_moe.experts.{e}.{w}"
        for n in range(32)
        for e in range(12)
        for w in ("w1", "w2", "w3")
    ),
    "lm_head",
]
MIXTRAL_SPLIT = [
    *(f"model.layers.{n}.{part}" for n in range(32) for part in [*ATTENTION, "mlp.gate"]),
    *(
        f"model.layers.{n}.mlp.experts.{e}.{part}_proj"
        for n in range(32)
        for e in range(12)
        for part in ("gate", "up", "down")
    ),
    "lm_head",
]
MIXTRAL_STACKED = [
    *(f"model.layers.{n}.{part}" for n in range(32) for part in [*ATTENTION, "mlp.gate", "mlp.experts"]),
    "lm_head",
]


def exclude(tool: str, patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    return {name for name in names if any(MATCHERS[tool](pattern, name, names) for pattern in patterns)}


def make_gguf(names: Sequence[str]) -> list[str]:
    parts = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down", "o_proj": "attn_output"}
    parts |= {f"{part}_proj": f"attn_{part}" for part in "qkv"}
    blocks = [name.split(".") for name in names if ".layers." in name]
    return [f"blk.{block[2]}.{parts[block[-1]]}.weight" for block in blocks] + ["output.weight", "token_embd.weight"]


@pytest.mark.parametrize("tool", NAMES)
def test_a_pattern_matches_its_layer_and_no_other(tool):
    for layer in range(32):
        subject = Subject("org/model", ("lm_head",), False, (KeptModule(f"model.layers.{layer}.mlp.down_proj"),))
        patterns = RENDER[tool](subject).patterns
        if tool == "llama.cpp":
            assert exclude(tool, patterns, make_gguf(LLAMA)) == {f"blk.{layer}.ffn_down.weight"}
        else:
            head = {"lm_head"} if tool in HEADED else set()
            assert exclude(tool, patterns, LLAMA) == {f"model.layers.{layer}.mlp.down_proj"} | head


@pytest.mark.parametrize("layer", [1, 2, 3, 11, 22, 31])
@pytest.mark.parametrize("expert", [0, 1, 11])
@pytest.mark.parametrize("tool", NAMES)
def test_an_expert_is_matched_in_each_form_that_the_tool_can_see(tool, layer, expert):
    module = KeptModule(f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w2", expert)
    made = RENDER[tool](Subject("org/model", ("lm_head",), True, (module,)))
    assert module.name in made.notes[0], "every tool says something about experts"
    if tool == "llama.cpp":
        names = [f"blk.{n}.ffn_{part}_exps.weight" for n in range(32) for part in ("gate", "up", "down")]
        assert exclude(tool, made.patterns, names) == {f"blk.{layer}.ffn_down_exps.weight"}
        assert "a single expert cannot be excluded" in made.notes[0]
        return
    head = {"lm_head"} if tool in HEADED else set()
    routers = tool in HEADED
    gates = {name for name in MIXTRAL_STORED if name.endswith(".gate") and routers}
    assert exclude(tool, made.patterns, MIXTRAL_STORED) == {module.name} | head | gates
    gates = {f"model.layers.{n}.mlp.gate" for n in range(32) if routers}
    if tool in SPLIT:
        split = f"model.layers.{layer}.mlp.experts.{expert}.down_proj"
        assert exclude(tool, made.patterns, MIXTRAL_SPLIT) == {split} | head | gates
    else:
        assert exclude(tool, made.patterns, MIXTRAL_STACKED) == {f"model.layers.{layer}.mlp.experts"} | head | gates


@pytest.mark.parametrize("tool", sorted(set(NAMES) - {"llama.cpp"}))
def test_a_vision_language_model_is_matched_as_stored_and_as_loaded(tool):
    module = KeptModule("language_model.model.layers.1.mlp.down_proj")
    made = RENDER[tool](Subject("org/model", ("lm_head", "language_model.lm_head"), False, (module,)))
    vision = [f"vision_tower.encoder.layers.{n}.mlp.down_proj" for n in range(12)]
    for prefix in ("language_model.model.", "model.language_model."):
        names = [*(prefix + name.removeprefix("model.") for name in LLAMA[:-3]), *vision]
        assert exclude(tool, made.patterns, names) == {f"{prefix}layers.1.mlp.down_proj"}


def test_gguf_names_do_not_depend_on_the_prefix():
    module = KeptModule("language_model.model.layers.11.mlp.down_proj", dtype="BF16")
    made = RENDER["llama.cpp"](Subject("org/model", ("lm_head",), False, (module,)))
    assert made.patterns == (r"^blk\.11\.ffn_down\.weight$",)
    words = shlex.split(made.text.replace("\\\n", " "))
    assert words[:3] == ["llama-quantize", "--tensor-type", r"^blk\.11\.ffn_down\.weight$=bf16"]


def test_a_stack_of_experts_is_named_by_its_module():
    gpt_oss = KeptModule("model.layers.3.mlp.experts.down_proj", 5, stacked=True)
    assert gpt_oss.list_names(split=False) == ("model.layers.3.mlp.experts.down_proj", "model.layers.3.mlp.experts")
    assert gpt_oss.list_names(split=True)[1] == "model.layers.3.mlp.experts.5.down_proj"
    granite = KeptModule("model.layers.3.block_sparse_moe.output_linear", 5, stacked=True)
    assert granite.stack == "model.layers.3.block_sparse_moe.experts"
    shared = KeptModule("model.layers.3.mlp.shared_expert.down_proj", "shared")
    assert shared.stack is None and shared.list_names(split=True) == (shared.name,)


# Texts --------------------------------------------------------------------------------------------------------------


def test_the_table_is_complete():
    assert tuple(tool.name for tool in TOOLS) == NAMES
    assert set(MATCHERS) == set(NAMES)
    page = (ROOT / "docs" / "recipes.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \|", page.partition("## Tools")[2].partition("\n## ")[0], re.M)
    assert rows == list(NAMES)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_the_text_is_in_its_language_and_contains_every_pattern(tool):
    made = swsurgery.recipe("llama-7b", tool.name)
    assert made.modules == ("model.layers.2.mlp.down_proj",) and made.model == "huggyllama/llama-7b"
    if tool.language == "python":
        compile(made.text, tool.name, "exec")
    elif tool.language == "json":
        assert json.loads(made.text)["ignore"] == list(made.patterns)
    else:
        assert shlex.split(made.text.replace("\\\n", " "))
    assert all(pattern in made.text for pattern in made.patterns)
    assert list(made.to_json()) == ["tool", "model", "modules", "patterns", "text", "notes"]


@pytest.mark.parametrize("tool", NAMES)
def test_every_known_model_has_a_recipe(tool):
    for model in list_all_models():
        if any(c.status != "refuted" for c in model.coordinates):
            made = swsurgery.recipe(model.hf_id, tool)
            layers = {c.layer for c in model.coordinates if c.status != "refuted"}
            assert {int(re.search(r"\.(\d+)\.", name)[1]) for name in made.modules} == layers


def test_gpt_neox_has_another_head():
    subject = Subject("org/pythia", ("embed_out",), False, (KeptModule("gpt_neox.layers.1.mlp.dense_4h_to_h"),))
    assert RENDER["transformers"](subject).patterns == ("embed_out", "gpt_neox.layers.1.mlp.dense_4h_to_h")
    assert RENDER["llama.cpp"](subject).patterns == (r"^blk\.1\.ffn_down\.weight$",)


# Checkpoints --------------------------------------------------------------------------------------------------------


@pytest.fixture
def patched(tmp_path) -> Path:
    base = write_llama(tmp_path / "base", {"model.layers.0.self_attn.q_proj.weight": tensor("F32", 6, 6)})
    edits = (
        {"op": "zero", "layer": 1, "row": 2, "col": 3},
        {"op": "protect", "layer": 2, "row": 2, "col": 3},
        {"op": "protect", "tensor": "model.layers.0.self_attn.q_proj.weight", "index": [0, 0]},
    )
    swsurgery.apply(write_manifest(tmp_path / "m.json", base, *edits), output=tmp_path / "patched", check="off")
    return tmp_path / "patched"


def test_a_record_names_edited_and_protected_modules(patched, capsys):
    before = tree(patched)
    made = swsurgery.recipe(patched, "transformers")
    modules = ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj")
    assert set(made.modules) == set(modules) and made.patterns[0] == "lm_head"
    assert main(["recipe", str(patched), "--for", "llama.cpp", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["tool"] == "llama.cpp" and set(printed["modules"]) == set(modules)
    assert r"^blk\.0\.attn_q\.weight$" in printed["patterns"]
    assert f"'^blk\\.1\\.ffn_down\\.weight$={kind(patched)}'" in printed["text"]
    assert tree(patched) == before


def kind(folder: Path) -> str:
    dtype = swsurgery.inspect(folder, down(1)).to_json()["dtype"]
    return {"F16": "f16", "BF16": "bf16"}.get(dtype, "f32")


def test_known_modules_of_a_checkpoint_are_added(tmp_path, capsys):
    base = write_llama(tmp_path / "base")
    assert main(["recipe", str(base), "--for", "torchao"]) == 2
    assert "no module with a super weight was found" in capsys.readouterr().err
    assert main(["recipe", str(base), "--for", "torchao", "--model", "llama-7b"]) == 0
    assert r"model\.layers\.2\.mlp\.down_proj" in capsys.readouterr().out
    assert main(["recipe", str(base), "--for", "torchao", "--model", "llama-13b", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["modules"] == ["model.layers.2.mlp.down_proj"] or printed["notes"], (
        "layers that are missing are named"
    )


def test_one_expert_of_a_stored_mixtral(tmp_path):
    experts = {
        f"model.layers.1.block_sparse_moe.experts.{e}.{w}.weight": tensor("BF16", *shape)
        for e in range(2)
        for w, shape in (("w1", (10, 6)), ("w2", (6, 10)), ("w3", (10, 6)))
    }
    config = CONFIG | {"model_type": "mixtral", "num_local_experts": 2, "num_hidden_layers": 2}
    base = write_single(tmp_path / "base", {**experts, "lm_head.weight": tensor("BF16", 12, 6)}, config)
    edit = {"op": "protect", "layer": 1, "expert": 1, "row": 2, "col": 3}
    zero = {"op": "zero", "layer": 1, "expert": 0, "row": 2, "col": 3}
    swsurgery.apply(write_manifest(tmp_path / "m.json", base, edit, zero), output=tmp_path / "patched", check="off")
    made = swsurgery.recipe(tmp_path / "patched", "compressed-tensors")
    names = {f"model.layers.1.block_sparse_moe.experts.{e}.w2" for e in range(2)}
    assert set(made.modules) == names
    split = {f"model.layers.1.mlp.experts.{e}.down_proj" for e in range(2)}
    assert set(made.patterns) == names | split | {"lm_head", r"re:.*\.(gate|router|shared_expert_gate)$"}


def test_lookup_prints_the_modules_of_known_super_weights(capsys):
    assert main(["lookup", "llama-7b", "--as", "modules"]) == 0
    assert capsys.readouterr().out == "model.layers.2.mlp.down_proj\n"
    assert main(["lookup", "llama-7b", "--as", "modules", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "model": "huggyllama/llama-7b",
        "modules": ["model.layers.2.mlp.down_proj"],
        "schema": "swsurgery/lookup/1",
    }
    assert main(["lookup", "google/gemma-3-12b-it", "--as", "modules"]) == 0
    assert capsys.readouterr().out == ""
    for words in (["--as", "modules", "--manifest", "zero"], ["--as", "modules", "--forget"]):
        assert main(["lookup", "llama-7b", *words]) == 2
        assert "--as cannot be combined with" in capsys.readouterr().err


def test_lookup_does_not_print_the_modules_of_a_checkpoint(patched, capsys):
    assert main(["lookup", str(patched), "--as", "modules"]) == 2
    assert "swsurgery recipe" in capsys.readouterr().err


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("no-such-model --for torchao", "no such known model: no-such-model"),
        ("llama-7b --for torchao --model llama-7b", "--model is only for a checkpoint"),
        ("google/gemma-3-12b-it --for torchao", "no super weight of this model is known"),
    ],
)
def test_what_is_refused_is_one_line(words, said, capsys):
    assert main(["recipe", *words.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"swsurgery: {said}") and captured.err.count("\n") == 1


def test_a_tool_that_does_not_exist_is_refused(capsys):
    assert main(["recipe", "llama-7b", "--for", "magic"]) == 2
    with pytest.raises(TypeError, match="tool must be one of 'llm-compressor', "):
        swsurgery.recipe("llama-7b", "magic")


def test_a_name_that_could_leave_its_quotes_is_refused(tmp_path):
    name = 'model.layers.0."]; import os #.weight'
    base = write_llama(tmp_path / "base", {name: tensor("F32", 6, 6)})
    manifest = write_manifest(tmp_path / "m.json", base, {"op": "zero", "tensor": name, "index": [0, 0]})
    swsurgery.apply(manifest, output=tmp_path / "patched", check="off")
    with pytest.raises(PlanError, match="a recipe cannot contain this name"):
        swsurgery.recipe(tmp_path / "patched", "transformers")


def test_a_module_without_a_gguf_name_is_refused():
    subject = Subject("org/model", ("lm_head",), False, (KeptModule("model.layers.0.odd"),))
    with pytest.raises(PlanError, match="the name of this module in GGUF is not known: model.layers.0.odd"):
        llama_cpp.render(subject)
