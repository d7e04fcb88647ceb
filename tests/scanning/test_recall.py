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
import recall_tables  # noqa: E402
from recall_tables import Case, Count, Run, Trained  # noqa: E402


@pytest.fixture
def page(tmp_path, monkeypatch):
    page = tmp_path / "detection.md"
    page.write_text(f"before\n{recall_tables.BEGIN}old\n{recall_tables.END}after\n")
    monkeypatch.setattr(recall, "PAGE", page)
    return page


def test_a_small_run_prints_what_was_found(capsys, tmp_path, page):
    recall.main(["--quick", "--jobs", "1", "--write", "--json", str(tmp_path / "one.json")])
    printed = capsys.readouterr().out
    assert "| lfm2 | 6 | 2/2 (0.34 to 1.00) |" in printed
    assert "| models with a scalar that was not planted |  | 0/2 (0.00 to 0.66) |" in printed
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert printed.strip() in text
    recall.main(["--quick", "--jobs", "2", "--json", str(tmp_path / "two.json")])
    one, two = (Run.read(tmp_path / f"{name}.json") for name in ("one", "two"))
    assert one.counts == two.counts and (one.jobs, two.jobs) == (1, 2)  # any number of processes gives the same


def test_runs_of_several_machines_make_one_page(capsys, tmp_path, page):
    cases = [Case("llama", 6, size, seed) for size in (None, 30) for seed in range(2)]
    first = Run(
        "16 cores", 16, 40.0, {case: Count(1, 1, models=1) for case in cases}, missing=("zaya: gone", "lfm2: no")
    )
    lfm2 = {Case("lfm2", 6, 30, seed): Count(2, 1, 1, 1, models=1) for seed in range(2)}
    second = Run("2 cores", 2, 9.0, lfm2, (Trained("small", 8, 2, 0, 1, 0, "-"),))
    for name, run in (("a", first), ("b", second)):
        run.write(tmp_path / name)
        assert Run.read(tmp_path / name) == run
    files = [str(tmp_path / name) for name in "ab"]
    recall.main(["--read", *files, "--write"])
    text = page.read_text()
    assert "- llama: 40 seconds with 16 processes. 16 cores\n- lfm2: 9 seconds with 2 processes. 2 cores\n" in text
    assert "- not measured: zaya: gone\n" in text and "lfm2: no" not in text
    assert "| llama | 6 | 2/2 (0.34 to 1.00) | 0/2 (0.00 to 0.66) |" in text
    assert "| hybrids: these listed as creating |  | 2/4 (0.15 to 0.85) | |" in text
    assert text.count("| small | 8 | 2 | 0 | 1 | 0 | - |") == 1
    recall.main(["--read", files[0], "--write"])  # the table of trained models stays
    assert "lfm2: 9 seconds" not in page.read_text() and page.read_text().count("| small | 8 | 2 |") == 1
    recall.main(["--read", *files, "--write"])
    assert page.read_text() == text


def test_folders_may_come_before_and_after_the_options(monkeypatch):
    given = []
    monkeypatch.setattr(recall, "run", lambda *each: given.append(each) or Run("", 1, 0.0, {}))
    recall.main(["a", "--seeds", "2", "b", "--jobs", "1"])
    recall.main(["a", "--families", "zamba"])
    assert [each[4] for each in given] == [[Path("a"), Path("b")], [Path("a")]]
    assert (given[0][2], given[1][0]) == (2, ["zamba"])


def test_a_family_that_transformers_does_not_have_is_named(capsys, monkeypatch):
    monkeypatch.setattr(recall, "RECURRING", ("lfm2", "lfm99"))
    monkeypatch.setattr(recall, "DEPTHS", (6,))
    recall.main(["--families", "lfm99"])
    assert "- not measured: lfm99: KeyError in transformers " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_the_interval_of_a_share_is_wilsons(hits, total, low, high):
    """The last case is the example of R. G. Newcombe, Stat. Med. 17, 1998, table I; the others are computed by hand."""
    assert recall_tables.compute_wilson(hits, total) == pytest.approx((low, high), abs=5e-5)


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
    counts = recall.measure("lfm2", 6, 1)
    assert counts[Case("lfm2", 6, None, 1)] == Count(models=1)
    assert counts[Case("lfm2", 6, 1000, 1)] == Count(2, 2, 2, models=1)


def test_another_neuron_is_planted_if_no_token_turns_the_first_one_on(monkeypatch):
    model = planted.build("llama", 0, 6, **recall.WIDE)
    places, plant = [], planted.plant

    def fail_once(model, place):
        places.append(place)
        if len(places) == 1:
            planted.weights_of(model, place)[2].zero_()
            raise AssertionError
        return plant(model, place)

    monkeypatch.setattr(planted, "plant", fail_once)
    with torch.no_grad():
        assert recall.plant(model, recall.random.Random(1)) == places[1] != places[0]
    assert planted.weights_of(model, places[0])[2] != 0  # as it was
