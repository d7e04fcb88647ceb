"""Models with a norm behind the MLP: what reaches the residual stream depends on that norm's gain too.

The oracles are the hidden states of transformers (in planted.py) and the scan by activations.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from planted import SEQUENCES, Place, build, is_super_activation, opened, plant, weights_of
from torch import Tensor
from transformers import PreTrainedModel

from swsurgery.scanning.by_activations import scan_sequences
from swsurgery.scanning.by_weights import NORM_BEHIND, ONE_PLUS, scan_weights
from swsurgery.scanning.report import Scan

FAMILIES = {
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4"), "post_feedforward_layernorm"),
    "glm4": "post_mlp_layernorm",
}
CHANNELS, NEURONS = 16, 24
Found = list[tuple[int, int, int]]


def gain_behind(model: PreTrainedModel, family: str, layer: int) -> Tensor:
    return getattr(model.model.layers[layer], FAMILIES[family]).weight.data


def places(report: Scan) -> Found:
    return [(c.layer, c.row, c.col) for c in report.candidates]


def both(model: PreTrainedModel, folder: Path) -> tuple[Found, Scan]:
    """What the scan by activations finds, and the report of the scan by weights."""
    layered = opened(model, folder)
    return places(scan_sequences(layered, SEQUENCES)), scan_weights(layered.checkpoint)


def random_place(family: str, seed: int) -> Place:
    dice = random.Random(f"{family} {seed}")
    return Place(dice.randrange(2), dice.randrange(CHANNELS), dice.randrange(NEURONS))


def plant_behind_norm(model: PreTrainedModel, family: str, place: Place, down: float) -> None:
    """Align and raise the neuron's inputs, set its down weight, and raise the gain until the activation persists."""
    gate, up, weight = weights_of(model, place)
    kept, gain = gate.clone(), gain_behind(model, family, place.layer)
    for sign in (1.0, -1.0):
        gate.copy_(20 * sign * kept)
        up.copy_(gate)
        weight.fill_(down)
        gain[place.row] = 1.0
        for _ in range(14):
            if is_super_activation(model, place):
                return
            gain[place.row] *= 2
    raise AssertionError(f"no token turns on the neuron at {place}")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_planted_super_weight_is_found_by_both_scans(family, seed, tmp_path):
    place = random_place(family, seed)
    model = build(family, seed)
    plant_behind_norm(
        model, family, place, 10 * float(model.model.layers[place.layer].mlp.down_proj.weight.data.abs().max())
    )
    by_activations, by_weights = both(model, tmp_path)
    assert by_activations == places(by_weights) == [place[:3]]
    assert NORM_BEHIND.format(FAMILIES[family]) in by_weights.notes


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_of_usual_size_is_found_if_its_channel_has_a_large_gain(family, tmp_path):
    """Its magnitude is below its column's largest: only the gain makes it a super weight."""
    place = random_place(family, 7)
    model = build(family, 7)
    down = model.model.layers[place.layer].mlp.down_proj.weight.data
    down[place.row] *= 0.02  # no other neuron writes to the channel
    plant_behind_norm(model, family, place, 0.9 * float(down[:, place.col].abs().max()))
    report = scan_weights(opened(model, tmp_path).checkpoint)
    assert places(report)[0] == place[:3]
    first = report.candidates[0]
    assert first.value == pytest.approx(float(down[place.row, place.col]))
    assert first.rank == 1 + int((down.abs() > down[place.row, place.col].abs()).sum()) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_large_weight_is_not_found_if_its_channel_has_no_gain(family, tmp_path):
    place = random_place(family, 9)
    model = build(family, 9)
    gate, up, down = weights_of(model, place)
    gate *= 20
    up.copy_(gate)
    down.fill_(10 * float(model.model.layers[place.layer].mlp.down_proj.weight.data.abs().max()))
    gain_behind(model, family, place.layer)[place.row] = -1.0 if family.startswith("gemma") else 0.0
    by_activations, report = both(model, tmp_path)
    assert by_activations == []
    assert place[:3] not in places(report)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_and_gains_have_none_and_the_evidence_is_called_weak(family, tmp_path):
    for seed in range(3):
        model = build(family, seed)
        chance = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=chance)
        by_activations, report = both(model, tmp_path / str(seed))
        assert by_activations == places(report) == []
        assert NORM_BEHIND.format(FAMILIES[family]) in report.notes


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_faint_one_is_found_or_the_evidence_is_called_weak(family, seed, tmp_path):
    """The whole channel has a large gain, so the neuron hardly differs from the others that write to it."""
    place = random_place(family, seed)
    model = build(family, seed)
    gain_behind(model, family, place.layer)[place.row] = 3000.0
    plant(model, place)
    _, report = both(model, tmp_path)
    assert places(report) in ([], [place[:3]])
    assert any("weaker evidence" in note for note in report.notes)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_other_models_get_no_such_note(family, tmp_path):
    notes = scan_weights(opened(build(family), tmp_path).checkpoint).notes
    assert not any("weaker evidence" in note for note in notes)


def test_a_model_that_normalises_each_sum_gets_a_note(tmp_path):
    model = build("opt", do_layer_norm_before=False)
    notes = scan_weights(opened(model, tmp_path).checkpoint).notes
    assert any("do_layer_norm_before" in note and "weaker evidence" in note for note in notes)


NORMS = {
    "gemma": ("gemma", "GemmaRMSNorm"),
    "gemma2": ("gemma2", "Gemma2RMSNorm"),
    "gemma3": ("gemma3", "Gemma3RMSNorm"),
    "gemma3_text": ("gemma3", "Gemma3RMSNorm"),
    "vaultgemma": ("vaultgemma", "VaultGemmaRMSNorm"),
    "nemotron": ("nemotron", "NemotronLayerNorm1P"),
    "recurrent_gemma": ("recurrent_gemma", "RecurrentGemmaRMSNorm"),
    "qwen3_next": ("qwen3_next", "Qwen3NextRMSNorm"),
    "qwen3_5": ("qwen3_5", "Qwen3_5RMSNorm"),
    "qwen3_5_text": ("qwen3_5", "Qwen3_5RMSNorm"),
    "qwen3_5_moe": ("qwen3_5_moe", "Qwen3_5MoeRMSNorm"),
    "qwen3_5_moe_text": ("qwen3_5_moe", "Qwen3_5MoeRMSNorm"),
    "minimax_m3_vl": ("minimax_m3_vl", "MiniMaxM3VLRMSNorm"),
    "minimax_m3_vl_text": ("minimax_m3_vl", "MiniMaxM3VLRMSNorm"),
    "muse_glimmer": ("muse_glimmer", "MuseGlimmerTextCenteredRMSNorm"),
    "muse_glimmer_text": ("muse_glimmer", "MuseGlimmerTextCenteredRMSNorm"),
    "step3p7": ("step3p7", "Step3p7RMSNorm"),
    "step3p5": ("step3p7", "Step3p7RMSNorm"),
}


@pytest.mark.parametrize("model_type", ONE_PLUS)
def test_these_norms_multiply_by_one_plus_the_weight(model_type):
    folder, name = NORMS[model_type]
    module = pytest.importorskip(f"transformers.models.{folder}.modeling_{folder}")
    norm = getattr(module, name)(4)
    x = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    with torch.no_grad():
        norm.weight.zero_()
        plain = norm(x)
        norm.weight.fill_(1.0)
        assert plain.abs().min() > 0
        assert torch.allclose(norm(x), 2 * plain)


UNKNOWN = {"t5gemma", "t5gemma2", "videoprism", "muse_spark", "qwen4_exp"}
"""Folders of transformers with such norms whose MLPs or norms a scan of the weights does not know by name."""


def test_no_family_of_transformers_with_such_norms_is_missing():
    transformers = pytest.importorskip("transformers")
    folders = Path(transformers.__file__).parent / "models"
    one_plus = re.compile(r"\(1(\.0)? \+ self\.weight|self\.weight \+ 1\b")
    found = {p.parent.name for p in folders.glob("*/modeling_*.py") if one_plus.search(p.read_text("utf-8"))}
    assert found - UNKNOWN <= {folder for folder, _ in NORMS.values()}
    assert {"gemma2", "qwen3_next"} <= found
