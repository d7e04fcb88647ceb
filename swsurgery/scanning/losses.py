"""Measure and store the losses of a model with sets of its parts zeroed.

A part is a scalar or an expert. The causal tests (confirm.py, confirm_experts.py) compute their effects and verdicts
from these losses. This module chooses no parts and sets no bars.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

from swsurgery.errors import ModelError
from swsurgery.model import load, measure
from swsurgery.model.cutting import Window, count_scored
from swsurgery.model.forward import LayeredModel
from swsurgery.model.intervals import CONFIDENCE, LEAST_WINDOWS, compute_mean_interval
from swsurgery.model.variant import Scalars
from swsurgery.model.windows import count_variants_at_once
from swsurgery.progress import Progress
from swsurgery.scanning.causal_report import Effect
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.region import Region

Unit = TypeVar("Unit", bound=Hashable)
"""A part of the model that is zeroed or kept as a whole: a scalar, or an expert."""


class Gain(NamedTuple):
    """The rise `log` of the logarithm of the perplexity, and the ends `low` and `high` of its 95% interval.

    The ends are NaN if the text has too few windows for an interval.
    """

    log: float
    low: float
    high: float


class Losses(Generic[Unit]):
    """Measures and stores the losses of the model on each window with sets of units zeroed.

    A unit is a scalar or an expert. Losses are stored by window, so that the difference between the losses of any two
    sets has an interval. `find_layer` returns the number of the layer that contains a unit, and `list_targets` the
    scalars and regions that are zeroed for it. Units in `nothing` are left out of every set. `errors` contains the
    largest standard error, in nats per token, of an estimate of the losses of a group (model/near.py). The losses of
    all other groups are computed from all logits.
    """

    def __init__(
        self,
        model: LayeredModel,
        windows: Sequence[Sequence[int]],
        find_layer: Callable[[Unit], int],
        list_targets: Callable[[Unit], Collection[Coordinate | Region]],
        nothing: frozenset[Unit] = frozenset(),
        errors: Mapping[frozenset[Unit], float] | None = None,
    ):
        self.model, self.windows = model, [Window.of(window) for window in windows]
        self.scored = count_scored(self.windows)
        """Number of scored tokens in each span: a window, or several windows that overlap."""
        self._find_layer, self._list_targets, self._nothing = find_layer, list_targets, nothing
        self._errors = errors or {}
        self._base: list[float] = []
        # The loss in nats per token minus that of the stored model, by set of zeroed scalars, one value per span.
        # A float is the factor of a dose.
        self._extra: dict[frozenset[Unit] | float, list[float]] = {frozenset(): [0.0] * len(self.scored)}
        self._kl: dict[frozenset[Unit] | float, float] = {frozenset(): 0.0}
        self._estimated: set[frozenset[Unit] | float] = set()

    def measure(
        self,
        groups: Iterable[frozenset[Unit]],
        progress: Progress | None,
        doses: Mapping[float, Scalars] | None = None,
    ) -> None:
        """Measure the loss of each group of scalars that has not been measured, in few runs of the model.

        The number of groups in one run is limited by memory. Groups whose first edited layer is late run first. Groups
        with similar first layers thus share a run, which computes the layers before the first edited layer only once.
        `doses` maps factors to the values of the scalars that are multiplied by the factor; they are measured too.
        """
        unique = {group: group - self._nothing for group in groups}
        allowed = self._list_allowed(unique)
        wanted = [
            group
            for group in dict.fromkeys(unique.values())
            if group not in self._extra or (group in self._estimated and group not in allowed)
        ]
        self._measure(wanted, progress, doses or {}, allowed)

    def refine(self, groups: Iterable[frozenset[Unit]], progress: Progress | None) -> None:
        """Measure groups again whose losses were estimated, this time with all logits and KL."""
        reduced = dict.fromkeys(group - self._nothing for group in groups)
        wanted = [group for group in reduced if group in self._estimated]
        if wanted:
            self._measure(wanted, progress, {}, {})

    def _measure(
        self,
        wanted: list[frozenset[Unit]],
        progress: Progress | None,
        doses: Mapping[float, Scalars],
        allowed: Mapping[frozenset[Unit] | float, float],
    ) -> None:
        wanted.sort(key=lambda group: -min(map(self._find_layer, group), default=0))
        if self._base and not wanted:
            return
        with load.convert_run_errors(self.model.device, self.model.weights is not None):
            at_once = count_variants_at_once(self.model, self.windows)
            variants: list[tuple[frozenset[Unit] | float, Scalars]] = [(group, self._zero(group)) for group in wanted]
            variants += doses.items()
            for begin in range(0, max(1, len(variants)), at_once):
                self._run(variants[begin : begin + at_once], allowed, progress)

    def _list_allowed(self, groups: Mapping[frozenset[Unit], frozenset[Unit]]) -> dict[frozenset[Unit] | float, float]:
        """Return the allowed error of each group without the units in `nothing`; the least if groups become equal.

        `groups` maps each group to the group without these units.
        """
        errors = self._errors
        exact = {reduced for group, reduced in groups.items() if group not in errors}
        falling = sorted(filter(errors.__contains__, groups), key=errors.__getitem__, reverse=True)
        return {groups[group]: errors[group] for group in falling if groups[group] not in exact}

    def _zero(self, group: frozenset[Unit]) -> Scalars:
        return {target: 0.0 for unit in group for target in self._list_targets(unit)}

    def gain(
        self, group: frozenset[Unit], parts: Iterable[frozenset[Unit]] = (), confidence: float = CONFIDENCE
    ) -> Gain:
        """Compute the rise in loss from zeroing `group`, minus the rises from zeroing each of `parts`.

        The unit is nats per token, so this is also the rise of the logarithm of the perplexity. `confidence` is that of
        the interval.
        """
        taken = [self._extra[part - self._nothing] for part in parts]
        extra = [
            value - sum(part[number] for part in taken)
            for number, value in enumerate(self._extra[group - self._nothing])
        ]
        mean, low, high = compute_mean_interval(extra, self.scored, confidence)
        # The difference of two infinite losses is NaN. No comparison with NaN is true, so it never exceeds a bar.
        return Gain(mean, math.nan if low is None else low, math.nan if high is None else high)

    def effect(self, group: frozenset[Unit]) -> Effect:
        """Compute the effect of zeroing `group`: perplexity ratio, 95% interval, and mean KL in nats per token.

        The KL is NaN if the losses of the group were estimated.
        """
        return self._make_effect(group - self._nothing)

    def get_dose_effect(self, factor: float) -> Effect:
        """Compute the effect of a dose that was measured."""
        return self._make_effect(factor)

    def _make_effect(self, key: frozenset[Unit] | float) -> Effect:
        mean, low, high = compute_mean_interval(self._extra[key], self.scored)
        low, high = (None if end is None else compute_exp(end) for end in (low, high))
        return Effect(compute_exp(mean), low, high, self._kl[key])

    @property
    def enough(self) -> bool:
        """True if the text has enough windows for intervals and verdicts."""
        return len(self.scored) >= LEAST_WINDOWS

    @property
    def base_perplexity(self) -> float:
        return compute_exp(compute_mean_interval(self._base, self.scored).mean)

    def _run(
        self,
        variants: Sequence[tuple[frozenset[Unit] | float, Scalars]],
        errors: Mapping[frozenset[Unit] | float, float],
        progress: Progress | None,
    ) -> None:
        keys = [key for key, _ in variants]
        # The variance of a mean of n tokens is that of one token divided by n.
        most = [errors.get(key, 0.0) ** 2 * sum(self.scored) for key in keys]
        totals = measure.Totals([], 1 + len(variants), only_losses=True, variances=[0.0, *most])
        scalars = [{}, *(scalars for _, scalars in variants)]
        for outcomes in self.model.run(self.windows, scalars, progress=progress):
            totals.add_window(self.windows[outcomes.sequence], outcomes)
        base = totals.token_nll[0]
        if not all(bool(window.isfinite().all()) for window in base):
            raise ModelError(
                "losses of the stored model are not finite", self.model.checkpoint.root, "try another dtype"
            )
        self._base = [float(window.mean()) for window in base]
        for number, (key, _) in enumerate(variants, start=1):
            self._extra[key] = [
                float((nll.nan_to_num(nan=math.inf, posinf=math.inf) - stored).mean())
                for nll, stored in zip(totals.token_nll[number], base, strict=True)
            ]
            kl = totals.compute_mean_kl(number)
            self._kl[key] = math.inf if math.isnan(kl) and number not in totals.estimated else kl
        self._estimated.difference_update(keys)
        self._estimated.update(keys[number - 1] for number in totals.estimated)


def compute_exp(log: float) -> float:
    return math.exp(log) if not log > 709 else math.inf  # math.exp raises above 709; NaN stays NaN
