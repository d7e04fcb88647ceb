"""The inputs of every linear layer in the decoder layers are rounded, also of experts, and nothing else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import tiny_models
import torch

from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.model import activations, load
from swsurgery.model.variant import Rounding, Variant

IDS = [1, 5, 9, 13]
FAMILIES = {
    # neurons of the down projections: least number of inputs that two variants round
    "llama": {24: 4},
    "gpt2": {24: 4},
    "gpt_oss": {24: 4},
    "mixtral": {24: 4},
    "olmoe": {24: 4},
    "deepseek_v3": {24: 2, 12: 4},  # a dense layer, then routed experts together and a shared one
}


@pytest.mark.parametrize("placement", ["whole", "streamed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_inputs_of_down_projections_are_rounded(
    tmp_path: Path, name: str, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_models.write(name, tmp_path)
    model = load.open_model(open_checkpoint(tmp_path), device="cpu", placement=placement)
    seen: Counter[int] = Counter()
    plain = activations.round_activations

    def watch(x: torch.Tensor, rounding: Rounding) -> torch.Tensor:
        seen[x.shape[-1]] += 1
        return plain(x, rounding)

    monkeypatch.setattr(activations, "round_activations", watch)
    [[exact, fine, coarse]] = [
        [logits.clone() for logits in outcome.logits]
        for outcome in model.run([IDS], [{}, Variant(rounding=Rounding(16)), Variant(rounding=Rounding(3))])
    ]
    assert all(seen[channels] >= count for channels, count in FAMILIES[name].items()), seen
    size = float(exact.abs().max())
    assert (fine - exact).abs().max() < 1e-2 * size
    assert (coarse - exact).abs().max() > 1e-2 * size
