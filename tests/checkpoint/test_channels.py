"""Zeroing what the embedding, the mixers and the MLPs write to one channel makes it zero after every layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file

from swsurgery.checkpoint.channels import count_channels, locate_embedding_channel, locate_mixer_row
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.checkpoint.projections import list_down_projections
from swsurgery.checkpoint.structures import locate_row
from swsurgery.errors import ArchitectureError

CHANNEL, WIDTH = 5, 16

FAMILIES = (
    *("llama", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "gpt_neo", "falcon", "phi", "opt", "gemma3_text", "olmo2"),
    *("mixtral", "gpt_oss", "deepseek_v3", "lfm2", "jamba", "falcon_h1", "qwen3_next", "nemotron_h", "recurrent_gemma"),
    *(
        "zamba",
        "zamba2",
        "bamba",
        "minimax",
        "granitemoehybrid",
        "olmo_hybrid",
        "kimi_linear",
        "bailing_hybrid",
        "lfm3",
    ),
)
"""Families whose mixers have different names or forms: two in one layer, transposed, with biases, behind a norm."""


def write(name: str, folder: Path) -> None:
    """Write a random model in which no parameter is zero."""
    given = tiny_models.TEXT_MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **given))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in tiny_models.TEXT_MODELS])
def test_all_writers_of_a_channel_are_found(name: str, tmp_path: Path) -> None:
    write(name, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    config, shapes = checkpoint.config, checkpoint.shapes
    assert count_channels(config, shapes) == WIDTH
    layers = tiny_models.load(name, tmp_path).config.get_text_config().num_hidden_layers
    embedding = locate_embedding_channel(config, shapes, CHANNEL)
    mixers = [region for layer in range(layers) for region in _locate_mixer(config, shapes, layer)]
    projections = list(list_down_projections(config, shapes))
    rows = [locate_row(config, shapes, one.layer, CHANNEL, one.expert) for one in projections]
    assert mixers and len({*mixers, *embedding, *rows}) == len(mixers) + len(embedding) + len(rows)
    before = _compute_channel(name, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for region in (*embedding, *mixers, *rows):
        tensors[region.tensor][tuple(slice(begin, end) for begin, end in region.bounds)] = 0
    for one in projections:
        bias = one.tensor.removesuffix("weight").removesuffix(".") + (".bias" if "weight" in one.tensor else "_bias")
        if bias in tensors:
            tensors[bias][..., CHANNEL] = 0
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert all(value > 0 for value in before)
    assert _compute_channel(name, tmp_path) == [0.0] * len(before)


def _locate_mixer(config, shapes, layer: int):
    """Find the row of a layer's mixer; nothing in a layer of Nemotron-H that is an MLP."""
    try:
        return locate_mixer_row(config, shapes, layer, CHANNEL)
    except ArchitectureError:
        assert config["model_type"] == "nemotron_h"
        return ()


def _compute_channel(name: str, folder: Path) -> list[float]:
    """Compute the largest magnitude of the channel before the first layer and after each layer but the last."""
    with torch.no_grad():
        model = tiny_models.load(name, folder)
        states = model(input_ids=tiny_models.TOKENS, output_hidden_states=True, use_cache=False).hidden_states
    return [float(state[0, :, CHANNEL].abs().max()) for state in states[:-1]]


SHAPES = {
    "model.embed_tokens.weight": (32, 16),
    "model.layers.0.self_attn.o_proj.weight": (16, 16),
    "model.layers.0.mlp.down_proj.weight": (16, 24),
    "vision.layers.0.self_attn.o_proj.weight": (16, 16),
}
CONFIG = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model.layers.0.self_attn.o_proj.weight": None}, "no output projection of a known name"),
        ({"model.layers.0.self_attn.o_proj.weight": (8, 16)}, "axis 0 does not have 16 channels"),
        ({"model.embed_tokens.weight": None}, "no token embeddings"),
        ({"encoder.embed_tokens.weight": (32, 16)}, "2 token embeddings"),
        ({"model.embed_tokens.weight": (32,)}, "axis 1 does not have 16 channels"),
    ],
)
def test_other_names_and_shapes_are_refused(changed: dict[str, object], message: str) -> None:
    assert [region.tensor for region in locate_mixer_row(CONFIG, SHAPES, 0, 3)] == [list(SHAPES)[1]]
    shapes = {name: shape for name, shape in (SHAPES | changed).items() if shape}
    with pytest.raises(ArchitectureError, match=message):
        locate_mixer_row(CONFIG, shapes, 0, 3)
        locate_embedding_channel(CONFIG, shapes, 3)


def test_a_channel_beyond_the_last_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="16 channels"):
        locate_mixer_row(CONFIG, SHAPES, 0, 16)


@pytest.mark.parametrize(("name", "layer"), [("zamba", 1), ("zamba2", 1)])
def test_the_attention_of_a_shared_block_is_no_writer(name: str, layer: int, tmp_path: Path) -> None:
    tiny_models.write(name, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert any("self_attn.o_proj" in tensor for tensor in checkpoint.shapes if f".{layer}." in tensor)
    found = locate_mixer_row(checkpoint.config, checkpoint.shapes, layer, CHANNEL)
    assert [region.tensor for region in found] == [f"model.layers.{layer}.mamba_decoder.mamba.out_proj.weight"]
