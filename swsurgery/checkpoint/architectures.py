"""List how each family of models stores its MLPs: the table `FAMILIES`.

To support another family, add a row. projections.py finds down projections with the table, and structures.py finds
neurons and experts.
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
Fusion: TypeAlias = Literal["apart", "halves", "alternating"]


@dataclass(frozen=True)
class InputLayout:
    """The input projections of an MLP: the matrices whose products are the activations of its neurons.

    `names` are the names of the modules, which replace the name of the down projection's module: ("gate_proj",
    "up_proj"), or one name if the MLP has no gate. `fusion` is "apart" if each matrix is a tensor. Otherwise one tensor
    has gate and up: "halves" stores all neurons of the gate before those of up, "alternating" stores gate and up of
    neuron 0, then of neuron 1, and so on. The axes are those of the down projection with row and col exchanged.
    """

    names: tuple[str, ...]
    fusion: Fusion = "apart"


@dataclass(frozen=True)
class Layout:
    """One way to store a down projection and the input projections of the same MLP.

    `name` is the name of the tensor without its prefix, such as "layers.{layer}.mlp.down_proj.weight" without "model.".
    `axes` names the axes of the tensor in order. `inputs` is None if nobody has compared the input projections with a
    running model; rows and columns are supported then, but not neurons and experts. `stored_only` is True if
    transformers transposes the tensors while loading them, so that only files have this layout and no loaded model
    does.
    """

    kind: ProjectionKind
    name: str
    axes: Axes
    inputs: InputLayout | None
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
_GATED = InputLayout(("gate_proj", "up_proj"))
_FUSED = InputLayout(("gate_up_proj",), "halves")
_FUSED_LINEAR = InputLayout(("input_linear",), "halves")
_C_FC = InputLayout(("c_fc",))
_FC1 = InputLayout(("fc1",))
_H_TO_4H = InputLayout(("dense_h_to_4h",))
_DENSE = Layout("dense", "layers.{layer}.mlp.down_proj.weight", "row col", _GATED)
_EXPERTS = Layout("routed", "layers.{layer}.mlp.experts.{expert}.down_proj.weight", "row col", _GATED)
# transformers >= 5 stacks the experts while loading, and saves the stacked form if save_original_format=False.
_STACKED = Layout("routed", "layers.{layer}.mlp.experts.down_proj", "expert row col", _FUSED)

FAMILIES: tuple[Family, ...] = (
    Family(
        "Llama",
        (
            *("llama", "mistral", "smollm3", "granite", "stablelm"),  # SmolLM2, DeepSeek-LLM, EuroLLM: llama
            *("cohere", "cohere2", "olmo", "olmo2", "olmo3", "gemma", "gemma2", "gemma3_text"),
            *("qwen2", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "qwen3", "qwen3_vl_text"),
        ),
        _MODEL,
        (_DENSE,),
    ),
    Family(
        "Phi-3 and GLM-4",
        ("phi3", "glm", "glm4"),
        _MODEL,
        (Layout("dense", "layers.{layer}.mlp.down_proj.weight", "row col", _FUSED),),
    ),
    Family("Phi-2", ("phi",), _MODEL, (Layout("dense", "layers.{layer}.mlp.fc2.weight", "row col", _FC1),)),
    Family(
        "StarCoder2", ("starcoder2",), _MODEL, (Layout("dense", "layers.{layer}.mlp.c_proj.weight", "row col", _C_FC),)
    ),
    Family(
        "Falcon and BLOOM",
        ("falcon", "bloom"),
        _TRANSFORMER,
        (Layout("dense", "h.{layer}.mlp.dense_4h_to_h.weight", "row col", _H_TO_4H),),
    ),
    Family(
        "GPT-NeoX",
        ("gpt_neox",),
        ("gpt_neox.", ""),
        (Layout("dense", "layers.{layer}.mlp.dense_4h_to_h.weight", "row col", _H_TO_4H),),
    ),
    # GPT-2's Conv1D stores [in, out]. The families below with the same tensor name use Linear, which stores [out, in].
    Family("GPT-2", ("gpt2",), _TRANSFORMER, (Layout("dense", "h.{layer}.mlp.c_proj.weight", "col row", _C_FC),)),
    Family(
        "GPT-Neo and GPT-BigCode",
        ("gpt_neo", "gpt_bigcode"),
        _TRANSFORMER,
        (Layout("dense", "h.{layer}.mlp.c_proj.weight", "row col", _C_FC),),
    ),
    Family(
        "GPT-J",
        ("gptj",),
        _TRANSFORMER,
        (Layout("dense", "h.{layer}.mlp.fc_out.weight", "row col", InputLayout(("fc_in",))),),
    ),
    Family(
        "OPT",
        ("opt",),
        ("model.decoder.", "decoder."),
        (Layout("dense", "layers.{layer}.fc2.weight", "row col", _FC1),),
    ),
    Family(
        "MPT",
        ("mpt",),
        _TRANSFORMER,
        (Layout("dense", "blocks.{layer}.ffn.down_proj.weight", "row col", InputLayout(("up_proj",))),),
    ),
    Family(
        "Mixtral",
        ("mixtral", "phimoe"),
        _MODEL,
        (
            Layout(
                "routed",
                "layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
                "row col",
                InputLayout(("w1", "w3")),
            ),
            _STACKED,
        ),
    ),
    Family(
        "Qwen-MoE",
        ("qwen2_moe", "qwen3_moe"),
        _MODEL,
        (
            _DENSE,
            _EXPERTS,
            _STACKED,
            Layout("shared", "layers.{layer}.mlp.shared_expert.down_proj.weight", "row col", _GATED),
        ),
    ),
    Family(
        "DeepSeek-V2 and V3",
        ("deepseek_v2", "deepseek_v3"),
        _MODEL,
        (
            _DENSE,
            _EXPERTS,
            _STACKED,
            Layout("shared", "layers.{layer}.mlp.shared_experts.down_proj.weight", "row col", _GATED),
        ),
    ),
    Family("OLMoE", ("olmoe",), _MODEL, (_EXPERTS, _STACKED)),
    Family(
        "gpt-oss",
        ("gpt_oss",),
        _MODEL,
        (
            Layout(
                "routed",
                "layers.{layer}.mlp.experts.down_proj",
                "expert col row",
                InputLayout(("gate_up_proj",), "alternating"),
            ),
        ),
    ),
    Family(
        "Llama 4",
        ("llama4", "llama4_text"),
        _MODEL,
        (
            Layout("dense", "layers.{layer}.feed_forward.down_proj.weight", "row col", _GATED),
            Layout("routed", "layers.{layer}.feed_forward.experts.down_proj", "expert col row", _FUSED),
            Layout("shared", "layers.{layer}.feed_forward.shared_expert.down_proj.weight", "row col", _GATED),
        ),
    ),
    Family(
        "Granite-MoE",
        ("granitemoe", "granitemoeshared"),
        _MODEL,
        (
            Layout("routed", "layers.{layer}.block_sparse_moe.output_linear.weight", "expert row col", _FUSED_LINEAR),
            Layout("routed", "layers.{layer}.block_sparse_moe.experts.down_proj", "expert row col", _FUSED),
            Layout("shared", "layers.{layer}.shared_mlp.output_linear.weight", "row col", _FUSED_LINEAR),
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
            Layout("routed", "layers.{layer}.mlp.experts.down_proj", "expert col row", _FUSED, stored_only=True),
        ),
    ),
)
