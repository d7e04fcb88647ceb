"""Cut text into windows of token ids, and compute figures from logits: perplexity, KL, stop-word mass, next tokens.

The stop-word mass is the mean probability of all stop words together. Figures are computed in float32 on slices of the
logits, so that a large vocabulary takes tens of megabytes instead of gigabytes, and summed in float64. This module must
not run a model or judge its figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from swsurgery.errors import ModelError
from swsurgery.model.intervals import Interval, compute_mean_interval
from swsurgery.model.outcomes import Outcomes, Peak, compute_magnitude
from swsurgery.model.report import Side, SuperActivation
from swsurgery.model.stopwords import STOP_WORDS
from swsurgery.model.tokenizer import Tokenizer

LOGITS_AT_ONCE = 2**22
"""Maximum number of logits in a slice. In float32 a slice takes 16 MB, and a few tensors of this size exist at a
time."""

KEPT_LOGITS = 2**26
"""Maximum number of the base's logits in one window whose logarithms are kept while other variants are compared with
them: 256 MB in float32. They are computed again for each variant of a larger window."""

TOP_TOKENS = 5
"""Number of most likely next tokens that a report lists for each prompt."""


def get_bos_prefix(tokenizer: Tokenizer) -> list[int]:
    """Return a list of the BOS token's id if `tokenizer` puts BOS in front of a text by default; otherwise [].

    Tokens that a tokenizer appends by default, such as EOS, are never used: they would end the text that the model is
    to continue.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and full[:1] == [bos] != plain[:1] else []


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


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token ids of `text` without special tokens. Raises ModelError if UTF-8 cannot encode the text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ModelError("the text is not valid Unicode", ascii(text)[:80]) from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def cut_windows(ids: Sequence[int], bos: Sequence[int], windows: int, window: int) -> list[list[int]]:
    """Cut the first `windows` non-overlapping windows of `window` tokens from `ids`, and put `bos` in front of each.

    An incomplete window is left out unless it is the only one. Raises ModelError if no window is asked for, or if the
    text or a window has fewer than two tokens, because then no token could be predicted.
    """
    if windows < 1 or window < 2:
        raise ModelError(
            "the windows are too few or too short",
            f"{windows} windows of {window} tokens",
            "use at least 1 window, and at least 2 tokens in each",
        )
    if len(ids) < 2:
        raise ModelError("the text is too short", f"{len(ids)} of the 2 tokens that are needed", "give a longer text")
    starts = range(0, max(1, len(ids) - window + 1), window)[:windows]
    return [[*bos, *ids[start : start + window]] for start in starts]


def stop_word_tokens(tokenizer: Tokenizer, vocabulary: int) -> list[int]:
    """List the token ids below `vocabulary` whose text is a stop word, ignoring case and one leading space."""
    ids = range(min(vocabulary, len(tokenizer)))
    decoded = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    return [i for i, text in zip(ids, decoded, strict=True) if text.removeprefix(" ").lower() in STOP_WORDS]


class Totals:
    """Sums over the scored positions of all windows, kept separately for each variant.

    The argument `number` of a method is the number of a variant; number 0 is the base.
    """

    def __init__(self, stop_tokens: Sequence[int], variants: int = 2):
        self.stop_tokens = list(stop_tokens)
        self.scored = 0
        self.windows = 0
        self.kl = [0.0] * variants
        self.stop_mass = [0.0] * variants
        self.finite = [True] * variants
        self.peaks: list[SuperActivation | None] = [None] * variants
        self.by_layer: list[dict[int, float]] = [{} for _ in range(variants)]
        """The hidden state of largest magnitude after each layer, by variant and number of the layer."""
        self.window_kl: list[list[float]] = [[] for _ in range(variants)]
        """The mean KL(base || variant) of the scored tokens of each variant and window, in nats per token."""
        self.token_nll: list[list[Tensor]] = [[] for _ in range(variants)]
        """The negative log-likelihoods of the scored tokens, a tensor per variant and window (float64, on the CPU)."""

    def add_window(self, ids: Sequence[int], outcomes: Outcomes) -> None:
        """Add the outcomes of one window with the token ids `ids`.

        Each position except the last is scored: its logits predict the next token.
        """
        base = outcomes.logits[0]
        kept = [_log(base[:-1][part]) for part in _split_parts(base[:-1])] if base.numel() <= KEPT_LOGITS else []
        targets = torch.tensor(ids[1:], device=base.device)
        for number, peak in enumerate(outcomes.peaks):
            logits = base if number == 0 else outcomes.logits[number]
            self._look(number, logits)
            before = self.kl[number]
            nll = []
            for at, part in enumerate(_split_parts(logits[:-1])):
                reference = kept[at] if kept else _log(base[:-1][part])
                log = _log(logits[:-1][part]) if number else reference
                nll.append(self._add(number, reference, log, targets[part]))
            self.token_nll[number].append(torch.cat(nll))
            self.window_kl[number].append((self.kl[number] - before) / len(targets))
            self.peaks[number] = _choose_larger(self.peaks[number], peak, self.windows)
            for one in outcomes.by_layer[number]:
                largest = self.by_layer[number].setdefault(one.layer, one.value)
                self.by_layer[number][one.layer] = max(largest, one.value, key=compute_magnitude)
        self.scored += len(targets)
        self.windows += 1

    def look(self, outcomes: Outcomes) -> None:
        """Record whether the logits of a prompt are finite. The positions of a prompt are not scored."""
        for number, logits in enumerate(outcomes.logits):
            self._look(number, logits)

    def _look(self, number: int, logits: Tensor) -> None:
        self.finite[number] &= all(bool(logits[part].isfinite().all()) for part in _split_parts(logits))

    def _add(self, number: int, reference: Tensor, log: Tensor, targets: Tensor) -> Tensor:
        """Add a slice of positions. `reference` and `log` are the log-probabilities of the base and of the variant."""
        if number:
            self.kl[number] += _sum((reference.exp() * (reference - log)).sum(-1))
        self.stop_mass[number] += _sum(log[:, self.stop_tokens].exp().sum(-1))
        return -log.gather(-1, targets[:, None])[:, 0].double().cpu()

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
        pairs = list(zip(self.token_nll[number], self.token_nll[0], strict=True))
        rises = [float((mine.nan_to_num(nan=math.inf) - base).mean()) for mine, base in pairs]
        mean, low, high = compute_mean_interval(rises, [len(base) for _, base in pairs])
        ends = (None if end is None else compute_exp(end) for end in (low, high))
        return Interval(compute_exp(mean), *ends)

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
        )


def _log(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)


def _split_parts(logits: Tensor) -> list[slice]:
    rows = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


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


def _sum(values: Tensor) -> float:
    return float(values.double().sum())


def compute_exp(x: float) -> float:
    """Return exp(x); infinity if it exceeds the range of floats."""
    return math.exp(x) if not x > 709 else math.inf  # math.exp raises beyond 709; the condition lets NaN through
