"""What someone who waits is shown: a bar whose label says what the work has come to, and in which round."""

from __future__ import annotations

import io
import sys

import pytest

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
