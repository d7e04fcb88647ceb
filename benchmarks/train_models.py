"""Describe the small models that benchmarks/train.py trains: family, sizes, seed, and whether they see a BOS token.

The sizes are chosen so that each model has 10 to 22 million parameters and at least eight layers: an activation can
then persist through several layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

BOS, EOS = 0, 1
"""Token ids of the two special tokens. EOS ends each document; BOS begins each one, and each training window."""

SHARED: dict[str, Any] = {
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": None,
    "attention_dropout": 0.0,
    "use_cache": True,
}
_WIDE: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
_NARROW: dict[str, Any] = {
    "hidden_size": 320,
    "intermediate_size": 896,
    "num_hidden_layers": 8,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
}
_TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Recipe:
    """One model to train.

    `options` are the arguments of the family's configuration class beside `SHARED` and the vocabulary. `bos` is False
    for a model that is trained without any BOS token. `rate` is the largest learning rate.
    """

    family: str
    seed: int
    options: dict[str, Any]
    bos: bool = True
    rate: float = 3e-3


RECIPES = {
    "llama-1": Recipe("llama", 1, _WIDE),
    "llama-2": Recipe("llama", 2, _WIDE),
    "llama-3-no-bos": Recipe("llama", 3, _WIDE, bos=False),
    "mixtral-1": Recipe(
        "mixtral",
        1,
        {
            "hidden_size": 256,
            "intermediate_size": 384,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "router_aux_loss_coef": 0.02,
        },
    ),
    "qwen3-1": Recipe("qwen3", 1, _NARROW | {"head_dim": 64, "tie_word_embeddings": True}),
    "gemma3-1": Recipe(
        "gemma3_text", 1, _NARROW | {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 256}
    ),
    "olmo2-1": Recipe("olmo2", 1, _NARROW),
    "gpt-neox-1": Recipe("gpt_neox", 1, _NARROW | {"intermediate_size": 1280}, rate=2e-3),
    "lfm2-1": Recipe(
        "lfm2",
        1,
        _NARROW
        | {
            "num_hidden_layers": 10,
            "block_auto_adjust_ff_dim": False,
            "layer_types": ["conv", "conv", "full_attention", "conv", "conv"] * 2,
        },
        rate=2e-3,
    ),
}


def make_config(recipe: Recipe, *, vocabulary: int, context: int, tiny: bool) -> transformers.PretrainedConfig:
    """Return the configuration of `recipe` for `vocabulary` token ids and windows of `context` tokens.

    With `tiny`, the model keeps its family but has 32 channels and four layers.
    """
    options = SHARED | recipe.options
    if tiny:
        options |= {key: value for key, value in _TINY.items() if key in options}
        options |= {"head_dim": 16} if "head_dim" in options else {}
        options |= {"layer_types": ["conv", "full_attention"] * 2} if "layer_types" in options else {}
    if recipe.family == "gpt_neox":
        options.pop("num_key_value_heads")
    return transformers.AutoConfig.for_model(
        recipe.family, vocab_size=vocabulary, max_position_embeddings=context, **options
    )


def build_model(
    recipe: Recipe, config: transformers.PretrainedConfig, device: str, *, grouped: bool
) -> transformers.PreTrainedModel:
    """Return a model of random weights on `device`, in bfloat16 on a GPU and float32 on a CPU.

    With `grouped`, the experts of a layer are computed by one grouped product. Otherwise they are computed one by one.
    """
    torch.manual_seed(recipe.seed)
    options: dict[str, Any] = {"attn_implementation": "sdpa"}
    if has_experts(config):
        options["experts_implementation"] = "grouped_mm" if grouped else "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
    if device != "cpu":
        cast_parameters(model, torch.bfloat16)
    return model.to(device).train()


def cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Convert the parameters of `model` to `dtype`, and leave its buffers as they are.

    `Module.to` converts buffers too. The frequencies of the rotary embedding are such a buffer, and a loaded model has
    them in float32.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def has_experts(config: transformers.PretrainedConfig) -> bool:
    """Return True if the layers of the model have experts."""
    return hasattr(config, "num_local_experts")


def list_layers(model: transformers.PreTrainedModel) -> list[torch.nn.Module]:
    """Return the decoder layers of `model` in order."""
    return list(model.base_model.layers)


def compile_layers(model: transformers.PreTrainedModel) -> None:
    """Compile each decoder layer in place. Layers of the same kind share the compiled code.

    In layers with experts only the attention and the norms are compiled: the sizes of the products in the rest depend
    on the data.
    """
    for layer in list_layers(model):
        parts = [layer]
        if has_experts(model.config):
            parts = [layer.self_attn, layer.input_layernorm, layer.post_attention_layernorm]
        for part in parts:
            part.compile(dynamic=False)
