"""A variant in which an expert is zeroed computes what a checkpoint with zeros in its file computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.checkpoint.structures import locate_expert
from swsurgery.errors import Unrunnable
from swsurgery.model.forward import LayeredModel
from swsurgery.storage.region import Region

IDS = tiny_models.TOKENS[0].tolist()
EXPERTS = [
    ("mixtral", 2, "block_sparse_moe.experts.2.w2.weight", None),  # stored one by one, loaded stacked
    ("qwen3_moe", 3, "mlp.experts.3.down_proj.weight", None),
    ("deepseek_v3", 1, "mlp.experts.1.down_proj.weight", None),
    ("deepseek_v3", "shared", "mlp.shared_experts.down_proj.weight", None),
    ("lfm2_moe", 2, "feed_forward.experts.2.w2.weight", None),
    ("jamba", 2, "feed_forward.experts.2.down_proj.weight", None),
    ("deepseek_v4", 2, "ffn.experts.2.w2.weight", None),
    ("deepseek_v4", "shared", "ffn.shared_experts.w2.weight", None),
    ("kimi_linear", 2, "block_sparse_moe.experts.2.w2.weight", None),
    ("kimi_linear", "shared", "block_sparse_moe.shared_experts.down_proj.weight", None),
    ("hunyuan_v1_moe", "shared", "mlp.shared_mlp.down_proj.weight", None),
    ("longcat_flash", 2, "mlp.experts.2.down_proj.weight", None),
    ("gpt_oss", 2, "mlp.experts.down_proj", "mlp.experts.down_proj_bias"),  # stored stacked, with biases
]


@pytest.mark.parametrize(("name", "expert", "down", "bias"), EXPERTS, ids=[f"{e[0]}-{e[1]}" for e in EXPERTS])
def test_a_zeroed_expert_gives_the_logits_of_a_file_with_zeros(tmp_path: Path, name, expert, down, bias) -> None:
    model = tiny_models.build(name)
    with torch.no_grad():
        for parameter in model.parameters():  # biases are zero otherwise
            parameter.normal_(0.0, 0.3)
    model.save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    zeroed = {tensor: value.clone() for tensor, value in stored.items()}
    for suffix in filter(None, (down, bias)):
        part = zeroed[f"model.layers.1.{suffix}"]
        (part[expert] if name == "gpt_oss" else part).zero_()
    model.save_pretrained(tmp_path / "zeroed")
    save_file(zeroed, tmp_path / "zeroed" / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path / "base")
    names = {f"model.layers.1.{suffix}" for suffix in (down, bias)}
    regions = locate_expert(checkpoint.config, checkpoint.shapes, 1, expert)
    chosen = [region for region in regions if region.tensor in names]
    loaded = tiny_models.load(name, tmp_path / "base")
    before = {parameter: value.clone() for parameter, value in loaded.state_dict().items()}

    (outcomes,) = LayeredModel(loaded, checkpoint).run([IDS], [{}, dict.fromkeys(chosen, 0.0)])
    logits = [variant.clone() for variant in outcomes.logits]

    with torch.no_grad():
        for got, folder in zip(logits, ("base", "zeroed"), strict=True):
            assert torch.equal(got, tiny_models.load(name, tmp_path / folder)(input_ids=torch.tensor([IDS])).logits[0])
    assert not torch.equal(*logits)
    assert all(torch.equal(before[parameter], value) for parameter, value in loaded.state_dict().items())


def test_a_region_that_is_not_loaded_is_refused(tmp_path: Path) -> None:
    tiny_models.write("mixtral", tmp_path)
    model = LayeredModel(tiny_models.load("mixtral", tmp_path), open_checkpoint(tmp_path))
    gate = Region("model.layers.1.block_sparse_moe.experts.2.w1.weight", ((0, 24), (0, 16)))
    with pytest.raises(Unrunnable, match="no such scalar in the loaded model"):
        next(iter(model.run([IDS], [{gate: 0.0}])))
