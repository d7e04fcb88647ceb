"""The causal test of experts, compared with plain models whose files have zeros in place of the experts."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import planted
import pytest
import tiny_checkpoint
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.checkpoint.projections import find_down_projection
from swsurgery.cli import main
from swsurgery.errors import ModelError
from swsurgery.manifest.load import load_manifest
from swsurgery.model import load
from swsurgery.scanning.causal_test import CausalOptions
from swsurgery.scanning.confirm_experts import confirm_experts
from swsurgery.scanning.expert_report import ExpertCandidate, ExpertConfirmation, ExpertName
from swsurgery.scanning.report import Candidate
from swsurgery.storage.coordinate import Coordinate

WINDOWS, LENGTH = 24, 24
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")


class Bench:
    """A tiny model on disk in which one neuron of one expert is planted, and text that the model itself writes.

    `quiet` divides the outputs of all experts of the planted layer by 10 before, so that the others matter little.
    """

    def __init__(self, folder: Path, family: str, place: planted.Place | None, quiet: bool = False):
        self.folder, self.family = folder, family
        model = planted.build_experts(family, 2, experts=8 if quiet else 4)
        if quiet:
            for name, parameter in model.model.layers[place.layer].mlp.experts.named_parameters():
                if name.startswith("down_proj"):
                    parameter.data *= 0.1
        if place is not None:
            planted.plant(model, place)
        model.save_pretrained(folder)
        self.checkpoint = open_checkpoint(folder)
        model, generator = tiny_models.load(family, folder), torch.Generator().manual_seed(7)
        ids = torch.randint(32, (WINDOWS, 1), generator=generator)
        with torch.no_grad():
            for _ in range(LENGTH - 1):
                chances = model(input_ids=ids, use_cache=False).logits[:, -1].softmax(-1)
                ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
        self.windows = ids.tolist()

    def loss(self, zeroed: Sequence[ExpertName]) -> float:
        """The mean loss of a checkpoint in whose file every tensor of the experts is zero."""
        changed = self.folder.parent / "changed"
        shutil.copytree(self.folder, changed)
        tensors = load_file(changed / "model.safetensors")
        for layer, expert in zeroed:
            down = find_down_projection(self.checkpoint.config, self.checkpoint.shapes, layer, expert).tensor
            for name in tensors:
                if down.endswith(".weight") and name.startswith(down.rpartition(".")[0].rpartition(".")[0] + "."):
                    tensors[name].zero_()
                elif not down.endswith(".weight") and name.startswith(down.rpartition(".")[0] + "."):
                    tensors[name][expert] = 0.0
        save_file(tensors, changed / "model.safetensors", {"format": "pt"})
        with torch.no_grad():
            model = tiny_models.load(self.family, changed)
            logits = model(input_ids=torch.tensor(self.windows), use_cache=False).logits.double()[:, :-1]
        shutil.rmtree(changed)
        targets = torch.tensor(self.windows)[:, 1:]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))

    def ratio(self, zeroed: Sequence[ExpertName]) -> float:
        return math.exp(self.loss(zeroed) - self.loss([]))

    def confirm(self, names: Sequence[ExpertName], **options) -> ExpertConfirmation:
        model = load.open_model(self.checkpoint, device="cpu", placement=options.pop("placement", "whole"))
        return confirm_experts(model, [make_candidate(*name) for name in names], self.windows, CausalOptions(**options))


def make_candidate(layer: int, expert: int | str) -> ExpertCandidate:
    cause = Candidate(Coordinate("unused", (0, 0)), layer, 0, 0, expert, 1.0, score=1.0, rank=1)
    return ExpertCandidate(layer, expert, 9.0, 0, 0, 0, 1, 500.0, cause)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_effect_is_that_of_a_file_without_the_expert(tmp_path: Path, family: str) -> None:
    place = planted.Place(1, 3, 4, 2)
    bench = Bench(tmp_path / family, family, place)
    shared = (2, "shared") if family == "deepseek_v3" else (2, 1)
    names: list[ExpertName] = [(1, 2), shared]
    found = bench.confirm(names, nulls=4)
    for trial, name, other in zip(found.trials, names, reversed(names), strict=True):
        assert trial.alone.ratio == pytest.approx(bench.ratio([name]), rel=1e-4)
        assert trial.without.ratio == pytest.approx(bench.ratio([other]), rel=1e-4)
    assert found.together.ratio == pytest.approx(bench.ratio(names), rel=1e-4)
    assert math.log(found.base_perplexity) == pytest.approx(bench.loss([]), rel=1e-4)
    assert (found.windows, found.window_tokens, len(found.null)) == (WINDOWS, LENGTH, 4)


PLANTED = {"mixtral": 3, "qwen3_moe": 2, "deepseek_v3": 3, "gpt_oss": 0}
"""Experts to which the models route many tokens that turn the planted neuron on."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_planted_expert_matters_and_random_ones_do_not(tmp_path: Path, family: str) -> None:
    expert = PLANTED[family]
    bench = Bench(tmp_path / family, family, planted.Place(1, 3, 4, expert), quiet=True)
    found = bench.confirm([(1, expert)])
    [trial] = found.trials
    assert trial.verdict == "needed alone" and trial.without is None
    assert trial.alone.low > max(1.05, *found.null)
    assert found.joint_sets == () and found.joint_null == ()
    assert len(found.null) == 7  # all others of the layer


def test_an_expert_that_does_not_matter_is_inert(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "m", "mixtral", planted.Place(1, 3, 4, 3), quiet=True)
    found = bench.confirm([(1, 3), (4, 0)])
    assert [t.verdict for t in found.trials] == ["needed alone", "inert"]
    assert 1 <= len(found.joint_null) <= 5


def test_streamed_weights_give_the_same(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "m", "gpt_oss", planted.Place(1, 3, 4, 2))
    whole, streamed = (bench.confirm([(1, 2), (2, 0)], placement=p) for p in ("whole", "streamed"))
    assert streamed.together.ratio == pytest.approx(whole.together.ratio, rel=1e-6)
    assert streamed.null == pytest.approx(whole.null, rel=1e-6)


def test_the_same_seed_draws_the_same_experts(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "m", "mixtral", None)
    one, again = (bench.confirm([(1, 2)], nulls=2, seed=3) for _ in range(2))
    assert one == again
    others = {expert: bench.ratio([(1, expert)]) for expert in (0, 1, 3)}
    assert all(any(ratio == pytest.approx(other, rel=1e-4) for other in others.values()) for ratio in one.null)


def test_too_little_text_gives_no_verdict(tmp_path: Path) -> None:
    bench, said = Bench(tmp_path / "m", "mixtral", planted.Place(1, 3, 4, 2)), []
    bench.windows = bench.windows[:7]
    [trial] = bench.confirm([(1, 2)], say=said.append).trials
    assert (trial.verdict, trial.alone.low) == ("untested", None)
    assert said == [
        "too little text for intervals and verdicts: 7 windows (a verdict needs 8: give a longer --text, more "
        "--windows or a shorter --window)"
    ]


def test_what_cannot_be_tested_is_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "m", "mixtral", None)
    with pytest.raises(ModelError, match="the list of candidates is empty"):
        bench.confirm([])
    bench.windows = [[1]]
    with pytest.raises(ModelError, match="a window is too short"):
        bench.confirm([(1, 2)])


# The command ---------------------------------------------------------------------------------------------------------

PROMPTS = ("The river was", "In practice it went", "She asked")
ASK = [word for prompt in PROMPTS for word in ("--prompt", prompt)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`planted` has one super expert, `random` none, `dense` no expert; all have a tokenizer."""
    folder = tmp_path_factory.mktemp("experts")
    tokenizer = tiny_checkpoint.make_tokenizer()
    sequences = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    sizes = {"vocab_size": tiny_checkpoint.VOCABULARY, "max_position_embeddings": 64}
    for name in ("planted", "random", "dense"):
        family = "llama" if name == "dense" else "mixtral"
        tiny = planted.build(family, **sizes, **({} if name == "dense" else {"num_experts_per_tok": 2}))
        if name == "planted":
            planted.plant(tiny, planted.Place(1, 5, 7, 2), sequences)
        tiny.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text(tiny_checkpoint.TEXT)
    return folder


@pytest.fixture
def here(checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for file in checkpoints.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def scan(*words: str) -> int:
    return main(["scan", words[0], "--method", "experts", "--device", "cpu", *words[1:]])


def test_the_command_finds_confirms_and_writes_a_manifest(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    confirm = ["--confirm", "--text", "text.txt", "--window", "16"]
    assert scan("planted", *ASK, *confirm, "--json", "--plot", "scan.svg") == 0
    report = json.loads(capsys.readouterr().out)
    [expert] = report["experts"]
    assert (expert["layer"], expert["expert"], expert["row"], expert["cause"]["col"]) == (1, 2, 5, 7)
    assert expert["cause"]["tensor"] == "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    assert report["method"] == "experts" and report["confirmation"]["windows"] >= 8
    assert (expert in report["super_experts"]) == (expert["verdict"] != "inert")
    assert "<svg" in (here / "scan.svg").read_text()

    assert scan("planted", *ASK, "--manifest", "zero.yaml") == 0
    shown = capsys.readouterr().out
    assert "answer    1 super expert, not confirmed" in shown and "experts with the largest outputs" in shown
    [edit] = load_manifest(here / "zero.yaml").manifest.edits
    assert (edit.op, edit.layer, edit.expert) == ("zero", 1, 2)
    assert scan("planted", *ASK, *confirm) == 0
    shown = capsys.readouterr().out
    assert "causal test" in shown and "random experts of the same layers, each alone" in shown


def test_none_is_an_answer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scan("random", *ASK, "--manifest", "zero.yaml") == 0
    printed = capsys.readouterr()
    assert "answer    none: no super expert was found" in printed.out
    assert "nothing was found, so no manifest was written: zero.yaml" in printed.err
    assert not (here / "zero.yaml").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dense"], "the model has no experts"),
        (["planted", "--register", "x"], "super experts cannot be saved for lookup: x (leave out --register)"),
        (["planted", "--confirm", "--text", "short.txt"], "the text is too short"),
    ],
)
def test_what_cannot_be_done_is_one_line(here: Path, capsys, words: list[str], message: str) -> None:
    (here / "short.txt").write_text("a")
    assert scan(*words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("swsurgery: ") and message in line


def test_the_result_has_rows_and_a_one_line_repr(here: Path) -> None:
    import swsurgery

    found = swsurgery.scan("planted", method="experts", prompts=PROMPTS, device="cpu")
    assert [(row["layer"], row["expert"], row["row"]) for row in found.to_rows()] == [(1, 2, 5)]
    assert repr(found).startswith("ExpertScan(answer: 'found'") and "\n" not in repr(found)
    assert found.super_weights == () and np.isfinite(found.profile.outputs).all()
    assert dataclasses.replace(found, experts=()).answer == "none"
