"""Define the controls of an edit: other changes of the base, with which the effect of the edit is compared.

`mean` asks whether the model needs what the edited scalars compute for each text, or only its mean (arXiv:2402.17762,
section 4; arXiv:2503.22329). `outliers` asks whether other scalars of the same magnitude matter as much
(arXiv:2411.07191, table 1). docs/controls.md shows both. This module must not import torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from swsurgery.errors import ModelError, pluralise
from swsurgery.model.intervals import Interval
from swsurgery.storage.arguments import require_strings
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.numbers import round_number

ControlName = Literal["mean", "outliers"]

PAPER_OUTLIERS, PAPER_PARAMETERS = 7000, 6.7e9
"""Number of other outliers that arXiv:2411.07191 prunes from Llama-7B (table 1), and the parameters of this model."""

MOST_OUTLIERS = 1_000_000
"""Maximum number of outliers. Each is set to 0 on its own, which takes about 20 microseconds in each layer."""

HARMLESS = 1.05
"""Maximum perplexity ratio of a harmless control. `scan --confirm` uses the same limit for an inert scalar."""

_REMEDY = "use --control mean or --control outliers[:N]"


@dataclass(frozen=True)
class Control:
    """One requested control. `count` is the number of outliers; None stands for the paper's rate."""

    name: ControlName
    count: int | None = None


def parse_controls(texts: Sequence[str] | None) -> tuple[Control, ...]:
    """Read the values of `--control`: "mean", "outliers" or "outliers:N".

    Raises TypeError if `texts` is not a sequence of str, and ModelError for another text or a control given twice.
    """
    require_strings("controls", texts)
    controls = tuple(map(_parse, texts or ()))
    names = [control.name for control in controls]
    for name in names:
        if names.count(name) > 1:
            raise ModelError("this control is given twice", name, "give it once")
    return controls


def _parse(text: str) -> Control:
    if text == "mean":
        return Control("mean")
    found = re.fullmatch(r"outliers(?::([0-9]{1,9}))?", text, re.ASCII)
    if found is None:
        raise ModelError("no such control", repr(text), _REMEDY)
    if found[1] is None:
        return Control("outliers")
    if not 1 <= int(found[1]) <= MOST_OUTLIERS:
        raise ModelError("this number of outliers cannot be zeroed", found[1], f"give 1 to {MOST_OUTLIERS}")
    return Control("outliers", int(found[1]))


def refuse_uncontrolled(edited: Collection[object], whole: Collection[str]) -> None:
    """Raise ModelError if an edit changes no single scalar, or changes rows or more of the tensors `whole`."""
    if whole:
        what = "a control needs edits of single scalars, but rows, tensors or quantised weights are changed"
        raise ModelError(what, min(whole), "leave out --control")
    if not edited:
        raise ModelError("a control needs at least one edited scalar", "none", "leave out --control")


def compute_paper_count(scalars: int) -> int:
    """Compute the number of outliers at the paper's rate for down projections with `scalars` scalars.

    The paper prunes 7,000 of 6.7e9 parameters. The result is rounded to the nearest integer, and is 1 to
    `MOST_OUTLIERS`. It is 28 for the 26,542,080 scalars of the down projections of SmolLM2-135M.
    """
    return min(max(round(PAPER_OUTLIERS / PAPER_PARAMETERS * scalars), 1), MOST_OUTLIERS)


@dataclass(frozen=True)
class HeldScalar:
    """The mean products of one scalar of the base and its input: at first tokens, and at all others."""

    coordinate: Coordinate
    first: float
    others: float


@dataclass(frozen=True)
class ControlResult:
    """The figures of the base with one control, on the text of the check.

    `scalars` counts the scalars that are zeroed. `ratio` is the perplexity divided by that of the base, and `edit` the
    perplexity of the patched model divided by that of the control; both have 95% intervals, whose ends are None if the
    text has too few windows. `kl` is KL(base || control) in nats per token. `smallest` is the smallest magnitude among
    the outliers, and `held` are the means of the control "mean".
    """

    control: ControlName
    scalars: int
    perplexity: float
    ratio: Interval
    edit: Interval
    kl: float
    finite: bool
    smallest: float | None = None
    held: tuple[HeldScalar, ...] = ()

    @property
    def name(self) -> str:
        """The control in few words, such as "mean" or "28 other outliers zeroed"."""
        return "mean" if self.control == "mean" else f"{pluralise(self.scalars, 'other outlier')} zeroed"

    @property
    def meaning(self) -> str:
        """A few words about the edit that follow from the figures."""
        return _explain_mean(self) if self.control == "mean" else _explain_outliers(self)

    def to_json(self) -> dict[str, Any]:
        """Return the figures as strict JSON types with 6 significant digits; NaN and infinities become None."""
        document: dict[str, Any] = {
            "control": self.control,
            "scalars": self.scalars,
            "perplexity": _encode(self.perplexity),
            **_encode_interval("ratio", self.ratio),
            **_encode_interval("edit_over_control", self.edit),
            "kl": _encode(self.kl),
            "finite": self.finite,
            "meaning": self.meaning,
        }
        if self.smallest is not None:
            document["smallest_magnitude"] = _encode(self.smallest)
        if self.control == "mean":
            document["held"] = [
                {
                    "tensor": one.coordinate.tensor,
                    "index": list(one.coordinate.index),
                    "first": _encode(one.first),
                    "others": _encode(one.others),
                }
                for one in self.held
            ]
        return document


def _explain_mean(result: ControlResult) -> str:
    low, high = _read_ends(result.ratio)
    if low is None or high is None:
        return _UNDECIDED
    if high <= HARMLESS:
        return "harmless: a constant does what these scalars do on this text"
    if low > HARMLESS:
        return "harmful: one constant for first tokens and one for all others does not replace these scalars"
    return f"undecided: the interval contains {HARMLESS:g}, up to which a control is harmless"


def _explain_outliers(result: ControlResult) -> str:
    low, high = _read_ends(result.edit)
    if low is None or high is None:
        return _UNDECIDED
    if low > 1:
        return "the edit raises perplexity more than these outliers do"
    if high < 1:
        return "the edit raises perplexity less than these outliers do"
    return "undecided: the edit and these outliers have similar effects"


_UNDECIDED = "undecided: no finite interval (it needs at least 8 windows)"


def _read_ends(interval: Interval) -> tuple[float | None, float | None]:
    """Return the ends of an interval, or None for both if one is missing or not a number."""
    low, high = interval.low, interval.high
    missing = low is None or high is None or math.isnan(low) or math.isnan(high)
    return (None, None) if missing else (low, high)


def _encode(value: float | None) -> float | None:
    return round_number(value) if value is not None and math.isfinite(value) else None


def _encode_interval(name: str, interval: Interval) -> dict[str, float | None]:
    ends = {"": interval.mean, "_low": interval.low, "_high": interval.high}
    return {name + end: _encode(value) for end, value in ends.items()}
