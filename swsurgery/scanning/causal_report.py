"""Define the results of a causal test, for scalars and for experts in the same way.

A unit is a part of the model that is zeroed as a whole: a scalar or an expert. All results are frozen. This module must
not import torch, and it reads no files.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar, get_args
from typing import Protocol as Interface

from swsurgery.model.protocol import DEFAULT_PROTOCOL, Protocol

Verdict = Literal["needed alone", "needed jointly", "inert", "untested"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
"""All verdicts of the causal test, in the order in which printed summaries count them. "untested" means that the
measurement allowed no verdict."""


@dataclass(frozen=True)
class Effect:
    """The effect of zeroing a set of scalars.

    `ratio` is the perplexity after zeroing divided by the perplexity before. `low` and `high` are the ends of the 95%
    confidence interval of `ratio`, or None if the text has too few windows. `kl` is the mean KL(before || after) per
    token in nats.
    """

    ratio: float
    low: float | None
    high: float | None
    kl: float

    def to_json(self) -> dict[str, Any]:
        return {key: convert_to_plain(value) for key, value in vars(self).items()}


class Families(NamedTuple):
    """The numbers of effects that a scan tests, in two families: zeroed alone, and jointly with others.

    In each family, Holm's method limits the probability of any false verdict (clear_effects.py).
    """

    alone: int = 0
    jointly: int = 0

    def subtract(self, others: Families) -> Families:
        """Return the numbers of effects without `others`."""
        return Families(self.alone - others.alone, self.jointly - others.jointly)


class Tested(Interface):
    """A candidate of a scan: a scalar or an expert."""

    @property
    def unit(self) -> Hashable:
        """The coordinate of the scalar, or the name of the expert."""

    def to_json(self) -> dict[str, Any]: ...


TestedT = TypeVar("TestedT", bound=Tested, covariant=True)


@dataclass(frozen=True)
class UnitTrial(Generic[TestedT]):
    """The causal test of one candidate, which is a scalar or an expert.

    `alone` is the effect of zeroing only this candidate. `without` is the effect of zeroing all other candidates, or
    None if there is no other candidate.
    """

    candidate: TestedT
    alone: Effect
    without: Effect | None
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "alone": self.alone.to_json(),
            "without": self.without.to_json() if self.without else None,
        }


class UnitSet(Interface):
    """Scalars or experts that matter together."""

    @property
    def units(self) -> tuple[Hashable, ...]:
        """The coordinates of the scalars, or the names of the experts."""

    @property
    def effect(self) -> Effect:
        """The effect of zeroing all of them."""


TrialT = TypeVar("TrialT", bound=UnitTrial[Tested], covariant=True)
SetT = TypeVar("SetT", bound=UnitSet, covariant=True)


@dataclass(frozen=True)
class CausalTest(Generic[TrialT, SetT]):
    """The results and the conditions of the causal test of scalars or experts.

    `together` is the effect of zeroing all candidates. `null` contains one perplexity ratio for each random scalar or
    expert, zeroed alone. `base_perplexity` is the perplexity before zeroing. The text had `windows` windows of
    `window_tokens` tokens, in which `scored_tokens` predictions were scored by `protocol`. `families` contains the
    numbers of effects that the scan tested.
    """

    trials: tuple[TrialT, ...]
    together: Effect
    joint_sets: tuple[SetT, ...]
    null: tuple[float, ...]
    base_perplexity: float
    windows: int
    window_tokens: int
    text_sha256: str
    dtype: str
    device: str
    scored_tokens: int
    protocol: Protocol = field(default=DEFAULT_PROTOCOL, kw_only=True)
    families: Families = field(default=Families(), kw_only=True)

    @property
    def has_verdicts(self) -> bool:
        """True if at least one verdict is not "untested"."""
        return any(t.verdict != "untested" for t in self.trials)

    def to_json(self) -> dict[str, Any]:
        keys = ("base_perplexity", "windows", "window_tokens", "scored_tokens", "text_sha256", "dtype", "device")
        return {
            "together": self.together.to_json(),
            "null_ratios": convert_to_plain(self.null),
            **self.list_further_nulls(),
            **{key: convert_to_plain(getattr(self, key)) for key in keys},
            "protocol": self.protocol.to_json(),
            "families": self.families._asdict(),
        }

    def list_further_nulls(self) -> dict[str, Any]:
        """Return what else was zeroed for comparison, as JSON; nothing in this class."""
        return {}


AnyTest: TypeAlias = CausalTest[UnitTrial[Tested], UnitSet]
"""A causal test of units of any kind."""


def find_largest_ratio(test: AnyTest | None, zeroed: AbstractSet[Hashable]) -> float:
    """Find the largest perplexity ratio that a causal test measured for zeroing one, some or all of the units `zeroed`.

    Returns 1 if there was no causal test, or if every ratio is NaN.
    """
    if test is None:
        return 1.0
    ratios: list[float] = [t.alone.ratio for t in test.trials if t.candidate.unit in zeroed]
    ratios += [s.effect.ratio for s in test.joint_sets if zeroed >= set(s.units)]
    if zeroed == {t.candidate.unit for t in test.trials}:
        ratios.append(test.together.ratio)
    return max((ratio for ratio in ratios if not math.isnan(ratio)), default=1.0)


def merge_trial(candidate: Tested, trial: UnitTrial[Tested] | None) -> dict[str, Any]:
    """Return the JSON of a candidate, with the results of its causal test if there was one."""
    return candidate.to_json() | (trial.to_json() if trial else {})


EFFECT_COLUMNS = ("ratio", "ratio_low", "ratio_high", "kl")
"""Columns of a table with the effect of zeroing one candidate alone: perplexity ratio, its 95% interval, and KL."""


def make_row(columns: Sequence[str], entry: Mapping[str, Any]) -> dict[str, object]:
    """Return the table row of a candidate from its JSON. Columns without a value are None."""
    alone = entry.get("alone") or {}
    effect = (alone.get(key) for key in ("ratio", "low", "high", "kl"))
    return {column: entry.get(column) for column in columns} | dict(zip(EFFECT_COLUMNS, effect, strict=True))


def convert_to_plain(value: object) -> Any:
    """Convert a value to a form for strict JSON: numbers that are not finite become strings such as "nan"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [convert_to_plain(v) for v in value]
    return value
