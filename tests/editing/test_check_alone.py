"""A checkpoint without a record has nothing to be compared with, and check does not pretend that it has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import write_llama, write_manifest

import swsurgery
from swsurgery.cli import main
from swsurgery.errors import PlanError
from swsurgery.model.report import CheckReport, Continuations, Side, SuperActivation

SIDE = Side(perplexity=20.0, stopword_mass=0.25, finite=True, super_activation=SuperActivation(1, 0, 5, -12.5, 3))
REPORT = CheckReport(
    base=SIDE, patched=SIDE, perplexity_ratio=1.0, kl=0.0, windows=2, window_tokens=8, scored_tokens=14,
    prompts=(Continuations("Say", ((" yes", 0.5),), ((" yes", 0.5),)),), text_sha256="0" * 64, method="streamed",
    device="cpu", dtype="float32", torch="2", transformers="5",
)  # fmt: skip
OPTIONS = [("--max-perplexity-ratio", "9"), ("--min-perplexity-ratio", "0.1")]


@pytest.fixture
def base(tmp_path) -> Path:
    return write_llama(tmp_path / "base")


@pytest.fixture
def patched(base, tmp_path) -> Path:
    edit = {"op": "zero", "layer": 1, "row": 2, "col": 3}
    swsurgery.apply(write_manifest(tmp_path / "m.json", base, edit), output=tmp_path / "patched", check="off")
    return tmp_path / "patched"


@pytest.fixture(autouse=True)
def measured(monkeypatch) -> None:
    """Figures without a model: what is done with them is asked here."""
    monkeypatch.setattr("swsurgery.model.check.run_checks", lambda *arguments, **options: REPORT)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_bound_without_a_base_is_bad_input(base, option, capsys):
    assert main(["check", str(base), *option]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == (
        "",
        "swsurgery: a bound on the perplexity ratio needs a base to compare with, and no record names the base: "
        f"{base} (give the base with --base, or leave out the bounds)\n",
    )


@pytest.mark.parametrize("bounds", [{"max_perplexity_ratio": 9.0}, {"min_perplexity_ratio": 0.1}], ids=str)
def test_so_it_is_in_the_library(base, bounds):
    with pytest.raises(PlanError, match="needs a base to compare with"):
        swsurgery.check(base, **bounds)


def test_it_is_refused_before_torch_is_imported(base):
    code = (
        "import sys\nfrom swsurgery.cli import main\n"
        f"code = main(['check', {str(base)!r}, '--max-perplexity-ratio', '9'])\n"
        "print(code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "2 False False\n", done.stderr


def test_without_a_bound_the_document_says_that_nothing_was_compared(base, capsys):
    assert main(["check", str(base), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["compared"] is False
    assert (document["base"], document["perplexity_ratio"], document["kl"]) == (None, None, None)
    assert document["patched"]["perplexity"] == 20.0
    assert document["stopword_mass"] == {"base": None, "patched": 0.25}
    assert document["prompts"] == [{"prompt": "Say", "base": [], "patched": [[" yes", 0.5]]}]
    assert document["ok"] is True and document["failures"] == []


def test_without_a_bound_the_text_says_so_too(base, capsys):
    assert main(["check", str(base)]) == 0
    out = capsys.readouterr().out
    assert "nothing was compared, because there is no record of the base and no --base\n" in out
    assert "ratio" not in out and "patched" not in out
    assert "perplexity" in out and "' yes' 0.500" in out


def test_a_patched_checkpoint_is_compared_and_held_to_bounds(patched, capsys):
    assert main(["check", str(patched), "--json", "--max-perplexity-ratio", "9"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["compared"] is True and document["perplexity_ratio"] == 1.0
    assert document["base"]["perplexity"] == 20.0
    assert main(["check", str(patched)]) == 0
    out = capsys.readouterr().out
    assert "perplexity ratio 1.0" in out and "nothing was compared" not in out


def test_what_goes_into_records_has_no_new_field():
    assert "compared" not in REPORT.to_record()
