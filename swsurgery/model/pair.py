"""Run a patched model and its base on the same sequences, whichever way the base is stored.

This module must not depend on metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.errors import ModelError
from swsurgery.model import Placement, load, measure
from swsurgery.model.control_run import ControlRun
from swsurgery.model.forward import LayeredModel
from swsurgery.model.generate import TextLimits, generate, list_stops
from swsurgery.model.outcomes import Outcomes, join_outcomes
from swsurgery.model.variant import Rounding, Scalars, Variant
from swsurgery.progress import Progress


@dataclass(frozen=True)
class ModelPair:
    """A patched model and its base.

    `old` is the base as a variant of `patched`. If the base is a model of its own, `base` is this model and `old` is
    what differs in it, usually nothing. If there is no base, `old` is the stored checkpoint and `base` is None.
    """

    patched: LayeredModel
    old: Variant
    base: LayeredModel | None = None

    @property
    def has_base(self) -> bool:
        """True if base and patched model may differ."""
        return self.base is not None or not self.old.is_stored

    @property
    def method(self) -> str:
        """How the models run, as `LayeredModel.method`."""
        return "separate models" if self.base is not None else self.patched.method

    def run(
        self,
        sequences: Sequence[Sequence[int]],
        roundings: Sequence[Rounding],
        progress: Progress | None,
        controls: ControlRun | None = None,
    ) -> Iterator[Outcomes]:
        """Run both models. The variants are base and patched, then base and patched with each rounding.

        If there is no base, the variants are the patched model without and with each rounding. The variants of
        `controls` come last; they need a base that differs in single scalars only.
        """
        own = [Variant(), *(Variant(rounding=rounding) for rounding in roundings)]
        old = [self.old, *(replace(self.old, rounding=rounding) for rounding in roundings)]
        if not self.has_base:
            return self.patched.run(sequences, own, progress=progress)
        if self.base is None:
            both = [variant for pair in zip(old, own, strict=True) for variant in pair]
            if controls is not None:
                return controls.run(self.patched, sequences, both, progress)
            return self.patched.run(sequences, both, progress=progress)
        runs = (self.base.run(sequences, old, progress=progress), self.patched.run(sequences, own, progress=progress))
        order = [*range(0, 2 * len(own), 2), *range(1, 2 * len(own), 2)]
        return (join_outcomes(parts, order) for parts in zip(*runs, strict=True))

    def generate(
        self, beginnings: Sequence[Sequence[int]], count: int, context: int, progress: Progress
    ) -> list[list[list[int]]]:
        """Continue each sequence greedily by at most `count` tokens. Returns the new tokens of the base, then patched.

        If there is no base, only the patched model is continued. A sequence ends before an end-of-text token, at the
        length `context`, and before logits that are not finite.
        """
        sides = [(self.base or self.patched, self.old)] if self.has_base else []
        sides.append((self.patched, Variant()))
        limits = TextLimits(count, context, list_stops(self.patched))
        progress.start(count * len(beginnings) * len(sides), "token", "generating")
        try:
            return [generate(model, variant, beginnings, limits, progress) for model, variant in sides]
        finally:
            progress.close()


def open_pair(
    checkpoint: Checkpoint,
    base: Variant | Checkpoint | None,
    scalars: Scalars,
    *,
    device: str,
    placement: Placement,
    say: Callable[[str], None],
) -> ModelPair:
    """Open the model of `checkpoint`, and its base if that must be a model of its own.

    `base` has other tensors or is another checkpoint, and `scalars` are the values of single scalars in it. Raises
    ModelError if a model cannot be opened, or if the vocabularies of both models differ.
    """
    patched = load.open_model(checkpoint, device=device, placement=placement, say=say)
    if isinstance(base, Checkpoint):
        other = load.open_model(base, device=device, placement=placement, say=say)
        found = [measure.get_vocabulary_size(each.model) for each in (patched, other)]
        if found[0] != found[1]:
            raise ModelError(f"the vocabularies differ: {found[0]} tokens, and {found[1]} in the base", base.root)
        return ModelPair(patched, Variant(), other)
    wholly = base or Variant()
    old = replace(
        wholly, scalars={place: value for place, value in scalars.items() if place.tensor not in wholly.tensors}
    )
    with load.convert_run_errors(patched.device, patched.weights is not None):
        apart = patched.open_apart(old)
    return ModelPair(patched, old) if apart is None else ModelPair(patched, old.without_tensors(), apart)
