"""Tiny random models in which one neuron is raised until it makes a super activation. No test lives here.

Whether it does is judged by the hidden states that transformers itself returns, not by anything of swsurgery.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tiny_models
import torch
import transformers
from torch import Tensor

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.checkpoint.projections import locate
from swsurgery.model.forward import LayeredModel
from swsurgery.storage.coordinate import Coordinate

LAYERS = 6
SEQUENCES = ([3, 7, 11, 19, 5, 28], [9, 2, 30, 14], [17, 4, 22, 8, 26, 13, 6, 21])
MEDIANS = 1000.0
"""How massive the planted activation is made: what arXiv:2402.17762 calls so."""


class Place(NamedTuple):
    """Where a neuron is planted, in the short form of the papers."""

    layer: int
    row: int
    col: int
    expert: int | str | None = None


def build(family: str, seed: int = 0, layers: int = LAYERS, **settings: Any) -> transformers.PreTrainedModel:
    """A random float32 model of one family of `tiny_models`, with more layers."""
    given = (tiny_models.TEXT_MODELS | tiny_models.OTHER_MODELS)[family]
    depth = next((key for key in ("n_layer", "num_layers") if key in given), "num_hidden_layers")
    config = transformers.AutoConfig.for_model(family, **(given | {depth: layers} | settings))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    return model.eval()


def build_experts(family: str, seed: int, experts: int = 4) -> transformers.PreTrainedModel:
    """A random mixture of experts that routes each token to two experts, with biases in the experts of gpt-oss."""
    settings: dict[str, Any] = {"layer_types": ["full_attention"] * LAYERS} if family == "gpt_oss" else {}
    key = {"deepseek_v3": "n_routed_experts", "mixtral": "num_local_experts", "gpt_oss": "num_local_experts"}
    settings[key.get(family, "num_experts")] = experts
    model = build(family, seed, num_experts_per_tok=2, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name and name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    return model


def opened(model: transformers.PreTrainedModel, folder: Path) -> LayeredModel:
    """The model as a checkpoint on disk, and over it the loaded model itself."""
    model.save_pretrained(folder)
    return LayeredModel(model, open_checkpoint(folder))


def coordinate_of(checkpoint: Checkpoint, place: Place) -> Coordinate:
    layer, row, col, expert = place
    return locate(checkpoint.config, checkpoint.shapes, layer=layer, row=row, col=col, expert=expert)


def plant(model: transformers.PreTrainedModel, place: Place, sequences: Sequence[Sequence[int]] = SEQUENCES) -> float:
    """Raise the neuron's gate, up and down weights until it makes a persistent activation; returns the down weight.

    A neuron that no token turns on gets the opposite sign on its way in.
    """
    gate, up, down = weights_of(model, place)
    kept = [weight.clone() for weight in (gate, up, down)]
    with torch.no_grad():
        for sign in (1.0, -1.0):
            for weight, old in zip((gate, up, down), kept, strict=True):
                weight.copy_(old)
            gate.mul_(sign)
            down.copy_(down.sign() * 4)
            for _ in range(15):
                gate.mul_(1.5)
                if up.data_ptr() != gate.data_ptr():
                    up.mul_(1.5)
                down.mul_(2)
                if is_super_activation(model, place, sequences):
                    return float(down)
    raise AssertionError(f"no token turns on the neuron at {place}")


def is_super_activation(
    model: transformers.PreTrainedModel, place: Place, sequences: Sequence[Sequence[int]] = SEQUENCES
) -> bool:
    """Is there a token whose channel `row` is massive, and stays, from `layer` on to the one before the last?"""
    for ids in sequences:
        # The last entry has gone through the final norm.
        states = model(input_ids=torch.tensor([list(ids)]), output_hidden_states=True).hidden_states[
            place.layer + 1 : -1
        ]
        massive = torch.stack([h[0, :, place.row].abs() >= MEDIANS * h.abs().median() for h in states]).all(0)
        kept = torch.stack([h[0, :, place.row] / states[0][0, :, place.row] >= 0.6 for h in states]).all(0)
        if bool((massive & kept).any()):
            return True
    return False


def weights_of(model: transformers.PreTrainedModel, place: Place) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the neuron's weights: gate and up (channels,), the same numbers without a gate, and the down weight."""
    layer, row, col, expert = place
    kind = model.config.model_type
    if kind == "gpt2":
        mlp = model.transformer.h[layer].mlp
        return mlp.c_fc.weight.data[:, col], mlp.c_fc.weight.data[:, col], mlp.c_proj.weight.data[col, row]
    if kind == "gpt_neox":
        mlp = model.gpt_neox.layers[layer].mlp
        into = mlp.dense_h_to_4h.weight.data[col]
        return into, into, mlp.dense_4h_to_h.weight.data[row, col]
    block = model.model.layers[layer]
    mlp = next(
        getattr(block, name)
        for name in ("mlp", "feed_forward", "mixer", "mlp_block", "shared_mlp")
        if hasattr(block, name)
    )
    if isinstance(expert, int):
        down = mlp.experts.down_proj.data[expert]
        if kind == "nemotron_h":
            return mlp.experts.up_proj.data[expert, col], mlp.experts.up_proj.data[expert, col], down[row, col]
        both = mlp.experts.gate_up_proj.data[expert]
        if kind == "gpt_oss":  # alternating, and multiplied from the other side
            return both[:, 2 * col], both[:, 2 * col + 1], down[col, row]
        return both[col], both[len(both) // 2 + col], down[row, col]
    if expert == "shared":
        mlp = next(
            getattr(mlp, name) for name in ("shared_expert", "shared_experts", "shared_mlp") if hasattr(mlp, name)
        )
    for fused, into in (("gate_up_proj", "down_proj"), ("Wi", "Wo"), ("input_linear", "output_linear")):
        if hasattr(mlp, fused):
            both = getattr(mlp, fused).weight.data
            return both[col], both[len(both) // 2 + col], getattr(mlp, into).weight.data[row, col]
    names = ("w1", "w3", "w2") if hasattr(mlp, "w1") else ("gate_proj", "up_proj", "down_proj")
    gate, up = (name if hasattr(mlp, name) else names[1] for name in names[:2])
    return (
        getattr(mlp, gate).weight.data[col],
        getattr(mlp, up).weight.data[col],
        getattr(mlp, names[2]).weight.data[row, col],
    )
