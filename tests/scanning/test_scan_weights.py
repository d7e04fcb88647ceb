"""Super weights by the weights alone: planted ones are found at their place, and nothing is found where nothing is.

The oracle multiplies whole tensors in float64 and knows by itself which tensors belong together.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny_models
import torch
from checkpoints import tensor, write_single
from safetensors.torch import load_file, save_file

from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.errors import ArchitectureError, CheckpointError
from swsurgery.scanning import blocks, scores
from swsurgery.scanning.by_weights import MIN_Z, scan_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Neurons:
    """The MLP of one layer or expert as views: gate and up (neuron, channel), down (channel, neuron), the norm's gain
    (channel,), that of the norm behind, and what is added to both. Writing to a view writes to the stored tensors."""

    layer: int
    expert: int | str | None
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    gain: torch.Tensor | None
    plus: float = 0.0
    behind: torch.Tensor | None = None

    @property
    def scores(self) -> np.ndarray:
        """(channel, neuron), float64."""
        gate, up, down = (part.double().numpy() for part in (self.gate, self.up, self.down))
        gain = 1.0 if self.gain is None else self.gain.double().numpy() + self.plus
        behind = np.ones(len(down)) if self.behind is None else np.abs(self.behind.double().numpy() + self.plus)
        return behind[:, None] * np.abs(down) * np.abs(((gate * gain) * (up * gain)).sum(axis=1))


# What each family stores, by layer; written down from the models' own code. -------------------------------------------


def gated(
    tensors: Tensors,
    prefix: str,
    norm: str | None,
    names="gate_proj up_proj down_proj",
    expert=None,
    plus=0.0,
    behind=None,
) -> Neurons:
    layer = int(prefix.split("layers.")[1].split(".")[0])
    gate, up, down = (tensors[f"{prefix}{name}.weight"] for name in names.split())
    path = f"{prefix.split('layers.')[0]}layers.{layer}."
    gain = None if norm is None else tensors[f"{path}{norm}.weight"]
    after = None if behind is None else tensors[f"{path}{behind}.weight"]
    return Neurons(layer, expert, gate, up, down, gain, plus, after)


def dense(norm: str | None = "post_attention_layernorm", prefix="model.", **more):
    return lambda t: [gated(t, f"{prefix}layers.{n}.mlp.", norm, **more) for n in (0, 1)]


def plain(prefix: str, fc: str, down: str, norm: str, turned: bool = False):
    def neurons(t: Tensors) -> list[Neurons]:
        found = []
        for n in (0, 1):
            path = prefix.format(n)
            first, second = t[f"{path}{fc}.weight"], t[f"{path}{down}.weight"]
            first, second = (first.T, second.T) if turned else (first, second)
            found.append(Neurons(n, None, first, first, second, t[f"{path}{norm}.weight"]))
        return found

    return neurons


def phi3(t: Tensors) -> list[Neurons]:
    found = []
    for n in (0, 1):
        path = f"model.layers.{n}."
        both = t[f"{path}mlp.gate_up_proj.weight"]
        down, gain = t[f"{path}mlp.down_proj.weight"], t[f"{path}post_attention_layernorm.weight"]
        found.append(Neurons(n, None, both[:24], both[24:], down, gain))
    return found


def glm4(t: Tensors) -> list[Neurons]:
    behind = [t[f"model.layers.{n}.post_mlp_layernorm.weight"] for n in (0, 1)]
    return [replace(neurons, behind=gain) for neurons, gain in zip(phi3(t), behind, strict=True)]


def mixtral(t: Tensors) -> list[Neurons]:
    return [
        gated(t, f"model.layers.{n}.block_sparse_moe.experts.{e}.", "post_attention_layernorm", "w1 w3 w2", expert=e)
        for n in (0, 1)
        for e in range(4)
    ]


def qwen2_moe(t: Tensors) -> list[Neurons]:
    norm = "post_attention_layernorm"
    experts = [gated(t, f"model.layers.1.mlp.experts.{e}.", norm, expert=e) for e in range(4)]
    shared = gated(t, "model.layers.1.mlp.shared_expert.", norm, expert="shared")
    return [gated(t, "model.layers.0.mlp.", norm), *experts, shared]


def stacked(layers, gate_up: str, down: str, gate, up, turned: bool, prefix: str = "model."):
    """`gate` and `up` are slices of the joint axis."""

    def neurons(t: Tensors) -> list[Neurons]:
        found = []
        for n in layers:
            path = f"{prefix}layers.{n}."
            for e in range(4):
                both, last = t[path + gate_up][e], t[path + down][e]
                both, last = (both.T, last.T) if turned else (both, last)
                found.append(Neurons(n, e, both[gate], both[up], last, t[f"{path}post_attention_layernorm.weight"]))
        return found

    return neurons


def granitemoeshared(t: Tensors) -> list[Neurons]:
    moe = "block_sparse_moe.{}_linear.weight"
    experts = stacked((0, 1), moe.format("input"), moe.format("output"), slice(0, 24), slice(24, 48), False)(t)
    for n in (0, 1):
        path = f"model.layers.{n}."
        both, down = (t[f"{path}shared_mlp.{name}_linear.weight"] for name in ("input", "output"))
        gain = t[f"{path}post_attention_layernorm.weight"]
        experts.append(Neurons(n, "shared", both[:20], both[20:], down, gain))
    return experts


def pairs(*parts: tuple[str, str, str], plus: float = 0.0, prefix: str = "model."):
    """Each part: the path of an MLP in the model, the norm before it, and the names of gate, up and down."""

    def neurons(t: Tensors) -> list[Neurons]:
        found = []
        for path, norm, names in parts:
            number = re.search(r"experts\.(\d)\.", path)
            expert = int(number[1]) if number else "shared" if "share" in path.split(".")[-2] else None
            found.append(gated(t, f"{prefix}{path}", norm, names, expert, plus))
        return found

    return neurons


def halves(path: str, fused: str, down: str, norm: str):
    def neurons(t: Tensors) -> list[Neurons]:
        found = []
        for n in (0, 1):
            layer = f"model.layers.{n}."
            both = t[f"{layer}{path}{fused}.weight"]
            found.append(
                Neurons(n, None, both[:24], both[24:], t[f"{layer}{path}{down}.weight"], t[f"{layer}{norm}.weight"])
            )
        return found

    return neurons


def nemotron_h(t: Tensors) -> list[Neurons]:
    found = []
    for path, expert in [*((f"1.mixer.experts.{e}", e) for e in range(4)), ("1.mixer.shared_experts", "shared")]:
        up, down = (t[f"backbone.layers.{path}.{name}_proj.weight"] for name in ("up", "down"))
        found.append(Neurons(1, expert, up, up, down, t["backbone.layers.1.norm.weight"]))
    up, down = (t[f"backbone.layers.3.mixer.{name}_proj.weight"] for name in ("up", "down"))
    return [*found, Neurons(3, None, up, up, down, t["backbone.layers.3.norm.weight"])]


def step3p7(t: Tensors) -> list[Neurons]:
    first, norm = "model.layers.1.", "post_attention_layernorm"
    gain = t[f"{first}{norm}.weight"]
    dense = gated(t, "model.layers.0.mlp.", norm, plus=1.0)
    shared = gated(t, f"{first}share_expert.", norm, expert="shared", plus=1.0)
    gate, up, down = (t[f"{first}moe.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return [dense, *(Neurons(1, e, gate[e], up[e], down[e], gain, 1.0) for e in range(4)), shared]


PROJECTIONS = "gate_proj up_proj down_proj"
BEHIND = "post_feedforward_layernorm"
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
EVEN, ODD = slice(0, None, 2), slice(1, None, 2)
FAMILIES = {
    "llama": dense(),
    "cohere": dense("input_layernorm"),
    "olmo": dense(None),
    "olmo2": dense(None, behind=BEHIND),
    "olmo3": dense(None, behind=BEHIND),
    "gemma": dense(plus=1.0),
    "gemma2": dense("pre_feedforward_layernorm", plus=1.0, behind=BEHIND),
    "gemma3": dense("pre_feedforward_layernorm", plus=1.0, behind=BEHIND, prefix="language_model.model."),
    "glm4": glm4,
    "phi3": phi3,
    "phi": plain("model.layers.{}.", "mlp.fc1", "mlp.fc2", "input_layernorm"),
    "starcoder2": plain("model.layers.{}.", "mlp.c_fc", "mlp.c_proj", "post_attention_layernorm"),
    "gpt_neox": plain("gpt_neox.layers.{}.", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "post_attention_layernorm"),
    "falcon": plain("transformer.h.{}.", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "input_layernorm"),
    "bloom": plain("transformer.h.{}.", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "post_attention_layernorm"),
    "gpt2": plain("transformer.h.{}.", "mlp.c_fc", "mlp.c_proj", "ln_2", turned=True),
    "gptj": plain("transformer.h.{}.", "mlp.fc_in", "mlp.fc_out", "ln_1"),
    "opt": plain("model.decoder.layers.{}.", "fc1", "fc2", "final_layer_norm"),
    "mpt": plain("transformer.blocks.{}.", "ffn.up_proj", "ffn.down_proj", "norm_2"),
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "qwen3_vl_moe": lambda t: [
        gated(t, "model.language_model.layers.0.mlp.", "post_attention_layernorm"),
        *stacked((1,), *EXPERTS, slice(0, 12), slice(12, 24), False, "model.language_model.")(t),
    ],
    "gpt_oss": stacked((0, 1), *EXPERTS, EVEN, ODD, True),
    "granitemoeshared": granitemoeshared,
    "lfm2_moe": pairs(
        ("layers.0.feed_forward.", "ffn_norm", "w1 w3 w2"),
        *((f"layers.1.feed_forward.experts.{e}.", "ffn_norm", "w1 w3 w2") for e in range(4)),
    ),
    "jamba": pairs(
        ("layers.0.feed_forward.", "pre_ff_layernorm", PROJECTIONS),
        *((f"layers.1.feed_forward.experts.{e}.", "pre_ff_layernorm", PROJECTIONS) for e in range(4)),
    ),
    "recurrent_gemma": pairs(*((f"layers.{n}.mlp_block.", "channel_pre_norm", PROJECTIONS) for n in (0, 1)), plus=1.0),
    "zamba": pairs(
        ("layers.1.shared_transf.feed_forward.", "shared_transf.pre_ff_layernorm", PROJECTIONS),
    ),
    "zamba2": halves(
        "shared_transformer.feed_forward.", "gate_up_proj", "down_proj", "shared_transformer.pre_ff_layernorm"
    ),
    "modernbert": halves("mlp.", "Wi", "Wo", "mlp_norm"),
    "nemotron_h": nemotron_h,
    "step3p7": step3p7,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """family -> a folder with that tiny model, whose norms have random gains; made once each."""
    made: dict[str, Path] = {}

    def write(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tiny_models.write(family, made[family])
            tensors = load_file(made[family] / "model.safetensors")
            chance = torch.Generator().manual_seed(1)
            for name, values in tensors.items():
                if values.dim() == 1 and name.endswith(".weight"):
                    values.copy_(torch.rand(values.shape, generator=chance) + 0.5)
            save_file(tensors, made[family] / "model.safetensors")
        return made[family]

    return write


def saved(source: Path, folder: Path, tensors: Tensors, **config) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def plant(neurons: Neurons, row: int, col: int) -> None:
    """Raise one neuron's gate, up and down weights, gate and up in the same direction."""
    neurons.gate[col] *= 20
    if neurons.up.data_ptr() != neurons.gate.data_ptr():
        neurons.up[col] = neurons.gate[col]
    neurons.down[row, col] = -10 * neurons.down.abs().max()


def robust_z(families: list[Neurons], at: Neurons, score: float) -> float:
    logarithms = np.log(np.concatenate([n.scores.max(axis=0) for n in families if n.layer == at.layer]))
    spread = 1.4826 * np.median(np.abs(logarithms - np.median(logarithms)))
    return (np.log(score) - np.median(logarithms)) / max(spread, np.log(2))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_planted_neuron_is_found_at_its_place_and_nothing_else(family, tiny, tmp_path):
    source, chance = tiny(family), random.Random(family)
    for _ in range(5):
        tensors = load_file(source / "model.safetensors")
        layers = FAMILIES[family](tensors)
        at = chance.choice(layers)
        row, col = chance.randrange(at.down.shape[0]), chance.randrange(at.down.shape[1])
        plant(at, row, col)
        report = scan_weights(open_checkpoint(saved(source, tmp_path / "planted", tensors)))

        (found,) = report.candidates
        assert (found.layer, found.expert, found.row, found.col) == (at.layer, at.expert, row, col)
        stored = tensors[found.coordinate.tensor][found.coordinate.index].item()
        assert found.value == stored == at.down[row, col].item()
        assert found.rank == 1
        score = at.scores[row, col]
        assert found.score == pytest.approx(score, rel=1e-5)
        assert found.z == pytest.approx(robust_z(layers, at, score), abs=1e-4)
        assert report.settings["scalars"] == sum(n.down.numel() for n in layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_model_has_none_and_says_how_far_from_it_it_is(family, tiny):
    report = scan_weights(open_checkpoint(tiny(family)))
    tensors = load_file(tiny(family) / "model.safetensors")
    layers = FAMILIES[family](tensors)
    highest = max(robust_z(layers, n, n.scores.max()) for n in layers)
    assert report.candidates == ()
    assert highest < 3 and f"{highest:.1f}" in report.notes[-1]
    assert report.notes[-1].startswith("no super weight: ")


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_planted_scalar_that_was_zeroed_leaves_none(family, tiny, tmp_path):
    tensors = load_file(tiny(family) / "model.safetensors")
    at = FAMILIES[family](tensors)[1]
    plant(at, 3, 7)
    at.down[3, 7] = 0
    report = scan_weights(open_checkpoint(saved(tiny(family), tmp_path, tensors)))
    assert report.candidates == ()
    assert "has no large scalar" in report.notes[-1] and "col 7" in report.notes[-1]


def test_opt_with_norms_after_each_block_reads_the_attentions_norm(tiny, tmp_path):
    tensors = load_file(tiny("opt") / "model.safetensors")
    tensors["model.decoder.layers.0.self_attn_layer_norm.weight"] *= 3
    layers = plain("model.decoder.layers.{}.", "fc1", "fc2", "self_attn_layer_norm")(tensors)
    plant(layers[0], 1, 2)
    (found,) = scan_weights(
        open_checkpoint(saved(tiny("opt"), tmp_path, tensors, do_layer_norm_before=False))
    ).candidates
    assert found.score == pytest.approx(layers[0].scores[1, 2], rel=1e-5)


@pytest.mark.parametrize("variant", ["turned", "unstacked fused"])
def test_other_ways_to_store_experts(variant, tiny, tmp_path):
    source = tiny("qwen3_vl_moe")
    tensors = load_file(source / "model.safetensors")
    layers = FAMILIES["qwen3_vl_moe"](tensors)
    plant(layers[3], 5, 6)
    expected = layers[3].scores[5, 6]
    prefix = "model.language_model.layers.1.mlp.experts."
    if variant == "turned":  # as published
        for name in ("gate_up_proj", "down_proj"):
            tensors[prefix + name] = tensors[prefix + name].transpose(1, 2).contiguous()
    else:
        both, down = tensors.pop(prefix + "gate_up_proj"), tensors.pop(prefix + "down_proj")
        for e in range(4):
            tensors[f"{prefix}{e}.gate_up_proj.weight"] = both[e].clone()
            tensors[f"{prefix}{e}.down_proj.weight"] = down[e].clone()
    more = {} if variant == "turned" else {"model_type": "qwen3_moe", "text_config": None, "hidden_size": 16}
    (found,) = scan_weights(open_checkpoint(saved(source, tmp_path, tensors, **more))).candidates
    assert (found.layer, found.expert, found.row, found.col) == (1, 2, 5, 6)
    assert found.score == pytest.approx(expected, rel=1e-5)


# One Llama-shaped model, written byte by byte ------------------------------------------------------------------------

NUMPY = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz, "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}  # fmt: skip
CHANNELS, NEURONS = 13, 41  # odd, so that no row of a small dtype begins at a whole word


def arrays(layers: int = 2, seed: int = 0, channels: int = CHANNELS, neurons: int = NEURONS) -> dict[str, np.ndarray]:
    chance, made = np.random.default_rng(seed), {}
    for n in range(layers):
        path = f"model.layers.{n}."
        made[f"{path}post_attention_layernorm.weight"] = chance.uniform(0.5, 1.5, channels)
        for name in ("gate_proj", "up_proj"):
            made[f"{path}mlp.{name}.weight"] = chance.normal(0, 0.05, (neurons, channels))
        made[f"{path}mlp.down_proj.weight"] = chance.normal(0, 0.05, (channels, neurons))
    return made


def raise_neuron(made: dict[str, np.ndarray], layer: int, rows: dict[int, float], col: int) -> None:
    mlp = f"model.layers.{layer}.mlp."
    made[f"{mlp}gate_proj.weight"][col] *= 10
    made[f"{mlp}up_proj.weight"][col] = made[f"{mlp}gate_proj.weight"][col]
    for row, value in rows.items():
        made[f"{mlp}down_proj.weight"][row, col] = value


def written(folder: Path, made: dict[str, np.ndarray], dtype: str = "F32", padding: int = 0, **config) -> Path:
    stored = {name: (dtype, values.shape, values.astype(NUMPY[dtype]).tobytes()) for name, values in made.items()}
    sizes = {"hidden_size": next(iter(made.values())).shape[0], "num_hidden_layers": 64}
    return write_single(folder, stored, sizes | config, padding)


def scan(folder: Path, **more):
    return scan_weights(open_checkpoint(folder), **more)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("dtype", NUMPY)
def test_every_float_dtype_gives_the_score_of_its_stored_values(dtype, padding, tmp_path):
    made = arrays()
    raise_neuron(made, 1, {4: 1.75}, 40)
    (found,) = scan(written(tmp_path, made, dtype, padding)).candidates
    stored = {name: values.astype(NUMPY[dtype]).astype(np.float64) for name, values in made.items()}
    gain, gate, up, down = (stored[name] for name in made if ".1." in name)
    assert (found.layer, found.row, found.col, found.value) == (1, 4, 40, down[4, 40])
    assert found.score == pytest.approx(abs(down[4, 40] * (gain**2 * gate[40] * up[40]).sum()), rel=1e-5)


def test_f16_holds_for_the_smallest_and_the_largest_numbers(tmp_path):
    """Subnormal inputs, which a widened F16 must neither flush nor scale, and products beyond its range."""
    made = arrays()
    for name in made:
        if "gate" in name or "up_" in name:
            made[name] *= 1e-5 / 0.05
        if "norm" in name:
            made[name] *= 200
    raise_neuron(made, 0, {12: 60000.0}, 3)
    (found,) = scan(written(tmp_path, made, "F16")).candidates
    stored = {name: values.astype(np.float16).astype(np.float64) for name, values in made.items()}
    gain, gate, up, down = (stored[name] for name in made if ".0." in name)
    assert (found.row, found.col, found.value) == (12, 3, down[12, 3])
    assert found.score == pytest.approx(down[12, 3] * (gain**2 * gate[3] * up[3]).sum(), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "phi3"])
def test_chunks_and_threads_change_nothing(family, tiny, tmp_path, monkeypatch):
    tensors = load_file(tiny(family) / "model.safetensors")
    plant(FAMILIES[family](tensors)[1], 2, 9)
    checkpoint = open_checkpoint(saved(tiny(family), tmp_path, tensors))
    whole = scan_weights(checkpoint, threads=1)
    assert scan_weights(checkpoint, threads=5) == whole
    monkeypatch.setattr(blocks, "SCORE_CHUNK", 500)
    for module in (blocks, scores):
        monkeypatch.setattr(module, "SCORE_BLOCK", 70)
    pieces = scan_weights(checkpoint, threads=1)
    assert scan_weights(checkpoint, threads=3) == pieces
    (one,), (other,) = whole.candidates, pieces.candidates
    assert other == replace(one, score=other.score, z=other.z)
    assert other.score == pytest.approx(one.score, rel=1e-6)
    assert other.z == pytest.approx(one.z, rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_larger_random_models_have_none(seed, tmp_path):
    made = arrays(layers=4, seed=seed, channels=64, neurons=1024)
    report = scan(written(tmp_path, made, "F16"))
    assert report.candidates == () and len(report.notes) == 1
    # nor one without gates, where the logarithm of the scores hardly varies
    alone = {name: values for name, values in made.items() if "gate_proj" not in name}
    assert scan(written(tmp_path, alone, "BF16")).candidates == ()


def test_rows_that_share_a_neuron_are_listed_where_they_come_close(tmp_path):
    made = arrays()
    raise_neuron(made, 0, {2: 4.0, 5: -3.0, 7: 1.0}, 11)
    first, second = scan(written(tmp_path, made)).candidates
    assert [(c.row, c.col, c.value, c.rank) for c in (first, second)] == [(2, 11, 4.0, 1), (5, 11, -3.0, 2)]
    assert first.score / second.score == pytest.approx(4 / 3)


def test_candidates_are_ordered_by_z_and_cut_at_top_and_min_z(tmp_path):
    made = arrays(layers=3)
    for layer, value in ((0, 2.0), (1, 8.0), (2, 4.0)):
        raise_neuron(made, layer, {1: value, 3: value * 1.5}, 6)
        made[f"model.layers.{layer}.mlp.down_proj.weight"][0, 0] = 9.0  # large, but of a usual neuron
    folder = written(tmp_path, made)
    everything = scan(folder, top=100).candidates
    assert {(c.layer, c.row, c.col) for c in everything} >= {(n, row, 6) for n in range(3) for row in (1, 3)}
    by_z = [c.z for c in everything]
    assert by_z == sorted(by_z, reverse=True) and by_z[-1] >= MIN_Z
    planted = [c for c in everything if c.col == 6]
    assert [(c.row, c.rank) for c in planted if c.layer == 2] == [(3, 2), (1, 3)]
    assert scan(folder, top=2).candidates == everything[:2]
    assert scan(folder, min_z=by_z[3], top=100).candidates == everything[:4]


def test_what_is_not_finite_is_left_out_and_counted(tmp_path):
    made = arrays()
    made["model.layers.0.mlp.down_proj.weight"][3, 4] = np.nan
    made["model.layers.1.mlp.down_proj.weight"][3, 5] = np.inf
    made["model.layers.1.mlp.gate_proj.weight"][6] = 0
    for dtype in ("F16", "BF16", "F64"):
        report = scan(written(tmp_path, made, dtype))
        assert report.candidates == ()
        assert report.notes[0] == "3 neurons have no finite score above 0 and were left out"
    report = scan(written(tmp_path, {name: values * 0 for name, values in arrays().items()}))
    assert report.candidates == ()
    assert report.notes[-1] == "no super weight: no neuron has a finite score above 0"


# What it tells and what it refuses -----------------------------------------------------------------------------------


class Recorder:
    def __init__(self):
        self.total, self.done, self.closed = None, 0, 0

    def start(self, total, unit, label):
        assert unit == "B"
        self.total = total

    def relabel(self, label):
        pass

    def advance(self, n):
        assert self.closed == 0
        self.done += n

    def close(self):
        self.closed += 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "phi3", "qwen2_moe"])
def test_progress_counts_the_mlps_bytes_once(family, tiny):
    recorder = Recorder()
    scan_weights(open_checkpoint(tiny(family)), progress=recorder)
    layers = FAMILIES[family](load_file(tiny(family) / "model.safetensors"))
    matrices = [m for n in layers for m in ((n.gate, n.down) if n.gate is n.up else (n.gate, n.up, n.down))]
    assert recorder.total == recorder.done == 4 * sum(m.numel() for m in matrices)
    assert recorder.closed == 1


def test_a_file_that_ends_early_is_one_line_and_closes_the_bar(tmp_path):
    class Truncating(Recorder):
        def start(self, total: int, unit: str, label: str) -> None:
            super().start(total, unit, label)
            os.truncate(tmp_path / "model.safetensors", 12000)

    checkpoint, recorder = open_checkpoint(written(tmp_path, arrays())), Truncating()
    with pytest.raises(CheckpointError, match="was changed or replaced while it was read"):
        scan_weights(checkpoint, progress=recorder)
    assert recorder.closed == 1


@pytest.mark.parametrize("limits", [{"top": 0}, {"min_z": 0}, {"min_z": float("nan")}, {"threads": 0}])
def test_senseless_limits(limits, tmp_path):
    with pytest.raises(ValueError, match="must be positive"):
        scan(written(tmp_path, arrays()), **limits)


MLP = "model.layers.1.mlp."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{MLP}up_proj.weight"), rf"known name: {MLP}down_proj.weight \(looked for {MLP}gate_proj"
         rf".weight and {MLP}up_proj.weight or {MLP}gate_up_proj.weight or {MLP}up_proj.weight; scan by activations\)"),
        (lambda t: t.update({f"{MLP}gate_proj.weight": tensor("F32", 40, CHANNELS)}),
         rf"shape \[40, 13\] is not \[41, 13\], which {MLP}down_proj.weight needs: {MLP}gate_proj.weight"),
        (lambda t: t.update({f"{MLP}gate_proj.weight": tensor("F32", NEURONS)}),
         rf"a matrix of an MLP cannot have the shape \[41\]: {MLP}gate_proj.weight"),
        (lambda t: t.update({f"{MLP}gate_proj.weight": tensor("I8", NEURONS, CHANNELS)}),
         rf"I8 numbers are not weights: {MLP}gate_proj.weight \("),
        (lambda t: t.update({f"{MLP}up_proj.weight_scale_inv": tensor("F32", 1, 1)}),
         rf"quantised: {MLP}up_proj.weight_scale_inv is stored beside it, .*: {MLP}up_proj.weight \("),
        (lambda t: t.update({"model.layers.1.post_attention_layernorm.weight": tensor("F32", 7)}),
         r"F32 \[7\] is not the gain of 13 channels: model.layers.1.post_attention_layernorm.weight"),
        (lambda t: t.update({f"{MLP}down_proj.qweight": tensor("I32", 3, 3)}), "is packed"),
        (lambda t: [t.update({name: ("F32", (13, 0), b"")}) for name in t if "down_proj" in name],
         "every down projection is empty"),
    ],
    ids=["no up", "rows", "rank", "integers", "scaled", "norm", "packed", "empty"],
)  # fmt: skip
def test_refusals(change, message, tmp_path):
    stored = {name: ("F32", v.shape, v.astype("<f4").tobytes()) for name, v in arrays().items()}
    change(stored)
    write_single(tmp_path, stored, {"hidden_size": CHANNELS, "num_hidden_layers": 2})
    with pytest.raises(ArchitectureError, match=message):
        scan(tmp_path)


def test_torch_is_not_needed(tmp_path):
    code = (
        "import sys; from pathlib import Path; from swsurgery.checkpoint.opening import open_checkpoint\n"
        "from swsurgery.scanning.by_weights import scan_weights\n"
        "print(scan_weights(open_checkpoint(Path(sys.argv[1]))).layers, 'torch' in sys.modules)"
    )
    folder = written(tmp_path, arrays())
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]


@pytest.mark.model
@pytest.mark.skipif("SWSURGERY_TEST_MODEL" not in os.environ, reason="SWSURGERY_TEST_MODEL names no model")
def test_smollm2s_are_on_top():
    report = scan(Path(os.environ["SWSURGERY_TEST_MODEL"]))
    assert report.settings["scalars"] == 26_542_080
    assert [(c.layer, c.row, c.col, c.value) for c in report.candidates] == [
        (28, 507, 678, -5.78125), (11, 507, 1229, 5.875), (11, 507, 1487, 6.0625), (2, 507, 430, -5.3125),
        (2, 507, 90, 5.09375), (9, 507, 200, 4.65625),
    ]  # fmt: skip
