"""Contain what the causal tests of scalars (confirm.py) and of experts (confirm_experts.py) share.

A bar is the effect that zeroing a part of the model must exceed to count as critical. This module contains the limits
of both tests, the bar that random parts set, and the search for joint sets. It chooses no parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.model import load, measure
from swsurgery.model.check import read_built_in_text
from swsurgery.model.intervals import LEAST_WINDOWS
from swsurgery.scanning.losses import Losses, Unit

INERT = 1.05
"""Maximum perplexity ratio (without the scalar / with it) of an inert scalar. docs/known.md uses the same limit."""

PAIRS = 28
"""Maximum number of pairs of scalars that are tested. Eight candidates have 28 pairs."""

CONTEXT_NULLS = 6
"""Maximum number of null scalars that are also zeroed together with all candidates. The model may already be broken
without the candidates, and then any further change has a larger effect."""

Say = Callable[[str], None]


def say_nothing(line: str) -> None:
    """Discard a line for the user; the default of `say`."""


def refuse_text(checkpoint: Checkpoint, text: str | None, windows: int, window: int) -> None:
    """Raise ModelError if the tokenizer cannot be loaded, or if `text` is too short to fill one window.

    The scan calls this before it loads the model.
    """
    with load.hide_output():
        tokenizer = load.load_tokenizer(checkpoint.directory)
        measure.cut_windows(
            measure.encode(tokenizer, read_built_in_text() if text is None else text), [], windows, window
        )


def report_too_few_windows(windows: Sequence[Sequence[int]], say: Say) -> None:
    """Report that there are fewer than LEAST_WINDOWS windows, and what to do."""
    have = f"{len(windows)} window{'' if len(windows) == 1 else 's'}"
    remedy = f"a verdict needs {LEAST_WINDOWS}: give a longer --text, more --windows or a shorter --window"
    say(f"too little text for intervals and verdicts: {have} ({remedy})")


def compute_outer_fence(values: Sequence[float]) -> float:
    """Compute the third quartile plus three times the distance between the quartiles; -inf without values."""
    if not values:
        return -math.inf
    low, high = (sorted(values)[round(share * (len(values) - 1))] for share in (0.25, 0.75))
    return high + 3 * (high - low) if math.isfinite(high) else math.inf


def find_joint_sets(
    losses: Losses[Unit], groups: Sequence[frozenset[Unit]], bar: Callable[[frozenset[Unit]], float]
) -> list[frozenset[Unit]]:
    """Find the groups whose effect is clearly larger than the product of the effects of their parts, strongest first.

    The parts of a group are the smaller joint sets in the group, chosen from the strongest to the weakest without
    overlap, and the remaining single scalars.
    """
    found: list[frozenset[Unit]] = []
    for group in sorted(groups, key=len):
        parts: list[frozenset[Unit]] = []
        left = group
        for smaller in sorted(found, key=lambda known: -losses.gain(known).log):
            if smaller <= left:
                parts.append(smaller)
                left -= smaller
        if losses.gain(group, [*parts, *(frozenset({name}) for name in left)]).low > bar(group):
            found.append(group)
    return sorted(found, key=lambda known: -losses.gain(known).log)
