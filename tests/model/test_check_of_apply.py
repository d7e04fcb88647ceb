"""apply --generate, and the page of an edit that the check rejected."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoint import DOWN, TEXT, write_pair

import swsurgery
from swsurgery.cli import main
from swsurgery.errors import CheckFailed, PlanError, SwsurgeryError
from swsurgery.model.bounds import CheckedBounds


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_pair(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    path = tmp_path / "m.json"
    edits = [{"op": "set", "tensor": DOWN, "index": [3, 7], "value": 5.0}]
    path.write_text(json.dumps({"version": 1, "base": {"path": "base"}, "edits": edits}))
    return path


OPTIONS = ["--text", "text.txt", "--window", "24", "--prompt", "The river was", "--device", "cpu", "--quiet"]


def test_generate_of_apply_is_that_of_check(manifest, tmp_path, capsys):
    assert main(["apply", "m.json", "-o", "out", "--generate", "5", *OPTIONS, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["check"]["generations"]
    again = swsurgery.check("out", text=TEXT, window=24, prompts=["The river was"], generate=5, device="cpu")
    assert made == again.to_json()["generations"] and made[0]["base"] and made[0]["patched"]
    assert json.loads(Path("out/swsurgery.json").read_text())["check"]["generations"] == made
    assert main(["verify", "out", "--quiet"]) == 0
    without = swsurgery.apply(manifest, output="twin", check=swsurgery.CheckOptions(text=TEXT, window=24))
    assert "generations" not in without.to_json()["check"]


@pytest.mark.parametrize("kind", ["off", "weights"])
def test_generate_needs_a_check_that_runs_the_model(manifest, kind):
    said = f"--check {kind} does not run the model, but --generate was given"
    with pytest.raises(PlanError, match=said):
        swsurgery.apply(manifest, output="out", check=swsurgery.CheckOptions(kind, generate=2))
    assert not Path("out").exists()


def test_a_negative_number_of_tokens_is_refused():
    with pytest.raises(SwsurgeryError, match="must not be negative: -1"):
        swsurgery.CheckOptions(generate=-1)
    with pytest.raises(TypeError, match="^generate must be an integer, not None$"):
        swsurgery.CheckOptions(generate=None)  # type: ignore[arg-type]  # the test of this


@pytest.mark.parametrize("place", [["-o", "out"], ["--in-place"]])
def test_the_page_of_a_rejected_edit_is_written(manifest, tmp_path, capsys, place):
    before = {path.name: path.read_bytes() for path in Path("base").iterdir()}
    pins = swsurgery.pin(manifest)
    assert pins.added
    bound = ["--max-perplexity-ratio", "0.5"]
    assert main(["apply", "m.json", *place, *bound, "--generate", "4", *OPTIONS, "--page", "no.html"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("swsurgery: check failed: perplexity ratio above the bound: ")
    page = Path("no.html").read_text()
    for words in (
        "rejected by the check",
        "The check rejected the edit, so nothing was written.",
        "at most 0.5 allowed",
    ):
        assert words in page
    assert "Continuations" in page and "Verify and revert" not in page
    assert not Path("out").exists() and before == {path.name: path.read_bytes() for path in Path("base").iterdir()}


def test_the_error_contains_the_plan_and_the_report(manifest):
    bounds = swsurgery.CheckOptions(text=TEXT, window=24, bounds=CheckedBounds(0.5))
    with pytest.raises(CheckFailed) as caught:
        swsurgery.apply(manifest, output="out", check=bounds)
    document = caught.value.result.to_json()
    assert document["output"] is None and document["check"]["ok"] is False
    planned = swsurgery.plan(manifest).to_json()
    assert {**document, "check": None} == {
        **planned,
        **{key: document[key] for key in ("notes", "pins") if key in document},
    }


def test_a_check_of_the_weights_alone_is_reported_once(manifest, capsys):
    assert main(["apply", "m.json", "-o", "out", "--check", "weights"]) == 0
    out, err = capsys.readouterr()
    assert (out + err).count("only the weights were checked") == 1
    assert "check     only the weights were checked: a forward check was not requested\n" in out


def test_torchao_is_imported_without_its_log_lines(manifest):
    pytest.importorskip("torchao")
    command = [sys.executable, "-m", "swsurgery", "check", "base", *OPTIONS[:-1]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("swsurgery: ") for line in done.stderr.splitlines()), done.stderr
