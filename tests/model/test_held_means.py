"""Scalars whose products are held at their means: compared with hooks on models that transformers loads and runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.errors import ModelError
from swsurgery.model import Placement, forward, load, readings
from swsurgery.model.control_run import run_variants
from swsurgery.model.held_means import HeldMeans
from swsurgery.model.variant import Variant
from swsurgery.storage.coordinate import Coordinate

WINDOWS = [[1, 5, 9, 13, 6, 3, 5], [7, 9, 4], [2, 8, 8, 1, 30, 3, 4], [5, 5, 2], [3, 1]]
PROMPT = [4, 9, 30, 2]
LLAMA = [("model.layers.0.mlp.down_proj.weight", (3, 7)), ("model.layers.1.self_attn.q_proj.weight", (3, 5))]

CASES = [  # (model, scalars as stored); the second Llama holds two scalars of one layer, and one before them
    ("llama", LLAMA),
    ("llama", [*LLAMA, ("model.layers.1.self_attn.q_proj.weight", (3, 9))]),
    ("gpt2", [("transformer.h.0.mlp.c_proj.weight", (20, 3))]),  # stored (in, out)
    ("phi", [("model.layers.0.mlp.fc2.weight", (3, 20))]),  # with a bias
    ("falcon", [("transformer.h.0.mlp.dense_4h_to_h.weight", (3, 20))]),  # a subclass of nn.Linear
    ("qwen2_moe", [("model.layers.1.mlp.shared_expert.down_proj.weight", (3, 7))]),  # gets (tokens, channels)
]


class Oracle:
    """A model of transformers with hooks at the linear layers of some scalars."""

    def __init__(self, name: str, folder: Path, scalars: Sequence[tuple[str, tuple[int, ...]]]):
        self.model = tiny_models.load(name, folder)
        modules = dict(self.model.named_modules())
        self.scalars = [(modules[tensor.removesuffix(".weight")], index) for tensor, index in scalars]
        self.values = [float(load_file(folder / "model.safetensors")[tensor][index]) for tensor, index in scalars]

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.model(input_ids=torch.tensor([ids])).logits[0]

    def measure(self, windows: Sequence[Sequence[int]]) -> list[tuple[float, float]]:
        """Return the mean product of each scalar in first tokens, and in all others."""
        found: list[tuple[list[float], list[float]]] = [([], []) for _ in self.scalars]
        hooks = []
        for (first, others), (module, index), value in zip(found, self.scalars, self.values, strict=True):
            column = index[0] if isinstance(module, Conv1D) else index[1]

            def keep(module, arguments, first=first, others=others, column=column, value=value):
                products = [value * float(x) for x in arguments[0].flatten(0, -2)[:, column]]
                first.append(products[0])
                others.extend(products[1:])

            hooks.append(module.register_forward_pre_hook(keep))
        for ids in windows:
            self.logits(ids)
        for hook in hooks:
            hook.remove()
        return [(sum(first) / len(first), sum(others) / len(others)) for first, others in found]

    def hold(self, means: Sequence[tuple[float, float]]) -> None:
        """Set the scalars to 0, and add their means to the outputs of their layers."""
        for (module, index), (first, others) in zip(self.scalars, means, strict=True):
            row = index[1] if isinstance(module, Conv1D) else index[0]
            module.weight.data[index] = 0

            def add(module, arguments, output, row=row, first=first, others=others):
                flat = output.clone().flatten(0, -2)
                flat[0, row] += first
                flat[1:, row] += others
                return flat.view(output.shape)

            module.register_forward_hook(add)


def open_model(name: str, folder: Path, placement: Placement) -> forward.LayeredModel:
    if placement == "whole":
        return forward.LayeredModel(tiny_models.load(name, folder), open_checkpoint(folder))
    return load.open_model(open_checkpoint(folder), device="cpu", placement="streamed", say=pytest.fail)


def make_variants(scalars: Sequence[tuple[str, tuple[int, ...]]]) -> list[Variant]:
    """Return the base, a model with the scalars zeroed, and one that holds them."""
    zeros = {Coordinate(*scalar): 0.0 for scalar in scalars}
    return [Variant(), Variant(zeros), Variant(zeros, held=frozenset(zeros))]


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("placement", ["whole", "streamed"])
@pytest.mark.parametrize(("name", "scalars"), CASES, ids=[f"{name}-{len(found)}" for name, found in CASES])
def test_held_scalars_add_their_means(tmp_path: Path, name: str, scalars, placement: Placement) -> None:
    """The prompt is the last sequence. It is not measured, but the means are added in it too."""
    tiny_models.write_with_biases(name, tmp_path)
    model, every = open_model(name, tmp_path, placement), [*WINDOWS, PROMPT]
    variants = make_variants(scalars)
    means = HeldMeans(model, variants, [len(ids) for ids in every], len(WINDOWS))
    oracle = Oracle(name, tmp_path, scalars)
    base = [oracle.logits(ids) for ids in every]
    oracle.hold(wanted := oracle.measure(WINDOWS))
    for ids, plain, outcomes in zip(every, base, means.run(model, every, None), strict=True):
        found = list(outcomes.logits)
        assert_same(found[0], plain)
        assert_same(found[2], oracle.logits(ids))
        assert (found[2] - found[1]).abs().max() > 1e-6 * plain.abs().max()
    assert model.method == ("streamed" if placement == "streamed" else "layer by layer")
    listed = {one.coordinate: (one.first, one.others) for one in means.list_held(variants[2])}
    assert listed == {Coordinate(*s): pytest.approx(mean, rel=1e-4) for s, mean in zip(scalars, wanted, strict=True)}


def test_a_model_that_runs_in_whole_passes_is_measured_first(tmp_path: Path) -> None:
    scalars = [("model.layers.1.linear.weight", (3, 7))]
    tiny_models.write("zamba2", tmp_path)
    oracle = Oracle("zamba2", tmp_path, scalars)
    with load.hide_output():
        model = open_model("zamba2", tmp_path, "whole")
        oracle.hold(oracle.measure(WINDOWS))
        found = [list(outcomes.logits)[2] for outcomes in run_variants(model, WINDOWS, make_variants(scalars), None)]
    assert model.method == "whole passes"
    for ids, logits in zip(WINDOWS, found, strict=True):
        assert_same(logits, oracle.logits(ids))


def test_long_texts_are_measured_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states that need several readings give the figures of one reading."""
    tiny_models.write("llama", tmp_path)
    model = open_model("llama", tmp_path, "whole")
    once = [list(outcomes.logits) for outcomes in run_variants(model, WINDOWS, make_variants(LLAMA), None)]
    monkeypatch.setattr(readings, "STATES", 1)
    assert len(model.divide(WINDOWS, 3)) > 1
    for number, outcomes in enumerate(run_variants(model, WINDOWS, make_variants(LLAMA), None)):
        assert outcomes.sequence == number
        for found, wanted in zip(outcomes.logits, once[number], strict=True):
            assert_same(found, wanted)


def test_a_scalar_of_value_0_changes_nothing_if_it_is_held(tmp_path: Path) -> None:
    tensors = tiny_models.write_with_biases("llama", tmp_path)
    tensors[LLAMA[0][0]][LLAMA[0][1]] = 0
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = open_model("llama", tmp_path, "whole")
    for outcomes in run_variants(model, WINDOWS, make_variants(LLAMA[:1]), None):
        base, _, held = outcomes.logits
        assert torch.equal(base, held)


NOT_LINEAR = [
    ("llama", "model.embed_tokens.weight", (5, 3)),
    ("llama", "lm_head.weight", (5, 3)),
    ("llama", "model.layers.0.input_layernorm.weight", (3,)),
    ("mixtral", "model.layers.0.block_sparse_moe.experts.2.w2.weight", (3, 7)),  # stacked once loaded
    ("phi", "model.layers.0.mlp.fc2.bias", (4,)),
]


@pytest.mark.parametrize(("name", "tensor", "index"), NOT_LINEAR, ids=[tensor for _, tensor, _ in NOT_LINEAR])
def test_a_scalar_outside_the_linear_layers_of_the_decoder_is_refused(tmp_path: Path, name, tensor, index) -> None:
    tiny_models.write_with_biases(name, tmp_path)
    model = open_model(name, tmp_path, "whole")
    with pytest.raises(ModelError, match=r"the mean of this scalar cannot be held.*leave out --control mean"):
        next(iter(run_variants(model, WINDOWS, make_variants([(tensor, index)]), None)))


def test_a_held_scalar_is_0_in_its_variant() -> None:
    place = Coordinate(*LLAMA[0])
    with pytest.raises(ValueError, match="a held scalar is not 0"):
        Variant({place: 1.0}, held=frozenset({place}))
    with pytest.raises(ValueError, match="a held scalar is not 0"):
        Variant(held=frozenset({place}))
