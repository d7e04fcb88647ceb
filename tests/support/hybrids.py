"""Tiny hybrid models with activations that appear before each layer with full attention, and do not persist.

One scalar of a down projection creates such an activation in the last MLP before the layer with full attention. Another
scalar, in the next MLP, removes it. No test lives here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import transformers
from planted import Place, weights_of
from torch import Tensor, nn

_SIZES = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_HEADS = {
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 2,
}  # fmt: skip
_MAMBA_2 = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_conv": 2,
    "mamba_chunk_size": 4,
}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
_LATENT = {
    "kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "n_routed_experts": 4, "num_local_experts": 4,
}  # fmt: skip

TRIGGER = 3
"""The token on which the planted activations appear. It is the first of every sequence, so its states are the same."""

CHANNEL, MARK = 5, 9
"""The channel of the planted activations, and the channel that marks the trigger in the embedding."""

NEURON, ERASER = 7, 11
"""The neurons that create and remove the planted activations."""

SEQUENCES = ([TRIGGER, 7, 11, 19, 5, 28], [TRIGGER, 9, 2, 30, 14], [TRIGGER, 17, 4, 22, 8, 26, 13, 6, 21])


class Planted(NamedTuple):
    """The scalars that were planted in one model, and the layers with full attention."""

    creators: list[Place]
    removers: list[Place]
    attention: list[int]


def _types(other: str, full: str, periods: int) -> list[str]:
    return [other, other, full] * periods


def make_settings(family: str, periods: int = 3) -> dict[str, Any]:
    """Return the settings of one family, with `periods` layers with full attention: every third layer.

    In Nemotron-H, where a layer is a mixer or an MLP, there are four layers for each layer with full attention.
    """
    count = 3 * periods
    linear = {"layer_types": _types("linear_attention", "full_attention", periods)}
    per_family: dict[str, dict[str, Any]] = {
        "qwen3_next": linear
        | _HEADS
        | _EXPERTS
        | {"num_experts": 4, "shared_expert_intermediate_size": 20, "mlp_only_layers": list(range(count))},
        "qwen3_5_text": linear | _HEADS,
        "kimi_linear": linear
        | _EXPERTS
        | _LATENT
        | {"mlp_layer_types": ["dense"] * count, "first_k_dense_replace": count}
        | {"linear_head_dim": 8, "linear_num_heads": 2, "linear_conv_kernel_dim": 2},
        "lfm2": {"layer_types": _types("conv", "full_attention", periods), "block_auto_adjust_ff_dim": False},
        "jamba": {"attn_layer_period": 3, "attn_layer_offset": 2, "num_experts": 1, "num_local_experts": 1}
        | {"mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 2, "mamba_dt_rank": 2, "use_cache": False},
        "bamba": _MAMBA_2 | {"attn_layer_indices": list(range(2, count, 3)), "mamba_expand": 2},
        "recurrent_gemma": {
            "intermediate_size": 48,
            "block_types": ["recurrent", "recurrent", "attention"],
            "lru_width": 32,
            "conv1d_width": 2,
            "attention_window_size": 16,
        },
        "nemotron_h": _EXPERTS
        | {"layers_block_type": ["mamba", "mlp", "attention", "mlp"] * periods, "n_routed_experts": 4}
        | {"moe_shared_expert_intermediate_size": 20, "ssm_state_size": 4, "mamba_num_heads": 2}
        | {"mamba_head_dim": 16, "n_groups": 1, "chunk_size": 4, "conv_kernel": 2},
        "falcon_h1": _MAMBA_2
        | {"mamba_expand": 2, "mamba_d_ssm": 64, "num_hidden_layers": 1 + 2 * periods, "mlp_multipliers": [0.9, 0.25]},
        "granitemoehybrid": _MAMBA_2
        | {"layer_types": _types("mamba", "attention", periods), "mamba_expand": 2, "residual_multiplier": 0.5}
        | {"num_local_experts": 0, "shared_intermediate_size": 24},
        "olmo_hybrid": linear | _HEADS,
        "lfm3": {"layer_types": _types("conv", "full_attention", periods)},
        "lfm2_moe": {"layer_types": _types("conv", "full_attention", periods)}
        | _EXPERTS
        | {"num_experts": 4, "num_dense_layers": 1},
        "qwen3_5_moe_text": linear | _HEADS | _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 20},
        "bailing_hybrid": linear
        | _EXPERTS
        | _LATENT
        | {"num_experts": 4, "first_k_dense_replace": 1, "short_conv_kernel_size": 2},
        "zamba": {"layers_block_type": _types("mamba", "hybrid", periods), "n_mamba_heads": 2}
        | {"mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 2, "mamba_dt_rank": 2},
        "zamba2": {"layers_block_type": _types("mamba", "hybrid", periods), "n_mamba_heads": 2}
        | {"num_mem_blocks": 2, "adapter_rank": 2, "chunk_size": 4}
        | {"mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 2},
        "minimax": linear | {"num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 4},
    }
    depth = {} if family == "nemotron_h" else {"num_hidden_layers": count}
    return _SIZES | depth | per_family[family]


PLANTABLE = (
    *("qwen3_next", "qwen3_5_text", "kimi_linear", "lfm2", "jamba", "bamba", "recurrent_gemma", "nemotron_h"),
    *("falcon_h1", "granitemoehybrid"),
)
"""Families whose MLPs add to the residual stream without a norm, in transformers' own implementations."""

SHARED = ("zamba", "zamba2")
"""Families in which several layers share an MLP, which does not add to the residual stream."""

FAMILIES = (
    *PLANTABLE,
    *SHARED,
    *("olmo_hybrid", "minimax", "lfm3", "lfm2_moe", "qwen3_5_moe_text", "bailing_hybrid"),
)


def build(family: str, seed: int = 0, periods: int = 3, spread: float = 0.3) -> transformers.PreTrainedModel:
    """Build a random float32 model whose matrices have the standard deviation `spread`."""
    config = transformers.AutoConfig.for_model(family, **make_settings(family, periods))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, spread)
    return model.eval()


def list_attention(family: str, periods: int = 3) -> list[int]:
    """List the layers with full attention of the models that `build` makes."""
    if family == "falcon_h1":  # attention and Mamba side by side in every layer
        return list(range(1 + 2 * periods))
    step = 4 if family == "nemotron_h" else 3
    return list(range(2, step * periods, step))


def list_planted(family: str, periods: int = 3) -> list[int]:
    """List the layers with full attention that `plant_recurring` plants an activation before."""
    return list(range(1, 1 + 2 * periods, 2)) if family == "falcon_h1" else list_attention(family, periods)


def count_periods(family: str, layers: int) -> int:
    """Count the activations that `plant_recurring` plants in a model with about `layers` layers: at least 2."""
    least = 4 if family == "zamba2" else 2  # the periods of Zamba 2 use two MLPs in turn
    return max(least, layers // {"nemotron_h": 4, "falcon_h1": 2}.get(family, 3))


@torch.no_grad()
def plant_recurring(
    model: transformers.PreTrainedModel, family: str, medians: float = 1000.0, skipped: Sequence[int] = ()
) -> Planted:
    """Plant an activation of `medians` medians before each layer of `list_planted`, except those in `skipped`."""
    _clear(model)
    attention = list_planted(family, count_periods(family, len(model.model.layers)))
    creators, removers = [], []
    for layer in (layer for layer in attention if layer not in skipped):
        after = layer + 1 if family == "nemotron_h" else layer  # the next layer with an MLP
        creators.append(Place(layer - 1, CHANNEL, NEURON))
        removers.append(Place(after, CHANNEL, ERASER))
        for place, source, target in ((creators[-1], MARK, medians), (removers[-1], CHANNEL, 0.0)):
            _set(model, place, source, target)
    return Planted(creators, removers, attention)


@torch.no_grad()
def plant_shared(model: transformers.PreTrainedModel, medians: float = 1000.0) -> tuple[Place, list[int]]:
    """Let one neuron of the first shared MLP of a Zamba write a large value on the trigger in each use.

    The smallest of these outputs has about `medians` medians. Returns the planted scalar, and the layers that use the
    MLP.
    """
    uses = list_uses(model)
    [first, *_] = uses
    mlp = get_shared_mlp(model, first)
    mlp.down_proj.weight[:, NEURON] = 0.0
    inputs = [given for given, _ in run_shared(model, SEQUENCES[0], uses)]
    direction = torch.stack([given / given.norm() for given in inputs]).mean(0)
    if hasattr(mlp, "gate_up_proj"):
        rows = [NEURON, NEURON + mlp.intermediate_size]
        mlp.gate_up_proj.weight[rows] = 4.0 * direction
        for adapter in (one for one in mlp.gate_up_proj_adapter_list if isinstance(one, nn.Sequential)):
            adapter[1].weight[rows] = 0.0
    else:
        mlp.gate_proj.weight[NEURON] = mlp.up_proj.weight[NEURON] = 4.0 * direction
    down = mlp.down_proj.weight
    down[CHANNEL, NEURON] = 1.0
    for _ in range(6):
        outputs = [output for _, output in run_shared(model, SEQUENCES[0], uses)]
        smallest = min(float(output[CHANNEL].abs() / output.abs().median()) for output in outputs)
        if 0.9 * medians <= smallest <= 1.1 * medians:
            break
        down[CHANNEL, NEURON] *= medians / smallest
    return Place(first, CHANNEL, NEURON), uses


def get_shared_mlp(model: transformers.PreTrainedModel, layer: int) -> nn.Module:
    """Return the MLP of a layer of Zamba with the shared block."""
    name = "shared_transf" if model.config.model_type == "zamba" else "shared_transformer"
    mlp = getattr(model.model.layers[layer], name).feed_forward
    assert isinstance(mlp, nn.Module)
    return mlp


def list_uses(model: transformers.PreTrainedModel) -> list[int]:
    """List the layers that use the MLP that the first layer with a shared block uses."""
    layers = [layer for layer, kind in enumerate(model.config.layers_block_type) if kind == "hybrid"]
    weights = {layer: get_shared_mlp(model, layer).down_proj.weight for layer in layers}
    return [layer for layer in layers if weights[layer] is weights[layers[0]]]


@torch.no_grad()
def run_shared(
    model: transformers.PreTrainedModel, sequence: Sequence[int], uses: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """Return the input and the output of a shared MLP for the first token of a sequence, in each layer of `uses`."""
    kept: list[tuple[Tensor, Tensor]] = []
    handles = [
        get_shared_mlp(model, layer).register_forward_hook(
            lambda m, arguments, output: kept.append((arguments[0][0, 0].clone(), output[0, 0].clone()))
        )
        for layer in uses
    ]
    model(input_ids=torch.tensor([list(sequence)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return kept


def _clear(model: transformers.PreTrainedModel) -> None:
    """Leave only the trigger in channel MARK, and next to nothing in CHANNEL."""
    width = model.config.hidden_size
    for parameter in model.model.layers.parameters():
        if parameter.dim() in (2, 3) and parameter.shape[-2] == width:
            parameter[..., [CHANNEL, MARK], :] *= 0.02
    embedding = model.get_input_embeddings().weight
    embedding[:, [CHANNEL, MARK]] = 0
    embedding[TRIGGER, MARK] = 4.0 if model.config.model_type == "recurrent_gemma" else 20.0  # it is scaled there


def _set(model: transformers.PreTrainedModel, place: Place, source: int, medians: float) -> None:
    """Let the neuron of `place` read one channel, and bring the trigger's hidden state to `medians` medians."""
    gate, up, down = weights_of(model, place)
    module = next(module for module in model.modules() if _holds(module, down))
    sign = 1.0 if source == MARK or _run(model, place, module)[0][CHANNEL] > 0 else -1.0
    for weight in (gate, up):
        weight.zero_()
        weight[source] = 2.0 * sign
    module.weight[:, place.col] = 0.0  # the neuron writes to its own channel only
    state, x = _run(model, place, module)
    config = model.config
    multiplier = config.mlp_multipliers[1] if config.model_type == "falcon_h1" else 1.0
    multiplier *= getattr(config, "residual_multiplier", 1.0)
    down.copy_((medians * state.abs().median() - state[CHANNEL]) / (x[place.col] * multiplier))


class _Stop(Exception):
    """Ends a run of the model after the layer that is observed."""


def _run(model: transformers.PreTrainedModel, place: Place, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the trigger's hidden state after the layer of `place`, and the inputs of `module`, its down projection."""
    kept: list[Tensor] = []

    def keep_state(layer: nn.Module, arguments: object, output: Tensor | tuple[Tensor, ...]) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)
        raise _Stop

    handles = [
        module.register_forward_hook(lambda m, arguments, output: kept.append(arguments[0])),
        model.model.layers[place.layer].register_forward_hook(keep_state),
    ]
    with contextlib.suppress(_Stop):
        model(input_ids=torch.tensor([SEQUENCES[0]]), use_cache=False)
    for handle in handles:
        handle.remove()
    return kept[1].reshape(-1, kept[1].shape[-1])[0], kept[0].reshape(-1, kept[0].shape[-1])[0]


def _holds(module: nn.Module, view: Tensor) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.untyped_storage().data_ptr() == view.untyped_storage().data_ptr()


def show_states(model: transformers.PreTrainedModel, sequence: Sequence[int]) -> list[float]:
    """Return the ratio of the trigger's CHANNEL to the median after each layer, as transformers computes it."""
    states: list[Tensor] = []
    handles = [
        layer.register_forward_hook(
            lambda m, arguments, output: states.append(output[0] if isinstance(output, tuple) else output)
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([list(sequence)]), use_cache=False)
    for handle in handles:
        handle.remove()
    flat = [state.reshape(-1, state.shape[-1]) for state in states]
    return [float(state[0, CHANNEL].abs() / state.abs().median()) for state in flat]
