"""List how each family of models stores its down projections: the table `FAMILIES`.

To support another family, add a row. projections.py uses the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

ExpertChoice: TypeAlias = int | Literal["shared"] | None
"""The expert that contains a down projection: None in a dense layer, the number of a routed expert such as 7, or
"shared" for the expert that processes every token."""

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""A mapping from the name of every stored tensor to its stored shape."""

ProjectionKind: TypeAlias = Literal["dense", "routed", "shared"]
Axes: TypeAlias = Literal["row col", "col row", "expert row col", "expert col row"]


@dataclass(frozen=True)
class Layout:
    """One way to store a down projection.

    `name` is the name of the tensor without its prefix, such as "layers.{layer}.mlp.down_proj.weight" without "model.".
    `axes` names the axes of the tensor in order. `stored_only` is True if transformers transposes the tensor while
    loading it, so that only files have this layout and no loaded model does.
    """

    kind: ProjectionKind
    name: str
    axes: Axes
    stored_only: bool = False


@dataclass(frozen=True)
class Family:
    """Model types (as in config.json) that store their down projections in the same way.

    `trunks` are the prefixes of tensor names in a text-only model: one if the model has a language-modelling head
    ("model."), one if it has none (""). A mixture of experts has several layouts: one for each kind of layer, and one
    for each way to store the experts.
    """

    name: str
    model_types: tuple[str, ...]
    trunks: tuple[str, ...]
    layouts: tuple[Layout, ...]

    @property
    def prefixes(self) -> tuple[str, ...]:
        """All prefixes that may precede a layout's name in the full name of a tensor."""
        return list_prefixes(self.trunks)


WRAPPERS = ("language_model.", "model.language_model.", "text_model.", "model.text_model.")
"""Prefixes of the language model in vision-language models. Each may precede or replace the trunk of any family.
Example: LLaVA stores "language_model.model.layers.", and transformers loads it as "model.language_model.layers."."""


@cache
def list_prefixes(trunks: tuple[str, ...]) -> tuple[str, ...]:
    """Return all prefixes of tensor names: each trunk alone, each wrapper with each trunk, and each wrapper alone."""
    inner = (*trunks, "")
    return tuple(dict.fromkeys((*trunks, *(wrapper + trunk for wrapper in WRAPPERS for trunk in inner))))


_MODEL = ("model.", "")
_TRANSFORMER = ("transformer.", "")
_DENSE = Layout("dense", "layers.{layer}.mlp.down_proj.weight", "row col")
_EXPERTS = Layout("routed", "layers.{layer}.mlp.experts.{expert}.down_proj.weight", "row col")
# transformers >= 5 stacks the experts while loading, and saves the stacked form if save_original_format=False.
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
    # GPT-2's Conv1D stores [in, out]. The families below with the same tensor name use Linear, which stores [out, in].
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
    # The published files have [expert, col, row]; transformers >= 5 saves [expert, row, col] under the same name.
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
