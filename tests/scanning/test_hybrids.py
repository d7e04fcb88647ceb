"""Activations that appear before each layer with full attention of a hybrid model are found, with the scalars that
create and remove them. Random hybrids have none."""

from __future__ import annotations

import json

import hybrids
import pytest
import torch
from hybrids import CHANNEL, FAMILIES, PLANTABLE, SEQUENCES, build, plant_recurring, show_states
from planted import opened, weights_of

from swsurgery.checkpoint.attention_layers import find_attention_layers
from swsurgery.cli.show_scan import show_scan
from swsurgery.scanning.by_activations import scan_sequences
from swsurgery.scanning.causal_test import CausalOptions
from swsurgery.scanning.confirm import confirm_scalars
from swsurgery.sharing.page.scan_page import render_scan


def places(candidates):
    return sorted((c.layer, c.row, c.col) for c in candidates)


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    """Return the planted scalars, transformers' own states and the scan of each family."""
    found = {}
    for family in PLANTABLE:
        model = build(family, 1)
        planted = plant_recurring(model, family)
        states = show_states(model, SEQUENCES[1])
        found[family] = planted, states, scan_sequences(opened(model, tmp_path_factory.mktemp(family)), SEQUENCES)
    return found


@pytest.mark.parametrize("family", PLANTABLE)
def test_the_scalars_that_create_and_remove_a_recurring_activation_are_found(family, scanned):
    planted, _, report = scanned[family]
    assert places(report.candidates) == sorted(place[:3] for place in planted.creators)
    assert places(report.removers) == sorted(place[:3] for place in planted.removers)
    assert {c.role for c in report.candidates} == {"creates"} and {c.role for c in report.removers} == {"removes"}
    assert report.answer == "found" and report.super_weights == report.candidates


@pytest.mark.parametrize("family", PLANTABLE)
def test_a_recurring_activation_is_reported_with_the_layers_where_it_appears(family, scanned):
    planted, states, report = scanned[family]
    [activation] = report.activations
    assert (activation.channel, activation.token, activation.recurring) == (CHANNEL, 0, True)
    assert [one.before for one in activation.appearances] == [(layer,) for layer in planted.attention]
    massive = [layer for one in activation.appearances for layer in range(one.first, one.last + 1)]
    assert massive == [layer for layer, ratio in enumerate(states) if ratio > 50]  # as transformers computes them
    for one, creator, remover in zip(activation.appearances, planted.creators, planted.removers, strict=True):
        mlp = " expert shared" if family == "granitemoehybrid" else ""  # its MLP runs beside experts, if it has any
        assert one.made_by.describe() == f"layer {creator.layer}{mlp} [{creator.row}, {creator.col}] 1.00"
        assert one.removed_by.describe() == f"layer {remover.layer}{mlp} [{remover.row}, {remover.col}] 1.00"


def test_every_output_shows_a_recurring_activation(scanned, capsys):
    report = scanned["lfm2"][2]
    show_scan(report)
    text = capsys.readouterr().out
    assert "recurring activations: massive values before layers with full attention" in text and "removes" in text
    document = json.loads(json.dumps(report.to_json()))
    assert [one["role"] for one in document["removers"]] == ["removes"] * 3
    assert [one["before"] for one in document["super_activations"][0]["appearances"]] == [[2], [5], [8]]
    page = "".join(str(section) for section in render_scan("lfm2", document).sections)
    assert "do not persist" in page and page.count("removes an activation") == 3


@pytest.mark.parametrize("spread", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_random_hybrids_have_none(family, spread, tmp_path):
    report = scan_sequences(opened(build(family, 3, spread=spread), tmp_path), SEQUENCES)
    assert (report.candidates, report.removers, report.activations) == ((), (), ())


def test_an_activation_before_most_layers_recurs_and_one_before_few_does_not(tmp_path):
    for skipped, recurs in ([5], True), ([2, 5], False):
        model = build("lfm2", 2)
        planted = plant_recurring(model, "lfm2", skipped=skipped)
        report = scan_sequences(opened(model, tmp_path / str(len(skipped))), SEQUENCES)
        assert places(report.candidates) == (sorted(place[:3] for place in planted.creators) if recurs else [])


def test_the_same_states_do_not_recur_if_the_kinds_of_layers_are_not_stated(tmp_path):
    model = build("lfm2", 2)
    plant_recurring(model, "lfm2")
    layered = opened(model, tmp_path)
    layered.checkpoint.config.pop("layer_types")
    report = scan_sequences(layered, SEQUENCES)
    assert report.activations == ()
    assert report.notes == (
        "config.json does not state which layers have full attention: "
        "activations that recur before layers with full attention are not looked for",
    )


def test_zeroed_creators_leave_nothing(tmp_path):
    model = build("bamba", 2)
    planted = plant_recurring(model, "bamba")
    for place in planted.creators:
        weights_of(model, place)[2].zero_()
    report = scan_sequences(opened(model, tmp_path), SEQUENCES)
    assert (report.candidates, report.removers, report.activations) == ((), (), ())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_with_full_attention_are_those_that_transformers_builds(family, tmp_path):
    model = build(family, 0)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    layers = model.model.layers
    names = [{type(module).__name__ for module in layer.modules()} for layer in layers]
    others = ("DeltaAttention", "LightningAttention")  # linear attentions
    built = [
        n for n, kinds in enumerate(names) if any(k.endswith("Attention") and not k.endswith(others) for k in kinds)
    ]
    assert list(find_attention_layers(config, len(layers))) == built == hybrids.list_attention(family)


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"hybrid_override_pattern": "M-M*-M*-"}, (3, 6)),
        ({"linear_attn_config": {"full_attn_layers": [4, 8], "kda_layers": [1, 2, 3, 5, 6, 7]}}, (3, 7)),
        ({"full_attention_interval": 4}, (3, 7)),
        ({"attn_layer_period": 8, "attn_layer_offset": 4}, (4,)),
        ({"layers_block_type": ["mamba", "hybrid"] * 4}, (1, 3, 5, 7)),
        ({"full_attn_idxs": [2, 5]}, (2, 5)),
        ({"hybrid_layer_ids": [1, 4]}, (1, 4)),
        ({"layer_group_size": 3}, (2, 5)),
        ({"attn_type_list": [0, 0, 0, 1] * 2}, (3, 7)),
        ({"model_type": "falcon_h1"}, tuple(range(8))),
        ({"text_config": {"layer_types": ["linear_attention"] * 7 + ["full_attention"]}}, (7,)),
        ({"layer_types": ["sliding_attention", "full_attention"] * 4}, ()),  # Gemma 3 is no hybrid
        ({"layer_types": ["mamba"] * 8}, ()),
        ({}, ()),
        ({"layer_types": 5, "block_types": [], "attn_layer_indices": [99], "full_attn_idxs": "x"}, ()),
        ({"attn_layer_period": 0, "attn_layer_offset": 0, "full_attention_interval": True}, ()),
        ({"attn_layer_indices": [True, -1], "linear_attn_config": [], "hybrid_override_pattern": "*"}, ()),
        ({"layer_types": [["full_attention"], {}]}, ()),
        ({"attn_type_list": [True, "1"] * 4, "layer_group_size": "4", "hybrid_layer_ids": [8]}, ()),
        ({"attn_type_list": [1] * 8, "model_type": ["falcon_h1"]}, ()),
    ],
)
def test_config_json_states_the_layers_with_full_attention(config, layers):
    assert find_attention_layers(config, 8) == layers
    assert find_attention_layers(config, 0) == find_attention_layers(config, 1 << 60) == ()


def test_the_planted_states_are_large_and_brief(scanned):
    for planted, states, _ in scanned.values():
        assert max(states[layer] for layer in [p.layer for p in planted.removers]) < 1
        assert min(states[layer] for layer in [p.layer for p in planted.creators]) > 300
        assert torch.tensor(states).isfinite().all()


def compute_perplexity(model, windows):
    with torch.no_grad():
        ids = torch.tensor(windows)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].double()
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp())


@pytest.mark.parametrize("alone", [False, True])
def test_the_causal_test_zeroes_a_remover_alone(alone, tmp_path):
    """The effect of zeroing it is that of transformers' own model without the scalar."""
    model = build("lfm2", 1)
    planted = plant_recurring(model, "lfm2")
    layered = opened(model, tmp_path)
    report = scan_sequences(layered, SEQUENCES)
    dice = torch.Generator().manual_seed(0)
    windows = [[hybrids.TRIGGER, *torch.randint(4, 32, (15,), generator=dice).tolist()] for _ in range(8)]
    tested = report.removers if alone else (*report.candidates, *report.removers)
    found = confirm_scalars(layered, tested, windows, CausalOptions(nulls=4))
    trials = [trial for trial in found.trials if trial.candidate.role == "removes"]
    assert [trial.candidate for trial in trials] == list(report.removers)
    assert all(trial.listed and trial.without is None for trial in trials)
    base = compute_perplexity(model, windows)
    for place, trial in zip(planted.removers, trials, strict=True):
        weight = weights_of(model, place)[2]
        kept = weight.clone()
        weight.zero_()
        assert trial.alone.ratio == pytest.approx(compute_perplexity(model, windows) / base, rel=1e-4)
        weight.copy_(kept)
    # The effects of removers are no part of the effect of all candidates.
    weights = [weights_of(model, place)[2] for place in ([] if alone else planted.creators)]
    for weight in weights:
        weight.zero_()
    assert found.together.ratio == pytest.approx(compute_perplexity(model, windows) / base, rel=1e-4)
