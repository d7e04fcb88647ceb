"""The main job on SmolLM2-135M-Instruct, whose super weight sits in layer 11. `make test` fetches the model and names
its directory in SWSURGERY_TEST_MODEL."""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = os.environ.get("SWSURGERY_TEST_MODEL")
pytestmark = [pytest.mark.model, pytest.mark.skipif(not MODEL, reason="SWSURGERY_TEST_MODEL names no model")]


def run(*words: object) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "swsurgery", *map(str, words), "--json"], capture_output=True, text=True
    )
    assert done.returncode == (1 if words[0] == "diff" else 0), done.stderr
    return json.loads(done.stdout)


def test_the_super_weights_are_found(tmp_path):
    """Two neurons of layer 11 and two of layer 2 write what persists; the weights alone put the neuron that takes it
    back, and the one that makes it, before 26.5 million other scalars."""
    scanned = run("scan", MODEL, "--manifest", tmp_path / "zero.yaml")
    places = [(s["layer"], s["row"], s["col"], s["value"]) for s in scanned["super_weights"]]
    assert places[0] == (11, 507, 1229, 5.875)
    assert set(places) >= {(11, 507, 1229, 5.875), (2, 507, 90, 5.09375)}
    assert {place[0] for place in places} == {2, 11}
    planned = run("apply", tmp_path / "zero.yaml", "--dry-run")
    assert sorted(splice["old"] for splice in planned["splices"]) == sorted(place[3] for place in places)

    by_weights = run("scan", MODEL, "--method", "weights")["super_weights"]
    assert [(s["layer"], s["row"], s["col"]) for s in by_weights[:2]] == [(28, 507, 678), (11, 507, 1229)]


def test_streamed_logits_are_those_of_transformers():
    import torch
    import transformers

    from swsurgery.checkpoint.opening import open_checkpoint
    from swsurgery.model import load

    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer("The capital of France is")["input_ids"]
    streamed = load.open_model(open_checkpoint(Path(MODEL)), device="cpu", placement="streamed", say=pytest.fail)
    [logits] = [outcome.logits[0] for outcome in streamed.run([ids])]
    whole = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
    with torch.no_grad():
        expected = whole(input_ids=torch.tensor([ids])).logits[0]
    assert (streamed.method, logits.dtype, expected.dtype) == ("streamed", torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.25)  # one unit of bfloat16 at their size
    assert logits[-1].argmax() == expected[-1].argmax()


def test_zeroing_the_super_weight_is_checked_proved_and_undone(tmp_path):
    """The figures of the check are known from independent measurements: perplexity rises about fivefold, Paris goes,
    and the largest activation leaves layer 11, channel 507."""
    base, patched, reverted = Path(MODEL), tmp_path / "patched", tmp_path / "reverted"
    manifest = tmp_path / "zero.yaml"
    manifest.write_text(
        "version: 1\nbase: {path: .}\nedits:\n  - {op: zero, layer: 11, row: 507, col: 1229, expect: 5.875}\n"
        "check: {min_perplexity_ratio: 2.0}\n"
    )
    applied = run("apply", manifest, "--base", base, "-o", patched, "--windows", 7)  # what was measured independently
    (splice,) = applied["splices"]
    assert (splice["old"], splice["new"]) == (5.875, 0.0)

    check = applied["check"]
    assert check["kind"] == "forward" and check["ok"]
    assert check["perplexity_ratio"] == pytest.approx(4.8, abs=0.3)
    assert check["base"]["super_activation"] | {"value": 0, "window": 0} == {
        "layer": 11, "token": 0, "channel": 507, "value": 0, "window": 0,
    }  # fmt: skip
    assert check["patched"]["super_activation"]["layer"] > 11
    france = next(p for p in check["prompts"] if p["prompt"] == "The capital of France is")
    assert france["base"][0][0] == " Paris"
    assert " Paris" not in [token for token, _ in france["patched"]]

    changed = [f.name for f in base.iterdir() if not filecmp.cmp(f, patched / f.name, shallow=False)]
    assert changed == [splice["file"]]
    assert run("verify", patched, "--base", base)["ok"]
    assert run("diff", base, patched)["changes"] == [
        {"tensor": splice["tensor"], "index": [507, 1229], "old": 5.875, "new": 0.0}
    ]
    run("revert", patched, "-o", reverted)
    assert filecmp.dircmp(base, reverted).left_only == filecmp.dircmp(base, reverted).right_only == []
    assert filecmp.cmpfiles(base, reverted, [f.name for f in base.iterdir()], shallow=False)[1:] == ([], [])


@pytest.mark.parametrize(
    ("ending", "halved", "states", "code"),
    [
        ("weight_scale", False, {"kept"}, 0),
        ("weight_scale", True, {"lost"}, 1),
        ("scale", False, {"unreadable"}, 2),
        ("scale", True, {"unreadable"}, 2),
        ("scale_weight", False, {"kept"}, 0),
        ("scale_weight", True, {"lost"}, 1),
        (None, False, {"suspicious"}, 2),
        (None, True, {"suspicious"}, 2),
    ],
)
def test_fp8_codes_prove_nothing_without_a_scale_of_a_known_format(tmp_path, ending, halved, states, code):
    """The down projections of layers 2 and 11 in FP8: raw codes are 76 times the weights, even after a halving."""
    import shutil

    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    stored = {}
    for shard in Path(MODEL).glob("*.safetensors"):
        with safe_open(shard, "pt") as tensors:
            wanted = {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (2, 11)}
            for name in wanted.intersection(tensors.keys()):
                weight = tensors.get_tensor(name).float()
                scale = weight.abs().max() / 448
                codes = weight / scale / (2 if halved else 1)
                stored[name] = codes.to(torch.float8_e4m3fn)
                if ending:
                    stored[name.removesuffix("weight") + ending] = scale.reshape(())
    save_file(stored, tmp_path / "model.safetensors")
    shutil.copy(Path(MODEL) / "config.json", tmp_path)
    words = ["verify", str(tmp_path), "--model", "smollm2-135m-instruct", "--json"]
    done = subprocess.run([sys.executable, "-m", "swsurgery", *words], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    known = json.loads(done.stdout)["known"]
    assert {c["state"] for c in known["coordinates"]} == states
    assert known["decided"] is (code < 2)


def test_it_is_complete_by_its_headers_and_by_transformers():
    assert run("preflight", MODEL)["answer"].startswith("complete: 30 layers, 272 tensors in ")
    verified = run("verify", MODEL, "--complete", "--transformers")
    assert verified["findings"] == [] and verified["complete"]["transformers"]["missing"] == []
