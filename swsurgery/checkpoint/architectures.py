"""List how each family of models stores its MLPs: the table `FAMILIES`.

To support another family, add a row. projections.py finds down projections with the table, and structures.py finds
neurons and experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

from swsurgery.checkpoint.family import Family, InputProjections, Template

ExpertChoice: TypeAlias = int | Literal["shared"] | None
"""The expert that contains a down projection: None in a dense layer, the number of a routed expert such as 7, or
"shared" for the expert that processes every token."""

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""A mapping from the name of every stored tensor to its stored shape."""


GGUF_TYPE = "gguf"
"""The model type that the config of a GGUF file has in this package, whatever its architecture is: llama.cpp gives the
tensors of all architectures the same names."""


_MODEL = ("model.", "")
_TRANSFORMER = ("transformer.", "")
_GATED = InputProjections(("gate_proj", "up_proj"))
_FUSED = InputProjections(("gate_up_proj",), "halves")
_FUSED_LINEAR = InputProjections(("input_linear",), "halves")
_C_FC = InputProjections(("c_fc",))
_FC1 = InputProjections(("fc1",))
_UP = InputProjections(("up_proj",))
_W1_W3 = InputProjections(("w1", "w3"))
_H_TO_4H = InputProjections(("dense_h_to_4h",))
_DENSE = Template("dense", "layers.{layer}.mlp.down_proj.weight", "row col", _GATED)
_EXPERTS = Template("routed", "layers.{layer}.mlp.experts.{expert}.down_proj.weight", "row col", _GATED)
# transformers >= 5 stacks the experts while loading, and saves the stacked form if save_original_format=False.
_STACKED = Template("routed", "layers.{layer}.mlp.experts.down_proj", "expert row col", _FUSED)
_SHARED = Template("shared", "layers.{layer}.mlp.shared_experts.down_proj.weight", "row col", _GATED)
_W2 = Template("dense", "layers.{layer}.feed_forward.w2.weight", "row col", _W1_W3)
_W2_EXPERTS = Template("routed", "layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight", "row col", _W1_W3)
_STACKED_FF = Template("routed", "layers.{layer}.feed_forward.experts.down_proj", "expert row col", _FUSED)

FAMILIES: tuple[Family, ...] = (
    Family(
        "Llama",
        (
            *("llama", "mistral", "smollm3", "granite", "stablelm"),  # SmolLM2, DeepSeek-LLM, EuroLLM: llama
            *("cohere", "cohere2", "olmo", "olmo2", "olmo3", "gemma", "gemma2", "gemma3_text"),
            *("qwen2", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "qwen3", "qwen3_vl_text"),
            *("qwen2_5_omni", "qwen2_5_omni_thinker", "qwen2_5_omni_text", "hunyuan_v1_dense"),
            *("qwen3_5_text", "olmo_hybrid"),
        ),
        _MODEL,
        (_DENSE,),
    ),
    Family(
        "Phi-3 and GLM-4",
        ("phi3", "phi4_multimodal", "glm", "glm4"),
        _MODEL,
        (Template("dense", "layers.{layer}.mlp.down_proj.weight", "row col", _FUSED),),
    ),
    Family("Phi-2", ("phi",), _MODEL, (Template("dense", "layers.{layer}.mlp.fc2.weight", "row col", _FC1),)),
    Family(
        "StarCoder2",
        ("starcoder2",),
        _MODEL,
        (Template("dense", "layers.{layer}.mlp.c_proj.weight", "row col", _C_FC),),
    ),
    Family(
        "Falcon and BLOOM",
        ("falcon", "bloom"),
        _TRANSFORMER,
        (Template("dense", "h.{layer}.mlp.dense_4h_to_h.weight", "row col", _H_TO_4H),),
    ),
    Family(
        "GPT-NeoX",
        ("gpt_neox",),
        ("gpt_neox.", ""),
        (Template("dense", "layers.{layer}.mlp.dense_4h_to_h.weight", "row col", _H_TO_4H),),
    ),
    # GPT-2's Conv1D stores [in, out]. The families below with the same tensor name use Linear, which stores [out, in].
    Family("GPT-2", ("gpt2",), _TRANSFORMER, (Template("dense", "h.{layer}.mlp.c_proj.weight", "col row", _C_FC),)),
    Family(
        "GPT-Neo and GPT-BigCode",
        ("gpt_neo", "gpt_bigcode"),
        _TRANSFORMER,
        (Template("dense", "h.{layer}.mlp.c_proj.weight", "row col", _C_FC),),
    ),
    Family(
        "GPT-J",
        ("gptj",),
        _TRANSFORMER,
        (Template("dense", "h.{layer}.mlp.fc_out.weight", "row col", InputProjections(("fc_in",))),),
    ),
    Family(
        "OPT",
        ("opt",),
        ("model.decoder.", "decoder."),
        (Template("dense", "layers.{layer}.fc2.weight", "row col", _FC1),),
    ),
    Family(
        "MPT",
        ("mpt",),
        _TRANSFORMER,
        (Template("dense", "blocks.{layer}.ffn.down_proj.weight", "row col", _UP),),
    ),
    Family(
        "Mixtral",
        ("mixtral", "phimoe", "minimax"),
        _MODEL,
        (
            _W2_EXPERTS,
            _STACKED,
        ),
    ),
    Family(
        "Qwen-MoE",
        ("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text"),
        _MODEL,
        (
            _DENSE,
            _EXPERTS,
            _STACKED,
            Template("shared", "layers.{layer}.mlp.shared_expert.down_proj.weight", "row col", _GATED),
        ),
    ),
    Family(
        "DeepSeek-V2 and V3",
        ("deepseek_v2", "deepseek_v3", "bailing_hybrid"),
        _MODEL,
        (
            _DENSE,
            _EXPERTS,
            _STACKED,
            _SHARED,
        ),
    ),
    Family("OLMoE", ("olmoe",), _MODEL, (_EXPERTS, _STACKED)),
    Family(
        "gpt-oss",
        ("gpt_oss",),
        _MODEL,
        (
            Template(
                "routed",
                "layers.{layer}.mlp.experts.down_proj",
                "expert col row",
                InputProjections(("gate_up_proj",), "alternating"),
            ),
        ),
    ),
    Family(
        "Llama 4",
        ("llama4", "llama4_text"),
        _MODEL,
        (
            Template("dense", "layers.{layer}.feed_forward.down_proj.weight", "row col", _GATED),
            Template("routed", "layers.{layer}.feed_forward.experts.down_proj", "expert col row", _FUSED),
            Template("shared", "layers.{layer}.feed_forward.shared_expert.down_proj.weight", "row col", _GATED),
        ),
    ),
    Family(
        "Granite-MoE",
        ("granitemoe", "granitemoeshared", "granitemoehybrid"),
        _MODEL,
        (
            Template("routed", "layers.{layer}.block_sparse_moe.output_linear.weight", "expert row col", _FUSED_LINEAR),
            Template("routed", "layers.{layer}.block_sparse_moe.experts.down_proj", "expert row col", _FUSED),
            Template("shared", "layers.{layer}.shared_mlp.output_linear.weight", "row col", _FUSED_LINEAR),
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
            Template("routed", "layers.{layer}.mlp.experts.down_proj", "expert col row", _FUSED, stored_only=True),
        ),
    ),
    # transformers 5.23, models/nemotron: the activation is relu2, and the MLP has no gate.
    Family(
        "Nemotron", ("nemotron",), _MODEL, (Template("dense", "layers.{layer}.mlp.down_proj.weight", "row col", _UP),)
    ),
    # The published files have "backbone.", which transformers renames. A layer has a mixer: an MLP, a mixture of
    # experts, attention or Mamba. The routed experts of Nemotron 3 may read and write a smaller latent space.
    Family(
        "Nemotron-H and Nemotron 3",
        ("nemotron_h",),
        (*_MODEL, "backbone."),
        (
            Template("dense", "layers.{layer}.mixer.down_proj.weight", "row col", _UP),
            Template(
                "routed",
                "layers.{layer}.mixer.experts.{expert}.down_proj.weight",
                "row col",
                _UP,
                rows_key="moe_latent_size",
            ),
            Template(
                "routed",
                "layers.{layer}.mixer.experts.down_proj",
                "expert row col",
                _UP,
                rows_key="moe_latent_size",
            ),
            Template("shared", "layers.{layer}.mixer.shared_experts.down_proj.weight", "row col", _UP),
        ),
    ),
    # InternLM2 has no class in transformers. Its modeling_internlm2.py computes w2(silu(w1(x)) * w3(x)).
    Family("LFM2 and InternLM2", ("lfm2", "lfm3", "internlm2"), _MODEL, (_W2,)),
    Family(
        "LFM2-MoE",
        ("lfm2_moe",),
        _MODEL,
        (
            _W2,
            Template("routed", "layers.{layer}.feed_forward.experts.{expert}.w2.weight", "row col", _W1_W3),
            _STACKED_FF,
        ),
    ),
    Family(
        "Jamba",
        ("jamba",),
        _MODEL,
        (
            Template("dense", "layers.{layer}.feed_forward.down_proj.weight", "row col", _GATED),
            Template("routed", "layers.{layer}.feed_forward.experts.{expert}.down_proj.weight", "row col", _GATED),
            _STACKED_FF,
        ),
    ),
    Family(
        "Bamba and Falcon-H1",
        ("bamba", "falcon_h1"),
        _MODEL,
        (Template("dense", "layers.{layer}.feed_forward.down_proj.weight", "row col", _GATED),),
    ),
    # The published files have no "model.". transformers saves one, and the names of the published files after it.
    Family(
        "DeepSeek-V4",
        ("deepseek_v4",),
        _MODEL,
        (
            Template("routed", "layers.{layer}.ffn.experts.{expert}.w2.weight", "row col", _W1_W3),
            _STACKED,
            Template("shared", "layers.{layer}.ffn.shared_experts.w2.weight", "row col", _W1_W3),
            _SHARED,
        ),
    ),
    # The published files name the dense layers "mlp"; transformers saves them as "block_sparse_moe" too.
    Family(
        "Kimi-Linear",
        ("kimi_linear",),
        _MODEL,
        (
            _DENSE,
            Template("dense", "layers.{layer}.block_sparse_moe.down_proj.weight", "row col", _GATED),
            _W2_EXPERTS,
            _STACKED,
            Template("shared", "layers.{layer}.block_sparse_moe.shared_experts.down_proj.weight", "row col", _GATED),
            _SHARED,
        ),
    ),
    Family(
        "HunYuan-MoE",
        ("hunyuan_v1_moe",),
        _MODEL,
        (
            _EXPERTS,
            _STACKED,
            Template("shared", "layers.{layer}.mlp.shared_mlp.down_proj.weight", "row col", _GATED),
        ),
    ),
    # transformers has a class for Step-3.5 and 3.7 only. Step-3 has the same names: vLLM,
    # vllm/model_executor/models/step3_text.py (Step3TextForCausalLM.load_weights).
    Family(
        "Step-3",
        ("step3_vl", "step3_text", "step3p5", "step3p7"),
        _MODEL,
        (
            _DENSE,
            Template("routed", "layers.{layer}.moe.down_proj.weight", "expert row col", _GATED),
            _STACKED,
            Template("shared", "layers.{layer}.share_expert.down_proj.weight", "row col", _GATED),
            _SHARED,
        ),
    ),
    # Each layer also has two dense MLPs, `mlps.0` and `mlps.1`. A layer number does not tell them apart, so they have
    # no short form.
    Family("LongCat-Flash", ("longcat_flash",), _MODEL, (_EXPERTS, _STACKED)),
    # No class in transformers; the names are those of vLLM, vllm/model_executor/models/arctic.py (load_weights). The
    # residual MLP processes every token beside the experts, like the shared expert of other families.
    Family(
        "Arctic",
        ("arctic",),
        _MODEL,
        (
            Template("dense", "layers.{layer}.block_sparse_moe.mlp.w2.weight", "row col", _W1_W3),
            _W2_EXPERTS,
            Template("shared", "layers.{layer}.residual_mlp.w2.weight", "row col", _W1_W3),
        ),
    ),
    # Several layers use one MLP, which is stored in the first of them. `linear` multiplies the output of the block.
    Family(
        "Zamba",
        ("zamba",),
        _MODEL,
        (
            Template(
                "dense",
                "layers.{layer}.shared_transf.feed_forward.down_proj.weight",
                "row col",
                _GATED,
                direct=False,
            ),
        ),
    ),
    Family(
        "Zamba 2",
        ("zamba2",),
        _MODEL,
        (
            Template(
                "dense",
                "layers.{layer}.shared_transformer.feed_forward.down_proj.weight",
                "row col",
                InputProjections(("gate_up_proj",), "halves", "gate_up_proj_adapter_list"),
                direct=False,
            ),
        ),
    ),
    Family(
        "RecurrentGemma",
        ("recurrent_gemma",),
        _MODEL,
        (Template("dense", "layers.{layer}.mlp_block.down_proj.weight", "row col", _GATED),),
    ),
    # transformers 5.23, models/modernbert: the activation is applied to the first half of Wi, so that half is the gate.
    Family(
        "ModernBERT",
        ("modernbert", "modernbert-decoder"),
        _MODEL,
        (Template("dense", "layers.{layer}.mlp.Wo.weight", "row col", InputProjections(("Wi",), "halves")),),
    ),
    # The files of Phi-4-multimodal before transformers had a class: each matrix has the adapters of two modalities.
    Family(
        "Phi-4-multimodal with adapters",
        ("phi4mm",),
        _MODEL,
        (Template("dense", "layers.{layer}.mlp.down_proj.base_layer.weight", "row col", _FUSED),),
    ),
    # No class in transformers. ChatGLM2, ChatGLM3 and GLM-4-9B have a gate: vLLM,
    # vllm/model_executor/models/chatglm.py (GLMMLP). The first ChatGLM-6B has other prefixes and no gate.
    Family(
        "ChatGLM",
        ("chatglm",),
        ("transformer.encoder.", "encoder."),
        (
            Template(
                "dense",
                "layers.{layer}.mlp.dense_4h_to_h.weight",
                "row col",
                InputProjections(("dense_h_to_4h",), "halves"),
            ),
        ),
    ),
    # The names that llama.cpp gives to the tensors of every family: gguf-py/gguf/constants.py (TENSOR_NAMES). Its
    # converters store each down projection as [row, col], and permute only the query and key projections.
    Family(
        "GGUF",
        (GGUF_TYPE,),
        ("",),
        (
            Template("dense", "blk.{layer}.ffn_down.weight", "row col", None),
            Template("routed", "blk.{layer}.ffn_down_exps.weight", "expert row col", None),
            Template("routed", "blk.{layer}.ffn_down.{expert}.weight", "row col", None),
            Template("shared", "blk.{layer}.ffn_down_shexp.weight", "row col", None),
        ),
    ),
)
