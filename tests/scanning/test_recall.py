"""benchmarks/recall.py: the tables of planted scalars, found scalars and intervals."""

from __future__ import annotations

import sys
from pathlib import Path

import planted
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import recall  # noqa: E402


def test_a_small_run_prints_what_was_found(capsys, tmp_path, monkeypatch):
    page = tmp_path / "detection.md"
    page.write_text(f"before\n{recall.BEGIN}old\n{recall.END}after\n")
    monkeypatch.setattr(recall, "PAGE", page)
    recall.main(["--quick", "--jobs", "1", "--write"])
    printed = capsys.readouterr().out
    assert "| lfm2 | 6 | 2/2 (0.34 to 1.00) |" in printed
    assert "| models with a scalar that was not planted | | 0/2 (0.00 to 0.66) |" in printed
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert printed.strip() in text


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_the_interval_of_a_share_is_wilsons(hits, total, low, high):
    """The last case is the example of R. G. Newcombe, Stat. Med. 17, 1998, table I; the others are computed by hand."""
    assert recall.compute_wilson(hits, total) == pytest.approx((low, high), abs=5e-5)


def test_a_spike_has_the_size_that_was_asked_for():
    model, place = planted.build("llama", 0, 6, **recall.WIDE), planted.Place(1, 40, 70)
    planted.plant(model, place)
    recall.set_size(model, place, 100)
    ratios = []
    for ids in planted.SEQUENCES:
        with torch.no_grad():
            states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        after = states[2][0].abs()
        ratios.append(float(after[:, 40].max() / after.median()))
    assert max(ratios) == pytest.approx(100, rel=0.02)


def test_what_was_not_planted_is_counted():
    case = recall.Case("lfm2", 6, None, 1)
    assert recall.measure(case) == recall.Count(models=1)
