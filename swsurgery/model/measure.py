"""Compute figures from logits: perplexity, KL, stop-word mass, next tokens.

The stop-word mass is the mean probability of all stop words together. figures.py computes the figures of one window.
This module must not run a model or judge its figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from swsurgery.errors import ModelError
from swsurgery.model.cutting import Window
from swsurgery.model.figures import WindowFigures, find_finite_rows
from swsurgery.model.intervals import Interval, compute_mean_interval
from swsurgery.model.outcomes import Outcomes, Peak, compute_magnitude
from swsurgery.model.report import Side, SuperActivation
from swsurgery.model.tokenizer import Tokenizer

TOP_TOKENS = 5
"""Number of most likely next tokens that a report lists for each prompt."""


def get_vocabulary_size(model: PreTrainedModel) -> int:
    """Return the number of token ids that `model` accepts."""
    size = model.get_input_embeddings().num_embeddings
    assert isinstance(size, int)
    return size


def refuse_unknown_tokens(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> None:
    """Raise ModelError if `sequences` contain a token id that is not in the vocabulary of `model`."""
    vocabulary = get_vocabulary_size(model)
    if (largest := max((token for ids in sequences for token in ids), default=0)) >= vocabulary:
        raise ModelError(
            f"the tokenizer gives token id {largest}",
            f"the model has {vocabulary} token ids, from 0",
            "use this model's tokenizer",
        )


class Totals:
    """Sums over the scored positions of all windows, kept separately for each variant.

    The argument `number` of a method is the number of a variant; number 0 is the base.
    """

    def __init__(
        self,
        stop_tokens: Sequence[int],
        variants: int = 2,
        only_losses: bool = False,
        words: int | None = None,
        variances: Sequence[float] = (),
    ):
        """With `only_losses`, only the negative log-likelihoods and KL are computed; the other figures stay empty.

        `words` is the number of words of the text, for the perplexity per word; None: it is not computed. `variances`
        permits estimates of losses, as `WindowFigures` describes.
        """
        self._variances = variances
        self.estimated: set[int] = set()
        """The variants of which some losses were estimated. Their KL is NaN."""
        self.stop_tokens, self.only_losses, self.words = list(stop_tokens), only_losses, words
        self._span: int | None = None
        self.scored = 0
        self.windows = 0
        self.kl = [0.0] * variants
        self.stop_mass = [0.0] * variants
        self.finite = [True] * variants
        self.peaks: list[SuperActivation | None] = [None] * variants
        self.by_layer: list[dict[int, float]] = [{} for _ in range(variants)]
        """The hidden state of largest magnitude after each layer, by variant and number of the layer."""
        self.window_kl: list[list[float]] = [[] for _ in range(variants)]
        """The mean KL(base || variant) of the scored tokens of each variant and span, in nats per token."""
        self.token_nll: list[list[Tensor]] = [[] for _ in range(variants)]
        """The negative log-likelihoods of the scored tokens, a tensor per variant and span (float64, on the CPU).

        A span is a window, or several windows that overlap (`cutting.Window`).
        """

    def add_window(self, ids: Sequence[int], outcomes: Outcomes) -> None:
        """Add the outcomes of one window with the token ids `ids`. Windows of one span must follow one another.

        Each position except the last is scored unless `ids` is a Window that says otherwise.
        """
        window = Window.of(ids)
        figures = WindowFigures(window, len(self.kl), self.stop_tokens, self.only_losses, self._variances)
        figures.read(outcomes.logits)
        nll, kl, stop_mass = figures.sum_up()
        self.estimated |= figures.estimated
        joins = window.span is not None and window.span == self._span
        self._span = window.span
        for number in range(len(self.kl)):
            self.kl[number] += kl[number]
            self._add_to_span(number, nll[number], kl[number], joins)
            self.stop_mass[number] += stop_mass[number]
        self.scored += len(window.targets)
        if not self.only_losses:
            self._add_extremes(outcomes, figures)
        self.windows += 1

    def _add_to_span(self, number: int, nll: Tensor, kl: float, joins: bool) -> None:
        """Add the losses and the sum of KL of a window to the last span if `joins` is True, else to a new span."""
        losses, means = self.token_nll[number], self.window_kl[number]
        if not joins:
            losses.append(nll)
            means.append(kl / len(nll))
            return
        before = len(losses[-1])
        losses[-1] = torch.cat([losses[-1], nll])
        means[-1] = (means[-1] * before + kl) / len(losses[-1])

    def _add_extremes(self, outcomes: Outcomes, figures: WindowFigures) -> None:
        """Add whether the logits of a window are finite, and its largest hidden states."""
        finite = figures.list_finite()
        for number, peak in enumerate(outcomes.peaks):
            self.finite[number] &= finite[number]
            self.peaks[number] = _choose_larger(self.peaks[number], peak, self.windows)
            for one in outcomes.by_layer[number]:
                largest = self.by_layer[number].setdefault(one.layer, one.value)
                self.by_layer[number][one.layer] = max(largest, one.value, key=compute_magnitude)

    def look(self, outcomes: Outcomes) -> None:
        """Record whether the logits of a prompt are finite. The positions of a prompt are not scored."""
        for number, logits in enumerate(outcomes.logits):
            self.finite[number] &= bool(find_finite_rows(logits).all())

    def compute_nll(self, number: int) -> float:
        """Return the negative log-likelihood of a variant, summed over all scored tokens, in nats."""
        return sum(float(window.sum()) for window in self.token_nll[number])

    def compute_mean_kl(self, number: int = 1) -> float:
        """Return the mean KL(base || variant) per scored token in nats.

        Only rounding can make this mean negative; the result is then 0.
        """
        return max(self.kl[number] / self.scored, 0.0)

    def compute_perplexity_ratio(self, number: int = 1) -> float:
        """Return the perplexity of a variant divided by that of the base.

        The ratio is computed from the losses, because each perplexity alone may exceed the range of floats.
        """
        return compute_exp((self.compute_nll(number) - self.compute_nll(0)) / self.scored)

    def compute_ratio_interval(self, number: int = 1) -> Interval:
        """Return the perplexity of a variant divided by that of the base, with the 95% interval of this ratio."""
        return compute_paired_ratio(self.token_nll[number], self.token_nll[0])

    def compute_kl_interval(self, number: int = 1) -> Interval:
        """Return the mean KL(base || variant) per scored token in nats, with its 95% interval."""
        values = [math.inf if math.isnan(value) else value for value in self.window_kl[number]]
        mean, low, high = compute_mean_interval(values, [len(window) for window in self.token_nll[0]])
        return Interval(mean, None if low is None else max(low, 0.0), high)

    def summarise_side(self, number: int) -> Side:
        """Return the perplexity, stop-word mass, finiteness and largest hidden state of one variant."""
        return Side(
            perplexity=compute_exp(self.compute_nll(number) / self.scored),
            stopword_mass=self.stop_mass[number] / self.scored,
            finite=self.finite[number],
            super_activation=self.peaks[number],
            largest_by_layer=tuple(value for _, value in sorted(self.by_layer[number].items())),
            word_perplexity=compute_exp(self.compute_nll(number) / self.words) if self.words else None,
        )


def compute_paired_ratio(mine: Sequence[Tensor], base: Sequence[Tensor]) -> Interval:
    """Return the perplexity of one model divided by that of another, with the 95% interval of this ratio.

    `mine` and `base` contain the losses of both models on the same tokens, one tensor per span (`Totals.token_nll`).
    """
    pairs = list(zip(mine, base, strict=True))
    rises = [float((one.nan_to_num(nan=math.inf) - other).mean()) for one, other in pairs]
    mean, low, high = compute_mean_interval(rises, [len(other) for _, other in pairs])
    ends = (None if end is None else compute_exp(end) for end in (low, high))
    return Interval(compute_exp(mean), *ends)


def list_top_tokens(tokenizer: Tokenizer, logits: Tensor) -> tuple[tuple[str, float], ...]:
    """Return the most likely tokens after the last position of `logits` (tokens, vocabulary), as (text, probability).

    Tokens of equal probability, which are common in bfloat16, are in the order of their ids. Returns an empty tuple if
    a logit of the last position is not finite.
    """
    last = logits[-1].float()
    if not last.isfinite().all():
        return ()
    probabilities, ids = last.softmax(-1).sort(descending=True, stable=True)
    texts = tokenizer.batch_decode([[i] for i in ids[:TOP_TOKENS].tolist()], clean_up_tokenization_spaces=False)
    return tuple(zip(texts, probabilities[:TOP_TOKENS].tolist(), strict=True))


def _choose_larger(best: SuperActivation | None, peak: Peak | None, window: int) -> SuperActivation | None:
    """Return the larger in magnitude of `best` and `peak`, or `best` if they are equal.

    A non-finite value counts as the largest. `window` is the number of the window that contains `peak`.
    """

    if peak is None or (best is not None and compute_magnitude(peak.value) <= compute_magnitude(best.value)):
        return best
    return SuperActivation(peak.layer, peak.token, peak.channel, peak.value, window)


def compute_exp(x: float) -> float:
    """Return exp(x); infinity if it exceeds the range of floats."""
    return math.exp(x) if not x > 709 else math.inf  # math.exp raises beyond 709; the condition lets NaN through
