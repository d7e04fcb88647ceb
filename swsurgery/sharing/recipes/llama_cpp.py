"""Render the options of llama-quantize, the quantiser of llama.cpp.

`--tensor-type PATTERN=TYPE` searches the pattern anywhere in the name of a GGUF tensor with std::regex_search
(src/llama-quant.cpp), so the patterns have anchors. The options change no default: llama-quantize still chooses the
type of the output head.
"""

from __future__ import annotations

import re
import shlex

from swsurgery.errors import PlanError
from swsurgery.sharing.recipes import rendered
from swsurgery.sharing.recipes.modules import KeptModule, Subject
from swsurgery.sharing.recipes.rendered import Rendered

_LAYER = re.compile(r".*?(?:layers|h|blocks)\.(?P<layer>\d+)\.(?P<rest>.+)")

PARTS = {
    "mlp.down_proj": "ffn_down", "mlp.fc2": "ffn_down", "mlp.c_proj": "ffn_down",
    "mlp.dense_4h_to_h": "ffn_down", "mlp.fc_out": "ffn_down", "ffn.down_proj": "ffn_down",
    "feed_forward.down_proj": "ffn_down", "mlp.up_proj": "ffn_up", "mlp.gate_proj": "ffn_gate",
    "mlp.shared_expert.down_proj": "ffn_down_shexp", "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "feed_forward.shared_expert.down_proj": "ffn_down_shexp", "shared_mlp.output_linear": "ffn_down_shexp",
    "mlp.experts.down_proj": "ffn_down_exps", "feed_forward.experts.down_proj": "ffn_down_exps",
    "block_sparse_moe.experts.w2": "ffn_down_exps", "block_sparse_moe.output_linear": "ffn_down_exps",
    "block_sparse_moe.experts.down_proj": "ffn_down_exps",
    "mlp.experts.gate_proj": "ffn_gate_exps", "mlp.experts.up_proj": "ffn_up_exps",
    "block_sparse_moe.experts.w1": "ffn_gate_exps", "block_sparse_moe.experts.w3": "ffn_up_exps",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp", "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.Wo": "ffn_down", "mlp.Wi": "ffn_up",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}  # fmt: skip
"""Maps a module's name after the number of its layer, without an expert's number, to its name in GGUF."""

_TYPES = {"F16": "f16", "BF16": "bf16"}
"""Maps stored dtypes to GGUF types. Other and unknown dtypes become f32, which represents the same values."""


def render(subject: Subject) -> Rendered:
    """Render a command that quantises a GGUF file to Q4_K_M. Raises PlanError if the GGUF name is not known."""
    types = {f"^{re.escape(_find_tensor(m))}$": _TYPES.get(m.dtype or "", "f32") for m in subject.modules}
    options = [f"--tensor-type {shlex.quote(f'{pattern}={kind}')}" for pattern, kind in types.items()]
    text = " \\\n  ".join(["llama-quantize", *options, "model-f32.gguf model-Q4_K_M.gguf Q4_K_M"]) + "\n"
    explanation = (
        "GGUF stacks all experts of a layer in one tensor, so a single expert cannot be excluded: "
        "the recipe keeps all experts of the layer"
    )
    return Rendered(tuple(types), text, rendered.explain_experts(subject, explanation))


def _find_tensor(module: KeptModule) -> str:
    """Return the name of the GGUF tensor that contains a module. Raises PlanError if it is not known."""
    match = _LAYER.fullmatch(module.name)
    rest = re.sub(r"\.experts\.\d+\.", ".experts.", match["rest"]) if match else ""
    if match is None or rest not in PARTS:
        raise PlanError(
            "the name of this module in GGUF is not known", module.name, "choose another tool, or give --tensor-type"
        )
    return f"blk.{match['layer']}.{PARTS[rest]}.weight"
