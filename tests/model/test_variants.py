"""Variants of one copy of the weights: held against models that are loaded and run one at a time."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.errors import CheckpointError, ModelError
from swsurgery.model import Placement, forward, load
from swsurgery.model.forward import LayeredModel
from swsurgery.model.outcomes import Peak
from swsurgery.model.places import find_decoder_layers
from swsurgery.model.variant import AnyVariant, Scalars
from swsurgery.storage.coordinate import Coordinate

IDS = [1, 5, 9, 13, 6, 3, 5]
OTHER, SHORT = [2, 8, 8, 1, 30, 3, 4], [7, 9, 4]
DOWN = "model.layers.1.mlp.down_proj.weight"
WHOLE_AND_STREAMED = pytest.mark.parametrize("placement", ["whole", "streamed"])

# (model, tensor, index as stored)
PLACES = [
    ("llama", "model.layers.0.mlp.down_proj.weight", (3, 7)),
    ("llama", "model.layers.1.self_attn.q_proj.weight", (3, 7)),
    ("llama", "lm_head.weight", (3, 7)),
    ("gemma3_text", "model.layers.0.mlp.down_proj.weight", (3, 7)),
    ("gpt2", "transformer.h.0.mlp.c_proj.weight", (20, 3)),  # stored (in, out)
    ("gpt2", "transformer.h.1.attn.c_attn.weight", (3, 40)),
    ("phi", "model.layers.0.mlp.fc2.weight", (3, 20)),  # with a bias
    ("gpt_neox", "gpt_neox.layers.0.mlp.dense_4h_to_h.weight", (3, 20)),
    ("bloom", "transformer.h.0.mlp.dense_4h_to_h.weight", (3, 20)),
    ("falcon", "transformer.h.0.mlp.dense_4h_to_h.weight", (3, 20)),  # a subclass of nn.Linear
    ("mpt", "transformer.blocks.0.ffn.down_proj.weight", (3, 20)),
    ("qwen2_moe", "model.layers.0.mlp.down_proj.weight", (3, 7)),  # its dense layer
    ("mixtral", "model.layers.0.block_sparse_moe.experts.2.w2.weight", (3, 7)),  # stacked once loaded
    ("qwen3_moe", "model.layers.1.mlp.experts.1.down_proj.weight", (3, 7)),
    ("gpt_oss", "model.layers.0.mlp.experts.down_proj", (1, 20, 3)),
    ("qwen2_moe", "model.layers.1.mlp.shared_expert.down_proj.weight", (3, 7)),
    ("llama", "model.norm.weight", (4,)),
    ("llama", "model.embed_tokens.weight", (5, 3)),
    ("gpt2", "transformer.wte.weight", (5, 3)),  # tied to the head
    ("phi", "model.layers.0.mlp.fc2.bias", (4,)),
]


class Bench:
    """A tiny model on disk as base and as patched, where each edit adds `by` to one stored scalar."""

    def __init__(self, folder: Path, name: str, places: Sequence[tuple[str, tuple[int, ...]]], by: float = 2.0):
        self.name, self.base, self.patched = name, folder / "base", folder / "patched"
        tensors = tiny_models.write_with_biases(name, self.base)
        shutil.copytree(self.base, self.patched)
        self.old: Scalars = {Coordinate(tensor, index): float(tensors[tensor][index]) for tensor, index in places}
        for tensor, index in places:
            tensors[tensor][index] += by
        save_file(tensors, self.patched / "model.safetensors", {"format": "pt"})

    def load(self, folder: Path) -> torch.nn.Module:
        return tiny_models.load(self.name, folder)

    def alone(self, folder: Path, ids: Sequence[int] = IDS) -> torch.Tensor:
        with torch.no_grad():
            return self.load(folder)(input_ids=torch.tensor([ids])).logits[0]

    def layered(self, placement: Placement = "whole") -> LayeredModel:
        if placement == "whole":
            return LayeredModel(self.load(self.patched), open_checkpoint(self.patched))
        return load.open_model(open_checkpoint(self.patched), device="cpu", placement="streamed", say=pytest.fail)


def outcomes(
    model: LayeredModel, variants: Sequence[AnyVariant], sequences: Sequence[Sequence[int]] = (IDS,)
) -> list[list[tuple[torch.Tensor, Peak | None]]]:
    """For each sequence and variant: logits and peak."""
    found = []
    for number, outcome in enumerate(model.run(sequences, variants)):
        assert (outcome.sequence, len(outcome.logits)) == (number, len(variants))
        found.append(list(zip(outcome.logits, outcome.peaks, strict=True)))
    return found


def assert_same(logits: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    size = float(expected.abs().max())
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance * size)


@WHOLE_AND_STREAMED
@pytest.mark.parametrize(("name", "tensor", "index"), PLACES, ids=[f"{p[0]}-{p[1]}" for p in PLACES])
def test_variants_equal_models_that_are_run_alone(
    tmp_path: Path, name: str, tensor: str, index: tuple[int, ...], placement: Placement
) -> None:
    """Several sequences of two lengths at once; the base between two patched ones."""
    bench = Bench(tmp_path, name, [(tensor, index)])
    model = bench.layered(placement)
    sequences = [IDS, SHORT, OTHER]
    found = outcomes(model, [{}, bench.old, {}], sequences)
    for ids, [first, base, last] in zip(sequences, found, strict=True):
        alone = bench.alone(bench.base, ids)
        assert_same(base[0], alone)
        assert_same(first[0], bench.alone(bench.patched, ids))
        assert_same(first[0], last[0], tolerance=1e-6)
        if ids is IDS:  # every token of the other sequences may be one that the edit does not reach
            assert (base[0] - first[0]).abs().max() > 1e-3 * alone.abs().max()
    assert model.method == ("streamed" if placement == "streamed" else "layer by layer")


LOADED_WHOLE = {
    **dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoehybrid"), "layer by layer"),
    **dict.fromkeys(("bailing_hybrid", "lfm3", "olmo_hybrid"), "layer by layer"),  # tensors are renamed while loading
    **dict.fromkeys(("deepseek_v4", "zamba", "zamba2"), "whole passes"),  # their layers get several streams of states
}


@pytest.mark.parametrize("name", sorted(tiny_models.MODELS.keys() - tiny_models.ENCODERS.keys()))
def test_every_family_gives_the_logits_of_transformers(tmp_path: Path, name: str) -> None:
    """Streamed where that can be; a family that is loaded whole says so in a line."""
    tiny_models.write(name, tmp_path)
    said: list[str] = []
    with load.hide_output():  # some models' code warns when it is imported
        model = load.open_model(open_checkpoint(tmp_path), device="cpu", placement="streamed", say=said.append)
    whole = tiny_models.load(name, tmp_path)
    for ids, [(logits, peak)] in zip((IDS, SHORT), outcomes(model, [{}], [IDS, SHORT]), strict=True):
        with torch.no_grad():
            assert_same(logits, whole(input_ids=torch.tensor([ids])).logits[0])
        assert peak is not None
    if name in LOADED_WHOLE:
        assert model.method == LOADED_WHOLE[name]
        assert [line.startswith("the model is loaded whole: cannot be read layer by layer") for line in said] == [True]
    else:
        assert (model.method, said) == ("streamed", [])


@WHOLE_AND_STREAMED
def test_the_thinker_of_an_omni_model_is_loaded_from_the_files_of_the_whole(
    tmp_path: Path, placement: Placement
) -> None:
    tiny_models.write("qwen2_5_omni_thinker", tmp_path)
    with torch.no_grad():
        wanted = tiny_models.load("qwen2_5_omni_thinker", tmp_path)(input_ids=torch.tensor([IDS])).logits[0]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_omni", "thinker_config": config}))
    tensors = load_file(tmp_path / "model.safetensors")
    speech = {"talker.model.norm.weight": torch.ones(4)}
    save_file(speech | {f"thinker.{n}": t for n, t in tensors.items()}, tmp_path / "model.safetensors")
    with load.hide_output():
        model = load.open_model(open_checkpoint(tmp_path), device="cpu", placement=placement, say=pytest.fail)
    [[(logits, peak)]] = outcomes(model, [{}])
    assert_same(logits, wanted)
    assert peak is not None


def test_a_model_whose_layers_are_called_by_the_tokens_is_run_whole(tmp_path: Path) -> None:
    """Something that depends on the tokens goes past the hidden states, so layers cannot be called from outside."""
    bench = Bench(tmp_path, "llama", [(DOWN, (3, 7))])
    model = bench.layered()
    inner = model.model.model
    plain = type(inner.layers[0]).forward

    class Shifted(type(inner.layers[0])):
        def forward(self, hidden_states: torch.Tensor, tokens: torch.Tensor, **rest: object) -> torch.Tensor:
            return plain(self, hidden_states, **rest) + tokens[..., None]

    def passing(input_ids: torch.Tensor, **rest: object) -> object:
        for layer in inner.layers:
            layer.register_forward_pre_hook(
                lambda module, args, kwargs: (args, kwargs | {"tokens": input_ids}), with_kwargs=True
            )
        try:
            return type(inner).forward(inner, input_ids=input_ids, **rest)
        finally:
            for layer in inner.layers:
                layer._forward_pre_hooks.clear()
                layer._forward_pre_hooks_with_kwargs.clear()

    for layer in inner.layers:
        layer.__class__ = Shifted
    inner.forward = passing
    [[(base, _), (patched, peak)]] = outcomes(model, [bench.old, {}])
    assert model.method == "whole passes"
    with torch.no_grad():
        assert_same(patched, model.model(input_ids=torch.tensor([IDS])).logits[0], tolerance=0.0)
    assert (base - patched).abs().max() > 0
    assert peak is not None


@WHOLE_AND_STREAMED
def test_a_checkpoint_saved_without_the_head_is_found_under_its_loaded_name(
    tmp_path: Path, placement: Placement
) -> None:
    tiny_models.write("gpt2", tmp_path, base=True)
    model = load.open_model(open_checkpoint(tmp_path), device="cpu", placement=placement, say=pytest.fail)
    place = Coordinate("h.0.mlp.c_proj.weight", (20, 3))
    [[(changed, _)]] = outcomes(model, [{place: 2.5}])
    whole = tiny_models.load("gpt2", tmp_path)
    with torch.no_grad():
        whole.transformer.h[0].mlp.c_proj.weight[20, 3] = 2.5
        assert_same(changed, whole(input_ids=torch.tensor([IDS])).logits[0])


@WHOLE_AND_STREAMED
@pytest.mark.parametrize(
    "places",
    [
        [(DOWN, (3, 7)), (DOWN, (3, 8)), (DOWN, (0, 7))],  # a row twice, a column twice
        [("model.layers.0.mlp.down_proj.weight", (3, 7)), (DOWN, (3, 7))],
        [("model.layers.0.mlp.down_proj.weight", (3, 7)), ("model.norm.weight", (2,))],
        [("model.embed_tokens.weight", (5, 3)), (DOWN, (3, 7)), ("lm_head.weight", (3, 7))],
    ],
    ids=["one module", "two modules", "in and outside of layers", "first and last"],
)
def test_several_edits(tmp_path: Path, places: list[tuple[str, tuple[int, ...]]], placement: Placement) -> None:
    bench = Bench(tmp_path, "llama", places)
    [[base, patched]] = outcomes(bench.layered(placement), [bench.old, {}])
    assert_same(base[0], bench.alone(bench.base))
    assert_same(patched[0], bench.alone(bench.patched))


@WHOLE_AND_STREAMED
def test_variants_that_touch_different_layers_keep_apart(tmp_path: Path, placement: Placement) -> None:
    first = "model.layers.0.mlp.down_proj.weight"
    bench = Bench(tmp_path, "llama", [(first, (3, 7)), (DOWN, (5, 2))])
    one, other = ({coordinate: value} for coordinate, value in bench.old.items())
    [found] = outcomes(bench.layered(placement), [{}, one, other, bench.old])
    for number, kept in enumerate(([], [other], [one], [one, other])):
        model = bench.load(bench.base)
        with torch.no_grad():
            for coordinate in (c for variant in ([one, other] if number == 0 else kept) for c in variant):
                if number in (0, 1, 2):
                    model.get_parameter(coordinate.tensor)[coordinate.index] += 2.0
            assert_same(found[number][0], model(input_ids=torch.tensor([IDS])).logits[0])


@WHOLE_AND_STREAMED
def test_batches_of_any_size_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placement: Placement
) -> None:
    bench = Bench(tmp_path, "llama", [(DOWN, (3, 7))])
    expected = outcomes(bench.layered(placement), [bench.old, {}], [IDS, OTHER, SHORT])
    monkeypatch.setattr(forward, "TOKENS_AT_ONCE", 1)
    found = outcomes(bench.layered(placement), [bench.old, {}], [IDS, OTHER, SHORT])
    for ours, theirs in zip(found, expected, strict=True):
        for (logits, peak), (same, as_before) in zip(ours, theirs, strict=True):
            assert_same(logits, same)
            assert peak[:3] == as_before[:3]


@WHOLE_AND_STREAMED
@pytest.mark.parametrize("tensor", [DOWN, "model.norm.weight"])
def test_a_variant_that_changes_nothing_changes_nothing(tmp_path: Path, tensor: str, placement: Placement) -> None:
    index = (3, 7) if tensor == DOWN else (3,)
    bench = Bench(tmp_path, "llama", [(tensor, index)], by=0.0)
    [[same, stored]] = outcomes(bench.layered(placement), [bench.old, {}])
    assert_same(same[0], stored[0], tolerance=1e-6)  # not all kernels give every row of a batch the same bits
    assert same[1][:3] == stored[1][:3]


def test_the_base_survives_a_patched_model_that_overflows(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "llama", [("lm_head.weight", (5, column)) for column in range(16)], by=3e38)
    [[base, patched]] = outcomes(bench.layered(), [bench.old, {}])
    assert not patched[0].isfinite().all()
    assert_same(base[0], bench.alone(bench.base))


def test_a_weight_that_two_layers_share_is_changed_in_both(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "llama", [(DOWN, (3, 7))])
    model = bench.load(bench.patched)
    first, second = (layer.mlp.down_proj for layer in model.model.layers)
    first.weight = second.weight
    [[base, _]] = outcomes(LayeredModel(model, open_checkpoint(bench.patched)), [bench.old, {}])
    with torch.no_grad():
        second.weight[3, 7] = bench.old[Coordinate(DOWN, (3, 7))]
        assert_same(base[0], model(input_ids=torch.tensor([IDS])).logits[0])


class Notes:
    """A watch that writes down what it sees."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, tuple[tuple[int, int], ...], torch.Tensor]] = []
        self.open = 0

    @contextlib.contextmanager
    def around(self, number: int, layer: torch.nn.Module, rows: Sequence[tuple[int, int]]) -> Iterator[None]:
        assert all(parameter.device.type == "cpu" for parameter in layer.parameters())
        self.open += 1
        yield
        self.open -= 1

    def after(self, number: int, rows: Sequence[tuple[int, int]], hidden: torch.Tensor) -> None:
        assert (self.open, len(hidden)) == (0, len(rows))
        self.seen += [(number, row, state.clone()) for row, state in zip(rows, hidden, strict=True)]


@WHOLE_AND_STREAMED
def test_a_watch_sees_every_row_after_every_layer(tmp_path: Path, placement: Placement) -> None:
    bench = Bench(tmp_path, "llama", [(DOWN, (3, 7))])
    notes = Notes()
    for outcome in bench.layered(placement).run([IDS, SHORT], [bench.old, {}], watch=notes):
        outcome.logits[0]
    rows = {(layer, *row) for layer, row, _ in notes.seen}
    # The first layer is untouched, so one row stands for both variants there.
    assert rows == {(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)}
    for variant, folder in ((0, bench.base), (1, bench.patched)):
        model, states = bench.load(folder), []
        model.model.layers[1].register_forward_hook(lambda m, args, output, states=states: states.append(output[0]))
        with torch.no_grad():
            model(input_ids=torch.tensor([IDS]))
        (seen,) = [state for layer, row, state in notes.seen if (layer, *row) == (1, 0, variant)]
        torch.testing.assert_close(seen, states[0], rtol=1e-5, atol=1e-5)


# Peaks ---------------------------------------------------------------------------------------------------------------


@WHOLE_AND_STREAMED
@pytest.mark.parametrize("place", [(DOWN, (3, 7)), ("model.norm.weight", (2,))], ids=["in a layer", "outside"])
def test_the_peak_is_the_largest_hidden_state_after_any_layer(
    tmp_path: Path, place: tuple[str, tuple[int, ...]], placement: Placement
) -> None:
    bench = Bench(tmp_path, "llama", [place], by=-30.0)
    [found] = outcomes(bench.layered(placement), [bench.old, {}])
    for (_, peak), folder in zip(found, (bench.base, bench.patched), strict=True):
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
        assert peak[:3] == where
        assert peak.value == pytest.approx(values[where], rel=1e-5)


def test_a_peak_that_is_not_finite_comes_first(tmp_path: Path) -> None:
    first = "model.layers.0.mlp.down_proj.weight"
    bench = Bench(tmp_path, "llama", [(first, (3, column)) for column in range(24)], by=3e38)
    [[(_, base), (_, patched)]] = outcomes(bench.layered(), [bench.old, {}])
    assert math.isfinite(base.value)
    assert not math.isfinite(patched.value)
    assert (patched.layer, patched.channel) == (0, 3)


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


def stand_ins(model: torch.nn.Module) -> list[object]:
    return [module.__dict__["forward"] for module in model.modules() if "forward" in module.__dict__]


@pytest.mark.parametrize("place", [(DOWN, (3, 7)), ("model.norm.weight", (2,))], ids=["in a layer", "outside"])
def test_the_model_is_left_as_it_was(tmp_path: Path, place: tuple[str, tuple[int, ...]]) -> None:
    bench = Bench(tmp_path, "llama", [place])
    model = bench.layered()
    before = bits(model.model)
    outcomes(model, [bench.old, {}])
    assert bits(model.model) == before
    assert stand_ins(model.model) == []


def test_the_model_is_left_as_it_was_when_a_layer_fails(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "llama", [("model.norm.weight", (2,)), (DOWN, (3, 7))])
    model = bench.layered()
    before, calls = bits(model.model), []

    def fail(module: torch.nn.Module, arguments: tuple[object, ...]) -> None:
        calls.append(float(model.model.model.layers[1].mlp.down_proj.weight.detach()[3, 7]))
        raise RuntimeError("in the base's layer")

    model.model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the base's layer"):
        outcomes(model, [bench.old, {}])
    assert calls == [pytest.approx(bench.old[Coordinate(DOWN, (3, 7))])]
    assert bits(model.model) == before
    assert stand_ins(model.model) == []


def refusal(model: LayeredModel, tensor: str, index: tuple[int, ...]) -> str:
    with pytest.raises(ModelError) as caught:
        outcomes(model, [{Coordinate(tensor, index): 1.0}])
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
        message = refusal(bench.layered(), tensor, index)
        assert message.startswith(f"no such scalar in the loaded model: {tensor}[")


def test_a_loaded_value_other_than_the_stored_one_is_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "llama", [])
    model = bench.layered()
    held = float(model.model.get_parameter(DOWN).detach()[3, 7])
    with torch.no_grad():
        model.model.get_parameter(DOWN)[3, 7] = 0.5
    assert f"the loaded model holds 0.5, not the stored value {held:g}: {DOWN}[3, 7]" in refusal(model, DOWN, (3, 7))


def test_the_stored_value_is_compared_in_the_loaded_dtype(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "llama", [(DOWN, (3, 7))])
    model = LayeredModel(bench.load(bench.patched).bfloat16(), open_checkpoint(bench.patched))
    [[base, patched]] = outcomes(model, [bench.old, {}])
    assert base[0].dtype == torch.bfloat16
    assert not torch.equal(base[0], patched[0])


# Streaming -----------------------------------------------------------------------------------------------------------


def test_two_runs_give_the_same(tmp_path: Path) -> None:
    model = Bench(tmp_path, "mixtral", []).layered("streamed")
    [[(first, _)]] = outcomes(model, [{}])
    [[(second, _)]] = outcomes(model, [{}])
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_run_that_is_left_early_can_be_followed_by_another(tmp_path: Path) -> None:
    model = Bench(tmp_path, "llama", []).layered("streamed")
    [[(expected, _)]] = outcomes(model, [{}])

    class Leave(Notes):
        def after(self, number: int, rows: Sequence[tuple[int, int]], hidden: torch.Tensor) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(model.run([IDS], watch=Leave()))
    [[(again, _)]] = outcomes(model, [{}])
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


def test_between_runs_no_weight_is_in_memory(tmp_path: Path) -> None:
    model = Bench(tmp_path, "llama", []).layered("streamed")
    outcomes(model, [{}])
    assert {parameter.device.type for parameter in model.model.parameters()} == {"meta"}


def test_a_shard_that_ends_early_is_one_line(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "llama", [])
    model = bench.layered("streamed")
    with open(bench.patched / "model.safetensors", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(CheckpointError, match="was changed or replaced while it was read: .*model.safetensors"):
        outcomes(model, [{}])


@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.float16])
def test_what_is_stored_in_another_dtype_is_converted(tmp_path: Path, stored: torch.dtype) -> None:
    """The config names bfloat16, the norms are stored otherwise, as some checkpoints have them."""
    bench = Bench(tmp_path, "llama", [])
    whole = bench.load(bench.patched).bfloat16()
    whole.save_pretrained(bench.patched)
    tensors = load_file(bench.patched / "model.safetensors")
    tensors = {name: tensor.to(stored) if "norm" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, bench.patched / "model.safetensors", {"format": "pt"})
    model = bench.layered("streamed")
    [[(logits, _)]] = outcomes(model, [{}])
    assert (model.dtype, model.method) == (torch.bfloat16, "streamed")
    with torch.no_grad():
        assert_same(logits, whole(input_ids=torch.tensor([IDS])).logits[0], tolerance=2**-6)  # two units of bfloat16


def test_a_config_without_a_dtype_takes_that_of_the_weights(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "llama", [])
    path = bench.patched / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if "dtype" not in key}))
    model = bench.layered("streamed")
    [[(logits, _)]] = outcomes(model, [{}])
    assert model.dtype == torch.float32
    assert_same(logits, bench.alone(bench.patched))


def test_a_quantised_model_is_not_streamed(tmp_path: Path) -> None:
    """What its modules would do to the weights while they are loaded would be left out."""
    bench = Bench(tmp_path, "llama", [])
    path = bench.patched / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "odd"}}))
    said: list[str] = []
    with pytest.raises(ModelError, match="transformers cannot load models that were quantised with 'odd'"):
        load.open_model(open_checkpoint(bench.patched), device="cpu", placement="streamed", say=said.append)
    assert len(said) == 1 and "its config says that it is quantised" in said[0]


def test_a_model_that_never_ran_holds_no_file_and_no_thread(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "llama", [])
    gc.collect()  # of what other tests had open
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        bench.layered("streamed")
    gc.collect()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (files, threads)


@pytest.mark.parametrize("alike", [True, False])
def test_tied_tensors_that_differ_are_not_streamed_as_one(alike: bool, tmp_path: Path) -> None:
    """transformers ties them only if they are stored with the same values, so only then may one be read for both."""
    tiny_models.write("gemma", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if not alike:
        tensors["lm_head.weight"][:, 3] += 2.0
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    said: list[str] = []
    model = load.open_model(open_checkpoint(tmp_path), device="cpu", placement="streamed", say=said.append)
    assert model.method == ("streamed" if alike else "layer by layer")
    assert ["is tied to" in line for line in said] == ([] if alike else [True])
    [[(logits, _)]] = outcomes(model, [{}], [IDS])
    with torch.no_grad():
        assert_same(logits, tiny_models.load("gemma", tmp_path)(input_ids=torch.tensor([IDS])).logits[0])
