"""The verdict on the figures, and everything that the check refuses to judge."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoint
import torch
from reports import REPORT, SIDE
from safetensors.torch import load_file, save_file
from tiny_checkpoint import DOWN, TEXT, Pair, change, write_pair

from swsurgery import model
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.errors import CheckpointError, ModelError
from swsurgery.model import check, load
from swsurgery.model.bounds import CheckedBounds
from swsurgery.model.protocol import Protocol
from swsurgery.model.report import CheckReport, Side, SuperActivation
from swsurgery.progress import Silent


@pytest.mark.parametrize(
    ("ratio", "bounds", "words"),
    [
        (1.5, CheckedBounds(), []),
        (99.0, CheckedBounds(), []),
        (1.5, CheckedBounds(max_perplexity_ratio=1.5), []),  # inclusive
        (1.5, CheckedBounds(min_perplexity_ratio=1.5), []),
        (1.5, CheckedBounds(max_perplexity_ratio=2, min_perplexity_ratio=1), []),
        (1.5001, CheckedBounds(max_perplexity_ratio=1.5), ["above"]),
        (1.4999, CheckedBounds(min_perplexity_ratio=1.5), ["below"]),
        (1.5, CheckedBounds(max_perplexity_ratio=1, min_perplexity_ratio=2), ["above", "below"]),
        (math.nan, CheckedBounds(), []),
        (math.nan, CheckedBounds(max_perplexity_ratio=2), ["above"]),
        (math.nan, CheckedBounds(min_perplexity_ratio=2), ["below"]),
        (math.inf, CheckedBounds(max_perplexity_ratio=2), ["above"]),
        (math.inf, CheckedBounds(min_perplexity_ratio=2), ["below"]),
        (1.5, CheckedBounds(max_perplexity_ratio=math.nan), ["above"]),
    ],
)
def test_bounds_decide(ratio: float, bounds: CheckedBounds, words: list[str]) -> None:
    report = replace(REPORT, perplexity_ratio=ratio, bounds=bounds)
    assert [line.split(" the bound:")[0] for line in report.failures] == [f"perplexity ratio {word}" for word in words]
    assert report.ok is (not words)
    assert report.to_json()["ok"] is (not words)
    assert all("\n" not in line and line.endswith(")") for line in report.failures)


def test_logits_that_are_not_finite_fail_without_bounds_if_they_are_the_patched_ones() -> None:
    broken = replace(SIDE, finite=False)
    assert replace(REPORT, base=broken).ok
    (line,) = replace(REPORT, patched=broken).failures
    assert line.startswith("logits of the patched model are not finite")


def test_json_has_the_promised_shape() -> None:
    document = replace(REPORT, bounds=CheckedBounds(max_perplexity_ratio=1.05)).to_json()
    assert document["base"]["perplexity"] == 20.0
    assert document["patched"]["perplexity"] == 30.0
    assert document["perplexity_ratio"] == 1.5
    assert document["kl"] == 0.1
    assert document["stopword_mass"] == {"base": 0.25, "patched": 0.25}
    assert document["prompts"] == [{"prompt": "Say", "base": [[" yes", 0.5], [" no", 0.333333]], "patched": []}]
    assert document["ok"] is False
    assert document["failures"] == [
        "perplexity ratio above the bound: 1.5, at most 1.05 allowed (weaken the edits or raise max_perplexity_ratio)"
    ]
    assert document["bounds"] == {"max_perplexity_ratio": 1.05, "min_perplexity_ratio": None}
    assert document["base"]["super_activation"] == {
        "layer": 1,
        "token": 0,
        "channel": 5,
        "value": -1234.57,
        "window": 3,
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_stays_strict_where_numbers_are_not_finite(value: float) -> None:
    side = Side(value, value, False, SuperActivation(0, 0, 0, value, 0))
    report = replace(
        REPORT,
        base=side,
        patched=side,
        perplexity_ratio=value,
        kl=value,
        bounds=CheckedBounds(max_perplexity_ratio=value),
    )
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    for name in ("base", "patched"):
        assert document[name]["perplexity"] is None
        assert document[name]["super_activation"]["value"] is None
    assert document["stopword_mass"] == {"base": None, "patched": None}
    assert (document["perplexity_ratio"], document["kl"], document["ok"]) == (None, None, False)


def test_json_without_a_super_activation_says_null() -> None:
    assert replace(REPORT, base=replace(SIDE, super_activation=None)).to_json()["base"]["super_activation"] is None


# On real, if tiny, models --------------------------------------------------------------------------------------------


def run(pair: Pair, directory: Path | None = None, **options: Any) -> CheckReport:
    settings = {"text": TEXT, "prompts": ("The river",), "protocol": Protocol(window=24), "device": "cpu"} | options
    return check.run_checks(open_checkpoint(directory or pair.patched), pair.changes, **settings)


def refusal(pair: Pair, directory: Path | None = None, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        run(pair, directory, **options)
    (line,) = caught.value.faults
    assert "\n" not in line
    return line


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return write_pair(tmp_path)


def test_bounds_reach_the_report(pair: Pair) -> None:
    free = run(pair)
    assert free.ok
    assert free.bounds == CheckedBounds()
    bounds = CheckedBounds(max_perplexity_ratio=free.perplexity_ratio * 0.99)
    assert not run(pair, bounds=bounds).ok
    assert run(pair, bounds=CheckedBounds(min_perplexity_ratio=free.perplexity_ratio * 0.99)).ok


def test_an_overflowing_patch_fails_and_the_base_keeps_its_figures(tmp_path: Path) -> None:
    broken = write_pair(tmp_path / "broken", [((3, column), 3e38) for column in range(24)])
    report = run(broken)
    assert (report.base.finite, report.patched.finite, report.ok) == (True, False, False)
    assert report.base.perplexity == pytest.approx(run(write_pair(tmp_path / "sound")).base.perplexity, rel=1e-5)
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["patched"]["perplexity"] is None
    assert document["prompts"][0]["patched"] == []
    assert len(document["prompts"][0]["base"]) == 5


def test_bfloat16_is_read_as_float32_where_that_fits_and_streamed_where_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = write_pair(tmp_path, dtype=torch.bfloat16)
    wide = run(pair)
    monkeypatch.setattr(load, "_measure_free_bytes", lambda device: 1000)
    narrow = run(pair)
    assert (wide.dtype, wide.method) == ("float32", "layer by layer")
    assert (narrow.dtype, narrow.method) == ("bfloat16", "streamed")
    assert narrow.patched.perplexity == pytest.approx(wide.patched.perplexity, rel=0.05)


@pytest.mark.parametrize(("free", "method"), [(0.99, "streamed"), (1.01, "layer by layer")])
def test_float32_may_fill_three_fifths_of_the_free_memory(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, free: float, method: str
) -> None:
    needed = sum(tensor.numel() * 4 for tensor in load_file(pair.patched / "model.safetensors").values())
    monkeypatch.setattr(load, "_measure_free_bytes", lambda device: free * needed / 0.6)
    assert run(pair).method == method


def test_free_memory_is_a_plausible_number() -> None:
    assert 2**24 < load._measure_free_bytes(torch.device("cpu")) < 2**50


# Refusals ------------------------------------------------------------------------------------------------------------


def test_missing_libraries_are_named(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model.explain_unavailable() is None
    monkeypatch.setitem(sys.modules, "torch", None)
    assert model.explain_unavailable() == "torch is not installed"
    line = refusal(pair)
    assert line.startswith("torch is not installed: ")
    assert line.endswith(": a model has to be run (pip install 'swsurgery[check]')")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert model.explain_unavailable() == "torch and transformers are not installed"


def test_importing_the_check_does_not_load_torch() -> None:
    code = (
        "import sys, swsurgery.model.check, swsurgery.model.report, swsurgery.progress; "
        "swsurgery.model.explain_unavailable(); "
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_no_tokenizer(pair: Pair) -> None:
    for file in pair.patched.glob("tokenizer*"):
        file.unlink()
    assert refusal(pair).startswith("no tokenizer")


def test_no_tokenizer_where_transformers_would_make_one_up(pair: Pair) -> None:
    for file in pair.patched.glob("tokenizer*"):
        file.unlink()
    config = pair.config | {"model_type": "gpt2"}
    (pair.patched / "config.json").write_text(json.dumps(config))
    line = refusal(pair)
    assert line.startswith("no tokenizer: ")
    assert line.endswith(" (copy the base model's tokenizer.json there)")


def test_a_tokenizer_of_another_model(pair: Pair) -> None:
    tokenizer = tiny_checkpoint.make_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(40)])
    tokenizer.save_pretrained(pair.patched)
    assert "the model has 320" in refusal(pair, text="word39 " * 60)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"text": ""}, "the text is too short: 0 of the 2 tokens that are needed"),
        ({"text": "a"}, "the text is too short: 1 of the 2 tokens that are needed"),
        ({"prompts": ("The river", "")}, "the prompt has 0 tokens, but the model accepts 1 to "),
        ({"prompts": ("!?" * 40,)}, "the prompt has 80 tokens, but the model accepts 1 to "),
        ({"device": "tpu"}, "no such device: tpu"),
        ({"device": "cuda:x"}, "no such device: cuda:x"),
        ({"device": "cpu:1"}, "no such device: cpu:1"),
        ({"device": "cuda:999"}, "no usable CUDA device: cuda:999 (use --device cpu"),
    ],
)
def test_unusable_options(pair: Pair, options: dict[str, Any], line: str) -> None:
    assert refusal(pair, **options).startswith(line)


def test_no_cuda_device(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refusal(pair, device="cuda") == "no usable CUDA device: cuda (use --device cpu)"
    assert run(pair, device="auto").device == "cpu"


@pytest.mark.parametrize(("placement", "remedy"), [("whole", " (--placement streamed)"), ("streamed", "")])
def test_a_device_that_runs_out_of_memory(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, placement: str, remedy: str
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(load.transformers.LlamaForCausalLM, "forward", fail)
    assert refusal(pair, placement=placement) == f"not enough memory on the device: cpu{remedy}"


def test_a_directory_without_weights(pair: Pair) -> None:
    (pair.patched / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors"):
        run(pair)


def test_weights_that_transformers_would_make_up(pair: Pair) -> None:
    tensors = load_file(pair.patched / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, pair.patched / "model.safetensors", {"format": "pt"})
    assert refusal(pair).startswith("weights that the model needs are missing: model.norm.weight: ")


@pytest.mark.parametrize("placement", ["whole", "streamed"])
def test_a_tensor_that_does_not_fit_the_config_is_named_with_both_shapes(pair: Pair, placement: str) -> None:
    config = pair.config
    width, neurons = config["hidden_size"], config["intermediate_size"]
    for size, misfit in (
        (
            {"vocab_size": 328},
            f"lm_head.weight is stored as [320, {width}], but config.json asks for [328, {width}], and 1",
        ),
        ({"intermediate_size": 32}, f"[{width}, {neurons}], but config.json asks for [{width}, 32], and 5"),
    ):
        (pair.patched / "config.json").write_text(json.dumps(config | size))
        line = refusal(pair, placement=placement)
        assert line.endswith(f"{misfit} more tensors do not fit it: {pair.patched} (repair its config.json)")
    (pair.patched / "config.json").write_text(json.dumps(config))
    assert run(pair, placement=placement).base.finite


def test_a_model_that_transformers_does_not_know(pair: Pair) -> None:
    config = pair.config | {"model_type": "abacus"}
    (pair.patched / "config.json").write_text(json.dumps(config))
    line = refusal(pair)
    assert line.startswith(("transformers cannot load the model: ", "the tokenizer cannot be loaded: "))


def test_code_that_a_checkpoint_brings_along_is_not_run(pair: Pair) -> None:
    marker = pair.patched / "was_run"
    (pair.patched / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n")
    names = {name: "evil.Evil" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}
    config = pair.config | {"model_type": "abacus", "auto_map": names}
    (pair.patched / "config.json").write_text(json.dumps(config))
    refusal(pair)
    assert not marker.exists()


def test_the_value_in_the_directory_is_not_the_patched_one(pair: Pair) -> None:
    wrong = replace(pair, changes=(change((3, 7), patched=4.0, base=0.0),))
    assert f"the stored value 5 is not the patched value 4: {DOWN}[3, 7]" in refusal(wrong)


def test_silence_has_the_shape_of_progress() -> None:
    silent = Silent()
    assert [silent.start(3, "B", "copy"), silent.advance(1), silent.close(), silent.close()] == [None] * 4
