"""Tiny random models of every supported family, as transformers builds and saves them. No test lives here.

Sizes: 16 residual channels, 24 neurons (12 per expert, 20 in a shared expert) and 2 layers, unless a family fixes
another ratio; all different, so that an index in the wrong order does not fit. All experts are always routed to.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

transformers.utils.logging.disable_progress_bar()

TOKENS = torch.tensor([[1, 5, 9, 13, 6, 3]])

_TEXT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TEXT_8 = _TEXT | {"head_dim": 8}  # the families whose default head would be far larger than the model
_GPT = {"vocab_size": 32, "n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 2, "n_positions": 32}
_GPT |= {"bos_token_id": 1, "eos_token_id": 2}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 4}
_MOE = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 12}
_DEEPSEEK = _TEXT | {
    "n_routed_experts": 4,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
_LLAMA_4 = _TEXT_8 | {
    "num_local_experts": 4,
    "num_experts_per_tok": 4,
    "intermediate_size_mlp": 20,
    "interleave_moe_layer_step": 2,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_heads": 2,
    "out_hidden_size": 16,
    "patch_size": 4,
}
_QWEN_TOKENS = {"image_token_id": 31, "video_token_id": 30, "vision_start_token_id": 29, "vision_end_token_id": 28}
_QWEN_3_VISION = _QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
_M_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
_IMAGE = {"image_token_index": 31, "boi_token_index": 29, "eoi_token_index": 30}

_MAMBA = {"mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 2}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_DELTA = _LINEAR | {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 2,
}
_MAMBA_2 = {
    "mamba_n_heads": 2,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_d_conv": 2,
    "mamba_expand": 2,
    "mamba_chunk_size": 4,
}
_OTHER_KEYS = ("num_hidden_layers", "intermediate_size", "num_experts_per_tok")
_LONGCAT = {key: value for key, value in _DEEPSEEK.items() if key not in _OTHER_KEYS}
_OMNI = {
    "text_config": _TEXT | _M_ROPE,
    "vision_config": _QWEN_VISION | {"fullatt_block_indexes": [1]},
    "audio_config": {
        "d_model": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 20,
        "num_mel_bins": 8,
        "output_dim": 16,
    },
}

TEXT_MODELS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "smollm3", "granite", "stablelm", "phi3", "cohere", "cohere2"), _TEXT),
    **dict.fromkeys(("olmo", "olmo2", "olmo3", "qwen2", "phi", "starcoder2", "gpt_neox"), _TEXT),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "qwen3", "glm", "glm4", "hunyuan_v1_dense"), _TEXT_8),
    "nemotron": _TEXT,
    "falcon": {
        "vocab_size": 32,
        "hidden_size": 16,
        "ffn_hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    "bloom": {"vocab_size": 32, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gptj": _GPT | {"rotary_dim": 4},
    "gpt_neo": {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global"], 2]],
        "max_position_embeddings": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "opt": {
        "vocab_size": 32,
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    },
    "mpt": {"vocab_size": 32, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 32},
    "mixtral": _TEXT | _LOCAL,
    "phimoe": _TEXT | {"num_local_experts": 2, "num_experts_per_tok": 2},
    "qwen2_moe": _TEXT | _MOE | {"shared_expert_intermediate_size": 20, "mlp_only_layers": [0]},
    "qwen3_moe": _TEXT_8 | _MOE | {"mlp_only_layers": [0]},
    "olmoe": _TEXT | {"num_experts": 4, "num_experts_per_tok": 4},
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "gpt_oss": _TEXT_8
    | _LOCAL
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "layer_types": ["full_attention"] * 2},
    "llama4_text": _LLAMA_4,
    "granitemoe": _TEXT | _LOCAL,
    "granitemoeshared": _TEXT | _LOCAL | {"shared_intermediate_size": 20},
    "nemotron_h": _TEXT_8
    | {
        "layers_block_type": ["mamba", "moe", "attention", "mlp"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 12,
        "moe_shared_expert_intermediate_size": 20,
        "ssm_state_size": 4,
        "mamba_num_heads": 2,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "chunk_size": 4,
        "conv_kernel": 2,
    },
    "lfm2": _TEXT | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": _TEXT | _MOE | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "jamba": _TEXT
    | _MAMBA
    | {
        "num_local_experts": 4,
        "num_experts_per_tok": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_dt_rank": 2,
        "use_cache": False,
    },
    "deepseek_v4": _DEEPSEEK
    | {
        "intermediate_size": 12,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "hc_mult": 2,
        "o_groups": 2,
        "o_lora_rank": 4,
        "index_n_heads": 2,
        "index_head_dim": 4,
        "index_topk": 4,
        "sliding_window": 8,
        "mlp_layer_types": ["moe", "moe"],
    },
    "kimi_linear": _DEEPSEEK
    | {
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "num_local_experts": 4,
        "linear_head_dim": 8,
        "linear_num_heads": 2,
        "linear_conv_kernel_dim": 2,
        "q_lora_rank": None,
    },
    "hunyuan_v1_moe": _TEXT_8 | {"num_experts": 4, "moe_topk": 4},
    "longcat_flash": _LONGCAT
    | {
        "num_layers": 2,
        "ffn_hidden_size": 24,
        "expert_ffn_hidden_size": 12,
        "moe_topk": 6,
        "zero_expert_num": 2,
        "head_dim": 4,
    },
    "qwen3_5_text": _TEXT_8 | _DELTA,
    "olmo_hybrid": _TEXT | _DELTA,
    "qwen3_next": _TEXT_8 | _DELTA | _MOE | {"shared_expert_intermediate_size": 20, "mlp_only_layers": [0]},
    "qwen3_5_moe_text": _TEXT_8 | _DELTA | _MOE | {"shared_expert_intermediate_size": 20},
    "minimax": _TEXT_8 | _LOCAL | _LINEAR | {"block_size": 4},
    "bailing_hybrid": _DEEPSEEK | _LINEAR | {"num_experts": 4, "short_conv_kernel_size": 2, "q_lora_rank": None},
    "granitemoehybrid": _TEXT
    | _LOCAL
    | _MAMBA_2
    | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 20},
    "lfm3": _TEXT | {"layer_types": ["conv", "full_attention"]},
    "bamba": _TEXT | _MAMBA_2 | {"attn_layer_indices": [1]},
    "falcon_h1": _TEXT | _MAMBA_2 | {"mamba_d_ssm": 32, "mlp_multipliers": [0.9, 0.5]},
    "zamba": _TEXT
    | _MAMBA
    | {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"], "n_mamba_heads": 2},
    "zamba2": _TEXT
    | _MAMBA
    | {
        "layers_block_type": ["hybrid", "hybrid"],
        "n_mamba_heads": 2,
        "num_mem_blocks": 2,
        "adapter_rank": 2,
        "chunk_size": 4,
    },
    "recurrent_gemma": _TEXT
    | {
        "intermediate_size": 48,  # of the gate and the up projection together
        "block_types": ["recurrent", "attention"],
        "lru_width": 16,
        "conv1d_width": 2,
        "attention_window_size": 8,
    },
    "modernbert-decoder": _TEXT | {"cls_token_id": 1, "sep_token_id": 2},
    "phi4_multimodal": _TEXT
    | {
        "vision_config": _VISION,
        "audio_config": {"hidden_size": 16, "intermediate_size": 20, "num_blocks": 1, "num_attention_heads": 2},
    },
}

VISION_LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _VISION | {"model_type": "clip_vision_model"},
        "image_token_index": 31,
    },
    "gemma3": {
        "text_config": _TEXT_8,
        "vision_config": _VISION | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        **_IMAGE,
    },
    "mistral3": {
        "text_config": _TEXT | {"model_type": "mistral"},
        "vision_config": _VISION | {"model_type": "pixtral"},
        "image_token_index": 31,
    },
    "aya_vision": {
        "text_config": _TEXT | {"model_type": "cohere2"},
        "vision_config": _VISION | {"model_type": "siglip_vision_model"},
        "image_token_index": 31,
    },
    "smolvlm": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _VISION | {"model_type": "smolvlm_vision"},
        "image_token_id": 31,
        "scale_factor": 2,
    },
    "qwen2_vl": {
        "text_config": _TEXT | _M_ROPE,
        "vision_config": {
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 16,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
        },
        **_QWEN_TOKENS,
    },
    "qwen2_5_vl": {
        "text_config": _TEXT | _M_ROPE,
        "vision_config": _QWEN_VISION | {"fullatt_block_indexes": [1]},
        **_QWEN_TOKENS,
    },
    "qwen3_vl": {"text_config": _TEXT_8 | _M_ROPE, "vision_config": _QWEN_3_VISION, **_QWEN_TOKENS},
    "qwen3_vl_moe": {
        "text_config": _TEXT_8 | _MOE | _M_ROPE | {"mlp_only_layers": [0]},
        "vision_config": _QWEN_3_VISION,
        **_QWEN_TOKENS,
    },
    "llama4": {
        "text_config": _LLAMA_4,
        "vision_config": _VISION
        | {
            "pixel_shuffle_ratio": 0.5,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
            "vision_output_dim": 16,
        },
        **_IMAGE,
    },
    "step3p7": {
        "text_config": _TEXT_8
        | {
            "mlp_layer_types": ["dense", "sparse"],
            "layer_types": ["full_attention", "full_attention"],
            "sliding_window": 8,
            "num_local_experts": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 12,
            "share_expert_dim": 20,
        },
        "vision_config": _VISION,
        "image_token_id": 31,
    },
    "qwen2_5_omni_thinker": _OMNI,
}

ENCODERS: dict[str, dict[str, Any]] = {
    "modernbert": _TEXT | {"cls_token_id": 1, "sep_token_id": 2, "reference_compile": False}
}

OTHER_MODELS: dict[str, dict[str, Any]] = {"exaone4": _TEXT_8}
"""Model types that no family of the product names; their tensors have the names of known ones."""

MODELS = TEXT_MODELS | VISION_LANGUAGE_MODELS | ENCODERS


def get_loader(name: str) -> Any:
    """The automatic class that builds models of a type with their head."""
    if name in ENCODERS:
        return transformers.AutoModelForMaskedLM
    vision = name in VISION_LANGUAGE_MODELS
    return transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM


def build(name: str, *, base: bool = False, seed: int = 0) -> transformers.PreTrainedModel:
    """One random float32 model, the same for the same seed; `base` leaves the language-modelling head away."""
    config = transformers.AutoConfig.for_model(name, **(MODELS | OTHER_MODELS)[name])
    loader = transformers.AutoModel if base else get_loader(name)
    torch.manual_seed(seed)
    model = loader.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # large enough that no activation is next to zero
                parameter.normal_(0.0, 0.3)
    return model.eval()


def write(name: str, folder: Path, *, base: bool = False, **save: Any) -> None:
    """Build one model and save it as config.json and model.safetensors."""
    build(name, base=base).save_pretrained(folder, **save)


def write_with_biases(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """Like `write`, with random biases. New models have zeros there, which would hide a forgotten bias."""
    write(name, folder)
    tensors = load_file(folder / "model.safetensors")
    numbers = torch.Generator().manual_seed(0)
    for tensor in sorted(tensors):
        if tensor.endswith(".bias"):
            tensors[tensor] = torch.randn(tensors[tensor].shape, generator=numbers)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def read(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """config.json, and every stored tensor's name and shape, by the safetensors library."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return json.loads((folder / "config.json").read_text()), shapes


def load(name: str, folder: Path) -> transformers.PreTrainedModel:
    """The saved model with its head, in a form whose experts multiply one after another by plain matrix products.

    A head that the file does not hold is random, but the same each time.
    """
    torch.manual_seed(0)
    return get_loader(name).from_pretrained(folder, experts_implementation="eager").eval()
