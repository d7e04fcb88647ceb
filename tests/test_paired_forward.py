"""One copy of the weights gives both models: held against two models, loaded and run one at a time."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from swsurgery.coordinate import Coordinate
from swsurgery.errors import ModelError
from swsurgery.model.forward import Outcome, PairedForward, ScalarChange, find_decoder_layers

IDS = [1, 5, 9, 13, 6, 3, 5]
DOWN = "model.layers.1.mlp.down_proj.weight"

# (model, tensor, index as stored, method)
PLACES = [
    ("llama", "model.layers.0.mlp.down_proj.weight", (3, 7), "paired"),
    ("llama", "model.layers.1.self_attn.q_proj.weight", (3, 7), "paired"),
    ("llama", "lm_head.weight", (3, 7), "paired"),
    ("gemma3_text", "model.layers.0.mlp.down_proj.weight", (3, 7), "paired"),
    ("gpt2", "transformer.h.0.mlp.c_proj.weight", (20, 3), "paired"),  # stored (in, out)
    ("gpt2", "transformer.h.1.attn.c_attn.weight", (3, 40), "paired"),
    ("phi", "model.layers.0.mlp.fc2.weight", (3, 20), "paired"),  # with a bias
    ("gpt_neox", "gpt_neox.layers.0.mlp.dense_4h_to_h.weight", (3, 20), "paired"),
    ("bloom", "transformer.h.0.mlp.dense_4h_to_h.weight", (3, 20), "paired"),
    ("falcon", "transformer.h.0.mlp.dense_4h_to_h.weight", (3, 20), "two passes"),  # a subclass of nn.Linear
    ("mpt", "transformer.blocks.0.ffn.down_proj.weight", (3, 20), "paired"),
    ("qwen2_moe", "model.layers.0.mlp.down_proj.weight", (3, 7), "paired"),  # its dense layer
    ("mixtral", "model.layers.0.block_sparse_moe.experts.2.w2.weight", (3, 7), "two passes"),  # stacked once loaded
    ("qwen3_moe", "model.layers.1.mlp.experts.1.down_proj.weight", (3, 7), "two passes"),
    ("gpt_oss", "model.layers.0.mlp.experts.down_proj", (1, 20, 3), "two passes"),
    ("qwen2_moe", "model.layers.1.mlp.shared_expert.down_proj.weight", (3, 7), "two passes"),  # sees tokens in a row
    ("llama", "model.norm.weight", (4,), "two passes"),
    ("llama", "model.embed_tokens.weight", (5, 3), "two passes"),
    ("gpt2", "transformer.wte.weight", (5, 3), "two passes"),  # tied to the head
    ("phi", "model.layers.0.mlp.fc2.bias", (4,), "two passes"),
]


class Bench:
    """A tiny model on disk as base and as patched, where each edit adds `by` to one stored scalar."""

    def __init__(self, folder: Path, name: str, places: Sequence[tuple[str, tuple[int, ...]]], by: float = 2.0):
        self.name, self.base, self.patched = name, folder / "base", folder / "patched"
        tiny_models.write(name, self.base)
        tensors = load_file(self.base / "model.safetensors")
        numbers = torch.Generator().manual_seed(0)
        for tensor in sorted(tensors):
            if tensor.endswith(".bias"):  # new models have zeros there, which would hide a forgotten bias
                tensors[tensor] = torch.randn(tensors[tensor].shape, generator=numbers)
        save_file(tensors, self.base / "model.safetensors", {"format": "pt"})
        shutil.copytree(self.base, self.patched)
        self.changes = []
        for tensor, index in places:
            old = float(tensors[tensor][index])
            tensors[tensor][index] += by
            self.changes.append(ScalarChange(Coordinate(tensor, index), old, float(tensors[tensor][index])))
        save_file(tensors, self.patched / "model.safetensors", {"format": "pt"})
        self.config, self.shapes = tiny_models.read(self.patched)

    def load(self, folder: Path) -> torch.nn.Module:
        return tiny_models.load(self.name, folder)

    def alone(self, folder: Path) -> torch.Tensor:
        with torch.no_grad():
            return self.load(folder)(input_ids=torch.tensor([IDS])).logits[0]

    def paired(self, model: torch.nn.Module | None = None) -> PairedForward:
        return PairedForward(model or self.load(self.patched), self.changes, self.config, self.shapes)


def assert_same(outcome: Outcome, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    size = float(expected.abs().max())
    torch.testing.assert_close(outcome.logits, expected, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize(("name", "tensor", "index", "method"), PLACES, ids=[f"{p[0]}-{p[1]}" for p in PLACES])
def test_both_models_equal_those_that_are_run_alone(
    tmp_path: Path, name: str, tensor: str, index: tuple[int, ...], method: str
) -> None:
    bench = Bench(tmp_path, name, [(tensor, index)])
    paired = bench.paired()
    base, patched = paired(IDS)
    alone = bench.alone(bench.base)
    assert_same(base, alone)
    assert_same(patched, bench.alone(bench.patched))
    assert (base.logits - patched.logits).abs().max() > 1e-3 * alone.abs().max()  # the edit is not lost in the noise
    assert paired.method == method


def test_a_checkpoint_saved_without_the_head_is_found_under_its_loaded_name(tmp_path: Path) -> None:
    tiny_models.write("gpt2", tmp_path, base=True)
    config, shapes = tiny_models.read(tmp_path)
    model = tiny_models.load("gpt2", tmp_path)
    held = float(model.transformer.h[0].mlp.c_proj.weight.detach()[20, 3])
    place = Coordinate("h.0.mlp.c_proj.weight", (20, 3))
    paired = PairedForward(model, [ScalarChange(place, held + 2, held)], config, shapes)
    base, _ = paired(IDS)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight[20, 3] += 2
        assert_same(base, model(input_ids=torch.tensor([IDS])).logits[0])


@pytest.mark.parametrize(
    ("places", "method"),
    [
        ([(DOWN, (3, 7)), (DOWN, (3, 8)), (DOWN, (0, 7))], "paired"),  # a row twice, a column twice
        ([("model.layers.0.mlp.down_proj.weight", (3, 7)), (DOWN, (3, 7))], "paired"),
        ([("model.layers.0.mlp.down_proj.weight", (3, 7)), ("model.norm.weight", (2,))], "two passes"),
    ],
    ids=["one module", "two modules", "mixed"],
)
def test_several_edits(tmp_path: Path, places: list[tuple[str, tuple[int, ...]]], method: str) -> None:
    bench = Bench(tmp_path, "llama", places)
    paired = bench.paired()
    base, patched = paired(IDS)
    assert_same(base, bench.alone(bench.base))
    assert_same(patched, bench.alone(bench.patched))
    assert paired.method == method


def test_without_changes_one_pass_stands_for_both(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "llama", [])
    model = bench.load(bench.patched)
    rows = []
    model.model.embed_tokens.register_forward_hook(lambda module, arguments, output: rows.append(len(output)))
    base, patched = bench.paired(model)(IDS)
    assert base is patched
    assert rows == [1]
    assert_same(base, bench.alone(bench.base), tolerance=0.0)


@pytest.mark.parametrize("tensor", [DOWN, "model.norm.weight"])
def test_an_edit_that_changes_nothing_changes_nothing(tmp_path: Path, tensor: str) -> None:
    index = (3, 7) if tensor == DOWN else (3,)
    bench = Bench(tmp_path, "llama", [(tensor, index)], by=0.0)
    base, patched = bench.paired()(IDS)
    assert_same(base, patched.logits, tolerance=1e-6)
    assert_same(base, bench.alone(bench.base), tolerance=1e-6)


def test_the_base_survives_a_patched_model_that_overflows(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "llama", [("lm_head.weight", (5, column)) for column in range(16)], by=3e38)
    paired = bench.paired()
    base, patched = paired(IDS)
    assert paired.method == "paired"
    assert not patched.logits.isfinite().all()
    assert_same(base, bench.alone(bench.base))


def test_the_base_keeps_its_digits_in_bfloat16_beside_a_huge_value(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "llama", [(DOWN, (3, 7))])
    model = bench.load(bench.base).bfloat16()
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([IDS])).logits[0]
        base = float(model.model.layers[1].mlp.down_proj.weight.detach()[3, 7])
        model.model.layers[1].mlp.down_proj.weight[3, 7] = 65536.0
    bench.changes = [ScalarChange(Coordinate(DOWN, (3, 7)), base, 65536.0)]
    outcome, _ = bench.paired(model)(IDS)
    assert_same(outcome, alone, tolerance=2**-7)  # one unit in the last place of bfloat16


def test_a_layer_whose_weight_is_used_without_calling_it_takes_two_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, "llama", [(DOWN, (3, 7))])
    model = bench.load(bench.patched)
    mlp = model.model.layers[1].mlp

    def forward(x: torch.Tensor) -> torch.Tensor:
        return functional.linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight)

    monkeypatch.setattr(mlp, "forward", forward)
    paired = bench.paired(model)
    base, patched = paired(IDS)
    assert_same(base, bench.alone(bench.base))
    assert_same(patched, bench.alone(bench.patched))
    assert paired.method == "two passes"


def test_a_weight_that_two_layers_share_takes_two_passes(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "llama", [(DOWN, (3, 7))])
    model = bench.load(bench.patched)
    first, second = (layer.mlp.down_proj for layer in model.model.layers)
    first.weight = second.weight
    paired = bench.paired(model)
    base, _ = paired(IDS)
    assert paired.method == "two passes"
    with torch.no_grad():
        second.weight[3, 7] = bench.changes[0].base
        assert_same(base, model(input_ids=torch.tensor([IDS])).logits[0])


# Peaks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [(DOWN, (3, 7)), ("model.norm.weight", (2,))], ids=["paired", "two passes"])
def test_the_peak_is_the_largest_hidden_state_after_any_layer(
    tmp_path: Path, place: tuple[str, tuple[int, ...]]
) -> None:
    bench = Bench(tmp_path, "llama", [place], by=-30.0)
    outcomes = bench.paired()(IDS)
    for outcome, folder in zip(outcomes, (bench.base, bench.patched), strict=True):
        model, states = bench.load(folder), []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda module, arguments, output, states=states: states.append(output))
        with torch.no_grad():
            model(input_ids=torch.tensor([IDS]))
        values = {
            (layer, token, channel): float(value)
            for layer, state in enumerate(states)
            for token, row in enumerate(state[0])
            for channel, value in enumerate(row)
        }
        where = max(values, key=lambda key: abs(values[key]))
        assert outcome.peak[:3] == where
        assert outcome.peak.value == pytest.approx(values[where], rel=1e-5)


def test_a_peak_that_is_not_finite_comes_first(tmp_path: Path) -> None:
    first = "model.layers.0.mlp.down_proj.weight"
    bench = Bench(tmp_path, "llama", [(first, (3, column)) for column in range(24)], by=3e38)
    base, patched = bench.paired()(IDS)
    assert math.isfinite(base.peak.value)
    assert not math.isfinite(patched.peak.value)
    assert (patched.peak.layer, patched.peak.channel) == (0, 3)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("llama", "model.layers"),
        ("gpt2", "transformer.h"),
        ("opt", "model.decoder.layers"),
        ("mpt", "transformer.blocks"),
    ],
)
def test_decoder_layers_are_found_whatever_they_are_called(name: str, path: str) -> None:
    model = tiny_models.build(name)
    assert find_decoder_layers(model) == list(model.get_submodule(path))


def test_decoder_layers_are_those_of_the_text_and_not_of_the_image() -> None:
    model = tiny_models.build("llava")
    layers = find_decoder_layers(model)
    assert layers == list(model.get_submodule("model.language_model.layers"))
    assert len(layers) == len(model.get_submodule("model.vision_tower").get_submodule("encoder.layers"))


# What is left behind, and refusals ---------------------------------------------------------------------------------


def bits(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("place", [(DOWN, (3, 7)), ("model.norm.weight", (2,))], ids=["paired", "two passes"])
def test_the_model_is_left_as_it_was(tmp_path: Path, place: tuple[str, tuple[int, ...]]) -> None:
    bench = Bench(tmp_path, "llama", [place])
    model = bench.load(bench.patched)
    before = bits(model)
    bench.paired(model)(IDS)
    assert bits(model) == before
    assert hooks(model) == 0


def test_the_model_is_left_as_it_was_when_a_pass_fails(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "llama", [("model.norm.weight", (2,)), (DOWN, (3, 7))])
    model = bench.load(bench.patched)
    before, passes = bits(model), []

    def fail_on_the_base(module: torch.nn.Module, arguments: tuple[object, ...]) -> None:
        passes.append(bits(model))
        if len(passes) == 2:
            raise RuntimeError("in the base's pass")

    model.model.embed_tokens.register_forward_pre_hook(fail_on_the_base)
    with pytest.raises(RuntimeError, match="in the base's pass"):
        bench.paired(model)(IDS)
    assert passes == [before, bits(bench.load(bench.base))]
    assert bits(model) == before
    assert hooks(model) == 0


def refusal(bench: Bench, tensor: str, index: tuple[int, ...], patched: float = 0.0) -> str:
    bench.changes = [ScalarChange(Coordinate(tensor, index), 1.0, patched)]
    with pytest.raises(ModelError) as caught:
        bench.paired()
    assert len(caught.value.faults) == 1
    return str(caught.value)


def test_a_scalar_that_the_loaded_model_lacks_is_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "llama", [])
    for tensor, index in (
        (DOWN, (16, 0)),
        (DOWN, (0, -1)),
        (DOWN, (3,)),
        ("model.layers.9.mlp.down_proj.weight", (3, 7)),
    ):
        message = refusal(bench, tensor, index)
        assert message.startswith(f"no such scalar in the loaded model: {tensor}[")
        assert "--check weights" in message


def test_a_loaded_value_other_than_the_patched_one_is_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "llama", [])
    message = refusal(bench, DOWN, (3, 7), patched=0.5)
    held = float(load_file(bench.patched / "model.safetensors")[DOWN][3, 7])
    assert f"holds {held:g}, not the patched value 0.5: {DOWN}[3, 7]" in message


def test_the_patched_value_is_compared_in_the_loaded_dtype(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "llama", [(DOWN, (3, 7))])
    model = bench.load(bench.patched).bfloat16()
    assert float(model.model.layers[1].mlp.down_proj.weight.detach()[3, 7]) != bench.changes[0].patched
    assert bench.paired(model).places[0].index == (3, 7)
