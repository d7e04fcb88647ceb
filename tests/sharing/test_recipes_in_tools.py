"""Recipes in the real tools: what each tool leaves unquantised in a Llama of 32 layers is what the recipe names."""

from __future__ import annotations

import importlib
import json
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import test_recipes
import torch
import transformers
from transformers.quantizers.base import HfQuantizer

import swsurgery
from swsurgery.sharing.recipes import llama_cpp
from swsurgery.sharing.recipes.modules import KeptModule, Subject
from swsurgery.sharing.recipes.tools import TOOLS, Tool

pytestmark = pytest.mark.filterwarnings("ignore")  # of the tools, at import and use
LAYER = 1
KEPT = f"model.layers.{LAYER}.mlp.down_proj"
SUBJECT = Subject("tiny", ("lm_head",), False, (KeptModule(KEPT, dtype="BF16"),))


def require(package: str) -> Any:
    """Import a package, or skip the test if it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(package)
        except ImportError as error:
            pytest.skip(f"{package} is not installed: {error}")


def build(device: str = "meta", **changes: Any) -> transformers.PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64}
    config = transformers.LlamaConfig(num_hidden_layers=32, num_key_value_heads=2, **sizes | changes)
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).eval()


def list_linear(model: torch.nn.Module, kind: type = torch.nn.Linear) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


def run(tool: str, **given: Any) -> dict[str, Any]:
    """Execute the script of a recipe without its last line, which loads a model."""
    text = test_recipes.RENDER[tool](SUBJECT).text
    names: dict[str, Any] = dict(given)
    exec(compile(text[: text.rstrip().rindex("\n")], tool, "exec"), names)
    return names


ALL = list_linear(build())
QUANTISED = ALL - {KEPT, "lm_head"}


def compare_llm_compressor() -> None:
    require("llmcompressor")
    matching = require("compressed_tensors.utils.match")
    modifier = run("llm-compressor")["recipe"]
    targets = [modifier.targets] if isinstance(modifier.targets, str) else modifier.targets
    found = {name for name, _ in matching.match_named_modules(build(), targets, modifier.ignore)}
    assert found == QUANTISED


def compare_compressed_tensors() -> None:
    quantization = require("compressed_tensors.quantization")
    document = json.loads(test_recipes.RENDER["compressed-tensors"](SUBJECT).text)
    model = build("cpu", hidden_size=128, intermediate_size=128)
    quantization.apply_quantization_config(model, quantization.QuantizationConfig.model_validate(document))
    assert {n for n, module in model.named_modules() if hasattr(module, "quantization_scheme")} == QUANTISED


def compare_transformers() -> None:
    from transformers.integrations.finegrained_fp8 import FP8Linear, replace_with_fp8_linear

    config = run("transformers")["config"]
    model = build()
    skipped = HfQuantizer.get_modules_to_not_convert(model, config.modules_to_not_convert)
    replace_with_fp8_linear(model, skipped, config)
    assert list_linear(model, FP8Linear) == QUANTISED
    for other in (transformers.AwqConfig, transformers.TorchAoConfig, transformers.QuantoConfig):
        assert "modules_to_not_convert" in other.__init__.__code__.co_varnames, "the comment in the text is true"


def compare_bitsandbytes() -> None:
    package = require("bitsandbytes")
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    config = run("bitsandbytes")["config"]
    model = build()
    skipped = HfQuantizer.get_modules_to_not_convert(model, config.llm_int8_skip_modules)
    replace_with_bnb_linear(model, skipped, config)
    assert list_linear(model, package.nn.Linear4bit) == QUANTISED


def compare_torchao() -> None:
    api = require("torchao.quantization.quant_api")
    text = test_recipes.RENDER["torchao"](SUBJECT).text.replace("AutoModelForCausalLM.from_pretrained(", "build(")
    names: dict[str, Any] = {"build": lambda *_, **__: build("cpu")}
    exec(compile(text, "torchao", "exec"), names)
    model = names["model"]
    changed = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "Int8" in repr(type(m.weight))}
    changed |= {n for n in list_linear(model) if type(model.get_submodule(n).weight.data) is not torch.Tensor}
    assert changed == QUANTISED
    config = api.FqnToConfig({f"re:{pattern}": None for pattern in names["KEPT"]})
    assert {n for n in ALL if api.fqn_matches_fqn_config(n, config)} == {KEPT, "lm_head"}


def compare_gptqmodel() -> None:
    config = require("gptqmodel.quantization.config")
    rules = dict.fromkeys(test_recipes.RENDER["gptqmodel"](SUBJECT).patterns, {})
    assert {name for name in ALL if config.dynamic_get(rules, name) is False} == {KEPT}


def compare_auto_round() -> None:
    require("auto_round")
    resolver = require("auto_round.compressors.layer_config_resolver")
    model, ignored = build(), run_auto_round()
    found, regexes, *_ = resolver._resolve_layer_config_presets({}, model, ignored, "W4A16", None, False)
    assert {name for name in found if name in ALL} == {KEPT}
    assert set(resolver.get_fp_layer_names(model, ignored.split(","))) == {KEPT}


def run_auto_round() -> str:
    """The text that the script gives to AutoRound as `ignore_layers`."""
    text = test_recipes.RENDER["auto-round"](SUBJECT).text
    body = re.sub(r"^from auto_round.*\n|^autoround\.quantize.*\n", "", text, flags=re.M)
    names: dict[str, Any] = {"AutoRound": lambda model, scheme, ignore_layers: ignore_layers}
    exec(compile(body, "auto-round", "exec"), names)
    return names["autoround"]


def compare_llama_cpp() -> None:
    gguf = require("gguf")
    architectures = (
        gguf.MODEL_ARCH.LLAMA,
        gguf.MODEL_ARCH.DEEPSEEK2,
        gguf.MODEL_ARCH.GRANITE_MOE,
        gguf.MODEL_ARCH.MODERN_BERT,
    )
    maps = [gguf.get_tensor_name_map(each, 32) for each in architectures]
    for part, name in llama_cpp.PARTS.items():
        stored = [f"{prefix}.11.{part}" for prefix in ("model.layers", "transformer.h", "gpt_neox.layers", "layers")]
        stored.append(f"transformer.blocks.11.{part}")
        found = {m.get_name(each) for m in maps for each in stored} - {None}
        wanted = f"blk.11.{name}"
        # In Granite, one tensor has this name for another matrix of the layer.
        assert found - ({"blk.11.ffn_up_shexp"} - {wanted}) == {wanted} or part in NOT_IN_GGUF, part
    names = [maps[0].get_name(module) + ".weight" for module in sorted(ALL)]
    [pattern] = test_recipes.RENDER["llama.cpp"](SUBJECT).patterns
    assert [name for name in names if re.search(pattern, name)] == [f"blk.{LAYER}.ffn_down.weight"]


NOT_IN_GGUF = {
    "block_sparse_moe.experts.down_proj",  # as transformers saves Granite-MoE; gguf knows the published name
}

COMPARE: dict[str, Callable[[], None]] = {
    "llm-compressor": compare_llm_compressor,
    "compressed-tensors": compare_compressed_tensors,
    "transformers": compare_transformers,
    "torchao": compare_torchao,
    "gptqmodel": compare_gptqmodel,
    "auto-round": compare_auto_round,
    "llama.cpp": compare_llama_cpp,
    "bitsandbytes": compare_bitsandbytes,
}


def test_every_tool_is_compared():
    assert list(COMPARE) == [tool.name for tool in TOOLS]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_the_tool_leaves_out_what_the_recipe_names(tool: Tool):
    COMPARE[tool.name]()


def test_the_names_of_the_other_tests_are_those_of_transformers():
    assert {name for name in test_recipes.LLAMA if "embed" not in name and "norm" not in name} == ALL
    config = transformers.MixtralConfig(
        num_hidden_layers=32, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=16, num_local_experts=12,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config)
    modules = {name for name, _ in model.named_modules()}
    assert set(test_recipes.MIXTRAL_STACKED) <= modules


@pytest.mark.parametrize("expert", [0, 11])
def test_fp8_in_transformers_keeps_the_experts_of_one_layer(expert):
    from transformers.integrations.finegrained_fp8 import FP8Experts, replace_with_fp8_linear

    module = KeptModule(f"model.layers.1.block_sparse_moe.experts.{expert}.w2", expert)
    patterns = test_recipes.RENDER["transformers"](Subject("m", ("lm_head",), True, (module,))).patterns
    config = transformers.MixtralConfig(
        num_hidden_layers=12, hidden_size=128, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=16, num_local_experts=12,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config)
    fp8 = transformers.FineGrainedFP8Config(modules_to_not_convert=list(patterns))
    replace_with_fp8_linear(model, list(patterns), fp8)
    stacks = {name for name in (f"model.layers.{n}.mlp.experts" for n in range(12))}
    assert list_linear(model, FP8Experts) == stacks - {"model.layers.1.mlp.experts"}


@pytest.fixture
def saved(tmp_path, monkeypatch) -> Iterator[None]:
    """A tiny Llama in the directory that the script of llama-7b loads."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    build("cpu", hidden_size=128, intermediate_size=128).to(torch.bfloat16).save_pretrained(tmp_path / "tiny")
    yield


def test_the_whole_script_of_llm_compressor_runs(saved):
    require("llmcompressor")
    text = test_recipes.RENDER["llm-compressor"](SUBJECT).text
    exec(compile(text, "llm-compressor", "exec"), {})
    stored = {name.removesuffix(".weight") for name in list_tensors("tiny-W4A16") if name.endswith(".weight")}
    assert stored & ALL == {KEPT, "lm_head"}


def list_tensors(folder: str) -> set[str]:
    return set(swsurgery.open_checkpoint(folder).weight_map)
