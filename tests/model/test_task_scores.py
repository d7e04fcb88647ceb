"""The parts of tasks that need no lm-eval: options, log-likelihoods of continuations, paired tests, reports."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoint
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoint import Pair, write_pair

import swsurgery
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.cli import main, show_tasks
from swsurgery.errors import SwsurgeryError, Unrunnable
from swsurgery.model import load, readings
from swsurgery.model.tasks import continuations
from swsurgery.model.tasks.continuations import Continuation, score_continuations
from swsurgery.model.tasks.options import TaskOptions
from swsurgery.model.tasks.paired import compare_items, compute_difference_interval, compute_sign_probability
from swsurgery.model.tasks.report import TaskMetric, TaskReport, TaskScore


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("pair"), [((3, 7), 5.0)])


def score_alone(folder: Path, one: Continuation) -> tuple[float, bool]:
    """The textbook computation: one forward pass of transformers for one continuation."""
    model = tiny_checkpoint.load(folder)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([one.tokens[:-1]])).logits[0].double()
    targets = torch.tensor(one.tokens[1:])
    found = logits.log_softmax(-1).gather(1, targets[:, None])[-one.scored :, 0]
    return float(found.sum()), bool((logits.argmax(-1) == targets)[-one.scored :].all())


WANTED = [
    Continuation((5, 9, 30, 41, 7), 1),
    Continuation((5, 9, 30, 41, 8), 1),  # shares its input
    Continuation((5, 9, 30, 41, 8), 3),
    Continuation((5, 9, 30, 41), 3),
    Continuation((11, 12), 1),
    Continuation(tuple(range(3, 40)), 36),
]


@pytest.mark.parametrize(("most", "parts"), [(10_000, 1), (40, 2), (1, 4)])
@pytest.mark.parametrize("small", [False, True], ids=["one part", "many parts"])
def test_each_continuation_is_scored_as_transformers_scores_it_alone(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, most: int, parts: int, small: bool
) -> None:
    if small:
        limits = continuations.LIMITS["cpu"]._replace(base=5 * tiny_checkpoint.VOCABULARY)
        monkeypatch.setitem(continuations.LIMITS, "cpu", limits)
    model = load.open_model(open_checkpoint(pair.patched), device="cpu")
    variants: list[dict[Any, float]] = [{change.coordinate: change.base for change in pair.changes}, {}]
    monkeypatch.setattr(readings, "STATES", most * 2 * 16 * 4)  # two variants of 16 channels in float32
    found = score_continuations(WANTED, lambda ids: model.run(ids, variants))
    assert (len(found.inputs), len(model.divide(found.inputs, 2))) == (4, parts)
    for one, answers in found.answers.items():
        for folder, answer in zip((pair.base, pair.patched), answers, strict=True):
            loglikelihood, greedy = score_alone(folder, one)
            assert answer.loglikelihood == pytest.approx(loglikelihood, abs=1e-4)
            assert answer.greedy == greedy
    assert found.answers.keys() == set(WANTED)


def test_the_most_likely_token_is_greedy(pair: Pair) -> None:
    logits = tiny_checkpoint.load(pair.base)(input_ids=torch.tensor([[5, 9]])).logits[0]
    first = int(logits[-1].argmax())
    model = load.open_model(open_checkpoint(pair.base), device="cpu")
    wanted = [Continuation((5, 9, token), 1) for token in (first, (first + 1) % tiny_checkpoint.VOCABULARY)]
    found = score_continuations(wanted, lambda ids: model.run(ids, [{}])).answers
    assert [found[one][0].greedy for one in wanted] == [True, False]


@given(st.integers(0, 9), st.integers(0, 9))
def test_the_exact_probability_is_that_of_all_ways_to_toss_the_coins(risen: int, fallen: int) -> None:
    count, uneven = risen + fallen, abs(risen - fallen)
    ways = [sum(tosses) for tosses in product((0, 1), repeat=min(count, 12))]
    if count <= 12:
        as_uneven = sum(abs(2 * heads - count) >= uneven for heads in ways)
        assert compute_sign_probability(risen, fallen) == pytest.approx(float(Fraction(as_uneven, len(ways))))
    assert compute_sign_probability(risen, fallen) == compute_sign_probability(fallen, risen) <= 1


def test_a_large_division_neither_overflows_nor_takes_long() -> None:
    assert compute_sign_probability(7000, 7000) == 1
    assert 0 < compute_sign_probability(7100, 6800) < 0.02
    assert compute_sign_probability(9000, 0) == 0.0


@pytest.mark.parametrize(
    ("base", "other", "expected"),
    [
        ([1, 0, 1, 1.0], [0, 0, 1, 1], ("McNemar", 0, 1, 1.0)),
        ([0.0] * 6, [1.0] * 6, ("McNemar", 6, 0, 2 / 2**6)),
        ([-2.0, -3.0, -1.0], [-1.5, -4.0, -1.0], ("sign", 1, 1, 1.0)),
        ([(-2.0, 5), (-9.0, 7)], [(-1.0, 5), (-8.0, 7)], ("sign", 2, 0, 0.5)),
        ([0.5, math.nan], [0.5, 1.0], ("sign", 0, 0, None)),
    ],
)
def test_items_are_compared_one_by_one(base: list[Any], other: list[Any], expected: tuple[Any, ...]) -> None:
    assert compare_items(base, other) == expected


def test_items_without_a_number_are_not_compared() -> None:
    assert compare_items(["a", "b"], ["a", "c"]) is None
    assert compute_difference_interval(["a", "b"], ["a", "c"], 0.5, None) is None
    assert compute_difference_interval([1], [0], -1.0, None) is None
    assert compute_difference_interval([1, 1], [0, 0], math.nan, None) is None


def make_mean(items: list[object]) -> float:
    return sum(float(str(item)) for item in items) / len(items)


def test_both_ways_to_resample_agree_and_contain_the_difference() -> None:
    base = [1.0] * 60 + [0.0] * 40
    other = [0.0] * 20 + [1.0] * 50 + [0.0] * 30
    difference = make_mean([*other]) - make_mean([*base])
    low, high = compute_difference_interval(base, other, difference, None) or (0, 0)
    assert low < difference < high
    # the normal interval of a mean of paired differences
    spread = math.sqrt(sum((b - a - difference) ** 2 for a, b in zip(base, other, strict=True)) / 99 / 100)
    assert (low, high) == pytest.approx((difference - 1.96 * spread, difference + 1.96 * spread), abs=0.015)
    # a metric that is not the mean is computed again for each sample
    tripled = compute_difference_interval(base, other, 3 * difference, lambda items: 3 * make_mean(items))
    assert tripled == pytest.approx((3 * low, 3 * high), abs=0.045)
    assert compute_difference_interval(base, other, 3 * difference, None) is None


REPORT = TaskReport(
    metrics=(
        TaskMetric("c", "acc", "none", 9, 0, True, (TaskScore("base", 0.5, 0.1), TaskScore("patched", math.nan))),
        TaskMetric("c", "acc", "strict", 9, 0, True, (TaskScore("base", 0.5), TaskScore("patched", 1.0, p_value=0.25))),
    ),
    requests=18,
    sequences=9,
    readings=1,
    limit=None,
    lm_eval="0",
    not_finite=("patched",),
)


def test_a_metric_that_overflows_in_a_sample_has_no_interval() -> None:
    """The perplexity of a broken model may be finite for all items, and too large for a sample of them."""
    base, other = [(-1.0, 1), (-2.0, 1)], [(-1000.0, 1), (-2.0, 1)]

    def aggregate(items: list[Any]) -> float:
        return math.exp(-sum(loss for loss, _ in items) / len(items))

    assert math.isfinite(aggregate(other))
    assert compute_difference_interval(base, other, aggregate(other) - aggregate(base), aggregate) is None


def test_a_report_is_strict_json_rows_and_text(capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(json.dumps(REPORT.to_json(), allow_nan=False))
    assert [row["value"] for row in REPORT.to_rows()] == [0.5, None, 0.5, 1.0]
    assert REPORT.to_columns(1) == {
        "c acc": None, "c acc stderr": None, "c acc p": None,
        "c acc,strict": 1.0, "c acc,strict stderr": None, "c acc,strict p": 0.25,
    }  # fmt: skip
    show_tasks.show_tasks(document)
    printed = capsys.readouterr().out
    assert "some log-likelihoods are not finite: patched" in printed and "18 requests" in printed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": []}, "no tasks are given"),
        ({"tasks": ["a b"]}, "not the name of a task: 'a b'"),
        ({"tasks": ["a\nb"]}, "not the name of a task"),
        ({"tasks": [""]}, "not the name of a task"),
        ({"tasks": ["../x"]}, "not the name of a task"),
        ({"tasks": ["x", "y", "x"]}, "the task is named twice: x"),
        ({"tasks": ["x"], "limit": 0}, "the limit on the items of a task must be at least 1: 0"),
        ({"tasks": ["x"], "tasks_dir": "/nowhere/at/all"}, "no such directory of tasks: /nowhere/at/all"),
        ({"tasks_dir": "x"}, "tasks_dir has no effect without tasks"),
        ({"limit": 5}, "limit has no effect without tasks"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SwsurgeryError, match=f"^{said}"):
        swsurgery.check("no-such-checkpoint", **options)
    with pytest.raises(SwsurgeryError, match=f"^{said}"):
        swsurgery.compare(["no-such-manifest.yaml"], **options)


@pytest.mark.parametrize("tasks", ["arc_easy", [1], 5])
def test_tasks_are_a_list_of_names(tasks: Any) -> None:
    with pytest.raises(TypeError, match="tasks must be None or a list of strings"):
        TaskOptions.of(tasks)


def test_good_options_are_kept(tmp_path: Path) -> None:
    assert TaskOptions.of(None) is None
    assert TaskOptions.of(["arc_easy", "mmlu-pro"], tmp_path, 3) == TaskOptions(("arc_easy", "mmlu-pro"), tmp_path, 3)


def refuse(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err


def test_a_table_of_a_check_needs_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--csv prints the scores of tasks (name them with --tasks)" in refuse(["check", "x", "--csv"], capsys)


def test_without_lm_eval_the_extra_is_named(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else find(name))
    with pytest.raises(Unrunnable, match="lm-eval is not installed.*swsurgery\\[tasks\\]"):
        swsurgery.check(pair.patched, tasks=["arc_easy"])
    assert "pip install" in refuse(["check", str(pair.patched), "--tasks", "arc_easy,hellaswag", "--quiet"], capsys)
