"""How families of models store their down projections: one table, `FAMILIES`.

To support another family, add a row. What is done with the table is in projections.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

Expert: TypeAlias = int | Literal["shared"] | None
"""None for a dense layer, a number for a routed expert, "shared" for the one that sees every token."""

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Every stored tensor's name and stored shape."""

Kind: TypeAlias = Literal["dense", "routed", "shared"]
Axes: TypeAlias = Literal["row col", "col row", "expert row col", "expert col row"]


@dataclass(frozen=True)
class Layout:
    """One way to store a down projection: the tensor's name after the prefix, and what its axes mean.

    `stored_only`: transformers transposes it while loading, so a loaded model never has it this way.
    """

    kind: Kind
    name: str
    axes: Axes
    stored_only: bool = False


@dataclass(frozen=True)
class Family:
    """Model types (of config.json) that store their down projections alike.

    `trunks` are the prefixes of a text-only model's names, with the language-modelling head and without it.
    A mixture of experts has several layouts: one per kind of layer, and one per way to store the experts.
    """

    name: str
    model_types: tuple[str, ...]
    trunks: tuple[str, ...]
    layouts: tuple[Layout, ...]

    @property
    def prefixes(self) -> tuple[str, ...]:
        """All that may stand before a layout's name."""
        return prefixes_of(self.trunks)


# Where vision-language models put the language model. Every file of a family may carry any of them before its
# trunk, or instead of it: LLaVA's "language_model.model.layers." is "model.language_model.layers." once loaded.
WRAPPERS = ("language_model.", "model.language_model.", "text_model.", "model.text_model.")


@cache
def prefixes_of(trunks: tuple[str, ...]) -> tuple[str, ...]:
    """The trunks, and each of them behind or instead of a wrapper."""
    inner = (*trunks, "")
    return tuple(dict.fromkeys((*trunks, *(wrapper + trunk for wrapper in WRAPPERS for trunk in inner))))


_MODEL = ("model.", "")
_TRANSFORMER = ("transformer.", "")
_DENSE = Layout("dense", "layers.{layer}.mlp.down_proj.weight", "row col")
_EXPERTS = Layout("routed", "layers.{layer}.mlp.experts.{expert}.down_proj.weight", "row col")
# transformers >= 5 stacks the experts while loading, and saves them so with save_original_format=False.
_STACKED = Layout("routed", "layers.{layer}.mlp.experts.down_proj", "expert row col")

FAMILIES: tuple[Family, ...] = (
    Family(
        "Llama",
        (
            *("llama", "mistral", "smollm3", "granite", "stablelm", "phi3"),  # SmolLM2, DeepSeek-LLM, EuroLLM: llama
            *("cohere", "cohere2", "olmo", "olmo2", "olmo3", "gemma", "gemma2", "gemma3_text"),
            *("qwen2", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "qwen3", "qwen3_vl_text"),
        ),
        _MODEL,
        (_DENSE,),
    ),
    Family("Phi-2", ("phi",), _MODEL, (Layout("dense", "layers.{layer}.mlp.fc2.weight", "row col"),)),
    Family("StarCoder2", ("starcoder2",), _MODEL, (Layout("dense", "layers.{layer}.mlp.c_proj.weight", "row col"),)),
    Family(
        "Falcon and BLOOM",
        ("falcon", "bloom"),
        _TRANSFORMER,
        (Layout("dense", "h.{layer}.mlp.dense_4h_to_h.weight", "row col"),),
    ),
    Family(
        "GPT-NeoX",
        ("gpt_neox",),
        ("gpt_neox.", ""),
        (Layout("dense", "layers.{layer}.mlp.dense_4h_to_h.weight", "row col"),),
    ),
    # GPT-2's Conv1D multiplies from the right, so it stores [in, out]; its relatives with the same name use Linear.
    Family("GPT-2", ("gpt2",), _TRANSFORMER, (Layout("dense", "h.{layer}.mlp.c_proj.weight", "col row"),)),
    Family(
        "GPT-Neo and GPT-BigCode",
        ("gpt_neo", "gpt_bigcode"),
        _TRANSFORMER,
        (Layout("dense", "h.{layer}.mlp.c_proj.weight", "row col"),),
    ),
    Family("GPT-J", ("gptj",), _TRANSFORMER, (Layout("dense", "h.{layer}.mlp.fc_out.weight", "row col"),)),
    Family(
        "OPT",
        ("opt",),
        ("model.decoder.", "decoder."),
        (Layout("dense", "layers.{layer}.fc2.weight", "row col"),),
    ),
    Family("MPT", ("mpt",), _TRANSFORMER, (Layout("dense", "blocks.{layer}.ffn.down_proj.weight", "row col"),)),
    Family(
        "Mixtral",
        ("mixtral", "phimoe"),
        _MODEL,
        (Layout("routed", "layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight", "row col"), _STACKED),
    ),
    Family(
        "Qwen-MoE",
        ("qwen2_moe", "qwen3_moe"),
        _MODEL,
        (_DENSE, _EXPERTS, _STACKED, Layout("shared", "layers.{layer}.mlp.shared_expert.down_proj.weight", "row col")),
    ),
    Family(
        "DeepSeek-V2 and V3",
        ("deepseek_v2", "deepseek_v3"),
        _MODEL,
        (_DENSE, _EXPERTS, _STACKED, Layout("shared", "layers.{layer}.mlp.shared_experts.down_proj.weight", "row col")),
    ),
    Family("OLMoE", ("olmoe",), _MODEL, (_EXPERTS, _STACKED)),
    Family(
        "gpt-oss",
        ("gpt_oss",),
        _MODEL,
        (Layout("routed", "layers.{layer}.mlp.experts.down_proj", "expert col row"),),
    ),
    Family(
        "Llama 4",
        ("llama4", "llama4_text"),
        _MODEL,
        (
            Layout("dense", "layers.{layer}.feed_forward.down_proj.weight", "row col"),
            Layout("routed", "layers.{layer}.feed_forward.experts.down_proj", "expert col row"),
            Layout("shared", "layers.{layer}.feed_forward.shared_expert.down_proj.weight", "row col"),
        ),
    ),
    Family(
        "Granite-MoE",
        ("granitemoe", "granitemoeshared"),
        _MODEL,
        (
            Layout("routed", "layers.{layer}.block_sparse_moe.output_linear.weight", "expert row col"),
            Layout("routed", "layers.{layer}.block_sparse_moe.experts.down_proj", "expert row col"),
            Layout("shared", "layers.{layer}.shared_mlp.output_linear.weight", "row col"),
        ),
    ),
    # Published with [expert, col, row]; saved again by transformers >= 5 with [expert, row, col], same name.
    Family(
        "Qwen3-VL-MoE",
        ("qwen3_vl_moe", "qwen3_vl_moe_text"),
        _MODEL,
        (
            _DENSE,
            _STACKED,
            Layout("routed", "layers.{layer}.mlp.experts.down_proj", "expert col row", stored_only=True),
        ),
    ),
)
