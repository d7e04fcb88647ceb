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


def round_by_hand(x: torch.Tensor, per: str, hold_out: bool) -> torch.Tensor:
    """Round an input of a linear layer to 4 bits in float64, group by group."""
    rows = x.detach().double().reshape(-1, x.shape[-1]).clone()
    place = divmod(int(rows.abs().argmax()), rows.shape[1])
    held = float(rows[place])
    if hold_out:
        rows[place] = 0
    for group in rows if per == "token" else [rows]:
        scale = float(group.abs().max()) / 7
        if scale:
            group.copy_((group / scale).round() * scale)
    if hold_out:
        rows[place] = held
    return rows.reshape(x.shape).to(x.dtype)


@pytest.mark.parametrize(("per", "hold_out"), [("tensor", False), ("token", False), ("tensor", True), ("token", True)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "llama4_text"])
def test_logits_are_those_of_a_model_whose_layers_round_their_inputs(
    tmp_path: Path, name: str, per: str, hold_out: bool
) -> None:
    tiny_models.write(name, tmp_path)
    model = load.open_model(open_checkpoint(tmp_path), device="cpu")
    [[found]] = [list(outcome.logits) for outcome in model.run([IDS], [Variant(rounding=Rounding(4, per, hold_out))])]
    plain = tiny_models.load(name, tmp_path)
    for path, module in plain.named_modules():
        if path.count(".") > 1 and type(module).__name__ in ("Linear", "Conv1D", "Llama4Router"):
            module.register_forward_pre_hook(lambda _, given: (round_by_hand(given[0], per, hold_out), *given[1:]))
        if type(module).__name__ == "Llama4TextExperts":
            module.forward = lambda x, experts=module: run_experts(experts, x, per, hold_out)
    with torch.no_grad():
        [wanted] = plain(input_ids=torch.tensor([IDS])).logits
    assert torch.allclose(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def run_experts(experts: torch.nn.Module, x: torch.Tensor, per: str, hold_out: bool) -> torch.Tensor:
    """Compute the stacked experts of Llama 4, with their inputs rounded."""
    tokens = round_by_hand(x.reshape(len(experts.gate_up_proj), -1, x.shape[-1]), per, hold_out)
    gate, up = torch.einsum("eti,eio->eto", tokens, experts.gate_up_proj).chunk(2, dim=-1)
    neurons = round_by_hand(torch.nn.functional.silu(gate) * up, per, hold_out)
    return torch.einsum("eti,eio->eto", neurons, experts.down_proj).reshape(-1, x.shape[-1])
