"""Long texts: the windows are divided into readings of the weights, and every digit stays the same."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoint
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_checkpoint import TEXT, Pair, write_pair

import swsurgery
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.model import forward, load, readings
from swsurgery.model.forward import LayeredModel
from swsurgery.model.outcomes import Group
from swsurgery.model.report import CheckReport
from swsurgery.model.windows import count_variants_at_once

TOKEN = 2 * 16 * 4
"""Size in bytes of the hidden states of one token in base and patched model: 16 channels in float32."""


DOCUMENTS = f" = One = \n {TEXT} = Two = \n short \n = Three = \n {TEXT * 2}"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("pair"), [((3, 7), 5.0), ((9, 2), -4.0)], bos=True)


class Recorder:
    """Records the labels and the sums of progress."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self.total = self.done = 0

    def start(self, total: int, unit: str, label: str) -> None:
        self.total, self.done = total, 0

    def advance(self, n: int) -> None:
        self.done += n

    def relabel(self, label: str) -> None:
        self.labels.append(label)

    def close(self) -> None:
        pass

    def say(self, line: str) -> None:
        pass


def check(pair: Pair, **options: Any) -> CheckReport:
    settings = {"base": pair.base, "text": TEXT * 6, "prompts": ["The river", "In"], "device": "cpu"} | options
    return swsurgery.check(pair.patched, **settings)


@pytest.mark.parametrize(
    "options",
    [
        {"protocol": "paper", "window": 20, "placement": "streamed"},
        {"window": 12, "windows": 60, "stride": 5},
        {"protocol": "lm-eval", "window": 40, "text": DOCUMENTS},
        {"window": 20, "windows": 30, "activation_bits": 8},
    ],
    ids=["paper", "overlap", "documents", "rounded"],
)
def test_any_limit_gives_the_same_digits(pair: Pair, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    monkeypatch.setattr(forward, "TOKENS_AT_ONCE", 60)  # a layer computes 2 to 5 windows together
    whole = check(pair, **options)
    for tokens in (400, 130):
        monkeypatch.setattr(readings, "STATES", tokens * TOKEN)
        recorder = Recorder()
        assert check(pair, reporter=recorder, **options) == whole
        numbered = [label for label in recorder.labels if label.startswith("reading 2 of ")]
        assert numbered[0].endswith(", layer 1/2") and ", sequence 1/" in numbered[2]
        assert recorder.done == recorder.total


def test_tensors_of_the_base_are_read_once_per_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = write_pair(tmp_path, [])
    manifest = tmp_path / "m.yaml"
    edit = f"{{op: scale, tensors: {tiny_checkpoint.DOWN}, factor: 0.5}}"
    other = "{op: scale, tensors: lm_head.weight, factor: 0.5}"
    manifest.write_text(f"version: 1\nbase: {{path: {pair.base}}}\nedits: [{edit}, {other}]\n")
    options: dict[str, Any] = {"text": TEXT * 6, "windows": 30, "window": 10, "device": "cpu", "placement": "streamed"}
    monkeypatch.setattr(forward, "TOKENS_AT_ONCE", 20)
    whole = swsurgery.compare([manifest], **options)
    monkeypatch.setattr(readings, "STATES", 70 * TOKEN)
    assert swsurgery.compare([manifest], **options) == whole
    assert whole.models[1].ratio != 1


def test_factors_and_windows_are_divided_without_a_change(pair: Pair, tmp_path: Path, monkeypatch: Any) -> None:
    manifest = tmp_path / "m.yaml"
    manifest.write_text(
        f"version: 1\nbase: {{path: {pair.base}}}\n"
        f"edits: [{{op: zero, tensor: {tiny_checkpoint.DOWN}, index: [3, 7]}}]\n"
    )
    options: dict[str, Any] = {"text": TEXT * 6, "windows": 40, "window": 10, "device": "cpu"}
    monkeypatch.setattr(forward, "TOKENS_AT_ONCE", 40)
    whole = swsurgery.sweep(manifest, factors=[0, 0.5, 2], **options)
    monkeypatch.setattr(readings, "STATES", 100 * 2 * TOKEN)
    assert swsurgery.sweep(manifest, factors=[0, 0.5, 2], **options) == whole


def test_the_states_of_one_reading_are_gone_when_the_next_begins(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    sizes: list[int] = []
    enter = LayeredModel._enter

    def look(*arguments: Any) -> list[Group]:
        assert not [one for one in alive if one() is not None], "the states of an earlier reading are in memory"
        return enter(*arguments)

    advance = LayeredModel._advance

    def measure(model: LayeredModel, number: int, layer: Any, group: Group, *rest: Any) -> None:
        alive.append(weakref.ref(group.state))
        sizes.append(group.state.nbytes)
        advance(model, number, layer, group, *rest)

    monkeypatch.setattr(LayeredModel, "_enter", look)
    monkeypatch.setattr(LayeredModel, "_advance", measure)
    monkeypatch.setattr(forward, "TOKENS_AT_ONCE", 20)
    monkeypatch.setattr(readings, "STATES", 100 * TOKEN)
    report = check(pair, window=10, windows=60)
    assert report.windows > 30 and max(sizes) <= 100 * TOKEN and len(alive) > 10


def test_the_number_of_variants_is_limited_by_one_batch(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load.open_model(open_checkpoint(pair.base), device="cpu")
    monkeypatch.setattr(forward, "TOKENS_AT_ONCE", 40)
    monkeypatch.setattr(readings, "STATES", 5 * 40 * 16 * 4)
    windows = [list(range(2, 12))] * 1000
    assert count_variants_at_once(model, windows) == 4
    assert {len(part) for part in model.divide(windows, 5)} == {4}
    monkeypatch.setattr(LayeredModel, "is_layered", lambda self, ids: False)
    assert count_variants_at_once(model, windows) == 1, "the logits of five variants of a window do not fit"
    assert model.divide(windows, 5) == [range(1000)]


def test_the_whole_set_of_the_paper_takes_three_readings_of_a_7b_model() -> None:
    """Base and patched in bfloat16, 4,096 channels: 2 GiB hold 64 windows of 2,048 tokens."""
    parts = readings.divide_sequences([2048] * 166, 2 * 4096 * 2, lambda tokens: 1)
    assert parts == [range(64), range(64, 128), range(128, 166)]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    most=st.integers(1, 300),
    at_once=st.integers(1, 80),
)
def test_readings_are_bounded_and_divide_no_batch(lengths: list[int], most: int, at_once: int) -> None:
    def count_rows(tokens: int) -> int:
        return max(1, at_once // tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readings, "STATES", most * 8)
        parts = readings.divide_sequences(lengths, 8, count_rows)
    assert [at for part in parts for at in part] == list(range(len(lengths)))
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        size = sum(lengths[at] for at in part)
        assert size <= most or len(part) == 1
        if following is None:
            continue
        if list_divided(lengths, part, count_rows):
            later = next(iter(find_good_ends(lengths, part, count_rows)), None)
            assert later is None or 2 * sum(lengths[part.start : later]) < most


def list_divided(lengths: list[int], part: range, count_rows: Any) -> list[int]:
    """Return the lengths of which a batch is divided at the end of a reading."""
    counts = Counter(lengths[at] for at in part)
    return [one for one in counts if counts[one] % count_rows(one) and one in lengths[part.stop :]]


def find_good_ends(lengths: list[int], part: range, count_rows: Any) -> Iterator[int]:
    """Yield the ends of a reading, from the last one, that divide no batch."""
    for end in range(part.stop, part.start, -1):
        if not list_divided(lengths, range(part.start, end), count_rows):
            yield end
