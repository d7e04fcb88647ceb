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
ROOT = Path(__file__).parents[1]


def run(*words: object) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "swsurgery", *map(str, words), "--json"], capture_output=True, text=True
    )
    assert done.returncode == (1 if words[0] == "diff" else 0), done.stderr
    return json.loads(done.stdout)


def test_zeroing_the_super_weight_is_checked_proved_and_undone(tmp_path):
    """The figures of the check are known from independent measurements: perplexity rises about fivefold, Paris goes,
    and the largest activation leaves layer 11, channel 507."""
    base, patched, reverted = Path(MODEL), tmp_path / "patched", tmp_path / "reverted"
    applied = run("apply", ROOT / "demo" / "zero-one-scalar.yaml", "--base", base, "-o", patched)
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
