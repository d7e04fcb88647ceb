"""What the scan by activations measures, in which rounds, for which architectures, and when it finds nothing."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_checkpoint
import torch
from planted import SEQUENCES, Place, build, coordinate_of, opened, plant, weights_of
from safetensors.torch import load_file

from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.errors import ModelError, pluralise
from swsurgery.model import load
from swsurgery.scanning import causes as causes_module
from swsurgery.scanning import sources, spikes
from swsurgery.scanning.by_activations import SCAN_PROMPTS, scan_activations, scan_sequences
from swsurgery.scanning.causes import Decomposition, RowTerm
from swsurgery.scanning.report import Scan
from swsurgery.scanning.spikes import LayerSpikes

MODEL = os.environ.get("SWSURGERY_TEST_MODEL")
PLACE = Place(1, 5, 9)
INTO_OTHER = 12  # another neuron of the same layer


def places(report: Scan) -> list[tuple]:
    return [(c.layer, c.row, c.col, c.expert) for c in report.candidates]


def scanned(model, folder: Path, **how) -> Scan:
    return scan_sequences(opened(model, folder), SEQUENCES, **how)


@pytest.fixture
def llama():
    """A tiny Llama with one super weight, at PLACE."""
    model = build("llama")
    plant(model, PLACE)
    return model


# What is measured ---------------------------------------------------------------------------------------------------


def watched(model) -> list[dict]:
    """Of each sequence, by plain hooks: inputs and outputs of the down projections and what leaves the layers."""
    runs = []
    for ids in SEQUENCES:
        seen = {"x": [], "y": [], "h": []}
        handles = []
        for layer in model.model.layers:

            def note_mlp(module, arguments, output, seen=seen):
                seen["x"].append(arguments[0][0])
                seen["y"].append(output[0])

            def note(module, arguments, hidden, seen=seen):
                seen["h"].append(hidden[0])

            handles += [layer.mlp.down_proj.register_forward_hook(note_mlp), layer.register_forward_hook(note)]
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        runs.append(seen)
    return runs


def test_spikes_share_and_score_are_those_of_the_model(llama, tmp_path):
    report = scanned(llama, tmp_path)
    [found] = report.candidates
    weight = llama.model.layers[1].mlp.down_proj.weight.detach()
    runs = watched(llama)

    spikes_of_prompts = [float(run["y"][1][:, 5][run["y"][1][:, 5].abs().argmax()]) for run in runs]
    assert any(found.output_spike == pytest.approx(spike, rel=1e-4) for spike in spikes_of_prompts)
    assert found.share == pytest.approx(found.input_spike * float(weight[5, 9]) / found.output_spike, rel=1e-4)
    medians = [float(run["h"][1].abs().median()) for run in runs]
    scores = [float((run["x"][1][:, 9] * weight[5, 9]).abs().max()) / m for run, m in zip(runs, medians, strict=True)]
    assert found.score == pytest.approx(max(scores), rel=1e-3)
    assert found.rank == 1 and found.value == float(weight[5, 9])
    bars = [spikes.compute_bar(run["h"][1].abs(), m) for run, m in zip(runs, medians, strict=True)]
    massive = [float(run["h"][1][:, 5].abs().max()) >= bar for run, bar in zip(runs, bars, strict=True)]
    assert found.prompts == sum(massive) > 0


def test_the_profile_is_the_largest_of_each_layer_over_all_prompts(llama, tmp_path):
    profile = scanned(llama, tmp_path).profile
    runs = watched(llama)
    for key, figures in (("x", profile.inputs), ("y", profile.outputs), ("h", profile.residuals)):
        for layer in range(6):
            everything = torch.cat([run[key][layer].flatten() for run in runs])
            assert figures[layer] == pytest.approx(float(everything[everything.abs().argmax()]), rel=1e-4)


def test_the_activation_is_where_it_is_largest(llama, tmp_path):
    [activation] = scanned(llama, tmp_path).activations
    states = watched(llama)[activation.prompt]["h"]
    assert activation.value == pytest.approx(float(states[activation.peak][activation.token, 5]), rel=1e-4)
    assert (activation.layer, activation.channel) == (1, 5)
    assert abs(activation.value) == pytest.approx(
        max(float(h[:, 5].abs().max()) for run in watched(llama) for h in run["h"]), rel=1e-4
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # GPT-2 stores the matrix transposed
def test_the_rank_counts_larger_weights_of_the_matrix(family, tmp_path):
    model = build(family)
    plant(model, PLACE)
    gate, _, down = weights_of(model, Place(1, 2, INTO_OTHER))
    gate.zero_()  # so that nothing goes through the larger weight
    down.copy_(2 * weights_of(model, PLACE)[2])
    [found] = scanned(model, tmp_path).candidates
    assert (found.row, found.col, found.rank) == (5, 9, 2)


def test_a_report_becomes_json(llama, tmp_path):
    document = json.loads(json.dumps(scanned(llama, tmp_path).to_json(), allow_nan=False))
    [weight] = document["super_weights"]
    assert weight["tensor"] == "model.layers.1.mlp.down_proj.weight" and weight["index"] == [5, 9]
    assert document["settings"]["outstanding"] == spikes.OUTSTANDING and document["settings"]["rounds"] == 2


def test_sequences_of_any_length_are_scanned_alike(llama, tmp_path):
    layered = opened(llama, tmp_path)
    [alone] = scan_sequences(layered, SEQUENCES[2:]).candidates
    [beside] = scan_sequences(layered, [SEQUENCES[2], SEQUENCES[2], *SEQUENCES[:2]]).candidates
    assert beside.prompts >= 2 * alone.prompts == 2
    assert replace(beside, prompts=1, score=0, share=0, input_spike=0, output_spike=0) == replace(
        alone, prompts=1, score=0, share=0, input_spike=0, output_spike=0
    )


# Rounds and companions ----------------------------------------------------------------------------------------------


def twin(model, row: int, share: float) -> Place:
    """Another neuron that does what the one at PLACE does, and adds `share` of its output to channel `row`."""
    other = Place(1, row, INTO_OTHER)
    for target, source in zip(weights_of(model, other)[:2], weights_of(model, PLACE)[:2], strict=True):
        target.copy_(source)
    weights_of(model, other)[2].copy_(weights_of(model, PLACE)[2] * share)
    return other


def test_what_stands_behind_the_first_is_found_in_the_next_round(llama, tmp_path):
    weights_of(llama, PLACE)[2].mul_(20)
    hidden = twin(llama, PLACE.row, 0.1)
    report = scanned(llama, tmp_path / "both")
    assert places(report) == [PLACE, hidden]
    assert [c.round for c in report.candidates] == [1, 2] and report.settings["rounds"] == 3
    assert report.candidates[0].share == pytest.approx(10 / 11, abs=0.02)
    assert report.candidates[1].share == pytest.approx(1, abs=0.05)
    assert len(report.activations) == 1

    only = scanned(llama, tmp_path / "one", max_rounds=1)
    assert places(only) == [PLACE] and "stopped after 1 rounds" in only.notes[-1]
    assert not any("stopped" in note for note in report.notes)


def test_two_that_share_an_activation_come_together(llama, tmp_path):
    weights_of(llama, PLACE)[2].mul_(3)
    report = scanned(llama, tmp_path / "both")
    assert places(report) == [PLACE]
    second = twin(llama, PLACE.row, 0.5)
    report = scanned(llama, tmp_path / "twins")
    assert places(report) == [PLACE, second] and {c.round for c in report.candidates} == {1}


@pytest.mark.parametrize(("size", "listed"), [(0.5, True), (0.1, False)])
def test_a_channel_beside_a_much_larger_one_is_noted_and_not_listed(llama, size, listed, tmp_path):
    down = weights_of(llama, PLACE)[2]
    down.mul_(20)
    beside = Place(1, 2, 9)
    weights_of(llama, beside)[2].copy_(down * size)
    report = scanned(llama, tmp_path)
    sides = [a.channel for a in report.activations if a.side]
    if listed:
        assert places(report) == [PLACE, beside] and not sides
    else:
        assert places(report) == [PLACE] and sides == [2]


def test_what_removes_an_activation_is_named(llama, tmp_path):
    """A neuron of the last layer reads the massive channel and subtracts nearly all of it."""
    eraser = Place(5, PLACE.row, 3)
    gate, up, down = weights_of(llama, eraser)
    for weight in (gate, up):
        weight.zero_()
        weight[PLACE.row] = 3.0
    down.zero_()
    runs = watched(llama)
    number = max(range(len(runs)), key=lambda i: float(runs[i]["h"][4][:, PLACE.row].abs().max()))
    states = runs[number]["h"][4][:, PLACE.row]
    token = int(states.abs().argmax())
    if states[token] < 0:
        gate.mul_(-1)
        up.mul_(-1)
    x = float(watched(llama)[number]["x"][5][token, eraser.col])
    before = scanned(llama, tmp_path / "before")
    down.copy_(-0.95 * states[token] / x)
    report = scanned(llama, tmp_path / "after")
    assert places(report) == places(before) == [PLACE]
    assert (before.activations[0].last, report.activations[0].last) == (5, 4)
    [remover] = report.removers
    assert remover.coordinate == coordinate_of(open_checkpoint(tmp_path / "after"), eraser)
    assert (remover.role, report.candidates[0].role, before.removers) == ("removes", "creates", ())
    assert report.activations[0].removed_by.describe().startswith("layer 5 [5, 3]")
    assert report.super_weights == report.candidates  # a remover that was not confirmed is none


# When there is none -------------------------------------------------------------------------------------------------


def test_a_spike_of_the_last_layers_is_none(tmp_path):
    model = build("llama")
    place = Place(3, 5, 9)
    plant(model, place)
    report = scanned(model, tmp_path)
    assert report.candidates == report.activations == ()
    assert abs(report.profile.outputs[3]) > 100 * abs(report.profile.outputs[2])  # it was seen


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_nothing_persists_in_a_shallow_model(layers, tmp_path):
    model = build("llama", layers=layers)
    for weight in weights_of(model, Place(0, 5, 9)):
        weight.mul_(300)
    report = scanned(model, tmp_path)
    assert report.candidates == () == report.activations
    assert report.notes == (
        f"the model has {pluralise(layers, 'layer')}: too few for an activation to persist through 3 more",
    )
    assert len(report.profile.inputs) == layers


def causes(report: Scan) -> list[tuple]:
    return [(a.channel, a.first, a.layer, a.last, a.cause.kind, a.cause.layer) for a in report.activations]


def test_what_the_embedding_makes_is_no_scalar(tmp_path):
    model = build("llama")
    model.model.embed_tokens.weight.data[SEQUENCES[0][2], 6] = 5000.0
    report = scanned(model, tmp_path)
    assert report.candidates == ()
    assert causes(report) == [(6, 0, 0, 5, "embedding", 0)]
    assert report.activations[0].cause.added == 5000.0


def test_what_attention_makes_is_no_scalar(tmp_path):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[6] *= 1e5
    report = scanned(model, tmp_path)
    assert report.candidates == ()
    assert causes(report) == [(6, 1, 1, 5, "attention", 1)]
    assert report.activations[0].cause.share == pytest.approx(1, abs=0.01)


def raise_other_neurons(model, places: list[Place]) -> None:
    """Make the neurons at `places` copies of the one at PLACE, with the same down weights."""
    source = weights_of(model, PLACE)
    for place in places:
        for target, value in zip(weights_of(model, place), source, strict=True):
            target.copy_(value)


def test_a_neuron_that_makes_several_channels_is_named(llama, tmp_path):
    weights_of(llama, Place(1, 2, PLACE.col))[2].copy_(weights_of(llama, PLACE)[2])
    report = scanned(llama, tmp_path)
    assert [(a.channel, a.cause.kind, a.cause.cols[0]) for a in report.activations] == [
        (2, "neuron", PLACE.col),
        (PLACE.row, "neuron", PLACE.col),
    ]
    assert report.activations[0].cause.describe() == f"layer 1 neuron {PLACE.col}"


def test_many_scalars_of_a_row_are_named(llama, tmp_path):
    raise_other_neurons(llama, [Place(1, PLACE.row, col) for col in range(24) if col != PLACE.col])
    [activation] = scanned(llama, tmp_path).activations
    cause = activation.cause
    assert (cause.kind, cause.layer, cause.row) == ("row", 1, PLACE.row) and cause.half in (12, 13)
    assert cause.share == pytest.approx(1, abs=0.1)


def test_an_expert_is_named(tmp_path):
    model = build("mixtral", num_experts_per_tok=2)
    place = Place(1, 5, 9, 2)
    plant(model, place)
    for col in range(24):
        for target, value in zip(weights_of(model, place._replace(col=col)), weights_of(model, place), strict=True):
            target.copy_(value)
    [activation] = scanned(model, tmp_path).activations
    assert (activation.cause.kind, activation.cause.experts[0].expert) == ("expert", 2)
    assert activation.cause.experts[0].share == pytest.approx(1, abs=0.1)


def test_a_small_activation_is_found_and_explained(llama, tmp_path):
    """An activation of 40 to 80 medians persists, although it is far below those of large models."""
    down = weights_of(llama, PLACE)[2]
    ratio = scanned(llama, tmp_path / "large").activations[0].ratio
    down.mul_(60 / ratio)
    report = scanned(llama, tmp_path / "small")
    assert places(report) == [PLACE]
    assert 30 < report.activations[0].ratio < 120


# The passport -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planted", [True, False])
def test_the_passport_has_the_largest_state_of_each_prompt(planted, tmp_path):
    model = build("llama")
    if planted:
        plant(model, PLACE)
    layered = opened(model, tmp_path)
    report = scan_sequences(layered, SEQUENCES[:2], others=[[1, *ids] for ids in SEQUENCES[:2]], has_bos=False)
    runs = watched(model)
    for prompt, one in enumerate(report.passport.largest[:2]):
        states = torch.stack(runs[prompt]["h"])
        assert (one.prompt, one.bos) == (prompt, False)
        assert one.value == pytest.approx(float(states[one.layer, one.token, one.channel]), rel=1e-4)
        assert abs(one.value) == pytest.approx(float(states.abs().max()), rel=1e-4)
        assert one.ratio == pytest.approx(abs(one.value) / float(states[one.layer].abs().median()), rel=1e-3)
    assert [one.bos for one in report.passport.largest] == [False, False, True, True]
    extremes = report.passport.find_extremes()
    assert [one.bos for one in extremes] == [True, False]
    if planted:
        assert any((one.up, one.channel, one.down) == (1, PLACE.row, None) for one in extremes)
    alone = scan_sequences(layered, SEQUENCES[:2])
    assert alone.candidates == report.candidates and alone.profile == report.profile


def test_an_activation_of_many_equal_scalars_is_noted(llama, tmp_path):
    gate, up, down = weights_of(llama, PLACE)
    with torch.no_grad():
        for col in range(24):
            for target, source in zip(weights_of(llama, Place(1, 5, col)), (gate, up, down), strict=True):
                target.copy_(source)
    report = scanned(llama, tmp_path)
    assert report.candidates == () and report.activations[0].channel == 5
    assert report.activations[0].cause.kind == "row"
    assert report.notes == (
        "round 1: channel 5 persists from layer 1 on, and no scalar explains it (the largest share is 0.04)",
    )


@pytest.mark.parametrize(
    ("shares", "input_spike", "explained", "outlier", "why"),
    [
        ((), False, False, True, "the down projection was not called"),
        ((1.0,), True, False, True, "the products of the stored row do not add up to the output"),
        ((1.0,), True, True, False, "the output is below 10 times the median for its token"),
        ((1.0, 0.0), False, True, True, "the largest share is 1.00, but its input is below 10 times the median"),
        ((0.2, 0.1), True, True, True, "the largest share is 0.20"),
    ],
)
def test_a_note_names_the_condition_that_failed(shares, input_spike, explained, outlier, why):
    scalars = [RowTerm(None, 3, col, 1.0, 1.0, share, input_spike) for col, share in enumerate(shares)]
    assert Decomposition(scalars, explained, outlier, 1, ()).explain_no_maker() == why


def test_a_scalar_whose_input_is_no_outlier_is_not_refused_for_its_share(llama, tmp_path, monkeypatch):
    assert places(scanned(llama, tmp_path / "found")) == [PLACE]
    monkeypatch.setattr(causes_module, "OUTLIER", 1e9)
    (note,) = scanned(llama, tmp_path / "refused").notes
    assert note.endswith("explains it (the output is below 1e+09 times the median for its token)")


def test_a_stored_row_that_is_not_what_was_multiplied_is_not_decomposed(llama, tmp_path):
    layered = opened(llama, tmp_path)
    weights_of(llama, PLACE)[2].mul_(3)  # in memory only
    report = scan_sequences(layered, SEQUENCES)
    assert report.candidates == ()
    assert "the products of the stored row do not add up to the output" in report.notes[0]


def test_hidden_states_that_are_not_finite_are_one_line(llama, tmp_path):
    weights_of(llama, Place(2, 0, 0))[2].fill_(float("inf"))
    with pytest.raises(ModelError, match="^hidden states are not finite: layer 2 ") as refused:
        scanned(llama, tmp_path)
    assert "\n" not in str(refused.value)


def test_rounds_end_where_the_model_without_its_super_weight_is_not_finite(llama, tmp_path):
    runs = watched(llama)
    number = max(range(len(runs)), key=lambda i: float(runs[i]["h"][2][:, PLACE.row].abs().max()))
    mlp = llama.model.layers[3].mlp
    finite = mlp.forward

    def forward(x):
        spike = float(x.abs().max()) > 3.9  # a normalised state of 16 channels has length 4
        return finite(x) if spike else finite(x) * float("nan")

    mlp.forward = forward
    report = scan_sequences(opened(llama, tmp_path), [SEQUENCES[number]])
    assert places(report) == [PLACE]
    assert report.notes == ("round 2: hidden states are not finite from layer 3 on; stopped there",)


@pytest.mark.parametrize("sequences", [[], [[1, 2], []]])
def test_nothing_to_read_is_refused(llama, sequences, tmp_path):
    with pytest.raises(ModelError, match="nothing to read"):
        scan_sequences(opened(llama, tmp_path), sequences)


# Architectures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma3_text", "olmo2"])
def test_a_norm_behind_the_down_projection_may_amplify_it(family, tmp_path):
    """The norm brings every token's output to the same length, so that only its gain can make a channel massive."""
    model = build(family)
    place = Place(1, 5, 9)
    for weight, factor in zip(weights_of(model, place), (4, 4, 60), strict=True):
        weight.mul_(factor)
    model.model.layers[1].post_feedforward_layernorm.weight.data[5] = 5000.0
    report = scanned(model, tmp_path)
    [found] = report.candidates
    assert (found.layer, found.row, found.col) == (1, 5, 9)
    assert 0.5 < found.share < 1.3
    # What reaches the residual stream is far more than what the down projection gave.
    assert abs(report.activations[0].value) > 20 * abs(found.output_spike)


@pytest.mark.parametrize("expert", [0, 3, "shared"])
def test_experts_of_qwen_moe_routed_and_shared(expert, tmp_path):
    model = build("qwen2_moe", num_experts_per_tok=2)
    place = Place(1, 5, 9, expert)
    plant(model, place)
    layered = opened(model, tmp_path)
    [found] = scan_sequences(layered, SEQUENCES).candidates
    assert found.coordinate == coordinate_of(layered.checkpoint, place) and found.expert == expert
    # x[col] * W is scaled by the router, or by the shared expert's gate, on its way to y.
    share_of_expert = found.share * found.output_spike / (found.input_spike * found.value)
    assert 0 < share_of_expert < 1


DECOMPOSED = (
    "llama", "gpt2", "gpt_neox", "opt", "falcon", "bloom", "phi", "mpt", "granite", "gemma3_text", "olmo2",
    "mixtral", "phimoe", "qwen2_moe", "olmoe", "deepseek_v3", "gpt_oss", "llama4_text", "granitemoeshared",
)  # fmt: skip


@pytest.mark.parametrize("family", DECOMPOSED)
def test_products_add_up_to_outputs_in_every_family(family, tmp_path, monkeypatch):
    """With thresholds that let every state through, what was multiplied and the stored rows give each output."""
    monkeypatch.setattr(spikes, "OUTSTANDING", 0.0)
    monkeypatch.setattr(spikes, "MADE", 0.0)
    layers = {"n_layers": 2} if family == "mpt" else {}
    if family == "gpt_oss":
        layers = {"layer_types": ["full_attention"] * 2}
    model = build(family, layers=2, **layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    layered = opened(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    watch = LayerSpikes(layered)
    traces = watch.run(SEQUENCES[:2], ())
    assert watch.unseen == [] and watch.broken is None
    moves = [move for trace in traces for move in trace.moves.values()]
    assert {move.layer for move in moves} == {0, 1} and len(moves) > 250
    for move in moves[::7]:
        total = 0.0
        for part in move.record.multiplied:
            at = part.projection
            matrix = stored[at.tensor] if at.expert_axis is None else stored[at.tensor][at.expert]
            row = matrix[:, move.channel] if at.transposed else matrix[move.channel]
            total += part.share * float(part.x @ row)
        assert total == pytest.approx(move.output, rel=1e-3, abs=1e-4)


def test_a_down_projection_that_is_not_in_the_loaded_model_is_said(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "list_loaded_candidates", lambda config, coordinate, shapes: ())
    report = scanned(llama, tmp_path)
    assert report.candidates == ()
    assert report.notes[0] == "layers 0, 1, 2, 3, 4, 5: the down projection is not observed"


# With a tokenizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["whole", "streamed"])
def test_prompts_are_read_by_the_models_own_tokenizer(placement, tmp_path):
    tokenizer = tiny_checkpoint.make_tokenizer(bos=True)
    prompts = ["We walked along the bank", "the boat"]
    encoded = [[0, *tokenizer(prompt, add_special_tokens=False)["input_ids"]] for prompt in prompts]
    model = build("llama", vocab_size=tiny_checkpoint.VOCABULARY, max_position_embeddings=64)
    plant(model, PLACE, encoded)
    opened(model, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    said = []
    checkpoint = open_checkpoint(tmp_path)
    report = scan_activations(
        checkpoint, prompts=prompts, device="cpu", placement=placement, max_rounds=3, say=said.append
    )
    assert places(report) == [PLACE] and report.prompts == tuple(prompts)
    assert report.settings["placement"] == {"whole": "layer by layer", "streamed": "streamed"}[placement]
    assert said == [
        f"round 1: found 1 scalar in layer {report.candidates[0].layer}",
        "round 2, with it set to zero: no further scalar causes an activation that persists",
    ]
    given = scan_sequences(load.open_model(checkpoint, device="cpu", placement="whole"), encoded)
    assert given.candidates[0].score == pytest.approx(report.candidates[0].score, rel=1e-4)

    long = scan_activations(checkpoint, prompts=[" ".join(prompts * 60)], device="cpu")  # cut to what the model reads
    assert long.activations == () or long.activations[0].token < 64
    assert scan_activations(checkpoint, device="cpu").prompts == SCAN_PROMPTS


@pytest.mark.model
@pytest.mark.skipif(not MODEL, reason="SWSURGERY_TEST_MODEL names no model")
def test_smollm2(tmp_path):
    """Layer 11 [507, 1229] is the known super weight. The neighbours in its channel are of the same kind: zeroing
    them too multiplies the perplexity further (docs/detection.md)."""
    report = scan_activations(open_checkpoint(Path(MODEL)), device="cpu")
    assert places(report) == [(11, 507, 1229, None), (11, 507, 1487, None), (2, 507, 90, None), (2, 507, 430, None)]
    assert [c.value for c in report.candidates] == [5.875, 6.0625, 5.09375, -5.3125]
    assert {c.prompts for c in report.candidates} == {5}
    main = [a for a in report.activations if not a.side]
    assert [(a.layer, a.last, a.channel) for a in main] == [(2, 8, 507), (11, 27, 507)]
    assert [a.cause.kind for a in main] == ["scalar", "scalar"]
    extremes = report.passport.find_extremes()
    assert [(one.bos, one.channel, one.up, one.down) for one in extremes] == [(True, 507, 11, 28), (False, 507, 11, 28)]
    assert all(11 <= one.layer < 28 for one in extremes)  # the state hardly changes in these layers
    assert [(c.layer, c.row, c.col, c.role) for c in report.removers] == [
        (9, 507, 200, "removes"),
        (28, 507, 678, "removes"),
    ]


def test_what_the_residual_stream_takes_of_an_output_is_what_counts(tmp_path):
    """Granite adds only a tenth of what its MLP gives."""
    place = Place(1, 3, 5)
    model = build("granite", residual_multiplier=0.1)
    plant(model, place)
    report = scan_sequences(opened(model, tmp_path), SEQUENCES)
    [candidate], [activation] = report.candidates, report.activations
    ids = torch.tensor([SEQUENCES[activation.prompt]])
    with torch.no_grad():
        after = model(input_ids=ids, output_hidden_states=True).hidden_states[place.layer + 1][0]
    medians = float(after[activation.token, place.row].abs() / after.abs().median())
    assert candidate.score == pytest.approx(medians * candidate.share, rel=0.05)
