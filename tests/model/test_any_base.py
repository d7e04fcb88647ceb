"""check --base compares any two checkpoints of one architecture, and check --generate continues prompts greedily."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_checkpoint import TEXT, Pair, write_pair

import swsurgery
from swsurgery.cli import main
from swsurgery.errors import PlanError, SwsurgeryError
from swsurgery.model.report import CheckReport

PROMPTS = ["The river was", "In practice it went"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("pair"), [((3, 7), 5.0), ((9, 2), -4.0)])


def check(checkpoint: Path, base: Path | None = None, **options) -> CheckReport:
    settings = {"text": TEXT, "prompts": PROMPTS, "window": 24, "device": "cpu"} | options
    return swsurgery.check(checkpoint, base=base, **settings)


def copy(source: Path, target: Path, change) -> Path:
    """A copy of a checkpoint with each tensor changed."""
    shutil.copytree(source, target)
    for path in target.glob("*.safetensors"):
        save_file({name: change(tensor) for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return target


def blur(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * (1 + 0.1 * torch.sin(torch.arange(tensor.numel())).reshape(tensor.shape)).to(tensor.dtype)


@pytest.mark.parametrize(
    ("change", "placement", "method"),
    [
        (blur, "whole", "layer by layer"),
        (blur, "streamed", "streamed"),
        (lambda tensor: blur(tensor).half(), "whole", "separate models"),
    ],
)
def test_any_checkpoint_of_the_architecture_can_be_the_base(pair, tmp_path, change, placement, method):
    other = copy(pair.base, tmp_path / "other", change)
    report = check(pair.patched, other, placement=placement)
    assert (report.compared, report.method) == (True, method)
    alone = check(other)
    assert report.base.perplexity == pytest.approx(alone.patched.perplexity, rel=1e-3)
    assert report.patched.perplexity == pytest.approx(check(pair.patched).patched.perplexity, rel=1e-3)
    assert report.base.perplexity != pytest.approx(report.patched.perplexity, rel=1e-3) and report.kl > 0
    for ours, theirs in zip(report.prompts, alone.prompts, strict=True):
        assert [token for token, _ in ours.base] == [token for token, _ in theirs.patched]


def test_the_same_checkpoint_twice_does_not_differ(pair):
    report = check(pair.base, pair.base)
    assert (report.compared, report.perplexity_ratio, report.kl) == (True, 1.0, 0.0)


def test_a_bound_needs_no_record_if_a_base_is_given(pair, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ["check", str(pair.patched), "--base", str(pair.base), "--text", str(tmp_path / "text.txt")]
    assert main([*arguments, "--window", "24", "--min-perplexity-ratio", "1000"]) == 1
    assert "perplexity ratio below the bound" in capsys.readouterr().out


def test_another_base_than_the_record_names_is_noted(pair, tmp_path, capsys):
    edit = {"op": "zero", "layer": 1, "row": 3, "col": 7}
    swsurgery.apply([edit], pair.patched, tmp_path / "out", check="off")
    assert main(["check", str(tmp_path / "out"), "--base", str(pair.patched), "--window", "24"]) == 0
    assert "is not the base of the record" not in capsys.readouterr().err
    other = copy(pair.base, tmp_path / "other", blur)
    assert main(["check", str(tmp_path / "out"), "--base", str(other), "--window", "24"]) == 0
    assert f"{other} is not the base of the record: " in capsys.readouterr().err


def test_other_sizes_are_one_line_with_both(pair, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(pair.base, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 7}))
    with pytest.raises(
        PlanError, match=r"the checkpoints have different sizes: .*vocabulary 320 .*vocabulary 7 "
    ) as error:
        check(pair.patched, other)
    assert len(error.value.faults) == 1
    (other / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    with pytest.raises(PlanError, match="different architectures: llama in .*, mistral in "):
        check(pair.patched, other)
    (other / "config.json").write_text(json.dumps(config))
    path = next(other.glob("*.safetensors"))
    tensors = load_file(path)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"][:-1].clone()}, path)
    with pytest.raises(
        PlanError, match=r"the shapes of a tensor differ: \[\d+\] in .*, \[\d+\] in .*: model.norm.weight"
    ):
        check(pair.patched, other)


@pytest.mark.parametrize("placement", ["whole", "streamed"])
def test_generated_text_is_that_of_transformers(pair, placement):
    report = check(pair.patched, pair.base, generate=9, placement=placement)
    assert [made.prompt for made in report.generations] == PROMPTS
    for folder, side in ((pair.base, "base"), (pair.patched, "patched")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for made in report.generations:
            ids = tokenizer(made.prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
            found = model.generate(ids, do_sample=False, max_new_tokens=9, eos_token_id=-1, pad_token_id=0)
            wanted = tokenizer.decode(found[0, ids.shape[1] :], clean_up_tokenization_spaces=False)
            assert getattr(made, side) == wanted
    assert report.to_json()["generations"][0].keys() == {"prompt", "base", "patched"}


def test_a_model_alone_is_continued_too(pair, capsys):
    made = check(pair.base, generate=3).to_json()["generations"]
    assert [each["base"] for each in made] == [None, None] and made[0]["patched"]
    assert main(["check", str(pair.base), "--window", "24", "--prompt", "The river was", "--generate", "3"]) == 0
    out = capsys.readouterr().out
    assert f"continued by the most likely tokens\n\n'The river was'\n           {made[0]['patched']!r}\n" in out
    with pytest.raises(SwsurgeryError, match="must not be negative"):
        check(pair.base, generate=-1)


def test_few_tokens_are_noted(pair):
    report = check(pair.base)
    assert report.scored_tokens < 500 and report.to_json()["notes"] == list(report.notes)
    assert report.notes[0].startswith(f"only {report.scored_tokens} tokens were scored")
    enough = check(pair.base, text=TEXT * 20, window=40)
    assert enough.scored_tokens >= 500 and enough.notes == () and "notes" not in enough.to_json()
