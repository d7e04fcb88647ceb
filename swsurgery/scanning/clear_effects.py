"""Decide which measured effects are clear, with control for the number of effects that a scan tests.

The effects of a scan form two families. "alone" contains the effect of zeroing each scalar, part or expert alone.
"jointly" contains what zeroing each of them adds to zeroing all others, and the effect of each joint set beyond its
parts. In each family, Holm's method (S. Holm, A simple sequentially rejective multiple test procedure, 1979) limits the
probability that chance makes any effect clear to that of a single test: with m effects left, intervals have the
confidence 1 - 5%/m. This module decides, and must not run a model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

from swsurgery.model.intervals import CONFIDENCE
from swsurgery.progress import Progress
from swsurgery.scanning.causal_report import Verdict
from swsurgery.scanning.causal_test import Say
from swsurgery.scanning.losses import Losses, Unit

Key = TypeVar("Key", bound=Hashable)

Contrast = tuple[frozenset[Unit], Collection[frozenset[Unit]]]
"""A tested effect: a group that is zeroed, and the parts of it whose effects are subtracted from that of the group."""


def find_clear(
    losses: Losses[Unit], tests: Mapping[Key, Contrast[Unit]], bar: Callable[[Key], float], further: int = 0
) -> frozenset[Key]:
    """Find the keys whose effect is clearly above their bar.

    `further` is the number of other effects of the same family that are not clear, or are tested elsewhere.
    """
    left, found = dict(tests), set[Key]()
    while left:
        confidence = 1 - (1 - CONFIDENCE) / (len(left) + further)
        clear = {key for key, test in left.items() if losses.gain(*test, confidence=confidence).low > bar(key)}
        if not clear:
            break
        found |= clear
        left = {key: test for key, test in left.items() if key not in clear}
    return frozenset(found)


def find_unclear(
    losses: Losses[Unit], tests: Mapping[Unit, Contrast[Unit]], bar: Callable[[Unit], float], clear: Collection[Unit]
) -> frozenset[Unit]:
    """Find the units on which the measurement allows no verdict: all of them if there are too few windows.

    Otherwise, these are the units that are not in `clear`, but whose effect would be clear if it were the only one of
    the scan. A longer text can decide.
    """
    if not losses.enough:
        return frozenset(tests)
    return frozenset(unit for unit, test in tests.items() if unit not in clear and losses.gain(*test).low > bar(unit))


def report_unclear(names: Collection[str], say: Say) -> None:
    """Tell the user which units have no verdict, and what to do."""
    for name in names:
        say(f"no verdict: {name} (its effect would be clear if it were the only one tested: give a longer text)")


def choose_verdict(
    unit: Unit, alone: Collection[Unit], jointly: Collection[Unit], unjudged: Collection[Unit]
) -> Verdict:
    """Choose the verdict on a unit. `unjudged` contains the units on which the measurement allows no verdict."""
    if unit in alone:
        return "needed alone"
    if unit in jointly:
        return "needed jointly"
    return "untested" if unit in unjudged else "inert"


def find_joint_sets(
    losses: Losses[Unit],
    groups: Sequence[frozenset[Unit]],
    bar: Callable[[frozenset[Unit]], float],
    further: int = 0,
) -> list[frozenset[Unit]]:
    """Find the groups whose effect is clearly larger than the product of the effects of their parts, strongest first.

    The parts of a group are the smaller joint sets in the group, chosen from the strongest to the weakest without
    overlap, and the remaining single units. Groups of one size are tested together, the smallest first. `further` is as
    in `find_clear`.
    """
    found: list[frozenset[Unit]] = []
    for size in sorted(set(map(len, groups))):
        tests = {group: (group, _divide(losses, group, found)) for group in groups if len(group) == size}
        larger = sum(len(group) > size for group in groups)
        clear = find_clear(losses, tests, bar, further + larger)
        found += [group for group in tests if group in clear]
        further += len(tests) - len(clear)
    return sorted(found, key=lambda known: -losses.gain(known).log)


def _divide(losses: Losses[Unit], group: frozenset[Unit], found: Sequence[frozenset[Unit]]) -> list[frozenset[Unit]]:
    """Divide a group into smaller joint sets, the strongest first, and the single units that are in none of them."""
    parts: list[frozenset[Unit]] = []
    left = group
    for smaller in sorted(found, key=lambda known: -losses.gain(known).log):
        if smaller <= left:
            parts.append(smaller)
            left -= smaller
    return [*parts, *(frozenset({unit}) for unit in left)]


class Jointly(NamedTuple, Generic[Unit]):
    """The units that matter together with others, the joint sets, and the number of effects that were tested.

    A unit matters together with others if zeroing it in addition to all others clearly has more effect than zeroing it
    alone, or if it is in a joint set.
    """

    units: frozenset[Unit]
    joint_sets: list[frozenset[Unit]]
    tests: int


def find_jointly(
    losses: Losses[Unit],
    added: Mapping[Unit, Contrast[Unit]],
    pairs: Sequence[frozenset[Unit]],
    bar: Callable[[frozenset[Unit]], float],
    others: int,
    progress: Progress | None,
) -> Jointly[Unit]:
    """Find the units that matter together with others, among `added`, and the joint sets among `pairs`.

    `added` maps each unit to what it adds to the effect of all others. The group of all units that clearly add an
    effect is one more possible joint set, and is measured here. `others` is the number of effects of the family that
    are tested elsewhere.
    """
    core = find_clear(losses, added, lambda unit: bar(frozenset({unit})), len(pairs) + 1 + others)
    groups = list(dict.fromkeys([*pairs, core] if len(core) > 1 else pairs))
    losses.measure(groups, progress)
    joint = find_joint_sets(losses, groups, bar, len(added) - len(core) + others)
    losses.refine(joint, progress)
    return Jointly(core.union(*joint), joint, len(added) + len(pairs) + 1 if added or pairs else 0)
