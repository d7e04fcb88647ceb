"""An expert that is made into a super expert is found at its exact place, with the scalar that causes its output."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import SEQUENCES, Place, build, build_experts, coordinate_of, opened, plant, weights_of
from safetensors.torch import load_file, save_file

from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.errors import ArchitectureError, ModelError
from swsurgery.model import load
from swsurgery.scanning.expert_report import ExpertScan
from swsurgery.scanning.experts import compute_bars, refuse_unscannable, scan_expert_sequences

PLACEMENTS = 6
FAMILIES = {  # name: neurons of an expert, first layer with experts
    "mixtral": (24, 0),
    "qwen3_moe": (12, 1),
    "deepseek_v3": (12, 1),
    "gpt_oss": (24, 0),
    "qwen2_moe": (12, 1),
}
SHARED = {"deepseek_v3": 12, "qwen2_moe": 20}  # name: neurons of a shared expert


def choose_place(family: str, seed: int) -> Place:
    neurons, first = FAMILIES[family]
    dice = random.Random(f"{family} {seed}")
    return Place(dice.randrange(first, 3), dice.randrange(16), dice.randrange(neurons), dice.randrange(4))


def compute_outputs(model: torch.nn.Module) -> dict[tuple[int, int | str], float]:
    """The largest |output| of each expert's down projection, by the eager code of transformers with plain hooks.

    The outputs of stacked experts are those of torch.nn.functional.linear or of the product with one expert's matrix.
    """
    largest: dict[tuple[int, int | str], float] = {}

    def keep(name: tuple[int, int | str], output: torch.Tensor) -> None:
        largest[name] = max(largest.get(name, 0.0), float(output.abs().max()))

    model.set_experts_implementation("eager")
    for number, layer in enumerate(model.model.layers):
        for module in (getattr(layer.mlp, "shared_experts", None), getattr(layer.mlp, "shared_expert", None)):
            if module is not None:
                module.down_proj.register_forward_hook(
                    lambda _, __, output, number=number: keep((number, "shared"), output)
                )
    for ids in SEQUENCES:
        with OutputsOfExperts(model, keep), torch.no_grad():
            model(input_ids=torch.tensor([list(ids)]))
    return largest


class OutputsOfExperts:
    """Run each expert of each layer as a call of its own, with the routing weight 1 for it alone."""

    def __init__(self, model, keep):
        self.model, self.keep, self.handles = model, keep, []

    def __enter__(self):
        for number, layer in enumerate(self.model.model.layers):
            if hasattr(layer.mlp, "experts"):
                hook = layer.mlp.experts.register_forward_pre_hook(self.make_hook(number), with_kwargs=True)
                self.handles.append(hook)

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def make_hook(self, number):
        def hook(module, arguments, named):
            hidden, index, _ = [*arguments, *named.values()]
            for expert in set(index.flatten().tolist()):
                tokens = (index == expert).any(1)
                alone = torch.full((int(tokens.sum()), 1), expert), torch.ones(int(tokens.sum()), 1)
                self.keep((number, expert), type(module).forward(module, hidden[tokens], *alone))

        return hook


def names(report: ExpertScan) -> list[tuple[int, int | str]]:
    return [(one.layer, one.expert) for one in report.experts]


@pytest.mark.parametrize("seed", range(PLACEMENTS))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_planted_super_expert_is_found_with_its_scalar(family: str, seed: int, tmp_path: Path) -> None:
    place = choose_place(family, seed)
    model = build_experts(family, seed)
    value = plant(model, place)
    layered = opened(model, tmp_path)

    report = scan_expert_sequences(layered, SEQUENCES)

    assert names(report) == [(place.layer, place.expert)] and report.answer == "found"
    [found] = report.experts
    cause = found.cause
    assert cause.coordinate == coordinate_of(layered.checkpoint, place)
    assert (cause.layer, cause.row, cause.col, cause.expert) == place
    assert cause.value == pytest.approx(value) and cause.rank == 1
    assert cause.share == pytest.approx(1, abs=0.2)
    assert cause.input_spike * cause.value == pytest.approx(cause.share * found.output, rel=1e-4)
    assert found.row == place.row and found.prompts >= 1
    assert 0 <= found.token < len(SEQUENCES[found.prompt]) and found.state >= 400


@pytest.mark.parametrize("family", SHARED)
def test_a_planted_shared_expert_is_found(family: str, tmp_path: Path) -> None:
    place = Place(1, 3, SHARED[family] - 1, "shared")
    model = build_experts(family, 1)
    mlp = model.model.layers[1].mlp
    if family == "deepseek_v3":
        mlp.shared_expert = mlp.shared_experts  # the name by which weights_of finds it
    plant(model, place)
    if family == "deepseek_v3":
        del mlp.shared_expert
    report = scan_expert_sequences(opened(model, tmp_path), SEQUENCES)
    assert names(report) == [(1, "shared")]
    assert (report.experts[0].cause.row, report.experts[0].cause.col) == (place.row, place.col)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_have_none(family: str, tmp_path: Path) -> None:
    for seed in range(3):
        report = scan_expert_sequences(opened(build_experts(family, seed), tmp_path / str(seed)), SEQUENCES)
        assert names(report) == [] and report.answer == "none"
        assert any("no massive activation follows" in note for note in report.notes) or report.largest[0].layer >= 5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_outputs_are_those_of_each_expert_run_alone(family: str, tmp_path: Path) -> None:
    model = build_experts(family, 3)
    report = scan_expert_sequences(opened(model, tmp_path), SEQUENCES)
    expected = compute_outputs(model)
    assert report.settings["experts_reached"] == len(expected)
    ordered = sorted(expected.items(), key=lambda item: -item[1])[: len(report.largest)]
    got = [((one.layer, one.expert), abs(one.output)) for one in report.largest]
    assert [name for name, _ in got] == [name for name, _ in ordered]
    assert [size for _, size in got] == pytest.approx([size for _, size in ordered], rel=1e-5)


def test_a_zeroed_super_expert_is_none(tmp_path: Path) -> None:
    place, model = choose_place("mixtral", 0), build_experts("mixtral", 0)
    plant(model, place)
    weights_of(model, place)[2].zero_()
    assert names(scan_expert_sequences(opened(model, tmp_path), SEQUENCES)) == []


def test_an_expert_in_the_last_quarter_is_noted_but_not_listed(tmp_path: Path) -> None:
    model = build("mixtral", 1, num_experts_per_tok=2, layers=8)
    place = Place(6, 4, 5, 2)
    plant(model, place)
    report = scan_expert_sequences(opened(model, tmp_path), SEQUENCES)
    assert names(report) == [] and (report.largest[0].layer, report.largest[0].expert) == (6, 2)
    assert any(
        note.startswith("not listed: layer 6 expert 2") and "its layer is in the last quarter of the 8 layers" in note
        for note in report.notes
    )


def test_two_super_experts_are_listed_by_output(tmp_path: Path) -> None:
    model = build("mixtral", 2, num_experts_per_tok=64, num_local_experts=64)
    places = [Place(0, 3, 4, 17), Place(1, 5, 6, 40)]
    for place in places:
        plant(model, place)
    report = scan_expert_sequences(opened(model, tmp_path), SEQUENCES)
    assert set(names(report)) == {(0, 17), (1, 40)}
    outputs = [abs(one.output) for one in report.experts]
    assert outputs == sorted(outputs, reverse=True)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_streamed_weights_give_the_same(family: str, tmp_path: Path) -> None:
    model = build_experts(family, 0)
    plant(model, choose_place(family, 0))
    checkpoint = opened(model, tmp_path).checkpoint
    whole, streamed = (
        scan_expert_sequences(load.open_model(checkpoint, device="cpu", placement=placement), SEQUENCES)
        for placement in ("whole", "streamed")
    )
    assert names(whole) and streamed.experts == whole.experts and streamed.largest == whole.largest
    assert (whole.settings["placement"], streamed.settings["placement"]) == ("layer by layer", "streamed")


# The criterion -------------------------------------------------------------------------------------------------------


def test_the_bars_are_numpys_percentile_and_a_tenth_of_the_largest() -> None:
    dice = random.Random(5)
    for count in (1, 2, 7, 200, 201, 1000):
        values = [dice.lognormvariate(0, 1) for _ in range(count)]
        bars = compute_bars(values)
        assert bars.percentile == pytest.approx(float(np.percentile(values, 99.5)))
        assert bars.largest == pytest.approx(max(values) / 10)


def test_the_bars_list_the_published_experts() -> None:
    """Qwen3-30B-A3B, arXiv:2507.23279, table 1: three of 6,144 experts are above both bars."""
    values = [744.0, 540.0, 430.0, 63.5, 19.1, *[12.1] * 26, *[7.0] * 6113]
    bars = compute_bars(values)
    assert [value for value in values if bars.are_below(value)] == [744.0, 540.0, 430.0]
    assert bars.are_below(-744.0) and not bars.are_below(bars.largest)


def test_no_expert_gives_bars_that_nothing_exceeds() -> None:
    assert not compute_bars([]).are_below(1e30)


# Refusals ------------------------------------------------------------------------------------------------------------


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    layered = opened(build("llama"), tmp_path)
    with pytest.raises(ArchitectureError, match="the model has no experts"):
        refuse_unscannable(layered.checkpoint)


def test_quantised_experts_are_refused(tmp_path: Path) -> None:
    build_experts("mixtral", 0).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="I8 elements are not weights"):
        refuse_unscannable(open_checkpoint(tmp_path))


def test_hidden_states_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = build("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[:] = float("inf")
    with pytest.raises(ModelError, match="hidden states are not finite: layer 1"):
        scan_expert_sequences(opened(model, tmp_path), SEQUENCES)


@pytest.mark.parametrize("sequences", [[], [[1, 2], []]])
def test_nothing_to_read_is_refused(sequences: list[list[int]], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing to read"):
        scan_expert_sequences(opened(build("mixtral"), tmp_path), sequences)
