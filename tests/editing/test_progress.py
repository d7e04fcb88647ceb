"""What someone who waits is shown: a bar whose label says what the work has come to, and in which round."""

from __future__ import annotations

import io
import sys

import pytest
from checkpoints import HEAD, NORM, write_llama, write_manifest

import swsurgery
from swsurgery.cli.output import Bar
from swsurgery.progress import Progress, Rounds, Silent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(progress: Progress, layers: int) -> None:
    progress.start(layers * 1000, "B", f"{layers} layers")
    for number in range(layers):
        progress.relabel(f"layer {number + 1}/{layers}")
        progress.advance(1000)
    progress.close()
    progress.relabel("nothing")


def test_the_bar_counts_layers_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    work(Bar(), 3)
    drawn = [frame.strip() for frame in sys.stderr.getvalue().split("\r")]
    labels = list(dict.fromkeys(frame.partition(":")[0] for frame in drawn if frame))
    assert labels == ["3 layers", "layer 1/3", "layer 2/3", "layer 3/3"]
    assert any(frame.startswith("layer 3/3:") and "2.00k/3.00k" in frame for frame in drawn)


def test_a_second_task_is_the_second_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    rounds = Rounds(Bar())
    work(rounds, 1)
    work(rounds, 2)
    drawn = sys.stderr.getvalue()
    for label in ("round 1, layer 1/1:", "round 2, layer 1/2:", "round 2, layer 2/2:"):
        assert label in drawn
    assert "round 1, layer 1/2" not in drawn and "round 3" not in drawn and "nothing" not in drawn


@pytest.mark.parametrize("progress", [Bar(quiet=True), Rounds(Bar(quiet=True)), Silent(), Rounds(Silent())])
def test_who_does_not_watch_sees_nothing(monkeypatch: pytest.MonkeyPatch, progress: Progress) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    work(progress, 2)
    assert sys.stderr.getvalue() == ""


class Phases(Silent):
    """Records each phase as [label, bytes done, bytes in all]."""

    def __init__(self) -> None:
        self.phases: list[list] = []

    def start(self, total: int, unit: str, label: str) -> None:
        self.phases.append([label, 0, total])

    def advance(self, n: int) -> None:
        self.phases[-1][1] += n


def test_an_edit_of_tensors_first_measures_and_then_copies(tmp_path) -> None:
    edits = [
        {"op": "round", "tensors": "model.layers.*", "bits": 4, "clip": {"z": 5}},
        {"op": "clip", "tensors": HEAD, "fraction": 0.1},
        {"op": "zero", "tensors": "model.embed_tokens.weight"},
        {"op": "prune_outliers", "tensors": NORM, "count": 2},
    ]
    manifest = write_manifest(tmp_path / "m.json", write_llama(tmp_path / "base"), *edits)
    watched = Phases()
    swsurgery.apply(manifest, output=tmp_path / "out", check="off", reporter=watched)
    assert [label for label, _, _ in watched.phases] == [
        "measuring for round",
        "measuring for clip",
        "measuring for prune_outliers",
        "copying",
    ]
    assert all(done == total > 0 for _, done, total in watched.phases)
    watched.phases.clear()
    swsurgery.verify(tmp_path / "out", reporter=watched)
    assert all(done == total > 0 for _, done, total in watched.phases)
