"""The verdicts of a scan control for the number of effects that it tests, zeroed alone and jointly."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import pytest

from swsurgery.model.intervals import compute_mean_interval
from swsurgery.scanning.clear_effects import (
    choose_verdict,
    find_clear,
    find_joint_sets,
    find_jointly,
    find_unclear,
    report_unclear,
)
from swsurgery.scanning.losses import Gain

LOSSES = Path(__file__).parent.parent / "assets" / "window_losses.json"
RUNS = 2000

Group = frozenset[int]


def read_series() -> list[list[float]]:
    """Read the loss differences of 256 consecutive windows for two edits, each minus its mean."""
    stored, *edited = json.loads(LOSSES.read_text())["mean_loss"].values()
    series = [[a - b for a, b in zip(one, stored, strict=True)] for one in edited]
    return [[value - sum(one) / len(one) for value in one] for one in series]


class NullLosses:
    """Losses of units without any effect, from recorded differences: every effect is a random mixture of two edits.

    All effects of one scan are measured on the same windows. The windows are consecutive, as in a text, or else drawn
    one by one for each effect.
    """

    def __init__(self, series: list[list[float]], windows: int, consecutive: bool, dice: random.Random):
        self.series, self.windows, self.consecutive, self.dice = series, windows, consecutive, dice
        self.begin = dice.randrange(len(series[0]) - windows + 1)
        self.drawn: dict[object, list[float]] = {}

    def gain(self, group: Group, parts: Iterable[Group] = (), confidence: float = 0.95) -> Gain:
        key = group, frozenset(parts)
        if key not in self.drawn:
            places: Iterable[int] = range(self.begin, self.begin + self.windows)
            if not self.consecutive:
                places = self.dice.choices(range(len(self.series[0])), k=self.windows)
            shares = [self.dice.uniform(-1, 1) for _ in self.series]
            self.drawn[key] = [
                sum(share * one[place] for share, one in zip(shares, self.series, strict=True)) for place in places
            ]
        return Gain(*compute_mean_interval(self.drawn[key], [1.0] * self.windows, confidence))

    def measure(self, groups: Iterable[Group], progress: object) -> None:
        pass

    def refine(self, groups: Iterable[Group], progress: object) -> None:
        pass


CANDIDATES, REMOVERS, PARTS = 8, 2, 3


def scan(losses: NullLosses) -> tuple[bool, bool]:
    """Test a scan of 8 scalars, 2 removers and 3 parts, none of which has an effect.

    Returns whether an effect alone is called clear, and whether an effect jointly is. The bar is zero, which is harder
    than the bar of a real test.
    """
    units, pairs = range(CANDIDATES), [frozenset(pair) for pair in combinations(range(CANDIDATES), 2)]
    parts, everything = range(100, 100 + PARTS), frozenset(units)
    alone = {unit: (frozenset({unit}), ()) for unit in (*units, *range(50, 50 + REMOVERS))}
    added = {unit: (everything, (everything - {unit}, frozenset({unit}))) for unit in units}
    of_parts = {part: (frozenset(parts), (frozenset(parts) - {part}, frozenset({part}))) for part in parts}
    single = {part: (frozenset({part}), ()) for part in parts}
    jointly = find_jointly(losses, added, pairs, lambda group: 0.0, PARTS, None)
    false_alone = find_clear(losses, alone, lambda unit: 0.0, PARTS) | find_clear(
        losses, single, lambda unit: 0.0, len(alone)
    )
    false_parts = find_clear(losses, of_parts, lambda unit: 0.0, jointly.tests)
    return bool(false_alone), bool(jointly.units or jointly.joint_sets or false_parts)


@pytest.mark.parametrize(("windows", "consecutive", "most"), [(16, False, 0.025), (8, True, 0.025), (16, True, 0.045)])
def test_false_verdicts_are_as_rare_in_a_scan_as_in_a_single_test(windows: int, consecutive: bool, most: float) -> None:
    """Correlated windows make tests of 16 windows wrong a little more often than the 2.5% of a one-sided test."""
    dice, series = random.Random(0), read_series()
    found = [scan(NullLosses(series, windows, consecutive, dice)) for _ in range(RUNS)]
    alone, jointly = (sum(column) / RUNS for column in zip(*found, strict=True))
    assert alone <= most and jointly <= most


class SaidLosses:
    """Losses whose gains, and the ends of their intervals at any confidence, are said in advance."""

    enough = True

    def __init__(self, gains: dict[Group, float], reach: float):
        self.gains, self.reach = gains, reach
        self.confidences: list[float] = []

    def gain(self, group: Group, parts: Iterable[Group] = (), confidence: float = 0.95) -> Gain:
        self.confidences.append(confidence)
        mean = self.gains.get(group, 0.0) - sum(self.gains.get(part, 0.0) for part in parts)
        reach = self.reach / (1 - confidence)
        return Gain(mean, mean - reach, mean + reach)


def test_a_joint_set_needs_a_wider_interval_the_more_effects_are_tested() -> None:
    pair, other = frozenset({0, 1}), frozenset({2, 3})
    losses = SaidLosses({pair: 1.0}, 0.05 / 3)  # an interval of 1/3 on each side at 95%
    assert find_joint_sets(losses, [pair], lambda group: 0.0) == [pair]
    assert find_joint_sets(losses, [pair, other], lambda group: 0.0) == [pair]
    assert find_joint_sets(losses, [pair, other], lambda group: 0.0, further=2) == []
    assert find_joint_sets(losses, [pair, other, frozenset({0, 1, 2})], lambda group: 0.5) == []


def test_larger_groups_are_divided_into_joint_sets_found_before() -> None:
    pair, three = frozenset({0, 1}), frozenset({0, 1, 2})
    losses = SaidLosses({pair: 9.0, three: 9.1, frozenset({2}): 0.05}, 0.001)
    assert find_joint_sets(losses, [three, pair], lambda group: 0.1) == [pair]
    losses.gains[three] = 12.0
    assert find_joint_sets(losses, [three, pair], lambda group: 0.1) == [three, pair]


def test_each_clear_effect_leaves_less_to_correct_for() -> None:
    losses = SaidLosses({frozenset({0}): 9.0, frozenset({1}): 1.2, frozenset({2}): 0.1}, 0.05 / 2)
    tests = {unit: (frozenset({unit}), ()) for unit in range(3)}
    assert find_clear(losses, tests, lambda unit: 0.0) == {0, 1}
    assert sorted({round((1 - one) * 60) for one in losses.confidences}) == [1, 2, 3]  # 5% / 3, / 2 and / 1 of it
    assert find_clear(losses, tests, lambda unit: 0.0, further=1) == {0}


def test_an_effect_that_only_a_single_test_would_call_clear_gets_no_verdict() -> None:
    losses = SaidLosses({frozenset({0}): 9.0, frozenset({1}): 0.7, frozenset({2}): 0.1}, 0.05 / 2)
    tests = {unit: (frozenset({unit}), ()) for unit in range(3)}
    alone = find_clear(losses, tests, lambda unit: 0.0)
    unclear = find_unclear(losses, tests, lambda unit: 0.0, alone)
    assert (alone, unclear) == ({0}, {1})
    assert [choose_verdict(unit, alone, (), unclear) for unit in tests] == ["needed alone", "untested", "inert"]
    assert choose_verdict(1, alone, {1}, unclear) == "needed jointly"
    losses.enough = False
    assert find_unclear(losses, tests, lambda unit: 0.0, ()) == {0, 1, 2}
    said: list[str] = []
    report_unclear(["layer 0 row 2"], said.append)
    assert said[0].startswith("no verdict: layer 0 row 2 (its effect would be clear")
