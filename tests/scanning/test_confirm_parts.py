"""Parts of the model that create an activation are zeroed, and compared with others."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from planted import SEQUENCES, Place, build, opened, plant, weights_of

from swsurgery.errors import ModelError
from swsurgery.scanning.activation_report import Cause, ExpertShare, PersistentActivation
from swsurgery.scanning.by_activations import scan_sequences
from swsurgery.scanning.causal_test import CausalOptions
from swsurgery.scanning.confirm_parts import choose_testable, confirm_parts
from swsurgery.scanning.part_report import ModelPart, PartName
from swsurgery.scanning.parts import MAX_PARTS, list_parts

WINDOWS = [[(seed * 7 + place * 3) % 31 for place in range(9)] for seed in range(8)]


def perplexity(model) -> float:
    total = 0.0
    for ids in WINDOWS:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
    return math.exp(total / sum(len(ids) - 1 for ids in WINDOWS))


def make_activation(cause: Cause, channel: int = 5, side: bool = False) -> PersistentActivation:
    return PersistentActivation(1, 5, channel, 90.0, 3, 0, 0, 3, first=1, ratio=50.0, side=side, causes=(cause,))


def test_parts_are_listed_from_the_causes(tmp_path):
    checkpoint = opened(build("llama"), tmp_path).checkpoint
    row = Cause("row", 1, 80.0, 1.0, row=5, cols=(1,), shares=(0.1,), half=12)
    neuron = Cause("neuron", 1, -90.0, 1.0, row=6, cols=(9,), shares=(0.9,), half=1)
    experts = Cause("expert", 2, 70.0, 1.0, experts=(ExpertShare(3, 0.6), ExpertShare("shared", 0.4)))
    scalar = Cause("scalar", 1, 95.0, 1.0, row=7, cols=(9,), shares=(0.9,), half=1)
    found, missing = list_parts(
        checkpoint,
        [
            make_activation(row),
            make_activation(neuron, 6),
            make_activation(neuron, 8),
            make_activation(experts, 9),
            make_activation(scalar, 7),
            make_activation(row, 5, side=True),
            make_activation(Cause("attention", 2, 75.0, 1.0), 4),
            make_activation(Cause("embedding", 0, 50.0, 1.0), 2),
            make_activation(Cause("MLP", 1, 99.0, 1.0), 3),
            make_activation(Cause("several layers", 0, 99.0, 1.0), 3),
        ],
    )
    assert [(str(part.name), part.channels) for part in found] == [
        ("layer 1 neuron 9", (6, 8)),
        ("layer 1 row 5", (5,)),
        ("layer 2 attention channel 4", (4,)),
        ("embedding channel 2", (2,)),
    ]
    assert missing == [
        "not tested: channel 3 from layer 1 on (the stored weights do not explain what the MLP adds)",
        "not tested: channel 3 from layer 0 on (no layer adds a large share, so there is no single part to zero)",
        "not tested: layer 2 expert 3 (layer 2 is dense: it has no expert 3 (leave expert out))",
        "not tested: layer 2 expert shared (layer 2 is dense: it has no expert shared (leave expert out))",
    ]


def test_experts_are_listed_with_what_is_zeroed(tmp_path):
    checkpoint = opened(build("mixtral"), tmp_path).checkpoint
    cause = Cause("expert", 2, 70.0, 1.0, experts=(ExpertShare(3, 0.6), ExpertShare(1, 0.4)))
    found, missing = list_parts(checkpoint, [make_activation(cause, 9)])
    assert [str(part.name) for part in found] == ["layer 2 expert 3", "layer 2 expert 1"] and missing == []
    assert "experts.3.w2.weight" in str(found[0].regions[0])


def test_the_number_of_parts_is_limited(tmp_path):
    checkpoint = opened(build("llama"), tmp_path).checkpoint
    rows = [make_activation(Cause("row", 1, 50.0 + row, 1.0, row=row), row) for row in range(MAX_PARTS + 2)]
    found, missing = list_parts(checkpoint, rows)
    assert [part.name.number for part in found] == list(range(MAX_PARTS + 1, 1, -1))
    assert missing == ["not tested: 2 parts that add less than the 12 largest"]


def test_an_attention_without_a_known_name_is_not_tested(tmp_path):
    checkpoint = opened(build("llama"), tmp_path).checkpoint
    shapes = {name.replace("o_proj", "to_out"): shape for name, shape in checkpoint.shapes.items()}
    found, missing = list_parts(Renamed(checkpoint, shapes), [make_activation(Cause("attention", 2, 60.0, 1.0), 4)])
    assert found == [] and missing == [
        "not tested: layer 2 attention channel 4 (no output projection of a known name is stored beside the MLP: "
        "model.layers.2.*)"
    ]


class Renamed:
    """A checkpoint in which some tensors have other names."""

    def __init__(self, checkpoint, shapes):
        self.config, self.shapes, self.quantisation = checkpoint.config, shapes, checkpoint.quantisation


@pytest.mark.parametrize("kind", ["row", "neuron"])
def test_the_effect_is_that_of_the_edited_model(kind, tmp_path):
    model = build("llama")
    plant(model, Place(1, 5, 9), WINDOWS)
    part = ModelPart(PartName(kind, 1, None, 5 if kind == "row" else 9), (5,), 100.0)
    test = confirm_parts(opened(model, tmp_path), [part], WINDOWS, CausalOptions(nulls=4))
    base = perplexity(model)
    down = model.model.layers[1].mlp.down_proj.weight.data
    (down[5] if kind == "row" else down[:, 9]).zero_()
    assert test.base_perplexity == pytest.approx(base, rel=1e-4)
    assert test.trials[0].alone.ratio == pytest.approx(perplexity(model) / base, rel=1e-3)
    [(found, layer, ratios)] = test.part_nulls
    assert (found, layer, len(ratios), len(test.null)) == (kind, 1, 4, 4)
    assert test.trials[0].verdict in ("needed alone", "inert") and test.trials[0].without is None


@pytest.mark.parametrize(("family", "kind"), [("gpt2", "attention"), ("llama", "attention"), ("gpt2", "embedding")])
def test_a_channel_of_attention_or_of_the_embedding_is_zeroed(family, kind, tmp_path):
    """The attention of GPT-2 is stored transposed and has a bias; its embedding has positions, and its head is tied."""
    model = build(family)
    layer, tied = (1, None) if kind == "attention" else (None, model.lm_head.weight)
    part = ModelPart(PartName(kind, layer, None, 5), (5,), 100.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.3)
    layered = opened(model, tmp_path)
    said: list[str] = []
    assert choose_testable(layered, [part], said.append) == [part] and said == []
    test = confirm_parts(layered, [part], WINDOWS, CausalOptions(nulls=4))
    base = perplexity(model)
    with torch.no_grad():
        if tied is not None:
            assert tied is model.transformer.wte.weight
            for table in (tied, model.transformer.wpe.weight):
                table[:, 5] = 0
        elif family == "gpt2":
            projection = model.transformer.h[1].attn.c_proj
            projection.weight[:, 5], projection.bias[5] = 0, 0
        else:
            model.model.layers[1].self_attn.o_proj.weight[5] = 0
    assert test.trials[0].alone.ratio == pytest.approx(perplexity(model) / base, rel=1e-3)
    assert test.trials[0].alone.ratio != pytest.approx(1, abs=1e-4)
    [(found, where, ratios)] = test.part_nulls
    assert (found, where, len(ratios)) == (kind, layer, 4)


@pytest.mark.parametrize("kind", ["attention", "embedding"])
def test_a_scan_finds_and_tests_a_planted_channel(kind, tmp_path):
    """A row of an output projection, or a column of the embedding, is made so large that a state persists."""
    model = build("llama")
    with torch.no_grad():
        if kind == "embedding":
            model.model.embed_tokens.weight[:, 5] = 400
        else:
            model.model.layers[1].self_attn.o_proj.weight[5] *= 600
    layered = opened(model, tmp_path)
    report = scan_sequences(layered, SEQUENCES)
    name = "embedding channel 5" if kind == "embedding" else "layer 1 attention channel 5"
    assert (report.answer, report.candidates, [str(part.name) for part in report.found_parts]) == ("found", (), [name])
    test = confirm_parts(layered, report.parts, WINDOWS, CausalOptions(nulls=3))
    tested = replace(report, part_confirmation=test)
    assert tested.answer == ("none" if test.trials[0].verdict == "inert" else "found")
    assert tested.to_json()["parts"][0]["verdict"] == test.trials[0].verdict


def test_a_part_that_the_loaded_model_lacks_is_not_tested(tmp_path):
    layered = opened(build("llama"), tmp_path)
    layered.places._owners.pop("model.layers.1.self_attn.o_proj.weight")
    said: list[str] = []
    part = ModelPart(PartName("attention", 1, None, 5), (5,), 100.0)
    assert choose_testable(layered, [part], said.append) == []
    assert said[0].startswith("not tested: layer 1 attention channel 5 (no such scalar in the loaded model: model.lay")


def test_experts_are_compared_with_the_others_of_their_layer(tmp_path):
    model = build("mixtral", num_experts_per_tok=2)
    place = Place(1, 5, 9, 2)
    plant(model, place, WINDOWS)
    weights_of(model, place)
    parts = [ModelPart(PartName("expert", 1, expert, None), (5,), 100.0) for expert in (2, 0)]
    test = confirm_parts(opened(model, tmp_path), parts, WINDOWS)
    base = perplexity(model)
    model.model.layers[1].mlp.experts.down_proj.data[2] = 0
    assert test.trials[0].alone.ratio == pytest.approx(perplexity(model) / base, rel=1e-3)
    assert [len(ratios) for _, _, ratios in test.part_nulls] == [2]
    document = json.loads(json.dumps(test.to_json(), allow_nan=False))
    assert document["part_nulls"][0]["kind"] == "expert"


def test_too_little_text_and_no_parts(tmp_path):
    layered = opened(build("llama"), tmp_path)
    part = ModelPart(PartName("row", 1, None, 5), (5,), 1.0)
    said: list[str] = []
    test = confirm_parts(layered, [part], WINDOWS[:3], CausalOptions(nulls=3, say=said.append))
    assert test.trials[0].verdict == "untested" and said[0].startswith("too little text")
    with pytest.raises(ModelError, match="nothing to confirm"):
        confirm_parts(layered, [], WINDOWS)
