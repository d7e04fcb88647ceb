"""Plan the controls of an edit as variants of the base, run them beside the base, and compute their figures.

controls.py defines the controls. held_means.py adds the means of the control "mean".
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.model.controls import Control, ControlResult, HeldScalar, compute_paper_count
from swsurgery.model.forward import LayeredModel
from swsurgery.model.held_means import HeldMeans
from swsurgery.model.largest import find_largest_scalars, list_down_tensors
from swsurgery.model.measure import Totals, compute_paired_ratio
from swsurgery.model.outcomes import Outcomes
from swsurgery.model.variant import Scalars, Variant
from swsurgery.progress import Progress
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.region import Region

NOTHING_EXCLUDED = (
    "control outliers: super weights may be among the outliers, because no known ones are left out "
    "(name the model in base.model, or protect the candidates of a scan)"
)
"""Warning for the user if the manifest protects nothing, and no super weights of its model are known."""


@dataclass(frozen=True)
class PlannedControl:
    """A control as a variant of the loaded checkpoint, in which a number `zeroed` of scalars of the base are 0."""

    control: Control
    variant: Variant
    zeroed: int
    smallest: float | None = None

    def make_result(
        self, totals: Totals, number: int, patched: Sequence[Tensor], held: tuple[HeldScalar, ...]
    ) -> ControlResult:
        """Compute the figures of the control, which is variant `number` of `totals`.

        `patched` contains the losses of the patched model, one tensor per span, and `held` the means of the scalars.
        """
        return ControlResult(
            control=self.control.name,
            scalars=self.zeroed,
            perplexity=totals.summarise_side(number).perplexity,
            ratio=totals.compute_ratio_interval(number),
            edit=compute_paired_ratio(patched, totals.token_nll[number]),
            kl=totals.compute_mean_kl(number),
            finite=totals.finite[number],
            smallest=self.smallest,
            held=held,
        )


def plan_controls(
    controls: Sequence[Control],
    checkpoint: Checkpoint,
    base: Scalars,
    edited: Collection[Coordinate],
    excluded: Collection[Coordinate],
    say: Callable[[str], None],
) -> tuple[PlannedControl, ...]:
    """Make the variant of each control of an edit of the scalars `edited`.

    `base` contains the scalars of the base that differ in the loaded checkpoint. No outlier is in `edited` or
    `excluded`. If nothing is excluded, super weights may be among the outliers, and `say` receives a line. Raises
    ArchitectureError, ModelError and ShardError as `find_largest_scalars` does.
    """
    planned = []
    for control in controls:
        if control.name == "mean":
            held = frozenset(edited)
            planned.append(PlannedControl(control, Variant(_zero(base, held), held=held), len(held)))
            continue
        if not excluded:
            say(NOTHING_EXCLUDED)
        count = control.count or compute_paper_count(sum(list_down_tensors(checkpoint).values()))
        found = find_largest_scalars(checkpoint, count, {*edited, *excluded})
        variant = Variant(_zero(base, [one.coordinate for one in found]))
        planned.append(PlannedControl(control, variant, count, found[-1].magnitude))
    return tuple(planned)


def _zero(base: Scalars, names: Collection[Coordinate]) -> Scalars:
    """Return the scalars of the base that differ in the checkpoint, with the scalars `names` set to 0."""
    zeros: dict[Coordinate | Region, float] = dict.fromkeys(names, 0.0)
    return {**base, **zeros}


def run_variants(
    model: LayeredModel, windows: Sequence[Sequence[int]], variants: Sequence[Variant], progress: Progress | None
) -> Iterator[Outcomes]:
    """Run variants on windows of a text. The first variant is the base; others may hold scalars at their means."""
    means = HeldMeans(model, variants, [len(window) for window in windows], len(windows))
    return means.run(model, windows, progress)


class ControlRun:
    """The variants of controls in one run of a model. The first `windows` of its sequences are windows of the text.

    `make_results` computes the figures when the run is finished.
    """

    def __init__(self, planned: Sequence[PlannedControl], windows: int):
        self.planned, self._windows = planned, windows
        self._means: HeldMeans | None = None
        self._first = 0

    def run(
        self,
        model: LayeredModel,
        sequences: Sequence[Sequence[int]],
        variants: Sequence[Variant],
        progress: Progress | None,
    ) -> Iterator[Outcomes]:
        """Run `variants` and the controls, which are the last variants. The first of `variants` is the base."""
        every = [*variants, *(one.variant for one in self.planned)]
        self._first = len(variants)
        self._means = HeldMeans(model, every, [len(ids) for ids in sequences], self._windows)
        yield from self._means.run(model, sequences, progress)

    def make_results(self, totals: Totals, patched: Sequence[Tensor]) -> tuple[ControlResult, ...]:
        """Compute the figures of each control; `patched` contains the losses of the patched model."""
        means = self._means
        return tuple(
            one.make_result(totals, self._first + at, patched, means.list_held(one.variant) if means else ())
            for at, one in enumerate(self.planned)
        )
