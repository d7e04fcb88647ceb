"""A neuron that is made into a super weight is found at its exact place, and nowhere else; where none is, none is
found."""

from __future__ import annotations

import random

import pytest
import torch
from planted import SEQUENCES, Place, build, coordinate_of, opened, plant, weights_of

from swsurgery.scanning.by_activations import scan_sequences
from swsurgery.scanning.report import Scan

PLACEMENTS = 20
FAMILIES = {  # name: neurons, experts, and settings that differ from those of tiny_models
    "llama": (24, None, {}),
    "gpt2": (24, None, {}),
    "gpt_neox": (24, None, {}),
    "mixtral": (24, 4, {"num_experts_per_tok": 2}),
}


def found(report: Scan) -> list:
    return [candidate.coordinate for candidate in report.candidates]


@pytest.mark.parametrize("seed", range(PLACEMENTS))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_planted_super_weight_is_found_where_it_is(family, seed, tmp_path):
    neurons, experts, settings = FAMILIES[family]
    dice = random.Random(f"{family} {seed}")
    expert = None if experts is None else dice.randrange(experts)
    place = Place(dice.randrange(2), dice.randrange(16), dice.randrange(neurons), expert)
    model = build(family, seed, **settings)
    value = plant(model, place)
    layered = opened(model, tmp_path)

    report = scan_sequences(layered, SEQUENCES)

    [candidate] = report.candidates
    assert candidate.coordinate == coordinate_of(layered.checkpoint, place)
    assert (candidate.layer, candidate.row, candidate.col, candidate.expert) == place
    assert candidate.value == pytest.approx(value)
    assert (candidate.round, candidate.rank) == (1, 1)
    assert candidate.share == pytest.approx(1, abs=0.2)
    assert [(a.layer, a.channel) for a in report.activations] == [(place.layer, place.row)]


ALTERNATING = {"layer_types": ["conv", "full_attention"] * 3}
HYBRID = {"layers_block_type": ["mamba", "moe", "mlp", "moe", "attention", "mlp"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 3, "mlp_layer_types": ["dense"] + ["sparse"] * 5}
OTHERS = [
    ("lfm2", Place(2, 5, 7), ALTERNATING),
    ("lfm2_moe", Place(2, 5, 7, 1), ALTERNATING),
    ("nemotron", Place(2, 5, 7), {}),
    ("nemotron_h", Place(2, 5, 7), HYBRID),
    ("nemotron_h", Place(1, 5, 7, 1), HYBRID),
    ("nemotron_h", Place(1, 5, 7, "shared"), HYBRID),
    ("jamba", Place(1, 5, 7, 1), {}),
    ("jamba", Place(2, 5, 7), {}),
    ("kimi_linear", Place(1, 5, 7, 1), LINEAR),
    ("kimi_linear", Place(1, 5, 7, "shared"), LINEAR),
    ("hunyuan_v1_moe", Place(1, 5, 7, "shared"), {}),
    ("longcat_flash", Place(1, 5, 7, 1), {}),  # with two experts that return their input
    ("recurrent_gemma", Place(1, 5, 7), {}),
    ("modernbert-decoder", Place(1, 5, 7), {}),
    ("phi4_multimodal", Place(1, 5, 7), {}),
]


@pytest.mark.parametrize(("family", "place", "settings"), OTHERS, ids=[f"{o[0]}-{o[1].expert}" for o in OTHERS])
def test_a_planted_super_weight_of_another_family_is_found(family, place, settings, tmp_path):
    model = build(family, 0, **settings)
    plant(model, place)
    report = scan_sequences(opened(model, tmp_path), SEQUENCES)
    [candidate] = report.candidates
    assert (candidate.layer, candidate.row, candidate.col, candidate.expert) == place


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_have_none(family, tmp_path):
    for seed in range(5):
        report = scan_sequences(opened(build(family, seed, **FAMILIES[family][2]), tmp_path / str(seed)), SEQUENCES)
        assert found(report) == [] == list(report.activations)


@pytest.mark.parametrize("spread", [0.02, 1.0])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma3_text", "olmo2", "qwen3"])
def test_random_weights_of_any_size_have_none(family, spread, tmp_path):
    """The smaller spread is how transformers begins; with the larger one, hidden states grow from layer to layer."""
    for seed in range(3):
        model = build(family, seed, **FAMILIES.get(family, (0, 0, {}))[2])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, spread)
        report = scan_sequences(opened(model, tmp_path / str(seed)), SEQUENCES)
        assert found(report) == [] == list(report.activations)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_planted_super_weight_that_is_zeroed_is_none(family, tmp_path):
    experts, settings = FAMILIES[family][1:]
    for seed in range(3):
        place = Place(1, seed, 2 * seed, experts and seed)
        model = build(family, seed, **settings)
        plant(model, place)
        weights_of(model, place)[2].zero_()
        assert found(scan_sequences(opened(model, tmp_path / str(seed)), SEQUENCES)) == []
