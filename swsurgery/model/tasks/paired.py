"""Compare two models on the same items of a task: exact tests, and a bootstrapped interval of the difference.

Items are independent of each other, unlike windows of one text. This module must not depend on torch or on lm-eval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from swsurgery.storage.numeric import load_numpy

RESAMPLES = 2000
"""Number of bootstrap samples of the items."""

MAX_RESAMPLED_ITEMS = 5000
"""Maximum number of items for which a metric other than a mean is computed again for each bootstrap sample."""

BOOTSTRAP_SEED = 1234
"""Seed of the bootstrap samples, so that the same scores give the same interval."""


class PairedTest(NamedTuple):
    """The comparison of a model with the base on the same items.

    `risen` and `fallen` are the numbers of items whose value is higher or lower than with the base. `p_value` is the
    probability of a division at least as uneven, if both directions are equally likely. `test` is "McNemar" if all
    values are 0 or 1, else "sign". The p-value is None if an item has no comparable value.
    """

    test: str
    risen: int
    fallen: int
    p_value: float | None


def compare_items(base: Sequence[object], other: Sequence[object]) -> PairedTest | None:
    """Compare the values of the same items; None if an item is neither a number nor a pair that begins with one.

    The exact test of McNemar is the sign test of the items that changed (Q. McNemar, Psychometrika 12, 1947). An item
    that is a pair, such as (log-likelihood, words), counts by its first element.
    """
    pairs = [(_read_value(a), _read_value(b)) for a, b in zip(base, other, strict=True)]
    numbers = [(a, b) for a, b in pairs if a is not None and b is not None]
    if len(numbers) < len(pairs):
        return None
    risen, fallen = sum(b > a for a, b in numbers), sum(b < a for a, b in numbers)
    binary = all(value in (0.0, 1.0) for pair in numbers for value in pair)
    finite = all(math.isfinite(value) for pair in numbers for value in pair)
    return PairedTest(
        "McNemar" if binary else "sign", risen, fallen, compute_sign_probability(risen, fallen) if finite else None
    )


def _read_value(item: object) -> float | None:
    """Return an item as a number; a pair counts by its first element. None if it is neither."""
    if isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], float):
        item = item[0]
    return float(item) if isinstance(item, int | float) else None


def compute_sign_probability(risen: int, fallen: int) -> float:
    """Return the two-sided exact probability that fair coins divide as unevenly as `risen` and `fallen`."""
    count, least = risen + fallen, min(risen, fallen)
    term = total = 1
    for k in range(least):
        term = term * (count - k) // (k + 1)
        total += term
    return min(1.0, total / (1 << (count - 1))) if count else 1.0


def compute_difference_interval(
    base: Sequence[object],
    other: Sequence[object],
    difference: float,
    aggregate: Callable[[list[object]], float] | None,
) -> tuple[float, float] | None:
    """Return the 95% interval of `difference`, the metric of `other` minus that of `base`, by the paired bootstrap.

    Items are drawn with replacement, the same ones for both models, and the ends are percentiles (B. Efron and R.
    Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). `aggregate` computes the metric from items. It is
    used if the metric is not the mean of the items. Returns None for fewer than two items, for values that are not
    finite, and for metrics that cannot be computed again.
    """
    pairs = [(_read_value(a), _read_value(b)) for a, b in zip(base, other, strict=True)]
    if len(pairs) < 2 or not math.isfinite(difference):
        return None
    changes = [b - a for a, b in pairs if a is not None and b is not None]
    if len(changes) == len(pairs) and math.isclose(sum(changes) / len(pairs), difference, abs_tol=1e-9):
        return _resample_mean(changes)
    if aggregate is None or len(pairs) > MAX_RESAMPLED_ITEMS:
        return None
    try:
        return _resample_metric(base, other, aggregate)
    except Exception:  # noqa: BLE001 (code of lm-eval or of the task: for example, a perplexity may overflow)
        return None


def _resample_mean(changes: Sequence[float]) -> tuple[float, float]:
    """Return the interval of a mean. A sample is drawn as the number of times that each distinct value occurs."""
    load_numpy()
    import numpy

    values, counts = numpy.unique(numpy.array(changes), return_counts=True)
    random = numpy.random.default_rng(BOOTSTRAP_SEED)
    drawn = random.multinomial(len(changes), counts / len(changes), RESAMPLES)
    return _read_ends([float(mean) for mean in drawn @ values / len(changes)])


def _resample_metric(
    base: Sequence[object], other: Sequence[object], aggregate: Callable[[list[object]], float]
) -> tuple[float, float] | None:
    load_numpy()
    import numpy

    random = numpy.random.default_rng(BOOTSTRAP_SEED)
    found = []
    for _ in range(RESAMPLES):
        chosen = random.integers(0, len(base), len(base)).tolist()
        found.append(float(aggregate([other[at] for at in chosen]) - aggregate([base[at] for at in chosen])))
    return _read_ends(found) if all(map(math.isfinite, found)) else None


def _read_ends(found: list[float]) -> tuple[float, float]:
    """Return the percentiles 2.5 and 97.5 of the values."""
    ordered = sorted(found)
    least = round(0.025 * len(ordered))
    return ordered[least], ordered[-1 - least]
