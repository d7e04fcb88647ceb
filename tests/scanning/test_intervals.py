"""Intervals from whole windows: the arithmetic against textbook tables, and coverage against measured losses."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from swsurgery.model.intervals import (
    LEAST_WINDOWS,
    compute_mean_interval,
    compute_prediction_bound,
    compute_student_quantile,
)

LOSSES = json.loads((Path(__file__).parents[1] / "assets" / "window_losses.json").read_text(encoding="utf-8"))
STORED = LOSSES["mean_loss"]["stored"]
SUPER_WEIGHTS = ["layer 11 [507, 1229]", "layer 2 [507, 90]"]


@pytest.mark.parametrize(
    ("confidence", "freedom", "quantile"),
    [
        (0.95, 1, 12.7062),
        (0.95, 2, 4.30265),
        (0.95, 7, 2.36462),
        (0.95, 8, 2.30600),
        (0.95, 15, 2.13145),
        (0.95, 200, 1.97190),
        (0.90, 4, 2.13185),
        (0.99, 5, 4.03214),
    ],
)
def test_the_quantiles_are_those_of_the_tables(confidence: float, freedom: int, quantile: float) -> None:
    assert compute_student_quantile(confidence, freedom) == pytest.approx(quantile, rel=1e-5)


def test_windows_of_one_length_give_the_textbook_interval() -> None:
    values = [0.1, 0.4, 0.2, 0.3, 0.0, 0.5, 0.25, 0.35, 0.15]
    mean, low, high = compute_mean_interval(values, [511] * 9)
    reach = 2.306004 * np.std(values, ddof=1) / 3 * math.sqrt(3)  # the design effect is 3
    assert (mean, low, high) == pytest.approx((np.mean(values), np.mean(values) - reach, np.mean(values) + reach))


def test_a_longer_window_counts_as_much_as_its_tokens() -> None:
    values, weights = [1.0] * 4 + [2.0] * 4, [100] * 4 + [300] * 4
    mean, low, high = compute_mean_interval(values, weights)
    assert mean == pytest.approx(1.75)
    error = math.sqrt(sum((w * (v - 1.75)) ** 2 for v, w in zip(values, weights, strict=True)) * 3 * 8 / 7) / 1600
    assert high - mean == pytest.approx(2.364624 * error)
    assert mean - low == pytest.approx(high - mean)


def test_fewer_than_eight_windows_give_no_interval() -> None:
    assert LEAST_WINDOWS == 8
    assert compute_mean_interval([1.0, 2.0] * 3 + [1.5], [1] * 7) == (pytest.approx(1.5), None, None)
    assert None not in compute_mean_interval([1.0, 2.0] * 4, [1] * 8)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_window_makes_everything_infinite(value: float) -> None:
    assert compute_mean_interval([value] + [1.0] * 8, [10] * 9) == (value, value, value)


def test_a_difference_of_infinities_is_no_number() -> None:
    assert all(map(math.isnan, compute_mean_interval([math.nan] + [1.0] * 8, [10] * 9)))


def test_one_more_value_stays_within_the_prediction_bound_as_often_as_stated() -> None:
    generator = random.Random(0)
    within = sum(
        abs(generator.gauss(0, 1)) <= compute_prediction_bound([generator.gauss(0, 1) for _ in range(4)])
        for _ in range(2000)
    )
    assert within / 2000 >= 0.95
    assert compute_prediction_bound([0.1, 0.1, 0.1]) == pytest.approx(0.1)
    assert compute_prediction_bound([-0.3, -0.3, -0.3]) == pytest.approx(0.3), "two-sided"
    assert compute_prediction_bound([0.1, math.inf, 0.1]) == compute_prediction_bound([0.1, math.nan, 0.1]) == math.inf


# Coverage -------------------------------------------------------------------------------------------------------------


def pieces(count: int, length: int, seed: int) -> list[list[int]]:
    """Draw contiguous runs and sets of disjoint windows, half and half."""
    generator, total = random.Random(seed), len(STORED)
    starts = [generator.randrange(total - length + 1) for _ in range(count // 2)]
    runs = [list(range(start, start + length)) for start in starts]
    return runs + [generator.sample(range(total), length) for _ in range(count - len(runs))]


def test_the_losses_are_of_enough_windows() -> None:
    assert LOSSES["windows"] == len(STORED) >= 250
    assert all(len(LOSSES["mean_loss"][name]) == len(STORED) for name in SUPER_WEIGHTS)
    ratios = [math.exp(np.mean(np.array(LOSSES["mean_loss"][name]) - np.array(STORED))) for name in SUPER_WEIGHTS]
    assert ratios[0] > 3 and 1.2 < ratios[1] < 2


@pytest.mark.parametrize("kind", ["contiguous", "random"])
@pytest.mark.parametrize("length", [8, 16])
@pytest.mark.parametrize("name", SUPER_WEIGHTS)
def test_a_nominal_95_percent_interval_contains_the_ratio_of_the_whole_text(name: str, length: int, kind: str) -> None:
    extra = [zeroed - stored for zeroed, stored in zip(LOSSES["mean_loss"][name], STORED, strict=True)]
    whole = sum(extra) / len(extra)
    drawn = pieces(1200, length, seed=12)
    drawn = drawn[:600] if kind == "contiguous" else drawn[600:]
    tokens = [LOSSES["scored_tokens_per_window"]] * length
    covered = 0
    for piece in drawn:
        _, low, high = compute_mean_interval([extra[number] for number in piece], tokens)
        covered += low <= whole <= high
    assert len(drawn) >= 500
    assert covered / len(drawn) >= 0.90
