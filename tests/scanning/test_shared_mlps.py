"""Massive outputs of the MLPs that the layers of Zamba share are found, with the scalar that makes them."""

from __future__ import annotations

import json

import hybrids
import pytest
import torch
from hybrids import CHANNEL, NEURON, SEQUENCES, SHARED, build, get_shared_mlp, list_uses, plant_shared, run_shared
from planted import opened

from swsurgery.cli.show_scan import show_scan
from swsurgery.scanning.by_activations import scan_sequences
from swsurgery.scanning.causal_test import CausalOptions
from swsurgery.scanning.confirm import confirm_scalars
from swsurgery.sharing.page.scan_page import render_scan


def scan(model, folder):
    return scan_sequences(opened(model, folder), SEQUENCES)


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    """Return the planted scalar, the uses of its MLP, transformers' own outputs in them, and the scan."""
    found = {}
    for family in SHARED:
        model = build(family, 1, periods=4)
        place, uses = plant_shared(model)
        sequence = SEQUENCES[0]
        outputs = [output for _, output in run_shared(model, sequence, uses)]
        found[family] = place, uses, outputs, scan(model, tmp_path_factory.mktemp(family))
    return found


@pytest.mark.parametrize("family", SHARED)
def test_the_scalar_is_found_with_each_layer_that_uses_it(family, scanned):
    place, uses, outputs, report = scanned[family]
    assert uses == {"zamba": [2, 5, 8, 11], "zamba2": [2, 8]}[family]  # Zamba 2 has two blocks, which take turns
    [candidate] = report.candidates
    assert (candidate.layer, candidate.row, candidate.col, candidate.role) == (*place[:3], "creates")
    [activation] = report.activations
    assert (activation.stream, activation.channel, activation.recurring) == ("shared MLP", CHANNEL, True)
    assert (activation.layer, activation.first, activation.last) == (uses[0], uses[0], uses[-1])
    assert [(one.first, one.last) for one in activation.appearances] == [(layer, layer) for layer in uses]
    causes = [one.made_by for one in activation.appearances]
    assert {(one.kind, one.layer, one.row, one.cols) for one in causes} == {("scalar", 2, CHANNEL, (NEURON,))}
    assert min(one.shares[0] for one in causes) > 0.9
    if (activation.prompt, activation.token) == (0, 0):
        values = [one.value for one in activation.appearances]
        assert values == pytest.approx([float(output[CHANNEL]) for output in outputs], rel=1e-4)
    assert report.answer == "found" and report.unread == report.notes == ()


def test_a_further_channel_of_the_same_neuron_is_a_side_effect(tmp_path):
    model = build("zamba", 1, periods=4)
    place, uses = plant_shared(model, 20_000)
    down = get_shared_mlp(model, uses[0]).down_proj.weight
    with torch.no_grad():
        down[CHANNEL + 1, NEURON] = 0.05 * down[CHANNEL, NEURON]
    report = scan(model, tmp_path)
    assert [(c.layer, c.row, c.col) for c in report.candidates] == [place[:3]]
    assert [(a.channel, a.side) for a in report.activations] == [(CHANNEL, False), (CHANNEL + 1, True)]


@pytest.mark.parametrize("family", SHARED)
def test_nothing_is_left_without_the_scalar(family, tmp_path):
    model = build(family, 2)
    place, uses = plant_shared(model)
    with torch.no_grad():
        get_shared_mlp(model, uses[0]).down_proj.weight[place.row, place.col] = 0.0
    report = scan(model, tmp_path)
    assert (report.candidates, report.activations, report.answer) == ((), (), "none")


def test_a_block_that_one_layer_uses_is_not_read(tmp_path):
    model = build("zamba2", 1, periods=2)
    assert list_uses(model) == [2]
    assert scan(model, tmp_path).notes == ("layers 2, 5: the down projection is not observed",)


def plant_in_first_uses(count):
    """Plant a massive output in the first `count` of five uses. The adapters of the other uses turn the neuron off."""
    model = build("zamba2", 1, periods=10)
    place, uses = plant_shared(model)
    assert len(uses) == 5
    for use in uses[count:]:
        mlp = get_shared_mlp(model, use)
        adapter = mlp.gate_up_proj_adapter_list[mlp.layer_dic[use]]
        with torch.no_grad():
            adapter[0].weight[:] = mlp.gate_up_proj.weight[NEURON]
            adapter[1].weight[NEURON] = -1.0 / len(adapter[0].weight)
    outputs = [output for _, output in run_shared(model, SEQUENCES[0], uses)]
    massive = [float(y[CHANNEL].abs() / y.abs().median()) > 100 for y in outputs]
    assert massive == [True] * count + [False] * (5 - count)
    return model, place, uses


def test_an_output_that_is_massive_in_few_uses_does_not_recur(tmp_path):
    assert scan(plant_in_first_uses(2)[0], tmp_path).activations == ()


def test_an_output_that_a_mixer_turns_into_a_persistent_state_counts(tmp_path):
    model, place, uses = plant_in_first_uses(1)
    out_proj = model.model.layers[uses[0]].mamba_decoder.mamba.out_proj
    kept = []
    handle = out_proj.register_forward_hook(lambda m, arguments, output: kept.append(arguments[0][0]))
    run_shared(model, SEQUENCES[0], uses)
    handle.remove()
    first, *others = kept[0]
    direction = first - torch.stack(others).mean(0)
    with torch.no_grad():
        out_proj.weight[20] = 10_000 * direction / (direction @ first)
    report = scan(model, tmp_path)
    assert [(c.layer, c.row, c.col) for c in report.candidates] == [place[:3]]
    found = {one.stream: one for one in report.activations if not one.side}
    assert (found["residual"].channel, found["residual"].layer, found["residual"].cause.kind) == (20, 2, "attention")
    assert [one.first for one in found["shared MLP"].appearances] == uses[:1]


def test_every_output_shows_it(scanned, capsys):
    report = scanned["zamba2"][3]
    show_scan(report)
    text = capsys.readouterr().out
    assert "activations of shared MLPs: massive outputs in the layers that use the MLP" in text
    document = json.loads(json.dumps(report.to_json()))
    [activation] = document["super_activations"]
    assert (activation["stream"], activation["made_by"]) == ("shared MLP", "layer 2 [5, 7] 1.00")
    page = "".join(str(section) for section in render_scan("zamba2", document).sections)
    assert "Massive outputs of MLPs that several layers share" in page and "before layers with full" not in page


def test_the_causal_test_zeroes_the_scalar_in_every_use(tmp_path):
    """The effect is that of transformers' own model without the scalar."""
    model = build("zamba", 1, periods=4)
    place, uses = plant_shared(model)
    layered = opened(model, tmp_path)
    candidates = scan_sequences(layered, SEQUENCES).candidates
    dice = torch.Generator().manual_seed(0)
    windows = [[hybrids.TRIGGER, *torch.randint(4, 32, (11,), generator=dice).tolist()] for _ in range(8)]
    [trial, *_] = confirm_scalars(layered, candidates, windows, CausalOptions(nulls=2)).trials

    def compute_loss():
        with torch.no_grad():
            ids = torch.tensor(windows)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].double()
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    before = compute_loss()
    with torch.no_grad():
        get_shared_mlp(model, uses[0]).down_proj.weight[place.row, place.col] = 0.0
    assert trial.alone.ratio == pytest.approx(float((compute_loss() - before).exp()), rel=1e-4)
