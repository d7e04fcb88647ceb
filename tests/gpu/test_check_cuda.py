"""The check on a CUDA device gives the figures of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_checkpoint
import tiny_models
import torch
from tiny_checkpoint import TEXT, write_pair

from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.errors import ModelError
from swsurgery.model import Placement, ScalarChange, load
from swsurgery.model.check import run_checks
from swsurgery.model.protocol import Protocol
from swsurgery.model.report import CheckReport

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

NORM = "model.norm.weight"


def check(
    pair: tiny_checkpoint.Pair,
    device: str,
    changes: tuple[ScalarChange, ...] | None = None,
    placement: Placement = "auto",
) -> CheckReport:
    return run_checks(
        open_checkpoint(pair.patched),
        pair.changes if changes is None else changes,
        text=TEXT,
        prompts=("The river was",),
        device=device,
        placement=placement,
        protocol=Protocol(window=24),
    )


@pytest.mark.parametrize("bos", [False, True], ids=["no BOS", "BOS"])
@pytest.mark.parametrize("norm", [False, True], ids=["in layers", "outside too"])
@pytest.mark.parametrize("placement", ["whole", "streamed"])
def test_figures_are_those_of_the_cpu(tmp_path: Path, bos: bool, norm: bool, placement: str) -> None:
    pair = write_pair(tmp_path, [((3, 7), 5.0), ((9, 2), -4.0)], bos=bos)
    more = (tiny_checkpoint.change((2,), patched=1.0, base=3.0, tensor=NORM),) if norm else ()
    cuda, cpu = (check(pair, device, pair.changes + more, placement) for device in ("auto", "cpu"))
    assert cuda.device == torch.cuda.get_device_name()
    assert cuda.method == cpu.method == ("streamed" if placement == "streamed" else "layer by layer")
    assert (cuda.windows, cuda.scored_tokens, cuda.dtype) == (cpu.windows, cpu.scored_tokens, "float32")
    assert cuda.perplexity_ratio == pytest.approx(cpu.perplexity_ratio, rel=1e-4)
    assert cuda.kl == pytest.approx(cpu.kl, rel=1e-3)
    for ours, theirs in ((cuda.base, cpu.base), (cuda.patched, cpu.patched)):
        assert ours.perplexity == pytest.approx(theirs.perplexity, rel=1e-4)
        assert ours.stopword_mass == pytest.approx(theirs.stopword_mass, rel=1e-4)
        assert ours.super_activation.value == pytest.approx(theirs.super_activation.value, rel=1e-4)
    assert [token for token, _ in cuda.prompts[0].base] == [token for token, _ in cpu.prompts[0].base]


@pytest.mark.parametrize("placement", ["whole", "streamed"])
def test_both_models_equal_those_that_are_run_alone(tmp_path: Path, placement: Placement) -> None:
    pair = write_pair(tmp_path)
    ids = list(range(5, 29))
    model = load.open_model(open_checkpoint(pair.patched), device="cuda", placement=placement)
    base = {change.coordinate: change.base for change in pair.changes}
    for outcomes in model.run([ids], [base, {}]):
        for logits, folder in zip(outcomes.logits, (pair.base, pair.patched), strict=True):
            with torch.no_grad():
                alone = tiny_checkpoint.load(folder, "cuda")(input_ids=torch.tensor([ids], device="cuda")).logits[0]
            torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("name", ["llama", "gpt_neo", "gptj", "mixtral"])
def test_layers_on_several_devices_in_turn_give_the_logits_of_one(tmp_path: Path, name: str) -> None:
    tiny_models.write(name, tmp_path)  # GPT Neo and GPT-J keep computed buffers in their layers
    checkpoint = open_checkpoint(tmp_path)
    ids = tiny_models.TOKENS[0].tolist()
    logits = []
    for device in ("cuda", "cpu"):
        model = load.open_model(checkpoint, device=device, placement="streamed")
        for outcomes in model.run([ids, ids[:4]]):
            logits.append(outcomes.logits[0].cpu())
        assert model.method == "streamed"
    for number in range(2):
        torch.testing.assert_close(logits[number], logits[2 + number], rtol=1e-4, atol=1e-4)


def test_a_device_number_beyond_the_last_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="^no usable CUDA device: cuda:99 "):
        check(write_pair(tmp_path), "cuda:99")


def test_a_model_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    torch.cuda.set_per_process_memory_fraction(1e-9)
    torch.cuda.empty_cache()
    try:
        with pytest.raises(ModelError) as caught:
            check(pair, "cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    (line,) = caught.value.faults
    assert line.startswith("not enough memory on the device: cuda") and "--device cpu" in line
