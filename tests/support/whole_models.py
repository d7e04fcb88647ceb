"""Checkpoints with every tensor of a model, written without torch, and changes that make them incomplete.

No test lives here. The tensors are zeros: only names, shapes and files matter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints import INDEX, write_index, write_shard

HIDDEN, INNER, EXPERT, VOCABULARY, LAYERS, EXPERTS = 8, 12, 6, 20, 5, 4
SIZES = {"BF16": 2, "F32": 4, "U8": 1, "I32": 4, "F8_E4M3": 1, "F16": 2}
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN, "intermediate_size": INNER, "moe_intermediate_size": EXPERT, "num_experts": EXPERTS,
    "vocab_size": VOCABULARY, "tie_word_embeddings": False, "mlp_only_layers": [0],
}  # fmt: skip
Shapes = dict[str, tuple[int, ...]]


def layer_of(number: int, experts: int = EXPERTS) -> Shapes:
    """The tensors of one layer; layer 0 has a dense MLP."""
    prefix = f"model.layers.{number}."
    shapes: Shapes = {f"{prefix}{norm}.weight": (HIDDEN,) for norm in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {f"{prefix}self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
    for module, inner in [("mlp", INNER)] if number == 0 else [(f"mlp.experts.{e}", EXPERT) for e in range(experts)]:
        shapes |= {f"{prefix}{module}.{part}_proj.weight": (inner, HIDDEN) for part in ("gate", "up")}
        shapes[f"{prefix}{module}.down_proj.weight"] = (HIDDEN, inner)
    if number:
        shapes[f"{prefix}mlp.gate.weight"] = (experts, HIDDEN)
    return shapes


def list_shapes() -> Shapes:
    """The tensors of the whole model."""
    shapes: Shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for number in range(LAYERS):
        shapes |= layer_of(number)
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def write_model(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
    dtypes: Mapping[str, str] | None = None,
) -> Path:
    """Write the tensors in `shards` files of about the same number of tensors, with an index if there are several."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = list_shapes() if shapes is None else shapes
    tensors = {}
    for name, shape in shapes.items():
        dtype = (dtypes or {}).get(name, "BF16")
        tensors[name] = (dtype, shape, bytes(SIZES[dtype] * math.prod(shape)))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    if shards == 1:
        write_shard(folder / "model.safetensors", tensors)
        return folder
    names = list(tensors)
    files = {}
    for number in range(shards):
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        files[f"model-{number + 1:05}-of-{shards:05}.safetensors"] = {name: tensors[name] for name in part}
    for file, content in files.items():
        write_shard(folder / file, content)
    write_index(folder, files)
    return folder


def read_map(folder: Path) -> dict[str, str]:
    """The weight_map of the index."""
    return json.loads((folder / INDEX).read_text())["weight_map"]
