"""Continue texts greedily with a model and its variants.

This module must not depend on texts or metrics.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swsurgery.model.calls import REFUSALS
from swsurgery.model.forward import LayeredModel
from swsurgery.model.other_tensors import OtherTensors
from swsurgery.model.variant import Variant
from swsurgery.progress import Progress, Silent


@dataclass(frozen=True)
class TextLimits:
    """When a continuation ends: after `count` tokens, at the length `context`, or before a token of `stops`."""

    count: int
    context: int
    stops: Collection[int]

    def is_full(self, beginning: Sequence[int], made: Sequence[int]) -> bool:
        """Return True if no token may be added."""
        return len(made) >= self.count or len(beginning) + len(made) >= self.context

    def choose(self, logits: Tensor) -> int | None:
        """Return the most likely token; None if it is in `stops`, or if one of the logits is not finite."""
        token = int(logits.float().argmax())
        return None if token in self.stops or not bool(logits.isfinite().all()) else token


def list_stops(model: LayeredModel) -> frozenset[int]:
    """Return the ids of the tokens that end a text, as the configs of the model state them."""
    configs = (getattr(model.model, "generation_config", None), model.model.config.get_text_config())
    found = [getattr(config, "eos_token_id", None) for config in configs]
    return frozenset(n for each in found for n in (each if isinstance(each, list) else [each]) if isinstance(n, int))


def generate(
    model: LayeredModel, variant: Variant, beginnings: Sequence[Sequence[int]], limits: TextLimits, progress: Progress
) -> list[list[int]]:
    """Continue each sequence by the most likely tokens. Returns the new tokens of each sequence.

    If all weights are in memory, the model keeps the keys and values of earlier tokens. Otherwise, and if the model has
    no such cache, each token takes a run of the whole sequence. `progress` counts the tokens.
    """
    if model.weights is None:
        with contextlib.suppress(*REFUSALS), torch.no_grad(), _swap(model, variant):
            return [_generate_cached(model, ids, limits, progress) for ids in beginnings]
    return _generate_in_runs(model, variant, beginnings, limits, progress)


@contextlib.contextmanager
def _swap(model: LayeredModel, variant: Variant) -> Iterator[None]:
    """Give a model that is in memory the weights of a variant for the length of a `with` block."""
    plan = model.plan_variant(variant)
    assert plan != "apart", "such a variant is opened as a model of its own"
    model.places.find([variant.scalars])
    others = OtherTensors([plan], [model.device])
    try:
        with others.swap_all(0), model.places.swap(variant.scalars):
            yield
    finally:
        others.close()


def _generate_cached(model: LayeredModel, ids: Sequence[int], limits: TextLimits, progress: Progress) -> list[int]:
    """Continue one sequence. Raises one of REFUSALS if the model has no cache."""
    made: list[int] = []
    past = None
    new = list(ids)
    while not limits.is_full(ids, made):
        given = torch.tensor([new], device=model.device)
        found = model.model(input_ids=given, past_key_values=past, use_cache=True)
        past = found.past_key_values
        if past is None:
            raise ValueError("the model has no cache")
        if (token := limits.choose(found.logits[0, -1])) is None:
            break
        made.append(token)
        new = [token]
        progress.advance(1)
    return made


def _generate_in_runs(
    model: LayeredModel, variant: Variant, beginnings: Sequence[Sequence[int]], limits: TextLimits, progress: Progress
) -> list[list[int]]:
    """Continue all sequences together, one token in each run."""
    made: list[list[int]] = [[] for _ in beginnings]
    active = [at for at, ids in enumerate(beginnings) if not limits.is_full(ids, [])]
    while active:
        sequences = [[*beginnings[at], *made[at]] for at in active]
        tokens = [
            limits.choose(outcomes.logits[0][-1]) for outcomes in model.run(sequences, [variant], progress=Silent())
        ]
        for at, token in zip(active, tokens, strict=True):
            made[at] += [] if token is None else [token]
        going = (at for at, token in zip(active, tokens, strict=True) if token is not None)
        active = [at for at in going if not limits.is_full(beginnings[at], made[at])]
        progress.advance(len(tokens))
    return made
