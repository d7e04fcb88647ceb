"""Compute log-likelihoods of continuations for all variants of a model side by side.

Requests with the same input, such as the answers " A" and " B" of one question, share it. Only the logits of scored
tokens are computed. This module must not depend on lm-eval.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from swsurgery.model.figures import LIMITS
from swsurgery.model.outcomes import Logits, Outcomes


class Continuation(NamedTuple):
    """Token ids whose last `scored` are scored. The model reads all of them except the last one."""

    tokens: tuple[int, ...]
    scored: int


class Answer(NamedTuple):
    """The log-likelihood of a continuation in nats, and whether each of its tokens is the most likely one."""

    loglikelihood: float
    greedy: bool


Answers: TypeAlias = dict[Continuation, tuple[Answer, ...]]
"""The answers of each variant, in order, by continuation."""

Run: TypeAlias = Callable[[Sequence[Sequence[int]]], Iterator[Outcomes]]
"""Runs all variants on sequences of token ids."""


class Scored(NamedTuple):
    """The answers, and the different inputs in the order in which they were run."""

    answers: Answers
    inputs: Sequence[tuple[int, ...]]


def score_continuations(wanted: Sequence[Continuation], run: Run) -> Scored:
    """Score continuations in all variants of `run`. Longer inputs are run first."""
    shared: dict[tuple[int, ...], list[Continuation]] = defaultdict(list)
    for each in wanted:
        shared[each.tokens[:-1]].append(each)
    answers: Answers = {}
    inputs = sorted(shared, key=lambda ids: (-len(ids), ids))
    for outcomes in run(inputs):
        answers |= _score_sequence(shared[inputs[outcomes.sequence]], outcomes.logits)
    return Scored(answers, inputs)


def _score_sequence(shared: Sequence[Continuation], logits: Logits) -> Mapping[Continuation, tuple[Answer, ...]]:
    """Score all continuations of one input. They may differ in their last token and in how many tokens are scored."""
    length = len(shared[0].tokens) - 1
    begin = length - max(each.scored for each in shared)
    sums: list[Tensor] = [torch.zeros(len(logits), dtype=torch.float64)] * len(shared)
    greedy: list[Tensor] = [torch.ones(len(logits), dtype=torch.bool)] * len(shared)
    for variants, tokens, part in _list_parts(logits, begin, length):
        log = part.float().log_softmax(-1)  # (variants, tokens, vocabulary)
        best = log.argmax(-1)
        for at, each in enumerate(shared):
            first = max(tokens.start, length - each.scored)
            if first >= tokens.stop:
                continue
            targets = torch.tensor(each.tokens[first + 1 : tokens.stop + 1], device=log.device)
            rows = slice(first - tokens.start, None)
            found = log[:, rows].gather(-1, targets.expand(len(log), -1)[..., None])[..., 0]
            sums[at] = _add(sums[at], variants, found.double().sum(1).cpu())
            greedy[at] = greedy[at].clone()
            greedy[at][variants] &= best[:, rows].eq(targets).all(1).cpu()
    return {
        each: tuple(Answer(*pair) for pair in zip(sums[at].tolist(), greedy[at].tolist(), strict=True))
        for at, each in enumerate(shared)
    }


def _add(sums: Tensor, variants: slice, found: Tensor) -> Tensor:
    sums = sums.clone()
    sums[variants] += found
    return sums


def _list_parts(logits: Logits, begin: int, end: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield variants, tokens and their logits (variants, tokens, vocabulary), a bounded number at a time."""
    if not logits.is_divisible:
        for number, whole in enumerate(logits):
            yield slice(number, number + 1), slice(begin, end), whole[None, begin:end]
        return
    most = max(1, LIMITS[logits.device.type].base // logits.vocabulary)
    width = min(most, end - begin)
    height = max(1, most // width)
    for left in range(begin, end, width):
        tokens = slice(left, min(end, left + width))
        for top in range(0, len(logits), height):
            numbers = list(range(top, min(len(logits), top + height)))
            yield slice(top, numbers[-1] + 1), tokens, logits.read(numbers, tokens)
