"""Rows, columns, neurons and experts by the names and shapes of published checkpoints, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swsurgery.checkpoint import model_config, projections
from swsurgery.checkpoint.architectures import FAMILIES
from swsurgery.checkpoint.structures import locate_column, locate_expert, locate_neuron, locate_row
from swsurgery.errors import ArchitectureError
from swsurgery.storage.region import list_runs

MLP = "model.layers.1.mlp."


def model(model_type: str | None, prefix: str = MLP, **tensors: tuple[int, ...]):
    """A config.json and the shapes of some tensors of layer 1; "__" in a name stands for a dot."""
    shapes = {prefix + name.replace("__", "."): shape for name, shape in tensors.items()}
    return {"model_type": model_type, "num_hidden_layers": 2, "hidden_size": 16}, shapes


LLAMA = model("llama", gate_proj__weight=(24, 16), up_proj__weight=(24, 16), down_proj__weight=(16, 24))
PHI_3 = model("phi3", gate_up_proj__weight=(48, 16), down_proj__weight=(16, 24))
GPT_2 = model("gpt2", "h.1.mlp.", c_fc__weight=(16, 24), c_fc__bias=(24,), c_proj__weight=(24, 16), c_proj__bias=(16,))
OPT = model(
    "opt", "model.decoder.layers.1.", fc1__weight=(24, 16), fc1__bias=(24,), fc2__weight=(16, 24), fc2__bias=(16,)
)
GPT_OSS = model(
    "gpt_oss",
    MLP + "experts.",
    gate_up_proj=(4, 16, 24),
    gate_up_proj_bias=(4, 24),
    down_proj=(4, 12, 16),
    down_proj_bias=(4, 16),
)
STACKED = model("qwen3_moe", MLP + "experts.", gate_up_proj=(4, 24, 16), down_proj=(4, 16, 12))
TURNED = model("qwen3_vl_moe", MLP + "experts.", gate_up_proj=(4, 16, 24), down_proj=(4, 12, 16))
MIXTRAL = model(
    "mixtral",
    "model.layers.1.block_sparse_moe.experts.2.",
    w1__weight=(24, 16),
    w2__weight=(16, 24),
    w3__weight=(24, 16),
)
SHARED = model(
    "qwen2_moe",
    MLP,
    shared_expert__gate_proj__weight=(20, 16),
    shared_expert__up_proj__weight=(20, 16),
    shared_expert__down_proj__weight=(16, 20),
    shared_expert_gate__weight=(1, 16),
    gate__weight=(4, 16),
)

# Families of which transformers has no class, or whose published files have other names than it saves.
W123 = {"w1__weight": (24, 16), "w2__weight": (16, 24), "w3__weight": (24, 16)}
INTERNLM_2 = model("internlm2", "model.layers.1.feed_forward.", **W123)
ARCTIC_DENSE = model("arctic", "model.layers.1.block_sparse_moe.mlp.", **W123)
ARCTIC_RESIDUAL = model("arctic", "model.layers.1.residual_mlp.", **W123)
CHATGLM = model(
    "chatglm",
    "transformer.encoder.layers.1.mlp.",
    dense_h_to_4h__weight=(48, 16),
    dense_h_to_4h__bias=(48,),
    dense_4h_to_h__weight=(16, 24),
)
STEP_3 = model(
    "step3_vl",
    "model.layers.1.moe.",
    gate__weight=(4, 16),
    gate_proj__weight=(4, 24, 16),
    up_proj__weight=(4, 24, 16),
    down_proj__weight=(4, 16, 24),
)
PHI_4_MM = model(
    "phi4mm",
    MLP,
    gate_up_proj__base_layer__weight=(48, 16),
    gate_up_proj__lora_B__vision__weight=(48, 2),
    down_proj__base_layer__weight=(16, 24),
    down_proj__lora_A__vision__weight=(2, 24),
)
NEMOTRON = model("nemotron", MLP, up_proj__weight=(24, 16), down_proj__weight=(16, 24))
NEMOTRON_H = model(
    "nemotron_h",
    "backbone.layers.1.mixer.experts.2.",
    up_proj__weight=(24, 16),
    down_proj__weight=(16, 24),
)
ZAMBA_2 = model(
    "zamba2",
    "model.layers.1.shared_transformer.feed_forward.",
    gate_up_proj__weight=(48, 16),
    gate_up_proj_adapter_list__0__0__weight=(2, 16),
    gate_up_proj_adapter_list__0__1__weight=(48, 2),
    gate_up_proj_adapter_list__10__1__weight=(48, 2),
    down_proj__weight=(16, 24),
)


def but(checkpoint, **changes):
    """The same checkpoint with other shapes; None leaves a tensor away."""
    config, shapes = checkpoint
    prefix = next(iter(shapes)).partition("mlp.")[0] + "mlp."
    new = shapes | {prefix + name.replace("__", "."): shape for name, shape in changes.items()}
    return config, {name: shape for name, shape in new.items() if shape is not None}


def typed(checkpoint, model_type):
    return checkpoint[0] | {"model_type": model_type}, checkpoint[1]


def but_adapter(checkpoint, shape):
    """The same checkpoint whose first adapter has another shape."""
    config, shapes = checkpoint
    return config, {name: shape if name.endswith("list.0.1.weight") else old for name, old in shapes.items()}


@pytest.mark.parametrize(
    ("checkpoint", "expert", "row", "column"),
    [
        (LLAMA, None, "down_proj.weight[3, 0:24]", "down_proj.weight[0:16, 7]"),
        (GPT_2, None, "c_proj.weight[0:24, 3]", "c_proj.weight[7, 0:16]"),
        (STACKED, 2, "experts.down_proj[2, 3, 0:12]", "experts.down_proj[2, 0:16, 7]"),
        (GPT_OSS, 2, "experts.down_proj[2, 0:12, 3]", "experts.down_proj[2, 7, 0:16]"),
        (TURNED, 2, "experts.down_proj[2, 0:12, 3]", "experts.down_proj[2, 7, 0:16]"),
        (SHARED, "shared", "shared_expert.down_proj.weight[3, 0:20]", "shared_expert.down_proj.weight[0:16, 7]"),
    ],
)
def test_rows_and_columns(checkpoint, expert, row, column):
    assert str(locate_row(*checkpoint, 1, 3, expert)).endswith(f".{row}")
    assert str(locate_column(*checkpoint, 1, 7, expert)).endswith(f".{column}")


@pytest.mark.parametrize(
    ("checkpoint", "expert", "parts"),
    [
        (LLAMA, None, ["gate_proj.weight[7, 0:16]", "up_proj.weight[7, 0:16]", "down_proj.weight[0:16, 7]"]),
        (PHI_3, None, ["gate_up_proj.weight[7, 0:16]", "gate_up_proj.weight[31, 0:16]", "down_proj.weight[0:16, 7]"]),
        (GPT_2, None, ["c_fc.weight[0:16, 7]", "c_fc.bias[7]", "c_proj.weight[7, 0:16]"]),
        (OPT, None, ["fc1.weight[7, 0:16]", "fc1.bias[7]", "fc2.weight[0:16, 7]"]),
        (STACKED, 2, ["gate_up_proj[2, 7, 0:16]", "gate_up_proj[2, 19, 0:16]", "down_proj[2, 0:16, 7]"]),
        (TURNED, 2, ["gate_up_proj[2, 0:16, 7]", "gate_up_proj[2, 0:16, 19]", "down_proj[2, 7, 0:16]"]),
        (
            GPT_OSS,
            2,
            [
                *("gate_up_proj[2, 0:16, 14]", "gate_up_proj_bias[2, 14]"),
                *("gate_up_proj[2, 0:16, 15]", "gate_up_proj_bias[2, 15]", "down_proj[2, 7, 0:16]"),
            ],
        ),
        (MIXTRAL, 2, ["w1.weight[7, 0:16]", "w3.weight[7, 0:16]", "w2.weight[0:16, 7]"]),
        (SHARED, "shared", ["gate_proj.weight[7, 0:16]", "up_proj.weight[7, 0:16]", "down_proj.weight[0:16, 7]"]),
        *(
            (one, expert, ["w1.weight[7, 0:16]", "w3.weight[7, 0:16]", "w2.weight[0:16, 7]"])
            for one, expert in ((INTERNLM_2, None), (ARCTIC_DENSE, None), (ARCTIC_RESIDUAL, "shared"))
        ),
        (
            CHATGLM,
            None,
            [
                *("dense_h_to_4h.weight[7, 0:16]", "dense_h_to_4h.bias[7]"),
                *("dense_h_to_4h.weight[31, 0:16]", "dense_h_to_4h.bias[31]", "dense_4h_to_h.weight[0:16, 7]"),
            ],
        ),
        (
            STEP_3,
            2,
            ["gate_proj.weight[2, 7, 0:16]", "up_proj.weight[2, 7, 0:16]", "down_proj.weight[2, 0:16, 7]"],
        ),
        (
            PHI_4_MM,
            None,
            [f"gate_up_proj.base_layer.weight[{n}, 0:16]" for n in (7, 31)] + ["down_proj.base_layer.weight[0:16, 7]"],
        ),
        (NEMOTRON, None, ["up_proj.weight[7, 0:16]", "down_proj.weight[0:16, 7]"]),
        (NEMOTRON_H, 2, ["experts.2.up_proj.weight[7, 0:16]", "experts.2.down_proj.weight[0:16, 7]"]),
        (
            ZAMBA_2,
            None,
            [
                part
                for n in (7, 31)
                for part in (
                    f"gate_up_proj.weight[{n}, 0:16]",
                    f"gate_up_proj_adapter_list.0.1.weight[{n}, 0:2]",
                    f"gate_up_proj_adapter_list.10.1.weight[{n}, 0:2]",
                )
            ]
            + ["down_proj.weight[0:16, 7]"],
        ),
    ],
)
def test_neurons(checkpoint, expert, parts):
    found = [str(region) for region in locate_neuron(*checkpoint, 1, 7, expert)]
    assert len(found) == len(parts)
    assert all(one.endswith(f".{part}") for part, one in zip(parts, found, strict=True)), found


@pytest.mark.parametrize(
    ("checkpoint", "expert", "parts"),
    [
        (STACKED, 2, ["experts.gate_up_proj[2, 0:24, 0:16]", "experts.down_proj[2, 0:16, 0:12]"]),
        (
            GPT_OSS,
            3,
            [
                *("experts.gate_up_proj[3, 0:16, 0:24]", "experts.gate_up_proj_bias[3, 0:24]"),
                *("experts.down_proj[3, 0:12, 0:16]", "experts.down_proj_bias[3, 0:16]"),
            ],
        ),
        (MIXTRAL, 2, [f"experts.2.{part}" for part in ("w1.weight[", "w3.weight[", "w2.weight[0:16, 0:24]")]),
        (SHARED, "shared", [f"shared_expert.{part}_proj.weight[" for part in ("gate", "up", "down")]),
        (ARCTIC_RESIDUAL, "shared", [f"residual_mlp.{part}.weight[" for part in ("w1", "w3", "w2")]),
        (STEP_3, 3, [f"moe.{part}_proj.weight[3, " for part in ("gate", "up", "down")]),
        (NEMOTRON_H, 2, [f"mixer.experts.2.{part}_proj.weight[" for part in ("up", "down")]),
        # LongCat's zero experts have input projections only.
        (
            typed(but(STACKED, experts__gate_up_proj=(6, 24, 16)), "longcat_flash"),
            3,
            ["experts.gate_up_proj[3, 0:24, 0:16]", "experts.down_proj[3, 0:16, 0:12]"],
        ),
    ],
)
def test_experts(checkpoint, expert, parts):
    found = [str(region) for region in locate_expert(*checkpoint, 1, expert)]
    assert len(found) == len(parts)
    assert all(f".{part}" in one for part, one in zip(parts, found, strict=True))


BY_SLICE = r" \(name the tensors with `tensor` and `slice` instead\)"


@pytest.mark.parametrize(
    ("checkpoint", "neuron", "expert", "message"),
    [
        (LLAMA, 24, None, r"neuron 24 is out of range 0\.\.23: \S+down_proj\.weight"),
        (LLAMA, -1, None, r"neuron -1 is out of range 0\.\.23: \S+"),
        (PHI_3, 24, None, r"neuron 24 is out of range 0\.\.23: \S+"),
        (LLAMA, 0, 1, r"layer 1 is dense: it has no expert 1 \(leave expert out\)"),
        (STACKED, 0, None, r"layer 1 is a mixture of experts: no expert is given \(expert: 0 to 3\)"),
        (STACKED, 0, 4, r"layer 1 has no expert 4: its experts are 0 to 3"),
        (but(LLAMA, up_proj__weight=None), 0, None, r"the MLP of \S+ has no up_proj: \S+up_proj\.weight" + BY_SLICE),
        (
            but(LLAMA, up_proj__weight=(25, 16)),
            0,
            None,
            r"shape \[25, 16\] is not \[24, 16\]: \S+up_proj\S+" + BY_SLICE,
        ),
        (but(PHI_3, gate_up_proj__weight=(24, 16)), 0, None, r"shape \[24, 16\] is not \[48, 16\]: \S+" + BY_SLICE),
        (but(LLAMA, gate_proj__bias=(16,)), 0, None, r"shape \[16\] is not \[24\]: \S+gate_proj\.bias" + BY_SLICE),
        (
            but(LLAMA, gate_2_proj__weight=(24, 16)),
            0,
            None,
            r"the MLP has a matrix of unknown use, so its gate is unknown: \S+gate_2_proj\.weight" + BY_SLICE,
        ),
        # Families that nobody has compared: an order of gate and up, or that there is no gate, is not guessed.
        (typed(PHI_3, "mystery"), 0, None, r"the gate of model type mystery is unknown: \S+" + BY_SLICE),
        (typed(STACKED, "mystery"), 0, 2, r"the gate of model type mystery is unknown: \S+" + BY_SLICE),
        (typed(OPT, "mystery"), 0, None, r"the gate of model type mystery is unknown: \S+" + BY_SLICE),
        (
            typed(but(LLAMA, gate_proj__weight=None), "mystery"),
            0,
            None,
            r"the gate of model type mystery is unknown: \S+" + BY_SLICE,
        ),
        (
            but_adapter(ZAMBA_2, (24, 2)),
            0,
            None,
            r"shape \[24, 2\] is not \[48, 2\]: \S+gate_up_proj_adapter_list\.0\.1\.weight" + BY_SLICE,
        ),
        (
            but_adapter(ZAMBA_2, (48,)),
            0,
            None,
            r"shape \[48\] is not \[48, 0\]: \S+gate_up_proj_adapter_list\.0\.1\.weight" + BY_SLICE,
        ),
        # Packed and quantised in parts.
        (
            but(LLAMA, down_proj__weight=None, down_proj__qweight=(3, 16)),
            0,
            None,
            r"the down projection is packed, .*down_proj\.qweight \(use the checkpoint before quantisation\)",
        ),
        (
            but(LLAMA, gate_proj__weight=None, gate_proj__qweight=(2, 24)),
            0,
            None,
            r"gate_proj is packed, .*gate_proj\.qweight \(use the checkpoint before quantisation\)",
        ),
        (
            but(LLAMA, up_proj__weight=None, up_proj__weight_a=(2, 24)),
            0,
            None,
            r"up_proj is quantised or stored in parts, .*up_proj\.weight_a \(use .*\)",
        ),
        (
            but(GPT_OSS, experts__gate_up_proj=None, experts__gate_up_proj_blocks=(4, 24, 1, 8)),
            0,
            1,
            r"gate_up_proj is packed, .*experts\.gate_up_proj_blocks \(use .*\)",
        ),
    ],
)
def test_neurons_refused(checkpoint, neuron, expert, message):
    with pytest.raises(ArchitectureError) as caught:
        locate_neuron(*checkpoint, 1, neuron, expert)
    assert re.fullmatch(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    ("checkpoint", "expert", "message"),
    [
        (LLAMA, 0, r"layer 1 is dense: it has no expert 0 \(leave expert out\)"),
        (LLAMA, "shared", r"layer 1 is dense: it has no expert shared \(leave expert out\)"),
        (STACKED, 4, r"layer 1 has no expert 4: its experts are 0 to 3"),
        (STACKED, "shared", r"layer 1 has no expert shared: its experts are 0 to 3"),
        (SHARED, 0, r"layer 1 has no expert 0: its experts are shared"),
        (
            but(STACKED, experts__gate_up_proj=(3, 24, 16)),
            0,
            r"shape \[3, 24, 16\] is not \[4, 24, 16\]: \S+gate_up_proj" + BY_SLICE,
        ),
        (
            but(GPT_OSS, experts__down_proj_bias=(4, 12)),
            0,
            r"shape \[4, 12\] is not \[4, 16\]: \S+down_proj_bias" + BY_SLICE,
        ),
        (
            typed(but(STACKED, experts__gate_up_proj=None), "mystery"),
            0,
            r"the gate of model type mystery is unknown: \S+" + BY_SLICE,
        ),
    ],
)
def test_experts_refused(checkpoint, expert, message):
    with pytest.raises(ArchitectureError) as caught:
        locate_expert(*checkpoint, 1, expert)
    assert re.fullmatch(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    ("locate", "message"),
    [
        (locate_row, r"row 16 is out of range 0\.\.15: \S+down_proj\.weight"),
        (lambda *args: locate_row(*args[:3], -1), r"row -1 is out of range 0\.\.15: \S+"),
        (lambda *args: locate_column(*args[:3], 24), r"col 24 is out of range 0\.\.23: \S+down_proj\.weight"),
        (lambda *args: locate_row(*args[:2], 2, 0), r"layer 2 is beyond the model: .*"),
        (lambda *args: locate_column(*args[:3], 0, 3), r"layer 1 is dense: .*"),
    ],
)
def test_rows_and_columns_refused(locate, message):
    with pytest.raises(ArchitectureError) as caught:
        locate(*LLAMA, 1, 16)
    assert re.fullmatch(message, str(caught.value)), str(caught.value)


def test_an_unknown_family_with_a_gate_and_an_up_projection_has_neurons():
    assert locate_neuron(*typed(LLAMA, "baichuan"), 1, 7) == locate_neuron(*LLAMA, 1, 7)


def test_an_expert_of_an_unknown_family_is_found_whatever_the_order_of_gate_and_up():
    for checkpoint in (STACKED, GPT_OSS):
        assert locate_expert(*typed(checkpoint, "mystery"), 1, 2) == locate_expert(*checkpoint, 1, 2)


def test_scales_beside_fp8_matrices_are_not_part_of_a_neuron():
    scales = {f"{part}_proj__weight_scale_inv": (1, 1) for part in ("gate", "up", "down")}
    assert locate_neuron(*but(LLAMA, **scales), 1, 7) == locate_neuron(*LLAMA, 1, 7)


def test_a_layout_without_inputs_has_rows_but_no_neurons(monkeypatch):
    [llama] = [family for family in FAMILIES if family.name == "Llama"]
    bare = replace(llama, templates=tuple(replace(template, inputs=None) for template in llama.templates))
    for module in (model_config, projections):
        monkeypatch.setattr(module, "FAMILIES", (bare,))
    assert str(locate_row(*LLAMA, 1, 3)).endswith("[3, 0:24]")
    with pytest.raises(
        ArchitectureError, match=r"^the gate of Llama \(model type llama\) is unknown: .*`slice` instead"
    ):
        locate_neuron(*LLAMA, 1, 3)


@st.composite
def stacks(draw):
    experts, hidden, neurons = (draw(st.integers(1, top)) for top in (5, 9, 11))
    turned, interleaved = draw(st.sampled_from([("qwen3_moe", False), ("llama4_text", False), ("gpt_oss", True)]))
    name = "model.layers.0.feed_forward.experts" if turned == "llama4_text" else "model.layers.0.mlp.experts"
    up, down = (experts, 2 * neurons, hidden), (experts, hidden, neurons)
    if turned != "qwen3_moe":
        up, down = (experts, hidden, 2 * neurons), (experts, neurons, hidden)
    config = {"model_type": turned, "num_hidden_layers": 1, "hidden_size": hidden}
    place = draw(st.tuples(st.integers(0, experts - 1), st.integers(0, neurons - 1)))
    return config, {f"{name}.gate_up_proj": up, f"{name}.down_proj": down}, interleaved, place


@given(stacks())
def test_a_neuron_of_stacked_experts_is_what_numpy_selects(example):
    config, shapes, interleaved, (expert, neuron) = example
    (up_name, up), (down_name, down) = shapes.items()
    numbers = {name: np.arange(np.prod(shape)).reshape(shape) for name, shape in shapes.items()}
    turned = config["model_type"] != "qwen3_moe"
    matrix = numbers[up_name][expert].T if turned else numbers[up_name][expert]
    output = numbers[down_name][expert].T if turned else numbers[down_name][expert]
    gate, ups = (matrix[::2], matrix[1::2]) if interleaved else np.split(matrix, 2)
    expected = [gate[neuron], ups[neuron], output[:, neuron]]

    found = locate_neuron(config, shapes, 0, neuron, expert)
    runs = [[i for first, n in list_runs(r, shapes[r.tensor]) for i in range(first, first + n)] for r in found]
    assert runs == [part.tolist() for part in expected]
