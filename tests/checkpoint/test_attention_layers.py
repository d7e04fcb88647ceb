"""The layers with full attention are known for every hybrid of the installed transformers, and for nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import hybrids
import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from swsurgery.checkpoint.attention_layers import (
    FULL_ATTENTION,
    LOCAL_ATTENTION,
    NO_MIXERS,
    OTHER_MIXERS,
    explain_unknown_layers,
    find_attention_layers,
)

NO_HYBRIDS = {
    *("mamba", "mamba2", "falcon_mamba"),  # no attention at all
    *("zaya", "inkling_text", "inkling2_text"),  # attention with a short convolution in every layer
}
UNBUILT = {"glm5_next_text", "qwen4_exp_text", "lfm3_vl_vision"}
"""Types that are no plain language models, or run with several residual streams. hybrids.py builds the others."""

_HYBRID = re.compile(r"linear_attention|mamba|recurrent|\"conv\"|\"hybrid\"|attn_type_list")


def list_kinds(config):
    """List transformers' own name for the kind of each layer; none if it has no such names."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    return list(kinds) if len(kinds) == getattr(config, "num_hidden_layers", None) else []


def list_hybrids():
    """List the model types with a layer that is named after something else than attention, with their configs."""
    models = Path(transformers.__file__).parent / "models"
    sources = (path.read_text() for path in models.glob("*/configuration_*.py"))
    classes = {name for text in sources if _HYBRID.search(text) for name in re.findall(r"^class (\w+)", text, re.M)}
    found = {}
    for name, class_name in CONFIG_MAPPING_NAMES.items():
        if class_name in classes:
            config = CONFIG_MAPPING[name]()
            if {"linear_attention", "conv", "hybrid", "mamba", "recurrent"} & set(list_kinds(config)):
                found[name] = config
    return found


@pytest.fixture(scope="module")
def found():
    return list_hybrids()


def test_every_hybrid_of_transformers_is_known(found):
    usual = {"lfm2", "lfm2_moe"}  # hybrids whose default settings have attention in every layer
    assert set(found) | usual == {*hybrids.FAMILIES, *NO_HYBRIDS, *UNBUILT}


def test_the_layers_are_those_of_transformers_own_names(found):
    for name, config in found.items():
        kinds = list_kinds(config)
        config_json = json.loads(config.to_json_string())
        wanted = [layer for layer, kind in enumerate(kinds) if kind in FULL_ATTENTION]
        if name == "recurrent_gemma":  # its attention is local
            wanted = [layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"]
        if name in NO_HYBRIDS:
            wanted = []
        assert list(find_attention_layers(config_json, len(kinds))) == wanted, name
        assert explain_unknown_layers(config_json, {}, len(kinds)) is None, name


def test_every_kind_of_layer_that_transformers_allows_is_known():
    allowed = set(transformers.configuration_utils.ALLOWED_LAYER_TYPES)
    assert allowed <= FULL_ATTENTION | LOCAL_ATTENTION | OTHER_MIXERS | NO_MIXERS
    kinds = (FULL_ATTENTION, LOCAL_ATTENTION, OTHER_MIXERS, NO_MIXERS)
    assert len(frozenset().union(*kinds)) == sum(map(len, kinds))  # no name stands for two kinds


def stored(modules):
    return {f"model.layers.{layer}.{name}.x.weight": (4, 4) for layer, names in enumerate(modules) for name in names}


HYBRID = stored([("mamba", "mlp"), ("mamba", "mlp"), ("self_attn", "mlp"), ("mamba", "mlp")])
UNKNOWN = "names a kind of layer that is not known, %s"


@pytest.mark.parametrize(
    ("config", "shapes", "reason"),
    [
        ({"layer_types": ["full_attention", "warp\n"] * 2}, {}, "names a kind of layer that is not known, 'warp\\n'"),
        (
            {"text_config": {"layer_types": ["warp", "mamba"] * 2}},
            {},
            "names a kind of layer that is not known, 'warp'",
        ),
        ({}, HYBRID, "does not state which layers have full attention"),
        ({"attn_layer_indices": [9]}, HYBRID, "does not state which layers have full attention"),
        ({"attn_layer_indices": [2]}, HYBRID, None),
        ({"model_type": "falcon_h1"}, stored([("self_attn", "mamba", "feed_forward")] * 4), None),
        ({}, stored([("self_attn", "mamba", "feed_forward")] * 4), None),
        ({}, stored([("self_attn", "mlp")] * 4), None),
        ({}, stored([("mamba",)] * 4), None),
        ({}, {"a.layers.0.conv.weight": (1,), "b.layers.0.self_attn.weight": (1,)}, None),  # not one stack of layers
        ({"layer_types": ["sliding_attention", "full_attention"] * 2}, {}, None),
        ({"layer_types": ["warp"] * 4}, {}, None),  # all layers are of one kind
    ],
)
def test_one_sentence_says_why_the_layers_are_unknown(config, shapes, reason):
    found = explain_unknown_layers(config, shapes, 4)
    if reason is None:
        assert found is None
    else:
        end = "activations that recur before layers with full attention are not looked for"
        assert found == f"config.json {reason}: {end}"


def test_local_attention_counts_if_there_is_no_full_attention():
    config = {"layer_types": ["conv", "sliding_attention", "conv", "full_attention"]}
    assert find_attention_layers(config, 4) == (3,)
    config = {"layer_types": ["conv", "sliding_attention", "conv", "conv"]}
    assert find_attention_layers(config, 4) == (1,)
